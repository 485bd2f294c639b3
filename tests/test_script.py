"Compiled steps are as good as Python functions: documented, inspected, pickled; and a user's own step is as good as ours"
import copy,inspect,pickle,pydoc,re,subprocess,sys,warnings
from functools import partial
from typing import List,Optional

import pytest
import torch
from fastcore.docments import docments
from fastai.learner import Learner
from nbdev.showdoc import show_doc
from torch import Tensor,nn

from fastxtend_jit import script
from fastxtend_jit.learner import jit_opt
from fastxtend_jit.script import JitStep,jit_step
from tests.cases import *

STEPS = [globals()[f'{j.__name__}_step'] for _,j in PAIRS+OTHERS]
steps = pytest.mark.parametrize('step', STEPS, ids=lambda s: s.__name__)

@steps
def test_documented(step):
    sig = inspect.signature(step)
    assert [*sig.parameters][:2] == ['params','grads'] and sig.parameters['lr'].annotation is float
    text = pydoc.render_doc(step, renderer=pydoc.plaintext)
    for o in (f'{step.__name__}(params: ', 'lr: float', step.__doc__): assert o in text
    assert step.__doc__ and step.__module__ == f"fastxtend_jit.{step.__name__.removesuffix('_jit_step')}"
    assert inspect.isroutine(step) and 'def ' in inspect.getsource(step)

METHODS = [Learner.to_jit,Learner.to_native,Learner.compare_opt,jit_opt,JitOptimizer.explain,JitOptimizer.step,JitOptimizer.zero_grad,JitOptimizer.clear_state,
           JitOptimizer.load_state_dict,JitLookahead.step,JitLookahead.clear_state,JitLookahead.state_dict,JitLookahead.load_state_dict]
@pytest.mark.parametrize('f', [*STEPS, *(j for _,j in PAIRS+OTHERS), JitOptimizer, JitLookahead, *METHODS], ids=lambda f: f.__qualname__)
def test_docments(f):
    "Every parameter has its comment, and the API page shows them"
    docs = docments(f)
    page = str(show_doc(f))
    assert f.__doc__
    for n,p in inspect.signature(f).parameters.items():
        if p.kind is not p.VAR_KEYWORD and n != 'self': assert docs[n] and docs[n] in page, n

@steps
def test_compiled(step):
    assert isinstance(step.compiled, torch.jit.ScriptFunction)
    assert str(step.graph).startswith('graph(%params')
    assert 'aten::_foreach' in str(step.compiled.inlined_graph) or 'aten::_fused' in str(step.compiled.inlined_graph)
    assert step.code.startswith(f'def {step.__name__}(params: List[Tensor]')

@steps
def test_copies(step):
    for o in (pickle.loads(pickle.dumps(step)), copy.deepcopy(step), copy.copy(step)): assert o is step

@pytest.mark.parametrize('jit', [j for _,j in PAIRS+OTHERS], ids=lambda f: f.__name__)
def test_factories_pickle(jit):
    assert pickle.loads(pickle.dumps(jit)) is jit and copy.deepcopy(jit) is jit
    f = pickle.loads(pickle.dumps(partial(jit, eps=1e-7)))
    assert f.func is jit and f.keywords == {'eps':1e-7}

def test_fallback(monkeypatch):
    "Where there is no TorchScript, plain functions run, with one warning for all of them and the same results"
    monkeypatch.setattr(script, 'torchscript_ok', lambda: False)
    monkeypatch.setattr(script, '_warned', [])
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        plain = [JitStep(s.fn, s.elementwise) for s in STEPS]
        assert all(p.compiled is s.fn for p,s in zip(plain, STEPS))
    assert [('run uncompiled' in str(w.message)) for w in ws] == [True]
    for case,step in zip(ALL, plain):
        opts = [case.make(nn.Parameter(torch.ones(3,4)), True) for _ in range(2)]
        opts[0].opt_step = step
        for i in range(7):
            for o in opts: o.param_lists[0][0].grad = torch.linspace(-1, 1, 12).view(3,4)*(i+1); o.step()
        close(opts[0].param_lists[0][0], opts[1].param_lists[0][0], 3e-5)

