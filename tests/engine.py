"""The seam: whatever tests know about the engine's privates, they know from here

A test says what it wants: to forget what was tried, to cut into small batches, to stop in the kernels. How that is done
is for the functions below, and a change of the engine changes no other file of the tests."""
import gc
from contextlib import contextmanager,nullcontext
from types import SimpleNamespace
from unittest import mock
from weakref import WeakKeyDictionary

from fastxtend_jit import all as steps,fragments,learner,lookahead,optimizer,plan,step as step_room,trial
from fastxtend_jit.step import JitStep

# --- Plans and buckets

def engine_files():
    "Source files of what plans and takes a step"
    return {m.__file__ for m in (optimizer,lookahead,plan)}

def plan_of(opt):
    "What the last step went by; `None` if all has to be looked at anew"
    return opt._roster and opt._roster._last

def roster_of(opt):
    "What is known of all parameters that have had a gradient"
    return opt._roster

def slots_of(opt):
    "What is known of each of these, by its position among all parameters"
    return {**opt._roster.slots}

def number_of_plans(opt):
    "How many choices of who steps together are kept"
    return len(opt._roster._plans)

def keep_few_plans(monkeypatch):
    "The last 16 choices of who steps together are kept, however few parameters they are of"
    monkeypatch.setattr(plan, 'slots_kept', 0)

def drop_plan(opt):
    "The next step looks at everything anew"
    opt._roster = None

def states_of(opt):
    "Each parameter with the names of the state that its step asks for"
    ps = [p for pg in opt.param_lists for p in pg]
    return [(p,[n for n in t.states if n not in opt._listed]) for p,t in zip(ps, opt._takes(ps))]

def make_plan(opt, params, grads):
    "A plan by itself, which `opt` does not keep"
    x = opt._inputs()._replace(params=params, grads=grads, takes=opt._takes(params))
    res = plan.Roster(x).plan(x, opt._alike())
    for b in res.buckets: b.form(opt._scalars(b.key), opt._flags)
    return res

def prove(opt):
    "Try what the next step would do, without taking it"
    opt._prepare()
    drop_plan(opt)

def buckets_of(opt):
    "Parameters that took a step together"
    return plan_of(opt).buckets

def calls_of(opt):
    "The calls in which the next step runs"
    _,plan,forms,*_ = opt._prepare()
    return plan.calls(forms)

def why_not_fused(opt):
    "For each bucket, why it goes without the fused form of the step; empty if it takes it"
    return [form.why for form in opt._prepare()[2]]

def number_of_forms(opt):
    "How many ways to run its buckets are kept"
    return sum(len(b._forms) for b in buckets_of(opt))

def steps_taken(bucket):
    "How many steps its parameters have taken"
    return bucket.steps_taken

# --- How much at a time

def use_batches_of(monkeypatch, n):
    "No batch has more than `n` elements"
    monkeypatch.setattr(plan, 'batch_size', n)

def threads_can_change():
    "Does the engine set the number of threads for small tensors?"
    return plan.openmp()

def replace_cut(monkeypatch, make):
    "`make(cut)` in place of what cuts tensors into batches while a plan is made"
    monkeypatch.setattr(plan, 'cut', make(plan.cut))

# --- What is tried before it is used

def forget_trials(monkeypatch):
    "As in a new process: nothing has been tried"
    keep_faults_in(monkeypatch, WeakKeyDictionary())

def keep_faults_in(monkeypatch, faults):
    "A dict that outlasts a test, for what was found out about fused kernels of each step"
    monkeypatch.setattr(trial, '_tried', faults)

def faults_found():
    "What was found out about fused kernels: why they are not used, or an empty string, for each kind of step"
    return [why for tried in trial._tried.values() for (what,*_),why in tried.items() if what == 'fused']

def number_proved():
    "For how many kinds of steps the compiled form is known to be right"
    return sum(what == 'compiled' for tried in trial._tried.values() for what,*_ in tried)

def let_modes_in(monkeypatch):
    "Modes around a step hold in trials too, so that emulated kernels are tried"
    monkeypatch.setattr(trial, 'no_modes', nullcontext)

def set_fused_fault(monkeypatch, why):
    "All fused kernels are found to have the fault `why`, or none if it is empty"
    monkeypatch.setattr(trial, 'why_not_fused', lambda *_: why)

def watch_scalars(monkeypatch):
    "Two lists that get the scalars of each trial of a fused form, and of each run of a bucket, which runs nothing"
    tried,ran = [],[]
    monkeypatch.setattr(trial, 'why_not_fused', lambda *args: tried.append(args[4]) or '')
    monkeypatch.setattr(plan.Call, 'run', lambda self, grads, scalars: ran.extend(scalars[k] for k in self.at))
    return tried,ran

