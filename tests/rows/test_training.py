"""Training with frozen rows: they keep every bit, and everything else goes on as before."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.processes import World, world_of
from torch_freeze import (
    FeatureCache,
    FreezeSchedule,
    FrozenAwareAdamW,
    FrozenAwareSGD,
    audit,
    freeze,
    freeze_except,
    frozen_state_dict,
    guard,
    load_frozen_state_dict,
    report,
    unfreeze,
)
from torch_freeze.rows import LiveRows, RowFrozenParameter

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB, WIDTH = 13, 4
NEW = [11, 12]
APART = [2, 5, 12]


class Net(nn.Module):
    """Token embedding, a layer, and a head with the embedding's weight."""

    def __init__(self, vocab: int = VOCAB) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocab, WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, vocab)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.embed(ids)))
        return out


def batch(seed: int, *, vocab: int = VOCAB) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    both = torch.randint(0, vocab, (2, 8), generator=made)
    return both[0], both[1]


def train(model: nn.Module, optimizer: Any, steps: int = 5, first: int = 0) -> list[float]:
    losses = []
    for seed in range(first, first + steps):
        optimizer.zero_grad()
        ids, targets = batch(seed)
        loss = functional.cross_entropy(model(ids), targets)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "our SGD": lambda p: FrozenAwareSGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "our AdamW": lambda p: FrozenAwareAdamW(p, lr=0.01, weight_decay=0.1),
    "our AdamW in backward": lambda p: FrozenAwareAdamW(p, lr=0.01, step_in_backward=True),
    "torch's SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "torch's SGD, fused": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True
    ),
    "torch's AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "torch's AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rows", [NEW, APART], ids=["new", "apart"])
def test_training_is_that_of_a_table_of_the_live_rows(optimizer: str, rows: list[int]) -> None:
    """As in a model that puts its table together from a frozen and a trainable part."""

    class Oracle(nn.Module):
        def __init__(self, net: Net) -> None:
            super().__init__()
            self.net, self.live = net, nn.Parameter(net.embed.weight.detach()[rows].clone())

        def forward(self, ids: Tensor) -> Tensor:
            table = self.net.embed.weight.detach().index_copy(0, torch.tensor(rows), self.live)
            hidden = self.net.body(functional.embedding(ids, table))
            return functional.linear(hidden, table, self.net.head.bias)

    ours, plain = Net(), Net()
    freeze(ours, "embed", rows=[r for r in range(VOCAB) if r not in rows])
    oracle = Oracle(plain)
    plain.embed.weight.requires_grad_(False)
    before = ours.embed.weight.detach().clone()
    losses = train(ours, OPTIMIZERS[optimizer](ours.parameters()), 20)
    expected = train(oracle, OPTIMIZERS[optimizer](oracle.parameters()), 20)
    assert losses == pytest.approx(expected, rel=1e-5)
    after = ours.embed.weight.detach()
    torch.testing.assert_close(after[rows], oracle.live.detach())
    changed = (after != before).any(1).nonzero().flatten().tolist()
    assert changed == rows
    torch.testing.assert_close(ours.body[0].weight, plain.body[0].weight)


@pytest.mark.parametrize("optimizer", ["our SGD", "our AdamW", "torch's SGD", "torch's AdamW"])
def test_no_bit_of_the_others_changes_in_10000_steps(optimizer: str) -> None:
    """Gradients of any size, momentum and decay; the guard compares every bit."""
    torch.manual_seed(1)
    model = nn.ModuleDict({"embed": nn.Embedding(VOCAB, WIDTH)})
    table = model["embed"].weight
    freeze_except(model, "embed", rows=APART)
    step = OPTIMIZERS[optimizer](model.parameters())
    frozen = [row for row in range(VOCAB) if row not in APART]
    before = table.detach()[frozen].clone()
    with guard(model, content=True):
        for _ in range(10_000):
            out = model["embed"](torch.randint(0, VOCAB, (3,)))
            out.backward(torch.randn(()).exp() * torch.randn(3, WIDTH))
            step.step()
            step.zero_grad()
    assert torch.equal(table.detach()[frozen].view(torch.int32), before.view(torch.int32))
    assert all(group["params"] for group in step.param_groups)


