"""What a step on a GPU asks of the CUDA runtime, from the simulated one's log: make test-cuda.

A profiler shows kernels; only the runtime sees waits, allocations, contexts and the streams that
work goes to.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import cuda_on_cpu
from tests.cuda_on_cpu import Record
from tests.helpers import optim_cases as cases
from tests.helpers.optim_cases import FrozenAwareSGD, Hyper, Reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not cuda_on_cpu.is_running(), reason="asks the simulated CUDA runtime: make test-cuda"
    ),
]
HYPER: Hyper = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}
SIZES = (1, 127, 128, 129, 1000, 4099)


def waits(records: list[Record]) -> list[Record]:
    """The host's waits for the device."""
    return [r for r in records if r.kind == "sync" or (r.kind == "copy" and r.name.endswith("2H"))]


def launches(records: list[Record]) -> list[Record]:
    return [r for r in records if r.kind == "launch"]


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def warm_pair(
    device: str = "cuda", dtype: torch.dtype = torch.float32, **hyper: Any
) -> tuple[FrozenAwareSGD, Reference, torch.Generator]:
    """FrozenAwareSGD and the oracle over the same tensors, after two steps."""
    gen = cases.generator(7)
    ours = cases.make_parameters(SIZES, gen, dtype, device)
    theirs = cases.twin(ours)
    optimizer = FrozenAwareSGD(ours, **(HYPER | hyper))
    reference = Reference(theirs, **(HYPER | hyper))
    for _ in range(2):
        cases.set_grads(ours, theirs, gen)
        optimizer.step()
        reference.step()
    return optimizer, reference, gen


def with_grad(*shape: int, device: str = "cuda") -> nn.Parameter:
    """A parameter of ones whose gradient is ones."""
    p = nn.Parameter(torch.ones(*shape, device=device))
    p.grad = torch.ones_like(p)
    return p


