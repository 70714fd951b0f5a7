"""What is said about the records: tables, their legend, and a verdict in plain words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

from .contestants import Family
from .records import FACTS, OURS, Measured, Summary, summarise
from .tables import NOTHING, duration, filled, indented, megabytes, multiple, render, times

GAIN = 1.05
"""A ratio this close to 1 counts as no difference: two runs on one machine differ as much."""
MEASURES = {
    "warm": ("step()\nhost", "step() on the host"),
    "cold": ("caches\ncold", "step() on the host with cold caches"),
    "device": ("step()\ndevice", "step() on the device"),
    "iteration": ("itera-\ntion", "a whole iteration"),
}
"""What is timed in rounds: its column and its name."""
Cell = Callable[[Measured, str], str]
"""The text for one contestant."""


def _cell(measure: str, text: Callable[[list[float]], str], least: int = 1) -> Cell:
    """What is said of a measure, if there are so many values."""

    def cell(found: Measured, key: str) -> str:
        values = found.of(key, measure)
        return text(values) if len(values) >= least else NOTHING

    return cell


def _time(measure: str) -> Cell:
    return _cell(measure, lambda values: duration(summarise(values).median))


def _size(measure: str, *places: int) -> Cell:
    """Megabytes after these iterations, counted from 0."""

    def text(values: list[float]) -> str:
        return " -> ".join(megabytes(values[at]) for at in places)

    return _cell(measure, text, least=max(0, *places) + 1)


def _ratio(measure: str) -> Cell:
    def cell(found: Measured, key: str) -> str:
        # The width is spent on the spread of what matters most: the GPU's own time, if there is.
        spread = measure == "device" or not found.of(OURS, "device")
        return times(found.ratio(key, measure), spread=spread)

    return cell


def _gain(measure: str, *, spread: bool = False) -> Cell:
    """How many times as long as this contestant ours takes."""

    def cell(found: Measured, key: str) -> str:
        return times(found.ratio(OURS, measure, to=key), spread=spread)

    return cell


def _over(measure: str, *, ours: bool) -> Cell:
    """The median on all threads, over another one of the same contestant or over ours."""

    def cell(found: Measured, key: str) -> str:
        base = summarise(found.of(OURS if ours else key, measure))
        return f"{multiple(summarise(found.of(key, 'all threads')).median / base.median)}x"

    return cell


def _beside(found: Measured, key: str) -> str:
    """The measure of iterations that the contestant took in turns with frozen and ours."""
    return "alone" if found.of(key, "alone") else f"with {key}"


def _iteration(found: Measured, key: str) -> str:
    taken = found.time(key, _beside(found, key))
    return duration(taken.median) if taken else NOTHING


def _over_frozen(found: Measured, key: str) -> str:
    return times(found.ratio(key, _beside(found, key), to="frozen"), spread=key.startswith(OURS))


def _over_ours(found: Measured, key: str) -> str:
    return times(found.ratio(key, _beside(found, key)), spread=False)


def bytes_of(sizes: list[float]) -> str:
    """The first size in a unit that suits it."""
    size = sizes[0]
    if size >= 999.5e6:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 999.5e3 else f"{size / 1e3:.0f} kB"


def _epoch(number: int) -> Cell:
    """The time of an epoch, counted from 0, to two digits so that several fit into a line."""
    return _cell("epoch", lambda epochs: duration(float(f"{epochs[number]:.2g}")), number + 1)


def _peak_ratio(found: Measured, key: str) -> str:
    measured = found.of(key, "peak") and found.of(OURS, "peak")
    return f"{peak_of(found, key) / peak_of(found, OURS):.3f}x" if measured else NOTHING


def _equal(found: Measured, key: str) -> str:
    """``bits`` for bit-equal, else the largest relative difference, or NO if it is too large."""
    gap = found.one(key, "difference")
    if gap is None:
        return NOTHING
    return "NO" if found.unequal(key) else f"{gap:.0e}" if gap else "bits"


Columns = Sequence[tuple[str, Cell]]
COLUMNS: dict[str, Columns] = {
    "steps": [
        column
        for measure, (header, _) in MEASURES.items()
        for column in ((header, _time(measure)), ("times\nours", _ratio(measure)))
    ],
    "digits": [
        ("loss\nfirst", _cell("loss", lambda losses: f"{losses[0]:.4f}")),
        ("loss\nlast", _cell("loss", lambda losses: f"{losses[-1]:.4f}")),
        ("correct\n%", _cell("accuracy", lambda right: f"{right[0]:.1f}")),
        ("itera-\ntion", _time("iteration")),
        ("times\nours", _ratio("iteration")),
    ],
    "case": [
        ("grads\nMB", _size("gradients", -1)),
        ("state\nMB", _size("state", -1)),
        ("tempo-\nraries", _size("temporaries", -1)),
        ("peak\nMB", _size("peak", -1)),
        ("times\nours", _peak_ratio),
    ],
    "midway": [
        ("frozen\ngrads, MB", _size("frozen gradients", 1, 2)),
        ("frozen\nstate", _size("frozen state", 1, 2)),
        ("all\nstate", _size("state", 1, 2)),
        ("peak\nMB", _size("peak", 1, 3)),
    ],
    "rotation": [
        *((f"state\n{period + 1}", _size("state", 2 * period + 1)) for period in range(5)),
        ("frozen\ngrads", _cell("frozen gradients", lambda sizes: megabytes(max(sizes)))),
        ("peak\nMB", _cell("peak", lambda sizes: megabytes(max(sizes)))),
    ],
    "time": [
        ("iteration", _time("iteration")),
        ("times ours with\nan ordinary step", _ratio("iteration")),
    ],
    "load": [
        ("one\nthread", _time("one thread")),
        ("90th\nperc.", _cell("one thread", lambda steps: duration(summarise(steps).high))),
        ("all\nthreads", _time("all threads")),
        ("90th\nperc.", _cell("all threads", lambda steps: duration(summarise(steps).high))),
        ("all over\none", _over("one thread", ours=False)),
        ("times\nours", _over("all threads", ours=True)),
    ],
    "epochs": [
        ("first\nepoch", _time("first epoch")),
        ("later\nones", _time("epoch")),
        ("gain", _gain("epoch")),
        ("to ac-\ncuracy", _time("to accuracy")),
        ("right\n%", _cell("accuracy", lambda right: f"{right[-1]:.1f}")),
        ("loss\nlast", _cell("loss", lambda losses: f"{losses[-1]:.4f}")),
        ("stored\nMB", _size("features", -1)),
    ],
    "schedule": [
        ("head\n1", _time("first epoch")),
        *(
            (f"{name}\n{1 + number % 2}", _epoch(number - 1))
            for number, name in enumerate(("head", "half", "half", "all", "all"), start=1)
        ),
        ("total", _time("total")),
    ],
    "iterations": [
        ("iteration", _time("iteration")),
        ("gain", _gain("iteration", spread=True)),
    ],
    "rows": [
        ("grads,\nstate", _cell("held", bytes_of)),
        ("extra\nmemory", _cell("extra", bytes_of)),
        ("itera-\ntion", _iteration),
        ("times\nfrozen", _over_frozen),
        ("times\nours", _over_ours),
        ("rows\nmoved", _cell("changed", lambda rows: f"{rows[0]:,.0f}")),
    ],
}
"""By a record's kind the columns of its table."""


