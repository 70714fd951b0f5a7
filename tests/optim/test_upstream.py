"""Upstream's own bar: the inputs and error inputs that torch ships for its optimizer tests."""

from __future__ import annotations

import functools
import os
import sys
import types
import unittest
import warnings
from typing import Any

import pytest
import torch

from tests.helpers import optim_cases as cases


def _load() -> Any:
    """`torch.testing._internal.common_optimizers`, and torch's settings as they were before it.

    Importing it freezes torch.backends' flags and reads sys.argv. It needs `expecttest` only as a
    base class of test cases that are not run here, so an empty one does where it is not installed.
    """
    argv, environ = sys.argv, dict(os.environ)
    stub = types.ModuleType("expecttest")
    stub.TestCase = unittest.TestCase
    stub.ACCEPT = False
    stubbed = sys.modules.setdefault("expecttest", stub) is stub
    sys.argv = argv[:1]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.testing._internal import common_optimizers
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environ)
        torch.backends.__allow_nonbracketed_mutation_flag = True
        if stubbed:
            del sys.modules["expecttest"]
    return common_optimizers


try:
    upstream = _load()
    INFOS = {
        name: next(info for info in upstream.optim_db if info.optim_cls is family.stock)
        for name, family in cases.FAMILIES.items()
    }
except (ImportError, StopIteration, AttributeError) as error:
    pytest.skip(
        f"torch.testing._internal.common_optimizers of torch {torch.__version__} cannot be used: "
        f"{error!r}",
        allow_module_level=True,
    )


def _inputs(families: dict[str, cases.Family] = cases.FAMILIES, device: str = "cpu") -> list[Any]:
    """(family, keyword arguments) for each of upstream's inputs."""
    return cases.per_family(
        lambda family: {
            item.desc: dict(item.kwargs) for item in _info(family).optim_inputs_func(device=device)
        },
        families,
    )


def _inputs_by_device() -> list[Any]:
    """(family, keyword arguments, device): there are more for CUDA, such as `capturable`."""
    return [
        pytest.param(*item.values, device, id=f"{item.id}, {device}", marks=marks)
        for device, marks in (("cpu", ()), ("cuda", pytest.mark.gpu))
        for item in _inputs(device=device)
    ]


def _info(family: cases.Family) -> Any:
    return next(INFOS[name] for name, known in cases.FAMILIES.items() if known is family)


def _clone(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}


IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "unset": {},
    "foreach=True": {"foreach": True},
    "foreach=False": {"foreach": False},
    "fused=True": {"fused": True},
}


@pytest.mark.parametrize("family", cases.each_family())
def test_every_implementation_upstream_knows_is_covered(family: cases.Family) -> None:
    """A new flag of torch needs a case here."""
    known = {"foreach", "fused", "differentiable"}
    assert set(_info(family).supported_impls) == known
    options = family.ours([torch.ones(1)]).defaults.keys()
    for item in _info(family).optim_inputs_func(device="cuda"):
        assert item.kwargs.keys() <= options


@pytest.mark.parametrize("dtype", cases.ids(cases.WIDE_DTYPES))
@pytest.mark.parametrize("implementation", cases.ids(IMPLEMENTATIONS))
@pytest.mark.parametrize(("family", "kwargs", "device"), _inputs_by_device())
def test_upstreams_inputs_equal_stock(
    family: cases.Family,
    kwargs: dict[str, Any],
    implementation: dict[str, Any],
    dtype: torch.dtype,
    device: str,
) -> None:
    """The small model upstream trains, its parameters frozen and unfrozen on the way."""
    torch.manual_seed(0)
    models = [
        torch.nn.Sequential(
            torch.nn.Linear(1, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1), torch.nn.Sigmoid()
        )
        for _ in range(2)
    ]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model.to(dtype=dtype, device=device)
    optimizer = family.ours(models[0].parameters(), **_clone(kwargs), **implementation)
    stock = family.stock(models[1].parameters(), **_clone(kwargs), foreach=device == "cuda")
    inputs = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=dtype, device=device).reshape(6, 1)
    for step in range(7):
        for model, sgd in zip(models, (optimizer, stock), strict=True):
            model[0].requires_grad_(step not in (3, 4))
            sgd.zero_grad()
            model(inputs).sum().backward()
            sgd.step()
        cases.assert_same_training(
            optimizer,
            stock,
            f"after step {step + 1}:",
            exact=family.exact_on(device, fused=implementation.get("fused", False)),
            # Stock's capturable form corrects the bias in it.
            arithmetic=torch.float32 if kwargs.get("capturable") else None,
        )


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "non-contiguous"])
@pytest.mark.parametrize(("family", "kwargs"), _inputs())
def test_upstreams_inputs_go_in_the_right_direction(
    family: cases.Family, kwargs: dict[str, Any], contiguous: bool
) -> None:
    """Upstream's loop: a weight and a bias under a sum of squares, with a closure, 20 steps."""
    if contiguous:
        weight = torch.nn.Parameter(torch.randn(10, 5, generator=cases.generator(0)))
        bias = torch.nn.Parameter(torch.randn(10, generator=cases.generator(1)))
    else:
        weight = torch.nn.Parameter(torch.randn(10, 5, 2, generator=cases.generator(0))[..., 0])
        bias = torch.nn.Parameter(torch.randn(10, 2, generator=cases.generator(1))[..., 0])
    inputs = torch.randn(5, generator=cases.generator(2))
    optimizer = family.ours([weight, bias], **_clone(kwargs))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight.mv(inputs) + bias).pow(2).sum()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(20):
        optimizer.step(closure)
    if kwargs.get("maximize"):
        assert closure().item() > first
    else:
        assert closure().item() < first


