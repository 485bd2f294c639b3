"`to_jit`, `to_native` and `jit_opt`, and the messages that a new user meets"
import pickle
from functools import partial
from typing import List

import pytest
import torch
from torch import nn,Tensor

from tests import engine
from tests.learners import adam_of_ones_own,quiet,tensor_dls,vision
from tests.cases import *
from tests.support import eight
from fastai.callback.core import Callback
from fastai.imports import noop
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastai.optimizer import Lookahead,Optimizer,OptimWrapper,sgd_step
from fastxtend_jit.fragments import average_grad
from fastxtend_jit.learner import counterparts,factories_of,jit_opt

# --- which goes with which

@pytest.mark.parametrize('native,jit', PAIRS, ids=lambda f: f.__name__)
def test_jit_opt(native, jit):
    assert jit_opt(native) is jit and jit_opt(jit) is jit
    f = jit_opt(partial(partial(native, eps=1e-7), wd=0.1))
    assert f.func is jit and f.keywords == dict(eps=1e-7, wd=0.1)
    assert jit_opt(f) is f
    assert pickle.loads(pickle.dumps(f)).func is jit

@pytest.mark.parametrize('bad', [torch.optim.Adam, partial(OptimWrapper, opt=torch.optim.Adam),
                                 lambda ps, lr: Optimizer(ps, [sgd_step], lr=lr), lambda ps, lr: 1/0, adam_jit_step,
                                 'Adam', None])
def test_no_counterpart(bad, tmp_path):
    for f in (lambda: jit_opt(bad), vision(bad, tmp_path).to_jit, vision(bad, tmp_path).to_native):
        with pytest.raises(TypeError, match=r'has no counterpart.*SGD \(sgd_jit\).*ranger \(ranger_jit\)'): f()

@pytest.mark.parametrize('native', [Adam,Larc,ranger], ids=lambda f: f.__name__)
def test_function_as_factory(native):
    "A function that makes an optimizer of fastai's is called to see what, and what it makes is converted"
    made = []
    def mine(ps, mom=0.9, **kw): made.append(ps); return native(ps, mom=mom, **kw)
    f = jit_opt(mine)
    opt = f([nn.Parameter(torch.ones(3))], lr=0.1, mom=0.5)
    assert len(made) == 2 and opt.hypers[0]['mom'] == 0.5
    assert opt.opt_step is jit_opt(native)([torch.ones(1)], lr=0.).opt_step
    assert jit_opt(f) is f and engine.counterpart(f, False) is mine
    g = engine.counterpart(jit_opt(partial(f, mom=0.7)), False)
    assert g.func is mine and g.keywords == dict(mom=0.7)

@pytest.mark.parametrize('case', AHEAD, ids=str)
def test_lookahead_as_factory(case, tmp_path):
    "`to_jit` and back, of a Learner whose `opt_func` wraps another in fastai's `Lookahead`"
    if case.native.factory.__module__ == 'tests.references':
        with pytest.raises(TypeError, match='has no counterpart'): jit_opt(case.native)
        return
    learn = vision(case.native, tmp_path)
    learn.to_jit().fit(1)
    step = ranger_jit_step if case.jit.factory is radam_jit else case.step  # around RAdam it is a ranger
    assert type(learn.opt) is JitLookahead and learn.opt.opt_step is step and learn.opt.count == 4
    assert pickle.loads(pickle.dumps(learn.opt_func))([torch.zeros(2)], lr=0.1).opt_step is step
    learn.to_native().fit(1)
    assert type(learn.opt) is Lookahead and learn.opt_func is case.native and learn.opt.count == 8

@pytest.mark.parametrize('native,jit', OTHERS, ids=lambda f: f.__name__)
def test_no_native(native, jit, tmp_path):
    assert jit_opt(jit) is jit and jit_opt(partial(jit, wd=0.1)).func is jit
    learn = vision(jit, tmp_path)
    assert learn.to_jit() is learn
    learn.fit(1)
    opt = learn.opt
    name = f'`{jit.__name__}_step`'
    with pytest.raises(TypeError, match=f'{name}, an optimizer that fastai does not have, has no counterpart'):
        learn.to_native()
    assert learn.opt is opt and learn.opt_func is jit

# --- a live optimizer

@pytest.mark.parametrize('jit', [False,True], ids=['native','jit'])
@pytest.mark.parametrize('case', NATIVE, ids=str)
def test_factories_of(case, jit):
    pair,args = factories_of(case.make([nn.Parameter(torch.ones(2))], jit))
    assert pair == (case.native,case.jit) and pair in counterparts
    assert 'decouple_wd' in args and all(case.kw.get(n, v) == v for n,v in args.items())

