"""Whatever happens to an optimizer, in any order: hypothesis plays with fastai's and ours, and every element agrees after each step

`make fuzz`, or FASTXTEND_FUZZ=1000 in the environment, plays that many random games with each optimizer"""
import copy,math,os

import pytest
import torch
from hypothesis import HealthCheck,settings,strategies as st
from hypothesis.stateful import RuleBasedStateMachine,initialize,invariant,rule,run_state_machine_as_test
from fastcore.foundation import L
from torch import nn

from fastxtend_jit import plan
from tests.cases import *

N   = int(os.environ.get('FASTXTEND_FUZZ', 0))
TOL = {torch.float64: 1e-10, torch.float32: 3e-5}

pick,seeds,index = st.sampled_from,st.integers(0, 2**32-1),st.integers(0, 9)
lists  = lambda s: st.lists(s, min_size=1, max_size=6)  # dealt out to parameters or groups in turn
SHAPES = [(), (0,), (1,), (3,), (129,), (5,0,2), (8,8), (16,8,1,1), (6,5,3,3), (40,50), (1,300,1)]
LAYOUTS = ['plain','transposed','channels_last','gaps','offset']
HYPERS = dict(lr=st.floats(1e-4,0.2), mom=pick([0.,0.5,0.9,0.99]), sqr_mom=pick([0.,0.5,0.9,0.99,0.999]), wd=pick([0.,0.01,0.3]),
              eps=pick([1e-8,1e-5,1e-2]), beta=pick([0.,1.,50.]), nu_1=pick([0.,0.3,1.,1.5]), nu_2=pick([0.,0.3,1.]), trust_coeff=pick([0.001,0.02,1.]))

def lay(t, how):
    "A copy of `t`, laid out in memory as `how` says; as it comes where its shape has no such layout"
    if how == 'transposed' and t.dim() > 1:     return t.mT.clone(memory_format=torch.contiguous_format).mT
    if how == 'channels_last' and t.dim() == 4: return t.clone(memory_format=torch.channels_last)
    if how == 'gaps':                           return t.new_empty((*t.shape,2))[...,0].copy_(t)
    if how == 'offset':                         return t.new_empty(t.numel()+3)[3:].view(t.shape).copy_(t)
    return t.clone(memory_format=torch.contiguous_format)

class Game(RuleBasedStateMachine):
    "fastai's optimizer is the model. `self.opts` are fastai's and ours, each with its own parameters as `ps`"
    def __init__(self, jit):
        super().__init__()
        self.jit,self.patch,self.hows,self.scale = jit,pytest.MonkeyPatch(),['new'],1.

    def teardown(self): self.patch.undo()

    @initialize(data=st.data(), specs=lists(st.tuples(pick(SHAPES), pick(LAYOUTS), pick([*TOL]))), n_groups=st.integers(1,3), seed=seeds,
                batch=pick([64,2**20]), fused=st.booleans(), k=st.integers(1,4))
    def start(self, data, specs, n_groups, seed, batch, fused, k):
        self.case = data.draw(pick([c for c in CASES if c.jit is self.jit]))
        if self.jit is ranger_jit: self.case = Case(self.case.native, self.jit, {**self.case.kw, 'k':k})
        self.patch.setattr(plan, 'batch_size', batch)
        if not fused: self.patch.setattr(plan, 'has_fused', lambda *_: False)
        self.layouts = [how for _,how,_ in specs]
        torch.manual_seed(seed)
        # what rounding leaves of a difference is nothing to go by, so float32 only where other elements set the scale
        ts = [torch.randn(s, dtype=d if math.prod(s) > 60 else torch.float64) for s,_,d in specs]
        self.n = min(n_groups, len(ts))
        self.opts = [self.make(jit, [nn.Parameter(lay(t, how)) for t,how in zip(ts, self.layouts)]) for jit in (False,True)]

    def make(self, jit, ps):
        opt = self.case.make([ps[i::self.n] for i in range(self.n)] if self.n > 1 else ps, jit)
        opt.ps = ps
        return opt

    def each(self, i): return [(opt,opt.ps[i%len(opt.ps)]) for opt in self.opts]

    def agree(self):
        native,ours = self.opts
        for i,(p,q) in enumerate(zip(native.ps, ours.ps)):
            close(q, p, TOL[p.dtype], f'parameter {i}')
            if p.grad is None: assert q.grad is None
            else:              assert q.grad.equal(p.grad), f'gradient {i}'
        assert [dict(h) for h in ours.hypers] == [dict(h) for h in native.hypers]
        for i,(p,q) in enumerate(zip(native.ps, ours.ps)):
            if not p.numel(): continue  # ours takes no step for it
            # fastai's Larc leaves its last learning rate there
            t,s = [{k:v for k,v in opt.state.get(x, {}).items() if k != 'local_lr'} for opt,x in zip(self.opts, (p,q))]
            assert {k:type(v) for k,v in s.items()} == {k:type(v) for k,v in t.items()}, f'state of parameter {i}'
            for k,v in s.items():
                if isinstance(v, torch.Tensor): close(v, t[k], TOL[p.dtype], f'{k} of parameter {i}')
                else: assert v == t[k], f'{k} of parameter {i}'
        if self.jit is ranger_jit:
            assert ours.count == native.count and (ours.slow_weights is None) == (native.slow_weights is None)
            for a,b in zip(ours.slow_weights or [], native.slow_weights or []): [close(s, t, TOL[s.dtype], 'slow weights') for s,t in zip(a,b)]

    def backward(self):
        "New gradients for parameters that are not frozen: none, added to the old one, or a tensor of their own in any layout"
        for i,(p,q) in enumerate(zip(*[opt.ps for opt in self.opts])):
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
        "After whatever happened, none to two steps. Ours leaves gradients alone; fastai's L2 changes them, which is undone"
        for _ in range(torch.randint(3, (1,))):
            if torch.rand(1) < 0.8: self.backward()
            native,ours = self.opts
            grads = [p.grad for p in ours.ps]
            for opt in self.opts: opt.step()
            for p,q,g in zip(native.ps, ours.ps, grads):
                assert q.grad is g
                if not self.case.kw['decouple_wd'] and g is not None: p.grad.copy_(g)
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
            for t in opt.state[p].values():
                if isinstance(t, torch.Tensor) and t.shape == p.shape: t.data = lay(t*factor, how)
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
        if fresh: self.opts = [self.make(jit, opt.ps) for jit,opt in enumerate(self.opts)]
        for opt,sd in zip(self.opts, sds[::-1] if swap else sds): opt.load_state_dict(sd)
        self.agree()

    @rule()
    def deepcopy(self):
        "The copies go on, the originals could too"
        self.opts = [copy.deepcopy(opt) for opt in self.opts]

@pytest.mark.parametrize('jit', [j for _,j in PAIRS], ids=lambda f: f.__name__)
def test_fuzz(jit):
    run_state_machine_as_test(lambda: Game(jit), settings=settings(
        max_examples=N or 20, stateful_step_count=30, derandomize=not N, database=None, deadline=None, print_blob=True,
        suppress_health_check=list(HealthCheck)))
