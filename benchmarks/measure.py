"""How it is measured: interleaved turns, paired ratios, equality first, and every measure apart.

Times are in nanoseconds, sizes in bytes.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from contestants import REFERENCE, Contestant, Groups, Hyper, Stepper
from models import Workload
from torch import Tensor, nn

# Without this the profiler tells stderr of every start and stop. Read at its first use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

Turn = Callable[[], float]
"""Runs a contestant once (or as often as a steady sample takes) and returns nanoseconds."""

WALKED_BYTES = 64 * 2**20
"""Walked between two steps to leave no cache warm: twice a common last-level cache."""
FLUSHED_BYTES = 256 * 2**20
"""Written between two steps on a GPU: more than the L2 of any."""
SPIN_CYCLES_PER_NS = 2.0
"""Generous: no GPU runs faster than this, so the spin never ends before the launches are queued."""
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
"""Largest difference from the reference that rounding explains, relative to the largest value of
the same tensor. Stock's unfused forms round to bfloat16 after every operation."""


@dataclass(frozen=True)
class Summary:
    """The middle of some samples, and what lies between their 10th and 90th percentile."""

    median: float
    low: float
    high: float


def summarise(samples: Sequence[float]) -> Summary:
    """Median, 10th and 90th percentile; with one sample all three are that sample."""
    if len(samples) == 1:
        return Summary(samples[0], samples[0], samples[0])
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return Summary(statistics.median(samples), tenths[0], tenths[-1])


def ratio(samples: Sequence[float], reference: Sequence[float]) -> Summary:
    """The ratio of the two medians, with the spread of the ratios taken round by round.

    Samples of one round ran within moments of each other, so what slows the whole machine for a
    while drops out of their ratio.
    """
    pairs = summarise([a / b for a, b in zip(samples, reference, strict=True)])
    middle = statistics.median(samples) / statistics.median(reference)
    return Summary(middle, min(pairs.low, middle), max(pairs.high, middle))


@dataclass(frozen=True)
class Budget:
    """How long one measure of one workload may take: ``seconds``, within bounds on its rounds.

    On a machine so busy that ``least`` rounds take ten times as long, three have to do.
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
    """Let everyone take a turn per round, each round in a new random order.

    Returns:
        Per contestant one sample per round, so samples of equal index belong together.
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
    """Nanoseconds until ``step()`` returns, called as a user calls it, with an idle device."""
    wait_for(device)
    begin = time.perf_counter_ns()
    stepper.step()
    end = time.perf_counter_ns()
    wait_for(device)
    return end - begin


def warm_turn(stepper: Stepper, device: torch.device) -> Turn:
    """Steps back to back: the median of as many as fill two milliseconds, after untimed ones.

    The untimed steps take back the caches from the contestant before. Above 20 ms the tensors fit
    in no cache and there is nothing to take back.
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
    """One step after a walk through ``walked``, which is larger than the caches of the CPU."""

    def turn() -> float:
        walked.add_(1)
        return host_step(stepper, device)

    return turn


def device_turn(stepper: Stepper, device: torch.device, flushed: Tensor) -> Turn:
    """GPU time between two events around one step, the L2 flushed before.

    The GPU spins first until all of the step's launches are queued; otherwise the events would
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


@dataclass(frozen=True)
class Pass:
    """A reference for bandwidth: ``run`` moves ``size`` bytes with plain torch operations."""

    run: Callable[[], object]
    size: int


def reference_passes(workload: Workload, device: torch.device) -> dict[str, Pass]:
    """What this machine's memory can do over as many bytes as the update must move.

    ``read-modify-write`` reads and writes what the update reads and writes, once each, in flat
    tensors: ``p += g`` (12 bytes per fp32 element) and, with momentum, ``m *= -1`` (8 more). On a
    CPU it is as fast as one compiled loop over all three. ``copy`` is the usual measure of a GPU;
    on a CPU its writes also read the line they replace, which is not counted in its bytes.
    """
    elements = sum(p.numel() for p in workload.trainable)
    item = workload.trainable[0].element_size()
    p, g, m = (
        torch.ones(elements, device=device, dtype=workload.trainable[0].dtype) for _ in range(3)
    )

    def read_modify_write() -> None:
        p.add_(g)
        if workload.hyper.momentum:
            m.mul_(-1)

    return {
        "read-modify-write": Pass(read_modify_write, workload.step_bytes),
        "copy": Pass(lambda: m.copy_(g), 2 * item * elements),
    }


