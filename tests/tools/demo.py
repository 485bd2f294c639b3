"`make demo`: train on handwritten digits, as a table and as images, with fastai's Adam and with adam_jit, and compare"
import warnings
from pathlib import Path
from statistics import median

warnings.filterwarnings('ignore', module='torch.jit|fastai')  # about how fastai is written, not about this demo
import fastai,matplotlib,numpy as np,pandas as pd
matplotlib.use('Agg')
import matplotlib.pyplot as plt
from fastai.tabular.all import *
from fastcore.script import call_parse
from sklearn.datasets import load_digits

from fastxtend_jit.all import *
from fastxtend_jit.cold import digits
from fastxtend_jit.calls import clock

def table(bs):
    "1797 rows of 64 pixels, each a category from 0 to 16; every fifth for validation. An embedding for each pixel"
    learn = digits(Adam, bs)
    return learn.dls,learn.model

def images(bs, width=32, depth=4):
    "The same as images of 8x8 pixels, for a small ResNet"
    x,y = load_digits(return_X_y=True)
    data = list(zip(torch.tensor(x, dtype=torch.float32).view(-1,1,8,8)/8 - 1, torch.tensor(y)))
    blocks = [ResBlock(1, width, width, stride=1+(i==1)) for i in range(depth)]
    model = nn.Sequential(ConvLayer(1, width), *blocks, nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(width, 10))
    return DataLoaders.from_dsets([o for i,o in enumerate(data) if i%5], data[::5], bs=bs, device='cpu'),model

class StepTimer(Callback):
    "Milliseconds that each `opt.step` takes, and each whole training step"
    order = 100
    def before_fit(self): self.now,self.opt_steps,self.steps,self.losses = clock(self.dls.device),[],[],[]
    def before_batch(self): self.start = self.now()
    def before_step(self): self.opt_start = self.now()
    def after_step(self): self.opt_steps.append(1e3*(self.now()-self.opt_start))
    def after_batch(self):
        if not self.training: return
        self.steps.append(1e3*(self.now()-self.start))
        self.losses.append(self.loss.item())

def train(make, opt_func, epochs, bs, lr, seed):
    "A Learner trained from `seed` on"
    set_seed(seed)
    dls,model = make(bs)
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), opt_func=opt_func, metrics=accuracy, cbs=StepTimer())
    print(f'\nfit_one_cycle with opt_func={opt_func.__name__}', flush=True)
    learn.fit_one_cycle(epochs, lr)
    return learn

def compared(learns):
    "Scores of each epoch and median times, side by side"
    scores = {n: pd.DataFrame(list(l.recorder.values), columns=l.recorder.metric_names[1:-1]) for n,l in learns.items()}
    scores = pd.concat(scores, axis=1).swaplevel(axis=1)[scores['Adam'].columns].rename_axis('epoch')
    times = {n: [median(l.step_timer.opt_steps), median(l.step_timer.steps)] for n,l in learns.items()}
    times = pd.DataFrame(times, index=['optimizer step','whole training step'])
    times['speed-up'] = times['Adam']/times['adam_jit']
    return scores,times

def draw(runs, chart):
    "How far apart the losses are, batch by batch, beside the rounding of float32"
    fig,ax = plt.subplots(figsize=(7,4), layout='constrained')
    for what,learns in runs.items():
        a,b = (np.array(l.step_timer.losses) for l in learns.values())
        ax.semilogy(np.maximum(abs(a-b)/a, 1e-9), lw=1, label=what)
    ax.axhline(2**-23, color='black', lw=1, ls='--', label='one rounding of float32')
    ax.set(title='Losses with adam_jit and with Adam: relative difference', xlabel='batch', ylim=(5e-10,10))
    ax.spines[['top','right']].set_visible(False)
    ax.legend(frameon=False)
    fig.savefig(chart, dpi=150)
    plt.close(fig)

@call_parse
def main(
    epochs:int=6, # Number of epochs
    bs:int=64, # Batch size
    lr:float=3e-3, # Highest learning rate of the cycle
    seed:int=42, # All trainings start from it
    chart:str='demo.png' # Where to save the chart
):
    "Train on handwritten digits with fastai's Adam, then with adam_jit from the same seed, and compare"
    print(f"scikit-learn's 1797 handwritten digits, on a CPU with {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, fastai {fastai.__version__}")
    runs,results = {},{}
    for what,make in {'as a table':table, 'as images':images}.items():
        ps = list(make(bs)[1].parameters())
        print(f"\n=== Digits {what}: {len(ps)} tensors, {sum(p.numel() for p in ps):,} parameters")
        runs[what] = {o.__name__: train(make, o, epochs, bs, lr, seed) for o in (Adam,adam_jit)}
        scores,times = results[what] = compared(runs[what])
        print(f"\nSide by side\n\n{scores.to_string(float_format='{:.4f}'.format)}\n\n"
              f"{times.to_string(formatters=[*['{:.2f} ms'.format]*2, '{:.2f}x'.format])}   (medians)")
    draw(runs, chart)
    print("\nThe model of the table is many small tensors and little arithmetic: there the optimizer takes much of\n"
          "the time. In a convolutional network forward and backward take most of it, and a faster optimizer gains\n"
          "little, unless weights are many and batches small. Where losses of the images differ in the third digit:\n"
          "fastai's own Adam does so after a change of 1e-7 in the weights, since training magnifies rounding.")
    print(f"\nDifference of the losses: {Path(chart).resolve()}")
    return results
