"""What happens to the state while its parameter is frozen, and state in bfloat16."""

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
from tests.helpers.optim_cases import FrozenAwareAdamW, FrozenAwareSGD, Hyper

# (family, hyper-parameters) under which there is state.
STATEFUL = cases.per_family(
    lambda family: {k: h for k, h in family.some_hypers.items() if family.buffers(h)},
    cases.UNLIKE_FAMILIES,
)
FAMILIES = cases.each_family(cases.UNLIKE_FAMILIES)
SIZES = ((5,), (3, 7), (65,), (), (0, 2), (33,))


class Forgetful(torch.optim.Optimizer):
    """Stock's for-loop, which loses the state of every parameter that is frozen at a step."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if not p.requires_grad:
                    self.state.pop(p, None)
        return loss


class ForgetfulSGD(Forgetful, cases.Reference):
    pass


class ForgetfulAdamW(Forgetful, cases.AdamWReference):
    pass


FORGETFUL = {FrozenAwareSGD: ForgetfulSGD, FrozenAwareAdamW: ForgetfulAdamW}


def rotate(params: list[torch.nn.Parameter], step: int) -> None:
    for i, p in enumerate(params):
        p.requires_grad_((i + step // 2) % 3 != 0)


def pairs(
    family: cases.Family, hyper: Hyper, policy: str | None, **options: Any
) -> Iterator[tuple[Any, Any]]:
    gen = cases.generator(0)
    ours = cases.make_parameters(SIZES, gen)
    theirs = cases.twin(ours)
    options |= {family.state.policy: policy} if policy else {}
    optimizer = family.ours(cases.in_groups(ours, 2), **hyper, **options)
    reference = FORGETFUL[family.ours](cases.in_groups(theirs, 2), **hyper)
    for step in range(9):
        rotate(ours, step), rotate(theirs, step)
        cases.set_grads(ours, theirs, gen)
        optimizer.step()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            cases.assert_same_bits(p, q, f"parameter after step {step}")
        yield optimizer, reference


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize(("family", "hyper"), STATEFUL)
@pytest.mark.parametrize("policy", ["reset", "drop"])
def test_state_starts_over_after_a_freeze(policy: str, family: cases.Family, hyper: Hyper) -> None:
    """Like any first momentum it is undamped, whatever the dampening; Adam counts from one."""
    for optimizer, reference in pairs(family, hyper, policy):
        for p, q in zip(params_of(optimizer), params_of(reference), strict=True):
            if p.requires_grad:
                assert list(optimizer.state[p]) == family.keys(hyper)
                for name in family.keys(hyper):
                    ours, theirs = (
                        cases.buffer_of(optimizer, p, name),
                        cases.buffer_of(reference, q, name),
                    )
                    assert ours is not None and theirs is not None
                    cases.assert_same_bits(ours, theirs, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_keep_is_the_default_and_equals_stock(family: cases.Family) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = family.ours([p], **family.with_state)
    p.grad = torch.ones(3)
    optimizer.step()
    p.requires_grad_(False)
    optimizer.step()
    assert list(optimizer.state[p]) == family.keys(family.with_state)
    assert family.state.policy not in optimizer.param_groups[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_drop_frees_the_memory_at_the_next_step(family: cases.Family) -> None:
    for optimizer, _ in pairs(family, family.with_state, "drop"):
        frozen = [p for p in params_of(optimizer) if not p.requires_grad]
        assert frozen and not [p for p in frozen if p in optimizer.state]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["keep", "reset", "drop"])
def test_what_has_never_trained_has_no_state(policy: str, family: cases.Family) -> None:
    """Neither a step nor zero_grad makes any; with everything frozen they change nothing."""
    frozen, trained = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = family.ours([frozen, trained], **family.with_state, **{family.state.policy: policy})
    frozen.requires_grad_(False)
    for _ in range(2):
        frozen.grad, trained.grad = torch.ones(3), torch.ones(3)
        optimizer.step()
        optimizer.zero_grad()
    assert list(optimizer.state) == [trained]
    trained.requires_grad_(False)
    optimizer.step()  # the policy applies once
    before = cases.Snapshot(optimizer)
    for _ in range(3):
        frozen.grad, trained.grad = torch.ones(3), torch.ones(3)
        optimizer.step()
        optimizer.zero_grad()
    before.assert_unchanged()


@pytest.mark.parametrize("family", [cases.ADAM, cases.ADAMW], ids=["Adam", "AdamW"])
@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("fused", [None, True, False], ids="fused={}".format)
@pytest.mark.parametrize("dtype", cases.ids(cases.DTYPES))
def test_a_late_first_update_is_as_large_as_any_first_one(
    dtype: torch.dtype, fused: bool | None, device: str, family: cases.Family
) -> None:
    """It moves by lr. With one count for the whole group it would move 3.16 times as far."""
    early, late = (torch.nn.Parameter(torch.zeros(5, device=device, dtype=dtype)) for _ in "ab")
    optimizer = family.ours([early, late], lr=0.125, fused=fused, weight_decay=0)
    late.requires_grad_(False)
    early.grad = torch.ones_like(early)
    optimizer.step()
    optimizer.state[early]["step"].fill_(50_000)
    late.requires_grad_(True)
    early.grad, late.grad = torch.ones_like(early), torch.full_like(late, -0.25)
    optimizer.step()
    assert torch.allclose(late.float(), torch.full_like(late, 0.125).float(), rtol=1e-2)
    assert [int(optimizer.state[p]["step"]) for p in (early, late)] == [50_001, 1]

    # Stock's own form shows what a count of the group's would do.
    shared = torch.nn.Parameter(torch.zeros(5, device=device, dtype=dtype))
    shared.grad = torch.full_like(shared, -0.25)
    stock = family.stock([shared], lr=0.125, weight_decay=0)
    zeros = {name: torch.zeros_like(shared) for name in ("exp_avg", "exp_avg_sq")}
    stock.state[shared] = {"step": torch.tensor(50_000.0), **zeros}
    stock.step()
    ratio = (shared[0] / late[0]).item()
    assert ratio == pytest.approx(0.1 / 0.001**0.5, rel=2e-2), "(1 - beta1) / sqrt(1 - beta2)"


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


@pytest.mark.parametrize("family", FAMILIES)
def test_reset_keeps_the_memory(family: cases.Family) -> None:
    seen: dict[tuple[Tensor, str], int] = {}
    for optimizer, _ in pairs(family, family.with_state, "reset"):
        for p in params_of(optimizer):
            for name in family.keys(family.with_state):
                held = cases.buffer_of(optimizer, p, name)
                if held is not None:
                    assert seen.setdefault((p, name), id(held)) == id(held)
                    stale = optimizer.state[p].get(family.state.stale, False)
                    assert stale is not p.requires_grad
    assert len(seen) == len(SIZES) * len(family.keys(family.with_state))


@pytest.mark.parametrize(
    "foreach",
    [
        pytest.param(None, id="kernels"),
        pytest.param(False, id="loop"),
        pytest.param(True, id="foreach"),
    ],
)
def test_a_reset_reaches_a_maximum_that_is_not_in_use(foreach: bool | None) -> None:
    """amsgrad is turned off before the parameter trains again, and on afterwards."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = FrozenAwareAdamW([p], amsgrad=True, frozen_state="reset", foreach=foreach)

    def step(grad: float) -> None:
        p.grad = torch.full((3,), grad)
        optimizer.step()

    step(1e4)
    p.requires_grad_(False)
    optimizer.step()
    p.requires_grad_(True)
    for amsgrad in (False, True):
        optimizer.param_groups[0]["amsgrad"] = amsgrad
        step(1.0)
    assert optimizer.state[p]["max_exp_avg_sq"].max() < 1


