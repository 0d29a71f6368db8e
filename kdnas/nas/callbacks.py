"""Callbacks of a candidate's fit, which end the fit, measure latency or compute the reward."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import optuna
import torch
from filelock import ReadWriteLock
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from kdnas.deploy.latency import ArchLatency, LatencyMeter
from kdnas.distillation.module import HiddenStateDistillModule
from kdnas.nas.reward import reward
from kdnas.system.errors import CandidateFailed
from kdnas.system.jobs import Reporter

# Number of steps after which their training losses are read: each read waits for the device.
LOOK_STEPS = 10


class TrainingLoss(pl.Callback):
    """Callback that records the training losses of the current epoch.

    Every ``LOOK_STEPS`` steps it checks them, and ends the fit if one is NaN or infinite.

    Raises:
        CandidateFailed: raised during the fit if a loss is NaN or infinite.
    """

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._not_seen: list[Tensor] = []

    @property
    def mean(self) -> float:
        """Mean training loss over the batches of the last epoch."""
        return math.fsum(self._losses) / len(self._losses)

    def on_train_epoch_start(self, *args: Any) -> None:
        self._losses.clear()
        self._not_seen.clear()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._not_seen.append(outputs["loss"])
        if len(self._not_seen) == LOOK_STEPS or trainer.is_last_batch:
            self._look(trainer.global_step)

    def _look(self, last_step: int) -> None:
        losses = torch.stack(self._not_seen).tolist()
        self._not_seen.clear()
        for step, loss in enumerate(losses, last_step - len(losses) + 1):
            if not math.isfinite(loss):
                raise CandidateFailed(
                    f"the training loss is {loss} at step {step} (lower learning rates may help)"
                )
        self._losses += losses


class PruneByHeldOutLoss(pl.Callback):
    """Callback that reports ``1 - held-out loss`` to the pruner after each epoch but the last.

    If the pruner decides so, the callback ends the fit. After the last epoch the pruner is not
    asked, because the candidate is then scored by its reward, not by its loss alone.

    Args:
        reporter: passes the reports to the search process, which asks the pruner; None: no pruner.

    Raises:
        TrialPruned: raised during the fit if the pruner ends it.
    """

    def __init__(self, reporter: Reporter | None) -> None:
        self.reporter = reporter
        self.reports: dict[str, float] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or self.reporter is None:
            return
        epoch, loss = trainer.current_epoch, float(trainer.callback_metrics["val_loss"])
        self.reports[str(epoch)] = 1 - loss
        if epoch + 1 == trainer.max_epochs or not math.isfinite(loss):
            return
        self.reporter.tell(at_once=True, reports=self.reports)
        if not self.reporter.may_go_on(epoch):
            raise optuna.TrialPruned(
                f"held-out loss {loss:.4f} after epoch {epoch + 1} of {trainer.max_epochs}"
            )


class HoldStill(pl.Callback):
    """Callback that holds a lock during training, and releases it briefly after each batch.

    Another process can then take the lock, to measure latency while nothing trains. Before the
    first batch, while the student is initialised, the lock is released after the forward pass of
    each module.

    Use the object as a context manager around the fit, and also give it to the Trainer as a
    callback.

    Args:
        lock: held for reading while a candidate trains, for writing while latency is measured.
    """

    def __init__(self, lock: ReadWriteLock) -> None:
        self.lock = lock

    def __enter__(self) -> "HoldStill":
        self.lock.acquire_read()
        self._in_start = register_module_forward_hook(self._give_way)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._in_start.remove()
        self.lock.release(force=True)

    def on_fit_start(self, *args: Any) -> None:
        self._in_start.remove()

    def _give_way(self, *args: Any) -> None:
        self.lock.release()
        self.lock.acquire_read()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Context manager that holds the lock for writing: nothing trains on this machine."""
        self.lock.release()
        with self.lock.write_lock():
            yield
        self.lock.acquire_read()

    def on_train_batch_end(self, *args: Any) -> None:
        self._give_way()

    def on_validation_batch_end(self, *args: Any) -> None:
        self._give_way()


class LatencyAfterFit(pl.Callback):
    """Callback that measures the latency of student and teacher after the fit.

    The result is the attribute ``latency``. A measurement from before the fit (to check the budget)
    is reused.

    Args:
        meter: measures latency; its settings name the device.
        still: callback whose lock stops training of other candidates while latency is measured.
    """

    def __init__(self, meter: LatencyMeter, still: HoldStill) -> None:
        self.meter, self.still = meter, still
        self.latency: ArchLatency | None = None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, HiddenStateDistillModule)
        with self.still.alone():
            self.latency = self.meter.measure(pl_module.arch)


class RewardAfterFit(pl.Callback):
    """Callback that computes the reward from loss and latency, for TensorBoard's HPARAMS tab.

    The tab also shows loss and latency, and the shape of the student.

    Args:
        loss: the loss in the reward, after the last epoch: ``held_out`` (on held-out rows) or
            ``train`` (mean training loss).
        training: callback that records the training loss.
        latency: callback that measures latency; it must come before this one in the Trainer's
            list.
        alpha: exponent of the latency factor in ``reward``.
        beta: latency, as a share of the teacher's, at which the latency factor is 1.
    """

    def __init__(
        self,
        loss: Literal["held_out", "train"],
        training: TrainingLoss,
        latency: LatencyAfterFit,
        alpha: float,
        beta: float,
    ) -> None:
        self.loss, self.training, self.latency = loss, training, latency
        self.alpha, self.beta = alpha, beta
        self.reward = math.nan

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, HiddenStateDistillModule)
        measured = self.latency.latency
        assert measured is not None
        student, teacher = measured.student.median_ms, measured.teacher.median_ms
        last = pl_module.history[-1]
        loss = last["loss"] if self.loss == "held_out" else self.training.mean
        self.reward = reward(loss, student, teacher, self.alpha, self.beta)
        if isinstance(trainer.logger, TensorBoardLogger):
            metrics = {
                "hp/reward": self.reward,
                "hp/loss": last["loss"],
                "hp/contextual_share": last["contextual_share"],
                "hp/latency_ms": student,
                "hp/speedup": measured.speedup,
            }
            trainer.logger.log_hyperparams(pl_module.arch.to_dict(), metrics)
            trainer.logger.save()
