"Parameter groups that move, split, merge, come and go"
import pytest
import torch
from fastcore.foundation import L
from torch import nn

from tests.cases import *
from tests.support import every,new_grads,parameters,regroup,same,snapshot,twins

GROUPINGS = [((2,2),(0.1,0.)), ((1,3),(0.1,0.)), ((1,3),(0.,0.1)), ((1,1,2),(0.1,0.05,0.2)), ((4,),(0.3,)),
             ((3,1),(0.,0.1)), ((2,2),(0.1,0.2))]

@every
def test_groups_move(case):
    "A boundary that moves, groups that are split and merged: each parameter has the hypers of its group from then on"
    opts = []
    for jit in (False,True):
        ps = parameters((3,4), (5,), (2,6), (4,), dtype=torch.float64)
        opt = case.make([ps[:2],ps[2:]], jit, lr=[0.1,0.], **dict(k=2) if case.jit is ranger_jit else {})
        opt.ps = ps
        opts.append(opt)
    for i,(sizes,lrs) in enumerate(GROUPINGS):
        for opt in opts:
            regroup(opt, sizes, [dict(lr=lr) for lr in lrs])
            for _ in range(3): new_grads(opt.ps, i); opt.step()
        for p,q in zip(*(opt.ps for opt in opts)): close(q, p, TOL[torch.float64])
        same_state(opts[1], opts[0], TOL[torch.float64])

@every
def test_groups_fewer_than_hypers(case):
    "fastai leaves out the hypers that are over"
    opts = []
    for jit in (False,True):
        ps = parameters((3,), (4,), dtype=torch.float64)
        opt = case.make([ps[:1],ps[1:]], jit, lr=[0.1,0.2])
        opt.step()
        opt.param_lists = L([L(ps)])
        if hasattr(opt, 'slow_weights'): opt.slow_weights = L([L(slow(opt))])
        for _ in range(6): opt.step()
        opts.append(ps)
    for p,q in zip(*opts): close(q, p, TOL[torch.float64])

@every
def test_groups_without_hypers(case):
    "A group that is added later has none"
    opt,_ = twins(case, 1)
    opt.param_lists.append(L([nn.Parameter(torch.ones(2))]))
    before = snapshot(opt)
    either = '3 parameter groups, but hypers for 2.*new optimizer|slow weights for groups of'
    with pytest.raises(ValueError, match=either): opt.step()
    assert same(snapshot(opt), before)
