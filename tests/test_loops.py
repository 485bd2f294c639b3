"Loops of one's own: groups, schedulers, files, Accelerate, decay by hand, clipping, scaled gradients, threads"
import copy,io,pickle,re,warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import List

import numpy as np
import pytest
import torch
from fastcore.foundation import L
from fastai.callback.schedule import SchedCos,combined_cos
from fastai.optimizer import OptimWrapper
from torch import Tensor,nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

from tests import engine
from tests.cases import *
from tests.support import every,params_of,same,snapshot,trained,twins

def model_and_data(seed=0, dtype=torch.float64):
    "A small network, and 8 batches for it"
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6,5), nn.ReLU(), nn.Linear(5,3)).to(dtype)
    return model,[(torch.randn(4,6, dtype=dtype),torch.arange(4)%3) for _ in range(8)]

def loop(case, jit, after=lambda *_: None, before=lambda *_: None, zero_grad=lambda opt: opt.zero_grad(), **kw):
    "Model and optimizer after 8 batches, with `after(i, opt)` after each step and `before(model)` before it"
    model,batches = model_and_data()
    opt = case.make([[*model[0].parameters()],[*model[2].parameters()]], jit, **kw)
    for i,(x,y) in enumerate(batches):
        cross_entropy(model(x), y).backward()
        before(model)
        opt.step()
        zero_grad(opt)
        after(i, opt)
    return model,opt

def same_models(ours, theirs, tol=TOL[torch.float64]):
    for p,q in zip(ours.parameters(), theirs.parameters()): close(p, q, tol)

def same_loops(ours, theirs, tol=TOL[torch.float64]):
    same_models(ours[0], theirs[0], tol)
    same_state(ours[1], theirs[1], tol)

@every
@pytest.mark.parametrize('params,says', [
    (lambda m: [m[0].parameters(),m[2].parameters()], r'Group 0 holds a `generator`.*make a list.*`\[list\('),
    (lambda m: m.named_parameters(), r'a `tuple`, .*`parameters\(\)` in place of `named_parameters'),
    (lambda m: [(*m[0].parameters(),),(*m[2].parameters(),)], r'a `tuple`, .*make a list of each group'),
    (lambda m: [dict(params=m.parameters(), lr=0.1)], r'a `dict`, .*hypers as lists, one number for each group'),
    (lambda m: [1], 'a `int`, .*pass a list of parameters, or a list of lists')],
    ids=['generators','named','tuples','dicts','numbers'])
def test_what_is_no_parameter(case, params, says):
    "An error that says what to pass, where the optimizer is made"
    with pytest.raises(TypeError, match=says): case.make(params(model_and_data()[0]), True)

# --- Groups as PyTorch has them

# Ways to write to one
WRITES = dict(item=lambda g: g.__setitem__('lr', 0.3), update=lambda g: g.update(lr=0.3),
              pairs=lambda g: g.update([('lr',0.3)]), ior=lambda g: g.__ior__({'lr':0.3}))

@every
@pytest.mark.parametrize('how', WRITES)
def test_group_is_written_through(case, how):
    "To the group's hyper, as by `set_hyper`, whatever was set since; the next step goes by it"
    a,b = twins(case, 2)
    group = a.param_groups[1]
    a.set_hyper('lr', 0.1)
    WRITES[how](group)
    b.set_hyper('lr', [0.1,0.3])
    assert [h['lr'] for h in a.hypers] == [0.1,0.3] and group['lr'] == 0.3
    for o in (a,b): o.step()
    assert same(snapshot(a), snapshot(b))

