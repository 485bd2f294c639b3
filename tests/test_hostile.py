"NaN and infinity spread as in fastai; a step that cannot be taken changes nothing; nothing grows with the number of steps"
import gc
from math import inf,nan

import pytest
import torch
from fastcore.foundation import L
from torch import nn

from fastxtend_jit import bucket,plan
from fastxtend_jit.bench import peak_memory
from tests.cases import *

cases,every = [pytest.mark.parametrize('case', cs, ids=str) for cs in (CASES,ALL)]

def put(*vs):
    "A function that writes `vs` over the first elements of a tensor"
    def f(t): t.view(-1)[:len(vs)] = torch.tensor(vs[:t.numel()]).to(t.dtype)
    return f

# What happens to parameters or gradients before the third step
POISON = {'nan': put(nan), 'inf': put(inf), '-inf': put(-inf), 'both': put(inf,-inf,nan,0.,-0.), 'all inf': lambda t: t.fill_(-inf), 'zero': torch.Tensor.zero_,
          **{f'times {x}': lambda t,x=x: t.mul_(x) for x in (1e-45,1e-40,1e-25,1e-21,1e15,1e19,1e25,1e38)}}
HYPERS = [dict(lr=0.), dict(lr=-0.01), dict(lr=1e30), dict(lr=inf), dict(lr=nan), dict(wd=0.), dict(wd=1e30), dict(wd=inf), dict(mom=0.),
          dict(mom=1.5), dict(mom=nan), dict(sqr_mom=0.), dict(sqr_mom=0.999999), dict(eps=0.), dict(eps=1e30), dict(eps=inf), dict(beta=1e-8), dict(beta=1e8),
          dict(trust_coeff=0.), dict(trust_coeff=inf), dict(nu_2=-1.)]

def duel(case, dtype, to_grads=None, to_params=None, steps=8, zero_grads=False, **hypers):
    "Train fastai's and ours; return both"
    torch.manual_seed(0)
    # norms of one element overflow in another place than norms of several, one way in fastai and the other in ours
    ts,opts = [torch.randn(s, dtype=dtype) for s in [(2,) if case.jit is larc_jit else (), (5,), (7,9)]],[]
    for jit in (False,True):
        opts.append(case.make([nn.Parameter(t.clone()) for t in ts], jit))
        for k,v in hypers.items():
            if k in opts[0].hypers[0]: opts[-1].set_hyper(k, v)
    for i in range(steps):
        gs = [torch.zeros_like(t) if zero_grads else torch.randn_like(t) for t in ts]
        if i == 2 and to_grads: [to_grads(g) for g in gs]
        if i == 2 and to_params:
            for p,q in zip(*(opt.param_lists[0] for opt in opts)):
                q.data.copy_(p.data)  # or what rounding has left of a difference would be multiplied
                for o in (p,q): to_params(o.data)
        for opt in opts:
            for p,g in zip(opt.param_lists[0], gs):
                p.grad = g.clone()
            opt.step()
        # in place of a NaN that has any sign, ours may leave one with another
        for p,g in zip(opts[1].param_lists[0], gs): assert torch.equal(p.grad.nan_to_num(7.,8.,9.), g.nan_to_num(7.,8.,9.)), f'gradient changed at step {i}'
    return opts

def mismatch(case, dtype, **kw):
    "What differs between fastai's and ours: 'gradient' if ours changed it, 'parameter', or 'state'; `None` if nothing does"
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
    if case.jit is rmsprop_jit and not kw['mom'] and dec: return {(w,g):'gradient' for w in INF}  # the kernel writes a NaN over an infinite gradient
    res = {}
    # lerp makes NaN of an infinite average, whose parameter is NaN already
    if case.jit in (rmsprop_jit,adam_jit,radam_jit,qhadam_jit,lamb_jit,ranger_jit) and dec and 'beta' not in kw or case.jit is adan_jit: res |= {(w,g):'state' for w in INF}
    # fastai squares the gradient before it multiplies with 1-nu_2: an overflow, and 0*inf is NaN
    if case.jit is qhadam_jit: res |= {(f'times {x}',t):'parameter' for x in (1e19,1e25,1e38) for t in (g,p)}
    # the decay is a part of the update, which is subtracted: NaN where a parameter is infinite already
    if case.jit is stableadam_jit and dec: res |= {(w,p):'parameter' for w in INF} | {(w,g):'state' for w in INF} | {"{'wd': inf}":'parameter'}
    return res

@cases
def test_poison(case):
    "NaN, infinities, overflow and underflow spread as in fastai, but for what `known` explains"
    found = {(what,where):m for what,f in POISON.items() for where in ('to_grads','to_params') if (m := mismatch(case, torch.float32, **{where:f}))}
    assert found.items() <= known(case).items()

