"""A freeze schedule that advances when a metric stops improving, as ReduceLROnPlateau does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from ._select import Selection
from ._tree import ParamEntry, Tree
from .freezing import set_frozen
from .schedule import FreezeOutSchedule, FreezeSchedule, RotationSchedule, check_int


class AdvanceOnPlateau(FreezeSchedule):
    """Begins a schedule's next entry when a metric has stopped improving.

    `torch.optim.lr_scheduler.ReduceLROnPlateau` changes the learning rate; this changes what is
    frozen. Each entry of a table, or each stage of gradual unfreezing, is a phase. Only the order
    of the entries matters, not the units at which they would begin. The first `step()`, before
    training, begins phase 0. Every later one takes the metric of an evaluation, and ends the phase
    when more than `patience` evaluations in a row have not improved on the best one. The best is
    that of the whole run so far, also after a change of phase.

    With `restore_best` the model returns to its best weights whenever a phase ends, unless they
    were just reached. This restores all parameters and all buffers in the model's `state_dict()`,
    but not the optimizer's state, learning rates or random generators. To drop the state gathered
    since then, such as momentum, call `optimizer.state.clear()` when `step` returns True. It needs
    a copy of the model in CPU memory, made at each improvement, and as much again in every saved
    `state_dict()`.

    On several processes, all must pass the same metric, or they would train different models. If
    the model is wrapped in DistributedDataParallel, every `step(metric)` checks this.

    Args:
        schedule: the schedule whose entries are the phases: a FreezeSchedule, or one made by
            `gradual_unfreeze`. Do not step it yourself.
        mode: "min" if a smaller metric is better, "max" if a greater one is.
        patience: number of evaluations in a row without improvement that are allowed; the phase
            ends at the next one, as in ReduceLROnPlateau. (EarlyStopping of Lightning and Keras
            stops one evaluation sooner.)
        min_delta: a metric must beat the best by more than this to count as an improvement.
        min_evals: a phase does not end before this many evaluations, which gives it time to
            recover from a setback at its beginning. One number for all phases, or a list with one
            for each.
        max_evals: a phase ends after this many evaluations, whatever the metric; None means no
            limit. One for all phases, or a list with one (or None) for each.
        restore_best: whether to return to the best weights when a phase ends.

    Attributes:
        phase: the number of the phase, from 0; -1 before the first `step()`.
        best: the best metric so far; None before the first one.
        bad_evals: number of evaluations in this phase since the last improvement.
        finished: whether the last phase has ended, so that training should stop.

    Raises:
        ValueError: an argument is out of range, a list does not have one number for each phase, or
            the schedule has no phases (a rotation never ends; FreezeOut follows its rates).
        TypeError: `schedule` is not a FreezeSchedule, or an argument is not a number.

    Example:
        >>> from torch import nn
        >>> from torch_freeze import AdvanceOnPlateau, gradual_unfreeze
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
        >>> schedule = AdvanceOnPlateau(gradual_unfreeze(model, ["0", "1"]), patience=1)
        >>> changed = schedule.step()  # before training: phase 0
        >>> for loss in (0.9, 0.5, 0.6, 0.7, 0.4):  # from an evaluation after each epoch
        ...     changed = schedule.step(loss)
        ...     print(loss, schedule.phase, [layer.weight.requires_grad for layer in model])
        ...     if schedule.finished:
        ...         break
        0.9 0 [False, True]
        0.5 0 [False, True]
        0.6 0 [False, True]
        0.7 1 [True, True]
        0.4 1 [True, True]
        >>> print(schedule)
        AdvanceOnPlateau, in phase 1 for 1 evaluation, best 0.4: manages 46 of 46 parameters
           phase      frozen  trainable  what is frozen
               0-         36         10  0
        >      1-          0         46  nothing
    """

    def __init__(
        self,
        schedule: FreezeSchedule,
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        min_delta: float = 0.0,
        *,
        min_evals: int | Sequence[int] = 0,
        max_evals: int | Sequence[int | None] | None = None,
        restore_best: bool = False,
    ) -> None:
        caller = "AdvanceOnPlateau"
        if not isinstance(schedule, FreezeSchedule):
            raise TypeError(
                f"{caller}: the schedule must be a FreezeSchedule, got {type(schedule).__name__}. "
                f"Write {caller}(FreezeSchedule(model, ...)) or {caller}(gradual_unfreeze(model, "
                "...))."
            )
        if isinstance(schedule, (FreezeOutSchedule, RotationSchedule, AdvanceOnPlateau)):
            raise ValueError(
                f"{caller}: a {type(schedule).__name__} has no phases to go through; give a "
                "FreezeSchedule or gradual_unfreeze(...)."
            )
        if mode not in ("min", "max"):
            raise ValueError(f"{caller}: mode must be 'min' or 'max', got {mode!r}.")
        check_int(caller, "patience", patience, least=0)
        if isinstance(min_delta, bool) or not isinstance(min_delta, (int, float)):
            raise TypeError(f"{caller}: min_delta must be a number, got {min_delta!r}.")
        if not 0 <= min_delta < math.inf:
            raise ValueError(f"{caller}: min_delta must be at least 0 and finite, got {min_delta}.")
        if not isinstance(restore_best, bool):
            raise TypeError(f"{caller}: restore_best must be True or False, got {restore_best!r}.")
        self.schedule = schedule
        self.model: nn.Module = schedule.model
        self.unit = "evaluation"
        self.hold_norm = schedule.hold_norm
        self._phases = list(schedule._timeline())
        self.mode = mode
        self.patience = patience
        self.min_delta = float(min_delta)
        self.min_evals = [n or 0 for n in _per_phase("min_evals", min_evals, 0, len(self._phases))]
        self.max_evals = _per_phase("max_evals", max_evals, 1, len(self._phases))
        for i, (least, most) in enumerate(zip(self.min_evals, self.max_evals, strict=True)):
            if most is not None and most < least:
                raise ValueError(f"{caller}: phase {i} has min_evals {least}, max_evals {most}.")
        self.restore_best = restore_best
        #: Number of evaluations so far; -1 before the first `step()`.
        self.last = -1
        self.phase = -1
        self.best: float | None = None
        self.bad_evals = 0
        self.finished = False
        self._evals = 0
        self._weights: dict[str, torch.Tensor] | None = None

    def step(self, metric: float | torch.Tensor | None = None) -> bool:
        """Begin phase 0 (without a metric), or take the metric of an evaluation.

        A metric that is NaN or infinite never counts as an improvement.

        Args:
            metric: the value to watch: a number or a tensor of one element. Leave it out only in
                the first call, which comes before training.

        Returns:
            Whether anything was frozen, unfrozen or restored.

        Raises:
            RuntimeError: the first call has a metric, or processes under DistributedDataParallel
                have different ones; with `restore_best` also if the model no longer has the
                parameters and buffers that were kept, or is sharded.
            TypeError: a later call has no metric, or one that is not a number.
        """
        tree = Tree(self.model)
        if self.last < 0:
            if metric is not None:
                raise RuntimeError(
                    "AdvanceOnPlateau.step: phase 0 has not begun. Call step() once before "
                    "training, then step(metric) after each evaluation."
                )
            changed = set_frozen(tree, *self._split(tree, 0), self.hold_norm, "AdvanceOnPlateau")
            self.last = self.phase = 0
            return changed
        value = as_metric(metric, "AdvanceOnPlateau.step")
        for wrapper in tree.ddp:
            group: Any = wrapper.process_group
            check_same_metric(value, "AdvanceOnPlateau.step", group)
        improves = self._improves(value)
        evals, bad = self._evals + 1, 0 if improves else self.bad_evals + 1
        weights = _copy_weights(tree) if improves and self.restore_best else self._weights
        ends = not self.finished and self._ends(evals, bad)
        last = self.phase == len(self._phases) - 1
        # Whatever can fail comes before anything is changed.
        split = self._split(tree, self.phase + 1) if ends and not last else None
        changed = False
        if ends and not improves and weights is not None:
            _restore_weights(tree, weights, "AdvanceOnPlateau.step")
            changed = True
        if split is not None:
            changed |= set_frozen(tree, *split, self.hold_norm, "AdvanceOnPlateau")
            self.phase += 1
        self.last += 1
        self._weights = weights
        if improves:
            self.best = value
        self._evals, self.bad_evals = evals, bad
        if ends:
            self._evals = self.bad_evals = 0
            self.finished = last
        return changed

    def load_best_weights(self) -> None:
        """Put the best weights so far into the model, as the end of a phase does.

        Use this if a run ends before its last phase does.

        Raises:
            RuntimeError: no weights are kept, because `restore_best` is False or no evaluation has
                had a finite metric yet; or the model no longer has the parameters and buffers that
                were kept.
        """
        if self._weights is None:
            why = "no metric was finite yet" if self.restore_best else "restore_best is False"
            raise RuntimeError(f"load_best_weights: no weights are kept: {why}.")
        _restore_weights(Tree(self.model), self._weights, "load_best_weights")

    def state_dict(self) -> dict[str, Any]:
        """Like `FreezeSchedule.state_dict`; with `restore_best` also the best weights (tensors)."""
        state = super().state_dict()
        state |= {
            "phase": self.phase,
            "evals": self._evals,
            "best": self.best,
            "bad_evals": self.bad_evals,
            "finished": self.finished,
        }
        if self.restore_best:
            state["weights"] = None if self._weights is None else dict(self._weights)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Like `FreezeSchedule.load_state_dict`.

        This does not load the model's own weights; load them from the same checkpoint.
        """
        self._check_state(state)
        keys = ["phase", "evals", "best", "bad_evals", "finished"]
        keys += ["weights"] if self.restore_best else []
        missing = [key for key in keys if key not in state]
        if missing:
            raise ValueError(f"load_state_dict: the state has no {', '.join(map(repr, missing))}.")
        for key, least in (("phase", -1), ("evals", 0), ("bad_evals", 0)):
            check_int("load_state_dict", repr(key), state[key], least=least)
        if state["phase"] >= len(self._phases) or (state["phase"] < 0) != (state["last"] < 0):
            raise ValueError(
                f"load_state_dict: phase {state['phase']} after {state['last']} evaluations is not "
                f"possible in a schedule of {len(self._phases)} phases."
            )
        best = state["best"]
        if best is not None:
            best = as_metric(best, "load_state_dict")
        weights: dict[str, torch.Tensor] | None = state["weights"] if self.restore_best else None
        if weights is not None:
            _check_weights(Tree(self.model), weights, "load_state_dict", ValueError)
            weights = {name: tensor.cpu() for name, tensor in weights.items()}
        super().load_state_dict(state)
        self.phase, self._evals, self.bad_evals = state["phase"], state["evals"], state["bad_evals"]
        self.best, self.finished, self._weights = best, bool(state["finished"]), weights

    def _improves(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        if self.mode == "min":
            return value < self.best - self.min_delta
        return value > self.best + self.min_delta

    def _ends(self, evals: int, bad: int) -> bool:
        if evals < self.min_evals[self.phase]:
            return False
        most = self.max_evals[self.phase]
        return bad > self.patience or (most is not None and evals >= most)

    def _where(self) -> str:
        if self.last < 0:
            return "not begun"
        if self.finished:
            return f"finished after {_evaluations(self.last)}, best {self.best}"
        where = f"in phase {self.phase} for {_evaluations(self._evals)}"
        if self.best is not None:
            where += f", best {self.best:.6g}"
        return where + (f", {self.bad_evals} without improvement" if self.bad_evals else "")

    def _counted(self) -> tuple[str, int]:
        return "phase", self.phase

    def _timeline(self) -> Iterable[int]:
        return range(len(self._phases))

    # A phase's number is an index into the list of the schedule's entries.

    def _split(self, tree: Tree, number: int) -> tuple[Selection, Selection]:
        return self.schedule._split(tree, self._phases[number])

    def _counts_at(self, tree: Tree, numbers: Iterable[int]) -> list[int]:
        return self.schedule._counts_at(tree, [self._phases[number] for number in numbers])

    def _frozen_at(self, tree: Tree, number: int) -> Selection:
        return self.schedule._frozen_at(tree, self._phases[number])

    def _managed(self, tree: Tree) -> Selection:
        return self.schedule._managed(tree)

    def _frees(self, tree: Tree) -> list[ParamEntry]:
        return self.schedule._frees(tree)

    def _describe(self, tree: Tree, number: int) -> str:
        return self.schedule._describe(tree, self._phases[number])

    def _own_arguments(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "patience": self.patience,
            "min_delta": self.min_delta,
            "min_evals": self.min_evals,
            "max_evals": self.max_evals,
            "restore_best": self.restore_best,
        }

    def _settings(self) -> dict[str, Any]:
        inner = self.schedule._settings()
        return {"schedule": type(self).__name__, **self._own_arguments(), "phases": inner}

    def _arguments(self) -> tuple[str, dict[str, Any]]:
        return "AdvanceOnPlateau", {"schedule": self.schedule, **self._own_arguments()}


def as_metric(metric: object, caller: str) -> float:
    """`metric` as a float, which may be NaN or infinite."""
    if metric is None:
        raise TypeError(
            f"{caller}: the metric is None; pass the value of the evaluation that has just ended."
        )
    if isinstance(metric, (int, float)) and not isinstance(metric, bool):
        return float(metric)
    try:
        item = metric.item()  # type: ignore[attr-defined]  # tensors, arrays and their scalars
    except (AttributeError, RuntimeError, TypeError, ValueError):
        item = None
    if isinstance(item, bool) or not isinstance(item, (int, float)):
        shape = getattr(metric, "shape", None)
        got = f"{metric!r}" if shape is None else f"a {type(metric).__name__} of {tuple(shape)}"
        raise TypeError(f"{caller}: the metric must be a number or a tensor of one, got {got}.")
    return float(item)


def check_same_metric(
    value: float, caller: str, group: dist.ProcessGroup | None = None, fix: str = ""
) -> None:
    """Raise, on all processes of a group, if they have different values."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    # As text, in which NaN equals NaN.
    differ = [rank for rank, other in enumerate(values) if repr(other) != repr(values[0])]
    if differ:
        raise RuntimeError(
            f"{caller}: the metric of rank {differ[0]} is {values[differ[0]]}, that of rank 0 "
            f"{values[0]}, and the processes would train different models. "
            f"{fix or 'Average it over the processes first, with torch.distributed.all_reduce.'}"
        )


def _per_phase(
    what: str, given: int | Sequence[int | None] | None, least: int, phases: int
) -> list[int | None]:
    caller = "AdvanceOnPlateau"
    listed = [given] * phases if given is None or isinstance(given, int) else given
    if isinstance(listed, str) or not isinstance(listed, Sequence):
        raise TypeError(f"{caller}: {what} must be an int or a list of ints, got {given!r}.")
    if len(listed) != phases:
        raise ValueError(
            f"{caller}: {what} has {len(listed)} numbers, but the schedule has {phases} phases."
        )
    for number in listed:
        if number is not None:
            check_int(caller, what, number, least=least)
    return list(listed)


def _evaluations(number: int) -> str:
    return f"{number} evaluation{'' if number == 1 else 's'}"


def _stored(tree: Tree) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and every buffer of the state_dict, with its name without wrappers."""
    for param in tree.params.values():
        yield param.name, param.parameter
    seen: set[int] = set()
    for entry in tree.order:
        for key, buffer in entry.module._buffers.items():
            left_out = key in entry.module._non_persistent_buffers_set
            if buffer is not None and not left_out and id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{entry.name}.{key}" if entry.name else key, buffer


def _copy_weights(tree: Tree) -> dict[str, torch.Tensor]:
    copies = {}
    for name, tensor in _stored(tree):
        if hasattr(tensor, "to_local"):
            raise RuntimeError(
                f"AdvanceOnPlateau: restore_best keeps whole tensors, and {name} is sharded over "
                "processes. Leave restore_best out, and load a checkpoint when step() begins "
                "a phase."
            )
        copies[name] = tensor.detach().to("cpu", copy=True)
    return copies


def _check_weights(
    tree: Tree, weights: Mapping[str, torch.Tensor], caller: str, error: type[Exception]
) -> None:
    """Raise if kept weights do not fit the model."""
    now = dict(_stored(tree))
    for name in {**now, **weights}:
        if name not in weights:
            raise error(f"{caller}: the best weights have no {name!r}, which the model has now.")
        if name not in now:
            raise error(f"{caller}: the best weights have {name!r}, which the model lacks now.")
        if weights[name].shape != now[name].shape:
            raise error(
                f"{caller}: {name} has shape {list(now[name].shape)}; in the best weights it has "
                f"{list(weights[name].shape)}."
            )


@torch.no_grad()
def _restore_weights(tree: Tree, weights: Mapping[str, torch.Tensor], caller: str) -> None:
    _check_weights(tree, weights, caller, RuntimeError)
    for name, tensor in _stored(tree):
        kept = weights[name].to(tensor.device, tensor.dtype)
        # Frozen tensors with equal values are not written, since guard() would report a change.
        if tensor.requires_grad or not torch.equal(tensor, kept):
            tensor.copy_(kept)
