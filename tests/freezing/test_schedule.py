"""Freeze schedules, and resuming in the middle of one."""

from __future__ import annotations

import copy
import cProfile
import io
import json
import math
import pickle
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from tests.helpers import optim_cases as cases
from tests.helpers.models import chain, trains
from torch_freeze import (
    FreezeSchedule,
    FrozenAwareSGD,
    export_schedule,
    freeze,
    freeze_out,
    gradual_unfreeze,
    read_schedule,
    report,
    rotate,
)
from torch_freeze._hold import held_by

# Of each optimizer, by its name in cases.FAMILIES.
HYPER: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "weight_decay": 0.01},
    "AdamW": {"weight_decay": 0.1, "amsgrad": True},
}
each_optimizer = pytest.mark.parametrize("kind", HYPER)


def run(schedule: FreezeSchedule, model: nn.Module, units: int) -> list[list[bool]]:
    seen = []
    for _ in range(units):
        schedule.step()
        seen.append(trains(model))
    return seen


# --- what each schedule does ---------------------------------------------------------------------

T, F = True, False


def test_each_entry_is_what_is_frozen_from_there_on() -> None:
    model = chain(3)
    schedule = FreezeSchedule(model, {2: [], 0: ["0", "1"], 1: "0"})
    assert run(schedule, model, 4) == [[F, F, T], [F, T, T], [T, T, T], [T, T, T]]


def test_before_the_first_entry_nothing_changes() -> None:
    model = chain(2)
    freeze(model, "1")
    schedule = FreezeSchedule(model, {2: ["0"]})
    assert run(schedule, model, 3) == [[T, F], [T, F], [F, F]]


def test_parameters_that_no_entry_names_stay_as_they_are() -> None:
    model = chain(3)
    freeze(model, "2")
    schedule = FreezeSchedule(model, {0: ["0"], 1: ["1"]})
    assert run(schedule, model, 2) == [[F, T, F], [T, F, F]]


def test_step_returns_whether_anything_changed() -> None:
    model = chain(3)
    schedule = FreezeSchedule(model, {0: ["0"], 2: ["0"], 3: []})
    assert [schedule.step() for _ in range(5)] == [True, False, False, True, False]
    assert schedule.last == 4


def test_norms_follow_the_schedule() -> None:
    model = chain(2, norm=True)
    for how, held in ((True, [True, False]), (False, [False, False])):
        schedule = FreezeSchedule(model, {0: ["0", "1"], 1: []}, hold_norm=how)
        for expected in held:
            schedule.step()
            model.train()
            assert (held_by(model[1]) is not None) == expected == (not model[1].training)


def test_a_norm_without_parameters_follows_the_schedule() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)))
    model.append(nn.Linear(2, 2))
    schedule = FreezeSchedule(model, {0: ["0"], 1: ["1"], 2: ["*"], 3: []})
    states = []
    for _ in range(4):
        schedule.step()
        states.append(held_by(model.get_submodule("0.1")) is not None)
    assert states == [True, False, True, False]


def test_a_norm_stays_held_when_two_entries_freeze_it() -> None:
    model = chain(2, norm=True)
    schedule = FreezeSchedule(model, {0: ["0", "1"], 1: [lambda n, p: n.startswith("1.")]})
    schedule.step()
    schedule.step()
    model.train()
    assert not model[1].training and trains(model) == [True, True]


def test_freezing_by_schedule_drops_gradients() -> None:
    model = chain(2)
    model(torch.ones(1, 4)).sum().backward()
    FreezeSchedule(model, {0: ["0"]}).step()
    assert model[0].weight.grad is None and model[1].weight.grad is not None


