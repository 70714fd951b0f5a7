"""Attempts to get wrong features out of a FeatureCache, to break its store, or to lose data.

The label of each sample is its index, so that a batch shows whether features and labels belong
together: its output has to be what the model gives for the samples of its labels.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import data as D  # noqa: N812
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from torch_freeze import FeatureCache, freeze, unfreeze
from torch_freeze.features import _store, cache
from torch_freeze.features._stand_in import StandIn
from torch_freeze.features._store import Column, find_store, open_store

N = 13
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
EACH_ONCE = list(range(N))
FORKED: dict[str, Any] = {"num_workers": 1, "multiprocessing_context": "fork"}

pytestmark = pytest.mark.usefixtures("one_thread")


class Data(D.Dataset[Any]):
    """(X[i], i), counted; or what `row` gives."""

    def __init__(self, row: Callable[[int], Any] | None = None, dies_at: int | None = None) -> None:
        self.x, self.loads, self.row, self.dies_at = X.clone(), 0, row, dies_at

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        self.loads += 1
        if index == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.row(index) if self.row else (self.x[index], index)


class Unloadable(Data):
    def __getitem__(self, index: int) -> Any:
        raise AssertionError(f"sample {index} was loaded")


def model_of(*layers: nn.Module, frozen: tuple[str, ...] = ("0",)) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(*layers or (nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, N)))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    freeze(model, *frozen)
    return model


def cached(model: nn.Module, dataset: Any, *args: Any, **options: Any) -> Any:
    return FeatureCache(model, dataset, *args, **{"spot_check": 0, **options})


def count(features: Any) -> int:
    return 0 if features._now is None else features._now.store.count


def labels_of(features: Any, model: nn.Module, loader: Any, x: torch.Tensor = X) -> list[int]:
    """The labels of all batches, each of which gave what the whole model gives."""
    seen: list[int] = []
    for batch in loader:
        output, whole = features(batch.inputs), model(x[batch.targets])
        # Stored from a batch of another size, they may differ in the last bits.
        torch.testing.assert_close(output, whole, rtol=1e-5, atol=1e-5)
        seen += batch.targets.tolist()
    return seen


def check_right(features: Any, model: nn.Module, **options: Any) -> None:
    """Two epochs are right, and fill what can be filled."""
    for _ in range(2):
        loader = D.DataLoader(features.dataset, 4, **options)
        assert sorted(labels_of(features, model, loader)) == EACH_ONCE
    assert count(features) in (0, N)


def first_batch(features: Any, size: int = N, **options: Any) -> Any:
    return next(iter(D.DataLoader(features.dataset, size, **options)))


# ------------------------------------------------------------- features belong to their samples

Loaders = dict[str, tuple[Callable[[Any], Any], list[int] | None]]
# fmt: off
LOADERS: Loaders = {
    "shuffled": (lambda d: D.DataLoader(d, 4, shuffle=True), EACH_ONCE),
    "shuffled by a worker": (lambda d: D.DataLoader(d, 4, shuffle=True, **FORKED), EACH_ONCE),
    "shuffled by two": (
        lambda d: D.DataLoader(d, 4, shuffle=True, **{**FORKED, "num_workers": 2}), EACH_ONCE),
    "a subset": (lambda d: D.DataLoader(D.Subset(d, [9, 3, 5]), 2, shuffle=True), [3, 5, 9]),
    "a subset of a subset": (
        lambda d: D.DataLoader(D.Subset(D.Subset(d, [9, 3, 5]), [2, 0]), 2), [5, 9]),
    "a random split": (
        lambda d: D.DataLoader(D.ConcatDataset(D.random_split(d, [5, 8])), 4), EACH_ONCE),
    "a batch sampler": (
        lambda d: D.DataLoader(d, batch_sampler=D.BatchSampler(D.RandomSampler(d), 5, False)),
        EACH_ONCE),
    "drawn with replacement": (
        lambda d: D.DataLoader(d, 8, sampler=D.RandomSampler(d, True, 40)), None),
    "duplicates in one batch": (
        lambda d: D.DataLoader(d, batch_sampler=[[3, 3, 7], [7, 3, 0]]), [0, 3, 3, 3, 7, 7]),
    "sample by sample": (
        lambda d: D.DataLoader(D.ConcatDataset([d, d]), 4, shuffle=True), sorted(EACH_ONCE * 2)),
    "not collated": (lambda d: D.DataLoader(d, batch_size=None, shuffle=True), EACH_ONCE),
    "not collated by a worker": (
        lambda d: D.DataLoader(d, batch_size=None, shuffle=True, **FORKED), EACH_ONCE),
    "a batch sampler, not collated": (
        lambda d: D.DataLoader(
            d, batch_size=None, sampler=D.BatchSampler(D.RandomSampler(d), 5, False)), EACH_ONCE),
    "indices from the end": (lambda d: D.DataLoader(d, batch_sampler=[[-1, 0, -N]]), [0, 0, 12]),
}
# fmt: on


@pytest.mark.parametrize("name", LOADERS)
def test_features_meet_the_labels_of_their_samples(name: str, tmp_path: Path) -> None:
    make, expected = LOADERS[name]
    model = model_of()
    features = cached(model, Data(), tmp_path)
    for epoch in range(3):
        if epoch == 2:
            features.fill(progress=False)
            features.dataset.samples = Unloadable()  # a hit loads nothing
        seen = labels_of(features, model, make(features.dataset))
        assert expected is None or sorted(seen) == expected


def test_batches_of_other_caches_are_refused() -> None:
    model = model_of()
    one, two = cached(model, Data()), cached(model, Data())
    for _ in range(2):
        with pytest.raises(ValueError, match="samples of several datasets"):
            next(iter(D.DataLoader(D.ConcatDataset([one.dataset, two.dataset]), 2 * N)))
        with pytest.raises(ValueError, match="of another FeatureCache"):
            one(first_batch(two).inputs)
        one.fill(progress=False)
        two.fill(progress=False)


def test_wrong_use_of_the_loader_is_refused() -> None:
    features = cached(model_of(), data := Data())
    with pytest.raises(TypeError, match="sampler gave 'a'; it must give indices from 0 to 12"):
        first_batch(features, sampler=["a"])
    with pytest.raises(IndexError, match="sample 13 of 13"):
        features.dataset[N]
    with pytest.raises(TypeError, match="Give the collate_fn to FeatureCache"):
        first_batch(features, collate_fn=lambda samples: [x for x, _ in samples])
    with pytest.raises(TypeError, match=r"With batch_size=None, use batch\.inputs"):
        _, _ = first_batch(features, None)
    with pytest.raises(TypeError, match=r"call it with batch\.inputs .* got Tensor"):
        features(X)
    data.x = torch.cat([X, X])
    with pytest.raises(RuntimeError, match="has 26 samples now, and had 13"):
        first_batch(features)


# ------------------------------------------------------------------------------- another dataset


@pytest.mark.parametrize("edited", [0, N // 2, N - 1, 4])
def test_an_edited_sample_is_noticed(edited: int, tmp_path: Path) -> None:
    model, data = model_of(), Data()
    cached(model, data, tmp_path).fill(progress=False)
    data.x[edited] += 1
    features = cached(model, data, tmp_path)
    if edited != 4:  # first, middle and last are in the key
        assert count(features) == 0
        loader = D.DataLoader(features.dataset, 4)
        assert labels_of(features, model, loader, data.x) == EACH_ONCE
        return
    assert count(features) == N
    always = cached(model, data, tmp_path, spot_check=1)
    batch = first_batch(always, sampler=[4])
    for noticing in (lambda: features.check(N), lambda: always(batch.inputs)):
        with pytest.raises(RuntimeError, match="of sample 4 is stored with other values"):
            noticing()
    assert count(cached(model, data, tmp_path, version=2)) == 0


def test_what_another_run_stored_is_compared(tmp_path: Path) -> None:
    model, data = model_of(), Data()
    features = cached(model, data, tmp_path)
    features(first_batch(features, sampler=[4]).inputs)
    data.x[4] += 1
    with pytest.raises(RuntimeError, match="of sample 4 is stored with other values"):
        cached(model, data, tmp_path)


class Flipped(Data):
    """Each sample is flipped half of the time, as its kind of random numbers says."""

    def __init__(self, kind: str, skipped: int = 0) -> None:
        super().__init__()
        own = random.Random(0)
        draws = {"torch": lambda: torch.rand(1).item(), "python": random.random, "own": own.random}
        self.draw: Callable[[], float] = draws[kind]
        self.skipped = skipped

    def __getitem__(self, index: int) -> Any:
        x, index = super().__getitem__(index)
        draw = [self.draw() for _ in range(1 + self.skipped)][-1]
        return (x if draw < 0.5 else x.flip(0)), index


@pytest.mark.parametrize("kind", ["torch", "python", "own"])
def test_random_transforms_are_refused(kind: str) -> None:
    for skipped in range(10):  # other random numbers; none of them hides it
        with pytest.raises(ValueError, match=r"differs each time.*views=K"):
            cached(model_of(), Flipped(kind, skipped))
    if kind == "own":
        with pytest.raises(ValueError, match="although torch, random and numpy were seeded alike"):
            cached(model_of(), Flipped(kind), views=2)


def test_views_are_bounded_and_the_same_each_time(tmp_path: Path) -> None:
    model, views = model_of(), 3
    drawn: list[set[int]] = [set() for _ in range(N)]
    for run in range(2):
        features = cached(model, Flipped("torch"), tmp_path, views=views)
        assert count(features) == (N * views if run else 0)
        features.check(N * views)
        for _ in range(12):
            for batch in D.DataLoader(features.dataset, 4, shuffle=True):
                features(batch.inputs)
                for row, label in zip(batch.inputs.rows.tolist(), batch.targets, strict=True):
                    assert row // views == label
                    drawn[label].add(row)
        features.fill(progress=False)
        features.dataset.samples = Unloadable()
        assert features(first_batch(features).inputs).shape == (N, N)
    assert all(len(rows) == views for rows in drawn)
    values = features._now.store.read(torch.arange(N * views))[1].view(N, views, -1)
    assert {len(v.unique(dim=0)) for v in values} == {1, 2}  # as it is, and flipped


# --------------------------------------------------------------------- each condition has a store

# fmt: off
CONDITIONS: dict[str, Callable[[Any], Any]] = {
    "weights": lambda m: m[0].weight.data.add_(1),
    "one number of a bias": lambda m: m[0].bias.data[3].add_(1e-6),
    "mode": lambda m: m[0].eval(),
    "a hook": lambda m: m[0].register_forward_hook(lambda m, a, out: 2 * out),
    "another activation": lambda m: m.__setitem__(1, nn.GELU()),
    "boundary": lambda m: freeze(m, "2"),
    "dtype": lambda m: {"dtype": torch.bfloat16},
    "frozen_dtype": lambda m: {"frozen_dtype": torch.bfloat16},
    "compile_frozen": lambda m: {"compile_frozen": True},
    "eval_frozen": lambda m: {"eval_frozen": True},
    "views": lambda m: {"views": 2},
    "version": lambda m: {"version": 1},
    "autocast": lambda m: None,
    "torch version": lambda m: None,
}
# fmt: on


@pytest.mark.parametrize("name", CONDITIONS)
def test_other_conditions_have_another_store(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(model_of(), Data(), tmp_path).fill(progress=False)
    assert count(cached(model_of(), Data(), tmp_path)) == N
    options = CONDITIONS[name](model := model_of())
    if name == "torch version":
        monkeypatch.setattr(torch, "__version__", "99.0")
    with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
        options = options if isinstance(options, dict) else {}
        assert count(cached(model, Data(), tmp_path, **options)) == 0


@pytest.mark.parametrize("in_memory", [False, True])
def test_autocast_may_be_entered_and_left(in_memory: bool, tmp_path: Path) -> None:
    model = model_of(frozen=("0", "2"))
    features = cached(model, Data(), None if in_memory else tmp_path)
    batch = first_batch(features)
    for epoch in range(3):
        for bfloat16 in (False, True) * 2:
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                for _ in range(2):  # the first one was loaded under the other
                    assert torch.equal(features(batch.inputs), model(X))
                    batch = first_batch(features)
                    assert epoch == 0 or batch.inputs.slots is not None
                assert epoch == 0 or features.stored == N
            assert epoch == 0 or len(features._sources) == 2  # neither took the other's place


# -------------------------------------------------------------------------------------- processes


def fill_part(rank: int, folder: str, barrier: Any) -> None:
    torch.set_num_threads(1)
    barrier.wait(60)  # so that they make the store at the same time
    features = cached(model_of(), Data(), folder)
    sampler: Any = D.DistributedSampler(features.dataset, 2, rank)
    labels_of(features, model_of(), D.DataLoader(features.dataset, 3, sampler=sampler))


def test_processes_that_fill_a_part_each_miss_nothing(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(2)
    ranks = [spawn.Process(target=fill_part, args=(r, str(tmp_path), barrier)) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    features = cached(model_of(), Data(), tmp_path)
    assert count(features) == N
    features.dataset.samples = Unloadable()
    check_right(features, model_of())


def killed(target: Callable[..., Any], *args: Any) -> None:
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def fill_until_it_dies(folder: Path) -> None:
    cached(model_of(), Data(dies_at=9), folder).fill(4, progress=False)


def test_a_killed_fill_goes_on(tmp_path: Path) -> None:
    killed(fill_until_it_dies, tmp_path)
    features, clean = cached(model_of(), data := Data(), tmp_path), cached(model_of(), Data())
    assert count(features) == 8
    data.loads = 0
    features.fill(4, progress=False)
    clean.fill(4, progress=False)
    assert data.loads == N - 8
    stores = [f._now.store.read(torch.arange(N)) for f in (features, clean)]
    assert all(map(torch.equal, *stores))


COLUMNS = (Column("a", (2,), torch.float32), Column("b", (), torch.int64))
ROW = (torch.ones(1, 2), torch.ones(1))


def write_until_it_dies(folder: Path) -> None:
    def columns() -> Iterator[torch.Tensor]:
        yield torch.ones(3, 2)
        os.kill(os.getpid(), signal.SIGKILL)

    store: Any = open_store(folder, "k", COLUMNS, 5, {})
    store.write(torch.tensor([4]), ROW)
    store.write(torch.arange(3), columns())


def test_a_row_that_is_half_written_is_missing(tmp_path: Path) -> None:
    killed(write_until_it_dies, tmp_path)
    assert open_store(tmp_path, "k", COLUMNS, 5, {}).missing.tolist() == [0, 1, 2, 3]


def test_after_another_boot_only_what_was_flushed_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path, "k", COLUMNS, 5, {})
    store.write(torch.tensor([1]), ROW)
    store.flush()
    store.write(torch.tensor([2]), ROW)
    assert open_store(tmp_path, "k", COLUMNS, 5, {}).missing.tolist() == [0, 3, 4]
    for boot in ("another", "", ""):  # "": not known, so it may be another
        monkeypatch.setattr(_store, "_boot", lambda boot=boot: boot)
        store = open_store(tmp_path, "k", COLUMNS, 5, {})
        assert store.missing.tolist() == [0, 2, 3, 4]
        store.write(torch.tensor([2]), ROW)


def test_a_store_that_goes_while_a_worker_opens_it_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path, "k", COLUMNS, 5, {})
    monkeypatch.setattr(_store, "_complete", lambda *args: store.delete() is None)
    assert find_store(tmp_path, "k") is None


def wait_in(folder: Path, made: Any, end: Any) -> None:
    features = cached(model_of(), Data(), folder)
    made.set()
    end.wait(60)
    del features


def test_what_killed_processes_leave_is_removed_and_what_is_in_use_is_not(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    made, end = fork.Event(), fork.Event()
    process = fork.Process(target=wait_in, args=(tmp_path, made, end))
    process.start()
    assert made.wait(60)
    (used,) = tmp_path.glob(".board-*")
    killed(fill_until_it_dies, tmp_path)
    (left,) = {*tmp_path.glob(".board-*")} - {used}
    one = cached(model_of(), Data(), tmp_path)
    two = cached(model_of(), Data(), tmp_path)
    boards = {one.dataset.board.path, two.dataset.board.path}
    assert {*tmp_path.glob(".board-*")} == {used, *boards}
    assert left not in boards
    end.set()
    process.join(60)
    assert process.exitcode == 0
    assert {*tmp_path.glob(".board-*")} == boards


# ------------------------------------------------------------------------------------ the folder


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def text(content: bytes) -> Callable[[Path], Any]:
    return lambda store: (store / "manifest.json").write_bytes(content)


def edit(column: dict[str, Any] | None = None, **changes: Any) -> Callable[[Path], Any]:
    def apply(store: Path) -> None:
        manifest = json.loads((store / "manifest.json").read_text())
        manifest["columns"][0] |= column or {}
        (store / "manifest.json").write_text(json.dumps({**manifest, **changes}))

    return apply


def resize(name: str, by: int) -> Callable[[Path], Any]:
    return lambda store: os.truncate(store / name, (store / name).stat().st_size + by)


# fmt: off
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "torn manifest": resize("manifest.json", -40),
    "empty manifest": text(b""),
    "manifest that is no text": text(b"\xff\xfe"),
    "manifest that is a list": text(b"[1]"),
    "manifest nested too deeply": text(b"[" * 100_000),
    "pickled manifest": lambda store: text(pickle.dumps(Malicious(store.parent / "ran")))(store),
    "other format": edit(format=2),
    "no columns": edit(columns=[]),
    "fewer rows": edit(rows=N - 1),
    "negative rows": edit(rows=-1),
    "rows that are text": edit(rows="13"),
    "unknown dtype": edit({"dtype": "float31"}),
    "dtype that is a function": edit({"dtype": "load"}),
    "dtype that is a number": edit({"dtype": 1}),
    "other dtype": edit({"dtype": "int32"}),
    "negative shape": edit({"shape": [-1, -6]}),
    "shape that is a number": edit({"shape": 6}),
    "slot cut off": resize("slot01.bin", -1),
    "slot too long": resize("slot01.bin", 1),
    "slot missing": lambda store: (store / "slot00.bin").unlink(),
    "written.bin cut off": resize("written.bin", -1),
}
# fmt: on


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_store_is_filled_again(name: str, tmp_path: Path) -> None:
    model = model_of()
    features = cached(model, Data(), tmp_path)
    features.fill(progress=False)
    key = features._now.key
    foreign = [tmp_path / "notes.txt", tmp_path / key / "notes.txt", tmp_path / key / "slot_of.bin"]
    for path in foreign:
        path.write_text("mine")
    DAMAGES[name](tmp_path / key)
    assert find_store(tmp_path, key) is None
    with pytest.warns(RuntimeWarning, match="is damaged and is filled again"):
        features = cached(model, Data(), tmp_path)
    assert count(features) == 0
    check_right(features, model)
    assert all(path.read_text() == "mine" for path in foreign)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("lost", ["the manifest", "its boot"])
def test_an_unfinished_manifest_is_written_again(lost: str, tmp_path: Path) -> None:
    features = cached(model_of(), Data(), tmp_path)
    manifest = tmp_path / features._now.key / "manifest.json"
    saved = json.loads(manifest.read_text())
    del saved["boot"]
    manifest.unlink()
    if lost == "its boot":
        manifest.write_text(json.dumps(saved))
    check_right(cached(model_of(), Data(), tmp_path), model_of())
    assert json.loads(manifest.read_text())["boot"] == _store._boot()


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file"):
        cached(model_of(), Data(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        cached(model_of(), Data(), tmp_path)


@pytest.mark.parametrize("when", ["before", "while it is made"])
def test_a_disk_that_is_too_small_has_nothing_left_on_it(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    allocate, calls = os.posix_fallocate, []

    def full(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(*args)

    if when == "before":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    monkeypatch.setattr(os, "posix_fallocate", full)
    message = "features take 429 B .* has 100 B free" if when == "before" else "No space left"
    with pytest.raises(OSError, match=message) as caught:
        cached(model_of(), Data(), tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert {path.name for path in tmp_path.iterdir()} == {"mine", ".lock"}


# ---------------------------------------------------------------------------- changes in between


def step(model: Any) -> None:
    model.requires_grad_(True)
    model(X).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    freeze(model, "0", "1")


def load(model: Any, **options: Any) -> None:
    state = {k: v + 1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, **options)
    freeze(model, "0", "1")


def replace(model: Any) -> None:
    model[0].weight = nn.Parameter(torch.randn(6, 4), requires_grad=False)


def replace_module(model: Any) -> None:
    model[0] = nn.Linear(4, 6).requires_grad_(False)


def replace_hook(model: Any) -> None:
    model[0]._forward_hooks.clear()
    factor = float(torch.rand(()))
    model[0].register_forward_hook(lambda module, args, out: factor * out)


BOTH = r"0\.bias, 0\.weight"
FORWARD = "the hooks or the forward of 0"
# fmt: off
CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "an optimizer's step": (step, BOTH),
    "written in place": (lambda m: m[0].weight.add_(1), r"0\.weight"),
    "copied into": (lambda m: m[0].bias.copy_(torch.randn(6)), r"0\.bias"),
    "one element": (lambda m: m[0].weight[5, 3].mul_(2), r"0\.weight"),
    "load_state_dict": (load, BOTH),
    "load_state_dict, assigned": (lambda m: load(m, assign=True), BOTH),
    "new data": (lambda m: setattr(m[0].weight, "data", torch.randn(6, 4)), r"0\.weight"),
    "new parameter": (replace, r"0\.weight"),
    "new module": (replace_module, "0 was replaced"),
    "no bias": (lambda m: m[0].register_parameter("bias", None), r"0\.bias was replaced"),
    "new hook": (lambda m: m[0].register_forward_hook(lambda m, a, out: 2 * out), FORWARD),
    "another hook of the same name": (replace_hook, FORWARD),
    "new hook before": (
        lambda m: m[0].register_forward_pre_hook(lambda m, args: (args[0] * 2,)), FORWARD),
    "new forward": (lambda m: setattr(m[0], "forward", lambda x: x.new_ones(len(x), 6)), FORWARD),
    "float64": (lambda m: m.double(), BOTH),
    "bfloat16 and back": (lambda m: m.bfloat16().float(), BOTH),
    "statistics": (lambda m: m[1].running_mean.add_(1), r"1\.running_mean"),
    "new statistics": (lambda m: setattr(m[1], "running_mean", torch.randn(6)), "1.running_mean"),
    "statistics after a move": (
        lambda m: (m.double(), m.float(), m[1].running_var.mul_(2)), r"1\.running_var"),
}
# fmt: on


class InDtypeOf(nn.Sequential):
    """Takes its input, and gives its output, in any dtype of its parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self[2].weight.dtype)).float()  # type: ignore[arg-type]


