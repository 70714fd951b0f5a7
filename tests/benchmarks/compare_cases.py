"""Made-up records and settings for the tests of the benchmark."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("pandas", reason="compare.py needs pandas: pip install pandas")
pytest.importorskip("tabulate", reason="compare.py needs tabulate: pip install tabulate")
pytest.importorskip("tqdm", reason="compare.py needs tqdm: pip install tqdm")
pytest.importorskip("matplotlib", reason="compare.py needs matplotlib: pip install matplotlib")

from torch_freeze_bench.contestants import select
from torch_freeze_bench.records import FACTS, Measured
from torch_freeze_bench.suites.base import Setting
from torch_freeze_bench.timing import Budget

CPU = torch.device("cpu")
GPUS = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ],
)


def setting(steps: int = 2, device: torch.device = CPU, **options: Any) -> Setting:
    return Setting(device, Budget(seconds=60, least=steps, most=steps), **options)


def outcome(
    samples: dict[str, dict[str, list[float]]],
    *,
    device: str = "cpu",
    suite: str = "speed",
    gap: float | None = 0.0,
    title: str = "MobileNetV3-small, all but the head frozen",
) -> Measured:
    """An outcome with made-up samples, by contestant and measure."""
    details = " (92.0 % of the elements); 161 tensors; 109,483,778 elements; momentum 0.9"
    found = Measured(suite, "made-up", title, details)
    found.add(FACTS, frozen_tensors=159, step_bytes=20_000)
    for contestant in select(any_frozen=True, forms=("fused",)):
        if contestant.key in samples:
            found.add(contestant.key, **samples[contestant.key])
            if gap is not None:
                found.compare(contestant.key, gap, 1e-5)
    rounds = len(samples["ours"]["warm"])
    measure = "device" if device == "cuda" else "warm"
    for name, size in (("read-modify-write", 20_000), ("copy", 8_000)):
        found.add(f"reference/{name}", bytes=size, **{measure: [1e3] * rounds})
    found.add("reference/beside", warm=[1_000.0, 1_200.0])
    return found


def measured(ours: float, **stock: float) -> dict[str, dict[str, list[float]]]:
    """Two rounds of warm steps: ours, and stock as ``all_fused=...``."""
    times = {"ours": ours} | {name.replace("_", "/"): time for name, time in stock.items()}
    return {key: {"warm": [time, time]} for key, time in times.items()}


def fact(found: Measured, name: str) -> float:
    """A number that describes the workload itself."""
    return found.samples[FACTS][name][0]


def widest(text: str) -> int:
    return max(map(len, text.splitlines()))


def flat(text: str) -> str:
    """Without the breaks of its lines."""
    return " ".join(text.split())
