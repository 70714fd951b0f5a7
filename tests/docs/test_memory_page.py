"""The code of docs/memory.md, as it stands."""

from __future__ import annotations

import csv
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
    for moment in ("exp_avg", "exp_avg_sq"):
        assert state[names["model"][2].weight][moment].dtype is torch.bfloat16


def test_all_options_together() -> None:
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    (code,) = blocks(text.partition("\n## All together\n")[2].partition("\n## ")[0])
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    names: dict[str, Any] = {"model": model, "torch": torch, "torch_freeze": torch_freeze}
    exec(compile(code, "memory.md", "exec"), names)
    train(names)
    assert names["optimizer"].step_in_backward


@pytest.mark.parametrize(
    ("optimizer", "names"),
    [
        (torch_freeze.FrozenAwareSGD, ["frozen_momentum", "momentum_dtype", "momentum_seed"]),
        (torch_freeze.FrozenAwareAdam, ["frozen_state", "moment_dtype", "moment_seed"]),
        (torch_freeze.FrozenAwareAdamW, ["frozen_state", "moment_dtype", "moment_seed"]),
    ],
)
def test_what_the_page_names_are_options(optimizer: Any, names: list[str]) -> None:
    options = optimizer.__init__.__kwdefaults__
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    for name in (*names, "step_in_backward", "clip_value", "bucket_mb"):
        assert name in options and name in page


MODELS = {
    "ResNet-50": "resnet50",
    "ViT-B/16": "vit_b_16",
    "BERT-base": "bert_base",
    "1.07B decoder in bf16": "decoder_1b",
}
CONTESTANTS = {
    "stock default": "stock/default",
    "stock fused": "stock/fused",
    "in backward": "ours/in backward",
    "and bfloat16 moments": "ours/in backward, bf16",
    "and bfloat16 momentum": "ours/in backward, bf16",
    'with `"drop"`': "ours/drop",
    "stock, a new optimizer each time": "stock/rebuilt",
}


class TestMeasured:
    """The tables say what is recorded."""

    @staticmethod
    def recorded(name: str) -> dict[tuple[str, ...], list[float]]:
        with open(ROOT / "benchmarks" / "results" / name, newline="", encoding="utf-8") as file:
            return {
                (row["workload"], row["contestant"], row["measure"]): [
                    float(value) for value in row["value"].split()
                ]
                for row in csv.DictReader(file)
            }

    @staticmethod
    def tables(text: str) -> list[list[list[str]]]:
        found = re.findall(r"(?:^\|.*\|$\n)+", text, re.M)
        return [
            [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
            for table in found
        ]

    @pytest.mark.parametrize(
        ("section", "name", "rows"),
        [
            ("### AdamW", "amd_epyc_memory_adamw.csv", 2),
            ("### SGD", "amd_epyc_memory.csv", 8),
        ],
        ids=["AdamW", "SGD"],
    )
    def test_peaks(self, section: str, name: str, rows: int) -> None:
        record = self.recorded(name)
        page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
        text = page.partition(f"\n{section}\n")[2].partition("\n### ")[0]
        assert name.removesuffix(".csv") in text
        (_, *columns), _, *lines = self.tables(text)[0]
        assert len(lines) >= rows
        for title, *cells in lines:
            model = MODELS[title.partition(",")[0]]
            cases = ("2", "4") if title.endswith("half frozen") else ("1",)
            case = next(c for c in cases if (f"{model}/{c}", "ours", "peak") in record)
            for column, cell in zip(columns, cells, strict=True):
                contestant = CONTESTANTS.get(column, "ours")
                (*_, peak) = record[f"{model}/{case}", contestant, "peak"]
                assert cell == f"{peak / 1e6:,.0f}", (title, column)

    def test_state_while_blocks_train_in_turn(self) -> None:
        record = self.recorded("amd_epyc_memory_adamw.csv")
        page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
        text = page.partition("\n### AdamW\n")[2].partition("\n### ")[0]
        _, _, *lines = self.tables(text)[1]
        assert len(lines) == 3
        for title, *cells in lines:
            contestant = CONTESTANTS.get(title, "ours")
            state = record["resnet50/rotation", contestant, "state"][1::2]
            assert cells == [f"{each / 1e6:.1f}" for each in state], title


class TestDifferences:
    """What docs/differences.md says that Adam and AdamW do here."""

    @staticmethod
    def make(**options: Any) -> tuple[torch.Tensor, torch_freeze.FrozenAwareAdamW]:
        param = torch.ones(4, requires_grad=True)
        param.grad = torch.ones(4)
        return param, torch_freeze.FrozenAwareAdamW([param], lr=0.1, weight_decay=0, **options)

    def test_amsgrad_may_be_set_later(self) -> None:
        param, optimizer = self.make()
        optimizer.step()
        optimizer.param_groups[0]["amsgrad"] = True
        optimizer.step()
        state = optimizer.state[param]
        assert torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"])

    def test_capturable_works_on_the_cpu(self) -> None:
        plain, optimizer = self.make()
        capturable, other = self.make(capturable=True)
        for _ in range(3):
            optimizer.step()
            other.step()
        torch.testing.assert_close(capturable, plain)

    @pytest.mark.parametrize("overflow", [False, True])
    def test_a_scaler_hands_over_its_scale_with_the_defaults(self, overflow: bool) -> None:
        param, optimizer = self.make()
        assert optimizer._step_supports_amp_scaling
        optimizer.grad_scale = torch.tensor(4.0)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.tensor(float(overflow))  # type: ignore[attr-defined]
        optimizer.step()
        assert (param in optimizer.state) != overflow
        if not overflow:
            assert torch.allclose(optimizer.state[param]["exp_avg"], torch.full((4,), 0.025))

    def test_float16_stays_finite(self) -> None:
        param = torch.ones(4, dtype=torch.float16, requires_grad=True)
        param.grad = torch.full((4,), 1e-4, dtype=torch.float16)
        torch_freeze.FrozenAwareAdamW([param], lr=0.1).step()
        assert param.isfinite().all() and not torch.equal(param, torch.ones_like(param))
