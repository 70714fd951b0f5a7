"""What is frozen, what it costs, and where the freeze sits in the backward pass."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from . import _format
from ._flow import Flow, estimate_flow, measure_flow
from ._hold import held_by, is_norm
from ._tree import ModuleEntry, ParamEntry, Tree, check_model, is_lazy

_WIDTH = 120
_TEXT_WIDTH = 90
_MAX_ROWS = 40


@dataclass(frozen=True, slots=True)
class Row:
    """One module's line: counts are of elements, sizes in bytes, all over its whole subtree.

    A tied parameter is counted once, where it is first registered. `gradient_bytes` is what the
    gradients take at the moment: with `step_in_backward` what is not applied yet.
    `momentum_bytes` is every tensor the optimizer keeps for the parameters, and None when no
    optimizer was given.
    """

    name: str
    kind: str
    depth: int
    parameters: int
    trainable: int
    frozen: int
    bytes: int
    gradient_bytes: int
    momentum_bytes: int | None
    norms_held: int
    norms_train: int
    norms_eval: int

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
    """The frozen state of a model; `print` it, show it in a notebook, or take `to_dict()`.

    Attributes:
        model: class name of the model.
        total: the line of the whole model.
        rows: lines of its modules, in registration order.
        trainable_names, frozen_names: names of parameters (a tied one by its first name).
        tied: all names of each tied parameter, one tuple per parameter.
        flow: where the freeze sits: how far backward runs and what is saved.
        action: "report", "freeze", "unfreeze" or what else made this report.
        matched: parameters named by that call; `changed`: those it changed.
        held, released: norm layers that call put on hold or gave back their own mode.
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

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain dicts, lists, strings and numbers, fit for JSON."""
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
        header, body, aligned = self._cells()
        cells = [_html_row("th", header, aligned)]
        cells += [_html_row("td", line, aligned) for line in body]
        said = "".join(f"<p>{html.escape(line)}</p>" for line in self._sentences())
        return (
            f"<div><p><b>{html.escape(self._headline())}</b></p>"
            f"<table>{''.join(cells)}</table>{said}</div>"
        )

    def _headline(self) -> str:
        total = self.total
        state = (
            f"{self.model}: {_format.parameters(total.parameters)}, "
            f"{_format.count(total.trainable)} trainable, {_format.count(total.frozen)} frozen "
            f"({_format.percent(total.frozen, total.parameters)})"
        )
        if self.action == "report":
            return _format.fit(state, _WIDTH)
        did = f"{self.action}: {_format.parameters(len(self.matched))} named, "
        did += f"{len(self.changed)} changed"
        for norms, what in ((self.held, "held"), (self.released, "released")):
            if norms:
                did += f", {_format.counted(len(norms), 'norm')} {what}"
        return f"{did}\n{_format.fit(state, _WIDTH)}"

    def _cells(self) -> tuple[list[str], list[list[str]], str]:
        with_momentum = self.total.momentum_bytes is not None
        header = ["module", "state", "parameters", "trainable", "frozen", "bytes", "gradients"]
        header += ["momentum"] * with_momentum + ["norms"]
        aligned = "<<" + ">" * (5 + with_momentum) + "<"
        lines = []
        for row in (*self.rows, self.total):
            label = "  " * row.depth + row.name.rsplit(".", 1)[-1] if row.depth >= 0 else "total"
            line = [label, _state(row), _format.count(row.parameters), _format.count(row.trainable)]
            line += [
                _format.count(row.frozen),
                _format.size(row.bytes),
                _format.size(row.gradient_bytes),
            ]
            if row.momentum_bytes is not None:
                line.append(_format.size(row.momentum_bytes))
            lines.append([*line, row.norm])
        return header, lines, aligned

    def _table_lines(self) -> Iterator[str]:
        header, body, aligned = self._cells()
        widths = [max(len(line[i]) for line in (header, *body)) for i in range(len(header))]
        # The two text columns give way when the table would be wider than a terminal.
        for column, least in ((0, 24), (len(header) - 1, 12)):
            over = sum(widths) + 2 * (len(widths) - 1) - _WIDTH
            if over > 0:
                widths[column] = max(least, widths[column] - over)
        rule = "  ".join("-" * width for width in widths)
        for number, line in enumerate((header, *body)):
            if number in (1, len(body)):
                yield rule
            cells = (
                f"{_format.fit(text, width):{side}{width}}"
                for text, width, side in zip(line, widths, aligned, strict=True)
            )
            yield "  ".join(cells).rstrip()

    def _sentences(self) -> list[str]:
        said = ["backward: " + self.flow.sentence]
        said += [f"tied: {' = '.join(names)} is one tensor" for names in self.tied[:8]]
        if more := len(self.tied[8:]):
            said.append(
                f"tied: {_format.counted(more, 'more tensor')} {'have' if more > 1 else 'has'} "
                "several names"
            )
        said += [f"note: {note}" for note in self.notes]
        return [part for line in said for part in _format.wrap(line, _TEXT_WIDTH, _WIDTH)]


def report(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
    *,
    depth: int | None = None,
    example: Any = None,
) -> FreezeReport:
    """Tell what is frozen, what it costs in bytes, and whether backward stops early.

    Args:
        model: any module; DDP-wrapped and compiled ones are reported under their own names.
        optimizer: fills the momentum column with the bytes of every tensor it keeps (any
            torch.optim.Optimizer, or several).
        depth: how many levels of modules to list; 0 gives the total alone. None opens those
            modules alone whose parameters are partly frozen.
        example: inputs of the model (a tensor, a tuple of arguments or a dict of keyword
            arguments). With them forward passes are run, as the model is and with everything
            trainable, and autograd itself tells through which frozen parameters backward runs and
            why (an input or activation that requires grad counts), and FLOPs weigh the work that
            is saved. Without them both are estimated, from the order of registration and the
            number of parameters. The passes leave the model's parameters and their flags, its
            statistics, its gradients and the random state as they were.

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
        raise ValueError(f"report: {depth=} is negative; 0 gives the total alone.")
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
    """The report of an already walked model; `call` fills the fields of a freeze call."""
    sums = _sum_up(tree, optimizers)
    total = _row(tree.root, "", -1, sums[id(tree.root)], optimizers is not None)
    rows = list(_rows(tree, sums, depth, optimizers is not None))
    entries = list(tree.params.values())
    flow = estimate_flow(entries) if example is None else measure_flow(tree, example)
    return FreezeReport(
        model=type(tree.root.module).__name__,
        total=total,
        rows=tuple(rows),
        trainable_names=tuple(e.name for e in entries if e.parameter.requires_grad),
        frozen_names=tuple(e.name for e in entries if not e.parameter.requires_grad),
        tied=tuple(tuple(e.names) for e in entries if e.aliases),
        flow=flow,
        **{"notes": _notes(entries), **call},
    )


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
    momentum_bytes: int = 0
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
        self.momentum_bytes += other.momentum_bytes
        self.norms_held += other.norms_held
        self.norms_train += other.norms_train
        self.norms_eval += other.norms_eval
        self.tensors += other.tensors
        self.trainable_tensors += other.trainable_tensors


