"""Freezing under a Transformers Trainer."""

from __future__ import annotations

import logging
import math
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
from torch_freeze.report import report
from torch_freeze.schedule import FreezeSchedule

from ._common import Plan, catch_up, check_ddp, check_owned, check_ranks, make_schedule

_logger = logging.getLogger(__name__)


class FreezeTrainerCallback(TrainerCallback):
    """Freeze parts of the model a Transformers Trainer trains, for good or by a schedule.

    Give the Trainer the optimizer too, over all parameters:
    `Trainer(..., optimizers=(FrozenAwareSGD(model.parameters(), lr=...), None))`; None leaves the
    learning-rate schedule to the TrainingArguments. The optimizer that a Trainer builds itself
    leaves out what is frozen at that moment, for good.

    A resumed run goes on in the middle of the schedule: its place follows from the Trainer's own
    count of epochs and steps, so nothing is added to the checkpoint. What else was frozen by hand
    has to be frozen by hand again.

    Args:
        *what: what is frozen before training begins, in the terms of `torch_freeze.freeze`;
            nothing given: nothing.
        exclude: what to leave as it is, in the same terms.
        schedule: {epoch: what is frozen from there on}, or a function that makes a
            `FreezeSchedule` from the model, such as
            `lambda model: rotate(model, "encoder.layer.*", k=2, every=50, always="classifier")`.
            One of unit "epoch" is stepped before every epoch, one of unit "step" before every
            optimizer step.
        hold_norm: as in `torch_freeze.freeze`, for `what`.
        log: log what is frozen when that changes, to the logger of this module at level INFO.

    Raises:
        ValueError: neither `what` nor a schedule is given; when training starts, a parameter is
            in no optimizer although a schedule could free it; something named matches nothing.
        TypeError: `schedule` makes no FreezeSchedule.
        RuntimeError: when training starts on several processes, the schedule is not the same on
            all of them; or, under DDP, it does not look for unused parameters (it does by default
            but where activations are recomputed; set ddp_find_unused_parameters=True in the
            TrainingArguments), has a static graph, or wrapped the model while something was
            frozen that the schedule frees.

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
        hold_norm: bool = True,
        log: bool = True,
    ) -> None:
        self._what = flatten(what)
        if not self._what and schedule is None:
            raise ValueError("FreezeTrainerCallback: name what to freeze, or give a schedule.")
        self._exclude = exclude
        self._plan = schedule
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
            if args.parallel_mode is ParallelMode.DISTRIBUTED and not (args.fsdp or args.deepspeed):
                check_ddp(
                    self.schedule,
                    "FreezeTrainerCallback",
                    finds_unused=_finds_unused(args, model),
                    static_graph=bool(getattr(args, "ddp_static_graph", False)),
                    to_find_unused="Set ddp_find_unused_parameters=True in the TrainingArguments.",
                    to_be_dynamic="Leave ddp_static_graph out of the TrainingArguments.",
                )
            check_ranks(self.schedule, "FreezeTrainerCallback")
        if self._what:
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
        if self.schedule is None or self.schedule.unit != "step":
            return
        if catch_up(self.schedule, state.global_step):
            self._tell(kwargs["model"], kwargs["optimizer"])

    def _freeze(self, model: nn.Module) -> None:
        if self._what:
            freeze(model, *self._what, exclude=self._exclude, hold_norm=self._hold_norm)

    def _tell(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self._log and _logger.isEnabledFor(logging.INFO):
            _logger.info("%s", report(model, getattr(optimizer, "optimizer", optimizer)))


def _finds_unused(args: TrainingArguments, model: nn.Module) -> bool:
    """What the Trainer asks of DDP; the wrapped model is not shown to callbacks."""
    if args.ddp_find_unused_parameters is not None:
        return bool(args.ddp_find_unused_parameters)
    # The Trainer asks it of all but a model of its own library that recomputes activations.
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    return not (isinstance(model, PreTrainedModel) and recomputes)
