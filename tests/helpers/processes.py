"""A group of processes that run functions of test modules, all at the same time.

The processes are started once for many tests. A test names a function of its own module; each
process calls it with the device and sends back what it returns.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tests import cuda_on_cpu

dist = torch.distributed


@dataclass
class World:
    """Processes waiting for what to run."""

    size: int
    pipes: list[Any]

    def run(
        self, function: Callable[..., Any], *args: Any, options: dict[str, Any] | None = None
    ) -> list[Any]:
        """Run `function(device, *args, **options)` on every rank, and return the answers."""
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__name__, args, options or {}))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(120):
                raise TimeoutError(f"rank {rank} of {self.size} does not answer")
            answers.append(pipe.recv())
        for rank, (failure, _) in enumerate(answers):
            assert failure is None, f"rank {rank} of {self.size}:\n{failure}"
        return [value for _, value in answers]


def serve(
    pipe: Any, rank: int, size: int, device: str, rendezvous: str, launcher: dict[str, str]
) -> None:
    """Answer one request after the other until the pipe is closed; each process runs this."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(launcher, RANK=str(rank), LOCAL_RANK=str(rank))
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" and not cuda_on_cpu.is_running() else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=size,
    )
    while True:
        try:
            module, name, args, options = pipe.recv()
        except EOFError:
            break
        try:
            torch.manual_seed(0)
            answer = getattr(importlib.import_module(module), name)(device, *args, **options)
            pipe.send((None, answer))
        except Exception:
            pipe.send((traceback.format_exc(), None))
    dist.destroy_process_group()


@contextmanager
def world_of(device: str, size: int) -> Iterator[World]:
    """A group of `size` processes; on GPUs, one per GPU where `size` is 0.

    Their environment is like that of a process started by torchrun, which frameworks look for.
    """
    size = size or torch.cuda.device_count()
    # The server imports torch once; processes forked from it start at once, without its threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.fsdp", "torch_freeze"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
        "OMP_NUM_THREADS": "1",
    }
    pipes, processes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(size):
            ours, theirs = context.Pipe()
            args = (theirs, rank, size, device, f"{folder}/rendezvous", launcher)
            process = context.Process(target=serve, args=args, daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        yield World(size, pipes)
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(30)
            if process.is_alive():
                process.kill()
