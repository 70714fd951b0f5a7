"""How far backward runs: estimated from registration order, or measured with forward passes.

This module computes facts; `report` puts them into words.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.utils.checkpoint
from torch.autograd.function import FunctionCtx
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from ._tree import ParamEntry, Tree, is_lazy, unwrap
from .rows import RowFrozenParameter, live_parameters

Kind = Literal["nothing frozen", "everything frozen", "stops early", "runs through", "mixed"]


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor that requires grad, is no parameter, and has parameters behind it."""

    #: Whether it is (a part of) the example.
    in_example: bool
    #: Name of the module whose input it enters.
    into: str


@dataclass(frozen=True, slots=True)
class Reasons:
    """What only a measurement knows: why backward runs where it does."""

    by_flops: bool
    leaf: Leaf | None
    #: Whether some frozen parameters come after a trainable one, and some after `leaf` alone.
    after_trainable: bool
    after_leaf: bool
    #: Whether the output requires grad, so that backward() does not raise.
    runs: bool
    #: Trainable parameters that the example does not use, or uses without giving a gradient.
    unused: tuple[str, ...]
    cut_off: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """How far backward runs and what that saves; `report` puts it into words."""

    kind: Kind
    all_frozen: bool
    #: Name of the first trainable parameter.
    first_trainable: str | None
    #: Elements of frozen parameters that backward does not reach, and of those it runs through.
    skipped: int
    crossed: int
    #: Shares (0 to 1) of the work of backward.
    weight_gradient_saved: float
    backward_saved: float
    #: None for an estimate.
    reasons: Reasons | None


class _Tally:
    """Sums, over all parameters, of what their gradients cost and what freezing saves of that."""

    def __init__(self) -> None:
        self.count = self.count_frozen = 0
        self.some_crossed = self.some_skipped = False
        self.crossed = self.skipped = 0
        #: Work of weight gradients and of input gradients, now and with everything trainable.
        self.weights_now = self.inputs_now = self.weights_all = self.inputs_all = 0.0

    def add(self, entry: ParamEntry, reached: bool, if_all_train: bool) -> None:
        """Add a parameter; `reached`: the gradient of its input is computed."""
        numel = entry.numel
        self.count += 1
        self.weights_all += numel
        if reached:
            self.inputs_now += numel
        if if_all_train:
            self.inputs_all += numel
        if entry.parameter.requires_grad:
            self.weights_now += numel
            return
        self.count_frozen += 1
        if reached:
            self.crossed += numel
            self.some_crossed = True
        else:
            self.skipped += numel
            self.some_skipped = self.some_skipped or numel > 0


def estimate_flow(entries: list[ParamEntry]) -> Facts:
    """Estimate from the order of registration, which most models (not all) use parameters in."""
    first = next((entry for entry in entries if entry.parameter.requires_grad), None)
    first_name = first.name if first is not None else None
    start = first.first_place if first is not None else len(entries)
    first_owner = _owner(first_name or "")
    model_first = _owner(entries[0].name) if entries else ""
    tally = _Tally()
    for entry in entries:
        # A tied parameter is used at each of its names, so its last place counts. The weight and
        # bias of one module share its input, so neither comes after the other.
        owner = _owner(entry.aliases[-1] if entry.aliases else entry.name)
        reached = first is not None and entry.last_place > start and owner != first_owner
        tally.add(entry, reached, owner != model_first)
    return _facts(tally, first_name, None)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def measure_flow(tree: Tree, example: Any) -> Facts:
    """Measure with forward passes over `example`: one of the model as it is, one all trainable."""
    entries = {id(e.parameter): e for e in tree.params.values()}
    tables = live_parameters(tree)
    watch = everything = _Watch(entries, tables)
    with left_as_they_were(tree):
        output = _forward(tree, example, watch)
        # Freezing saves the difference to the same pass with everything trainable. Only autograd
        # knows what is tracked in that pass: an input or activation may be, whatever is frozen.
        if any(not entry.parameter.requires_grad for entry in entries.values()):
            everything = _Watch(entries, tables)
            with _all_trainable(entries.values()):
                _forward(tree, example, everything)
    tally = _Tally()
    for key, entry in entries.items():
        tally.add(entry, key in watch.reached, key in everything.reached)
    by_flops = everything.weight_work + everything.input_work > 0
    if by_flops:
        tally.weights_now, tally.inputs_now = watch.weight_work, watch.input_work
        tally.weights_all, tally.inputs_all = everything.weight_work, everything.input_work
    trainable = {key: entry for key, entry in entries.items() if entry.parameter.requires_grad}
    given = _gradients_given(output, watch)
    reasons = Reasons(
        by_flops=by_flops,
        leaf=watch.leaf(example),
        after_trainable=any(
            trains for key, (trains, _) in watch.reached.items() if key not in trainable
        ),
        after_leaf=any(
            leaf and not trains
            for key, (trains, leaf) in watch.reached.items()
            if key not in trainable
        ),
        runs=_tracked(output),
        unused=tuple(entry.name for key, entry in trainable.items() if key not in watch.used),
        cut_off=tuple(
            entry.name
            for key, entry in trainable.items()
            if key in watch.used and given is not None and key not in given
        ),
    )
    first = next((entry.name for entry in watch.order if id(entry.parameter) in trainable), None)
    return _facts(tally, first, reasons)


