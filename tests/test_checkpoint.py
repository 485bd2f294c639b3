"Checkpoints: fastai's into ours and back, states that do not fit, and a run that is killed and resumed"
import copy,json,os,signal,subprocess,sys,traceback,warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn,Tensor
from fastcore.basics import noop
from fastcore.foundation import L
from fastai.callback.core import Callback
from fastai.callback import schedule  # noqa: F401, gives Learner its `fit_one_cycle`
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoader,DataLoaders
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.torch_core import params,set_seed,trainable_params

from tests.cases import *
from tests.learners import vision
from tests.support import every,same,slow_but,snapshot,train,trained,twins

MANY = ALL+TWO_AHEAD
many = pytest.mark.parametrize('case', MANY, ids=str)
pytestmark = pytest.mark.filterwarnings('ignore:numpy.core is deprecated')  # fastai's `load_model` uses it

def make_learn(case, jit, path, drop=0., shuffle=False):
    "A Learner on made data, in float64: two parameter groups, batch norm, 5 batches an epoch"
    torch.manual_seed(0)
    x,y = torch.randn(40,6).double(),torch.randn(40,3).double()
    model = nn.Sequential(nn.Linear(6,5,bias=False), nn.BatchNorm1d(5), nn.Dropout(drop), nn.Linear(5,3)).double()
    dls = DataLoaders(*[DataLoader(list(zip(x,y)), bs=8, shuffle=shuffle) for _ in range(2)])
    learn = Learner(dls, model, MSELossFlat(), path=path, opt_func=partial(case.make, jit=jit),
                    splitter=lambda m: [params(m[:3]), params(m[3])])
    learn.logger = noop
    return learn.remove_cb(ProgressCallback)

def trained_learner(case, jit, path):
    "As above, trained with the first group frozen, then with all: some parameters have taken fewer steps"
    learn = make_learn(case, jit, path)
    learn.freeze();   learn.fit_one_cycle(1, slice(0.01,0.02))
    learn.unfreeze(); learn.fit_one_cycle(1, slice(0.01,0.02))
    return learn

@many
@pytest.mark.parametrize('saves,loads', [('native','jit'), ('jit','native'), ('jit','jit')])
def test_both_ways(case, saves, loads, tmp_path):
    "What one saves the other loads, and both go on alike"
    a = trained_learner(case, saves=='jit', tmp_path)
    a.save('both', with_opt=True)
    b = make_learn(case, loads=='jit', tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'Could not load')  # all that fastai does if the optimizer raises
        b.load('both', with_opt=True)
    same_state(*((b.opt,a.opt) if saves == 'native' else (a.opt,b.opt)), 0.)
    for learn in (a,b): learn.fit_one_cycle(2, slice(0.01,0.02))
    tol = 0. if saves == loads else TOL[torch.float64]
    for (k,p),q in zip(a.model.state_dict().items(), b.model.state_dict().values()): close(q, p, tol, k)
    same_state(*((b.opt,a.opt) if saves == 'native' else (a.opt,b.opt)), tol)

@many
def test_form(case, tmp_path):
    "`state_dict` has fastai's keys and types, but plain lists for `L`, and Python's numbers for NumPy's"
    plain = {L:list, np.float64:float}
    def form(o, to={}):
        # fastai's is a number where it is `lr`
        item = lambda k,v: form(torch.as_tensor(v, dtype=torch.float64) if k == 'local_lr' else v, to)
        if isinstance(o, dict): return {k: item(k, v) for k,v in o.items()}
        cls = to.get(type(o), type(o))
        if isinstance(o, (list,L)): return cls,[form(x, to) for x in o]
        return (o.shape,o.dtype) if isinstance(o, Tensor) else cls
    theirs,ours = [trained_learner(case, jit, tmp_path).opt.state_dict() for jit in (False,True)]
    assert form(ours) == form(theirs, plain)

@many
def test_no_alias(case, tmp_path):
    "The caller's dict neither changes nor is changed with; the same dict serves twice"
    a = trained_learner(case, True, tmp_path)
    sd = a.opt.state_dict()
    was = copy.deepcopy(sd)
    for _ in range(2):
        b = make_learn(case, True, tmp_path)
        b.create_opt()
        b.opt.load_state_dict(sd)
        assert same(b.opt.state_dict(), was)
        b.fit_one_cycle(1, 0.1)
        assert same(sd, was) and not same(b.opt.state_dict(), was)
    b.opt.state['a state of its own'] = {}
    assert same(a.opt.state_dict(), was)
    assert b.opt.state['some new parameter'] == {}

def first(st): return next(k for k,v in st.items() if isinstance(v, Tensor))
def swap(o, k, v): o[k]; o[k] = v  # only in the place of something

