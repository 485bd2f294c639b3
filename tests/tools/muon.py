"""Does Muon train? Handwritten digits from scratch by a small ViT and a small ResNet, beside Adam, over five seeds

`python -m tests.tools.muon nbs/performance` writes muon.csv, the validation loss after every tenth step. For each model
and optimizer, the learning rate is the best of six over two other seeds. It takes about half an hour"""
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from sklearn.datasets import load_digits
from torch import nn
from fastai.basics import Callback,Learner,set_seed
from fastai.layers import ConvLayer,Flatten,ResBlock
from fastai.losses import CrossEntropyLossFlat

from fastxtend_jit.all import *
from tests.learners import tensor_dls

EPOCHS,EVERY,SEEDS = 10,10,range(5)
LRS = 1e-3,2e-3,4e-3,8e-3,1.6e-2,3.2e-2

class ViT(nn.Module):
    "16 patches of 2x2 pixels"
    def __init__(self, dim=64, depth=4):
        super().__init__()
        self.patches,self.positions = nn.Conv2d(1, dim, 2, 2),nn.Parameter(torch.randn(1, 16, dim)*0.02)
        block = nn.TransformerEncoderLayer(dim, 4, 4*dim, dropout=0., batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        self.norm,self.head = nn.LayerNorm(dim),nn.Linear(dim, 10)
        for p in self.blocks.parameters():
            if p.dim() > 1: nn.init.xavier_uniform_(p)  # or all layers would start as copies of one
    def forward(self, x):
        x = self.patches(x).flatten(2).mT + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))

def resnet(width=32):
    blocks = [ResBlock(1, width, width, stride=1+(i==1)) for i in range(4)]
    return nn.Sequential(ConvLayer(1, width), *blocks, nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(width, 10))

MODELS = dict(vit=ViT, resnet=resnet)
OPTIMIZERS = dict(adam=lambda model: adam_jit, muon=lambda model: partial(muon_jit, rest=muon_rest(model)))

class Validate(Callback):
    "Keep the validation loss after every few steps"
    def __init__(self, x, y): self.x,self.y,self.losses = x,y,{}
    @torch.no_grad()
    def after_batch(self):
        if not self.training or self.train_iter % EVERY: return
        self.model.eval()
        self.losses[self.train_iter] = self.loss_func(self.model(self.x), self.y).item()
        self.model.train()

def losses(model, optimizer, lr, seed):
    "Validation loss by step in one cycle; every fifth digit is for validation"
    x,y = map(torch.tensor, load_digits(return_X_y=True))
    x,valid = x.float().view(-1,1,8,8)/8 - 1,torch.arange(len(x)) % 5 == 0
    set_seed(seed)
    m,curve = MODELS[model](),Validate(x[valid], y[valid])
    learn = Learner(tensor_dls(x[~valid], y[~valid], bs=64), m, CrossEntropyLossFlat(), cbs=curve,
                    opt_func=OPTIMIZERS[optimizer](m))
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(EPOCHS, lr, wd=0.01)
    return curve.losses

def tuned(model, optimizer):
    "The learning rate with the smallest last loss, on average over two seeds of its own"
    last = {lr: sum([*losses(model, optimizer, lr, seed).values()][-1] for seed in (100,101))/2 for lr in LRS}
    print(model, optimizer, *(f'{lr:g}: {loss:.4f}' for lr,loss in last.items()), flush=True)
    return min(last, key=lambda lr: (last[lr] != last[lr], last[lr]))  # NaN comes last

def measure():
    rows = []
    for model in MODELS:
        for optimizer in OPTIMIZERS:
            lr = tuned(model, optimizer)
            for seed in SEEDS:
                run = dict(model=model, optimizer=optimizer, lr=lr, seed=seed)
                rows += [{**run, 'step':i, 'loss':round(o, 5)} for i,o in losses(**run).items()]
    return pd.DataFrame(rows)

if __name__ == '__main__':
    df = measure()
    df.to_csv(Path(sys.argv[1])/'muon.csv', index=False)
    print(df.pivot_table(index='step', columns=['model','optimizer'], values='loss', aggfunc='median', sort=False))
