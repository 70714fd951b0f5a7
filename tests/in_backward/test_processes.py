"""DDP, FSDP and ZeRO around a step in backward: the same bits, or an error that says why not."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import processes
from tests.helpers.hostile_use import (
    Make,
    bits,
    net,
    ordinary,
    outcome_of,
    train,
)


def _ddp(make: Make, **options: Any) -> Any:
    model = nn.parallel.DistributedDataParallel(net(), **options)
    before = [p.detach().clone() for p in model.parameters()]
    try:
        train(model, make(model.parameters()))
    finally:
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def _ddp_no_sync(make: Make) -> Any:
    model = nn.parallel.DistributedDataParallel(net())
    with model.no_sync():
        train(model, make(model.parameters()))


def _fsdp1(make: Make, use_orig_params: bool) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    cpu = torch.device("cpu")
    model = FullyShardedDataParallel(net(), use_orig_params=use_orig_params, device_id=cpu)
    train(model, make(model.parameters()))


def _fsdp1_after(make: Make) -> Any:
    """The parameters stay, and FSDP sets their gradients: step() makes the whole update."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = net()
    optimizer = make(model.parameters())
    cpu = torch.device("cpu")
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu)
    train(wrapped, optimizer)
    return [bits(p) for p in optimizer.param_groups[0]["params"]]


def _fsdp2(make: Make) -> Any:
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model)
    train(model, make(model.parameters()))


def _zero(make: Make, scheduled: bool) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = net()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), make, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    return train(model, optimizer, between=lambda step: scheduler.step() if scheduled else None)[:8]


SHARDED = "whose gradient is not the one that backward accumulates"
AMONG_PROCESSES: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "DDP": (_ddp, {}, "has a hook on its AccumulateGrad"),
    "DDP of a static graph": (_ddp, {"static_graph": True}, "has a hook on its AccumulateGrad"),
    "DDP in no_sync()": (_ddp_no_sync, {}, "has a hook on its AccumulateGrad"),
    "FSDP1": (_fsdp1, {"use_orig_params": False}, SHARDED),
    "FSDP1 with use_orig_params": (_fsdp1, {"use_orig_params": True}, SHARDED),
    "FSDP1 around a model that has its optimizer": (_fsdp1_after, {}, ""),
    "FSDP2": (_fsdp2, {}, SHARDED),
    "ZeroRedundancyOptimizer": (_zero, {"scheduled": False}, ""),
    "ZeroRedundancyOptimizer, scheduled": (
        _zero,
        {"scheduled": True},
        r"lr of param_groups\[0\] was changed",
    ),
}


@pytest.fixture(scope="module", params=[1, 2], ids=["1 process", "2 processes"])
def world(request: pytest.FixtureRequest) -> Iterator[processes.World]:
    with processes.world_of("cpu", request.param) as world:
        yield world


def outcome_here(device: str, name: str, in_backward: bool) -> tuple[Any, str]:
    """In one of the processes."""
    scenario, options, _ = AMONG_PROCESSES[name]
    how: dict[str, Any] = {"step_in_backward": True, "bucket_mb": 0} if in_backward else {}
    outcome = outcome_of(lambda make: scenario(make, **options), functools.partial(ordinary, **how))
    return outcome.value, outcome.error


@pytest.mark.parametrize("name", AMONG_PROCESSES)
def test_processes_get_the_ordinary_steps_bits_or_an_error(
    world: processes.World, name: str
) -> None:
    error = AMONG_PROCESSES[name][2]
    ours = world.run(outcome_here, name, True)
    if error:
        assert all(re.search(error, message) for _, message in ours), ours
    else:
        assert ours == world.run(outcome_here, name, False)
        assert not any(message for _, message in ours), ours
