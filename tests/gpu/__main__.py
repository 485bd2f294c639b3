"""All that the library has to know about a GPU, in one command: `python -m tests.gpu` in the root of a checkout

It writes a folder for the card, `nbs/performance/<card>/`: what the benchmark measures (cells.csv, training.csv,
machine.json, speed.png, and cold/), found.jsonl with what the other parts find, logs/, and a report of it all,
report.md. It needs PyTorch, fastai, pytest and pytest-xdist, and neither git, nbdev nor a network. Each part runs in
processes of its own: if one fails or its time is up, the others go on, and what was found is kept, also on Ctrl-C"""
import argparse,json,os,shutil,signal,subprocess,sys,time,traceback
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from fastxtend_jit.report import Report,card_name
from tests.gpu.report import read,write_report

ROOT = Path(__file__).resolve().parents[2]

# The stage of each part, and the seconds that a stage takes
PARTS = dict(check='check', tests='check', parity='check', bench='bench', launches='launches', cold='cold')
WEIGHTS = dict(check=120, bench=210, launches=60, cold=100)

def parts(text):
    "Names of parts"
    res = {*text.replace(',', ' ').split()}
    if wrong := res-{*PARTS}:
        raise argparse.ArgumentTypeError(f"there is no part {', '.join(sorted(wrong))}; there are {', '.join(PARTS)}")
    return res

def say(*text):
    try: print(*text, flush=True)
    except OSError: pass  # the terminal has gone

parser = argparse.ArgumentParser(prog='python -m tests.gpu', description=__doc__.splitlines()[0])
parser.add_argument('--device', default='cuda', help='`cpu` runs little of each part, to see that it works')
parser.add_argument('--limit', type=int, default=505, help='seconds for all')
parser.add_argument('--out', default='', help='folder; by default nbs/performance/<card>')
parser.add_argument('--parts', default=','.join(PARTS), type=parts, help='%(default)s, or some of them')

class Part:
    "A process; what it prints goes to the log"
    def __init__(self, name, out, command, **env):
        self.name,self.began,self.log = name,time.monotonic(),(out/'logs'/f'{name}.txt').open('ab')
        # with threads of their own, processes that run at the same time wait for one another's cores
        env = {**os.environ, 'PYTHONPATH':os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]), **env}
        self.process = subprocess.Popen([sys.executable, '-u', '-W', 'ignore', *command], stdin=subprocess.DEVNULL,
                                        stdout=self.log, stderr=self.log, cwd=ROOT, env=env, start_new_session=True)

    def alive(self): return self.process.poll() is None

    def stop(self):
        "Exit status, or that it had to be ended"
        cut = self.alive()
        for sig,grace in ((signal.SIGINT,5),(signal.SIGKILL,5)):  # pytest sums up at the first
            try:
                os.killpg(self.process.pid, sig)
                self.process.wait(grace)
            except (ProcessLookupError,subprocess.TimeoutExpired): pass
        return 'cut short' if cut else self.process.returncode

