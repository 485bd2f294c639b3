"Several steps in one optimizer: each parameter takes its own, as if it had an optimizer of its own"
import pickle
from copy import deepcopy
from typing import List

import pytest
import torch
from torch import Tensor

from fastxtend_jit.step import jit_step
from tests import engine
from tests.cases import *
from tests.support import new_grads,parameters,params_of,same,snapshot

SHAPES = [(3,4),(5,),(6,2),(),(2,3,4),(7,)]
def is_matrix(p): return int(p.ndim != 2)  # position 0 for matrices
STEPS = {'sgd and adam': ((SGD,sgd_jit_step),(Adam,adam_jit_step)),
         'lamb and rmsprop': ((Lamb,lamb_jit_step),(RMSProp,rmsprop_jit_step)),
         'larc and qhadam': ((Larc,larc_jit_step),(QHAdam,qhadam_jit_step)),
         'radam and adam': ((RAdam,radam_jit_step),(Adam,adam_jit_step))}
HYPERS = dict(lr=0.01, mom=0.9, wd=0.01, sqr_mom=0.99, eps=1e-8)  # fastai's RMSProp takes no other eps
OWN = {Larc:dict(trust_coeff=0.02), QHAdam:dict(nu_1=0.7, nu_2=0.9)}

def _hypers(factory):
    takes = factory.__code__.co_varnames
    return {n:v for n,v in HYPERS.items() if n in takes} | OWN.get(factory, {})

def _both(what, steps=25, groups=2, **kw):
    "Our one optimizer of two steps, and fastai's two optimizers, over equal parameters"
    pairs = STEPS[what]
    ps,qs = (parameters(*SHAPES, *SHAPES, dtype=torch.float64) for _ in range(2))
    def dealt(ts): return [ts[i::groups] for i in range(groups)]
    more = {n:v for f,_ in pairs for n,v in OWN.get(f, {}).items()}
    opt = JitOptimizer(dealt(ps), [s for _,s in pairs], True, is_matrix, **HYPERS, **more, **kw)
    refs = [f([[q for q in g if is_matrix(q) == i] for g in dealt(qs)], **_hypers(f)) for i,(f,_) in enumerate(pairs)]
    for i in range(steps): _step(opt, refs, ps, qs, i)
    return opt,refs,ps,qs

def _step(opt, refs, ps, qs, i):
    new_grads(ps, i)
    for p,q in zip(ps, qs): q.grad = p.grad.clone()
    if i%4 == 3: ps[2].grad = qs[2].grad = None
    for o in (opt,*refs):
        o.set_hyper('lr', [0.01*(1+i%3), 0.02])
        o.set_hyper('mom', 0.95-0.01*(i%5))
        o.step()

@pytest.mark.parametrize('what', STEPS)
def test_each_takes_its_own(what):
    opt,refs,ps,qs = _both(what)
    for p,q in zip(ps, qs):
        close(p, q, TOL[torch.float64])
        want = refs[is_matrix(q)].state[q]
        assert {*opt.state[p]} == {*want}
        for n,v in want.items():
            if n == 'step': assert opt.state[p][n] == v
            else: close(opt.state[p][n], torch.as_tensor(v, dtype=p.dtype).view_as(opt.state[p][n]), TOL[torch.float64])

@pytest.mark.parametrize('what', STEPS)
@pytest.mark.parametrize('copied', [deepcopy, lambda o: pickle.loads(pickle.dumps(o)), 'loaded'],
                         ids=['deepcopy','pickle','loaded'])
def test_copies_go_on(what, copied):
    opt,*_ = _both(what, 5)
    if copied == 'loaded':
        other,*_ = _both(what, 0)
        other.load_state_dict(deepcopy(opt.state_dict()))
        for p,q in zip(params_of(opt), params_of(other)): q.data.copy_(p.data)
    else: other = copied(opt)
    for i in range(3):
        for o in (opt,other): new_grads(params_of(o), i); o.step()
    assert all(map(torch.equal, params_of(opt), params_of(other)))

def test_state_dict_of_another_choice():
    "State is checked against the step that a parameter takes"
    opt,*_ = _both('lamb and rmsprop', 2)
    other,*_ = _both('lamb and rmsprop', 0)
    other.choose = lambda p: 1-is_matrix(p)
    before = snapshot(other)
    with pytest.raises(ValueError, match='but no .*step'): other.load_state_dict(opt.state_dict())
    assert same(snapshot(other), before)

def test_lookahead_around_both():
    opt,refs,ps,qs = _both('sgd and adam', 0)
    ahead,refs = JitLookahead(opt, k=3, alpha=0.4),[Lookahead(r, k=3, alpha=0.4) for r in refs]
    for i in range(10):
        if i%4 == 3: continue  # fastai's takes no lookahead for what has no gradient
        _step(ahead, refs, ps, qs, i)
    for p,q in zip(ps, qs): close(p, q, TOL[torch.float64])

