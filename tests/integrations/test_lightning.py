"""FreezeCallback under Lightning's Trainer, beside Lightning's own BackboneFinetuning.

Where Lightning's way fails, one test shows the failure and another that ours works.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

import torch_freeze  # noqa: E402
from tests.helpers import optim_cases as cases  # noqa: E402
from tests.helpers.models import assert_same_weights, weights  # noqa: E402
from torch_freeze import (  # noqa: E402
    AdvanceOnPlateau,
    FreezeSchedule,
    FrozenAwareSGD,
    gradual_unfreeze,
    rotate,
)
from torch_freeze.integrations.lightning import FreezeCallback  # noqa: E402

BATCHES = 3
# Of each optimizer, by its name in cases.FAMILIES.
HYPER: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9},
    "AdamW": {"lr": 0.02, "weight_decay": 0.1},
}
each_optimizer = pytest.mark.parametrize("kind", HYPER)


@pytest.fixture(autouse=True)
def quiet(one_thread: None) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Net(pl.LightningModule):
    """A backbone with a norm, and a head; it notes what trains in each step."""

    def __init__(self, optimizer: str = "SGD", rates: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)
        )
        self.head = nn.Linear(4, 2)
        self.optimizer = optimizer
        self.rates = rates
        self.trained: list[tuple[bool, ...]] = []

    def training_step(self, batch: Tensor) -> Tensor:
        self.trained.append(tuple(m.weight.requires_grad for m in self.layers()))
        return self.head(self.backbone(batch)).square().mean()

    def layers(self) -> tuple[nn.Linear, ...]:
        return self.backbone[0], self.backbone[3], self.head

    def configure_optimizers(self) -> Any:
        if self.optimizer != "stock":
            ours = cases.FAMILIES[self.optimizer].ours
            optimizer: Any = ours(self.parameters(), **HYPER[self.optimizer])
        else:  # as Lightning's documentation has it
            trainable = filter(lambda p: p.requires_grad, self.parameters())
            optimizer = torch.optim.SGD(trainable, lr=0.05, momentum=0.9)
        if not self.rates:
            return optimizer
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=100)
        return [optimizer], [{"scheduler": rates, "interval": "step"}]


def data() -> torch.utils.data.DataLoader[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.utils.data.DataLoader(
        torch.randn(8 * BATCHES, 4, generator=generator),
        batch_size=8,  # type: ignore[arg-type]
    )


def fit(net: Net, callback: Any, epochs: int, ckpt: Path | None = None, **options: Any) -> Any:
    options = {"logger": False, "enable_checkpointing": False, "max_epochs": epochs} | options
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=callback,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(net, data(), ckpt_path=ckpt, weights_only=False)
    return trainer


@each_optimizer
def test_what_is_named_is_frozen_throughout_and_all_else_trains(kind: str) -> None:
    net = Net(kind)
    before = weights(net)
    fit(net, FreezeCallback("backbone", exclude="backbone.3"), 2)
    assert set(net.trained) == {(False, True, True)}
    after = weights(net)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {
        f"{layer}.{p}" for layer in ("backbone.3", "head") for p in ("weight", "bias")
    }


SCHEDULES: dict[str, tuple[Any, list[tuple[bool, ...]]]] = {
    "a table of epochs": (
        {0: ["backbone"], 1: ["backbone.0", "backbone.1"], 3: []},
        [(False, False, True), (False, True, True), (False, True, True), (True, True, True)],
    ),
    "gradual unfreezing": (
        lambda m: gradual_unfreeze(m, [["backbone.0", "backbone.1"], "backbone.3", "head"]),
        [(False, False, True), (False, True, True), (True, True, True), (True, True, True)],
    ),
}


@pytest.mark.parametrize(("schedule", "expected"), SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_is_stepped_before_every_epoch(
    schedule: Any, expected: list[tuple[bool, ...]]
) -> None:
    net = Net()
    fit(net, FreezeCallback(schedule=schedule), len(expected))
    assert net.trained == [state for state in expected for _ in range(BATCHES)]


@pytest.mark.parametrize("accumulate", [1, 2], ids=["each batch a step", "two batches a step"])
def test_a_schedule_of_steps_is_stepped_before_every_optimizer_step(accumulate: int) -> None:
    net = Net()
    callback = FreezeCallback(
        schedule=lambda m: rotate(m, ["backbone.0", "backbone.3"], 1, 1, always="head", seed=3)
    )
    trainer = fit(net, callback, 4, accumulate_grad_batches=accumulate)
    assert callback.schedule is not None
    assert callback.schedule.last == trainer.global_step - 1
    assert {state[2] for state in net.trained} == {True}
    assert {sum(state) for state in net.trained} == {2}
    if accumulate == 2:  # the first two of three batches are one step
        assert all(
            net.trained[i] == net.trained[i + 1] for i in range(0, len(net.trained), BATCHES)
        )


@each_optimizer
def test_training_under_the_callback_equals_a_plain_loop(kind: str) -> None:
    net, plain = Net(kind), Net(kind)
    entries = {0: ["backbone"], 2: []}
    fit(net, FreezeCallback(schedule=entries), 4)
    schedule = torch_freeze.FreezeSchedule(plain, entries)
    optimizer = plain.configure_optimizers()
    for _ in range(4):
        schedule.step()
        plain.train()
        for batch in data():
            optimizer.zero_grad()
            plain.training_step(batch).backward()
            optimizer.step()
    assert_same_weights(weights(net), weights(plain))


@each_optimizer
@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_a_resumed_run_goes_on_in_the_middle_of_the_schedule(
    tmp_path: Path, stop: int, unit: str, kind: str
) -> None:
    def callback() -> FreezeCallback:
        groups = [["backbone.0", "backbone.1"], "backbone.3", "head"]
        every = 1 if unit == "epoch" else 4
        return FreezeCallback(schedule=lambda m: gradual_unfreeze(m, groups, every, unit=unit))

    whole = Net(kind, rates=True)
    fit(whole, callback(), 4)
    first = Net(kind, rates=True)
    fit(first, callback(), stop).save_checkpoint(tmp_path / "run.ckpt")
    second = Net(kind, rates=True)
    resumed = callback()
    fit(second, resumed, 4, tmp_path / "run.ckpt")
    assert_same_weights(weights(second), weights(whole))
    assert first.trained + second.trained == whole.trained
    assert resumed.schedule is not None
    assert resumed.schedule.last == (3 if unit == "epoch" else 4 * BATCHES - 1)


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_a_run_that_had_no_schedule_yet_goes_on_where_the_schedule_would_be(
    tmp_path: Path, unit: str
) -> None:
    def callback() -> FreezeCallback:
        every = 1 if unit == "epoch" else BATCHES - 1
        groups = ["backbone.0", "backbone.3", "head"]
        return FreezeCallback(schedule=lambda m: gradual_unfreeze(m, groups, every, unit=unit))

    whole = Net()
    fit(whole, callback(), 3)
    fit(Net(), [], 1).save_checkpoint(tmp_path / "run.ckpt")
    net = Net()
    fit(net, callback(), 3, tmp_path / "run.ckpt")
    assert net.trained == whole.trained[BATCHES:]


def test_a_callback_used_for_a_second_run_restarts_its_schedule() -> None:
    net, callback = Net(), FreezeCallback(schedule={0: ["backbone"], 1: []})
    for _ in range(2):
        net.trained.clear()
        fit(net, callback, 2)
        assert net.trained == [(False, False, True)] * BATCHES + [(True, True, True)] * BATCHES


def test_a_second_fit_of_one_trainer_continues_its_schedule() -> None:
    net = Net()
    trainer = fit(net, FreezeCallback(schedule={0: ["backbone"], 1: []}), 2)
    net.trained.clear()
    torch_freeze.freeze(net, "head")  # by hand; the schedule does not set it again
    trainer.fit_loop.max_epochs = 3
    trainer.fit(net, data())
    assert set(net.trained) == {(True, True, False)}


def test_a_run_resumed_in_the_middle_of_an_epoch_has_its_frozen_set(tmp_path: Path) -> None:
    entries = {0: ["backbone"], 1: ["backbone.0", "backbone.1"]}
    saving = ModelCheckpoint(tmp_path, "run", every_n_train_steps=BATCHES + 1, save_top_k=1)
    callbacks = [FreezeCallback(schedule=entries), saving]
    fit(Net(), callbacks, 2, enable_checkpointing=True)
    net = Net()
    fit(net, FreezeCallback(schedule=entries), 2, tmp_path / "run.ckpt")
    assert set(net.trained) == {(False, True, True)}
    assert len(net.trained) == BATCHES - 1


# --- schedules that follow a metric --------------------------------------------------------------


class Scored(Net):
    """A Net whose validations return the given scores, one after the other."""

    def __init__(self, scores: list[float], **options: Any) -> None:
        super().__init__(**options)
        self.scores = scores
        self.seen: list[dict[str, Tensor]] = []

    def val_dataloader(self) -> Any:
        return data()

    def validation_step(self, batch: Tensor) -> None:
        if not self.trainer.sanity_checking:
            self.log("score", float(self.scores[self.current_epoch]))

    def training_step(self, batch: Tensor) -> Tensor:
        assert self.backbone[1].training == self.backbone[0].weight.requires_grad
        loss = super().training_step(batch)
        self.log("loss", loss, on_epoch=True, on_step=False)
        return loss

    def on_train_epoch_start(self) -> None:
        self.seen.append(weights(self))


def plateau(**arguments: Any) -> FreezeCallback:
    groups = [["backbone.0", "backbone.1"], "backbone.3", "head"]
    return FreezeCallback(
        schedule=lambda m: AdvanceOnPlateau(
            gradual_unfreeze(m, groups), "max", patience=0, **arguments
        ),
        monitor="score",
    )


PHASES = [(False, False, True), (False, True, True), (True, True, True)]


def test_a_schedule_follows_the_metric_and_stops_the_trainer_at_its_end() -> None:
    net, callback = Scored([1, 2, 2, 3, 3, 3, 9, 9]), plateau()
    trainer = fit(net, callback, 8)
    expected = [0, 0, 0, 1, 1, 2]
    assert net.trained == [PHASES[phase] for phase in expected for _ in range(BATCHES)]
    assert callback.schedule is not None
    assert callback.schedule.last == trainer.current_epoch == 6


def test_a_schedule_follows_a_metric_of_training() -> None:
    net = Scored([])
    callback = FreezeCallback(
        schedule=lambda m: AdvanceOnPlateau(
            gradual_unfreeze(m, ["backbone", "head"]), patience=9, max_evals=2
        ),
        monitor="loss",
    )
    trainer = fit(net, callback, 9, limit_val_batches=0)
    assert trainer.current_epoch == 4
    assert net.trained == [PHASES[0]] * (2 * BATCHES) + [PHASES[2]] * (2 * BATCHES)


@pytest.mark.parametrize(
    ("options", "phases"),
    [
        pytest.param({"val_check_interval": 2}, [5, 3, 3], id="within an epoch"),
        pytest.param({"check_val_every_n_epoch": 2}, [12, 6, 6], id="every other epoch"),
    ],
)
def test_a_schedule_is_stepped_after_every_validation(
    options: dict[str, int], phases: list[int]
) -> None:
    net, callback = Scored([1.0] * 9), plateau()
    fit(net, callback, 9, **options)
    assert net.trained == [PHASES[i] for i, batches in enumerate(phases) for _ in range(batches)]
    assert callback.schedule is not None and callback.schedule.last == 4


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_a_norm_has_its_own_mode_again_after_validations(unit: Any) -> None:
    every = 1 if unit == "epoch" else BATCHES - 1
    entries = {0: ["backbone"], every: [], 2 * every: ["backbone"], 3 * every: []}
    net = Scored([1.0] * 5)
    callback = FreezeCallback(schedule=lambda m: FreezeSchedule(m, entries, unit))
    fit(net, callback, 5)  # Scored compares the norm's mode with what is frozen
    assert len(set(net.trained)) == 2
    assert net.backbone[1].training


@each_optimizer
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_a_resumed_run_goes_on_in_its_phase_with_the_best_weights(
    tmp_path: Path, stop: int, kind: str
) -> None:
    scores = [1.0, 3, 2, 4, 1, 2, 2]
    whole = Scored(scores, optimizer=kind)
    callback = plateau(restore_best=True)
    fit(whole, callback, 7)
    # It goes back to the best of epoch 1 after epoch 2, and of epoch 3 after epochs 4 and 5.
    assert_same_weights(whole.seen[3], whole.seen[2])
    assert_same_weights(whole.seen[5], whole.seen[4])
    assert_same_weights(weights(whole), whole.seen[4])
    first = Scored(scores, optimizer=kind)
    fit(first, plateau(restore_best=True), stop).save_checkpoint(tmp_path / "run.ckpt")
    second, resumed = Scored(scores, optimizer=kind), plateau(restore_best=True)
    fit(second, resumed, 7, tmp_path / "run.ckpt")
    assert_same_weights(weights(second), weights(whole))
    assert first.trained + second.trained == whole.trained
    assert resumed.schedule is not None and callback.schedule is not None
    assert str(resumed.schedule) == str(callback.schedule)


def test_the_report_is_logged_when_what_is_frozen_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    logger = CSVLogger(tmp_path)
    entries = {0: ["backbone"], 2: []}
    fit(Net(), FreezeCallback(schedule=entries), 3, logger=logger, log_every_n_steps=1)
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        written = [row["freeze/frozen"] for row in csv.DictReader(file) if row["freeze/frozen"]]
    assert [float(number) for number in written] == [92, 0]
    said = [r.getMessage() for r in caplog.records if "backward:" in r.getMessage()]
    assert len(said) == 2
    assert "backbone" in said[0]


def test_log_false_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    fit(Net(), FreezeCallback("backbone", log=False), 1)
    assert not [r for r in caplog.records if "backward:" in r.getMessage()]


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        pytest.param(lambda: FreezeCallback(), ValueError, "name what", id="nothing is named"),
        pytest.param(lambda: FreezeCallback("back"), ValueError, "Nearest", id="a misspelt name"),
        pytest.param(
            lambda: FreezeCallback(schedule={0: ["back"]}), ValueError, "Nearest",
            id="a misspelt name in a schedule",
        ),
        pytest.param(
            lambda: FreezeCallback(schedule=lambda m: None), TypeError, "NoneType",  # type: ignore
            id="no schedule made",
        ),
        pytest.param(
            lambda: FreezeCallback(schedule={0: ["backbone"]}, monitor="loss"),
            ValueError, "a FreezeSchedule watches no metric", id="a metric for a table",
        ),
        pytest.param(
            lambda: FreezeCallback("backbone", monitor="loss"),
            ValueError, "no schedule", id="a metric without a schedule",
        ),
        pytest.param(
            lambda: FreezeCallback(schedule=lambda m: AdvanceOnPlateau(gradual_unfreeze(m, ["*"]))),
            ValueError, "needs the name of a metric. Give monitor=", id="no metric",
        ),
        pytest.param(
            plateau, ValueError, "'score' is not logged; nothing is", id="an unknown metric",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_named(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        fit(Net(), make(), 1)


# --- Lightning's own way --------------------------------------------------------------------------


class Unfreezing(BaseFinetuning):
    """As its documentation shows: freeze before training, unfreeze at an epoch."""

    def __init__(self, add_group: bool = True) -> None:
        super().__init__()
        self.add_group = add_group

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch != 1:
            return
        if self.add_group:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)
        else:
            self.make_trainable(pl_module.backbone)


def test_theirs_what_is_frozen_at_construction_never_trains_later() -> None:
    net = Net("stock")
    before = weights(net)
    fit(net, Unfreezing(add_group=False), 3)
    assert net.backbone[0].weight.requires_grad
    assert torch.equal(net.backbone[0].weight, before["backbone.0.weight"])
    assert net.backbone[0].weight.grad is not None  # computed and kept, but never used


@each_optimizer
def test_ours_trains_what_was_frozen_at_construction(kind: str) -> None:
    net = Net(kind)
    before = weights(net)
    fit(net, FreezeCallback(schedule={0: ["backbone"], 1: []}), 3)
    assert not torch.equal(net.backbone[0].weight, before["backbone.0.weight"])


def test_ours_refuses_an_optimizer_that_leaves_parameters_out() -> None:
    class Heads(Net):
        def configure_optimizers(self) -> Any:
            return FrozenAwareSGD(self.head.parameters(), lr=0.1)

    with pytest.raises(ValueError, match=r"backbone\.0\.weight.* in no optimizer"):
        fit(Heads(), FreezeCallback(schedule={0: ["backbone"], 1: []}), 1)


def test_theirs_does_not_resume_after_the_frozen_set_changed(tmp_path: Path) -> None:
    fit(Net("stock"), Unfreezing(), 2).save_checkpoint(tmp_path / "run.ckpt")
    # It has done its work, so the run goes on without the callback.
    with pytest.raises((ValueError, KeyError), match="different number of parameter groups"):
        fit(Net("stock"), [], 3, tmp_path / "run.ckpt")


@each_optimizer
@pytest.mark.parametrize("goes_on_with", ["the schedule", "no callback", "another schedule"])
def test_ours_resumes_whatever_is_frozen_now(tmp_path: Path, goes_on_with: str, kind: str) -> None:
    def callback() -> FreezeCallback:
        return FreezeCallback(schedule={0: ["backbone"], 1: []})

    fit(Net(kind), callback(), 2).save_checkpoint(tmp_path / "run.ckpt")
    callbacks: dict[str, Any] = {
        "the schedule": callback(),
        "no callback": [],
        "another schedule": FreezeCallback(schedule={0: ["head"]}),
    }
    net = Net(kind)
    if goes_on_with == "another schedule":
        with pytest.warns(UserWarning, match=r"another schedule: it has entries\[1\]=1"):
            fit(net, callbacks[goes_on_with], 3, tmp_path / "run.ckpt")
        # Only what the new schedule names is frozen, nothing that the old one froze.
        frozen = torch_freeze.report(net).frozen_names
        assert frozen == tuple(f"head.{name}" for name, _ in net.head.named_parameters())
    else:
        fit(net, callbacks[goes_on_with], 3, tmp_path / "run.ckpt")
    assert len(net.trained) == BATCHES


def test_theirs_breaks_the_learning_rate_scheduler() -> None:
    with pytest.raises(KeyError, match=r"max_lr|initial_lr"):
        fit(Net("stock", rates=True), Unfreezing(), 3)


@each_optimizer
def test_ours_leaves_the_learning_rate_scheduler_alone(kind: str) -> None:
    net, untouched = Net(kind, rates=True), Net(kind, rates=True)
    freezing = fit(net, FreezeCallback(schedule={0: ["backbone"], 1: []}), 3)
    plain = fit(untouched, [], 3)
    rates = [t.optimizers[0].param_groups[0]["lr"] for t in (freezing, plain)]
    assert rates[0] == rates[1]
    assert len(freezing.optimizers[0].param_groups) == 1


def shifted_norm() -> Net:
    """Running statistics with a mean of 5, where the mean of the data is 0."""
    net = Net()
    with torch.no_grad():
        net.backbone[1].running_mean.fill_(5.0)
    return net


def test_theirs_trains_on_other_values_than_it_is_evaluated_on() -> None:
    net = shifted_norm()
    BaseFinetuning.freeze(net.backbone, train_bn=False)
    assert net.train().backbone[1](torch.zeros(4, 8)).mean().abs() < 1e-3  # of the batch
    assert (net.eval().backbone[1](torch.zeros(4, 8)).mean() + 5).abs() < 1e-3


def test_ours_uses_the_running_statistics_in_both() -> None:
    net = shifted_norm()
    torch_freeze.freeze(net, "backbone")
    for mode in (True, False):
        assert (net.train(mode).backbone[1](torch.zeros(4, 8)).mean() + 5).abs() < 1e-3


def test_ours_holds_the_statistics_through_a_fit() -> None:
    net = shifted_norm()
    fit(net, FreezeCallback("backbone"), 2)
    assert torch.equal(net.backbone[1].running_mean, torch.full((8,), 5.0))


def zeros() -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))


def test_theirs_drops_parameters_of_equal_value() -> None:
    a, b = zeros()
    left = BaseFinetuning.filter_on_optimizer(torch.optim.SGD([a], lr=0.1), [b])
    assert left == []  # b is missing from the optimizer for good


def test_ours_goes_by_identity() -> None:
    class Twins(Net):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = zeros()

        def training_step(self, batch: Tensor) -> Tensor:
            return ((self.a + 2 * self.b) * batch.mean()).sum() + super().training_step(batch)

    net = Twins()
    fit(net, FreezeCallback(schedule=lambda m: torch_freeze.FreezeSchedule(m, {0: m.b, 1: []})), 1)
    assert not net.b.requires_grad
    assert torch.equal(net.b, torch.zeros(3))
    assert not torch.equal(net.a, torch.zeros(3))


def test_their_backbone_finetuning_and_our_schedule_freeze_the_same_epochs() -> None:
    theirs, ours = Net("stock"), Net()
    fit(theirs, BackboneFinetuning(unfreeze_backbone_at_epoch=2, train_bn=False), 4)
    fit(ours, FreezeCallback(schedule={0: ["backbone"], 2: []}), 4)
    assert theirs.trained == ours.trained


@pytest.mark.parametrize(
    ("name", "logged"),
    [(None, "lr-FrozenAwareSGD"), ("lr-SGD", "lr-SGD")],
    ids=["by the optimizer's class", "by the scheduler's own name"],
)
def test_what_the_learning_rate_is_logged_as(tmp_path: Path, name: str | None, logged: str) -> None:
    class Named(Net):
        def configure_optimizers(self) -> Any:
            [optimizer], [scheduler] = super().configure_optimizers()
            return [optimizer], [scheduler | ({"name": name} if name else {})]

    monitor = pl.callbacks.LearningRateMonitor()
    logger = pl.loggers.CSVLogger(tmp_path)
    fit(Named(rates=True), monitor, 1, logger=logger, log_every_n_steps=1)
    assert set(monitor.lrs) == {logged}


class Whole(Net):
    """Calls itself on the inputs of a batch, as most modules do, and counts runs of its prefix."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.backbone(x))
        return out

    def training_step(self, batch: Any) -> Tensor:
        return self(batch[0]).square().mean()


def test_a_cache_gives_the_same_weights_and_runs_the_prefix_once() -> None:
    samples = torch.utils.data.TensorDataset(
        torch.randn(8 * BATCHES, 4, generator=cases.generator(1)), torch.arange(8 * BATCHES)
    )
    found, runs = [], []
    for cached in (False, True):
        net = Whole()
        torch_freeze.freeze(net, "backbone")

        def count(*_: Any, net: Whole = net) -> None:
            net.runs += 1

        net.backbone[0].register_forward_hook(count)
        cache = torch_freeze.FeatureCache(net, samples, spot_check=0) if cached else None
        loader: Any = torch.utils.data.DataLoader(samples if cache is None else cache.dataset, 8)
        net.runs = 0
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_epochs=3, logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False,
            callbacks=FreezeCallback("backbone", cache=cache),
        )  # fmt: skip
        trainer.fit(net, loader)
        found.append(weights(net))
        runs.append(net.runs)
        assert net(torch.ones(2, 4)).shape == (2, 2), "the module is as it was"
    assert_same_weights(found[1], found[0])
    assert runs == [3 * BATCHES, BATCHES]
