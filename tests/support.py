"What tests of several themes use: made parameters and gradients, snapshots, faults and how to mend them, counts"
import sys
from copy import deepcopy

import pytest
import torch
from fastcore.foundation import L
from torch import Tensor,nn

from tests.cases import ALL,CASES,EIGHT,ranger_jit,slow

every = pytest.mark.parametrize('case', ALL, ids=str)    # each optimizer once
eight = pytest.mark.parametrize('case', EIGHT, ids=str)  # those that fastai has
cases = pytest.mark.parametrize('case', CASES, ids=str)  # in all forms

def slow_but(quick, values):
    "`values` for `parametrize`, marked slow but for those that are in `quick`"
    def param(v): return pytest.param(*(v if isinstance(v, tuple) else [v]), marks=[pytest.mark.slow]*(v not in quick))
    return [*map(param, values)]

# --- Parameters and gradients

def params_of(opt):
    "Parameters of all groups, one after the other"
    return [p for pg in opt.param_lists for p in pg]

def new_grads(ps, seed=None):
    "Gradients of their own for parameters"
    if seed is not None: torch.manual_seed(seed)
    for p in ps: p.grad = torch.randn_like(p)

def same_grads(opts, seed):
    "The same new gradients for the parameters of all optimizers"
    for opt in opts: new_grads(params_of(opt), seed)

def parameters(*shapes, dtype=torch.float32, seed=0):
    "Parameters with gradients"
    torch.manual_seed(seed)
    ps = [nn.Parameter(torch.randn(s, dtype=dtype)) for s in shapes]
    new_grads(ps)
    return ps

def split(ts, sizes):
    "Lists of `sizes` of the items of `ts`, in their order"
    it = iter(ts)
    return [[next(it) for _ in range(n)] for n in sizes]

# --- Optimizers on their way

def trained(case, steps, shapes=((3,4),(5,),(2,2)), sizes=(2,1), dtype=torch.float64):
    """An optimizer of ours that has taken `steps` steps, with gradients for the next; Ranger looks ahead at each second

    Each group has a learning rate of its own, so that they step apart"""
    ps,lrs = parameters(*shapes, dtype=dtype),[0.01/(i+1) for i in range(len(sizes))]
    opt = case.make(split(ps, sizes), True, lr=lrs, **dict(k=2) if case.jit is ranger_jit else {})
    for i in range(steps): new_grads(ps, i); opt.step()
    new_grads(ps, 99)
    return opt

def train(opts, seeds):
    "A step of each for each seed, with the same gradients, at a falling learning rate"
    for s in seeds:
        same_grads(opts, s)
        for o in opts: o.set_hyper('lr', 0.1/(s+1)); o.step()

def twins(case, steps):
    "Two equal optimizers that have taken `steps` steps and have gradients for the next"
    opts = [case.make(split(parameters((3,4), (5,), (2,6), (4,)), (2,2)), True) for _ in range(2)]
    train(opts, range(steps))
    same_grads(opts, 99)
    return opts

def regroup(opt, sizes, hypers):
    "Deal out the parameters anew, in their order"
    ahead,opt = opt,getattr(opt, 'opt', opt)  # fastai's Lookahead has an optimizer inside
    opt.param_lists = L(map(L, split(params_of(opt), sizes)))
    opt.hypers = L({**opt.hypers[0], **h} for h in hypers)
    # it would pair them with other parameters, or with none
    if ahead is not opt and ahead.slow_weights: ahead.slow_weights = L(map(L, split(slow(ahead), sizes)))

# --- Snapshots

def snapshot(opt):
    "A copy of all that a step or a load may change"
    ps,ahead = params_of(opt),getattr(opt, 'slow_weights', None)
    return deepcopy(dict(params=[p.detach() for p in ps], grads=[p.grad for p in ps],
                         state=[dict(opt.state[p]) for p in ps], hypers=[dict(sorted(h.items())) for h in opt.hypers],
                         count=getattr(opt, 'count', None), slow=ahead and [list(s) for s in ahead],
                         frozen=opt.frozen_idx))

def same(a, b):
    "Are two nests of dicts, lists and tensors equal in every type, in order and in every bit?"
    if type(a) is not type(b): return False
    if isinstance(a, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device or a.is_sparse != b.is_sparse: return False
        def comparable(t):  # PyTorch 2.4 compares no floats of 8 bits
            return t.to_dense() if t.is_sparse else t.view(torch.uint8) if t.dtype.itemsize == 1 else t
        return a.is_meta or torch.equal(comparable(a), comparable(b))
    if isinstance(a, dict): return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list,tuple,L)): return len(a) == len(b) and all(map(same, a, b))
    return a == b

def _tensors(opt):
    "Every tensor that belongs to `opt`, by name, in an order of its own"
    ps,grad = params_of(opt),Tensor.grad.__get__
    state = {(k,i):v for i,p in enumerate(ps) for k,v in opt.state.get(p, {}).items() if isinstance(v, Tensor)}
    return {**{('param',i):p for i,p in enumerate(ps)}, **{('grad',i):grad(p) for i,p in enumerate(ps)},
            **{('slow',i):s for i,s in enumerate(slow(opt))}, **state}

def fingerprint(opt):
    "All there is to `opt`, to be compared: which tensors, where and how they lie, their bytes, and all that counts"
    def of(t): return id(t),t.data_ptr(),t.stride(),t.detach().contiguous().view(-1).view(torch.uint8).tolist()
    rest = [{k:v for k,v in opt.state.get(p, {}).items() if not isinstance(v, Tensor)} for p in params_of(opt)]
    return ({k:of(t) for k,t in _tensors(opt).items()}, rest, [{**h} for h in opt.hypers], opt.frozen_idx,
            getattr(opt, 'count', 0), getattr(opt, 'slow_weights', None) is None)

def refused(opt, err, *parts):
    "The step is refused, with these words, and has changed nothing"
    before = snapshot(opt)
    with pytest.raises(err) as e: opt.step()
    for o in parts: assert o in str(e.value)
    assert same(snapshot(opt), before)

# --- Faults, and how to mend them

def replace(p, t):
    "Another tensor for `p`, and how to undo it"
    old,p.data = p.data,t
    def mend(): p.data = old
    return mend

def put(d, k, v):
    "Another value for `d[k]`, and how to undo it"
    old,d[k] = d.get(k),v
    def mend():
        if old is None: del d[k]
        else: d[k] = old
    return mend

class Interrupt(BaseException): "Like KeyboardInterrupt, nothing that `except Exception` catches"

class Trap:
    "Raises `what` at the `n`-th call, and passes all others on to `fn`"
    def __init__(self, fn, n, what): self.fn,self.n,self.what = fn,n,what
    def __call__(self, *args, **kw):
        self.n -= 1
        if self.n == 0: raise self.what
        return self.fn(*args, **kw)

# --- Counts

def python_calls(f, of=None):
    "How many functions are called while `f` runs, in Python and in C; with `of`, how often that Python function is"
    n,code = 0,of and of.__code__
    def count(frame, event, arg):
        nonlocal n
        if code is None: n += event in ('call','c_call')
        elif event == 'call' and frame.f_code is code: n += 1
    old = sys.getprofile()
    sys.setprofile(count)
    try: f()
    finally: sys.setprofile(old)
    return n
