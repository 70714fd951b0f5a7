"""The frozen set of a model as plain data, to save with its weights and to resume from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from . import _format, _hold, _record
from . import rows as _rows
from ._select import nearest
from ._tree import ParamEntry, Tree, check_model
from .freezing import Change, check_trainable, warn_ddp
from .report import FreezeReport, build_report
from .rows import runs

_KEYS = ("frozen", "trainable", "found", "by_hand", "tied", "held")


def frozen_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return what is frozen and held in a model, as plain data for JSON or `torch.save`.

    A checkpoint's weights do not show what was frozen. Save this with them, and the script that
    resumes does not have to repeat every freeze and unfreeze.

    Args:
        model: the model. Names do not include those of wrappers (DDP, compile), so the state loads
            into a wrapped model or an unwrapped one.

    Returns:
        A dict of lists of parameter names, and one dict:
            "frozen" and "trainable": together all parameters, a tied one by its first name;
            "found": frozen parameters that `freeze` found frozen and `unfreeze` leaves so;
            "by_hand": frozen parameters that `freeze` never saw;
            "tied": lists of names that are one tensor;
            "held": {norm: whether the mode it returns to when unfrozen is train mode};
            "rows": {parameter: ranges [first, last] of the rows that are not frozen with it}, if
            only some rows of a parameter are frozen.

    Raises:
        TypeError: `model` is not a module.

    Example:
        >>> from torch import nn
        >>> from torch_freeze import freeze, frozen_state_dict
        >>> model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
        >>> _ = freeze(model, "0")
        >>> for key, value in frozen_state_dict(model).items():
        ...     print(key, value)
        frozen ['0.weight', '0.bias']
        trainable ['1.weight', '1.bias']
        found []
        by_hand []
        tied []
        held {'0': True}
    """
    check_model(model, "frozen_state_dict")
    return frozen_state(Tree(model))


def load_frozen_state_dict(
    model: nn.Module, state: Mapping[str, Any], *, strict: bool = True
) -> FreezeReport:
    """Freeze, unfreeze, hold and release as in the model from which `state` was taken.

    Freezing drops gradients, as `freeze` does. Nothing else in the model changes.

    Args:
        model: the model, wrapped or not.
        state: what `frozen_state_dict` returned.
        strict: whether the state must name exactly this model's parameters, with the same ties.
            False ignores names that only one of them has. Parameters that are not in the state,
            and the norms that own them, are not changed then.

    Returns:
        A FreezeReport: `matched` names the parameters in the state, and `changed`, `held` and
        `released` name what was changed.

    Raises:
        ValueError: the state does not fit the model, with the names; it is not what
            `frozen_state_dict` returns; or a parameter that should be trainable cannot train.
            Nothing is changed then.
        TypeError: `model` is not a module, or `state` is not a mapping.

    Warns:
        UserWarning: as `freeze`.

    Example:
        >>> import json
        >>> from torch import nn
        >>> from torch_freeze import freeze, frozen_state_dict, load_frozen_state_dict
        >>> def build():
        ...     return nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
        >>> model = build()
        >>> _ = freeze(model, "0")
        >>> saved = json.dumps(frozen_state_dict(model))

        >>> resumed = build()
        >>> load_frozen_state_dict(resumed, json.loads(saved)).frozen_names
        ('0.weight', '0.bias')
        >>> load_frozen_state_dict(resumed[0], json.loads(saved))
        Traceback (most recent call last):
        ...
        ValueError: load_frozen_state_dict: the state is of another model: this model lacks \
'0.weight', '0.bias', '1.weight' and 1 more (nearest: 'weight'); the state lacks \
'weight', 'bias'.
    """
    caller = "load_frozen_state_dict"
    check_model(model, caller)
    _check_state(state, caller)
    tree = Tree(model)
    change, matched = apply_frozen_state(tree, state, caller, strict=strict)
    return build_report(
        tree,
        action=caller,
        matched=tuple(entry.name for entry in matched),
        changed=tuple(entry.name for entry in change.params),
        held=tuple(entry.name for entry in change.held),
        released=tuple(entry.name for entry in change.released),
    )


