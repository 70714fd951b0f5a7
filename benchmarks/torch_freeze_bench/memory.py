"""How memory is measured: every event of torch's allocator, live gradients, and a process's peak.

Sizes are in bytes, times in nanoseconds of the profiler's clock.
"""

from __future__ import annotations

import bisect
import ctypes
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .contestants import Trainer, hook_on
from .timing import one_iteration, wait_for
from .workloads import RequestError, Workload

# Without this the profiler reports every start and stop on stderr. It is read at the first use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
_MARK = "compare.py: "


class NotEnoughMemoryError(RequestError):
    """The device cannot hold what was asked for; the message says how much that is."""


def mark(name: str) -> AbstractContextManager[object]:
    """Name what runs inside, for the timeline that is being recorded."""
    return torch.profiler.record_function(_MARK + name)


@dataclass
class Timeline:
    """What torch's allocator held after each of its events, above what it held at first."""

    times: Sequence[int]
    levels: Sequence[int]
    spans: dict[str, tuple[int, int]]
    """Begin and end of the marked parts."""
    launches: int = 0
    """Kernels that were started on a GPU, if they were asked for."""
    allocations: int = 0
    """How many blocks the allocator handed out."""

    def level(self, time: int) -> int:
        """Bytes held at a time."""
        index = bisect.bisect_right(self.times, time)
        return self.levels[index - 1] if index else 0

    def inside(self, name: str) -> Sequence[int]:
        """The levels during a marked part, beginning with the level that it finds."""
        begin, end = self.spans[name]
        first, last = bisect.bisect_left(self.times, begin), bisect.bisect_right(self.times, end)
        return [self.level(begin), *self.levels[first:last]]

    def peak(self, *names: str) -> int:
        """The most bytes held in any of these parts, or in the whole call."""
        return max([0, *self.levels] if not names else (max(self.inside(name)) for name in names))

    def temporaries(self, name: str) -> int:
        """How far a marked part rose above both what it found and what it left."""
        levels = self.inside(name)
        return max(levels) - max(levels[0], levels[-1])


