"""freeze, unfreeze, freeze_except and frozen."""

from __future__ import annotations

import copy
import copyreg
import functools
import gc
import io
import json
import pickle
import re
import subprocess
import sys
import warnings
import weakref
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel

import torch_freeze
from tests.helpers.models import weights
from torch_freeze import (
    FreezeSchedule,
    FrozenAwareAdamW,
    FrozenAwareSGD,
    _record,
    audit,
    freeze,
    freeze_except,
    frozen,
    frozen_state_dict,
    gradual_unfreeze,
    load_frozen_state_dict,
    rotate,
    unfreeze,
)
from torch_freeze._hold import HeldTrain, held_by
from torch_freeze._tree import Tree
from torch_freeze.integrations._common import check_ddp


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.bn = nn.BatchNorm2d(channels)
        self.plain_bn = nn.BatchNorm2d(channels, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.plain_bn(self.bn(self.conv(x)))
        return out


class Net(nn.Module):
    """stem -> layers.0, layers.1 -> head"""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.layers: Any = nn.ModuleList([Block(4), Block(4)])
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        out: torch.Tensor = self.head(x.mean((2, 3)))
        return out


class Tied(nn.Module):
    """An embedding whose weight is the output projection's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(self.embed(x)))
        return out


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch() -> torch.Tensor:
    return torch.randn(5, 3, 2, 2)


def trains(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not value.equal(before[name])}


def names(model: nn.Module, *prefixes: str) -> set[str]:
    return {n for n, _ in model.named_parameters() if n.startswith(prefixes)}


# --- what is named -------------------------------------------------------------------------------

SELECTORS: dict[str, tuple[Callable[[Net], Any], tuple[str, ...]]] = {
    "a parameter's name": (lambda m: "head.bias", ("head.bias",)),
    "a module's name": (lambda m: "layers.0", ("layers.0.",)),
    "a glob over modules": (lambda m: "layers.*.conv", ("layers.0.conv", "layers.1.conv")),
    "a glob over parameters": (lambda m: "layers.[1].*.bias", ("layers.1.conv.b", "layers.1.bn.b")),
    "a glob whose star matches dots": (lambda m: "l*.weight", ("layers.0.conv.w", "layers.0.bn.w")),
    "a regex": (lambda m: re.compile(r"^layers\.\d\.bn"), ("layers.0.bn", "layers.1.bn")),
    "a module": (lambda m: m.layers[1], ("layers.1.",)),
    "a parameter": (lambda m: m.stem.weight, ("stem.weight",)),
    "a class": (lambda m: nn.BatchNorm2d, ("layers.0.bn", "layers.1.bn")),
    "a base class": (lambda m: nn.modules.conv._ConvNd, ("stem", "layers.0.conv", "layers.1.conv")),
    "a callable": (lambda m: lambda n, p: p.dim() == 1, ("stem.bias", "head.bias")),
    "a list": (lambda m: ["stem", m.head], ("stem", "head")),
    "a generator of parameters": (lambda m: m.head.parameters(), ("head",)),
}
EXTRA = {
    "a glob whose star matches dots": ("layers.1.conv.w", "layers.1.bn.w"),
    "a callable": ("layers.0.conv.b", "layers.0.bn", "layers.1.conv.b", "layers.1.bn"),
}


@pytest.mark.parametrize("case", SELECTORS)
def test_selecting_by(case: str, net: Net) -> None:
    make, expected = SELECTORS[case]
    wanted = names(net, *expected, *EXTRA.get(case, ()))
    everything = trains(net)
    result = freeze(net, make(net))
    assert trains(net) == everything - wanted
    assert set(result.matched) == set(result.changed) == wanted
    back = unfreeze(net, make(Net()) if case == "a regex" else sorted(wanted))
    assert trains(net) == everything and set(back.changed) == wanted


def test_nothing_named_means_everything(net: Net) -> None:
    freeze(net)
    assert not trains(net)
    unfreeze(net)
    assert trains(net) == {n for n, _ in net.named_parameters()}


def test_exclude_leaves_what_it_names_unchanged(net: Net) -> None:
    freeze(net, "head.bias")
    freeze(net, exclude=["head", nn.BatchNorm2d])
    assert trains(net) == names(net, "head.weight", "layers.0.bn", "layers.1.bn")


def test_freeze_except_leaves_what_it_names(net: Net) -> None:
    freeze_except(net, "head", net.layers[1])
    assert trains(net) == names(net, "head", "layers.1")


@pytest.mark.parametrize("nested", [["stem", ["head"]], ("stem", "head"), iter(["stem", "head"])])
def test_lists_of_selectors_are_opened(nested: Any, net: Net) -> None:
    freeze(net, nested)
    assert trains(net) == names(net, "layers")


HOSTILE = ["w[0]", "a*b", "x?", "(", "+", "a\\d", "é"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_with_pattern_characters_is_meant_literally(name: str) -> None:
    model = nn.ParameterDict({key: nn.Parameter(torch.zeros(1)) for key in [*HOSTILE, "w0", "axb"]})
    assert freeze(model, name).frozen_names == (name,)


def test_parametrized_weights_are_frozen_through_their_module() -> None:
    layer: Any = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    model = nn.Sequential(layer, nn.Linear(2, 1))
    freeze(model, "0")
    assert trains(model) == {"1.weight", "1.bias"}


def test_a_parametrized_weight_is_named_by_what_it_is_computed_from() -> None:
    layer: Any = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    model = nn.Sequential(layer, nn.Linear(2, 1))
    with pytest.raises(ValueError, match=r"Nearest: '0\.parametrizations\.weight', "):
        freeze(model, "0.weight")
    with pytest.raises(ValueError, match=r"computed from: '0\.parametrizations\.weight'\.$"):
        freeze(model, layer.weight)
    with pytest.raises(ValueError, match=r"Nearest: 'parametrizations\.weight'"):
        freeze(layer, "weight")
    with pytest.raises(ValueError, match=r"or a name\.$"):
        freeze(nn.Linear(2, 1), layer.weight)
    freeze(model, "0.parametrizations.weight")
    assert trains(model) == {"0.bias", "1.weight", "1.bias"}


# --- spectral norm --------------------------------------------------------------------------------

SPECTRAL: dict[str, Any] = {
    "the parametrization": nn.utils.parametrizations.spectral_norm,
    "the older hook": nn.utils.spectral_norm,
}


def spectral(how: str) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(SPECTRAL[how](nn.Linear(8, 8)), nn.Linear(8, 1))


def effective(model: Any) -> torch.Tensor:
    """The matrix that the first layer multiplies by, with its vectors unchanged."""
    with torch.no_grad():
        modes = [m.training for m in model.modules()]
        made: torch.Tensor = model[0].eval()(torch.eye(8)).clone()
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
    return made


def steps(model: Any) -> None:
    optimizer = FrozenAwareSGD(model.parameters(), lr=0.1)
    for _ in range(5):
        model.train()
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("how", SPECTRAL)
def test_a_frozen_layer_with_spectral_norm_computes_the_same_as_before(how: str) -> None:
    model = spectral(how)
    freeze(model, "0")
    before = effective(model)
    steps(model)
    assert torch.equal(effective(model), before)
    twin = copy.deepcopy(model)
    steps(twin)
    assert torch.equal(effective(twin), before)
    unfreeze(model, "0")
    assert all(m.training for m in model.train().modules())
    steps(model)
    assert not torch.equal(effective(model), before)


@pytest.mark.parametrize("how", SPECTRAL)
def test_spectral_norm_stays_in_training_where_it_is_not_frozen_or_not_to_be_held(how: str) -> None:
    for act in (lambda m: freeze(m, "0.bias"), lambda m: freeze(m, "0", hold_norm=False)):
        model = spectral(how)
        act(model)
        assert all(m.training for m in model.train().modules())


def test_freezing_a_critic_for_one_step_without_a_hold_equals_setting_requires_grad() -> None:
    def train_generator(by_loops: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        generator = nn.Linear(2, 4)
        critic = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        optimizer = FrozenAwareSGD(generator.parameters(), lr=0.1, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad()
            critic(generator(torch.randn(16, 2))).mean().backward()
            optimizer.step()

        for _ in range(3):
            if by_loops:
                critic.requires_grad_(False)
                step()
                critic.requires_grad_(True)
            else:
                with frozen(critic, hold_norm=False):
                    step()
        return {**generator.state_dict(), **critic.state_dict(prefix="critic.")}

    ours, loops = train_generator(False), train_generator(True)
    for name, value in loops.items():
        assert torch.equal(ours[name], value), name


# --- nothing matched -----------------------------------------------------------------------------

MISSES: dict[str, tuple[Any, list[str]]] = {
    "a misspelt name": ("layer", ["'layer'", "'layers'"]),
    "a misspelt parameter": ("head.wieght", ["'head.weight'"]),
    "a last part": ("conv", ["'*.conv'"]),
    "a misspelt glob": ("layer.*.conv", ["'layers.*.conv'"]),
    "a name like nothing": ("zzz", ["'stem'", "'head'"]),
    "an empty name": ("", ["''", "'stem'"]),
    "a regex": (re.compile("^lyers"), ["'^lyers'", "regex"]),
    "a class": (nn.LSTM, ["LSTM", "Conv2d (3)"]),
    "a callable": (lambda n, p: False, ["callable", "12 parameters"]),
    "a foreign module": (nn.Linear(4, 2), ["Linear is not part of this model (Net)"]),
    "a foreign parameter": (nn.Parameter(torch.zeros(3)), ["shape [3]", "(Net)"]),
    "an empty list": ([], ["empty list"]),
    "one miss among hits": (["stem", "haed"], ["'haed'", "'head'"]),
}


@pytest.mark.parametrize("case", MISSES)
@pytest.mark.parametrize("how", ["freeze", "unfreeze", "frozen", "exclude", "freeze_except"])
def test_nothing_matched_raises_with_near_matches(case: str, how: str, net: Net) -> None:
    what, said = MISSES[case]
    if case == "an empty list" and how == "exclude":
        # It is not a mistake to exclude nothing.
        assert freeze(net, exclude=what).changed
        return
    if case == "an empty list" and how == "freeze_except":
        said = ["freeze(model)"]
    before = trains(net)
    calls: dict[str, Callable[[], Any]] = {
        "freeze": lambda: freeze(net, what),
        "unfreeze": lambda: unfreeze(net, what),
        "frozen": lambda: frozen(net, what).__enter__(),
        "exclude": lambda: freeze(net, exclude=what),
        "freeze_except": lambda: freeze_except(net, what),
    }
    with pytest.raises(ValueError, match=how if how != "exclude" else "freeze") as caught:
        calls[how]()
    for text in said:
        assert text in str(caught.value)
    assert trains(net) == before


def test_a_match_without_parameters_raises() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="'0' has no parameters"):
        freeze(model, "0")
    with pytest.raises(ValueError, match="leaves nothing"):
        freeze(model, "1", exclude=["*.weight", "*.bias"])
    with pytest.raises(ValueError, match="the model has no parameters"):
        freeze(nn.ReLU())


call_freeze: Any = freeze

WRONG: dict[str, tuple[Callable[[Net], Any], str]] = {
    "a str for the model": (lambda m: call_freeze("layer1"), r"Write freeze\(model, 'layer1'\)"),
    "parameters for the model": (lambda m: call_freeze(m.parameters()), "got generator"),
    "a number": (lambda m: call_freeze(m, 3), "cannot select by int"),
    "a class of no modules": (lambda m: call_freeze(m, dict), "dict is not a class of modules"),
    "a regex over bytes": (lambda m: call_freeze(m, re.compile(b"x")), "over bytes"),
    "bytes": (lambda m: call_freeze(m, b"stem"), "cannot select by bytes"),
    "bytes in a list": (lambda m: call_freeze(m, ["stem", bytearray(b"head")]), "by bytearray"),
    "bytes left out": (lambda m: call_freeze(m, exclude=b"stem"), "cannot select by bytes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_kinds_raise_a_type_error(case: str, net: Net) -> None:
    call, said = WRONG[case]
    with pytest.raises(TypeError, match=said):
        call(net)


def test_one_is_singular_and_more_are_plural() -> None:
    model = nn.PReLU()
    result = freeze(model)
    assert str(result).startswith(
        "freeze: 1 parameter named, 1 changed\nPReLU: 1 parameter, 0 trainable, 1 frozen"
    )
    assert repr(result).startswith("<FreezeReport of PReLU: 1 parameter, 1 frozen")
    with pytest.raises(ValueError, match=r"is true for none of the model's 1 parameter\.$"):
        freeze(model, lambda name, p: False)
    assert str(freeze(nn.Linear(2, 1))).startswith("freeze: 2 parameters named, 2 changed\n")
    assert ", 1 norm held\n" in str(freeze(nn.BatchNorm1d(1)))
    (note,) = torch_freeze.report(nn.LazyLinear(1, bias=False)).notes
    assert note == "the lazy parameter weight has no shape yet and counts as 0"
    shared = nn.ModuleList([nn.PReLU() for _ in range(9)])
    twice = nn.ModuleList([shared, shared])
    assert "tied: 1 more tensor has several names" in str(torch_freeze.report(twice))


# --- freezing and its opposite -------------------------------------------------------------------


def test_freezing_drops_the_gradient(net: Net) -> None:
    net(batch()).square().sum().backward()
    net.stem.weight.grad = torch.full_like(net.stem.weight, 9.0)
    parameters = list(net.parameters())
    norm_of: Any = nn.utils.get_total_norm
    all_of_it = norm_of([p.grad for p in parameters if p.grad is not None])
    freeze(net, "stem")
    assert {n for n, p in net.named_parameters() if p.grad is not None} == trains(net)
    clipped = nn.utils.clip_grad_norm_(parameters, 1e9)
    mine = [p.grad for p in parameters if p.requires_grad and p.grad is not None]
    assert clipped == norm_of(mine) < all_of_it


def test_freezing_and_unfreezing_twice_changes_nothing_more(net: Net) -> None:
    optimizer = FrozenAwareSGD(net.parameters(), lr=0.1)
    groups = [list(map(id, group["params"])) for group in optimizer.param_groups]
    assert freeze(net, "layers").changed and not freeze(net, "layers").changed
    assert not freeze(net, "layers").held
    assert unfreeze(net, "layers").changed and not unfreeze(net, "layers").changed
    assert not unfreeze(net, "layers").released
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == groups


each_optimizer = pytest.mark.parametrize(
    "make_optimizer",
    [
        pytest.param(functools.partial(FrozenAwareSGD, momentum=0.9), id="SGD"),
        pytest.param(FrozenAwareAdamW, id="AdamW"),
    ],
)


@each_optimizer
def test_what_is_frozen_at_construction_trains_once_unfrozen(net: Net, make_optimizer: Any) -> None:
    freeze_except(net, "head")
    optimizer = make_optimizer(net.parameters(), lr=0.1)
    before = weights(net)
    net(batch()).square().sum().backward()
    optimizer.step()
    assert changed(net, before) == {"head.weight", "head.bias"}
    unfreeze(net)
    before = weights(net)
    net(batch()).square().sum().backward()
    optimizer.step()
    assert {"stem.weight", "layers.0.conv.weight", "head.weight"} <= changed(net, before)


@each_optimizer
def test_an_empty_trainable_set_is_a_step_that_does_nothing(net: Net, make_optimizer: Any) -> None:
    freeze(net)
    optimizer = make_optimizer(net.parameters(), lr=0.1, weight_decay=0.1)
    before = weights(net)
    optimizer.step()
    optimizer.zero_grad()
    assert not changed(net, before)


def test_parameters_of_equal_values_are_distinguished_by_identity() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].load_state_dict(model[0].state_dict())
    freeze(model, model[1].weight)
    assert trains(model) == {"0.weight", "0.bias", "1.bias"}


def test_modules_and_parameters_are_never_swapped(net: Net) -> None:
    modules = {name: id(m) for name, m in net.named_modules()}
    parameters = {name: id(p) for name, p in net.named_parameters()}
    kinds = {name: type(m) for name, m in net.named_modules()}
    freeze(net)
    unfreeze(net, "layers.*")
    with frozen(net):
        pass
    assert {name: id(m) for name, m in net.named_modules()} == modules
    assert {name: id(p) for name, p in net.named_parameters()} == parameters
    assert {name: type(m) for name, m in net.named_modules()} == kinds


def test_unfreezing_what_cannot_train_raises_and_changes_nothing() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2), requires_grad=False)
    model.packed = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"packed has dtype torch.int8.*exclude="):
        unfreeze(model)
    assert not trains(model)
    unfreeze(model, exclude=lambda n, p: not p.is_floating_point())
    assert trains(model) == {"weight"}


def test_unfreezing_an_inference_tensor_raises() -> None:
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match=r"weight was made under torch\.inference_mode"):
        unfreeze(model)


def test_a_model_is_freed_at_once_after_a_report() -> None:
    # Nothing the walk makes may keep parameters alive until the next garbage collection.
    gc.collect()
    gc.disable()
    try:
        model: Any = nn.Sequential(nn.Linear(3, 3), nn.ModuleList([nn.Linear(3, 3)]))
        parameter = weakref.ref(model[1][0].weight)
        freeze(model, "1")
        torch_freeze.report(model)
        torch_freeze.audit(model)
        del model
        assert parameter() is None
    finally:
        gc.enable()


class _Counting(nn.Module):
    """Counts the walks, each of which reads `_modules` of every module once."""

    looks = 0

    def __getattribute__(self, name: str) -> Any:
        if name == "_modules":
            type(self).looks += 1
        return super().__getattribute__(name)


@pytest.mark.parametrize("call", ["freeze", "unfreeze", "report"])
def test_the_work_grows_linearly_with_the_model(call: str) -> None:
    def looks(layers: int) -> int:
        model = nn.Sequential()
        for i in range(layers):
            block = _Counting()
            block.norm = nn.BatchNorm1d(1, affine=False)
            block.weight = nn.Parameter(torch.zeros(1))
            model.add_module(f"b{i}", block)
        _Counting.looks = 0
        getattr(torch_freeze, call)(model)
        return _Counting.looks

    assert looks(64) == 4 * looks(16) > 0


# --- tied parameters -----------------------------------------------------------------------------


@pytest.mark.parametrize("alias", ["embed.weight", "head.weight", "embed", "head"])
def test_any_alias_freezes_and_the_report_names_all(alias: str) -> None:
    model = Tied()
    result = freeze(model, alias)
    assert not model.embed.weight.requires_grad
    assert result.tied == (("embed.weight", "head.weight"),)
    other = "head.weight" if alias.startswith("embed") else "embed.weight"
    assert any(note.startswith(f"{other} is tied to ") for note in result.notes)
    assert "frozen too" in str(result)


def test_no_note_when_every_alias_is_named() -> None:
    assert freeze(Tied(), "embed", "head").notes == ()
    assert freeze(Tied()).notes == ()


def test_a_shared_module_has_both_names() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared, nn.Linear(2, 1))})
    result = freeze(model, "b.0")
    assert result.tied == (("a.0.weight", "b.0.weight"), ("a.0.bias", "b.0.bias"))
    assert trains(model) == {"b.1.weight", "b.1.bias"}
    assert unfreeze(model, "a.*").changed == ("a.0.weight", "a.0.bias")


# --- frozen --------------------------------------------------------------------------------------


@pytest.mark.parametrize("raises", [False, True], ids=["normally", "by an exception"])
def test_frozen_restores_exactly_what_was_there_when_left(raises: bool, net: Net) -> None:
    freeze(net, "layers.0", "head.bias")
    net(batch()).sum().backward()
    required = {n: p.requires_grad for n, p in net.named_parameters()}
    grads = {n: p.grad for n, p in net.named_parameters()}
    held = {n: held_by(m) for n, m in net.named_modules()}
    modes = {n: m.training for n, m in net.named_modules()}

    def work() -> None:
        with frozen(net) as result:
            assert not trains(net) and all(p.grad is None for p in net.parameters())
            assert set(result.held) == {"layers.1.bn", "layers.1.plain_bn"}
            net.train()
            unfreeze(net, "layers.0")
            if raises:
                raise KeyError("inside")

    if raises:
        with pytest.raises(KeyError):
            work()
    else:
        work()
    assert {n: p.requires_grad for n, p in net.named_parameters()} == required
    assert all(p.grad is grads[n] for n, p in net.named_parameters())
    assert {n for n, m in net.named_modules() if held_by(m)} == {n for n, h in held.items() if h}
    assert {n: m.training for n, m in net.named_modules()} == modes


def test_frozen_leaves_eval_called_inside_in_force(net: Net) -> None:
    with frozen(net):
        net.eval()
    assert not any(m.training for m in net.modules())


def test_frozen_works_as_a_decorator(net: Net) -> None:
    @frozen(net, "stem")
    def inside() -> bool:
        return net.stem.weight.requires_grad

    assert not inside() and not inside() and net.stem.weight.requires_grad


# --- the norm hold -------------------------------------------------------------------------------


class UserNorm(nn.BatchNorm2d):
    """A user's subclass with its own train() and a child, like fused norm-activations."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.Dropout(0.5)
        self.calls: list[bool] = []

    def train(self, mode: bool = True) -> UserNorm:
        self.calls.append(mode)
        super().train(mode)
        return self


class ForeignNorm(nn.Module):
    """Not a norm of torch's, but with running statistics under the usual names."""

    running_var: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.register_buffer("running_var", torch.ones(channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.running_var.lerp_(x.var((0, 2, 3)).view(-1, 1, 1), 0.1)
        return self.weight * x / self.running_var.sqrt()


NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(3),
    "BatchNorm2d without affine": lambda: nn.BatchNorm2d(3, affine=False),
    "BatchNorm2d with cumulative average": lambda: nn.BatchNorm2d(3, momentum=None),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(3),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
    "LazyBatchNorm2d": lambda: nn.LazyBatchNorm2d(),
    "a user's subclass": lambda: UserNorm(3),
    "a foreign norm": lambda: ForeignNorm(3),
}
NO_NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm2d without statistics": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "InstanceNorm2d without statistics": lambda: nn.InstanceNorm2d(3, affine=True),
    "GroupNorm": lambda: nn.GroupNorm(1, 3),
    "LayerNorm": lambda: nn.LayerNorm([3, 2, 2]),
    "Dropout beside a Linear": lambda: nn.Sequential(nn.Linear(2, 2), nn.Dropout()),
}


def with_norm(make: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), make()), nn.Conv2d(3, 2, 1))


