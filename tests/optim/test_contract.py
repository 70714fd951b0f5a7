"""What other code relies on in torch.optim.Optimizer: hooks, closures, profiler, schedulers."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import pickle
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import optim_cases as cases
from tests.helpers.optim_cases import FrozenAwareAdam, FrozenAwareAdamW, FrozenAwareSGD
from tests.helpers.schedulers import SCHEDULERS

FAMILIES = cases.each_family(cases.UNLIKE_FAMILIES)
ALL_FAMILIES = cases.each_family()
SOME_HYPERS = cases.per_family(lambda family: family.some_hypers, cases.UNLIKE_FAMILIES)


def _one(**hyper: Any) -> tuple[FrozenAwareSGD, torch.nn.Parameter]:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    return FrozenAwareSGD([p], **({"lr": 0.1} | hyper)), p


# ------------------------------------------------------------------------- signature and arguments


@pytest.mark.parametrize("method", ["__init__", "zero_grad", "add_param_group", "load_state_dict"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_signature_is_stocks(family: cases.Family, method: str) -> None:
    ours = inspect.signature(getattr(family.ours, method))
    theirs = inspect.signature(getattr(family.stock, method))
    common = len(theirs.parameters)
    assert list(ours.parameters)[:common] == list(theirs.parameters)
    for name, parameter in theirs.parameters.items():
        assert ours.parameters[name].kind == parameter.kind
        assert ours.parameters[name].default == parameter.default
    for parameter in list(ours.parameters.values())[common:]:
        assert method == "__init__", "more options only where they are asked for by name"
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default is not inspect.Parameter.empty


def test_step_goes_by_its_name_in_errors() -> None:
    optimizer, _ = _one()
    with pytest.raises(TypeError, match=r"^step\(\) takes"):
        optimizer.step(None, None)  # type: ignore[call-overload]


def test_step_has_as_many_wrappers_as_stocks() -> None:
    """torch's own tests of compiled optimizers remove two wrappers."""
    optimizer, p = _one()
    before = p.detach().clone()
    p.grad = torch.ones_like(p)
    assert optimizer.step.__wrapped__.__wrapped__(optimizer) is None  # type: ignore[attr-defined]
    assert not torch.equal(p, before)


def test_step_takes_a_closure_and_nothing_else() -> None:
    """GradScaler looks here for a `grad_scaler` argument."""
    parameters = inspect.signature(_one()[0].step).parameters
    assert list(parameters) == ["closure"] and parameters["closure"].default is None


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_defaults_are_stocks(family: cases.Family) -> None:
    p = torch.nn.Parameter(torch.ones(1))
    ours, theirs = family.ours([p]), family.stock([p])
    assert ours.defaults == theirs.defaults and list(ours.defaults) == list(theirs.defaults)
    assert ours.param_groups == theirs.param_groups
    assert list(ours.param_groups[0]) == list(theirs.param_groups[0])


POSITIONAL = {"SGD": (0.1, 0.9, 0, 1e-4, True), "Adam": (0.1, (0.8, 0.9), 1e-7, 0.3, True)}
POSITIONAL["AdamW"] = POSITIONAL["Adam"]


@pytest.mark.parametrize("name", list(cases.FAMILIES))
def test_positional_arguments(name: str) -> None:
    family, p = cases.FAMILIES[name], torch.nn.Parameter(torch.ones(1))
    args = ([p], *POSITIONAL[name])
    assert family.ours(*args).defaults == family.stock(*args).defaults
    with pytest.raises(TypeError):
        family.ours(*args, False)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_is_one_of_stocks(family: cases.Family) -> None:
    optimizer = family.ours([_parameter()])
    assert isinstance(optimizer, family.stock) and isinstance(optimizer, torch.optim.Optimizer)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_repr_is_stocks_except_for_the_name(family: cases.Family) -> None:
    p = torch.nn.Parameter(torch.ones(1))
    groups = [{"params": [p], "lr": 0.3}]
    ours, theirs = (
        repr(make(copy.copy(groups), **family.with_state)) for make in (family.ours, family.stock)
    )
    assert ours == theirs.replace(family.stock.__name__, family.name, 1)


def _parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(3))


