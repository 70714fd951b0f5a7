"""fp32 and fp64: stock's for-loop, bit for bit. bf16 and fp16: fp32 arithmetic, rounded once."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from decimal import Decimal
from typing import Any

import pytest
import torch

from tests.helpers import optim_cases as cases
from tests.helpers.optim_cases import Hyper

try:
    import numpy as np
except ImportError:
    np = None


SOME_HYPERS = cases.per_family(lambda family: family.some_hypers, cases.UNLIKE_FAMILIES)
# All but what Adam has in common with AdamW: only decay tells them apart.
DISTINCT_HYPERS = cases.per_family(
    lambda family: {
        name: hyper
        for name, hyper in family.hypers.items()
        if family is not cases.ADAM or hyper.get("weight_decay")
    }
)


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("dtype", cases.ids(cases.WIDE_DTYPES))
@pytest.mark.parametrize(("family", "hyper"), cases.per_family(lambda family: family.hypers))
def test_equals_stock_bit_for_bit(
    family: cases.Family, hyper: Hyper, dtype: torch.dtype, device: str
) -> None:
    cases.check_hyper(hyper, dtype, device, family=family)


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("dtype", cases.ids(cases.NARROW_DTYPES))
@pytest.mark.parametrize(("family", "hyper"), DISTINCT_HYPERS)
def test_equals_fp32_arithmetic_rounded_once(
    family: cases.Family, hyper: Hyper, dtype: torch.dtype, device: str
) -> None:
    cases.check_hyper(hyper, dtype, device, steps=10, stock=False, family=family)


@pytest.mark.parametrize("dtype", cases.ids(cases.DTYPES))
@pytest.mark.parametrize(("family", "hyper"), DISTINCT_HYPERS)
def test_fused_on_the_cpu(family: cases.Family, hyper: Hyper, dtype: torch.dtype) -> None:
    """SGD's results are the same; Adam's square roots are the processor's, as in torch's form."""
    stock = dtype in cases.WIDE_DTYPES.values()
    cases.check_hyper(hyper, dtype, steps=10, stock=stock, family=family, fused=True)


@pytest.mark.compiled
@pytest.mark.parametrize("fused", [None, True], ids=["fused unset", "fused=True"])
@pytest.mark.parametrize("dtype", cases.ids(cases.WIDE_DTYPES))
def test_whose_square_roots_they_are(dtype: torch.dtype, fused: bool | None) -> None:
    """A step by -1 / sqrt(x) shows them: torch's, or the numbers closest to the root."""
    x = torch.rand(10_000, generator=cases.generator(0)).to(dtype) + 0.5
    p = torch.nn.Parameter(torch.zeros_like(x))
    p.grad = torch.zeros_like(x)
    # Without a gradient both moments are halved. After so many steps there is no correction.
    optimizer = cases.ADAM.ours([p], lr=1.0, betas=(0.5, 0.5), eps=0.0, fused=fused)
    moments = {"exp_avg": torch.full_like(x, 2.0), "exp_avg_sq": 2 * x}
    optimizer.state[p] = {"step": torch.tensor(1000.0), **moments}
    optimizer.step()
    roots = x.sqrt()
    if fused:
        roots = torch.tensor([math.sqrt(value) for value in x.tolist()], dtype=torch.float64)
    cases.assert_same_bits(p, -1 / roots.to(dtype), "after a step")


@pytest.mark.parametrize("dtype", cases.ids(cases.DTYPES))
@pytest.mark.parametrize("threads", [1, 2, 4], ids="{} threads".format)
@pytest.mark.parametrize(("family", "hyper"), SOME_HYPERS)
def test_any_thread_count_gives_the_same_bits(
    family: cases.Family, hyper: Hyper, threads: int, dtype: torch.dtype
) -> None:
    with cases.threads(threads):
        cases.check_hyper(
            hyper,
            dtype,
            steps=4,
            sizes=(1, 300_007, 3, 65_537, 17),
            stock=dtype in cases.WIDE_DTYPES.values(),
            family=family,
        )


