"`use_jit`, the package's root, and what is saved where fastxtend_jit is not installed"
import ast,asyncio,copy,inspect,json,pickle,subprocess,sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from functools import partial
from pathlib import Path
from threading import Barrier,Event,Thread

import pytest
import torch
from torch import nn

import fastxtend_jit
from tests.learners import adam_of_ones_own,quiet,tabular,tensor_dls,vision
from tests.cases import *
from tests.support import eight
from fastai.callback.core import Callback
from fastai.imports import noop
from fastai.learner import Learner
from fastai.optimizer import Lookahead,Optimizer,OptimWrapper,sgd_step
from fastai.torch_core import set_seed
from fastxtend_jit import all as everything,use_jit
from fastxtend_jit.learner import jit_opt

def made(opt_func): return quiet(Learner(tensor_dls(), nn.Linear(4, 2), loss_func=noop, opt_func=opt_func))

def is_ours(opt_func=Adam):
    "Does a new Learner step with ours?"
    learn = made(opt_func)
    learn.fit(0)
    return isinstance(learn.opt, JitOptimizer)

@pytest.fixture(autouse=True)
def off():
    "No test leaves it on"
    assert not is_ours()
    yield
    use_jit(False)

# --- what is converted

@eight
def test_learner_trains_the_same(case, tmp_path):
    "Under one line a Learner ends where it ends without; its `opt_func` is untouched"
    ends = []
    for on in (False,True):
        set_seed(0)
        opt_func = partial(case.native, **case.kw)
        learn = vision(opt_func, tmp_path)
        with use_jit(on) as used:
            learn.freeze()
            learn.fit_one_cycle(1, 1e-2)
            learn.unfreeze()
            learn.fit_one_cycle(1, slice(1e-3,1e-2))
        assert isinstance(learn.opt, JitOptimizer) == on and learn.opt_func is opt_func
        assert used.seen == ({(case.native.__name__,case.jit.__name__):1} if on else {})
        ends.append(learn.model)
    for (n,p),q in zip(ends[0].state_dict().items(), ends[1].state_dict().values()): close(q, p, 1e-9, n)

def test_state_and_hypers_go_along(tmp_path):
    "What `create_opt` writes, and a Learner's own settings, are as without"
    opts = []
    for on in (True,False):
        learn = vision(partial(Adam, eps=1e-7, mom=.8), tmp_path)
        with use_jit(on):
            learn.freeze()
            learn.fit(0)
        opts.append(learn.opt)
    ours,native = opts
    assert isinstance(ours, JitOptimizer) and ours.frozen_idx == native.frozen_idx == 2
    assert [*map(dict, ours.hypers)] == [*map(dict, native.hypers)] and ours.hypers[0]['eps'] == 1e-7
    states = [[st for *_,st,_ in opt.all_params()] for opt in opts]
    assert states[0] == states[1] and states[0].count(dict(do_wd=False, force_train=True)) == 4

def test_made_before_is_converted_when_fitted(tmp_path):
    learn = vision(Adam, tmp_path)
    learn.fit(1)
    assert type(learn.opt) is Optimizer
    with use_jit(): learn.fit(1)
    assert isinstance(learn.opt, JitOptimizer) and {st['step'] for *_,st,_ in learn.opt.all_params()} == {8}
    learn.fit(1)
    assert isinstance(learn.opt, JitOptimizer)  # it goes on with what it has, until the next `create_opt`
    learn.create_opt()
    assert type(learn.opt) is Optimizer

def wrapped_torch(ps, **kw): return OptimWrapper(ps, torch.optim.AdamW, **kw)
def no_steps(ps, **kw): return Optimizer(ps, [noop], **kw)
def ahead(ps, **kw): return Lookahead(SGD(ps, mom=.9, **kw))

@pytest.mark.parametrize('opt_func,name,became', [
    (ahead, 'ahead', 'JitLookahead(sgd_jit)'),
    (partial(ranger, k=3), 'ranger', 'ranger_jit'),
    (wrapped_torch, 'wrapped_torch', 'stays: The live optimizer, a `OptimWrapper`, has no counterpart'),
    (no_steps, 'no_steps', 'stays: The live optimizer, a `Optimizer` of noop, has no counterpart')])
