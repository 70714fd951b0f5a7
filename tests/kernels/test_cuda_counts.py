"""Adam on a GPU: what its counts of updates, on the host or on the device, ask of a step.

The arithmetic rounds otherwise than stock's forms on a GPU, so results are compared within a
tolerance, and the counts exactly.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import cuda_on_cpu
from tests.helpers import optim_cases as cases
from tests.helpers.optim_cases import FrozenAwareAdamW
from tests.kernels.test_cuda import kernels_of, no_sync, params_of

pytestmark = pytest.mark.gpu
SIZES = (1, 127, 128, 129, 1000, 4099)
ON_HOST: dict[str, Any] = {}
ON_DEVICE: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "capturable": {"capturable": True},
    "both": {"fused": True, "capturable": True},
}
PLACES = {"on the host": ON_HOST, **ON_DEVICE}
places = pytest.mark.parametrize("place", cases.ids(PLACES))
on_device = pytest.mark.parametrize("place", cases.ids(ON_DEVICE))
simulated = pytest.mark.skipif(
    not cuda_on_cpu.is_running(), reason="asks the simulated CUDA runtime: make test-cuda"
)


def pair(
    place: dict[str, Any], dtype: torch.dtype = torch.float32, steps: int = 2, **hyper: Any
) -> tuple[FrozenAwareAdamW, torch.optim.Optimizer, torch.Generator]:
    """FrozenAwareAdamW on the GPU, and the oracle over the same tensors on the CPU."""
    gen = cases.generator(7)
    ours = cases.make_parameters(SIZES, gen, dtype, "cuda")
    hyper = {"lr": 0.01, "weight_decay": 0.1} | hyper
    stock = cases.AdamWReference(on_cpu(ours), **hyper)
    optimizer = FrozenAwareAdamW(ours, **hyper, **place)
    for _ in range(steps):
        step_both(optimizer, stock, gen)
    return optimizer, stock, gen


def on_cpu(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().cpu()) for p in params]


def set_grads(ours: list[Tensor], theirs: list[Tensor], gen: torch.Generator) -> None:
    for p, q in zip(ours, theirs, strict=True):
        p.grad = cases.randn(p.shape, gen, p.dtype, "cuda") if p.requires_grad else None
        q.grad = None if p.grad is None else p.grad.cpu().clone()


def step_both(
    ours: torch.optim.Optimizer, stock: torch.optim.Optimizer, gen: torch.Generator
) -> None:
    set_grads(params_of(ours), params_of(stock), gen)
    ours.step()
    stock.step()


def counts_of(optimizer: torch.optim.Optimizer) -> list[float]:
    states = [optimizer.state.get(p, {}) for p in params_of(optimizer)]
    return [float(state["step"]) if state else 0.0 for state in states]


def assert_close(ours: torch.optim.Optimizer, stock: torch.optim.Optimizer) -> None:
    assert counts_of(ours) == counts_of(stock)
    for p, q in zip(params_of(ours), params_of(stock), strict=True):
        pairs = {"parameter": (p.detach(), q.detach())}
        for key in stock.state.get(q, {}):
            pairs[key] = ours.state[p][key], stock.state[q][key]
        for key, (a, b) in pairs.items():
            if p.dtype in cases.WIDE_DTYPES.values():
                cases.assert_close(a.cpu(), b, key, 1e-6)
            else:
                # A number between two that the dtype holds is rounded to either.
                same = (cases.bits(a.cpu()) == cases.bits(b)).float().mean()
                assert same > 0.98, f"{key}: {same:.1%} are equal"


@places
@pytest.mark.parametrize("dtype", cases.ids(cases.DTYPES))
@pytest.mark.parametrize("hyper", cases.ids(cases.ADAMW.some_hypers))
def test_trains_like_stock(hyper: Any, dtype: torch.dtype, place: dict[str, Any]) -> None:
    optimizer, stock, _ = pair(place, dtype, steps=5, **hyper)
    assert_close(optimizer, stock)
    where = "cuda" if place else "cpu"
    assert {s["step"].device.type for s in optimizer.state.values()} == {where}


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("maximize", [False, True])
def test_l2_and_decoupled_decay(name: str, maximize: bool) -> None:
    family = cases.FAMILIES[name]
    gen = cases.generator(1)
    params = cases.make_parameters(SIZES, gen, device="cuda")
    theirs = on_cpu(params)
    hyper: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.5, "maximize": maximize}
    optimizer, stock = family.ours(params, **hyper), family.stock(theirs, foreach=False, **hyper)
    for _ in range(3):
        step_both(optimizer, stock, gen)
    assert_close(optimizer, stock)


@places
def test_launches(place: dict[str, Any]) -> None:
    optimizer, _, _ = pair(place)
    assert len(kernels_of(optimizer.step)) == (2 if place else 1)


@on_device
def test_a_steady_step_does_not_wait(place: dict[str, Any]) -> None:
    optimizer, _, _ = pair(place)
    with no_sync():
        optimizer.step()


def test_counts_on_the_host_do_not_wait_either() -> None:
    optimizer, _, _ = pair(ON_HOST)
    with no_sync():
        optimizer.step()


def test_more_tensors_than_one_launch_takes() -> None:
    gen = cases.generator(0)
    for place in (ON_HOST, ON_DEVICE["fused"]):
        ours = cases.make_parameters([3] * 1500, gen, device="cuda")
        theirs = on_cpu(ours)
        optimizer = FrozenAwareAdamW(ours, **place)
        stock = torch.optim.AdamW(theirs, foreach=False)
        for _ in range(2):
            step_both(optimizer, stock, gen)
        assert_close(optimizer, stock)


@places
def test_a_parameter_unfrozen_late_has_a_count_of_its_own(place: dict[str, Any]) -> None:
    optimizer, stock, gen = pair(place, steps=0)
    late = params_of(optimizer)[3]
    late.requires_grad_(False)
    before = late.detach().clone()
    for step in range(5):
        if step == 3:
            assert torch.equal(late, before) and late not in optimizer.state
            late.requires_grad_(True)
        step_both(optimizer, stock, gen)
    assert counts_of(optimizer)[3] == 2.0
    assert_close(optimizer, stock)


@places
def test_moments_that_were_reset_begin_with_a_count_of_one(place: dict[str, Any]) -> None:
    optimizer, stock, gen = pair({"frozen_state": "reset", **place}, steps=3)
    index = 3
    rests = params_of(optimizer)[index]
    rests.requires_grad_(False)
    step_both(optimizer, stock, gen)
    rests.requires_grad_(True)
    del stock.state[params_of(stock)[index]]
    step_both(optimizer, stock, gen)
    assert counts_of(optimizer)[index] == 1.0
    assert_close(optimizer, stock)


@places
def test_state_of_the_other_place_goes_on(place: dict[str, Any]) -> None:
    """torch moves a count on loading only where it lies on the device; both kinds are taken."""
    other, stock, gen = pair(ON_DEVICE["fused"] if not place else ON_HOST)
    ours = [nn.Parameter(p.detach().clone()) for p in params_of(other)]
    optimizer = FrozenAwareAdamW(ours, lr=0.01, weight_decay=0.1, **place)
    optimizer.load_state_dict(other.state_dict())
    for _ in range(2):
        step_both(optimizer, stock, gen)
    assert_close(optimizer, stock)


def test_both_places_in_one_launch() -> None:
    optimizer, stock, gen = pair(ON_DEVICE["fused"])
    for p in params_of(optimizer)[::2]:
        optimizer.state[p]["step"] = optimizer.state[p]["step"].cpu()
    for _ in range(2):
        step_both(optimizer, stock, gen)
    assert_close(optimizer, stock)
    assert [optimizer.state[p]["step"].is_cuda for p in params_of(optimizer)[:2]] == [False, True]


class TestGradScaler:
    @places
    @pytest.mark.parametrize(
        "overflows", [set(), {0}, {2}, {1, 2}], ids=lambda steps: f"overflow at {sorted(steps)}"
    )
    def test_an_overflow_changes_no_count(self, overflows: set[int], place: dict[str, Any]) -> None:
        optimizer, stock, gen = pair(place, steps=0)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
        for step in range(4):
            scaler.scale(torch.ones((), device="cuda"))  # it makes its tensors at first use
            set_grads(params_of(optimizer), params_of(stock), gen)
            for p in params_of(optimizer):
                assert p.grad is not None
                p.grad.mul_(scaler.get_scale())
            if step in overflows:
                params_of(optimizer)[-1].grad[5] = math.inf  # type: ignore[index]
            scaler.step(optimizer)
            scaler.update()
            if step not in overflows:
                stock.step()
            if optimizer.state:
                assert_close(optimizer, stock)
            else:
                assert not stock.state

    @on_device
    def test_does_not_wait(self, place: dict[str, Any]) -> None:
        optimizer, _, _ = pair(place)
        scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
        scaler.scale(torch.ones((), device="cuda"))
        scaler.step(optimizer)
        scaler.update()
        with no_sync():
            scaler.step(optimizer)
            scaler.update()


class TestGraphs:
    @pytest.mark.parametrize("lr", ["number", "on the device"])
    @pytest.mark.parametrize("dtype", cases.ids(cases.WIDE_DTYPES))
    def test_replays_count(self, dtype: torch.dtype, lr: str) -> None:
        optimizer, stock, gen = pair(ON_DEVICE["capturable"], dtype)
        rate = torch.tensor(0.01, device="cuda", dtype=torch.float64)
        if lr != "number":
            optimizer.param_groups[0]["lr"] = rate
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        for step in range(4):
            for p, q in zip(params_of(optimizer), params_of(stock), strict=True):
                assert p.grad is not None and q.grad is not None
                p.grad.copy_(cases.randn(p.shape, gen, dtype, "cuda"))
                q.grad.copy_(p.grad)
            if lr != "number":
                rate.fill_(0.01 / (step + 1))
                stock.param_groups[0]["lr"] = 0.01 / (step + 1)
            graph.replay()
            # Memory that the capture used must not be given to others.
            garbage = [torch.full((64,), math.nan, device="cuda") for _ in range(4)]
            del garbage
            stock.step()
        assert_close(optimizer, stock)

    def test_replay_follows_the_scaler(self) -> None:
        optimizer, stock, _ = pair(ON_DEVICE["capturable"])
        optimizer.grad_scale = torch.tensor(1.0, device="cuda")  # type: ignore[attr-defined]
        found_inf = torch.tensor(0.0, device="cuda")
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        for step in range(4):
            found_inf.fill_(float(step == 2))
            graph.replay()
            if step != 2:
                stock.step()
        assert_close(optimizer, stock)

    def test_counts_on_the_host_are_refused(self) -> None:
        optimizer, _, _ = pair(ON_HOST)
        with (
            pytest.raises(RuntimeError, match=r"FrozenAwareAdamW\.step while .*capturable=True"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            optimizer.step()

    @on_device
    def test_a_first_step_is_refused(self, place: dict[str, Any]) -> None:
        optimizer, stock, gen = pair(place, steps=0)
        set_grads(params_of(optimizer), params_of(stock), gen)
        with (
            pytest.raises(RuntimeError, match=r"moments are missing"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            optimizer.step()


@places
@pytest.mark.parametrize("bucket_mb", [0, None])
def test_in_backward(bucket_mb: float | None, place: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)]).cuda()
    twin = nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)]).cuda()
    twin.load_state_dict(model.state_dict())
    options: dict[str, Any] = {"step_in_backward": True, "bucket_mb": bucket_mb}
    ours = FrozenAwareAdamW(model.parameters(), **place, **options)
    theirs = FrozenAwareAdamW(twin.parameters(), **place)
    for step in range(4):
        for net in (model, twin):
            net[1].requires_grad_(step % 2 == 1)
        x = torch.randn(8, 32, device="cuda")
        for net, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        cases.assert_same_bits(p, q, "parameter")
    assert counts_of(ours) == counts_of(theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moments_in_bfloat16_are_the_cpus(dtype: torch.dtype) -> None:
    """The random bits are the same. (Parameters differ by the roundings of the square root.)"""
    moments = []
    for device in ("cpu", "cuda"):
        gen = cases.generator(3)
        params = cases.make_parameters(SIZES, gen, dtype, device)
        optimizer = FrozenAwareAdamW(
            params, moment_dtype=torch.bfloat16, moment_seed=5, amsgrad=True, weight_decay=0
        )
        for _ in range(3):
            for p in params:
                p.grad = cases.randn(p.shape, gen, dtype, device)
            optimizer.step()
        moments.append([optimizer.state[p][k] for p in params for k in cases.ADAM.state.buffers])
    for on_cpu, on_gpu in zip(*moments, strict=True):
        assert on_gpu.dtype is torch.bfloat16
        cases.assert_same_bits(on_gpu.cpu(), on_cpu, "moment")


@simulated
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("dtype", cases.ids(cases.DTYPES))
@places
def test_a_steady_step_is_its_launches_and_nothing_else(
    place: dict[str, Any], dtype: torch.dtype, scaled: bool
) -> None:
    optimizer, _, _ = pair(place, dtype)
    if scaled:
        optimizer.grad_scale = torch.tensor(4.0, device="cuda")  # type: ignore[attr-defined]
        optimizer.found_inf = torch.tensor(0.0, device="cuda")  # type: ignore[attr-defined]
    asked = [r.kind for r in cuda_on_cpu.log_of(optimizer.step)]
    if place:
        assert asked == ["launch"] * 2
    else:
        # The host has to know whether to count.
        assert asked[-1:] == ["launch"] and asked.count("launch") == 1
        assert (len(asked) > 1) == scaled


@simulated
@places
def test_several_devices(place: dict[str, Any]) -> None:
    gen = cases.generator(19)
    devices = ("cuda:1", "cpu", "cuda:0")
    options = {} if not place else {"fused": True}
    ours = [p for d in devices for p in cases.make_parameters(SIZES, gen, device=d)]
    theirs = on_cpu(ours)
    optimizer = FrozenAwareAdamW(ours, lr=0.01, **options)
    stock = torch.optim.AdamW(theirs, lr=0.01, foreach=False)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = cases.randn(p.shape, gen, p.dtype, str(p.device))
            q.grad = p.grad.cpu().clone()
        optimizer.step()
        stock.step()
    for device in (0, 1):
        torch.cuda.synchronize(device)
    assert_close(optimizer, stock)
    assert torch.cuda.current_device() == 0


def test_more_tensors_counted_together_than_apart() -> None:
    """Two parameters that share one count are updated one after the other, as torch does."""
    optimizer, stock, gen = pair(ON_DEVICE["fused"])
    ours, theirs = params_of(optimizer), params_of(stock)
    for params, one in ((ours, optimizer), (theirs, stock)):
        for p in params[1:3]:
            one.state[p]["step"] = one.state[params[0]]["step"]
    for _ in range(2):
        step_both(optimizer, stock, gen)
    assert counts_of(optimizer)[:3] == [8.0] * 3
    assert_close(optimizer, stock)
