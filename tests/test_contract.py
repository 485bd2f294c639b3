"What fastai does to an optimizer: scenarios that a Learner goes through with fastai's own and with ours, for all"
import pickle
from copy import deepcopy
from numbers import Number
from types import SimpleNamespace
from unittest import mock

import pytest
from torch import Tensor

from tests.learners import Float64,autocast_net,cross_entropy,float32_net,float64_net,gan,quiet,tabular,text,vision
from tests.cases import *
from tests.support import every
from fastai.basics import Callback,Learner,load_learner,set_seed,tensor
from fastai.callback.all import (CSVLogger,EarlyStoppingCallback,GradientAccumulation,GradientClip,ModelToHalf,
                                 NonNativeMixedPrecision,ReduceLROnPlateau,SaveModelCallback)
from fastai.vision.gan import set_freeze_model
from fastxtend_jit.calls import Calls

pytestmark = [pytest.mark.filterwarnings(f) for f in (
    'error:Could not load the optimizer state',      # what fastai makes of a failed load
    'ignore:.*insecure pickle module',               # `load_learner`, always
    'ignore:numpy.core is deprecated',               # `Learner.load`
    'ignore:You are shadowing an attribute',         # fastai's GANs
    'ignore:The given NumPy array is not writable',  # fastai's tabular data
    'ignore:grad and param do not obey')]            # what `data_replaced` is about

SCENARIOS = {}
def scenario(f=None, make=vision, **kw):
    "Add `f`, a function of the Learner that `make` makes; what it returns is compared as well"
    if f is None: return partial(scenario, make=make, **kw)
    SCENARIOS[f.__name__] = f,partial(make, **kw)

def tensors(learn):
    "Parameters and the optimizer's state"
    state = (v for *_,st,_ in learn.opt.all_params() for v in st.values() if isinstance(v, Tensor))
    return [*learn.model.parameters(), *state, *slow(learn.opt)]

def before_batch(f): return Callback(before_batch=lambda cb: f(cb.learn) if cb.training else None)

# --- Training loops and schedules

@scenario
def fit(learn):
    learn.fit(1, 0.02)
    opt = learn.opt
    learn.fit(1)
    learn.fit(1, 0.01, wd=0.1)
    assert learn.opt is opt  # `if not self.opt` made no other
    learn.fit(3, start_epoch=2)

@scenario
def reset_opt(learn):
    learn.fit(1, 0.02)
    opt,learn.opt_func = learn.opt,partial(learn.opt_func, lr=0.005)
    learn.fit(1, reset_opt=True)
    assert learn.opt is not opt and learn.opt.hypers[0]['lr'] == 0.005

@scenario
def fit_one_cycle(learn):
    learn.fit_one_cycle(2, 0.02, wd=0.1, moms=(0.9,0.8,0.9))
    learn.fit_one_cycle(1)

@scenario
def fit_flat_cos(learn): learn.fit_flat_cos(2, 0.02)
@scenario
def fit_sgdr(learn): learn.fit_sgdr(2, 1, 0.02)
@scenario
def fine_tune(learn): learn.fine_tune(1, 0.02)

@scenario
def discriminative_lrs(learn):
    learn.fit(1, slice(0.02))
    learn.fit(1, [0.01,0.02,0.005])
    learn.fit_one_cycle(1, slice(1e-3,0.02))
    assert learn.opt.hypers[0]['lr'] < learn.opt.hypers[-1]['lr']

@scenario
def freeze(learn):
    learn.freeze()
    learn.fit(1, 0.02)
    learn.freeze_to(-2)
    learn.fit(1, 0.02)
    learn.unfreeze()
    learn.fit(1, 0.02)

@scenario(train_bn=False)
def train_bn_false(learn):
    learn.freeze()
    frozen = [p.clone() for p in learn.opt.param_lists[0]]
    learn.fit(1, 0.02)
    assert all(map(torch.equal, learn.opt.param_lists[0], frozen))
    learn.unfreeze()
    learn.fit(1, 0.02)

@scenario(wd_bn_bias=True, wd=0.1)
def wd_bn_bias(learn): learn.fit_one_cycle(2, 0.02)

@scenario
def lr_find_first(learn):
    learn.create_opt()
    before = [t.clone() for t in tensors(learn)]
    lrs = learn.lr_find(end_lr=1, num_it=15, show_plot=False)
    assert all(map(torch.equal, tensors(learn), before))
    learn.fit(1, lrs.valley)
    return lrs

