"""Threads, free-threaded Python and subinterpreters: what works, and what is refused.

Supported: any number of threads, each stepping optimizers of its own, while others train, freeze or
step other models; one optimizer stepped by different threads in turn. Not supported, as in stock:
two threads stepping one optimizer at once. Refused on import: subinterpreters, and a free-threaded
Python that runs without its global lock.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import apart
from tests.helpers import optim_cases as cases
from torch_freeze import _build, freeze, unfreeze

FAMILIES = cases.each_family(cases.UNLIKE_FAMILIES)

# Below and above the size from which a step releases the GIL.
SIZES = {"small": [100] * 20, "large, so that the lock is released": [200_000] * 8}


def _in_threads(*functions: Callable[[], Any]) -> None:
    """Run in threads that all start at once; what one raises is raised here."""
    barrier = threading.Barrier(len(functions))
    errors: list[BaseException] = []

    def guarded(function: Callable[[], Any]) -> None:
        try:
            barrier.wait()
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


class Training:
    """One thread's: optimizer and reference, with tensors freezing and thawing at every step."""

    def __init__(self, seed: int, sizes: list[int], family: cases.Family) -> None:
        self.gen = cases.generator(seed)
        self.ours = cases.make_parameters(sizes, self.gen)
        self.theirs = cases.twin(self.ours)
        hyper = family.with_state
        self.optimizer = family.ours(cases.in_groups(self.ours, 2), **hyper)
        self.reference = family.reference(cases.in_groups(self.theirs, 2), **hyper)

    def run(self, steps: int) -> None:
        for step in range(steps):
            for i, (p, q) in enumerate(zip(self.ours, self.theirs, strict=True)):
                p.requires_grad_((i + step) % 3 != 0)
                q.requires_grad_((i + step) % 3 != 0)
            cases.set_grads(self.ours, self.theirs, self.gen)
            self.optimizer.step()
            self.reference.step()

    def check(self) -> None:
        cases.assert_same_training(self.optimizer, self.reference)


@pytest.mark.parametrize("sizes", cases.ids({name: (sizes,) for name, sizes in SIZES.items()}))
def test_threads_step_optimizers_of_their_own(sizes: list[int]) -> None:
    """Of both kinds at once: what the core keeps for a thread is each optimizer's own."""
    trainings = [
        Training(seed, sizes, family)
        for seed in range(2)
        for family in cases.UNLIKE_FAMILIES.values()
    ]
    steps = 30 if len(sizes) == 20 else 4
    _in_threads(*[lambda training=training: training.run(steps) for training in trainings])
    for training in trainings:
        training.check()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_optimizer_is_stepped_by_many_threads_in_turn(family: cases.Family) -> None:
    training = Training(0, [50] * 10, family)
    lock = threading.Lock()

    def run() -> None:
        for _ in range(10):
            with lock:
                training.run(1)

    _in_threads(run, run, run)
    training.check()


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_may_be_exchanged_while_a_large_step_runs(family: cases.Family) -> None:
    """The GIL is released then; the memory in use is kept until the step is over.

    The tensors stay: `p.grad = None` in one thread while another reads `p.grad` is a race in torch.
    """
    training = Training(1, [600_000] * 4, family)
    done = threading.Event()
    spare = torch.ones(600_000)

    def exchange() -> None:
        while not done.is_set():
            for p in training.ours:
                p.data = spare.clone()
                for name in family.buffers(family.with_state):
                    if p in training.optimizer.state:
                        training.optimizer.state[p][name] = spare.clone()
            torch.empty(600_000).fill_(float("nan"))  # reuses freed memory at once

    def step() -> None:
        gen = cases.generator(2)
        for p in training.ours:
            p.grad = cases.randn(600_000, gen)
        for _ in range(20):
            training.optimizer.step()
        done.set()

    _in_threads(step, exchange)
    assert all(bool(torch.isfinite(p).all()) for p in training.ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_freeze_in_threads(family: cases.Family) -> None:
    def run(seed: int) -> None:
        model = torch.nn.Sequential(
            torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
        )
        optimizer = family.ours(model.parameters(), **family.with_state)
        for step in range(40):
            (freeze if step % 2 else unfreeze)(model, "0", "1")
            held = model[0].weight.detach().clone()
            optimizer.zero_grad()
            model(torch.randn(8, 4)).sum().backward()
            optimizer.step()
            assert torch.equal(model[0].weight, held) == bool(step % 2)

    _in_threads(*[lambda seed=seed: run(seed) for seed in range(4)])


def _train_on_in_a_fork(name: str, sizes: list[int]) -> list[bytes]:
    training = Training(2, sizes, cases.FAMILIES[name])
    training.run(3)

    def go_on() -> list[bytes]:
        training.run(3)
        training.check()
        return [p.detach().numpy().tobytes() for p in training.ours]

    forked = apart.fork(go_on)
    here = go_on()
    assert forked == here
    return here


@pytest.mark.parametrize("sizes", cases.ids({name: (sizes,) for name, sizes in SIZES.items()}))
@pytest.mark.parametrize("family", cases.UNLIKE_FAMILIES)
def test_training_goes_on_in_a_forked_process(family: str, sizes: list[int]) -> None:
    """With the state and the counts that it had, and the parent's training goes on too."""
    if torch.cuda.is_available():
        pytest.skip("where torch sees a GPU, no fork of a process that ran backward can")
    assert len(apart.run(_train_on_in_a_fork, family, sizes)) == len(sizes)


# A step's threads, seen from outside. After each line it waits for the test's permission.
SHARED = """
import os, sys, time
import torch
from torch_freeze import FrozenAwareSGD

gen = torch.Generator().manual_seed(0)

def training(make, **kwargs):
    params = [torch.nn.Parameter(torch.randn(300_000, generator=gen)) for _ in range(4)]
    for p in params:
        p.grad = torch.randn(300_000, generator=gen)
    return params, make(params, lr=0.1, momentum=0.9, weight_decay=0.01, **kwargs)

def tell(*words):
    print(*words, flush=True)
    sys.stdin.readline()

def threads():
    return {int(thread) for thread in os.listdir("/proc/self/task")}

ours, optimizer = training(FrozenAwareSGD)
gen.manual_seed(0)
theirs, reference = training(torch.optim.SGD, foreach=False)
taken = []

def step():
    begin = time.perf_counter()
    optimizer.step()
    taken.append(time.perf_counter() - begin)
    return taken[-1]

torch.set_num_threads(2)
before = threads()
step()
tell(*(threads() - before))
for _ in range(2):
    while step() < 0.5:
        assert len(taken) < 2000, "no step waits"
    tell("waited")
    for _ in range(32):
        step()
    tell("alone")
for _ in taken:
    reference.step()
torch.set_num_threads(1)
tell(all(torch.equal(p, q) for p, q in zip(ours, theirs)))
"""


class Traced:
    """The process of `SHARED`, whose threads can be stopped as a debugger stops them."""

    SEIZE, INTERRUPT, DETACH = 0x4206, 0x4207, 17  # requests to ptrace()
    ANY_THREAD = 0x40000000  # __WALL

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SHARED],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(_build.__file__).parents[1])},
        )
        assert self.process.stdin and self.process.stdout
        self.input, self.output = self.process.stdin, self.process.stdout

    def wait_till_it_waits(self) -> None:
        """Wait until the process has not run for a second."""
        then: list[str] = []
        now: list[str] = []
        while then != now or not now:
            assert self.read(1) is None
            assert self.process.poll() is None
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
            then, now = now, stat.rpartition(")")[2].split()[11:13]

    def read(self, seconds: float = 60) -> list[str] | None:
        """The words of the next line, or None if it does not come in time."""
        ready, _, _ = select.select([self.output], [], [], seconds)
        return self.output.readline().split() if ready else None

    def go_on(self) -> None:
        self.input.write("\n")
        self.input.flush()

    def stop(self, thread: int) -> None:
        self._trace(self.SEIZE, thread)
        self._trace(self.INTERRUPT, thread)
        os.waitpid(thread, self.ANY_THREAD)

    def let_go(self, thread: int) -> None:
        self._trace(self.DETACH, thread)

    def _trace(self, request: int, thread: int) -> None:
        ptrace = ctypes.CDLL(None, use_errno=True).ptrace
        ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        ptrace.restype = ctypes.c_long
        if ptrace(request, thread, None, None) != 0:
            pytest.skip(f"no thread can be stopped here: {os.strerror(ctypes.get_errno())}")


