"""The figures of steps and iterations: tables, their legend, a summary and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from . import figures
from .contestants import Family
from .records import OURS, Measured, Summary
from .tables import (
    difference,
    duration,
    filled,
    indented,
    megabytes,
    middle,
    multiple,
    render,
    times,
)

if TYPE_CHECKING:
    from .suites.base import Setting

GAIN = 1.05
"""A ratio this close to 1 counts as no difference: two runs on one machine differ as much."""
_HEADERS = {
    "warm": "step()\nhost",
    "cold": "caches\ncold",
    "device": "step()\ndevice",
    "iteration": "itera-\ntion",
}
_NAMES = {
    "warm": "step() on the host",
    "cold": "step() on the host with cold caches",
    "device": "step() on the device",
    "iteration": "a whole iteration",
}


def share_of_pass(found: Measured, contestant: str = OURS) -> Summary | None:
    """The bytes per second of an update over those of the reference pass of its device."""
    on_gpu = bool(found.of("reference/copy", "device"))
    name, measure = ("copy", "device") if on_gpu else ("read-modify-write", "warm")
    share = found.ratio(f"reference/{name}", measure, to=contestant)
    if share is None:
        return None
    scale = found.fact("step bytes") / (found.one(f"reference/{name}", "bytes") or 1)
    return Summary(share.median * scale, share.low * scale, share.high * scale)


def table(found: Measured, family: Family) -> str:
    """One workload: every measure of every contestant.

    The width is spent on the spread of what matters most: the GPU's own time where there is one.
    """
    if found.suite == "digits":
        return _digits_table(found, family)
    on_gpu = found.time(OURS, "device") is not None
    headers = ["", *(h for name in _HEADERS.values() for h in (name, "times\nours")), "equal"]
    rows = []
    for contestant in found.contestants:
        cells = [family.label(contestant)]
        for measure in _HEADERS:
            spread = not on_gpu or measure == "device"
            cells.append(middle(found.time(contestant, measure)))
            cells.append(times(found.ratio(contestant, measure), spread=spread))
        rows.append([*cells, difference(found, contestant)])
    notes = [f"{key}: not run: {why}" for key, why in found.unavailable.items()]
    for contestant in found.contestants:
        name = family.label(contestant)
        if found.unequal(contestant):
            off = found.one(contestant, "difference")
            notes.append(f"{name}: NOT stock's result: {off:.0e} of the largest value")
        compiling = found.one(contestant, "compiling")
        if compiling is not None:
            notes.append(f"{name}: compiling took {compiling / 1e9:.1f} s")
    if (share := share_of_pass(found)) is not None:
        what = "tensor.copy_()" if on_gpu else "a pass p += g, m *= -1"
        notes.append(f"{family.name} moves {100 * share.median:.0f} % of the bytes/s of {what}")
    notes += memory_note(found, family)
    title = filled(found.title + found.details)
    return "\n".join([title, render(headers, rows), *map(indented, notes)])


def _digits_table(found: Measured, family: Family) -> str:
    """The fine-tuning: same loss curves, and what an iteration costs."""
    headers = ["", "loss\nfirst", "loss\nlast", "equal", "correct\n%"]
    headers += ["itera-\ntion", "times\nours"]
    rows = []
    for key in found.contestants:
        losses = found.of(key, "loss")
        cells = [family.label(key), f"{losses[0]:.4f}", f"{losses[-1]:.4f}"]
        cells += [difference(found, key), f"{found.one(key, 'accuracy'):.1f}"]
        cells += [middle(found.time(key, "iteration")), times(found.ratio(key, "iteration"))]
        rows.append(cells)
    notes = map(indented, memory_note(found, family))
    return "\n".join([f"Digits{found.details}", render(headers, rows), *notes])


def memory_note(found: Measured, family: Family) -> Iterator[str]:
    """Everyone's memory, if it was measured; with names only where it differs."""
    parts = []
    for measure in ("peak", "gradients", "state"):
        sizes: dict[str, list[str]] = {}
        for contestant in found.contestants:
            size = found.one(contestant, measure)
            if size is not None:
                sizes.setdefault(megabytes(size), []).append(family.label(contestant))
        each = [f"{size} ({', '.join(who)})" for size, who in sizes.items()]
        if sizes:
            parts.append(f"{measure} {', '.join(each if len(each) > 1 else sizes)}")
    if parts:
        yield f"memory in MB: {'; '.join(parts)}"