class PassStepper:
    """A reference pass in a contestant's place."""

    def __init__(self, reference: Pass) -> None:
        self.step = reference.run


def iteration_turn(
    workload: Workload, optimizer: torch.optim.Optimizer, stepper: Stepper, device: torch.device
) -> Turn:
    """A whole training iteration, until the device is done with it."""
    run = one_iteration(workload, optimizer, stepper)
    run()

    def turn() -> float:
        wait_for(device)
        begin = time.perf_counter_ns()
        run()
        wait_for(device)
        return time.perf_counter_ns() - begin

    return turn


def one_iteration(
    workload: Workload, optimizer: torch.optim.Optimizer, stepper: Stepper
) -> Callable[[], None]:
    """zero_grad, forward, backward and step on the workload's batch."""
    loss = workload.loss
    if loss is None:
        raise ValueError(f"{workload.title} has no batch to iterate over")

    def run() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(loss())
        stepper.step()

    return run


@dataclass(frozen=True)
class Equality:
    """How far a contestant ends from the reference after the same steps."""

    bit_equal: bool
    largest_absolute: float
    largest_relative: float
    """The largest difference in a tensor over the largest value of the same tensor."""
    compile_seconds: float | None = None
    tolerance: float = TOLERANCES[torch.float32]

    @property
    def holds(self) -> bool:
        """Bit-equal, or no further away than the rounding of another order of operations."""
        return self.bit_equal or self.largest_relative <= self.tolerance


def compare_tensors(found: Iterable[Tensor], expected: Iterable[Tensor]) -> Equality:
    """Hold one list of tensors against another; any NaN is an infinite difference."""
    bit_equal, absolute, relative = True, 0.0, 0.0
    for a, b in zip(found, expected, strict=True):
        if torch.equal(a, b):
            continue
        bit_equal = False
        gap = (a - b).abs().max().item()
        scale = b.abs().max().item()
        if gap != gap or scale != scale:
            return Equality(False, float("inf"), float("inf"))
        absolute = max(absolute, gap)
        relative = max(relative, gap / scale if scale else float("inf"))
    return Equality(bit_equal, absolute, relative)


_SCALES = (1.0, -0.5, 0.75, 0.25, 1.0)
"""One gradient, another multiple of it at each step: signs and sizes change, no memory for each.
They do not cancel in the momentum, of which rounding would be all that is left."""


def _twin(tensor: Tensor) -> Tensor:
    """A copy that lies as far off a cache line's beginning."""
    shift = tensor.data_ptr() % 64 // tensor.element_size()
    if not shift:
        return tensor.clone()
    room = torch.empty(tensor.numel() + shift, dtype=tensor.dtype, device=tensor.device)
    return room[shift:].view(tensor.shape).copy_(tensor)


def _tensor(value: Any) -> Tensor | None:
    """A value in an optimizer's state, if it is a tensor or, as flashoptim's, wraps one."""
    value = value.materialize() if hasattr(value, "materialize") else value
    return value if isinstance(value, Tensor) else None


def _some_steps(
    contestant: Contestant, groups: Groups, hyper: Hyper
) -> tuple[list[Tensor], float | None]:
    """Copies of the parameters and their momentum after a few steps, and the time of compiling."""
    copies = [
        [nn.Parameter(_twin(p.detach()), requires_grad=p.requires_grad) for p in group]
        for group in groups
    ]
    flat = [p for group in copies for p in group]
    originals = [p for group in groups for p in group]
    entry = contestant.build(copies, hyper)
    compile_seconds = 0.0
    for index, scale in enumerate(_SCALES):
        for p, original in zip(flat, originals, strict=True):
            if original.grad is not None:
                if p.grad is None:
                    p.grad = _twin(original.grad)
                torch.mul(original.grad, scale, out=p.grad)
        begin = time.perf_counter()
        entry.stepper.step()
        if index < 2:  # compiled once without momentum and once with it
            compile_seconds += time.perf_counter() - begin
    moved = [p.detach() for p in flat]
    for p in flat:
        momentum = _tensor(entry.optimizer.state.get(p, {}).get("momentum_buffer"))
        moved.append(torch.empty(0) if momentum is None else momentum)
    return moved, compile_seconds if contestant.kind == "compiled" else None


