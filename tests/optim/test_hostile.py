"""Hostile input: a clear error with nothing written, or stock's result; never a crash.

One table. Every case builds an optimizer, spoils something and steps twice, in a process of its
own, with FrozenAwareSGD and with stock. Where stock steps, the same bits have to come out; where it
raises, an error has to say so. A case that names an `error` has to raise that, whatever stock does,
and one that is `alone` has no counterpart in stock: it crashes or gives up there.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import decimal
import enum
import fractions
import io
import math
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import apart
from tests.helpers import optim_cases as cases
from tests.helpers.optim_cases import FrozenAwareSGD

Make = Callable[..., torch.optim.SGD]
Build = Callable[[Make], torch.optim.SGD]

# Where cases are built, each in a process of its own.
DEVICE = "cpu"

CLEAR = (ValueError, TypeError, RuntimeError, KeyError, AttributeError, IndexError, OverflowError)


@dataclass
class Case:
    build: Build
    error: str = ""  # what the message has to say
    alone: bool = False
    around: Callable[[], Any] = contextlib.nullcontext  # the steps


def _params(count: int = 3, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    gen = cases.generator(5)
    params = cases.make_parameters([(4, 6)] * count, gen, dtype, DEVICE)
    for p in params:
        p.grad = cases.randn((4, 6), gen, dtype, DEVICE)
    return params


def _trained(make: Make, params: list[Any] | None = None, **hyper: Any) -> torch.optim.SGD:
    params = _params() if params is None else params
    optimizer = make(params, **({"lr": 0.1, "momentum": 0.9} | hyper))
    optimizer.step()
    return optimizer


# --- hyper-parameters, set in the group, where the constructor cannot see them


class _Numberlike:
    """A number to whoever asks `float()`."""

    def __float__(self) -> float:
        return 0.5


class _Raises:
    def __float__(self) -> float:
        raise RuntimeError("no number today")

    def __bool__(self) -> bool:
        raise RuntimeError("no flag today")


class _FloatSubclass(float):
    pass


class _Choice(enum.IntEnum):
    ONE = 1


HYPER_VALUES: dict[str, Any] = {
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "1e-320": 1e-320,
    "-1.0": -1.0,
    "a huge int": 10**400,
    "an int enum": _Choice.ONE,
    "a float subclass": _FloatSubclass(0.25),
    "text": "0.1",
    "bytes": b"0.1",
    "None": None,
    "a list": [0.1],
    "a dict": {},
    "complex": 1j,
    "a class": float,
    "an object whose float raises": _Raises(),
    "a 0-dim tensor": torch.tensor(0.25),
    "a float64 tensor": torch.tensor(0.25, dtype=torch.float64),
    "an int tensor": torch.tensor(1),
    "a tensor of two": torch.tensor([0.1, 0.2]),
    "a tensor of none": torch.tensor([]),
    "a complex tensor": torch.tensor(1j),
    "a meta tensor": torch.tensor(0.25, device="meta"),
}
# Stock multiplies tensors in other places than numbers, or takes Python's own numbers only.
OTHER_THAN_STOCK: dict[str, Any] = {
    "1e308": 1e308,  # stock's check of overflow depends on the operator it meets
    "True": True,
    "a sparse tensor": torch.tensor([0.25]).to_sparse(),
    "a Decimal": decimal.Decimal("0.5"),
    "a Fraction": fractions.Fraction(1, 2),
    "an object with __float__": _Numberlike(),
}


def _set(key: str, value: Any) -> Build:
    def build(make: Make) -> torch.optim.SGD:
        optimizer = _trained(make)
        optimizer.param_groups[0][key] = value
        return optimizer

    return build


def _hyper_cases() -> Iterator[tuple[str, Case]]:
    for key in ("lr", "momentum", "dampening", "weight_decay"):
        for name, value in HYPER_VALUES.items():
            yield f"{key} is {name}", Case(_set(key, value))
        for name, value in OTHER_THAN_STOCK.items():
            yield f"{key} is {name}", Case(_set(key, value), alone=True)
    flags = {
        "None": None,
        "1": 1,
        "0": 0,
        "text": "yes",
        "an empty list": [],
        "nan": math.nan,
        "a tensor of True": torch.tensor(True),
        "a tensor of two": torch.tensor([True, False]),
        "an object whose bool raises": _Raises(),
    }
    for key in ("nesterov", "maximize"):
        for name, value in flags.items():
            yield f"{key} is {name}", Case(_set(key, value))
    for key in ("foreach", "fused", "differentiable"):
        for name in ("1", "0", "text", "a tensor of two", "an object whose bool raises"):
            yield f"{key} is {name}", Case(_set(key, flags[name]), alone=True)


# --- groups


def _groups(spoil: Callable[[torch.optim.SGD], Any]) -> Build:
    def build(make: Make) -> torch.optim.SGD:
        optimizer = _trained(make)
        spoil(optimizer)
        return optimizer

    return build


def _set_params(value: Callable[[list[Any]], Any]) -> Build:
    def spoil(optimizer: torch.optim.SGD) -> None:
        group = optimizer.param_groups[0]
        group["params"] = value(group["params"])

    return _groups(spoil)


def _many_groups(count: int, per_group: int, **hyper: Any) -> Build:
    def build(make: Make) -> torch.optim.SGD:
        gen = cases.generator(0)
        params = cases.make_parameters([3] * (count * per_group), gen)
        for p in params:
            p.grad = cases.randn(3, gen)
        optimizer = make([torch.ones(1)], **({"lr": 0.1, "momentum": 0.9} | hyper))
        # Not through add_param_group(), which looks through all the groups there are for each.
        for i in range(count):
            row = params[i * per_group : (i + 1) * per_group]
            group = optimizer.param_groups[0] | {"params": row, "lr": 0.1 / (i + 1)}
            optimizer.param_groups.append(group)
        return optimizer

    return build


class _ListWithOpinions(list):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[Any]:
        raise RuntimeError("not today")


def _group_cases() -> Iterator[tuple[str, Case]]:
    values: dict[str, Callable[[list[Any]], Any]] = {
        "None": lambda params: None,
        "an int": lambda params: 3,
        "text": lambda params: "weights",
        "a list in a list": lambda params: [params],
        "a list with None": lambda params: [*params, None],
        "a list with an array": lambda params: [*params, params[0].detach().numpy()],
        "a list with a Storage": lambda params: [*params, params[0].untyped_storage()],
        "a list with a class": lambda params: [torch.Tensor],
        "a list with pairs": lambda params: [("weight", p) for p in params],
        "empty": lambda params: [],
        "a tuple": tuple,
        "longer by a tensor without gradient": lambda params: [*params, torch.ones(2)],
    }
    # Stock iterates over anything.
    for name, value in values.items():
        yield f"params is {name}", Case(_set_params(value))
    yield "params is a generator", Case(_set_params(iter), error="params.*list of tensors")
    yield "params is a dict", Case(_set_params(dict.fromkeys), error="params.*list of tensors")
    yield "params is a set", Case(_set_params(set), error="params.*list of tensors")
    yield "params is a list that does not iterate", Case(_set_params(_ListWithOpinions), alone=True)
    for key in ("params", *torch.optim.SGD([torch.ones(1)]).defaults):
        yield (
            f"{key} is missing",
            Case(_groups(lambda o, key=key: o.param_groups[0].pop(key)), error=key),
        )
    edits: dict[str, Callable[[torch.optim.SGD], Any]] = {
        "a group is None": lambda o: o.param_groups.append(None),  # type: ignore[arg-type]
        "a group is empty": lambda o: o.param_groups.append({}),
        "a group is a list": lambda o: o.param_groups.append([]),  # type: ignore[arg-type]
        "a group is there twice": lambda o: o.param_groups.append(o.param_groups[0]),
        "groups are a tuple": lambda o: setattr(o, "param_groups", tuple(o.param_groups)),
        "groups are None": lambda o: setattr(o, "param_groups", None),
        "groups are none": lambda o: o.param_groups.clear(),
        "keys of no meaning": lambda o: o.param_groups[0].update({"": 1, None: 2, ("a",): 3, 4: 5}),
        "a group that holds itself": lambda o: o.param_groups[0].update(me=o.param_groups[0]),
        "an ordered dict": lambda o: o.param_groups.__setitem__(
            0, collections.OrderedDict(reversed(o.param_groups[0].items()))
        ),
        "state is None": lambda o: setattr(o, "state", None),
        "state is a plain dict": lambda o: setattr(o, "state", dict(o.state)),
        "state is an empty dict": lambda o: setattr(o, "state", {}),
        "state is read-only": lambda o: setattr(o, "state", types.MappingProxyType(dict(o.state))),
        "state has keys of all kinds": lambda o: o.state.update({0: 1, "a": {}, None: None}),
        "state has the parameters' ids": lambda o: o.state.update(
            {id(p): {"momentum_buffer": None} for p in o.param_groups[0]["params"]}
        ),
    }
    for name, edit in edits.items():
        alone = name in ("groups are a tuple", "state is a plain dict", "state is read-only")
        alone |= name in ("state is an empty dict", "a group is there twice")
        yield name, Case(_groups(edit), alone=alone)
    yield "10,000 groups of one", Case(_many_groups(10_000, 1))
    yield "10,000 groups of one, nesterov", Case(_many_groups(10_000, 1, nesterov=True))
    yield "10,000 groups, all empty", Case(_many_groups(10_000, 0))
    yield "one group of 10,000", Case(_many_groups(1, 10_000))
    yield "the constructor gets nothing", Case(lambda make: make([]))
    yield "the constructor gets None", Case(lambda make: make(None))
    yield "the constructor gets a tensor", Case(lambda make: make(torch.ones(2)))
    yield "the constructor gets text", Case(lambda make: make("abc"))
    yield "the constructor gets a leaf's sum", Case(lambda make: make([_params()[0] * 2]))
    for key in ("lr", "momentum", "weight_decay"):
        for value in (-1.0, "0.1", None, [0.1], torch.ones(2)):
            yield (
                f"the constructor's {key} is {value}",
                Case(lambda make, key=key, value=value: make(_params(), **{key: value})),
            )


# --- checkpoints


def _loads(spoil: Callable[[dict[str, Any]], Any]) -> Build:
    """Loads stock's own checkpoint after `spoil`, into an optimizer that has not stepped."""

    def build(make: Make) -> torch.optim.SGD:
        source = _trained(torch.optim.SGD, foreach=False)
        saved = copy.deepcopy(source.state_dict())
        for group in saved["param_groups"]:
            group["foreach"] = None
        changed = spoil(saved)
        optimizer = make(_params(), lr=0.5, momentum=0.9)
        optimizer.load_state_dict(saved if changed is None else changed)
        return optimizer

    return build


