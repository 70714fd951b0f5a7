"""Several backwards, optimizers and threads, checkpoints, autograd's modes; see hostile_use.py."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.hostile_use import (
    Case,
    Make,
    Table,
    both_tests,
    data,
    is_ordinary,
    loss_of,
    net,
    result,
    train,
)
from tests.helpers.optim_cases import FrozenAwareSGD

CASES = Table(__name__)


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


@CASES.case("two optimizers in turns, the critic frozen for the generator's backward")
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


@CASES.case(
    "two optimizers in turns, a backward of one through the other's", error=r"Call step\(\) first"
)
def gan_unfrozen(make: Make) -> Any:
    return gan(make, lambda model, trains: None, lambda optimizer: optimizer.zero_grad())


@CASES.case("two optimizers in turns, with module.zero_grad()", error="second")
def gan_module_zero(make: Make) -> Any:
    def zero(optimizer: FrozenAwareSGD) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None

    return gan(make, lambda model, trains: None, zero)


@CASES.case("two optimizers over one backward")
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


@CASES.case("one in backward and a stock optimizer over the rest")
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


@CASES.case("a second backward that reads what the first has changed", error="second backward")
def second_backward(make: Make) -> Any:
    """Its gradients go to other parameters, but its forward pass uses the same ones."""
    model = net()
    optimizer = make(model.parameters())
    loss_of(model[:4]).backward()
    model[:4].requires_grad_(False)
    loss_of(model).backward()
    model[:4].requires_grad_(True)
    optimizer.step()
    return result(model, optimizer)


@CASES.case("gradient accumulation after ordinary iterations", error="second")
def accumulation_later(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer)
    for step in range(4):
        loss_of(model, step).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()


@CASES.case("a gradient that was there before the optimizer")
def gradient_before(make: Make) -> Any:
    model = net()
    loss_of(model, 7).backward()
    optimizer = make(model.parameters())
    loss_of(model, 8).backward()
    optimizer.step()
    return result(model, optimizer)


@CASES.case("backward(inputs=)")
def backward_inputs(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward(inputs=[model[0].weight, model[4].bias])
        optimizer.step()
    return result(model, optimizer)


@CASES.case("torch.autograd.grad, and gradients set by hand")
def autograd_grad(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    for step in range(3):
        params = list(model.parameters())
        for p, g in zip(params, torch.autograd.grad(loss_of(model, step), params), strict=True):
            p.grad = g
        optimizer.step()
    return result(model, optimizer)


@CASES.case(
    "a gradient set by hand where it had been applied", error="was set between backward and step"
)
def set_after_applied(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    loss_of(model).backward()
    model[4].weight.grad = torch.ones(6, 6)
    optimizer.step()


@CASES.case("a gradient penalty, by double backward within the loss")
def gradient_penalty(make: Make) -> Any:
    model = net()

    def loss(model: nn.Module, step: int) -> Tensor:
        x = data(step).requires_grad_()
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return ((g.norm(dim=1) - 1) ** 2).mean() + loss_of(model, step)

    return train(model, make(model.parameters()), loss=loss)


@CASES.case("retain_graph=True, and no second backward")
def retain_graph(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward(retain_graph=True)
        optimizer.step()
    return result(model, optimizer)


@CASES.case(
    "weights read by a graph that has not run yet", error="modified by an inplace operation"
)
def stale_graph(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    if is_ordinary(make):
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


CASES.enter(_checkpoint_cases())


@CASES.case("reentrant checkpoints of everything, one in another")
def nested_checkpoints(make: Make) -> Any:
    model = net()

    def outer(x: Tensor) -> Tensor:
        x = checkpoint(model[:4], x, use_reentrant=True)
        return checkpoint(model[4:], x, use_reentrant=True)

    def loss(_: nn.Module, step: int) -> Tensor:
        x = data(step).requires_grad_()
        return (checkpoint(outer, x, use_reentrant=True) ** 2).sum()

    return train(model, make(model.parameters()), loss=loss)


@CASES.case("saved tensors on the CPU")
def saved_on_cpu(make: Make) -> Any:
    model = net()

    def loss(model: nn.Module, step: int) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return loss_of(model, step)

    return train(model, make(model.parameters()), loss=loss)


@CASES.case("anomaly mode")
def anomaly(make: Make) -> Any:
    warnings.simplefilter("ignore")
    with torch.autograd.detect_anomaly():
        model = net()
        return train(model, make(model.parameters()))


@CASES.case("the profiler on")
def profiler(make: Make) -> Any:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        model = net()
        return train(model, make(model.parameters()))


@CASES.case("a dispatch mode around training")
def dispatch_mode(make: Make) -> Any:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        model = net()
        return train(model, make(model.parameters()))


@CASES.case("backward in several threads at once, each a model of its own")
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


@CASES.case("backward in another thread than step")
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


@CASES.case("functional_call with other tensors in the place of parameters")
def functional_call(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())

    def loss(model: nn.Module, step: int) -> Tensor:
        doubled = {name: p * 2 for name, p in model.named_parameters()}
        return (torch.func.functional_call(model, doubled, data(step)) ** 2).sum()

    return train(model, optimizer, loss=loss)


@CASES.case("per-sample gradients by torch.func beside")
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


(
    test_hostile_use_gives_the_ordinary_steps_bits_or_an_error,
    test_the_ordinary_step_raises_only_where_nobody_can_step,
) = both_tests(CASES)