@cases
def test_edge_hypers(case):
    found = {(str(h),zero):m for h in HYPERS for zero in (False,True) if (m := mismatch(case, torch.float64, zero_grads=zero, **h))}
    assert {h for h,_ in found} <= known(case).keys()

def tensors(opt):
    "Every tensor that belongs to `opt`, by name, in an order of its own"
    ps,slow = [p for pg in opt.param_lists for p in pg],getattr(opt, 'slow_weights', None) or []
    return {**{('param',i):p for i,p in enumerate(ps)}, **{('grad',i):torch.Tensor.grad.__get__(p) for i,p in enumerate(ps)}, **{('slow',i,j):s for i,pg in enumerate(slow) for j,s in enumerate(pg)},
            **{(k,i):v for i,p in enumerate(ps) for k,v in opt.state.get(p, {}).items() if isinstance(v, torch.Tensor)}}

def snapshot(opt):
    "All there is to `opt`, bit by bit, to be compared: tensors as they are and as bytes, and all that counts"
    ps = [p for pg in opt.param_lists for p in pg]
    return ({k:(id(t), t.data_ptr(), t.stride(), t.detach().contiguous().view(-1).view(torch.uint8).tolist()) for k,t in tensors(opt).items()},
            [{k:v for k,v in opt.state.get(p, {}).items() if not isinstance(v, torch.Tensor)} for p in ps],
            [{**h} for h in opt.hypers], opt.frozen_idx, getattr(opt, 'count', 0), getattr(opt, 'slow_weights', None) is None)

class Stop(BaseException): "Like KeyboardInterrupt, nothing that `except Exception` catches"

class Trap:
    "Raises `what` at the `n`-th call, and passes all others on to `fn`"
    def __init__(self, fn, n, what): self.fn,self.n,self.what = fn,n,what
    def __call__(self, *args, **kw):
        self.n -= 1
        if self.n == 0: raise self.what
        return self.fn(*args, **kw)

class BadNumber(float):
    def __float__(self): raise Stop

class BadState(dict):
    def get(self, *_): raise Stop

def last(opt): return opt.param_lists[-1][-1]
# Faults that a step meets before it writes, each set up by a function of optimizer and monkeypatch. The last parameter of the last group is bad
def bad_string(opt, mp):  opt.hypers[-1]['lr'] = 'high'
def bad_none(opt, mp):    opt.hypers[-1]['wd' if 'wd' in opt.hypers[-1] else 'lr'] = None
def bad_number(opt, mp):  opt.hypers[-1]['lr'] = BadNumber(0.01)
def bad_missing(opt, mp): del opt.hypers[-1]['lr']
def bad_short(opt, mp):   opt.hypers = L(list(opt.hypers)[:-1])
def bad_dtype(opt, mp):   last(opt).data = last(opt).data.double()
def bad_shape(opt, mp):   last(opt).data = last(opt).data[:1].clone()
def bad_grad(opt, mp):
    mp.setattr(nn.Parameter, 'grad', property(Trap(torch.Tensor.grad.__get__, sum(map(len, opt.param_lists)), Stop())), raising=False)
def bad_state(opt, mp):   opt.state[last(opt)] = BadState(opt.state[last(opt)])
def bad_tensor(opt, mp):  opt.state[last(opt)]['grad_avg' if 'grad_avg' in opt.state_names else 'sqr_avg'] = torch.ones(99)
def bad_plan(opt, mp):    opt._plan = None; mp.setattr(bucket, 'cut', Trap(bucket.cut, 2, MemoryError()))
def bad_zeros(n):
    return lambda opt,mp: mp.setattr(torch, 'zeros_like', Trap(torch.zeros_like, n, MemoryError()))
FAULTS = {f.__name__[4:]:f for f in (bad_string,bad_none,bad_number,bad_missing,bad_short,bad_dtype,bad_shape,bad_grad,bad_state,bad_tensor,bad_plan)}
FRESH  = {f'zeros {n}':bad_zeros(n) for n in (1,3,5)} | {k:FAULTS[k] for k in ('string','short','dtype','grad','state','plan')}  # at the first step

def make(case, steps):
    "An optimizer of three groups, some steps on its way"
    torch.manual_seed(1)
    ps = [nn.Parameter(torch.randn(s)) for s in [(), (7,), (4,3), (6,5), (3,)]]
    opt = case.make([ps[:2],ps[2:3],ps[3:]], True)
    for _ in range(steps+1):
        for p in ps: p.grad = torch.randn_like(p)
        if _ < steps: opt.step()
    return opt

@every
@pytest.mark.parametrize('fault,steps', [*((f,3) for f in FAULTS), *((f,0) for f in FRESH)])
def test_error_changes_nothing(case, fault, steps, monkeypatch):
    opt,well = make(case, steps),make(case, steps)
    (FAULTS|FRESH)[fault](opt, monkeypatch)
    before = snapshot(opt)
    with pytest.raises((Exception,Stop)): opt.step()
    assert snapshot(opt) == before
    monkeypatch.undo()
    if fault not in ('plan','grad') and 'zeros' not in fault: return
    for o in (opt,well): o.step()  # as if nothing had happened
    assert [p.tolist() for pg in opt.param_lists for p in pg] == [p.tolist() for pg in well.param_lists for p in pg]
    same_state(opt, well, 0.)

