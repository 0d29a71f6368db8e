"""How a Trainer is made and run here: one device, TensorBoard, a shared progress bar, an honest Ctrl-C."""

import ctypes
import gc
import io
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import TorchCheckpointIO

from kdnas.system.errors import UserError, first_line
from kdnas.system.files import new_file, placed
from kdnas.system.signals import TERMINATIONS, honest_signals, notice_signals, stop_of
from kdnas.training.precision import trainer_precision

# Of the ten seconds that a signal gives.
LONGEST_WAIT = 5.0
# TensorBoard's own are 120, and so long a writer may not hear of its end, where a signal came while it was told more.
FLUSH_SECONDS = 2
REMEDY = "run more workers on one study, or use DDP in `kdnas fit`."


@dataclass(frozen=True)
class TrainerSettings:
    """The Trainer of a candidate, of full KD and of fine-tuning; one device each.

    Args:
        accelerator: Lightning's: ``auto``, ``cpu``, ``gpu``, ...
        devices: number of devices; only 1.
        strategy: Lightning's; only ``auto``.
        precision: Lightning's; ``auto``: bf16-mixed where the device multiplies faster in bfloat16, else 32-true.
        gradient_clip_val: largest norm of the gradient; 0: any.

    Raises:
        UserError: several devices: every rank of DDP would be a search of its own; or a negative norm.
    """

    accelerator: str = "auto"
    devices: int = 1
    strategy: str = "auto"
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    gradient_clip_val: float = 1.0

    def __post_init__(self) -> None:
        if self.devices != 1:
            raise UserError(
                f"devices is {self.devices}: a candidate trains on one device; {REMEDY}"
            )
        if self.strategy != "auto":
            raise UserError(
                f"strategy is {self.strategy!r}: a candidate trains in one process; {REMEDY}"
            )
        if not self.gradient_clip_val >= 0:
            raise UserError(
                f"gradient_clip_val is {self.gradient_clip_val}: give at least 0 (0: no clipping)."
            )

    def check(self) -> None:
        """Refuse what this machine, or the way the process was started, cannot do.

        Raises:
            UserError: there is no such accelerator, or a launcher made this process one of several.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: a search is one process; {REMEDY}"
            )
        try:
            pl.Trainer(
                accelerator=self.accelerator, devices=1, logger=False, enable_checkpointing=False
            )
        except Exception as error:  # Lightning's own error, or the device's
            raise UserError(f"accelerator is {self.accelerator!r}: {first_line(error)}.") from error


def refuse_strategy(name: str) -> None:
    """Refuse what cuts the student into pieces: its optimizer and its gradients' norm need whole matrices.

    Args:
        name: of one of Lightning's strategies, or of its class.

    Raises:
        UserError: it is not one that trains a whole student on each device.
    """
    if name not in (
        "auto",
        "single_device",
        "SingleDeviceStrategy",
        "DDPStrategy",
    ) and not name.startswith("ddp"):
        raise UserError(
            f"strategy is {name!r}: give 'ddp' for several devices, or 'auto'; a student is small, and whole on each."
        )


def without_tensorflow() -> None:
    """Have TensorBoard do without TensorFlow: it imports what has that name, be it a file of the current folder."""
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("notf"))


def make_trainer(
    settings: TrainerSettings,
    folder: Path,
    num_epochs: int,
    callbacks: Sequence[pl.Callback] = (),
    resume: bool = False,
) -> pl.Trainer:
    """A Trainer that logs to TensorBoard in ``folder``; checkpoints and progress are callbacks, if any.

    Args:
        settings: device and precision.
        folder: for the event files.
        num_epochs: passes over the training rows.
        callbacks: Lightning's.
        resume: the fit goes on from a checkpoint, so its first epochs' curves are kept.
    """
    without_tensorflow()
    if not resume:
        for unfinished in folder.glob("events.out.tfevents.*"):
            unfinished.unlink()  # of an interrupted fit: TensorBoard would draw both curves as one
    precision: Any = (
        settings.precision
        if settings.precision != "auto"
        else trainer_precision(settings.accelerator)
    )
    return pl.Trainer(
        accelerator=settings.accelerator,
        devices=1,
        precision=precision,
        gradient_clip_val=settings.gradient_clip_val,
        max_epochs=num_epochs,
        logger=TensorBoardLogger(
            folder.parent, name="", version=folder.name, flush_secs=FLUSH_SECONDS
        ),
        callbacks=[*callbacks, NoticeSignals()],
        plugins=[WholeFiles()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )


def fit(
    trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, **options: Any
) -> None:
    """``trainer.fit`` under ``honest_signals``, with the memory of earlier fits given back."""
    release_memory()
    with honest_signals(), one_error(Path(trainer.log_dir or trainer.default_root_dir)):
        trainer.fit(module, datamodule=data, weights_only=True, **options)


@contextmanager
def one_error(folder: Path) -> Iterator[None]:
    """TensorBoard's thread prints that the disk is full, and the next call of its writer raises the same.

    Args:
        folder: that it writes to, of which its error says nothing.
    """
    if getattr(threading.excepthook, "func", None) is not _say_but_of_writers:
        # For good: the thread may end after this.
        threading.excepthook = partial(_say_but_of_writers, threading.excepthook)
    with placed(folder):
        yield


def _say_but_of_writers(say: Callable[[Any], object], args: Any) -> None:
    if type(args.thread).__name__ != "_AsyncWriterThread":
        say(args)


def fit_resumable(
    settings: TrainerSettings,
    folder: Path,
    num_epochs: int,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    callbacks: Sequence[pl.Callback] = (),
) -> None:
    """``fit`` that the same call goes on with, from ``folder/last.ckpt``; whoever has kept the result deletes that.

    Raises:
        UserError: the checkpoint is damaged, or of another version.
    """
    last = folder / "last.ckpt"
    resume = last.exists()
    if resume:
        kept = check_checkpoint(last).get("callbacks", {}).get(KeepLast.__qualname__, {})
        if kept.get("format") != KeepLast.FORMAT:
            raise UserError(
                f"{str(last)!r} was written by another version of kdnas: delete it to begin anew."
            )
    trainer = make_trainer(settings, folder, num_epochs, [*callbacks, KeepLast(last)], resume)
    fit(trainer, module, data, ckpt_path=last if resume else None)


def check_checkpoint(path: Path) -> dict[str, Any]:
    """What is in a checkpoint that can be gone on from; nothing in it is run.

    Raises:
        UserError: it is damaged, holds more than tensors and plain values, or is no checkpoint of Lightning.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises anything
        raise UserError(
            f"{str(path)!r} is damaged or holds more than tensors ({first_line(error)}): delete it to begin anew."
        ) from error
    if (
        not isinstance(found, dict)
        or not {"state_dict", "pytorch-lightning_version"} <= found.keys()
    ):
        raise UserError(f"{str(path)!r} is no checkpoint of a fit: delete it to begin anew.")
    return found


