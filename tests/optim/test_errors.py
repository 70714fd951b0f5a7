"""Bad input: a clear error that names the place and the fix, and nothing is written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import optim_cases as cases
from tests.helpers.optim_cases import ADAMW, SGD, Family, FrozenAwareSGD

MOMENTUM = cases.SOME_HYPERS["momentum, dampening and decay"]
AMSGRAD = {"lr": 0.05, "weight_decay": 0.1, "amsgrad": True}
families = pytest.mark.parametrize("family", cases.ids({"SGD": (SGD,), "AdamW": (ADAMW,)}))


def _hyper(family: Family) -> cases.Hyper:
    return MOMENTUM if family is SGD else AMSGRAD


# What spoils one parameter of shape [4, 6], and what the message must then say.
Spoil = Callable[[Any, Tensor], None]


def _grad_of_other_shape(optimizer: Any, p: Tensor) -> None:
    p.grad = torch.ones(4, 6)
    p.data = torch.ones(4, 3)


def _grad_that_would_broadcast(optimizer: Any, p: Tensor) -> None:
    p.grad = torch.ones(4, 6)
    p.grad.data = torch.ones(6)


def _grad_of_same_count(optimizer: Any, p: Tensor) -> None:
    p.grad = torch.ones(4, 6)
    p.data = torch.ones(6, 4)


def _complex_grad(optimizer: Any, p: Tensor) -> None:
    p.grad = torch.ones(4, 6)
    p.grad.data = torch.ones(4, 6, dtype=torch.complex64)


def _holds(key: str, value: Any) -> Spoil:
    def spoil(optimizer: Any, p: Tensor) -> None:
        optimizer.state[p][key] = value() if callable(value) else value

    return spoil


def _state_no_dict(optimizer: Any, p: Tensor) -> None:
    optimizer.state[p] = [torch.ones(4, 6)]


BAD_GRADIENTS: dict[str, tuple[Spoil, str]] = {
    "a gradient of another shape": (_grad_of_other_shape, r"\[4, 6\].*\[4, 3\]"),
    "a gradient that would broadcast": (_grad_that_would_broadcast, r"\[6\].*\[4, 6\]"),
    "a gradient of the same count": (_grad_of_same_count, r"\[4, 6\].*\[6, 4\]"),
    "a complex gradient": (_complex_grad, r"(?i)complex.*float"),
    "a state entry that is no dict": (_state_no_dict, r"state.*list"),
}
BAD_BUFFERS: dict[str, tuple[Any, str]] = {
    "of another shape": (lambda: torch.ones(4, 4), r"KEY.*\[4, 4\].*\[4, 6\]"),
    "that would broadcast": (lambda: torch.ones(1, 6), r"KEY.*\[1, 6\].*\[4, 6\]"),
    "of the same count": (lambda: torch.ones(24), r"KEY.*\[24\].*\[4, 6\]"),
    "of no dimensions": (lambda: torch.ones(()), r"KEY.*\[\].*\[4, 6\]"),
    "on another device": (lambda: torch.ones(4, 6, device="meta"), r"KEY.*meta.*cpu"),
    "that is complex": (
        lambda: torch.ones(4, 6, dtype=torch.complex64),
        r"(?i)KEY.*complex.*float",
    ),
    "of integers": (
        lambda: torch.ones(4, 6, dtype=torch.int64),
        r"(?i)KEY.*(int|long).*float",
    ),
    "of bools": (lambda: torch.ones(4, 6, dtype=torch.bool), r"(?i)KEY.*bool.*float"),
    "that is no tensor": ("a string", r"KEY.*str"),
    "that is a float": (1.0, r"KEY.*float"),
    "that is expanded": (lambda: torch.ones(1, 6).expand(4, 6), r"(?i)memory|overlap"),
}
# Those of the count, of which AdamW takes anything that is one real number.
BAD_COUNTS: dict[str, tuple[Any, str]] = {
    "of the parameter's shape": (lambda: torch.ones(4, 6), r"step .*\[4, 6\].*one real number"),
    "of none": (lambda: torch.ones(0), r"step .*\[0\].*one real number"),
    "on the meta device": (lambda: torch.ones((), device="meta"), "step .* meta"),
    "that is complex": (lambda: torch.tensor(1j), "step .*complex"),
    "of bools": (lambda: torch.tensor(True), "step .*bool"),
    "that is a float": (3.0, "step .*float"),
    "that is missing": (None, "no step"),
}


def _bad_tensors() -> list[Any]:
    """(family, spoil, what the message says)."""
    made = []
    for family_name, family in (("SGD", SGD), ("AdamW", ADAMW)):
        for name, (spoil, says) in BAD_GRADIENTS.items():
            made.append(pytest.param(family, spoil, says, id=f"{family_name}: {name}"))
        for key in family.state.buffers:
            for name, (value, says) in BAD_BUFFERS.items():
                spoil = _holds(key, value)
                says = says.replace("KEY", key)
                made.append(pytest.param(family, spoil, says, id=f"{family_name}: {key} {name}"))
    for name, (value, says) in BAD_COUNTS.items():
        made.append(pytest.param(ADAMW, _holds("step", value), says, id=f"AdamW: step {name}"))
    for key in ADAMW.state.buffers[:2]:
        spoil, says = _holds(key, None), f"no {key}"
        made.append(pytest.param(ADAMW, spoil, says, id=f"AdamW: {key} that is missing"))
        spoil, says = _holds(key, lambda: torch.ones(4, 6).double()), "exp_avg .*float64.*float32"
        if key == "exp_avg":  # torch's form takes another second moment
            made.append(pytest.param(ADAMW, spoil, says, id=f"AdamW: {key} of another dtype"))
    return made


BAD_TENSORS = _bad_tensors()
FEW_BAD_TENSORS = [case for case in BAD_TENSORS if "exp_avg_sq" not in str(case.id)]

PLACES = {
    "first of the first group": (0, 0),
    "in the middle": (0, 2),
    "first of the last group": (2, 0),
    "last of all": (2, 2),
}


class Trained:
    """Three groups of four, one step taken; the last of each frozen with a stale gradient."""

    def __init__(self, family: Family = SGD, dtype: torch.dtype = torch.float32) -> None:
        self.gen = cases.generator(0)
        self.params = cases.make_parameters([(4, 6)] * 12, self.gen, dtype)
        self.optimizer = family.ours(
            [{"params": self.params[i : i + 4]} for i in (0, 4, 8)], **_hyper(family)
        )
        self.give_grads()
        self.optimizer.step()
        self.give_grads()
        for i in (3, 7, 11):
            self.params[i].requires_grad_(False)

    def give_grads(self) -> None:
        for p in self.params:
            p.grad = cases.randn((4, 6), self.gen, p.dtype)

    def at(self, place: tuple[int, int]) -> Tensor:
        return self.params[4 * place[0] + place[1]]


@pytest.mark.parametrize("place", cases.ids({name: (at,) for name, at in PLACES.items()}))
@pytest.mark.parametrize(("family", "spoil", "says"), BAD_TENSORS)
def test_bad_tensors_raise_before_anything_is_written(
    family: Family, spoil: Spoil, says: str, place: tuple[int, int]
) -> None:
    """The message names group and index, what it got and what it wanted."""
    trained = Trained(family)
    spoil(trained.optimizer, trained.at(place))
    if isinstance(trained.optimizer.state.get(trained.at(place)), list):
        before = None
    else:
        before = cases.Snapshot(trained.optimizer)
    with pytest.raises((ValueError, TypeError, RuntimeError)) as raised:
        trained.optimizer.step()
    if before is not None:
        before.assert_unchanged()
    message = str(raised.value)
    assert re.search(says, message, re.DOTALL), message
    where = rf"param_groups\[{place[0]}\]\D{{0,12}}params\D{{0,4}}\[{place[1]}\]"
    assert re.search(where, message), message


@pytest.mark.parametrize(("family", "spoil", "says"), FEW_BAD_TENSORS)
def test_the_step_after_the_fix_is_right(family: Family, spoil: Spoil, says: str) -> None:
    trained = Trained(family)
    victim = trained.at((1, 1))
    kept = trained.optimizer.state[victim]
    entries = dict(kept)
    data = victim.detach().clone()
    spoil(trained.optimizer, victim)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        trained.optimizer.step()
    trained.optimizer.state[victim] = kept
    kept.update(entries)
    victim.grad = None
    victim.data = data
    twins = cases.twin(trained.params)
    reference = family.reference(
        [{"params": twins[i : i + 4]} for i in (0, 4, 8)], **_hyper(family)
    )
    for p, q in zip(trained.params, twins, strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
        reference.state[q].update({k: v.clone() for k, v in trained.optimizer.state[p].items()})
    trained.optimizer.step()
    reference.step()
    cases.assert_same_training(trained.optimizer, reference, "after the fix:")


@pytest.mark.parametrize(("family", "spoil", "says"), FEW_BAD_TENSORS)
def test_what_is_frozen_is_not_checked(family: Family, spoil: Spoil, says: str) -> None:
    """A frozen tensor's gradient is dropped and its state left alone, whatever they are."""
    trained = Trained(family)
    frozen = trained.params[3]
    spoil(trained.optimizer, frozen)
    trained.optimizer.step()
    assert frozen.grad is None


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    cases.ids(
        {
            "fp32 parameter, fp64 gradient": (torch.float32, torch.float64),
            "fp64 parameter, fp32 gradient": (torch.float64, torch.float32),
            "bf16 parameter, fp32 gradient": (torch.bfloat16, torch.float32),
            "fp32 parameter, bf16 gradient": (torch.float32, torch.bfloat16),
        }
    ),
)
@pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
def test_a_gradient_of_another_float_dtype_is_stepped_as_stock(
    hyper: cases.Hyper, dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    """This is valid input: torch's `p.grad_dtype` asks for such gradients; stock promotes them."""
    gen = cases.generator(0)
    ours = cases.make_parameters((9, 9), gen, dtype)
    theirs = cases.twin(ours)
    optimizer = FrozenAwareSGD(ours, **hyper)
    stock = torch.optim.SGD(theirs, **hyper, foreach=False)
    for _ in range(3):
        cases.set_grads(ours, theirs, gen)
        for p, q in zip(ours[1:], theirs[1:], strict=True):
            assert p.grad is not None and q.grad is not None
            p.grad.data = p.grad.detach().to(grad_dtype)
            q.grad.data = q.grad.detach().to(grad_dtype)
        stock.step()
        optimizer.step()
        tolerance = 1e-5 if dtype.itemsize > 2 else 4 * torch.finfo(dtype).eps
        cases.assert_close(ours[1], theirs[1], "parameter", tolerance)


BAD_HYPER: dict[str, tuple[str, Any]] = {
    "lr is a tensor of two elements": ("lr", torch.tensor([0.1, 0.2])),
    "lr is an empty tensor": ("lr", torch.tensor([])),
    "lr is a string": ("lr", "fast"),
    "lr is None": ("lr", None),
    "lr is complex": ("lr", 1j),
    "lr is a complex tensor": ("lr", torch.tensor(1j)),
    "momentum is a string": ("momentum", "fast"),
    "momentum is None": ("momentum", None),
    "momentum is a tensor of two elements": ("momentum", torch.tensor([0.1, 0.2])),
    "dampening is a string": ("dampening", "fast"),
    "dampening is None": ("dampening", None),
    "weight_decay is a string": ("weight_decay", "fast"),
    "weight_decay is None": ("weight_decay", None),
    "weight_decay is a tensor of two elements": ("weight_decay", torch.tensor([0.1, 0.2])),
    "eps is a string": ("eps", "small"),
    "eps is None": ("eps", None),
    "eps is a tensor of two elements": ("eps", torch.tensor([0.1, 0.2])),
    "betas are None": ("betas", None),
    "betas are one number": ("betas", 0.9),
    "betas are three": ("betas", (0.9, 0.99, 0.999)),
    "a beta is a string": ("betas", (0.9, "a")),
    "a beta is None": ("betas", (None, 0.9)),
    "a beta is complex": ("betas", (1j, 0.9)),
    "a beta is a tensor of two elements": ("betas", (torch.tensor([0.9, 0.8]), 0.9)),
    "a beta that is a tensor is complex": ("betas", (torch.tensor(1j), 0.9)),
}
BAD_HYPER_OF = [
    pytest.param(family, key, value, id=f"{family_name}: {name}")
    for family_name, family in (("SGD", SGD), ("AdamW", ADAMW))
    for name, (key, value) in BAD_HYPER.items()
    if key in family.stock([torch.ones(1)]).defaults
]


@pytest.mark.parametrize("group", [0, 1, 2], ids=["first group", "middle group", "last group"])
@pytest.mark.parametrize(("family", "key", "value"), BAD_HYPER_OF)
def test_bad_hyper_parameters_raise_before_anything_is_written(
    family: Family, key: str, value: Any, group: int
) -> None:
    trained = Trained(family)
    trained.optimizer.param_groups[group][key] = value
    before = cases.Snapshot(trained.optimizer)
    with pytest.raises((ValueError, TypeError, RuntimeError)) as raised:
        trained.optimizer.step()
    before.assert_unchanged()
    assert key in str(raised.value), raised.value
    assert re.search(rf"group\D{{0,3}}{group}", str(raised.value)), raised.value


@pytest.mark.parametrize(
    ("family", "key"),
    [
        pytest.param(family, key, id=f"{name}: {key}")
        for name, family in (("SGD", SGD), ("AdamW", ADAMW))
        for key in ("params", *family.stock([torch.ones(1)]).defaults)
    ],
)
def test_a_missing_key_raises_as_stock(family: Family, key: str) -> None:
    trained = Trained(family)
    before = cases.Snapshot(trained.optimizer)
    value = trained.optimizer.param_groups[1].pop(key)
    with pytest.raises(KeyError, match=key):
        trained.optimizer.step()
    group = trained.optimizer.param_groups[1]
    group[key] = value
    before.assert_unchanged()


NOT_A_TENSOR: dict[str, Any] = {"None": None, "a float": 1.0, "a list": [1.0], "a name": "weight"}


@pytest.mark.parametrize("value", cases.ids(NOT_A_TENSOR))
def test_a_parameter_that_is_no_tensor(value: Any) -> None:
    trained = Trained()
    before = cases.Snapshot(trained.optimizer)
    kept = trained.optimizer.param_groups[1]["params"]
    trained.optimizer.param_groups[1]["params"] = [*kept[:2], value, *kept[2:]]
    with pytest.raises((TypeError, AttributeError)):
        trained.optimizer.step()
    trained.optimizer.param_groups[1]["params"] = kept
    before.assert_unchanged()


BAD_CONTAINERS: dict[str, Callable[[FrozenAwareSGD], None]] = {
    "param_groups is None": lambda o: setattr(o, "param_groups", None),
    "param_groups is a dict": lambda o: setattr(o, "param_groups", {"params": []}),
    "a group is a list": lambda o: o.param_groups.insert(1, []),
    "state is None": lambda o: setattr(o, "state", None),
    "state is a list": lambda o: setattr(o, "state", []),
}


@pytest.mark.parametrize("spoil", cases.ids(BAD_CONTAINERS))
def test_bad_containers_raise_before_anything_is_written(
    spoil: Callable[[FrozenAwareSGD], None],
) -> None:
    trained = Trained()
    before = [
        (p.detach().clone(), None if p.grad is None else p.grad.clone()) for p in trained.params
    ]
    spoil(trained.optimizer)
    with pytest.raises((TypeError, ValueError, AttributeError, KeyError, RuntimeError)):
        trained.optimizer.step()
    for p, (value, grad) in zip(trained.params, before, strict=True):
        cases.assert_same_bits(p, value, "parameter")
        cases.assert_same_bits(p.grad, grad, "gradient")


@pytest.mark.gpu
def test_a_gradient_on_another_device_raises_before_anything_is_written() -> None:
    """`p.data = p.data.cuda()` leaves the gradient behind."""
    trained = Trained()
    victim = trained.at((1, 1))
    victim.data = victim.data.cuda()
    before = cases.Snapshot(trained.optimizer)
    with pytest.raises((ValueError, RuntimeError), match=r"param_groups\[1\].*params.*\[1\].*cpu"):
        trained.optimizer.step()
    before.assert_unchanged()


def test_an_internally_overlapping_parameter_is_refused_as_stock_does() -> None:
    gen = cases.generator(0)
    good = torch.nn.Parameter(cases.randn(4, gen))
    expanded = torch.nn.Parameter(torch.ones(1).expand(4))
    for order in ([good, expanded], [expanded, good]):
        optimizer = FrozenAwareSGD(order, lr=0.1, momentum=0.9)
        for p in order:
            p.grad = torch.ones(4)
        before = cases.Snapshot(optimizer)
        with pytest.raises(RuntimeError):
            optimizer.step()
        before.assert_unchanged()


NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@pytest.mark.parametrize("value", cases.ids(NOT_FINITE))
@pytest.mark.parametrize("key", ["lr", "momentum", "dampening", "weight_decay"])
@pytest.mark.parametrize("nesterov", [False, True], ids=["", "nesterov"])
@pytest.mark.parametrize("dtype", cases.ids(cases.WIDE_DTYPES))
def test_hyper_parameters_that_are_not_finite_step_as_stock(
    dtype: torch.dtype, nesterov: bool, key: str, value: float
) -> None:
    """Set in the group, where stock checks nothing: the same NaNs and infinities come out."""
    gen = cases.generator(0)
    ours = cases.make_parameters((3, 70), gen, dtype)
    theirs = cases.twin(ours)
    hyper = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": nesterov}
    optimizer = FrozenAwareSGD(ours, **hyper)
    stock = torch.optim.SGD(theirs, **hyper, foreach=False)
    optimizer.param_groups[0][key] = value
    stock.param_groups[0][key] = value
    for _ in range(3):
        cases.set_grads(ours, theirs, gen)
        optimizer.step()
        stock.step()
        for p, q in zip(ours, theirs, strict=True):
            pairs = [(p, q), (cases.buffer_of(optimizer, p), cases.buffer_of(stock, q))]
            for a, b in pairs:
                assert torch.equal(a.isnan(), b.isnan())
                cases.assert_same_bits(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0), key)