@pytest.mark.parametrize("family", FAMILIES)
def test_each_group_has_its_own_policy(family: cases.Family) -> None:
    option, keys = family.state.policy, family.keys(family.with_state)
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = family.ours(
        [
            {"params": [params[0]]},
            {"params": [params[1]], option: "drop"},
            {"params": [params[2]], option: "reset"},
        ],
        **family.with_state,
    )
    for p in params:
        p.grad = torch.ones(3)
    optimizer.step()
    for p in params:
        p.requires_grad_(False)
    optimizer.step()
    assert list(optimizer.state[params[0]]) == keys
    assert params[1] not in optimizer.state
    assert list(optimizer.state[params[2]]) == [*keys, family.state.stale]
    optimizer.param_groups[0][option] = "drop"
    optimizer.step()
    assert params[0] not in optimizer.state, "the group is read at every step"
    optimizer.param_groups[0][option] = "forget"
    with pytest.raises(ValueError, match=rf"{option} of param_groups\[0\] is 'forget'"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("policy", ["reset", "drop"])
@pytest.mark.parametrize("twice", ["the frozen one", "the trainable one"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_parameter_may_be_listed_twice(family: cases.Family, twice: str, policy: str) -> None:
    frozen, trained = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    listed = [frozen, trained, frozen if twice == "the frozen one" else trained]
    optimizer = family.ours(listed, **family.with_state, **{family.state.policy: policy})
    for _ in range(2):
        (frozen.sum() + trained.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        frozen.requires_grad_(False)
    keys = family.keys(family.with_state)
    assert list(optimizer.state.get(frozen, {})) == (
        [*keys, family.state.stale] if policy == "reset" else []
    )
    assert list(optimizer.state[trained]) == keys


@pytest.mark.parametrize("family", FAMILIES)
def test_drop_leaves_other_state_alone(family: cases.Family) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = family.ours([p], **family.with_state, **{family.state.policy: "drop"})
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[p]["mine"] = 5
    p.requires_grad_(False)
    optimizer.step()
    assert optimizer.state[p] == {"mine": 5}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_parameter_without_a_gradient_is_not_frozen(family: cases.Family) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = family.ours([p], **family.with_state, **{family.state.policy: "drop"})
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert list(optimizer.state[p]) == family.keys(family.with_state)


@pytest.mark.parametrize("policy", ["keep", "reset", "drop"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["own dtype", "bfloat16"])
@pytest.mark.parametrize("through", ["state_dict", "file", "pickle"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_go_on_where_they_were(
    family: cases.Family, through: str, dtype: torch.dtype | None, policy: Any
) -> None:
    """They are saved with some parameters frozen, and both runs go on alike, bit for bit."""
    names = family.state
    options: dict[str, Any] = {names.policy: policy, names.dtype: dtype, **family.with_state}
    options |= {names.seed: 3} if dtype else {}
    gen = cases.generator(0)
    params = cases.make_parameters(SIZES, gen)
    optimizer = family.ours(params, **options)
    for step in range(4):
        rotate(params, step)
        cases.set_grads(params, params, gen)
        optimizer.step()
    twins = cases.twin(params)
    if through == "pickle":
        other = copy.deepcopy(optimizer)
        twins = params_of(other)  # type: ignore[assignment]
    else:
        other = family.ours(twins, **options)
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
    held = [state[names.buffers[0]] for state in other.state.values()]
    assert any(buffer.dtype == (dtype or torch.float32) for buffer in held)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_overflow_leaves_the_mark(family: cases.Family) -> None:
    stale, keys = family.state.stale, family.keys(family.with_state)
    p, fresh = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = family.ours([p], **family.with_state, **{family.state.policy: "reset"})
    p.grad = torch.ones(3)
    optimizer.step()
    p.requires_grad_(False)
    optimizer.step()
    p.requires_grad_(True)
    before = p.detach().clone()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(p, before) and optimizer.state[p][stale]
    optimizer.found_inf = torch.tensor(0.0)
    p.grad, fresh.grad = torch.full((3,), 2.0), torch.full((3,), 2.0)
    optimizer.step()
    first = family.stock([fresh], **family.with_state)
    first.step()
    assert list(optimizer.state[p]) == keys
    for key in keys:
        # But for SGD's decay, which depends on the parameter.
        assert torch.allclose(optimizer.state[p][key], first.state[fresh][key], rtol=1e-2)


@pytest.mark.parametrize(
    "options", cases.ids({"loop": {"foreach": False}, "foreach": {"foreach": True}})
)
@pytest.mark.parametrize("policy", ["reset", "drop"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stocks_forms_follow_the_policy(
    family: cases.Family, policy: str, options: dict[str, Any]
) -> None:
    for optimizer, _ in pairs(family, family.with_state, policy, **options):
        assert optimizer.param_groups[0]["foreach"] is options["foreach"]


# --------------------------------------------------------------------------------- bfloat16 state


def narrow(family: cases.Family, seed: int | None = None) -> dict[str, Any]:
    """The option for bfloat16 buffers, and the seed of their rounding."""
    names = family.state
    return {names.dtype: torch.bfloat16} | ({} if seed is None else {names.seed: seed})


@pytest.mark.parametrize(("family", "hyper"), STATEFUL)
def test_bfloat16_halves_the_state(family: cases.Family, hyper: Hyper) -> None:
    gen = cases.generator(0)
    params = cases.make_parameters(SIZES, gen)
    optimizer = family.ours(params, **hyper, **narrow(family))
    cases.set_grads(params, params, gen)
    optimizer.step()
    numel = sum(p.numel() for p in params)
    names = family.buffers(hyper)
    size = sum(s[name].nbytes for s in optimizer.state.values() for name in names)
    assert size == 2 * numel * len(names)
    counts = [s["step"] for s in optimizer.state.values() if "step" in s]
    assert all(count.dtype is torch.float32 for count in counts)


SMALL_STEPS = {"SGD": {"lr": 0.002, "momentum": 0.95}, "AdamW": {"lr": 0.02, "weight_decay": 0.0}}


def quadratic(family: cases.Family, options: dict[str, Any], steps: int) -> float:
    """Mean distance to the minimum of a quadratic, reached by many small steps."""
    gen = cases.generator(0)
    target = torch.randn(4096, generator=gen)
    p = torch.nn.Parameter(torch.zeros(4096))
    hyper = next(SMALL_STEPS[name] for name, known in cases.FAMILIES.items() if known is family)
    optimizer = family.ours([p], **hyper, **options)
    for _ in range(steps):
        p.grad = p.detach() - target
        optimizer.step()
    return float((p.detach() - target).abs().mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_as_far_as_float32(family: cases.Family) -> None:
    wide = quadratic(family, {}, 300)
    rounded = quadratic(family, narrow(family), 300)
    assert 0 < wide < 0.01 and rounded < 0.02
    assert rounded != wide


@pytest.mark.parametrize("family", FAMILIES)
def test_the_seed_determines_the_rounding(family: cases.Family) -> None:
    a = quadratic(family, narrow(family), 20)
    assert a == quadratic(family, narrow(family), 20)
    assert a != quadratic(family, narrow(family, 1000), 20)


@pytest.mark.parametrize("family", FAMILIES)
def test_stocks_checkpoint_is_narrowed_and_ours_loads_into_stock(family: cases.Family) -> None:
    p, q = (torch.nn.Parameter(torch.ones(100)) for _ in range(2))
    stock = family.stock([p], **family.with_state)
    p.grad = torch.randn(100, generator=cases.generator(0))
    stock.step()
    ours = family.ours([q], **family.with_state, **narrow(family))
    ours.load_state_dict(stock.state_dict())
    names = family.buffers(family.with_state)
    assert {ours.state[q][name].dtype for name in names} == {torch.bfloat16}
    assert ours.param_groups[0][family.state.dtype] is torch.bfloat16
    q.grad = torch.ones(100)
    ours.step()
    stock.load_state_dict(ours.state_dict())
    for name in names:
        buffer = stock.state[p][name]
        assert buffer.dtype is torch.float32
        assert torch.equal(buffer, ours.state[q][name].float())
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_moments_of_another_dtype_are_taken_over(dtype: torch.dtype) -> None:
    """What the moments would have become in their dtype, rounded to a neighbour in bfloat16."""
    p, q = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = FrozenAwareAdamW([p], 1.0, moment_dtype=torch.bfloat16)
    stock = torch.optim.AdamW([q], 1.0)
    for sgd, x, kind in ((optimizer, p, dtype), (stock, q, torch.float32)):
        sgd.state[x] = {
            "step": torch.tensor(7.0),
            "exp_avg": torch.full((3,), 2.0, dtype=kind),
            "exp_avg_sq": torch.full((3,), 8.0, dtype=kind),
        }
        x.grad = torch.ones(3)
        sgd.step()
    for name in ("exp_avg", "exp_avg_sq"):
        assert optimizer.state[p][name].dtype is torch.bfloat16
        assert torch.allclose(optimizer.state[p][name].float(), stock.state[q][name], rtol=2**-7)
    assert int(optimizer.state[p]["step"]) == 8
    assert torch.allclose(p, q, rtol=2**-6)


REFUSED: dict[str, tuple[dict[str, Any], Tensor, type[Exception], str]] = {
    "float64": ({}, torch.ones(3, dtype=torch.float64), TypeError, "is a Double tensor"),
    "float16": ({}, torch.ones(3, dtype=torch.float16), TypeError, "is a Half tensor"),
    "complex": ({}, torch.ones(3, dtype=torch.complex64), TypeError, "is a ComplexFloat tensor"),
    "strided": ({}, torch.ones(6)[::2], TypeError, "dense float32 and bfloat16"),
    "stock's form": ({"foreach": True}, torch.ones(3), ValueError, "asks for stock's own form"),
}


@pytest.mark.parametrize(("options", "data", "error", "message"), cases.ids(REFUSED))
@pytest.mark.parametrize("family", FAMILIES)
def test_what_has_no_such_kernel_is_refused(
    family: cases.Family,
    options: dict[str, Any],
    data: Tensor,
    error: type[Exception],
    message: str,
) -> None:
    fine, p = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(data)
    optimizer = family.ours([fine, p], **family.with_state, **narrow(family), **options)
    fine.grad, p.grad = torch.ones(3), torch.ones_like(p)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert torch.equal(fine, torch.ones(3)) and not optimizer.state


@pytest.mark.parametrize(
    ("option", "value"),
    cases.ids(
        {
            "a policy": ("policy", "forget"),
            "a dtype": ("dtype", torch.float16),
            "a seed": ("seed", -1),
            "a seed of another type": ("seed", 1.5),
        }
    ),
)
@pytest.mark.parametrize("family", cases.each_family())
def test_options_are_checked(family: cases.Family, option: str, value: Any) -> None:
    name = getattr(family.state, option)
    message = f"Invalid {name} value: {value!r}"
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=message):
        family.ours([p], **family.with_state, **{name: value})
    optimizer = family.ours([p], **family.with_state)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": torch.nn.Parameter(torch.ones(3)), name: value})
    assert len(optimizer.param_groups) == 1