class NoticeSignals(pl.Callback):
    """``notice_signals`` after each batch."""

    def on_train_batch_end(self, *args: Any) -> None:
        notice_signals()

    def on_validation_batch_end(self, *args: Any) -> None:
        notice_signals()


def release_memory() -> None:
    """Give back what earlier work left: Trainer and module refer to each other, and glibc keeps what was freed."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Give what glibc keeps of freed memory back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # musl has none
        trim(0)


@contextmanager
def settled_memory() -> Iterator[None]:
    """What is there already, imported modules above all, is not looked through whenever memory is given back within.

    That took 0.8 s of each candidate: half a million objects, three times.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class ClipFusedGradients(pl.LightningModule):
    """Clips the norm of the gradients where Lightning refuses to: a fused optimizer in mixed precision.

    bfloat16 has no gradient scaler, so there is nothing to undo before the norm is taken.
    """

    def setup(self, stage: str | None = None) -> None:
        """Look at the precision before anything is computed.

        Raises:
            UserError: it computes in float16.
        """
        plugin: Any = self.trainer.precision_plugin
        # In float16 throughout nothing scales them, and the smallest numbers are 0.
        is_half = getattr(plugin, "scaler", None) is not None or plugin.precision == "16-true"
        if stage == "fit" and is_half:
            raise UserError(
                f"precision is {self.trainer.precision!r}: take 'bf16-mixed', whose gradients need no scale."
            )

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of all gradients together, and log it as it was before.

        Raises:
            UserError: the algorithm is another.
        """
        if gradient_clip_algorithm not in (None, "norm"):
            raise UserError(
                f"gradient_clip_algorithm is {str(gradient_clip_algorithm)!r}: only the norm is clipped."
            )
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val or math.inf)
        self.log("train/grad_norm", norm)


class WholeFiles(TorchCheckpointIO):
    """Checkpoints that are old or new, never a part: Lightning's way leads over another file system's folder."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        buffer = io.BytesIO()  # torch's own writer turns a full disk into an error without a number
        torch.save(checkpoint, buffer)
        with new_file(Path(path)) as file:
            file.write(buffer.getbuffer())


