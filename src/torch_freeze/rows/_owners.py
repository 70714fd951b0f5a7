"""Noticing an optimizer made before rows were frozen, which does not have the live ones."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ._table import RowFrozenParameter, live_of, use

if TYPE_CHECKING:
    from ._live import LiveRows


class _Expected:
    """Live rows that no optimizer has stepped yet."""

    def __init__(self, rows: LiveRows, key: str) -> None:
        # Not the table, because torch cannot swap a tensor to which there are weak references.
        self.rows, self.key = weakref.ref(rows), key
        #: Optimizers that own the table and made a step without the live rows.
        self.seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    def table(self) -> RowFrozenParameter | None:
        """The table; None if its rows are not frozen any more, or nothing has it."""
        rows = self.rows()
        owner = None if rows is None else rows.owner()
        table = None if owner is None else owner._parameters.get(self.key)
        own = isinstance(table, RowFrozenParameter) and table._rows is rows
        return table if own else None  # type: ignore[return-value]


_expected: list[_Expected] = []
_hook: Any = None


def expect(rows: LiveRows, key: str) -> None:
    """Look, at the next steps of any optimizer, whether one has the live rows."""
    global _hook
    _expected[:] = [one for one in _expected if one.table() is not None]
    _expected.append(_Expected(rows, key))
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_look)


def _look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before a step: raise at the second one that leaves out live rows which have a gradient.

    Not at the first: another optimizer may have them and step after this one.
    """
    global _hook
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for one in list(_expected):
        table = one.table()
        live = None if table is None else live_of(table)
        if table is None or live is None or id(live) in owned:
            _expected.remove(one)
            if table is not None:
                use(table)
            continue
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