def test_state_and_gradients_are_of_the_live_rows() -> None:
    model = Net()
    freeze_except(model, "embed", rows=NEW)
    optimizer = FrozenAwareAdamW(model.parameters())
    train(model, optimizer, 2)
    live = model.embed.live_rows.weight
    assert list(optimizer.state) == [live]
    assert optimizer.state[live]["exp_avg"].shape == (2, WIDTH)
    shown = report(model, optimizer)
    assert shown.total.parameters == sum(p.numel() for p in Net().parameters())
    assert shown.total.trainable == 2 * WIDTH
    assert shown.total.gradient_bytes == 2 * WIDTH * 4
    assert "2 of 13 rows of embed.weight train, as embed.live_rows.weight (rows 11 to 12)" in str(
        shown
    ).replace("\n  ", " ")
    assert [f.kind for f in audit(model, optimizer)] == ["tied", "frozen rows"]
    # Backward runs through the frozen rows of the head, too.
    flow = report(model, example=batch(0)[0]).flow
    assert (flow.kind, flow.crossed) == ("runs through", shown.total.frozen)


@pytest.mark.parametrize("body", ["frozen", "trains"])
def test_a_report_counts_the_products_of_a_head_once(body: str) -> None:
    """What is saved of a head is its frozen rows' share; nothing of it is computed twice."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, VOCAB))
    freeze(model, "2", rows=[r for r in range(VOCAB) if r not in APART])
    if body == "frozen":
        freeze(model, "0")
    shown = report(model, example=torch.zeros(8, WIDTH))
    # Numbers of products with the elements of a sample.
    first, head, live = WIDTH * WIDTH, VOCAB * WIDTH, len(APART) * WIDTH
    weights, inputs = (live, 0) if body == "frozen" else (first + live, head)
    flow = shown.flow
    assert flow.weight_gradient_saved == pytest.approx(1 - weights / (first + head))
    assert flow.backward_saved == pytest.approx(1 - (weights + inputs) / (first + 2 * head))
    skipped = [note for note in shown.notes if "FeatureCache" in note]
    assert len(skipped) == (body == "frozen")
    for note in skipped:
        assert f"would skip {100 * first / (first + head):.1f} % of forward" in note


# --- the values that the table shows -------------------------------------------------------------


READERS: dict[str, Callable[[Net], Tensor]] = {
    "state_dict": lambda m: m.state_dict()["embed.weight"],
    "state_dict of the head": lambda m: m.head.state_dict()["weight"],
    "detach": lambda m: m.embed.weight.detach(),
    "data": lambda m: m.embed.weight.data,
    "an index": lambda m: m.embed.weight[:],
    "numpy": lambda m: torch.from_numpy(m.embed.weight.detach().numpy()),
    "clone": lambda m: m.embed.weight.clone(),
    "forward without gradients": lambda m: m.embed(torch.arange(VOCAB)),
    "a deep copy": lambda m: copy.deepcopy(m).embed.weight,
    "a pickle": lambda m: pickle.loads(pickle.dumps(m)).embed.weight,
    "functional_call": lambda m: torch.func.functional_call(
        m.embed, dict(m.embed.named_parameters()), torch.arange(VOCAB)
    ),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("fused", [False, True])
def test_the_table_is_up_to_date_wherever_it_is_read(reader: str, fused: bool) -> None:
    """Also after torch's fused steps, which do not raise the versions of what they change."""
    if reader == "numpy":
        pytest.importorskip("numpy")
    model = Net()
    freeze_except(model, "embed", rows=APART)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1, fused=fused))
    with torch.no_grad():
        expected = Net().embed.weight.detach()
        expected[APART] = model.embed.live_rows.weight
        assert torch.equal(READERS[reader](model), expected)


