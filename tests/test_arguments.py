"Arguments of optimizers: of which type, from where, and when they may change"
import inspect,warnings
from copy import copy
from functools import partial
from math import inf,nan
from typing import List

import numpy as np
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
    betas = {sgd_jit:'`mom`', larc_jit:'`mom`', lion_jit:'`mom` and `avg_mom`',
             adan_jit:'`mom`, `diff_mom` and `sqr_mom`'}.get(make, '`mom` and `sqr_mom`')
    says = f'`{make.__name__}` takes no amsgrad, betas, weight_decay; it takes params, lr, .*wd.*' \
           f'`betas` is {betas} here. `weight_decay` is `wd` here. `amsgrad` is a formula that'
    with pytest.raises(TypeError, match=says):
        make(parameters((2,)), lr=0.1, weight_decay=0.1, betas=(0.9,0.99), amsgrad=True)
    if make is ranger_jit: return  # takes an `alpha` itself
    with pytest.raises(TypeError, match='takes no alpha; it takes ') as e: make(parameters((2,)), lr=0.1, alpha=0.99)
    assert ('`alpha` is `sqr_mom` here' in str(e.value)) == ('sqr_mom' in inspect.signature(make).parameters)
    assert str(e.value).count('alpha') == 1 + ('`alpha` is' in str(e.value))

@pytest.mark.parametrize('name,says', [('momentum','is `mom` here'), ('maximize','negate the loss'),
    *((n,'leave it out') for n in ('amsgrad','nesterov','dampening','centered')),
    *((n,'has no need here') for n in ('fused','foreach','capturable','differentiable'))])
def test_arguments_of_pytorch(name, says):
    "Through every factory, and where a step is given"
    given = [partial(cls, opt_step=adam_jit_step) for cls in (JitOptimizer,JitLookahead)]
    for make in [*(j for _,j in PAIRS+OTHERS), *given]:
        if name in inspect.signature(make).parameters: continue  # Muon's `nesterov`
        with pytest.raises(TypeError, match=f'takes no {name}; it takes .*`{name}` .*{says}'):
            make(parameters((2,)), lr=0.1, **{name:True})

@pytest.mark.parametrize('make', [j for _,j in PAIRS+OTHERS], ids=lambda f: f.__name__)
def test_decouple_wd_by_position(make):
    "As by name: `None` is L2, as fastai has it"
    ps = [p for p in inspect.signature(make).parameters.values() if p.kind is not p.KEYWORD_ONLY][2:]
    by_position = [p.name for p in ps][-1:] == ['decouple_wd']
    assert by_position == (make is not ranger_jit)  # fastai's takes it by name alone
    for v,is_decoupled in ((None,False),(False,False),(0,False),(True,True)):
        assert make(parameters((2,)), 0.1, decouple_wd=v).decouple_wd is is_decoupled
        if by_position: assert make(parameters((2,)), 0.1, *[p.default for p in ps[:-1]], v).decouple_wd is is_decoupled
    with pytest.raises(TypeError, match=f'{make.__name__}.*positional'):
        make(parameters((2,)), 0.1, *[p.default for p in ps], 1)

# --- Hypers

TAKEN = dict(number=0.1, int=1, bool=True, tuple=(0.1,0.2), list=[0.1,0.2], of_one=[0.1], end=slice(0.1),
             slice=slice(0.01,0.1), tensor=torch.tensor([0.1,0.2]), array=np.array([0.1,0.2]),
             tensors=[torch.tensor(0.1)]*2, numbers=[np.float32(0.1)]*2, range=range(1,3))
REFUSED = dict(none=None, tensor=torch.tensor(0.1), of_one=torch.tensor([0.1]), number=np.float64(0.1),
               array=np.array(0.1), three=[0.1,0.2,0.3], empty=[], slice=slice(None), start=slice(0.1,None),
               string='0.1', strings=['a','b'], bytes=b'1', several=[b'1',b'1'], large=10**400,
               nested=[[0.1],[0.2]], one_none=[None,0.1], complex=1j, dict={'a':1}, function=len)

def two_groups(): return [[p] for p in parameters((2,), (3,))]

@pytest.mark.parametrize('v', TAKEN.values(), ids=TAKEN)
def test_hypers_that_fastai_takes(v):
    "Set in the same way, to the same numbers"
    for name in ('lr','mom','wd'):
        new = [f(two_groups(), **{'lr':0.1, name:v}) for f in (Adam,adam_jit)]
        old = [f(two_groups(), lr=0.3) for f in (Adam,adam_jit)]
        for o in old: o.set_hyper(name, v)
        for theirs,ours in (new,old):
            a,b = ([h[name] for h in o.hypers] for o in (theirs,ours))
            assert a == b and [*map(type, a)] == [*map(type, b)]

@pytest.mark.parametrize('v', REFUSED.values(), ids=REFUSED)
def test_hypers_that_are_refused(v):
    "What fastai cannot train with either; nothing has changed"
    for name in ('lr','mom','wd'):
        with pytest.raises(TypeError, match=f'`{name}` has to be a number, a list of 2 numbers.*but is'):
            adam_jit(two_groups(), **{'lr':0.1, name:v})
        with pytest.raises(Exception):
            opt = Adam(two_groups(), **{'lr':0.1, name:v})
            opt.step()
        opt = adam_jit(two_groups(), lr=0.3)
        before = [{**h} for h in opt.hypers]
        with pytest.raises(TypeError, match=f'`{name}` has to be a number'): opt.set_hyper(name, v)
        assert [{**h} for h in opt.hypers] == before

def test_hypers_that_are_refused_say_more():
    for make in (adam_jit,lion_jit,sgd_jit):
        with pytest.raises(TypeError, match='has to be a number, but is .*`betas`, `mom` is the first') as e:
            make(parameters((2,)), 0.1, (0.9,0.99))
        assert 'sqr_mom' not in str(e.value)
    for v in (torch.tensor(0.1),np.float64(0.1)):
        with pytest.raises(TypeError, match=r'pass `float\(lr\)`'): adam_jit(parameters((2,)), v)
    opt = sgd_jit(two_groups(), 0.1)
    with pytest.warns(UserWarning, match='does not use the hyper `sqr_mom`'): opt.set_hyper('sqr_mom', 'a word')

def test_hypers_that_make_no_sense():
    "A warning where the optimizer is made, and no more: fastai trains with them"
    senseless = [('lr',inf),('lr',nan),('wd',-inf),('mom',1.5),('sqr_mom',-0.1),('sqr_mom',1.5),('eps',-1.)]
    odd = [('lr',0),('lr',-0.1),('wd',-0.1),('mom',0.),('mom',-0.5),('sqr_mom',0.),('eps',0.)]
    for name,v in senseless:
        with pytest.warns(UserWarning, match=f'`adam_jit_step` gets `{name}={v}`'):
            opt = adam_jit(parameters((2,)), **{'lr':0.1, name:v})
        opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for name,v in odd: opt = adam_jit(parameters((2,)), **{'lr':0.1, name:v})
        opt.set_hyper('lr', inf)  # a schedule may do what it likes

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
