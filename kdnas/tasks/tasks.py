"""Labelled tasks: the nine GLUE tasks, and tasks from any labelled text."""

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdnas.models.families import class_names, has_classifier
from kdnas.models.hub import from_hub
from kdnas.system.errors import UserError, nearest
from kdnas.tasks.rows import Columns, find_file, in_turn, part, read_table

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A task: which columns are read, what is predicted and how it is scored.

    Args:
        name: the GLUE name on the hub, or the name of the file or folder.
        columns: the one or two text columns; the label column is always ``label``.
        num_labels: number of classes; 1 means regression.
        metrics: keys of ``kdnas.tasks.scores.METRICS``; the score is the mean of these metrics over
            all validation splits.
        label_names: names of the classes, in the order of their ids; () if they have none.
        validations: names of the validation splits, which are scored; only MNLI has two.
        positive: id of the class for which F1 is computed.
        original: maps columns to their names in GLUE's own tsv files, if these names differ.
    """

    name: str
    columns: tuple[str, ...]
    num_labels: int = 2
    metrics: tuple[str, ...] = ("accuracy",)
    label_names: tuple[str, ...] = ()
    validations: tuple[str, ...] = ("validation",)
    positive: int = 1
    original: Mapping[str, str] = field(default_factory=dict, compare=False)


# Source: Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform", table 1; columns and
# names are those of nyu-mll/glue.
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
# CoLA is the only task whose tsv files, as GLUE publishes them, have no header.
_COLA_HEADER = ("source", "label", "mark", "sentence")


def class_order(task: Task, names: Sequence[str]) -> list[int] | None:
    """Match a task's classes to a classifier's classes by name.

    Args:
        task: the task.
        names: class names of the classifier, in the order of its outputs.

    Returns:
        For each class of the task, its position in ``names``; None if a class is missing there, the
        names are not unique, or the task's classes have no names.
    """

    def plain(name: str) -> str:
        return re.sub(r"[\s_-]+", " ", name).casefold()  # NOT-ENTAILMENT equals not_entailment

    for spell in (str, plain):  # exact names first: there may be both Spam and spam
        ours, theirs = ([spell(name) for name in side] for side in (task.label_names, names))
        are_unique = all(len(set(side)) == len(side) for side in (ours, theirs))
        if ours and set(ours) <= set(theirs) and are_unique:
            return [theirs.index(name) for name in ours]
    return None


def warn_of_names(task: Task, names: Sequence[str], source: str) -> None:
    """Warn, if task and classifier both name the classes, that these are matched by position.

    Args:
        task: the task.
        names: class names of the classifier.
        source: name of the classifier, for the message.
    """
    if task.label_names and not all(name.startswith("LABEL_") for name in names):
        said = (
            "The classes of %r (%s) have other names than %s of %r: they are matched by position."
        )
        log.warning(said, source, ", ".join(names), ", ".join(task.label_names), task.name)


def warn_of_head(task: Task, config: Any, source: str) -> None:
    """Warn if the head of checkpoint ``source`` has other outputs or class names than the task."""
    if not has_classifier(config):
        return
    names = class_names(config)
    if config.num_labels != task.num_labels:
        said = "The model %r has a head of another task (outputs: %d; %r needs %d): it is replaced."
        log.warning(said, source, config.num_labels, task.name, task.num_labels)
    elif class_order(task, names) != list(range(len(names))):
        warn_of_names(task, names, source)


@dataclass(frozen=True)
class LoadedTask:
    """A labelled task with its rows.

    Args:
        task: what is predicted and how it is scored.
        train: the training rows: maps each of ``task.columns``, and ``label``, to a list of values.
        validations: the rows to score on, in the form of ``train``, for each split in
            ``task.validations``.
    """

    task: Task
    train: Columns = field(repr=False)
    validations: Mapping[str, Columns] = field(repr=False)

    @property
    def validation(self) -> Columns:
        """The rows of the first validation split; every task but MNLI has only one."""
        return self.validations[self.task.validations[0]]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of all rows in order, whatever the format of their files."""
        rows = json.dumps([self.train, *self.validations.values()])
        return hashlib.sha256(rows.encode()).hexdigest()

    def for_classifier(self, config: Any, source: str) -> "LoadedTask":
        """Return the task with labels renumbered to the class ids of a classifier.

        Classes are matched by name. If that fails, but task and classifier have equally many
        classes, they are matched by position.

        Args:
            config: config of the classifier.
            source: name of the classifier in messages.

        Raises:
            UserError: the class names do not match, and the classifier has more or fewer classes
                than the task.
        """
        names = class_names(config)
        order = class_order(self.task, names)
        if order is None:
            if config.num_labels != self.task.num_labels:
                raise UserError(
                    f"The student {source!r} has {config.num_labels} outputs, but the task "
                    f"{self.task.name!r} needs {self.task.num_labels}: give the task that the "
                    "student was trained on."
                )
            warn_of_names(self.task, names, source)
            return self
        if order == list(range(len(names))):
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
        """Return a task to choose hyperparameters on: it is validated on held-out training rows.

        Args:
            share: share of the distinct texts that is held out and scored.

        Raises:
            UserError: there are too few rows, or a class occurs only in held-out rows.
        """
        train, held_out = part(self.train, self.task.columns, share)
        if self.task.num_labels != 1 and (lost := set(held_out["label"]) - set(train["label"])):
            raise UserError(
                f"The label {min(lost)} of {self.task.name!r} has so few training rows that none "
                "can be held out: add rows with this label, or leave out --grid."
            )
        task = replace(self.task, validations=("validation",))
        return LoadedTask(task, train, {"validation": held_out})

    def save(self, folder: Path, most: int) -> Path:
        """Write a sample of the rows to ``<folder>/<task name>``, which ``load_task`` can read.

        Args:
            folder: where the folder of the task is made.
            most: largest number of rows per split, but at least the number of classes; rows are
                drawn evenly over the labels.

        Returns:
            The folder of the task.
        """
        from datasets import ClassLabel, Features, Value

        schema = None
        if names := list(self.task.label_names):
            texts = dict.fromkeys(self.task.columns, Value("string"))
            schema = Features(texts | {"label": ClassLabel(names=names)}).arrow_schema
        place = folder / self.task.name
        place.mkdir(parents=True)
        for split, rows in {"train": self.train, **self.validations}.items():
            chosen = in_turn(rows["label"], max(most, self.task.num_labels))
            few = {name: [values[row] for row in chosen] for name, values in rows.items()}
            pq.write_table(pa.table(few, schema), place / f"{split}.parquet")
        return place


