"""Models and optimizers edited between and within iterations; see hostile_use.py."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers import apart
from tests.helpers.hostile_use import (
    Make,
    Table,
    both_tests,
    loss_of,
    net,
    result,
    train,
)

CASES = Table(__name__)


@CASES.case("p.data = between steps")
def data_set(make: Make) -> Any:
    model = net()

    def swap(step: int) -> None:
        for p in model.parameters():
            p.data = p.data.clone() * 0.5

    return train(model, make(model.parameters()), between=swap)


@CASES.case("p.data = between backward and step")
def data_set_within(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        for p in model.parameters():
            p.data = p.data.clone()
        optimizer.step()
    return result(model, optimizer)


@CASES.case("model.double() between steps", sgd_only=True)
def to_double(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer)
    model.double()
    return train(model, optimizer, loss=lambda m, s: loss_of(m, s, torch.float64))


@CASES.case("model.double() by swap_tensors between steps", sgd_only=True)
def to_double_by_swap(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    torch.__future__.set_swap_module_params_on_conversion(True)
    train(model, optimizer)
    model.double()
    values = train(model, optimizer, loss=lambda m, s: loss_of(m, s, torch.float64))
    model.float()
    return values, train(model, optimizer)


@CASES.case("model.load_state_dict(assign=True)")
def load_assign(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer)
    model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()}, assign=True)
    train(model, optimizer)  # the model has other parameters now, which stay unchanged
    return result(model, optimizer)


@CASES.case("parameters removed from the list between steps")
def removed(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer)
    del optimizer.param_groups[0]["params"][2:5]
    model[0] = nn.Identity()
    gc.collect()
    return train(model, optimizer)


@CASES.case("parameters entered into the list by hand")
def entered(make: Make) -> Any:
    model = net()
    optimizer = make(model[:4].parameters())
    optimizer.param_groups[0]["params"].extend(model[4:].parameters())
    optimizer.param_groups[0]["params"].reverse()
    return train(model, optimizer)


@CASES.case("the list shuffled between backward and step")
def shuffled(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.param_groups[0]["params"].reverse()
        optimizer.step()
        optimizer.zero_grad()
    return result(model, optimizer)


@CASES.case("the list shuffled within backward")
def shuffled_within(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    model[4].weight.register_hook(lambda g: optimizer.param_groups[0]["params"].reverse())
    return train(model, optimizer)


@CASES.case("params that are a tuple")
def tuple_of_params(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    optimizer.param_groups[0]["params"] = tuple(model.parameters())
    for step in range(2):
        loss_of(model, step).backward()
        optimizer.step()
        for p in model.parameters():
            p.grad = None
    return result(model, optimizer)


@CASES.case("params that are a set", error="is a set; give it a list", ordinary_raises=True)
def set_of_params(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    optimizer.param_groups[0]["params"] = set(model.parameters())
    loss_of(model).backward()
    optimizer.step()


@CASES.case("a group removed between backward and step", error="4 of these are in param_groups now")
def group_removed(make: Make) -> Any:
    model = net()
    optimizer = make([{"params": model[:4].parameters()}, {"params": model[4:].parameters()}])
    loss_of(model).backward()
    del optimizer.param_groups[1]
    optimizer.step()


@CASES.case(
    "a parameter taken out of the list after it was applied", error="are in param_groups now"
)
def param_removed(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    loss_of(model).backward()
    del optimizer.param_groups[0]["params"][-2:]
    optimizer.step()


@CASES.case(
    "a parameter moved to another group after it was applied", error=r"was in param_groups\[1\]"
)
def param_moved(make: Make) -> Any:
    model = net()
    optimizer = make(
        [{"params": list(model[:4].parameters())}, {"params": model[4:].parameters(), "lr": 0.5}]
    )
    loss_of(model).backward()
    moved = optimizer.param_groups[1]["params"].pop(0)
    optimizer.param_groups[0]["params"].append(moved)
    optimizer.step()


@CASES.case("a group added between backward and step")
def group_added(make: Make) -> Any:
    model = net()
    optimizer = make(model[4:].parameters())
    for step in range(3):
        for p in model.parameters():
            p.grad = None
        loss_of(model, step).backward()
        if step == 1:
            optimizer.add_param_group({"params": list(model[:4].parameters()), "lr": 0.03})
        optimizer.step()
    return result(model, optimizer)


@CASES.case("a group added within backward")
def group_added_within(make: Make) -> Any:
    model = net()
    optimizer = make(model[4:].parameters())
    added: list[bool] = []

    def add(_: Tensor) -> None:
        if not added:
            added.append(True)
            optimizer.add_param_group({"params": list(model[:4].parameters()), "lr": 0.03})

    model[6].weight.register_hook(add)
    return train(model, optimizer)


@CASES.case("a group dict replaced between steps")
def group_replaced(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())

    def replace(step: int) -> None:
        optimizer.param_groups[0] = dict(optimizer.param_groups[0], lr=0.1 / (step + 2), mine=step)

    return train(model, optimizer, between=replace)


@CASES.case(
    "the optimizer copied by copy.copy", error="already stepped in backward by another optimizer"
)
def shallow_copy(make: Make) -> Any:
    copy.copy(make(net().parameters()))


@CASES.case("model and optimizer deepcopied together, half-way")
def deepcopied(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer)
    other_model, other = copy.deepcopy((model, optimizer))
    return train(model, optimizer), train(other_model, other, steps=5)


@CASES.case("the model pickled and loaded, whole")
def pickled_model(make: Make) -> Any:
    model = net()
    train(model, make(model.parameters()))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    again = pickle.loads(pickle.dumps(loaded))
    optimizer = make(again.parameters())
    return train(again, optimizer)


@CASES.case("the model shared with other processes")
def shared_model(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    model.share_memory()
    return train(model, optimizer)


@CASES.case("training that goes on in a forked process", forks=True)
def forked(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer)
    here = train(copy.deepcopy(model), make(net().parameters()))
    return here, apart.fork(lambda: train(model, optimizer))


(
    test_hostile_use_gives_the_ordinary_steps_bits_or_an_error,
    test_the_ordinary_step_raises_only_where_nobody_can_step,
) = both_tests(CASES)
