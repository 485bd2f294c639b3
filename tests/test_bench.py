"The benchmark: it runs from end to end, and its figures mean what it says they mean"
from functools import partial
from itertools import cycle

import numpy as np, pandas as pd
import pytest
import torch
from torch import nn

from fastxtend_jit import bench
from fastxtend_jit.all import *
from fastxtend_jit.bench import *
from fastxtend_jit.report import *
from tests.tools.targets import main as check_targets,targets

main = bench.main.__wrapped__  # from Python, an older fastcore reads the command line instead
MS = dict(fastai=20., ours=10., limit=7.)

def with_grads(*shapes):
    ps = [nn.Parameter(torch.randn(s)) for s in shapes]
    for p in ps: p.grad = torch.randn_like(p)
    return ps

def report(cells=(), training=(), engine=()):
    info = {**machine(), 'device':'cpu', 'seconds':1., 'channels_last':False}
    return Report(*[pd.DataFrame(list(o)) for o in (cells,training,engine)], info)

def cell(model, optimizer, limit_ms=1., zero=(2.,1.), run=1, **ms):
    return [dict(run=run, model=model, optimizer=optimizer, contestant=n.replace('_',' '), step_ms=t, limit_ms=limit_ms,
                 extra_mb=0., aten_calls=1, zero_grad_ms=zero[n == 'ours']) for n,t in ms.items()]

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    res = tmp_path_factory.mktemp('bench')/'made'
    threads = torch.get_num_threads()
    main('many_small', 'adam,sgd_l2', seconds=0.05, threads=1, parts='cells,training', repeat=2, out=str(res))
    torch.set_num_threads(threads)
    return res

def test_end_to_end(folder):
    r = Report.load(folder)
    times = [f'{what}_{of}' for what in ('step','zero_grad') for of in ('ms','lower','upper')]
    keys,others = ['run','model','optimizer','contestant'],['limit_ms','extra_mb','aten_calls']
    assert [*r.cells.columns] == [*keys,*times[:3],*others,*times[3:]]
    peers = ['fastai','ours','ours, plain Python','torch fused','torch foreach','torch for-loop']
    for o in ('adam','sgd_l2'):
        for run in (1,2): assert {*peers} <= {*r.cells.query('optimizer == @o and run == @run').contestant}
    figures = r.cells.select_dtypes('number')
    assert np.isfinite(figures).all(axis=None) and (figures.drop(columns='extra_mb') > 0).all(axis=None)
    for what in ('step','zero_grad'):
        lower,ms,upper = (r.cells[f'{what}_{of}'] for of in ('lower','ms','upper'))
        assert (lower <= ms).all() and (ms <= upper).all()
    calls = r.cells[r.cells.optimizer == 'adam'].set_index('contestant').aten_calls
    assert calls['ours'].max() <= 4 and calls['fastai'].min() > 5*120
    t = r.training
    assert t.run.tolist() == [1,2] and np.isclose(t.speed, t.fastai_ms/t.ours_ms, rtol=1e-4).all()
    assert not len(r.engine) and r.machine['threads'] == 1 and f"torch {torch.__version__.split('+')[0]}" in r.where()
    assert (folder/'speed.png').read_bytes()[:4] == b'\x89PNG'
    assert [*r.speeds().index] == ['adam','sgd_l2','geometric mean'] and 'many_small' in r._repr_markdown_()
    for word in ('best_peer','ours_upper','vs_plain','Largest over smallest of 2 runs','training step',r.where()):
        assert word in str(r)
    assert 'arget' not in str(r) and 'ours_upper' not in r.table() and len(r.table()) == 2

def test_interleave(monkeypatch):
    "All are called as often; outliers do not count; a period is averaged"
    calls,after,time = [],[],[0.]
    monkeypatch.setattr(bench, 'clock', lambda device: lambda: time[0])
    def fn(name, *secs):
        it = cycle(secs)
        def f(): calls.append(name); time[0] += next(it)
        return f
    fns = dict(even=fn('even', .002), spiky=fn('spiky', *[.003]*9, 1.), period=fn('period', .001,.001,.004))
    ms = interleave(fns, 0, period=3, least=10, after=lambda: after.append(0))
    assert {n:t.median for n,t in ms.items()} == pytest.approx(dict(even=2, spiky=3, period=2))
    assert len(after) == len(calls) == 3*30 and all({*calls[i:i+3]} == {'even','spiky','period'} for i in range(0,90,3))

def test_quartiles():
    assert timing([.001*i for i in range(1, 6)]) == pytest.approx((3,2,4))
    assert timing([.001,.011,.002,.012,.003,.013], 2) == pytest.approx(((2+12)/2,(1.5+11.5)/2,(2.5+12.5)/2))
    assert timing([.001,.002,.003]).columns('step') == pytest.approx(dict(step_ms=2, step_lower=1.5, step_upper=2.5))

