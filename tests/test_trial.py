"A step that would compute something else than it says is found before it is used"
import warnings
from contextlib import nullcontext
from threading import Thread
from typing import List

import pytest
import torch
from torch import Tensor,nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastxtend_jit.fragments import average_grad,scale_
from fastxtend_jit.step import jit_step
from tests import engine
from tests.cases import *
from tests.cuda_kernels import CudaKernels
from tests.support import cases,every,python_calls,slow_but

DTYPES = [torch.float32,torch.float64,torch.bfloat16,torch.float16]

@pytest.fixture(autouse=True)
def unproved(monkeypatch): engine.forget_trials(monkeypatch)

def faults(opt): return engine.why_not_fused(opt)

def stepped(make, dtype=torch.float32, device='cpu'):
    "An optimizer after a step, and the warnings that it gave"
    ps = [nn.Parameter(torch.ones(3, 4, dtype=dtype, device=device))]
    ps[0].grad = torch.ones_like(ps[0])
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        opt = make(ps)
        opt.step()
    return opt,[str(w.message) for w in ws if 'fused' in str(w.message)]

@cases
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_ours_are_proved(case, dtype):
    "In every form and dtype, here"
    opt,told = stepped(lambda ps: case.make(ps, True), dtype)
    # on a CPU, PyTorch's kernel for SGD computes wrong numbers in float16 before 2.15, in bfloat16 in older ones
    wrong_before = {torch.float16:(2,15), torch.bfloat16:(2,14)}.get(dtype, (0,))
    if told and tuple(map(int, torch.__version__.split('.')[:2])) < wrong_before:
        assert 'other numbers' in told[0]
        return
    assert not told and [('fused' in b.step.args) for b in engine.buckets_of(opt)] == [not f for f in faults(opt)]
    assert engine.number_proved() == 1

@cases
@pytest.mark.parametrize('generation', ['old','new'])
@pytest.mark.parametrize('dtype', slow_but([torch.float32], DTYPES), ids=str)
def test_ours_are_proved_on_cuda(case, generation, dtype, monkeypatch):
    "And with the arithmetic of CUDA's kernels"
    engine.as_on_cuda(monkeypatch)
    engine.let_modes_in(monkeypatch)
    with CudaKernels(generation): _,told = stepped(lambda ps: case.make(ps, True), dtype)
    assert not told

# RMSProp as it was: a beta next to 1 keeps the average, a step count of 2**53 makes its debiasing about 1
def kept(params:List[Tensor], grads:List[Tensor], grad_avg:List[Tensor], sqr_avg:List[Tensor], lr:float, mom:float,
         sqr_mom:float, eps:float, fused:bool):
    average_grad(grad_avg, grads, mom)
    if fused:
        keep,many = 1 - 2.**-53,2.**53
        c = 1 - keep**many
        steps = [torch.full([], many, dtype=torch.float32, device=params[0].device)] * len(params)
        torch._fused_adamw_(params, grads, grad_avg, sqr_avg, [], steps, lr=lr*c, beta1=keep, beta2=sqr_mom,
                            weight_decay=0., eps=eps, amsgrad=False, maximize=False)
        return
    scale_(sqr_avg, sqr_mom)
    torch._foreach_addcmul_(sqr_avg, grads, grads, 1-sqr_mom)
    denom = torch._foreach_sqrt(sqr_avg)
    torch._foreach_add_(denom, eps)
    torch._foreach_addcdiv_(params, grad_avg, denom, -lr)

def test_broken_identity(monkeypatch):
    """One that holds on a CPU, and on CUDA up to PyTorch 2.10, but not later

    The plain form is used there, one warning says so, and `explain` why"""
    make = lambda ps: JitOptimizer(ps, jit_kept, lr=0.1, mom=0.9, sqr_mom=0.99, eps=1e-8)
    jit_kept = jit_step(kept, elementwise=True)
    assert not stepped(make)[1]
    engine.let_modes_in(monkeypatch)
    for generation,found in (('old',False),('new',True)):
        engine.keep_faults_in(monkeypatch, {})
        with CudaKernels(generation):
            opt,told = stepped(make)
            assert len(told) == found
            again,more = stepped(make)
            assert not more and bool(faults(again)[0]) is found
            assert opt.param_lists[0][0].isfinite().all()
    assert '`kept` does without fused kernels on cpu in float32' in told[0] and 'other numbers for `params`' in told[0]
    assert 'other numbers for `params`' in opt.explain()['why not faster'][0]

