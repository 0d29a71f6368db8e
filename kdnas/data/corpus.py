"""Rows of text in a file: those to learn from, and those held out."""

import hashlib
import logging
import os
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from kdnas.data.masking import IntArray
from kdnas.data.readers import all_rows
from kdnas.system.errors import UserError
from kdnas.system.files import KeptFile, placed

log = logging.getLogger(__name__)

# A source with a smaller share of usable rows is the wrong one, or the wrong column.
LEAST_USABLE = 0.01
_SPLITS = (None, "train", "held_out")


class Texts(Sequence[str]):
    """Rows of UTF-8 text in a file, by their first bytes and sizes; each is read when needed."""

    def __init__(self, file: KeptFile, starts: IntArray, sizes: IntArray) -> None:
        self._file = file
        self._starts = starts
        self._sizes = sizes

    def __len__(self) -> int:
        return len(self._sizes)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[i] for i in range(len(self))[place]]
        return self._file.piece(int(self._starts[place]), int(self._sizes[place])).decode()

    def take(self, places: IntArray) -> "Texts":
        """Some of the rows, in this order."""
        return Texts(self._file, self._starts[places], self._sizes[places])


@dataclass(frozen=True)
class Corpus:
    """Distinct rows of text, split into two parts that share none.

    Args:
        texts: the rows to learn from, in the order of the source, then the held-out rows.
        num_train: how many are to learn from.
        dropped: how many rows were left out because they were ``empty`` or a ``duplicate``.
    """

    texts: Texts
    num_train: int
    dropped: dict[str, int]

    @property
    def train(self) -> Texts:
        """The rows to learn from."""
        return self.texts.take(np.arange(self.num_train))

    @property
    def held_out(self) -> Texts:
        """The rows that nothing is trained on."""
        return self.texts.take(np.arange(self.num_train, len(self.texts)))


def load_corpus(
    text: str,
    *,
    column: str = "text",
    held_out_fraction: float = 0.05,
    seed: int = 0,
    folder: Path | None = None,
) -> Corpus:
    """Read rows of text and split them into training and held-out rows.

    A column ``split`` with the values ``train`` and ``held_out`` decides where it is filled. All
    other rows are drawn by a hash of seed and text, so that neither their order nor other rows
    matter. Each part gets at least one row.

    Args:
        text: a ``.parquet``, ``.jsonl``, ``.json`` (one object a line), ``.csv``, ``.tsv`` or
            ``.txt`` (one row a line) file, a folder of such files, or the ``owner/name`` or
            ``owner/name:config`` of a data set on the Hugging Face hub (its train split).
        column: the column that holds the text; a ``.txt`` file has only one.
        held_out_fraction: share of the rows to hold out, between 0 and 1.
        seed: another seed holds out other rows.
        folder: where to put the rows, in a file without a name that is removed with the corpus;
            by default the system's folder for temporary files.

    Raises:
        UserError: the source is missing, unreadable, truncated or not UTF-8, lacks the column,
            holds a value that is no text or a forbidden character, has fewer than two usable rows,
            or too few of them usable.
    """
    sizes, digests, splits = array("q"), bytearray(), bytearray()
    num_empty = 0
    with placed(folder or Path(tempfile.gettempdir())), tempfile.TemporaryFile(dir=folder) as file:
        for row, split in all_rows(text, column):
            if row is None or not row.strip():
                num_empty += 1
                continue
            content = row.encode()
            digests += hashlib.sha256(f"{seed}\n".encode() + content).digest()[:16]
            splits.append(_SPLITS.index(split or None))
            sizes.append(file.write(content))
        file.flush()
        kept = KeptFile(os.dup(file.fileno()))

    lengths = np.frombuffer(sizes, np.int64)
    texts = Texts(kept, np.cumsum(lengths) - lengths, lengths)
    _, first = np.unique(np.frombuffer(digests, "S16"), return_index=True)
    first.sort()
    dropped = {"empty": num_empty, "duplicate": len(texts) - len(first)}
    texts = texts.take(first)
    _check_usable(text, column, len(texts), dropped)

    hashes = np.frombuffer(digests, ">u8")[::2][first]
    shares = (hashes >> 16) / 2**48  # in [0, 1)
    is_held_out = _held_out(text, np.frombuffer(splits, np.uint8)[first], shares, held_out_fraction)
    train_first = np.argsort(is_held_out, kind="stable")
    return Corpus(texts.take(train_first), int((~is_held_out).sum()), dropped)


def _check_usable(text: str, column: str, num_usable: int, dropped: dict[str, int]) -> None:
    if num_usable < 2:
        found = "only one usable row" if num_usable else "no usable rows"
        raise UserError(
            f"{text!r} has {found} ({dropped}): give at least two distinct rows of text."
        )
    num_rows = num_usable + sum(dropped.values())
    if num_usable < LEAST_USABLE * num_rows:
        raise UserError(
            f"{text!r} has {num_rows:,} rows, and only {num_usable:,} of them are usable "
            f"({dropped}): is {column!r} the right column? Remove the others if it is."
        )
    if any(dropped.values()):
        counts = " and ".join(f"{count:,} {why}" for why, count in dropped.items() if count)
        log.warning("%r: %s rows are left out.", text, counts)


def _held_out(
    text: str, splits: npt.NDArray[np.uint8], shares: npt.NDArray[np.float64], fraction: float
) -> npt.NDArray[np.bool_]:
    """Which rows are held out: those that say so, and of those that say nothing a drawn share."""
    given = {_SPLITS[split] for split in np.unique(splits)}
    undecided = np.flatnonzero(splits == _SPLITS.index(None))
    fewest = int("held_out" not in given)
    most = len(undecided) - int("train" not in given)
    if fewest > most:
        raise UserError(
            f"All rows of {text!r} have the split {given.pop()!r}: "
            "give 'train' and 'held_out', or neither."
        )
    shares = shares[undecided]
    num_drawn = int((shares < fraction).sum())
    num_drawn = min(max(num_drawn, fewest), most)
    is_held_out = splits == _SPLITS.index("held_out")
    is_held_out[undecided[np.argsort(shares, kind="stable")[:num_drawn]]] = True
    return is_held_out
