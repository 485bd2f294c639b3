"Where tensors lie: shared memory is refused, gaps and layouts are not; steps need little scratch; nothing grows"
import copy,gc,weakref
from typing import List

import pytest
import torch
from torch import Tensor,nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastxtend_jit.step import jit_step
from fastxtend_jit.calls import peak_memory
from tests import engine
from tests.cases import *
from tests.support import cases,every,new_grads,parameters,params_of,refused,same_grads,slow_but,trained

SHARES = ('parameter 0 of group 1', 'shares its memory with parameter 0 of group 0')

# --- Parameters

@every
def test_parameter_twice(case):
    "One parameter in two groups would take two steps at once"
    p,q = parameters((3,), (3,))
    opt = case.make([[p,q],[p]], True)
    refused(opt, ValueError, 'parameter 0 of group 1', 'listed in two groups', 'one group only')

@every
def test_shared_memory(case):
    "Two parameters in one place: fastai lets each take its step there in turn"
    p,q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = case.make([[p],[q]], True)
    new_grads([p,q], 0)
    opt.step()
    new_grads([p,q], 1)
    q.data = p.data[:2]
    q.grad = torch.ones(2)
    refused(opt, ValueError, *SHARES, 'the same one')

class MyParameter(nn.Parameter): "A subclass"

@every
def test_subclass_of_parameter(case):
    "It is a parameter like any other: a kept graph runs backward again, and shared memory is found"
    p = MyParameter(torch.ones(3, dtype=torch.float64))
    opt = case.make([p], True)
    loss = (p**3).sum()
    for _ in range(3): loss.backward(retain_graph=True); opt.step()
    q = MyParameter(p.data)
    p.grad = q.grad = torch.ones(3, dtype=torch.float64)
    refused(case.make([p,q], True), ValueError, 'parameter 1 of group 0', 'shares its memory')

@every
@pytest.mark.parametrize('steps', [0,2])
def test_partial_overlap(case, steps):
    b = torch.randn(6,3)
    p,q = nn.Parameter(b[:2]),nn.Parameter(b[3:5])
    opt = case.make([[p],[q]], True)
    for _ in range(steps): new_grads([p,q]); opt.step()
    q.data = b[1:3]
    new_grads([p,q])
    refused(opt, ValueError, *SHARES)

@every
def test_columns_of_one_matrix(case):
    "Parameters may lie in each other's gaps"
    opts = []
    for jit in (False,True):
        torch.manual_seed(0)
        b = torch.randn(7, 3, dtype=torch.float64)
        ps = [nn.Parameter(b[:,i]) for i in range(3)]
        opt = case.make(ps, jit)
        for i in range(7): new_grads(ps, i); opt.step()
        opts.append(b)
    close(opts[1], opts[0], TOL[torch.float64])

def test_overlap_in_gaps():
    b = torch.randn(7,3)
    ps = [nn.Parameter(b[:,0]),nn.Parameter(b[:,1]),nn.Parameter(b[2:4,:2].t())]
    new_grads(ps)
    refused(EIGHT[0].make(ps, True), ValueError, 'parameter 2 of group 0', 'shares its memory with parameter 0')
    p = nn.Parameter(torch.randn(6).as_strided((3,3), (1,1)))
    p.grad = torch.ones(3,3)
    refused(EIGHT[0].make([p], True), ValueError, 'Elements of parameter 0', 'share memory')

@every
def test_other_size_in_place(case):
    "A parameter that became a smaller or larger part of the same memory, with its old gradient"
    memory = torch.ones(4,3)
    p = nn.Parameter(memory[:2])
    opt = case.make([p], True)
    p.grad = torch.ones(2,3)
    opt.step()
    for t in (memory,memory[:1]):
        p.data = t
        before = memory.clone()
        with pytest.raises(ValueError, match=r'gradient of parameter 0 of group 0 .*\[2, 3\]'): opt.step()
        assert torch.equal(memory, before)

def test_negative_parameter():
    p = nn.Parameter(torch._neg_view(torch.ones(3)))
    p.grad = torch.ones(3)
    refused(EIGHT[0].make([p], True), ValueError, 'parameter 0 of group 0', 'negates its memory')

@every
def test_kept_graph(case):
    """Autograd does not count what a step writes, as in fastai: a graph that was kept runs backward again

    And PyTorch may swap parameters"""
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