# What is done to a state dict that fits, and what the error has to say
MISFITS = {
    'no state':         (lambda sd: sd.pop('state'),                       r"no `state`"),
    'no hypers':        (lambda sd: sd.pop('hypers'),                      r"no `hypers`"),
    'fewer groups':     (lambda sd: sd['hypers'].pop(),                    r"1 parameter groups, .* 2"),
    'more groups':      (lambda sd: sd['hypers'].append({}),               r"3 parameter groups, .* 2"),
    'fewer parameters': (lambda sd: sd['state'].pop(),                     r"4 parameters, .* 5"),
    'more parameters':  (lambda sd: sd['state'].append({}),                r"6 parameters, .* 5"),
    'no lr':            (lambda sd: sd['hypers'][1].pop('lr'),             r"group 1 .*lr"),
    'lr a word':        (lambda sd: swap(sd['hypers'][1], 'lr', 'high'),    r"lr.* group 1 .*'high'"),
    'group no dict':    (lambda sd: swap(sd['hypers'], 1, None),            r"group 1 .*None"),
    'state no dict':    (lambda sd: swap(sd['state'], 4, None),             r"parameter 1 of group 1 .*None"),
    'other order':      (lambda sd: sd['state'].reverse(),                 r"parameter 0 of group 0 .*shape"),
    'other shape':      (lambda sd: swap(st:=sd['state'][3], k:=first(st), st[k][:2]),
                         r"parameter 0 of group 1 .*shape"),
    'other dtype':      (lambda sd: swap(st:=sd['state'][3], k:=first(st), st[k].float()),
                         r"parameter 0 of group 1 .*dtype"),
    'no tensor':        (lambda sd: swap(st:=sd['state'][4], first(st), 0.5),
                         r"parameter 1 of group 1 .*float"),
    'cannot be copied': (lambda sd: swap(st:=sd['state'][4], k:=first(st), st[k].to('meta')),
                         r"parameter 1 of group 1 .*meta"),
    'lost state':       (lambda sd: sd['state'][3].pop('sqr_avg'),         r"parameter 0 of group 1 .*sqr_avg"),
    'lost step':        (lambda sd: sd['state'][3].pop('step'),            r"parameter 0 of group 1 .*step"),
    'step a word':      (lambda sd: swap(sd['state'][3], 'step', 'seven'),  r"parameter 0 of group 1 .*'seven'"),
    'step a fraction':  (lambda sd: swap(sd['state'][3], 'step', 2.5),      r"parameter 0 of group 1 .*2.5"),
    'step negative':    (lambda sd: swap(sd['state'][3], 'step', -3),       r"parameter 0 of group 1 .*-3"),
    'no count':         (lambda sd: sd.pop('count'),                       r"no `count`"),
    'count a word':     (lambda sd: swap(sd, 'count', 'six'),               r"count.*'six'"),
    'no slow weights':  (lambda sd: sd.pop('slow_weights'),                r"no `slow_weights`"),
    'slow groups':      (lambda sd: sd['slow_weights'].pop(),              r"slow_weights` .*\[3\].* \[3, 2\]"),
    'slow parameters':  (lambda sd: sd['slow_weights'][1].pop(),           r"slow_weights` .*\[3, 1\].* \[3, 2\]"),
    'slow shape':       (lambda sd: swap(sd['slow_weights'][1], 0, torch.zeros(2).double()),
                         r"slow_weights.* parameter 0 of group 1 .*shape"),
    'slow no tensor':   (lambda sd: swap(sd['slow_weights'][1], 0, None),
                         r"slow_weights.* parameter 0 of group 1 .*NoneType"),
    'slow not copied':  (lambda sd: swap(pg:=sd['slow_weights'][1], 1, pg[1].to('meta')),
                         r"slow_weights.* parameter 1 of group 1 .*meta"),
}

def misfits(case, sd):
    "The rows of the table that are about something this optimizer has"
    for name,(spoil,msg) in MISFITS.items():
        bad = copy.deepcopy(sd)
        try: spoil(bad)
        except KeyError: continue
        yield name,bad,msg

@many
def test_misfit(case, tmp_path):
    "A state that does not fit: an error that says what, and nothing has changed"
    learn,twin = [trained_learner(case, True, tmp_path) for _ in range(2)]
    was,seen = snapshot(learn.opt),[]
    for name,bad,msg in misfits(case, learn.opt.state_dict()):
        with pytest.raises(ValueError, match=msg): learn.opt.load_state_dict(bad); print('loaded:', name)
        assert same(snapshot(learn.opt), was), name
        seen.append(name)
    assert len(seen) >= 15 and (len(seen) == len(MISFITS)) == hasattr(learn.opt, 'slow_weights'), seen
    for o in (learn,twin): o.fit_one_cycle(1, 0.05)
    assert same(snapshot(learn.opt), snapshot(twin.opt))

