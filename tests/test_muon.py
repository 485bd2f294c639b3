"Muon: equal to `torch.optim.Muon` and to the formula, in any layout; and which parameters take it"
import copy,io,pickle,warnings
from functools import partial

import pytest
import torch
from torch import nn
from fastai.learner import Learner,params
from fastai.tabular.model import TabularModel

from fastxtend_jit.all import *
from fastxtend_jit.muon import _orthogonal,why_adam
from tests.cases import close
from tests.learners import quiet,tensor_dls
from tests.references import muon,orthogonal
from tests.support import new_grads

MATRICES = (48,48),(20,90),(90,20),(2,5),(30,7,3,3),(16,8,5),(6,4,2,2,3)
FORMS = {}, dict(wd=0.1), dict(wd=0.1, decouple_wd=False), dict(nesterov=False), dict(adjust='original'), dict(mom=0.)
matrices = pytest.mark.parametrize('shape', MATRICES, ids=str)
forms    = pytest.mark.parametrize('form', FORMS, ids=str)
all_muon = partial(muon_jit, lr=0.02, rest=[])

def train(*pairs, steps=25):
    "Give the same gradients to the parameters of each pair of an optimizer and its parameters, which may be flattened"
    for _ in range(steps):
        for p,*others in zip(*(ps for _,ps in pairs)):
            p.grad = torch.randn_like(p)
            for q in others: q.grad = p.grad.reshape(q.shape).to(q.dtype, copy=True)
        for opt,_ in pairs: opt.step()

def some(shape, n=3, dtype=torch.float32): return [nn.Parameter(torch.randn(shape, dtype=dtype)) for _ in range(n)]
def twins(ps, **kw): return [nn.Parameter(p.detach().clone().flatten(1).to(**kw)) for p in ps]

def pytorchs(ps, wd=0., mom=0.95, decouple_wd=True, adjust='match_rms_adamw', **kw):
    if not hasattr(torch.optim, 'Muon'): pytest.skip('this PyTorch has no Muon')
    return torch.optim.Muon(ps, lr=0.02, weight_decay=wd, momentum=mom, adjust_lr_fn=adjust, **kw)

@pytest.fixture
def exact(monkeypatch):
    "`torch.optim.Muon` iterates in the parameters' dtype"
    monkeypatch.setattr(torch.Tensor, 'bfloat16', torch.Tensor.clone)

@matrices
@pytest.mark.parametrize('form', [f for f in FORMS if 'decouple_wd' not in f], ids=str)
@pytest.mark.parametrize('n', [1,5])
@pytest.mark.parametrize('dtype,tol', [(torch.float32,1e-5),(torch.float64,1e-12)], ids=str)
def test_as_pytorchs(shape, form, n, dtype, tol, exact):
    ps = some(shape, n, dtype)
    qs = twins(ps)
    ours,theirs = all_muon(ps, **form),pytorchs(qs, **form)
    train((ours,ps), (theirs,qs))
    for p,q in zip(ps, qs):
        close(p.flatten(1), q, tol)
        close(ours.state[p]['grad_avg'].flatten(1), theirs.state[q]['momentum_buffer'], tol)
        assert {*ours.state[p]} == {'grad_avg'}

@matrices
@forms
def test_as_the_formula(shape, form):
    ps = some(shape, dtype=torch.float64)
    qs = [nn.Parameter(p.detach().clone()) for p in ps]
    train((all_muon(ps, **form),ps), (muon(qs, lr=0.02, rest=[], **form),qs))
    for p,q in zip(ps, qs): close(p, q, 1e-10)

@matrices
def test_in_bfloat16(shape):
    "No further from the result in float64 than twice PyTorch's own"
    ps = some(shape, 5)
    qs,truth = twins(ps),twins(ps, dtype=torch.float64)
    ours,theirs = all_muon(ps, dtype=torch.bfloat16),pytorchs(qs)
    train((ours,ps), (theirs,qs), (muon(truth, lr=0.02, rest=[]),truth))
    off = lambda xs: max((x.detach().flatten(1)-t).abs().max().item() for x,t in zip(xs, truth))
    assert 0 < off(ps) <= 2*off(qs)

LAYOUTS = dict(
    channels_last = lambda: torch.randn(8,6,3,3).to(memory_format=torch.channels_last),
    transposed    = lambda: torch.randn(30,20).t(),
    with_gaps     = lambda: torch.randn(20,60)[:,::2],
    at_an_offset  = lambda: torch.randn(40,30)[7:27],
    volumes       = lambda: torch.randn(8,6,3,3,3).to(memory_format=torch.channels_last_3d))

