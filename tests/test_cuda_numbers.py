"What CUDA would compute: all parity cases with the arithmetic of its fused kernels, which `cuda_kernels` plays"
import pytest
import torch

from tests import engine
from tests.cases import *
from tests.cuda_kernels import CudaKernels
from tests.support import cases,slow_but

FAULTS = {'old':{}, 'new':{}}  # of the kernels that are played

@pytest.fixture(autouse=True)
def on_cuda(monkeypatch, request):
    "Those kernels are proved, and not the CPU's"
    engine.as_on_cuda(monkeypatch)
    engine.let_modes_in(monkeypatch)
    engine.keep_faults_in(monkeypatch, FAULTS[request.getfixturevalue('generation')])

generations = pytest.mark.parametrize('generation', ['old','new'])
DTYPES = [torch.float32,torch.float64,torch.bfloat16,torch.float16]
# Of the largest element, in float32; other dtypes are judged by fastai's own distance alone
FLOOR = {'param':1e-5, 'state':3e-5}

def tensors(opt):
    "Parameters and state, by name"
    res = {('param',i):p for i,p in enumerate(opt.ps)}
    for i,p in enumerate(opt.ps):
        res |= {(k,i):torch.as_tensor(v) for k,v in opt.state[p].items() if k not in ('step','do_wd')}
    return {k:v.detach().double() for k,v in res.items()}

def check(case, generation, dtype, steps, scenario, fused=True):
    "Ours is no further from fastai's result in float64 than twice fastai's own in `dtype`, or than rounding"
    kw = dict(steps=steps, **SCENARIOS[scenario])
    with CudaKernels(generation) as kernels: native,jit = run(case, dtype=dtype, **kw)
    assert bool(kernels.calls) == (fused and any('fused' in b.step.args for b in engine.buckets_of(jit)))
    truth = truth_of(case, 'cpu', dtype, **kw)
    ours,theirs,real = map(tensors, (jit,native,truth))
    assert ours.keys() == theirs.keys() == real.keys()
    # float16 has no 1e-8: with that eps, fastai divides by 0
    off = lambda x,t: ((x-t).abs().nan_to_num(nan=torch.inf).max()/t.abs().max()).item()
    ours,theirs = ({k:off(xs[k], t) for k,t in real.items()} for xs in (ours,theirs))
    if dtype.itemsize < 4:  # all tensors of a kind together: in one whose elements are equal, chance rounds but once
        kinds = {n for n,_ in real}
        ours,theirs = ({k:sum(v*v for (n,_),v in d.items() if n == k)**0.5 for k in kinds} for d in (ours,theirs))
    for k,off in ours.items():
        floor = {torch.float64:1e-11, torch.float32:FLOOR['param' if k[0] == 'param' else 'state']}.get(dtype, 0.)
        assert off <= max(2*theirs[k], floor), k

# The forms in which a step has nothing to give to a fused kernel, on any device
def unfused(case):
    kw = case.kw
    if case.jit is larc_jit or not case.takes('fused'): return True
    return 'beta' in kw or kw.get('nu_1', 1.) in (0.,1.5) or 'nu_2' in kw

@pytest.mark.parametrize('case', slow_but(FIRST, CASES), ids=str)
@pytest.mark.parametrize('generation', slow_but(['new'], ['old','new']))
@pytest.mark.parametrize('dtype', slow_but([torch.float32], DTYPES), ids=str)
@pytest.mark.parametrize('scenario', slow_but(['groups'], ['groups','layouts']))
def test_25_steps(case, generation, dtype, scenario): check(case, generation, dtype, 25, scenario, not unfused(case))

@cases
@generations
@pytest.mark.slow
def test_120_steps(case, generation): check(case, generation, torch.float32, 120, 'schedule', not unfused(case))

@pytest.mark.parametrize('hypers', [dict(sqr_mom=0.9999), dict(sqr_mom=0.99999), dict(mom=0.9999)], ids=str)
@pytest.mark.parametrize('case', [c for c in ALL if c.takes('sqr_mom')], ids=str)
@generations
@pytest.mark.slow
def test_betas_next_to_1(case, generation, hypers):
    "What float32 cannot tell from 1 well goes without the fused kernels"
    if case.jit is rmsprop_jit: hypers = {k:v for k,v in hypers.items() if k != 'mom'}
    case = Case(case.native, case.jit, {**case.kw, **hypers})
    kw = dict(steps=25, schedule=False)
    with CudaKernels(generation): native,jit = run(case, dtype=torch.float32, **kw)
    truth = truth_of(case, 'cpu', torch.float32, **kw)
    ours,theirs,real = map(tensors, (jit,native,truth))
    for k,t in real.items():
        off = lambda xs: ((xs[k]-t).abs().max()/t.abs().max()).item()
        assert off(ours) <= max(2*off(theirs), FLOOR['param' if k[0] == 'param' else 'state']), k
