"""The suite `load`: what step() costs while another process keeps a core busy."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from statistics import median

import torch
from torch import nn

from ..contestants import FAMILIES, select
from ..records import OURS, Measured, summarise
from ..tables import Reached, judge, multiple
from ..timing import Budget, no_collector
from ..workloads import MODELS
from .base import Setting, Suite

LOAD_MODELS = ("mobilenet_v3_small", "resnet50")
RUNS = {"idle": 10, "busy": 30}
QUICK_RUNS = {"idle": 2, "busy": 5}
_STATES = {"idle": "nothing else", "busy": "one other process"}
_MEASURES = ("one thread", "all threads")
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
    command = [sys.executable, "-c", _WORKER, f"{os.getpid()}"]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def one_run(
    shapes: Sequence[Sequence[int]], threads: int, budget: Budget, family: str
) -> dict[str, dict[str, list[float]]]:
    """Step everyone in turns, on one and on all threads, over parameters of these shapes.

    Returns:
        Nanoseconds of steps, by contestant and measure.
    """
    parameters = [nn.Parameter(torch.empty(*shape).normal_(std=0.1)) for shape in shapes]
    for p in parameters:
        p.grad = torch.full_like(p, 1e-3)
    samples: dict[str, dict[str, list[float]]] = {}
    turns, chosen = [], FAMILIES[family]
    for contestant in select():
        trainer = contestant.build(chosen, [parameters], chosen.hyper["model"])
        taken = samples[contestant.key] = {measure: [] for measure in _MEASURES}
        turns += [(trainer, 1, taken["one thread"]), (trainer, threads, taken["all threads"])]
    rounds, begin = 0, time.perf_counter()
    with no_collector():
        while not budget.spent(rounds, time.perf_counter() - begin):
            for trainer, count, steps in turns:
                torch.set_num_threads(count)
                trainer.step()
                burst: list[float] = []
                while len(burst) < _BURST and sum(burst) < _BURST_NS:
                    start = time.perf_counter_ns()
                    trainer.step()
                    burst.append(time.perf_counter_ns() - start)
                steps += burst
            turns.append(turns.pop(0))  # nobody always runs after the same one
            rounds += 1
    return samples


def run(key: str, state: str, setting: Setting) -> Measured:
    """One network's parameters on the CPU, in a new process for each run."""
    threads, spec = torch.get_num_threads(), MODELS[key]
    count = (QUICK_RUNS if setting.quick else RUNS)[state]
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in spec.build().parameters()]
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    details = f" ({threads} threads, {len(shapes)} tensors, {elements:,} elements, {count} runs)"
    title = f"{spec.title}, step() on the CPU with {_STATES[state]} running"
    found = Measured("load", f"{key}/{state}", title, details, "load")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    given = (shapes, threads, setting.budget, setting.family.key)
    with busy_core() if state == "busy" else nullcontext() as worker:
        for _ in range(count):
            with ProcessPoolExecutor(1, context) as alone:
                for contestant, taken in alone.submit(one_run, *given).result().items():
                    add_run(found, contestant, taken)
            if worker and worker.poll() is not None:
                raise RuntimeError(f"the busy process ended with {worker.returncode}")
    return found


def add_run(found: Measured, contestant: str, taken: dict[str, list[float]]) -> None:
    """Record one run's steps, and its medians, by which runs are compared."""
    medians = {f"{measure}, by run": median(steps) for measure, steps in taken.items()}
    found.add(contestant, **taken, **medians)


def reached(measured: Sequence[Measured]) -> Iterator[Reached]:
    """The targets under load, and that a second thread must not cost time without it."""
    for found in measured:
        state, model = found.key.rpartition("/")[2], found.title.partition(",")[0]
        one, taken = (summarise(found.of(OURS, measure)) for measure in _MEASURES)
        busy = state == "busy"
        value, what = (taken.high, "90th percentile") if busy else (taken.median, "median")
        over, case = value / one.median, f"{model}, {state}: {what} / one-thread median"
        yield judge(case, (over, f"{multiple(over)}x"), f"<= {2 if busy else 1}x")
        runs = (found.of(key, "all threads, by run") for key in ("all/fused", OURS))
        ratios = [stock / ours for stock, ours in zip(*runs, strict=True)]
        slower = sum(ratio < 1 for ratio in ratios)
        figure = f"{slower} of {len(ratios)}, worst {multiple(min(ratios))}x"
        yield judge(f"{model}, {state}: runs slower than stock fused", (slower, figure), "<= 0")


def suite(setting: Setting) -> Suite:
    """Each network, with an idle and with a busy core beside."""
    pairs = [(key, state) for key in setting.usable_models(LOAD_MODELS) for state in RUNS]
    tasks = [(f"{MODELS[k].title}, {_STATES[s]}", partial(run, k, s, setting)) for k, s in pairs]
    return Suite("load", list(tasks), reached, "under load")
