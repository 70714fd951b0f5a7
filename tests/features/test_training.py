"""Training from stored features: the weights that training without a cache arrives at."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tests.helpers import optim_cases as cases
from tests.helpers.models import assert_same_weights, weights
from tests.helpers.processes import World, world_of
from torch_freeze import (
    FeatureCache,
    FreezeSchedule,
    FrozenAwareSGD,
    freeze,
    gradual_unfreeze,
    report,
    rotate,
    unfreeze,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES, BATCH = 12, 4


class Counted(nn.Module):
    """A convolution, a norm and an activation that count how often they run."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(before, after, 3), nn.BatchNorm2d(after)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return nn.functional.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    """Three blocks, a skip connection around the last, and a head with dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block0, self.block1 = Counted(3, 4), Counted(4, 6)
        self.block2 = Counted(6, 6)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(self.block0(x))
        x = self.block2(nn.functional.pad(x, (1, 1, 1, 1))) + x
        out: Tensor = self.head(self.drop(x.mean((2, 3))))
        return out


class Checkpointed(Net):
    """The same, with the last block in a checkpointed region."""

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.block2, self.block1(self.block0(x)), use_reentrant=False)
        out: Tensor = self.head(self.drop(x.mean((2, 3))))
        return out


class Images(TensorDataset):
    """Twelve images of noise, counted when they are read."""

    def __init__(self) -> None:
        gen = cases.generator(1)
        super().__init__(
            torch.randn(SAMPLES, 3, 12, 12, generator=gen),
            torch.randint(5, (SAMPLES,), generator=gen),
        )
        self.read = 0

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.read += 1
        return super().__getitem__(index)


