"""Who is compared: stock SGD in every form, and FrozenAwareSGD over all parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn

from torch_freeze import FrozenAwareSGD

Kind = Literal["ours", "default", "for-loop", "foreach", "fused", "compiled"]
Scope = Literal["all", "filter"]
Groups = Sequence[Sequence[nn.Parameter]]

_STOCK_OPTIONS: dict[Kind, dict[str, bool]] = {
    "default": {},
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "compiled": {"foreach": True},
}


@dataclass(frozen=True)
class Hyper:
    """The hyper-parameters every contestant gets."""

    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0


class Stepper(Protocol):
    """Whatever makes one update when its ``step()`` is called."""

    def step(self) -> object:
        """Make the update."""
        ...


class CompiledStep:
    """A stock optimizer whose ``step`` runs through torch.compile."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # Each optimizer is traced on its own: earlier ones count against dynamo's limit.
        torch._dynamo.reset()

        def step() -> None:
            optimizer.step()

        self.step = torch.compile(step)


@dataclass(frozen=True)
class Entry:
    """A contestant on its parameters: ``stepper.step()`` is what is timed."""

    contestant: Contestant
    optimizer: torch.optim.SGD
    stepper: Stepper


@dataclass(frozen=True)
class Contestant:
    """One way to update a partly frozen model.

    ``scope`` says which parameters the optimizer is given: all of them, or those that
    ``filter(lambda p: p.requires_grad, ...)`` leaves.
    """

    scope: Scope
    kind: Kind

    @property
    def key(self) -> str:
        """The name in the JSON file, e.g. ``"filter/fused"``."""
        return "ours" if self.kind == "ours" else f"{self.scope}/{self.kind}"

    def label(self, device: str) -> str:
        """The name on the terminal and in the plot; says what stock's default is on ``device``."""
        if self.kind == "ours":
            return "FrozenAwareSGD"
        meaning = "=foreach" if device == "cuda" else "=loop"
        return f"{self.scope} {self.kind}{meaning if self.kind == 'default' else ''}"

    def build(self, groups: Groups, hyper: Hyper) -> Entry:
        """Make the optimizer over ``groups``, in this contestant's scope.

        Raises:
            RuntimeError: this torch cannot run this form of stock SGD on these parameters.
        """
        kept = [[p for p in group if self.scope == "all" or p.requires_grad] for group in groups]
        param_groups = [{"params": group} for group in kept if group]
        optimizer: torch.optim.SGD
        if self.kind == "ours":
            optimizer = FrozenAwareSGD(
                param_groups, hyper.lr, hyper.momentum, weight_decay=hyper.weight_decay
            )
            return Entry(self, optimizer, optimizer)
        optimizer = torch.optim.SGD(
            param_groups,
            hyper.lr,
            hyper.momentum,
            weight_decay=hyper.weight_decay,
            **_STOCK_OPTIONS[self.kind],
        )
        stepper = CompiledStep(optimizer) if self.kind == "compiled" else optimizer
        return Entry(self, optimizer, stepper)


OURS = Contestant("all", "ours")
REFERENCE = Contestant("filter", "for-loop")
"""What every result is held against: stock, one trainable parameter after the other."""


def select(*, any_frozen: bool, compiled: bool) -> list[Contestant]:
    """The contestants for one workload, FrozenAwareSGD first.

    With nothing frozen, ``filter`` keeps every parameter: the two scopes are then one and the same
    and only ``all`` is run.
    """
    kinds: list[Kind] = ["default", "foreach", "fused"]
    stock = [Contestant("all", kind) for kind in kinds]
    if any_frozen:
        stock += [Contestant("filter", kind) for kind in kinds]
    if compiled:
        stock.append(Contestant("filter" if any_frozen else "all", "compiled"))
    return [OURS, *stock]
