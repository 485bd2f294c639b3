"Errors name what is wrong and say what to do, and come before anything has changed"
from copy import deepcopy
from typing import List,Optional

import pytest
import torch
from fastcore.foundation import L
from torch import Tensor,nn
from torch.utils._pytree import tree_flatten

from fastxtend_jit import bucket
from fastxtend_jit.script import jit_step
from tests.cases import *

every = pytest.mark.parametrize('case', ALL, ids=str)

def snapshot(opt):
    "A copy of all that a step or a load may change"
    ps = list(opt.all_params().itemgot(0))
    slow = getattr(opt, 'slow_weights', None)
    return deepcopy(dict(params=[p.detach() for p in ps], grads=[p.grad for p in ps], state=[dict(opt.state[p]) for p in ps], hypers=[dict(sorted(h.items())) for h in opt.hypers],
                         count=getattr(opt, 'count', None), slow=slow and [list(s) for s in slow], frozen=opt.frozen_idx))

def same(a, b):
    "Are two snapshots equal, bit by bit?"
    (xs,form),(ys,other) = tree_flatten(a),tree_flatten(b)
    assert form == other
    for x,y in zip(xs, ys):
        assert type(x) is type(y)
        if not isinstance(x, Tensor): assert x == y
        elif x.is_meta: assert x.shape == y.shape
        else: assert x.dtype == y.dtype and torch.equal(x.to_dense() if x.is_sparse else x, y.to_dense() if y.is_sparse else y)

def new_grads(opts, seed):
    torch.manual_seed(seed)
    for ps in zip(*[o.all_params().itemgot(0) for o in opts]):
        g = torch.randn(ps[0].shape)
        for p in ps: p.grad = g.clone()

def train(opts, seeds):
    for s in seeds:
        new_grads(opts, s)
        for o in opts: o.set_hyper('lr', 0.1/(s+1)); o.step()

def twins(case, steps):
    "Two equal optimizers that have taken `steps` steps and have gradients for the next"
    torch.manual_seed(0)
    ts = [torch.randn(s) for s in ((3,4),(5,),(2,6),(4,))]
    opts = [case.make([ps[:2],ps[2:]], True) for ps in ([nn.Parameter(t.clone()) for t in ts] for _ in range(2))]
    train(opts, range(steps))
    new_grads(opts, 99)
    return opts

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

def sparse(opt, p):
    dense,p.grad = p.grad,p.grad.to_sparse()
    def mend(): p.grad = dense
    return mend

def no_lr(opt, p):
    lr = opt.hypers[1].pop('lr')
    return lambda: opt.hypers[1].update(lr=lr)

LAST = 'parameter 1 of group 1'
BAD = dict(  # what breaks the last parameter, the error, and what its message has to say
    sparse        = (sparse,                                                       TypeError,  [LAST, 'sparse', 'make it dense']),
    complex       = (lambda opt,p: replace(p, p.data+0j),                          TypeError,  [LAST, 'complex', 'view_as_real']),
    integer       = (lambda opt,p: replace(p.requires_grad_(False), p.data.int()),  TypeError,  [LAST, 'torch.int32', 'floating point']),
    float8        = (lambda opt,p: replace(p, p.data.to(torch.float8_e5m2)),       TypeError,  [LAST, 'torch.float8_e5m2', 'floating point']),
    grad_dtype    = (lambda opt,p: replace(p, p.data.double()),                    ValueError, [LAST, 'torch.float32', 'torch.float64', 'compute it again']),
    grad_shape    = (lambda opt,p: replace(p, torch.ones(2,2)),                    ValueError, [LAST, '[4]', '[2, 2]', 'compute it again']),
    expanded      = (lambda opt,p: replace(p, torch.ones(1).expand(4)),            ValueError, [LAST, 'share memory', 'expanded from']),
    state_shape   = (lambda opt,p: put(opt.state[p], 'grad_avg', torch.ones(3)),   ValueError, [LAST, 'grad_avg', '[3]', '[4]', 'clear_state()']),
    state_dtype   = (lambda opt,p: put(opt.state[p], 'grad_avg', torch.ones(4).double()), ValueError, [LAST, 'grad_avg', 'torch.float64', 'clear_state()']),
    state_device  = (lambda opt,p: put(opt.state[p], 'grad_avg', torch.ones(4, device='meta')), ValueError, [LAST, 'grad_avg', 'meta', 'cpu', 'clear_state()']),
    state_type    = (lambda opt,p: put(opt.state[p], 'grad_avg', 3.),              TypeError,  [LAST, 'grad_avg', 'float', 'clear_state()']),
    state_step    = (lambda opt,p: put(opt.state[p], 'step', 1.),                  TypeError,  [LAST, '`step`', 'whole number', '1.0']),
    no_hyper      = (no_lr,                                                        ValueError, ['`lr`', 'group 1', "set_hyper('lr'"]),
    odd_hyper     = (lambda opt,p: put(opt.hypers[1], 'lr', [0.1]),                TypeError,  ['`lr`', 'group 1', 'number', '[0.1]']),
    none_hyper    = (lambda opt,p: put(opt.hypers[1], 'mom', None),                TypeError,  ['`mom`', 'group 1', 'number', 'None']),
)

