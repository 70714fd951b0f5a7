"""What the callbacks of training frameworks share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import nn

from torch_freeze._select import Selector
from torch_freeze._tree import Tree
from torch_freeze.freezing import never_thawed
from torch_freeze.plateau import AdvanceOnPlateau, as_metric, check_same_metric
from torch_freeze.schedule import FreezeSchedule

#: A table {epoch: what is frozen from there on}, or what makes a schedule once the model is there.
Plan: TypeAlias = Mapping[int, Selector] | Callable[[nn.Module], FreezeSchedule]


def make_schedule(plan: Plan, model: nn.Module, caller: str) -> FreezeSchedule:
    """The schedule a plan stands for."""
    if isinstance(plan, Mapping):
        return FreezeSchedule(model, plan)
    schedule = plan(model)
    if not isinstance(schedule, FreezeSchedule):
        raise TypeError(
            f"{caller}: schedule must be {{epoch: what is frozen}} or make a FreezeSchedule from "
            f"the model; it made a {type(schedule).__name__}."
        )
    return schedule


def check_monitor(schedule: FreezeSchedule, monitor: str | None, caller: str, fix: str) -> None:
    """Raise where a metric is to be watched and no name is given, or the other way round."""
    if isinstance(schedule, AdvanceOnPlateau) and monitor is None:
        raise ValueError(f"{caller}: an AdvanceOnPlateau needs the name of a metric. {fix}")
    if not isinstance(schedule, AdvanceOnPlateau) and monitor is not None:
        raise ValueError(
            f"{caller}: {monitor=} is given, but a {type(schedule).__name__} watches no metric; "
            "let the schedule make an AdvanceOnPlateau."
        )


def end_evaluation(schedule: AdvanceOnPlateau, metric: object, caller: str, fix: str) -> bool:
    """Step a schedule with a metric that must be the same on all processes."""
    value = as_metric(metric, caller)
    if _several_processes():
        check_same_metric(value, caller, fix=fix)
    return schedule.step(value)


def catch_up(schedule: FreezeSchedule, unit: int) -> bool:
    """Begin every unit up to `unit` that has not begun; whether anything changed."""
    changed = False
    while schedule.last < unit:
        changed |= schedule.step()
    return changed


def check_owned(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], caller: str, fix: str
) -> None:
    """Raise where a parameter is in no optimizer, since a schedule may free it later."""
    owned = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    left_out = [e.name for e in Tree(model).params.values() if id(e.parameter) not in owned]
    if left_out:
        is_or_are = "is" if len(left_out) == 1 else "are"
        raise ValueError(
            f"{caller}: {_first(left_out)} {is_or_are} in no optimizer and could never train. {fix}"
        )


def check_ddp(
    schedule: FreezeSchedule,
    caller: str,
    *,
    finds_unused: bool,
    static_graph: bool,
    to_find_unused: str,
    to_be_dynamic: str,
) -> None:
    """Raise where DistributedDataParallel, which has wrapped by now, cannot follow a schedule."""
    changes = f"{caller}: a schedule changes what is frozen after DistributedDataParallel has "
    if not finds_unused:
        raise RuntimeError(
            f"{changes}wrapped the model, which then waits for gradients that never come. "
            f"{to_find_unused}"
        )
    if static_graph:
        raise RuntimeError(f"{changes}been told that the graph never changes. {to_be_dynamic}")
    tree = Tree(schedule.model)
    now = schedule._frozen_at(tree, max(schedule._counted()[1], 0))
    kept = never_thawed(tree, now, schedule._managed(tree))
    unknown = [
        entry.name
        for entry in schedule._frees(tree)
        if not entry.parameter.requires_grad and id(entry) not in kept
    ]
    if unknown:
        was_or_were = "was" if len(unknown) == 1 else "were"
        raise RuntimeError(
            f"{caller}: {_first(unknown)} {was_or_were} frozen when DistributedDataParallel "
            "wrapped the model, so their gradients are never averaged: once the schedule frees "
            "them, the processes would drift apart without an error. Let everything that the "
            "schedule frees be trainable until training starts: torch_freeze.unfreeze(...)."
        )


def check_ranks(schedule: FreezeSchedule, caller: str) -> None:
    """Raise, on all processes, where they do not have the same schedule at the same place."""
    if not _several_processes():
        return
    # Kept weights, which each process has copied from its own model, are not compared.
    told = repr({key: value for key, value in schedule.state_dict().items() if key != "weights"})
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256(told.encode()).hexdigest())
    differ = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if differ:
        raise RuntimeError(
            f"{caller}: the schedule of rank {', '.join(differ)} is not that of rank 0, and the "
            "processes would train different models. Let all make it from the same arguments, "
            "seed included."
        )


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
