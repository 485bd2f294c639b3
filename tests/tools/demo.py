"""`make demo`: whole fits with fastai's Adam and with adam_jit, where that pays and where it does not, and a control

`python -m tests.tools.demo --rounds 7 --out nbs/performance/fits` writes the figures and charts of the front page"""
import json,random,warnings
from pathlib import Path
from typing import Callable,NamedTuple

warnings.filterwarnings('ignore', module='torch.jit|fastai')  # about how fastai is written, not about this demo
import fastai,matplotlib,numpy as np,pandas as pd
matplotlib.use('Agg')
from fastai.tabular.all import *
from fastai.vision.models.xresnet import xresnet18
from fastcore.script import call_parse
from matplotlib.figure import Figure  # fastai's `Figure` is another
from sklearn.datasets import load_digits

from fastxtend_jit.all import *
from fastxtend_jit.calls import clock
from fastxtend_jit.cold import digits
from fastxtend_jit.report import machine

TIMES = dict(step_ms='optimizer step', training_ms='training step', fit_s='whole fit')
MOVED = 'Adam, from weights moved by 1e-7'

def images(opt_func, bs, batches):
    "Digits as images of 32x32 pixels, and fastai's xresnet18"
    set_seed(42)
    x,y = load_digits(return_X_y=True)
    x = F.interpolate(tensor(x, dtype=torch.float32).view(-1,1,8,8)/8 - 1, size=32, mode='bilinear')
    data = list(zip(x, tensor(y)))
    dls = DataLoaders.from_dsets(data[64:64+bs*batches], data[:64], bs=bs, device='cpu')
    return Learner(dls, xresnet18(c_in=1, n_out=10), CrossEntropyLossFlat(), opt_func=opt_func)

class Case(NamedTuple):
    "What is trained"
    what:str # For tables and charts
    learner:Callable # Makes a Learner from a factory
    epochs:int # Of a fit

CASES = {
    'table':      Case('tabular model, 64 rows', digits, 6),
    'images, 4':  Case('xresnet18, 4 images', partial(images, bs=4, batches=32), 1),
    'images, 16': Case('xresnet18, 16 images', partial(images, bs=16, batches=16), 1),
    'images, 64': Case('xresnet18, 64 images', partial(images, bs=64, batches=8), 1)}

class StepTimer(Callback):
    "Milliseconds that each optimizer step takes, and each training step; the losses"
    order = 100
    def before_fit(self): self.now,self.steps,self.training_steps,self.losses = clock(self.dls.device),[],[],[]
    def before_batch(self): self.start = self.now()
    def before_step(self): self.step_start = self.now()
    def after_step(self): self.steps.append(1e3*(self.now()-self.step_start))
    def after_batch(self):
        if not self.training: return
        self.training_steps.append(1e3*(self.now()-self.start))
        self.losses.append(self.loss.item())

def fit(case, opt_func, moved=0.):
    "Train from one seed, from weights moved by a part of themselves; times, and losses of all batches"
    learn,timer = case.learner(opt_func),StepTimer()
    with torch.no_grad():
        for p in learn.model.parameters(): p *= 1+moved
    set_seed(42)
    now = clock(learn.dls.device)
    with learn.no_bar(),learn.no_logging():
        start = now()
        learn.fit_one_cycle(case.epochs, 3e-3, cbs=timer)
        seconds = now()-start
    steps,training = (np.array(o) for o in (timer.steps,timer.training_steps))
    times = dict(first_ms=steps[0], step_ms=np.median(steps), training_ms=np.median(training), fit_s=seconds)
    return times,np.array(timer.losses)

def measure(cases, rounds, progress=print):
    "Fits, in random order: times, a line each; how far losses are from fastai's in the first round, a line a batch"
    fit(CASES['table']._replace(epochs=1), SGD)  # what a process pays once, whatever is trained
    contestants = {'Adam':(Adam,), 'adam_jit':(adam_jit,), MOVED:(Adam,1e-7)}
    lines,losses,rng = [],{},random.Random(0)
    for i in range(1, rounds+1):
        for c in cases:
            names = [n for n in contestants if n != MOVED or i == 1]  # a control, whose times are Adam's
            for n in rng.sample(names, len(names)):
                times,found = fit(CASES[c], *contestants[n])
                if i == 1: losses[c,n] = found
                if n != MOVED: lines.append(dict(case=c, contestant=n, round=i, **times))
                progress(f"round {i} of {rounds}, {CASES[c].what}, {n}: {times['fit_s']:.2f} s")
    def apart(c, n): return np.maximum(abs(losses[c,n]/losses[c,'Adam'] - 1), 1e-9)  # a chart of logarithms has no 0
    drift = [pd.DataFrame(dict(case=c, adam_jit=apart(c, 'adam_jit'), moved=apart(c, MOVED))) for c in cases]
    return pd.DataFrame(lines),pd.concat(drift).rename_axis('batch').reset_index()

def compared(lines):
    "For each case and time: with fastai's Adam, with ours, and how many times as fast that is; medians of the rounds"
    mid = lines.groupby(['case','contestant'], sort=False).median().drop(columns='round')
    res = pd.concat({n: mid.xs(n, level='contestant').stack() for n in ('Adam','adam_jit')}, axis=1)
    return res.assign(speed=res['Adam']/res['adam_jit']).rename_axis(['case','time'])

