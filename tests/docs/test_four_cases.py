"""The four recipes do what the tutorial says, with stock SGD and with FrozenAwareSGD."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import four_cases
from four_cases import OPTIMIZERS, RECIPES, Net, Result

FC1_BYTES = 4 * (8 * 4 + 4)
FC2_BYTES = 4 * (4 * 10 + 10)
CASES = [
    # case, changed, requires grad, gradients held
    pytest.param(1, {"fc1", "fc2"}, {"fc1", "fc2"}, {"fc1", "fc2"}, id="nothing frozen"),
    pytest.param(2, {"fc2"}, {"fc2"}, {"fc2"}, id="all passed and fc1 frozen"),
    pytest.param(3, {"fc2"}, {"fc1", "fc2"}, {"fc1", "fc2"}, id="only fc2 passed"),
    pytest.param(4, {"fc2"}, {"fc2"}, {"fc2"}, id="frozen and filtered"),
]
BYTES = {"fc1": FC1_BYTES, "fc2": FC2_BYTES}
optimizers = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def layers(chosen: dict[str, bool]) -> set[str]:
    """The layers whose weight and bias are both chosen; no layer has only one of them chosen."""
    found = {name.split(".")[0] for name, yes in chosen.items() if yes}
    left = {name.split(".")[0] for name, yes in chosen.items() if not yes}
    assert not found & left
    return found


@optimizers
@pytest.mark.parametrize(("case", "changed", "requires_grad", "held"), CASES)
def test_a_recipe_changes_and_holds(
    case: int, changed: set[str], requires_grad: set[str], held: set[str], optimizer: str
) -> None:
    result = four_cases.run(case, optimizer)
    assert layers(result.changed) == changed
    assert layers(result.requires_grad) == requires_grad
    assert layers(result.holds_gradient) == held
    assert result.gradient_bytes == sum(BYTES[layer] for layer in held)


@optimizers
@pytest.mark.parametrize("momentum", [0.0, 0.9], ids=["plain", "momentum"])
@pytest.mark.parametrize(("case", "changed", "requires_grad", "held"), CASES)
def test_the_state_is_the_momentum_of_what_changes(
    case: int,
    changed: set[str],
    requires_grad: set[str],
    held: set[str],
    momentum: float,
    optimizer: str,
) -> None:
    result = four_cases.run(case, optimizer, momentum=momentum)
    expected = sum(BYTES[layer] for layer in changed) if momentum else 0
    assert result.state_bytes == expected


@pytest.mark.parametrize("momentum", [0.0, 0.9], ids=["plain", "momentum"])
@pytest.mark.parametrize("case", RECIPES)
def test_both_optimizers_learn_the_same(case: int, momentum: float) -> None:
    stock, ours = (four_cases.run(case, name, momentum=momentum) for name in OPTIMIZERS)
    assert stock.losses == ours.losses
    assert all(torch.equal(stock.weights[name], ours.weights[name]) for name in stock.weights)


def test_frozen_aware_sgd_has_the_cost_of_case_4_with_the_code_of_case_2() -> None:
    def cost(result: Result) -> tuple[int, int]:
        return result.gradient_bytes, result.state_bytes

    ours = four_cases.run(2, "FrozenAwareSGD", momentum=0.9)
    assert cost(ours) == cost(four_cases.run(4, "stock SGD", momentum=0.9))
    assert cost(ours) < cost(four_cases.run(3, "stock SGD", momentum=0.9))


def test_the_gradients_of_case_3_pile_up() -> None:
    features, labels = next(four_cases.batches())
    net = Net()
    sgd = torch.optim.SGD(RECIPES[3].passed(net), four_cases.LEARNING_RATE)
    seen = []
    for _ in range(2):
        sgd.zero_grad()
        torch.autograd.backward(torch.nn.functional.cross_entropy(net(features), labels))
        gradient = net.fc1.bias.grad
        assert gradient is not None
        seen.append(gradient.clone())
    assert torch.allclose(seen[1], 2 * seen[0])


def test_the_table_shows_every_recipe_with_both_optimizers() -> None:
    lines = four_cases.show(four_cases.run_all(momentum=0.9, timed_steps=3)).splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split(",")[0] for line in lines if line.startswith("case")] == [
        f"case {case}" for case in RECIPES
    ]
    assert "344 B" in lines[2]
    assert "FrozenAwareSGD fc2" in " ".join(lines[6].split())


def test_the_example_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(four_cases, "TIMED_STEPS", 3)
    four_cases.main()
    printed = capsys.readouterr().out
    assert printed.count("case 4, ") == 2
    assert " 0.00 us" not in printed
