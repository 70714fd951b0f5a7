"""The figures as text: tables of at most 120 columns, and a verdict in plain words."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from digits import DigitsOutcome
from measure import Equality, Summary
from models import require
from suites import Outcome, Row
from targets import Reached
from units import duration, multiple

WIDTH = 120
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


def megabytes(size: int | None) -> str:
    """Millions of bytes, without their unit."""
    if size is None:
        return NOTHING
    if 0 < size < 0.095e6:
        return "<0.1"
    return f"{size / 1e6:.1f}" if 0 < size < 9.95e6 else f"{size / 1e6:.0f}"


def equality_mark(equality: Equality) -> str:
    """``bits`` for bit-equal, else the largest relative difference, marked if it is too large."""
    if equality.bit_equal:
        return "bits"
    mark = "" if equality.holds else "NO "
    return f"{mark}{equality.largest_relative:.0e}"


def render(headers: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table whose first ``left`` columns are words."""
    tabulate = require("tabulate", "tabulate", "the tables")
    tabulate.MIN_PADDING = 0  # else two blanks more for every column whose header is its widest
    text: str = tabulate.tabulate(
        rows,
        headers,
        tablefmt="simple",
        disable_numparse=True,
        colalign=["left"] * left + ["right"] * (len(headers) - left),
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
    notes = [f"  {key}: not run: {why[:90]}" for key, why in outcome.unavailable.items()]
    notes += [
        f"  {row.contestant.label(outcome.device)}: compiling took "
        f"{row.equality.compile_seconds:.1f} s"
        for row in outcome.rows
        if row.equality.compile_seconds is not None
    ]
    return notes


def _timed(outcome: Outcome, row: Row, measure: str, *, spread: bool = True) -> list[str]:
    return [_middle(row.time(measure)), ratio_text(outcome.times_ours(row, measure), spread=spread)]


def model_table(outcome: Outcome) -> str:
    """One network at one frozen share: every measure of every contestant.

    The width is spent on the spread of what matters most: host and iteration on a CPU, the GPU's
    own time on a GPU.
    """
    on_gpu = outcome.device == "cuda"
    headers = [
        "",
        "step()\nhost",
        "times\nours",
        "step()\ndevice",
        *(["times\nours"] if on_gpu else []),
        "itera-\ntion",
        "times\nours",
        "peak\nMB",
        "grads\nMB",
        "state\nMB",
        "% of\ncopy" if on_gpu else "% of\nrmw",
        "same\nresult",
    ]
    rows = []
    for row in outcome.rows:
        share = outcome.share_of_pass(row)
        kept = row.memory
        rows.append(
            [
                row.contestant.label(outcome.device),
                *_timed(outcome, row, "warm", spread=not on_gpu),
                *(_timed(outcome, row, "device") if on_gpu else [NOTHING]),
                *_timed(outcome, row, "iteration", spread=not on_gpu),
                megabytes(kept.peak if kept else None),
                megabytes(kept.gradients if kept else None),
                megabytes(kept.state if kept else None),
                f"{100 * share.median:.0f}" if share else NOTHING,
                equality_mark(row.equality),
            ]
        )
    return "\n".join([_title(outcome), render(headers, rows), *_notes(outcome)])


def synthetic_table(outcome: Outcome) -> str:
    """One synthetic set: host time with warm and with cold caches."""
    headers = [
        "",
        "step() host\nwarm",
        "times\nours",
        "step() host\ncold",
        "times\nours",
        "step()\ndevice",
        *(["times\nours"] if outcome.device == "cuda" else []),
        "same\nresult",
    ]
    rows = [
        [
            row.contestant.label(outcome.device),
            *_timed(outcome, row, "warm"),
            *_timed(outcome, row, "cold"),
            *(_timed(outcome, row, "device") if outcome.device == "cuda" else [NOTHING]),
            equality_mark(row.equality),
        ]
        for row in outcome.rows
    ]
    return "\n".join([_title(outcome), render(headers, rows), *_notes(outcome)])


def outcome_table(outcome: Outcome) -> str:
    """The table that fits what was measured."""
    return model_table(outcome) if outcome.batch else synthetic_table(outcome)


def digits_table(outcome: DigitsOutcome) -> str:
    """The fine-tuning: same loss curves, and what an iteration costs."""
    headers = [
        "",
        "loss\nfirst",
        "loss\nlast",
        "curve\nsame",
        "right\n%",
        "itera-\ntion",
        "times\nours",
        "peak\nMB",
        "grads\nMB",
        "state\nMB",
    ]
    rows = []
    for row in outcome.rows:
        kept = row.memory
        same = "bits" if row.largest_gap == 0 else f"{row.largest_gap:.0e}"
        rows.append(
            [
                row.contestant.label(outcome.device),
                f"{row.losses[0]:.4f}",
                f"{row.losses[-1]:.4f}",
                same if row.holds else f"NO {same}",
                f"{row.accuracy:.1f}",
                duration(outcome.time(row).median),
                ratio_text(outcome.times_ours(row)),
                megabytes(kept.peak if kept else None),
                megabytes(kept.gradients if kept else None),
                megabytes(kept.state if kept else None),
            ]
        )
    title = (
        f"Digits: a CNN that knows 0-4 ({outcome.pretrained_accuracy:.1f} % right) fine-tuned on "
        "5-9, its backbone frozen\n"
        f"({outcome.trainable_elements:,} of {outcome.elements:,} elements train; "
        f"{outcome.accuracy_before:.1f} % right before, {len(outcome.ours.losses)} iterations)"
    )
    return "\n".join([title, render(headers, rows)])


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
        "same result: weights and momentum after 5 steps against stock foreach=False; bits: equal"
        " in every bit, else the largest difference relative to the largest value of its tensor.",
    ]
    models = [outcome for outcome in outcomes if outcome.batch]
    if models:
        sentences.append(
            "% of copy: bytes a second of the update, of those of tensor.copy_()."
            if device == "cuda"
            else "% of rmw: bytes a second of the update, of those of a plain parallel pass that"
            " reads and writes as many (p += g, m *= -1)."
        )
    if trained or any(outcome.ours.memory for outcome in outcomes):
        sentences.append(
            "iteration: zero_grad, forward, backward and step on a small batch; the larger the"
            " batch, the less the step matters. peak: weights and state, and the most an iteration"
            " takes on top. grads, state: held after the step."
        )
    batches = {o.title.partition(",")[0]: o.batch for o in models}
    if batches:
        each = "; ".join(f"{name} {batch}" for name, batch in batches.items())
        sentences.append(f"batches: {each}.")
    if device == "cpu":
        sentences.append(
            "On a CPU the host's time is all of a step's time; there is no device time."
        )
    return "\n".join(textwrap.fill(sentence, WIDTH) for sentence in sentences)