def reference_result(workload: Workload) -> list[Tensor]:
    """Weights and momentum after five steps of stock, one tensor after the other."""
    return _some_steps(REFERENCE, workload.groups, workload.hyper)[0]


def check_equality(
    contestant: Contestant, workload: Workload, expected: Sequence[Tensor]
) -> Equality:
    """Let a contestant make the reference's steps on copies and compare weights and momentum.

    Raises:
        RuntimeError: this torch cannot run the contestant on these parameters.
    """
    moved, compile_seconds = _some_steps(contestant, workload.groups, workload.hyper)
    return replace(
        compare_tensors(moved, expected),
        compile_seconds=compile_seconds,
        tolerance=TOLERANCES[workload.trainable[0].dtype],
    )


def profiled(
    run: Callable[[], object],
    *activities: torch.profiler.ProfilerActivity,
    profile_memory: bool = False,
) -> list[Any]:
    """The profiler's events of one call: the CPU's, and those of further activities.

    Raises:
        RuntimeError: this torch has no such profiler.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, *activities],
        profile_memory=profile_memory,
    ) as profile:
        run()
    records = profile.profiler
    if records is None or records.kineto_results is None:
        raise RuntimeError("this torch was built without the kineto profiler")
    return list(records.kineto_results.events())


@dataclass(frozen=True)
class Allocations:
    """What torch's allocator did: how often, and how far above what was held before."""

    count: int
    peak: int


def allocations(run: Callable[[], object], device: torch.device) -> Allocations:
    """Count the tensor allocations of one call and find their peak over what was held before it."""
    if device.type == "cuda":
        wait_for(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        before = torch.cuda.memory_stats(device)["allocation.all.allocated"]
        run()
        wait_for(device)
        count = torch.cuda.memory_stats(device)["allocation.all.allocated"] - before
        return Allocations(count, torch.cuda.max_memory_allocated(device) - held)
    # torch keeps no statistics of the CPU's allocator: the profiler's records of it are exact.
    records = [e for e in profiled(run, profile_memory=True) if e.name() == "[memory]"]
    records.sort(key=lambda e: e.start_ns())
    level = peak = count = 0
    for record in records:
        level += record.nbytes()
        peak = max(peak, level)
        count += record.nbytes() > 0
    return Allocations(count, peak)


def launches(run: Callable[[], object], device: torch.device) -> int:
    """How many kernels one call starts on a GPU."""
    wait_for(device)

    def run_and_wait() -> None:
        run()
        wait_for(device)

    events = profiled(run_and_wait, torch.profiler.ProfilerActivity.CUDA)
    # The profiler draws ranges that it has names for on the time line of the GPU too.
    on_gpu = [e for e in events if e.device_type().name == "CUDA" and not e.is_user_annotation()]
    return sum(not e.name().startswith(("Memcpy", "Memset")) for e in on_gpu)


def held_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages behind some tensors, each storage once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if t is not None
    }
    return sum(storages.values())


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every tensor in an optimizer's state."""
    values = (_tensor(v) for state in optimizer.state.values() for v in state.values())
    return [value for value in values if value is not None]


@dataclass(frozen=True)
class Memory:
    """What an iteration needs, and what remains held after its step."""

    gradients: int
    state: int
    peak: int
    """Weights and state, and the most that an iteration takes on top."""
    step_allocations: int
    """Tensor allocations in one steady step."""


def memory(
    workload: Workload, optimizer: torch.optim.Optimizer, stepper: Stepper, device: torch.device
) -> Memory:
    """Measure one contestant's memory after iterations of its own; its state alone is counted."""
    run = one_iteration(workload, optimizer, stepper)
    # Freed here, not in the iteration: the profiler misses the end of what began before it.
    optimizer.zero_grad()
    held = held_bytes(workload.parameters) + held_bytes(state_tensors(optimizer))
    peak = held + allocations(run, device).peak
    return Memory(
        gradients=held_bytes(p.grad for p in workload.parameters),
        state=held_bytes(state_tensors(optimizer)),
        peak=peak,
        step_allocations=allocations(stepper.step, device).count,
    )
