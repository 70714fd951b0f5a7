"""What is frozen, what it costs, and where the freeze sits in the backward pass."""

from __future__ import annotations

import html
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_iter

from . import _format
from ._flow import (
    Facts,
    Kind,
    Leaf,
    Reasons,
    checkpoints_run_at_once,
    estimate_flow,
    left_as_they_were,
    measure_flow,
)
from ._hold import held_by, is_norm
from ._tree import ModuleEntry, ParamEntry, Tree, check_model, is_lazy, unwrap
from .optim._base import unwrapped
from .rows import Table
from .rows import tables as table_rows

_MAX_ROWS = 40


@dataclass(frozen=True, slots=True)
class Flow:
    """Where the freeze sits in the backward pass.

    Freezing a weight always saves its weight gradient. It saves the gradient of its *input* only
    if nothing before it takes a gradient; backward then stops there. Frozen layers that come after
    trainable ones still backpropagate, which is why freezing may give less speed than expected.
    So do layers that come after an input or an activation that requires grad.

    Attributes:
        kind: "stops early" (backward runs through no frozen parameter), "runs through" (through all
            of them), "mixed", "nothing frozen", or "everything frozen" (and backward raises).
        measured: True if an example was run, False for an estimate by registration order.
        stops_early: whether backward leaves out some frozen parameters.
        first_trainable: name of the first trainable parameter, where backward ends unless
            `other_leaf` is set; None if there is none.
        skipped, crossed: elements of frozen parameters that backward does not reach, and of those
            it runs through.
        weight_gradient_saved: share (0 to 1) of the weight-gradient work that is saved, compared
            with the same model all trainable; by FLOPs if measured, else by parameter count.
        backward_saved: share (0 to 1) saved of all work of backward: weight gradients, input
            gradients and, if measured, attention. Forward work that activation checkpointing
            repeats is not counted.
        sentence: the same in words.
        other_leaf: a description of the tensor that takes a gradient without being a parameter: the
            example, or an activation that the model or a hook marked with `requires_grad`. None
            if there is none, and in an estimate, which cannot know.
    """

    kind: Kind
    measured: bool
    stops_early: bool
    first_trainable: str | None
    skipped: int
    crossed: int
    weight_gradient_saved: float
    backward_saved: float
    sentence: str
    other_leaf: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One module's line; counts are of elements and sizes in bytes, over its whole subtree.

    A tied parameter is counted once, where it is first registered. `gradient_bytes` is the size of
    the gradients that exist at the moment; with `step_in_backward` those not yet applied.
    `state_bytes` is the size of every tensor that the optimizer keeps for the parameters (momentum,
    moments, counts of updates), and None if no optimizer was given.
    """

    name: str
    kind: str
    depth: int
    parameters: int
    trainable: int
    frozen: int
    bytes: int
    gradient_bytes: int
    state_bytes: int | None
    norms_held: int
    norms_train: int
    norms_eval: int

    @property
    def momentum_bytes(self) -> int | None:
        """The former name of `state_bytes`."""
        warnings.warn("Row.momentum_bytes is now Row.state_bytes", DeprecationWarning, stacklevel=2)
        return self.state_bytes

    @property
    def norm(self) -> str:
        """State of the layers that `freeze` holds, such as batch norms: held, train or eval."""
        counts = (
            (self.norms_held, "held"),
            (self.norms_train, "train"),
            (self.norms_eval, "eval"),
        )
        return ", ".join(f"{n} {state}" for n, state in counts if n) or "-"


@dataclass(frozen=True, slots=True, repr=False)
class FreezeReport:
    """The frozen state of a model; `print` it, show it in a notebook, or call `to_dict()`.

    Attributes:
        model: class name of the model.
        total: the line of the whole model.
        rows: lines of its modules, in registration order.
        trainable_names, frozen_names: names of parameters (a tied one by its first name).
        tied: all names of each tied parameter, one tuple per parameter.
        tables: parameters of which only some rows are frozen.
        flow: how far backward runs and what that saves.
        action: the function that made this report, such as "report", "freeze" or "unfreeze".
        matched: parameters named in that call; `changed`: those it changed.
        held, released: norm layers that the call put on hold or gave back their own mode.
        notes: facts worth a sentence, such as a tied parameter named by one name only.

    Example:
        >>> from torch import nn
        >>> from torch_freeze import freeze
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 10))
        >>> result = freeze(model, "0")
        >>> result.total.frozen, result.total.trainable, result.changed
        (36, 50, ('0.weight', '0.bias'))
        >>> result.flow.stops_early
        True
    """

    model: str
    total: Row
    rows: tuple[Row, ...]
    trainable_names: tuple[str, ...]
    frozen_names: tuple[str, ...]
    tied: tuple[tuple[str, ...], ...]
    flow: Flow
    action: str = "report"
    matched: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    released: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
    tables: tuple[Table, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain dicts, lists, strings and numbers, ready for JSON."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    def __repr__(self) -> str:
        share = _format.percent(self.total.frozen, self.total.parameters)
        return (
            f"<FreezeReport of {self.model}: {_format.parameters(self.total.parameters)}, "
            f"{_format.count(self.total.frozen)} frozen ({share})>"
        )

    def __str__(self) -> str:
        return "\n".join([self._headline(), "", *self._table_lines(), "", *self._sentences()])

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(line)}</p>" for line in self._sentences())
        return (
            f"<div><p><b>{html.escape(self._headline())}</b></p>"
            f"{_format.html_table(*self._cells())}{said}</div>"
        )

    def _headline(self) -> str:
        total = self.total
        state = (
            f"{self.model}: {_format.parameters(total.parameters)}, "
            f"{_format.count(total.trainable)} trainable, {_format.count(total.frozen)} frozen "
            f"({_format.percent(total.frozen, total.parameters)})"
        )
        if self.action == "report":
            return _format.fit(state)
        did = f"{self.action}: {_format.parameters(len(self.matched))} named, "
        did += f"{len(self.changed)} changed"
        for norms, what in ((self.held, "held"), (self.released, "released")):
            if norms:
                did += f", {_format.counted(len(norms), 'norm')} {what}"
        return f"{did}\n{_format.fit(state)}"

    def _cells(self) -> tuple[list[str], list[list[str]], str]:
        with_state = self.total.state_bytes is not None
        header = ["module", "state", "parameters", "trainable", "frozen", "bytes", "gradients"]
        header += ["optimizer"] * with_state + ["norms"]
        aligned = "<<" + ">" * (5 + with_state) + "<"
        lines = []
        for row in (*self.rows, self.total):
            label = "  " * row.depth + row.name.rsplit(".", 1)[-1] if row.depth >= 0 else "total"
            line = [label, _state(row), _format.count(row.parameters), _format.count(row.trainable)]
            line += [
                _format.count(row.frozen),
                _format.size(row.bytes),
                _format.size(row.gradient_bytes),
            ]
            if row.state_bytes is not None:
                line.append(_format.size(row.state_bytes))
            lines.append([*line, row.norm])
        return header, lines, aligned

    def _table_lines(self) -> Iterator[str]:
        header, body, aligned = self._cells()
        # The two text columns give way if the table would be wider than a terminal.
        return _format.table(header, body, aligned, {0: 24, len(header) - 1: 12})

    def _sentences(self) -> list[str]:
        said = ["backward: " + self.flow.sentence]
        said += [f"tied: {' = '.join(names)} is one tensor" for names in self.tied[:8]]
        if more := len(self.tied[8:]):
            said.append(
                f"tied: {_format.counted(more, 'more tensor')} {'have' if more > 1 else 'has'} "
                "several names"
            )
        said += [f"rows: {_table_sentence(table)}" for table in self.tables]
        said += [f"note: {note}" for note in self.notes]
        return [part for line in said for part in _format.wrap(line)]


def report(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
    *,
    depth: int | None = None,
    example: Any = None,
) -> FreezeReport:
    """Show what is frozen, what it costs in bytes, and whether backward stops early.

    Args:
        model: any module; a DDP-wrapped or compiled one is reported under its own names.
        optimizer: any torch.optim.Optimizer, or several. The column "optimizer" then shows
            the bytes of every tensor that they keep, such as momentum.
        depth: how many levels of modules to list; 0 gives the total only. None opens only those
            modules whose parameters are partly frozen.
        example: inputs of the model (a tensor, a tuple of arguments or a dict of keyword
            arguments). With them, the model runs forward once as it is and once with everything
            trainable. The report then says what autograd found: through which frozen parameters
            backward runs and why (an input or activation that requires grad counts), and what
            share of the work is saved, in FLOPs. Without them both are estimated from the order
            of registration and the number of parameters. The passes change no parameter, flag,
            statistic or gradient, and not the random state.

    Returns:
        A FreezeReport.

    Raises:
        TypeError: `model` is not a module, or `optimizer` not an optimizer.
        ValueError: `depth` is negative.

    Example:
        >>> from torch import nn
        >>> import torch_freeze
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 10))
        >>> _ = torch_freeze.freeze(model, "0")
        >>> print(torch_freeze.report(model))
        Sequential: 86 parameters, 50 trainable, 36 frozen (41.9 %)
        <BLANKLINE>
        module  state      parameters  trainable  frozen  bytes  gradients  norms
        ------  ---------  ----------  ---------  ------  -----  ---------  -----
        0       frozen             36          0      36  144 B          -  -
        2       trainable          50         50       0  200 B          -  -
        ------  ---------  ----------  ---------  ------  -----  ---------  -----
        total   mixed              86         50      36  344 B          -  -
        <BLANKLINE>
        backward: stops early: all 36 frozen parameters come before the first trainable one
          (2.weight). Weight-gradient work saved: 41.9 %; backward work of these layers saved:
          63.2 %. (Estimated from the order of registration and parameter counts; give example=...
          to measure.)
    """
    check_model(model, "report")
    if depth is not None and depth < 0:
        raise ValueError(f"report: {depth=} is negative; 0 gives the total only.")
    return build_report(Tree(model), as_optimizers(optimizer, "report"), depth, example)


def as_optimizers(optimizer: object, caller: str) -> list[torch.optim.Optimizer] | None:
    """One optimizer or an iterable of them as a list; None stays None."""
    if optimizer is None:
        return None
    if isinstance(optimizer, torch.optim.Optimizer):
        return [optimizer]
    several: list[torch.optim.Optimizer] = []
    for one in optimizer if isinstance(optimizer, Iterable) else [optimizer]:
        if not isinstance(one, torch.optim.Optimizer):
            raise TypeError(
                f"{caller}: optimizer must be a torch.optim.Optimizer or several of them; "
                f"got {type(one).__name__}."
            )
        several.append(one)
    return several


def build_report(
    tree: Tree,
    optimizers: list[torch.optim.Optimizer] | None = None,
    depth: int | None = None,
    example: Any = None,
    **call: Any,
) -> FreezeReport:
    """The report of a model that was walked already; `call` fills the fields of a freeze call."""
    sums = _sum_up(tree, optimizers)
    total = _row(tree.root, "", -1, sums[id(tree.root)], optimizers is not None)
    rows = list(_rows(tree, sums, depth, optimizers is not None))
    entries = list(tree.params.values())
    facts = estimate_flow(entries) if example is None else measure_flow(tree, example)
    if example is not None and facts.kind not in ("nothing frozen", "everything frozen"):
        call["notes"] = (*call.get("notes", _notes(entries)), *_cache_note(tree, example))
    return FreezeReport(
        model=type(tree.root.module).__name__,
        total=total,
        rows=tuple(rows),
        trainable_names=tuple(e.name for e in entries if e.parameter.requires_grad),
        frozen_names=tuple(e.name for e in entries if not e.parameter.requires_grad),
        tied=tuple(tuple(e.names) for e in entries if e.aliases),
        tables=tuple(table_rows(tree)),
        flow=_flow(facts),
        **{"notes": _notes(entries), **call},
    )


def _cache_note(tree: Tree, example: Any) -> Iterator[str]:
    """What a FeatureCache would save."""
    # It needs this module's report.
    from .features._dataset import split
    from .features._plan import estimate

    given = (*example, None) if isinstance(example, tuple) else example
    model = unwrap(tree.root.module)
    inputs, _ = split(given)
    with (
        left_as_they_were(tree),
        torch.compiler.set_stance("force_eager"),
        checkpoints_run_at_once(),
    ):
        # The pass writes statistics into copies, which leaves versions of buffers alone, too.
        buffers = {name: b.clone() for name, b in model.named_buffers() if not is_lazy(b)}
        share, names, size = estimate(
            tree, lambda i: torch.func.functional_call(model, buffers, *i), inputs
        )
    tensors = [t for t in tree_iter(inputs) if isinstance(t, torch.Tensor) and t.dim()]
    if not names or not tensors:
        return
    each = _format.size(size // len(tensors[0]))
    yield (
        f"FeatureCache would skip {_format.percent(share)} of forward, up to "
        f"{_format.listed(names)}, and store {each} for each sample"
    )


def _flow(facts: Facts) -> Flow:
    reasons = facts.reasons
    return Flow(
        kind=facts.kind,
        measured=reasons is not None,
        stops_early=facts.kind in ("stops early", "mixed", "everything frozen"),
        first_trainable=facts.first_trainable,
        skipped=facts.skipped,
        crossed=facts.crossed,
        weight_gradient_saved=facts.weight_gradient_saved,
        backward_saved=facts.backward_saved,
        sentence=" ".join(_flow_sentences(facts)),
        other_leaf=_leaf(reasons.leaf) if reasons and reasons.leaf else None,
    )


def _flow_sentences(facts: Facts) -> Iterator[str]:
    """What becomes of backward, as a continuation of "backward:"."""
    reasons = facts.reasons
    total = f"{facts.crossed + facts.skipped:,}"
    if facts.kind == "nothing frozen":
        said = "runs through the whole model: nothing is frozen."
    elif facts.kind == "everything frozen":
        said = "does not run: everything is frozen, and backward() on the loss raises"
        said += "." if reasons else " unless the input or an activation requires grad."
    elif facts.kind == "stops early":
        first = facts.first_trainable
        said = f"stops early: all {total} frozen parameters come before "
        said += f"the first trainable one ({first})." if first else "what takes a gradient."
    elif facts.kind == "mixed":
        said = (
            f"stops early for {facts.skipped:,} of {total} frozen parameters; it still runs "
            f"through the other {facts.crossed:,}, which come after {_before(facts)}: there it "
            "computes input gradients all the same."
        )
    else:
        said = (
            f"does not stop early: all {total} frozen parameters come after {_before(facts)}, so "
            "it runs through them and computes their input gradients."
        )
    partly = facts.kind not in ("nothing frozen", "everything frozen")
    if facts.all_frozen and partly:
        said = f"runs though everything is frozen, and {said}"
    yield said
    if partly:
        yield (
            f"Weight-gradient work saved: {_format.percent(facts.weight_gradient_saved)}; backward "
            f"work of these layers saved: {_format.percent(facts.backward_saved)}."
        )
        yield _measured_how(reasons)
    for names, gets in (
        (reasons.unused if reasons else (), "never uses {}"),
        (
            reasons.cut_off if reasons else (),
            "gives no gradient to {}, which it uses behind no_grad() or detach()",
        ),
    ):
        if names:
            several = _format.counted(len(names), "trainable parameter")
            yield f"The example {gets.format(several)}, such as {names[0]}."


def _measured_how(reasons: Reasons | None) -> str:
    if reasons is None:
        return (
            "(Estimated from the order of registration and parameter counts; give example=... to "
            "measure.)"
        )
    if reasons.by_flops:
        return "(Measured on the example, by FLOPs of matrix products and convolutions.)"
    return "(Measured on the example, by parameter counts: it has no matrix product.)"


def _before(facts: Facts) -> str:
    """What takes a gradient before the frozen parameters that backward runs through."""
    reasons = facts.reasons
    before = []
    if facts.first_trainable and (reasons is None or reasons.after_trainable):
        before.append(f"a trainable one ({facts.first_trainable})")
    if reasons and reasons.leaf and (reasons.after_leaf or not before):
        before.append(_leaf(reasons.leaf))
    return " or ".join(before)


def _leaf(leaf: Leaf) -> str:
    if leaf.in_example:
        return "the example, which requires grad"
    return f"an activation that requires grad (the input of {leaf.into})"


def _table_sentence(table: Table) -> str:
    rows = f"row{'s' * (table.live > 1)} {table.which}"
    share = f"{_format.count(table.live)} of {_format.count(table.rows)} rows of {table.name}"
    if table.live_name is None:
        return f"{share} are live ({rows}), but the model no longer has their parameter"
    does = f"train{'s' * (table.live == 1)}" if table.trains else "could train but are frozen, too"
    return f"{share} {does}, as {table.live_name} ({rows}); the others are frozen"


def _notes(entries: list[ParamEntry]) -> tuple[str, ...]:
    lazy = [e.name for e in entries if is_lazy(e.parameter)]
    if not lazy:
        return ()
    if len(lazy) == 1:
        return (f"the lazy parameter {lazy[0]} has no shape yet and counts as 0",)
    return (f"{len(lazy)} lazy parameters have no shape yet and count as 0, such as {lazy[0]}",)


@dataclass(slots=True)
class _Sum:
    parameters: int = 0
    trainable: int = 0
    bytes: int = 0
    gradient_bytes: int = 0
    state_bytes: int = 0
    norms_held: int = 0
    norms_train: int = 0
    norms_eval: int = 0
    tensors: int = 0
    trainable_tensors: int = 0

    def add(self, other: _Sum) -> None:
        self.parameters += other.parameters
        self.trainable += other.trainable
        self.bytes += other.bytes
        self.gradient_bytes += other.gradient_bytes
        self.state_bytes += other.state_bytes
        self.norms_held += other.norms_held
        self.norms_train += other.norms_train
        self.norms_eval += other.norms_eval
        self.tensors += other.tensors
        self.trainable_tensors += other.trainable_tensors


def _sum_up(tree: Tree, optimizers: list[torch.optim.Optimizer] | None) -> dict[int, _Sum]:
    """Sums over each module's subtree, from one pass over all modules."""
    sums: dict[int, _Sum] = {}
    counted: set[int] = set()
    for entry in tree.order:
        own = sums[id(entry)] = _Sum()
        for param in entry.params:
            if id(param) in counted:
                continue
            counted.add(id(param))
            p = param.parameter
            trains = p.requires_grad
            own.tensors += 1
            own.trainable_tensors += trains
            if is_lazy(p):
                continue
            numel = param.numel
            own.parameters += numel
            own.bytes += p.numel() * p.element_size()
            if trains:
                own.trainable += numel
            if (grad := p.grad) is not None:
                own.gradient_bytes += tensor_bytes(grad)
            if optimizers:
                own.state_bytes += sum(state_bytes(o, p) for o in optimizers)
        if is_norm(entry.module):
            if held_by(entry.module) is not None:
                own.norms_held += 1
            elif entry.module.training:
                own.norms_train += 1
            else:
                own.norms_eval += 1
    # Parents come before children. A shared module counts where it is first registered.
    for entry in reversed(tree.order):
        if entry.parent >= 0:
            sums[id(tree.order[entry.parent])].add(sums[id(entry)])
    return sums


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's values; for a sparse or expanded one, of those that it stores."""
    if tensor.layout is torch.sparse_coo:
        return sum(t.numel() * t.element_size() for t in (tensor._indices(), tensor._values()))
    size = tensor.numel() * tensor.element_size()
    if tensor.layout is torch.strided and 0 in tensor.stride():
        # A gradient that was applied in backward is replaced by one element, expanded.
        return min(size, tensor.untyped_storage().nbytes())
    return size


