"""Freezing under a Lightning Trainer, in place of BackboneFinetuning."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.nn.parallel import DistributedDataParallel

from torch_freeze._hold import held_by, is_norm
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
            before every epoch, one of unit "step" before every optimizer step, and an
            `AdvanceOnPlateau` after every evaluation.
        monitor: the name under which the metric for an `AdvanceOnPlateau` is logged, such as
            "val_loss". It is read at the end of every training epoch; where the Trainer validates
            more or less often than once an epoch, after every validation. When the last phase has
            ended, the Trainer is asked to stop.
        hold_norm: as in `torch_freeze.freeze`, for `what`.
        log: report what is frozen to the console when that changes, and the numbers of trainable
            and frozen parameters to the Trainer's loggers ("freeze/trainable", "freeze/frozen").

    Raises:
        ValueError: neither `what` nor a schedule is given; when training starts, a parameter is
            in no optimizer although a schedule could free it; something named matches nothing;
            an `AdvanceOnPlateau` has no `monitor`, another schedule has one, or nothing is logged
            under that name.
        TypeError: `schedule` makes no FreezeSchedule.
        RuntimeError: when training starts on several processes, the schedule is not the same on
            all of them, or an `AdvanceOnPlateau` later gets different metrics (log them with
            sync_dist=True); or, under DDP, it does not look for unused parameters (give the
            Trainer strategy="ddp_find_unused_parameters_true"), has a static graph, or wrapped
            the module while something was frozen that the schedule frees.

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
        monitor: str | None = None,
        hold_norm: bool = True,
        log: bool = True,
    ) -> None:
        self._what = flatten(what)
        if not self._what and schedule is None:
            raise ValueError("FreezeCallback: name what to freeze, or give a schedule.")
        if monitor is not None and schedule is None:
            raise ValueError(f"FreezeCallback: {monitor=} is given, but no schedule.")
        self._exclude = exclude
        self._plan = schedule
        self._monitor = monitor
        self._hold_norm = hold_norm
        self._log = log
        #: The schedule, once fit has begun; None without one.
        self.schedule: FreezeSchedule | None = None
        self._loaded: dict[str, Any] | None = None
        # The own modes of held norms, by name; see _settle.
        self._modes: dict[str, bool] = {}
        self._validated = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Freeze for good, before the strategy wraps the module and reads what trains."""
        if stage == "fit" and self._what:
            freeze(pl_module, *self._what, exclude=self._exclude, hold_norm=self._hold_norm)
        if stage == "fit":
            self._settle(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin or continue the schedule: the module is as it will be trained by now."""
        self._settle(pl_module)
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
            check_monitor(
                self.schedule, self._monitor, "FreezeCallback", 'Give monitor="val_loss".'
            )
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
            if isinstance(self.schedule, AdvanceOnPlateau) and self.schedule.last < 0:
                self.schedule.step()
            check_ranks(self.schedule, "FreezeCallback")
            self._settle(pl_module)
        if self._what or (self.schedule is not None and self.schedule.last >= 0):
            self._tell(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Step a schedule of epochs."""
        self._settle_after_validation(pl_module)
        if self.schedule is not None and self.schedule.unit == "epoch":
            # Counted from the Trainer's own number: an epoch begun twice is one epoch.
            changed = catch_up(self.schedule, trainer.current_epoch)
            self._changed(trainer, pl_module, changed)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Step a schedule of steps, at the first batch of those accumulated."""
        self._settle_after_validation(pl_module)
        begins = batch_idx % trainer.accumulate_grad_batches == 0
        if begins and self.schedule is not None and self.schedule.unit == "step":
            self._changed(trainer, pl_module, self.schedule.step())

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Step a schedule that watches a metric, at the end of an epoch."""
        self._settle_after_validation(pl_module)
        if _once_an_epoch(trainer) and self._evaluated(trainer, pl_module):
            self._settle(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Step a schedule that watches a metric, after each validation."""
        self._validated = True
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting and not trainer.sanity_checking and not _once_an_epoch(trainer):
            self._evaluated(trainer, pl_module)

    def _evaluated(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        if not isinstance(self.schedule, AdvanceOnPlateau):
            return False
        if self._monitor not in trainer.callback_metrics:
            logged = ", ".join(map(repr, trainer.callback_metrics)) or "nothing"
            raise ValueError(
                f"FreezeCallback: monitor={self._monitor!r} is not logged; {logged} is. Log it "
                "in validation_step or training_step (on_epoch=True)."
            )
        changed = end_evaluation(
            self.schedule,
            trainer.callback_metrics[self._monitor],
            "FreezeCallback",
            f"Log {self._monitor!r} with sync_dist=True.",
        )
        self._tell(trainer, pl_module, changed)
        if self.schedule.finished:
            trainer.should_stop = True
        return changed

    def state_dict(self) -> dict[str, Any]:
        """The schedule's position and what is frozen, for the Trainer's checkpoint."""
        if self.schedule is not None:
            return {"schedule": self.schedule.state_dict()}
        return {} if self._loaded is None else {"schedule": self._loaded}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts, when the module is whole."""
        self._loaded = state_dict.get("schedule")

    def _settle(self, pl_module: pl.LightningModule) -> None:
        """Undo what a validation of Lightning does to held norms, and note their own modes.

        It puts the module into eval mode and then writes each module's mode back as it was: past
        a hold, which takes eval for the norm's own mode, or is undone when it has begun meanwhile.
        """
        for name, module in pl_module.named_modules():
            if not is_norm(module):
                continue
            held = held_by(module)
            if held is not None:
                held.mode = self._modes.setdefault(name, held.mode or module.training)
                module.training = False
            elif name in self._modes:
                module.training = self._modes.pop(name)
        self._validated = False

    def _settle_after_validation(self, pl_module: pl.LightningModule) -> None:
        if self._validated:
            self._settle(pl_module)

    def _changed(self, trainer: pl.Trainer, pl_module: pl.LightningModule, changed: bool) -> None:
        if changed:
            self._settle(pl_module)
        self._tell(trainer, pl_module, changed)

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


def _once_an_epoch(trainer: pl.Trainer) -> bool:
    """Whether an epoch's end is where its metrics are, as EarlyStopping decides it."""
    return bool(trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1)
