"A user's own step is as good as ours: what its signature may be, which names it may use, what it may do"
import copy,gc,importlib.util,pickle,sys,warnings,weakref
from functools import wraps
from typing import List,Optional

import numpy as np
import pytest
import torch
from torch import Tensor,nn

from fastxtend_jit.step import jit_step
from tests import engine
from tests.cases import *
from tests.support import new_grads,parameters,refused,same,same_grads,slow_but,snapshot

# --- Lion (https://arxiv.org/abs/2302.06675), as a plain function and compiled by PyTorch

def lion_step(params:List[Tensor], grads:List[Tensor], grad_avg:List[Tensor], lr:float, mom:float, sqr_mom:float,
              wd:float, do_wd:bool):
    "A step of Lion"
    if do_wd: torch._foreach_mul_(params, 1 - lr*wd)
    update = torch._foreach_add(torch._foreach_mul(grad_avg, mom), grads, alpha=1-mom)
    torch._foreach_add_(params, torch._foreach_sign(update), alpha=-lr)
    torch._foreach_mul_(grad_avg, sqr_mom)
    torch._foreach_add_(grad_avg, grads, alpha=1-sqr_mom)

def lion(params, lr, mom=0.9, sqr_mom=0.99, wd=0.):
    return JitOptimizer(params, STEP[0], lr=lr, mom=mom, sqr_mom=sqr_mom, wd=wd)
STEP = [lion_step]

with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    OWN = dict(plain=lion_step, decorated=jit_step(lion_step), pieces=jit_step(elementwise=True)(lion_step),
               scripted=torch.jit.script(lion_step))

@pytest.mark.parametrize('own', OWN)
def test_own_step(own, monkeypatch):
    "Against Lion by hand: groups, decay off, a schedule, a parameter that comes late, a checkpoint in between"
    monkeypatch.setattr(sys.modules[__name__], 'STEP', [OWN[own]])
    torch.manual_seed(0)
    ps = [nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in ((3,4),(5,),(2,2))]
    ref,avg = [p.detach().clone() for p in ps],[torch.zeros_like(p) for p in ps]
    opt = lion([ps[:2],ps[2:]], [0.1,0.2], wd=0.1)
    opt.state[ps[1]]['do_wd'] = False
    assert opt.state[ps[0]] == {}
    for i in range(10):
        lrs,mom = [0.1/(i+1),0.2/(i+1)],0.95-0.01*i
        opt.set_hyper('lr', lrs); opt.set_hyper('mom', mom)
        for n,(p,r,m) in enumerate(zip(ps, ref, avg)):
            if n == 2 and i < 3: continue
            p.grad = torch.randn_like(p)
            lr = lrs[n//2]
            if n != 1: r.mul_(1 - lr*0.1)
            r.sub_(lr*torch.sign(mom*m + (1-mom)*p.grad))
            m.mul_(0.99).add_(p.grad, alpha=0.01)
        opt.step()
        if i == 5:
            sd = copy.deepcopy(opt.state_dict())
            opt = lion([ps[:2],ps[2:]], 0.)
            opt.load_state_dict(sd)
    for n,(p,r,m) in enumerate(zip(ps, ref, avg)):
        close(p, r, 1e-11)
        close(opt.state[p]['grad_avg'], m, 1e-11)
        assert opt.state[p].keys() == {'grad_avg', *['do_wd']*(n==1)}
    if own == 'plain':
        loaded,ps = pickle.loads(pickle.dumps((opt, ps)))
        assert loaded.opt_step.fn is lion_step and {*loaded.state} == {*ps}
    opt = copy.deepcopy(opt)
    opt.clear_state()

# --- Signatures that do not fit

def no_params(lr:float): pass
def no_grads(params:List[Tensor], lr:float): pass
def swapped(grads:List[Tensor], params:List[Tensor], lr:float): pass
def one_tensor(params:Tensor, grads:Tensor, lr:float): pass
def no_annotation(params:List[Tensor], grads:List[Tensor], lr): pass
def tensor_hyper(params:List[Tensor], grads:List[Tensor], lr:Tensor): pass
def text(params:List[Tensor], grads:List[Tensor], mode:str): pass
def one_average(params:List[Tensor], grads:List[Tensor], grad_avg:Optional[Tensor], lr:float): pass
def keyword_only(params:List[Tensor], grads:List[Tensor], *, lr:float): pass
def varargs(params:List[Tensor], grads:List[Tensor], *lr:float): pass
def kwargs(params:List[Tensor], grads:List[Tensor], **lr:float): pass
def float_step(params:List[Tensor], grads:List[Tensor], step:float): pass
def int_do_wd(params:List[Tensor], grads:List[Tensor], do_wd:int): pass
def float_fused(params:List[Tensor], grads:List[Tensor], fused:float): pass

FIRST = ['first two arguments', '`params: List[Tensor], grads: List[Tensor]`']
@pytest.mark.parametrize('f,parts', [
    (no_params,FIRST), (no_grads,FIRST), (swapped,FIRST), (one_tensor,FIRST),
    (no_annotation, ['`lr`','not annotated','`float`']), (tensor_hyper, ['`lr`','Tensor','`float`']),
    (text, ['`mode`','str','`float`']), (one_average, ['`grad_avg`','`Optional[List[Tensor]]`']),
    (keyword_only,  ['`lr`','positional']), (varargs, ['`lr`','positional']), (kwargs, ['`lr`','positional']),
    (float_step, ['`step`','`int`','float']), (int_do_wd, ['`do_wd`','`bool`','int']),
    (float_fused, ['`fused`','`bool`','float']),
], ids=lambda o: getattr(o, '__name__', ''))
def test_signature(f, parts):
    with pytest.raises(TypeError) as e: JitOptimizer([nn.Parameter(torch.ones(2))], f, lr=0.1)
    for o in (f.__name__,*parts): assert o in str(e.value)

def bare(params:List[Tensor], grads:List[Tensor], mode:str): pass
def test_signature_of_script_function():
    "The same for a function that PyTorch has compiled"
    with pytest.raises(TypeError, match='`mode` has to be annotated'):
        JitOptimizer([nn.Parameter(torch.ones(2))], torch.jit.script(bare), lr=0.1)

def clipped(params:List[Tensor], grads:List[Tensor], lr:float, clip:bool):
    torch._foreach_add_(params, grads, alpha=-lr)
def test_constant_is_needed():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match='`clipped` needs `clip`: pass it to the optimizer, as `clip=…`'):
        JitOptimizer([p], clipped, lr=0.1)
    assert JitOptimizer([p], clipped, lr=0.1, clip=False).clip is False

