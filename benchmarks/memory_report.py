"""The memory suite's figures as text: tables, what was to be reached, and a summary."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence

from memory_check import EXACT, Agreement
from memory_contestants import DEFAULT, HOOKS, IN_BACKWARD, OURS, MemoryContestant
from memory_suite import (
    CaseOutcome,
    Compared,
    Figures,
    FreezeOutcome,
    MemoryOutcome,
    RotationOutcome,
    TimeOutcome,
)
from tables import NOTHING, WIDTH, indented, megabytes, ratio_text, render
from targets import Reached, status
from units import duration

SLOWER = 1.02
"""How much longer an iteration may take that steps in backward."""


def _mb(size: int | None) -> str:
    if size is None:
        return NOTHING
    if not size:
        return "0"
    return "<0.1" if size < 0.05e6 else f"{size / 1e6:.{0 if size >= 999.95e6 else 1}f}"


def _mark(agreement: Agreement) -> str:
    return "bits" if agreement.bit_equal else f"{agreement.gap:.0e}"


def _notes(outcome: Compared) -> list[str]:
    notes = [f"{label}: not run: {why}" for label, why in outcome.unavailable.items()]
    notes += [
        f"{label}: NOT EQUAL, not measured: {gap:.0e} from stock's result"
        for label, gap in outcome.unequal.items()
    ]
    return [indented(note) for note in notes]


def _table(outcome: Compared, title: str, headers: list[str], rows: list[list[str]]) -> str:
    return "\n".join([textwrap.fill(title, WIDTH), render(headers, rows), *_notes(outcome)])


def _case_table(outcome: CaseOutcome) -> str:
    with_rss = any(row.figures.rss for row in outcome.rows)
    headers = ["", "grads\nMB", "state\nMB", "tempo-\nraries", "peak\nMB", "times\nours"]
    headers += [*(["RSS\nMB"] if with_rss else []), "equal"]
    ours = next((row.figures.peak for row in outcome.rows if row.contestant == OURS), None)
    rows = []
    for row in outcome.rows:
        found = row.figures
        cells = [row.contestant.label]
        sizes = (found.gradients, found.state, found.temporaries, found.peak)
        cells += [_mb(size) for size in sizes]
        cells.append(f"{found.peak / ours:.3f}x" if ours else NOTHING)
        cells += [_mb(found.rss)] if with_rss else []
        rows.append([*cells, _mark(row.agreement)])
    title = (
        f"{outcome.title}; parameters {_mb(outcome.parameters)} MB, of which "
        f"{_mb(outcome.trained)} train, the largest {_mb(outcome.largest)}; "
        f"momentum {outcome.momentum:g}"
    )
    return _table(outcome, title, headers, rows)


def _freeze_table(outcome: FreezeOutcome) -> str:
    headers = ["MB before -> after", "frozen\ngrads", "frozen\nmomentum", "all\nstate"]
    headers += ["peak", "equal"]
    rows = []
    for row in outcome.rows:
        before, after = row.before, row.after
        pairs = (
            (before.frozen_gradients, after.frozen_gradients),
            (before.frozen_momentum, after.frozen_momentum),
            (before.state, after.state),
            (row.peak_before, row.peak_after),
        )
        cells = [f"{megabytes(a)} -> {megabytes(b)}" for a, b in pairs]
        rows.append([row.contestant.label, *cells, _mark(row.agreement)])
    return _table(outcome, outcome.title, headers, rows)


def _rotation_table(outcome: RotationOutcome) -> str:
    periods = max((len(row.state) for row in outcome.rows), default=0)
    headers = ["MB", *(f"state\n{i + 1}" for i in range(periods))]
    headers += ["frozen\ngrads", "peak", "equal"]
    rows = [
        [
            row.contestant.label,
            *(_mb(size) for size in row.state),
            _mb(max(row.stale)),
            _mb(row.peak),
            _mark(row.agreement),
        ]
        for row in outcome.rows
    ]
    return _table(outcome, outcome.title, headers, rows)


def _time_table(outcome: TimeOutcome) -> str:
    headers = ["", "iteration", "times ours with\nan ordinary step"]
    rows = [
        [label, duration(outcome.time(key).median), ratio_text(outcome.times_ordinary(key))]
        for key, label in outcome.labels.items()
    ]
    return _table(outcome, f"{outcome.title}: time", headers, rows)


def memory_table(outcome: MemoryOutcome) -> str:
    """The table that fits what was measured."""
    if isinstance(outcome, CaseOutcome):
        return _case_table(outcome)
    if isinstance(outcome, FreezeOutcome):
        return _freeze_table(outcome)
    if isinstance(outcome, RotationOutcome):
        return _rotation_table(outcome)
    return _time_table(outcome)


def memory_legend(device: str) -> str:
    """What the columns of the memory tables mean."""
    allocator = (
        "torch.cuda.max_memory_allocated()"
        if device == "cuda"
        else "every event of torch's allocator, temporaries inside operators included"
    )
    sentences = [
        "grads: the most bytes of gradients alive at once, counted at every arrival of one; state:"
        " after the iteration, and with numbers after each period.",
        "temporaries: the most that step() takes for its own duration. peak: the most held above"
        f" the model during an iteration, by {allocator}; activations, gradients, state and"
        " temporaries together. Peaks are compared to a thousandth: FrozenAwareSGD in backward"
        " keeps one element to see a second backward by.",
        "equal: weights and momentum after the run against those of stock foreach=False given"
        " the same gradients (on a CPU, of one in four of the decoder's parameters); bits: equal in"
        " every bit, else the largest difference relative to the model's largest value.",
        "one per parameter: torch's tutorial recipe, a stock SGD for each parameter, stepped by a"
        " hook. rebuilt: a new optimizer over what trains, whenever that changes; what the old one"
        " leaves in .grad stays, unless model.zero_grad() is called.",
        "frozen in the middle of a run: between two iterations, by requires_grad alone. Gradients,"
        " momentum and state before that and after one step; frozen grads, momentum: of what is"
        " frozen. peak: of the last iteration before, and of the second one after.",
    ]
    if device == "cpu":
        sentences.append(
            "RSS: the peak of a process of its own that did nothing but two iterations; interpreter"
            " and torch included."
        )
    return "\n".join(textwrap.fill(sentence, WIDTH) for sentence in sentences)


def _name(outcome: Compared) -> str:
    return outcome.title.partition(",")[0]


def _bound(outcome: CaseOutcome, figures: Figures) -> int:
    """One bucket, of at most a tenth of the gradients, and the largest gradient."""
    return min(figures.bucket, outcome.trained // 10) + outcome.largest


def _gradient_line(outcomes: list[CaseOutcome]) -> Reached:
    """What is alive in backward, in the case that comes closest to its bound."""
    what = f"{_name(outcomes[0])}: gradients in backward"
    found = [
        (row.figures.gradients, _bound(outcome, row.figures), outcome)
        for outcome in outcomes
        for row in outcome.rows
        # In case 3 most gradients are not the optimizer's to free.
        if row.contestant == IN_BACKWARD and outcome.case != "3"
    ]
    if not found:
        return Reached(what, NOTHING, "a bucket and the largest", "not measured")
    live, bound, outcome = max(found, key=lambda entry: entry[0] / entry[1])
    figure = f"{_mb(live)} of {_mb(outcome.trained)} MB, case {outcome.case}"
    return Reached(what, figure, f"<= {_mb(bound)} MB", status(live <= bound))


Peaks = list[tuple[str, list[tuple[MemoryContestant, int]]]]
"""Of each case, named, what everyone's peak is."""


