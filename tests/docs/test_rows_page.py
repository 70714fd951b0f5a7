"""Runs the code of docs/rows.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torch_freeze import FrozenAwareAdamW, freeze, freeze_except, report, unfreeze

PAGE = (Path(__file__).parents[2] / "docs" / "rows.md").read_text(encoding="utf-8")
CODE = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
TOKENS = {f"token{n}": n for n in range(100)} | {"<cat>": 100, "<dog>": 101}

pytestmark = pytest.mark.usefixtures("one_thread")


class Tokenizer:
    def get_vocab(self) -> dict[str, int]:
        return TOKENS

    def __len__(self) -> int:
        return len(TOKENS)


def train(model: nn.Module, optimizer: Any) -> None:
    for _ in range(2):
        optimizer.zero_grad()
        ids = torch.randint(0, 102, (2, 8))
        torch.autograd.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    sizes = {"n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    sizes |= {"bos_token_id": 0, "eos_token_id": 1}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=100, **sizes))
    names = {"model": model, "tokenizer": Tokenizer(), "train": train}
    names |= {"freeze": freeze, "unfreeze": unfreeze}
    first, second = CODE
    exec(compile(first, "rows.md", "exec"), names)
    shown = re.findall(r"^```text\n(.*?)^```$", PAGE, re.M | re.S)[0]
    assert str(report(model)).endswith(shown.rstrip())
    loaded = transformers.GPT2LMHeadModel.from_pretrained("tuned")
    assert torch.equal(loaded.transformer.wte.weight, model.transformer.wte.weight)
    live = model.transformer.wte.live_rows.weight
    assert list(names["optimizer"].state) == [live]
    unfreeze(model)
    exec(compile(second, "rows.md", "exec"), names)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "transformer.wte.live_rows.weight"
    ]
    assert model.transformer.wte.live_rows.index.tolist() == [100, 101]


def test_bytes_of_gradient_and_state() -> None:
    """The figure of the page, which is the same for a smaller table."""
    model = nn.Sequential(nn.Embedding(100, 4096, dtype=torch.bfloat16))
    freeze_except(model, "0", rows=[98, 99])
    optimizer = FrozenAwareAdamW(model.parameters())
    model(torch.tensor([99, 1])).sum().backward()
    optimizer.step()
    total = report(model, optimizer).total
    used = total.gradient_bytes + (total.state_bytes or 0)
    assert f"in bfloat16 are {used / 1000:.0f} kB" in PAGE
