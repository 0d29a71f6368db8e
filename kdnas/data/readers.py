"""Readers of text sources: files, folders of files, and data sets on the Hugging Face hub.

A file is parquet, JSON lines, CSV, TSV or plain text.
"""

import csv
import hashlib
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from kdnas.models.hub import from_hub
from kdnas.system.errors import UserError, first_line
from kdnas.system.files import file_sha256, read_stamps, stamp, unique_keys, write_json

# No real text has more columns; the names of a million would take gigabytes, and a whole screen.
MOST_COLUMNS = 10_000
MOST_BYTES = 1 << 26  # of a line, or of a field
# A parquet file is refused if it unpacks to more than MOST_UNPACKED times its size, and to more
# than MUCH bytes of pages or MUCH_IN_ALL bytes of rows. Prose unpacks to 5 times its size; only
# copies of a row unpack to more.
MOST_UNPACKED, MUCH, MUCH_IN_ALL = 200, 1 << 22, 1 << 28
BYTES_A_ROW = 100

Row = tuple[str | None, str | None]  # text and split

# A row group may be as large as its file, so only this many bytes and rows are held at a time (with
# pre_buffer it would be all).
PARQUET_BUFFER, PARQUET_ROWS = 1 << 20, 256


def all_rows(text: str, column: str) -> Iterator[Row]:
    """Yield each row of a source, in order: its text and the value of its column ``split``.

    Args:
        text: a file, a folder, or the name of a data set on the Hugging Face hub.
        column: the column that holds the text.

    Raises:
        UserError: the source is missing or unreadable, lacks the column, or holds a value that is
            not allowed.
    """
    files = _files(text)
    if files is None:
        yield from _checked(text, _hub(text, column), column)
    for path in files or ():
        yield from _checked(str(path), _READERS[path.suffix.lower()](path, column), column)


def some_rows(text: str, column: str, most: int) -> tuple[list[Row], int]:
    """Return up to ``most`` random rows of the source ``text``, and how many rows it has in all.

    The rows are the same at each call. A row is its text, which is in ``column``, and the value of
    its column ``split``.
    """
    generator = random.Random(0)
    kept: list[Row] = []
    number = 0
    for number, row in enumerate(all_rows(text, column), 1):
        place = generator.randrange(number)
        if place < most:
            kept.append(row)
            kept[place], kept[-1] = kept[-1], kept[place]
            del kept[most:]
    return kept, number


def text_sha256(text: str, column: str, known: Path) -> str:
    """Return the hash of the source ``text``: of files' bytes, or of a hub data set's fingerprint.

    The JSON file ``known`` caches each file's hash with its size and modification time. A file is
    hashed again only if one of these has changed. One process hashes a file while others wait.
    Only the fingerprint depends on ``column``, the column that holds the text.
    """
    files = _files(text)
    if files is None:
        parts = [_hub(text, column)._fingerprint]
    else:
        hashes = _file_hashes(text, files, known)
        parts = [f"{path.suffix.lower()} {hashes[str(path.resolve())][2]}" for path in files]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _file_hashes(text: str, files: Sequence[Path], known: Path) -> dict[str, list[Any]]:
    """Return each file's size, modification time and hash by its path; ``known`` caches them."""
    with _readable(text):
        stamps = {str(path.resolve()): stamp(path) for path in files}

    def missing(found: dict[str, list[Any]]) -> list[str]:
        return [path for path, now in stamps.items() if found.get(path, [])[:2] != now]

    if not missing(found := read_stamps(known)):
        return found
    with FileLock(known.with_suffix(".lock")):
        found = read_stamps(known)  # another process may have hashed them
        with _readable(text):
            found |= {path: [*stamps[path], file_sha256(Path(path))] for path in missing(found)}
        write_json(known, found)
    return found


