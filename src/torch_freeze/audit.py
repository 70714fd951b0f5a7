"""audit: what is wrong, or likely to be, with a frozen model and its optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ._ddp import not_reduced
from ._hold import held_by, is_norm, is_spectral_norm
from ._select import ModuleEntry, ParamEntry, Tree, check_model
from .optim import FrozenAwareSGD
from .report import _size, as_optimizers, state_bytes, tensor_bytes

Level = Literal["error", "warning", "info"]
_ORDER: dict[str, int] = {"error": 0, "warning": 1, "info": 2}


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding; prints as one line.

    Attributes:
        level: "error" (trains wrongly), "warning" (likely not what was meant) or "info".
        parameter: name of the parameter or module it is about; "" for the whole model.
        sentence: what is the case.
        mend: what to do.
        kind: a short constant name of the finding, to filter by.

    Example:
        >>> print(Finding("info", "fc.bias", "is frozen.", "Nothing to do.", "example"))
        info: fc.bias is frozen. Nothing to do.
    """

    level: Level
    parameter: str
    sentence: str
    mend: str
    kind: str

    def __str__(self) -> str:
        subject = f"{self.parameter} " if self.parameter else ""
        return f"{self.level}: {subject}{self.sentence} {self.mend}"


def audit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
) -> list[Finding]:
    """Look for what silently goes wrong when parts of a model are frozen.

    Call it after `backward()` and before `zero_grad()`: that is when it can tell which trainable
    parameters got no gradient. (Not of those that an optimizer steps in backward: their gradients
    are gone by then.) Nothing is changed.

    Kinds, by level. error: "unowned" (trainable, in no optimizer), "two groups" (steps twice),
    "not reduced" (trainable, but frozen when DistributedDataParallel wrapped it), "hold overridden"
    (a held norm put in train mode by a direct write), "held but trainable" (a held norm whose
    parameters train), "stale gradient" (frozen with a gradient, in an optimizer other than
    FrozenAwareSGD). warning: "stale gradient" (elsewhere), "held but trainable" (a held norm
    without parameters, where all around it train), "no gradient", "norm trains" (norm of a frozen
    layer in train mode), "tied half" (tied parameters whose names lie in a frozen and in a
    trainable module), "all frozen", "foreign" (in the optimizer, not in the model). info: "tied",
    "never stepped", "momentum of frozen", "frozen unowned" (left out of the optimizer, so cannot
    train later).

    Args:
        model: the model, DDP-wrapped or compiled ones too.
        optimizer: any torch.optim.Optimizer or several; None skips what needs one.

    Returns:
        Findings, errors first; an empty list when there is nothing to say.

    Raises:
        TypeError: `model` is not a module, or `optimizer` not an optimizer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch_freeze import audit
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 10))
        >>> for finding in audit(model, torch.optim.SGD(model[1].parameters(), lr=0.1))[:1]:
        ...     print(finding)
        error: 0.weight is trainable but in no optimizer: its gradient is computed and kept, \
never used or cleared. Pass it to the optimizer, or freeze it.
    """
    check_model(model, "audit")
    tree = Tree(model)
    optimizers = as_optimizers(optimizer, "audit")
    findings = [*_gradients(tree, optimizers), *_norms(tree), *_tied(tree), *_everything(tree)]
    findings += _reduced(tree)
    if optimizers is not None:
        findings += [*_owners(tree, optimizers), *_momentum(tree, optimizers)]
    return sorted(findings, key=lambda finding: _ORDER[finding.level])


def _frozen_aware(optimizer: torch.optim.Optimizer) -> FrozenAwareSGD | None:
    """The FrozenAwareSGD that `optimizer` is, or that Accelerate has wrapped."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, FrozenAwareSGD) else None


def _owned(optimizers: Iterable[torch.optim.Optimizer] | None) -> dict[int, int]:
    """How often each parameter, by identity, stands in the optimizers' groups."""
    times: dict[int, int] = {}
    for optimizer in optimizers or ():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                times[id(parameter)] = times.get(id(parameter), 0) + 1
    return times


