"""No leak: of tensors, dicts, hooks or memory, over 10,000 steps and 1,000 optimizers.

Reference counts and the garbage collector's list of objects are exact; the resident memory of the
process is a margin wide enough for malloc.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import mmap
import resource
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.helpers import optim_cases as cases
from torch_freeze import freeze, guard, unfreeze

FAMILIES = cases.each_family(cases.UNLIKE_FAMILIES)

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def objects() -> collections.Counter[str]:
    """How many objects of each type are alive."""
    gc.collect()
    return collections.Counter(type(o).__name__ for o in gc.get_objects())


def grown(run: Callable[[], Any]) -> dict[str, int]:
    """Types with more objects after `run`, once everything has run and filled its caches.

    A leak shows every time. The collector decides late which tuples it need not track, but it does
    not find one more of them three times in a row.
    """
    run()
    least: dict[str, int] = {}
    for attempt in range(3):
        before = objects()
        run()
        after = objects()
        more = {
            name: after[name] - before[name]
            for name in after
            if after[name] > before[name] and name not in ("frame", "Counter", "cell")
        }
        least = more if attempt == 0 else {n: min(least[n], more[n]) for n in least if n in more}
    return least


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(8, 8)
        self.norm = torch.nn.BatchNorm1d(8)
        self.b = torch.nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.norm(self.a(x)))


def _small(family: cases.Family, count: int = 30, size: int = 64) -> tuple[Any, list[Any]]:
    params = cases.make_parameters([size] * count, cases.generator(0))
    return family.ours(cases.in_groups(params, 3), **family.with_state), params


def _steps(count: int, family: cases.Family) -> None:
    optimizer, params = _small(family)
    grads = [torch.ones_like(p) for p in params]
    for step in range(count):
        for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
            p.requires_grad_((step + i) % 7 != 0)
            p.grad = grad
        optimizer.step()


def _failing_steps(count: int, family: cases.Family) -> None:
    optimizer, params = _small(family)
    for p in params:
        p.grad = torch.ones_like(p)
    params[-1].grad.data = torch.ones(3)
    for _ in range(count):
        with contextlib.suppress(ValueError):
            optimizer.step()


def _stocks_form_steps(count: int, family: cases.Family) -> None:
    optimizer, params = _small(family, 6)
    optimizer.param_groups[0]["foreach"] = False
    for _ in range(count):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()


def _hooked_steps(count: int, family: cases.Family) -> None:
    optimizer, params = _small(family, 6)
    for _ in range(count):
        handle = optimizer.register_step_post_hook(lambda *_: None)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step(lambda: 1.0)
        handle.remove()
    assert not optimizer._optimizer_step_post_hooks


def _scaled_steps(count: int, family: cases.Family) -> None:
    optimizer, params = _small(family, 6)
    optimizer.grad_scale = torch.tensor(2.0)
    for step in range(count):
        optimizer.found_inf = torch.tensor(float(step % 2))
        for p in params:
            p.grad = torch.ones_like(p).expand_as(p)
        optimizer.step()


def _optimizers(count: int, family: cases.Family) -> None:
    for _ in range(count):
        optimizer, params = _small(family, 5, 2000)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()


def _checkpoints(count: int, family: cases.Family) -> None:
    optimizer, params = _small(family, 5)
    for _ in range(count):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())


def _policies(count: int, family: cases.Family) -> None:
    """State is dropped, made again, marked as stale and started over."""
    optimizer, params = _small(family, 6)
    for group, policy in zip(optimizer.param_groups, ("keep", "reset", "drop"), strict=True):
        group[family.state.policy] = policy
    for step in range(count):
        for i, p in enumerate(params):
            p.requires_grad_((step + i) % 3 != 0)
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.zero_grad()


def _frozen_and_thawed(count: int) -> None:
    model = Net()
    for _ in range(count):
        freeze(model, "a", "norm")
        with guard(model):
            model(torch.ones(4, 8))
        unfreeze(model)


CHURN: dict[str, tuple[Callable[[int, cases.Family], None], int]] = {
    "10,000 steps, freezing as they go": (_steps, 10_000),
    "steps that raise": (_failing_steps, 3000),
    "steps in stock's form": (_stocks_form_steps, 500),
    "steps with hooks and closures": (_hooked_steps, 500),
    "steps under a GradScaler": (_scaled_steps, 2000),
    "1,000 optimizers": (_optimizers, 1000),
    "checkpoints": (_checkpoints, 500),
    "policies for frozen state": (_policies, 2000),
}


@linux
@pytest.mark.parametrize(("churn", "count"), cases.ids(CHURN))
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_grows(
    family: cases.Family, churn: Callable[[int, cases.Family], None], count: int
) -> None:
    """Twice as many leave the same number of objects and at most 8 MiB: a leak of 1 kB shows."""
    check_growth(lambda times: churn(times, family), count)


@linux
def test_nothing_grows_by_freezing_and_unfreezing() -> None:
    check_growth(_frozen_and_thawed, 200)


def check_growth(churn: Callable[[int], None], count: int) -> None:
    more = grown(lambda: churn(20))
    assert not more, more
    churn(count // 10)
    before = resident()
    churn(count)
    assert resident() - before < 8 << 20


def test_a_leak_would_be_seen() -> None:
    """Checks the measures themselves."""
    kept: list[Any] = []
    assert grown(lambda: kept.append(_small(cases.SGD, 5))).get("Parameter", 0) == 5
    if sys.platform.startswith("linux"):
        before = resident()
        fresh = mmap.mmap(-1, 64 << 20)  # not by malloc, which may have free memory of any size
        fresh.write(bytes(64 << 20))
        assert resident() - before > 32 << 20


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_leave_reference_counts_as_they_were(family: cases.Family) -> None:
    optimizer, params = _small(family)

    def counts() -> list[int]:
        held = [optimizer.param_groups, optimizer.state, *optimizer.param_groups]
        for group in optimizer.param_groups:
            held += [group["params"], *group.values()]
        for p in params:
            held += [p, p.grad, optimizer.state[p], *optimizer.state[p].values()]
        return [sys.getrefcount(o) for o in held if type(o) not in (int, float, bool, type(None))]

    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = counts()
    for _ in range(1000):
        optimizer.step()
    assert counts() == before


FAILURES: dict[str, Callable[[Any, list[Any]], Any]] = {
    "a bad gradient": lambda o, params: setattr(params[4].grad, "data", torch.ones(1)),
    "a bad buffer": lambda o, params: o.state[params[4]].update(
        dict.fromkeys(o.state[params[4]], "x")
    ),
    "a bad lr": lambda o, params: o.param_groups[2].update(lr="x"),
    "a parameter that is none": lambda o, params: o.param_groups[2]["params"].append(None),
}


@pytest.mark.parametrize("spoil", cases.ids(FAILURES))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_failed_step_holds_nothing(
    family: cases.Family, spoil: Callable[[Any, list[Any]], Any]
) -> None:
    optimizer, params = _small(family, 6)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    spoil(optimizer, params)
    with pytest.raises((ValueError, TypeError)):
        optimizer.step()
    watched = [weakref.ref(optimizer), weakref.ref(params[0]), weakref.ref(params[0].grad)]
    watched += [weakref.ref(value) for value in optimizer.state[params[0]].values()]
    assert len(watched) > 3
    del optimizer, params, p
    gc.collect()
    assert all(ref() is None for ref in watched)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_holds_nothing_afterwards(family: cases.Family) -> None:
    """A step keeps its working memory for the next one, but releases the tensors at once."""
    optimizer, params = _small(family, 6)
    optimizer.param_groups[1]["foreach"] = False
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    watched = [weakref.ref(o) for o in (optimizer, *params, *(p.grad for p in params))]
    del optimizer, params, p
    gc.collect()
    assert all(ref() is None for ref in watched)


@pytest.fixture(autouse=True)
def _collected() -> None:
    gc.collect()
