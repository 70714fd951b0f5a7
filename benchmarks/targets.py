"""The speed the project set itself on a CPU of two cores, and what this run reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal, Protocol

import torch
from contestants import OURS
from measure import allocations, held_bytes
from models import LoadedModel
from suites import Outcome, Setting, run_models, run_synthetic
from units import duration, multiple

Status = Literal["reached", "missed", "not measured", "no target"]


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
        spread = f"{multiple(times.low)}-{multiple(times.high)}"
        figure = f"{times.median:.2f}x [{spread}], {duration(ours.median)}"
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
        added = median(outcome.ours.samples["warm"]) - median(outcome.trainable_alone)
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


def memory_lines(model: str, setting: Setting) -> list[Reached]:
    """Count a steady step's allocations, and the gradient bytes it leaves on frozen parameters.

    The frozen parameters enter the step with a gradient each, as they do when the network is frozen
    between a backward pass and a step.

    Raises:
        models.MissingPackage: the package the model comes from is not installed.
    """
    workload = LoadedModel(model, setting.device).workload("head")
    entry = OURS.build(workload.groups, workload.hyper)
    workload.fill_gradients()
    for _ in range(3):
        entry.stepper.step()
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


def run_targets(
    setting: Setting, *, models: Sequence[str] = MODELS
) -> tuple[list[Outcome], list[Reached]]:
    """Measure every case of the speed table.

    Cases of a network that is not in ``models`` are reported as not measured. On a GPU everything
    is measured too, but nothing was set to be reached there.
    """
    outcomes = [
        *run_synthetic(setting),
        *run_models(models, [0.0], setting, ("warm", "cold", "device")),
    ]
    outcomes = [replace(outcome, suite="targets") for outcome in outcomes]
    found = {outcome.key: outcome for outcome in outcomes}
    lines = [target.line(found) for target in TARGETS]
    if models:
        setting.progress("targets: memory")
        lines += memory_lines(models[0], setting)
    else:
        lines.append(Reached("memory", "-", "0", "not measured"))
    if setting.device.type == "cuda":
        lines = [replace(line, target="-", status="no target") for line in lines]
    return outcomes, lines
