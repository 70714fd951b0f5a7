"""AdvanceOnPlateau: phases that follow a metric, the best weights, and resuming in the middle."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.helpers import optim_cases as cases
from tests.helpers.models import assert_same_weights, chain, trains, weights
from tests.helpers.processes import World, world_of
from torch_freeze import (
    AdvanceOnPlateau,
    FreezeSchedule,
    export_schedule,
    freeze_out,
    gradual_unfreeze,
    guard,
    read_schedule,
    rotate,
)

pytestmark = pytest.mark.usefixtures("one_thread")

T, F = True, False
NAN, INF = math.nan, math.inf


def make(layers: int = 3) -> Any:
    return chain(layers, norm=True)


def table(model: nn.Module) -> FreezeSchedule:
    """Three phases: the last layer trains, then the one before it, then all."""
    return FreezeSchedule(model, {0: ["0", "1", "2"], 5: ["0", "1"], 6: []})


def phases(schedule: AdvanceOnPlateau, metrics: list[Any]) -> list[int]:
    """The phase after each metric; "end" stands for -1."""
    seen = []
    schedule.step()
    for metric in metrics:
        schedule.step(metric)
        seen.append(-1 if schedule.finished else schedule.phase)
    return seen


# --- when a phase ends ---------------------------------------------------------------------------

# name: (arguments, metrics, the phase after each of them; -1 once the last has ended)
ENDS: dict[str, tuple[dict[str, Any], list[Any], list[int]]] = {
    "a metric that falls goes on": ({"patience": 0}, [3, 2, 1, 0, -1], [0, 0, 0, 0, 0]),
    "without patience a setback ends it": ({"patience": 0}, [3, 3, 2, 2.5, 9], [0, 1, 1, 2, -1]),
    "patience is what it outlasts": ({"patience": 2}, [1, 2, 2, 2, 2, 2], [0, 0, 0, 1, 1, 1]),
    "an improvement begins the count again": (
        {"patience": 1},
        [5, 6, 4, 5, 3, 4, 4],
        [0, 0, 0, 0, 0, 0, 1],
    ),
    "the best is that of the whole run": ({"patience": 0}, [1, 2, 1.5, 1.5], [0, 1, 2, -1]),
    "greater is better": ({"mode": "max", "patience": 0}, [1, 2, 3, 3, 4], [0, 0, 0, 1, 1]),
    "an improvement as small as min_delta is none": (
        {"patience": 0, "min_delta": 0.5},
        [3, 2.5, 2.25, 2],
        [0, 1, 1, 2],
    ),
    "of min_delta when greater is better": (
        {"mode": "max", "patience": 0, "min_delta": 1},
        [1, 2, 3.5],
        [0, 1, 1],
    ),
    "not before min_evals": (
        {"patience": 0, "min_evals": 3},
        [1, 2, 3, 4, 5, 6],
        [0, 0, 1, 1, 1, 2],
    ),
    "min_evals of each phase": (
        {"patience": 0, "min_evals": [2, 1, 3]},
        [1, 2, 3, 4, 5, 6],
        [0, 1, 2, 2, 2, -1],
    ),
    "after max_evals whatever the metric": (
        {"max_evals": 2},
        [5, 4, 3, 2, 1, 0],
        [0, 1, 1, 2, 2, -1],
    ),
    "max_evals of each phase": (
        {"max_evals": [1, None, 2]},
        [5, 4, 3, 2, 3, 3, 3, 3, 3, 3],
        [1, 1, 1, 1, 1, 1, 1, 2, 2, -1],
    ),
    "NaN and infinity improve on nothing": (
        {"patience": 1},
        [NAN, -INF, 3, NAN, INF],
        [0, 1, 1, 1, 2],
    ),
    "tensors of one element": (
        {"patience": 0},
        [torch.tensor(2.0), torch.tensor([[1]]), torch.tensor([3.0], dtype=torch.float16)],
        [0, 0, 1],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDS)
def test_a_phase_ends(case: str) -> None:
    arguments, metrics, expected = ENDS[case]
    assert phases(AdvanceOnPlateau(table(make()), **arguments), metrics) == expected


@given(
    mode=st.sampled_from(["min", "max"]),
    patience=st.integers(0, 3),
    threshold=st.sampled_from([0.0, 0.5]),
    metrics=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, NAN]), max_size=30),
)
def test_a_phase_ends_where_reduce_lr_on_plateau_lowers_the_rate(
    mode: Any, patience: int, threshold: float, metrics: list[float]
) -> None:
    model = nn.Linear(1, 1)
    entries: dict[int, list[str]] = {i: [] for i in range(31)}
    schedule = AdvanceOnPlateau(
        FreezeSchedule(model, {**entries, 0: ["weight"]}), mode, patience, threshold
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    rates = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode, 0.5, patience, threshold, "abs", eps=0.0
    )
    schedule.step()
    for metric in metrics:
        schedule.step(metric)
        rates.step(metric)
        assert optimizer.param_groups[0]["lr"] == 0.5**schedule.phase


def test_each_phase_freezes_what_its_entry_names() -> None:
    model = make()
    schedule = AdvanceOnPlateau(table(model), patience=0)
    assert schedule.phase == -1 and trains(model) == [T, T, T]
    assert schedule.step() and trains(model) == [F, F, T]
    assert not model.train()[1].training, "the norm is held"
    assert not schedule.step(1.0) and trains(model) == [F, F, T]
    assert schedule.step(1.0) and trains(model) == [F, T, T]
    assert schedule.step(1.0) and trains(model) == [T, T, T]
    assert model[1].training
    assert not schedule.step(1.0) and schedule.finished
    assert not schedule.step(1.0) and schedule.finished and schedule.last == 5


def test_gradual_unfreezing_follows_a_metric_with_tied_parameters_too() -> None:
    model = make()
    model[3].weight = model[0].weight
    schedule = AdvanceOnPlateau(gradual_unfreeze(model, ["0", "2", "3"], every=7), patience=0)
    seen = []
    for metric in (None, 1.0, 1.0, 1.0):
        schedule.step(metric)
        seen.append([p.requires_grad for p in (model[0].bias, model[2].weight, model[3].weight)])
    assert seen == [[F, F, T], [F, F, T], [F, T, T], [T, T, T]]


# --- errors --------------------------------------------------------------------------------------

any_plateau: Any = AdvanceOnPlateau

WRONG: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "a table that is no schedule": (
        lambda m: any_plateau({0: ["0"]}),
        TypeError,
        r"must be a FreezeSchedule, got dict. Write AdvanceOnPlateau\(FreezeSchedule\(model",
    ),
    "a rotation": (lambda m: any_plateau(rotate(m, "*", 1, 1)), ValueError, "has no phases"),
    "FreezeOut": (lambda m: any_plateau(freeze_out(m, ["0"], 9)), ValueError, "has no phases"),
    "itself": (lambda m: any_plateau(any_plateau(table(m))), ValueError, "has no phases"),
    "an unknown mode": (lambda m: any_plateau(table(m), "low"), ValueError, "got 'low'"),
    "a patience below 0": (lambda m: any_plateau(table(m), patience=-1), ValueError, "patience"),
    "a patience in fractions": (lambda m: any_plateau(table(m), patience=1.5), TypeError, "1.5"),
    "a min_delta below 0": (
        lambda m: any_plateau(table(m), min_delta=-0.1),
        ValueError,
        "min_delta must be at least 0",
    ),
    "a min_delta that is NaN": (lambda m: any_plateau(table(m), min_delta=NAN), ValueError, "nan"),
    "a min_delta that is text": (lambda m: any_plateau(table(m), min_delta="1"), TypeError, "'1'"),
    "a max_evals of 0": (lambda m: any_plateau(table(m), max_evals=0), ValueError, "at least 1"),
    "a max_evals below min_evals": (
        lambda m: any_plateau(table(m), min_evals=[0, 4, 0], max_evals=3),
        ValueError,
        "phase 1 has min_evals 4, max_evals 3",
    ),
    "too few max_evals": (
        lambda m: any_plateau(table(m), max_evals=[1, 2]),
        ValueError,
        "max_evals has 2 numbers, but the schedule has 3 phases",
    ),
    "max_evals in text": (lambda m: any_plateau(table(m), max_evals="3"), TypeError, "got '3'"),
    "a restore_best in text": (
        lambda m: any_plateau(table(m), restore_best="phase"),
        TypeError,
        "restore_best must be True or False",
    ),
    "a metric before phase 0": (
        lambda m: any_plateau(table(m)).step(0.5),
        RuntimeError,
        r"phase 0 has not begun. Call step\(\) once before training",
    ),
    "best weights that are not kept": (
        lambda m: any_plateau(table(m)).load_best_weights(),
        RuntimeError,
        "restore_best is False",
    ),
    "best weights before there are any": (
        lambda m: any_plateau(table(m), restore_best=True).load_best_weights(),
        RuntimeError,
        "no metric was finite yet",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_named(case: str) -> None:
    call, error, said = WRONG[case]
    model = make()
    with pytest.raises(error, match=said):
        call(model)
    assert trains(model) == [T, T, T]


NO_METRICS: dict[str, tuple[Any, str]] = {
    "None": (None, "the metric is None; pass the value of the evaluation"),
    "text": ("0.5", "must be a number or a tensor of one, got '0.5'"),
    "a bool": (True, "got True"),
    "two numbers": (torch.ones(2), r"got a Tensor of \(2,\)"),
    "a dict": ({"loss": 1.0}, "got {'loss': 1.0}"),
    "a complex number": (torch.tensor(1j), "must be a number"),
}


@pytest.mark.parametrize("case", NO_METRICS)
def test_a_value_that_is_no_metric_is_refused_and_changes_nothing(case: str) -> None:
    metric, said = NO_METRICS[case]
    schedule = AdvanceOnPlateau(table(make()), patience=0)
    schedule.step()
    before = schedule.state_dict()
    with pytest.raises(TypeError, match=f"AdvanceOnPlateau.step: .*{said}"):
        schedule.step(metric)
    assert schedule.state_dict() == before


# --- the best weights ----------------------------------------------------------------------------


def spoil(model: nn.Module, by: float) -> None:
    """Move what trains, as an epoch would; the norm's statistics too."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by)
        for name, buffer in model.named_buffers():
            if not name.startswith("1.") or model.get_submodule("1").training:
                buffer.add_(1)


