"""The suite `digits`: a CNN that knows the digits 0-4 is fine-tuned on 5-9, backbone frozen."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

from ..checks import require
from ..contestants import REFERENCE, Contestant, Family
from ..records import FACTS, Measured
from ..timing import no_collector, timed
from .base import Setting, Suite

CURVE_TOLERANCE = 1e-4
"""Relative; the roundings of one step grow in the steps after it."""
Data = tuple[Tensor, Tensor]


def digit_net() -> nn.Sequential:
    """8x8 grey images to five scores: a backbone of two convolutions and a linear head."""
    layers = (nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU())
    backbone = (*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 16, 128), nn.ReLU())
    return nn.Sequential(nn.Sequential(*backbone), nn.Linear(128, 5))


def load_digits(first: int, device: torch.device) -> tuple[Data, Data]:
    """scikit-learn's digits ``first`` to ``first + 4``: four fifths to train with, one to test."""
    bunch = require("sklearn.datasets", "scikit-learn", "the digits suite").load_digits()
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
    orders = [torch.randperm(len(labels), generator=generator) for _ in range(epochs)]
    parts = (part.to(labels.device) for order in orders for part in torch.split(order, 64))
    return [(images[part], labels[part]) for part in parts]


def accuracy(model: nn.Module, data: Data) -> float:
    """Percent of the images that get the right label."""
    images, labels = data
    with torch.no_grad():
        return 100 * float((model(images).argmax(1) == labels).float().mean())


class Run:
    """A contestant's training of its own copy of a network."""

    def __init__(self, contestant: Contestant, family: Family, start: nn.Sequential) -> None:
        self.key, self.model = contestant.key, copy.deepcopy(start)
        groups = [list(self.model.parameters())]
        self.trainer = contestant.build(family, groups, family.hyper["digits"])
        self.losses: list[float] = []
        self.iteration: list[float] = []

    def iterate(self, images: Tensor, labels: Tensor) -> None:
        """One timed iteration."""

        def run() -> None:
            self.trainer.zero_grad()
            self.loss = nn.functional.cross_entropy(self.model(images), labels)
            self.trainer.backward(self.loss)
            self.trainer.step()

        self.iteration.append(timed(run, images.device, wait=True))
        self.losses.append(self.loss.item())


def run_digits(setting: Setting, pretrain_epochs: int = 6, epochs: int = 8) -> Measured:
    """Pre-train once, then let everyone fine-tune the head, taking turns batch by batch."""
    device, family = setting.device, setting.family
    train, test = load_digits(0, device)
    torch.manual_seed(0)
    first = Run(REFERENCE, family, digit_net().to(device))
    for images, labels in batches(train, pretrain_epochs, seed=0):
        first.iterate(images, labels)
    start, pretrained = first.model, accuracy(first.model, test)
    start[0].requires_grad_(False)
    start[1] = nn.Linear(128, 5).to(device)
    train, test = load_digits(5, device)
    before = accuracy(start, test)

    everyone = (REFERENCE, *setting.select(any_frozen=True))
    reference, *runs = [Run(contestant, family, start) for contestant in everyone]
    with no_collector():
        for images, labels in batches(train, epochs, seed=1):
            for run in setting.rng.sample([reference, *runs], len(everyone)):
                run.iterate(images, labels)

    trainable, elements = (sum(p.numel() for p in m.parameters()) for m in (start[1], start))
    details = (
        f": a CNN that knows 0-4 ({pretrained:.1f} %), fine-tuned on 5-9 ({trainable:,} of "
        f"{elements:,} elements train; {before:.1f} % correct before, {len(reference.losses)} "
        "iterations)"
    )
    found = Measured("digits", "digits", "Digits, all but the head frozen", details, "digits")
    found.add(FACTS, accuracy=before, pretrained_accuracy=pretrained, elements=elements)
    for run in runs:
        right = accuracy(run.model, test)
        found.add(run.key, loss=run.losses, iteration=run.iteration, accuracy=right)
        pairs = zip(run.losses, reference.losses, strict=True)
        found.compare(run.key, max(abs(a - b) / abs(b) for a, b in pairs), CURVE_TOLERANCE)
    return found


def suite(setting: Setting) -> Suite:
    """One training; without scikit-learn there are no images."""
    require("sklearn", "scikit-learn", "the digits suite")
    return Suite("digits", [("digits", partial(run_digits, setting))])
