"""The child module that has a layer's live rows."""

from __future__ import annotations

import copy
import functools
import sys
import traceback
import warnings
import weakref
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ._table import RowFrozenParameter, bind, take_over, use

#: The name under which a layer has it.
NAME = "live_rows"


class LiveRows(nn.Module):
    """The rows of a layer that train while the others are frozen, as parameters of their own.

    `freeze(model, "embed", rows=...)` puts it into the layer as `embed.live_rows`. It has a
    `weight` of shape (live rows, ...), a `bias` of shape (live rows,) if the layer's is frozen by
    rows, too, and `index`, the numbers of the live rows, int64 and ascending. It is not called. It
    adds nothing to a `state_dict`, in which the table is whole.
    """

    index: Tensor

    def __init__(self, owner: nn.Module, index: Tensor, rows: int) -> None:
        super().__init__()
        _watch_registrations()
        self.register_buffer("index", index, persistent=False)
        # The same where no move, cast or to_empty() reaches it.
        self._numbers = index.cpu()
        self.last = int(index[-1])
        #: How many rows are frozen.
        self.frozen = rows - len(index)
        #: Whether the table has got another number of rows while these trained, and no use since.
        self.resized = False
        #: The first live row, if all follow one another.
        self.start = int(index[0]) if self.last - int(index[0]) + 1 == len(index) else None
        self._owner = weakref.ref(owner)

    def owner(self) -> nn.Module | None:
        """The layer; None if it is gone."""
        return self._owner()

    def extra_repr(self) -> str:
        """Which rows they are, for `print(model)`."""
        return ranges(self.index)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Add nothing, since the table has the values."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # The table was loaded before its layer's children. With assign=True it is another object.
        owner = self.owner()
        for key in self._parameters:
            table = None if owner is None else owner._parameters.get(key)
            if type(table) is nn.Parameter:
                bind(table, self, key)
                assert isinstance(table, RowFrozenParameter)
                take_over(table)
            elif isinstance(table, RowFrozenParameter):
                use(table)

    def _apply(self, *args: Any, **kwargs: Any) -> LiveRows:
        before = dict(self._parameters)
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        if not swaps:
            super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call,unused-ignore]
        # The layer's turn is next. Of a new table it would not know the live rows. (Those that have
        # no values, or had none, need load_state_dict, which finds them.)
        now = self._parameters
        if swaps or any(
            now[key] is not old and not (old.is_meta or now[key].is_meta)  # type: ignore[union-attr]
            for key, old in before.items()
            if old is not None
        ):
            self._parameters.update(before)
            raise RuntimeError(
                "a layer of which some rows are frozen cannot be moved or cast where that makes "
                "new parameters, as torch.__future__.set_swap_module_params_on_conversion(True) "
                "and set_overwrite_module_params_on_conversion(True) have it. Set them to False, "
                "or call freeze with rows= afterwards."
            )
        self.index = self._numbers.to(self.index.device)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        # Its import is slow, and where there is a DTensor it has been imported.
        sharded = sys.modules.get("torch.distributed.tensor")
        if sharded is not None and isinstance(value, sharded.DTensor):
            raise RuntimeError(
                "FSDP2 cannot shard a layer of which some rows are frozen: it would replace the "
                "table and its live rows apart from each other. Shard the other layers, or give "
                "fully_shard these parameters as ignored_params."
            )
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveRows:
        twin = memo[id(self)] = object.__new__(type(self))
        owner = self.owner()
        vars(twin).update(copy.deepcopy(_all_but_owner(self), memo))
        # The layer's copy, if the layer is being copied.
        new = None if owner is None else memo.get(id(owner))
        vars(twin)["_owner"] = self._owner if new is None else weakref.ref(new)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A pickled model is plain torch: the table has the values, and this becomes None.
        return type(None), ()


def runs(index: Tensor) -> list[list[int]]:
    """Ascending row numbers as runs [first, last] of neighbours."""
    if not len(index):
        return []
    breaks = (index.diff() != 1).nonzero().flatten()
    first = [0, *(breaks + 1).tolist()]
    last = [*breaks.tolist(), len(index) - 1]
    rows = index.tolist()
    return [[rows[a], rows[b]] for a, b in zip(first, last, strict=True)]


def ranges(index: Tensor, most: int = 6) -> str:
    """Ascending row numbers as text: "3, 7 to 9"."""
    found = runs(index)
    shown = [str(a) if a == b else f"{a} to {b}" for a, b in found[:most]]
    more = sum(b - a + 1 for a, b in found[most:])
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _all_but_owner(rows: LiveRows) -> dict[str, Any]:
    return {key: value for key, value in vars(rows).items() if key != "_owner"}


def _to_process(rows: LiveRows) -> Any:
    return _in_process, (_all_but_owner(rows),)


def _in_process(state: dict[str, Any]) -> LiveRows:
    _watch_registrations()
    rows: LiveRows = object.__new__(LiveRows)
    vars(rows).update(state, _owner=lambda: None)
    return rows


def _table_to_process(table: RowFrozenParameter) -> Any:
    _, (data, _, _) = table.__reduce_ex__(2)
    return _table_in_process, (data, table._rows, table._key)


def _table_in_process(data: Tensor, rows: LiveRows, key: str) -> nn.Parameter:
    table = nn.Parameter(data, False)
    bind(table, rows, key)
    return table


def _registered(module: nn.Module, key: str, parameter: nn.Parameter) -> None:
    """Warn if a layer's parameter with frozen rows is replaced by another one."""
    if NAME not in module._modules:  # which has no get() in a scripted module
        return
    rows = module._modules[NAME]
    if not isinstance(rows, LiveRows) or rows._parameters.get(key) is None:
        return
    callers = [frame.f_code for frame, _ in traceback.walk_stack(None)]
    # load_state_dict(assign=True) makes the new parameter the table.
    if getattr(parameter, "_rows", None) is rows or nn.Module.load_state_dict.__code__ in callers:
        return
    warnings.warn(
        f"The {key} of a layer with frozen rows ({type(module).__name__}) was replaced, so its "
        f"live rows have no effect any more. To change its values, write into it ({key}.data = "
        "...); to replace it, call torch_freeze.unfreeze on the layer first.",
        UserWarning,
        stacklevel=4,
    )


@functools.cache
def _watch_registrations() -> None:
    """Have torch call `_registered`, for all modules, once there are layers with frozen rows."""
    register_module_parameter_registration_hook(_registered)


# A model that is handed to another process (torch.multiprocessing.spawn) goes on training there.
ForkingPickler.register(LiveRows, _to_process)
ForkingPickler.register(RowFrozenParameter, _table_to_process)
