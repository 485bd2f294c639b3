"The command `make gpu`: on a CPU it runs to its end, without a card it says so, and what fails stops nothing else"
import json,os,subprocess,sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from fastxtend_jit import bench
from fastxtend_jit.report import Report,card_name,machine,on_gpus
from tests.gpu.report import SECTIONS,found,write_report

ROOT = Path(__file__).parents[1]

def command(*args, path=()):
    env = {**os.environ, 'PYTHONPATH':os.pathsep.join(map(str, path)), 'CUDA_VISIBLE_DEVICES':''}
    return subprocess.run([sys.executable, '-m', 'tests.gpu', *args], cwd=ROOT, env=env, capture_output=True, text=True)

MISSING = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('nbdev','nbformat','nbconvert','execnb','spacy'):
            raise ModuleNotFoundError(f'No module named {name}', name=name)
sys.meta_path.insert(0, Missing())
"""

@pytest.mark.slow
def test_end_to_end(tmp_path):
    "Every part, from a plain checkout without nbdev: figures that a report can be made of, and every section has some"
    (tmp_path/'sitecustomize.py').write_text(MISSING)
    out = tmp_path/'card'
    res = command('--device', 'cpu', '--out', str(out), path=[tmp_path])
    assert not res.returncode, res.stdout+res.stderr
    text = (out/'report.md').read_text()
    assert 'Not measured' not in text and 'Traceback' not in text and 'NOT KEPT' not in text
    assert all(f'## {s}' in text for s in SECTIONS) and '40 of 40 forms' in text and text in res.stdout
    r = Report.load(out)
    assert {*r.cells.optimizer} == {'adam','larc'} and len(r.training) and (out/'speed.png').exists()
    assert [*Report.load(out/'cold').cold_table().index] == ['adam']
    tests = found(out, 'tests')['test']
    assert len(tests) > 10 and (tests.outcome == 'passed').all()
    launches = found(out, 'launches')
    assert {*launches['launches'].who} == {'ours','fastai'} and (launches['launches'].estimate > 0).all()
    assert 'example' in {*launches['compiled'].optimizer} and len(launches['waits']) == 4

@pytest.mark.slow
def test_time_is_up(tmp_path):
    "Parts end or are ended, and there is a report of what they had"
    res = command('--device', 'cpu', '--out', str(tmp_path), '--parts', 'tests,parity', '--limit', '14')
    assert res.returncode and 'tests (cut short)' in res.stderr
    text = (tmp_path/'report.md').read_text()
    assert '| tests | cut short |' in text and text in res.stdout

@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_no_card(tmp_path):
    res = command('--out', str(tmp_path/'card'))
    assert res.returncode and 'no GPU here' in res.stderr and not (tmp_path/'card').exists()

def test_report_of_failures(tmp_path):
    "A test that failed, forms that differ, an error, a launch more than estimated, a line that was cut: all are told"
    check = dict(optimizer='adam_jit', device='cuda', dtype='float32', ok=False)
    lines = [dict(part='check', kind='check', form='defaults', **check),
             dict(part='parity', kind='parity', optimizer='lamb_jit', form='defaults', float32=1e-3, float64=0.),
             dict(part='launches', kind='error', key='launches adam', text='Traceback\nRuntimeError: no such kernel'),
             dict(part='launches', kind='launches', optimizer='larc', who='ours', launches=7, estimate=6, cuda_13=5),
             dict(part='tests', kind='test', test='tests/test_x.py::test_y', outcome='failed', seconds=1., text='boom')]
    (tmp_path/'found.jsonl').write_text('\n'.join(map(json.dumps, lines))+'\n{"part": "par')
    (tmp_path/'logs').mkdir()
    (tmp_path/'logs'/'bench.txt').write_text('x\nImportError: no module named y\n')
    text = write_report(tmp_path, [('check',1,9),('bench',1,2)])
    for s in ('0 of 1 forms','NOT KEPT','no such kernel','does not hold for larc (ours)','boom','| check | 1 | 9 |',
              'no module named y'):
        assert s in text, s
    assert text.count('Not measured.') >= 3 and 'Traceback' not in text

# --- What the benchmark does on a GPU, with one that is played

class Card:
    "Stands for `torch.cuda`: a launch takes the host 1 ms, and keeps the device busy for `device_ms`"
    def __init__(self, device_ms): self.ms,self.host,self.free = device_ms,0.,0.
    def launch(self): self.host += 1; self._busy(self.ms)
    def _busy(self, ms): self.free = max(self.free, self.host)+ms
    def _sleep(self, cycles): self._busy(cycles/1e6)
    def synchronize(self): self.host = max(self.host, self.free)
    def Event(self, **kw):
        card = self
        class Event:
            def record(self): self.at = max(card.free, card.host)
            def elapsed_time(self, other): return other.at-self.at
        return Event()

@pytest.mark.parametrize('device_ms', [0.2,5.])
def test_host_and_device(monkeypatch, device_ms):
    "What the host takes to launch, and the device without waiting for it, whichever is longer"
    card = Card(device_ms)
    for n in ('_sleep','synchronize','Event'): monkeypatch.setattr(torch.cuda, n, getattr(card, n))
    def now(): card.synchronize(); return card.host/1e3
    monkeypatch.setattr(bench, 'clock', lambda device: now)
    monkeypatch.setattr(bench, 'perf_counter', lambda: card.host/1e3)
    def step():
        for _ in range(4): card.launch()
    res = bench.host_and_device(dict(step=step), 'cuda', rounds=3)
    assert res == dict(step=dict(host_ms=pytest.approx(4), device_ms=pytest.approx(4*device_ms)))

def test_one_failure(monkeypatch, tmp_path, capsys):
    "A cell that fails is told of, the others are measured and saved, and the command fails"
    real = bench.time_cell
    def some(row, *args):
        if row is bench.rows['sgd']: raise RuntimeError('illegal memory access')
        return real(row, *args)
    monkeypatch.setattr(bench, 'time_cell', some)
    with pytest.raises(SystemExit, match='1 of 2 could not be measured'):
        bench.main('many_small', 'sgd,adam', seconds=0.01, threads=1, parts='cells', out=str(tmp_path))
    assert 'failed: RuntimeError: illegal memory access' in capsys.readouterr().out
    assert {*Report.load(tmp_path).cells.optimizer} == {'adam'}

def test_limit(tmp_path, capsys):
    bench.main('many_small', 'adam,sgd,lion', seconds=0.6, threads=1, parts='cells', limit=1, out=str(tmp_path))
    assert 'Time is up' in capsys.readouterr().out and len({*Report.load(tmp_path).cells.optimizer}) < 3

def test_peer_that_cannot(capsys):
    class Peer:
        def step(self): raise RuntimeError('not on this device')
    assert not bench._runs('torch fused', Peer(), 3) and 'not on this device' in capsys.readouterr().err
    with pytest.raises(RuntimeError): bench._runs('ours', Peer(), 3)

def test_folders_of_cards(tmp_path):
    "Each card has a folder of its own, and only those count"
    cells = pd.DataFrame(dict(model=['m'], optimizer=['adam'], contestant=['ours'], step_ms=[1.]))
    for gpu,device in (('NVIDIA H100 80GB HBM3','cuda'), ('NVIDIA T4','cuda:1'), ('none','cpu')):
        info = {**machine(), 'gpu':gpu, 'device':device}
        Report(cells=cells, machine=info).save(tmp_path/card_name(gpu), charts=False)
    assert {p.name for p in tmp_path.iterdir()} == {'nvidia-h100-80gb-hbm3','nvidia-t4','none'}
    assert [r.machine['gpu'] for r in on_gpus(tmp_path)] == ['NVIDIA H100 80GB HBM3','NVIDIA T4']
