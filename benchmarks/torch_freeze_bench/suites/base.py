"""What a suite is, and what it is given."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..checks import Share, usable
from ..contestants import SGD, Contestant, Family, Make, select
from ..records import Measured
from ..tables import Reached
from ..timing import Budget
from ..workloads import needs_of


@dataclass(frozen=True)
class Setting:
    """What holds for a whole run."""

    device: torch.device
    budget: Budget
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    family: Family = SGD
    packages: Mapping[str, Make] = field(default_factory=dict)
    """Other packages that are measured too."""
    models: Sequence[str] | None = None
    shares: Sequence[Share] | None = None
    """The networks and the frozen shares that were asked for."""
    quick: bool = False
    simulated: bool = False
    """Whether the GPU is simulated."""
    computes: bool = True
    """False if kernels do nothing: then neither results nor the GPU's time are looked at."""

    def select(self, *, any_frozen: bool) -> list[Contestant]:
        """The contestants for one workload."""
        return select(any_frozen, self.packages, self.family.forms)

    def usable_models(
        self, usual: Sequence[str], needs: Callable[[str], object] = needs_of
    ) -> list[str]:
        """The networks that were asked for, or those of ``usual`` that can be run."""
        return usable(self.models or usual, needs, explicit=self.models is not None)


Task = tuple[str, Callable[[], Measured]]
"""One workload: a few words for the progress bar, and what measures it."""


@dataclass
class Suite:
    """A set of measurements that is asked for by one name."""

    name: str
    tasks: list[Task]
    targets: Callable[[Sequence[Measured]], Iterable[Reached]] = lambda found: ()
    """What the project wants to reach, and what a run reached."""
    heading: str = ""
    """Above the table of its targets."""
    tables: bool = True
    """Whether each workload gets a table of its own."""
    measured: list[Measured] = field(default_factory=list)