def unequal(params:List[Tensor], grads:List[Tensor], lr:float, fused:bool):
    if fused and len(params) > 0: raise ValueError('no kernel')
    torch._foreach_add_(params, grads, alpha=-lr)

def test_kernel_that_raises():
    "Counts as differing"
    opt,told = stepped(lambda ps: JitOptimizer(ps, unequal, lr=0.1))
    assert len(told) == 1 and 'no fused kernel for float32 on cpu' in told[0]
    assert opt.param_lists[0][0].eq(torch.tensor(1.)-0.1).all()

# Own steps in which TorchScript drops a call
def in_slice(params:List[Tensor], grads:List[Tensor], lr:float): torch._foreach_add_(params[:2], grads[:2], alpha=-lr)
def in_average(params:List[Tensor], grads:List[Tensor], grad_avg:List[Tensor], lr:float):
    torch._foreach_add_([m.view(-1) for m in grad_avg], [g.view(-1) for g in grads])
    torch._foreach_add_(params, grads, alpha=-lr)
def in_fused(params:List[Tensor], grads:List[Tensor], grad_avg:List[Tensor], lr:float, fused:bool):
    if fused:
        torch._fused_sgd_(params, grads, [m for m in grad_avg], weight_decay=0., momentum=0.5, lr=lr, dampening=0.,
                          nesterov=False, maximize=False, is_first_step=False)
    else:
        average_grad(grad_avg, grads, 0.5)
        torch._foreach_add_([p for p in params], grad_avg, alpha=-lr)
def in_lookahead(params:List[Tensor], grads:List[Tensor], slow_weights:List[Tensor], alpha:float, lookahead:bool,
                 lr:float):
    torch._foreach_add_(params, grads, alpha=-lr)
    if lookahead: torch._foreach_copy_(slow_weights[:3], params[:3])

@pytest.mark.parametrize('f,make,lost', [(in_slice,JitOptimizer,'params'), (in_average,JitOptimizer,'grad_avg'),
                                         (in_fused,JitOptimizer,'params'), (in_lookahead,JitLookahead,'slow_weights')],
                         ids=lambda o: getattr(o, '__name__', o))
def test_dropped_call(f, make, lost):
    "Found when the optimizer is made, for its state by name"
    says = f'`{f.__name__}` computes other `{lost}` than as plain Python.*in-place call on a list'
    for _ in range(2):
        with pytest.raises(RuntimeError, match=says): make([nn.Parameter(torch.ones(2))], f, lr=0.1)

def test_dropped_call_without_hypers():
    "If hypers come later, at the first step"
    p = nn.Parameter(torch.ones(2))
    opt = JitOptimizer([p], in_slice)
    opt.set_hyper('lr', 0.1)
    p.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match='in-place call on a list'): opt.step()
    assert p.eq(1.).all()

def noisy(params:List[Tensor], grads:List[Tensor], lr:float, fused:bool):
    torch._foreach_add_(params, [torch.rand_like(g) for g in grads], alpha=-lr)

def picky(params:List[Tensor], grads:List[Tensor], lr:float):
    if params[0].dim() != 7: raise ValueError('seven')
    torch._foreach_add_(params, grads, alpha=-lr)

