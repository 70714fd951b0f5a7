"""The suite `targets`: the speed that the project wants to reach, on a CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from ..memory import held_bytes, record, step_allocations
from ..records import OURS, Measured, Summary
from ..speed_report import share_of_pass
from ..tables import NOTHING, Reached, at_most, duration, multiple
from ..workloads import MODELS, LoadedModel, Place, Workload, flat_set, many_groups
from .base import Setting
from .speed import BESIDE, run_models, run_synthetic, run_workload, steady

ON_CPU = ("resnet50", "vit_b_16", "mobilenet_v3_small")
ON_CUDA = ("resnet50", "resnet18_batch_8", "bert_base_batch_4")
"""The networks of the GPU's table; the last two for whole iterations."""
ON_SIMULATED_CUDA = ("mobilenet_v3_small",)
SIMULATED_SCALE = 1e-3
"""Of the GPU's flat sets, whose elements a CPU works through on simulated CUDA."""


@dataclass(frozen=True)
class Target:
    """A line of the table: a figure of one workload, and the bound that it is to keep."""

    case: str
    workload: str
    figure: Callable[[Measured], tuple[float, str] | None]
    """The value and how it is shown; None if it was not measured."""
    bound: str
    """A comparison: ``">= 12x"``; or ``"-"`` if the figure is reported without a target."""

    def line(self, found: Mapping[str, Measured]) -> Reached:
        """Compare the figure with its bound, by the workloads' keys."""
        of = found.get(self.workload)
        taken = self.figure(of) if of else None
        if taken is None:
            return Reached(self.case, NOTHING, self.bound, "not measured")
        value, text = taken
        if self.bound == NOTHING:
            return Reached(self.case, text, self.bound, "no target")
        sign, limit, *_ = self.bound.replace("x", " ").split()
        kept = value >= float(limit) if sign == ">=" else value <= float(limit)
        return Reached(self.case, text, self.bound, "reached" if kept else "missed")


def _times(ratio: Summary) -> str:
    return f"{ratio.median:.2f}x [{multiple(ratio.low)}-{multiple(ratio.high)}]"


def faster(case: str, key: str, against: str, least: float, measure: str = "warm") -> Target:
    """Ours is to be at least ``least`` times as fast as one stock contestant."""

    def figure(of: Measured) -> tuple[float, str] | None:
        ratio, ours = of.ratio(against, measure), of.time(OURS, measure)
        if ratio is None or ours is None:
            return None
        return ratio.median, f"{_times(ratio)}, {duration(ours.median)}"

    case = f"{case}, vs stock {against.replace('/', ' ')}"
    return Target(case, key, figure, f">= {least:g}x")


def frozen_cost(case: str, key: str, most: float) -> Target:
    """Each frozen parameter may add ``most`` nanoseconds to a warm step."""

    def figure(of: Measured) -> tuple[float, str] | None:
        ours, without = of.time(OURS, "warm"), of.time(BESIDE, "warm")
        if ours is None or without is None:
            return None
        cost = (ours.median - without.median) / of.fact("frozen tensors")
        return cost, f"{cost:.2f} ns"

    return Target(case, key, figure, f"<= {most:g} ns")


def bandwidth(case: str, key: str, least: float) -> Target:
    """The update is to move its bytes at ``least`` percent of the reference pass's speed."""

    def figure(of: Measured) -> tuple[float, str] | None:
        share = share_of_pass(of)
        if share is None:
            return None
        low, high = 100 * share.low, 100 * share.high
        return 100 * share.median, f"{100 * share.median:.0f} % [{low:.0f}-{high:.0f}]"

    return Target(case, key, figure, f">= {least:g} %")


def host_time(case: str, key: str, most: float) -> Target:
    """A step is to return within ``most`` microseconds when the GPU is idle."""

    def figure(of: Measured) -> tuple[float, str] | None:
        time = of.time(OURS, "warm")
        if time is None:
            return None
        spread = f"[{duration(time.low)}-{duration(time.high)}]"
        return time.median / 1e3, f"{duration(time.median)} {spread}"

    return Target(case, key, figure, f"<= {most:g} us")


