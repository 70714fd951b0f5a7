"""Gradual unfreezing on handwritten digits: head alone, everything at once, or layer by layer.

A small convolutional net learns the digits 0 to 4 and is then given 10 labelled images each of the
digits 5 to 9. Three ways to go on, compared on all other images of 5 to 9:

- head only: the body stays frozen, its norms held;
- everything: all layers train from the start;
- gradual: the head first, then one more layer group every few epochs, from the output down
  (Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018).

The optimizer gets all parameters once, in all three, and a learning-rate scheduler runs beside.
The body has to adapt, so the head alone falls far short; gradual unfreezing ends where training
everything does, with less trained on the way. The data are the 1797 images of 8 x 8 pixels that
scikit-learn ships. Run with ``python examples/gradual_unfreezing.py``; it takes a few seconds.
``--optimizer AdamW`` trains with AdamW in place of SGD.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from torch_freeze import FreezeSchedule, FrozenAwareAdamW, FrozenAwareSGD, gradual_unfreeze

BATCH = 16
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": functools.partial(FrozenAwareSGD, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "AdamW": functools.partial(FrozenAwareAdamW, lr=5e-3, weight_decay=1e-2),
}
GROUPS = ["conv1", "conv2", "conv3", "head"]  # from input to output
PER_DIGIT = 10  # labelled images of each new digit
EPOCHS = 20
EVERY = 3  # epochs between two groups


@dataclass(frozen=True)
class Images:
    """Images of shape (n, 1, 8, 8) in [0, 1] and their classes of shape (n,)."""

    x: Tensor
    y: Tensor


def load() -> tuple[Images, Images]:
    """Digits 0 to 4, and digits 5 to 9 as classes 0 to 4."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.as_tensor(digits.target)
    return Images(x[y < 5], y[y < 5]), Images(x[y >= 5], y[y >= 5] - 5)


def few(images: Images, per_class: int, seed: int) -> tuple[Images, Images]:
    """Some labelled images of each class, drawn at random, and all others."""
    order = torch.randperm(len(images.y), generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[images.y[order] == c][:per_class] for c in range(5)])
    others = torch.ones(len(images.y), dtype=torch.bool)
    others[chosen] = False
    return Images(images.x[chosen], images.y[chosen]), Images(images.x[others], images.y[others])


def block(channels_in: int, channels_out: int) -> nn.Sequential:
    """A convolution, its norm and a ReLU."""
    convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU())


