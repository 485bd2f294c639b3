"What `from fastxtend_jit.all import *` brings in: the optimizers, their steps, classes, `jit_opt`, methods of Learner"
from .optimizer import JitOptimizer
from .lookahead import JitLookahead
from .sgd import *
from .rmsprop import *
from .adam import *
from .radam import *
from .qhadam import *
from .larc import *
from .lamb import *
from .ranger import *
from .lion import *
from .adan import *
from .stableadam import *
from .learner import jit_opt
from .compare import *
from .explain import *
