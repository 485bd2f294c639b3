"Versions, devices and kernels, as a bug report needs them: `python -m fastxtend_jit`, and with `--check` a comparison with fastai"
import argparse,platform,sys,warnings
from importlib.metadata import version

import torch

from . import __version__
from .proof import fused_fault
from .check import WholeTable
from .selfcheck import devices,selfcheck,summary
from .adam import adam_jit_step

def main():
    "Print what a bug report needs"
    parser = argparse.ArgumentParser(prog='python -m fastxtend_jit', description="Print versions, devices and kernels, as a bug report needs them.")
    parser.add_argument('--check', action='store_true', help="train with all eight optimizers in all forms and dtypes on every device, beside fastai's: less than a minute; exit status 1 if one differs")
    args = parser.parse_args()
    print(f"fastxtend_jit {__version__}\npython {platform.python_version()} on {platform.platform()}\ntorch {torch.__version__}, {torch.get_num_threads()} threads")
    for lib in ('fastai','fastcore'): print(lib, version(lib))
    compiled = isinstance(adam_jit_step.compiled, torch.jit.ScriptFunction)
    print("TorchScript:", "steps run compiled" if compiled else "steps run as plain Python, since TorchScript is switched off or does not support this Python")
    scalars = dict(step=1, lr=0.01, mom=0.9, sqr_mom=0.99, eps=1e-5, wd=0.01, do_wd=True, decouple_wd=True, fused=True)
    for dev in devices():
        name = {'cpu': platform.processor() or platform.machine(), 'mps': 'Apple GPU'}.get(dev.type) or torch.cuda.get_device_name(dev)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            fused = [str(t)[6:] for t in (torch.float32,torch.float64,torch.bfloat16,torch.float16) if not fused_fault(adam_jit_step, ('grad_avg','sqr_avg'), dev, t, scalars)]
        print(f"{dev} ({name}): fused kernels for {', '.join(fused) or 'no dtype'}")
    if not args.check: return
    res = selfcheck(progress=lambda s: print(s, flush=True))
    print(f"\nForms that are as they should be, and the largest distance from fastai's result in float64\n{summary(res)}\n")
    print(f"{res.ok.sum()} of {len(res)} forms are as they should be" + ('.' if res.ok.all() else ':'))
    if not res.ok.all(): sys.exit(f'{WholeTable(res[~res.ok])}')

if __name__ == '__main__': main()
