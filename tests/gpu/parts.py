"""What `python -m tests.gpu` measures beside the benchmark, each part in a process of its own

`python -m tests.gpu.parts PART FILE DEVICE SECONDS` appends to FILE what it finds, a line of JSON each, so that little
is lost if it dies, and one that follows does not begin again what it began"""
import json,os,sys,tempfile,time,traceback,warnings
from collections import Counter
from pathlib import Path
from typing import List

import torch

from fastxtend_jit import __main__ as command,bench,launches as estimate,parity as beside,report,selfcheck
from fastxtend_jit.all import *
from fastxtend_jit.optimizer import SPREAD_SCALARS
from tests import engine
from tests.cases import OTHERS,PAIRS,VARIANTS
from tests.gpu.report import PROMISED,read
from tests.tools.launches import with_grads,xresnet_shapes

class Found:
    "What a part finds, and what of it was tried"
    def __init__(self, part, file, device, seconds):
        self.part,self.file,self.device = part,Path(file),torch.device(device)
        self.end,self.heard,self.failed = time.monotonic()+seconds,set(),False
        self.tried = {r['key'] for r in read(self.file) if (r['part'],r['kind']) == (part,'begun')}
        warnings.showwarning = self._heard
        warnings.simplefilter('default')  # the process was started with none

    @property
    def small(self):
        "On a CPU all is run, but little of it: that only shows that it runs"
        return self.device.type == 'cpu'

    def put(self, kind, **values):
        with self.file.open('a') as f: f.write(json.dumps(dict(part=self.part, kind=kind, **values), default=str)+'\n')

    def run(self, key, f, *args):
        "Call `f`, unless it was begun before or time is up; what it raises is put down"
        if key in self.tried: return
        if time.monotonic() > self.end: return self.put('left out', key=key)
        self.put('begun', key=key)
        try: f(self, *args)
        except Exception:
            text,self.failed = traceback.format_exc(),True
            print(f'{key} failed\n{text}', flush=True)
            self.put('error', key=key, text=text[-3000:])
            self._or_end()

    def _or_end(self):
        "If the device takes no more calls from this process, end it: another goes on"
        try: self.sync()
        except Exception: sys.stdout.flush(); os._exit(3)

    def sync(self):
        if not self.small: torch.cuda.synchronize()

    def _heard(self, message, category, filename, *_):
        text = f'{category.__name__}: {message}'
        print(text, flush=True)
        if (Path(filename).parent.name == 'fastxtend_jit' or 'fused' in text) and text not in self.heard:
            self.heard.add(text)
            self.put('warning', text=text)

    def with_grads(self, shapes):
        bench._fill(ps := with_grads(shapes, self.device))
        return ps

# --- Is it right?

def checked(found):
    "What is here, and `--check` for this device alone"
    command.devices = lambda: [found.device]
    command.print_versions()
    command.print_kernels()
    found.put('machine', **report.machine(), device=str(found.device), torch_cuda=torch.version.cuda)
    if not found.small:
        p = torch.cuda.get_device_properties(found.device)
        found.put('card', name=p.name, memory_gib=round(p.total_memory/2**30, 1), capability=f'{p.major}.{p.minor}',
                  multiprocessors=p.multi_processor_count, l2_mib=getattr(p, 'L2_cache_size', 0)/2**20)
    dtypes = (torch.float32,) if found.small else tuple(selfcheck._rounding)
    for dtype in dtypes:
        res = selfcheck.selfcheck([found.device], (dtype,), 4 if found.small else 25)
        print(selfcheck.summary(res), flush=True)
        for r in res.to_dict('records'): found.put('check', **r)
        found.failed |= not res.ok.all()

def _beside_fastai(found, native, jit, form):
    res = beside.compare_forms(native, jit, {'wd':0.01, **form}, device=found.device).iloc[0]
    found.put('parity', optimizer=jit.__name__, form=', '.join(f'{k}={v}' for k,v in form.items()), **res)
    found.failed |= not all(res[d] <= tol for d,tol in PROMISED.items())

def parity(found):
    "25 steps beside fastai's, every form"
    for native,jit in (PAIRS+OTHERS)[:2 if found.small else None]:
        for kw in VARIANTS[jit]:
            for form in (kw, {**kw, 'decouple_wd':False}):
                found.run(f'{jit.__name__} {form}', _beside_fastai, native, jit, form)

# --- Launches, waits, and kernels that are compiled at run time