@every
def test_group_is_a_dict(case):
    "With parameters and hypers, as fastai's: all that reads a dict reads it; a copy is a plain one that writes nothing"
    opt,native = trained(case, 1),case.make(parameters := [nn.Parameter(torch.ones(2))], False)
    for o in (opt,native): assert o.param_groups == [{'params':pg, **h} for pg,h in zip(o.param_lists, o.hypers)]
    g = opt.param_groups[0]
    assert isinstance(g, Mapping) and repr(g) == repr({**g}) and len(g) == len([*g]) == len(g.keys())
    assert g.get('no such') is None and 'lr' in g and 'no such' not in g and {*g} == {'params', *opt.hypers[0]}
    assert g | {'lr':7.} == {**g, 'lr':7.} and ({'a':1} | g)['a'] == 1 and (lambda **kw: kw)(**g) == g
    assert {*case.make(parameters, True).param_groups[0]} == {*native.param_groups[0]}
    before = snapshot(opt)
    through = lambda g: pickle.loads(pickle.dumps(g))
    for make in (copy.copy,copy.deepcopy,dict,type(g).copy,lambda g: {**g},through):
        g = make(opt.param_groups[0])
        assert type(g) is dict and g.keys() == opt.param_groups[0].keys()
        g['lr'] = 7.
    for make in (copy.deepcopy,through):
        gs = make(opt.param_groups)
        assert type(gs) is list and {*map(type, gs)} == {dict}
        gs.append(gs[0])
        gs[0]['lr'] = 7.
    assert same(snapshot(opt), before)

def test_group_keeps_what_it_does_not_know():
    "As PyTorch's schedulers store numbers of their own there; a checkpoint has them, for fastai's too"
    opt = EIGHT[2].make([torch.ones(2)], True)
    assert opt.param_groups[0].setdefault('initial_lr', 0.5) == opt.param_groups[0].setdefault('initial_lr', 0.7) == 0.5
    for jit in (True,False):
        other = EIGHT[2].make([nn.Parameter(torch.ones(2))], jit)
        other.load_state_dict(opt.state_dict())
        params_of(other)[0].grad = torch.ones(2)
        other.step()
        assert other.param_groups[0]['initial_lr'] == 0.5

@every
@pytest.mark.parametrize('k,v,says', [('lr','high',"`lr` of group 1 has to be a number, but is 'high'"),
                                      ('lr',None,'`lr` of group 1'),
                                      ('weight_decay',0.1,'`weight_decay` is `wd` here'),
                                      ('maximize',True,'`maximize` is not in fastai: negate the loss'),
                                      *((k,True,f'`{k}` is a formula that fastai does not have')
                                        for k in ('amsgrad','nesterov','dampening','centered')),
                                      *((k,True,f'`{k}` has no need here') for k in ('fused','foreach','capturable'))])
def test_group_refuses(case, k, v, says):
    "What is no number, and PyTorch's names, before anything has changed"
    opt = trained(case, 1)
    before = snapshot(opt)
    for write in (lambda: opt.param_groups[1].update({'wd':0.5, k:v}), lambda: opt.param_groups[1].__setitem__(k, v),
                  lambda: setattr(opt, 'param_groups', [{'lr':0.5},{k:v}])):
        with pytest.raises(TypeError, match=says): write()
    assert same(snapshot(opt), before)

@every
def test_group_is_live(case):
    "One that is held, and the list of all, show what was set since, by whatever means"
    opt = case.make([[nn.Parameter(torch.ones(2))],[nn.Parameter(torch.ones(3))]], True)
    groups,other = opt.param_groups,case.make([[nn.Parameter(torch.ones(2))],[nn.Parameter(torch.ones(3))]], True)
    opt.set_hyper('lr', [0.1,0.2])
    assert [g['lr'] for g in groups] == [0.1,0.2]
    groups[0]['lr'] *= 0.5
    assert opt.hypers[0]['lr'] == 0.05 and opt.param_groups[0] == groups[0] and groups[0] != groups[1]
    other.set_hyper('lr', [3.,4.])
    opt.load_state_dict(other.state_dict())
    assert [{**g}['lr'] for g in groups] == [3.,4.]
    p = nn.Parameter(torch.ones(3))
    opt.param_groups[1]['params'] = [p]
    assert groups[1]['params'][0] is p

