"""step_in_backward under hostile use: the ordinary step's bits, or a clear error; never a crash.

One table. Every case trains in a process of its own, once with ordinary steps and twice in backward
(every gradient applied at once, and in buckets). What it returns has to be the same to the bit. A
case that names an `error` has to raise that in backward, whatever the ordinary step does.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import io
import pickle
import re
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers import apart, processes
from tests.helpers import optim_cases as cases
from tests.helpers.optim_cases import FrozenAwareSGD

Make = Callable[..., FrozenAwareSGD]
Scenario = Callable[[Make], Any]


@dataclass
class Case:
    scenario: Scenario
    error: str = ""  # what the message has to say


CASES: dict[str, Case] = {}
# Where scenarios train, each in a process of its own; a GPU's backward runs in a thread of torch's.
DEVICE = "cpu"


def case(name: str, error: str = "") -> Callable[[Scenario], Scenario]:
    def enter(scenario: Scenario) -> Scenario:
        assert name not in CASES, name
        CASES[name] = Case(scenario, error)
        return scenario

    return enter


BUCKETS: dict[str, dict[str, Any]] = {
    "no bucket": {"bucket_mb": 0},
    "small buckets": {"bucket_mb": 300 / 2**20},
}


def ordinary(params: Any, **hyper: Any) -> FrozenAwareSGD:
    return FrozenAwareSGD(params, **({"lr": 0.1, "momentum": 0.9} | hyper))


def net(width: int = 6, depth: int = 4, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers).to(DEVICE, dtype)


def data(step: int = 0, width: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    return cases.randn((5, width), cases.generator(step), dtype, DEVICE)


def loss_of(model: nn.Module, step: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (model(data(step, dtype=dtype)) ** 2).sum()


def train(
    model: nn.Module,
    optimizer: Any,
    steps: int = 3,
    loss: Callable[[nn.Module, int], Tensor] = loss_of,
    between: Callable[[int], Any] = lambda step: None,
) -> list[Any]:
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
        between(step)
    return result(model, optimizer)


def result(model: nn.Module, *optimizers: Any) -> list[Any]:
    """Every parameter, and what each optimizer's state holds for it."""
    params = list(model.parameters())
    values: list[Any] = [bits(p) for p in params]
    for optimizer in optimizers:
        for p in params:
            entry = optimizer.state.get(p, {})
            values.append({key: bits(value) for key, value in entry.items()})
    return values


