"""Freezing under a Lightning Trainer, in place of BackboneFinetuning."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.nn.parallel import DistributedDataParallel

from torch_freeze._select import Selector, flatten
from torch_freeze.freezing import freeze
from torch_freeze.report import report
from torch_freeze.schedule import FreezeSchedule

from ._common import Plan, catch_up, check_ddp, check_owned, check_ranks, make_schedule


class FreezeCallback(pl.Callback):
    """Freeze parts of a LightningModule, for good or by a schedule.

    `configure_optimizers` gives the optimizer all parameters, `self.parameters()`, once; param
    groups never change, so learning-rate schedulers and checkpoints work on. What is frozen is in
    the Trainer's checkpoints: a resumed run goes on in the middle of the schedule. Resumed with
    another schedule, it goes on where that one would be, with a warning.

    Args:
        *what: what is frozen before training begins, in the terms of `torch_freeze.freeze`;
            nothing given: nothing.
        exclude: what to leave as it is, in the same terms.
        schedule: {epoch: what is frozen from there on}, or a function that makes a
            `FreezeSchedule` from the LightningModule, such as
            `lambda m: gradual_unfreeze(m, ["encoder", "head"])`. One of unit "epoch" is stepped
            before every epoch, one of unit "step" before every optimizer step.
        hold_norm: as in `torch_freeze.freeze`, for `what`.
        log: report what is frozen to the console when that changes, and the numbers of trainable
            and frozen parameters to the Trainer's loggers ("freeze/trainable", "freeze/frozen").

    Raises:
        ValueError: neither `what` nor a schedule is given; when training starts, a parameter is
            in no optimizer although a schedule could free it; something named matches nothing.
        TypeError: `schedule` makes no FreezeSchedule.
        RuntimeError: when training starts on several processes, the schedule is not the same on
            all of them; or, under DDP, it does not look for unused parameters (give the Trainer
            strategy="ddp_find_unused_parameters_true"), has a static graph, or wrapped the module
            while something was frozen that the schedule frees.

    Example:
        >>> import lightning.pytorch as pl
        >>> import torch
        >>> from torch import nn
        >>> from torch_freeze import FrozenAwareSGD
        >>> from torch_freeze.integrations.lightning import FreezeCallback
        >>> class Net(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        ...     def training_step(self, batch):
        ...         return self.head(self.body(batch)).square().mean()
        ...     def configure_optimizers(self):
        ...         return FrozenAwareSGD(self.parameters(), lr=0.1, momentum=0.9)
        >>> quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False,
        ...              enable_model_summary=False, accelerator="cpu")
        >>> net, data = Net(), torch.utils.data.DataLoader(torch.ones(4, 4))
        >>> body = net.body.weight.clone()
        >>> freezing = FreezeCallback(schedule={0: "body", 2: []}, log=False)
        >>> pl.Trainer(max_epochs=2, callbacks=freezing, **quiet).fit(net, data)
        >>> torch.equal(net.body.weight, body)
        True
        >>> freezing = FreezeCallback(schedule={0: "body", 2: []}, log=False)
        >>> pl.Trainer(max_epochs=3, callbacks=freezing, **quiet).fit(net, data)
        >>> torch.equal(net.body.weight, body)  # the third epoch trained it
        False
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
            raise ValueError("FreezeCallback: name what to freeze, or give a schedule.")
        self._exclude = exclude
        self._plan = schedule
        self._hold_norm = hold_norm
        self._log = log
        #: The schedule, once fit has begun; None without one.
        self.schedule: FreezeSchedule | None = None
        self._loaded: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Freeze for good, before the strategy wraps the module and reads what trains."""
        if stage == "fit" and self._what:
            freeze(pl_module, *self._what, exclude=self._exclude, hold_norm=self._hold_norm)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin or continue the schedule: the module is as it will be trained by now."""
        if self._plan is not None:
            check_owned(
                pl_module,
                trainer.optimizers,
                "FreezeCallback",
                "In configure_optimizers pass self.parameters(), without a filter.",
            )
            # A fit that goes on with the same Trainer goes on with its schedule.
            begins = trainer.global_step == 0
            if begins or self.schedule is None or self.schedule.model is not pl_module:
                self.schedule = make_schedule(self._plan, pl_module, "FreezeCallback")
            wrapped = trainer.strategy.model
            if isinstance(wrapped, DistributedDataParallel):
                check_ddp(
                    self.schedule,
                    "FreezeCallback",
                    finds_unused=wrapped.find_unused_parameters,
                    static_graph=wrapped.static_graph,
                    to_find_unused='Give the Trainer strategy="ddp_find_unused_parameters_true".',
                    to_be_dynamic="Give DDPStrategy no static_graph=True.",
                )
            loaded, self._loaded = self._loaded, None
            if loaded is not None and (differs := self.schedule._difference(loaded)):
                rank_zero_warn(
                    f"FreezeCallback: the checkpoint's state is of another schedule: {differs}. "
                    "What was frozen then is not restored; this schedule goes on where it would "
                    "be by now."
                )
                loaded = None
            if loaded is not None:
                self.schedule.load_state_dict(loaded)
            elif self.schedule.unit == "step" and pl_module.automatic_optimization:
                # Resumed from a checkpoint without this schedule: the Trainer's count holds.
                catch_up(self.schedule, trainer.global_step - 1)
            check_ranks(self.schedule, "FreezeCallback")
        if self._what or (self.schedule is not None and self.schedule.last >= 0):
            self._tell(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Step a schedule of epochs."""
        if self.schedule is not None and self.schedule.unit == "epoch":
            # Counted from the Trainer's own number: an epoch begun twice is one epoch.
            self._tell(trainer, pl_module, catch_up(self.schedule, trainer.current_epoch))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Step a schedule of steps, at the first batch of those accumulated."""
        begins = batch_idx % trainer.accumulate_grad_batches == 0
        if begins and self.schedule is not None and self.schedule.unit == "step":
            self._tell(trainer, pl_module, self.schedule.step())

    def state_dict(self) -> dict[str, Any]:
        """The schedule's position and what is frozen, for the Trainer's checkpoint."""
        if self.schedule is not None:
            return {"schedule": self.schedule.state_dict()}
        return {} if self._loaded is None else {"schedule": self._loaded}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts, when the module is whole."""
        self._loaded = state_dict.get("schedule")

    def _tell(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, changed: bool = True
    ) -> None:
        if not (self._log and changed):
            return
        found = report(pl_module, trainer.optimizers)
        rank_zero_info(f"\n{found}")
        numbers = {
            "freeze/trainable": float(found.total.trainable),
            "freeze/frozen": float(found.total.frozen),
        }
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)