def _forward(tree: Tree, example: Any, watch: _Watch) -> Any:
    """The model's output for `example`; `watch` sees every operation of the pass."""
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
    # The pass writes statistics into copies, so it does not change norms in train mode.
    buffers = {name: b.clone() for name, b in model.named_buffers() if not is_lazy(b)}
    # autocast caches casts of trainable parameters. Casts from another pass would hide operations.
    torch.clear_autocast_cache()
    try:
        with (
            torch.random.fork_rng([d.index for d in devices]),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
            checkpoints_run_at_once(),
            no_fast_attention(),
            watch,
        ):
            return functional_call(model, buffers, args, kwargs)
    finally:
        torch.clear_autocast_cache()


@contextmanager
def no_fast_attention() -> Iterator[None]:
    """Without the kernels of nn.MultiheadAttention for inference, whose FLOPs nobody counts."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def checkpoints_run_at_once() -> Iterator[None]:
    """Run reentrant checkpoints, which hide their operations, as their backward would."""

    class AtOnce:
        @staticmethod
        def apply(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
            with torch.set_grad_enabled(torch.is_grad_enabled() and _tracked(args)):
                return function(*args)

    module: Any = torch.utils.checkpoint
    original = module.CheckpointFunction
    module.CheckpointFunction = AtOnce
    try:
        yield
    finally:
        module.CheckpointFunction = original


@contextmanager
def left_as_they_were(tree: Tree) -> Iterator[None]:
    """Restore tensors kept as plain attributes, as the older weight_norm keeps the weight."""
    kept = [
        (entry.module.__dict__, key, value)
        for entry in tree.order
        for key, value in entry.module.__dict__.items()
        if isinstance(value, torch.Tensor)
    ]
    try:
        yield
    finally:
        for attributes, key, value in kept:
            attributes[key] = value


@contextmanager
def _all_trainable(entries: Iterable[ParamEntry]) -> Iterator[None]:
    """Set requires_grad on every parameter that can train, inside the block only."""
    flipped = []
    try:
        for entry in entries:
            p = entry.parameter
            if p.requires_grad or is_lazy(p) or p.is_inference():
                continue
            if p.is_floating_point() or p.is_complex():
                # Also of a table of which some rows are frozen, which refuses it.
                with torch._C.DisableTorchFunctionSubclass():
                    p.requires_grad_(True)
                flipped.append(p)
        yield
    finally:
        for p in flipped:
            p.requires_grad_(False)


def _tracked(values: Any) -> bool:
    return any(isinstance(v, torch.Tensor) and v.requires_grad for v in tree_iter(values))


def _gradients_given(output: Any, watch: _Watch) -> set[int] | None:
    """Trainable parameters that a backward from `output` reaches; None if it has no tensor."""
    tensors = [value for value in tree_iter(output) if isinstance(value, torch.Tensor)]
    if not tensors:
        return None
    given: set[int] = set()
    stack = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen: set[Any] = set(stack)
    for tensor in tensors:
        given |= watch.source(tensor)
    while stack:
        node = stack.pop()
        if (variable := _accumulates(node)) is not None:
            given |= watch.source(variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return given


def _accumulates(node: Any) -> torch.Tensor | None:
    """The leaf whose gradient a graph node accumulates; None for any other node."""
    return node.variable if type(node).__name__ == "AccumulateGrad" else None


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call,unused-ignore]
    """Records, for every operation of a forward pass, which parameters it uses on what input.

    It works on operations, not on modules: attention uses its projections' weights without calling
    the projection modules, and tied weights are used outside the module that owns them.
    """

    def __init__(
        self, entries: dict[int, ParamEntry], tables: dict[int, RowFrozenParameter]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self.entries = entries
        self.tables = tables
        self.order: list[ParamEntry] = []
        self.used: set[int] = set()
        #: Parameters whose input takes a gradient, and whether that gradient leads on to a
        #: trainable parameter and to another leaf.
        self.reached: dict[int, tuple[bool, bool]] = {}
        #: FLOPs of backward, for the gradients of weights and for all others.
        self.weight_work = self.input_work = 0.0
        self._enters: str | None = None
        self._leaves: list[torch.Tensor] = []
        self._leads: dict[Any, tuple[bool, bool]] = {}
        # Views and casts of a parameter count as the parameter. They are recognized by their
        # storage and, if parameters share it (a flattened LSTM), by the bytes they cover.
        # References to them keep their addresses from being reused.
        self._sources: dict[int, list[tuple[int, int, frozenset[int]]]] = {}
        self._kept: list[torch.Tensor] = []
        for key, entry in entries.items():
            if not is_lazy(entry.parameter):
                self._mark(entry.parameter, frozenset([key]))

    def _mark(self, tensor: torch.Tensor, source: frozenset[int]) -> None:
        self._sources.setdefault(_storage(tensor), []).append((*_span(tensor), source))
        self._kept.append(tensor)

    def source(self, tensor: torch.Tensor) -> frozenset[int]:
        """The parameters that a tensor is a view or a cast of; empty for an activation."""
        known = self._sources.get(_storage(tensor), ())
        if len(known) < 2:
            return known[0][2] if known else frozenset()
        start, end = _span(tensor)
        return frozenset().union(*(keys for a, b, keys in known if a < end and start < b))

    def leaf(self, example: Any) -> Leaf | None:
        """What takes a gradient and is no parameter."""
        if not self._leaves:
            return None
        given = {id(value) for value in tree_iter(example) if isinstance(value, torch.Tensor)}
        in_example = any(id(leaf) in given for leaf in self._leaves)
        return Leaf(in_example, self._enters or "")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        from_params: set[int] = set()
        others: list[torch.Tensor] = []
        for value in tree_iter((args, kwargs)):
            if isinstance(value, torch.Tensor):
                source = self.source(value)
                from_params |= source
                if not source:
                    others.append(value)
        if from_params and not others:
            for value in tree_iter(out):
                if isinstance(value, torch.Tensor):
                    self._mark(value, frozenset(from_params))
            return out
        # Autograd runs before this mode, so the inputs still show whether they are tracked.
        recorded = torch.is_grad_enabled() or _inside_a_function()
        if recorded:
            self._count(func, args, kwargs, out)
        if not from_params:
            return out
        tracked = [value for value in others if value.requires_grad] if recorded else []
        leads = [self._leads_to(value) for value in tracked]
        trains, leaf = any(t for t, _ in leads), any(other for _, other in leads)
        for key in sorted(from_params, key=lambda key: self.entries[key].first_place):
            if key not in self.used:
                self.used.add(key)
                self.order.append(self.entries[key])
            if tracked:
                before = self.reached.get(key, (False, False))
                self.reached[key] = (before[0] or trains, before[1] or leaf)
                if leaf and self._enters is None:
                    name = self.entries[key].name
                    self._enters = _owner(name) or name
        return out

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: Any, out: Any) -> None:
        """Add the FLOPs of the operation's backward."""
        name = getattr(getattr(func, "_overloadpacket", None), "__name__", "")
        if name in _RECURRENT:
            tensors = [v for v in tree_iter((args, kwargs)) if isinstance(v, torch.Tensor)]
            steps = args[0].numel() / args[0].shape[-1]
            for value in tensors:
                # Every weight is applied once to every element of the sequence.
                if value.dim() > 1 and self.source(value):
                    flops = 2.0 * steps * value.numel()
                    self.weight_work += flops * value.requires_grad
                    self.input_work += flops * args[0].requires_grad
            return
        count = flop_formula(func)
        if count is None:
            return
        flops = float(count(*args, **kwargs, out_val=out))
        if "attention" in name:
            # Its backward is one operation with five products, where forward has two.
            self.input_work += 2.5 * flops * _tracked(args[:3])
            return
        # The gradient of each factor of a product costs as much as the product.
        first = 1 if name in ("addmm", "baddbmm") else 0
        factors = args[first : first + 2]
        # A projection with frozen rows multiplies by the live rows apart only while it is watched.
        # Otherwise the gradient of the input comes from the product with the table alone, and so
        # does that of the live rows where the whole table trains.
        rows = [self.tables[k] for f in factors for k in self.source(f) if k in self.tables]
        for factor in factors:
            if not factor.requires_grad:
                continue
            if self.source(factor):
                if not (rows and rows[0].requires_grad):
                    self.weight_work += flops
            elif not rows:
                self.input_work += flops

    def _leads_to(self, tensor: torch.Tensor) -> tuple[bool, bool]:
        """Whether the gradient of `tensor` leads to a trainable parameter and to another leaf."""
        if tensor.grad_fn is None:
            self._add_leaf(tensor)
            return False, True
        leads = self._leads
        stack: list[Any] = [tensor.grad_fn]
        while stack:
            node = stack[-1]
            following = [n for n, _ in node.next_functions if n is not None]
            if waiting := [n for n in following if n not in leads]:
                stack += waiting
                continue
            stack.pop()
            if (variable := _accumulates(node)) is None:
                leads[node] = (
                    any(leads[n][0] for n in following),
                    any(leads[n][1] for n in following),
                )
            elif self.source(variable):
                leads[node] = (True, False)
            else:
                self._add_leaf(variable)
                leads[node] = (False, True)
        return leads[tensor.grad_fn]

    def _add_leaf(self, tensor: torch.Tensor) -> None:
        if all(tensor is not known for known in self._leaves):
            self._leaves.append(tensor)


