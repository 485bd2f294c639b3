"Ours against fastai's: 25 steps, fresh gradients at each, every element compared"
import inspect
from dataclasses import dataclass
from typing import Callable

import pytest
import torch
from torch import nn

from tests import engine
from tests.cases import *
from tests.support import cases,slow_but

# Slow, as they have least of their own: others have the same dtype or the same scenario
LESS = [('plain',torch.float64), ('schedule',torch.float32), ('groups',torch.float32), ('late',torch.float32)]
KINDS = [(s,d) for s in SCENARIOS for d in TOL]
kinds = pytest.mark.parametrize('scenario,dtype', slow_but([k for k in KINDS if k not in LESS], KINDS), ids=str)
PATHS = ['foreach','uncompiled','uncompiled foreach','small batches','compiled late']

def check(case, tol, **kw):
    native,jit = run(case, **kw)
    if hasattr(native, 'slow_weights'): assert native.count == jit.count
    for i,(p,q) in enumerate(zip(native.ps, jit.ps)): close(q, p, tol, f'parameter {i}')
    same_state(jit, native, tol)
    for a,b in zip(slow(jit), slow(native)): close(a, b, tol, 'slow weights')

@cases
@kinds
def test_parity(case, scenario, dtype, dev): check(case, TOL[dtype], dtype=dtype, dev=dev, **SCENARIOS[scenario])

@cases
@pytest.mark.slow
def test_200_steps(case, dev): check(case, 1e-9, dtype=torch.float64, steps=200, dev=dev, n_groups=2, late={3:50})

def drifts(case, scenario, dev, scale):
    "How far ours and fastai's come from fastai's result in float64, tensor by tensor"
    kw = dict(dev=dev, scale=scale, shapes=SHAPES[:-1], **SCENARIOS[scenario])
    native,jit = run(case, dtype=torch.bfloat16, **kw)
    truth = truth_of(case, given=torch.bfloat16, **kw)
    # chance decides where there are few elements, or one gradient for all, as for the last of the layouts
    told = [i for i,p in enumerate(truth.ps) if p.numel() >= 100][:-1 if scenario == 'layouts' else None]
    def apart(opt): return torch.stack([(opt.ps[i].detach().double()-truth.ps[i].detach()).norm() for i in told])
    return apart(jit),apart(native)

# How often fastai's drift ours may have. Parameters of about 1 lose a step in rounding, small ones show it.
# With 50 seeds, no form with small ones came to more than 1.04 times, and no tensor by itself to more than 1.4
DRIFT = {1.:1.05, 2**-4:1.1}

@cases
@pytest.mark.parametrize('scenario', ['groups','layouts'])
@pytest.mark.parametrize('scale', slow_but([2**-4], DRIFT))
def test_bfloat16(case, scenario, dev, scale):
    "bfloat16 has 8 bits: both drift from the float64 truth, ours no further than fastai's"
    ours,theirs = drifts(case, scenario, dev, scale)
    assert ours.norm() <= DRIFT[scale]*theirs.norm()
    assert (ours <= 2*theirs).all()  # no tensor is wrong by itself

@dataclass(frozen=True)
class TooFar:
    "A factory whose steps are 10 % too large"
    factory:Callable
    @property
    def __name__(self): return f'{self.factory.__name__}, too far'
    def __call__(self, ps, lr, **kw):
        if 'trust_coeff' in kw: kw['trust_coeff'] *= 1.1
        return self.factory(ps, lr=1.1*lr, **kw)

@cases
@pytest.mark.slow
def test_bfloat16_tells(case, dev):
    "The bound is one that a step breaks which is 10 % too large; LARC's have to be larger for that than by default"
    kw = {**case.kw, 'trust_coeff':1.} if case.jit is larc_jit else case.kw
    ours,theirs = drifts(Case(case.native, TooFar(case.jit), kw), 'layouts', dev, 2**-4)
    assert ours.norm() > DRIFT[2**-4]*theirs.norm()

@cases
@pytest.mark.parametrize('path', slow_but(['foreach','compiled late'], PATHS))
def test_other_paths(case, path, dev, monkeypatch):
    "Without fused kernels, as on mps; without TorchScript, or with it from the 10th step on; and in many small batches"
    if 'foreach' in path: engine.set_fused_fault(monkeypatch, 'none')
    if 'uncompiled' in path: engine.run_uncompiled(monkeypatch, *case.steps)
    if 'small' in path: engine.use_batches_of(monkeypatch, 100)
    for scenario,(dtype,tol) in zip(('groups','layouts'), TOL.items()):
        if 'late' in path: engine.set_compile_after(max(s.uses for s in case.steps)+10, monkeypatch)
        check(case, tol, dtype=dtype, dev=dev, **SCENARIOS[scenario])

@pytest.mark.parametrize('case', AHEAD, ids=str)
@kinds
def test_lookahead(case, scenario, dtype, dev):
    "fastai's `Lookahead` around any"
    check(case, TOL[dtype], dtype=dtype, dev=dev, **SCENARIOS[scenario])

@pytest.mark.parametrize('native,jit', PAIRS, ids=lambda f: f.__name__)
def test_signature(native, jit):
    "Ours have fastai's signatures and defaults, parameter for parameter"
    sig = lambda f: [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
    assert sig(jit) == sig(native)

def test_all():
    scope = {}
    exec('from fastxtend_jit.all import *', scope)
    names = [j.__name__ for _,j in PAIRS+OTHERS]
    rest = {'JitOptimizer', 'JitLookahead', 'jit_opt', 'use_jit', 'muon_rest'}
    assert {k for k in scope if not k.startswith('__')} == {*names, *(f'{n}_step' for n in names), *rest}

@pytest.mark.parametrize('dtype', TOL, ids=str)
@pytest.mark.parametrize('steps', [25,200])
@pytest.mark.parametrize('jit,other,hypers', [
    (lion_jit,'Lion',dict(betas=(0.9,0.99))), (adan_jit,'Adan',dict(betas=(0.98,0.92,0.99), eps=1e-6)),
    (stableadam_jit,'StableAdamW',dict(betas=(0.9,0.99), eps=1e-6))], ids=lambda o: getattr(o, '__name__', ''))
def test_optimi(jit, other, hypers, steps, dtype, dev):
    "Optimizers that fastai has not, beside another implementation: defaults, a schedule, a gradient that jumps"
    optimi = pytest.importorskip('optimi')
    torch.manual_seed(0)
    start = [torch.randn(s, device=dev, dtype=dtype) for s in SHAPES]
    ours,theirs = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    opt = jit(ours, lr=0.01, wd=0.1)
    ref = getattr(optimi, other)(theirs, lr=0.01, weight_decay=0.1, triton=False, **hypers)
    for i in range(steps):
        opt.set_hyper('lr', 0.01*(1 - i/steps))
        ref.param_groups[0]['lr'] = 0.01*(1 - i/steps)
        for p,q in zip(ours, theirs): p.grad = torch.randn_like(p)*(10 if i%9 == 5 else 1); q.grad = p.grad.clone()
        opt.step(); ref.step()
    for i,(p,q) in enumerate(zip(ours, theirs)): close(p, q, TOL[dtype], f'parameter {i}')
