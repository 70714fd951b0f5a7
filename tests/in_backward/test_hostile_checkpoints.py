"""Checkpoints, bfloat16 momentum and the momentum of what is frozen; see hostile_use.py."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from typing import Any

import torch
from torch import nn

from tests.helpers.hostile_use import (
    Case,
    Make,
    Table,
    both_tests,
    loss_of,
    net,
    of_parameters,
    randn,
    result,
    stock_of,
    train,
)
from torch_freeze.optim._base import state_names

CASES = Table(__name__)


@CASES.case(
    "state saved between backward and step", error="between backward and step|half|Call step"
)
def saved_within(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    loss_of(model).backward()
    optimizer.state_dict()


@CASES.case("state loaded between backward and step", error=r"Call step\(\) first")
def loaded_within(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer)
    loss_of(model).backward()
    optimizer.load_state_dict(saved)
    optimizer.step()


@CASES.case("a checkpoint of stock, with weights_only=True")
def stock_checkpoint(make: Make) -> Any:
    model = net()
    stock = stock_of(make(net().parameters()), model.parameters())
    train(model, stock)
    file = io.BytesIO()
    torch.save(stock.state_dict(), file)
    file.seek(0)
    optimizer = make(model.parameters())
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    return train(model, optimizer)


NARROW = {"momentum_dtype": torch.bfloat16, "momentum_seed": 11}


@CASES.case("momentum in bfloat16")
def narrow(make: Make) -> Any:
    model = net()
    optimizer = make(
        [
            {"params": model[:4].parameters()},
            {"params": model[4:].parameters(), "momentum_seed": 3, "lr": 0.02},
        ],
        **NARROW,
    )
    return train(model, optimizer, steps=6), [
        g[state_names(optimizer).seed] for g in optimizer.param_groups
    ]


@CASES.case("momentum in bfloat16, saved, loaded with weights_only=True and resumed")
def narrow_resumed(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters(), **NARROW)
    train(model, optimizer)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = net()
    resumed = make(other.parameters(), **NARROW)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    straight, again = train(model, optimizer), train(other, resumed)
    assert straight == again
    return straight


@CASES.case("momentum in bfloat16 from a checkpoint of stock in float32")
def narrow_from_stock(make: Make) -> Any:
    model = net()
    stock = stock_of(make(net().parameters()), model.parameters())
    train(model, stock)
    optimizer = make(model.parameters(), **NARROW)
    optimizer.load_state_dict(stock.state_dict())
    values = train(model, optimizer)
    assert all(
        s[name].dtype is torch.bfloat16
        for s in optimizer.state.values()
        for name in state_names(optimizer).buffers
        if name in s
    )
    return values


@CASES.case("momentum in bfloat16 of parameters listed twice")
def narrow_twice(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters(), **NARROW)
    optimizer.param_groups[0]["params"].append(model[2].weight)
    return train(model, optimizer)


@CASES.case(
    "momentum in bfloat16 of complex parameters",
    error="momentum_dtype=BFloat16",
    ordinary_raises=True,
)
def narrow_complex(make: Make) -> Any:
    return of_parameters(make, nn.Parameter(randn(3, dtype=torch.complex64)), **NARROW)


def _policy(make: Make, **hyper: Any) -> Any:
    """Layers are frozen and thawed in turns, saved and loaded in between."""
    model = net()
    optimizer = make(model.parameters(), **hyper)
    seen = []
    for step in range(9):
        for i, p in enumerate(model.parameters()):
            p.requires_grad_((i + step // 2) % 3 != 0)
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        if step == 4:
            saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
            optimizer.close()
            optimizer = make(model.parameters(), **hyper)
            optimizer.load_state_dict(saved)
        seen.append([sorted(optimizer.state.get(p, {})) for p in model.parameters()])
    return seen, result(model, optimizer)


for _policy_name in ("reset", "drop"):
    for _words, _hyper in {
        "": {},
        " with dampening": {"dampening": 0.4},
        " with nesterov": {"nesterov": True},
        " in stock's form": {"foreach": False},
        " in bfloat16": NARROW,
        " in bfloat16 with dampening": NARROW | {"dampening": 0.4},
    }.items():
        CASES[f"frozen_momentum={_policy_name}{_words}"] = Case(
            functools.partial(_policy, frozen_momentum=_policy_name, **_hyper),
            sgd_only="dampening" in _hyper or "nesterov" in _hyper,
        )


@CASES.case(
    "an unknown frozen_momentum, set in a group",
    error="frozen_momentum of param_groups",
    ordinary_raises=True,
)
def policy_of_no_kind(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    optimizer.param_groups[0]["frozen_momentum"] = "forget"
    loss_of(model).backward()
    optimizer.step()


@CASES.case("keys of the user's own in groups and state")
def own_keys(make: Make) -> Any:
    model = net()
    optimizer = make([{"params": model.parameters(), "name": "all", "layer": 3}])

    def note(step: int) -> None:
        for p in model.parameters():
            optimizer.state[p]["seen"] = step

    values = train(model, optimizer, between=note)
    return values, optimizer.state_dict()["param_groups"]


(
    test_hostile_use_gives_the_ordinary_steps_bits_or_an_error,
    test_the_ordinary_step_raises_only_where_nobody_can_step,
) = both_tests(CASES)
