"""audit: find what is wrong, or likely to be, with a frozen model and its optimizer."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.weight_norm import WeightNorm

from . import _format
from ._ddp import not_reduced
from ._fitting import fitting
from ._hold import held_by, is_norm, is_spectral_norm
from ._thawed import just_thawed
from ._tree import ModuleEntry, ParamEntry, Tree, check_model, is_lazy
from .optim._base import FrozenAware, frozen_aware, state_names, unwrapped
from .report import as_optimizers, state_bytes, tensor_bytes
from .rows import LiveRows, RowFrozenParameter, live_of
from .rows import tables as table_rows

Level = Literal["error", "warning", "info"]
_ORDER: dict[str, int] = {"error": 0, "warning": 1, "info": 2}

Kind = Literal[
    "unowned",
    "two groups",
    "not reduced",
    "hold overridden",
    "held but trainable",
    "stale gradient",
    "no gradient",
    "norm trains",
    "norm in eval",
    "weight norm",
    "zero lr",
    "tied half",
    "all frozen",
    "foreign",
    "dropout active",
    "tied",
    "never stepped",
    "momentum of frozen",
    "frozen unowned",
    "rows lost",
    "frozen rows",
]

# The reference page is made from this without importing it, so it holds nothing but strings.
FINDING_KINDS: Final[dict[Kind, tuple[tuple[Level, ...], str]]] = {
    "unowned": (
        ("error",),
        "A parameter is trainable but in no optimizer: its gradient is computed and kept, never "
        "used or cleared.",
    ),
    "two groups": (
        ("error",),
        "A parameter is in several param groups, or several times in one, and is stepped that "
        "many times.",
    ),
    "not reduced": (
        ("error",),
        "A parameter trains but was frozen when DistributedDataParallel wrapped the model, so its "
        "gradient is never averaged.",
    ),
    "hold overridden": (
        ("error",),
        "A held norm was put in train mode by a direct write to its `training` attribute.",
    ),
    "held but trainable": (
        ("error", "warning"),
        "A norm is still held in eval mode though its parameters were made trainable without "
        "`unfreeze`. It is a warning for a norm without parameters if all parameters around it "
        "train.",
    ),
    "stale gradient": (
        ("error", "warning"),
        "A frozen parameter holds a gradient. It is an error if an optimizer that does not skip "
        "frozen parameters owns it and may move it by that gradient, momentum or weight decay, or "
        "if LBFGS does, which moves it by past gradients. Otherwise it is a warning, because "
        "gradient clipping still counts the gradient.",
    ),
    "no gradient": (
        ("warning",),
        "A trainable parameter got no gradient in the last backward, though others did.",
    ),
    "norm trains": (
        ("warning",),
        "A norm of a frozen layer is in train mode, so its statistics change.",
    ),
    "norm in eval": (
        ("warning",),
        "A norm with trainable parameters was left in eval mode inside a module in train mode.",
    ),
    "weight norm": (
        ("warning",),
        "The older `torch.nn.utils.weight_norm` was applied to a frozen layer and replaced the "
        "frozen weight by trainable parameters.",
    ),
    "zero lr": (
        ("warning",),
        "A learning rate of 0 keeps a param group from changing while others train. Its gradients "
        "and optimizer state are computed and kept all the same; freezing saves both.",
    ),
    "tied half": (
        ("warning",),
        "A tied parameter has a name in a frozen module and one in a trainable module.",
    ),
    "all frozen": (("warning",), "Every parameter of the model is frozen."),
    "foreign": (("warning",), "The optimizer has parameters that are not in the model."),
    "dropout active": (
        ("info",),
        "Dropout inside a frozen part is in train mode, so the part's output is random.",
    ),
    "tied": (("info",), "Several names share one parameter."),
    "never stepped": (
        ("info",),
        "A trainable parameter in the optimizer was never stepped, though others were.",
    ),
    "momentum of frozen": (("info",), "The optimizer keeps state for frozen parameters."),
    "frozen unowned": (
        ("info",),
        "Frozen parameters are in no optimizer, so they cannot train when unfrozen later.",
    ),
    "rows lost": (
        ("error",),
        "Some rows of a layer should train, but its weight or bias was replaced by another "
        "parameter, so they have no effect.",
    ),
    "frozen rows": (("info",), "Only some rows of a parameter are frozen."),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding; prints as one line.

    Attributes:
        level: "error" (training goes wrong), "warning" (probably not intended) or "info".
        parameter: name of the parameter or module it is about; "" for the whole model.
        sentence: what was found.
        fix: what to do about it.
        kind: which of `torch_freeze.FINDING_KINDS` it is, to filter by.
        names: all parameters (or norms, or dropout layers) that it is about; empty if it is about
            the model.

    Example:
        >>> print(Finding("info", "fc.bias", "is tied.", "Nothing to do.", "tied"))
        info: fc.bias is tied. Nothing to do.
    """

    level: Level
    parameter: str
    sentence: str
    fix: str
    kind: Kind
    names: tuple[str, ...] = ()

    @property
    def mend(self) -> str:
        """The former name of `fix`."""
        warnings.warn("Finding.mend is now Finding.fix", DeprecationWarning, stacklevel=2)
        return self.fix

    def __str__(self) -> str:
        subject = f"{self.parameter} " if self.parameter else ""
        return f"{self.level}: {subject}{self.sentence} {self.fix}"


