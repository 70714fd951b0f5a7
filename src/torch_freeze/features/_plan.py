"""Where a forward pass can begin from stored features: found by running it, and checked.

One pass over a few samples finds, operation by operation, what depends on a trainable parameter.
The outermost module calls that do not are skipped later. Of what they return, what meets a
trainable parameter outside of them is stored; the rest is never needed. If the model computes
something smaller of it before it calls the module that trains, the input of that module is stored
instead (the pooled features, the first token). Further passes make sure
that the features of a sample depend on nothing but the sample, and that the model's output from
stored features is its output.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import (
    TreeSpec,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_iter,
    tree_map,
    tree_unflatten,
)

from torch_freeze import _format
from torch_freeze._flow import _storage, flop_formula, no_fast_attention
from torch_freeze._hold import is_norm
from torch_freeze._tree import Tree, is_lazy
from torch_freeze.rows import live_of, live_parameters

from ._calls import taken_over
from ._sharded import has_shards, why_refused
from ._stand_in import StandIn, StandInError

#: Arguments of the model, by position and by name.
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor that is stored for every sample, without the dimension `dim` of the batch."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    dim: int

    @property
    def nbytes(self) -> int:
        """Bytes of a sample in this dtype."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True, slots=True)
class Leaf:
    """One value of a structure: that of a slot, a constant, or a stand-in of this shape."""

    slot: int | None = None
    constant: Any = None
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    dim: int | None = None

    def fits(self, value: Any) -> bool:
        """Whether a value of a later batch may be made like this; slots are checked when stored."""
        if self.slot is not None:
            return True
        if self.shape is None and isinstance(self.constant, torch.Tensor):
            constant = self.constant.to(value.device) if isinstance(value, torch.Tensor) else None
            return constant is not None and torch.equal(value, constant)
        if self.shape is None:
            return _same_constant(self.constant, value)
        shape = list(value.shape) if isinstance(value, torch.Tensor) else []
        if self.dim is not None and len(shape) > self.dim:
            del shape[self.dim]
        return tuple(shape) == self.shape


def _same_constant(a: Any, b: Any) -> bool:
    plain = (bool, int, float, complex, str, bytes, type(None))
    return type(a) is type(b) and (not isinstance(a, plain) or bool(a == b))


#: The arguments of a call with nothing but one tensor, by position, which most modules take.
_ONE_TENSOR = tree_flatten(((0,), {}))[1]


def _shared(spec: TreeSpec) -> TreeSpec:
    """The same, to be compared with `is` if it is that of one tensor."""
    return _ONE_TENSOR if spec == _ONE_TENSOR else spec


@dataclass(frozen=True, slots=True)
class Structure:
    """How to make what a module returned, or the arguments of the model, from the slots."""

    spec: TreeSpec
    leaves: tuple[Leaf, ...]
    #: By count and device, what nothing can change and no slot is in.
    made: dict[tuple[int, torch.device], Any] = field(default_factory=dict, compare=False)

    def build(self, slots: Sequence[Any], count: int, device: torch.device) -> Any:
        """The structure for `count` samples."""
        if (made := self.made.get((count, device))) is not None:
            return made
        values = [self._value(leaf, slots, count, device) for leaf in self.leaves]
        if self.spec is _ONE_TENSOR:
            return (values[0],), {}
        one = self.spec.num_nodes == 1
        built = values[0] if one else tree_unflatten(values, self.spec)
        if one and type(built) is StandIn:
            self.made[count, device] = built
        return built

    def _value(self, leaf: Leaf, slots: Sequence[Any], count: int, device: torch.device) -> Any:
        if leaf.slot is not None:
            return slots[leaf.slot]
        if leaf.shape is None and isinstance(leaf.constant, torch.Tensor):
            return leaf.constant.to(device, copy=True)  # what follows may write into it
        if leaf.shape is None:
            return leaf.constant
        shape = leaf.shape
        if leaf.dim is not None:
            shape = (*shape[: leaf.dim], count, *shape[leaf.dim :])
        return _stand_in(shape, leaf.dtype, device)


