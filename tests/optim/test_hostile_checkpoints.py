"""Checkpoints that are damaged, or another optimizer's, and files; see hostile_input.py."""

from __future__ import annotations

import collections
import copy
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import hostile
from tests.helpers.hostile_input import (
    BUFFERS,
    Build,
    Case,
    Make,
    check,
    each,
    edit_state,
    make_params,
    trained,
)

# --- checkpoints


def _loads(spoil: Callable[[dict[str, Any]], Any]) -> Build:
    """Loads stock's own checkpoint after `spoil`, into an optimizer that has not stepped."""

    def build(make: Make) -> torch.optim.Optimizer:
        source = trained(Make(make.family, ours=False))
        saved = copy.deepcopy(source.state_dict())
        for group in saved["param_groups"]:
            group["foreach"] = None
        changed = spoil(saved)
        optimizer = make(make_params(), lr=0.5)
        optimizer.load_state_dict(saved if changed is None else changed)
        return optimizer

    return build


def _entry(key: str, value: Callable[[Tensor], Any]) -> Build:
    def spoil(saved: dict[str, Any]) -> None:
        entry = saved["state"][1]
        entry[key] = value(entry[key])

    return _loads(spoil)


def _foreign(make_other: Callable[[list[Any]], torch.optim.Optimizer]) -> Build:
    def spoil(saved: dict[str, Any]) -> Any:
        other = make_other(make_params())
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
        "with one parameter three times": lambda s: s["param_groups"][0].update(params=[0, 0, 0]),
        "with parameters by name": lambda s: s["param_groups"][0].update(params=["a", "b", "c"]),
        "with params that is None": lambda s: s["param_groups"][0].update(params=None),
        "without params": lambda s: s["param_groups"][0].pop("params") and None,
        "with state that is None": lambda s: s.update(state=None),
        "with state that is a list": lambda s: s.update(state=list(s["state"].values())),
        "with an entry that is None": lambda s: s["state"].update({1: None}),
        "with an entry that is a list": lambda s: s["state"].update({1: [1, 2]}),
        "with an entry that is a tensor": lambda s: s["state"].update({1: torch.ones(4, 6)}),
        "with an entry that is text": lambda s: s["state"].update({1: "momentum"}),
        "with an entry for no parameter": lambda s: s["state"].update(
            {99: dict.fromkeys(s["state"][1])}
        ),
        "with entries by text": lambda s: s.update(
            state={str(k): v for k, v in s["state"].items()}
        ),
        "with an empty entry": lambda s: s["state"].update({1: {}}),
        "with other entries beside": lambda s: s["state"][1].update(
            other=torch.tensor(3.0), note="x"
        ),
        "with another entry first": lambda s: s["state"].update(
            {1: {"other": torch.tensor(3.0), **s["state"][1]}}
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
        "that is an ordered dict": lambda s: collections.OrderedDict(s),
        "that is a model's": lambda s: torch.nn.Linear(2, 2).state_dict(),
    }
    for name, spoil in spoils.items():
        yield f"a checkpoint {name}", Case(_loads(spoil))
    sgd: dict[str, Callable[[dict[str, Any]], Any]] = {
        "with momentum nan": lambda s: s["param_groups"][0].update(momentum=math.nan),
        "with momentum 0": lambda s: s["param_groups"][0].update(momentum=0),
    }
    adamw: dict[str, Callable[[dict[str, Any]], Any]] = {
        "of a torch that counted in Python": lambda s: [
            entry.update(step=int(entry["step"])) for entry in s["state"].values()
        ],
        "with betas in a list": lambda s: s["param_groups"][0].update(betas=[0.8, 0.9]),
        "without a step": lambda s: s["state"][1].pop("step") and None,
    }
    for family, only in {"SGD": sgd, "AdamW": adamw}.items():
        for name, spoil in only.items():
            yield f"a checkpoint {name}", Case(_loads(spoil), families=(family,))
    for name, hyper in {"fused": {"fused": True}, "capturable": {"capturable": True}}.items():
        yield (
            f"a checkpoint of {name} stock",
            Case(_of_stock(**hyper), alone=name == "capturable", families=("AdamW",)),
        )
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
    kinds: dict[str, Callable[[Tensor], Any]] = {
        "meta": lambda b: b.to("meta"),
        "sparse": lambda b: b.to_sparse(),
        "complex": lambda b: b.to(torch.complex64),
        "of integers": lambda b: b.to(torch.int64),
        "nested": lambda b: torch.nested.as_nested_tensor([b, b]),
    }
    for key, family in BUFFERS.items():
        only = {"families": (family,)}
        error = rf"{key}.*param_groups\[0\]\['params'\]\[1\]"
        for name, value in buffers.items():
            yield f"a checkpoint whose {key} is {name}", Case(_entry(key, value), **only)
        for name, value in misfits.items():
            yield f"a checkpoint whose {key} is {name}", Case(_entry(key, value), error, **only)
        for name, value in kinds.items():
            # load_state_dict() makes some of them into the parameter's kind.
            yield (
                f"a checkpoint whose {key} is {name}",
                Case(_entry(key, value), alone=True, **only),
            )
            changed = edit_state(key, lambda p, entry, key=key, value=value: value(entry[key]))
            yield f"a {key} that is {name}", Case(changed, error, **only)
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


def _of_stock(**hyper: Any) -> Build:
    """Loads what stock saves before a step: for the count, its place and dtype are what matters."""

    def build(make: Make) -> torch.optim.Optimizer:
        params = make_params()
        source = make.stock(params, lr=0.1, **hyper)
        for p in params:
            source.state[p] = {
                "step": torch.tensor(3.0),
                "exp_avg": torch.ones_like(p).detach(),
                "exp_avg_sq": torch.ones_like(p).detach(),
            }
        optimizer = make(make_params(), lr=0.5)
        saved = copy.deepcopy(source.state_dict())
        for group in saved["param_groups"]:
            group["fused"] = None
        optimizer.load_state_dict(saved)
        return optimizer

    return build


def _through_file(weights_only: bool, **hyper: Any) -> Build:
    def build(make: Make) -> torch.optim.Optimizer:
        source = trained(make, **hyper)
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        optimizer = make(make_params(), lr=0.5)
        optimizer.load_state_dict(torch.load(file, weights_only=weights_only))
        return optimizer

    return build


def _file_cases() -> Iterator[tuple[str, Case]]:
    for words in (True, False):
        for name, hyper in {
            "momentum": {},
            "no momentum": {"momentum": 0.0},
            "a tensor lr": {"lr": torch.tensor(0.125)},
            "nesterov": {"nesterov": True},
            "amsgrad": {"amsgrad": True},
        }.items():
            only = "AdamW" if name == "amsgrad" else "SGD"
            families = ("SGD", "AdamW") if name in ("momentum", "a tensor lr") else (only,)
            yield (
                f"a file, {name}, weights_only={words}",
                Case(_through_file(words, **hyper), families=families),
            )


CASES = hostile.Table(__name__, [*_checkpoint_cases(), *_file_cases()])


@pytest.mark.filterwarnings("ignore")
@each(CASES)
def test_hostile_input_is_an_error_or_stocks_result(case: Case, family: str, device: str) -> None:
    check(case, family, device)
