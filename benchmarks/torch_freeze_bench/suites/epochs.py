"""The suite `epochs`: whole trainings with a frozen prefix, whose output is cached or not."""

from __future__ import annotations

import copy
import inspect
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from torch_freeze import FeatureCache, freeze_except, gradual_unfreeze

from ..checks import require, usable
from ..contestants import FORMS, FROZEN_AWARE, Contestant
from ..prefixes import (
    CLASSES,
    NETWORKS,
    Data,
    Parts,
    Repeated,
    digits,
    sentence_example,
    sentences,
)
from ..records import FACTS, OURS, Measured, Summary
from ..tables import Reached, duration, judge, multiple
from ..timing import Budget, interleave, iteration_turn, no_collector, timed
from .base import Setting, Suite, Task

PLAIN = Contestant("filter/default", FORMS["default"], scope="filter")
STOCK = Contestant("all/default", FORMS["default"])
CACHED, FILLING, BY_HAND = "cached", "filling", "by hand"
OPTIONS: dict[str, dict[str, Any]] = {
    "cached, bf16 stored": {"dtype": torch.bfloat16},
    "cached, bf16 prefix": {"frozen_dtype": torch.bfloat16},
    "cached, compiled": {"compile_frozen": True},
}
"""Options of FeatureCache that make it smaller or faster, and inexact."""
CHECKING: float = inspect.signature(FeatureCache).parameters["spot_check"].default
"""The share of the time that spot checks take. They are off here, and it is added to the figures
that are judged: they come at intervals, and with others in between there is one in each turn."""
TOLERANCE = 1e-3
"""Relative; where a batch of other samples rounds otherwise, every step makes the gap larger."""


@dataclass(frozen=True)
class Extent:
    """How much is trained: the images of an epoch, those of a batch, and the epochs."""

    images: int
    tested: int
    batch: int
    pretraining: int
    epochs: int


FULL, QUICK = Extent(256, 96, 32, 3, 4), Extent(32, 32, 16, 1, 2)


def extent_of(setting: Setting) -> Extent:
    """How much is trained in this run."""
    return QUICK if setting.quick else FULL


