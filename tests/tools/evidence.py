"""The table of the front page: what `compare_opt` says of the digits as a table, saved for it

`python -m tests.tools.evidence nbs/performance` trains and writes compare_opt.csv"""
import sys
from pathlib import Path

from fastai.basics import set_seed
from fastai.losses import CrossEntropyLossFlat
from fastai.learner import Learner

from fastxtend_jit.all import *
from tests.tools.demo import table

def compared(steps=100):
    set_seed(42)
    dls,model = table(64)
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), opt_func=adam_jit)
    return learn.compare_opt(steps=steps, show=False)

if __name__ == '__main__':
    res = compared()
    res.to_csv(Path(sys.argv[1])/'compare_opt.csv', float_format='%.3g')
    print(res)