@scenario
def lr_find_in_the_middle(learn):
    learn.fit_one_cycle(2, 0.02)
    before = [t.clone() for t in tensors(learn)]
    lrs = learn.lr_find(end_lr=1, num_it=15, show_plot=False)
    assert len(before) == len(tensors(learn)) and all(map(torch.equal, tensors(learn), before))
    learn.fit(1, lrs.valley)
    return lrs

# --- Callbacks

@scenario
def reduce_lr_on_plateau(learn):
    learn.fit(3, 0.02, cbs=ReduceLROnPlateau(min_delta=10., patience=1))
    assert learn.opt.hypers[0]['lr'] < 0.002

@scenario
def early_stopping(learn):
    learn.fit(4, 0.02, cbs=EarlyStoppingCallback(min_delta=10., patience=1))
    assert len(learn.recorder.values) == 2
    learn.fit(1, 0.02)

@scenario
def save_model(learn):
    learn.fit(3, 0.02, cbs=[SaveModelCallback(with_opt=True), ReduceLROnPlateau(min_delta=10., patience=1)])
    loaded = [dict(h) for h in learn.opt.hypers]
    assert loaded[0]['lr'] > 1e-4  # not those of the end
    learn.fit(1, 0.02)
    return loaded

@scenario
def gradient_accumulation(learn): learn.fit(2, 0.02, cbs=GradientAccumulation(20))
@scenario
def gradient_clip(learn): learn.fit(2, 0.02, cbs=GradientClip(0.05))

@scenario
def channels_last(learn):
    learn.fit(1, 0.02)
    learn.to_channelslast(use_amp=False)
    learn.fit(1, 0.02)
    learn.to_contiguous()
    learn.fit(1, 0.02)

@scenario
def loggers(learn):
    "As those of wandb, tensorboard and comet read hypers; and a file"
    log,csv = [],CSVLogger()
    def read(cb):
        hypers = {f'{k}_{i}':v for i,h in enumerate(cb.opt.hypers) for k,v in h.items()}
        if cb.training: log.append([cb.opt.hypers[-1]['lr'], cb.opt.frozen_idx, hypers])
    learn.fit_one_cycle(2, slice(1e-3,0.02), cbs=[Callback(after_batch=read), csv])
    assert all(isinstance(v, Number) for _,_,h in log for v in h.values())
    csv.learn = learn
    return log,csv.read_log().drop(columns='time').round(5).values.tolist()

# --- Precision

def mixed_precision(learn):
    "fastai's mixed precision, which names 'cuda', on the model's own device"
    dev = next(learn.model.parameters()).device.type
    return mock.patch.multiple('fastai.callback.fp16', autocast=lambda *_,**kw: torch.autocast(dev, **kw),
                               GradScaler=lambda *_,**kw: torch.amp.GradScaler(dev, **kw))

@scenario(net=autocast_net)
def bf16(learn):
    with mixed_precision(learn): learn.to_bf16().fit_one_cycle(2, 0.02)

@scenario(net=autocast_net)
def fp16(learn):
    "The scale starts, and grows again, beyond what fp16 holds: steps are skipped"
    skipped = []
    log = Callback(after_step=lambda cb: skipped.append(cb.learn.mixed_precision.skipped))
    with mixed_precision(learn):
        learn.to_fp16(init_scale=2.**22, growth_interval=2).fit_one_cycle(4, 0.02, cbs=[log, GradientClip(0.05)])
    learn.to_fp32().fit(1, 0.02)
    assert 4 <= sum(skipped) <= 12
    return skipped

class NonNativeOnCPU(NonNativeMixedPrecision):
    "Without the check for a GPU"
    dls = SimpleNamespace(device=SimpleNamespace(type='cuda'))

def non_native(learn, **kw):
    "Master parameters in float64, not float32, so that the runs do not part where fp16 rounds them"
    learn.add_cbs([ModelToHalf(), NonNativeOnCPU(max_loss_scale=2.**20, scale_wait=3, clip=0.5, **kw)])
    with mock.patch.object(Tensor, 'float', Tensor.double):
        learn.fit_one_cycle(3, 0.02)
        yield
        learn.fit(1, 0.02)

@scenario(net=float32_net)
def non_native_fp16(learn):
    learn.freeze()  # what does not train has no master
    for _ in non_native(learn): learn.unfreeze()

@scenario(net=float32_net)
def non_native_fp16_flat(learn):
    for _ in non_native(learn, flat_master=True): pass

# --- Models

@scenario(make=tabular)
def tabular_model(learn): learn.fit_one_cycle(3, 0.02)

@scenario(make=text)
def text_model(learn):
    learn.freeze()
    learn.fit_one_cycle(1, 0.02)
    learn.unfreeze()
    learn.fit_one_cycle(1, slice(1e-3,0.02))

