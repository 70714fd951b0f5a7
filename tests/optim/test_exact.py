"""fp32 and fp64: stock's for-loop, bit for bit. bf16 and fp16: fp32 arithmetic, rounded once."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.helpers import optim_cases as cases
from tests.helpers.optim_cases import FrozenAwareSGD, Hyper

try:
    import numpy as np
except ImportError:
    np = None


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("dtype", cases.ids(cases.WIDE_DTYPES))
@pytest.mark.parametrize(("family", "hyper"), cases.per_family(lambda family: family.hypers))
def test_equals_stock_bit_for_bit(
    family: cases.Family, hyper: Hyper, dtype: torch.dtype, device: str
) -> None:
    if device == "cuda" and not family.exact_on_cuda:
        pytest.skip("rounds otherwise than stock's foreach form")
    cases.check_hyper(hyper, dtype, device, family=family)


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("dtype", cases.ids(cases.NARROW_DTYPES))
@pytest.mark.parametrize("hyper", cases.ids(cases.HYPERS))
def test_equals_fp32_arithmetic_rounded_once(hyper: Hyper, dtype: torch.dtype, device: str) -> None:
    cases.check_hyper(hyper, dtype, device, steps=10, stock=False)


@pytest.mark.parametrize("dtype", cases.ids(cases.DTYPES))
@pytest.mark.parametrize("threads", [1, 2, 4], ids="{} threads".format)
@pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
def test_any_thread_count_gives_the_same_bits(
    hyper: Hyper, threads: int, dtype: torch.dtype
) -> None:
    with cases.threads(threads):
        cases.check_hyper(
            hyper,
            dtype,
            steps=4,
            sizes=(1, 300_007, 3, 65_537, 17),
            stock=dtype in cases.WIDE_DTYPES.values(),
        )


@pytest.mark.parametrize("dtype", cases.ids(cases.DTYPES))
@pytest.mark.parametrize("groups", [2, 3, 17], ids="{} groups".format)
@pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
def test_several_groups(hyper: Hyper, groups: int, dtype: torch.dtype) -> None:
    cases.check_hyper(
        hyper, dtype, steps=4, groups=groups, stock=dtype in cases.WIDE_DTYPES.values()
    )


@pytest.mark.parametrize("device", cases.DEVICES)
def test_groups_of_different_dtype_and_hyper_parameters(device: str) -> None:
    gen = cases.generator(0)
    ours, theirs = [], []
    for index, (hyper, dtype) in enumerate(
        (hyper, dtype) for hyper in cases.HYPERS.values() for dtype in cases.DTYPES.values()
    ):
        params = cases.make_parameters((index % 37, 5), gen, dtype, device)
        ours.append({"params": params} | hyper)
        theirs.append({"params": cases.twin(params)} | hyper)
    optimizer, reference = FrozenAwareSGD(ours), cases.Reference(theirs)
    pairs = [
        (p, q)
        for a, b in zip(ours, theirs, strict=True)
        for p, q in zip(a["params"], b["params"], strict=True)
    ]
    for step in range(5):
        cases.set_grads([p for p, _ in pairs], [q for _, q in pairs], gen)
        optimizer.step()
        reference.step()
        cases.assert_same_training(optimizer, reference, f"after step {step + 1}:")


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
def test_one_group_may_mix_dtypes(hyper: Hyper, device: str) -> None:
    gen = cases.generator(0)
    ours = [
        p
        for size in (5, 129, 1000)
        for dtype in cases.DTYPES.values()
        for p in cases.make_parameters((size,), gen, dtype, device)
    ]
    theirs = cases.twin(ours)
    optimizer, reference = FrozenAwareSGD(ours, **hyper), cases.Reference(theirs, **hyper)
    for step in range(5):
        cases.set_grads(ours, theirs, gen)
        optimizer.step()
        reference.step()
        cases.assert_same_training(optimizer, reference, f"after step {step + 1}:")


@pytest.mark.parametrize("count", [1, 161, 2500], ids="{} tensors".format)
def test_many_tensors(count: int) -> None:
    cases.check_hyper(
        cases.SOME_HYPERS["momentum, dampening and decay"],
        torch.float32,
        steps=3,
        sizes=[i % 5 for i in range(count)],
    )


SPECIAL_VALUES = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    math.inf,
    -math.inf,
    math.nan,
    1e-45,
    -1e-45,
    1.1754942e-38,
    3.4028235e38,
    -3.4028235e38,
)


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("dtype", cases.ids(cases.WIDE_DTYPES))
@pytest.mark.parametrize("hyper", cases.ids(cases.HYPERS))
def test_zeros_infinities_nans_and_denormals(hyper: Hyper, dtype: torch.dtype, device: str) -> None:
    """A formula that multiplies by a decay or momentum of 0 turns inf into NaN; stock skips it.

    All pairs of special parameter and special gradient; NaNs may differ in sign and payload.
    """
    values = torch.tensor(SPECIAL_VALUES, dtype=dtype, device=device)
    start = values.repeat_interleave(len(values))
    grad = values.repeat(len(values))
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer = FrozenAwareSGD([p], **hyper)
    reference = torch.optim.SGD([q], **hyper, foreach=device == "cuda")
    for _ in range(3):
        p.grad, q.grad = grad.clone(), grad.clone()
        optimizer.step()
        reference.step()
        got, wanted = [p], [q]
        if hyper["momentum"]:
            got.append(cases.buffer_of(optimizer, p))
            wanted.append(cases.buffer_of(reference, q))
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            cases.assert_same_bits(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0), "special values")


def _exact_sgd(hyper: Hyper, p: Any, g: Any, b: Any) -> tuple[Any, Any]:
    """One step in fp64, as the docstring of torch.optim.SGD states it."""
    d = -g if hyper.get("maximize") else g
    d = d + hyper.get("weight_decay", 0) * p
    momentum = hyper.get("momentum", 0)
    if momentum:
        b = d if b is None else momentum * b + (1 - hyper.get("dampening", 0)) * d
        d = d + momentum * b if hyper.get("nesterov") else b
    return p - hyper["lr"] * d, b


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("dtype", cases.ids(cases.NARROW_DTYPES))
@pytest.mark.parametrize("hyper", cases.ids(cases.HYPERS))
def test_narrow_error_is_never_above_stocks(hyper: Hyper, dtype: torch.dtype, device: str) -> None:
    """Each step starts from the same narrow numbers, so that only its own rounding is measured."""
    gen = cases.generator(5)
    p = torch.nn.Parameter(torch.randn(20_011, generator=gen).to(device, dtype))
    for step in range(4):
        q = torch.nn.Parameter(p.detach().clone())
        grad = torch.randn(20_011, generator=gen).to(device, dtype)
        buffer = torch.randn(20_011, generator=gen).to(device, dtype) if step else None
        optimizer = FrozenAwareSGD([p], **hyper)
        stock = torch.optim.SGD([q], **hyper, foreach=device == "cuda")
        if buffer is not None and hyper["momentum"]:
            optimizer.state[p]["momentum_buffer"] = buffer.clone()
            stock.state[q]["momentum_buffer"] = buffer.clone()
        exact_p, exact_b = _exact_sgd(
            hyper, p.detach().double(), grad.double(), None if buffer is None else buffer.double()
        )
        p.grad, q.grad = grad.clone(), grad.clone()
        optimizer.step()
        stock.step()
        results = [("parameter", p, q, exact_p)]
        if hyper["momentum"]:
            ours, theirs = cases.buffer_of(optimizer, p), cases.buffer_of(stock, q)
            results.append(("momentum_buffer", ours, theirs, exact_b))
        for name, a, b, exact in results:
            error = (a.detach().double() - exact).abs()
            stock_error = (b.detach().double() - exact).abs()
            # Two narrow numbers can be equally far from the exact one to within fp32's rounding.
            slack = 1e-6 * exact.abs().max().item()
            assert error.max() <= stock_error.max() + slack, f"{name}: largest error"
            assert error.mean() <= stock_error.mean() + 1e-3 * slack, f"{name}: mean error"
            half_ulp = exact.abs().clamp_min(torch.finfo(dtype).tiny) * torch.finfo(dtype).eps / 2
            assert (error <= half_ulp * (1 + 1e-3) + slack).all(), f"{name}: not rounded once"


@pytest.mark.parametrize("as_tensor", [False, True], ids=["python float", "0-dim tensor"])
@pytest.mark.parametrize("dtype", cases.ids(cases.WIDE_DTYPES))
@pytest.mark.parametrize("hyper", cases.ids(cases.SOME_HYPERS))
def test_learning_rate_as_float_or_tensor(
    hyper: Hyper, dtype: torch.dtype, as_tensor: bool
) -> None:
    """A fp32 tensor rounds the rate to fp32 even for fp64 parameters; a float does not."""
    gen = cases.generator(2)
    ours = cases.make_parameters((1, 65, 4099), gen, dtype)
    theirs = cases.twin(ours)
    lr = hyper["lr"]
    hyper_ours = hyper | {"lr": torch.tensor(lr) if as_tensor else lr}
    hyper_theirs = hyper | {"lr": torch.tensor(lr) if as_tensor else lr}
    optimizer = FrozenAwareSGD(ours, **hyper_ours)
    reference = torch.optim.SGD(theirs, **hyper_theirs, foreach=False)
    for step in range(6):
        cases.set_grads(ours, theirs, gen)
        optimizer.step()
        reference.step()
        cases.assert_same_training(optimizer, reference, f"after step {step + 1}:")


SCALARS: dict[str, Any] = {
    "a python int": 1,
    "a python bool": True,
    "a 0-dim fp32 tensor": torch.tensor(0.1),
    "a 0-dim fp64 tensor": torch.tensor(0.1, dtype=torch.float64),
    "a 0-dim integer tensor": torch.tensor(1),
}
if np is not None:
    SCALARS |= {
        "a numpy float64": np.float64(0.1),
        "a numpy float32": np.float32(0.1),
        "a numpy float16": np.float16(0.1),
        "a numpy int64": np.int64(1),
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param(key, value, id=f"{key} is {name}")
        for key in ("lr", "momentum", "dampening", "weight_decay")
        for name, value in SCALARS.items()
        # Stock refuses a weight_decay of True.
        if not (key == "weight_decay" and value is True)
    ],
)
@pytest.mark.parametrize("dtype", cases.ids(cases.WIDE_DTYPES))
def test_scalars_of_any_numeric_type(dtype: torch.dtype, key: str, value: Any) -> None:
    """Schedulers and user code put numpy and integer numbers into the groups; stock takes them."""
    gen = cases.generator(3)
    ours = cases.make_parameters((3, 70), gen, dtype)
    theirs = cases.twin(ours)
    hyper = cases.SOME_HYPERS["momentum, dampening and decay"]
    optimizer = FrozenAwareSGD(ours, **hyper)
    reference = torch.optim.SGD(theirs, **hyper, foreach=False)
    for group in (*optimizer.param_groups, *reference.param_groups):
        group[key] = value
    for step in range(3):
        cases.set_grads(ours, theirs, gen)
        optimizer.step()
        reference.step()
        cases.assert_same_training(optimizer, reference, f"after step {step + 1}:")


CAPABILITIES = {
    "default": lambda: True,
    "avx2": lambda: torch.cpu._is_avx2_supported(),
    "avx512": lambda: torch.cpu._is_avx512_supported(),
}


@pytest.mark.parametrize("capability", list(CAPABILITIES))
def test_equals_stock_under_every_cpu_capability(capability: str) -> None:
    """Stock chooses its kernels by ATEN_CPU_CAPABILITY, and the results have to be the same."""
    if not CAPABILITIES[capability]():
        pytest.skip(f"this CPU has no {capability}")
    env = os.environ | {
        "ATEN_CPU_CAPABILITY": capability,
        # The same as here, so that the same build of the extension is found.
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    result = subprocess.run(
        [sys.executable, "-m", "tests.helpers.optim_cases"],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.stdout.split("\n")[0].lower() == capability, result.stdout + result.stderr
    assert result.returncode == 0, result.stdout + result.stderr
