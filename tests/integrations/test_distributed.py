"""Freezing on several processes: DDP, FSDP2, ZeRO and distributed checkpoints equal one process.

The processes run the functions of this module named ``on_...``.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_freeze
from tests.helpers import optim_cases as cases
from tests.helpers.processes import World, world_of
from torch_freeze import freeze, unfreeze

dist = torch.distributed
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and sys.platform == "linux"), reason="needs torch.distributed on Linux"
)

Result = dict[str, Any]
# Of each optimizer, by its name in cases.FAMILIES. Adam steps as AdamW does.
HYPER: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2},
    "AdamW": {"lr": 0.02, "weight_decay": 0.1, "amsgrad": True},
}
each_optimizer = pytest.mark.parametrize("kind", HYPER)
BATCH = 8
# Gradients are summed in another order than on one process.
SAME = {"rtol": 1e-11, "atol": 1e-12}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("cpu", 2), id="gloo, 2 processes"),
        pytest.param(("cpu", 4), id="gloo, 4 processes"),
        pytest.param(("cuda", 0), id="nccl, a process per GPU", marks=pytest.mark.gpu),
    ],
)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    device, size = request.param
    with world_of(device, size) as processes:
        yield processes


def make(kind: str, params: Any, **options: Any) -> Any:
    """The optimizer here of that kind."""
    return cases.FAMILIES[kind].ours(params, **HYPER[kind] | options)


class Net(nn.Module):
    """A body with a norm, sizes that no number of processes divides, and a head."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body = nn.Sequential(
            nn.Linear(6, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 5, bias=False)
        )
        self.head = nn.Linear(5, 3)
        self.double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.double))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())


