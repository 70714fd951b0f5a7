"""freeze, unfreeze, freeze_except and frozen: freeze parts of a model by name."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import _ddp, _format, _hold, _record, _thawed
from . import rows as _rows
from ._select import Selection, Selector, as_selectors, everything, flatten, select
from ._tree import ModuleEntry, ParamEntry, Tree, check_model
from .report import FreezeReport, build_report
from .rows import Rows, Vocabulary


def freeze(
    model: nn.Module,
    *what: Selector,
    exclude: Selector = (),
    hold_norm: bool = True,
    rows: Rows | Mapping[str, Rows] | None = None,
    vocab: Vocabulary | None = None,
) -> FreezeReport:
    """Freeze parameters, drop their gradients, and stop norm layers from updating statistics.

    Sets `requires_grad` to False and `grad` to None on every named parameter. Batch-norm-like
    layers inside the frozen part are held: they use their running statistics and do not update
    them, even if `model.train()` is called later, until they are unfrozen. Freezing twice changes
    nothing. Parameters and modules are never replaced, so it does not matter whether the optimizer
    was made before or is made afterwards.

    Args:
        model: the model; also DDP-wrapped or compiled (names need no "module." prefix).
        *what: what to freeze, any of
            a name or glob over parameter and module names (`"layer1"`,
            `"encoder.layer.*.attention"`, `"*.bias"`; `*` matches dots too, and a module stands
            for everything below it),
            a compiled regex (`search`ed in the same names),
            a module or parameter of the model,
            a module class (every instance, subclasses included),
            a callable (name, parameter) -> bool,
            or a list of these. If nothing is given, everything is frozen.
        exclude: what to leave unchanged, in the same terms.
        hold_norm: False leaves batch-norm-like layers in their own mode, and returns those held by
            an earlier call to it.
        rows: freeze only these rows of the Embedding, EmbeddingBag or Linear layers that are named
            (of a Linear: output features, of weight and bias): a slice, a range, row numbers (a
            list, an array or an integer tensor of one dimension), a bool mask of shape (rows,), or
            tokens. Or a mapping from name to rows; then `what` is frozen as a whole, and may be
            left out. See the note below.
        vocab: the tokenizer, or a mapping from token to row, if `rows` has tokens.

    Returns:
        A FreezeReport: what was named, what changed, and the state of the model.

    Raises:
        ValueError: something named (or excluded) matches nothing, with the nearest names; a module
            or parameter is not part of the model; or nothing is left to freeze. With `rows`: there
            is no such row or token; a layer has no rows; other rows of it are frozen already; or
            all of it is. Nothing is changed then.
        TypeError: `model` is not a module, or a selector or `rows` has an unknown type.

    Warns:
        UserWarning: DistributedDataParallel has wrapped the model already and cannot follow the
            change: it decides when it wraps which gradients it reduces and waits for.

    Note:
        A tied parameter is one tensor. Naming it by any of its names freezes
        it under all of them, and the report says so.

        A norm is held if it is named (itself, its class or a module around it) or if all
        its parameters are, unless some of them stay trainable. A norm with `affine=False` is also
        held if all parameters of the module around it are frozen. Batch-norm-like layers are:
        torch's batch and instance norms that track statistics; its spectral norm
        (`torch.nn.utils.parametrizations.spectral_norm`, whose vectors, and with them the effective
        weight, change in train mode; with the older `torch.nn.utils.spectral_norm` the whole layer
        is held); and any other module that owns a buffer named `running_...`. Other buffers that a
        module writes in train mode keep changing; call `eval()` on such a module.

        If this call freezes some parameters and finds
        others among them frozen already, it takes the latter to be frozen for a reason, such as
        sinusoidal positions or the first layers of a detector. `unfreeze` leaves those frozen
        unless an argument names nothing else. Both reports say so.

        With `rows`, the rows that still train become a parameter of their own, such as
        `embed.live_rows.weight` of shape (live rows, ...), and `embed.weight` is frozen. Make the
        optimizer afterwards: it then has that parameter, and gradients, momentum and weight decay
        are of live rows alone. The model computes what it did, and its `state_dict` has the same
        keys and shapes. See the documentation's page on rows.

        A model pickled with held norms (`torch.save(model)`) contains nothing of
        torch_freeze and loads where it is not installed. The norms ignore `train()` there as well;
        `del norm.train` ends that.

    Example:
        >>> from torch import nn
        >>> from torch_freeze import freeze
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
        >>> freeze(model, "0", nn.BatchNorm2d).frozen_names
        ('0.weight', '0.bias', '1.weight', '1.bias')
        >>> model.train()[1].training
        False
        >>> freeze(model, "layer1")
        Traceback (most recent call last):
        ...
        ValueError: freeze: the pattern 'layer1' matches no parameter or module of this model. \
