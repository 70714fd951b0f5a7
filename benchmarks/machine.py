"""What the figures were taken on: the machine, and the versions of everything involved."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import torch_freeze

BUSY = 0.7
"""Below this share of its threads' time a process is held to have company."""
SIMULATED = "simulated GPU"
"""What tests/cuda_on_cpu calls its devices."""
_PACKAGES = ("torchvision", "transformers", "scikit-learn", "numpy")


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def driver_version() -> str | None:
    """The NVIDIA driver's version, if one answers."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    answer = subprocess.run(
        [command, "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.splitlines()[0].strip() if answer.stdout.strip() else None


def is_simulated(device: torch.device) -> bool:
    """Whether a CUDA device is the CPU in disguise, of which no time is a GPU's."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).name == SIMULATED


def granted_share(seconds: float = 0.3) -> float:
    """How much of the time its threads wanted the machine gave this process; 1 if all of it.

    Each of these operations waits for its slowest thread, as a multi-threaded step does: where
    others compute at the same time, its figures are mostly those of the waiting.
    """
    numbers = torch.ones(1 << 18)
    numbers.add_(1)
    wall, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        numbers.add_(1)
    spent = time.process_time() - cpu
    return min(1.0, spent / (time.perf_counter() - wall) / torch.get_num_threads())


def versions() -> dict[str, str | None]:
    """Python, torch with its CUDA, and the packages the workloads come from."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch built for CUDA": torch.version.cuda,
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def describe(device: torch.device) -> dict[str, Any]:
    """Everything a reader needs to judge the figures, ready for JSON."""
    described: dict[str, Any] = {
        "system": platform.platform(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "versions": versions(),
        "torch_freeze": dataclasses.asdict(torch_freeze.build_info()),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["gpu"] = properties.name
        described["gpu memory"] = properties.total_memory
        described["driver"] = driver_version()
    return described


def slug(described: dict[str, Any]) -> str:
    """What a file of this machine's figures is called: the GPU's name, or else the CPU's."""
    name = str(described.get("gpu") or described["cpu"]).lower()
    return re.sub(r"[^a-z0-9]+", "_", name).strip("_")


def headline(described: dict[str, Any]) -> str:
    """The same in one line, for the terminal."""
    where = described.get("gpu") or described["cpu"]
    cuda = described["versions"]["torch built for CUDA"]
    return (
        f"{where}, {described['cores']} cores, {described['threads']} threads, "
        f"torch {described['versions']['torch']} ({'CUDA ' + cuda if cuda else 'CPU only'})"
    )


def company(shares: Sequence[float]) -> str | None:
    """A warning, if the machine had other work at any time the share was looked at."""
    if min(shares) >= BUSY:
        return None
    return (
        f"This machine is busy: at times this process got {100 * min(shares):.0f} % of the time "
        "its threads wanted. Where they wait for each other, ratios and spread mostly show that; "
        "repeat the run on a machine that has nothing else to do."
    )
