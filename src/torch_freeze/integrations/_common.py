"""What the callbacks for training frameworks share: options, schedules and checks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import nn

from torch_freeze import _format
from torch_freeze._select import Selector, flatten
from torch_freeze._tree import Tree
from torch_freeze.features import FeatureCache
from torch_freeze.freezing import freeze
from torch_freeze.plateau import AdvanceOnPlateau, as_metric, check_same_metric
from torch_freeze.schedule import FreezeSchedule

#: A table {epoch: what is frozen from then on}, or a function that makes a schedule from the model.
Plan: TypeAlias = Mapping[int, Selector] | Callable[[nn.Module], FreezeSchedule]


class FreezeOptions:
    """The constructor of a callback that freezes for good or by a schedule.

    It comes before the framework's callback among the bases. A subclass sets ``_caller``, its name
    in errors, and initializes what it keeps besides the options in ``_init_state``.
    """

    _caller: str

    def __init__(
        self,
        *what: Selector,
        exclude: Selector = (),
        schedule: Plan | None = None,
        monitor: str | None = None,
        hold_norm: bool = True,
        log: bool = True,
        cache: FeatureCache | None = None,
    ) -> None:
        self._what = flatten(what)
        if not self._what and schedule is None and cache is None:
            raise ValueError(f"{self._caller}: name what to freeze, or give a schedule.")
        if cache is not None and not isinstance(cache, FeatureCache):
            raise TypeError(
                f"{self._caller}: cache must be a FeatureCache; got {type(cache).__name__}."
            )
        if monitor is not None and schedule is None:
            raise ValueError(f"{self._caller}: {monitor=} is given, but no schedule.")
        self._exclude = exclude
        self._plan = schedule
        self._given_monitor = monitor
        self._hold_norm = hold_norm
        self._log = log
        self._cache = cache
        self._attached: AbstractContextManager[None] | None = None
        #: The schedule, once training has begun; None without one.
        self.schedule: FreezeSchedule | None = None
        self._init_state()

    def _init_state(self) -> None:
        raise NotImplementedError

    def _attach(self) -> None:
        """Let the cache's model take its batches."""
        if self._cache is not None and self._attached is None:
            self._attached = self._cache.attach()
            self._attached.__enter__()

    def _detach(self) -> None:
        attached, self._attached = self._attached, None
        if attached is not None and self._cache is not None:
            attached.__exit__(None, None, None)
            self._cache.flush()

    def _freeze(self, model: nn.Module) -> None:
        """Freeze what is frozen for good."""
        if self._what:
            freeze(model, *self._what, exclude=self._exclude, hold_norm=self._hold_norm)

    def _make_schedule(self, model: nn.Module, plan: Plan) -> FreezeSchedule:
        if isinstance(plan, Mapping):
            return FreezeSchedule(model, plan)
        schedule = plan(model)
        if not isinstance(schedule, FreezeSchedule):
            raise TypeError(
                f"{self._caller}: schedule must be {{epoch: what is frozen}} or make a "
                f"FreezeSchedule from the model; it made a {type(schedule).__name__}."
            )
        return schedule


def check_monitor(schedule: FreezeSchedule, monitor: str | None, caller: str, fix: str) -> None:
    """Raise if the schedule needs a metric and none is named, or the other way round."""
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
    """Begin every unit up to `unit` that has not begun yet; return whether anything changed."""
    changed = False
    while schedule.last < unit:
        changed |= schedule.step()
    return changed


def check_owned(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], caller: str, fix: str
) -> None:
    """Raise if a parameter is in no optimizer, since a schedule may unfreeze it later."""
    owned = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    left_out = [e.name for e in Tree(model).params.values() if id(e.parameter) not in owned]
    if left_out:
        is_or_are = "is" if len(left_out) == 1 else "are"
        raise ValueError(
            f"{caller}: {_format.listed(left_out)} {is_or_are} in no optimizer and could never "
            f"train. {fix}"
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
    """Raise if DistributedDataParallel, which has wrapped the model, cannot follow a schedule."""
    changes = f"{caller}: a schedule changes what is frozen after DistributedDataParallel has "
    if not finds_unused:
        raise RuntimeError(
            f"{changes}wrapped the model, which then waits for gradients that never come. "
            f"{to_find_unused}"
        )
    if static_graph:
        raise RuntimeError(
            f"{changes}wrapped the model under the assumption that the graph never changes. "
            f"{to_be_dynamic}"
        )
    unknown = schedule.to_unfreeze()
    if unknown:
        one = len(unknown) == 1
        raise RuntimeError(
            f"{caller}: {_format.listed(unknown)} {'was' if one else 'were'} frozen when "
            f"DistributedDataParallel wrapped the model, so {'its' if one else 'their'} "
            f"{'gradient is' if one else 'gradients are'} never averaged: after the schedule has "
            f"unfrozen {'it' if one else 'them'}, the processes would drift apart without an "
            "error. Keep everything that the schedule unfreezes trainable until training starts: "
            "torch_freeze.unfreeze(...)."
        )


def check_ranks(schedule: FreezeSchedule, caller: str) -> None:
    """Raise, on all processes, unless all have the same schedule at the same position."""
    if not _several_processes():
        return
    # Best weights are not compared: each process has copied its own.
    compared = repr(
        {key: value for key, value in schedule.state_dict().items() if key != "weights"}
    )
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256(compared.encode()).hexdigest())
    differ = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if differ:
        raise RuntimeError(
            f"{caller}: the schedule of rank {', '.join(differ)} is not that of rank 0, and the "
            "processes would train different models. Make it from the same arguments, including "
            "the seed, on all of them."
        )


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
