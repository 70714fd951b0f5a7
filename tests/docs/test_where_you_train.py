"""Runs the code of docs/where-you-train.md after the set-up that the page assumes."""

from __future__ import annotations

import functools
import re
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_freeze import FrozenAwareSGD, freeze

PAGE = Path(__file__).parents[2] / "docs" / "where-you-train.md"
BLOCKS: dict[str, list[str]] = {
    section.partition("\n")[0]: re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]
}


def run(section: str, **names: Any) -> dict[str, Any]:
    for code in BLOCKS[section]:
        exec(compile(code, f"{PAGE}, {section}", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def quiet(one_thread: None) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_every_block_of_code_is_run_by_one_of_these_tests() -> None:
    with_code = {section for section, blocks in BLOCKS.items() if blocks}
    assert with_code == {
        "Lightning",
        "Transformers",
        "Accelerate",
        "Resuming",
        "torch.distributed.checkpoint",
    }


def test_lightning() -> None:
    pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    trained: list[tuple[bool, ...]] = []

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.ModuleDict({"stem": nn.Linear(4, 4), "blocks": nn.Linear(4, 4)})
            self.head = nn.Linear(4, 2)

        def training_step(self, x: Tensor) -> Tensor:
            layers = (self.backbone["stem"], self.backbone["blocks"], self.head)
            trained.append(tuple(layer.weight.requires_grad for layer in layers))
            for layer in layers:
                x = layer(x)
            self.log("val_loss", 1.0)
            return x.square().mean()

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = functools.partial(pl.Trainer, accelerator="cpu", enable_model_summary=False, **quiet)
    lightning = types.SimpleNamespace(LightningModule=Module, Trainer=trainer)
    loader: Any = torch.utils.data.DataLoader(torch.ones(1, 4))  # type: ignore[arg-type]
    names = run("Lightning", pl=lightning, data=loader)
    freed = [(False, False, True), (False, True, True), (True, True, True), (True, True, True)]
    assert trained == [state for state in freed for _ in range(2)]
    trained.clear()
    following = trainer(max_epochs=20, callbacks=[names["freezing"]])
    following.fit(names["Net"](), loader)
    # The first is the best; three more end each phase.
    assert trained == [freed[0]] * 4 + [freed[1]] * 3 + [freed[2]] * 3
    assert following.current_epoch == 10


def test_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is missing")
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=9, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.BertForSequenceClassification(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = run(
        "Transformers",
        Trainer=transformers.Trainer,
        model=model,
        arguments=transformers.TrainingArguments(
            str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no"
        ),
        data=[{"input_ids": torch.arange(8), "labels": torch.tensor(i % 2)} for i in range(8)],
    )
    names["trainer"].train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    frozen = ("bert.embeddings.", *(f"bert.encoder.layer.{i}." for i in range(8)))
    assert "bert.encoder.layer.8.output.dense.weight" in changed
    assert not [name for name in changed if name.startswith(frozen)]


def test_accelerate(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    layers = {name: nn.Linear(4, 4) for name in ("embeddings", "encoder", "head")}
    model = nn.ModuleDict(layers)
    optimizer = FrozenAwareSGD(model.parameters(), lr=0.1)
    names = run(
        "Accelerate",
        accelerator=(first := accelerate.Accelerator(cpu=True)),
        model=model,
        optimizer=optimizer,
        rates=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    )
    names["schedule"].step()
    assert [layer.weight.requires_grad for layer in layers.values()] == [False, False, True]
    first.save_state(str(tmp_path))
    names["schedule"].step()
    first.load_state(str(tmp_path))
    assert [layer.weight.requires_grad for layer in layers.values()] == [False, False, True]
    assert names["accelerator"].ddp_handler.find_unused_parameters


def test_resuming(tmp_path: Path) -> None:
    def build() -> tuple[Any, FrozenAwareSGD]:
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        return model, FrozenAwareSGD(model.parameters(), lr=0.1, momentum=0.9)

    model, optimizer = build()
    freeze(model, "0", "1")
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    names = run(
        "Resuming",
        model=model,
        optimizer=optimizer,
        build=build,
        path=tmp_path / "checkpoint",
        torch=torch,
    )
    resumed = names["model"]
    assert resumed is not model
    assert [p.requires_grad for p in resumed.parameters()] == [False] * 4 + [True] * 2
    assert not resumed.train()[1].training
    assert len(names["optimizer"].state) == 2


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_torch_distributed_checkpoint(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    def build(frozen: str) -> tuple[nn.Module, FrozenAwareSGD]:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        freeze(model, frozen)
        return model, FrozenAwareSGD(model.parameters(), lr=0.1, momentum=0.9)

    saved, its_optimizer = build("0")
    saved(torch.ones(1, 4)).sum().backward()
    its_optimizer.step()
    state = dict(zip(("model", "optimizer"), get_state_dict(saved, its_optimizer), strict=True))
    dcp.save(state, checkpoint_id=tmp_path)
    model, optimizer = build("1")
    run("torch.distributed.checkpoint", model=model, optimizer=optimizer, path=tmp_path)
    assert torch.equal(model[1].weight, saved[1].weight)
    buffers = [o.state[m[1].weight]["momentum_buffer"]
               for o, m in ((optimizer, model), (its_optimizer, saved))]  # fmt: skip
    assert torch.equal(*buffers)
    assert model[0].weight not in optimizer.state
