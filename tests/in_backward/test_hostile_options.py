"""Clipping, scaling, schedulers, closures and what else surrounds a step; see hostile_use.py."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import apart
from tests.helpers.hostile_use import (
    Case,
    Make,
    Table,
    bits,
    both_tests,
    is_ordinary,
    loss_of,
    net,
    of_parameters,
    randn,
    result,
    train,
)
from tests.helpers.optim_cases import FrozenAwareSGD
from torch_freeze.optim._base import state_names

CASES = Table(__name__)


@CASES.case("clip_grad_value_", error="changed between backward and step|memory location")
def clip_value(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    loss_of(model).backward()
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.1)
    optimizer.step()


@CASES.case("clip_value= on complex gradients", error="complex")
def clip_complex(make: Make) -> Any:
    clip = {} if is_ordinary(make) else {"clip_value": 0.1}
    of_parameters(make, nn.Parameter(randn(3, dtype=torch.complex64)), **clip)


@CASES.case("gradients replaced by others made where they were", error="between backward and step")
def replaced_in_place(make: Make) -> Any:
    """The allocator gives the new tensor the address of the old one."""
    model = net()
    optimizer = make(model.parameters())
    loss_of(model).backward()
    for p in model.parameters():
        if p.grad is not None:
            p.grad = None
            p.grad = torch.zeros_like(p)
    optimizer.step()


# Where only a placeholder is left, torch's error comes first: it cannot be written to.
UNWRITABLE = "|refers to a single memory location"


@CASES.case("a GradScaler that unscales", error=f"GradScaler scales{UNWRITABLE}")
def grad_scaler_unscale(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(model)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)


@CASES.case("a GradScaler that is not enabled")
def grad_scaler_off(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(optimizer)
        scaler.update()
    return result(model, optimizer)


def _schedulers() -> dict[str, Callable[[Any], Any]]:
    lr = torch.optim.lr_scheduler
    return {
        "ReduceLROnPlateau": lambda o: lr.ReduceLROnPlateau(o, factor=0.5, patience=0),
        "OneCycleLR": lambda o: lr.OneCycleLR(o, 0.3, total_steps=9),
        "CosineAnnealingWarmRestarts": lambda o: lr.CosineAnnealingWarmRestarts(o, 2),
    }


def _scheduled(make: Make, name: str, lr: Any) -> Any:
    warnings.simplefilter("ignore")
    model = net()
    optimizer = make(model.parameters(), lr=torch.tensor(0.1) if lr else 0.1)
    scheduler = _schedulers()[name](optimizer)
    arguments = (1.0,) if name == "ReduceLROnPlateau" else ()
    return train(model, optimizer, steps=6, between=lambda step: scheduler.step(*arguments))


for _name in _schedulers():
    for _tensor in (False, True):
        CASES[f"{_name}{' of a tensor lr' if _tensor else ''}"] = Case(
            functools.partial(_scheduled, name=_name, lr=_tensor)
        )


@CASES.case(
    "a tensor lr changed in place within an iteration", error=r"lr of param_groups\[0\] was changed"
)
def tensor_lr_changed(make: Make) -> Any:
    model = net()
    lr = torch.tensor(0.1)
    optimizer = make(model.parameters(), lr=lr)
    loss_of(model).backward()
    lr.mul_(0.5)
    optimizer.step()


@CASES.case("an lr that needs a gradient")
def lr_with_gradient(make: Make) -> Any:
    model = net()
    lr = torch.tensor(0.05, requires_grad=True)
    return train(model, make(model.parameters(), foreach=False, lr=lr, weight_decay=0.01))


@CASES.case(
    "parameters written to between backward and step", error="was written to between backward"
)
def written_to(make: Make) -> Any:
    """As decoupled weight decay does."""
    model = net()
    optimizer = make(model.parameters())
    loss_of(model).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.99)
    optimizer.step()


@CASES.case("no memory for momentum", error="allocate memory", ordinary_raises=True)
def no_memory(make: Make) -> Any:
    p = nn.Parameter(torch.ones(1 << 25))
    q = nn.Parameter(torch.ones(5))
    optimizer = make([p, q])
    try:
        with apart.memory_for(1, p.numel()):  # the gradient
            ((p * 2).sum() + q.sum()).backward()
            optimizer.step()
    except RuntimeError as error:
        assert bool((p == 1).all())
        assert p not in optimizer.state
        optimizer.zero_grad()
        ((p * 2).sum() + q.sum()).backward()
        optimizer.step()
        assert bool((p != 1).all())
        raise error


@CASES.case("stock's multi-tensor form with nesterov", sgd_only=True)
def foreach_nesterov(make: Make) -> Any:
    model = net()
    return train(model, make(model.parameters(), foreach=True, nesterov=True))


@CASES.case("step(closure) that zeroes first")
def closure(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    losses = []
    for step in range(3):

        def evaluate(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        losses.append(bits(optimizer.step(evaluate)))
    return losses, result(model, optimizer)


@CASES.case("step(closure) as Lightning orders it: forward, zero_grad, backward")
def lightning_closure(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    for step in range(3):

        def evaluate(step: int = step) -> Tensor:
            loss = loss_of(model, step)
            optimizer.zero_grad()
            loss.backward()
            return loss

        with torch.no_grad():
            optimizer.step(evaluate)
    return result(model, optimizer)


@CASES.case("a closure after a backward of its own", error="second|Call step")
def closure_after(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    loss_of(model).backward()

    def evaluate() -> Tensor:
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(evaluate)


@CASES.case("step hooks, and one that raises")
def step_hooks(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    heard: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: heard.append("pre"))
    optimizer.register_step_post_hook(lambda *_: heard.append("post"))

    def fail(*_: Any) -> None:
        raise RuntimeError("not today")

    handle = optimizer.register_step_pre_hook(fail)
    loss_of(model).backward()
    with contextlib.suppress(RuntimeError):
        optimizer.step()
    handle.remove()
    optimizer.step()
    return heard, train(model, optimizer)


@CASES.case("a step hook that changes the lr", error=r"lr of param_groups\[0\] was changed")
def step_hook_lr(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())

    def change(o: Any, *_: Any) -> None:
        o.param_groups[0]["lr"] = 0.5

    optimizer.register_step_pre_hook(change)
    loss_of(model).backward()
    optimizer.step()


@CASES.case("step() twice")
def step_twice(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()
    return result(model, optimizer)


@CASES.case(
    "zero_grad(set_to_none=False), where a parameter is not used every time",
    error="keeps the memory of all gradients",
)
def zero_fill(make: Make) -> Any:
    """A zero gradient still lets momentum move a parameter in the ordinary step; None does not."""
    model = net()
    optimizer = make(model.parameters(), weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad(set_to_none=False)
        loss_of(model[: 4 + 4 * (step % 2)], step).backward()
        optimizer.step()
    return result(model, optimizer)


def _give_up(make: Make, zero: Callable[[FrozenAwareSGD], Any]) -> Any:
    """After a refused iteration is given up, the next ones train as usual."""
    model = net()
    optimizer = make(model.parameters())
    if not is_ordinary(make):
        loss_of(model, 0).backward()
        with pytest.raises(RuntimeError, match="second"):
            loss_of(model, 0).backward()
        zero(optimizer)
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
        optimizer.state.clear()
        with torch.no_grad():
            for p, q in zip(model.parameters(), net().parameters(), strict=True):
                p.copy_(q)
    return train(model, optimizer)


CASES["a refused iteration given up by zero_grad()"] = Case(
    functools.partial(_give_up, zero=lambda optimizer: optimizer.zero_grad())
)


@CASES.case("momentum that does not fit, then put right")
def unfit_momentum(make: Make) -> Any:
    """After the error the iteration can be repeated or given up."""
    model = net()
    optimizer = make(model.parameters())
    weight = model[0].weight
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    key = state_names(optimizer).buffers[0]
    kept = optimizer.state[weight][key]
    optimizer.state[weight][key] = torch.ones(2)
    with contextlib.suppress(ValueError, RuntimeError):
        loss_of(model, 1).backward()
        optimizer.step()
    with pytest.raises((ValueError, RuntimeError), match=rf"{key} of param_groups\[0\]"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.state[weight][key] = kept
    return "given up"


@CASES.case(
    "momentum that is text",
    error="momentum_buffer of param_groups.* is a str",
    ordinary_raises=True,
)
def text_for_momentum(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer)
    optimizer.state[model[6].weight]["momentum_buffer"] = "none"
    loss_of(model).backward()
    optimizer.step()


@CASES.case("an lr that is text", error="lr of param_groups.* is a str", ordinary_raises=True)
def text_for_lr(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    optimizer.param_groups[0]["lr"] = "0.1"
    loss_of(model).backward()
    optimizer.step()


@CASES.case("a group without momentum", error="has no 'momentum'", ordinary_raises=True)
def no_momentum_key(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    del optimizer.param_groups[0]["momentum"]
    loss_of(model).backward()
    optimizer.step()


@CASES.case("DTensor parameters", error="whose gradient is not the one that backward accumulates")
def dtensors(make: Make) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(randn(4, 4), mesh, [Replicate()]))
    make([p])


@CASES.case("an averaged model beside")
def averaged(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    mean = torch.optim.swa_utils.AveragedModel(model)
    ema = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )

    def update(step: int) -> None:
        mean.update_parameters(model)
        ema.update_parameters(model)

    values = train(model, optimizer, between=update)
    return values, result(mean), result(ema)


(
    test_hostile_use_gives_the_ordinary_steps_bits_or_an_error,
    test_the_ordinary_step_raises_only_where_nobody_can_step,
) = both_tests(CASES)
