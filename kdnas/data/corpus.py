"""Rows of text in a file: those to learn from, and those held out.

The hash of a row's text is its place on a circle, whatever the seed. A seed turns the circle, and
held out is the arc where it then begins. So what is made of the rows, which is paired with the next
on the circle, serves every seed and every share of held-out rows.
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

# A source with a smaller share of usable rows is the wrong one, or the wrong column.
LEAST_USABLE = 0.01
SPLITS = (None, "train", "held_out")

HashArray = npt.NDArray[np.uint64]
SplitArray = npt.NDArray[np.uint8]


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
        texts: the rows, in the order of the source.
        hashes: of each row's text, uint64.
        splits: what the source says of each row, as a place in ``SPLITS``, uint8.
        is_held_out: whether nothing is trained on a row.
        dropped: how many rows were left out because they were ``empty`` or a ``duplicate``.
    """

    texts: Texts
    hashes: HashArray
    splits: SplitArray
    is_held_out: npt.NDArray[np.bool_]
    dropped: dict[str, int]

    @property
    def train(self) -> Texts:
        """The rows to learn from."""
        return self.texts.take(np.flatnonzero(~self.is_held_out))

    @property
    def held_out(self) -> Texts:
        """The rows that nothing is trained on."""
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

    A column ``split`` with the values ``train`` and ``held_out`` decides where it is filled. All
    other rows are drawn by a hash of their text and the seed, so that neither their order nor other
    rows matter. Each part gets at least one row.

    Args:
        text: a ``.parquet``, ``.jsonl``, ``.json`` (one object a line), ``.csv``, ``.tsv`` or
            ``.txt`` (one row a line) file, a folder of such files, or the ``owner/name`` or
            ``owner/name:config`` of a data set on the Hugging Face hub (its train split).
        column: the column that holds the text; a ``.txt`` file has only one.
        held_out_fraction: share of the rows to hold out, between 0 and 1.
        fraction: share of the rows that is kept, above 0, drawn by the hash of their text; the
            first two of each split are kept in any case.
        seed: another seed holds out other rows.
        folder: where to put the rows, in a file without a name that is removed with the corpus;
            by default the system's folder for temporary files.

    Raises:
        UserError: the source is missing, unreadable, truncated or not UTF-8, lacks the column,
            holds a value that is no text or a forbidden character, has fewer than two usable rows,
            or too few of them usable.
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
    first = np.sort(order[is_first])  # of equal rows
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
            f"{text!r} has {num_rows:,} rows, and only {num_usable:,} of them are usable "
            f"({dropped}): is {column!r} the right column? Remove the others if it is."
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
    """Where rows are on the circle, from 0 up to 1, when a seed has turned it."""
    turned = hashes - np.random.default_rng(seed).integers(2**64, dtype=np.uint64)  # modulo 2**64
    return (turned >> np.uint64(11)) / 2**53


def draw_held_out(
    splits: SplitArray, shares: npt.NDArray[np.float64], fraction: float
) -> npt.NDArray[np.bool_]:
    """Which rows are held out: those that say so, and of those that say nothing a drawn share."""
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
    """For each row the next one on the circle, of those of which the source says the same."""
    order = np.lexsort((hashes, splits))
    following = np.empty_like(order)
    for group in np.split(order, np.flatnonzero(np.diff(splits[order])) + 1):
        following[group] = np.roll(group, -1)
    return following
