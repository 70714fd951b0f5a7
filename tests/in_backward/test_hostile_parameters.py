"""Parameters and gradients of all kinds, stepped in backward; see hostile_use.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.hostile_use import (
    Case,
    Make,
    Table,
    Weighted,
    both_tests,
    data,
    is_ordinary,
    net,
    of_parameters,
    randn,
    result,
    train,
)

CASES = Table(__name__)


def _parts(numel: int) -> list[nn.Parameter]:
    """Parts of one storage with a version counter each, as in a flattened model."""
    flat = randn(numel)
    parts = [nn.Parameter(torch.empty(n)) for n in (numel // 4, numel // 2, numel // 4)]
    for p, part in zip(parts, flat.split([len(p) for p in parts]), strict=True):
        p.data = part
    return parts


class PlainSubclass(nn.Parameter):
    pass


class Overriding(Tensor):
    """A tensor whose operators go through Python."""


KINDS: dict[str, Callable[[], list[Tensor]]] = {
    "0-dim": lambda: [torch.tensor(0.5), torch.tensor(2.0), randn(3)],
    "empty": lambda: [torch.ones(0), torch.ones(0, 3), randn(3), torch.ones(2, 0)],
    "empty alone": lambda: [torch.ones(0), torch.ones(0, 3)],
    "complex": lambda: [randn(3, dtype=torch.complex64), randn(4), randn(2, dtype=torch.complex64)],
    "of mixed dtypes": lambda: [
        randn(9, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32)
    ],
    "transposed": lambda: [randn(4, 6).t(), randn(5), randn(6, 4).t()],
    "channels_last": lambda: [
        randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        randn(3, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        randn(8),
    ],
    "strided with gaps": lambda: [randn(8, 8)[::2, ::2], randn(4), randn(9)[::3]],
    "misaligned views": lambda: [randn(33)[1:], randn(18)[3:]],
}


def _kinds() -> Iterator[tuple[str, Case]]:
    def scenario(make: Make, kind: str) -> Any:
        return of_parameters(make, *(nn.Parameter(t) for t in KINDS[kind]()))

    for kind in KINDS:
        yield f"parameters that are {kind}", Case(functools.partial(scenario, kind=kind))


CASES.enter(_kinds())


@CASES.case("parameters that are parts of one memory")
def parts_of_one(make: Make) -> Any:
    return of_parameters(make, *_parts(24))


@CASES.case("parameters that share memory")
def share_memory(make: Make) -> Any:
    base = randn(10)
    parts = [nn.Parameter(base[0:6]), nn.Parameter(base[4:10]), nn.Parameter(randn(4, seed=1))]
    return of_parameters(make, *parts)


@CASES.case("parameters that are the same memory in other shapes")
def share_all_memory(make: Make) -> Any:
    base = randn(6)
    parts = [nn.Parameter(base), nn.Parameter(base[2:4]), nn.Parameter(base.view(2, 3))]
    return of_parameters(make, *parts)


@CASES.case("a parameter listed twice in a group")
def listed_twice(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    optimizer.param_groups[0]["params"].append(model[2].weight)
    return train(model, optimizer)


@CASES.case("a parameter in two groups of different lr")
def in_two_groups(make: Make) -> Any:
    model = net()
    optimizer = make(model.parameters())
    optimizer.param_groups.append(
        optimizer.param_groups[0] | {"params": [model[2].weight, model[0].bias], "lr": 0.03}
    )
    return train(model, optimizer)


@CASES.case("parameters of a subclass")
def of_a_subclass(make: Make) -> Any:
    return of_parameters(make, PlainSubclass(randn(3)), nn.Parameter(randn(4)))


@CASES.case("parameters whose operators go through Python")
def overriding(make: Make) -> Any:
    first = nn.Parameter(randn(3).as_subclass(Overriding))
    return of_parameters(make, first, nn.Parameter(randn(4)), nn.Parameter(randn(5)))


@CASES.case("gradients of another dtype than their parameters", sgd_only=True)
def other_grad_dtype(make: Make) -> Any:
    params = [nn.Parameter(randn(7)), nn.Parameter(randn(5)), nn.Parameter(randn(4))]
    params[0].grad_dtype = torch.bfloat16  # type: ignore[attr-defined]
    params[1].grad_dtype = torch.float64  # type: ignore[attr-defined]
    return of_parameters(make, *params)


@CASES.case("expanded gradients")
def expanded(make: Make) -> Any:
    model = Weighted(nn.Parameter(randn(4, 3)), nn.Parameter(randn(5)), nn.Parameter(randn(2, 2)))
    return train(model, make(model.parameters()), loss=lambda m, s: sum(p.sum() for p in m.all))


@CASES.case("expanded gradients, clipped")
def expanded_clipped(make: Make) -> Any:
    params = [nn.Parameter(randn(4, 3)), nn.Parameter(randn(5))]
    model = Weighted(*params)
    optimizer = make(model.parameters(), **({"clip_value": 0.25} if not is_ordinary(make) else {}))
    for _ in range(2):
        optimizer.zero_grad()
        sum(p.sum() for p in params).backward()  # type: ignore[union-attr]
        if is_ordinary(make):
            for p in params:
                assert p.grad is not None
                p.grad = p.grad.clone()
            torch.nn.utils.clip_grad_value_(params, 0.25)
        optimizer.step()
    return result(model, optimizer)


@CASES.case("parameters that are used by a frozen layer's gradient")
def frozen_between(make: Make) -> Any:
    model = net()
    model[2].requires_grad_(False)
    return train(model, make(model.parameters()))


@CASES.case("lazy parameters")
def lazy(make: Make) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.LazyLinear(6))
    optimizer = make(model.parameters())
    model(data())
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(randn(*p.shape, seed=i))
    return train(model, optimizer)


(
    test_hostile_use_gives_the_ordinary_steps_bits_or_an_error,
    test_the_ordinary_step_raises_only_where_nobody_can_step,
) = both_tests(CASES)
