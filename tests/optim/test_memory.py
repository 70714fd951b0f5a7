"""A steady step allocates nothing; frozen parameters hold no gradient bytes."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.helpers import optim_cases as cases
from tests.helpers.optim_cases import FrozenAwareSGD, Hyper


def _allocated(run: Callable[[], Any]) -> list[int]:
    """Sizes of all CPU tensor allocations during `run`, from the allocator's own reports."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


def _trained(hyper: Hyper, dtype: torch.dtype = torch.float32, count: int = 40) -> Any:
    params = cases.make_parameters([i * 7 for i in range(count)], cases.generator(0), dtype)
    optimizer = FrozenAwareSGD(cases.in_groups(params, 2), **hyper)
    for p in params[::4]:
        p.requires_grad_(False)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    return optimizer, params


def test_the_allocations_are_seen() -> None:
    """Checks the measure itself: stock with decay makes temporaries, which have to show."""
    p = torch.nn.Parameter(torch.ones(1000))
    p.grad = torch.ones(1000)
    stock = torch.optim.SGD([p], lr=0.1, momentum=0.9, weight_decay=0.1)
    stock.step()
    assert 4000 in _allocated(stock.step)


@pytest.mark.parametrize("dtype", cases.ids(cases.DTYPES))
@pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
def test_a_steady_step_allocates_no_tensor_memory(hyper: Hyper, dtype: torch.dtype) -> None:
    optimizer, _ = _trained(hyper, dtype)
    assert _allocated(optimizer.step) == []


def test_a_step_that_drops_frozen_gradients_allocates_nothing() -> None:
    optimizer, params = _trained(cases.SOME_HYPERS["momentum"])
    for p in params:
        p.grad = torch.ones_like(p)
    assert _allocated(optimizer.step) == []


@pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
def test_a_first_step_allocates_its_buffers_and_nothing_else(hyper: Hyper) -> None:
    params = cases.make_parameters((100, 200, 300), cases.generator(0))
    optimizer = FrozenAwareSGD(params, **hyper)
    for p in params:
        p.grad = torch.ones_like(p)
    sizes = sorted(_allocated(optimizer.step))
    assert sizes == ([400, 800, 1200] if hyper.get("momentum") else [])


def test_an_overflowing_step_keeps_no_buffers() -> None:
    optimizer, _ = _trained({"lr": 0.1})
    for group in optimizer.param_groups:
        group["momentum"] = 0.9
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("set_to_none", [True, False], ids=["to None", "to zero"])
def test_zero_grad_allocates_nothing(set_to_none: bool) -> None:
    optimizer, params = _trained(cases.SOME_HYPERS["momentum"])
    for p in params:
        p.grad = torch.ones_like(p)
    assert _allocated(lambda: optimizer.zero_grad(set_to_none)) == []


def _python_bytes(run: Callable[[], Any]) -> tuple[int, int]:
    """Bytes of Python objects that one `run` adds at its peak, and that 100 of them leave behind.

    The least of three measurements, since other threads of the process are counted too.
    """
    peaks, left = [], []
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(3):
            run()
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            run()
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
            for _ in range(100):
                run()
            left.append(tracemalloc.get_traced_memory()[0] - before)
    finally:
        tracemalloc.stop()
        gc.enable()
    return min(peaks), min(left)


@pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
def test_a_steady_step_makes_no_python_object_per_parameter(hyper: Hyper) -> None:
    """For 161 trainable and 40 frozen parameters, it takes less than 8 bytes for each of them."""
    optimizer, _ = _trained(hyper, count=201)
    peak, left = _python_bytes(optimizer.step)
    assert peak < 8 * 161
    assert left < 100, "less than a byte per call"


def test_zero_grad_makes_no_python_object_per_parameter() -> None:
    optimizer, _ = _trained(cases.SOME_HYPERS["momentum"], count=201)
    peak, left = _python_bytes(lambda: optimizer.zero_grad(set_to_none=False))
    assert peak < 8 * 161
    assert left < 100, "less than a byte per call"


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
def test_no_gradient_bytes_on_frozen_parameters_after_a_step(hyper: Hyper, device: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(4))).to(device)
    optimizer = FrozenAwareSGD(model.parameters(), **hyper)
    for freeze in (False, True, False, True):
        optimizer.zero_grad()
        model(torch.ones(2, 32, device=device)).sum().backward()
        for layer in list(model)[:3]:
            layer.requires_grad_(not freeze)
        optimizer.step()
        held = sum(
            p.grad.nbytes for p in model.parameters() if not p.requires_grad and p.grad is not None
        )
        assert held == 0
        assert all(p.grad is not None for p in model[3].parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
def test_a_steady_step_allocates_no_device_memory(hyper: Hyper) -> None:
    params = cases.make_parameters((5, 7000, 0, 33), cases.generator(0), device="cuda")
    optimizer = FrozenAwareSGD(params, **hyper)
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(3):
        optimizer.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