def test_explain_says_who_takes_what():
    opt,*_ = _both('lamb and rmsprop', 1)
    shown = opt.explain()
    assert {*shown['step']} == {'lamb_jit_step','rmsprop_jit_step'}
    assert shown.groupby('step')['tensors'].sum().to_dict() == dict(lamb_jit_step=4, rmsprop_jit_step=8)
    assert shown.columns.name == 'lamb_jit_step, rmsprop_jit_step, next step'

def test_choice_that_changes():
    "Another rule from the next step on; state of another step is refused, before anything has changed"
    opt,_,ps,_ = _both('sgd and adam', 2)
    opt.choose = lambda p: 1
    new_grads(ps)
    before = snapshot(opt)
    with pytest.raises(ValueError, match='`adam_jit_step`, but its state is of another step: it has grad_avg, and no'):
        opt.step()
    assert same(snapshot(opt), before)
    opt.clear_state()
    opt.step()
    assert {b.step for b in engine.buckets_of(opt)} == {adam_jit_step}

def test_copy_of_a_rule_by_identity():
    "A copy has other parameters, of which the rule knows nothing: each takes the step that its original took"
    opt,_,ps,_ = _both('sgd and adam', 0)
    first = {id(p) for p in ps[:5]}
    opt.choose = lambda p: int(id(p) not in first)
    new_grads(ps)
    opt.step()
    other = deepcopy(opt)
    for i in range(3):
        for o in (opt,other): new_grads(params_of(o), i); o.step()
    assert all(map(torch.equal, params_of(opt), params_of(other)))

def test_types_that_differ():
    def whole(params:List[Tensor], grads:List[Tensor], lr:float, flag:int=1):
        torch._foreach_add_(params, grads, alpha=-lr*flag)
    def switch(params:List[Tensor], grads:List[Tensor], lr:float, flag:bool=True):
        torch._foreach_add_(params, grads, alpha=-lr if flag else lr)
    with pytest.raises(TypeError, match='`flag` is of type int in one step, and of bool in .*: give it two'):
        JitOptimizer(parameters((3,)), [whole,switch], lr=0.1, choose=is_matrix)

@pytest.mark.parametrize('kw,err,what', [
    (dict(opt_step=[sgd_jit_step,adam_jit_step]), TypeError, 'An optimizer of 2 steps needs a function `choose`'),
    (dict(opt_step=adam_jit_step, choose=is_matrix), TypeError, 'An optimizer of 1 steps needs no `choose`'),
    (dict(opt_step=[sgd_jit_step,adam_jit_step], choose=lambda p: 2), ValueError,
     '`choose` returned 2 for parameter 0 of group 0.*from 0 to 1'),
    (dict(opt_step=[sgd_jit_step,adam_jit_step], choose=is_matrix, betas=1), TypeError,
     'sgd_jit_step, adam_jit_step` takes no betas; it takes .*lr.*sqr_mom')])
def test_errors(kw, err, what):
    with pytest.raises(err, match=what): JitOptimizer(parameters((3,)), lr=0.1, **kw)

def test_step_that_looks_ahead_is_alone():
    with pytest.raises(TypeError, match='`ranger_jit_step` looks ahead itself, and has to be the only step'):
        JitLookahead(parameters((3,)), [ranger_jit_step,adam_jit_step], lr=0.1, choose=is_matrix)

# --- Tensors of one shape

def _mean_of_all(params:List[Tensor], grads:List[Tensor], lr:float):
    "All move by the mean gradient of those that come together"
    torch._foreach_sub_(params, [torch.stack(grads).mean(0)*lr]*len(params))

def test_one_shape_a_call():
    step = jit_step(_mean_of_all, one_shape=True)
    ps = parameters((3,4), (4,3), (3,4), (4,3), (2,2), dtype=torch.float64)
    want = [p.detach().clone() for p in ps]
    for at in ([0,2],[1,3],[4]):
        mean = torch.stack([ps[k].grad for k in at]).mean(0)
        for k in at: want[k] -= 0.1*mean
    opt = JitOptimizer([ps[:2],ps[2:]], step, lr=0.1)
    opt.step()
    for p,q in zip(ps, want): close(p, q, TOL[torch.float64])
    assert len(engine.buckets_of(opt)) == 3
    with pytest.raises(RuntimeError): jit_step(_mean_of_all)(ps, [p.grad for p in ps], 0.1)
    assert pickle.loads(pickle.dumps(step)).one_shape