def frozen_state(tree: Tree) -> dict[str, Any]:
    """`frozen_state_dict` of a model that was walked already."""
    known = _record.read(tree)
    frozen = [entry for entry in tree.params.values() if not entry.parameter.requires_grad]
    froze = {id(entry): known.get(id(entry.parameter)) for entry in frozen}
    holds = {entry.name: _hold.held_by(entry.module) for entry in tree.order}
    rows = {e.name: live for e in frozen if (live := _rows.current(e)) is not None}
    return {
        "frozen": [entry.name for entry in frozen],
        "trainable": [e.name for e in tree.params.values() if e.parameter.requires_grad],
        "found": [entry.name for entry in frozen if froze[id(entry)] is False],
        "by_hand": [entry.name for entry in frozen if froze[id(entry)] is None],
        "tied": [list(entry.names) for entry in tree.tied()],
        "held": {name: held.mode for name, held in holds.items() if held is not None},
        **({"rows": {name: runs(live) for name, live in rows.items()}} if rows else {}),
    }


def apply_frozen_state(
    tree: Tree, state: Mapping[str, Any], caller: str, *, strict: bool = True, stacklevel: int = 4
) -> tuple[Change, list[ParamEntry]]:
    """Load a `frozen_state`; return what changed and the parameters in the state.

    The state may also be in the old format of schedules: "frozen" and "held" only, with all other
    parameters trainable.
    """
    added = _add_rows(tree, state, caller)
    try:
        return _apply(tree, state, caller, strict, stacklevel)
    except BaseException:
        _rows.detach(tree, added)
        for entry, trained in added.items():
            entry.parameter.requires_grad = trained
        raise


def _add_rows(tree: Tree, state: Mapping[str, Any], caller: str) -> dict[ParamEntry, bool]:
    """Freeze rows as in the state; the parameters for which this was new, and whether they trained.

    Raises:
        ValueError: other rows are frozen in the model, or it has no such rows.
    """
    wanted = {
        name: torch.cat([torch.arange(first, last + 1) for first, last in live])
        for name, live in state.get("rows", {}).items()
    }
    new = []
    for entry in tree.params.values():
        live = next((wanted[name] for name in entry.names if name in wanted), None)
        now = _rows.current(entry)
        if now is not None and (live is None or not torch.equal(live, now.cpu())):
            has = "no frozen rows" if live is None else "other frozen rows"
            raise ValueError(
                f"{caller}: the state has {has} of {entry.name}; call "
                f"unfreeze(model, {entry.name!r}) first."
            )
        if live is not None and now is None:
            owner = _rows.check(tree, entry, caller)
            _rows.choose(live, len(entry.parameter), entry.name, None, caller)
            new.append((entry, owner, live))
    added = {}
    for entry, owner, live in new:
        added[entry] = entry.parameter.requires_grad
        _rows.attach(owner, entry.name.rpartition(".")[2], live, trains=False)
    if added:
        tree.walk_again()
    return added


