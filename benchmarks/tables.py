"""The figures as text: tables of at most 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from digits import DigitsOutcome, DigitsRow
from measure import Equality, Summary
from models import require
from suites import Outcome, Row
from targets import Reached
from units import duration, multiple

WIDTH = 80
NOTHING = "-"


def _middle(time: Summary | None) -> str:
    return duration(time.median) if time else NOTHING


def ratio_text(times: Summary | None, *, spread: bool = True) -> str:
    """The middle of some ratios, with their 10th and 90th percentile if those differ."""
    if times is None:
        return NOTHING
    middle = f"{multiple(times.median)}x"
    if not spread or times.low == times.high:
        return middle
    return f"{middle} {multiple(times.low)}-{multiple(times.high)}"


def megabytes(size: int) -> str:
    """Millions of bytes, without their unit."""
    if 0 < size < 0.095e6:
        return "<0.1"
    return f"{size / 1e6:.1f}" if 0 < size < 9.95e6 else f"{size / 1e6:.0f}"


def equality_mark(equality: Equality | None) -> str:
    """``bits`` for bit-equal, else the largest relative difference, or NO if it is too large."""
    if equality is None:
        return NOTHING
    if equality.bit_equal:
        return "bits"
    return f"{equality.largest_relative:.0e}" if equality.holds else "NO"


def render(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table without the columns that hold no value, its first column wrapped where it must be."""
    tabulate = require("tabulate", "tabulate", "the tables")
    first, *others = zip(headers, *rows, strict=True)
    filled = [column for column in others if set(column[1:]) != {NOTHING}]
    taken = sum(2 + max(map(len, "\n".join(column).split("\n"))) for column in filled)
    wrapped = [textwrap.fill(cell, max(14, WIDTH - taken)) for cell in first]
    headers, *rows = zip(wrapped, *filled, strict=True)
    tabulate.MIN_PADDING = 0  # else two blanks more for every column whose header is its widest
    text: str = tabulate.tabulate(
        rows,
        headers,
        tablefmt="simple",
        disable_numparse=True,
        colalign=["left"] + ["right"] * (len(headers) - 1),
    )
    return text


def _title(outcome: Outcome) -> str:
    parts = [outcome.title]
    if outcome.batch and outcome.frozen_tensors:
        parts[0] += f" ({outcome.frozen_percent:.1f} % of the elements)"
    parts += [
        f"{outcome.tensors} tensors",
        f"{outcome.elements:,} elements",
        f"momentum {outcome.momentum:g}",
        f"weight decay {outcome.weight_decay:g}",
    ]
    return textwrap.fill("; ".join(parts), WIDTH)


def _notes(outcome: Outcome) -> list[str]:
    notes = [f"{key}: not run: {why}" for key, why in outcome.unavailable.items()]
    for row in outcome.rows:
        equality = row.equality
        if equality is None:
            continue
        if not equality.holds:
            off = f"{equality.largest_relative:.0e}"
            notes.append(f"{row.contestant.label}: NOT stock's result: {off} of the largest value")
        if equality.compile_seconds is not None:
            notes.append(f"{row.contestant.label}: compiling took {equality.compile_seconds:.1f} s")
    share = outcome.share_of_pass(outcome.ours)
    if share:
        what = "tensor.copy_()" if outcome.device == "cuda" else "a pass p += g, m *= -1"
        notes.append(f"FrozenAwareSGD moves {100 * share.median:.0f} % of the bytes/s of {what}")
    return [*map(indented, notes), *memory_note(outcome.rows)]


def indented(note: str) -> str:
    """A line under a table."""
    return textwrap.fill(note, WIDTH, initial_indent="  ", subsequent_indent="    ")


def memory_note(rows: Sequence[Row | DigitsRow]) -> list[str]:
    """A line with everyone's memory, if it was measured; names only where not all need the same."""
    figures = []
    for name in ("peak", "gradients", "state"):
        found: dict[str, list[str]] = {}
        for row in rows:
            if row.memory is not None:
                size = megabytes(getattr(row.memory, name))
                found.setdefault(size, []).append(row.contestant.label)
        parts = [f"{size} ({', '.join(who)})" for size, who in found.items()]
        if found:
            figures.append(f"{name} {', '.join(parts if len(parts) > 1 else found)}")
    return [indented(f"memory in MB: {'; '.join(figures)}")] if figures else []