def table(found: Measured, family: Family) -> str:
    """One workload: its title, all contestants, and notes."""
    columns = [*COLUMNS[found.kind], ("equal", _equal)]
    rows = [
        # The legend says that options are of the cache. Their names leave room for long times.
        [family.label(key).removeprefix("cached, "), *(cell(found, key) for _, cell in columns)]
        for key in found.contestants
    ]
    notes = [f"{family.label(key)}: not run: {why}" for key, why in found.unavailable.items()]
    for key in filter(found.unequal, found.contestants):
        off = found.one(key, "difference")
        notes.append(f"{family.label(key)}: NOT stock's result: {off:.0e} of the largest value")
    if (share := share_of_pass(found)) is not None:
        what = "tensor.copy_()" if found.of(OURS, "device") else "a pass p += g, m *= -1"
        notes.append(f"{family.name} moves {100 * share.median:.0f} % of the bytes/s of {what}")
    shown = render(["", *(header for header, _ in columns)], rows)
    return "\n".join([filled(found.title + found.details), shown, *map(indented, notes)])


def share_of_pass(found: Measured, ours: str = OURS) -> Summary | None:
    """The bytes per second of our update over those of the reference pass of its device."""
    on_gpu = bool(found.of("reference/copy", "device"))
    name, measure = ("copy", "device") if on_gpu else ("read-modify-write", "warm")
    share = found.ratio(f"reference/{name}", measure, to=ours)
    if share is None:
        return None
    scale = (found.one(FACTS, "step bytes") or 0) / (found.one(f"reference/{name}", "bytes") or 1)
    return Summary(*(scale * value for value in share))


