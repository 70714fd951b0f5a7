"""Four ways to freeze a layer, with stock SGD and with FrozenAwareSGD.

A net of two linear layers, ``fc1: 8 -> 4`` and ``fc2: 4 -> 10``, learns for ten iterations, and
``fc1`` is meant to stay as it is:

1. nothing frozen: ``SGD(model.parameters())``
2. "mode 1": all parameters passed, ``fc1`` with ``requires_grad=False``
3. "mode 2": only ``fc2.parameters()`` passed, ``fc1`` still requires grad
4. "best practice": ``requires_grad=False`` and ``filter(lambda p: p.requires_grad, ...)``

Run with ``python examples/four_cases.py``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_freeze import FrozenAwareSGD

ITERATIONS = 10
LEARNING_RATE = 1e-2
TIMED_STEPS = 2000


class Net(nn.Module):
    """Eight features to ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 4)
        self.fc2 = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of shape (batch, 10) for features of shape (batch, 8)."""
        scores: Tensor = self.fc2(self.fc1(x))
        return scores


@dataclass(frozen=True)
class Recipe:
    """What is frozen, and which parameters the optimizer is given."""

    name: str
    freeze: bool
    passed: Callable[[Net], Iterable[nn.Parameter]]


RECIPES: dict[int, Recipe] = {
    1: Recipe("nothing frozen", False, lambda net: net.parameters()),
    2: Recipe('"mode 1": all passed, fc1 frozen', True, lambda net: net.parameters()),
    3: Recipe('"mode 2": only fc2 passed', False, lambda net: net.fc2.parameters()),
    4: Recipe(
        '"best practice": frozen, filtered',
        True,
        lambda net: filter(lambda p: p.requires_grad, net.parameters()),
    ),
}
OPTIMIZERS: dict[str, type[torch.optim.SGD]] = {
    "stock SGD": torch.optim.SGD,
    "FrozenAwareSGD": FrozenAwareSGD,
}


@dataclass(frozen=True)
class Result:
    """What a recipe left behind after its last step."""

    case: int
    optimizer: str
    changed: dict[str, bool]
    requires_grad: dict[str, bool]
    holds_gradient: dict[str, bool]
    gradient_bytes: int
    state_bytes: int
    weights: dict[str, Tensor]
    losses: list[float]
    step_ns: float
    """Median time of ``step()``; 0 if it was not measured."""


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """The same random features and labels for every recipe."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(ITERATIONS):
        yield (
            torch.randn(16, 8, generator=generator),
            torch.randint(10, (16,), generator=generator),
        )


def run(case: int, optimizer: str, *, momentum: float = 0.0, timed_steps: int = 0) -> Result:
    """Train the net for ten iterations by one recipe.

    Args:
        case: 1 to 4, a key of ``RECIPES``.
        optimizer: a key of ``OPTIMIZERS``.
        momentum: of SGD; 0 keeps no state.
        timed_steps: how many further steps to time. They repeat the last gradients, after
            everything else has been recorded.

    Returns:
        Everything the recipes differ in.

    Example:
        >>> result = run(2, "FrozenAwareSGD")
        >>> [name for name, changed in result.changed.items() if changed]
        ['fc2.weight', 'fc2.bias']
    """
    recipe = RECIPES[case]
    torch.manual_seed(0)
    net = Net()
    if recipe.freeze:
        net.fc1.requires_grad_(False)
    sgd = OPTIMIZERS[optimizer](recipe.passed(net), LEARNING_RATE, momentum)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    losses = []
    for features, labels in batches():
        sgd.zero_grad()
        loss = nn.functional.cross_entropy(net(features), labels)
        torch.autograd.backward(loss)
        sgd.step()
        losses.append(loss.item())
    named = dict(net.named_parameters())
    return Result(
        case=case,
        optimizer=optimizer,
        changed={name: not torch.equal(p, before[name]) for name, p in named.items()},
        requires_grad={name: p.requires_grad for name, p in named.items()},
        holds_gradient={name: p.grad is not None for name, p in named.items()},
        gradient_bytes=sum(p.grad.nbytes for p in named.values() if p.grad is not None),
        state_bytes=_state_bytes(sgd.state),
        weights={name: p.detach().clone() for name, p in named.items()},
        losses=losses,
        step_ns=_time(sgd, timed_steps),
    )


def _state_bytes(state: Mapping[Tensor, Mapping[str, object]]) -> int:
    values = (value for entry in state.values() for value in entry.values())
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def _time(sgd: torch.optim.SGD, steps: int) -> float:
    times = []
    for _ in range(steps):
        begin = time.perf_counter_ns()
        sgd.step()
        times.append(time.perf_counter_ns() - begin)
    return statistics.median(times) if times else 0.0


def run_all(*, momentum: float = 0.0, timed_steps: int = 0) -> list[Result]:
    """All recipes with both optimizers, case by case."""
    return [
        run(case, optimizer, momentum=momentum, timed_steps=timed_steps)
        for case in RECIPES
        for optimizer in OPTIMIZERS
    ]


def _names(chosen: Mapping[str, bool]) -> str:
    layers = {name: True for name in ("fc1", "fc2") if chosen[f"{name}.weight"]}
    return " ".join(layers) or "-"


def show(results: Iterable[Result]) -> str:
    """A table of 100 columns at most; a layer's weight and bias always share a fate here."""
    lines = [
        f"{'':16} {'changed':9}{'requires grad':15}{'gradients held':16}"
        f"{'gradients':>10}{'state':>9}{'step()':>11}"
    ]
    case = 0
    for result in results:
        if result.case != case:
            case = result.case
            lines.append(f"case {case}, {RECIPES[case].name}")
        lines.append(
            f"  {result.optimizer:15}{_names(result.changed):9}{_names(result.requires_grad):15}"
            f"{_names(result.holds_gradient):16}{result.gradient_bytes:>8} B"
            f"{result.state_bytes:>7} B{result.step_ns / 1000:>8.2f} us"
        )
    return "\n".join(lines)


def main() -> None:
    """Print what each recipe does, without and with momentum."""
    for momentum in (0.0, 0.9):
        print(f"momentum {momentum:g}, after {ITERATIONS} iterations")
        print(show(run_all(momentum=momentum, timed_steps=TIMED_STEPS)))
        print()
    print(
        "Case 3 computes and keeps gradients of fc1 that no zero_grad() clears. Case 4 does not,\n"
        "but what it left out can never train again. FrozenAwareSGD with case 2's code holds what\n"
        "case 4 holds, and what is frozen may change before any step."
    )


if __name__ == "__main__":
    main()
