"""Rows of text, each either a training row or a held-out row.

All hash values, from 0 to 2^64 - 1, form a circle, on which the hash of a row's text is the row's
position. A seed rotates the circle, and the rows in the first part of the rotated circle are held
out. A sentence pair is made of a row and the next row on the circle, among the rows with the same
``split`` in the source. So the pairs are the same for every seed and every share of held-out rows.
"""

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

# A smaller share of usable rows means that the source or the column is the wrong one.
LEAST_USABLE = 0.01
# What a source can say of a row in its column "split"; None: nothing.
SPLITS = (None, "train", "held_out")

HashArray = npt.NDArray[np.uint64]
SplitArray = npt.NDArray[np.uint8]


class Texts(Sequence[str]):
    """Rows of UTF-8 text that stay in a file: a row is read when it is indexed.

    Args:
        file: the file, which holds nothing but the texts of rows.
        starts: byte offset of each row in the file.
        sizes: number of bytes of each row.
    """

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
        """Return the texts of the rows with the numbers ``places``, in the order of ``places``."""
        return Texts(self._file, self._starts[places], self._sizes[places])


@dataclass(frozen=True)
class Corpus:
    """Distinct rows of text, each either a training row or a held-out row.

    Args:
        texts: the rows, in the order of the source.
        hashes: the hash of each row's text, uint64.
        splits: each row's column ``split`` in the source, uint8: 0 for no value, 1 for ``train``, 2
            for ``held_out``.
        is_held_out: True for the rows that no student is trained on.
        dropped: how many rows were left out, by reason: ``empty`` or ``duplicate``.
    """

    texts: Texts
    hashes: HashArray
    splits: SplitArray
    is_held_out: npt.NDArray[np.bool_]
    dropped: dict[str, int]

    @property
    def train(self) -> Texts:
        """The training rows."""
        return self.texts.take(np.flatnonzero(~self.is_held_out))

    @property
    def held_out(self) -> Texts:
        """The held-out rows, on which no student is trained."""
        return self.texts.take(np.flatnonzero(self.is_held_out))


def load_corpus(
    text: str,
    *,
    column: str = "text",
    held_out_fraction: float = 0.05,
    fraction: float = 1.0,
    seed: int = 0,
    folder: Path | None = None,
) -> Corpus:
    """Read rows of text and split them into training and held-out rows.

    If a row's column ``split`` is ``train`` or ``held_out``, the column decides. Otherwise a hash
    of the row's text and the seed decide, whatever the other rows are. There is at least one
    training row and one held-out row.

    Args:
        text: a ``.parquet``, ``.jsonl``, ``.json`` (one object a line), ``.csv``, ``.tsv`` or
            ``.txt`` (one row a line) file, a folder of such files, or the ``owner/name`` or
            ``owner/name:config`` of a data set on the Hugging Face hub (its train split).
        column: the column that holds the text; a ``.txt`` file has only one.
        held_out_fraction: share of the rows to hold out, between 0 and 1.
        fraction: share of the rows to use, above 0, drawn by the hash of their text. The first two
            rows of each kind (``train``, ``held_out``, no split) are always used.
        seed: seed of the draw of held-out rows.
        folder: folder of the unnamed temporary file that holds the rows until the corpus is
            deleted; by default the system's temporary folder.

    Raises:
        UserError: the source is missing, unreadable, truncated or not UTF-8, lacks the column,
            holds a value that is not text, or a text with a forbidden character, has fewer than
            two usable rows or less than 1 % usable rows, or gives all rows the same ``split``.
    """
    sizes, hashes, splits = array("q"), array("Q"), bytearray()
    num_empty, num_skipped, num_kept = 0, 0, [0] * len(SPLITS)
    with placed(folder or Path(tempfile.gettempdir())), tempfile.TemporaryFile(dir=folder) as file:
        for row, name in all_rows(text, column):
            if row is None or not row.strip():
                num_empty += 1
                continue
            content, split = row.encode(), SPLITS.index(name or None)
            digest = hashlib.sha256(content).digest()
            if num_kept[split] >= 2 and int.from_bytes(digest[8:12]) >= fraction * 2**32:
                num_skipped += 1
                continue
            num_kept[split] += 1
            hashes.append(int.from_bytes(digest[:8]))
            splits.append(split)
            sizes.append(file.write(content))
        file.flush()
        kept = KeptFile(os.dup(file.fileno()))

    lengths, all_hashes = np.frombuffer(sizes, np.int64), np.frombuffer(hashes, np.uint64)
    order = np.argsort(all_hashes, kind="stable")
    is_first = np.diff(all_hashes[order], prepend=~all_hashes[order[:1]]) != 0
    first = np.sort(order[is_first])  # the first of each group of equal rows
    dropped = {"empty": num_empty, "duplicate": len(order) - len(first)}
    _check_usable(text, column, len(first), num_skipped, dropped)
    texts = Texts(kept, np.cumsum(lengths) - lengths, lengths).take(first)
    chosen, said = all_hashes[first], np.frombuffer(splits, np.uint8)[first]
    _check_splits(text, said)
    held_out = draw_held_out(said, shares(chosen, seed), held_out_fraction)
    return Corpus(texts, chosen, said, held_out, dropped)


