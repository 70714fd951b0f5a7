"""Lightning, Transformers and Accelerate on two processes, with a frozen set that changes.

They train the same as one process on batches twice as large, and the ranks agree to the bit. Where
DDP could not follow a schedule, training does not begin.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import optim_cases as cases
from tests.helpers.processes import World, world_of
from torch_freeze import AdvanceOnPlateau, FreezeSchedule, gradual_unfreeze, rotate

dist = torch.distributed
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and sys.platform == "linux"), reason="needs torch.distributed on Linux"
)

SIZE = 2
BATCH = 4  # on each of two processes; one process has twice as much
BATCHES = 3  # per epoch
EPOCHS = 4
# Of each optimizer, by its name in cases.FAMILIES.
HYPER: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9},
    "AdamW": {"lr": 0.02, "weight_decay": 0.1},
}
each_optimizer = pytest.mark.parametrize("kind", HYPER)
# Gradients are summed in another order than on one process.
SAME = {"rtol": 1e-9, "atol": 1e-10}
LAYERS = ["body.0", "body.2"]

# What the callbacks get as their schedule; functions are called with the model.
SCHEDULES: dict[str, Any] = {
    "a table of epochs": {0: ["body"], 1: ["body.0"], 3: []},
    "gradual unfreezing": lambda m: gradual_unfreeze(m, [*LAYERS, "head"]),
    "a rotation by steps": lambda m: rotate(m, LAYERS, k=1, every=2, always="head", seed=1),
    "gradual unfreezing by steps": lambda m: gradual_unfreeze(m, [*LAYERS, "head"], 2, unit="step"),
}


def make(kind: str, model: nn.Module) -> Any:
    """The optimizer here of that kind, over all parameters."""
    return cases.FAMILIES[kind].ours(model.parameters(), **HYPER[kind])


def on_a_metric(model: nn.Module) -> AdvanceOnPlateau:
    """Phases that end when the loss has not risen, and restore the best weights."""
    groups = gradual_unfreeze(model, [*LAYERS, "head"])
    return AdvanceOnPlateau(groups, "max", patience=0, restore_best=True)


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} not installed")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of("cpu", SIZE) as processes:
        yield processes


@pytest.fixture(autouse=True)
def quiet(one_thread: None) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Net(nn.Module):
    """Two layers and a head, in double precision; it notes what trains at each training forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh())
        self.head = nn.Linear(5, 2)
        self.double()
        self.trained: list[tuple[bool, ...]] = []

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        layers = (self.body[0], self.body[2], self.head)
        self.trained.append(tuple(layer.weight.requires_grad for layer in layers))
        return {"loss": self.head(self.body(x)).square().mean()}


def samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(SIZE * BATCH * BATCHES, 4, generator=generator, dtype=torch.double)
    return list(rows)


def outcome(net: Net) -> dict[str, Any]:
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    return {"weights": weights, "trained": net.trained}


def assert_as_one(results: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """The ranks trained what one process did, at the same steps, and agree to the bit."""
    for result in results:
        assert result["trained"] == one["trained"]
        for name, weight in one["weights"].items():
            torch.testing.assert_close(result["weights"][name], weight, **SAME)
            assert torch.equal(result["weights"][name], results[0]["weights"][name]), name


def assert_refused(results: list[dict[str, Any]], *says: str) -> None:
    for result in results:
        assert all(words in result["raised"] for words in says), result["raised"]
        assert result["trained"] == []


def spoil(net: Net, how: str) -> Any:
    """The schedule of a run that fails under DDP in the named way."""
    if how.startswith("frozen when wrapped"):
        net.body[0].requires_grad_(False)
    if how == "the ranks' schedules differ":
        seed = dist.get_rank()
        return lambda m: rotate(m, LAYERS, 1, 1, always="head", seed=seed)
    if how == "frozen when wrapped, never freed":
        return lambda m: rotate(m, ["body.2", "head"], 1, 1)
    return SCHEDULES["a table of epochs"]


# What is wrong: words of the error.
REFUSED: dict[str, tuple[str, ...]] = {
    "unused gradients not looked for": ("gradients that never come", "find_unused_parameters"),
    "a static graph": ("graph never changes", "static_graph"),
    "frozen when wrapped": ("body.0.weight, body.0.bias were frozen when", "unfreeze"),
    "the ranks' schedules differ": ("the schedule of rank 1 is not that of rank 0", "seed"),
}


# --- Lightning ------------------------------------------------------------------------------------


def on_lightning(
    device: str,
    schedule: str | None,
    how: str = "",
    save: Path | None = None,
    kind: str = "SGD",
    **options: Any,
) -> Any:
    """A fit; it runs in this process alone if no device is given."""
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import DDPStrategy

    from torch_freeze.integrations.lightning import FreezeCallback

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(Net, pl.LightningModule):
        def training_step(self, x: Tensor) -> Tensor:
            loss: Tensor = self(x)["loss"]
            self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=how != "not averaged")
            return loss

        def configure_optimizers(self) -> Any:
            return make(kind, self)

    model = Module()
    plan = spoil(model, how) if how else SCHEDULES.get(schedule or "")
    monitor = None
    if schedule == "a metric":
        plan, monitor = on_a_metric, "loss"
    # Without a schedule DDP needs no setting, because freezing comes before it wraps the model.
    unused_too = plan is not None and how != "unused gradients not looked for"
    ddp = DDPStrategy(find_unused_parameters=unused_too, static_graph=how == "a static graph")
    resume = options.pop("resume", None)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=SIZE if device else 1,
        strategy=ddp if device else "auto",
        callbacks=FreezeCallback(
            *([] if plan else ["body.0"]), schedule=plan, monitor=monitor, log=False
        ),
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": EPOCHS} | options,
    )
    rows: Any = samples()
    loader = torch.utils.data.DataLoader(
        rows,
        batch_size=BATCH if device else BATCH * SIZE,
        # Lightning's own sampler would shuffle.
        sampler=torch.utils.data.DistributedSampler(rows, shuffle=False) if device else None,
    )
    try:
        trainer.fit(model, loader, ckpt_path=resume, weights_only=False)
    except RuntimeError as error:
        return {"raised": str(error), "trained": model.trained}
    assert trainer.world_size == (SIZE if device else 1)
    if save is not None:
        trainer.save_checkpoint(save)
    return outcome(model)


