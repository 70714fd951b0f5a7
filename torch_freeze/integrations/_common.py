"""What the callbacks of training frameworks share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import torch
from torch import nn

from torch_freeze._select import Selector, Tree
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


def catch_up(schedule: FreezeSchedule, unit: int) -> bool:
    """Begin every unit up to `unit` that has not begun; whether anything changed."""
    changed = False
    while schedule.last < unit:
        changed |= schedule.step()
    return changed


def check_owned(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], caller: str, mend: str
) -> None:
    """Raise where a parameter is in no optimizer, since a schedule may free it later."""
    owned = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    left_out = [e.name for e in Tree(model).params.values() if id(e.parameter) not in owned]
    if left_out:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        raise ValueError(
            f"{caller}: {', '.join(left_out[:3])}{more} {'is' if len(left_out) == 1 else 'are'} in "
            f"no optimizer and could never train. {mend}"
        )


def refuse_ddp(caller: str, mend: str) -> None:
    """Raise: DDP would wait for the gradients of what is frozen after it has wrapped."""
    raise RuntimeError(
        f"{caller}: a schedule changes what is frozen after DistributedDataParallel has wrapped "
        f"the model, which then waits for gradients that never come. {mend}"
    )
