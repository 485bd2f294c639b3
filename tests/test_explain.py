"`explain`: it says of the next step what is so, and takes none"
import copy
from typing import List

import pytest
import torch
from torch import Tensor,nn

from fastxtend_jit.fragments import average_grad
from fastxtend_jit.step import jit_step
from fastxtend_jit.calls import Calls
from tests import engine
from tests.cases import *
from tests.learners import vision
from tests.support import cases,new_grads,parameters,params_of,regroup,same,snapshot

def explained(case, dtype=torch.float32, steps=1, shapes=((300,40),(40,),(8,4,3,3))):
    opt = case.make([parameters(*shapes, dtype=dtype)], True)
    for _ in range(steps): opt.step()
    return opt

def path(opt): return opt.explain().iloc[0][['path','why not faster']].tolist()

# --- What it says

@pytest.mark.parametrize('steps', [1,5,12])
@cases
def test_explain(case, steps):
    "It counts what the next step really calls, and changes nothing"
    opt = explained(case, steps=steps)
    state = lambda: (snapshot(opt),engine.steps_taken(engine.buckets_of(opt)[0]))
    before = state()
    df = opt.explain()
    assert same(state(), before)
    with Calls() as real: opt.step()
    assert df['ATen calls'].sum() == real.calls.total()
    assert df['tensors'].sum() == 3 and df['elements'].sum() == 300*40+40+8*4*9 and (df['wd'] == 0.01).all()

def sign_step(params:List[Tensor], grads:List[Tensor], grad_avg:List[Tensor], lr:float, mom:float):
    average_grad(grad_avg, grads, mom)
    torch._foreach_add_(params, torch._foreach_sign(grad_avg), alpha=-lr)

def test_explain_says_why(monkeypatch):
    settings = (adam_jit,{}), (radam_jit,{}), (qhadam_jit,dict(nu_2=0.8))
    adam,radam,qhadam = [Case(None, j, kw) for j,kw in settings]
    assert path(explained(adam)) == ['fused','']
    assert path(explained(radam)) == ['foreach','fused from a later step on']
    assert path(explained(radam, steps=9)) == ['fused','']
    assert path(explained(qhadam)) == ['foreach','no fused form for these hypers']
    opt = explained(adam)
    p = opt.param_lists[0][2]
    p.grad = p.grad.to(memory_format=torch.channels_last)
    assert sorted(opt.explain()['why not faster']) == ['','copies 1 gradients']
    own = JitOptimizer(parameters((3,)), sign_step, lr=0.1, mom=0.9)
    own.step()
    assert path(own) == ['foreach','the step has no fused form']
    gaps = adam_jit([nn.Parameter(torch.randn(4, 9)[:,::2])], 0.1)
    gaps.param_lists[0][0].grad = torch.randn(4, 5)
    gaps.step()
    assert path(gaps) == ['foreach','the parameters have gaps in memory']
    engine.set_fused_fault(monkeypatch, 'no fused kernel for bfloat16 on cpu')
    assert path(explained(adam, torch.bfloat16)) == ['foreach','no fused kernel for bfloat16 on cpu']
    engine.run_uncompiled(monkeypatch, adam_jit_step)
    assert path(explained(adam))[1] == 'no fused kernel for bfloat16 on cpu; TorchScript cannot compile here'

def test_explain_norms():
    "What norms cost each tensor is told, of any step, by what it calls"
    for case in ALL:
        opt = explained(case, steps=9, shapes=[(4,5)]*9)
        at,why = path(opt)
        with Calls() as real: opt.step()
        dots,total,by_list = real.calls['dot'],real.calls.total(),real.calls.copy()
        for c in real.calls:
            if not c.startswith(('_fused_','_foreach_')): del by_list[c]
        fused = any(c.startswith('_fused_') for c in by_list)
        assert at == ('fused in part' if fused and dots else 'fused' if fused else 'foreach')
        words = f'{total-by_list.total()} of {total} calls take no list of tensors, above all '
        products = case.jit is muon_jit
        assert words in why and (products or f'{dots} dot' in why) if dots or products else 'take no list' not in why
        if at == 'fused': assert why == ''
    assert {c.jit for c in ALL if 'dot' in str(path(explained(c)))} == {larc_jit,lamb_jit,stableadam_jit}

def test_learner_explains(tmp_path):
    learn = vision(Adam, tmp_path)
    with pytest.raises(RuntimeError, match='no optimizer yet.*`fit` makes it'): learn.explain()
    learn.fit(1)
    with pytest.raises(TypeError, match='with a `Optimizer`.*`learn.to_jit'): learn.explain()
    learn.to_jit()
    with pytest.raises(RuntimeError, match='no step to explain yet'): learn.explain()
    learn.fit(1)
    assert learn.explain().equals(learn.opt.explain()) and len(learn.explain()) == 2

def test_explain_before_fused_was_tried(monkeypatch):
    "What a dry run only pretends to compute tells nothing about the kernels"
    opt = explained(EIGHT[2])
    engine.forget_trials(monkeypatch)
    assert path(opt) == ['fused',''] and not any(engine.faults_found())

