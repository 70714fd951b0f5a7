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

from torch_freeze._select import Selector, flatten
from torch_freeze.freezing import freeze
from torch_freeze.plateau import AdvanceOnPlateau
from torch_freeze.report import report
from torch_freeze.schedule import FreezeSchedule

from ._common import (
    Plan,
    catch_up,
    check_ddp,
    check_monitor,
    check_owned,
    check_ranks,
    end_evaluation,
    make_schedule,
)

_logger = logging.getLogger(__name__)

#: Beside the model in a checkpoint, where a schedule keeps the best weights.
_FILE = "freeze_schedule.pt"


class FreezeTrainerCallback(TrainerCallback):
    """Freeze parts of the model a Transformers Trainer trains, for good or by a schedule.

    Give the Trainer the optimizer too, over all parameters:
    `Trainer(..., optimizers=(FrozenAwareSGD(model.parameters(), lr=...), None))`; None leaves the
    learning-rate schedule to the TrainingArguments. The optimizer that a Trainer builds itself
    leaves out what is frozen at that moment, for good.

    A resumed run goes on in the middle of the schedule: its place follows from the Trainer's own
    count of epochs and steps, or from the metrics it has logged, so nothing is added to the
    checkpoint. An `AdvanceOnPlateau` with `restore_best` alone adds a file, `freeze_schedule.pt`,
    with the best weights. What else was frozen by hand has to be frozen by hand again.

    Args:
        *what: what is frozen before training begins, in the terms of `torch_freeze.freeze`;
            nothing given: nothing.
        exclude: what to leave as it is, in the same terms.
        schedule: {epoch: what is frozen from there on}, or a function that makes a
            `FreezeSchedule` from the model, such as
            `lambda model: rotate(model, "encoder.layer.*", k=2, every=50, always="classifier")`.
            One of unit "epoch" is stepped before every epoch, one of unit "step" before every
            optimizer step, and an `AdvanceOnPlateau` after every evaluation.
        monitor: the name of the metric for an `AdvanceOnPlateau`, such as "eval_loss"; left out,
            that of `metric_for_best_model` in the TrainingArguments. When the last phase has
            ended, the Trainer is asked to stop.
        hold_norm: as in `torch_freeze.freeze`, for `what`.
        log: log what is frozen when that changes, to the logger of this module at level INFO.

    Raises:
        ValueError: neither `what` nor a schedule is given; when training starts, a parameter is
            in no optimizer although a schedule could free it; something named matches nothing;
            an `AdvanceOnPlateau` has no metric to watch, another schedule has a `monitor`, or an
            evaluation has no metric of that name.
        TypeError: `schedule` makes no FreezeSchedule.
        RuntimeError: when training starts on several processes, the schedule is not the same on
            all of them; or, under DDP, it does not look for unused parameters (it does by default
            but where activations are recomputed; set ddp_find_unused_parameters=True in the
            TrainingArguments), has a static graph, or wrapped the model while something was
            frozen that the schedule frees. Or the best weights of a resumed run are missing.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from transformers import Trainer, TrainingArguments
        >>> from torch_freeze import FrozenAwareSGD
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
        ...     optimizers=(FrozenAwareSGD(model.parameters(), lr=0.1), None),
        ...     callbacks=[FreezeTrainerCallback("bert.embeddings", "bert.encoder.layer.0")],
        ... )
        >>> _ = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        >>> [torch.equal(part.intermediate.dense.weight, w) for part, w in zip(layer, before)]
        [True, False]
    """

    def __init__(
        self,
        *what: Selector,
        exclude: Selector = (),
        schedule: Plan | None = None,
        monitor: str | None = None,
        hold_norm: bool = True,
        log: bool = True,
    ) -> None:
        self._what = flatten(what)
        if not self._what and schedule is None:
            raise ValueError("FreezeTrainerCallback: name what to freeze, or give a schedule.")
        if monitor is not None and schedule is None:
            raise ValueError(f"FreezeTrainerCallback: {monitor=} is given, but no schedule.")
        self._exclude = exclude
        self._plan = schedule
        self._given_monitor = monitor
        self._monitor = ""
        self._training = False
        self._evaluated: bool | None = None
        self._metrics: set[str] = set()
        self._hold_norm = hold_norm
        self._log = log
        #: The schedule, once training has begun; None without one.
        self.schedule: FreezeSchedule | None = None

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
        # Of a Trainer with model_init this is another model than at its own beginning.
        self._freeze(model)
        if self._plan is not None:
            check_owned(
                model,
                [kwargs["optimizer"]],
                "FreezeTrainerCallback",
                "Give the Trainer optimizers=(FrozenAwareSGD(model.parameters(), lr=...), None).",
            )
            # From the start on: what a schedule froze at any time follows from the count of units.
            self.schedule = make_schedule(self._plan, model, "FreezeTrainerCallback")
            self._watch(self.schedule, args)
            if args.parallel_mode is ParallelMode.DISTRIBUTED and not (args.fsdp or args.deepspeed):
                check_ddp(
                    self.schedule,
                    "FreezeTrainerCallback",
                    finds_unused=_finds_unused(args, model),
                    static_graph=bool(getattr(args, "ddp_static_graph", False)),
                    to_find_unused="Set ddp_find_unused_parameters=True in the TrainingArguments.",
                    to_be_dynamic="Leave ddp_static_graph out of the TrainingArguments.",
                )
            if isinstance(self.schedule, AdvanceOnPlateau):
                self._resume(self.schedule, args, state)
            check_ranks(self.schedule, "FreezeTrainerCallback")
        if self._what or isinstance(self.schedule, AdvanceOnPlateau):
            self._tell(model, kwargs["optimizer"])

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step a schedule of epochs."""
        if self.schedule is not None and self.schedule.unit == "epoch":
            # state.epoch counts batches, in fractions.
            epoch = math.floor((state.epoch or 0.0) + 1e-6)
            if catch_up(self.schedule, epoch):
                self._tell(kwargs["model"], kwargs["optimizer"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step a schedule of steps; batches that are accumulated are one step."""
        if self._evaluated is False:
            # Of several data sets each has its own evaluation, and the metric is of one of them.
            raise ValueError(
                f"FreezeTrainerCallback: no evaluation has a metric {self._monitor!r}; they have "
                f"{', '.join(sorted(self._metrics))}. Give one of these as monitor=."
            )
        self._evaluated = None
        if self.schedule is None or self.schedule.unit != "step":
            return
        if catch_up(self.schedule, state.global_step):
            self._tell(kwargs["model"], kwargs["optimizer"])

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
        if end_evaluation(self.schedule, metric, "FreezeTrainerCallback", fix):
            self._tell(kwargs["model"], kwargs["optimizer"])
        if self.schedule.finished:
            control.should_training_stop = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the best weights into the checkpoint, where a schedule keeps them."""
        schedule = self.schedule
        if not (isinstance(schedule, AdvanceOnPlateau) and schedule.restore_best):
            return
        folder = _checkpoint(args, state)
        if args.should_save and folder.is_dir():
            torch.save(schedule.state_dict(), folder / _FILE)
        elif args.should_save:  # where a hyper-parameter search has put it
            _logger.warning("There is no %s: the best weights are not saved.", folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluations from here on are the user's own."""
        self._training = False

    def _watch(self, schedule: FreezeSchedule, args: TrainingArguments) -> None:
        """Which metric to watch."""
        monitor = self._given_monitor
        if monitor is None and isinstance(schedule, AdvanceOnPlateau):
            monitor = args.metric_for_best_model
        fix = 'Give monitor="eval_loss", or set metric_for_best_model in the TrainingArguments.'
        check_monitor(schedule, monitor, "FreezeTrainerCallback", fix)
        # As the Trainer completes metric_for_best_model.
        monitor = monitor or ""
        self._monitor = monitor if monitor.startswith("eval_") else f"eval_{monitor}"
        self._training, self._evaluated = True, None
        self._metrics.clear()

    def _resume(
        self, schedule: AdvanceOnPlateau, args: TrainingArguments, state: TrainerState
    ) -> None:
        """Begin a schedule that watches a metric, or go on where the Trainer's log ends."""
        if state.global_step and schedule.restore_best:
            folder = _checkpoint(args, state)
            if not (folder / _FILE).exists():
                raise RuntimeError(
                    f"FreezeTrainerCallback: the best weights are to be restored, but there is no "
                    f"{folder / _FILE} to resume from. Set output_dir or resume_from_checkpoint "
                    "in the TrainingArguments to where the checkpoint is."
                )
            schedule.load_state_dict(torch.load(folder / _FILE, "cpu", weights_only=True))
            return
        schedule.step()
        for entry in state.log_history:
            if self._monitor in entry:
                schedule.step(entry[self._monitor])

    def _freeze(self, model: nn.Module) -> None:
        if self._what:
            freeze(model, *self._what, exclude=self._exclude, hold_norm=self._hold_norm)

    def _tell(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self._log and _logger.isEnabledFor(logging.INFO):
            _logger.info("%s", report(model, getattr(optimizer, "optimizer", optimizer)))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the checkpoint of this step; of a run that is resumed, where it comes from."""
    name = f"checkpoint-{state.global_step}"
    given = args.resume_from_checkpoint
    if isinstance(given, str) and Path(given).name == name:
        return Path(given)
    return Path(args.output_dir or ".") / name


def _finds_unused(args: TrainingArguments, model: nn.Module) -> bool:
    """What the Trainer asks of DDP; the wrapped model is not shown to callbacks."""
    if args.ddp_find_unused_parameters is not None:
        return bool(args.ddp_find_unused_parameters)
    # The Trainer asks it of all but a model of its own library that recomputes activations.
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    return not (isinstance(model, PreTrainedModel) and recomputes)