class Net(nn.Module):
    """Three convolutions and a linear head over 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = block(1, 16), block(16, 32), block(32, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of shape (n, 5) for images of shape (n, 1, 8, 8)."""
        x = nn.functional.max_pool2d(self.conv2(self.conv1(x)), 2)
        scores: Tensor = self.head(self.conv3(x).mean((2, 3)))
        return scores


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Images, seed: int
) -> None:
    """One pass over the images, in an order that follows from the seed."""
    model.train()
    order = torch.randperm(len(images.y), generator=torch.Generator().manual_seed(seed))
    for rows in order.split(BATCH):
        if len(rows) < 2:
            continue  # a norm needs two
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images.x[rows]), images.y[rows]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Share of images classified rightly."""
    model.eval()
    right = model(images.x).argmax(1) == images.y
    return float(right.float().mean())


def pretrain(images: Images, epochs: int, seed: int, optimizer_name: str = "SGD") -> Net:
    """A net that knows the first five digits."""
    torch.manual_seed(seed)
    net = Net()
    optimizer = OPTIMIZERS[optimizer_name](net.parameters())
    for epoch in range(epochs):
        train_epoch(net, optimizer, images, 1000 * seed + epoch)
    return net


WAYS: dict[str, Callable[[nn.Module], FreezeSchedule]] = {
    "head only": lambda net: FreezeSchedule(net, {0: GROUPS[:-1]}),
    "everything": lambda net: FreezeSchedule(net, {0: []}),
    "gradual": lambda net: gradual_unfreeze(net, GROUPS, every=EVERY),
}


@dataclass(frozen=True)
class Course:
    """How one way went: accuracy on unseen images and trainable parameters, after each epoch."""

    accuracy: list[float]
    trainable: list[int]


def fine_tune(
    pretrained: Net,
    way: str,
    train: Images,
    test: Images,
    epochs: int,
    seed: int,
    optimizer_name: str = "SGD",
) -> Course:
    """Go on from the pre-trained net; the only difference between the ways is the schedule."""
    net = copy.deepcopy(pretrained)
    torch.manual_seed(seed)
    net.head.reset_parameters()
    optimizer = OPTIMIZERS[optimizer_name](net.parameters())
    schedule = WAYS[way](net)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)  # never notices
    course = Course([], [])
    for epoch in range(epochs):
        schedule.step()
        train_epoch(net, optimizer, train, 1000 * seed + epoch)
        rates.step()
        course.accuracy.append(accuracy(net, test))
        course.trainable.append(sum(p.numel() for p in net.parameters() if p.requires_grad))
    return course


def compare(
    seeds: int = 5, epochs: int = EPOCHS, pretraining: int = 6, optimizer_name: str = "SGD"
) -> dict[str, list[Course]]:
    """Each way, once for every seed of weights, labelled images and order."""
    known, new = load()
    courses: dict[str, list[Course]] = {way: [] for way in WAYS}
    for seed in range(seeds):
        net = pretrain(known, pretraining, seed, optimizer_name)
        train, test = few(new, PER_DIGIT, seed)
        for way in WAYS:
            courses[way].append(fine_tune(net, way, train, test, epochs, seed, optimizer_name))
    return courses


def table(courses: dict[str, list[Course]]) -> str:
    """Accuracy at the end: mean, and the range over the seeds."""
    lines = [f"{'way':<12}{'accuracy':>10}   range over seeds   parameters trained"]
    for way, runs in courses.items():
        last = [run.accuracy[-1] for run in runs]
        work = statistics.mean(runs[0].trainable)
        lines.append(
            f"{way:<12}{statistics.mean(last):>10.1%}   {min(last):>6.1%} - {max(last):<6.1%}"
            f"   {work:>10,.0f} on average"
        )
    return "\n".join(lines)


def plot(courses: dict[str, list[Course]], path: Path) -> None:
    """Accuracy by epoch, the mean over seeds and their range; below, what trains."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7, 5.5), sharex=True, height_ratios=[3, 1], layout="constrained"
    )
    colours = {"head only": "#0072b2", "everything": "#d55e00", "gradual": "#009e73"}
    for way, runs in courses.items():
        by_epoch = list(zip(*(run.accuracy for run in runs), strict=True))
        epochs = range(1, len(by_epoch) + 1)
        means = [100 * statistics.mean(values) for values in by_epoch]
        above.plot(epochs, means, label=way, color=colours[way], marker="o", markersize=3)
        low = [100 * min(values) for values in by_epoch]
        high = [100 * max(values) for values in by_epoch]
        above.fill_between(epochs, low, high, color=colours[way], alpha=0.12, linewidth=0)
        below.step(epochs, runs[0].trainable, where="mid", color=colours[way])
    above.set_ylabel("accuracy on unseen 5-9 (%)")
    above.set_title(
        f"{PER_DIGIT} labelled images per new digit; mean and range of {len(runs)} seeds"
    )
    above.legend(loc="lower right", frameon=False)
    below.set_ylabel("trainable\nparameters")
    below.set_ylim(0)
    below.set_xlabel("epoch")
    below.set_xticks(range(EVERY, len(runs[0].trainable) + 1, EVERY))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Compare the three ways, print a table and draw a plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="SGD")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--plot", type=Path, default=Path("gradual_unfreezing.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # images this small gain nothing from a second thread
    courses = compare(options.seeds, optimizer_name=options.optimizer)
    print(table(courses))
    plot(courses, options.plot)
    print(f"plot: {options.plot}")


if __name__ == "__main__":
    main()
