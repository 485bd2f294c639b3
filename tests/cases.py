"The table of optimizers under test, and the runner that trains the reference and ours side by side"
from dataclasses import dataclass
from functools import partial
from typing import Callable

import pytest
import torch
from torch import nn

from fastxtend_jit.all import *
from fastai.optimizer import SGD,RMSProp,Adam,RAdam,QHAdam,Larc,Lamb,Lookahead,ranger
from tests.references import adan,lion,muon,stableadam

@dataclass
class Case:
    "One optimizer in one structural variant: fastai's factory, ours, and the arguments that both get"
    native:Callable; jit:Callable; kw:dict
    def __str__(self): return '-'.join([self.jit.__name__, *(f'{k}={v}' for k,v in self.kw.items())])
    def make(self, params, jit, **kw): return (self.jit if jit else self.native)(params, **{'lr':0.01, **self.kw, **kw})
    @property
    def steps(self): return self.make([torch.zeros(1)], True).steps
    @property
    def step(self): return self.steps[0]
    def takes(self, arg): return any(arg in s.args for s in self.steps)

@dataclass(frozen=True)
class Ahead:
    "A factory of `cls`, which looks ahead, around the optimizers of `factory`"
    cls:type; factory:Callable
    @property
    def __name__(self): return f'{self.cls.__name__}({self.factory.__name__})'
    def __call__(self, params, k=6, alpha=0.5, **kw): return self.cls(self.factory(params, **kw), k=k, alpha=alpha)

PAIRS = [(SGD,sgd_jit), (RMSProp,rmsprop_jit), (Adam,adam_jit), (RAdam,radam_jit), (QHAdam,qhadam_jit),
         (Larc,larc_jit), (Lamb,lamb_jit), (ranger,ranger_jit)]
OTHERS = [(lion,lion_jit), (adan,adan_jit), (stableadam,stableadam_jit), (muon,muon_jit)]  # of which fastai has none
VARIANTS = {
    sgd_jit:     [dict(mom=m) for m in (0.,0.9)],
    rmsprop_jit: [dict(mom=m) for m in (0.,0.9)],
    adam_jit:    [{}],
    radam_jit:   [{}, dict(beta=50.)],
    qhadam_jit:  [{}, dict(nu_1=1.), dict(nu_1=0.), dict(nu_2=0.8), dict(nu_1=1., nu_2=0.5), dict(nu_1=1.5)],
    larc_jit:    [dict(mom=m, clip=c) for m in (0.,0.9) for c in (True,False)],
    lamb_jit:    [{}],
    ranger_jit:  [{}, dict(k=3, alpha=0.3), dict(beta=20., k=2, alpha=1.)],
    lion_jit:    [{}, dict(avg_mom=0.5)],
    adan_jit:    [{}],
    stableadam_jit: [{}],
    muon_jit:    [dict(rest=[]), {}, dict(rest=[], nesterov=False, adjust='original')],
}
def _cases(pairs):
    return [Case(n, j, {**kw, 'wd':0.01, 'decouple_wd':d}) for n,j in pairs for kw in VARIANTS[j] for d in (True,False)]
NATIVE = _cases(PAIRS)  # all forms that fastai has
CASES  = NATIVE + _cases(OTHERS)
# One of each, in the form that has most state
EIGHT  = [Case(n, j, dict(wd=0.01, **({'mom':0.9} if j in (sgd_jit,rmsprop_jit) else {}))) for n,j in PAIRS]
ALL    = EIGHT + [Case(n, j, {**VARIANTS[j][0], 'wd':0.01}) for n,j in OTHERS]
FIRST  = [*{c.jit:c for c in CASES[::-1]}.values()]  # one of each, in the first of its forms
AHEAD  = [Case(Ahead(Lookahead, c.native), Ahead(JitLookahead, c.jit), {**c.kw, 'k':3})
          for c in ALL if c.jit is not ranger_jit]
TWO_AHEAD = [c for c in AHEAD if c.jit.factory in (adam_jit,lamb_jit)]  # an elementwise one and one with norms
ON_GPU  = [pytest.param('cuda', marks=pytest.mark.gpu)]*torch.cuda.is_available()
DEVICES = ['cpu', *ON_GPU]

# Relative to the largest element of a tensor
TOL = {torch.float32: 3e-5, torch.float64: 1e-11}

def close(ours, theirs, tol, what=''):
    "Is every element of `ours` as in `theirs`, infinities and NaNs included?"
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, what
    a,b = ours.detach().double(),theirs.detach().double()
    fin = b.isfinite()
    assert torch.equal(a[~fin].nan_to_num(nan=7.), b[~fin].nan_to_num(nan=7.)), f'{what}: other infinities or NaNs'
    if not fin.any(): return
    err,scale = (a[fin]-b[fin]).abs().max(),b[fin].abs().max()
    assert err <= tol*scale, f'{what}: differs by {err:.2e} where the largest element is {scale:.2e}'