def mistaken(params:List[Tensor], grads:List[Tensor], lr:float): torch._foreach_ad_(params, grads, alpha=-lr)
def test_mistake_in_the_body():
    "It shows where the optimizer is made"
    with pytest.raises(RuntimeError, match='_foreach_ad_'):
        JitOptimizer([nn.Parameter(torch.ones(2))], mistaken, lr=0.1)

# --- Names of arguments

NAMES = ('frozen_idx count _i i a0 k range len _step over fn hypers state cbs state_names param_lists set_hyper _plan '
         'zero_grad clear_state state_dict all_params explain step_fn train_bn opt_step self alpha slow_weights '
         'decouple lr_ defaults freeze closure bucket names args do_wd force_train p group print float torch_').split()

HEADS = dict(const='{n}:int', hyper='{n}:float', state='{n}:List[Tensor]', option='{n}:Optional[List[Tensor]]',
             number='{n}:Tensor')
_moves  = 'torch._foreach_add_({n}, 3.); torch._foreach_addcmul_(params, grads, {n}, -lr)'
_scales = 'torch._foreach_add_(params, grads, alpha=-lr*{n})'
BODIES = dict(const=_scales, hyper=_scales, state=_moves, option=f'if {{n}} is not None: {_moves}',
              number='{n}.add_(3.); torch._foreach_add_(params, torch._foreach_mul(grads, {n}.unbind()), alpha=-lr)')
AHEAD_TOO = ', slow_weights:List[Tensor], alpha:float, lookahead:bool'

def source(kind, n, ahead):
    "A step with one argument of this name and kind"
    args = f"params:List[Tensor], grads:List[Tensor], {HEADS[kind].format(n=n)}{AHEAD_TOO*ahead}, lr:float"
    looks = '    if lookahead: torch._foreach_lerp_(slow_weights, params, alpha)\n'
    return f"\ndef {kind}_{n}{'_ahead'*ahead}({args}):\n    {BODIES[kind].format(n=n)}\n{looks*ahead}"

