"""What `torch.compile` makes of a step: seconds until the first step is taken, then milliseconds, beside ours

`python -m tests.tools.compiled nbs/performance` measures Adam, LARC and LAMB in their foreach forms and writes
compiled.csv. It needs a C++ compiler"""
import sys
from copy import copy
from pathlib import Path

import pandas as pd
import torch

from fastxtend_jit.bench import _fill,_plain,bare_step,interleave,models,rows
from fastxtend_jit.calls import clock

@torch.no_grad()
def measure(model, optimizer, seconds=3.):
    torch.manual_seed(0)
    torch._dynamo.reset()
    params,now = [*models[model][0]().parameters()],clock()
    _fill(params)
    opt = rows[optimizer].make(params, True)
    for _ in range(10): opt.step()
    plain = copy(opt)
    plain.opt_step = _plain(opt.opt_step)
    compiled = torch.compile(bare_step(plain, fused=False, dense_cpu=False))
    start = now()
    compiled()
    first = now()-start
    for _ in range(3): compiled()
    times = interleave({'compiled':compiled, 'ours':opt.step}, seconds)
    ms = {f'{n}_ms':round(t.median, 3) for n,t in times.items()}
    return dict(model=model, optimizer=optimizer, first_s=round(first, 1), **ms)

if __name__ == '__main__':
    res = [measure(m, o) for m in ('many_small','xresnet18') for o in ('adam','larc','lamb')]
    pd.DataFrame(res).to_csv(Path(sys.argv[1])/'compiled.csv', index=False)
    print(pd.DataFrame(res))