def _gradients(tree: Tree, optimizers: list[torch.optim.Optimizer] | None) -> Iterator[Finding]:
    owned = _owned(optimizers)
    aware = [own for optimizer in optimizers or () if (own := _frozen_aware(optimizer))]
    by_others = _owned(o for o in optimizers or () if _frozen_aware(o) is None)
    by_ours = _owned(aware)
    applied = _owned(optimizer for optimizer in aware if optimizer.step_in_backward)
    entries = list(tree.params.values())
    trainable = [entry for entry in entries if entry.parameter.requires_grad]
    for entry in entries:
        grad = entry.parameter.grad
        if entry.parameter.requires_grad or grad is None:
            continue
        at_risk = id(entry.parameter) in by_others
        where = ""
        if at_risk:
            where = " and is in the optimizer, which may still move it"
        elif id(entry.parameter) in by_ours and id(entry.parameter) not in applied:
            where = ", which the next step frees"
        yield Finding(
            "error" if at_risk else "warning",
            entry.name,
            f"is frozen but holds a gradient of {_size(tensor_bytes(grad))}{where}; "
            "clip_grad_norm_ counts it.",
            "Set its grad to None, or freeze it with torch_freeze.freeze, which does.",
            "stale gradient",
        )
    if any(entry.parameter.grad is not None for entry in trainable):
        for entry in trainable:
            if entry.parameter.grad is None and id(entry.parameter) not in applied:
                yield Finding(
                    "warning",
                    entry.name,
                    "is trainable but got no gradient in the last backward.",
                    "Check that the loss depends on it; if the model is compiled, that it was "
                    "compiled after the last unfreeze.",
                    "no gradient",
                )
    elif optimizers:
        stepped = {id(p) for o in optimizers for p, kept in o.state.items() if kept}
        if stepped:
            for entry in trainable:
                if id(entry.parameter) in owned and id(entry.parameter) not in stepped:
                    yield Finding(
                        "info",
                        entry.name,
                        "is trainable and in the optimizer but was never stepped.",
                        "Fine if it was unfrozen just now; else run audit after backward().",
                        "never stepped",
                    )


def _norms(tree: Tree) -> Iterator[Finding]:
    for entry in tree.order:
        module = entry.module
        if not is_norm(module):
            continue
        name = entry.name or type(module).__name__
        own = bool(entry.parameters())
        flags = _flags(tree, entry)
        if held_by(module) is not None:
            # unfreeze ends a hold as soon as a parameter of the norm's own trains, or all around.
            if own and any(flags):
                yield Finding(
                    "error",
                    name,
                    "is held in eval mode though its parameters train: they were made trainable "
                    "without torch_freeze.",
                    "Call torch_freeze.unfreeze on it.",
                    "held but trainable",
                )
            elif module.training:
                yield Finding(
                    "error",
                    name,
                    "is held but was put in train mode by writing its `training` attribute.",
                    "Freeze it again, and use train() or eval() instead of the attribute.",
                    "hold overridden",
                )
            elif not own and flags and all(flags):
                yield Finding(
                    "warning",
                    name,
                    "is held in eval mode though all parameters around it train.",
                    "Fine if it was frozen by itself; else call torch_freeze.unfreeze on it.",
                    "held but trainable",
                )
        elif module.training and flags and not any(flags):
            does = "updates its running statistics and normalises by the batch"
            if getattr(module, "track_running_stats", True) is False:
                does = "normalises by the batch instead of its running statistics"
            elif is_spectral_norm(module):
                does = "goes on estimating its divisor, and the layer's weight changes with it"
            yield Finding(
                "warning",
                name,
                f"is a norm of a frozen layer in train mode: it {does}.",
                "Freeze it with torch_freeze.freeze, which holds it (hold_norm=True).",
                "norm trains",
            )


def _flags(tree: Tree, norm: ModuleEntry) -> list[bool]:
    """Whether the norm's parameters train; where it has none, those of the module around it."""
    for entry in (norm, *tree.above(norm)):
        flags = [param.parameter.requires_grad for param in entry.parameters()]
        if flags:
            return flags
    return []


def _tied(tree: Tree) -> Iterator[Finding]:
    tied = tree.tied()
    if not tied:
        return
    around = _Surroundings(tree)
    for entry in tied:
        states = {name: around.trains(name, entry) for name in entry.names}
        is_now = "trainable" if entry.parameter.requires_grad else "frozen"
        names = " = ".join(entry.names)
        odd = [n for n, s in states.items() if s is not None and s != (is_now == "trainable")]
        if odd:
            other = "frozen" if is_now == "trainable" else "trainable"
            yield Finding(
                "warning",
                entry.name,
                f"is tied ({names}) and {is_now}, though {', '.join(odd)} lies in a module that "
                f"is otherwise {other}.",
                "Fine if it is meant for both; else name both modules, or untie the parameter.",
                "tied half",
            )
        else:
            yield Finding(
                "info",
                entry.name,
                f"is tied: {names} is one tensor and {is_now} under every name.",
                "Nothing to do.",
                "tied",
            )


