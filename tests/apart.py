"""Run a function in a child process, so that a crash is a failed test and not the end of all."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class DiedError(Exception):
    """The child ended by a signal, or without a word."""

    how: str

    def __str__(self) -> str:
        return self.how


def run(function: Callable[[], Any], seconds: int = 120) -> Any:
    """What `function` returns in a forked child; it has to be picklable.

    The child is single-threaded: no OpenMP pool lives through a fork.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking while threads exist
        child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            faulthandler.disable()  # pytest's prints the parent's stack
            signal.alarm(seconds)
            torch.set_num_threads(1)
            # torch makes its autograd engine anew after a fork, at its first use and without a
            # lock: threads that reach it together free what the others are using.
            torch.ones((), requires_grad=True).square().backward()
            try:
                answer = pickle.dumps((True, function()))
            except BaseException as error:
                answer = pickle.dumps((False, f"{type(error).__name__}: {error}"))
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(answer)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise DiedError(f"died of {signal.Signals(os.WTERMSIG(status)).name}")
    if not answer:
        raise DiedError("ended without an answer")
    came_back, value = pickle.loads(answer)
    if not came_back:
        raise AssertionError(value)
    return value


@contextlib.contextmanager
def memory_for(blocks: int, numel: int) -> Iterator[None]:
    """No memory but for so many float32 tensors of a size that is large, and for small things.

    What malloc has lying about, which may be much in a process long used, is taken too.
    """
    size = 4 * numel
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + blocks * size + size // 2, hard))
    taken: list[torch.Tensor] = []
    try:
        with contextlib.suppress(RuntimeError):
            while True:
                taken.append(torch.empty(numel))
        assert len(taken) >= blocks
        del taken[len(taken) - blocks :]
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        taken.clear()