@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('alike', [True,False], ids=['gradients alike','gradients contiguous'])
def test_layouts(layout, alike):
    "The same numbers as contiguous ones, into the same memory, beside contiguous ones of the same shape"
    start = [LAYOUTS[layout]() for _ in range(3)]
    ps,qs = ([nn.Parameter(o) for o in ts] for ts in (start + [start[0].clone().contiguous()],
                                                     [t.clone().contiguous() for t in start + start[:1]]))
    opt,other = all_muon(ps, wd=0.1),all_muon(qs, wd=0.1)
    for _ in range(5):
        for p,q in zip(ps, qs):
            q.grad = torch.randn(q.shape)
            p.grad = torch.empty_like(p).copy_(q.grad) if alike else q.grad.clone()
        opt.step(); other.step()
    for p,q,t in zip(ps, qs, start): close(p, q, 1e-6); assert p.data_ptr() == t.data_ptr()
    close(ps[3], qs[3], 1e-6)

@pytest.mark.parametrize('dtype', [torch.bfloat16,torch.float16], ids=str)
def test_16_bits(dtype):
    "No further from the result in float64 than a few roundings of each step; squares that float16 cannot hold"
    ps = some((20,30), dtype=dtype)
    truth = twins(ps, dtype=torch.float64)
    train((all_muon(ps),ps), (muon(truth, lr=0.02, rest=[]),truth), steps=5)
    for p,t in zip(ps, truth): close(p.double(), t, 8*torch.finfo(dtype).eps)
    for value in (1e4,1e-6):
        p = nn.Parameter(torch.zeros(20, 20, dtype=dtype))
        p.grad = torch.full_like(p, value)
        all_muon([p], lr=1., adjust='original').step()
        close(p.double(), -orthogonal(p.grad.double()), 0.02)

def test_edges():
    "No gradient, a single large one, NaN, and one element: as the formula"
    for fill in (0.,1e-12,float('nan'),1e18):
        p,q = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
        p.grad = torch.full_like(p, fill)
        q.grad = p.grad.clone()
        all_muon([p], wd=0.1).step(); muon([q], lr=0.02, wd=0.1, rest=[]).step()
        close(p, q, 1e-6)

def test_in_pieces():
    "A stack that is larger than a piece gives what its matrices give one by one"
    xs = torch.randn(3, 2, 3_000_000)
    (ps,pm),(qs,qm) = ([torch.zeros_like(xs).unbind() for _ in range(2)] for _ in range(2))
    muon_jit_step([*ps], [*xs], [*pm], lr=1., mom=0.9, wd=0.)
    for q,x,m in zip(qs, xs, qm): muon_jit_step([q], [x], [m], lr=1., mom=0.9, wd=0.)
    for p,q in zip(ps, qs): close(p, q, 1e-6)

@pytest.mark.parametrize('shape', [(40,40),(20,70),(70,20)], ids=str)
def test_singular_values(shape):
    "All that are not tiny come near 1, and the singular vectors stay"
    u,_,v = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    x = _orthogonal(u*torch.linspace(0.1, 1, min(shape))@v, 0)
    s = u.mT@x@v.mT
    off = s-torch.diag_embed(s.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 1e-5 and 0.6 < s.diagonal(dim1=1, dim2=2).min() and s.max() < 1.3

def test_compiles():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert isinstance(muon_jit_step.compiled, torch.jit.ScriptFunction)
    for d in range(5):
        xs,ys = ([torch.zeros(3, 4),torch.zeros(3, 4)] for _ in range(2))
        gs = torch.randn(2, 3, 4).unbind()
        for f,ts in ((muon_jit_step,xs),(muon_jit_step.fn,ys)):
            f(ts, [*gs], [torch.zeros(3, 4) for _ in gs], lr=0.1, mom=0.9, wd=0., dtype=d)
        for x,y in zip(xs, ys): close(x, y, 1e-6 if d in (0,3,4) else 0.02)

# Which parameters take Muon's step

@pytest.mark.parametrize('shape,why', [
    ((4,3),''), ((8,4,3,3),''), ((8,4,5),''), ((8,4,2,2,2),''), ((4,2,1,1),''),
    ((),'no matrix'), ((5,),'no matrix'), ((0,3),'no matrix'), ((1,5),'a single row or column'),
    ((5,1),'a single row or column'), ((1,1),'a single row or column'), ((1,7,12),'a single row or column'),
    ((1,1,12),'a single row or column'), ((8,1,1,1),'a single row or column'), ((8,1,3,3),'a depthwise convolution'),
    ((8,1,5),'a depthwise convolution')], ids=str)
def test_shapes_that_take_muon(shape, why):
    p = nn.Parameter(torch.zeros(shape))
    assert why_adam(p) == why
    assert why_adam(p, [nn.Parameter(torch.zeros(shape))]) == why and why_adam(p, [p]) == 'in `rest`'

def takes(opt, model):
    "Names of parameters with Muon's state"
    return [n for n,p in model.named_parameters() if {*opt.state[p]} == {'grad_avg'}]

def stepped(opt, model):
    for p in model.parameters(): p.grad = torch.randn_like(p)
    opt.step()
    return opt

def net(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 9, 3),
                                nn.Linear(9, 7), nn.Linear(7, 6), nn.Linear(6, 5))

