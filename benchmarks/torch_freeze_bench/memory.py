"""How memory is measured: every event of torch's allocator, and live gradients.

Sizes are in bytes, times in nanoseconds of the profiler's clock.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import accumulate

import numpy
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .contestants import hook_on
from .timing import wait_for

# Without this the profiler reports every start and stop on stderr. It is read at the first use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
_MARK = "compare.py: "


def mark(name: str) -> AbstractContextManager[object]:
    """Name what runs inside, for the timeline that is being recorded."""
    return torch.profiler.record_function(_MARK + name)


@dataclass
class Timeline:
    """What torch's allocator held after each of its events, above what it held at first."""

    times: list[int] = field(default_factory=list)
    levels: list[int] = field(default_factory=list)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Begin and end of the marked parts."""
    launches: int = 0
    """Kernels that were started on a GPU, if they were asked for."""
    allocations: int = 0
    """How many blocks the allocator handed out."""

    def inside(self, name: str) -> list[int]:
        """The levels during a marked part, beginning with the level that it finds."""
        begin, end = self.spans[name]
        first = int(numpy.searchsorted(self.times, begin))
        last = int(numpy.searchsorted(self.times, end, side="right"))
        return [0, *self.levels][first : last + 1]

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
    take from torch's allocator (oneDNN's scratch space, cuBLAS's handles) is not seen.

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
    found, memory = Timeline(), []
    for event in profile.profiler.kineto_results.events():
        name, where = event.name(), event.device_type().name
        if name == "[memory]":
            if where == device.type.upper():
                memory.append((event.start_ns(), event.nbytes()))
        elif where == "CUDA":
            # The profiler also draws named ranges on the GPU's time line.
            copies = name.startswith(("Memcpy", "Memset"))
            found.launches += not (copies or event.is_user_annotation())
        elif name.startswith(_MARK):
            begin = event.start_ns()
            found.spans[name.removeprefix(_MARK)] = begin, begin + event.duration_ns()
    memory.sort(key=lambda taken: taken[0])
    found.times = [time for time, _ in memory]
    found.levels = list(accumulate(size for _, size in memory))
    found.allocations = sum(size > 0 for _, size in memory)
    return found


def held_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages behind some tensors, each storage once."""
    storages = (t.untyped_storage() for t in tensors if t is not None)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


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


def trim() -> None:
    """Return to the system what malloc keeps; glibc keeps tens of megabytes in each gap."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