@pytest.mark.parametrize(("family", "kwargs"), _inputs())
def test_upstreams_inputs_leave_parameters_alone_for_zero_gradients(
    family: cases.Family, kwargs: dict[str, Any]
) -> None:
    kwargs = kwargs | {"weight_decay": 0}
    p = torch.nn.Parameter(torch.randn(5, 1, generator=cases.generator(0)))
    before = p.detach().clone()
    optimizer = family.ours([p], **_clone(kwargs))
    p.grad = torch.zeros_like(p)
    optimizer.step()
    cases.assert_same_bits(p, before, "zero gradient")


@pytest.mark.parametrize(("family", "kwargs"), _inputs())
def test_upstreams_inputs_round_trip_through_state_dict_with_hooks(
    family: cases.Family, kwargs: dict[str, Any]
) -> None:
    gen = cases.generator(0)
    ours = cases.make_parameters((3, 70), gen)
    theirs = cases.twin(ours)
    first = family.ours(ours, **_clone(kwargs))
    cases.set_grads(ours, theirs, gen)
    first.step()
    for q, p in zip(theirs, ours, strict=True):
        q.data.copy_(p.data)
    second = family.ours(theirs, **_clone(kwargs))
    heard: list[str] = []
    second.register_load_state_dict_post_hook(lambda _: heard.append("loaded"))
    state = first.state_dict()
    second.load_state_dict(
        {
            "param_groups": state["param_groups"],
            "state": {
                i: {k: v.clone() for k, v in entry.items()} for i, entry in state["state"].items()
            },
        }
    )
    assert heard == ["loaded"]
    for _ in range(3):
        cases.set_grads(ours, theirs, gen)
        first.step()
        second.step()
        cases.assert_same_training(first, second)


def _error_inputs() -> list[Any]:
    return cases.per_family(
        lambda family: {
            item.optimizer_error_input.desc: item
            for item in _info(family).optim_error_inputs_func(device="cpu", dtype=torch.float32)
        }
    )


@pytest.mark.parametrize(("family", "item"), _error_inputs())
def test_upstreams_error_inputs(family: cases.Family, item: Any) -> None:
    given = item.optimizer_error_input
    params = [torch.nn.Parameter(torch.ones(1, 1))] if given.params is None else given.params
    if issubclass(item.error_type, Warning):
        with pytest.warns(item.error_type, match=item.error_regex):
            family.ours(params, **given.kwargs)
        return
    if item.error_on is upstream.OptimizerErrorEnum.STEP_ERROR:
        call = family.ours(params, **given.kwargs).step
    else:
        call = functools.partial(family.ours, params, **given.kwargs)
    with pytest.raises(item.error_type, match=item.error_regex):
        call()


@pytest.mark.parametrize(
    ("family", "kwargs", "index"),
    [
        pytest.param(*item.values, index, id=f"{item.id}, schedulers {index}")
        for item in _inputs(cases.UNLIKE_FAMILIES)
        for index in range(len(_info(item.values[0]).scheduler_inputs))
    ],
)
def test_upstreams_schedulers(family: cases.Family, kwargs: dict[str, Any], index: int) -> None:
    gen = cases.generator(0)
    ours = cases.make_parameters((3, 70), gen)
    theirs = cases.twin(ours)
    optimizer = family.ours(ours, **_clone(kwargs))
    stock = family.stock(theirs, **_clone(kwargs), foreach=False)
    schedules = [
        [make(sgd) for make in _info(family).scheduler_inputs[index]] for sgd in (optimizer, stock)
    ]
    for step in range(12):
        cases.set_grads(ours, theirs, gen)
        for sgd, schedulers in zip((optimizer, stock), schedules, strict=True):
            sgd.step()
            for scheduler in schedulers:
                plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*((1.0,) if plateau else ()))
        cases.assert_same_training(optimizer, stock, f"after step {step + 1}:")
