"""Labelled tasks: the nine of GLUE in one table, and any labelled text beside them."""

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdnas.models.families import class_names
from kdnas.models.hub import looked_in, refuse_away
from kdnas.system.errors import UserError, first_line, nearest
from kdnas.tasks.rows import Columns, find_file, in_turn, part, read_table

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A task: which columns are read, what is predicted and how it is scored.

    Args:
        name: GLUE's name on the hub, or the name of the file or folder.
        columns: the one or two text columns; the target is always ``label``.
        num_labels: number of classes; 1 is a regression.
        metrics: keys of ``scores.METRICS``; the score is their mean, over all splits that are scored.
        label_names: names of the classes, where they have any.
        validations: the splits that are scored.
        positive: the class that F1 is of.
        original: where GLUE's own tsv files call a column otherwise, what they call it.
    """

    name: str
    columns: tuple[str, ...]
    num_labels: int = 2
    metrics: tuple[str, ...] = ("accuracy",)
    label_names: tuple[str, ...] = ()
    validations: tuple[str, ...] = ("validation",)
    positive: int = 1
    original: Mapping[str, str] = field(default_factory=dict, compare=False)


# Source: Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform", table 1; columns and names of nyu-mll/glue.
_TABLE = (
    Task("cola", ("sentence",), metrics=("matthews",), label_names=("unacceptable", "acceptable")),
    Task("sst2", ("sentence",), label_names=("negative", "positive")),
    Task(
        "mrpc",
        ("sentence1", "sentence2"),
        metrics=("accuracy", "f1"),
        label_names=("not_equivalent", "equivalent"),
        original={"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
    ),
    Task(
        "stsb",
        ("sentence1", "sentence2"),
        num_labels=1,
        metrics=("pearson", "spearman"),
        original={"label": "score"},
    ),
    Task(
        "qqp",
        ("question1", "question2"),
        metrics=("accuracy", "f1"),
        label_names=("not_duplicate", "duplicate"),
        original={"label": "is_duplicate"},
    ),
    Task(
        "mnli",
        ("premise", "hypothesis"),
        num_labels=3,
        label_names=("entailment", "neutral", "contradiction"),
        validations=("validation_matched", "validation_mismatched"),
        original={"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
    ),
    Task("qnli", ("question", "sentence"), label_names=("entailment", "not_entailment")),
    Task("rte", ("sentence1", "sentence2"), label_names=("entailment", "not_entailment")),
    Task("wnli", ("sentence1", "sentence2"), label_names=("not_entailment", "entailment")),
)
TASKS: Mapping[str, Task] = {task.name: task for task in _TABLE}
# The one tsv file of GLUE's own without a first row of names.
_COLA_HEADER = ("source", "label", "mark", "sentence")


def class_order(task: Task, names: Sequence[str]) -> list[int] | None:
    """For each class of a task its place among a classifier's, by its name in whatever spelling.

    Returns:
        None where one of them has no name there.
    """

    def plain(name: str) -> str:
        return re.sub(r"[\s_-]+", " ", name).casefold()  # NOT-ENTAILMENT is not_entailment

    for spell in (str, plain):  # Spam and spam are two where both are there
        ours, theirs = ([spell(name) for name in side] for side in (task.label_names, names))
        if (
            ours
            and set(ours) <= set(theirs)
            and all(len(set(side)) == len(side) for side in (ours, theirs))
        ):
            return [theirs.index(name) for name in ours]
    return None


def warn_of_names(task: Task, names: Sequence[str], source: str) -> None:
    """Say that classes are taken by their order, where they have names on both sides, and these are unrelated."""
    if task.label_names and not all(name.startswith("LABEL_") for name in names):
        log.warning(
            "The classes of %r are called %s: they are taken for %s of %r, in this order.",
            source,
            ", ".join(names),
            ", ".join(task.label_names),
            task.name,
        )


@dataclass(frozen=True)
class LoadedTask:
    """A task with its rows.

    Args:
        task: what is predicted and how it is scored.
        train: the training rows, as columns: ``task.columns`` and ``label``.
        validations: the rows that are scored, likewise, for each of ``task.validations``.
    """

    task: Task
    train: Columns = field(repr=False)
    validations: Mapping[str, Columns] = field(repr=False)

    @property
    def validation(self) -> Columns:
        """The rows of the first split that is scored."""
        return self.validations[self.task.validations[0]]

    @cached_property
    def sha256(self) -> str:
        """Hash of all rows in their order, the same for every place that they are loaded from."""
        return hashlib.sha256(
            json.dumps([self.train, *self.validations.values()]).encode()
        ).hexdigest()

    def for_classifier(self, config: Any, source: str) -> "LoadedTask":
        """The same rows, their labels numbered as a classifier numbers its classes.

        Args:
            config: the classifier's.
            source: its name.

        Raises:
            UserError: it has another number of classes, and not these among them.
        """
        names = class_names(config)
        order = class_order(self.task, names)
        if order is None and config.num_labels != self.task.num_labels:
            raise UserError(
                f"The student {source!r} has {config.num_labels} outputs, and {self.task.name!r} needs "
                f"{self.task.num_labels}: give the task that it was trained on."
            )
        if order is None:
            warn_of_names(self.task, names, source)
        if order is None or order == list(range(len(names))):
            return self
        task = replace(
            self.task,
            num_labels=len(names),
            label_names=tuple(names),
            positive=order[self.task.positive],
        )
        splits = {
            split: {**rows, "label": [order[label] for label in rows["label"]]}
            for split, rows in {"train": self.train, **self.validations}.items()
        }
        return LoadedTask(task, splits.pop("train"), splits)

    def for_choosing(self, share: float) -> "LoadedTask":
        """The training rows alone, a share of them held out to be scored: to choose settings on.

        Raises:
            UserError: there are too few rows, or a class is among the held-out rows only.
        """
        train, held_out = part(self.train, self.task.columns, share)
        if self.task.num_labels != 1 and (lost := set(held_out["label"]) - set(train["label"])):
            raise UserError(
                f"The label {min(lost)} of {self.task.name!r} has too few training rows to hold any out."
            )
        return LoadedTask(
            replace(self.task, validations=("validation",)), train, {"validation": held_out}
        )

    def save(self, folder: Path, most: int) -> Path:
        """Write a folder that ``load_task`` reads, with at most so many rows of each split: of each label as many.

        Args:
            folder: takes the folder of the task, which has its name.
            most: rows of a split; more training rows where there are more classes.
        """
        place = folder / self.task.name
        place.mkdir(parents=True)
        for split, rows in {"train": self.train, **self.validations}.items():
            chosen = in_turn(rows["label"], max(most, self.task.num_labels))
            few = {name: [values[row] for row in chosen] for name, values in rows.items()}
            if self.task.label_names:
                few["label"] = [self.task.label_names[label] for label in few["label"]]
            pq.write_table(pa.table(few), place / f"{split}.parquet")
        return place


def load_task(source: str) -> LoadedTask:
    """Load a task from a folder, or one of GLUE's from the hub.

    Args:
        source: a folder with ``train`` and ``validation`` (or ``dev``) as parquet, csv or tsv files
            (``validation_matched`` and ``validation_mismatched`` for MNLI), or a key of ``TASKS``, which is loaded from
            the hub. A folder of such a name (``stsb`` or ``STS-B``) has GLUE's columns, as on the hub or in GLUE's own
            tsv files. Any other has ``sentence``, ``text``, or ``sentence1`` and ``sentence2``, and ``label``: see
            ``load_labelled``.

    Raises:
        HubAway: the hub does not answer.
        UserError: it is neither; the hub has not got it; a file or a column is missing, cannot be read, or is empty;
            a text is no string; a label is no whole number (a regression: no finite number), is outside 0 to n-1 or
            leaves a gap there, or is in the validation rows only.
    """
    if not os.path.isdir(source):  # Path("") would be the current folder
        if os.path.isfile(source):
            suffix = Path(source).suffix
            raise UserError(
                f"The task {source!r} is a file: give a folder with its rows as train{suffix}, columns text and label, "
                f"and others as validation{suffix}; `kdnas glue --data` takes one file and splits it."
            )
        if source not in TASKS:
            raise UserError(
                f"The task {source!r} is no folder, and no task of GLUE.{nearest(source, TASKS, True)}"
            )
        return _loaded(TASKS[source], *_download(TASKS[source]), source)
    folder = Path(source).resolve()
    task = TASKS.get(folder.name.lower().replace("-", ""))
    if task is None:
        columns = _text_columns(folder.name, read_table(find_file(folder, "train")))
        return load_labelled(source, columns, "label")
    files = [find_file(folder, "train")]
    files += [
        find_file(folder, split, split.replace("validation", "dev")) for split in task.validations
    ]
    texts = [*task.columns, *(task.original.get(name, name) for name in task.columns)]
    header = _COLA_HEADER if task.name == "cola" else ()
    train, *validations = (read_table(file, texts, header) for file in files)
    return _loaded(task, train, validations, source)


def load_labelled(
    data: str, text_columns: Sequence[str], label_column: str, held_out: float = 0.1
) -> LoadedTask:
    """Load any labelled text as a task.

    Labels that are fractional numbers make a regression, scored as STS-B is; whole numbers and text make a
    classification, scored by its accuracy, with the classes that the training rows have.

    Args:
        data: a parquet, csv or tsv file, a share of whose rows is held out and scored (equal texts stay on one side),
            or a folder with ``train`` and ``validation`` (or ``dev``) as such files.
        text_columns: the one column of text, or the two of pairs.
        label_column: the column of labels.
        held_out: share of the rows of a single file.

    Raises:
        UserError: there is no such file or column; a split is empty; a text is no string; a label is neither text nor a
            finite number, or no training row has it; or there is one class only.
    """
    if not 1 <= len(set(text_columns)) == len(text_columns) <= 2 or label_column in text_columns:
        raise UserError(
            f"The text columns are {', '.join(map(repr, text_columns)) or 'not given'} and the label column "
            f"{label_column!r}: give one text column, or two of pairs, beside it."
        )
    path = Path(data)
    if not path.exists():
        raise UserError(
            f"The data {data!r} does not exist: give a file, or a folder with train and validation files."
        )
    files = (
        [find_file(path, "train"), find_file(path, "validation", "dev")]
        if path.is_dir()
        else [path]
    )
    tables = [read_table(file, text_columns) for file in files]
    columns = ("sentence",) if len(text_columns) == 1 else ("sentence1", "sentence2")
    name = (
        path.resolve().name if path.is_dir() else path.stem.strip(".") or "data"
    )  # folders are called so
    task = Task(name, columns, num_labels=0)
    names = dict(zip((*columns, "label"), (*text_columns, label_column), strict=True))
    if label_column in tables[0].column_names and pa.types.is_floating(
        tables[0].column(label_column).type
    ):
        task = replace(task, num_labels=1, metrics=TASKS["stsb"].metrics)
    if len(tables) == 1:
        rows = _columns(task, tables[0], names, f"rows of {data!r}")
        train, validation = part(rows, columns, held_out)
    else:
        train, validation = (
            _columns(task, table, names, f"{split} rows of {data!r}")
            for split, table in zip(("training", "validation"), tables, strict=True)
        )
    if task.num_labels != 1:
        classes = sorted(set(train["label"]), key=lambda label: (isinstance(label, str), label))
        if len(classes) < 2:
            raise UserError(
                f"All training rows of {data!r} have the label {classes[0]!r}: give two classes or more."
            )
        _refuse_unseen(train, validation, data)
        ids = {label: number for number, label in enumerate(classes)}
        for rows in (train, validation):
            rows["label"] = [ids[label] for label in rows["label"]]
        plain = classes == list(range(len(classes)))
        task = replace(
            task, num_labels=len(ids), label_names=() if plain else tuple(map(str, classes))
        )
    return LoadedTask(task, train, {"validation": validation})


def _loaded(
    task: Task, train: pa.Table, validations: Sequence[pa.Table], source: str
) -> LoadedTask:
    """One of GLUE's tasks from its tables."""
    splits = []
    for table, where in zip((train, *validations), ("train", *task.validations), strict=True):
        theirs = {name: task.original.get(name, name) for name in (*task.columns, "label")}
        is_original = theirs["label"] in table.column_names
        names = theirs if is_original else {name: name for name in theirs}
        split = "training" if where == "train" else where
        splits.append(_columns(task, table, names, f"{split} rows of {source!r}"))
    if task.num_labels != 1:
        seen = sorted(set(splits[0]["label"]))
        if seen != list(range(task.num_labels)):
            raise UserError(
                f"The training rows of {source!r} have the labels {', '.join(map(str, seen[:10]))}: "
                f"every label from 0 to {task.num_labels - 1} must occur, and no other."
            )
        for columns in splits[1:]:
            _refuse_unseen(splits[0], columns, source)
    return LoadedTask(task, splits[0], dict(zip(task.validations, splits[1:], strict=True)))


