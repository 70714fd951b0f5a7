"""What was measured: a record for each workload, and the statistics of samples.

Times are in nanoseconds, sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy
import pandas

OURS = "ours"
"""The contestant with which all others are compared."""
FACTS = "workload"
"""Where a contestant's name would be, in records of the workload itself."""


class Summary(NamedTuple):
    """The median of some samples with their 10th and 90th percentile."""

    median: float
    low: float
    high: float


def summarise(samples: Sequence[float]) -> Summary:
    """Median, 10th and 90th percentile; with one sample all three are that sample."""
    return Summary(*map(float, numpy.quantile(samples, (0.5, 0.1, 0.9))))


def ratio(samples: Sequence[float], reference: Sequence[float]) -> Summary:
    """The ratio of the two medians, with the spread of the ratios within each round.

    The samples of one round are taken within moments of each other, so a slow moment of the whole
    machine cancels in their ratio.
    """
    pairs = summarise([a / b for a, b in zip(samples, reference, strict=True)])
    middle = summarise(samples).median / summarise(reference).median
    return Summary(middle, min(pairs.low, middle), max(pairs.high, middle))


@dataclass
class Measured:
    """One workload with everyone's samples, one for each round."""

    suite: str
    key: str
    title: str
    details: str = ""
    """What follows the title above the table."""
    kind: str = "steps"
    """Which columns its table has."""
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """By contestant and measure, in the order of the rounds."""
    tolerances: dict[str, float] = field(default_factory=dict)
    """The largest ``difference`` from stock's result that rounding explains, by contestant."""
    unavailable: dict[str, str] = field(default_factory=dict)
    """Contestants that cannot run here, and why."""

    def add(self, contestant: str, **measures: float | Sequence[float]) -> None:
        """Record one value or a sequence of them for each measure."""
        known = self.samples.setdefault(contestant, {})
        for name, values in measures.items():
            taken = values if isinstance(values, Sequence) else [values]
            known.setdefault(name.replace("_", " "), []).extend(taken)

    def compare(self, contestant: str, gap: float, tolerance: float) -> None:
        """Record how far a contestant's result is from stock's."""
        self.add(contestant, difference=gap)
        self.tolerances[contestant] = tolerance

    def leave_out(self, contestant: str, error: Exception) -> None:
        """Record why someone cannot run here; if it is our own optimizer, raise the error."""
        if contestant == OURS:
            raise error
        why = str(error).strip() or type(error).__name__
        self.unavailable[contestant] = why.partition("\n")[0]

    def of(self, contestant: str, measure: str) -> list[float]:
        """The samples; empty if there are none."""
        return self.samples.get(contestant, {}).get(measure, [])

    def one(self, contestant: str, measure: str) -> float | None:
        """A value that was taken once."""
        return next(iter(self.of(contestant, measure)), None)

    @property
    def contestants(self) -> list[str]:
        """Everyone who was compared, in order; reference measurements are not."""
        return [key for key in self.samples if key != FACTS and not key.startswith("reference/")]

    def time(self, contestant: str, measure: str) -> Summary | None:
        """The statistics of a measure that was taken in rounds."""
        taken = self.of(contestant, measure)
        return summarise(taken) if taken else None

    def ratio(self, contestant: str, measure: str, to: str = OURS) -> Summary | None:
        """How many times as long as another one a contestant takes."""
        taken, reference = self.of(contestant, measure), self.of(to, measure)
        return ratio(taken, reference) if taken and reference else None

    def ours_as(self, contestant: str) -> str:
        """The form of ours that is to be compared with a contestant: its own, if there is one."""
        same = f"{OURS}/{contestant.rpartition('/')[2]}"
        return same if same in self.samples else OURS

    def fastest_other(self, measure: str) -> tuple[str, Summary] | None:
        """Which other contestant has the least median, and its ratio to ours."""
        others = [c for c in self.contestants if not c.startswith(OURS)]
        compared = [(c, times) for c in others if (times := self.ratio(c, measure)) is not None]
        return min(compared, key=lambda pair: pair[1].median, default=None)

    def unequal(self, contestant: str) -> bool:
        """Whether a result is further from stock's than rounding explains."""
        gap = self.one(contestant, "difference")
        return gap is not None and gap > self.tolerances[contestant]


def to_csv(found: Sequence[Measured]) -> bytes:
    """The records as a file, with the values of all rounds in one field, separated by blanks."""
    rows = [
        (of.suite, of.key, contestant, measure, " ".join(f"{value:.10g}" for value in values))
        for of in found
        for contestant, measures in of.samples.items()
        for measure, values in measures.items()
    ]
    columns = ["suite", "workload", "contestant", "measure", "value"]
    contents: str = pandas.DataFrame(rows, columns=columns).to_csv(index=False)
    return contents.encode()