def test_seen(opt_func, name, became):
    with use_jit() as used:
        learn = made(opt_func)
        learn.fit(0)
        opt = learn.opt
        learn.fit(0)
    assert learn.opt is opt and isinstance(opt, JitOptimizer) == ('stays' not in became)
    ((what,res),n), = used.seen.items()
    assert what == name and res.startswith(became) and n == 1  # once, although it was met twice
    assert f'1 x {name} -> {became}' in repr(used)

def test_ours_stays(tmp_path):
    with use_jit() as used:
        for f in (lion_jit,adam_jit,partial(Adam, eps=1e-3)):
            learn = vision(f, tmp_path)
            learn.fit(1)
            assert isinstance(learn.opt, JitOptimizer)
    assert used.seen == {('Adam','adam_jit'):1}

class TwoViews(nn.Module):
    def __init__(self):
        super().__init__()
        whole = torch.ones(4, 2)
        self.a,self.b = nn.Parameter(whole[:3]),nn.Parameter(whole[1:])
    def forward(self, x): return x@self.a[:1].T + x@self.b[:1].T

class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(4, 2, sparse=True)
    def forward(self, x): return self.emb(x.long()).sum((1,2))

class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    def forward(self, x): return (x*self.w).sum(1).abs()

@pytest.mark.parametrize('model,why', [(TwoViews,'shares its memory'), (Sparse,'`emb` is sparse'),
                                       (Complex,'is complex')])
def test_what_ours_refuse_stays(model, why):
    "It trains on, as without"
    dls = tensor_dls(torch.ones(16, 2), torch.ones(16), n_valid=8)
    learn = quiet(Learner(dls, model(), lambda pred,y: (pred.squeeze()-y).pow(2).mean(), SGD))
    with use_jit() as used: learn.fit(1)
    assert type(learn.opt) is Optimizer and why in repr(used)

def test_native_on_purpose_stays(tmp_path):
    "In a copy, too"
    learn = vision(Adam, tmp_path)
    with use_jit():
        learn.to_native()
        for o in (copy.deepcopy(learn),learn):
            o.fit(1)
            assert type(o.opt) is Optimizer
        learn.to_jit()
        for o in (copy.deepcopy(learn),learn):
            o.fit(1)
            assert isinstance(o.opt, JitOptimizer)

# Ways to change an optimizer of fastai's: before training, or as it starts
def halve(p, **kwargs): p.data.mul_(0.5)

class HalvesAfterwards(Learner):
    def create_opt(self):
        super().create_opt()
        self.opt.cbs.append(halve)

class HalvesAtFit(Callback):
    def before_fit(self): self.learn.opt.cbs = self.opt.cbs+[halve]

def has_own_step(learn):
    learn.create_opt()
    step = learn.opt.step
    def counted(*args): learn.steps += 1; step(*args)
    learn.steps,learn.opt.step = 0,counted

def has_a_note(learn):
    learn.create_opt()
    learn.opt.note = 'mine'

def looks_ahead_and_has_a_note(learn):
    learn.create_opt()
    learn.opt = Lookahead(learn.opt)
    learn.opt.opt.note = 'mine'

class Eq(Optimizer):
    "A class of somebody's that cannot be hashed"
    def __eq__(self, other): return self is other

def linear(opt_func=Adam, cls=Learner, cbs=None):
    "A Learner of a line, the same each time"
    set_seed(0)
    x = torch.randn(24, 4)
    dls = tensor_dls(x, x.sum(1, keepdim=True))
    return quiet(cls(dls, nn.Linear(4, 1), nn.functional.mse_loss, opt_func=opt_func, cbs=cbs))

def changed(how):
    "A Learner whose optimizer `how` changes, or will change"
    if how is HalvesAfterwards: return linear(cls=how)
    if how is HalvesAtFit: return linear(cbs=how())
    if how is Eq: return linear(lambda ps,**kw: Eq(ps, [sgd_step], **kw))
    learn = linear()
    how(learn)
    return learn

@pytest.mark.parametrize('how,why', [
    (HalvesAfterwards,'halve, has no counterpart'), (HalvesAtFit,'halve, has no counterpart'),
    (has_own_step,'`step` of somebody'), (has_a_note,'`note` of somebody'),
    (looks_ahead_and_has_a_note,'`note` of somebody'), (Eq,'a `Eq` of sgd_step')])
