"""CUDA without a GPU: steps on fake tensors, and how many kernels they launch by ATen's rules

`python -m tests.tools.launches nbs/performance` writes the table that the page on performance shows, as launches.csv"""
import sys
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode,unset_fake_temporarily
from fastai.vision.models.xresnet import xresnet50

from fastxtend_jit.bench import rows
from fastxtend_jit.launches import Launches
from tests.engine import pytorch

@cache
def xresnet_shapes():
    with unset_fake_temporarily(),torch.device('meta'): shapes = [p.shape for p in xresnet50().parameters()]
    assert len(shapes) == 167
    return shapes

def with_grads(shapes, device='cuda'):
    ps = [nn.Parameter(torch.empty(s, device=device)) for s in shapes]
    for p in ps: p.grad = torch.empty_like(p)
    return ps

def launches(row, ours, gen, shapes):
    "Launches of a step of fastai's or of ours; the mean of a period for Ranger"
    with pytorch(gen),FakeTensorMode(),Launches(gen) as l:
        opt = row.make(with_grads(shapes), ours)
        for _ in range(row.warmup): opt.step()
        k,before = getattr(opt, 'k', 1),l.total
        for _ in range(k): opt.step()
    return (l.total-before)/k

def cuda_launches(shapes):
    "A line for each optimizer: fastai's, and ours before PyTorch 2.11 and from then on"
    theirs = lambda r: launches(r, False, 'new', shapes) if r.native else float('nan')
    return pd.DataFrame([dict(optimizer=n, tensors=len(shapes), fastai=theirs(r),
                              ours_to_2_10=launches(r, True, 'old', shapes), ours=launches(r, True, 'new', shapes))
                         for n,r in rows.items()])

if __name__ == '__main__':
    cuda_launches(xresnet_shapes()).to_csv(Path(sys.argv[1])/'launches.csv', index=False, float_format='%.6g')