def audit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
) -> list[Finding]:
    """Look for what silently goes wrong when parts of a model are frozen.

    Call it after `backward()` and before `zero_grad()`: only then can it see which trainable
    parameters got no gradient. (It cannot for an optimizer that steps in backward, because the
    gradients are gone by then, and it leaves out parameters unfrozen since the last forward pass,
    which cannot have a gradient yet.) Nothing is changed.

    A problem of many parameters is one finding for each module that contains nothing else, or a
    few findings for the modules they are spread over; `Finding.names` lists them all.
    `FINDING_KINDS` describes every kind of finding and its levels.

    Args:
        model: the model; also DDP-wrapped or compiled.
        optimizer: any torch.optim.Optimizer or several; None skips the checks that need one.

    Returns:
        Findings, errors first; an empty list if there are none.

    Raises:
        TypeError: `model` is not a module, or `optimizer` not an optimizer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch_freeze import audit
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 10))
        >>> for finding in audit(model, torch.optim.SGD(model[1].parameters(), lr=0.1))[:1]:
        ...     print(finding)
        error: 0 has 2 parameters that are trainable but in no optimizer: their gradients are \
computed and kept, never used or cleared. Pass them to the optimizer, or freeze them.
    """
    check_model(model, "audit")
    tree = Tree(model)
    optimizers = as_optimizers(optimizer, "audit")
    findings = [*_gradients(tree, optimizers), *_norms(tree), *_tied(tree), *_everything(tree)]
    findings += [*_reduced(tree), *_weight_norms(tree), *_dropout(tree), *_rows(tree)]
    if optimizers is not None:
        findings += [*_owners(tree, optimizers), *_kept_state(tree, optimizers)]
        findings += _still(tree, optimizers)
    return sorted(findings, key=lambda finding: _ORDER[finding.level])


# --- groups ------------------------------------------------------------------------------------

# If a kind has more findings than this, they are merged module by module.
_MOST_GROUPS = 8


@dataclass(frozen=True, slots=True)
class _Group:
    """Names inside the module `head`, which has `of` such names in all."""

    head: str
    names: tuple[str, ...]
    of: int

    def has(self, one: str, many: str, noun: str = "parameter") -> str:
        """The sentence `one`, or `many` as a statement about what `head` has."""
        if self.head == self.names[0]:
            return one
        verb = "has" if self.head else "The model has"
        count = f"{len(self.names):,}" + (f" (of {self.of:,})" if self.of > len(self.names) else "")
        if len(self.names) == 1:
            return f"{verb} {count} {noun} that {one}"
        return f"{verb} {count} {noun}s that {many}"