def load_task(source: str) -> LoadedTask:
    """Load a task from a folder, or a GLUE task from the hub.

    Args:
        source: a key of ``TASKS``, which is loaded from the hub, or a folder with ``train`` and
            ``validation`` (or ``dev``) as parquet, csv or tsv files (for MNLI,
            ``validation_matched`` and ``validation_mismatched``). A folder named like a GLUE task
            (``stsb`` or ``STS-B``) must have the columns of that task, as on the hub or in GLUE's
            own tsv files. Any other folder must have ``label`` (text, whole numbers or, for a
            regression, floating-point numbers), and ``sentence``, ``text``, or both ``sentence1``
            and ``sentence2``.

    Raises:
        HubAway: the hub does not answer.
        UserError: there is no such task; a file or column is missing, unreadable or empty; or a
            text or label has the wrong type.
    """
    if not os.path.isdir(source):  # Path("") would be the current folder
        if os.path.isfile(source):
            suffix = Path(source).suffix
            raise UserError(
                f"The task {source!r} is a file: give a folder with train{suffix} (columns text "
                f"and label) and validation{suffix}, or use `kdnas glue --data`, which splits one "
                "file."
            )
        if source not in TASKS:
            hint = nearest(source, TASKS, True)
            raise UserError(f"The task {source!r} is neither a folder nor a GLUE task.{hint}")
        return _loaded(TASKS[source], *_download(TASKS[source]), source)

    folder = Path(source).resolve()
    task = TASKS.get(folder.name.lower().replace("-", ""))
    if task is None:
        columns = _text_columns(folder.name, read_table(find_file(folder, "train")))
        return load_labelled(source, columns, "label")
    splits = [(split, split.replace("validation", "dev")) for split in task.validations]
    files = [find_file(folder, "train"), *(find_file(folder, *names) for names in splits)]
    texts = [*task.columns, *(task.original.get(name, name) for name in task.columns)]
    header = _COLA_HEADER if task.name == "cola" else ()
    train, *validations = (read_table(file, texts, header) for file in files)
    return _loaded(task, train, validations, source)