def _apply(
    tree: Tree, state: Mapping[str, Any], caller: str, strict: bool, stacklevel: int
) -> tuple[Change, list[ParamEntry]]:
    held: Mapping[str, bool | None]
    held = state["held"] if isinstance(state["held"], Mapping) else dict.fromkeys(state["held"])
    norms = {name: e for e in tree.order if _hold.is_norm(e.module) for name in e.names}
    if strict:
        _check_fits(tree, state, caller)
        if unknown := [name for name in held if name not in norms]:
            raise ValueError(
                f"{caller}: the state has {_listed(unknown)} as held, which "
                f"{'is no norm' if len(unknown) == 1 else 'are no norms'} of this model."
            )
    to_freeze = _match(tree, state, caller)
    known = [entry for entry in tree.params.values() if id(entry) in to_freeze]
    for entry in known:
        if not to_freeze[id(entry)]:
            check_trainable(entry, caller)

    change = Change()
    for entry in known:
        freezes = to_freeze[id(entry)]
        if entry.parameter.requires_grad == freezes:
            entry.parameter.requires_grad = not freezes
            change.params.append(entry)
        if freezes:
            entry.parameter.grad = None
    _record.drop(tree, {id(entry.parameter) for entry in known})
    found = set(state.get("found", ()))
    by_hand = set(state.get("by_hand", state["frozen"]))
    _record.write(
        tree,
        {
            id(entry.parameter): found.isdisjoint(entry.names)
            for entry in known
            if to_freeze[id(entry)] and by_hand.isdisjoint(entry.names)
        },
    )
    modes = {id(norms[name]): mode for name, mode in held.items() if name in norms}
    for norm in {id(entry): entry for entry in norms.values()}.values():
        own = norm.parameters()
        if id(norm) in modes:
            if _hold.hold(norm.module):
                change.held.append(norm)
            hold, mode = _hold.held_by(norm.module), modes[id(norm)]
            if hold is not None and mode is not None:
                hold.mode = mode
        # A norm is unknown to the state if all its parameters are.
        elif (not own or any(id(p) in to_freeze for p in own)) and _hold.release(norm.module):
            change.released.append(norm)
    chilled = [entry for entry in change.params if to_freeze[id(entry)]]
    thawed = [entry for entry in change.params if not to_freeze[id(entry)]]
    warn_ddp(tree, caller, thawed=thawed, chilled=chilled, stacklevel=stacklevel)
    return change, known


def _match(tree: Tree, state: Mapping[str, Any], caller: str) -> dict[int, bool]:
    """For each ParamEntry in the state, by `id`, whether to freeze it."""
    aliases = {names[0]: names for names in state.get("tied", ())}
    to_freeze: dict[int, bool] = {}
    named: dict[int, str] = {}
    for key in ("trainable", "frozen"):
        for first in state.get(key, ()):
            for name in aliases.get(first, (first,)):
                entry = tree.parameter_named(name)
                if entry is None:
                    continue
                other = named.setdefault(id(entry), name)
                if to_freeze.setdefault(id(entry), key == "frozen") != (key == "frozen"):
                    raise ValueError(
                        f"{caller}: {_listed([other, name])} are one tensor in this model, but "
                        f"when the state was taken {other!r} was trainable and {name!r} frozen. "
                        "Tie the parameters as they were then."
                    )
    if "trainable" not in state:
        for entry in tree.params.values():
            to_freeze.setdefault(id(entry), False)
    return to_freeze


def _check_state(state: object, caller: str) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(f"{caller}: state must be a mapping, got {type(state).__name__}.")
    missing = [key for key in _KEYS if key not in state]
    if missing:
        raise ValueError(
            f"{caller}: the state has no {', '.join(map(repr, missing))}, so it was not "
            "returned by frozen_state_dict."
        )


def _check_fits(tree: Tree, state: Mapping[str, Any], caller: str) -> None:
    complete = "trainable" in state
    aliases = [name for names in state.get("tied", ()) for name in names]
    there = dict.fromkeys([*state["frozen"], *state.get("trainable", ()), *aliases])
    here = {name: entry for entry in tree.params.values() for name in entry.names}
    differs = []
    if unknown := [name for name in there if name not in here]:
        near = ", ".join(map(repr, nearest(tree, unknown[0]))) or "none"
        differs.append(f"this model lacks {_listed(unknown)} (nearest: {near})")
    if complete and (missing := [name for name in here if name not in there]):
        differs.append(f"the state lacks {_listed(missing)}")
    if differs:
        raise ValueError(f"{caller}: the state is of another model: {'; '.join(differs)}.")
    if not complete:
        return
    tied_there = {frozenset(names) for names in state["tied"]}
    tied_here = {frozenset(entry.names) for entry in tree.tied()}
    for groups, others, how in (
        (tied_there, tied_here, "were one tensor when the state was taken, but are not here"),
        (tied_here, tied_there, "are one tensor here, but were not when the state was taken"),
    ):
        if alone := sorted(sorted(group) for group in groups - others):
            raise ValueError(
                f"{caller}: parameters are tied differently: {_listed(alone[0])} {how}."
            )


def _listed(names: list[str]) -> str:
    return _format.listed(map(repr, names))
