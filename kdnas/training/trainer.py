"""Make Lightning Trainers from settings, and run fits that resume after an interruption."""

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

# TensorBoard's default is 120 s, which its writer may need to notice that it was closed.
FLUSH_SECONDS = 2
# Each logged step waits for the device a few times. The configs of ``kdnas fit`` have the same.
LOG_STEPS = 10
REMEDY = (
    "give --workers for several candidates at a time, and --trainer.devices of `kdnas run` for DDP."
)


@dataclass(frozen=True)
class TrainerSettings:
    """Settings of the Trainers of candidates, full KD and fine-tuning.

    Args:
        accelerator: accelerator of Lightning's Trainer: ``auto``, ``cpu``, ``gpu``, ...
        precision: precision of Lightning's Trainer; ``auto``: bf16-mixed if the device multiplies
            faster in bfloat16, else 32-true.
        gradient_clip_val: largest norm of the gradient; 0: no clipping.
        devices: number of GPUs, or of CPU processes, for DDP in full KD of `kdnas run` (the final
            distillation); null: all GPUs, or one process. Search candidates and fine-tunings always
            use one.
        logger: logger instead of TensorBoard's, by class path with its init_args. ``{folder}`` in
            them stands for the folder of the candidate or stage.
        callbacks: further callbacks, by class path with init_args; each Trainer gets its own.

    Raises:
        UserError: ``gradient_clip_val`` is negative, or ``devices`` is below 1.
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
        """Check that Trainers with these settings can be made on this machine.

        Args:
            has_ddp: whether a fit may use several devices by DDP.

        Raises:
            UserError: there is no such accelerator, there are fewer devices than asked for, several
                are asked for although ``has_ddp`` is False, the logger or a callback cannot be
                made, or a launcher such as torchrun has started several processes.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but a search must be started as one "
                f"process, without torchrun: {REMEDY}"
            )
        devices = self.devices or 1
        if devices > 1 and not has_ddp:
            raise UserError(
                f"trainer.devices is {devices}, but only full KD of `kdnas run` on this machine "
                "can use several: give 1, and --workers for several jobs at a time."
            )
        try:
            pl.Trainer(
                accelerator=self.accelerator,
                devices=devices,
                logger=False,
                enable_checkpointing=False,
            )
        except Exception as error:  # Lightning's own error, or the device's
            raise UserError(
                f"accelerator is {self.accelerator!r}, which cannot be used here: "
                f"{first_line(error)}."
            ) from error
        with temporary_folder() as folder:
            for make in filter(None, (self.logger, *self.callbacks)):
                try:
                    _make(make, Path(folder))
                except Exception as error:  # the class may be the user's own
                    raise UserError(
                        f"{class_path(make)} cannot be created: {first_line(error)}."
                    ) from error


def class_path(make: Callable[..., Any]) -> str:
    """Return the import path, ``module.Class``, of the class whose object a callable creates.

    Args:
        make: a class, a function (its own path is returned), or a ``functools.partial`` of either;
            jsonargparse makes partials whose first argument is the class.
    """
    parts = (make.func, *make.args) if isinstance(make, partial) else (make,)
    made: Any = next((part for part in parts if isinstance(part, type)), parts[0])
    return f"{made.__module__}.{made.__qualname__}"


def _make(make: Callable[..., Any], folder: Path) -> Any:
    """Create a logger or callback for a fit.

    Args:
        make: creates the object; in the string arguments of a ``functools.partial``, ``{folder}``
            is replaced by ``folder``.
        folder: folder of the fit.
    """
    arguments = make.keywords if isinstance(make, partial) else {}
    in_folder = {
        name: value.replace("{folder}", str(folder))
        for name, value in arguments.items()
        if isinstance(value, str)
    }
    return make(**in_folder)


def refuse_strategy(name: str) -> None:
    """Raise an error for strategies that shard the student: Muon and clipping need whole matrices.

    Args:
        name: name of a Lightning strategy, such as ``ddp``, or of the strategy's class.

    Raises:
        UserError: the strategy is neither DDP nor for a single device.
    """
    if name not in (
        "auto",
        "single_device",
        "SingleDeviceStrategy",
        "DDPStrategy",
    ) and not name.startswith("ddp"):
        raise UserError(
            f"strategy is {name!r}, but each device must hold a whole student: give 'ddp' for "
            "several devices, or 'auto'."
        )


def without_tensorflow() -> None:
    """Keep TensorBoard from importing TensorFlow, or a ``tensorflow.py`` in the current folder."""
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("notf"))


