"""Freezing under a Lightning Trainer, in place of BackboneFinetuning."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.nn.parallel import DistributedDataParallel

from torch_freeze._hold import held_by, is_norm
from torch_freeze.plateau import AdvanceOnPlateau
from torch_freeze.report import report

from ._common import (
    FreezeOptions,
    catch_up,
    check_ddp,
    check_monitor,
    check_owned,
    check_ranks,
    end_evaluation,
)


class FreezeCallback(FreezeOptions, pl.Callback):
    """Freeze parts of a LightningModule, for good or by a schedule.

    Let `configure_optimizers` give the optimizer all parameters, `self.parameters()`. Param groups
    then never change, so learning-rate schedulers and checkpoints keep working. The Trainer's
    checkpoints contain what is frozen, and a resumed run continues in the middle of the schedule.
    If it is resumed with another schedule, it warns and continues where that one would be.

    Args:
        *what: what to freeze before training begins, in the terms of `torch_freeze.freeze`. If
            nothing is given, nothing is frozen.
        exclude: what to leave unchanged, in the same terms.
        schedule: {epoch: what is frozen from then on}, or a function that makes a
            `FreezeSchedule` from the LightningModule, such as
            `lambda m: gradual_unfreeze(m, ["encoder", "head"])`. A schedule of unit "epoch" is
            stepped before every epoch, one of unit "step" before every optimizer step, and an
            `AdvanceOnPlateau` after every evaluation.
        monitor: the name under which the metric for an `AdvanceOnPlateau` is logged, such as
            "val_loss". It is read at the end of every training epoch, or after every validation if
            the Trainer validates more or less often than once an epoch. After the last phase the
            Trainer is asked to stop.
        hold_norm: as in `torch_freeze.freeze`, for `what`.
        log: print a report whenever the frozen set changes, and log the numbers of trainable and
            frozen parameters to the Trainer's loggers ("freeze/trainable", "freeze/frozen").
        cache: a `FeatureCache` of the LightningModule or of a module in it. While training runs,
            that module takes `batch.inputs` of a DataLoader over `cache.dataset`, so that
            `training_step` calls `self(batch.inputs)`.

    Raises:
        ValueError: `what`, schedule and cache are all missing; when training starts, a parameter is
            in no optimizer although the schedule may unfreeze it; something named matches nothing;
            an `AdvanceOnPlateau` has no `monitor`, another schedule has one, or nothing is logged
            under that name.
        TypeError: `schedule` does not make a FreezeSchedule.
        RuntimeError: when training starts on several processes, the schedules differ between them,
            or an `AdvanceOnPlateau` later gets different metrics (log them with sync_dist=True).
            Under DDP also if it does not look for unused parameters (give the Trainer
            strategy="ddp_find_unused_parameters_true"), has a static graph, or wrapped the module
            while something was frozen that the schedule unfreezes.

    Example:
        >>> import lightning.pytorch as pl
        >>> import torch
        >>> from torch import nn
        >>> from torch_freeze import FrozenAwareAdamW
        >>> from torch_freeze.integrations.lightning import FreezeCallback
        >>> class Net(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        ...     def training_step(self, batch):
        ...         return self.head(self.body(batch)).square().mean()
        ...     def configure_optimizers(self):
        ...         return FrozenAwareAdamW(self.parameters(), lr=1e-3)
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

    _caller = "FreezeCallback"

    def _init_state(self) -> None:
        self._loaded: dict[str, Any] | None = None
        # The own mode of each held norm, by name; see _settle.
        self._modes: dict[str, bool] = {}
        self._validated = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Freeze for good, before the strategy wraps the module and reads what is trainable."""
        if stage == "fit":
            self._freeze(pl_module)
            self._settle(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin or continue the schedule. By now the module is complete and wrapped."""
        self._attach()
        self._settle(pl_module)
        if self._plan is not None:
            check_owned(
                pl_module,
                trainer.optimizers,
                self._caller,
                "In configure_optimizers pass self.parameters(), without a filter.",
            )
            # Another fit with the same Trainer continues its schedule.
            begins = trainer.global_step == 0
            if begins or self.schedule is None or self.schedule.model is not pl_module:
                self.schedule = self._make_schedule(pl_module, self._plan)
            check_monitor(
                self.schedule, self._given_monitor, self._caller, 'Give monitor="val_loss".'
            )
            wrapped = trainer.strategy.model
            if isinstance(wrapped, DistributedDataParallel):
                check_ddp(
                    self.schedule,
                    self._caller,
                    finds_unused=wrapped.find_unused_parameters,
                    static_graph=wrapped.static_graph,
                    to_find_unused='Give the Trainer strategy="ddp_find_unused_parameters_true".',
                    to_be_dynamic="Make DDPStrategy without static_graph=True.",
                )
            loaded, self._loaded = self._loaded, None
            if loaded is not None and (differs := self.schedule.difference(loaded)):
                rank_zero_warn(
                    f"FreezeCallback: the checkpoint's state is of another schedule: {differs}. "
                    "What was frozen then is not restored; this schedule continues where it would "
                    "be now."
                )
                loaded = None
            if loaded is not None:
                self.schedule.load_state_dict(loaded)
            elif self.schedule.unit == "step" and pl_module.automatic_optimization:
                # Resumed from a checkpoint without this schedule, so the Trainer's count is used.
                catch_up(self.schedule, trainer.global_step - 1)
            if isinstance(self.schedule, AdvanceOnPlateau) and self.schedule.last < 0:
                self.schedule.step()
            check_ranks(self.schedule, self._caller)
            self._settle(pl_module)
        if self._what or (self.schedule is not None and self.schedule.last >= 0):
            self._show(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the cache's model."""
        self._detach()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Let go of the cache's model."""
        self._detach()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Step a schedule of epochs."""
        self._settle_after_validation(pl_module)
        if self.schedule is not None and self.schedule.unit == "epoch":
            # By the Trainer's own number, because an epoch that begins twice counts once.
            changed = catch_up(self.schedule, trainer.current_epoch)
            self._changed(trainer, pl_module, changed)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Step a schedule of steps, at the first of the batches that are accumulated."""
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
        if self._given_monitor not in trainer.callback_metrics:
            logged = ", ".join(map(repr, trainer.callback_metrics)) or "nothing"
            raise ValueError(
                f"{self._caller}: monitor={self._given_monitor!r} is not logged; {logged} is. Log "
                "it in validation_step or training_step (on_epoch=True)."
            )
        changed = end_evaluation(
            self.schedule,
            trainer.callback_metrics[self._given_monitor],
            self._caller,
            f"Log {self._given_monitor!r} with sync_dist=True.",
        )
        self._show(trainer, pl_module, changed)
        if self.schedule.finished:
            trainer.should_stop = True
        return changed

    def state_dict(self) -> dict[str, Any]:
        """The schedule's position and what is frozen, for the Trainer's checkpoint."""
        if self.schedule is not None:
            return {"schedule": self.schedule.state_dict()}
        return {} if self._loaded is None else {"schedule": self._loaded}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts, when the module is complete."""
        self._loaded = state_dict.get("schedule")

    def _settle(self, pl_module: pl.LightningModule) -> None:
        """Undo what Lightning's validation does to held norms, and record their own modes.

        A validation puts the module into eval mode and afterwards writes the former `training` to
        each module directly. A hold takes eval for the norm's own mode then, and a hold that began
        in between is overridden.
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
        self._show(trainer, pl_module, changed)

    def _show(
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
    """Whether metrics are complete at the end of an epoch, by the rule of EarlyStopping."""
    return bool(trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1)