BYTES = dict(sgd=20, sgd_l2=20, rmsprop=20, adam=28, radam=28, qhadam=28, larc=20, lamb=28, ranger=28+8/6, lion=20,
             adan=44, stableadam=28, muon=28)

@pytest.mark.parametrize('name,per_element', BYTES.items())
def test_limit(name, per_element, monkeypatch):
    "The flat step moves 28 bytes an element; the limit is what a step has to move at that bandwidth"
    timed = lambda fns, *a, after=None, **k: {n:Timing(*[MS.get(n, 30.)]*3) for n in fns}
    monkeypatch.setattr(bench, 'interleave', timed)
    ps = with_grads((64,64), (64,), ())  # Muon's one matrix takes Adam's step
    d = time_cell(rows[name], ps, lambda: None, 0.)
    assert d.limit_ms.tolist() == pytest.approx([7*per_element/28]*len(d))
    t = report(d.assign(model='m', optimizer=name).to_dict('records')).table()
    assert t.of_limit.item() == pytest.approx(7*per_element/28/10) and t.vs_plain.item() == 3
    if rows[name].native: assert t.vs_fastai.item() == 2
    else: assert np.isnan(t.vs_fastai.item()) and t.fastai_calls.item() is pd.NA
    assert all(p.grad is not None for p in ps)

def test_peers():
    "Contestants with the same maths take nearly the same steps, and ours in plain Python the same as ours"
    for name,row in rows.items():
        torch.manual_seed(0)
        start,res = with_grads((64,64)),{}
        for n in row.contestants(start):
            ps = [nn.Parameter(p.detach().clone()) for p in start]
            ps[0].grad = start[0].grad.clone()
            opt = row.contestants(ps)[n]
            opt.set_hyper('lr', 0.01)
            # `torch.optim`'s has no true weight decay
            if name == 'rmsprop' and n in ('fastai','ours',PLAIN): opt.set_hyper('wd', 0.)
            for _ in range(10):
                opt.step()
                ps[0].grad.copy_(start[0].grad)  # fastai's L2 regularization changes it
            res[n] = ps[0].detach()-start[0].detach()
        first = next(iter(res.values()))  # fastai, or ours where fastai has none
        for n,moved in res.items(): assert (moved-first).norm() < 0.02*first.norm(), (name,n)
        assert torch.equal(res[PLAIN], res['ours']), name

def test_plain():
    "Another step, and only for this optimizer"
    opts = rows['adam'].contestants(with_grads((3,)))
    compiled,plain = opts['ours'].opt_step,opts[PLAIN].opt_step
    assert compiled is adam_jit_step and isinstance(compiled.compiled, torch.jit.ScriptFunction)
    assert plain is not compiled and plain.compiled is adam_jit_step.fn and plain.args == compiled.args

def test_training_takes_turns():
    make,batch,_ = bench.models['many_small']
    opts = []
    def keep(f): return lambda *a, **k: opts.append(f(*a, **k)) or opts[-1]
    ms = time_training(make(), batch(), 0.01, dict(fastai=keep(bench.Adam), ours=keep(adam_jit)))
    assert all(0 < t.lower <= t.median <= t.upper for t in ms.values())
    native,jit = [{st['step'] for st in o.state.values()} for o in opts]
    assert native == jit and min(jit) >= 5

def test_gradients_of_ones_own():
    "`torch.optim` drops gradients, fastai and ours zero them, and none of it shows in another's turn"
    make,batch,_ = bench.models['many_small']
    model,grads = make(),{}
    def see(name, f):
        def made(params, **kw):
            opt = f(params, **kw)
            step,grads[name] = opt.step,[]
            def see_and_step(): grads[name].append(next(model.parameters()).grad); step()
            opt.step = see_and_step
            return opt
        return made
    fs = dict(fastai=bench.Adam, torch=partial(bench.OptimWrapper, opt=torch.optim.AdamW), ours=adam_jit)
    time_training(model, batch(), 0.01, {n:see(n, f) for n,f in fs.items()})
    number = {n:len({*map(id, gs)}) for n,gs in grads.items()}
    assert number['fastai'] == number['ours'] == 1 and number['torch'] == len(grads['torch']) > 3
    assert grads['fastai'][0] is not grads['ours'][0]

def test_engine(monkeypatch):
    monkeypatch.setattr(bench, 'import_time', lambda: 0.25)
    r = report(engine=time_engine(0.1).to_dict('records'))
    assert np.isfinite(r.engine.value).all() and r.engine.value.iloc[-1] == 0.25
    timed = r.engine.dropna()
    assert len(timed) == 5 and (timed.lower <= timed.value).all() and (timed.value <= timed.upper).all()
    assert len(targets(r)) == 6  # it has them all, under these names

