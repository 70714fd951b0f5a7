"""frozen_state_dict and load_frozen_state_dict: what is frozen, saved and loaded as plain data."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from torch_freeze import (
    FreezeSchedule,
    freeze,
    freeze_except,
    frozen_state_dict,
    load_frozen_state_dict,
    unfreeze,
)


class Net(nn.Module):
    """A stem with a norm, fixed positions, an embedding tied to the head."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.positions = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.stem = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 6)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.stem(self.embed(x) + self.positions))
        return out


def freeze_some(model: nn.Module) -> None:
    """Everything a state records: frozen by freeze, found frozen, by hand; held in two modes."""
    net: Any = model
    net.stem[2].eval()
    freeze_except(net, "head.bias")
    unfreeze(net, "stem.0")
    net.stem[0].weight.requires_grad_(False)


def look(model: nn.Module) -> Any:
    """What training and later calls see of the frozen set."""
    model.train()
    seen: list[Any] = [{n for n, p in model.named_parameters() if not p.requires_grad}]
    seen.append({n for n, m in model.named_modules() if not m.training})
    for act in (unfreeze, freeze, unfreeze):
        act(model)
        seen.append({n for n, p in model.named_parameters() if not p.requires_grad})
        seen.append({n for n, m in model.named_modules() if not m.training})
    return seen


def _through_json(state: Any) -> Any:
    return json.loads(json.dumps(state))


def _through_torch(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


SAVED: dict[str, Callable[[Any], Any]] = {"json": _through_json, "torch.save": _through_torch}
WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "bare": lambda m: m,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "in DataParallel": lambda m: nn.DataParallel(m),
}


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("source", WRAPPED)
@pytest.mark.parametrize("target", WRAPPED)
def test_a_loaded_state_is_the_state_saved(saved: str, source: str, target: str) -> None:
    model = Net()
    freeze_some(model)
    state = SAVED[saved](frozen_state_dict(WRAPPED[source](model)))
    assert state["frozen"] == [
        "positions", "embed.weight", "stem.0.weight", "stem.1.weight", "stem.1.bias",
        "stem.2.weight", "stem.2.bias",
    ]  # fmt: skip
    assert state["trainable"] == ["stem.0.bias", "head.bias"]
    assert (state["found"], state["by_hand"]) == (["positions"], ["stem.0.weight"])
    assert state["tied"] == [["embed.weight", "head.weight"]]
    assert state["held"] == {"stem.1": True, "stem.2": False}
    fresh = Net()
    fresh.stem.requires_grad_(True)
    fresh(torch.arange(6)).sum().backward()
    freeze(fresh, "head")  # something else than what the state has
    result = load_frozen_state_dict(WRAPPED[target](fresh), state)
    assert frozen_state_dict(fresh) == frozen_state_dict(model)
    assert set(result.frozen_names) == set(state["frozen"])
    assert "head.bias" in result.changed and set(result.held) == {"stem.1", "stem.2"}
    assert fresh.stem[1].weight.grad is None and fresh.stem[0].bias.grad is not None
    again = load_frozen_state_dict(fresh, state)
    assert (again.changed, again.held, again.released) == ((), (), ())
    for norm in (fresh.stem[2], model.stem[2]):
        unfreeze(norm)
        assert not norm.training  # its own mode
    assert look(fresh) == look(model)


def test_a_loaded_state_thaws_and_releases() -> None:
    model = Net()
    state = frozen_state_dict(model)
    freeze_some(model)
    result = load_frozen_state_dict(model, state)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"positions"}
    assert result.released == ("stem.1", "stem.2")
    assert frozen_state_dict(model) == state


def _replaced_head() -> nn.Module:
    model = Net(tied=False)
    model.head = nn.Linear(4, 3)
    model.extra = nn.BatchNorm1d(4)
    return model


def _without(state: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: [n for n in v if n not in names] if k != "held" else v for k, v in state.items()}