def _buffers(value: Callable[[Tensor], Any]) -> Build:
    def spoil(saved: dict[str, Any]) -> None:
        entry = saved["state"][1]
        entry["momentum_buffer"] = value(entry["momentum_buffer"])

    return _loads(spoil)


def _foreign(make_other: Callable[[list[Any]], torch.optim.Optimizer]) -> Build:
    def spoil(saved: dict[str, Any]) -> Any:
        other = make_other(_params())
        other.step(lambda: torch.tensor(0.0))
        return other.state_dict()

    return _loads(spoil)


def _checkpoint_cases() -> Iterator[tuple[str, Case]]:
    spoils: dict[str, Callable[[dict[str, Any]], Any]] = {
        "untouched": lambda s: None,
        "without state": lambda s: s.pop("state") and None,
        "without groups": lambda s: s.pop("param_groups") and None,
        "empty": lambda s: {},
        "None": lambda s: 0,
        "a list": lambda s: [],
        "with no groups": lambda s: s.update(param_groups=[]),
        "with a group too many": lambda s: s["param_groups"].append(s["param_groups"][0]),
        "with a group that is None": lambda s: s.update(param_groups=[None]),
        "with groups by name": lambda s: s.update(param_groups={"0": s["param_groups"][0]}),
        "with a parameter too few": lambda s: s["param_groups"][0]["params"].pop() and None,
        "with a parameter too many": lambda s: s["param_groups"][0]["params"].append(3),
        "with the same parameter thrice": lambda s: s["param_groups"][0].update(params=[0, 0, 0]),
        "with parameters by name": lambda s: s["param_groups"][0].update(params=["a", "b", "c"]),
        "with params that is None": lambda s: s["param_groups"][0].update(params=None),
        "without params": lambda s: s["param_groups"][0].pop("params") and None,
        "with state that is None": lambda s: s.update(state=None),
        "with state that is a list": lambda s: s.update(state=list(s["state"].values())),
        "with an entry that is None": lambda s: s["state"].update({1: None}),
        "with an entry that is a list": lambda s: s["state"].update({1: [1, 2]}),
        "with an entry that is a tensor": lambda s: s["state"].update({1: torch.ones(4, 6)}),
        "with an entry that is text": lambda s: s["state"].update({1: "momentum"}),
        "with an entry for nobody": lambda s: s["state"].update({99: {"momentum_buffer": None}}),
        "with entries by text": lambda s: s.update(
            state={str(k): v for k, v in s["state"].items()}
        ),
        "with an empty entry": lambda s: s["state"].update({1: {}}),
        "with other entries beside": lambda s: s["state"][1].update(
            step=torch.tensor(3.0), note="x"
        ),
        "with another entry first": lambda s: s["state"].update(
            {1: {"step": torch.tensor(3.0), **s["state"][1]}}
        ),
        "without an entry": lambda s: s["state"].pop(1) and None,
        "with entries swapped": lambda s: s["state"].update({0: s["state"][2], 2: s["state"][0]}),
        "with two entries one buffer": lambda s: s["state"][0].update(s["state"][1]),
        "of an old torch": lambda s: (
            [
                s["param_groups"][0].pop(k)
                for k in ("maximize", "foreach", "differentiable", "fused")
            ]
            and None
        ),
        "with keys of a later torch": lambda s: s["param_groups"][0].update(decoupled=True),
        "with lr that is text": lambda s: s["param_groups"][0].update(lr="fast"),
        "with lr that is None": lambda s: s["param_groups"][0].update(lr=None),
        "with momentum nan": lambda s: s["param_groups"][0].update(momentum=math.nan),
        "with momentum 0": lambda s: s["param_groups"][0].update(momentum=0),
        "that is an ordered dict": lambda s: collections.OrderedDict(s),
        "that is a model's": lambda s: torch.nn.Linear(2, 2).state_dict(),
    }
    for name, spoil in spoils.items():
        yield f"a checkpoint {name}", Case(_loads(spoil))
    buffers: dict[str, Callable[[Tensor], Any]] = {
        "None": lambda b: None,
        "a float": lambda b: 0.5,
        "text": lambda b: "abc",
        "a list": lambda b: b.tolist(),
        "a dict": lambda b: {"buffer": b},
        "an array": lambda b: b.numpy(),
        "float64": lambda b: b.double(),
        "float16": lambda b: b.half(),
        "nan": lambda b: b * math.nan,
        "inf": lambda b: b * math.inf,
        "transposed": lambda b: b.t().contiguous().t(),
        "strided": lambda b: b.repeat(1, 2)[:, ::2],
        "requiring grad": lambda b: b.clone().requires_grad_(),
        "a Parameter": torch.nn.Parameter,
    }
    for name, value in buffers.items():
        yield f"a checkpoint whose buffer is {name}", Case(_buffers(value))
    misfits: dict[str, Callable[[Tensor], Any]] = {
        "too short": lambda b: b[:2],
        "too long": lambda b: b.repeat(2, 1),
        "flat": lambda b: b.flatten(),
        "0-dim": lambda b: b[0, 0],
        "empty": lambda b: b[:0],
        "of a shape that broadcasts": lambda b: b[:1],
        "of other sizes, same count": lambda b: b.reshape(6, 4),
        "expanded": lambda b: b[:1].expand(4, 6),
    }
    for name, value in misfits.items():
        yield (
            f"a checkpoint whose buffer is {name}",
            Case(_buffers(value), error=r"momentum_buffer.*param_groups\[0\]\['params'\]\[1\]"),
        )
    for name, value in {
        "meta": lambda b: b.to("meta"),
        "sparse": lambda b: b.to_sparse(),
        "complex": lambda b: b.to(torch.complex64),
        "of integers": lambda b: b.to(torch.int64),
        "nested": lambda b: torch.nested.as_nested_tensor([b, b]),
    }.items():
        # load_state_dict() makes some of them into the parameter's kind.
        yield f"a checkpoint whose buffer is {name}", Case(_buffers(value), alone=True)
        yield (
            f"a buffer that is {name}",
            Case(
                _buffer_edit(
                    lambda p, entry, value=value: entry.update(
                        momentum_buffer=value(entry["momentum_buffer"])
                    )
                ),
                error=r"momentum_buffer.*param_groups\[0\]\['params'\]\[1\]",
            ),
        )
    others: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
        "Adam": lambda p: torch.optim.Adam(p, amsgrad=True),
        "AdamW": torch.optim.AdamW,
        "RMSprop with momentum": lambda p: torch.optim.RMSprop(p, momentum=0.9),
        "Adagrad": torch.optim.Adagrad,
        "Rprop": torch.optim.Rprop,
        "ASGD": torch.optim.ASGD,
        "LBFGS": torch.optim.LBFGS,
        "SGD without momentum": lambda p: torch.optim.SGD(p, lr=0.1),
        "fused SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    }
    for name, make_other in others.items():
        yield f"a checkpoint of {name}", Case(_foreign(make_other))