def _timed(outcome: Outcome, row: Row, measure: str, *, spread: bool = True) -> list[str]:
    return [_middle(row.time(measure)), ratio_text(outcome.times_ours(row, measure), spread=spread)]


def outcome_table(outcome: Outcome) -> str:
    """One workload: every measure of every contestant.

    The width is spent on the spread of what matters most: the GPU's own time where there is one.
    """
    on_gpu = outcome.ours.time("device") is not None
    names = {
        "warm": "step()\nhost",
        "cold": "caches\ncold",
        "device": "step()\ndevice",
        "iteration": "itera-\ntion",
    }
    headers = ["", *(h for name in names.values() for h in (name, "times\nours")), "equal"]
    rows = []
    for row in outcome.rows:
        cells = [row.contestant.label]
        for measure in names:
            spread = not on_gpu or measure == "device"
            cells += _timed(outcome, row, measure, spread=spread)
        rows.append([*cells, equality_mark(row.equality)])
    return "\n".join([_title(outcome), render(headers, rows), *_notes(outcome)])


def digits_table(outcome: DigitsOutcome) -> str:
    """The fine-tuning: same loss curves, and what an iteration costs."""
    headers = ["", "loss\nfirst", "loss\nlast", "equal", "right\n%", "itera-\ntion", "times\nours"]
    rows = []
    for row in outcome.rows:
        same = "bits" if row.largest_gap == 0 else f"{row.largest_gap:.0e}"
        rows.append(
            [
                row.contestant.label,
                f"{row.losses[0]:.4f}",
                f"{row.losses[-1]:.4f}",
                same if row.holds else "NO",
                f"{row.accuracy:.1f}",
                duration(outcome.time(row).median),
                ratio_text(outcome.times_ours(row)),
            ]
        )
    title = (
        f"Digits: a CNN that knows 0-4 ({outcome.pretrained_accuracy:.1f} % right), fine-tuned on "
        "5-9, backbone frozen\n"
        f"({outcome.trainable_elements:,} of {outcome.elements:,} elements train; "
        f"{outcome.accuracy_before:.1f} % right before, {len(outcome.ours.losses)} iterations)"
    )
    return "\n".join([title, render(headers, rows), *memory_note(outcome.rows)])


def targets_table(lines: Sequence[Reached], heading: str) -> str:
    """Every target with the figure of this run."""
    headers = [heading, "measured", "target", ""]
    rows = [[line.case, line.figure, line.target, line.status] for line in lines]
    return render(headers, rows)


def legend(device: str, outcomes: Sequence[Outcome], *, trained: bool) -> str:
    """What the columns of the tables mean.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        outcomes: what was measured on steps.
        trained: whether there is a table of real training, too.
    """
    default = "foreach" if device == "cuda" else "one tensor after the other"
    sentences = [
        "all: the optimizer is given every parameter; filter: the trainable ones alone.",
        f"default: stock with no option set, which on this device is {default}.",
        "times ours: the median over FrozenAwareSGD's, above 1 FrozenAwareSGD is faster; then the"
        " 10th to 90th percentile of the ratios taken round by round.",
    ]
    if trained or any(row.equality is not None for outcome in outcomes for row in outcome.rows):
        sentences.append(
            "equal: weights and momentum after 5 steps against stock foreach=False, on the digits"
            " the losses; bits: in every bit, else the largest difference over the largest value."
        )
    models = [outcome for outcome in outcomes if outcome.batch]
    if trained or any(outcome.ours.memory for outcome in outcomes):
        sentences.append(
            "iteration: zero_grad, forward, backward and step on a small batch; the larger the"
            " batch, the less the step matters. peak: weights and state, and the most an iteration"
            " takes on top. gradients, state: held after the step."
        )
    kinds = {row.contestant.kind for outcome in outcomes for row in outcome.rows}
    if "flashoptim" in kinds:
        sentences.append(
            "flashoptim: FlashSGD over the trainable parameters, nothing quantized"
            f"{', unfused' if device == 'cpu' else ''}."
        )
    if "apex" in kinds:
        sentences.append("apex: FusedSGD over the trainable parameters.")
    batches = {o.title.partition(",")[0]: o.batch for o in models}
    if batches:
        each = "; ".join(f"{name} {batch}" for name, batch in batches.items())
        sentences.append(f"batches: {each}.")
    return "\n".join(textwrap.fill(sentence, WIDTH) for sentence in sentences)
