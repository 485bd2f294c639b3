"""Memory that steps take beyond parameters, gradients and state, at the size of ViT-B/16, in float32 on a CPU

`python -m tests.memory`, or `python -m tests.memory lamb larc` for the cases whose name contains a word. Linux only: it resets the
high-water mark of the process. One process a case; each needs 1 to 2.5 GB"""
import gc,json,subprocess,sys

import pandas as pd
import torch
from torch import nn
from torchvision.models import vit_b_16

from tests.cases import *

LIMIT,PEAKS = 64,['first step','next steps']  # MiB

def rss(field):
    "`VmRSS` or `VmHWM`, the most since it was reset, of this process in MiB"
    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(field))/1024

def measure(case):
    "Peak of the first step, and of the next seven, in MiB over what was there before plus the size of the state"
    with torch.device('meta'): shapes = [p.shape for p in vit_b_16().parameters()]
    def make(shapes):
        ps = [nn.Parameter(torch.ones(s)) for s in shapes]
        for p in ps: p.grad = torch.ones_like(p)
        return case.make(ps, True)
    small = make([(3,5), (7,)])  # code that is loaded and compiled at the first call is not a matter of size
    for _ in range(20): small.step()
    opt,res = make(shapes),{}
    gc.collect()
    before = rss('VmRSS')
    for when,n in zip(PEAKS, (1,7)):  # which reach both phases of RAdam, and lookaheads
        open('/proc/self/clear_refs', 'w').write('5')
        for _ in range(n): opt.step()
        res[when] = rss('VmHWM') - before
    own = [*(v for st in opt.state.values() for v in st.values()), *(s for pg in getattr(opt, 'slow_weights', []) for s in pg)]
    state = sum(t.numel()*t.element_size() for t in own if isinstance(t, torch.Tensor) and t.dim())/2**20
    return {'state': state, **{k:v-state for k,v in res.items()}}

def main(words):
    rows = {}
    for i,case in enumerate(CASES):
        if words and not any(w in str(case) for w in words): continue
        out = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'tests.memory', '--one', str(i)], check=True, capture_output=True, text=True).stdout
        rows[str(case)] = json.loads(out)
        print(f'{case}: {max(rows[str(case)][k] for k in PEAKS):.1f} MiB', file=sys.stderr)
    df = pd.DataFrame(rows).T.round(1)
    print(f'Peak in MiB over parameters, gradients (330 each) and state; torch {torch.__version__}, {torch.get_num_threads()} threads')
    print(df.to_string())
    if (over := df.index[(df[PEAKS] > LIMIT).any(axis=1)].tolist()): sys.exit(f'Over {LIMIT} MiB: {", ".join(over)}')

if __name__ == '__main__':
    if sys.argv[1:2] == ['--one']: print(json.dumps(measure(CASES[int(sys.argv[2])])))
    else: main(sys.argv[1:])