@pytest.mark.parametrize("value", cases.ids(NOT_FINITE))
@pytest.mark.parametrize("key", ["lr", "eps", "weight_decay", "beta1", "beta2"])
@pytest.mark.parametrize("dtype", cases.ids(cases.WIDE_DTYPES))
def test_adamws_hyper_parameters_that_are_not_finite_step_as_stock(
    dtype: torch.dtype, key: str, value: float
) -> None:
    if key.startswith("beta") and math.isinf(value):
        pytest.skip("stock takes a root of a negative number")
    gen = cases.generator(0)
    ours = cases.make_parameters((3, 70), gen, dtype)
    theirs = cases.twin(ours)
    optimizer = ADAMW.ours(ours, amsgrad=True)
    stock = ADAMW.stock(theirs, amsgrad=True, foreach=False)
    betas = {"beta1": (value, 0.9), "beta2": (0.9, value)}
    for adamw in (optimizer, stock):
        adamw.param_groups[0].update({"betas": betas[key]} if key in betas else {key: value})
    for _ in range(3):
        cases.set_grads(ours, theirs, gen)
        optimizer.step()
        stock.step()
        for p, q in zip(ours, theirs, strict=True):
            state = zip(optimizer.state[p].values(), stock.state[q].values(), strict=True)
            pairs = [(p, q), *state]
            for a, b in pairs:
                assert torch.equal(a.isnan(), b.isnan())
                cases.assert_same_bits(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0), key)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    cases.ids(
        {f"SGD: {key}": (SGD, key, math.nan) for key in ("lr", "momentum", "dampening")}
        | {f"AdamW: {key}": (ADAMW, key, math.nan) for key in ("lr", "eps", "weight_decay")}
        | {"AdamW: beta1": (ADAMW, "betas", (math.nan, 0.9))}
        | {"SGD: weight_decay": (SGD, "weight_decay", math.nan)}
    ),
)
def test_nan_is_accepted_or_refused_by_the_constructor_as_stock_does(
    family: Family, key: str, value: Any
) -> None:
    outcomes = []
    for make in (family.ours, family.stock):
        try:
            make([torch.nn.Parameter(torch.ones(1))], **{key: value})
            outcomes.append("accepted")
        except ValueError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


@families
def test_an_exception_in_a_closure_changes_nothing(family: Family) -> None:
    trained = Trained(family)
    before = cases.Snapshot(trained.optimizer)

    def closure() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained.optimizer.step(closure)
    before.assert_unchanged()


@families
def test_an_exception_in_a_pre_hook_changes_nothing(family: Family) -> None:
    trained = Trained(family)
    before = cases.Snapshot(trained.optimizer)

    def hook(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = trained.optimizer.register_step_pre_hook(hook)
    with pytest.raises(KeyboardInterrupt):
        trained.optimizer.step()
    before.assert_unchanged()
    handle.remove()
    trained.optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_dtype_stock_cannot_add_raises_as_stock_and_writes_nothing(dtype: torch.dtype) -> None:
    good = torch.nn.Parameter(torch.ones(4))
    bad = torch.nn.Parameter(torch.ones(4).to(dtype))
    optimizer = FrozenAwareSGD([good, bad], lr=0.1)
    good.grad, bad.grad = torch.ones(4), torch.ones(4).to(dtype)
    before = good.detach().clone()
    with pytest.raises((NotImplementedError, RuntimeError, TypeError)):
        optimizer.step()
    cases.assert_same_bits(good, before, "its neighbour")