def _same(model: nn.Module) -> nn.Module:
    return model


def _pickled(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copied: nn.Module = torch.load(file, weights_only=False)
    return copied


def _state_loaded(model: nn.Module) -> nn.Module:
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    return model


def _moved(model: nn.Module) -> nn.Module:
    return model.double().float().to("cpu")


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "the model itself": _same,
    "deepcopy": copy.deepcopy,
    "pickle": _pickled,
    "torch.save": _saved,
    "load_state_dict": _state_loaded,
    "a change of dtype": _moved,
    "deepcopy of a pickle": lambda model: copy.deepcopy(_pickled(model)),
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("norm", NORMS)
def test_the_hold_survives_train_after(copied: str, norm: str) -> None:
    model = with_norm(NORMS[norm])
    model(batch())
    freeze(model, "0")
    model = COPIES[copied](model)
    inner = model.get_submodule("0.1")
    assert inner is not None and type(model.train()) is nn.Sequential
    for mode in (True, False, True):
        assert model.train(mode) is model and type(inner.train(mode)) is type(inner)
        assert not inner.training and model.get_submodule("0").training == mode
        before = weights(model)
        x = batch()
        out = model(x)
        assert not changed(model, before), "running statistics moved"
    inner_in = model.get_submodule("0.0")(x)
    model.eval()
    if norm != "a user's subclass":
        assert torch.equal(inner(inner_in), model.get_submodule("0")(x))
    assert torch.equal(out, model(x)), "normalised by the batch"
    torch_freeze.report(model)  # puts back what pickling left out
    assert inner.train(False) is inner and not inner.training
    # Its own mode is back: the one that was asked for last, here eval, then train.
    unfreeze(model, "0")
    assert not inner.training
    model.train()
    assert inner.training and held_by(inner) is None and "train" not in vars(inner)
    before = weights(model)
    model(batch())
    assert any("running" in name for name in changed(model, before))


def test_the_copy_and_the_original_are_held_apart() -> None:
    model = with_norm(NORMS["BatchNorm2d"])
    freeze(model, "0")
    for make in (copy.deepcopy, _pickled):
        twin = make(model)
        unfreeze(twin)
        twin.train()
        assert twin.get_submodule("0.1").training and not model.get_submodule("0.1").training
        assert held_by(model[0][1]) is not None


WITHOUT_US = """
import sys
import warnings

import torch

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch_freeze":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Blocked())
warnings.simplefilter("ignore")
"""


def without_torch_freeze(code: str, *arguments: Path) -> None:
    """Run code in a Python that cannot import torch_freeze; `sys.argv` has the arguments."""
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_US + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_pickled_model_with_held_norms_loads_without_torch_freeze(
    how: str, mode: bool, tmp_path: Path
) -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Linear(2, 2))
    SPECTRAL["the older hook"](model[2])
    model[1].act = nn.Dropout()  # fused norm-activations have children
    freeze(model)
    model.train(mode)
    path, out = tmp_path / "model", tmp_path / "out"
    if how == "pickle":
        path.write_bytes(pickle.dumps(model))
    else:
        torch.save(model, path)
    without_torch_freeze(
        f"""
import copy, pickle
from torch import nn

with open(sys.argv[1], "rb") as file:
    model = pickle.load(file) if {how == "pickle"} else torch.load(file, weights_only=False)
assert not any(p.requires_grad for p in model.parameters())
for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
    before = {{name: value.clone() for name, value in one.state_dict().items()}}
    for mode in (True, False, True):
        one.train(mode)
        assert (one.training, one[1].training, one[2].training) == (mode, False, False)
        assert one[1].act.training == mode
        one(torch.randn(5, 3, 2, 2))
    for norm in (one[1], one[2]):
        assert not norm.training and type(norm.train(mode=True)) is type(norm.eval()) is type(norm)
    assert all(value.equal(before[name]) for name, value in one.state_dict().items())
torch.save(model.eval(), sys.argv[2])
# The way out that the documentation names.
del model[1].train
assert model.train()[1].training and not model[2].training
""",
        path,
        out,
    )
    # Saved there in eval mode and loaded here, it is still held, and its own mode is the last one
    # asked for.
    back: Any = torch.load(out, weights_only=False).train()
    before = weights(back)
    back(batch())
    assert not changed(back, before) and torch_freeze.report(back).total.norms_held == 2
    assert back[1].train(mode) is back[1] and not back[1].training
    assert unfreeze(back).released == ("1", "2")
    assert back[1].training == mode and back[2].training and back[1].act.training == mode
    before = weights(back)
    back.train()(batch())
    assert "1.running_mean" in changed(back, before)