def make_trainer(
    settings: TrainerSettings,
    folder: Path,
    num_epochs: int,
    callbacks: Sequence[pl.Callback] = (),
    resume: bool = False,
) -> pl.Trainer:
    """Create a Trainer for one device, without progress bar or Lightning's default checkpoints.

    In one of several processes that ``share_devices`` started, the Trainer uses DDP across them.

    Args:
        settings: device, precision, logger and callbacks.
        folder: folder for TensorBoard's event files and other output of loggers and callbacks.
        num_epochs: number of passes over the training rows.
        callbacks: further callbacks, called after those of the settings.
        resume: whether an interrupted fit will be resumed. If so, its event files are kept; if not,
            the event files of earlier fits are deleted.
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
            unfinished.unlink()  # TensorBoard would draw the curves of both fits as one
    return trainer


def own_random_numbers() -> AbstractContextManager[None]:
    """Return a context that restores torch's random generators (CPU, current GPU) at its end."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices)  # by default torch saves all GPUs' states, with a warning


def fit(
    trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, **options: Any
) -> None:
    """Call ``trainer.fit`` with fast dropout, after releasing the memory of earlier fits.

    Args:
        trainer: Trainer to use.
        module: module to train.
        data: data module to train it on.
        **options: further arguments of ``trainer.fit``.

    Raises:
        OSError: a file could not be written; the error always has a path as ``filename``.
    """
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
    """Fit a module, with the newest checkpoint in ``folder/last.ckpt``.

    If the checkpoint exists, the fit resumes from it: after an interruption, repeat the call. The
    caller must delete the checkpoint after storing the result of the fit.

    Args:
        settings: device, precision, logger and callbacks.
        folder: folder of the job that makes the fit.
        num_epochs: number of passes over the training rows.
        module: module to train.
        data: data module to train it on.
        callbacks: further callbacks, called after those of the settings.

    Raises:
        UserError: the checkpoint is damaged, or was written by another version of kdnas.
        Stopped: the job was asked to stop; a checkpoint was written before the fit ended.
    """
    last = folder / "last.ckpt"
    resume = last.exists()
    if resume:
        kept = check_checkpoint(last).get("callbacks", {}).get(KeepLast.__qualname__, {})
        if kept.get("format") != KeepLast.FORMAT:
            raise UserError(
                f"{str(last)!r} was written by another version of kdnas: delete it to start over."
            )
    told = ProgressFile(Reporter(folder))
    trainer = make_trainer(settings, folder, num_epochs, [*callbacks, told, KeepLast(last)], resume)
    fit(trainer, module, data, ckpt_path=last if resume else None)


class ClipFusedGradients(pl.LightningModule):
    """A LightningModule that clips gradients also for fused optimizers in mixed precision.

    Lightning refuses to clip with fused optimizers because float16 gradients are scaled. bfloat16
    gradients need no scaling.
    """

    def setup(self, stage: str | None = None) -> None:
        """Raise an error if the Trainer's precision is float16, whose gradients need scaling.

        Args:
            stage: Lightning's stage, such as ``fit``, the only one that is checked.

        Raises:
            UserError: the precision is float16, mixed or not.
        """
        plugin: Any = self.trainer.precision_plugin
        # "16-true" has no scaler, so that small gradients would become 0.
        is_half = getattr(plugin, "scaler", None) is not None or plugin.precision == "16-true"
        if stage == "fit" and is_half:
            raise UserError(
                f"precision is {self.trainer.precision!r}, whose gradients need scaling: give "
                "'bf16-mixed', which needs none."
            )

    def on_train_start(self) -> None:
        """Lower the logging interval if an epoch is shorter, so that each epoch is logged."""
        trainer: Any = self.trainer
        trainer.log_every_n_steps = min(trainer.log_every_n_steps, trainer.num_training_batches)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the total norm of all gradients, and log the norm before clipping.

        Args:
            optimizer: not used.
            gradient_clip_val: largest norm; None or 0: no clipping.
            gradient_clip_algorithm: ``norm`` or None, which mean the same.

        Raises:
            UserError: the algorithm is not ``norm``.
        """
        if gradient_clip_algorithm not in (None, "norm"):
            raise UserError(
                f"gradient_clip_algorithm is {str(gradient_clip_algorithm)!r}: give 'norm', the "
                "only one supported."
            )
        norm = clip_norm(self.parameters(), gradient_clip_val or math.inf)
        self.log("train/grad_norm", norm)