@contextmanager
def _readable(text: str) -> Iterator[None]:
    """Context manager that turns an OSError into a UserError: ``text`` cannot be read."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{text!r} cannot be read ({first_line(error)}): check it and its permissions."
        ) from error


def _files(text: str) -> list[Path] | None:
    """Return the files of a text source, or None if the source is a data set on the hub."""
    kinds = ", ".join(_READERS)
    suffix = Path(text).suffix.lower()
    if os.path.isfile(text):
        if suffix not in _READERS:
            raise UserError(f"{text!r} has the unknown suffix {suffix!r}: give one of {kinds}.")
        return [Path(text)]
    if os.path.isdir(text):
        files = [
            path
            for path in sorted(Path(text).iterdir())
            if path.is_file() and not path.name.startswith(".") and path.suffix.lower() in _READERS
        ]
        if not files:
            raise UserError(
                f"The folder {text!r} contains no text file: put a file into it ({kinds})."
            )
        return files
    if os.path.exists(text):
        raise UserError(f"{text!r} is a pipe or a device: give a file ({kinds}), or a folder.")
    if suffix not in _READERS and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:\w[\w.-]*)?", text):
        return None
    raise UserError(
        f"The text {text!r} does not exist: give a file ({kinds}), a folder, "
        "or a hub data set (owner/name, or owner/name:config)."
    )


def _checked(name: str, rows: Iterable[dict[str, Any]], column: str) -> Iterator[Row]:
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            if column not in row:
                shown = [f"{name!r:.100}" for name in islice(row, 20)]
                columns = ", ".join(shown + ["..."] * (len(row) > 20)) or "none"
                raise UserError(
                    f"{name!r} has no column {column!r} (row {number}): "
                    f"choose from its columns, {columns}."
                )
            value, split = row[column], row.get("split")
            if not isinstance(value, str | None):
                raise UserError(
                    f"{name!r} has the {type(value).__name__} {value!r:.40} in column {column!r}, "
                    f"row {number}: only text is allowed there."
                )
            is_odd = value and (
                "\0" in value or not value.isascii()
            )  # a fast test that most texts pass
            if is_odd and (found := _FORBIDDEN.search(str(value))):
                raise UserError(
                    f"{name!r} has the character {found[0]!r} in row {number}, which is not "
                    "allowed in a text: remove it."
                )
            if split not in (None, "", "train", "held_out"):
                raise UserError(
                    f"Column 'split' of {name!r} has {split!r:.40} in row {number}: give 'train' "
                    "or 'held_out'."
                )
            yield value, split
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name!r} is not UTF-8 in row {number + 1} ({error.reason}): save it as UTF-8."
        ) from error
    except (ValueError, RecursionError, csv.Error, pa.ArrowException, OSError) as error:
        raise UserError(
            f"{name!r} cannot be read at row {number + 1} ({first_line(error)}): check whether the "
            "file is truncated or has another format."
        ) from error


# NUL and unpaired surrogates, both of which JSON can spell.
_FORBIDDEN = re.compile("[\0\ud800-\udfff]")


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_BYTES + 1), b"")):
            if len(line) > MOST_BYTES:
                raise ValueError(f"a line of more than {MOST_BYTES:,} bytes")
            yield line.decode("utf-8" if number else "utf-8-sig")


def _txt(path: Path, column: str) -> Iterator[dict[str, Any]]:
    return ({column: line.rstrip("\r\n")} for line in _lines(path))


def _jsonl(path: Path, column: str) -> Iterator[dict[str, Any]]:
    for line in _lines(path):
        row = json.loads(line, object_pairs_hook=unique_keys) if line.strip() else {column: None}
        if not isinstance(row, dict):
            raise ValueError(
                f"the line holds a {type(row).__name__}, not a JSON object with columns"
            )
        yield row


def _csv(path: Path, column: str) -> Iterator[dict[str, Any]]:
    with _long_fields():
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        rows = csv.DictReader(_lines(path), delimiter=delimiter, strict=True)
        _check_columns(rows.fieldnames or ())
        for row in rows:
            if None in row:
                raise ValueError(
                    "the row has more fields than the header: put texts that contain the "
                    "delimiter in quotes"
                )
            content = "".join(value or "" for value in row.values())
            if delimiter == "\t" and ("\t" in content or "\n" in content):
                raise ValueError(
                    "a field in quotes contains a tab or a newline: if the quotes belong to the "
                    "text, use jsonl"
                )
            yield row


@contextmanager
def _long_fields() -> Iterator[None]:
    """Context manager in which the csv module reads fields of more than 131,072 characters."""
    limit = csv.field_size_limit(MOST_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path, column: str) -> Iterator[dict[str, Any]]:
    if path.stat().st_size:
        with pq.ParquetFile(path, buffer_size=PARQUET_BUFFER, pre_buffer=False) as file:
            _check_columns(file.schema_arrow.names)
            for batch in _batches(path, file, _wanted(file.schema_arrow.names, column)):
                yield from _dicts(batch)


def _dicts(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:  # convert one by one, so that the error comes at its row
        for values in zip(*batch.columns, strict=True):
            yield dict(zip(batch.schema.names, (value.as_py() for value in values), strict=True))
        raise
    yield from rows


def _batches(path: Path, file: pq.ParquetFile, names: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield batches of the columns ``names``; refuse a file that would unpack to far more bytes."""
    packed, metadata = path.stat().st_size, file.metadata
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    unpacked = sum(group.total_byte_size for group in groups)
    if unpacked > max(MUCH, MOST_UNPACKED * packed):
        raise ValueError(
            f"the file has {packed:,} bytes but would unpack to {unpacked:,}, which is refused as "
            "a zip bomb: write it without compression and dictionaries"
        )
    if metadata.num_rows * BYTES_A_ROW > max(MUCH_IN_ALL, 10 * MOST_UNPACKED * packed):
        raise ValueError(
            f"the file has {packed:,} bytes but {metadata.num_rows:,} rows, which is refused as a "
            "zip bomb: remove empty and repeated rows"
        )
    num_rows, num_bytes = PARQUET_ROWS, 0
    if unpacked > 20 * packed:  # a value that is stored once may be in each row
        num_rows = min(num_rows, max(1, MOST_BYTES // unpacked))
    for batch in file.iter_batches(num_rows, columns=names):
        num_bytes += batch.nbytes
        if num_bytes > max(MUCH_IN_ALL, MOST_UNPACKED * packed):
            raise ValueError(
                f"the file has {packed:,} bytes but its first rows unpack to {num_bytes:,}, which "
                "is refused as a zip bomb: write it without compression and dictionaries"
            )
        yield batch


def check_table(path: Path, has_header: bool = True) -> None:
    """Raise an error for a table that has bad column names or unpacks to far more than its size.

    Column names are bad if there are too many, or if two of them are equal.

    Args:
        path: a parquet, csv or tsv file.
        has_header: whether the first row of a csv or tsv file holds the column names.

    Raises:
        ValueError: the table is refused; the message gives the reason.
        OSError: the file cannot be read.
        ArrowException: the parquet file cannot be read.
    """
    if path.suffix.lower() == ".parquet":
        with pq.ParquetFile(path, buffer_size=PARQUET_BUFFER, pre_buffer=False) as file:
            _check_columns(file.schema_arrow.names)
            for _ in _batches(path, file, file.schema_arrow.names):
                pass
    elif has_header:
        is_csv = path.suffix.lower() == ".csv"
        how: Any = {} if is_csv else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        _check_columns(next(csv.reader(_lines(path), **how), ()))


def _check_columns(names: Sequence[str]) -> None:
    if len(names) > MOST_COLUMNS:
        raise ValueError(
            f"the table has {len(names):,} columns, but at most {MOST_COLUMNS:,} are allowed"
        )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"two columns are called {twice[0]!r:.100}")


def _hub(name: str, column: str) -> Any:
    """Return the rows of a hub data set's train split, with only those columns that are read."""
    from datasets import load_dataset

    parts = name.split(":")  # name of the data set and, optionally, of a configuration
    if_none = (
        "give a file, a folder, or another data set "
        "(owner/name:config of one with several configurations)"
    )
    lacking = f"There is no file or folder {name!r} here"
    with from_hub(lacking, parts[0], "dataset", "a file or a folder", if_none):
        rows = load_dataset(*parts, split="train")  # runs no remote code since datasets 4.0
    return rows.select_columns(_wanted(rows.column_names, column))


def _wanted(names: list[str], column: str) -> list[str]:
    """Return the columns to read: ``column`` and ``split``; all if ``column`` does not exist."""
    return [name for name in names if name in (column, "split")] if column in names else names


_READERS: dict[str, Callable[[Path, str], Iterator[dict[str, Any]]]] = {
    ".parquet": _parquet,
    ".jsonl": _jsonl,
    ".json": _jsonl,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _txt,
}
