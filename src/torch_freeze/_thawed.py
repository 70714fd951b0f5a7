"""Which parameters were unfrozen since the last forward pass and so cannot have a gradient yet."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch


class _Thawed(threading.local):
    """Per thread, because autograd counts its nodes per thread."""

    def __init__(self) -> None:
        self.nodes = -1
        self.ids: set[int] = set()


_thawed = _Thawed()


def note(parameters: Iterable[torch.Tensor]) -> None:
    """Remember that these were unfrozen now, by `id`, without keeping them alive."""
    nodes = _nodes()
    if nodes != _thawed.nodes:
        # Entries from before the last forward pass are void; dropping them keeps the set small.
        _thawed.nodes, _thawed.ids = nodes, set()
    _thawed.ids.update(map(id, parameters))


def just_thawed(parameter: torch.Tensor) -> bool:
    """Whether it was unfrozen after the last operation that autograd recorded."""
    return _thawed.nodes == _nodes() and id(parameter) in _thawed.ids


def _nodes() -> int:
    """How many nodes autograd has made in this thread."""
    return int(torch._C._autograd._get_sequence_nr())  # type: ignore[attr-defined,unused-ignore]
