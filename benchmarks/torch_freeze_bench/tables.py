"""Figures as text: tables of at most 80 columns, and the targets of a run."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import tabulate

from .records import Measured, Summary

WIDTH = 80
NOTHING = "-"
Status = Literal["reached", "missed", "not measured", "no target", "simulated"]


def duration(nanoseconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if nanoseconds >= size:
            value = nanoseconds / size
            return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"
    return f"{nanoseconds:.0f} ns"


def multiple(value: float) -> str:
    """A ratio to three digits."""
    if value >= 999.5:
        return ">999"
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def times(found: Summary | None, *, spread: bool = True) -> str:
    """A ratio, with its 10th and 90th percentile if they differ."""
    if found is None:
        return NOTHING
    middle = f"{multiple(found.median)}x"
    if not spread or found.low == found.high:
        return middle
    return f"{middle} {multiple(found.low)}-{multiple(found.high)}"


def middle(found: Summary | None) -> str:
    """The median of some times."""
    return duration(found.median) if found else NOTHING


def megabytes(size: float | None) -> str:
    """Millions of bytes, without their unit."""
    if size is None or size != size:
        return NOTHING
    if 0 < size < 0.05e6:
        return "<0.1"
    return f"{size / 1e6:.{1 if 0 < size < 999.95e6 else 0}f}"


def difference(found: Measured, contestant: str) -> str:
    """``bits`` for bit-equal, else the largest relative difference, or NO if it is too large."""
    gap = found.one(contestant, "difference")
    if gap is None:
        return NOTHING
    if found.unequal(contestant):
        return "NO"
    return f"{gap:.0e}" if gap else "bits"


def render(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table without the columns that hold no value; its first column is wrapped to fit."""
    first, *others = zip(headers, *rows, strict=True)
    filled = [column for column in others if set(column[1:]) != {NOTHING}]
    taken = sum(2 + max(map(len, "\n".join(column).split("\n"))) for column in filled)
    wrapped = [textwrap.fill(cell, max(14, WIDTH - taken)) for cell in first]
    headers, *body = zip(wrapped, *filled, strict=True)
    tabulate.MIN_PADDING = 0  # else columns whose header is their widest cell get two more blanks
    align = ["left"] + ["right"] * (len(headers) - 1)
    text: str = tabulate.tabulate(
        body, headers, tablefmt="simple", disable_numparse=True, colalign=align
    )
    return text


def filled(text: str) -> str:
    """A paragraph."""
    return textwrap.fill(text, WIDTH)


def indented(note: str) -> str:
    """A line under a table."""
    return textwrap.fill(note, WIDTH, initial_indent="  ", subsequent_indent="    ")


def listed(point: str) -> str:
    """A point of a list."""
    return textwrap.fill(point, WIDTH, initial_indent="- ", subsequent_indent="  ")


@dataclass(frozen=True)
class Reached:
    """One target: what was measured, and whether that is what was wanted."""

    case: str
    figure: str
    target: str
    status: Status


def at_most(case: str, value: float, most: float, figure: str, target: str) -> Reached:
    """A figure that must not be above its target."""
    return Reached(case, figure, target, "reached" if value <= most else "missed")


def targets_table(lines: Sequence[Reached], heading: str) -> str:
    """Every target with the figure of this run."""
    rows = [[line.case, line.figure, line.target, line.status] for line in lines]
    return render([heading, "measured", "target", ""], rows)


def targets_summary(lines: Sequence[Reached]) -> Iterator[str]:
    """How many targets were reached, and which were not."""
    judged = [line for line in lines if line.status in ("reached", "missed")]
    missed = [line.case for line in judged if line.status == "missed"]
    if judged:
        text = f"Targets: {len(judged) - len(missed)} of {len(judged)} reached"
        yield text + (f"; missed: {'; '.join(missed)}." if missed else ".")
