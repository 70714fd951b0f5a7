"""step_in_backward under hostile use: the ordinary step's bits, or a clear error; never a crash.

Every case trains in a process of its own, once with ordinary steps and twice in backward (every
gradient applied at once, and in buckets). What it returns has to be the same to the bit. A case
that names an `error` has to raise that in backward; an ordinary step raises nothing there, unless
`ordinary_raises` says so.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import apart, hostile
from tests.helpers import optim_cases as cases
from tests.helpers.optim_cases import FrozenAwareAdamW, FrozenAwareSGD

Make = Callable[..., Any]
Scenario = Callable[[Make], Any]


@dataclass
class Case(hostile.Case):
    """What to train, and what has to come of it."""

    scenario: Scenario
    error: str = ""  # what the message has to say
    ordinary_raises: bool = False  # an ordinary step raises an error, too
    sgd_only: bool = False  # stock AdamW refuses it, or has no such option
    forks: bool = False  # after a backward, which torch does not allow where it sees a GPU


class Table(hostile.Table[Case]):
    """The cases of a test module, most of them entered by a decorator."""

    def case(self, name: str, **options: Any) -> Callable[[Scenario], Scenario]:
        def enter(scenario: Scenario) -> Scenario:
            self[name] = Case(scenario, **options)
            return scenario

        return enter


BUCKETS: dict[str, dict[str, Any]] = {
    "no bucket": {"bucket_mb": 0},
    "small buckets": {"bucket_mb": 300 / 2**20},
}


def ordinary(params: Any, **hyper: Any) -> FrozenAwareSGD:
    return FrozenAwareSGD(params, **({"lr": 0.1, "momentum": 0.9} | hyper))


# The options that the two call by different names.
_OWN_NAMES = dict(zip(cases.SGD.state[3:], cases.ADAMW.state[3:], strict=True))


def ordinary_adamw(params: Any, **hyper: Any) -> FrozenAwareAdamW:
    """The scenarios call the options by SGD's names."""

    def renamed(options: dict[str, Any]) -> dict[str, Any]:
        return {_OWN_NAMES.get(key, key): value for key, value in options.items()}

    if isinstance(params, list) and params and isinstance(params[0], dict):
        params = [renamed(group) for group in params]
    return FrozenAwareAdamW(params, **({"lr": 0.1} | renamed(hyper)))


MAKES: dict[str, Make] = {"SGD": ordinary, "AdamW": ordinary_adamw}


def is_ordinary(make: Make) -> bool:
    """Whether what it makes steps in `step`."""
    return make in MAKES.values()


def stock_of(optimizer: Any, params: Any) -> torch.optim.Optimizer:
    """Stock's optimizer of the same family."""
    if isinstance(optimizer, FrozenAwareSGD):
        return torch.optim.SGD(params, lr=0.2, momentum=0.8)
    return torch.optim.AdamW(params, lr=0.2)


def net(width: int = 6, depth: int = 4, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers).to(hostile.DEVICE, dtype)


