"""Accelerate: prepared optimizers, accumulation and checkpoints, with a frozen set that changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from tests.helpers import optim_cases as cases  # noqa: E402
from torch_freeze import FreezeSchedule  # noqa: E402

PLAN = {0: ["0", "1"], 2: ["0"], 4: []}
STEPS = 6
# Of each optimizer, by its name in cases.FAMILIES.
HYPER: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9},
    "AdamW": {"lr": 0.02, "weight_decay": 0.1},
}
each_optimizer = pytest.mark.parametrize("kind", HYPER)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()
    yield
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def batches(step: int) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))


def build(kind: str, accumulate: int = 1) -> tuple[Any, ...]:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = make_model()
    optimizer = cases.FAMILIES[kind].ours(model.parameters(), **HYPER[kind])
    rates = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    schedule = FreezeSchedule(model, PLAN, unit="step")
    accelerator.register_for_checkpointing(schedule)
    return (accelerator, *accelerator.prepare(model, optimizer, rates), schedule)


def go(parts: tuple[Any, ...], steps: range) -> None:
    accelerator, model, optimizer, rates, schedule = parts
    for step in steps:
        schedule.step()
        model.train()
        for micro in range(accelerator.gradient_accumulation_steps):
            with accelerator.accumulate(model):
                loss = model(batches(10 * step + micro)).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()


def plain(kind: str, accumulate: int) -> nn.Module:
    model = make_model()
    optimizer = cases.FAMILIES[kind].ours(model.parameters(), **HYPER[kind])
    rates = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    schedule = FreezeSchedule(model, PLAN, unit="step")
    for step in range(STEPS):
        schedule.step()
        model.train()
        for micro in range(accumulate):
            (model(batches(10 * step + micro)).square().mean() / accumulate).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
    return model


@each_optimizer
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_prepared_loop_equals_a_plain_one(accumulate: int, kind: str) -> None:
    parts = build(kind, accumulate)
    go(parts, range(STEPS))
    for got, wanted in zip(
        parts[1].parameters(), plain(kind, accumulate).parameters(), strict=True
    ):
        assert torch.equal(got, wanted)


@each_optimizer
@pytest.mark.parametrize("at", range(1, STEPS))
def test_a_saved_state_resumes_in_the_middle_of_the_schedule(
    tmp_path: Path, at: int, kind: str
) -> None:
    first = build(kind)
    go(first, range(at))
    first[0].save_state(str(tmp_path))
    second = build(kind)
    second[0].load_state(str(tmp_path))
    assert second[-1].last == at - 1
    go(second, range(at, STEPS))
    for got, wanted in zip(second[1].parameters(), plain(kind, 1).parameters(), strict=True):
        assert torch.equal(got, wanted)