def peak_of(found: Measured, key: str) -> float:
    """The peak of a steady iteration; in rotation the largest one of all."""
    peaks = found.of(key, "peak")
    return max(peaks) if found.kind == "rotation" else peaks[-1]


_LEGEND = {
    ("rows",): (
        "frozen: the whole table is frozen and nothing is stepped: forward, and backward to the"
        " input of a head. {name}: the rows that do not train are frozen by freeze_except(...,"
        " rows=...). PEFT: trainable tokens of the package peft. masked: the whole table trains,"
        " and the gradients of frozen rows are set to zero. restored: the whole table trains, and"
        " frozen rows are copied back after each step. All train with {name}, its decay large"
        " enough to move bfloat16.",
        "grads, state: bytes of parameters' gradients and of the optimizer's state after a step."
        " extra memory: the most held above the model during an iteration, and above what frozen"
        " holds then, which is its output. iteration: on random ids, one in 64 of them live, each"
        " contestant in turns with frozen and {name}. rows moved: after 3 steps, in any bit,"
        " without the live ones.",
        "equal: the first output and the live rows after 3 steps against plain torch, where"
        " index_copy puts the live rows into a copy of the table; bits: equal in every bit, else"
        " the largest difference over the largest value. A masked head's frozen rows move, so its"
        " live ones may too.",
    ),
    ("steps", "digits"): (
        "all: the optimizer is given every parameter; filter: only the trainable ones. default:"
        " stock with no option set, which is one tensor after the other on a CPU and foreach on a"
        " GPU. iteration: zero_grad, forward, backward and step on a small batch.",
        "times ours: the median over {name}'s, so above 1 {name} is faster; then the 10th to 90th"
        " percentile of the ratios within each round. Targets and bars compare stock's fused"
        " form with {name}'s own, where it has one.",
        "equal: weights and state after 5 steps compared with stock foreach=False, on the digits"
        " the losses; bits: equal in every bit, else the largest difference over the largest"
        " value.",
    ),
    ("case", "midway", "rotation"): (
        "grads: the most bytes of gradients alive at once. state: after the iteration, and with"
        " numbers after each period. temporaries: the most that step() takes for its own duration."
        " peak: the most held above the model during an iteration, according to every event of"
        " torch's allocator.",
        "equal: weights and state after the run against those of stock foreach=False given the"
        " same gradients (on a CPU, of one in four of the decoder's parameters).",
        "one per parameter: a stock optimizer for each parameter, stepped by a hook. rebuilt: a new"
        " stock optimizer over what trains, whenever that changes; cleared: after"
        " model.zero_grad().",
        "frozen in the middle of a run: gradients and state before that and after one step; peak:"
        " in the last iteration before, and in the second one after.",
    ),
    ("epochs", "schedule", "iterations"): (
        "cached: {name} with FeatureCache, which fills its store in the first epoch (on the disk;"
        " in iterations in memory). by hand: the frozen part is run once over all samples, within"
        " the first epoch, and the rest trains on what it gave, in memory. bf16 stored, bf16"
        " prefix, compiled: the options dtype, frozen_dtype and compile_frozen of FeatureCache."
        " Spot checks are off, since they come at intervals; what is judged includes their share of"
        " the time.",
        "later ones: the median epoch after the first. gain: {name}'s median over the contestant's,"
        " of the later epochs or of iterations (then 10th and 90th percentile). to accuracy:"
        " training time, with the making of the cache, until 2 points less are right than stock's"
        " best. stored: the features of all samples.",
        "equal: losses and weights (of iterations the output) compared, {name}'s with stock's and"
        " the others' with {name}'s; bits: equal in every bit, else the largest difference over the"
        " largest value. The options of FeatureCache are not exact and are not judged by it.",
    ),
}