@functools.lru_cache(maxsize=4096)
def _stand_in(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> StandIn:
    """One for all calls, as there is nothing in it to change."""
    return StandIn.make(shape, dtype, device)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A call of a module that a pass from stored features leaves out."""

    module: nn.Module
    name: str
    ordinal: int
    returns: Structure


@dataclass(frozen=True, slots=True)
class Given:
    """A call of a module that trains, and those of its arguments that come from the store."""

    module: nn.Module
    name: str
    ordinal: int
    spec: TreeSpec
    leaves: tuple[tuple[int, Leaf], ...]

    def put(self, args: Any, kwargs: Any, slots: Sequence[Any], device: torch.device) -> Any:
        """The arguments with the stored ones in place."""
        (_, leaf), *_ = self.leaves
        alone = self.spec is _ONE_TENSOR and len(args) == 1 and not kwargs
        if alone and leaf.slot is not None and isinstance(args[0], torch.Tensor):
            return (slots[leaf.slot],), kwargs
        values, spec = tree_flatten((args, kwargs))
        if spec != self.spec:
            raise RuntimeError(
                f"FeatureCache: {self.name} was called with other arguments than in the pass over "
                "the first samples. Choose an earlier boundary with at=...."
            )
        for at, leaf in self.leaves:
            values[at] = (
                leaf.constant.to(device, copy=True) if leaf.slot is None else slots[leaf.slot]
            )
        return tree_unflatten(values, spec)


@dataclass(slots=True)
class Plan:
    """What is stored and what is skipped.

    Attributes:
        calls: the skipped calls, by module `id` and which of its calls it is.
        slots: what is stored; first of the targets, then of the inputs, then of the calls.
        tensors: parameters and buffers that the stored tensors depend on, by name.
        modules: every module below a skipped call or between such calls.
        example: the slots of the first samples.
        share: share (0 to 1) of the forward pass's FLOPs that is skipped.
    """

    inputs: Structure
    targets: Structure
    calls: dict[tuple[int, int], Skipped]
    slots: tuple[Slot, ...]
    tensors: dict[str, torch.Tensor]
    modules: tuple[nn.Module, ...]
    share: float
    #: Calls to run in eval mode, and their modules.
    in_eval: dict[tuple[int, int], nn.Module] = field(default_factory=dict)
    #: (slot, index among the leaves) of what is stored of a call.
    stored: dict[tuple[int, int], tuple[tuple[int, int], ...]] = field(default_factory=dict)
    #: Calls of modules that train and take something stored.
    given: dict[tuple[int, int], Given] = field(default_factory=dict)
    #: (slot, index among the leaves) of the stored inputs and of the targets.
    of_inputs: tuple[tuple[int, int], ...] = ()
    of_targets: tuple[tuple[int, int], ...] = ()
    example: list[torch.Tensor] = field(default_factory=list)
    #: Modules with a call that is not run as usual in a pass from stored features.
    handled: tuple[nn.Module, ...] = field(init=False)

    def __post_init__(self) -> None:
        modules = [*self._ends, *self.in_eval.values()]
        self.handled = tuple({id(m): m for m in modules}.values())

    @property
    def boundary(self) -> tuple[str, ...]:
        """Names of the modules whose outputs are stored, and "the input of ..."."""
        names = [self.calls[key].name for key in self.stored]
        names += [f"the input of {given.name}" for given in self.given.values()]
        return tuple(dict.fromkeys(names))

    @property
    def of_calls(self) -> set[int]:
        """The slots that hold features, not inputs or targets."""
        slots = {slot for places in self.stored.values() for slot, _ in places}
        taken = [leaf.slot for given in self.given.values() for _, leaf in given.leaves]
        return slots | {slot for slot in taken if slot is not None}

    @property
    def skipped_modules(self) -> list[nn.Module]:
        """The modules with a call that is skipped, each once."""
        return list({id(call.module): call.module for call in self.calls.values()}.values())

    def why_refused(self, tree: Tree) -> str:
        """Why shards forbid this plan; "" if they do not."""
        modules = {entry.name: entry.module for entry in tree.order}
        return why_refused(modules, self.modules, self._ends, self.tensors)

    @property
    def _ends(self) -> list[nn.Module]:
        """The modules with a call that is skipped, or gets something stored."""
        return [*self.skipped_modules, *(given.module for given in self.given.values())]

    def placed(self, slots: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The slots of a batch, as `rows` gives them, with the dimension of the batch in place."""
        return placed(slots, [slot.dim for slot in self.slots])

    def rows(
        self, inputs: Inputs, targets: Any, calls: dict[int, torch.Tensor]
    ) -> list[torch.Tensor]:
        """The slots of a batch, with the batch's dimension first."""
        rows: list[Any] = [calls.get(number) for number in range(len(self.slots))]
        for what, values, first, places in (
            ("inputs", inputs, self.inputs, self.of_inputs),
            ("targets", targets, self.targets, self.of_targets),
        ):
            leaves, spec = tree_flatten(values)
            if spec != first.spec or not all(map(Leaf.fits, first.leaves, leaves)):
                raise ValueError(
                    f"FeatureCache: the {what} of a batch differ from those of the first samples "
                    "in their structure, shape or numbers that are not tensors. Samples must be "
                    "alike: pad text to one length (padding='max_length'), resize images, and let "
                    "collate_fn give tensors whose first dimension is the batch."
                )
            for slot, at in places:
                value = leaves[at]
                value = value if isinstance(value, torch.Tensor) else torch.as_tensor(value)
                rows[slot] = value.movedim(self.slots[slot].dim, 0)
        return rows


def placed(rows: Sequence[torch.Tensor], dims: Sequence[int]) -> list[torch.Tensor]:
    """The first dimension of each tensor, which is the batch's, where `dims` has it.

    Tensors beyond the length of `dims` are left out.
    """
    return [v.movedim(0, dim) if dim else v for v, dim in zip(rows, dims, strict=False)]


class EnoughError(BaseException):
    """Ends a forward pass of which nothing more is needed. No `except Exception` catches it."""


class _Call:
    """A call of a module as the trace sees it."""

    def __init__(self, module: nn.Module, ordinal: int) -> None:
        self.module, self.ordinal = module, ordinal
        #: Whether an operation in it depends on a trainable parameter, and the call whose random
        #: numbers one depends on.
        self.trains = False
        self.drawn: _Call | None = None
        #: Calls inside it that could be skipped.
        self.inside: list[_Call] = []
        #: Where values come from that Python has read in it, to branch on them.
        self.read: frozenset[tuple[int, int]] = frozenset()


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call,unused-ignore]
    """Follows what depends on trainable parameters, and where everything else comes from.

    Tensors are told apart by their storage, so views count as what they show.
    """

    def __init__(self, tree: Tree, inputs: Inputs) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self.tree = tree
        self.stack = [_Call(tree.root.module, -1)]
        #: Storages whose content depends on a trainable parameter (its name, or "" further on), or
        #: on random numbers (the call that drew them).
        self.tainted: dict[int, str | _Call] = {}
        self.owned: dict[int, list[tuple[str, torch.Tensor]]] = {}
        #: Where the content of a storage comes from: (number of a call or -1, index of the leaf).
        self.origins: dict[int, frozenset[tuple[int, int]]] = {}
        #: By number, with the inputs of calls that train (a call and the index of the leaf).
        self.calls: list[_Call] = []
        self.entries: dict[int, tuple[_Call, int]] = {}
        #: Modules that run between skipped calls, such as dropout in eval mode.
        self.between: list[nn.Module] = []
        self._direct: set[int] = set()  # tensors, by `id`, that are the output of a call itself
        self.needed: set[tuple[int, int]] = set()
        self.sizes: dict[tuple[int, int], int] = {}  # in bytes
        self.tensors: dict[str, torch.Tensor] = {}
        #: Calls that draw random numbers which a module with frozen parameters then uses.
        self.blocked: dict[tuple[int, int], _Call] = {}
        #: The trainable parameter that is used first.
        self.first: str | None = None
        self.frozen_flops = self.flops = 0.0
        #: Storages of live rows. A projection multiplies by them apart only while it is watched.
        self.live = {_storage(live_of(table)) for table in live_parameters(tree).values()}
        #: Whether backward runs something of the pass again.
        self.recomputes = False
        self._kept: list[Any] = []  # keeps the addresses of storages from being used again
        for entry in tree.params.values():
            if is_lazy(entry.parameter):
                continue
            key = _storage(entry.parameter)
            self.owned.setdefault(key, []).append((entry.name, entry.parameter))
            if entry.parameter.requires_grad:
                self.tainted[key] = entry.name
        for module in tree.order:
            for name, buffer in module.module._buffers.items():
                if buffer is not None and not is_lazy(buffer):
                    full = f"{module.name}.{name}" if module.name else name
                    self.owned.setdefault(_storage(buffer), []).append((full, buffer))
        for j, leaf in enumerate(tree_flatten(inputs)[0]):
            if isinstance(leaf, torch.Tensor):
                self.origins[_storage(leaf)] = frozenset([(-1, j)])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # Attention may draw too, so what counts is whether the operation did.
        may_draw = torch.Tag.nondeterministic_seeded in func.tags
        state = _random_state() if may_draw else []
        out = func(*args, **kwargs)
        draws = may_draw and not all(map(torch.equal, state, _random_state()))
        used = [_storage(t) for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_iter(out) if isinstance(t, torch.Tensor)]
        self._kept.append(made)
        results = {_storage(t) for t in made} | set(_written(func, args))
        self._taint_unknown((args, kwargs))
        flops = flop_formula(func) if self.live.isdisjoint(used) else None
        work = float(flops(*args, **kwargs, out_val=out)) if flops is not None else 0.0
        self.flops += work
        taints = [self.tainted[key] for key in used if key in self.tainted]
        if not taints and draws:
            taints = [self.stack[-1]]
        if taints:
            names = [taint for taint in taints if isinstance(taint, str)]
            self.first = self.first or next(filter(None, names), None)
            self._mark(self.stack[-1], "" if names else taints[0])
            for key in used:
                if key not in self.tainted:
                    self.needed |= self.origins.get(key, frozenset())
            for key in results:
                self.tainted.setdefault(key, "" if names else taints[0])
            return out
        self.frozen_flops += work
        sources = frozenset().union(*(self.origins.get(key, frozenset()) for key in used))
        if not results or not all(key in self.owned for key in results):  # not a count of batches
            for key in used:
                for name, tensor in self.owned.get(key, ()):
                    self.tensors[name] = tensor
        if not results:  # as of item() and bool(), which masks of attention are made with
            self.stack[-1].read |= sources
        for key in results:
            if key not in self.owned:
                self.origins[key] = sources | (
                    self.origins.get(key, frozenset()) if key in used else frozenset()
                )
        return out

    def _taint_unknown(self, arguments: Any) -> None:
        """Mark parameters that the tree does not have, such as those that FSDP has gathered."""
        for t in tree_iter(arguments):
            if isinstance(t, nn.Parameter) and t.requires_grad:
                key = _storage(t)
                if key not in self.tainted:
                    names = {id(p): name for name, p in self.tree.root.module.named_parameters()}
                    self.tainted[key] = names.get(id(t), "a parameter of no module")
                    self._kept.append(t)

    @staticmethod
    def _mark(call: _Call, taint: str | _Call) -> None:
        if isinstance(taint, str):
            call.trains = True
        elif call.drawn is None:
            call.drawn = taint

    def call(
        self, at: set[int], module: nn.Module, ordinal: int, args: Any, kwargs: Any, usual: Any
    ) -> Any:
        """Run a call of a module, and see whether it can be skipped."""
        call = _Call(module, ordinal)
        entered: dict[int, frozenset[tuple[int, int]]] = {}
        if _may_be_recomputed():  # with the arguments of the region around it
            self.recomputes = True
        else:
            args, kwargs, entered = self._enter(call, args, kwargs)
        self.stack.append(call)
        state = _python_random_state()
        try:
            out = usual(*args, **kwargs)
        finally:
            self.stack.pop()
        if not call.trains and call.drawn is None and _python_random_state() != state:
            call.drawn = call  # which LayerDrop does, say
        around = self.stack[-1]
        if call.trains:
            around.trains = True
        elif call.drawn is not None:
            self._mark(around, call.drawn)
            if any(True for _ in module.parameters()):
                self.blocked[id(call.drawn.module), call.drawn.ordinal] = call.drawn
        if entered and not call.trains and call.drawn is None:
            self._leave(call, entered)
        if not self._can_be_skipped(call, args, kwargs, out):
            around.inside += call.inside
            around.read |= call.read
            if not call.trains and call.drawn is None:
                self.between.append(module)
            return out
        number = len(self.calls)
        self.calls.append(call)
        around.inside.append(call)
        given = {id(t) for t in tree_iter((args, kwargs))}
        for j, leaf in enumerate(tree_flatten(out)[0]):
            if isinstance(leaf, torch.Tensor):
                key = _storage(leaf)
                before = self.origins.get(key, frozenset()) if id(leaf) in given else frozenset()
                self.origins[key] = before | {(number, j)}
                self.sizes[number, j] = leaf.nbytes
                self._direct.add(id(leaf))
                self._kept.append(leaf)
                if id(module) in at:
                    self.needed.add((number, j))
                    self.tainted[key] = ""
        return out

    def _enter(self, call: _Call, args: Any, kwargs: Any) -> Any:
        """Follow arguments that were computed of skipped calls, and are no larger, by themselves.

        They are copied, because a view has the storage of what it shows.
        """
        leaves, spec = tree_flatten((args, kwargs))
        entered: dict[int, frozenset[tuple[int, int]]] = {}
        for j, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor) or id(leaf) in self._direct:
                continue
            sources = self.origins.get(_storage(leaf), frozenset())
            size = sum(self.sizes.get(source, 0) for source in sources)
            if _storage(leaf) in self.tainted or not 0 < leaf.nbytes <= size:
                continue
            leaves[j] = leaf.clone()
            number = len(self.calls)
            self.calls.append(call)
            self.entries[number] = call, j
            self.sizes[number, 0] = leaf.nbytes
            self.origins[_storage(leaves[j])] = frozenset([(number, 0)])
            self._direct.add(id(leaves[j]))
            self._kept.append(leaves[j])
            entered[number] = sources
        if entered:
            args, kwargs = tree_unflatten(leaves, spec)
        return args, kwargs, entered

    def _leave(self, call: _Call, entered: dict[int, frozenset[tuple[int, int]]]) -> None:
        """What was computed of a call's arguments comes from where these came from."""

        def back(origins: frozenset[tuple[int, int]]) -> frozenset[tuple[int, int]]:
            return frozenset().union(
                *(entered.get(number, frozenset([(number, j)])) for number, j in origins)
            )

        call.read = back(call.read)
        for key, origins in self.origins.items():
            if any(number in entered for number, _ in origins):
                self.origins[key] = back(origins)

    def _can_be_skipped(self, call: _Call, args: Any, kwargs: Any, out: Any) -> bool:
        tensors = [t for t in tree_iter(out) if isinstance(t, torch.Tensor)]
        given = {id(t) for t in tree_iter((args, kwargs))}
        if (
            call.trains
            or call.drawn is not None
            or any(_storage(t) in self.tainted for t in tensors)
        ):
            return False
        if all(id(t) in given for t in tensors):  # nothing new, as of Identity
            return False
        if any(True for _ in call.module.parameters()):
            return True
        # Without parameters, only what follows a skipped call is worth it: positions and masks,
        # made of the inputs, are made again.
        return any(n >= 0 for t in tensors for n, _ in self.origins.get(_storage(t), ()))