def test_held_group_with_a_scheduler():
    "`*=` on a group that was held since before the scheduler's steps, as with PyTorch's"
    p,q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    res = []
    for opt in (adam_jit([p], 0.1).as_torch(),torch.optim.Adam([q], 0.1)):
        groups,sched = opt.param_groups,lr_scheduler.StepLR(opt, 1, 0.5)
        for _ in range(3): opt.step(); sched.step()
        groups[0]['lr'] *= 0.1
        res.append(opt.param_groups[0]['lr'])
    assert res[0] == res[1] == 0.1*0.5**3*0.1

@every
def test_keys_of_a_group_go(case):
    "What a scheduler keeps there can be taken away; what the step needs cannot, and nothing has changed then"
    opt = trained(case, 1)
    g = opt.param_groups[0]
    g['initial_lr'] = g['max_lr'] = 0.1
    del g['initial_lr']
    assert g.pop('max_lr') == 0.1 and g.pop('max_lr', None) is None and not {'initial_lr','max_lr'} & {*opt.hypers[0]}
    before = snapshot(opt)
    for take in (lambda: g.pop('lr'), lambda: g.__delitem__('lr'), lambda: g.pop('params'), g.clear, g.popitem):
        with pytest.raises(TypeError, match='cannot be taken away'): take()
    with pytest.raises(KeyError): del g['no such']
    assert same(snapshot(opt), before)

LIST_WRITES = dict(append=lambda gs: gs.append({}), item=lambda gs: gs.__setitem__(0, {'lr':1.}),
                   iadd=lambda gs: gs.__iadd__([{}]), pop=lambda gs: gs.pop(), clear=lambda gs: gs.clear(),
                   delitem=lambda gs: gs.__delitem__(0), extend=lambda gs: gs.extend([{}]))

@pytest.mark.parametrize('how', LIST_WRITES)
def test_list_of_groups_refuses(how):
    opt = trained(EIGHT[2], 1)
    before = snapshot(opt)
    for groups in (opt.param_groups, opt.as_torch().param_groups):
        with pytest.raises(TypeError, match="cannot be changed: set what is in a group"): LIST_WRITES[how](groups)
        assert len(groups) == len(opt.param_groups) == 2
    assert same(snapshot(opt), before)

@every
def test_groups_of_another_number(case):
    "More or fewer are refused before one is set"
    opt = trained(case, 1)
    before = snapshot(opt)
    for new in ([], [{'lr':7.}], [{'lr':7.}]*3, ({'lr':7.} for _ in range(3))):
        with pytest.raises(ValueError, match='There are 2 parameter groups, but'): opt.param_groups = new
    assert same(snapshot(opt), before)
    opt.param_groups = ({'lr':7.} for _ in range(2))
    assert [h['lr'] for h in opt.hypers] == [7.,7.]

