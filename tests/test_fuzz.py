"""Whatever happens to an optimizer, in any order: hypothesis plays with fastai's and ours, and every element agrees

`make fuzz`, or FASTXTEND_FUZZ=1000 in the environment, plays that many random games with each optimizer"""
import copy,math,os

import pytest
import torch

pytest.importorskip('hypothesis')
from hypothesis import HealthCheck,settings,strategies as st
from hypothesis.stateful import RuleBasedStateMachine,initialize,invariant,rule,run_state_machine_as_test
from fastcore.foundation import L
from torch import nn
from torch.nn import functional as F

from tests import engine
from tests.cases import *
from tests.support import slow_but

N   = int(os.environ.get('FASTXTEND_FUZZ', 0))
TOL = {torch.float64: 1e-10, torch.float32: 3e-5}
EPS = torch.finfo(torch.float32).eps

pick,seeds,index = st.sampled_from,st.integers(0, 2**32-1),st.integers(0, 9)
lists  = lambda s: st.lists(s, min_size=1, max_size=6)  # dealt out to parameters or groups in turn
SHAPES = [(), (0,), (1,), (3,), (129,), (5,0,2), (8,8), (16,8,1,1), (6,5,3,3), (40,50), (1,300,1)]
LAYOUTS = ['plain','transposed','channels_last','gaps','offset']
HYPERS = dict(lr=st.floats(1e-4,0.2), mom=pick([0.,0.5,0.9,0.99]), sqr_mom=pick([0.,0.5,0.9,0.99,0.999]),
              wd=pick([0.,0.01,0.3]), eps=pick([1e-8,1e-5,1e-2]), beta=pick([0.,1.,50.]), nu_1=pick([0.,0.3,1.,1.5]),
              nu_2=pick([0.,0.3,1.]), trust_coeff=pick([0.001,0.02,1.]), avg_mom=pick([0.,0.5,0.99]),
              diff_mom=pick([0.,0.5,0.92]))

def lay(t, how):
    "A copy of `t`, laid out in memory as `how` says; as it comes where its shape has no such layout"
    if how == 'transposed' and t.dim() > 1:     return t.mT.clone(memory_format=torch.contiguous_format).mT
    if how == 'channels_last' and t.dim() == 4: return t.clone(memory_format=torch.channels_last)
    if how == 'gaps':                           return t.new_empty((*t.shape,2))[...,0].copy_(t)
    if how == 'offset':                         return t.new_empty(t.numel()+3)[3:].view(t.shape).copy_(t)
    return t.clone(memory_format=torch.contiguous_format)

# How far may float32 be from the truth, fastai's optimizer in float64 with the same gradients? Errors obey its own
# recurrences. Of weights off by up to `e` and gradients by `d`, decay leaves `(1-lr*wd)*e`, and L2 makes `d + wd*e`;
# the average of gradients is off by up to that of `d`, and the root of that of squares, a norm, by up to the root of
# that of `d*d`. So fastai's optimizer keeps these bounds itself, if it gets `e` for weights and `d` for gradients, at
# first `EPS` of the true ones. Only its step differs: `u = a/s`, of which `a` is off by up to `da` and `s` by `ds`, is
# off by up to `(da + |u|*ds)/(s-ds)`. That is a few `EPS` of `u`. But where `|g + wd*p|` nears `EPS*(|g| + wd*|p|)`,
# and `s` has seen nothing larger, rounding is divided by rounding: `s-ds` is gone, and only the hyper `eps` limits it.
@torch.no_grad()
def widen(e, p, g, h, jit, grad_avg=None, sqr_avg=None, **_):
    "Widen `e` by how far off a step may be; the truth takes it from `p` with gradients `g`, hypers and state `h`"
    lr,n1,n2 = h.get('local_lr', h['lr']),h.get('nu_1', 1.),h.get('nu_2', 1.)
    d1,d2 = [1 - h[m]**h['step'] if 'step' in h else 1. for m in ('mom','sqr_mom')]
    u,du = g,e.grad
    if grad_avg is not None: u,du = g.lerp(h['grad_avg']/d1, n1),abs(1-n1)*du + n1*grad_avg/d1
    r = 2/(1-h['sqr_mom']) - 1 - 2*h['step']*(1-d2)/d2 if 'beta' in h else math.inf  # RAdam divides once this is over 5
    if sqr_avg is not None and r > 5:
        s,ds = [(x*x).lerp(v/d2, n2).sqrt() for x,v in ((g,h['sqr_avg']),(e.grad,sqr_avg))]
        s,low = [x.relu() + h['eps'] for x in (s,s-ds)]
        if h.get('beta'): s,low = F.softplus(s, h['beta']),F.softplus(low, h['beta'])
        u = u/s
        du = (du + ds*u.abs())/low
    if jit is lamb_jit and p.any() and u.any():  # its norms are off by up to those of `e` and `du`
        r1,e1,r2,e2 = [x.square().mean().sqrt() for x in (p,e,u,du)]
        low,q,high = [x.clamp(max=10) for x in ((r1-e1).relu()/(r2+e2), r1/r2, (r1+e1)/(r2-e2).relu())]
        u,du = q*u,high*du + torch.maximum(high-q, q-low)*u.abs()
    e += lr*du + EPS*(p.abs() + lr*u.abs())

