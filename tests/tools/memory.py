"""Memory that steps take beyond parameters, gradients and state, at the size of ViT-B/16, in float32 on a CPU

`python -m tests.tools.memory`, or `python -m tests.tools.memory lamb larc` for the cases whose name contains a word.
Each needs 1 to 2.5 GB"""
import sys

import pandas as pd
import torch
from torch import nn
from torchvision.models import vit_b_16

from fastxtend_jit.calls import peak_memory
from tests.cases import *

LIMIT,PEAKS = 32,['first step','next steps']  # MiB

def measure(case):
    "Peak of the first step over the size of the state, and of the next seven, in MiB"
    with torch.device('meta'): shapes = [p.shape for p in vit_b_16().parameters()]
    ps = [nn.Parameter(torch.ones(s)) for s in shapes]
    for p in ps: p.grad = torch.ones_like(p)
    opt = case.make(ps, True)
    peaks = [peak_memory(lambda: [opt.step() for _ in range(n)]) for n in (1,7)]  # both phases of RAdam, and lookaheads
    own = [*(v for st in opt.state.values() for v in st.values()), *slow(opt)]
    state = sum(t.nbytes for t in own if isinstance(t, torch.Tensor) and t.dim())
    return {k:v/2**20 for k,v in zip(['state',*PEAKS], (state, peaks[0]-state, peaks[1]))}

def main(words):
    rows = {}
    for case in CASES:
        if words and not any(w in str(case) for w in words): continue
        rows[str(case)] = measure(case)
        print(f'{case}: {max(rows[str(case)][k] for k in PEAKS):.1f} MiB', file=sys.stderr)
    df = pd.DataFrame(rows).T.round(1)
    print('Peak in MiB over parameters, gradients (330 each) and state; '
          f'torch {torch.__version__}, {torch.get_num_threads()} threads')
    print(df.to_string())
    if (over := df.index[(df[PEAKS] > LIMIT).any(axis=1)].tolist()): sys.exit(f'Over {LIMIT} MiB: {", ".join(over)}')

if __name__ == '__main__': main(sys.argv[1:])