def _through_file(weights_only: bool, **hyper: Any) -> Build:
    def build(make: Make) -> torch.optim.SGD:
        source = _trained(make, **hyper)
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        optimizer = make(_params(), lr=0.5)
        optimizer.load_state_dict(torch.load(file, weights_only=weights_only))
        return optimizer

    return build


def _file_cases() -> Iterator[tuple[str, Case]]:
    for words in (True, False):
        for name, hyper in {
            "momentum": {},
            "no momentum": {"momentum": 0.0},
            "a tensor lr": {"lr": torch.tensor(0.1)},
            "nesterov": {"nesterov": True},
        }.items():
            yield f"a file, {name}, weights_only={words}", Case(_through_file(words, **hyper))


# --- memory that is shared, strided or gone


def _tensors(make_tensors: Callable[[], list[Any]], **hyper: Any) -> Build:
    def build(make: Make) -> torch.optim.SGD:
        return make(make_tensors(), **({"lr": 0.1, "momentum": 0.9} | hyper))

    return build


def _with_grad(p: Tensor, grad: Tensor | None = None) -> Tensor:
    p = p.detach().requires_grad_()
    p.grad = torch.linspace(-1, 1, p.numel()).reshape(p.shape).to(p.dtype) if grad is None else grad
    return p


def _views(*slices: slice) -> Callable[[], list[Any]]:
    def make_tensors() -> list[Any]:
        base = torch.arange(64.0)
        return [_with_grad(base[part]) for part in slices]

    return make_tensors


