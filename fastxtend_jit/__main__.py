"Versions, devices and kernels, as a bug report needs them: `python -m fastxtend_jit`; `--check` compares with fastai"
import argparse,platform,sys,warnings
from importlib.metadata import version

import torch

from . import __version__
from .adam import adam_jit_step
from .parity import WholeTable
from .trial import why_not_fused
from .selfcheck import devices,selfcheck,summary

def print_versions():
    "What is installed, and whether steps run compiled"
    print("fastxtend_jit", __version__)
    print(f"python {platform.python_version()} on {platform.platform()}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for lib in ('fastai','fastcore'): print(lib, version(lib))
    print("TorchScript:", "steps run compiled" if adam_jit_step.is_compiled else
          "steps run as plain Python, since TorchScript is switched off or does not support this Python")

def device_name(dev):
    if dev.type == 'cpu': return platform.processor() or platform.machine()
    if dev.type == 'mps': return 'Apple GPU'
    return torch.cuda.get_device_name(dev)

def has_fused(dev, dtype):
    "Does Adam's fused kernel compute what it should, in `dtype` on `dev`?"
    scalars = dict(step=1, lr=0.01, mom=0.9, sqr_mom=0.99, eps=1e-5, wd=0.01, do_wd=True, decouple_wd=True, fused=True)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return not why_not_fused(adam_jit_step, ('grad_avg','sqr_avg'), dev, dtype, scalars)

def print_kernels():
    "Each device, and the dtypes that have fused kernels there"
    for dev in devices():
        dtypes = [o for o in ('float32','float64','bfloat16','float16') if has_fused(dev, getattr(torch, o))]
        print(f"{dev} ({device_name(dev)}): fused kernels for {', '.join(dtypes) or 'no dtype'}")

def check():
    "Compare all forms with fastai; if some are not as they should be, exit with a table of them and status 1"
    res = selfcheck(progress=lambda line: print(line, flush=True))
    failed = res[~res.ok]
    print("\nForms that are as they should be, and the largest distance from fastai's result in float64")
    print(summary(res), end='\n\n')
    print(f"{res.ok.sum()} of {len(res)} forms are as they should be" + (':' if len(failed) else '.'))
    if len(failed): sys.exit(str(WholeTable(failed)))

def main():
    "Print what a bug report needs"
    parser = argparse.ArgumentParser(
        prog='python -m fastxtend_jit', description="Print versions, devices and kernels, as a bug report needs them.")
    parser.add_argument('--check', action='store_true', help=(
        "train with all eight optimizers in all forms and dtypes on every device, beside fastai's: "
        "less than a minute; exit status 1 if one differs"))
    args = parser.parse_args()
    print_versions()
    print_kernels()
    if args.check: check()

if __name__ == '__main__': main()