def test_what_somebody_changed_stays(how, why):
    "It trains as without, and `used` says why"
    def trained(on):
        learn = changed(how)
        with use_jit(on) as used: learn.fit(2)
        assert not isinstance(learn.opt, JitOptimizer) and (on == (why in repr(used))) and len(used.seen) == on
        return [*learn.model.parameters()],vars(learn).get('steps')
    (a,n),(b,m) = trained(False),trained(True)
    assert all(map(torch.equal, a, b)) and n == m and n in (None,4)

class Slots:
    "An optimizer without weak references, a dictionary or anything that ours need"
    __slots__ = 'params','hypers'
    def __init__(self, params, **kw): self.params,self.hypers = [p for pg in params for p in pg],[kw]
    def set_hypers(self, **kw): pass
    def step(self): pass
    zero_grad = step
    state = {}

def test_stranger_stays():
    learn = linear(lambda ps,lr: Slots(ps, lr=lr))
    learn.wd_bn_bias,learn.train_bn = True,False
    with use_jit() as used: learn.fit(1)
    assert type(learn.opt) is Slots and 'a `Slots`, has no counterpart' in repr(used)

def test_create_opt_of_ones_own():
    "The first fit steps with ours, whatever made the optimizer"
    class Own(Learner):
        def create_opt(self): self.opt = self.opt_func(self.splitter(self.model), lr=self.lr)
    with use_jit() as used: (learn := linear(cls=Own)).fit(1)
    assert isinstance(learn.opt, JitOptimizer) and used.seen == {('Adam','adam_jit'):1}

@pytest.mark.parametrize('opt_func', [Adam, ranger], ids=['adam','ranger'])
def test_learners_that_share_one(opt_func):
    "Two Learners with one optimizer still have one, in a block and after it"
    def trained(on):
        a = linear(opt_func)
        a.create_opt()
        b = Learner(a.dls, a.model, a.loss_func, opt_func=opt_func)
        b.opt = a.opt
        with use_jit(on) as used:
            a.fit(1, 0.1); quiet(b).fit(1, 0.1); a.fit(1, 0.1)
        b.fit(1, 0.1)
        assert a.opt is b.opt and isinstance(a.opt, JitOptimizer) == on and len(used.seen) == on
        return a.model.parameters()
    for p,q in zip(trained(True), trained(False)): close(p, q, 1e-5)

@pytest.mark.parametrize('opt_func', [Adam, ranger], ids=['adam','ranger'])
def test_held_optimizer_is_heard(opt_func):
    "Who holds fastai's optimizer reads and sets hypers and state of ours"
    class Holds(Callback):
        def __init__(self, opt): self.held = opt
        def before_batch(self):
            self.held.set_hyper('lr', 0.1*self.held.hypers[0]['lr'])
            if self.iter == 1 and self.training: self.held.clear_state()
    def trained(on):
        learn = linear(opt_func)
        learn.create_opt()
        learn.add_cb(Holds(learn.opt))
        with use_jit(on): learn.fit(1, 1.)
        assert isinstance(learn.opt, JitOptimizer) == on
        assert learn.opt.hypers[0]['lr'] == pytest.approx(1e-3)
        return learn.model.parameters()
    for p,q in zip(trained(True), trained(False)): close(p, q, 1e-5)

def test_callbacks_of_ours():
    "There are none: reading gives an empty sequence; all that adds one says what to do"
    with use_jit(): (learn := linear()).fit(1)
    opt = learn.opt
    def put(cbs): opt.cbs = cbs
    for write in (lambda: opt.cbs.append(halve), lambda: opt.cbs.insert(0, halve), lambda: opt.cbs.extend([halve]),
                  lambda: put([halve]), lambda: put(opt.cbs+[halve]), lambda: put([*opt.cbs, halve]),
                  lambda: put(halve)):
        with pytest.raises(TypeError, match='no callbacks.*step of your own.*`learn.to_native'): write()
    assert len(opt.cbs) == 0 and [*opt.cbs] == []
    opt.cbs = []
    for o in (copy.deepcopy(opt),pickle.loads(pickle.dumps(opt))): assert len(o.cbs) == 0
    learn.to_native().opt.cbs.append(halve)

