"""Beginning and ending the freezing of rows in a layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._tree import ModuleEntry, ParamEntry, Tree, is_lazy
from . import _owners
from ._live import NAME, LiveRows, ranges
from ._table import RowFrozenParameter, bind, live_of, unbind

#: Modules whose parameters have a row for each embedding or output.
LAYERS = (nn.Embedding, nn.EmbeddingBag, nn.Linear)


@dataclass(frozen=True, slots=True)
class Table:
    """A parameter of which rows are frozen, as reports show it.

    Attributes:
        name: the parameter's name.
        live_name: the name of the parameter of its live rows; None if the model no longer has it.
        rows, live: how many rows there are, and how many of them are not frozen with the table.
        trains: whether the live rows train at the moment.
        which: the numbers of the live rows, as text.
    """

    name: str
    live_name: str | None
    rows: int
    live: int
    trains: bool
    which: str


def tables(tree: Tree) -> list[Table]:
    """The model's tables with frozen rows, in registration order."""
    found = []
    for entry, table in _by_rows(tree):
        live, index = live_of(table), table._rows.index
        owned = tree.params.get(id(live))
        name = None if owned is None else owned.name
        found.append(
            Table(entry.name, name, len(table), len(index), live.requires_grad, ranges(index, 4))
        )
    return found


def live_parameters(tree: Tree) -> dict[int, RowFrozenParameter]:
    """For each parameter of live rows in the model, by `id`, the table it belongs to."""
    return {id(live_of(table)): table for _, table in _by_rows(tree)}


def _by_rows(tree: Tree) -> Iterator[tuple[ParamEntry, RowFrozenParameter]]:
    for entry in tree.params.values():
        if isinstance(entry.parameter, RowFrozenParameter):
            yield entry, entry.parameter


def check(tree: Tree, entry: ParamEntry, caller: str) -> ModuleEntry:
    """The layer of a parameter whose rows are to be frozen.

    Raises:
        ValueError: the parameter has no rows, or they cannot be frozen.
        TypeError: it is not a plain parameter.
    """
    owners = [m for m in tree.order if any(p is entry for p in m.params)]
    fitting = [m for m in owners if isinstance(m.module, LAYERS)]
    key = entry.name.rpartition(".")[2]
    if isinstance(owners[0].module, LiveRows):
        raise ValueError(
            f"{caller}: {entry.name} has the live rows of its table; name the layer itself: "
            f"{owners[0].name.rpartition('.')[0]!r}."
        )
    if not fitting or key not in ("weight", "bias"):
        kind = type(owners[0].module).__name__
        raise ValueError(
            f"{caller}: {entry.name} belongs to a {kind}; rows= is for Embedding, EmbeddingBag and "
            "Linear layers. Name only such layers with rows=, and others in a call without it."
        )
    owner, parameter = fitting[0], entry.parameter
    if is_lazy(parameter) or parameter.is_meta:
        raise ValueError(
            f"{caller}: {entry.name} has no values yet, so its rows cannot be frozen; do it after "
            "the model has been initialized."
        )
    # A parameter made of another kind of tensor has that tensor's class.
    if type(parameter) not in (nn.Parameter, RowFrozenParameter):
        raise TypeError(
            f"{caller}: {entry.name} is a {type(parameter).__name__}; rows of plain parameters can "
            "be frozen, of sharded and quantized ones not. With FSDP2, freeze rows before and "
            "leave the layer out of fully_shard."
        )
    if getattr(owner.module, "max_norm", None) is not None:
        raise ValueError(
            f"{caller}: {owner.name} has max_norm={owner.module.max_norm}, which changes every row "
            "that is looked up, frozen ones too; set max_norm to None."
        )
    own = vars(owner.module)["_modules"].get(NAME)
    if own is None:
        taken = NAME not in vars(owner.module)["_modules"] and hasattr(owner.module, NAME)
    else:
        taken = not isinstance(own, LiveRows)
    if taken:
        raise ValueError(
            f"{caller}: {owner.name} has an attribute {NAME!r} of its own, where torch_freeze "
            "would put the rows that train."
        )
    return owner


def current(entry: ParamEntry) -> Tensor | None:
    """The live rows of a parameter; None if its rows are not frozen."""
    parameter = entry.parameter
    return parameter._rows.index if isinstance(parameter, RowFrozenParameter) else None


def attach(owner: ModuleEntry, key: str, live: Tensor, *, trains: bool) -> nn.Parameter:
    """Freeze the rows of a layer's parameter except `live`; return the parameter of those."""
    module = owner.module
    table = module._parameters[key]
    assert table is not None
    rows = module._modules.get(NAME)
    if not isinstance(rows, LiveRows):
        rows = LiveRows(module, live.to(table.device), len(table))
        rows.train(module.training)
        module.add_module(NAME, rows)
    with torch.no_grad():
        parameter = nn.Parameter(table.detach()[rows.index].contiguous(), trains)
    rows.register_parameter(key, parameter)
    table.grad = None
    bind(table, rows, key)
    _owners.expect(rows, key)
    return parameter


def detach(tree: Tree, entries: Iterable[ParamEntry]) -> set[int]:
    """End it for some tables, which stay frozen; the `id`s of the live rows' parameters, now gone.

    The optimizer may go on holding those: they are frozen and have no gradient.
    """
    gone = set()
    for entry in entries:
        table = entry.parameter
        assert isinstance(table, RowFrozenParameter)
        rows, key, live = table._rows, table._key, live_of(table)
        unbind(table)
        live.requires_grad_(False)
        live.grad = None
        gone.add(id(live))
        del rows._parameters[key]
        if not rows._parameters:
            for module in tree.order:
                if module.module._modules.get(NAME) is rows:
                    del module.module._modules[NAME]
        # What was walked before has them no longer either.
        tree.params.pop(id(live), None)
        for module in tree.order:
            if module.module is rows:
                module.params = [param for param in module.params if param.parameter is not live]
    return gone
