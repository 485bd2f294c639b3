"Tensors that are no plain ones: classes that know no lists, what kernels refuse, gradients of a dtype of their own"
import pytest
import torch
from torch import Tensor,nn
from torch.utils._pytree import tree_map
from torch.utils._python_dispatch import return_and_correct_aliasing

from tests.cases import *
from tests.support import every,fingerprint,new_grads,parameters,params_of,put,same_grads,slow_but,train,twins

# --- Classes that hold their numbers in another tensor

class Scaled(Tensor):
    "Numbers that are stored as half of what they are. A call with lists writes to what it has unpacked, and is lost"
    @staticmethod
    def __new__(cls, half):
        return Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype, device=half.device)
    def __init__(self, half): self.half = half
    def __repr__(self): return f'{type(self).__name__}({self.half})'

    refuses = ()
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        name,kwargs = func._schema.name.split('::')[1],kwargs or {}
        if any(name.startswith(o) for o in cls.refuses): raise NotImplementedError(f'{cls.__name__} knows no {name}')
        if name == 'detach': return return_and_correct_aliasing(func, args, kwargs, cls(args[0].half))
        if name == 'clone': return cls(args[0].half.clone())
        res = func(*tree_map(numbers, args), **tree_map(numbers, kwargs))
        if name.startswith('_f') or not name.endswith('_') or not isinstance(args[0], Scaled): return res
        args[0].half.copy_(res/2)
        return args[0]

class NoLists(Scaled):   refuses = '_foreach_','_fused_'
class NoSquares(Scaled): refuses = '_foreach_','_fused_','addcmul','mul','pow'

def numbers(t): return t.half*2 if isinstance(t, Scaled) else t

def _twins(case, make, steps=5, jits=(False,True), **kw):
    "Optimizers that have taken `steps` equal steps; every second parameter is what `make` makes of it"
    opts = []
    for jit in jits:
        ps = parameters((3,4), (64,64), (5,), (130,), (7,2))
        ps = [make(p.detach()) if i%2 else p for i,p in enumerate(ps)]
        opts.append(case.make([ps[:3],ps[3:]], jit, **kw))
    for i in range(steps):
        same_grads(opts, i)
        for o in opts: o.set_hyper('lr', 0.01/(i+1)); o.step()
    return opts

def _same_numbers(ours, theirs, tol=TOL[torch.float32]):
    for p,q in zip(params_of(ours), params_of(theirs)): close(numbers(p.detach()), numbers(q.detach()), tol)

@pytest.mark.parametrize('cls', slow_but([Scaled], [Scaled,NoLists]))
@pytest.mark.parametrize('case', slow_but(ALL+TWO_AHEAD, ALL+TWO_AHEAD+CASES), ids=str)
def test_class_that_knows_no_lists(case, cls):
    theirs,ours = _twins(case, lambda t: nn.Parameter(cls(t/2)), steps=7)
    assert type(params_of(ours)[1]) is cls
    _same_numbers(ours, theirs)
    for p,q in zip(params_of(ours), params_of(theirs)):
        assert {k:type(v) for k,v in ours.state[p].items()} == {k:type(v) for k,v in theirs.state[q].items()}

@every
def test_gradients_of_a_class(case):
    "The parameters are plain, and so is the memory that is written"
    theirs,ours = twins(case, 2)
    for o in (theirs,ours):
        for i,p in enumerate(params_of(o)):
            g = torch.full_like(p, i+1.)
            p.grad = NoLists(g/2) if o is ours else g
        o.step()
    _same_numbers(ours, theirs)
    ours.zero_grad()
    assert all(numbers(p.grad).count_nonzero() == 0 for p in params_of(ours))

@every
def test_class_that_cannot_take_the_step(case):
    "It is tried on copies, and refused before anything has changed"
    if case.jit in (sgd_jit,larc_jit): case = Case(case.native, case.jit, {**case.kw, 'decouple_wd':True})  # multiplies
    ours, = _twins(case, lambda t: nn.Parameter(NoSquares(t/2)), steps=0, jits=[True])
    new_grads(params_of(ours))
    before = [numbers(p.detach()).clone() for p in params_of(ours)]
    with pytest.raises(TypeError, match=r'parameter . of group ..* is a `NoSquares`.* cannot .*knows no'): ours.step()
    assert all(map(torch.equal, before, (numbers(p.detach()) for p in params_of(ours))))
    assert not any(st.keys() & {*ours.state_names,'step'} for st in ours.state.values())

def test_explain_tells_of_a_class():
    ours, = _twins(ALL[2], lambda t: nn.Parameter(NoLists(t/2)), steps=1, jits=[True])
    why = ours.explain()['why not faster']
    assert why.str.contains('class of tensors').tolist() == [False,True] and why[0] == ''