def _grouped(concerned: Iterable[str], everything: Iterable[str]) -> list[_Group]:
    """The names concerned, by the largest modules that contain nothing else; at most a few."""
    names = list(dict.fromkeys(concerned))
    counts: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    for counter, several in ((counts, names), (totals, everything)):
        for name in several:
            counter.update(_heads(name))
    heads: dict[str, list[str]] = {}
    for name in names:
        filled = [head for head in _heads(name) if counts[head] == totals[head] > 1]
        # If an inner module has all of the names, the reader wants to see that one.
        same = [head for head in filled if counts[head] == counts[filled[0]]]
        heads.setdefault(same[-1] if same else name, []).append(name)
    while len(heads) > _MOST_GROUPS:
        # Merge the deepest into the modules around them, as often as needed.
        deepest = max(head.count(".") for head in heads)
        drawn: dict[str, list[str]] = {}
        for head, inside in heads.items():
            if head.count(".") == deepest:
                head = head.rpartition(".")[0]
            drawn.setdefault(head, []).extend(inside)
        heads = drawn
    return [
        _Group(head, tuple(inside), totals[head] if head not in inside else 1)
        for head, inside in heads.items()
    ]


def _heads(name: str) -> Iterator[str]:
    """The names of the modules around a name, outermost first."""
    yield ""
    for at, char in enumerate(name):
        if char == ".":
            yield name[:at]


def _on_parameters(
    tree: Tree,
    level: Level,
    kind: Kind,
    concerned: Iterable[ParamEntry],
    one: str,
    many: str,
    fix: tuple[str, str],
) -> Iterator[Finding]:
    """Findings about parameters, grouped; `one` and `many` are the wording for one and many."""
    everything = [entry.name for entry in tree.params.values()]
    for group in _grouped((entry.name for entry in concerned), everything):
        several = len(group.names) > 1
        yield Finding(level, group.head, group.has(one, many), fix[several], kind, group.names)


# --- gradients ---------------------------------------------------------------------------------