@pytest.mark.compiled
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_steps_after_one_that_waited_for_a_late_thread_are_done_alone() -> None:
    """One of torch's threads is stopped until a step has waited for it, and again afterwards."""
    traced = Traced()
    try:
        (thread,) = map(int, traced.read() or ())
        for _ in range(2):
            traced.stop(thread)
            traced.go_on()
            traced.wait_till_it_waits()
            traced.let_go(thread)
            assert traced.read() == ["waited"]
            traced.stop(thread)
            traced.go_on()
            assert traced.read() == ["alone"]
            traced.let_go(thread)
        traced.go_on()
        assert traced.read() == ["True"]
    finally:
        traced.process.kill()
        traced.process.communicate()


@pytest.mark.parametrize("family", FAMILIES)
def test_threads_come_and_go_without_a_trace(family: cases.Family) -> None:
    """A thread's working memory ends with it."""
    params = cases.make_parameters([10] * 5, cases.generator(0))
    optimizer = family.ours(params, **family.with_state)
    for p in params:
        p.grad = torch.ones(10)
    optimizer.step()
    counts = [sys.getrefcount(p) for p in params]
    for _ in range(50):
        _in_threads(optimizer.step)
    assert [sys.getrefcount(p) for p in params] == counts


def test_a_python_without_its_lock_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    with pytest.raises(ImportError, match="PYTHON_GIL"):
        _build.load_extension()


def test_the_module_does_not_claim_to_do_without_the_lock() -> None:
    """So a free-threaded Python takes its lock back when it loads it."""
    bindings = Path(__file__).parents[2] / "csrc" / "bindings.cpp"
    assert "gil_not_used" not in bindings.read_text()
    assert "multiple_interpreters" not in bindings.read_text()


def _has(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


INTERPRETERS = [name for name in ("_interpreters", "_xxsubinterpreters") if _has(name)]


@pytest.mark.skipif(not INTERPRETERS, reason="this Python cannot make subinterpreters")
def test_a_subinterpreter_is_refused_before_torch_is_imported() -> None:
    """Importing torch there hangs or crashes, so the error has to come first."""
    code = f"""
import {INTERPRETERS[0]} as interpreters
inner = '''
import sys
sys.path.insert(0, {str(Path(_build.__file__).parents[1])!r})
try:
    import torch_freeze
    print("imported")
except ImportError as error:
    print("refused:", error, "torch" in sys.modules)
'''
interpreters.run_string(interpreters.create(), inner)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "refused:" in done.stdout and "main interpreter" in done.stdout, (
        done.stdout + done.stderr
    )
    assert done.stdout.strip().endswith("False"), "torch was imported first"


def test_the_main_interpreter_is_not_refused() -> None:
    _build.refuse_subinterpreter()