@pytest.mark.parametrize(("every", "units"), [(1, 5), (2, 8)])
def test_gradual_unfreezing_unfreezes_group_after_group_from_the_output_down(
    every: int, units: int
) -> None:
    model = chain(5)
    freeze(model, "0", "4")
    schedule = gradual_unfreeze(model, ["1", ["2", "3"], "4"], every=every)
    # Layer 0 is in no group and stays frozen.
    stages = [[F, F, F, F, T], [F, F, T, T, T], [F, T, T, T, T]]
    seen = run(schedule, model, units)
    assert seen == [stages[min(unit // every, 2)] for unit in range(units)]


@pytest.mark.parametrize(
    ("how", "shares"), [("linear", [0.5, 0.75, 1]), ("cubic", [0.125, 0.421875, 1])]
)
@pytest.mark.parametrize("scale_lr", [True, False], ids=["scaled", "unscaled"])
@each_optimizer
def test_freeze_out_follows_the_papers_formula(
    how: Any, shares: list[float], scale_lr: bool, kind: str
) -> None:
    model = chain(3)
    total, lr = 40, 0.1
    schedule = freeze_out(model, ["0", "1", "2"], total, t0=0.5, how=how, scale_lr=scale_lr)
    assert schedule.shares == shares
    optimizer = cases.FAMILIES[kind].ours(schedule.param_groups(lr), lr=lr)
    rates = lr_scheduler.LambdaLR(optimizer, schedule.lr_lambdas())
    for step in range(total + 2):
        schedule.step()
        for group, share, trainable in zip(
            optimizer.param_groups, shares, trains(model), strict=True
        ):
            end = share * total
            start = lr / share if scale_lr else lr
            expected = start / 2 * (1 + math.cos(math.pi * step / end)) if step < end else 0.0
            assert group["lr"] == pytest.approx(expected, abs=1e-12)
            assert trainable == (step < end)
        optimizer.step()
        rates.step()


def test_freeze_out_leaves_parameters_in_no_group_alone() -> None:
    model = chain(3)
    schedule = freeze_out(model, ["0", "1"], 10)
    groups = schedule.param_groups(0.1, momentum=0.9)
    assert [len(group["params"]) for group in groups] == [2, 2, 2]
    assert all(group["momentum"] == 0.9 for group in groups)
    assert groups[2]["params"] == list(model[2].parameters())
    rest = schedule.lr_lambdas()[2]
    assert rest(0) == rest(1000) == 1.0
    run(schedule, model, 12)
    assert trains(model) == [F, F, T]


def test_freeze_out_of_one_group_is_plain_cosine_annealing() -> None:
    model = chain(1)
    schedule = freeze_out(model, ["*"], 10)
    assert schedule.shares == [1.0]
    assert schedule.lr_lambdas()[0](5) == pytest.approx(0.5)


class Tied(nn.Module):
    """Laid out as GPT-2 is: the head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(6, 4)
        self.h = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.ln = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 6, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: torch.Tensor) -> Any:
        x = self.wte(tokens)
        for layer in self.h:
            x = layer(x)
        return self.lm_head(self.ln(x))


def test_gradual_unfreezing_trains_a_tied_parameter_with_the_last_group_that_has_it() -> None:
    model = Tied()
    schedule = gradual_unfreeze(model, ["wte", "h.0", "h.1", "ln", "lm_head"])
    seen = []
    for _ in range(5):
        schedule.step()
        model(torch.arange(6)).square().mean().backward()
        parts: list[Any] = [model.lm_head, model.ln, model.h[1], model.h[0]]
        seen.append([part.weight.requires_grad for part in parts])
        assert model.lm_head.weight.grad is not None
    assert seen == [[T, F, F, F], [T, T, F, F], [T, T, T, F], [T, T, T, T], [T, T, T, T]]
    assert "0         72  nothing" in str(schedule)


def test_gradual_unfreezing_frees_a_tied_parameter_in_the_middle_with_its_last_group() -> None:
    model = chain()
    model[2].weight = model[0].weight
    schedule = gradual_unfreeze(model, ["0", "1", "2", "3"])
    seen = []
    for _ in range(4):
        schedule.step()
        seen.append([p.requires_grad for p in (model[0].weight, model[0].bias, model[1].weight)])
    assert seen == [[F, F, F], [T, F, F], [T, F, T], [T, T, T]]


def test_a_shared_module_belongs_to_the_last_group_that_has_it() -> None:
    shared = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))
    model = nn.ModuleDict({"low": shared, "mid": nn.Linear(4, 4), "high": shared})
    gradual_unfreeze(model, ["low", "mid", "high"]).step()
    assert shared[0].weight.requires_grad and held_by(shared[1]) is None
    assert not model.get_parameter("mid.weight").requires_grad


def test_a_name_in_two_groups_is_frozen_with_the_first() -> None:
    model = chain(3)
    schedule = gradual_unfreeze(model, ["0", "1", "*"])
    assert run(schedule, model, 3) == [[F, F, T], [F, T, T], [T, T, T]]


def test_freeze_out_freezes_and_rates_a_tied_parameter_with_its_last_group() -> None:
    model = Tied()
    schedule = freeze_out(model, ["wte", "h", "lm_head"], 10, how="linear", t0=0.5)
    embedding, layers, head, rest = (group["params"] for group in schedule.param_groups(0.1))
    assert (embedding, head, rest) == ([], [model.lm_head.weight], list(model.ln.parameters()))
    assert len(layers) == 4
    optimizer = FrozenAwareSGD(schedule.param_groups(0.1))
    rates = lr_scheduler.LambdaLR(optimizer, schedule.lr_lambdas())
    trained = []
    for _ in range(11):
        schedule.step()
        trained.append((model.h[0].weight.requires_grad, model.lm_head.weight.requires_grad))
        optimizer.step()
        rates.step()
    assert trained == [(step < 8, step < 10) for step in range(11)]


def test_freeze_out_puts_a_tied_parameter_into_one_group() -> None:
    model = chain(2)
    model[1].weight = model[0].weight
    groups = freeze_out(model, ["0", "1"], 10).param_groups(0.1)
    assert [len(group["params"]) for group in groups] == [1, 2]


def test_the_rates_of_freeze_out_resume() -> None:
    def build() -> tuple[Any, Any]:
        schedule = freeze_out(chain(3), ["0", "1", "2"], 10)
        optimizer = FrozenAwareSGD(schedule.param_groups(0.1), lr=0.1)
        return schedule, lr_scheduler.LambdaLR(optimizer, schedule.lr_lambdas())

    _, rates = build()
    for _ in range(4):
        rates.optimizer.step()
        rates.step()
    saved = rates.state_dict()
    _, resumed = build()
    resumed.load_state_dict(copy.deepcopy(saved))
    for one in (rates, resumed):
        one.optimizer.step()
        one.step()
    assert rates.get_last_lr() == resumed.get_last_lr()


def test_rotation_trains_k_layers_and_what_always_names() -> None:
    model = chain(8)
    schedule = rotate(model, "[1-6]", k=2, every=3, always=["7"], seed=4)
    seen = run(schedule, model, 90)
    assert all(s[0] is False and s[7] is True and sum(s[1:7]) == 2 for s in seen)
    periods = [seen[i : i + 3] for i in range(0, 90, 3)]
    assert all(p[0] == p[1] == p[2] for p in periods)
    assert any(a != b for a, b in pairwise(p[0] for p in periods))
    drawn = [sum(s[i] for s in seen) for i in range(1, 7)]
    assert min(drawn) > 0, "30 draws of 2 in 6 leave no layer out"


@each_optimizer
def test_a_rotation_that_drops_state_keeps_that_of_what_trains_alone(kind: str) -> None:
    """As in LISA: memory for the layers drawn now, each of which starts as in a new optimizer."""
    model = chain(6)
    schedule = rotate(model, "[0-4]", k=2, every=3, always="5", seed=0)
    family = cases.FAMILIES[kind]
    policy = {family.state.policy: "drop"}
    ours = family.ours(model.parameters(), lr=0.1, **HYPER[kind], **policy)

    def reference_of(layer: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        twin = copy.deepcopy(layer)
        return twin, family.stock(twin.parameters(), lr=0.1, foreach=False, **HYPER[kind])

    references: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {}
    drawn, held = set(), set()
    for _ in range(12):
        schedule.step()
        drawn.add(schedule.active)
        ours.zero_grad()
        live = [name for name, layer in model.named_children() if layer.weight.requires_grad]
        references = {
            name: references.get(name) or reference_of(model.get_submodule(name)) for name in live
        }
        model(torch.ones(2, 4)).square().mean().backward()
        for name, (twin, reference) in references.items():
            for p, q in zip(model.get_submodule(name).parameters(), twin.parameters(), strict=True):
                q.grad = p.grad.clone() if p.grad is not None else None
            reference.step()
        ours.step()
        for name, (twin, _) in references.items():
            for p, q in zip(model.get_submodule(name).parameters(), twin.parameters(), strict=True):
                assert torch.equal(p, q), name
        kept = [state for _, reference in references.values() for state in reference.state.values()]
        wanted = sum(value.nbytes for state in kept for value in state.values())
        assert report(model, ours).total.state_bytes == wanted
        held.add(wanted)
    assert len(drawn) > 2
    assert len(held) == 1, "three layers of one size train at any time"


def test_rotation_depends_on_its_seed_alone() -> None:
    def draws(seed: int) -> list[list[bool]]:
        torch.manual_seed(seed)
        model = chain(6)
        return run(rotate(model, "*", k=1, every=1, seed=seed), model, 20)

    assert draws(1) == draws(1) != draws(2)


def test_rotation_names_the_active_layers() -> None:
    model = chain()
    schedule = rotate(model, "*", k=2, every=1)
    assert schedule.active == ()
    schedule.step()
    assert [name in schedule.active for name in "0123"] == trains(model)


def test_rotation_draws_the_outermost_matches() -> None:
    model = nn.ModuleDict(
        {"layer": nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3))}
    )
    schedule = rotate(model, "layer.*", k=3, every=1)
    schedule.step()
    assert schedule.active == ("layer.0", "layer.1", "layer.2")


def test_rotation_holds_the_norms_of_resting_layers() -> None:
    model = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(4))
    schedule = rotate(model, "*", k=1, every=1)
    for _ in range(8):
        schedule.step()
        model.train()
        active = [name in schedule.active for name in "0123"]
        norms = [m.training for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
        assert norms == active == trains(model)


# --- many layers --------------------------------------------------------------------------------

# name: the schedule of a model, given the names of all its layers
LARGE: dict[str, Callable[[Any, list[str]], FreezeSchedule]] = {
    "a rotation over listed layers": lambda m, names: rotate(m, names, 2, 1),
    "a rotation over listed globs": lambda m, names: rotate(m, [f"{n}*" for n in names], 2, 1),
    "a rotation over modules": lambda m, names: rotate(m, list(m), 2, 1),
    "a table with an entry for each": lambda m, names: FreezeSchedule(
        m, {i: [name] for i, name in enumerate(names)}
    ),
    "gradual unfreezing": lambda m, names: gradual_unfreeze(m, names),
    "FreezeOut": lambda m, names: freeze_out(m, names, 10**6),
}


def calls(layers: int, kind: str) -> dict[str, int]:
    """How many function calls each operation on a schedule takes."""
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(layers)))
    # Of one length, so that no name's glob matches another's layer.
    model._modules = {f"{int(name):04}": layer for name, layer in model._modules.items()}
    made: list[FreezeSchedule] = []
    state: dict[str, Any] = {}
    acts: dict[str, Callable[[], Any]] = {
        "build": lambda: made.append(LARGE[kind](model, list(model._modules))),
        "step": lambda: made[0].step(),
        "print": lambda: str(made[0]),
        "save": lambda: state.update(made[0].state_dict()),
        "load": lambda: made[0].load_state_dict(state),
    }
    counts = {}
    for name, act in acts.items():
        profile = cProfile.Profile()
        profile.runcall(act)
        counts[name] = sum(entry.callcount for entry in profile.getstats())  # type: ignore[attr-defined]
    return counts


@pytest.mark.parametrize("kind", LARGE)
def test_the_work_grows_no_faster_than_the_number_of_layers(kind: str) -> None:
    few, many = calls(200, kind), calls(400, kind)
    assert {act: round(many[act] / few[act], 2) for act in few if many[act] > 2.2 * few[act]} == {}


def test_a_changed_model_is_seen_at_the_next_step() -> None:
    model = chain()
    schedule = rotate(model, ["0", "1", "2", "3"], k=1, every=1)
    schedule.step()
    for i in range(4):
        model[i] = nn.Linear(4, 4)
    model.append(nn.Linear(4, 4))
    schedule.step()
    assert [name in schedule.active for name in "01234"] == trains(model)
    del model[3:]
    with pytest.raises(ValueError, match="'3' matches no parameter or module"):
        schedule.step()


def test_a_long_timeline_shows_what_is_near() -> None:
    schedule = gradual_unfreeze(chain(120), [str(i) for i in range(120)])
    for _ in range(70):
        schedule.step()
    lines = str(schedule).splitlines()
    assert len(lines) < 60
    assert "earlier" in lines[2] and "later" in lines[-1]
    (now,) = (line.split() for line in lines if line.startswith(">"))
    assert now[1:4] == ["69-", f"{50 * 20}", f"{70 * 20}"]


# --- errors at construction ----------------------------------------------------------------------

any_schedule: Any = FreezeSchedule
any_gradual: Any = gradual_unfreeze
any_out: Any = freeze_out
any_rotate: Any = rotate

WRONG: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "groups in bytes": (
        lambda m: gradual_unfreeze(m, b"01"),  # type: ignore[arg-type]
        TypeError,
        "groups must be a list of groups, got b'01'",
    ),
    "an entry that matches nothing": (
        lambda m: any_schedule(m, {0: ["0"], 3: ["10"]}),
        ValueError,
        "entry 3: the pattern '10' matches no",
    ),
    "no entries": (lambda m: any_schedule(m, {}), ValueError, "no entries"),
    "a list of entries": (lambda m: any_schedule(m, ["0"]), TypeError, "got list"),
    "a negative unit": (lambda m: any_schedule(m, {-1: []}), ValueError, "at least 0, got -1"),
    "a unit that is no number": (lambda m: any_schedule(m, {"0": []}), TypeError, "got '0'"),
    "a unit that is a bool": (lambda m: any_schedule(m, {True: []}), TypeError, "got True"),
    "an unknown kind of unit": (
        lambda m: any_schedule(m, {0: []}, unit="batch"),
        ValueError,
        "'epoch' or 'step', got 'batch'",
    ),
    "a str for the model": (lambda m: any_schedule("m", {0: []}), TypeError, "is the model"),
    "a group that matches nothing": (
        lambda m: any_gradual(m, ["0", "x"]),
        ValueError,
        "gradual_unfreeze, group 1: the pattern 'x'",
    ),
    "an empty group": (lambda m: any_gradual(m, ["0", []]), ValueError, "group 1 is empty"),
    "no groups": (lambda m: any_gradual(m, []), ValueError, "no groups"),
    "one name for the groups": (lambda m: any_gradual(m, "0"), TypeError, "list of groups"),
    "every below one": (lambda m: any_gradual(m, ["0"], every=0), ValueError, "at least 1"),
    "a t0 of zero": (lambda m: any_out(m, ["0"], 10, t0=0), ValueError, r"t0 must be in \(0, 1\]"),
    "a t0 above one": (lambda m: any_out(m, ["0"], 10, t0=1.1), ValueError, "got 1.1"),
    "an unknown variant": (lambda m: any_out(m, ["0"], 10, how="square"), ValueError, "'square'"),
    "a run of no steps": (lambda m: any_out(m, ["0"], 0), ValueError, "total_steps"),
    "steps that are no int": (lambda m: any_out(m, ["0"], 1.5), TypeError, "total_steps"),
    "more layers than there are": (lambda m: any_rotate(m, "[01]", 3, 1), ValueError, "names 2"),
    "no layers to train": (lambda m: any_rotate(m, "*", 0, 1), ValueError, "k must be at least 1"),
    "layers that are parameters": (
        lambda m: any_rotate(m, "*.weight", 1, 1),
        ValueError,
        "names no module",
    ),
    "layers that match nothing": (lambda m: any_rotate(m, "x.*", 1, 1), ValueError, "rotate: the"),
    "an always that matches nothing": (
        lambda m: any_rotate(m, "*", 1, 1, always="hed"),
        ValueError,
        "'hed'",
    ),
    "a rotation every zero": (lambda m: any_rotate(m, "*", 1, 0), ValueError, "every must be"),
}


@pytest.mark.parametrize("case", WRONG)
def test_construction_refuses(case: str) -> None:
    call, error, said = WRONG[case]
    model = chain()
    with pytest.raises(error, match=said):
        call(model)
    assert trains(model) == [True] * 4


# --- the printed timeline ------------------------------------------------------------------------


def test_the_timeline_shows_every_entry_and_the_current_one() -> None:
    model = chain(3)
    schedule = FreezeSchedule(model, {0: ["0", model[1]], 4: [nn.Linear], 6: []})
    assert "not begun" in str(schedule) and ">" not in str(schedule)
    run(schedule, model, 6)
    lines = str(schedule).splitlines()
    assert lines[0] == "FreezeSchedule, at epoch 5: manages 60 of 60 parameters"
    assert [line.split() for line in lines[2:]] == [
        ["0-", "40", "20", "0,", "1"],
        [">", "4-", "60", "0", "Linear"],
        ["6-", "0", "60", "nothing"],
    ]


@pytest.mark.parametrize("kind", ["freeze_out", "rotate", "gradual", "long"])
def test_every_timeline_fits_120_columns(kind: str) -> None:
    model = chain(40)
    makers: dict[str, Callable[[], FreezeSchedule]] = {
        "freeze_out": lambda: freeze_out(model, [str(i) for i in range(40)], 1000),
        "rotate": lambda: rotate(model, "*", k=20, every=10, always=["39", model[3]]),
        "gradual": lambda: gradual_unfreeze(model, [[str(i)] for i in range(40)]),
        "long": lambda: FreezeSchedule(model, {0: [lambda n, p: True, model[0].weight]}),
    }
    schedule = makers[kind]()
    lines = str(schedule).splitlines()
    assert max(map(len, lines)) <= 120 and len(lines) > 2
    assert type(schedule).__name__ in repr(schedule)
    assert not lines[0].startswith("_")  # a name the documentation has


# --- state ---------------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[Any], FreezeSchedule]] = {
    "a table": lambda m: FreezeSchedule(m, {0: ["0", "1", "2"], 3: ["0"], 5: []}),
    "gradual unfreezing": lambda m: gradual_unfreeze(m, ["0", "1", "2", "3"], every=2),
    "FreezeOut": lambda m: freeze_out(m, ["0", "1", "2", "3"], total_steps=8),
    "rotation": lambda m: rotate(m, "*", k=2, every=2, seed=3),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("at", range(0, 8, 3))
def test_a_resumed_schedule_goes_on_as_the_uninterrupted_one(kind: str, at: int) -> None:
    model = chain(norm=True)
    schedule = SCHEDULES[kind](model)
    run(schedule, model, at)
    file = io.BytesIO()
    torch.save(schedule.state_dict(), file)
    file.seek(0)
    fresh = chain(norm=True)
    resumed = SCHEDULES[kind](fresh)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert trains(fresh) == trains(model) and resumed.last == schedule.last
    assert held_by(fresh[1]) is None or held_by(model[1]) is not None
    assert run(resumed, fresh, 8 - at) == run(schedule, model, 8 - at)


# name: (the schedule that saved, the one that loads, what the error says)
Maker = Callable[[Any], FreezeSchedule]
OTHERS: dict[str, tuple[Maker, Maker, str]] = {
    "gradual unfreezing from a rotation": (
        lambda m: rotate(m, "*", k=1, every=1),
        lambda m: gradual_unfreeze(m, ["0", "1"], unit="step"),
        "it has schedule='RotationSchedule', this one schedule='GradualUnfreezeSchedule'",
    ),
    "a rotation from gradual unfreezing": (
        lambda m: gradual_unfreeze(m, ["0", "1"], unit="step"),
        lambda m: rotate(m, "*", k=1, every=1),
        "it has schedule='GradualUnfreezeSchedule', this one schedule='RotationSchedule'",
    ),
    "gradual unfreezing that was slower": (
        lambda m: gradual_unfreeze(m, ["0", "1"], every=5),
        lambda m: gradual_unfreeze(m, ["0", "1"]),
        r"it has entries\[1\]=5, this one entries\[1\]=1",
    ),
    "gradual unfreezing that had fewer groups": (
        lambda m: gradual_unfreeze(m, ["0", "1"]),
        lambda m: gradual_unfreeze(m, ["0", "1", "2"]),
        r"it has entries\[2\]=None, this one entries\[2\]=2",
    ),
    "gradual unfreezing that had another last group": (
        lambda m: gradual_unfreeze(m, ["0", "1"]),
        lambda m: gradual_unfreeze(m, ["0", "2"]),
        r"it has changes\['2.weight'\]=None, this one changes\['2.weight'\]=\[\]",
    ),
    "a table with an entry at another epoch": (
        lambda m: FreezeSchedule(m, {0: ["0"], 2: []}),
        lambda m: FreezeSchedule(m, {0: ["0"], 3: []}),
        r"it has entries\[1\]=2, this one entries\[1\]=3",
    ),
    "a table that freezes something else": (
        lambda m: FreezeSchedule(m, {0: ["0", "1"], 2: ["0"]}),
        lambda m: FreezeSchedule(m, {0: ["0", "1"], 2: ["1"]}),
        r"it has changes\['0.weight'\]=\[0\], this one changes\['0.weight'\]=\[0, 2\]",
    ),
    "a table of steps": (
        lambda m: FreezeSchedule(m, {0: ["0"]}, unit="step"),
        lambda m: FreezeSchedule(m, {0: ["0"]}),
        "it has unit='step', this one unit='epoch'",
    ),
    "a table that does not hold norms": (
        lambda m: FreezeSchedule(m, {0: ["0"]}, hold_norm=False),
        lambda m: FreezeSchedule(m, {0: ["0"]}),
        "it has hold_norm=False, this one hold_norm=True",
    ),
    "FreezeOut over a longer run": (
        lambda m: freeze_out(m, ["0", "1"], 20),
        lambda m: freeze_out(m, ["0", "1"], 10),
        r"it has entries\[1\]=11, this one entries\[1\]=6",
    ),
    "FreezeOut by another rule": (
        lambda m: freeze_out(m, ["0", "1"], 1, how="linear"),
        lambda m: freeze_out(m, ["0", "1"], 1),
        r"it has shares\[0\]=0.8, this one shares\[0\]=0.51",
    ),
    "a rotation with another seed": (
        lambda m: rotate(m, "*", 1, 1, seed=1),
        lambda m: rotate(m, "*", 1, 1, seed=2),
        "it has seed=1, this one seed=2",
    ),
    "a rotation of other layers": (
        lambda m: rotate(m, "[012]", 1, 1),
        lambda m: rotate(m, "[013]", 1, 1),
        r"it has layers\[2\]='2', this one layers\[2\]='3'",
    ),
    "a rotation of the same layers in another order": (
        lambda m: rotate(m, ["0", "1"], 1, 1),
        lambda m: rotate(m, ["1", "0"], 1, 1),
        r"it has layers\[0\]='0', this one layers\[0\]='1'",
    ),
    "a rotation that always trains something else": (
        lambda m: rotate(m, "[01]", 1, 1, always="2"),
        lambda m: rotate(m, "[01]", 1, 1, always="3"),
        r"it has always\[0\]='2.weight', this one always\[0\]='3.weight'",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_state_of_another_schedule_is_refused_and_the_difference_named(case: str) -> None:
    saves, loads, said = OTHERS[case]
    saved = saves(chain())
    saved.step()
    fresh = chain()
    resumed = loads(fresh)
    with pytest.raises(ValueError, match=rf"of another schedule: .*{said}.*same arguments"):
        resumed.load_state_dict(saved.state_dict())
    assert trains(fresh) == [T, T, T, T] and resumed.last == -1


def test_a_schedule_written_differently_that_freezes_the_same_resumes() -> None:
    model = chain()
    schedule = FreezeSchedule(model, {0: ["0", model[1]], 2: ["*.weight"]})
    schedule.step()
    fresh = chain()
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    again = [re.compile(r"weight$")]
    resumed = FreezeSchedule(fresh, {0: names, 2: again})
    resumed.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert trains(fresh) == [F, F, T, T]


def test_the_state_restores_what_the_schedule_does_not_manage() -> None:
    model = chain(norm=True)
    freeze(model, "1", "4")
    schedule = FreezeSchedule(model, {0: ["0"]})
    schedule.step()
    fresh = chain(norm=True)
    freeze(fresh, "2")
    resumed = FreezeSchedule(fresh, {0: ["0"]})
    resumed.load_state_dict(schedule.state_dict())
    assert trains(fresh) == trains(model) == [F, T, T, F]
    fresh.train()
    assert not fresh[1].training
    assert schedule.state_dict()["frozen"] == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "4.weight",
        "4.bias",
    ]


def test_names_in_the_state_do_not_depend_on_wrapping() -> None:
    model = chain()
    compiled: Any = torch.compile(model, backend="eager")
    schedule = FreezeSchedule(compiled, {0: ["_orig_mod.0"], 1: []})
    schedule.step()
    fresh = chain()
    resumed = any_schedule(nn.DataParallel(fresh), {0: ["0"], 1: []})
    resumed.load_state_dict(schedule.state_dict())
    assert trains(fresh) == trains(model) == [F, T, T, T]


BAD_STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = {
    "no mapping": (lambda s: 3, TypeError, "got int"),
    "a missing key": (lambda s: {k: v for k, v in s.items() if k != "held"}, ValueError, "'held'"),
    "an unknown parameter": (
        lambda s: {**s, "frozen": ["0.wieght"]},
        ValueError,
        r"this model lacks '0.wieght' \(nearest: '0.weight'",
    ),
    "an unknown norm": (lambda s: {**s, "held": ["0"]}, ValueError, "'0' as held"),
    "no kind of schedule": (
        lambda s: {k: v for k, v in s.items() if k != "schedule"},
        ValueError,
        "it has no 'schedule', which a FreezeSchedule saves",
    ),
    "names where there are others": (
        lambda s: {**s, "changes": {"0.weight": [0]}},
        ValueError,
        r"it has changes\['0.bias'\]=None",
    ),
    "a position that is no int": (lambda s: {**s, "last": "2"}, TypeError, "'last'"),
    "a position below -1": (lambda s: {**s, "last": -2}, ValueError, "'last'"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(case: str) -> None:
    spoil, error, said = BAD_STATES[case]
    model = chain()
    schedule = FreezeSchedule(model, {0: ["0"]})
    schedule.step()
    state = schedule.state_dict()
    fresh = chain()
    resumed = FreezeSchedule(fresh, {0: ["0"]})
    with pytest.raises(error, match=said):
        resumed.load_state_dict(spoil(state))
    assert trains(fresh) == [T, T, T, T] and resumed.last == -1


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_schedule_is_copied_and_pickled_with_its_model(kind: str) -> None:
    model = chain()
    schedule = SCHEDULES[kind](model)
    run(schedule, model, 2)
    before = trains(model)
    fresh = chain()
    expected = run(SCHEDULES[kind](fresh), fresh, 6)[2:]
    for twin in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert run(twin, twin.model, 4) == expected
        assert trains(model) == before


# --- files --------------------------------------------------------------------------------------

FILES: dict[str, Callable[[Any], FreezeSchedule]] = {
    **SCHEDULES,
    "a table of everything that can be named": lambda m: FreezeSchedule(
        m,
        {
            0: [m[0], m[1].weight, re.compile(r"^2\."), nn.BatchNorm1d, lambda n, p: n == "3.bias"],
            10: ["*.weight", re.compile("BIAS", re.I)],
            20: [],
        },
        unit="step",
        hold_norm=False,
    ),
    "gradual unfreezing of steps": lambda m: gradual_unfreeze(
        m, ["0", ["1", m[2]]], 3, unit="step", hold_norm=False
    ),
    "FreezeOut by another rule": lambda m: freeze_out(
        m, ["0", "1"], 50, t0=0.25, how="linear", scale_lr=False, unit="epoch"
    ),
    "a rotation with all its arguments": lambda m: rotate(
        m, ["0", "1", m[2]], 2, 5, [m[3].bias, "4"], 9, unit="epoch", hold_norm=False
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_schedule_read_from_its_file_is_the_same(kind: str, tmp_path: Path) -> None:
    model = chain(norm=True)
    schedule = FILES[kind](model)
    run(schedule, model, 3)
    export_schedule(schedule, tmp_path / "plan.json")
    fresh = chain(norm=True)
    again = read_schedule(fresh, tmp_path / "plan.json")
    assert again.last == -1 and trains(fresh) == [T, T, T, T]
    again.load_state_dict(schedule.state_dict())
    assert again._settings() == schedule._settings()
    export_schedule(again, tmp_path / "again.json")
    texts = [(tmp_path / f"{name}.json").read_text() for name in ("plan", "again")]
    assert texts[0] == texts[1] and max(map(len, texts[0].splitlines())) <= 88
    assert run(again, fresh, 30) == run(schedule, model, 30)


def test_a_file_is_replaced_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    export_schedule(gradual_unfreeze(chain(), ["0", "1"]), path)
    before = path.read_text()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        export_schedule(rotate(chain(), "*", 1, 1), path)
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


# name: (what the file says, what the error says)
BAD_FILES: dict[str, tuple[str, str]] = {
    "no JSON": ('{"type": "rotate",}', "is not JSON: .* line 1 column"),
    "no text": ("\udcff", "is not JSON"),
    "a list": ("[1]", "a schedule is an object, .*; this is a list"),
    "no type": ('{"groups": []}', "the key 'type' is missing; it is one of 'FreezeSchedule'"),
    "an unknown type": ('{"type": "Rotate"}', "'type' is 'Rotate'; it must be one of .*'rotate'"),
    "a type that is a number": ('{"type": 3}', "'type' is 3"),
    "a misspelt argument": (
        '{"type": "rotate", "layer": "*", "k": 1, "every": 1}',
        "rotate has no argument 'layer'; did you mean 'layers'. It has layers, k, every",
    ),
    "the model": ('{"type": "rotate", "model": "m"}', "rotate has no argument 'model'"),
    "an argument left out": ('{"type": "gradual_unfreeze"}', "needs the key 'groups'"),
    "a key given twice": (
        '{"type": "FreezeSchedule", "entries": {"0": ["0"], "0": []}}',
        "has the key '0' twice",
    ),
    "one unit in two spellings": (
        '{"type": "FreezeSchedule", "entries": {"1": ["0"], "01": []}}',
        "entries has one unit number in two spellings: 1, 01",
    ),
    "entries in a list": (
        '{"type": "FreezeSchedule", "entries": [["0"]]}',
        "entries must be an object of unit numbers, .*; it is a list",
    ),
    "an entry that is no number": (
        '{"type": "FreezeSchedule", "entries": {"first": ["0"]}}',
        "entries has the key 'first'",
    ),
    "a name that is a number": (
        '{"type": "gradual_unfreeze", "groups": [["0"], [1]]}',
        r"groups\[1\]\[0\] must be a name or glob, .* it is 1",
    ),
    "groups that are one name": (
        '{"type": "gradual_unfreeze", "groups": "0"}',
        "groups must be a list of groups",
    ),
    "an invalid regex": (
        '{"type": "rotate", "layers": {"regex": "("}, "k": 1, "every": 1}',
        r"layers: '\(' is not a regular expression",
    ),
    "a flag that is a string": (
        '{"type": "gradual_unfreeze", "groups": ["0"], "hold_norm": "no"}',
        'hold_norm must be true or false; it is "no"',
    ),
    "a name that matches nothing": (
        '{"type": "gradual_unfreeze", "groups": ["0", "10"]}',
        "gradual_unfreeze, group 1: the pattern '10' matches no",
    ),
    "a number that is a string": (
        '{"type": "gradual_unfreeze", "groups": ["0"], "every": "2"}',
        "every must be an int, got '2'",
    ),
    "a mistake in what is driven": (
        '{"type": "AdvanceOnPlateau", "schedule": {"type": "FreezeSchedule", "entries": {"0": 1}}}',
        r"schedule.entries\['0'\] must be a name",
    ),
    "nothing to drive": (
        '{"type": "AdvanceOnPlateau", "schedule": "plan"}',
        'schedule: a schedule is an object, .*; this is "plan"',
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_with_its_name_and_the_place(case: str, tmp_path: Path) -> None:
    content, said = BAD_FILES[case]
    path = tmp_path / "plan.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    model = chain()
    with pytest.raises((ValueError, TypeError), match=f"read_schedule: .*plan.json.* {said}"):
        read_schedule(model, path)
    assert trains(model) == [T, T, T, T]


def test_what_is_no_schedule_or_no_json_is_not_exported(tmp_path: Path) -> None:
    schedule = rotate(chain(), "*", 1, 1)
    with pytest.raises(TypeError, match="the first argument is the schedule; got Sequential"):
        export_schedule(schedule.model, tmp_path / "plan.json")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"name it plan\.json"):
        export_schedule(schedule, tmp_path / "plan.yaml")
    assert list(tmp_path.iterdir()) == []


# --- schedules, learning rates and checkpoints together ------------------------------------------

RATES: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=24),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, total_iters=12),
}


class Run:
    """A training run of 12 steps that unfreezes at steps 4 and 8."""

    def __init__(self, rates: str, kind: str) -> None:
        self.model = chain(3, norm=True)
        self.schedule = gradual_unfreeze(self.model, ["0", ["1", "2"], "3"], 4, unit="step")
        ours = cases.FAMILIES[kind].ours
        self.optimizer = ours(self.model.parameters(), lr=0.1, **HYPER[kind])
        self.rates = RATES[rates](self.optimizer)
        self.groups = [list(map(id, group["params"])) for group in self.optimizer.param_groups]
        self.lrs: list[float] = []

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.schedule.step()
            self.model.train()
            data = torch.Generator().manual_seed(step)
            self.optimizer.zero_grad()
            self.model(torch.randn(6, 4, generator=data)).square().mean().backward()
            self.optimizer.step()
            self.lrs.append(self.optimizer.param_groups[0]["lr"])
            self.rates.step()
        now = [list(map(id, group["params"])) for group in self.optimizer.param_groups]
        assert now == self.groups, "a schedule touched the param groups"

    def save(self) -> dict[str, Any]:
        file = io.BytesIO()
        parts = ("model", "schedule", "optimizer", "rates")
        torch.save({part: getattr(self, part).state_dict() for part in parts}, file)
        file.seek(0)
        loaded: dict[str, Any] = torch.load(file, weights_only=True)
        return loaded

    def load(self, saved: dict[str, Any]) -> None:
        for part, state in saved.items():
            getattr(self, part).load_state_dict(state)

    def bits(self) -> dict[str, torch.Tensor]:
        state = {
            f"{key} of {name}": value
            for name, p in self.model.named_parameters()
            for key, value in self.optimizer.state[p].items()
        }
        return {**self.model.state_dict(), **state}


@each_optimizer
@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("at", [3, 4, 6, 8, 10])
def test_unfreeze_checkpoint_resume_unfreeze_is_bit_for_bit_the_same(
    rates: str, at: int, kind: str
) -> None:
    whole = Run(rates, kind)
    whole.train(0, 12)
    first = Run(rates, kind)
    first.train(0, at)
    resumed = Run(rates, kind)
    resumed.load(first.save())
    resumed.train(at, 12)
    assert resumed.lrs == whole.lrs[at:]
    expected = whole.bits()
    assert resumed.bits().keys() == expected.keys()
    for name, value in resumed.bits().items():
        assert value.isfinite().all() and torch.equal(value, expected[name]), name


@each_optimizer
@pytest.mark.parametrize("rates", RATES)
def test_the_rate_follows_its_formula_through_every_unfreezing(rates: str, kind: str) -> None:
    run_through = Run(rates, kind)
    run_through.train(0, 12)
    stock = cases.FAMILIES[kind].stock
    plain = stock([nn.Parameter(torch.zeros(1))], lr=0.1, **HYPER[kind])
    alone = RATES[rates](plain)
    expected = []
    for _ in range(12):
        expected.append(plain.param_groups[0]["lr"])
        plain.step()
        alone.step()
    assert run_through.lrs == expected


class FilterRun(Run):
    """The same run by the usual recipe: filter at construction, add_param_group later."""

    def __init__(self, rates: str) -> None:
        self.model = chain(3)
        self.model[:2].requires_grad_(False)
        kept = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer: Any = torch.optim.SGD(kept, lr=0.1, momentum=0.9, weight_decay=0.01)
        self.rates = RATES[rates](self.optimizer)
        self.lrs = []

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            if step in (4, 8):
                layer = self.model[1 if step == 4 else 0]
                layer.requires_grad_(True)
                self.optimizer.add_param_group({"params": list(layer.parameters())})
            data = torch.Generator().manual_seed(step)
            self.optimizer.zero_grad()
            self.model(torch.randn(6, 4, generator=data)).square().mean().backward()
            self.optimizer.step()
            self.lrs.append(self.optimizer.param_groups[0]["lr"])
            self.rates.step()

    def save(self) -> dict[str, Any]:
        return {part: getattr(self, part).state_dict() for part in ("model", "optimizer", "rates")}


def test_the_usual_recipe_cannot_load_its_own_checkpoint() -> None:
    first = FilterRun("LinearLR")
    first.train(0, 6)
    resumed = FilterRun("LinearLR")
    with pytest.raises(ValueError, match="different number of parameter groups"):
        resumed.load(first.save())


@each_optimizer
def test_the_usual_recipe_loads_another_layers_state(kind: str) -> None:
    def state_of(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> list[list[float]]:
        return [value.tolist() for value in optimizer.state[p].values()]

    model = chain(2)
    family = cases.FAMILIES[kind]
    optimizer = family.stock(model[1].parameters(), lr=0.1, **HYPER[kind])
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    other = family.stock(model[0].parameters(), lr=0.1, **HYPER[kind])
    other.load_state_dict(optimizer.state_dict())
    assert state_of(other, model[0].weight) == state_of(optimizer, model[1].weight) != []
    # All parameters in one group that never changes: each gets its own, or none.
    ours = family.ours(model.parameters(), lr=0.1, **HYPER[kind])
    freeze(model, "0")
    ours.zero_grad()
    model(torch.ones(1, 4)).sum().backward()
    ours.step()
    again = family.ours(model.parameters(), lr=0.1, **HYPER[kind])
    again.load_state_dict(ours.state_dict())
    assert model[0].weight not in again.state
    assert state_of(again, model[1].weight) == state_of(ours, model[1].weight) != []


def _breaks_one_cycle() -> None:
    with pytest.raises(KeyError, match="initial_lr"):
        FilterRun("OneCycleLR").train(0, 12)


def _breaks_lambda() -> None:
    with pytest.raises(ValueError, match="shorter than argument"):
        FilterRun("LambdaLR").train(0, 12)


def _overshoots_linear() -> None:
    run_through = FilterRun("LinearLR")
    run_through.train(0, 12)
    assert run_through.optimizer.param_groups[1]["lr"] > 0.1 + 1e-9


BREAKS: dict[str, Callable[[], None]] = {
    "OneCycleLR raises": _breaks_one_cycle,
    "LambdaLR raises": _breaks_lambda,
    "LinearLR overshoots": _overshoots_linear,
}


@pytest.mark.parametrize("how", BREAKS)
def test_under_the_usual_recipe(how: str) -> None:
    BREAKS[how]()