@needs("lightning")
class TestLightning:
    @each_optimizer
    @pytest.mark.parametrize("schedule", [*SCHEDULES, None])
    def test_a_fit_equals_one_process(self, world: World, schedule: str | None, kind: str) -> None:
        one = on_lightning("", schedule, kind=kind)
        assert_as_one(world.run(on_lightning, schedule, options={"kind": kind}), one)

    def test_a_metric_that_is_averaged_changes_phase_on_all_ranks(self, world: World) -> None:
        one = on_lightning("", "a metric")
        assert len(set(one["trained"])) == 3
        assert_as_one(world.run(on_lightning, "a metric"), one)

    def test_a_metric_that_differs_between_ranks_is_refused(self, world: World) -> None:
        for result in world.run(on_lightning, "a metric", "not averaged"):
            assert "the metric of rank 1 is" in result["raised"], result
            assert "Log 'loss' with sync_dist=True." in result["raised"]
            assert len(result["trained"]) == BATCHES

    def test_accumulated_batches_are_one_step_on_all_ranks(self, world: World) -> None:
        options = {"accumulate_grad_batches": 2}
        one = on_lightning("", "a rotation by steps", **options)
        assert_as_one(world.run(on_lightning, "a rotation by steps", options=options), one)

    @each_optimizer
    def test_a_resumed_fit_goes_on_in_the_middle_of_the_schedule(
        self, world: World, tmp_path: Path, kind: str
    ) -> None:
        path = tmp_path / "run.ckpt"
        name = "a table of epochs"
        world.run(on_lightning, name, "", path, kind, options={"max_epochs": 2})
        resumed = world.run(on_lightning, name, options={"resume": path, "kind": kind})
        one = on_lightning("", name, kind=kind)
        one["trained"] = one["trained"][2 * BATCHES :]
        assert_as_one(resumed, one)

    @pytest.mark.parametrize(("how", "says"), REFUSED.items(), ids=REFUSED)
    def test_ddp_that_cannot_follow_is_refused(
        self, world: World, how: str, says: tuple[str, ...]
    ) -> None:
        assert_refused(world.run(on_lightning, None, how), *says)

    def test_what_is_frozen_when_wrapped_and_never_unfrozen_is_accepted(self, world: World) -> None:
        for result in world.run(on_lightning, None, "frozen when wrapped, never freed"):
            assert {trained[0] for trained in result["trained"]} == {False}


# --- Transformers ---------------------------------------------------------------------------------


def on_transformers(
    device: str,
    folder: Path,
    schedule: str | None,
    how: str = "",
    kind: str = "SGD",
    **options: Any,
) -> Any:
    """A training run; it runs in this process alone if no device is given."""
    import transformers

    from torch_freeze.integrations.transformers import FreezeTrainerCallback

    model = Net()
    plan = spoil(model, how) if how else SCHEDULES.get(schedule or "")
    if plan is None or how == "unused gradients not looked for":
        options["ddp_find_unused_parameters"] = False
    if how == "a static graph":
        options["ddp_static_graph"] = True
    resume = options.pop("resume", None)
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH if device else BATCH * SIZE,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
        max_grad_norm=0.05,
        seed=3,
        **{"num_train_epochs": EPOCHS, "save_strategy": "no"} | options,
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=[{"x": x} for x in samples()],
        optimizers=(make(kind, model), None),
        callbacks=[FreezeTrainerCallback(*([] if plan else ["body.0"]), schedule=plan)],
    )
    assert arguments.world_size == (SIZE if device else 1)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except RuntimeError as error:
        return {"raised": str(error), "trained": model.trained}
    return outcome(model)


