"""Steps of fastxtend 0.1.7, in which fastai's optimizers were compiled by TorchScript first, beside ours and fastai's

`python -m tests.tools.fastxtend nbs/performance` measures its forms `jit` and `foreach` and writes fastxtend.csv. It
needs the package, which goes beside today's fastai: `pip install --no-deps fastxtend==0.1.7`"""
import gc,random,sys
from pathlib import Path
from statistics import median

import fastxtend.optimizer.all as theirs
import pandas as pd
import torch

from fastxtend_jit.bench import _fill,eight,models,rows
from fastxtend_jit.calls import clock

MODELS = 'tabular','xresnet18'
FORMS  = 'jit','foreach'

def measure(model, name, rounds=9, steps=6):
    "Milliseconds of a step by all who can take it, several of one in a row: each leaves memory in its own way"
    torch.manual_seed(0)
    params,row,now = [*models[model][0]().parameters()],rows[name],clock()
    _fill(params)
    opts = {'fastai':row.make(params, False), 'ours':row.make(params, True)}
    for form in FORMS:
        try: opts[form] = getattr(theirs, name)(wd=0.01, **row.kw, **{form:True})(params, lr=1e-6)
        except TypeError: pass  # QHAdam has no foreach form
    ms = {n:[] for n in opts}
    for _ in range(rounds):
        for n in random.sample([*opts], len(opts)):
            for _ in range(3): opts[n].step()
            for _ in range(steps):  # as many as ranger takes from one lookahead to the next
                start = now()
                opts[n].step()
                ms[n].append(1e3*(now()-start))
    return dict(model=model, optimizer=name, **{f'{n}_ms':round(median(t), 4) for n,t in ms.items()})

if __name__ == '__main__':
    res = []
    for m in MODELS:
        for o in eight:
            res.append(measure(m, o))
            print(res[-1], flush=True)
            gc.collect()
    pd.DataFrame(res).to_csv(Path(sys.argv[1])/'fastxtend.csv', index=False)