@pytest.mark.parametrize("dtype", cases.ids(cases.DTYPES))
@pytest.mark.parametrize("groups", [2, 3, 17], ids="{} groups".format)
@pytest.mark.parametrize(("family", "hyper"), SOME_HYPERS)
def test_several_groups(
    family: cases.Family, hyper: Hyper, groups: int, dtype: torch.dtype
) -> None:
    cases.check_hyper(
        hyper,
        dtype,
        steps=4,
        groups=groups,
        stock=dtype in cases.WIDE_DTYPES.values(),
        family=family,
    )


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("family", cases.each_family())
def test_groups_of_different_dtype_and_hyper_parameters(family: cases.Family, device: str) -> None:
    gen = cases.generator(0)
    ours, theirs = [], []
    for index, (hyper, dtype) in enumerate(
        (hyper, dtype) for hyper in family.hypers.values() for dtype in cases.DTYPES.values()
    ):
        params = cases.make_parameters((index % 37, 5), gen, dtype, device)
        ours.append({"params": params} | hyper)
        theirs.append({"params": cases.twin(params)} | hyper)
    optimizer, reference = family.ours(ours), family.reference(theirs)
    pairs = [
        (p, q)
        for a, b in zip(ours, theirs, strict=True)
        for p, q in zip(a["params"], b["params"], strict=True)
    ]
    for step in range(5):
        cases.set_grads([p for p, _ in pairs], [q for _, q in pairs], gen)
        optimizer.step()
        reference.step()
        cases.assert_same_training(
            optimizer, reference, f"after step {step + 1}:", exact=family.exact_on(device)
        )


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize(("family", "hyper"), SOME_HYPERS)
def test_one_group_may_mix_dtypes(family: cases.Family, hyper: Hyper, device: str) -> None:
    gen = cases.generator(0)
    ours = [
        p
        for size in (5, 129, 1000)
        for dtype in cases.DTYPES.values()
        for p in cases.make_parameters((size,), gen, dtype, device)
    ]
    theirs = cases.twin(ours)
    optimizer, reference = family.ours(ours, **hyper), family.reference(theirs, **hyper)
    for step in range(5):
        cases.set_grads(ours, theirs, gen)
        optimizer.step()
        reference.step()
        cases.assert_same_training(
            optimizer, reference, f"after step {step + 1}:", exact=family.exact_on(device)
        )


@pytest.mark.parametrize("count", [1, 161, 2500], ids="{} tensors".format)
@pytest.mark.parametrize("family", cases.each_family())
def test_many_tensors(family: cases.Family, count: int) -> None:
    cases.check_hyper(
        family.with_state,
        torch.float32,
        steps=3,
        sizes=[i % 5 for i in range(count)],
        family=family,
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
@pytest.mark.parametrize(("family", "hyper"), DISTINCT_HYPERS)
def test_zeros_infinities_nans_and_denormals(
    family: cases.Family, hyper: Hyper, dtype: torch.dtype, device: str
) -> None:
    """A formula that multiplies by a decay or momentum of 0 turns inf into NaN; stock skips it.

    All pairs of special parameter and special gradient; NaNs may differ in sign and payload.
    """
    values = torch.tensor(SPECIAL_VALUES, dtype=dtype, device=device)
    start = values.repeat_interleave(len(values))
    grad = values.repeat(len(values))
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer = family.ours([p], **hyper)
    reference = family.stock([q], **hyper, foreach=device == "cuda")
    for _ in range(3):
        p.grad, q.grad = grad.clone(), grad.clone()
        optimizer.step()
        reference.step()
        names = family.buffers(hyper)
        got = [p, *(cases.buffer_of(optimizer, p, name) for name in names)]
        wanted = [q, *(cases.buffer_of(reference, q, name) for name in names)]
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            a, b = a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0)
            if family.exact_on(device):
                cases.assert_same_bits(a, b, "special values")
            else:
                torch.testing.assert_close(a, b)