def test_compare_opt_compares(tmp_path):
    with use_jit(): res = vision(Adam, tmp_path).compare_opt(steps=2, show=False)
    assert [*res.columns[:2]] == ['Adam','adam_jit']

# --- on and off

def test_nests_and_the_newest_decides():
    with use_jit():
        assert is_ours()
        with use_jit(False):
            assert not is_ours()
            with use_jit(): assert is_ours()
            assert not is_ours()
        assert is_ours()
    assert not is_ours()

def test_calls_and_blocks():
    "A call holds until the next, also if it stands in a block; a block takes back itself alone"
    use_jit(); use_jit()
    assert is_ours()
    use_jit(False)
    assert not is_ours()
    with use_jit(False):
        use_jit()
        assert is_ours()
    assert is_ours()
    with use_jit(False): pass
    assert is_ours()

def test_many_calls_leave_nothing():
    from fastxtend_jit import use
    for i in range(50): use_jit(i%2 == 0)
    with use_jit():
        for i in range(50): use_jit(i%2 == 0)
        assert len(use._inside.get()) <= 3 and is_ours() == (i%2 == 0)
    assert len(use._calls) <= 2 and not use._inside.get()

def test_again_with_the_same_object():
    "Kept, entered again and in itself; it is newest where it is entered"
    used = use_jit()
    with use_jit(False), used, used: assert is_ours()
    assert not is_ours()
    with used: assert is_ours()
    assert not is_ours()

@pytest.mark.parametrize('bad', [Adam, None, 1, 'adam'])
def test_takes_true_or_false(bad):
    "Without parentheses before a function, or with a Learner or a factory, it would be on for good"
    with pytest.raises(TypeError, match=r'`use_jit` takes True or False.*learn.to_jit'): use_jit(bad)
    assert not is_ours()

def test_as_a_decorator():
    "The function runs in a block, each time, with its name; nothing is on before or after"
    @use_jit()
    def trains(n, bad=False):
        "Trains"
        return n/(not bad) if is_ours() else None
    assert not is_ours()
    assert trains(1) == 1. and trains.__doc__ == 'Trains' and not is_ours()
    with use_jit(False): assert trains(2) == 2. and not is_ours()
    with pytest.raises(ZeroDivisionError): trains(1, bad=True)
    assert not is_ours()

def generates(): yield
async def coroutine(): pass
async def generates_async(): yield
@pytest.mark.parametrize('bad', [generates, coroutine, generates_async, Learner, None])
def test_decorates_functions_only(bad):
    "What runs later would do so outside of the block"
    with pytest.raises(TypeError, match=r'`with use_jit\(\):` inside'): use_jit()(bad)
    assert not is_ours()

def test_off_after_an_error():
    with pytest.raises(ZeroDivisionError), use_jit(): 1/0
    assert not is_ours()

def test_any_order_of_exits():
    "Blocks of two threads need not end in the order of their starts"
    a,b = ExitStack(),ExitStack()
    a.enter_context(use_jit()); b.enter_context(use_jit())
    a.close()
    assert is_ours()
    b.close()
    assert not is_ours()