def _is_lbfgs(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is LBFGS, which keeps the state of all its parameters under the first one."""
    return isinstance(unwrapped(optimizer), torch.optim.LBFGS)


def _owned(optimizers: Iterable[torch.optim.Optimizer] | None) -> dict[int, int]:
    """How many times each parameter, by identity, is in the optimizers' groups."""
    times: dict[int, int] = {}
    for optimizer in optimizers or ():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                times[id(parameter)] = times.get(id(parameter), 0) + 1
    return times


def _gradients(tree: Tree, optimizers: list[torch.optim.Optimizer] | None) -> Iterator[Finding]:
    aware = [own for optimizer in optimizers or () if (own := frozen_aware(optimizer))]
    applied = _owned(optimizer for optimizer in aware if optimizer.step_in_backward)
    entries = list(tree.params.values())
    trainable = [entry for entry in entries if entry.parameter.requires_grad]
    yield from _stale(tree, optimizers or [], aware, applied)
    if any(entry.parameter.grad is not None for entry in trainable):
        missing = [
            entry
            for entry in trainable
            if entry.parameter.grad is None
            and id(entry.parameter) not in applied
            and not just_thawed(entry.parameter)
        ]
        yield from _on_parameters(
            tree,
            "warning",
            "no gradient",
            missing,
            "is trainable but got no gradient in the last backward.",
            "are trainable but got no gradient in the last backward.",
            (
                "Check that the loss depends on it; if the model is compiled, that it was "
                "compiled after the last unfreeze.",
                "Check that the loss depends on them; if the model is compiled, that it was "
                "compiled after the last unfreeze.",
            ),
        )
    elif optimizers:
        each = [unwrapped(o) for o in optimizers if not _is_lbfgs(o)]
        stepped = {id(p) for o in each for p, kept in o.state.items() if kept}
        if stepped:
            yield from _on_parameters(
                tree,
                "info",
                "never stepped",
                [e for e in trainable if id(e.parameter) in _owned(each).keys() - stepped],
                "is trainable and in the optimizer but was never stepped.",
                "are trainable and in the optimizer but were never stepped.",
                (
                    "This is fine if it was unfrozen just now; else run audit after backward().",
                    "This is fine if they were unfrozen just now; else run audit after backward().",
                ),
            )


def _stale(
    tree: Tree,
    optimizers: list[torch.optim.Optimizer],
    aware: list[FrozenAware],
    applied: dict[int, int],
) -> Iterator[Finding]:
    """Frozen parameters that hold a gradient, by what will happen to it."""
    movers: dict[int, str] = {}
    for optimizer in optimizers:
        if frozen_aware(optimizer) is None:
            kind = type(unwrapped(optimizer)).__name__
            movers.update(dict.fromkeys(_owned([optimizer]), kind))
    yield from _remembered(tree, optimizers)
    freed = _owned(aware).keys() - applied.keys()
    cases: dict[tuple[Level, str, str], list[ParamEntry]] = {}
    for entry in tree.params.values():
        if entry.parameter.requires_grad or entry.parameter.grad is None:
            continue
        key = id(entry.parameter)
        level: Level = "warning"
        one = many = ""
        if key in movers:
            level = "error"
            one = f" and is in {movers[key]}, which may still move it by the gradient or, even if "
            one += "that is all zeros, by momentum and weight decay"
            many = one.replace(" and is in", " and are in").replace("move it", "move them")
        elif key in freed:
            one, many = ", which the next step frees", ", which the next step frees"
        cases.setdefault((level, one, many), []).append(entry)
    for (level, one, many), entries in cases.items():
        for group in _grouped((e.name for e in entries), (e.name for e in tree.params.values())):
            held = set(group.names)
            grads = [e.parameter.grad for e in entries if e.name in held]
            size = _format.size(sum(tensor_bytes(grad) for grad in grads if grad is not None))
            several = len(group.names) > 1
            yield Finding(
                level,
                group.head,
                group.has(
                    f"is frozen but holds a gradient of {size}{one}; clip_grad_norm_ counts it.",
                    f"are frozen but hold gradients of {size}{many}; clip_grad_norm_ counts them.",
                ),
                f"Set {'their' if several else 'its'} grad to None, or freeze "
                f"{'them' if several else 'it'} with torch_freeze.freeze, which does that.",
                "stale gradient",
                group.names,
            )


def _remembered(tree: Tree, optimizers: list[torch.optim.Optimizer]) -> Iterator[Finding]:
    """Frozen parameters of an LBFGS whose search direction includes past gradients."""
    for optimizer in optimizers:
        if not _is_lbfgs(optimizer):
            continue
        if not any(kept.get("old_dirs") for kept in optimizer.state.values()):
            continue
        owned = _owned([optimizer])
        frozen = [e for e in tree.params.values() if not e.parameter.requires_grad]
        yield from _on_parameters(
            tree,
            "error",
            "stale gradient",
            [e for e in frozen if id(e.parameter) in owned and e.parameter.grad is None],
            "is frozen but in LBFGS, which keeps moving it by past gradients.",
            "are frozen but in LBFGS, which keeps moving them by past gradients.",
            ("Clear the optimizer's state whenever the frozen set changes.",) * 2,
        )


# --- norms and other modules with a mode -------------------------------------------------------


def _norms(tree: Tree) -> Iterator[Finding]:
    norms = [entry for entry in tree.order if is_norm(entry.module)]
    trains: dict[tuple[str, str], list[ModuleEntry]] = {}
    in_eval, overridden, trainable, bare = [], [], [], []
    for entry in norms:
        module = entry.module
        own = bool(entry.parameters())
        flags = _flags(tree, entry)
        if held_by(module) is not None:
            # unfreeze ends a hold if a parameter of the norm trains, or everything around it.
            if own and any(flags):
                trainable.append(entry)
            elif module.training:
                overridden.append(entry)
            elif not own and flags and all(flags):
                bare.append(entry)
        elif module.training and flags and not any(flags):
            if not _never_moves(module):
                trains.setdefault(_moves_how(module), []).append(entry)
        elif not module.training and own and any(flags) and not is_spectral_norm(module):
            around = next(iter(tree.above(entry)), None)
            if around is not None and around.module.training:
                in_eval.append(entry)
    everything = [_name(entry) for entry in norms]
    yield from _on_modules(
        everything,
        "error",
        "held but trainable",
        trainable,
        "is held in eval mode though its parameters train: they were made trainable without "
        "torch_freeze.",
        "are held in eval mode though their parameters train: these were made trainable without "
        "torch_freeze.",
        ("Call torch_freeze.unfreeze on it.", "Call torch_freeze.unfreeze on them."),
        "norm",
    )
    yield from _on_modules(
        everything,
        "error",
        "hold overridden",
        overridden,
        "is held but was put in train mode by writing its `training` attribute.",
        "are held but were put in train mode by writing their `training` attributes.",
        (
            "Freeze it again, and use train() or eval() instead of the attribute.",
            "Freeze them again, and use train() or eval() instead of the attribute.",
        ),
        "norm",
    )
    yield from _on_modules(
        everything,
        "warning",
        "held but trainable",
        bare,
        "is held in eval mode though all parameters around it train.",
        "are held in eval mode though all parameters around them train.",
        (
            "This is fine if it was frozen by itself; else call torch_freeze.unfreeze on it.",
            "This is fine if they were frozen by themselves; else call torch_freeze.unfreeze on "
            "them.",
        ),
        "norm",
    )
    for (does, do), entries in trains.items():
        yield from _on_modules(
            everything,
            "warning",
            "norm trains",
            entries,
            f"is a norm of a frozen layer in train mode: it {does}.",
            f"belong to frozen layers and are in train mode: they {do}.",
            (
                "Freeze it with torch_freeze.freeze, which holds it (hold_norm=True).",
                "Freeze them with torch_freeze.freeze, which holds them (hold_norm=True).",
            ),
            "norm",
        )
    yield from _on_modules(
        everything,
        "warning",
        "norm in eval",
        in_eval,
        "is a norm whose parameters train, left in eval mode though the module around it is in "
        "train mode: it normalizes by running statistics that no longer follow the data.",
        "have parameters that train but were left in eval mode, though the modules around them "
        "are in train mode: they normalize by running statistics that no longer follow the data.",
        (
            "This is fine if it is meant to keep its statistics; else call train() on it.",
            "This is fine if they are meant to keep their statistics; else call train() on them.",
        ),
        "norm",
    )


def _name(entry: ModuleEntry) -> str:
    return entry.name or type(entry.module).__name__


def _never_moves(module: nn.Module) -> bool:
    """Whether a norm keeps even its scale as a buffer, as a detector's FrozenBatchNorm2d does."""
    return not isinstance(module, _NormBase) and "weight" in module._buffers


def _moves_how(norm: nn.Module) -> tuple[str, str]:
    """What one norm in train mode does, and what several do."""
    if getattr(norm, "track_running_stats", True) is False:
        return (
            "normalizes by the batch instead of its running statistics",
            "normalize by the batch instead of their running statistics",
        )
    if is_spectral_norm(norm):
        return (
            "keeps updating its divisor, and the layer's weight changes with it",
            "keep updating their divisors, and the layers' weights change with them",
        )
    return (
        "updates its running statistics and normalizes by the batch",
        "update their running statistics and normalize by the batch",
    )


def _on_modules(
    everything: list[str],
    level: Level,
    kind: Kind,
    concerned: Iterable[ModuleEntry],
    one: str,
    many: str,
    fix: tuple[str, str],
    noun: str,
) -> Iterator[Finding]:
    """Findings about modules, grouped like those about parameters."""
    for group in _grouped((_name(entry) for entry in concerned), everything):
        said = group.has(one, many, noun)
        yield Finding(level, group.head, said, fix[len(group.names) > 1], kind, group.names)


def _flags(tree: Tree, norm: ModuleEntry) -> list[bool]:
    """Whether the norm's parameters train; if it has none, those of the module around it."""
    for entry in (norm, *tree.above(norm)):
        flags = [param.parameter.requires_grad for param in entry.parameters()]
        if flags:
            return flags
    return []


_DROPS = re.compile(r"Drop(out\d?d?|Path|Block\w*)$|StochasticDepth$")


def _drop_rate(module: nn.Module) -> float:
    """The probability with which a module drops in train mode; 0 if it is not dropout."""
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        rate: Any = module.dropout
    elif _DROPS.search(type(module).__name__) is None:
        return 0.0
    else:
        rate = getattr(module, "p", getattr(module, "drop_prob", 0.0))
    return float(rate) if isinstance(rate, (int, float)) else 0.0


def _dropout(tree: Tree) -> Iterator[Finding]:
    """Dropout in train mode inside a part that is frozen as a whole."""
    layers = [e for e in tree.order if _drop_rate(e.module) > 0]
    active = []
    for entry in layers:
        if entry.module.training and (flags := _flags(tree, entry)) and not any(flags):
            active.append(entry)
    yield from _on_modules(
        [_name(entry) for entry in layers],
        "info",
        "dropout active",
        active,
        "drops at random in a frozen part, so the output differs from pass to pass.",
        "drop at random in frozen parts, so the output differs from pass to pass.",
        (
            "This is fine if it is meant to regularize; for fixed features call eval() on it "
            "after every train().",
            "This is fine if they are meant to regularize; for fixed features call eval() on the "
            "frozen part after every train().",
        ),
        "dropout layer",
    )


def _weight_norms(tree: Tree) -> Iterator[Finding]:
    """Layers whose frozen weight the older weight_norm split into two trainable parameters."""
    for entry in tree.order:
        hooks = entry.module._forward_pre_hooks.values()
        made = {
            f"{h.name}{end}" for h in hooks if isinstance(h, WeightNorm) for end in ("_g", "_v")
        }
        if not made:
            continue
        prefix = f"{entry.name}." if entry.name else ""
        parts = [p for p in entry.params if p.name.removeprefix(prefix) in made]
        if not parts or not all(part.parameter.requires_grad for part in parts):
            continue
        # The layer counts as frozen if its bias is or, without a bias, everything around it. If
        # all biases of the model are frozen, the bias shows nothing.
        ids = {id(part) for part in parts}
        beside = [p for p in entry.params if id(p) not in ids]
        if beside and _every_bias_is_frozen(tree):
            continue
        for above in () if beside else tree.above(entry):
            if beside := [p for p in above.parameters() if id(p) not in ids]:
                break
        if not beside or any(p.parameter.requires_grad for p in beside):
            continue
        yield Finding(
            "warning",
            _name(entry),
            f"is frozen except for {' and '.join(p.name for p in parts)}, which the older "
            "weight_norm made from its weight: they train, and the weight is computed from them.",
            "This is fine if they should train; else freeze it again, or apply weight_norm before "
            "freezing (the one in torch.nn.utils.parametrizations keeps a weight frozen).",
            "weight norm",
            tuple(p.name for p in parts),
        )


def _every_bias_is_frozen(tree: Tree) -> bool:
    biases = [p for p in tree.params.values() if p.name.rpartition(".")[2] == "bias"]
    return len(biases) > 1 and not any(p.parameter.requires_grad for p in biases)


# --- ties --------------------------------------------------------------------------------------


def _tied(tree: Tree) -> Iterator[Finding]:
    tied = tree.tied()
    if not tied:
        return
    around = _Surroundings(tree)
    for entry in tied:
        states = {name: around.trains(name, entry) for name in entry.names}
        is_now = "trainable" if entry.parameter.requires_grad else "frozen"
        by_rows = isinstance(entry.parameter, RowFrozenParameter)
        names = " = ".join(entry.names)
        odd = [n for n, s in states.items() if s is not None and s != (is_now == "trainable")]
        if odd and not by_rows:
            other = "frozen" if is_now == "trainable" else "trainable"
            yield Finding(
                "warning",
                entry.name,
                f"is tied ({names}) and {is_now}, though {', '.join(odd)} is in a module that "
                f"is otherwise {other}.",
                "This is fine if you want it so; else name both modules, or untie the parameter.",
                "tied half",
                entry.names,
            )
        else:
            yield Finding(
                "info",
                entry.name,
                f"is tied: {names} is one tensor and {is_now} under every name"
                + (", except for some rows." if by_rows else "."),
                "Nothing to do.",
                "tied",
                entry.names,
            )


class _Surroundings:
    """Whether the other parameters around one name of a tied parameter train."""

    def __init__(self, tree: Tree) -> None:
        self._below: dict[str, ModuleEntry] = {
            name: entry for entry in tree.order for name in entry.names
        }

    def trains(self, name: str, tied: ParamEntry) -> bool | None:
        """True or False; None if they are mixed, or if only the whole model has any."""
        while name := name.rpartition(".")[0]:
            # A parameter tied to the outside shows nothing about this module.
            flags = {
                other.parameter.requires_grad
                for other in self._below[name].parameters()
                if other is not tied and all(n.startswith(f"{name}.") for n in other.names)
            }
            if flags:
                return flags.pop() if len(flags) == 1 else None
        return None


def _rows(tree: Tree) -> Iterator[Finding]:
    """Tables of which some rows are frozen."""
    for entry in tree.order:
        if not isinstance(entry.module, LiveRows):
            continue
        owner = tree.order[entry.parent]
        for param in entry.params:
            key = param.name.rpartition(".")[2]
            table = owner.module._parameters.get(key)
            if not isinstance(table, RowFrozenParameter) or live_of(table) is not param.parameter:
                yield Finding(
                    "error",
                    param.name,
                    f"has rows that should train, but {_name(owner)}.{key} was replaced since, so "
                    "they have no effect.",
                    f"Delete it (del model.{entry.name}), freeze the rows again, and make the "
                    "optimizer again.",
                    "rows lost",
                    (param.name,),
                )
    for one in table_rows(tree):
        yield Finding(
            "info",
            one.name,
            f"has {one.rows - one.live:,} frozen rows of {one.rows:,}; the others "
            f"({one.which}) {'train' if one.trains else 'would train'} as {one.live_name}.",
            "Nothing to do.",
            "frozen rows",
            (one.name,),
        )


# --- what the optimizer has --------------------------------------------------------------------


def _reduced(tree: Tree) -> Iterator[Finding]:
    trainable = [entry for entry in tree.params.values() if entry.parameter.requires_grad]
    when = "frozen when DistributedDataParallel wrapped the model"
    wrap = "Wrap it again: model = DistributedDataParallel(model.module)."
    yield from _on_parameters(
        tree,
        "error",
        "not reduced",
        not_reduced(tree, trainable),
        f"is trainable but was {when}, so its gradient is never averaged and the processes drift "
        "apart.",
        f"are trainable but were {when}, so their gradients are never averaged and the processes "
        "drift apart.",
        (wrap, wrap),
    )


def _everything(tree: Tree) -> Iterator[Finding]:
    if tree.params and not any(e.parameter.requires_grad for e in tree.params.values()):
        yield Finding(
            "warning",
            "",
            "Every parameter is frozen: a step does nothing, and backward() on the loss raises "
            "unless an input or activation requires grad.",
            "Unfreeze what should train.",
            "all frozen",
        )


def _owners(tree: Tree, optimizers: list[torch.optim.Optimizer]) -> Iterator[Finding]:
    owned = _owned(optimizers)
    unowned: list[ParamEntry] = []
    left_out: list[ParamEntry] = []
    repeated: dict[int, list[ParamEntry]] = {}
    for entry in tree.params.values():
        times = owned.get(id(entry.parameter), 0)
        if times > 1:
            repeated.setdefault(times, []).append(entry)
        elif times == 0:
            (unowned if entry.parameter.requires_grad else left_out).append(entry)
    yield from _on_parameters(
        tree,
        "error",
        "unowned",
        unowned,
        "is trainable but in no optimizer: its gradient is computed and kept, never used or "
        "cleared.",
        "are trainable but in no optimizer: their gradients are computed and kept, never used or "
        "cleared.",
        ("Pass it to the optimizer, or freeze it.", "Pass them to the optimizer, or freeze them."),
    )
    for times, entries in repeated.items():
        yield from _on_parameters(
            tree,
            "error",
            "two groups",
            entries,
            f"is {times} times in the param groups and is stepped that many times.",
            f"are {times} times in the param groups and are stepped that many times.",
            ("Put each parameter into one group of one optimizer.",) * 2,
        )
    if left_out:
        many = len(left_out) > 1
        yield Finding(
            "info",
            "",
            f"{len(left_out)} frozen parameters are in no optimizer, such as {left_out[0].name}: "
            "they cannot train when unfrozen later."
            if many
            else f"The frozen parameter {left_out[0].name} is in no optimizer: it cannot train "
            "when unfrozen later.",
            f"Pass model.parameters(), all of them, to {fitting(optimizers)}.",
            "frozen unowned",
            tuple(entry.name for entry in left_out),
        )
    known = {id(entry.parameter) for entry in tree.params.values()}
    foreign = sum(1 for key in owned if key not in known)
    if foreign:
        yield Finding(
            "warning",
            "",
            f"{foreign} parameters in the optimizer are not in the model."
            if foreign > 1
            else "1 parameter in the optimizer is not in the model.",
            "If modules were replaced after the optimizer was made, make a new optimizer.",
            "foreign",
        )


def _still(tree: Tree, optimizers: list[torch.optim.Optimizer]) -> Iterator[Finding]:
    """Groups that a learning rate of 0 keeps from changing while others train, and the cost."""
    groups = [group for o in optimizers for group in o.param_groups if "lr" in group]
    if all(_is_zero(group["lr"]) for group in groups):
        # If all are 0, it may be a warm-up.
        return
    entries = {id(entry.parameter): entry for entry in tree.params.values()}
    costs: dict[str, int] = {}
    for group in groups:
        # A schedule that is at 0 only for now, in warm-up or after decay, has another base rate.
        if not _is_zero(group["lr"]) or not _is_zero(group.get("initial_lr", 0.0)):
            continue
        for p in group["params"]:
            if id(p) in entries and p.requires_grad and not is_lazy(p):
                state = sum(state_bytes(optimizer, p) for optimizer in optimizers)
                costs[entries[id(p)].name] = tensor_bytes(p) + state
    for group_of in _grouped(costs, (entry.name for entry in entries.values())):
        size = _format.size(sum(costs[name] for name in group_of.names))
        several = len(group_of.names) > 1
        yield Finding(
            "warning",
            group_of.head,
            group_of.has(
                "does not change because its learning rate is 0, but its gradient is computed, and "
                f"gradient and optimizer state take {size}.",
                "do not change because their learning rate is 0, but their gradients are computed, "
                f"and gradients and optimizer state take {size}.",
            ),
            f"Freeze {'them' if several else 'it'} with torch_freeze.freeze, which also holds "
            "norms, and set the param group's learning rate again.",
            "zero lr",
            group_of.names,
        )


def _is_zero(rate: Any) -> bool:
    """Whether a learning rate is 0; some optimizers take None, and choose one."""
    return isinstance(rate, (int, float, torch.Tensor)) and float(rate) == 0


# What becomes of the state of frozen parameters, by the policy of their param group.
_BECOMES = {
    "keep": "It is used again when they are unfrozen; {}='drop' frees it.",
    "reset": "It starts from zero when they are unfrozen; {}='drop' frees it as well.",
    "drop": "The next zero_grad() or step() frees it.",
}
_BECOMES_ELSEWHERE = (
    "It is used again when they are unfrozen; delete optimizer.state[p] to free it."
)


def _kept_state(tree: Tree, optimizers: list[torch.optim.Optimizer]) -> Iterator[Finding]:
    policies: dict[int, str] = {}
    for optimizer in optimizers:
        aware = frozen_aware(optimizer)
        option = state_names(aware).policy if aware is not None else ""
        for group in unwrapped(optimizer).param_groups:
            policy = _BECOMES_ELSEWHERE
            if option:
                policy = _BECOMES[group.get(option, "keep")].format(option)
            policies.update((id(parameter), policy) for parameter in group["params"])
    held: dict[str, list[tuple[str, int]]] = {}
    for key, entry in tree.params.items():
        if entry.parameter.requires_grad:
            continue
        each = (o for o in optimizers if not _is_lbfgs(o))
        if size := sum(state_bytes(optimizer, entry.parameter) for optimizer in each):
            policy = policies.get(key, _BECOMES_ELSEWHERE)
            held.setdefault(policy, []).append((entry.name, size))
    for policy, kept in held.items():
        size = sum(one for _, one in kept)
        yield Finding(
            "info",
            "",
            f"The optimizer keeps {_format.size(size)} of state ({size} bytes) for "
            f"{_format.counted(len(kept), 'frozen parameter')}.",
            policy,
            "momentum of frozen",
            tuple(name for name, _ in kept),
        )