def _peaks(outcomes: Sequence[MemoryOutcome]) -> Peaks:
    found: Peaks = []
    for outcome in outcomes:
        if isinstance(outcome, CaseOutcome):
            peaks = [(row.contestant, row.figures.peak) for row in outcome.rows]
            found.append((f"case {outcome.case}", peaks))
        elif isinstance(outcome, FreezeOutcome):
            found.append(("midway", [(row.contestant, row.peak_after) for row in outcome.rows]))
        elif isinstance(outcome, RotationOutcome):
            found.append(("turns", [(row.contestant, row.peak) for row in outcome.rows]))
    return found


Chosen = Callable[[MemoryContestant], bool]


def _plain_stock(contestant: MemoryContestant) -> bool:
    return contestant.key.startswith("stock/") and contestant != HOOKS


_COMPARISONS: tuple[tuple[str, Chosen, Chosen], ...] = (
    ("peak of an ordinary step vs stock's", lambda c: c == OURS, _plain_stock),
    (
        "least peak vs all others'",
        lambda c: c.ours and c.precision == "exact",
        lambda c: not c.ours and c.precision == "exact",
    ),
    ("least peak vs 8 bits of state", lambda c: c.ours, lambda c: c.precision == "8 bit"),
)


def _peak_lines(name: str, peaks: Peaks) -> Iterable[Reached]:
    """The case in which FrozenAwareSGD stands worst against the least of the others."""
    for what, ours, others in _COMPARISONS:
        found = []
        for case, of_case in peaks:
            mine = [peak for contestant, peak in of_case if ours(contestant)]
            theirs = [peak for contestant, peak in of_case if others(contestant)]
            if mine and theirs:
                best, least = min(mine), min(theirs)
                found.append((best / least, f"{_mb(best)} of {_mb(least)} MB, {case}"))
        if found:
            worst, where = max(found)
            reached = status(round(worst, 3) <= 1)
            yield Reached(f"{name}: {what}", f"{worst:.3f}x, {where}", "<= 1x", reached)
        else:
            yield Reached(f"{name}: {what}", NOTHING, "<= 1x", "not measured")


