"`make demo`: train on scikit-learn's handwritten digits with fastai's Adam, then with adam_jit from the same seed, and compare"
import os,warnings
from pathlib import Path
from statistics import median

warnings.filterwarnings('ignore', module='torch.jit|fastai')  # about how fastai is written, not about this demo
import fastai,matplotlib,pandas as pd
matplotlib.use('Agg')
import matplotlib.pyplot as plt
from fastai.basics import *
from fastai.callback.all import *
from fastcore.script import call_parse
from sklearn.datasets import load_digits

from fastxtend_jit.all import *
from fastxtend_jit.trace import clock

def digits(bs):
    "1797 images of 8x8 pixels, every fifth for validation"
    x,y = load_digits(return_X_y=True)
    data = list(zip(torch.tensor(x, dtype=torch.float32).view(-1,1,8,8)/8 - 1, torch.tensor(y)))
    return DataLoaders.from_dsets([o for i,o in enumerate(data) if i%5], data[::5], bs=bs, device='cpu')

def small_resnet(width=32, depth=4):
    return nn.Sequential(ConvLayer(1, width), *[ResBlock(1, width, width, stride=1+(i==1)) for i in range(depth)], nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(width, 10))

class StepTimer(Callback):
    "Milliseconds that each `opt.step` takes, and each whole training step"
    order = 100
    def before_fit(self): self.now,self.opt_steps,self.steps = clock(self.dls.device),[],[]
    def before_batch(self): self.start = self.now()
    def before_step(self): self.opt_start = self.now()
    def after_step(self): self.opt_steps.append(1e3*(self.now()-self.opt_start))
    def after_batch(self):
        if self.training: self.steps.append(1e3*(self.now()-self.start))

def train(opt_func, epochs, bs, lr, seed):
    "A Learner trained from `seed` on"
    set_seed(seed)
    learn = Learner(digits(bs), small_resnet(), loss_func=CrossEntropyLossFlat(), opt_func=opt_func, metrics=accuracy, cbs=StepTimer())
    print(f'\nfit_one_cycle with opt_func={opt_func.__name__}', flush=True)
    learn.fit_one_cycle(epochs, lr)
    return learn

def draw(learns, chart):
    "Both curves of the training loss, one lying on the other"
    fig,ax = plt.subplots(figsize=(7,4), layout='constrained')
    for (name,learn),style in zip(learns.items(), (dict(lw=7, color='#f6c667'), dict(lw=1.5, color='#1b3a6b'))): ax.plot(learn.recorder.losses, label=name, **style)
    ax.set(title="Handwritten digits: adam_jit learns as fastai's Adam does", xlabel='batch', ylabel='training loss, smoothed', ylim=0)
    ax.spines[['top','right']].set_visible(False)
    ax.legend(frameon=False)
    fig.savefig(chart, dpi=150)
    plt.close(fig)

@call_parse
def main(
    epochs:int=6, # Number of epochs
    bs:int=64, # Batch size
    lr:float=3e-3, # Highest learning rate of the cycle
    seed:int=42, # Both trainings start from it
    chart:str='demo.png' # Where to save the loss curves
):
    "Train on handwritten digits with fastai's Adam, then with adam_jit from the same seed, and compare"
    ps = list(small_resnet().parameters())
    print(f"A small ResNet ({len(ps)} tensors, {sum(p.numel() for p in ps):,} parameters) learns scikit-learn's 1797 handwritten digits\n"
          f"CPU with {torch.get_num_threads()} threads, torch {torch.__version__}, fastai {fastai.__version__}")
    learns = {o.__name__: train(o, epochs, bs, lr, seed) for o in (Adam,adam_jit)}

    scores = {n: pd.DataFrame(list(l.recorder.values), columns=l.recorder.metric_names[1:-1]) for n,l in learns.items()}
    scores = pd.concat(scores, axis=1).swaplevel(axis=1)[scores['Adam'].columns].rename_axis('epoch')
    times = pd.DataFrame({n: [median(l.step_timer.opt_steps), median(l.step_timer.steps)] for n,l in learns.items()}, index=['optimizer step','whole training step'])
    times['speed-up'] = times['Adam']/times['adam_jit']
    print(f"\nSide by side\n\n{scores.to_string(float_format='{:.4f}'.format)}\n\n"
          f"{times.to_string(formatters=[*['{:.2f} ms'.format]*2, '{:.2f}x'.format])}   (medians)")
    draw(learns, chart)
    print(f"\nBoth loss curves: {Path(chart).resolve()}")
    return scores,times