# --- checkpoints ---------------------------------------------------------------------------------


def trained() -> Net:
    model = Net()
    freeze_except(model, "embed", rows=APART)
    train(model, FrozenAwareSGD(model.parameters(), lr=0.1))
    return model


def test_checkpoints_are_those_of_a_plain_model() -> None:
    model, plain = trained(), Net()
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    assert [(k, v.shape) for k, v in state.items()] == [
        (k, v.shape) for k, v in plain.state_dict().items()
    ]
    assert all(type(value) is Tensor for value in state.values())
    plain.load_state_dict(state)
    model.eval(), plain.eval()
    ids, _ = batch(0)
    assert torch.equal(model(ids), plain(ids))


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_checkpoint_loads(assign: bool) -> None:
    """The live rows take over their values, and go on training."""
    model = trained()
    state = {key: value + 1 for key, value in Net().state_dict().items()}
    given = copy.deepcopy(state)  # the model may use these tensors themselves
    assert not any(model.load_state_dict(given, assign=assign))
    live = model.embed.live_rows.weight
    assert torch.equal(live, state["embed.weight"][APART])
    if assign:
        # The head's weight was assigned, too, and is another tensor now.
        model.head.weight = model.embed.weight
    train(model, FrozenAwareSGD(model.parameters(), lr=0.1), 2)
    table = model.embed.weight
    assert isinstance(table, RowFrozenParameter)
    changed = (table.detach() != state["embed.weight"]).any(1).nonzero().flatten().tolist()
    assert changed == APART


def test_optimizer_checkpoints_go_on() -> None:
    whole, resumed = Net(), Net()
    for model in (whole, resumed):
        freeze_except(model, "embed", rows=APART)
    steps = OPTIMIZERS["our AdamW"]
    first, last = steps(whole.parameters()), steps(resumed.parameters())
    train(whole, first, 3)
    resumed.load_state_dict(whole.state_dict())
    last.load_state_dict(copy.deepcopy(first.state_dict()))
    assert train(whole, first, 3, 3) == train(resumed, last, 3, 3)
    assert torch.equal(whole.embed.weight.detach(), resumed.embed.weight.detach())


def test_the_frozen_state_has_the_rows() -> None:
    model = trained()
    state = json.loads(json.dumps(frozen_state_dict(model)))
    assert state["rows"] == {"embed.weight": [[2, 2], [5, 5], [12, 12]]}
    resumed = Net()
    load_frozen_state_dict(resumed, state)
    assert frozen_state_dict(resumed) == state
    # Loading it twice changes nothing.
    assert not load_frozen_state_dict(resumed, state).changed
    # A state that does not fit leaves the model as it is.
    smaller, before = Net(12), frozen_state_dict(Net(12))
    with pytest.raises(ValueError, match=r"row 12 of embed.weight, which has only rows 0 to 11"):
        load_frozen_state_dict(smaller, state)
    assert frozen_state_dict(smaller) == before
    other = nn.ModuleDict({"embed": nn.Embedding(VOCAB, WIDTH)})
    with pytest.raises(ValueError, match="of another model"):
        load_frozen_state_dict(other, state)
    assert type(other["embed"].weight) is nn.Parameter
    assert other["embed"].weight.requires_grad
    with pytest.raises(ValueError, match=r"has no frozen rows of embed.weight; call unfreeze"):
        load_frozen_state_dict(resumed, frozen_state_dict(Net()))


# --- copies --------------------------------------------------------------------------------------


