"""Tables, oracle and runner shared by the optimizer's tests.

One oracle (`Reference`), one comparison (`assert_same_training`), and the tables that the tests
cross with dtype and device. Every table is a dict whose keys are the words of the pytest ids.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import _get_scalar_dtype
from torch.optim.sgd import sgd

from torch_freeze import FrozenAwareAdam, FrozenAwareAdamW, FrozenAwareSGD
from torch_freeze._state_names import ADAM as ADAM_NAMES
from torch_freeze._state_names import SGD as SGD_NAMES
from torch_freeze._state_names import StateNames

Hyper = dict[str, Any]

WIDE_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
NARROW_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = WIDE_DTYPES | NARROW_DTYPES

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

# Every residue of the vector widths (4 to 64 lanes), one size above the usual grain of a parallel
# loop, and one that is a multiple of neither a vector nor a cache line.
SIZES = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 1000, 4099, 70001)

_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def _hyper_name(hyper: Hyper) -> str:
    words = [f"lr {hyper['lr']}"]
    for key, word in (("momentum", "momentum"), ("dampening", "dampening")):
        if hyper[key]:
            words.append(f"{word} {hyper[key]}")
    if hyper["weight_decay"]:
        words.append(f"decay {hyper['weight_decay']}")
    words += [flag for flag in ("nesterov", "maximize") if hyper[flag]]
    return ", ".join(words)


def _hyper_table() -> dict[str, Hyper]:
    table = {}
    for momentum, dampening, decay, nesterov, maximize in itertools.product(
        (0, 0.9), (0, 0.3), (0, 1e-2), (False, True), (False, True)
    ):
        if nesterov and (momentum == 0 or dampening != 0):
            continue
        hyper = {
            "lr": 0.1,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        table[_hyper_name(hyper)] = hyper
    base = {
        "lr": 0.1,
        "momentum": 0,
        "dampening": 0,
        "weight_decay": 0,
        "nesterov": False,
        "maximize": False,
    }
    for change in (
        {"lr": 0.0, "momentum": 0.9},
        {"lr": 1e-3, "momentum": 1.0, "dampening": 1.0},
        {"lr": 1, "momentum": 1},
        {"lr": 7.3e-4, "momentum": 0.99, "dampening": -0.5, "weight_decay": 5e-4},
        {"lr": 0.3333333333333333, "momentum": 1.5, "weight_decay": 2.0, "nesterov": True},
        {"lr": 1e-45, "momentum": 0.9, "weight_decay": 1e-30},
    ):
        hyper = base | change
        table[_hyper_name(hyper)] = hyper
    return table


HYPERS = _hyper_table()

# The corners of the table above, for tests whose subject is something else.
SOME_HYPERS: dict[str, Hyper] = {
    "plain": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "momentum, dampening and decay": {
        "lr": 0.05,
        "momentum": 0.9,
        "dampening": 0.3,
        "weight_decay": 1e-2,
    },
    "nesterov, decay and maximize": {
        "lr": 0.05,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 1e-2,
        "maximize": True,
    },
}


def ids(table: dict[str, Any]) -> list[Any]:
    """The table's values as pytest parameters named by its keys; a tuple is several arguments."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), id=name)
        for name, value in table.items()
    ]


