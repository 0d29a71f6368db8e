"""How a Trainer is made and run here: its devices, its logger and callbacks, whole checkpoints."""

import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from kdnas.system.errors import UserError, first_line
from kdnas.system.files import placed, temporary_folder
from kdnas.system.jobs import Reporter
from kdnas.training.checkpoints import KeepLast, WholeFiles, check_checkpoint
from kdnas.training.dropout import fast_dropout
from kdnas.training.memory import release_memory
from kdnas.training.optimizers import clip_norm
from kdnas.training.precision import trainer_precision
from kdnas.training.progress import ProgressFile

# TensorBoard's own are 120, and so long a writer may not hear of its end.
FLUSH_SECONDS = 2
# Each logged step waits for the device a few times; ``kdnas fit`` has the same in its configs.
LOG_STEPS = 10
REMEDY = (
    "give --workers for several candidates at a time, and --trainer.devices of `kdnas run` for DDP."
)


@dataclass(frozen=True)
class TrainerSettings:
    """The Trainer of a candidate, of full KD and of fine-tuning.

    Args:
        accelerator: Lightning's: ``auto``, ``cpu``, ``gpu``, ...
        precision: Lightning's; ``auto``: bf16-mixed where the device multiplies faster in bfloat16,
            else 32-true.
        gradient_clip_val: largest norm of the gradient; 0: any.
        devices: GPUs, or processes on a CPU, that share full KD of `kdnas run` by DDP; null: all
            GPUs, or one process. A candidate and a fine-tuning take one each.
        logger: another logger than TensorBoard's, by class path with its init_args. ``{folder}`` in
            them is the folder of the candidate or the stage.
        callbacks: more callbacks, in the same way; each Trainer gets its own.

    Raises:
        UserError: a negative norm, or no device.
    """

    accelerator: str = "auto"
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    gradient_clip_val: float = 1.0
    devices: int | None = None
    logger: Callable[[], Logger] | None = None
    callbacks: list[Callable[[], pl.Callback]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.gradient_clip_val >= 0:
            raise UserError(
                f"gradient_clip_val is {self.gradient_clip_val}: give at least 0 (0: no clipping)."
            )
        if self.devices is not None and self.devices < 1:
            raise UserError(f"trainer.devices is {self.devices}: give at least 1.")

    def check(self, has_ddp: bool = False) -> None:
        """Refuse what this machine, or the way the process was started, cannot do.

        Args:
            has_ddp: several devices can share a fit.

        Raises:
            UserError: there is no such accelerator, there are fewer devices, a logger or a callback
                cannot be made, or a launcher made this process one of several.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: a search is one process; {REMEDY}"
            )
        devices = self.devices or 1
        if devices > 1 and not has_ddp:
            raise UserError(
                f"trainer.devices is {devices}: only full KD of `kdnas run` on this machine "
                "takes several; give 1 here, and --workers for several jobs at a time."
            )
        try:
            pl.Trainer(
                accelerator=self.accelerator,
                devices=devices,
                logger=False,
                enable_checkpointing=False,
            )
        except Exception as error:  # Lightning's own error, or the device's
            raise UserError(f"accelerator is {self.accelerator!r}: {first_line(error)}.") from error
        with temporary_folder() as folder:
            for make in filter(None, (self.logger, *self.callbacks)):
                try:
                    _make(make, Path(folder))
                except Exception as error:  # the class may be the user's own
                    raise UserError(
                        f"{class_path(make)} cannot be made: {first_line(error)}."
                    ) from error


def class_path(make: Callable[..., Any]) -> str:
    """Of what is made: by the class itself, or by a partial, the parser's or one's own."""
    parts = (make.func, *make.args) if isinstance(make, partial) else (make,)
    made: Any = next((part for part in parts if isinstance(part, type)), parts[0])
    return f"{made.__module__}.{made.__qualname__}"


def _make(make: Callable[..., Any], folder: Path) -> Any:
    """A fresh logger or callback for the fit of a folder."""
    arguments = make.keywords if isinstance(make, partial) else {}
    in_folder = {
        name: value.replace("{folder}", str(folder))
        for name, value in arguments.items()
        if isinstance(value, str)
    }
    return make(**in_folder)


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
    """A Trainer of one device; checkpoints and progress are callbacks, if any.

    In a process that ``share_devices`` has begun it is one of several, which train by DDP.

    Args:
        settings: device, precision, logger and callbacks.
        folder: for event files, and for what loggers and callbacks write.
        num_epochs: passes over the training rows.
        callbacks: ours, which are called after those of the settings.
        resume: the fit goes on from a checkpoint, so its first epochs' curves are kept.
    """
    without_tensorflow()
    precision: Any = (
        settings.precision
        if settings.precision != "auto"
        else trainer_precision(settings.accelerator)
    )
    num_ranks = int(os.environ.get("WORLD_SIZE", 1))
    tensorboard = partial(
        TensorBoardLogger, folder.parent, name="", version=folder.name, flush_secs=FLUSH_SECONDS
    )
    own = [_make(make, folder) for make in settings.callbacks]
    trainer = pl.Trainer(
        accelerator=settings.accelerator,
        devices=num_ranks,
        # Some objectives leave parameters of the student without a gradient.
        strategy="auto" if num_ranks == 1 else "ddp_find_unused_parameters_true",
        precision=precision,
        gradient_clip_val=settings.gradient_clip_val,
        max_epochs=num_epochs,
        logger=_make(settings.logger or tensorboard, folder),
        callbacks=[*own, *callbacks],
        default_root_dir=folder,
        plugins=[WholeFiles(), LightningEnvironment()],
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in own),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=LOG_STEPS,
    )
    if not resume and trainer.is_global_zero:
        for unfinished in folder.glob("events.out.tfevents.*"):
            unfinished.unlink()  # of an interrupted fit: TensorBoard would draw both curves as one
    return trainer


def own_random_numbers() -> AbstractContextManager[None]:
    """What is drawn inside changes nothing outside, on the CPU and on the GPU in use."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices)  # of all GPUs torch would ask, and warn of it


def fit(
    trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, **options: Any
) -> None:
    """``trainer.fit``, with the memory of earlier fits given back."""
    release_memory()
    with placed(Path(trainer.log_dir or trainer.default_root_dir)), fast_dropout():
        trainer.fit(module, datamodule=data, weights_only=True, **options)


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
    told = ProgressFile(Reporter(folder))
    trainer = make_trainer(settings, folder, num_epochs, [*callbacks, told, KeepLast(last)], resume)
    fit(trainer, module, data, ckpt_path=last if resume else None)


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

    def on_train_start(self) -> None:
        """Log the last step of an epoch that is shorter than the interval."""
        trainer: Any = self.trainer
        trainer.log_every_n_steps = min(trainer.log_every_n_steps, trainer.num_training_batches)

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
        norm = clip_norm(self.parameters(), gradient_clip_val or math.inf)
        self.log("train/grad_norm", norm)
