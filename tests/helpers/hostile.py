"""Tables of hostile cases, each of which runs in a process of its own.

A case is pickled as the name of its table and its own name, because most hold functions that pickle
does not take.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import torch

# Where the cases build their tensors. Only the children change it: see use_device().
DEVICE = "cpu"


class Case:
    """Something hostile to do; a Table says where to find it."""

    where: tuple[str, str]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return _find, self.where


C = TypeVar("C", bound=Case)


class Table(dict[str, C], Generic[C]):
    """The CASES of a test module by name; no two cases have the same one."""

    def __init__(self, module: str, cases: Iterable[tuple[str, C]] = ()) -> None:
        super().__init__()
        self.module = module
        self.enter(cases)

    def __setitem__(self, name: str, case: C) -> None:
        assert name not in self, f"two cases are called {name!r}"
        case.where = (self.module, name)
        super().__setitem__(name, case)

    def enter(self, cases: Iterable[tuple[str, C]]) -> None:
        for name, case in cases:
            self[name] = case


def _find(module: str, name: str) -> Any:
    return importlib.import_module(module).CASES[name]


def use_device(device: str) -> None:
    """From now on in this process, which is a child, the cases build their tensors there."""
    global DEVICE
    if device != "cpu":
        DEVICE = device
        torch.set_default_device(device)