def _own_grad() -> list[Any]:
    p = torch.nn.Parameter(torch.ones(8))
    p.grad = p.data
    return [p]


def _others_grad() -> list[Any]:
    a, b = torch.nn.Parameter(torch.ones(8)), torch.nn.Parameter(torch.ones(8) * 2)
    a.grad, b.grad = b.data, a.data
    return [a, b]


def _one_grad_for_all() -> list[Any]:
    params = [torch.nn.Parameter(torch.full((8,), float(i))) for i in range(4)]
    grad = torch.ones(8)
    for p in params:
        p.grad = grad
    return params


def _buffer_edit(edit: Callable[[Tensor, dict[str, Any]], Any]) -> Build:
    def build(make: Make) -> torch.optim.SGD:
        optimizer = _trained(make)
        p = optimizer.param_groups[0]["params"][1]
        edit(p, optimizer.state[p])
        return optimizer

    return build


def _resize(what: Callable[[torch.optim.SGD, Tensor], Tensor], to: int) -> Build:
    def build(make: Make) -> torch.optim.SGD:
        optimizer = _trained(make)
        p = optimizer.param_groups[0]["params"][1]
        what(optimizer, p).untyped_storage().resize_(to)
        return optimizer

    return build


def _twice(make: Make) -> torch.optim.SGD:
    params = _params()
    optimizer = _trained(make, params)
    optimizer.param_groups[0]["params"] = [*params, params[0], params[2]]
    return optimizer