def test_groups_warn_of_names_that_nobody_uses():
    "Where they are written; not of what schedulers and others keep there, nor twice"
    opt = trained(EIGHT[2], 1)
    for k in ('lrr','learning_rate'):
        with pytest.warns(UserWarning, match=f'does not use the hyper `{k}`; it uses lr') as w:
            opt.param_groups[0][k] = 1.
        assert w[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        opt.param_groups[0].update(lrr=2., initial_lr=1., max_lr=1., min_lr=1., swa_lr=1., base_momentum=1., name='a')

def test_own_step_with_a_name_of_pytorch():
    "It is the step's hyper then"
    def nest_step(params:List[Tensor], grads:List[Tensor], lr:float, nesterov:float, alpha:float, sqr_mom:float):
        torch._foreach_add_(params, grads, alpha=-lr*nesterov*alpha*sqr_mom)
    opt = JitOptimizer([nn.Parameter(torch.ones(2))], nest_step, lr=1., nesterov=1., alpha=1., sqr_mom=1.)
    opt.param_groups[0].update(nesterov=0.5, alpha=0.25)
    params_of(opt)[0].grad = torch.ones(2)
    opt.step()
    assert params_of(opt)[0].tolist() == [0.875,0.875]

@every
def test_groups_are_set(case):
    "As with fastai's setter, and numbers are Python's"
    opt = trained(case, 1)
    opt.param_groups = [{**g, 'lr':torch.tensor(0.5), 'wd':0} for g in opt.param_groups]
    assert all(h['lr'] == 0.5 and h['wd'] == 0. and {*map(type, h.values())} == {float} for h in opt.hypers)

@every
def test_parameters_of_a_group_are_set(case):
    "They are what steps from then on"
    opt = case.make([[nn.Parameter(torch.ones(2))],[nn.Parameter(torch.ones(3))]], True)
    p = nn.Parameter(torch.ones(3))
    opt.param_groups[1]['params'] = [p]
    p.grad = torch.ones(3)
    opt.step()
    assert params_of(opt)[1] is p and not torch.equal(p, torch.ones(3))

def test_wrapped_by_fastai():
    "fastai's `OptimWrapper` sets hypers in groups"
    opt = EIGHT[2].make([torch.ones(2)], True)
    wrapped = OptimWrapper(opt=opt.as_torch())
    wrapped.set_hyper('lr', 0.3)
    assert opt.hypers[0]['lr'] == 0.3 and wrapped.hypers == [*opt.hypers]

# --- Schedules

@every
@pytest.mark.parametrize('sched', [SchedCos(0.05,0.001), combined_cos(0.25,0.001,0.05,1e-4)], ids=['cos','combined'])
def test_schedules_of_fastai(case, sched):
    def after(i, opt): opt.set_hyper('lr', sched((i+1)/8))
    same_loops(*[loop(case, jit, after) for jit in (True,False)])

# PyTorch's schedulers, and what their `step` takes besides
SCHEDULERS = dict(
    lambda_=(partial(lr_scheduler.LambdaLR, lr_lambda=[lambda i: 0.9**i, lambda i: 1/(i+1)]), ()),
    step   =(partial(lr_scheduler.StepLR, step_size=3), ()),
    cosine =(partial(lr_scheduler.CosineAnnealingLR, T_max=8), ()),
    one    =(partial(lr_scheduler.OneCycleLR, max_lr=[0.1,0.2], total_steps=9, cycle_momentum=False), ()),
    cyclic =(partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=3, cycle_momentum=False), ()),
    plateau=(partial(lr_scheduler.ReduceLROnPlateau, patience=1), (1.,)),
    linear =(lambda opt: lr_scheduler.SequentialLR(opt, [lr_scheduler.LinearLR(opt, total_iters=3),
                                                         lr_scheduler.ExponentialLR(opt, 0.8)], [3]), ()))

@pytest.mark.parametrize('name', SCHEDULERS)
def test_schedulers_of_pytorch(name):
    "The learning rates are those of an optimizer of PyTorch's, and steps go by them; no warning about their order"
    make,args = SCHEDULERS[name]
    (model,batches),(ref,_) = model_and_data(),model_and_data()
    opt = EIGHT[0].jit([[*model[0].parameters()],[*model[2].parameters()]], lr=[0.1,0.05], wd=0.).as_torch()
    sgd = torch.optim.SGD([dict(params=ref[i].parameters(), lr=lr) for i,lr in ((0,0.1),(2,0.05))])
    a,b = make(opt),make(sgd)
    for x,y in batches:
        for m,o,s in ((model,opt,a),(ref,sgd,b)):
            cross_entropy(m(x), y).backward()
            with warnings.catch_warnings():
                warnings.filterwarnings('error', 'Detected call')
                o.step(); s.step(*args)
            o.zero_grad()
        assert [h['lr'] for h in opt.opt.hypers] == [g['lr'] for g in sgd.param_groups]
    same_models(model, ref)

