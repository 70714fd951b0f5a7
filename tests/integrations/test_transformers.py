"""FreezeTrainerCallback under Transformers' Trainer, beside the Trainer's own optimizer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is not installed")
from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from tests.helpers import optim_cases as cases  # noqa: E402
from tests.helpers.models import weights  # noqa: E402
from torch_freeze import (  # noqa: E402
    AdvanceOnPlateau,
    FeatureCache,
    FrozenAwareSGD,
    freeze,
    gradual_unfreeze,
    rotate,
)
from torch_freeze.integrations.transformers import FreezeTrainerCallback  # noqa: E402

LAYERS = ["bert.encoder.layer.0", "bert.encoder.layer.1", "bert.encoder.layer.2"]
ALWAYS = ["bert.pooler", "classifier"]
BATCHES = 4  # per epoch
# Of each optimizer, by its name in cases.FAMILIES.
HYPER: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "AdamW": {"lr": 0.02, "weight_decay": 0.1},
}
each_optimizer = pytest.mark.parametrize("kind", HYPER)


pytestmark = pytest.mark.usefixtures("one_thread")


def make_model() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(16, (4 * BATCHES, 6), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 2} for row in words]


class Witness(TrainerCallback):  # type: ignore[misc]
    """Notes which layers train at each step, after all other callbacks have run."""

    def __init__(self) -> None:
        self.trained: list[tuple[bool, ...]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        layers = kwargs["model"].bert.encoder.layer
        self.trained.append(tuple(next(p.parameters()).requires_grad for p in layers))


def train(
    folder: Path,
    model: Any,
    callbacks: list[Any],
    resume: str | None = None,
    optimizer: Any = "SGD",
    trainer_class: type[Trainer] = Trainer,
    scores: list[float] | None = None,
    **options: Any,
) -> tuple[Trainer, list[tuple[bool, ...]]]:
    witness = Witness()
    evaluated: dict[str, Any] = {"eval_dataset": options.pop("eval_dataset", None)}
    options = {"num_train_epochs": 4, "save_strategy": "no", "max_grad_norm": 1.0, **options}
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        learning_rate=0.1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
        seed=3,
        **options,
    )
    if isinstance(optimizer, str):
        optimizer = cases.FAMILIES[optimizer].ours(model.parameters(), **HYPER[optimizer])
    if scores is not None:

        def compute_metrics(_: Any) -> dict[str, float]:
            return {"score": scores[round(trainer.state.epoch or 0) - 1]}

        evaluated = {"eval_dataset": data(), "compute_metrics": compute_metrics}
    trainer = trainer_class(
        model,
        arguments,
        train_dataset=data(),
        optimizers=(optimizer, None),
        callbacks=[*callbacks, witness],
        **evaluated,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, witness.trained


@each_optimizer
def test_what_is_named_is_frozen_throughout_and_all_else_trains(tmp_path: Path, kind: str) -> None:
    model = make_model()
    before = weights(model)
    callback = FreezeTrainerCallback("bert.embeddings", *LAYERS[:2])
    _, trained = train(tmp_path, model, [callback], optimizer=kind, num_train_epochs=1)
    assert set(trained) == {(False, False, True)}
    for name, weight in weights(model).items():
        frozen = name.startswith(("bert.embeddings", *LAYERS[:2]))
        if frozen:
            assert torch.equal(weight, before[name]), name
    assert not torch.equal(model.classifier.weight, before["classifier.weight"])


def test_what_is_named_is_frozen_in_a_model_that_the_trainer_makes(tmp_path: Path) -> None:
    made: list[Any] = []

    def model_init() -> Any:
        made.append(make_model())
        return made[-1]

    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    callback = FreezeTrainerCallback("bert.embeddings")
    trainer = Trainer(
        args=arguments, train_dataset=data(), model_init=model_init, callbacks=[callback]
    )
    before = weights(make_model())
    trainer.train()
    assert len(made) == 2
    after = weights(trainer.model)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert not [name for name in changed if name.startswith("bert.embeddings")]


@pytest.mark.parametrize("asked", [None, True, False])
@pytest.mark.parametrize("recomputes", [True, False])
def test_the_trainers_setting_for_unused_parameters_is_known(
    tmp_path: Path, asked: bool | None, recomputes: bool
) -> None:
    from torch_freeze.integrations.transformers import _finds_unused

    model = make_model()
    if recomputes:
        model.gradient_checkpointing_enable()
    arguments = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, ddp_find_unused_parameters=asked
    )
    trainer = Trainer(model, arguments)
    handler = trainer.accelerator.ddp_handler
    assert _finds_unused(arguments, model) == handler.find_unused_parameters


def test_a_schedule_is_stepped_before_every_epoch(tmp_path: Path) -> None:
    callback = FreezeTrainerCallback(
        schedule=lambda m: gradual_unfreeze(
            m, [["bert.embeddings", LAYERS[0]], *LAYERS[1:], ALWAYS]
        )
    )
    _, trained = train(tmp_path, make_model(), [callback])
    expected = [(False,) * 3, (False, False, True), (False, True, True), (True,) * 3]
    assert trained == [state for state in expected for _ in range(BATCHES)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_schedule_of_steps_is_stepped_before_every_optimizer_step(
    tmp_path: Path, accumulate: int
) -> None:
    callback = FreezeTrainerCallback(
        schedule=lambda m: rotate(m, LAYERS, k=1, every=2, always=ALWAYS, seed=0)
    )
    trainer, trained = train(
        tmp_path, make_model(), [callback], gradient_accumulation_steps=accumulate
    )
    assert callback.schedule is not None
    assert callback.schedule.last == trainer.state.global_step - 1
    assert {sum(state) for state in trained} == {1}
    assert all(trained[i] == trained[i + 1] for i in range(0, len(trained) - 1, 2))
    assert len(set(trained)) > 1


@each_optimizer
@pytest.mark.parametrize("unit", ["epoch", "step"])
@pytest.mark.parametrize("stop", [4, 6, 12], ids=["after an epoch", "in an epoch", "after three"])
def test_a_resumed_run_goes_on_in_the_middle_of_the_schedule(
    tmp_path: Path, unit: str, stop: int, kind: str
) -> None:
    def callback() -> FreezeTrainerCallback:
        groups = [["bert.embeddings", LAYERS[0]], *LAYERS[1:], ALWAYS]
        every = 1 if unit == "epoch" else 3
        return FreezeTrainerCallback(
            schedule=lambda m: gradual_unfreeze(m, groups, every, unit=unit)
        )

    whole = make_model()
    saving = {"save_strategy": "steps", "save_steps": stop}
    _, all_trained = train(tmp_path, whole, [callback()], optimizer=kind, **saving)
    resumed, checkpoint = make_model(), str(tmp_path / f"checkpoint-{stop}")
    _, trained = train(tmp_path, resumed, [callback()], checkpoint, optimizer=kind)
    assert trained == all_trained[stop:]
    for name, weight in weights(whole).items():
        assert torch.equal(weights(resumed)[name], weight), name


# --- schedules that follow a metric --------------------------------------------------------------

GROUPS = [["bert.embeddings", LAYERS[0]], *LAYERS[1:], ALWAYS]
PHASES = [(False,) * 3, (False, False, True), (False, True, True), (True,) * 3]
EVALUATED: dict[str, Any] = {"eval_strategy": "epoch", "num_train_epochs": 8}


def plateau(monitor: str | None = "score", **arguments: Any) -> FreezeTrainerCallback:
    return FreezeTrainerCallback(
        schedule=lambda m: AdvanceOnPlateau(
            gradual_unfreeze(m, GROUPS), "max", patience=0, **arguments
        ),
        monitor=monitor,
    )


@pytest.mark.parametrize("named", ["to the callback", "as metric_for_best_model"])
def test_a_schedule_follows_the_metric_and_stops_the_trainer_at_its_end(
    tmp_path: Path, named: str
) -> None:
    callback = plateau("eval_score" if named == "to the callback" else None)
    best = {} if named == "to the callback" else {"metric_for_best_model": "score"}
    scores = [1.0, 2, 2, 3, 1, 1, 1, 9]
    trainer, trained = train(tmp_path, make_model(), [callback], scores=scores, **EVALUATED, **best)
    expected = [0, 0, 0, 1, 1, 2, 3]
    assert trained == [PHASES[phase] for phase in expected for _ in range(BATCHES)]
    assert trainer.state.epoch == 7
    assert callback.schedule is not None
    state = callback.schedule.state_dict()
    trainer.evaluate()
    assert callback.schedule.state_dict() == state, (
        "an evaluation after training counts for nothing"
    )


@pytest.mark.parametrize("stop", [2, 3, 5])
@pytest.mark.parametrize("restore", [True, False], ids=["restored", "not restored"])
@pytest.mark.parametrize("moved", [True, False], ids=["checkpoint moved", "in place"])
def test_a_resumed_run_goes_on_in_its_phase_with_the_best_weights(
    tmp_path: Path, stop: int, restore: bool, moved: bool
) -> None:
    options = {"scores": [1.0, 3, 2, 4, 1, 2, 2], **EVALUATED, "num_train_epochs": 7}
    whole = make_model()
    first = plateau(restore_best=restore)
    saving = {"save_strategy": "epoch"}
    _, all_trained = train(tmp_path, whole, [first], **options, **saving)
    checkpoint = tmp_path / f"checkpoint-{stop * BATCHES}"
    assert (checkpoint / "freeze_schedule.pt").exists() == restore
    again = {}
    if moved:
        (tmp_path / "elsewhere").mkdir()
        checkpoint = checkpoint.rename(tmp_path / "elsewhere" / checkpoint.name)
        again = {"resume_from_checkpoint": str(checkpoint)}
    resumed, second = make_model(), plateau(restore_best=restore)
    _, trained = train(tmp_path, resumed, [second], str(checkpoint), **options, **again)
    assert trained == all_trained[stop * BATCHES :]
    for name, weight in weights(whole).items():
        assert torch.equal(weights(resumed)[name], weight), name
    assert str(second.schedule) == str(first.schedule)


def test_a_resumed_run_without_its_best_weights_is_refused(tmp_path: Path) -> None:
    options = {"scores": [1.0] * 8, **EVALUATED}
    saving = {"save_strategy": "epoch", "num_train_epochs": 1}
    train(tmp_path, make_model(), [plateau()], **{**options, **saving})
    with pytest.raises(RuntimeError, match=r"there is no .*checkpoint-4/freeze_schedule\.pt"):
        train(
            tmp_path, make_model(), [plateau(restore_best=True)],
            str(tmp_path / "checkpoint-4"), **options,
        )  # fmt: skip


def test_a_checkpoint_without_the_best_weights_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = plateau(restore_best=True)
    options = {**EVALUATED, "num_train_epochs": 1}
    trainer, _ = train(tmp_path, make_model(), [callback], scores=[1.0], **options)
    callback.on_save(trainer.args, trainer.state, trainer.control)
    assert "checkpoint-4, so the best weights are not saved" in caplog.text


def test_a_metric_that_no_evaluation_has_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no evaluation has a metric 'eval_f1'; .* eval_score"):
        train(tmp_path, make_model(), [plateau("f1")], scores=[1.0] * 8, **EVALUATED)
    with pytest.raises(ValueError, match=r"needs the name of a metric\. Give monitor="):
        train(tmp_path, make_model(), [plateau(None)], scores=[1.0] * 8, **EVALUATED)
    table = FreezeTrainerCallback(schedule={0: ["bert"]}, monitor="score")
    with pytest.raises(ValueError, match="a FreezeSchedule watches no metric"):
        train(tmp_path, make_model(), [table], scores=[1.0] * 8, **EVALUATED)
    with pytest.raises(ValueError, match="no schedule"):
        FreezeTrainerCallback("bert", monitor="score")


def test_the_metric_may_belong_to_one_of_several_data_sets(tmp_path: Path) -> None:
    callback = plateau("eval_second_loss", max_evals=1)
    evaluated = {"first": data(), "second": data()}
    _, trained = train(tmp_path, make_model(), [callback], **EVALUATED, eval_dataset=evaluated)
    assert trained == [PHASES[phase] for phase in range(4) for _ in range(BATCHES)]


def test_the_report_is_logged_when_what_is_frozen_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="torch_freeze.integrations.transformers")
    callback = FreezeTrainerCallback(schedule={0: ["bert.encoder"], 2: []})
    train(tmp_path, make_model(), [callback], num_train_epochs=3)
    said = [r.getMessage() for r in caplog.records if "backward:" in r.getMessage()]
    assert len(said) == 2


@pytest.mark.parametrize("how", ["its own optimizer", "optimizer_cls_and_kwargs"])
def test_theirs_leaves_out_what_is_frozen_when_it_makes_the_optimizer(
    tmp_path: Path, how: str
) -> None:
    model = make_model()
    model.bert.encoder.requires_grad_(False)
    before = weights(model)

    class Unfreeze(TrainerCallback):  # type: ignore[misc]
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["model"].requires_grad_(True)

    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    classes = {} if how == "its own optimizer" else {
        "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})
    }  # fmt: skip
    Trainer(model, arguments, train_dataset=data(), callbacks=[Unfreeze()], **classes).train()
    name = "bert.encoder.layer.0.output.dense.weight"
    assert model.get_parameter(name).requires_grad
    assert torch.equal(model.get_parameter(name), before[name])


@each_optimizer
def test_ours_made_by_the_trainer_owns_what_a_schedule_freezes_later(
    tmp_path: Path, kind: str
) -> None:
    """The Trainer makes the optimizer before the schedule begins, when nothing is frozen."""
    found = []
    for how in ("optimizers", "optimizer_cls_and_kwargs"):
        model = make_model()
        ours, hyper = cases.FAMILIES[kind].ours, HYPER[kind] | {"weight_decay": 0.0}
        chosen: dict[str, Any] = {"optimizers": (ours(model.parameters(), **hyper), None)}
        trainer = Trainer(
            model,
            TrainingArguments(
                str(tmp_path), num_train_epochs=2, report_to=[], save_strategy="no", use_cpu=True,
                disable_tqdm=True, logging_strategy="no",
            ),
            train_dataset=data(),
            callbacks=[FreezeTrainerCallback(schedule={0: ["bert.encoder"], 1: []})],
            **(chosen if how == "optimizers" else {how: (ours, hyper)}),
        )  # fmt: skip
        trainer.train()
        found.append(weights(model))
    before = weights(make_model())
    for name, weight in found[0].items():
        assert torch.equal(weight, found[1][name]), name
        # Attention does not depend on the bias of its keys, so its gradient may be 0.
        assert not torch.equal(weight, before[name]) or "key.bias" in name, name


@each_optimizer
def test_ours_trains_what_was_frozen_at_the_start(tmp_path: Path, kind: str) -> None:
    model = make_model()
    before = weights(model)
    callback = FreezeTrainerCallback(schedule={0: ["bert.encoder"], 1: []})
    train(tmp_path, model, [callback], optimizer=kind, num_train_epochs=2)
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(model.get_parameter(name), before[name])


@pytest.mark.parametrize(
    ("optimizer_class", "fits"),
    [
        (torch.optim.SGD, "FrozenAwareSGD"),
        (torch.optim.Adam, "FrozenAwareAdam"),
        (torch.optim.AdamW, "FrozenAwareAdamW"),
        (FrozenAwareSGD, "FrozenAwareSGD"),
        (torch.optim.RMSprop, "FrozenAwareAdam, FrozenAwareAdamW or FrozenAwareSGD"),
    ],
)
def test_ours_refuses_an_optimizer_that_leaves_parameters_out(
    tmp_path: Path, optimizer_class: Any, fits: str
) -> None:
    model = make_model()
    optimizer = optimizer_class(model.classifier.parameters(), lr=0.1)
    callback = FreezeTrainerCallback(schedule={0: ["bert"], 1: []})
    says = rf"in no optimizer and could never train\. Make {fits} from model\.parameters\(\)"
    with pytest.raises(ValueError, match=says):
        train(tmp_path, model, [callback], optimizer=optimizer)


def test_theirs_does_not_resume_after_the_frozen_set_changed(tmp_path: Path) -> None:
    def frozen_filter(frozen: bool) -> tuple[Any, Any]:
        model = make_model()
        model.bert.encoder.requires_grad_(not frozen)
        chosen = filter(lambda p: p.requires_grad, model.parameters())
        return model, torch.optim.SGD(chosen, lr=0.1, momentum=0.9)

    model, optimizer = frozen_filter(True)
    saving = {"save_strategy": "steps", "save_steps": BATCHES}
    train(tmp_path, model, [], optimizer=optimizer, num_train_epochs=1, **saving)
    model, optimizer = frozen_filter(False)
    with pytest.raises(ValueError, match="doesn't match the size"):
        train(tmp_path, model, [], str(tmp_path / f"checkpoint-{BATCHES}"), optimizer=optimizer)


@each_optimizer
def test_ours_resumes_under_another_frozen_set(tmp_path: Path, kind: str) -> None:
    saving = {"save_strategy": "steps", "save_steps": BATCHES, "optimizer": kind}
    frozen = FreezeTrainerCallback("bert.encoder")
    train(tmp_path, make_model(), [frozen], num_train_epochs=1, **saving)
    checkpoint = str(tmp_path / f"checkpoint-{BATCHES}")
    options = {"optimizer": kind, "num_train_epochs": 2}
    _, trained = train(tmp_path, make_model(), [], checkpoint, **options)
    assert set(trained) == {(True, True, True)}


def rates_of(folder: Path, callback: Any, optimizer: Any, model: Any) -> list[list[float]]:
    """The learning rate of every param group at each step."""
    seen: list[list[float]] = []

    class Rates(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append([group["lr"] for group in kwargs["optimizer"].param_groups])

    train(folder, model, [callback, Rates()], optimizer=optimizer, num_train_epochs=2)
    return seen


def test_theirs_breaks_the_learning_rate_when_a_group_is_added(tmp_path: Path) -> None:
    model = make_model()
    model.bert.encoder.requires_grad_(False)

    class Unfreeze(TrainerCallback):  # type: ignore[misc]
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if round(state.epoch) == 1:
                encoder = kwargs["model"].bert.encoder.requires_grad_(True)
                kwargs["optimizer"].add_param_group({"params": list(encoder.parameters())})

    chosen = filter(lambda p: p.requires_grad, model.parameters())
    optimizer = torch.optim.SGD(chosen, lr=0.1)
    with pytest.raises(ValueError, match="zip"):  # it has as many rates as there were groups
        rates_of(tmp_path, Unfreeze(), optimizer, model)


@each_optimizer
def test_ours_leaves_the_learning_rate_to_the_trainer(tmp_path: Path, kind: str) -> None:
    model = make_model()
    optimizer = cases.FAMILIES[kind].ours(model.parameters(), lr=0.1)
    callback = FreezeTrainerCallback(schedule={0: ["bert.encoder"], 1: []})
    rates = rates_of(tmp_path, callback, optimizer, model)
    line = [0.1 * (1 - step / (2 * BATCHES)) for step in range(2 * BATCHES)]
    assert [rate for (rate,) in rates] == pytest.approx(line)


def test_nothing_named_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="name what to freeze"):
        FreezeTrainerCallback()


class NormlessTrainer(Trainer):  # type: ignore[misc]
    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return grad_norm


@pytest.mark.compiled
@each_optimizer
def test_steps_in_backward_need_a_trainer_that_does_not_clip(tmp_path: Path, kind: str) -> None:
    """The Trainer clips by default, which is easy to overlook."""
    found = []
    for in_backward in (False, True):
        model = make_model()
        ours, hyper = cases.FAMILIES[kind].ours, HYPER[kind]
        optimizer = ours(model.parameters(), **hyper, step_in_backward=in_backward)
        if in_backward:
            other = make_model()
            clipped = ours(other.parameters(), **hyper, step_in_backward=True)
            with pytest.raises(
                RuntimeError, match=r"max_grad_norm=0 .*_get_grad_norm is overridden"
            ):
                train(tmp_path, other, [], optimizer=clipped, num_train_epochs=1)
        train(
            tmp_path, model, [], optimizer=optimizer, num_train_epochs=1, max_grad_norm=0.0,
            trainer_class=NormlessTrainer,
        )  # fmt: skip
        found.append(weights(model))
    for name, weight in found[0].items():
        assert torch.equal(weight, found[1][name]), name


def test_a_cache_gives_the_same_weights_under_a_schedule(tmp_path: Path) -> None:
    found = []
    for cached in (False, True):
        model = make_model()
        freeze(model, "bert.embeddings", *LAYERS[:2])
        cache = FeatureCache(model, data()) if cached else None  # type: ignore[arg-type]
        callback = FreezeTrainerCallback(
            schedule={0: ["bert.embeddings", *LAYERS[:2]], 2: ["bert.embeddings", LAYERS[0]]},
            cache=cache,
        )
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, num_train_epochs=3, report_to=[], seed=3,
            disable_tqdm=True, use_cpu=True, logging_strategy="no", save_strategy="no",
            eval_strategy="epoch",
        )  # fmt: skip
        trainer = Trainer(
            model,
            arguments,
            train_dataset=data() if cache is None else cache.dataset,
            eval_dataset=data(),
            data_collator=None if cache is None else cache.collator,
            optimizers=(FrozenAwareSGD(model.parameters(), 0.1), None),
            callbacks=[callback],
        )
        trainer.train()
        found.append(weights(model))
        if cache is not None:
            assert cache.stored == len(data()) and cache.boundary == (LAYERS[0],)
    for name, weight in found[0].items():
        # Batches are shuffled, so a sample is computed beside others than when it was stored.
        assert torch.allclose(weight, found[1][name], atol=1e-5), name
