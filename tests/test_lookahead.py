"`JitLookahead`: its slow weights, what it is made of, and frozen parameters, which look ahead too"
from copy import deepcopy
from functools import partial
from typing import List

import pytest
import torch
from torch import Tensor,nn
from fastcore.foundation import L

from fastxtend_jit.calls import Calls
from tests import engine
from tests.cases import *
from tests.support import parameters,refused,regroup,same,snapshot,twins

RANGER = EIGHT[-1]

# --- What it is made of

def looks_ahead(native, ps, **kw): return Lookahead(native(ps, **kw), k=2)

def test_fastai_lookahead_around_ours():
    "It is neither fastai's nor ours"
    f = lambda ps, **kw: Lookahead(adam_jit(ps, **kw), k=2)
    around = '`Lookahead` around `adam_jit_step`'
    for jit in (True,False):
        with pytest.raises(TypeError, match=f'{around}, for which there is `JitLookahead`'): engine.counterpart(f, jit)
        with pytest.raises(TypeError, match=around): engine.converted(f(parameters((2,)), lr=0.1), jit)

def test_lookahead_by_a_partial():
    "Is tried with its arguments"
    f = jit_opt(partial(looks_ahead, Adam, mom=0.5))
    opt = f([parameters((2,))], lr=0.1)
    assert type(opt) is JitLookahead and opt.opt_step is adam_jit_step and opt.k == 2 and opt.hypers[0]['mom'] == 0.5
    own = partial(JitOptimizer, opt_step=lion_jit_step, mom=0.9, avg_mom=0.99, wd=0.)
    assert jit_opt(own) is own
    with pytest.raises(TypeError, match='has no counterpart'): jit_opt(partial(looks_ahead, ranger))

def test_lookahead_around_ours():
    "Takes over hypers of each group, also odd ones, state, and what is frozen; nothing else is taken"
    ps = [parameters((2,)),parameters((3,))]
    opt = adam_jit(ps, [0.1,0.2]); opt.step(); opt.freeze_to(1)
    del opt.hypers[1]['eps']
    opt.hypers[0]['note'] = 1
    res = JitLookahead(opt, k=3)
    assert [dict(h) for h in res.hypers] == [dict(h) for h in opt.hypers]
    assert res.frozen_idx == 1 and res.state is opt.state
    for args,kw in (((6,.5),{}), ((),dict(decouple_wd=False)), ((),dict(lr=0.1))):
        with pytest.raises(TypeError, match='takes an optimizer as it is, with `k` and `alpha` by name'):
            JitLookahead(opt, *args, **kw)
    for bad in (ps,Adam(ps, 0.1)):
        with pytest.raises(TypeError, match='needs a step function, or one of our optimizers'): JitLookahead(bad)

def test_lookahead_says_what_is_wrong():
    ps = [nn.Parameter(torch.ones(2))]
    def halfway(params:List[Tensor], grads:List[Tensor], slow_weights:List[Tensor], lr:float): pass
    def own_alpha(params:List[Tensor], grads:List[Tensor], alpha:float, lr:float): pass
    with pytest.raises(TypeError, match=r"halfway` lacks \['alpha', 'lookahead'\]"): JitLookahead(ps, halfway, lr=0.1)
    with pytest.raises(TypeError, match='`alpha`, for `.*own_alpha`, is also the name of an argument'):
        JitLookahead(ps, own_alpha, lr=0.1)
    opt = adam_jit(ps, 0.1)
    for kw in (dict(mom=0.9), dict(opt_step=adam_jit_step)):
        with pytest.raises(TypeError, match='takes an optimizer as it is'): JitLookahead(opt, **kw)
    with pytest.raises(TypeError, match='`adam_jit_step` already runs with a lookahead'):
        JitLookahead(JitLookahead(opt))
    for k in (0,-1):
        with pytest.raises(ValueError, match=f'`k` .*at least 1, but is {k}'): ranger_jit(ps, 0.1, k=k)

