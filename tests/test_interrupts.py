"A step that is interrupted, anywhere: its state can be loaded, and training goes on"
import signal,sys
from copy import deepcopy

import pytest
import torch

from tests import engine
from tests.cases import *
from tests.support import Interrupt,every,parameters,params_of,trained

EVERY = [pytest.param(1, marks=pytest.mark.slow, id='every line'), pytest.param(13, id='every 13th line')]

def interrupted(opt, n):
    "Has a step of `opt` been interrupted at the `n`-th line of the engine? One call of the kernels counts as a line"
    files,left = engine.engine_files(),[n]
    def trace(frame, event, arg):
        if frame.f_code.co_filename not in files: return
        if event == 'line':
            left[0] -= 1
            if left[0] == 0: raise Interrupt
        return trace
    old = sys.gettrace()
    sys.settrace(trace)
    try: opt.step()
    except Interrupt: return True
    finally:
        sys.settrace(old)
        torch.set_grad_enabled(True)  # left off where the `finally` that puts it back is interrupted
    return False

@every
@pytest.mark.parametrize('steps', [0,1])  # Ranger's second is a lookahead
@pytest.mark.parametrize('apart', EVERY)
def test_interrupted_anywhere(case, steps, apart):
    "The state can be loaded, and training goes on, each parameter from where it is"
    n = 1 - apart + ALL.index(case)%apart  # not at the same lines for all
    while n := n+apart:
        opt = trained(case, steps)
        if not interrupted(opt, n): break
        for p,names in engine.states_of(opt): assert {*names} <= {*opt.state[p]} or not {*names} & {*opt.state[p]}, n
        fresh = trained(case, 0)
        fresh.load_state_dict(deepcopy(opt.state_dict()))
        if hasattr(opt, 'slow_weights') and steps: assert opt.slow_weights is not None
        for p,q in zip(params_of(opt), params_of(fresh)): q.data.copy_(p.data); q.grad = p.grad.clone()
        for _ in range(2):
            for o in (opt,fresh): o.step()
        for p,q in zip(params_of(opt), params_of(fresh)): assert p.isfinite().all() and torch.equal(p, q), n
    assert n > 50

@every
@pytest.mark.parametrize('err', [KeyboardInterrupt,RuntimeError])
@pytest.mark.parametrize('steps', [0,2])
@pytest.mark.parametrize('together', [False,True])
def test_interrupted_in_kernels(case, err, steps, together, monkeypatch):
    """A Ctrl-C comes through when the kernels are done: the steps of this call's buckets count

    An error of a kernel stops it before it has begun. Compiled, buckets are together in a call"""
    engine.set_compile_after(0 if together else 10**9, monkeypatch)
    last = 1 if together else 2
    opt,ref = (trained(case, steps, shapes=((3,4),(3,4),(2,2))) for _ in range(2))  # a bucket for each group
    engine.prove(opt)
    runs = []
    def stop(run):
        def _run(*args):
            runs.append(args)
            if len(runs) == last and err is RuntimeError: raise err
            run(*args)
            if len(runs) == last: raise err
        return _run
    engine.replace_kernels(monkeypatch, opt, stop)
    with pytest.raises(err): opt.step()
    monkeypatch.undo()
    if not (err is RuntimeError and together):  # else nothing has begun
        p = ref.param_lists[1][0]
        g = p.grad
        if err is RuntimeError: p.grad = None  # as if the second group had no gradient
        ref.step()
        p.grad = g
        if hasattr(ref, 'count'): ref.count -= 1
    for _ in range(2):
        for p,q in zip(params_of(opt), params_of(ref)): close(p, q, 0)
        for o in (opt,ref): o.step()

def test_interrupted_while_lists_are_stored(monkeypatch):
    "On TorchScript's side, before anything else: no step is counted that was not taken"
    engine.interrupt_storing(monkeypatch)
    opt = trained(ALL[2], 3)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(40):
            before = [p.detach().clone() for p in params_of(opt)]
            n = [st['step'] for st in opt.state.values()]
            opt.step()
    assert n == [st['step'] for st in opt.state.values()] and n[0] > 3
    for p,q in zip(params_of(opt), before): assert torch.equal(p, q)

def test_interrupted_lookahead(monkeypatch):
    "Counts as taken, as in fastai"
    opt = JitLookahead(adam_jit(parameters((2,)), 0.1), k=2)
    opt.step()
    def stop(): raise KeyboardInterrupt
    engine.replace_lookahead(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt): opt.step()
    assert opt.count == 2

def test_threads_after_an_interrupt(monkeypatch, two_threads):
    "Small tensors take one thread, and give back the others whatever happens"
    opt = EIGHT[2].make(parameters(*[(5,)]*30), True)
    opt.step()
    real = torch.set_num_threads
    def stop(n):
        real(n)
        if n == 1: raise KeyboardInterrupt
    monkeypatch.setattr(torch, 'set_num_threads', stop)
    if engine.threads_can_change():
        with pytest.raises(KeyboardInterrupt): opt.step()
    assert torch.get_num_threads() == two_threads
    monkeypatch.undo()

def test_ctrl_c():
    "A real one, whenever it comes, also where PyTorch itself asks Python for something"
    armed = []
    def ring(*_):
        if armed: armed.clear(); raise KeyboardInterrupt
    handlers = {signal.SIGINT:ring, signal.SIGALRM:lambda *_: signal.raise_signal(signal.SIGINT)}
    was = {s:signal.signal(s, f) for s,f in handlers.items()}
    try:
        for i in range(40):
            for case in EIGHT[::3]:
                opt = trained(case, 0)
                armed.append(1)
                try:
                    signal.setitimer(signal.ITIMER_REAL, 1e-5 + i*3e-5)
                    while armed: opt.step()
                except KeyboardInterrupt: pass
                trained(case, 0).load_state_dict(deepcopy(opt.state_dict()))
                opt.step()
    finally:
        for s,f in was.items(): signal.signal(s, f)
        torch.set_grad_enabled(True)  # which PyTorch leaves off if its `no_grad` is interrupted where it ends