def as_fast(case: str, key: str, most: float) -> Target:
    """The GPU may take at most ``most`` times as long as for the workload measured beside."""

    def figure(of: Measured) -> tuple[float, str] | None:
        ratio = of.ratio(OURS, "device", to=BESIDE)
        return (ratio.median, _times(ratio)) if ratio else None

    return Target(case, key, figure, f"<= {most:g}x")


def iteration(case: str, key: str) -> Target:
    """A whole iteration compared with the other that comes closest, without a target."""

    def figure(of: Measured) -> tuple[float, str] | None:
        ours, best = of.time(OURS, "iteration"), of.fastest_other("iteration")
        if ours is None or best is None:
            return None
        return best[1].median, f"{duration(ours.median)}; {best[0]}: {_times(best[1])}"

    return Target(case, key, figure, NOTHING)


_TINY = "161 one-element parameters"
_FROZEN = "1000 parameters, 998 frozen"
_MOBILENET = "mobilenet_v3_small/0"
CPU_TARGETS = (
    faster(f"{_TINY}, warm", "tiny161", "all/fused", 12),
    faster(f"{_TINY}, warm", "tiny161", "all/default", 40),
    faster(f"{_TINY}, cold", "tiny161", "all/fused", 5, "cold"),
    faster(f"{_TINY}, cold", "tiny161", "all/default", 15, "cold"),
    faster(f"{_FROZEN}, warm", "frozen998", "filter/fused", 4),
    faster(f"{_FROZEN}, cold", "frozen998", "filter/fused", 4, "cold"),
    frozen_cost(f"{_FROZEN}, warm, each frozen one", "frozen998", 5),
    faster("ResNet-50", "resnet50/0", "all/default", 2.1),
    faster("ResNet-50", "resnet50/0", "all/fused", 1.1),
    faster("ViT-B/16", "vit_b_16/0", "all/default", 2.0),
    faster("ViT-B/16", "vit_b_16/0", "all/fused", 1.03),
    bandwidth("ViT-B/16, bandwidth of a read-modify-write pass", "vit_b_16/0", 90),
    faster("MobileNetV3-small", _MOBILENET, "all/default", 3.3),
    faster("MobileNetV3-small", _MOBILENET, "all/fused", 1.6),
    faster("50 groups of 10 small tensors, warm", "groups50", "all/fused", 40),
)

_LARGE = 64_000_000
_SMALL = (100_000, 1_000_000, 3_000_000)
_PLACED = 20_000_000
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PLACES: tuple[Place, ...] = ("odd sizes", "gradients shifted", "parameters shifted")


def _cuda_targets() -> Iterator[Target]:
    for name in _DTYPES:
        key, case = f"flat/{name}/{_LARGE}/aligned", f"{_LARGE / 1e6:g} M {name} elements"
        yield bandwidth(f"{case}, bandwidth of a copy pass", key, 95)
        yield faster(case, key, "all/fused", 1.0, "device")
        yield faster(case, key, "all/foreach", 2, "device")
    for elements in _SMALL:
        case = f"{elements / 1e6:g} M fp32 elements in 20 tensors"
        yield faster(case, f"flat/fp32/{elements}/aligned", "all/fused", 1.8, "device")
    for name in _DTYPES:
        for place in _PLACES:
            key, case = f"flat/{name}/{_PLACED}/{place}", f"{_PLACED / 1e6:g} M {name}, {place}"
            yield as_fast(f"{case}, vs aligned", key, 1.05)
            yield faster(case, key, "all/fused", 1.5, "device")
    yield host_time("ResNet-50, host", "resnet50/0", 15)
    yield faster("ResNet-50, host", "resnet50/0", "all/fused", 8)
    yield faster("ResNet-50, host", "resnet50/0", "all/default", 25)
    yield host_time("ResNet-50, all but the head frozen, host", "resnet50/head", 6)
    yield faster("ResNet-50, all but the head frozen, host", "resnet50/head", "filter/fused", 4)
    yield faster("161 groups, host", "groups161", "all/fused", 30)
    for model in ON_CUDA[1:]:
        for share, what in (("0", "nothing"), ("50", "half")):
            yield iteration(f"{MODELS[model].title}, {what} frozen, iteration", f"{model}/{share}")


CUDA_TARGETS = tuple(_cuda_targets())


