"`compare_opt`: it tells what is so, with any Learner, and leaves that as it was"
import copy,random
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

from tests.learners import equal,tabular,tensor_dls,text,vision
from tests.cases import *
from fastai.callback.all import CSVLogger,EarlyStoppingCallback,GradientAccumulation,GradientClip,SaveModelCallback
from fastai.torch_core import set_seed
from fastxtend_jit.compare import _Run,_table
from tests import engine
from tests.support import eight

def all_of(learn):
    "All of a Learner that must stay, copied"
    item = lambda o: o.clone() if isinstance(o, torch.Tensor) else copy.deepcopy(o)
    opt,ps,dls = learn.opt,[*learn.model.parameters()],learn.dls.loaders
    return dict(
        model={k:item(v) for k,v in learn.model.state_dict().items()}, training=learn.model.training,
        grads=[p.grad is not None and item(p.grad) for p in ps], requires=[p.requires_grad for p in ps],
        opt=opt and item(opt.state_dict()), frozen=opt and opt.frozen_idx, opt_id=id(opt),
        cbs=[id(cb) for cb in learn.cbs], attrs=sorted(vars(learn)),
        recorder={k:item(getattr(learn.recorder, k, None)) for k in ('lrs','losses','values','iters','log')},
        rng=[dl.rng.getstate() for dl in dls], loaders=[id(dl) for dl in dls],
        items=[item(getattr(getattr(dl, 'items', None), 'idxs', None)) for dl in dls],
        python=random.getstate(), numpy=np.random.get_state(), torch=torch.get_rng_state())

def compared(learn, steps=6, **kw):
    "What `compare_opt` returns, once it is sure that it changed nothing"
    before = all_of(learn)
    res = learn.compare_opt(steps, **{'show':False, **kw})
    after = all_of(learn)
    assert not [k for k in before if not equal(before[k], after[k])]
    return res

def alike(df, tol):
    off = df['relative to largest']
    return (off.dropna() <= tol).all() and off.notna().sum() == len(df)-3

@eight
@pytest.mark.parametrize('made', ['frozen','native','jit'])
def test_compare_opt(case, made, tmp_path):
    set_seed(0)
    learn = vision(partial(case.native, **case.kw), tmp_path, train_bn=False)
    if made == 'frozen': learn.freeze_to(1)
    else: learn.fit_one_cycle(1, 1e-2)
    if made == 'jit': learn.to_jit()
    df = compared(learn)
    assert list(df.columns[:2]) == [case.native.__name__,case.jit.__name__] and df.columns.name == 'medians of 6 steps'
    assert alike(df, 1e-10) and (df.iloc[:3,:3] > 0).all().all()
    moved = df.iloc[4:,1]
    assert len(moved) == 3 and (moved[1:] > 1e-5).all() and (moved.iloc[0] == 0) == (made == 'frozen')
    assert [len(v) for v in df.attrs['losses'].values()] == [6,6]

@pytest.mark.parametrize('make', [tabular,text], ids=lambda f: f.__name__)
def test_compare_other_learners(make, tmp_path):
    set_seed(0)
    learn = make(Adam, tmp_path)
    learn.fit(1, 1e-2)
    assert alike(compared(learn), 1e-9)

def test_compare_tells_a_difference(tmp_path, monkeypatch):
    learn = vision(Adam, tmp_path)
    right = adam_jit_step.compiled
    engine.run_instead(monkeypatch, adam_jit_step, lambda **kw: right(**{**kw, 'lr': kw['lr']*1.5}))
    assert (compared(learn)['relative to largest'].dropna() > 1e-4).all()

def test_compare_with_callbacks(tmp_path):
    "Callbacks that change training are in it; those that write or stop keep still"
    learn = vision(Adam, tmp_path)
    learn.add_cbs([GradientClip(0.1), GradientAccumulation(16), SaveModelCallback(monitor='valid_loss', with_opt=True),
                   CSVLogger(), EarlyStoppingCallback()])
    df = compared(learn, 8)
    assert alike(df, 1e-10) and len(df.attrs['seconds']['Adam']['optimizer step']) == 4
    assert not list(tmp_path.rglob('*'))

def test_compare_dropout(tmp_path):
    learn = vision(Adam, tmp_path)
    learn.model = nn.Sequential(learn.model[0], learn.model[1], nn.Sequential(nn.Dropout(0.5), *learn.model[2]))
    assert alike(compared(learn), 1e-10)

def test_compare_frozen_with_old_gradients(tmp_path):
    "As in fastai, weights frozen after training go on decaying: their gradients are zero, not `None`"
    learn = vision(Adam, tmp_path, wd=0.1, train_bn=False)
    learn.fit(1, 1e-2)
    learn.freeze()
    df = compared(learn, lr=1e-2)
    assert alike(df, 1e-10) and 1e-4 < df.iloc[4,1] < 1e-2

def test_compare_rest(tmp_path):
    learn = vision(partial(SGD, mom=0.9), tmp_path)
    assert alike(compared(learn, 25, lr=1e-3), 1e-10)  # more steps than batches
    learn.model[0][0].weight.data.fill_(float('nan'))
    assert compared(learn)['largest difference'].isna().sum() > 3  # a model that is broken does not look equal
    with pytest.raises(ValueError, match='at least 1'): learn.compare_opt(0)
    with pytest.raises(TypeError, match='has no counterpart'): vision(torch.optim.Adam, tmp_path).compare_opt()
    learn.dls.loaders[0] = tensor_dls(torch.randn(9, 2, 6, 6), torch.randint(3, (9,)), bs=4).train.new(drop_last=True)
    with pytest.raises(ValueError, match='gives no batch'): learn.compare_opt()

def test_compare_sees_nan():
    "Also one that comes late and goes again"
    runs = [_Run(name, [], [], losses, {}) for name,losses in (('theirs',[2.,1.,1.]), ('ours',[2.,float('nan'),1.]))]
    assert np.isnan(_table(*runs).loc['last loss','largest difference'])

def test_compare_shows(tmp_path, monkeypatch):
    figs = []
    monkeypatch.setattr(plt, 'show', lambda: figs.append(plt.gcf()))
    df = vision(Adam, tmp_path).compare_opt(3)
    assert len(figs) == 1 and [len(a.lines)+len(a.patches) for a in figs[0].axes] == [2,6]
    assert 'NaN' not in df._repr_html_() + repr(df) and 'weights moved, group 0' in df._repr_html_()
    plt.close('all')
