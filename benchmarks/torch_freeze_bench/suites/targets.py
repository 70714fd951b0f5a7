"""The suite `targets`: the speed that the project wants to reach, on a CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..checks import HEAD, usable
from ..contestants import ADAMW, SGD
from ..memory import held_bytes, record
from ..records import FACTS, OURS, Measured, Summary
from ..report import share_of_pass
from ..tables import NOTHING, Reached, duration, judge, multiple
from ..workloads import DTYPES, MODELS, SINGLES, Network, Place, flat, needs_of
from .base import Setting, Suite, Task
from .speed import BESIDE, network_tasks, steady, tensors_task, tiny_tasks

ON_CPU = ("resnet50", "vit_b_16", "mobilenet_v3_small")
ON_CUDA = ("resnet50", "resnet18_batch_8", "bert_base_batch_4")
"""The networks of the GPU's table; the last two for whole iterations."""
ON_SIMULATED_CUDA = ("mobilenet_v3_small",)
SIMULATED_SCALE = 1e-3
"""Of the GPU's flat sets, whose elements a CPU works through on simulated CUDA."""


@dataclass(frozen=True)
class Target:
    """A line of the table: a figure of one workload, and the bound that it is to keep.

    The bound's unit says what is compared. ``x``: the time of the contestant ``against`` over ours,
    in the same form where we have it. ``ns``: what each frozen parameter adds to a step. ``%``: the
    bytes per second of a plain pass, by ours or the form ``against`` of it.
    ``us``: the time until step() returns. And without a bound, the other that comes closest.
    """

    case: str
    workload: str
    bound: str
    against: str = ""
    """``ours``: on the workload beside, over the time of this one's."""
    measure: str = "warm"

    def line(self, found: dict[str, Measured]) -> Reached:
        """Compare the figure with its bound, by the workloads' keys."""
        of = found.get(self.workload)
        scope, _, form = self.against.partition("/")
        vs = ""
        if form:
            vs = f", {form}" if scope == OURS else f", vs stock {scope} {form}"
        return judge(self.case + vs, self._figure(of) if of else None, self.bound)

    def _figure(self, of: Measured) -> tuple[float, str] | None:
        ours, beside = of.time(OURS, self.measure), of.time(BESIDE, self.measure)
        if ours is None:
            return None
        if self.bound == NOTHING:
            best = of.fastest_other(self.measure)
            return best and (best[1].median, f"{duration(ours.median)}; {best[0]}: {_x(best[1])}")
        if self.bound.endswith("%"):
            share = share_of_pass(of, self.against or OURS)
            if share is None:
                return None
            median, low, high = (100 * value for value in share)
            return median, f"{median:.0f} % [{low:.0f}-{high:.0f}]"
        if self.against == OURS:
            ratio = of.ratio(OURS, self.measure, to=BESIDE)
            return ratio and (ratio.median, _x(ratio))
        if self.against:
            mine = of.ours_as(self.against)
            ratio, time = of.ratio(self.against, self.measure, to=mine), of.time(mine, self.measure)
            return ratio and time and (ratio.median, f"{_x(ratio)}, {duration(time.median)}")
        if self.bound.endswith("ns") and beside:
            cost = (ours.median - beside.median) / (of.one(FACTS, "frozen tensors") or 1)
            return cost, f"{cost:.2f} ns"
        if self.bound.endswith("us"):
            return ours.median / 1e3, "{} [{}-{}]".format(*map(duration, ours))
        return None


def _x(ratio: Summary) -> str:
    return f"{ratio.median:.2f}x [{multiple(ratio.low)}-{multiple(ratio.high)}]"


