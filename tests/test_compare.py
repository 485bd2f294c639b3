"`compare_opt`: it tells what is so, with any Learner, and leaves that as it was"
import copy,random,socket,sqlite3,threading,warnings
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

from tests.learners import DataLoader,DataLoaders,equal,tabular,tensor_dls,text,vision
from tests.cases import *
from fastai.callback.all import (Callback,CSVLogger,EarlyStoppingCallback,GradientAccumulation,GradientClip,
                                 ProgressCallback,SaveModelCallback)
from fastai.learner import CancelFitException,Learner,Metric
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

@pytest.mark.parametrize('name', ['ToJit','ToNative','CompareOpt'])
def test_compare_with_a_callback_of_that_name(name, tmp_path):
    "It hides a method of the Learner, which is not asked"
    learn = vision(Adam, tmp_path).add_cb(type(name, (Callback,), {})())
    assert [*Learner.compare_opt(learn, steps=2, show=False).columns[:2]] == ['Adam','adam_jit']

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
    df = compared(learn, 8)  # a CSVLogger that has no file yet can be copied
    assert alike(df, 1e-10) and len(df.attrs['seconds']['Adam']['optimizer step']) == 4
    assert not list(tmp_path.rglob('*'))

# --- What cannot be copied

class Looker(Callback):
    "Looks on; what it holds counts its batches"
    def __init__(self, holds): self.holds,self.batches = holds,0
    def after_batch(self): self.batches += 1
class Late(Looker):
    "Has an event in which others change training, but after the Recorder"
    order = 51
    def before_batch(self): self.batches += 100
class Changer(Looker):
    def before_step(self): self.batches += 100

def generator(): yield 1
def file(path): return open(path/'log.txt', 'w')
def thread(path): return threading.Thread(target=print)
OPEN = dict(lock=lambda path: threading.Lock(), file=file, connection=lambda path: sqlite3.connect(':memory:'),
            socket=lambda path: socket.socket(), thread=thread, generator=lambda path: generator(),
            nested=lambda path: [dict(a=generator())])

@pytest.mark.parametrize('cls', [Looker,Late])
@pytest.mark.parametrize('what', OPEN)
def test_compare_without_lookers(what, cls, tmp_path):
    "A callback that holds what cannot be copied, and only looks on, is left out, with a note"
    learn = vision(Adam, tmp_path)
    cb = cls(OPEN[what](tmp_path))
    learn.add_cb(cb)
    with pytest.warns(UserWarning, match=f'without what cannot be copied.*`learn.{cb.name}.holds.*If any') as notes:
        assert alike(compared(learn), 1e-10)
    assert sum('compare_opt' in str(w.message) for w in notes) == 1
    assert cb.batches == 0 and getattr(learn, cb.name) is cb and cb.learn is learn

@pytest.mark.parametrize('what', OPEN)
def test_compare_refuses_to_leave_out_what_changes_training(what, tmp_path):
    learn = vision(Adam, tmp_path)
    learn.add_cb(Changer(OPEN[what](tmp_path)))
    before = all_of(learn)
    with pytest.raises(TypeError, match='cannot copy `learn.changer.holds.*removed_cbs'): learn.compare_opt(2)
    after = all_of(learn)
    assert not [k for k in before if not equal(before[k], after[k])] and learn.changer.batches == 0

class Referring(Callback):
    def before_batch(self): self.learn.looker.batches += 1

def test_compare_error_names_what_was_left_out(tmp_path):
    "A callback that refers to it fails in the copy; other errors stay as they are"
    learn = vision(Adam, tmp_path).add_cbs([Looker(generator()), Referring()])
    before = all_of(learn)
    with pytest.warns(UserWarning, match='learn.looker.holds'):
        with pytest.raises(RuntimeError, match='(?s)AttributeError.*left out learn.looker,.*removed_cbs') as e:
            learn.compare_opt(2)
    assert isinstance(e.value.__cause__, AttributeError)
    after = all_of(learn)
    assert not [k for k in before if not equal(before[k], after[k])]
    with learn.removed_cbs(learn.looker), pytest.raises(AttributeError): learn.compare_opt(2)
    with learn.removed_cbs(learn.cbs.filter(lambda cb: isinstance(cb, (Looker,Referring)))): compared(learn)

class Scheduler(Looker):
    "Changes training in an event in which most callbacks only look on"
    def after_batch(self): self.learn.opt.set_hyper('lr', 1e-3*(self.train_iter+1))