def _text_columns(name: str, train: pa.Table) -> tuple[str, ...]:
    for columns in (("sentence",), ("text",), ("sentence1", "sentence2")):
        if set(columns) <= set(train.column_names):
            others = [
                f.name
                for f in train.schema
                if pa.types.is_string(f.type) and f.name not in (*columns, "label")
            ]
            if others:
                log.warning(
                    "The task %r is read from %s; %s left out: `kdnas glue --data` takes any columns.",
                    name,
                    " and ".join(columns),
                    f"{', '.join(map(repr, others))} {'is' if len(others) == 1 else 'are'}",
                )
            return columns
    raise UserError(
        f"The task {name!r} has no text column: it has {', '.join(train.column_names)}; "
        "name it sentence, text, or sentence1 and sentence2."
    )


def _download(task: Task) -> tuple[pa.Table, list[pa.Table]]:
    from datasets import load_dataset
    from huggingface_hub import HfApi, is_offline_mode

    try:
        if not is_offline_mode():
            HfApi().dataset_info("nyu-mll/glue", timeout=4)  # fails at once without a network
        splits = load_dataset("nyu-mll/glue", task.name).with_format("arrow")
    except Exception as error:  # a hub that fails raises anything
        refuse_away(
            error,
            f"the task {task.name!r}",
            "give a folder, or HF_HUB_OFFLINE=1 for one in the cache",
        )
        raise UserError(
            f"The task {task.name!r} was not found {looked_in()}: {first_line(error)}; "
            "give a folder with train.parquet and validation.parquet."
        ) from error
    return splits["train"][:], [splits[name][:] for name in task.validations]


