"""A callback that logs the learning rate and the speed of a student's training."""

import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger


def _every(trainer: pl.Trainer) -> int:
    """Return the number of steps between two logged values of the learning rate and the speed."""
    return max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]


class StudentCurves(pl.Callback):
    """Callback that logs learning rate, tokens per second and, once, a description of the student.

    The learning rate is the highest of all parameter groups. Tokens are counted on all devices,
    without padding. Time spent on validation does not count for the speed.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                text: Any = pl_module.describe  # every module of this package has it
                logger.experiment.add_text("student", text())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if (trainer.global_step + 1) % _every(trainer) == 0:
            rate = max(group["lr"] for group in optimizer.param_groups)
            pl_module.log("train/learning_rate", rate)

    def on_train_start(self, *args: Any) -> None:
        self._restart()  # a fit that is resumed within an epoch does not start one

    def on_train_epoch_start(self, *args: Any) -> None:
        self._restart()

    def on_validation_end(self, *args: Any) -> None:
        self._restart()

    def _restart(self) -> None:
        self._begun, self._num_tokens = time.perf_counter(), 0

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._num_tokens += batch[
            "attention_mask"
        ].sum()  # stays a tensor, so that nothing waits for the device
        if trainer.global_step % _every(trainer) == 0:
            per_second = self._num_tokens * trainer.world_size / (time.perf_counter() - self._begun)
            pl_module.log("train/tokens_per_second", per_second, sync_dist=True)
            self._restart()