def test_each_phase_begins_at_the_best_weights_of_the_run() -> None:
    model = make()
    schedule = AdvanceOnPlateau(table(model), patience=1, restore_best=True)
    schedule.step()
    best: dict[str, Tensor] = {}
    # Phase 0 ends after 2 setbacks, phase 1 without having improved on it, phase 2 having done so.
    for epoch, metric in enumerate([5.0, 3.0, 4.0, 4.0, 4.0, 9.0, 2.0, 3.0, 3.0]):
        spoil(model, epoch + 0.25)
        now = weights(model)
        if metric in (3.0, 2.0) and schedule.best != min(metric, schedule.best or INF):
            best = now
        changed = schedule.step(metric)
        ended = epoch in (3, 5, 8)
        assert changed == ended
        assert_same_weights(weights(model), best if ended else now)
    assert schedule.finished
    spoil(model, 1.0)
    schedule.load_best_weights()
    assert_same_weights(weights(model), best)


def test_without_restore_best_the_weights_stay() -> None:
    model = make()
    schedule = AdvanceOnPlateau(table(model), patience=0)
    schedule.step()
    for metric in (1.0, 2.0, 3.0, 4.0):
        spoil(model, 1.0)
        now = weights(model)
        schedule.step(metric)
        assert_same_weights(weights(model), now)
    assert "weights" not in schedule.state_dict()


