"""Compares the Lion of docs/adding-an-optimizer.md with plain torch.

`test_adding_an_optimizer.py` runs this file in a process of its own, where ``torch_freeze`` is a
copy of the source with the files of the page in it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_freeze.optim.lion import FrozenAwareLion  # type: ignore[import-not-found]

import torch_freeze

SIZES = (0, 1, 7, 64, 1000, 4099)
HYPERS = (
    {"lr": 1e-2, "weight_decay": 0.1},
    {"lr": 3e-3, "betas": (0.95, 0.98), "weight_decay": 0.0},
)


class Reference(torch.optim.Optimizer):
    """The paper's Lion in torch's operators, for the parameters that are trainable."""

    def __init__(self, params: Any, lr: float = 1e-4, weight_decay: float = 0.0) -> None:
        defaults = {"lr": lr, "betas": (0.9, 0.99), "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if not p.requires_grad or p.grad is None:
                    continue
                if p not in self.state:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                m = self.state[p]["exp_avg"]
                update = m.mul(beta1).add_(p.grad, alpha=1 - beta1).sign_()
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr)
                m.mul_(beta2).add_(p.grad, alpha=1 - beta2)


def make(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=generator).to(dtype).requires_grad_() for n in SIZES]


def groups(params: list[Tensor], **options: Any) -> list[dict[str, Any]]:
    """Every other parameter is in the second of two groups."""
    return [{"params": params[i::2], **hyper, **options} for i, hyper in enumerate(HYPERS)]


def prepare(params: list[Tensor], step: int) -> None:
    """Freeze every third parameter at steps 2 and 3; all of them get a gradient."""
    for i, p in enumerate(params):
        p.requires_grad_(i % 3 != 1 or step not in (2, 3))
        generator = torch.Generator().manual_seed(100 * step + i)
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train(optimizer: Any, params: list[Tensor], steps: range) -> None:
    for step in steps:
        prepare(params, step)
        optimizer.step()


def moments(optimizer: Any, params: list[Tensor]) -> list[Tensor]:
    return [optimizer.state[p]["exp_avg"] for p in params]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype is b.dtype and torch.equal(a, b)


def test_this_is_the_copy() -> None:
    assert Path(torch_freeze.__file__ or "").is_relative_to(Path(__file__).parent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_it_has_the_bits_of_the_reference(dtype: torch.dtype) -> None:
    ours, theirs = make(dtype), make(dtype)
    optimizer, reference = FrozenAwareLion(groups(ours)), Reference(groups(theirs))
    train(optimizer, ours, range(8))
    train(reference, theirs, range(8))
    assert_same(ours, theirs)
    assert_same(moments(optimizer, ours), moments(reference, theirs))


def test_bfloat16_is_computed_in_float32_and_rounded_once() -> None:
    ours = make(torch.bfloat16)
    optimizer = FrozenAwareLion(groups(ours))
    for step in range(6):
        wide = [p.detach().float() for p in ours]
        reference = Reference(groups(wide))
        prepare(ours, step)
        for p, w in zip(ours, wide, strict=True):
            if p in optimizer.state:
                reference.state[w]["exp_avg"] = optimizer.state[p]["exp_avg"].float()
            assert p.grad is not None
            w.requires_grad_(p.requires_grad).grad = p.grad.float()
        optimizer.step()
        reference.step()
        assert_same(ours, [w.bfloat16() for w in wide])
        expected = [m.bfloat16() for m in moments(reference, wide)]
        assert_same(moments(optimizer, ours), expected)


def test_a_frozen_parameter_does_not_move_and_loses_its_gradient() -> None:
    params = make()
    optimizer = FrozenAwareLion(groups(params))
    prepare(params, 2)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        if not p.requires_grad:
            assert torch.equal(p, old) and p.grad is None and p not in optimizer.state
        elif p.numel():
            assert not torch.equal(p, old)


def test_a_checkpoint_resumes_to_the_bit_and_fits_the_reference() -> None:
    whole, first, theirs = make(), make(), make()
    optimizer, reference = FrozenAwareLion(groups(whole)), Reference(groups(theirs))
    train(optimizer, whole, range(8))
    half = FrozenAwareLion(groups(first))
    train(half, first, range(4))
    train(reference, theirs, range(4))
    for saved in (half, reference):
        resumed = [p.detach().clone().requires_grad_() for p in first]
        other = FrozenAwareLion(groups(resumed))
        other.load_state_dict(copy.deepcopy(saved.state_dict()))
        train(other, resumed, range(4, 8))
        assert_same(resumed, whole)


@pytest.mark.parametrize("policy", ["drop", "reset"])
def test_the_moment_of_a_frozen_parameter_starts_from_zero(policy: str) -> None:
    ours, theirs = make(), make()
    optimizer = FrozenAwareLion(groups(ours), frozen_state=policy)
    reference = Reference(groups(theirs))
    for step in range(8):
        train(optimizer, ours, range(step, step + 1))
        train(reference, theirs, range(step, step + 1))
        for p, q in zip(ours, theirs, strict=True):
            if not p.requires_grad:
                assert (p in optimizer.state) == (policy == "reset")
                reference.state.pop(q, None)
    assert_same(ours, theirs)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(30, 50), nn.Tanh(), nn.Linear(50, 20), nn.Tanh(), nn.Linear(20, 3)
    )


def test_a_step_in_backward_has_the_bits_of_an_ordinary_one() -> None:
    nets = []
    for options in ({}, {"step_in_backward": True, "bucket_mb": 0.001}):
        model = net()
        optimizer = FrozenAwareLion(model.parameters(), lr=1e-2, weight_decay=0.1, **options)
        for step in range(6):
            model[2].requires_grad_(step not in (2, 3))
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            model(torch.randn(8, 30, generator=generator)).square().mean().backward()
            if options:
                assert model[4].weight.grad is None  # applied and freed
            optimizer.step()
        nets.append([p.detach() for p in model.parameters()])
    assert_same(*nets)


@pytest.mark.parametrize("option", ["betas", "weight_decay", "lr"])
def test_an_option_that_changes_within_a_step_is_named(option: str) -> None:
    model = net()
    optimizer = FrozenAwareLion(model.parameters(), step_in_backward=True, bucket_mb=0.001)
    model(torch.ones(2, 30)).sum().backward()
    changed = {"betas": (0.5, 0.99), "weight_decay": 0.5, "lr": 0.5}
    optimizer.param_groups[0][option] = changed[option]
    with pytest.raises(RuntimeError, match=rf"FrozenAwareLion.step: {option} of param_groups\[0\]"):
        optimizer.step()


def test_a_moment_in_bfloat16_is_rounded_stochastically() -> None:
    ours, theirs = make(), make()
    optimizer = FrozenAwareLion(groups(ours), moment_dtype=torch.bfloat16)
    reference = Reference(groups(theirs))
    train(optimizer, ours, range(8))
    train(reference, theirs, range(8))
    narrow, wide = (
        torch.cat(moments(*which)) for which in ((optimizer, ours), (reference, theirs))
    )
    assert narrow.dtype is torch.bfloat16 and not torch.equal(narrow, wide.bfloat16())
    assert abs(float((narrow.float() - wide).mean())) < 1e-4  # rounding to zero is off by 1e-3


def test_an_overflow_changes_nothing() -> None:
    params = make()
    optimizer = FrozenAwareLion(groups(params))
    train(optimizer, params, range(2))
    before = [t.clone() for t in (*params, *moments(optimizer, params))]
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    train(optimizer, params, range(2, 3))
    assert_same([*params, *moments(optimizer, params)], before)


class Subclass(nn.Parameter):
    """Torch's operators update it, since it has its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("policy", ["keep", "reset"])
def test_what_no_kernel_takes_gets_the_same(policy: str) -> None:
    ours = make()
    rest: list[Tensor] = [Subclass(p.detach().clone()) for p in ours]
    optimizer, by_torch = (
        FrozenAwareLion(groups(params), frozen_state=policy) for params in (ours, rest)
    )
    train(optimizer, ours, range(8))
    train(by_torch, rest, range(8))
    assert_same(ours, [p.detach().as_subclass(Tensor) for p in rest])


def test_what_it_cannot_update_is_refused_before_anything_is_written() -> None:
    plain, complex_ = torch.ones(3, requires_grad=True), torch.ones(3, dtype=torch.complex64)
    complex_.requires_grad_()
    optimizer = FrozenAwareLion([plain, complex_])
    plain.grad, complex_.grad = torch.ones(3), torch.ones(3, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match="no complex parameters"):
        optimizer.step()
    assert torch.equal(plain, torch.ones(3)) and not optimizer.state
    with pytest.raises(TypeError, match="FrozenAwareLion has no argument 'momentum'"):
        FrozenAwareLion([plain], momentum=0.9)
