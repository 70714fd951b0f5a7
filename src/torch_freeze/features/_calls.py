"""Taking over the calls of some modules for the time of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# `nn.Module.__call__` looks here first, before it runs any hook; `nn.Module.compile` uses it.
_KEY = "_compiled_call_impl"

#: Gets the module, which of its calls in this pass it is (from 0), its arguments, and a function
#: that runs the module as usual.
Handler = Callable[[nn.Module, int, tuple[Any, ...], dict[str, Any], Callable[..., Any]], Any]


@contextmanager
def taken_over(modules: Iterable[nn.Module], handler: Handler) -> Iterator[None]:
    """Give every call of `modules` to `handler`, inside the block only."""
    before: list[tuple[nn.Module, Any]] = []
    try:
        for module in modules:
            own = module.__dict__.get(_KEY)
            before.append((module, own))
            module.__dict__[_KEY] = _counted(module, own or module._call_impl, handler)
        yield
    finally:
        for module, own in before:
            if own is None:
                del module.__dict__[_KEY]
            else:
                module.__dict__[_KEY] = own


def _counted(module: nn.Module, usual: Callable[..., Any], handler: Handler) -> Callable[..., Any]:
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return handler(module, calls - 1, args, kwargs, usual)

    return call
