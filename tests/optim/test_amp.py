"""GradScaler: an overflow touches nothing; gradients are left unscaled, as stock leaves them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import optim_cases as cases
from tests.helpers.optim_cases import ADAMW, SGD, Family, FrozenAwareSGD, Hyper

each_hyper = pytest.mark.parametrize(
    ("family", "hyper"),
    cases.per_family(lambda family: {} if family is cases.ADAM else family.some_hypers),
)
MOMENTUM = {"lr": 0.1, "momentum": 0.9}
each_family = pytest.mark.parametrize(
    ("family", "hyper"), cases.ids({"SGD": (SGD, MOMENTUM), "AdamW": (ADAMW, {"lr": 0.1})})
)
IMPLEMENTATIONS: dict[str, Hyper] = {
    "foreach and fused unset": {},
    "fused=True": {"fused": True},
    "foreach=True": {"foreach": True},
    "foreach=False": {"foreach": False},
    "fused=False": {"fused": False},
}


def _scaler(device: str, scale: float = 8.0) -> Any:
    scaler = torch.amp.GradScaler(device, init_scale=scale, growth_interval=10_000)
    scaler.scale(torch.ones((), device=device))
    return scaler


def _scale_grads(params: list[Any], scale: float) -> None:
    for p in params:
        if p.grad is not None:
            p.grad.mul_(scale)


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("implementation", cases.ids(IMPLEMENTATIONS))
@pytest.mark.parametrize("dtype", cases.ids(cases.WIDE_DTYPES))
@each_hyper
def test_scaled_training_equals_stock(
    family: Family, hyper: Hyper, dtype: torch.dtype, implementation: Hyper, device: str
) -> None:
    """The scale is a power of two, so that stock's multiplication and a division agree in bits."""
    gen = cases.generator(0)
    ours = cases.make_parameters((5, 70, 9), gen, dtype, device)
    theirs = cases.twin(ours)
    optimizer = family.ours(ours, **hyper, **implementation)
    reference = family.stock(theirs, **hyper, foreach=device == "cuda")
    scalers = _scaler(device), _scaler(device)
    for step in range(8):
        cases.set_grads(ours, theirs, gen, skip=lambda i, step=step: i == 2 and step < 2)
        _scale_grads(ours, 8.0)
        _scale_grads(theirs, 8.0)
        if step >= 5:
            ours[1].requires_grad_(False)
            theirs[1].requires_grad_(False)
            theirs[1].grad = None
        scalers[0].step(optimizer)
        scalers[1].step(reference)
        for scaler in scalers:
            scaler.update()
        cases.assert_same_training(
            optimizer,
            reference,
            f"after step {step + 1}:",
            exact=family.exact_on(device, fused=implementation.get("fused", False)),
        )
        for p, q in zip(ours, theirs, strict=True):
            cases.assert_same_bits(p.grad, q.grad, "gradients are left unscaled, as stock's are")
        assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("dtype", cases.ids(cases.WIDE_DTYPES))
@pytest.mark.parametrize("scale", [3.0, 65536.0, 1e-3, 1000.1], ids="scale {}".format)
def test_any_scale_divides_as_stock_fused_does(
    scale: float, dtype: torch.dtype, device: str
) -> None:
    gen = cases.generator(0)
    ours = cases.make_parameters((5, 700), gen, dtype, device)
    theirs = cases.twin(ours)
    optimizer = FrozenAwareSGD(ours, lr=0.1)
    fused = torch.optim.SGD(theirs, lr=0.1, fused=True)
    cases.set_grads(ours, theirs, gen)
    for sgd in (optimizer, fused):
        scaler = _scaler(device, scale)
        scaler.step(sgd)
    for p, q in zip(ours, theirs, strict=True):
        cases.assert_close(p.grad, q.grad, "gradient", 1e-6)
        cases.assert_close(p, q, "parameter", 1e-6)


@pytest.mark.parametrize("dtype", cases.ids(cases.NARROW_DTYPES))
@each_hyper
def test_narrow_gradients_are_unscaled_in_fp32(
    family: Family, hyper: Hyper, dtype: torch.dtype
) -> None:
    """By a power of two, which is exact: the result is that of the unscaled gradients."""
    gen = cases.generator(0)
    start = torch.randn(700, generator=gen).to(dtype)
    grad = torch.randn(700, generator=gen).to(dtype)
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer, reference = family.ours([p], **hyper), family.reference([q], **hyper)
    for _ in range(3):
        p.grad, q.grad = grad * 4, grad.clone()
        scaler = _scaler("cpu", 4.0)
        scaler.step(optimizer)
        reference.step()
        cases.assert_same_training(optimizer, reference)


