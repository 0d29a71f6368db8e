"""Rows out of text sources: parquet, JSON lines, CSV, plain text, a folder of them, the hub."""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdnas.models.hub import looked_in, refuse_away
from kdnas.system.errors import UserError, first_line
from kdnas.system.files import file_sha256

Rows = Iterable[tuple[str | None, str | None]]  # text and split

# Of a source with more rows or bytes, so many are read where some are asked for, from so many places.
MOST_ROWS = 50_000
MOST_BYTES = 256 << 20
PLACES = 16
_COUNTED_BYTES = 16 << 20  # of a file: of these the lines are counted
# A row group may be as large as its file: so many bytes and rows of it are held at a time (with pre_buffer, all).
PARQUET_BUFFER, PARQUET_ROWS = 1 << 20, 256


def all_rows(text: str, column: str) -> Rows:
    """Every row of a source, in order: its text, and its split where it has one.

    Args:
        text: as of ``load_corpus``.
        column: that holds the text.

    Raises:
        UserError: as of ``load_corpus``, for the first row that is wrong.
    """
    files = _files(text)
    if files is None:
        yield from _checked(text, _hub(text, column), column)
    for path in files or ():
        yield from _checked(str(path), _READERS[path.suffix.lower()](path, column, 0.0), column)


def some_rows(text: str, column: str) -> tuple[list[tuple[str | None, str | None]], int]:
    """Rows from all over a source, read in seconds however large it is, and about how many it has.

    A source of up to ``MOST_ROWS`` is read whole. Of a larger one as many come from ``PLACES`` places: files, parquet's
    row groups, and anywhere in a file of lines; a csv file, whose fields may hold newlines, is read from its beginning.

    Args:
        text: as of ``load_corpus``.
        column: that holds the text.

    Raises:
        UserError: as of ``load_corpus``, for the first of these rows that is wrong.
    """
    files = _files(text)
    if files is None:
        whole = _hub(text, column)
        chosen = whole.select(range(0, len(whole), max(1, -(-len(whole) // MOST_ROWS))))
        return list(_checked(text, chosen, column)), len(whole)
    some = files[:: -(-len(files) // PLACES)]
    num_bytes, num_bytes_of_some = (
        sum(path.stat().st_size for path in paths) for paths in (files, some)
    )
    num_rows = round(sum(map(_count, some)) * num_bytes / max(1, num_bytes_of_some))
    if num_rows <= MOST_ROWS and num_bytes <= MOST_BYTES:
        rows = list(all_rows(text, column))
        return rows, len(rows)
    found: list[tuple[str | None, str | None]] = []
    num_places = PLACES // len(some)
    for path in some:
        places = min(num_places, _num_starts(path))
        for place in range(places):
            rows_here = max(1, min(MOST_ROWS, num_rows) // (len(some) * places))
            name = f"{path} from {place / places:.0%} on" if place else str(path)
            read = _checked(
                name, _READERS[path.suffix.lower()](path, column, place / places), column
            )
            left = MOST_BYTES // (len(some) * places)
            for row in islice(read, rows_here):
                found.append(row)
                left -= len(row[0] or "")
                if left < 0:
                    break
    return found, num_rows


def text_sha256(text: str, column: str) -> str:
    """The hash of a source: of its files' bytes, or of a hub data set's fingerprint.

    Args:
        text: as of ``load_corpus``; its rows are not looked at.
        column: the column that holds the text.

    Raises:
        UserError: the source is missing or unreadable.
    """
    files = _files(text)
    try:
        if files is None:
            parts = [_hub(text, column)._fingerprint]
        else:
            parts = [f"{path.suffix.lower()} {file_sha256(path)}" for path in files]
    except OSError as error:
        raise UserError(
            f"{text!r} cannot be read ({first_line(error)}): check it and its permissions."
        ) from error
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _files(text: str) -> list[Path] | None:
    """The files of a source, or None where it is a data set of the hub."""
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
            raise UserError(f"The folder {text!r} holds no text: put a file into it ({kinds}).")
        return files
    if suffix not in _READERS and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:\w[\w.-]*)?", text):
        return None
    raise UserError(
        f"The text {text!r} does not exist: give a file ({kinds}), a folder, "
        "or a hub data set (owner/name, or owner/name:config)."
    )


def _count(path: Path) -> int:
    """About how many rows a file has; none where it cannot be told: reading it says why."""
    if path.suffix.lower() == ".parquet":
        try:
            return int(pq.read_metadata(path).num_rows)
        except (pa.ArrowException, OSError):
            return 0
    with path.open("rb") as file:
        head = file.read(_COUNTED_BYTES)
    num_rows = head.count(b"\n")
    if path.suffix.lower() in (".csv", ".tsv"):
        with suppress(csv.Error), _long_fields():  # a text may have several lines
            table = io.StringIO(head.decode("utf-8", "replace"), newline="")
            num_rows = sum(1 for _ in csv.reader(table, delimiter=_delimiter(path)))
    return round(num_rows * path.stat().st_size / max(1, len(head)))


def _num_starts(path: Path) -> int:
    """At how many places reading can begin: a csv's rows may have several lines, and of a parquet groups are read."""
    match path.suffix.lower():
        case ".csv" | ".tsv":
            return 1
        case ".parquet":
            with suppress(pa.ArrowException, OSError):  # reading it says why
                return max(1, int(pq.read_metadata(path).num_row_groups))
            return 1
    return PLACES


def _checked(
    name: str, rows: Iterable[dict[str, Any]], column: str
) -> Iterator[tuple[str | None, str | None]]:
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            if column not in row:
                columns = ", ".join(map(repr, row)) or "none"
                raise UserError(
                    f"{name!r} has no column {column!r} (row {number}): "
                    f"choose from its columns, {columns}."
                )
            value, split = row[column], row.get("split")
            if not isinstance(value, str | None):
                raise UserError(
                    f"{name!r} has {type(value).__name__} {value!r:.40} in column {column!r}, "
                    f"row {number}: give text."
                )
            if value and (found := _FORBIDDEN.search(value)):
                raise UserError(
                    f"{name!r} has the character {found[0]!r} in row {number}: "
                    "no text holds it, remove it."
                )
            if split not in (None, "", "train", "held_out"):
                raise UserError(
                    f"{name!r} has the split {split!r:.40} in row {number}: "
                    "give 'train' or 'held_out'."
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
            f"{name!r} cannot be read at row {number + 1} ({first_line(error)}): "
            "is it cut off, or another format?"
        ) from error


# NUL, and halves of surrogate pairs: JSON can spell both.
_FORBIDDEN = re.compile("[\0\ud800-\udfff]")


def _lines(path: Path, start: float = 0.0) -> Iterator[str]:
    with path.open("rb") as file:
        if start:
            file.seek(int(start * path.stat().st_size))
            file.readline()  # the rest of one
        for number, line in enumerate(file):
            yield line.decode("utf-8" if number or start else "utf-8-sig")


def _txt(path: Path, column: str, start: float) -> Iterator[dict[str, Any]]:
    return ({column: line.rstrip("\r\n")} for line in _lines(path, start))


def _jsonl(path: Path, column: str, start: float) -> Iterator[dict[str, Any]]:
    for line in _lines(path, start):
        row = json.loads(line) if line.strip() else {column: None}
        if not isinstance(row, dict):
            raise ValueError(f"{type(row).__name__}, not an object with columns")
        yield row


def _csv(path: Path, column: str, start: float) -> Iterator[dict[str, Any]]:
    with _long_fields():
        delimiter = _delimiter(path)
        for row in csv.DictReader(_lines(path), delimiter=delimiter, strict=True):
            if None in row:
                raise ValueError(
                    "more fields than the header: a delimiter inside a text needs quotes"
                )
            content = "".join(value or "" for value in row.values())
            if delimiter == "\t" and ("\t" in content or "\n" in content):
                raise ValueError(
                    "a text in quotes with a tab or a newline: if a quote is text, give jsonl"
                )
            yield row


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


@contextmanager
def _long_fields() -> Iterator[None]:
    """A text may be longer than the module's 131,072 characters."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path, column: str, start: float) -> Iterator[dict[str, Any]]:
    if path.stat().st_size:
        with pq.ParquetFile(path, buffer_size=PARQUET_BUFFER, pre_buffer=False) as file:
            names = _wanted(file.schema_arrow.names, column)
            groups = range(int(start * file.num_row_groups), file.num_row_groups)
            for batch in file.iter_batches(PARQUET_ROWS, columns=names, row_groups=groups):
                for values in zip(*batch.columns, strict=True):
                    yield {
                        name: value.as_py()
                        for name, value in zip(batch.schema.names, values, strict=True)
                    }


def _hub(name: str, column: str) -> Any:
    """The rows of a data set on the hub."""
    import datasets
    from huggingface_hub import HfApi, is_offline_mode

    parts = name.split(":")  # its name and, where it has several, that of a configuration
    try:
        if not is_offline_mode():
            # Without a network this fails at once; load_dataset tries for 23 s.
            HfApi().dataset_info(parts[0], timeout=5)
        rows = datasets.load_dataset(*parts, split="train")  # knows no remote code since 4.0
    except Exception as error:  # the HTTP client's own errors among them
        refuse_away(
            error,
            f"the text {name!r}",
            "give a file or a folder, or HF_HUB_OFFLINE=1 for one in the cache",
        )
        raise UserError(
            f"The text {name!r} was not found, here or {looked_in()}: {first_line(error)}; "
            "give a file, a folder, or another data set "
            "(owner/name:config of one with several configurations)."
        ) from error
    return rows.select_columns(_wanted(rows.column_names, column))


def _wanted(names: list[str], column: str) -> list[str]:
    """The columns to read; all of them where ``column`` is missing, for the message."""
    return [name for name in names if name in (column, "split")] if column in names else names


_READERS: dict[str, Callable[[Path, str, float], Iterator[dict[str, Any]]]] = {
    ".parquet": _parquet,
    ".jsonl": _jsonl,
    ".json": _jsonl,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _txt,
}