@pytest.fixture(scope='module')
def named(tmp_path_factory):
    "Steps with one argument of each name and kind: TorchScript wants their source in a file"
    path = tmp_path_factory.mktemp('named')/'named_steps.py'
    src = ['from typing import List,Optional\nimport torch\nfrom torch import Tensor\n']
    src += [source(kind, n, ahead) for kind in HEADS for n in NAMES for ahead in (False,True)
            if not (ahead and n in ('alpha','slow_weights'))]
    path.write_text(''.join(src))
    spec = importlib.util.spec_from_file_location('named_steps', path)
    mod = importlib.util.module_from_spec(spec)
    sys.modules['named_steps'] = mod
    spec.loader.exec_module(mod)
    return mod

@pytest.mark.parametrize('ahead', slow_but([False], [False,True]))
@pytest.mark.parametrize('kind', HEADS)
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
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.freeze_to(0)
    p.grad = torch.ones(2)
    opt.step()
    opt.explain()
    opt.clear_state()
    assert copy.deepcopy(opt).hypers[0]['lr'] == 0.1
    assert name not in given or kind == 'const' and getattr(opt, name) == 3 or opt.hypers[0].get(name) == 3

def whole_lr(params:List[Tensor], grads:List[Tensor], lr:int): torch._foreach_add_(params, grads, alpha=-lr)
def greek(params:List[Tensor], grads:List[Tensor], lr:float, β:float):
    torch._foreach_add_(params, grads, alpha=-lr*β)
def test_names_of_the_wrong_kind():
    with pytest.raises(TypeError, match='`lr` is annotated.*annotate it `float`'):
        JitOptimizer(parameters((2,)), whole_lr, lr=1)
    with pytest.raises(TypeError, match='`β`.*ASCII'): JitOptimizer(parameters((2,)), greek, lr=1., β=1.)

# --- What a step may do

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

def divided(params:List[Tensor], grads:List[Tensor], lr:float): torch._foreach_add_(params, grads, alpha=-1/lr)
def test_check_raises(monkeypatch):
    "A step's own check sees the numbers of all groups before the first is written to"
    engine.use_batches_of(monkeypatch, 100)
    ps = [[nn.Parameter(torch.ones(10)) for _ in range(30)] for _ in range(2)]
    opt = JitOptimizer(ps, jit_step(divided, elementwise=True, check=lambda lr: 1/lr), lr=[0.1,0.])
    same_grads([opt], 0)
    before,threads = snapshot(opt),torch.get_num_threads()
    with pytest.raises(ZeroDivisionError): opt.step()
    assert same(snapshot(opt), before)
    assert torch.get_num_threads() == threads

# --- One number for each parameter

def counting(params:List[Tensor], grads:List[Tensor], moved:Tensor, lr:float):
    "Keeps how far each parameter has gone"
    torch._foreach_add_(params, grads, alpha=-lr)
    moved.add_(lr*torch.stack(torch._foreach_norm(grads)))

def test_numbers(monkeypatch):
    "In batches, for parameters that come late, with a state that was loaded, and as numbers"
    engine.use_batches_of(monkeypatch, 100)
    ps = parameters(*[(7,)]*9, dtype=torch.float64)
    opt,gone = JitOptimizer([ps[:5],ps[5:]], counting, lr=[0.1,0.2]),[0.]*9
    for i in range(6):
        new_grads(ps, i)
        if i < 3: ps[4].grad = None
        for j,p in enumerate(ps): gone[j] += 0. if p.grad is None else [0.1,0.2][j>4]*p.grad.norm().item()
        opt.step()
        if i == 3:
            sd = copy.deepcopy(opt.state_dict())
            sd['state'][0]['moved'] = float(sd['state'][0]['moved'])
            opt = JitOptimizer([ps[:5],ps[5:]], counting, lr=0.)
            opt.load_state_dict(sd)
        if i == 4: opt,ps = copy.deepcopy((opt,ps))
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