_SMALL, _FROZEN = "161 one-element parameters", "1000 parameters, 998 frozen"
_MOBILENET = "mobilenet_v3_small/0"
_VIT_PASS = "ViT-B/16, bandwidth of a read-modify-write pass"
_GROUPS = "50 groups of 10 small tensors, warm"
SGD_TARGETS = (
    Target(f"{_SMALL}, warm", "tiny161", ">= 12x", "all/fused"),
    Target(f"{_SMALL}, warm", "tiny161", ">= 40x", "all/default"),
    Target(f"{_SMALL}, cold", "tiny161", ">= 5x", "all/fused", "cold"),
    Target(f"{_SMALL}, cold", "tiny161", ">= 15x", "all/default", "cold"),
    Target(f"{_FROZEN}, warm", "frozen998", ">= 4x", "filter/fused"),
    Target(f"{_FROZEN}, cold", "frozen998", ">= 4x", "filter/fused", "cold"),
    Target(f"{_FROZEN}, warm, each frozen one", "frozen998", "<= 5 ns"),
    Target("ResNet-50", "resnet50/0", ">= 2.1x", "all/default"),
    Target("ResNet-50", "resnet50/0", ">= 1.1x", "all/fused"),
    Target("ViT-B/16", "vit_b_16/0", ">= 2x", "all/default"),
    Target("ViT-B/16", "vit_b_16/0", ">= 1.03x", "all/fused"),
    Target(_VIT_PASS, "vit_b_16/0", ">= 90 %"),
    Target("MobileNetV3-small", _MOBILENET, ">= 3.3x", "all/default"),
    Target("MobileNetV3-small", _MOBILENET, ">= 1.6x", "all/fused"),
    Target(_GROUPS, "groups50", ">= 40x", "all/fused"),
)
ADAMW_TARGETS = (
    Target(f"{_SMALL}, warm", "tiny161", ">= 15x", "all/fused"),
    Target(f"{_SMALL}, cold", "tiny161", ">= 5x", "all/fused", "cold"),
    Target(f"{_FROZEN}, warm", "frozen998", ">= 4x", "filter/fused"),
    Target(f"{_FROZEN}, cold", "frozen998", ">= 4x", "filter/fused", "cold"),
    Target(f"{_FROZEN}, warm, each frozen one", "frozen998", "<= 5 ns"),
    Target(_GROUPS, "groups50", ">= 60x", "all/fused"),
    Target("465 groups of 1 small tensor, warm", "groups465", ">= 60x", "all/fused"),
    Target("465 groups of 1 small tensor, warm", "groups465", "<= 300 us"),
    Target("ResNet-50", "resnet50/0", ">= 5x", "all/default"),
    Target("ResNet-50", "resnet50/0", ">= 1.1x", "all/fused"),
    Target("ViT-B/16", "vit_b_16/0", ">= 5x", "all/default"),
    Target("ViT-B/16", "vit_b_16/0", ">= 1.1x", "all/fused"),
    Target(_VIT_PASS, "vit_b_16/0", ">= 90 %"),
    Target(_VIT_PASS, "vit_b_16/0", ">= 90 %", f"{OURS}/fused"),
    Target("MobileNetV3-small", _MOBILENET, ">= 6x", "all/default"),
    Target("MobileNetV3-small", _MOBILENET, ">= 1.6x", "all/fused"),
)
CPU_TARGETS = {SGD.key: SGD_TARGETS, ADAMW.key: ADAMW_TARGETS}
_LARGE = [flat(64, 32, dtype) for dtype in DTYPES]
_MIDDLE = [flat(millions, 20) for millions in (0.1, 1, 3)]
_PLACES: tuple[Place, ...] = ("odd sizes", "gradients shifted", "parameters shifted")
_PLACED = [flat(20, 20, dtype, place) for dtype in DTYPES for place in _PLACES]


def _cuda_targets() -> Iterator[Target]:
    for each in _LARGE:
        case = f"64 M {each.dtype} elements"
        yield Target(f"{case}, bandwidth of a copy pass", each.key, ">= 95 %", measure="device")
        yield Target(case, each.key, ">= 1x", "all/fused", "device")
        yield Target(case, each.key, ">= 2x", "all/foreach", "device")
    for each in _MIDDLE:
        yield Target(each.title, each.key, ">= 1.8x", "all/fused", "device")
    for each in _PLACED:
        yield Target(f"{each.title}, vs aligned", each.key, "<= 1.05x", OURS, "device")
        yield Target(each.title, each.key, ">= 1.5x", "all/fused", "device")
    head = "ResNet-50, all but the head frozen, host"
    yield Target("ResNet-50, host", "resnet50/0", "<= 15 us")
    yield Target("ResNet-50, host", "resnet50/0", ">= 8x", "all/fused")
    yield Target("ResNet-50, host", "resnet50/0", ">= 25x", "all/default")
    yield Target(head, "resnet50/head", "<= 6 us")
    yield Target(head, "resnet50/head", ">= 4x", "filter/fused")
    yield Target("161 groups, host", "groups161", ">= 30x", "all/fused")
    for model in ON_CUDA[1:]:
        for share, what in (("0", "nothing"), ("50", "half")):
            case = f"{MODELS[model].title}, {what} frozen, iteration"
            yield Target(case, f"{model}/{share}", NOTHING, measure="iteration")