def test_leaves_no_trace(monkeypatch):
    "A step that draws, inside other modes; one that cannot take small tensors is not held against"
    state,threads = torch.get_rng_state(),torch.get_num_threads()
    modes = dict(none=nullcontext, inference=torch.inference_mode, device=lambda: torch.device('meta'),
                 double=lambda: CudaKernels('new'))
    for mode in modes.values():
        engine.forget_trials(monkeypatch)
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        with mode():
            opt = JitOptimizer([p], noisy, lr=0.1)
            assert torch.equal(torch.get_rng_state(), state)
            engine.make_plan(opt, [p], [p.grad])
        assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads and p.eq(1.).all()
        assert engine.faults_found() == [''] and engine.number_proved() == 1
    JitOptimizer([nn.Parameter(torch.ones(3))], picky, lr=0.1)

@pytest.mark.parametrize('generation', ['old','new'])
@pytest.mark.parametrize('make', [larc_jit,lamb_jit,stableadam_jit])
def test_tried_as_it_runs(make, generation, monkeypatch):
    "A trial on the device gets the scalars that the step will get: before PyTorch 2.11, these differ on CUDA"
    tried,ran = engine.watch_scalars(monkeypatch)
    engine.set_generation(monkeypatch, generation)
    with FakeTensorMode():
        p = nn.Parameter(torch.empty(3, device='cuda'))
        p.grad = torch.empty_like(p)
        make([p], 0.1).step()
    assert [{**s, 'fused':True} for s in tried] == ran and ran[0]['spread_scalars'] == (generation == 'old')

def test_fake_tensors():
    "What is not there cannot be tried: no warning, and no fused kernel"
    with FakeTensorMode():
        for device in ('cuda','meta'):
            if device == 'cuda' and torch.cuda.is_available(): continue
            opt,told = stepped(lambda ps: adam_jit(ps, 0.1), device=device)
            assert not told and faults(opt)[0]

# Faults that show later, or only in odd places

def set_params(opt, g=1.):
    for pg in opt.param_lists:
        for p in pg: p.data.fill_(1.); p.grad = torch.full_like(p, g)

def decays_wrongly(params:List[Tensor], grads:List[Tensor], lr:float, wd:float, fused:bool):
    if wd != 0.: torch._foreach_mul_(params, 1-lr*wd*(2. if fused else 1.))
    torch._foreach_add_(params, grads, alpha=-lr)
def constant_wrongly(params:List[Tensor], grads:List[Tensor], lr:float, n:int, fused:bool):
    torch._foreach_add_(params, grads, alpha=-lr*(2. if fused and n == 5 else 1.))
def drops_later(params:List[Tensor], grads:List[Tensor], lr:float, n:int):
    if n == 5: torch._foreach_add_([p for p in params], grads, alpha=-lr)
    else:      torch._foreach_add_(params, grads, alpha=-lr)
def double(params:List[Tensor], grads:List[Tensor], lr:float, fused:bool):
    torch._foreach_add_(params, grads, alpha=-lr*(2. if fused else 1.))
def looks_wrongly(params:List[Tensor], grads:List[Tensor], slow_weights:List[Tensor], alpha:float, lookahead:bool,
                  lr:float, fused:bool):
    torch._foreach_add_(params, grads, alpha=-lr)
    if lookahead:
        torch._foreach_lerp_(slow_weights, params, alpha*1.5 if fused else alpha)
        torch._foreach_copy_(params, slow_weights)
def in_one_combination(params:List[Tensor], grads:List[Tensor], lr:float, do_wd:bool, fused:bool, dense_cpu:bool):
    if do_wd and dense_cpu and not fused: torch._foreach_add_([p for p in params], grads, alpha=-lr)
    else: torch._foreach_add_(params, grads, alpha=-lr)
def only_matrices(params:List[Tensor], grads:List[Tensor], lr:float):
    if params[0].dim() != 2: raise ValueError('matrices')
    torch._foreach_add_([p for p in params], grads, alpha=-lr)
def no_zeros(params:List[Tensor], grads:List[Tensor], lr:float):
    if bool((params[0] == 0.).any()): raise ValueError('zero')
    torch._foreach_add_([p for p in params], grads, alpha=-lr)
