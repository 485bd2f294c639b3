"CUDA without a GPU: on fake tensors, count the ATen calls and launches of a step, and find where the host would wait"
from functools import partial
from typing import List

import pandas as pd
import pytest
import torch
from torch import Tensor,nn
from torch._subclasses.fake_tensor import FakeTensorMode,unset_fake_temporarily
from torchvision.models import VisionTransformer
from fastai.vision.models.xresnet import xresnet18,xresnet34,xresnet50,xresnet101

from fastxtend_jit.bench import rows
from fastxtend_jit.launches import Launches
from tests import engine
from tests.cases import *
from tests.engine import pytorch
from tests.support import every,params_of
from tests.tools.launches import cuda_launches,with_grads,xresnet_shapes

@pytest.fixture
def fake_cuda(request):
    "A GPU that is not there, with or without fused kernels"
    with pytorch(fused=request.param == 'fused'),FakeTensorMode(): yield

# Without those that give the first and the last matrix another step
WIDE  = [c for c in CASES if c.jit is not muon_jit or 'rest' in c.kw]
paths = pytest.mark.parametrize('fake_cuda', ['fused','foreach'], indirect=True)
both  = pytest.mark.parametrize('case,fake_cuda', [*((c,'fused') for c in WIDE), *((c,'foreach') for c in ALL)],
                                ids=str, indirect=['fake_cuda'])
fused = pytest.mark.parametrize('fake_cuda', ['fused'], indirect=True)

def count(opt, steps=1, device='cuda'):
    "Calls and waits of the next `steps` steps, with other hypers at each"
    res = []
    for i in range(steps):
        opt.set_hypers(lr=0.1/(i+1), mom=0.9+i/1000)
        with Launches(device=device) as c: opt.step()
        res.append((c.calls.total(), c.waits.total()))
    return res

def per_tensor(case):
    "Calls that a step needs for each tensor: LAMB's and StableAdamW's scratch, which is empty memory"
    return case.jit in (lamb_jit,stableadam_jit)

@both
def test_calls(case, fake_cuda):
    "No step waits, and none has more calls for more tensors: RAdam in both phases, Ranger with lookaheads"
    few,many = [count(case.make(with_grads([(4,3)]*n), True), 8)[1:] for n in (2,5)]  # the first step allocates
    assert not any(w for _,w in few+many)
    most = 25 + 2*per_tensor(case) + 15*(case.jit is muon_jit)  # three products in each of five iterations
    for (a,_),(b,_) in zip(few,many): assert b-a == 3*per_tensor(case) and a <= most
    if case.jit in (radam_jit,ranger_jit): assert len({*few}) > 1  # it went through its phases

@every
@paths
def test_buckets(case, fake_cuda):
    "Parameters without decay, as a Learner's batchnorms, are one call more"
    ps = with_grads([(4,3)]*6)
    one,two = case.make(ps, True),case.make(ps, True)
    for p in ps[::2]: two.state[p]['do_wd'] = False
    (_,(a,_)),(_,(b,_)) = count(one, 2),count(two, 2)
    assert a < b <= 2*a

@fused
def test_zero_grad(fake_cuda):
    opt = EIGHT[0].make(with_grads([(4,3)]*6), True)
    with Launches() as c: opt.zero_grad()
    assert c.calls == {'_foreach_zero_':1}

def item_step(params:List[Tensor], grads:List[Tensor], lr:float): params[0].mul_(1 - lr*float(grads[0].sum().item()))
def bool_step(params:List[Tensor], grads:List[Tensor], lr:float):
    if bool(grads[0].sum() > 0): torch._foreach_add_(params, grads, alpha=-lr)
def made_step(params:List[Tensor], grads:List[Tensor], lr:float):
    torch._foreach_mul_(params, torch.full([], lr, dtype=torch.float64))

@pytest.mark.parametrize('step', [item_step,bool_step,made_step], ids=lambda f: f.__name__)
@paths
def test_waits_are_seen(step, fake_cuda): assert count(JitOptimizer(with_grads([(4,3)]*2), step, lr=0.1))[0][1]

def launches(case, shapes, gen, jit=True, steps=(2,10,12), big=False):
    """Launches of the steps with these numbers; nothing waits

    They reach RAdam before and after it rectifies, and Ranger's lookahead"""
    return launches_of(case.make(with_grads(shapes), jit), gen, steps, jit, big)

