"""Threads, free-threaded Python and subinterpreters: what works, and what is refused.

Supported: any number of threads, each stepping optimizers of its own, while others train, freeze or
step other models; one optimizer stepped by different threads in turn. Not supported, as in stock:
two threads stepping one optimizer at once. Refused on import: subinterpreters, and a free-threaded
Python that runs without its global lock.
"""

from __future__ import annotations

import importlib
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