@scenario(make=gan)
def gan_model(learn): learn.fit(3, 0.02)

# --- What changes under the optimizer

@scenario
def hypers_in_place(learn):
    def edit(learn):
        for h in learn.opt.hypers: h['lr'] *= 0.9; h['wd'] = 0.1*(learn.iter%2)
    learn.fit(2, 0.02, cbs=before_batch(edit))

@scenario
def set_freeze(learn):
    "As a GAN takes turns"
    def turn(learn):
        for i,m in enumerate(learn.model): set_freeze_model(m, learn.train_iter%3 != i)
    learn.fit(3, 0.02, cbs=before_batch(turn))

@scenario
def frozen_with_old_gradients(learn):
    "They are zero, not `None`, so momentum and decay go on"
    learn.fit(1, 0.02)
    learn.opt.freeze_to(-1)  # the optimizer's, which keeps its state
    frozen = [(p,p.clone()) for p in learn.opt.param_lists[0] if not p.requires_grad]
    learn.fit(1, 0.02)
    assert frozen and all(p.grad is not None and not p.grad.any() and not torch.equal(p, old) for p,old in frozen)

@scenario
def gradients_set_to_none(learn):
    "Frozen then, parameters have none, and only Lookahead moves them"
    def drop(learn):
        set_freeze_model(learn.model[0], learn.train_iter%2 == 0)
        learn.model.zero_grad(set_to_none=learn.iter%3 != 0)
    learn.fit(3, 0.02, cbs=before_batch(drop))

@scenario
def data_replaced(learn):
    def replace(learn):
        for i,p in enumerate(learn.model.parameters()):
            if i%3 == learn.train_iter%3: p.data = p.data.clone(memory_format=torch.contiguous_format)
            elif p.dim() == 4:            p.data = p.data.to(memory_format=torch.channels_last)
    learn.fit(3, 0.02, cbs=before_batch(replace))

@scenario
def state_cleared(learn):
    learn.fit(2, 0.02, cbs=before_batch(lambda learn: learn.opt.clear_state() if learn.train_iter in (3,5) else None))

# --- Copies

@scenario
def resume(learn):
    "On a GPU the loaded state is there before the model, which comes with `fit`"
    learn.fit_one_cycle(2, 0.02)
    learn.save('checkpoint')
    fresh = vision(learn.opt_func, learn.path, learn.dls.device)
    fresh.dls = learn.dls
    fresh.load('checkpoint').fit(1, 0.02)
    return fresh

@scenario(make=tabular)
def export(learn):
    learn.fit(1, 0.02)
    learn.export('export.pkl')
    learn.fit(1, 0.02)
    loaded = quiet(load_learner(learn.path/'export.pkl'))
    assert loaded.opt is None
    loaded.dls = learn.dls
    loaded.fit_one_cycle(1, 0.02)
    return loaded

@scenario
def deep_copy(learn):
    learn.fit(1, 0.02)
    other = deepcopy(learn)
    ids = lambda opt: {*map(id, opt.hypers)} | {id(st) for *_,st,_ in opt.all_params()}
    where = lambda learn: {t.data_ptr() for t in tensors(learn)} | ids(learn.opt)
    assert not where(learn) & where(other)
    assert all(p is q for p,q in zip(other.opt.all_params().itemgot(0), other.model.parameters()))
    for l in (learn,other): set_seed(2); l.fit_one_cycle(2, 0.02)
    assert all(map(torch.equal, tensors(learn), tensors(other)))
    return other

# ---

def played(case, jit, name, dev, path):
    "The Learner after its scenario, and what that returned"
    f,make = SCENARIOS[name]
    set_seed(1, reproducible=True)
    learn = make(partial(case.jit if jit else case.native, **case.kw), path, dev)
    return learn,f(learn)

def same_learner(ours, native, tol=1e-9):
    "Are weights, buffers, the optimizer's state and the records equal?"
    theirs = native.model.state_dict()
    for n,t in ours.model.state_dict().items(): close(t, theirs[n], tol, n)
    same_state(ours.opt, native.opt, tol)
    assert getattr(ours.opt, 'count', None) == getattr(native.opt, 'count', None)
    assert len(slow(ours.opt)) == len(slow(native.opt))
    for s,t in zip(slow(ours.opt), slow(native.opt)): close(s, t, tol, 'slow weights')
    a,b = ours.recorder,native.recorder
    assert a.lrs == b.lrs and getattr(a, 'hps', None) == getattr(b, 'hps', None)
    for n in ('losses','values'): close(tensor(getattr(a, n)), tensor(getattr(b, n)), 1e-6, n)