def _may_be_recomputed() -> bool:
    """Whether this runs in a region that is checkpointed, in either of torch's ways."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None or not torch.is_grad_enabled()


def _random_state() -> list[torch.Tensor]:
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *on_gpu]


def _python_random_state() -> tuple[Any, ...]:
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return random.getstate()
    _, numbers, place, *_ = numpy.random.get_state()
    return (random.getstate(), numbers.tobytes(), place)


def _written(func: Any, args: tuple[Any, ...]) -> Iterator[int]:
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            for tensor in tree_iter(value):
                if isinstance(tensor, torch.Tensor):
                    yield _storage(tensor)


def make_plan(
    tree: Tree,
    run: Callable[[Inputs], Any],
    batches: Sequence[tuple[Inputs, Any]],
    pairs: Sequence[tuple[int, int]],
    at: nn.Module | None = None,
    eval_frozen: bool = False,
) -> Plan:
    """Find what can be skipped, and make sure that skipping changes nothing.

    Args:
        tree: the model's.
        run: calls the model.
        batches: inputs and targets of two batches of different sizes that share samples.
        pairs: places of the same sample in the first and the second batch.
        at: the module whose output ends the prefix, or None for the longest prefix.
        eval_frozen: run the prefix in eval mode.

    Raises:
        ValueError: nothing can be skipped, or something cannot; the message says why.
    """
    (inputs, targets), (other_inputs, other_targets) = batches
    trace, changed, in_eval = _traced_until_fixed(tree, run, inputs, at, eval_frozen)
    calls = {id(call): n for n, call in enumerate(trace.calls) if n not in trace.entries}
    outermost = [(calls[id(call)], call) for call in trace.stack[0].inside]
    _check_trace(tree, trace, outermost, at, changed, eval_frozen)
    if eval_frozen:
        in_eval |= {(id(call.module), call.ordinal): call.module for _, call in outermost}
    entries: dict[tuple[int, int], tuple[_Call, list[int]]] = {}
    for number, (call, j) in trace.entries.items():
        if (number, 0) in trace.needed:
            entries.setdefault((id(call.module), call.ordinal), (call, []))[1].append(j)

    # The same two batches again, as they will be run from now on.
    plain = [(call.module, call.ordinal) for _, call in outermost]
    taking = [(call.module, call.ordinal) for call, _ in entries.values()]
    first, taken, output = _returned(run, plain, taking, inputs, in_eval, seed=0)
    second, other_taken, _ = _returned(run, plain, taking, other_inputs, in_eval, seed=1)

    layout = _Layout()
    of_targets, targets_at = layout.structure("targets", targets, other_targets)
    # The first key of an input says whether it is positional.
    of_inputs, inputs_at = layout.structure(
        "inputs", inputs, other_inputs, {j for n, j in trace.needed if n < 0}, path_from=1
    )
    skipped: dict[tuple[int, int], Skipped] = {}
    stored: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {}
    for (n, call), one, two in zip(outermost, first, second, strict=True):
        name, key = tree.modules[id(call.module)].name, (id(call.module), call.ordinal)
        of_call = {j for number, j in trace.needed if number == n}
        returns, at_leaves = layout.returns(name, one, two, of_call)
        skipped[key] = Skipped(call.module, name, call.ordinal, returns)
        if at_leaves:
            stored[key] = at_leaves
    given = {
        key: layout.given(call, tree.modules[id(call.module)].name, wanted, one, two)
        for (key, (call, wanted)), one, two in zip(entries.items(), taken, other_taken, strict=True)
    }
    frozen = [*(call.module for _, call in outermost), *trace.between]
    below = {id(m): m for module in frozen for m in module.modules()}
    plan = Plan(
        inputs=of_inputs,
        targets=of_targets,
        calls=skipped,
        slots=tuple(layout.slots),
        tensors=dict(sorted(trace.tensors.items())),
        modules=tuple(below.values()),
        share=trace.frozen_flops / trace.flops if trace.flops else 0.0,
        in_eval=in_eval,
        stored=stored,
        given=given,
        of_inputs=inputs_at,
        of_targets=targets_at,
    )
    if not plan.of_calls:
        raise ValueError(_nothing_to_store(trace))
    if refusal := plan.why_refused(tree):
        raise ValueError(refusal)
    captured = _captured(plan, run, inputs, targets, seed=0)
    _check_samples(plan, run, captured, batches, pairs)
    plan.example = [value.clone() for value in captured]
    _check_output(plan, run, captured, inputs, output)
    if trace.recomputes:
        if has_shards(tree.root.module):  # and puts parameters of its own where the copies are
            raise ValueError(
                "FeatureCache: a model with checkpointed regions (torch.utils.checkpoint) cannot "
                "be checked once parts of it are sharded. Make the FeatureCache before "
                "fully_shard, or checkpoint nothing."
            )
        _check_backward(tree.root.module, plan, captured, inputs)
    return plan


class _Layout:
    """Gives every tensor that is stored a slot, from its values in batches of different sizes."""

    def __init__(self) -> None:
        self.slots: list[Slot] = []

    def structure(
        self, what: str, one: Any, two: Any, stored: set[int] | None = None, path_from: int = 0
    ) -> tuple[Structure, tuple[tuple[int, int], ...]]:
        """A structure whose leaves `stored` (None: all) have slots, and (slot, leaf) of these."""
        paths, spec = tree_flatten_with_path(one)
        others, other_spec = tree_flatten(two)
        if stored is None and any(isinstance(value, str | bytes) for _, value in paths):
            raise ValueError(
                f"FeatureCache: {what} has strings, which cannot be stored; make them numbers, or "
                "leave them out of the sample."
            )
        if spec != other_spec:
            raise ValueError(
                f"FeatureCache: {what} has another structure in a batch of another size; return "
                "tensors whose first dimension is the batch (a collate_fn can make them)."
            )
        leaves = []
        for j, ((path, a), b) in enumerate(zip(paths, others, strict=True)):
            name = what + keystr(path[path_from:])
            leaves.append(self.leaf(name, a, b, stored is None or j in stored))
        places = [(leaf.slot, j) for j, leaf in enumerate(leaves) if leaf.slot is not None]
        return Structure(_shared(spec), tuple(leaves)), tuple(places)

    def returns(self, name: str, one: Any, two: Any, stored: set[int]) -> Any:
        """The same of what a call returned."""
        if one is None or two is None:
            raise ValueError(
                f"FeatureCache: {name} is not called in every pass, so the model's path "
                "depends on chance (LayerDrop, stochastic depth) or on the samples. Turn that off, "
                "or choose an earlier boundary with at=...."
            )
        return self.structure(name, one, two, stored)

    def given(self, call: _Call, name: str, wanted: list[int], one: Any, two: Any) -> Given:
        """The arguments `wanted` of a call, from what it took."""
        if one is None or two is None or one[1] != two[1]:
            raise ValueError(
                f"FeatureCache: {name} is not called alike in every pass. Choose an earlier "
                "boundary with at=...."
            )
        (values, spec), (others, _) = one, two
        what = f"the input of {name}"
        leaves = tuple((j, self.leaf(what, values[j], others[j], True)) for j in wanted)
        return Given(call.module, name, call.ordinal, _shared(spec), leaves)

    def leaf(self, what: str, a: Any, b: Any, stored: bool) -> Leaf:
        """One value."""
        leaf = _leaf(what, a, b, stored)
        if isinstance(leaf, Leaf):
            return leaf
        self.slots.append(leaf)
        return Leaf(slot=len(self.slots) - 1)


def _traced_until_fixed(
    tree: Tree,
    run: Callable[[Inputs], Any],
    inputs: Inputs,
    at: nn.Module | None,
    eval_frozen: bool,
) -> tuple[_Trace, set[str], dict[tuple[int, int], nn.Module]]:
    """What `_traced` gives, and the calls to run in eval mode so that the prefix draws nothing."""
    in_eval: dict[tuple[int, int], nn.Module] = {}
    while True:
        trace, changed = _traced(tree, run, inputs, at, eval_frozen, in_eval)
        new = {key: call.module for key, call in trace.blocked.items() if key not in in_eval}
        if not eval_frozen or not new:
            return trace, changed, in_eval
        in_eval |= new  # dropout between frozen modules


def _traced(
    tree: Tree,
    run: Callable[[Inputs], Any],
    inputs: Inputs,
    at: nn.Module | None,
    eval_frozen: bool,
    in_eval: dict[tuple[int, int], nn.Module],
) -> tuple[_Trace, set[str]]:
    """A pass that follows what depends on what, and the names of the buffers that it writes."""
    modules = [e.module for e in tree.order[1:] if not isinstance(e.module, torch.jit.ScriptModule)]
    frozen = {
        id(m)
        for m in modules
        if (own := list(m.parameters())) and not any(p.requires_grad for p in own)
    }
    trace = _Trace(tree, inputs)
    chosen = set() if at is None else {id(at)}

    def handler(module: nn.Module, ordinal: int, args: Any, kwargs: Any, usual: Any) -> Any:
        is_eval = eval_frozen and (id(module) in frozen or (id(module), ordinal) in in_eval)
        with eval_mode(module) if is_eval else nullcontext():
            return trace.call(chosen, module, ordinal, args, kwargs, usual)

    with (
        kept_buffers(tree.root.module) as changed,
        kept_random_state(seed=0),
        torch.enable_grad(),
        taken_over(modules, handler),
        no_fast_attention(),
        trace,
    ):
        run(inputs)
    trace.needed |= trace.stack[0].read
    return trace, changed


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[set[str]]:
    """Give buffers their values back, and name those that needed it when the block is left."""
    before = {name: (b, b.clone()) for name, b in model.named_buffers() if not is_lazy(b)}
    changed: set[str] = set()
    try:
        yield changed
    finally:
        for name, (buffer, value) in before.items():
            if not torch.equal(buffer, value):
                buffer.copy_(value)
                changed.add(name)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Have a module and all below it in eval mode, inside the block only."""
    changed = [m for m in module.modules() if m.training]
    for m in changed:
        m.training = False
    try:
        yield
    finally:
        for m in changed:
            m.training = True


