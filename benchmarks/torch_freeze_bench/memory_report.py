"""The memory suite's figures: tables, their legend, what was to be reached, and a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy
import pandas

from . import figures
from .contestants import (
    CHANGING,
    DEFAULT,
    FOREACH,
    FUSED,
    IN_BACKWARD,
    IN_BACKWARD_BF16,
    WITH_STATE,
    WITHOUT_STATE,
    Contestant,
    Family,
    timed,
)
from .equality import EXACT
from .records import OURS, Measured
from .tables import (
    NOTHING,
    Reached,
    at_most,
    difference,
    filled,
    indented,
    megabytes,
    middle,
    render,
    times,
)

if TYPE_CHECKING:
    from .suites.base import Setting

SLOWER = 1.02
"""How much longer an iteration may take that steps in backward."""
_KNOWN = {c.key: c for c in (*WITH_STATE, *WITHOUT_STATE, *CHANGING, *timed("cuda"))}
_FIGURES = ("gradients", "state", "temporaries", "peak")
_DRAWN = [c.key for c in (DEFAULT, FOREACH, FUSED)]
_DRAWN += [OURS, IN_BACKWARD.key, IN_BACKWARD_BF16.key]


def _measured(found: Measured) -> list[str]:
    """Everyone but those whose result is not stock's."""
    return [c for c in found.contestants if found.of(c, "peak")]


def peak_of(found: Measured, contestant: str) -> float:
    """The peak of a steady iteration; in rotation the largest one of all."""
    peaks = found.of(contestant, "peak")
    return float(numpy.nanmax(peaks)) if found.key.endswith("/rotation") else peaks[-1]


def _row(found: Measured, key: str) -> list[str]:
    """One contestant's cells, by what the workload is."""
    kind = found.key.partition("/")[2]
    if kind.endswith(" time"):
        return [middle(found.time(key, "iteration")), times(found.ratio(key, "iteration"))]
    state, stale = found.of(key, "state"), found.of(key, "frozen gradients")
    if kind == "midway":
        held = [each[1:3] for each in (stale, found.of(key, "frozen state"), state)]
        pairs = [*held, found.of(key, "peak")[1::2]]
        cells = [" -> ".join(map(megabytes, pair)) for pair in pairs]
    elif kind == "rotation":
        cells = [megabytes(s) for s in (*state[1::2], max(stale[1::2]), peak_of(found, key))]
    else:
        cells = [megabytes(found.of(key, name)[-1]) for name in _FIGURES]
        cells.append(f"{peak_of(found, key) / peak_of(found, OURS):.3f}x")
        cells.append(megabytes(found.one(key, "rss")))
    return [*cells, difference(found, key)]


