"""ATen's fused optimizer kernels for CUDA, computed on the CPU: what would a step be on a GPU?

Two generations. In the `old`, PyTorch 2.4 to 2.10, hypers are doubles: a float that meets one becomes a double, until
it is assigned. In the `new`, as from 2.11, all is cast to `opmath_t` first: double for float64, float for all else.
Where the rules come from, below aten/src/ATen/native:
- cuda/fused_adam_utils.cuh, cuda/Pow.cuh, cuda/MultiTensorApply.cuh, ForeachUtils.h: the wheels of 2.4.0 to 2.14.1
- cuda/FusedSgdKernel.cu, not in wheels. Old: pytorch f8fd0dea, of 2024, and cyyever/pytorch ff536a35, of about 2.9.
  New: a copy of about 2.11, and the machine code (sm_90) in libtorch_cuda.so of 2.14.1+cu130. PR 173227 changed it
- cuda/FusedAdamKernel.cu, not in wheels: pytorch 4c0bf121. FusedAdamWKernel.cu: a copy of about 2.11
- What nvcc contracts (-fmad=true), in the same machine code: each a*b + c is one fma, and in a*b + c*d it is a*b that
  is rounded first. One exception is not played: where SGD unscales, `p -= lr*g` is no fma for three elements of four

All is computed in float64, and rounded where a kernel rounds. For floats that is exact in + - * / and roots, and in an
fma but for one case in 2**29. In float64 itself nothing is fused. Powers are exact: CUDA's may be off by some ulps."""
from collections import Counter
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_dense = torch.ops.aten.is_non_overlapping_and_dense.default

def _scalar(x): return torch.as_tensor(x, dtype=torch.float64).reshape(())

def _check(ok, msg, err=RuntimeError):
    if not ok: raise err(msg)

def _layout(t, new):
    "What has to be the same in all lists. Strides of dimensions of size 1 count in 2.4 alone, taken for all the `old`"
    return t.shape,[st for st,n in zip(t.stride(), t.shape) if n != 1 or not new]

def _check_lists(name, lists, new):
    "Refuse what `check_fast_path_restrictions` (ForeachUtils.h) and AT_DISPATCH_FLOATING_TYPES_AND2 refuse"
    # The dispatcher's words, which looks for a device among the tensors
    _check(lists[0], f'There were no tensor arguments to this function, {name}', NotImplementedError)
    p,msg = lists[0][0],f'{name}: all lists must have same dtype, device, and layout'
    _check(all(len(l) == len(lists[0]) for l in lists), msg)  # nobody checks that: the kernels read past the end
    # As from 2.12, Adam takes bfloat16 averages beside float32. Refused here, since 2.11 refuses it
    _check(all(t.dtype == p.dtype and t.device == p.device for l in lists for t in l), msg)
    _check(all(t.layout == torch.strided and _dense(t) for l in lists for t in l), msg)
    _check(all(_layout(t, new) == _layout(ts[0], new) for ts in zip(*lists) for t in ts), msg)
    _check(p.dtype in FLOATS, f'"{name}" not implemented for {p.dtype}', NotImplementedError)

def _check_float(t, p):
    "Refuse a tensor that `data_ptr<float>()` or the checks of devices refuse"
    _check(t.device == p.device, 'must be on the same GPU device as the params')
    _check(t.dtype == torch.float32, f'expected scalar type Float but found {t.dtype}')

def _launch(new, math, lists, hypers, maximize, steps=None, grad_scale=None, found_inf=None):
    "The functors around the math: load, unscale, negate, compute, store"
    # `lr` as a tensor is one on the GPU: from one on the CPU, the kernels would take a double
    for t in (hypers['lr'],grad_scale,found_inf):
        if isinstance(t, Tensor): _check_float(t, lists[0][0])
    if found_inf is not None and found_inf == 1: return
    for i,(p,g,*state) in enumerate(zip(*lists)):
        op = torch.float64 if p.dtype == torch.float64 else torch.float32
        r = lambda x: x.to(op).double()  # rounded to `opmath_t` in both generations
        n = r if new else lambda x: x    # in the new only: the old has a double there
        kw = {k:n(_scalar(x)) for k,x in hypers.items()}
        if steps is not None: kw['step'] = _scalar(steps[i])
        grad = g.double() if grad_scale is None else r(g.double()/_scalar(grad_scale))
        res = math(r, n, p.double(), -grad if maximize else grad, *[s.double() for s in state], **kw)
        # Only now, as lists may share tensors. 16 bits are rounded from a float, even where the old SGD has a double
        if grad_scale is not None: g.copy_(grad)
        for t,x in zip((p,*state), res): t.copy_(r(x))