def test_explain_buckets():
    kinds = (5,torch.float32),(6,torch.float32),(7,torch.float64),(8,torch.float32)
    ps = [nn.Parameter(torch.randn(n, dtype=d)) for n,d in kinds]
    opt = adam_jit([ps[:3],ps[3:]], 0.1, wd=0.1)
    opt.state[ps[1]]['do_wd'] = False
    new_grads(ps)
    opt.step()
    def shown(): return opt.explain()[['group','wd','dtype','device','elements']].values.tolist()
    assert shown() == [['0-1',0.1,'float32','cpu',13], [0,0.,'float32','cpu',6], [0,0.1,'float64','cpu',7]]
    opt.set_hyper('lr', [0.1,0.2])
    assert shown() == [[0,0.1,'float32','cpu',5], [0,0.,'float32','cpu',6], [0,0.1,'float64','cpu',7],
                       [1,0.1,'float32','cpu',8]]

def test_explain_a_step_without_decay():
    "It takes no `wd`, so groups with different ones step together, and the table says 0"
    def step(params:List[Tensor], grads:List[Tensor], lr:float): torch._foreach_add_(params, grads, alpha=-lr)
    opt = JitOptimizer([[p] for p in parameters((2,), (2,))], step, lr=0.1, wd=0.1)
    opt.set_hyper('wd', [0.1,0.2])
    opt.step()
    assert opt.explain()[['group','wd']].values.tolist() == [['0-1',0.]]

def test_explain_scratch():
    def step(params:List[Tensor], grads:List[Tensor], lr:float):
        a = torch._foreach_mul(grads, 2.)
        b = torch._foreach_mul(a, 2.)
        a = torch._foreach_mul(b, lr)
        torch._foreach_sub_(params, a)
    opt = JitOptimizer(parameters((2**18,)), step, lr=0.1)
    opt.step()
    # two of them live at a time, three where Python lets go later
    assert opt.explain()['scratch, MiB'].tolist() in ([2.],[3.])

@pytest.mark.parametrize('when', ['new','no gradient','cleared','copied'])
def test_explain_before_the_first_step(when):
    opt = explained(EIGHT[-1], steps=when != 'new')
    if when == 'cleared': opt.clear_state()
    if when == 'copied': opt = copy.deepcopy(opt)
    if when == 'no gradient':
        for p in params_of(opt): p.grad = None
    with pytest.raises(RuntimeError, match='no step to explain yet.*Take one first'): opt.explain()

def test_explain_is_shown_whole():
    df = explained(EIGHT[2]).explain()
    assert all(c in str(df) for c in df.columns)

# --- What it leaves alone

def noisy_step(params:List[Tensor], grads:List[Tensor], lr:float):
    noise = [torch.rand_like(p) for p in params]
    torch._foreach_add_(params, torch._foreach_mul(grads, noise), alpha=-lr)

def test_explain_takes_no_step():
    "Whatever was wrapped around `step`, and whatever the step draws"
    for make in (*(lambda ps,c=c: c.make(ps, True) for c in EIGHT), lambda ps: JitOptimizer(ps, noisy_step, lr=0.1)):
        opt = make(parameters((3,4), (5,)))
        opt.step()
        calls,real = [],opt.step
        def wrapped(*args): calls.append(args); return real(*args)
        opt.step = wrapped
        opt.step()
        before,state = snapshot(opt),torch.get_rng_state()
        opt.explain()
        assert same(snapshot(opt), before)
        assert len(calls) == 1 and torch.equal(torch.get_rng_state(), state)

def halving_step(params:List[Tensor], grads:List[Tensor], lr:float):
    norm = grads[0].norm()
    while float(norm.item()) > 0.01: norm.mul_(0.5)
    torch._foreach_add_(params, grads, alpha=-lr)

def seeding_step(params:List[Tensor], grads:List[Tensor], lr:float):
    torch.manual_seed(3)
    torch._foreach_add_(params, grads, alpha=-lr)

def generator_step(params:List[Tensor], grads:List[Tensor], lr:float):
    n = torch.zeros(1)
    n.add_(2.)
    a,b = torch.empty(2),torch.empty(2, dtype=torch.int64)
    torch.max(torch.ones(2,2), 0, out=(a,b))
    drawn = [torch.poisson(torch.ones_like(g), GEN) + torch.rand(g.shape, generator=GEN) for g in grads]
    torch._foreach_add_(params, drawn, alpha=-lr/float(n.item())*float(a.sum()))
GEN = torch.Generator()

@pytest.mark.parametrize('step', [halving_step,seeding_step,generator_step], ids=lambda f: f.__name__)
def test_explain_odd_steps(step, monkeypatch):
    "A step may write to what it made itself, seed, and draw from a generator of its own"
    jit = jit_step(step)
    if step is generator_step: engine.run_uncompiled(monkeypatch, jit)
    opt = JitOptimizer(parameters((3,4), (5,)), jit, lr=0.1)
    opt.step()
    before,state,own = snapshot(opt),torch.get_rng_state(),GEN.get_state()
    opt.explain()
    assert same(snapshot(opt), before)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(GEN.get_state(), own)

def test_explain_makes_no_slow_weights():
    opt = EIGHT[-1].make(parameters((3,)), True)
    opt.step()
    opt.slow_weights = None
    opt.explain()
    assert opt.slow_weights is None

def test_explain_leaves_slow_weights():
    "Also those that the next step will deal out anew"
    opt = EIGHT[-1].make([parameters((3,)),parameters((4,))], True)
    opt.step()
    regroup(opt, (2,), [{}])
    before = [*map(len, opt.slow_weights)],opt.count
    opt.explain()
    assert ([*map(len, opt.slow_weights)],opt.count) == before
    opt.step()
    assert [*map(len, opt.slow_weights)] == [2]
