"The command `make gpu`: on a CPU it runs to its end, without a card it says so, and what fails stops nothing else"
import gc,json,os,signal,subprocess,sys,time,warnings,weakref
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from fastxtend_jit import bench
from fastxtend_jit.report import Report,card_name,machine,on_gpus
from tests.gpu import __main__ as gpu,parts
from tests.gpu.report import SECTIONS,found,read,write_report

ROOT = Path(__file__).parents[1]

def popen(*args, path=()):
    # as started by a person: pytest in its processes is told by the first that it is a part of another pytest
    env = {n:v for n,v in os.environ.items() if not n.startswith('PYTEST_')}
    env |= {'PYTHONPATH':os.pathsep.join(map(str, path)), 'CUDA_VISIBLE_DEVICES':''}
    return subprocess.Popen([sys.executable, '-m', 'tests.gpu', *args], cwd=ROOT, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # nohup ignores it

def command(*args, **kw):
    p = popen(*args, **kw)
    out,err = p.communicate()
    return SimpleNamespace(returncode=p.returncode, stdout=out, stderr=err)

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
    res = command('--device', 'cpu', '--out', str(out), '--limit', '3000', path=[tmp_path])  # also if it is busy here
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

def some_time(done):
    end = time.monotonic()+120
    while not done() and time.monotonic() < end: time.sleep(0.1)
    assert done()

@pytest.mark.slow
@pytest.mark.parametrize('sig', [signal.SIGTERM,signal.SIGHUP])
def test_told_to_end(tmp_path, sig):
    "No process is left, what was measured is kept and reported, and the command fails"
    p = popen('--device', 'cpu', '--out', str(tmp_path), '--parts', 'bench launches')
    some_time((tmp_path/'logs'/'bench'/'0'/'cells.csv').exists)
    p.send_signal(sig)
    out,err = p.communicate(timeout=60)
    assert p.returncode and 'bench (cut short), launches (not begun)' in err
    text = (tmp_path/'report.md').read_text()
    assert '| bench | cut short |' in text and '| launches | not begun |' in text and text in out
    assert len(Report.load(tmp_path).cells) and not (tmp_path/'logs'/'bench').exists()
    assert str(tmp_path) not in subprocess.run(['ps','-eo','args'], capture_output=True, text=True).stdout

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

# --- The command, with parts that are played

CELLS = pd.DataFrame(dict(model='many_small', optimizer='adam', contestant=['fastai','ours'], step_ms=[2.,1.],
                          limit_ms=1., zero_grad_ms=1., extra_mb=0., aten_calls=1))
INFO = {**machine(), 'device':'cpu', 'seconds':1., 'channels_last':False}

@pytest.fixture
def played(monkeypatch):
    "Parts that end at once, each with the next of its statuses, and the names of those that were started"
    res = SimpleNamespace(statuses={}, started=[])
    class Part:
        def __init__(self, name, out, command, **env):
            self.name,self.began = name,time.monotonic()
            res.started.append(name)
            if name == 'bench': Report(cells=CELLS, machine=INFO).save(command[command.index('--out')+1], charts=False)
        def alive(self): return False
        def stop(self): return next(res.statuses.get(self.name, iter([])), 0)
    monkeypatch.setattr(gpu, 'Part', Part)
    return res

def play(out, *parts, limit=500):
    run = gpu.Run('cpu', limit, out, {*parts})
    run.go()
    return run

@pytest.mark.parametrize('part,statuses,starts', [
    ('parity',[3,0],2), ('parity',[3,3,3,3],3), ('launches',[3,1],2), ('launches',[3]*4,3), ('tests',[3,0],1)])
def test_device_takes_no_more_calls(played, tmp_path, part, statuses, starts):
    "Another process goes on, twice at most; pytest's status 3 means something else"
    played.statuses[part] = iter(statuses)
    run = play(tmp_path, part)
    assert played.started == [part]*starts and [s for _,s,_ in run.took] == statuses[:starts]

def test_next_model(played, tmp_path):
    "If the benchmark's process dies, another one goes on, and their figures are those of one"
    played.statuses['bench'] = iter([1])
    run = gpu.Run('cuda', 500, tmp_path, {'bench'})
    run.go()
    assert [s for _,s,_ in run.took] == [1,0] and len(Report.load(tmp_path).cells) == 4
    assert not (tmp_path/'logs'/'bench').exists() and (tmp_path/'speed.png').exists()

def test_chart_fails(played, tmp_path, monkeypatch):
    "Figures are saved, later parts run, and it is told"
    def plot(self): raise ZeroDivisionError('no chart')
    monkeypatch.setattr(Report, 'plot', plot)
    run = play(tmp_path, 'bench', 'launches')
    assert played.started == ['bench','launches'] and ('bench','ZeroDivisionError',0) in run.took
    assert len(Report.load(tmp_path).cells) and 'no chart' in write_report(tmp_path, run.took)

def test_not_begun(played, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, 'signal', lambda *_: None)
    args = ['--device','cpu','--limit','9','--parts','bench','--out',str(tmp_path)]
    with pytest.raises(SystemExit, match=r'bench \(not begun\)'): gpu.main(gpu.parser.parse_args(args))
    text = (tmp_path/'report.md').read_text()
    assert not played.started and '| bench | not begun |' in text and 'bench did not end well (not begun)' in text

def test_signals(played, tmp_path, monkeypatch):
    "Three end the command, but for one that whoever started it wants ignored; then nothing more is begun"
    handlers = {}
    monkeypatch.setattr(signal, 'signal', handlers.__setitem__)
    monkeypatch.setattr(signal, 'getsignal', lambda s: signal.SIG_IGN if s == signal.SIGHUP else signal.SIG_DFL)
    args = gpu.parser.parse_args(['--device','cpu','--parts','launches','--out',str(tmp_path)])
    gpu.main(args)
    assert {*handlers} == {signal.SIGTERM,signal.SIGINT}
    run = handlers[signal.SIGINT].__self__
    handlers[signal.SIGINT](signal.SIGINT, None)
    run.go()
    assert played.started == ['launches'] and [s for _,s,_ in run.took] == [0,'not begun']

def test_old_figures(tmp_path):
    "What the parts left another time goes, what others left stays"
    names = ['cells.csv','training.csv','machine.json','speed.png','cold/cold.csv','logs/bench.txt','logs/tests.txt']
    for n in names: (tmp_path/n).parent.mkdir(exist_ok=True); (tmp_path/n).write_text('old')
    lines = [dict(part=p, kind='begun', key='x') for p in ('check','tests','check')]
    (tmp_path/'found.jsonl').write_text('\n'.join(map(json.dumps, lines))+'\n{"part": "ch')
    here = lambda: [n for n in names if (tmp_path/n).exists()]
    gpu.Run('cpu', 9, tmp_path, {'launches'})
    assert here() == names and read(tmp_path/'found.jsonl') == lines
    gpu.Run('cpu', 9, tmp_path, {'check','bench'})
    assert here() == ['cold/cold.csv','logs/tests.txt'] and read(tmp_path/'found.jsonl') == lines[1:2]
    gpu.Run('cpu', 9, tmp_path, {'cold'})
    assert here() == ['logs/tests.txt']

def test_arguments(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert gpu.Run('cpu', 9, 'card', set()).out == tmp_path/'card'
    assert gpu.parser.parse_args([]).parts == {*gpu.PARTS}
    assert gpu.parser.parse_args(['--parts','check, cold bench']).parts == {'check','cold','bench'}
    with pytest.raises(SystemExit): gpu.parser.parse_args(['--parts','bench,bnech'])
    assert 'no part bnech; there are check, tests,' in capsys.readouterr().err

# --- The other parts

def finder(tmp_path, monkeypatch, part='check'):
    "A `Found` for a GPU, where there is none"
    with warnings.catch_warnings(): res = parts.Found(part, tmp_path/'found.jsonl', 'cuda', 60)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda *_: None)
    monkeypatch.setattr(torch.cuda, 'set_sync_debug_mode', lambda *_: None)
    return res

def test_cut_line(tmp_path, monkeypatch):
    (tmp_path/'found.jsonl').write_text('{"part": "parity", "kind": "begun", "key": "adam"}\n{"part": "par')
    assert finder(tmp_path, monkeypatch, 'parity').tried == {'adam'}

def test_hears_warnings(tmp_path):
    "Although Python was started with `-W ignore`; only of the library and of fused kernels, and each once"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        parts.Found('check', tmp_path/'found.jsonl', 'cpu', 60)
        for text in ('no fused kernel','no fused kernel','something else'): warnings.warn(text)
        warnings.warn_explicit('a step', UserWarning, '/home/fastxtend_jit/fastxtend_jit/proof.py', 1)
        warnings.warn_explicit('of torch', UserWarning, '/home/fastxtend_jit/.venv/torch/x.py', 1)
    assert [r['text'] for r in read(tmp_path/'found.jsonl')] == ['UserWarning: no fused kernel','UserWarning: a step']

def test_check_dtype_by_dtype(tmp_path, monkeypatch):
    "What was compared before the process dies is kept"
    card = SimpleNamespace(name='card', total_memory=2**30, major=9, minor=0, multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda *_: card)
    monkeypatch.setattr(parts.command, 'devices', None)
    monkeypatch.setattr(parts.command, 'print_kernels', lambda: None)
    def selfcheck(on, dtypes, steps):
        if dtypes[0] == torch.float32: raise KeyboardInterrupt
        return pd.DataFrame({'optimizer':['adam_jit'], 'device':'cuda', 'dtype':'float64', 'ok':True, 'off by':0.})
    monkeypatch.setattr(parts.selfcheck, 'selfcheck', selfcheck)
    with pytest.raises(KeyboardInterrupt): parts.checked(finder(tmp_path, monkeypatch))
    assert found(tmp_path, 'check')['check'].dtype.tolist() == ['float64']

def test_no_kernels(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match='CUPTI'): parts.profiled(finder(tmp_path, monkeypatch), lambda: None)

def test_first_wait(tmp_path, monkeypatch):
    "TorchScript's errors say first where they were"
    def f(): raise RuntimeError('The following operation failed.\n...\nRuntimeError: called a synchronizing one\n')
    assert parts._first_wait(finder(tmp_path, monkeypatch), f) == 'RuntimeError: called a synchronizing one'

# --- What the benchmark does on a GPU, with one that is played

class Card:
    """Stands for `torch.cuda`: a launch takes the host 1 ms, and keeps the device busy for `device_ms`. If there are
    `queue` that have not ended, the host waits for the first of them"""
    def __init__(self, device_ms, queue=1024): self.ms,self.host,self.free,self.ends = device_ms,0.,0.,[0.]*queue
    def launch(self):
        self.host = max(self.host, self.ends.pop(0))+1
        self._busy(self.ms)
        self.ends.append(self.free)
    def _busy(self, ms): self.free = max(self.free, self.host)+ms
    def _sleep(self, cycles): self._busy(cycles/1e6)
    def synchronize(self): self.host = max(self.host, self.free)
    def Event(self, **kw):
        card = self
        class Event:
            def record(self): self.at = max(card.free, card.host)
            def elapsed_time(self, other): return other.at-self.at
        return Event()

@pytest.mark.parametrize('device_ms,queue', [(0.2,1024),(5.,1024),(0.2,3)])
def test_host_and_device(monkeypatch, device_ms, queue):
    "What the host takes to launch, and the device without waiting for it, whichever is longer, or NaN if it may have"
    card = Card(device_ms, queue)
    for n in ('_sleep','synchronize','Event'): monkeypatch.setattr(torch.cuda, n, getattr(card, n))
    def now(): card.synchronize(); return card.host/1e3
    monkeypatch.setattr(bench, 'clock', lambda device: now)
    monkeypatch.setattr(bench, 'perf_counter', lambda: card.host/1e3)
    def step():
        for _ in range(4): card.launch()
    res = bench.host_and_device(dict(step=step), 'cuda', rounds=3)
    device_ms = 4*device_ms if queue > 4 else torch.nan
    assert res == dict(step=dict(host_ms=pytest.approx(4), device_ms=pytest.approx(device_ms, nan_ok=True)))

def test_calls_without_a_figure():
    "They do not count; a call of a period that never has one makes the mean NaN"
    assert bench._median_ms([.001,.004,torch.nan,.006], 2) == pytest.approx((1+5)/2)
    assert torch.isnan(torch.tensor(bench._median_ms([.001,torch.nan]*2, 2)))

@pytest.mark.parametrize('device,index', [('cuda',[]),('cuda:1',[1])])
def test_device_by_name(monkeypatch, tmp_path, device, index):
    "The current device has no number"
    found = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda *_: 'card')
    monkeypatch.setattr(torch._C, '_cuda_setDevice', found.append, raising=False)
    monkeypatch.setattr(bench, '_run', lambda *a, **k: iter([]))
    bench.main.__wrapped__(device=device, out=str(tmp_path))
    assert found == index and Report.load(tmp_path).machine['gpu'] == 'card'