# One-cycle schedules `mom`, also for optimizers that have none
no_mom = [('fit_one_cycle',c) for c in CASES if c.kw.get('mom') == 0.]

def every_third():
    "Each scenario with each optimizer, slow but for every third: all of both are among those"
    pairs = [(i+j,n,c) for i,n in enumerate(SCENARIOS) for j,c in enumerate(ALL+TWO_AHEAD)]
    return [pytest.param(n, c, marks=[pytest.mark.slow]*(k%3 > 0)) for k,n,c in pairs]

@pytest.mark.parametrize('name,case', [*every_third(), *no_mom], ids=str)
def test_contract(case, name, dev, tmp_path):
    (native,more),(ours,our_more) = [played(case, jit, name, dev, tmp_path) for jit in (False,True)]
    same_learner(ours, native)
    if isinstance(more, Learner): same_learner(our_more, more)
    else: assert our_more == more

@every
@pytest.mark.parametrize('to', [torch.float64,*ON_GPU], ids=str)
def test_model_to(case, to, tmp_path):
    """State that no longer fits is an error before anything changes, and `clear_state` mends it

    fastai goes on, with averages in the old dtype"""
    learns = []
    for f in (case.native,case.jit):
        set_seed(1)
        learns.append(vision(partial(f, **case.kw), tmp_path, net=float32_net if to == torch.float64 else float64_net))
        learns[-1].fit(1, 0.02)
    native,ours = learns
    ours.model.load_state_dict(native.model.state_dict())  # to float64 from equal weights
    for learn in learns:
        learn.add_cb(Float64())
        learn.model.to(to)
        if to == 'cuda': learn.dls.to(to)
        torch.manual_seed(2)
        x,y = torch.randn(8, 2, 6, 6, dtype=torch.float64).to(to),torch.arange(8)%3
        cross_entropy(learn.model.eval()(x), y.to(x.device)).backward()
    before = [t.clone() for t in tensors(ours)]
    says = r'State `grad_avg` of parameter 0 of group 0 .* (dtype|device) .*call `clear_state\(\)`'
    with pytest.raises(ValueError, match=says): ours.opt.step()
    assert all(map(torch.equal, tensors(ours), before))
    for learn in learns:
        learn.opt.clear_state()
        learn.fit(1, 0.02)
    same_learner(ours, native)

@every
def test_zero_grad(case, dev, tmp_path):
    "In place, in one call per bucket, and never `None`"
    learn = vision(partial(case.jit, **case.kw), tmp_path, dev)
    learn.fit(1, 0.02)
    ps = list(learn.model.parameters())
    for p in ps: p.grad.fill_(1.)
    ps[0].grad = None
    grads = [p.grad for p in ps]
    with Calls() as seen: learn.opt.zero_grad()
    assert all(p.grad is g for p,g in zip(ps, grads)) and not any(g.any() for g in grads[1:])
    buckets = {(s.get('do_wd'),id(pg)) for _,pg,s,_ in learn.opt.all_params()}
    assert {*seen.calls} == {'_foreach_zero_'} and seen.calls.total() <= len(buckets)
    # a gradient with a graph (`create_graph`) comes off it
    ps[1].grad = ps[1]*2
    graph = ps[1].grad
    learn.opt.zero_grad()
    assert ps[1].grad is graph and not graph.requires_grad and not graph.any()

@every
def test_pickle(case):
    "Factories, partials of them, and an optimizer with its parameters"
    assert pickle.loads(pickle.dumps(case.jit)) is case.jit
    f = pickle.loads(pickle.dumps(partial(case.jit, **case.kw)))
    assert (f.func,f.keywords) == (case.jit,case.kw)
    opts = [f([nn.Parameter(torch.ones(3))], lr=0.1)]
    for i in range(7):
        opts += [pickle.loads(pickle.dumps(opts[0]))] if i == 4 else []
        for opt in opts: opt.param_lists[0][0].grad = torch.arange(3.)+i; opt.step()
    close(opts[1].param_lists[0][0], opts[0].param_lists[0][0], 0)
    same_state(*opts, 0)

@every
def test_summary(case, tmp_path):
    opt_func,native = [vision(partial(f, **case.kw), tmp_path, net=float32_net) for f in (case.jit,case.native)]
    def text(learn):
        learn.create_opt()
        learn.freeze()
        return [s for s in str(learn.summary()).splitlines() if not s.startswith('Optimizer used')]
    assert text(opt_func) == text(native)