def _exact(family: cases.Family, hyper: Hyper, p: Any, g: Any, held: Any) -> tuple[Any, Any]:
    """One step in fp64, as the docstring of the stock optimizer states it.

    `held` is the state before the step, empty at the first one; the state after it is returned.
    """
    hyper = {**family.stock([torch.ones(1)]).defaults, **hyper}
    decay = hyper["weight_decay"]
    g = -g if hyper["maximize"] else g
    if family is cases.SGD:
        g = g + decay * p
        momentum, b = hyper["momentum"], held.get("momentum_buffer")
        if momentum:
            b = g if b is None else momentum * b + (1 - hyper["dampening"]) * g
            g = g + momentum * b if hyper["nesterov"] else b
        return p - hyper["lr"] * g, {"momentum_buffer": b}
    beta1, beta2 = hyper["betas"]
    count = held.get("step", 0) + 1
    if family is cases.ADAMW:
        p = p - hyper["lr"] * decay * p
    else:
        g = g + decay * p
    m = beta1 * held.get("exp_avg", 0) + (1 - beta1) * g
    v = beta2 * held.get("exp_avg_sq", 0) + (1 - beta2) * g**2
    most = torch.maximum(held.get("max_exp_avg_sq", torch.zeros_like(v)), v)
    root = ((most if hyper["amsgrad"] else v) / (1 - beta2**count)).sqrt()
    p = p - hyper["lr"] * m / (1 - beta1**count) / (root + hyper["eps"])
    return p, {"exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": most}


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("dtype", cases.ids(cases.NARROW_DTYPES))
@pytest.mark.parametrize(("family", "hyper"), DISTINCT_HYPERS)
def test_narrow_error_is_never_above_stocks(
    family: cases.Family, hyper: Hyper, dtype: torch.dtype, device: str
) -> None:
    """Each step starts from the same narrow numbers, so that only its own rounding is measured."""
    gen = cases.generator(5)

    def values() -> torch.Tensor:
        return torch.randn(20_011, generator=gen)

    p = torch.nn.Parameter(values().to(device, dtype))
    names = family.buffers(hyper)
    for step in range(4):
        q = torch.nn.Parameter(p.detach().clone())
        grad = values().to(device, dtype)
        held: dict[str, Any] = {}
        for name in names if step else ():
            # Squares of gradients, as large as those of this test.
            value = values().square() / 4 + 0.1 if name.endswith("_sq") else values()
            held[name] = value.to(device, dtype)
        if step and family.state.counter is not None:
            held[family.state.counter] = torch.tensor(float(step))
        optimizer = family.ours([p], **hyper)
        stock = family.stock([q], **hyper, foreach=device == "cuda")
        for sgd, x in ((optimizer, p), (stock, q)) if held else ():
            sgd.state[x].update({k: v.clone() for k, v in held.items()})
        wide = {k: v.double() if v.dim() else v.item() for k, v in held.items()}
        exact_p, exact_state = _exact(family, hyper, p.detach().double(), grad.double(), wide)
        p.grad, q.grad = grad.clone(), grad.clone()
        optimizer.step()
        stock.step()
        results = [("parameter", p, q, exact_p)]
        for name in names:
            ours, theirs = cases.buffer_of(optimizer, p, name), cases.buffer_of(stock, q, name)
            results.append((name, ours, theirs, exact_state[name]))
        for name, a, b, exact in results:
            error = (a.detach().double() - exact).abs()
            stock_error = (b.detach().double() - exact).abs()
            # Stock's fp16 turns small numbers into 0 / 0; ours has to be right there too.
            fine = stock_error.isfinite()
            # Two narrow numbers can be equally far from the exact one to within fp32's rounding.
            slack = 1e-6 * exact.abs().max().item()
            stock_error = stock_error[fine]
            assert error[fine].max() <= stock_error.max() + slack, f"{name}: largest error"
            assert error[fine].mean() <= stock_error.mean() + 1e-3 * slack, f"{name}: mean error"
            half_ulp = exact.abs().clamp_min(torch.finfo(dtype).tiny) * torch.finfo(dtype).eps / 2
            assert (error <= half_ulp * (1 + 1e-3) + slack).all(), f"{name}: not rounded once"


@pytest.mark.parametrize("as_tensor", [False, True], ids=["python float", "0-dim tensor"])
@pytest.mark.parametrize("dtype", cases.ids(cases.WIDE_DTYPES))
@pytest.mark.parametrize(("family", "hyper"), SOME_HYPERS)
def test_learning_rate_as_float_or_tensor(
    family: cases.Family,
    hyper: Hyper,
    dtype: torch.dtype,
    as_tensor: bool,
) -> None:
    """A fp32 tensor rounds the rate to fp32 even for fp64 parameters; a float does not."""
    gen = cases.generator(2)
    ours = cases.make_parameters((1, 65, 4099), gen, dtype)
    theirs = cases.twin(ours)
    lr = hyper.get("lr", 1e-3)
    hyper_ours = hyper | {"lr": torch.tensor(lr) if as_tensor else lr}
    hyper_theirs = hyper | {"lr": torch.tensor(lr) if as_tensor else lr}
    optimizer = family.ours(ours, **hyper_ours)
    reference = family.stock(theirs, **hyper_theirs, foreach=False)
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


