"Errors name what is wrong and say what to do, and come before anything has changed"
from copy import deepcopy

import pytest
import torch
from fastcore.foundation import L
from torch import nn

from tests import engine
from tests.cases import *
from tests.support import (Interrupt,Trap,every,fingerprint,params_of,put,refused,replace,same,snapshot,train,trained,
                           twins)

# --- Faults with a message of ours

def sparse(opt, p):
    dense,p.grad = p.grad,p.grad.to_sparse()
    def mend(): p.grad = dense
    return mend

def no_lr(opt, p):
    lr = opt.hypers[1].pop('lr')
    return lambda: opt.hypers[1].update(lr=lr)

def data(f):  return lambda opt,p: replace(p, f(p.data))
def hyper(k, v): return lambda opt,p: put(opt.hypers[1], k, v)
def state(k, v): return lambda opt,p: put(opt.state[p], k, v)
def integer(opt, p): return replace(p.requires_grad_(False), p.data.int())

LAST = 'parameter 1 of group 1'
BAD = dict(  # what breaks the last parameter, the error, and what its message has to say
    sparse       = (sparse,                              TypeError,  [LAST, 'sparse', 'make it dense']),
    complex      = (data(lambda t: t+0j),                TypeError,  [LAST, 'complex', 'view_as_real']),
    integer      = (integer,                             TypeError,  [LAST, 'torch.int32', 'floating point']),
    float8       = (data(lambda t: t.to(torch.float8_e5m2)), TypeError,
                    [LAST, 'torch.float8_e5m2', 'floating point']),
    grad_dtype   = (data(lambda t: t.double()),          ValueError,
                    [LAST, 'torch.float32', 'torch.float64', 'compute it again']),
    grad_shape   = (data(lambda t: torch.ones(2,2)),     ValueError, [LAST, '[4]', '[2, 2]', 'compute it again']),
    expanded     = (data(lambda t: torch.ones(1).expand(4)), ValueError, [LAST, 'share memory', 'expanded from']),
    state_shape  = (state('grad_avg', torch.ones(3)),    ValueError, [LAST, 'grad_avg', '[3]', '[4]', 'clear_state()']),
    state_dtype  = (state('grad_avg', torch.ones(4).double()), ValueError,
                    [LAST, 'grad_avg', 'torch.float64', 'clear_state()']),
    state_device = (state('grad_avg', torch.ones(4, device='meta')), ValueError,
                    [LAST, 'grad_avg', 'meta', 'cpu', 'clear_state()']),
    state_type   = (state('grad_avg', 3.),               TypeError,  [LAST, 'grad_avg', 'float', 'clear_state()']),
    state_step   = (state('step', 1.),                   TypeError,  [LAST, '`step`', 'whole number', '1.0']),
    no_hyper     = (no_lr,                               ValueError, ['`lr`', 'group 1', "set_hyper('lr'"]),
    odd_hyper    = (hyper('lr', [0.1]),                  TypeError,  ['`lr`', 'group 1', 'number', '[0.1]']),
    none_hyper   = (hyper('mom', None),                  TypeError,  ['`mom`', 'group 1', 'number', 'None']),
)

@every
@pytest.mark.parametrize('steps', [0,5])  # afterwards, Ranger's first step and its lookahead
@pytest.mark.parametrize('what', BAD)
def test_error_says_what(case, what, steps):
    "A step that raises has changed nothing; once the cause is mended, training goes on as if it had never happened"
    if what == 'state_step' and not case.takes('step'): return  # nobody reads it
    harm,err,parts = BAD[what]
    opt,ref = twins(case, steps)
    mend = harm(opt, opt.param_lists[1][1])
    for _ in range(2): refused(opt, err, *parts)
    mend()
    assert same(snapshot(opt), snapshot(ref))
    for o in (opt,ref): o.step()
    train([opt,ref], range(7, 14))
    assert same(snapshot(opt), snapshot(ref))

@every
def test_closure(case):
    opt,_ = twins(case, 2)
    before = snapshot(opt)
    with pytest.raises(NotImplementedError, match='closure.*call `step\\(\\)`'): opt.step(lambda: 1.)
    assert same(snapshot(opt), before)

counting = pytest.mark.parametrize('case', [c for c in ALL if c.takes('step')], ids=str)

