"Two processes: DDP, fastai's `distrib_ctx`, FSDP2, and the script of the page on distributed training"
import json,os,re,subprocess,sys
from pathlib import Path

import pytest
import torch
import torch.distributed.fsdp

from tests.cases import AHEAD,ALL

pytest.importorskip('accelerate', reason='needs Accelerate, from the extra `dev`')
pytestmark = pytest.mark.slow
root = Path(__file__).parent.parent
sharded = pytest.mark.skipif(not hasattr(torch.distributed.fsdp, 'fully_shard'), reason='FSDP2 came with PyTorch 2.6')
NAMES   = {**dict.fromkeys(['ddp','accelerate','accumulate'], ()),
           **dict.fromkeys(['fsdp','hsdp','mixed','placements','sets'], sharded)}

def torchrun(*args):
    "Run a program in two processes; what it printed"
    cmd = [sys.executable,'-W','ignore','-m','torch.distributed.run','--nproc-per-node','2','--standalone',
           *map(str,args)]
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'CUDA_VISIBLE_DEVICES':'', 'PYTHONWARNINGS':'ignore'}
    out = subprocess.run(cmd, cwd=root, capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stdout+out.stderr
    return out.stdout

@pytest.fixture(scope='module')
def wrong(tmp_path_factory):
    path = tmp_path_factory.mktemp('distributed')/'wrong.json'
    torchrun('-m', 'tests.distributed_worker', path)
    return json.loads(path.read_text())

@pytest.mark.parametrize('case', ALL+AHEAD, ids=str)
@pytest.mark.parametrize('name', [pytest.param(n, marks=m) for n,m in NAMES.items()])
def test_two_processes(name, case, wrong):
    "The checks in `distributed_worker.py`: as one process on the same batches"
    assert not wrong[f'{name}-{case}']

def test_nothing_forgotten(wrong): assert {*wrong} <= {f'{n}-{c}' for n in NAMES for c in ALL+AHEAD}

def test_script(tmp_path):
    "The page's script, as it stands"
    out = torchrun(root/'nbs'/'examples'/'train_distributed.py', '--epochs', 3, '--path', tmp_path)
    processes,acc = re.search(r'^(\d) processes, accuracy ([\d.]+)$', out, re.M).groups()
    assert processes == '2' and float(acc) > 0.85
    saved = torch.load(tmp_path/'models'/'digits.pth', weights_only=False)
    assert {st['step'] for st in saved['opt']['state']} == {3*12}  # 1,437 digits, in 12 batches of 2 x 64