class KeepLast(pl.Callback):
    """Writes a checkpoint after each epoch, every few minutes, and before a signal ends the fit.

    The signal waits for the end of the step, or for ``LONGEST_WAIT`` seconds of a validation, after which the
    checkpoint is the one before it (in the first epoch that before the last step); a second one does not. Random
    numbers go on as if nothing had been, so with a ``ResumableLoader`` a fit that was stopped ends with the weights of
    one that was not.

    Args:
        path: of the checkpoint.
        every_seconds: the most that a kill can cost.
    """

    FORMAT = 1  # another where modules or loaders keep something else

    def __init__(self, path: Path, every_seconds: float = 300) -> None:
        self.path, self.every_seconds = path, every_seconds
        self._asked: type[KeyboardInterrupt] | None = None
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}
        self._random: dict[str, torch.Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        states = {"random": torch.get_rng_state()}
        if torch.cuda.is_available():
            states["cuda"] = (
                torch.cuda.get_rng_state()
            )  # dropout's there; of the one device that the fit is on
        return {**states, "format": self.FORMAT}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random = {name: state_dict[name] for name in ("random", "cuda") if name in state_dict}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._random:
            torch.set_rng_state(self._random["random"])
        if "cuda" in self._random and torch.cuda.is_available():
            torch.cuda.set_rng_state(self._random["cuda"])
        self._saved = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            numbers = [
                n for n in (signal.SIGINT, *TERMINATIONS) if signal.getsignal(n) != signal.SIG_IGN
            ]
            self._before = {number: signal.signal(number, self._ask) for number in numbers}

    def _ask(self, signum: int, frame: Any) -> None:
        if (
            self._asked and signum == signal.SIGHUP
        ):  # a shell and the system send one each: it is no second request
            return
        if self._asked:
            raise stop_of(signum)
        self._asked, self._asked_at = stop_of(signum), time.monotonic()

    def on_validation_batch_end(self, *args: Any) -> None:
        if self._asked and time.monotonic() - self._asked_at > LONGEST_WAIT:
            raise self._asked

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        is_due = self._asked or time.monotonic() - self._saved > self.every_seconds
        is_first = batch_idx + 2 == trainer.num_training_batches and not self.path.exists()
        # After the last batch comes the end of the epoch.
        if not trainer.is_last_batch and (is_due or is_first):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved = time.monotonic()
        if self._asked:
            raise self._asked

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hand_back()
        if self._asked:  # since the last checkpoint
            raise self._asked

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._hand_back()

    def _hand_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
