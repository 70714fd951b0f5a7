"""What happens to momentum while its parameter is frozen, and momentum in bfloat16."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import optim_cases as cases
from tests.helpers.optim_cases import FrozenAwareSGD, Hyper, Reference

MOMENTUM: dict[str, Hyper] = {k: h for k, h in cases.SOME_HYPERS.items() if h.get("momentum")}
SIZES = ((5,), (3, 7), (65,), (), (0, 2), (33,))


class Forgetful(Reference):
    """Stock's for-loop, which loses the momentum of every parameter that is frozen at a step."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if not p.requires_grad:
                    self.state.pop(p, None)
        return loss


def rotate(params: list[torch.nn.Parameter], step: int) -> None:
    for i, p in enumerate(params):
        p.requires_grad_((i + step // 2) % 3 != 0)


def pairs(
    hyper: Hyper, steps: int = 9, **options: Any
) -> Iterator[tuple[FrozenAwareSGD, Forgetful]]:
    gen = cases.generator(0)
    ours = cases.make_parameters(SIZES, gen)
    theirs = cases.twin(ours)
    optimizer = FrozenAwareSGD(cases.in_groups(ours, 2), **hyper, **options)
    reference = Forgetful(cases.in_groups(theirs, 2), **hyper)
    for step in range(steps):
        rotate(ours, step), rotate(theirs, step)
        cases.set_grads(ours, theirs, gen)
        optimizer.step()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            cases.assert_same_bits(p, q, f"parameter after step {step}")
        yield optimizer, reference


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("hyper", cases.ids(MOMENTUM))
@pytest.mark.parametrize("policy", ["reset", "drop"])
def test_momentum_starts_over_after_a_freeze(policy: Any, hyper: Hyper) -> None:
    """Like any first momentum it is undamped, whatever the dampening."""
    for optimizer, reference in pairs(hyper, frozen_momentum=policy):
        for p, q in zip(params_of(optimizer), params_of(reference), strict=True):
            if p.requires_grad:
                ours, theirs = cases.buffer_of(optimizer, p), cases.buffer_of(reference, q)
                assert ours is not None and theirs is not None
                cases.assert_same_bits(ours, theirs, "momentum")
                assert "momentum_stale" not in optimizer.state[p]


def test_keep_is_the_default_and_equals_stock() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = FrozenAwareSGD([p], 0.1, 0.9)
    p.grad = torch.ones(3)
    optimizer.step()
    p.requires_grad_(False)
    optimizer.step()
    assert optimizer.state[p].keys() == {"momentum_buffer"}
    assert "frozen_momentum" not in optimizer.param_groups[0]


def test_drop_frees_the_memory_at_the_next_step() -> None:
    for optimizer, _ in pairs(MOMENTUM["momentum"], frozen_momentum="drop"):
        frozen = [p for p in params_of(optimizer) if not p.requires_grad]
        assert frozen and not [p for p in frozen if p in optimizer.state]


@pytest.mark.parametrize("in_backward", [False, True], ids=["ordinary", "in backward"])
@pytest.mark.parametrize("profiled", [False, True], ids=["", "under a profiler"])
def test_drop_frees_the_memory_before_the_next_forward_pass(
    in_backward: bool, profiled: bool
) -> None:
    """zero_grad() frees it, so that old momentum is never held together with new activations."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = FrozenAwareSGD(
        [{"params": params[:2], "frozen_momentum": "drop"}, {"params": params[2:]}],
        0.1,
        0.9,
        dampening=0.5,
        step_in_backward=in_backward,
    )

    def train() -> None:
        torch.stack(params).sum().backward()
        optimizer.step()

    train()
    for p in params[1:]:
        p.requires_grad_(False)
    profiler = torch.profiler.profile() if profiled else contextlib.nullcontext()
    with profiler:
        optimizer.zero_grad()
    assert [p in optimizer.state for p in params] == [True, False, True]
    for p in params[1:]:
        p.requires_grad_(True)
    train()
    momentum = [optimizer.state[p]["momentum_buffer"][0].item() for p in params]
    # The new one is undamped: 1; the others are 0.9 * 1 + 0.5 * 1.
    assert momentum == pytest.approx([1.4, 1.0, 1.4])


def test_reset_keeps_the_memory() -> None:
    seen: dict[Tensor, int] = {}
    for optimizer, _ in pairs(MOMENTUM["momentum"], frozen_momentum="reset"):
        for p in params_of(optimizer):
            buffer = cases.buffer_of(optimizer, p)
            if buffer is not None:
                assert seen.setdefault(p, id(buffer)) == id(buffer)
                assert optimizer.state[p].get("momentum_stale", False) is not p.requires_grad
    assert len(seen) == len(SIZES)


def test_each_group_has_its_own_policy() -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = FrozenAwareSGD(
        [
            {"params": [params[0]]},
            {"params": [params[1]], "frozen_momentum": "drop"},
            {"params": [params[2]], "frozen_momentum": "reset"},
        ],
        0.1,
        0.9,
    )
    for p in params:
        p.grad = torch.ones(3)
    optimizer.step()
    for p in params:
        p.requires_grad_(False)
    optimizer.step()
    assert optimizer.state[params[0]].keys() == {"momentum_buffer"}
    assert params[1] not in optimizer.state
    assert optimizer.state[params[2]].keys() == {"momentum_buffer", "momentum_stale"}
    optimizer.param_groups[0]["frozen_momentum"] = "drop"
    optimizer.step()
    assert params[0] not in optimizer.state, "the group is read at every step"
    optimizer.param_groups[0]["frozen_momentum"] = "forget"
    with pytest.raises(ValueError, match=r"frozen_momentum of param_groups\[0\] is 'forget'"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("policy", ["reset", "drop"])
@pytest.mark.parametrize("twice", ["the frozen one", "the trainable one"])
def test_a_parameter_may_be_listed_twice(twice: str, policy: Any) -> None:
    frozen, trained = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    listed = [frozen, trained, frozen if twice == "the frozen one" else trained]
    optimizer = FrozenAwareSGD(listed, 0.1, 0.9, frozen_momentum=policy)
    for _ in range(2):
        (frozen.sum() + trained.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        frozen.requires_grad_(False)
    assert optimizer.state.get(frozen, {}).keys() == (
        {"momentum_buffer", "momentum_stale"} if policy == "reset" else set()
    )
    assert optimizer.state[trained].keys() == {"momentum_buffer"}


def test_drop_leaves_other_state_alone() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = FrozenAwareSGD([p], 0.1, 0.9, frozen_momentum="drop")
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[p]["mine"] = 5
    p.requires_grad_(False)
    optimizer.step()
    assert optimizer.state[p] == {"mine": 5}


def test_a_parameter_without_a_gradient_is_not_frozen() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = FrozenAwareSGD([p], 0.1, 0.9, frozen_momentum="drop")
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert "momentum_buffer" in optimizer.state[p]


@pytest.mark.parametrize("policy", ["keep", "reset", "drop"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["own dtype", "bfloat16"])
@pytest.mark.parametrize("through", ["state_dict", "file", "pickle"])
def test_checkpoints_go_on_where_they_were(
    through: str, dtype: torch.dtype | None, policy: Any
) -> None:
    """They are saved with some parameters frozen, and both runs go on alike, bit for bit."""
    options: dict[str, Any] = {"frozen_momentum": policy, "momentum_dtype": dtype}
    options |= {"momentum_seed": 3} if dtype else {}
    gen = cases.generator(0)
    params = cases.make_parameters(SIZES, gen)
    optimizer = FrozenAwareSGD(params, 0.1, 0.9, dampening=0.3, **options)
    for step in range(4):
        rotate(params, step)
        cases.set_grads(params, params, gen)
        optimizer.step()
    twins = cases.twin(params)
    if through == "pickle":
        other = copy.deepcopy(optimizer)
        twins = params_of(other)  # type: ignore[assignment]
    else:
        other = FrozenAwareSGD(twins, 0.1, 0.9, dampening=0.3, **options)
        saved: Any = copy.deepcopy(optimizer.state_dict())
        if through == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        other.load_state_dict(saved)
    for step in range(4, 10):
        rotate(params, step), rotate(twins, step)
        cases.set_grads(params, twins, gen)
        optimizer.step(), other.step()
        for p, q in zip(params, twins, strict=True):
            cases.assert_same_bits(p, q, "parameter")
            ours, theirs = optimizer.state.get(p, {}), other.state.get(q, {})
            assert ours.keys() == theirs.keys()
    assert any(s["momentum_buffer"].dtype == (dtype or torch.float32) for s in other.state.values())


def test_an_overflow_leaves_the_mark() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = FrozenAwareSGD([p], 0.1, 0.9, frozen_momentum="reset")
    p.grad = torch.ones(3)
    optimizer.step()
    p.requires_grad_(False)
    optimizer.step()
    p.requires_grad_(True)
    before = p.detach().clone()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(p, before) and optimizer.state[p]["momentum_stale"]
    optimizer.found_inf = torch.tensor(0.0)
    p.grad = torch.full((3,), 2.0)
    optimizer.step()
    assert optimizer.state[p].keys() == {"momentum_buffer"}
    assert torch.equal(optimizer.state[p]["momentum_buffer"], torch.full((3,), 2.0))


@pytest.mark.parametrize(
    "options", cases.ids({"loop": {"foreach": False}, "foreach": {"foreach": True}})
)
@pytest.mark.parametrize("policy", ["reset", "drop"])
def test_stocks_forms_follow_the_policy(policy: Any, options: dict[str, Any]) -> None:
    for optimizer, _ in pairs(MOMENTUM["momentum"], frozen_momentum=policy, **options):
        assert optimizer.param_groups[0]["foreach"] is options["foreach"]


# ------------------------------------------------------------------------------ bfloat16 momentum


def test_bfloat16_momentum_halves_the_state() -> None:
    gen = cases.generator(0)
    params = cases.make_parameters(SIZES, gen)
    optimizer = FrozenAwareSGD(params, 0.1, 0.9, momentum_dtype=torch.bfloat16)
    cases.set_grads(params, params, gen)
    optimizer.step()
    numel = sum(p.numel() for p in params)
    assert sum(s["momentum_buffer"].nbytes for s in optimizer.state.values()) == 2 * numel


def quadratic(options: dict[str, Any], steps: int) -> float:
    """Mean distance to the minimum of a quadratic, reached by many small steps."""
    gen = cases.generator(0)
    target = torch.randn(4096, generator=gen)
    p = torch.nn.Parameter(torch.zeros(4096))
    optimizer = FrozenAwareSGD([p], 0.002, 0.95, **options)
    for _ in range(steps):
        p.grad = p.detach() - target
        optimizer.step()
    return float((p.detach() - target).abs().mean())


def test_it_trains_as_far_as_float32() -> None:
    wide, narrow = quadratic({}, 300), quadratic({"momentum_dtype": torch.bfloat16}, 300)
    assert 0 < wide < 0.01 and narrow < 0.02
    assert narrow != wide


def test_the_seed_determines_the_rounding() -> None:
    a = quadratic({"momentum_dtype": torch.bfloat16}, 20)
    assert a == quadratic({"momentum_dtype": torch.bfloat16}, 20)
    assert a != quadratic({"momentum_dtype": torch.bfloat16, "momentum_seed": 1000}, 20)


def test_stocks_checkpoint_is_narrowed_and_ours_loads_into_stock() -> None:
    p, q = (torch.nn.Parameter(torch.ones(100)) for _ in range(2))
    stock = torch.optim.SGD([p], 0.1, 0.9)
    p.grad = torch.randn(100, generator=cases.generator(0))
    stock.step()
    ours = FrozenAwareSGD([q], 0.1, 0.9, momentum_dtype=torch.bfloat16)
    ours.load_state_dict(stock.state_dict())
    assert ours.state[q]["momentum_buffer"].dtype is torch.bfloat16
    assert ours.param_groups[0]["momentum_dtype"] is torch.bfloat16
    q.grad = torch.ones(100)
    ours.step()
    stock.load_state_dict(ours.state_dict())
    buffer = stock.state[p]["momentum_buffer"]
    assert buffer.dtype is torch.float32 and torch.equal(
        buffer, ours.state[q]["momentum_buffer"].float()
    )
    p.grad = torch.ones(100)
    stock.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_buffer_of_another_dtype_is_taken_over(dtype: torch.dtype) -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = FrozenAwareSGD([p], 1.0, 0.5, momentum_dtype=torch.bfloat16)
    optimizer.state[p]["momentum_buffer"] = torch.full((3,), 2.0, dtype=dtype)
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["momentum_buffer"], torch.full((3,), 2.0).bfloat16())
    assert torch.equal(p, torch.full((3,), -2.0))


REFUSED: dict[str, tuple[dict[str, Any], Tensor, type[Exception], str]] = {
    "float64": ({}, torch.ones(3, dtype=torch.float64), TypeError, "is a Double tensor"),
    "float16": ({}, torch.ones(3, dtype=torch.float16), TypeError, "is a Half tensor"),
    "complex": ({}, torch.ones(3, dtype=torch.complex64), TypeError, "is a ComplexFloat tensor"),
    "strided": ({}, torch.ones(6)[::2], TypeError, "dense float32 and bfloat16"),
    "stock's form": ({"foreach": True}, torch.ones(3), ValueError, "asks for stock's own form"),
}


@pytest.mark.parametrize(("options", "data", "error", "message"), cases.ids(REFUSED))
def test_what_has_no_such_kernel_is_refused(
    options: dict[str, Any], data: Tensor, error: type[Exception], message: str
) -> None:
    fine, p = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(data)
    optimizer = FrozenAwareSGD([fine, p], 0.1, 0.9, momentum_dtype=torch.bfloat16, **options)
    fine.grad, p.grad = torch.ones(3), torch.ones_like(p)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert torch.equal(fine, torch.ones(3)) and not optimizer.state


@pytest.mark.parametrize(
    ("options", "message"),
    cases.ids(
        {
            "a policy": ({"frozen_momentum": "forget"}, "Invalid frozen_momentum value: 'forget'"),
            "a dtype": ({"momentum_dtype": torch.float16}, "Invalid momentum_dtype value"),
            "a seed": ({"momentum_seed": -1}, "Invalid momentum_seed value: -1"),
            "a seed of another type": ({"momentum_seed": 1.5}, "Invalid momentum_seed value: 1.5"),
        }
    ),
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=message):
        FrozenAwareSGD([p], 0.1, 0.9, **options)
    optimizer = FrozenAwareSGD([p], 0.1, 0.9)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": torch.nn.Parameter(torch.ones(3)), **options})
    assert len(optimizer.param_groups) == 1
