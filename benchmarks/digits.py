"""Real training: a CNN that knows the digits 0-4 is fine-tuned on 5-9, its backbone frozen."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field

import torch
from contestants import OURS, REFERENCE, Contestant, Entry, Hyper
from measure import Equality, Memory, Summary, memory, no_collector, ratio, summarise, wait_for
from models import Workload, require
from suites import Outcome, Row, Setting
from torch import Tensor, nn

CURVE_TOLERANCE = 1e-4
"""Relative; roundings of one step grow over the steps after it."""
_BATCH = 64
_PRETRAIN = Hyper(lr=0.05, momentum=0.9, weight_decay=1e-4)
_FINETUNE = Hyper(lr=0.05, momentum=0.9, weight_decay=1e-4)


class DigitNet(nn.Module):
    """8x8 grey images to ``classes`` scores: a backbone of two convolutions and a linear head."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 16, 128),
            nn.ReLU(),
        )
        self.head = nn.Linear(128, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Scores of shape (batch, classes) for images of shape (batch, 1, 8, 8)."""
        scores: Tensor = self.head(self.backbone(images))
        return scores


@dataclass(frozen=True)
class Digits:
    """One half of the data set: five classes, split into training and test images."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_digits(first: int, device: torch.device) -> Digits:
    """scikit-learn's digits ``first`` to ``first + 4``, four fifths of them for training.

    Raises:
        models.MissingPackageError: scikit-learn is not installed.
    """
    datasets = require("sklearn.datasets", "scikit-learn", "the digits suite")
    bunch = datasets.load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target, dtype=torch.long) - first
    chosen = ((labels >= 0) & (labels < 5)).nonzero().squeeze(1)
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(first))]
    images, labels = images[chosen].to(device), labels[chosen].to(device)
    cut = len(chosen) * 4 // 5
    return Digits((images[:cut], labels[:cut]), (images[cut:], labels[cut:]))


def batches(data: tuple[Tensor, Tensor], epochs: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """The same shuffled batches for whoever asks with the same seed."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        made += [(images[part], labels[part]) for part in torch.split(order, _BATCH)]
    return made


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Percent of the images that get the right label."""
    images, labels = data
    with torch.no_grad():
        return 100 * float((model(images).argmax(1) == labels).float().mean())


def pretrain(device: torch.device, epochs: int) -> tuple[DigitNet, float]:
    """A network that knows 0-4, and its accuracy in percent on images of these it has not seen."""
    data = load_digits(0, device)
    torch.manual_seed(0)
    model = DigitNet().to(device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        _PRETRAIN.lr,
        _PRETRAIN.momentum,
        weight_decay=_PRETRAIN.weight_decay,
    )
    for images, labels in batches(data.train, epochs, seed=0):
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(images), labels))
        optimizer.step()
    return model, accuracy(model, data.test)


@dataclass
class DigitsRow:
    """One contestant's fine-tuning."""

    contestant: Contestant
    losses: list[float] = field(default_factory=list)
    iteration: list[float] = field(default_factory=list)
    accuracy: float = 0.0
    largest_gap: float = 0.0
    """Largest difference of the loss from the reference's at the same iteration, relative to it."""
    memory: Memory | None = None

    @property
    def holds(self) -> bool:
        """The loss curve is the reference's, up to rounding."""
        return self.largest_gap <= CURVE_TOLERANCE