def grads(seed, shapes):
    torch.manual_seed(seed)
    return [torch.randn(s, dtype=torch.float64) for s in shapes]

def state_ids(opt): return {id(t) for st in opt.state.values() for t in st.values() if isinstance(t, Tensor)}

def walk(case, switches, shapes=[(3,),(7,5),(),(4,2,3,3)], steps=24):
    "Train in float64; at each of `switches`, convert the optimizer"
    start = grads(0, shapes)
    ps = [nn.Parameter(t) for t in start]
    jit = False
    opt = case.make([ps[:1],ps[1:]], jit, lr=[0.01,0.02])
    opt.state[ps[0]].update(do_wd=False, force_train=True)
    for i in range(steps):
        if i in switches:
            old,jit = opt,not jit
            opt = engine.converted(opt, jit)
            assert opt is not old and isinstance(opt, JitOptimizer) == jit and opt.frozen_idx == old.frozen_idx
            assert not state_ids(old) & state_ids(opt)
        if i == 4: opt.freeze_to(1)   # frozen, without `clear_state`, and with a gradient left from before
        if i == 14: opt.freeze_to(0)
        opt.set_hyper('lr', [h['lr']*0.99 for h in opt.hypers])
        opt.set_hyper('mom', 0.95 - 0.01*(i%7))  # as one-cycle does, also where there is no momentum
        for n,(p,g) in enumerate(zip(ps, grads(100+i, shapes))):
            if p.requires_grad and not (n == 3 and i < 10): p.grad = g  # the last one comes late
        opt.step()
        opt.zero_grad()
    opt.ps = ps
    return opt

SWITCHES = [(0,),(7,13)] + [pytest.param(s, marks=pytest.mark.slow) for s in ((1,),(7,),(6,12,18))]

@pytest.mark.parametrize('switches', SWITCHES, ids=str)
@pytest.mark.parametrize('case', NATIVE+AHEAD[:7], ids=str)
def test_converts_in_the_middle(case, switches):
    never,now = walk(case, ()),walk(case, switches)
    for i,(p,q) in enumerate(zip(never.ps, now.ps)): close(q, p, TOL[torch.float64], f'parameter {i}')
    same_state(now, never, TOL[torch.float64])
    assert never.frozen_idx == now.frozen_idx
    if hasattr(never, 'slow_weights'): assert (never.count,never.k,never.alpha) == (now.count,now.k,now.alpha)

class MyOptimizer(Optimizer): "May do anything"

@pytest.mark.parametrize('make', [lambda ps, lr: Optimizer(ps, [sgd_step], lr=lr),
                                  lambda ps, **kw: MyOptimizer(ps, [], **kw),
                                  lambda ps, **kw: OptimWrapper(ps, torch.optim.SGD, **kw),
                                  lambda ps, lr: Optimizer(ps, [partial(sgd_step, odd=[1])], lr=lr)])
def test_live_without_counterpart(make, tmp_path):
    "What it does counts, not what `opt_func` says; and the Learner stays as it was"
    learn = vision(make, tmp_path)
    learn.create_opt()
    opt,learn.opt_func = learn.opt,Adam
    with pytest.raises(TypeError, match=r'live optimizer.*has no counterpart.*SGD \(sgd_jit\)'): learn.to_jit()
    assert learn.opt is opt and learn.opt_func is Adam

def sign_step(params:List[Tensor], grads:List[Tensor], grad_avg:List[Tensor], lr:float, mom:float):
    average_grad(grad_avg, grads, mom)
    torch._foreach_add_(params, torch._foreach_sign(grads), alpha=-lr)

def test_own_step_has_no_native(tmp_path):
    learn = vision(partial(JitOptimizer, opt_step=sign_step, mom=0.9), tmp_path)
    learn.create_opt()
    learn.opt_func = adam_jit
    with pytest.raises(TypeError, match='has no counterpart'): learn.to_native()

# --- a Learner

class Switch(Callback):
    "Convert in the middle of an epoch"
    def __init__(self, f): self.f = f
    def before_batch(self):
        if self.training and self.iter == 2: self.f(self.learn)

def fit_switching(case, path, between, within):
    set_seed(0)
    learn = vision(partial(case.native, **case.kw), path)
    learn.fit_one_cycle(1, 1e-2)
    between(learn)
    learn.freeze()
    learn.fit(1, slice(1e-3,1e-2), cbs=Switch(within))
    learn.unfreeze()
    learn.fit_one_cycle(1, slice(1e-3,1e-2), cbs=Switch(Learner.to_jit if within is not noop else noop))
    return learn

