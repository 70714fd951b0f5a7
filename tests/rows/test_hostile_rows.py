"""Frozen rows under unusual use: nothing is lost, doubled, stale or half done."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from torch_freeze import freeze, freeze_except, guard, unfreeze
from torch_freeze.rows import _owners

from .test_training import APART, VOCAB, WIDTH, Net

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(VOCAB)


def frozen_net() -> Net:
    """The table's rows APART train, and nothing else."""
    model = Net()
    freeze_except(model, "embed.weight", rows=APART)
    return model.eval()


def live_of(model: Net) -> nn.Parameter:
    live: nn.Parameter = model.embed.live_rows.weight
    return live


def move_live(model: Net) -> None:
    """Change the live rows as an optimizer does."""
    with torch.no_grad():
        live_of(model).add_(torch.arange(WIDTH) + 1.0)


# --- writes into the table ------------------------------------------------------------------------


def _all_of(state: dict[str, Tensor], act: Callable[[Tensor], Any]) -> None:
    for value in state.values():
        if value.is_floating_point():
            act(value)


def _assign_data(model: Net) -> None:
    model.embed.weight.data = model.embed.weight.data * 0.5


def _assign_each(model: Net) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5


# Ways to halve the whole table (and perhaps everything else), each of which counts once.
WRITES: dict[str, Callable[[Net], Any]] = {
    "data, in place": lambda m: m.embed.weight.data.mul_(0.5),
    "data, by row": lambda m: m.embed.weight.data.__setitem__(
        slice(None), Net().embed.weight * 0.5
    ),
    "data of the tied head": lambda m: m.head.weight.data.mul_(0.5),
    "other data": _assign_data,
    "in place": lambda m: m.embed.weight.mul_(0.5),
    "in place, twice": lambda m: m.embed.weight.mul_(0.25).mul_(2),
    "with an operator": lambda m: m.embed.weight.__itruediv__(2),
    "copy_": lambda m: m.embed.weight.copy_(m.embed.weight * 0.5),
    "a view": lambda m: m.embed.weight.view(-1).mul_(0.5),
    "foreach": lambda m: torch._foreach_mul_([m.embed.weight], 0.5),
    "detached": lambda m: m.embed.weight.detach().mul_(0.5),
    "out": lambda m: torch.mul(Net().embed.weight, 0.5, out=m.embed.weight),
    "values of a state_dict": lambda m: _all_of(
        {"": m.state_dict()["embed.weight"]}, lambda v: v.mul_(0.5)
    ),
    "each parameter": lambda m: [p.mul_(0.5) for p in m.parameters()],
    "each parameter, in two steps": lambda m: [p.mul_(0.25).mul_(2) for p in m.parameters()],
    "each parameter's data": lambda m: [p.data.mul_(0.5) for p in m.parameters()],
    "each parameter's data, in two steps": lambda m: [
        (p.data.mul_(0.25), p.data.mul_(2)) for p in m.parameters()
    ],
    "other data for each": _assign_each,
    "all parameters, foreach": lambda m: torch._foreach_mul_(list(m.parameters()), 0.5),
    "one vector of all": lambda m: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(m.parameters()) * 0.5, m.parameters()
    ),
}


@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_into_the_table_counts_once(write: str) -> None:
    model, expected = frozen_net(), Net().embed.weight.detach() * 0.5
    with torch.no_grad():
        WRITES[write](model)
    torch.testing.assert_close(model.embed.weight.detach(), expected)
    out = model.embed(IDS)
    torch.testing.assert_close(out.detach(), expected)
    # The live rows have it, too, and train from there.
    torch.testing.assert_close(live_of(model).detach(), expected[APART])
    out.sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    expected[APART] -= 1
    torch.testing.assert_close(model.embed.weight.detach(), expected)


INITS: dict[str, Callable[[Tensor], Any]] = {
    "normal_": nn.init.normal_,
    "uniform_": nn.init.uniform_,
    "trunc_normal_": nn.init.trunc_normal_,
    "constant_": lambda w: nn.init.constant_(w, 3.0),
    "zeros_": nn.init.zeros_,
    "eye_": nn.init.eye_,
    "xavier_uniform_": nn.init.xavier_uniform_,
    "kaiming_normal_": nn.init.kaiming_normal_,
    "orthogonal_": nn.init.orthogonal_,
}


@pytest.mark.parametrize("init", INITS)
def test_an_initialized_table_is_as_a_plain_one(init: str) -> None:
    model, plain = frozen_net(), Net()
    for each in (model, plain):
        torch.manual_seed(5)
        INITS[init](each.embed.weight)
    assert torch.equal(model.embed.weight.detach(), plain.embed.weight)
    model.embed(IDS)
    assert torch.equal(live_of(model), plain.embed.weight[APART])


