"""What the figures say in plain words, where there is no gain included."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from digits import DigitsOutcome
from memory_report import memory_summary, memory_unequal
from memory_suite import MemoryOutcome
from suites import Outcome, fastest_other
from tables import WIDTH
from targets import Reached
from units import duration, multiple

GAIN = 1.05
"""A ratio within this of 1 is called no difference: two runs on one machine differ by as much."""

_NAMES = {
    "warm": "step() on the host",
    "cold": "step() on the host with cold caches",
    "device": "step() on the device",
    "iteration": "a whole iteration",
}


def unequal(
    outcomes: Sequence[Outcome],
    digits: DigitsOutcome | None,
    memory: Sequence[MemoryOutcome] = (),
) -> list[str]:
    """Every contestant whose result is not the reference's, with its workload."""
    found = [
        f"{row.contestant.label} on {outcome.title}"
        for outcome in outcomes
        for row in outcome.rows
        if row.equality is not None and not row.equality.holds
    ]
    if digits is not None:
        found += [f"{row.contestant.label} on the digits" for row in digits.rows if not row.holds]
    return found + memory_unequal(memory)


def _range(values: Sequence[float]) -> str:
    low, high = multiple(min(values)), multiple(max(values))
    return f"{low}x" if low == high else f"{low}-{high}x"


def _synthetic_line(outcome: Outcome, measure: str) -> str | None:
    best, ours = fastest_other(outcome, measure), outcome.ours.time(measure)
    if best is None or ours is None:
        return None
    row, times = best
    line = (
        f"{outcome.title}, {_NAMES[measure]}: {duration(ours.median)}; the fastest other, "
        f"{row.contestant.label}, takes {multiple(times.median)}x that"
    )
    default = outcome.row("all/default")
    if default is not None and (usual := outcome.times_ours(default, measure)) is not None:
        line += f", stock's default {multiple(usual.median)}x"
    return line + "."


def _model_line(name: str, outcomes: Sequence[Outcome], measure: str) -> str | None:
    usual, best = [], []
    for outcome in outcomes:
        default, fastest = outcome.row("all/default"), fastest_other(outcome, measure)
        times = outcome.times_ours(default, measure) if default else None
        if times is not None and fastest is not None:
            usual.append(times.median)
            best.append(fastest[1].median)
    if not usual:
        return None
    return (
        f"{name}, {_NAMES[measure]}: stock's default takes {_range(usual)} FrozenAwareSGD's time, "
        f"the fastest other {_range(best)}."
    )


def _no_gain(outcomes: Sequence[Outcome]) -> list[str]:
    lines = []
    for measure, name in _NAMES.items():
        even: list[str] = []
        slower: list[str] = []
        for outcome in outcomes:
            best = fastest_other(outcome, measure)
            if best is None or best[1].median >= GAIN:
                continue
            entry = f"{outcome.title} ({multiple(best[1].median)}x)"
            # The least of several noisy medians is low by luck, too: slower is what stays slower.
            beaten = best[1].median < 1 / GAIN and best[1].high < 1
            (slower if beaten else even).append(entry)
        if even:
            lines.append(f"No gain over the fastest other in {name}: {'; '.join(even)}.")
        if slower:
            lines.append(f"SLOWER than the fastest other in {name}: {'; '.join(slower)}.")
    return lines


def _memory_line(outcomes: Sequence[Outcome]) -> str | None:
    pairs = [
        (row.memory, ours, row.contestant.label)
        for outcome in outcomes
        for row in outcome.rows
        if (ours := outcome.ours.memory) is not None and row.memory is not None
    ]
    if not pairs:
        return None
    same = all((row.gradients, row.state) == (ours.gradients, ours.state) for row, ours, _ in pairs)
    allocations = max(ours.step_allocations for _, ours, _ in pairs)
    extra, label = max((row.peak - ours.peak, label) for row, ours, label in pairs)
    line = (
        "Memory: gradients and state held after the step are "
        f"{'the same for everyone' if same else 'NOT the same for everyone'}"
    )
    if extra >= 1e6:
        line += f"; the peak of {label} is up to {extra / 1e6:.0f} MB above FrozenAwareSGD's"
    return f"{line}. FrozenAwareSGD's steady step makes {allocations or 'no'} allocations."


def _digits_line(digits: DigitsOutcome) -> str:
    curve = (
        "every bit of stock's loss curve"
        if digits.ours.largest_gap == 0
        else f"stock's loss curve within {digits.ours.largest_gap:.0e}"
    )
    return f"Digits: FrozenAwareSGD follows {curve} and ends at {digits.ours.accuracy:.1f} % right."


def verdict(
    outcomes: Sequence[Outcome],
    digits: DigitsOutcome | None,
    targets: Sequence[Reached],
    *,
    memory: Sequence[MemoryOutcome] = (),
    warnings: Sequence[str | None] = (),
) -> str:
    """The summary at the end of a run; ``warnings`` are what a reader must know before all else."""
    lines: list[str | None] = [*warnings]
    wrong = unequal(outcomes, digits, memory)
    if wrong:
        lines.append(
            f"WRONG RESULT (further from stock than rounding explains): {'; '.join(wrong)}."
        )
    elif compared := [e for outcome in outcomes if (e := outcome.ours.equality) is not None]:
        exact = sum(equality.bit_equal for equality in compared)
        lines.append(
            f"Same result: all contestants agree with stock; FrozenAwareSGD to the bit on {exact} "
            f"of {len(compared)} workloads."
        )
    for outcome in outcomes:
        if outcome.suite == "synthetic":
            lines += [_synthetic_line(outcome, m) for m in ("warm", "cold", "device")]
    models = [outcome for outcome in outcomes if outcome.suite == "models"]
    for name in dict.fromkeys(outcome.title.partition(",")[0] for outcome in models):
        of_model = [outcome for outcome in models if outcome.title.startswith(name + ",")]
        lines += [_model_line(name, of_model, m) for m in ("warm", "device", "iteration")]
    lines.append(_memory_line(models))
    if digits is not None:
        lines.append(_digits_line(digits))
    lines += _no_gain([*outcomes, *([digits.as_workload()] if digits else [])])
    lines += memory_summary(memory)
    judged = [line for line in targets if line.status in ("reached", "missed")]
    if judged:
        missed = [line.case for line in judged if line.status == "missed"]
        text = f"Targets: {len(judged) - len(missed)} of {len(judged)} reached"
        lines.append(text + (f"; missed: {'; '.join(missed)}." if missed else "."))
    wrapped = [
        textwrap.fill(line, WIDTH, initial_indent="- ", subsequent_indent="  ")
        for line in lines
        if line is not None
    ]
    return "\n".join(["Verdict", *wrapped])
