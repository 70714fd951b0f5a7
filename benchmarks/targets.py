"""The speed the project set itself on a CPU of two cores and on a GPU, and what a run reached."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from statistics import median
from typing import Literal, Protocol

import torch
from contestants import OURS, Entry
from measure import Summary, allocations, held_bytes, launches
from models import MODELS as NETWORKS
from models import LoadedModel, Place, Workload, flat_set, many_groups
from suites import Outcome, Setting, fastest_other, run_models, run_synthetic, run_workload
from units import duration, multiple

Status = Literal["reached", "missed", "not measured", "no target", "simulated"]


@dataclass(frozen=True)
class Reached:
    """One line of the table: what was measured, and whether that is what was wanted."""

    case: str
    figure: str
    target: str
    status: Status


class Target(Protocol):
    """A line of the table before it is measured."""

    def line(self, found: Mapping[str, Outcome]) -> Reached:
        """Hold the outcomes, by their workload's key, against the target."""
        ...


def status(reached: bool) -> Status:
    """The word for it."""
    return "reached" if reached else "missed"


def _times(times: Summary) -> str:
    return f"{times.median:.2f}x [{multiple(times.low)}-{multiple(times.high)}]"


@dataclass(frozen=True)
class Faster:
    """FrozenAwareSGD is to be at least ``least`` times as fast as one stock contestant."""

    case: str
    workload: str
    against: str
    least: float
    measure: str = "warm"

    def line(self, found: Mapping[str, Outcome]) -> Reached:
        """The ratio of the medians, with the spread of the ratios in the rounds."""
        case = f"{self.case}, vs stock {self.against.replace('/', ' ')}"
        target = f">= {self.least:g}x"
        outcome = found.get(self.workload)
        row = outcome.row(self.against) if outcome else None
        times = outcome.times_ours(row, self.measure) if outcome and row else None
        ours = outcome.ours.time(self.measure) if outcome else None
        if times is None or ours is None:
            return Reached(case, "-", target, "not measured")
        figure = f"{_times(times)}, {duration(ours.median)}"
        return Reached(case, figure, target, status(times.median >= self.least))


@dataclass(frozen=True)
class FrozenCost:
    """What each frozen parameter adds to a warm step, at most ``most`` nanoseconds."""

    case: str
    workload: str
    most: float

    def line(self, found: Mapping[str, Outcome]) -> Reached:
        """The step with the frozen parameters less the step without, over their number."""
        target = f"<= {self.most:g} ns"
        outcome = found.get(self.workload)
        if outcome is None:
            return Reached(self.case, "-", target, "not measured")
        added = median(outcome.ours.samples["warm"]) - median(outcome.beside["warm"])
        cost = added / outcome.frozen_tensors
        return Reached(self.case, f"{cost:.2f} ns", target, status(cost <= self.most))


@dataclass(frozen=True)
class Bandwidth:
    """The update is to move its bytes at ``least`` percent of the reference pass's speed."""

    case: str
    workload: str
    least: float

    def line(self, found: Mapping[str, Outcome]) -> Reached:
        """The share of the pass's bytes per second, with its spread in the rounds."""
        target = f">= {self.least:g} %"
        outcome = found.get(self.workload)
        share = outcome.share_of_pass(outcome.ours) if outcome else None
        if outcome is None or share is None:
            return Reached(self.case, "-", target, "not measured")
        figure = f"{100 * share.median:.0f} % [{100 * share.low:.0f}-{100 * share.high:.0f}]"
        return Reached(
            f"{self.case} of a {outcome.pass_name} pass",
            figure,
            target,
            status(100 * share.median >= self.least),
        )


@dataclass(frozen=True)
class HostTime:
    """A step is to return within ``most`` microseconds, the GPU idle."""

    case: str
    workload: str
    most: float

    def line(self, found: Mapping[str, Outcome]) -> Reached:
        """The median with its spread."""
        target = f"<= {self.most:g} us"
        outcome = found.get(self.workload)
        time = outcome.ours.time("warm") if outcome else None
        if time is None:
            return Reached(self.case, "-", target, "not measured")
        figure = f"{duration(time.median)} [{duration(time.low)}-{duration(time.high)}]"
        return Reached(self.case, figure, target, status(time.median <= 1e3 * self.most))


