"""Labelled tasks: the nine of GLUE in one table, any parquet folder beside them, their metrics, and their batches."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import BinaryF1Score, BinaryMatthewsCorrCoef, MulticlassAccuracy
from torchmetrics.utilities import dim_zero_cat
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from kdnas.errors import UserError, first_line, nearest

Columns = dict[str, list[Any]]


class _Matthews(BinaryMatthewsCorrCoef):
    """Matthews' correlation, 0.0 where it is undefined, as scikit-learn has it.

    torchmetrics gives other values: 0.276 for ten equal predictions on seven rows of one class and three of the other.
    """

    def compute(self) -> Tensor:
        tn, fp, fn, tp = self.confmat.cpu().double().flatten()
        denominator = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)).sqrt()
        return (tp * tn - fp * fn) / denominator if denominator else torch.tensor(0.0)


class _Pearson(Metric):
    """Pearson's r in float64 as scipy has it, 0.0 where it is undefined.

    torchmetrics accumulates in float32, and gives NaN for predictions that vary little, not only for constant ones.
    """

    full_state_update = False
    preds: list[Tensor]
    targets: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("preds", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, preds: Tensor, targets: Tensor) -> None:
        self.preds.append(preds)
        self.targets.append(targets)

    def compute(self) -> Tensor:
        pair = [self._values(dim_zero_cat(values).cpu().double()) for values in (self.preds, self.targets)]
        if any(values.min() == values.max() for values in pair):
            return torch.tensor(0.0)
        return torch.corrcoef(torch.stack(pair))[0, 1]

    def _values(self, values: Tensor) -> Tensor:
        return values


class _Spearman(_Pearson):
    """Spearman's rho: Pearson's r of the ranks, equal values sharing their mean rank."""

    def _values(self, values: Tensor) -> Tensor:
        _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
        return (counts.cumsum(0) - (counts - 1) / 2).double()[inverse]


# Predictions and targets are class ids, or numbers in a regression. Micro accuracy: the share of right answers.
METRICS: Mapping[str, Callable[[int], Metric]] = {
    "accuracy": lambda num_labels: MulticlassAccuracy(num_labels, average="micro"),
    "f1": lambda num_labels: BinaryF1Score(),
    "matthews": lambda num_labels: _Matthews(),
    "pearson": lambda num_labels: _Pearson(),
    "spearman": lambda num_labels: _Spearman(),
}


@dataclass(frozen=True)
class Task:
    """A task: which columns are read, what is predicted and how it is scored.

    Args:
        name: GLUE's name on the hub, or the name of the folder.
        columns: the one or two text columns; the target is always ``label``.
        num_labels: number of classes; 1 is a regression.
        metrics: keys of ``METRICS``; the score is their mean.
        label_names: names of the classes, where they have any.
        validation: the split that is scored.
    """

    name: str
    columns: tuple[str, ...]
    num_labels: int = 2
    metrics: tuple[str, ...] = ("accuracy",)
    label_names: tuple[str, ...] = ()
    validation: str = "validation"


# Source: Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform", table 1; columns and names of nyu-mll/glue.
_TABLE = (
    Task("cola", ("sentence",), metrics=("matthews",), label_names=("unacceptable", "acceptable")),
    Task("sst2", ("sentence",), label_names=("negative", "positive")),
    Task("mrpc", ("sentence1", "sentence2"), metrics=("accuracy", "f1"), label_names=("not_equivalent", "equivalent")),
    Task("stsb", ("sentence1", "sentence2"), num_labels=1, metrics=("pearson", "spearman")),
    Task("qqp", ("question1", "question2"), metrics=("accuracy", "f1"), label_names=("not_duplicate", "duplicate")),
    Task(
        "mnli",
        ("premise", "hypothesis"),
        num_labels=3,
        label_names=("entailment", "neutral", "contradiction"),
        validation="validation_matched",
    ),
    Task("qnli", ("question", "sentence"), label_names=("entailment", "not_entailment")),
    Task("rte", ("sentence1", "sentence2"), label_names=("entailment", "not_entailment")),
    Task("wnli", ("sentence1", "sentence2"), label_names=("not_entailment", "entailment")),
)
TASKS: Mapping[str, Task] = {task.name: task for task in _TABLE}


def make_metrics(task: Task) -> MetricCollection:
    """The metrics of a task, by name.

    Args:
        task: the task.

    Returns:
        A collection to be updated with predictions (N,) and targets (N,): class ids, or numbers in a regression.
        Where a metric is undefined (a correlation with constant predictions), it is 0.0.
    """
    return MetricCollection({name: METRICS[name](task.num_labels) for name in task.metrics}, compute_groups=False)


@dataclass(frozen=True)
class LoadedTask:
    """A task with its rows.

    Args:
        task: what is predicted and how it is scored.
        train: the training rows, as columns: ``task.columns`` and ``label``.
        validation: the rows that are scored, likewise.
        sha256: hash of all rows in their order, the same for every place that they are loaded from.
    """

    task: Task
    train: Columns = field(repr=False)
    validation: Columns = field(repr=False)
    sha256: str


def load_task(source: str) -> LoadedTask:
    """Load a task from a folder, or one of GLUE's from the hub.

    Args:
        source: a folder with ``train.parquet`` and ``validation.parquet`` (``validation_matched.parquet`` for MNLI),
            or a key of ``TASKS``, which is loaded from the hub. A folder of such a name has GLUE's columns. Any other
            has ``sentence``, ``text``, or ``sentence1`` and ``sentence2``, and a ``label`` 0 to n-1; its metric is the
            accuracy.

    Raises:
        UserError: it is neither; the hub cannot be reached; a file or a column is missing, no parquet, or empty; a text
            is no string; a label is no whole number (a regression: no finite number), is outside 0 to n-1 or leaves a
            gap there, or is in the validation rows only.
    """
    if os.path.isdir(source):  # Path("") would be the current folder
        folder = Path(source).resolve()
        train = _read(folder / "train.parquet")
        task = TASKS.get(folder.name) or _task_of_folder(folder.name, train)
        scored = folder / f"{task.validation}.parquet"
        validation = _read(scored if scored.exists() else folder / "validation.parquet")
    elif source in TASKS:
        task = TASKS[source]
        train, validation = _download(task)
    else:
        raise UserError(f"The task {source!r} is no folder, and no task of GLUE.{nearest(source, TASKS)}")
    splits = (
        _columns(task, train, f"training rows of {source!r}"),
        _columns(task, validation, f"validation rows of {source!r}"),
    )
    if task.num_labels != 1:
        task = replace(task, num_labels=_count_labels(task, splits[0]["label"], splits[1]["label"], source))
    digest = hashlib.sha256(json.dumps(splits).encode()).hexdigest()
    return LoadedTask(task, *splits, digest)


def _read(path: Path) -> pa.Table:
    try:
        # partitioning=None: a folder called "label=3" must not become a column.
        return pq.read_table(path, partitioning=None)
    except FileNotFoundError as error:
        raise UserError(
            f"The task's file {str(path)!r} is missing: a task has train.parquet and validation.parquet."
        ) from error
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{str(path)!r} is no parquet file that can be read ({first_line(error)}).") from error


def _task_of_folder(name: str, train: pa.Table) -> Task:
    for columns in (("sentence",), ("text",), ("sentence1", "sentence2")):
        if set(columns) <= set(train.column_names):
            return Task(name, columns, num_labels=0)
    raise UserError(
        f"The task {name!r} has no text column: it has {', '.join(train.column_names)}; "
        "name it sentence, text, or sentence1 and sentence2."
    )


def _download(task: Task) -> tuple[pa.Table, pa.Table]:
    from datasets import load_dataset
    from huggingface_hub import HfApi, is_offline_mode

    try:
        if not is_offline_mode():
            HfApi().dataset_info("nyu-mll/glue", timeout=4)  # fails at once without a network
        splits = load_dataset("nyu-mll/glue", task.name).with_format("arrow")
    except Exception as error:  # a hub that fails raises anything
        raise UserError(
            f"The task {task.name!r} cannot be loaded from the hub ({first_line(error)}): "
            "give a folder with train.parquet and validation.parquet."
        ) from error
    return splits["train"][:], splits[task.validation][:]


def _columns(task: Task, table: pa.Table, where: str) -> Columns:
    missing = [name for name in (*task.columns, "label") if name not in table.column_names]
    if missing:
        raise UserError(f"The {where} lack the column {missing[0]!r}: they have {', '.join(table.column_names)}.")
    if not table.num_rows:
        raise UserError(f"There are no {where}: give at least one.")
    columns = {name: table.column(name).to_pylist() for name in (*task.columns, "label")}
    for name in task.columns:
        for row, value in enumerate(columns[name]):
            if not isinstance(value, str):
                raise UserError(f"Row {row} (from 0) of the {where} has {value!r} in {name!r}: give text.")
    kinds, wanted = ((int, float), "finite") if task.num_labels == 1 else ((int,), "whole")
    for row, label in enumerate(columns["label"]):
        if isinstance(label, bool) or not isinstance(label, kinds) or not math.isfinite(label):
            raise UserError(f"Row {row} (from 0) of the {where} has the label {label!r}: give a {wanted} number.")
    return columns


def _count_labels(task: Task, train: list[int], validation: list[int], source: str) -> int:
    seen = sorted(set(train))
    num_labels = task.num_labels or max(2, len(seen))
    if seen != list(range(num_labels)):
        raise UserError(
            f"The training rows of {source!r} have the labels {', '.join(map(str, seen[:10]))}: "
            f"every label from 0 to {num_labels - 1} must occur, and no other."
        )
    unknown = sorted(set(validation) - set(seen))
    if unknown:
        raise UserError(f"The validation rows of {source!r} have the label {unknown[0]}, which no training row has.")
    return num_labels


class LengthGroupedSampler(Sampler[int]):
    """An order in which rows of similar length share a batch; another one each epoch.

    Args:
        lengths: length of every row, in tokens.
        batch_size: rows a batch.
        seed: of the order, with the epoch.
    """

    # Rows are sorted within pieces of so many batches: enough to save padding, few enough to mix rows.
    BATCHES_A_PIECE = 50

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = np.array(lengths), batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning's Trainer calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        rows = generator.permutation(len(self))
        step = self.BATCHES_A_PIECE * self.batch_size
        pieces = [rows[start : start + step] for start in range(0, len(rows), step)]
        rows = np.concatenate([piece[np.argsort(self.lengths[piece], kind="stable")] for piece in pieces])
        # The last batch, where it is not full, stays last: in between it would shift all later ones.
        full = len(rows) - len(rows) % self.batch_size
        batches = generator.permutation(rows[:full].reshape(-1, self.batch_size))
        yield from [*batches.flatten().tolist(), *rows[full:].tolist()]


class GLUEDataModule(pl.LightningDataModule):
    """Batches of a task, padded to their longest row: ``input_ids`` (B, T), ``attention_mask`` (B, T), ``labels`` (B,).

    Training rows come grouped by length, in another order each epoch; validation rows come sorted by length.

    Args:
        task: the task with its rows.
        tokenizer: the classifier's.
        batch_size: rows a batch.
        max_length: longer rows are cut, in tokens; with the special tokens.
        seed: of the order of the training rows.
    """

    def __init__(
        self,
        task: LoadedTask,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 32,
        max_length: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.task, self.tokenizer = task, tokenizer
        self.batch_size, self.max_length, self.seed = batch_size, max_length, seed
        self.rows: tuple[list[dict[str, Any]], ...] = ()

    def setup(self, stage: str | None = None) -> None:
        """Tokenise all rows, once."""
        if not self.rows:
            self.rows = self._tokenise(self.task.train), self._tokenise(self.task.validation)

    def _tokenise(self, columns: Columns) -> list[dict[str, Any]]:
        texts = [columns[name] for name in self.task.task.columns]
        encoded = {**self.tokenizer(*texts, truncation=True, max_length=self.max_length), "labels": columns["label"]}
        return [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)]

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Rows of similar length together, shuffled by seed and epoch."""
        rows = self.rows[0]
        return self._loader(
            rows, LengthGroupedSampler([len(row["input_ids"]) for row in rows], self.batch_size, self.seed)
        )

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Rows sorted by length."""
        return self._loader(sorted(self.rows[1], key=lambda row: len(row["input_ids"])))

    def _loader(self, rows: Any, sampler: Sampler[int] | None = None) -> DataLoader[dict[str, Any]]:
        collate = DataCollatorWithPadding(self.tokenizer)
        return DataLoader(rows, batch_size=self.batch_size, sampler=sampler, collate_fn=collate)