def test_pickling_leaves_the_held_model_as_it_is() -> None:
    model = with_norm(NORMS["BatchNorm2d"])
    freeze(model)
    hold = held_by(model[0][1])
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    assert b"torch_freeze." not in pickle.dumps(model)
    assert held_by(model[0][1]) is hold
    assert {name: dict(vars(m)) for name, m in model.named_modules()} == before


def test_a_loaded_norm_that_is_replaced_by_what_its_train_returns_is_held_again() -> None:
    made = with_norm(NORMS["BatchNorm2d"])
    freeze(made)
    model: Any = _pickled(made)
    model[0][1] = model[0][1].train()
    assert torch_freeze.report(model).total.norms_held == 1
    before = weights(model)
    model.train()(batch())
    assert not changed(model, before)
    unfreeze(model)
    assert model[0][1].training


class _EarlierPickler(pickle.Pickler):
    """Writes a hold as the first versions did: as an instance of HeldTrain with its slots."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, HeldTrain):
            slots = {name: getattr(value, name) for name in ("layer", "mode", "shadowed")}
            return copyreg.__newobj__, (HeldTrain,), (None, slots)  # type: ignore[attr-defined]
        return NotImplemented


def test_a_hold_pickled_by_an_earlier_version_loads() -> None:
    model: Any = with_norm(NORMS["BatchNorm2d"])
    freeze(model)
    file = io.BytesIO()
    _EarlierPickler(file, 2).dump(model)
    assert b"HeldTrain" in file.getvalue()
    loaded: Any = pickle.loads(file.getvalue())
    assert held_by(loaded[0][1]) is not None and not loaded.train()[0][1].training
    unfreeze(loaded)
    assert loaded[0][1].training and b"HeldTrain" not in pickle.dumps(model)


@pytest.mark.parametrize("how", ["export", "trace", "script"])
def test_an_exported_model_with_held_norms_loads_without_torch_freeze(
    how: str, net: Net, tmp_path: Path
) -> None:
    freeze(net)
    net.train()
    x, path, values = batch(), tmp_path / "model.pt2", tmp_path / "values"
    jit: Any = torch.jit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "export":
            torch.export.save(torch.export.export(net, (x,)), path)
        else:
            jit.save(jit.trace(net, x) if how == "trace" else jit.script(net), path)
            with zipfile.ZipFile(path) as archive:
                code = [archive.read(name) for name in archive.namelist() if name.endswith(".py")]
            assert code and not any(_record.KEY.encode() in part for part in code)
    torch.save((x, net(x)), values)
    without_torch_freeze(
        f"""
