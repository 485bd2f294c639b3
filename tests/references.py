"Lion, Adan, StableAdamW and Muon by their formulas, as callbacks of fastai's `Optimizer`, a tensor at a time"
from functools import partial

import torch
from fastai.optimizer import Optimizer,l2_reg,weight_decay
from fastcore.foundation import L

def _lion(p, lr, mom, avg_mom, grad_avg=None, **_):
    g,m = p.grad.data,torch.zeros_like(p.data) if grad_avg is None else grad_avg
    # In float32, another rounding of the direction turns a sign now and then: this is optimi's, and ours
    p.data.add_(torch.lerp(m, g, 1-mom).sign(), alpha=-lr)
    return {'grad_avg': torch.lerp(m, g, 1-avg_mom)}

def _average(avg, x, beta): return (torch.zeros_like(x) if avg is None else avg)*beta + (1-beta)*x
def _average_sqr(avg, x, beta): return (torch.zeros_like(x) if avg is None else avg*beta).addcmul(x, x, value=1-beta)

def _adan(p, lr, mom, diff_mom, sqr_mom, eps, wd, decouple_wd, step=0, grad_avg=None, diff_avg=None, sqr_avg=None,
          prev_grad=None, do_wd=True, **_):
    g,step = p.grad.data.clone(),step+1
    d = torch.zeros_like(g) if prev_grad is None else g-prev_grad
    m,v,n = _average(grad_avg, g, mom),_average(diff_avg, d, diff_mom),_average_sqr(sqr_avg, g + diff_mom*d, sqr_mom)
    m_hat,v_hat,n_hat = (a/(1 - b**step) for a,b in ((m,mom), (v,diff_mom), (n,sqr_mom)))
    p.data.sub_(lr*(m_hat + diff_mom*v_hat)/(n_hat.sqrt() + eps))
    if decouple_wd and do_wd: p.data.div_(1 + lr*wd)
    return dict(step=step, grad_avg=m, diff_avg=v, sqr_avg=n, prev_grad=g)

def _stableadam(p, lr, mom, sqr_mom, eps, wd, decouple_wd, step=0, grad_avg=None, sqr_avg=None, do_wd=True, **_):
    g,step = p.grad.data,step+1
    m,v = _average(grad_avg, g, mom),_average_sqr(sqr_avg, g, sqr_mom)
    m_hat,v_hat = m/(1 - mom**step),v/(1 - sqr_mom**step)
    # in 16 bits the squares overflow
    rms = (g.double()/v_hat.double().sqrt().clamp(min=eps)).square().mean().sqrt().item()
    lr = lr/max(1., rms)
    if decouple_wd and do_wd: p.data.mul_(1 - lr*wd)
    p.data.sub_(lr*(m_hat/(v_hat.sqrt() + eps)))
    return dict(step=step, grad_avg=m, sqr_avg=v)

def lion(params, lr, mom=0.9, avg_mom=0.99, wd=0., decouple_wd=True):
    return Optimizer(params, [weight_decay if decouple_wd else l2_reg, _lion], lr=lr, mom=mom, avg_mom=avg_mom, wd=wd)

def _decays_itself(cb, params, decouple_wd, **hypers):
    return Optimizer(params, [*([] if decouple_wd else [l2_reg]), partial(cb, decouple_wd=decouple_wd)], **hypers)

def adan(params, lr, mom=0.98, diff_mom=0.92, sqr_mom=0.99, eps=1e-6, wd=0.02, decouple_wd=True):
    hypers = dict(lr=lr, mom=mom, diff_mom=diff_mom, sqr_mom=sqr_mom, eps=eps, wd=wd)
    return _decays_itself(_adan, params, decouple_wd, **hypers)

def stableadam(params, lr, mom=0.9, sqr_mom=0.99, eps=1e-6, wd=0.01, decouple_wd=True):
    return _decays_itself(_stableadam, params, decouple_wd, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)

def _adam(p, lr, mom, sqr_mom, eps, step=0, grad_avg=None, sqr_avg=None, **_):
    g,step = p.grad.data,step+1
    m,v = _average(grad_avg, g, mom),_average_sqr(sqr_avg, g, sqr_mom)
    p.data.addcdiv_(m, (v/(1 - sqr_mom**step)).sqrt() + eps, value=-lr/(1 - mom**step))
    return dict(step=step, grad_avg=m, sqr_avg=v)

def orthogonal(x):
    "The polynomial of Muon's five iterations, of a matrix"
    x = x/x.norm().clamp(min=1e-7)
    for _ in range(5): x = 3.4445*x - 4.7750*x@x.mT@x + 2.0315*x@x.mT@(x@x.mT)@x
    return x

def _muon(p, lr, mom, nesterov, adjust, grad_avg=None, **_):
    g = p.grad.data
    m = torch.lerp(torch.zeros_like(g) if grad_avg is None else grad_avg, g, 1-mom)
    x = (torch.lerp(g, m, mom) if nesterov else m).flatten(1)
    r,c = x.shape
    x = x.double() if x.dtype == torch.float64 else x.float()
    x = orthogonal(x) if r <= c else orthogonal(x.mT).mT
    by = 0.2*max(r, c)**0.5 if adjust == 'match_rms_adamw' else max(1, r/c)**0.5
    p.data.add_(x.to(p.dtype).reshape(p.shape), alpha=-lr*by)
    return dict(grad_avg=m)

def _is_layer(p): return p.dim() > 1 and (p.dim() == 2 or p.shape[0] > 1)
def _is_matrix(p):
    return p.dim() > 1 and p.numel() and min(p.shape[0], p[0].numel()) > 1 and not (p.dim() > 2 and p.shape[1] == 1)

def _muon_or_adam(p, rest, nesterov, adjust, **kwargs):
    if not _is_matrix(p) or any(p is q for q in rest): return _adam(p, **kwargs)
    return _muon(p, nesterov=nesterov, adjust=adjust, **kwargs)

def muon(params, lr, mom=0.95, nesterov=True, wd=0., decouple_wd=True, adjust='match_rms_adamw', rest=None,
         sqr_mom=0.99, eps=1e-5):
    "Muon for matrices but for the first and the last one, or for `rest`; Adam for all others"
    params = L(params)
    layers = [p for p in (params.concat() if isinstance(params[0], (list,L)) else params) if _is_layer(p)]
    rest = [*layers[:1],*layers[-1:]] if rest is None else rest
    update = partial(_muon_or_adam, rest=rest, nesterov=nesterov, adjust=adjust)
    hypers = dict(lr=lr, mom=mom, wd=wd, sqr_mom=sqr_mom, eps=eps)
    return Optimizer(params, [weight_decay if decouple_wd else l2_reg, update], **hypers)
