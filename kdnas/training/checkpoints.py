"""Checkpoints that are never half written, and from which an interrupted fit resumes."""

import io
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from kdnas.system.errors import UserError, first_line
from kdnas.system.files import new_file
from kdnas.system.jobs import Reporter


def check_checkpoint(path: Path) -> dict[str, Any]:
    """Load a Lightning checkpoint without running code from it.

    Returns:
        The content of the checkpoint, with tensors on the CPU.

    Raises:
        UserError: the file is damaged, holds more than tensors and plain values, or is not a
            checkpoint of Lightning.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises anything
        raise UserError(
            f"{str(path)!r} is damaged or holds more than tensors ({first_line(error)}): delete it to start over."
        ) from error
    if (
        not isinstance(found, dict)
        or not {"state_dict", "pytorch-lightning_version"} <= found.keys()
    ):
        raise UserError(f"{str(path)!r} is not a checkpoint of a fit: delete it to start over.")
    return found


class WholeFiles(TorchCheckpointIO):
    """CheckpointIO with atomic writes: readers see the old checkpoint or the whole new one.

    The CheckpointIO of Lightning writes first to a temporary folder. If that is on another file
    system, the file cannot be renamed into place, and so the write is not atomic.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        buffer = io.BytesIO()  # written to a full disk, torch raises an error without a number
        torch.save(checkpoint, buffer)
        with new_file(Path(path)) as file:
            file.write(buffer.getbuffer())


class KeepLast(pl.Callback):
    """Callback that saves a checkpoint after each epoch, every few minutes, and when asked to stop.

    The states of the random generators are saved too. With a ``ResumableLoader``, which continues
    within an epoch, a resumed fit therefore ends with the same weights as an uninterrupted one.

    Args:
        path: path of the checkpoint, in the folder of the job (the function call that makes the
            fit, see ``kdnas.system.jobs``).
        every_seconds: largest time between two checkpoints, in seconds. If the process is killed,
            at most this much training is lost.

    Raises:
        Stopped: raised during the fit, after the checkpoint, if the job was asked to stop.
    """

    FORMAT = 2  # to be raised if modules or loaders save other states

    def __init__(self, path: Path, every_seconds: float = 300) -> None:
        self.path, self.every_seconds = path, every_seconds
        self.reporter = Reporter(path.parent)
        self._random: dict[str, torch.Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        states = {"random": torch.get_rng_state()}
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()  # for dropout on the GPU
        return {**states, "format": self.FORMAT}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random = {name: state_dict[name] for name in ("random", "cuda") if name in state_dict}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._random:
            torch.set_rng_state(self._random["random"])
        if "cuda" in self._random and torch.cuda.is_available():
            torch.cuda.set_rng_state(self._random["cuda"])
        self._saved = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.is_last_batch:  # on_train_epoch_end comes next
            return
        # Save before the first validation, which may take long.
        is_first = batch_idx + 2 == trainer.num_training_batches and not self.path.exists()
        is_due = time.monotonic() - self._saved > self.every_seconds
        is_now = is_first or is_due or self.reporter.is_asked_to_stop
        if trainer.strategy.reduce_boolean_decision(is_now, all=False):  # all ranks save together
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved = time.monotonic()
        self.reporter.stop_if_asked()
