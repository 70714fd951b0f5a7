"""torch's CUDA build and the project's CUDA code, run on a machine without a GPU.

`make test-cuda` builds the simulation and runs the tests on it; README.md says how it works and
what it shows. A command of your own:

    python tests/cuda_on_cpu/run.py -- python -m pytest -p tests.cuda_on_cpu.plugin tests/kernels
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

# The variable that names the schedule; set in every process of the simulation.
SCHEDULE = "CUDA_ON_CPU_SCHEDULE"


class Record(NamedTuple):
    """Something that the runtime was asked for."""

    kind: str  # launch, op, copy, fill, sync, malloc, free, graph, host or context
    name: str
    device: int
    stream: int  # 0: the main one
    bytes: int  # copied, allocated, or of a kernel's argument
    grid: int
    block: int


def is_running() -> bool:
    """Whether this process runs on the simulation."""
    return SCHEDULE in os.environ


def _call(function: str, *args: bytes) -> str:
    # Preloaded, so among the symbols of the program itself.
    entry = getattr(ctypes.CDLL(None), f"cuda_on_cpu_{function}")
    entry.restype = ctypes.c_char_p
    return (entry(*args) or b"").decode()


def take_log() -> list[Record]:
    """Return everything the runtime was asked for since the last call."""
    fields = [line.split("\t") for line in _call("take_log").splitlines()]
    return [Record(kind, name, *map(int, rest)) for kind, name, *rest in fields]


def log_of(run: Callable[[], Any]) -> list[Record]:
    """Return what `run` asks the runtime for."""
    take_log()
    run()
    return take_log()


def finish() -> str:
    """Run all that is left on the streams, and return why some of it failed."""
    return _call("finish")


@contextmanager
def schedule(name: str) -> Iterator[None]:
    """Run work by another schedule: now, late, side-late, main-late or a seed."""
    _call("set_schedule", name.encode())
    try:
        yield
    finally:
        _call("set_schedule", os.environ[SCHEDULE].encode())