@every
@pytest.mark.parametrize('steps', [0,5])  # afterwards, Ranger's first step and its lookahead
@pytest.mark.parametrize('what', BAD)
def test_step(case, what, steps):
    "A step that raises has changed nothing, and once the cause is mended, training goes on as if it had never happened"
    harm,err,parts = BAD[what]
    opt,ref = twins(case, steps)
    mend = harm(opt, opt.param_lists[1][1])
    before = snapshot(opt)
    for _ in range(2):
        with pytest.raises(err) as e: opt.step()
        for o in parts: assert o in str(e.value)
        same(snapshot(opt), before)
    mend()
    same(snapshot(opt), snapshot(ref))
    for o in (opt,ref): o.step()
    train([opt,ref], range(7, 14))
    same(snapshot(opt), snapshot(ref))

@every
def test_closure(case):
    opt,_ = twins(case, 2)
    before = snapshot(opt)
    with pytest.raises(NotImplementedError, match='closure.*call `step\\(\\)`'): opt.step(lambda: 1.)
    same(snapshot(opt), before)

@pytest.mark.parametrize('case', [c for c in ALL if 'step' in c.step.args], ids=str)
@pytest.mark.parametrize('hyper', ['mom','sqr_mom'])
def test_no_debiasing(case, hyper):
    "An average that keeps all of the old and takes nothing of the new cannot be debiased: fastai divides by zero"
    opt,ref = twins(case, 5)
    mend = put(opt.hypers[1], hyper, 1.)
    before = snapshot(opt)
    with pytest.raises(Exception, match='must not be 1'): opt.step()
    same(snapshot(opt), before)
    mend()
    for o in (opt,ref): o.step()
    same(snapshot(opt), snapshot(ref))

@every
def test_duplicate(case):
    "One parameter in two groups would take two steps at once"
    p,q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = case.make([[p,q],[p]], True)
    new_grads([opt], 0)
    before = snapshot(opt)
    with pytest.raises(ValueError, match='parameter 0 of group 1 .*twice.*one group only'): opt.step()
    same(snapshot(opt), before)

@every
def test_shared_memory(case):
    "Two parameters in one place: fastai lets each take its step there in turn"
    p,q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = case.make([[p],[q]], True)
    for i in range(2):
        new_grads([opt], i)
        if i: q.data = p.data[:2]; q.grad = torch.ones(2)
        before = snapshot(opt)
        if not i: opt.step(); continue
        with pytest.raises(ValueError, match='parameter 0 of group 1 .*shares its memory with parameter 0 of group 0.*the same one'): opt.step()
        same(snapshot(opt), before)

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

@every
def test_new_group(case):
    opt,_ = twins(case, 1)
    opt.param_lists.append(L([nn.Parameter(torch.ones(2))]))
    before = snapshot(opt)
    with pytest.raises(ValueError, match='3 parameter groups, but hypers for 2.*new optimizer|slow weights for groups of'): opt.step()
    same(snapshot(opt), before)

def test_frozen_lookahead():
    "Slow weights that do not fit a parameter which takes no step, but a lookahead"
    opt,_ = twins(EIGHT[-1], 5)
    p = opt.param_lists[1][1]
    p.grad,p.data = None,torch.ones(2,2)
    before = snapshot(opt)
    with pytest.raises(ValueError, match='`slow_weights` of parameter 1 of group 1'): opt.step()
    same(snapshot(opt), before)

