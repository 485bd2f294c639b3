"""What this project set out to reach on a CPU, and whether a run of the benchmark shows it

`python -m tests.tools.targets nbs/performance` reads the figures that `python -m fastxtend_jit.bench` has left in a
folder, and prints a table. Its status is 1 if a target is missed"""
import sys

import pandas as pd

from fastxtend_jit.parity import WholeTable
from fastxtend_jit.report import Report

LARGE    = ['xresnet18','xresnet50','vit_b_16']
OF_LIMIT = dict(adam=0.9, radam=0.9, sgd_l2=0.9, rmsprop=0.85, ranger=0.85, sgd=0.85, qhadam=0.75, larc=0.55, lamb=0.5)
SPEED    = {('many_small','larc'):5, ('many_small','lamb'):7, ('tabular','larc'):2.5, ('tabular','lamb'):2.5}
ENGINE   = {'engine overhead a parameter, many_small, µs':1.5, 'engine overhead a parameter, 1,000 tensors, µs':1.5,
            'step a tensor, with 10,000 of them against 1,000':1.5, '100 groups of 10 tensors against one of 1,000':1.1,
            'many_small after 2,000 steps against a new optimizer':1.1,
            'import of fastxtend_jit.all after fastai, s':1.5}

def lowest(target, bound, xs):
    "A line: the lowest of `xs` and where that is; none if there are no `xs`"
    if not len(xs := xs.dropna()): return []
    return [(target, f'≥ {bound:g}', xs.min(), ' '.join(xs.idxmin()), bool(xs.min() >= bound))]

def targets(
    report:Report # One run, or several
) -> pd.DataFrame:
    "A line for each target: bound, measured, where, and whether it holds; what was not measured has none"
    res = []
    if len(report.cells):
        t = report.table()
        for name,bound in OF_LIMIT.items():
            cells = [(m,name) for m in LARGE]
            res += lowest(f'share of the single-pass limit, {name}', bound, t.of_limit.filter(cells))
        for (model,name),bound in SPEED.items():
            res += lowest(f'speed against fastai, {name} on {model}', bound, t.vs_fastai.filter([(model,name)]))
        res += lowest('speed against fastai, slowest cell', 1.3, t.vs_fastai)
        small = t.zero_grad_vs_fastai[t.index.isin(['many_small'], level='model')]
        res += lowest('zero_grad against fastai on many_small, slowest cell', 2, small)
    if len(report.engine):
        values = report.engine.groupby('check').value.median()
        for name,bound in ENGINE.items():
            if name in values: res.append((name, f'≤ {bound:g}', values[name], '', bool(values[name] <= bound)))
    columns = ['target','bound','measured','where','holds']
    return WholeTable(pd.DataFrame(res, columns=columns).set_index('target'))

def main(folder):
    "Print the table for the figures in `folder`; is anything missed?"
    t = targets(Report.load(folder))
    print(t)
    return not t.holds.all()

if __name__ == '__main__': sys.exit(main(*sys.argv[1:]))