def forgetful(params:List[Tensor], grads:List[Tensor], grad_avg:List[Tensor], lr:float, mom:float):
    grad_avg = [m*mom + g for m,g in zip(grad_avg, grads)]
    torch._foreach_add_(params, grad_avg, alpha=-lr)
def forgets_a_number(params:List[Tensor], grads:List[Tensor], size:Tensor, lr:float):
    size = size + 1.
    torch._foreach_add_(params, grads, alpha=-lr)
def forgets_at_times(params:List[Tensor], grads:List[Tensor], grad_avg:List[Tensor], lr:float, beta:float):
    if beta > 0.: torch._foreach_lerp_(grad_avg, grads, 1-beta)
    torch._foreach_add_(params, grads, alpha=-lr)

def forgets_a_pair(params:List[Tensor], grads:List[Tensor], grad_avg:List[Tensor], lr:float):
    n,grad_avg = lr,[m*0.9 + g for m,g in zip(grad_avg, grads)]
    torch._foreach_add_(params, grad_avg, alpha=-n)
def forgets_items(params:List[Tensor], grads:List[Tensor], grad_avg:List[Tensor], lr:float):
    for i in range(len(params)): grad_avg[i] = grad_avg[i]*0.9 + grads[i]
    torch._foreach_add_(params, grad_avg, alpha=-lr)
def forgets_and_extends(params:List[Tensor], grads:List[Tensor], grad_avg:List[Tensor], lr:float):
    torch._foreach_add_(params, grads, alpha=-lr)
    grad_avg += grads

LOST = [(forgetful,'grad_avg',dict(mom=0.9),r'grad_avg = \[m \* mom',r'torch._foreach_mul_\(grad_avg'),
        (forgets_a_number,'size',{},r'size = size \+ 1',r'size.copy_\('),
        (forgets_a_pair,'grad_avg',{},r'n, grad_avg = \(',r'torch._foreach_mul_\(grad_avg'),
        (forgets_items,'grad_avg',{},r'grad_avg\[i\] = ',r'torch._foreach_mul_\(grad_avg'),
        (forgets_and_extends,'grad_avg',{},r'grad_avg \+= grads`',r'torch._foreach_mul_\(grad_avg')]
@pytest.mark.parametrize('f,name,hypers,by,mend', LOST, ids=lambda o: getattr(o, '__name__', ''))
def test_state_is_lost(f, name, hypers, by, mend):
    "A state that an assignment replaces is named when the optimizer is made, or at the first step with all hypers"
    says = f'`{f.__name__}` never changes its state `{name}`. The assignment `{by}.*in place, as by `{mend}'
    with pytest.raises(RuntimeError, match=says): JitOptimizer(parameters((2,)), f, lr=0.1, **hypers)
    if not hypers: return
    ps = parameters((2,))
    opt = JitOptimizer(ps, f, lr=0.1)
    opt.set_hypers(**hypers)
    refused(opt, RuntimeError, f'never changes its state `{name}`')

def test_state_for_other_hypers():
    "A state that some hypers have no use for is none that is lost"
    JitOptimizer(parameters((2,)), forgets_at_times, lr=0.1, beta=0.).step()

# Right steps that write a state only where no trial comes, and what shows that they do

def for_a_constant(params:List[Tensor], grads:List[Tensor], sqr_avg:List[Tensor], seen:List[Tensor], lr:float,
                   ams:bool):
    torch._foreach_addcmul_(sqr_avg, grads, grads, 0.1)
    if ams: torch._foreach_maximum_(seen, sqr_avg)
    torch._foreach_add_(params, grads, alpha=-lr)
def each_13th(params:List[Tensor], grads:List[Tensor], seen:List[Tensor], step:int, lr:float):
    if step%13 == 0: torch._foreach_copy_(seen, params)
    torch._foreach_add_(params, grads, alpha=-lr)
def from_late_on(params:List[Tensor], grads:List[Tensor], seen:List[Tensor], step:int, lr:float, start:int=10**9):
    if step > start: torch._foreach_lerp_(seen, params, 0.1)
    torch._foreach_add_(params, grads, alpha=-lr)
def for_bfloat16(params:List[Tensor], grads:List[Tensor], seen:List[Tensor], lr:float):
    for i in range(len(params)):
        if params[i].dtype == torch.bfloat16: seen[i].add_(grads[i])
        params[i].add_(grads[i], alpha=-lr)
