"""Attempts to get wrong features out of a FeatureCache, to break its store, or to lose data.

The label of each sample is its index, so that a batch shows whether features and labels belong
together: its output has to be what the model gives for the samples of its labels.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    random_split,
)

from torch_freeze import FeatureCache, freeze, unfreeze
from torch_freeze.features import _store
from torch_freeze.features._store import Column, find_store, open_store

N = 13
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error:FeatureCache"),
]


class Data(Dataset[Any]):
    """(X[i], i), counted."""

    def __init__(self, x: torch.Tensor = X, dies_at: int | None = None) -> None:
        self.x, self.loads, self.dies_at = x.clone(), 0, dies_at

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.loads += 1
        if index == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.x[index], index


class Unloadable(Data):
    """Has a length and no samples."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        raise AssertionError(f"sample {index} was loaded")


def model_of(*layers: nn.Module, frozen: tuple[str, ...] = ("0",)) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*layers or (nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, N)))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    freeze(model, *frozen)
    return model


def cached(model: nn.Module, dataset: Any, *args: Any, **options: Any) -> FeatureCache:
    return FeatureCache(model, dataset, *args, **{"spot_check": 0, **options})


def labels_of(features: FeatureCache, model: nn.Module, loader: Any, x: torch.Tensor = X) -> Any:
    """The labels of all batches, each of which gave what the whole model gives."""
    seen = []
    for batch in loader:
        output, whole = features(batch.inputs), model(x[batch.targets].to(dtype_of(model)))
        # Stored from a batch of another size, they may differ in the last bits.
        torch.testing.assert_close(output, whole, rtol=1e-5, atol=1e-5)
        seen += batch.targets.tolist()
    return seen


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def check_right(features: FeatureCache, model: nn.Module, batch_size: int = 4, **more: Any) -> None:
    """Two epochs are right; the second one is from stored features, if there are any."""
    for _ in range(2):
        loader = DataLoader(features.dataset, batch_size, **more)
        assert sorted(labels_of(features, model, loader)) == list(range(N))
    assert len(features) in (0, N)


def stored(features: FeatureCache) -> list[torch.Tensor]:
    source = features._now
    assert source is not None
    return source.store.read(torch.arange(source.store.rows))


# ------------------------------------------------------------- features belong to their samples

EACH_ONCE = list(range(N))
LOADERS: dict[str, tuple[Callable[[Any], Any], list[int] | None]] = {
    "shuffled": (lambda d: DataLoader(d, 4, shuffle=True), EACH_ONCE),
    "shuffled by two workers": (
        lambda d: DataLoader(d, 4, shuffle=True, num_workers=2, multiprocessing_context="fork"),
        EACH_ONCE,
    ),
    "a subset": (lambda d: DataLoader(Subset(d, [9, 3, 5, 1]), 3, shuffle=True), [1, 3, 5, 9]),
    "a subset of a subset": (
        lambda d: DataLoader(Subset(Subset(d, [9, 3, 5, 1]), [2, 0]), 2),
        [5, 9],
    ),
    "a random split": (
        lambda d: DataLoader(
            ConcatDataset(random_split(d, [5, 8], torch.Generator().manual_seed(1))), 4
        ),
        EACH_ONCE,
    ),
    "a batch sampler": (
        lambda d: DataLoader(d, batch_sampler=BatchSampler(RandomSampler(d), 5, drop_last=False)),
        EACH_ONCE,
    ),
    "drawn with replacement": (
        lambda d: DataLoader(d, 8, sampler=RandomSampler(d, replacement=True, num_samples=40)),
        None,
    ),
    "duplicates in one batch": (
        lambda d: DataLoader(d, batch_sampler=[[3, 3, 7], [7, 3, 7, 0, 0]]),
        [0, 0, 3, 3, 3, 7, 7, 7],
    ),
    "sample by sample, joined": (
        lambda d: DataLoader(ConcatDataset([d, d]), 4, shuffle=True),
        sorted(EACH_ONCE * 2),
    ),
    "indices from the end": (lambda d: DataLoader(d, batch_sampler=[[-1, 0, -N]]), [0, 0, 12]),
}