def perceptrons(count: int = 2) -> list[nn.Module]:
    """Models that are alike."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8)).cuda()
    return [first, *(copy.deepcopy(first) for _ in range(count - 1))]


def assert_same_parameters(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        cases.assert_same_bits(p, q, "parameter")


def log_of_process(code: str) -> list[Record]:
    """What a fresh process that runs `code` asks the runtime for."""
    code += "\nfrom tests import cuda_on_cpu\nprint([tuple(r) for r in cuda_on_cpu.take_log()])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Record(*fields) for fields in eval(done.stdout)]


class TestSteadyStep:
    @pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
    @pytest.mark.parametrize("dtype", cases.ids(cases.DTYPES))
    def test_is_one_launch_and_nothing_else(self, dtype: torch.dtype, scaled: bool) -> None:
        optimizer, _, _ = warm_pair(dtype=dtype)
        if scaled:
            optimizer.grad_scale = torch.tensor(4.0, device="cuda")  # type: ignore[attr-defined]
            optimizer.found_inf = torch.tensor(0.0, device="cuda")  # type: ignore[attr-defined]
        allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
        assert [r.kind for r in cuda_on_cpu.log_of(optimizer.step)] == ["launch"]
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated

    def test_is_one_launch_per_dtype_for_many_groups(self) -> None:
        gen = cases.generator(1)
        dtypes = (torch.float32, torch.bfloat16, torch.float64)
        groups = [
            {"params": cases.make_parameters((3, 300), gen, dtype, "cuda"), "lr": 0.1 / (1 + i)}
            for i in range(50)
            for dtype in dtypes
        ]
        optimizer = FrozenAwareSGD(groups, **HYPER)
        for p in params_of(optimizer):
            p.grad = torch.ones_like(p)
        optimizer.step()
        records = cuda_on_cpu.log_of(optimizer.step)
        assert [r.kind for r in records] == ["launch"] * len(dtypes)

    @pytest.mark.parametrize("count", [1, 20, 21, 160, 200, 950, 1100, 2500])
    def test_of_every_size_of_table(self, count: int) -> None:
        gen = cases.generator(1)
        ours = cases.make_parameters([3] * count, gen, device="cuda")
        theirs = cases.twin(ours)
        optimizer, reference = FrozenAwareSGD(ours, **HYPER), Reference(theirs, **HYPER)
        for _ in range(2):
            cases.set_grads(ours, theirs, gen)
            records = cuda_on_cpu.log_of(optimizer.step)
            reference.step()
        cases.assert_same_training(optimizer, reference)
        # A table is as large as it need be, and what does not fit into one goes into several.
        assert {r.bytes for r in launches(records)} <= {1024, 8192, 32760}
        assert len(launches(records)) == -(-count // 1000)

    @pytest.mark.parametrize("of_the_first", [1, 2], ids="the first of {}".format)
    def test_of_groups_that_fill_several_tables(self, of_the_first: int) -> None:
        """One tensor more at the front, and the last room of a table is too small for a group."""
        groups = [
            {"params": [with_grad(3) for _ in range(of_the_first if i == 0 else 1)], "lr": i / 4096}
            for i in range(1200)
        ]
        optimizer = FrozenAwareSGD(groups)
        assert len(launches(cuda_on_cpu.log_of(optimizer.step))) == 3
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert torch.equal(p, torch.full_like(p, 1 - group["lr"])), group["lr"]

    @pytest.mark.parametrize("dtype", cases.ids(cases.NARROW_DTYPES))
    def test_with_gradients_of_another_dtype(self, dtype: torch.dtype) -> None:
        p = nn.Parameter(torch.randn(5000, device="cuda"))
        q = nn.Parameter(p.detach().clone())
        p.grad_dtype = dtype  # type: ignore[attr-defined]
        p.grad = torch.randn(5000, device="cuda", dtype=dtype)
        q.grad = p.grad.float()
        ours, theirs = FrozenAwareSGD([p], **HYPER), FrozenAwareSGD([q], **HYPER)
        for _ in range(3):
            records = cuda_on_cpu.log_of(ours.step)
            theirs.step()
        assert [r.kind for r in records] == ["launch"]
        cases.assert_same_bits(p, q, "parameter")

    def test_after_loading_a_checkpoint_of_the_cpu(self) -> None:
        on_cpu, on_gpu = with_grad(700, device="cpu"), with_grad(700)
        a, b = FrozenAwareSGD([on_cpu], **HYPER), FrozenAwareSGD([on_gpu], **HYPER)
        a.step()
        b.load_state_dict(a.state_dict())
        on_gpu.data.copy_(on_cpu.data)
        a.step()
        assert [r.kind for r in cuda_on_cpu.log_of(b.step)] == ["launch"]
        torch.testing.assert_close(on_gpu.cpu(), on_cpu)

    @pytest.mark.parametrize("momentum_dtype", [None, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("policy", ["keep", "reset", "drop"])
    def test_does_not_wait_whatever_is_frozen(
        self, policy: Any, momentum_dtype: torch.dtype | None
    ) -> None:
        params = [with_grad(300, device=f"cuda:{i % 2}") for i in range(6)]
        optimizer = FrozenAwareSGD(
            params, **HYPER, frozen_momentum=policy, momentum_dtype=momentum_dtype
        )
        for step in range(6):
            for i, p in enumerate(params):
                p.requires_grad_((step + i) % 3 != 0)
                p.grad = torch.ones_like(p)
            records = cuda_on_cpu.log_of(optimizer.step)
            assert not waits(records)
            assert len(launches(records)) == 2

    def test_of_gradients_of_another_layout_keeps_every_copy(self) -> None:
        """A copy that is freed too early has the address of the next one."""
        params = [with_grad(40, 30) for _ in range(3)]
        for i, p in enumerate(params):
            p.grad = torch.full((30, 40), float(i), device="cuda").t()
        assert len(launches(cuda_on_cpu.log_of(FrozenAwareSGD(params, lr=1.0).step))) == 1
        for i, p in enumerate(params):
            assert torch.equal(p, torch.full_like(p, 1.0 - i))

    def test_of_shared_memory_goes_in_order(self) -> None:
        base = torch.zeros(100, device="cuda")
        params = [nn.Parameter(base[:60]), nn.Parameter(base[40:])]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = FrozenAwareSGD(params, lr=1.0)
        assert len(launches(cuda_on_cpu.log_of(optimizer.step))) == 2
        assert base[50] == -2


def test_no_access_lies_outside_its_allocation() -> None:
    """compute-sanitizer's cases: without torch's allocator every tensor is an allocation."""
    script = Path(__file__).parents[2] / "benchmarks" / "sanitize.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0 and "all cases ran" in done.stdout, done.stderr


class TestContexts:
    """A context costs memory and start-up, and forked children can no longer use CUDA."""

    def test_a_step_on_the_cpu_makes_none(self) -> None:
        records = log_of_process(
            "import torch, torch_freeze\n"
            "for scaled in (False, True):\n"
            "    for options in ({}, {'momentum_dtype': torch.bfloat16}):\n"
            "        p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
            "        sgd = torch_freeze.FrozenAwareSGD([p], lr=0.1, momentum=0.9, **options)\n"
            "        if scaled:\n"
            "            sgd.grad_scale = torch.ones(()); sgd.found_inf = torch.zeros(())\n"
            "        sgd.step()\n"
            "        assert p in sgd.state and not p.eq(1).any(), (scaled, options)\n"
        )
        assert records == []

    def test_a_step_on_one_device_makes_none_on_another(self) -> None:
        records = log_of_process(
            "import torch, torch_freeze\n"
            "p = torch.nn.Parameter(torch.ones(3, device='cuda:1')); p.grad = torch.ones_like(p)\n"
            "torch_freeze.FrozenAwareSGD([p], lr=0.1, momentum=0.9).step()\n"
        )
        assert {r.device for r in records if r.kind == "context"} == {1}


class TestGraphs:
    def test_missing_momentum_is_refused_whichever_device_is_current(self) -> None:
        optimizer = FrozenAwareSGD([with_grad(300, device="cuda:1")], **HYPER)
        with torch.cuda.device(1):
            graph = torch.cuda.CUDAGraph()
            own = torch.cuda.Stream(1)  # the default one keeps the device it was made on
            with (
                pytest.raises(RuntimeError, match="captured"),
                torch.cuda.graph(graph, stream=own),
                torch.cuda.device(0),
            ):
                optimizer.step()

    @pytest.mark.parametrize("options", [{}, {"momentum_dtype": torch.bfloat16}], ids=str)
    def test_a_first_scaled_step_says_why_not(self, options: dict[str, Any]) -> None:
        optimizer = FrozenAwareSGD([with_grad(300)], **HYPER, **options)
        optimizer.grad_scale = torch.ones((), device="cuda")  # type: ignore[attr-defined]
        optimizer.found_inf = torch.zeros((), device="cuda")  # type: ignore[attr-defined]
        with (
            pytest.raises(RuntimeError, match=r"FrozenAwareSGD\.step while a CUDA graph"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            optimizer.step()

    def test_a_first_step_in_backward_says_why_not(self) -> None:
        model = nn.Linear(8, 8).cuda()
        optimizer = FrozenAwareSGD(model.parameters(), **HYPER, step_in_backward=True, bucket_mb=0)
        x = torch.ones(4, 8, device="cuda")
        with (
            pytest.raises(RuntimeError, match="captured"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            model(x).sum().backward()
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()

    def test_a_first_step_on_the_cpu_is_allowed(self) -> None:
        p = with_grad(300, device="cpu")
        optimizer = FrozenAwareSGD([p], **HYPER)
        x = torch.ones(3, device="cuda")
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.add_(1)
            optimizer.step()
        assert p in optimizer.state

    def test_replay_follows_the_scaler(self) -> None:
        optimizer, reference, gen = warm_pair()
        scale = torch.tensor(4.0, device="cuda")
        found_inf = torch.tensor(0.0, device="cuda")
        optimizer.grad_scale, optimizer.found_inf = scale, found_inf  # type: ignore[attr-defined]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        theirs = params_of(reference)
        for step in range(4):
            cases.set_grads(theirs, theirs, gen)
            for p, q in zip(params_of(optimizer), theirs, strict=True):
                assert p.grad is not None and q.grad is not None
                p.grad.copy_(q.grad * 4)
            found_inf.fill_(float(step == 2))
            graph.replay()
            if step != 2:
                reference.step()
        cases.assert_same_training(optimizer, reference)

    @pytest.mark.parametrize("layout", ["transposed", "expanded"])
    def test_gradients_of_another_layout(self, layout: str) -> None:
        p = with_grad(40, 30)
        q = nn.Parameter(p.detach().clone())
        q.grad = torch.ones_like(q)
        optimizer, reference = FrozenAwareSGD([p], **HYPER), Reference([q], **HYPER)
        optimizer.step()
        reference.step()
        p.grad = q.grad = (
            torch.randn(30, 40, device="cuda").t()
            if layout == "transposed"
            else torch.randn(30, device="cuda").expand(40, 30)
        )
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        for _ in range(3):
            graph.replay()
            # Memory that the capture used must not be given to others.
            garbage = [torch.full((40, 30), torch.nan, device="cuda") for _ in range(4)]
            del garbage
            reference.step()
        cases.assert_same_bits(p, q, layout)

    @pytest.mark.parametrize("bucket_mb", [0, None])
    def test_whole_iteration_with_the_step_in_backward(self, bucket_mb: float | None) -> None:
        model, eager = perceptrons()
        optimizer = FrozenAwareSGD(
            model.parameters(), **HYPER, step_in_backward=True, bucket_mb=bucket_mb
        )
        reference = FrozenAwareSGD(eager.parameters(), **HYPER)
        x = torch.randn(16, 32, device="cuda")

        def iterate(net: nn.Module, opt: torch.optim.Optimizer) -> None:
            opt.zero_grad()
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
        optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(x).square().mean().backward()
            optimizer.step()
        for _ in range(5):
            x.normal_()
            graph.replay()
            iterate(eager, reference)
        for p, q in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(p, q)


class TestDevices:
    def test_a_launch_goes_to_the_current_stream_of_its_device(self) -> None:
        optimizer = FrozenAwareSGD([with_grad(3000, device=f"cuda:{i}") for i in (0, 1)], **HYPER)
        optimizer.step()
        sides = [torch.cuda.Stream(f"cuda:{i}") for i in (0, 1)]
        for i in (0, 1):
            torch.cuda.synchronize(i)
        with torch.cuda.stream(sides[0]), torch.cuda.stream(sides[1]):
            records = cuda_on_cpu.log_of(optimizer.step)
        assert {(r.device, r.stream) for r in launches(records)} == {
            (i, side.cuda_stream) for i, side in enumerate(sides)
        }
        with torch.cuda.device(1):
            records = cuda_on_cpu.log_of(optimizer.step)
            assert torch.cuda.current_device() == 1
        assert {(r.device, r.stream) for r in records} == {(0, 0), (1, 0)}

    def test_a_scaler_of_one_device_does_for_all(self) -> None:
        params = [nn.Parameter(torch.ones(300, device=f"cuda:{i}")) for i in (0, 1)]
        optimizer = FrozenAwareSGD(params, lr=1.0)
        scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
        for step in range(4):
            loss = params[0].sum() + params[1].sum().to("cuda:0")
            scaler.scale(loss).backward()
            if step == 2:
                assert params[1].grad is not None
                params[1].grad[7] = torch.inf
            records = cuda_on_cpu.log_of(lambda: scaler.step(optimizer))
            assert not waits(records)
            scaler.update()
            optimizer.zero_grad()
        for p in params:
            assert torch.equal(p.detach(), torch.full_like(p, -2.0))

    def test_threads_step_on_devices_of_their_own(self) -> None:
        errors: list[BaseException] = []

        def train(device: str) -> None:
            try:
                optimizer, reference, gen = warm_pair(device)
                for _ in range(10):
                    cases.set_grads(params_of(optimizer), params_of(reference), gen)
                    optimizer.step()
                    reference.step()
                cases.assert_same_training(optimizer, reference)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=train, args=(f"cuda:{i}",)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors


class TestInBackward:
    @pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor on the device"])
    def test_a_steady_iteration_does_not_wait(self, lr: Any) -> None:
        model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)]).cuda()
        lr = lr.cuda() if isinstance(lr, Tensor) else lr
        optimizer = FrozenAwareSGD(
            model.parameters(), **(HYPER | {"lr": lr}), step_in_backward=True
        )
        x = torch.ones(4, 64, device="cuda")
        for _ in range(3):
            loss = model(x).sum()
            cuda_on_cpu.take_log()
            loss.backward()
            optimizer.step()
            records = cuda_on_cpu.take_log()
            if isinstance(lr, Tensor):
                lr.mul_(0.5)
        assert not waits(records)

    def test_a_flush_makes_no_fill_and_no_allocation(self) -> None:
        """The placeholders of the gradients that are gone after a flush are made once."""
        asked_for = []
        for options in ({}, {"step_in_backward": True, "bucket_mb": 0}):
            torch.manual_seed(0)
            model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)]).cuda()
            optimizer = FrozenAwareSGD(model.parameters(), **HYPER, **options)
            x = torch.ones(4, 64, device="cuda")
            for _ in range(3):
                loss = model(x).sum()
                before = torch.cuda.memory_stats()["allocation.all.allocated"]
                cuda_on_cpu.take_log()
                loss.backward()
                optimizer.step()
                records = cuda_on_cpu.take_log()
                allocated = torch.cuda.memory_stats()["allocation.all.allocated"] - before
                optimizer.zero_grad()
                del loss
            work = Counter(r.name for r in records if r.kind in ("op", "fill", "copy", "malloc"))
            asked_for.append((work, allocated))
        assert asked_for[0] == asked_for[1]
        assert len(launches(records)) > 1

    def test_what_stands_for_gradients_is_nan_again_after_a_write(self) -> None:
        model = nn.Linear(8, 8, bias=False).cuda()
        optimizer = FrozenAwareSGD(model.parameters(), **HYPER, step_in_backward=True, bucket_mb=0)
        x = torch.ones(4, 8, device="cuda")
        for _ in range(3):
            model(x).sum().backward()
            assert model.weight.grad is not None
            assert model.weight.grad.shape == (8, 8)
            assert torch.isnan(model.weight.grad).all()
            model.weight.grad.view(-1)[0].zero_()
            with pytest.raises(RuntimeError, match="changed"):
                optimizer.step()
            optimizer.zero_grad()

    def test_what_stands_for_gradients_is_nan_after_a_capture(self) -> None:
        """What is made in a capture holds nothing until the graph is replayed."""
        model = nn.Linear(8, 8, bias=False).cuda()
        optimizer = FrozenAwareSGD(model.parameters(), lr=0.1, step_in_backward=True, bucket_mb=0)
        x = torch.ones(4, 8, device="cuda")
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            model(x).sum().backward()
            optimizer.step()
        model(x).sum().backward()
        assert model.weight.grad is not None
        assert torch.isnan(model.weight.grad).all()
        optimizer.step()

    @pytest.mark.parametrize("bucket_mb", [0, 0.01, None])
    def test_a_model_on_two_devices_and_streams(self, bucket_mb: float | None) -> None:
        class Halves(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Linear(32, 32).to("cuda:0")
                self.second = nn.Linear(32, 32).to("cuda:1")
                self.head = nn.Linear(32, 4)

            def forward(self, x: Tensor) -> Any:
                x = self.first(x.to("cuda:0")).tanh()
                return self.head(self.second(x.to("cuda:1")).tanh().cpu())

        torch.manual_seed(0)
        model = Halves()
        twin = copy.deepcopy(model)
        ours = FrozenAwareSGD(
            model.parameters(), **HYPER, step_in_backward=True, bucket_mb=bucket_mb
        )
        theirs = FrozenAwareSGD(twin.parameters(), **HYPER)
        sides = [torch.cuda.Stream(f"cuda:{i}") for i in (0, 1)]
        for _ in range(6):
            x = torch.randn(8, 32)
            for i, side in enumerate(sides):
                side.wait_stream(torch.cuda.current_stream(i))
            with torch.cuda.stream(sides[0]), torch.cuda.stream(sides[1]):
                loss = model(x).square().sum()
            for i, side in enumerate(sides):
                torch.cuda.current_stream(i).wait_stream(side)
            loss.backward()
            ours.step()
            twin(x).square().sum().backward()
            theirs.step()
            theirs.zero_grad()
        assert_same_parameters(model, twin)

    def test_clip_value(self) -> None:
        model, twin = perceptrons()
        ours = FrozenAwareSGD(model.parameters(), **HYPER, step_in_backward=True, clip_value=0.01)
        theirs = FrozenAwareSGD(twin.parameters(), **HYPER)
        for _ in range(4):
            x = torch.randn(8, 32, device="cuda")
            model(x).square().sum().backward()
            ours.step()
            twin(x).square().sum().backward()
            nn.utils.clip_grad_value_(twin.parameters(), 0.01)
            theirs.step()
            theirs.zero_grad()
        assert_same_parameters(model, twin)


def test_out_of_memory_changes_nothing() -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    small = with_grad(10)
    large = nn.Parameter(torch.empty(int(free * 0.4) // 4, device="cuda"))
    large.grad = torch.empty_like(large)
    optimizer = FrozenAwareSGD([small, large], **HYPER)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert len(optimizer.state) == 0
    assert torch.equal(small, torch.ones_like(small)) and small.grad is not None
    large.grad = None
    optimizer.step()
    assert list(optimizer.state) == [small]
    del large, optimizer
    torch.cuda.empty_cache()


def test_a_compiled_model_follows_the_frozen_set() -> None:
    model, twin = perceptrons()
    compiled = torch.compile(model, backend="aot_eager")
    ours = FrozenAwareSGD(model.parameters(), **HYPER)
    theirs = FrozenAwareSGD(twin.parameters(), **HYPER)
    networks: list[tuple[Callable[[Tensor], Tensor], FrozenAwareSGD]]
    networks = [(compiled, ours), (twin, theirs)]
    for step in range(4):
        for module in (model, twin):
            module[0].requires_grad_(step % 2 == 0)  # type: ignore[index]
        x = torch.randn(8, 32, device="cuda")
        for network, optimizer in networks:
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()
    assert_same_parameters(model, twin)


def test_a_network_trains_with_amp_and_freezing() -> None:
    """Convolutions in channels_last, batch norm, float16: stock's results, in one launch."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    model = model.cuda().to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    ours = FrozenAwareSGD(model.parameters(), **HYPER)
    theirs = torch.optim.SGD(twin.parameters(), **HYPER, foreach=True)
    networks = [(model, ours), (twin, theirs)]
    scalers = [torch.amp.GradScaler("cuda", init_scale=2.0**8) for _ in networks]
    for step in range(4):
        x = torch.randn(4, 3, 16, 16, device="cuda")
        y = torch.randint(10, (4,), device="cuda")
        for (network, optimizer), scaler in zip(networks, scalers, strict=True):
            optimizer.zero_grad()
            network[0].requires_grad_(step >= 2)
            with torch.autocast("cuda", torch.float16):
                loss = nn.functional.cross_entropy(network(x), y)
            scaler.scale(loss).backward()
            records = cuda_on_cpu.log_of(lambda: scaler.step(optimizer))  # noqa: B023
            scaler.update()
            if optimizer is ours:
                assert len(launches(records)) == 1
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