Its top level has: '0', '1', '2'.
    """
    if rows is not None:
        return _freeze_rows(model, what, exclude, hold_norm, rows, vocab, "freeze")
    return _freeze(model, what, exclude, hold_norm, "freeze")


def unfreeze(
    model: nn.Module,
    *what: Selector,
    exclude: Selector = (),
    rows: Rows | Mapping[str, Rows] | None = None,
    vocab: Vocabulary | None = None,
) -> FreezeReport:
    """Make parameters trainable again and return their norms to their own mode.

    A norm's own mode is the one that the last `model.train()` or `model.eval()` asked for, even if
    the norm was held then. Unfreezing twice changes nothing. No optimizer is changed.

    `unfreeze` undoes `freeze`. Parameters that `freeze` found frozen among those it froze itself
    (sinusoidal positions, the first layers of a detector) stay frozen, and the report's notes name
    them. To unfreeze them, pass an argument that names nothing else: their own name, or a module
    that has no other parameters. `unfreeze(model, *model.parameters())` unfreezes everything.
    Parameters frozen by hand that `freeze` never saw are unfrozen.

    Args:
        model: the model.
        *what: what to unfreeze, in the terms of `freeze`. If nothing is given, everything is
            unfrozen. Each argument is judged by itself; a list counts as one argument.
        exclude: what to leave unchanged, in the same terms.
        rows: make only these rows of frozen layers trainable, in the terms of `freeze`. Without it,
            a layer of which some rows are frozen becomes trainable as a whole again.
        vocab: as in `freeze`.

    Returns:
        A FreezeReport: what was named, what changed, and the state of the model.

    Raises:
        ValueError: as `freeze`; and when a named parameter cannot train (an integer or otherwise
            non-differentiable dtype, or an inference tensor). Nothing is changed then.
        TypeError: as `freeze`.

    Warns:
        UserWarning: as `freeze`.

    Example:
        >>> from torch import nn
        >>> from torch_freeze import freeze, unfreeze
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
        >>> _ = freeze(model)
        >>> unfreeze(model, "1").trainable_names
        ('1.weight', '1.bias')

        A parameter that the model itself keeps frozen:

        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
        >>> _ = model[0].bias.requires_grad_(False)
        >>> _ = freeze(model)
        >>> unfreeze(model).frozen_names
        ('0.bias',)
        >>> unfreeze(model, "0.bias").frozen_names
        ()
    """
    if rows is not None:
        return _freeze_rows(model, what, exclude, True, rows, vocab, "unfreeze")
    check_model(model, "unfreeze")
    tree = Tree(model)
    selection, excluded = _resolve(tree, what, exclude, "unfreeze")
    change = thaw(tree, selection, excluded, "unfreeze")
    warn_ddp(tree, "unfreeze", thawed=change.params, stacklevel=3)
    return _call_report(tree, "unfreeze", selection, change)


def freeze_except(
    model: nn.Module,
    *what: Selector,
    hold_norm: bool = True,
    rows: Rows | Mapping[str, Rows] | None = None,
    vocab: Vocabulary | None = None,
) -> FreezeReport:
    """Freeze everything except what is named, which stays trainable or frozen as it was.

    Args:
        model: the model.
        *what: what to leave unchanged, in the terms of `freeze`; at least one.
        hold_norm: as in `freeze`.
        rows: of the named layers only these rows stay trainable, in the terms of `freeze`. Or a
            mapping from name to rows, besides what stays unchanged as a whole.
        vocab: as in `freeze`.

    Returns:
        A FreezeReport.

    Raises:
        ValueError: nothing is named, or something named matches nothing; with `rows` as `freeze`.
        TypeError: as `freeze`.

    Example:
        >>> from torch import nn
        >>> from torch_freeze import freeze_except
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
        >>> freeze_except(model, "1").trainable_names
        ('1.weight', '1.bias')

        Only some rows of an embedding train, here the last two:

        >>> model = nn.Sequential(nn.Embedding(1000, 8), nn.Linear(8, 4))
        >>> freeze_except(model, "0", rows=[998, 999]).trainable_names
        ('0.live_rows.weight',)
        >>> model[0].live_rows.weight.shape
        torch.Size([2, 8])
    """
    if rows is not None:
        return _freeze_rows(model, what, (), hold_norm, rows, vocab, "freeze_except")
    check_model(model, "freeze_except")
    if not flatten(what):
        raise ValueError(
            "freeze_except: name what stays trainable; to freeze everything, call freeze(model)."
        )
    return _freeze(model, (), what, hold_norm, "freeze_except")


@contextmanager
def frozen(
    model: nn.Module, *what: Selector, exclude: Selector = (), hold_norm: bool = True
) -> Iterator[FreezeReport]:
    """Freeze inside a `with` block, then restore exactly what was there before.

    On leaving, also after an exception, every named parameter has its `requires_grad` and `grad`
    (the same tensor object) back, and every norm is held or not as before. A norm that was not held
    before is in the mode that the last `train()` or `eval()` inside the block asked for.

    Args:
        model: the model.
        *what: what to freeze, in the terms of `freeze`. If nothing is given, everything is frozen.
        exclude: what to leave unchanged, in the same terms.
        hold_norm: as in `freeze`. False does what two loops over `requires_grad` do: a GAN's
            discriminator still normalizes by the batch while the generator trains.

    Yields:
        The FreezeReport of the freeze.

    Raises:
        ValueError, TypeError: as `freeze`.

    Example:
        >>> from torch import nn
        >>> from torch_freeze import frozen
        >>> critic = nn.Linear(4, 1)
        >>> with frozen(critic):
        ...     critic.weight.requires_grad
        False
        >>> critic.weight.requires_grad
        True
    """
    check_model(model, "frozen")
    tree = Tree(model)
    selection, excluded = _resolve(tree, what, exclude, "frozen")
    before = [
        (entry.parameter, entry.parameter.requires_grad, entry.parameter.grad)
        for entry in selection.params.values()
    ]
    norms = [entry.module for entry in _norms(tree) if _touches(entry, selection)]
    were_held = [norm for norm in norms if _hold.held_by(norm) is not None]
    record = _record.snapshot(tree)
    change = chill(tree, selection, excluded, hold_norm)
    warn_ddp(tree, "frozen", chilled=change.params, stacklevel=4)
    try:
        yield _call_report(tree, "frozen", selection, change)
    finally:
        for parameter, required, grad in before:
            parameter.requires_grad = required
            # The model may have been moved or cast inside the block.
            parameter.grad = None if grad is None else grad.to(parameter.device, parameter.dtype)
        for entry in change.held:
            _hold.release(entry.module)
        for norm in were_held:
            _hold.hold(norm)
        _record.restore(record)


def _freeze(
    model: nn.Module,
    what: Iterable[Selector],
    exclude: Selector,
    hold_norm: bool,
    caller: str,
) -> FreezeReport:
    check_model(model, caller)
    tree = Tree(model)
    selection, excluded = _resolve(tree, what, exclude, caller)
    change = chill(tree, selection, excluded, hold_norm)
    warn_ddp(tree, caller, chilled=change.params, stacklevel=4)
    return _call_report(tree, caller, selection, change)


def _freeze_rows(
    model: nn.Module,
    what: tuple[Selector, ...],
    exclude: Selector,
    hold_norm: bool,
    rows: Rows | Mapping[str, Rows],
    vocab: Vocabulary | None,
    caller: str,
) -> FreezeReport:
    """`rows=` of freeze, unfreeze and freeze_except: all is checked before anything changes."""
    check_model(model, caller)
    tree = Tree(model)
    # Arguments may be iterators, and are read twice here; a list stays one argument.
    what = tuple(as_selectors(argument) for argument in what)
    exclude = as_selectors(exclude)
    pairs: list[tuple[Selector, Rows]]
    if isinstance(rows, Mapping):
        pairs = list(rows.items())
    else:
        pairs, what = [(what, rows)], ()
        if not flatten(pairs[0][:1]):
            raise ValueError(f"{caller}: name the layer whose rows are meant.")
    plan = _plan_rows(tree, pairs, exclude, vocab, caller)
    keep = (*what, exclude)
    if caller == "freeze_except":
        select(tree, as_selectors(keep), caller)
    elif flatten(what):
        _resolve(tree, what, exclude, caller)

    trains = caller == "unfreeze"
    live: list[Tensor] = [
        _rows.attach(
            one.owner, one.key, one.live, trains=trains or one.entry.parameter.requires_grad
        )
        for one in plan
        if not one.there
    ]
    if trains:
        # The same rows again, which were frozen in the meantime.
        tables = [one.entry.parameter for one in plan if one.there]
        again = [_rows.live_of(t) for t in tables if isinstance(t, _rows.RowFrozenParameter)]
        live += [p.requires_grad_() for p in again if not p.requires_grad]
    _thawed.note(live)
    named = [one.entry.name for one in plan]
    tree = Tree(model)
    entries = [entry for name in named if (entry := tree.parameter_named(name))]
    if not trains:
        _record.write(tree, {id(entry.parameter): True for entry in entries})
    change = Change()
    selection = select(tree, named, caller)
    if caller == "freeze_except":
        both = [entry.parameter for entry in entries]
        both += [_rows.live_of(t) for t in both if isinstance(t, _rows.RowFrozenParameter)]
        kept = select(tree, [*as_selectors(keep), *both], caller)
        selection = everything(tree)
        subtract(selection, kept)
        change = chill(tree, selection, kept, hold_norm)
    elif flatten(what):
        selection, excluded = _resolve(tree, what, exclude, caller)
        if trains:
            change = thaw(tree, selection, excluded, caller)
        else:
            change = chill(tree, selection, excluded, hold_norm)
    fresh = {id(parameter) for parameter in live}
    warn_ddp(
        tree,
        caller,
        stacklevel=4,
        thawed=[*(change.params * trains), *(e for k, e in tree.params.items() if k in fresh)],
        chilled=change.params * (not trains),
    )
    for one, entry in zip(plan, entries, strict=True):
        selection.params[id(entry)] = entry
        if not one.there:
            change.params.append(entry)
    return _call_report(tree, caller, selection, change)


@dataclass(frozen=True, slots=True)
class _RowPlan:
    """A parameter whose rows are to be frozen except `live`; `there` if they are already."""

    entry: ParamEntry
    owner: ModuleEntry
    key: str
    live: Tensor
    there: bool


def _plan_rows(
    tree: Tree,
    pairs: list[tuple[Selector, Rows]],
    exclude: Selector,
    vocab: Vocabulary | None,
    caller: str,
) -> list[_RowPlan]:
    excluded = select(tree, as_selectors(exclude), caller)
    plan: dict[int, _RowPlan] = {}
    of_layer: dict[int, Tensor] = {}
    unfreezes = caller == "unfreeze"
    of_tables = _rows.live_parameters(tree)
    for selectors, rows in pairs:
        selection = select(tree, as_selectors(selectors), caller)
        entries = [e for key, e in selection.params.items() if key not in excluded.params]
        given = {id(e.parameter) for e in entries}
        for entry in entries:
            table = of_tables.get(id(entry.parameter))
            if table is not None and id(table) in given:
                continue  # It was named with its table.
            owner, key = _rows.check(tree, entry, caller), entry.name.rpartition(".")[2]
            parameter, name = entry.parameter, entry.name
            size = len(parameter)
            chosen = _rows.choose(rows, size, name, vocab, caller)
            live = chosen
            if caller == "freeze":
                mask = torch.ones(size, dtype=torch.bool)
                mask[chosen] = False
                live = mask.nonzero().flatten()
            if len(chosen) == size:
                raise ValueError(
                    f"{caller}: rows= names all {size:,} rows of {name}; leave rows out to name "
                    "the whole layer."
                )
            now = _rows.current(entry)
            before = plan.get(id(entry))
            same = of_layer.setdefault(id(owner), live if now is None else now.cpu())
            if not torch.equal(same, live) or (before and not torch.equal(before.live, live)):
                raise ValueError(
                    f"{caller}: other rows of {owner.name or name} are frozen already; call "
                    f"unfreeze(model, {owner.name or name!r}) first, and name all rows in one call."
                )
            if now is None and parameter.requires_grad == unfreezes:
                raise ValueError(
                    f"{caller}: {name} is "
                    + (
                        "trainable as a whole; to freeze its other rows, call "
                        "freeze_except or freeze with rows=."
                        if unfreezes
                        else "frozen as a whole; to make rows of it trainable, call "
                        f"unfreeze(model, {name!r}, rows=...)."
                    )
                )
            if unfreezes:
                check_trainable(entry, caller)
            plan[id(entry)] = _RowPlan(entry, owner, key, live, now is not None)
    if not plan:
        raise ValueError(f"{caller}: nothing is left to name rows of.")
    return list(plan.values())


@dataclass(slots=True)
class Change:
    """What a call did: the parameters it froze or unfroze, and the norms it held or released."""

    params: list[ParamEntry] = field(default_factory=list)
    held: list[ModuleEntry] = field(default_factory=list)
    released: list[ModuleEntry] = field(default_factory=list)
    #: Parameters that `freeze` saw for the first time and found frozen, or that `unfreeze` left so.
    found: list[ParamEntry] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.params or self.held or self.released)


def _call_report(tree: Tree, action: str, selection: Selection, change: Change) -> FreezeReport:
    thawing = action == "unfreeze"
    left = {id(entry) for entry in change.found} if thawing else set()
    notes = _half_named(tree, selection, "trainable" if thawing else "frozen", left)
    if change.found and action != "frozen":
        notes += (_found_frozen(change.found, thawing),)
    return build_report(
        tree,
        action=action,
        matched=tuple(entry.name for entry in selection.params.values()),
        changed=tuple(entry.name for entry in change.params),
        held=tuple(entry.name for entry in change.held),
        released=tuple(entry.name for entry in change.released),
        notes=notes,
    )


def _found_frozen(found: list[ParamEntry], thawing: bool) -> str:
    first = found[0].name
    named = _format.listed(entry.name for entry in found)
    one = len(found) == 1
    if thawing:
        return (
            f"{named} {'was' if one else 'were'} frozen before freeze was called and "
            f"{'stays' if one else 'stay'} frozen; to train {'it' if one else 'one'}, name it by "
            f"itself: unfreeze(model, {first!r})"
        )
    return (
        f"{named} {'was' if one else 'were'} frozen already, so unfreeze leaves "
        f"{'it' if one else 'them'} frozen unless named by {'itself' if one else 'themselves'}"
    )


def _resolve(
    tree: Tree, what: Iterable[Selector], exclude: Selector, caller: str
) -> tuple[Selection, Selection]:
    """What is named without what is excluded, and what is excluded."""
    given = tuple(what)
    # An argument may be an iterator, so it is read only once; a list stays one argument.
    wanted = [as_selectors(argument) for argument in given]
    if given and not any(wanted):
        raise ValueError(f"{caller}: an empty list names nothing; leave it out to name everything.")
    excluded = select(tree, as_selectors(exclude), caller)
    selection = select(tree, wanted, caller) if wanted else everything(tree)
    subtract(selection, excluded)
    norms = any(_hold.is_norm(entry.module) for entry in selection.modules.values())
    if not selection.params and not norms:
        if excluded.params:
            raise ValueError(f"{caller}: exclude leaves nothing of what is named.")
        named = ", ".join(repr(name) for name in sorted(selection.names) if name)
        raise ValueError(f"{caller}: {named or 'the model'} has no parameters.")
    return selection, excluded


def subtract(selection: Selection, excluded: Selection) -> None:
    """Remove what is excluded from a selection."""
    for key in excluded.params:
        selection.params.pop(key, None)
    for key in excluded.modules:
        selection.modules.pop(key, None)
        selection.heads.pop(key, None)


def chill(
    tree: Tree,
    selection: Selection,
    excluded: Selection,
    hold_norm: bool,
    known: Mapping[int, bool] | None = None,
) -> Change:
    """Freeze a selection, and record which of it was frozen already while the rest was not."""
    if known is None:
        known = _record.read(tree)
    change = Change(found=_found_beside(selection, known))
    for entry in selection.params.values():
        if entry.parameter.requires_grad:
            entry.parameter.requires_grad = False
            change.params.append(entry)
        if entry.parameter.grad is not None:
            entry.parameter.grad = None
    marks = {id(entry.parameter): True for entry in change.params}
    marks.update((id(entry.parameter), False) for entry in change.found)
    _record.write(tree, marks)
    norms = _follow(tree, selection, excluded, trainable=False)
    if hold_norm:
        change.held = [norm for norm in norms if _hold.hold(norm.module)]
    else:
        change.released = [norm for norm in norms if _hold.release(norm.module)]
    return change


def _found_beside(selection: Selection, known: Mapping[int, bool]) -> list[ParamEntry]:
    """What `freeze` finds frozen in a selection that it freezes, or froze before, in part.

    If all of it was frozen by hand, nothing tells the model's choice from the user's.
    """
    found, beside = [], False
    for entry in selection.params.values():
        if entry.parameter.requires_grad:
            beside = True
        elif (froze := known.get(id(entry.parameter))) is None:
            found.append(entry)
        elif froze:
            beside = True
    return found if beside else []


def thaw(
    tree: Tree,
    selection: Selection,
    excluded: Selection,
    caller: str,
    known: Mapping[int, bool] | None = None,
    *,
    end_rows: bool = True,
) -> Change:
    """Unfreeze a selection, except what `freeze` found frozen and no argument names by itself.

    Tables of which only some rows are frozen train as a whole again, or stay as they are.
    """
    change = Change()
    left = _left_frozen(selection, _record.read(tree) if known is None else known)
    tables = {key: e for key, e in selection.params.items() if _rows.current(e) is not None}
    if not end_rows:
        left |= tables.keys()
    for entry in selection.params.values():
        if id(entry) not in left:
            check_trainable(entry, caller)
    ended = [entry for key, entry in tables.items() if key not in left]
    gone = _rows.detach(tree, ended)
    for key in [key for key, e in selection.params.items() if id(e.parameter) in gone]:
        del selection.params[key]
    for key, entry in selection.params.items():
        if key in left:
            change.found.append(entry)
        elif not entry.parameter.requires_grad:
            entry.parameter.requires_grad = True
            change.params.append(entry)
    _thawed.note(entry.parameter for entry in change.params)
    if change.params:
        _record.drop(tree, {id(entry.parameter) for entry in change.params})
    norms = _follow(tree, selection, excluded, trainable=True, left=left)
    change.released = [norm for norm in norms if _hold.release(norm.module)]
    return change


def _left_frozen(selection: Selection, known: Mapping[int, bool]) -> set[int]:
    """What unfreezing a selection leaves frozen, by `id` of the ParamEntry."""
    found = {key for key, e in selection.params.items() if known.get(id(e.parameter)) is False}
    if not found:
        return found
    left = set(found)
    for unit in selection.units:
        named = {
            id(param)
            for entry in unit
            for param in (entry.parameters() if isinstance(entry, ModuleEntry) else (entry,))
        }
        if named <= found:
            left -= named
    return left


def _norms(tree: Tree) -> list[ModuleEntry]:
    return [entry for entry in tree.order if _hold.is_norm(entry.module)]


def _touches(norm: ModuleEntry, selection: Selection) -> bool:
    return id(norm) in selection.modules or any(
        id(entry) in selection.params for entry in norm.parameters()
    )


def _follow(
    tree: Tree,
    selection: Selection,
    excluded: Selection,
    *,
    trainable: bool,
    left: Set[int] = frozenset(),
) -> list[ModuleEntry]:
    """The norms to hold (or release) after parameters were frozen (or made trainable).

    Parameters `left` frozen count as trainable: `freeze` found them frozen and held no norm then.
    """
    following = []
    around: dict[int, _Around | None] = {}
    for norm in _norms(tree):
        own = norm.parameters()
        if own:
            flags = [entry.parameter.requires_grad or id(entry) in left for entry in own]
            # A norm is held only while all of its parameters are frozen.
            state = any(flags) if trainable else not any(flags)
            if state and _touches(norm, selection):
                following.append(norm)
            continue
        if id(norm) in excluded.modules:
            continue
        named = id(norm) in selection.modules
        near = _look_around(tree, norm, selection, trainable, left, around)
        # A norm with affine=False has no parameters, so those of the module around it decide. If
        # the norm is named it follows, unless all parameters around it were excluded one by one.
        follows = near.every and near.touched if near is not None else False
        if named:
            follows = near is None or near.some or id(norm) in selection.heads
        if follows:
            following.append(norm)
    return following


@dataclass(frozen=True, slots=True)
class _Around:
    """Whether some and whether all parameters of a module around a norm have the wanted state."""

    some: bool
    every: bool
    touched: bool


def _look_around(
    tree: Tree,
    norm: ModuleEntry,
    selection: Selection,
    trainable: bool,
    left: Set[int],
    known: dict[int, _Around | None],
) -> _Around | None:
    """The nearest module around `norm` with parameters; the cache `known` keeps this linear."""
    for above in tree.above(norm):
        if id(above) not in known:
            found = above.parameters()
            flags = [
                (entry.parameter.requires_grad or id(entry) in left) == trainable for entry in found
            ]
            touched = any(id(entry) in selection.params for entry in found)
            known[id(above)] = _Around(any(flags), all(flags), touched) if found else None
        if (around := known[id(above)]) is not None:
            return around
    return None


def check_trainable(entry: ParamEntry, caller: str) -> None:
    """Raise ValueError if a frozen parameter cannot be made trainable."""
    parameter = entry.parameter
    if parameter.requires_grad:
        return
    if not (parameter.is_floating_point() or parameter.is_complex()):
        raise ValueError(
            f"{caller}: {entry.name} has dtype {parameter.dtype}, which cannot train; leave such "
            "parameters out with exclude=lambda name, p: not p.is_floating_point()."
        )
    if parameter.is_inference():
        raise ValueError(
            f"{caller}: {entry.name} was made under torch.inference_mode() and cannot train; "
            "create the model outside of it, or replace the parameter with a clone."
        )


def _half_named(tree: Tree, selection: Selection, state: str, left: Set[int]) -> tuple[str, ...]:
    notes = []
    for entry in tree.tied():
        if id(entry) not in selection.params or id(entry) in left:
            continue
        unnamed = [name for name in entry.names if not selection.named_alias(name)]
        if unnamed:
            named = next(name for name in entry.names if name not in unnamed)
            others = ", ".join(unnamed)
            notes.append(f"{others} is tied to {named}, the same tensor, so it is {state} too")
    return tuple(notes)


def warn_ddp(
    tree: Tree,
    caller: str,
    stacklevel: int,
    *,
    thawed: Iterable[ParamEntry] = (),
    chilled: Iterable[ParamEntry] = (),
) -> None:
    """Warn if DistributedDataParallel has wrapped the model and cannot follow the change."""
    if not tree.ddp:
        return
    wrap_again = "wrap the module again: model = DistributedDataParallel(model.module)"
    for entries, does, fix in (
        (
            _ddp.not_reduced(tree, thawed),
            "frozen when DistributedDataParallel wrapped the model, so its gradient is never "
            "averaged and the processes drift apart without an error.",
            f"After unfreezing, {wrap_again}. Or wrap the model while everything is trainable, "
            "with find_unused_parameters=True, and freeze afterwards.",
        ),
        (
            _ddp.waited_for(tree, chilled),
            "trainable when DistributedDataParallel wrapped the model, so backward still waits for "
            "its gradient, and the next forward raises 'Expected to have finished reduction in the "
            "prior iteration'.",
            "Freeze before wrapping, or wrap with find_unused_parameters=True and without a static "
            f"graph. To continue, {wrap_again}.",
        ),
    ):
        if entries:
            more = f" (and {len(entries) - 1} more)" if len(entries) > 1 else ""
            warnings.warn(
                f"{caller}: {entries[0].name}{more} was {does} {fix}",
                UserWarning,
                stacklevel=stacklevel,
            )


def set_frozen(
    tree: Tree, frozen_set: Selection, managed: Selection, hold_norm: bool, caller: str
) -> bool:
    """Freeze `frozen_set` and make the rest of `managed` trainable; True if anything changed.

    What the model itself keeps frozen stays frozen: see `unfreeze`.
    """
    rest = _rest(managed, frozen_set)
    known = _record.read(tree)
    kept = _kept_in_modules(tree, rest, managed, known)
    _record.write(tree, kept)
    known.update(kept)
    thawed = thaw(tree, rest, frozen_set, caller, known, end_rows=False)
    chilled = chill(tree, frozen_set, rest, hold_norm, known)
    warn_ddp(tree, caller, thawed=thawed.params, chilled=chilled.params, stacklevel=4)
    return bool(thawed or chilled)


def never_thawed(tree: Tree, frozen_set: Selection, managed: Selection) -> set[int]:
    """What a schedule at `frozen_set` will never unfreeze, by `id` of the ParamEntry."""
    known = _record.read(tree)
    known.update(_kept_in_modules(tree, _rest(managed, frozen_set), managed, known))
    known.update((id(e.parameter), False) for e in _found_beside(frozen_set, known))
    tables = {key for key, e in managed.params.items() if _rows.current(e) is not None}
    return _left_frozen(managed, known) | tables


def _rest(managed: Selection, frozen_set: Selection) -> Selection:
    rest = Selection(dict(managed.params), dict(managed.modules), heads=dict(managed.heads))
    rest.units = managed.units
    subtract(rest, frozen_set)
    return rest


def _kept_in_modules(
    tree: Tree, rest: Selection, managed: Selection, known: Mapping[int, bool]
) -> dict[int, bool]:
    """Records for parameters that a module keeps frozen although a schedule unfreezes the module.

    These are frozen parameters that `freeze` never saw, in a module where others train. A module
    that is frozen as a whole was frozen by hand and is unfrozen.
    """
    unknown = {
        id(entry.parameter)
        for entry in rest.params.values()
        if not entry.parameter.requires_grad and id(entry.parameter) not in known
    }
    marks: dict[int, bool] = {}
    if not unknown:
        return marks
    for head in managed.heads.values():
        if any(id(above) in managed.heads for above in tree.above(head)):
            continue
        params = [entry.parameter for entry in head.parameters()]
        if any(p.requires_grad or known.get(id(p)) for p in params):
            marks.update((id(p), False) for p in params if id(p) in unknown)
    return marks
