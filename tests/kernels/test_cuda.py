"""FrozenAwareSGD on a GPU: launches, memory, graphs, GradScaler, streams and devices.

What the step computes is tested device by device in tests/optim, and thread by thread without
a GPU in test_body.py. Here is what only a GPU can show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tests.helpers import apart
from tests.helpers import optim_cases as cases
from tests.helpers.optim_cases import FrozenAwareSGD, Hyper, Reference

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
MOMENTUM: Hyper = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}
SIZES = (1, 127, 128, 129, 1000, 4099, 70001)


def kernels_of(run: Callable[[], Any]) -> list[str]:
    """Names of the kernels that `run` starts on the GPU."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    on_gpu = [e for e in seen.events() if e.device_type.name == "CUDA"]
    # The profiler's own ranges, such as "Optimizer.step#…", are drawn on the GPU's time line too.
    return [e.name for e in on_gpu if not e.name.startswith("Optimizer.")]


@contextmanager
def no_sync() -> Iterator[None]:
    """Raise where the host waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def pair(
    dtype: torch.dtype = torch.float32, sizes: Sequence[int] = SIZES, **hyper: Any
) -> tuple[FrozenAwareSGD, Reference, torch.Generator]:
    """FrozenAwareSGD and the oracle over the same tensors, with momentum after a first step."""
    gen = cases.generator(7)
    ours = cases.make_parameters(sizes, gen, dtype, DEVICE)
    theirs = cases.twin(ours)
    optimizer = FrozenAwareSGD(ours, **(MOMENTUM | hyper))
    reference = Reference(theirs, **(MOMENTUM | hyper))
    cases.set_grads(ours, theirs, gen)
    optimizer.step()
    reference.step()
    return optimizer, reference, gen


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


class TestLaunches:
    @pytest.mark.parametrize("dtype", cases.ids(cases.DTYPES))
    def test_one_for_all_tensors(self, dtype: torch.dtype) -> None:
        optimizer, _, _ = pair(dtype, sizes=SIZES * 20)
        assert len(kernels_of(optimizer.step)) == 1

    def test_one_for_161_groups(self) -> None:
        gen = cases.generator(0)
        params = cases.make_parameters([100] * 161, gen, device=DEVICE)
        groups = [{"params": [p], "lr": 0.1 / (i + 1)} for i, p in enumerate(params)]
        optimizer = FrozenAwareSGD(groups, **MOMENTUM)
        cases.set_grads(params, params, gen)
        optimizer.step()
        assert len(kernels_of(optimizer.step)) == 1

    def test_one_per_dtype(self) -> None:
        gen = cases.generator(0)
        params = [
            p for d in cases.DTYPES.values() for p in cases.make_parameters([9, 99], gen, d, DEVICE)
        ]
        optimizer = FrozenAwareSGD(params, **MOMENTUM)
        cases.set_grads(params, params, gen)
        optimizer.step()
        assert len(kernels_of(optimizer.step)) == len(cases.DTYPES)

    def test_chained_beyond_what_one_takes(self) -> None:
        gen = cases.generator(0)
        ours = cases.make_parameters([3] * 2500, gen, device=DEVICE)
        theirs = cases.twin(ours)
        optimizer, reference = FrozenAwareSGD(ours, **MOMENTUM), Reference(theirs, **MOMENTUM)
        for _ in range(2):
            cases.set_grads(ours, theirs, gen)
            optimizer.step()
            reference.step()
        cases.assert_same_training(optimizer, reference)
        assert len(kernels_of(optimizer.step)) == 3

    def test_none_when_everything_is_frozen(self) -> None:
        optimizer, _, _ = pair()
        for p in params_of(optimizer):
            p.requires_grad_(False)
        assert kernels_of(optimizer.step) == []


@pytest.mark.parametrize("dtype", cases.ids(cases.DTYPES))
def test_a_steady_step_neither_allocates_nor_waits(dtype: torch.dtype) -> None:
    optimizer, _, _ = pair(dtype)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with no_sync():
        optimizer.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.parametrize("dtype", cases.ids(cases.WIDE_DTYPES))
@pytest.mark.parametrize("hyper", cases.ids(cases.HYPERS))
def test_bit_identical_to_stock_foreach(hyper: Hyper, dtype: torch.dtype) -> None:
    cases.check_hyper(hyper, dtype, DEVICE, steps=5, sizes=SIZES)


@pytest.mark.parametrize("dtype", cases.ids(cases.NARROW_DTYPES))
@pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
def test_error_never_above_stock_fused(hyper: Hyper, dtype: torch.dtype) -> None:
    gen = cases.generator(3)
    sizes = (4099, 70001)
    ours = cases.make_parameters(sizes, gen, dtype, DEVICE)
    theirs, exact = cases.twin(ours), [nn.Parameter(p.detach().double()) for p in ours]
    optimizers = (
        FrozenAwareSGD(ours, **hyper),
        torch.optim.SGD(theirs, fused=True, **hyper),
        torch.optim.SGD(exact, foreach=True, **hyper),
    )
    for _ in range(5):
        cases.set_grads(ours, theirs, gen)
        for p, q in zip(ours, exact, strict=True):
            assert p.grad is not None
            q.grad = p.grad.double()
        for optimizer in optimizers:
            optimizer.step()
        errors = [
            sum(
                (p.detach().double() - q.detach()).abs().sum().item()
                for p, q in zip(a, exact, strict=True)
            )
            for a in (ours, theirs)
        ]
        assert errors[0] <= errors[1]


@pytest.mark.parametrize("dtype", cases.ids(cases.DTYPES))
@pytest.mark.parametrize("offset", range(1, 9), ids="view {} elements in".format)
def test_misaligned_views(offset: int, dtype: torch.dtype) -> None:
    gen = cases.generator(5)
    numel = 30011
    flat = cases.randn(numel + 16, gen, dtype, DEVICE)
    for places in ((offset, 0), (0, offset), (offset, offset)):
        values = flat.clone()
        ours = nn.Parameter(values[places[0] : places[0] + numel])
        theirs = cases.twin([ours])
        optimizer, reference = FrozenAwareSGD([ours], **MOMENTUM), Reference(theirs, **MOMENTUM)
        for _ in range(3):
            grads = cases.randn(numel + 16, gen, dtype, DEVICE)
            ours.grad = grads[places[1] : places[1] + numel]
            theirs[0].grad = ours.grad.clone()
            optimizer.step()
            reference.step()
        cases.assert_same_training(optimizer, reference)
        inside = slice(places[0], places[0] + numel)
        outside = torch.ones_like(flat, dtype=torch.bool)
        outside[inside] = False
        assert torch.equal(values[outside], flat[outside]), "written outside the view"


def test_more_than_2_to_the_31_elements() -> None:
    numel = 2**31 + 5
    free, _ = torch.cuda.mem_get_info()
    if free < 4 * 2 * numel:
        pytest.skip(f"needs {4 * 2 * numel >> 30} GiB of GPU memory; {free >> 30} are free")
    p = nn.Parameter(torch.zeros(numel, dtype=torch.bfloat16, device=DEVICE))
    p.grad = torch.ones_like(p)
    FrozenAwareSGD([p], lr=1.0).step()
    assert p.detach().min().item() == p.detach().max().item() == -1.0


class TestGraphs:
    """Capture and replay. The first step runs before, as torch asks of optimizers with state."""

    @pytest.mark.parametrize("dtype", cases.ids(cases.DTYPES))
    @pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
    def test_replayed_step_equals_eager(self, hyper: Hyper, dtype: torch.dtype) -> None:
        gen = cases.generator(11)
        ours = cases.make_parameters(SIZES, gen, dtype, DEVICE)
        theirs = cases.twin(ours)
        optimizer, reference = FrozenAwareSGD(ours, **hyper), Reference(theirs, **hyper)
        cases.set_grads(ours, theirs, gen)
        optimizer.step()
        reference.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        for _ in range(4):
            for p, q in zip(ours, theirs, strict=True):
                assert p.grad is not None and q.grad is not None
                p.grad.copy_(cases.randn(p.shape, gen, dtype, DEVICE))
                q.grad.copy_(p.grad)
            graph.replay()
            reference.step()
        cases.assert_same_training(optimizer, reference)

    @pytest.mark.parametrize("lr_dtype", cases.ids(cases.WIDE_DTYPES))
    def test_replay_follows_a_learning_rate_on_the_device(self, lr_dtype: torch.dtype) -> None:
        lr = torch.tensor(0.1, dtype=lr_dtype, device=DEVICE)
        optimizer, reference, _ = pair()
        optimizer.param_groups[0]["lr"] = lr
        reference.param_groups[0]["lr"] = float(lr)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        for rate in (0.05, 0.3, 0.0):
            lr.fill_(rate)
            reference.param_groups[0]["lr"] = float(lr)
            graph.replay()
            reference.step()
            for p, q in zip(params_of(optimizer), params_of(reference), strict=True):
                cases.assert_same_bits(p, q, f"at {rate}")

    def test_whole_iteration_equals_eager(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8)).to(DEVICE)
        model[0].weight.requires_grad_(False)
        eager = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8)).to(DEVICE)
        eager.load_state_dict(model.state_dict())
        eager[0].weight.requires_grad_(False)
        optimizer = FrozenAwareSGD(model.parameters(), **MOMENTUM)
        reference = FrozenAwareSGD(eager.parameters(), **MOMENTUM)
        x = torch.randn(16, 32, device=DEVICE)

        def iterate(net: nn.Module, opt: torch.optim.Optimizer) -> None:
            opt.zero_grad(set_to_none=True)
            net(x).square().mean().backward()
            opt.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                iterate(model, optimizer)
        torch.cuda.current_stream().wait_stream(side)
        for _ in range(3):
            iterate(eager, reference)
        optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            net_loss = model(x).square().mean()
            net_loss.backward()
            optimizer.step()
        for _ in range(5):
            x.normal_()
            graph.replay()
            iterate(eager, reference)
        for p, q in zip(model.parameters(), eager.parameters(), strict=True):
            # The matrix products of a captured backward may be other kernels than the eager ones'.
            torch.testing.assert_close(p, q)

    def test_a_first_step_inside_capture_works_or_says_why_not(self) -> None:
        gen = cases.generator(2)
        ours = cases.make_parameters(SIZES, gen, device=DEVICE)
        theirs = cases.twin(ours)
        optimizer, reference = FrozenAwareSGD(ours, **MOMENTUM), Reference(theirs, **MOMENTUM)
        cases.set_grads(ours, theirs, gen)
        graph = torch.cuda.CUDAGraph()
        refusal = ""
        try:
            with torch.cuda.graph(graph):
                optimizer.step()
        except RuntimeError as error:
            refusal = str(error)
        if refusal:
            assert "FrozenAwareSGD" in refusal and "captur" in refusal
            return
        for _ in range(3):
            graph.replay()
            reference.step()
        cases.assert_same_training(optimizer, reference)


class TestGradScaler:
    def run(self, dtype: torch.dtype, overflows: set[int], steps: int = 5, **hyper: Any) -> None:
        gen = cases.generator(13)
        ours = cases.make_parameters(SIZES, gen, dtype, DEVICE)
        theirs = cases.twin(ours)
        optimizer = FrozenAwareSGD(ours, **(MOMENTUM | hyper))
        reference = Reference(theirs, **(MOMENTUM | hyper))
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
        for step in range(steps):
            scaler.scale(torch.ones((), device=DEVICE))  # it makes its tensors at first use
            scale = scaler.get_scale()
            cases.set_grads(ours, theirs, gen)
            unscaled = [p.grad.clone() for p in ours if p.grad is not None]
            for p in ours:
                assert p.grad is not None
                p.grad.mul_(scale)
            if step in overflows:
                assert ours[-1].grad is not None
                ours[-1].grad[5] = math.inf
            scaler.step(optimizer)
            scaler.update()
            if step not in overflows:
                reference.step()
                for p, grad in zip(ours, unscaled, strict=True):
                    cases.assert_same_bits(p.grad, grad, "an unscaled gradient")
            cases.assert_same_training(optimizer, reference, f"step {step}")

    # Not fp16, which the scaled gradients of this table would overflow.
    @pytest.mark.parametrize("dtype", cases.ids(cases.WIDE_DTYPES | {"bf16": torch.bfloat16}))
    @pytest.mark.parametrize(
        "overflows",
        [set(), {0}, {0, 1}, {2}, {0, 3}],
        ids=lambda steps: f"overflow at {sorted(steps)}" if steps else "no overflow",
    )
    def test_overflow_changes_nothing(self, overflows: set[int], dtype: torch.dtype) -> None:
        self.run(dtype, overflows)
        self.run(dtype, overflows, dampening=0.5)

    @pytest.mark.parametrize("scale", [4.0, 3.0])
    def test_gradients_are_divided_by_the_scale(self, scale: float) -> None:
        """To the last bit, also where multiplying by the inverse would be another number."""
        optimizer, reference, gen = pair()
        optimizer.grad_scale = torch.tensor(scale, device=DEVICE)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.tensor(0.0, device=DEVICE)  # type: ignore[attr-defined]
        cases.set_grads(params_of(optimizer), params_of(reference), gen)
        for q in params_of(reference):
            assert q.grad is not None
            q.grad.copy_(q.grad.cpu() / torch.tensor(scale))
        optimizer.step()
        reference.step()
        cases.assert_same_training(optimizer, reference)

    def test_steady_state_does_not_wait(self) -> None:
        optimizer, _, _ = pair()
        scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0)
        scaler.scale(torch.ones((), device=DEVICE))
        scaler.step(optimizer)
        scaler.update()
        with no_sync():
            scaler.step(optimizer)
            scaler.update()


class TestStreams:
    NUMEL = 4 << 20

    def test_gradients_freed_right_after_the_launch(self) -> None:
        gen = cases.generator(17)
        p, q = (nn.Parameter(torch.zeros(self.NUMEL, device=DEVICE)) for _ in range(2))
        optimizer, reference = FrozenAwareSGD([p], **MOMENTUM), Reference([q], **MOMENTUM)
        for _ in range(20):
            value = float(torch.randn((), generator=gen))
            p.grad = torch.full_like(p, value)
            optimizer.step()
            p.grad = None
            garbage = torch.full_like(p, math.nan)  # lies where the gradient lay
            del garbage
            q.grad = torch.full_like(q, value)
            reference.step()
        cases.assert_same_bits(p, q, "after 20 steps")

    def test_step_on_a_side_stream_with_gradients_of_the_main_one(self) -> None:
        p, q = (nn.Parameter(torch.zeros(self.NUMEL, device=DEVICE)) for _ in range(2))
        optimizer, reference = FrozenAwareSGD([p], **MOMENTUM), Reference([q], **MOMENTUM)
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        for step in range(20):
            p.grad = torch.full_like(p, float(step))
            side.wait_stream(main)
            with torch.cuda.stream(side):
                optimizer.step()
                optimizer.zero_grad()
            main.wait_stream(side)
            garbage = [torch.full_like(p, math.nan) for _ in range(4)]
            del garbage
            q.grad = torch.full_like(q, float(step))
            reference.step()
        torch.cuda.synchronize()
        cases.assert_same_bits(p, q, "after 20 steps")

    def test_the_step_waits_for_work_queued_on_its_stream(self) -> None:
        p = nn.Parameter(torch.zeros(1000, device=DEVICE))
        p.grad = torch.zeros_like(p)
        optimizer = FrozenAwareSGD([p], lr=1.0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            p.grad.fill_(1.0)
            optimizer.step()
        side.synchronize()
        assert torch.equal(p.detach(), torch.full_like(p, -1.0))


class TestDevices:
    @pytest.fixture(autouse=True)
    def two_devices(self) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip(f"needs two GPUs; there are {torch.cuda.device_count()}")

    def test_several_devices_in_one_optimizer(self) -> None:
        gen = cases.generator(19)
        devices = ("cuda:1", "cpu", "cuda:0")
        ours = [p for d in devices for p in cases.make_parameters(SIZES, gen, device=d)]
        theirs = cases.twin(ours)
        optimizer, reference = FrozenAwareSGD(ours, **MOMENTUM), Reference(theirs, **MOMENTUM)
        for _ in range(3):
            cases.set_grads(ours, theirs, gen)
            optimizer.step()
            reference.step()
        cases.assert_same_training(optimizer, reference)
        assert torch.cuda.current_device() == 0

    def test_each_device_uses_its_own_current_stream(self) -> None:
        p = nn.Parameter(torch.zeros(1000, device="cuda:1"))
        p.grad = torch.zeros_like(p)
        optimizer = FrozenAwareSGD([p], lr=1.0)
        side = torch.cuda.Stream("cuda:1")
        side.wait_stream(torch.cuda.current_stream("cuda:1"))
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            p.grad.fill_(1.0)
            with torch.cuda.device(0):
                optimizer.step()
        side.synchronize()
        assert torch.equal(p.detach(), torch.full_like(p, -1.0))

    @pytest.mark.parametrize("lr_dtype", cases.ids(cases.WIDE_DTYPES))
    def test_a_learning_rate_on_another_device(self, lr_dtype: torch.dtype) -> None:
        gen = cases.generator(23)
        ours = cases.make_parameters(SIZES, gen, device="cuda:1")
        theirs = cases.twin(ours)
        lr = torch.tensor(0.25, dtype=lr_dtype, device="cuda:0")
        optimizer = FrozenAwareSGD(ours, **(MOMENTUM | {"lr": lr}))
        reference = Reference(theirs, **(MOMENTUM | {"lr": 0.25}))
        for _ in range(3):
            cases.set_grads(ours, theirs, gen)
            optimizer.step()
            reference.step()
        torch.cuda.synchronize("cuda:1")
        for p, q in zip(ours, theirs, strict=True):
            cases.assert_same_bits(p, q, "parameter")


@pytest.mark.parametrize("number", cases.ids(cases.ODD_NUMBERS))
def test_a_learning_rate_whose_bytes_are_not_its_value(
    number: Callable[[float, str], Tensor],
) -> None:
    optimizer, reference, gen = pair()
    for step in range(3):
        optimizer.param_groups[0]["lr"] = number(0.5**step / 4, DEVICE)
        reference.param_groups[0]["lr"] = 0.5**step / 4
        cases.set_grads(params_of(optimizer), params_of(reference), gen)
        optimizer.step()
        reference.step()
    for p, q in zip(params_of(optimizer), params_of(reference), strict=True):
        cases.assert_same_bits(p, q, "parameter")


class TestInBackward:
    def train(self, use_side_stream: bool = False, **options: Any) -> tuple[nn.Module, int]:
        """The model, and the most bytes that backward held above what it found."""
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)]).to(DEVICE)
        optimizer = FrozenAwareSGD(model.parameters(), **(MOMENTUM | options))
        side = torch.cuda.Stream() if use_side_stream else torch.cuda.current_stream()
        gen = cases.generator(1)
        peak = 0
        for step in range(4):
            model[step].requires_grad_(step % 2 == 1)
            optimizer.zero_grad()
            x = torch.randn(16, 512, generator=gen).to(DEVICE)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                loss = model(x).square().mean()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            loss.backward()
            if step > 0:  # the first makes momentum buffers
                peak = max(peak, torch.cuda.max_memory_allocated() - before)
            optimizer.step()
        return model, peak

    @pytest.mark.parametrize("side", [False, True], ids=["one stream", "forward on another stream"])
    @pytest.mark.parametrize("bucket_mb", [None, 0, 1, 100])
    def test_equals_the_ordinary_step(self, bucket_mb: float | None, side: bool) -> None:
        ordinary, _ = self.train(side)
        model, _ = self.train(side, step_in_backward=True, bucket_mb=bucket_mb)
        for p, q in zip(model.parameters(), ordinary.parameters(), strict=True):
            cases.assert_same_bits(p, q, "parameter")

    def test_holds_a_bucket_and_the_largest_gradient(self) -> None:
        """1 MiB each; the activations that backward makes are a few of 32 KiB."""
        _, all_at_once = self.train()
        _, one_by_one = self.train(step_in_backward=True, bucket_mb=1)
        assert all_at_once > 6 << 20 and one_by_one < 3 << 20

    def test_backward_does_not_wait(self) -> None:
        model = nn.Linear(64, 64).to(DEVICE)
        optimizer = FrozenAwareSGD(model.parameters(), **MOMENTUM, step_in_backward=True)
        x = torch.ones(4, 64, device=DEVICE)
        for _ in range(2):
            model(x).sum().backward()
            optimizer.step()
        with no_sync():
            model(x).sum().backward()
            optimizer.step()

    @pytest.mark.parametrize("clip_value", [None, 1e-4])
    @pytest.mark.parametrize("bucket_mb", [0, 0.006, 0.02, None])
    def test_gradients_of_one_bucket_come_from_two_streams(
        self, bucket_mb: float | None, clip_value: float | None
    ) -> None:
        def train(**options: Any) -> nn.Module:
            torch.manual_seed(0)
            branches = [nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)]) for _ in range(2)]
            model = nn.ModuleList(branches).to(DEVICE)
            optimizer = FrozenAwareSGD(model.parameters(), **MOMENTUM, **options)
            streams = [torch.cuda.Stream() for _ in branches]
            main = torch.cuda.current_stream()
            gen = cases.generator(5)
            for _ in range(6):
                x = torch.randn(8, 32, generator=gen).to(DEVICE)
                outputs = [x, x]
                for stream in streams:
                    stream.wait_stream(main)
                    x.record_stream(stream)
                # Layer by layer, so that backward takes turns too: one goes on while one applies.
                for layer in range(4):
                    for i, stream in enumerate(streams):
                        with torch.cuda.stream(stream):
                            outputs[i] = branches[i][layer](outputs[i])
                for output, stream in zip(outputs, streams, strict=True):
                    main.wait_stream(stream)
                    output.record_stream(main)
                loss = (outputs[0] * outputs[1]).mean()
                del outputs, output
                loss.backward()
                if clip_value is not None and not options:
                    nn.utils.clip_grad_value_(model.parameters(), clip_value)
                optimizer.step()
                optimizer.zero_grad()
            return model

        ordinary = train()
        model = train(step_in_backward=True, bucket_mb=bucket_mb, clip_value=clip_value)
        for p, q in zip(model.parameters(), ordinary.parameters(), strict=True):
            cases.assert_same_bits(p, q, "parameter")

    @pytest.mark.parametrize("foreach", [None, True, False])
    def test_what_backward_has_left_cannot_be_clipped(self, foreach: bool | None) -> None:
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(DEVICE)
        optimizer = FrozenAwareSGD(model.parameters(), **MOMENTUM, step_in_backward=True)
        model(torch.ones(4, 64, device=DEVICE)).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3, foreach=foreach)
        with pytest.raises(RuntimeError, match=r"changed .*no clip_grad_norm_"):
            optimizer.step()


class TestNarrowMomentum:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_equals_the_cpu(self, dtype: torch.dtype) -> None:
        """The random bits are the same; arithmetic differs only where the CPU has no fused fma."""
        made = []
        for device in ("cpu", DEVICE):
            gen = cases.generator(3)
            params = cases.make_parameters(SIZES, gen, dtype, device)
            optimizer = FrozenAwareSGD(params, **MOMENTUM, momentum_dtype=torch.bfloat16)
            for _ in range(3):
                for p in params:
                    p.grad = cases.randn(p.shape, gen, dtype, device)
                optimizer.step()
            made.append((params, [optimizer.state[p]["momentum_buffer"] for p in params]))
        for on_cpu, on_gpu in zip(*(params + buffers for params, buffers in made), strict=True):
            cases.assert_same_bits(on_gpu.cpu(), on_cpu, "parameter or momentum")

    def test_it_is_not_captured(self) -> None:
        params = cases.make_parameters(SIZES, cases.generator(3), device=DEVICE)
        optimizer = FrozenAwareSGD(params, **MOMENTUM, momentum_dtype=torch.bfloat16)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        with (
            pytest.raises(RuntimeError, match="same random bits"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            optimizer.step()


def _first_weight_trained_on(device: str) -> float:
    p = nn.Parameter(torch.ones(3, device=device))
    optimizer = FrozenAwareSGD([p], lr=0.25)
    p.sum().backward()
    optimizer.step()
    return p[0].item()


@pytest.mark.parametrize("device", ["cpu", DEVICE])
def test_children_train_after_this_process_has(device: str) -> None:
    """Tests that might crash rely on it: see helpers/apart.py."""
    assert _first_weight_trained_on(DEVICE) == 0.75
    assert apart.run(_first_weight_trained_on, device) == 0.75