def test_memory_of_one_learner(monkeypatch):
    "None that was before is still there, nor what else waits for the collector"
    class Node: pass
    node = Node()
    node.self,alive,real = node,[weakref.ref(node)],bench._learner
    del node
    def learner(*args):
        assert not any(r() for r in alive)
        res = real(*args)
        alive.append(weakref.ref(res))
        return res
    monkeypatch.setattr(bench, '_learner', learner)
    for n in ('reset_peak_memory_stats','max_memory_allocated'): monkeypatch.setattr(torch.cuda, n, lambda: 2**20)
    make,batch,_ = bench.models['many_small']
    gc.disable()
    try: res = bench.training_memory(make(), batch(), dict(fastai=bench.Adam, ours=bench.adam_jit))
    finally: gc.enable()
    assert res == dict(fastai=1, ours=1) and len(alive) == 3

def test_one_failure(monkeypatch, tmp_path, capsys):
    "A cell that fails is told of, the others are measured and saved, and the command fails"
    real = bench.time_cell
    def some(row, *args):
        if row is bench.rows['sgd']: raise RuntimeError('illegal memory access')
        return real(row, *args)
    monkeypatch.setattr(bench, 'time_cell', some)
    with pytest.raises(SystemExit, match='1 of 2 could not be measured'):
        bench.main.__wrapped__('many_small', 'sgd,adam', seconds=0.01, threads=1, parts='cells', out=str(tmp_path))
    assert 'failed: RuntimeError: illegal memory access' in capsys.readouterr().out
    assert {*Report.load(tmp_path).cells.optimizer} == {'adam'}

def test_limit(tmp_path, capsys):
    kw = dict(seconds=0.6, threads=1, parts='cells', limit=1)
    bench.main.__wrapped__('many_small', 'adam,sgd,lion', out=str(tmp_path), **kw)
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