def _headers(found: Measured) -> list[str]:
    kind = found.key.partition("/")[2]
    if kind.endswith(" time"):
        return ["", "iteration", "times ours with\nan ordinary step"]
    if kind == "midway":
        frozen = ["frozen\ngrads", "frozen\nstate"]
        return ["MB before -> after", *frozen, "all\nstate", "peak", "equal"]
    if kind == "rotation":
        periods = range(1, len(found.of(OURS, "state")) // 2 + 1)
        return ["MB", *(f"state\n{i}" for i in periods), "frozen\ngrads", "peak", "equal"]
    first = ["", "grads\nMB", "state\nMB", "tempo-\nraries", "peak\nMB"]
    return [*first, "times\nours", "RSS\nMB", "equal"]


def table(found: Measured, family: Family) -> str:
    """One workload: a case, freezing midway, blocks in rotation, or times."""
    notes = [f"{label}: not run: {why}" for label, why in found.unavailable.items()]
    rows = []
    for key in found.contestants:
        if found.unequal(key):
            off = f"{found.one(key, 'difference'):.0e} from stock's result"
            notes.append(f"{family.label(key)}: NOT EQUAL, not measured: {off}")
        else:
            rows.append([family.label(key), *_row(found, key)])
    title = filled(found.title + found.details)
    return "\n".join([title, render(_headers(found), rows), *map(indented, notes)])


def legend(found: Sequence[Measured], setting: Setting) -> list[str]:
    """What the columns of the memory tables mean."""
    on_gpu, name = setting.device.type == "cuda", setting.family.name
    allocator = (
        "torch.cuda.max_memory_allocated()"
        if on_gpu
        else "every event of torch's allocator, temporaries inside operators included"
    )
    sentences = [
        "grads: the most bytes of gradients alive at once, counted whenever one arrives; state:"
        " after the iteration, and with numbers after each period.",
        "temporaries: the most that step() takes for its own duration. peak: the most held above"
        f" the model during an iteration, according to {allocator}; activations, gradients, state"
        f" and temporaries together. Peaks are compared to a thousandth: {name} in backward keeps"
        " one element to detect a second backward.",
        "equal: weights and state after the run against those of stock foreach=False given the"
        " same gradients (on a CPU, of one in four of the decoder's parameters); bits: equal in"
        " every bit, else the largest difference relative to the model's largest value.",
        "one per parameter: the recipe of torch's tutorial, a stock optimizer for each parameter,"
        " stepped by a hook. rebuilt: a new stock optimizer over what trains, whenever that"
        " changes; what the old one leaves in .grad stays, unless model.zero_grad() is called.",
        "frozen in the middle of a run: between two iterations, by requires_grad alone. Gradients"
        " and state before that and after one step; frozen grads, state: those of frozen"
        " parameters. peak: in the last iteration before, and in the second one after.",
    ]
    if any(m.of(c, "rss") for m in found for c in m.contestants):
        sentences.append(
            "RSS: the peak of a process of its own that did nothing but two iterations, including"
            " the interpreter and torch."
        )
    return sentences


def _name(found: Measured) -> str:
    return found.title.partition(",")[0]


def _gradient_line(cases: Sequence[Measured]) -> Reached:
    """What is alive in backward, in the case that comes closest to its bound.

    The bound is one bucket, of at most a tenth of the gradients, and the largest gradient.
    """
    what = f"{_name(cases[0])}: gradients in backward"
    found = []
    for of in cases:
        # In case 3 most gradients are not the optimizer's to free.
        if of.of(IN_BACKWARD.key, "peak") and not of.key.endswith("/3"):
            bucket = of.one(IN_BACKWARD.key, "bucket") or 0
            bound = min(bucket, of.fact("trained") // 10) + of.fact("largest")
            found.append((of.of(IN_BACKWARD.key, "gradients")[-1], bound, of))
    if not found:
        return Reached(what, NOTHING, "a bucket and the largest", "not measured")
    live, bound, of = max(found, key=lambda entry: entry[0] / entry[1])
    case = of.key.partition("/")[2]
    figure = f"{megabytes(live)} of {megabytes(of.fact('trained'))} MB, case {case}"
    return at_most(what, live, bound, figure, f"<= {megabytes(bound)} MB")


Chosen = Callable[[Contestant], bool]
_COMPARISONS: tuple[tuple[str, Chosen, Chosen], ...] = (
    (
        "peak of an ordinary step vs stock's",
        lambda c: c.key == OURS,
        lambda c: c.key in (DEFAULT.key, FOREACH.key, FUSED.key),
    ),
    (
        "least peak vs all others'",
        lambda c: c.ours and c.precision.itemsize == 4,
        lambda c: not c.ours and c.precision.itemsize == 4,
    ),
    ("least peak vs 8 bits of state", lambda c: c.ours, lambda c: c.precision.itemsize == 1),
)


def _peak_lines(name: str, found: Sequence[Measured]) -> Iterator[Reached]:
    """The case in which ours compares worst with the least of the others."""
    for what, ours, others in _COMPARISONS:
        compared = []
        for of in found:
            peaks = {key: peak_of(of, key) for key in _measured(of)}
            mine = [peak for key, peak in peaks.items() if ours(_KNOWN[key])]
            theirs = [peak for key, peak in peaks.items() if others(_KNOWN[key])]
            if mine and theirs:
                best, least, case = min(mine), min(theirs), of.key.partition("/")[2]
                where = f"case {case}" if case[0].isdigit() else case
                shown = f"{megabytes(best)} of {megabytes(least)} MB, {where}"
                compared.append((best / least, shown))
        if compared:
            worst, where = max(compared)
            figure = f"{worst:.3f}x, {where}"
            yield at_most(f"{name}: {what}", round(worst, 3), 1, figure, "<= 1x")
        else:
            yield Reached(f"{name}: {what}", NOTHING, "<= 1x", "not measured")


def _midway_lines(found: Measured) -> Iterator[Reached]:
    """What our optimizers hold for frozen parameters one iteration after the freeze."""
    ours = [key for key in _measured(found) if _KNOWN[key].ours]
    kept = {
        "gradients of it": [found.of(key, "frozen gradients")[2] for key in ours],
        'state of it, "drop"': [
            found.of(key, "frozen state")[2] for key in ours if _KNOWN[key].drops
        ],
    }
    for what, left in kept.items():
        case = f"{_name(found)}, frozen midway: {what}"
        if left:
            yield at_most(case, max(left), 0, f"{max(left):.0f} B", "0 B")
        else:
            yield Reached(case, NOTHING, "0 B", "not measured")


def _time_line(found: Measured) -> Reached:
    what = f"{found.title.partition(':')[0]}: time in backward vs ordinary"
    ratio, target = found.ratio(IN_BACKWARD.key, "iteration"), f"<= {SLOWER:g}x"
    if ratio is None:
        return Reached(what, NOTHING, target, "not measured")
    return at_most(what, ratio.median, SLOWER, times(ratio), target)


def _by_model(found: Iterable[Measured]) -> Iterator[list[Measured]]:
    models: dict[str, list[Measured]] = {}
    for of in found:
        models.setdefault(of.key.partition("/")[0], []).append(of)
    yield from models.values()


def _cases(found: Sequence[Measured]) -> list[Measured]:
    return [of for of in found if of.key.partition("/")[2] in ("1", "2", "3", "4", "1 plain")]


def reached(found: Sequence[Measured], setting: Setting) -> Iterator[Reached]:
    """Every target of the suite with the figure of this run."""
    for of_model in _by_model(found):
        yield _gradient_line(_cases(of_model))
        timed = [of for of in of_model if of.key.endswith(" time")]
        yield from _peak_lines(_name(of_model[0]), [of for of in of_model if of not in timed])
        for of in of_model:
            if of.key.endswith("/midway"):
                yield from _midway_lines(of)
        yield from map(_time_line, timed)


def summary(found: Sequence[Measured], setting: Setting) -> list[str]:
    """What the figures say, a sentence for each model."""
    name, lines = setting.family.name, []
    for of_model in _by_model(found):
        parts = []
        for of in _cases(of_model):
            ours = [peak_of(of, key) for key in _measured(of) if _KNOWN[key].ours]
            if ours and of.of(DEFAULT.key, "peak"):
                least, default = min(ours), peak_of(of, DEFAULT.key)
                parts.append(
                    f"case {of.key.partition('/')[2]} {megabytes(least)} MB against "
                    f"{megabytes(default)} ({default / least:.2f}x)"
                )
        if parts:
            lines.append(
                f"{_name(of_model[0])}, peak above the model, the least of {name} against stock's "
                f"default: {'; '.join(parts)}."
            )
    inexact = [
        f"{setting.family.label(key)} on {of.title}"
        for of in found
        for key in _measured(of)
        # In bfloat16 it is not equal by design: stock rounds in between, the kernels only once.
        if _KNOWN[key].ours and of.tolerances[key] <= EXACT and of.one(key, "difference")
    ]
    if inexact:
        lines.append(f"Not every bit of stock's result: {'; '.join(inexact)}.")
    return lines


def draw(found: Sequence[Measured], setting: Setting) -> Any:
    """The peaks of a few contestants in every case, a panel for each model."""
    panels = {}
    for of_model in _by_model(found):
        rows = {
            textwrap.fill(of.title.partition(", ")[2], 26): {
                setting.family.label(key): peak_of(of, key) for key in _DRAWN if of.of(key, "peak")
            }
            for of in of_model
            if not of.key.endswith(" time")
        }
        panels[_name(of_model[0])] = pandas.DataFrame.from_dict(rows, orient="index")
    return figures.sizes(panels, "The most memory held above the model during an iteration")