@pytest.mark.parametrize('case', slow_but(MANY[::5], MANY), ids=str)
def test_misfit_in_learner(case, tmp_path):
    "fastai makes a warning of the error: the Learner goes on with the weights of the file and its own optimizer, whole"
    a,learn,twin = [trained_learner(case, True, tmp_path) for _ in range(3)]
    twin.model.load_state_dict(a.model.state_dict())
    state = copy.deepcopy(learn.opt.state_dict())
    for _,bad,_ in misfits(case, a.opt.state_dict()):
        torch.save({'model': a.model.state_dict(), 'opt': bad}, tmp_path/'bad.pth')
        with pytest.warns(UserWarning, match='Could not load the optimizer state'):
            learn.load(tmp_path/'bad', with_opt=True)
        assert same(learn.opt.state_dict(), state)
    for o in (learn,twin): o.fit_one_cycle(1, 0.05)
    assert same(snapshot(learn.opt), snapshot(twin.opt))

def test_other_optimizer(tmp_path):
    "What another optimizer saved is refused where something is missing"
    sds = [trained_learner(c, True, tmp_path).opt.state_dict() for c in MANY]
    for c,own in zip(MANY, sds):
        learn = trained_learner(c, True, tmp_path)
        was = snapshot(learn.opt)
        for sd in sds:
            try: learn.opt.load_state_dict(sd)
            except ValueError as e:
                assert 'does not fit' in str(e) and same(snapshot(learn.opt), was)
                continue
            learn.opt.step()  # what is let in can be trained with
            learn.opt.load_state_dict(own)
            was = snapshot(learn.opt)

# --- State dicts that do not fit an optimizer by itself

def drop(*path):
    "Take away what is at `path`"
    def f(sd):
        for k in path[:-1]: sd = sd[k]
        del (sd if isinstance(sd, dict) else sd.items if hasattr(sd, 'items') else sd)[path[-1]]
    return f

def write(v, *path):
    "Put `v` at `path`"
    def f(sd):
        for k in path[:-1]: sd = sd[k]
        sd[path[-1]] = v
    return f

LAST = 'parameter 1 of group 1'
SDS = dict(
    no_state   = (drop('state'),                                        ['no `state`']),
    no_hypers  = (drop('hypers'),                                       ['no `hypers`']),
    groups     = (drop('hypers',1),                                     ['1 parameter groups', 'has 2']),
    counts     = (drop('state',3),                                      ['3 parameters', 'has 4']),
    hyper_key  = (drop('hypers',1,'lr'),                                ['group 1', 'lack lr']),
    shape      = (write(torch.ones(3), 'state',3,'grad_avg'),           [LAST, 'grad_avg', '[3]', '[4]']),
    dtype      = (write(torch.ones(4).double(), 'state',3,'grad_avg'),  [LAST, 'grad_avg', 'torch.float64']),
    type       = (write('x', 'state',3,'grad_avg'),                     [LAST, 'grad_avg', 'str']),
    state_key  = (drop('state',3,'sqr_avg'),                            [LAST, 'no sqr_avg']),
    step_key   = (drop('state',3,'step'),                               [LAST, 'no step']),
    count      = (drop('count'),                                        ['no `count`']),
    slow       = (drop('slow_weights'),                                 ['no `slow_weights`']),
    slow_group = (drop('slow_weights',1),                               ['[2]', '[2, 2]']),
    slow_shape = (write(torch.ones(3), 'slow_weights',1,1),             [LAST, 'slow_weights', '[3]', '[4]']),
)

def has(case, what):
    "Is there that in the state of `case`?"
    if what.startswith('slow') or what == 'count': return case.jit is ranger_jit
    return case.takes({'state_key':'sqr_avg', 'step_key':'step'}.get(what, 'params'))

@pytest.mark.parametrize('case,what', [(c,w) for w in SDS for c in ALL if has(c, w)], ids=str)
def test_state_dict(case, what):
    "A state dict that does not fit is refused as a whole; the optimizer and the caller's dict stay as they were"
    harm,parts = SDS[what]
    opt,ref = twins(case, 3)
    source,_ = twins(case, 8)
    sd = copy.deepcopy(source.state_dict())
    harm(sd)
    before,given = snapshot(opt),copy.deepcopy(sd)
    with pytest.raises(ValueError) as e: opt.load_state_dict(sd)
    for o in ('left as it was',*parts): assert o in str(e.value)
    assert same(snapshot(opt), before)
    assert sd.keys() == given.keys()
    train([opt,ref], range(5, 9))
    assert same(snapshot(opt), snapshot(ref))

