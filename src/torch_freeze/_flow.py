"""How far backward runs: estimated from registration order, or measured by one forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from ._select import ParamEntry, Tree, is_lazy, unwrap

Kind = Literal["nothing frozen", "everything frozen", "stops early", "runs through", "mixed"]


@dataclass(frozen=True, slots=True)
class Flow:
    """Where the freeze sits in the backward pass.

    Freezing a weight always saves its weight gradient. The gradient of its *input* is saved only
    when nothing before it trains: backward then stops. A frozen tail behind trainable layers
    still backpropagates, which is why freezing may give less speed than hoped for.

    Attributes:
        kind: "stops early" (no frozen parameter has backward running through it), "runs through"
            (all have), "mixed", "nothing frozen" or "everything frozen".
        measured: True when an example was run, False for an estimate by registration order.
        stops_early: whether some frozen parameters are never reached by backward.
        first_trainable: name of the first trainable parameter, where backward ends; else None.
        skipped, crossed: elements of frozen parameters that backward does not reach, and of those
            it runs through.
        weight_gradient_saved: share (0 to 1) of the weight-gradient work saved; by FLOPs when
            measured, else by parameter count.
        backward_saved: share (0 to 1) of weight-gradient and input-gradient work together, taking
            a layer's two as equally dear, which they are for matrices and convolutions.
        sentence: the same in words.
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


class _Tally:
    """Sums over all parameters of what their gradients cost and what freezing saves of it."""

    def __init__(self) -> None:
        self.count = self.count_frozen = 0
        self.some_crossed = self.some_skipped = False
        self.crossed = self.skipped = 0
        self.work = self.saved = self.input_work = self.input_work_if_all_train = 0.0

    def add(self, entry: ParamEntry, work: float, reached: bool, if_all_train: bool) -> None:
        """Add a parameter; `reached`: the gradient of its input is computed."""
        numel = numel_of(entry)
        self.count += 1
        self.work += work
        if reached:
            self.input_work += work
        if if_all_train:
            self.input_work_if_all_train += work
        if entry.parameter.requires_grad:
            return
        self.count_frozen += 1
        self.saved += work
        if reached:
            self.crossed += numel
            self.some_crossed = True
        else:
            self.skipped += numel
            self.some_skipped = self.some_skipped or numel > 0


def estimate_flow(entries: list[ParamEntry]) -> Flow:
    """Flow by the order of registration, which is the order of use in most models, not in all."""
    first = next((entry for entry in entries if entry.parameter.requires_grad), None)
    first_name = first.name if first is not None else None
    start = first.first_place if first is not None else len(entries)
    first_owner = _owner(first_name or "")
    model_first = _owner(entries[0].name) if entries else ""
    tally = _Tally()
    for entry in entries:
        # A tied parameter is used where each of its names stands, so its last place counts.
        # Weight and bias of one module share its input: neither lies behind the other.
        owner = _owner(entry.aliases[-1] if entry.aliases else entry.name)
        reached = first is not None and entry.last_place > start and owner != first_owner
        tally.add(entry, float(numel_of(entry)), reached, owner != model_first)
    return _flow(tally, first_name, measured=False, by_flops=False)


