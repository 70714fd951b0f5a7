"""What bfloat16 moments do to AdamW: training on handwritten digits, three times from each seed.

The same net learns the same images in the same order with

- float32 moments, as torch keeps them;
- ``moment_dtype=torch.bfloat16``, which rounds stochastically;
- bfloat16 moments that are rounded to nearest, as a plain cast would do it.

With beta2 = 0.999, a step moves the second moment by at most a thousandth of itself where the
gradient is small. Neighbors in bfloat16 are four to eight thousandths apart, so rounding to nearest
never lets it fall; rounded stochastically, it falls as it should on average. The data are the 1797
images of 8 x 8 pixels that scikit-learn ships. Run with ``python examples/bfloat16_moments.py``; it
takes about a minute.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_freeze import FrozenAwareAdamW

BATCH = 64
LR = 1e-3
TEST = 360  # images
MOMENTS = ("exp_avg", "exp_avg_sq")
WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16, stochastic": {"moment_dtype": torch.bfloat16},
    "bfloat16, nearest": {},
}


class Result(NamedTuple):
    """What one run ended with."""

    loss: float  # mean cross entropy of the training images
    accuracy: float  # share of the test images that are classified rightly
    second: float  # mean of the second moments
    bytes: int  # of both moments, as the optimizer holds them


def load() -> tuple[Tensor, Tensor]:
    """Images of shape (n, 64) in [0, 1] and their classes of shape (n,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.as_tensor(digits.data, dtype=torch.float32) / 16, torch.as_tensor(digits.target)


def round_to_nearest(optimizer: torch.optim.Optimizer) -> None:
    """Replace the moments by the nearest values that bfloat16 has."""
    for state in optimizer.state.values():
        for name in MOMENTS:
            state[name].copy_(state[name].bfloat16())


def run(way: str, seed: int, epochs: int) -> Result:
    """Train a net from this seed: the same net and the same batches in all three ways."""
    x, y = load()
    generator = torch.Generator().manual_seed(seed)
    test, train = torch.randperm(len(y), generator=generator).tensor_split([TEST])
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = FrozenAwareAdamW(net.parameters(), lr=LR, **WAYS[way])
    for _ in range(epochs):
        order = train[torch.randperm(len(train), generator=generator)]
        for rows in order.split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
            if way == "bfloat16, nearest":
                round_to_nearest(optimizer)
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(net(x[train]), y[train]))
        accuracy = float((net(x[test]).argmax(1) == y[test]).float().mean())
    moments = [[state[name] for state in optimizer.state.values()] for name in MOMENTS]
    second = torch.cat([m.float().flatten() for m in moments[1]]).mean()
    return Result(loss, accuracy, float(second), sum(m.nbytes for both in moments for m in both))


def spread(values: list[float], form: str) -> str:
    """The median of the values, and their least and greatest."""
    median, least, most = statistics.median(values), min(values), max(values)
    return f"{median:{form}} [{least:{form}}, {most:{form}}]"


def table(results: dict[str, list[Result]]) -> str:
    """One row for each way, in Markdown."""
    rows = [
        "| moments | training loss | test accuracy, % | mean second moment |",
        "|---|---|---|---|",
    ]
    exact = [run.second for run in results["float32"]]
    for way, runs in results.items():
        ratios = [run.second / second for run, second in zip(runs, exact, strict=True)]
        cells = [
            way,
            spread([run.loss for run in runs], ".4f"),
            spread([100 * run.accuracy for run in runs], ".1f"),
            spread(ratios, ".2f"),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Train in all ways from all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the net is small
    results: dict[str, list[Result]] = {way: [] for way in WAYS}
    for seed in range(arguments.seeds):
        for way, runs in results.items():
            runs.append(run(way, seed, arguments.epochs))
    print(table(results))
    print("Median [least, greatest] over the seeds; the second moment relative to float32's.")


if __name__ == "__main__":
    main()
