"""What happens around a candidate's fit: refuse, prune, hold still, measure, reward."""

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

LOOK_STEPS = 10


class TrainingLoss(pl.Callback):
    """The mean training loss of the last epoch; one that is NaN or infinite ends the fit.

    No later step can mend that. A device is asked for the losses of ``LOOK_STEPS`` steps together.
    """

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._not_seen: list[Tensor] = []

    @property
    def mean(self) -> float:
        """Over the batches of the last epoch."""
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
                raise CandidateFailed(f"the training loss is {loss} at step {step}")
        self._losses += losses


class PruneByHeldOutLoss(pl.Callback):
    """Reports ``1 - loss`` on held-out rows after each epoch, and ends the fit if it is pruned.

    The last epoch is not asked about: what is paid for is kept, for the pruner sees the loss alone,
    and the reward decides.

    Args:
        reporter: asks the search, whose pruner answers; None: there is no pruner.
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
    """Holds the lock of those who train, and lets go of it for a moment after each batch.

    So whoever wants to measure latency on this machine gets it. Before the first batch, while the
    student is started, which takes seconds, it lets go after each module of the teacher's.

    Args:
        lock: held for reading by all who train, for writing by whoever measures.
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
        """While this one measures, the others hold still."""
        self.lock.release()
        with self.lock.write_lock():
            yield
        self.lock.acquire_read()

    def on_train_batch_end(self, *args: Any) -> None:
        self._give_way()

    def on_validation_batch_end(self, *args: Any) -> None:
        self._give_way()


class LatencyAfterFit(pl.Callback):
    """Measures the student beside its teacher after the fit.

    The meter remembers what it measured before the fit, for a budget.

    Args:
        meter: measures, on its own device.
        still: the callback by which others hold still meanwhile.
    """

    def __init__(self, meter: LatencyMeter, still: HoldStill) -> None:
        self.meter, self.still = meter, still
        self.latency: ArchLatency | None = None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, HiddenStateDistillModule)
        with self.still.alone():
            self.latency = self.meter.measure(pl_module.arch)


class RewardAfterFit(pl.Callback):
    """Computes the reward from loss and latency, and logs them to TensorBoard's HPARAMS.

    Args:
        loss: ``held_out``, of the last epoch; or ``train``, its mean training loss.
        training: the callback that has the latter.
        latency: the callback before this one.
        alpha: of the reward.
        beta: of the reward.
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