def bits(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    return f"{value.dtype} {list(value.shape)} {value.flatten().double().tolist()}"


# ---------------------------------------------------------------------------- kinds of parameters


class Weighted(nn.Module):
    """Nothing but parameters, each with a gradient of its own at every step."""

    def __init__(self, *params: Tensor) -> None:
        super().__init__()
        self.all = nn.ParameterList(params)

    def forward(self, step: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for i, p in enumerate(self.all):
            shape, gen = tuple(p.shape), cases.generator(100 * step + i)
            scale = cases.randn(shape, gen, torch.float64, DEVICE)
            total = total + ((p * p + p).abs() * scale).sum().double()
        return total


def of_parameters(make: Make, *params: Tensor, **hyper: Any) -> list[Any]:
    model = Weighted(*params)
    optimizer = make(model.parameters(), **hyper)
    return train(model, optimizer, loss=lambda m, step: m(step))


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return cases.randn(shape, cases.generator(seed), dtype, DEVICE)


def _parts(numel: int) -> list[nn.Parameter]:
    """As flattened models have them: one memory, a version each."""
    flat = randn(numel)
    parts = [nn.Parameter(torch.empty(n)) for n in (numel // 4, numel // 2, numel // 4)]
    for p, part in zip(parts, flat.split([len(p) for p in parts]), strict=True):
        p.data = part
    return parts


class PlainSubclass(nn.Parameter):
    pass


class Overriding(Tensor):
    """A tensor whose operators go through Python."""


KINDS: dict[str, Callable[[], list[Tensor]]] = {
    "0-dim": lambda: [torch.tensor(0.5), torch.tensor(2.0), randn(3)],
    "empty": lambda: [torch.ones(0), torch.ones(0, 3), randn(3), torch.ones(2, 0)],
    "empty alone": lambda: [torch.ones(0), torch.ones(0, 3)],
    "complex": lambda: [randn(3, dtype=torch.complex64), randn(4), randn(2, dtype=torch.complex64)],
    "of mixed dtypes": lambda: [
        randn(9, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32)
    ],
    "transposed": lambda: [randn(4, 6).t(), randn(5), randn(6, 4).t()],
    "channels_last": lambda: [
        randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        randn(3, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        randn(8),
    ],
    "strided with gaps": lambda: [randn(8, 8)[::2, ::2], randn(4), randn(9)[::3]],
    "misaligned views": lambda: [randn(33)[1:], randn(18)[3:]],
}


def _kinds() -> Iterator[tuple[str, Case]]:
    def scenario(make: Make, kind: str) -> Any:
        return of_parameters(make, *(nn.Parameter(t) for t in KINDS[kind]()))

    for kind in KINDS:
        yield f"parameters that are {kind}", Case(functools.partial(scenario, kind=kind))


CASES.update(_kinds())


@case("parameters that are parts of one memory")
def parts_of_one(make: Make) -> Any:
    return of_parameters(make, *_parts(24))


@case("parameters that share memory")
def share_memory(make: Make) -> Any:
    base = randn(10)
    parts = [nn.Parameter(base[0:6]), nn.Parameter(base[4:10]), nn.Parameter(randn(4, seed=1))]
    return of_parameters(make, *parts)


@case("parameters that are the same memory in other shapes")
def share_all_memory(make: Make) -> Any:
    base = randn(6)
    parts = [nn.Parameter(base), nn.Parameter(base[2:4]), nn.Parameter(base.view(2, 3))]
    return of_parameters(make, *parts)


@case("a parameter listed twice in a group")
def listed_twice(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    optimizer.param_groups[0]["params"].append(model[2].weight)
    return train(model, optimizer)


@case("a parameter in two groups of different lr")
def in_two_groups(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    optimizer.param_groups.append(
        optimizer.param_groups[0] | {"params": [model[2].weight, model[0].bias], "lr": 0.03}
    )
    return train(model, optimizer)


@case("parameters of a subclass")
def of_a_subclass(make: Make) -> Any:
    return of_parameters(make, PlainSubclass(randn(3)), nn.Parameter(randn(4)))


@case("parameters whose operators go through Python")
def overriding(make: Make) -> Any:
    first = nn.Parameter(randn(3).as_subclass(Overriding))
    return of_parameters(make, first, nn.Parameter(randn(4)), nn.Parameter(randn(5)))


@case("gradients of another dtype than their parameters")
def other_grad_dtype(make: Make) -> Any:
    params = [nn.Parameter(randn(7)), nn.Parameter(randn(5)), nn.Parameter(randn(4))]
    params[0].grad_dtype = torch.bfloat16  # type: ignore[attr-defined]
    params[1].grad_dtype = torch.float64  # type: ignore[attr-defined]
    return of_parameters(make, *params)


@case("expanded gradients")
def expanded(make: Make) -> Any:
    model = Weighted(nn.Parameter(randn(4, 3)), nn.Parameter(randn(5)), nn.Parameter(randn(2, 2)))
    return train(model, make(model.parameters()), loss=lambda m, s: sum(p.sum() for p in m.all))


@case("expanded gradients, clipped")
def expanded_clipped(make: Make) -> Any:
    params = [nn.Parameter(randn(4, 3)), nn.Parameter(randn(5))]
    model = Weighted(*params)
    optimizer = make(model.parameters(), **({"clip_value": 0.25} if make is not ordinary else {}))
    for _ in range(2):
        optimizer.zero_grad()
        sum(p.sum() for p in params).backward()  # type: ignore[union-attr]
        if make is ordinary:
            for p in params:
                assert p.grad is not None
                p.grad = p.grad.clone()
            torch.nn.utils.clip_grad_value_(params, 0.25)
        optimizer.step()
    return result(model, optimizer)


@case("parameters that are used by a frozen layer's gradient")
def frozen_between(make: Make) -> Any:
    model = net()
    model[2].requires_grad_(False)
    return train(model, make(model.parameters()))


@case("lazy parameters")
def lazy(make: Make) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.LazyLinear(6))
    optimizer = make(model.parameters())
    model(data())
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(randn(*p.shape, seed=i))
    return train(model, optimizer)


# -------------------------------------------------------------------- models and optimizers edited


@case("p.data = between steps")
def data_set(make: Make) -> Any:
    model = net()

    def swap(step: int) -> None:
        for p in model.parameters():
            p.data = p.data.clone() * 0.5

    return train(model, make(model.parameters()), between=swap)


@case("p.data = between backward and step")
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


@case("model.double() between steps")
def to_double(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer)
    model.double()
    return train(model, optimizer, loss=lambda m, s: loss_of(m, s, torch.float64))


@case("model.double() by swap_tensors between steps")
def to_double_by_swap(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    torch.__future__.set_swap_module_params_on_conversion(True)
    train(model, optimizer)
    model.double()
    values = train(model, optimizer, loss=lambda m, s: loss_of(m, s, torch.float64))
    model.float()
    return values, train(model, optimizer)


@case("model.load_state_dict(assign=True)")
def load_assign(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer)
    model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()}, assign=True)
    train(model, optimizer)  # its parameters are others now, and stay as they are
    return result(model, optimizer)


@case("parameters removed from the list between steps")
def removed(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer)
    del optimizer.param_groups[0]["params"][2:5]
    model[0] = nn.Identity()
    gc.collect()
    return train(model, optimizer)


@case("parameters entered into the list by hand")
def entered(make: Make) -> Any:
    model = net()
    optimizer = make(model[:4].parameters())
    optimizer.param_groups[0]["params"].extend(model[4:].parameters())
    optimizer.param_groups[0]["params"].reverse()
    return train(model, optimizer)


@case("the list shuffled between backward and step")
def shuffled(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.param_groups[0]["params"].reverse()
        optimizer.step()
        optimizer.zero_grad()
    return result(model, optimizer)


@case("the list shuffled within backward")
def shuffled_within(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    model[4].weight.register_hook(lambda g: optimizer.param_groups[0]["params"].reverse())
    return train(model, optimizer)


@case("params that are a tuple")
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


@case("params that are a set", error="is a set; give it a list")
def set_of_params(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    optimizer.param_groups[0]["params"] = set(model.parameters())
    loss_of(model).backward()
    optimizer.step()


@case("a group removed between backward and step", error="4 of these are in param_groups now")
def group_removed(make: Make) -> Any:
    model = net()
    optimizer = make([{"params": model[:4].parameters()}, {"params": model[4:].parameters()}])
    loss_of(model).backward()
    del optimizer.param_groups[1]
    optimizer.step()


@case("a parameter taken out of the list after it was applied", error="are in param_groups now")
def param_removed(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    loss_of(model).backward()
    del optimizer.param_groups[0]["params"][-2:]
    optimizer.step()


@case("a parameter moved to another group after it was applied", error=r"was in param_groups\[1\]")
def param_moved(make: Make) -> Any:
    model = net()
    optimizer = make(
        [{"params": list(model[:4].parameters())}, {"params": model[4:].parameters(), "lr": 0.5}]
    )
    loss_of(model).backward()
    moved = optimizer.param_groups[1]["params"].pop(0)
    optimizer.param_groups[0]["params"].append(moved)
    optimizer.step()


@case("a group added between backward and step")
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


@case("a group added within backward")
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


@case("a group dict replaced between steps")
def group_replaced(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())

    def replace(step: int) -> None:
        optimizer.param_groups[0] = dict(optimizer.param_groups[0], lr=0.1 / (step + 2), mine=step)

    return train(model, optimizer, between=replace)


@case("the optimizer copied by copy.copy", error="already stepped in backward by another optimizer")
def shallow_copy(make: Make) -> Any:
    copy.copy(make(net().parameters()))


@case("model and optimizer deepcopied together, half-way")
def deepcopied(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer)
    other_model, other = copy.deepcopy((model, optimizer))
    return train(model, optimizer), train(other_model, other, steps=5)


@case("the model pickled and loaded, whole")
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


@case("the model shared with other processes")
def shared_model(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    model.share_memory()
    return train(model, optimizer)


FORKED = "one process more, forked while hooks are there"


@case(FORKED)
def forked(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer)
    here = train(copy.deepcopy(model), make(net().parameters()))
    return here, apart.fork(lambda: train(model, optimizer))


# -------------------------------------------------------------------------------- several backwards


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.generator = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.critic = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))


def gan(make: Make, careful: Callable[[Gan, bool], None], zero: Callable[[Any], None]) -> Any:
    """Two optimizers, each with its own zero_grad, backward and step."""
    model = Gan()
    of_critic, of_generator = make(model.critic.parameters()), make(model.generator.parameters())
    for step in range(3):
        zero(of_critic)
        fake = model.generator(data(step + 10))
        (model.critic(fake.detach()) - model.critic(data(step))).sum().backward()
        of_critic.step()
        careful(model, False)
        zero(of_generator)
        (-model.critic(fake)).sum().backward()
        of_generator.step()
        careful(model, True)
    return result(model, of_critic, of_generator)


@case("two optimizers in turns, the critic frozen for the generator's backward")
def gan_frozen(make: Make) -> Any:
    def freeze(model: Gan, trains: bool) -> None:
        model.critic.requires_grad_(trains)

    model = Gan()
    of_critic, of_generator = make(model.critic.parameters()), make(model.generator.parameters())
    for step in range(3):
        of_critic.zero_grad()
        fake = model.generator(data(step + 10))
        (model.critic(fake.detach()) - model.critic(data(step))).sum().backward()
        of_critic.step()
        freeze(model, False)
        of_generator.zero_grad()
        (-model.critic(fake)).sum().backward()
        of_generator.step()
        freeze(model, True)
    return result(model, of_critic, of_generator)


@case(
    "two optimizers in turns, a backward of one through the other's", error=r"Call step\(\) first"
)
def gan_unfrozen(make: Make) -> Any:
    return gan(make, lambda model, trains: None, lambda optimizer: optimizer.zero_grad())


@case("the same, with module.zero_grad()", error="second")
def gan_module_zero(make: Make) -> Any:
    def zero(optimizer: FrozenAwareSGD) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None

    return gan(make, lambda model, trains: None, zero)


@case("two optimizers over one backward")
def two_optimizers(make: Make) -> Any:
    model = net()
    first, second = make(model[:4].parameters()), make(model[4:].parameters(), lr=0.02)
    for step in range(3):
        first.zero_grad()
        second.zero_grad()
        loss_of(model, step).backward()
        second.step()
        first.step()
    return result(model, first, second)


@case("one in backward and a stock optimizer over the rest")
def beside_stock(make: Make) -> Any:
    model = net()
    first = make(model[:4].parameters())
    second = torch.optim.Adam(model[4:].parameters(), lr=0.01)
    for step in range(3):
        first.zero_grad()
        second.zero_grad()
        loss_of(model, step).backward()
        torch.nn.utils.clip_grad_norm_(model[4:].parameters(), 0.1)
        second.step()
        first.step()
    return result(model, first)


@case("a second backward that reads what the first has changed", error="second backward")
def second_backward(make: Make) -> Any:
    """Its gradients go to other parameters, its forward pass through the same ones."""
    model = net()
    optimizer = make(model.parameters())
    loss_of(model[:4]).backward()
    model[:4].requires_grad_(False)
    loss_of(model).backward()
    model[:4].requires_grad_(True)
    optimizer.step()
    return result(model, optimizer)


@case("gradient accumulation", error="for the second time|second backward")
def accumulation(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    loss_of(model, 0).backward()
    loss_of(model, 1).backward()
    optimizer.step()


@case("gradient accumulation after ordinary iterations", error="second")
def accumulation_later(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer)
    for step in range(4):
        loss_of(model, step).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()


@case("a gradient that was there before the optimizer")
def gradient_before(make: Make) -> Any:
    model = net()
    loss_of(model, 7).backward()
    optimizer = make(model.parameters())
    loss_of(model, 8).backward()
    optimizer.step()
    return result(model, optimizer)


@case("backward(inputs=)")
def backward_inputs(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward(inputs=[model[0].weight, model[4].bias])
        optimizer.step()
    return result(model, optimizer)


@case("torch.autograd.grad, and gradients set by hand")
def autograd_grad(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    for step in range(3):
        params = list(model.parameters())
        for p, g in zip(params, torch.autograd.grad(loss_of(model, step), params), strict=True):
            p.grad = g
        optimizer.step()
    return result(model, optimizer)


@case("a gradient set by hand where it had been applied", error="was set between backward and step")
def set_after_applied(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    loss_of(model).backward()
    model[4].weight.grad = torch.ones(6, 6)
    optimizer.step()


@case("a gradient penalty, by double backward within the loss")
def gradient_penalty(make: Make) -> Any:
    model = net()

    def loss(model: nn.Module, step: int) -> Tensor:
        x = data(step).requires_grad_()
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return ((g.norm(dim=1) - 1) ** 2).mean() + loss_of(model, step)

    return train(model, make(model.parameters()), loss=loss)


@case("create_graph=True", error="create_graph=True")
def create_graph(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    warnings.simplefilter("ignore")
    loss_of(model).backward(create_graph=True)
    optimizer.step()


@case("retain_graph=True, and no second backward")
def retain_graph(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward(retain_graph=True)
        optimizer.step()
    return result(model, optimizer)


@case("weights read by a graph that has not run yet", error="modified by an inplace operation")
def stale_graph(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    if make is ordinary:
        return
    later = loss_of(model, 1)
    loss_of(model, 0).backward()
    optimizer.step()
    later.backward()


class Segments(nn.Module):
    def __init__(self, reentrant: bool, tied: bool = False) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.parts = nn.ModuleList(net(depth=2).children())
        self.parts[2].reset_parameters()
        if tied:
            self.parts[2].weight = self.parts[0].weight
        self.last = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        for i in (0, 2):
            x = checkpoint(self.segment, x, i, use_reentrant=self.reentrant)
        return self.last(x)

    def segment(self, x: Tensor, i: int) -> Tensor:
        return self.parts[i + 1](self.parts[i](x))


def _checkpoint_cases() -> Iterator[tuple[str, Case]]:
    def scenario(make: Make, **how: bool) -> Any:
        model = Segments(**how)
        return train(model, make(model.parameters()))

    for reentrant in (False, True):
        for tied in (False, True):
            words = f"checkpoints, {'' if reentrant else 'not '}reentrant{', tied' if tied else ''}"
            run = functools.partial(scenario, reentrant=reentrant, tied=tied)
            yield words, Case(run, "for the second time" if reentrant and tied else "")


CASES.update(_checkpoint_cases())


@case("reentrant checkpoints of everything, one in another")
def nested_checkpoints(make: Make) -> Any:
    model = net()

    def outer(x: Tensor) -> Tensor:
        x = checkpoint(model[:4], x, use_reentrant=True)
        return checkpoint(model[4:], x, use_reentrant=True)

    def loss(_: nn.Module, step: int) -> Tensor:
        x = data(step).requires_grad_()
        return (checkpoint(outer, x, use_reentrant=True) ** 2).sum()

    return train(model, make(model.parameters()), loss=loss)


@case("saved tensors on the CPU")
def saved_on_cpu(make: Make) -> Any:
    model = net()

    def loss(model: nn.Module, step: int) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return loss_of(model, step)

    return train(model, make(model.parameters()), loss=loss)


@case("anomaly mode")
def anomaly(make: Make) -> Any:
    warnings.simplefilter("ignore")
    with torch.autograd.detect_anomaly():
        model = net()
        return train(model, make(model.parameters()))


@case("the profiler on")
def profiler(make: Make) -> Any:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        model = net()
        return train(model, make(model.parameters()))


@case("a dispatch mode around training")
def dispatch_mode(make: Make) -> Any:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        model = net()
        return train(model, make(model.parameters()))


@case("backward in several threads at once, each a model of its own")
def threads(make: Make) -> Any:
    answers: dict[int, Any] = {}

    def work(i: int) -> None:
        torch.manual_seed(0)
        answers[i] = train(models[i], make(models[i].parameters()), steps=20)

    models = [net() for _ in range(4)]
    running = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(120)
    return [answers[i] for i in range(4)]


@case("backward in another thread than step")
def other_thread(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    for step in range(3):
        optimizer.zero_grad()
        thread = threading.Thread(target=loss_of(model, step).backward)
        thread.start()
        thread.join(120)
        optimizer.step()
    return result(model, optimizer)


@case("functional_call with other tensors in the place of parameters")
def functional_call(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())

    def loss(model: nn.Module, step: int) -> Tensor:
        doubled = {name: p * 2 for name, p in model.named_parameters()}
        return (torch.func.functional_call(model, doubled, data(step)) ** 2).sum()

    return train(model, optimizer, loss=loss)


@case("per-sample gradients by torch.func beside")
def torch_func(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    names = dict(model.named_parameters())

    def one(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return (torch.func.functional_call(model, params, x) ** 2).sum()

    def loss(model: nn.Module, step: int) -> Tensor:
        per_sample = torch.func.vmap(torch.func.grad(one), (None, 0))(names, data(step))
        weight = 1 / (1 + sum(g.detach().norm() for g in per_sample.values()))
        return loss_of(model, step) * weight

    return train(model, optimizer, loss=loss)


# ------------------------------------------------------------------------------------ users' hooks


@case("hooks on tensors that change the gradient")
def tensor_hooks(make: Make) -> Any:
    model = net()
    for p in model.parameters():
        p.register_hook(lambda g: g * 0.5)
    return train(model, make(model.parameters()))


@case("post-accumulate hooks before and after, which replace the gradient")
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


@case("post-accumulate hooks that set the gradient to None")
def taking_hooks(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())

    def take(p: Tensor) -> None:
        p.grad = None

    model[2].weight.register_post_accumulate_grad_hook(take)
    model[6].bias.register_post_accumulate_grad_hook(take)
    return train(model, optimizer)


@case("post-accumulate hooks that come and go")
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


@case("optimizer.zero_grad() within backward", error=r"Call step\(\) first")
def zero_within(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    model[0].weight.register_hook(lambda g: optimizer.zero_grad())
    loss_of(model).backward()


@case("optimizer.step() within backward")
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


@case("close() within backward")
def close_within(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    model[4].weight.register_hook(lambda g: optimizer.close())
    values = train(model, optimizer)
    gc.collect()
    return values


@case("close() within a post-accumulate hook, and a new optimizer for the same parameters")
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


@case("the optimizer collected within backward")
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


@case("parameters deleted within backward", error="of these are in param_groups now")
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


@case("a parameter frozen within backward, when its gradient was there")
def frozen_within(make: Make) -> Any:
    """A hook that runs after the gradient was accumulated, and before anyone steps."""
    model = net()
    optimizer = make(model.parameters())
    for p in model[4].parameters():
        p.register_post_accumulate_grad_hook(lambda p: p.requires_grad_(False))
    return train(model, optimizer)


@case("a hook on AccumulateGrad", error="has a hook on its AccumulateGrad")
def accumulate_grad_hook(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    weight = model[2].weight
    node = weight.view_as(weight).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: None)
    loss_of(model).backward()
    optimizer.step()


# ------------------------------------------------------------------------- around step, and options


@case("clip_grad_norm_", error="changed between backward and step|memory location")
def clip_norm(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    loss_of(model).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@case("clip_grad_value_", error="changed between backward and step|memory location")
def clip_value(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    loss_of(model).backward()
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.1)
    optimizer.step()


@case("clip_value= on complex gradients", error="complex")
def clip_complex(make: Make) -> Any:
    clip = {} if make is ordinary else {"clip_value": 0.1}
    of_parameters(make, nn.Parameter(randn(3, dtype=torch.complex64)), **clip)


@case("gradients replaced by others made where they were", error="between backward and step")
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


# Where nothing is left but a placeholder, torch says first that it cannot be written to.
UNWRITABLE = "|refers to a single memory location"


@case("a GradScaler", error=f"GradScaler scales{UNWRITABLE}")
def grad_scaler(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(model)).backward()
    scaler.step(optimizer)


@case("a GradScaler that unscales", error=f"GradScaler scales{UNWRITABLE}")
def grad_scaler_unscale(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(model)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)


@case("a GradScaler that is not enabled")
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


@case(
    "a tensor lr changed in place within an iteration", error=r"lr of param_groups\[0\] was changed"
)
def tensor_lr_changed(make: Make) -> Any:
    model = net()
    lr = torch.tensor(0.1)
    optimizer = make(model.parameters(), lr=lr)
    loss_of(model).backward()
    lr.mul_(0.5)
    optimizer.step()


@case("an lr that needs a gradient")
def lr_with_gradient(make: Make) -> Any:
    model = net()
    lr = torch.tensor(0.05, requires_grad=True)
    return train(model, make(model.parameters(), foreach=False, lr=lr, weight_decay=0.01))


@case("parameters written to between backward and step", error="was written to between backward")
def written_to(make: Make) -> Any:
    """As decoupled weight decay does."""
    model = net()
    optimizer = make(model.parameters())
    loss_of(model).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.99)
    optimizer.step()


@case("no memory for momentum", error="allocate memory")
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


@case("stock's multi-tensor form with nesterov")
def foreach_nesterov(make: Make) -> Any:
    model = net()
    return train(model, make(model.parameters(), foreach=True, nesterov=True))


@case("step(closure) that zeroes first")
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


@case("step(closure) as Lightning orders it: forward, zero_grad, backward")
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


@case("a closure after a backward of its own", error="second|Call step")
def closure_after(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    loss_of(model).backward()

    def evaluate() -> Tensor:
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(evaluate)


@case("step hooks, and one that raises")
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


@case("a step hook that changes the lr", error=r"lr of param_groups\[0\] was changed")
def step_hook_lr(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())

    def change(o: Any, *_: Any) -> None:
        o.param_groups[0]["lr"] = 0.5

    optimizer.register_step_pre_hook(change)
    loss_of(model).backward()
    optimizer.step()


@case("step() twice")
def step_twice(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()
    return result(model, optimizer)


@case(
    "zero_grad(set_to_none=False), where a parameter is not used every time",
    error="keeps the memory of all gradients",
)
def zero_fill(make: Make) -> Any:
    """Zeros are gradients: the ordinary step moves what momentum pushes. None is none."""
    model = net()
    optimizer = make(model.parameters(), weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad(set_to_none=False)
        loss_of(model[: 4 + 4 * (step % 2)], step).backward()
        optimizer.step()
    return result(model, optimizer)


def _give_up(make: Make, zero: Callable[[FrozenAwareSGD], Any]) -> Any:
    """A refused iteration is given up; the next one is an ordinary one."""
    model = net()
    optimizer = make(model.parameters())
    if make is not ordinary:
        loss_of(model, 0).backward()
        with pytest.raises(RuntimeError, match="second"):
            loss_of(model, 0).backward()
        zero(optimizer)
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
        for state in optimizer.state.values():
            state["momentum_buffer"].zero_()
        with torch.no_grad():
            for p, q in zip(model.parameters(), net().parameters(), strict=True):
                p.copy_(q)
    else:
        for p in model.parameters():
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return train(model, optimizer)


CASES["a refused iteration given up by zero_grad()"] = Case(
    functools.partial(_give_up, zero=lambda optimizer: optimizer.zero_grad())
)


@case("momentum that does not fit, mended")
def unfit_momentum(make: Make) -> Any:
    """The error leaves the iteration to be made once more, or given up."""
    model = net()
    optimizer = make(model.parameters())
    weight = model[0].weight
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    kept = optimizer.state[weight]["momentum_buffer"]
    optimizer.state[weight]["momentum_buffer"] = torch.ones(2)
    with contextlib.suppress(ValueError, RuntimeError):
        loss_of(model, 1).backward()
        optimizer.step()
    with pytest.raises((ValueError, RuntimeError), match=r"momentum_buffer of param_groups\[0\]"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.state[weight]["momentum_buffer"] = kept
    return "given up"


@case("momentum of no type", error="momentum_buffer of param_groups.* is a str")
def text_for_momentum(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer)
    optimizer.state[model[6].weight]["momentum_buffer"] = "none"
    loss_of(model).backward()
    optimizer.step()


@case("lr of no type", error="lr of param_groups.* is a str")
def text_for_lr(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    optimizer.param_groups[0]["lr"] = "0.1"
    loss_of(model).backward()
    optimizer.step()


@case("a group without momentum", error="has no 'momentum'")
def no_momentum_key(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    del optimizer.param_groups[0]["momentum"]
    loss_of(model).backward()
    optimizer.step()


@case("sparse gradients", error="layout Sparse")
def sparse(make: Make) -> Any:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 3))
    optimizer = make(model.parameters())
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()


@case("DTensor parameters", error="whose gradient is not the one that backward accumulates")
def dtensors(make: Make) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(randn(4, 4), mesh, [Replicate()]))
    make([p])


@case("an averaged model beside")
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


# ------------------------------------------------------------------------------------ checkpoints


@case("state saved between backward and step", error="between backward and step|half|Call step")
def saved_within(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    loss_of(model).backward()
    optimizer.state_dict()


@case("state loaded between backward and step", error=r"Call step\(\) first")
def loaded_within(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer)
    loss_of(model).backward()
    optimizer.load_state_dict(saved)
    optimizer.step()


@case("a checkpoint of stock's, with weights_only=True")
def stock_checkpoint(make: Make) -> Any:
    model = net()
    stock = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.8)
    train(model, stock)
    file = io.BytesIO()
    torch.save(stock.state_dict(), file)
    file.seek(0)
    optimizer = make(model.parameters())
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    return train(model, optimizer)


NARROW = {"momentum_dtype": torch.bfloat16, "momentum_seed": 11}


@case("momentum in bfloat16")
def narrow(make: Make) -> Any:
    model = net()
    optimizer = make(
        [
            {"params": model[:4].parameters()},
            {"params": model[4:].parameters(), "momentum_seed": 3, "lr": 0.02},
        ],
        **NARROW,
    )
    return train(model, optimizer, steps=6), [g["momentum_seed"] for g in optimizer.param_groups]


@case("momentum in bfloat16, saved, loaded with weights_only=True and resumed")
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


@case("momentum in bfloat16 from a checkpoint of stock's, in float32")
def narrow_from_stock(make: Make) -> Any:
    model = net()
    stock = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.8)
    train(model, stock)
    optimizer = make(model.parameters(), **NARROW)
    optimizer.load_state_dict(stock.state_dict())
    return train(model, optimizer), [bits(s["momentum_buffer"]) for s in optimizer.state.values()]


@case("momentum in bfloat16 of parameters listed twice")
def narrow_twice(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters(), **NARROW)
    optimizer.param_groups[0]["params"].append(model[2].weight)
    return train(model, optimizer)


@case("momentum in bfloat16 of complex parameters", error="momentum_dtype=BFloat16")
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
            functools.partial(_policy, frozen_momentum=_policy_name, **_hyper)
        )


@case("frozen_momentum of no kind, set in a group", error="frozen_momentum of param_groups")
def policy_of_no_kind(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    optimizer.param_groups[0]["frozen_momentum"] = "forget"
    loss_of(model).backward()
    optimizer.step()


@case("keys of the user's own in groups and state")
def own_keys(make: Make) -> Any:
    model = net()
    optimizer = make([{"params": model.parameters(), "name": "all", "layer": 3}])

    def note(step: int) -> None:
        for p in model.parameters():
            optimizer.state[p]["seen"] = step

    values = train(model, optimizer, between=note)
    return values, optimizer.state_dict()["param_groups"]


# -------------------------------------------------------------------------------------- the runner


@dataclass
class Outcome:
    value: Any = None
    error: str = ""


def outcome_of(scenario: Scenario, make: Make) -> Outcome:
    try:
        return Outcome(value=scenario(make))
    except Exception as error:
        return Outcome(error=f"{type(error).__name__}: {error}")


def named_outcome(name: str, make: Make, device: str) -> Outcome:
    """In a process of its own."""
    if device != "cpu":
        globals()["DEVICE"] = device
        torch.set_default_device(device)
    return outcome_of(CASES[name].scenario, make)


CLEAR = re.compile("^(ValueError|TypeError|RuntimeError|KeyError|NotImplementedError): .")


def skip_where_torch_refuses(name: str) -> None:
    if name == FORKED and torch.cuda.is_available():
        pytest.skip("where torch sees a GPU, no fork of a process that ran backward can")


def _runs() -> Iterator[Any]:
    """Everything on the CPU. On a GPU what makes steps: refusals do not ask where tensors lie."""
    for name, case in CASES.items():
        for words, bucket in BUCKETS.items():
            yield pytest.param(name, bucket, "cpu", id=f"{name}-{words}")
        if not case.error and name != FORKED:
            bucket = BUCKETS["small buckets"]
            yield pytest.param(name, bucket, "cuda", id=f"{name}-cuda", marks=pytest.mark.gpu)


@functools.cache
def ordinary_outcome(name: str, device: str = "cpu") -> Outcome:
    outcome: Outcome = apart.run(named_outcome, name, ordinary, device)
    return outcome


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "bucket", "device"), list(_runs()))
def test_hostile_use_gives_the_ordinary_steps_bits_or_an_error(
    name: str, bucket: dict[str, Any], device: str
) -> None:
    skip_where_torch_refuses(name)
    case = CASES[name]
    in_backward = functools.partial(ordinary, step_in_backward=True, **bucket)
    ours: Outcome = apart.run(named_outcome, name, in_backward, device)
    if case.error:
        assert ours.error, "made a step"
        assert CLEAR.match(ours.error), ours.error
        assert re.search(case.error, ours.error), ours.error
    else:
        assert not ours.error, ours.error
        theirs = ordinary_outcome(name, device)
        assert not theirs.error, theirs.error
        assert ours.value == theirs.value


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", cases.ids({name: (name,) for name in CASES}))
def test_what_is_refused_is_no_error_of_the_ordinary_step(name: str) -> None:
    """But for what nobody can step; a case that always fails would prove nothing."""
    skip_where_torch_refuses(name)
    hopeless = ("of no ", "that are a set", "without momentum", "no memory", "bfloat16 of complex")
    outcome = ordinary_outcome(name)
    assert bool(outcome.error) == any(words in name for words in hopeless), outcome.error


# ------------------------------------------------------------------------------- several processes


def _ddp(make: Make, **options: Any) -> Any:
    model = nn.parallel.DistributedDataParallel(net(), **options)
    before = [p.detach().clone() for p in model.parameters()]
    try:
        train(model, make(model.parameters()))
    finally:
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def _ddp_no_sync(make: Make) -> Any:
    model = nn.parallel.DistributedDataParallel(net())
    with model.no_sync():
        train(model, make(model.parameters()))


def _fsdp1(make: Make, use_orig_params: bool) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    cpu = torch.device("cpu")
    model = FullyShardedDataParallel(net(), use_orig_params=use_orig_params, device_id=cpu)
    train(model, make(model.parameters()))


def _fsdp1_after(make: Make) -> Any:
    """The parameters stay what they are, and FSDP brings the gradients: step() does all of it."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = net()
    optimizer = make(model.parameters())
    cpu = torch.device("cpu")
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu)
    train(wrapped, optimizer)
    return [bits(p) for p in optimizer.param_groups[0]["params"]]


def _fsdp2(make: Make) -> Any:
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model)
    train(model, make(model.parameters()))


def _zero(make: Make, scheduled: bool) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = net()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), make, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    return train(model, optimizer, between=lambda step: scheduler.step() if scheduled else None)[:8]


SHARDED = "whose gradient is not the one that backward accumulates"
AMONG_PROCESSES: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "DDP": (_ddp, {}, "has a hook on its AccumulateGrad"),
    "DDP of a static graph": (_ddp, {"static_graph": True}, "has a hook on its AccumulateGrad"),
    "DDP in no_sync()": (_ddp_no_sync, {}, "has a hook on its AccumulateGrad"),
    "FSDP1": (_fsdp1, {"use_orig_params": False}, SHARDED),
    "FSDP1 with use_orig_params": (_fsdp1, {"use_orig_params": True}, SHARDED),
    "FSDP1 around a model that has its optimizer": (_fsdp1_after, {}, ""),
    "FSDP2": (_fsdp2, {}, SHARDED),
    "ZeroRedundancyOptimizer": (_zero, {"scheduled": False}, ""),
    "ZeroRedundancyOptimizer, scheduled": (
        _zero,
        {"scheduled": True},
        r"lr of param_groups\[0\] was changed",
    ),
}


@pytest.fixture(scope="module", params=[1, 2], ids=["1 process", "2 processes"])
def world(request: pytest.FixtureRequest) -> Iterator[processes.World]:
    with processes.world_of("cpu", request.param) as world:
        yield world


def outcome_here(device: str, name: str, in_backward: bool) -> tuple[Any, str]:
    """In one of the processes."""
    scenario, options, _ = AMONG_PROCESSES[name]
    how: dict[str, Any] = {"step_in_backward": True, "bucket_mb": 0} if in_backward else {}
    outcome = outcome_of(lambda make: scenario(make, **options), functools.partial(ordinary, **how))
    return outcome.value, outcome.error


@pytest.mark.parametrize("name", AMONG_PROCESSES)
def test_processes_get_the_ordinary_steps_bits_or_an_error(
    world: processes.World, name: str
) -> None:
    error = AMONG_PROCESSES[name][2]
    ours = world.run(outcome_here, name, True)
    if error:
        assert all(re.search(error, message) for _, message in ours), ours
    else:
        assert ours == world.run(outcome_here, name, False)
        assert not any(message for _, message in ours), ours


# ------------------------------------------------------------------------------- races and the end


def _race() -> str:
    def work(i: int, rounds: int) -> None:
        for _ in range(rounds):
            model = net()
            optimizer = optimizers[i] = ordinary(
                model.parameters(), step_in_backward=True, bucket_mb=0
            )
            for p in list(model.parameters())[::3]:
                p.register_post_accumulate_grad_hook(lambda p: None)
            train(model, optimizer, steps=5)
            optimizer.me = optimizer  # a cycle, for the collector

    ordinary(net().parameters())  # torch imports half of itself for the first optimizer
    sys.setswitchinterval(1e-5)
    optimizers: list[Any] = [None, None]
    running = [threading.Thread(target=work, args=(i, 8)) for i in range(2)]
    for thread in running:
        thread.start()
    while any(thread.is_alive() for thread in running):
        for optimizer in optimizers:
            if optimizer is not None:
                optimizer.close()
        gc.collect()
        time.sleep(1e-3)  # the others' turn
    return "over"


def test_optimizers_closed_and_collected_while_others_run_backward() -> None:
    """Mutex and GIL in every order, in a process of its own: it neither crashes nor hangs."""
    assert apart.run(_race, seconds=60) == "over"


ENDINGS = {
    "by sys.exit() in a hook": """
model[0].weight.register_post_accumulate_grad_hook(lambda p: sys.exit(0))
backward()
""",
    "between backward and step, with more backwards at exit and after": """
class Last:
    def __del__(self):
        backward()
sys.last = Last()
atexit.register(backward)
backward()
""",
}


@pytest.mark.parametrize("ending", cases.ids({k: (v,) for k, v in ENDINGS.items()}))
def test_the_interpreter_ends_cleanly(ending: str) -> None:
    code = f"""
import atexit, sys
import torch, torch_freeze
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
optimizer = torch_freeze.FrozenAwareSGD(
    model.parameters(), 0.1, 0.9, step_in_backward=True, bucket_mb=0
)
def backward(model=model, x=torch.ones(2, 4)):
    optimizer.step()
    model(x).sum().backward()
{ending}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr


@pytest.mark.parametrize("bucket", cases.ids({k: (v,) for k, v in BUCKETS.items()}))
def test_nothing_outlives_model_and_optimizer(bucket: dict[str, Any]) -> None:
    """Whatever became of the last iteration, and whoever goes first."""
    watched: list[weakref.ref[Any]] = []

    def iteration(how: str) -> None:
        model = net()
        optimizer = ordinary(model.parameters(), step_in_backward=True, **bucket)
        model[2].weight.register_post_accumulate_grad_hook(lambda p: None)
        watched.extend(weakref.ref(x) for x in (optimizer, *model.parameters()))
        loss_of(model).backward()
        if how == "finished":
            optimizer.step()
        elif how == "closed in backward":
            optimizer.step()
            model[4].weight.register_hook(lambda g: optimizer.close())
            loss_of(model).backward()
        elif how == "model first":
            del model
        elif how == "optimizer first":
            del optimizer

    for how in ("left", "finished", "closed in backward", "model first", "optimizer first"):
        iteration(how)
        gc.collect()
        assert [ref() for ref in watched] == [None] * len(watched), how


def test_the_table_has_120_cases() -> None:
    assert len(CASES) >= 120
