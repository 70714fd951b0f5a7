"""Rows of tensors in files that processes share: one file per tensor, and a byte per row.

A store is a folder with

- `manifest.json`: names, shapes and dtypes, written last and in one step, so that a folder without
  it is not a store;
- `slot00.bin`, `slot01.bin`, ...: the rows of each tensor, allocated in full when it is made;
- `written.bin`: a byte per row, 0 for missing, 1 for written, 2 for written and on the disk.

Reading it runs no code from it. After a power failure, rows that may not have reached the disk
count as missing: the manifest names the boot of the last writer.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torch_freeze import _format

_FORMAT = 1
_MANIFEST = "manifest.json"
_FLUSH_EVERY = 30.0  # seconds


@dataclass(frozen=True, slots=True)
class Column:
    """A tensor that every row has."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def to_json(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Column:
        """The column that a manifest names."""
        dtype = getattr(torch, saved["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{saved['dtype']!r} is no dtype")
        shape = tuple(saved["shape"])
        if not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(f"{shape} is no shape")
        return cls(str(saved["name"]), shape, dtype)


class Store:
    """Rows of some tensors, in a folder or in memory; see the module."""

    def __init__(self, path: Path | None, columns: Sequence[Column], rows: int) -> None:
        """Map files that are there, or memory that forked processes share."""
        self.path = path
        self.columns = tuple(columns)
        self.rows = rows
        self._flushed = time.monotonic()
        self._files = [_mapped(self._file(n), rows * c.nbytes) for n, c in enumerate(self.columns)]
        self._flag_file = _mapped(path and path / "written.bin", rows)
        self._data = [
            _bytes(file, rows * c.nbytes).view(c.dtype).view(rows, *c.shape)
            for file, c in zip(self._files, self.columns, strict=True)
        ]
        self._written = 0  # the rows before this one, all of them
        self._flags = _bytes(self._flag_file, rows)

    def _file(self, number: int) -> Path | None:
        return self.path and self.path / f"slot{number:02}.bin"

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, in files or memory."""
        return self.rows * (1 + sum(column.nbytes for column in self.columns))

    @property
    def count(self) -> int:
        """How many rows are written."""
        return int(self._flags.count_nonzero())

    @property
    def missing(self) -> torch.Tensor:
        """The rows that are not written, as int64."""
        return (self._flags == 0).nonzero().flatten()

    def has(self, rows: torch.Tensor) -> torch.Tensor:
        """Which of the rows are written, as bool."""
        return self._flags[rows] != 0

    def has_all(self, rows: torch.Tensor) -> bool:
        """Whether all of the rows are written."""
        if self._written < self.rows:
            missing = self._flag_file.find(b"\0", self._written, self.rows)
            self._written = self.rows if missing < 0 else missing
        return self._written == self.rows or bool(self._flags.index_select(0, rows).all())

    def read(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """The columns of some rows (int64 of shape [n]), each of shape [n, *column.shape]."""
        return [data.index_select(0, rows) for data in self._data]

    def write(self, rows: torch.Tensor, columns: Sequence[torch.Tensor]) -> None:
        """Write those rows that are missing; columns are as `read` gives them, on any device."""
        todo = (self._flags[rows] == 0).nonzero().flatten()
        if not len(todo):
            return
        whole = len(todo) == len(rows)
        rows = rows if whole else rows[todo]
        for data, value, c in zip(self._data, columns, self.columns, strict=True):
            if tuple(value.shape[1:]) != c.shape:
                raise ValueError(
                    f"FeatureCache: {c.name} has shape {list(value.shape[1:])} for a sample, and "
                    f"{list(c.shape)} for those stored before; samples must all have one shape. "
                    "Pad text to one length (padding='max_length'), resize images."
                )
            value = value if whole else value[todo.to(value.device)]
            data[rows] = value.detach().to("cpu", c.dtype)
        self._flags[rows] = 1  # after the data, so that whoever sees it finds them
        if time.monotonic() - self._flushed > _FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Wait until everything written is on the disk."""
        if self.path is not None:
            waiting = self._flags == 1
            if bool(waiting.any()):
                for file in self._files:
                    file.flush()
                self._flags[waiting] = 2
                self._flag_file.flush()
        self._flushed = time.monotonic()

    def delete(self) -> None:
        """Give the disk space back. Processes that have it open keep it until they close it."""
        if self.path is not None:
            with locked(self.path.parent):
                _remove(self.path)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is None:
            raise in_memory()
        return Store, (self.path, self.columns, self.rows)


def in_memory() -> TypeError:
    """The error where something in memory would be sent to a process that was not forked."""
    return TypeError(
        "FeatureCache: features in memory cannot be reached from processes that are spawned. Give "
        "FeatureCache a folder, or let the DataLoader fork its workers."
    )


def open_store(
    root: Path | None, key: str, columns: Sequence[Column], rows: int, made_from: dict[str, Any]
) -> Store:
    """The store with this key below `root`, made if it is not there; in memory without a root.

    Raises:
        OSError: there is not enough space (errno ENOSPC), or the folder cannot be written.
    """
    needed = rows * (1 + sum(column.nbytes for column in columns))
    if root is None:
        return Store(None, columns, rows)
    root.mkdir(parents=True, exist_ok=True)
    path = root / key
    with locked(root):
        manifest = {
            "format": _FORMAT,
            "key": key,
            "rows": rows,
            "columns": [column.to_json() for column in columns],
            "made_from": made_from,
        }
        found = _manifest(path) if path.is_dir() else None
        same = found is not None and {**found, "boot": None} == {**manifest, "boot": None}
        if found is not None and same and _complete(path, columns, rows):
            store = Store(path, columns, rows)
            if found.get("boot") != _boot() or not _boot():
                store._flags[store._flags == 1] = 0  # may not have reached the disk
                _write_manifest(path, manifest)
            return store
        if found is not None or (path / _MANIFEST).exists():
            warnings.warn(
                f"FeatureCache: {path} is damaged and is filled again.",
                RuntimeWarning,
                stacklevel=4,
            )
        _remove(path)
        free = shutil.disk_usage(root).free
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"FeatureCache: the features take {_format.size(needed)} and {str(root)!r} has "
                f"{_format.size(free)} free. Store them as dtype=torch.bfloat16, choose a boundary "
                "with smaller outputs (at=...), or another folder",
            )
        path.mkdir(exist_ok=True)  # what is not of a store was left
        try:
            for n, column in enumerate(columns):
                _allocate(path / f"slot{n:02}.bin", rows * column.nbytes)
            _allocate(path / "written.bin", rows)
            _write_manifest(path, manifest)
        except BaseException:
            _remove(path)
            raise
        return Store(path, columns, rows)