x, expected = torch.load(sys.argv[2])
if {how == "export"}:
    model = torch.export.load(sys.argv[1]).module()
else:
    model = torch.jit.load(sys.argv[1])
before = {{name: value.clone() for name, value in model.state_dict().items()}}
assert torch.allclose(model(x), expected, atol=1e-6)
assert all(value.equal(before[name]) for name, value in model.state_dict().items())
""",
        path,
        values,
    )


@pytest.mark.parametrize("norm", NO_NORMS)
def test_layers_without_running_statistics_are_left_alone(norm: str) -> None:
    model = with_norm(NO_NORMS[norm])
    before = {name: set(vars(m)) for name, m in model.named_modules()}
    assert freeze(model).held == ()
    assert all(m.training for m in model.modules())
    # What freeze froze is noted; nothing else is added.
    assert {name: set(vars(m)) - {_record.KEY} for name, m in model.named_modules()} == before


def test_a_held_norm_runs_its_own_forward_without_hooks() -> None:
    # The hold costs a forward nothing: no hook, no wrapper, only `training` reads differently.
    norm = nn.BatchNorm2d(3)
    before = dict(vars(norm))
    freeze(norm)
    differs = {k for k, v in vars(norm).items() if k not in before or v is not before[k]}
    assert differs == {"train", "training", _record.KEY}
    assert type(norm) is nn.BatchNorm2d and "forward" not in vars(norm)
    assert not norm._forward_hooks and not norm._forward_pre_hooks and not norm._backward_hooks
    assert set(norm.state_dict()) == set(nn.BatchNorm2d(3).state_dict())


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_hold_norm_false_ends_a_hold(mode: bool, net: Net) -> None:
    freeze(net)
    net.train(mode)
    result = freeze(net, "layers.0", hold_norm=False)
    assert result.released == ("layers.0.bn", "layers.0.plain_bn")
    assert (result.changed, result.held) == ((), ())
    assert "0 changed, 2 norms released" in str(result)
    assert {n for n, m in net.named_modules() if held_by(m)} == {"layers.1.bn", "layers.1.plain_bn"}
    assert net.layers[0].bn.training == net.layers[0].plain_bn.training == mode
    with frozen(net, "layers.1", hold_norm=False):
        assert net.layers[1].bn.training == mode
    assert held_by(net.layers[1].bn) is not None and not net.layers[1].bn.training


def test_hold_norm_false_leaves_norms_in_their_own_mode(net: Net) -> None:
    result = freeze(net, hold_norm=False)
    assert result.held == () and all(m.training for m in net.modules())
    before = weights(net)
    net(batch())
    assert any("running_mean" in name for name in changed(net, before))


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_unfreezing_restores_the_mode_asked_for_meanwhile(mode: bool, net: Net) -> None:
    net.train(not mode)
    freeze(net)
    net.train(mode)
    result = unfreeze(net)
    assert set(result.released) == {f"layers.{i}.{n}" for i in (0, 1) for n in ("bn", "plain_bn")}
    assert all(m.training == mode for m in net.modules())


def test_unfreezing_restores_the_mode_when_none_was_asked_for(net: Net) -> None:
    net.layers[0].bn.eval()
    freeze(net)
    unfreeze(net)
    modes = [net.layers[0].bn.training, net.layers[1].bn.training, net.layers[0].plain_bn.training]
    assert modes == [False, True, True]


def test_held_norms_use_their_running_statistics() -> None:
    norm: Any = nn.BatchNorm1d(2)
    norm.running_mean.fill_(5.0)
    freeze(norm)
    norm.train()
    assert norm(torch.zeros(4, 2)).mean().item() == pytest.approx(-5, rel=1e-3)


def test_a_norm_whose_tracking_is_off_is_held_by_its_running_statistics() -> None:
    # Another library's freeze sets track_running_stats False and leaves the norm in train mode.
    norm: Any = nn.BatchNorm1d(2)
    norm.running_mean.fill_(5.0)
    norm.track_running_stats = False
    freeze(norm)
    norm.train()
    assert norm(torch.zeros(4, 2)).mean().item() == pytest.approx(-5, rel=1e-3)


HELD: dict[str, tuple[Callable[[Net], Any], set[str]]] = {
    "a module around it": (lambda m: freeze(m, "layers.0"), {"layers.0.bn", "layers.0.plain_bn"}),
    "its own name": (lambda m: freeze(m, "layers.0.bn"), {"layers.0.bn"}),
    "its name without affine": (lambda m: freeze(m, "*.plain_bn"), {"layers.*.plain_bn"}),
    "its class": (lambda m: freeze(m, nn.BatchNorm2d), {"layers.*.bn", "layers.*.plain_bn"}),
    "all its parameters": (lambda m: freeze(m, "layers.0.bn.*"), {"layers.0.bn"}),
    "some of its parameters": (lambda m: freeze(m, "layers.0.bn.weight"), set()),
    "its parameters one after the other": (
        lambda m: (freeze(m, "layers.0.bn.weight"), freeze(m, "layers.0.bn.bias")),
        {"layers.0.bn"},
    ),
    "every parameter around it by a callable": (
        lambda m: freeze(m, lambda n, p: n.startswith("layers.1")),
        {"layers.1.bn", "layers.1.plain_bn"},
    ),
    "all but a part of it": (
        lambda m: freeze(m, exclude="*.bias"),
        {"layers.*.plain_bn"},
    ),
    "all but its class": (lambda m: freeze(m, exclude=nn.BatchNorm2d), set()),
    "all but the module around it": (
        lambda m: freeze_except(m, "layers.0"),
        {"layers.1.bn", "layers.1.plain_bn"},
    ),
    "all but the parameters around it": (
        lambda m: freeze(m, exclude=lambda n, p: n.startswith("layers.0")),
        {"layers.1.bn", "layers.1.plain_bn"},
    ),
    "one parameter freed again": (
        lambda m: (freeze(m), unfreeze(m, "layers.0.bn.bias")),
        {"layers.1.bn", "layers.*.plain_bn"},
    ),
    "the module around it freed again": (
        lambda m: (freeze(m), unfreeze(m, "layers.0")),
        {"layers.1.bn", "layers.1.plain_bn"},
    ),
    "all freed but one": (
        lambda m: (freeze(m), unfreeze(m, exclude="layers.1.bn")),
        {"layers.1.bn"},
    ),
}


@pytest.mark.parametrize("case", HELD)
def test_a_norm_is_held_by_freezing(case: str, net: Net) -> None:
    act, expected = HELD[case]
    act(net)
    wanted = {e.replace("*", i) for e in expected for i in "01"}
    held = {n for n, m in net.named_modules() if held_by(m) is not None}
    assert held == wanted
    assert {n for n, m in net.train().named_modules() if not m.training} == wanted


def test_a_user_subclass_keeps_its_own_train_and_its_children_their_mode() -> None:
    model = with_norm(NORMS["a user's subclass"])
    norm = model[0][1]
    freeze(model)
    model.train()
    assert norm.calls == [True] and norm.act.training and not norm.training
    model.eval()
    assert norm.calls == [True, False] and not norm.act.training


def test_a_train_the_user_put_on_the_layer_is_given_back() -> None:
    norm: Any = nn.BatchNorm1d(2)
    calls: list[bool] = []
    norm.train = lambda mode=True: calls.append(mode)
    own = norm.train
    freeze(norm)
    norm.train(False)
    assert calls == [False]
    unfreeze(norm)
    assert norm.train is own


def test_freezing_again_corrects_a_direct_write_to_training() -> None:
    norm = nn.BatchNorm1d(2)
    freeze(norm)
    norm.training = True
    freeze(norm)
    assert not norm.training


def test_a_wrong_mode_still_raises() -> None:
    norm = nn.BatchNorm1d(2)
    freeze(norm)
    with pytest.raises(ValueError, match="boolean"):
        norm.train("yes")  # type: ignore[arg-type]
    assert not norm.training


@pytest.mark.parametrize("how", ["export", "trace", "script"])
def test_a_held_model_can_be(how: str, net: Net) -> None:
    freeze(net)
    net.train()
    x = batch()
    made: Any
    jit: Any = torch.jit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "export":
            made = torch.export.export(net, (x,)).module()
        elif how == "trace":
            made = jit.trace(net, x)
        else:
            made = jit.script(net)
    before = weights(net)
    assert torch.allclose(made(x), net(x), atol=1e-6)
    assert not changed(net, before)


def test_the_norms_of_a_scripted_model_are_held() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jit: Any = torch.jit
        model = jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    result = freeze(model, "1")
    assert (result.held, result.changed) == (("1",), ("1.weight", "1.bias"))
    model.train()
    before = weights(model)
    model(torch.randn(5, 2))
    assert not changed(model, before)
    unfreeze(model)
    model(torch.randn(5, 2))
    assert "1.running_mean" in changed(model, before)


# --- what the model itself keeps frozen -----------------------------------------------------------


class Encoder(nn.Module):
    """Fixed positions beside trainable layers, as in Whisper's encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.positions = nn.Embedding(3, 4)
        self.positions.requires_grad_(False)
        self.layers: Any = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Linear(4, 2)