@every
def test_nothing_grows(case):
    "300 steps with changing sets of gradients, new gradients, new memory, new hypers"
    opt = make(case, 0)
    ps = [p for pg in opt.param_lists for p in pg]
    def counts():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects()),len(gc.get_objects())
    def play(n):
        for i in range(n):
            for j,p in enumerate(ps): p.grad = None if (i>>j)&1 else torch.randn_like(p)
            if i%7 == 0: ps[i%5].data = ps[i%5].data.clone()
            if i%50 == 0: opt.clear_state()
            opt.set_hyper('lr', 0.01/(i+1))
            opt.step()
            opt.zero_grad()
        for p in ps: p.grad = torch.randn_like(p)
        opt.step()
        return counts()
    (tensors,objects),(tensors2,objects2) = play(100),play(200)
    assert tensors2 == tensors and objects2 <= objects+20

@cases
@pytest.mark.parametrize('relay', [False,True])
def test_scratch(case, relay, monkeypatch):
    "Steps allocate a few batches' memory at most, not the model's: this is `tests.tools.memory` in small. Gradients lie as they like"
    for m in (bucket,plan): monkeypatch.setattr(m, 'batch_size', 2**13)
    ps = [nn.Parameter(torch.randn(64,128)) for _ in range(40)]
    opt = case.make(ps, True)
    for i in range(8):
        for p in ps: p.grad = torch.randn(128,64).t() if relay else torch.randn(64,128)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof: opt.step()
        state = sum(t.numel() for st in opt.state.values() for t in st.values() if isinstance(t, torch.Tensor))*4
        now = peak = 0
        for e in sorted((e for e in prof.profiler.kineto_results.events() if e.name() == '[memory]'), key=lambda e: e.start_ns()):
            now += e.nbytes()
            peak = max(peak, now)
        if i == 0: peak -= now  # state
        assert peak <= 8*2**13*4, f'{peak/2**15} batches at step {i}'

@cases
def test_channels_last(case):
    "Tensors in `channels_last` format cost no more memory than others: ATen's fused kernels, given such a gradient, would copy it"
    def peak(fmt):
        ps = [nn.Parameter(torch.randn(32,16,3,3).to(memory_format=fmt)) for _ in range(5)]
        opt = case.make(ps, True)
        for p in ps: p.grad = torch.randn_like(p)
        for _ in range(6): opt.step()  # RAdam rectifies, Lookahead looks ahead
        return [peak_memory(opt.step) for _ in range(6)]
    assert peak(torch.channels_last) == peak(torch.contiguous_format)

@every
def test_kept_graph(case):
    "Autograd does not count what a step writes, as in fastai: a graph that was kept runs backward again. And PyTorch may swap parameters"
    def train(jit):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3,4), nn.Tanh(), nn.Linear(4,2)).double()
        opt = case.make([*model.parameters()], jit)
        for _ in range(4):
            loss = model(torch.randn(5, 3, dtype=torch.float64)).square().sum()
            for _ in range(2): loss.backward(retain_graph=True); opt.step()
            opt.zero_grad()
        return model
    theirs,ours = train(False),train(True)
    for p,q in zip(theirs.parameters(), ours.parameters()): close(q, p, 1e-11)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try: assert ours.float()[0].weight.dtype == torch.float32
    finally: torch.__future__.set_swap_module_params_on_conversion(False)

@pytest.mark.parametrize('case', [c for c in ALL if c.jit is not ranger_jit], ids=str)  # fastai's Lookahead cannot clone these either
def test_frozen_oddities(case):
    "A parameter without gradient may be of any kind"
    p = nn.Parameter(torch.ones(3))
    opt = case.make([nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False), nn.LazyLinear(3).weight, p], True)
    for _ in range(2): p.grad = torch.ones(3); opt.step()
    assert (p < 1).all()

@every
def test_default_device(case):
    "A default device does not take parameters elsewhere"
    def train(device):
        torch.manual_seed(0)
        ps = [nn.Parameter(torch.randn(s)) for s in ((3,4),(5,))]
        opt = case.make(ps, True)
        for _ in range(7):
            for p in ps: p.grad = torch.randn_like(p)
            with torch.device(device): opt.step()
        return ps
    for compiled in (True,False):
        step = globals()[f'{case.jit.__name__}_step']
        with pytest.MonkeyPatch.context() as mp:
            if not compiled: mp.setitem(vars(step), 'compiled', step.fn)
            assert all(map(torch.equal, train('meta'), train('cpu')))
