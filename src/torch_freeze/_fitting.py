"""Which optimizer of torch_freeze takes the place of the user's, for hints in messages."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from . import optim
from .optim._base import FrozenAware, unwrapped

_OFFERED: list[type[FrozenAware]] = [getattr(optim, name) for name in optim.__all__]


def fitting(optimizers: Iterable[torch.optim.Optimizer]) -> str:
    """Names of the optimizers here that fit, such as "FrozenAwareAdamW", for the end of a sentence.

    One that skips frozen parameters already is named itself. If none fits, all are offered.
    """
    names = list(dict.fromkeys(name for o in optimizers if (name := _fits(o))))
    names = names or [ours.__name__ for ours in _OFFERED]
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def _fits(optimizer: torch.optim.Optimizer) -> str | None:
    own = type(unwrapped(optimizer))
    if issubclass(own, FrozenAware):
        return own.__name__
    # AdamW is a kind of Adam in torch, so the nearest class decides.
    for kind in own.__mro__:
        for ours in _OFFERED:
            if kind is _stock(ours):
                return ours.__name__
    return None


def _stock(ours: type[FrozenAware]) -> type:
    """The optimizer of torch's that it is made from."""
    return next(base for base in ours.__mro__ if not issubclass(base, FrozenAware))