FIXED = "encoder.positions.weight"
EMBED, POSITIONS, LAYERS = "encoder.embed", "encoder.positions", "encoder.layers"

# Calls that leave the positions frozen and everything else trainable.
KEPT: dict[str, Callable[[Any], Any]] = {
    "everything": lambda m: (freeze(m), unfreeze(m)),
    "everything, twice each": lambda m: (freeze(m), freeze(m), unfreeze(m), unfreeze(m)),
    "a part": lambda m: (freeze(m, "encoder"), unfreeze(m, "encoder")),
    "by a glob": lambda m: (freeze(m, "enc*"), unfreeze(m, "enc*")),
    "a module as the model": lambda m: (freeze(m.encoder), unfreeze(m)),
    "all but the head": lambda m: (freeze_except(m, "head"), unfreeze(m)),
    "a part, then everything": lambda m: (freeze(m, "encoder.embed"), freeze(m), unfreeze(m)),
    "what lies beside it first": lambda m: (
        freeze(m, "encoder.embed", "encoder.layers", "head"),
        freeze(m),
        unfreeze(m),
    ),
    "named, but beside others": lambda m: (freeze(m, "encoder.embed", FIXED), unfreeze(m)),
    "named in a list of others": lambda m: (
        freeze(m),
        unfreeze(m, ["encoder", "head", "encoder.positions"]),
    ),
    "its parameters in one list": lambda m: (
        freeze(m, m.parameters()),
        unfreeze(m, m.parameters()),
    ),
    "what is named and what is not": lambda m: (
        freeze(m),
        unfreeze(m, exclude="head"),
        unfreeze(m),
    ),
    "frozen within frozen": lambda m: _frozen_and_thawed_within(m),
    "a deep copy": lambda m: (freeze(m), _become(m, copy.deepcopy(m)), unfreeze(m)),
    "a pickle": lambda m: (freeze(m), _become(m, _pickled(m)), freeze(m), unfreeze(m)),
    "a compiled model": lambda m: (freeze(torch.compile(m)), unfreeze(m)),
    "a state saved and loaded": lambda m: (
        freeze(m),
        _become(m, _resumed(m)),
        freeze(m),
        unfreeze(m),
    ),
    "a schedule's table": lambda m: run(FreezeSchedule(m, {0: ["encoder"], 1: []}), 2),
    "a schedule's groups": lambda m: run(
        gradual_unfreeze(
            m,
            [[EMBED, POSITIONS], f"{LAYERS}.0", f"{LAYERS}.1", "head"],
        ),
        4,
    ),
    "a schedule's last group, which it never freezes": lambda m: run(
        gradual_unfreeze(m, ["head", "encoder"]), 2
    ),
    "a rotation": lambda m: (
        run(rotate(m, ["encoder", "head"], k=1, every=1), 6),
        unfreeze(m),
    ),
}


