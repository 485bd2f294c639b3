"Sets of gradients that change, and groups that share a call while their hypers are equal: numbers, and what is kept"
import gc
import random
from weakref import ref

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector,vector_to_parameters
from torch._subclasses.fake_tensor import FakeTensorMode

from fastxtend_jit.bench import patterns
from fastxtend_jit.calls import aten_calls
from fastxtend_jit.launches import Launches
from fastxtend_jit.step import jit_step
from tests import engine
from tests.cases import *
from tests.support import every,new_grads,parameters,params_of,python_calls,refused,slow_but,split
from tests.tools.launches import with_grads

SHAPES = [(3,4),(5,),(),(7,2),(64,),(2,3,3,3)]*4

def _pair(case, n_groups=4, dtype=torch.float64):
    "fastai's optimizer and ours, over equal parameters in groups"
    opts = []
    for jit in (False,True):
        ps = parameters(*SHAPES, dtype=dtype)
        opts.append(case.make([ps[i::n_groups] for i in range(n_groups)], jit))
        opts[-1].ps = ps
    return opts

def _train(opts, steps, before, seed=0):
    "Steps of all optimizers; `before(opt, i, rng)` sets what each finds, whose parameters have new gradients"
    for i in range(steps):
        for o in opts:
            new_grads(o.ps, seed+i)
            before(o, i, random.Random(seed+i))
            o.step()

def _same(opts, tol=TOL[torch.float64]):
    for p,q in zip(*(o.ps for o in opts)): close(q, p, tol)
    same_state(opts[1], opts[0], tol)

def _keep(have):
    "Parameters `k` for which `have(k, i, rng)` is false have no gradient at step `i`"
    def before(opt, i, rng):
        for k,p in enumerate(opt.ps):
            if not have(k, i, rng): p.grad = None
    return before

def _rates(opt, i, rng):
    "Groups' learning rates part, and come together in other ways"
    opt.set_hyper('lr', [0.01*(1 + k*i%3) for k in range(len(opt.hypers))])

def _random(opt, i, rng):
    "All at once"
    _keep(lambda k,i,rng: rng.random() < 0.6)(opt, i, rng)
    for n,values in dict(lr=(0.01,0.02), wd=(0.,0.1), mom=(0.85,0.9)).items():
        if n in opt.hypers[0]: opt.set_hyper(n, [rng.choice(values) for _ in opt.hypers])
    for p in opt.ps:
        if rng.random() < 0.1: opt.state[p]['do_wd'] = rng.random() < 0.5
    if i%5 == 2: opt.ps[5].grad = torch.ones_like(opt.ps[5]).contiguous(memory_format=torch.channels_last)

def _copied(st): return {n: v.clone() if isinstance(v, torch.Tensor) else v for n,v in st.items()}

def _moved(opt, i, rng):
    "Parameters lie elsewhere: one, all, two that swap, one that comes back later; some have no gradient at the time"
    if i%2: _keep(lambda k,i,rng: k%3)(opt, i, rng)
    one,other = rng.sample([*range(0, len(SHAPES), 6)], 2)
    p,q = (opt.ps[k] for k in (one,other))
    if i%5 == 0: vector_to_parameters(parameters_to_vector(opt.ps).detach(), opt.ps)
    elif i%5 == 1: p.data = p.data.clone()
    elif i%5 == 2:
        values = p.data.clone(),q.data.clone()
        p.data,q.data = q.data,p.data
        for t,v in zip((p.data,q.data), values): t.copy_(v)
    elif i%5 == 3: opt.was = p,p.data; p.data = p.data.clone()
    else: p,data = opt.was; data.copy_(p.data); p.data = data

def _state(opt, i, rng):
    "State is copied, taken away, stored in another dict, its values are set; some of it has no gradient at the time"
    if i%2: _keep(lambda k,i,rng: rng.random() < 0.7)(opt, i, rng)
    for k in rng.sample(range(len(SHAPES)), 4):
        p,st = opt.ps[k],opt.state[opt.ps[k]]
        what = rng.randrange(5)
        if what == 0: opt.state[p] = _copied(st)
        elif what == 1: opt.state.pop(p)
        elif what == 2: st.clear()
        elif what == 3: opt.state[p] = {**st}
        elif st.get('step'): st['step'] += 2

SETS = dict(halves=_keep(lambda k,i,rng: k%2 == i%2), thirds=_keep(lambda k,i,rng: rng.random() < 2/3),
            thawed=_keep(lambda k,i,rng: k >= 24 - 2*i), none=_keep(lambda k,i,rng: i%3 > 0), rates=_rates,
            random=_random, moved=_moved, state=_state)

