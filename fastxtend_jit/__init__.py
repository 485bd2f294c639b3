"fastai's optimizers with fused, multi-tensor steps. This imports nothing: public names come when they are asked for"
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# All that is public, by the module that has it
_modules = dict(
    optimizer='JitOptimizer', lookahead='JitLookahead', sgd='sgd_jit sgd_jit_step',
    rmsprop='rmsprop_jit rmsprop_jit_step', adam='adam_jit adam_jit_step', radam='radam_jit radam_jit_step',
    qhadam='qhadam_jit qhadam_jit_step', larc='larc_jit larc_jit_step', lamb='lamb_jit lamb_jit_step',
    ranger='ranger_jit ranger_jit_step', lion='lion_jit lion_jit_step', adan='adan_jit adan_jit_step',
    stableadam='stableadam_jit stableadam_jit_step', muon='muon_jit muon_jit_step muon_rest',
    learner='jit_opt', use='use_jit')
_module_of = {name:module for module,names in _modules.items() for name in names.split()}
__all__ = [*_module_of]

if TYPE_CHECKING: from .all import *  # for editors, which do not run `__getattr__`

def __getattr__(name):
    "A public name, from its module, which is imported only now"
    if name not in _module_of: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = res = getattr(import_module(f'.{_module_of[name]}', __name__), name)
    return res

def __dir__(): return sorted({*globals(), *__all__})
