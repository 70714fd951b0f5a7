"""Stochastic rounding of momentum to bfloat16: what is random about it, and that nothing else is.

The kernels are run without the optimizer, the CPU's own and the CUDA kernel's body on the CPU.
Every dtype, layout and variant is covered by test_body.py. An optimizer with more than one buffer
differs in the random bits alone, which each of its buffers has of its own: see the end.
"""

from __future__ import annotations

import math
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.kernels import (
    BF16,
    F16,
    F32,
    FUSED,
    HYPERS,
    TRIPLES,
    Bordered,
    Group,
    StochasticTriple,
    Triple,
    Update,
    accesses,
    assert_same,
    assert_stepped,
    kernel_on_host,
    make,
    needs_fma,
    round_stochastically,
    rounding_bits,
    step,
)
from torch_freeze import FrozenAwareAdamW

ROUNDED = {name: triple for name, triple in TRIPLES.items() if triple.stochastic}
FULL = TRIPLES["fp32 with stochastic bf16 momentum"]
HALF = TRIPLES["bf16 with stochastic momentum"]
every_rounded = pytest.mark.parametrize(
    "triple", [pytest.param(triple, id=name) for name, triple in ROUNDED.items()]
)
# A fresh buffer is the gradient, rounded: what one rounding does, with nothing else in it.
ONLY_ROUNDED = Group(lr=0.0)