@pytest.mark.parametrize('what', SETS)
@pytest.mark.parametrize('case', slow_but(ALL+TWO_AHEAD, ALL+TWO_AHEAD+CASES), ids=str)
def test_numbers(case, what):
    opts = _pair(case)
    _train(opts, 25, SETS[what])
    _same(opts)

@pytest.mark.parametrize('what', SETS)
def test_own_number_for_each_parameter(what):
    "State that is one number for each parameter, read and written, under sets that change"
    def step(params:list[torch.Tensor], grads:list[torch.Tensor], taken:torch.Tensor, lr:float):
        taken += 1.
        torch._foreach_sub_(params, torch._foreach_mul(grads, taken.mul(lr).unbind()))
    ps = parameters(*SHAPES, dtype=torch.float64)
    qs,taken = [p.detach().clone() for p in ps],[0]*len(ps)
    opt = JitOptimizer(split(ps, (10,14)), step, lr=0.1)
    opt.ps = ps
    for i in range(20):
        new_grads(ps, i)
        if what != 'rates': SETS[what](opt, i, random.Random(i))
        taken = [n if opt.state.get(p) else 0 for p,n in zip(ps, taken)]
        opt.set_hyper('lr', 0.1)
        opt.step()
        for k,(p,q) in enumerate(zip(ps, qs)):
            if p.grad is None: continue
            taken[k] += 1
            q -= 0.1*taken[k]*p.grad
    for p,q,n in zip(ps, qs, taken):
        close(p, q, TOL[torch.float64])
        assert n == 0 or opt.state[p]['taken'].item() == n

def _plans_made(monkeypatch):
    "A list that gets an item for each choice of who steps together"
    made,plan = [],engine.plan.Plan
    monkeypatch.setattr(engine.plan, 'Plan', lambda *args: made.append(1) or plan(*args))
    return made

@every
def test_sets_that_come_back(case, monkeypatch):
    "They are chosen once, when all have had a gradient, and looked at no more"
    made,opt = _plans_made(monkeypatch),_pair(case)[1]
    _train([opt], 3, SETS['halves'])
    roster,n = engine.roster_of(opt),len(made)
    _train([opt], 8, SETS['halves'], seed=3)
    assert len(made) == n and engine.roster_of(opt) is roster

@every
def test_sets_that_do_not_come_back(case, monkeypatch):
    "All parameters are looked at once, and no more than some choices are kept"
    opt = _pair(case)[1]
    engine.keep_few_plans(monkeypatch)
    _train([opt], 1, lambda *_: None)
    roster = engine.roster_of(opt)
    _train([opt], 60, SETS['thirds'])
    assert engine.roster_of(opt) is roster and engine.number_of_plans(opt) == 16

@every
def test_parameters_that_move(case, monkeypatch):
    "Nothing else is looked at anew, neither for one nor for all"
    opt = _pair(case)[1]
    _train([opt], 4, SETS['halves'])
    made,roster = _plans_made(monkeypatch),engine.roster_of(opt)
    for ps in (opt.ps[:1],opt.ps):
        for p in ps: p.data = p.data.clone()
        _train([opt], 2, SETS['halves'], seed=4)
    assert not made and engine.roster_of(opt) is roster

@every
def test_state_that_is_replaced(case):
    "It is used from then on, the old one is freed, and no other is looked at, unless all have a number each"
    opt = _pair(case)[1]
    _train([opt], 2, lambda *_: None)
    p,slots = opt.ps[4],engine.slots_of(opt)
    st,index = opt.state[p],next(i for i,s in slots.items() if s.param is p)
    old = [ref(t) for t in st.values() if isinstance(t, torch.Tensor)]
    opt.state[p] = _copied(st)
    del st
    _train([opt], 1, lambda *_: None)
    new = {i for i,s in engine.slots_of(opt).items() if s is not slots[i]}
    assert new == ({*slots} if opt.opt_step.scalar_state else {index})
    del slots
    assert not any(o() is not None for o in old)

@every
def test_state_taken_from_the_idle(case):
    "Once another set takes a step, its memory is free"
    opt = _pair(case)[1]
    _train([opt], 2, SETS['halves'])
    old = [ref(t) for p in opt.ps[1::2] for t in opt.state[p].values() if isinstance(t, torch.Tensor)]
    for p in opt.ps[1::4]: del opt.state[p]
    for p in opt.ps[3::4]: opt.state[p] = _copied(opt.state[p])
    _train([opt], 1, _keep(lambda k,i,rng: k%2 == 0))
    assert not any(o() is not None for o in old)