class Retracting(Tensor):
    "Moves along a curve, and not by adding"
    def add_(self, other, alpha=1): return self.copy_((self + alpha*other).sin())

def test_class_that_moves_in_its_own_way():
    p = nn.Parameter(torch.ones(3).as_subclass(Retracting))
    p.grad = torch.ones(3)
    opt = sgd_jit([p], lr=0.1)
    with pytest.raises(TypeError, match='is a `Retracting`, which defines `add_` anew.* fastai'): opt.step()
    assert p.tolist() == [1.]*3

# --- What kernels refuse, or would crash at

def in_inference_mode(t):
    with torch.inference_mode(): return t.clone()
def negated(t): return torch.complex(t, -t).conj().imag
def requires_grad(t): return t.clone().requires_grad_()
def expanded(t): return t.mean().expand(t.shape)
def zero_tensor(t): return torch._efficientzerotensor(t.shape)

@every
@pytest.mark.parametrize('odd', [in_inference_mode,negated,requires_grad,expanded,zero_tensor])
@pytest.mark.parametrize('gaps', slow_but([False], [False,True]))
def test_state_that_kernels_cannot_write_to(case, odd, gaps):
    "It is copied"
    opt,well = twins(case, 2)
    for o in (opt,well):
        p = params_of(o)[1]
        if gaps: p.data = p.data.repeat_interleave(2, -1)[...,::2]
        make = odd if o is opt else lambda t: odd(t).detach().clone()
        o.state[p].update({n: make(o.state[p][n]) for n in {*o.state_names} & {*o.state[p]} if o.state[p][n].ndim})
    train([opt,well], range(7))
    for p,q in zip(params_of(opt), params_of(well)):
        assert torch.equal(p, q)
        same = [torch.equal(v, well.state[q][k]) for k,v in opt.state[p].items() if isinstance(v, Tensor)]
        assert all(same)

@every
@pytest.mark.parametrize('odd', [in_inference_mode,negated,requires_grad,expanded,zero_tensor])
def test_odd_gradients(case, odd):
    opt,well = twins(case, 2)
    for i in range(4):
        for o in (opt,well):
            for j,p in enumerate(params_of(o)):
                g = torch.sin(torch.arange(p.numel())+i).view(p.shape)
                p.grad = g if j != 1 else odd(g) if o is opt else odd(g).detach().clone()
            o.step()
    _same_numbers(opt, well)

@pytest.mark.parametrize('case', ALL+TWO_AHEAD, ids=str)
def test_loaded_in_inference_mode(case):
    opt,well = twins(case, 3)
    sd = well.state_dict()
    with torch.inference_mode(): opt.load_state_dict(sd)
    for p,q in zip(params_of(opt), params_of(well)): p.data = q.data.clone()
    train([opt,well], range(7))
    _same_numbers(opt, well)

@pytest.mark.parametrize('case', ALL+TWO_AHEAD, ids=str)
def test_step_in_inference_mode(case):
    opt,well = twins(case, 1)
    for i in range(7):
        same_grads([opt,well], i)
        with torch.inference_mode(i%3 > 0): opt.step()
        well.step()
    _same_numbers(opt, well, 0.)

def _free(t):
    "Free the memory of `t`, and how to bring it back"
    was,memory = t.untyped_storage().nbytes(),t.clone()
    t.untyped_storage().resize_(0)
    def mend(): t.untyped_storage().resize_(was); t.copy_(memory)
    return mend

@every
@pytest.mark.parametrize('steps', slow_but([2], [0,2]))
@pytest.mark.parametrize('what', ['parameter','gradient','state','slow'])
def test_freed_memory(case, what, steps):
    "As FSDP frees it. fastai's optimizers crash"
    opt,well = twins(case, steps)
    before,p = fingerprint(opt),params_of(opt)[1]
    own = {k:v for k,v in opt.state[p].items() if isinstance(v, Tensor) and v.ndim}
    freed = dict(parameter=p.data, gradient=p.grad, state=next(iter(own.values()), None),
                 slow=getattr(opt, 'slow_weights', None) and opt.slow_weights[0][1])[what]
    if freed is None: return
    mend = _free(freed)
    if what != 'slow' or opt.count%opt.k == opt.k-1:
        with pytest.raises(ValueError, match='has no memory: it was freed'): opt.step()
    mend()
    if what == 'gradient':  # a view of what was freed, as of FSDP's flat gradients
        own = p.grad
        p.grad = torch.cat([torch.ones(8, dtype=p.dtype), own.flatten()])[8:].view_as(own)
        mend = _free(p.grad._base)
        with pytest.raises(ValueError, match='has no memory: it was freed'): opt.step()
        p.grad = own
    assert fingerprint(opt)[1:] == before[1:]
    train([opt,well], range(3))
    _same_numbers(opt, well, 0.)

