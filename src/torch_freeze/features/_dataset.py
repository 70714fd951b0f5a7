"""The dataset that hands out stored features where they are, and samples where they are not."""

from __future__ import annotations

import fcntl
import mmap
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset, default_collate, get_worker_info
from torch.utils.data._utils.collate import default_collate_fn_map

from ._plan import Inputs, Structure, kept_random_state, placed
from ._store import Store, find_store, in_memory, locked

_KEY_LENGTH = 32


@dataclass
class CachedInputs:
    """The inputs of a batch, for `FeatureCache.__call__`.

    Attributes:
        rows: int64 of shape [n]; for sample i of K views, i * K + view.
        store: key of the store that `slots` come from, or None.
        slots: what is stored of the samples, or None.
        raw: arguments of the model and targets as the dataset gives them, or None.
        owner: names the FeatureCache whose dataset they are of.
    """

    rows: torch.Tensor
    store: str | None = None
    slots: list[torch.Tensor] | None = None
    raw: tuple[Inputs, Any] | None = None
    owner: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: Any, non_blocking: bool = False) -> CachedInputs:
        """The same on a device."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> CachedInputs:
        """The same in pinned memory; DataLoader(pin_memory=True) calls it."""
        return self._map(lambda t: t.pin_memory())

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> CachedInputs:
        def each(value: Any) -> Any:
            return function(value) if isinstance(value, torch.Tensor) else value

        slots, raw = tree_map(each, (self.slots, self.raw))
        return CachedInputs(self.rows, self.store, slots, raw, self.owner)


class Batch(NamedTuple):
    """What a DataLoader over `FeatureCache.dataset` yields."""

    inputs: CachedInputs
    targets: Any


@dataclass
class Samples:
    """Some samples before they are collated; also a batch, for a DataLoader that collates none."""

    owner: CachedDataset
    rows: torch.Tensor
    store: str | None = None
    slots: list[torch.Tensor] | None = None
    raw: list[Any] | None = None

    @property
    def inputs(self) -> CachedInputs:
        """Those of a batch of these samples."""
        return self.owner.collate([self]).inputs

    @property
    def targets(self) -> Any:
        """Those of a batch of these samples."""
        return self.owner.collate([self]).targets

    def __reduce__(self) -> tuple[Any, ...]:  # a worker sends them, so they are not collated later
        return Batch, tuple(self.owner.collate([self]))

    def __iter__(self) -> Any:
        raise TypeError(
            "FeatureCache: its dataset gives no single samples to collate. Give the collate_fn to "
            "FeatureCache(..., collate_fn=...), and none to the DataLoader. With batch_size=None, "
            "use batch.inputs and batch.targets."
        )


class Board:
    """The keys of the stores to look into, best first, as all processes see them.

    Every process that has one in a folder open holds a lock on its file, which ends with the
    process.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        if path is None:
            self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        else:
            self._file = path.open("r+b")
            fcntl.flock(self._file, fcntl.LOCK_SH)
            self._memory = mmap.mmap(self._file.fileno(), mmap.PAGESIZE)

    def put(self, keys: Sequence[str]) -> None:
        """Show these keys."""
        # A reader that comes in between sees none, or a key that the training process checks again.
        self._memory[0] = 0
        text = "".join(keys).encode()
        self._memory[1 : 1 + len(text)] = text
        self._memory[0] = len(keys)

    def shown(self) -> list[str]:
        """The keys."""
        text = self._memory[1 : 1 + self._memory[0] * _KEY_LENGTH].decode()
        return [text[i : i + _KEY_LENGTH] for i in range(0, len(text), _KEY_LENGTH)]

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is None:
            raise in_memory()
        return Board, (self.path,)


