"""Training from stored features on handwritten digits: the same losses, and what an epoch takes.

A small convolutional net learns the digits 0 to 4. Its first three convolutions are then frozen,
and the rest learns the digits 5 to 9, twice from the same start:

- without a cache: every epoch runs the frozen part again;
- with a FeatureCache: the first epoch runs it and stores what it gives, the others begin there.

Both runs see the same batches and draw the same random numbers, so their losses are equal in every
bit, which the script checks. The data are the 1797 images that scikit-learn ships, enlarged. Run
with ``python examples/feature_cache.py``; it takes a few seconds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_freeze import FeatureCache, FrozenAwareSGD, freeze_except

BATCH = 32
SAMPLES = 640  # of each half of the digits, in whole batches
EPOCHS = 6
TRAINED = ["conv4", "head"]


@dataclass(frozen=True)
class Run:
    """Losses of all batches, and seconds of each epoch."""

    losses: list[float]
    seconds: list[float]


def load(samples: int = SAMPLES) -> tuple[TensorDataset, TensorDataset]:
    """Digits 0 to 4, and digits 5 to 9 as classes 0 to 4: images of shape (1, 32, 32)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    x = nn.functional.interpolate(x, (32, 32), mode="bilinear")
    y = torch.as_tensor(digits.target)
    low, high = (y < 5).nonzero().flatten(), (y >= 5).nonzero().flatten()
    halves = (rows[:samples] for rows in (low, high))
    first, second = (TensorDataset(x[rows], y[rows] % 5) for rows in halves)
    return first, second


def block(channels_in: int, channels_out: int) -> nn.Sequential:
    """A convolution, its norm, a ReLU and a maximum over 2 x 2 pixels."""
    convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    norm = nn.BatchNorm2d(channels_out)
    return nn.Sequential(convolution, norm, nn.ReLU(), nn.MaxPool2d(2))


class Net(nn.Module):
    """Four convolutions and a linear head over 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = block(1, 16), block(16, 32)
        self.conv3, self.conv4 = block(32, 64), block(64, 64)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of shape (n, 5) for images of shape (n, 1, 32, 32)."""
        x = self.conv4(self.conv3(self.conv2(self.conv1(x))))
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


def train(
    model: nn.Module, dataset: TensorDataset, epochs: int, features: FeatureCache | None = None
) -> Run:
    """Train, from stored features if a cache is given; nothing else is different."""
    optimizer = FrozenAwareSGD(model.parameters(), lr=0.02, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    data = dataset if features is None else features.dataset
    loader = DataLoader(data, BATCH, shuffle=True, generator=order)
    losses, seconds = [], []
    model.train()
    for _ in range(epochs):
        start = time.perf_counter()
        for inputs, targets in loader:
            scores = model(inputs) if features is None else features(inputs)
            loss = nn.functional.cross_entropy(scores, targets)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return Run(losses, seconds)


def compare(samples: int = SAMPLES, epochs: int = EPOCHS) -> tuple[dict[str, Run], str]:
    """Both runs from the same start, and what the cache says of itself after the second."""
    known, new = load(samples)
    torch.manual_seed(0)
    start = Net()
    train(start, known, 2)
    freeze_except(start, *TRAINED)
    plain, cached = copy.deepcopy(start), copy.deepcopy(start)
    features = FeatureCache(cached, new)  # in memory; with a folder, the next run finds them
    runs = {
        "without a cache": train(plain, new, epochs),
        "with a FeatureCache": train(cached, new, epochs, features),
    }
    return runs, str(features)


def table(runs: dict[str, Run]) -> str:
    """The first and the last loss, and the time of the first epoch and of a later one."""
    titles = (
        f"{title:>14}" for title in ("first loss", "last loss", "first epoch", "later epochs")
    )
    lines = [f"{'run':<19}" + "".join(titles)]
    for name, run in runs.items():
        first, *later = (1000 * seconds for seconds in run.seconds)
        lines.append(
            f"{name:<19}{run.losses[0]:>14.4f}{run.losses[-1]:>14.4f}{first:>11.0f} ms"
            f"{statistics.median(later):>11.0f} ms"
        )
    return "\n".join(lines)


def plot(runs: dict[str, Run], path: Path) -> None:
    """The losses of both runs, and the time of each epoch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    colours = ["#d55e00", "#0072b2"]
    for n, (name, run) in enumerate(runs.items()):
        # Equal losses lie on each other: a wide pale line below a thin dotted one.
        style = {"linewidth": 5, "alpha": 0.4} if n == 0 else {"linestyle": ":", "linewidth": 1.8}
        left.plot(range(1, len(run.losses) + 1), run.losses, label=name, color=colours[n], **style)
        places = [epoch + (0.4 * n - 0.2) for epoch in range(1, len(run.seconds) + 1)]
        right.bar(places, [1000 * s for s in run.seconds], 0.38, label=name, color=colours[n])
    left.set_xlabel("batch")
    left.set_ylabel("loss")
    plain, cached = runs.values()
    equal = cached.losses == plain.losses
    left.set_title("the losses are equal in every bit" if equal else "the losses differ")
    right.set_xlabel("epoch")
    right.set_xticks(range(1, len(run.seconds) + 1))
    right.set_ylabel("time of the epoch (ms)")
    right.set_title(f"{', '.join(TRAINED)} train; the rest is frozen")
    for axes in (left, right):
        axes.set_ylim(0)
        axes.legend(frameon=False, loc="upper right")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    right.set_ylim(0, 1300 * max(max(run.seconds) for run in runs.values()))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Train both ways, compare, print a table and draw a plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--plot", type=Path, default=Path("feature_cache.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs, said = compare(options.samples, options.epochs)
    print(said)
    print(table(runs))
    plain, cached = runs.values()
    print("losses:", "equal in every bit" if cached.losses == plain.losses else "they differ")
    try:
        plot(runs, options.plot)
    except ImportError:
        print("no plot: matplotlib is not installed")
    else:
        print(f"plot: {options.plot}")


if __name__ == "__main__":
    main()
