"""The data module that turns text into batches of masked tokens.

Mini-KD trains each candidate of a search on some of the training rows, full KD trains a student on
all training rows, and students are scored on held-out rows.
"""

import copy
import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import tokenizers
import torch
import transformers
from filelock import FileLock
from rich.progress import track
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from kdnas.data.corpus import (
    SPLITS,
    Corpus,
    Texts,
    draw_held_out,
    load_corpus,
    next_on_circle,
    shares,
)
from kdnas.data.loader import (
    LengthGroupedBatches,
    ResumableDataModule,
    ResumableLoader,
    outlive_signals,
)
from kdnas.data.masking import Draw, IntArray, Masker, row_generator
from kdnas.data.pairs import make_pair
from kdnas.data.readers import text_sha256
from kdnas.data.tokens import Batch as Batch
from kdnas.data.tokens import TokenRows as TokenRows
from kdnas.data.tokens import is_piece, is_whole, join_pieces, write_piece
from kdnas.models.encoders import find_teacher, max_length
from kdnas.system.errors import UserError
from kdnas.system.files import new_folder
from kdnas.system.pool import num_threads

Split = Literal["mini", "full"]

TOKENS = Path("lightning_logs/tokens")
FORMAT = 2  # of tokenised rows on disk: increase when the code makes other tokens, pairs or masks
CHARACTERS_A_TOKEN = 100  # more than a token has on average, in any language
ROWS_AT_A_TIME = 256  # rows of text in memory at a time
ROWS_A_PIECE = 1 << 14  # rows that one process tokenises at a time
HELD_OUT_TOKENS = 1_000_000  # students are scored on at most so many
# The settings on which the tokenised rows depend.
OF_ROWS = (
    "column",
    "fraction",
    "max_length",
    "pair_share",
    "mask_probability",
    "masked_share",
    "num_mask_variants",
)
ROWS_SEED = 0  # of pairs and masks, whatever the seed in the settings
MIN_PAIR_TOKENS = 8  # room for two cut sentences and up to four special tokens


@dataclass(frozen=True)
class DataSettings:
    """How text is tokenised, split, paired, masked and batched.

    Args:
        column: name of the text column (parquet, jsonl, csv, hub).
        fraction: share of the text's rows to use, above 0 (1: all); the same rows for every seed.
        held_out_fraction: share of the rows that no student ever trains on; candidates are scored
            on them.
        mini_fraction: share of the training rows for each search candidate, above 0 and below 1.
        max_length: tokens of a row, special tokens included; longer rows are cut.
        batch_tokens: largest number of tokens in a batch, padding included.
        pad_to_max_length: pad every row to ``max_length``, so that rows of any length share a
            batch; slower.
        pair_share: share of the rows that become sentence pairs, 0 to 1; rows of fewer than 8 words
            never do. Pairs and masks are the same for every seed.
        mask_probability: share of a masked row's tokens that is masked, 0 to 1.
        masked_share: share of the rows that have masked tokens, 0 to 1; drawn anew for each of a
            row's masks.
        num_mask_variants: number of different masks of a row; epoch e uses mask
            ``e % num_mask_variants``.
        seed: seed of the held-out split, the mini split and the order of batches.
        num_workers: number of processes that load batches.

    Raises:
        UserError: a value is out of its range.
    """

    column: str = "text"
    fraction: float = 1.0
    held_out_fraction: float = 0.05
    mini_fraction: float = 0.3
    max_length: int = 128
    batch_tokens: int = 4096
    pad_to_max_length: bool = False
    pair_share: float = 0.5
    mask_probability: float = 0.15
    masked_share: float = 0.5
    num_mask_variants: int = 1
    seed: int = 0
    num_workers: int = 0

    def __post_init__(self) -> None:
        for name in ("mini_fraction", "held_out_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(
                    f"{name} is {getattr(self, name)}: give a share above 0 and below 1."
                )
        if not 0 < self.fraction <= 1:
            raise UserError(f"fraction is {self.fraction}: give a share above 0, and 1 at most.")
        for name in ("pair_share", "mask_probability", "masked_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}: give a share between 0 and 1.")
        for name, least in dict(max_length=4, num_mask_variants=1, seed=0, num_workers=0).items():
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: give at least {least}.")
        if self.pair_share and self.max_length < MIN_PAIR_TOKENS:
            raise UserError(
                f"max_length is {self.max_length}: sentence pairs need at least {MIN_PAIR_TOKENS} "
                "tokens: give more, or set pair_share to 0."
            )
        if self.seed >= 2**32:
            raise UserError(f"seed is {self.seed}: give at most {2**32 - 1}.")
        if self.batch_tokens < self.max_length:
            raise UserError(
                f"batch_tokens is {self.batch_tokens}: give at least {self.max_length}, so that "
                "one row of max_length fits."
            )