def legend(found: Sequence[Measured], setting: Setting) -> list[str]:
    """What the columns of the tables mean."""
    on_gpu, name = setting.device.type == "cuda", setting.family.name
    default = "foreach" if on_gpu else "one tensor after the other"
    sentences = [
        "all: the optimizer is given every parameter; filter: only the trainable ones.",
        f"default: stock with no option set, which on this device is {default}.",
        f"times ours: the median over {name}'s, so above 1 {name} is faster; then the 10th to 90th"
        " percentile of the ratios within each round.",
    ]
    if any(m.one(OURS, "difference") is not None for m in found):
        sentences.append(
            "equal: weights and state after 5 steps compared with stock foreach=False, on the"
            " digits the losses; bits: equal in every bit, else the largest difference over the"
            " largest value."
        )
    if any(m.of(OURS, "peak") for m in found):
        sentences.append(
            "iteration: zero_grad, forward, backward and step on a small batch; the larger the"
            " batch, the less the step matters. peak: weights and state, and the most that an"
            " iteration takes on top. gradients, state: held after the step."
        )
    contestants = {contestant for m in found for contestant in m.contestants}
    if "flashoptim" in contestants:
        unfused = "" if on_gpu else ", unfused"
        sentences.append(
            f"flashoptim: FlashSGD over the trainable parameters, nothing quantized{unfused}."
        )
    if "apex" in contestants:
        sentences.append("apex: FusedSGD over the trainable parameters.")
    batches = {m.title.partition(",")[0]: m.batch for m in found if m.batch}
    if batches:
        each = "; ".join(f"{name} {batch}" for name, batch in batches.items())
        sentences.append(f"batches: {each}.")
    return sentences


def summary(found: Sequence[Measured], setting: Setting) -> list[str]:
    """What the figures say in plain words, including where there is no gain."""
    family, lines = setting.family, []
    gaps = [m.one(OURS, "difference") for m in found if m.suite != "digits"]
    compared = [gap for gap in gaps if gap is not None]
    if compared and not any(m.unequal(c) for m in found for c in m.contestants):
        exact = sum(gap == 0 for gap in compared)
        lines.append(
            f"Same result: all contestants agree with stock; {family.name} to the bit on {exact} "
            f"of {len(compared)} workloads."
        )
    for m in found:
        if m.suite == "synthetic":
            lines += [_synthetic_line(m, measure, family) for measure in ("warm", "cold", "device")]
    models = [m for m in found if m.suite == "models"]
    for name in dict.fromkeys(m.title.partition(",")[0] for m in models):
        of_model = [m for m in models if m.title.startswith(name + ",")]
        lines += [_model_line(name, of_model, k, family) for k in ("warm", "device", "iteration")]
    lines.append(_memory_line(models, family))
    lines += [_digits_line(m, family) for m in found if m.suite == "digits"]
    return [*filter(None, lines), *_no_gain(found)]


def _range(values: Sequence[float]) -> str:
    low, high = multiple(min(values)), multiple(max(values))
    return f"{low}x" if low == high else f"{low}-{high}x"


def _synthetic_line(found: Measured, measure: str, family: Family) -> str:
    best, ours = found.fastest_other(measure), found.time(OURS, measure)
    if best is None or ours is None:
        return ""
    contestant, ratio = best
    line = (
        f"{found.title}, {_NAMES[measure]}: {duration(ours.median)}; the fastest other, "
        f"{family.label(contestant)}, takes {multiple(ratio.median)}x that"
    )
    usual = found.ratio("all/default", measure)
    return line + (f", stock's default {multiple(usual.median)}x." if usual else ".")


