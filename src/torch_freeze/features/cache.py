"""FeatureCache: what the frozen prefix of a model computes is computed once for each sample."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.weak import WeakIdKeyDictionary

from torch_freeze import _format
from torch_freeze._select import as_selectors, select
from torch_freeze._tree import Tree, check_model, unwrap

from ._calls import taken_over
from ._dataset import Board, CachedDataset, CachedInputs, Samples, new_board, split
from ._plan import (
    EnoughError,
    Inputs,
    Plan,
    Runner,
    capturing,
    kept_buffers,
    kept_random_state,
    make_plan,
    near,
    skipping,
)
from ._sharded import check_wrappers, resharded
from ._store import Column, Store, open_store


@dataclass
class _Source:
    """Stored features with the plan that they fit, and what has to be unchanged for it."""

    key: str
    plan: Plan
    store: Store
    names: list[str]
    digests: dict[str, str]
    cast: Any
    modes: list[bool]
    hooks: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        # The dicts of all modules, found once, because every batch looks into them.
        self.attributes = [m.__dict__ for m in self.plan.modules]
        self.buffers = [m._buffers.values() for m in self.plan.modules if m._buffers]
        self.keep_memory()

    def keep_memory(self) -> None:
        """Keep their memory from being freed, so that an address tells one tensor from another."""
        self.kept = [t.detach() for t in self.plan.tensors.values()]

    def hooks_now(self) -> list[Any]:
        """Of each module the keys of its hooks, and a forward that was put on it."""
        found: list[Any] = []
        for own in self.attributes:
            before, after, forward = (
                own["_forward_pre_hooks"],
                own["_forward_hooks"],
                own.get("forward"),
            )
            if before or after or forward is not None:
                found.append((*after, *before, id(forward)))
            else:
                found.append(None)
        return found

    def still_frozen(self) -> bool:
        """Whether nothing of the prefix trains."""
        return not any(t.requires_grad for t in self.plan.tensors.values())


class FeatureCache:
    """Compute the output of a model's frozen prefix once for each sample, and train from it.

    The prefix is found by running the model over a few samples: everything that comes before, and
    depends on, no trainable parameter. What it gives is stored in a folder when a sample is seen
    for the first time, or by `fill`. From then on neither the sample is loaded nor the prefix run.
    The model is called as it is, and any optimizer works.

    ::

        freeze_except(model, "layer4", "fc")
        features = FeatureCache(model, dataset, "features/")
        for batch in DataLoader(features.dataset, 64, shuffle=True, num_workers=4):
            loss = loss_fn(features(batch.inputs), batch.targets)

    When more is frozen (by a schedule, say), the boundary moves on, and new features are made from
    the old ones. When something before the boundary is unfrozen, forward is whole again.

    Args:
        model: the model, also wrapped by DistributedDataParallel. Parts that train may be compiled,
            or sharded with fully_shard.
        dataset: a map-style dataset whose samples are always the same. A sample is (input, ...,
            targets), a mapping of the model's keyword arguments, or the only argument.
        path: the folder of the features; several processes may share it. None keeps them in memory.
        at: the module whose output is stored, in the terms of `freeze`; None for the longest
            prefix.
        collate_fn: makes a batch of samples, as for a DataLoader; do not give it to the DataLoader.
        dtype: a floating dtype to store features in. bfloat16 takes half the space of float32 and
            keeps 8 bits of each number.
        views: store this many random draws of each sample, each from a seed of its own; a batch
            takes one of them at random. Needed if the dataset augments.
        version: what tells one state of the dataset from another. Change it after an edit.
        on_change: what to do when the frozen prefix has changed (its values, its modes or hooks):
            "raise" a RuntimeError, or "refill".
        old: "delete" features that are no longer of use when the boundary moves, or "keep" them.
        eval_frozen: run the frozen prefix in eval mode, so that its dropout is off.
        frozen_dtype: run the frozen prefix under autocast to this dtype; not exact.
        compile_frozen: compile the frozen modules; not exact.
        spot_check: share of the time (0 to 1) to spend on computing stored samples again, to see
            whether the dataset still gives them. 0 for none, 1 for one at every batch.

    Attributes:
        dataset: for the DataLoader. Its batches have `inputs` (for this object) and `targets`.

    Raises:
        ValueError: nothing can be cached, or it would not be exact (dropout or a batch norm in
            train mode in the prefix, a random transform, samples of several shapes); the message
            says why and what to do.
        TypeError: the dataset has no length or no indices.
        OSError: the features need more space than the disk has free; nothing is written then.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from torch_freeze import FeatureCache, freeze
        >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> _ = freeze(model, "0")
        >>> dataset = TensorDataset(torch.randn(100, 8), torch.randint(4, (100,)))
        >>> features = FeatureCache(model, dataset)
        >>> print(features)
        FeatureCache: 66.7 % of forward is skipped, up to 1 and with it; 264 B for each of 100 \
