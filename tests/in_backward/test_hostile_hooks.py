"""Hooks that change gradients, raise or step within backward; see hostile_use.py."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.hostile_use import (
    Case,
    Make,
    Table,
    both_tests,
    loss_of,
    net,
    randn,
    train,
)
from tests.helpers.optim_cases import FrozenAwareSGD

CASES = Table(__name__)


@CASES.case("hooks on tensors that change the gradient")
def tensor_hooks(make: Make) -> Any:
    model = net()
    for p in model.parameters():
        p.register_hook(lambda g: g * 0.5)
    return train(model, make(model.parameters()))


@CASES.case("post-accumulate hooks before and after, which replace the gradient")
def replacing_hooks(make: Make) -> Any:
    model = net()

    def halve(p: Tensor) -> None:
        assert p.grad is not None
        p.grad = p.grad * 0.5

    model[2].weight.register_post_accumulate_grad_hook(halve)
    optimizer = make(model.parameters())
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(halve)
    return train(model, optimizer)


@CASES.case("post-accumulate hooks that set the gradient to None")
def taking_hooks(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())

    def take(p: Tensor) -> None:
        p.grad = None

    model[2].weight.register_post_accumulate_grad_hook(take)
    model[6].bias.register_post_accumulate_grad_hook(take)
    return train(model, optimizer)


@CASES.case("post-accumulate hooks that come and go")
def coming_hooks(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    seen: list[int] = []
    handles: list[Any] = []

    def once(p: Tensor) -> None:
        seen.append(p.numel())
        handles.pop().remove()

    def enter(step: int) -> None:
        handles.append(model[4].weight.register_post_accumulate_grad_hook(once))

    enter(-1)
    return train(model, optimizer, between=enter), seen


def _raising(make: Make, after: Callable[[nn.Module, FrozenAwareSGD], Any], kind: Any) -> Any:
    model = net()
    optimizer = make(model.parameters())

    def fail(_: Any) -> None:
        raise kind("stop here")

    handle = model[2].weight.register_post_accumulate_grad_hook(fail)
    with contextlib.suppress(RuntimeError, KeyboardInterrupt, MemoryError):
        loss_of(model).backward()
    handle.remove()
    return after(model, optimizer)


def _step_and_go_on(model: nn.Module, optimizer: FrozenAwareSGD) -> Any:
    optimizer.step()
    return train(model, optimizer)


for _kind in (RuntimeError, KeyboardInterrupt, MemoryError):
    CASES[f"a {_kind.__name__} within backward, then step()"] = Case(
        functools.partial(_raising, after=_step_and_go_on, kind=_kind)
    )


@CASES.case("optimizer.zero_grad() within backward", error=r"Call step\(\) first")
def zero_within(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    model[0].weight.register_hook(lambda g: optimizer.zero_grad())
    loss_of(model).backward()


@CASES.case("optimizer.step() within backward")
def step_within(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())

    def step(_: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    handle = model[4].weight.register_hook(step)
    train(model, optimizer, steps=2)
    handle.remove()
    return train(model, optimizer)


@CASES.case("close() within backward")
def close_within(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    model[4].weight.register_hook(lambda g: optimizer.close())
    values = train(model, optimizer)
    gc.collect()
    return values


@CASES.case("close() within a post-accumulate hook, and a new optimizer for the same parameters")
def reopen_within(make: Make) -> Any:
    model = net()
    optimizers = [make(model.parameters())]

    def reopen(_: Tensor) -> None:
        optimizers[-1].close()
        new = make(model.parameters())
        new.load_state_dict(optimizers[-1].state_dict())
        optimizers.append(new)

    handle = model[4].weight.register_post_accumulate_grad_hook(reopen)
    loss_of(model).backward()
    handle.remove()
    optimizers[-1].step()
    return train(model, optimizers[-1])


@CASES.case("the optimizer collected within backward")
def collected_within(make: Make) -> Any:
    model = net()
    optimizers = [make(model.parameters())]
    alive = weakref.ref(optimizers[0])

    def drop(_: Tensor) -> None:
        optimizers.clear()
        gc.collect()

    handle = model[0].bias.register_post_accumulate_grad_hook(drop)
    loss_of(model).backward()
    handle.remove()
    assert alive() is None
    for p in model.parameters():
        p.grad = None
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(randn(*p.shape, seed=i))
    return train(model, make(model.parameters()))


@CASES.case("parameters deleted within backward", error="of these are in param_groups now")
def deleted_within(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())

    def delete(_: Tensor) -> None:
        del optimizer.param_groups[0]["params"][4:]
        del model[4:]
        gc.collect()

    handle = model[2].weight.register_hook(delete)
    loss_of(model).backward()
    handle.remove()
    optimizer.step()
    return train(model, optimizer)


@CASES.case("a parameter frozen within backward, when its gradient was there")
def frozen_within(make: Make) -> Any:
    """The hook runs after the gradient was accumulated and before the optimizer steps."""
    model = net()
    optimizer = make(model.parameters())
    for p in model[4].parameters():
        p.register_post_accumulate_grad_hook(lambda p: p.requires_grad_(False))
    return train(model, optimizer)


@CASES.case("a hook on AccumulateGrad", error="has a hook on its AccumulateGrad")
def accumulate_grad_hook(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    weight = model[2].weight
    node = weight.view_as(weight).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: None)
    loss_of(model).backward()
    optimizer.step()


(
    test_hostile_use_gives_the_ordinary_steps_bits_or_an_error,
    test_the_ordinary_step_raises_only_where_nobody_can_step,
) = both_tests(CASES)