def watch_trials(monkeypatch):
    "A list that gets an item for each step that is taken to try one"
    taken,run = [],trial._Trial.run
    monkeypatch.setattr(trial._Trial, 'run', lambda *args: taken.append(args) or run(*args))
    return taken

# --- The step as it runs

def set_compile_after(n, monkeypatch=None):
    "Lazy steps are compiled after `n` uses"
    if monkeypatch: monkeypatch.setattr(step_room, 'compile_after', n)
    else: step_room.compile_after = n

def refuse_to_compile(monkeypatch, step):
    "TorchScript refuses the function of `step`"
    compiles = step_room._script
    def refuse(obj):
        if obj is step.fn: raise RuntimeError('not this one')
        return compiles(obj)
    monkeypatch.setattr(step_room, '_script', refuse)

def has_compiled(step):
    "Has TorchScript compiled it, so far?"
    return isinstance(vars(step).get('compiled'), step_room.ScriptFunction)

def runs_compiled(opt):
    "Does the next step of `opt` run compiled, if nothing has changed?"
    return all([*b._forms][-1][0] for b in buckets_of(opt))

def run_instead(monkeypatch, step, fn):
    "`fn` runs where the compiled `step` would"
    monkeypatch.setitem(vars(step), 'compiled', fn)

def run_uncompiled(monkeypatch, *steps):
    "The plain functions run, as where TorchScript cannot compile"
    for s in steps: run_instead(monkeypatch, s, s.fn)

def forget_compiled():
    "Steps over batches are compiled anew"
    for o in gc.get_objects():
        if type(o) is JitStep: o._loops.clear()

def without_torchscript(monkeypatch):
    "TorchScript cannot compile, and nobody was told so far"
    monkeypatch.setattr(step_room, 'torchscript_ok', lambda: False)
    monkeypatch.setattr(step_room, '_warned', [])

def replace_kernels(monkeypatch, opt, make):
    "`make(run)` in place of each call over batches that is made of the step of `opt`"
    batched,made = type(opt.opt_step).batched,{}
    def _batched(self, *args, **kw): run = batched(self, *args, **kw); return made.setdefault(run, make(run))
    monkeypatch.setattr(type(opt.opt_step), 'batched', _batched)

def interrupt_storing(monkeypatch):
    "Ctrl-C while a step's lists are stored on TorchScript's side"
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(JitStep, 'to_script', stop)

def replace_run(monkeypatch, opt, fn):
    "`fn` in place of what runs the kernels of a call"
    monkeypatch.setattr(plan.Call, 'run', lambda *_: fn())

def replace_lookahead(monkeypatch, fn):
    "`fn` in place of Lookahead's interpolation"
    monkeypatch.setattr(lookahead, '_look_ahead', lambda *_: fn())

# --- CUDA without a GPU

def as_on_cuda(monkeypatch):
    """Nothing is cut, no step takes its tensors for a CPU's, betas are rounded

    What is compiled cannot be patched, so the plain functions run"""
    key,beta = plan.Key,fragments.kernel_beta
    monkeypatch.setattr(plan, 'Key', lambda **kw: key(**{**kw, 'cuttable':False, 'single_thread':False}))
    monkeypatch.setattr(fragments, 'kernel_beta', lambda b,x: beta(b, SimpleNamespace(is_cpu=False, dtype=x.dtype)))
    for step in vars(steps).values():
        if isinstance(step, JitStep): monkeypatch.setitem(vars(step), 'compiled', step.fn)

def set_generation(monkeypatch, gen):
    "Scalars are those of PyTorch 2.4 to 2.10 ('old') or from 2.11 on ('new')"
    monkeypatch.setattr(optimizer, 'SPREAD_SCALARS', gen == 'old')

@contextmanager
def pytorch(
    gen='new', # By the rules of PyTorch 2.4 to 2.10 ('old') or from 2.11 on ('new')
    fused=True # Do fused kernels hold?
):
    "Steps as they are on CUDA with another PyTorch"
    with (mock.patch.object(trial, 'why_not_fused', lambda *_: '' if fused else 'none'),
          mock.patch.object(optimizer, 'SPREAD_SCALARS', gen == 'old')): yield

# --- Conversion

def counterpart(f, jit):
    "The factory that goes with `f`: ours, or fastai's"
    return learner._counterpart(f, jit)

def converted(opt, jit):
    "A live optimizer like `opt`: ours, or fastai's"
    return learner._converted(opt, jit)
