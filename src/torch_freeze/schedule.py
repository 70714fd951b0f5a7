"""Freeze schedules: what is frozen when, and three published ones."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from . import _format
from ._select import Selection, Selector, as_selectors, everything, select
from ._tree import ModuleEntry, ParamEntry, Tree, check_model
from .freezing import never_thawed, set_frozen, subtract
from .frozen_state import apply_frozen_state, frozen_state

Unit: TypeAlias = Literal["epoch", "step"]
#: A printed timeline shows this many entries at most: those around the current one.
_ROWS = 50


class FreezeSchedule:
    """A table that says what is frozen from which epoch or step on.

    The schedule manages the parameters that any of its entries names. Each entry freezes those it
    names and makes the other managed ones trainable. Parameters that no entry names are not
    changed, and neither are those that the model itself keeps frozen (see `unfreeze`). The schedule
    changes no optimizer. With an optimizer of torch_freeze over all parameters, such as
    FrozenAwareAdamW, learning-rate schedulers, checkpoints and param groups keep working.

    Args:
        model: the model; also DDP-wrapped or compiled.
        entries: {unit number: what is frozen from then on}, in the terms of `freeze`; an empty
            list freezes nothing.
        unit: what one `step()` begins, "epoch" or "step".
        hold_norm: as in `freeze`.

    Raises:
        ValueError: something named matches nothing (with the nearest names), a unit number is
            negative, there are no entries, or `unit` is unknown.
        TypeError: `model` is not a module, `entries` is not a mapping, or a unit number is not an
            int.

    Example:
        >>> from torch import nn
        >>> from torch_freeze import FreezeSchedule
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> schedule = FreezeSchedule(model, {0: ["0", "1"], 2: ["0"], 3: []})
        >>> for epoch in range(3):
        ...     changed = schedule.step()
        ...     print(epoch, changed, [layer.weight.requires_grad for layer in model])
        0 True [False, False, True]
        1 False [False, False, True]
        2 True [False, True, True]
        >>> print(schedule)
        FreezeSchedule, at epoch 2: manages 56 of 66 parameters; the others are not changed
           epoch      frozen  trainable  what is frozen
               0-         56          0  0, 1
        >      2-         36         20  0
               3-          0         56  nothing
    """

    def __init__(
        self,
        model: nn.Module,
        entries: Mapping[int, Selector],
        unit: Unit = "epoch",
        *,
        hold_norm: bool = True,
    ) -> None:
        check_model(model, "FreezeSchedule")
        if not isinstance(entries, Mapping):
            raise TypeError(
                "FreezeSchedule: entries must map unit numbers to what is frozen from then on, "
                f"such as {{0: ['layer1'], 3: []}}; got {type(entries).__name__}."
            )
        if not entries:
            raise ValueError("FreezeSchedule: there are no entries.")
        for number in entries:
            check_int("FreezeSchedule", "unit number", number, least=0)
        _check_unit("FreezeSchedule", unit)
        self.model = model
        self.unit: Unit | Literal["evaluation"] = unit
        self.hold_norm = hold_norm
        self._entries = {number: as_selectors(entries[number]) for number in sorted(entries)}
        self._named = _distinct(self._entries.values())
        #: Number of the unit that the last `step()` began; -1 before the first.
        self.last = -1
        tree = Tree(model)
        for number, wanted in self._entries.items():
            select(tree, wanted, f"FreezeSchedule, entry {number}")
        self._plan = self._resolved(tree)

    def step(self) -> bool:
        """Begin the next unit. Call this at the start of every epoch (or step).

        Returns:
            Whether anything was frozen or unfrozen.
        """
        self.last += 1
        if not self._applies(self.last):
            return False
        tree = Tree(self.model)
        frozen, managed = self._split(tree, self.last)
        return set_frozen(tree, frozen, managed, self.hold_norm, type(self).__name__)

    def state_dict(self) -> dict[str, Any]:
        """Position, frozen set and arguments of the schedule as plain numbers, strings and lists.

        The frozen set is that of the whole model, as in `frozen_state_dict`, including parameters
        that the schedule does not manage.
        """
        return {**self._settings(), "last": self.last, **frozen_state(Tree(self.model))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the position, the frozen parameters and the held norms of a saved state.

        Every parameter of the model becomes frozen or trainable as it was then, whether the
        schedule manages it or not. The model may be wrapped (DDP, compile) differently.

        Raises:
            ValueError: a name is not in this model, a key is missing, or the state comes from
                another kind of schedule or from one with other arguments (units, entries,
                parameters under an entry, layers). Nothing is changed then.
            TypeError: `state` is not a mapping.
        """
        self._check_state(state)
        apply_frozen_state(Tree(self.model), state, "load_state_dict")
        self.last = state["last"]

    def difference(self, state: Mapping[str, Any]) -> str:
        """How the schedule that saved a state differs from this one, in words.

        Args:
            state: what `state_dict` returned.

        Returns:
            The first difference in kind or arguments; "" if `load_state_dict` would take the state
            as its own.

        Example:
            >>> from torch import nn
            >>> from torch_freeze import gradual_unfreeze
            >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
            >>> saved = gradual_unfreeze(model, ["0", "1"], every=2).state_dict()
            >>> gradual_unfreeze(model, ["0", "1"], every=3).difference(saved)
            'it has entries[1]=2, this one entries[1]=3'
        """
        for key, own in self._settings().items():
            if key not in state:
                return f"it has no {key!r}, which a {type(self).__name__} saves"
            saved = state[key]
            if saved == own:
                continue
            if isinstance(saved, list) and isinstance(own, list):
                saved, own = dict(enumerate(saved)), dict(enumerate(own))
            while isinstance(saved, dict) and isinstance(own, dict):
                at = next(k for k in {**own, **saved} if saved.get(k) != own.get(k))
                key, saved, own = f"{key}[{at!r}]", saved.get(at), own.get(at)
            return f"it has {key}={saved!r}, this one {key}={own!r}"
        return ""

    def to_unfreeze(self) -> tuple[str, ...]:
        """Names of the parameters that are frozen now and trainable at some unit of the schedule.

        Example:
            >>> from torch import nn
            >>> from torch_freeze import FreezeSchedule
            >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 2))
            >>> schedule = FreezeSchedule(model, {0: ["0", "1"], 2: ["0"]})
            >>> _ = schedule.step()
            >>> schedule.to_unfreeze()
            ('1.weight', '1.bias')
        """
        tree = Tree(self.model)
        now = self._frozen_at(tree, max(self._counted()[1], 0))
        kept = never_thawed(tree, now, self._managed(tree))
        return tuple(
            entry.name
            for entry in self._frees(tree)
            if not entry.parameter.requires_grad and id(entry) not in kept
        )

    def arguments(self) -> tuple[str, dict[str, Any]]:
        """What makes this schedule: a public function's name and its arguments after the model.

        Example:
            >>> from torch import nn
            >>> from torch_freeze import gradual_unfreeze
            >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
            >>> function, arguments = gradual_unfreeze(model, ["0", "1"], every=2).arguments()
            >>> function, arguments["groups"], arguments["every"]
            ('gradual_unfreeze', [['0'], ['1']], 2)
        """
        return self._arguments()

    def __str__(self) -> str:
        tree = Tree(self.model)
        managed = self._managed(tree)
        total = _elements(everything(tree))
        covered = _elements(managed)
        head = f"{type(self).__name__}, {self._where()}: "
        head += f"manages {_format.count(covered)} of {_format.count(total)} "
        head += "parameters; the others are not changed" if covered < total else "parameters"
        counted, number_now = self._counted()
        lines = [head, f"  {counted:>6}   {'frozen':>9}  {'trainable':>9}  what is frozen"]
        numbers = list(self._timeline())
        now = max((i for i, number in enumerate(numbers) if number <= number_now), default=None)
        first = max(0, min((now or 0) - _ROWS // 2, len(numbers) - _ROWS))
        end = min(first + _ROWS, len(numbers))
        if first:
            lines.append(f"         ... {first} earlier")
        for i, frozen in enumerate(self._counts_at(tree, numbers[first:end]), first):
            line = f"{'>' if i == now else ' '} {numbers[i]:>6}-  {_format.count(frozen):>9}  "
            line += f"{_format.count(covered - frozen):>9}  {self._describe(tree, numbers[i])}"
            lines.append(_format.fit(line))
        if end < len(numbers):
            lines.append(f"         ... {len(numbers) - end} later")
        return "\n".join(lines)

    def __repr__(self) -> str:
        numbers = [str(number) for number in self._timeline()]
        shown = ", ".join(numbers[:20]) + (", ..." if len(numbers) > 20 else "")
        return (
            f"<{type(self).__name__} of {type(self.model).__name__}, {self.unit} {self.last}, "
            f"entries at {shown}>"
        )

    def _where(self) -> str:
        """The current position, for the first line of what is printed."""
        return f"at {self.unit} {self.last}" if self.last >= 0 else "not begun"

    def _counted(self) -> tuple[str, int]:
        """What the numbers of the timeline count, and the current one."""
        return self.unit, self.last

    def _applies(self, number: int) -> bool:
        return number in self._entries

    def _split(self, tree: Tree, number: int) -> tuple[Selection, Selection]:
        """What is frozen at a unit, and what is managed."""
        return self._frozen_at(tree, number), self._managed(tree)

    def _counts_at(self, tree: Tree, numbers: Iterable[int]) -> list[int]:
        """How many elements are frozen at each of these units."""
        return [_elements(self._frozen_at(tree, number)) for number in numbers]

    def _frozen_at(self, tree: Tree, number: int) -> Selection:
        """The managed parameters that are frozen at a unit."""
        current = max((n for n in self._entries if n <= number), default=None)
        return Selection() if current is None else self._frozen_by(tree, current)

    def _frozen_by(self, tree: Tree, number: int) -> Selection:
        """What the entry of this number freezes."""
        return select(tree, self._entries[number], "step")

    def _managed(self, tree: Tree) -> Selection:
        return select(tree, self._named, "step")

    def _frees(self, tree: Tree) -> list[ParamEntry]:
        """The parameters that are trainable at some unit."""
        always = [next(iter(self._entries))]
        changes = self._changes(tree)
        return [
            entry for key, entry in self._managed(tree).params.items() if changes[key] != always
        ]

    def _settings(self) -> dict[str, Any]:
        """What a saved state must agree with: the kind of schedule and its arguments."""
        return {
            "schedule": type(self).__name__,
            "unit": self.unit,
            "hold_norm": self.hold_norm,
            **self._plan,
        }

    def _resolved(self, tree: Tree) -> dict[str, Any]:
        """The names that the entries stand for, taken when the schedule is built."""
        changes = self._changes(tree)
        params = self._managed(tree).params.items()
        return {
            "entries": list(self._entries),
            "changes": {entry.name: changes[key] for key, entry in params},
        }

    def _changes(self, tree: Tree) -> dict[int, list[int]]:
        """For each managed parameter, the units at which it is frozen, unfrozen, frozen, ..."""
        changes: dict[int, list[int]] = {key: [] for key in self._managed(tree).params}
        before: set[int] = set()
        for number in self._entries:
            frozen = set(self._frozen_by(tree, number).params)
            for key in frozen ^ before:
                changes[key].append(number)
            before = frozen
        return changes

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Raise if `state` was not saved by a schedule like this one."""
        if not isinstance(state, Mapping):
            raise TypeError(f"load_state_dict: expected a mapping, got {type(state).__name__}.")
        missing = [key for key in ("last", "frozen", "held") if key not in state]
        if missing:
            raise ValueError(
                f"load_state_dict: the state has no {', '.join(map(repr, missing))}, so it is not "
                "one that a schedule saved."
            )
        if differs := self.difference(state):
            raise ValueError(
                f"load_state_dict: the state is of another schedule: {differs}. Load it into a "
                "schedule built with the same arguments."
            )
        check_int("load_state_dict", "'last'", state["last"], least=-1)

    def _arguments(self) -> tuple[str, dict[str, Any]]:
        return "FreezeSchedule", {"entries": self._entries, **self._common_arguments()}

    def _common_arguments(self) -> dict[str, Any]:
        return {"unit": self.unit, "hold_norm": self.hold_norm}

    def _timeline(self) -> Iterable[int]:
        return self._entries

    def _describe(self, tree: Tree, number: int) -> str:
        return _spell_all(tree, self._entries[number]) or "nothing"


def gradual_unfreeze(
    model: nn.Module,
    groups: Iterable[Selector],
    every: int = 1,
    *,
    unit: Unit = "epoch",
    hold_norm: bool = True,
) -> FreezeSchedule:
    """Train only the last group at first, then unfreeze the one before it every few units.

    Source: J. Howard and S. Ruder, "Universal Language Model Fine-tuning for Text Classification"
    (ULMFiT), 2018, arXiv:1801.06146, section 3.3.

    Args:
        model: the model.
        groups: layer groups from input to output, each in the terms of `freeze`. The first
            `step()` leaves only the last group trainable; every `every` units one more group is
            unfrozen. Parameters in no group are not changed. A tied parameter or shared module
            with names in several groups belongs to the last of them and trains with that one.
        every: number of units between two groups.
        unit: as in FreezeSchedule.
        hold_norm: as in `freeze`.

    Returns:
        A FreezeSchedule.

    Raises:
        ValueError: a group matches nothing or is empty, there are no groups, or `every` is below 1.
        TypeError: as FreezeSchedule; or `groups` is a single name instead of a list.

    Example:
        >>> from torch import nn
        >>> from torch_freeze import gradual_unfreeze
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> schedule = gradual_unfreeze(model, ["0", "1", "2"])
        >>> for epoch in range(3):
        ...     _ = schedule.step()
        ...     print([layer.weight.requires_grad for layer in model])
        [False, False, True]
        [False, True, True]
        [True, True, True]
    """
    check_int("gradual_unfreeze", "every", every, least=1)
    listed = _groups(model, groups, "gradual_unfreeze")
    last = len(listed) - 1
    counts = {every * i: last - i for i in range(last + 1)}
    return GradualUnfreezeSchedule(model, listed, counts, every, unit, hold_norm)


def freeze_out(
    model: nn.Module,
    groups: Iterable[Selector],
    total_steps: int,
    *,
    t0: float = 0.8,
    how: Literal["cubic", "linear"] = "cubic",
    scale_lr: bool = True,
    unit: Unit = "step",
    hold_norm: bool = True,
) -> FreezeOutSchedule:
    """Anneal each group's learning rate to zero along its own cosine, then freeze the group.

    Groups near the input freeze first. Group i (counted from 0) trains for the share t_i of the
    run. The shares rise linearly from `t0` to 1; "cubic" takes their cubes, so that early groups
    freeze sooner and later ones get more of the time. At step `t < t_i * total_steps` the group's
    rate is

        lr_i(t) = lr_i(0) / 2 * (1 + cos(pi * t / (t_i * total_steps)))

    with lr_i(0) = lr, or lr / t_i with `scale_lr`, which keeps the sum of rates of every group
    the same.

    The schedule itself changes no param group. It returns the param groups, one per layer group,
    and learning-rate multipliers for torch's LambdaLR (see the example).

    Source: A. Brock, T. Lim, J. M. Ritchie and N. Weston, "FreezeOut: Accelerate Training by
    Progressively Freezing Layers", 2017, arXiv:1706.04983. Its defaults (cubic, scaled, t0 0.8
    before cubing) are the defaults here.

    Args:
        model: the model.
        groups: layer groups from input to output, each in the terms of `freeze`. Parameters in no
            group are not changed and have a constant multiplier of 1. A tied parameter or shared
            module with names in several groups belongs to the last of them.
        total_steps: length of the run, in units.
        t0: share of the run, in (0, 1], after which the first group freezes; before cubing.
        how: "cubic" or "linear".
        scale_lr: raise the initial rate of groups that train for a shorter time.
        unit: as in FreezeSchedule.
        hold_norm: as in `freeze`.

    Returns:
        A FreezeOutSchedule: a FreezeSchedule with `param_groups(lr)` and `lr_lambdas()`.

    Raises:
        ValueError: a group matches nothing or is empty, or an argument is out of its range.
        TypeError: as FreezeSchedule.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch_freeze import freeze_out
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> schedule = freeze_out(model, ["0", "1", "2"], total_steps=10, t0=0.5, how="linear")
        >>> optimizer = torch.optim.SGD(schedule.param_groups(lr=0.1))
        >>> rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.lr_lambdas())
        >>> for step in range(10):
        ...     _ = schedule.step()  # before the forward
        ...     optimizer.step()
        ...     rates.step()
        ...     if step in (0, 4, 5, 8):
        ...         trains = [layer.weight.requires_grad for layer in model]
        ...         print(step, trains, [f"{lr:.3f}" for lr in rates.get_last_lr()])
        0 [True, True, True] ['0.181', '0.128', '0.098']
        4 [True, True, True] ['0.000', '0.033', '0.050']
        5 [False, True, True] ['0.000', '0.013', '0.035']
        8 [False, False, True] ['0.000', '0.000', '0.002']
    """
    caller = "freeze_out"
    check_int(caller, "total_steps", total_steps, least=1)
    if how not in ("cubic", "linear"):
        raise ValueError(f"freeze_out: how must be 'cubic' or 'linear', got {how!r}.")
    if not isinstance(t0, (int, float)) or not 0 < t0 <= 1:
        raise ValueError(f"freeze_out: t0 must be in (0, 1], got {t0!r}.")
    listed = _groups(model, groups, caller)
    power = 3 if how == "cubic" else 1
    last = len(listed) - 1
    shares = [(t0 + (1 - t0) * i / last if last else 1.0) ** power for i in range(last + 1)]
    made = FreezeOutSchedule(model, listed, total_steps, shares, scale_lr, unit, hold_norm)
    made.t0, made.how = t0, how
    return made


def rotate(
    model: nn.Module,
    layers: Selector,
    k: int,
    every: int,
    always: Selector = (),
    seed: int = 0,
    *,
    unit: Unit = "step",
    hold_norm: bool = True,
) -> RotationSchedule:
    """Train `k` randomly drawn layers at a time and what `always` names; freeze the rest.

    Every `every` units `k` layers are drawn, uniformly and without replacement. The draw depends
    only on `seed` and the number of the period, so a resumed run draws the same layers.

    Source: R. Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language
    Model Fine-Tuning", 2024, arXiv:2403.17919; there the embedding and the head always train.

    Args:
        model: the model.
        layers: a glob over modules (or anything else `freeze` takes). Each match is a layer to
            draw; a match inside another one does not count.
        k: number of layers that train at a time.
        every: number of units between two draws.
        always: what always trains, in the terms of `freeze`.
        seed: seed of the draws.
        unit: as in FreezeSchedule.
        hold_norm: as in `freeze`.

    Returns:
        A RotationSchedule: a FreezeSchedule whose `active` names the layers training now.

    Raises:
        ValueError: something named matches nothing or no module, `k` is not between 1 and the
            number of layers, or `every` is below 1.
        TypeError: as FreezeSchedule.

    Example:
        >>> from torch import nn
        >>> from torch_freeze import rotate
        >>> model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
        >>> schedule = rotate(model, "[0-4]", k=2, every=10, always="5", seed=1)
        >>> _ = schedule.step()
        >>> len(schedule.active), [p.requires_grad for p in model[5].parameters()]
        (2, [True, True])
        >>> sum(layer.weight.requires_grad for layer in model)
        3
    """
    return RotationSchedule(model, layers, k, every, always, seed, unit, hold_norm)


class _GroupSchedule(FreezeSchedule):
    """A FreezeSchedule that freezes its first few groups: {unit number: how many} in `counts`."""

    def __init__(
        self,
        model: nn.Module,
        groups: list[list[Selector]],
        counts: dict[int, int],
        unit: Unit,
        hold_norm: bool,
    ) -> None:
        self._groups = groups
        self._counts = counts
        super().__init__(model, {number: [] for number in counts}, unit, hold_norm=hold_norm)

    def _frozen_by(self, tree: Tree, number: int) -> Selection:
        count = self._counts[number]
        of_groups, owner = self._owned(tree)
        frozen = Selection()
        for group in of_groups[:count]:
            frozen.params.update((k, e) for k, e in group.params.items() if owner[k] < count)
            frozen.modules.update((k, e) for k, e in group.modules.items() if owner[k] < count)
            frozen.heads.update((k, e) for k, e in group.heads.items() if owner[k] < count)
        return frozen

    def _counts_at(self, tree: Tree, numbers: Iterable[int]) -> list[int]:
        sizes = [0] * len(self._groups)
        _, owner = self._owned(tree)
        for key, entry in self._managed(tree).params.items():
            sizes[owner[key]] += entry.numel
        upto = [0, *itertools.accumulate(sizes)]
        return [upto[self._counts[number]] for number in numbers]

    def _managed(self, tree: Tree) -> Selection:
        # Not flattened: each group counts as one argument, see `unfreeze`.
        return select(tree, self._groups, "step")

    def _owned(self, tree: Tree) -> tuple[list[Selection], dict[int, int]]:
        """What each group names, and which group a parameter or module belongs to."""
        of_groups = [select(tree, group, "step") for group in self._groups]
        owner: dict[int, int] = {}
        for i, group in enumerate(of_groups):
            entries: Iterable[ParamEntry | ModuleEntry]
            for entries in (group.params.values(), group.modules.values()):
                for entry in entries:
                    # Tied: the last group. One name in several groups: the first of them.
                    if entry.aliases or id(entry) not in owner:
                        owner[id(entry)] = i
        return of_groups, owner

    def _changes(self, tree: Tree) -> dict[int, list[int]]:
        # By group: there may be thousands of parameters and thousands of entries.
        of_group: list[list[int]] = [[] for _ in self._groups]
        before = 0
        for number in self._entries:
            count = self._counts[number]
            for i in range(min(before, count), max(before, count)):
                of_group[i].append(number)
            before = count
        _, owner = self._owned(tree)
        return {key: of_group[owner[key]] for key in self._managed(tree).params}

    def _describe(self, tree: Tree, number: int) -> str:
        named = itertools.chain.from_iterable(self._groups[: self._counts[number]])
        return _spell_all(tree, named) or "nothing"


class GradualUnfreezeSchedule(_GroupSchedule):
    """One group more trains every few units. Made by `gradual_unfreeze`."""

    def __init__(
        self,
        model: nn.Module,
        groups: list[list[Selector]],
        counts: dict[int, int],
        every: int,
        unit: Unit,
        hold_norm: bool,
    ) -> None:
        self.every = every
        super().__init__(model, groups, counts, unit, hold_norm)

    def _arguments(self) -> tuple[str, dict[str, Any]]:
        own = {"groups": self._groups, "every": self.every}
        return "gradual_unfreeze", {**own, **self._common_arguments()}


class FreezeOutSchedule(_GroupSchedule):
    """FreezeOut: the schedule, and the learning rates that go with it. Made by `freeze_out`."""

    def __init__(
        self,
        model: nn.Module,
        groups: list[list[Selector]],
        total_steps: int,
        shares: list[float],
        scale_lr: bool,
        unit: Unit,
        hold_norm: bool,
    ) -> None:
        self.total_steps = total_steps
        #: Share of the run after which each group is frozen.
        self.shares = shares
        self.scale_lr = scale_lr
        self.t0: float = 0.8
        self.how: Literal["cubic", "linear"] = "cubic"
        counts = {0: 0}
        for i, share in enumerate(shares):
            # A rounding error must not add a step: 0.1 * 3 * 10 is more than 3.
            counts[math.ceil(share * total_steps - 1e-9)] = i + 1
        super().__init__(model, groups, counts, unit, hold_norm)

    def param_groups(self, lr: float, **options: Any) -> list[dict[str, Any]]:
        """Param groups for an optimizer: one per layer group, then one with all other parameters.

        Args:
            lr: the base learning rate of all groups.
            options: further options of all groups, such as weight_decay.
        """
        tree = Tree(self.model)
        of_groups, owner = self._owned(tree)
        made: list[list[torch.Tensor]] = [
            [entry.parameter for key, entry in group.params.items() if owner[key] == i]
            for i, group in enumerate(of_groups)
        ]
        rest: list[torch.Tensor] = [e.parameter for e in tree.params.values() if id(e) not in owner]
        if rest:
            made.append(rest)
        return [{"params": params, "lr": lr, **options} for params in made]

    def lr_lambdas(self) -> list[Callable[[int], float]]:
        """Multipliers for torch.optim.lr_scheduler.LambdaLR, one per group of `param_groups`."""
        made: list[Callable[[int], float]] = [
            CosineToZero(share * self.total_steps, 1 / share if self.scale_lr else 1.0)
            for share in self.shares
        ]
        if len(self.param_groups(0.0)) > len(made):
            made.append(CosineToZero(math.inf, 1.0))
        return made

    def _settings(self) -> dict[str, Any]:
        own = {"total_steps": self.total_steps, "shares": list(self.shares)}
        return {**super()._settings(), **own}

    def _arguments(self) -> tuple[str, dict[str, Any]]:
        own = {"groups": self._groups, "total_steps": self.total_steps, "t0": self.t0}
        own |= {"how": self.how, "scale_lr": self.scale_lr}
        return "freeze_out", {**own, **self._common_arguments()}


# No slots: LambdaLR saves the __dict__ of a callable in its state_dict.
@dataclass(frozen=True)
class CosineToZero:
    """A learning-rate multiplier that falls from `start` to 0 at `end` along half a cosine."""

    end: float
    start: float

    def __call__(self, step: int) -> float:
        """The multiplier at a step."""
        if step >= self.end:
            return 0.0
        return self.start * 0.5 * (1 + math.cos(math.pi * step / self.end))


class RotationSchedule(FreezeSchedule):
    """A few random layers train at a time. Made by `rotate`."""

    def __init__(
        self,
        model: nn.Module,
        layers: Selector,
        k: int,
        every: int,
        always: Selector,
        seed: int,
        unit: Unit,
        hold_norm: bool,
    ) -> None:
        check_model(model, "rotate")
        check_int("rotate", "k", k, least=1)
        check_int("rotate", "every", every, least=1)
        check_int("rotate", "seed", seed, least=None)
        _check_unit("rotate", unit)
        self._layers = as_selectors(layers)
        self._always = as_selectors(always)
        self.k = k
        self.every = every
        self.seed = seed
        tree = Tree(model)
        found = self._units(tree)
        if not found:
            raise ValueError(
                "rotate: layers names no module with parameters; give a glob over modules, such "
                "as 'encoder.layer.*'."
            )
        if k > len(found):
            named = ", ".join(entry.name for entry in found[:6])
            raise ValueError(
                f"rotate: {k=} layers should train at a time, but layers names {len(found)} "
                f"({named}); each match of the glob is one layer."
            )
        super().__init__(model, {0: []}, unit, hold_norm=hold_norm)

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the drawn layers that train now; empty before the first `step()`."""
        if self.last < 0:
            return ()
        units = self._units(Tree(self.model))
        return tuple(entry.name for entry in self._drawn(units, self.last))

    def _units(self, tree: Tree) -> list[ModuleEntry]:
        heads = select(tree, self._layers, "rotate").heads
        return [
            entry
            for entry in heads.values()
            if not any(id(above) in heads for above in tree.above(entry)) and entry.parameters()
        ]

    def _drawn(self, units: list[ModuleEntry], number: int) -> list[ModuleEntry]:
        # Each period has its own generator: there is no state to save or to share.
        draw = random.Random(f"{self.seed} {number // self.every}")
        return [units[i] for i in sorted(draw.sample(range(len(units)), self.k))]

    def _applies(self, number: int) -> bool:
        return number % self.every == 0

    def _split(self, tree: Tree, number: int) -> tuple[Selection, Selection]:
        units = self._units(tree)
        training = select(tree, self._always, "rotate")
        managed = everything(tree)
        managed.units += [[entry] for entry in units]
        managed.units += [list(unit) for unit in training.units]
        seen: set[int] = set()
        for entry in self._drawn(units, number):
            training.add_module(entry, seen)
        frozen = everything(tree)
        subtract(frozen, training)
        return frozen, managed

    def _frozen_at(self, tree: Tree, number: int) -> Selection:
        return self._split(tree, number)[0]

    def _managed(self, tree: Tree) -> Selection:
        return self._split(tree, 0)[1]

    def _frees(self, tree: Tree) -> list[ParamEntry]:
        freed = select(tree, self._always, "rotate").params
        for entry in self._units(tree):
            freed.update((id(p), p) for p in entry.parameters())
        return list(freed.values())

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "k": self.k, "every": self.every, "seed": self.seed}

    def _resolved(self, tree: Tree) -> dict[str, Any]:
        always = select(tree, self._always, "rotate").params.values()
        return {
            "layers": [entry.name for entry in self._units(tree)],
            "always": [entry.name for entry in always],
        }

    def _arguments(self) -> tuple[str, dict[str, Any]]:
        own = {"layers": self._layers, "k": self.k, "every": self.every, "always": self._always}
        return "rotate", {**own, "seed": self.seed, **self._common_arguments()}

    def _timeline(self) -> Iterable[int]:
        first = max(self.last, 0) // self.every * self.every
        return range(first, first + 6 * self.every, self.every)

    def _describe(self, tree: Tree, number: int) -> str:
        drawn = ", ".join(entry.name for entry in self._drawn(self._units(tree), number))
        always = _spell_all(tree, self._always)
        return f"all but {drawn}" + (f" and {always}" if always else "")


