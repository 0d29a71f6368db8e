"""``kdnas fit``, ``validate``, ``test`` and ``predict``: the Lightning CLI and its output files."""

import logging
import os
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import TorchCheckpointIO

from kdnas.cli.parser import default_objects, normalize, parse, refuse_ambiguous_yaml
from kdnas.data.datamodule import DataSettings, KDDataModule, Split
from kdnas.deploy.export import teacher_in
from kdnas.distillation.module import HiddenStateDistillModule
from kdnas.distillation.start import Started
from kdnas.system.errors import UserError, first_line
from kdnas.system.files import MANIFEST, new_file, new_folder, sweep
from kdnas.system.manifest import renew, write_manifest
from kdnas.system.signals import honest_signals
from kdnas.system.yaml import flat, read_yaml
from kdnas.training.checkpoints import WholeFiles, check_checkpoint
from kdnas.training.dropout import fast_dropout
from kdnas.training.precision import gpu_name, trainer_precision
from kdnas.training.progress import EpochLines, SayWhatGoesOn, WarnOfNoValidation
from kdnas.training.trainer import FLUSH_SECONDS, refuse_strategy, without_tensorflow

log = logging.getLogger(__name__)


def run_lightning(command: str, args: Sequence[str]) -> None:
    """Run a command of the Lightning CLI, on a ``HiddenStateDistillModule`` and its data.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        args: the command's options.

    Raises:
        UserError: an option is wrong, or Lightning refuses a setting.
    """
    refuse_ambiguous_yaml()
    with honest_signals():
        try:
            KDCLI(command, args).run()
        except (MisconfigurationException, ValueError) as error:
            if isinstance(error, ValueError) and not _is_lightnings(error):
                raise
            raise UserError(f"{first_line(error)}.") from error


