"Ours against fastai's: 25 steps, fresh gradients at each, every element compared"
import inspect

import pytest
import torch
from torch import nn

from fastxtend_jit import bucket
from tests.cases import *

SCENARIOS = dict(
    plain    = dict(schedule=False),
    schedule = dict(),
    groups   = dict(n_groups=3, no_wd=[1,4]),
    late     = dict(late={1:3, 4:9, 5:30}, no_wd=[2,5]),
    layouts  = dict(laid_out=True),
)
cases = pytest.mark.parametrize('case', CASES, ids=str)

@pytest.fixture(params=DEVICES)
def dev(request):
    if request.param == 'cuda' and not torch.cuda.is_available(): pytest.skip('there is no GPU')
    return request.param

def check(case, tol, **kw):
    native,jit = run(case, **kw)
    for i,(p,q) in enumerate(zip(native.ps, jit.ps)): close(q, p, tol, f'parameter {i}')
    same_state(jit, native, tol)

@cases
@pytest.mark.parametrize('scenario', SCENARIOS)
@pytest.mark.parametrize('dtype', TOL, ids=str)
def test_parity(case, scenario, dtype, dev): check(case, TOL[dtype], dtype=dtype, dev=dev, **SCENARIOS[scenario])

@cases
def test_200_steps(case, dev): check(case, 1e-9, dtype=torch.float64, steps=200, dev=dev, n_groups=2, late={3:50})

@cases
@pytest.mark.parametrize('scenario', ['groups','layouts'])
def test_bfloat16(case, scenario, dev):
    "bfloat16 has 8 bits: both drift from the float64 truth, ours no further than fastai's"
    native,jit = run(case, dtype=torch.bfloat16, dev=dev, **SCENARIOS[scenario])
    flat = lambda opt: torch.cat([p.detach().flatten().double() for p in opt.ps])
    torch.manual_seed(0)
    truth = flat(truth_of(case, dev, torch.bfloat16, **SCENARIOS[scenario]))
    ours,theirs = (flat(jit)-truth).square().mean().sqrt(),(flat(native)-truth).square().mean().sqrt()
    assert ours <= 1.05*theirs
    for p,q in zip(native.ps, jit.ps): close(q, p, 2**-5)

def truth_of(case, dev, given, **kw):
    "fastai's optimizer in float64, on what `run` feeds to the one in dtype `given`"
    real = torch.randn
    try:
        torch.randn = lambda *a,dtype,**k: real(*a, dtype=given, **k).double()
        return run(case, dtype=torch.float64, dev=dev, **kw)[0]
    finally: torch.randn = real

@cases
@pytest.mark.parametrize('path', ['foreach','uncompiled','uncompiled foreach','small batches'])
def test_other_paths(case, path, dev, monkeypatch):
    "Without fused kernels, as on Apple's mps; without TorchScript, as on Python 3.14; and cut into many small batches"
    if 'foreach' in path: monkeypatch.setattr('fastxtend_jit.plan.fused_fault', lambda *_: 'none')
    if 'uncompiled' in path:
        step = globals()[case.jit.__name__+'_step']
        monkeypatch.setitem(vars(step), 'compiled', step.fn)
    if 'small' in path: monkeypatch.setattr(bucket, 'batch_size', 100)
    for scenario,(dtype,tol) in zip(('groups','layouts'), TOL.items()): check(case, tol, dtype=dtype, dev=dev, **SCENARIOS[scenario])

@pytest.mark.parametrize('native,jit', PAIRS, ids=lambda f: f.__name__)
def test_signature(native, jit):
    "Ours have fastai's signatures and defaults, parameter for parameter"
    sig = lambda f: [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
    assert sig(jit) == sig(native)

def test_all():
    scope = {}
    exec('from fastxtend_jit.all import *', scope)
    names = [j.__name__ for _,j in PAIRS]
    assert {k for k in scope if not k.startswith('__')} == {*names, *(f'{n}_step' for n in names), 'JitOptimizer', 'JitLookahead', 'jit_opt'}