def test_a_phase_that_ends_at_its_best_keeps_it() -> None:
    model = make()
    schedule = AdvanceOnPlateau(table(model), max_evals=1, restore_best=True)
    schedule.step()
    for metric in (3.0, 2.0, 1.0):
        spoil(model, 1.0)
        now = weights(model)
        schedule.step(metric)
        assert_same_weights(weights(model), now)


def test_a_phase_without_a_finite_metric_restores_nothing() -> None:
    model = make()
    schedule = AdvanceOnPlateau(table(model), patience=0, restore_best=True)
    schedule.step()
    spoil(model, 1.0)
    now = weights(model)
    schedule.step(NAN)
    assert schedule.phase == 1
    assert_same_weights(weights(model), now)


def test_buffers_that_a_state_dict_leaves_out_are_left_alone() -> None:
    model = make()
    model.register_buffer("cache", torch.zeros(2), persistent=False)
    schedule = AdvanceOnPlateau(table(model), patience=0, restore_best=True)
    schedule.step()
    schedule.step(1.0)
    model.cache = torch.ones(3)
    schedule.step(2.0)
    assert torch.equal(model.cache, torch.ones(3))


def test_restoring_does_not_write_to_what_stayed_frozen() -> None:
    model = make()
    schedule = AdvanceOnPlateau(
        FreezeSchedule(model, {0: ["0", "1"], 1: ["0", "1"]}), patience=0, restore_best=True
    )
    schedule.step()
    with guard(model):
        schedule.step(1.0)
        spoil(model, 1.0)
        schedule.step(2.0)


