"""One picture of where the memory of an iteration goes, and when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memory_suite import CaseOutcome, MemoryOutcome
from models import require
from plots import encode

_STYLES: dict[str, tuple[str, str, float]] = {
    "stock/default": ("#d1495b", "-", 3.0),
    "stock/foreach": ("#edae49", "-", 1.8),
    "stock/fused": ("#30638e", "-", 1.0),
    "bitsandbytes": ("#8d6e63", "-.", 1.2),
    "lomo": ("#6a4c93", ":", 1.6),
    "stock/one per parameter": ("#222222", ":", 1.4),
    "ours": ("#2a9d4a", "--", 1.6),
    "ours/in backward, at once": ("#1b6b33", ":", 1.2),
    "ours/in backward": ("#2a9d4a", "-", 1.8),
    "ours/in backward, bf16": ("#7bd389", "-", 1.2),
}
"""Colour, dashes and width; in the order they are drawn, what coincides from wide to narrow."""


def _draw(axes: Any, outcome: CaseOutcome) -> dict[str, Any]:
    rows = {row.contestant.key: row for row in outcome.rows}
    lines = {}
    for key, (colour, dashes, width) in _STYLES.items():
        if key not in rows:
            continue
        curve = rows[key].figures.curve
        (line,) = axes.plot(
            [place for place, _ in curve],
            [size / 1e6 for _, size in curve],
            color=colour,
            linestyle=dashes,
            linewidth=width,
        )
        lines[rows[key].contestant.label] = line
    for border in (1, 2):
        axes.axvline(border, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.set_xlim(0, 3)
    axes.set_ylim(bottom=0)
    axes.set_xticks([0.5, 1.5, 2.5], ["forward", "backward", "step()"])
    axes.tick_params(axis="x", length=0)
    axes.set_title(outcome.title.replace(": ", ":\n", 1), fontsize=9)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    return lines


def draw_memory(outcomes: Sequence[MemoryOutcome], machine: str, kind: str) -> bytes:
    """Draw each case's iteration, a line for every contestant, as a file of that kind.

    Raises:
        models.MissingPackageError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", "matplotlib", "the picture")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", "matplotlib", "the picture")
    cases = [outcome for outcome in outcomes if isinstance(outcome, CaseOutcome)]
    models = list(dict.fromkeys(outcome.model for outcome in cases))
    columns = list(dict.fromkeys(outcome.case for outcome in cases))
    figure, grid = pyplot.subplots(
        len(models),
        len(columns),
        squeeze=False,
        figsize=(3.4 * len(columns) + 0.6, 2.9 * len(models) + 1.4),
        layout="constrained",
    )
    for axes in grid.flat:
        axes.set_visible(False)
    lines: dict[str, Any] = {}
    for outcome in cases:
        axes = grid[models.index(outcome.model)][columns.index(outcome.case)]
        axes.set_visible(True)
        lines |= _draw(axes, outcome)
        if outcome.case == columns[0]:
            axes.set_ylabel("MB above the model")
    figure.suptitle(
        "What torch's allocator holds above the model during one iteration\n"
        "each of its events in order; the phases drawn equally long",
        fontsize=12,
    )
    figure.text(0.995, 0.003, machine, ha="right", va="bottom", fontsize=6, color="#555555")
    figure.legend(
        list(lines.values()),
        list(lines),
        loc="outside lower center",
        ncols=5,
        fontsize=8,
        frameon=False,
    )
    return encode(figure, kind)
