"""Small Learners on made data: images, tables, text and a GAN

In float64, so that runs stay equal to the last digits although training is chaotic"""
import warnings

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
# fastai scripts a layer while it is imported, and sets an option that pandas no longer has
with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    from fastai.basics import *
    from fastai.callback.all import *
    from fastai.data.load import DataLoader
    from fastai.tabular.all import Categorify,FillMissing,Normalize,TabularDataLoaders,tabular_learner
    from fastai.text.all import AWD_LSTM,LMDataLoader,awd_lstm_lm_config,language_model_learner
    from fastai.vision.gan import FixedGANSwitcher,GANDiscriminativeLR,GANLearner

class Float64(Callback):
    "Hand over float64 to the model"
    order = -5
    def before_batch(self): self.learn.xb = tuple(x.double() if x.is_floating_point() else x for x in self.xb)

def in_float32(loss):
    "The Recorder's smooth loss takes no other dtype; gradients stay in float64"
    return loss.to(torch.float32)

def cross_entropy(pred, y): return in_float32(F.cross_entropy(pred.flatten(0,-2), y.flatten().long()))

def quiet(learn):
    learn.remove_cbs(ProgressCallback)
    learn.logger = noop
    return learn

def tensor_dls(*tensors, bs=8, n_valid=8, dev='cpu'):
    items = list(zip(*tensors))
    return DataLoaders(DataLoader(items[n_valid:], bs=bs, shuffle=True, num_workers=0),
                       DataLoader(items[:n_valid], bs=bs, num_workers=0), device=dev)

def adam_of_ones_own(params, lr, mom=0.8, **kwargs):
    "A factory of somebody's, who does not know of ours"
    return Adam(params, lr=lr, mom=mom, **kwargs)

def equal(a, b):
    "Are nested tensors, arrays and other things the same, NaN and NaN too?"
    if isinstance(a, torch.Tensor): return a.shape == b.shape and torch.allclose(a, b, 0, 0, equal_nan=True)
    if isinstance(a, np.ndarray): return (a == b).all()
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list,tuple,L)): return len(a) == len(b) and all(map(equal, a, b))
    return a == b

def float32_net(cls=nn.Sequential):
    "A small convolutional network with BatchNorm"
    return cls(nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
               nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
               nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)))

def float64_net(): return float32_net().double()

class _InFloat32(nn.Sequential):
    def forward(self, x):
        weights = {n:p.float() for n,p in self.named_parameters()}
        return torch.func.functional_call(nn.Sequential(*self), weights, x.float())

def autocast_net():
    "Parameters in float64, which autocast leaves alone, computed with in float32, or what autocast makes of it"
    net = float32_net(_InFloat32)
    for p in net.parameters(): p.data = p.data.double()
    return net

def children(model): return [list(m.parameters()) for m in model.children()]

def vision(opt_func, path, dev='cpu', net=float64_net, **kw):
    "Small images, three parameter groups"
    dls = tensor_dls(torch.randn(40, 2, 6, 6), torch.randint(3, (40,)), dev=dev)
    cbs = None if net is float32_net else Float64()
    return quiet(Learner(dls, net(), cross_entropy, opt_func, splitter=children, path=path, cbs=cbs, **kw))

def tabular(opt_func, path, dev='cpu'):
    "fastai's TabularModel, with two embeddings and a missing value"
    df = pd.DataFrame(torch.randn(40, 2).numpy(), columns=['a','b'])
    for n in 'cd': df[n] = torch.randint(5, (40,)).numpy()
    df['y'] = torch.randint(3, (40,)).numpy()
    df.loc[20,'a'] = float('nan')
    procs = [Categorify,FillMissing(add_col=True),Normalize]
    dls = TabularDataLoaders.from_df(df, path, procs, ['c','d'], ['a','b'], 'y', y_block=CategoryBlock(),
                                     valid_idx=list(range(8)), bs=8, device=dev)
    learn = quiet(tabular_learner(dls, layers=[8], n_out=3, loss_func=cross_entropy, opt_func=opt_func, cbs=Float64()))
    learn.model.double()
    return learn

def text(opt_func, path, dev='cpu'):
    "A language model: AWD-LSTM with all its dropouts and regularizations, embeddings tied to the decoder"
    texts = [torch.randint(12, (50,)) for _ in range(6)]
    train,valid = LMDataLoader(texts[1:], bs=4, seq_len=12, shuffle=True),LMDataLoader(texts[:1], bs=4, seq_len=12)
    dls = DataLoaders(train, valid, path=path, device=dev)
    dls.vocab = list(range(12))
    config = {**awd_lstm_lm_config, 'emb_sz':6, 'n_hid':8, 'n_layers':2}
    learn = quiet(language_model_learner(dls, AWD_LSTM, config, pretrained=False, opt_func=opt_func))
    learn.model.double()
    learn.loss_func = cross_entropy
    return learn

def _gen_loss(fake_pred, output, target): return in_float32(fake_pred.mean())
def _critic_loss(real_pred, fake_pred):   return in_float32(real_pred.mean() - fake_pred.mean())

def gan(opt_func, path, dev='cpu'):
    "Generator and critic take turns under one optimizer, the critic at a higher learning rate, its weights clamped"
    mlp = lambda ni,nf: nn.Sequential(nn.Linear(ni, 8), nn.ReLU(), nn.Linear(8, nf)).double()
    dls = tensor_dls(torch.randn(56, 3).double(), torch.randn(56, 4).double(), dev=dev)
    return quiet(GANLearner(dls, mlp(3,4), mlp(4,1), _gen_loss, _critic_loss, FixedGANSwitcher(2,1), clip=0.2,
                            opt_func=opt_func, path=path, cbs=GANDiscriminativeLR(3.)))