def run(schedule: FreezeSchedule, units: int) -> None:
    for _ in range(units):
        schedule.step()
        assert FIXED not in trains(schedule.model)


def _frozen_and_thawed_within(model: nn.Module) -> None:
    with frozen(model):
        unfreeze(model)
        assert trains(model) == names(model, "") - {FIXED}


def _become(model: nn.Module, other: nn.Module) -> None:
    vars(model).update(vars(other))


def _resumed(model: nn.Module) -> nn.Module:
    fresh = Keeps()
    load_frozen_state_dict(fresh, json.loads(json.dumps(frozen_state_dict(model))))
    return fresh


@pytest.mark.parametrize("case", KEPT)
def test_unfreezing_leaves_what_freeze_found_frozen(case: str) -> None:
    model = Keeps()
    KEPT[case](model)
    assert trains(model) == names(model, "") - {FIXED}


def test_under_ddp_a_schedule_complains_only_of_what_it_unfreezes() -> None:
    def check(schedule: FreezeSchedule) -> None:
        check_ddp(
            schedule,
            "callback",
            finds_unused=True,
            static_graph=False,
            to_find_unused="",
            to_be_dynamic="",
        )

    for make in (
        lambda m: FreezeSchedule(m, {0: ["encoder"], 1: []}),
        lambda m: gradual_unfreeze(m, ["head", "encoder"]),
        lambda m: rotate(m, ["encoder", "head"], k=1, every=1),
    ):
        model = Keeps()
        schedule = make(model)
        check(schedule)
        schedule.step()
        assert FIXED not in trains(model)
        model = Keeps()
        model.requires_grad_(False)
        with pytest.raises(RuntimeError, match=r"frozen when DistributedDataParallel wrapped"):
            check(make(model))


