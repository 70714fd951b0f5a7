"""Whether a contestant computes what stock computes, whatever its own gradients are.

Two runs of one network part company by rounding alone (a batch norm over two images multiplies the
last bit by thousands), and on a GPU no two runs are alike. So nobody is held against another's run:
stock is given each contestant's own gradients, and has to arrive at the same weights and momentum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from contestants import Hyper
from measure import TOLERANCES
from memory_contestants import MemoryContestant, Trainer
from models import require
from torch import Tensor, nn

EXACT = 1e-6
"""What another order of operations explains in float32."""


@dataclass(frozen=True)
class Agreement:
    """How far a contestant ends from stock on the same gradients."""

    bit_equal: bool
    gap: float
    """The largest difference over the largest value, of the weights or of the momentum."""
    tolerance: float
    """What the precision of weights and momentum leaves."""

    @property
    def holds(self) -> bool:
        """Bit-equal, or no further away than rounding explains."""
        return self.bit_equal or self.gap <= self.tolerance


def tolerance(contestant: MemoryContestant, dtype: torch.dtype) -> float:
    """The largest difference that rounding explains, relative to the model's largest value."""
    if contestant.precision == "8 bit":
        return 2**-5
    if contestant.precision == "bfloat16" or dtype == torch.bfloat16:
        return TOLERANCES[torch.bfloat16]
    return EXACT


@dataclass(frozen=True)
class _Change:
    """The frozen set changed: these parameters, by their place in the model, train from now on."""

    trains: frozenset[int]


def _largest(values: Tensor) -> float:
    found = torch.linalg.vector_norm(values, float("inf")).item() if values.numel() else 0.0
    return found if found == found else float("inf")


def _writer(
    numpy: Any, entries: list[dict[int, Any] | _Change], place: int
) -> Callable[[Tensor], None]:
    """A hook that holds no parameter: what holds its parameter, nothing would ever free."""

    def arrived(p: Tensor) -> None:
        grad, page = p.grad, entries[-1]
        if grad is not None and isinstance(page, dict):
            raw = grad.view(torch.int16) if grad.dtype == torch.bfloat16 else grad
            page[place] = numpy.array(raw.detach().cpu().numpy(), order="K", copy=True)

    return arrived


class Journal:
    """Every gradient of a run, written down where torch's allocators do not count it.

    Made before the optimizer, so that its hooks run before the optimizer's.
    """

    def __init__(self, model: nn.Module, every: int = 1) -> None:
        """Record the gradients of every ``every``-th parameter only."""
        self._numpy = require("numpy", "numpy", "the memory suite")
        self._parameters = list(model.parameters())
        self._written = range(0, len(self._parameters), every)
        self._entries: list[dict[int, Any] | _Change] = []
        for place in self._written:
            p = self._parameters[place]
            trained = p.requires_grad
            p.requires_grad_(True)  # a frozen parameter takes no hook; it keeps it when frozen
            p.register_post_accumulate_grad_hook(_writer(self._numpy, self._entries, place))
            p.requires_grad_(trained)

    def begin_iteration(self) -> None:
        """Gradients that arrive from here on belong to another iteration."""
        self._entries.append({})

    def note_change(self) -> None:
        """The frozen set has changed."""
        trains = (place for place, p in enumerate(self._parameters) if p.requires_grad)
        self._entries.append(_Change(frozenset(trains)))

    def check(
        self,
        start: Sequence[Tensor],
        owned: Iterable[Tensor],
        trainer: Trainer,
        contestant: MemoryContestant,
        hyper: Hyper,
    ) -> Agreement:
        """Let stock repeat the run, one parameter after the other, and compare.

        Args:
            start: the weights at its beginning.
            owned: the parameters that the trainer was given; others must not have moved.
            trainer: what trained.
            contestant: says what becomes of a momentum when the frozen set changes.
            hyper: what stock is to use.
        """
        mine = {id(p) for p in owned}
        equal = True
        gaps, scales = [0.0, 0.0], [0.0, 0.0]
        for place in self._written:
            p = self._parameters[place]
            shadow = nn.Parameter(start[place].detach().clone())
            stock = torch.optim.SGD(
                [shadow], hyper.lr, hyper.momentum, weight_decay=hyper.weight_decay, foreach=False
            )
            if id(p) in mine:
                self._repeat(place, shadow, stock, contestant)
            pairs = [(p.detach(), shadow.detach())]
            if p.requires_grad and id(p) in mine:
                momentum = stock.state.get(shadow, {}).get("momentum_buffer")
                found = trainer.momentum(p)
                if (momentum is None) != (found is None):
                    return Agreement(False, float("inf"), 0.0)
                if momentum is not None and found is not None:
                    pairs.append((found, momentum))
            for kind, (a, b) in enumerate(pairs):
                if a.dtype != b.dtype or not torch.equal(a, b):
                    equal = False
                    gaps[kind] = max(gaps[kind], _largest(a - b))
                scales[kind] = max(scales[kind], _largest(b))
        gap = max(g / s if s else g for g, s in zip(gaps, scales, strict=True))
        return Agreement(equal, gap, tolerance(contestant, start[0].dtype))

    def _repeat(
        self,
        place: int,
        shadow: nn.Parameter,
        stock: torch.optim.SGD,
        contestant: MemoryContestant,
    ) -> None:
        for entry in self._entries:
            if isinstance(entry, _Change):
                rests = place not in entry.trains
                if contestant.after == "rebuilds" or (contestant.after == "restarts" and rests):
                    stock.state.clear()
            elif place in entry:
                grad = torch.from_numpy(entry[place])
                if shadow.dtype == torch.bfloat16:
                    grad = grad.view(torch.bfloat16)
                shadow.grad = grad.to(shadow.device)
                stock.step()