@needs("transformers", "accelerate")
class TestTransformers:
    @each_optimizer
    @pytest.mark.parametrize("schedule", [*SCHEDULES, None])
    def test_training_equals_one_process(
        self, world: World, tmp_path: Path, schedule: str | None, kind: str
    ) -> None:
        one = on_transformers("", tmp_path, schedule, kind=kind)
        options = {"kind": kind}
        assert_as_one(world.run(on_transformers, tmp_path, schedule, options=options), one)

    @each_optimizer
    def test_a_resumed_run_goes_on_in_the_middle_of_the_schedule(
        self, world: World, tmp_path: Path, kind: str
    ) -> None:
        name, stop = "gradual unfreezing by steps", BATCHES + 1
        saving = {"save_strategy": "steps", "save_steps": stop, "kind": kind}
        whole = world.run(on_transformers, tmp_path, name, options=saving)
        options = {"resume": str(tmp_path / f"checkpoint-{stop}"), "kind": kind}
        resumed = world.run(on_transformers, tmp_path, name, options=options)
        whole[0]["trained"] = whole[0]["trained"][stop:]
        assert_as_one(resumed, whole[0])

    @pytest.mark.parametrize(("how", "says"), REFUSED.items(), ids=REFUSED)
    def test_ddp_that_cannot_follow_is_refused(
        self, world: World, tmp_path: Path, how: str, says: tuple[str, ...]
    ) -> None:
        assert_refused(world.run(on_transformers, tmp_path, None, how), *says)


# --- Accelerate -----------------------------------------------------------------------------------


def on_accelerate(
    device: str,
    folder: Path,
    *,
    kind: str = "SGD",
    find_unused: bool = True,
    stop: int = 0,
    accumulate: int = 1,
) -> Any:
    """The loop of the documentation; with `stop`, it is saved there and resumed."""
    import accelerate

    ddp = accelerate.DistributedDataParallelKwargs(find_unused_parameters=find_unused)

    def build() -> tuple[Any, ...]:
        accelerator = accelerate.Accelerator(
            cpu=True, kwargs_handlers=[ddp], gradient_accumulation_steps=accumulate
        )
        assert accelerator.num_processes == (SIZE if device else 1)
        model = Net()
        optimizer = make(kind, model)
        rates = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        schedule = FreezeSchedule(model, SCHEDULES["a table of epochs"])
        accelerator.register_for_checkpointing(schedule)
        rows: Any = samples()
        size = BATCH if device else BATCH * SIZE
        loader = torch.utils.data.DataLoader(rows, batch_size=size)
        wrapped = accelerator.prepare(model, optimizer, loader)
        return accelerator, model, *wrapped, rates, schedule

    def go(parts: tuple[Any, ...], epochs: range) -> None:
        accelerator, _, model, optimizer, loader, rates, schedule = parts
        for _ in epochs:
            schedule.step()
            for x in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(model(x)["loss"])
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.05)
                    optimizer.step()
                    optimizer.zero_grad()
            rates.step()

    parts = build()
    net = parts[1]
    try:
        go(parts, range(stop or EPOCHS))
    except RuntimeError as error:
        return {"raised": str(error)}
    if stop:
        parts[0].save_state(str(folder))
        trained, rates = net.trained, parts[-2].state_dict()
        parts = build()
        net = parts[1]
        parts[0].load_state(str(folder))
        parts[-2].load_state_dict(rates)
        go(parts, range(stop, EPOCHS))
        net.trained = trained + net.trained
    return outcome(net)


@needs("accelerate")
class TestAccelerate:
    @each_optimizer
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_a_prepared_loop_equals_one_process(
        self, world: World, tmp_path: Path, accumulate: int, kind: str
    ) -> None:
        options: dict[str, Any] = {"accumulate": accumulate, "kind": kind}
        one = on_accelerate("", tmp_path, **options)
        assert_as_one(world.run(on_accelerate, tmp_path, options=options), one)

    @each_optimizer
    def test_a_saved_state_resumes_in_the_middle_of_the_schedule(
        self, world: World, tmp_path: Path, kind: str
    ) -> None:
        one = on_accelerate("", tmp_path, kind=kind)
        options = {"stop": 2, "kind": kind}
        assert_as_one(world.run(on_accelerate, tmp_path, options=options), one)

    def test_by_default_torch_refuses_to_go_on_when_something_is_frozen(
        self, world: World, tmp_path: Path
    ) -> None:
        for result in world.run(on_accelerate, tmp_path, options={"find_unused": False}):
            assert "Expected to have finished reduction" in result["raised"]
