"When steps are compiled, and that nobody notices"
import warnings
from contextlib import nullcontext
from typing import List

import pytest
import torch
from torch import Tensor,nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastxtend_jit import selfcheck
from fastxtend_jit.step import JitStep,jit_step,torchscript_ok
from tests.cases import *
from tests.engine import (forget_trials,has_compiled,plan_of,refuse_to_compile,runs_compiled,set_compile_after,
                          watch_trials)
from tests.support import new_grads,slow_but

every = pytest.mark.parametrize('case', ALL, ids=str)

def adds(params:List[Tensor], grads:List[Tensor], lr:float): torch._foreach_add_(params, grads, alpha=-lr)
def drops(params:List[Tensor], grads:List[Tensor], lr:float): torch._foreach_add_(params[:], grads, alpha=-lr)
def mistaken(params:List[Tensor], grads:List[Tensor], lr:float):
    for p,g in zip(params, grads): p.sub_(g, alpha=lr) if p.dim() else None  # TorchScript has no such expression
    torch._foreach_add_(*[params, grads], **dict(alpha=0.))

def trained(step, steps):
    "An optimizer of one parameter after some steps, of 0.1 each, and the warnings that it gave"
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        opt = JitOptimizer([p], step, lr=0.1)
        for _ in range(steps): opt.step()
    assert p.tolist() == pytest.approx([1-0.1*steps]*2)
    return opt,[str(w.message) for w in told]

def test_lazy(monkeypatch):
    "It is compiled after so many steps, of all optimizers together, by one new plan for each"
    set_compile_after(5, monkeypatch)
    step = JitStep(adds, lazy=True)
    first,told = trained(step, 3)
    assert not told and not has_compiled(step) and not runs_compiled(first)
    second,_ = trained(step, 2)
    assert not has_compiled(step)
    for opt in (first,second):
        opt.step()
        assert has_compiled(step) and runs_compiled(opt)
        plan = plan_of(opt)
        opt.step()
        assert plan_of(opt) is plan

def test_eager(monkeypatch):
    "A step of one's own is compiled when the optimizer is made"
    set_compile_after(5, monkeypatch)
    assert has_compiled(trained(JitStep(adds), 0)[0].opt_step)
    with pytest.raises(RuntimeError, match='in-place call on a list'): trained(JitStep(drops), 0)

@pytest.mark.parametrize('fn,why', [(drops,'computes other `params`'), (mistaken,'')],
                         ids=lambda o: getattr(o, '__name__', None))
def test_lazy_step_that_cannot_be_compiled(fn, why, monkeypatch):
    "It goes on as plain Python, with a warning: training is not the time for an error"
    set_compile_after(2, monkeypatch)
    step = JitStep(fn, lazy=True)
    opt,told = trained(step, 5)
    assert len(told) == 1 and f'`{fn.__name__}` goes on as plain Python' in told[0] and why in told[0]
    assert not step.is_compiled and 'TorchScript cannot compile here' in opt.explain()['why not faster'][0]
    assert not trained(step, 3)[1]

def in_anything(mode):
    "Steps of a lazy step that is compiled in `mode`; fake tensors are made there too"
    with mode() if mode is FakeTensorMode else nullcontext() as fake:
        p = nn.Parameter(torch.ones(2))
        p.grad = torch.ones(2)
    opt = JitOptimizer([p], JitStep(adds, lazy=True), lr=0.1)
    for _ in range(4):
        with fake or mode(): opt.step()
    return opt

@pytest.mark.parametrize('mode', [torch.inference_mode,torch.enable_grad,lambda: torch.device('meta'),FakeTensorMode,
                                  lambda: torch.autocast('cpu')], ids=['inference','grad','device','fake','autocast'])
def test_compiled_in_the_middle_of_anything(mode, monkeypatch):
    "Whatever mode is active when it is time, TorchScript compiles, and no warning comes"
    set_compile_after(2, monkeypatch)
    torchscript_ok.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        opt = in_anything(mode)
    assert runs_compiled(opt) and has_compiled(opt.opt_step) and torchscript_ok()

class Picky(Tensor):
    "A subclass that wants no kernels for lists"
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, '__name__', '').startswith(('_foreach','_fused')): raise NotImplementedError
        return super().__torch_function__(func, types, args, kwargs or {})

@every
def test_subclass_takes_the_same_steps(case, monkeypatch):
    "Neither compiled code nor plain Python asks a subclass of a tensor what to do"
    set_compile_after(3, monkeypatch)
    monkeypatch.setattr(case.step, 'uses', 0)
    ps = [nn.Parameter(torch.ones(6)) for _ in range(2)]
    ps[1] = nn.Parameter(ps[1].detach().as_subclass(Picky))
    opts = [case.make([p], True) for p in ps]
    for i in range(7):
        for opt,p in zip(opts, ps):
            p.grad = torch.full((6,), 0.1*i + 0.1)
            opt.step()
        assert torch.equal(ps[0], ps[1].as_subclass(Tensor)), i

