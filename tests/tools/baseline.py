"""Why steps of large models take fastai as long as they do: memory that goes back to the system, and comes anew

`python -m tests.tools.baseline nbs/performance` measures steps by themselves and in training, with the system's
allocator as it is (`default`) and told to keep what was freed (`kept`), each in a process of its own, and writes
baseline.csv. Linux, CPU."""
import json,os,resource,subprocess,sys
from pathlib import Path
from statistics import median

import pandas as pd
import fastai.callback.progress  # noqa: F401, for `no_bar`
from fastai.callback.core import Callback,CancelFitException
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat

from fastxtend_jit.bench import _fill,models,rows
from fastxtend_jit.calls import clock

KEPT = dict.fromkeys(('MALLOC_TRIM_THRESHOLD_','MALLOC_MMAP_THRESHOLD_'), str(1<<30))
CELLS = [('xresnet18','adam'), ('xresnet50','adam'), ('xresnet50','lamb')]

class Steps(Callback):
    "Milliseconds and page faults of each optimizer step"
    def __init__(self, n): self.n,self.ms,self.faults,self.now = n,[],[],clock('cpu')
    def start(self): self.at = self.now(),resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    def stop(self):
        self.ms.append(1000*(self.now()-self.at[0]))
        self.faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt-self.at[1])
    def before_step(self): self.start()
    def after_step(self):
        self.stop()
        if len(self.ms) == self.n: raise CancelFitException
    def result(self): return median(self.ms[self.n//3:]),median(self.faults[self.n//3:])

def alone(opt, n=24):
    steps = Steps(n)
    for _ in range(n):
        steps.start()
        opt.step()
        steps.stop()
    return steps.result()

def in_training(model, batch, make, n=24):
    dl,steps = DataLoader([batch]*n, bs=None, num_workers=0),Steps(n)
    learn = Learner(DataLoaders(dl, dl), model, CrossEntropyLossFlat(), opt_func=lambda ps,lr: make(ps))
    with learn.no_bar(),learn.no_logging(): learn.fit(1, cbs=steps)
    return steps.result()

def measure(name, optimizer):
    res,(make,batch) = {},models[name][:2]
    for ours in (False,True):
        who,model = 'ours' if ours else 'fastai',make()
        params = [*model.parameters()]
        _fill(params)
        res[f'{who}_ms'],res[f'{who}_faults'] = alone(rows[optimizer].make(params, ours))
        res[f'{who}_training_ms'],_ = in_training(model, batch(), lambda ps: rows[optimizer].make(ps, ours))
    return res

def child(cell, env):
    cmd = [sys.executable,'-W','ignore','-m','tests.tools.baseline',*cell]
    return json.loads(subprocess.run(cmd, env={**os.environ, **env}, capture_output=True, text=True, check=True).stdout)

if __name__ == '__main__':
    if len(sys.argv) == 3: print(json.dumps(measure(*sys.argv[1:]))); sys.exit()
    kinds = dict(default={}, kept=KEPT)
    res = pd.DataFrame([dict(model=m, optimizer=o, allocator=k, **child((m,o), env))
                        for m,o in CELLS for k,env in kinds.items()])
    res.to_csv(Path(sys.argv[1])/'baseline.csv', index=False, float_format='%.4g')
    print(res.to_string())
