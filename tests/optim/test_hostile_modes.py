"""Steps under torch's modes and transforms, and odd scales; see hostile_input.py."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import hostile
from tests.helpers.hostile_input import (
    Build,
    Case,
    Make,
    check,
    each,
    make_params,
    trained,
)

# --- modes


class _Sees(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


MODES: dict[str, Callable[[], Any]] = {
    "FakeTensorMode": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "a dispatch mode": _Sees,
    "a function mode": _SeesFunctions,
    "FlopCounterMode": lambda: FlopCounterMode(display=False),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "anomaly detection": torch.autograd.detect_anomaly,
    "the meta device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu"),
    "float64 by default": lambda: _default_dtype(torch.float64),
    "saved tensors' hooks": lambda: torch.autograd.graph.save_on_cpu(),
}


def _under_transform(transform: Callable[..., Any]) -> Build:
    """Steps inside a function that torch.func transforms."""

    def build(make: Make) -> torch.optim.Optimizer:
        optimizer = trained(make)
        step = optimizer.step

        def function(x: Tensor) -> Tensor:
            step()
            return (x * x).sum()

        optimizer.step = lambda: transform(function)(torch.ones(3, 2))  # type: ignore[method-assign]
        return optimizer

    return build


def _late_layout(make: Make) -> torch.optim.Optimizer:
    """A gradient that the step has to copy into the parameter's layout."""
    params = make_params()
    optimizer = trained(make, params)
    params[1].grad = torch.ones(6, 4).t()
    return optimizer


def _mode_cases() -> Iterator[tuple[str, Case]]:
    for name, around in MODES.items():
        # AdamW's own form reads its count, which has no value there.
        families = ("SGD",) if name == "FakeTensorMode" else ("SGD", "AdamW")
        how: dict[str, Any] = {"around": around, "families": families}
        yield f"under {name}", Case(trained, **how)
        yield f"under {name}, first step", Case(lambda make: make(make_params()), **how)
        yield f"under {name}, a transposed gradient", Case(_late_layout, alone=True, **how)
    for name, transform in {
        "grad": torch.func.grad,
        "vmap": torch.func.vmap,
        "functionalize": torch.func.functionalize,
        "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(f)),
    }.items():
        yield f"inside torch.func.{name}", Case(_under_transform(transform))


# --- GradScaler's attributes


def _scaler_cases() -> Iterator[tuple[str, Case]]:
    values: dict[str, Any] = {
        "0": torch.tensor(0.0),
        "nan": torch.tensor(math.nan),
        "inf": torch.tensor(math.inf),
        "negative": torch.tensor(-2.0),
        "a float": 2.0,
        "an int tensor": torch.tensor(2),
        "float64": torch.tensor(2.0, dtype=torch.float64),
        "requiring grad": torch.tensor(2.0, requires_grad=True),
        "expanded": torch.tensor(2.0).expand(1, 1),
    }
    for name, value in values.items():
        for key in ("grad_scale", "found_inf"):
            yield f"{key} is {name}", Case(_attribute(key, value), alone=True)
    for name, value in {
        "text": "two",
        "of two": torch.ones(2),
        "of none": torch.ones(0),
        "a list": [2.0],
        "meta": torch.tensor(2.0, device="meta"),
        "a class": float,
    }.items():
        for key in ("grad_scale", "found_inf"):
            yield f"{key} is {name}", Case(_attribute(key, value), error=".")


def _attribute(key: str, value: Any) -> Build:
    def build(make: Make) -> torch.optim.Optimizer:
        optimizer = trained(make)
        setattr(optimizer, key, value)
        return optimizer

    return build


CASES = hostile.Table(__name__, [*_mode_cases(), *_scaler_cases()])


@pytest.mark.filterwarnings("ignore")
@each(CASES, [name for name, _ in _scaler_cases()])
def test_hostile_input_is_an_error_or_stocks_result(case: Case, family: str, device: str) -> None:
    check(case, family, device)
