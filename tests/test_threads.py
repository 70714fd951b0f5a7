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

import optim_cases as cases
import pytest
import torch
from optim_cases import FrozenAwareSGD

from torch_freeze import _build, freeze, unfreeze

HYPER = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-3}

# Below and above the size from which the step lets other threads run.
SIZES = {"small": [100] * 20, "large, so that the lock is released": [200_000] * 8}


def _in_threads(*functions: Callable[[], Any]) -> None:
    """All at once, none starting before all are there; what one raises is raised here."""
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

    def __init__(self, seed: int, sizes: list[int]) -> None:
        self.gen = cases.generator(seed)
        self.ours = cases.make_parameters(sizes, self.gen)
        self.theirs = cases.twin(self.ours)
        self.optimizer = FrozenAwareSGD(cases.in_groups(self.ours, 2), **HYPER)
        self.reference = cases.Reference(cases.in_groups(self.theirs, 2), **HYPER)

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
    trainings = [Training(seed, sizes) for seed in range(4)]
    steps = 30 if len(sizes) == 20 else 4
    _in_threads(*[lambda training=training: training.run(steps) for training in trainings])
    for training in trainings:
        training.check()


def test_one_optimizer_is_stepped_by_many_threads_in_turn() -> None:
    training = Training(0, [50] * 10)
    lock = threading.Lock()

    def run() -> None:
        for _ in range(10):
            with lock:
                training.run(1)

    _in_threads(run, run, run)
    training.check()


def test_memory_may_be_exchanged_while_a_large_step_runs() -> None:
    """The lock is released then; the memory in use is held until the step is over.

    The tensors stay: `p.grad = None` in one thread while another reads `p.grad` is a race in torch.
    """
    training = Training(1, [600_000] * 4)
    done = threading.Event()
    spare = torch.ones(600_000)

    def exchange() -> None:
        while not done.is_set():
            for p in training.ours:
                p.data = spare.clone()
                if p in training.optimizer.state:
                    training.optimizer.state[p]["momentum_buffer"] = spare.clone()
            torch.empty(600_000).fill_(float("nan"))  # takes freed memory at once

    def step() -> None:
        gen = cases.generator(2)
        for p in training.ours:
            p.grad = cases.randn(600_000, gen)
        for _ in range(20):
            training.optimizer.step()
        done.set()

    _in_threads(step, exchange)
    assert all(bool(torch.isfinite(p).all()) for p in training.ours)


def test_models_freeze_in_threads() -> None:
    def run(seed: int) -> None:
        model = torch.nn.Sequential(
            torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
        )
        optimizer = FrozenAwareSGD(model.parameters(), **HYPER)
        for step in range(40):
            (freeze if step % 2 else unfreeze)(model, "0", "1")
            held = model[0].weight.detach().clone()
            optimizer.zero_grad()
            model(torch.randn(8, 4)).sum().backward()
            optimizer.step()
            assert torch.equal(model[0].weight, held) == bool(step % 2)

    _in_threads(*[lambda seed=seed: run(seed) for seed in range(4)])


# The step's own threads, seen from outside: it does in several steps what stock does in one thread.
HELPED = """
import os, sys
import torch
from torch_freeze import FrozenAwareSGD

def others():
    return {int(task) for task in os.listdir("/proc/self/task")} - {os.getpid()}

def training(make, **kwargs):
    gen = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(300_000, generator=gen)) for _ in range(4)]
    for p in params:
        p.grad = torch.randn(300_000, generator=gen)
    return params, make(params, lr=0.1, momentum=0.9, weight_decay=0.01, **kwargs)

# Threads of OpenMP do not outlive a fork and may be stopped, so no torch operator compares.
def bits(params):
    return [p.detach().numpy().tobytes() for p in params]

def tell(*words):
    print(*words, flush=True)

torch.set_num_threads(3)
theirs, reference = training(torch.optim.SGD, foreach=False)
expected = [bits(theirs)]
for _ in range(8):
    reference.step()
    expected.append(bits(theirs))
ours, optimizer = training(FrozenAwareSGD)
"""


