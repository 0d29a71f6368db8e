"""What happens around a candidate's fit: refuse, prune, measure, reward, show."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
import optuna
from filelock import ReadWriteLock, Timeout
from lightning.pytorch.loggers import TensorBoardLogger

from kdnas.deploy.latency import ArchLatency, LatencyMeter
from kdnas.distillation.module import HiddenStateDistillModule
from kdnas.nas.reward import reward
from kdnas.system.errors import CandidateFailed


class FailOnNonFiniteLoss(pl.Callback):
    """Ends a fit whose loss is NaN or infinite: no later step can mend it."""

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        loss = float(outputs["loss"])
        if not math.isfinite(loss):
            raise CandidateFailed(f"the training loss is {loss} at step {trainer.global_step}")


class PruneByHeldOutLoss(pl.Callback):
    """Reports ``1 - loss`` on held-out rows after each epoch, and ends the fit where the study's pruner says so.

    Not after the last epoch: what is paid for is kept, for the pruner sees the loss alone, and the reward decides.

    Args:
        trial: the candidate's trial.
    """

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        epoch, loss = trainer.current_epoch, float(trainer.callback_metrics["val_loss"])
        self.trial.report(1 - loss, step=epoch)
        if epoch + 1 != trainer.max_epochs and self.trial.should_prune():
            reason = f"held-out loss {loss:.4f} after epoch {epoch + 1} of {trainer.max_epochs}"
            self.trial.set_user_attr("stopped_early", reason)
            raise optuna.TrialPruned(reason)


def wait_for(
    acquire: Callable[..., AbstractContextManager[object]], trial: optuna.Trial
) -> AbstractContextManager[object]:
    """Acquire a lock that all workers share. The trial says where it waits: another one's time is not its own."""
    try:
        return acquire(blocking=False)
    except Timeout:
        trial.set_user_attr("waits", True)
    held = acquire()
    try:
        trial.set_user_attr("waits", False)
    except BaseException:
        with held:  # nobody else would let go of it
            raise
    return held


class HoldStill(pl.Callback):
    """Between steps, waits while another worker of this machine measures latency.

    Args:
        lock: held for reading by whoever works, for writing by whoever measures.
        trial: the candidate's trial.
    """

    def __init__(self, lock: ReadWriteLock, trial: optuna.Trial) -> None:
        self.lock, self.trial = lock, trial

    def on_train_batch_end(self, *args: Any) -> None:
        self.give_way()

    def on_validation_batch_end(self, *args: Any) -> None:
        self.give_way()

    def give_way(self) -> None:
        """Let go of the lock for a moment: whoever waits to measure gets it."""
        self.lock.release()
        wait_for(self.lock.acquire_read, self.trial)


class LatencyAfterFit(pl.Callback):
    """Measures the student beside its teacher when the fit is over; the meter remembers what the budget gate measured.

    Args:
        meter: measures, on its own device (Lightning has moved the module to the CPU by then).
    """

    def __init__(self, meter: LatencyMeter) -> None:
        self.meter = meter
        self.latency: ArchLatency | None = None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, HiddenStateDistillModule)
        self.latency = self.meter.measure(pl_module.arch)


class RewardAfterFit(pl.Callback):
    """Computes the reward from held-out loss and latency, and logs both with the arch to TensorBoard's HPARAMS.

    Args:
        latency: the callback before this one.
        alpha: of the reward.
        beta: of the reward.
    """

    def __init__(self, latency: LatencyAfterFit, alpha: float, beta: float) -> None:
        self.latency, self.alpha, self.beta = latency, alpha, beta
        self.reward = math.nan

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, HiddenStateDistillModule) and self.latency.latency is not None
        measured = self.latency.latency
        last = pl_module.history[-1]
        self.reward = reward(
            last["loss"],
            measured.student.median_ms,
            measured.teacher.median_ms,
            self.alpha,
            self.beta,
        )
        if isinstance(trainer.logger, TensorBoardLogger):
            metrics = {
                "hp/reward": self.reward,
                "hp/loss": last["loss"],
                "hp/contextual_share": last["contextual_share"],
                "hp/latency_ms": measured.student.median_ms,
                "hp/speedup": measured.speedup,
            }
            trainer.logger.log_hyperparams(pl_module.arch.to_dict(), metrics)
            trainer.logger.save()
