"""Who is compared: stock SGD in every form, other packages' SGD, and FrozenAwareSGD."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

from torch_freeze import FrozenAwareSGD

Kind = Literal["ours", "default", "for-loop", "foreach", "fused", "compiled", "flashoptim", "apex"]
Scope = Literal["all", "filter"]
Groups = Sequence[Sequence[nn.Parameter]]

_STOCK_OPTIONS: dict[Kind, dict[str, Any]] = {
    "default": {},
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "compiled": {"foreach": True},
}
_PACKAGES: dict[Kind, str] = {
    "flashoptim": "pip install flashoptim",
    "apex": "needs a CUDA GPU; from source, https://github.com/NVIDIA/apex",
}
"""Other packages with an SGD, and how they are installed."""
_WITHOUT_SGD = {
    "torchao": "has Adam alone; its CPUOffloadOptimizer takes gradients only from within backward"
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
    optimizer: torch.optim.Optimizer
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

    @property
    def stock(self) -> bool:
        """Whether it is a form of torch.optim.SGD."""
        return self.kind in _STOCK_OPTIONS

    @property
    def label(self) -> str:
        """The name on the terminal."""
        if self.kind == "ours":
            return "FrozenAwareSGD"
        return f"{self.scope} {self.kind}" if self.stock else self.kind

    def build(self, groups: Groups, hyper: Hyper) -> Entry:
        """Make the optimizer over ``groups``, in this contestant's scope.

        Raises:
            RuntimeError: this optimizer cannot be run on these parameters.
        """
        kept = [[p for p in group if self.scope == "all" or p.requires_grad] for group in groups]
        param_groups = [{"params": group} for group in kept if group]
        make: Any = FrozenAwareSGD if self.kind == "ours" else torch.optim.SGD
        options = _STOCK_OPTIONS.get(self.kind, {})
        if self.kind == "apex":
            make = importlib.import_module("apex.optimizers").FusedSGD
        elif self.kind == "flashoptim":
            make = importlib.import_module("flashoptim").FlashSGD
            # All of its precision kept, so that it computes what the others do.
            options = {"quantize": False, "fused": groups[0][0].is_cuda, "master_weight_bits": None}
        optimizer: torch.optim.Optimizer = make(
            param_groups,
            lr=hyper.lr,
            momentum=hyper.momentum,
            weight_decay=hyper.weight_decay,
            **options,
        )
        stepper = CompiledStep(optimizer) if self.kind == "compiled" else optimizer
        return Entry(self, optimizer, stepper)


OURS = Contestant("all", "ours")
REFERENCE = Contestant("filter", "for-loop")
"""What every result is held against: stock, one trainable parameter after the other."""


def other_packages(device: torch.device) -> tuple[list[Kind], dict[str, str]]:
    """Which other packages' SGD can be compared on a device; and why the rest cannot, by name."""
    found: list[Kind] = []
    left_out = dict(_WITHOUT_SGD)
    for kind, how in _PACKAGES.items():
        p = nn.Parameter(torch.ones(8, device=device))
        p.grad = torch.ones_like(p)
        try:
            Contestant("all", kind).build([[p]], Hyper()).stepper.step()
        except ModuleNotFoundError:
            left_out[kind] = f"not installed ({how})"
        except Exception as error:  # whatever a package that does not fit may raise
            left_out[kind] = f"{type(error).__name__}: {error}"
        else:
            found.append(kind)
    return found, left_out


def select(*, any_frozen: bool, compiled: bool, others: Sequence[Kind] = ()) -> list[Contestant]:
    """The contestants for one workload, FrozenAwareSGD first, then stock, then other packages.

    With nothing frozen, ``filter`` keeps every parameter: the two scopes are then one and the same
    and only ``all`` is run.
    """
    kinds: list[Kind] = ["default", "foreach", "fused"]
    stock = [Contestant("all", kind) for kind in kinds]
    if any_frozen:
        stock += [Contestant("filter", kind) for kind in kinds]
    scope: Scope = "filter" if any_frozen else "all"
    if compiled:
        stock.append(Contestant(scope, "compiled"))
    return [OURS, *stock, *(Contestant(scope, kind) for kind in others)]