class Helped:
    """A process that runs `HELPED` and then `code`, and exchanges lines with the test."""

    SEIZE, INTERRUPT, DETACH = 0x4206, 0x4207, 17  # requests to ptrace()
    ANY_THREAD = 0x40000000  # __WALL

    def __init__(self, code: str, **environment: str) -> None:
        path = str(Path(_build.__file__).parents[1])
        self.process = subprocess.Popen(
            [sys.executable, "-c", HELPED + code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path} | environment,
        )
        assert self.process.stdin and self.process.stdout
        self.input, self.output = self.process.stdin, self.process.stdout
        self.stopped: list[int] = []

    def __enter__(self) -> Helped:
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()
        self.process.kill()
        self.process.communicate()

    def read(self) -> list[str]:
        ready, _, _ = select.select([self.output], [], [], 60)
        assert ready, "the process hangs"
        return self.output.readline().split()

    def go_on(self) -> None:
        self.input.write("\n")
        self.input.flush()

    def stop(self, threads: list[int]) -> None:
        """Stop some of its threads, as a debugger does."""
        for thread in threads:
            self._trace(self.SEIZE, thread)
            self.stopped.append(thread)
            self._trace(self.INTERRUPT, thread)
            os.waitpid(thread, self.ANY_THREAD)

    def let_go(self) -> None:
        while self.stopped:
            self._trace(self.DETACH, self.stopped.pop())

    def _trace(self, request: int, thread: int) -> None:
        ptrace = ctypes.CDLL(None, use_errno=True).ptrace
        ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        ptrace.restype = ctypes.c_long
        if ptrace(request, thread, None, None) != 0:
            pytest.skip(f"no thread can be stopped here: {os.strerror(ctypes.get_errno())}")


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_a_step_waits_for_no_thread_that_has_not_begun() -> None:
    """With all other threads stopped the caller does everything; late, they find nothing to do."""
    code = """
for _ in range(2):
    optimizer.step()
tell(*others())
sys.stdin.readline()
for _ in range(3):
    optimizer.step()
tell(bits(ours) == expected[5])
optimizer.param_groups.clear(), optimizer.state.clear(), ours.clear()
sys.stdin.readline()
ours, optimizer = training(FrozenAwareSGD)
for _ in range(8):
    optimizer.step()
tell(bits(ours) == expected[8])
"""
    with Helped(code) as helped:
        threads = [int(thread) for thread in helped.read()]
        assert len(threads) >= 2
        helped.stop(threads)
        helped.go_on()
        assert helped.read() == ["True"]
        helped.let_go()
        helped.go_on()
        assert helped.read() == ["True"]


@linux
def test_a_step_waits_for_what_a_thread_has_begun() -> None:
    """Its helpers are stopped wherever they are, again and again."""
    code = """
before = others()
optimizer.step()
tell(*(others() - before))
for _ in range(40):
    ours, optimizer = training(FrozenAwareSGD)
    for _ in range(8):
        optimizer.step()
    if bits(ours) != expected[8]:
        tell("wrong")
        break
tell("done")
"""
    with Helped(code) as helped:
        threads = [int(thread) for thread in helped.read()]
        assert len(threads) == 2
        while not select.select([helped.output], [], [], 0.001)[0]:
            helped.stop(threads)
            select.select([helped.output], [], [], 0.001)
            helped.let_go()
        assert helped.read() == ["done"]


@linux
def test_torch_says_how_many_threads_step() -> None:
    """Read at every step; the threads sleep in between and never are more."""
    code = """
def made(count):
    torch.set_num_threads(count)
    before = others()
    optimizer.step()
    return others() - before

small = FrozenAwareSGD(ours[:1], lr=0.1)
small.param_groups[0]["params"] = [torch.nn.Parameter(torch.ones(100))]
small.param_groups[0]["params"][0].grad = torch.ones(100)
before = others()
small.step()
counts = [len(others() - before)] + [len(made(count)) for count in (1, 2, 2, 4, 3)]
tell(*counts, bits(ours) == expected[5])
"""
    with Helped(code) as helped:
        assert helped.read() == ["0", "0", "1", "0", "2", "0", "True"]


@linux
def test_the_threads_take_part() -> None:
    code = """
before = others()
optimizer.step()
helpers = others() - before

def ticks(thread):
    with open(f"/proc/self/task/{thread}/stat") as stat:
        return int(stat.read().rpartition(")")[2].split()[11])

while not all(map(ticks, helpers)):
    optimizer.step()
tell(len(helpers))
"""
    with Helped(code) as helped:
        assert helped.read() == ["2"]


@linux
def test_threads_may_run_where_those_of_openmp_may() -> None:
    """Not on the one processor to which it binds the caller."""
    code = """
before = others()
optimizer.step()
for thread in others() - before:
    tell(*os.sched_getaffinity(thread))
"""
    with Helped(code, OMP_PROC_BIND="true") as helped:
        for _ in range(2):
            assert {int(processor) for processor in helped.read()} == os.sched_getaffinity(0)


@linux
def test_a_forked_child_steps_in_threads_of_its_own() -> None:
    code = """
optimizer.step()
child = os.fork()
if child == 0:
    alone = len(others())
    optimizer.step()
    tell(alone, len(others()), bits(ours) == expected[2])
    os._exit(0)
os.waitpid(child, 0)
optimizer.step()
tell(bits(ours) == expected[2])
"""
    with Helped(code) as helped:
        assert helped.read() == ["0", "2", "True"]
        assert helped.read() == ["True"]


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor cannot flush them")
def test_denormals_are_flushed_in_every_thread_or_in_none() -> None:
    """As the caller does; what torch's own threads do depends on when they began."""
    p = torch.nn.Parameter(torch.full((1_000_000,), 1e-38))
    optimizer = FrozenAwareSGD([p], lr=1.0)
    for flush in (False, True, False):
        results = []
        for count in (1, 4):
            with cases.threads(count), torch.no_grad():
                for _ in range(10):
                    p.fill_(2e-38)
                    p.grad = torch.full((1_000_000,), 1.5e-38)
                    torch.set_flush_denormal(flush)
                    optimizer.step()
                    torch.set_flush_denormal(False)
                    results.append(p.detach().clone())
        assert all(torch.equal(result, results[0]) for result in results)
        assert bool(results[0].any()) != flush


def test_threads_come_and_go_without_a_trace() -> None:
    """A thread's working memory ends with it."""
    params = cases.make_parameters([10] * 5, cases.generator(0))
    optimizer = FrozenAwareSGD(params, **HYPER)
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
    bindings = Path(__file__).parents[1] / "csrc" / "bindings.cpp"
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