def run_cuda(
    setting: Setting, models: Sequence[str] = ON_CUDA, scale: float = 1.0
) -> Iterator[Measured]:
    """Measure every case of the GPU's table; ``scale`` makes the flat sets smaller for a trial.

    Cases of a network that is not in ``models`` are left out.
    """
    device, measures = setting.device, ("warm", "device")

    def flat(dtype: torch.dtype, elements: int, tensors: int, place: Place = "aligned") -> Workload:
        made = flat_set(device, int(elements * scale), tensors, dtype, place)
        return replace(made, key=made.key.replace(f"{int(elements * scale)}", f"{elements}"))

    for dtype in _DTYPES.values():
        yield run_workload("targets", flat(dtype, _LARGE, 32), setting, measures)
    for elements in _SMALL:
        yield run_workload("targets", flat(torch.float32, elements, 20), setting, measures)
    for dtype in _DTYPES.values():
        for place in _PLACES:
            placed, beside = flat(dtype, _PLACED, 20, place), flat(dtype, _PLACED, 20)
            yield run_workload("targets", placed, setting, measures, beside=beside)
    yield run_workload("targets", many_groups(device, 161, 1), setting, measures)
    if "resnet50" in models:
        yield from run_models(["resnet50"], [0.0, "head"], setting, suite="targets")
    small = [model for model in models if model != "resnet50"]
    yield from run_models(small, [0.0, 50.0], setting, ("iteration",), suite="targets")


def launch_line(setting: Setting) -> Reached:
    """Count the kernels of a steady step over 161 groups."""
    trainer = steady(many_groups(setting.device, 161, 1), setting)
    count = record(trainer.step, setting.device, count_launches=True).launches
    if not count:  # the profiler has no access to the GPU's counters
        return Reached("161 groups, launches", NOTHING, "1", "not measured")
    return at_most("161 groups, launches", count, 1, f"{count}", "1")


def memory_lines(model: str, setting: Setting) -> Iterable[Reached]:
    """Count a steady step's allocations, and the gradient bytes it leaves on frozen parameters.

    The frozen parameters have a gradient before the step, as they do when the network is frozen
    between a backward pass and a step.
    """
    workload = LoadedModel(model, setting.device).workload("head")
    trainer = steady(workload, setting)
    count = step_allocations(trainer, setting.device)
    frozen = [p for p in workload.parameters if not p.requires_grad]
    for p in frozen:
        p.grad = torch.zeros_like(p)
    before = held_bytes(p.grad for p in frozen)
    trainer.step()
    after = held_bytes(p.grad for p in frozen)
    yield at_most("memory, allocations in a steady step", count, 0, f"{count}", "0")
    case = "memory, gradient bytes on frozen parameters after a step"
    yield at_most(case, after, 0, f"{after} B (before: {before / 1e6:.1f} MB)", "0 B")


def parts(models: Sequence[str], device: torch.device) -> int:
    """Two for each workload, three with iterations, and one each for launches and memory."""
    if device.type != "cuda":
        return 3 * 2 + 2 * len(models) + bool(models)
    flat = len(_DTYPES) * (1 + len(_PLACES)) + len(_SMALL) + 1
    return 2 * flat + 6 * len(models) + 1 + bool(models)


def run(models: Sequence[str], simulated: bool, setting: Setting) -> Iterator[Measured]:
    """Every workload of the device's table, but those of a network not in ``models``."""
    if setting.device.type == "cuda":
        return run_cuda(setting, models, SIMULATED_SCALE if simulated else 1.0)
    networks = run_models(models, [0.0], setting, ("warm", "cold"), suite="targets")
    return chain(run_synthetic(setting, "targets"), networks)


def reached(
    models: Sequence[str], simulated: bool, measured: Sequence[Measured], setting: Setting
) -> list[Reached]:
    """The device's table."""
    on_gpu = setting.device.type == "cuda"
    found = {m.key: m for m in measured}
    lines = [target.line(found) for target in (CUDA_TARGETS if on_gpu else CPU_TARGETS)]
    if on_gpu:
        setting.progress("targets: launches")
        lines.append(launch_line(setting))
    if models:
        setting.progress("targets: memory")
        lines += memory_lines(models[0], setting)
    else:
        lines.append(Reached("memory", NOTHING, "0", "not measured"))
    return [replace(line, status="simulated") for line in lines] if simulated else lines