def test_learner_says_why_it_did_not_load(tmp_path):
    "fastai's `load` warns that it could not, and keeps the error to itself: our warning comes before it"
    a,b = vision(adam_jit, tmp_path),vision(adam_jit, tmp_path)
    b.splitter = trainable_params
    for learn in (a,b): learn.fit(1)
    a.save('a')
    before = snapshot(b.opt)
    with pytest.warns(UserWarning) as seen: b.load('a')
    said = [str(w.message) for w in seen if 'numpy' not in str(w.message)]
    assert len(said) == 2 and 'Could not load' in said[1]
    assert 'does not fit the optimizer' in said[0] and '3 parameter groups' in said[0]
    assert same(snapshot(b.opt)['state'], before['state'])
    with warnings.catch_warnings():  # who asks the optimizer gets the error alone
        warnings.simplefilter('error')
        with pytest.raises(ValueError, match='3 parameter groups'): b.opt.load_state_dict(a.opt.state_dict())

@every
def test_load_what_is_no_state_dict(case):
    opt = trained(case, 1)
    before = snapshot(opt)
    for sd in (None,'x.pth',3,[{}]):
        with pytest.raises(TypeError, match='takes a dict, as `opt.state_dict'): opt.load_state_dict(sd)
    for sd in (dict(state=None, hypers=None), dict(state={}, hypers=[{}])):
        with pytest.raises(ValueError, match='has to be a list'): opt.load_state_dict(sd)
    if case.jit is ranger_jit:
        for slow in (5,[5],[None,None],torch.ones(3)):
            sd = {**opt.state_dict(), 'slow_weights':slow}
            with pytest.raises(ValueError, match='`slow_weights` have to be lists'): opt.load_state_dict(sd)
    sd = {**opt.state_dict(), 'hypers':[{1:2, 'a':3}]*2}
    with pytest.raises(ValueError, match='lack'): opt.load_state_dict(sd)
    assert same(snapshot(opt), before)

# --- Killed and resumed

class Resumable(Callback):
    "Make each epoch the same whatever came before, and keep a checkpoint of it that is there in full or not at all"
    def __init__(self, kill_at): self.kill_at = kill_at
    def before_epoch(self):
        set_seed(self.epoch)             # dropout
        self.dls.train.rng.seed(self.epoch)  # shuffling
    def after_batch(self):
        if self.training and self.kill_at == (self.epoch,self.iter): os.kill(os.getpid(), signal.SIGKILL)
    def after_epoch(self):
        f = self.learn.save('unfinished', with_opt=True)
        if self.kill_at == (self.epoch,'save'):
            f.write_bytes(f.read_bytes()[:1000])
            os.kill(os.getpid(), signal.SIGKILL)
        os.replace(f, f.with_name(f'epoch_{self.epoch}.pth'))

def train_on(case, path, kill_at=None):
    "Train four epochs, from the last checkpoint if there is one; be killed on the way if asked"
    learn = make_learn(case, True, path, 0.2, True)
    done = len([*path.glob('models/epoch_*')])
    if done: learn.load(f'epoch_{done-1}', with_opt=True)
    learn.fit_one_cycle(4, slice(0.01,0.02), start_epoch=done, cbs=Resumable(kill_at))
    torch.save([snapshot(learn.opt),learn.model.state_dict()], path/'end.pth')

def in_process(*args):
    "Exit code of a process that trains; forked, as to import everything again takes longer than to train"
    if pid := os.fork(): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try: train_on(*args); code = 0
    except: traceback.print_exc()
    finally: os._exit(code)

def kill_and_resume(path):
    "Run as a program: train with each, undisturbed and killed twice, and print how the processes ended"
    res = {}
    for i,c in enumerate(MANY):
        calm,killed = path/f'{i}_calm',path/f'{i}_killed'
        res[str(c)] = [in_process(c, calm), *[in_process(c, killed, at) for at in ((1,2),(2,'save'),None)]]
    print(json.dumps(res))

@pytest.fixture(scope='module')
def ends(tmp_path_factory):
    path = tmp_path_factory.mktemp('resume')
    cmd = [sys.executable,'-W','ignore','-m','tests.test_checkpoint',path]
    out = subprocess.run(cmd, capture_output=True, text=True, env={**os.environ,'OMP_NUM_THREADS':'1'})
    assert out.returncode == 0 and out.stdout, out.stderr
    return path,json.loads(out.stdout),out.stderr

@many
@pytest.mark.slow
def test_kill_and_resume(case, ends):
    "Killed in an epoch, and again while a checkpoint is written: the end is bit-equal to that of an undisturbed run"
    path,codes,err = ends
    assert codes[str(case)] == [0,-signal.SIGKILL,-signal.SIGKILL,0], err
    i = MANY.index(case)
    assert same(*[torch.load(path/f'{i}_{n}'/'end.pth', weights_only=False) for n in ('calm','killed')])

if __name__ == '__main__': kill_and_resume(Path(sys.argv[1]))
