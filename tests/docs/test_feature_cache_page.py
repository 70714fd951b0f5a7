"""Runs the code of docs/feature-cache.md, and computes its table of sizes."""

from __future__ import annotations

import functools
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_freeze import freeze_except, report

PAGE = (Path(__file__).parents[2] / "docs" / "feature-cache.md").read_text(encoding="utf-8")
CODE = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
SIZES = re.findall(r"^\| (.+): ([^|]+) \| ([\d.]+ %) \| ([\d.]+ [kM]B) \|$", PAGE, re.M)

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for i in range(1, 5):
            block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())
            self.add_module(f"layer{i}", block)
        self.fc = nn.Linear(6, 3)


class Augmented(TensorDataset):
    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        x, y = super().__getitem__(index)
        return x + torch.randn(()), y


def run(code: str, names: dict[str, Any]) -> None:
    exec(compile(code, "feature-cache.md", "exec"), names)


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    data = torch.randn(100, 6), torch.arange(100) % 3
    return {
        "model": Net(),
        "dataset": TensorDataset(*data),
        "augmented": Augmented(*data),
        "loss_fn": nn.functional.cross_entropy,
    }


def test_all_code_of_the_page_is_run_by_the_next_tests() -> None:
    assert len(CODE) == 8
    assert [n for n, code in enumerate(CODE) if "integrations" in code] == [6, 7]


def test_the_code_for_loops(
    names: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(CODE[0], names)
    said = capsys.readouterr().out
    assert re.fullmatch(
        r"FeatureCache: [\d.]+ % of forward is skipped, up to layer3 and with it; .+ for each of "
        r"100 samples, .+ in features; 0 stored\.\n",
        said,
    )
    features = names["features"]
    assert features.stored == 100 and (tmp_path / "features").is_dir()
    run(CODE[1], names)
    run(CODE[2], names)
    boundaries = []
    names["note"] = lambda: boundaries.append(features.boundary)
    noted = CODE[3].replace("    schedule.step()\n", "    note()\n    schedule.step()\n")
    assert noted != CODE[3]
    with pytest.warns(UserWarning, match="forward is whole"):
        run(noted, names)
    names["note"]()
    by_epoch = [("layer3",), ("layer4",), ("layer4",), ("layer2",), ("layer2",), ()]
    assert boundaries == by_epoch
    freeze_except(names["model"], "layer4", "fc")
    features(next(iter(DataLoader(features.dataset, 64))).inputs)
    run(CODE[4], names)
    run(CODE[5], names)
    assert names["small"].nbytes < names["early"].nbytes
    assert "100 x 2 views" in str(names["drawn"])


def test_the_code_for_lightning(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    small = functools.partial(pl.Trainer, accelerator="cpu", enable_model_summary=False, **quiet)
    monkeypatch.setattr(pl, "Trainer", small)
    for imports in CODE[0].splitlines()[:2]:
        run(imports, names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(CODE[6], names)
    assert names["features"].stored == 100
    assert names["trainer"].current_epoch == 3


def test_the_code_for_transformers(names: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is missing")
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    texts = [{"input_ids": torch.arange(8), "labels": torch.tensor(i % 2)} for i in range(8)]
    for imports in CODE[0].splitlines()[:2]:
        run(imports, names)
    names |= {
        "bert": transformers.BertForSequenceClassification(config),
        "texts": texts,
        "other_texts": texts[:3],
        "arguments": transformers.TrainingArguments(
            str(tmp_path), max_steps=3, report_to=[], use_cpu=True, save_strategy="no"
        ),
    }
    run(CODE[7], names)
    assert names["features"].stored == 8
    assert names["trainer"].evaluate()["eval_loss"] > 0


def example(model: str) -> tuple[Any, Any]:
    """A network of the table, and one sample of the size that the page says."""
    if model == "BERT-base":
        transformers = pytest.importorskip("transformers")
        ids = torch.arange(128).unsqueeze(0)
        made = transformers.BertForSequenceClassification(transformers.BertConfig())
        return made, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    torchvision = pytest.importorskip("torchvision")
    name = model.lower().replace("-", "").replace("vitb/16", "vit_b_16")
    name = name.replace("mobilenetv3small", "mobilenet_v3_small")
    return getattr(torchvision.models, name)(num_classes=10), torch.zeros(1, 3, 224, 224)


def test_each_row_of_the_table_of_sizes_is_read() -> None:
    (table,) = re.findall(r"^\| model and what trains .*\n\|.*\n((?:\|.*\n)+)", PAGE, re.M)
    assert len(SIZES) == len(table.splitlines())


@pytest.mark.parametrize(("model", "trains", "share", "size"), SIZES)
def test_the_table_of_sizes(model: str, trains: str, share: str, size: str) -> None:
    network, sample = example(model)
    freeze_except(network, *re.findall("`(.+?)`", trains))
    (note,) = (n for n in report(network, example=sample).notes if "FeatureCache" in n)
    assert f"skip {share} of forward" in note
    assert note.endswith(f"store {size} for each sample")
