"""Read rows of labelled tasks from parquet, csv and tsv files, and split them."""

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from kdnas.data.readers import check_table
from kdnas.system.errors import UserError, first_line

Columns = dict[str, list[Any]]
SUFFIXES = (".parquet", ".csv", ".tsv")


def find_file(folder: Path, *splits: str) -> Path:
    """Return the path of a split's file: parquet, csv or tsv.

    Args:
        folder: folder of the task.
        splits: possible names of the split, such as ``validation`` and ``dev``; the first name that
            has a file is used.

    Raises:
        UserError: there is no such file.
    """
    paths = [folder / f"{split}{suffix}" for split in splits for suffix in SUFFIXES]
    for path in paths:
        if path.is_file():
            return path
    raise UserError(
        f"The task has no file {str(paths[0])!r}: put it, or a csv or tsv file of this name, into "
        "the task's folder."
    )


def read_table(
    path: Path, text_columns: Sequence[str] = (), header: Sequence[str] = ()
) -> pa.Table:
    """Read a file of rows into an Arrow table.

    Args:
        path: a parquet file; a csv file, in which a field in double quotes may contain commas and
            newlines, and an empty field is null; or a tsv file in GLUE's format, in which quotes
            mean nothing and a tab always ends a field.
        text_columns: columns that are read as text, even if they look like numbers.
        header: column names for a tsv file without a header line (a file whose first line has none
            of ``text_columns``); empty: the file has a header line.

    Raises:
        UserError: the file's suffix is none of ``SUFFIXES``, or the file cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        kinds = ", ".join(SUFFIXES)
        raise UserError(
            f"{str(path)!r} has the suffix {suffix!r}: give a {kinds} file, or a folder."
        )
    try:
        check_table(path, has_header=not header)
        if suffix == ".parquet":
            # partitioning=None: a folder called "label=3" must not become a column.
            return pq.read_table(path, partitioning=None)
        is_csv = suffix == ".csv"
        with path.open(encoding="utf-8-sig") as file:
            first = file.readline().rstrip("\r\n").split("\t")
        has_header = is_csv or not header or bool(set(text_columns) & set(first))
        names = None if has_header else list(header)
        reading = pacsv.ReadOptions(column_names=names, block_size=1 << 26)
        parsing = pacsv.ParseOptions(
            delimiter="," if is_csv else "\t",
            quote_char='"' if is_csv else False,
            newlines_in_values=is_csv,
        )
        converting = pacsv.ConvertOptions(
            column_types=dict.fromkeys(text_columns, pa.string()),
            null_values=[""],
            strings_can_be_null=is_csv,
            true_values=[],
            false_values=[],
        )
        return pacsv.read_csv(path, reading, parsing, converting)
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise UserError(
            f"{str(path)!r} is not a readable {suffix[1:]} file ({first_line(error)}): check "
            "whether it is truncated or has another format."
        ) from error


def part(columns: Columns, text_columns: Sequence[str], share: float) -> tuple[Columns, Columns]:
    """Split rows into training rows and held-out rows; rows with the same text stay together.

    The texts with the smallest hashes are held out, so the split depends only on the texts.

    Args:
        columns: the rows.
        text_columns: the columns that hold a row's text.
        share: share of the distinct texts to hold out; at least one text is held out, and never
            all.

    Returns:
        The training rows and the held-out rows.

    Raises:
        UserError: there are fewer than two distinct texts.
    """
    texts = list(zip(*(columns[name] for name in text_columns), strict=True))
    order = sorted(set(texts), key=lambda text: hashlib.sha256("\0".join(text).encode()).digest())
    if len(order) < 2:
        raise UserError(
            f"The {len(texts)} rows have only {len(order)} distinct texts, so none can be held "
            "out: give at least two."
        )
    held_out = set(order[: min(max(1, round(share * len(order))), len(order) - 1)])
    sides = [
        [i for i, text in enumerate(texts) if (text in held_out) == side] for side in (False, True)
    ]
    train, validation = (
        {name: [values[i] for i in rows] for name, values in columns.items()} for rows in sides
    )
    return train, validation


def in_turn(labels: Sequence[Any], most: int) -> list[int]:
    """Return at most ``most`` random row numbers, one row of each label in turn.

    The draw is the same at each call.

    Args:
        labels: the label of each row.
        most: largest number of rows.
    """
    order = np.random.default_rng(0).permutation(len(labels))
    drawn = pd.Series(labels).iloc[order]
    turns = drawn.groupby(drawn).cumcount()
    return turns.sort_values(kind="stable").index[:most].tolist()