class Run:
    "All parts on one device, into one folder"
    def __init__(self, device, limit, out, parts):
        self.device,self.out,self.parts = device,Path(out).resolve(),parts
        self.end,self.small,self.took,self.running = time.monotonic()+limit,device == 'cpu',[],[]
        self.forget()

    def forget(self):
        "What these parts left another time would pass for new; what others left stays"
        (self.out/'logs').mkdir(parents=True, exist_ok=True)
        left = [f'logs/{p}.txt' for p in self.parts]
        if 'bench' in self.parts: left += ['logs/bench','cells.csv','training.csv','machine.json','speed.png']
        if 'cold' in self.parts: left += ['cold']
        for p in (self.out/n for n in left): shutil.rmtree(p) if p.is_dir() else p.unlink(missing_ok=True)
        kept = [json.dumps(r)+'\n' for r in read(self.out/'found.jsonl') if r['part'] not in self.parts]
        (self.out/'found.jsonl').write_text(''.join(kept))

    def stop(self, *_):
        "Time is up for all that runs, and nothing more is begun. A handler of signals: it interrupts nothing half done"
        self.end = 0

    def until(self, name):
        "When a part has to end: it gets a share of what is left, by its weight among those to come"
        now,ahead = time.monotonic(),[*WEIGHTS.items()][[*WEIGHTS].index(name):]
        return now + (self.end-now)*WEIGHTS[name]/sum(w for n,w in ahead if n == name or n in self.parts)

    def start(self, name, *command, **env):
        self.running.append(Part(name, self.out, command, **env))
        return self.running[-1]

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

    def over(self, until): return time.monotonic() > min(until, self.end)

    def note(self, part, until):
        "Wait for a part until it ends or its time is up, and put down how that went"
        while part.alive() and not self.over(until): time.sleep(0.05)
        status,seconds = part.stop(),round(time.monotonic()-part.began)
        self.running.remove(part)
        self.took.append((part.name, status, seconds))
        say(f'{part.name}: {"exit status "*isinstance(status, int)}{status}, {seconds} s')
        return status

    def together(self, make, until):
        "Parts that run at the same time. Status 3: the device takes no more calls from a process, so another goes on"
        for f in make.values(): f()
        begun = dict.fromkeys(make, 1)
        while self.running:
            time.sleep(0.05)
            for p in [p for p in self.running if not p.alive() or self.over(until)]:
                if self.note(p, until) == 3 and p.name != 'tests' and begun[p.name] < 3:
                    begun[p.name] += 1
                    make[p.name]()

    def at_once(self, until):
        "What is not timed runs at the same time"
        make = {n: partial(self.worker, n, until) for n in ('check','parity')} | dict(tests=self.tests)
        self.together({n:f for n,f in make.items() if n in self.parts}, until)

    def launches(self, until): self.together(dict(launches=partial(self.worker, 'launches', until)), until)

    def bench(self, until, name, out, *args):
        limit,threads = max(1, int(until-time.monotonic()-8)),{'OMP_NUM_THREADS':'1'} if self.small else {}
        return self.start(name, '-m', 'fastxtend_jit.bench', '--device', self.device, '--out', str(out), *args,
                          '--limit', str(limit), **threads)

    def measure(self, until):
        "The benchmark; if the device takes no more calls from its process, another one goes on with the next model"
        left = ['xresnet50','many_small','vit_b_16','tabular','xresnet18'] if not self.small else ['many_small']
        args = ['--parts','cells,training','--precision','fp32,fp16,bf16','--seconds','0.4']
        if self.small: args += ['--optimizers','adam,larc','--seconds','0.1']
        try:
            for i in range(len(left)):
                folder = self.out/'logs'/'bench'/str(i)
                status = self.note(self.bench(until, 'bench', folder, '--models', ','.join(left), *args), until)
                done = {*Report.load(folder).cells.get('model', ())} if (folder/'machine.json').exists() else ()
                left = [m for m in left[1:] if m not in done]
                if not (status and left) or self.over(until-10): break
        finally: self.merge()

    def merge(self):
        "Figures of all processes of the benchmark as those of one, and then the chart, which alone could fail"
        reports = [Report.load(f.parent) for f in sorted((self.out/'logs'/'bench').glob('*/machine.json'))]
        if not reports: return
        both = lambda n: pd.concat([pd.DataFrame(getattr(r, n)) for r in reports], ignore_index=True)
        res = Report(cells=both('cells'), training=both('training'), machine=reports[0].machine)
        res.save(self.out, charts=False)
        shutil.rmtree(self.out/'logs'/'bench')
        res.save(self.out)

    def cold(self, until):
        some = ['--optimizers','adam' if self.small else 'adam,lamb,ranger','--rounds','1']
        self.note(self.bench(until, 'cold', self.out/'cold', '--parts', 'cold', *some), until)

    def go(self):
        for stage,f in dict(check=self.at_once, bench=self.measure, launches=self.launches, cold=self.cold).items():
            names = [n for n,s in PARTS.items() if s == stage and n in self.parts]
            until = self.until(stage)
            if self.over(until-10): self.took += [(n, 'not begun', 0) for n in names]
            elif names: self.attempt(stage, f, until)

    def attempt(self, stage, f, until):
        "Whatever goes wrong here, not in the parts' processes, ends no other stage"
        try: f(until)
        except Exception as e:
            with (self.out/'logs'/f'{stage}.txt').open('a') as log: log.write(traceback.format_exc())
            self.took.append((stage, type(e).__name__, 0))
        for p in [*self.running]: self.note(p, 0)

def main(args):
    if args.device != 'cpu' and not torch.cuda.is_available():
        raise SystemExit('There is no GPU here that PyTorch can use, so nothing was measured. '
                         '`python -m tests.gpu --device cpu` shows that the command itself runs.')
    name = 'cpu' if args.device == 'cpu' else card_name(torch.cuda.get_device_name(args.device))
    run = Run(args.device, args.limit, args.out or ROOT/'nbs'/'performance'/name, args.parts)
    for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(s) != signal.SIG_IGN: signal.signal(s, run.stop)  # `nohup` ignores one
    try: run.go()
    finally: say(write_report(run.out, run.took), f'\nAll of it is in {run.out}')
    if bad := [f'{name} ({status})' for name,status,_ in run.took if status]:
        raise SystemExit(f"Not as it should be: {', '.join(bad)}")

if __name__ == '__main__': main(parser.parse_args())