@pytest.mark.parametrize("way", ["an optimizer's step", "a deep copy", "unfreeze", "a pickle"])
def test_what_is_written_is_not_lost_without_a_forward(way: str) -> None:
    model = frozen_net()
    model.embed.weight.data[2] = 7.0
    if way == "an optimizer's step":
        live_of(model).grad = torch.ones_like(live_of(model))
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        assert torch.equal(model.embed.weight[2], torch.full((WIDTH,), 6.0))
        return
    if way == "a deep copy":
        model = copy.deepcopy(model)
        assert torch.equal(live_of(model)[0], torch.full((WIDTH,), 7.0))
    elif way == "unfreeze":
        unfreeze(model, "embed")
    else:
        model = pickle.loads(pickle.dumps(model))
    assert torch.equal(model.embed.weight[2], torch.full((WIDTH,), 7.0))


def test_an_average_over_state_dicts() -> None:
    """As timm and YOLO keep it: in place, into the values of the average's state_dict."""
    model, plain = frozen_net(), Net().eval()
    averages = [copy.deepcopy(model), copy.deepcopy(plain)]
    for _ in range(3):
        move_live(model)
        plain.load_state_dict(model.state_dict())
        for average, source in zip(averages, (model, plain), strict=True):
            values = source.state_dict()
            for key, value in average.state_dict().items():
                if value.is_floating_point():
                    value.mul_(0.5).add_(values[key].detach(), alpha=0.5)
    for a, b in zip(*(each(IDS) for each in averages), strict=True):
        torch.testing.assert_close(a, b)


def test_the_guard_allows_writes_into_live_rows() -> None:
    model = frozen_net()
    with guard(model):
        model.embed.weight.data[2] = 7.0
    with pytest.raises(RuntimeError, match=r"embed.weight \("), guard(model):
        model.embed.weight.data[3] = 7.0


# --- reads ----------------------------------------------------------------------------------------


READS: dict[str, Callable[[Tensor], Tensor]] = {
    "type": lambda w: w.type(torch.float64),
    "type_as": lambda w: w.type_as(torch.zeros((), dtype=torch.float64)),
    "foreach": lambda w: torch._foreach_mul([w], 2.0)[0],
    "foreach norm": lambda w: torch._foreach_norm([w])[0],
    "private": lambda w: torch._weight_norm(w, torch.ones(VOCAB, 1), 0),
    "iteration": lambda w: torch.stack(list(w)),
    "unbind": lambda w: torch.stack(w.unbind()),
}


@pytest.mark.parametrize("read", READS)
def test_reads_see_the_live_rows_and_give_them_gradients(read: str) -> None:
    model, plain = frozen_net(), Net()
    move_live(model)
    with torch.no_grad():
        plain.embed.weight[APART] = live_of(model)
    results = [READS[read](each.embed.weight) for each in (model, plain)]
    torch.testing.assert_close(*results)
    for out in results:
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert plain.embed.weight.grad is not None
    torch.testing.assert_close(live_of(model).grad, plain.embed.weight.grad[APART])


def test_a_change_before_backward_is_an_error_for_any_use() -> None:
    """Otherwise the input's gradient would be that of the new values."""
    model = frozen_net()
    x = torch.randn(3, WIDTH, requires_grad=True)
    out = (x @ model.embed.weight.T).sum()
    move_live(model)
    model.embed(IDS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


# --- memory ---------------------------------------------------------------------------------------


def test_a_deleted_model_leaves_nothing() -> None:
    gc.collect()
    gc.disable()
    try:
        model = frozen_net()
        model(IDS).sum().backward()
        parts = [model.embed.weight, live_of(model), model.embed.live_rows, model.embed, model.head]
        alive = [weakref.ref(part) for part in parts]
        del model, parts
        assert [ref() for ref in alive] == [None] * 5
    finally:
        gc.enable()


def test_many_rounds_leave_nothing() -> None:
    model = Net()
    # A step of any optimizer tidies up what other tests left.
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1).step()
    before = len(_global_optimizer_pre_hooks), len(_owners._expected)
    for row in range(100):
        freeze(model, "embed.weight", rows=[row % VOCAB])
        assert len(_owners._expected) <= before[1] + 1
        unfreeze(model, "embed.weight")
    assert list(model.embed.children()) == []
    assert vars(model.embed.weight) == {}
    freeze_except(model, "embed.weight", rows=APART)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(IDS).sum().backward()
        optimizer.step()
    assert (len(_global_optimizer_pre_hooks), len(_owners._expected)) <= before
