"""The code of docs/memory.md, as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_freeze

ROOT = Path(__file__).parents[2]


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)


def train(names: dict[str, Any]) -> None:
    """Freeze one layer, step, and check that the optimizer does what the page says."""
    model, optimizer = names["model"], names["optimizer"]
    torch_freeze.freeze(model, "0")
    before = model[2].weight.detach().clone()
    optimizer.zero_grad()
    model(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[2].weight, before)


def test_the_pages_code() -> None:
    names: dict[str, Any] = {}
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    in_backward, drop, narrow, _ = blocks(page)
    exec(compile(in_backward, "memory.md", "exec"), names)
    assert names["optimizer"].step_in_backward
    train(names)
    names["optimizer"].close()
    for code in (drop, narrow):
        torch_freeze.unfreeze(names["model"])
        exec(compile(code, "memory.md", "exec"), names)
        names["model"](torch.randn(8, 64)).square().mean().backward()
        names["optimizer"].step()
        train(names)
        state, frozen = names["optimizer"].state, names["model"][0].weight
        assert (frozen in state) == (code is narrow)
    assert state[names["model"][2].weight]["momentum_buffer"].dtype is torch.bfloat16


def test_all_options_together() -> None:
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    (code,) = blocks(text.partition("\n## All together\n")[2].partition("\n## ")[0])
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    names: dict[str, Any] = {"model": model, "torch": torch, "torch_freeze": torch_freeze}
    exec(compile(code, "memory.md", "exec"), names)
    train(names)
    assert names["optimizer"].step_in_backward


@pytest.mark.parametrize("name", ["step_in_backward", "frozen_momentum", "momentum_dtype"])
def test_what_the_page_names_are_options(name: str) -> None:
    assert f"{name}" in torch_freeze.FrozenAwareSGD.__init__.__kwdefaults__