@pytest.mark.parametrize("name", LOADERS)
def test_features_meet_the_labels_of_their_samples(name: str, tmp_path: Path) -> None:
    make, expected = LOADERS[name]
    model, data = model_of(), Data()
    features = cached(model, data, tmp_path)
    for epoch in range(3):
        if epoch == 2:
            features.fill(progress=False)
            features.dataset.samples = Unloadable()  # a hit loads nothing
        seen = labels_of(features, model, make(features.dataset))
        assert expected is None or sorted(seen) == expected


def test_batches_of_other_caches_are_refused() -> None:
    model = model_of()
    one, two = cached(model, Data()), cached(model, Data(X.flip(0)))
    for fill in (False, True):
        if fill:
            one.fill(progress=False), two.fill(progress=False)
        with pytest.raises(ValueError, match="samples of several datasets"):
            next(iter(DataLoader(ConcatDataset([one.dataset, two.dataset]), 2 * N)))
        with pytest.raises(ValueError, match="of another FeatureCache"):
            one(next(iter(DataLoader(two.dataset, 4))).inputs)
    check_right(one, model)


# ------------------------------------------------------------------------------- another dataset


@pytest.mark.parametrize("edited", [0, N // 2, N - 1, 4])
def test_an_edited_sample_is_noticed(edited: int, tmp_path: Path) -> None:
    model, data = model_of(), Data()
    cached(model, data, tmp_path).fill(progress=False)
    data.x[edited] += 1
    features = FeatureCache(model, data, tmp_path, spot_check=1)
    if edited in (0, N // 2, N - 1):
        assert len(features) == 0
        assert len(labels_of(features, model, DataLoader(features.dataset, 4), data.x)) == N
        return
    assert len(features) == N
    with pytest.raises(RuntimeError, match=f"of sample {edited} is stored with other values"):
        features.check(N)
    with pytest.raises(RuntimeError, match=f"of sample {edited} is stored with other values"):
        for _ in range(1000):
            features(next(iter(DataLoader(Subset(features.dataset, [3, 4]), 2))).inputs)
    assert len(cached(model, data, tmp_path, version=2)) == 0


def test_samples_of_another_run_are_compared_where_only_few_are_stored(tmp_path: Path) -> None:
    model, data = model_of(), Data()
    one = cached(model, data, tmp_path)
    labels_of(one, model, DataLoader(Subset(one.dataset, [4]), 1))
    data.x[4] += 1
    with pytest.raises(RuntimeError, match="of sample 4 is stored with other values"):
        cached(model, data, tmp_path)


def test_a_dataset_that_grows_is_refused(tmp_path: Path) -> None:
    model, data = model_of(), Data()
    features = cached(model, data, tmp_path)
    data.x = torch.cat([data.x, X])
    with pytest.raises(RuntimeError, match="has 26 samples now, and had 13"):
        next(iter(DataLoader(features.dataset, 4)))


class Flipped(Data):
    """Each sample is flipped half of the time, as its kind of random numbers says."""

    def __init__(self, kind: str, skipped: int = 0) -> None:
        super().__init__()
        self.own, self.skipped = random.Random(0), skipped
        self.draw: Callable[[], float] = getattr(self, kind)

    def torch(self) -> float:
        return torch.rand(1 + self.skipped)[-1].item()

    def python(self) -> float:
        return [random.random() for _ in range(1 + self.skipped)][-1]

    def unseeded(self) -> float:
        return self.own.random()

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        x, index = super().__getitem__(index)
        return (x if self.draw() < 0.5 else x.flip(0)), index


@pytest.mark.parametrize("kind", ["torch", "python", "unseeded"])
def test_random_transforms_are_refused(kind: str) -> None:
    for skipped in range(10):
        with pytest.raises(ValueError, match=r"differs each time.*views=K"):
            cached(model_of(), Flipped(kind, skipped))
    if kind == "unseeded":
        with pytest.raises(ValueError, match="seeded alike"):
            for _ in range(20):
                cached(model_of(), Flipped(kind), views=2)


def test_views_are_bounded_and_the_same_each_time(tmp_path: Path) -> None:
    model, views = model_of(), 3
    drawn: list[set[Any]] = [set() for _ in range(N)]
    for run in range(2):
        features = cached(model, Flipped("torch"), tmp_path, views=views)
        assert len(features) == (N * views if run else 0)
        if run:
            features.check(N * views)
        for _ in range(8):
            for batch in DataLoader(features.dataset, 4, shuffle=True):
                features(batch.inputs)
                for row, label in zip(batch.inputs.rows.tolist(), batch.targets, strict=True):
                    assert row // views == label
                    drawn[label].add(row)
        features.fill(progress=False)
        features.dataset.samples = Unloadable()
        output = features(next(iter(DataLoader(features.dataset, N))).inputs)
        assert output.shape == (N, N)
    assert all(len(rows) == views for rows in drawn)
    values = stored(features)[1].view(N, views, -1)
    assert all(1 <= len(v.unique(dim=0)) <= 2 for v in values)  # as it is, and flipped
    assert any(len(v.unique(dim=0)) == 2 for v in values)


# --------------------------------------------------------------------- each condition has a store


def written(change: Callable[[nn.Module], Any]) -> Callable[[nn.Module], dict[str, Any]]:
    def apply(model: nn.Module) -> dict[str, Any]:
        change(model)
        return {}

    return apply


CONDITIONS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "weights": written(lambda m: m[0].weight.data.add_(1)),
    "one number of a bias": written(lambda m: m[0].bias.data[3].add_(1e-6)),
    "mode": written(lambda m: m[0].eval()),
    "a hook": written(lambda m: m[0].register_forward_hook(lambda m, a, out: 2 * out)),
    "boundary": written(lambda m: freeze(m, "0", "2")),
    "dtype": lambda m: {"dtype": torch.bfloat16},
    "frozen_dtype": lambda m: {"frozen_dtype": torch.bfloat16},
    "eval_frozen": lambda m: {"eval_frozen": True},
    "views": lambda m: {"views": 2},
    "version": lambda m: {"version": 1},
}


@pytest.mark.parametrize("name", [*CONDITIONS, "autocast", "torch version"])
def test_other_conditions_have_another_store(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(model_of(), Data(), tmp_path).fill(progress=False)
    assert len(cached(model_of(), Data(), tmp_path)) == N
    model = model_of()
    options = CONDITIONS[name](model) if name in CONDITIONS else {}
    if name == "torch version":
        monkeypatch.setattr(torch, "__version__", "99.0")
    with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
        assert len(cached(model, Data(), tmp_path, **options)) == 0


@pytest.mark.parametrize("in_memory", [False, True])
def test_autocast_may_be_entered_and_left(in_memory: bool, tmp_path: Path) -> None:
    model, data = model_of(frozen=("0", "2")), Data()
    features = cached(model, data, None if in_memory else tmp_path)
    loader = DataLoader(features.dataset, N)
    batch = next(iter(loader))
    for epoch in range(3):
        for bfloat16 in (False, True):
            if epoch == 2:
                data.loads = 0
            for _ in range(2):  # the first batch may come from the other's features
                with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                    assert torch.equal(features(batch.inputs), model(X)), "a batch in flight"
                    batch = next(iter(loader))
                    assert torch.equal(features(batch.inputs), model(X))
    assert len(features._sources) == 2


# -------------------------------------------------------------------------------------- processes


def fill_part(rank: int, folder: str, barrier: Any) -> None:
    torch.set_num_threads(1)
    model = model_of()
    barrier.wait(60)
    features = cached(model, Data(), folder)
    sampler: Any = DistributedSampler(features.dataset, 2, rank)
    labels_of(features, model, DataLoader(features.dataset, 3, sampler=sampler))


def test_processes_that_fill_a_part_each_miss_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [
        context.Process(target=fill_part, args=(rank, str(tmp_path), barrier)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    features = cached(model_of(), Data(), tmp_path)
    assert len(features) == N
    features.dataset.samples = Unloadable()
    check_right(features, model_of())


def killed(target: Callable[..., Any], *args: Any) -> None:
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def fill_until_it_dies(folder: Path) -> None:
    features = cached(model_of(), Data(dies_at=9), folder)
    features.fill(4, progress=False)


def test_a_killed_fill_goes_on(tmp_path: Path) -> None:
    killed(fill_until_it_dies, tmp_path)
    data = Data()
    features = cached(model_of(), data, tmp_path)
    assert len(features) == 8
    data.loads = 0
    features.fill(4, progress=False)
    assert data.loads == N - 8
    clean = cached(model_of(), Data())
    clean.fill(4, progress=False)
    assert all(map(torch.equal, stored(features), stored(clean)))
    check_right(features, model_of())


COLUMNS = (Column("a", (2,), torch.float32), Column("b", (), torch.int64))


def write_until_it_dies(folder: Path) -> None:
    def columns() -> Iterator[torch.Tensor]:
        yield torch.ones(3, 2)
        os.kill(os.getpid(), signal.SIGKILL)

    store = open_store(folder, "k", COLUMNS, 5, {})
    store.write(torch.tensor([4]), [torch.ones(1, 2), torch.ones(1)])
    store.write(torch.arange(3), columns())  # type: ignore[arg-type]


def test_a_row_that_is_half_written_is_missing(tmp_path: Path) -> None:
    killed(write_until_it_dies, tmp_path)
    assert open_store(tmp_path, "k", COLUMNS, 5, {}).missing.tolist() == [0, 1, 2, 3]


def test_after_another_boot_only_what_was_flushed_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path, "k", COLUMNS, 5, {})
    store.write(torch.tensor([1]), [torch.ones(1, 2), torch.ones(1)])
    store.flush()
    store.write(torch.tensor([2]), [torch.ones(1, 2), torch.ones(1)])
    assert open_store(tmp_path, "k", COLUMNS, 5, {}).missing.tolist() == [0, 3, 4]
    for boot in ("another", "", ""):  # "": not known, so it may be another
        monkeypatch.setattr(_store, "_boot", lambda boot=boot: boot)
        again = open_store(tmp_path, "k", COLUMNS, 5, {})
        assert again.missing.tolist() == [0, 2, 3, 4]
        again.write(torch.tensor([2]), [torch.ones(1, 2), torch.ones(1)])


# ------------------------------------------------------------------------------------ the folder


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def edit(**changes: Any) -> Callable[[Path], None]:
    def apply(store: Path) -> None:
        manifest = json.loads((store / "manifest.json").read_text())
        (store / "manifest.json").write_text(json.dumps({**manifest, **changes}))

    return apply


def column(**changes: Any) -> Callable[[Path], None]:
    def apply(store: Path) -> None:
        manifest = json.loads((store / "manifest.json").read_text())
        manifest["columns"][0] |= changes
        (store / "manifest.json").write_text(json.dumps(manifest))

    return apply


def text(content: str | bytes) -> Callable[[Path], None]:
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda store: (store / "manifest.json").write_bytes(raw) and None


def resize(name: str, by: int) -> Callable[[Path], None]:
    return lambda store: os.truncate(store / name, (store / name).stat().st_size + by)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "torn manifest": resize("manifest.json", -40),
    "empty manifest": text(""),
    "manifest of zeros": text(bytes(100)),
    "manifest that is no text": text(b"\xff\xfe"),
    "manifest that is a list": text("[1]"),
    "manifest nested too deeply": text("[" * 100_000),
    "pickled manifest": lambda store: text(pickle.dumps(Malicious(store.parent / "ran")))(store),
    "other format": edit(format=2),
    "no columns": edit(columns=[]),
    "fewer rows": edit(rows=N - 1),
    "negative rows": edit(rows=-1),
    "rows that are text": edit(rows="13"),
    "made from something else": edit(made_from={}),
    "unknown dtype": column(dtype="float31"),
    "dtype that is a function": column(dtype="load"),
    "dtype that is a number": column(dtype=1),
    "other dtype": column(dtype="int32"),
    "negative shape": column(shape=[-1, -6]),
    "shape that is a number": column(shape=6),
    "slot cut off": resize("slot01.bin", -1),
    "slot too long": resize("slot01.bin", 1),
    "slot missing": lambda store: (store / "slot00.bin").unlink(),
    "written.bin cut off": resize("written.bin", -1),
    "written.bin missing": lambda store: (store / "written.bin").unlink(),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_store_is_filled_again(name: str, tmp_path: Path) -> None:
    model = model_of()
    features = cached(model, Data(), tmp_path)
    features.fill(progress=False)
    assert features._now is not None
    key = features._now.key
    del features
    foreign = [tmp_path / "notes.txt", tmp_path / key / "notes.txt", tmp_path / key / "slot_of.bin"]
    for path in foreign:
        path.write_text("mine")
    DAMAGES[name](tmp_path / key)
    assert (
        name == "made from something else"
        or find_store(tmp_path, key) is None
        or (name == "other dtype")
    )
    with pytest.warns(RuntimeWarning, match="is damaged and is filled again"):
        features = cached(model, Data(), tmp_path)
    assert len(features) == 0
    check_right(features, model)
    assert all(path.read_text() == "mine" for path in foreign)
    assert not (tmp_path / "ran").exists()


def test_a_folder_of_a_store_that_was_never_finished_is_used(tmp_path: Path) -> None:
    features = cached(model_of(), Data(), tmp_path)
    assert features._now is not None
    store = tmp_path / features._now.key
    (store / "manifest.json").unlink()
    check_right(cached(model_of(), Data(), tmp_path), model_of())
    edit(boot=None)(store)
    manifest = json.loads((store / "manifest.json").read_text())
    del manifest["boot"]
    (store / "manifest.json").write_text(json.dumps(manifest))
    check_right(cached(model_of(), Data(), tmp_path), model_of())


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
    if when == "before":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    else:
        allocate, calls = os.posix_fallocate, []

        def full(*args: Any) -> None:
            calls.append(args)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            allocate(*args)

        monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError) as caught:
        cached(model_of(), Data(), tmp_path)
    assert caught.value.errno == errno.ENOSPC
    if when == "before":
        assert "take 429 B" in str(caught.value) and "has 100 B free" in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"mine", ".lock"}


# ---------------------------------------------------------------------------- changes in between


def step(model: nn.Module) -> None:
    model.requires_grad_(True)
    model(X).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    freeze(model, "0", "1")


def replace(model: Any, name: str) -> None:
    new = nn.Parameter(torch.randn_like(getattr(model[0], name)), requires_grad=False)
    setattr(model[0], name, new)


def load(model: nn.Module, **options: Any) -> None:
    state = {k: v + 1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, **options)
    freeze(model, "0", "1")


def in_place(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return torch.no_grad()(change)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "an optimizer's step": (step, "0.bias, 0.weight"),
    "written in place": (in_place(lambda m: m[0].weight.add_(1)), "0.weight"),
    "copied into": (in_place(lambda m: m[0].bias.copy_(torch.ones(6))), "0.bias"),
    "one element": (in_place(lambda m: m[0].weight[5, 3].mul_(2)), "0.weight"),
    "load_state_dict": (load, "0.bias, 0.weight"),
    "load_state_dict, assigned": (lambda m: load(m, assign=True), "0.bias, 0.weight"),
    "new data": (lambda m: setattr(m[0].weight, "data", torch.ones(6, 4)), "0.weight"),
    "new parameter": (lambda m: replace(m, "weight"), "0.weight"),
    "new module": (lambda m: m.__setitem__(0, nn.Linear(4, 6).requires_grad_(False)), "0 was"),
    "no bias": (lambda m: m[0].register_parameter("bias", None), "0.bias was replaced"),
    "new hook": (lambda m: m[0].register_forward_hook(lambda m, a, out: 2 * out), "the forward of 0"),
    "new hook before": (
        lambda m: m[0].register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
        "the forward of 0",
    ),
    "eval": (lambda m: m.eval(), r"mode \(train or eval\) of 0"),
    "float64": (lambda m: m.double(), "0.bias, 0.weight"),
    "bfloat16 and back": (lambda m: m.bfloat16().float(), "0.bias, 0.weight"),
    "statistics": (in_place(lambda m: m[1].running_mean.add_(1)), "1.running_mean"),
    "new statistics": (
        lambda m: setattr(m[1], "running_mean", torch.ones(6)),
        "1.running_mean",
    ),
    "statistics after a move": (
        lambda m: (m.double(), m.float(), m[1].running_var.mul_(2)),
        "1.running_var",
    ),
}


class InDtypeOf(nn.Sequential):
    """Takes its input in the dtype of its parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self[0].weight.dtype))


@pytest.mark.parametrize("on_change", ["raise", "refill"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_prefix_is_noticed(name: str, on_change: str, tmp_path: Path) -> None:
    change, told = CHANGES[name]
    torch.manual_seed(0)
    model = InDtypeOf(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, N))
    freeze(model, "0", "1")
    features = cached(model, Data(), tmp_path, on_change=on_change)
    before = next(iter(DataLoader(Subset(features.dataset, [3, 4, 5]), 3)))
    features(before.inputs)  # so that another store is filled in part
    before = next(iter(DataLoader(Subset(features.dataset, [3, 4, 5]), 3)))
    assert before.inputs.slots is not None
    change(model)
    if on_change == "raise":
        for _ in range(2):
            with pytest.raises(RuntimeError, match=rf"{told}.*since the features were stored"):
                features(before.inputs)
        return
    labels_of(features, model, [before])
    check_right(features, model)
    change(model)
    check_right(features, model, shuffle=True)


def test_what_is_undone_was_no_change() -> None:
    model = model_of()
    features = cached(model, Data())
    features.fill(progress=False)
    weight = model[0].weight
    for _ in range(2):
        replace(model, "weight")
        with pytest.raises(RuntimeError, match=r"0\.weight changed"):
            features.check()
        model[0].weight = weight
        module = model[0]
        model[0] = nn.Linear(4, 6).requires_grad_(False)
        with pytest.raises(RuntimeError, match="0 was replaced"):
            features.check()
        model[0] = module
        features.check()
        model.double().float()  # rounds nothing
        features.dataset.samples = Unloadable()
        check_right(features, model)
        features.dataset.samples = Data()


def test_check_finds_what_leaves_no_trace() -> None:
    model = model_of()
    features = FeatureCache(model, Data(), spot_check=1)
    features.fill(progress=False)
    model[0].weight.data.mul_(2)
    for noticing in (features.check, lambda: check_right(features, model)):
        with pytest.raises(RuntimeError, match=r"changed without a trace .*\.data"):
            noticing()


def test_requires_grad_set_by_hand_is_followed(tmp_path: Path) -> None:
    model = model_of()
    data = Data()
    features = cached(model, data, tmp_path)
    check_right(features, model)
    assert features.boundary == ("1",)
    model[2].requires_grad_(False)
    data.loads = 0
    loader = DataLoader(features.dataset, N)
    labels_of(features, model, loader)
    labels_of(features, model, loader)
    assert features.boundary == ("2",) and len(features) == N
    assert data.loads < 3 * N  # to find the boundary: the samples are not loaded again
    model[0].weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"first operation .* 0\.weight.*forward is whole"):
        check_right(features, model)
    assert features.boundary == () and not list(tmp_path.glob("*/manifest.json"))
    model[0].weight.detach().add_(1)  # trained
    model[0].requires_grad_(False)
    check_right(features, model)
    assert features.boundary == ("2",)


def test_unfreezing_a_norm_moves_the_boundary_and_is_no_change() -> None:
    layers = (nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6))
    model = model_of(*layers, nn.Linear(6, N), frozen=("0", "1", "2", "3"))
    features = cached(model, Data())
    check_right(features, model)
    unfreeze(model, "3")
    features(next(iter(DataLoader(features.dataset, N))).inputs)
    assert features.boundary == ("2",) and layers[3].training
    freeze(model, "3")
    check_right(features, model)
    assert features.boundary == ("3",)


def test_a_prefix_that_becomes_random_is_left_at_once() -> None:
    model = model_of(
        nn.Linear(4, 6), nn.Dropout(), nn.Linear(6, 6), nn.Linear(6, N), frozen=("0", "2")
    ).eval()
    features = cached(model, Data(), on_change="refill")
    features.fill(progress=False)
    model.train()
    loader = DataLoader(features.dataset, N)
    with pytest.warns(UserWarning, match=r"draws random numbers in 1.*forward is whole"):
        outputs = [features(next(iter(loader)).inputs) for _ in range(2)]
    assert not torch.equal(*outputs)


# --------------------------------------------------------------------------------------- refusals


class LessMean(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) - x.mean()


class Dropped(nn.Linear):
    """LayerDrop by Python's random numbers: seldom, so that a few passes do not show it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat(1, 2)[:, :6] if random.random() < 1e-6 else super().forward(x)


class Scaled(nn.Sequential):
    def forward(self, x: torch.Tensor, by: float) -> torch.Tensor:
        return super().forward(x) * by


class Rows(Dataset[Any]):
    def __init__(self, row: Callable[[int], Any]) -> None:
        self.row = row

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        return self.row(index)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from X


class Endless(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return X[index % N], index


def scaled(samples: list[Any]) -> Any:
    labels = [y for _, y in samples]
    return torch.stack([x for x, _ in samples]), float(max(labels)), torch.tensor(labels)


def ragged(samples: list[Any]) -> Any:
    return nn.utils.rnn.pad_sequence([x for x, _ in samples], batch_first=True), torch.ones(
        len(samples)
    )


Case = tuple[Callable[[], nn.Module], Any, dict[str, Any], type[Exception], str]
TWO = ("0", "2")
IDS = (nn.Embedding, 5, 6)
REFUSED: dict[str, Case] = {
    "dropout": (
        lambda: model_of(nn.Linear(4, 6), nn.Dropout(), nn.Linear(6, 6), nn.Linear(6, N), frozen=TWO),
        Data(), {}, ValueError, "draws random numbers in 1. .* eval_frozen=True",
    ),
    "norm that is not held": (
        lambda: model_of(nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 6), nn.Linear(6, N), frozen=TWO),
        Data(), {}, ValueError, "normalizes by the batch|which the features depend on",
    ),
    "batch mean": (
        lambda: model_of(LessMean(4, 6), nn.Linear(6, N)),
        Data(), {}, ValueError, "depends on the other samples of its batch",
    ),
    "LayerDrop": (
        lambda: model_of(Dropped(4, 6), nn.Linear(6, N)),
        Data(), {}, ValueError, "draws random numbers in 0",
    ),
    "nothing frozen": (
        lambda: model_of().requires_grad_(True), Data(), {}, ValueError, "first operation .* 0.weight",
    ),
    "everything frozen": (
        lambda: model_of().requires_grad_(False), Data(), {}, ValueError, "nothing to train",
    ),
    "compiled": (
        lambda: torch.compile(model_of(), backend="eager"),  # type: ignore[return-value]
        Data(), {}, TypeError, r"compiled as a whole.*layer4\.compile",
    ),
    "compiled in place": (
        lambda: (model := model_of()).compile(backend="eager") or model,
        Data(), {}, TypeError, "compiled as a whole",
    ),
    "iterable": (model_of, Stream(), {}, TypeError, "Stream gives samples without an index"),
    "no length": (model_of, Endless(), {}, TypeError, "Endless has no __len__"),
    "empty": (model_of, Subset(Data(), []), {}, ValueError, "the dataset is empty"),
    "text as target": (model_of, Rows(lambda i: (X[i], str(i))), {}, ValueError, "targets has strings"),
    "ragged": (
        lambda: model_of(nn.Embedding(N, 6), nn.Linear(6, N)),
        Rows(lambda i: (torch.arange(i + 1), i)), {"collate_fn": ragged}, ValueError, "must all have one shape",
    ),
    "number of each batch": (
        lambda: freeze(m := Scaled(nn.Linear(4, 6), nn.Linear(6, N)), "0") and m,
        Data(), {"collate_fn": scaled}, ValueError, r"inputs\[1\] is 12.0 in one batch and 6.0",
    ),
    "at= trains": (model_of, Data(), {"at": "2"}, ValueError, r"at='2' is not frozen .*2\.weight trains"),
    "at= names several": (model_of, Data(), {"at": ["0", "1"]}, ValueError, "must name one module; it names 0, 1"),
    "at= names nothing": (model_of, Data(), {"at": "layer9"}, ValueError, "'layer9'"),
    "dtype": (model_of, Data(), {"dtype": torch.int8}, ValueError, "dtype=torch.int8 must be a floating"),
    "frozen_dtype": (model_of, Data(), {"frozen_dtype": "bf16"}, ValueError, "frozen_dtype='bf16' must be"),
    "views": (model_of, Data(), {"views": 0}, ValueError, "views=0 must be an int of at least 1"),
    "on_change": (model_of, Data(), {"on_change": "warn"}, ValueError, "on_change='warn' must be one of"),
    "old": (model_of, Data(), {"old": "drop"}, ValueError, "old='drop' must be one of"),
    "spot_check": (model_of, Data(), {"spot_check": 2}, ValueError, "spot_check=2 must be between"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cached_is_refused(name: str, tmp_path: Path) -> None:
    make, dataset, options, error, message = REFUSED[name]
    with pytest.raises(error, match=f"(?s)FeatureCache.*{message}"):
        cached(make(), dataset, tmp_path, **options)
    assert not list(tmp_path.glob("*/*")) and not list(tmp_path.glob(".board*"))


@pytest.mark.parametrize("later", ["shape", "number", "structure"])
def test_samples_that_turn_out_different_are_refused(later: str) -> None:
    others: dict[str, Any] = {
        "shape": {"input": X[:1, :3], "by": torch.ones(1)},
        "number": {"input": X[:1], "by": 2.0},
        "structure": {"input": X[:1]},
    }

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 6), nn.Linear(6, N)

        def forward(self, input: torch.Tensor, by: Any = 1.0) -> torch.Tensor:
            whole = nn.functional.pad(input, (0, 4 - input.shape[1]))
            return self.head(self.body(whole)) * torch.as_tensor(by).reshape(-1, 1)

    def collate(samples: list[Any]) -> Any:
        labels = torch.tensor([y for _, y in samples])
        if labels.tolist() == [1]:
            return others[later], labels
        x = torch.stack([x for x, _ in samples])
        return {"input": x, "by": 1.0 if later == "number" else torch.ones(len(x))}, labels

    freeze(model := Named(), "body")
    features = cached(model, Data(), collate_fn=collate)
    with pytest.raises(ValueError, match="inputs of a batch differ"):
        for batch in DataLoader(features.dataset, 1):
            features(batch.inputs)
    assert len(features) == 1


def test_wrong_use_of_the_loader_is_refused() -> None:
    model = model_of()
    features = cached(model, Data())
    with pytest.raises(TypeError, match="sampler gave 'a'; it must give indices from 0 to 12"):
        next(iter(DataLoader(features.dataset, sampler=["a"])))
    with pytest.raises(IndexError, match="sample 13 of 13"):
        features.dataset[N]
    with pytest.raises(TypeError, match="Give the collate_fn to FeatureCache"):
        next(iter(DataLoader(features.dataset, 2, collate_fn=lambda b: [x for x, _ in b])))
    with pytest.raises(TypeError, match=r"call it with batch\.inputs .* got Tensor"):
        features(X)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------- DataLoader


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_persistent_workers_follow_the_boundary(start: str, tmp_path: Path) -> None:
    model = model_of()
    features = cached(model, Data(), tmp_path)
    loader = DataLoader(
        features.dataset,
        4,
        shuffle=True,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context=start,
    )
    hits = []
    for change in (None, None, freeze, None, unfreeze, None):
        if change is not None:
            change(model, "2")
        with warnings.catch_warnings():
            hits.append(0)
            for batch in loader:
                hits[-1] += batch.inputs.slots is not None
                labels_of(features, model, [batch])
    assert features.boundary == ("1",) and len(features) == N
    # The features of the first boundary were deleted when the deeper ones were complete.
    assert hits[:2] == [0, 4] and hits[3] == 4 and hits[5] == 4


@pytest.mark.parametrize("move", ["deeper", "shallower", "refilled"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_batches_in_flight_stay_right(move: str, in_memory: bool, tmp_path: Path) -> None:
    model = model_of(frozen=("0",) if move == "deeper" else ("0", "2"))
    features = cached(model, Data(), None if in_memory else tmp_path, on_change="refill")
    features.fill(progress=False)
    loader = DataLoader(features.dataset, 2, num_workers=1, multiprocessing_context="fork")
    seen, batches = [], iter(loader)
    seen += labels_of(features, model, [next(batches)])
    if move == "deeper":
        freeze(model, "2")
    elif move == "shallower":
        unfreeze(model, "2")
    else:
        model[2].weight.detach().add_(1)
    seen += labels_of(features, model, batches)
    assert seen == list(range(N))
    check_right(features, model)


def test_features_in_memory_reach_forked_workers_only() -> None:
    model = model_of()
    features = cached(model, Data())
    features.fill(progress=False)
    features.dataset.samples = Unloadable()
    options: dict[str, Any] = {"num_workers": 1, "multiprocessing_context": "fork"}
    check_right(features, model, **options)
    with pytest.raises(TypeError, match="Give FeatureCache a folder"):
        next(
            iter(DataLoader(features.dataset, 4, **{**options, "multiprocessing_context": "spawn"}))
        )


@pytest.mark.filterwarnings("ignore:'pin_memory'")
def test_pinned_memory_changes_nothing(tmp_path: Path) -> None:
    model = model_of()
    check_right(cached(model, Data(), tmp_path), model, pin_memory=True)
