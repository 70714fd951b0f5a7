"""The suite `digits`: a CNN that knows the digits 0-4 is fine-tuned on 5-9, backbone frozen."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..contestants import REFERENCE, Contestant
from ..memory import iteration_memory
from ..records import FACTS, Measured
from ..timing import no_collector, wait_for
from ..workloads import Hyper, Workload, require
from .base import Setting

CURVE_TOLERANCE = 1e-4
"""Relative; the roundings of one step grow in the steps after it."""
_BATCH = 64
HYPER = Hyper(lr=0.05, momentum=0.9, weight_decay=1e-4)
Data = tuple[Tensor, Tensor]


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


def load_digits(first: int, device: torch.device) -> tuple[Data, Data]:
    """scikit-learn's digits ``first`` to ``first + 4``: four fifths to train with, one to test.

    Raises:
        workloads.MissingPackageError: scikit-learn is not installed.
    """
    datasets = require("sklearn.datasets", "scikit-learn", "the digits suite")
    bunch = datasets.load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target, dtype=torch.long) - first
    chosen = ((labels >= 0) & (labels < 5)).nonzero().squeeze(1)
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(first))]
    images, labels = images[chosen].to(device), labels[chosen].to(device)
    cut = len(chosen) * 4 // 5
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:])


def batches(data: Data, epochs: int, seed: int) -> list[Data]:
    """Shuffled batches, the same for everyone with the same seed."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        made += [(images[part], labels[part]) for part in torch.split(order, _BATCH)]
    return made


def accuracy(model: nn.Module, data: Data) -> float:
    """Percent of the images that get the right label."""
    images, labels = data
    with torch.no_grad():
        return 100 * float((model(images).argmax(1) == labels).float().mean())


def pretrain(setting: Setting, epochs: int) -> tuple[DigitNet, float]:
    """A network that knows 0-4, and its accuracy in percent on images that it has not seen."""
    train, test = load_digits(0, setting.device)
    torch.manual_seed(0)
    run = Run(replace(REFERENCE, family=setting.family), DigitNet().to(setting.device))
    for images, labels in batches(train, epochs, seed=0):
        run.iterate(images, labels)
    return run.model, accuracy(run.model, test)


class Run:
    """A contestant's training of its own copy of a network."""

    def __init__(self, contestant: Contestant, start: DigitNet) -> None:
        self.contestant, self.model = contestant, copy.deepcopy(start)
        self.trainer = contestant.build([list(self.model.parameters())], HYPER)
        self.losses: list[float] = []
        self.iteration: list[float] = []

    def iterate(self, images: Tensor, labels: Tensor) -> None:
        """One timed iteration."""
        wait_for(images.device)
        begin = time.perf_counter_ns()
        self.trainer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.trainer.backward(loss)
        self.trainer.step()
        wait_for(images.device)
        self.iteration.append(time.perf_counter_ns() - begin)
        self.losses.append(loss.item())


def run_digits(setting: Setting, *, pretrain_epochs: int = 6, epochs: int = 8) -> Measured:
    """Pre-train once, then let everyone fine-tune the head, taking turns batch by batch."""
    device = setting.device
    setting.progress("digits: pre-training")
    start, pretrained = pretrain(setting, pretrain_epochs)
    start.head = nn.Linear(128, 5).to(device)
    start.backbone.requires_grad_(False)
    train, test = load_digits(5, device)
    before = accuracy(start, test)

    setting.progress("digits: fine-tuning")
    reference = replace(REFERENCE, family=setting.family)
    runs = [Run(one, start) for one in (reference, *setting.select(any_frozen=True))]
    with no_collector():
        for images, labels in batches(train, epochs, seed=1):
            for run in setting.rng.sample(runs, len(runs)):
                run.iterate(images, labels)

    trainable, elements = (sum(p.numel() for p in m.parameters()) for m in (start.head, start))
    details = (
        f": a CNN that knows 0-4 ({pretrained:.1f} %), fine-tuned on 5-9, backbone "
        f"frozen\n({trainable:,} of {elements:,} elements train; {before:.1f} % correct before, "
        f"{len(runs[0].losses)} iterations)"
    )
    found = Measured("digits", "digits", "Digits, all but the head frozen", details)
    found.add(FACTS, accuracy=before, pretrained_accuracy=pretrained, elements=elements)
    for run in runs[1:]:
        found.add(
            run.contestant.key,
            loss=run.losses,
            iteration=run.iteration,
            accuracy=accuracy(run.model, test),
            **_memory(run, train, device),
        )
        gap = max(abs(a - b) / abs(b) for a, b in zip(run.losses, runs[0].losses, strict=True))
        found.compare(run.contestant.key, gap, CURVE_TOLERANCE)
    return found


def _memory(run: Run, data: Data, device: torch.device) -> dict[str, int]:
    images, labels = data[0][:_BATCH], data[1][:_BATCH]
    workload = Workload(
        key="digits",
        title="digits",
        groups=[list(run.model.parameters())],
        hyper=HYPER,
        loss=lambda: nn.functional.cross_entropy(run.model(images), labels),
    )
    return iteration_memory(workload, run.trainer, device)


def run(setting: Setting) -> Iterator[Measured]:
    """The suite."""
    yield run_digits(setting)