def test_first_and_last_take_adam():
    m = net()
    hidden = ['3.weight','4.weight','5.weight']
    assert takes(stepped(muon_jit(m.parameters(), 0.01), m), m) == hidden
    groups = [[*m[:4].parameters()],[*m[4:].parameters()]]
    assert takes(stepped(muon_jit(groups, 0.01), m), m) == hidden
    assert takes(stepped(muon_jit(m.parameters(), 0.01, rest=[]), m), m) == ['0.weight',*hidden,'6.weight']
    assert takes(stepped(muon_jit(m.parameters(), 0.01, rest=m[4].weight), m), m) == [
        '0.weight','3.weight','5.weight','6.weight']

@pytest.mark.parametrize('first,last', [
    ([(1,1,9),(1,7,9),(9,5)], [(1,9)]), ([(9,1)], [(4,9),(4,)]), ([(9,3,2,2)], [(9,9,1,1)])], ids=str)
def test_ends_by_order(first, last):
    "Tokens and positions are no first layer; a single column is one, and a single row is a last one"
    ps = [nn.Parameter(torch.randn(s)) for s in [*first,(9,9),(9,),(8,9),*last]]
    m = nn.ParameterList(ps)
    assert takes(stepped(muon_jit(m.parameters(), 0.01), m), m) == [str(len(first)),str(len(first)+2)]

class Tied(nn.Module):
    "A table of positions, an embedding that is also the head, and a head that is defined first"
    def __init__(self):
        super().__init__()
        self.positions,self.emb = nn.Parameter(torch.zeros(7, 12)),nn.Embedding(20, 12)
        self.att,self.mlp = nn.MultiheadAttention(12, 2),nn.Linear(12, 12)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.emb.weight

def names(model): return [n for n,p in model.named_parameters() if any(p is q for q in muon_rest(model))]

def test_muon_rest():
    assert names(Tied()) == ['positions','emb.weight']
    assert names(net()) == ['0.weight','6.weight']
    tables = [f'embeds.{i}.weight' for i in range(3)]
    assert names(TabularModel([(10,5)]*3, 4, 2, [20,10])) == [*tables,'layers.2.0.weight']
    assert muon_rest(nn.BatchNorm1d(3)) == []
    assert names(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 1))) == ['0.weight']
    m = Tied()
    assert takes(stepped(muon_jit(m.parameters(), 0.01, rest=muon_rest(m)), m), m) == [
        'att.in_proj_weight','att.out_proj.weight','mlp.weight']

def test_models():
    models = pytest.importorskip('torchvision.models')
    assert names(models.vit_b_16()) == ['conv_proj.weight','heads.head.weight']
    swin = names(models.swin_t())
    assert {n.split('.')[-1] for n in swin} == {'weight','relative_position_bias_table'} and len(swin) == 12 + 2

def test_rest_as_adam_jit():
    "Exactly: parameters and state"
    a,b = net(),net()
    b.load_state_dict(a.state_dict())
    kw = dict(lr=0.01, mom=0.95, wd=0.1, eps=1e-6)
    opt,other = muon_jit(a.parameters(), **kw),adam_jit(b.parameters(), **kw)
    train((opt,[*a.parameters()]), (other,[*b.parameters()]))
    adams = [(p,q) for p,q in zip(a.parameters(), b.parameters()) if 'sqr_avg' in opt.state[p]]
    assert len(adams) == 11
    for p,q in adams:
        assert torch.equal(p, q)
        for k,v in other.state[q].items(): assert torch.equal(torch.as_tensor(opt.state[p][k]), torch.as_tensor(v)), k

def pickled(o): return pickle.loads(pickle.dumps(o))

@pytest.mark.parametrize('duplicate', [copy.deepcopy,pickled])
def test_copies_keep_the_rule(duplicate):
    "A copy of model and optimizer knows its own parameters"
    m = net()
    opt = stepped(muon_jit(m.parameters(), 0.01, rest=[m[4].weight]), m)
    m2,opt2 = duplicate((m,opt))
    opt2.clear_state()
    assert takes(stepped(opt2, m2), m2) == ['0.weight','3.weight','5.weight','6.weight']