@dataclass(frozen=True)
class AsFast:
    """The GPU is to take at most ``most`` times as long as for the workload measured beside."""

    case: str
    workload: str
    most: float
    measure: str = "device"

    def line(self, found: Mapping[str, Outcome]) -> Reached:
        """The ratio of the medians, with the spread of the ratios in the rounds."""
        target = f"<= {self.most:g}x"
        outcome = found.get(self.workload)
        times = outcome.times_beside(self.measure) if outcome else None
        if times is None:
            return Reached(self.case, "-", target, "not measured")
        return Reached(self.case, _times(times), target, status(times.median <= self.most))


@dataclass(frozen=True)
class Told:
    """A whole iteration against the fastest of the others: reported, whatever it is."""

    case: str
    workload: str

    def line(self, found: Mapping[str, Outcome]) -> Reached:
        """FrozenAwareSGD's time, and who of the others comes closest."""
        outcome = found.get(self.workload)
        ours = outcome.ours.time("iteration") if outcome else None
        best = fastest_other(outcome, "iteration") if outcome else None
        if ours is None or best is None:
            return Reached(self.case, "-", "-", "not measured")
        row, times = best
        figure = f"{duration(ours.median)}; {row.contestant.key}: {_times(times)}"
        return Reached(self.case, figure, "-", "no target")


_TINY = "161 one-element parameters"
_FROZEN = "1000 parameters, 998 frozen"
_MOBILENET = "mobilenet_v3_small/0"

TARGETS: tuple[Target, ...] = (
    Faster(f"{_TINY}, warm", "tiny161", "all/fused", 12),
    Faster(f"{_TINY}, warm", "tiny161", "all/default", 40),
    Faster(f"{_TINY}, cold", "tiny161", "all/fused", 5, "cold"),
    Faster(f"{_TINY}, cold", "tiny161", "all/default", 15, "cold"),
    Faster(f"{_FROZEN}, warm", "frozen998", "filter/fused", 4),
    Faster(f"{_FROZEN}, cold", "frozen998", "filter/fused", 4, "cold"),
    FrozenCost(f"{_FROZEN}, warm, each frozen one", "frozen998", 5),
    Faster("ResNet-50", "resnet50/0", "all/default", 2.1),
    Faster("ResNet-50", "resnet50/0", "all/fused", 1.1),
    Faster("ViT-B/16", "vit_b_16/0", "all/default", 2.0),
    Faster("ViT-B/16", "vit_b_16/0", "all/fused", 1.03),
    Bandwidth("ViT-B/16, bandwidth", "vit_b_16/0", 90),
    Faster("MobileNetV3-small", _MOBILENET, "all/default", 3.3),
    Faster("MobileNetV3-small", _MOBILENET, "all/fused", 1.6),
    Faster("50 groups of 10 small tensors, warm", "groups50", "all/fused", 40),
)
MODELS = ("resnet50", "vit_b_16", "mobilenet_v3_small")

_LARGE = 64_000_000
_SMALL = (100_000, 1_000_000, 3_000_000)
_PLACED = 20_000_000
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PLACES: tuple[Place, ...] = ("odd sizes", "gradients shifted", "parameters shifted")
ON_CUDA = ("resnet50", "resnet18_batch_8", "bert_base_batch_4")
"""The networks of the GPU's table; the last two for whole iterations."""


def _cuda_targets() -> Iterator[Target]:
    for name in _DTYPES:
        key, case = f"flat/{name}/{_LARGE}/aligned", f"{_LARGE / 1e6:g} M {name} elements"
        yield Bandwidth(f"{case}, bandwidth", key, 95)
        yield Faster(case, key, "all/fused", 1.0, "device")
        yield Faster(case, key, "all/foreach", 2, "device")
    for elements in _SMALL:
        case = f"{elements / 1e6:g} M fp32 elements in 20 tensors"
        yield Faster(case, f"flat/fp32/{elements}/aligned", "all/fused", 1.8, "device")
    for name in _DTYPES:
        for place in _PLACES:
            key, case = f"flat/{name}/{_PLACED}/{place}", f"{_PLACED / 1e6:g} M {name}, {place}"
            yield AsFast(f"{case}, vs aligned", key, 1.05)
            yield Faster(case, key, "all/fused", 1.5, "device")
    yield HostTime("ResNet-50, host", "resnet50/0", 15)
    yield Faster("ResNet-50, host", "resnet50/0", "all/fused", 8)
    yield Faster("ResNet-50, host", "resnet50/0", "all/default", 25)
    yield HostTime("ResNet-50, all but the head frozen, host", "resnet50/head", 6)
    yield Faster("ResNet-50, all but the head frozen, host", "resnet50/head", "filter/fused", 4)
    yield Faster("161 groups, host", "groups161", "all/fused", 30)
    for model in ON_CUDA[1:]:
        for share, what in (("0", "nothing"), ("50", "half")):
            case = f"{NETWORKS[model].title}, {what} frozen, iteration"
            yield Told(case, f"{model}/{share}")


