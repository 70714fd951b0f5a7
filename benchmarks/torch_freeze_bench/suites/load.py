"""The suite `load`: what step() costs while another process keeps a core busy."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from statistics import median

import torch
from torch import nn

from ..contestants import FAMILIES, FROZEN_AWARE, Family, stock
from ..memory import in_child
from ..records import FACTS, OURS, Measured, Summary
from ..tables import Reached, at_most, duration, multiple, render
from ..timing import Budget, no_collector
from ..workloads import MODELS, Hyper
from .base import Setting

LOAD_MODELS = ("mobilenet_v3_small", "resnet50")
RUNS = {"idle": 10, "busy": 30}
QUICK_RUNS = {"idle": 2, "busy": 5}
_STATES = {"idle": "nothing else", "busy": "one other process"}
_CONTESTANTS = (FROZEN_AWARE, stock("default"), stock("foreach"), stock("fused"))
_BURST, _BURST_NS = 20, 20e6
"""Most steps and time of a turn, after an untimed step: slow contestants do not take the others'
time. One turn has several steps because a step can learn from a late one before it, as it would in
training."""
# It ends with its parent, even if the parent is killed.
_WORKER = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    sum(range(100_000))
"""


@contextmanager
def busy_core() -> Iterator[subprocess.Popen[bytes]]:
    """Another process that computes all the time, like a data loader's worker; it is ended."""
    # In a session of its own Ctrl-C does not reach it: it is killed here and prints nothing.
    process = subprocess.Popen(
        [sys.executable, "-c", _WORKER, str(os.getpid())], start_new_session=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def one_run(
    shapes: Sequence[Sequence[int]], counts: Sequence[int], budget: Budget, family: str
) -> dict[str, dict[str, list[float]]]:
    """Step everyone in turns, at each number of threads, over parameters of these shapes.

    Returns:
        Nanoseconds of steps, by contestant and number of threads.
    """
    parameters = [nn.Parameter(torch.empty(*shape).normal_(std=0.1)) for shape in shapes]
    for p in parameters:
        p.grad = torch.full_like(p, 1e-3)
    samples: dict[str, dict[str, list[float]]] = {}
    turns = []
    for contestant in _CONTESTANTS:
        chosen = replace(contestant, family=FAMILIES[family])
        trainer = chosen.build([parameters], Hyper(weight_decay=1e-4))
        taken = samples[contestant.key] = {f"{threads} threads": [] for threads in counts}
        turns += [(trainer, threads, taken[f"{threads} threads"]) for threads in counts]
    rounds, begin = 0, time.perf_counter()
    with no_collector():
        while not budget.spent(rounds, time.perf_counter() - begin):
            for trainer, threads, taken_before in turns:
                torch.set_num_threads(threads)
                trainer.step()
                burst: list[float] = []
                while len(burst) < _BURST and sum(burst) < _BURST_NS:
                    start = time.perf_counter_ns()
                    trainer.step()
                    burst.append(time.perf_counter_ns() - start)
                taken_before += burst
            turns.append(turns.pop(0))  # nobody always runs after the same one
            rounds += 1
    return samples


def run(keys: Sequence[str], quick: bool, setting: Setting) -> Iterator[Measured]:
    """Every network's parameters on the CPU, with an idle and with a busy core beside.

    Raises:
        RuntimeError: the process that was to keep a core busy has ended.
    """
    threads = torch.get_num_threads()
    given = (sorted({1, threads}), setting.budget, setting.family.key)
    for key in keys:
        spec = MODELS[key]
        with torch.device("meta"):
            shapes = [tuple(p.shape) for p in spec.build().parameters()]
        elements = sum(torch.Size(shape).numel() for shape in shapes)
        for state, count in (QUICK_RUNS if quick else RUNS).items():
            running = f"{_STATES[state]} running"
            setting.progress(f"{spec.title}: {running}")
            details = f"\n({len(shapes)} tensors, {elements:,} elements, {count} runs)"
            title = f"{spec.title}, step() on the CPU with {running}"
            found = Measured("load", f"{key}/{state}", title, details)
            found.add(FACTS, threads=threads)
            with busy_core() if state == "busy" else nullcontext() as worker:
                for _ in range(count):
                    for contestant, taken in in_child(one_run, shapes, *given).items():
                        add_run(found, contestant, taken)
                    if worker and worker.poll() is not None:
                        raise RuntimeError(f"the busy process ended with {worker.returncode}")
            yield found


def add_run(found: Measured, contestant: str, taken: dict[str, list[float]]) -> None:
    """Record one run's steps, and its medians, by which runs are compared."""
    medians = {f"{measure}, by run": median(steps) for measure, steps in taken.items()}
    found.add(contestant, **taken, **medians)


def _steps(found: Measured, contestant: str, threads: float) -> Summary:
    taken = found.time(contestant, f"{threads:g} threads")
    assert taken is not None
    return taken


def table(found: Measured, family: Family) -> str:
    """Everyone at each number of threads, over all runs of one network in one state."""
    headers = ["", "threads", "median", "90th\nperc.", "median over\none thread's"]
    headers += ["90th over\nthat median", "times\nours"]
    most = found.fact("threads")
    ours = _steps(found, OURS, most).median
    rows = []
    for contestant in found.contestants:
        alone = _steps(found, contestant, 1).median
        for threads in sorted({1, most}):
            taken = _steps(found, contestant, threads)
            cells = [family.label(contestant), f"{threads:g}"]
            cells += [duration(taken.median), duration(taken.high)]
            ratios = (taken.median / alone, taken.high / alone, taken.median / ours)
            rows.append([*cells, *(f"{multiple(ratio)}x" for ratio in ratios)])
    return f"{found.title}{found.details}\n{render(headers, rows)}"


def legend(found: Sequence[Measured], setting: Setting) -> list[str]:
    """The tables explain themselves."""
    return []


def summary(found: Sequence[Measured], setting: Setting) -> list[str]:
    """The targets say it all."""
    return []


def draw(found: Sequence[Measured], setting: Setting) -> None:
    """There is no picture."""


def reached(measured: Sequence[Measured], setting: Setting) -> Iterator[Reached]:
    """The targets under load, and that a second thread must not cost time without it."""
    for found in measured:
        state, most = found.key.rpartition("/")[2], found.fact("threads")
        title = f"{found.title.partition(',')[0]}, {state}: "
        alone, taken = _steps(found, OURS, 1).median, _steps(found, OURS, most)
        busy = state == "busy"
        value, what = (taken.high, "90th percentile") if busy else (taken.median, "median")
        limit, figure = 2 if busy else 1, f"{multiple(value / alone)}x"
        name = f"{title}{what} / one-thread median"
        yield at_most(name, value, limit * alone, figure, f"<= {limit}x")
        runs = f"{most:g} threads, by run"
        pairs = zip(found.of("all/fused", runs), found.of(OURS, runs), strict=True)
        ratios = [stock / ours for stock, ours in pairs]
        slower = sum(ratio < 1 for ratio in ratios)
        figure = f"{slower} of {len(ratios)}, worst {multiple(min(ratios))}x"
        yield at_most(f"{title}runs slower than stock fused", slower, 0, figure, "0")