def find_store(root: Path | None, key: str) -> Store | None:
    """The store with this key as its manifest describes it, or None."""
    found = _manifest(root / key) if root is not None else None
    if root is None or found is None:
        return None
    columns = [Column.from_json(saved) for saved in found["columns"]]
    if not _complete(root / key, columns, found["rows"]):
        return None
    try:
        return Store(root / key, columns, found["rows"])
    except (OSError, ValueError):  # another process deleted it just now
        return None


def _manifest(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((path / _MANIFEST).read_text())
        columns = [Column.from_json(saved) for saved in found["columns"]]
        if found["format"] != _FORMAT or not isinstance(found["rows"], int) or not columns:
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return dict(found)


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    new = path / f"{_MANIFEST}.{os.getpid()}"
    with new.open("w") as file:
        json.dump({**manifest, "boot": _boot()}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path / _MANIFEST)


def _boot() -> str:
    """Names the time since the machine was started; "" if that is not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _complete(path: Path, columns: Sequence[Column], rows: int) -> bool:
    sizes = {f"slot{n:02}.bin": rows * c.nbytes for n, c in enumerate(columns)}
    sizes["written.bin"] = rows
    try:
        return all((path / name).stat().st_size == max(size, 1) for name, size in sizes.items())
    except OSError:
        return False


def _allocate(path: Path, size: int) -> None:
    """A file of zeros whose space is taken: a full disk is an error here, and no crash later."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(size, 1))


def _mapped(path: Path | None, size: int) -> mmap.mmap:
    if path is None:
        return mmap.mmap(-1, max(size, 1))
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), max(size, 1))


def _bytes(file: mmap.mmap, size: int) -> torch.Tensor:
    return torch.frombuffer(file, dtype=torch.uint8)[:size]


def _remove(path: Path) -> None:
    """Remove a store, the manifest first, and nothing that is not of one."""
    (path / _MANIFEST).unlink(missing_ok=True)
    for pattern in ("slot[0-9][0-9]*.bin", "written.bin", f"{_MANIFEST}.*"):
        for file in path.glob(pattern):
            file.unlink(missing_ok=True)
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Let no other process make or remove anything in a folder, inside the block only."""
    with (root / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
