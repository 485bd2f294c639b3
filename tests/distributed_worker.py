"Run by `torchrun` in two processes: every check of `test_distributed.py`, as starting takes longer than checking"
import json,sys,traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn,Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from fastcore.basics import noop,patch
from accelerate import Accelerator
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoader,DataLoaders
from fastai.distributed import DistributedDL
from fastai.learner import Learner
from fastai.losses import MSELossFlat

from tests.cases import *

try:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor,Replicate,Shard,distribute_tensor
except ImportError: fully_shard,DTensor = None,()  # before PyTorch 2.6

tol = TOL[torch.float64]
gen = torch.Generator().manual_seed(0)
xs,ys = [torch.randn(10,8,n,generator=gen).double() for n in (7,6)]  # 10 batches: RAdam rectifies from the 6th on

def net():
    "5 rows are not divisible by two processes; of 1 row, one process has none"
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7,5), nn.Tanh(), nn.Linear(5,1), nn.Tanh(), nn.Linear(1,6)).double()

def groups(m): return [[*m[:2].parameters()], [*m[2:].parameters()]]
def make(case, m):
    opt = case.make(groups(m), True, lr=[0.01,0.02])
    opt.state[m[0].bias]['do_wd'] = False
    return opt

def mine(t): return t.chunk(2)[dist.get_rank()]
def train(m, opt, part=noop, steps=range(10), after=noop):
    for i in steps:
        mse_loss(m(part(xs[i])), part(ys[i])).backward()
        after(m)
        opt.step()
        opt.zero_grad()
    return opt

def full(t): return t.full_tensor() if isinstance(t, DTensor) else t
def equal(ours, theirs):
    "Have both the same parameters and state, whole or sharded?"
    for (p,_,s,_),(q,_,t,_) in zip(ours.all_params(), theirs.all_params()):
        close(full(p), full(q), tol, 'parameter')
        assert s.keys() == t.keys()
        for k in s:
            if isinstance(s[k], Tensor): close(full(s[k]), full(t[k]), tol, k)
            else: assert s[k] == t[k], k

def same_on_both(m):
    for p in m.parameters():
        both = [torch.empty_like(p) for _ in range(2)]
        dist.all_gather(both, p.detach())
        assert torch.equal(*both)

def ddp(case):
    one,two = net(),net()
    wrapped = DistributedDataParallel(two)
    equal(train(wrapped, make(case, two), mine), train(one, make(case, one)))
    same_on_both(two)

@patch
def _broadcast(self:DistributedDL, t, rank):
    "fastai's moves the indices to a GPU"
    t = [t]
    dist.broadcast_object_list(t, rank)
    return t[0]

def accelerate(case):
    "fastai gives each process one half of the data: what they do at a time is the batch of one process"
    x,y = xs.flatten(0,1),ys.flatten(0,1)
    i = torch.arange(80).view(2,10,4).transpose(0,1).flatten()
    learns = []
    for bs,x,y in ((4,x,y),(8,x[i],y[i])):
        dls = DataLoaders(*[DataLoader(list(zip(x,y)), bs=bs) for _ in range(2)])
        learn = Learner(dls, net(), MSELossFlat(), opt_func=partial(case.make, jit=True), splitter=groups, lr=0.01)
        learn.logger = noop
        learns.append(learn.remove_cb(ProgressCallback))
    two,one = learns
    with two.distrib_ctx(sync_bn=False, cpu=True): two.fit(2)
    one.fit(2)
    equal(two.opt, one.opt)
    same_on_both(two.model)

def accumulate(case):
    "Accelerate in a loop of one's own: two batches to a step, of which each process has one half"
    acc = Accelerator(cpu=True, gradient_accumulation_steps=2)
    one,two = net(),net()
    ours,ref = make(case, two),make(case, one)
    m,opt = acc.prepare(two, ours.as_torch())
    for x,y in zip(xs, ys):
        with acc.accumulate(m):
            acc.backward(mse_loss(m(mine(x)), mine(y)))
            opt.step()
            opt.zero_grad()
    for x,y in zip(*(t.unflatten(0, (5,2)).flatten(1,2) for t in (xs,ys))):
        mse_loss(one(x), y).backward()
        ref.step()
        ref.zero_grad()
    equal(ours, ref)
    same_on_both(two)

def shard(m, mesh):
    for l in m:
        if isinstance(l, nn.Linear): fully_shard(l, mesh=mesh)
    return fully_shard(m, mesh=mesh)