def test_checkpoints_resume():
    m = net()
    opt = stepped(muon_jit(m.parameters(), 0.01), m)
    file = io.BytesIO()
    torch.save((m.state_dict(),opt.state_dict()), file)
    file.seek(0)
    weights,sd = torch.load(file, weights_only=False)
    m2 = net()
    m2.load_state_dict(weights)
    opt2 = muon_jit(m2.parameters(), 0.01)
    opt2.load_state_dict(sd)
    train((opt,[*m.parameters()]), (opt2,[*m2.parameters()]), steps=3)
    for p,q in zip(m.parameters(), m2.parameters()): assert torch.equal(p, q)

def test_in_a_learner():
    m = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16),
                      nn.Linear(16, 1))
    x = torch.randn(256, 4)
    dls = tensor_dls(x, x.sum(1, keepdim=True), bs=32, n_valid=64)
    halves = lambda m: [params(m[:3]),params(m[3:])]
    for f,splitter in ((muon_jit,params), (partial(muon_jit, rest=muon_rest(m)),halves)):
        learn = quiet(Learner(dls, m, loss_func=nn.MSELoss(), opt_func=f, splitter=splitter, lr=0.01))
        before = learn.validate()[0]
        learn.fit_one_cycle(3)
        assert learn.validate()[0] < before and takes(learn.opt, m) == ['2.weight','4.weight']

def test_wrong_arguments():
    ps = [*net().parameters()]
    with pytest.raises(ValueError, match="`adjust` has to be 'match_rms_adamw' or 'original', but is 'both'"):
        muon_jit(ps, 0.01, adjust='both')
    with pytest.raises(ValueError, match="`dtype` has to be None or one of torch.bfloat16.*but is torch.int8"):
        muon_jit(ps, 0.01, dtype=torch.int8)
    for rest,name in ((['head.weight'],'str'), ('head.weight','str'), (net(),'Sequential'), (True,'bool')):
        with pytest.raises(TypeError, match=f"`rest` has to be a list of parameters.*holds a `{name}`"):
            muon_jit(ps, 0.01, rest=rest)
    with pytest.warns(UserWarning, match='2 of `rest` are not among the parameters'):
        muon_jit(ps, 0.01, rest=[ps[0], ps[0].data, nn.Parameter(torch.zeros(2,2))])
    with pytest.raises(ValueError, match='None of `rest` is among the parameters'):
        muon_jit(ps, 0.01, rest=muon_rest(net()))
    with pytest.raises(ValueError, match='got no parameters'): muon_jit([], 0.01)
    with pytest.raises(TypeError, match='holds a `str`'): muon_jit([ps[0],'weight'], 0.01, rest=[])
    with pytest.warns(UserWarning, match="No parameter takes Muon's step.*`rest=\\[\\]`"): muon_jit(ps[:2], 0.01)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        muon_jit([torch.zeros(3)], 0.01)  # without matrices, nothing was to be expected
        frozen = ps[0].requires_grad_(False)
        muon_jit(ps[1:], 0.01, rest=[frozen])

@pytest.mark.parametrize('first', [0,5])
def test_within_autocast(first):
    "A loop that steps in there gets products in the dtype that it would get elsewhere"
    ms = [net() for _ in range(2)]
    ms[1].load_state_dict(ms[0].state_dict())
    opts = [muon_jit(m.parameters(), 0.01) for m in ms]
    for i in range(8):
        for o,m in zip(opts, ms):
            new_grads([*m.parameters()], i)
            with torch.autocast('cpu', torch.bfloat16, enabled=m is ms[1] and i >= first): o.step()
    for p,q in zip(*(m.parameters() for m in ms)): assert torch.equal(p, q)

def test_explain_says_why():
    m = net()
    t = stepped(muon_jit(m.parameters(), 0.01), m).explain()
    assert t.tensors.sum() == len([*m.parameters()]) and {*t['step']} == {'muon_jit_step','adam_jit_step'}
    for step,d in t.groupby('step'): assert (d['why this step'] == '').all() == (step == 'muon_jit_step')
    assert t['why this step'].str.contains('2 the first or last matrix').any()
    t = stepped(muon_jit(m.parameters(), 0.01, rest=muon_rest(m)), m).explain()
    assert t['why this step'].str.contains('1 a depthwise convolution').any()
    assert t['why this step'].str.contains('2 in `rest`').any()

def test_lazy_parameters():
    "Their shapes are not known: no matter where `rest` is given"
    lazy = nn.LazyLinear(3)
    with pytest.raises(ValueError, match='no shape yet.*batch through the model first.*`rest`'):
        muon_jit(lazy.parameters(), 0.01)
    opt = muon_jit(lazy.parameters(), 0.01, rest=[])
    lazy(torch.ones(2, 4)).sum().backward()
    opt.step()
    assert takes(opt, lazy) == ['weight']
