"""Pictures that explain themselves."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pandas
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from .contestants import Family
from .records import OURS, Measured, Summary

_OURS, _STOCK = "#2a9d4a", "#30638e"


def kinds() -> list[str]:
    """The endings that the name of a picture may have."""
    return sorted(FigureCanvasBase.get_supported_filetypes())


def encode(figure: Any, kind: str, machine: str) -> bytes:
    """A figure, signed with the machine's name, as the contents of a file of that kind."""
    figure.suptitle(f"{figure.get_suptitle()}\n{machine}", fontsize=10)
    contents = io.BytesIO()
    figure.savefig(contents, format=kind)
    return contents.getvalue()


def bars(found: Mapping[str, Summary], title: str) -> Any:
    """A horizontal bar for each ratio, with its spread, and a line at 1."""
    figure = Figure(figsize=(7, 1.4 + 0.45 * len(found)), dpi=140, layout="constrained")
    axes: Any = figure.add_subplot()
    medians = [ratio.median for ratio in found.values()]
    spread = [
        [ratio.median - ratio.low for ratio in found.values()],
        [ratio.high - ratio.median for ratio in found.values()],
    ]
    drawn = axes.barh(list(found), medians, xerr=spread, color=_OURS, ecolor="#555555", height=0.6)
    axes.bar_label(drawn, [f"{ratio:.1f}x" for ratio in medians], padding=6, fontweight="bold")
    axes.axvline(1, color=_STOCK, linewidth=1.5)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_xlabel("times as long as ours (blue line: the same)", fontsize=9)
    figure.suptitle(title)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def ratios(found: Sequence[Measured], panels: Mapping[str, str], family: Family) -> Any:
    """Everyone's ratio to ours: a row for each workload, a panel for each measure."""
    size = (3.2 + 3.4 * len(panels), 2.4 + 0.6 * len(found))
    figure = Figure(figsize=size, dpi=80, layout="constrained")
    grid: Any = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    everyone = list(dict.fromkeys(c for m in found for c in m.contestants if c != OURS))
    handles: dict[str, Any] = {}
    for axes, (measure, title) in zip(grid, panels.items(), strict=True):
        axes.axvline(1, color=_OURS, linewidth=2)
        for line in range(1, len(found), 2):
            axes.axhspan(line - 0.5, line + 0.5, color="#f2f2f2", zorder=0)
        for place, contestant in enumerate(everyone):
            points = [(y, m.ratio(contestant, measure)) for y, m in enumerate(found)]
            known = [(y, ratio) for y, ratio in points if ratio is not None]
            handles[contestant] = axes.errorbar(
                [ratio.median for _, ratio in known],
                [y + 0.8 * ((place + 0.5) / len(everyone) - 0.5) for y, _ in known],
                xerr=[
                    [ratio.median - ratio.low for _, ratio in known],
                    [ratio.high - ratio.median for _, ratio in known],
                ],
                fmt="D" if contestant.startswith("filter/") else "o",
                markersize=4,
                elinewidth=1,
                color=f"C{place % 10}",
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter("{x:g}x")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(f"times as long as {family.name}\n(right of the green line: slower)")
        axes.xaxis.set_minor_formatter("")
        axes.grid(axis="x", color="#dddddd", linewidth=0.5)
    grid[0].set_yticks(range(len(found)), [m.title.replace(", ", "\n", 1) for m in found])
    grid[0].tick_params(axis="y", labelsize=8)
    grid[0].set_ylim(len(found) - 0.5, -0.5)
    figure.legend(
        list(handles.values()),
        [family.label(contestant) for contestant in handles],
        loc="outside lower center",
        ncols=6,
        fontsize=8,
        frameon=False,
    )
    figure.suptitle("Medians; bars: 10th to 90th percentile of the ratios within each round")
    return figure


def sizes(panels: Mapping[str, pandas.DataFrame], title: str) -> Any:
    """For each panel a frame of bytes: bars in its columns' colours, a group for each row."""
    rows = list(dict.fromkeys(row for frame in panels.values() for row in frame.index))
    size = (2.4 * len(panels) + 2.4, 1.6 + 0.7 * len(rows))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    grid: Any = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, frame) in zip(grid, panels.items(), strict=True):
        sizes = frame.reindex(rows) / 1e6
        sizes.plot.barh(ax=axes, width=0.8, legend=False, colormap="viridis", fontsize=8)
        axes.set(title=name, xlabel="MB", ylabel="")
    grid[0].invert_yaxis()
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(title)
    return figure
