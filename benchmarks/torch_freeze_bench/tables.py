"""Figures as text of at most 80 columns, and the targets of a run."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import tabulate

from .records import Summary

WIDTH = 80
NOTHING = "-"
filled = partial(textwrap.fill, width=WIDTH)
"""A paragraph."""
indented = partial(filled, initial_indent="  ", subsequent_indent="    ")
"""A line under a table."""
listed = partial(filled, initial_indent="- ", subsequent_indent="  ")
"""A point of a list."""


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


def megabytes(size: float) -> str:
    """Millions of bytes, without their unit."""
    if 0 < size < 0.05e6:
        return "<0.1"
    return f"{size / 1e6:.{1 if 0 < size < 999.95e6 else 0}f}"


def render(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table without the columns that hold no value; its first column is wrapped to fit."""
    first, *others = zip(headers, *rows, strict=True)
    shown = [column for column in others if set(column[1:]) != {NOTHING}]
    taken = sum(2 + max(map(len, "\n".join(column).split("\n"))) for column in shown)
    wrapped = [textwrap.fill(cell, max(14, WIDTH - taken)) for cell in first]
    headers, *body = zip(wrapped, *shown, strict=True)
    tabulate.MIN_PADDING = 0  # else columns whose header is their widest cell get two more blanks
    align = ["left"] + ["right"] * (len(headers) - 1)
    text: str = tabulate.tabulate(
        body, headers, tablefmt="simple", disable_numparse=True, colalign=align
    )
    return text


class Reached(NamedTuple):
    """One target: what was measured, and whether that is what was wanted."""

    case: str
    figure: str
    target: str
    status: str
    """``reached``, ``missed``, ``not measured``, ``no target``, or ``simulated``."""


def judge(
    case: str, found: tuple[float, str] | None, bound: str, limit: float | None = None
) -> Reached:
    """Compare a figure with its target.

    Args:
        case: what the figure is of.
        found: the figure and how it is shown; None if it was not measured.
        bound: a comparison such as ``">= 12x"``, or ``"-"`` if there is no target.
        limit: the number in ``bound``, if that is in another unit than the figure.
    """
    if found is None:
        return Reached(case, NOTHING, bound, "not measured")
    value, text = found
    if bound == NOTHING:
        return Reached(case, text, bound, "no target")
    most = float(re.findall(r"[\d.]+", bound)[0]) if limit is None else limit
    kept = value <= most if bound.startswith("<=") else value >= most
    return Reached(case, text, bound, "reached" if kept else "missed")


def targets_summary(lines: Sequence[Reached]) -> Iterator[str]:
    """How many targets were reached, and which were not."""
    judged = [line for line in lines if line.status in ("reached", "missed")]
    missed = [line.case for line in judged if line.status == "missed"]
    if judged:
        text = f"Targets: {len(judged) - len(missed)} of {len(judged)} reached"
        yield text + (f"; missed: {'; '.join(missed)}." if missed else ".")