def load_labelled(
    data: str, text_columns: Sequence[str], label_column: str, held_out: float = 0.1
) -> LoadedTask:
    """Load any labelled text as a task.

    A label column of floating-point numbers makes a regression, scored like STS-B. Whole numbers or
    text make a classification, scored by accuracy, with the classes of the training rows. Text
    labels, or a ``ClassLabel`` of the library ``datasets``, give the classes their names.

    Args:
        data: a folder with ``train`` and ``validation`` (or ``dev``) as parquet, csv or tsv files,
            or one such file, of which a share is held out and scored (equal texts stay together).
        text_columns: the text column, or the two columns of a pair.
        label_column: the column of labels.
        held_out: share of a single file's distinct texts that is held out.

    Raises:
        UserError: there is no such file or column; a split is empty; a text is not a string; a
            label is neither text nor a finite number, or does not occur in the training rows; or
            there is only one class.
    """
    if not 1 <= len(set(text_columns)) == len(text_columns) <= 2 or label_column in text_columns:
        raise UserError(
            f"text_column is {', '.join(map(repr, text_columns)) or 'empty'} and label_column is "
            f"{label_column!r}: give one or two text columns, and another label column."
        )
    path = Path(data)
    if not path.exists():
        raise UserError(
            f"The data {data!r} does not exist: give a file, or a folder with train and validation "
            "files."
        )
    if path.is_dir():
        name = path.resolve().name
        files = [find_file(path, "train"), find_file(path, "validation", "dev")]
    else:
        name = path.stem.strip(".") or "data"  # it must be able to name a folder
        files = [path]
    tables = [read_table(file, text_columns) for file in files]

    columns = ("sentence",) if len(text_columns) == 1 else ("sentence1", "sentence2")
    names = dict(zip((*columns, "label"), (*text_columns, label_column), strict=True))
    task = Task(name, columns, num_labels=0)
    there = tables[0].column_names
    if label_column in there and pa.types.is_floating(tables[0].column(label_column).type):
        task = replace(task, num_labels=1, metrics=TASKS["stsb"].metrics)

    if len(tables) == 1:
        rows = _columns(task, tables[0], names, f"rows of {data!r}")
        train, validation = part(rows, columns, held_out)
    else:
        train = _columns(task, tables[0], names, f"training rows of {data!r}")
        validation = _columns(task, tables[1], names, f"validation rows of {data!r}")
    if task.num_labels != 1:
        task = _number_classes(task, train, validation, data, _class_names(tables[0], label_column))
    return LoadedTask(task, train, {"validation": validation})


def _class_names(table: pa.Table, column: str) -> list[str]:
    """Return the class names of a ``datasets.ClassLabel`` column, or [] for any other column."""
    if b"huggingface" not in (table.schema.metadata or {}):
        return []
    from datasets import ClassLabel, Features

    feature = Features.from_arrow_schema(table.schema).get(column)
    return list(feature.names) if isinstance(feature, ClassLabel) else []


def _number_classes(
    task: Task, train: Columns, validation: Columns, source: str, order: Sequence[str]
) -> Task:
    """Replace labels by class ids, in place, and return the task with its number of classes.

    Labels that are numbers get the first ids, in ascending order, then text labels in the given
    ``order``; text labels that ``order`` lacks get the last ids, sorted.
    """
    place = {name: number for number, name in enumerate(order)}
    classes = sorted(
        set(train["label"]),
        key=lambda label: (isinstance(label, str), place.get(label, len(place)), label),
    )
    if len(classes) < 2:
        raise UserError(
            f"All training rows of {source!r} have the label {classes[0]!r}: "
            "give two classes or more."
        )
    _refuse_unseen(train, validation, source)
    ids = {label: number for number, label in enumerate(classes)}
    for rows in (train, validation):
        rows["label"] = [ids[label] for label in rows["label"]]
    is_numbered = classes == list(range(len(classes)))
    label_names = () if is_numbered else tuple(map(str, classes))
    return replace(task, num_labels=len(ids), label_names=label_names)