NUMBERS = {
    "SGD": ("lr", "momentum", "dampening", "weight_decay"),
    "AdamW": ("lr", "beta1", "beta2", "eps", "weight_decay"),
}


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        pytest.param(cases.FAMILIES[family], key, value, id=f"{family}: {key} is {name}")
        for family, keys in NUMBERS.items()
        for key in keys
        for name, value in SCALARS.items()
        # Stock refuses a weight_decay of True, and divides by 0 for a beta of 1.
        if not (key == "weight_decay" and value is True)
        if not (key.startswith("beta") and value == 1)
    ],
)
@pytest.mark.parametrize("dtype", cases.ids(cases.WIDE_DTYPES))
def test_scalars_of_any_numeric_type(
    dtype: torch.dtype,
    family: cases.Family,
    key: str,
    value: Any,
) -> None:
    """Schedulers and user code put numpy and integer numbers into the groups; stock takes them."""
    gen = cases.generator(3)
    ours = cases.make_parameters((3, 70), gen, dtype)
    theirs = cases.twin(ours)
    optimizer = family.ours(ours, **family.with_state)
    reference = family.stock(theirs, **family.with_state, foreach=False)
    for group in (*optimizer.param_groups, *reference.param_groups):
        if key.startswith("beta"):
            group["betas"] = (value, 0.99) if key == "beta1" else (0.9, value)
        else:
            group[key] = value
    for step in range(3):
        cases.set_grads(ours, theirs, gen)
        optimizer.step()
        reference.step()
        cases.assert_same_training(optimizer, reference, f"after step {step + 1}:")


TWO_TYPES: dict[str, tuple[Any, Any]] = {
    "both fp32 tensors": (torch.tensor(0.1), torch.tensor(0.3)),
    "fp64 and fp32 tensors": (torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.3)),
    "fp32 and fp64 tensors": (torch.tensor(0.1), torch.tensor(0.3, dtype=torch.float64)),
    "a one-element tensor": (torch.tensor([0.1]), 0.3),
    "integer tensors": (torch.tensor(1), torch.tensor(2)),
}
if np is not None:
    TWO_TYPES |= {
        "NumPy's float32 and float64": (np.float32(0.1), np.float64(0.3)),
        "NumPy's float32 and int64": (np.float32(0.1), np.int64(2)),
        "NumPy's int64 and float32": (np.int64(1), np.float32(0.3)),
    }


@pytest.mark.compiled
def test_a_decimal_is_a_learning_rate() -> None:
    """Which cannot be multiplied by a number of Python's; stock refuses it in the step."""
    p, q = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    for param, lr in ((p, Decimal("0.1")), (q, 0.1)):
        optimizer = cases.ADAMW.ours([param])
        optimizer.param_groups[0] |= {"lr": lr}
        param.grad = torch.ones(5)
        optimizer.step()
    assert torch.equal(p, q) and not torch.equal(p, torch.ones(5))


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", cases.ids(cases.WIDE_DTYPES))
@pytest.mark.parametrize(("lr", "decay"), cases.ids(TWO_TYPES))
@pytest.mark.parametrize("family", [cases.ADAM, cases.ADAMW], ids=["Adam", "AdamW"])
def test_rate_and_decay_are_multiplied_in_their_own_type(
    family: cases.Family, lr: Any, decay: Any, dtype: torch.dtype
) -> None:
    gen = cases.generator(5)
    ours = cases.make_parameters((3, 70), gen, dtype)
    theirs = cases.twin(ours)
    optimizer, reference = family.ours(ours), family.stock(theirs, foreach=False)
    for group in (*optimizer.param_groups, *reference.param_groups):
        group |= {"lr": lr, "weight_decay": decay}
    for step in range(4):
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
