"""``kdnas fit`` and ``kdnas validate``: the Lightning CLI, and what a fit leaves in its folder."""

import logging
import os
import sys
from argparse import ArgumentError
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

from kdnas.cli.parser import default_objects, for_parser, in_one_line, refuse_ambiguous_yaml
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


def run_lightning(subcommand: str, args: Sequence[str]) -> None:
    """Run a subcommand of the Lightning CLI on ``HiddenStateDistillModule`` and ``KDDataModule``.

    Args:
        subcommand: ``fit`` or ``validate``.
        args: its options.

    Raises:
        UserError: an option, a value or a file that it cannot take.
    """
    refuse_ambiguous_yaml()
    with honest_signals():
        KDCLI(
            HiddenStateDistillModule,
            KDDataModule,
            SaveConfigOnce,
            args=[subcommand, *for_parser(args)],
            parser_kwargs={"exit_on_error": False},
            trainer_defaults={"enable_progress_bar": False} if _is_quiet() else None,
        )


class KDCLI(LightningCLI):
    """The Lightning CLI with our defaults, one line for a mistake, and the student at the end."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The data is read by the teacher's tokenizer; the parser is told the classes of default objects."""
        parser.link_arguments("model.teacher", "data.tokenizer")
        parser.set_defaults({f"model.{name}": value for name, value in default_objects().items()})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """As Lightning does, then refuse what Lightning would take.

        Raises:
            UserError: what the parser does not know, a strategy that cuts the student, a checkpoint that is not here.
        """
        assert isinstance(args, list)
        subcommand = args[0]
        try:
            super().parse_arguments(parser, args)
        except (ArgumentError, UnicodeDecodeError) as error:
            raise in_one_line(error, self._subcommand_parsers[subcommand]) from error
        trainer = self.config[subcommand].trainer
        refuse_strategy(
            getattr(trainer.strategy, "class_path", trainer.strategy).rpartition(".")[2]
        )
        if trainer.precision is None:
            trainer.precision = trainer_precision(trainer.accelerator)
        path = self.config[subcommand].get("ckpt_path")  # Lightning itself looks into it next
        if path and os.path.isfile(path):
            check_checkpoint(Path(path))
        elif path not in (
            None,
            "last",
            "best",
            "hpc",
        ):  # what comes from elsewhere Lightning would run
            raise UserError(
                f"ckpt_path is {path!r}: there is no such file; a checkpoint must lie on this disk."
            )

    def _parse_ckpt_path(self) -> None:
        """Lightning would take a checkpoint's word for our settings, and import the classes that it names."""

    def instantiate_trainer(self, **options: Any) -> Any:
        """With checkpoints that are whole or not there, and lines where no bar can move."""
        without_tensorflow()
        trainer = super().instantiate_trainer(**options)
        if (
            type(trainer.strategy.checkpoint_io) is TorchCheckpointIO
        ):  # not one that the user asked for
            trainer.strategy.checkpoint_io = WholeFiles()
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger._kwargs.setdefault("flush_secs", FLUSH_SECONDS)
        said = None if _is_quiet() or sys.stdout.isatty() else partial(print, flush=True)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks += [SayWhatGoesOn(), EpochLines("fit", said)]
        return trainer

    def after_fit(self) -> None:
        """Lightning's hook: write the student of a finished fit beside its curves, and then the manifest."""
        trainer = self.trainer
        folder, own = Path(trainer.log_dir or trainer.default_root_dir), own_folder(trainer)
        trainer.strategy.barrier()  # others may still write what they measured
        if trainer.is_global_zero:
            with new_folder(folder / "encoder") as temporary:
                self.model.save_student(temporary)
            if own is not None:
                write_manifest(own, {"name": own.name, "command": sys.argv, "gpu": gpu_name()})
            log.info("The student, with its tokenizer: %s", folder / "encoder")

    def after_validate(self) -> None:
        """Lightning's hook: write down the curves that it has added to the folder of a finished fit."""
        own = own_folder(self.trainer)
        if own is not None and self.trainer.is_global_zero:
            for path in (*own.glob("events.out.tfevents.*"), *own.glob("metrics.csv")):
                renew(path)


def _is_quiet() -> bool:
    return not log.isEnabledFor(logging.INFO)


def own_folder(trainer: pl.Trainer) -> Path | None:
    """The folder that a fit's first logger made for it alone; None where it is others' too. Every process must ask."""
    folder, logger = Path(trainer.log_dir or trainer.default_root_dir), trainer.logger
    is_own = isinstance(logger, TensorBoardLogger | CSVLogger) and folder != Path(logger.save_dir)
    return folder if is_own else None


class SaveConfigOnce(SaveConfigCallback):
    """Writes a fit's config beside its curves; one that is there already stays, and so does what lies beside it.

    Only a manifest does not: it is written anew at the end.

    Slurm's number of the job names the folder: a job that is queued again comes back to it, and so do two fits in one.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Look at what is there, in the first process.

        Raises:
            UserError: it is the config of another fit, whose student would be replaced.
        """
        path = Path(trainer.log_dir or trainer.default_root_dir, self.config_filename)
        differing: list[str] | None = None
        if trainer.is_global_zero and path.is_file():
            known, asked = (
                flat(read_yaml(path)),
                flat(yaml.safe_load(self.parser.dump(self.config, skip_unset=False))),
            )
            differing = [
                k for k in {**known, **asked} if k != "ckpt_path" and known.get(k) != asked.get(k)
            ]
        differing = trainer.strategy.broadcast(differing)
        if differing and stage == "fit":
            raise UserError(
                f"{str(path)!r} is of a fit with another {', '.join(differing)}: "
                "give this one a folder of its own, such as --trainer.default_root_dir OTHER."
            )
        own = own_folder(trainer)
        if own is not None and stage == "fit" and trainer.is_global_zero:
            (own / MANIFEST).unlink(missing_ok=True)  # until the end again
            sweep(own.parent, "version_*/**/.*")  # of fits before it, each in a folder of its own
        self.already_saved = differing is not None
        super().setup(trainer, pl_module, stage)