@every
def test_state_replaced_within_its_dict(case):
    "Of the idle, as where it is moved to another device: its memory is free in a few steps"
    opt = _pair(case)[1]
    _train([opt], 3, SETS['halves'])
    idle = [(opt.state[p],n) for p in opt.ps[1::2] for n,v in opt.state[p].items() if isinstance(v, torch.Tensor)]
    old = [ref(st[n]) for st,n in idle]
    for st,n in idle: st[n] = st[n].clone()
    _train([opt], 16, _keep(lambda k,i,rng: k%2 == 0))
    assert old and not any(o() is not None for o in old)

@every
def test_few_of_many(case):
    "A step of two parameters calls no more functions where many more have been trained"
    def calls(n):
        ps = parameters(*[(4,)]*n)
        opt = case.make(ps, True)
        new_grads(ps)
        opt.step()
        for p in ps[2:]: p.grad = None
        for _ in range(30): opt.step()
        return python_calls(opt.step)
    few,many = calls(10),calls(400)
    assert many < 1.2*few + 2*400  # that there is none is asked for each

def test_memory_after_a_move():
    "Parameters that move are kept apart, also from gradients; what they have left is free"
    ps = parameters((4,), (4,), (4,))
    opt = adam_jit(ps, lr=0.1)
    def grads(): new_grads(ps); return [p.grad for p in ps]
    for _ in range(2): grads(); opt.step()
    both,left = torch.ones(8),ps[0].data
    ps[0].data = both[:4]
    grads(); opt.step()
    ps[1].grad = left  # nobody's by now
    opt.step()
    ps[1].grad = both[2:6]
    refused(opt, ValueError, 'gradient of parameter 1', 'lies in the memory of parameter 0')
    grads()
    ps[2].data = both[3:7]
    refused(opt, ValueError, 'parameter 2', 'shares its memory with parameter 0')
    ps[2].grad = None  # takes no step
    opt.step()
    ps[2].data,ps[2].grad = both[4:],torch.ones(4)
    opt.step()
    ps[0].data = ps[1].grad.data  # which was its own so far
    refused(opt, ValueError, 'gradient of parameter 1', 'lies in the memory of parameter 0')

def test_memory_moved_and_back():
    "While another set takes a step: what is known of the address in between is void"
    def steps(opt, *sets):
        for s in sets:
            for i,p in enumerate(ps): p.grad = torch.ones_like(p) if i in s else None
            if s is not sets[-1]: opt.step()
    for both in (True,False):
        p,q = ps = parameters((4,), (4,))
        opt = adam_jit(ps, lr=0.1)
        steps(opt, {0,1}, {0}, {1}, {0,1}, {0}, {0})
        here,p.data = p.data,p.data.clone()
        opt.step()
        if both: q.data = here; steps(opt, {1}, {0,1})
        else: steps(opt, {0,1}); q.grad = here
        p.data = here
        refused(opt, ValueError, 'memory of' if not both else 'shares its memory', 'parameter 0')

@every
def test_idle_parameter_laid_out_anew(case):
    "While another gets its first gradient"
    opts = []
    for jit in (False,True):
        ps = parameters(*[(3,4)]*3, dtype=torch.float64)
        opts.append(case.make(ps, jit))
        opts[-1].ps = ps
    def before(opt, i, rng):
        for k,p in enumerate(opt.ps):
            if k not in ({1,2} if i == 2 else {0,1}): p.grad = None
        if i == 2: opt.ps[0].data = opt.ps[0].data.t().contiguous().t()
    _train(opts, 5, before)
    _same(opts)

def test_gradients_where_idle_parameters_were():
    "They cost little more than elsewhere, not a look at all parameters at each step"
    ps,memory = parameters(*[(4,)]*200),torch.ones(2,100,4)
    for p,t in zip(ps[100:], memory[0]): p.data = t
    opt = adam_jit(ps, lr=0.1)
    new_grads(ps)
    opt.step()
    for p in ps[100:]: p.grad,p.data = None,p.data.clone()
    def calls(there):
        for p,t in zip(ps, there): p.grad = t
        return python_calls(opt.step)
    for _ in range(2): calls(memory[1])
    assert calls(memory[0]) < 4*calls(memory[1].clone())

@every
def test_cost_of_a_new_set(case):
    "Python's work for a parameter of a set that was not there before, next to making a new optimizer's first step"
    opt = _pair(case)[1]
    _train([opt], 2, lambda *_: None)
    for o in opt.ps[::3]: o.grad = None
    some = python_calls(opt.step)
    opt.clear_state()
    assert some < python_calls(opt.step)/3