def legend(found: Sequence[Measured], family: Family) -> list[str]:
    """What the columns of the tables mean; nothing is said of equality if none was looked at."""
    kinds = {m.kind for m in found}
    compared = any(m.one(OURS, "difference") is not None for m in found)
    said = (text for group, texts in _LEGEND.items() if kinds & {*group} for text in texts)
    return [t.format(name=family.name) for t in said if compared or not t.startswith("equal")]


def by_model(found: Iterable[Measured]) -> Iterator[tuple[str, list[Measured]]]:
    """The records of each network, or of each set of tensors."""
    for model, records in groupby(found, key=lambda m: m.title.partition(",")[0]):
        yield model, list(records)


def unequal(found: Sequence[Measured], family: Family) -> list[str]:
    """Every contestant whose result is not the reference's, with its workload."""
    return [f"{family.label(c)} on {m.title}" for m in found for c in m.contestants if m.unequal(c)]


def summary(found: Sequence[Measured], family: Family) -> Iterator[str]:
    """What the figures say in plain words, including where there is no gain."""
    if wrong := unequal(found, family):
        yield f"WRONG RESULT (further from stock than rounding explains): {'; '.join(wrong)}."
    gaps = [gap for m in found if (gap := m.one(OURS, "difference")) is not None]
    if gaps and not wrong:
        yield (
            f"Same result: all contestants agree with stock; {family.name} to the bit on "
            f"{gaps.count(0)} of {len(gaps)} workloads."
        )
    for model, records in by_model(m for m in found if m.suite in ("speed", "digits")):
        for measure, (_, name) in MEASURES.items():
            if line := _speed_line(records, measure, family):
                yield f"{model}, {name}: {line}"
    yield from _no_gain([m for m in found if m.kind in ("steps", "digits")])


def _range(values: Sequence[float], text: Callable[[float], str]) -> str:
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low} to {high}"


def _speed_line(found: Sequence[Measured], measure: str, family: Family) -> str | None:
    mine = [time.median for m in found if (time := m.time(OURS, measure))]
    usual = [ratio.median for m in found if (ratio := m.ratio("all/default", measure))]
    best = [other for m in found if (other := m.fastest_other(measure))]
    if not mine or not usual or not best:
        return None
    names = ", ".join(dict.fromkeys(family.label(key) for key, _ in best))
    fastest = _range([ratio.median for _, ratio in best], multiple)
    return (
        f"{_range(mine, duration)}; stock's default takes {_range(usual, multiple)} times that, "
        f"the fastest other ({names}) {fastest} times."
    )


def _no_gain(found: Sequence[Measured]) -> Iterator[str]:
    for measure, (_, name) in MEASURES.items():
        even: list[str] = []
        slower: list[str] = []
        for m in found:
            best = m.fastest_other(measure)
            if best is None or best[1].median >= GAIN:
                continue
            # The least of several noisy medians may be low by luck: slower is what stays slower.
            beaten = best[1].median < 1 / GAIN and best[1].high < 1
            (slower if beaten else even).append(f"{m.title} ({multiple(best[1].median)}x)")
        if even:
            yield f"No gain over the fastest other in {name}: {'; '.join(even)}."
        if slower:
            yield f"SLOWER than the fastest other in {name}: {'; '.join(slower)}."