CUDA_TARGETS = tuple(_cuda_targets())


def suite(setting: Setting) -> Suite:
    """Every workload of the device's table, but those of networks that cannot be built here."""
    on_gpu = setting.device.type == "cuda"
    wanted = ON_SIMULATED_CUDA if setting.simulated else ON_CUDA
    models = usable(wanted if on_gpu else ON_CPU, needs_of, explicit=False)
    if on_gpu:
        tasks = cuda_tasks(models, setting, SIMULATED_SCALE if setting.simulated else 1.0)
    else:
        tasks = tiny_tasks("targets", setting)
        tasks += network_tasks("targets", models, [0.0], setting, ("warm", "cold"))
    heading = f"speed to reach on {'a GPU' if on_gpu else 'a CPU of 2 cores'}"
    return Suite("targets", tasks, partial(reached, models, setting), heading, tables=on_gpu)


def cuda_tasks(models: Sequence[str], setting: Setting, scale: float = 1.0) -> list[Task]:
    """Every case of the GPU's table; ``scale`` makes the flat sets smaller for a trial."""
    measures = ("warm", "device")
    sets = [[each] for each in (*_LARGE, *_MIDDLE, SINGLES)]
    sets += [[each, flat(20, 20, each.dtype)] for each in _PLACED]
    tasks = [tensors_task("targets", setting, measures, *each, scale=scale) for each in sets]
    resnet = [model for model in models if model == "resnet50"]
    tasks += network_tasks("targets", resnet, [0.0, HEAD], setting, measures)
    others = [model for model in models if model != "resnet50"]
    return tasks + network_tasks("targets", others, [0.0, 50.0], setting, ("iteration",))


def reached(models: Sequence[str], setting: Setting, measured: Sequence[Measured]) -> list[Reached]:
    """The device's table."""
    on_gpu, found = setting.device.type == "cuda", {m.key: m for m in measured}
    targets = CUDA_TARGETS if on_gpu else CPU_TARGETS[setting.family.key]
    lines = [target.line(found) for target in targets]
    if on_gpu:
        lines.append(launch_line(setting))
    lines += memory_lines(models[0], setting) if models else [judge("memory", None, "<= 0")]
    return [line._replace(status="simulated") for line in lines] if setting.simulated else lines


def launch_line(setting: Setting) -> Reached:
    """Count the kernels of a steady step over 161 groups."""
    trainer = steady(SINGLES.build(setting.device, setting.family), setting)
    count = record(trainer.step, setting.device, count_launches=True).launches
    # Without access to the GPU's counters the profiler sees none.
    return judge("161 groups, launches", (count, f"{count}") if count else None, "<= 1")


def memory_lines(model: str, setting: Setting) -> Iterable[Reached]:
    """Count a steady step's allocations, and the gradient bytes it leaves on frozen parameters.

    The frozen parameters have a gradient before the step, as they do when the network is frozen
    between a backward pass and a step.
    """
    workload = Network(model, setting.device).workload(HEAD, setting.family)
    trainer = steady(workload, setting)
    count = record(trainer.step, setting.device).allocations
    frozen = [p for p in workload.parameters if not p.requires_grad]
    for p in frozen:
        p.grad = torch.zeros_like(p)
    before = held_bytes(p.grad for p in frozen)
    trainer.step()
    after = held_bytes(p.grad for p in frozen)
    yield judge("memory, allocations in a steady step", (count, f"{count}"), "<= 0")
    case = "memory, gradient bytes on frozen parameters after a step"
    yield judge(case, (after, f"{after} B (before: {before / 1e6:.1f} MB)"), "<= 0 B")