def divided(params:List[Tensor], grads:List[Tensor], lr:float): torch._foreach_add_(params, grads, alpha=-1/lr)
def test_check_raises(monkeypatch):
    "A step's own check sees the numbers of all groups before the first is written to"
    monkeypatch.setattr(bucket, 'batch_size', 100)
    opt = JitOptimizer([[nn.Parameter(torch.ones(10)) for _ in range(30)] for _ in range(2)], jit_step(divided, elementwise=True, check=lambda lr: 1/lr), lr=[0.1,0.])
    new_grads([opt], 0)
    before,threads = snapshot(opt),torch.get_num_threads()
    with pytest.raises(ZeroDivisionError): opt.step()
    same(snapshot(opt), before)
    assert torch.get_num_threads() == threads

@every
def test_empty_parameter(case):
    "A parameter with no element is skipped quietly, as if it were not there"
    ts = [torch.randn(3), torch.empty(0,4), torch.randn(2,2)]
    a,b = ([nn.Parameter(t.clone()) for t in o] for o in (ts, ts[::2]))
    opt,ref = case.make(a, True),case.make(b, True)
    for i in range(7):
        for p,q in zip(a[::2], b): p.grad = torch.randn_like(p); q.grad = p.grad.clone()
        a[1].grad = torch.empty(0,4)
        for o in (opt,ref): o.step()
    for p,q in zip(a[::2], b): assert torch.equal(p, q)
    assert opt.state[a[1]] == {}
    opt.load_state_dict(deepcopy(opt.state_dict()))
    opt.step()

@every
@pytest.mark.parametrize('params', [[], iter([])], ids=['list','iterator'])
def test_no_parameters(case, params):
    with pytest.raises(ValueError, match=r'no parameters: pass `model.parameters\(\)`'): case.make(params, True)

# Step functions whose signature does not fit

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

first = ['first two arguments', '`params: List[Tensor], grads: List[Tensor]`']
@pytest.mark.parametrize('f,parts', [
    (no_params,first), (no_grads,first), (swapped,first), (one_tensor,first),
    (no_annotation, ['`lr`','not annotated','`float`']), (tensor_hyper, ['`lr`','Tensor','`float`']), (text, ['`mode`','str','`float`']),
    (one_average,   ['`grad_avg`','`Optional[List[Tensor]]`']),
    (keyword_only,  ['`lr`','positional']), (varargs, ['`lr`','positional']), (kwargs, ['`lr`','positional']),
    (float_step,    ['`step`','`int`','float']), (int_do_wd, ['`do_wd`','`bool`','int']), (float_fused, ['`fused`','`bool`','float']),
], ids=lambda o: getattr(o, '__name__', ''))
def test_signature(f, parts):
    with pytest.raises(TypeError) as e: JitOptimizer([nn.Parameter(torch.ones(2))], f, lr=0.1)
    for o in (f.__name__,*parts): assert o in str(e.value)

def bare(params:List[Tensor], grads:List[Tensor], mode:str): pass
def test_script_function():
    "The same for a function that PyTorch has compiled"
    with pytest.raises(TypeError, match='`mode` has to be annotated'): JitOptimizer([nn.Parameter(torch.ones(2))], torch.jit.script(bare), lr=0.1)

def clipped(params:List[Tensor], grads:List[Tensor], lr:float, clip:bool): torch._foreach_add_(params, grads, alpha=-lr)
def test_no_constant():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match='`clipped` needs `clip`: pass it to the optimizer, as `clip=…`'): JitOptimizer([p], clipped, lr=0.1)
    assert JitOptimizer([p], clipped, lr=0.1, clip=False).clip is False

def mistaken(params:List[Tensor], grads:List[Tensor], lr:float): torch._foreach_ad_(params, grads, alpha=-lr)
def test_body():
    "A mistake in the step shows where the optimizer is made"
    with pytest.raises(RuntimeError, match='_foreach_ad_'): JitOptimizer([nn.Parameter(torch.ones(2))], mistaken, lr=0.1)

def test_lookahead():
    ps = [nn.Parameter(torch.ones(2))]
    def halfway(params:List[Tensor], grads:List[Tensor], slow_weights:List[Tensor], lr:float): pass
    def own_alpha(params:List[Tensor], grads:List[Tensor], alpha:float, lr:float): pass
    with pytest.raises(TypeError, match=r"halfway` lacks \['alpha', 'lookahead'\]"): JitLookahead(ps, halfway, lr=0.1)
    with pytest.raises(TypeError, match='`alpha`, for `.*own_alpha`, is also the name of an argument'): JitLookahead(ps, own_alpha, lr=0.1)
    opt = adam_jit(ps, 0.1)
    for kw in (dict(mom=0.9), dict(opt_step=adam_jit_step)):
        with pytest.raises(TypeError, match='takes an optimizer as it is'): JitLookahead(opt, **kw)
    with pytest.raises(TypeError, match='`adam_jit_step` already runs with a lookahead'): JitLookahead(JitLookahead(opt))
    for k in (0,-1):
        with pytest.raises(ValueError, match=f'`k` .*at least 1, but is {k}'): ranger_jit(ps, 0.1, k=k)

