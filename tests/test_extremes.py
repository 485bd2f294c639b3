"NaN and infinity spread as in fastai; hypers at their edges, late steps, odd parameters, another default device"
from math import inf,nan

import pytest
import torch
from torch import nn

from tests import engine
from tests.cases import *
from tests.support import cases,every,new_grads,parameters,params_of,slow_but

def write(*vs):
    "A function that writes `vs` over the first elements of a tensor"
    def f(t): t.view(-1)[:len(vs)] = torch.tensor(vs[:t.numel()]).to(t.dtype)
    return f

# What happens to parameters or gradients before the third step
POISON = {
    'nan': write(nan), 'inf': write(inf), '-inf': write(-inf), 'both': write(inf,-inf,nan,0.,-0.),
    'all inf': lambda t: t.fill_(-inf), 'zero': torch.Tensor.zero_,
    **{f'times {x}': lambda t,x=x: t.mul_(x) for x in (1e-45,1e-40,1e-25,1e-21,1e15,1e19,1e25,1e38)}}
HYPERS = [
    dict(lr=0.), dict(lr=-0.01), dict(lr=1e30), dict(lr=inf), dict(lr=nan), dict(wd=0.), dict(wd=1e30), dict(wd=inf),
    dict(mom=0.), dict(mom=1.5), dict(mom=nan), dict(sqr_mom=0.), dict(sqr_mom=0.999999), dict(eps=0.), dict(eps=1e30),
    dict(eps=inf), dict(beta=1e-8), dict(beta=1e8), dict(trust_coeff=0.), dict(trust_coeff=inf), dict(nu_2=-1.)]

def duel(case, dtype, to_grads=None, to_params=None, steps=8, zero_grads=False, **hypers):
    "Train fastai's and ours; return both"
    torch.manual_seed(0)
    # norms of one element overflow in another place than norms of several, one way in fastai and the other in ours
    shapes = [(2,) if case.jit is larc_jit else (), (5,), (7,9)]
    ts,opts = [torch.randn(s, dtype=dtype) for s in shapes],[]
    for jit in (False,True):
        opts.append(case.make([nn.Parameter(t.clone()) for t in ts], jit))
        for k,v in hypers.items(): opts[-1].set_hyper(k, v)
    for i in range(steps):
        gs = [torch.zeros_like(t) if zero_grads else torch.randn_like(t) for t in ts]
        if i == 2 and to_grads: [to_grads(g) for g in gs]
        if i == 2 and to_params:
            for p,q in zip(*(opt.param_lists[0] for opt in opts)):
                q.data.copy_(p.data)  # or what rounding has left of a difference would be multiplied
                for o in (p,q): to_params(o.data)
        for opt in opts:
            for p,g in zip(opt.param_lists[0], gs): p.grad = g.clone()
            opt.step()
        # in place of a NaN that has any sign, ours may leave one with another
        for p,g in zip(opts[1].param_lists[0], gs):
            a,b = (t.nan_to_num(7.,8.,9.) for t in (p.grad,g))
            assert torch.equal(a, b), f'gradient changed at step {i}'
    return opts

def mismatch(case, dtype, **kw):
    "What differs between fastai's and ours: 'gradient' if ours changed it, 'parameter', 'state', or nothing"
    try: native,ours = duel(case, dtype, **kw)
    except AssertionError: return 'gradient'
    try:
        for p,q in zip(native.param_lists[0], ours.param_lists[0]): close(q, p, TOL[dtype])
    except AssertionError: return 'parameter'
    if any(v != v for v in native.hypers[0].values()): return  # NaN is not equal to itself
    try: same_state(ours, native, TOL[dtype])
    except AssertionError: return 'state'

INF = ['inf','-inf','both','all inf']

def known(case):
    "Where ours may differ from fastai's after an infinity or an overflow, and in what"
    kw,dec,g,p = case.kw,case.kw['decouple_wd'],'to_grads','to_params'
    # the kernel writes a NaN over an infinite gradient
    if case.jit is rmsprop_jit and not kw['mom'] and dec: return {(w,g):'gradient' for w in INF}
    res,lerps = {},case.jit in (rmsprop_jit,adam_jit,radam_jit,qhadam_jit,lamb_jit,ranger_jit,muon_jit)
    # lerp makes NaN of an infinite average, whose parameter is NaN already
    if lerps and dec and 'beta' not in kw or case.jit is adan_jit: res |= {(w,g):'state' for w in INF}
    # fastai squares the gradient before it multiplies with 1-nu_2: an overflow, and 0*inf is NaN
    if case.jit is qhadam_jit: res |= {(f'times {x}',t):'parameter' for x in (1e19,1e25,1e38) for t in (g,p)}
    # a matrix that is nothing but its last updates, orthogonal and of alternating sign: what is left is rounding
    if case.jit is muon_jit and kw.get('rest') == [] and not dec: res["{'lr': 1e+30}"] = 'parameter'
    # the decay is a part of the update, which is subtracted: NaN where a parameter is infinite already
    if case.jit is stableadam_jit and dec:
        res |= {(w,p):'parameter' for w in INF} | {(w,g):'state' for w in INF} | {"{'wd': inf}":'parameter'}
    return res

@cases
def test_poison(case):
    "NaN, infinities, overflow and underflow spread as in fastai, but for what `known` explains"
    found = {(what,where):m for what,f in POISON.items() for where in ('to_grads','to_params')
             if (m := mismatch(case, torch.float32, **{where:f}))}
    assert found.items() <= known(case).items()

@pytest.mark.parametrize('case', slow_but(FIRST, CASES), ids=str)
def test_hypers_at_their_edges(case):
    has = case.make([nn.Parameter(torch.ones(1))], False).hypers[0]
    found = {(str(h),zero):m for h in HYPERS if {*h} <= {*has} for zero in (False,True)
             if (m := mismatch(case, torch.float64, zero_grads=zero, **h))}
    assert {h for h,_ in found} <= known(case).keys()

@pytest.mark.parametrize('case', [c for c in CASES if c.takes('step')], ids=str)
def test_steps_come_late(case):
    "From 2**24 on float32 cannot count: with averages that are still on their way then"
    opts = []
    for jit in (False,True):
        ps = parameters((5,), (40,), dtype=torch.float64)
        opt = case.make(ps, jit)
        opt.step()
        for p in ps: opt.state[p]['step'] = 2**24 - 2
        opt.set_hypers(mom=1-1e-8, sqr_mom=1-1e-7)
        for i in range(6): new_grads(ps, i); opt.step()
        opts.append(opt)
    for p,q in zip(*map(params_of, opts)): close(q, p, TOL[torch.float64])
    same_state(opts[1], opts[0], TOL[torch.float64])

# fastai's Lookahead cannot clone these either
@pytest.mark.parametrize('case', [c for c in ALL if c.jit is not ranger_jit], ids=str)
def test_frozen_parameters_of_any_kind(case):
    p = nn.Parameter(torch.ones(3))
    sparse = nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False)
    opt = case.make([sparse, nn.LazyLinear(3).weight, p], True)
    for _ in range(2): p.grad = torch.ones(3); opt.step()
    assert (p < 1).all()

@every
def test_default_device(case):
    "A default device does not take parameters elsewhere"
    def train(device):
        ps = parameters((3,4), (5,))
        opt = case.make(ps, True)
        for _ in range(7):
            new_grads(ps)
            with torch.device(device): opt.step()
        return ps
    for compiled in (True,False):
        with pytest.MonkeyPatch.context() as mp:
            if not compiled: engine.run_uncompiled(mp, *case.steps)
            assert all(map(torch.equal, train('meta'), train('cpu')))