def test_scheduler_resumes():
    "From the state dicts of both, and from a scheduler that is told where it was"
    model,batches = model_and_data()
    make = partial(lr_scheduler.CosineAnnealingLR, T_max=8)
    def started(): return (opt := EIGHT[2].make([*model.parameters()], True, lr=0.1).as_torch()),make(opt)
    def turn(opt, sched): opt.step(); sched.step(); return opt.opt.hypers[0]['lr']
    cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    opt,sched = started()
    for _ in range(3): turn(opt, sched)
    sds = copy.deepcopy([opt.state_dict(),sched.state_dict()])
    lrs = [turn(opt, sched) for _ in range(4)]
    opt,sched = started()
    for o,sd in zip((opt,sched), sds): o.load_state_dict(sd)
    assert [turn(opt, sched) for _ in range(4)] == lrs
    opt = started()[0]
    opt.load_state_dict(sds[0])
    assert make(opt, last_epoch=3).base_lrs == [0.1]

# --- As one of PyTorch's class

@every
def test_as_torch(case):
    "It steps as the optimizer itself, takes a closure, and copies with what it wraps"
    a,b = twins(case, 2)
    opt,hooked = b.as_torch(),[]
    assert isinstance(opt, torch.optim.Optimizer) and opt.opt is b and opt.state is b.state
    assert opt.param_groups == b.param_groups and same(opt.state_dict(), b.state_dict()) and repr(opt)
    opt.register_step_post_hook(lambda *_: hooked.append(1))
    def closure(): assert torch.is_grad_enabled(); return 0.5
    a.step()
    with torch.no_grad(): assert opt.step(closure) == 0.5
    assert hooked == [1]
    assert same(snapshot(a), snapshot(b))
    other = copy.deepcopy(opt)
    assert other.opt is not b and not {*map(id, params_of(other.opt))} & {*map(id, params_of(b))}
    assert all(map(torch.equal, params_of(other.opt), params_of(b))) and same(other.state_dict(), b.state_dict())
    opt.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in params_of(b))
    opt.zero_grad()
    assert all(p.grad is None for p in params_of(b))
    opt.load_state_dict(a.state_dict())
    for o in (opt,b):
        with pytest.raises(NotImplementedError, match='new optimizer'): o.add_param_group({'params':[]})
    with pytest.raises(TypeError, match='not an Optimizer'): lr_scheduler.LambdaLR(b, lambda i: 1.)

@every
def test_as_torch_has_all(case):
    "Methods, hypers and attributes are the optimizer's, to read and to set; what would be lost raises"
    a,b = twins(case, 2)
    opt = b.as_torch()
    opt.set_hyper('lr', 0.3)
    assert opt.hypers is b.hypers and b.hypers[0]['lr'] == 0.3
    opt.freeze()
    assert b.frozen_idx == opt.frozen_idx == 1
    opt.unfreeze()
    opt.frozen_idx = 1
    assert b.frozen_idx == 1 and opt.explain and opt.all_params()[0][0] is params_of(b)[0]
    for write in (lambda: opt.defaults.__setitem__('lr', 1.), lambda: opt.defaults.update(lr=1.),
                  lambda: setattr(opt, 'defaults', {})):
        with pytest.raises(TypeError, match=r"set_hyper\('lr', x\)"): write()
    assert opt.defaults == b.hypers[0] and {**opt.defaults} == b.hypers[0]
    with pytest.raises(AttributeError, match='no_such'): opt.no_such
    opt.mine = 1
    assert not hasattr(b, 'mine') and not hasattr(opt, '_no_such')

@every
def test_as_torch_takes_state(case):
    "As with fastai's `clear_state`, which sets an empty one"
    a,b = twins(case, 2)
    kept = {p:{**st} for p,st in b.state.items()}
    OptimWrapper(opt=b.as_torch()).clear_state()
    assert not b.state
    b.as_torch().state = kept
    for o in (a,b): o.step()
    assert same(snapshot(a), snapshot(b))

