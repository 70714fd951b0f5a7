"""Pictures that explain themselves."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from .contestants import DEFAULT, FOREACH, FUSED, IN_BACKWARD, IN_BACKWARD_BF16, Family
from .records import OURS, Measured, Summary
from .report import MEASURES, by_model, peak_of

_OURS, _STOCK = "#2a9d4a", "#30638e"
_PEAKS = [c.key for c in (DEFAULT, FOREACH, FUSED)] + [OURS, IN_BACKWARD.key, IN_BACKWARD_BF16.key]
_BARS = {
    "tiny161": "161 small tensors",
    "frozen998": "998 of 1000 frozen",
    "groups50": "50 param groups",
    "groups161": "161 param groups",
    "mobilenet_v3_small/0": "MobileNetV3-small",
    "resnet50/0": "ResNet-50",
}
"""The workloads of the targets that a picture of the gain shows, if they were measured."""


def draw(found: Sequence[Measured], family: Family) -> Iterator[Any]:
    """Everyone's ratios, the targets' gain in a few bars, and peaks, as far as measured."""
    timed = [m for m in found if m.kind in ("steps", "digits") and m.suite != "targets"]
    if timed:
        yield _ratios(timed, family)
    gains = {}
    for m in found:
        fused = "filter/fused" if m.of("filter/fused", "warm") else "all/fused"
        shown = m.suite == "targets" and m.key in _BARS
        if shown and (gain := m.ratio(fused, "warm", to=m.ours_as(fused))):
            gains[_BARS[m.key]] = gain
    if gains:
        yield _bars(gains, f"Time of step(): stock fused over {family.name}")
    if peaks := [
        m for m in found if m.kind in ("case", "midway", "rotation") and m.of(OURS, "peak")
    ]:
        yield _sizes(peaks, family)


def encode(figure: Any, machine: str) -> bytes:
    """A figure, signed with the machine's name, as the contents of a PNG file."""
    figure.suptitle(f"{figure.get_suptitle()}\n{machine}", fontsize=10)
    contents = io.BytesIO()
    figure.savefig(contents, format="png")
    return contents.getvalue()


def _spread(ratios: Sequence[Summary]) -> list[list[float]]:
    return [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]


def _bars(found: Mapping[str, Summary], title: str) -> Any:
    """A horizontal bar for each ratio, with its spread, and a line at 1."""
    figure = Figure(figsize=(7, 1.4 + 0.45 * len(found)), dpi=140, layout="constrained")
    axes: Any = figure.add_subplot()
    ratios = list(found.values())
    medians, error = [ratio.median for ratio in ratios], {"ecolor": "#555555", "height": 0.6}
    drawn = axes.barh(list(found), medians, xerr=_spread(ratios), color=_OURS, **error)
    axes.bar_label(drawn, [f"{ratio:.1f}x" for ratio in medians], padding=6, fontweight="bold")
    axes.axvline(1, color=_STOCK, linewidth=1.5)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_xlabel("times as long as ours (blue line: the same)", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    return figure


def _ratios(found: Sequence[Measured], family: Family) -> Any:
    """Everyone's ratio to ours: a row for each workload, a panel for each measure."""
    panels = {m: name for m, (_, name) in MEASURES.items() if any(of.of(OURS, m) for of in found)}
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
            offset = 0.8 * ((place + 0.5) / len(everyone) - 0.5)
            points = [(y + offset, m.ratio(contestant, measure)) for y, m in enumerate(found)]
            known = [(y, ratio) for y, ratio in points if ratio is not None]
            ratios = [ratio for _, ratio in known]
            handles[family.label(contestant)] = axes.errorbar(
                [ratio.median for ratio in ratios],
                [y for y, _ in known],
                xerr=_spread(ratios),
                fmt="D" if contestant.startswith("filter/") else "o",
                markersize=4,
                elinewidth=1,
                color=f"C{place % 10}",
            )
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        narrow = high < 5 * low  # where 1, 2, 5 and their tenfolds would give one tick or two
        axes.xaxis.set_major_locator(
            MaxNLocator(5, steps=[1, 2, 5, 10]) if narrow else LogLocator(subs=(1, 2, 5))
        )
        axes.xaxis.set_major_formatter("{x:g}x")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(f"times as long as {family.name}\n(right of the green line: slower)")
        axes.grid(axis="x", color="#dddddd", linewidth=0.5)
    grid[0].set_yticks(range(len(found)), [m.title.replace(", ", "\n", 1) for m in found])
    grid[0].tick_params(axis="y", labelsize=8)
    grid[0].set_ylim(len(found) - 0.5, -0.5)
    _legend(figure, handles, 6)
    figure.suptitle("Medians; bars: 10th to 90th percentile of the ratios within each round")
    return figure


def _sizes(found: Sequence[Measured], family: Family) -> Any:
    """The peaks of a few contestants in every case, a panel for each model."""
    panels = {
        model: pandas.DataFrame(
            {
                textwrap.fill(m.title.partition(", ")[2], 26): {
                    family.label(key): peak_of(m, key) / 1e6 for key in _PEAKS if m.of(key, "peak")
                }
                for m in records
            }
        ).T
        for model, records in by_model(found)
    }
    rows = list(dict.fromkeys(row for frame in panels.values() for row in frame.index))
    size = (max(2.4 * len(panels) + 2.4, 7), 1.6 + 0.7 * len(rows))  # the legend needs 7
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    grid: Any = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, frame) in zip(grid, panels.items(), strict=True):
        shown = frame.reindex(rows)
        shown.plot.barh(ax=axes, width=0.8, legend=False, colormap="viridis", fontsize=8)
        axes.set(title=name, xlabel="MB", ylabel="")
    grid[0].invert_yaxis()
    bars, labels = grid[0].get_legend_handles_labels()
    _legend(figure, dict(zip(labels, bars, strict=True)), 3)
    figure.suptitle("The most memory held above the model during an iteration")
    return figure


def _legend(figure: Any, handles: Mapping[str, Any], columns: int) -> None:
    kept = {"loc": "outside lower center", "ncols": columns, "fontsize": 8, "frameon": False}
    figure.legend(list(handles.values()), list(handles), **kept)