def apart(drift):
    "Differences of the losses from fastai's in the last 30 batches of each case, in the median"
    return drift.groupby('case', sort=False)[['adam_jit','moved']].apply(lambda d: d.tail(30).median())

def draw_speeds(ax, table):
    "Bars for each case: how many times as fast as with fastai's"
    table,colors = table.speed.unstack('time')[[*TIMES]],('#bcd6ec','#6fa8d6','#1f6fb4')
    y = np.arange(len(table))
    for i,(n,color) in reversed([*enumerate(zip(TIMES, colors))]):  # what counts most comes first
        bars = ax.barh(y-(i-1)*0.27, table[n], 0.25, color=color, label=TIMES[n])
        ax.bar_label(bars, fmt='%.2f', padding=3, fontsize=9)
    ax.axvline(1, color='black', lw=1)
    ax.set_title('adam_jit: times as fast as fastai’s Adam', loc='right', fontsize=11)
    ax.set(yticks=y, xlim=(0,1.15*table.max().max()),
           yticklabels=[CASES[c].what.replace(', ', ',\n') for c in table.index])
    ax.invert_yaxis()
    ax.spines[['top','right']].set_visible(False)

def draw_drift(ax, drift):
    "How far apart losses are, batch by batch"
    for c,d in drift.groupby('case', sort=False):
        line, = ax.semilogy(d.batch, d.adam_jit, lw=1.3, label=f'{CASES[c].what}, adam_jit')
        ax.semilogy(d.batch, d.moved, lw=1.3, ls=':', color=line.get_color())
    ax.plot([], [], color='black', ls=':', label=MOVED)
    ax.axhline(2**-23, color='black', lw=1, ls='--', label='one rounding of float32')
    ax.set(title='Losses: relative difference from fastai’s Adam', xlabel='batch', ylim=(5e-10,1e3))
    ax.spines[['top','right']].set_visible(False)
    ax.legend(frameon=False, fontsize=8)

def draw(path, width, height, *panels):
    "Save a chart of panels side by side, each a function that draws and its table"
    fig = Figure(figsize=(width,height), layout='constrained')
    for ax,(f,table) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels): f(ax, table)
    handles,labels = fig.axes[0].get_legend_handles_labels()
    if panels[0][0] is draw_speeds: fig.legend(handles, labels, loc='outside lower center', ncols=3, frameon=False,
                                                  handlelength=1.3, columnspacing=1.3)
    fig.savefig(path, dpi=110)

def store(folder, lines, drift):
    "Save figures, the machine, and the front page's chart for wide and for narrow screens"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines.to_csv(folder/'fits.csv', index=False, float_format='%.6g')
    drift.to_csv(folder/'drift.csv', index=False, float_format='%.3g')
    (folder/'machine.json').write_text(json.dumps({**machine(), 'device':'cpu', 'channels_last':False}, indent=1)+'\n')
    digits(adam_jit).compare_opt(steps=300, show=False).to_csv(folder/'compare_opt.csv', float_format='%.3g')
    speeds = (draw_speeds, compared(lines))
    draw(folder/'fits.png', 8.5, 4.2, speeds)
    draw(folder/'fits_narrow.png', 4, 4.8, speeds)
    draw(folder/'drift.png', 7, 4, (draw_drift, drift))

@call_parse
def main(
    rounds:int=2, # Fits of each kind
    cases:str='all', # Some of table; images, 4; images, 16; images, 64 (separated by semicolons)
    chart:str='demo.png', # Where to save the chart
    out:str=None # A folder to store figures and the front page's charts in
):
    "Train on handwritten digits with fastai's Adam and with adam_jit, from the same seed, and compare"
    names = [*CASES] if cases == 'all' else [c.strip() for c in cases.split(';')]
    print(f"scikit-learn's handwritten digits, on a CPU with {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, fastai {fastai.__version__}", flush=True)
    lines,drift = measure(names, rounds, partial(print, flush=True))
    table,far = compared(lines),apart(drift)
    for c in names:
        first = lines[(lines.case == c) & (lines['round'] == 1)].set_index('contestant').first_ms
        shown = table.loc[c].loc[[*TIMES]].rename(index={n: f"{TIMES[n]}, {n.split('_')[1]}" for n in TIMES})
        shown = shown.rename_axis(None).to_string(formatters=[*['{:.3g}'.format]*2, '{:.2f}x'.format])
        print(f"\n=== {CASES[c].what}\n{shown}\n"
              f"first step of the first fit, ms: {first['Adam']:.0f} with Adam, {first['adam_jit']:.0f} with adam_jit\n"
              f"losses of the last 30 batches: {far.adam_jit[c]:.1e} from fastai's Adam; "
              f"its own, from weights moved by 1e-7, {far.moved[c]:.1e}")
    draw(chart, 13, 4.6, (draw_speeds,table), (draw_drift,drift))
    print("\nA training step is faster by what the optimizer step saves; a whole fit also loads data and validates.\n"
          "With large batches forward and backward take nearly all of the time: a faster step gains little there.\n"
          "Losses drift apart as those of fastai's own Adam do after a change in the last digit.\n\n"
          f"Chart: {Path(chart).resolve()}")
    if out: store(out, lines, drift)
    return table,far