def orders(length: int, epochs: int) -> list[list[int]]:
    """The order of the samples in each epoch, the same for everyone."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randperm(length, generator=generator).tolist() for _ in range(epochs)]


def accuracy(model: nn.Module, data: Data, device: torch.device) -> float:
    """Percent of the tested samples that get the right label."""
    *inputs, labels = (value.to(device) for value in data.tested)
    model.eval()
    with torch.no_grad():
        right = (model(*inputs).argmax(1) == labels).float().mean()
    model.train()
    return 100 * float(right)


class Run:
    """A contestant's training of its own copy of a model."""

    def __init__(
        self,
        key: str,
        contestant: Contestant,
        start: nn.Module,
        data: Data,
        extent: Extent,
        setting: Setting,
        prepare: Callable[[nn.Module], Any],
    ) -> None:
        """``prepare`` freezes; what it returns, if it has a ``step``, is called each epoch."""
        self.key, self.data, self.extent, self.device = key, data, extent, setting.device
        self.model = copy.deepcopy(start)
        self.schedule = prepare(self.model)
        usual = setting.family.hyper["digits"]
        hyper = {**usual, "lr": data.rate * usual["lr"]}
        groups = [list(self.model.parameters())]
        self.trainer = contestant.build(setting.family, groups, hyper)
        self.losses: list[float] = []
        self.epochs: list[float] = []
        self.right: list[float] = []
        self.setup = 0.0
        self.features = 0.0

    def scores(self, order: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """What the model says of each batch, and the labels."""
        for *inputs, labels in DataLoader(self.data.train, self.extent.batch, sampler=order):
            yield self.model(*(value.to(self.device) for value in inputs)), labels

    def train(self, order: list[int]) -> None:
        """One timed epoch, and the accuracy after it."""
        losses = []

        def run() -> None:
            if self.schedule is not None and self.epochs:
                self.schedule.step()
            for scores, labels in self.scores(order):
                loss = nn.functional.cross_entropy(scores, labels.to(self.device))
                self.trainer.zero_grad()
                self.trainer.backward(loss)
                self.trainer.step()
                losses.append(loss.detach())

        self.epochs.append(timed(run, self.device, wait=True))
        self.losses += [loss.item() for loss in losses]
        self.right.append(accuracy(self.model, self.data, self.device))

    def until(self, right: float) -> float | None:
        """Training time until the accuracy is at least this."""
        spent = self.setup
        for taken, percent in zip(self.epochs, self.right, strict=True):
            spent += taken
            if percent >= right:
                return spent
        return None


class Cached(Run):
    """The same with FeatureCache, whose making is timed too."""

    def __init__(self, *given: Any, folder: str, **options: Any) -> None:
        super().__init__(*given)

        def make() -> None:
            self.cache = FeatureCache(self.model, self.data.train, folder, spot_check=0, **options)

        self.setup = timed(make, self.device, wait=True)
        self.share = self.cache.share

    def scores(self, order: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """As for everyone, through the cache."""
        for batch in DataLoader(self.cache.dataset, self.extent.batch, sampler=order):
            yield self.cache(batch.inputs), batch.targets
        self.features = max(self.features, self.cache.nbytes)


class ByHand(Run):
    """The prefix is run once over all samples, into a tensor; then the rest trains on that."""

    def __init__(self, *given: Any, parts: Callable[[nn.Module], Parts]) -> None:
        super().__init__(*given)
        self.prefix, self.suffix = parts(self.model)
        self.stored: Tensor | None = None

    def scores(self, order: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """As for everyone; the first epoch includes the extraction."""
        if self.stored is None:
            made, labels = [], []
            with torch.no_grad():
                for *inputs, right in DataLoader(self.data.train, self.extent.batch):
                    made.append(self.prefix(*(value.to(self.device) for value in inputs)))
                    labels.append(right)
            self.stored, self.labels = torch.cat(made), torch.cat(labels)
            self.features = self.stored.nbytes
        for rows in torch.tensor(order).split(self.extent.batch):
            yield self.suffix(self.stored[rows.to(self.device)]), self.labels[rows]


def gap(run: Run, base: Run) -> float:
    """The largest relative difference of losses and weights; 0 if all are equal in every bit."""
    pairs = [(torch.tensor(run.losses), torch.tensor(base.losses))]
    theirs = base.model.state_dict()
    pairs += [(value, theirs[name]) for name, value in run.model.state_dict().items()]
    return max(difference(a, b) for a, b in pairs)


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest value; 0 if equal in every bit."""
    if torch.equal(a, b):
        return 0.0
    value = float((a.double() - b.double()).abs().max() / b.double().abs().max())
    return value if value == value else float("inf")


def take_turns(setting: Setting, runs: Sequence[Run], epochs: Sequence[list[int]]) -> None:
    """Everyone trains, in turns of one epoch."""
    with no_collector(), warnings.catch_warnings():
        # A schedule that unfreezes everything is meant to.
        warnings.filterwarnings("ignore", "FeatureCache")
        for order in epochs:
            for run in setting.rng.sample(runs, len(runs)):
                run.train(order)


@cache
def pretrained(name: str, extent: Extent, device: torch.device) -> tuple[nn.Module, float]:
    """A network that knows the digits 0 to 4, with another head, and how many it gets right."""
    data, network = digits(0, extent.images, extent.tested), NETWORKS[name]
    torch.manual_seed(0)
    model = network.build().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for order in orders(len(data.train), extent.pretraining):
        for images, labels in DataLoader(data.train, extent.batch, sampler=order):
            optimizer.zero_grad()
            torch.autograd.backward(
                nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
            )
            optimizer.step()
    right = accuracy(model, data, device)
    head: Any = model.get_submodule(network.head)
    model.set_submodule(network.head, nn.Linear(head.in_features, CLASSES).to(device))
    return model, right


def run_digits(setting: Setting, name: str, cut: str, *, options: bool = False) -> Measured:
    """Fine-tune a network, which knows the digits 0 to 4, on 5 to 9."""
    extent, network = extent_of(setting), NETWORKS[name]
    start, right = pretrained(name, extent, setting.device)
    data = digits(5, extent.images, extent.tested)
    one = median(timed(lambda: data.train[0], setting.device) for _ in range(20))
    details = (
        f"knows the digits 0-4 ({right:.0f} %) and learns 5-9, PNG files of 8x8 in memory, each "
        f"decoded and enlarged in {duration(one)}"
    )
    found = Measured("epochs", f"{name}/{cut}", network.titled(cut), details, "epochs")
    prepare, parts = partial(_freeze_but, network.trains[cut]), partial(network.cut, cut)
    return run_all(found, setting, start, data, prepare, parts, OPTIONS if options else None)


def run_sentences(setting: Setting) -> Measured:
    """Train a linear head on a frozen sentence encoder."""
    model, data, parts = sentences(extent_of(setting).batch)
    details = "first sentences of docstrings of installed packages, tokenized before"
    title = "all-MiniLM-L6-v2, all but the head frozen"
    found = Measured("epochs", "sentences/head", title, details, "epochs")
    prepare = partial(_freeze_but, ["head"])
    return run_all(found, setting, model.to(setting.device), data, prepare, parts)


def run_schedule(setting: Setting) -> Measured:
    """Two epochs each of the head alone, the second half, and everything."""
    extent, network = extent_of(setting), NETWORKS["resnet18"]
    start, _ = pretrained("resnet18", extent, setting.device)
    layers = list(dict(start.named_children()))
    *half, head = network.trains["half"]
    first = layers[: layers.index(half[0])]
    groups = [[n for n in first if list(start.get_submodule(n).parameters())], half, [head]]

    def prepare(model: nn.Module) -> Any:
        schedule = gradual_unfreeze(model, groups, every=2)
        schedule.step()
        return schedule

    title = f"{network.title}, the head, then half, then all train"
    found = Measured("epochs", "resnet18/schedule", title, "2 epochs each", "schedule")
    data = digits(5, extent.images, extent.tested)
    return run_all(found, setting, start, data, prepare)


def _freeze_but(trains: Sequence[str], model: nn.Module) -> None:
    freeze_except(model, *trains)


def run_all(
    found: Measured,
    setting: Setting,
    start: nn.Module,
    data: Data,
    prepare: Callable[[nn.Module], Any],
    parts: Callable[[nn.Module], Parts] | None = None,
    options: Mapping[str, dict[str, Any]] | None = None,
) -> Measured:
    """Everyone trains the same model, taking turns epoch by epoch; by hand if it has two parts."""
    extent, stock = extent_of(setting), PLAIN if parts else STOCK
    count, length = extent.epochs if parts else 6, len(data.train)
    with tempfile.TemporaryDirectory() as folder:
        given = (start, data, extent, setting, prepare)
        runs: list[Run] = [Run(stock.key, stock, *given), Run(OURS, FROZEN_AWARE, *given)]
        if parts is not None:
            runs.append(ByHand(BY_HAND, FROZEN_AWARE, *given, parts=parts))
        caches = [
            Cached(key, FROZEN_AWARE, *given, folder=f"{folder}/{number}", **chosen)
            for number, (key, chosen) in enumerate([(CACHED, {}), *(options or {}).items()])
        ]
        runs += caches
        take_turns(setting, runs, orders(length, count))
    share, wanted = caches[0].share, max(runs[0].right) - 2  # the last digits come by chance
    forward = f"{100 * share:.1f} % of forward; " if parts else ""
    found.details = f" ({forward}{length} samples in batches of {extent.batch}: {found.details})"
    found.add(FACTS, share=share, wanted=wanted, samples=length)
    for run in runs:
        first, *later = run.epochs
        found.add(run.key, setup=run.setup, first_epoch=first, epoch=later, loss=run.losses)
        found.add(run.key, total=run.setup + sum(run.epochs), accuracy=run.right)
        found.add(run.key, features=run.features)
        if (until := run.until(wanted)) is not None:
            found.add(run.key, to_accuracy=until)
    # Ours is compared with stock, and every way to skip the prefix with ours.
    for run in runs[1:]:
        base = runs[0 if run.key == OURS else 1]
        found.compare(run.key, gap(run, base), float("inf") if run.key in OPTIONS else TOLERANCE)
    return found


def run_iterations(setting: Setting, name: str, cut: str, batch: int) -> Measured:
    """Single iterations on random images in memory, everyone in turns on one model."""
    network, device, family = NETWORKS[name], setting.device, setting.family
    usual = setting.budget
    budget = Budget(10 * usual.seconds, usual.least, min(usual.most, 40))
    torch.manual_seed(0)
    model = network.build().to(device).train()
    freeze_except(model, *network.trains[cut])
    images = torch.randn(batch, 3, network.size, network.size)
    data = Repeated(images, torch.randint(CLASSES, (batch,)), batch * (budget.most + 2))
    features = FeatureCache(model, data, spot_check=0)
    prefix, suffix = network.cut(cut, model)
    with torch.no_grad():
        stored = prefix(images.to(device))
    labels = data.labels.to(device)
    some = torch.arange(batch, device=device)
    fresh = iter(range(0, len(data), batch))

    def loaded(first: int) -> Tensor:
        inputs, _ = default_collate([data[i] for i in range(first, first + batch)])
        scores: Tensor = model(inputs.to(device))
        return scores

    def cached(first: int) -> Tensor:
        rows = range(first, first + batch)
        read = features.dataset.collate(features.dataset.__getitems__(rows))
        scores: Tensor = features(read.inputs)
        return scores

    ways: dict[str, Callable[[], Tensor]] = {
        PLAIN.key: lambda: loaded(0),
        OURS: lambda: loaded(0),
        FILLING: lambda: cached(next(fresh)),
        CACHED: lambda: cached(0),
        BY_HAND: lambda: suffix(stored[some]),
    }
    title = network.titled(cut)
    share = features.share
    details = f" ({100 * share:.2f} % of forward; batch {batch}, random images in memory)"
    found = Measured("epochs", f"{name}/{cut}/iteration", title, details, "iterations")
    found.add(FACTS, share=share)
    groups, turns = [list(model.parameters())], {}
    expected = ways[OURS]().detach()
    for key, way in ways.items():
        found.compare(key, difference(way().detach(), expected), TOLERANCE)
    for key, way in ways.items():
        contestant = PLAIN if key == PLAIN.key else FROZEN_AWARE
        trainer = contestant.build(family, groups, family.hyper["model"])
        loss = partial(_loss, way, labels)
        turns[key] = iteration_turn(trainer, loss, device)
    for key, taken in interleave(turns, budget, setting.rng).items():
        found.add(key, iteration=taken)
    return found


def _loss(way: Callable[[], Tensor], labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(way(), labels)


def reached(measured: Sequence[Measured]) -> Iterator[Reached]:
    """The lines of the table of targets."""
    for found in measured:
        exact = found.one(CACHED, "difference")
        figure = None if exact is None else (exact, "bits" if exact == 0 else f"{exact:.0e}")
        what = "output" if found.kind == "iterations" else "losses and weights"
        if found.kind == "epochs":
            first = found.ratio(CACHED, "first epoch")
            yield judge(f"{found.title}: filling epoch over a plain one", _x(first), "<= 1.05x")
        if found.kind == "iterations":
            filling, suffix, gain = (
                found.ratio(FILLING, "iteration"),
                found.ratio(CACHED, "iteration", to=BY_HAND),
                found.ratio(OURS, "iteration", to=CACHED),
            )
            yield judge(f"{found.title}: filling over plain iteration", _x(filling), "<= 1.05x")
            suffix = None if suffix is None else _scaled(suffix, 1 / (1 - CHECKING))
            gain = None if gain is None else _scaled(gain, 1 - CHECKING)
            yield judge(f"{found.title}: cached over suffix alone", _x(suffix), "<= 1.1x")
            share = found.one(FACTS, "share") or 0.0
            if found.key.startswith("resnet50/head"):
                yield judge(f"{found.title}: plain over cached iteration", _x(gain), ">= 50x")
            elif "/head" not in found.key and gain is not None:
                ideal = (3 - 2 * share) / (3 - 3 * share)
                text = f"{gain.median / ideal:.2f} of {multiple(ideal)}x"
                case = f"{found.title}: gain over (3-2f)/(3-3f), f = {share:.2f}"
                yield judge(case, (gain.median / ideal, text), ">= 0.9")
        yield judge(f"{found.title}: {what} as without the cache", figure, "<= 0")


def _scaled(ratio: Summary, by: float) -> Summary:
    return Summary(*(by * value for value in ratio))


def _x(ratio: Any) -> tuple[float, str] | None:
    return ratio and (ratio.median, f"{multiple(ratio.median)}x")


def suite(setting: Setting) -> Suite:
    """Trainings of small networks on real data, and iterations of larger ones on random data."""
    for package, pip in (("sklearn", "scikit-learn"), ("torchvision", "torchvision")):
        require(package, pip, "the suite epochs")
    trained = [("resnet18", "half")]
    timed_alone = [("resnet50", "head", 2)]
    if not setting.quick:
        trained = [(name, cut) for name in ("resnet18", "vit") for cut in ("half", "head")]
        timed_alone = [("resnet50", "head", 8)]
        timed_alone += [("resnet18", cut, 32) for cut in ("half", "three quarters", "head")]
        timed_alone += [("vit", cut, 32) for cut in ("half", "two thirds", "head")]
    tasks: list[Task] = []
    for name, cut in trained:
        # The options are measured once.
        options = (name, cut) == ("resnet18", "half") and not setting.quick
        task = partial(run_digits, setting, name, cut, options=options)
        tasks.append((NETWORKS[name].titled(cut), task))
    tasks.append(("a schedule", partial(run_schedule, setting)))
    if not setting.quick and usable(["sentences"], lambda _: sentence_example(), explicit=False):
        tasks.append(("sentences", partial(run_sentences, setting)))
    for name, cut, batch in timed_alone:
        task = partial(run_iterations, setting, name, cut, batch)
        tasks.append((f"{NETWORKS[name].titled(cut)}, iterations", task))
    return Suite("epochs", tasks, reached, "with features cached")
