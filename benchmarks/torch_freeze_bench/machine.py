"""What the figures were taken on: the machine, and the versions of everything involved."""

from __future__ import annotations

import functools
import os
import platform
import re
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils import collect_env

import torch_freeze

BUSY = 0.7
"""Below this share of CPU time, warn that other processes are competing."""
SIMULATED = "simulated GPU"
"""The name of tests/cuda_on_cpu's devices."""
_PACKAGES = ("torchvision", "transformers", "scikit-learn", "numpy", "pandas")
_COMPARED = ("flashoptim", "torch-optimi", "bitsandbytes", "lomo-optim", "apex", "peft")


def is_simulated(device: torch.device) -> bool:
    """Whether a CUDA device is simulated by the CPU, so that no time is a GPU's."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).name == SIMULATED


def granted_share(seconds: float = 0.3) -> float:
    """How much of the time that its threads wanted this process got; 1 if all of it.

    Each of these operations waits for its slowest thread, as a multi-threaded step does: where
    other processes compute at the same time, figures mostly show that waiting.
    """
    numbers = torch.ones(1 << 18)
    numbers.add_(1)
    wall, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        numbers.add_(1)
    spent = time.process_time() - cpu
    return min(1.0, spent / (time.perf_counter() - wall) / torch.get_num_threads())


def company(shares: Sequence[float]) -> str | None:
    """A warning, if other processes competed at any time that the share was looked at."""
    if min(shares) >= BUSY:
        return None
    return (
        f"This machine is busy: other processes are competing, and at times this one got "
        f"{100 * min(shares):.0f} % of the time that its threads wanted. Where threads wait for "
        "each other, ratios and spread mostly show that; repeat the run on an idle machine."
    )


@functools.cache
def _environment() -> Any:
    return collect_env.get_env_info()


def describe(device: torch.device) -> dict[str, str]:
    """Everything a reader needs to judge the figures."""
    found = _environment()
    name = re.search(r"^Model name: *(.*?) *$", found.cpu_info or "", re.MULTILINE)
    described = {
        "cpu": name[1] if name else platform.processor() or platform.machine(),
        "cores": f"{os.cpu_count()}",
        "threads": f"{torch.get_num_threads()}",
        "system": f"{found.os}, {found.python_platform}",
        "device": device.type,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["gpu"] = properties.name
        described["gpu memory"] = f"{properties.total_memory / 1e9:.1f} GB"
        described["driver"] = f"{found.nvidia_driver_version}"
    installed = {
        found.metadata["Name"].lower(): found.version for found in metadata.distributions()
    }
    return described | {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch built for CUDA": torch.version.cuda or "no",
        "built": f"{torch_freeze.build_info()}",
        **{package: installed.get(package, "not installed") for package in _PACKAGES},
        **{package: installed[package] for package in _COMPARED if package in installed},
    }


def slug(described: dict[str, str]) -> str:
    """The name of a file with this machine's figures: the GPU's name, or else the CPU's."""
    name = (described.get("gpu") or described["cpu"]).lower()
    return re.sub(r"[^a-z0-9]+", "_", name).strip("_")


def headline(described: dict[str, str]) -> str:
    """The machine in one line, for the terminal."""
    where, cuda = described.get("gpu") or described["cpu"], described["torch built for CUDA"]
    return (
        f"{where}, {described['cores']} cores, {described['threads']} threads, "
        f"torch {described['torch']} ({'CPU only' if cuda == 'no' else 'CUDA ' + cuda})"
    )


def available_bytes(device: torch.device) -> int | None:
    """Memory that a process can still take on the device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if not info.is_file():
        return None
    bounds = [1024 * _fields(info)["MemAvailable:"]]
    limit = group / "memory.max"
    if limit.is_file() and limit.read_text().strip() != "max":
        # Cached files count as used, but they give way.
        used = int((group / "memory.current").read_text())
        cached = _fields(group / "memory.stat")["inactive_file"]
        bounds.append(int(limit.read_text()) - used + cached)
    return min(bounds)


def _fields(path: Path) -> dict[str, int]:
    return {line.split()[0]: int(line.split()[1]) for line in path.read_text().splitlines()}