# Calls that leave everything trainable.
THAWED: dict[str, Callable[[Any], Any]] = {
    "its own name": lambda m: (freeze(m), unfreeze(m, FIXED), unfreeze(m)),
    "its own name beside others": lambda m: (freeze(m), unfreeze(m, "encoder", FIXED, "head")),
    "itself": lambda m: (freeze(m), unfreeze(m, m.encoder.positions.weight, m)),
    "the module that holds it alone": lambda m: (freeze(m), unfreeze(m, "*.positions", m)),
    "that module as the model": lambda m: (freeze(m), unfreeze(m.encoder.positions), unfreeze(m)),
    "every parameter by itself": lambda m: (freeze(m), unfreeze(m, *m.parameters())),
    "without a freeze before": lambda m: unfreeze(m),
    "a freeze that is over": lambda m: (_frozen_for_a_moment(m), unfreeze(m)),
    "a freeze of nothing else": lambda m: (freeze(m, FIXED), unfreeze(m)),
    "everything frozen by hand before": lambda m: (
        m.requires_grad_(False),
        freeze(m),
        unfreeze(m),
    ),
    "trained by hand in between": lambda m: (
        freeze(m),
        m.encoder.positions.requires_grad_(True),
        freeze(m),
        unfreeze(m),
    ),
    "a schedule of what was frozen by hand": lambda m: (
        m.encoder.requires_grad_(False),
        thaws(gradual_unfreeze(m, [EMBED, [POSITIONS, LAYERS], "head"])),
    ),
    "a schedule whose first group was frozen by hand": lambda m: (
        m.encoder.embed.requires_grad_(False),
        thaws(gradual_unfreeze(m, [EMBED, POSITIONS, LAYERS, "head"])),
    ),
    "a schedule whose last group was frozen by hand but for the head": lambda m: (
        m.requires_grad_(False),
        m.head.requires_grad_(True),
        thaws(gradual_unfreeze(m, [EMBED, [POSITIONS, LAYERS, "head"]])),
    ),
    "a rotation over what was frozen by hand": lambda m: (
        m.encoder.requires_grad_(False),
        thaws(rotate(m, [EMBED, POSITIONS, f"{LAYERS}.*"], k=4, every=1, always="head")),
    ),
    "a state in which it trains": lambda m: (
        freeze(m),
        load_frozen_state_dict(m, frozen_state_dict(Keeps().requires_grad_(True))),
    ),
}


def thaws(schedule: FreezeSchedule) -> None:
    for _ in range(4):
        schedule.step()


def _frozen_for_a_moment(model: nn.Module) -> None:
    with frozen(model):
        pass
    assert not any(_record.KEY in vars(module) for module in model.modules())


@pytest.mark.parametrize("case", THAWED)
def test_unfreezing_thaws_what_was_frozen_by_hand_or_is_named_by_itself(case: str) -> None:
    model = Keeps()
    THAWED[case](model)
    assert trains(model) == names(model, "")


def test_the_reports_name_what_was_found_frozen() -> None:
    model = Keeps()
    (note,) = freeze(model).notes
    assert note.startswith(f"{FIXED} was frozen already, so unfreeze leaves it frozen")
    assert freeze(model).notes == ()
    result = unfreeze(model)
    (note,) = result.notes
    assert note.startswith(f"{FIXED} was frozen before freeze was called and stays frozen")
    assert FIXED in result.matched and FIXED not in result.changed
    assert result.frozen_names == (FIXED,)
    # What the note says to do.
    assert f"name it by itself: unfreeze(model, {FIXED!r})" in note
    assert unfreeze(model, FIXED).notes == ()
    several = nn.Sequential(*(nn.Linear(1, 1) for _ in range(4)))
    several[:3].requires_grad_(False)
    assert freeze(several).notes[0].startswith("0.weight, 0.bias, 1.weight and 3 more were frozen")
    assert "more were frozen before freeze was called and stay" in unfreeze(several).notes[0]


def test_what_is_left_frozen_is_left_under_all_its_names() -> None:
    model = Tied()
    model.embed.weight.requires_grad_(False)
    freeze(model.head)
    freeze(model)
    result = unfreeze(model, "head")
    assert trains(model) == {"head.bias"}
    assert not any("trainable too" in note for note in result.notes)
    unfreeze(model, "body")
    assert trains(model) == names(model, "head.bias", "body")


