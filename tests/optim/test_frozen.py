"""A frozen parameter never moves, holds no gradient after a step, and keeps its state."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.helpers import optim_cases as cases
from tests.helpers.optim_cases import FrozenAwareSGD, Hyper

# What `.grad` of a frozen parameter may be: requires_grad_() does not clear what backward left.
STALE_GRADIENTS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "no gradient": lambda p: None,
    "a gradient": torch.ones_like,
    "a zero gradient": torch.zeros_like,
    "an infinite gradient": lambda p: torch.full_like(p, math.inf),
    "a NaN gradient": lambda p: torch.full_like(p, math.nan),
    "an expanded gradient": lambda p: torch.ones((), dtype=p.dtype, device=p.device).expand_as(p),
    "a sparse gradient": lambda p: torch.ones_like(p).to_sparse(),
    "a gradient that requires grad": lambda p: torch.ones_like(p).requires_grad_(),
}


def _freeze(p: Tensor) -> None:
    p.requires_grad_(False)


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("dtype", cases.ids(cases.DTYPES))
@pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
@pytest.mark.parametrize("gradient", cases.ids(STALE_GRADIENTS))
@pytest.mark.parametrize("has_buffer", [False, True], ids=["without state", "with a buffer"])
def test_frozen_never_moves_and_drops_its_gradient(
    has_buffer: bool,
    gradient: Callable[[Tensor], Tensor | None],
    hyper: Hyper,
    dtype: torch.dtype,
    device: str,
) -> None:
    gen = cases.generator(0)
    first, frozen, last = cases.make_parameters(((5,), (3, 7), (65,)), gen, dtype, device)
    optimizer = FrozenAwareSGD([first, frozen, last], **hyper)
    if has_buffer:
        cases.set_grads([first, frozen, last], [first, frozen, last], gen)
        optimizer.step()
    frozen.grad = None
    _freeze(frozen)
    before = frozen.detach().clone()
    pointer, version = frozen.data_ptr(), frozen._version
    buffer = cases.buffer_of(optimizer, frozen)
    kept = None if buffer is None else (buffer.clone(), buffer._version)
    trained = first.detach().clone(), last.detach().clone()
    for _ in range(3):
        first.grad, last.grad = torch.ones_like(first), torch.ones_like(last)
        frozen.grad = gradient(frozen.detach())
        optimizer.step()
        cases.assert_same_bits(frozen, before, "frozen parameter")
        assert (frozen.data_ptr(), frozen._version) == (pointer, version)
        assert frozen.grad is None
        assert cases.buffer_of(optimizer, frozen) is buffer
        if kept is None:
            assert frozen not in optimizer.state
        else:
            cases.assert_same_bits(buffer, kept[0], "kept buffer")
            assert buffer._version == kept[1]
    for p, start in zip((first, last), trained, strict=True):
        assert not torch.equal(p, start), "its neighbours must have trained"


def test_a_raw_tensor_with_a_hand_set_gradient_is_frozen() -> None:
    """The one place where stock would step and FrozenAwareSGD does not; listed in the README."""
    raw, trained = torch.ones(3), torch.nn.Parameter(torch.ones(3))
    optimizer = FrozenAwareSGD([raw, trained], lr=0.1)
    raw.grad, trained.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    assert torch.equal(raw, torch.ones(3)) and raw.grad is None
    assert torch.equal(trained, torch.full((3,), 0.9))


def test_integer_and_bool_tensors_are_frozen() -> None:
    ints, bools = torch.arange(3), torch.tensor([True, False])
    trained = torch.nn.Parameter(torch.ones(3))
    optimizer = FrozenAwareSGD([ints, bools, trained], lr=0.1, momentum=0.9)
    trained.grad = torch.ones(3)
    optimizer.step()
    assert ints.tolist() == [0, 1, 2] and bools.tolist() == [True, False]
    assert len(optimizer.state) == 1


@pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
def test_frozen_from_the_start_then_unfrozen_trains_with_fresh_momentum(hyper: Hyper) -> None:
    """Its first buffer is its first gradient, undamped; the others keep theirs."""
    gen = cases.generator(1)
    ours = cases.make_parameters((9, 17, 33), gen)
    _freeze(ours[1])
    theirs = cases.twin(ours)
    optimizer = FrozenAwareSGD(ours, **hyper)
    early = torch.optim.SGD([theirs[0], theirs[2]], **hyper, foreach=False)
    late = torch.optim.SGD([theirs[1].requires_grad_()], **hyper, foreach=False)
    for step in range(8):
        if step == 4:
            ours[1].requires_grad_(True)
        cases.set_grads(ours, theirs, gen)
        optimizer.step()
        early.step()
        if step >= 4:
            late.step()
        for i, stock in ((0, early), (1, late), (2, early)):
            what = f"after step {step + 1}: params[{i}]"
            cases.assert_same_bits(ours[i], theirs[i], what)
            cases.assert_same_bits(
                cases.buffer_of(optimizer, ours[i]), cases.buffer_of(stock, theirs[i]), what
            )


@pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
def test_frozen_later_then_unfrozen_goes_on_with_the_buffer_it_kept(hyper: Hyper) -> None:
    gen = cases.generator(2)
    ours = cases.make_parameters((9, 17), gen)
    theirs = cases.twin(ours)
    optimizer = FrozenAwareSGD(ours, **hyper)
    reference = torch.optim.SGD(theirs, **hyper, foreach=False)
    for step in range(9):
        frozen = 3 <= step < 6
        ours[1].requires_grad_(not frozen)
        theirs[1].requires_grad_(not frozen)
        cases.set_grads(ours, theirs, gen)
        if frozen:
            theirs[1].grad = None
        optimizer.step()
        reference.step()
        cases.assert_same_training(optimizer, reference, f"after step {step + 1}:")


def test_unfreezing_never_steps_a_gradient_from_before() -> None:
    p, other = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = FrozenAwareSGD([p, other], lr=0.1, momentum=0.9)
    p.grad, other.grad = torch.ones(3), torch.ones(3)
    _freeze(p)
    optimizer.step()
    p.requires_grad_(True)
    other.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert p not in optimizer.state


def test_a_parameter_whose_first_gradient_comes_late() -> None:
    """Stock fused raises TypeError here: it keeps one first-step flag for the whole group."""
    gen = cases.generator(3)
    ours = cases.make_parameters((9, 17), gen)
    theirs = cases.twin(ours)
    hyper = cases.SOME_HYPERS["momentum, dampening and decay"]
    optimizer = FrozenAwareSGD(ours, **hyper)
    reference = torch.optim.SGD(theirs, **hyper, foreach=False)
    for step in range(6):
        cases.set_grads(ours, theirs, gen, skip=lambda i, step=step: i == 1 and step < 3)
        optimizer.step()
        reference.step()
        cases.assert_same_training(optimizer, reference, f"after step {step + 1}:")


IMPLEMENTATIONS: dict[str, Hyper] = {
    "foreach and fused unset": {},
    "fused=True": {"fused": True},
    "fused=False": {"fused": False},
    "foreach=True": {"foreach": True},
    "foreach=False": {"foreach": False},
}


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("implementation", cases.ids(IMPLEMENTATIONS))
@pytest.mark.parametrize("dtype", cases.ids(cases.WIDE_DTYPES))
@pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
@pytest.mark.parametrize("seed", range(3), ids="schedule {}".format)
def test_any_freeze_schedule(
    seed: int, hyper: Hyper, dtype: torch.dtype, implementation: Hyper, device: str
) -> None:
    """Random freezing, unfreezing and missing gradients between any two steps, in three groups."""
    gen, choice = cases.generator(seed), random.Random(seed)
    ours = cases.make_parameters([i % 19 for i in range(24)], gen, dtype, device)
    theirs = cases.twin(ours)
    optimizer = FrozenAwareSGD(cases.in_groups(ours, 3), **(hyper | implementation))
    reference = cases.Reference(cases.in_groups(theirs, 3), **hyper)
    for step in range(25):
        for a, b in zip(ours, theirs, strict=True):
            if choice.random() < 0.3:
                a.requires_grad_(not a.requires_grad)
                b.requires_grad_(a.requires_grad)
        cases.set_grads(ours, theirs, gen, skip=lambda i: choice.random() < 0.2)
        for a, b in zip(ours, theirs, strict=True):
            b.grad = None if a.grad is None else a.grad.clone()
        optimizer.step()
        reference.step()
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            what = f"after step {step + 1}: params[{i}]"
            cases.assert_same_bits(a, b, what)
            cases.assert_same_bits(
                cases.buffer_of(optimizer, a), cases.buffer_of(reference, b), what
            )
            assert a.requires_grad or a.grad is None


@pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
def test_all_frozen_is_a_no_op(hyper: Hyper) -> None:
    params = cases.make_parameters((3, 0, 5), cases.generator(0))
    before = [p.detach().clone() for p in params]
    optimizer = FrozenAwareSGD(params, **hyper)
    for p in params:
        p.grad = torch.ones_like(p)
        _freeze(p)
    assert optimizer.step() is None
    for p, start in zip(params, before, strict=True):
        cases.assert_same_bits(p, start, "frozen parameter")
        assert p.grad is None
    assert not optimizer.state


def test_no_gradient_anywhere_is_a_no_op() -> None:
    params = cases.make_parameters((3, 5), cases.generator(0))
    before = [p.detach().clone() for p in params]
    optimizer = FrozenAwareSGD(params, lr=0.1, momentum=0.9, weight_decay=0.1)
    optimizer.step()
    for p, start in zip(params, before, strict=True):
        cases.assert_same_bits(p, start, "parameter without gradient")
        assert p._version == 0
    assert not optimizer.state


def test_a_whole_training_with_backward() -> None:
    """The usual way: freeze a layer of a network, train, unfreeze it, train on."""
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 10))
    theirs = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 10))
    theirs.load_state_dict(ours.state_dict())
    hyper = cases.SOME_HYPERS["momentum, dampening and decay"]
    optimizer = FrozenAwareSGD(ours.parameters(), **hyper)
    reference = torch.optim.SGD(theirs.parameters(), **hyper, foreach=False)
    gen = cases.generator(0)
    for step in range(20):
        for model in (ours, theirs):
            model[0].requires_grad_(step < 5 or step >= 12)
        inputs = torch.randn(16, 8, generator=gen)
        labels = torch.randint(10, (16,), generator=gen)
        for model, sgd in ((ours, optimizer), (theirs, reference)):
            sgd.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), labels).backward()
            sgd.step()
        cases.assert_same_training(optimizer, reference, f"after step {step + 1}:")
