"""Three new tokens for a small GPT-2 with a tied head; everything else keeps its bits.

A GPT-2 of two layers learns sentences of a small grammar ("the old cat sees the dog ."). Then the
vocabulary gets three words, a new animal, a new verb and a new adjective, and the model learns
sentences with them in three ways from the same start:

- rows: `freeze_except(model, "transformer.wte", rows=[the three words], vocab=...)`;
- masked: the whole table trains, and a hook sets the gradients of the old rows to zero, as many
  scripts do. AdamW's weight decay moves the old rows all the same;
- everything trains, with the smaller learning rate of the pretraining.

The script prints the loss of new sentences and of old ones, how many of the other weights
changed, and the bytes of gradients and optimizer state, and checks that nothing but three rows
changed in the first way. It downloads nothing. Run with ``python examples/new_tokens.py``.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_freeze import FrozenAwareAdamW, freeze_except, guard, report

ADJECTIVES = ["old", "small", "red", "quiet", "happy"]
ANIMALS = ["cat", "dog", "horse", "bird", "fish", "mouse"]
VERBS = ["sees", "likes", "follows", "hears"]
WORDS = ["the", ".", *ADJECTIVES, *ANIMALS, *VERBS]
NEW = ["striped", "zebra", "outruns"]
LENGTH = 8  # words of a sentence
BATCH = 32
WAYS = ["rows", "masked", "everything"]


@dataclass(frozen=True)
class Run:
    """What came of one way to train the new words."""

    losses: list[float]  # of new sentences, after each ten steps
    old_before: float
    old_after: float
    changed: int  # numbers of the model, other than the new rows, that changed
    of: int
    gradient_bytes: int
    state_bytes: int


def sentences(vocab: dict[str, int], number: int, seed: int, *, new: bool = False) -> Tensor:
    """Sentences of shape (number, LENGTH); new ones have one of the new words or more."""
    words = torch.Generator().manual_seed(seed)

    def choose(known: list[str], added: str) -> str:
        if new and float(torch.rand((), generator=words)) < 0.6:
            return added
        return known[int(torch.randint(len(known), (), generator=words))]

    rows: list[list[str]] = []
    while len(rows) < number:
        row = ["the", choose(ADJECTIVES, NEW[0]), choose(ANIMALS, NEW[1])]
        row += [choose(VERBS, NEW[2]), "the", choose(ADJECTIVES, NEW[0]), choose(ANIMALS, NEW[1])]
        if not new or not set(NEW).isdisjoint(row):
            rows.append([*row, "."])
    return torch.tensor([[vocab[word] for word in row] for row in rows])


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """The mean loss of the next word."""
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def pretrained(steps: int) -> tuple[Any, dict[str, int]]:
    """A small GPT-2 that knows the grammar, and its vocabulary with the new words' rows added."""
    from transformers import GPT2Config, GPT2LMHeadModel, logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call,unused-ignore]

    torch.manual_seed(0)
    vocab = {word: row for row, word in enumerate(WORDS)}
    config = GPT2Config(
        vocab_size=len(vocab),
        n_positions=LENGTH,
        n_embd=64,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = GPT2LMHeadModel(config)
    optimizer = FrozenAwareAdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(model, sentences(vocab, BATCH, step)))
        optimizer.step()
    vocab.update({word: len(vocab) + place for place, word in enumerate(NEW)})
    model.resize_token_embeddings(len(vocab), mean_resizing=False)
    return model, vocab


def learn(start: Any, vocab: dict[str, int], way: str, steps: int) -> Run:
    """Train the new words on a copy of the model."""
    model = copy.deepcopy(start)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = "transformer.wte.weight"
    rows = [vocab[word] for word in NEW]
    if way == "rows":
        freeze_except(model, "transformer.wte", rows=NEW, vocab=vocab)
    elif way == "masked":
        freeze_except(model, "transformer.wte")
        old = torch.ones(len(vocab), 1)
        old[rows] = 0
        model.get_parameter(table).register_hook(lambda grad: grad * (1 - old))
    lr = 3e-3 if way == "everything" else 0.02
    optimizer = FrozenAwareAdamW(model.parameters(), lr=lr, weight_decay=0.1)
    known, new = sentences(vocab, 64, 10**6), sentences(vocab, 64, 10**6, new=True)
    with torch.no_grad():
        old_before = float(loss_of(model, known))
    losses = []
    with guard(model):  # raises if something frozen changes
        for step in range(steps):
            optimizer.zero_grad()
            batch = sentences(vocab, BATCH, 10**4 + step, new=True)
            torch.autograd.backward(loss_of(model, batch))
            optimizer.step()
            if step % 10 == 9:
                with torch.no_grad():
                    losses.append(float(loss_of(model, new)))
    with torch.no_grad():
        old_after = float(loss_of(model, known))
    changed = of = 0
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # the table again
        moved = value != before[name]
        if name == table:
            moved[rows] = False
        changed += int(moved.sum())
        of += moved.numel()
    total = report(model, optimizer).total
    state = total.state_bytes or 0
    return Run(losses, old_before, old_after, changed, of, total.gradient_bytes, state)


def compare(pretraining: int = 300, steps: int = 150) -> dict[str, Run]:
    """All ways from the same start."""
    start, vocab = pretrained(pretraining)
    return {way: learn(start, vocab, way, steps) for way in WAYS}


def table(runs: dict[str, Run]) -> str:
    """One line for each way."""
    lines = [
        f"{'':12}{'new loss':>9}{'old loss, before and after':>29}{'other weights changed':>24}"
        f"{'gradients':>12}{'state':>11}"
    ]
    for way, run in runs.items():
        lines.append(
            f"{way:12}{run.losses[-1]:9.3f}{run.old_before:19.3f}{run.old_after:10.3f}"
            f"{run.changed:12} of {run.of}{run.gradient_bytes:10} B{run.state_bytes:9} B"
        )
    return "\n".join(lines)


def plot(runs: dict[str, Run], path: Path) -> None:
    """The loss of new sentences over the steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for way, run in runs.items():
        steps = [10 * (n + 1) for n in range(len(run.losses))]
        style = "--" if way == "masked" else "-"  # it lies on the first
        axes.plot(steps, run.losses, style, label=f"{way}: {run.changed} other weights changed")
    axes.set(xlabel="step", ylabel="loss of sentences with new words")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Compare the ways, print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=150, help="steps on sentences with new words")
    parser.add_argument("--pretraining", type=int, default=300, help="steps on old sentences")
    parser.add_argument("--plot", type=Path, default=Path("new_tokens.png"))
    options = parser.parse_args()
    runs = compare(options.pretraining, options.steps)
    print(table(runs))
    if runs["rows"].changed:
        raise SystemExit("old rows changed")
    print(f"Nothing but the {len(NEW)} new rows changed in the first way.")
    plot(runs, options.plot)
    print(f"The plot is in {options.plot}.")


if __name__ == "__main__":
    main()