def test_a_norm_that_was_frozen_by_hand_is_given_back_as_it_was(net: Net) -> None:
    net.layers[0].requires_grad_(False)
    before = trains(net)
    assert len(freeze(net).held) == len(unfreeze(net).released) == 4
    assert trains(net) == before and all(m.training for m in net.modules())


def test_what_cannot_train_may_be_frozen_and_unfrozen_with_the_rest() -> None:
    model = nn.Linear(2, 2)
    model.packed = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    freeze(model)
    unfreeze(model)
    assert trains(model) == {"weight", "bias"}


# --- compiled and wrapped models -----------------------------------------------------------------


def test_a_compiled_model_follows_freezing_and_unfreezing(net: Net) -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    compiled: Any = torch.compile(net, backend=counter)
    x = batch()
    freeze(compiled, "layers", "stem")
    compiled.train()
    before = weights(net)
    compiled(x).sum().backward()
    assert not changed(net, before)
    assert {n for n, p in net.named_parameters() if p.grad is not None} == names(net, "head")
    frozen_frames = counter.frame_count
    compiled(x)
    assert counter.frame_count == frozen_frames, "recompiled without a change"
    result = unfreeze(compiled, "_orig_mod.layers")
    assert set(result.changed) == names(net, "layers")
    before = weights(net)
    compiled(x).sum().backward()
    assert any("running_mean" in name for name in changed(net, before))
    with_grad = {n for n, p in net.named_parameters() if p.grad is not None}
    assert with_grad == names(net, "head", "layers")
    assert counter.frame_count == frozen_frames + 1


def test_the_hold_survives_the_default_compiler(net: Net) -> None:
    torch.compiler.reset()
    freeze(net)
    compiled: Any = torch.compile(net, backend="aot_eager")
    compiled.train()
    before = weights(net)
    x = batch()
    assert torch.allclose(compiled(x), net(x), atol=1e-6)
    assert not changed(net, before)


def test_names_leave_out_the_segments_of_wrappers(net: Net) -> None:
    net.layers[0] = torch.compile(net.layers[0])
    model = nn.DataParallel(net)
    assert freeze(model, "layers.0.conv").changed == (
        "layers.0.conv.weight",
        "layers.0.conv.bias",
    )
    assert freeze(model, "module.layers.0._orig_mod.bn").changed == (
        "layers.0.bn.weight",
        "layers.0.bn.bias",
    )
    assert freeze(model, net.layers[0]).matched[0] == "layers.0.conv.weight"


def test_a_module_called_module_keeps_its_name() -> None:
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    assert freeze(model, "module").changed == ("module.weight", "module.bias")


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone, which outlives the test's DistributedDataParallel.

    If the reducer were the last to release the group, it would join the group's threads while it
    holds the GIL, which one of them may be waiting for.
    """
    dist = torch.distributed
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    yield
    gc.collect()
    dist.destroy_process_group()


@pytest.mark.compiled
def test_ddp_freezing_a_wrapped_model_warns_of_what_then_happens(
    net: Net, one_process: None
) -> None:
    ddp = DistributedDataParallel(net)
    with pytest.warns(UserWarning, match=r"Expected to have finished reduction.*wrap") as seen:
        freeze(ddp, "stem")
    assert seen[0].filename == __file__
    ddp(batch()).sum().backward()
    with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
        ddp(batch())
    # The fix that the warning names.
    ddp = DistributedDataParallel(ddp.module)
    for _ in range(2):
        ddp(batch()).sum().backward()
    assert net.stem.weight.grad is None
    with pytest.warns(UserWarning, match="processes drift apart"):
        unfreeze(ddp, "module.stem")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unfreeze(ddp, "stem")


@pytest.mark.compiled
@pytest.mark.parametrize("static", [False, True])
def test_ddp_that_looks_for_unused_parameters_may_be_frozen(
    net: Net, one_process: None, static: bool
) -> None:
    ddp = DistributedDataParallel(net, find_unused_parameters=True, static_graph=static)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        freeze(ddp, "stem")
        with frozen(ddp, "head"):
            pass
        unfreeze(ddp, "stem")
        schedule = FreezeSchedule(ddp, {0: ["stem"], 1: []})
        for _ in range(3):
            schedule.step()
            if not static:
                ddp(batch()).sum().backward()
    warned = [str(warning.message) for warning in caught if "unused" in str(warning.message)]
    # DDP waits for all gradients of a graph that is declared static.
    assert [message.split(":")[0] for message in warned] == (
        ["freeze", "frozen", "FreezeSchedule"] if static else []
    )
    assert not audit(ddp)


@pytest.mark.compiled
def test_a_parameter_ddp_never_averages_is_found(net: Net, one_process: None) -> None:
    freeze(net, "stem")
    ddp = DistributedDataParallel(net, find_unused_parameters=True)
    assert not audit(ddp)
    with pytest.warns(UserWarning, match=r"unfreeze: stem\.weight \(and 1 more\) was frozen"):
        unfreeze(ddp)
    found = [f for f in audit(ddp) if f.kind == "not reduced"]
    assert [f.names for f in found] == [("stem.weight", "stem.bias")]
    assert {f.level for f in found} == {"error"}
    ddp = DistributedDataParallel(ddp.module)  # the fix
    assert not audit(ddp)


def test_parameters_that_ddp_ignores_do_not_matter(net: Net, one_process: None) -> None:
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        net, ["stem.weight", "stem.bias"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ddp = DistributedDataParallel(net)
        freeze(ddp, "stem")
        unfreeze(ddp, "stem")
    assert not audit(ddp)


def test_freezing_before_wrapping_works_without_a_warning(net: Net, one_process: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        freeze(net, "stem", "layers.0")
        ddp: Any = DistributedDataParallel(net)
        before = weights(net)
        for _ in range(2):
            ddp.train()
            ddp(batch()).sum().backward()
        moved = changed(net, before)
        assert not any(name.startswith(("stem", "layers.0")) for name in moved)


def test_fsdp2_takes_mixed_requires_grad(net: Net, one_process: None) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("this torch has no fully_shard")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    freeze(net, "stem", "layers.0")
    for layer in net.layers:
        fsdp.fully_shard(layer, mesh=mesh)
    fsdp.fully_shard(net, mesh=mesh)
    for tuned in ({"layers.1", "head"}, {"head"}):
        freeze_except(net, *tuned)
        net(batch()).sum().backward()
        got = {n for n, p in net.named_parameters() if p.grad is not None}
        assert got == trains(net) == names(net, *tuned)
    unfreeze(net, "layers.0")
    net(batch()).sum().backward()
    assert net.layers[0].conv.weight.grad is not None


def test_a_shared_walk_sees_every_module_once() -> None:
    shared = nn.Linear(2, 2)
    tree = Tree(nn.ModuleList([shared, shared, nn.ModuleList([shared])]))
    assert len(tree.order) == 3 and len(tree.params) == 2
    assert tree.order[1].names == ("0", "1", "2.0")
