"""All that the library has to know about a GPU, in one command: `python -m tests.gpu` in the root of a checkout

It writes a folder for the card, `nbs/performance/<card>/`: what the benchmark measures (cells.csv, training.csv,
machine.json, speed.png, and cold/), found.jsonl with what the other parts find, logs/, and a report of it all,
report.md. It needs PyTorch, fastai, pytest and pytest-xdist, and neither git, nbdev nor a network. Each part runs in
processes of its own: if one fails or its time is up, the others go on, and what was found is kept"""
import argparse,os,shutil,signal,subprocess,sys,tempfile,time
from pathlib import Path

import pandas as pd
import torch

from fastxtend_jit.report import Report,card_name
from tests.gpu.report import write_report

ROOT = Path(__file__).resolve().parents[2]

parser = argparse.ArgumentParser(prog='python -m tests.gpu', description=__doc__.splitlines()[0])
parser.add_argument('--device', default='cuda', help='`cpu` runs little of each part, to see that it works')
parser.add_argument('--limit', type=int, default=505, help='seconds for all')
parser.add_argument('--out', default='', help='folder; by default nbs/performance/<card>')
parser.add_argument('--parts', default='check,tests,parity,bench,launches,cold')

WEIGHTS = dict(check=150, bench=210, launches=60, cold=70)  # seconds; `check` is with `tests` and `parity`

class Part:
    "A process that runs until it ends or its time is up; what it prints goes to the log"
    def __init__(self, name, out, command, **env):
        self.name,self.began,self.log = name,time.monotonic(),(out/'logs'/f'{name}.txt').open('ab')
        # with threads of their own, processes that run at the same time wait for one another's cores
        env = {**os.environ, 'PYTHONPATH':os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]), **env}
        self.process = subprocess.Popen([sys.executable, '-u', '-W', 'ignore', *command], stdin=subprocess.DEVNULL,
                                        stdout=self.log, stderr=self.log, cwd=ROOT, env=env, start_new_session=True)

    def alive(self): return self.process.poll() is None

    def wait(self, until):
        "Exit status; `None` if it had to be ended"
        while self.alive() and time.monotonic() < until: time.sleep(0.05)
        cut = self.alive()
        for sig,grace in ((signal.SIGINT,5),(signal.SIGKILL,5)):  # pytest sums up at the first
            try:
                os.killpg(self.process.pid, sig)
                self.process.wait(grace)
            except (ProcessLookupError,subprocess.TimeoutExpired): pass
        self.seconds = time.monotonic()-self.began
        status = 'cut short' if cut else f'exit status {self.process.returncode}'
        print(f'{self.name}: {status}, {self.seconds:.0f} s', flush=True)
        return None if cut else self.process.returncode

class Run:
    "All parts on one device, into one folder"
    def __init__(self, device, limit, out, parts):
        self.device,self.out,self.parts = device,Path(out),parts
        self.end,self.small,self.took = time.monotonic()+limit,device == 'cpu',[]
        shutil.rmtree(self.out/'logs', ignore_errors=True)
        (self.out/'logs').mkdir(parents=True)
        (self.out/'found.jsonl').unlink(missing_ok=True)

    def until(self, name):
        "When a part has to end: it gets a share of what is left, by its weight among those to come"
        now,ahead = time.monotonic(),[*WEIGHTS.items()][[*WEIGHTS].index(name):]
        return now + (self.end-now)*WEIGHTS[name]/sum(w for n,w in ahead if n == name or n in self.parts)

    def start(self, name, *command, **env): return Part(name, self.out, command, **env)

    def worker(self, part, until):
        seconds = until-time.monotonic()-3
        return self.start(part, '-m', 'tests.gpu.parts', part, str(self.out/'found.jsonl'), self.device, str(seconds),
                          OMP_NUM_THREADS='1')

    def tests(self):
        select = 'gpu and not slow' if not self.small else 'not slow'
        some = ['-n','8'] if not self.small else ['-n','1','-k','test_model_to or test_signature']
        # where a package is missing, only the tests of one file are
        plugins = ['-p','tests.gpu.testlog','-p','no:cacheprovider','--continue-on-collection-errors']
        return self.start('tests', '-m', 'pytest', 'tests', '-q', '--tb', 'short', '-m', select, *some, *plugins,
                          OMP_NUM_THREADS='1', TESTLOG=str(self.out/'found.jsonl'))

    def note(self, part, until):
        status = part.wait(until)
        self.took.append((part.name, 'cut short' if status is None else status, round(part.seconds)))
        return status

    def at_once(self, until):
        "What is not timed runs at the same time"
        make = dict.fromkeys(('check','parity'), lambda n: self.worker(n, until)) | dict(tests=lambda n: self.tests())
        started = [f(n) for n,f in make.items() if n in self.parts]
        for p in started: self.note(p, until)

    def bench(self, until, name, out, *args):
        limit,threads = max(1, int(until-time.monotonic()-8)),{'OMP_NUM_THREADS':'1'} if self.small else {}
        return self.start(name, '-m', 'fastxtend_jit.bench', '--device', self.device, '--out', str(out), *args,
                          '--limit', str(limit), **threads)

    def measure(self, until):
        "The benchmark; if the device takes no more calls from its process, another one goes on with the next model"
        left = ['xresnet50','many_small','vit_b_16','tabular','xresnet18'] if not self.small else ['many_small']
        args = ['--parts','cells,training','--precision','fp32,fp16,bf16','--seconds','0.4']
        if self.small: args += ['--optimizers','adam,larc','--seconds','0.1']
        with tempfile.TemporaryDirectory() as d:
            found = []
            while left and until-time.monotonic() > 10:
                folder = Path(d)/left[0]
                status = self.note(self.bench(until, 'bench', folder, '--models', ','.join(left), *args), until)
                if (folder/'machine.json').exists():
                    found.append(Report.load(folder))
                    self.save(found)
                done = {m for r in found for m in ([] if r.cells.empty else r.cells.model)}
                if not status: break
                left = [m for m in left[1:] if m not in done]

    def save(self, reports):
        both = lambda n: pd.concat([pd.DataFrame(getattr(r, n)) for r in reports], ignore_index=True)
        Report(cells=both('cells'), training=both('training'), machine=reports[0].machine).save(self.out)

    def go(self):
        if {'check','tests','parity'} & self.parts: self.at_once(self.until('check'))
        if 'bench' in self.parts: self.measure(self.until('bench'))
        if 'launches' in self.parts:
            until = self.until('launches')
            for _ in range(3):
                if self.note(self.worker('launches', until), until) != 3: break  # else the device took no more calls
        if 'cold' in self.parts:
            some = ['--optimizers','adam' if self.small else 'adam,lamb,ranger','--rounds','1']
            self.note(self.bench(self.end, 'cold', self.out/'cold', '--parts', 'cold', *some), self.end)

def main(args):
    if args.device != 'cpu' and not torch.cuda.is_available():
        raise SystemExit('There is no GPU here that PyTorch can use, so nothing was measured. '
                         '`python -m tests.gpu --device cpu` shows that the command itself runs.')
    name = 'cpu' if args.device == 'cpu' else card_name(torch.cuda.get_device_name(args.device))
    run = Run(args.device, args.limit, args.out or ROOT/'nbs'/'performance'/name, {*args.parts.split(',')})
    def end(*_): raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, end)
    try: run.go()
    finally: print(write_report(run.out, run.took), f'\nAll of it is in {run.out}')
    if bad := [f'{name} ({status})' for name,status,_ in run.took if status]:
        raise SystemExit(f"Not as it should be: {', '.join(bad)}")

if __name__ == '__main__': main(parser.parse_args())
