"""What a suite is, and what it is given."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..contestants import SGD, Contestant, Family, select
from ..records import Measured
from ..tables import Reached
from ..timing import Budget


@dataclass(frozen=True)
class Setting:
    """What holds for a whole run."""

    device: torch.device
    budget: Budget
    rng: random.Random
    progress: Callable[[str], object]
    """Called with a few words whenever a part of a suite begins."""
    family: Family = SGD
    compiled: bool = False
    others: Sequence[str] = ()
    """Other packages that are measured too."""
    computes: bool = True
    """False if kernels do nothing: then neither results nor the GPU's time are looked at."""

    def select(self, *, any_frozen: bool) -> list[Contestant]:
        """The contestants for one workload."""
        chosen = {"compiled": self.compiled, "others": self.others}
        return select(self.family, any_frozen=any_frozen, **chosen)  # type: ignore[arg-type]


class Report(Protocol):
    """How the records of related suites are explained: a module with these functions."""

    def table(self, found: Measured, family: Family) -> str:
        """One workload."""

    def legend(self, found: Sequence[Measured], setting: Setting) -> list[str]:
        """What the columns of the tables mean, in sentences."""

    def summary(self, found: Sequence[Measured], setting: Setting) -> list[str]:
        """What the figures say in plain words, including where there is no gain."""

    def draw(self, found: Sequence[Measured], setting: Setting) -> Any:
        """One figure that explains itself, by matplotlib; None if there is nothing to draw."""


@dataclass
class Suite:
    """A set of measurements that is asked for by one name."""

    name: str
    report: Report
    run: Callable[[Setting], Iterator[Measured]]
    parts: int
    """How often a run reports its progress."""
    seconds: float
    """Roughly how long one of these parts takes on two idle cores."""
    targets: Callable[[Sequence[Measured], Setting], Iterable[Reached]] = lambda found, setting: ()
    """What the project wants to reach, and what a run reached."""
    heading: str = ""
    """Above the table of its targets."""
    tables: bool = True
    """Whether each workload gets a table of its own."""
    measured: list[Measured] = field(default_factory=list)
    """What has been measured so far."""
