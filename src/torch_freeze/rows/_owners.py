"""Noticing an optimizer made before rows were frozen, which does not have the live ones."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ._table import RowFrozenParameter, live_of, use


class _Expected:
    """Live rows that no optimizer has stepped yet."""

    def __init__(self, table: nn.Parameter, live: nn.Parameter) -> None:
        self.table = weakref.ref(table)
        self.live = weakref.ref(live)
        #: Optimizers that own the table and made a step without the live rows.
        self.seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    def gone(self) -> bool:
        """Whether the rows of the table are not frozen any more, or nothing has it."""
        table, live = self.table(), self.live()
        return type(table) is not RowFrozenParameter or live is None or live_of(table) is not live


_expected: list[_Expected] = []
_hook: Any = None


def expect(table: nn.Parameter, live: nn.Parameter) -> None:
    """Look, at the next steps of any optimizer, whether one has the live rows."""
    global _hook
    _expected[:] = [one for one in _expected if not one.gone()]
    _expected.append(_Expected(table, live))
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_look)


def _look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before a step: raise at the second one that leaves out live rows which have a gradient.

    Not at the first: another optimizer may have them and step after this one.
    """
    global _hook
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for one in list(_expected):
        table, live = one.table(), one.live()
        if one.gone() or id(live) in owned:
            _expected.remove(one)
            if isinstance(table, RowFrozenParameter):
                use(table)
            continue
        assert table is not None and live is not None
        if id(table) in owned and live.requires_grad and live.grad is not None:
            if optimizer in one.seen:
                raise RuntimeError(
                    f"{type(optimizer).__name__}.step: the optimizer has a table of shape "
                    f"{list(table.shape)} but not its {len(live):,} live rows, because it was made "
                    "before freeze(..., rows=...), so they would not train. Make the optimizer "
                    'afterwards, or add them: optimizer.add_param_group({"params": '
                    "layer.live_rows.parameters()})."
                )
            one.seen.add(optimizer)
    if not _expected and _hook is not None:
        _hook.remove()
        _hook = None
