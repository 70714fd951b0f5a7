"""How time is measured: interleaved turns, warm and cold caches, the GPU's own time.

Times are in nanoseconds.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .contestants import Family, Trainer
from .workloads import Loss, Workload

Step = Callable[[], object]
"""Makes one update."""
Turn = Callable[[], float]
"""Runs a contestant once (or as often as a steady sample takes) and returns nanoseconds."""
WALKED_BYTES = 64 * 2**20
"""Read and written between two steps to leave no cache warm: twice a common last-level cache."""
FLUSHED_BYTES = 256 * 2**20
"""Written between two steps on a GPU: more than any L2 holds."""
SPIN_CYCLES_PER_NS = 2.0
"""No GPU's clock is faster, so the spin never ends before the launches are queued."""


@dataclass(frozen=True)
class Budget:
    """How long one measure of one workload may take: ``seconds``, within bounds on its rounds.

    On a machine so busy that ``least`` rounds take ten times as long, three rounds are enough.
    """

    seconds: float = 1.0
    least: int = 3
    most: int = 200

    def spent(self, rounds: int, seconds: float) -> bool:
        """Whether to stop after so many rounds and seconds."""
        late = seconds > self.seconds
        too_late = seconds > 10 * self.seconds and rounds >= 3
        return rounds >= self.most or too_late or (late and rounds >= self.least)


@contextmanager
def no_collector() -> Iterator[None]:
    """Keep Python's garbage collector out of the samples."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def interleave(
    turns: Mapping[str, Turn], budget: Budget, rng: random.Random
) -> dict[str, list[float]]:
    """Let everyone take one turn per round, each round in a new random order.

    Returns:
        One sample per contestant and round, so samples of equal index belong together.
    """
    samples: dict[str, list[float]] = {key: [] for key in turns}
    order = list(turns)
    begin = time.perf_counter()
    with no_collector():
        while not budget.spent(len(samples[order[0]]), time.perf_counter() - begin):
            rng.shuffle(order)
            for key in order:
                samples[key].append(turns[key]())
    return samples


def wait_for(device: torch.device) -> None:
    """Return when the device has nothing left to do; the CPU never has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Step, device: torch.device, *, wait: bool = False) -> float:
    """The time until a call returns, begun on an idle device; with ``wait``, until that is idle."""
    wait_for(device)
    begin = time.perf_counter_ns()
    run()
    if wait:
        wait_for(device)
    end = time.perf_counter_ns()
    wait_for(device)
    return end - begin


def warm_turn(step: Step, device: torch.device) -> Turn:
    """Steps back to back: the median of as many as fill two milliseconds, after untimed ones.

    The untimed steps take the caches back from the contestant before. Tensors whose step takes more
    than 20 ms fit in no cache, so there is nothing to take back.
    """
    for _ in range(3):
        step()
    once = min(timed(step, device) for _ in range(3))
    count = max(1, min(100, round(2e6 / once)))
    untimed = min(10, count) if once < 20e6 else 0

    def turn() -> float:
        for _ in range(untimed):
            step()
        return statistics.median(timed(step, device) for _ in range(count))

    return turn


def cold_turn(step: Step, device: torch.device, walked: Tensor) -> Turn:
    """One step after a walk through ``walked``, which is larger than the CPU's caches."""

    def turn() -> float:
        walked.add_(1)
        return timed(step, device)

    return turn


def device_turn(step: Step, device: torch.device, flushed: Tensor) -> Turn:
    """GPU time between two events around one step, after the L2 was flushed.

    The GPU first spins until all launches of the step are queued; otherwise the events would
    measure how fast the host can launch.
    """
    host = max(timed(step, device) for _ in range(3))
    spin = int((2 * host + 50_000) * SPIN_CYCLES_PER_NS)
    cuda: Any = torch.cuda  # events and _sleep have no types
    begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)

    def turn() -> float:
        flushed.zero_()
        cuda._sleep(spin)
        begin.record()
        step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e6

    return turn


def iteration_turn(trainer: Trainer, loss: Loss, device: torch.device) -> Turn:
    """zero_grad, forward, backward and step, until the device has finished; one is run before."""

    def run() -> None:
        trainer.zero_grad()
        trainer.backward(loss())
        trainer.step()

    run()
    return lambda: timed(run, device, wait=True)


def reference_passes(
    workload: Workload, device: torch.device, family: Family
) -> dict[str, tuple[Step, int]]:
    """What this machine's memory can do: plain torch operations, and the bytes that they move.

    ``read-modify-write`` reads and writes the same bytes as the update, once each, in flat tensors:
    ``p += g`` (12 bytes per fp32 element) and ``m *= -1`` for each buffer of the state (8 more). On
    a CPU this is as fast as one compiled loop over all of them. ``copy`` is the usual measure of a
    GPU; on a CPU its writes also read the line that they replace, which its bytes do not include.
    """
    first = workload.trainable[0]
    elements = sum(p.numel() for p in workload.trainable)
    p, g, *buffers = (
        torch.ones(elements, device=device, dtype=first.dtype)
        for _ in range(2 + len(family.buffers(workload.hyper)))
    )

    def read_modify_write() -> None:
        p.add_(g)
        for buffer in buffers:
            buffer.mul_(-1)

    size = family.step_bytes(workload.trainable, workload.hyper)
    return {
        "reference/read-modify-write": (read_modify_write, size),
        "reference/copy": (lambda: p.copy_(g), 2 * first.element_size() * elements),
    }