# name: (the model loaded into, what becomes of the state, the error, what it says)
MISFITS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], type[Exception], str]] = {
    "an unknown frozen name": (
        Net,
        lambda s: {**s, "frozen": [*s["frozen"], "stem.0.wieght"]},
        ValueError,
        r"this model lacks 'stem\.0\.wieght' \(nearest: 'stem\.0\.weight'",
    ),
    "an unknown trainable name": (
        Net,
        lambda s: {**s, "trainable": [*s["trainable"], "tail.bias"]},
        ValueError,
        r"this model lacks 'tail\.bias'",
    ),
    "a name left out": (
        Net,
        lambda s: _without(s, "stem.1.weight", "head.bias"),
        ValueError,
        r"the state lacks 'stem\.1\.weight', 'head\.bias'",
    ),
    "a model with more": (
        lambda: nn.ModuleDict({"embed": nn.Embedding(6, 4), "more": nn.Linear(2, 2)}),
        lambda s: s,
        ValueError,
        r"lacks 'positions', .* and 6 more .*; the state lacks 'more\.weight', 'more\.bias'",
    ),
    "a model that is not tied": (
        lambda: Net(tied=False),
        lambda s: s,
        ValueError,
        r"tied differently: 'embed\.weight', 'head\.weight' were one tensor when the state was",
    ),
    "a model that is tied where the state is not": (
        Net,
        lambda s: {**s, "tied": [], "trainable": [*s["trainable"], "head.weight"]},
        ValueError,
        r"tied differently: 'embed\.weight', 'head\.weight' are one tensor here",
    ),
    "a held norm that is none": (
        Net,
        lambda s: {**s, "held": {"stem.1": True, "stem.0": True}},
        ValueError,
        r"'stem\.0' as held, which is no norm of this model",
    ),
    "another kind of state": (
        Net,
        lambda s: Net().state_dict(),
        ValueError,
        r"has no 'frozen', 'trainable', 'found', 'by_hand', 'tied', 'held'",
    ),
    "no mapping": (Net, lambda s: list(s), TypeError, "got list"),
    "what cannot train": (
        lambda: _with_integers(),
        lambda s: s,
        ValueError,
        r"stem\.0\.bias has dtype torch\.int8, which cannot train",
    ),
}


def _with_integers() -> Any:
    model = Net()
    model.stem[0].bias = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize("case", MISFITS)
def test_a_state_that_does_not_fit_is_refused_with_the_names_and_changes_nothing(case: str) -> None:
    make, spoil, error, said = MISFITS[case]
    model = Net()
    freeze_some(model)
    target = make()
    before = frozen_state_dict(target)
    with pytest.raises(error, match=f"^load_frozen_state_dict: .*{said}"):
        load_frozen_state_dict(target, spoil(frozen_state_dict(model)))
    assert frozen_state_dict(target) == before


def test_what_only_the_model_or_the_state_has_is_ignored_unless_strict() -> None:
    model = Net(tied=False)
    freeze_some(model)
    state = frozen_state_dict(model)
    fresh: Any = _replaced_head()
    freeze(fresh, "extra")
    with pytest.raises(ValueError, match=r"the state lacks 'extra\.weight', 'extra\.bias'"):
        load_frozen_state_dict(fresh, state)
    result = load_frozen_state_dict(fresh, state, strict=False)
    assert "extra.weight" not in result.matched and "stem.1.weight" in result.matched
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == set(state["trainable"])
    assert {n for n, m in fresh.train().named_modules() if not m.training} == {
        "stem.1", "stem.2", "extra",
    }  # fmt: skip
    # One tensor cannot be both frozen and trainable, strict or not.
    with pytest.raises(ValueError, match=r"'head\.weight', 'embed\.weight' are one tensor"):
        load_frozen_state_dict(Net(), {**state, "trainable": ["head.weight"]}, strict=False)
    load_frozen_state_dict(fresh, {**state, "held": {"gone": True}}, strict=False)


def test_a_schedule_loads_what_earlier_versions_saved() -> None:
    def build() -> tuple[Any, FreezeSchedule]:
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        return model, FreezeSchedule(model, {0: ["0", "1"], 2: []})

    model, schedule = build()
    freeze(model, "2.bias")
    schedule.step()
    state = schedule.state_dict()
    earlier = {k: v for k, v in state.items() if k not in ("trainable", "found", "by_hand", "tied")}
    earlier["held"] = list(earlier["held"])
    for saved in (state, earlier):
        fresh, resumed = build()
        freeze(fresh, "2.weight")
        resumed.load_state_dict(copy.deepcopy(saved))
        assert frozen_state_dict(fresh)["frozen"] == frozen_state_dict(model)["frozen"]
        assert not fresh.train()[1].training
        resumed.step()
        resumed.step()
        assert [n for n, p in fresh.named_parameters() if not p.requires_grad] == ["2.bias"]
        assert fresh[1].training
