"""Tensors as the kernels take them, stepped by the kernels' bodies on the host; what is expected.

`step` runs the CUDA kernel's body on memory that exists, where every array lies in a border that
must not change. `accesses` only notes what it would touch, so that an array may lie anywhere and be
larger than any memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim.sgd import sgd

kernel_on_host = pytest.importorskip(
    "torch_freeze._kernel_on_host",
    reason="the kernels' bodies are compiled in a clone alone: make build",
    exc_type=ImportError,
)


class Triple(NamedTuple):
    """The dtypes of parameter, gradient and momentum."""

    param: torch.dtype
    grad: torch.dtype
    momentum: torch.dtype

    @property
    def names(self) -> tuple[str, str, str]:
        first, second, third = (str(dtype).removeprefix("torch.") for dtype in self)
        return first, second, third

    @property
    def vector(self) -> int:
        """Elements per lane and access: sixteen bytes of the widest dtype."""
        return 16 // max(dtype.itemsize for dtype in self)

    @property
    def tile(self) -> int:
        """Elements that a warp moves at once."""
        return 32 * self.vector

    @property
    def stochastic(self) -> bool:
        """Whether momentum is rounded stochastically."""
        return False


class StochasticTriple(Triple):
    """Momentum is rounded stochastically."""

    @property
    def stochastic(self) -> bool:
        return True


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
TRIPLES = {
    "fp32": Triple(F32, F32, F32),
    "fp64": Triple(F64, F64, F64),
    "bf16": Triple(BF16, BF16, BF16),
    "fp16": Triple(F16, F16, F16),
    "fp32 with bf16 gradients": Triple(F32, BF16, F32),
    "fp32 with fp16 gradients": Triple(F32, F16, F32),
    "fp32 with stochastic bf16 momentum": StochasticTriple(F32, F32, BF16),
    "bf16 with stochastic momentum": StochasticTriple(BF16, BF16, BF16),
}
every_triple = pytest.mark.parametrize(
    "triple", [pytest.param(triple, id=name) for name, triple in TRIPLES.items()]
)

# Blocks that fit the pretended device at once.
GRIDS = {"one block": 1, "two blocks": 2, "seven blocks": 7, "an H200's 660 blocks": 660}
every_grid = pytest.mark.parametrize(
    "resident", [pytest.param(blocks, id=name) for name, blocks in GRIDS.items()]
)


@dataclass(frozen=True)
class Group:
    """Hyper-parameters of one param group, and tensors on the "device" that they live in."""

    lr: float = 0.1
    momentum: float = 0.9
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    device_lr: Tensor | None = None
    rounding_seed: int = 2**64 - 7

    def packed(self) -> tuple[float, float, float, float, bool, bool, int, bool, int]:
        lr = self.device_lr
        return (
            self.lr,
            self.momentum,
            self.dampening,
            self.weight_decay,
            self.nesterov,
            self.maximize,
            0 if lr is None else lr.data_ptr(),
            lr is not None and lr.dtype == torch.float64,
            self.rounding_seed,
        )


@dataclass
class Bordered:
    """An array `offset` bytes after a 128-byte line, in a border that must stay as it is."""

    values: Tensor
    offset: int = 0
    whole: Tensor = field(init=False)
    view: Tensor = field(init=False)

    BORDER = 512

    def __post_init__(self) -> None:
        size = self.values.numel() * self.values.element_size()
        self.whole = torch.full((size + 2 * self.BORDER + 256,), 0x5A, dtype=torch.uint8)
        self.start = self.BORDER + -(self.whole.data_ptr() + self.BORDER) % 128 + self.offset
        self.view = self.whole[self.start : self.start + size].view(self.values.dtype)
        self.view.copy_(self.values)

    def assert_border_untouched(self) -> None:
        size = self.view.numel() * self.view.element_size()
        border = torch.cat([self.whole[: self.start], self.whole[self.start + size :]])
        assert (border == 0x5A).all(), "the kernel wrote outside an array"


# As kernel_on_host takes it: param, grad, momentum, numel, group, index, fresh.
Packed = tuple[int, int, int, int, int, int, bool]


@dataclass
class Update:
    """One parameter with its gradient and momentum buffer."""

    param: Bordered
    grad: Bordered
    momentum: Bordered | None
    group: int = 0
    fresh: bool = False
    index: int = field(default_factory=itertools.count().__next__)

    def packed(self) -> Packed:
        momentum = 0 if self.momentum is None else self.momentum.view.data_ptr()
        numel = self.param.view.numel()
        return (
            self.param.view.data_ptr(),
            self.grad.view.data_ptr(),
            momentum,
            numel,
            self.group,
            self.index,
            self.fresh,
        )


def make(
    numel: int,
    triple: Triple,
    group: int = 0,
    fresh: bool = False,
    offsets: Sequence[int] = (0, 0, 0),
    with_momentum: bool = True,
) -> Update:
    """Random values; a fresh buffer holds NaN, which a read would spread."""
    param, grad, momentum = (torch.randn(numel).to(dtype) for dtype in triple)
    if fresh:
        momentum.fill_(math.nan)
    return Update(
        Bordered(param, offsets[0]),
        Bordered(grad, offsets[1]),
        Bordered(momentum, offsets[2]) if with_momentum else None,
        group,
        fresh,
    )


class Launch(NamedTuple):
    """What one launch took."""

    parameter_bytes: int
    tensors: int
    groups: int
    blocks: int
    table: bytes  # the kernel's parameter


def step(
    updates: Sequence[Update],
    groups: Sequence[Group],
    triple: Triple,
    resident: int = 7,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backwards: bool = False,
    chosen: Sequence[int] | None = None,
) -> list[Launch]:
    """Run the kernel on the host."""
    launches = kernel_on_host.step(
        [update.packed() for update in updates],
        [group.packed() for group in groups],
        triple.names,
        resident,
        grad_scale=0 if grad_scale is None else grad_scale.data_ptr(),
        found_inf=0 if found_inf is None else found_inf.data_ptr(),
        backwards=backwards,
        stochastic=triple.stochastic,
        chosen=chosen,
    )
    return [Launch(**launch) for launch in launches]


def mix_bits(z: int) -> int:
    """The mixer of SplitMix64."""
    mask = 2**64 - 1
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return z ^ (z >> 31)


def rounding_bits(seed: int, index: int, first: int, count: int, buffer: int = 0) -> np.ndarray:
    """The sixteen bits by which elements from `first` on are rounded, worked out apart from C++."""
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15
    key = mix_bits(mix_bits(seed + golden & mask) + (index + 1) * golden & mask)
    place = np.arange(first, first + count, dtype=np.uint64)
    low, high = place.astype(np.uint32), (place >> np.uint64(32)).astype(np.uint32)
    start = (key & 0xFFFFFFFF) ^ (buffer * 0x9E3779B9 & 0xFFFFFFFF)
    stride = (key >> 32 | 1) ^ (buffer * 0x85EBCA6A & 0xFFFFFFFF)
    x = np.uint32(start) + low * np.uint32(stride)
    x ^= x >> np.uint32(16)
    x *= np.uint32(2) * x + np.uint32(1)
    x += high * np.uint32(0x9E3779B9)
    x ^= x >> np.uint32(15)
    x *= np.uint32(2) * x + np.uint32(1)
    return x >> np.uint32(16)


def round_stochastically(values: Tensor, bits: np.ndarray) -> Tensor:
    """fp32 values as bf16: what is cut off and the bits carry, or do not."""
    floats = values.numpy()
    rounded = (floats.view(np.uint32).astype(np.uint64) + bits) >> np.uint64(16)
    rounded[np.isnan(floats)] = 0x7FC0
    return torch.from_numpy(rounded.astype(np.uint16).view(np.int16)).view(BF16)


def expected(
    update: Update, group: Group, triple: Triple, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Parameter, gradient and buffer after stock's step in the arithmetic's type, rounded once."""
    compute = F64 if triple.param == F64 else F32
    param = update.param.values.to(compute)
    grad = update.grad.values.to(compute) / torch.tensor(scale, dtype=compute)
    kept = grad.to(triple.grad)
    buffer = None
    if group.momentum and update.momentum is not None and not update.fresh:
        buffer = update.momentum.values.to(compute)
    buffers = [buffer]
    lr = group.lr if group.device_lr is None else float(group.device_lr)
    sgd(
        [param],
        [grad],
        buffers,
        foreach=False,
        weight_decay=group.weight_decay,
        momentum=group.momentum,
        lr=lr,
        dampening=group.dampening,
        nesterov=group.nesterov,
        maximize=group.maximize,
    )
    after = buffers[0] if group.momentum else None
    if after is not None and triple.stochastic:
        bits = rounding_bits(group.rounding_seed, update.index, 0, after.numel())
        after = round_stochastically(after, bits)
    return param.to(triple.param), kept, None if after is None else after.to(triple.momentum)