@pytest.mark.parametrize('make', [lambda ps: adam_jit(ps, 0.1).as_torch(), lambda ps: torch.optim.Adam(ps, 0.1)],
                         ids=['ours','pytorch'])
def test_hooks(make):
    "Of steps and of state dicts, as PyTorch's: what they return counts; a copy has none"
    p,called = nn.Parameter(torch.ones(2)),[]
    opt = make([p])
    def hook(name, res=None): return lambda *args: called.append((name, len(args))) or (res and res(*args))
    opt.register_step_pre_hook(hook('before step'))
    opt.register_step_post_hook(hook('after step'))
    opt.register_state_dict_pre_hook(hook('before saving'))
    opt.register_state_dict_post_hook(hook('after saving', lambda opt,sd: {**sd, 'note':1}))
    def without_note(opt, sd): return {k:v for k,v in sd.items() if k != 'note'}
    opt.register_load_state_dict_pre_hook(hook('before loading', without_note))
    opt.register_load_state_dict_post_hook(hook('after loading'))
    p.grad = torch.ones(2)
    opt.step()
    sd = opt.state_dict()
    assert sd['note'] == 1
    opt.load_state_dict(sd)
    assert 'note' in sd and called == [('before step',3),('after step',3),('before saving',1),('after saving',2),
                                       ('before loading',2),('after loading',1)]
    called.clear()
    for other in (copy.deepcopy(opt),pickle.loads(pickle.dumps(opt))):
        other.step(); other.state_dict()
    assert not called

def test_hook_changes_what_is_loaded():
    "In place, and the caller's own stays"
    opt = trained(EIGHT[2], 2).as_torch()
    sd,old = opt.state_dict(),copy.deepcopy(opt.hypers[0])
    opt.register_load_state_dict_pre_hook(lambda opt,sd: sd.update(hypers=[{**h, 'lr':7.} for h in sd['hypers']]))
    opt.load_state_dict(sd)
    assert opt.hypers[0]['lr'] == 7. and sd['hypers'][0] == old

@pytest.fixture
def accelerator():
    "Accumulates over 4 batches, on the CPU"
    accelerate = pytest.importorskip('accelerate', reason='needs Accelerate, from the extra `dev`')
    from accelerate.state import AcceleratorState,GradientState
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()

def accumulated(acc, model, batches, opt, sched=None):
    for x,y in batches:
        with acc.accumulate(model):
            acc.backward(cross_entropy(model(x), y))
            opt.step()
            if sched: sched.step()
            opt.zero_grad()

@every
@pytest.mark.parametrize('how', ['prepare','prepare_optimizer'])
def test_accelerate(case, how, accelerator, tmp_path):
    "4 batches make a step, of fastai's numbers; the state that Accelerate saves loads"
    model,batches = model_and_data()
    ref,_ = model_and_data()
    ours,theirs = case.make([*model.parameters()], True),case.make([*ref.parameters()], False)
    if how == 'prepare': model,opt = accelerator.prepare(model, ours.as_torch())
    else: model,opt = accelerator.prepare_model(model),accelerator.prepare_optimizer(ours)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'Accelerate')
        accumulated(accelerator, model, batches, opt)
    for i in (0,4):
        for x,y in batches[i:i+4]: (cross_entropy(ref(x), y)/4).backward()
        theirs.step()
        theirs.zero_grad()
    same_loops((model,ours), (ref,theirs))
    accelerator.save_state(tmp_path)
    before = copy.deepcopy(ours.state_dict())
    opt.step()
    accelerator.load_state(tmp_path)
    assert same(ours.state_dict(), before)