def state_bytes(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> int:
    """Bytes of all tensors an optimizer keeps for a parameter."""
    # state is a defaultdict: [] would add an entry, get() does not.
    state = unwrapped(optimizer).state.get(parameter)
    if not isinstance(state, Mapping):
        return 0
    return sum(tensor_bytes(v) for v in state.values() if isinstance(v, torch.Tensor))


def _row(entry: ModuleEntry, name: str, depth: int, sums: _Sum, with_state: bool) -> Row:
    return Row(
        name=name,
        kind=type(entry.module).__name__,
        depth=depth,
        parameters=sums.parameters,
        trainable=sums.trainable,
        frozen=sums.parameters - sums.trainable,
        bytes=sums.bytes,
        gradient_bytes=sums.gradient_bytes,
        state_bytes=sums.state_bytes if with_state else None,
        norms_held=sums.norms_held,
        norms_train=sums.norms_train,
        norms_eval=sums.norms_eval,
    )


def _rows(tree: Tree, sums: dict[int, _Sum], depth: int | None, with_state: bool) -> Iterator[Row]:
    if depth == 0:
        return
    shown = _open_mixed(tree, sums) if depth is None else None
    listed = {id(tree.root): 0}
    for entry in tree.order[1:]:
        parent = tree.order[entry.parent]
        level = listed.get(id(parent))
        its = sums[id(entry)]
        if level is None or not (its.tensors or its.norms_held + its.norms_train + its.norms_eval):
            continue
        yield _row(entry, entry.name, level, its, with_state)
        if id(entry) in shown if shown is not None else depth is None or level + 1 < depth:
            listed[id(entry)] = level + 1


def _open_mixed(tree: Tree, sums: dict[int, _Sum]) -> set[int]:
    """Modules to open, breadth first, so that the rows separate frozen from trainable."""
    shown: set[int] = set()
    lines = len(tree.root.children)
    level = [tree.root]
    while level:
        following = []
        for entry in level:
            for child in entry.children:
                its = sums[id(child)]
                mixed = 0 < its.trainable_tensors < its.tensors
                if mixed and lines + len(child.children) <= _MAX_ROWS and id(child) not in shown:
                    shown.add(id(child))
                    lines += len(child.children)
                    following.append(child)
        level = following
    return shown


def _state(row: Row) -> Literal["frozen", "trainable", "mixed", "-"]:
    if not row.parameters:
        return "-"
    if not row.trainable:
        return "frozen"
    return "mixed" if row.frozen else "trainable"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
