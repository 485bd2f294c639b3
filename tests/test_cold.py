"Fits in fresh processes: what they find, what the report makes of it, and how little a first step imports"
import json,subprocess,sys
from functools import partial

import numpy as np, pandas as pd
import pytest
import torch

from fastxtend_jit import bench,cold
from fastxtend_jit.bench import rows,written
from fastxtend_jit.cold import *
from fastxtend_jit.report import *

main = bench.main.__wrapped__  # from Python, an older fastcore reads the command line instead

def report(cold):
    return Report(cold=pd.DataFrame(cold), machine={**machine(), 'device':'cpu', 'seconds':1., 'channels_last':False})

def fit(contestant, first, *fits, optimizer='adam', round=1, run=1, mb=5., modules=0):
    "A made-up line: seconds of the first step, and of fits of 22 and 66 batches"
    return dict(run=run, optimizer=optimizer, contestant=contestant, round=round, first_s=first, first_mb=mb,
                modules=modules, dynamo=modules > 500, **{f'fit_{n}_s': s for n,s in zip((22,66), fits)})

def pair(fastai, ours, **kw): return [fit('fastai', *fastai, **kw), fit('ours', *ours, **kw)]

def new_modules(body, setup=''):
    "Modules that `body` imports in a process that has run `setup` and has imported what users import"
    script = f'''
import json,sys
from fastai.tabular.all import *
from fastxtend_jit.all import *
{setup}
known = {{*sys.modules}}
{body}
print(json.dumps(sorted({{*sys.modules}}-known)))'''
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', script], capture_output=True, text=True)
    assert not res.returncode, res.stderr
    return json.loads(res.stdout)

ALL_OURS = [written(row)['ours'] for name,row in rows.items() if name not in variants]
STEPS  = f'''
for make in ({', '.join(ALL_OURS)}):
    p = nn.Parameter(torch.ones(8, 8))
    p.grad = torch.ones(8, 8)
    make([p], lr=0.1).step()'''

def test_first_step_imports_little():
    "Neither a fit, nor all optimizers and a step of each, imports `torch._dynamo`, which takes a second, or much else"
    assert len(ALL_OURS) == 12
    fit = 'with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(1)'
    new = new_modules(fit+STEPS, 'from fastxtend_jit.cold import digits\nlearn = digits(adam_jit)')
    assert 'torch._dynamo' not in new, f"torch._dynamo came with {len(new)} modules"
    assert len(new) <= 20, new

@pytest.mark.slow
def test_measuring_hides_nothing():
    "The module that runs in the process imports nothing that a user's imports have not"
    assert new_modules('import fastxtend_jit.cold') == ['fastxtend_jit.cold']

@pytest.mark.slow
def test_end_to_end(tmp_path, monkeypatch, capsys):
    "The command: processes, figures, chart. fastai has no Lion, so its Adam competes"
    monkeypatch.setattr(bench, 'time_cold', partial(time_cold, batches=(1,3)))
    threads = torch.get_num_threads()
    main(optimizers='lion,sgd_l2', parts='cold', rounds=1, threads=1, out=str(tmp_path))
    torch.set_num_threads(threads)
    assert 'cold, round 1 of 1, lion: first step fastai' in capsys.readouterr().out
    r = Report.load(tmp_path)
    assert [*r.cold.columns] == ['run','optimizer','contestant','round','first_s','first_mb','modules','dynamo',
                                 'fit_1_s','fit_3_s']
    assert r.cold.optimizer.tolist() == ['lion']*2 and r.cold.contestant.tolist() == ['fastai','ours']
    assert not len(r.cells) and (0 < r.cold.first_s).all()
    assert (r.cold.first_s < r.cold.fit_1_s).all() and (r.cold.fit_1_s < r.cold.fit_3_s).all()
    assert r.cold.modules[0] == 0 and not r.cold.dynamo[0]
    assert {'ahead_1_s','speed_3','break_even'} <= {*r.cold_table()} and 'ahead_3_s' in str(r)
    assert (tmp_path/'cold.png').read_bytes()[:4] == b'\x89PNG'

