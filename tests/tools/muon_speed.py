"""How long steps and whole training steps of Muon take, beside `torch.optim.Muon` with fused AdamW, and `adam_jit`

`python -m tests.tools.muon_speed nbs/performance 1` measures on one thread, and adds its lines to muon_speed.csv. Where
PyTorch computes bfloat16 without hardware for it, `torch.optim.Muon` takes seconds to minutes a step"""
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pandas as pd
import torch
from torch import Tensor,nn
from torchvision.models import VisionTransformer
from fastai.optimizer import OptimWrapper

from fastxtend_jit.all import *
from fastxtend_jit.bench import MuonAndAdamW,_fill,_images,_xresnet,interleave,rows,time_training

def many_matrices(): return nn.Sequential(*[nn.Linear(192, 192, bias=False) for _ in range(96)])
def vit_s_16(layers=2): return VisionTransformer(224, 16, layers, 6, 384, 1536)
MODELS = {'96 matrices': (many_matrices, lambda: (torch.randn(64,192),torch.randint(192, (64,)))),
          'ViT-S/16, 2 of 12 layers': (vit_s_16, partial(_images, 1, 224)),
          'xresnet18': (partial(_xresnet, 18), partial(_images, 4, 64))}

def in_float32(step):
    "`step` of PyTorch's with iterations in float32, as ours, in place of bfloat16"
    def f():
        with mock.patch.object(Tensor, 'bfloat16', Tensor.clone): step()
    return f

def steps(params):
    _fill(params)
    opts = {n:o for n,o in rows['muon'].contestants(params).items() if n in ('ours','torch for-loop')}
    fs = dict(ours=opts['ours'].step, torch=opts['torch for-loop'].step)
    fs |= dict(torch_float32=in_float32(fs['torch']), adam=rows['adam'].make(params, True).step)
    for n in ('ours','ours','torch_float32','adam','adam'): fs[n]()
    return interleave(fs, 0, least=3)

def training(model, batch):
    theirs = partial(OptimWrapper, opt=MuonAndAdamW)
    return time_training(model, batch, 0, dict(ours=muon_jit, torch=theirs, adam=adam_jit))

if __name__ == '__main__':
    out,threads = Path(sys.argv[1])/'muon_speed.csv',int(sys.argv[2])
    torch.set_num_threads(threads)
    old = pd.read_csv(out) if out.exists() else pd.DataFrame(columns=['threads'])
    res = []
    for name,(make,batch) in MODELS.items():
        torch.manual_seed(0)
        model = make()
        for what in ('step','training'):
            times = steps([*model.parameters()]) if what == 'step' else training(model, batch())
            ms = {f'{n}_ms':round(t.median, 2) for n,t in times.items()}
            res.append(dict(model=name, threads=threads, what=what, **ms))
            print(res[-1], flush=True)
            pd.concat([old[old.threads != threads], pd.DataFrame(res)]).to_csv(out, index=False)