def numel_of(entry: ParamEntry) -> int:
    """Elements of a parameter; 0 while it is lazy."""
    return 0 if is_lazy(entry.parameter) else entry.parameter.numel()


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def measure_flow(tree: Tree, example: Any) -> Flow:
    """Flow as autograd has it, from one forward pass over `example`."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example, Mapping):
        kwargs = dict(example)
    elif isinstance(example, tuple):
        args = example
    else:
        args = (example,)
    model = unwrap(tree.root.module)
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    # Statistics are written into copies, so a norm in train mode is not moved by the pass.
    buffers = {name: b.clone() for name, b in model.named_buffers() if not is_lazy(b)}
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    watch = _Watch({id(e.parameter): e for e in tree.params.values()})
    try:
        with (
            torch.random.fork_rng([d.index for d in devices]),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
            watch,
        ):
            functional_call(model, buffers, args, kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    first = next((e.name for e in watch.order if e.parameter.requires_grad), None)
    by_flops = sum(watch.flops.values()) > 0
    first_key = id(watch.order[0].parameter) if watch.order else None
    tally = _Tally()
    for key, entry in watch.entries.items():
        work = watch.flops.get(key, 0.0) if by_flops else float(numel_of(entry))
        tally.add(entry, work, key in watch.reached, key != first_key)
    unused = [
        e.name
        for key, e in watch.entries.items()
        if e.parameter.requires_grad and key not in watch.used
    ]
    return _flow(tally, first, measured=True, by_flops=by_flops, unused=unused)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call,unused-ignore]
    """Sees every operation of a forward pass: which parameters it uses, on what input.

    Works on operations, not on modules: attention calls its projections' weights without calling
    the projection modules, and tied weights are used away from their owner.
    """

    def __init__(self, entries: dict[int, ParamEntry]) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self.entries = entries
        self.order: list[ParamEntry] = []
        self.used: set[int] = set()
        self.reached: set[int] = set()
        self.flops: dict[int, float] = {}
        # Views and casts of a parameter count as the parameter. They are known by their storage
        # and, where parameters share one (a flattened LSTM), by the bytes of it they cover;
        # keeping a reference to each keeps its address from being used again.
        self._sources: dict[int, list[tuple[int, int, frozenset[int]]]] = {}
        self._kept: list[torch.Tensor] = []
        for key, entry in entries.items():
            if not is_lazy(entry.parameter):
                self._mark(entry.parameter, frozenset([key]))

    def _mark(self, tensor: torch.Tensor, source: frozenset[int]) -> None:
        self._sources.setdefault(_storage(tensor), []).append((*_span(tensor), source))
        self._kept.append(tensor)

    def _source(self, tensor: torch.Tensor) -> frozenset[int]:
        """The parameters a tensor shows or is made of; empty for an activation."""
        known = self._sources.get(_storage(tensor), ())
        if len(known) < 2:
            return known[0][2] if known else frozenset()
        start, end = _span(tensor)
        return frozenset().union(*(keys for a, b, keys in known if a < end and start < b))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        from_params: set[int] = set()
        others: list[torch.Tensor] = []
        for value in tree_iter((args, kwargs)):
            if isinstance(value, torch.Tensor):
                source = self._source(value)
                from_params |= source
                if not source:
                    others.append(value)
        if not from_params:
            return out
        if not others:
            source = frozenset(from_params)
            for value in tree_iter(out):
                if isinstance(value, torch.Tensor):
                    self._mark(value, source)
            return out
        # Autograd works above this mode, so the inputs still say whether they are tracked.
        tracked = any(value.requires_grad for value in others)
        weights = [key for key in from_params if self.entries[key].parameter.dim() > 1]
        for key, flops in zip(weights, _flops(func, args, kwargs, out, weights, self), strict=True):
            self.flops[key] = self.flops.get(key, 0.0) + flops
        for key in sorted(from_params, key=lambda key: self.entries[key].first_place):
            if key not in self.used:
                self.used.add(key)
                self.order.append(self.entries[key])
            if tracked:
                self.reached.add(key)
        return out


# Whole recurrent layers in one operation, for which torch has no formula.
_RECURRENT = ("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn")


def _flops(
    func: Any, args: tuple[Any, ...], kwargs: Any, out: Any, weights: list[int], watch: _Watch
) -> list[float]:
    """FLOPs of an operation, shared out among the weights it uses."""
    packet = getattr(func, "_overloadpacket", None)
    count = flop_registry.get(packet)
    if count is not None:
        share = float(count(*args, **kwargs, out_val=out)) / max(len(weights), 1)
        return [share] * len(weights)
    if getattr(packet, "__name__", "") in _RECURRENT:
        # Every weight is applied once to every element of the sequence.
        steps = args[0].numel() / args[0].shape[-1]
        return [2.0 * steps * watch.entries[key].parameter.numel() for key in weights]
    return [0.0] * len(weights)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last byte a tensor covers; all of them where it has no plain memory."""
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return 0, 2**63
    size = tensor.element_size()
    start = int(tensor.storage_offset()) * size
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (int(last) + 1) * size


def _storage(tensor: torch.Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        # Sparse tensors and some subclasses have no storage of their own.
        return -id(tensor)


def _flow(
    tally: _Tally,
    first: str | None,
    *,
    measured: bool,
    by_flops: bool,
    unused: list[str] | None = None,
) -> Flow:
    work, saved = tally.work, tally.saved
    all_frozen = 0 < tally.count == tally.count_frozen
    everything = work + tally.input_work_if_all_train
    now = work - saved + tally.input_work
    weight_saved = saved / work if work else float(all_frozen)
    backward_saved = max(0.0, 1 - now / everything) if everything else weight_saved
    kind: Kind
    if not tally.count_frozen:
        kind = "nothing frozen"
        said = "runs through the whole model: nothing is frozen."
    elif all_frozen:
        kind, weight_saved, backward_saved = "everything frozen", 1.0, 1.0
        said = "does not run: everything is frozen, and backward() on the loss raises."
    else:
        total = f"{tally.crossed + tally.skipped:,}"
        if not tally.some_crossed:
            kind = "stops early"
            said = f"stops early: all {total} frozen parameters come before the first trainable one"
            said += f" ({first})." if first else "."
        elif tally.some_skipped:
            kind = "mixed"
            said = (
                f"stops early for {tally.skipped:,} of {total} frozen parameters; it still runs "
                f"through the other {tally.crossed:,}, which come after {first}: there the input "
                "gradients are computed all the same."
            )
        else:
            kind = "runs through"
            said = (
                f"does not stop early: all {total} frozen parameters come after a trainable one "
                f"({first}), so it runs through them and computes their input gradients."
            )
        said += (
            f" Weight-gradient work saved: {100 * weight_saved:.1f} %; backward work of these "
            f"layers saved: {100 * backward_saved:.1f} %."
        )
        if not measured:
            said += (
                " (Estimated from the order of registration and parameter counts; "
                "give example=... to measure.)"
            )
        elif by_flops:
            said += " (Measured on the example, by FLOPs of matrix products and convolutions.)"
        else:
            said += " (Measured on the example, by parameter counts: it has no matrix product.)"
    if unused:
        said += (
            f" The example uses {len(unused)} trainable parameters nowhere, such as {unused[0]}."
        )
    return Flow(
        kind=kind,
        measured=measured,
        stops_early=kind in ("stops early", "mixed", "everything frozen"),
        first_trainable=first,
        skipped=tally.skipped,
        crossed=tally.crossed,
        weight_gradient_saved=weight_saved,
        backward_saved=backward_saved,
        sentence=said,
    )