def _memory_cases() -> Iterator[tuple[str, Case]]:
    tables: dict[str, Callable[[], list[Any]]] = {
        "views side by side": _views(slice(0, 7), slice(7, 20), slice(20, 64)),
        "views that overlap by one": _views(slice(0, 8), slice(7, 20)),
        "views that overlap wholly": _views(slice(0, 20), slice(0, 20), slice(0, 20)),
        "a view inside a view": _views(slice(0, 64), slice(5, 6), slice(30, 40)),
        "views in falling order": _views(slice(40, 64), slice(20, 40), slice(0, 20)),
        "interleaved views": _views(slice(0, 64, 2), slice(1, 64, 2)),
        "a view of every third": _views(slice(0, 64, 3)),
        "a view of nothing": _views(slice(5, 5), slice(0, 64)),
        "its own gradient": _own_grad,
        "each other's gradient": _others_grad,
        "one gradient for all": _one_grad_for_all,
        "a transposed view of another": lambda: [
            _with_grad(base := torch.arange(16.0).reshape(4, 4)),
            _with_grad(base.t()),
        ],
        "the diagonal of another": lambda: [
            _with_grad(base := torch.arange(16.0).reshape(4, 4)),
            _with_grad(base.diagonal()),
        ],
        "memory of NumPy, twice": lambda: [
            _with_grad(torch.from_numpy(array)) for array in [torch.arange(8.0).numpy()] * 2
        ],
        "a byte buffer": lambda: [
            _with_grad(torch.frombuffer(bytearray(64), dtype=torch.float32, offset=4))
        ],
        "a misaligned byte buffer": lambda: [
            _with_grad(torch.frombuffer(bytearray(65), dtype=torch.float32, offset=1, count=16))
        ],
        "a gradient that is expanded": lambda: [
            _with_grad(torch.ones(4, 6), torch.ones(1).expand(4, 6))
        ],
        "a gradient that is transposed": lambda: [
            _with_grad(torch.ones(4, 6), torch.arange(24.0).reshape(6, 4).t())
        ],
        "a gradient that requires grad": lambda: [
            _with_grad(torch.ones(4, 6), torch.ones(4, 6, requires_grad=True))
        ],
        "a gradient that is a view of the parameter": lambda: [
            _with_grad(p := torch.arange(12.0), p.view(12))
        ],
        "0-dim": lambda: [_with_grad(torch.tensor(3.0))],
        "of 30 dimensions": lambda: [_with_grad(torch.arange(4.0).reshape([1] * 28 + [2, 2]))],
        "of sizes 0": lambda: [_with_grad(torch.ones(0, 3)), _with_grad(torch.ones(3, 0, 2))],
        "huge and empty": lambda: [_with_grad(torch.ones(0, 1 << 40))],
        "huge and expanded": lambda: [
            _with_grad(torch.ones(1).expand(1 << 40), torch.ones(1).expand(1 << 40))
        ],
    }
    for name, make_tensors in tables.items():
        # Stock, as a loop, rounds strided and expanded tensors in another order.
        strided = any(
            w in name for w in ("interleaved", "third", "transposed", "diagonal", "expanded")
        )
        yield f"tensors: {name}", Case(_tensors(make_tensors), alone=strided)
        yield (
            f"tensors: {name}, no momentum",
            Case(_tensors(make_tensors, momentum=0.0), alone=strided),
        )
    edits: dict[str, Callable[[Tensor, dict[str, Any]], Any]] = {
        "the parameter": lambda p, entry: entry.update(momentum_buffer=p.data),
        "the gradient": lambda p, entry: entry.update(momentum_buffer=p.grad),
        "the parameter object": lambda p, entry: entry.update(momentum_buffer=p),
        "an overlapping view of the parameter": lambda p, entry: entry.update(
            momentum_buffer=p.data.as_strided((4, 6), (3, 1))
        ),
        "a subclass": lambda p, entry: entry.update(
            momentum_buffer=entry["momentum_buffer"].as_subclass(_Plain)
        ),
    }
    for name, edit in edits.items():
        yield f"a buffer that is {name}", Case(_buffer_edit(edit), alone="overlapping" in name)
    yield (
        "a buffer that is an inference tensor",
        Case(
            _buffer_edit(lambda p, entry: entry.update(momentum_buffer=_inference(p))),
            error="momentum_buffer.*inference",
        ),
    )
    yield "a parameter that is an inference tensor", Case(_inference_parameter, error="inference")
    whats: dict[str, Callable[[torch.optim.SGD, Tensor], Tensor]] = {
        "parameter": lambda o, p: p.detach(),
        "gradient": lambda o, p: p.grad,  # type: ignore[dict-item, return-value]
        "buffer": lambda o, p: o.state[p]["momentum_buffer"],
    }
    for name, what in whats.items():
        for to in (0, 4, 92):
            yield (
                f"a {name} whose storage has {to} of 96 bytes",
                Case(_resize(what, to), error=r"params'\]\[1\].*storage"),
            )
    yield "a parameter that is there twice", Case(_twice)