IMPORT = """
import time,warnings
with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    import fastai.optimizer,fastai.basics
warnings.simplefilter('error')
start = time.process_time()
import fastxtend_jit.all
print(time.process_time()-start)
"""

def test_import():
    "No warning, and no more than 1.5 s after fastai"
    out = subprocess.run([sys.executable, '-c', IMPORT], capture_output=True, text=True)
    assert out.returncode == 0 and not out.stderr, out.stderr
    assert float(out.stdout) <= 1.5

# A user's own step: Lion (https://arxiv.org/abs/2302.06675), as a plain function and compiled by PyTorch

def lion_step(params:List[Tensor], grads:List[Tensor], grad_avg:List[Tensor], lr:float, mom:float, sqr_mom:float, wd:float, do_wd:bool):
    "A step of Lion"
    if do_wd: torch._foreach_mul_(params, 1 - lr*wd)
    update = torch._foreach_add(torch._foreach_mul(grad_avg, mom), grads, alpha=1-mom)
    torch._foreach_add_(params, torch._foreach_sign(update), alpha=-lr)
    torch._foreach_mul_(grad_avg, sqr_mom)
    torch._foreach_add_(grad_avg, grads, alpha=1-sqr_mom)

def lion(params, lr, mom=0.9, sqr_mom=0.99, wd=0.): return JitOptimizer(params, STEP[0], lr=lr, mom=mom, sqr_mom=sqr_mom, wd=wd)
STEP = [lion_step]

with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    OWN = dict(plain=lion_step, decorated=jit_step(lion_step), pieces=jit_step(elementwise=True)(lion_step), scripted=torch.jit.script(lion_step))

@pytest.mark.parametrize('own', OWN)
def test_own_step(own, monkeypatch):
    "Against Lion by hand: groups, decay switched off, a schedule, a parameter that comes late, a checkpoint in between"
    monkeypatch.setattr(sys.modules[__name__], 'STEP', [OWN[own]])
    torch.manual_seed(0)
    ps = [nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in ((3,4),(5,),(2,2))]
    ref,avg = [p.detach().clone() for p in ps],[torch.zeros_like(p) for p in ps]
    opt = lion([ps[:2],ps[2:]], [0.1,0.2], wd=0.1)
    opt.state[ps[1]]['do_wd'] = False
    assert opt.state[ps[0]] == {}
    for i in range(10):
        lrs,mom = [0.1/(i+1),0.2/(i+1)],0.95-0.01*i
        opt.set_hyper('lr', lrs); opt.set_hyper('mom', mom)
        for n,(p,r,m) in enumerate(zip(ps, ref, avg)):
            if n == 2 and i < 3: continue
            p.grad = torch.randn_like(p)
            lr = lrs[n//2]
            if n != 1: r.mul_(1 - lr*0.1)
            r.sub_(lr*torch.sign(mom*m + (1-mom)*p.grad))
            m.mul_(0.99).add_(p.grad, alpha=0.01)
        opt.step()
        if i == 5:
            sd = copy.deepcopy(opt.state_dict())
            opt = lion([ps[:2],ps[2:]], 0.)
            opt.load_state_dict(sd)
    for n,(p,r,m) in enumerate(zip(ps, ref, avg)):
        close(p, r, 1e-11)
        close(opt.state[p]['grad_avg'], m, 1e-11)
        assert opt.state[p].keys() == {'grad_avg', *['do_wd']*(n==1)}
    if own == 'plain':
        loaded,ps = pickle.loads(pickle.dumps((opt, ps)))
        assert loaded.opt_step.fn is lion_step and {*loaded.state} == {*ps}
    opt = copy.deepcopy(opt)
    opt.clear_state()

def test_without_torchscript():
    "As PyTorch will be one day: all imports, and the numbers are the same. Tolerances are those of all parity tests"
    cmd = [sys.executable,'-W','ignore','-m','tests.without_torchscript','tests/test_parity.py','-q','-k','cpu and float64 and schedule']
    res = subprocess.run(cmd, capture_output=True, text=True)
    assert res.returncode == 0, res.stdout[-3000:]+res.stderr[-2000:]
    assert re.search(r'^6\d passed', res.stdout, re.M), res.stdout[-300:]
