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

# The same for editors and type checkers, which run no `__getattr__`: `as` says that a name is public
if TYPE_CHECKING:
    from .optimizer import JitOptimizer as JitOptimizer
    from .lookahead import JitLookahead as JitLookahead
    from .sgd import sgd_jit as sgd_jit, sgd_jit_step as sgd_jit_step
    from .rmsprop import rmsprop_jit as rmsprop_jit, rmsprop_jit_step as rmsprop_jit_step
    from .adam import adam_jit as adam_jit, adam_jit_step as adam_jit_step
    from .radam import radam_jit as radam_jit, radam_jit_step as radam_jit_step
    from .qhadam import qhadam_jit as qhadam_jit, qhadam_jit_step as qhadam_jit_step
    from .larc import larc_jit as larc_jit, larc_jit_step as larc_jit_step
    from .lamb import lamb_jit as lamb_jit, lamb_jit_step as lamb_jit_step
    from .ranger import ranger_jit as ranger_jit, ranger_jit_step as ranger_jit_step
    from .lion import lion_jit as lion_jit, lion_jit_step as lion_jit_step
    from .adan import adan_jit as adan_jit, adan_jit_step as adan_jit_step
    from .stableadam import stableadam_jit as stableadam_jit, stableadam_jit_step as stableadam_jit_step
    from .muon import muon_jit as muon_jit, muon_jit_step as muon_jit_step, muon_rest as muon_rest
    from .learner import jit_opt as jit_opt
    from .use import use_jit as use_jit
else:
    def __getattr__(name):
        "A public name, from its module, which is imported only now"
        if name not in _module_of: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = res = getattr(import_module(f'.{_module_of[name]}', __name__), name)
        return res

def __dir__(): return sorted({*globals(), *__all__})