def zeroes_grads(params:List[Tensor], grads:List[Tensor], lr:float):
    torch._foreach_add_(params, grads, alpha=-lr)
    torch._foreach_zero_([g for g in grads])

@pytest.mark.filterwarnings('ignore:.*does without fused kernels')
@pytest.mark.parametrize('lr', [0.,float('nan'),0.1])
def test_what_comes_later(lr):
    "Decay, constants and a learning rate that come after the first step are proved when they come"
    def make(step, **kw):
        opt = JitOptimizer([nn.Parameter(torch.ones(2))], jit_step(step), lr=lr, **kw)
        set_params(opt); opt.step(); set_params(opt); opt.set_hyper('lr', 0.1)
        return opt,opt.param_lists[0][0]
    opt,p = make(decays_wrongly, wd=0.)
    opt.set_hyper('wd', 0.1); opt.step()
    assert p.tolist() == pytest.approx([0.89]*2)
    opt,p = make(constant_wrongly, n=3)
    opt.n = 5; opt.step()
    assert p.tolist() == pytest.approx([0.9]*2)
    opt.n = 3; set_params(opt); opt.step()
    assert p.tolist() == pytest.approx([0.9]*2) and not faults(opt)[0]
    opt,p = make(drops_later, n=3)
    opt.n = 5
    with pytest.raises(RuntimeError, match='in-place call on a list'): opt.step()
    assert p.tolist() == [1.,1.]
    opt,p = make(double)
    opt.step()
    assert p.tolist() == pytest.approx([0.9]*2)

@pytest.mark.filterwarnings('ignore:.*does without fused kernels')
def test_lookahead_is_proved_before_it_comes():
    opt = JitLookahead([nn.Parameter(torch.ones(2))], jit_step(looks_wrongly), lr=0.1, k=3)
    for _ in range(3): opt.param_lists[0][0].grad = torch.ones(2); opt.step()
    assert opt.param_lists[0][0].tolist() == pytest.approx([0.85]*2)

@pytest.mark.parametrize('step', [in_one_combination,only_matrices,no_zeros,zeroes_grads], ids=lambda f: f.__name__)
def test_drops_in_odd_places(step):
    with pytest.raises(RuntimeError, match='in-place call on a list'):
        JitOptimizer([nn.Parameter(torch.ones(2,2))], step, lr=0.1)

def test_odd_hypers_hold_for_themselves():
    "A fault that comes from them is not held against others"
    make = lambda **kw: faults(stepped(lambda ps: adam_jit(ps, 0.1, **kw), torch.float16)[0]) == ['']
    assert not make(sqr_mom=0.99999, eps=1e-9) and make(eps=1e-3)

def test_threads(monkeypatch):
    "Two first steps at once leave the generator as it was"
    state = torch.get_rng_state()
    for _ in range(3):
        engine.forget_trials(monkeypatch)
        threads = [Thread(target=stepped, args=(lambda ps,c=c: c.make(ps, True),)) for c in EIGHT[2:6]]
        for t in threads: t.start()
        for t in threads: t.join()
        assert torch.equal(torch.get_rng_state(), state)

@every
def test_tried_once(case, monkeypatch):
    "The second optimizer of a kind tries nothing: the plain function, which a trial calls, is not called any more"
    plain = case.step.fn
    engine.forget_trials(monkeypatch)  # what `case.step` has tried
    trials = lambda: python_calls(lambda: stepped(lambda ps: case.make(ps, True)), of=plain)
    assert trials() > 0 and trials() == 0

def finite(params:List[Tensor], grads:List[Tensor], lr:float, fused:bool):
    "Whose fused form is finite where the plain one is not"
    torch._foreach_add_(params, grads, alpha=-lr)
    if not fused: torch._foreach_div_(params, torch._foreach_sub(params, params))

def test_infinities_are_compared():
    "A form that stays finite where the other does not is another one"
    _,told = stepped(lambda ps: JitOptimizer(ps, finite, lr=0.1))
    assert len(told) == 1 and 'other numbers for `params`' in told[0]
