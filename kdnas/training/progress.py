"""The progress of a fit: bars on a terminal, lines in a file, and how to resume after a stop."""

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, ProgressColumn, TaskID

from kdnas.system.jobs import Job, Reporter, progress_of

log = logging.getLogger(__name__)

# Seconds between two lines of progress, where there is no bar.
LINE_SECONDS = 60.0


def live_progress(console: Console, *columns: ProgressColumn, **options: Any) -> Progress:
    """Return a rich display of progress bars, which vanish at the end.

    Output to stdout and stderr appears above the bars, except in a notebook, where redirecting it
    can make rich call itself endlessly.

    Args:
        console: console on which to show the bars.
        *columns: columns of the display.
        **options: further arguments of ``rich.progress.Progress``.
    """
    options |= dict.fromkeys(("redirect_stdout", "redirect_stderr"), not console.is_jupyter)
    return Progress(*columns, console=console, transient=True, **options)


class EpochLines(pl.Callback):
    """Callback that writes a line about the progress of a fit each minute.

    A line has the estimated time left, and after a long epoch the held-out loss. An epoch is long
    if at least a minute has passed since the last validation, or since the start of the fit.

    Args:
        description: what is being fitted, as the beginning of each line.
        write: called with each line; None: write nothing.
    """

    def __init__(self, description: str, write: Callable[[str], object] | None) -> None:
        self.description, self.write = description, write

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = self._said = self._validated = time.monotonic()
        self._first = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._say(trainer, self._said, "")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        known = trainer.callback_metrics
        if trainer.state.fn == "fit" and not trainer.sanity_checking and "val_loss" in known:
            loss, share = (float(known[name]) for name in ("val_loss", "contextual_share"))
            said = f", held-out loss {loss:.4f}, contextual share {share:.3f}"
            self._say(trainer, self._validated, said)
            self._validated = time.monotonic()

    def _say(self, trainer: pl.Trainer, last: float, more: str) -> None:
        now, done = time.monotonic(), trainer.global_step
        if self.write is None or not trainer.is_global_zero or now - last < LINE_SECONDS:
            return
        self._said = now
        steps = float(trainer.estimated_stepping_batches)
        if math.isfinite(steps) and done > self._first:
            more += (
                f", {(now - self._began) / (done - self._first) * (steps - done) / 60:.0f} min left"
            )
        epoch = f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"
        self.write(f"{self.description}: {epoch}, step {done:,}{more}")


class ProgressFile(pl.Callback):
    """Callback that reports a fit's progress to the main process, which displays it.

    Args:
        reporter: reporter of the job that makes the fit.
    """

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        num_steps, first = int(trainer.estimated_stepping_batches), trainer.global_step
        self.reporter.tell(num_steps=num_steps, first_step=first, num_epochs=trainer.max_epochs)

    @rank_zero_only
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.reporter.tell(step=trainer.global_step, epoch=trainer.current_epoch)
        if trainer.world_size == 1:
            self.reporter.take_threads()

    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (loss := trainer.callback_metrics.get("val_loss")) is not None:
            self.reporter.tell(val_loss=float(loss))


class StopWhenAsked(pl.Callback):
    """Callback that ends a fit, without a checkpoint, once its job is asked to stop.

    Args:
        reporter: reporter of the job that makes the fit.

    Raises:
        Stopped: raised during the fit if the job was asked to stop.
    """

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter

    def on_train_batch_end(self, *args: Any) -> None:
        self.reporter.stop_if_asked()

    def on_validation_batch_end(self, *args: Any) -> None:
        self.reporter.stop_if_asked()


class JobBars:
    """Shows the progress of running jobs: a bar per job, or a line per job every minute.

    Bars need a terminal or a notebook. Call the object often, with the jobs that run at that
    moment.

    Args:
        progress: live display from ``live_progress``, which may have other bars, too.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._bars: dict[Path, TaskID] = {}
        self._said: dict[Path, float] = {}
        console = progress.console
        self._moves = console.is_terminal or console.is_jupyter

    def __call__(self, jobs: Sequence[Job]) -> None:
        folders = [job.folder for job in jobs]
        for folder in [folder for folder in self._bars if folder not in folders]:
            self.progress.remove_task(self._bars.pop(folder))
        for job in jobs:
            known = progress_of(job.folder)
            if self._moves:
                self._move(job, known)
            elif (
                time.monotonic()
                > self._said.setdefault(job.folder, time.monotonic()) + LINE_SECONDS
            ):
                self._said[job.folder] = time.monotonic()
                self._say(job, known)

    def _move(self, job: Job, known: dict[str, Any]) -> None:
        if job.folder not in self._bars:
            self._bars[job.folder] = self.progress.add_task(escape(job.title), total=None)
        done, total = known.get("step", 0), known.get("num_steps")
        self.progress.update(self._bars[job.folder], completed=done, total=total)

    def _say(self, job: Job, known: dict[str, Any]) -> None:
        if "step" in known:
            loss = f", held-out loss {known['val_loss']:.4f}" if "val_loss" in known else ""
            self.progress.console.print(
                f"{job.title}: epoch {known['epoch'] + 1} of {known['num_epochs']}, "
                f"step {known['step']:,} of {known['num_steps']:,}{loss}",
                highlight=False,
                soft_wrap=True,
            )


class SayWhatGoesOn(pl.Callback):
    """Callback that logs how to resume a failed fit: by ``--ckpt_path`` and the newest checkpoint.

    Only the checkpoints that the Trainer's ``ModelCheckpoint`` callbacks have written count.
    """

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
        if kept and trainer.is_global_zero and trainer.state.fn == "fit":
            log.warning(
                "To resume, repeat the command with --ckpt_path %s", max(kept, key=os.path.getmtime)
            )


class WarnOfNoValidation(pl.Callback):
    """Callback that warns at the start of a fit if the fit will end before its first validation."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        num_batches = trainer.max_steps * trainer.accumulate_grad_batches
        if 0 < num_batches < (trainer.val_check_batch or 0) and trainer.is_global_zero:
            log.warning(
                "max_steps is %d, and the first validation comes after %s batches: nothing will be "
                "validated. Give more steps, or a smaller --trainer.val_check_interval.",
                trainer.max_steps,
                trainer.val_check_batch,
            )