def _inference(p: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.ones_like(p)


def _inference_parameter(make: Make) -> torch.optim.SGD:
    params: list[Any] = _params()
    with torch.inference_mode():
        params[1] = torch.nn.Parameter(torch.ones(4, 6))
        params[1].grad = torch.ones(4, 6)
    return make(params, lr=0.1, momentum=0.9)


# --- tensors of other kinds


class _Plain(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl


class _Loud(torch.Tensor):
    pass


class _Hashed(torch.nn.Parameter):
    """Hashing it runs Python, which lets go of every gradient that it can find."""

    victims: list[Tensor]

    def __hash__(self) -> int:
        for p in type(self).victims:
            p.grad = None
        return id(self)


class _Refuses(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "grad" in str(func) or "hash" in str(func):
            return super().__torch_function__(func, kinds, args, kwargs or {})
        raise RuntimeError("not through me")


def _with_hashed(make: Make) -> torch.optim.SGD:
    params = _params(4)
    _Hashed.victims = []
    params.insert(2, _Hashed(torch.ones(4, 6)))
    params[2].grad = torch.ones(4, 6)
    optimizer = _trained(make, params)
    _Hashed.victims = params
    return optimizer


def _evil_lr(what: Callable[[torch.optim.SGD], Any]) -> Build:
    """Reading the second group's lr runs `what`."""

    def build(make: Make) -> torch.optim.SGD:
        gen = cases.generator(3)
        params = cases.make_parameters([40_000] * 4, gen, device=DEVICE)
        for p in params:
            p.grad = cases.randn(40_000, gen, device=DEVICE)
        optimizer = make([{"params": params[:2]}, {"params": params[2:]}], lr=0.1, momentum=0.9)
        optimizer.step()

        class Evil:
            def __float__(self) -> float:
                what(optimizer)
                return 0.1

        optimizer.param_groups[1]["lr"] = Evil()
        return optimizer

    return build


def _kind_cases() -> Iterator[tuple[str, Case]]:
    kinds: dict[str, Callable[[], list[Any]]] = {
        "complex64": lambda: [_with_grad(torch.ones(4, dtype=torch.complex64))],
        "complex128": lambda: [_with_grad(torch.ones(4, dtype=torch.complex128))],
        "meta": lambda: [_with_grad(torch.ones(4, device="meta"), torch.ones(4, device="meta"))],
        "a sparse gradient": lambda: [_with_grad(torch.ones(4), torch.ones(4).to_sparse())],
        "a sparse parameter": lambda: [
            _with_grad(torch.eye(4).to_sparse(), torch.eye(4).to_sparse())
        ],
        "a CSR gradient": lambda: [_with_grad(torch.eye(4), torch.eye(4).to_sparse_csr())],
        "a conjugate view": lambda: [
            _with_grad(
                torch.ones(4, dtype=torch.complex64), torch.ones(4, dtype=torch.complex64).conj()
            )
        ],
        "a negative view": lambda: [
            _with_grad(torch.ones(4), torch.zeros(4, dtype=torch.complex64).conj().imag)
        ],
        "nested": lambda: [
            _with_grad(
                torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
                torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            )
        ],
        "mkldnn": lambda: [_with_grad(torch.ones(4).to_mkldnn(), torch.ones(4).to_mkldnn())],
        "an inference tensor": lambda: [_inference(torch.ones(4))],
        "a subclass": lambda: [_with_grad(torch.ones(4)).as_subclass(_Loud)],
        "a quiet subclass": lambda: [torch.nn.Parameter(torch.ones(4)).as_subclass(_Plain)],
        "an uninitialized parameter": lambda: [torch.nn.UninitializedParameter()],
        "float8": lambda: [
            _with_grad(torch.ones(4).to(torch.float8_e4m3fn), torch.ones(4).to(torch.float8_e4m3fn))
        ],
        "a gradient of nan": lambda: [_with_grad(torch.ones(9), torch.full((9,), math.nan))],
        "a gradient of inf": lambda: [_with_grad(torch.ones(9), torch.full((9,), math.inf))],
        "denormal": lambda: [_with_grad(torch.full((9,), 1e-40), torch.full((9,), -1e-41))],
        "near overflow": lambda: [_with_grad(torch.full((9,), 3e38), torch.full((9,), -3e38))],
    }
    for name, make_tensors in kinds.items():
        yield f"of a kind: {name}", Case(_tensors(make_tensors))
        yield (
            f"of a kind: {name}, with others",
            Case(_tensors(lambda make_tensors=make_tensors: [*_params(2), *make_tensors()])),
        )
    yield (
        "a subclass that refuses every operator",
        Case(_tensors(lambda: [_with_grad(torch.ones(4)).as_subclass(_Refuses)])),
    )
    yield "a parameter whose hash drops the gradients", Case(_with_hashed, alone=True)
    evil: dict[str, Callable[[torch.optim.SGD], Any]] = {
        "drops the gradients": lambda o: o.zero_grad(),
        "clears the state": lambda o: o.state.clear(),
        "clears the groups": lambda o: o.param_groups.clear(),
        "clears its own group": lambda o: o.param_groups[1].clear(),
        "clears the parameters": lambda o: [g["params"].clear() for g in o.param_groups],
        "exchanges the memory": lambda o: [
            setattr(p, "data", p.detach().clone()) for g in o.param_groups for p in g["params"]
        ],
        "steps": lambda o: o.param_groups[1].update(lr=0.1) or o.step(),
        "steps for ever": lambda o: o.step(),
        "adds a group": lambda o: o.add_param_group({"params": [torch.ones(2)]}),
    }
    for name, what in evil.items():
        yield f"an lr that, when read, {name}", Case(_evil_lr(what), alone=True)


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

    def build(make: Make) -> torch.optim.SGD:
        optimizer = _trained(make)
        step = optimizer.step

        def function(x: Tensor) -> Tensor:
            step()
            return (x * x).sum()

        optimizer.step = lambda: transform(function)(torch.ones(3, 2))  # type: ignore[method-assign]
        return optimizer

    return build


def _late_layout(make: Make) -> torch.optim.SGD:
    """A gradient to be copied into the parameter's layout, in mid-walk."""
    params = _params()
    optimizer = _trained(make, params)
    params[1].grad = torch.ones(6, 4).t()
    return optimizer


def _mode_cases() -> Iterator[tuple[str, Case]]:
    for name, around in MODES.items():
        yield f"under {name}", Case(_trained, around=around)
        yield (
            f"under {name}, first step",
            Case(lambda make: make(_params(), lr=0.1, momentum=0.9), around=around),
        )
        yield f"under {name}, a transposed gradient", Case(_late_layout, around=around, alone=True)
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
    def build(make: Make) -> torch.optim.SGD:
        optimizer = _trained(make)
        setattr(optimizer, key, value)
        return optimizer

    return build


SOURCES = (
    _hyper_cases,
    _group_cases,
    _checkpoint_cases,
    _file_cases,
    _memory_cases,
    _kind_cases,
    _mode_cases,
    _scaler_cases,
)
TABLE: dict[str, Case] = {name: case for source in SOURCES for name, case in source()}


@dataclass
class Outcome:
    error: str | None
    clear: bool
    untouched: bool  # by the step that raised
    values: list[str]


def _values(optimizer: Any) -> list[str]:
    """Every parameter, gradient and buffer, as text exact to the bit."""
    values = []
    try:
        lists = [group["params"] for group in optimizer.param_groups]
    except (TypeError, KeyError, AttributeError):
        return []
    params = [some[i] for some in lists if isinstance(some, list | tuple) for i in range(len(some))]
    for p in params:
        if not isinstance(p, Tensor):
            continue
        entry = optimizer.state.get(p) if isinstance(optimizer.state, dict) else None
        buffer = entry.get("momentum_buffer") if isinstance(entry, dict) else None
        values += [_text(p), _text(buffer)]
    return values


def _text(tensor: Any) -> str:
    if not isinstance(tensor, Tensor):
        return str(type(tensor))
    if tensor.is_meta or torch.nn.parameter.is_lazy(tensor) or "FakeTensor" in str(type(tensor)):
        return f"{type(tensor)} {tensor.device}"
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        if tensor.layout is not torch.strided:
            tensor = tensor.to_dense()
        if tensor.is_nested:
            return str([_text(part) for part in tensor.unbind()])
        size = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
        if tensor.numel() > max(size, 0) or tensor.numel() > 1 << 20:
            return f"{tensor.shape} of {size}"
        tensor = tensor.detach()
        if tensor.is_floating_point():
            tensor = tensor.float() if tensor.element_size() < 4 else tensor
            tensor = tensor.nan_to_num(nan=7.0, posinf=math.inf, neginf=-math.inf).double()
        return f"{tensor.dtype} {list(tensor.shape)} {tensor.flatten().tolist()}"


def outcome_of(case: Case, make: Make) -> Outcome:
    """What two steps do; in a process of its own."""
    optimizer: Any = None
    before: list[str] = []
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


def named_outcome(name: str, make: Make, device: str) -> Outcome:
    """In a process of its own."""
    if device != "cpu":
        globals()["DEVICE"] = device
        torch.set_default_device(device)
    return outcome_of(TABLE[name], make)


def stock(*args: Any, **kwargs: Any) -> torch.optim.SGD:
    """Stock's for-loop, whatever a checkpoint says of foreach."""
    return torch.optim.SGD(*args, **({"foreach": False} | kwargs))


def _on_gpu() -> Iterator[Any]:
    """What lies in a GPU's memory or is read from it, once each.

    The other sources are of hyper-parameters, lists, checkpoints and modes, which Python reads
    wherever the tensors lie; NumPy's memory and Python's stay on the CPU; and simulated CUDA says
    that float8 has no arithmetic when the operator runs, which may be late.
    """
    elsewhere = ("no momentum", "memory of NumPy", "byte buffer", "float8")
    for source in (_memory_cases, _kind_cases, _scaler_cases):
        for name, _ in source():
            alone = name.startswith("of a kind") and not name.endswith("with others")
            if not alone and not any(words in name for words in elsewhere):
                yield pytest.param(name, "cuda", id=f"{name}-cuda", marks=pytest.mark.gpu)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "device"), [*(pytest.param(name, "cpu", id=name) for name in TABLE), *_on_gpu()]
)
def test_hostile_input_is_an_error_or_stocks_result(name: str, device: str) -> None:
    case = TABLE[name]
    ours: Outcome = apart.run(named_outcome, name, FrozenAwareSGD, device)
    assert ours.clear, f"no clear error: {ours.error}"
    assert ours.untouched, f"written to before it raised {ours.error}"
    if case.error:
        assert ours.error is not None, "stepped"
        assert re.search(case.error, ours.error), ours.error
    elif not case.alone:
        theirs: Outcome = apart.run(named_outcome, name, stock, device)
        assert (ours.error is None) == (theirs.error is None), (
            f"{ours.error}; stock: {theirs.error}"
        )
        assert ours.values == theirs.values


def test_the_table_has_200_cases() -> None:
    assert len(TABLE) >= 200
    assert len(TABLE) == sum(1 for source in SOURCES for _ in source()), "two cases of one name"