class _Surroundings:
    """Whether the other parameters around one name of a tied parameter train."""

    def __init__(self, tree: Tree) -> None:
        self._below: dict[str, ModuleEntry] = {
            name: entry for entry in tree.order for name in entry.names
        }

    def trains(self, name: str, tied: ParamEntry) -> bool | None:
        """True, False, or None where they are mixed or there are none short of the model."""
        while name := name.rpartition(".")[0]:
            flags = {
                other.parameter.requires_grad
                for other in self._below[name].parameters()
                if other is not tied
            }
            if flags:
                return flags.pop() if len(flags) == 1 else None
        return None


def _reduced(tree: Tree) -> Iterator[Finding]:
    trainable = [entry for entry in tree.params.values() if entry.parameter.requires_grad]
    for entry in not_reduced(tree, trainable):
        yield Finding(
            "error",
            entry.name,
            "is trainable but was frozen when DistributedDataParallel wrapped the model: its "
            "gradient is never averaged, and the processes drift apart.",
            "Wrap anew: model = DistributedDataParallel(model.module).",
            "not reduced",
        )


def _everything(tree: Tree) -> Iterator[Finding]:
    if tree.params and not any(e.parameter.requires_grad for e in tree.params.values()):
        yield Finding(
            "warning",
            "",
            "Every parameter is frozen: backward() on the loss raises and a step does nothing.",
            "Unfreeze what should train.",
            "all frozen",
        )


def _owners(tree: Tree, optimizers: list[torch.optim.Optimizer]) -> Iterator[Finding]:
    owned = _owned(optimizers)
    left_out = []
    for entry in tree.params.values():
        times = owned.get(id(entry.parameter), 0)
        if times == 0 and entry.parameter.requires_grad:
            yield Finding(
                "error",
                entry.name,
                "is trainable but in no optimizer: its gradient is computed and kept, never used "
                "or cleared.",
                "Pass it to the optimizer, or freeze it.",
                "unowned",
            )
        elif times == 0:
            left_out.append(entry.name)
        elif times > 1:
            yield Finding(
                "error",
                entry.name,
                f"stands {times} times in the param groups and is stepped as often.",
                "Give each parameter to one group of one optimizer.",
                "two groups",
            )
    if left_out:
        yield Finding(
            "info",
            "",
            f"{len(left_out)} frozen parameters are in no optimizer, such as {left_out[0]}: they "
            "cannot train when unfrozen later.",
            "Pass model.parameters(), all of them, to FrozenAwareSGD.",
            "frozen unowned",
        )
    known = {id(entry.parameter) for entry in tree.params.values()}
    foreign = sum(1 for key in owned if key not in known)
    if foreign:
        yield Finding(
            "warning",
            "",
            f"{foreign} parameters in the optimizer are not in the model.",
            "If modules were replaced after the optimizer was made, make it anew.",
            "foreign",
        )


# What becomes of the momentum of what is frozen, by the policy of its param group.
_BECOMES = {
    None: "It resumes from there when they are unfrozen; delete optimizer.state[p] to free it.",
    "keep": "It resumes from there when they are unfrozen; frozen_momentum='drop' frees it.",
    "reset": "It begins anew when they are unfrozen; frozen_momentum='drop' frees it, too.",
    "drop": "The next zero_grad() or step() frees it.",
}


def _momentum(tree: Tree, optimizers: list[torch.optim.Optimizer]) -> Iterator[Finding]:
    policies: dict[int, str | None] = {}
    for optimizer in optimizers:
        aware = _frozen_aware(optimizer) is not None
        for group in optimizer.param_groups:
            policy = group.get("frozen_momentum", "keep") if aware else None
            policies.update((id(parameter), policy) for parameter in group["params"])
    held: dict[str | None, list[int]] = {}
    for key, entry in tree.params.items():
        if entry.parameter.requires_grad:
            continue
        if size := sum(state_bytes(optimizer, entry.parameter) for optimizer in optimizers):
            held.setdefault(policies.get(key), []).append(size)
    for policy, sizes in held.items():
        yield Finding(
            "info",
            "",
            f"The optimizer keeps {_size(sum(sizes))} of momentum ({sum(sizes)} bytes) for "
            f"{len(sizes)} frozen parameters.",
            _BECOMES[policy],
            "momentum of frozen",
        )
