"""One picture of a run that explains itself."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from contestants import OURS, Contestant
from models import require
from suites import Outcome, Row

_COLOURS = {
    "default": "#d1495b",
    "foreach": "#edae49",
    "fused": "#30638e",
    "compiled": "#6a4c93",
    "flashoptim": "#8d6e63",
    "apex": "#222222",
    "ours": "#2a9d4a",
}
_MARKERS = {"all": "o", "filter": "D"}


def _panels(outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    panels = {
        "warm": "step(), host time",
        "cold": "step(), host time, cold caches",
        "device": "step(), GPU time",
        "iteration": "whole training iteration",
    }
    return [
        (measure, title)
        for measure, title in panels.items()
        if any(outcome.ours.samples.get(measure) for outcome in outcomes)
    ]


def _place(contestant: Contestant, kinds: Sequence[str]) -> float:
    """Where in its workload's band a contestant is drawn, so that equal figures do not hide."""
    place = (kinds.index(contestant.kind) + 0.5) / len(kinds) - 0.5
    return 0.8 * place + (0.05 if contestant.scope == "all" else -0.05)


def _draw_ratios(axes: Any, outcomes: Sequence[Outcome], measure: str, title: str) -> None:
    axes.axvline(1, color=_COLOURS["ours"], linewidth=2, zorder=1)
    drawn = {row.contestant.kind for outcome in outcomes for row in outcome.rows} - {"ours"}
    kinds = [kind for kind in _COLOURS if kind in drawn]
    for line, outcome in enumerate(outcomes):
        if line % 2:
            axes.axhspan(line - 0.5, line + 0.5, color="#f2f2f2", zorder=0)
        if not outcome.ours.samples.get(measure):
            axes.text(
                0.5,
                line,
                "not measured",
                transform=axes.get_yaxis_transform(),
                ha="center",
                va="center",
                fontsize=7,
                color="#999999",
            )
        for row in outcome.rows:
            times = outcome.times_ours(row, measure)
            if row.contestant == OURS or times is None:
                continue
            axes.errorbar(
                times.median,
                line + _place(row.contestant, kinds),
                xerr=[[times.median - times.low], [times.high - times.median]],
                fmt=_MARKERS[row.contestant.scope],
                markersize=5,
                markerfacecolor=_COLOURS[row.contestant.kind]
                if row.contestant.scope == "all"
                else "white",
                color=_COLOURS[row.contestant.kind],
                elinewidth=1,
                zorder=2,
            )
    axes.set_xscale("log")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("times as long as FrozenAwareSGD\n(right of the green line: slower)")
    axes.grid(axis="x", which="both", color="#dddddd", linewidth=0.5)
    _plain_ticks(axes)


def _plain_ticks(axes: Any) -> None:
    ticker = require("matplotlib.ticker", "matplotlib", "the picture")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.8), max(high, 2.5))
    low, high = axes.get_xlim()
    steps = (1, 2, 5) if high / low < 100 else (1,)
    marks = [step * 10**power for power in range(-2, 6) for step in steps]
    axes.set_xticks([mark for mark in marks if low <= mark <= high])
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def _legend(figure: Any, outcomes: Sequence[Outcome]) -> None:
    lines = require("matplotlib.lines", "matplotlib", "the picture")
    seen: dict[str, Row] = {}
    for outcome in outcomes:
        for row in outcome.rows:
            seen.setdefault(row.contestant.key, row)
    handles = [
        lines.Line2D([], [], color=_COLOURS["ours"], linewidth=2, label="FrozenAwareSGD = 1x")
    ]
    for row in seen.values():
        if row.contestant == OURS:
            continue
        scope = "all parameters" if row.contestant.scope == "all" else "filtered parameters"
        colour = _COLOURS[row.contestant.kind]
        handles.append(
            lines.Line2D(
                [],
                [],
                color=colour,
                marker=_MARKERS[row.contestant.scope],
                markerfacecolor=colour if row.contestant.scope == "all" else "white",
                linestyle="",
                label=f"{'stock ' * row.contestant.stock}{row.contestant.kind}, {scope}",
            )
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def picture_kinds() -> list[str]:
    """The endings that the name of a picture may have.

    Raises:
        models.MissingPackageError: matplotlib is not installed.
    """
    bases = require("matplotlib.backend_bases", "matplotlib", "the picture")
    return sorted(bases.FigureCanvasBase.get_supported_filetypes())


def encode(figure: Any, kind: str) -> bytes:
    """A figure as the contents of a file of that kind."""
    contents = io.BytesIO()
    figure.savefig(contents, format=kind, dpi=130)
    require("matplotlib.pyplot", "matplotlib", "the picture").close(figure)
    return contents.getvalue()


def draw(outcomes: Sequence[Outcome], machine: str, kind: str) -> bytes:
    """Draw every workload's ratios, one panel per measure, as a file of that kind.

    Raises:
        models.MissingPackageError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", "matplotlib", "the picture")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", "matplotlib", "the picture")
    panels = _panels(outcomes)
    figure, grid = pyplot.subplots(
        1,
        len(panels),
        sharey=True,
        squeeze=False,
        figsize=(3.2 + 3.6 * len(panels), 2.6 + 0.62 * len(outcomes)),
        layout="constrained",
    )
    for axes, (measure, title) in zip(grid[0], panels, strict=True):
        _draw_ratios(axes, outcomes, measure, title)
    first = grid[0][0]
    first.set_yticks(
        range(len(outcomes)), [outcome.title.replace(", ", "\n", 1) for outcome in outcomes]
    )
    first.set_ylim(len(outcomes) - 0.5, -0.5)
    first.tick_params(axis="y", labelsize=8)
    figure.suptitle(
        "How long other optimizers take, measured against FrozenAwareSGD\n"
        "medians; bars: 10th to 90th percentile of the ratios round by round",
        fontsize=12,
    )
    figure.text(0.995, 0.005, machine, ha="right", va="bottom", fontsize=6, color="#555555")
    _legend(figure, outcomes)
    return encode(figure, kind)