def launches_of(opt, gen, steps, jit=True, big=False):
    res = []
    with pytorch(gen):
        for i in range(1, max(steps)+1):
            with Launches(gen, big=big) as l: opt.step()
            if i in steps: res.append(l.total); assert not jit or not l.waits
    return res

def shapes_of(make):
    with unset_fake_temporarily(),torch.device('meta'): return [p.shape for p in make().parameters()]

def vit_s_16(layers): return VisionTransformer(224, 16, layers, 6, 384, 1536)

@pytest.mark.parametrize('few,many', [(partial(vit_s_16, 6),partial(vit_s_16, 12)), (xresnet18,xresnet34),
                                      (xresnet50,xresnet101)], ids=['ViT-S/16','xresnet18','xresnet50'])
@pytest.mark.parametrize('gen', ['old','new'])
@fused
def test_launches_of_muon(few, many, gen, fake_cuda):
    "They grow with the number of shapes: as many matrices again are hardly any more"
    counts = []
    for shapes in map(shapes_of, (few,many)):
        opt = muon_jit(with_grads(shapes), 0.1, wd=0.1)
        (n,) = launches_of(opt, gen, (2,))
        matrices = [p.shape for p in params_of(opt) if 'sqr_avg' not in opt.state[p]]
        counts.append((n, len(matrices), len({*matrices})))
    (a,few_matrices,kinds),(b,many_matrices,more_kinds) = counts
    assert kinds == more_kinds and many_matrices >= 1.5*few_matrices and a <= b <= a + 2
    assert a <= 27*kinds + 6  # and Adam's for the rest

@pytest.mark.parametrize('case', [c for c in CASES if 'beta' not in c.kw and c.jit is not muon_jit], ids=str)
@pytest.mark.parametrize('gen', ['old','new'])
@fused
@pytest.mark.slow
def test_launches(case, gen, fake_cuda):
    "At most 80 for the 167 tensors of xresnet50, one for four tensors more, by the rules before and after PyTorch 2.11"
    shapes = xresnet_shapes()
    one,two = (launches(case, shapes*n, gen) for n in (1,2))
    assert max(one) <= 80
    for a,b in zip(one, two): assert b-a <= 167/4

def test_launch_rules():
    "By hand, on tensors that stand for a GPU's"
    def count(f, *args, gen='new'):
        with Launches(gen, 'cpu') as l: f(*args)
        return l.total
    xs,ys = ([torch.zeros(8) for _ in range(200)] for _ in range(2))
    assert count(torch._foreach_mul_, xs, 2.) == 2        # 110 tensors of one list a launch
    assert count(torch._foreach_add_, xs, ys) == 4        # 64 of two
    expanded = [y.view(2,4)[:,:2].flatten()[:1].expand(8) for y in ys[:3]]
    assert count(torch._foreach_add_, xs[:3], expanded) == 3  # the slow way
    assert count(torch._foreach_add_, xs[:3], [torch.zeros(8).double() for _ in range(3)]) == 3
    assert count(torch._foreach_zero_, [torch.zeros(65536*400)]) == 2  # 320 pieces a launch
    ones = [*torch.ones(200).unbind()]
    assert [count(torch._foreach_addcmul_, xs, ys, ones, gen=g) for g in ('old','new')] == [200,5]
    assert count(torch.stack, xs) == 2
    assert count(lambda: xs[0].view(2,4).t()) == 0 and count(lambda: xs[0].sum().item()) == 1
    a,b = torch.empty_strided((8,4,1,1), (4,1,4,4)),torch.empty_strided((8,4,1,1), (4,1,1,1))
    kw = dict(lr=0., beta1=0., beta2=0., weight_decay=0., eps=1., amsgrad=False, maximize=False)
    def adamw(g): torch._fused_adamw_([a], [g], [a.clone()], [a.clone()], [], [torch.ones([])], **kw)
    assert count(adamw, b) == 4  # and two copies and a number
    # PyTorch 2.4 compares strides of dimensions of size 1
    with pytest.raises(RuntimeError, match='same'): count(adamw, b, gen='old')

@fused
def test_rest_lookahead(fake_cuda):
    "Frozen parameters are looked ahead together, not in the batches of a CPU"
    ps = with_grads([(300,300)]*118 + [(4,3)])
    for p in ps[:-1]: p.grad = None
    opt = EIGHT[-1].make(ps, True, k=1)
    for _ in range(2):
        with Launches() as l: opt.step()
    assert l.calls.total() <= 12