@eight
def test_learner_goes_on(case, tmp_path):
    never = fit_switching(case, tmp_path, noop, noop)
    now = fit_switching(case, tmp_path, Learner.to_jit, Learner.to_native)
    assert isinstance(now.opt, JitOptimizer) and now.opt_func.func is case.jit and now.opt_func.keywords == case.kw
    for (n,p),q in zip(never.model.state_dict().items(), now.model.state_dict().values()): close(q, p, 1e-9, n)
    assert now.to_native() is now and not isinstance(now.opt, JitOptimizer) and now.opt_func.func is case.native

@pytest.mark.parametrize('to', [Learner.to_jit, Learner.to_native])
def test_no_op_where_it_is(to, tmp_path):
    learn = to(vision(ranger, tmp_path))
    assert learn.opt is None
    learn.create_opt()
    opt,func = learn.opt,learn.opt_func
    assert to(learn) is learn and learn.opt is opt and learn.opt_func is func

def test_vision_learner(tmp_path):
    from fastai.vision.all import vision_learner,resnet18
    dls = tensor_dls(torch.randn(8, 3, 32, 32), torch.randint(2, (8,)), bs=4, n_valid=4)
    learn = vision_learner(dls, resnet18, pretrained=False, n_out=2, loss_func=nn.CrossEntropyLoss(), path=tmp_path)
    learn.freeze()
    quiet(learn.to_jit()).fine_tune(1)
    assert isinstance(learn.opt, JitOptimizer) and learn.opt.frozen_idx == 0 and len(learn.opt.param_lists) == 3

# --- what a new user gets wrong

@eight
def test_mistakes(case, tmp_path):
    name,p = case.jit.__name__,nn.Parameter(torch.ones(2))
    step = globals()[f'{name}_step']
    with pytest.raises(TypeError, match=f'`{name}` takes no momm; it takes params, lr, '):
        vision(partial(case.jit, momm=0.9), tmp_path).fit(1)
    with pytest.raises(TypeError, match=r'`lr` has to be a number, a list of 3 numbers.* but is \(0.001, 0.01\)'):
        vision(case.jit, tmp_path).fit(1, (1e-3,1e-2))
    with pytest.raises(TypeError, match='`lr` has to be a number.* but is None'):
        vision(case.jit, tmp_path, lr=None).fit(1)
    learn = vision(step, tmp_path)
    with pytest.raises(TypeError, match=fr'`{name}_step` is a step function.*takes a factory'): learn.fit(1)
    learn = vision(case.jit, tmp_path)
    learn.create_opt()
    with pytest.warns(UserWarning, match=f'`{name}_step` does not use the hyper `momm`; it uses lr, '):
        learn.opt.set_hyper('momm', 0.9)
    with pytest.raises(TypeError, match=f'`{name}_step` takes no epsilon; it takes '):
        JitOptimizer([p], step, lr=0.1, epsilon=1e-5)
    with pytest.raises(TypeError, match="`mom` has to be a number.* but is 'high'"): learn.opt.set_hyper('mom', 'high')
    learn.opt.hypers[0]['mom'] = 'high'
    if 'mom' in step.hypers:
        with pytest.raises(TypeError, match="Hyper `mom` of group 0 has to be a number, but is 'high'"): learn.fit(1)

@pytest.mark.parametrize('convert', [jit_opt,'to_jit'], ids=['jit_opt','to_jit'])
def test_factory_of_ones_own(convert):
    "Keywords, of which fastai reads `lr`, name and documentation stay; it pickles, and goes back"
    f = partial(adam_of_ones_own, lr=0.05, eps=1e-7)
    learn = quiet(Learner(tensor_dls(), nn.Linear(4, 2), loss_func=noop, opt_func=f))
    if convert == 'to_jit': learn.to_jit()
    else: learn.opt_func = convert(f)
    made = learn.opt_func
    assert made.keywords == f.keywords and made.func.__name__ == 'adam_of_ones_own'
    assert made.func.__doc__ == adam_of_ones_own.__doc__
    learn.create_opt()
    assert isinstance(learn.opt, JitOptimizer) and learn.lr == learn.opt.hypers[0]['lr'] == 0.05
    assert learn.opt.hypers[0]['mom'] == 0.8 and learn.opt.hypers[0]['eps'] == 1e-7
    again = pickle.loads(pickle.dumps(made))
    assert isinstance(again([nn.Parameter(torch.ones(1))]), JitOptimizer) and jit_opt(made) is made
    learn.to_native()
    assert learn.opt_func.func is adam_of_ones_own and learn.opt_func.keywords == f.keywords