def _check_usable(
    text: str, column: str, num_usable: int, num_skipped: int, dropped: dict[str, int]
) -> None:
    if num_usable < 2:
        found = "only one usable row" if num_usable else "no usable rows"
        raise UserError(
            f"{text!r} has {found} ({dropped}): give at least two distinct rows of text."
        )
    num_usable += num_skipped
    num_rows = num_usable + sum(dropped.values())
    if num_usable < LEAST_USABLE * num_rows:
        raise UserError(
            f"Only {num_usable:,} of the {num_rows:,} rows of {text!r} are usable ({dropped}): "
            f"check that {column!r} is the right column. If it is, remove the unusable rows."
        )
    if any(dropped.values()):
        counts = " and ".join(f"{count:,} {why}" for why, count in dropped.items() if count)
        log.warning("%r: %s rows are left out.", text, counts)


def _check_splits(text: str, splits: SplitArray) -> None:
    for split in ("train", "held_out"):
        if (splits == SPLITS.index(split)).all():
            raise UserError(
                f"All rows of {text!r} have the split {split!r}: "
                "give 'train' and 'held_out', or neither."
            )


def shares(hashes: HashArray, seed: int) -> npt.NDArray[np.float64]:
    """Return for each row a number in [0, 1), which the hash of its text and the seed determine.

    The rows with the lowest numbers are held out. All possible hashes form a circle, which the seed
    rotates; a row's number is the position of the row's hash on the rotated circle.
    """
    turned = hashes - np.random.default_rng(seed).integers(2**64, dtype=np.uint64)  # modulo 2**64
    return (turned >> np.uint64(11)) / 2**53


def draw_held_out(
    splits: SplitArray, shares: npt.NDArray[np.float64], fraction: float
) -> npt.NDArray[np.bool_]:
    """Return an array that is True for the rows to hold out, and False for the others.

    The array has at least one True and at least one False.

    Args:
        splits: each row's column ``split`` in the source: 0 for no value, 1 for ``train``, 2 for
            ``held_out``.
        shares: the result of the function ``shares``: a number in [0, 1) for each row.
        fraction: a row without a split in the source is held out if its number in ``shares`` is
            below ``fraction``.
    """
    undecided = np.flatnonzero(splits == SPLITS.index(None))
    fewest = int(not (splits == SPLITS.index("held_out")).any())
    most = len(undecided) - int(not (splits == SPLITS.index("train")).any())
    shares = shares[undecided]
    num_drawn = min(max(int((shares < fraction).sum()), fewest), most)
    is_held_out = splits == SPLITS.index("held_out")
    if num_drawn:
        is_held_out[undecided[np.argpartition(shares, num_drawn - 1)[:num_drawn]]] = True
    return is_held_out


def next_on_circle(splits: SplitArray, hashes: HashArray) -> IntArray:
    """Return for each row the number of another row with which it can form a pair.

    Of the rows with the same value in ``splits``, this is the one with the next higher hash. The
    row with the highest hash is followed by the one with the lowest.

    Args:
        splits: each row's column ``split`` in the source: 0 for no value, 1 for ``train``, 2 for
            ``held_out``.
        hashes: the hash of each row's text.
    """
    order = np.lexsort((hashes, splits))
    following = np.empty_like(order)
    for group in np.split(order, np.flatnonzero(np.diff(splits[order])) + 1):
        following[group] = np.roll(group, -1)
    return following
