"""Train on handwritten digits in several processes, with fastai's `distrib_ctx`.

One machine:      torchrun --nproc-per-node 2 train_distributed.py
With GPUs, also:  accelerate launch --multi_gpu --num_processes 2 train_distributed.py
Several machines: torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint FIRST_MACHINE:29500 train_distributed.py   (on each)
"""
from fastai.basics import *
from fastai.callback.all import *
from fastai.distributed import *
from fastxtend_jit.all import *
from sklearn.datasets import load_digits

@patch
def _broadcast(self:DistributedDL, t, rank):
    "As fastai's, which needs a GPU: the order of the data, from one process to all"
    t = [t]
    torch.distributed.broadcast_object_list(t, rank)
    return t[0]

def digits(bs):
    "8x8 images of digits, 80% of them for training"
    x,y = [torch.tensor(o) for o in load_digits(return_X_y=True)]
    x,i = x.float().view(-1,1,8,8)/16,torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train,valid = [[(x[j],y[j]) for j in o] for o in (i[:1437],i[1437:])]
    return DataLoaders(DataLoader(train, bs=bs, shuffle=True), DataLoader(valid, bs=bs))

@call_parse
def main(
    epochs:int=5, # Number of epochs
    bs:int=64, # Batch size of one process
    lr:float=1e-2, # Largest learning rate
    path:str='.' # Folder to save to, in `models/digits.pth`
):
    "Train a small network on digits, in as many processes as it is started in"
    gpu = torch.cuda.is_available()
    set_seed(0)
    model = nn.Sequential(ConvLayer(1,16), ConvLayer(16,32,stride=2), nn.Flatten(), nn.Linear(32*16,10))
    learn = Learner(digits(bs), model, CrossEntropyLossFlat(), opt_func=adam_jit, metrics=accuracy, path=path)
    with learn.distrib_ctx(sync_bn=gpu, cpu=not gpu): learn.fit_one_cycle(epochs, lr)

    learn.save('digits', with_opt=True)  # fastai saves in the first process only
    if not rank_distrib(): print(f'\n{max(1,num_distrib())} processes, accuracy {learn.recorder.values[-1][-1]:.3f}')
    teardown_distrib()
