"Arguments of optimizers: of which type, from where, and when they may change"
from copy import copy
from functools import partial
from typing import List

import pytest
import torch
from torch import Tensor,nn

from tests.cases import *
from tests.support import parameters,refused

def counted(params:List[Tensor], grads:List[Tensor], lr:float, n:int):
    torch._foreach_add_(params, grads, alpha=-lr*n)
own = partial(JitOptimizer, opt_step=counted)

@pytest.mark.parametrize('make,kw,name', [
    *((larc_jit,dict(clip=v),'clip') for v in ('3',[1],{})),
    *((adam_jit,dict(decouple_wd=v),'decouple_wd') for v in ('no',[])),
    *((ranger_jit,dict(alpha=v),'alpha') for v in (None,'x','0.5',[0.5],1j)),
    *((ranger_jit,dict(k=v),'k') for v in ('3',None,2.5,[6])),
    *((own,dict(n=v),'n') for v in (2.5,None,'2',2**70))],
    ids=lambda o: 'own step' if isinstance(o, partial) else getattr(o, '__name__', str(o)))
def test_arguments_of_the_wrong_type(make, kw, name):
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

def test_constants_of_a_copy():
    opt = larc_jit([nn.Parameter(torch.ones(2))], 0.1)
    other = copy(opt)
    other.clip = False
    assert opt.clip and not other.clip and opt.consts != other.consts
    class Own(JitOptimizer): decouple_wd = True
    with pytest.raises(TypeError, match='`decouple_wd`.*attribute of `Own`'):
        Own([nn.Parameter(torch.ones(2))], adam_jit_step, lr=0.1)

def plain(params:List[Tensor], grads:List[Tensor], lr:float): torch._foreach_add_(params, grads, alpha=-lr)
def decays(params:List[Tensor], grads:List[Tensor], lr:float, decouple_wd:bool=True):
    if decouple_wd: torch._foreach_add_(params, grads, alpha=-lr)

def test_default_of_decouple_wd():
    "A step's own default holds where nothing else is said"
    assert JitOptimizer(parameters((2,)), decays, lr=0.1).decouple_wd is True
    assert JitOptimizer(parameters((2,)), decays, False, lr=0.1).decouple_wd is False
    assert JitOptimizer(parameters((2,)), plain, lr=0.1).decouple_wd is False
    # as fastai takes it, by its truth value
    assert adam_jit(parameters((2,)), 0.1, decouple_wd=None).decouple_wd is False

@pytest.mark.parametrize('make', [j for _,j in PAIRS+OTHERS], ids=lambda f: f.__name__)
def test_pytorch_names(make):
    "What PyTorch calls its arguments is translated"
    says = f'`{make.__name__}` takes no amsgrad, betas, weight_decay; it takes params, lr, .*wd.*' \
           '`weight_decay` is `wd` in fastai. `betas` is `mom` and `sqr_mom` in fastai'
    with pytest.raises(TypeError, match=says):
        make(parameters((2,)), lr=0.1, weight_decay=0.1, betas=(0.9,0.99), amsgrad=True)

class Mine(JitOptimizer):
    "A subclass whose constructor names hypers"
    def __init__(self, params, lr=0.1, mom=0.9, wd=0.01):
        super().__init__(params, adam_jit_step, lr=lr, mom=mom, wd=wd, sqr_mom=0.99, eps=1e-5)

def test_subclass():
    ours,mine = parameters((2,)),parameters((2,))
    adam_jit(ours, 0.1).step()
    Mine(mine).step()
    assert torch.equal(ours[0], mine[0])

def test_constants_are_attributes():
    opt = adam_jit(parameters((2,)), 0.1)
    with pytest.raises(TypeError): opt.consts['decouple_wd'] = False