def new_board(root: Path) -> Board:
    """A board in a folder; those that killed processes have left there are removed."""
    root.mkdir(parents=True, exist_ok=True)
    with locked(root):
        for path in root.glob(".board-*"):
            # An error says that it is in use, of another user, or gone.
            with suppress(OSError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        path = root / f".board-{uuid.uuid4().hex}"
        path.write_bytes(bytes(mmap.PAGESIZE))
        return Board(path)


class CachedDataset(Dataset[Samples]):
    """See `FeatureCache.dataset`."""

    def __init__(
        self,
        dataset: Any,
        collate_fn: Callable[[list[Any]], Any] | None,
        views: int | None,
        root: Path | None,
        board: Board,
    ) -> None:
        self.samples = dataset
        self.length = len(dataset)
        self.owner = uuid.uuid4().hex
        self.collate_fn = default_collate if collate_fn is None else collate_fn
        self.views = views
        self.root = root
        self.board = board
        self.stores: dict[str, Store | None] = {}
        self.targets: Structure | None = None
        self.target_dims: tuple[int, ...] = ()

    def __len__(self) -> int:
        if len(self.samples) != self.length:
            raise RuntimeError(
                f"FeatureCache: the dataset has {len(self.samples)} samples now, and had "
                f"{self.length} when the FeatureCache was made. Make a new one."
            )
        return self.length

    def __getitem__(self, index: Any) -> Samples:
        # A list is what a BatchSampler gives, as the sampler of a DataLoader that collates nothing.
        return self.__getitems__(index if isinstance(index, list) else [index])[0]

    def __getitems__(self, indices: Sequence[Any]) -> list[Samples]:
        rows = self.rows(indices)
        shown = self.board.shown()
        if get_worker_info() is not None:  # a store that was deleted, and may come back filled anew
            for key in [key for key in self.stores if key not in shown and self.root is not None]:
                del self.stores[key]
        for key in shown:
            if key not in self.stores:
                self.stores[key] = find_store(self.root, key)
            store = self.stores[key]
            if store is not None and store.has_all(rows):
                return [Samples(self, rows, key, store.read(rows))]
        return [Samples(self, rows, raw=self.load(rows))]

    def rows(self, indices: Sequence[Any]) -> torch.Tensor:
        """The rows of samples, of a random view each if there are several."""
        length = len(self)
        rows = self._rows(indices, length)
        if self.views is not None:
            rows = rows * self.views + torch.randint(self.views, rows.shape)
        return rows

    @staticmethod
    def _rows(indices: Sequence[Any], length: int) -> torch.Tensor:
        if set(map(type, indices)) == {int} and min(indices) >= 0 and max(indices) < length:
            return torch.tensor(indices, dtype=torch.int64)
        checked = []
        for index in indices:
            try:
                number = index.__index__()
            except (AttributeError, TypeError):
                raise TypeError(
                    f"FeatureCache: the sampler gave {index!r}; it must give indices from 0 to "
                    f"{length - 1}, by which features are stored"
                ) from None
            if not -length <= number < length:
                raise IndexError(f"FeatureCache: sample {number} of {length}")
            checked.append(number % length)
        return torch.tensor(checked, dtype=torch.int64)

    def load(self, rows: torch.Tensor) -> list[Any]:
        """The samples as the dataset gives them, each view from a seed of its own."""
        if self.views is None:
            return [self.samples[int(row)] for row in rows]
        found = []
        for row in rows.tolist():
            with kept_random_state(seed=row + 1):
                found.append(self.samples[row // self.views])
        return found

    def raw(self, rows: torch.Tensor) -> tuple[Inputs, Any]:
        """Arguments of the model and targets of some samples."""
        return split(self.collate_fn(self.load(rows)))

    def collate(self, samples: Sequence[Samples]) -> Batch:
        """A batch of what `__getitem__` and `__getitems__` give; DataLoader's default does this."""
        for some in samples:
            if not isinstance(some, Samples) or some.owner.owner != self.owner:
                raise ValueError(
                    "FeatureCache: a batch has samples of several datasets. Give each FeatureCache "
                    "a DataLoader of its own, or make one FeatureCache of the joined dataset."
                )
        rows = samples[0].rows if len(samples) == 1 else torch.cat([some.rows for some in samples])
        keys = {some.store for some in samples}
        if None not in keys and len(keys) == 1 and self.targets is not None:
            (key,) = keys
            parts = [some.slots for some in samples if some.slots is not None]
            joined = (
                parts[0] if len(parts) == 1 else [torch.cat(s) for s in zip(*parts, strict=True)]
            )
            slots = placed(joined, self.target_dims)
            targets = self.targets.build(slots, len(rows), torch.device("cpu"))
            return Batch(CachedInputs(rows, key, joined, owner=self.owner), targets)
        # Where only some are stored, all are loaded: the batch then goes through the whole model.
        loaded: list[Any] = []
        for some in samples:
            loaded += self.load(some.rows) if some.raw is None else some.raw
        inputs, targets = split(self.collate_fn(loaded))
        return Batch(CachedInputs(rows, raw=(inputs, targets), owner=self.owner), targets)


def split(batch: Any) -> tuple[Inputs, Any]:
    """A collated batch as arguments of the model and targets.

    A tuple or list is (input, ..., targets), a mapping the model's keyword arguments (also as the
    first of a pair), anything else the only argument.
    """
    targets: Any = None
    if isinstance(batch, tuple | list) and len(batch) > 1:
        *given, targets = batch
    elif isinstance(batch, tuple | list):
        given = list(batch)
    else:
        given = [batch]
    if len(given) == 1 and isinstance(given[0], Mapping):
        return ((), {str(key): value for key, value in given[0].items()}), targets
    return (tuple(given), {}), targets


def _collate(batch: list[Samples], *, collate_fn_map: Any = None) -> Batch:
    return batch[0].owner.collate(batch)


default_collate_fn_map[Samples] = _collate
