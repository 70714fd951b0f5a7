"""The load suite: what step() costs while another process keeps a core busy."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
from contestants import OURS, Contestant, Hyper
from measure import Budget, Summary, no_collector, summarise
from memory_measure import in_child
from models import MODELS
from suites import Setting
from tables import render
from targets import Reached, status
from torch import nn
from units import duration, multiple

LOAD_MODELS = ("mobilenet_v3_small", "resnet50")
RUNS: dict[State, int] = {"idle": 10, "busy": 30}
QUICK_RUNS: dict[State, int] = {"idle": 2, "busy": 5}

State = Literal["idle", "busy"]
_STATES: dict[State, str] = {"idle": "nothing else", "busy": "one other process"}
_CONTESTANTS = (
    OURS,
    Contestant("all", "default"),
    Contestant("all", "foreach"),
    Contestant("all", "fused"),
)
_FUSED = _CONTESTANTS[-1]
_BURST, _BURST_NS = 20, 20e6
"""Steps and time at most in a turn, after an untimed step: slow ones leave their time to others.
So many, because a step can learn from one before it that came late, as it would in training."""
# It ends with its parent, even if that is killed.
_WORKER = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    sum(range(100_000))
"""

Samples = dict[str, list[float]]
"""Nanoseconds of steps, by contestant and threads: see `at`."""


def at(contestant: Contestant, threads: int) -> str:
    """The key of one contestant's steps with so many threads."""
    return f"{contestant.key} with {threads}"


@dataclass
class LoadOutcome:
    """One network's parameters stepped in several runs, each in a process of its own."""

    title: str
    state: State
    tensors: int
    elements: int
    threads: int
    runs: list[Samples]

    def time(self, contestant: Contestant, threads: int) -> Summary:
        """Of the steps of all runs."""
        return summarise([step for run in self.runs for step in run[at(contestant, threads)]])

    def medians(self, contestant: Contestant) -> list[float]:
        """Of each run, at the usual number of threads."""
        return [median(run[at(contestant, self.threads)]) for run in self.runs]


@contextmanager
def busy_core() -> Iterator[subprocess.Popen[bytes]]:
    """Another process that computes all the time, as a data loader's worker may; it is ended."""
    # In a session of its own, Ctrl-C does not reach it: it is killed here and says nothing.
    process = subprocess.Popen(
        [sys.executable, "-c", _WORKER, str(os.getpid())], start_new_session=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def one_run(shapes: Sequence[Sequence[int]], counts: Sequence[int], budget: Budget) -> Samples:
    """Step everyone by turns, at each number of threads, over parameters of these shapes."""
    parameters = [nn.Parameter(torch.empty(*shape).normal_(std=0.1)) for shape in shapes]
    for p in parameters:
        p.grad = torch.full_like(p, 1e-3)
    entries = [c.build([parameters], Hyper(weight_decay=1e-4)) for c in _CONTESTANTS]
    turns = [(entry, threads) for entry in entries for threads in counts]
    samples: Samples = {at(entry.contestant, threads): [] for entry, threads in turns}
    rounds, begin = 0, time.perf_counter()
    with no_collector():
        while not budget.spent(rounds, time.perf_counter() - begin):
            for entry, threads in turns:
                torch.set_num_threads(threads)
                entry.stepper.step()
                burst: list[float] = []
                while len(burst) < _BURST and sum(burst) < _BURST_NS:
                    start = time.perf_counter_ns()
                    entry.stepper.step()
                    burst.append(time.perf_counter_ns() - start)
                samples[at(entry.contestant, threads)] += burst
            turns.append(turns.pop(0))  # nobody always runs after the same one
            rounds += 1
    return samples


def run_load(keys: Sequence[str], setting: Setting, *, quick: bool) -> Iterator[LoadOutcome]:
    """Every network's parameters on the CPU, with an idle and with a busy core beside.

    Raises:
        models.MissingPackageError: the package a network comes from is not installed.
        RuntimeError: the process that was to keep a core busy has ended.
    """
    threads = torch.get_num_threads()
    for key in keys:
        with torch.device("meta"):
            shapes = [tuple(p.shape) for p in MODELS[key].build().parameters()]
        for state, count in (QUICK_RUNS if quick else RUNS).items():
            setting.progress(f"{MODELS[key].title}: {_STATES[state]} running")
            runs = []
            with busy_core() if state == "busy" else nullcontext() as worker:
                for _ in range(count):
                    runs.append(in_child(one_run, shapes, sorted({1, threads}), setting.budget))
                    if worker and worker.poll() is not None:
                        raise RuntimeError(f"the busy process ended with {worker.returncode}")
            yield LoadOutcome(
                title=MODELS[key].title,
                state=state,
                tensors=len(shapes),
                elements=sum(torch.Size(shape).numel() for shape in shapes),
                threads=threads,
                runs=runs,
            )


def load_table(outcome: LoadOutcome) -> str:
    """Everyone at each number of threads."""
    headers = ["", "threads", "median", "90th\nperc.", "median over\none thread's"]
    headers += ["90th over\nthat median", "times\nours"]
    ours = outcome.time(OURS, outcome.threads).median
    rows = []
    for contestant in _CONTESTANTS:
        alone = outcome.time(contestant, 1).median
        for threads in sorted({1, outcome.threads}):
            found = outcome.time(contestant, threads)
            rows.append(
                [
                    contestant.label,
                    f"{threads}",
                    duration(found.median),
                    duration(found.high),
                    f"{multiple(found.median / alone)}x",
                    f"{multiple(found.high / alone)}x",
                    f"{multiple(found.median / ours)}x",
                ]
            )
    title = (
        f"{outcome.title}, step() on the CPU with {_STATES[outcome.state]} running\n"
        f"({outcome.tensors} tensors, {outcome.elements:,} elements, {len(outcome.runs)} runs)"
    )
    return f"{title}\n{render(headers, rows)}"


def load_targets(outcomes: Sequence[LoadOutcome]) -> list[Reached]:
    """What was to be reached under load, and what a second thread must not cost without it."""
    lines = []
    for outcome in outcomes:
        case = f"{outcome.title}, {outcome.state}: "
        alone = outcome.time(OURS, 1).median
        found = outcome.time(OURS, outcome.threads)
        value, what, most = (
            (found.high, "90th percentile", 2)
            if outcome.state == "busy"
            else (found.median, "median", 1)
        )
        lines.append(
            Reached(
                f"{case}{what} / one-thread median",
                f"{multiple(value / alone)}x",
                f"<= {most}x",
                status(value <= most * alone),
            )
        )
        ratios = [
            stock / ours
            for stock, ours in zip(outcome.medians(_FUSED), outcome.medians(OURS), strict=True)
        ]
        slower = sum(ratio < 1 for ratio in ratios)
        lines.append(
            Reached(
                f"{case}runs slower than stock fused",
                f"{slower} of {len(ratios)}, worst {multiple(min(ratios))}x",
                "0",
                status(not slower),
            )
        )
    return lines