@every
def test_state_of_inference_mode(case, monkeypatch):
    "State that is made or laid out anew in inference mode can be written to outside of it"
    set_compile_after(3, monkeypatch)
    monkeypatch.setattr(case.step, 'uses', 0)
    p = nn.Parameter(torch.ones(6))
    opt = case.make([p], True)
    for i in range(6):
        p.grad = torch.ones(6)
        with torch.inference_mode(i in (0,3)): opt.step()
    assert p.isfinite().all() and not p.eq(1.).any()

@pytest.mark.parametrize('jit', [radam_jit,ranger_jit], ids=lambda f: f.__name__)
@pytest.mark.parametrize('after', [0,200])
def test_no_rectification(jit, after, monkeypatch):
    "As plain Python and compiled, an error that says what to do, before anything has changed"
    set_compile_after(after, monkeypatch)
    p = nn.Parameter(torch.ones(2))
    opt = jit([p], 0.1, sqr_mom=2.)
    with pytest.raises(ValueError, match='`sqr_mom` has to be less than 1'):
        for _ in range(9):
            before = p.tolist()
            p.grad = torch.ones(2)
            opt.step()
    assert p.tolist() == before

def test_check_sees_what_cannot_be_compiled(monkeypatch):
    "A step that TorchScript refuses trains rightly as plain Python, and is reported all the same"
    step = JitStep(sgd_jit_step.fn, elementwise=True, lazy=True)
    refuse_to_compile(monkeypatch, step)
    def make(ps, lr, mom=0.9, wd=0.): return JitOptimizer(ps, step, True, grad_avg=True, lr=lr, mom=mom, wd=wd)
    monkeypatch.setattr(selfcheck, 'forms', lambda: [(SGD,make,dict(mom=0.9))])
    res = selfcheck.selfcheck(dtypes=(torch.float32,), progress=lambda line: None)
    assert not res.ok.any() and 'TorchScript cannot compile here' in res.why[0] and step.uses == 0

def test_ours_are_lazy():
    for case in ALL: assert all(s.lazy for s in case.steps), case

@every
def test_second_optimizer_tries_nothing(case, monkeypatch):
    "Another one of the kind, a group more, or another training, finds the verdicts of the first"
    runs = watch_trials(monkeypatch)
    forget_trials(monkeypatch)
    def train(n_groups):
        ps = [nn.Parameter(torch.ones(3,4)) for _ in range(n_groups)]
        opt = case.make([[p] for p in ps], True)
        for _ in range(7):
            for p in ps: p.grad = torch.ones_like(p)
            opt.step()
    train(1)
    first = len(runs)
    train(2)
    train(1)
    assert 0 < first <= 50 and len(runs) == first

@pytest.mark.parametrize('case', slow_but(ALL[4:5], ALL), ids=str)
@pytest.mark.parametrize('what', ['step','training'])
def test_torch_compile(case, what):
    "`torch.compile` over a step, or over a whole training step, breaks its graph there: the numbers are the same"
    def weights(compiled):
        torch.manual_seed(0)
        model,x = nn.Linear(4, 4),torch.randn(8, 4)
        opt = case.make(model.parameters(), True)
        step = torch.compile(opt.step, backend='eager') if compiled == 'step' else opt.step
        def train(): model(x).pow(2).mean().backward(); step(); opt.zero_grad()
        if compiled == 'training': train = torch.compile(train, backend='eager')
        for _ in range(8): train()
        return model.weight.detach()
    torch._dynamo.reset()
    assert torch.equal(weights(what), weights(''))

def test_plain_while_groups_part(monkeypatch):
    "What was compiled for other constants goes on for groups that part, after the step has turned plain"
    set_compile_after(0, monkeypatch)
    @jit_step(lazy=True)
    def odd(params:List[Tensor], grads:List[Tensor], lr:float, big:bool=False):
        if big: torch._foreach_mul_(params[:], 0.5)  # TorchScript drops it
        torch._foreach_mul_(params, lr)
    ps = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    opt = JitOptimizer([[p] for p in ps], odd, lr=0.5)
    def step(): new_grads(ps); opt.step()
    step()
    opt.big = True
    with pytest.warns(UserWarning, match='plain Python'): step()
    opt.big = False
    opt.set_hyper('lr', [0.1,0.2])
    step()
    for p,lr in zip(ps, (0.1,0.2)): close(p, torch.full((2,), 0.125*lr), 1e-6)