def for_images(params:List[Tensor], grads:List[Tensor], seen:List[Tensor], lr:float):
    for i in range(len(params)):
        if params[i].dim() == 4: seen[i].lerp_(grads[i], 0.1)
        params[i].add_(grads[i], alpha=-lr)
def for_large_ones(params:List[Tensor], grads:List[Tensor], seen:List[Tensor], lr:float):
    for i in range(len(params)):
        if params[i].numel() > 1000: seen[i] += grads[i]
        params[i].add_(grads[i], alpha=-lr)
def counts_nan(params:List[Tensor], grads:List[Tensor], seen:Tensor, lr:float):
    if bool(torch.isnan(grads[0]).any()): seen += 1.
    torch._foreach_add_(params, grads, alpha=-lr)
def only_reads(params:List[Tensor], grads:List[Tensor], seen:List[Tensor], lr:float):
    torch._foreach_add_(params, grads, alpha=-lr)
    torch._foreach_sub_(params, torch._foreach_sub(params, seen))

RIGHT = {for_a_constant:dict(made=dict(ams=False), then=dict(ams=True)), from_late_on:dict(then=dict(start=0)),
         each_13th:dict(n=13), counts_nan:dict(grad=float('nan')), for_bfloat16:dict(dtype=torch.bfloat16),
         for_images:dict(shape=(2,1,1,1)), for_large_ones:dict(shape=(1001,)), only_reads:dict(fill=3.)}
@pytest.mark.parametrize('f', RIGHT, ids=lambda f: f.__name__)
def test_state_that_no_trial_writes(f):
    "Where the source assigns nothing to it: one warning for a step, which goes on to do what it should"
    def steps_of(made={}, then={}, n=1, grad=1., shape=(2,), dtype=torch.float32, fill=None):
        p = nn.Parameter(torch.ones(shape, dtype=dtype))
        opt = JitOptimizer([p], f, lr=0.1, **made)
        for k,v in then.items(): setattr(opt, k, v)
        if fill: opt.state[p]['seen'] = torch.full_like(p, fill)
        for _ in range(n): p.grad = torch.full_like(p, grad); opt.step()
        return p,opt.state[p]['seen']
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        p,seen = [steps_of(**RIGHT[f]) for _ in range(2)][1]
    says = [str(w.message) for w in told if 'in none of its trials' in str(w.message)]
    assert len(says) == 1 and f'`{f.__name__}` changed its state `seen`' in says[0] and seen.abs().sum() > 0
    if f is only_reads: assert p.tolist() == seen.tolist() == [3.,3.]

def from_text():
    "A step without a source"
    made = {**globals()}
    exec("def textual(params:List[Tensor], grads:List[Tensor], seen:List[Tensor], lr:float):\n"
         "    seen = [s+1. for s in seen]\n    torch._foreach_add_(params, grads, alpha=-lr)", made)
    return made['textual']

@pytest.mark.filterwarnings('ignore:.*TorchScript cannot')
def test_state_is_lost_without_a_source(monkeypatch):
    "Nobody sees an assignment: a warning"
    engine.without_torchscript(monkeypatch)
    with pytest.warns(UserWarning, match='`textual` changed its state `seen` in none of its trials'):
        JitOptimizer(parameters((2,)), from_text(), lr=0.1)

def built_in(params:list[Tensor], grads:list[Tensor], grad_avg:list[Tensor]|None, lr:float):
    if grad_avg is not None:
        torch._foreach_add_(grad_avg, grads)
        torch._foreach_add_(params, grad_avg, alpha=-lr)
    else: torch._foreach_add_(params, grads, alpha=-lr)

@pytest.mark.parametrize('kw,moved', [({},0.3), (dict(grad_avg=False),0.2)])
def test_built_in_list(kw, moved):
    "Python's own `list[Tensor]` is as good as `List[Tensor]`"
    p = nn.Parameter(torch.ones(2))
    opt = JitOptimizer([p], built_in, lr=0.1, **kw)
    for _ in range(2): p.grad = torch.ones(2); opt.step()
    assert opt.opt_step.state == opt.opt_step.optional == ['grad_avg'] and p.tolist() == pytest.approx([1-moved]*2)

