"""Freezing some rows of a table: `rows=` of freeze, freeze_except and unfreeze.

The rows that train are a parameter of their own, `live_rows.weight` of shape (live rows, ...), in a
child module of the layer. The table itself is frozen, keeps its identity and becomes a
`RowFrozenParameter`: lookups and projections with it compute the gradient of the live rows alone.
So optimizers, clipping, DDP and schedules see an ordinary small parameter and need to know nothing.

`_table` has the parameter class and what torch's functions do with it, `_live` the child module,
`_choose` turns what a user gives as `rows=` into indices, and `_attach` begins and ends it all.
"""

from ._attach import (
    Table,
    attach,
    check,
    current,
    detach,
    live_parameters,
    tables,
)
from ._choose import Rows, Vocabulary, choose
from ._live import LiveRows, runs
from ._table import RowFrozenParameter, frozen_rows, live_of

__all__ = [
    "LiveRows",
    "RowFrozenParameter",
    "Rows",
    "Table",
    "Vocabulary",
    "attach",
    "check",
    "choose",
    "current",
    "detach",
    "frozen_rows",
    "live_of",
    "live_parameters",
    "runs",
    "tables",
]
