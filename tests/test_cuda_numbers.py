"What CUDA would compute: all parity cases with the arithmetic of its fused kernels, which `cuda_kernels` plays on a CPU"
from contextlib import nullcontext

import pytest
import torch

from fastxtend_jit import proof
from tests.cases import *
from tests.cuda_kernels import CudaKernels,as_on_cuda
from tests.test_parity import SCENARIOS,truth_of

FAULTS = {'old':{}, 'new':{}}  # of the kernels that are played

@pytest.fixture(autouse=True)
def on_cuda(monkeypatch, request):
    "Those kernels are proved, and not the CPU's"
    as_on_cuda(monkeypatch)
    monkeypatch.setattr(proof, '_disable_current_modes', nullcontext)
    monkeypatch.setattr(proof, '_faults', FAULTS[request.getfixturevalue('generation')])

cases = pytest.mark.parametrize('case', CASES, ids=str)
generations = pytest.mark.parametrize('generation', ['old','new'])
FLOOR = {'param':1e-5, 'state':3e-5}  # of the largest element, in float32; other dtypes are judged by fastai's own distance alone

def tensors(opt):
    "Parameters and state, by name"
    res = {('param',i):p for i,p in enumerate(opt.ps)}
    for i,p in enumerate(opt.ps): res |= {(k,i):torch.as_tensor(v) for k,v in opt.state[p].items() if k not in ('step','do_wd')}
    return {k:v.detach().double() for k,v in res.items()}

def check(case, generation, dtype, steps, scenario, fused=True):
    "Ours is no further from fastai's result in float64 than twice fastai's own in `dtype`, or than rounding"
    kw = dict(steps=steps, **SCENARIOS[scenario])
    with CudaKernels(generation) as kernels: native,jit = run(case, dtype=dtype, **kw)
    assert bool(kernels.calls) == fused
    truth = run(case, dtype=torch.float64, **kw)[0] if dtype == torch.float64 else truth_of(case, 'cpu', dtype, **kw)
    ours,theirs,real = map(tensors, (jit,native,truth))
    assert ours.keys() == theirs.keys() == real.keys()
    far = lambda xs: {k: ((xs[k]-t).abs().nan_to_num(nan=torch.inf).max()/t.abs().max()).item() for k,t in real.items()}  # float16 has no 1e-8: with that eps, fastai divides by 0
    ours,theirs = far(ours),far(theirs)
    if dtype.itemsize < 4:  # all tensors of a kind together: in one whose elements are equal, chance rounds but once
        ours,theirs = ({k: sum(v*v for (n,_),v in d.items() if n == k)**0.5 for k in {n for n,_ in d}} for d in (ours,theirs))
    for k,off in ours.items():
        floor = {torch.float64:1e-11, torch.float32:FLOOR['param' if k[0] == 'param' else 'state']}.get(dtype, 0.)
        assert off <= max(2*theirs[k], floor), k

# The forms in which a step has nothing to give to a fused kernel, on any device
def unfused(case):
    kw = case.kw
    return case.jit is larc_jit or 'fused' not in case.step.args or 'beta' in kw or kw.get('nu_1', 1.) in (0.,1.5) or 'nu_2' in kw

@cases
@generations
@pytest.mark.parametrize('dtype', [torch.float32,torch.float64,torch.bfloat16,torch.float16], ids=str)
@pytest.mark.parametrize('scenario', ['groups','layouts'])
def test_25_steps(case, generation, dtype, scenario): check(case, generation, dtype, 25, scenario, not unfused(case))

@cases
@generations
def test_120_steps(case, generation): check(case, generation, torch.float32, 120, 'schedule', not unfused(case))

@pytest.mark.parametrize('hypers', [dict(sqr_mom=0.9999), dict(sqr_mom=0.99999), dict(mom=0.9999)], ids=str)
@pytest.mark.parametrize('case', [c for c in ALL if 'sqr_mom' in c.step.args], ids=str)
@generations
def test_betas_next_to_1(case, generation, hypers):
    "What float32 cannot tell from 1 well goes without the fused kernels"
    case = Case(case.native, case.jit, {**case.kw, **{k:v for k,v in hypers.items() if k != 'mom' or case.jit is not rmsprop_jit}})
    kw = dict(steps=25, schedule=False)
    with CudaKernels(generation): native,jit = run(case, dtype=torch.float32, **kw)
    truth = truth_of(case, 'cpu', torch.float32, **kw)
    ours,theirs,real = map(tensors, (jit,native,truth))
    for k,t in real.items():
        off = lambda xs: ((xs[k]-t).abs().max()/t.abs().max()).item()
        assert off(ours) <= max(2*off(theirs), FLOOR['param' if k[0] == 'param' else 'state']), k