def test_one_after_the_other(tmp_path, monkeypatch):
    "What there is is saved after each optimizer, what fails stops no other, one process warms up, no model is made"
    calls = []
    def in_new_process(opt_func, batches, device):
        calls.append(opt_func)
        if 'sgd_jit' in opt_func: raise RuntimeError('no SGD')
        if opt_func == 'lamb_jit': raise KeyboardInterrupt
        return dict(first_s=1., first_mb=1., modules=0, dynamo=False, fit_22_s=2.)
    monkeypatch.setattr(cold, 'in_new_process', in_new_process)
    monkeypatch.setitem(bench.models, 'many_small', None)
    with pytest.raises(KeyboardInterrupt):
        main('many_small', 'adam,sgd,sgd_l2,lion,lamb', parts='cold', rounds=1, out=str(tmp_path))
    assert Report.load(tmp_path).cold.optimizer.unique().tolist() == ['adam','lion']
    assert calls.count('adam_jit') == 2 and not any('decouple_wd' in c for c in calls)

@pytest.mark.slow
def test_says_what_failed():
    with pytest.raises(RuntimeError, match=r'partial\(adam_jit, tiger=1\) failed.*[\s\S]*tiger'):
        in_new_process('partial(adam_jit, tiger=1)', (1,))

def test_round_trip(tmp_path):
    slow,fast = (1.5,1.7,2.0),(0.02,0.3,0.9)
    r = report(pair((0.01,0.3,0.9), slow, modules=869) + pair((0.01,0.3,0.9), fast, optimizer='lion'))
    r.save(tmp_path)
    pd.testing.assert_frame_equal(Report.load(tmp_path).cold_table(), r.cold_table())
    report([]).save(tmp_path)
    assert not (tmp_path/'cold.csv').exists()

def test_table():
    "Medians over runs and rounds of what pairs differ by; the order of optimizers stays"
    slow = pair((0.1,2.,6.), (0.7,2.6,5.2), round=2) + pair((0.1,2.,6.), (0.5,2.2,5.4), run=2)
    r = report(pair((0.1,1.,3.), (0.6,1.4,2.6)) + slow + pair((0.1,1.,3.), (0.1,1.,4.), optimizer='a'))
    t = r.cold_table()
    assert t.index.tolist() == ['adam','a']
    columns = ['fastai_first_s','ours_first_s','ahead_22_s','ahead_66_s','speed_66']
    assert np.allclose(t.loc['adam',columns].tolist(), [0.1,0.6,-0.4,0.6,6/5.2])
    assert t.break_even.tolist() == [22+18,np.inf] and not t.dynamo.any()

def test_memory_and_modules():
    r = report([fit('fastai', 0.1, 1, 2, mb=2.), fit('ours', 1.5, 2, 3, mb=162., modules=869)])
    assert r.cold_table().loc['adam',['extra_mb','modules','dynamo']].tolist() == [160,869,True]

@pytest.mark.parametrize('ahead,n', [
    ({0:-.5, 22:-.4, 66:.4}, 44), ({0:-1, 100:-.5}, 200), ({0:-.1, 22:.1}, 11), ({0:.1, 22:.1}, 0),
    ({0:-.1, 22:.1, 66:-.2, 132:.4}, 88), ({0:-.1, 22:-.3}, np.inf), ({0:-.1, 22:-.1}, np.inf)])
def test_break_even(ahead, n): assert break_even(pd.Series(ahead)) == n

def test_plot():
    "A line for each optimizer in both panels, and its name"
    r = report(sum((pair((0.01,0.3,0.9), (1.5,1.7,2.0), optimizer=o) for o in ('adam','sgd','lion')), []))
    for ax in r.plot_cold().axes:
        assert len(ax.lines) == 3+1 and {t.get_text() for t in ax.texts} == {'adam','sgd','lion'}
        heights = sorted(t.xyann[1] for t in ax.texts)
        assert np.diff(heights).min() > 0  # names do not lie on one another