def train(
    model: Net,
    batches: Callable[[], Any],
    forward: Callable[[Any], Tensor],
    schedule: FreezeSchedule | None = None,
    epochs: int = 4,
    family: cases.Family = cases.SGD,
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> list[float]:
    optimizer = family.ours(model.parameters(), **{**family.with_state, "lr": 0.05})
    losses = []
    for epoch in range(epochs):
        if schedule is not None:
            schedule.step()
        for step, (inputs, targets) in enumerate(batches()):
            optimizer.zero_grad()
            torch.manual_seed(100 * epoch + step)  # of the dropout
            scores = forward(inputs)
            loss = nn.functional.cross_entropy(scores, targets.to(scores.device))
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        after_epoch(epoch)
    return losses


SCHEDULES: dict[str, Any] = {
    "frozen for good": lambda model: None,
    "head, half, all": lambda model: FreezeSchedule(
        model, {0: ["block0", "block1", "block2"], 1: ["block0", "block1"], 3: []}
    ),
    "freezes more and more": lambda model: FreezeSchedule(
        model, {0: "block0", 1: ["block0", "block1"], 2: ["block0", "block1", "block2"]}
    ),
    "gradual": lambda model: gradual_unfreeze(model, ["block0", "block1", "block2", "head"]),
    "rotates": lambda model: rotate(
        model, ["block0", "block1", "block2"], k=1, every=1, always="head", seed=1, unit="epoch"
    ),
}


@pytest.mark.parametrize(
    ("device", "memory"),
    [
        pytest.param("cpu", True, id="in memory"),
        pytest.param("cpu", False, id="in a folder"),
        pytest.param("cuda", False, id="on a GPU, in a folder", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("family", cases.each_family(cases.UNLIKE_FAMILIES))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_batch_for_batch_training_is_the_same(
    schedule: str, family: cases.Family, memory: bool, device: str, tmp_path: Path
) -> None:
    plain, cached = Net().to(device), Net().to(device)
    for model in (plain, cached):
        freeze(model, "block0", "block1")
        if device == "cuda":  # simulated, it draws random numbers when the work runs
            model.drop.p = 0.0
    wanted = train(
        plain,
        lambda: DataLoader(Images(), BATCH),
        lambda images: plain(images.to(device)),
        SCHEDULES[schedule](plain),
        family=family,
    )
    path = None if memory else tmp_path / "features"
    features = FeatureCache(cached, Images(), path, spot_check=0)
    got = train(
        cached,
        lambda: DataLoader(features.dataset, BATCH, pin_memory=device == "cuda"),
        features,
        SCHEDULES[schedule](cached),
        family=family,
    )
    assert got == wanted
    assert_same_weights(weights(cached), weights(plain))


def test_on_a_hit_neither_the_sample_is_read_nor_the_prefix_run() -> None:
    model, images = Net(), Images()
    freeze(model, "block0", "block1")
    features = FeatureCache(model, images, spot_check=0)
    seen: list[tuple[int, int, int]] = []

    def note(epoch: int) -> None:
        seen.append((images.read, model.block1.runs, model.block2.runs))

    train(
        model, lambda: DataLoader(features.dataset, BATCH, shuffle=True), features, after_epoch=note
    )
    (read, prefix, suffix), later = seen[0], seen[1:]
    assert [(a, b) for a, b, _ in later] == [(read, prefix)] * 3
    assert later[-1][2] == suffix + 3 * SAMPLES // BATCH


class Pooled(nn.Module):
    """A convolution whose output is pooled, shown in part or used whole by a head that trains."""

    def __init__(self, use: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use = use
        self.conv, self.head, self.other = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.Linear(100, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.use == "pooled":
            return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]
        if self.use == "checkpointed":
            return checkpoint(self.head, x.mean((2, 3)), use_reentrant=False)  # type: ignore[no-any-return]
        if self.use == "a view":
            return self.head(x[:, :, 0, 0])  # type: ignore[no-any-return]
        return self.head(x[:, :, 0, 0].relu_()) + self.other(x[:, 0].flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("use", "boundary", "floats"),
    [
        ("pooled", ("the input of head",), 4),
        ("a view", ("the input of head",), 4),
        # Backward computes the input of the head again.
        ("checkpointed", ("conv",), 400),
        (
            "a part that is written to, and the whole",
            ("the input of head", "the input of other"),
            104,
        ),
    ],
)
def test_what_is_stored_is_what_meets_the_part_that_trains(
    use: str, boundary: tuple[str, ...], floats: int
) -> None:
    model = Pooled(use)
    freeze(model, "conv")
    features = FeatureCache(model, Images())
    assert features.boundary == boundary
    assert features.nbytes == SAMPLES * (1 + 8 + 4 * floats)
    wanted = model(Images().tensors[0])
    gradients = torch.autograd.grad(wanted.sum(), [*model.head.parameters()])
    for _ in range(2):
        (batch,) = DataLoader(features.dataset, SAMPLES)
        got = features(batch.inputs)
        assert torch.equal(got, wanted)
        assert all(
            map(torch.equal, torch.autograd.grad(got.sum(), [*model.head.parameters()]), gradients)
        )
    assert batch.inputs.slots is not None
    # When the head is another, so is the plan.
    model.head = nn.Linear(4, 5)
    assert torch.equal(features(batch.inputs), model(Images().tensors[0]))


class Scaled(nn.Linear):
    """A linear layer whose input may come in a list, and be scaled."""

    def forward(self, input: Any, scale: Any = 1) -> Tensor:
        return super().forward(input[0] if isinstance(input, list) else input) * scale


CALLS: dict[str, Callable[[Any, Tensor], Any]] = {
    "a tensor": lambda head, x: head(x),
    "by name": lambda head, x: head(input=x),
    "in a list": lambda head, x: head([x]),
    "two tensors": lambda head, x: head(x, x.new_ones(5)),
    "a tensor and one by name": lambda head, x: head(x, scale=x.new_ones(5)),
}


@pytest.mark.parametrize("later", CALLS)
@pytest.mark.parametrize("first", CALLS)
def test_a_module_may_take_what_is_stored_in_one_way(first: str, later: str) -> None:
    class Calling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head, self.way = nn.Conv2d(3, 4, 3), Scaled(4, 5), first

        def forward(self, x: Tensor) -> Any:
            return CALLS[self.way](self.head, self.conv(x).mean((2, 3)))

    model = Calling()
    freeze(model, "conv")
    features = FeatureCache(model, Images(), spot_check=0)
    features.fill(SAMPLES, progress=False)
    (batch,) = DataLoader(features.dataset, SAMPLES)
    assert features.boundary == ("the input of head",)
    assert torch.equal(features(batch.inputs), model(Images().tensors[0]))
    model.way = later
    if later == first:
        features(batch.inputs)
    else:
        with pytest.raises(RuntimeError, match="head was called with other arguments"):
            features(batch.inputs)


def test_a_deeper_boundary_is_filled_from_the_shallower_one(tmp_path: Path) -> None:
    model, images = Net(), Images()
    freeze(model, "block0")
    features = FeatureCache(model, images, tmp_path, spot_check=0)
    features.fill(BATCH, progress=False)
    assert features.boundary == ("block0",) and features.stored == SAMPLES
    freeze(model, "block1")
    batches = [*DataLoader(features.dataset, BATCH)]
    features(batches[0].inputs)
    assert features.boundary == ("block1",)
    read, runs = images.read, model.block0.runs
    for batch in batches[1:]:
        features(batch.inputs)
    assert (images.read, model.block0.runs) == (read, runs)
    assert features.stored == SAMPLES
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 1, "the shallower ones are deleted"


@pytest.mark.parametrize("old", ["delete", "keep"])
def test_unfreezing_makes_forward_whole_and_gives_the_disk_back(tmp_path: Path, old: Any) -> None:
    model, images = Net().eval(), Images()  # in train mode, forward would change the norms
    freeze(model, "block0", "block1")
    features = FeatureCache(model, images, tmp_path, old=old)
    features.fill(BATCH, progress=False)
    unfreeze(model)
    batch = next(iter(DataLoader(features.dataset, BATCH)))
    with pytest.warns(UserWarning, match=r"block0\.conv\.weight.*forward is whole"):
        out = features(batch.inputs)
    assert out.requires_grad and features.boundary == ()
    assert bool([p for p in tmp_path.iterdir() if p.is_dir()]) == (old == "keep")
    freeze(model, "block0", "block1")
    features(batch.inputs)
    assert features.boundary == ("block1",)
    # The batch still has its features, which are valid again, and so are stored again.
    assert features.stored == (SAMPLES if old == "keep" else BATCH)


def test_fill_goes_on_where_it_was_and_a_new_run_finds_everything(tmp_path: Path) -> None:
    model, images = Net(), Images()
    freeze(model, "block0", "block1")

    class StopError(Exception):
        pass

    def stops(index: int) -> Any:
        if images.read > SAMPLES:
            raise StopError
        return Images.__getitem__(images, index)

    features = FeatureCache(model, images, tmp_path)
    features.dataset.samples = [*map(images.__getitem__, range(SAMPLES))]
    features.dataset.samples = type("Some", (), {"__getitem__": lambda _, i: stops(i)})()
    images.read = SAMPLES - 3
    with pytest.raises(StopError):
        features.fill(2, progress=False)
    stored = features.stored
    assert 0 < stored < SAMPLES
    again = FeatureCache(model, Images(), tmp_path)
    assert again.stored == stored
    again.fill(2, progress=False)
    assert FeatureCache(model, Images(), tmp_path).stored == SAMPLES


def test_autocast_has_features_of_its_own() -> None:
    model = Net()
    freeze(model, "block0", "block1")
    features = FeatureCache(model, Images(), old="keep")
    plain = [features(b.inputs).detach() for b in DataLoader(features.dataset, BATCH)]
    for _ in range(2):
        for batch in DataLoader(features.dataset, BATCH):
            with torch.autocast("cpu", torch.bfloat16):
                torch.manual_seed(0)
                out = features(batch.inputs)
                torch.manual_seed(0)
                wanted = model(
                    torch.stack([features.dataset.samples[int(i)][0] for i in batch.inputs.rows])
                )
            assert out.dtype == torch.bfloat16 and torch.equal(out, wanted)
    assert plain[0].dtype == torch.float32


def test_a_mode_without_effect_is_no_change_and_one_of_dropout_is() -> None:
    model = Net()
    freeze(model, "block0", "block1")
    features = FeatureCache(model, Images())
    features.fill(BATCH, progress=False)
    for mode in (False, True):
        (batch,) = DataLoader(features.dataset, SAMPLES)
        model.train(mode)
        features(batch.inputs)
        assert batch.inputs.slots is not None and features.stored == SAMPLES
    layers = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 6), nn.Linear(6, 2))
    freeze(layers.eval(), "0", "2")
    features = FeatureCache(layers, TensorDataset(torch.randn(8, 4), torch.arange(8)))
    features.fill(progress=False)
    (batch,) = DataLoader(features.dataset, 8)
    layers[1].train()
    with pytest.raises(RuntimeError, match=r"mode \(train or eval\) of 1 changed"):
        features(batch.inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_stored_in_a_narrow_dtype_are_rounded_once(dtype: torch.dtype) -> None:
    model = Net().eval()
    freeze(model, "block0", "block1")
    whole = FeatureCache(model, Images())
    half = FeatureCache(model, Images(), dtype=dtype)
    for features in (whole, half):
        features.fill(BATCH, progress=False)
    rows = torch.arange(SAMPLES)
    exact, narrow = (f._now.store.read(rows)[-1] for f in (whole, half))  # type: ignore[union-attr]
    assert torch.equal(narrow, exact.to(dtype))
    assert half.nbytes < 0.6 * whole.nbytes
    (batch,) = DataLoader(half.dataset, SAMPLES)
    out = half(batch.inputs)
    assert out.dtype == torch.float32
    exact_out = model(Images().tensors[0])
    assert float((out - exact_out).abs().max()) < 0.02 * float(exact_out.abs().max())


@pytest.mark.parametrize("views", [1, 3])
def test_views_are_random_draws_that_stay(views: int) -> None:
    class Noisy(Images):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            x, y = super().__getitem__(index)
            return x + torch.randn(()), y

    model = Net().eval()
    freeze(model, "block0", "block1")
    with pytest.raises(ValueError, match=r"random transform.*views=K"):
        FeatureCache(model, Noisy())
    features = FeatureCache(model, Noisy(), views=views)
    features.fill(BATCH, progress=False)
    assert features.stored == SAMPLES * views
    outputs: dict[int, list[Tensor]] = {}
    for _ in range(20):
        for batch in DataLoader(features.dataset, BATCH, shuffle=True):
            assert batch.inputs.slots is not None
            for row, out in zip(batch.inputs.rows.tolist(), features(batch.inputs), strict=True):
                outputs.setdefault(row, []).append(out.detach())
    assert sorted(outputs) == [*range(SAMPLES * views)]
    for outs in outputs.values():
        assert all(torch.allclose(out, outs[0], atol=1e-5) for out in outs)
    if views > 1:
        assert not torch.allclose(outputs[0][0], outputs[1][0], atol=1e-3)


def test_the_trainable_part_may_be_compiled() -> None:
    model = Net().eval()
    freeze(model, "block0", "block1")
    model.block2.compile(backend="aot_eager")
    features = FeatureCache(model, Images())
    outs = []
    for _ in range(2):
        (batch,) = DataLoader(features.dataset, SAMPLES)
        outs.append(features(batch.inputs))
    assert batch.inputs.slots is not None
    assert torch.allclose(outs[0], outs[1], atol=1e-6)
    with pytest.raises(TypeError, match=r"compiled as a whole"):
        FeatureCache(torch.compile(model), Images())  # type: ignore[arg-type]


def test_report_says_what_a_cache_would_save() -> None:
    model = Net()
    freeze(model, "block0", "block1")
    text = str(report(model, example=Images().tensors[0][:3]))
    share, size = re.search(  # type: ignore[union-attr]
        r"FeatureCache would skip ([\d.]+) % of\s+forward, up to block1, and\s+store ([\d.]+ kB)",
        text,
    ).groups()
    features = str(FeatureCache(model, Images()))
    assert f"{share} % of forward is skipped, up to block1" in features
    assert float(size.split()[0]) == pytest.approx(6 * 8 * 8 * 4 / 1000, rel=0.05)


# ------------------------------------------------------------------------------ several processes


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of("cpu", 2) as world:
        yield world


def on_ddp(device: str, path: str | None) -> dict[str, Any]:
    """Train one epoch to fill and two more, by hand-over of the same batches."""
    model = Net()
    freeze(model, "block0", "block1")
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = FrozenAwareSGD(model.parameters(), lr=0.05)
    images = Images()
    features = None if path is None else FeatureCache(wrapped, images, path, spot_check=0)
    data: Any = images if features is None else features.dataset
    sampler: Any = DistributedSampler(images, shuffle=False)
    for epoch in range(3):
        for step, (inputs, targets) in enumerate(DataLoader(data, 3, sampler=sampler)):
            optimizer.zero_grad()
            torch.manual_seed(100 * epoch + step)
            out = (features or wrapped)(inputs)
            nn.functional.cross_entropy(out, targets).backward()
            optimizer.step()
    read = images.read
    return {"weights": weights(model), "read": read, "stored": features.stored if features else 0}


def test_ddp_ranks_share_one_folder(world: World, tmp_path: Path) -> None:
    plain = world.run(on_ddp, None)
    cached = world.run(on_ddp, str(tmp_path))
    for one, two in zip(plain, cached, strict=True):
        assert_same_weights(two["weights"], one["weights"])
    assert [rank["stored"] for rank in cached] == [SAMPLES, SAMPLES]
    # To see whether samples are random 3 + 8 * 2, to find the boundary 5, and its half once.
    assert all(rank["read"] <= 24 + SAMPLES // 2 for rank in cached)


def on_fsdp(
    device: str, path: str | None, when: str, kind: type[Net], deeper: str
) -> dict[str, Any]:
    """Train blocks that are sharded before or after the cache is made, and evaluate between."""
    from torch.distributed.fsdp import fully_shard

    model, images = kind(), Images()
    model.drop.p = 0.0
    freeze(model, "block0", "block1")

    def shard() -> None:
        fully_shard(model.block2)
        fully_shard(model.head)

    if when == "before":
        shard()
    features = None if path is None else FeatureCache(model, images, path, spot_check=0)
    if when == "after":
        shard()
    data: Any = images if features is None else features.dataset
    optimizer = FrozenAwareSGD(model.parameters(), lr=0.05, momentum=0.9)
    sampler: Any = DistributedSampler(images)
    losses, hits = [], []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        for inputs, targets in DataLoader(data, 3, sampler=sampler):
            loss = nn.functional.cross_entropy((features or model)(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            hits.append(features is not None and inputs.slots is not None)
        with torch.no_grad():  # which leaves the parameters gathered
            model(images.tensors[0])
        if features is not None and torch.distributed.get_rank() == epoch % 2:
            features.fill(progress=False)
            features.check()  # the other process does neither, and nothing waits for it
    said = ""
    if features is not None:
        freeze(model, deeper)
        (batch,) = DataLoader(features.dataset, SAMPLES)
        with pytest.warns(UserWarning, match="FeatureCache") as warned:
            features(batch.inputs)
        said = str(warned[0].message)
        assert features.boundary == ("block1",) and batch.inputs.slots is not None
    return {"losses": losses, "hits": hits, "said": said}


@pytest.mark.parametrize(
    ("when", "kind", "deeper", "refusal"),
    [
        ("before", Net, "block2", "block2 is sharded"),
        ("after", Net, "block2", "block2 is sharded"),
        ("after", Checkpointed, "head.bias", "Make the FeatureCache before fully_shard"),
    ],
)
def test_with_fsdp2_on_the_part_that_trains_losses_are_the_same(
    when: str, kind: type[Net], deeper: str, refusal: str, world: World, tmp_path: Path
) -> None:
    plain = world.run(on_fsdp, None, when, kind, deeper)
    cached = world.run(on_fsdp, str(tmp_path), when, kind, deeper)
    for one, two in zip(plain, cached, strict=True):
        torch.testing.assert_close(two["losses"], one["losses"])
        assert two["losses"][-1] < one["losses"][0]
        assert two["hits"][2:] == [True] * 6
        assert re.search(rf"{refusal}.* the boundary stays", two["said"])


#: The blocks that are sharded by themselves.
SHARDED = {
    "whole": ("block0", "block1", "block2"),
    "prefix": ("block1",),
    "around": (),
    "tensors": (),
    "checkpointed": ("block2",),
}


def refused_with_fsdp(device: str, path: str, what: str, when: str) -> str:
    """What a cache says of a model whose prefix is sharded, or that is sharded around it."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_module

    model = Checkpointed() if what == "checkpointed" else Net()
    freeze(model, "block0", "block1")

    def shard() -> None:
        if what == "tensors":
            mesh = torch.distributed.init_device_mesh("cpu", (2,))
            distribute_module(
                model.block1.conv,
                mesh,
                input_fn=lambda _, args, mesh: DTensor.from_local(*args, mesh),
                output_fn=lambda _, out, mesh: out.to_local(),
            )
        for name in SHARDED[what]:
            fully_shard(model.get_submodule(name))
        frozen = {p for p in model.parameters() if not p.requires_grad}
        if what in ("whole", "around"):
            fully_shard(model, ignored_params=frozen if what == "around" else None)

    if when == "before":
        shard()
        with pytest.raises(ValueError, match="FeatureCache") as raised:
            FeatureCache(model, Images(), path)
        return str(raised.value)
    features = FeatureCache(model, Images(), path, spot_check=0, on_change="refill")
    batch = next(iter(DataLoader(features.dataset, BATCH)))
    features(batch.inputs)
    shard()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="FeatureCache") as raised:  # type: ignore[assignment]
            features(batch.inputs)
    return str(raised.value)


@pytest.mark.parametrize(
    ("what", "when", "says"),
    [
        *(
            (what, when, rf"FeatureCache: {names} is sharded .* not fully_shard\(model\)\.")
            for when in ("before", "after")
            for what, names in (
                ("whole", "the model, block0, block1"),
                ("prefix", "block1"),
                ("around", "the model"),
                ("tensors", r"block1\.conv\.bias, block1\.conv\.weight"),
            )
        ),
        ("checkpointed", "before", "Make the FeatureCache before fully_shard"),
    ],
)
def test_what_fsdp2_shards_before_the_boundary_is_refused(
    what: str, when: str, says: str, world: World, tmp_path: Path
) -> None:
    for said in world.run(refused_with_fsdp, str(tmp_path), what, when):
        assert re.search(says, said)


def test_fsdp1_is_refused() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    class OnAnyDevice(FullyShardedDataParallel):
        def __init__(self, module: nn.Module) -> None:  # FSDP1's own needs a GPU
            nn.Module.__init__(self)
            self._fsdp_wrapped_module = module

    model: Any = Net()
    freeze(model, "block0", "block1")
    model.head = OnAnyDevice(model.head)
    with pytest.raises(ValueError, match=r"FSDP1\)\. Use torch\.distributed\.fsdp\.fully_shard"):
        FeatureCache(model, Images())