def _freeze_lines(outcome: FreezeOutcome) -> Iterable[Reached]:
    ours = [row for row in outcome.rows if row.contestant.ours]
    kept = {
        "gradients of it": [row.after.frozen_gradients for row in ours],
        'momentum of it, "drop"': [
            row.after.frozen_momentum for row in ours if row.contestant.drops
        ],
    }
    for what, left in kept.items():
        case = f"{_name(outcome)}, frozen midway: {what}"
        if left:
            yield Reached(case, f"{max(left)} B", "0 B", status(max(left) == 0))
        else:
            yield Reached(case, NOTHING, "0 B", "not measured")


def _time_line(outcome: TimeOutcome) -> Reached:
    what = f"{outcome.title.partition(':')[0]}: time in backward vs ordinary"
    target = f"<= {SLOWER:g}x"
    if IN_BACKWARD.key not in outcome.samples:
        return Reached(what, NOTHING, target, "not measured")
    found = outcome.times_ordinary(IN_BACKWARD.key)
    return Reached(what, ratio_text(found), target, status(found.median <= SLOWER))


def memory_targets(outcomes: Sequence[MemoryOutcome]) -> list[Reached]:
    """Every target of the suite with the figure of this run."""
    lines: list[Reached] = []
    for model in dict.fromkeys(outcome.model for outcome in outcomes):
        of_model = [outcome for outcome in outcomes if outcome.model == model]
        cases = [outcome for outcome in of_model if isinstance(outcome, CaseOutcome)]
        lines.append(_gradient_line(cases))
        lines += _peak_lines(_name(cases[0]), _peaks(of_model))
        for outcome in of_model:
            if isinstance(outcome, FreezeOutcome):
                lines += _freeze_lines(outcome)
            elif isinstance(outcome, TimeOutcome):
                lines.append(_time_line(outcome))
    return lines


def memory_unequal(outcomes: Sequence[MemoryOutcome]) -> list[str]:
    """Every contestant whose result is not stock's, with where that was."""
    return [f"{label} on {outcome.title}" for outcome in outcomes for label in outcome.unequal]


def memory_summary(outcomes: Sequence[MemoryOutcome]) -> list[str]:
    """What the figures say, a sentence for each model."""
    lines = []
    every = [outcome for outcome in outcomes if isinstance(outcome, CaseOutcome)]
    for model in dict.fromkeys(outcome.model for outcome in every):
        cases = [outcome for outcome in every if outcome.model == model]
        parts = []
        for outcome in cases:
            peaks = {row.contestant.key: row.figures.peak for row in outcome.rows}
            ours = [row.figures.peak for row in outcome.rows if row.contestant.ours]
            default = peaks.get(DEFAULT.key)
            if ours and default:
                least = min(ours)
                parts.append(
                    f"case {outcome.case} {_mb(least)} MB against {_mb(default)} "
                    f"({default / least:.2f}x)"
                )
        if parts:
            lines.append(
                f"{_name(cases[0])}, peak above the model, FrozenAwareSGD at its least against "
                f"stock's default: {'; '.join(parts)}."
            )
    inexact = [
        f"{row.contestant.label} on {outcome.title}"
        for outcome in outcomes
        if not isinstance(outcome, TimeOutcome)
        for row in outcome.rows
        # In bfloat16 it is not to be equal: stock rounds in between, the kernels once.
        if row.contestant.ours and row.agreement.tolerance <= EXACT and not row.agreement.bit_equal
    ]
    if inexact:
        lines.append(f"Not every bit of stock's result: {'; '.join(inexact)}.")
    return lines