@dataclass
class DigitsOutcome:
    """Everyone's fine-tuning from the same weights over the same batches."""

    device: str
    pretrained_accuracy: float
    accuracy_before: float
    trainable_elements: int
    elements: int
    rows: list[DigitsRow]

    @property
    def ours(self) -> DigitsRow:
        """FrozenAwareSGD's row."""
        return next(row for row in self.rows if row.contestant == OURS)

    def time(self, row: DigitsRow) -> Summary:
        """Nanoseconds of an iteration."""
        return summarise(row.iteration)

    def times_ours(self, row: DigitsRow) -> Summary:
        """How many times as long as FrozenAwareSGD an iteration takes."""
        return ratio(row.iteration, self.ours.iteration)

    def as_workload(self) -> Outcome:
        """The iterations as those of any workload, for picture and verdict."""
        model = DigitNet()
        return Outcome(
            suite="digits",
            key="digits",
            title="Digits, all but the head frozen",
            device=self.device,
            tensors=sum(1 for _ in model.parameters()),
            frozen_tensors=sum(1 for _ in model.backbone.parameters()),
            elements=self.elements,
            trainable_elements=self.trainable_elements,
            frozen_percent=100 - 100 * self.trainable_elements / self.elements,
            step_bytes=20 * self.trainable_elements,
            momentum=_FINETUNE.momentum,
            weight_decay=_FINETUNE.weight_decay,
            batch=f"{_BATCH} images of 8x8",
            rows=[
                Row(
                    row.contestant,
                    Equality(
                        row.largest_gap == 0,
                        row.largest_gap,
                        row.largest_gap,
                        tolerance=CURVE_TOLERANCE,
                    ),
                    {"iteration": row.iteration},
                    row.memory,
                )
                for row in self.rows
            ],
        )


@dataclass
class _Run:
    """A contestant's own copy of the network on its way."""

    row: DigitsRow
    model: DigitNet
    entry: Entry

    def iterate(self, images: Tensor, labels: Tensor, device: torch.device) -> None:
        wait_for(device)
        begin = time.perf_counter_ns()
        self.entry.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(images), labels)
        torch.autograd.backward(loss)
        self.entry.stepper.step()
        wait_for(device)
        self.row.iteration.append(time.perf_counter_ns() - begin)
        self.row.losses.append(loss.item())


def run_digits(setting: Setting, *, pretrain_epochs: int = 6, epochs: int = 8) -> DigitsOutcome:
    """Pre-train once, then let everyone fine-tune the head, taking turns batch by batch.

    Raises:
        models.MissingPackageError: scikit-learn is not installed.
    """
    device = setting.device
    setting.progress("digits: pre-training")
    start, pretrained = pretrain(device, pretrain_epochs)
    start.head = nn.Linear(128, 5).to(device)
    start.backbone.requires_grad_(False)
    data = load_digits(5, device)
    before = accuracy(start, data.test)

    contestants = [REFERENCE, *setting.select(any_frozen=True)]
    setting.progress("digits: fine-tuning")
    runs = [_start(contestant, start) for contestant in contestants]
    with no_collector():
        for images, labels in batches(data.train, epochs, seed=1):
            for run in setting.rng.sample(runs, len(runs)):
                run.iterate(images, labels, device)

    reference = runs[0].row.losses
    for run in runs:
        run.row.accuracy = accuracy(run.model, data.test)
        run.row.largest_gap = max(
            abs(a - b) / abs(b) for a, b in zip(run.row.losses, reference, strict=True)
        )
        run.row.memory = _memory(run, data.train, device)
    return DigitsOutcome(
        device=device.type,
        pretrained_accuracy=pretrained,
        accuracy_before=before,
        trainable_elements=sum(p.numel() for p in start.head.parameters()),
        elements=sum(p.numel() for p in start.parameters()),
        rows=[run.row for run in runs[1:]],
    )


def _start(contestant: Contestant, start: DigitNet) -> _Run:
    model = copy.deepcopy(start)
    entry = contestant.build([list(model.parameters())], _FINETUNE)
    return _Run(DigitsRow(contestant), model, entry)


def _memory(run: _Run, data: tuple[Tensor, Tensor], device: torch.device) -> Memory:
    images, labels = data[0][:_BATCH], data[1][:_BATCH]
    workload = Workload(
        key="digits",
        title="digits",
        groups=[list(run.model.parameters())],
        hyper=_FINETUNE,
        model=run.model,
        loss=lambda: nn.functional.cross_entropy(run.model(images), labels),
    )
    return memory(workload, run.entry.optimizer, run.entry.stepper, device)