def estimate(
    tree: Tree, run: Callable[[Inputs], Any], inputs: Inputs
) -> tuple[float, list[str], int]:
    """What could be stored, from one pass in which frozen modules are in eval mode.

    Returns:
        The share (0 to 1) of the forward pass's FLOPs that would be skipped, the modules whose
        outputs would be stored, and their bytes for the whole batch.
    """
    trace, _ = _traced(tree, run, inputs, None, True, {})
    outermost = {id(call) for call in trace.stack[0].inside}
    stored = [
        (n, j)
        for n, j in sorted(trace.needed)
        if n >= 0 and (n in trace.entries or id(trace.calls[n]) in outermost)
    ]
    names = dict.fromkeys(
        "the input of " * (n in trace.entries) + tree.modules[id(trace.calls[n].module)].name
        for n, _ in stored
    )
    size = sum(trace.sizes[n, j] for n, j in stored)
    return (trace.frozen_flops / trace.flops if trace.flops else 0.0), list(names), size


def _check_trace(
    tree: Tree,
    trace: _Trace,
    outermost: list[tuple[int, _Call]],
    at: nn.Module | None,
    changed: set[str],
    eval_frozen: bool,
) -> None:
    if trace.blocked:
        where = {
            tree.modules[id(call.module)].name or "the model": None
            for call in trace.blocked.values()
        }
        raise ValueError(
            "FeatureCache: the frozen prefix gives other features each time, because it draws "
            f"random numbers in {_format.listed(where, 4)}. Set the p of that dropout to 0 or call "
            "eval() on it, give eval_frozen=True, which runs the frozen prefix in eval mode, or "
            "choose an earlier boundary with at=...."
        )
    if trace.first is None and at is None:
        raise ValueError(
            "FeatureCache: the output depends on no trainable parameter; there is nothing to train "
            "from the features. Leave something trainable: freeze_except(model, 'head')."
        )
    found = {id(call.module) for _, call in outermost}
    if at is not None and id(at) not in found:
        name = tree.modules[id(at)].name
        raise ValueError(
            f"FeatureCache: at={name!r} is not frozen as a whole with all that comes before it"
            + (f" ({trace.first} trains)" if trace.first else "")
            + f"; freeze that too, or leave out `at`. Frozen are: {_names(tree, outermost)}."
        )
    if not outermost:
        raise ValueError(_nothing_to_store(trace))
    writing = [
        entry.name
        for _, call in outermost
        for entry in map(tree.modules.__getitem__, map(id, call.module.modules()))
        if entry.module.training and is_norm(entry.module)
    ]
    if writing and not eval_frozen:
        raise ValueError(
            f"FeatureCache: {_format.listed(writing)} in the frozen prefix normalizes by the batch "
            "and updates its statistics, so features would change. Freeze with "
            "torch_freeze.freeze(...), which holds such layers, or call eval() on them."
        )
    frozen = changed & set(trace.tensors)
    if frozen:
        raise ValueError(
            f"FeatureCache: the forward pass writes {_format.listed(sorted(frozen))}, which the "
            "features depend on. Call eval() on that module."
        )


