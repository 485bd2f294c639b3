"What is counted as a call, and what calls cost in memory"
import pytest
import torch
from torch.profiler import record_function

from fastxtend_jit.calls import *
from fastxtend_jit.launches import Launches

X = torch.ones(2, 3)

@torch.jit.script
def asks(x):
    "In TorchScript, a question about a tensor is a call too"
    if x.is_cuda or x.dtype == torch.float64: return x
    return x.view(6)

def mark():
    with record_function('a name'): pass

@pytest.mark.parametrize('f', [lambda: X.view(6).t()[0], X.detach, lambda: torch.ops.aten._unsafe_view(X, [6]),
                               lambda: asks(X), mark], ids=['view','detach','unsafe_view','question','mark'])
def test_computes_nothing(f): assert aten_calls(f) == 0

@pytest.mark.parametrize('make', [Calls,Traffic,Rehearsal,lambda: Launches(device='cpu')],
                         ids=['Calls','Traffic','Rehearsal','Launches'])
def test_counts(make):
    "All agree"
    with make() as mode: torch.empty(3).fill_(X[0].sum().item())
    assert mode.calls == {'sum':1, '_local_scalar_dense':1, 'empty':1, 'fill_':1}

def test_other_libraries():
    lib = torch.library.Library('trace_test', 'DEF')
    lib.define('twice(Tensor x) -> Tensor')
    lib.impl('twice', lambda x: 2*x, 'CompositeExplicitAutograd')
    with Calls() as c: torch.ops.trace_test.twice(X)
    assert c.calls == {'trace_test::twice':1}

def test_rehearsal():
    "What was there stays, generators too; what was made meanwhile changes; what a call would have returned it returns"
    x,lists,gen = torch.zeros(1000),[torch.zeros(3)],torch.Generator()
    before = gen.get_state()
    with Rehearsal() as r:
        y = torch.empty(1000).normal_(generator=gen)
        assert x.add_(y) is x and torch.add(x, 1, out=x) is x
        torch._foreach_add_(lists, 1.)
        del y
        z = x+1
    assert not x.any() and not lists[0].any() and z.eq(1).all() and torch.equal(gen.get_state(), before)
    assert r.peak == 4000 and r.calls.total() == 6

def test_memory(capfd):
    x,xs = torch.zeros(1000),[torch.zeros(1000)]
    def f():
        y = x.view(10,100)+1
        z = y*2+y
        del y,z
        return x*3
    assert aten_calls(f) == 4 and 12000 <= peak_memory(f) < 12100
    assert peak_memory(lambda: x.add_(1)) < 100
    # PyTorch would say that it knows nothing of this one
    assert peak_memory(xs.pop) == 0 and not capfd.readouterr().err
