"""What training loops add to a step, crossed with a frozen set that changes under it.

Every loop runs with an optimizer here over all parameters, and the result is compared to the bit
with torch's own, whose frozen parameters have no gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as rates
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from tests.helpers import optim_cases as cases
from tests.helpers.models import weights
from tests.helpers.schedulers import SCHEDULERS, STEPS, Scheduler
from torch_freeze import FreezeSchedule, audit, freeze, guard, unfreeze

# Of each optimizer, by its name in cases.FAMILIES; Adam steps as AdamW does.
BASE: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2},
    "AdamW": {"lr": 0.02, "weight_decay": 0.1},
}
each_optimizer = pytest.mark.parametrize("kind", BASE)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)
    )


# Modules frozen from a step on: unfrozen early and late, frozen again, all, and none.
FROZEN_SETS: dict[str, dict[int, list[str]]] = {
    "nothing ever frozen": {0: []},
    "always the same frozen": {0: ["0", "1", "3"]},
    "freed from the output down": {0: ["0", "1", "3"], 4: ["0", "1"], 8: []},
    "frozen from the input up": {0: [], 3: ["0", "1"], 7: ["0", "1", "3"]},
    "rotated": {0: ["0", "1"], 2: ["3"], 4: ["5"], 6: ["0", "1", "5"], 9: ["3"]},
    "everything frozen for a while": {0: [], 4: ["0", "1", "3", "5"], 7: []},
}


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Loop:
    """What a loop does in addition to forward, backward and step."""

    scheduler: Scheduler | None = None
    accumulate: int = 1
    clip: Callable[[list[nn.Parameter]], object] | None = None
    scaler: bool = False
    overflow_at: tuple[int, ...] = ()
    average: Callable[[nn.Module], AveragedModel] | None = None
    hyper: dict[str, dict[str, Any]] = field(default_factory=dict)  # of an optimizer, by its name


def clip_norm(parameters: list[nn.Parameter]) -> Tensor:
    return nn.utils.clip_grad_norm_(parameters, 0.5)


def clip_value(parameters: list[nn.Parameter]) -> None:
    nn.utils.clip_grad_value_(parameters, 0.05)


LOOPS: dict[str, Loop] = {
    "a bare loop": Loop(),
    "accumulation over 3": Loop(accumulate=3),
    "clip_grad_norm_": Loop(clip=clip_norm),
    "clip_grad_value_": Loop(clip=clip_value),
    "GradScaler": Loop(scaler=True),
    "GradScaler with overflows": Loop(scaler=True, overflow_at=(0, 4, 8)),
    "GradScaler, clip_grad_norm_ and accumulation": Loop(
        scaler=True, clip=clip_norm, accumulate=2, overflow_at=(3,)
    ),
    "an average of weights": Loop(average=AveragedModel),
    "an exponential average": Loop(
        average=lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ),
    "an exponential average with buffers": Loop(
        average=lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    ),
    "nesterov or amsgrad, OneCycleLR, clipping, accumulation and an average": Loop(
        scheduler=SCHEDULERS["OneCycleLR"],
        accumulate=2,
        clip=clip_norm,
        average=AveragedModel,
        hyper={"SGD": {"nesterov": True}, "AdamW": {"amsgrad": True}},
    ),
}


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 6, generator=generator) for _ in range(4 * STEPS)]


def set_frozen(model: nn.Module, frozen: list[str]) -> None:
    unfreeze(model)
    if frozen:
        freeze(model, *frozen)


def groups(model: nn.Sequential) -> list[dict[str, Any]]:
    """Two groups, so that schedulers have two rates; at times each is frozen in part."""
    low = [*model[0].parameters(), *model[1].parameters()]
    high = [*model[3].parameters(), *model[5].parameters()]
    return [{"params": low, "lr": 0.02}, {"params": high}]


def hyper(loop: Loop, kind: str) -> dict[str, Any]:
    return BASE[kind] | loop.hyper.get(kind, {})


def run(loop: Loop, plan: dict[int, list[str]], kind: str, stock: bool = False) -> dict[str, Any]:
    model = make_model()
    family = cases.FAMILIES[kind]
    # Stock knows only from missing gradients what is frozen; foreach=False is its reference.
    optimizer: torch.optim.Optimizer
    if stock:
        optimizer = family.stock(groups(model), **hyper(loop, kind), foreach=False)
    else:
        optimizer = family.ours(groups(model), **hyper(loop, kind))
    scheduler = loop.scheduler(optimizer) if loop.scheduler else None
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=loop.scaler)
    average = loop.average(model) if loop.average else None
    data = iter(batches())
    history: dict[str, list[Any]] = {"loss": [], "rate": [], "scale": []}
    for step in range(STEPS):
        if step in plan:
            set_frozen(model, plan[step])
        model.train()
        optimizer.zero_grad()
        anything = any(p.requires_grad for p in model.parameters())
        for _ in range(loop.accumulate):
            loss = model(next(data)).square().mean() / loop.accumulate
            if anything:
                scaler.scale(loss).backward()
        live = [p for p in model.parameters() if p.grad is not None]
        if step in loop.overflow_at and live:
            live[0].grad[0] = torch.inf  # type: ignore[index]
        if loop.clip is not None and live:  # without gradients both raise or have nothing to do
            scaler.unscale_(optimizer)
            loop.clip(list(model.parameters()))
        if live or not loop.scaler:  # a GradScaler wants at least one gradient
            scaler.step(optimizer)
            scaler.update()
        if scheduler is not None:
            plateau = isinstance(scheduler, rates.ReduceLROnPlateau)
            scheduler.step(*([1.0] if plateau else []))
        if average is not None:
            average.update_parameters(model)
        history["loss"].append(loss.item())
        history["rate"].append([g["lr"] for g in optimizer.param_groups])
        history["scale"].append(scaler.get_scale())
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        **history,
        "weights": weights(model),
        "state": {
            f"{key} of {names[id(p)]}": value
            for p, state in optimizer.state.items()
            for key, value in state.items()
            if value is not None
        },
        "average": dict(average.state_dict()) if average is not None else {},
        "rates' state": scheduler.state_dict() if scheduler is not None else None,
    }


def assert_identical(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in ("loss", "rate", "scale"):
        assert got[key] == wanted[key], key
    for key in ("weights", "state", "average"):
        assert got[key].keys() == wanted[key].keys()
        for name, tensor in wanted[key].items():
            assert torch.equal(got[key][name], tensor), f"{key} of {name}"


@each_optimizer
@pytest.mark.parametrize("plan", FROZEN_SETS.values(), ids=FROZEN_SETS)
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_a_loop_has_the_bits_of_stock(loop: Loop, plan: dict[int, list[str]], kind: str) -> None:
    assert_identical(run(loop, plan, kind), run(loop, plan, kind, stock=True))


@each_optimizer
@pytest.mark.parametrize("plan", FROZEN_SETS.values(), ids=FROZEN_SETS)
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_learning_rate_scheduler_never_notices_the_frozen_set(
    scheduler: Scheduler, plan: dict[int, list[str]], kind: str
) -> None:
    loop = Loop(scheduler=scheduler)
    got = run(loop, plan, kind)
    assert_identical(got, run(loop, plan, kind, stock=True))
    assert got["rate"] == run(loop, FROZEN_SETS["nothing ever frozen"], kind)["rate"]
    assert len({tuple(lrs) for lrs in got["rate"]}) > 1


@each_optimizer
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_what_is_frozen_is_left_alone_by_a_loop(loop: Loop, kind: str) -> None:
    """No element is written, whatever weight decay, momentum, clipping and overflows there are."""
    model = make_model()
    optimizer = cases.FAMILIES[kind].ours(groups(model), **hyper(loop, kind))
    scheduler = loop.scheduler(optimizer) if loop.scheduler else None
    scaler = torch.amp.GradScaler("cpu", enabled=loop.scaler)
    data = iter(batches())
    for frozen in ([], ["0", "1"], ["3"]):
        set_frozen(model, frozen)
        with guard(model, content=True):
            for _ in range(2):
                model.train()
                for _ in range(loop.accumulate):
                    scaler.scale(model(next(data)).square().mean()).backward()
                if loop.clip is not None:
                    scaler.unscale_(optimizer)
                    loop.clip(list(model.parameters()))
                scaler.step(optimizer)
                scaler.update()
                if scheduler is not None:
                    scheduler.step()
                optimizer.zero_grad()


def test_clip_grad_norm_counts_what_trains_and_nothing_else() -> None:
    model = make_model()
    model(torch.ones(4, 6)).square().sum().backward()
    freeze(model, "0", "1", "3")
    total = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    of_head = torch.linalg.vector_norm(
        torch.cat([p.grad.flatten() for p in model[5].parameters() if p.grad is not None])
    )
    torch.testing.assert_close(total, of_head)


@each_optimizer
@pytest.mark.parametrize("at", range(1, STEPS, 2))
@pytest.mark.parametrize("name", ["OneCycleLR", "SequentialLR", "CosineAnnealingWarmRestarts"])
def test_a_run_resumed_in_the_middle_goes_on_bit_for_bit(name: str, at: int, kind: str) -> None:
    """Model, optimizer, rates and FreezeSchedule through state_dicts, at every second step."""
    plan = FROZEN_SETS["rotated"]

    def build() -> tuple[Any, ...]:
        model = make_model()
        optimizer = cases.FAMILIES[kind].ours(groups(model), **BASE[kind])
        schedule = FreezeSchedule(model, plan, unit="step")
        return model, optimizer, SCHEDULERS[name](optimizer), schedule

    def go(parts: tuple[Any, ...], steps: range) -> None:
        model, optimizer, scheduler, schedule = parts
        for step in steps:
            schedule.step()
            model.train()
            optimizer.zero_grad()
            model(batches()[step]).square().mean().backward()
            optimizer.step()
            scheduler.step()

    whole = build()
    go(whole, range(STEPS))
    first = build()
    go(first, range(at))
    saved = copy.deepcopy([part.state_dict() for part in first])
    second = build()
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    go(second, range(at, STEPS))
    for key, tensor in whole[0].state_dict().items():
        assert torch.equal(second[0].state_dict()[key], tensor), key
    assert second[2].state_dict().keys() == whole[2].state_dict().keys()
    assert second[2].get_last_lr() == whole[2].get_last_lr()


def test_update_bn_wants_the_average_unfrozen() -> None:
    """The copy's norms are held like the model's: torch resets them, and nothing refills them."""
    model = make_model()
    freeze(model, "0", "1")
    average = AveragedModel(model)
    data = [torch.randn(16, 6) + 3]
    update_bn(data, average)
    norm = average.module[1]
    assert torch.equal(norm.running_mean, torch.zeros(8))
    unfreeze(average)
    update_bn(data, average)
    torch.testing.assert_close(norm.running_mean, average.module[0](data[0]).mean(0))
    assert not model[1].training


@pytest.mark.parametrize("fused", [False, True], ids=["foreach=False", "fused"])
def test_adamw_over_all_parameters_holds_what_is_frozen_and_trains_what_is_freed(
    fused: bool,
) -> None:
    """What the README says of other optimizers: the freeze API does not need ours."""
    options: dict[str, Any] = {"fused": True} if fused else {"foreach": False}
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1, **options)
    head = copy.deepcopy(model[3:])
    alone = torch.optim.AdamW(head.parameters(), lr=0.05, weight_decay=0.1, **options)
    freeze(model, "0", "1")
    for step in range(STEPS):
        batch = torch.randn(8, 6)
        if step == STEPS // 2:
            unfreeze(model, "0")
            assert model[0].weight not in optimizer.state
            late = copy.deepcopy(model[0])
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        if step < STEPS // 2:
            with guard(model, content=True):
                optimizer.step()
            alone.zero_grad()
            head(model[:3](batch).detach()).square().mean().backward()
            alone.step()
            for ours, theirs in zip(model[3:].parameters(), head.parameters(), strict=True):
                assert torch.equal(ours, theirs)
        else:
            optimizer.step()
        if step == STEPS // 2:
            # Unfrozen late, a parameter makes the same first step as in a new optimizer.
            for p, grad in zip(late.parameters(), model[0].parameters(), strict=True):
                p.grad = grad.grad
            torch.optim.AdamW(late.parameters(), lr=0.05, weight_decay=0.1, **options).step()
            for ours, theirs in zip(model[0].parameters(), late.parameters(), strict=True):
                assert torch.equal(ours, theirs)


def test_adamw_moves_what_is_frozen_by_hand_with_a_gradient_and_audit_says_so() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model(torch.randn(8, 6)).square().mean().backward()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    kinds = {finding.kind for finding in audit(model, optimizer) if finding.level == "error"}
    optimizer.step()
    assert kinds == {"stale gradient"}
    assert not torch.equal(model[0].weight, before)