def sharded_like(opt):
    "Is the state sharded as its parameter?"
    def like(v, p):
        return isinstance(v, DTensor) and v.placements == p.placements and v.to_local().shape == p.to_local().shape
    for (p,_,s,_),w in zip(opt.all_params(), slow(opt) or [None]*99):
        ts = [v for v in [*(v for n,v in s.items() if n != 'local_lr'),w] if isinstance(v, Tensor)]
        assert ts and all(like(v, p) for v in ts)
        if 'step' in s: assert s['step'] == 10  # also where this process has no row of it

def fsdp(case):
    one,two = net(),shard(net(), init_device_mesh('cpu', (2,)))
    ref = train(one, make(case, one))
    opt = train(two, make(case, two), mine, range(5))
    sd,opt = opt.state_dict(),make(case, two)
    opt.load_state_dict(sd)                # goes on from its own state
    train(two, opt, mine, range(5,10))
    equal(opt, ref)
    sharded_like(opt)
    assert all(not full(p.grad).any() for p in two.parameters())

    # state that is not sharded is refused, and named
    was = [full(p).clone() for p in two.parameters()]
    with_full = {**opt.state_dict(), 'state': ref.state_dict()['state']}
    try: opt.load_state_dict(with_full); assert False, 'whole state was loaded for shards'
    except ValueError as e: assert 'parameter 0 of group 0' in str(e) and 'device_mesh' in str(e), e
    assert all(torch.equal(full(p), w) for p,w in zip(two.parameters(), was))
    sharded_like(opt)

def hsdp(case):
    "Two dimensions of processes: replicas of shards"
    one,two = net(),shard(net(), init_device_mesh('cpu', (1,2), mesh_dim_names=('replica','shard')))
    equal(train(two, make(case, two), mine), train(one, make(case, one)))

def mixed(case):
    "Some parameters are sharded, others are not"
    one,two = net(),net()
    for i in (0,4): fully_shard(two[i], mesh=init_device_mesh('cpu', (2,)))
    def reduce(m):
        for p in m[2].parameters():
            dist.all_reduce(p.grad)
            p.grad.div_(2)
    equal(train(two, make(case, two), mine, after=reduce), train(one, make(case, one)))

def placements(case, has=lambda i,j: True):
    "Tensors split in other ways, with gradients that are placed in another way than their parameters"
    mesh,shapes = init_device_mesh('cpu', (2,)),[(6,4),(5,3),(3,),(4,4)]
    torch.manual_seed(0)
    ts,place = [torch.randn(s).double() for s in shapes],[[Shard(1)],[Replicate()],[Shard(0)],[Shard(0)]]
    ps = [nn.Parameter(t.clone()) for t in ts]
    qs = [nn.Parameter(distribute_tensor(t, mesh, pl)) for t,pl in zip(ts, place)]
    ref,opt = case.make(ps, True),case.make(qs, True)
    for i in range(10):
        for j,(p,q) in enumerate(zip(ps, qs)):
            p.grad = torch.randn(p.shape).double()
            q.grad = distribute_tensor(p.grad, mesh, [Replicate() if (i+j)%2 else Shard(0)])
            if not has(i, j): p.grad = q.grad = None
        ref.step()
        opt.step()
    equal(opt, ref)

def sets(case):
    "Sets of gradients that change"
    placements(case, lambda i,j: (i+j)%3)

CHECKS = [ddp, accelerate, accumulate] + [fsdp, hsdp, mixed, placements, sets]*bool(fully_shard)

def main(path):
    "Write what went wrong, by check and optimizer, to `path`"
    dist.init_process_group('gloo', timeout=timedelta(minutes=5))  # if one process fails, the other waits in vain
    res = {}
    for f in CHECKS:
        for c in ALL+AHEAD:
            wrong,both = '',[None,None]
            try: f(c)
            except Exception:
                wrong = f'{f.__name__}-{c}, process {dist.get_rank()}: {traceback.format_exc()}'
                print(wrong, file=sys.stderr, flush=True)  # now: where only one process fails, the two part here
            dist.all_gather_object(both, wrong)
            res[f'{f.__name__}-{c}'] = ''.join(both)
    if dist.get_rank() == 0: Path(path).write_text(json.dumps(res))
    dist.barrier()  # in PyTorch 2.4, a process that leaves while the other still does can leave it waiting
    dist.destroy_process_group()

if __name__ == '__main__': main(sys.argv[1])