def profiled(found, f):
    "What the profiler sees while `f` runs: kernels and copies on the device, and calls of the CUDA library"
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA]*(not found.small)
    found.sync()
    with torch.profiler.profile(activities=kinds) as prof:
        with torch.profiler.record_function('measured here'): f()
        found.sync()
    with tempfile.TemporaryDirectory() as d:
        prof.export_chrome_trace(f'{d}/trace.json')
        events = [e for e in json.loads(Path(f'{d}/trace.json').read_text())['traceEvents'] if 'cat' in e]
    span = next(e for e in events if e['name'] == 'measured here' and e['cat'] == 'user_annotation')
    def of(*cats, inside=False):
        within = lambda e: not inside or span['ts'] <= e['ts'] <= span['ts']+span['dur']
        return [e for e in events if e['cat'] in cats and within(e)]
    kernels = of('kernel')
    if not (found.small or kernels): raise RuntimeError('The profiler sees no kernels: CUPTI cannot trace here')
    foreign = Counter(e['name'] for e in kernels if '::' not in e['name'])  # not ATen's
    return dict(kernels=len(kernels), copies=len(of('gpu_memcpy','gpu_memset')), foreign=dict(foreign),
                busy_ms=sum(e.get('dur', 0) for e in kernels)/1e3,
                calls=dict(Counter(e['name'] for e in of('cuda_runtime','cuda_driver', inside=True))))

def _estimate(found, opt, k, **kw):
    with estimate.Launches('old' if SPREAD_SCALARS else 'new', device=found.device.type, **kw) as l:
        for _ in range(k): opt.step()
    return l.total/k

def _launches(found, name, ours):
    row,shapes = bench.rows[name],[(8,8),(8,)]*5 if found.small else xresnet_shapes()
    opt = row.make(found.with_grads(shapes), ours)
    k = getattr(opt, 'k', 6 if name == 'ranger' else 1)
    for _ in range(2*k+8): opt.step()
    seen = profiled(found, lambda: [opt.step() for _ in range(k)])
    waits = {n:c for n,c in seen['calls'].items() if 'Synchronize' in n or n in ('cudaMemcpy','cudaStreamQuery')}
    found.put('launches', optimizer=name, who='ours' if ours else 'fastai', tensors=len(shapes),
              launches=(seen['kernels']+seen['copies'])/k, estimate=_estimate(found, opt, k),
              cuda_13=_estimate(found, opt, k, big=True), busy_ms=seen['busy_ms']/k, waits=waits)

def _waits(found, name):
    "Steps with changing hypers, two buckets and a gradient to copy, while PyTorch refuses to let the host wait"
    ps = found.with_grads([(), (3,), (129,), (64,64), (30,7,3,3), (16,8,1,1)])
    ps[4].grad = ps[4].grad.to(memory_format=torch.channels_last)
    opt = bench.rows[name].make(ps, True)
    for p in ps[::3]: opt.state[p]['do_wd'] = False
    for _ in range(3): opt.step()
    def some():
        for i in range(13): opt.set_hypers(lr=1e-6*(1+i), mom=0.9-i/1000); opt.step()
        opt.zero_grad()
    found.put('waits', optimizer=name, found=_first_wait(found, some))

def _first_wait(found, f):
    found.sync()
    if not found.small: torch.cuda.set_sync_debug_mode('error')
    try: f()
    except RuntimeError as e: return str(e).strip().splitlines()[-1]  # TorchScript's begin with where it was
    finally:
        if not found.small: torch.cuda.set_sync_debug_mode('default')
    return ''

def _a_wait_is_seen(found):
    x = torch.ones(3, device=found.device)
    found.put('waits', optimizer='x.sum().item()', found=_first_wait(found, lambda: x.sum().item()))

def fusible(params:List[torch.Tensor], grads:List[torch.Tensor], lr:float):
    n = torch.stack(torch._foreach_norm(params))
    q = lr * n / (n*0.1 + n + 1.)
    torch._foreach_addcmul_(params, grads, torch.where(q < lr, q, lr).unbind(), -1.)

def _compiled(found, name):
    "Does TorchScript make kernels of its own for a step? For the example above it should"
    ps = found.with_grads([(4,3),(5,),(64,64)])
    opt = JitOptimizer(ps, fusible, lr=0.1) if name == 'example' else bench.rows[name].make(ps, True)
    opt.step()
    engine.forget_compiled()  # the trials, with lists of several lengths, would keep TorchScript's compiler away
    engine.drop_plan(opt)
    kernels = Counter()
    for _ in range(5): kernels.update(profiled(found, opt.step)['foreign'])
    found.put('compiled', optimizer=name, group='TensorExprGroup' in str(torch.jit.last_executed_optimized_graph()),
              kernels=dict(kernels))

def launches(found):
    "Launches beside the estimate, waits, and kernels compiled at run time"
    found.run('a wait is seen', _a_wait_is_seen)
    names = [*bench.rows][:3] if found.small else [*bench.rows]
    for n in names: found.run(f'waits {n}', _waits, n)
    for n in names:
        for ours in (True,False):
            if ours or bench.rows[n].native: found.run(f'launches {n} {ours}', _launches, n, ours)
    for n in ('example',*names): found.run(f'compiled {n}', _compiled, n)

PARTS = dict(check=checked, parity=parity, launches=launches)

def main(part, file, device, seconds):
    engine.set_compile_after(0)  # steps run compiled from the first on
    found = Found(part, file, device, float(seconds))
    if part == 'check': found.run('check', checked)
    else: PARTS[part](found)
    sys.exit(found.failed)

if __name__ == '__main__': main(*sys.argv[1:])