class KDDataModule(ResumableDataModule):
    """Data module of masked batches for distillation, from some or all of the training rows.

    Args:
        teacher: the model whose tokenizer is used: a folder, a hub name, or ``quickstart``.
        text: a parquet, jsonl, csv or txt file, a folder of them, or a hub data set.
        settings: how text becomes batches.
        split: ``mini`` for a share of the training rows, ``full`` for all of them; the held-out
            rows are the same for both.
        folder: folder of the tokenised texts, with a subfolder for each; safe to delete. By default
            ``tokens`` in the folder of all runs.
    """

    def __init__(
        self,
        teacher: str,
        text: str,
        settings: DataSettings = DataSettings(),
        split: Split = "full",
        folder: str | None = None,
    ) -> None:
        super().__init__()
        self.teacher = teacher
        self.text = text
        self.settings = settings
        self.split = split
        self.folder = Path(folder) if folder else TOKENS
        self.prepare: Callable[[Batch], Batch] | None = None  # a thread calls it, one batch ahead
        self._rows: TokenRows | None = None

    @property
    def rows(self) -> TokenRows:
        """The tokenised rows; available after ``setup``."""
        assert self._rows is not None, "call setup() first"
        return self._rows

    def setup(self, stage: str | None = None) -> None:
        """Open the tokenised rows; tokenise the text first if they do not exist.

        One process tokenises it while the others wait. Lightning's ``stage`` is not used.

        Raises:
            UserError: the text or the teacher cannot be used, or ``max_length`` is more tokens than
                the teacher accepts.
        """
        if self._rows is not None:
            return
        settings = self.settings
        teacher = find_teacher(self.teacher)
        longest = max_length(teacher.config)
        if settings.max_length > longest:
            raise UserError(
                f"max_length is {settings.max_length}, but the teacher {self.teacher!r} takes at "
                f"most {longest} tokens: give at most that."
            )
        tokenizer = teacher.tokenizer
        folder = self._whole_folder(tokenizer)
        assert tokenizer.pad_token_id is not None
        self._rows = TokenRows(
            folder, tokenizer.pad_token_id, settings.max_length, settings.pad_to_max_length
        )

    def read_corpus(self) -> Corpus:
        """Read the rows of text and split them into training and held-out rows."""
        settings = self.settings
        return load_corpus(
            self.text,
            column=settings.column,
            held_out_fraction=settings.held_out_fraction,
            fraction=settings.fraction,
            seed=settings.seed,
            folder=self.folder if self.folder.exists() else None,
        )

    def _key(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the hash of all that determines the tokenised rows: text, tokenizer, settings."""
        settings = {name: getattr(self.settings, name) for name in OF_ROWS}
        parts = [
            FORMAT,
            [tokenizers.__version__, transformers.__version__],
            type(tokenizer),
            tokenizer.backend_tokenizer.to_str(),
            tokenizer.truncation_side,
            settings,
            text_sha256(self.text, self.settings.column, self.folder / "texts.json"),
        ]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def _whole_folder(self, tokenizer: PreTrainedTokenizerBase) -> Path:
        """Return the folder of tokenised rows; make it first if it does not exist or is damaged.

        If the text cannot be used, the folders that this call created are removed.
        """
        made = [path for path in (self.folder, self.folder.parent) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            folder = self.folder / self._key(tokenizer)
            if not is_whole(folder):
                self._make(folder, tokenizer)
            return folder
        except UserError:
            for name in ("texts.json", "texts.lock") if made else ():
                (self.folder / name).unlink(missing_ok=True)
            for empty in made:
                with suppress(OSError):
                    empty.rmdir()
            raise

    def _make(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the tokenised rows into ``folder``.

        The work of an earlier call that was killed is continued. Other processes that call this
        wait until the rows are written.
        """
        lock = self.folder / f"{folder.name}.lock"
        pieces = self.folder / f"{folder.name}.pieces"
        with FileLock(lock):
            if is_whole(folder, has_lock=True):  # another process has made it in the meantime
                return
            for leftover in self.folder.glob(f".{folder.name}.*"):
                shutil.rmtree(leftover)
            try:
                corpus = self.read_corpus()
                pieces.mkdir(exist_ok=True)
                self._write_pieces(pieces, corpus, tokenizer)
                with new_folder(folder) as new:
                    join_pieces(
                        new,
                        [piece.path for piece in _pieces(pieces, corpus)],
                        corpus.hashes,
                        corpus.splits,
                        key=folder.name,
                        dropped=corpus.dropped,
                        num_variants=self.settings.num_mask_variants,
                    )
                shutil.rmtree(pieces)
            except UserError:
                lock.unlink()
                shutil.rmtree(pieces, ignore_errors=True)
                raise

    def _write_pieces(
        self, folder: Path, corpus: Corpus, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Tokenise the pieces (ranges of rows) that ``folder`` lacks, with one process per core."""
        settings = self.settings
        masker = Masker(
            tokenizer.mask_token_id,
            len(tokenizer),
            tokenizer.all_special_ids,
            settings.mask_probability,
            ROWS_SEED,
        )
        make_pair_of = self._pair_maker(corpus)

        def write(piece: Piece) -> OSError | None:
            if is_piece(piece.path):
                return None
            rows = self._tokenised(piece.rows, corpus.texts, make_pair_of, tokenizer)
            try:
                write_piece(
                    piece.path,
                    rows,
                    masker,
                    piece.rows.start,
                    settings.num_mask_variants,
                    settings.masked_share,
                )
            except (
                OSError
            ) as error:  # raised in a worker, it would reach the main process without its errno
                return error
            return None

        pieces = _pieces(folder, corpus)
        # Forked workers share the rows and the tokenizer; without fork, this process does the work.
        num_workers = min(num_threads(1), len(pieces)) if sys.platform == "linux" else 0
        done = ResumableLoader(
            pieces,  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=cast(Any, write),
            num_workers=num_workers if num_workers > 1 else 0,
            multiprocessing_context="fork" if num_workers > 1 else None,
            worker_init_fn=outlive_signals,
        )
        is_quiet = len(pieces) < 2
        for error in track(done, "tokens", len(pieces), transient=True, disable=is_quiet):
            if error:
                raise error

    def _tokenised(
        self,
        rows: range,
        texts: Texts,
        make_pair_of: Callable[[int], tuple[str, str] | None],
        tokenizer: PreTrainedTokenizerBase,
    ) -> Iterator[tuple[list[int], int]]:
        """Yield for each row its token ids and the index at which its second sentence begins.

        For a row without a second sentence, the index is the number of its tokens.
        """
        # Cut the text first: a tokenizer makes all tokens of a long row before it truncates them.
        most = CHARACTERS_A_TOKEN * self.settings.max_length
        kept = slice(-most, None) if tokenizer.truncation_side == "left" else slice(most)

        def encode(rows: list[int], *columns: list[str]) -> dict[int, tuple[list[int], int]]:
            if not rows:
                return {}
            encoded = tokenizer(
                *([text[kept] for text in column] for column in columns),
                truncation="longest_first",
                max_length=self.settings.max_length,
                verbose=False,
            )
            found = {}
            for number, row in enumerate(rows):
                ids = encoded["input_ids"][number]
                sentences = encoded.sequence_ids(number)
                found[row] = ids, sentences.index(1) if 1 in sentences else len(ids)
            return found

        for start in range(rows.start, rows.stop, ROWS_AT_A_TIME):
            places = range(start, min(start + ROWS_AT_A_TIME, rows.stop))
            pairs = {i: pair for i in places if (pair := make_pair_of(i))}
            singles = [i for i in places if i not in pairs]
            first = [pair[0] for pair in pairs.values()]
            second = [pair[1] for pair in pairs.values()]
            encoded = encode(singles, [texts[i] for i in singles])
            encoded |= encode(list(pairs), first, second)
            yield from (encoded[i] for i in places)

    def _pair_maker(self, corpus: Corpus) -> Callable[[int], tuple[str, str] | None]:
        """Return a function that takes a row's number and returns the row's sentence pair.

        The function returns None for a row that stays a single sentence. A pair is made from a row
        and another random row of its split (``next_on_circle``).
        """
        share, texts = self.settings.pair_share, corpus.texts
        following = next_on_circle(corpus.splits, corpus.hashes)

        def make(sample_id: int) -> tuple[str, str] | None:
            other = int(following[sample_id])
            generator = row_generator(Draw.PAIR, ROWS_SEED, sample_id)
            if not (generator.random() < share and other != sample_id):
                return None
            return make_pair(texts[sample_id], texts[other], generator)

        return make

    def select(self, split: Split) -> "KDDataModule":
        """Return a copy of this module for ``split``, with the same tokenised rows and masks."""
        other = copy.copy(self)
        other.split = split
        return other

    @cached_property
    def _parts(self) -> tuple[IntArray, IntArray]:
        """Return the numbers of the training rows and of the held-out rows, each in a random order.

        The function ``shares`` gives the random numbers by which rows are sorted. Rows whose
        ``split`` is given in the source are spread evenly among the others. If rows are paired, the
        last training row and the last held-out row can have a partner of the other kind. So each of
        the two is left out, unless it is the only row of its kind.
        """
        rows, settings = self.rows, self.settings
        place = shares(rows.hashes, settings.seed)
        is_held_out = draw_held_out(rows.splits, place, settings.held_out_fraction)
        undecided = rows.splits == SPLITS.index(None)
        parts = []
        for part in (~is_held_out, is_held_out):
            drawn, given = (
                ids[np.argsort(place[ids])]
                for ids in (np.flatnonzero(part & undecided), np.flatnonzero(part & ~undecided))
            )
            is_arc = settings.pair_share and 0 < len(drawn) < undecided.sum()
            if is_arc and len(drawn) + len(given) > 1:
                drawn = drawn[:-1]
            # Interleave them, so that any first share of the part has the same share of both.
            rank = [np.arange(len(ids)) / max(1, len(ids)) for ids in (drawn, given)]
            parts.append(
                np.concatenate([drawn, given])[np.argsort(np.concatenate(rank), kind="stable")]
            )
        return parts[0], parts[1]

    def train_ids(self) -> IntArray:
        """Return the numbers of the training rows.

        If this module's split is ``full``, these are all training rows; if it is ``mini``, a share
        of them that is drawn with the seed.
        """
        train, _ = self._parts
        share = 1.0 if self.split == "full" else self.settings.mini_fraction
        return np.sort(train[: max(1, round(share * len(train)))])

    def held_out_ids(self) -> IntArray:
        """Return the numbers of the held-out rows on which students are scored.

        They have at most a million tokens in all, so that scoring after each epoch is short. They
        are the same for ``mini`` and ``full``.
        """
        _, drawn = self._parts
        num_drawn = int((self.rows.lengths[drawn].cumsum() <= HELD_OUT_TOKENS).sum())
        return np.sort(drawn[: max(1, num_drawn)])

    def draw_order(self) -> IntArray:
        """Return the numbers of all rows, in the order in which their teacher states are needed.

        The held-out rows on which students are scored come first, then the training rows, then the
        rows that are not used.
        """
        train, _ = self._parts
        asked = np.concatenate([self.held_out_ids(), train])
        others = np.ones(len(self.rows), dtype=bool)
        others[asked] = False
        return np.concatenate([asked, np.flatnonzero(others)])

    def loader(self, sample_ids: IntArray, *, shuffle: bool) -> ResumableLoader:
        """Return a DataLoader for these rows; each rank gets its share of every batch.

        Args:
            sample_ids: numbers of the rows.
            shuffle: whether the order of rows and their masks change with each epoch.
        """
        settings = self.settings
        sampler = LengthGroupedBatches(
            self.rows.padded_lengths,
            sample_ids,
            settings.batch_tokens,
            shuffle=shuffle,
            num_variants=settings.num_mask_variants,
            seed=settings.seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            num_ranks=self.trainer.world_size if self.trainer else 1,
        )
        loader = ResumableLoader(
            self.rows,
            batch_size=None,  # the sampler gives whole batches, and rows are gathered in one go
            sampler=sampler,
            generator=torch.Generator(),  # dropout's would change when it seeds the workers
            num_workers=settings.num_workers,
            persistent_workers=settings.num_workers > 0,
            worker_init_fn=outlive_signals,
        )
        loader.prepare = self.prepare
        return loader

    def train_dataloader(self) -> DataLoader[Batch]:
        return self.resumable(self.loader(self.train_ids(), shuffle=True))

    def val_dataloader(self) -> DataLoader[Batch]:
        return self.loader(self.held_out_ids(), shuffle=False)

    def test_dataloader(self) -> DataLoader[Batch]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[str]:
        """Return a DataLoader of all held-out rows (tokens and texts), not masked or paired."""
        settings = self.settings
        tokenizer = find_teacher(self.teacher).tokenizer

        def encode(texts: list[str]) -> dict[str, Any]:
            encoded = tokenizer(
                texts,
                padding=True,
                truncation=True,
                max_length=settings.max_length,
                return_token_type_ids=True,
                return_tensors="pt",
            )
            return {**encoded, "texts": texts}

        held_out = cast(Dataset[str], self.read_corpus().held_out)
        batch_size = settings.batch_tokens // settings.max_length
        return DataLoader(held_out, batch_size=batch_size, collate_fn=encode)


class Piece(NamedTuple):
    """Rows that one process tokenises (a range of row numbers), and the file to write them to."""

    path: Path
    rows: range


def _pieces(folder: Path, corpus: Corpus) -> list[Piece]:
    num_rows = len(corpus.texts)
    starts = range(0, num_rows, ROWS_A_PIECE)
    return [
        Piece(folder / f"{start:012d}", range(start, min(start + ROWS_A_PIECE, num_rows)))
        for start in starts
    ]