def _groups(model: nn.Module, groups: Iterable[Selector], caller: str) -> list[list[Selector]]:
    check_model(model, caller)
    if isinstance(groups, (str, bytes, nn.Module, re.Pattern)) or not isinstance(groups, Iterable):
        raise TypeError(f"{caller}: groups must be a list of groups, got {groups!r}.")
    listed = [as_selectors(group) for group in groups]
    if not listed:
        raise ValueError(f"{caller}: there are no groups.")
    tree = Tree(model)
    for i, group in enumerate(listed):
        if not group:
            raise ValueError(f"{caller}: group {i} is empty.")
        select(tree, group, f"{caller}, group {i}")
    return listed


def check_int(caller: str, what: str, value: object, least: int | None) -> None:
    """Raise unless `value` is an int of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{caller}: {what} must be an int, got {value!r}.")
    if least is not None and value < least:
        raise ValueError(f"{caller}: {what} must be at least {least}, got {value}.")


def _check_unit(caller: str, unit: str) -> None:
    if unit not in ("epoch", "step"):
        raise ValueError(f"{caller}: unit must be 'epoch' or 'step', got {unit!r}.")


def _elements(selection: Selection) -> int:
    return sum(entry.numel for entry in selection.params.values())


def _distinct(listed: Iterable[list[Selector]]) -> list[Selector]:
    """Each selector once; the entries of a long table repeat them."""
    items = itertools.chain.from_iterable(listed)
    # By identity, because == of tensors compares their elements.
    return list({i if isinstance(i, (str, re.Pattern)) else id(i): i for i in items}.values())


def _spell_all(tree: Tree, items: Iterable[Selector]) -> str:
    """Selectors as a reader would write them, as many as fit on a line."""
    said: list[str] = []
    length = 0
    for item in items:
        said.append(_spell(tree, item))
        length += len(said[-1]) + 2
        if length > 2 * _format.WIDTH:
            break
    return ", ".join(said)


def _spell(tree: Tree, item: Selector) -> str:
    """A selector as a reader would write it."""
    if isinstance(item, str):
        return item
    if isinstance(item, re.Pattern):
        return f"/{item.pattern}/"
    if isinstance(item, nn.Module):
        entry = tree.modules.get(id(item))
        return (entry.name if entry else "") or type(item).__name__
    if isinstance(item, torch.Tensor):
        owned = tree.params.get(id(item))
        return owned.name if owned else "a parameter"
    return getattr(item, "__name__", type(item).__name__)