def slow(opt):
    "Slow weights of all groups, none without a lookahead"
    return [t for pg in getattr(opt, 'slow_weights', None) or [] for t in pg]

def same_state(ours, theirs, tol):
    "Have both optimizers the same hypers and the same state, in keys, types and values?"
    assert [dict(h) for h in ours.hypers] == [dict(h) for h in theirs.hypers]
    for i,((p,_,s,_),(q,_,t,_)) in enumerate(zip(ours.all_params(), theirs.all_params())):
        assert s.keys() == t.keys(), f'state of parameter {i}'
        for k in s:
            # fastai's is a number where it is `lr`
            if k == 'local_lr': t[k] = torch.as_tensor(t[k], dtype=s[k].dtype, device=s[k].device)
            assert type(s[k]) is type(t[k]), (i,k)
            if isinstance(s[k], torch.Tensor): close(s[k], t[k], tol, f'{k} of parameter {i}')
            else: assert s[k] == t[k], (i,k)

SHAPES = [(), (1,), (3,), (129,), (64,64), (30,7,3,3), (16,8,1,1), (1000,50)]

def layouts(dev, dtype):
    "Parameters in every layout, and for each a function that lays out a gradient"
    r,cl = partial(torch.randn, device=dev, dtype=dtype),torch.channels_last
    asis = lambda g: g.clone()
    return [(r(30,7,3,3).to(memory_format=cl), lambda g: g.to(memory_format=cl)),    # channels_last model
            (r(30,7,3,3),                      lambda g: g.to(memory_format=cl)),    # gradient alone
            (r(30,7,3,3).to(memory_format=cl), asis),
            (r(16,8,1,1),                      lambda g: g.to(memory_format=cl)),    # strides differ, layout does not
            (r(40,50),                         lambda g: g.t().contiguous().t()),    # transposed gradient
            (r(50,40).t(),                     asis),                                # transposed parameter
            (r(40,100)[:,::2],                 asis),                                # parameter with gaps
            (r(40,50)[3:9],                    lambda g: torch.cat([g,g])[:6]),      # at an offset
            (r(40,50),                         lambda g: g[:,:1].expand(40,50)),     # expanded gradients
            (r(40,50),                         lambda g: g.mean().expand(40,50))]

def run(case, dtype=torch.float32, dev='cpu', steps=25, shapes=SHAPES, n_groups=1, no_wd=(), schedule=True, late={},
        laid_out=False, seed=0, scale=1., which=(False,True)):
    "Train with fastai's optimizer and with ours on the same gradients; return both, with parameters as they came out"
    torch.manual_seed(seed)
    draw = partial(torch.randn, device=dev, dtype=dtype)
    start = layouts(dev, dtype) if laid_out else [(draw(s), lambda g: g.clone()) for s in shapes]
    for t,_ in start: t.mul_(scale)
    opts = [_started(case, jit, [t for t,_ in start], n_groups, no_wd) for jit in which]
    for i in range(steps):
        for n,(t,lay) in enumerate(start):
            if i < late.get(n, 0): continue
            g = lay(draw(t.shape))
            for opt,jit in zip(opts, which):
                opt.ps[n].grad = g if jit else g.clone(memory_format=torch.contiguous_format)
        for opt in opts:
            if schedule:
                opt.set_hyper('lr', [h['lr']*(1.1 if i < steps//2 else 0.9) for h in opt.hypers])
                opt.set_hyper('mom', 0.95 - 0.1*i/steps)
                opt.set_hyper('wd', 0.01 if i%5 else 0.)
            opt.step()
    return opts

def _started(case, jit, ts, n_groups, no_wd):
    "An optimizer of copies of `ts`: contiguous ones for fastai's, for ours laid out as they are"
    laid = lambda t: t.clone(memory_format=torch.preserve_format) if t.numel() in (0,1) else t
    ps = [nn.Parameter(laid(t) if jit else t.clone().contiguous()) for t in ts]
    groups = [ps[i::n_groups] for i in range(n_groups)] if n_groups > 1 else ps
    opt = case.make(groups, jit, lr=[0.01*2**-i for i in range(n_groups)] if n_groups > 1 else 0.01)
    for i in no_wd: opt.state[ps[i]]['do_wd'] = False
    opt.ps = ps
    return opt

SCENARIOS = dict(
    plain    = dict(schedule=False),
    schedule = dict(),
    groups   = dict(n_groups=3, no_wd=[1,4]),
    late     = dict(late={1:3, 4:9, 5:30}, no_wd=[2,5]),
    layouts  = dict(laid_out=True),
)

def truth_of(case, dev, given, **kw):
    "fastai's optimizer in float64, on what `run` feeds to the one in dtype `given`"
    real = torch.randn
    try:
        torch.randn = lambda *a,dtype,**k: real(*a, dtype=given, **k).double()
        return run(case, dtype=torch.float64, dev=dev, which=(False,), **kw)[0]
    finally: torch.randn = real