def batch(step: int, rank: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """The share that `rank` has of the batch of a step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 6, generator=generator, dtype=torch.double)
    y = torch.randint(3, (BATCH,), generator=generator)
    share = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    return x[share].to(device), y[share].to(device)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    rank: int,
    size: int,
    device: str,
) -> None:
    for step in steps:
        x, y = batch(step, rank, size, device)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Whole tensors, by the names the model has without wrappers."""
    found = {}
    for name, tensor in model.state_dict().items():
        found[name.removeprefix("module.")] = whole(tensor)
    return found


def whole(tensor: Any) -> Tensor:
    """A copy on the CPU of a tensor, or of all shards of a DTensor."""
    gathered = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return torch.as_tensor(gathered).detach().cpu().clone()


def states(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Tensor]:
    """Whole tensors of the optimizer's state, by parameter and key."""
    return {
        f"{key} of {names[id(p)]}": whole(value)
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def assert_same(result: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert result.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(result[name], tensor, **SAME, msg=lambda m, n=name: f"{n}: {m}")


def assert_replicas(results: list[Any], key: str) -> None:
    """All ranks hold the same, to the bit."""
    for other in results[1:]:
        for name, tensor in results[0][key].items():
            assert torch.equal(other[key][name], tensor), name


# What is frozen, for three steps each. The norm is held throughout: its statistics would otherwise
# be those of a rank's part of the batch.
PHASES: list[list[str]] = [["body"], ["body.0", "body.1"], ["body.1", "head"], ["body"]]


def set_phase(model: nn.Module, phase: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of DDP, which each test deals with in its own way
        unfreeze(model, exclude=phase)
        freeze(model, *phase)


@functools.cache
def one_process(kind: str) -> Result:
    model = Net()
    optimizer = make(kind, model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    at_phases = []
    for i, phase in enumerate(PHASES):
        set_phase(model, phase)
        train(model, optimizer, range(3 * i, 3 * i + 3), 0, 1, "cpu")
        at_phases.append(weights(model))
    return {"phases": at_phases, "state": states(optimizer, names)}


def on_ddp(device: str, kind: str, how: str) -> Result:
    from torch.nn.parallel import DistributedDataParallel

    rank, size = dist.get_rank(), dist.get_world_size()
    model = Net().to(device)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer: Any
    if how == "zero":
        from torch.distributed.optim import ZeroRedundancyOptimizer

        ours = cases.FAMILIES[kind].ours
        optimizer = ZeroRedundancyOptimizer(model.parameters(), ours, **HYPER[kind])
    else:
        optimizer = make(kind, model.parameters())
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    at_phases = []
    for i, phase in enumerate(PHASES):
        if how == "find unused":
            set_phase(wrapped, phase)
        else:
            set_phase(model, phase)
            wrapped = DistributedDataParallel(model)
        train(wrapped, optimizer, range(3 * i, 3 * i + 3), rank, size, device)
        at_phases.append(weights(wrapped))
    owner = optimizer.optim if how == "zero" else optimizer
    frozen = model.get_parameter("body.0.weight")
    frozen.grad = torch.ones_like(frozen)
    return {
        "phases": at_phases,
        "last": at_phases[-1],
        "state": states(owner, names),
        "reported": torch_freeze.report(model, optimizer).total.state_bytes,
        "errors": [str(f) for f in torch_freeze.audit(model, optimizer) if f.level == "error"],
    }


@each_optimizer
@pytest.mark.parametrize("how", ["wrapped again", "find unused"])
def test_ddp_with_a_changing_frozen_set_equals_one_process(
    world: World, kind: str, how: str
) -> None:
    expected = one_process(kind)
    results = world.run(on_ddp, kind, how)
    for result in results:
        for got, wanted in zip(result["phases"], expected["phases"], strict=True):
            assert_same(got, wanted)
        assert_same(result["state"], expected["state"])
    assert_replicas(results, "last")
    assert_replicas(results, "state")


@each_optimizer
def test_zero_redundancy_optimizer_with_a_changing_frozen_set_equals_one_process(
    world: World, kind: str
) -> None:
    expected = one_process(kind)
    results = world.run(on_ddp, kind, "zero")
    for result in results:
        for got, wanted in zip(result["phases"], expected["phases"], strict=True):
            assert_same(got, wanted)
    assert_replicas(results, "last")
    # Each rank keeps the state of its share; together they keep what one process does.
    owned = [name for result in results for name in result["state"]]
    assert sorted(owned) == sorted(expected["state"])
    for result in results:
        # report and audit see the optimizer inside, and the share that it has.
        assert result["reported"] == sum(tensor.nbytes for tensor in result["state"].values())
        assert result["errors"] == []
        assert_same(result["state"], {n: expected["state"][n] for n in result["state"]})


def on_ddp_frozen_after_wrapping(device: str, kind: str) -> Result:
    from torch.nn.parallel import DistributedDataParallel

    rank, size = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(Net().to(device))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        freeze(model, "body")
    try:
        train(model, make(kind, model.parameters()), range(2), rank, size, device)
    except RuntimeError as error:
        raised = str(error)
    else:
        raised = ""
    return {"warned": [str(w.message) for w in caught], "raised": raised}


def test_freezing_a_wrapped_model_warns_of_what_ddp_then_raises(world: World) -> None:
    for result in world.run(on_ddp_frozen_after_wrapping, "AdamW"):
        assert "Expected to have finished reduction" in result["raised"]
        assert any("DistributedDataParallel" in said for said in result["warned"])


def refuse_rest(*args: Any) -> None:
    raise AssertionError("stock's form was used")


def shard(model: Net, device: str) -> None:
    """Two units, each of frozen and trainable parameters in some phase."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (dist.get_world_size(),))
    fully_shard(model.body, mesh=mesh)
    fully_shard(model, mesh=mesh)


def on_fsdp(device: str, kind: str) -> Result:
    rank, size = dist.get_rank(), dist.get_world_size()
    model = Net().to(device)
    torch_freeze.freeze(model, *PHASES[0])
    shard(model, device)
    optimizer = make(kind, model.parameters())
    optimizer._step_rest = refuse_rest
    names = {id(p): name for name, p in model.named_parameters()}
    at_phases = []
    for i, phase in enumerate(PHASES):
        set_phase(model, phase)
        train(model, optimizer, range(3 * i, 3 * i + 3), rank, size, device)
        at_phases.append(weights(model))
    kinds = {
        (key, type(value).__name__, getattr(value, "placements", None) == p.placements)
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }
    grads = [names[id(p)] for p in model.parameters() if not p.requires_grad and p.grad is not None]
    return {
        "phases": at_phases,
        "state": states(optimizer, names),
        "kinds": kinds,
        "grads of frozen": grads,
    }


@each_optimizer
def test_fsdp2_with_mixed_and_changing_requires_grad_equals_one_process(
    world: World, kind: str
) -> None:
    expected, names = one_process(kind), cases.FAMILIES[kind].state
    for result in world.run(on_fsdp, kind):
        for got, wanted in zip(result["phases"], expected["phases"], strict=True):
            assert_same(got, wanted)
        assert_same(result["state"], expected["state"])
        # Buffers are sharded as their parameters are; a count of updates is whole on each process.
        sharded = {(name, "DTensor", True) for name in names.buffers}
        counts = {(names.counter, "Tensor", False)} if names.counter else set()
        assert result["kinds"] == sharded | counts
        assert result["grads of frozen"] == []


def placements(name: str) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """Shape of the mesh (0: all other processes) and placements on it."""
    from torch.distributed.tensor import Replicate, Shard

    return {
        "rows": ((0,), (Shard(0),)),
        "columns": ((0,), (Shard(1),)),
        "replicated": ((0,), (Replicate(),)),
        "rows of replicas": ((2, 0), (Replicate(), Shard(0))),
        "rows, then columns": ((2, 0), (Shard(0), Shard(1))),
    }[name]


def on_dtensor_steps(device: str, name: str, kind: str, hyper: dict[str, Any]) -> Result:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    shape, placed = placements(name)
    size = dist.get_world_size()
    mesh = init_device_mesh(device, tuple(n or size // max(1, 2 * (len(shape) - 1)) for n in shape))
    params = [
        nn.Parameter(distribute_tensor(t.to(device), mesh, placed))
        for t in steps_of_whole()["params"]
    ]
    optimizer = cases.FAMILIES[kind].ours(params, **hyper)
    optimizer._step_rest = refuse_rest
    versions = [p._version for p in params]
    for grads in steps_of_whole()["grads"]:
        for p, grad in zip(params, grads, strict=True):
            p.grad = distribute_tensor(grad.to(device), mesh, placed)
        optimizer.step()
    raised = [p._version > v for p, v in zip(params, versions, strict=True)]
    return {
        "device": device,
        "params": {str(i): whole(p) for i, p in enumerate(params)},
        "state": states(optimizer, {id(p): str(i) for i, p in enumerate(params)}),
        "versions": raised,
    }


def steps_of_whole() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(9, 4), (4, 4), (1, 8), (3, 2, 2)]
    return {
        "params": [torch.randn(s, generator=generator) for s in shapes],
        "grads": [[torch.randn(s, generator=generator) for s in shapes] for _ in range(3)],
    }


HYPERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("SGD", {"lr": 0.1}),
    "momentum, dampening and decay": ("SGD", HYPER["SGD"] | {"dampening": 0.3}),
    "nesterov, maximize": ("SGD", HYPER["SGD"] | {"nesterov": True, "maximize": True}),
    "AdamW": ("AdamW", {}),
    "AdamW with amsgrad, maximize": ("AdamW", HYPER["AdamW"] | {"maximize": True}),
    "Adam with decay": ("Adam", {"weight_decay": 0.1}),
}


@pytest.mark.parametrize(("kind", "hyper"), HYPERS.values(), ids=HYPERS)
@pytest.mark.parametrize(
    "name", ["rows", "columns", "replicated", "rows of replicas", "rows, then columns"]
)
def test_a_step_of_dtensors_goes_through_the_kernels_and_has_the_bits_of_one_process(
    world: World, name: str, kind: str, hyper: dict[str, Any]
) -> None:
    if ("of" in name or "," in name) and world.size % 2:
        pytest.skip("a mesh of two dimensions needs an even number of processes")
    given = steps_of_whole()
    params = [nn.Parameter(p) for p in given["params"]]
    family = cases.FAMILIES[kind]
    reference = family.stock(params, foreach=False, **hyper)
    for grads in given["grads"]:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        reference.step()
    wanted = {str(i): p.detach() for i, p in enumerate(params)}
    kept = states(reference, {id(p): str(i) for i, p in enumerate(params)})
    for result in world.run(on_dtensor_steps, name, kind, hyper):
        assert all(result["versions"])
        for got, expected in ((result["params"], wanted), (result["state"], kept)):
            assert got.keys() == expected.keys()
            for key, tensor in expected.items():
                if result["device"] == "cpu" or family.exact_on_cuda:
                    assert torch.equal(got[key], tensor), key
                else:
                    cases.assert_close(got[key], tensor, key)


UNLIKE_HYPER: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.5}, "AdamW": {}}


def kept_before(kind: str, parameter: Tensor) -> dict[str, Tensor]:
    """A state of the optimizer, as after its first step."""
    names = cases.FAMILIES[kind].state
    state = {name: parameter + 2 * i for i, name in enumerate(names.buffers[:2])}
    return state if names.counter is None else {names.counter: torch.tensor(1.0), **state}


def on_unlike_placements(device: str, kind: str, what: str) -> Result:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    size = dist.get_world_size()
    mesh = init_device_mesh(device, (size,))
    values = torch.arange(16, dtype=torch.double, device=device).reshape(4, 4)
    p = nn.Parameter(distribute_tensor(values, mesh, [Shard(0)]))
    if what == "gradient replicated":
        p.grad = distribute_tensor(values + 1, mesh, [Replicate()])
    elif what == "gradient in columns":
        p.grad = distribute_tensor(values + 1, mesh, [Shard(1)])
    elif what == "gradient a partial sum":
        p.grad = DTensor.from_local((values + 1) / size, mesh, [Partial()])
    elif what == "buffer in columns":
        p.grad = distribute_tensor(values + 1, mesh, [Shard(0)])
    optimizer = cases.FAMILIES[kind].ours([p], lr=0.5, **UNLIKE_HYPER[kind])
    if what == "buffer in columns":
        first = cases.FAMILIES[kind].state.buffers[0]
        for key, value in kept_before(kind, values).items():
            placed = [Shard(1 if key == first else 0)]
            whole_or_sharded = distribute_tensor(value, mesh, placed) if value.dim() else value
            optimizer.state[p][key] = whole_or_sharded
    optimizer.step()
    return {"param": whole(p), "placements": str(p.placements)}


@each_optimizer
@pytest.mark.parametrize(
    "what",
    ["gradient replicated", "gradient in columns", "gradient a partial sum", "buffer in columns"],
)
def test_unlike_placements_are_left_to_dtensors_own_operators(
    world: World, kind: str, what: str
) -> None:
    values = torch.arange(16, dtype=torch.double).reshape(4, 4)
    p = nn.Parameter(values.clone())
    p.grad = values + 1
    reference = cases.FAMILIES[kind].stock([p], lr=0.5, foreach=False, **UNLIKE_HYPER[kind])
    if what == "buffer in columns":
        reference.state[p].update(kept_before(kind, values))
    reference.step()
    for result in world.run(on_unlike_placements, kind, what):
        torch.testing.assert_close(result["param"], p.detach(), **SAME)


def on_scaled_fsdp(device: str, kind: str) -> Result:
    """Two steps with a GradScaler, the first of which overflows on rank 0 alone."""
    model = Net().to(device)
    freeze(model, "body")
    shard(model, device)
    optimizer = make(kind, model.parameters())
    optimizer._step_rest = refuse_rest
    scaler = torch.amp.GradScaler(device, init_scale=4.0)
    found = {}
    rank, size = dist.get_rank(), dist.get_world_size()
    for step in ("overflow", "stepped"):
        x, y = batch(0, rank, size, device)
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        if step == "overflow" and rank == 0:
            model.head.weight.grad.to_local().fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        found[step] = weights(model)
        found[f"state after {step}"] = len(optimizer.state)
    return found


@each_optimizer
def test_an_overflow_on_one_rank_withholds_the_step_on_all_of_fsdp2(
    world: World, kind: str
) -> None:
    model = Net()
    start = weights(model)
    freeze(model, "body")
    train(model, make(kind, model.parameters()), range(1), 0, 1, "cpu")
    for result in world.run(on_scaled_fsdp, kind):
        assert_same(result["overflow"], start)
        assert result["state after overflow"] == 0
        assert_same(result["stepped"], weights(model))


def on_checkpoint(
    device: str,
    path: str,
    kind: str,
    frozen_before: list[str],
    frozen_after: list[str],
    policy: str = "keep",
) -> Result:
    """Save after two phases, resume in a new model that has another frozen set from the start."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    from torch_freeze.integrations.checkpoint import frozen_as_saved

    rank, size = dist.get_rank(), dist.get_world_size()

    family = cases.FAMILIES[kind.removesuffix(" of torch")]

    def build() -> tuple[nn.Module, Any]:
        model = Net().to(device)
        shard(model, device)
        if kind.endswith(" of torch"):
            return model, family.stock(model.parameters(), **HYPER["AdamW"])
        return model, make(kind, model.parameters(), **{family.state.policy: policy})

    def saveable(model: nn.Module, optimizer: Any) -> dict[str, Any]:
        return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))

    def outcome(model: nn.Module, optimizer: Any) -> Result:
        names = {id(p): name for name, p in model.named_parameters()}
        return {"weights": weights(model), "state": states(optimizer, names)}

    model, optimizer = build()
    set_phase(model, ["body"])
    train(model, optimizer, range(2), rank, size, device)
    set_phase(model, frozen_before)
    train(model, optimizer, range(2, 4), rank, size, device)
    dcp.save(saveable(model, optimizer), checkpoint_id=path)

    resumed, its_optimizer = build()
    with torch.no_grad():
        for p in resumed.parameters():
            p.zero_()
    set_phase(resumed, frozen_after)
    flags = [p.requires_grad for p in resumed.parameters()]
    with frozen_as_saved(resumed, its_optimizer, path):
        saved = saveable(resumed, its_optimizer)
        dcp.load(saved, checkpoint_id=path)
        set_state_dict(
            resumed,
            its_optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
        )
    assert [p.requires_grad for p in resumed.parameters()] == flags
    found = {}
    for name, (net, opt) in {
        "went on": (model, optimizer),
        "resumed": (resumed, its_optimizer),
    }.items():
        set_phase(net, frozen_after)
        found[f"{name}, at once"] = outcome(net, opt)
        train(net, opt, range(4, 6), rank, size, device)
        found[name] = outcome(net, opt)
    return found


@pytest.mark.parametrize("kind", [*HYPER, "AdamW of torch"])
@pytest.mark.parametrize(
    ("frozen_before", "frozen_after"),
    [
        pytest.param(["body"], ["body"], id="unchanged"),
        pytest.param(["body"], ["body.1"], id="more trains after it"),
        pytest.param(["body.1"], ["body"], id="less trains after it"),
        pytest.param(["body.1", "head"], ["body.1", "body.0"], id="others train after it"),
    ],
)
def test_a_distributed_checkpoint_resumes_across_a_changed_frozen_set(
    world: World, tmp_path: Path, kind: str, frozen_before: list[str], frozen_after: list[str]
) -> None:
    results = world.run(on_checkpoint, str(tmp_path), kind, frozen_before, frozen_after)
    assert_resumed(results)


def assert_resumed(results: list[Result]) -> None:
    for result in results:
        for suffix in (", at once", ""):
            for part in ("weights", "state"):
                resumed, went_on = (result[run + suffix][part] for run in ("resumed", "went on"))
                assert resumed.keys() == went_on.keys()
                for name, tensor in went_on.items():
                    assert torch.equal(resumed[name], tensor), f"{name}{suffix}"


@each_optimizer
def test_a_distributed_checkpoint_keeps_what_starts_from_zero_after_unfreezing(
    world: World, tmp_path: Path, kind: str
) -> None:
    phases = ["body.1", "head"], ["body.1"]
    results = world.run(on_checkpoint, str(tmp_path), kind, *phases, "reset")
    stale = cases.FAMILIES[kind].state.stale
    for result in results:
        assert f"{stale} of head.weight" in result["went on, at once"]["state"]
    assert_resumed(results)


def on_plain_load(device: str, path: str, kind: str) -> str:
    """The error of loading a checkpoint that was saved while another set was frozen."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import get_state_dict

    rank, size = dist.get_rank(), dist.get_world_size()
    said = ""
    for frozen, use in ((["body"], dcp.save), (["body.1"], dcp.load)):
        model = Net().to(device)
        set_phase(model, frozen)
        optimizer = make(kind, model.parameters())
        if use is dcp.save:
            train(model, optimizer, range(1), rank, size, device)
        _, state = get_state_dict(model, optimizer)
        try:
            use({"optimizer": state}, checkpoint_id=path)
        except CheckpointException as error:
            said = str(error)
    return said


@each_optimizer
def test_by_itself_a_distributed_checkpoint_misses_what_was_frozen(
    world: World, tmp_path: Path, kind: str
) -> None:
    for said in world.run(on_plain_load, str(tmp_path), kind):
        assert "Missing key in checkpoint state_dict: optimizer.state.body.0" in said


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"other": {"lr": 0.1}}, "holds nothing under key='optimizer'; its keys are: 'other'"),
        (
            {"optimizer": {"state": {"weight": {"block": {"scale": torch.ones(2)}}}}},
            r"'optimizer\.state\.weight\.block\.scale' is inside a container",
        ),
    ],
    ids=["no optimizer in it", "a state with containers"],
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_that_cannot_be_loaded_is_refused(
    tmp_path: Path, state: dict[str, Any], says: str
) -> None:
    import torch.distributed.checkpoint as dcp

    from torch_freeze.integrations.checkpoint import frozen_as_saved

    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    model = nn.Linear(2, 2)
    optimizer = make("AdamW", model.parameters())
    optimizer.state[model.weight]["kept"] = True
    freeze(model, "bias")
    with (
        pytest.raises(ValueError, match=f"frozen_as_saved: .*{says}"),
        frozen_as_saved(model, optimizer, tmp_path),
    ):
        pass
    assert optimizer.state[model.weight] == {"kept": True}
    assert [p.requires_grad for p in model.parameters()] == [True, False]