def _adam_math(r, n, p, g, m, v, mx=None, *, step, lr, beta1, beta2, weight_decay, eps, new, decouple):
    "Debiasing and `adam_math` of fused_adam_utils.cuh"
    # `pow_` is of its base's type (Pow.cuh). The old debiases in double, rounded as an argument of `adam_math`
    debias1,root2 = r(1 - n(beta1**step)),r(n(1 - n(beta2**step)).sqrt())
    if weight_decay != 0:
        if decouple: p = r(p - n(lr*weight_decay)*p)
        else:        g = r(g + p*weight_decay)
    if new:  # both by two std::fma
        sq = r(g*g)
        m,v = r(beta1*m + r(g - beta1*g)),r(beta2*v + r(sq - beta2*sq))
    else: m,v = r(beta1*m + (1-beta1)*g),r(beta2*v + (1-beta2)*g*g)
    if mx is not None: mx = torch.where(mx < v, v, mx)  # std::max, which keeps its first argument beside a NaN
    # Floats in both: the old only divides `lr` and adds `eps` in double
    denom = r(r(r((v if mx is None else mx).sqrt())/root2) + eps)
    return r(p - r(r(r(lr/debias1)*m)/denom)),m,v,mx

def _sgd_math(r, n, p, g, buf=None, *, lr, weight_decay, momentum, dampening, nesterov, is_first_step):
    "`sgd_math` of FusedSgdKernel.cu"
    if weight_decay != 0: g = r(g + weight_decay*p)
    if buf is not None:
        # The old leaves this in double, to be rounded when stored and where `g` is assigned
        buf = g if is_first_step else n(n(momentum*buf) + n(1-dampening)*g)
        g = r(g + momentum*buf) if nesterov else r(buf)
    return r(p - lr*g),buf

def _adam(name, new, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, *, amsgrad, maximize,
          grad_scale=None, found_inf=None, **hypers):
    "Host side of Adam and AdamW: FusedAdamKernel.cu, FusedAdamWKernel.cu"
    lists = [params, grads, exp_avgs, exp_avg_sqs, *([max_exp_avg_sqs] if amsgrad else [])]
    _check_lists(name, lists, new)
    # Nobody checks that: the kernels take what lies there for a float, and a test should not go on
    assert len(state_steps) == len(params) and all(s.dtype == torch.float32 for s in state_steps), 'a float32 for each'
    math = partial(_adam_math, new=new, decouple=name == 'aten::_fused_adamw_')
    _launch(new, math, lists, hypers, maximize, [s.flatten()[0] for s in state_steps], grad_scale, found_inf)

def _sgd(name, new, params, grads, momentum_buffer_list, *, nesterov, maximize, is_first_step,
         grad_scale=None, found_inf=None, **hypers):
    "Host side of SGD: FusedSgdKernel.cu. The momentum has to be positive with buffers, and 0 without"
    bufs,mom = momentum_buffer_list,hypers['momentum']
    lists = [params, grads, *([bufs] if bufs else [])]
    _check_lists(name, lists, new)
    _check(mom > 0 if bufs else mom == 0, f"Expected momentum {'>' if bufs else '=='} 0, but it is {mom}")
    math = partial(_sgd_math, nesterov=nesterov, is_first_step=is_first_step)
    _launch(new, math, lists, hypers, maximize, None, grad_scale, found_inf)

class CudaKernels(TorchDispatchMode):
    """Compute ATen's fused steps of Adam, AdamW and SGD as a GPU would, counted in `calls`. All else passes through

    No `fastxtend_jit.calls.Calls`, which watches all calls as they are: this one counts what it replaces"""
    kernels = {'aten::_fused_adam_':_adam, 'aten::_fused_adamw_':_adam, 'aten::_fused_sgd_':_sgd}

    def __init__(self,
        generation='new' # 'old' for PyTorch 2.4 to 2.10, 'new' for 2.11 and later
    ):
        super().__init__()
        self.new,self.calls = {'old':False, 'new':True}[generation],Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name  # without the overload: `tensor_lr` has the same arguments
        if name not in self.kernels: return func(*args, **(kwargs or {}))
        self.calls[name] += 1
        self.kernels[name](name, self.new, *args, **(kwargs or {}))