def test_one_step_a_function():
    "Optimizers that are made of one function share its step, which is compiled and tried once"
    made = [JitOptimizer(parameters((2,)), built_in, lr=0.1).opt_step for _ in range(2)]
    assert made[0] is made[1] is jit_step(built_in) and jit_step(built_in, elementwise=True) is not made[0]

def moved_by(f, **kw):
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    JitOptimizer([p], jit_step(f, **kw), lr=0.1).step()
    return 1-p[0].item()

def plain_sgd(params:List[Tensor], grads:List[Tensor], lr:float): torch._foreach_add_(params, grads, alpha=-lr)

@pytest.mark.parametrize('lazy', [False,True])
@pytest.mark.parametrize('stepped', [plain_sgd,jit_step(plain_sgd),jit_step(plain_sgd, lazy=True)],
                         ids=['plain','step','lazy step'])
def test_function_that_wraps_a_step(stepped, lazy):
    "It runs, and not what it wraps, which has a step already and keeps it"
    of,used = jit_step(stepped, lazy=lazy),moved_by(stepped, lazy=lazy)
    @wraps(stepped)
    def tenfold(params:List[Tensor], grads:List[Tensor], lr:float): torch._foreach_add_(params, grads, alpha=-10*lr)
    assert [moved_by(tenfold, lazy=lazy), moved_by(stepped, lazy=lazy)] == pytest.approx([1.,used])
    step = jit_step(tenfold, lazy=lazy)
    assert step is jit_step(tenfold, lazy=lazy) is not of is jit_step(stepped, lazy=lazy)
    p = torch.ones(2)
    step.compiled([p], [p.clone()], 0.1)
    assert p.tolist() == pytest.approx([0.]*2) and step.is_compiled

class Scaled:
    def __init__(self, by): self.by = by
    def step(self, params:List[Tensor], grads:List[Tensor], lr:float):
        for p,g in zip(params, grads): p.add_(g, alpha=-lr*self.by)

@pytest.mark.filterwarnings('ignore:.*TorchScript cannot')
@pytest.mark.parametrize('lazy', [False,True])
def test_bound_methods(lazy, monkeypatch):
    "Each runs with its own object, which may die. TorchScript cannot compile them"
    if not lazy:
        with pytest.raises(RuntimeError, match='by'): moved_by(Scaled(1).step)
        engine.without_torchscript(monkeypatch)
    made = [Scaled(1),Scaled(10)]
    assert [moved_by(o.step, lazy=lazy) for o in made] == pytest.approx([0.1,1.])
    assert all_die([*made], made) and not vars(Scaled.step)

def all_die(objects, kept):
    "Do all `objects` die once the list `kept` is empty?"
    refs = [*map(weakref.ref, objects)]
    for os in (objects,kept): os.clear()
    gc.collect()
    return refs and not any(r() for r in refs)

def steps_of_a_factory(lazy):
    def averaged(params:List[Tensor], grads:List[Tensor], avg:List[Tensor], lr:float, fused:bool):
        torch._foreach_lerp_(avg, grads, 0.1)
        torch._foreach_add_(params, avg, alpha=-lr)
    ps = parameters((2,))
    opt = JitOptimizer(ps, jit_step(averaged, elementwise=True, lazy=lazy), lr=0.1)
    for n in range(3): new_grads(ps, n); opt.step()
    return opt

@pytest.mark.parametrize('lazy,after', [(False,200),(True,200),(True,2)])
def test_step_dies_with_its_function(lazy, after, monkeypatch):
    "A step made anew for each optimizer: neither it nor what was compiled and tried for it is kept"
    engine.set_compile_after(after, monkeypatch)
    engine.forget_trials(monkeypatch)
    opts = [steps_of_a_factory(lazy) for _ in range(2)]
    compiled = engine.has_compiled(opts[0].opt_step)
    assert compiled == (after == 2 or not lazy) and engine.number_proved() == 2*compiled
    assert engine.faults_found()
    assert all_die([o for opt in opts for o in (opt,opt.opt_step,opt.opt_step.fn)], opts)
    assert not engine.faults_found() and not engine.number_proved()
