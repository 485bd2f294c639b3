"The report of what `python -m tests.gpu` found, report.md: each section by itself, if others are missing"
import json,traceback
from pathlib import Path

import pandas as pd

from fastxtend_jit.report import Report,markdown,medians
from fastxtend_jit.trial import TOLERANCES

PROMISED = {str(dtype)[6:]: tol for dtype,tol in TOLERANCES.items()}

def read(path):
    "Lines of found.jsonl, but for those that were cut short"
    res = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try: res.append(json.loads(line))
        except ValueError: pass
    return res

def found(folder, part):
    "What a part found: a table for each kind of line"
    res = {}
    for r in read(Path(folder)/'found.jsonl'):
        if r.pop('part') == part: res.setdefault(r.pop('kind'), []).append(r)
    return {k: pd.DataFrame(rs) for k,rs in res.items()}

def _table(df, index):
    def short(x): return '' if x != x else f'{x:.4g}' if isinstance(x, float) else x
    return markdown(df.set_index(index).map(short))

def _how(folder, took):
    res = markdown(pd.DataFrame(took, columns=['part','status','seconds']).set_index('part'))
    if len(card := found(folder, 'check').get('card', ())): res = f'{card.iloc[0].to_dict()}\n\n{res}'
    return res

def _wrong(folder, took):
    lines = []
    for part in ('check','parity','launches'):
        f = found(folder, part)
        for what,column in (('error','text'),('warning','text'),('left out','key')):
            if what in f: lines += [f'- {part}, {what}: `{t.strip().splitlines()[-1][:400]}`' for t in f[what][column]]
    for name,status in {name:status for name,status,_ in took if status}.items():
        log = Path(folder)/'logs'/f'{name}.txt'
        end = log.read_text(errors='replace').strip().splitlines()[-8:] if log.exists() else []
        lines += ['', f'{name} did not end well ({status}).', *(['```', *end, '```'] if end else [])]
    return '\n'.join(lines).strip() or 'Nothing.'

def _check(folder, took):
    res = found(folder, 'check')['check']
    failed = res[~res.ok.astype(bool)]
    text = f'{res.ok.sum()} of {len(res)} forms are as they should be.'
    return text + (f'\n\n{_table(failed, "optimizer")}' if len(failed) else '')

def _tests(folder, took):
    ts = found(folder, 'tests')['test'].drop_duplicates('test', keep='last')
    file = ts.test.str.replace(r'^.*/|::.*$', '', regex=True)
    table = ts.groupby([file,'outcome']).size().unstack(fill_value=0)
    table['seconds'] = ts.groupby(file).seconds.sum().round(1)
    failed = [f'`{t.test}`\n```\n{t.text[-1200:]}\n```' for t in ts[ts.outcome == 'failed'].itertuples()]
    return '\n\n'.join([f'{len(ts):,} ran.', markdown(table.rename_axis('file')), *failed[:20]])

def _parity(folder, took):
    ps = found(folder, 'parity')['parity']
    worst = [f'{d}: at most {ps[d].max():.1e}, promised are {tol:.0e}' + ('' if ps[d].max() <= tol else ': NOT KEPT')
             for d,tol in PROMISED.items()]
    return '; '.join(worst)+f'.\n\n{_table(ps, "optimizer")}'

def _steps(folder, took):
    r = Report.load(folder)
    cells = r.cells[r.cells.contestant.isin(['fastai','ours'])]
    wide = cells.pivot_table(index=['model','optimizer'], columns='contestant', sort=False,
                             values=[c for c in ('step_ms','host_ms','device_ms') if c in cells])
    wide.columns = [f'{who} {what}' for what,who in wide.columns]
    return f'{r.summary()}\n\n{markdown(r.speeds())}\n\n{_table(wide.reset_index(), "model")}'

def _training(folder, took):
    t = medians(Report.load(folder).training)
    return _table(t.reset_index(), 'model')

def _launches(folder, took):
    ls = found(folder, 'launches')['launches']
    odd = ls[(ls.launches-ls.estimate).abs().gt(1e-6) & (ls.launches-ls.cuda_13).abs().gt(1e-6)]
    holds = 'holds for all' if odd.empty else f"does not hold for {', '.join(odd.optimizer+' ('+odd.who+')')}"
    return f'The estimate {holds}.\n\n{_table(ls, "optimizer")}'

def _waits(folder, took): return _table(found(folder, 'launches')['waits'], 'optimizer')

def _compiled(folder, took): return _table(found(folder, 'launches')['compiled'], 'optimizer')

def _cold(folder, took):
    t = Report.load(Path(folder)/'cold').cold_table()
    return _table(t.reset_index(), 'optimizer')

SECTIONS = {'How the run went':_how, 'What went wrong':_wrong, '--check':_check, 'Tests':_tests,
            "25 steps beside fastai's, largest relative difference":_parity, 'An optimizer step':_steps,
            'A whole training step':_training, "Kernel launches, xresnet50's tensors":_launches,
            'Does the host wait? (the first should)':_waits,
            'Kernels that TorchScript makes (the example may)':_compiled, 'Fits in fresh processes':_cold}

def write_report(folder, took=()):
    "Write report.md into `folder`, and return it"
    res = '# fastxtend_jit on a GPU\n'
    for title,f in SECTIONS.items():
        try: text = f(folder, took)
        except (KeyError,OSError): text = 'Not measured.'
        except Exception: text = f'```\n{traceback.format_exc()}\n```'
        res += f'\n## {title}\n\n{text}\n'
    (Path(folder)/'report.md').write_text(res)
    return res