def _names(tree: Tree, outermost: list[tuple[int, _Call]]) -> str:
    return (
        _format.listed((tree.modules[id(call.module)].name for _, call in outermost), 6) or "none"
    )


def _nothing_to_store(trace: _Trace) -> str:
    return (
        "FeatureCache: nothing can be cached, because the first operation of the model already "
        f"uses the trainable parameter {trace.first}. Freeze the layers that come first."
    )


def _leaf(what: str, a: Any, b: Any, stored: bool) -> Leaf | Slot:
    """What to make of a value, from its two occurrences in batches of different sizes."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        if not _same_constant(a, b):
            raise ValueError(
                f"FeatureCache: {what} is {a!r} in one batch and {b!r} in another. Make it a "
                "tensor whose first dimension is the batch (a collate_fn can), or leave it out of "
                "the sample."
            )
        return Leaf(constant=a)
    if a.layout is not torch.strided or a.is_nested:
        raise ValueError(
            f"FeatureCache: {what} is a {a.layout} tensor; only dense ones are stored."
        )
    differing = [d for d in range(a.dim()) if a.dim() == b.dim() and a.shape[d] != b.shape[d]]
    if a.dim() != b.dim() or len(differing) > 1:
        raise ValueError(
            f"FeatureCache: {what} has shape {list(a.shape)} in one batch and {list(b.shape)} in "
            "another; samples must all have one shape. Pad text to one length "
            "(padding='max_length'), resize images."
        )
    if not differing:
        if stored and not torch.equal(a, b):
            raise ValueError(
                f"FeatureCache: {what} depends on the samples, but no dimension of its shape "
                f"{list(a.shape)} is the batch's. Choose another boundary with at=...."
            )
        if stored:
            return Leaf(constant=a.detach().clone())
        return Leaf(shape=tuple(a.shape), dtype=a.dtype)
    (dim,) = differing
    shape = tuple(a.shape[:dim] + a.shape[dim + 1 :])
    if stored:
        return Slot(what, shape, a.dtype, dim)
    return Leaf(shape=shape, dtype=a.dtype, dim=dim)


def _returned(
    run: Callable[[Inputs], Any],
    calls: list[tuple[nn.Module, int]],
    taking: list[tuple[nn.Module, int]],
    inputs: Inputs,
    in_eval: dict[tuple[int, int], nn.Module],
    seed: int,
) -> tuple[list[Any], list[Any], Any]:
    """What some calls return and what others take in a pass, copied, and the output of the pass."""
    wanted = {(id(module), ordinal): n for n, (module, ordinal) in enumerate(calls)}
    found: list[Any] = [None] * len(calls)
    takes = {(id(module), ordinal): n for n, (module, ordinal) in enumerate(taking)}
    taken: list[Any] = [None] * len(taking)

    def copied(values: Any) -> tuple[list[Any], TreeSpec]:
        leaves, spec = tree_flatten(values)
        return [t.detach().clone() if isinstance(t, torch.Tensor) else t for t in leaves], spec

    def handler(module: nn.Module, ordinal: int, args: Any, kwargs: Any, usual: Any) -> Any:
        if (n := takes.get((id(module), ordinal))) is not None:
            taken[n] = copied((args, kwargs))
        with eval_mode(module) if (id(module), ordinal) in in_eval else nullcontext():
            out = usual(*args, **kwargs)
        if (n := wanted.get((id(module), ordinal))) is not None:
            found[n] = tree_unflatten(*copied(out))
        return out

    with kept_random_state(seed), torch.enable_grad():
        modules = {id(m): m for m in [*(m for m, _ in [*calls, *taking]), *in_eval.values()]}
        with taken_over(modules.values(), handler):
            output = run(inputs)
    return found, taken, output


#: Runs a frozen call: gets the module, a function that runs it as usual, and its arguments.
Runner = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def capturing(
    plan: Plan,
    found: dict[int, torch.Tensor],
    only_these: bool = False,
    runner: Runner | None = None,
) -> Any:
    """Keep what a plan stores of a pass, by slot, in the forward passes of a block.

    Args:
        plan: the plan.
        found: gets the tensors, with the batch's dimension first.
        only_these: end the pass with EnoughError when all are there.
        runner: runs the frozen calls; None runs them as usual.
    """
    modules = [plan.calls[key].module for key in plan.stored] + list(plan.in_eval.values())
    modules += [given.module for given in plan.given.values()]
    if runner is not None:
        modules += plan.skipped_modules
    waiting = {*plan.stored, *plan.given}

    def handler(module: nn.Module, ordinal: int, args: Any, kwargs: Any, usual: Any) -> Any:
        key = (id(module), ordinal)
        if key in plan.given:
            take(plan, key, args, kwargs, found)
            waiting.discard(key)
            if only_these and not waiting:
                raise EnoughError
        with eval_mode(module) if key in plan.in_eval else nullcontext():
            if runner is None or key not in plan.calls:
                out = usual(*args, **kwargs)
            else:
                out = runner(module, usual, args, kwargs)
                out = _as_recorded(plan, plan.calls[key].returns, out)
        if key in plan.stored:
            keep(plan, key, out, found)
            waiting.discard(key)
            if only_these and not waiting:
                raise EnoughError
        return out

    return taken_over({id(m): m for m in modules}.values(), handler)


def _as_recorded(plan: Plan, recorded: Structure, out: Any) -> Any:
    """What a call returned, in the dtypes that it returns otherwise."""
    leaves, spec = tree_flatten(out)
    made = []
    for value, leaf in zip(leaves, recorded.leaves, strict=True):
        dtype = leaf.dtype if leaf.slot is None else plan.slots[leaf.slot].dtype
        cast = isinstance(value, torch.Tensor) and value.is_floating_point()
        made.append(value.to(dtype) if cast else value)
    return tree_unflatten(made, spec)


def keep(plan: Plan, key: tuple[int, int], out: Any, found: dict[int, torch.Tensor]) -> None:
    """Copy what is stored of a call's result."""
    leaves = tree_flatten(out)[0]
    for slot, at in plan.stored[key]:
        # Copied, because what follows may write into it.
        found[slot] = leaves[at].detach().movedim(plan.slots[slot].dim, 0).clone()