@every
def test_dies_at_once(case):
    "No cycle of references keeps an optimizer's memory until Python looks for garbage"
    opt = _pair(case)[1]
    _train([opt], 3, SETS['halves'])
    gone,params = [ref(t) for st in opt.state.values() for t in st.values() if isinstance(t, torch.Tensor)],opt.ps
    gc.disable()
    try:
        del opt
        assert not any(o() is not None for o in gone)
    finally: gc.enable()
    assert len(params) == len(SHAPES)

# --- Many groups

def _grouped(case, n_groups, n=60, distinct=1, **kw):
    "An optimizer over `n` parameters in groups, with so many different learning rates"
    ps = parameters(*[(4,)]*n)
    lrs = [0.01*(1 + i%distinct) for i in range(n_groups)]
    return case.make([ps[i::n_groups] for i in range(n_groups)], True, lr=lrs if n_groups > 1 else lrs[0], **kw)

@every
def test_equal_groups_are_one(case):
    one,many = _grouped(case, 1),_grouped(case, 20)
    for o in (one,many): o.step()
    assert aten_calls(one.step) == aten_calls(many.step) and len(engine.buckets_of(many)) == 1
    assert many.explain()['group'].tolist()[:1] == ['0-19']

@every
def test_groups_that_differ(case):
    "As many calls as there are different hypers, however many groups"
    few,many = _grouped(case, 3, distinct=3),_grouped(case, 20, distinct=3)
    for o in (few,many): o.step()
    assert len(engine.buckets_of(many)) == 3 and aten_calls(few.step) == aten_calls(many.step)

@every
def test_groups_that_differ_in_one_call(case, monkeypatch):
    "Once steps are compiled, buckets that differ in scalars only run in one call, in pieces too, with fastai's numbers"
    engine.set_compile_after(0, monkeypatch)
    for size in (2**21,10):
        engine.use_batches_of(monkeypatch, size)
        opts = _pair(case, 12)
        def before(opt, i, rng):
            if i > 1: _random(opt, i, rng)
            opt.set_hyper('lr', [0.01*(1 + (k+i)%5) for k in range(12)])
        _train(opts, 12, before)
        _same(opts)
        steps = {b.step for b in engine.buckets_of(opts[1])}
        assert len(engine.calls_of(opts[1])) == len(steps) < len(engine.buckets_of(opts[1]))

def test_random_numbers_in_groups_that_differ(monkeypatch):
    "They come in one order, together in a call or not"
    @jit_step(lazy=True, elementwise=True)
    def noisy(params:list[torch.Tensor], grads:list[torch.Tensor], lr:float):
        for p in params: p.add_(torch.randn_like(p)*lr)
    res = []
    for after in (10**9,0):
        engine.set_compile_after(after, monkeypatch)
        big,small = parameters((5000,), (5000,)),parameters(*[(3,)]*30)
        opt = JitOptimizer([[big[0],*small[::2]],[big[1],*small[1::2]]], noisy, lr=[0.1,0.2])
        torch.manual_seed(0)
        opt.step()
        res.append(params_of(opt))
    for p,q in zip(*res): assert torch.equal(p, q)

@pytest.mark.parametrize('gen', ['old','new'])
@every
def test_equal_groups_on_cuda(case, gen):
    "By ATen's rules, 100 groups launch what one does"
    with engine.pytorch(gen),FakeTensorMode(),Launches(gen) as l:
        launches = []
        for n in (1,100):
            ps = with_grads([(4,3)]*200)
            opt = case.make([ps[i::n] for i in range(n)] if n > 1 else ps, True)
            opt.step()
            before = l.total
            opt.step()
            launches.append(l.total-before)
    assert launches[0] == launches[1] and launches[0]

def test_hypers_that_are_equal_in_value():
    "Numbers of any kind, NaN and lost ones"
    ps = parameters(*[(3,)]*5)
    opt = adam_jit([[p] for p in ps], lr=0.1)
    for h,lr in zip(opt.hypers, (1,1.,np.float64(1),torch.tensor(1.),True)): h['lr'] = lr
    opt.step()
    assert [b.groups for b in engine.buckets_of(opt)] == [[0,1,2,4],[3]]
    for h in opt.hypers[:2]: h['lr'] = float('nan')
    opt.step()
    assert sorted(b.groups for b in engine.buckets_of(opt)) == [[0],[1],[2,4],[3]]
    del opt.hypers[1]['eps']
    with pytest.raises(ValueError, match='needs the hyper `eps`, which group 1'): opt.step()