def data(step: int = 0, width: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    return cases.randn((5, width), cases.generator(step), dtype, hostile.DEVICE)


def loss_of(model: nn.Module, step: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (model(data(step, dtype=dtype)) ** 2).sum()


def train(
    model: nn.Module,
    optimizer: Any,
    steps: int = 3,
    loss: Callable[[nn.Module, int], Tensor] = loss_of,
    between: Callable[[int], Any] = lambda step: None,
) -> list[Any]:
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
        between(step)
    return result(model, optimizer)


def result(model: nn.Module, *optimizers: Any) -> list[Any]:
    """Every parameter, and what each optimizer's state holds for it."""
    params = list(model.parameters())
    values: list[Any] = [bits(p) for p in params]
    for optimizer in optimizers:
        for p in params:
            entry = optimizer.state.get(p, {})
            values.append({key: bits(value) for key, value in entry.items()})
    return values


def bits(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    return f"{value.dtype} {list(value.shape)} {value.flatten().double().tolist()}"


class Weighted(nn.Module):
    """Nothing but parameters, each with a gradient of its own at every step."""

    def __init__(self, *params: Tensor) -> None:
        super().__init__()
        self.all = nn.ParameterList(params)

    def forward(self, step: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for i, p in enumerate(self.all):
            shape, gen = tuple(p.shape), cases.generator(100 * step + i)
            scale = cases.randn(shape, gen, torch.float64, hostile.DEVICE)
            total = total + ((p * p + p).abs() * scale).sum().double()
        return total


def of_parameters(make: Make, *params: Tensor, **hyper: Any) -> list[Any]:
    model = Weighted(*params)
    optimizer = make(model.parameters(), **hyper)
    return train(model, optimizer, loss=lambda m, step: m(step))


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return cases.randn(shape, cases.generator(seed), dtype, hostile.DEVICE)


@dataclass
class Outcome:
    value: Any = None
    error: str = ""


def outcome_of(scenario: Scenario, make: Make) -> Outcome:
    try:
        return Outcome(value=scenario(make))
    except Exception as error:
        return Outcome(error=f"{type(error).__name__}: {error}")


def _outcome_on(case: Case, make: Make, device: str) -> Outcome:
    """In a process of its own."""
    hostile.use_device(device)
    return outcome_of(case.scenario, make)


CLEAR = re.compile("^(ValueError|TypeError|RuntimeError|KeyError|NotImplementedError): .")


def each_use(table: Table) -> pytest.MarkDecorator:
    """Everything on the CPU. On a GPU what makes steps: refusals do not ask where tensors lie.

    AdamW makes the steps too, in small buckets: who refuses is the same code for all optimizers.
    """
    runs = []
    for name, case in table.items():
        for words, bucket in BUCKETS.items():
            runs.append(pytest.param(case, "SGD", bucket, "cpu", id=f"{name}-{words}"))
        bucket = BUCKETS["small buckets"]
        if not case.error and not case.sgd_only:
            runs.append(pytest.param(case, "AdamW", bucket, "cpu", id=f"{name}-AdamW"))
        if not case.error and not case.forks:
            words = f"{name}-cuda"
            runs.append(pytest.param(case, "SGD", bucket, "cuda", id=words, marks=pytest.mark.gpu))
    return pytest.mark.parametrize(("case", "family", "bucket", "device"), runs)


def each_case(table: Table) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(c, id=name) for name, c in table.items()])


_ordinary_outcomes: dict[tuple[str, ...], Outcome] = {}


def ordinary_outcome(case: Case, family: str = "SGD", device: str = "cpu") -> Outcome:
    """What comes of ordinary steps; each case makes them once."""
    if case.forks and torch.cuda.is_available():
        pytest.skip("where torch sees a GPU, no fork of a process that ran backward can")
    key = (*case.where, family, device)
    if key not in _ordinary_outcomes:
        _ordinary_outcomes[key] = apart.run(_outcome_on, case, MAKES[family], device)
    return _ordinary_outcomes[key]


def check_use(case: Case, family: str, bucket: dict[str, Any], device: str) -> None:
    """Train in backward, and compare with ordinary steps or with the error to be raised."""
    in_backward = functools.partial(MAKES[family], step_in_backward=True, **bucket)
    theirs = None if case.error else ordinary_outcome(case, family, device)
    ours: Outcome = apart.run(_outcome_on, case, in_backward, device)
    if theirs is None:
        assert ours.error, "made a step"
        assert CLEAR.match(ours.error), ours.error
        assert re.search(case.error, ours.error), ours.error
    else:
        assert not ours.error, ours.error
        assert not theirs.error, theirs.error
        assert ours.value == theirs.value


def check_ordinary(case: Case) -> None:
    """A case in which ordinary steps fail as well would not show what backward refuses."""
    outcome = ordinary_outcome(case)
    assert bool(outcome.error) == case.ordinary_raises, outcome.error


def both_tests(table: Table) -> tuple[Callable[..., None], Callable[..., None]]:
    """The two tests of a table: of steps in backward, and of the ordinary step."""

    @pytest.mark.filterwarnings("ignore")
    @each_use(table)
    def test_hostile_use_gives_the_ordinary_steps_bits_or_an_error(
        case: Case, family: str, bucket: dict[str, Any], device: str
    ) -> None:
        check_use(case, family, bucket, device)

    @pytest.mark.filterwarnings("ignore")
    @each_case(table)
    def test_the_ordinary_step_raises_only_where_nobody_can_step(case: Case) -> None:
        check_ordinary(case)

    return (
        test_hostile_use_gives_the_ordinary_steps_bits_or_an_error,
        test_the_ordinary_step_raises_only_where_nobody_can_step,
    )