@pytest.mark.parametrize("on_change", ["raise", "refill"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_prefix_is_noticed(name: str, on_change: str, tmp_path: Path) -> None:
    change, message = CHANGES[name]
    torch.manual_seed(0)
    model = InDtypeOf(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, N))
    freeze(model, "0", "1")
    features = cached(model, Data(), tmp_path, on_change=on_change)
    for _ in range(2):  # in part, so that old and new features could be mixed
        batch = first_batch(features, 3, sampler=[3, 4, 5])
        features(batch.inputs)
    assert batch.inputs.slots is not None
    for times in range(2):
        with torch.set_grad_enabled(name == "an optimizer's step"):
            change(model)
        if on_change == "raise":
            with pytest.raises(RuntimeError, match=f"{message}.*since the features were stored"):
                features(batch.inputs)
        else:
            labels_of(features, model, [batch])
            check_right(features, model, shuffle=times == 1)
            batch = first_batch(features, 3, sampler=[3, 4, 5])


def test_what_is_undone_was_no_change() -> None:
    model = model_of()
    features = cached(model, Data())
    features.fill(progress=False)
    module, weight = model[0], model[0].weight
    for _ in range(2):
        for change, message in (
            (replace, r"0\.weight changed"),
            (replace_module, "0 was replaced"),
        ):
            change(model)
            with pytest.raises(RuntimeError, match=message):
                features.check()
            model[0], module.weight = module, weight
            features.check()
        model.double().float()  # rounds nothing
    features.dataset.samples = Unloadable()
    check_right(features, model)


class Blocks:
    """Gives out memory as allocators do: first what was freed."""

    def __init__(self) -> None:
        self.memory = bytearray(4096)
        self.given: dict[int, weakref.ref[Any]] = {}

    def hold(self, values: torch.Tensor) -> torch.Tensor:
        free = (n for n in range(0, 4096, 256) if n not in self.given or self.given[n]() is None)
        block = (ctypes.c_char * values.nbytes).from_buffer(self.memory, first := next(free))
        self.given[first] = weakref.ref(block)
        return torch.frombuffer(block, dtype=values.dtype).view(values.shape).copy_(values)


def test_other_values_in_memory_that_was_freed_are_noticed() -> None:
    model, blocks = model_of(), Blocks()
    weight = model[0].weight
    values, others = weight.detach().clone(), torch.randn(2, *weight.shape)
    weight.data = blocks.hold(values)
    features = cached(model, Data())
    features.fill(progress=False)
    (batch,) = D.DataLoader(features.dataset, N)
    for other in others:
        weight.data = blocks.hold(other)
        with pytest.raises(RuntimeError, match=r"0\.weight changed"):
            features(batch.inputs)
    weight.data = blocks.hold(values)
    labels_of(features, model, [batch])


def test_check_finds_what_leaves_no_trace() -> None:
    model = model_of()
    features = FeatureCache(model, Data(), spot_check=1)
    features.fill(progress=False)
    model[0].bias.data.add_(100)
    for noticing in (features.check, lambda: check_right(features, model)):
        with pytest.raises(RuntimeError, match=r"changed without a trace .*\.data"):
            noticing()


def test_computing_samples_again_takes_its_share_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(cache.time, "monotonic", lambda: clock[0])

    def load(index: int) -> Any:
        clock[0] += 1
        return X[index], index

    features = FeatureCache(model_of(), data := Data(load), spot_check=0.1)
    features.fill(progress=False)
    batch = first_batch(features)
    data.loads, began = 0, clock[0]
    for number in range(1000):
        clock[0] += 0.5
        features(batch.inputs)
        assert data.loads == 0 or number > 10
    assert 0.09 < data.loads / (clock[0] - began) <= 0.1


@pytest.mark.parametrize("old", ["delete", "keep"])
def test_requires_grad_set_by_hand_is_followed(old: str, tmp_path: Path) -> None:
    model, data = model_of(), Data()
    features = cached(model, data, tmp_path, old=old)
    check_right(features, model)
    assert features.boundary == ("1",)
    model[2].requires_grad_(False)
    data.loads = 0
    check_right(features, model)
    assert features.boundary == ("2",)
    assert data.loads < N  # to find the boundary: all others come from the features at hand
    model[0].weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"first operation .* 0\.weight.*forward is whole"):
        check_right(features, model)
    assert features.boundary == ()
    assert bool(list(tmp_path.glob("*/manifest.json"))) == (old == "keep")
    model[0].weight.data.add_(1)  # as some optimizers train
    model[0].requires_grad_(False)
    check_right(features, model)
    assert features.boundary == ("2",)


