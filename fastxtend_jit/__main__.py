"Versions, devices and kernels, as a bug report needs them: `python -m fastxtend_jit`"
import platform
from importlib.metadata import version

import torch

from . import __version__
from .fragments import has_fused
from .sgd import sgd_jit_step

def main():
    "Print what a bug report needs"
    print(f"fastxtend_jit {__version__}\npython {platform.python_version()} on {platform.platform()}\ntorch {torch.__version__}, {torch.get_num_threads()} threads")
    for lib in ('fastai','fastcore'): print(lib, version(lib))
    compiled = isinstance(sgd_jit_step.compiled, torch.jit.ScriptFunction)
    print("TorchScript:", "steps run compiled" if compiled else "steps run as plain Python, since TorchScript is switched off or does not support this Python")
    devices = {'cpu': platform.processor() or platform.machine(), **{f'cuda:{i}': torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}}
    if torch.backends.mps.is_available(): devices['mps'] = 'Apple GPU'
    for dev,name in devices.items():
        fused = [str(t)[6:] for t in (torch.float32,torch.float64,torch.bfloat16,torch.float16) if has_fused(dev.split(':')[0], t)]
        print(f"{dev} ({name}): fused kernels for {', '.join(fused) or 'no dtype'}")

if __name__ == '__main__': main()
