"""Freezing under a Transformers Trainer."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.training_args import ParallelMode

from torch_freeze._fitting import fitting
from torch_freeze.plateau import AdvanceOnPlateau
from torch_freeze.report import report
from torch_freeze.schedule import FreezeSchedule

from ._common import (
    FreezeOptions,
    catch_up,
    check_ddp,
    check_monitor,
    check_owned,
    check_ranks,
    end_evaluation,
)

_logger = logging.getLogger(__name__)

#: File beside the model in a checkpoint, for schedules that keep the best weights.
_FILE = "freeze_schedule.pt"


class FreezeTrainerCallback(FreezeOptions, TrainerCallback):
    """Freeze parts of the model a Transformers Trainer trains, for good or by a schedule.

    Give the Trainer an optimizer over all parameters, too:
    `Trainer(..., optimizers=(FrozenAwareAdamW(model.parameters(), lr=...), None))`. The None leaves
    the learning-rate schedule to the TrainingArguments. An optimizer that a Trainer builds itself
    never trains what is frozen at that moment. A schedule has not begun by then, so with a schedule
    alone `optimizer_cls_and_kwargs=(FrozenAwareAdamW, {"lr": ...})` works as well.

    A resumed run continues in the middle of the schedule. The position follows from the Trainer's
    own count of epochs and steps, or from the metrics it has logged, so nothing is added to the
    checkpoint. The exception is an `AdvanceOnPlateau` with `restore_best`, which adds the best
    weights in a file `freeze_schedule.pt`. Freeze anything that you froze by hand again before you
    resume.

    Args:
        *what: what to freeze before training begins, in the terms of `torch_freeze.freeze`. If
            nothing is given, nothing is frozen.
        exclude: what to leave unchanged, in the same terms.
        schedule: {epoch: what is frozen from then on}, or a function that makes a
            `FreezeSchedule` from the model, such as
            `lambda model: rotate(model, "encoder.layer.*", k=2, every=50, always="classifier")`.
            A schedule of unit "epoch" is stepped before every epoch, one of unit "step" before
            every optimizer step, and an `AdvanceOnPlateau` after every evaluation.
        monitor: the name of the metric for an `AdvanceOnPlateau`, such as "eval_loss". The default
            is `metric_for_best_model` of the TrainingArguments. After the last phase the Trainer
            is asked to stop.
        hold_norm: as in `torch_freeze.freeze`, for `what`.
        log: log a report whenever the frozen set changes, to the logger of this module at level
            INFO.
        cache: a `FeatureCache` of the model. Give the Trainer `train_dataset=cache.dataset` and
            `data_collator=cache.collator`.

    Raises:
        ValueError: `what`, schedule and cache are all missing; when training starts, a parameter is
            in no optimizer although the schedule may unfreeze it; something named matches nothing;
            an `AdvanceOnPlateau` has no metric to watch, another schedule has a `monitor`, or an
            evaluation has no metric of that name.
        TypeError: `schedule` does not make a FreezeSchedule.
        RuntimeError: when training starts on several processes, the schedules differ between them.
            Under DDP also if it does not look for unused parameters (the default if the model
            recomputes activations; set ddp_find_unused_parameters=True in the TrainingArguments),
            has a static graph, or wrapped the model while something was frozen that the schedule
            unfreezes. Or the best weights of a resumed run are missing.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from transformers import Trainer, TrainingArguments
        >>> from torch_freeze import FrozenAwareAdamW
        >>> from torch_freeze.integrations.transformers import FreezeTrainerCallback
        >>> model = BertForSequenceClassification(BertConfig(
        ...     vocab_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        ...     intermediate_size=8))
        >>> layer = model.bert.encoder.layer
        >>> before = [part.intermediate.dense.weight.clone() for part in layer]
        >>> data = [{"input_ids": torch.arange(8), "labels": torch.tensor(i % 2)} for i in range(8)]
        >>> trainer = Trainer(
        ...     model,
        ...     TrainingArguments(tempfile.mkdtemp(), max_steps=2, report_to=[], save_strategy="no",
        ...                       disable_tqdm=True, logging_strategy="no", use_cpu=True),
        ...     train_dataset=data,
        ...     optimizers=(FrozenAwareAdamW(model.parameters(), lr=1e-3), None),
        ...     callbacks=[FreezeTrainerCallback("bert.embeddings", "bert.encoder.layer.0")],
        ... )
        >>> _ = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        >>> [torch.equal(part.intermediate.dense.weight, w) for part, w in zip(layer, before)]
        [True, False]
    """

    _caller = "FreezeTrainerCallback"

    def _init_state(self) -> None:
        self._monitor = ""
        self._training = False
        self._evaluated: bool | None = None
        self._metrics: set[str] = set()

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze for good, before the model is wrapped."""
        self._freeze(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the schedule."""
        model: nn.Module = kwargs["model"]
        self._attach()
        # A Trainer with model_init has made another model since on_init_end.
        self._freeze(model)
        if self._plan is not None:
            check_owned(
                model,
                [kwargs["optimizer"]],
                self._caller,
                f"Make {fitting([kwargs['optimizer']])} from model.parameters(), all of them, and "
                "give it to the Trainer: optimizers=(optimizer, None).",
            )
            # It begins at the start: catching up with the count of units restores what is frozen.
            self.schedule = self._make_schedule(model, self._plan)
            self._watch(self.schedule, args)
            if args.parallel_mode is ParallelMode.DISTRIBUTED and not (args.fsdp or args.deepspeed):
                check_ddp(
                    self.schedule,
                    self._caller,
                    finds_unused=_finds_unused(args, model),
                    static_graph=bool(getattr(args, "ddp_static_graph", False)),
                    to_find_unused="Set ddp_find_unused_parameters=True in the TrainingArguments.",
                    to_be_dynamic="Do not set ddp_static_graph in the TrainingArguments.",
                )
            if isinstance(self.schedule, AdvanceOnPlateau):
                self._resume(self.schedule, args, state)
            check_ranks(self.schedule, self._caller)
        if self._what or isinstance(self.schedule, AdvanceOnPlateau):
            self._show(model, kwargs["optimizer"])

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step a schedule of epochs."""
        if self.schedule is not None and self.schedule.unit == "epoch":
            # state.epoch counts batches, in fractions.
            epoch = math.floor((state.epoch or 0.0) + 1e-6)
            if catch_up(self.schedule, epoch):
                self._show(kwargs["model"], kwargs["optimizer"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step a schedule of steps; accumulated batches count as one step."""
        if self._evaluated is False:
            # With several data sets each has its own evaluation, and only one has the metric.
            raise ValueError(
                f"{self._caller}: no evaluation has a metric {self._monitor!r}; they have "
                f"{', '.join(sorted(self._metrics))}. Give one of these as monitor=."
            )
        self._evaluated = None
        if self.schedule is None or self.schedule.unit != "step":
            return
        if catch_up(self.schedule, state.global_step):
            self._show(kwargs["model"], kwargs["optimizer"])

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step a schedule that watches a metric."""
        metrics: dict[str, Any] = kwargs["metrics"]
        if not self._training or not isinstance(self.schedule, AdvanceOnPlateau):
            return
        if self._monitor not in metrics:
            self._evaluated = bool(self._evaluated)
            self._metrics.update(metrics)
            return
        self._evaluated = True
        fix = f"All must evaluate {self._monitor!r} on the same data."
        metric = metrics[self._monitor]
        if end_evaluation(self.schedule, metric, self._caller, fix):
            self._show(kwargs["model"], kwargs["optimizer"])
        if self.schedule.finished:
            control.should_training_stop = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the best weights into the checkpoint, if the schedule keeps them."""
        schedule = self.schedule
        if not (isinstance(schedule, AdvanceOnPlateau) and schedule.restore_best):
            return
        folder = _checkpoint(args, state)
        if args.should_save and folder.is_dir():
            torch.save(schedule.state_dict(), folder / _FILE)
        elif args.should_save:  # a hyper-parameter search saves elsewhere
            _logger.warning("There is no %s, so the best weights are not saved.", folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ignore evaluations from now on: they are the user's own."""
        self._detach()
        self._training = False

    def _watch(self, schedule: FreezeSchedule, args: TrainingArguments) -> None:
        """Find out which metric to watch."""
        monitor = self._given_monitor
        if monitor is None and isinstance(schedule, AdvanceOnPlateau):
            monitor = args.metric_for_best_model
        fix = 'Give monitor="eval_loss", or set metric_for_best_model in the TrainingArguments.'
        check_monitor(schedule, monitor, self._caller, fix)
        # The Trainer adds the prefix to metric_for_best_model in the same way.
        monitor = monitor or ""
        self._monitor = monitor if monitor.startswith("eval_") else f"eval_{monitor}"
        self._training, self._evaluated = True, None
        self._metrics.clear()

    def _resume(
        self, schedule: AdvanceOnPlateau, args: TrainingArguments, state: TrainerState
    ) -> None:
        """Begin a schedule that watches a metric, or continue where the Trainer's log ends."""
        if state.global_step and schedule.restore_best:
            folder = _checkpoint(args, state)
            if not (folder / _FILE).exists():
                raise RuntimeError(
                    f"{self._caller}: the schedule restores the best weights, but there is no "
                    f"{folder / _FILE} to resume from. Set output_dir or resume_from_checkpoint "
                    "in the TrainingArguments to the checkpoint's folder."
                )
            schedule.load_state_dict(torch.load(folder / _FILE, "cpu", weights_only=True))
            return
        schedule.step()
        for entry in state.log_history:
            if self._monitor in entry:
                schedule.step(entry[self._monitor])

    def _show(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self._log and _logger.isEnabledFor(logging.INFO):
            _logger.info("%s", report(model, optimizer))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of this step's checkpoint; for a resumed run, the one it was resumed from."""
    name = f"checkpoint-{state.global_step}"
    given = args.resume_from_checkpoint
    if isinstance(given, str) and Path(given).name == name:
        return Path(given)
    return Path(args.output_dir or ".") / name


def _finds_unused(args: TrainingArguments, model: nn.Module) -> bool:
    """Whether the Trainer makes DDP look for unused parameters; callbacks do not see DDP itself."""
    if args.ddp_find_unused_parameters is not None:
        return bool(args.ddp_find_unused_parameters)
    # By default it does, except for a model of its own library that recomputes activations.
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    return not (isinstance(model, PreTrainedModel) and recomputes)