def test_best_weights_of_another_model_are_refused_and_nothing_is_changed() -> None:
    model = make()
    schedule = AdvanceOnPlateau(table(model), patience=0, restore_best=True)
    schedule.step()
    schedule.step(1.0)
    model[3] = nn.Linear(4, 2)
    now, state = weights(model), schedule.state_dict()
    with pytest.raises(RuntimeError, match=r"3.weight has shape \[2, 4\]; in the best .* \[4, 4\]"):
        schedule.step(2.0)
    assert_same_weights(weights(model), now)
    assert schedule.phase == 0 and schedule.last == state["last"]


# --- resuming ------------------------------------------------------------------------------------


# Of each optimizer, by its name in cases.FAMILIES.
HYPER: dict[str, dict[str, Any]] = {"SGD": {"lr": 0.3, "momentum": 0.9}, "AdamW": {"lr": 0.05}}


class Run:
    """Training with every part of a schedule in it: setbacks, restored weights, a held norm."""

    def __init__(self, kind: str, **arguments: Any) -> None:
        self.model = make()
        self.schedule = AdvanceOnPlateau(
            table(self.model), patience=1, restore_best=True, max_evals=[None, 3, 3], **arguments
        )
        ours, hyper = cases.FAMILIES[kind].ours, HYPER[kind]
        self.optimizer = ours(self.model.parameters(), weight_decay=0.01, **hyper)
        self.trained: list[list[bool]] = []

    def train(self, first: int, last: int) -> None:
        for epoch in range(first, last):
            if epoch == 0:
                self.schedule.step()
            self.model.train()
            data = torch.Generator().manual_seed(epoch)
            for _ in range(2):
                self.optimizer.zero_grad()
                self.model(torch.randn(6, 4, generator=data)).square().mean().backward()
                self.optimizer.step()
            self.trained.append(trains(self.model))
            # The epochs 3, 4, 7 and 8 are setbacks.
            self.schedule.step(epoch % 4 * 0.5 - epoch // 4 * 0.25)

    def save(self) -> dict[str, Any]:
        file = io.BytesIO()
        parts = ("model", "schedule", "optimizer")
        torch.save({part: getattr(self, part).state_dict() for part in parts}, file)
        file.seek(0)
        loaded: dict[str, Any] = torch.load(file, weights_only=True)
        return loaded

    def load(self, saved: dict[str, Any]) -> None:
        for part, state in saved.items():
            getattr(self, part).load_state_dict(state)


@pytest.mark.parametrize("kind", HYPER)
@pytest.mark.parametrize("at", range(10))
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(at: int, kind: str) -> None:
    whole = Run(kind)
    whole.train(0, 10)
    assert whole.schedule.finished and len({str(state) for state in whole.trained}) == 3
    first = Run(kind)
    first.train(0, at)
    resumed = Run(kind)
    resumed.load(first.save())
    resumed.train(at, 10)
    assert first.trained + resumed.trained == whole.trained
    assert_same_weights(weights(resumed.model), weights(whole.model))
    for name, parameter in resumed.model.named_parameters():
        state = resumed.optimizer.state[parameter]
        other = whole.optimizer.state[whole.model.get_parameter(name)]
        assert state.keys() == other.keys() and len(state) > 0
        assert all(torch.equal(state[key], other[key]) for key in other), name
    resumed.schedule.load_best_weights()
    whole.schedule.load_best_weights()
    assert_same_weights(weights(resumed.model), weights(whole.model))


def test_without_weights_the_state_is_plain_json() -> None:
    model = make()
    schedule = AdvanceOnPlateau(table(model), patience=1)
    phases(schedule, [3.0, 2.5, 4.0, 4.0, 4.0])
    fresh = make()
    resumed = AdvanceOnPlateau(table(fresh), patience=1)
    resumed.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert resumed.state_dict() == schedule.state_dict() and trains(fresh) == trains(model)
    assert str(resumed) == str(schedule)


OTHERS: dict[str, tuple[Callable[[Any], FreezeSchedule], str]] = {
    "a table": (table, "has schedule='FreezeSchedule', this one schedule='AdvanceOnPlateau'"),
    "another patience": (lambda m: AdvanceOnPlateau(table(m), patience=7), "has patience=7"),
    "another mode": (lambda m: AdvanceOnPlateau(table(m), "max"), "has mode='max'"),
    "no restoring": (lambda m: AdvanceOnPlateau(table(m)), "has restore_best=False"),
    "other max_evals": (
        lambda m: AdvanceOnPlateau(table(m), max_evals=[2, 3, 4], restore_best=True),
        r"has max_evals\[0\]=2, this one max_evals\[0\]=None",
    ),
    "other phases": (
        lambda m: AdvanceOnPlateau(gradual_unfreeze(m, ["0", "2", "3"]), restore_best=True),
        r"has phases\['schedule'\]='GradualUnfreezeSchedule'",
    ),
    "something else in a phase": (
        lambda m: AdvanceOnPlateau(
            FreezeSchedule(m, {0: ["0", "1", "2"], 5: ["0"], 6: []}), restore_best=True
        ),
        r"has phases\['changes'\]\['1.weight'\]=\[0, 5\], this one .*=\[0, 6\]",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_state_of_another_schedule_is_refused(case: str) -> None:
    other, said = OTHERS[case]
    saved = other(make())
    saved.step()
    model = make()
    schedule = AdvanceOnPlateau(table(model), restore_best=True)
    with pytest.raises(ValueError, match=f"of another schedule: it {said}"):
        schedule.load_state_dict(saved.state_dict())
    assert schedule.last == -1 and trains(model) == [T, T, T]


BAD_STATES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no phase": ({"phase": None}, TypeError, "'phase' must be an int"),
    "a phase there is none of": ({"phase": 3}, ValueError, "phase 3 .* of 3 phases"),
    "no phase after evaluations": ({"phase": -1}, ValueError, "phase -1 after 1 evaluations"),
    "a best that is no number": ({"best": "1"}, TypeError, "got '1'"),
    "a count below 0": ({"bad_evals": -1}, ValueError, "'bad_evals' must be at least 0"),
    "weights of another shape": (
        {"weights": {**make().state_dict(), "0.bias": torch.ones(3)}},
        ValueError,
        r"0.bias has shape \[4\]; in the best weights it has \[3\]",
    ),
    "weights of fewer layers": ({"weights": make(2).state_dict()}, ValueError, "no '3.weight'"),
    "weights of more layers": ({"weights": make(4).state_dict()}, ValueError, "have '4.weight'"),
    "a key left out": ({"weights": ...}, ValueError, "has no 'weights'"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(case: str) -> None:
    changes, error, said = BAD_STATES[case]
    saved = AdvanceOnPlateau(table(make()), restore_best=True)
    phases(saved, [1.0])
    state = {k: v for k, v in {**saved.state_dict(), **changes}.items() if v is not ...}
    model = make()
    schedule = AdvanceOnPlateau(table(model), restore_best=True)
    with pytest.raises(error, match=f"load_state_dict: .*{said}"):
        schedule.load_state_dict(state)
    assert schedule.last == -1 and trains(model) == [T, T, T]


def test_it_is_copied_and_pickled_with_its_model() -> None:
    schedule = AdvanceOnPlateau(table(make()), patience=0, restore_best=True)
    phases(schedule, [2.0, 3.0])
    for twin in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        spoil(twin.model, 1.0)
        assert twin.step(4.0) and twin.phase == 2
        assert trains(twin.model) == [T, T, T] and trains(schedule.model) == [
            F,
            T,
            T,
        ]
        assert_same_weights(weights(twin.model), weights(schedule.model))


# --- files, and what is printed ------------------------------------------------------------------

FILES: dict[str, Callable[[Any], AdvanceOnPlateau]] = {
    "a table": lambda m: AdvanceOnPlateau(table(m)),
    "gradual unfreezing, with all arguments": lambda m: AdvanceOnPlateau(
        gradual_unfreeze(m, ["0", [m[2], "3"]], hold_norm=False), "max", 5, 0.125,
        min_evals=[1, 2], max_evals=[None, 8], restore_best=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_read_from_its_file_it_is_the_same(kind: str, tmp_path: Path) -> None:
    schedule = FILES[kind](make())
    export_schedule(schedule, tmp_path / "plan.json")
    again = read_schedule(make(), tmp_path / "plan.json")
    assert isinstance(again, AdvanceOnPlateau)
    assert again._settings() == schedule._settings()


def test_what_is_printed_says_where_it_stands() -> None:
    schedule = AdvanceOnPlateau(table(make()), patience=2)
    assert str(schedule).startswith("AdvanceOnPlateau, not begun: manages")
    phases(schedule, [3.0, 2.0, 2.5])
    lines = str(schedule).splitlines()
    assert lines[0] == (
        "AdvanceOnPlateau, in phase 0 for 3 evaluations, best 2, 1 without improvement: "
        "manages 48 of 68 parameters; the others are not changed"
    )
    assert [line.split()[:3] for line in lines[2:]] == [
        [">", "0-", "48"],
        ["1-", "28", "20"],
        ["2-", "0", "48"],
    ]
    for _ in range(12):
        schedule.step(9.0)
    assert "finished after 15 evaluations, best 2.0" in str(schedule)


# --- several processes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of("cpu", 2) as world:
        yield world


def on_a_rank(device: str, metrics: tuple[float, float]) -> tuple[str, int]:
    model = nn.parallel.DistributedDataParallel(make().to(device), find_unused_parameters=True)
    schedule = AdvanceOnPlateau(table(model), patience=0)
    schedule.step()
    schedule.step(1.0)
    try:
        schedule.step(metrics[torch.distributed.get_rank()])
    except RuntimeError as error:
        return str(error), schedule.phase
    return "", schedule.phase


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_processes_with_different_metrics_are_refused_on_all(world: World) -> None:
    for said, phase in world.run(on_a_rank, (0.5, 2.0)):
        assert "the metric of rank 1 is 2.0, that of rank 0 0.5" in said and phase == 0
    assert world.run(on_a_rank, (NAN, NAN)) == [("", 1), ("", 1)]
