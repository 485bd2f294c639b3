"""The recipes of the page on libraries, run with the libraries themselves, with `use_jit` and without

What they save loads where fastxtend_jit is not installed. A library that is not here gets an environment of its own,
on top of this one and its PyTorch, if it can be had"""
import json,os,subprocess,sys,sysconfig,venv
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.test_use import REFUSE

root = Path(__file__).parent.parent
ENV = {**os.environ, 'PYTHONPATH':str(root), 'OMP_NUM_THREADS':'1'}
pytestmark = pytest.mark.slow

# Heading on the page: package, and how another process loads what the recipe saved in `path`
LIBRARIES = {
    'AutoGluon': ('autogluon.tabular[fastai]==1.6.3',
                  'from autogluon.tabular import TabularPredictor; TabularPredictor.load(path).predict(df)'),
    'tsai': ('tsai==1.0.1', 'from tsai.basics import *; load_all(path).validate()'),
    'fasterai': ('fasterai==0.4.1',
                 "from fastai.tabular.all import *; load_learner(f'{path}/digits.pkl').create_opt()")}

def recipe(heading):
    "Code of the cells under `heading`"
    code,at = [],None
    for c in json.loads((root/'nbs'/'tutorial.libraries.ipynb').read_text())['cells']:
        source = ''.join(c['source'])
        if c['cell_type'] == 'code': code += [source]*(at == heading)
        else: at = next((l[3:] for l in reversed(source.splitlines()) if l.startswith('## ')), at)
    assert code
    return '\n'.join(code)

@pytest.fixture(scope='module')
def python_with(tmp_path_factory):
    "A function: the Python that has a package"
    def made(package):
        if find_spec(package.split('.')[0].split('=')[0]): return sys.executable
        d,torch = tmp_path_factory.mktemp('env'),f"torch=={version('torch')}"
        venv.create(d, with_pip=True)
        python = d/('Scripts' if os.name == 'nt' else 'bin')/'python'
        site = Path(sysconfig.get_path('purelib', vars=dict(base=str(d))))
        (site/'beside.pth').write_text(sysconfig.get_path('purelib'))
        (d/'same.txt').write_text(torch)
        pip = [python, '-m', 'pip', 'install', '-q', '--retries=1', '--timeout=30', '-c', d/'same.txt', package]
        res = subprocess.run(pip, capture_output=True, text=True)
        why = [l for l in res.stderr.splitlines() if l.startswith('ERROR')][-1:]
        if res.returncode: pytest.skip(f"{package} cannot be had beside {torch}: {why}")
        return python
    return made

# First without the line, then with it, in one process; what the recipe calls `score` is compared
TWICE = '''
import sys,json,fastxtend_jit
from functools import partial
on,scores = fastxtend_jit.use_jit,[]
for fastxtend_jit.use_jit in (partial(on, False),on):
    exec(sys.argv[1])
    scores.append(float(score))
if 'df' in globals(): df.to_pickle(path+'/df.pkl')
print('\\n'+json.dumps([scores, [*used.seen], path]))
'''
LOAD = REFUSE+'''
import os,pandas as pd
load,path = sys.argv[1:]
if os.path.exists(path+'/df.pkl'): df = pd.read_pickle(path+'/df.pkl')
exec(load)
assert not [m for m in sys.modules if m.startswith('fastxtend_jit')]
'''

@pytest.mark.parametrize('name', LIBRARIES)
def test_recipe(name, python_with, tmp_path):
    package,load = LIBRARIES[name]
    def run(*args):
        args = python,'-W','ignore','-c',*args
        res = subprocess.run(args, capture_output=True, text=True, env=ENV, cwd=tmp_path)
        assert not res.returncode, res.stderr
        return res.stdout.splitlines()
    python = python_with(package)
    scores,seen,path = json.loads(run(TWICE, recipe(name))[-1])
    assert scores[1] == pytest.approx(scores[0], rel=0.02) and seen == [['Adam','adam_jit']]
    run(LOAD, load, path)