def _columns(task: Task, table: pa.Table, names: Mapping[str, str], where: str) -> Columns:
    """The columns of a table under our names (``names``: ours -> the table's), every value checked."""
    missing = [name for name in names.values() if name not in table.column_names]
    if missing:
        raise UserError(
            f"The {where} lack the column {missing[0]!r}: they have {', '.join(table.column_names)}."
        )
    if not table.num_rows:
        raise UserError(f"There are no {where}: give at least one.")
    columns: Columns = {ours: table.column(theirs).to_pylist() for ours, theirs in names.items()}
    for name in task.columns:
        _check(
            columns[name], lambda text: isinstance(text, str), where, f"in {names[name]!r}", "text"
        )
    labels = columns["label"]
    if task.label_names:  # GLUE's own files name the classes
        ids = {name: number for number, name in enumerate(task.label_names)}
        labels = columns["label"] = [
            ids.get(label, label) if isinstance(label, str) else label for label in labels
        ]
    kinds: tuple[type, ...] = {0: (int, str), 1: (int, float)}.get(task.num_labels, (int,))
    wanted = {0: "text or a whole number", 1: "a finite number"}.get(
        task.num_labels, "a whole number"
    )

    def is_label(label: Any) -> bool:
        number = isinstance(label, kinds) and not isinstance(label, bool)
        return number and (isinstance(label, str) or math.isfinite(label))

    _check(labels, is_label, where, "as its label", wanted)
    return columns


def _check(
    values: list[Any], is_good: Callable[[Any], bool], where: str, column: str, wanted: str
) -> None:
    bad = [row for row, value in enumerate(values) if not is_good(value)]
    if bad:
        more = f", and so have {len(bad) - 1:,} more" if len(bad) > 1 else ""
        raise UserError(
            f"Row {bad[0]} (from 0) of the {where} has {values[bad[0]]!r} {column}{more}: "
            f"give {wanted}, or leave such rows out."
        )


def _refuse_unseen(train: Columns, validation: Columns, source: str) -> None:
    unknown = sorted(set(validation["label"]) - set(train["label"]), key=str)
    if unknown:
        raise UserError(
            f"The validation rows of {source!r} have the label {unknown[0]!r}, which no training row has: "
            "give some, or leave it out."
        )