def _loaded(
    task: Task, train: pa.Table, validations: Sequence[pa.Table], source: str
) -> LoadedTask:
    """Check the tables of a GLUE task, and return the task together with their rows."""
    splits = []
    for table, where in zip((train, *validations), ("train", *task.validations), strict=True):
        names = {name: name for name in (*task.columns, "label")}
        if task.original.get("label", "label") in table.column_names:  # GLUE's own file
            names |= task.original
        split = "training" if where == "train" else where
        splits.append(_columns(task, table, names, f"{split} rows of {source!r}"))
    if task.num_labels != 1:
        seen = sorted(set(splits[0]["label"]))
        if seen != list(range(task.num_labels)):
            shown = ", ".join(map(str, seen[:10]))
            raise UserError(
                f"The training rows of {source!r} have the labels {shown}, but must have every "
                f"label from 0 to {task.num_labels - 1} and no other: correct them."
            )
        for columns in splits[1:]:
            _refuse_unseen(splits[0], columns, source)
    return LoadedTask(task, splits[0], dict(zip(task.validations, splits[1:], strict=True)))


def _text_columns(name: str, train: pa.Table) -> tuple[str, ...]:
    for columns in (("sentence",), ("text",), ("sentence1", "sentence2")):
        if not set(columns) <= set(train.column_names):
            continue
        texts = [column.name for column in train.schema if pa.types.is_string(column.type)]
        others = [repr(text) for text in texts if text not in (*columns, "label")]
        if others:
            said = (
                "The task %r is read from %s; %s left out: `kdnas glue --data` takes any columns."
            )
            left = f"{', '.join(others)} {'is' if len(others) == 1 else 'are'}"
            log.warning(said, name, " and ".join(columns), left)
        return columns
    raise UserError(
        f"The task {name!r} has no text column, only {', '.join(train.column_names)}: rename the "
        "text column to sentence or text, or two to sentence1 and sentence2."
    )


def _download(task: Task) -> tuple[pa.Table, list[pa.Table]]:
    from datasets import load_dataset

    repo, if_none = "nyu-mll/glue", "give a folder with train.parquet and validation.parquet"
    with from_hub(f"There is no folder {task.name!r} here", repo, "dataset", "a folder", if_none):
        splits = load_dataset(repo, task.name).with_format("arrow")
    return splits["train"][:], [splits[name][:] for name in task.validations]


def _columns(task: Task, table: pa.Table, names: Mapping[str, str], where: str) -> Columns:
    """Return the values of a table's columns; raise an error for missing or wrong values.

    Args:
        task: the task.
        table: the rows of one split.
        names: maps the name of each column in the result to its name in ``table``.
        where: description of the rows, for messages.

    Returns:
        Column name -> list of values. Labels are class ids, the numbers of a regression or, if the
        task's classes have no ids yet, text or whole numbers.
    """
    missing = [name for name in names.values() if name not in table.column_names]
    if missing:
        there = ", ".join(table.column_names)
        raise UserError(f"The {where} lack the column {missing[0]!r}: they have {there}.")
    if not table.num_rows:
        raise UserError(f"There are no {where}: give at least one.")
    columns: Columns = {ours: table.column(theirs).to_pylist() for ours, theirs in names.items()}
    for name in task.columns:
        are_texts = [isinstance(text, str) for text in columns[name]]
        _check(columns[name], are_texts, where, f"in {names[name]!r}", "text")

    if task.num_labels == 0 and (class_names := _class_names(table, names["label"])):
        named = dict(enumerate(class_names))
        columns["label"] = [named.get(label, label) for label in columns["label"]]
    if task.label_names:  # labels in GLUE's own files are class names
        ids: dict[Any, int] = {name: number for number, name in enumerate(task.label_names)}
        columns["label"] = [
            ids[label] if isinstance(label, str) and label in ids else label
            for label in columns["label"]
        ]
    kinds: tuple[type, ...]
    kinds, wanted = (int,), "a whole number"
    if task.num_labels == 0:
        kinds, wanted = (int, str), "text or a whole number"
    elif task.num_labels == 1:
        kinds, wanted = (int, float), "a finite number"
    are_labels = [
        isinstance(label, kinds)
        and not isinstance(label, bool)
        and (isinstance(label, str) or math.isfinite(label))
        for label in columns["label"]
    ]
    _check(columns["label"], are_labels, where, "as its label", wanted)
    return columns


def _check(values: list[Any], are_good: list[bool], where: str, column: str, wanted: str) -> None:
    bad = [row for row, is_good in enumerate(are_good) if not is_good]
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
            f"The validation rows of {source!r} have the label {unknown[0]!r}, which no training "
            "row has: add training rows with it, or leave these rows out."
        )
