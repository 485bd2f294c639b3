"Compiled steps are as good as Python functions: documented, inspected, pickled; and they run without TorchScript"
import copy,inspect,pickle,pydoc,re,subprocess,sys,warnings
from functools import partial

import pytest
import torch
from fastcore.docments import docments
from fastai.learner import Learner
from torch import nn

from fastxtend_jit.learner import jit_opt
from fastxtend_jit.step import JitStep
from tests import engine
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

METHODS = [Learner.to_jit,Learner.to_native,Learner.compare_opt,jit_opt,JitOptimizer.explain,JitOptimizer.step,
           JitOptimizer.zero_grad,JitOptimizer.clear_state,JitOptimizer.load_state_dict,
           JitLookahead.step,JitLookahead.clear_state,JitLookahead.state_dict,JitLookahead.load_state_dict]
FACTORIES = [j for _,j in PAIRS+OTHERS]
@pytest.mark.parametrize('f', [*STEPS, *FACTORIES, JitOptimizer, JitLookahead, *METHODS], ids=lambda f: f.__qualname__)
def test_docments(f):
    "Every parameter has its comment, and the API page shows them"
    show_doc = pytest.importorskip('nbdev.showdoc').show_doc
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

@pytest.mark.parametrize('jit', FACTORIES, ids=lambda f: f.__name__)
def test_factories_pickle(jit):
    assert pickle.loads(pickle.dumps(jit)) is jit and copy.deepcopy(jit) is jit
    f = pickle.loads(pickle.dumps(partial(jit, eps=1e-7)))
    assert f.func is jit and f.keywords == {'eps':1e-7}

def test_fallback(monkeypatch):
    "Where there is no TorchScript, plain functions run, with one warning for all of them and the same results"
    engine.without_torchscript(monkeypatch)
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

@pytest.mark.slow
def test_without_torchscript():
    "As PyTorch will be one day: all imports, and the numbers are the same. Tolerances are those of all parity tests"
    cmd = [sys.executable,'-W','ignore','-m','tests.without_torchscript','tests/test_parity.py','-q',
           '-k','cpu and float64 and schedule']
    res = subprocess.run(cmd, capture_output=True, text=True)
    assert res.returncode == 0, res.stdout[-3000:]+res.stderr[-2000:]
    assert re.search(r'^6\d passed', res.stdout, re.M), res.stdout[-300:]
