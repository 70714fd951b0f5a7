"""How memory is measured: every event of torch's allocator, live gradients, and a process's peak.

Sizes are in bytes, times in nanoseconds of the profiler's clock.
"""

from __future__ import annotations

import bisect
import ctypes
import multiprocessing
import resource
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from measure import profiled
from models import NotEnoughMemoryError
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

_MARK = "compare.py: "


def mark(name: str) -> AbstractContextManager[object]:
    """Name what runs inside, for the timeline that is being recorded."""
    return torch.profiler.record_function(_MARK + name)


@dataclass(frozen=True)
class Span:
    """When a marked part began and ended."""

    begin: int
    end: int


@dataclass(frozen=True)
class Timeline:
    """What torch's allocator held after each of its events, above what it held at first."""

    times: Sequence[int]
    levels: Sequence[int]
    spans: dict[str, Span]

    def level(self, time: int) -> int:
        """Bytes held at a time."""
        index = bisect.bisect_right(self.times, time)
        return self.levels[index - 1] if index else 0

    def inside(self, name: str) -> Sequence[int]:
        """The levels that a marked part went through, that at its beginning first."""
        span = self.spans[name]
        first = bisect.bisect_left(self.times, span.begin)
        last = bisect.bisect_right(self.times, span.end)
        return [self.level(span.begin), *self.levels[first:last]]

    def peak(self, *names: str) -> int:
        """The most bytes held in any of these parts."""
        return max(max(self.inside(name)) for name in names)

    def temporaries(self, name: str) -> int:
        """How far a marked part rose above both what it found and what it left."""
        levels = self.inside(name)
        return max(levels) - max(levels[0], levels[-1])


def record(run: Callable[[], object], device: torch.device) -> Timeline:
    """Follow torch's allocator on one device through a call.

    Both devices' allocators report every block to the profiler, temporaries inside an operator
    included, so their running sum is exact. On a CPU the end of a block is reported only if its
    beginning was: what the call is to free must be allocated by the call. What libraries take past
    torch's allocator (oneDNN's scratch space, cuBLAS's handles) is not seen; a process's peak is.
    """
    kind = "CUDA" if device.type == "cuda" else "CPU"
    memory: list[tuple[int, int]] = []
    spans: dict[str, Span] = {}
    for event in profiled(run, profile_memory=True):
        name = event.name()
        if name == "[memory]":
            if event.device_type().name == kind:
                memory.append((event.start_ns(), event.nbytes()))
        elif name.startswith(_MARK):
            begin = event.start_ns()
            spans[name.removeprefix(_MARK)] = Span(begin, begin + event.duration_ns())
    memory.sort(key=lambda taken: taken[0])
    level, levels = 0, []
    for _, size in memory:
        level += size
        levels.append(level)
    return Timeline([time for time, _ in memory], levels, spans)


class GradientProbe:
    """Sums the bytes of all live gradients whenever one arrives.

    A gradient counts until its storage is freed, whoever holds it: ``.grad``, or an optimizer that
    took it from there. Made before the optimizer, so that its hooks run before the optimizer's.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._hooks = []
        for p in parameters:
            trained = p.requires_grad
            p.requires_grad_(True)  # a frozen parameter takes no hook; it keeps it when frozen
            self._hooks.append(p.register_post_accumulate_grad_hook(self._arrived))
            p.requires_grad_(trained)

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
        """Forget the peak reached so far, not the gradients that are alive."""
        self.peak = self.live()

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def peak_rss() -> int:
    """The most memory this process has had resident so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        answer = (True, function(*arguments))
    except BaseException as error:  # the parent learns of everything
        answer = (False, f"{type(error).__name__}: {error}")
    pipe.send(answer)


def in_child(function: Callable[..., Any], *arguments: Any, imports: Sequence[str] = ()) -> Any:
    """What a function returns in a process of its own.

    The process is forked off one that has imported torch and ``imports`` and done nothing else. So
    its peak is its own: a child of this process would begin with this one's memory, and one that
    begins with ``exec`` would still be charged this one's peak.

    Args:
        function: found by its module and name in the child.
        arguments: what it is called with; picklable, as its result must be.
        imports: modules that all children may share, as far as they are installed.

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
    except BaseException:  # Ctrl-C among them
        process.kill()
        raise
    finally:
        process.join()
    if not came_back:
        raise RuntimeError(value)
    return value


def trim() -> None:
    """Hand back to the system what malloc keeps; glibc's keeps tens of megabytes in each gap."""
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
        # What is used counts cached files, which give way.
        cached = _fields(group / "memory.stat")["inactive_file"]
        bounds.append(int(limit.read_text()) - int(used.read_text()) + cached)
    return min(bounds)


def _fields(path: Path) -> dict[str, int]:
    return {line.split()[0]: int(line.split()[1]) for line in path.read_text().splitlines()}


def require_memory(wanted: int, device: torch.device, purpose: str) -> None:
    """Check that a device can hold so many bytes.

    Raises:
        models.NotEnoughMemoryError: it cannot; the message says what needs how much.
    """
    found = available_bytes(device)
    if found is not None and found < wanted:
        where = "the GPU" if device.type == "cuda" else "this machine"
        raise NotEnoughMemoryError(
            f"{purpose} needs {wanted / 1e9:.1f} GB of memory and {where} has "
            f"{found / 1e9:.1f} GB to give"
        )