def _sum_up(tree: Tree, optimizers: list[torch.optim.Optimizer] | None) -> dict[int, _Sum]:
    """Sums over each module's subtree, in one pass over all modules."""
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
            numel = p.numel()
            own.parameters += numel
            own.bytes += numel * p.element_size()
            if trains:
                own.trainable += numel
            if (grad := p.grad) is not None:
                own.gradient_bytes += tensor_bytes(grad)
            if optimizers:
                own.momentum_bytes += sum(state_bytes(o, p) for o in optimizers)
        if is_norm(entry.module):
            if held_by(entry.module) is not None:
                own.norms_held += 1
            elif entry.module.training:
                own.norms_train += 1
            else:
                own.norms_eval += 1
    # Parents come before what they hold; a shared module counts where it is first registered.
    for entry in reversed(tree.order):
        if entry.parent >= 0:
            sums[id(tree.order[entry.parent])].add(sums[id(entry)])
    return sums


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes a tensor's values take, of a sparse or expanded one those it stores."""
    if tensor.layout is torch.sparse_coo:
        return sum(t.numel() * t.element_size() for t in (tensor._indices(), tensor._values()))
    size = tensor.numel() * tensor.element_size()
    if tensor.layout is torch.strided and 0 in tensor.stride():
        # What stands for a gradient that was applied in backward is one element, expanded.
        return min(size, tensor.untyped_storage().nbytes())
    return size


def state_bytes(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> int:
    """Bytes of all tensors an optimizer keeps for a parameter."""
    # state is a defaultdict: get() does not make an entry where [] would.
    state = optimizer.state.get(parameter)
    if not isinstance(state, Mapping):
        return 0
    return sum(tensor_bytes(v) for v in state.values() if isinstance(v, torch.Tensor))


def _row(entry: ModuleEntry, name: str, depth: int, sums: _Sum, with_momentum: bool) -> Row:
    return Row(
        name=name,
        kind=type(entry.module).__name__,
        depth=depth,
        parameters=sums.parameters,
        trainable=sums.trainable,
        frozen=sums.parameters - sums.trainable,
        bytes=sums.bytes,
        gradient_bytes=sums.gradient_bytes,
        momentum_bytes=sums.momentum_bytes if with_momentum else None,
        norms_held=sums.norms_held,
        norms_train=sums.norms_train,
        norms_eval=sums.norms_eval,
    )


def _rows(
    tree: Tree, sums: dict[int, _Sum], depth: int | None, with_momentum: bool
) -> Iterator[Row]:
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
        yield _row(entry, entry.name, level, its, with_momentum)
        if id(entry) in shown if shown is not None else depth is None or level + 1 < depth:
            listed[id(entry)] = level + 1


def _open_mixed(tree: Tree, sums: dict[int, _Sum]) -> set[int]:
    """Modules to open so that the rows show where frozen and trainable part, breadth first."""
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


def _html_row(tag: str, cells: list[str], aligned: str) -> str:
    made = []
    for text, side in zip(cells, aligned, strict=True):
        pad = "&nbsp;" * (len(text) - len(text.lstrip(" ")))
        align = "left" if side == "<" else "right"
        made.append(f'<{tag} style="text-align:{align}">{pad}{html.escape(text.strip())}</{tag}>')
    return f"<tr>{''.join(made)}</tr>"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