def _is_lightnings(error: Exception) -> bool:
    """Return whether an error was raised in Lightning's own code, as for a wrong setting."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"]).startswith("lightning.")


class FlatData(KDDataModule):
    """Masked batches of a text, for distillation.

    Args:
        teacher: model whose tokenizer is used: a folder, a hub name, or ``quickstart``.
        text: a parquet, jsonl, csv or txt file, a folder of them, or a hub data set.
        split: training rows: 30 % of them (``mini``) or all (``full``); both have the same held-out
            rows.
        folder: folder of the caches of tokenised texts, one for each text; safe to delete. By
            default ``tokens`` in the folder of all runs.
        settings: how text becomes batches, as in ``data`` of a search.
    """

    def __init__(
        self,
        teacher: str,
        text: str,
        split: Split = "full",
        folder: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(teacher, text, DataSettings(**settings), split, folder)


class KDCLI(LightningCLI):
    """The Lightning CLI with kdnas's defaults, for one command; ``fit`` also saves the student."""

    def __init__(self, command: str, args: Sequence[str]) -> None:
        self.command = command
        super().__init__(
            HiddenStateDistillModule,
            FlatData,
            SaveConfigOnce,
            trainer_defaults={"enable_progress_bar": False} if _is_quiet() else None,
            parser_kwargs={
                "prog": f"kdnas {command}",
                "description": None,
                "exit_on_error": False,
                "allow_abbrev": False,
            },
            args=normalize(args),
            run=False,
            # The module's optimizer has a learning rate for each kind of tensor.
            auto_configure_optimizers=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the Trainer's method for this command, such as ``--ckpt_path``.

        Also set the defaults of ``model`` that are objects, such as the loss.
        """
        skipped: set[str | int] = {*self.subcommands()[self.command], "return_predictions"}
        self.arguments = parser.add_method_arguments(pl.Trainer, self.command, skip=skipped)
        # The teacher's tokenizer reads the data.
        parser.link_arguments("model.teacher", "data.teacher")
        parser.set_defaults({f"model.{name}": value for name, value in default_objects().items()})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the options, and raise an error for Lightning settings that kdnas cannot use."""
        assert isinstance(args, list)
        self.config = parse(parser, args)
        trainer = self.config.trainer
        strategy = getattr(trainer.strategy, "class_path", trainer.strategy)
        refuse_strategy(strategy.rpartition(".")[2])
        if strategy == "ddp":  # some objectives leave parameters of the student without a gradient
            trainer.strategy = "ddp_find_unused_parameters_true"
        if trainer.overfit_batches:  # Lightning would replace our sampler by its own
            raise UserError(
                f"trainer.overfit_batches is {trainer.overfit_batches}, which kdnas does not "
                "support: give --trainer.limit_train_batches instead."
            )
        for name in ("accumulate_grad_batches", "check_val_every_n_epoch"):
            if trainer[name] == 0:
                raise UserError(f"trainer.{name} is 0: give at least 1.")
        if trainer.precision is None:
            trainer.precision = trainer_precision(trainer.accelerator)

        path, is_fit = self.config.ckpt_path, self.command == "fit"
        if path and os.path.isfile(path):
            check_checkpoint(Path(path))
        elif path is None and not is_fit:
            raise UserError(
                "ckpt_path is missing, so the student would be untrained: give a checkpoint of "
                "`kdnas fit`, such as --ckpt_path lightning_logs/version_0/checkpoints/NAME.ckpt."
            )
        # Lightning would load a checkpoint from a URL, which cannot be checked first.
        elif not is_fit or path not in (None, "last"):
            raise UserError(
                f"ckpt_path is {path!r}, but this file does not exist: give a checkpoint on this "
                "machine's disk."
            )

    def run(self) -> None:
        """Run the command, and write its results to its folder."""
        # Each of several devices would hold the vectors of its share of the rows only.
        if self.command == "predict" and self.trainer.world_size > 1:
            raise UserError(
                f"trainer.devices is {self.config.trainer.devices!r}, but predict uses one device: "
                "give --trainer.devices 1."
            )
        options = {name: self.config[name] for name in self.arguments}
        run = getattr(self.trainer, self.command)
        if self.command == "fit" and options["ckpt_path"]:
            self.model.started = Started()  # the checkpoint's student is initialised already
        with _removed_if_it_never_starts(self.trainer), fast_dropout():
            found = run(self.model, datamodule=self.datamodule, **options)
        if self.command == "fit":
            self.save_student()
        elif self.command == "predict":
            self.save_vectors(found)
        else:
            self.renew_curves()

    def instantiate_trainer(self, **options: Any) -> Any:
        """Build the Trainer, and add kdnas's callbacks and its way of writing checkpoints.

        Checkpoint files appear whole or not at all. If the output goes to no terminal, the Trainer
        prints its progress as lines, unless ``--quiet`` is given.
        """
        without_tensorflow()
        try:
            trainer = super().instantiate_trainer(**options)
        except Exception as error:  # Lightning's own error, or the device's
            raise UserError(
                f"The Trainer refuses its settings ({first_line(error)}): "
                f"`kdnas {self.command} --help all` explains them."
            ) from error
        # Only Lightning's default is replaced, not a plugin that the user chose.
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeFiles()
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger._kwargs.setdefault("flush_secs", FLUSH_SECONDS)
        said = None if _is_quiet() or sys.stdout.isatty() else partial(print, flush=True)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks += [SayWhatGoesOn(), WarnOfNoValidation(), EpochLines("fit", said)]
        return trainer

    def save_student(self) -> None:
        """Write the student of a finished fit into the fit's folder, and then the manifest."""
        trainer = self.trainer
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        own = own_folder(trainer)
        trainer.strategy.barrier()  # other ranks may still be writing files of the manifest
        if trainer.is_global_zero:
            with new_folder(folder / "encoder") as temporary:
                self.model.save_student(temporary)
            if own is not None:
                about = {"name": own.name, "command": sys.argv, "gpu": gpu_name()}
                write_manifest(own, about | teacher_in(self.model.student.config))
            log.info("The student, with its tokenizer: %s", folder / "encoder")

    def save_vectors(self, batches: list[tuple[list[str], torch.Tensor]]) -> None:
        """Write ``vectors.parquet``, with ``text`` and ``vector`` in a row for each text.

        Args:
            batches: for each batch, a list of texts and a tensor with the vectors of these texts as
                rows.
        """
        path = Path(self.trainer.log_dir or self.trainer.default_root_dir, "vectors.parquet")
        texts = [text for batch, _ in batches for text in batch]
        vectors = [vector for _, batch in batches for vector in batch.numpy()]
        table = pa.table({"text": texts, "vector": vectors})
        with new_file(path) as file:
            pq.write_table(table, file)
        renew(path)
        log.info("The vectors of %s held-out rows: %s", f"{len(table):,}", path)

    def renew_curves(self) -> None:
        """Update the manifest of a folder to which ``validate`` or ``test`` has added logs."""
        own = own_folder(self.trainer)
        if own is not None and self.trainer.is_global_zero:
            for path in (*own.glob("events.out.tfevents.*"), *own.glob("metrics.csv")):
                renew(path)


def _is_quiet() -> bool:
    return not log.isEnabledFor(logging.INFO)


def own_folder(trainer: pl.Trainer) -> Path | None:
    """Return the folder of this fit's first logger; None if other fits log to the same folder.

    All ranks must call this, as Lightning broadcasts the folder's name.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    logger = trainer.logger
    is_own = isinstance(logger, TensorBoardLogger | CSVLogger) and folder != Path(logger.save_dir)
    return folder if is_own else None


@contextmanager
def _removed_if_it_never_starts(trainer: pl.Trainer) -> Iterator[None]:
    """Context manager that makes a fit's folder, and removes it if the fit fails before a step."""
    own = own_folder(trainer)
    if own is None or own.exists() or not trainer.is_global_zero:
        yield
        return
    own.mkdir(parents=True)
    try:
        yield
    except BaseException:
        if trainer.global_step == 0:
            shutil.rmtree(own)
        raise


class SaveConfigOnce(SaveConfigCallback):
    """Callback that writes a fit's config to the fit's folder, unless the same config is there.

    On Slurm the folder is named by the job's number, so a requeued job finds the folder of its
    first start, and a second fit in the same job finds the folder of the first.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the config to the fit's folder; if a config is there already, compare it instead.

        Raises:
            UserError: the config in the folder has other settings.
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
                f"{str(path)!r} belongs to a fit with another {', '.join(differing)}: "
                "give this fit another folder, such as --trainer.default_root_dir OTHER."
            )

        own = own_folder(trainer)
        if own is not None and stage == "fit" and trainer.is_global_zero:
            (own / MANIFEST).unlink(missing_ok=True)  # the end of the fit writes it anew
            sweep(own.parent, "version_*/**/.*")  # files left by killed fits

        self.already_saved = differing is not None
        super().setup(trainer, pl_module, stage)