@every
def test_swapped_parameters(case):
    "A model that changes its dtype in training, with gradients, where PyTorch swaps tensors instead of their data"
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        models = [nn.Linear(3,2) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        opts = [case.make([*m.parameters()], jit) for m,jit in zip(models, (False,True))]
        for to in (nn.Module.float, nn.Module.double):
            for m,o in zip(models, opts):
                o.clear_state()
                to(m)
                for i in range(4): new_grads([*m.parameters()], i); o.step()
        for p,q in zip(*(m.parameters() for m in models)): close(q, p, 1e-5)
    finally: torch.__future__.set_swap_module_params_on_conversion(False)

@every
def test_shared_memory_in_turn(case):
    "What takes no step at present may lie where others step, or their gradients: as in fastai"
    opts = []
    for jit in (False,True):
        b = torch.linspace(-1, 1, 7, dtype=torch.float64)
        p,q,r = nn.Parameter(b[:4]),nn.Parameter(b[2:]),nn.Parameter(torch.ones(5, dtype=torch.float64))
        opts.append(case.make([[p,q],[r]], jit))
        for i in range(13):
            new_grads([p,q,r], i)
            (p,q)[i%2].grad = None
            if i%3 == 2: p.grad,q.grad,r.grad = None,None,q.data
            opts[-1].step()
    for p,q in zip(*map(params_of, opts)): close(q, p, 1e-11)
    for p in params_of(opts[1]): p.grad = torch.ones_like(p)
    refused(opts[1], ValueError, 'parameter 1 of group 0', 'shares its memory with parameter 0 of group 0')

# --- State

@every
def test_state_turned_in_place(case):
    opts = [trained(case, 3) for _ in range(2)]
    for st in opts[1].state.values():
        for k,v in st.items():
            # the same values, in another order in memory
            if isinstance(v, Tensor) and v.shape == (2,2): v.t_(); st[k].copy_(v.t().clone())
    for i in range(3):
        same_grads(opts, i)
        for o in opts: o.step()
    for p,q in zip(*map(params_of, opts)): assert torch.equal(p, q)

@pytest.mark.parametrize('case', [c for c in ALL if c.jit is not ranger_jit], ids=str)
def test_shared_state(case):
    opt = trained(case, 2)
    (p,q),_ = opt.param_lists
    q.data,q.grad = torch.ones_like(p),torch.ones_like(p)
    name = opt.state_names[0]
    def copied(but=None):
        return {k:v.clone() if isinstance(v, Tensor) and k != but else v for k,v in opt.state[p].items()}
    both = 'parameter 1 of group 0', 'parameter 0 of group 0'
    opt.state[q] = copied(name)
    if len(opt.steps) > 1: return refused(opt, ValueError, both[0], 'its state is of another step')  # `q` was no matrix
    refused(opt, ValueError, f'state `{name}`', 'shares its memory with', *both)
    opt.state[q] = opt.state[p]
    refused(opt, ValueError, *both, 'one and the same dict')
    opt.state[q] = copied()
    opt.step()

def test_shared_empty_state():
    opt = trained(EIGHT[2], 0)
    p,q,*_ = params_of(opt)
    opt.state[p] = opt.state[q] = {}
    with pytest.raises(ValueError, match='one and the same dict'): opt.step()

# --- Gradients

@every
def test_data_of_the_same_gradient(case):
    "Another dtype or memory under the very gradient that was there before"
    opt = trained(case, 4)
    p = opt.param_lists[1][0]
    g = p.grad
    for _ in range(4): opt.step()
    old,g.data = g.data,g.data.float()
    refused(opt, ValueError, 'gradient of parameter 0 of group 1', 'torch.float32')
    g.data = p.data
    refused(opt, ValueError, 'gradient of parameter 0 of group 1', 'lies in the memory')
    g.data = old
    opt.step()

@every
@pytest.mark.parametrize('steps', [0,2])
def test_gradient_in_written_memory(case, steps):
    opt = trained(case, steps)
    (p,q),(r,) = opt.param_lists
    first = 'gradient of parameter 0 of group 0'
    for what,g in dict(itself=p.data, turned=p.data.view(4,3).t().t().view(3,4), other=torch.empty_like(p)).items():
        old,p.grad = p.grad,g
        if what == 'other':
            p.grad,r.data = old,torch.ones(20, dtype=torch.float64)[3:7].view(2,2)
            mine,r.grad = r.grad,r.data._base[5:9].view(2,2) if r.data._base is not None else r.data.view(2,2)
            refused(opt, ValueError, 'gradient of parameter 0 of group 1', 'clone()')
            r.grad = mine
        else: refused(opt, ValueError, first, 'lies in the memory of parameter 0 of group 0', 'clone()')
        p.grad = old
    opt.step()
    tensors = [(n,v) for n,v in opt.state[p].items() if isinstance(v, Tensor) and v.shape == p.shape]
    for n,v in tensors:
        old,p.grad = p.grad,v
        refused(opt, ValueError, first, f'state `{n}`')
        p.grad = old
    opt.step()

@every
def test_negative_gradients(case):
    "They negate their memory as they are read"
    opts = [trained(case, 1) for _ in range(2)]
    for i in range(4):
        same_grads(opts, i)
        for q in params_of(opts[1]):
            g = q.grad
            if i in (1,2): q.grad = torch._neg_view(-g); assert q.grad.is_neg()
        for o in opts: o.step()
    for p,q in zip(*map(params_of, opts)): assert torch.equal(p, q)
    p = opts[1].param_lists[1][0]
    same_grads(opts, 1)
    for o in opts: o.step()
    p.grad = torch._neg_view(p.grad)  # the same memory, and now the other way round
    opts[0].param_lists[1][0].grad.neg_()
    for o in opts: o.step()
    assert torch.equal(p, opts[0].param_lists[1][0])

@every
@pytest.mark.parametrize('forget', ['clear_state','load_state_dict','zero_grad to None'])
def test_lets_go(case, forget):
    "What the optimizer no longer needs is freed at once: averages and slow weights, gradients"
    opt = trained(case, 7)
    sd,state = copy.deepcopy(opt.state_dict()),[v for st in opt.state.values() for v in st.values()]
    old = [weakref.ref(t) for t in [*state, *slow(opt)] if isinstance(t, torch.Tensor)]
    if 'grad' in forget:
        old = [weakref.ref(p.grad) for p in params_of(opt)]
        for p in params_of(opt): p.grad = None
    elif forget == 'clear_state': opt.clear_state()
    else: opt.load_state_dict(sd)
    del state
    gc.collect()
    assert old and not any(r() is not None for r in old)

@pytest.mark.parametrize('case', ALL+TWO_AHEAD, ids=str)
@pytest.mark.parametrize('uses', [0,500])  # as plain Python, and compiled
def test_model_takes_its_memory_along(case, uses):
    "A model that moves, to another device or dtype, leaves nothing behind: tensors in one piece, in pieces, flattened"
    m = nn.Sequential(nn.Linear(700,700), nn.Conv2d(8,8,3).to(memory_format=torch.channels_last))
    opt,ps = case.make([*m.parameters()], True),[*m.parameters()]
    for s in opt.steps: s.uses = max(s.uses, uses)
    for i in range(3): new_grads(ps, i); opt.step()
    for p in ps: p.grad = None
    left = [StorageWeakRef(p.untyped_storage()) for p in ps]
    m.half()
    assert all(o.expired() for o in left)

# --- How much

FIVE = [(), (7,), (4,3), (6,5), (3,)],(2,1,2),torch.float32

@every
def test_nothing_grows(case):
    "96 steps with changing sets of gradients, new gradients, new memory, new hypers"
    opt = trained(case, 0, *FIVE)
    ps = params_of(opt)
    def counts():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects()),len(gc.get_objects())
    def play(n):
        for i in range(n):
            for j,p in enumerate(ps): p.grad = None if (i>>j)&1 else torch.randn_like(p)
            if i%7 == 0: ps[i%5].data = ps[i%5].data.clone()
            if i%32 == 0: opt.clear_state()
            opt.set_hyper('lr', 0.01/(i+1))
            opt.step()
            opt.zero_grad()
        new_grads(ps)
        opt.step()
        return counts()
    (tensors,objects),(tensors2,objects2) = play(32),play(64)
    assert tensors2 == tensors and objects2 <= objects+20