@pytest.mark.parametrize('name', [n for n in rows if n not in ('ranger','muon')])  # of one step, without slow weights
def test_bare_step(name):
    "It does what the optimizer's step does"
    row,ps = rows[name],with_grads((64,64), (3,))
    qs = [nn.Parameter(p.detach().clone()) for p in ps]
    for p,q in zip(ps, qs): q.grad = p.grad.clone()
    a,b = [row.make(x, True) for x in (ps,qs)]
    for opt in (a,b,a): opt.set_hyper('lr', 0.1); opt.step()
    with torch.no_grad(): bare_step(b)()
    for p,q in zip(ps, qs): assert torch.equal(p, q)

@pytest.mark.slow
def test_import_time(): assert import_time() > 0

# --- the report

def test_peer():
    "The best of the others; ours in plain Python is none of them"
    adam = cell('a','adam', fastai=10, ours=1, ours__plain_Python=0.1, torch_fused=1.4, torch_foreach=3, optimi=0.5)
    r = report(adam + cell('a','larc', fastai=3, ours=1))
    r.cells.replace('ours  plain Python', PLAIN, inplace=True)
    t = r.table()
    assert t.best_peer.tolist() == ['optimi',''] and t.vs_peer['a','adam'] == 0.5 and t.vs_torch['a','adam'] == 1.4
    assert t.vs_plain['a','adam'] == 0.1 and np.isnan(t.vs_plain['a','larc'])

def test_runs():
    "Several runs: the fastest, and by how much they differ"
    cells = []
    for i,(f,o) in enumerate([(10,1),(12,3),(14,2)]):
        cells += cell('a','adam', fastai=f, ours=o, run=i) + cell('b','adam', fastai=10, ours=2, run=i)
    r = report(cells)
    assert r.runs == 3 and r.table().ours_ms.tolist() == [1,2] and r.table().vs_fastai.tolist() == [10,5]
    s = r.spread()
    assert s['median'].tolist() == [1.2,2,1.75,2] and s.largest.tolist() == [1.4,3,2.5,3]
    assert {*s['where']} == {'a adam'}
    assert 'of 3 runs' in str(r)

def test_without_fastai():
    "What fastai does not have is in the table, and in no mean, sentence or chart"
    r = report(cell('a','adam', fastai=10, ours=2) + cell('a','lion', ours=1, optimi=3) + cell('b','lion', ours=1))
    t = r.table()
    assert t.vs_optimi['a','lion'] == t.vs_peer['a','lion'] == 3 and t.vs_fastai.isna().tolist() == [False,True,True]
    assert r.speeds().index.tolist() == ['adam','geometric mean']
    assert r.summary().startswith('A step is 5.0 to 5.0 times')
    assert [l.get_text() for l in r.plot().axes[0].get_yticklabels()] == ['adam']

def test_variants_alone():
    "A mean of nothing is none"
    r = report(cell('a','sgd_l2', fastai=2, ours=1))
    assert 'mean' not in r.summary() and r.speeds().index.tolist() == ['sgd_l2']

def test_targets(tmp_path, capsys):
    r = report(cell('many_small','lamb', fastai=10, ours=1) + cell('many_small','adam', zero=(1.9,1.), fastai=2, ours=1)
               + cell('xresnet50','adam', 0.8, fastai=10, ours=1) + cell('vit_b_16','adam', 0.95, fastai=10, ours=1)
               + cell('xresnet50','larc', 0.6, fastai=1.2, ours=1) + cell('tabular','larc', fastai=2, ours=1),
               engine=[dict(check='100 groups of 10 tensors against one of 1,000', value=1.05),
                       dict(check='no target', value=9.),
                       dict(check='many_small after 2,000 steps against a new optimizer', value=1.2)])
    t = targets(r)
    want = {'share of the single-pass limit, adam': (0.8, False), 'share of the single-pass limit, larc': (0.6, True),
            'speed against fastai, lamb on many_small': (10, True), 'speed against fastai, larc on tabular': (2, False),
            'speed against fastai, slowest cell': (1.2, False),
            'zero_grad against fastai on many_small, slowest cell': (1.9, False),
            '100 groups of 10 tensors against one of 1,000': (1.05, True),
            'many_small after 2,000 steps against a new optimizer': (1.2, False)}
    assert {k:(v.measured, v.holds) for k,v in t.iterrows()} == want
    assert t['where']['speed against fastai, slowest cell'] == 'xresnet50 larc'
    assert t['bound']['share of the single-pass limit, adam'] == '≥ 0.9'
    r.save(tmp_path)
    assert check_targets(tmp_path) and 'share of the single-pass limit, larc' in capsys.readouterr().out
    report(engine=r.engine[:1].to_dict('records')).save(tmp_path)
    assert not check_targets(tmp_path)

@pytest.mark.parametrize('kw,msg', [
    (dict(device='cuda'), 'no GPU'), (dict(models='vit'), 'no model vit; there are many_small'),
    (dict(optimizers='adam tiger'), 'no optimizer tiger'), (dict(parts='all cells'), 'no part all')])
def test_says_what_is_wrong(kw, msg, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit, match=msg): main(out=str(tmp_path/'x'), **kw)
    assert not (tmp_path/'x').exists()