class _Reference(torch.optim.Optimizer):
    """What an optimizer here must equal: stock's for-loop, frozen tensors left out.

    bf16 and fp16 tensors are widened to fp32, stepped by the same stock code and rounded once. On
    CUDA stock's foreach form takes the place of its for-loop. No part of the project is used.
    """

    buffers: tuple[str, ...]

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            if not p.requires_grad:
                p.grad = None
        live = [p for p in group["params"] if p.grad is not None]
        # Read before anything is stepped, as stock does: a duplicate sees its first buffer late.
        states = [self._state_before(group, p) for p in live]
        for p, state in zip(live, states, strict=True):
            after = self._step_tensor(group, p, state)
            if after:
                self.state[p].update(after)

    def _step_tensor(
        self, group: dict[str, Any], p: Tensor, state: dict[str, Any]
    ) -> dict[str, Any]:
        grad = p.grad
        assert grad is not None
        # A stock implementation that was asked for by name rounds as stock does.
        by_name = group["foreach"] is not None or group["fused"] is False
        narrow = p.dtype in NARROW_DTYPES.values() and not grad.is_sparse and not by_name
        foreach = bool(group["foreach"]) if by_name else p.is_cuda
        if not narrow:
            return self._functional(group, p, grad, state, foreach)
        wide_p = p.detach().float()
        wide = {
            k: v.float() if k in self.buffers and v is not None else v for k, v in state.items()
        }
        after = self._functional(group, wide_p, grad.float(), wide, foreach)
        p.copy_(wide_p)
        for key in self.buffers:
            if after.get(key) is not None:
                old = state.get(key)
                rounded = after[key].to(grad.dtype)
                after[key] = rounded if old is None else old.copy_(rounded)
        return after

    def _state_before(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        """The state that a step of `p` starts from, by its keys."""
        raise NotImplementedError

    def _functional(
        self,
        group: dict[str, Any],
        p: Tensor,
        grad: Tensor,
        state: dict[str, Any],
        foreach: bool,
    ) -> dict[str, Any]:
        """Step `p` by stock's functional form, and return its new state."""
        raise NotImplementedError


class Reference(_Reference, torch.optim.SGD):
    """What FrozenAwareSGD must equal."""

    buffers = ("momentum_buffer",)

    def _state_before(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        if group["momentum"] == 0:
            return {}
        return {"momentum_buffer": self.state[p].get("momentum_buffer")}

    def _functional(
        self,
        group: dict[str, Any],
        p: Tensor,
        grad: Tensor,
        state: dict[str, Any],
        foreach: bool,
    ) -> dict[str, Any]:
        buffers = [state.get("momentum_buffer")]
        sgd(
            [p],
            [grad],
            buffers,
            has_sparse_grad=grad.is_sparse,
            foreach=foreach,
            fused=False,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        return {"momentum_buffer": buffers[0]} if group["momentum"] != 0 else {}


class _AdamReference(_Reference):
    buffers = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def _state_before(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        if "step" not in state:
            on_device = group["capturable"] or group["fused"]
            dtype = _get_scalar_dtype(is_fused=group["fused"])
            state["step"] = torch.zeros((), dtype=dtype, device=p.device if on_device else "cpu")
        for name in self.buffers[: 3 if group["amsgrad"] else 2]:
            if name not in state:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return dict(state)

    def _functional(
        self,
        group: dict[str, Any],
        p: Tensor,
        grad: Tensor,
        state: dict[str, Any],
        foreach: bool,
    ) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        adam(
            [p],
            [grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [state["max_exp_avg_sq"]] if group["amsgrad"] else [],
            [state["step"]],
            foreach=foreach,
            capturable=group["capturable"],
            differentiable=False,
            fused=False,
            has_complex=p.is_complex(),
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            decoupled_weight_decay=group["decoupled_weight_decay"],
        )
        return state


class AdamReference(_AdamReference, torch.optim.Adam):
    """What FrozenAwareAdam must equal."""


class AdamWReference(_AdamReference, torch.optim.AdamW):
    """What FrozenAwareAdamW must equal."""


def _adam_hypers() -> dict[str, Hyper]:
    table = {}
    for decay, amsgrad, maximize in itertools.product((0, 1e-2), (False, True), (False, True)):
        hyper = {"lr": 0.01, "weight_decay": decay, "amsgrad": amsgrad, "maximize": maximize}
        words = [f"decay {decay}"] * bool(decay) + ["amsgrad"] * amsgrad + ["maximize"] * maximize
        table[", ".join(words) or "defaults"] = hyper
    return table | {
        "lr 0": {"lr": 0.0},
        "betas 0": {"lr": 0.1, "betas": (0.0, 0.0), "weight_decay": 0.5},
        "beta1 below a half": {"lr": 0.1, "betas": (0.4, 0.9), "eps": 1e-3, "amsgrad": True},
        "beta1 at a half": {"lr": 0.1, "betas": (0.5, 0.99)},
        "eps 0": {"lr": 0.1, "eps": 0.0},
        "lr and eps 1, an int": {"lr": 1, "eps": 1, "weight_decay": 1},
        "tiny": {"lr": 1e-45, "weight_decay": 1e-30, "eps": 1e-45},
    }


class Family(NamedTuple):
    """One optimizer here with all that its tests need."""

    ours: Any
    stock: Any
    reference: Any
    hypers: dict[str, Hyper]
    some_hypers: dict[str, Hyper]  # its corners, for tests whose subject is something else
    state: StateNames
    exact_on_cuda: bool  # the bits of stock's foreach form
    with_state: Hyper  # hyper-parameters under which every parameter that trains has a state

    @property
    def name(self) -> str:
        """The name of our class."""
        return str(self.ours.__name__)

    def exact_on(self, device: str, *, fused: bool = False) -> bool:
        """Whether results on a device have the reference's bits."""
        return (device == "cpu" and not fused) or self.exact_on_cuda

    def buffers(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The keys of the tensors that a group's hyper-parameters make the state hold."""
        if self.ours is FrozenAwareSGD:
            return self.state.buffers if group.get("momentum") else ()
        return self.state.buffers[: 3 if group.get("amsgrad") else 2]

    def keys(self, group: dict[str, Any]) -> list[str]:
        """The keys of the whole state, in stock's order."""
        count = () if self.state.counter is None else (self.state.counter,)
        return [*count, *self.buffers(group)]


SGD = Family(
    FrozenAwareSGD,
    torch.optim.SGD,
    Reference,
    HYPERS,
    SOME_HYPERS,
    SGD_NAMES,
    True,
    SOME_HYPERS["momentum, dampening and decay"],
)
_SOME_ADAM_HYPERS: dict[str, Hyper] = {
    "defaults": {},
    "decay": {"lr": 0.05, "weight_decay": 0.1},
    "amsgrad, decay and maximize": {
        "lr": 0.05,
        "betas": (0.8, 0.95),
        "weight_decay": 0.1,
        "amsgrad": True,
        "maximize": True,
    },
}
ADAM = Family(
    FrozenAwareAdam,
    torch.optim.Adam,
    AdamReference,
    _adam_hypers(),
    _SOME_ADAM_HYPERS,
    ADAM_NAMES,
    False,
    _SOME_ADAM_HYPERS["decay"],
)
ADAMW = ADAM._replace(ours=FrozenAwareAdamW, stock=torch.optim.AdamW, reference=AdamWReference)
FAMILIES = {"SGD": SGD, "Adam": ADAM, "AdamW": ADAMW}


# Adam's formula differs from AdamW's by its decay alone: slow tests of anything else leave it out.
UNLIKE_FAMILIES = {name: family for name, family in FAMILIES.items() if name != "Adam"}


def per_family(
    table: Callable[[Family], dict[str, Any]], families: dict[str, Family] = FAMILIES
) -> list[Any]:
    """(family, value) for each value of the family's table, named by both."""
    return [
        pytest.param(family, value, id=f"{name}: {key}")
        for name, family in families.items()
        for key, value in table(family).items()
    ]


def each_family(families: dict[str, Family] = FAMILIES) -> list[Any]:
    """The families as pytest parameters."""
    return [pytest.param(family, id=name) for name, family in families.items()]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def _pool() -> Tensor:
    gen = generator(99)
    values = torch.randn(1 << 20, generator=gen, dtype=torch.float64)
    return values * 10.0 ** torch.randint(-5, 3, values.shape, generator=gen, dtype=torch.float64)


def randn(
    shape: Sequence[int] | int,
    gen: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Tensor:
    """Normal numbers over eight decades, so that sums are rounded in every way.

    Slices of one pool, because drawing new numbers would cost more than the steps under test.
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    count = math.prod(shape)
    start = int(torch.randint(_pool().numel() - count, (), generator=gen))
    values = _pool()[start : start + count].reshape(shape)
    return values.to(device=device, dtype=dtype, copy=True)


def make_parameters(
    sizes: Sequence[Sequence[int] | int],
    gen: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(randn(size, gen, dtype, device)) for size in sizes]


def twin(params: Sequence[Tensor]) -> list[torch.nn.Parameter]:
    """Copies with the same bits, strides and requires_grad."""
    copies = []
    for p in params:
        copy = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=p.device)
        copy.copy_(p.detach())
        copies.append(torch.nn.Parameter(copy, requires_grad=p.requires_grad))
    return copies


def set_grads(
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
    gen: torch.Generator,
    skip: Callable[[int], bool] = lambda index: False,
) -> None:
    """Give each pair the same new gradient in the parameter's layout; none where skipped.

    It has no -0.0, of which stock's vectors and tails make zeros of different signs if beta1 is 0.
    """
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        grad = randn(a.shape, gen, a.dtype, str(a.device)) + 0.0
        a.grad = None if skip(index) else torch.empty_like(a).detach().copy_(grad)
        b.grad = None if skip(index) else torch.empty_like(b).detach().copy_(grad)


def negated(value: float, device: str) -> Tensor:
    """A tensor whose negation is pending, so that its bytes are those of another number."""
    number = torch.complex(torch.tensor(0.0), torch.tensor(-value)).to(device).conj().imag
    assert number.is_neg() and float(number) == value
    return number


class WithoutMemory(Tensor):
    """A number on a device that only its own operators can read, like a DTensor."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> WithoutMemory:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unwrap = lambda x: x.inner if isinstance(x, WithoutMemory) else x  # noqa: E731
        result = func(*map(unwrap, args), **(kwargs or {}))
        if func in (torch.ops.aten.detach.default, torch.ops.aten._to_copy.default):
            return WithoutMemory(result)
        return result


# Numbers on a device that are not what their bytes say: (value, device) -> a tensor.
ODD_NUMBERS: dict[str, Callable[[float, str], Tensor]] = {
    "a pending negation": negated,
    "no memory": lambda value, device: WithoutMemory(torch.tensor(value, device=device)),
}


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers, so that -0.0 differs from 0.0 and NaN equals itself."""
    tensor = tensor.detach().resolve_neg().resolve_conj()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.contiguous().view(_BITS[tensor.dtype])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def describe_difference(a: Tensor, b: Tensor) -> str:
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{a.dtype} {list(a.shape)} against {b.dtype} {list(b.shape)}"
    where = (bits(a) != bits(b)).flatten().nonzero().flatten()
    first = where[:4].tolist()
    flat_a, flat_b = a.detach().flatten(), b.detach().flatten()
    samples = [(i, flat_a[i].item(), flat_b[i].item()) for i in first if i < flat_a.numel()]
    return f"{len(where)} of {a.numel()} elements differ, (index, got, wanted): {samples}"


def buffer_of(optimizer: torch.optim.Optimizer, p: Tensor, key: str = "momentum_buffer") -> Any:
    """A tensor of the state, without the entry that an indexing defaultdict would make."""
    return optimizer.state[p].get(key) if p in optimizer.state else None


def assert_same_bits(a: Tensor | None, b: Tensor | None, what: str) -> None:
    if a is None or b is None:
        assert a is None and b is None, f"{what}: {a} against {b}"
        return
    assert same_bits(a, b), f"{what}: {describe_difference(a, b)}"


def assert_same_training(
    optimizer: torch.optim.Optimizer,
    reference: torch.optim.Optimizer,
    what: str = "",
    *,
    exact: bool = True,
    arithmetic: torch.dtype | None = None,
    ignore: tuple[str, ...] = (),
) -> None:
    """Parameters, buffers, state keys and hyper-parameters are equal, bit for bit.

    Unless that is to be `exact`, tensors may differ by a few roundings of their largest element,
    because one that goes the other way shifts the next; `arithmetic` is its dtype if it is coarser
    than theirs. Groups may differ in `foreach`, `fused` and
    what is to be ignored.
    """

    def assert_same(a: Tensor | None, b: Tensor | None, name: str) -> None:
        if exact or a is None or b is None:
            assert_same_bits(a, b, name)
        else:
            assert a.dtype == b.dtype and a.shape == b.shape, name
            finite = b.isfinite()
            assert torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()), name
            rounded_to = arithmetic or a.dtype
            roundings = 8 if rounded_to in NARROW_DTYPES.values() else 256
            tolerance = roundings * torch.finfo(rounded_to).eps
            assert_close(a[finite], b[finite], name, tolerance)

    assert len(optimizer.param_groups) == len(reference.param_groups)
    for g, (ours, theirs) in enumerate(
        zip(optimizer.param_groups, reference.param_groups, strict=True)
    ):
        pairs = zip(ours["params"], theirs["params"], strict=True)
        for i, (p, q) in enumerate(pairs):
            name = f"{what} param_groups[{g}] params[{i}]"
            assert_same(p, q, name)
            assert p.requires_grad == q.requires_grad, name
            assert (p in optimizer.state) == (q in reference.state), f"{name}: state entry"
            if p in optimizer.state:
                assert list(optimizer.state[p]) == list(reference.state[q]), f"{name}: state keys"
            for key in reference.state.get(q, ()):
                held = buffer_of(optimizer, p, key), buffer_of(reference, q, key)
                if key == "step":  # on the host or the device
                    held = held[0].cpu(), held[1].cpu()
                if isinstance(held[1], Tensor):
                    assert_same(*held, f"{name} {key}")
                else:
                    assert held[0] == held[1], f"{name} {key}"
        assert ours.keys() == theirs.keys()
        for key in ours:
            if key not in ("params", "foreach", "fused", *ignore):
                assert ours[key] == theirs[key], f"{what} param_groups[{g}][{key!r}]"


def assert_close(a: Tensor, b: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance` of the largest element: the bar where stock itself rounds freely."""
    a, b = a.detach().double(), b.detach().double()
    scale = b.abs().max().item() if b.numel() else 0.0
    error = (a - b).abs().max().item() if b.numel() else 0.0
    assert error <= tolerance * scale, f"{what}: off by {error} at scale {scale}"


class Snapshot:
    """Everything a step may write, to prove that a failed one wrote nothing.

    Bits and versions of every parameter, gradient and buffer, the identity of each tensor, the keys
    of the state and the hyper-parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.before = self._take()

    def _take(self) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for g, group in enumerate(self.optimizer.param_groups):
            seen[f"group {g}"] = sorted((k, repr(v)) for k, v in group.items() if k != "params")
            for i, p in enumerate(group["params"]):
                name = f"param_groups[{g}] params[{i}]"
                seen[name] = self._tensor(p)
                seen[f"{name} grad"] = self._tensor(p.grad)
                if p in self.optimizer.state:
                    entry = self.optimizer.state[p]
                    seen[f"{name} state keys"] = list(entry)
                    for key, value in entry.items():
                        seen[f"{name} {key}"] = self._tensor(value)
                else:
                    seen[f"{name} state keys"] = None
        seen["state entries"] = len(self.optimizer.state)
        return seen

    @staticmethod
    def _tensor(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        version = None if tensor.is_inference() else tensor._version
        if tensor.is_meta:
            return id(tensor), version, None
        dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
        return (
            id(tensor),
            version,
            dense.double().flatten().tolist()
            if not (dense.is_complex())
            else dense.flatten().tolist(),
        )

    def assert_unchanged(self) -> None:
        after = self._take()
        assert after.keys() == self.before.keys()
        for name, value in after.items():
            assert repr(value) == repr(self.before[name]), f"{name} has changed"


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_groups(params: Sequence[Tensor], count: int) -> list[dict[str, Any]]:
    """Groups that share the parameters round robin, each with a learning rate of its own."""
    return [{"params": list(params[i::count]), "lr": 0.1 / (i + 1)} for i in range(count)]


# The most steps that check_hyper() makes: fewer under --pairwise.
most_steps = 20
# In so many, each tensor begins, is without a gradient in one of five steps, and goes on.
FEW_STEPS = 6


def check_hyper(
    hyper: Hyper,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    steps: int = 20,
    groups: int = 1,
    sizes: Sequence[int] = SIZES,
    stock: bool = True,
    family: Family = SGD,
    fused: bool | None = None,
) -> None:
    """Train the same tensors with an optimizer and its oracle; every step must agree in bits.

    `stock` compares with stock's own optimizer (`foreach=False`; CUDA: `foreach=True`), else with
    the family's reference, which knows about frozen tensors and rounds bf16 and fp16 once. Ours
    is made with `fused`.
    """
    gen = generator(1234)
    ours = make_parameters(sizes, gen, dtype, device)
    theirs = twin(ours)
    # A hyper-parameter named in a group would shadow the table's.
    split = [ours[i::groups] for i in range(groups)], [theirs[i::groups] for i in range(groups)]
    optimizer = family.ours([{"params": part} for part in split[0]], **hyper, fused=fused)
    make = family.stock if stock else family.reference
    kwargs = {"foreach": device == "cuda"} if stock else {}
    reference = make([{"params": part} for part in split[1]], **hyper, **kwargs)
    for step in range(min(steps, most_steps)):
        set_grads(ours, theirs, gen, skip=lambda i, step=step: (i + step) % 5 == 0)
        optimizer.step()
        reference.step()
        assert_same_training(
            optimizer,
            reference,
            f"after step {step + 1}:",
            exact=family.exact_on(device, fused=bool(fused)),
        )


def main() -> int:
    """Run the exact table in this process and print what differs (see optim/test_exact.py)."""
    print(torch.backends.cpu.get_cpu_capability())
    failed = 0
    for (family_name, family), (dtype_name, dtype) in itertools.product(
        FAMILIES.items(), WIDE_DTYPES.items()
    ):
        for name, hyper in family.hypers.items():
            try:
                check_hyper(hyper, dtype, steps=4, family=family)
            except AssertionError as error:
                failed += 1
                print(f"{family_name}, {dtype_name}, {name}: {error}")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 99))
