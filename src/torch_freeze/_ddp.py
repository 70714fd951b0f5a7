"""What DistributedDataParallel, which decides this when it wraps a model, does with a parameter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ._build import load_extension
from ._tree import ParamEntry, Tree

_C = load_extension()


def not_reduced(tree: Tree, entries: Iterable[ParamEntry]) -> list[ParamEntry]:
    """Those whose gradient a wrapper never averages, because they were frozen when it wrapped."""
    return [e for e in _inside(_readable(tree), entries) if not _is_reduced(e)]


def waited_for(tree: Tree, entries: Iterable[ParamEntry]) -> list[ParamEntry]:
    """Those whose gradient a wrapper waits for, because it does not look for unused ones."""
    waiting = [w for w in _readable(tree) if w.static_graph or not w.find_unused_parameters]
    return [e for e in _inside(waiting, entries) if _is_reduced(e)]


def _is_reduced(entry: ParamEntry) -> bool:
    # Python cannot ask the reducer, but it keeps a hook on the gradient accumulator of every
    # parameter that it reduces.
    return bool(_C.has_accumulator_hook(entry.parameter))


def _readable(tree: Tree) -> list[Any]:
    """The wrappers that reduce in C++: all except those under torch's python_reducer."""
    return [w for w in tree.ddp if not getattr(w, "_use_python_reducer", False)]


def _inside(wrappers: list[Any], entries: Iterable[ParamEntry]) -> list[ParamEntry]:
    handled = {
        id(parameter)
        for wrapper in wrappers
        for name, parameter in wrapper.module.named_parameters(remove_duplicate=False)
        if name not in wrapper.parameters_to_ignore
    }
    return [entry for entry in entries if id(entry.parameter) in handled]