def test_a_deep_copy_trains_apart() -> None:
    model = trained()
    twin = copy.deepcopy(model)
    assert twin.head.weight is twin.embed.weight
    assert twin.embed.weight is not model.embed.weight
    before = model.embed.weight.detach().clone()
    steps = [FrozenAwareSGD(m.parameters(), lr=0.1) for m in (twin, copy.deepcopy(model))]
    train(twin, steps[0])
    assert torch.equal(model.embed.weight.detach(), before)
    assert not torch.equal(twin.embed.live_rows.weight, model.embed.live_rows.weight)
    assert torch.equal(twin.embed.weight.detach()[APART], twin.embed.live_rows.weight)
    # Loading with assign=True finds the copy's layer, not the original's.
    twin.load_state_dict(Net().state_dict(), assign=True)
    assert isinstance(twin.embed.weight, RowFrozenParameter)
    assert twin.embed.weight._rows is twin.embed.live_rows


def test_a_pickle_is_plain_torch(tmp_path: Path) -> None:
    """It loads where torch_freeze cannot be imported, as a frozen table with the trained rows."""
    model = nn.Sequential(nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, 2))
    freeze_except(model, "1", rows={"0": APART})
    model(torch.tensor(APART)).sum().backward()
    FrozenAwareSGD(model.parameters(), lr=0.1).step()
    torch.save(model, tmp_path / "model.pt")
    torch.save(model[0].weight.detach(), tmp_path / "expected.pt")
    script = """
import sys, torch
sys.modules["torch_freeze"] = None  # an import raises
model = torch.load(sys.argv[1], weights_only=False)
expected = torch.load(sys.argv[2])
table = model[0].weight
assert type(table) is torch.nn.Parameter and not table.requires_grad
assert torch.equal(table, expected)
assert list(model.state_dict()) == ["0.weight", "1.weight", "1.bias"]
assert [n for n, _ in model.named_parameters()] == ["0.weight", "1.weight", "1.bias"]
model.requires_grad_()
model(torch.tensor([1, 2])).sum().backward()
assert table.grad.shape == table.shape
torch.save(model, sys.argv[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "model.pt", tmp_path / "expected.pt"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Here its rows can be frozen again.
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    freeze_except(loaded, "0", rows=APART)
    assert isinstance(loaded[0].live_rows, LiveRows)


def _in_another_process(model: Net, answers: Any) -> None:
    optimizer = FrozenAwareSGD(model.parameters(), lr=0.1)
    train(model, optimizer)
    answers.put((model.embed.weight.detach().tolist(), audit(model, optimizer)))


def test_another_process_goes_on_training() -> None:
    """torch.multiprocessing pickles for a process that has torch_freeze, too."""
    model = trained()
    context = torch.multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_in_another_process, args=(model, answers))
    process.start()
    there, findings = answers.get(timeout=120)
    process.join()
    assert [f.kind for f in findings] == ["tied", "frozen rows"]
    changed = (torch.tensor(there) != Net().embed.weight).any(1).nonzero().flatten().tolist()
    assert changed == APART


class Looked(torch.utils.data.Dataset[Tensor]):
    """Samples that are looked up in a model's table, each with the whole table."""

    def __init__(self, model: Net) -> None:
        self.model = model

    def __len__(self) -> int:
        return VOCAB

    def __getitem__(self, row: int) -> Tensor:
        with torch.no_grad():
            return self.model.embed(torch.tensor(row))

    def collate(self, samples: list[Tensor]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return torch.stack(samples), self.model.head.weight.clone()


@pytest.mark.parametrize("shared", [False, True], ids=["forked again", "in shared memory"])
def test_workers_of_a_loader_look_up_current_values(shared: bool) -> None:
    """Those of the fork, or of the moment in memory that the processes share."""
    model = trained()
    if shared:
        model.share_memory()
    data, optimizer = Looked(model), FrozenAwareSGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(
        data,
        4,
        num_workers=2,
        collate_fn=data.collate,
        multiprocessing_context="fork",
        persistent_workers=shared,
    )
    epochs = []
    for _ in range(3):
        # Nothing has read the table since the last step.
        train(model, optimizer, 2)
        batches = list(loader)
        epochs.append(model.embed.weight.detach().clone())
        assert torch.equal(torch.cat([looked for looked, _ in batches]), epochs[-1])
        assert all(torch.equal(table, epochs[-1]) for _, table in batches)
    changed = (epochs[0] != epochs[-1]).any(1).nonzero().flatten().tolist()
    assert changed == APART


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_saves_and_resumes(tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

    class Lit(pl.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            freeze_except(self.net, "body", rows={"embed": APART})

        def training_step(self, pair: list[Tensor]) -> Tensor:
            return functional.cross_entropy(self.net(pair[0]), pair[1])

        def configure_optimizers(self) -> Any:
            return FrozenAwareAdamW(self.parameters(), lr=0.1)

    def fit(epochs: int, ckpt: Path | None = None) -> Any:
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = torch.utils.data.DataLoader([batch(seed) for seed in range(3)], batch_size=None)
        trainer.fit(Lit(), data, ckpt_path=ckpt, weights_only=False)
        return trainer

    path = tmp_path / "run.ckpt"
    first = fit(1)
    first.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["state_dict"]
    plain = Net()
    assert list(state) == [f"net.{key}" for key in plain.state_dict()]
    plain.load_state_dict({key.removeprefix("net."): value for key, value in state.items()})
    loaded = Lit.load_from_checkpoint(path)
    assert torch.equal(loaded.net.embed.live_rows.weight, plain.embed.weight[APART])
    assert torch.equal(first.model.net.embed.weight.detach(), plain.embed.weight)
    # Another run goes on from there, and ends where one without a break and a plain loop do.
    resumed, whole = fit(2, path).model.net, fit(2).model.net
    alone = Net()
    freeze_except(alone, "body", rows={"embed": APART})
    optimizer = FrozenAwareAdamW(alone.parameters(), lr=0.1)
    for _ in range(2):
        train(alone, optimizer, 3)
    for model in (resumed, whole):
        for (name, got), expected in zip(
            model.state_dict().items(), alone.state_dict().values(), strict=True
        ):
            assert torch.equal(got, expected), name
    changed = (alone.embed.weight.detach() != Net().embed.weight).any(1).nonzero().flatten()
    assert changed.tolist() == APART


# --- moving, casting and resizing ----------------------------------------------------------------


MOVES: dict[str, Callable[[Net], Any]] = {
    "double": lambda m: m.double(),
    "double and back": lambda m: m.double().float(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "the layer alone, and back": lambda m: (m.embed.half(), m.embed.float()),
    "train": lambda m: m.train(),
    "apply": lambda m: m.apply(lambda module: None),
}


@pytest.mark.parametrize("move", MOVES)
def test_casts_keep_the_rows(move: str) -> None:
    model, plain = trained(), Net()
    plain.load_state_dict(model.state_dict())
    for each in (model, plain):
        MOVES[move](each)
    table = model.embed.weight
    assert isinstance(table, RowFrozenParameter)
    assert table.dtype is plain.embed.weight.dtype is model.embed.live_rows.weight.dtype
    assert torch.equal(table, plain.embed.weight)
    train(model, FrozenAwareSGD(model.parameters(), lr=0.1), 2)
    changed = (table.detach() != plain.embed.weight).any(1).nonzero().flatten().tolist()
    assert changed == APART


def test_a_layer_that_is_created_on_another_device_moves() -> None:
    model = trained()
    empty = copy.deepcopy(model).to("meta")
    assert empty.embed.weight.is_meta
    empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty.embed.weight.detach(), model.embed.weight.detach())
    assert torch.equal(empty.embed.live_rows.index, torch.tensor(APART))


def resized(layer: nn.Embedding, rows: int) -> None:
    """As resize_token_embeddings does it: other data for the same parameter, then its flag."""
    new = nn.Embedding(rows, WIDTH).weight.data
    kept = min(rows, len(layer.weight))
    new[:kept] = layer.weight.data[:kept]
    flag = layer.weight.requires_grad
    layer.weight.data, layer.num_embeddings = new, rows
    layer.requires_grad_(flag)


def test_a_table_that_is_resized_keeps_its_live_rows() -> None:
    model = trained()
    values = model.embed.live_rows.weight.detach().clone()
    resized(model.embed, 20)
    with pytest.warns(UserWarning, match=r"table of 20 rows was resized, and its 3 live rows"):
        model.embed(torch.tensor([2, 19]))
    assert torch.equal(model.embed.weight.detach()[APART], values)
    unfreeze(model, "embed", rows=APART)
    model.embed(torch.tensor([2, 19])).sum().backward()
    assert model.embed.live_rows.weight.grad is not None
    assert report(model).tables[0].rows == 20
    assert (
        report(model).total.frozen
        == sum(p.numel() for n, p in model.named_parameters() if "live" not in n)
        - len(APART) * WIDTH
    )
    with pytest.raises(ValueError, match=r"live rows up to row 12 and cannot become one of shape"):
        resized(model.embed, 10)


@pytest.mark.filterwarnings("error")
def test_a_resized_table_whose_rows_train_again_is_no_warning() -> None:
    model = trained()
    resized(model.embed, 20)
    assert not model.embed.live_rows.weight.requires_grad
    assert not report(model).tables[0].trains
    unfreeze(model, "embed", rows=APART)
    assert model.embed(torch.tensor([2, 19])).requires_grad


def test_other_data_for_the_table_counts_after_a_step() -> None:
    model = trained()
    with torch.no_grad():
        model.embed.live_rows.weight.add_(1)  # since the table was read
    model.embed.weight.data = torch.ones(VOCAB, WIDTH)
    model.embed(torch.tensor(2))
    assert torch.equal(model.embed.live_rows.weight, torch.ones(3, WIDTH))


def test_averaged_weights_are_averaged_once() -> None:
    model = trained()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    average.update_parameters(model)
    first = model.embed.weight.detach().clone()
    train(model, FrozenAwareSGD(model.parameters(), lr=0.5))
    average.update_parameters(model)
    expected = (first + model.embed.weight.detach()) / 2
    torch.testing.assert_close(average.module.embed.weight.detach(), expected)


# --- the rest of the freeze API ------------------------------------------------------------------


def test_freezing_and_unfreezing_around_it() -> None:
    model = Net()
    table = model.embed.weight
    freeze_except(model, "body", rows={"embed": APART})
    live = model.embed.live_rows.weight
    assert live.requires_grad
    assert all(p.requires_grad for p in model.body.parameters())
    assert not model.head.bias.requires_grad
    freeze(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert "could train but are frozen, too" in str(report(model)).replace("\n  ", " ")
    unfreeze(model, "embed.live_rows")
    assert [p for p in model.parameters() if p.requires_grad] == [live]
    # The same rows again change nothing; unfreezing the layer ends it, on the same parameter.
    assert freeze(model, "embed", rows=[r for r in range(VOCAB) if r not in APART]).changed == ()
    report_of = unfreeze(model, "embed")
    assert report_of.changed == ("embed.weight",)
    assert model.embed.weight is table is model.head.weight
    assert type(table) is nn.Parameter
    assert table.requires_grad
    assert list(model.embed.children()) == []
    assert not live.requires_grad
    # And whole again, with the rows as they were trained.
    unfreeze(model)
    freeze(model, "embed")
    unfreeze(model, "embed", rows=NEW)
    assert model.embed.live_rows.weight.requires_grad
    assert not model.embed.weight.requires_grad


def test_the_values_stay_when_it_ends() -> None:
    model, expected = trained(), Net().embed.weight.detach()
    table = model.embed.weight
    # Nothing has read the table since the last step.
    with torch.no_grad():
        expected[APART] = model.embed.live_rows.weight
    unfreeze(model, "embed")
    assert model.embed.weight is table
    assert torch.equal(table, expected)
    train(model, FrozenAwareSGD(model.parameters(), lr=0.1), 1)
    assert (model.embed.weight != expected).any(1).all()


def test_schedules_keep_the_rows() -> None:
    """A schedule that trains the layer trains its live rows."""
    model = Net()
    freeze(model, "embed", rows=[r for r in range(VOCAB) if r not in APART])
    optimizer = FrozenAwareSGD(model.parameters(), lr=0.1)
    schedule = FreezeSchedule(model, {0: ["embed"], 1: ["body"], 2: []})
    states = []
    for _ in range(3):
        schedule.step()
        before = model.embed.weight.detach().clone()
        train(model, optimizer, 2)
        moved = (model.embed.weight.detach() != before).any(1).nonzero().flatten().tolist()
        states.append(moved)
    assert states == [[], APART, APART]
    assert not [f for f in audit(model, optimizer) if f.level == "error"]


def test_the_guard_sees_frozen_rows_alone() -> None:
    model = trained()
    optimizer = FrozenAwareSGD(model.parameters(), lr=0.1)
    with guard(model):
        train(model, optimizer)
    for content in (False, True):
        with (
            pytest.raises(RuntimeError, match=r"embed.weight \(other values\)"),
            guard(model, content=content),
        ):
            model.embed.weight.data[3, 1] += 1
        with guard(model, content=content):
            model.embed.live_rows.weight.data.add_(1)
            model.state_dict()
            model.embed.weight.data[2] = 7.0


def test_features_before_a_head_of_which_rows_train(tmp_path: Path) -> None:
    """New classes: the whole body is a frozen prefix, and losses are those without a cache."""

    def build() -> nn.Sequential:
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())
        model = nn.Sequential(body, nn.Linear(4 * 16, 6))
        freeze_except(model, "1", rows=[4, 5])
        return model

    torch.manual_seed(1)
    samples = [(torch.randn(3, 6, 6), i % 6) for i in range(8)]
    losses: list[list[float]] = []
    for cached in (False, True):
        model = build()
        optimizer = FrozenAwareSGD(model.parameters(), lr=0.1)
        features = FeatureCache(model, samples, tmp_path) if cached else None
        own: list[float] = []
        for _ in range(3):
            data = features.dataset if features else samples
            for one in torch.utils.data.DataLoader(data, 4):  # type: ignore[arg-type]
                images, targets = (one.inputs, one.targets) if features else one
                out = features(images) if features else model(images)
                loss = functional.cross_entropy(out, targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                own.append(float(loss.detach()))
        losses.append(own)
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == len(losses[0])


def test_features_are_refused_where_the_rows_come_first(tmp_path: Path) -> None:
    model = trained()
    ids = [(torch.tensor(i % VOCAB), 0) for i in range(4)]
    with pytest.raises(ValueError, match="FeatureCache"):
        FeatureCache(model.eval(), ids, tmp_path)


# --- optimizers made before ----------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["our SGD", "torch's AdamW"])
def test_an_optimizer_made_before_is_an_error_at_its_second_step(optimizer: str) -> None:
    model = Net()
    before = OPTIMIZERS[optimizer](model.parameters())
    freeze_except(model, "embed", rows=APART)
    assert "unowned" in [f.kind for f in audit(model, before)]
    train(model, before, 1)
    with pytest.raises(RuntimeError, match=r"made before freeze\(..., rows=...\)"):
        train(model, before, 1)
    before.add_param_group({"params": model.embed.live_rows.parameters()})
    start = model.embed.live_rows.weight.detach().clone()
    train(model, before, 2)
    assert not torch.equal(start, model.embed.live_rows.weight)


def test_two_optimizers_of_which_the_second_has_the_rows() -> None:
    model = Net()
    first = FrozenAwareSGD(model.parameters(), lr=0.1)
    freeze(model, "embed", rows=slice(0, 10))
    second = FrozenAwareSGD(model.embed.live_rows.parameters(), lr=0.1)
    for _ in range(3):
        functional.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
        first.step()
        second.step()
        model.zero_grad()
    assert not torch.equal(model.embed.weight.detach()[10:], Net().embed.weight[10:])


# --- several processes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of("cpu", 2) as processes:
        yield processes


def _ddp(device: str, rows: list[int]) -> Any:
    model = Net()
    freeze_except(model, "body", rows={"embed": rows})
    freeze(model, "body.1")
    wrapped = DistributedDataParallel(model)
    optimizer = FrozenAwareSGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    rank = torch.distributed.get_rank()
    for seed in range(4):
        ids, targets = batch(seed)
        mine = slice(4 * rank, 4 * rank + 4)
        optimizer.zero_grad()
        functional.cross_entropy(wrapped(ids[mine]), targets[mine]).backward()
        optimizer.step()
    findings = [f.kind for f in audit(wrapped, optimizer) if f.level == "error"]
    late = Net()
    late_wrapped = DistributedDataParallel(late)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        freeze_except(late_wrapped, "embed", rows=rows)
    said = [str(w.message) for w in caught]
    return model.embed.weight.detach().clone(), findings, said


def test_ddp(world: World) -> None:
    (a, findings, said), (b, _, _) = world.run(_ddp, APART)
    assert torch.equal(a, b)
    assert not findings
    assert (a != Net().embed.weight).any(1).nonzero().flatten().tolist() == APART
    alone = Net()
    freeze_except(alone, "body", rows={"embed": APART})
    freeze(alone, "body.1")
    train(alone, FrozenAwareSGD(alone.parameters(), lr=0.1, momentum=0.9), 4)
    torch.testing.assert_close(a, alone.embed.weight.detach())
    # Wrapped before: DDP does not know the live rows.
    assert any("embed.live_rows.weight" in text for text in said)


def _ddp_accumulates(device: str) -> list[Tensor]:
    """The live rows' gradients after the first of two backward passes, and after both."""
    model = Net()
    freeze_except(model, "embed", rows=APART)  # holds the norm, too
    wrapped = DistributedDataParallel(model)
    rank = torch.distributed.get_rank()
    mine = slice(4 * rank, 4 * rank + 4)
    grads = []
    for seed in range(2):
        ids, targets = batch(seed)
        with wrapped.no_sync() if seed == 0 else contextlib.nullcontext():
            (functional.cross_entropy(wrapped(ids[mine]), targets[mine]) / 2).backward()
        grads.append(model.embed.live_rows.weight.grad.clone())
    return grads


def test_ddp_accumulates_gradients_without_sync(world: World) -> None:
    (first, both), (other, same) = world.run(_ddp_accumulates)
    assert not torch.equal(first, other)
    assert torch.equal(both, same)
    alone = Net()
    freeze_except(alone, "embed", rows=APART)
    ids, targets = (torch.cat(pair) for pair in zip(batch(0), batch(1), strict=True))
    functional.cross_entropy(alone(ids), targets).backward()
    torch.testing.assert_close(both, alone.embed.live_rows.weight.grad)


def _fsdp(device: str) -> Any:
    from torch.distributed.fsdp import fully_shard

    before, after = Net(), Net()
    freeze_except(before, "embed", rows=APART)
    errors = []
    for model, act in (
        (before, lambda: fully_shard(before)),
        (after, lambda: (fully_shard(after), freeze_except(after, "embed", rows=APART))),
    ):
        try:
            act()
        except (RuntimeError, TypeError) as error:
            errors.append(f"{type(error).__name__}: {error}")
        del model
    aside = Net()
    freeze_except(aside, "embed", rows=APART)
    apart = {aside.embed.weight, *aside.embed.live_rows.parameters()}
    fully_shard(aside, ignored_params=apart)
    aside(batch(0)[0]).sum().backward()
    return errors, aside.embed.live_rows.weight.grad is not None


def test_fsdp2_is_refused_unless_the_layer_is_left_out(world: World) -> None:
    for errors, grad in world.run(_fsdp):
        assert "FSDP2 cannot shard a layer of which some rows are frozen" in errors[0]
        assert "rows of plain parameters can be frozen" in errors[1]
        assert grad