def cpu_step(
    updates: Sequence[Update],
    groups: Sequence[Group],
    triple: Triple,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Run the CPU's own kernel."""
    kernel_on_host.cpu_step(
        [update.packed() for update in updates],
        [group.packed() for group in groups],
        triple.names,
        grad_scale=0 if grad_scale is None else grad_scale.data_ptr(),
        found_inf=0 if found_inf is None else found_inf.data_ptr(),
        stochastic=triple.stochastic,
    )


Run = Callable[..., object]
KERNELS: dict[str, Run] = {"the CPU's kernel": cpu_step, "the CUDA kernel's body": step}
every_kernel = pytest.mark.parametrize(
    "run", [pytest.param(run, id=name) for name, run in KERNELS.items()]
)


def rounded(values: Tensor, seed: int = 1, index: int = 0, run: Run = cpu_step) -> Tensor:
    """fp32 values as a kernel rounds them."""
    update = Update(
        Bordered(torch.zeros_like(values)),
        Bordered(values),
        Bordered(torch.full(values.shape, math.nan, dtype=BF16)),
        fresh=True,
        index=index,
    )
    run([update], [Group(lr=0.0, rounding_seed=seed)], FULL)
    assert update.momentum is not None
    return update.momentum.view.clone()


def between(mantissa: int, fraction: int, exponent: int = 127) -> float:
    """The fp32 number `fraction` / 65536 of the way from one bf16 number to the next."""
    bits = exponent << 23 | mantissa << 16 | fraction
    return float(np.array(bits, dtype=np.uint32).view(np.float32))


@pytest.fixture(params=[1, 3], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> int:
    count: int = request.param
    return count


# Around runs of 64, the shortest tensor that is prefetched and the share of a thread.
SIZES = (0, 1, 2, 63, 64, 65, 127, 128, 129, 511, 513, 4095, 4096, 4097, 4161, 70001)


@needs_fma
@every_rounded
@pytest.mark.parametrize("scale", [None, 1024.0, 3.0], ids="scale {}".format)
@pytest.mark.parametrize("fresh", [False, True], ids=["past momentum", "fresh momentum"])
@pytest.mark.parametrize("group", [pytest.param(g, id=name) for name, g in HYPERS.items()])
def test_the_cpu_kernel_equals_the_reference(
    group: Group, fresh: bool, scale: float | None, triple: Triple, threads: int
) -> None:
    torch.manual_seed(0)
    updates = [make(n, triple, fresh=fresh, with_momentum=group.momentum != 0) for n in SIZES]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cpu_step(updates, [group], triple, None if scale is None else torch.tensor(scale))
    finally:
        torch.set_num_threads(before)
    assert_stepped(updates, [group], triple, scale or 1.0)


@every_rounded
def test_an_overflow_changes_nothing_on_the_cpu(triple: Triple) -> None:
    updates = [make(3 * triple.tile, triple, fresh=fresh) for fresh in (False, True)]
    cpu_step(updates, [Group()], triple, torch.tensor(2.0), torch.tensor(1.0))
    for update in updates:
        assert update.momentum is not None
        for array in (update.param, update.grad, update.momentum):
            assert_same(array.view, array.values, "an array after an overflow")


ORDERS = {
    "one block": (1, False),
    "one block, last thread first": (1, True),
    "seven blocks": (7, False),
    "660 blocks, last thread first": (660, True),
}


@every_rounded
def test_no_order_of_threads_or_blocks_shows(triple: Triple) -> None:
    groups = [Group(weight_decay=0.01, rounding_seed=5), Group(nesterov=True, rounding_seed=6)]

    def updates() -> list[Update]:
        torch.manual_seed(0)
        made = []
        for i, numel in enumerate((1, 0, 40 * triple.tile + 5, 3, 9000)):
            made.append(make(numel, triple, group=i % 2, fresh=i == 3, offsets=(2 * 4, 0, 4)))
            made[-1].index = i
        return made

    results = []
    for blocks, backwards in ORDERS.values():
        results.append(updates())
        step(results[-1], groups, triple, resident=blocks, backwards=backwards)
    if FUSED:
        results.append(updates())
        cpu_step(results[-1], groups, triple)
        reversed_too = updates()
        cpu_step(reversed_too[::-1], groups, triple)
        results.append(reversed_too)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert first.momentum is not None and second.momentum is not None
            assert_same(second.param.view, first.param.view, "param")
            assert_same(second.momentum.view, first.momentum.view, "momentum")


def some_values() -> Tensor:
    """Not torch's random numbers, which an instruction set changes."""
    return torch.from_numpy(np.random.default_rng(0).standard_normal(9001, dtype=np.float32))


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_no_instruction_set_shows(capability: str) -> None:
    """Fresh momentum, because products and sums round apart where they are not fused."""
    code = (
        "import torch; from tests.kernels.test_momentum_rounding import rounded, some_values\n"
        "print(rounded(some_values(), 3, 4).view(torch.int16).tolist())"
    )
    environment = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": capability,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    wanted = round_stochastically(some_values(), rounding_bits(3, 4, 0, 9001))
    assert done.stdout.strip() == str(wanted.view(torch.int16).tolist())


@every_kernel
def test_the_bits_read_back_are_the_reference(run: Run) -> None:
    """An element is rounded up from the fraction 65536 - bits on: bisection finds it."""
    numel, seed, index = 3000, 2**63 + 11, 2**31 - 1
    low = np.zeros(numel, dtype=np.uint32)
    for power in reversed(range(16)):
        candidate = low + np.uint32(1 << power)
        values = (np.uint32(127 << 23) | (np.uint32(65536) - candidate)).view(np.float32)
        up = rounded(torch.from_numpy(values), seed, index, run) > 1
        low = np.where(up.numpy(), candidate, low).astype(np.uint32)
    assert (low == rounding_bits(seed, index, 0, numel)).all()


FRACTIONS = (1, 1000, 16384, 32768, 49152, 65535)


@every_kernel
@pytest.mark.parametrize("fraction", FRACTIONS, ids="{} / 65536".format)
@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
def test_the_mean_of_many_roundings_is_the_value(sign: int, fraction: int, run: Run) -> None:
    numel = 1 << 17
    probability = fraction / 65536
    lower, upper = sign * between(5, 0), sign * between(6, 0)
    ups = 0
    for seed in range(4):
        result = rounded(torch.full((numel,), sign * between(5, fraction)), seed, seed, run)
        up = result == upper
        assert (up | (result == lower)).all(), "a neighbour of the value, and no other number"
        ups += int(up.sum())
    # Five standard deviations of the binomial, and one count where it is all but empty.
    bound = 5 * math.sqrt(4 * numel * probability * (1 - probability)) + 1
    assert abs(ups - 4 * numel * probability) < bound


@every_kernel
def test_the_error_stays_below_the_distance_of_neighbours(run: Run) -> None:
    torch.manual_seed(0)
    values = torch.randn(1 << 16) * torch.logspace(-44, 38, 1 << 16, dtype=torch.float64).float()
    result = rounded(values, run=run).float()
    # The neighbours towards and away from zero; 2^128 stands for infinity.
    bits = values.numpy().view(np.uint32) & np.uint32(0xFFFF0000)
    towards = torch.from_numpy(bits.view(np.float32))
    away = torch.from_numpy((bits + np.uint32(0x10000)).view(np.float32))
    assert ((result == towards) | (result == away)).all()
    # As many away from zero as the fractions add up to.
    fractions = (values.numpy().view(np.uint32) & np.uint32(0xFFFF)) / 65536
    spread = math.sqrt(float((fractions * (1 - fractions)).sum()))
    assert abs(int((result == away).sum()) - float(fractions.sum())) < 5 * spread
    assert int((result == away).sum()) > 1000


EXACT = {
    "zero": 0.0,
    "negative zero": -0.0,
    "one": 1.0,
    "the smallest subnormal": 2.0**-133,
    "the largest finite": between(127, 0, 254),
    "infinity": math.inf,
    "negative infinity": -math.inf,
}


@every_kernel
@pytest.mark.parametrize("value", [pytest.param(v, id=name) for name, v in EXACT.items()])
def test_what_bf16_holds_stays(value: float, run: Run) -> None:
    values = torch.full((5000,), value)
    assert_same(rounded(values, run=run), values.to(BF16), "momentum")


@every_kernel
@pytest.mark.parametrize(
    "bits",
    [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC0FFFF],
    ids="0x{:x}".format,
)
def test_nan_stays_nan_whatever_its_bits(bits: int, run: Run) -> None:
    values = torch.from_numpy(np.full(5000, bits, dtype=np.uint32).view(np.float32))
    result = rounded(values, run=run)
    assert (result.view(torch.int16) == 0x7FC0).all()


@every_kernel
def test_beyond_the_largest_finite_value_lies_infinity(run: Run) -> None:
    largest = between(127, 0, 254)
    result = rounded(torch.full((1 << 15,), between(127, 16384, 254)), run=run).float()
    assert ((result == largest) | (result == math.inf)).all()
    assert result.isinf().float().mean() == pytest.approx(0.25, abs=0.02)


@needs_fma
@every_rounded
@every_kernel
def test_the_parameter_moves_by_the_momentum_before_its_rounding(run: Run, triple: Triple) -> None:
    torch.manual_seed(0)
    results = []
    for seed in (1, 2):
        torch.manual_seed(0)
        update = make(5000, triple)
        run([update], [Group(rounding_seed=seed)], triple)
        results.append(update)
    first, second = results
    assert first.momentum is not None and second.momentum is not None
    assert_same(first.param.view, second.param.view, "param")
    assert (first.momentum.view != second.momentum.view).any()


COUNT = 1 << 20
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
BITS: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
    **{
        f"elements {lag} apart": lambda lag=lag: (  # type: ignore[misc]
            rounding_bits(1, 0, 0, COUNT),
            rounding_bits(1, 0, lag, COUNT),
        )
        for lag in (1, 2, 3, 4, 7, 8, 16, 31, 32, 63, 64, 100, 128, 256, 512, 768, 1024, 4096)
    },
    **{
        f"elements 2**{power} apart": lambda power=power: (  # type: ignore[misc]
            rounding_bits(1, 0, 0, COUNT),
            rounding_bits(1, 0, 1 << power, COUNT),
        )
        for power in (16, 20, 24, 28, 31, 32, 33)
    },
    "neighbouring tensors": lambda: (rounding_bits(1, 0, 0, COUNT), rounding_bits(1, 1, 0, COUNT)),
    "consecutive seeds": lambda: (rounding_bits(1, 0, 0, COUNT), rounding_bits(2, 0, 0, COUNT)),
    "consecutive seeds, an element on": lambda: (
        rounding_bits(1, 0, 1, COUNT),
        rounding_bits(2, 0, 0, COUNT),
    ),
    "seeds and tensors a step of the mixer apart": lambda: (
        rounding_bits(0x9E3779B97F4A7C15, 0, 0, COUNT),
        rounding_bits(0, 1, 0, COUNT),
    ),
    "an element's bits from seed to seed": lambda: (
        np.concatenate([rounding_bits(seed, 0, 0, 64) for seed in range(COUNT >> 6)]),
        np.concatenate([rounding_bits(seed + 1, 0, 0, 64) for seed in range(COUNT >> 6)]),
    ),
    **{
        f"{MOMENTS[i]} and {MOMENTS[j]}{words}": lambda i=i, j=j, lag=lag: (  # type: ignore[misc]
            rounding_bits(1, 0, 0, COUNT, i),
            rounding_bits(1, 0, lag, COUNT, j),
        )
        for i, j in ((0, 1), (0, 2), (1, 2))
        for words, lag in (("", 0), (", an element on", 1))
    },
    **{
        f"{MOMENTS[i]} and {MOMENTS[j]} from seed to seed": lambda i=i, j=j: (  # type: ignore[misc]
            np.concatenate([rounding_bits(seed, 0, 0, 64, i) for seed in range(COUNT >> 6)]),
            np.concatenate([rounding_bits(seed, 0, 0, 64, j) for seed in range(COUNT >> 6)]),
        )
        for i, j in ((0, 1), (0, 2), (1, 2))
    },
}


def deviation(cells: np.ndarray, kinds: int) -> float:
    """Pearson's chi-square of a uniform distribution, in standard deviations."""
    counts = np.bincount(cells, minlength=kinds)
    wanted = len(cells) / kinds
    chi_square = float(((counts - wanted) ** 2).sum() / wanted)
    return (chi_square - (kinds - 1)) / math.sqrt(2 * (kinds - 1))


@pytest.mark.parametrize("pair", BITS)
def test_bits_are_uniform_and_independent_in_pairs(pair: str) -> None:
    first, second = (bits.astype(np.int64) for bits in BITS[pair]())
    cells = {
        "the bits": first,
        "the upper halves": first >> 8 << 8 | second >> 8,
        "the lower halves": (first & 255) << 8 | second & 255,
        "upper and lower half": first >> 8 << 8 | second & 255,
        "the difference": (first - second) & 65535,
        "the exclusive or": first ^ second,
    }
    for what, of in cells.items():
        assert abs(deviation(of, 65536)) < 5, what
    product = (first - 32767.5) * (second - 32767.5)
    assert abs(product.sum()) < 5 * math.sqrt(COUNT) * 65536**2 / 12


@every_rounded
def test_elements_beyond_2_to_the_32(triple: Triple) -> None:
    """The memory is only reserved, except for the pages that a few blocks touch."""
    edge = 1 << 32
    numel = edge + 5 * triple.tile + 3
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        maps = [mmap.mmap(-1, numel * dtype.itemsize, flags=flags) for dtype in triple]
    except (OSError, ValueError) as error:
        pytest.skip(f"this machine lends no {numel} elements of address space: {error}")
    param, grad, momentum = (
        torch.frombuffer(memory, dtype=dtype) for memory, dtype in zip(maps, triple, strict=True)
    )
    blocks = 1 << 19
    tiles = -(-numel // triple.tile)
    chosen = list(range(blocks - 4, blocks))
    begin = min(b * (tiles // blocks) + min(b, tiles % blocks) for b in chosen) * triple.tile
    assert begin < edge - 100
    value = between(3, 30000)
    grad[begin:] = value
    packed = (param.data_ptr(), grad.data_ptr(), momentum.data_ptr(), numel, 0, 9, True)
    kernel_on_host.step(
        [packed], [ONLY_ROUNDED.packed()], triple.names, blocks, stochastic=True, chosen=chosen
    )
    seed = ONLY_ROUNDED.rounding_seed
    values = grad[begin:].float()
    bits = rounding_bits(seed, 9, begin, numel - begin)
    assert_same(momentum[begin:], round_stochastically(values, bits), "momentum")
    if triple.grad == F32:
        wrapped = np.concatenate([bits[: edge - begin], rounding_bits(seed, 9, 0, numel - edge)])
        assert (momentum[begin:] != round_stochastically(values, wrapped)).any()


def stationary(triple: Triple, grad: float) -> float:
    """Mean momentum of many elements at the end of 10,000 steps of one small gradient."""
    numel, steps = 4096, 10_000
    arrays = [torch.full((numel,), v, dtype=t) for v, t in zip((1, grad, 0), triple, strict=True)]
    pointers = [array.data_ptr() for array in arrays]
    total = 0.0
    for seed in range(steps):
        update = (pointers[0], pointers[1], pointers[2], numel, 0, 0, seed == 0)
        group = Group(lr=0.0, rounding_seed=seed).packed()
        kernel_on_host.cpu_step([update], [group], triple.names, stochastic=triple.stochastic)
        if seed >= steps - 100:
            total += float(arrays[2].double().mean()) / 100
    return total


def test_momentum_of_a_small_constant_gradient_arrives_where_nearest_rounding_stagnates() -> None:
    grad = between(37, 0, 127 - 20)
    limit = grad / (1 - 0.9)
    # A buffer stops where a step's share of what is missing is less than half the distance to the
    # next number: 2^-9 of it at least, of 1 - 0.9.
    assert stationary(TRIPLES["bf16"], grad) < limit * (1 - 0.005)
    for triple in ROUNDED.values():
        # One rounding errs by half that distance (of 2^-7) at most, in root mean square; the sum
        # over the past by 1 / sqrt(1 - 0.81) as much; 4096 elements are averaged.
        spread = limit * 2.0**-8 / math.sqrt(1 - 0.9**2) / math.sqrt(4096)
        assert abs(stationary(triple, grad) - limit) < 5 * spread


def test_a_parameter_drifts_as_far_as_in_fp32() -> None:
    numel, steps, grad, lr = 4096, 10_000, between(37, 0, 127 - 20), 1e-3
    moved = []
    for triple in (FULL, TRIPLES["fp32"]):
        param = torch.zeros(numel)
        gradient = torch.full((numel,), grad)
        momentum = torch.zeros(numel, dtype=triple.momentum)
        pointers = (param.data_ptr(), gradient.data_ptr(), momentum.data_ptr())
        for seed in range(steps):
            kernel_on_host.cpu_step(
                [(*pointers, numel, 0, 0, seed == 0)],
                [Group(lr=lr, rounding_seed=seed).packed()],
                triple.names,
                stochastic=triple.stochastic,
            )
        moved.append(param.double())
    # Every element's errors average out over the steps, to 2^-8 * 10 / sqrt(10,000) of one step.
    error = (moved[0] / moved[1] - 1).abs()
    assert float(error.max()) < 6 * 2.0**-8 * 10 / math.sqrt(steps)
    assert abs(float((moved[0] / moved[1]).mean()) - 1) < 5e-5


REFUSED = {
    "stochastic fp32 momentum": StochasticTriple(F32, F32, F32),
    "stochastic fp16 momentum": StochasticTriple(F16, F16, F16),
    "stochastic bf16 momentum of fp16 parameters": StochasticTriple(F16, F16, BF16),
    "bf16 momentum of fp32 parameters, rounded to nearest": Triple(F32, F32, BF16),
}


@pytest.mark.parametrize("triple", [pytest.param(t, id=name) for name, t in REFUSED.items()])
def test_there_is_no_kernel_for(triple: Triple) -> None:
    update = make(4, triple)
    with pytest.raises(NotImplementedError, match="no kernel for parameters of"):
        cpu_step([update], [Group()], triple)
    with pytest.raises(TypeError, match="no kernel for these dtypes"):
        step([update], [Group()], triple)
    assert_same(update.param.view, update.param.values, "param")


def test_a_row_of_the_table_holds_its_key() -> None:
    """Rows of other triples are as long as they were: as many tensors fit a launch."""
    plain, keyed = (
        kernel_on_host.capacities(triple.names, 1, stochastic=triple.stochastic)
        for triple in (TRIPLES["bf16"], HALF)
    )
    for (size, tensors), (same_size, fewer) in zip(plain, keyed, strict=True):
        assert size == same_size
        assert tensors == pytest.approx(fewer * 40 / 32, abs=1.25)
    assert accesses([(1 << 20, 2 << 20, 3 << 20, 0, 0, 0, False)], HALF) == []


# ------------------------------------------------------------------------ more than one buffer each


MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def trained_moments(amsgrad: bool, threads: int = 1) -> list[tuple[Tensor, Tensor]]:
    """What the reference makes of each moment, and what the kernel made of it."""
    gen = torch.Generator().manual_seed(0)
    sizes = (5000, 1, 40001, 3)
    params = [torch.nn.Parameter(torch.randn(n, generator=gen)) for n in sizes]
    wide = [torch.nn.Parameter(p.detach().clone()) for p in params]
    how = {"amsgrad": amsgrad, "betas": (0.8, 0.9)}
    narrow = {"moment_dtype": BF16, "moment_seed": 41}
    optimizer = FrozenAwareAdamW([{"params": params[:3]}, {"params": params[3:]}], **how, **narrow)
    # Its square roots are the processor's, too.
    exact = FrozenAwareAdamW([{"params": wide[:3]}, {"params": wide[3:]}], fused=True, **how)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    pairs = []
    for step_number in range(3):
        for p, q in zip(params, wide, strict=True):
            p.grad = torch.randn(p.shape, generator=gen)
            q.grad = p.grad.clone()
        optimizer.step()
        exact.step()
        for (g, i), p, q in zip(((0, 0), (0, 1), (0, 2), (1, 0)), params, wide, strict=True):
            assert_same(p.detach(), q.detach(), "param")
            for k, name in enumerate(MOMENTS[: 3 if amsgrad else 2]):
                full = exact.state[q][name]
                bits = rounding_bits(41 + step_number + (g << 48), i, 0, p.numel(), k)
                pairs.append((round_stochastically(full, bits), optimizer.state[p][name].clone()))
                full.copy_(optimizer.state[p][name])
    torch.set_num_threads(before)
    return pairs


@pytest.mark.compiled
@pytest.mark.parametrize("amsgrad", [False, True], ids=["two moments", "amsgrad"])
def test_each_moment_is_rounded_by_its_own_bits(amsgrad: bool, threads: int) -> None:
    """Whatever the step, the tensor and its group; the parameter moves by the moments before."""
    for wanted, moment in trained_moments(amsgrad, threads):
        assert_same(moment, wanted, "a moment")


@pytest.mark.compiled
@pytest.mark.usefixtures("one_thread")
def test_the_moments_of_a_constant_gradient_arrive() -> None:
    """Where rounding to nearest would stop on the way, the mean of many elements arrives."""
    value = between(37, 0, 127 - 20)
    p = torch.nn.Parameter(torch.zeros(4096))
    optimizer = FrozenAwareAdamW([p], lr=0.0, betas=(0.9, 0.95), moment_dtype=BF16)
    means = {"exp_avg": 0.0, "exp_avg_sq": 0.0}
    for number in range(500):
        p.grad = torch.full((4096,), value)
        optimizer.step()
        if number >= 400:
            for name in means:
                means[name] += float(optimizer.state[p][name].double().mean()) / 100
    # As for momentum: half the distance of two numbers in one rounding, added up over the past.
    for name, limit, beta in (("exp_avg", value, 0.9), ("exp_avg_sq", value**2, 0.95)):
        spread = limit * 2.0**-8 / math.sqrt(1 - beta**2) / math.sqrt(4096)
        assert abs(means[name] - limit) < 5 * spread, name