def _model_line(name: str, found: Sequence[Measured], measure: str, family: Family) -> str:
    usual = [times.median for m in found if (times := m.ratio("all/default", measure))]
    best = [fastest[1].median for m in found if (fastest := m.fastest_other(measure))]
    if not usual:
        return ""
    return (
        f"{name}, {_NAMES[measure]}: stock's default takes {_range(usual)} {family.name}'s time, "
        f"the fastest other {_range(best)}."
    )


def _memory_line(found: Sequence[Measured], family: Family) -> str:
    same, most, label, allocations = True, 0.0, "", 0.0
    measured = [m for m in found if m.of(OURS, "peak")]
    for m in measured:
        allocations = max(allocations, m.one(OURS, "step allocations") or 0.0)
        for contestant in m.contestants:
            for held in ("gradients", "state"):
                same = same and m.of(contestant, held) == m.of(OURS, held)
            extra = (m.one(contestant, "peak") or 0.0) - (m.one(OURS, "peak") or 0.0)
            if extra > most:
                most, label = extra, family.label(contestant)
    if not measured:
        return ""
    line = (
        "Memory: gradients and state held after the step are "
        f"{'the same for everyone' if same else 'NOT the same for everyone'}"
    )
    if most >= 1e6:
        line += f"; the peak of {label} is up to {most / 1e6:.0f} MB above {family.name}'s"
    return f"{line}. {family.name}'s steady step makes {allocations or 'no'} allocations."


def _digits_line(found: Measured, family: Family) -> str:
    gap = found.one(OURS, "difference") or 0.0
    curve = (
        "every bit of stock's loss curve" if gap == 0 else f"stock's loss curve within {gap:.0e}"
    )
    right = found.one(OURS, "accuracy") or 0.0
    return f"Digits: {family.name} follows {curve} and ends at {right:.1f} % correct."


def _no_gain(found: Sequence[Measured]) -> Iterator[str]:
    for measure, name in _NAMES.items():
        even: list[str] = []
        slower: list[str] = []
        for m in found:
            best = m.fastest_other(measure)
            if best is None or best[1].median >= GAIN:
                continue
            # The least of several noisy medians may be low by luck: slower is what stays slower.
            beaten = best[1].median < 1 / GAIN and best[1].high < 1
            (slower if beaten else even).append(f"{m.title} ({multiple(best[1].median)}x)")
        if even:
            yield f"No gain over the fastest other in {name}: {'; '.join(even)}."
        if slower:
            yield f"SLOWER than the fastest other in {name}: {'; '.join(slower)}."


_BARS = {
    "tiny161": "161 small tensors",
    "frozen998": "998 of 1000 frozen",
    "groups50": "50 param groups",
    "groups161": "161 param groups",
    "mobilenet_v3_small/0": "MobileNetV3-small",
    "resnet50/0": "ResNet-50",
}
"""The workloads of the targets that a picture of the gain shows, if they were measured; on a CPU
ResNet-50, which is bound by the memory, is left to the table."""


def draw(found: Sequence[Measured], setting: Setting) -> Any:
    """The targets' gain in a few bars, or everyone's ratios in a panel for each measure."""
    name = setting.family.name
    if all(m.suite == "targets" for m in found):
        bars = {}
        for m in found:
            fused = "filter/fused" if m.of("filter/fused", "warm") else "all/fused"
            shown = m.key in _BARS and (m.key != "resnet50/0" or setting.device.type == "cuda")
            if shown and (gain := m.ratio(fused, "warm")):
                bars[_BARS[m.key]] = gain
        if bars:
            return figures.bars(bars, f"Time of step(): stock fused over {name}")
    panels = {m: t for m, t in _NAMES.items() if any(of.of(OURS, m) for of in found)}
    return figures.ratios(found, panels, setting.family)