def test_accelerate_with_a_scheduler(accelerator):
    "A scheduler of PyTorch's steps with the optimizer"
    model,batches = model_and_data()
    opt = EIGHT[2].make([*model.parameters()], True, lr=0.1).as_torch()
    model,prepared,sched = accelerator.prepare(model, opt, lr_scheduler.LambdaLR(opt, lambda i: 0.5**i))
    accumulated(accelerator, model, batches, prepared, sched)
    assert opt.opt.state_dict()['state'][0]['step'] == 2 and opt.opt.hypers[0]['lr'] == 0.1*0.5**2

def test_accelerate_does_not_know(accelerator):
    "An optimizer that Accelerate has not wrapped says so, once, at its step, however gradients are dropped"
    model,batches = model_and_data()
    model,opt = accelerator.prepare(model, EIGHT[2].make([*model.parameters()], True))
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        for x,y in batches:
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(x), y))
                opt.step()
                model.zero_grad()
    w, = [o for o in w if re.search(r'has not wrapped this optimizer.*as_torch\(\)', str(o.message))]
    assert w.filename == __file__

def test_accelerate_is_not_set_up():
    "Where it is imported, and nobody uses it"
    state = pytest.importorskip('accelerate.state', reason='needs Accelerate, from the extra `dev`')
    state.GradientState._reset_state()
    opt = trained(EIGHT[2], 1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        opt.step()
    assert not state.GradientState._shared_state

# --- Files

def loaded(o, **kw):
    "`o`, saved and loaded"
    file = io.BytesIO()
    torch.save(o, file)
    file.seek(0)
    return torch.load(file, **kw)

def halves(case, saves, loads, through):
    "Two runs of 6 steps: one all through, the other goes on in a new optimizer from what `through` makes of the state"
    res = []
    for resume in (False,True):
        torch.manual_seed(0)
        ps = [nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in ((3,4),(5,),(2,2))]
        opt = case.make([ps[:2],ps[2:]], saves)
        opt.set_hyper('lr', [*np.array([0.01,0.02])])  # NumPy's numbers, as fastai's one-cycle schedule sets them
        opt.state[ps[1]]['do_wd'] = False
        for i in range(6):
            if i == 4 and resume:
                sd,opt = through(opt.state_dict()),case.make([ps[:2],ps[2:]], loads)
                opt.load_state_dict(sd)
            for p in ps: p.grad = torch.randn_like(p)
            opt.step()
        res.append(opt)
    return res

MANY = ALL+TWO_AHEAD

@pytest.mark.parametrize('case', MANY, ids=str)
@pytest.mark.parametrize('loads', [True,False], ids=['jit','native'])
def test_state_dict_is_plain(case, loads):
    "`torch.load` takes it as it is, and fastai's optimizer goes on with it"
    whole,resumed = halves(case, True, loads, partial(loaded, weights_only=True))
    if loads:
        assert same(resumed.state_dict(), whole.state_dict())
        assert all(map(torch.equal, params_of(resumed), params_of(whole)))
    else:
        for p,q in zip(params_of(whole), [p for pg in resumed.param_lists for p in pg]): close(p, q, TOL[torch.float64])
        same_state(whole, resumed, TOL[torch.float64])

@pytest.mark.parametrize('case', MANY, ids=str)
def test_state_dict_of_fastai(case):
    "With `L`s, as checkpoints of fastai and older ones of ours have it"
    def with_lists(sd): assert type(sd['hypers']) is L; return loaded(sd, weights_only=False)
    native,resumed = halves(case, False, True, with_lists)
    for p,q in zip(params_of(resumed), [p for pg in native.param_lists for p in pg]): close(p, q, TOL[torch.float64])
    same_state(resumed, native, TOL[torch.float64])

@every
def test_state_dict_keeps_hypers(case):
    "What is set later does not change it"
    opt = trained(case, 2)
    sd = opt.state_dict()
    was = [{**h} for h in sd['hypers']]
    opt.set_hyper('lr', 7.)
    assert sd['hypers'] == was
    opt.load_state_dict(sd)
    assert [*opt.hypers] == was

# --- What else stands in such loops

@every
@pytest.mark.parametrize('by', ['group','parameter'])
def test_decay_by_hand(case, by):
    "Of weights, not of biases: by groups, or by the state of each parameter"
    res = []
    for jit in (True,False):
        model,batches = model_and_data()
        decayed,others = [[p for p in model.parameters() if (p.dim() > 1) == two] for two in (True,False)]
        if by == 'group': opt = case.make([decayed,others], jit, wd=[0.1,0.])
        else:
            opt = case.make([*model.parameters()], jit, wd=0.1)
            for p in others: opt.state[p]['do_wd'] = False
        for x,y in batches:
            cross_entropy(model(x), y).backward()
            opt.step(); opt.zero_grad()
        res.append((model,opt))
    same_loops(*res)

@every
@pytest.mark.parametrize('foreach', [True,False])
def test_clipping(case, foreach):
    "The norm of all gradients, or each element"
    def clip(model):
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05, foreach=foreach)
        assert norm > 0.05
        nn.utils.clip_grad_value_(model.parameters(), 0.01, foreach=foreach)
    same_loops(*[loop(case, jit, before=clip) for jit in (True,False)])

