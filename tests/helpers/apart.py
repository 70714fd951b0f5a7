"""Run a function in a child process, so that a crash fails one test and not the whole run.

Where there is a GPU, children of a process that has run backward cannot run it, and children of one
that has asked for GPUs cannot use them. So a process is put aside before any test module is loaded,
and the children are forked from that one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib
import multiprocessing
import os
import pickle
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tests.helpers import optim_cases as cases


@dataclass
class DiedError(Exception):
    """The child ended by a signal, or without an answer."""

    how: str

    def __str__(self) -> str:
        return self.how


class _Origin:
    """What this process knows of the one that was put aside."""

    pipe: Any = None
    of = -1  # the process that may use the pipe


def put_aside() -> None:
    """Fork the process that children come from, before this one runs backward or asks for GPUs."""
    ours, theirs = multiprocessing.Pipe()
    if _fork() == 0:
        try:
            ours.close()
            torch.set_num_threads(1)
            while True:
                # Done here once and not in every child: recv() imports the function's module; then
                # come what torch imports for a first optimizer, and the tests' pool of numbers.
                try:
                    function, seconds = theirs.recv()
                except EOFError:  # the other end is closed
                    break
                except Exception as error:  # of that import, which only fails the test at hand
                    theirs.send((pickle.dumps((False, f"{type(error).__name__}: {error}")), 0))
                    continue
                importlib.import_module("torch._dynamo")
                cases.randn(1, cases.generator(0))
                theirs.send(_answer_of_child(function, seconds))
        finally:
            os._exit(0)
    theirs.close()
    _Origin.pipe, _Origin.of = ours, os.getpid()


def run(function: Callable[..., Any], *args: Any, seconds: int = 120) -> Any:
    """Return what `function(*args)` returns in a child; everything has to be picklable.

    The child is single-threaded: no OpenMP pool lives through a fork.
    """
    assert os.getpid() == _Origin.of, "put_aside() first; from within a child, use fork()"
    _Origin.pipe.send((functools.partial(function, *args), seconds))
    return _value_of(*_Origin.pipe.recv())


def fork(function: Callable[[], Any], seconds: int = 120) -> Any:
    """Return what `function()` returns, picklable, in a child of this very process."""
    return _value_of(*_answer_of_child(function, seconds))


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking while threads exist
        return os.fork()


def _answer_of_child(function: Callable[[], Any], seconds: int) -> tuple[bytes, int]:
    """The child's answer, pickled, and its exit status."""
    reader, writer = os.pipe()
    child = _fork()
    if child == 0:
        try:
            os.close(reader)
            faulthandler.disable()  # pytest's prints the parent's stack
            signal.alarm(seconds)
            torch.set_num_threads(1)
            # torch makes a new autograd engine after a fork, at its first use and without a
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
    return answer, os.waitpid(child, 0)[1]


def _value_of(answer: bytes, status: int) -> Any:
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
    """Leave memory for so many large float32 tensors of a size, and for small things.

    Free memory that malloc holds, which may be much in an old process, is used up first.
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