# Operations that are whole recurrent layers. torch has no FLOP formula for them.
_RECURRENT = ("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn")
# Operations without a formula in torch, and the operation to count each as.
_COUNTED_AS = {
    "_scaled_dot_product_flash_attention_for_cpu": (
        torch.ops.aten._scaled_dot_product_flash_attention
    ),
    "_scaled_dot_product_fused_attention_overrideable": (
        torch.ops.aten._scaled_dot_product_flash_attention
    ),
}


def flop_formula(func: Any) -> Any:
    """What counts the FLOPs of an operation from its arguments; None if nothing does."""
    packet = getattr(func, "_overloadpacket", None)
    counted_as = _COUNTED_AS.get(getattr(packet, "__name__", ""))
    return flop_registry.get(packet) or flop_registry.get(counted_as)


def _inside_a_function() -> bool:
    """Whether an autograd.Function's forward runs, which is recorded though grad mode is off."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        code = frame.f_code
        if code.co_name != "forward" or not code.co_argcount:
            continue
        if isinstance(frame.f_locals.get(code.co_varnames[0]), FunctionCtx):
            return True
    return False


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last byte that a tensor covers; every byte if it has no plain memory."""
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


def _facts(tally: _Tally, first: str | None, reasons: Reasons | None) -> Facts:
    everything = tally.weights_all + tally.inputs_all
    all_frozen = 0 < tally.count == tally.count_frozen
    weight_saved = float(all_frozen)
    if tally.weights_all:
        weight_saved = 1 - tally.weights_now / tally.weights_all
    backward_saved = weight_saved
    if everything:
        backward_saved = max(0.0, 1 - (tally.weights_now + tally.inputs_now) / everything)
    kind: Kind
    if not tally.count_frozen:
        kind = "nothing frozen"
    elif all_frozen and not tally.some_crossed and not (reasons and reasons.runs):
        kind, weight_saved, backward_saved = "everything frozen", 1.0, 1.0
    elif not tally.some_crossed:
        kind = "stops early"
    else:
        kind = "mixed" if tally.some_skipped else "runs through"
    return Facts(
        kind=kind,
        all_frozen=all_frozen,
        first_trainable=first,
        skipped=tally.skipped,
        crossed=tally.crossed,
        weight_gradient_saved=weight_saved,
        backward_saved=backward_saved,
        reasons=reasons,
    )
