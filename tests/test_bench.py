"The benchmark: it runs from end to end, and its figures mean what it says they mean"
from itertools import cycle

import numpy as np, pandas as pd
import pytest
import torch
from torch import nn

from fastxtend_jit import bench
from fastxtend_jit.all import *
from fastxtend_jit.bench import *

MS = dict(fastai=20., ours=10., limit=7.)

def with_grads(*shapes):
    ps = [nn.Parameter(torch.randn(s)) for s in shapes]
    for p in ps: p.grad = torch.randn_like(p)
    return ps

def report(cells=(), training=(), engine=()):
    return Report(*[pd.DataFrame(list(o)) for o in (cells,training,engine,())], {**machine(), 'device':'cpu', 'seconds':1., 'channels_last':False})

def cell(model, optimizer, limit_ms=1., zero=(2.,1.), **ms):
    return [dict(model=model, optimizer=optimizer, contestant=n.replace('_',' '), step_ms=t, limit_ms=limit_ms, extra_mb=0., aten_calls=1,
                 zero_grad_ms=zero[n == 'ours']) for n,t in ms.items()]

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    res = tmp_path_factory.mktemp('bench')/'made'
    threads = torch.get_num_threads()
    main('many_small', 'adam,sgd_l2', seconds=0.05, threads=1, parts='cells,training', out=str(res))
    torch.set_num_threads(threads)
    return res

def test_end_to_end(folder):
    r = Report.load(folder)
    assert [*r.cells.columns] == ['model','optimizer','contestant','step_ms','limit_ms','extra_mb','aten_calls','zero_grad_ms']
    peers = ['fastai','ours','torch fused','torch foreach','torch for-loop']
    for o in ('adam','sgd_l2'): assert {*peers} <= {*r.cells[r.cells.optimizer == o].contestant}
    figures = r.cells.select_dtypes('number')
    assert np.isfinite(figures).all(axis=None) and (figures.drop(columns='extra_mb') > 0).all(axis=None)
    calls = r.cells[r.cells.optimizer == 'adam'].set_index('contestant').aten_calls
    assert calls['ours'] <= 4 and calls['fastai'] > 5*120
    assert len(r.training) == 1 and np.isclose(r.training.speed, r.training.fastai_ms/r.training.ours_ms, rtol=1e-4).all()
    assert not len(r.engine) and r.machine['threads'] == 1 and f"torch {torch.__version__.split('+')[0]}" in r.where()
    assert (folder/'speed.png').read_bytes()[:4] == b'\x89PNG'
    assert [*r.speeds().index] == ['adam','sgd_l2','geometric mean'] and 'many_small' in r._repr_markdown_()
    for word in ('best_peer','Targets','geometric mean of 1 cells',r.where()): assert word in str(r)

def test_interleave(monkeypatch):
    "All are called as often; outliers do not count; a period is averaged"
    calls,after,time = [],[],[0.]
    monkeypatch.setattr(bench, 'clock', lambda device: lambda: time[0])
    def fn(name, *secs):
        it = cycle(secs)
        def f(): calls.append(name); time[0] += next(it)
        return f
    ms = interleave(dict(even=fn('even', .002), spiky=fn('spiky', *[.003]*9, 1.), period=fn('period', .001,.001,.004)), 0,
                    period=3, least=10, after=lambda: after.append(0))
    assert ms == pytest.approx(dict(even=2, spiky=3, period=2))
    assert len(after) == len(calls) == 3*30 and all({*calls[i:i+3]} == {'even','spiky','period'} for i in range(0,90,3))

@pytest.mark.parametrize('name,per_element', dict(sgd=20, sgd_l2=20, rmsprop=20, adam=28, radam=28, qhadam=28, larc=20, lamb=28, ranger=28+8/6).items())
def test_limit(name, per_element, monkeypatch):
    "The flat step moves 28 bytes an element; the limit is what a step has to move at that bandwidth"
    monkeypatch.setattr(bench, 'interleave', lambda fns, *a, after=None, **k: {n:MS.get(n, 30.) for n in fns})
    ps = with_grads((64,64), (64,), ())
    d = time_cell(rows[name], ps, lambda: None, 0.)
    assert d.limit_ms.tolist() == pytest.approx([7*per_element/28]*len(d))
    t = report(d.assign(model='m', optimizer=name).to_dict('records')).table()
    assert t.of_limit.item() == pytest.approx(7*per_element/28/10) and t.vs_fastai.item() == 2
    assert all(p.grad is not None for p in ps)

