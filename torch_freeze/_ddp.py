"""What DistributedDataParallel does with a parameter, which it decides when it wraps the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from . import _C
from ._select import ParamEntry, Tree


def not_reduced(tree: Tree, entries: Iterable[ParamEntry]) -> list[ParamEntry]:
    """Those inside a wrapper that averages no gradient of theirs: frozen when it wrapped them."""
    inside = {key for wrapper in _readable(tree) for key in _handled(wrapper)}
    return [e for e in entries if id(e.parameter) in inside and not _is_reduced(e)]


def waited_for(tree: Tree, entries: Iterable[ParamEntry]) -> list[ParamEntry]:
    """Those whose gradient a wrapper waits for that does not look which are unused."""
    inside = {
        key
        for wrapper in _readable(tree)
        if wrapper.static_graph or not wrapper.find_unused_parameters
        for key in _handled(wrapper)
    }
    return [e for e in entries if id(e.parameter) in inside and _is_reduced(e)]


def _is_reduced(entry: ParamEntry) -> bool:
    # The reducer hangs a hook on the gradient accumulators of what it reduces, for as long as it
    # lives, and keeps no list that Python could see.
    return _C.has_accumulator_hook(entry.parameter)


def _readable(tree: Tree) -> list[Any]:
    """The wrappers that reduce in C++, which is all but those under torch's python_reducer."""
    return [w for w in tree.ddp if not getattr(w, "_use_python_reducer", False)]


def _handled(wrapper: Any) -> list[int]:
    ignored = wrapper.parameters_to_ignore
    named = wrapper.module.named_parameters(remove_duplicate=False)
    return [id(p) for name, p in named if name not in ignored]
