"""torch.compile: a compiled model or step, with a frozen set that changes between steps."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_freeze
from tests.helpers import optim_cases as cases
from torch_freeze import FrozenAwareSGD, freeze, unfreeze

# aot_eager traces and differentiates as inductor does, without a C++ compilation for each graph.
BACKENDS = ["eager", "aot_eager"]
# Two steps under each frozen set; the last three have been seen before.
PHASES: list[list[str]] = [["0", "1"], ["0"], [], ["0", "1"], ["0"], []]
DISTINCT = 3
# Of each optimizer, by its name in cases.FAMILIES.
HYPER: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2},
    "AdamW": {"lr": 0.02, "weight_decay": 0.1},
}
each_optimizer = pytest.mark.parametrize("kind", HYPER)

Step = Callable[[nn.Module, Any, Tensor], None]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """Graphs compiled since the test began, recompilations among them."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Sequential(nn.ReLU(), nn.Linear(8, 3))
    )


def eager_step(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def run(
    model: nn.Module, step: Step, phases: list[list[str]] = PHASES, kind: str = "SGD"
) -> dict[str, Tensor]:
    """Train through all phases; weights, statistics and the optimizer's state at the end."""
    optimizer = cases.FAMILIES[kind].ours(model.parameters(), **HYPER[kind])
    generator = torch.Generator().manual_seed(1)
    for phase in phases:
        unfreeze(model)
        if phase:
            freeze(model, *phase)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        for _ in range(2):
            step(model, optimizer, torch.randn(16, 6, generator=generator))
        for name, p in model.named_parameters():
            assert name not in before or torch.equal(p, before[name]), f"frozen {name} moved"
            assert p.requires_grad or p.grad is None
    found = {name.removeprefix("_orig_mod."): t.clone() for name, t in model.state_dict().items()}
    for name, p in model.named_parameters():
        for key, value in optimizer.state[p].items():
            found[f"{key} of {name.removeprefix('_orig_mod.')}"] = value
    return found


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@each_optimizer
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_follows_the_frozen_set_with_one_compilation_for_each(
    backend: str, kind: str
) -> None:
    expected = run(make_model(), eager_step, kind=kind)
    model = torch.compile(make_model(), backend=backend)
    assert_close(run(model, eager_step, kind=kind), expected)
    # torch.compile guards on the norm's mode and requires_grad, and looks up a set seen before.
    assert graphs() == DISTINCT


def test_a_model_compiled_by_inductor_follows_the_frozen_set() -> None:
    if not torch._inductor.cpp_builder.get_cpp_compiler():
        pytest.skip("inductor finds no C++ compiler")
    phases = [["0", "1"], []]
    expected = run(make_model(), eager_step, phases)
    assert_close(run(torch.compile(make_model()), eager_step, phases), expected)
    assert graphs() == len(phases)


@each_optimizer
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_step_alone_is_not_traced_and_never_goes_stale(backend: str, kind: str) -> None:
    @torch.compile(backend=backend)
    def update(optimizer: Any) -> None:
        optimizer.step()

    def step(model: nn.Module, optimizer: Any, x: Tensor) -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        update(optimizer)

    expected = run(make_model(), eager_step, kind=kind)
    got = run(make_model(), step, kind=kind)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert graphs() == 0


@each_optimizer
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_whole_iteration_compiled_follows_the_frozen_set(backend: str, kind: str) -> None:
    step = torch.compile(eager_step, backend=backend)
    expected = run(make_model(), eager_step, kind=kind)
    assert_close(run(make_model(), step, kind=kind), expected)
    assert graphs() == DISTINCT  # backward() and the step are in none of them


@each_optimizer
def test_stocks_step_compiled_goes_stale_where_ours_does_not(kind: str) -> None:
    """Nothing guards on requires_grad, so what trained while it was traced goes on training."""

    def weight_after_freezing(optimizer_class: Any) -> tuple[Tensor, Tensor]:
        p = nn.Parameter(torch.ones(4))
        optimizer = optimizer_class([p], lr=0.1)
        update = torch.compile(optimizer.step, backend="eager")
        for _ in range(2):
            p.grad = torch.ones(4)
            update()
        before = p.detach().clone()
        p.requires_grad = False
        p.grad = torch.ones(4)  # stale, as a gradient from before the freeze would be
        update()
        return before, p.detach()

    assert not torch.equal(*weight_after_freezing(cases.FAMILIES[kind].stock))
    assert torch.equal(*weight_after_freezing(cases.FAMILIES[kind].ours))


def test_a_rotation_through_all_its_sets_compiles_no_more_graphs_than_there_are_sets() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    schedule = torch_freeze.rotate(model, "[0-2]", k=1, every=1, always="3", seed=0)
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = FrozenAwareSGD(model.parameters(), lr=0.01)
    drawn = set()
    for _ in range(12):
        schedule.step()
        drawn.add(schedule.active)
        eager_step(compiled, optimizer, torch.ones(2, 4))
    assert len(drawn) == 3
    assert graphs() == len(drawn)


def test_more_frozen_sets_than_the_compiler_keeps_run_eagerly_and_correctly() -> None:
    limit = torch._dynamo.config.recompile_limit
    steps = 2 * limit + 4

    def train(model: nn.Module, schedule: torch_freeze.FreezeSchedule) -> dict[str, Tensor]:
        optimizer = FrozenAwareSGD(model.parameters(), **HYPER["SGD"])
        for step in range(steps):
            schedule.step()
            eager_step(model, optimizer, torch.full((2, 4), 0.1 * step))
        return {name.removeprefix("_orig_mod."): p for name, p in model.named_parameters()}

    def build() -> tuple[nn.Module, torch_freeze.FreezeSchedule]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(limit + 2)))
        # Each layer in turn, and then all of them again.
        turns = {i: [p for j, p in enumerate(model) if j != i % (limit + 2)] for i in range(steps)}
        return model, torch_freeze.FreezeSchedule(model, turns, unit="step")

    model, schedule = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the limit, in some versions of torch
        got = train(torch.compile(model, backend="aot_eager"), schedule)
    assert_close(got, train(*build()))
    assert graphs() == limit


def test_a_compiled_model_that_trains_nothing_new_is_audited() -> None:
    """What was unfrozen gets its gradient at the next backward, and audit sees it."""
    model = make_model()
    freeze(model, "0")
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = FrozenAwareSGD(compiled.parameters(), lr=0.1)
    compiled(torch.ones(4, 6)).sum().backward()
    optimizer.step()
    unfreeze(compiled, "0")
    compiled(torch.ones(4, 6)).sum().backward()
    kinds = {f.kind for f in torch_freeze.audit(compiled, optimizer)}
    assert "no gradient" not in kinds
    assert model[0].weight.grad is not None


def test_a_copied_model_is_compiled_by_itself() -> None:
    model = make_model()
    freeze(model, "0", "1")
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    got = run(compiled, eager_step, [["0", "1"], []])
    assert_close(got, run(make_model(), eager_step, [["0", "1"], []]))