def test_patterns_of_the_benchmark():
    "Each sets what its name says, and trains like fastai's"
    for name,pattern in patterns.items():
        opts = [f([ps[i::24] for i in range(24)], lr=0.01) for f in (Adam,adam_jit)
                for ps in [parameters(*[(4,4),(4,)]*60, dtype=torch.float64)]]
        for opt in opts:
            ps,rng = params_of(opt),random.Random(0)
            grads = [p.grad for p in ps]
            for i in range(6): pattern(opt, ps, grads, i, rng); opt.step()
        for p,q in zip(*map(params_of, opts)): close(q, p, TOL[torch.float64], name)

@every
def test_first_gradients_of_other_kinds(case):
    "Parameters of another dtype and layout get their first gradient later, in every order"
    kinds = [lambda: torch.randn(4,3), lambda: torch.randn(4,3, dtype=torch.float64), lambda: torch.randn(4,6)[:,::2],
             lambda: torch.randn(2,3,4,4).to(memory_format=torch.channels_last), lambda: torch.randn(5)]
    for first in range(len(kinds)):
        opts = []
        for jit in (False,True):
            torch.manual_seed(first)
            ps = [nn.Parameter(k() if jit else k().contiguous()) for k in kinds]
            opts.append(case.make(ps, jit))
            opts[-1].ps = ps
        def late(opt, i, rng):
            for k,p in enumerate(opt.ps):
                p.grad = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(10*i+k))
                if (k-first)%len(kinds) > i or (k+i)%4 == 0: p.grad = None
        _train(opts, 12, late)
        for p,q in zip(*(o.ps for o in opts)): close(q, p, TOL[torch.float32])

def test_number_after_a_step_that_was_not_taken():
    "`explain`, or a step that fails, leaves nothing in what is known of a parameter"
    def step(params:list[torch.Tensor], grads:list[torch.Tensor], taken:torch.Tensor, lr:float):
        taken += 1.
        torch._foreach_sub_(params, torch._foreach_mul(grads, taken.mul(lr).unbind()))
    ps,ones = [nn.Parameter(torch.zeros(3)) for _ in range(2)],torch.ones
    opt = JitOptimizer(ps, step, lr=0.1)
    for first,second,take in ((1,0,opt.step), (1,1,opt.explain), (1,0,opt.step), (1,0,opt.step), (0,1,opt.step)):
        for p,has in zip(ps, (first,second)): p.grad = ones(3) if has else None
        take()
    assert [opt.state[p]['taken'].item() for p in ps] == [3,1]

@pytest.mark.parametrize('steps', [0,2])
def test_do_wd_that_is_none(steps):
    "Neither true nor false, and no key of a dict"
    p,q = ps = parameters((3,), (2,))
    opt = adam_jit(ps, lr=0.1)
    new_grads(ps)
    for _ in range(steps): opt.step()
    opt.state[q]['do_wd'] = [0.1]
    refused(opt, TypeError, '`do_wd` of parameter 1 of group 0')
    del opt.state[q]['do_wd']
    opt.step()

def test_do_wd_of_numpy():
    ps = parameters((3,), (2,))
    opts = [f([*map(torch.nn.Parameter, (p.detach().clone() for p in ps))], lr=0.1, wd=0.1) for f in (Adam,adam_jit)]
    for o in opts:
        p,q = params_of(o)
        o.state[q]['do_wd'] = np.array(False)
        for i in range(6):
            new_grads([p,q], i)
            if i == 4: o.state[p]['step'] += 2
            o.step()
    for p,q in zip(*map(params_of, opts)): close(q, p, 1e-6)

def test_strides_that_are_always_new():
    "What is known of them is bounded"
    p, = ps = parameters((4,5))
    opt = adam_jit(ps, lr=0.1)
    for i in range(200):
        p.grad = torch.ones(4, 5+i)[:,:5]
        opt.step()
    assert len(engine.roster_of(opt).slots[0].fits) <= 64

def test_slice_of_a_zero_tensor():
    "It has no memory, and an address that is not 0, as any slice of it"
    ps = parameters((4,), (3,))
    opts = [f([*map(torch.nn.Parameter, (p.detach().clone() for p in ps))], lr=0.1) for f in (Adam,adam_jit)]
    for o in opts:
        for i in range(4):
            new_grads(params_of(o), i)
            if i%2: params_of(o)[0].grad = torch._efficientzerotensor((10,))[3:7]
            o.step()
    for p,q in zip(*map(params_of, opts)): close(q, p, 1e-6)