samples, 26.5 kB in memory; 0 stored.
        >>> for batch in DataLoader(features.dataset, 10, shuffle=True):
        ...     loss = nn.functional.cross_entropy(features(batch.inputs), batch.targets)
        >>> features.stored
        100
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset[Any],
        path: str | os.PathLike[str] | None = None,
        *,
        at: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        dtype: torch.dtype | None = None,
        views: int | None = None,
        version: str | int = "",
        on_change: Literal["raise", "refill"] = "raise",
        old: Literal["delete", "keep"] = "delete",
        eval_frozen: bool = False,
        frozen_dtype: torch.dtype | None = None,
        compile_frozen: bool = False,
        spot_check: float = 0.02,
    ) -> None:
        check_model(model, "FeatureCache")
        _check_arguments(dataset, dtype, views, on_change, old, frozen_dtype, spot_check)
        if hasattr(model, "_orig_mod") or unwrap(model)._compiled_call_impl is not None:
            raise TypeError(
                "FeatureCache: the model is compiled as a whole, and a compiled pass cannot begin "
                "in the middle. Compile the parts that train: model.layer4.compile()."
            )
        self.model = model
        self._bare = unwrap(model)
        for name, tensor in (*self._bare.named_parameters(), *self._bare.named_buffers()):
            if tensor.is_inference():
                raise ValueError(
                    f"FeatureCache: {name} was made in torch.inference_mode(), which hides later "
                    "changes of it. Make and load the model outside of that."
                )
        self._take_stock()
        self._at = at
        if at is not None:
            _one_module(self._tree, at)
        self._dtype = dtype
        self._version = version
        self._on_change = on_change
        self._old = old
        self._eval_frozen = eval_frozen
        self._frozen_dtype = frozen_dtype
        self._compile_frozen = compile_frozen
        self._spot_check = spot_check
        self._root = None if path is None else Path(path)
        board = Board(None) if self._root is None else new_board(self._root)
        self.dataset = CachedDataset(dataset, collate_fn, views, self._root, board)
        self._finalizer = weakref.finalize(self, _close, self.dataset.stores, board.path)
        self._sources: dict[str, _Source] = {}
        self._now: _Source | None = None
        self._compiled: dict[int, Callable[..., Any]] = {}
        # Of each tensor: its version, an alias that keeps its memory from being reused, its hash.
        self._digests: Any = WeakIdKeyDictionary()
        self._hooks_changed = 0  # times
        self._state: tuple[Any, ...] = ()
        self._held: list[int] | None = None  # what `_renew` saw; None for what `_state` has
        began = time.monotonic()
        try:
            self._check_redrawn()
            self._begin(self._plan())
        except BaseException:
            self._finalizer()
            raise
        # Finding the boundary took about ten passes over a few samples, and a check takes one.
        self._checked = time.monotonic()
        self._check_seconds = (self._checked - began) / 10

    # --------------------------------------------------------------------------- what a user calls

    def __call__(self, inputs: CachedInputs) -> Any:
        """Call the model, from the stored features if the batch came with them.

        Args:
            inputs: `batch.inputs` of a DataLoader over `dataset`, on any device.

        Returns:
            What the model returns. Tensors in it that the skipped part made (hidden states, say)
            have a shape and no data, and raise when used.

        Raises:
            TypeError: `inputs` is something else.
            RuntimeError: the frozen prefix was sharded, or has changed and `on_change` is "raise";
                or the dataset gives another sample than before.
        """
        if not isinstance(inputs, CachedInputs):
            raise TypeError(
                "FeatureCache: call it with batch.inputs of DataLoader(features.dataset, ...); got "
                f"{type(inputs).__name__}. To run the model on other data, call the model."
            )
        if inputs.owner != self.dataset.owner:
            raise ValueError(
                "FeatureCache: this batch is of the dataset of another FeatureCache; call that one."
            )
        self._follow()
        source = self._sources.get(inputs.store or "")
        if source is not None and source.cast != self._cast():
            source = None
        slots, raw = inputs.slots, inputs.raw
        if source is None and raw is None:  # stored for a boundary that is no longer valid
            raw = self.dataset.raw(inputs.rows)
        if source is None or slots is None:
            assert raw is not None
            return self._from_samples(inputs.rows, *raw)
        output = self._from_features(source, inputs.rows, slots)
        self._check_now_and_then(inputs.rows)
        return output

    def fill(self, batch_size: int = 64, *, num_workers: int = 0, progress: bool = True) -> None:
        """Store the features of all samples that have none, running only the frozen prefix.

        A run that was killed goes on where it was. Several processes may fill one folder.

        Args:
            batch_size: how many samples to run at once.
            num_workers: as for a DataLoader, which loads the samples.
            progress: show a progress bar (tqdm's, if that is installed) on standard error.
        """
        self._follow()
        if self._now is None:
            raise RuntimeError(
                f"{type(self).__name__}.fill: nothing is frozen that could be stored"
            )
        now = self._now
        missing = now.store.missing
        loader = DataLoader(
            _Missing(self.dataset, missing),
            batch_size,
            num_workers=num_workers,
            collate_fn=functools.partial(_collate_missing, self.dataset),
        )
        for rows, raw in _shown(loader, len(missing), batch_size, progress):
            now.store.write(rows, self._prefix(now.plan, raw))
        now.store.flush()
        self._drop_shallower()

    def check(self, samples: int = 16) -> None:
        """Compute some stored samples again, at random, and compare.

        Args:
            samples: how many.

        Raises:
            RuntimeError: the features of one differ by more than rounding does: the dataset gives
                another sample than it did, or the prefix was changed unseen (through `.data`).
        """
        self._follow()
        if self._now is not None:
            written = self._now.store.has(torch.arange(self._now.store.rows)).nonzero().flatten()
            self._compare(self._now, written[torch.randperm(len(written))[:samples]])

    def flush(self) -> None:
        """Wait until all that is stored is on the disk. It is done twice a minute anyway."""
        if self._now is not None:
            self._now.store.flush()

    def attach(self) -> Any:
        """Let the model itself take `batch.inputs`, for training loops that call the model.

        Returns:
            A context manager. Inside, `model(batch.inputs)` and `model(cached=batch.inputs)` do
            what calling this object does; other calls of the model are as always. The callbacks of
            `torch_freeze.integrations` do this for their `cache`.
        """
        return self._attached()

    def collator(self, samples: list[Any]) -> Any:
        """A batch for training loops that call `model(**batch)`: `{"cached": inputs}`.

        It collates samples of another dataset, for an evaluation, as `collate_fn` does.
        """
        if samples and isinstance(samples[0], Samples):
            return {"cached": self.dataset.collate(samples).inputs}
        return self.dataset.collate_fn(samples)

    @property
    def stored(self) -> int:
        """How many rows (samples times views) are stored."""
        return 0 if self._now is None else self._now.store.count

    @property
    def boundary(self) -> tuple[str, ...]:
        """Names of the modules whose outputs are stored, and "the input of ..."; empty if none."""
        return () if self._now is None else self._now.plan.boundary

    @property
    def share(self) -> float:
        """The share (0 to 1) of the forward pass's FLOPs that is skipped."""
        return 0.0 if self._now is None else self._now.plan.share

    @property
    def nbytes(self) -> int:
        """Bytes of all features together, stored or not."""
        return 0 if self._now is None else self._now.store.nbytes

    def __repr__(self) -> str:
        if self._now is None:
            return "FeatureCache: nothing is skipped; forward is whole."
        plan, store = self._now.plan, self._now.store
        until = _format.listed(plan.boundary) + ("" if plan.given else " and with it")
        where = "memory" if self._root is None else str(self._root)
        each = store.nbytes // max(store.rows, 1) - 1
        views = f" x {self.dataset.views} views" if self.dataset.views is not None else ""
        return (
            f"FeatureCache: {_format.percent(plan.share)} of forward is skipped, up to "
            f"{until}; {_format.size(each)} for each of "
            f"{len(self.dataset)}{views} samples, {_format.size(store.nbytes)} in {where}; "
            f"{store.count} stored."
        )

    # ----------------------------------------------------------------------------------- one batch

    def _from_samples(self, rows: torch.Tensor, inputs: Inputs, targets: Any) -> Any:
        """Run the whole model, and store what its frozen prefix gives."""
        args, kwargs = self._moved(inputs)
        if self._now is None:
            return self.model(*args, **kwargs)
        plan, store = self._now.plan, self._now.store
        found: dict[int, torch.Tensor] = {}
        given = _copied((args, kwargs)) if plan.of_inputs else (args, kwargs)
        with capturing(plan, found, runner=self._runner()):
            output = self.model(*given[0], **given[1])
        self._check_found(plan, found)
        store.write(rows, plan.rows((args, kwargs), targets, found))
        return output

    def _from_features(self, source: _Source, rows: torch.Tensor, slots: list[torch.Tensor]) -> Any:
        """Run the model from the boundary on; store what a deeper boundary needs."""
        device = self._device()
        plan, now = source.plan, self._now
        moved = [
            value.to(device, slot.dtype, non_blocking=True)
            for value, slot in zip(slots, plan.slots, strict=True)
        ]
        count = len(rows)
        placed = plan.placed(moved)
        args, kwargs = plan.inputs.build(placed, count, device)
        complete = now is None or now.store.has_all(rows)
        if now is source and not complete:  # a worker had the store open when it was deleted
            now.store.write(rows, slots)
        if now is None or now is source or complete:
            with skipping(plan, placed, count, device):
                return self.model(*args, **kwargs)
        found: dict[int, torch.Tensor] = {}
        args, kwargs = _copied((args, kwargs))
        with skipping(plan, placed, count, device, now.plan, found):
            output = self.model(*args, **kwargs)
        self._check_found(now.plan, found)
        for deep, shallow in (
            (now.plan.of_inputs, plan.of_inputs),
            (now.plan.of_targets, plan.of_targets),
        ):
            have = {at: slot for slot, at in shallow}
            found.update({slot: moved[have[at]] for slot, at in deep})
        now.store.write(rows, [found[n] for n in range(len(now.plan.slots))])
        self._drop_shallower()
        return output

    def _check_found(self, plan: Plan, found: Mapping[int, torch.Tensor]) -> None:
        lacking = {plan.slots[slot].name for slot in plan.of_calls if slot not in found}
        if lacking:
            raise RuntimeError(
                f"FeatureCache: this pass did not call {_format.listed(sorted(lacking))}, as the "
                "one over the first samples did. A model whose path depends on the sample cannot "
                "be cached there; choose an earlier boundary with at=...."
            )

    def _prefix(self, plan: Plan, raw: tuple[Inputs, Any]) -> list[torch.Tensor]:
        """What is to be stored of a batch, running the frozen prefix alone."""
        args, kwargs = self._moved(raw[0])
        found: dict[int, torch.Tensor] = {}
        try:
            # With gradients on, as in training, so that the same kernels run.
            with (
                torch.enable_grad(),
                kept_buffers(self._bare),
                capturing(plan, found, only_these=True, runner=self._runner()),
            ):
                given = _copied((args, kwargs)) if plan.of_inputs else (args, kwargs)
                self._bare(*given[0], **given[1])
        except EnoughError:
            pass
        self._check_found(plan, found)
        return plan.rows((args, kwargs), raw[1], found)

    def _moved(self, inputs: Inputs) -> Any:
        device = self._device()

        def move(value: Any) -> Any:
            return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value

        return tree_map(move, inputs)

    def _device(self) -> torch.device:
        return self._params[0].device

    def _runner(self) -> Runner | None:
        """What runs frozen calls, None for as usual."""
        if self._frozen_dtype is None and not self._compile_frozen:
            return None

        def run(module: nn.Module, usual: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            with contextlib.ExitStack() as stack:
                if self._frozen_dtype is not None:
                    stack.enter_context(torch.autocast(self._device().type, self._frozen_dtype))
                if self._compile_frozen and any(True for _ in module.parameters()):
                    if id(module) not in self._compiled:
                        self._compiled[id(module)] = torch.compile(usual)
                    usual = self._compiled[id(module)]
                    # The limit counts what all modules have compiled together.
                    limit = 8 + 2 * len(self._compiled)
                    stack.enter_context(torch._dynamo.config.patch(recompile_limit=limit))
                return usual(*args, **kwargs)

        return run

    # ----------------------------------------------------------------- what is frozen, and whether

    def _follow(self) -> None:
        """Look whether anything changed, and follow what a schedule froze or unfroze."""
        if self._state == self._look():
            return
        before, changed = self._state, self._renew()
        now = self._look()
        flags, casts = now[0] != before[0], now[1] != before[1]
        if self._now is not None:  # a module whose input is stored was replaced
            flags |= any(key[0] not in self._tree.modules for key in self._now.plan.given)
        if not changed and self._now is not None:
            changed = self._what_changed(self._now, before, now)
        if changed and self._on_change == "raise":
            raise RuntimeError(
                f"FeatureCache: {changed} since the features were stored, so they are no longer "
                "what the model computes. Undo it, or make the cache with on_change='refill'."
            )
        if changed and self._now is not None:
            self._hooks_changed += self._now.hooks_now() != self._now.hooks
            self._drop(self._now.key)
            self._now = None
        if flags:
            # Some optimizers write without a trace (through .data), so it may have other values.
            for p in self._params:
                if p.requires_grad:
                    self._digests.pop(p, None)
        if flags or casts or changed:
            try:
                plan = self._plan()
            except ValueError as error:
                kept = self._now if self._now is not None and self._now.still_frozen() else None
                if casts or kept is None:
                    self._end()
                warnings.warn(
                    f"{error} Until then, "
                    + ("the boundary stays." if self._now else "forward is whole."),
                    UserWarning,
                    stacklevel=3,
                )
                self._state = self._look()
                return
            self._begin(plan)
        else:
            self._state = now
            if self._now is not None:
                self._now.keep_memory()

    def _look(self) -> tuple[Any, ...]:
        """All that a batch checks, in a form that is quick to make and to compare."""
        cast = self._cast()
        flags = [p.requires_grad for p in self._params]
        held = list(map(id, chain.from_iterable(self._holders)))
        if self._now is None:
            return (flags, cast, held)
        plan = self._now.plan
        held += map(id, chain.from_iterable(self._now.buffers))
        tensors = plan.tensors.values()
        return (
            flags,
            cast,
            held,
            self._modes(plan),
            self._now.hooks_now(),
            [t._version for t in tensors],
            list(map(torch.Tensor.data_ptr, tensors)),
        )

    def _cast(self) -> Any:
        device = self._params[0].device.type
        return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)

    def _modes(self, plan: Plan) -> list[bool]:
        return [] if self._eval_frozen else [m.training for m in plan.modules]

    def _take_stock(self) -> None:
        """Find all modules and parameters of the model."""
        self._tree = Tree(self._bare)
        self._params = [entry.parameter for entry in self._tree.params.values()]
        modules = [entry.module for entry in self._tree.order]
        self._holders = [
            holder.values() for m in modules for holder in (m._modules, m._parameters) if holder
        ]

    def _renew(self) -> str:
        """Follow what was replaced in the model; what of the prefix that is, in words, or ""."""
        held = self._look()[2]
        if held == self._state[2] and self._held in (None, held):
            return ""
        self._take_stock()
        tensors: dict[str, torch.Tensor] = {
            entry.name: entry.parameter for entry in self._tree.params.values()
        }
        for entry in self._tree.order:
            for name, buffer in entry.module._buffers.items():
                if buffer is not None:
                    tensors[f"{entry.name}.{name}" if entry.name else name] = buffer
        changed = ""
        for key, source in list(self._sources.items()):
            plan = source.plan
            gone = [
                name
                for name, module in zip(source.names, plan.modules, strict=True)
                if id(module) not in self._tree.modules
            ]
            gone = gone or [name for name in plan.tensors if name not in tensors]
            if not gone:
                plan.tensors.update({name: tensors[name] for name in plan.tensors})
                refusal = plan.why_refused(self._tree)
                if refusal and source is self._now:
                    raise RuntimeError(refusal)
                if refusal:
                    self._drop(key)
            elif source is self._now:
                changed = f"{_format.listed(gone)} was replaced"
            else:
                self._drop(key)
        self._held = self._look()[2]
        return changed

    def _what_changed(self, source: _Source, before: tuple[Any, ...], now: tuple[Any, ...]) -> str:
        """What else than requires_grad changed in the prefix, in words; "" if nothing."""
        plan = source.plan
        # What trains now is after the next boundary, and unfreezing changes the mode of a norm.
        flags = [[p.requires_grad for p in m.parameters()] for m in plan.modules]
        frozen = [not any(f) and (bool(f) or before[0] == now[0]) for f in flags]
        for place, told in (
            (3, "the mode (train or eval) of"),
            (4, "the hooks or the forward of"),
        ):
            pairs = zip(source.names, before[place], now[place], frozen, strict=False)
            differing = [n for n, a, b, still in pairs if a != b and still]
            if differing and not (place == 3 and self._same_features(plan)):
                return f"{told} {_format.listed(differing)} changed"
        moved = [
            name
            for name, t, *held in zip(
                plan.tensors, plan.tensors.values(), *before[5:], *now[5:], strict=True
            )
            if not t.requires_grad and held[:2] != held[2:]
        ]
        # A move to another device or back changes addresses, and no value.
        if moved:
            digests = self._digests_of(plan)
            moved = [name for name in moved if digests[name] != source.digests[name]]
        return f"{_format.listed(moved)} changed" if moved else ""

    def _same_features(self, plan: Plan) -> bool:
        """Whether the first samples still have the features that they had."""
        if any(t.requires_grad for t in plan.tensors.values()):
            return False
        with kept_random_state(seed=3):
            now = self._prefix(plan, self._witness)
        return all(map(torch.equal, now, plan.example))

    def _plan(self) -> Plan:
        """Find the boundary as things are."""
        check_wrappers(self.model)
        length = len(self.dataset)
        picked = [0, length // 2, length - 1]
        views = self.dataset.views or 1
        with kept_random_state(seed=0):
            first = self.dataset.raw(torch.tensor(picked) * views)
        with kept_random_state(seed=1):
            second = self.dataset.raw(torch.tensor(picked[1::-1]) * views)
        pairs = ((0, 1), (1, 0))
        self._check_drawn(first, second, pairs, picked)
        self._witness = first

        def run(inputs: Inputs) -> Any:
            args, kwargs = _copied(inputs)  # a model may write into its input
            return self._bare(*args, **kwargs)

        batches = [(self._moved(inputs), targets) for inputs, targets in (first, second)]
        at = None if self._at is None else _one_module(self._tree, self._at)
        with kept_buffers(self._bare), resharded(self._bare):
            return make_plan(self._tree, run, batches, pairs, at, self._eval_frozen)

    def _check_redrawn(self) -> None:
        """Draw two samples often: a flip with p=0.5 gives the same two times out of four."""
        if self.dataset.views is not None:
            return
        length = len(self.dataset)
        picked = [0, length // 2, length - 1]
        rows = torch.tensor(picked)
        with kept_random_state(seed=0):
            first = self.dataset.raw(rows)
        for seed in range(2, 10):
            with kept_random_state(seed=seed):
                again = self.dataset.raw(rows[:2])
            self._check_drawn(first, again, ((0, 0), (1, 1)), picked)

    def _check_drawn(
        self, first: Any, second: Any, pairs: tuple[tuple[int, int], ...], picked: list[int]
    ) -> None:
        for a, b in zip(tree_flatten(first)[0], tree_flatten(second)[0], strict=False):
            if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
                continue
            if a.dim() == 0 or a.shape[0] != 3 or b.shape[0] != 2 or a.shape[1:] != b.shape[1:]:
                continue
            for i, j in pairs:
                if not torch.equal(a[i], b[j]) and not _same_nans(a[i], b[j]):
                    if self.dataset.views is None:
                        raise ValueError(
                            f"FeatureCache: sample {picked[i]} of the dataset differs each time it "
                            "is drawn, so it has a random transform. Remove that, or give views=K, "
                            "which stores K draws of each sample."
                        )
                    raise ValueError(
                        f"FeatureCache: sample {picked[i]} of the dataset differs although torch, "
                        "random and numpy were seeded alike. Let its transforms take their random "
                        "numbers from these."
                    )

    def _begin(self, plan: Plan) -> None:
        """Use a plan from now on."""
        digests = self._digests_of(plan)
        made_from = self._made_from(plan, digests)
        key = _hashed(sorted(made_from.items()))
        stored_as = plan.of_calls
        columns = [
            Column(
                s.name,
                s.shape,
                self._dtype
                if self._dtype is not None and n in stored_as and s.dtype.is_floating_point
                else s.dtype,
            )
            for n, s in enumerate(plan.slots)
        ]
        rows = len(self.dataset) * (self.dataset.views or 1)
        if key in self._sources:
            store = self._sources.pop(key).store
        else:
            store = open_store(self._root, key, columns, rows, made_from)
        names = [self._tree.modules[id(m)].name for m in plan.modules]
        now = _Source(key, plan, store, names, digests, self._cast(), self._modes(plan))
        now.hooks = now.hooks_now()
        self._check_against_store(now)
        self._sources[key] = now
        self._now = now
        self._state = self._look()
        self.dataset.stores[key] = store
        self.dataset.targets = plan.targets
        self.dataset.target_dims = tuple(plan.slots[slot].dim for slot, _ in plan.of_targets)
        self._drop_invalid()

    def _end(self) -> None:
        """Run the whole model from now on."""
        self._now = None
        self._state = self._look()
        self._drop_invalid()

    def _drop_invalid(self) -> None:
        """Forget features whose prefix trains now or has other values."""
        for key, source in list(self._sources.items()):
            if source is self._now:
                continue
            if (
                not source.still_frozen()
                or self._digests_of(source.plan) != source.digests
                or self._modes(source.plan) != source.modes
                or source.hooks_now() != source.hooks
            ):
                self._drop(key)
        now = [] if self._now is None else [self._now.key]
        cast = self._cast()
        older = [
            key
            for key, source in reversed(self._sources.items())
            if key not in now and source.cast == cast
        ]
        self.dataset.board.put([*now, *older][:16])
        self._drop_shallower()

    def _drop_shallower(self) -> None:
        """Forget features of earlier boundaries when all samples have those of the last."""
        now = self._now
        if len(self._sources) > 1 and now is not None and not len(now.store.missing):
            for key, source in list(self._sources.items()):
                if source is not now and source.cast == now.cast:  # others may come back
                    self._drop(key)
            self.dataset.board.put([now.key])

    def _drop(self, key: str) -> None:
        source = self._sources.pop(key)
        self.dataset.stores.pop(key, None)
        if self._old == "delete":
            source.store.delete()

    def _made_from(self, plan: Plan, digests: dict[str, str]) -> dict[str, Any]:
        """All that features depend on, for the key of the store and its manifest."""
        witness = _hashed([_hashed(value) for value in tree_flatten(self._witness)[0]])
        modes = "".join("01"[m.training and not self._eval_frozen] for m in plan.modules)
        return {
            "model": type(self._bare).__qualname__,
            "boundary": [
                *([call.name, call.ordinal] for k, call in plan.calls.items() if k in plan.stored),
                *([f"the input of {given.name}", given.ordinal] for given in plan.given.values()),
            ],
            "slots": [[s.name, list(s.shape), str(s.dtype)] for s in plan.slots],
            "tensors": _hashed(list(digests.items())),
            # What activation, stride and so on; without addresses of functions.
            "modules": _hashed(
                [re.sub("0x[0-9a-f]+", "", repr(c.module)) for c in plan.calls.values()]
            ),
            "modes": _hashed(modes),
            "hooks": _hashed(
                [
                    getattr(hook, "__qualname__", type(hook).__qualname__)
                    for m in plan.modules
                    for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
                ]
            ),
            "changes of hooks": self._hooks_changed,
            "autocast": str(self._cast()),
            "torch": ".".join(torch.__version__.split(".")[:2]),
            "samples": len(self.dataset),
            "views": self.dataset.views,
            "first, middle and last sample": witness,
            "version": str(self._version),
            "dtype": str(self._dtype),
            "eval_frozen": self._eval_frozen,
            "frozen_dtype": str(self._frozen_dtype),
            "compile_frozen": self._compile_frozen,
        }

    def _digests_of(self, plan: Plan) -> dict[str, str]:
        """Hashes of all tensors that the features depend on."""
        whole = {}
        for name, tensor in plan.tensors.items():
            version, alias, digest = self._digests.get(tensor, (None, tensor, ""))
            if version != tensor._version or alias.data_ptr() != tensor.data_ptr():
                digest = _hashed(tensor)
                self._digests[tensor] = (tensor._version, tensor.detach(), digest)
            whole[name] = f"{tensor.dtype} {list(tensor.shape)} {digest}"
        return whole

    # --------------------------------------------------------------------------- checks of content

    def _check_against_store(self, source: _Source) -> None:
        """Compare what an older run stored of a sample with what the model computes now."""
        stored = source.store.has(torch.arange(source.store.rows)).nonzero().flatten()
        if len(stored):
            self._compare(source, stored[[*{0, len(stored) // 2, len(stored) - 1}]])

    def _check_now_and_then(self, rows: torch.Tensor) -> None:
        """Compute a stored sample again when enough time has gone by since the last one."""
        if self._now is None or not self._spot_check:
            return
        began = time.monotonic()
        if began - self._checked < self._check_seconds * (1 / self._spot_check - 1):
            return
        row = rows[torch.randint(len(rows), (1,), generator=_own_generator)]
        if self._now.store.has_all(row):
            self._compare(self._now, row)
        self._checked = time.monotonic()
        self._check_seconds = self._checked - began

    def _compare(self, source: _Source, rows: torch.Tensor) -> None:
        if not len(rows):
            return
        with kept_random_state(seed=0):
            now = self._prefix(source.plan, self.dataset.raw(rows))
        stored = source.store.read(rows)
        for slot, a, b in zip(source.plan.slots, stored, now, strict=True):
            if a.dtype != slot.dtype:
                b = b.to(a.dtype)
            for row, one, two in zip(rows.tolist(), a, b.cpu(), strict=True):
                if not near(one, two):
                    fix = f"delete {source.store.path}" if source.store.path else "make it again"
                    index = row // (self.dataset.views or 1)
                    raise RuntimeError(
                        f"FeatureCache: {slot.name} of sample {index} is stored with other values "
                        "than the model computes now. The dataset gives another sample under this "
                        "index than before, or the frozen part was changed without a trace "
                        f"(through .data). Undo that; or {fix}, or give another version=... after "
                        "an edit of the dataset."
                    )

    @contextmanager
    def _attached(self) -> Iterator[None]:
        def handler(module: nn.Module, ordinal: int, args: Any, kwargs: Any, usual: Any) -> Any:
            given = [*args, *(value for value in kwargs.values() if value is not None)]
            if len(given) == 1 and isinstance(given[0], CachedInputs):
                return self(given[0])
            return usual(*args, **kwargs)

        with taken_over([self.model], handler):
            yield


class _Missing(Dataset[Any]):
    def __init__(self, dataset: CachedDataset, rows: torch.Tensor) -> None:
        self.dataset, self.missing = dataset, rows

    def __len__(self) -> int:
        return len(self.missing)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        row = self.missing[index : index + 1]
        return int(row), self.dataset.load(row)[0]


def _collate_missing(dataset: CachedDataset, loaded: list[tuple[int, Any]]) -> Any:
    rows = torch.tensor([row for row, _ in loaded])
    return rows, split(dataset.collate_fn([sample for _, sample in loaded]))


def _shown(loader: Any, samples: int, batch_size: int, progress: bool) -> Iterator[Any]:
    if not progress or not samples:
        yield from loader
        return
    try:
        from tqdm import tqdm
    except ImportError:
        for n, batch in enumerate(loader):
            yield batch
            done = min((n + 1) * batch_size, samples)
            print(f"\rFeatureCache: {done} of {samples}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        return
    with tqdm(total=samples, desc="FeatureCache", unit="sample") as bar:
        for batch in loader:
            yield batch
            bar.update(len(batch[0]))


_own_generator = torch.Generator()  # not the user's random numbers


def _close(stores: dict[str, Any], board: Path | None) -> None:
    for store in stores.values():
        if store is not None:
            store.flush()
    if board is not None:
        board.unlink(missing_ok=True)


def _hashed(value: Any) -> str:
    """A hash of what a tensor holds, or of what any other value prints as."""
    if not isinstance(value, torch.Tensor):
        return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()
    flat = value.detach().cpu().contiguous()
    count = flat.numel() * flat.element_size()
    # Not through NumPy, which torch does not need and which has no bfloat16.
    content = (ctypes.c_char * count).from_address(flat.data_ptr()) if count else b""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _copied(inputs: Inputs) -> Any:
    return tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, inputs)


def _same_nans(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num())


def _one_module(tree: Tree, at: Any) -> nn.Module:
    found = select(tree, as_selectors(at), "FeatureCache")
    heads = list(found.heads.values())
    if len(heads) != 1:
        raise ValueError(
            f"FeatureCache: at={at!r} must name one module; it names "
            f"{_format.listed(entry.name for entry in heads) or 'none'}."
        )
    return heads[0].module


def _check_arguments(
    dataset: Any,
    dtype: torch.dtype | None,
    views: int | None,
    on_change: str,
    old: str,
    frozen_dtype: torch.dtype | None,
    spot_check: float,
) -> None:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"FeatureCache: {type(dataset).__name__} gives samples without an index, by which "
            "features are stored. Use a map-style dataset (with __getitem__ and __len__)."
        )
    if not hasattr(dataset, "__len__"):
        raise TypeError(f"FeatureCache: {type(dataset).__name__} has no __len__.")
    if len(dataset) == 0:
        raise ValueError("FeatureCache: the dataset is empty.")
    for name, kind in (("dtype", dtype), ("frozen_dtype", frozen_dtype)):
        if kind is not None and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
            raise ValueError(f"FeatureCache: {name}={kind!r} must be a floating dtype.")
    if views is not None and (isinstance(views, bool) or not isinstance(views, int) or views < 1):
        raise ValueError(f"FeatureCache: {views=} must be an int of at least 1.")
    for name, value, allowed in (
        ("on_change", on_change, ("raise", "refill")),
        ("old", old, ("delete", "keep")),
    ):
        if value not in allowed:
            raise ValueError(f"FeatureCache: {name}={value!r} must be one of {allowed}.")
    if not 0 <= spot_check <= 1:
        raise ValueError(f"FeatureCache: {spot_check=} must be between 0 and 1.")
