"""What a user may ask for, and the one-line errors for what cannot be done."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

HEAD = "head"
"""The frozen share that means: everything but the last layer."""
Share = float | str


class RequestError(RuntimeError):
    """What was asked for cannot be done; the message says why and what to do instead."""


class MissingPackageError(RequestError):
    """A package that is needed is not installed; the message says how to install it."""


class NotEnoughMemoryError(RequestError):
    """The device cannot hold what was asked for; the message says how much it needs."""


def require(package: str, pip_name: str, purpose: str = "this contestant") -> Any:
    """Import ``package``, or raise MissingPackageError, which says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        why = f"{purpose} needs {package}"
    except (OSError, RuntimeError) as error:  # compiled for another torch
        why = f"{purpose} needs a {package} that fits torch {torch.__version__} ({error})"
    raise MissingPackageError(f"{why}: pip install {pip_name}")


def usable(wanted: Iterable[str], needs: Callable[[str], object], *, explicit: bool) -> list[str]:
    """Those whose needs are met; the others, if not asked for by name, are skipped with a line."""
    kept = []
    for name in wanted:
        try:
            needs(name)
        except (MissingPackageError, NotEnoughMemoryError) as missing:
            if explicit:
                raise
            print(f"skipped {name}: {missing}", file=sys.stderr)
        else:
            kept.append(name)
    return kept


def names(known: Sequence[str], what: str) -> Callable[[str], list[str]]:
    """An argparse type: names of ``known``, separated by commas."""

    def parse(text: str) -> list[str]:
        found = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in found if name not in known]
        if unknown or not found:
            raise argparse.ArgumentTypeError(
                f"unknown {what} {unknown[0] if unknown else text!r}; known: {', '.join(known)}"
            )
        return found

    return parse


def shares(text: str) -> list[Share]:
    """An argparse type: percents from 0 to below 100, or ``head``."""
    found: list[Share] = []
    for name in map(str.strip, text.split(",")):
        if name != HEAD and not 0 <= _number(name, float) < 100:
            raise argparse.ArgumentTypeError(
                f"{name!r} is no share to freeze; give percents from 0 to below 100, or head"
            )
        found.append(name if name == HEAD else float(name))
    return found


def _number(text: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(text)
    except ValueError:
        return -1


def above_zero(kind: type[int] | type[float]) -> Callable[[str], Any]:
    """An argparse type: a finite number above zero."""

    def parse(text: str) -> int | float:
        value = _number(text, kind)
        if not 0 < value < float("inf"):
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted} above 0")
        return value

    return parse
