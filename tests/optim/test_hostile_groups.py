"""Odd hyper-parameters and groups, set where no constructor sees them; see hostile_input.py."""

from __future__ import annotations

import collections
import decimal
import enum
import fractions
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.helpers import hostile
from tests.helpers import optim_cases as cases
from tests.helpers.hostile_input import (
    Build,
    Case,
    Make,
    check,
    each,
    make_params,
    trained,
)

# --- hyper-parameters, set in the group, where the constructor cannot see them


class _Numberlike:
    """A number for `float()`."""

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
    def build(make: Make) -> torch.optim.Optimizer:
        optimizer = trained(make)
        optimizer.param_groups[0][key] = value
        return optimizer

    return build


def _hyper_cases() -> Iterator[tuple[str, Case]]:
    keys = dict.fromkeys(("momentum", "dampening"), ("SGD",)) | {"eps": ("AdamW",)}
    keys |= dict.fromkeys(("lr", "weight_decay"), ("SGD", "AdamW"))
    for key, families in keys.items():
        for name, value in HYPER_VALUES.items():
            alone = key == "eps" and name == "a meta tensor"  # stock adds one as if it were 0
            yield f"{key} is {name}", Case(_set(key, value), alone=alone, families=families)
        for name, value in OTHER_THAN_STOCK.items():
            yield f"{key} is {name}", Case(_set(key, value), alone=True, families=families)
    adamw = {"families": ("AdamW",)}
    for name, value in HYPER_VALUES.items():
        for betas in ((value, 0.9), (0.9, value)):
            words = (
                f"betas are {name} and 0.9" if betas[0] is value else f"betas are 0.9 and {name}"
            )
            # Stock divides by zero, or takes a root of a negative number.
            odd = name in ("inf", "-inf", "-1.0", "an int enum", "an int tensor")
            yield words, Case(_set("betas", betas), alone=odd, **adamw)
    for name, value in {
        "None": None,
        "one number": 0.9,
        "one": (0.9,),
        "three": (0.9, 0.99, 0.999),
        "text": "ab",
        "a tensor": torch.tensor([0.9, 0.99]),
    }.items():
        yield f"betas are {name}", Case(_set("betas", value), error="betas", **adamw)
    for name, value in {"a list": [0.5, 0.75], "ints": (0, 0)}.items():
        yield f"betas are {name}", Case(_set("betas", value), **adamw)
    for name in ("None", "1", "0", "text", "an object whose bool raises"):
        value = {"None": None, "1": 1, "0": 0, "text": "yes"}.get(name, _Raises())
        yield f"amsgrad is {name}", Case(_set("amsgrad", value), alone=True, **adamw)
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
            families = ("SGD",) if key == "nesterov" else ("SGD", "AdamW")
            yield f"{key} is {name}", Case(_set(key, value), families=families)
    for key in ("foreach", "fused", "differentiable"):
        for name in ("1", "0", "text", "a tensor of two", "an object whose bool raises"):
            yield f"{key} is {name}", Case(_set(key, flags[name]), alone=True)


# --- groups


def _groups(spoil: Callable[[torch.optim.Optimizer], Any]) -> Build:
    def build(make: Make) -> torch.optim.Optimizer:
        optimizer = trained(make)
        spoil(optimizer)
        return optimizer

    return build


def _set_params(value: Callable[[list[Any]], Any]) -> Build:
    def spoil(optimizer: torch.optim.Optimizer) -> None:
        group = optimizer.param_groups[0]
        group["params"] = value(group["params"])

    return _groups(spoil)


def _many_groups(count: int, per_group: int, **hyper: Any) -> Build:
    def build(make: Make) -> torch.optim.Optimizer:
        gen = cases.generator(0)
        params = cases.make_parameters([3] * (count * per_group), gen)
        for p in params:
            p.grad = cases.randn(3, gen)
        optimizer = make([torch.ones(1)], **hyper)
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
    defaults = {f: cases.FAMILIES[f].stock([torch.ones(1)]).defaults for f in ("SGD", "AdamW")}
    for key in dict.fromkeys(("params", *defaults["SGD"], *defaults["AdamW"])):
        families = tuple(f for f in defaults if key == "params" or key in defaults[f])
        yield (
            f"{key} is missing",
            Case(
                _groups(lambda o, key=key: o.param_groups[0].pop(key)),
                error=key,
                families=families,
            ),
        )
    edits: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
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
    yield "10,000 groups of one", Case(_many_groups(10_000, 1), families=("SGD",))
    yield (
        "10,000 groups of one, nesterov",
        Case(_many_groups(10_000, 1, nesterov=True), families=("SGD",)),
    )
    yield "10,000 groups, all empty", Case(_many_groups(10_000, 0))
    yield "one group of 10,000", Case(_many_groups(1, 10_000))
    yield "the constructor gets nothing", Case(lambda make: make([]))
    yield "the constructor gets None", Case(lambda make: make(None))
    yield "the constructor gets a tensor", Case(lambda make: make(torch.ones(2)))
    yield "the constructor gets text", Case(lambda make: make("abc"))
    yield "the constructor gets a leaf's sum", Case(lambda make: make([make_params()[0] * 2]))
    for key in ("lr", "momentum", "weight_decay", "eps", "betas"):
        families = {"momentum": ("SGD",), "eps": ("AdamW",), "betas": ("AdamW",)}.get(key)
        for value in (-1.0, "0.1", None, [0.1], torch.ones(2)):
            yield (
                f"the constructor's {key} is {value}",
                Case(
                    lambda make, key=key, value=value: make(make_params(), **{key: value}),
                    families=families or ("SGD", "AdamW"),
                ),
            )


CASES = hostile.Table(__name__, [*_hyper_cases(), *_group_cases()])


@pytest.mark.filterwarnings("ignore")
@each(CASES)
def test_hostile_input_is_an_error_or_stocks_result(case: Case, family: str, device: str) -> None:
    check(case, family, device)