@pytest.mark.parametrize('steps', [0,5])
def test_slow_weights(steps):
    "Groups that have changed since the slow weights were made; slow weights of another shape"
    opt,ref = twins(EIGHT[-1], steps)
    if not steps: opt.slow_weights = [[p.detach().clone() for p in pg] for pg in opt.param_lists]
    last = opt.slow_weights[1].pop() if isinstance(opt.slow_weights[1], list) else opt.slow_weights[1].items.pop()
    before = snapshot(opt)
    with pytest.raises(ValueError, match=r'\[2, 1\].*\[2, 2\].*clear_state\(\)'): opt.step()
    same(snapshot(opt), before)
    opt.slow_weights[1].append(torch.ones(7))
    before = snapshot(opt)
    with pytest.raises(ValueError, match='`slow_weights` of parameter 1 of group 1'): opt.step()
    same(snapshot(opt), before)
    opt.slow_weights[1][1] = last
    for o in (opt,ref): o.step()
    same(snapshot(opt), snapshot(ref))

# State dicts that do not fit

def drop(*path):
    "Take away what is at `path`"
    def f(sd):
        for k in path[:-1]: sd = sd[k]
        del (sd if isinstance(sd, dict) else sd.items if hasattr(sd, 'items') else sd)[path[-1]]
    return f

def write(v, *path):
    "Put `v` at `path`"
    def f(sd):
        for k in path[:-1]: sd = sd[k]
        sd[path[-1]] = v
    return f

SDS = dict(
    no_state   = (drop('state'),                                        ['no `state`']),
    no_hypers  = (drop('hypers'),                                       ['no `hypers`']),
    groups     = (drop('hypers',1),                                     ['1 parameter groups', 'has 2']),
    counts     = (drop('state',3),                                      ['3 parameters', 'has 4']),
    hyper_key  = (drop('hypers',1,'lr'),                                ['group 1', 'lack lr']),
    shape      = (write(torch.ones(3), 'state',3,'grad_avg'),           [LAST, 'grad_avg', '[3]', '[4]']),
    dtype      = (write(torch.ones(4).double(), 'state',3,'grad_avg'),  [LAST, 'grad_avg', 'torch.float64']),
    type       = (write('x', 'state',3,'grad_avg'),                     [LAST, 'grad_avg', 'str']),
    state_key  = (drop('state',3,'sqr_avg'),                            [LAST, 'no sqr_avg']),
    step_key   = (drop('state',3,'step'),                               [LAST, 'no step']),
    count      = (drop('count'),                                        ['no `count`']),
    slow       = (drop('slow_weights'),                                 ['no `slow_weights`']),
    slow_group = (drop('slow_weights',1),                               ['[2]', '[2, 2]']),
    slow_shape = (write(torch.ones(3), 'slow_weights',1,1),             [LAST, 'slow_weights', '[3]', '[4]']),
)

def has(case, what):
    "Is there that in the state of `case`?"
    if what.startswith('slow') or what == 'count': return case.jit is ranger_jit
    return {'state_key':'sqr_avg', 'step_key':'step'}.get(what, 'params') in case.step.args

@pytest.mark.parametrize('case,what', [(c,w) for w in SDS for c in ALL if has(c, w)], ids=str)
def test_state_dict(case, what):
    "A state dict that does not fit is refused as a whole; the optimizer and the caller's dict stay as they were"
    harm,parts = SDS[what]
    opt,ref = twins(case, 3)
    source,_ = twins(case, 8)
    sd = deepcopy(source.state_dict())
    harm(sd)
    before,given = snapshot(opt),deepcopy(sd)
    with pytest.raises(ValueError) as e: opt.load_state_dict(sd)
    for o in ('left as it was',*parts): assert o in str(e.value)
    same(snapshot(opt), before)
    assert sd.keys() == given.keys()
    train([opt,ref], range(5, 9))
    same(snapshot(opt), snapshot(ref))
