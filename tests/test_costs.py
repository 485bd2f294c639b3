"What things cost, as counts: seconds are for the benchmark"
import subprocess,sys
from typing import List

import torch
from torch import Tensor,nn

from tests import engine
from tests.cases import *
from tests.support import every,new_grads,params_of,python_calls,trained

@every
def test_plan_is_kept(case):
    "From its second step on an optimizer goes by one plan, also over lookaheads"
    opt = trained(case, 1)
    plan = engine.plan_of(opt)
    for i in range(13):
        new_grads(params_of(opt), i)
        opt.step()
        assert engine.plan_of(opt) is plan, i

def test_gradients_among_parameters():
    "Columns of one matrix, gradients too: four times as many take four times as many calls, not sixteen times"
    def calls(n):
        b = torch.randn(40, 2*n)
        ps = [nn.Parameter(b[:,i]) for i in range(n)]
        for i,p in enumerate(ps): p.grad = b[:,n+i]
        return python_calls(EIGHT[2].make(ps, True).step)
    calls(2)  # proves the step
    few,many = calls(100),calls(400)
    assert many <= 5*few

IMPORT = """
import sys,warnings
with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    import fastai.optimizer,fastai.basics
import torch
warnings.simplefilter('error')
compiled = []
torch.jit.script = torch.jit.CompilationUnit = lambda *args, **kw: compiled.append(args)
before = {*sys.modules}
import fastxtend_jit.all
new = {m.split('.')[0] for m in {*sys.modules}-before} - {*sys.stdlib_module_names}
print(len(compiled), *new)
"""

def test_import():
    "After fastai: no warning, nothing compiled, and of other packages no module more"
    out = subprocess.run([sys.executable, '-c', IMPORT], capture_output=True, text=True)
    assert out.returncode == 0 and not out.stderr, out.stderr
    assert out.stdout.split() == ['0','fastxtend_jit']

def counted(params:List[Tensor], grads:List[Tensor], lr:float, n:int=1): torch._foreach_add_(params, grads, alpha=-lr)

def test_forms_are_few():
    "A constant that is another number at each step does not fill the memory"
    opt = JitOptimizer(params_of(EIGHT[0].make([torch.ones(3)], True)), counted, lr=0.1)
    for i in range(40):
        new_grads(params_of(opt), i)
        opt.n = i
        opt.step()
    assert engine.number_of_forms(opt) <= 16