def record(
    run: Callable[[], object], device: torch.device, *, count_launches: bool = False
) -> Timeline:
    """Follow torch's allocator on one device through a call.

    Both devices' allocators report every block to the profiler, temporaries inside operators
    included, so their running sum is exact. On a CPU the end of a block is reported only if its
    beginning was: what the call frees must be allocated by the call. Memory that libraries do not
    take from torch's allocator (oneDNN's scratch space, cuBLAS's handles) is not seen; the peak of
    a process includes it.

    Raises:
        RuntimeError: this torch was built without the profiler.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if count_launches:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
        if count_launches:
            wait_for(device)
    if profile.profiler is None or profile.profiler.kineto_results is None:
        raise RuntimeError("this torch was built without the kineto profiler")
    kind = device.type.upper()
    memory: list[tuple[int, int]] = []
    found = Timeline([], [], {})
    for event in profile.profiler.kineto_results.events():
        name, where = event.name(), event.device_type().name
        if name == "[memory]":
            if where == kind:
                memory.append((event.start_ns(), event.nbytes()))
        elif where == "CUDA":
            # The profiler also draws named ranges on the GPU's time line.
            copies = name.startswith(("Memcpy", "Memset"))
            found.launches += not (copies or event.is_user_annotation())
        elif name.startswith(_MARK):
            begin = event.start_ns()
            found.spans[name.removeprefix(_MARK)] = begin, begin + event.duration_ns()
    memory.sort(key=lambda taken: taken[0])
    level, levels = 0, []
    for _, size in memory:
        level += size
        levels.append(level)
    found.times, found.levels = [time for time, _ in memory], levels
    found.allocations = sum(size > 0 for _, size in memory)
    return found


def held_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages behind some tensors, each storage once."""
    storages = (t.untyped_storage() for t in tensors if t is not None)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def iteration_memory(workload: Workload, trainer: Trainer, device: torch.device) -> dict[str, int]:
    """What an iteration needs, and what remains after its step.

    ``gradients`` and ``state`` are held after the step. ``peak`` is that of weights and state, plus
    the most that an iteration takes on top. ``step_allocations`` are those of one steady step. Only
    the trainer's own state is counted, and its first iteration must be over.
    """
    run = one_iteration(workload, trainer)
    # Freed here, not in the iteration: the profiler misses the end of blocks that began earlier.
    trainer.zero_grad()
    held = held_bytes(workload.parameters) + held_bytes(trainer.state())
    if device.type == "cuda":
        wait_for(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        wait_for(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        peak = record(run, device).peak()
    return {
        "gradients": held_bytes(p.grad for p in workload.parameters),
        "state": held_bytes(trainer.state()),
        "peak": held + peak,
        "step_allocations": step_allocations(trainer, device),
    }


def step_allocations(trainer: Trainer, device: torch.device) -> int:
    """How many tensors one step allocates."""
    if device.type != "cuda":
        return record(trainer.step, device).allocations
    wait_for(device)
    before = torch.cuda.memory_stats(device)["allocation.all.allocated"]
    trainer.step()
    wait_for(device)
    return int(torch.cuda.memory_stats(device)["allocation.all.allocated"] - before)


class GradientProbe:
    """Sums the bytes of all live gradients whenever one arrives.

    A gradient counts until its storage is freed, whoever holds it: ``.grad``, or an optimizer that
    took it from there. Make it before the optimizer, so that its hooks run before the optimizer's.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        for p in parameters:
            hook_on(p, self._arrived)

    def _arrived(self, param: Tensor) -> None:
        if param.grad is None:  # an optimizer's hook ran before and has taken it
            raise RuntimeError("a gradient was gone before it was counted")
        storage = param.grad.untyped_storage()
        # As long as the reference lives, no other storage can have its address.
        self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.live())

    def live(self) -> int:
        """Bytes of the gradients alive now, of those that arrived since the probe was made."""
        self._live = {key: kept for key, kept in self._live.items() if not kept[0].expired()}
        return sum(size for _, size in self._live.values())

    def restart(self) -> None:
        """Forget the peak reached so far, but not the gradients that are alive."""
        self.peak = self.live()


def peak_rss() -> int:
    """The most memory that this process has had resident so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        answer = (True, function(*arguments))
    except BaseException as error:  # the parent reports everything
        answer = (False, f"{type(error).__name__}: {error}")
    pipe.send(answer)


def in_child(function: Callable[..., Any], *arguments: Any, imports: Sequence[str] = ()) -> Any:
    """What a function returns in a process of its own.

    The process is forked off one that has imported torch and ``imports`` and done nothing else, so
    its peak is its own. A child of this process would begin with this one's memory, and even after
    ``exec`` it would still be charged this one's peak.

    Args:
        function: found by its module and name in the child.
        arguments: what it is called with; they and the result must be picklable.
        imports: modules that all children may share, if they are installed.

    Raises:
        RuntimeError: the function raised, with its message, or the process died.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", *imports])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        came_back, value = receiver.recv()
    except EOFError:
        process.join()  # for its status
        raise RuntimeError(f"a child process ended with status {process.exitcode}") from None
    except BaseException:  # including Ctrl-C
        process.kill()
        raise
    finally:
        process.join()
    if not came_back:
        raise RuntimeError(value)
    return value


def trim() -> None:
    """Return to the system what malloc keeps; glibc keeps tens of megabytes in each gap."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def available_bytes(device: torch.device) -> int | None:
    """Memory that a process can still take on the device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    bounds = [1024 * _fields(info)["MemAvailable:"]]
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and limit.read_text().strip() != "max":
        # Cached files count as used, but they give way.
        cached = _fields(group / "memory.stat")["inactive_file"]
        bounds.append(int(limit.read_text()) - int(used.read_text()) + cached)
    return min(bounds)


def _fields(path: Path) -> dict[str, int]:
    return {line.split()[0]: int(line.split()[1]) for line in path.read_text().splitlines()}


def require_memory(wanted: int, device: torch.device, purpose: str) -> None:
    """Check that a device can hold so many bytes.

    Raises:
        NotEnoughMemoryError: it cannot; the message says what needs how much.
    """
    found = available_bytes(device)
    if found is not None and found < wanted:
        where = "the GPU" if device.type == "cuda" else "this machine"
        raise NotEnoughMemoryError(
            f"{purpose} needs {wanted / 1e9:.1f} GB of memory and {where} has "
            f"{found / 1e9:.1f} GB to give"
        )