CUDA_TARGETS = tuple(_cuda_targets())


def cuda_outcomes(
    setting: Setting, models: Sequence[str] = ON_CUDA, scale: float = 1.0
) -> Iterator[Outcome]:
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
            yield run_workload(
                "targets",
                flat(dtype, _PLACED, 20, place),
                setting,
                measures,
                beside=flat(dtype, _PLACED, 20),
            )
    yield run_workload("targets", many_groups(device, 161, 1), setting, measures)
    if "resnet50" in models:
        yield from run_models(["resnet50"], [0.0, "head"], setting, measures)
    small = [model for model in models if model != "resnet50"]
    yield from run_models(small, [0.0, 50.0], setting, ("iteration",))


def _steady(workload: Workload) -> Entry:
    entry = OURS.build(workload.groups, workload.hyper)
    workload.fill_gradients()
    for _ in range(3):
        entry.stepper.step()
    return entry


def launch_line(setting: Setting) -> Reached:
    """Count the kernels of a steady step over 161 groups."""
    entry = _steady(many_groups(setting.device, 161, 1))
    count = launches(entry.stepper.step, setting.device)
    if not count:  # the profiler has no access to the GPU's counters
        return Reached("161 groups, launches", "-", "1", "not measured")
    return Reached("161 groups, launches", f"{count}", "1", status(count == 1))


def memory_lines(model: str, setting: Setting) -> list[Reached]:
    """Count a steady step's allocations, and the gradient bytes it leaves on frozen parameters.

    The frozen parameters enter the step with a gradient each, as they do when the network is frozen
    between a backward pass and a step.

    Raises:
        models.MissingPackage: the package the model comes from is not installed.
    """
    workload = LoadedModel(model, setting.device).workload("head")
    entry = _steady(workload)
    count = allocations(entry.stepper.step, setting.device).count
    frozen = [p for p in workload.parameters if not p.requires_grad]
    for p in frozen:
        p.grad = torch.zeros_like(p)
    before = held_bytes(p.grad for p in frozen)
    entry.stepper.step()
    after = held_bytes(p.grad for p in frozen)
    return [
        Reached("memory, allocations in a steady step", f"{count}", "0", status(count == 0)),
        Reached(
            "memory, gradient bytes on frozen parameters after a step",
            f"{after} B (before: {before / 1e6:.1f} MB)",
            "0 B",
            status(after == 0),
        ),
    ]


def networks(device: torch.device) -> tuple[str, ...]:
    """The networks of a device's table."""
    return ON_CUDA if device.type == "cuda" else MODELS


def parts(models: Sequence[str], device: torch.device) -> int:
    """How often the two below tell their progress."""
    if device.type != "cuda":
        return 3 * 2 + 2 * len(models) + bool(models)
    flat = len(_DTYPES) * (1 + len(_PLACES)) + len(_SMALL) + 1
    return 2 * flat + sum(2 * (2 if m == "resnet50" else 3) for m in models) + 1 + bool(models)


def target_outcomes(
    setting: Setting, models: Sequence[str], scale: float = 1.0
) -> Iterator[Outcome]:
    """Measure every case of the device's speed table, but those of a network not in ``models``.

    ``scale`` makes a GPU's flat sets smaller.
    """
    if setting.device.type == "cuda":
        outcomes = cuda_outcomes(setting, models, scale)
    else:
        outcomes = chain(
            run_synthetic(setting), run_models(models, [0.0], setting, ("warm", "cold"))
        )
    for outcome in outcomes:
        yield replace(outcome, suite="targets")


def target_lines(
    setting: Setting, outcomes: Iterable[Outcome], models: Sequence[str]
) -> list[Reached]:
    """The device's speed table; what is not among the outcomes is reported as not measured."""
    on_gpu = setting.device.type == "cuda"
    found = {outcome.key: outcome for outcome in outcomes}
    lines = [target.line(found) for target in (CUDA_TARGETS if on_gpu else TARGETS)]
    if on_gpu:
        setting.progress("targets: launches")
        lines.append(launch_line(setting))
    if models:
        setting.progress("targets: memory")
        lines += memory_lines(models[0], setting)
    else:
        lines.append(Reached("memory", "-", "0", "not measured"))
    return lines