def test_alpha_is_checked_first():
    opt = JitLookahead(adam_jit(parameters((2,)), 0.1), k=1)
    opt.step(); before = [p.clone() for p in opt.param_lists[0]]
    opt.alpha = 'x'
    with pytest.raises(TypeError, match='`alpha`'): opt.step()
    assert all(map(torch.equal, before, opt.param_lists[0])) and opt.count == 1

# --- Slow weights

@pytest.mark.parametrize('steps', [0,5])
def test_slow_weights_that_do_not_fit(steps):
    "Groups that have changed since the slow weights were made; slow weights of another shape"
    opt,ref = twins(RANGER, steps)
    if not steps: opt.slow_weights = [[p.detach().clone() for p in pg] for pg in opt.param_lists]
    last = (opt.slow_weights[1] if isinstance(opt.slow_weights[1], list) else opt.slow_weights[1].items).pop()
    before = snapshot(opt)
    with pytest.raises(ValueError, match=r'\[2, 1\].*\[2, 2\].*clear_state\(\)'): opt.step()
    assert same(snapshot(opt), before)
    opt.slow_weights[1].append(torch.ones(7))
    refused(opt, ValueError, '`slow_weights` of parameter 1 of group 1')
    opt.slow_weights[1][1] = last
    for o in (opt,ref): o.step()
    assert same(snapshot(opt), snapshot(ref))

def test_slow_weights_follow_groups():
    "Through an interrupt, a copy, a checkpoint of its own"
    def regrouped():
        ps = parameters((3,), (4,))
        opt = RANGER.make([ps[:1],ps[1:]], True, k=2)
        opt.step()
        regroup(opt, (2,), [{}])
        return opt
    opt = regrouped()
    with pytest.MonkeyPatch.context() as mp:
        engine.replace_run(mp, opt, lambda: 1/0)
        with pytest.raises(ZeroDivisionError): opt.step()
    fresh,loaded = regrouped(),regrouped()
    loaded.load_state_dict(loaded.state_dict())
    for o in (opt,deepcopy(regrouped()),loaded,fresh):
        for _ in range(2): o.step()
        for p,q in zip(o.param_lists[0], fresh.param_lists[0]): assert o is fresh or p.shape == q.shape
        assert [*map(len, o.slow_weights)] == [2]

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

# --- Frozen parameters

def test_frozen_parameter_of_another_shape():
    "Slow weights that do not fit a parameter which takes no step, but a lookahead"
    opt,_ = twins(RANGER, 5)
    p = opt.param_lists[1][1]
    p.grad,p.data = None,torch.ones(2,2)
    refused(opt, ValueError, '`slow_weights` of parameter 1 of group 1')

def test_frozen_tied_parameter():
    "Twice in the groups, it looks ahead twice"
    opts = []
    for jit in (False,True):
        p,q = parameters((3,), (2,), dtype=torch.float64)
        p.grad = None
        opt = RANGER.make([p,q,p], jit, k=1, alpha=0.5)
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
        opt = RANGER.make([ps[i] for i in order], jit, k=1, alpha=0.3)
        for i in range(8):
            u.grad = torch.ones_like(u) if i < 5 else None
            opt.step()
        opts.append((u,opt))
    (p,native),(q,ours) = opts
    close(q, p, 1e-12)
    for s,t in zip(slow(ours), slow(native)): close(s, t, 1e-12)

def test_parameters_swap_groups():
    "Slow weights follow their parameters also where groups stay as large; what does not fit can still be saved"
    ps = parameters((2,), (3,), (2,), (3,))
    opt = ranger_jit([ps[:2],ps[2:]], lr=0.1, k=2)
    opt.step()
    before = {id(p): s.clone() for p,s in zip(ps, [t for pg in opt.slow_weights for t in pg])}
    opt.param_lists = L(L(ps[2],ps[1]), L(ps[0],ps[3]))
    for pg,slow in zip(opt.param_lists, opt.state_dict()['slow_weights']):
        for p,s in zip(pg, slow): assert torch.equal(s, before[id(p)])
    opt.param_lists = L(L(ps[:2]), L(ps[2:3]))
    assert [len(pg) for pg in opt.state_dict()['slow_weights']] == [2,2]
    with pytest.raises(ValueError, match='clear_state'): opt.step()
