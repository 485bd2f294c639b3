"What used to give wrong numbers, or a broken state, without a word"
import importlib.util,signal,sys
from copy import copy,deepcopy
from functools import partial
from time import perf_counter
from typing import List,Optional

import numpy as np
import pytest
import torch
from fastcore.foundation import L
from torch import Tensor,nn

from fastxtend_jit import bucket,learner,optimizer,plan,snapshot as snapshots
from fastxtend_jit.fragments import norms
from fastxtend_jit.script import jit_step
from fastxtend_jit.trace import Calls,peak_memory
from tests.cases import *
from tests.test_errors import same,snapshot

every = pytest.mark.parametrize('case', ALL, ids=str)

def new_grads(ps, seed=None):
    if seed is not None: torch.manual_seed(seed)
    for p in ps: p.grad = torch.randn_like(p)

def parameters(*shapes, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    ps = [nn.Parameter(torch.randn(s, dtype=dtype)) for s in shapes]
    new_grads(ps)
    return ps

def refused(opt, err, *parts):
    "The step is refused, with these words, and has changed nothing"
    before = snapshot(opt)
    with pytest.raises(err) as e: opt.step()
    for o in parts: assert o in str(e.value)
    same(snapshot(opt), before)

# --- Groups that change

def regroup(opt, sizes, hypers):
    "Deal out the parameters anew, in their order"
    ahead,opt = opt,getattr(opt, 'opt', opt)  # fastai's Lookahead has an optimizer inside
    ps = iter([p for pg in opt.param_lists for p in pg])
    opt.param_lists = L(L(next(ps) for _ in range(n)) for n in sizes)
    opt.hypers = L({**opt.hypers[0], **h} for h in hypers)
    if ahead is not opt and ahead.slow_weights:  # it would pair them with other parameters, or with none
        ss = iter([s for pg in ahead.slow_weights for s in pg])
        ahead.slow_weights = L(L(next(ss) for _ in range(n)) for n in sizes)

@every
def test_groups_move(case):
    "A boundary that moves, groups that are split and merged: each parameter has the hypers of its group from then on"
    opts = []
    for jit in (False,True):
        ps = parameters((3,4), (5,), (2,6), (4,), dtype=torch.float64)
        opt = case.make([ps[:2],ps[2:]], jit, lr=[0.1,0.], **dict(k=2) if case.jit is ranger_jit else {})
        opt.ps = ps
        opts.append(opt)
    for i,(sizes,lrs) in enumerate([((2,2),(0.1,0.)), ((1,3),(0.1,0.)), ((1,3),(0.,0.1)), ((1,1,2),(0.1,0.05,0.2)), ((4,),(0.3,)), ((3,1),(0.,0.1)), ((2,2),(0.1,0.2))]):
        for opt in opts:
            regroup(opt, sizes, [dict(lr=lr) for lr in lrs])
            for _ in range(3): new_grads(opt.ps, i); opt.step()
        for p,q in zip(*(opt.ps for opt in opts)): close(q, p, TOL[torch.float64])
        same_state(opts[1], opts[0], TOL[torch.float64])

@every
def test_fewer_groups_than_hypers(case):
    "fastai leaves out the hypers that are over"
    opts = []
    for jit in (False,True):
        ps = parameters((3,), (4,), dtype=torch.float64)
        opt = case.make([ps[:1],ps[1:]], jit, lr=[0.1,0.2])
        opt.step()
        opt.param_lists = L([L(ps)])
        if hasattr(opt, 'slow_weights'): opt.slow_weights = L([L(s for pg in opt.slow_weights for s in pg)])
        for _ in range(6): opt.step()
        opts.append(ps)
    for p,q in zip(*opts): close(q, p, TOL[torch.float64])

# --- Norms

KINDS = dict(constant=lambda n: torch.full([n], 0.02), normal=lambda n: torch.randn(n), uniform=lambda n: torch.rand(n))

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('n', [1, 1000, 4096, 4097, 2**16+5, 2**18, 3_000_000, 2**24])
def test_norms(kind, n):
    "As near to float64's as fastai's, LAMB's by `pow(2).mean()`"
    torch.manual_seed(0)
    x = KINDS[kind](n)
    truth = x.double().norm()
    off = lambda y: (abs(y.double()-truth)/truth).item()
    theirs,ours = off(x.pow(2).mean().sqrt().double()*n**0.5),off(norms([x], flat=True)[0])
    assert ours <= 3*theirs + 2**-23  # and how exactly float32 can tell at all
    assert off(norms([x], flat=False)[0]) <= 3*theirs + 2**-23

@pytest.mark.parametrize('dtype', [torch.bfloat16,torch.float16])
def test_norms_in_half_precision(dtype):
    for n in (100, 4096, 2**20+77):
        x = torch.randn(n).to(dtype)
        truth = x.double().norm()
        for is_flat in (True,False):
            if dtype == torch.float16 and n > 60_000: continue  # the sum of squares overflows, in fastai as here
            assert abs(norms([x], is_flat)[0].double()-truth) <= 2*torch.finfo(dtype).eps*truth

@pytest.mark.parametrize('f,native', [(larc_jit,Larc),(lamb_jit,Lamb)], ids=lambda f: f.__name__)
@pytest.mark.parametrize('value', [30.,100.,1e-3])
@pytest.mark.parametrize('gaps', [False,True])
def test_norms_that_float16_cannot_square(f, native, value, gaps):
    "Whose squares overflow or vanish in float16, where fastai's norm does not (its LAMB does square)"
    res = []
    for make,dtype in ((native,torch.float64),(f,torch.float16)):
        p = nn.Parameter(torch.full((300,2), value, dtype=dtype)[:,0] if gaps else torch.full((300,), value, dtype=dtype))
        p.grad = torch.full((300,), value, dtype=dtype)
        make([p], lr=0.1, eps=1e-3).step()
        res.append((p.detach().double()-value)[0].item())
    assert res[1] == pytest.approx(res[0], rel=0.05, abs=2*2**-10*value)

def test_norms_below_the_denormals():
    for n in (300,5000,5120): assert norms([torch.full([n], 1e-23)], flat=True)[0] == torch.full([n], 1e-23).pow(2).sum().sqrt() == 0

@pytest.mark.parametrize('case', [c for c in EIGHT if c.jit in (larc_jit,lamb_jit)], ids=str)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('n', [2**18, 2**24])
def test_update_of_large_tensors(case, kind, n):
    "Of a whole step, at most three times as far from float64's as fastai's"
    torch.manual_seed(0)
    start,g = KINDS[kind](n),KINDS[kind](n)
    def moved(jit, dtype):
        p = nn.Parameter(start.to(dtype))
        p.grad = g.to(dtype)
        case.make([p], jit, lr=10., wd=0., eps=1e-5).step()  # so that the update, not the parameter, decides how it is rounded
        return p.detach().double() - start
    truth,theirs,ours = moved(False, torch.float64),moved(False, torch.float32),moved(True, torch.float32)
    off = lambda x: ((x-truth).abs().max()/truth.abs().max()).item()
    assert off(ours) <= 3*off(theirs) + 2**-22

# --- explain

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
        same(snapshot(opt), before)
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
    torch._foreach_add_(params, [torch.poisson(torch.ones_like(g), GEN) + torch.rand(g.shape, generator=GEN) for g in grads], alpha=-lr/float(n.item())*float(a.sum()))
GEN = torch.Generator()

@pytest.mark.parametrize('step', [halving_step,seeding_step,generator_step], ids=lambda f: f.__name__)
def test_explain_odd_steps(step):
    "A step may write to what it made itself, seed, and draw from a generator of its own"
    jit = jit_step(step)
    if step is generator_step: vars(jit)['compiled'] = step
    opt = JitOptimizer(parameters((3,4), (5,)), jit, lr=0.1)
    opt.step()
    before,state,own = snapshot(opt),torch.get_rng_state(),GEN.get_state()
    opt.explain()
    same(snapshot(opt), before)
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

def test_explain_is_shown_whole():
    opt = EIGHT[2].make(parameters((3,)), True)
    opt.step()
    df = opt.explain()
    assert all(c in str(df) for c in df.columns)

# --- Interrupts

class Interrupt(BaseException): "Like KeyboardInterrupt, nothing that `except Exception` catches"

def trained(case, steps):
    ps = parameters((3,4), (5,), (2,2), dtype=torch.float64)
    opt = case.make([ps[:2],ps[2:]], True, **dict(k=2) if case.jit is ranger_jit else {})
    for i in range(steps): new_grads(ps, i); opt.step()
    new_grads(ps, 99)
    return opt

def interrupted(opt, n):
    "Has a step of `opt` been interrupted at the `n`-th line of the package that it comes to? One call of the kernels counts as a line"
    files,left = {m.__file__ for m in (optimizer,plan,bucket,snapshots)},[n]
    def trace(frame, event, arg):
        if frame.f_code.co_filename not in files: return
        if event == 'line':
            left[0] -= 1
            if left[0] == 0: raise Interrupt
        return trace
    old = sys.gettrace()
    sys.settrace(trace)
    try: opt.step()
    except Interrupt: return True
    finally: sys.settrace(old)
    return False

@every
@pytest.mark.parametrize('steps', [0,1])  # Ranger's second is a lookahead
def test_interrupted_anywhere(case, steps):
    "The state can be loaded, and training goes on, each parameter from where it is"
    n = 0
    while n := n+1:
        opt = trained(case, steps)
        if not interrupted(opt, n): break
        assert all({*opt.state_names} - {'slow_weights'} <= {*st} for st in opt.state.values() if any(k in st for k in opt.state_names)), n
        fresh = trained(case, 0)
        fresh.load_state_dict(deepcopy(opt.state_dict()))
        if hasattr(opt, 'slow_weights') and steps: assert opt.slow_weights is not None
        for p,q in zip(opt.all_params().itemgot(0), fresh.all_params().itemgot(0)): q.data.copy_(p.data); q.grad = p.grad.clone()
        for _ in range(2):
            for o in (opt,fresh): o.step()
        for p,q in zip(opt.all_params().itemgot(0), fresh.all_params().itemgot(0)): assert p.isfinite().all() and torch.equal(p, q), n
    assert n > 50

@every
@pytest.mark.parametrize('err', [KeyboardInterrupt,RuntimeError])
@pytest.mark.parametrize('steps', [0,2])
def test_interrupted_in_kernels(case, err, steps, monkeypatch):
    "Python lets a Ctrl-C through when the kernels are done: this bucket's step counts. An error of a kernel stops it before it has begun"
    opt,ref = trained(case, steps),trained(case, steps)
    opt._prepare()  # proves the step
    opt._plan = None
    over,runs = type(opt.opt_step).over,[]
    def stop_in_second(self, states):
        run = over(self, states)
        def _run(*args):
            runs.append(args)
            if len(runs) == 2 and err is RuntimeError: raise err
            run(*args)
            if len(runs) == 2: raise err
        return _run
    monkeypatch.setattr(type(opt.opt_step), 'over', stop_in_second)
    with pytest.raises(err): opt.step()
    monkeypatch.undo()
    if err is RuntimeError:  # as if the second group had no gradient
        p = ref.param_lists[1][0]
        g,p.grad = p.grad,None
        ref.step()
        p.grad = g
    else: ref.step()
    if hasattr(ref, 'count'): ref.count -= 1
    for _ in range(2):
        for p,q in zip(opt.all_params().itemgot(0), ref.all_params().itemgot(0)): close(p, q, 0)
        for o in (opt,ref): o.step()

def test_threads_after_an_interrupt(monkeypatch):
    "Small tensors take one thread, and give back the others whatever happens"
    torch.set_num_threads(threads := 2)
    opt = EIGHT[2].make(parameters(*[(5,)]*30), True)
    opt.step()
    real = torch.set_num_threads
    def stop(n):
        real(n)
        if n == 1: raise KeyboardInterrupt
    monkeypatch.setattr(torch, 'set_num_threads', stop)
    if bucket.openmp():
        with pytest.raises(KeyboardInterrupt): opt.step()
    assert torch.get_num_threads() == threads
    monkeypatch.undo()
    torch.set_num_threads(1)

def test_regrouped_slow_weights():
    "They follow through an interrupt, a copy, a checkpoint of its own"
    def regrouped():
        ps = parameters((3,), (4,))
        opt = EIGHT[-1].make([ps[:1],ps[1:]], True, k=2)
        opt.step()
        regroup(opt, (2,), [{}])
        return opt
    opt = regrouped()
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(type(opt), '_run', lambda *_: 1/0)
        with pytest.raises(ZeroDivisionError): opt.step()
    fresh,loaded = regrouped(),regrouped()
    loaded.load_state_dict(loaded.state_dict())
    for o in (opt,deepcopy(regrouped()),loaded,fresh):
        for _ in range(2): o.step()
        for p,q in zip(o.param_lists[0], fresh.param_lists[0]): assert o is fresh or p.shape == q.shape
        assert [*map(len, o.slow_weights)] == [2]

def test_ctrl_c():
    "A real one, whenever it comes, also where PyTorch itself asks Python for something"
    armed = []
    def ring(*_):
        if armed: armed.clear(); raise KeyboardInterrupt
    was = [signal.signal(s, f) for s,f in ((signal.SIGINT,ring),(signal.SIGALRM,lambda *_: signal.raise_signal(signal.SIGINT)))]
    try:
        for i in range(40):
            for case in EIGHT[::3]:
                opt = trained(case, 0)
                armed.append(1)
                try:
                    signal.setitimer(signal.ITIMER_REAL, 1e-5 + i*3e-5)
                    while armed: opt.step()
                except KeyboardInterrupt: pass
                trained(case, 0).load_state_dict(deepcopy(opt.state_dict()))
                opt.step()
    finally:
        for s,f in zip((signal.SIGINT,signal.SIGALRM), was): signal.signal(s, f)
        torch.set_grad_enabled(True)  # which PyTorch leaves off if its `no_grad` is interrupted where it ends

# --- Names in steps of one's own

NAMES = ('frozen_idx count _i i a0 k range len _step over fn hypers state cbs state_names param_lists set_hyper _plan zero_grad clear_state state_dict all_params explain step_fn '
         'train_bn opt_step self alpha slow_weights decouple lr_ defaults freeze closure bucket names args do_wd force_train p group print float torch_').split()

@pytest.fixture(scope='module')
def named(tmp_path_factory):
    "Steps with one argument of each name and kind: TorchScript wants their source in a file"
    path = tmp_path_factory.mktemp('named')/'named_steps.py'
    heads = dict(const='{n}:int', hyper='{n}:float', state='{n}:List[Tensor]', option='{n}:Optional[List[Tensor]]', number='{n}:Tensor')
    use = dict(const='torch._foreach_add_(params, grads, alpha=-lr*{n})', hyper='torch._foreach_add_(params, grads, alpha=-lr*{n})',
               state='torch._foreach_add_({n}, 3.); torch._foreach_addcmul_(params, grads, {n}, -lr)',
               option='if {n} is not None: torch._foreach_add_({n}, 3.); torch._foreach_addcmul_(params, grads, {n}, -lr)',
               number='{n}.add_(3.); torch._foreach_add_(params, torch._foreach_mul(grads, {n}.unbind()), alpha=-lr)')
    src = 'from typing import List,Optional\nimport torch\nfrom torch import Tensor\n'
    for kind,head in heads.items():
        for n in NAMES:
            for ahead in ('', ', slow_weights:List[Tensor], alpha:float, lookahead:bool'):
                if ahead and n in ('alpha','slow_weights'): continue
                src += (f"\ndef {kind}_{n}{'_ahead' if ahead else ''}(params:List[Tensor], grads:List[Tensor], {head.format(n=n)}{ahead}, lr:float):\n"
                        f"    {use[kind].format(n=n)}\n")
    path.write_text(src)
    spec = importlib.util.spec_from_file_location('named_steps', path)
    mod = importlib.util.module_from_spec(spec)
    sys.modules['named_steps'] = mod
    spec.loader.exec_module(mod)
    return mod

@pytest.mark.parametrize('ahead', [False,True])
@pytest.mark.parametrize('kind', ['const','hyper','state','option','number'])
@pytest.mark.parametrize('name', NAMES)
def test_names(named, name, kind, ahead):
    "A name works, or it is refused when the optimizer is made"
    f = getattr(named, f"{kind}_{name}{'_ahead'*ahead}", None)
    if f is None: return
    p = nn.Parameter(torch.ones(2))
    make = JitLookahead if ahead else JitOptimizer
    given = {name:3} if kind in ('const','hyper') else {}
    try: opt = make([p], jit_step(f), **given, lr=0.1)
    except TypeError as e: assert f'`{name}`' in str(e) or f"argument '{name}'" in str(e); return
    for i in range(2):
        p.grad = torch.ones(2)
        opt.step()
        assert p.tolist() == pytest.approx([1 - 0.3*(i+1)]*2 if given else [1 - 0.3*(1,3)[i]]*2), (i,p)
        opt.zero_grad()
    opt.load_state_dict(deepcopy(opt.state_dict()))
    opt.freeze_to(0)
    p.grad = torch.ones(2)
    opt.step()
    opt.explain()
    opt.clear_state()
    assert deepcopy(opt).hypers[0]['lr'] == 0.1 and (name not in given or kind == 'const' and getattr(opt, name) == 3 or opt.hypers[0].get(name) == 3)

def whole_lr(params:List[Tensor], grads:List[Tensor], lr:int): torch._foreach_add_(params, grads, alpha=-lr)
def greek(params:List[Tensor], grads:List[Tensor], lr:float, β:float): torch._foreach_add_(params, grads, alpha=-lr*β)
def test_names_of_the_wrong_kind():
    with pytest.raises(TypeError, match='`lr` is annotated.*annotate it `float`'): JitOptimizer(parameters((2,)), whole_lr, lr=1)
    with pytest.raises(TypeError, match='`β`.*ASCII'): JitOptimizer(parameters((2,)), greek, lr=1., β=1.)

def decays(params:List[Tensor], grads:List[Tensor], lr:float, decouple_wd:bool=True):
    if decouple_wd: torch._foreach_add_(params, grads, alpha=-lr)
def test_default_of_decouple_wd():
    "A step's own default holds where nothing else is said"
    assert JitOptimizer(parameters((2,)), decays, lr=0.1).decouple_wd is True
    assert JitOptimizer(parameters((2,)), decays, False, lr=0.1).decouple_wd is False
    assert JitOptimizer(parameters((2,)), noisy_step, lr=0.1).decouple_wd is False
    assert adam_jit(parameters((2,)), 0.1, decouple_wd=None).decouple_wd is False  # as fastai takes it, by its truth value

# --- Memory

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
    refused(opt, ValueError, 'parameter 0 of group 1', 'shares its memory with parameter 0 of group 0')

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
def test_state_turned_in_place(case):
    opts = [trained(case, 3) for _ in range(2)]
    for st in opts[1].state.values():
        for k,v in st.items():
            if isinstance(v, Tensor) and v.shape == (2,2): v.t_(); st[k].copy_(v.t().clone())  # the same values, in another order in memory
    for i in range(3):
        for o in opts: new_grads(o.all_params().itemgot(0), i); o.step()
    for p,q in zip(*(o.all_params().itemgot(0) for o in opts)): assert torch.equal(p, q)

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

def test_many_gradients_among_parameters():
    "Quickly: columns of one matrix, gradients too"
    n,b = 400,torch.randn(40, 800)
    ps = [nn.Parameter(b[:,i]) for i in range(n)]
    for i,p in enumerate(ps): p.grad = b[:,n+i]
    opt = EIGHT[2].make(ps, True)
    start = perf_counter()
    opt.step()
    assert perf_counter()-start < 2

@every
@pytest.mark.parametrize('steps', [0,2])
def test_gradient_in_written_memory(case, steps):
    opt = trained(case, steps)
    (p,q),(r,) = opt.param_lists
    for what,g in dict(itself=p.data, turned=p.data.view(4,3).t().t().view(3,4), other=torch.empty_like(p)).items():
        old,p.grad = p.grad,g
        if what == 'other':
            p.grad,r.data = old,torch.ones(20, dtype=torch.float64)[3:7].view(2,2)
            mine,r.grad = r.grad,r.data._base[5:9].view(2,2) if r.data._base is not None else r.data.view(2,2)
            refused(opt, ValueError, 'gradient of parameter 0 of group 1', 'clone()')
            r.grad = mine
        else: refused(opt, ValueError, 'gradient of parameter 0 of group 0', 'lies in the memory of parameter 0 of group 0', 'clone()')
        p.grad = old
    opt.step()
    tensors = [(n,v) for n,v in opt.state[p].items() if isinstance(v, Tensor) and v.shape == p.shape]
    for n,v in tensors:
        old,p.grad = p.grad,v
        refused(opt, ValueError, 'gradient of parameter 0 of group 0', f'state `{n}`')
        p.grad = old
    opt.step()

@pytest.mark.parametrize('case', [c for c in ALL if c.jit is not ranger_jit], ids=str)
def test_shared_state(case):
    opt = trained(case, 2)
    (p,q),_ = opt.param_lists
    q.data,q.grad = torch.ones_like(p),torch.ones_like(p)
    name = opt.state_names[0]
    opt.state[q] = {k:v.clone() if isinstance(v, Tensor) and k != name else v for k,v in opt.state[p].items()}
    refused(opt, ValueError, f'state `{name}`', 'shares its memory with', 'parameter 1 of group 0', 'parameter 0 of group 0')
    opt.state[q] = opt.state[p]
    refused(opt, ValueError, 'parameter 1 of group 0', 'parameter 0 of group 0', 'one and the same dict')
    opt.state[q] = {k:v.clone() if isinstance(v, Tensor) else v for k,v in opt.state[p].items()}
    opt.step()

@every
def test_negative_bit(case):
    "Gradients that negate their memory as they are read"
    opts = [trained(case, 1) for _ in range(2)]
    for i in range(4):
        for o in opts: new_grads(o.all_params().itemgot(0), i)
        for p,q in zip(*(o.all_params().itemgot(0) for o in opts)):
            g = q.grad
            if i in (1,2): q.grad = torch._neg_view(-g); assert q.grad.is_neg()
        for o in opts: o.step()
    for p,q in zip(*(o.all_params().itemgot(0) for o in opts)): assert torch.equal(p, q)
    p = opts[1].param_lists[1][0]
    for o in opts: new_grads(o.all_params().itemgot(0), 1); o.step()
    p.grad = torch._neg_view(p.grad)  # the same memory, and now the other way round
    opts[0].param_lists[1][0].grad.neg_()
    for o in opts: o.step()
    assert torch.equal(p, opts[0].param_lists[1][0])

def test_negative_parameter():
    p = nn.Parameter(torch._neg_view(torch.ones(3)))
    p.grad = torch.ones(3)
    refused(EIGHT[0].make([p], True), ValueError, 'parameter 0 of group 0', 'negates its memory')

# --- Arguments

def counted(params:List[Tensor], grads:List[Tensor], lr:float, n:int): torch._foreach_add_(params, grads, alpha=-lr*n)

@pytest.mark.parametrize('make,kw,name', [
    *((larc_jit,dict(clip=v),'clip') for v in ('3',[1],{})), *((adam_jit,dict(decouple_wd=v),'decouple_wd') for v in ('no',[])),
    *((ranger_jit,dict(alpha=v),'alpha') for v in (None,'x','0.5',[0.5],1j)), *((ranger_jit,dict(k=v),'k') for v in ('3',None,2.5,[6])),
    *((partial(JitOptimizer, opt_step=counted),dict(n=v),'n') for v in (2.5,None,'2',2**70))],
    ids=lambda o: 'own step' if isinstance(o, partial) else getattr(o, '__name__', str(o)))
def test_arguments(make, kw, name):
    with pytest.raises(TypeError, match=f'`{name}` has to be'): make(parameters((3,)), lr=0.1, **kw)

def test_truth_values():
    "fastai asks whether, not what"
    for v in (None,0,0.,torch.tensor(False)): assert larc_jit(parameters((3,)), 0.1, clip=v).clip is False
    for v in (1,2.5,torch.tensor(1)): assert larc_jit(parameters((3,)), 0.1, clip=v).clip is True

def test_constants_change():
    "Between steps, too, and with the same checks"
    opt = larc_jit(parameters((3,)), 0.1)
    opt.clip = 'x'
    refused(opt, TypeError, '`clip`', 'true or false')
    opt.clip = None
    opt.step()
    ahead = EIGHT[-1].make(parameters((3,)), True)
    ahead.alpha = 'x'
    refused(ahead, TypeError, '`alpha`', 'a number')
    ahead.alpha,ahead.k = 0.5,'2'
    refused(ahead, TypeError, '`k`', 'a whole number')

@every
def test_load_what_is_no_state_dict(case):
    opt = trained(case, 1)
    before = snapshot(opt)
    for sd in (None,'x.pth',3,[{}]):
        with pytest.raises(TypeError, match='takes a dict, as `opt.state_dict'): opt.load_state_dict(sd)
    for sd in (dict(state=None, hypers=None), dict(state={}, hypers=[{}])):
        with pytest.raises(ValueError, match='has to be a list'): opt.load_state_dict(sd)
    if case.jit is ranger_jit:
        for slow in (5,[5],[None,None],torch.ones(3)):
            with pytest.raises(ValueError, match='`slow_weights` have to be lists'): opt.load_state_dict({**opt.state_dict(), 'slow_weights':slow})
    with pytest.raises(ValueError, match='lack'): opt.load_state_dict({**opt.state_dict(), 'hypers':[{1:2, 'a':3}]*2})
    same(snapshot(opt), before)

# --- Lookahead and late steps

def test_frozen_tied_parameter():
    "Twice in the groups, it looks ahead twice"
    opts = []
    for jit in (False,True):
        p,q = parameters((3,), (2,), dtype=torch.float64)
        p.grad = None
        opt = EIGHT[-1].make([p,q,p], jit, k=1, alpha=0.5)
        opt.step()
        with torch.no_grad(): p.add_(1.)  # fast weights leave the slow ones
        for _ in range(3): q.grad = torch.ones_like(q); opt.step()
        opts.append(p)
    close(opts[1], opts[0], 1e-12)

@pytest.mark.parametrize('order', [(0,1),(1,0)])
def test_frozen_view_of_a_trained_parameter(order):
    "Both look ahead, in the order in which they stand"
    opts = []
    for jit in (False,True):
        u = nn.Parameter(torch.ones(4, dtype=torch.float64))
        ps = [nn.Parameter(u.data[1:3]),u]
        opt = EIGHT[-1].make([ps[i] for i in order], jit, k=1, alpha=0.3)
        for i in range(8):
            u.grad = torch.ones_like(u) if i < 5 else None
            opt.step()
        opts.append((u,opt))
    (p,native),(q,ours) = opts
    close(q, p, 1e-12)
    for a,b in zip(native.slow_weights, ours.slow_weights): [close(y, x, 1e-12) for x,y in zip(a,b)]

@pytest.mark.parametrize('case', [c for c in ALL if 'step' in c.step.args], ids=str)
def test_averages_that_cannot_be_debiased(case):
    "fastai divides by zero, in the middle of a step"
    for name in ('mom','sqr_mom'):
        opt = trained(case, 0)
        opt.step()
        opt.set_hyper(name, -1.)  # 1 - (-1)**2
        before = snapshot(opt)
        with pytest.raises(Exception, match='must not be 1'): opt.step()
        same(snapshot(opt), before)
    opt = trained(case, 1)
    for n in (-1,2**63):
        opt.state[opt.param_lists[1][0]]['step'] = n
        refused(opt, TypeError, '`step`', 'parameter 0 of group 1', str(n))

@pytest.mark.parametrize('case', [c for c in CASES if 'step' in c.step.args], ids=str)
def test_late_steps(case):
    "From 2**24 on float32 cannot count: with averages that are still on their way then"
    opts = []
    for jit in (False,True):
        ps = parameters((5,), (40,), dtype=torch.float64)
        opt = case.make(ps, jit)
        opt.step()
        for p in ps: opt.state[p]['step'] = 2**24 - 2
        opt.set_hypers(mom=1-1e-8, sqr_mom=1-1e-7)
        for i in range(6): new_grads(ps, i); opt.step()
        opt.ps = ps
        opts.append(opt)
    for p,q in zip(*(o.ps for o in opts)): close(q, p, TOL[torch.float64])
    same_state(opts[1], opts[0], TOL[torch.float64])

# --- One number for each parameter

def counting(params:List[Tensor], grads:List[Tensor], moved:Tensor, lr:float):
    "Keeps how far each parameter has gone"
    torch._foreach_add_(params, grads, alpha=-lr)
    moved.add_(lr*torch.stack(torch._foreach_norm(grads)))

def test_numbers(monkeypatch):
    "In batches, for parameters that come late, with a state that was loaded, and as numbers"
    monkeypatch.setattr(bucket, 'batch_size', 100)
    ps = parameters(*[(7,)]*9, dtype=torch.float64)
    opt,gone = JitOptimizer([ps[:5],ps[5:]], counting, lr=[0.1,0.2]),[0.]*9
    for i in range(6):
        new_grads(ps, i)
        if i < 3: ps[4].grad = None
        for j,p in enumerate(ps): gone[j] += 0. if p.grad is None else [0.1,0.2][j>4]*p.grad.norm().item()
        opt.step()
        if i == 3:
            sd = deepcopy(opt.state_dict())
            sd['state'][0]['moved'] = float(sd['state'][0]['moved'])
            opt = JitOptimizer([ps[:5],ps[5:]], counting, lr=0.)
            opt.load_state_dict(sd)
        if i == 4: opt = deepcopy((opt,ps)); ps,opt = opt[1],opt[0]
    for p,n in zip(ps, gone):
        v = opt.state[p]['moved']
        assert v.dim() == 0 and v.dtype == p.dtype and v.item() == pytest.approx(n)
    opt.state[ps[0]]['moved'] = torch.ones(3)
    refused(opt, TypeError, 'State `moved` of parameter 0 of group 0', 'one number')

def test_numbers_of_any_shape():
    "One element, in whatever form: a state that was edited or loaded"
    ps = parameters((3,), (4,))
    opt = larc_jit(ps, 0.1)
    opt.step()
    for v in (torch.ones(1),torch.ones(1,1).double(),np.float32(0.1),1,True):
        opt.state[ps[1]]['local_lr'] = v
        opt.step()
        assert opt.state[ps[1]]['local_lr'].shape == ()

def test_numbers_need_whole_tensors():
    with pytest.raises(TypeError, match='counting.*elementwise.*moved'): jit_step(counting, elementwise=True)

# --- The engine in rooms of its own: what an adversary found

@every
def test_plan_is_kept(case):
    "From its second step on an optimizer goes by one plan, also over lookaheads"
    opt = trained(case, 1)
    plan = opt._plan
    for i in range(13):
        new_grads(opt.all_params().itemgot(0), i)
        opt.step()
        assert opt._plan is plan, i

def capped(params:List[Tensor], grads:List[Tensor], lr:float):
    "Waits for what it writes"
    torch._foreach_add_(params, grads, alpha=-lr)
    for p in params:
        while bool(p.norm() > 1.): p.mul_(0.5)

def test_step_that_waits_for_its_own_write():
    p = nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    JitOptimizer([p], jit_step(capped, elementwise=True), lr=0.1).step()
    assert p.tolist() == pytest.approx([0.45]*4)

def late_list(params:List[Tensor], grads:List[Tensor], step:int, lr:float):
    if step > 9: grads = torch._foreach_mul(grads, 0.5)
    torch._foreach_add_(params, grads, alpha=-lr)

def test_allocates_late(monkeypatch):
    "A step of one's own gets batches, as nobody knows what it does later"
    for m in (bucket,plan): monkeypatch.setattr(m, 'batch_size', 2**10)
    ps = [nn.Parameter(torch.randn(2**12)) for _ in range(8)]
    opt = JitOptimizer(ps, jit_step(late_list, elementwise=True), lr=0.1)
    for i in range(10): new_grads(ps, i); opt.step()
    assert peak_memory(opt.step) < 3*2**12

def test_constants_of_a_copy():
    opt = larc_jit([nn.Parameter(torch.ones(2))], 0.1)
    other = copy(opt)
    other.clip = False
    assert opt.clip and not other.clip and opt.consts != other.consts
    class Own(JitOptimizer): decouple_wd = True
    with pytest.raises(TypeError, match='`decouple_wd`.*attribute of `Own`'): Own([nn.Parameter(torch.ones(2))], adam_jit_step, lr=0.1)

def test_shared_empty_state():
    opt = trained(EIGHT[2], 0)
    p,q,*_ = opt.all_params().itemgot(0)
    opt.state[p] = opt.state[q] = {}
    with pytest.raises(ValueError, match='one and the same dict'): opt.step()

@pytest.mark.parametrize('n', [True,1.])
def test_step_count_of_another_type(n):
    opt = trained(EIGHT[2], 1)
    opt.state[opt.param_lists[0][0]]['step'] = n
    with pytest.raises(TypeError, match='whole number'): opt.step()

@pytest.mark.parametrize('wd', [0.01,9.,99.,99.9,100.,150.])
@pytest.mark.parametrize('value', [1.,float('inf')])
def test_large_lamb(wd, value):
    "A tensor by itself, whose decay is part of the update: at any decay, and with an infinite element"
    torch.manual_seed(0)
    start = torch.randn(600,600)
    start[3,3] = value
    ps = [nn.Parameter(start.clone()) for _ in range(2)]
    truth = nn.Parameter(start.double())
    opts = [f([p], lr=0.01, wd=wd) for f,p in ((Lamb,ps[0]),(lamb_jit,ps[1]),(Lamb,truth))]
    for i in range(3):
        g = torch.randn(600,600)
        for p,o in zip((*ps,truth), opts): p.grad = g.to(p.dtype); o.step()
    assert torch.equal(ps[0].isfinite(), ps[1].isfinite()) and torch.equal(ps[0].isnan(), ps[1].isnan())
    there = truth.isfinite()
    if not there.any(): return  # 0 times infinity, everywhere, in both
    off = [(p.double()-truth)[there].abs().max()/truth[there].abs().max() for p in ps]
    assert off[1] <= max(4*off[0], 1e-6)

# --- JitLookahead around an optimizer

def looks_ahead(native, ps, **kw): return Lookahead(native(ps, **kw), k=2)

def test_lookahead_around_ours():
    "fastai's `Lookahead` around one of ours is neither fastai's nor ours"
    f = lambda ps, **kw: Lookahead(adam_jit(ps, **kw), k=2)
    for jit in (True,False):
        with pytest.raises(TypeError, match='`Lookahead` around `adam_jit_step`, for which there is `JitLookahead`'): learner._counterpart(f, jit)
        with pytest.raises(TypeError, match='`Lookahead` around `adam_jit_step`'): learner._converted(f(parameters((2,)), lr=0.1), jit)

def test_partial_of_function():
    "Is tried with its arguments"
    f = jit_opt(partial(looks_ahead, Adam, mom=0.5))
    opt = f([parameters((2,))], lr=0.1)
    assert type(opt) is JitLookahead and opt.opt_step is adam_jit_step and opt.k == 2 and opt.hypers[0]['mom'] == 0.5
    own = partial(JitOptimizer, opt_step=lion_jit_step, mom=0.9, avg_mom=0.99, wd=0.)
    assert jit_opt(own) is own
    with pytest.raises(TypeError, match='has no counterpart'): jit_opt(partial(looks_ahead, ranger))

def test_around():
    "Takes over hypers of each group, also odd ones, state, and what is frozen; nothing else is taken"
    ps = [parameters((2,)),parameters((3,))]
    opt = adam_jit(ps, [0.1,0.2]); opt.step(); opt.freeze_to(1)
    del opt.hypers[1]['eps']
    opt.hypers[0]['note'] = 1
    res = JitLookahead(opt, k=3)
    assert [dict(h) for h in res.hypers] == [dict(h) for h in opt.hypers] and res.frozen_idx == 1 and res.state is opt.state
    for args,kw in (((6,.5),{}), ((),dict(decouple_wd=False)), ((),dict(lr=0.1))):
        with pytest.raises(TypeError, match='takes an optimizer as it is, with `k` and `alpha` by name'): JitLookahead(opt, *args, **kw)
    for bad in (ps,Adam(ps, 0.1)):
        with pytest.raises(TypeError, match='needs a step function, or one of our optimizers'): JitLookahead(bad)

def test_alpha_is_checked_first():
    opt = JitLookahead(adam_jit(parameters((2,)), 0.1), k=1)
    opt.step(); before = [p.clone() for p in opt.param_lists[0]]
    opt.alpha = 'x'
    with pytest.raises(TypeError, match='`alpha`'): opt.step()
    assert all(map(torch.equal, before, opt.param_lists[0])) and opt.count == 1

def test_interrupted_lookahead(monkeypatch):
    "Counts as taken, as in fastai"
    opt = JitLookahead(adam_jit(parameters((2,)), 0.1), k=2)
    opt.step()
    monkeypatch.setattr('fastxtend_jit.optimizer._look_ahead', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): opt.step()
    assert opt.count == 2

def test_slow_weights_in_another_order():
    "Are laid out like their parameter, so that a lookahead needs no scratch as large as a tensor"
    p = nn.Parameter(torch.randn(64, 128, 40, 10).to(memory_format=torch.channels_last))
    opt = JitLookahead(sgd_jit([p], 0.1), k=1)
    opt.slow_weights = [[p.detach().contiguous()]]
    p.grad = torch.randn_like(p)
    opt.step()
    assert opt.slow_weights[0][0].stride() == p.stride()
    assert opt.explain()['scratch, MiB'].max() < 4
    with Calls() as real: opt.step()
    assert opt.explain()['ATen calls'].sum() == real.calls.total()

@pytest.mark.parametrize('dtype', [torch.float16,torch.float32], ids=str)
def test_stableadam_does_not_care_for_company(dtype):
    "A tensor takes the same step by itself and beside others, also where small squares vanish in float16, and where decay takes all"
    for wd in (0.,100.):
        res = []
        for n in (1,2):
            ps = [nn.Parameter(torch.ones(40, 30, dtype=dtype)) for _ in range(n)]
            opt = stableadam_jit(ps, 0.01, wd=wd)
            for p in ps: p.grad = torch.ones_like(p); p.grad[0] = 3e-4
            opt.step()
            res.append(ps[0].detach().double())
        assert (res[0]-res[1]).abs().max() <= 4*torch.finfo(dtype).eps