def assert_same(actual: Tensor, wanted: Tensor, what: str) -> None:
    """To the last bit, so that -0 is not 0; any NaN equals any other."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    same = (actual.view(integers) == wanted.view(integers)) | (actual.isnan() & wanted.isnan())
    wrong = (~same).nonzero().flatten().tolist()
    assert not wrong, f"{what}: elements {wrong[:8]} of {actual.numel()} differ"


def assert_stepped(
    updates: Iterable[Update], groups: Sequence[Group], triple: Triple, scale: float = 1.0
) -> None:
    """Every array holds what stock's step makes of it, and nothing around it changed."""
    for number, update in enumerate(updates):
        group = groups[update.group]
        wanted = expected(update, group, triple, scale)
        for what, array, want in zip(
            ("param", "grad", "momentum"),
            (update.param, update.grad, update.momentum),
            wanted,
            strict=True,
        ):
            if array is None:
                continue
            array.assert_border_untouched()
            assert_same(
                array.view, array.values if want is None else want, f"{what} of tensor {number}"
            )


HYPERS = {
    "plain": Group(momentum=0),
    "decay": Group(momentum=0, weight_decay=0.01),
    "momentum": Group(),
    "momentum and dampening": Group(dampening=0.3),
    "momentum, decay and dampening": Group(weight_decay=0.01, dampening=0.3),
    "nesterov": Group(nesterov=True),
    "nesterov, decay and maximize": Group(nesterov=True, weight_decay=0.01, maximize=True),
}
FUSED = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
needs_fma = pytest.mark.skipif(
    not FUSED, reason="stock rounds products and sums apart on a CPU without fused multiply-add"
)


class Access(NamedTuple):
    """A run of memory accesses of one width."""

    address: int
    bytes: int
    width: int
    store: bool


def accesses(
    updates: Sequence[Packed],
    triple: Triple,
    resident: int = 1,
    chosen: Sequence[int] | None = None,
    grad_scale: Tensor | None = None,
) -> list[Access]:
    """What the chosen blocks, or all, would touch."""
    runs = kernel_on_host.accesses(
        updates,
        [Group().packed()],
        triple.names,
        resident,
        chosen,
        grad_scale=0 if grad_scale is None else grad_scale.data_ptr(),
        stochastic=triple.stochastic,
    )
    return [Access(*run) for run in runs]
