"""Hostile input: a clear error with nothing written, or stock's result; never a crash.

Every case builds an optimizer, spoils something and steps twice, in a process of its own, with an
optimizer here and with stock. Where stock steps, the same bits have to come out, or nearly the same
where the optimizer promises no more; where it raises, an error has to say so. A case that names an
`error` has to raise that, whatever stock does, and one that is `alone` has no counterpart in stock,
which crashes or gives up there.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.helpers import apart, hostile
from tests.helpers import optim_cases as cases


@dataclass(frozen=True)
class Make:
    """Makes an optimizer of a family: the one here, or stock's for-loop."""

    family: str
    ours: bool

    def __call__(self, params: Any, **hyper: Any) -> Any:
        hyper = _USUAL[self.family] | hyper
        if self.ours:
            return cases.FAMILIES[self.family].ours(params, **hyper)
        return self.stock(params, **({"foreach": False} | hyper))

    @property
    def stock(self) -> Any:
        return cases.FAMILIES[self.family].stock


_USUAL: dict[str, dict[str, Any]] = {"SGD": {"lr": 0.1, "momentum": 0.9}, "AdamW": {"lr": 0.1}}
Build = Callable[[Make], torch.optim.Optimizer]

# The optimizer whose state has a buffer.
BUFFERS = {"momentum_buffer": "SGD", "exp_avg": "AdamW", "exp_avg_sq": "AdamW"}


CLEAR = (ValueError, TypeError, RuntimeError, KeyError, AttributeError, IndexError, OverflowError)


@dataclass
class Case(hostile.Case):
    """What to build, and what has to come of stepping it."""

    build: Build
    error: str = ""  # what the message has to say
    alone: bool = False
    families: tuple[str, ...] = ("SGD", "AdamW")
    around: Callable[[], Any] = contextlib.nullcontext  # the steps


def make_params(count: int = 3, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    gen = cases.generator(5)
    params = cases.make_parameters([(4, 6)] * count, gen, dtype, hostile.DEVICE)
    for p in params:
        p.grad = cases.randn((4, 6), gen, dtype, hostile.DEVICE)
    return params


def trained(make: Callable[..., Any], params: list[Any] | None = None, **hyper: Any) -> Any:
    params = make_params() if params is None else params
    optimizer = make(params, **hyper)
    optimizer.step()
    return optimizer


def edit_state(key: str, value: Callable[[Tensor, dict[str, Any]], Any], **hyper: Any) -> Build:
    """Replaces what the state of one parameter has under a key."""

    def build(make: Make) -> torch.optim.Optimizer:
        optimizer = trained(make, **hyper)
        p = optimizer.param_groups[0]["params"][1]
        optimizer.state[p][key] = value(p, optimizer.state[p])
        return optimizer

    return build


class Value(NamedTuple):
    """A tensor: what it is, and its elements."""

    what: str
    elements: tuple[float, ...] = ()


@dataclass
class Outcome:
    error: str | None
    clear: bool
    untouched: bool  # by the step that raised
    values: list[Value]


def _values(optimizer: Any) -> list[Value]:
    """Every parameter and tensor of the state."""
    values: list[Value] = []
    try:
        lists = [group["params"] for group in optimizer.param_groups]
    except (TypeError, KeyError, AttributeError):
        return []
    params = [some[i] for some in lists if isinstance(some, list | tuple) for i in range(len(some))]
    for p in params:
        if not isinstance(p, Tensor):
            continue
        entry = optimizer.state.get(p) if isinstance(optimizer.state, dict) else None
        values += _value("parameter", p)
        for key, value in entry.items() if isinstance(entry, dict) else ():
            values += _value(key, value)
    return values


def _value(name: str, tensor: Any) -> list[Value]:
    if not isinstance(tensor, Tensor):
        return [Value(f"{name}: {type(tensor)}")]
    if tensor.is_meta or torch.nn.parameter.is_lazy(tensor) or "FakeTensor" in str(type(tensor)):
        return [Value(f"{name}: {type(tensor)} {tensor.device}")]
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        if tensor.layout is not torch.strided:
            tensor = tensor.to_dense()
        if tensor.is_nested:
            return [value for part in tensor.unbind() for value in _value(name, part)]
        size = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
        if tensor.numel() > max(size, 0) or tensor.numel() > 1 << 20:
            return [Value(f"{name}: {tensor.shape} of {size}")]
        what = f"{name}: {tensor.dtype} {tensor.shape}"
        tensor = tensor.detach()
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
        if tensor.is_floating_point():
            tensor = tensor.float() if tensor.element_size() < 4 else tensor
            tensor = tensor.nan_to_num(nan=7.0, posinf=math.inf, neginf=-math.inf).double()
        return [Value(what, tuple(tensor.flatten().tolist()))]


def outcome_of(case: Case, make: Make, device: str) -> Outcome:
    """What two steps do; in a process of its own."""
    hostile.use_device(device)
    optimizer: Any = None
    before: list[Value] = []
    try:
        optimizer = case.build(make)
        before = _values(optimizer)
        with case.around():
            optimizer.step()
        before = _values(optimizer)
        with case.around():
            optimizer.step()
    except Exception as error:
        clear = isinstance(error, CLEAR) and bool(str(error))
        untouched = optimizer is None or _values(optimizer) == before
        return Outcome(f"{type(error).__name__}: {error}", clear, untouched, [])
    return Outcome(None, True, True, _values(optimizer))


def each(table: hostile.Table[Case], on_gpu: Iterable[str] = ()) -> pytest.MarkDecorator:
    """Parametrize by case, family and device: all on the CPU, those named on a GPU too."""
    runs = []
    for device, marks, names in (("cpu", [], table), ("cuda", [pytest.mark.gpu], on_gpu)):
        for name in names:
            case = table[name]
            for family in case.families:
                run = f"{family}: {name}" + ("-cuda" if marks else "")
                runs.append(pytest.param(case, family, device, id=run, marks=marks))
    return pytest.mark.parametrize(("case", "family", "device"), runs)


def check(case: Case, family: str, device: str) -> None:
    """Run the case with an optimizer here and, where it has a counterpart there, with stock."""
    ours: Outcome = apart.run(outcome_of, case, Make(family, ours=True), device)
    assert ours.clear, f"no clear error: {ours.error}"
    assert ours.untouched, f"written to before it raised {ours.error}"
    if case.error:
        assert ours.error is not None, "stepped"
        assert re.search(case.error, ours.error), ours.error
    elif not case.alone:
        theirs: Outcome = apart.run(outcome_of, case, Make(family, ours=False), device)
        assert (ours.error is None) == (theirs.error is None), (
            f"{ours.error}; stock: {theirs.error}"
        )
        if cases.FAMILIES[family].exact_on(device):
            assert ours.values == theirs.values
            return
        assert [value.what for value in ours.values] == [value.what for value in theirs.values]
        for got, wanted in zip(ours.values, theirs.values, strict=True):
            largest = max((abs(x) for x in wanted.elements if math.isfinite(x)), default=0.0)
            near = pytest.approx(wanted.elements, rel=1e-5, abs=1e-5 * largest)
            assert got.elements == near, got.what
