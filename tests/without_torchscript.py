"""Run tests as if PyTorch had no TorchScript any more, as will be so one day

    python -m tests.without_torchscript tests/test_parity.py
"""
import sys,warnings

import pytest,torch
from fastai.text.all import *  # fastai compiles a layer of its own while it is imported
from fastai.vision.all import *
from fastai.tabular.all import *

for name in ('script','ScriptFunction','CompilationUnit'): delattr(torch.jit, name)

if __name__ == '__main__':
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        from fastxtend_jit.all import *
        adam_jit_step.compiled
    assert not adam_jit_step.is_compiled and 'TorchScript cannot compile here' in str([w.message for w in told])
    sys.exit(pytest.main(['-p','no:xdist','-p','no:cacheprovider',*sys.argv[1:]]))