def test_unfreezing_a_norm_moves_the_boundary_and_is_no_change() -> None:
    layers = (nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6))
    model = model_of(*layers, nn.Linear(6, N), frozen=("0", "1", "2", "3"))
    features = cached(model, Data())
    check_right(features, model)
    unfreeze(model, "3")
    features(first_batch(features).inputs)
    assert features.boundary == ("2",) and layers[3].training
    freeze(model, "3")
    check_right(features, model)
    assert features.boundary == ("3",)


DROPOUT = (nn.Linear(4, 6), nn.Dropout(), nn.Linear(6, 6), nn.Linear(6, N))


def test_a_prefix_that_becomes_random_is_left_at_once() -> None:
    model = model_of(*DROPOUT, frozen=("0", "2")).eval()
    features = cached(model, Data(), on_change="refill")
    features.fill(progress=False)
    model.train()
    with pytest.warns(UserWarning, match=r"draws random numbers in 1.*forward is whole"):
        outputs = [features(first_batch(features).inputs) for _ in range(2)]
    assert not torch.equal(*outputs)


class Writing(nn.Module):
    """Writes into its input and into what its frozen part returns for all samples together."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Positions(4, 6), nn.Linear(6, N)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        h, positions = self.body(x)
        positions += 1
        x.add_(1)
        return self.head(h + positions) + x[:, :1] * self.head.bias


class Positions(nn.Linear):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), self.bias[None] * 2


def test_a_model_may_write_into_its_tensors() -> None:
    freeze(model := Writing(), "body")
    check_right(cached(model, Data()), model)


# --------------------------------------------------------------------------------------- refusals


class LessMean(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) - x.mean()


class Dropped(nn.Linear):
    """LayerDrop by Python's random numbers: seldom, so that a few passes do not show it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat(1, 2)[:, :6] if random.random() < 1e-6 else super().forward(x)


