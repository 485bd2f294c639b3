"Norms, and the steps that rest on them: LARC's, LAMB's, StableAdamW's"
import pytest
import torch
from torch import nn

from fastxtend_jit.fragments import norms
from tests.cases import *
from tests.support import slow_but

KINDS = dict(constant=lambda n: torch.full([n], 0.02), normal=lambda n: torch.randn(n), uniform=lambda n: torch.rand(n))
kinds = pytest.mark.parametrize('kind', KINDS)

@kinds
@pytest.mark.parametrize('n', [1, 1000, 4096, 4097, 2**16+5, 2**18, 3_000_000, 2**24])
def test_norms(kind, n):
    "As near to float64's as fastai's, LAMB's by `pow(2).mean()`"
    torch.manual_seed(0)
    x = KINDS[kind](n)
    truth = x.double().norm()
    off = lambda y: (abs(y.double()-truth)/truth).item()
    theirs,ours = off(x.pow(2).mean().sqrt().double()*n**0.5),off(norms([x], dense_cpu=True)[0])
    assert ours <= 3*theirs + 2**-23  # and how exactly float32 can tell at all
    assert off(norms([x], dense_cpu=False)[0]) <= 3*theirs + 2**-23

@pytest.mark.parametrize('dtype', [torch.bfloat16,torch.float16])
def test_norms_in_half_precision(dtype):
    for n in (100, 4096, 2**20+77):
        x = torch.randn(n).to(dtype)
        truth = x.double().norm()
        for is_flat in (True,False):
            if dtype == torch.float16 and n > 60_000: continue  # the sum of squares overflows, in fastai as here
            assert abs(norms([x], is_flat)[0].double()-truth) <= 2*torch.finfo(dtype).eps*truth

@pytest.mark.parametrize('f,native', [(larc_jit,Larc),(lamb_jit,Lamb)], ids=lambda f: f.__name__)
@pytest.mark.parametrize('value', [30.,100.,1e-3])
@pytest.mark.parametrize('gaps', [False,True])
def test_norms_that_float16_cannot_square(f, native, value, gaps):
    "Whose squares overflow or vanish in float16, where fastai's norm does not (its LAMB does square)"
    res = []
    for make,dtype in ((native,torch.float64),(f,torch.float16)):
        full = lambda *shape: torch.full(shape, value, dtype=dtype)
        p = nn.Parameter(full(300, 2)[:,0] if gaps else full(300))
        p.grad = full(300)
        make([p], lr=0.1, eps=1e-3).step()
        res.append((p.detach().double()-value)[0].item())
    assert res[1] == pytest.approx(res[0], rel=0.05, abs=2*2**-10*value)

def test_norms_below_the_denormals():
    for n in (300,5000,5120):
        x = torch.full([n], 1e-23)
        assert norms([x], dense_cpu=True)[0] == x.pow(2).sum().sqrt() == 0

@pytest.mark.parametrize('case', [c for c in EIGHT if c.jit in (larc_jit,lamb_jit)], ids=str)
@kinds
@pytest.mark.parametrize('n', slow_but([2**18], [2**18, 2**24]))
def test_update_of_large_tensors(case, kind, n):
    "Of a whole step, at most three times as far from float64's as fastai's"
    torch.manual_seed(0)
    start,g = KINDS[kind](n),KINDS[kind](n)
    def moved(jit, dtype):
        p = nn.Parameter(start.to(dtype))
        p.grad = g.to(dtype)
        case.make([p], jit, lr=10., wd=0., eps=1e-5).step()  # so that the update, not the parameter, is what is rounded
        return p.detach().double() - start
    truth,theirs,ours = moved(False, torch.float64),moved(False, torch.float32),moved(True, torch.float32)
    off = lambda x: ((x-truth).abs().max()/truth.abs().max()).item()
    assert off(ours) <= 3*off(theirs) + 2**-22

@pytest.mark.parametrize('wd', [0.01,9.,99.,99.9,100.,150.])
@pytest.mark.parametrize('value', [1.,float('inf')])
def test_lamb_of_a_large_tensor(wd, value):
    "A tensor by itself, whose decay is part of the update: at any decay, and with an infinite element"
    torch.manual_seed(0)
    start = torch.randn(600,600)
    start[3,3] = value
    ps = [nn.Parameter(start.clone()) for _ in range(2)]
    truth = nn.Parameter(start.double())
    opts = [f([p], lr=0.01, wd=wd) for f,p in ((Lamb,ps[0]),(lamb_jit,ps[1]),(Lamb,truth))]
    for i in range(3):
        g = torch.randn(600,600)
        for p,o in zip((*ps,truth), opts): p.grad = g.to(p.dtype); o.step()
    assert torch.equal(ps[0].isfinite(), ps[1].isfinite()) and torch.equal(ps[0].isnan(), ps[1].isnan())
    there = truth.isfinite()
    if not there.any(): return  # 0 times infinity, everywhere, in both
    off = [(p.double()-truth)[there].abs().max()/truth[there].abs().max() for p in ps]
    assert off[1] <= max(4*off[0], 1e-6)

@pytest.mark.parametrize('dtype', [torch.float16,torch.float32], ids=str)
def test_stableadam_alone_and_in_company(dtype):
    "A tensor takes the same step in both, also where small squares vanish in float16, and where decay takes all"
    for wd in (0.,100.):
        res = []
        for n in (1,2):
            ps = [nn.Parameter(torch.ones(40, 30, dtype=dtype)) for _ in range(n)]
            opt = stableadam_jit(ps, 0.01, wd=wd)
            for p in ps: p.grad = torch.ones_like(p); p.grad[0] = 3e-4
            opt.step()
            res.append(ps[0].detach().double())
        assert (res[0]-res[1]).abs().max() <= 4*torch.finfo(dtype).eps
