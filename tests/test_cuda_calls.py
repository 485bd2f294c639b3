"CUDA without a GPU: on fake tensors, count the ATen calls of a step and find where the host would wait for the device"
from collections import Counter
from contextlib import nullcontext
from functools import cache
from typing import List

import pandas as pd
import pytest
import torch
from torch import Tensor,nn
from torch._subclasses.fake_tensor import FakeTensorMode,unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from fastai.vision.models.xresnet import xresnet50

from tests.cases import *

@cache
def _about(func): return func._schema.name,func.is_view,bool(func._schema.returns)

class Calls(TorchDispatchMode):
    "The ATen calls that arrive at the dispatcher, but views, which launch nothing; and in `waits` those for which the host waits for the device"
    def __init__(self, device): super().__init__(); self.device,self.calls,self.waits = device,Counter(),Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name,is_view,returns = _about(func)
        if name.startswith('prim::'): return func(*args, **(kwargs or {}))  # where is a fake tensor? Real ones know without a call
        if not is_view: self.calls[name] += 1
        if name == 'aten::_local_scalar_dense': self.waits[name] += 1; return 1  # item(), bool(), float(): go on with any number
        # What returns nothing works in place on lists: there is nothing to fake (and `_fused_sgd_` has no fake version)
        res = func(*args, **(kwargs or {})) if returns else None
        # To another device the host copies, and waits
        if {t.device.type for t in tree_leaves((args, kwargs, res)) if isinstance(t, Tensor)} - {self.device}: self.waits[name] += 1
        return res

@pytest.fixture
def fake_cuda(request, monkeypatch):
    "A GPU that is not there, with or without fused kernels"
    monkeypatch.setattr('fastxtend_jit.plan.has_fused', lambda *_: request.param == 'fused')
    fuser = torch._C._jit_texpr_fuser_enabled()
    torch._C._jit_set_texpr_fuser_enabled(False)  # it would compile for the GPU
    with FakeTensorMode(): yield
    torch._C._jit_set_texpr_fuser_enabled(fuser)

paths = pytest.mark.parametrize('fake_cuda', ['fused','foreach'], indirect=True)
both  = pytest.mark.parametrize('case,fake_cuda', [*((c,'fused') for c in CASES), *((c,'foreach') for c in EIGHT)], ids=str, indirect=['fake_cuda'])

def with_grads(shapes, device='cuda'):
    ps = [nn.Parameter(torch.empty(s, device=device)) for s in shapes]
    for p in ps: p.grad = torch.empty_like(p)
    return ps

def count(opt, steps=1, device='cuda'):
    "Calls and waits of the next `steps` steps, with other hypers at each"
    res = []
    for i in range(steps):
        opt.set_hypers(lr=0.1/(i+1), mom=0.9+i/1000)
        with Calls(device) as c: opt.step()
        res.append((c.calls.total(), c.waits.total()))
    return res

def per_tensor(case):
    "Calls that a step needs for each tensor: LAMB's scratch"
    return case.jit is lamb_jit

@both
def test_calls(case, fake_cuda):
    "No step waits, and none has more calls for more tensors: RAdam before and after it rectifies, Ranger with lookaheads"
    few,many = [count(case.make(with_grads([(4,3)]*n), True), 8)[1:] for n in (2,5)]  # the first step allocates
    assert not any(w for _,w in few+many)
    for (a,_),(b,_) in zip(few,many): assert b-a == 3*per_tensor(case) and a <= 25 + 2*per_tensor(case)
    if case.jit in (radam_jit,ranger_jit): assert len({*few}) > 1  # it went through its phases

@pytest.mark.parametrize('case', EIGHT, ids=str)
@paths
def test_buckets(case, fake_cuda):
    "Parameters without decay, as a Learner's batchnorms, are one call more"
    ps = with_grads([(4,3)]*6)
    one,two = case.make(ps, True),case.make(ps, True)
    for p in ps[::2]: two.state[p]['do_wd'] = False
    (_,(a,_)),(_,(b,_)) = count(one, 2),count(two, 2)
    assert a < b <= 2*a

@pytest.mark.parametrize('fake_cuda', ['fused'], indirect=True)
def test_zero_grad(fake_cuda):
    opt = EIGHT[0].make(with_grads([(4,3)]*6), True)
    with Calls('cuda') as c: opt.zero_grad()
    assert c.calls == {'aten::_foreach_zero_':1}

def item_step(params:List[Tensor], grads:List[Tensor], lr:float): params[0].mul_(1 - lr*float(grads[0].sum().item()))
def bool_step(params:List[Tensor], grads:List[Tensor], lr:float):
    if bool(grads[0].sum() > 0): torch._foreach_add_(params, grads, alpha=-lr)
def made_step(params:List[Tensor], grads:List[Tensor], lr:float): torch._foreach_mul_(params, torch.full([], lr, dtype=torch.float64))

@pytest.mark.parametrize('step', [item_step,bool_step,made_step], ids=lambda f: f.__name__)
@paths
def test_waits_are_seen(step, fake_cuda): assert count(JitOptimizer(with_grads([(4,3)]*2), step, lr=0.1))[0][1]

@pytest.mark.parametrize('fake_cuda', ['fused'], indirect=True)
def test_table(record_property, fake_cuda):
    "What fastai and ours need for xresnet50, printed below the other results"
    with unset_fake_temporarily(),torch.device('meta'): shapes = [p.shape for p in xresnet50().parameters()]
    assert len(shapes) == 167
    rows = {}
    for case,phase in [*((c,'') for c in EIGHT), (EIGHT[-1],', lookahead')]:
        row = rows[case.native.__name__+phase] = []
        for jit,device in ((False,'meta'),(True,'cuda')):  # what fastai calls is the same everywhere, and counted faster on `meta`
            with nullcontext() if jit else unset_fake_temporarily():
                opt = case.make(with_grads(shapes, device), jit)
                for p in opt.all_params().itemgot(0): opt.state[p] = dict(step=100, grad_avg=torch.empty_like(p), sqr_avg=torch.empty_like(p))
                if case.native is ranger: count(opt, device=device)  # allocates slow weights
                opt.count = 5 if phase else 1
                row += count(opt, device=device)[0]
    df = pd.DataFrame(rows, index=['fastai: calls','fastai: waits','ours: calls','ours: waits']).T
    record_property('show', f"ATen calls of a step on CUDA, and waits for the device: xresnet50, {len(shapes)} tensors (counted on fake tensors)\n{df}")
    assert (df['ours: waits'] == 0).all()
    assert (df['ours: calls'] < df['fastai: calls']/3).all()
