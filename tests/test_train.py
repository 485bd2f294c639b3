"A Learner trains with each of the eight, and ends where it ends with fastai's"
from functools import partial

import pytest
import torch
from torch import tensor
from fastai.callback import schedule  # noqa: F401, gives Learner its `fit_one_cycle`
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import params,set_seed

from tests.cases import *

def blobs(seed=0):
    "Three noisy classes in six dimensions"
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(120) % 3
    x = torch.randn(120, 6, generator=g, dtype=torch.float64) + torch.eye(3,6)[y]*2
    data = list(zip(x, y))
    return DataLoaders.from_dsets(data[:96], data[96:], bs=16, device='cpu', num_workers=0)

class Net(nn.Module):
    """Body and head, with batchnorms, and a layer that never has a gradient

    There is no bias before a batchnorm: its gradient is nothing but rounding"""
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6,16,bias=False), nn.BatchNorm1d(16), nn.Tanh())
        self.head = nn.Sequential(nn.Linear(16,8,bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8,3))
        self.unused = nn.Linear(2,2)
    def forward(self, x): return self.head(self.body(x))

def groups(m): return [params(m.body), params(m.head) + params(m.unused)]

def fit(opt_func, epochs=4):
    set_seed(1)
    learn = Learner(blobs(), Net().double(), loss_func=CrossEntropyLossFlat(), opt_func=opt_func, splitter=groups,
                    metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, slice(1e-3,1e-2), wd=0.01)
    return learn

OTHER_ARGS = [Case(Adam, adam_jit, dict(eps=1e-7, decouple_wd=False)), Case(ranger, ranger_jit, dict(k=3, alpha=0.8))]

@pytest.mark.parametrize('case', [*ALL, *TWO_AHEAD, *OTHER_ARGS], ids=str)
def test_learner(case):
    "One cycle, discriminative learning rates, float64: weights, losses and state as with fastai's"
    theirs,ours = (fit(partial(o, **case.kw) if case.kw else o) for o in (case.native,case.jit))
    assert isinstance(ours.opt, JitOptimizer) and not isinstance(theirs.opt, JitOptimizer)
    for (n,p),q in zip(theirs.model.state_dict().items(), ours.model.state_dict().values()): close(q, p, 1e-9, n)
    same_state(ours.opt, theirs.opt, 1e-9)
    close(tensor(ours.recorder.losses).double(), tensor(theirs.recorder.losses).double(), 1e-6)
    close(tensor([list(o) for o in ours.recorder.values]), tensor([list(o) for o in theirs.recorder.values]), 1e-6)
    assert ours.recorder.losses[-1] < ours.recorder.losses[0]

@pytest.mark.parametrize('native,jit', PAIRS+OTHERS, ids=lambda f: f.__name__)
def test_defaults(native, jit):
    "The factory by itself as `opt_func`, with fastai's defaults"
    theirs,ours = fit(native, 1),fit(jit, 1)
    for p,q in zip(theirs.model.parameters(), ours.model.parameters()): close(q, p, 1e-9)