def take(
    plan: Plan, key: tuple[int, int], args: Any, kwargs: Any, found: dict[int, torch.Tensor]
) -> None:
    """Copy what is stored of a call's arguments."""
    given = plan.given[key]
    values, spec = tree_flatten((args, kwargs))
    for at, leaf in given.leaves if spec == given.spec else ():
        if leaf.slot is not None:
            found[leaf.slot] = values[at].detach().movedim(plan.slots[leaf.slot].dim, 0).clone()


def skipping(
    plan: Plan,
    slots: Sequence[Any],
    count: int,
    device: torch.device,
    deeper: Plan | None = None,
    found: dict[int, torch.Tensor] | None = None,
) -> Any:
    """Leave out the frozen calls in the forward passes of a block.

    Args:
        plan: what to leave out.
        slots: what the store has, as `Plan.placed` gives it.
        count: how many samples there are.
        device: of stand-ins.
        deeper: a plan whose stored calls are kept in `found`.
        found: gets them, by slot.
    """
    modules, in_eval = plan.handled, plan.in_eval
    if deeper is not None:
        in_eval = {**in_eval, **deeper.in_eval}
        below = [*modules, *(g.module for g in deeper.given.values()), *deeper.in_eval.values()]
        below += [deeper.calls[key].module for key in deeper.stored]
        modules = tuple({id(m): m for m in below}.values())

    def handler(module: nn.Module, ordinal: int, args: Any, kwargs: Any, usual: Any) -> Any:
        key = (id(module), ordinal)
        call = plan.calls.get(key)
        if call is not None and deeper is None:
            return call.returns.build(slots, count, device)
        if key in plan.given:
            args, kwargs = plan.given[key].put(args, kwargs, slots, device)
        if deeper is not None and found is not None and key in deeper.given:
            take(deeper, key, args, kwargs, found)
        if call is not None:
            out = call.returns.build(slots, count, device)
        else:
            with eval_mode(module) if key in in_eval else nullcontext():
                out = usual(*args, **kwargs)
        if deeper is not None and found is not None and key in deeper.stored:
            keep(deeper, key, out, found)
        return out

    return taken_over(modules, handler)