# Fresh arguments for every construction, since some of them are consumed.
BAD_ARGUMENTS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "negative lr": lambda: ([_parameter()], {"lr": -0.1}),
    "negative tensor lr": lambda: ([_parameter()], {"lr": torch.tensor(-0.1)}),
    "lr of two elements": lambda: ([_parameter()], {"lr": torch.tensor([0.1, 0.2])}),
    "lr of no element": lambda: ([_parameter()], {"lr": torch.tensor([])}),
    "lr None": lambda: ([_parameter()], {"lr": None}),
    "lr a string": lambda: ([_parameter()], {"lr": "0.1"}),
    "negative decay": lambda: ([_parameter()], {"weight_decay": -0.1}),
    "no parameters": lambda: ([], {}),
    "an empty iterator": lambda: (iter(()), {}),
    "a tensor": lambda: (_parameter(), {}),
    "no iterable": lambda: (3, {}),
    "a list of numbers": lambda: ([1.0], {}),
    "a list of modules": lambda: ([torch.nn.Linear(1, 1)], {}),
    "a non-leaf": lambda: ([_parameter() * 2], {}),
    "a set in a group": lambda: ([{"params": {_parameter()}}], {}),
    "a group without params": lambda: ([{"lr": 0.1}], {}),
    "one parameter in two groups": lambda: (
        [{"params": [q]} for p in [_parameter()] for q in (p, p)],
        {},
    ),
    "names for some": lambda: ([("a", _parameter()), _parameter()], {}),
    "names in one group": lambda: (
        [{"params": [("a", _parameter())]}, {"params": [_parameter()]}],
        {},
    ),
    "fused and foreach": lambda: ([_parameter()], {"fused": True, "foreach": True}),
    "fused and differentiable": lambda: ([_parameter()], {"fused": True, "differentiable": True}),
    "an unknown argument": lambda: ([_parameter()], {"rho": 0.9}),
}
BAD_OPTIONS: dict[str, dict[str, Callable[[], dict[str, Any]]]] = {
    "SGD": {
        "negative momentum": lambda: {"momentum": -0.1},
        "nesterov without momentum": lambda: {"nesterov": True},
        "nesterov with dampening": lambda: {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        "betas": lambda: {"betas": (0.9, 0.99)},
    },
    "Adam": {
        "negative eps": lambda: {"eps": -1e-8},
        "beta1 of 1": lambda: {"betas": (1.0, 0.9)},
        "negative beta2": lambda: {"betas": (0.9, -0.1)},
        "a tensor and a float as betas": lambda: {"betas": (torch.tensor(0.9), 0.9)},
        "betas of two elements": lambda: {"betas": (torch.ones(2) / 2, torch.tensor(0.5))},
        "betas of one number": lambda: {"betas": (0.9,)},
        "betas a number": lambda: {"betas": 0.9},
        "tensor lr and foreach": lambda: {"lr": torch.tensor(0.1), "foreach": True},
        "tensor betas and foreach": lambda: {
            "betas": (torch.tensor(0.9), torch.tensor(0.99)),
            "foreach": True,
        },
        "momentum": lambda: {"momentum": 0.9},
    },
}
BAD_OPTIONS["AdamW"] = BAD_OPTIONS["Adam"] | {
    "decoupled_weight_decay": lambda: {"decoupled_weight_decay": True}
}


@pytest.mark.parametrize(
    ("family", "make"),
    [
        pytest.param(family, make, id=f"{name}: {what}")
        for name, family in cases.FAMILIES.items()
        for what, make in (
            *BAD_ARGUMENTS.items(),
            *(
                (what, lambda options=options: ([_parameter()], options()))
                for what, options in BAD_OPTIONS[name].items()
            ),
        )
    ],
)
def test_bad_arguments_raise_what_stock_raises(
    family: cases.Family, make: Callable[[], tuple[Any, Any]]
) -> None:
    """Same type, same text (a TypeError may name our class instead of stock's)."""
    errors = []
    for kind in (family.stock, family.ours):
        params, kwargs = make()
        with pytest.raises(Exception) as raised:  # noqa: PT011  # stock says which
            kind(params, **kwargs)
        errors.append((raised.type, str(raised.value).replace("FrozenAware", "")))
    assert errors[0] == errors[1]


def test_duplicates_warn_as_stock() -> None:
    p = _parameter()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        FrozenAwareSGD([p, p], lr=0.1)


def test_named_parameters() -> None:
    model = torch.nn.Linear(2, 3)
    optimizer = FrozenAwareSGD(model.named_parameters(), lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = model.bias.detach().clone()
    optimizer.step()
    assert torch.equal(model.bias, before - 0.1)


@pytest.mark.parametrize("params", ["list", "generator", "tuple", "dict values", "groups"])
def test_any_iterable_of_parameters(params: str) -> None:
    p, q = _parameter(), _parameter()
    given: Any = {
        "list": [p, q],
        "generator": (x for x in (p, q)),
        "tuple": (p, q),
        "dict values": {"a": p, "b": q}.values(),
        "groups": [{"params": p}, {"params": (x for x in (q,)), "lr": 0.1}],
    }[params]
    optimizer = FrozenAwareSGD(given, lr=0.1)
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    assert torch.equal(p, torch.full((3,), 0.9)) and torch.equal(p, q)


# ------------------------------------------------------------------------------------------- hooks


class Override(FrozenAwareSGD):
    """A user's subclass that overrides step, as wrappers of all kinds do."""

    body = 0

    def step(self, closure: Any = None) -> Any:
        self.body += 1
        return super().step(closure)


class Renamed(FrozenAwareSGD):
    """A subclass without a step of its own."""


class OverrideAdamW(FrozenAwareAdamW):
    """The same of AdamW."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


CLASSES: dict[str, Any] = {
    "FrozenAwareSGD": FrozenAwareSGD,
    "a subclass": Renamed,
    "a subclass that overrides step": Override,
    "FrozenAwareAdam": FrozenAwareAdam,
    "FrozenAwareAdamW": FrozenAwareAdamW,
    "a subclass of AdamW's that overrides step": OverrideAdamW,
}
# Without its decay AdamW's first step is SGD's of a gradient of one.
ONE_STEP: dict[str, Any] = {"lr": 0.1, "weight_decay": 0}


def stock_of(kind: Any) -> Any:
    """The class of torch's that one of ours derives from."""
    return next(family.stock for family in cases.FAMILIES.values() if issubclass(kind, family.ours))


@pytest.fixture
def global_hooks() -> Any:
    """Registers global hooks and removes them again."""
    handles: list[Any] = []

    def register(pre: Any = None, post: Any = None) -> None:
        if pre:
            handles.append(register_optimizer_step_pre_hook(pre))
        if post:
            handles.append(register_optimizer_step_post_hook(post))

    yield register
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("plain_exists", [False, True], ids=["", "after stock's"])
@pytest.mark.parametrize("remake", [False, True], ids=["", "deep-copied first"])
@pytest.mark.parametrize("kind", cases.ids(CLASSES))
def test_hooks_run_exactly_once_and_in_stocks_order(
    kind: Any, remake: bool, plain_exists: bool, global_hooks: Any
) -> None:
    """A plain SGD wraps `SGD.step` permanently, so this also runs after one was made."""
    if plain_exists:
        stock_of(kind)([_parameter()])
    p = _parameter()
    p.grad = torch.ones(3)
    optimizer = kind([p], **ONE_STEP)
    if remake:
        optimizer = copy.deepcopy(optimizer)
        p = optimizer.param_groups[0]["params"][0]
        p.grad = torch.ones(3)
    heard: list[tuple[str, Any, float]] = []

    def listen(name: str) -> Callable[..., None]:
        def hook(sgd: Any, args: Any, kwargs: Any) -> None:
            heard.append((name, sgd, p[0].item()))

        return hook

    global_hooks(listen("global pre"), listen("global post"))
    optimizer.register_step_pre_hook(listen("own pre"))
    optimizer.register_step_post_hook(listen("own post"))
    optimizer.step()
    assert [name for name, _, _ in heard] == ["global pre", "own pre", "own post", "global post"]
    assert all(sgd is optimizer for _, sgd, _ in heard)
    assert [value for _, _, value in heard] == pytest.approx([1.0, 1.0, 0.9, 0.9])


CALLS: dict[str, Callable[[Any], Any]] = {
    "step()": lambda optimizer: optimizer.step(),
    "step(closure)": lambda optimizer: optimizer.step(_closure),
    "step(closure=closure)": lambda optimizer: optimizer.step(closure=_closure),
}


def _closure() -> float:
    return 3.0


@pytest.mark.parametrize("call", cases.ids(CALLS))
@pytest.mark.parametrize("kind", cases.ids(CLASSES))
def test_hooks_see_stocks_arguments(kind: Any, call: Callable[[Any], Any]) -> None:
    seen = []
    for make in (stock_of(kind), kind):
        optimizer = make([_parameter()], lr=0.1)

        def hook(sgd: Any, args: Any, kwargs: Any, optimizer: Any = optimizer) -> None:
            seen.append((["self" if a is optimizer else a for a in args], dict(kwargs)))

        optimizer.register_step_pre_hook(hook)
        optimizer.register_step_post_hook(hook)
        call(optimizer)
    assert seen[:2] == seen[2:]


@pytest.mark.parametrize("kind", cases.ids(CLASSES))
def test_a_pre_hook_may_change_the_arguments(kind: Any) -> None:
    p = _parameter()
    optimizer = kind([p], **ONE_STEP)

    def closure() -> float:
        p.grad = torch.ones(3)
        return 5.0

    optimizer.register_step_pre_hook(lambda sgd, args, kwargs: ((sgd, closure), {}))
    seen: list[Any] = []
    optimizer.register_step_post_hook(lambda sgd, args, kwargs: seen.append((args, kwargs)))
    assert optimizer.step() == 5.0
    assert torch.allclose(p, torch.full((3,), 0.9))
    assert seen == [((optimizer, closure), {})]


def test_a_pre_hook_that_returns_nonsense_raises_as_stock() -> None:
    optimizer, p = _one()
    optimizer.register_step_pre_hook(lambda *_: 3)
    with pytest.raises(RuntimeError, match="must return None or a tuple of"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))


def test_a_hook_that_removes_itself() -> None:
    optimizer, _ = _one()
    heard: list[int] = []

    def hook(*_: Any) -> None:
        heard.append(1)
        handle.remove()

    handle = optimizer.register_step_post_hook(hook)
    optimizer.step()
    optimizer.step()
    assert heard == [1]


@pytest.mark.parametrize("kind", cases.ids(CLASSES))
def test_a_pre_hook_that_freezes_is_honoured_in_the_same_step(kind: Any) -> None:
    p = _parameter()
    p.grad = torch.ones(3)
    optimizer = kind([p], **ONE_STEP)

    def freeze(*_: Any) -> None:
        p.requires_grad_(False)

    optimizer.register_step_pre_hook(freeze)
    optimizer.step()
    assert torch.equal(p, torch.ones(3)) and p.grad is None


def test_a_step_inside_a_hook() -> None:
    """An outer optimizer that drives an inner one, both with hooks."""
    inner, p = _one()
    outer, q = _one()
    heard: list[str] = []
    inner.register_step_post_hook(lambda *_: heard.append("inner"))
    outer.register_step_pre_hook(lambda *_: inner.step())
    outer.register_step_post_hook(lambda *_: heard.append("outer"))
    outer.step()
    assert heard == ["inner", "outer"]
    assert torch.equal(p, q)


def test_state_dict_hooks() -> None:
    optimizer, _ = _one(momentum=0.9)
    heard: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda *_: heard.append("pre"))
    optimizer.register_state_dict_post_hook(lambda *_: heard.append("post"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: heard.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda *_: heard.append("load post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert heard == ["pre", "post", "load pre", "load post"]


# ---------------------------------------------------------------------------- closures, grad modes


@pytest.mark.parametrize("outside", [True, False], ids=["called with grad", "under no_grad"])
@pytest.mark.parametrize("kind", cases.ids(CLASSES))
def test_a_closure_runs_once_with_grad_enabled(kind: Any, outside: bool) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = kind([p], **ONE_STEP)
    runs: list[bool] = []

    def closure() -> Tensor:
        runs.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = p.sum()
        loss.backward()
        return loss

    with torch.set_grad_enabled(outside):
        loss = optimizer.step(closure)
        assert torch.is_grad_enabled() == outside
    assert runs == [True]
    assert loss.item() == 3.0 and loss.grad_fn is not None
    assert torch.allclose(p.detach(), torch.full((3,), 0.9))


@pytest.mark.parametrize("value", [3.5, None, "loss", (1, 2)], ids=str)
def test_step_returns_what_the_closure_returned(value: Any) -> None:
    assert _one()[0].step(lambda: value) == value


def test_step_returns_none_without_a_closure() -> None:
    assert _one()[0].step() is None


def test_the_step_reads_what_the_closure_left() -> None:
    """Frozen tensors, groups and hyper-parameters are read after the closure has run."""
    p, q = _parameter(), _parameter()
    optimizer = FrozenAwareSGD([p], lr=0.1)

    def closure() -> None:
        p.requires_grad_(False)
        p.grad = torch.ones(3)
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.add_param_group({"params": [q]})
        q.grad = torch.ones(3)
        optimizer.param_groups[1]["lr"] = 0.25

    optimizer.step(closure)
    assert torch.equal(p, torch.ones(3)) and p.grad is None
    assert torch.equal(q, torch.full((3,), 0.75))


def test_the_grad_mode_is_restored_after_an_error() -> None:
    optimizer, _ = _one()

    def closure() -> None:
        raise ValueError

    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            with pytest.raises(ValueError):  # noqa: PT011
                optimizer.step(closure)
            assert torch.is_grad_enabled() == mode


@pytest.mark.parametrize("nesterov", [False, True], ids=["", "nesterov"])
def test_no_graph_is_recorded(nesterov: bool) -> None:
    optimizer, p = _one(momentum=0.9, weight_decay=0.1, nesterov=nesterov)
    p.grad = torch.ones(3, requires_grad=True)
    optimizer.step()
    optimizer.step()
    assert p.is_leaf and p.grad_fn is None
    assert cases.buffer_of(optimizer, p).grad_fn is None


# ------------------------------------------------------------------------------------ the profiler


@pytest.mark.parametrize("kind", cases.ids(CLASSES))
@pytest.mark.parametrize("plain_exists", [False, True], ids=["", "after stock's"])
def test_profiler_records_stocks_names_once(plain_exists: bool, kind: Any) -> None:
    if plain_exists:
        stock_of(kind)([_parameter()])
    p = _parameter()
    optimizer = kind([p], lr=0.1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(2):
            p.grad = torch.ones(3)
            optimizer.step()
            optimizer.zero_grad()
    names = [event.name for event in profile.events()]
    assert names.count(f"Optimizer.step#{kind.__name__}.step") == 2
    assert names.count(f"Optimizer.zero_grad#{kind.__name__}.zero_grad") == 2
    assert sum(name.startswith("Optimizer.") for name in names) == 4


def test_the_older_profiler_records_the_step() -> None:
    optimizer, _ = _one()
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
    assert [e.name for e in profile.function_events].count(
        "Optimizer.step#FrozenAwareSGD.step"
    ) == 1


def test_the_memory_profilers_entry_point_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """`_optimizer_step_code` is where the memory profiler reads parameters and state."""
    optimizer, _ = _one()
    calls: list[Any] = []
    monkeypatch.setattr(FrozenAwareSGD, "_optimizer_step_code", lambda self: calls.append(self))
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], with_stack=True, profile_memory=True
    ):
        optimizer.step()
    assert calls == [optimizer]


def test_nothing_is_recorded_without_a_profiler() -> None:
    optimizer, _ = _one()
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        pass
    optimizer.step()
    assert not [e for e in profile.events() if e.name.startswith("Optimizer.")]


# ------------------------------------------------------------------------------------- checkpoints

# What asks stock for its counts of updates in another place or form; they are loaded as they are.
COUNTED: dict[str, dict[str, Any]] = {
    "on the host": {},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
}


def _trained(make: Any, options: dict[str, Any], device: str) -> tuple[Any, list[Any]]:
    gen = cases.generator(0)
    params = cases.make_parameters((3, 70), gen, device=device)
    optimizer = make(params, **options)
    for _ in range(3):
        cases.set_grads(params, params, gen)
        optimizer.step()
    return optimizer, params


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("to", cases.ids({name: (how,) for name, how in COUNTED.items()}))
@pytest.mark.parametrize("saved", cases.ids({name: (how,) for name, how in COUNTED.items()}))
@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("family", cases.each_family({"AdamW": cases.ADAMW}))
def test_counts_lie_where_stock_puts_them_and_load_both_ways(
    family: cases.Family, amsgrad: bool, saved: dict[str, Any], to: dict[str, Any], device: str
) -> None:
    """Stock's count is on the device if it is fused or capturable. A checkpoint loads all alike."""
    if device == "cpu" and "capturable" in saved:
        # Stock's capturable form refuses the CPU, so only where it would put the count is compared.
        optimizer, params = _trained(family.ours, saved | {"amsgrad": amsgrad}, device)
        assert {optimizer.state[p]["step"].device.type for p in params} == {"cpu"}
        return
    states = []
    for make in (family.ours, family.stock):
        optimizer, params = _trained(make, saved | {"amsgrad": amsgrad}, device)
        states.append(optimizer.state_dict())
        for entry in states[-1]["state"].values():
            assert list(entry) == family.keys({"amsgrad": amsgrad})
            assert entry["step"].device.type == (device if saved else "cpu")
            assert entry["step"].dtype is torch.float32 and entry["step"].shape == ()
            assert float(entry["step"]) == 3
    for entries in zip(*(state["state"].values() for state in states), strict=True):
        for key in family.buffers({"amsgrad": amsgrad}):
            cases.assert_close(entries[0][key], entries[1][key], key, 1e-5)

    loaded = {}
    for name, make, state in (
        ("stock's into ours", family.ours, states[1]),
        ("ours into ours", family.ours, states[0]),
        ("ours into stock", family.stock, states[0]),
    ):
        params = cases.make_parameters((3, 70), cases.generator(1), device=device)
        on_cpu = device == "cpu" and make is family.stock
        optimizer = make(params, **({} if on_cpu else to), amsgrad=amsgrad)
        state = copy.deepcopy(state)
        for group in state["param_groups"]:  # what the user asks for now, as after editing it
            group.update(dict.fromkeys(("fused", "capturable"), None) | {"capturable": False})
            group.update({} if on_cpu else to)
        optimizer.load_state_dict(state)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert {float(optimizer.state[p]["step"]) for p in params} == {4.0}
        loaded[name] = params
    for name, params in loaded.items():
        for p, q in zip(params, loaded["ours into ours"], strict=True):
            cases.assert_close(p, q, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_that_are_numbers_in_an_old_checkpoint(family: cases.Family) -> None:
    """Stock's optimizers once saved a Python int."""
    if family.state.counter is None:
        pytest.skip("SGD counts nothing")
    optimizer, params = _trained(family.ours, {}, "cpu")
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["step"] = 3
    optimizer.load_state_dict(state)
    assert [float(optimizer.state[p]["step"]) for p in params] == [3.0, 3.0]
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [4.0, 4.0]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize(("family", "hyper"), SOME_HYPERS)
def test_copies_go_on_like_their_original(
    family: cases.Family, hyper: dict[str, Any], how: str
) -> None:
    optimizer, params = _trained(family.ours, {"lr": 0.1} | hyper, "cpu")
    other = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert type(other) is family.ours
    twins = [p for group in other.param_groups for p in group["params"]]
    gen = cases.generator(3)
    for _ in range(3):
        cases.set_grads(params, twins, gen)
        optimizer.step()
        other.step()
        cases.assert_same_training(other, optimizer)


# -------------------------------------------------------------------------- learning-rate schedules


def test_the_table_names_every_scheduler_of_torch() -> None:
    classes = {
        name
        for name, value in vars(lr_scheduler).items()
        if inspect.isclass(value)
        and issubclass(value, lr_scheduler.LRScheduler)
        and not name.startswith("_")
    }
    assert classes - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float lr", "tensor lr"])
@pytest.mark.parametrize("make", cases.ids(SCHEDULERS))
@pytest.mark.parametrize("family", FAMILIES)
def test_learning_rate_schedulers(
    family: cases.Family, make: Callable[[Any], Any], as_tensor: bool
) -> None:
    """Same rates, momenta, bits and state_dict as with stock, and no warning of any kind."""
    gen = cases.generator(0)
    ours = cases.make_parameters((3, 70), gen)
    theirs = cases.twin(ours)
    hyper = {"momentum": 0.9} if family is cases.SGD else {}
    optimizer, reference = (
        # Adam's arithmetic with a rate of fp32 is another than stock's; see test_exact.py.
        kind(
            params,
            lr=torch.tensor(0.1, dtype=torch.float64) if as_tensor else 0.1,
            **hyper,
            **extra,
        )
        for kind, params, extra in (
            (family.ours, ours, {}),
            (family.stock, theirs, {"foreach": False}),
        )
    )
    with warnings.catch_warnings():
        # What stock itself warns of, such as a deprecated argument, does not matter here.
        warnings.simplefilter("ignore")
        b = make(reference)
        warnings.simplefilter("error")
        try:
            a = make(optimizer)
        except DeprecationWarning:
            warnings.simplefilter("ignore", DeprecationWarning)
            a = make(optimizer)
        for step in range(8):
            cases.set_grads(ours, theirs, gen)
            ours[0].requires_grad_(step != 4)
            theirs[0].requires_grad_(step != 4)
            if step == 4:
                theirs[0].grad = None
            for sgd, scheduler in ((optimizer, a), (reference, b)):
                sgd.step()
                plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*((1.0,) if plateau else ()))
            cases.assert_same_training(optimizer, reference, f"after step {step + 1}:")
    assert optimizer.state_dict()["param_groups"][0].keys() == (
        reference.state_dict()["param_groups"][0].keys()
    )


def test_a_scheduler_notices_a_step_it_should_have_seen() -> None:
    """Stock warns when the scheduler is called first; the warning is neither lost nor invented."""
    for order, expected in (("scheduler first", True), ("optimizer first", False)):
        optimizer, _ = _one()
        scheduler = lr_scheduler.StepLR(optimizer, 2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if order == "optimizer first":
                optimizer.step()
            scheduler.step()
            scheduler.step()
        heard = any("optimizer.step()" in str(w.message) for w in caught)
        assert heard == expected, order


def test_hooks_run_once_under_a_scheduler() -> None:
    """A scheduler replaces `optimizer.step` on the instance."""
    optimizer, _ = _one()
    lr_scheduler.StepLR(optimizer, 2)
    heard: list[int] = []
    optimizer.register_step_post_hook(lambda *_: heard.append(1))
    optimizer.step()
    assert heard == [1]


# ------------------------------------------------------------------------------- version counters


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("dtype", cases.ids(cases.DTYPES))
@pytest.mark.parametrize(("family", "hyper"), SOME_HYPERS)
def test_a_step_bumps_the_version_of_what_it_writes(
    family: cases.Family, hyper: dict[str, Any], dtype: torch.dtype, device: str
) -> None:
    p, idle, frozen = cases.make_parameters((5, 5, 5), cases.generator(0), dtype, device)
    optimizer = family.ours([p, idle, frozen], **hyper)
    frozen.requires_grad_(False)
    for _ in range(3):
        p.grad, frozen.grad = torch.ones_like(p), torch.ones_like(p)
        grad = p.grad
        held = [cases.buffer_of(optimizer, p, name) for name in family.keys(hyper)]
        versions = [None if buffer is None else buffer._version for buffer in held]
        before = p._version, grad._version
        optimizer.step()
        assert p._version > before[0]
        assert grad._version == before[1], "the gradient is only read"
        for buffer, version in zip(held, versions, strict=True):
            assert buffer is None or buffer._version > version
        assert (idle._version, frozen._version) == (0, 0)


def test_autograd_detects_the_write() -> None:
    """Stock fused does not bump versions, and backward through an old graph goes silently wrong."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = FrozenAwareSGD([p], lr=0.1)
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autograd_does_not_complain_about_a_frozen_parameter() -> None:
    frozen, x = torch.nn.Parameter(torch.ones(3)), torch.ones(3, requires_grad=True)
    optimizer = FrozenAwareSGD([frozen], lr=0.1)
    frozen.requires_grad_(False)
    loss = (frozen * frozen * x).sum()
    frozen.grad = torch.ones(3)
    optimizer.step()
    loss.backward()
    assert x.grad is not None


# -------------------------------------------------------------------------------------- tensor lr


@pytest.mark.parametrize(
    "make",
    cases.ids(
        {
            "0-dim": lambda: torch.tensor(0.1),
            "shape [1]": lambda: torch.tensor([0.1]),
            "shape [1, 1]": lambda: torch.tensor([[0.1]]),
            "fp64": lambda: torch.tensor(0.1, dtype=torch.float64),
            "bf16": lambda: torch.tensor(0.1, dtype=torch.bfloat16),
            "a Parameter": lambda: torch.nn.Parameter(torch.tensor(0.1)),
            "requires_grad": lambda: torch.tensor(0.1, requires_grad=True),
            "a view": lambda: torch.tensor([0.3, 0.1])[1],
        }
    ),
)
@pytest.mark.parametrize(("family", "hyper"), SOME_HYPERS)
def test_tensor_learning_rates(
    family: cases.Family, hyper: dict[str, Any], make: Callable[[], Tensor]
) -> None:
    gen = cases.generator(0)
    ours = cases.make_parameters((3, 70), gen)
    theirs = cases.twin(ours)
    rates = make(), make()
    optimizer = family.ours(ours, **hyper | {"lr": rates[0]})
    reference = family.stock(theirs, **hyper | {"lr": rates[1]}, foreach=False)
    # What Adam's kernels make of a rate with less than fp64 is more precise than stock's.
    exact = family is cases.SGD or rates[0].dtype is torch.float64
    for step in range(4):
        with torch.no_grad():
            for rate in rates:
                rate.mul_(0.5)
        cases.set_grads(ours, theirs, gen)
        optimizer.step()
        reference.step()
        cases.assert_same_training(
            optimizer,
            reference,
            f"after step {step + 1}:",
            exact=exact,
            arithmetic=rates[0].dtype,
        )
    assert optimizer.param_groups[0]["lr"] is rates[0]


def test_tensor_weight_decay() -> None:
    gen = cases.generator(0)
    ours = cases.make_parameters((3, 70), gen)
    theirs = cases.twin(ours)
    hyper = {"lr": 0.1, "momentum": 0.9, "weight_decay": torch.tensor(0.01)}
    optimizer = FrozenAwareSGD(ours, **hyper)
    reference = torch.optim.SGD(theirs, **hyper, foreach=False)
    for step in range(3):
        cases.set_grads(ours, theirs, gen)
        optimizer.step()
        reference.step()
        cases.assert_same_training(optimizer, reference, f"after step {step + 1}:")


@pytest.mark.gpu
def test_tensor_learning_rate_on_the_device() -> None:
    gen = cases.generator(0)
    ours = cases.make_parameters((3, 70), gen, device="cuda")
    theirs = cases.twin(ours)
    optimizer = FrozenAwareSGD(ours, lr=torch.tensor(0.1, device="cuda"), momentum=0.9)
    reference = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, foreach=True)
    for _ in range(3):
        cases.set_grads(ours, theirs, gen)
        optimizer.step()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            cases.assert_close(p, q, "device lr")


# -------------------------------------------------------------------------------------- zero_grad

GRADIENTS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "dense": lambda: torch.ones(4, 6),
    "transposed": lambda: torch.ones(6, 4).t(),
    "every second": lambda: torch.ones(4, 12)[:, ::2],
    "sparse": lambda: torch.ones(4, 6).to_sparse(),
    "requires grad": lambda: torch.ones(4, 6, requires_grad=True),
    "with a history": lambda: torch.ones(4, 6, requires_grad=True) * 2,
    "NaN": lambda: torch.full((4, 6), float("nan")),
}


@pytest.mark.parametrize("implementation", cases.ids({"default": {}, "foreach": {"foreach": True}}))
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("set_to_none", [True, False], ids=["to None", "to zero"])
@pytest.mark.parametrize("grad", cases.ids(GRADIENTS))
def test_zero_grad(
    grad: Callable[[], Tensor | None],
    set_to_none: bool,
    frozen: bool,
    implementation: dict[str, Any],
) -> None:
    """It leaves the same tensor with the same zeros as stock, detached from any history."""
    seen = []
    for make in (FrozenAwareSGD, torch.optim.SGD):
        params = [torch.nn.Parameter(torch.ones(4, 6)) for _ in range(3)]
        optimizer = make(params, lr=0.1, **implementation)
        gradient = grad()
        params[1].grad = gradient
        params[0].grad, params[2].grad = torch.ones(4, 6), torch.ones(4, 6)
        params[1].requires_grad_(not frozen)
        optimizer.zero_grad(set_to_none=set_to_none)
        result = params[1].grad
        assert (params[0].grad is None) == set_to_none
        if result is None:
            assert set_to_none or gradient is None
            seen.append(None)
            continue
        assert result is gradient and gradient is not None
        assert not result.to_dense().any()
        seen.append((result.requires_grad, result.grad_fn, result.layout, result.is_leaf))
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    "arguments", [((), {}), ((True,), {}), ((), {"set_to_none": True})], ids=str
)
def test_zero_grad_returns_none_and_takes_its_argument_either_way(arguments: Any) -> None:
    optimizer, p = _one()
    assert optimizer.zero_grad(*arguments[0], **arguments[1]) is None
    assert p.grad is None


@pytest.mark.parametrize("dtype", cases.ids(cases.DTYPES))
@pytest.mark.parametrize("device", cases.DEVICES)
def test_zero_grad_to_zero_writes_in_place(device: str, dtype: torch.dtype) -> None:
    params = cases.make_parameters(((), 0, 3, (4, 5), 70_001), cases.generator(0), dtype, device)
    optimizer = FrozenAwareSGD(cases.in_groups(params, 2), lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    kept = [(p.grad, p.grad.data_ptr(), p.grad._version) for p in params if p.grad is not None]
    optimizer.zero_grad(set_to_none=False)
    for p, (grad, pointer, version) in zip(params, kept, strict=True):
        assert p.grad is grad and grad.data_ptr() == pointer and not grad.any()
        assert grad._version > version or not grad.numel()


def test_zero_grad_of_a_pickled_optimizer_is_recorded_under_its_name() -> None:
    optimizer = pickle.loads(pickle.dumps(_one()[0]))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.zero_grad()
    assert "Optimizer.zero_grad#FrozenAwareSGD.zero_grad" in [e.name for e in profile.events()]


def test_zero_grad_with_a_gradient_that_is_a_differentiable_view_raises_as_stock() -> None:
    errors = []
    for make in (FrozenAwareSGD, torch.optim.SGD):
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = (torch.ones(4, requires_grad=True) * 2)[:3]
        with pytest.raises(RuntimeError) as raised:
            make([p], lr=0.1).zero_grad(set_to_none=False)
        errors.append(str(raised.value).split("\n")[0])
    assert errors[0] == errors[1]


# ----------------------------------------------------------------------------- references and swaps


@pytest.mark.parametrize(("family", "hyper"), SOME_HYPERS)
def test_no_reference_is_kept_or_lost(family: cases.Family, hyper: dict[str, Any]) -> None:
    """Counts of everything a step touches are the same after 200 steps, frozen ones included."""
    p, frozen, late = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    grad = torch.ones(3)
    optimizer = family.ours([p, frozen, late], **hyper)
    p.grad = grad
    optimizer.step()
    frozen.requires_grad_(False)
    group = optimizer.param_groups[0]
    watched = [p, frozen, late, grad, optimizer, optimizer.state, group, group["params"]]
    watched += [*optimizer.state.values(), optimizer.param_groups, *group.values()]
    watched += [cases.buffer_of(optimizer, p, name) for name in family.keys(hyper)]

    def counts() -> list[int]:
        return [sys.getrefcount(x) for x in watched if x is not None]

    before = counts()
    for _ in range(200):
        frozen.grad = torch.ones(3)
        optimizer.step()
    assert counts() == before


@pytest.mark.parametrize("kind", ["frozen", "trainable"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gradient_dies_when_it_is_dropped(family: cases.Family, kind: str) -> None:
    """By reference count alone, with the garbage collector off."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = family.ours([p], **family.with_state)
    gc.disable()
    try:
        p.grad = torch.ones(3)
        watch = weakref.ref(p.grad)
        p.requires_grad_(kind == "trainable")
        optimizer.step()
        if kind == "trainable":
            assert watch() is not None
            optimizer.zero_grad()
        assert watch() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_die_with_their_state(family: cases.Family) -> None:
    """No arena outlives `state.clear()`."""
    p = _parameter()
    optimizer = family.ours([p], **family.with_state)
    p.grad = torch.ones(3)
    optimizer.step()
    watches = [weakref.ref(value) for value in optimizer.state[p].values()]
    assert len(watches) == len(family.keys(family.with_state))
    optimizer.state.clear()
    assert all(watch() is None for watch in watches)


def test_an_optimizer_and_its_parameters_can_be_freed() -> None:
    optimizer, p = _one(momentum=0.9)
    optimizer.step(lambda: 1.0)
    optimizer.zero_grad()
    watches = weakref.ref(optimizer), weakref.ref(p)
    del optimizer, p
    gc.collect()
    assert [watch() for watch in watches] == [None, None]


def test_a_replaced_parameter_is_not_kept_alive() -> None:
    optimizer, p = _one()
    optimizer.step()
    watch = weakref.ref(p)
    optimizer.param_groups[0]["params"][0] = _parameter()
    del p
    gc.collect()
    assert watch() is None


@pytest.mark.parametrize("family", FAMILIES)
def test_one_storage_per_buffer(family: cases.Family) -> None:
    """One flat storage for all would be saved whole with each buffer."""
    params = cases.make_parameters((3, 1000, (4, 5)), cases.generator(0))
    optimizer = family.ours(params, **family.with_state)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    buffers = [value for p in params for value in optimizer.state[p].values()]
    for buffer in buffers:
        assert buffer.untyped_storage().nbytes() == buffer.numel() * buffer.itemsize
        assert buffer.storage_offset() == 0
    pointers = {buffer.untyped_storage().data_ptr() for buffer in buffers}
    assert len(pointers) == len(params) * len(family.keys(family.with_state))


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16], ids=str)
def test_swapping_conversion_of_a_model_works_after_steps(to: torch.dtype) -> None:
    """`swap_tensors` refuses a tensor that anyone holds a weak or extra reference to."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = torch.nn.Linear(3, 2)
        optimizer = FrozenAwareSGD(model.parameters(), lr=0.1, momentum=0.9)
        identities = [id(p) for p in model.parameters()]
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            optimizer.zero_grad()
        model.to(to)
        assert [id(p) for p in model.parameters()] == identities
        values = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        for p, value in zip(model.parameters(), values, strict=True):
            assert p.dtype == to and not torch.equal(p, value)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def test_swap_tensors_between_steps() -> None:
    p, other = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.full((3,), 5.0))
    optimizer = FrozenAwareSGD([p], lr=0.5, momentum=0.9)
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.zero_grad()
    torch.utils.swap_tensors(p, other)
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(p, torch.full((3,), 5.0 - 0.5 * 1.9))
    assert torch.equal(other, torch.full((3,), 0.5))


# ---------------------------------------------------------------------------- surrounding settings


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class Listening(TorchDispatchMode):
    """A mode that sees every operator."""

    heard = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.heard += 1
        return func(*args, **(kwargs or {}))


SETTINGS: dict[str, Callable[[], Any]] = {
    "default dtype fp64": lambda: _default_dtype(torch.float64),
    "default dtype bf16": lambda: _default_dtype(torch.bfloat16),
    "default device meta": lambda: torch.device("meta"),
    "deterministic algorithms": _deterministic,
    "anomaly mode": torch.autograd.detect_anomaly,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "saved tensors hooks": lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda x: x, lambda x: x
    ),
    "a dispatch mode": Listening,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@pytest.mark.parametrize(("family", "hyper"), SOME_HYPERS)
@pytest.mark.parametrize("setting", cases.ids(SETTINGS))
def test_surrounding_settings_change_nothing(
    setting: Callable[[], Any], family: cases.Family, hyper: dict[str, Any]
) -> None:
    gen = cases.generator(0)
    ours = cases.make_parameters((3, 70, (4, 5)), gen)
    theirs = cases.twin(ours)
    optimizer = family.ours(ours, **hyper)
    reference = family.stock(theirs, **hyper, foreach=False)
    for step in range(3):
        cases.set_grads(ours, theirs, gen)
        with setting():
            optimizer.step()
        # The default dtype is that of a new count, stock's too.
        with setting() if setting is SETTINGS["default dtype fp64"] else contextlib.nullcontext():
            reference.step()
        cases.assert_same_training(optimizer, reference, f"after step {step + 1}:")


def test_a_dispatch_mode_sees_the_step() -> None:
    """Operator counters and memory planners rely on it."""
    optimizer, _ = _one(momentum=0.9)
    with Listening() as mode:
        optimizer.step()
    assert mode.heard > 0


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_class_is_left_without_stocks_wrapper(family: cases.Family) -> None:
    """It costs as much as a small step; with `hooked` set, Optimizer.__init__ leaves step alone."""
    step = family.ours.step
    pickle.loads(pickle.dumps(family.ours([_parameter()])))
    assert family.ours.step is step and step.hooked
    assert step.__wrapped__.__wrapped__ is family.ours._step


def test_two_optimizers_over_one_parameter() -> None:
    p = _parameter()
    first, second = FrozenAwareSGD([p], lr=0.1, momentum=0.9), FrozenAwareSGD([p], lr=0.2)
    for _ in range(2):
        p.grad = torch.ones(3)
        first.step()
        second.step()
    assert torch.allclose(p, torch.full((3,), 1 - 0.1 - 0.2 - 0.19 - 0.2))
