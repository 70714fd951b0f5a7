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
from typing import Any, Protocol

import torch
from torch import Tensor

from .contestants import Family, Trainer
from .workloads import Workload

Turn = Callable[[], float]
"""Runs a contestant once (or as often as a steady sample takes) and returns nanoseconds."""
WALKED_BYTES = 64 * 2**20
"""Read and written between two steps to leave no cache warm: twice a common last-level cache."""
FLUSHED_BYTES = 256 * 2**20
"""Written between two steps on a GPU: more than any L2 holds."""
SPIN_CYCLES_PER_NS = 2.0
"""No GPU's clock is faster, so the spin never ends before the launches are queued."""


class Stepper(Protocol):
    """Whatever makes one update when its ``step()`` is called."""

    @property
    def step(self) -> Callable[[], object]:
        """Make the update."""


@dataclass(frozen=True)
class Budget:
    """How long one measure of one workload may take: ``seconds``, within bounds on its rounds.

    On a machine so busy that ``least`` rounds take ten times as long, three rounds are enough.
    """

    seconds: float = 1.0
    least: int = 5
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


def host_step(stepper: Stepper, device: torch.device) -> float:
    """The time until ``step()`` returns, called as a user calls it, with an idle device."""
    wait_for(device)
    begin = time.perf_counter_ns()
    stepper.step()
    end = time.perf_counter_ns()
    wait_for(device)
    return end - begin


def warm_turn(stepper: Stepper, device: torch.device) -> Turn:
    """Steps back to back: the median of as many as fill two milliseconds, after untimed ones.

    The untimed steps take the caches back from the contestant before. Tensors whose step takes more
    than 20 ms fit in no cache, so there is nothing to take back.
    """
    for _ in range(3):
        stepper.step()
    once = min(host_step(stepper, device) for _ in range(3))
    timed = max(1, min(100, round(2e6 / once)))
    untimed = min(10, timed) if once < 20e6 else 0

    def turn() -> float:
        for _ in range(untimed):
            stepper.step()
        return statistics.median(host_step(stepper, device) for _ in range(timed))

    return turn


def cold_turn(stepper: Stepper, device: torch.device, walked: Tensor) -> Turn:
    """One step after a walk through ``walked``, which is larger than the CPU's caches."""

    def turn() -> float:
        walked.add_(1)
        return host_step(stepper, device)

    return turn


def device_turn(stepper: Stepper, device: torch.device, flushed: Tensor) -> Turn:
    """GPU time between two events around one step, after the L2 was flushed.

    The GPU first spins until all launches of the step are queued; otherwise the events would
    measure how fast the host can launch.
    """
    host = max(host_step(stepper, device) for _ in range(3))
    spin = int((2 * host + 50_000) * SPIN_CYCLES_PER_NS)
    cuda: Any = torch.cuda  # events and _sleep have no types
    begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)

    def turn() -> float:
        flushed.zero_()
        cuda._sleep(spin)
        begin.record()
        stepper.step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e6

    return turn


def one_iteration(workload: Workload, trainer: Trainer) -> Callable[[], None]:
    """zero_grad, forward, backward and step on the workload's batch."""
    loss = workload.loss
    if loss is None:
        raise ValueError(f"{workload.title} has no batch to iterate over")

    def run() -> None:
        trainer.zero_grad()
        trainer.backward(loss())
        trainer.step()

    return run


def run_turn(run: Callable[[], object], device: torch.device) -> Turn:
    """A whole call, until the device has finished; it is run once before."""
    run()

    def turn() -> float:
        wait_for(device)
        begin = time.perf_counter_ns()
        run()
        wait_for(device)
        return time.perf_counter_ns() - begin

    return turn


@dataclass(frozen=True)
class Pass:
    """A reference for bandwidth: ``step`` moves ``size`` bytes with plain torch operations."""

    step: Callable[[], object]
    size: int


def reference_passes(workload: Workload, device: torch.device, family: Family) -> dict[str, Pass]:
    """What this machine's memory can do over as many bytes as the update must move.

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
        "reference/read-modify-write": Pass(read_modify_write, size),
        "reference/copy": Pass(lambda: p.copy_(g), 2 * first.element_size() * elements),
    }