@pytest.mark.parametrize('gen', ['old','new'])
@fused
def test_strides_of_size_1(gen, fake_cuda):
    "A gradient whose strides differ in such dimensions alone is viewed with its parameter's, which costs nothing"
    for case in ALL:
        p = nn.Parameter(torch.empty(8, 1, 1, 1, device='cuda'))
        p.grad = torch.empty_strided((8,1,1,1), (1,8,8,8), device='cuda')
        opt = case.make([p], True)
        for _ in range(2):
            with Launches(gen) as l: opt.step()
        assert 'copy_' not in l.calls or case.jit is larc_jit  # its rates

def test_cuda_launches():
    "The table on the page performance"
    t = cuda_launches([(2,2),(2,),(2,2),(2,)]).set_index('optimizer')
    assert (t.tensors == 4).all() and t.index.tolist() == [*rows]
    # decay, average (2 launches) and update of each; decay of all, then all the rest
    assert t.fastai['sgd'] == 4*4 and t.ours['sgd'] == 2
    assert t.ours_to_2_10['lamb'] >= t.ours['lamb'] and t.ours_to_2_10['adam'] == t.ours['adam']

# TorchScript's own fuser

def fusible(params:List[Tensor], grads:List[Tensor], lr:float):
    n = torch.stack(torch._foreach_norm(params))
    q = lr * n / (n*0.1 + n + 1.)
    torch._foreach_addcmul_(params, grads, torch.where(q < lr, q, lr).unbind(), -1.)

@pytest.fixture
def fuser():
    "TorchScript's fuser of tensor expressions, on a CPU too, for steps that are compiled meanwhile"
    c = torch._C
    def switch(on_cpu, llvm, enabled):
        c._jit_override_can_fuse_on_cpu(on_cpu)
        c._jit_set_te_must_use_llvm_cpu(llvm)
        c._jit_set_texpr_fuser_enabled(enabled)
        engine.forget_compiled()
    old = c._jit_can_fuse_on_cpu(),c._jit_get_te_must_use_llvm_cpu(),c._jit_texpr_fuser_enabled()
    switch(True, False, True)
    yield
    switch(*old)

@pytest.mark.parametrize('shapes', [[(4,3),(5,)],[(4,3)]*2])
@pytest.mark.parametrize('groups', [1,2])
@pytest.mark.parametrize('case', [None,*CASES], ids=str)
def test_no_kernels_at_run_time(case, groups, shapes, fuser, monkeypatch):
    "Allowed to, it makes none for ours: what it would take on CUDA it takes on a CPU too. It does for the example"
    engine.set_compile_after(0, monkeypatch)
    ps = with_grads(shapes*groups, 'cpu')
    for p in ps: p.data.fill_(1.); p.grad.fill_(1.)
    lists,lr = [ps[i::groups] for i in range(groups)],[0.1*(1+i) for i in range(groups)]
    opt = case.make(lists, True, lr=lr) if case else JitOptimizer(lists, fusible, lr=lr)
    opt.step()
    engine.forget_compiled()  # the proof's trials, with lists of several lengths, would keep the fuser away
    engine.drop_plan(opt)
    for _ in range(4): opt.step()
    graph = str(torch.jit.last_executed_optimized_graph())
    assert ('TensorExprGroup' in graph) == (case is None)

@fused
@pytest.mark.slow
def test_table(record_property, fake_cuda):
    "What fastai and ours need for xresnet50, printed below the other results"
    table,names = {},['step 2','step 10','step 12']
    for case in ALL:
        theirs = launches(case, xresnet_shapes()[:20], 'new', jit=False)
        row = {('fastai, for 20 of them',n):v for n,v in zip(names, theirs)}
        for gen,what in (('old','to 2.10'),('new','from 2.11')):
            row |= {(f'ours, {what}',n):v for n,v in zip(names, launches(case, xresnet_shapes(), gen))}
        row |= {('ours, CUDA 13',n):v for n,v in zip(names, launches(case, xresnet_shapes(), 'new', big=True))}
        table[case.native.__name__] = row
    df = pd.DataFrame(table).T
    title = "Kernel launches of a step on CUDA by ATen's rules: xresnet50, 167 tensors"
    record_property('show', f'{title}\n{df.to_string()}')