@pytest.mark.parametrize('case', slow_but([c for c in CASES if c.kw['decouple_wd']], CASES), ids=str)
@pytest.mark.parametrize('relay', slow_but([True], [False,True]))
def test_scratch(case, relay, monkeypatch):
    "Steps allocate a few batches' memory at most, however gradients lie: this is `tests.tools.memory` in small"
    engine.use_batches_of(monkeypatch, 2**13)
    ps = [nn.Parameter(torch.randn(64,128)) for _ in range(40)]
    opt = case.make(ps, True)
    for i in range(8):
        for p in ps: p.grad = torch.randn(128,64).t() if relay else torch.randn(64,128)
        if i in (2,3,4): opt.step(); continue
        cpu = torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[cpu], profile_memory=True) as prof: opt.step()
        now = peak = 0
        events = [e for e in prof.profiler.kineto_results.events() if e.name() == '[memory]']
        for e in sorted(events, key=lambda e: e.start_ns()):
            now += e.nbytes()
            peak = max(peak, now)
        if i == 0: peak -= now  # state
        assert peak <= 8*2**13*4, f'{peak/2**15} batches at step {i}'

@cases
def test_channels_last(case):
    """Tensors in `channels_last` format cost no more memory than others

    ATen's fused kernels, given such a gradient, would copy it"""
    def peak(fmt):
        ps = [nn.Parameter(torch.randn(32,16,3,3).to(memory_format=fmt)) for _ in range(5)]
        opt = case.make(ps, True)
        new_grads(ps)
        for _ in range(6): opt.step()  # RAdam rectifies, Lookahead looks ahead
        return [peak_memory(opt.step) for _ in range(6)]
    assert peak(torch.channels_last) == peak(torch.contiguous_format)

def late_list(params:List[Tensor], grads:List[Tensor], step:int, lr:float):
    if step > 9: grads = torch._foreach_mul(grads, 0.5)
    torch._foreach_add_(params, grads, alpha=-lr)

def test_scratch_of_own_step(monkeypatch):
    "It gets batches, as nobody knows whether it allocates later"
    engine.use_batches_of(monkeypatch, 2**10)
    ps = [nn.Parameter(torch.randn(2**12)) for _ in range(8)]
    opt = JitOptimizer(ps, jit_step(late_list, elementwise=True), lr=0.1)
    for i in range(10): new_grads(ps, i); opt.step()
    assert peak_memory(opt.step) < 3*2**12
