"""What the figures were taken on: the machine, and the versions of everything involved."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import torch_freeze

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


def headline(described: dict[str, Any]) -> str:
    """The same in one line, for the terminal."""
    where = described.get("gpu") or described["cpu"]
    cuda = described["versions"]["torch built for CUDA"]
    return (
        f"{where}, {described['cores']} cores, {described['threads']} threads, "
        f"torch {described['versions']['torch']} ({'CUDA ' + cuda if cuda else 'CPU only'})"
    )