def test_peers():
    "Contestants with the same maths take nearly the same steps as fastai"
    for name,row in rows.items():
        torch.manual_seed(0)
        start,res = with_grads((64,64)),{}
        for n in row.contestants(start):
            ps = [nn.Parameter(p.detach().clone()) for p in start]
            ps[0].grad = start[0].grad.clone()
            opt = row.contestants(ps)[n]
            opt.set_hyper('lr', 0.01)
            if name == 'rmsprop' and n in ('fastai','ours'): opt.set_hyper('wd', 0.)  # `torch.optim`'s has no true weight decay
            for _ in range(10):
                opt.step()
                ps[0].grad.copy_(start[0].grad)  # fastai's L2 regularization changes it
            res[n] = ps[0].detach()-start[0].detach()
        for n,moved in res.items(): assert (moved-res['fastai']).norm() < 0.02*res['fastai'].norm(), (name,n)

def test_training_takes_turns():
    make,batch = bench.models['many_small']
    opts = []
    def keep(f): return lambda *a, **k: opts.append(f(*a, **k)) or opts[-1]
    ms = time_training(make(), batch(), 0.01, dict(fastai=keep(bench.Adam), ours=keep(adam_jit)))
    assert all(t > 0 for t in ms.values())
    native,jit = [{st['step'] for st in o.state.values()} for o in opts]
    assert native == jit and min(jit) >= 5

def test_engine(monkeypatch):
    monkeypatch.setattr(bench, 'import_time', lambda: 0.25)
    r = report(engine=time_engine(0.1).to_dict('records'))
    assert np.isfinite(r.engine.value).all() and r.engine.value.iloc[-1] == 0.25
    assert len(r.targets()) == r.engine.at_most.notna().sum() == 6

@pytest.mark.parametrize('name', [n for n in rows if n != 'ranger'])  # slow weights are not the step's own
def test_bare_step(name):
    "It does what the optimizer's step does"
    row,ps = rows[name],with_grads((64,64), (3,))
    qs = [nn.Parameter(p.detach().clone()) for p in ps]
    for p,q in zip(ps, qs): q.grad = p.grad.clone()
    a,b = [row.make(x, True) for x in (ps,qs)]
    for opt in (a,b,a): opt.set_hyper('lr', 0.1); opt.step()
    with torch.no_grad(): bare_step(b)()
    for p,q in zip(ps, qs): assert torch.equal(p, q)

def test_import_time(): assert 0 < import_time() < 60

def test_cuda_launches():
    t = cuda_launches(lambda: nn.Sequential(nn.Linear(2,2), nn.Linear(2,2))).set_index('optimizer')
    assert (t.tensors == 4).all() and t.index.tolist() == [*rows]
    assert t.fastai['sgd'] == 4*4 and t.ours['sgd'] == 2  # decay, average (2 launches) and update of each; decay of all, then all the rest
    assert t.ours_to_2_10['lamb'] >= t.ours['lamb'] and t.ours_to_2_10['adam'] == t.ours['adam']

def test_targets():
    r = report(cell('many_small','adam', fastai=10, ours=1, torch_fused=1.4, torch_foreach=3, optimi=0.5)
               + cell('xresnet50','adam', 0.8, fastai=10, ours=1, torch_fused=2)
               + cell('xresnet50','larc', 0.8, fastai=1.2, ours=1), [dict(model='tabular', fastai_ms=3., ours_ms=2., speed=1.5)],
               [dict(check='overhead', value=2., at_most=1.5), dict(check='no target', value=9., at_most=None), dict(check='groups', value=2., at_most=3.)])
    t = r.targets().set_index('target')
    want = {'speed against fastai, geometric mean of 3 cells': ((10*10*1.2)**(1/3), False), 'speed against fastai, slowest of 3 cells': (1.2, False),
            'speed against the best torch.optim, slowest cell': (1.4, True), 'speed against the best torch.optim, Adam on many_small': (1.4, False),
            'fraction of the single-pass limit, adam, radam, rmsprop, ranger, sgd_l2': (0.8, False),
            'fraction of the single-pass limit, larc, lamb': (0.8, True),
            'zero_grad against fastai on many_small, slowest cell': (2., True), 'training step against fastai, Adam on tabular': (1.5, False),
            'overhead': (2., False), 'groups': (2., True)}
    assert {k:(v.measured, v.holds) for k,v in t.iterrows()} == {k:(round(x, 2), h) for k,(x,h) in want.items()}
    assert t['where']['speed against fastai, slowest of 3 cells'] == 'larc xresnet50'
    assert r.table().best_peer['many_small','adam'] == 'optimi' and r.table().vs_peer['many_small','adam'] == 0.5

@pytest.mark.parametrize('kw,msg', [(dict(device='cuda'), 'no GPU'), (dict(models='vit'), 'no model vit; there are many_small'),
                                    (dict(optimizers='adam lion'), 'no optimizer lion'), (dict(parts='all cells'), 'no part all')])
def test_says_what_is_wrong(kw, msg, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit, match=msg): main(out=str(tmp_path/'x'), **kw)
    assert not (tmp_path/'x').exists()