class Recorder:
    """What an overflow must not change: bits and identities (versions of CUDA tensors may)."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.before = self._take()

    def _take(self) -> list[Any]:
        seen: list[Any] = [len(self.optimizer.state)]
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                entry = self.optimizer.state.get(p)
                held = (
                    None
                    if entry is None
                    else [
                        (key, id(value), cases.bits(value).tolist()) for key, value in entry.items()
                    ]
                )
                seen.append((cases.bits(p).tolist(), held))
        return seen

    def assert_unchanged(self) -> None:
        assert self._take() == self.before


BAD_VALUES = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("value", cases.ids(BAD_VALUES))
@pytest.mark.parametrize("steps_before", [0, 2], ids=["on the first step", "later"])
@pytest.mark.parametrize("dtype", cases.ids(cases.WIDE_DTYPES))
@each_hyper
def test_an_overflow_touches_nothing_but_frozen_gradients(
    family: Family,
    hyper: Hyper,
    dtype: torch.dtype,
    steps_before: int,
    value: float,
    device: str,
) -> None:
    """Afterwards training goes on as if the step had not happened: first buffers are still first.

    Stock fused leaves uninitialised memory in the momentum when the first step overflows.
    """
    gen = cases.generator(0)
    ours = cases.make_parameters((5, 70, 9), gen, dtype, device)
    theirs = cases.twin(ours)
    optimizer = family.ours(ours, **hyper)
    reference = family.reference(theirs, **hyper)
    scaler = _scaler(device)
    for _ in range(steps_before):
        cases.set_grads(ours, theirs, gen)
        _scale_grads(ours, 8.0)
        scaler.step(optimizer)
        scaler.update()
        reference.step()
    ours[2].requires_grad_(False)
    theirs[2].requires_grad_(False)
    cases.set_grads(ours, theirs, gen)
    assert ours[1].grad is not None
    ours[1].grad[3] = value
    recorder = Recorder(optimizer)
    scaler.step(optimizer)
    scaler.update()
    recorder.assert_unchanged()
    assert ours[2].grad is None, "a frozen gradient is dropped on overflow too"
    assert scaler.get_scale() == 4.0
    for step in range(3):
        cases.set_grads(ours, theirs, gen)
        _scale_grads(ours, 4.0)
        scaler.step(optimizer)
        scaler.update()
        reference.step()
        cases.assert_same_training(
            optimizer,
            reference,
            f"after the overflow, step {step + 1}:",
            exact=family.exact_on(device),
        )


@each_family
def test_overflow_with_an_existing_buffer_in_part_of_the_tensors(
    family: Family, hyper: Hyper
) -> None:
    gen = cases.generator(0)
    ours = cases.make_parameters((5, 70), gen)
    optimizer = family.ours(ours, **hyper)
    ours[0].grad = torch.ones(5)
    optimizer.step()
    ours[1].grad = torch.full((70,), math.inf)
    recorder = Recorder(optimizer)
    _scaler("cpu").step(optimizer)
    recorder.assert_unchanged()
    assert ours[1] not in optimizer.state


def test_an_infinite_stale_gradient_of_a_frozen_parameter_costs_one_step() -> None:
    """GradScaler looks at every gradient, so it skips the step; then the gradient is gone."""
    trained, frozen = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = FrozenAwareSGD([trained, frozen], lr=0.1, momentum=0.9)
    frozen.requires_grad_(False)
    frozen.grad = torch.full((3,), math.inf)
    scaler = _scaler("cpu")
    for expected in (1.0, 0.9):
        trained.grad = torch.full((3,), scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(trained, torch.full((3,), expected))
        assert torch.equal(frozen, torch.ones(3)) and frozen.grad is None


@each_hyper
def test_unscale_before_the_step_is_not_unscaled_twice(family: Family, hyper: Hyper) -> None:
    """This is how clipping is done; then `grad_scale` is None, but `found_inf` is not."""
    gen = cases.generator(0)
    ours = cases.make_parameters((5, 70), gen)
    theirs = cases.twin(ours)
    optimizer, reference = family.ours(ours, **hyper), family.reference(theirs, **hyper)
    scaler = _scaler("cpu")
    for overflow in (False, True, False):
        cases.set_grads(ours, theirs, gen)
        _scale_grads(ours, scaler.get_scale())
        if overflow:
            assert ours[0].grad is not None
            ours[0].grad[0] = math.inf
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(ours, 1e9)
        scaler.step(optimizer)
        scaler.update()
        if not overflow:
            reference.step()
        cases.assert_same_training(optimizer, reference)


@each_family
def test_the_scale_grows_and_shrinks_as_with_stock(family: Family, hyper: Hyper) -> None:
    """Overflows now and then: counts, moments and scale stay those of stock."""
    gen = cases.generator(0)
    ours = cases.make_parameters((5, 70), gen)
    theirs = cases.twin(ours)
    optimizer, reference = family.ours(ours, **hyper), family.stock(theirs, **hyper, foreach=False)
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2) for _ in range(2)]
    scales = []
    for step in range(9):
        cases.set_grads(ours, theirs, gen)
        for params, scaler, each in zip(
            (ours, theirs), scalers, (optimizer, reference), strict=True
        ):
            scaler.scale(torch.ones(()))
            _scale_grads(params, scaler.get_scale())
            if step in (0, 4, 5):
                params[1].grad[3] = math.inf
            scaler.step(each)
            scaler.update()
        scales.append([scaler.get_scale() for scaler in scalers])
        cases.assert_same_training(optimizer, reference, f"after step {step + 1}:")
    assert all(a == b for a, b in scales)
    assert {a for a, _ in scales} == {2.0, 4.0, 8.0}


def test_a_disabled_scaler_is_a_plain_step() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = FrozenAwareSGD([p], lr=0.5)
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer)
    assert torch.equal(p, torch.full((3,), 0.5))


ODD_GRADIENTS = {
    "expanded": lambda g: g[:1].expand(g.shape),
    "transposed": lambda g: g.t().contiguous().t(),
    "every second column": lambda g: g.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("scale", [8.0, 1.0], ids="scale {}".format)
@pytest.mark.parametrize("odd", cases.ids(ODD_GRADIENTS))
def test_gradients_of_other_strides_are_unscaled_once(odd: Any, scale: float) -> None:
    """An expanded gradient has one number in many places; dividing each place divides it often."""
    gen = cases.generator(0)
    start, grad = cases.randn((6, 10), gen), cases.randn((6, 10), gen)
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer: Any = FrozenAwareSGD([p], lr=0.1, momentum=0.9)
    reference = torch.optim.SGD([q], lr=0.1, momentum=0.9, foreach=False)
    p.grad, q.grad = odd(grad * scale), odd(grad).clone()
    # Set by hand, because GradScaler's own check for infinities refuses an expanded gradient.
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
    optimizer.step()
    reference.step()
    cases.assert_close(p, q, "parameter")
    cases.assert_close(p.grad, q.grad, "gradient")


def _sparse(gen: torch.Generator) -> Tensor:
    return torch.sparse_coo_tensor(
        torch.randint(10, (1, 6), generator=gen),
        cases.randn((6, 4), gen),
        (10, 4),
        check_invariants=True,
    )


@pytest.mark.parametrize("overflow", [False, True], ids=["", "with an overflow"])
@pytest.mark.parametrize(
    ("family", "hyper", "kind"),
    [
        *((SGD, MOMENTUM, kind) for kind in ("sparse", "strided parameter", "fp64 buffer")),
        *((ADAMW, {"lr": 0.1}, kind) for kind in ("strided parameter", "fp64 buffer")),
    ],
    ids=lambda value: value.ours.__name__ if isinstance(value, Family) else None,
)
def test_what_the_kernels_do_not_cover_is_scaled_too(
    family: Family, hyper: Hyper, kind: str, overflow: bool
) -> None:
    gen = cases.generator(0)
    value = cases.randn((10, 4), gen)
    storage = value.repeat_interleave(2, 1)
    p = torch.nn.Parameter(storage[:, ::2] if kind == "strided parameter" else value.clone())
    beside = torch.nn.Parameter(torch.ones(3))
    q, q_beside = torch.nn.Parameter(value.clone()), torch.nn.Parameter(torch.ones(3))
    optimizer = family.ours([beside, p], **hyper)
    reference = family.stock([q_beside, q], **hyper, foreach=False)
    if kind == "fp64 buffer":
        for sgd, x in ((optimizer, p), (reference, q)):
            if family is SGD:
                sgd.state[x]["momentum_buffer"] = torch.ones(10, 4, dtype=torch.float64)
            else:
                sgd.state[x]["step"] = torch.tensor(3.0)
                sgd.state[x]["exp_avg"] = torch.ones(10, 4)
                sgd.state[x]["exp_avg_sq"] = torch.ones(10, 4, dtype=torch.float64)
    scaler = _scaler("cpu")
    for step in range(4):
        grad = _sparse(gen) if kind == "sparse" else cases.randn((10, 4), gen)
        for x in (p, q):
            x.grad = None
        p.grad, q.grad = grad * scaler.get_scale(), grad.clone()
        beside.grad, q_beside.grad = torch.full((3,), scaler.get_scale()), torch.ones(3)
        skipped = overflow and step == 1
        if skipped:
            beside.grad[0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        if not skipped:
            reference.step()
        cases.assert_close(p, q, f"after step {step + 1}")
        cases.assert_same_bits(beside, q_beside, f"after step {step + 1}: its neighbour")


def test_hand_set_scale_and_found_inf() -> None:
    """Some libraries set the two attributes themselves."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer: Any = FrozenAwareSGD([p], lr=0.5)
    p.grad = torch.full((3,), 4.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    optimizer.step()
    assert torch.equal(p, torch.full((3,), 0.5))
    optimizer.found_inf = torch.tensor(1.0)
    p.grad = torch.full((3,), 4.0)
    optimizer.step()
    assert torch.equal(p, torch.full((3,), 0.5))
    optimizer.grad_scale = optimizer.found_inf = None
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(p, torch.zeros(3))


def test_scaling_is_advertised_where_the_kernels_read_it() -> None:
    """An optimizer that bypassed __init__ advertises it, too."""
    p = torch.nn.Parameter(torch.ones(3))
    for kwargs in ({}, {"fused": True}):
        optimizer = FrozenAwareSGD([p], lr=0.1, **kwargs)
        assert optimizer._step_supports_amp_scaling is True
        assert copy.deepcopy(optimizer)._step_supports_amp_scaling is True


@each_family
def test_autocast_training_with_a_scaler(family: Family, hyper: Hyper) -> None:
    torch.manual_seed(0)
    models = [torch.nn.Linear(8, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizer = family.ours(models[0].parameters(), **hyper)
    reference = family.stock(models[1].parameters(), **hyper, foreach=False)
    gen = cases.generator(0)
    scalers = _scaler("cpu"), _scaler("cpu")
    for _ in range(5):
        inputs = torch.randn(4, 8, generator=gen)
        for model, sgd, scaler in zip(models, (optimizer, reference), scalers, strict=True):
            sgd.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(inputs).square().mean()
            scaler.scale(loss).backward()
            scaler.step(sgd)
            scaler.update()
        cases.assert_same_training(optimizer, reference)


@pytest.mark.parametrize("overflow", [False, True], ids=["", "with an overflow"])
@pytest.mark.parametrize("number", cases.ids(cases.ODD_NUMBERS))
@pytest.mark.parametrize("device", cases.DEVICES)
def test_a_scale_whose_bytes_are_not_its_value(
    device: str, number: Callable[[float, str], Tensor], overflow: bool
) -> None:
    gen = cases.generator(3)
    ours = cases.make_parameters((5, 70), gen, device=device)
    theirs = cases.twin(ours)
    optimizer = FrozenAwareSGD(ours, lr=0.1, momentum=0.9)
    reference = FrozenAwareSGD(theirs, lr=0.1, momentum=0.9)
    for step in range(3):
        cases.set_grads(ours, theirs, gen)
        _scale_grads(ours, 8.0)
        withheld = overflow and step != 1
        optimizer.grad_scale = number(8.0, device)  # type: ignore[attr-defined]
        optimizer.found_inf = number(float(withheld), device)  # type: ignore[attr-defined]
        optimizer.step()
        if not withheld:
            reference.step()
    cases.assert_same_training(optimizer, reference)


@pytest.mark.gpu
def test_no_host_sync_in_a_scaled_step() -> None:
    params = cases.make_parameters((5, 70), cases.generator(0), device="cuda")
    optimizer = FrozenAwareSGD(params, lr=0.1, momentum=0.9)
    scaler = _scaler("cuda")
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        scaler.step(optimizer)
        scaler.update()
    for p in params:
        p.grad = torch.ones_like(p)
    torch.cuda.set_sync_debug_mode("error")
    try:
        scaler.step(optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
