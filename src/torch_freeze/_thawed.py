"""Which parameters were made trainable since the last forward pass, so can have no gradient yet."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch


class _Thawed(threading.local):
    """Of the calling thread, as the count of its autograd nodes is."""

    def __init__(self) -> None:
        self.nodes = -1
        self.ids: set[int] = set()


_thawed = _Thawed()


def note(parameters: Iterable[torch.Tensor]) -> None:
    """Remember that these were made trainable now. Nothing is kept alive or marked."""
    nodes = _nodes()
    if nodes != _thawed.nodes:
        # What was noted before the last forward pass is of no more use: the set stays small.
        _thawed.nodes, _thawed.ids = nodes, set()
    _thawed.ids.update(map(id, parameters))


def just_thawed(parameter: torch.Tensor) -> bool:
    """Whether it was made trainable after the last operation that autograd recorded."""
    return _thawed.nodes == _nodes() and id(parameter) in _thawed.ids


def _nodes() -> int:
    """How many nodes autograd has made in this thread."""
    return int(torch._C._autograd._get_sequence_nr())  # type: ignore[attr-defined,unused-ignore]