class Scaled(nn.Sequential):
    def forward(self, x: torch.Tensor, by: float) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) * by


class Spanning(nn.Module):
    """A frozen and a trainable layer in one checkpointed region."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5))
        self.second, self.head = nn.Linear(6, 6), nn.Linear(6, N)
        self.reentrant = reentrant
        if reentrant:
            self.first.register_forward_hook(lambda module, args, out: out.requires_grad_())
        freeze(self, "first")

    def forward(self, x: torch.Tensor) -> Any:
        if self.reentrant:
            return self.head(checkpoint(self.second, self.first(x), use_reentrant=True))
        region = nn.Sequential(self.first, self.second)
        return self.head(checkpoint(region, x, use_reentrant=False))


class Stream(D.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from X


class Endless(D.Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return X[index % N], index


def scaled(samples: list[Any]) -> Any:
    labels = [y for _, y in samples]
    return torch.stack([x for x, _ in samples]), float(max(labels)), torch.tensor(labels)


def ragged(samples: list[Any]) -> Any:
    ids = [torch.arange(y + 1) for _, y in samples]
    return nn.utils.rnn.pad_sequence(ids, batch_first=True), torch.ones(len(samples))


def in_inference_mode() -> Any:
    with torch.inference_mode():
        return model_of()


def in_place_compiled() -> Any:
    (model := model_of()).compile(backend="eager")
    return model


UNHELD = (nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 6), nn.Linear(6, N))
Refusal = tuple[Callable[[], Any], Any, dict[str, Any], type[Exception], str]
# fmt: off
REFUSED: dict[str, Refusal] = {
    "dropout": (lambda: model_of(*DROPOUT, frozen=("0", "2")), Data(), {},
        ValueError, "draws random numbers in 1. .* eval_frozen=True"),
    "norm that is not held": (lambda: model_of(*UNHELD, frozen=("0", "2")), Data(), {},
        ValueError, "1 in the frozen prefix normalizes by the batch"),
    "batch mean": (lambda: model_of(LessMean(4, 6), nn.Linear(6, N)), Data(), {},
        ValueError, "depends on the other samples of its batch"),
    "LayerDrop": (lambda: model_of(Dropped(4, 6), nn.Linear(6, N)), Data(), {},
        ValueError, "draws random numbers in 0"),
    "nothing frozen": (lambda: model_of().requires_grad_(True), Data(), {},
        ValueError, r"first operation .* 0\.weight"),
    "everything frozen": (lambda: model_of().requires_grad_(False), Data(), {},
        ValueError, "nothing to train"),
    "checkpointed with what trains": (Spanning, Data(), {"eval_frozen": True},
        ValueError, "first is in a checkpointed region"),
    "checkpointed, in bfloat16": (Spanning, Data(),
        {"eval_frozen": True, "frozen_dtype": torch.bfloat16},
        ValueError, "first is in a checkpointed region"),
    "inputs that require gradients": (lambda: Spanning(True), Data(), {"eval_frozen": True},
        ValueError, r"second\.weight gets another gradient.*use_reentrant=False"),
    "compiled": (lambda: torch.compile(model_of(), backend="eager"), Data(), {},
        TypeError, r"compiled as a whole.*layer4\.compile"),
    "compiled in place": (in_place_compiled, Data(), {}, TypeError, "compiled as a whole"),
    "inference mode": (in_inference_mode, Data(), {}, ValueError, r"made in torch\.inference_mode"),
    "iterable": (model_of, Stream(), {}, TypeError, "Stream gives samples without an index"),
    "no length": (model_of, Endless(), {}, TypeError, "Endless has no __len__"),
    "empty": (model_of, D.Subset(Data(), []), {}, ValueError, "the dataset is empty"),
    "text as target": (model_of, Data(lambda i: (X[i], str(i))), {},
        ValueError, "targets has strings"),
    "ragged": (lambda: model_of(nn.Embedding(N, 6), nn.Linear(6, N)), Data(),
        {"collate_fn": ragged}, ValueError, "must all have one shape"),
    "number of each batch": (lambda: Scaled(*model_of()), Data(), {"collate_fn": scaled},
        ValueError, r"inputs\[1\] is 12.0 in one batch and 6.0"),
    "at= trains": (model_of, Data(), {"at": "2"}, ValueError, r"not frozen .*2\.weight trains"),
    "at= names several": (model_of, Data(), {"at": ["0", "1"]},
        ValueError, "must name one module; it names 0, 1"),
    "at= names nothing": (model_of, Data(), {"at": "layer9"}, ValueError, "'layer9'"),
    "dtype": (model_of, Data(), {"dtype": torch.int8}, ValueError, "dtype=torch.int8 must be"),
    "frozen_dtype": (model_of, Data(), {"frozen_dtype": "x"}, ValueError, "frozen_dtype='x' must"),
    "views": (model_of, Data(), {"views": 0}, ValueError, "views=0 must be an int"),
    "on_change": (model_of, Data(), {"on_change": "x"}, ValueError, "on_change='x' must be one of"),
    "old": (model_of, Data(), {"old": "x"}, ValueError, "old='x' must be one of"),
    "spot_check": (model_of, Data(), {"spot_check": 2}, ValueError, "spot_check=2 must be between"),
}
# fmt: on


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cached_is_refused(name: str, tmp_path: Path) -> None:
    make, dataset, options, error, message = REFUSED[name]
    with pytest.raises(error, match=f"(?s)FeatureCache.*{message}"):
        cached(make(), dataset, tmp_path, **options)
    assert not [*tmp_path.glob("*/*"), *tmp_path.glob(".board*")]


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, N)

    def forward(self, x: torch.Tensor, by: Any = 1.0) -> torch.Tensor:
        h: torch.Tensor = self.head(self.body(nn.functional.pad(x, (0, 4 - x.shape[1]))))
        return h * torch.as_tensor(by).reshape(-1, 1)


@pytest.mark.parametrize(("by", "later"), [
    (1.0, {"x": X[:1], "by": 2.0}),
    (1.0, {"x": X[:1]}),
    (torch.ones(()), {"x": X[:1], "by": torch.tensor(2.0)}),
    (1.0, {"x": X[:1, :3], "by": 1.0}),
])  # fmt: skip
def test_samples_that_turn_out_different_are_refused(by: Any, later: dict[str, Any]) -> None:
    def collate(samples: list[Any]) -> Any:
        labels = torch.tensor([y for _, y in samples])
        usual = {"x": torch.stack([x for x, _ in samples]), "by": by}
        return (later if labels.tolist() == [1] else usual), labels

    freeze(model := Named(), "body")
    features = cached(model, Data(), collate_fn=collate)
    batches = iter(D.DataLoader(features.dataset, 1))
    features(next(batches).inputs)
    with pytest.raises(ValueError, match="inputs of a batch differ"):
        features(next(batches).inputs)
    assert count(features) == 1


# -------------------------------------------------------------------------------------- DataLoader


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_persistent_workers_follow_the_boundary(start: str, tmp_path: Path) -> None:
    model = model_of()
    features = cached(model, Data(), tmp_path)
    options = {**FORKED, "multiprocessing_context": start, "persistent_workers": True}
    loader = D.DataLoader(features.dataset, 4, shuffle=True, **options)
    hits = []
    for change in (None, None, freeze, None, unfreeze, None):
        if change is not None:
            change(model, "2")
        hits.append(0)
        for batch in loader:
            hits[-1] += batch.inputs.slots is not None
            labels_of(features, model, [batch])
    assert features.boundary == ("1",) and count(features) == N
    assert hits[1] == hits[3] == hits[5] == 4


@pytest.mark.parametrize("move", ["deeper", "shallower", "refilled"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_batches_in_flight_stay_right(move: str, in_memory: bool, tmp_path: Path) -> None:
    model = model_of(frozen=("0",) if move == "deeper" else ("0", "2"))
    features = cached(model, Data(), None if in_memory else tmp_path, on_change="refill")
    features.fill(progress=False)
    batches = iter(D.DataLoader(features.dataset, 2, **FORKED))
    seen = labels_of(features, model, [next(batches)])
    if move == "refilled":
        model[2].weight.detach().add_(1)
    else:
        (freeze if move == "deeper" else unfreeze)(model, "2")
    seen += labels_of(features, model, batches)
    assert seen == EACH_ONCE
    check_right(features, model)


def test_samples_from_two_stores_make_one_batch() -> None:
    model = model_of()
    features = cached(model, Data())
    features.fill(progress=False)
    freeze(model, "2")
    features(first_batch(features, sampler=[3, 4]).inputs)  # these two are stored deeper
    loader = D.DataLoader(D.ConcatDataset([features.dataset]), 4)  # asks sample by sample
    assert len(features._sources) == 2
    assert labels_of(features, model, loader) == EACH_ONCE
    check_right(features, model)


@pytest.mark.filterwarnings("ignore:Got pickle error")
def test_features_in_memory_reach_forked_workers_only() -> None:
    features = cached(model := model_of(), Data())
    features.fill(progress=False)
    features.dataset.samples = Unloadable()
    check_right(features, model, **FORKED)
    with pytest.raises(TypeError, match="Give FeatureCache a folder"):
        first_batch(features, **{**FORKED, "multiprocessing_context": "spawn"})


@pytest.mark.filterwarnings("ignore:'pin_memory'")
def test_pinned_memory_changes_nothing(tmp_path: Path) -> None:
    check_right(cached(model := model_of(), Data(), tmp_path), model, pin_memory=True)


# ----------------------------------------------------------------------------- what is not computed


def test_what_operations_give_for_stand_ins_has_the_right_shape_and_dtype() -> None:
    """Given again for the same arguments only: numbers that are equal may be of other types."""
    x = StandIn.make((2, 3, 4), torch.int64, torch.device("cpu"))
    frozen, trained = torch.zeros(2, 3, 4), torch.zeros(4, requires_grad=True)
    doubles, default = frozen.double(), torch.get_default_dtype()
    real = torch.zeros(2, 3, 4, dtype=torch.int64)
    calls: list[Callable[[Any], Any]] = [
        lambda t: t + 1,
        lambda t: t + 1.0,
        lambda t: t + True,
        lambda t: t + frozen,
        lambda t: t + doubles,
        lambda t: t / 2,
        lambda t: t[:, 1:],
        lambda t: t[:, 1],
        lambda t: t[..., None],
        lambda t: t.float()[None] @ frozen[0].t(),
        lambda t: t.transpose(1, 2).flatten(1),
        lambda t: t.split(1, 1),
        lambda t: t.sum(1, keepdim=True),
        lambda t: t.sum(1, dtype=torch.float64),
        lambda t: torch.cat([t, real], dim=-1),
        lambda t: nn.functional.normalize(t.float(), dim=1),
        lambda t: torch.zeros_like(t),
        lambda t: trained.expand(t.shape),
    ]
    contexts: list[Callable[[], Any]] = [
        contextlib.nullcontext,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", torch.float16),
        contextlib.nullcontext,
    ]
    for context in contexts:
        for call in [*calls, *reversed(calls)]:
            with context():
                got, wanted = call(x), call(real)
            for a, b in zip(*map(tree_leaves, (got, wanted)), strict=True):
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
                assert isinstance(a, StandIn) or torch.equal(a, b)
                assert a.requires_grad == b.requires_grad
    try:
        torch.set_default_dtype(torch.float64)
        assert (x / 2).dtype == torch.float64
    finally:
        torch.set_default_dtype(default)


def test_stand_ins_of_a_pass_in_inference_mode_serve_passes_that_train() -> None:
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 6), nn.Linear(3, N)

        def forward(self, x: torch.Tensor) -> Any:
            h = self.body(x)
            h *= 2
            return self.head(h[:, :3].relu_())

    freeze(model := Doubling(), "body")
    features = cached(model, Data())
    features.fill(progress=False)
    (batch,) = D.DataLoader(features.dataset, N)
    for context in (torch.inference_mode, contextlib.nullcontext):
        with context():
            assert torch.equal(features(batch.inputs), model(X))


def test_given_results_keep_no_batch_in_memory() -> None:
    x, batch = StandIn.make((2, 3), torch.float32, torch.device("cpu")), torch.zeros(2, 3)
    assert (x + batch) is (x + batch.clone())
    alive = weakref.ref(batch)
    del batch
    assert alive() is None