@every
def test_grad_scaler(case):
    "It scales back, and skips a step whose gradients overflow"
    def run(jit):
        (model,batches),skipped = model_and_data(),0
        opt,scaler = case.make([*model.parameters()], jit),torch.amp.GradScaler('cpu', init_scale=2.**10)
        for i,(x,y) in enumerate(batches):
            scaler.scale(cross_entropy(model(x), y)).backward()
            if i == 2: model[0].bias.grad[0] = torch.inf
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            before,scale = [p.detach().clone() for p in model.parameters()],scaler.get_scale()
            scaler.step(opt); scaler.update()
            skipped += all(map(torch.equal, before, model.parameters()))
            assert (i == 2) == (scaler.get_scale() < scale)
            opt.zero_grad()
        assert skipped == 1
        return model,opt
    same_loops(run(True), run(False))

@every
def test_zero_grad_sets_none(case):
    "As PyTorch's does, in every way to say it; what has no gradient takes no step"
    def drop(opt):
        for p in [p for pg in opt.param_lists for p in pg]: p.grad = None
    theirs = loop(case, False, zero_grad=drop)
    for zero in (lambda opt: opt.zero_grad(True), lambda opt: opt.zero_grad(set_to_none=True),
                 lambda opt: opt.as_torch().zero_grad()):
        model,opt = ours = loop(case, True, zero_grad=zero)
        assert all(p.grad is None for p in model.parameters())
        same_loops(ours, theirs)
    before = snapshot(opt)
    if case.jit is not ranger_jit:  # whose slow weights pull all
        opt.step()
        assert same(snapshot(opt), before)
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())

@every
@pytest.mark.parametrize('lazy', [0,200], ids=['compiled','plain'])
def test_threads(case, lazy, monkeypatch):
    "Eight threads that train models of their own, from cold, get what one gets, bit for bit"
    start = Barrier(8)
    def train(seed, wait=True):
        model,batches = models[seed]
        opt = case.make([*model.parameters()], True)
        if wait: start.wait()
        for x,y in batches:
            cross_entropy(model(x), y).backward()
            opt.step(); opt.zero_grad()
        return snapshot(opt)
    engine.set_compile_after(lazy, monkeypatch)
    models = [model_and_data(i) for i in range(8)]
    again = copy.deepcopy(models)
    engine.forget_trials(monkeypatch)
    engine.forget_compiled()
    with ThreadPoolExecutor(8) as ex: threaded = [*ex.map(train, range(8))]
    models = again
    assert all(same(a, train(i, wait=False)) for i,a in enumerate(threaded))