@pytest.mark.parametrize('holds', [[],[generator()]], ids=['copied','left_out'])
def test_compare_with_a_scheduler(holds, tmp_path):
    "Both copies train with it, or both without, as the warning says"
    learn = vision(Adam, tmp_path)
    alone = compared(learn).attrs['losses']['Adam']
    learn.add_cb(Scheduler(holds))
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter('always')
        df = compared(learn)
    assert alike(df, 1e-10) and (df.attrs['losses']['Adam'] == alone) == bool(holds)
    assert any('your training will differ from theirs' in str(w.message) for w in notes) == bool(holds)

def test_compare_names_what_training_needs(tmp_path):
    "Wherever it is: in the model, the loss function, the data"
    def in_model(learn): learn.model[1].log = generator()
    def in_loss(learn): learn.loss_func = partial(learn.loss_func.__call__); learn.loss_func.log = generator()
    def in_data(learn): learn.dls.loaders[0].log = [generator()]
    def in_opt(learn): learn.create_opt(); learn.opt.log = {'a':generator()}
    for put,name in ((in_model,r"learn.model._modules\['1'\].log"), (in_loss,'learn.loss_func.log'),
                     (in_data,r'learn.dls.loaders\[0\].log\[0\]'), (in_opt,r"learn.opt.log\['a'\]")):
        learn = vision(Adam, tmp_path)
        put(learn)
        with pytest.raises(TypeError, match=f"cannot copy `{name}` .*'generator'"): learn.compare_opt(2)

def test_compare_shares_modules(tmp_path):
    "Of Python: as it does functions"
    learn = vision(Adam, tmp_path).add_cb(Changer(torch))
    learn.model.library = torch
    assert alike(compared(learn), 1e-10)

class Held(Metric):
    name = 'held'
    def __init__(self): self.held = generator()
    def accumulate(self, learn): pass
    def reset(self): pass
    value = 0.

def test_compare_without_metrics_and_extras(tmp_path):
    learn = vision(Adam, tmp_path, metrics=Held())
    learn.run,metrics = generator(),learn.metrics
    with pytest.warns(UserWarning, match=r'`learn.run`.*`learn.metrics\[0\].held`'): compared(learn)
    assert learn.metrics is metrics and len(metrics) == 1 and learn.run is not None

@pytest.mark.parametrize('open_still', [False,True])
def test_compare_after_csv_logger(open_still, tmp_path):
    "Closed after training, and still open where that was interrupted"
    class Stop(Callback):
        def after_batch(self):
            if open_still: raise KeyboardInterrupt
    learn = vision(Adam, tmp_path).add_cb(CSVLogger())
    try: learn.fit(1, cbs=Stop())
    except KeyboardInterrupt: pass
    learn.remove_cbs(Stop)
    file,text = learn.csv_logger.file,(tmp_path/'history.csv').read_text()
    with pytest.warns(UserWarning, match='`learn.csv_logger.file`'): assert alike(compared(learn), 1e-10)
    assert learn.csv_logger.file is file and file.closed != open_still
    assert (tmp_path/'history.csv').read_text() == text

def test_compare_after_training_was_broken_off(tmp_path):
    "As by `lr_find`: a bar and an iterator stay behind, which are generators"
    def cancel(): raise CancelFitException
    learn = vision(Adam, tmp_path)
    items = list(learn.dls.loaders[0].dataset)
    class Items(list):
        def __iter__(self): return (o for o in items)
    learn.dls.loaders[0].dataset = Items(items)
    learn.add_cb(ProgressCallback)
    learn.fit(1, cbs=Callback(after_batch=lambda self: cancel()))
    assert isinstance(vars(learn.dls.loaders[0])['it'], type(generator())) and learn.progress.pbar is not None
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert alike(compared(learn), 1e-10)

@pytest.mark.parametrize('cls', [DataLoader,torch.utils.data.DataLoader])
def test_compare_with_workers(cls, tmp_path):
    "Workers that persist are the Learner's; copies have their own"
    learn = vision(Adam, tmp_path)
    kw = dict(num_workers=1, persistent_workers=True, pin_memory=torch.cuda.is_available())
    kw['bs' if cls is DataLoader else 'batch_size'] = 8
    learn.dls = DataLoaders(*[cls(dl.dataset, **kw) for dl in learn.dls.loaders], device='cpu')
    next(iter(learn.dls.loaders[0]))
    old = getattr(learn.dls.loaders[0], '_iterator', None)
    df = learn.compare_opt(2, show=False)
    assert alike(df, 1e-10) and getattr(learn.dls.loaders[0], '_iterator', None) is old
    assert cls is DataLoader or old._workers[0].is_alive()

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
