"""Whether a contestant computes what stock computes.

A step is checked on copies of the parameters, with the same gradients for everyone. Whole training
runs cannot be compared so: rounding alone drives two runs of one network apart (a batch norm over
two images multiplies the last bit by thousands), and on a GPU no two runs are alike. There, stock
is given each contestant's own gradients and has to arrive at the same weights and state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checks import require
from .contestants import Contestant, Family, Hyper, Trainer, hook_on
from .workloads import Workload

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.uint8: 2**-5}
"""Largest difference in five steps that rounding explains, relative to the largest value of the
same tensor. Stock's unfused forms round to bfloat16 after every operation."""
NARROW_PARAMETER = 2**-5
"""The same for a parameter in bfloat16: a step of AdamW moves it by about one spacing of that type
(2**-7 of it) or not at all, and so may be off by one."""
EXACT = 1e-6
"""What another order of operations explains in float32 with equal gradients."""
_SCALES = (1.0, -0.5, 0.75, 0.25, 1.0)
"""Each step's gradient is a multiple of the first one: signs and sizes change without memory for
five. They do not cancel in the momentum, which would leave only its rounding."""


class Equality(NamedTuple):
    """How far a contestant ends from stock after the same steps."""

    gap: float
    """The largest difference over the largest value; 0 if every bit is the same."""
    tolerance: float
    """The largest gap that rounding explains."""

    @property
    def holds(self) -> bool:
        """Equal, or no further away than rounding explains."""
        return self.gap <= self.tolerance


def largest(values: Tensor) -> float:
    """The largest absolute value, infinite if there is a NaN."""
    found = torch.linalg.vector_norm(values, float("inf")).item() if values.numel() else 0.0
    return found if found == found else float("inf")


def gap(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest difference in a tensor over the largest value in it; a NaN is infinite."""
    widest = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if not torch.equal(a, b):
            off, scale = largest(a - b), largest(b)
            widest = max(widest, off / scale if 0 < scale < float("inf") else float("inf"))
    return widest


def twin(tensor: Tensor) -> Tensor:
    """A copy that lies as far from the beginning of a cache line."""
    shift = tensor.data_ptr() % 64 // tensor.element_size()
    if not shift:
        return tensor.clone()
    room = torch.empty(tensor.numel() + shift, dtype=tensor.dtype, device=tensor.device)
    return room[shift:].view(tensor.shape).copy_(tensor)


def some_steps(contestant: Contestant, family: Family, workload: Workload) -> list[Tensor]:
    """The parameters and their state after five steps on copies."""
    copies = [
        [nn.Parameter(twin(p.detach()), requires_grad=p.requires_grad) for p in group]
        for group in workload.groups
    ]
    flat = [p for group in copies for p in group]
    trainer = contestant.build(family, copies, workload.hyper)
    for scale in _SCALES:
        for p, original in zip(flat, workload.parameters, strict=True):
            if original.grad is not None:
                if p.grad is None:
                    p.grad = twin(original.grad)
                torch.mul(original.grad, scale, out=p.grad)
        trainer.step()
    moved = [p.detach() for p in flat]
    for key in family.buffers(workload.hyper):
        moved += [trainer.buffers(p).get(key, torch.empty(0)) for p in flat]
    return moved


def check_equality(
    contestant: Contestant, family: Family, workload: Workload, expected: Sequence[Tensor]
) -> Equality:
    """Compare weights and state after five steps with those of the reference."""
    found = gap(some_steps(contestant, family, workload), expected)
    dtype = workload.trainable[0].dtype
    return Equality(found, NARROW_PARAMETER if dtype == torch.bfloat16 else TOLERANCES[dtype])


def tolerance(contestant: Contestant, dtype: torch.dtype) -> float:
    """The largest difference that rounding explains, relative to the model's largest value."""
    narrow = min(contestant.precision, dtype, key=lambda kind: kind.itemsize)
    return EXACT if narrow == torch.float32 else TOLERANCES[narrow]


def _writer(numpy: Any, entries: list[Any], place: int) -> Callable[[Tensor], None]:
    """A hook that does not hold its parameter, which could then never be freed."""

    def arrived(p: Tensor) -> None:
        grad, page = p.grad, entries[-1]
        if grad is not None and isinstance(page, dict):
            raw = grad.view(torch.int16) if grad.dtype == torch.bfloat16 else grad
            page[place] = numpy.array(raw.detach().cpu().numpy(), order="K", copy=True)

    return arrived


class Journal:
    """Every gradient of a run, kept in memory that torch's allocators do not count.

    Make it before the optimizer, so that its hooks run before the optimizer's.
    """

    def __init__(self, model: nn.Module, every: int = 1) -> None:
        """Record the gradients of every ``every``-th parameter only."""
        self._parameters = list(model.parameters())
        self._written = range(0, len(self._parameters), every)
        # Of each iteration the gradients, by place; of each change the places that train from then.
        self._entries: list[dict[int, Any] | frozenset[int]] = []
        numpy = require("numpy", "numpy", "the memory suite")
        for place in self._written:
            hook_on(self._parameters[place], _writer(numpy, self._entries, place))

    def begin_iteration(self) -> None:
        """The gradients that arrive from now on belong to another iteration."""
        self._entries.append({})

    def note_change(self) -> None:
        """The frozen set has changed."""
        trains = (place for place, p in enumerate(self._parameters) if p.requires_grad)
        self._entries.append(frozenset(trains))

    def check(
        self,
        start: Sequence[Tensor],
        owned: Iterable[Tensor],
        trainer: Trainer,
        contestant: Contestant,
        family: Family,
        hyper: Hyper,
    ) -> Equality:
        """Let stock repeat the run from ``start``, one parameter after the other, and compare.

        What the trainer did not own must not have moved.
        """
        mine = {id(p) for p in owned}
        gaps: dict[str, float] = {}
        scales: dict[str, float] = {}
        for place in self._written:
            p = self._parameters[place]
            shadow = nn.Parameter(start[place].detach().clone())
            stock = family.stock([shadow], **hyper, foreach=False)
            if id(p) in mine:
                self._repeat(place, shadow, stock, contestant)
            pairs = {"weights": (p.detach(), shadow.detach())}
            if p.requires_grad and id(p) in mine:
                state, found = stock.state.get(shadow, {}), trainer.buffers(p)
                for key in family.buffers(hyper):
                    if (key in state) != (key in found):
                        return Equality(float("inf"), 0.0)
                    if key in state:
                        pairs[key] = found[key], state[key]
            for kind, (a, b) in pairs.items():
                if a.dtype != b.dtype or not torch.equal(a, b):
                    gaps[kind] = max(gaps.get(kind, 0.0), largest(a - b))
                scales[kind] = max(scales.get(kind, 0.0), largest(b))
        widest = max((g / (scales[kind] or 1.0) for kind, g in gaps.items()), default=0.0)
        return Equality(widest, tolerance(contestant, start[0].dtype))

    def _repeat(
        self, place: int, shadow: nn.Parameter, stock: torch.optim.Optimizer, contestant: Contestant
    ) -> None:
        for entry in self._entries:
            if isinstance(entry, frozenset):
                rests = place not in entry
                if contestant.after == "rebuilds" or (contestant.after == "restarts" and rests):
                    stock.state.clear()
            elif place in entry:
                grad = torch.from_numpy(entry[place])
                if shadow.dtype == torch.bfloat16:
                    grad = grad.view(torch.bfloat16)
                shadow.grad = grad.to(shadow.device)
                stock.step()
