"""What a fit shows while it runs: bars on a terminal, lines in a file, and how to go on when it is stopped."""

import logging
import math
import os
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, ProgressColumn, TaskID

log = logging.getLogger(__name__)

# So long at least is between two lines: after an epoch, and within one.
SHORTEST, LONGEST = 60.0, 600.0


def live_progress(console: Console, *columns: ProgressColumn, **options: Any) -> Progress:
    """Bars that vanish; in a notebook without stdout and stderr, for there a line without an end would flush itself."""
    options |= dict.fromkeys(("redirect_stdout", "redirect_stderr"), not console.is_jupyter)
    return Progress(*columns, console=console, transient=True, **options)


class EpochLines(pl.Callback):
    """A line after each epoch, or every ten minutes of a long one, with the time that is left; none of short epochs.

    Args:
        description: what is being fitted.
        write: takes a line; None: nothing is said.
    """

    def __init__(self, description: str, write: Callable[[str], object] | None) -> None:
        self.description, self.write = description, write

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = self._said = time.monotonic()
        self._first = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._say(trainer, LONGEST, "")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        in_a_fit = trainer.state.fn == "fit" and not trainer.sanity_checking
        if in_a_fit and (loss := trainer.callback_metrics.get("val_loss")) is not None:
            self._say(trainer, SHORTEST, f", held-out loss {float(loss):.4f}")

    def _say(self, trainer: pl.Trainer, seconds: float, more: str) -> None:
        now, done = time.monotonic(), trainer.global_step
        if self.write is None or not trainer.is_global_zero or now - self._said < seconds:
            return
        self._said = now
        steps = float(trainer.estimated_stepping_batches)
        if math.isfinite(steps) and done > self._first:
            more += (
                f", {(now - self._began) / (done - self._first) * (steps - done) / 60:.0f} min left"
            )
        epoch = f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"
        self.write(f"{self.description}: {epoch}, step {done:,}{more}")


class FitProgress(EpochLines):
    """Shows the steps of a fit, and below them those of its epoch, with the time that is left, in a display of bars.

    Where no bar can move, lines.

    Args:
        progress: the live display, which others share.
        description: what is being fitted.
    """

    def __init__(self, progress: Progress, description: str) -> None:
        moves = progress.console.is_terminal or progress.console.is_jupyter
        super().__init__(escape(description), None if moves else progress.console.print)
        self.progress = progress
        self.tasks: list[TaskID] = []  # the fit's, the epoch's

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        num_steps = int(trainer.estimated_stepping_batches)
        done = trainer.global_step
        self.tasks = [self.progress.add_task(self.description, total=num_steps, completed=done)]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for task in self.tasks[1:]:
            self.progress.remove_task(task)
        name = f"  epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"
        self.tasks[1:] = [self.progress.add_task(name, total=trainer.num_training_batches)]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if len(self.tasks) == 1:  # Lightning begins no epoch that it goes on within
            self.on_train_epoch_start(trainer, pl_module)
        for task, done in zip(self.tasks, (trainer.global_step, batch_idx + 1), strict=True):
            self.progress.update(task, completed=done)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for task in self.tasks:
            self.progress.remove_task(task)
        self.tasks = []

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.teardown(trainer, pl_module, "fit")


class SayWhatGoesOn(pl.Callback):
    """Names the newest checkpoint of a fit that was stopped, and the option that goes on from it."""

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        found = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        kept = {
            path
            for callback in found
            for path in (callback.best_model_path, callback.last_model_path)
            if path
        }
        if kept and trainer.is_global_zero:
            log.warning(
                "The same command goes on with --ckpt_path %s", max(kept, key=os.path.getmtime)
            )