@torch.no_grad()
def near(ours, theirs, truth, e, what):
    "Is `ours` as `theirs`, or, in float32, as the truth, give or take `e`?"
    tol = TOL[theirs.dtype]
    if theirs.dtype == torch.float64: return close(ours, theirs, tol, what)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, what
    fin = theirs.isfinite()
    truth = truth.where(fin, theirs)
    # up to twice what fastai's is off beyond `e`, which leaves out how a lookahead rounds if weights were set to zero
    e = e + 2*((theirs-truth).abs() - e).where(fin, 0.).relu().max()
    close((ours + (truth-ours).clamp(-e, e)).where(fin, ours), truth, tol, what)

class Game(RuleBasedStateMachine):
    """fastai's optimizer is the model. `self.opts` are fastai's, ours, the truth, and the bounds on float32's errors,
    each with its own parameters as `ps`"""
    def __init__(self, jit):
        super().__init__()
        self.jit,self.patch,self.hows,self.scale,self.calls = jit,pytest.MonkeyPatch(),['new'],1.,[]

    def teardown(self): self.patch.undo()

    @initialize(data=st.data(), specs=lists(st.tuples(pick(SHAPES), pick(LAYOUTS), pick([*TOL]))),
                n_groups=st.integers(1,3), seed=seeds, batch=pick([64,2**20]), fused=st.booleans(), k=st.integers(1,4))
    def start(self, data, specs, n_groups, seed, batch, fused, k):
        self.case = data.draw(pick([c for c in CASES+AHEAD if c.jit is self.jit]))
        self.bounded = any(self.jit is jit for _,jit in PAIRS)  # `widen` knows their formulas; others play in float64
        if self.jit is ranger_jit: self.case = Case(self.case.native, self.jit, {**self.case.kw, 'k':k})
        engine.use_batches_of(self.patch, batch)
        if not fused: engine.set_fused_fault(self.patch, 'none')
        self.layouts = [how for _,how,_ in specs]
        torch.manual_seed(seed)
        # what rounding leaves of a difference is nothing to go by, so float32 only where other elements set the scale
        ts = [torch.randn(s, dtype=d if math.prod(s) > 60 and self.bounded else torch.float64) for s,_,d in specs]
        self.n = min(n_groups, len(ts))
        starts = ts,ts,[t.double() for t in ts],[t.double().abs()*EPS for t in ts]
        self.opts = [self.make(i, [nn.Parameter(lay(t, how)) for t,how in zip(o, self.layouts)])
                     for i,o in enumerate(starts)]

    def make(self, i, ps):
        "The `i`-th of `self.opts`"
        opt = self.case.make([ps[i::self.n] for i in range(self.n)] if self.n > 1 else ps, i == 1)
        opt.ps = ps
        if i == 2 and self.bounded: opt.cbs.insert(-1, lambda p,**h: self.calls.append((p.detach().clone(),p.grad,h)))
        if i == 3: opt.cbs[-1] = lambda e,**h: widen(e, *self.calls.pop(0), self.jit, **h) if self.bounded else None
        return opt

    def each(self, i): return [(opt,opt.ps[i%len(opt.ps)]) for opt in self.opts]

    def agree(self):
        native,ours,*_ = self.opts
        for i,(p,q,t,e) in enumerate(zip(*[opt.ps for opt in self.opts])):
            near(q, p, t, e, f'parameter {i}')
            if p.grad is None: assert q.grad is None
            else:              assert q.grad.equal(p.grad), f'gradient {i}'
        assert [dict(h) for h in ours.hypers] == [dict(h) for h in native.hypers]
        for i,(p,q) in enumerate(zip(native.ps, ours.ps)):
            if not p.numel(): continue  # ours takes no step for it
            t,s,true,e = [{**opt.state.get(opt.ps[i], {})} for opt in self.opts]
            lrs = [x.pop('local_lr', None) for x in (s,t)]  # which fastai's Larc leaves there, a number or a tensor
            if 'local_lr' in ours.state_names and lrs != [None,None]:
                close(*torch.tensor(lrs, dtype=torch.float64), TOL[p.dtype], f'local_lr of parameter {i}')
            assert {k:type(v) for k,v in s.items()} == {k:type(v) for k,v in t.items()}, f'state of parameter {i}'
            for k,v in s.items():
                if isinstance(v, torch.Tensor):
                    off = e.get(k, torch.zeros([]))
                    if k == 'sqr_avg': off = off + 2*(off*true[k]).sqrt()  # the root is off by √e
                    near(v, t[k], true[k], off, f'{k} of parameter {i}')
                else: assert v == t[k], f'{k} of parameter {i}'
        if hasattr(native, 'slow_weights'):
            assert ours.count == native.count and (ours.slow_weights is None) == (native.slow_weights is None)
            slow = [[t for pg in self.opts[i].slow_weights or [] for t in pg] for i in (1,0,2,3)]
            for ts in zip(*slow): near(*ts, 'slow weights')

    def backward(self):
        "New gradients for what is not frozen: none, added to the old one, or a tensor of their own in any layout"
        for i,(p,q) in enumerate(zip(*[opt.ps for opt in self.opts[:2]])):
            how = self.hows[i%len(self.hows)]
            g = torch.randn(p.shape, dtype=p.dtype)*self.scale
            if how == 'keep' or not q.requires_grad: continue
            if how == 'none': p.grad = q.grad = None; continue
            if how == 'add' and q.grad is not None:
                p.grad += g
                if torch._debug_has_internal_overlap(q.grad) == 1: q.grad = p.grad.clone()
                else: q.grad += g
                continue
            if how == 'zero': g.zero_()
            if how == 'expanded' and g.dim() and len(g): g = g[:1].expand(g.shape)
            else: g = lay(g, self.layouts[i] if how in ('new','add') else how)
            p.grad,q.grad = g.clone(memory_format=torch.contiguous_format),g

    @invariant()
    def train(self):
        "After whatever happened, none to two steps. Ours leaves gradients alone; fastai's L2 does not, which is undone"
        for _ in range(torch.randint(3, (1,))):
            if torch.rand(1) < 0.8: self.backward()
            native,ours,truth,bounds = self.opts
            grads = [p.grad for p in ours.ps]
            for p,t,e in zip(native.ps, truth.ps, bounds.ps):
                t.grad = None if p.grad is None else p.grad.clone().double()
                e.grad = None if p.grad is None else t.grad.abs()*EPS
            for opt in self.opts: opt.step()
            for p,q,g in zip(native.ps, ours.ps, grads):
                assert q.grad is g
                if not self.case.kw.get('decouple_wd', True) and g is not None: p.grad.copy_(g)
            self.agree()

    @rule(hows=lists(pick(['new','new','none','keep','add','zero','expanded',*LAYOUTS])), scale=pick([1.,1e-3,1e3]))
    def gradients(self, hows, scale): self.hows,self.scale = hows,scale

    @rule()
    def zero_grad(self):
        grads = [p.grad for p in self.opts[1].ps]
        for opt in self.opts: opt.zero_grad()
        assert all(p.grad is g for p,g in zip(self.opts[1].ps, grads))
        self.agree()

    @rule(name=pick([*HYPERS]), data=st.data())
    def schedule(self, name, data):
        if name not in self.opts[0].hypers[0]: return
        vs = [data.draw(HYPERS[name]) for _ in range(self.n)]
        for opt in self.opts: opt.set_hyper(name, vs)

    @rule(n=st.integers(-2,3))
    def freeze(self, n):
        for opt in self.opts: opt.freeze_to(max(-self.n, min(n, self.n-1)))

    @rule(i=index, on=st.booleans())
    def require_grad(self, i, on):
        for _,p in self.each(i): p.requires_grad_(on)

    @rule(i=index, flag=pick(['do_wd','force_train']), on=st.booleans())
    def flag(self, i, flag, on):
        for opt,p in self.each(i): opt.state[p][flag] = on

    @rule(i=index, how=pick(LAYOUTS), factor=pick([1.,0.5]))
    def new_data(self, i, how, factor):
        "`param.data` moves to new memory in any layout, with the same values or others"
        for _,p in self.each(i): p.data = lay(p.data*factor, how)

    @rule(i=index, how=pick(LAYOUTS), factor=pick([1.,0.5]))
    def new_state_data(self, i, how, factor):
        "The same for averages and slow weights"
        for opt,p in self.each(i):
            for k,t in opt.state[p].items():
                if isinstance(t, torch.Tensor) and t.shape == p.shape and k != 'local_lr': t.data = lay(t*factor, how)
        for opt in self.opts:
            for pg in getattr(opt, 'slow_weights', None) or []: [setattr(t, 'data', lay(t, how)) for t in pg]

    @rule(i=index, factor=pick([0.,0.5]))
    def edit(self, i, factor):
        with torch.no_grad(): [p.mul_(factor) for _,p in self.each(i)]

    @rule()
    def new_params(self):
        "Other parameters take the place of those that were, as with fastai's non-native fp16"
        for opt in self.opts:
            new = {p: nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in opt.ps}
            for p,q in new.items():
                q.grad = p.grad
                if p in opt.state: opt.state[q] = opt.state.pop(p)
            opt.ps,opt.param_lists = [new[p] for p in opt.ps],L(L(new[p] for p in pg) for pg in opt.param_lists)

    @rule()
    def clear_state(self):
        for opt in self.opts: opt.clear_state()
        self.agree()

    @rule(swap=st.booleans(), fresh=st.booleans())
    def save_and_load(self, swap, fresh):
        "Each goes on from its own state or from that of the other"
        sds = [copy.deepcopy(opt.state_dict()) for opt in self.opts]
        if swap: sds[:2] = sds[1::-1]
        if fresh: self.opts = [self.make(i, opt.ps) for i,opt in enumerate(self.opts)]
        for opt,sd in zip(self.opts, sds): opt.load_state_dict(sd)
        self.agree()

    @rule()
    def deepcopy(self):
        "The copies go on, the originals could too"
        self.opts = [copy.deepcopy(opt) for opt in self.opts]

@pytest.mark.parametrize('jit', [*(j for _,j in PAIRS+OTHERS), *(c.jit for c in TWO_AHEAD)], ids=lambda f: f.__name__)
@pytest.mark.parametrize('games', slow_but([3], [3,20]))
def test_fuzz(jit, games):
    run_state_machine_as_test(lambda: Game(jit), settings=settings(
        max_examples=N or games, stateful_step_count=30, derandomize=not N, database=None, deadline=None,
        print_blob=True, suppress_health_check=list(HealthCheck)))
