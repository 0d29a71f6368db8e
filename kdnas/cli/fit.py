"""``kdnas fit`` and ``kdnas validate``: the Lightning CLI, and what a fit leaves in its folder."""

import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import TorchCheckpointIO

from kdnas.cli.parser import default_objects, normalize, parse, refuse_ambiguous_yaml
from kdnas.data.datamodule import KDDataModule
from kdnas.distillation.module import HiddenStateDistillModule
from kdnas.system.errors import UserError
from kdnas.system.files import MANIFEST, new_folder, sweep
from kdnas.system.manifest import renew, write_manifest
from kdnas.system.signals import honest_signals
from kdnas.system.yaml import flat, read_yaml
from kdnas.training.checkpoints import WholeFiles, check_checkpoint
from kdnas.training.precision import gpu_name, trainer_precision
from kdnas.training.progress import EpochLines, SayWhatGoesOn
from kdnas.training.trainer import FLUSH_SECONDS, refuse_strategy, without_tensorflow

log = logging.getLogger(__name__)


def run_lightning(command: str, args: Sequence[str]) -> None:
    """Fit or validate a ``HiddenStateDistillModule`` on a ``KDDataModule``, by the Lightning CLI.

    Args:
        command: ``fit`` or ``validate``.
        args: its options.

    Raises:
        UserError: an option, a value or a file that it cannot take.
    """
    refuse_ambiguous_yaml()
    with honest_signals():
        KDCLI(command, args).run()


class KDCLI(LightningCLI):
    """The Lightning CLI with our defaults, for one command, and the student at the end."""

    def __init__(self, command: str, args: Sequence[str]) -> None:
        self.command = command
        super().__init__(
            HiddenStateDistillModule,
            KDDataModule,
            SaveConfigOnce,
            trainer_defaults={"enable_progress_bar": False} if _is_quiet() else None,
            parser_kwargs={
                "prog": f"kdnas {command}",
                "description": None,
                "exit_on_error": False,
            },
            args=normalize(args),
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options of the command itself, and defaults that only we know."""
        skipped: set[str | int] = {*self.subcommands()[self.command]}
        self.arguments = parser.add_method_arguments(pl.Trainer, self.command, skip=skipped)
        # The data is read by the teacher's tokenizer.
        parser.link_arguments("model.teacher", "data.teacher")
        parser.set_defaults({f"model.{name}": value for name, value in default_objects().items()})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the options, then refuse what Lightning would take.

        Raises:
            UserError: an option that does not exist, a strategy that cuts the student, or a
                checkpoint that is not on this disk.
        """
        assert isinstance(args, list)
        self.config = parse(parser, args)
        trainer = self.config.trainer
        strategy = getattr(trainer.strategy, "class_path", trainer.strategy)
        refuse_strategy(strategy.rpartition(".")[2])
        if trainer.precision is None:
            trainer.precision = trainer_precision(trainer.accelerator)

        path = self.config.ckpt_path
        if path and os.path.isfile(path):
            check_checkpoint(Path(path))
        elif path not in (None, "last", "best", "hpc"):  # Lightning would run what is elsewhere
            raise UserError(
                f"ckpt_path is {path!r}: there is no such file; a checkpoint must lie on this disk."
            )

    def run(self) -> None:
        """Fit or validate, and complete the folder."""
        options = {name: self.config[name] for name in self.arguments}
        getattr(self.trainer, self.command)(self.model, datamodule=self.datamodule, **options)
        if self.command == "fit":
            self.save_student()
        else:
            self.renew_curves()

    def instantiate_trainer(self, **options: Any) -> Any:
        """With checkpoints that are whole or not there, and lines where no bar can move."""
        without_tensorflow()
        trainer = super().instantiate_trainer(**options)
        # A user may have asked for another one.
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeFiles()
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger._kwargs.setdefault("flush_secs", FLUSH_SECONDS)
        said = None if _is_quiet() or sys.stdout.isatty() else partial(print, flush=True)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks += [SayWhatGoesOn(), EpochLines("fit", said)]
        return trainer

    def save_student(self) -> None:
        """Write the student of a finished fit beside its curves, and then the manifest."""
        trainer = self.trainer
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        own = own_folder(trainer)
        trainer.strategy.barrier()  # others may still write what they measured
        if trainer.is_global_zero:
            with new_folder(folder / "encoder") as temporary:
                self.model.save_student(temporary)
            if own is not None:
                write_manifest(own, {"name": own.name, "command": sys.argv, "gpu": gpu_name()})
            log.info("The student, with its tokenizer: %s", folder / "encoder")

    def renew_curves(self) -> None:
        """Update the manifest of a finished fit for the curves that a validation has added."""
        own = own_folder(self.trainer)
        if own is not None and self.trainer.is_global_zero:
            for path in (*own.glob("events.out.tfevents.*"), *own.glob("metrics.csv")):
                renew(path)


def _is_quiet() -> bool:
    return not log.isEnabledFor(logging.INFO)


def own_folder(trainer: pl.Trainer) -> Path | None:
    """The folder that a fit's first logger made for it alone; None where others use it too.

    Every process must call this: Lightning broadcasts the folder's name.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    logger = trainer.logger
    is_own = isinstance(logger, TensorBoardLogger | CSVLogger) and folder != Path(logger.save_dir)
    return folder if is_own else None


class SaveConfigOnce(SaveConfigCallback):
    """Writes a fit's config beside its curves, unless the same config is there already.

    On Slurm the job's number names the folder, so a job that is queued again comes back to it, and
    so does a second fit of the same job.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compare with the config that is there, in the first process.

        Raises:
            UserError: it is of another fit, whose student would be replaced.
        """
        path = Path(trainer.log_dir or trainer.default_root_dir, self.config_filename)
        differing: list[str] | None = None
        if trainer.is_global_zero and path.is_file():
            known = flat(read_yaml(path))
            asked = flat(yaml.safe_load(self.parser.dump(self.config, skip_unset=False)))
            differing = [
                name
                for name in known | asked
                if name != "ckpt_path" and known.get(name) != asked.get(name)
            ]
        differing = trainer.strategy.broadcast(differing)
        if differing and stage == "fit":
            raise UserError(
                f"{str(path)!r} is of a fit with another {', '.join(differing)}: "
                "give this one a folder of its own, such as --trainer.default_root_dir OTHER."
            )

        own = own_folder(trainer)
        if own is not None and stage == "fit" and trainer.is_global_zero:
            (own / MANIFEST).unlink(missing_ok=True)  # written anew at the end
            sweep(own.parent, "version_*/**/.*")  # what killed fits have left

        self.already_saved = differing is not None
        super().setup(trainer, pl_module, stage)