def test_threads():
    "Eight threads go in and out, and train; each block counts for its own thread, and sees its own Learners alone"
    res,barrier = [],Barrier(8)
    def work():
        barrier.wait()
        for i in range(20):
            with use_jit(on := i%3 > 0) as used:
                res.append(is_ours() == on and used.seen == ({('Adam','adam_jit'):1} if on else {}))
    threads = [Thread(target=work) for _ in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert res == [True]*160 and not is_ours()

@pytest.mark.parametrize('inner', [True,False])
def test_blocks_of_threads_do_not_undo_each_other(inner):
    "Whichever is newer, and while both are open"
    entered,left,res = Event(),Event(),[]
    def other():
        with use_jit(inner):
            entered.set()
            left.wait()
            res.append(is_ours())
    t = Thread(target=other)
    with use_jit(not inner):
        t.start(); entered.wait()
        res.append(is_ours())
    left.set(); t.join()
    assert res == [not inner, inner]

def test_in_other_threads():
    "A call holds in all threads, a block in those that go on in its context"
    def in_thread(f): return ThreadPoolExecutor(1).submit(f).result()
    use_jit()
    assert in_thread(is_ours)
    use_jit(False)
    with use_jit(): assert in_thread(partial(copy_context().run, is_ours))
    def called(): use_jit(); return is_ours()
    with use_jit(False):
        assert in_thread(called) and not is_ours()  # its own block
    assert is_ours()

def test_tasks():
    "Blocks of asyncio's tasks do not undo each other"
    async def task(on):
        with use_jit(on):
            await asyncio.sleep(0)
            return is_ours()
    async def both(): return await asyncio.gather(task(True), task(False), task(True))
    assert asyncio.run(both()) == [True,False,True]

def test_not_undone_by_import_star():
    scope = {}
    with use_jit():
        exec('from fastai.tabular.all import *; from fastxtend_jit.all import *', scope)
        assert is_ours(scope['Adam']) and scope['Learner'] is Learner

def test_learner_keeps_its_signatures():
    use_jit()
    assert [*inspect.signature(Learner.fit).parameters][:3] == ['self','n_epoch','lr']
    assert [*inspect.signature(Learner.export).parameters][:2] == ['self','fname']

def test_after_somebody_else_patched(monkeypatch):
    "Whoever replaces a method is wrapped by the next call"
    use_jit(); use_jit(False)
    def create_opt(self): self.opt = self.opt_func(self.splitter(self.model), lr=self.lr)
    monkeypatch.setattr(Learner, 'create_opt', create_opt)
    monkeypatch.setattr(Learner, '_do_fit', lambda self: None)
    with use_jit(): assert is_ours()

def test_callback_called_ToJit(tmp_path):
    class ToJit(Callback): "Somebody's"
    learn = vision(Adam, tmp_path).add_cb(ToJit())
    assert Learner.to_jit(learn).opt_func is adam_jit
    with use_jit(): learn.fit(1)
    assert isinstance(learn.opt, JitOptimizer)

# --- where nobody has heard of us

REFUSE = '''
import sys,warnings
class Refuse:
    def find_spec(self, name, *args):
        if name.split('.')[0] == 'fastxtend_jit': raise ModuleNotFoundError(f'No module named {name!r}')
sys.meta_path.insert(0, Refuse())
warnings.simplefilter('ignore')
'''

WITHOUT_US = REFUSE+'''
from pathlib import Path
import torch,tests.learners
from fastai.learner import load_learner
for d in map(Path, sys.argv[1:]):
    torch.load(d/'learn.pkl', weights_only=False)  # `load_learner` hides an ImportError
    learn = load_learner(d/'learn.pkl')
    torch.save(learn.model(*torch.load(d/'x.pth')), d/'pred.pth')
    learn.create_opt()
    print(getattr(learn.opt_func, 'func', learn.opt_func).__name__, type(learn.opt).__name__)
assert not [m for m in sys.modules if m.startswith('fastxtend_jit')]
'''

def without_us(*dirs):
    "Lines that a process prints that cannot import fastxtend_jit, and loads what was exported to `dirs`"
    res = subprocess.run([sys.executable, '-c', WITHOUT_US, *dirs], capture_output=True, text=True)
    assert not res.returncode, res.stderr
    return res.stdout.splitlines()

@pytest.mark.slow
def test_export_needs_no_fastxtend_jit(tmp_path):
    "Whatever way ours came in, the file does without; predictions are the same; the Learner keeps its own, and goes on"
    own,want = partial(adam_of_ones_own, eps=1e-7),{}
    def check(how, opt_func, says):
        d = tmp_path/how
        d.mkdir()
        learn = tabular(opt_func, d)
        if how == 'to_jit': learn.to_jit()
        learn.fit(1, 0.02)
        opt_func,opt = learn.opt_func,learn.opt
        x = [t.double() if t.is_floating_point() else t for t in learn.dls.one_batch()[:2]]
        torch.save(x, d/'x.pth')
        learn.model.eval()
        want[d] = learn.model(*x),says
        learn.export('learn.pkl')
        assert learn.opt_func is opt_func and learn.opt is opt and isinstance(opt, JitOptimizer)
        learn.fit(1, 0.02)
    with use_jit(): check('use_jit', Adam, 'Adam Optimizer')
    check('opt_func', adam_jit, 'Adam Optimizer')
    check('partial', partial(ranger_jit, k=3), 'ranger Lookahead')
    check('to_jit', partial(SGD, mom=0.9), 'SGD Optimizer')
    check('own', jit_opt(own), 'adam_of_ones_own Optimizer')
    assert without_us(*want) == [says for _,says in want.values()]
    for d,(pred,_) in want.items(): assert torch.equal(torch.load(d/'pred.pth'), pred)

@pytest.mark.parametrize('opt_func', [lion_jit, partial(lion_jit, wd=.1), Adam, partial(SGD, mom=.9)],
                         ids=['lion','partial','native','native partial'])
def test_export_of_others(opt_func, tmp_path):
    "What has no counterpart is written as it is, and fastai's own too"
    from fastai.basics import load_learner
    learn = tabular(opt_func, tmp_path)
    learn.export('learn.pkl')
    loaded = load_learner(tmp_path/'learn.pkl').opt_func
    assert getattr(loaded, 'func', loaded) is getattr(opt_func, 'func', opt_func) and learn.opt_func is opt_func

def test_export_that_fails(tmp_path):
    learn = tabular(adam_jit, tmp_path)
    with pytest.raises(Exception): learn.export('no/such/folder.pkl')
    assert learn.opt_func is adam_jit

# --- the root

def test_root_is_all():
    "All public names stand in one list, from which both take them"
    for name in fastxtend_jit.__all__: assert getattr(fastxtend_jit, name) is getattr(everything, name)
    assert {*fastxtend_jit.__all__} == {n for n in vars(everything) if not n.startswith('_')}
    assert {*fastxtend_jit.__all__} <= {*dir(fastxtend_jit)} and everything.__all__ is fastxtend_jit.__all__

def test_type_checkers_see_the_root():
    "What they read in place of `__getattr__` are all public names, from the modules that have them, and nothing else"
    source = ast.parse(Path(fastxtend_jit.__file__).read_text())
    at = next(o for o in source.body if isinstance(o, ast.If) and o.test.id == 'TYPE_CHECKING')
    assert all(o.level == 1 and all(n.asname == n.name for n in o.names) for o in at.body)
    assert {o.module:' '.join(n.name for n in o.names) for o in at.body} == fastxtend_jit._modules
    assert [f.name for f in at.orelse] == ['__getattr__'] and '__getattr__' in vars(fastxtend_jit)
    assert (Path(fastxtend_jit.__file__).parent/'py.typed').exists()

ROOT = '''
import sys,json,fastxtend_jit
before = [m for m in ('torch','fastai','fastai.learner') if m in sys.modules]
import fastai.optimizer
had = {*vars(fastai.optimizer.Optimizer)}
from fastxtend_jit import adam_jit,JitOptimizer
from fastxtend_jit.optimizer import adam_jit as same
assert same is adam_jit
without = [m for m in ('fastai.learner','fastxtend_jit.learner') if m in sys.modules]
import fastai.learner
state = {n:id(f) for n,f in vars(fastai.learner.Learner).items()}
from fastxtend_jit import lion_jit,sgd_jit_step
same_learner = state == {n:id(f) for n,f in vars(fastai.learner.Learner).items()}
from fastxtend_jit import use_jit
print(json.dumps([before, without, same_learner, hasattr(fastai.learner.Learner, 'to_jit')]))
'''

def test_root_is_lazy():
    "It imports nothing; a factory imports no Learner, and changes none; `use_jit` does"
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', ROOT], capture_output=True, text=True)
    assert not res.returncode, res.stderr
    assert json.loads(res.stdout) == [[], [], True, True]

@pytest.mark.parametrize('module', ['fastxtend_jit','fastxtend_jit.optimizer'])
def test_no_such_name(module):
    with pytest.raises(ImportError, match='adamm_jit'): exec(f'from {module} import adamm_jit')
    assert not hasattr(sys.modules[module], 'adamm_jit')

@pytest.mark.parametrize('bad', [torch.optim.Adam, partial(OptimWrapper, opt=torch.optim.Adam), 'Adam', None])
def test_jit_opt_not_strict(bad):
    assert jit_opt(bad, strict=False) is bad
    assert jit_opt(Adam, strict=False) is adam_jit
    f = partial(Adam, eps=1e-7)
    assert jit_opt(f, strict=False).func is adam_jit and pickle.loads(pickle.dumps(jit_opt(f))).keywords == f.keywords
