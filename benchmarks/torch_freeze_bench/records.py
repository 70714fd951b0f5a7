"""What was measured: tidy records, and the statistics of samples.

Times are in nanoseconds, sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy
import pandas

OURS = "ours"
"""The contestant with which all others are compared."""
FACTS = "workload"
"""Where a contestant's name would be, in records of the workload itself."""
_COLUMNS = ["suite", "workload", "contestant", "measure"]


@dataclass(frozen=True)
class Summary:
    """The median of some samples with their 10th and 90th percentile."""

    median: float
    low: float
    high: float


def summarise(samples: Sequence[float]) -> Summary:
    """Median, 10th and 90th percentile; with one sample all three are that sample."""
    low, median, high = map(float, numpy.quantile(samples, (0.1, 0.5, 0.9)))
    return Summary(median, low, high)


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
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """By contestant and measure."""
    batch: str = ""
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

    def of(self, contestant: str, measure: str) -> list[float]:
        """The samples in the order of the rounds; empty if there are none."""
        return self.samples.get(contestant, {}).get(measure, [])

    def one(self, contestant: str, measure: str) -> float | None:
        """A value that was taken once."""
        return next(iter(self.of(contestant, measure)), None)

    def compare(self, contestant: str, gap: float, tolerance: float) -> None:
        """Record how far a contestant's result is from stock's."""
        self.add(contestant, difference=gap)
        self.tolerances[contestant] = tolerance

    def fact(self, name: str) -> float:
        """A number that describes the workload itself."""
        return self.samples[FACTS][name][0]

    @property
    def contestants(self) -> list[str]:
        """Everyone who was compared, in order; reference measurements are not."""
        return [key for key in self.samples if key != FACTS and not key.startswith("reference/")]

    def time(self, contestant: str, measure: str) -> Summary | None:
        """Nanoseconds, as everything else of a measure that was taken in rounds."""
        taken = self.of(contestant, measure)
        return summarise(taken) if taken else None

    def ratio(self, contestant: str, measure: str, to: str = OURS) -> Summary | None:
        """How many times as long as another one a contestant takes."""
        taken, reference = self.of(contestant, measure), self.of(to, measure)
        return ratio(taken, reference) if taken and reference else None

    def fastest_other(self, measure: str) -> tuple[str, Summary] | None:
        """Which other contestant has the least median, and its ratio to ours."""
        others = [c for c in self.contestants if c != OURS]
        compared = [(c, times) for c in others if (times := self.ratio(c, measure)) is not None]
        return min(compared, key=lambda pair: pair[1].median, default=None)

    def unequal(self, contestant: str) -> bool:
        """Whether a result is further from stock's than rounding explains."""
        gap = self.one(contestant, "difference")
        return gap is not None and gap > self.tolerances[contestant]


def tidy(found: Sequence[Measured]) -> pandas.DataFrame:
    """One row per sample: suite, workload, contestant, measure, round and value."""
    rows = [
        (of.suite, of.key, contestant, measure, place, value)
        for of in found
        for contestant, measures in of.samples.items()
        for measure, values in measures.items()
        for place, value in enumerate(values)
    ]
    return pandas.DataFrame(rows, columns=[*_COLUMNS, "round", "value"])


def _text(value: float) -> str:
    return f"{value:.0f}" if value.is_integer() else f"{value:.7g}"


def to_csv(found: Sequence[Measured]) -> bytes:
    """The records as a file, with the values of all rounds in one field, separated by blanks."""
    text = tidy(found).assign(value=lambda frame: frame["value"].astype(float).map(_text))
    packed = text.groupby(_COLUMNS, sort=False)["value"].agg(" ".join)
    contents: str = packed.to_csv()
    return contents.encode()