@pytest.mark.parametrize('make,err,what', [
    (zero_tensor, ValueError, 'zero tensor without memory'), (negated, ValueError, 'view that negates'),
    (in_inference_mode, ValueError, 'tensor of inference mode')])
def test_parameter_that_kernels_cannot_write_to(make, err, what):
    opt,p = twins(ALL[2], 0)[0],torch.ones(4)
    odd = make(p)
    odd.grad = torch.ones(4)
    opt = adam_jit([[odd]], lr=0.1)
    with pytest.raises(err, match=what): opt.step()
    assert not opt.state[odd]

def test_parameters_of_inference_mode():
    "Which may be trained in inference mode, and only there"
    with torch.inference_mode():
        p,q = torch.ones(3),torch.ones(3)
        opts = [f([o], lr=0.1) for f,o in ((adam_jit,p), (Adam,q))]
        for i in range(3):
            for o,opt in zip((p,q), opts): o.grad = torch.arange(3.); opt.step()
        close(p, q, TOL[torch.float32])
    with pytest.raises(ValueError, match='tensor of inference mode'): opts[0].step()

def test_state_in_another_layout():
    opt,_ = twins(ALL[2], 2)
    p = params_of(opt)[1]
    mend = put(opt.state[p], 'sqr_avg', opt.state[p]['sqr_avg'].to_sparse())
    with pytest.raises(TypeError, match='sqr_avg.*layout torch.sparse_coo: make it dense'): opt.step()
    mend(); opt.step()

# --- Gradients of a dtype of their own

PAIRS_OF_DTYPES = [(torch.bfloat16,torch.float32), (torch.float16,torch.float32), (torch.float32,torch.bfloat16),
                   (torch.float32,torch.float64)]

def _with_grad_dtype(case, jit, exact, param, grad, steps=25):
    torch.manual_seed(0)
    ps = [nn.Parameter(torch.randn(s).to(param)) for s in ((3,4), (5,), (64,64), ())]
    for p in ps:
        p.grad_dtype = grad
        if exact: p.grad_dtype,p.data = torch.float64,p.data.double()
    opt = case.make([ps[:2],ps[2:]], jit)
    for _ in range(steps):
        for p in ps:
            g = torch.randn(p.shape).to(grad)
            p.grad = g.double() if exact else g
        opt.step()
    return opt

@pytest.mark.skipif(not hasattr(Tensor, 'grad_dtype'), reason='PyTorch 2.10 brings `grad_dtype`')
@pytest.mark.parametrize('param,grad', slow_but(PAIRS_OF_DTYPES[:1], PAIRS_OF_DTYPES))
@pytest.mark.parametrize('case', slow_but(EIGHT+TWO_AHEAD, EIGHT+TWO_AHEAD+NATIVE), ids=str)
def test_grad_dtype(case, param, grad):
    "Averages have the gradient's dtype, as in fastai, and results are as close to exact ones"
    exact,theirs,ours = (_with_grad_dtype(case, *o, param, grad) for o in ((False,True), (False,False), (True,False)))
    for x,p,q in zip(*map(params_of, (exact,theirs,ours))):
        size = x.abs().max()
        off,allowed = ((x-o.double()).abs().max()/size for o in (q,p))
        rounding = max(3*torch.finfo(param).eps, torch.finfo(grad).eps/20)  # a step is a small part of a weight
        assert q.dtype == param and off <= 1.2*allowed + rounding
        types = [{k:getattr(v, 'dtype', None) for k,v in o.state[r].items()} for o,r in ((theirs,p),(ours,q))]
        if case.jit is not larc_jit: assert types[0] == types[1]  # `local_lr` of one element

@pytest.mark.skipif(not hasattr(Tensor, 'grad_dtype'), reason='PyTorch 2.10 brings `grad_dtype`')
def test_checkpoint_with_grad_dtype():
    opt = _with_grad_dtype(ALL[2], True, False, torch.bfloat16, torch.float32, steps=3)
    other = _with_grad_dtype(ALL[2], True, False, torch.bfloat16, torch.float32, steps=0)
    other.load_state_dict(opt.state_dict())
    for p,q in zip(params_of(opt), params_of(other)): q.data,q.grad = p.data.clone(),p.grad
    for o in (opt,other): o.step()
    _same_numbers(other, opt, 0.)
    p = params_of(other)[0]
    g,p.grad = p.grad,None
    p.grad_dtype = torch.bfloat16
    p.grad = g.bfloat16()
    with pytest.raises(ValueError, match='`grad_avg`.*has dtype torch.float32, but the parameter has torch.bfloat16'):
        other.step()