def _captured(
    plan: Plan, run: Callable[[Inputs], Any], inputs: Inputs, targets: Any, seed: int
) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    with kept_random_state(seed), torch.enable_grad(), capturing(plan, found):
        run(inputs)
    return plan.rows(inputs, targets, found)


def _check_samples(
    plan: Plan,
    run: Callable[[Inputs], Any],
    captured: list[torch.Tensor],
    batches: Sequence[tuple[Inputs, Any]],
    pairs: Sequence[tuple[int, int]],
) -> None:
    """Raise if the features of a sample depend on chance or on the other samples of its batch."""
    other = _captured(plan, run, *batches[1], seed=1)
    ones, twos = map(list, zip(*pairs, strict=True))
    differs = [
        slot.name
        for slot, a, b in zip(plan.slots, captured, other, strict=True)
        if not near(a[ones], b[twos])
    ]
    if not differs:
        return
    again = _captured(plan, run, *batches[0], seed=2)
    if not all(near(a, b) for a, b in zip(captured, again, strict=True)):
        raise ValueError(
            f"FeatureCache: what {_format.listed(differs)} gives differs each time, so the frozen "
            "prefix draws random numbers. Turn that off, or choose an earlier boundary with at=...."
        )
    raise ValueError(
        f"FeatureCache: what {_format.listed(differs)} gives for a sample depends on the other "
        "samples of its batch, so it cannot be stored by sample. Choose an earlier boundary with "
        "at=...."
    )