@counting
@pytest.mark.parametrize('hyper', ['mom','sqr_mom'])
def test_average_of_nothing_new(case, hyper):
    "It keeps all of the old and cannot be debiased: fastai divides by zero"
    opt,ref = twins(case, 5)
    mend = put(opt.hypers[1], hyper, 1.)
    refused(opt, Exception, 'must not be 1')
    mend()
    for o in (opt,ref): o.step()
    assert same(snapshot(opt), snapshot(ref))

@counting
def test_averages_that_cannot_be_debiased(case):
    "fastai divides by zero, in the middle of a step"
    for name in ('mom','sqr_mom'):
        opt = trained(case, 0)
        opt.step()
        opt.set_hyper(name, -1.)  # 1 - (-1)**2
        refused(opt, Exception, 'must not be 1')
    opt = trained(case, 1, shapes=((3,4),(2,2),(5,)))
    for n in (-1,2**63):
        opt.state[opt.param_lists[1][0]]['step'] = n
        refused(opt, TypeError, '`step`', 'parameter 0 of group 1', str(n))

@pytest.mark.parametrize('n', [True,1.])
def test_step_count_of_another_type(n):
    opt = trained(EIGHT[2], 1)
    opt.state[opt.param_lists[0][0]]['step'] = n
    with pytest.raises(TypeError, match='whole number'): opt.step()

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

# --- Faults of any kind that a step meets before it writes, each set up by a function of optimizer and monkeypatch

class BadNumber(float):
    def __float__(self): raise Interrupt

class BadState(dict):
    def get(self, *_): raise Interrupt

def last(opt): return opt.param_lists[-1][-1]
# The last parameter of the last group is bad
def bad_string(opt, mp):  opt.hypers[-1]['lr'] = 'high'
def bad_none(opt, mp):    opt.hypers[-1]['wd' if 'wd' in opt.hypers[-1] else 'lr'] = None
def bad_number(opt, mp):  opt.hypers[-1]['lr'] = BadNumber(0.5)
def bad_missing(opt, mp): del opt.hypers[-1]['lr']
def bad_short(opt, mp):   opt.hypers = L(list(opt.hypers)[:-1])
def bad_dtype(opt, mp):   last(opt).data = last(opt).data.double()
def bad_shape(opt, mp):   last(opt).data = last(opt).data[:1].clone()
def bad_grad(opt, mp):
    trap = Trap(torch.Tensor.grad.__get__, len(params_of(opt)), Interrupt())
    mp.setattr(nn.Parameter, 'grad', property(trap), raising=False)
def bad_state(opt, mp):   opt.state[last(opt)] = BadState(opt.state[last(opt)])
def bad_tensor(opt, mp):
    opt.state[last(opt)]['grad_avg' if 'grad_avg' in opt.state_names else 'sqr_avg'] = torch.ones(99)
def bad_plan(opt, mp):
    engine.drop_plan(opt)
    engine.replace_cut(mp, lambda cut: Trap(cut, 2, MemoryError()))
def bad_zeros(n): return lambda opt,mp: mp.setattr(torch, 'zeros_like', Trap(torch.zeros_like, n, MemoryError()))

FAULTS = {f.__name__[4:]:f for f in (bad_string,bad_none,bad_number,bad_missing,bad_short,bad_dtype,bad_shape,bad_grad,
                                     bad_state,bad_tensor,bad_plan)}
FIRST  = {f'zeros {n}':bad_zeros(n) for n in (1,3,5)}  # at the first step
FIRST |= {k:FAULTS[k] for k in ('string','short','dtype','grad','state','plan')}

@every
@pytest.mark.parametrize('fault,steps', [*((f,3) for f in FAULTS), *((f,0) for f in FIRST)])
def test_error_changes_nothing(case, fault, steps, monkeypatch):
    opt,well = [trained(case, steps, [(), (7,), (4,3), (6,5), (3,)], (2,1,2), torch.float32) for _ in range(2)]
    (FAULTS|FIRST)[fault](opt, monkeypatch)
    before = fingerprint(opt)
    with pytest.raises((Exception,Interrupt)): opt.step()
    assert fingerprint(opt) == before
    monkeypatch.undo()
    if fault not in ('plan','grad') and 'zeros' not in fault: return
    for o in (opt,well): o.step()  # as if nothing had happened
    assert [p.tolist() for p in params_of(opt)] == [p.tolist() for p in params_of(well)]
    same_state(opt, well, 0.)