def _device_of(plan: Plan) -> torch.device:
    return next((t.device for t in plan.tensors.values()), torch.device("cpu"))


def _check_output(
    plan: Plan,
    run: Callable[[Inputs], Any],
    captured: list[torch.Tensor],
    inputs: Inputs,
    output: Any,
) -> None:
    """Raise unless the pass from stored features gives the output of the whole pass."""
    count, device = captured[0].shape[0], _device_of(plan)
    slots = plan.placed(captured)
    try:
        with (
            kept_random_state(seed=0),
            torch.enable_grad(),
            skipping(plan, slots, count, device),
        ):
            got = run(plan.inputs.build(slots, count, device))
        pairs = zip(tree_iter(got), tree_iter(output), strict=True)
        compared = [
            (a, b) for a, b in pairs if isinstance(b, torch.Tensor) and not isinstance(a, StandIn)
        ]
        same = bool(compared) and all(near(a.detach(), b.detach()) for a, b in compared)
    except StandInError as error:
        raise ValueError(
            f"FeatureCache: this model needs more from its frozen part than what "
            f"{_format.listed(plan.boundary)} returns: {error}. Choose another boundary with "
            "at=...."
        ) from error
    if not same:
        raise ValueError(
            "FeatureCache: from stored features this model gives another output, so it does "
            "something in its frozen part that cannot be left out (a cache, an attribute that it "
            "writes). Choose another boundary with at=...."
        )


class _Iteration(nn.Module):
    """Forward in one context and backward in another."""

    def __init__(self, model: nn.Module, forward: Any, backward: Any) -> None:
        super().__init__()
        self.model, self.contexts = model, (forward, backward)

    def forward(self, *args: Any, **kwargs: Any) -> None:
        forward, backward = self.contexts
        with forward:
            output = self.model(*args, **kwargs)
        outs = [t for t in tree_iter(output) if isinstance(t, torch.Tensor) and t.requires_grad]
        with backward:
            torch.autograd.backward([out.abs().sum() for out in outs])


def _check_backward(
    model: nn.Module, plan: Plan, captured: list[torch.Tensor], inputs: Inputs
) -> None:
    """Raise if backward runs a skipped call again, or gives other gradients than otherwise."""
    count, device = captured[0].shape[0], _device_of(plan)
    names = {id(call.module): call.name for call in plan.calls.values()}
    names |= {id(given.module): given.name for given in plan.given.values()}
    modules = plan.skipped_modules + [given.module for given in plan.given.values()]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def refuse(module: nn.Module, *_: Any) -> Any:
        raise ValueError(
            f"FeatureCache: {names[id(module)]} is in a checkpointed region "
            "(torch.utils.checkpoint) with a part that trains, so backward would run it again, "
            "without what is stored. Checkpoint what is frozen and what trains apart, or choose "
            "an earlier boundary with at=...."
        )

    def gradients(forward: Any, backward: Any, given: Inputs) -> list[torch.Tensor | None]:
        # Of copies, so that no gradient and no hook of the parameters themselves is touched.
        copies = {f"model.{n}": p.detach().clone().requires_grad_() for n, p in trained.items()}
        with kept_random_state(seed=0), torch.enable_grad():
            torch.func.functional_call(_Iteration(model, forward, backward), copies, *given)
        return [copy.grad for copy in copies.values()]

    slots = plan.placed(captured)
    stored = plan.inputs.build(slots, count, device)
    cached = gradients(skipping(plan, slots, count, device), taken_over(modules, refuse), stored)
    copied = tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, inputs)
    whole = gradients(capturing(plan, {}), nullcontext(), copied)
    for name, a, b in zip(trained, cached, whole, strict=True):
        if (a is None) != (b is None) or (a is not None and b is not None and not near(a, b)):
            raise ValueError(
                f"FeatureCache: from stored features {name} gets another gradient, because "
                "gradient checkpointing asks for inputs that require one. Use it with "
                "use_reentrant=False."
            )


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to what the order of additions changes."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    if a.numel() == 0:
        return True
    tolerance = 2e-2 if a.dtype.itemsize < 4 else 1e-3
    a, b = a.double(), b.double()
    finite = b.isfinite()
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return False
    scale = float(b[finite].abs().max()) if bool(finite.any()) else 0.0
    return float((a - b)[finite].abs().max() if bool(finite.any()) else 0.0) <= tolerance * scale


@contextmanager
def kept_random_state(seed: int) -> Iterator[None]:
    """Seed all generators, and put their states back afterwards."""
    numpy: Any = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            random.seed(seed)
            if numpy is not None:
                numpy.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
