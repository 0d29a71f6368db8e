"""Text as masked token batches: the mini split of the search, all training rows, held-out rows."""

import copy
import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import tokenizers
import torch
import transformers
from filelock import FileLock
from rich.progress import track
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from kdnas.data.corpus import Corpus, load_corpus
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
from kdnas.data.tokens import is_whole, write_rows
from kdnas.data.tokens import located as located
from kdnas.data.tokens import pairs as pairs
from kdnas.data.tokens import real_tokens as real_tokens
from kdnas.models.encoders import find_teacher, max_length
from kdnas.system.errors import UserError
from kdnas.system.files import new_folder

Split = Literal["mini", "full"]

TOKENS = Path("lightning_logs/tokens")
FORMAT = 1  # of the kept rows: count up when the code makes other tokens, pairs or masks
CHARACTERS_A_TOKEN = 100  # more than a token has on average, in any language
ROWS_AT_A_TIME = 256  # of text and tokens in memory
HELD_OUT_TOKENS = 1_000_000  # at most
MIN_PAIR_TOKENS = 8  # of two cut sentences, with up to four special tokens


@dataclass(frozen=True)
class DataSettings:
    """How text becomes batches.

    Args:
        column: name of the text column (parquet, jsonl, csv, hub).
        fraction: share of the text's rows, drawn by the seed, that is read at all, above 0; 1: all.
        held_out_fraction: share of the rows that no student ever trains on; candidates are scored
            on them.
        mini_fraction: share of the training rows that a candidate of the search sees, above 0 and
            below 1.
        max_length: longer rows are cut, in tokens; with the special tokens.
        batch_tokens: rows times padded length of a batch is at most this.
        pad_to_max_length: pad every row to ``max_length``, so that a batch has rows of any length;
            slower.
        pair_share: share of the rows that become sentence pairs, 0 to 1; rows of fewer than 8 words
            never do.
        mask_probability: share of tokens that is masked, 0 to 1.
        masked_share: share of the rows that is masked at all, 0 to 1; for each of a row's masks
            anew.
        num_mask_variants: how many different masks a row has; epoch e takes number
            ``e % num_mask_variants``.
        seed: of the split, the masks and the order.
        num_workers: processes that make batches.

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
                "tokens. Without pairs, set pair_share to 0."
            )
        if self.seed >= 2**32:
            raise UserError(f"seed is {self.seed}: give at most {2**32 - 1}.")
        if self.batch_tokens < self.max_length:
            raise UserError(
                f"batch_tokens is {self.batch_tokens}: "
                f"one row of max_length {self.max_length} must fit."
            )


class KDDataModule(ResumableDataModule):
    """Masked batches for distillation: 30 % of the training rows (``mini``) or all (``full``).

    Args:
        teacher: its tokenizer is used: a folder, a hub name, or ``quickstart``.
        text: a parquet, jsonl, csv or txt file, a folder of them, or a hub data set.
        settings: how text becomes batches.
        split: which training rows; the held-out rows are the same for both.
        folder: where tokenised texts are kept, a folder each; safe to delete. By default ``tokens``
            in the folder of all runs.
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
        self.prepare: Callable[[Batch], Batch] | None = None  # a thread does, one batch ahead
        self._rows: TokenRows | None = None

    @property
    def rows(self) -> TokenRows:
        """The tokenised rows, after ``setup``."""
        assert self._rows is not None, "call setup() first"
        return self._rows

    def setup(self, stage: str | None = None) -> None:
        """Open the tokenised text; the first process that asks for it makes it, others wait.

        Raises:
            UserError: the text or the teacher cannot be used, or ``max_length`` is more than the
                teacher takes.
        """
        if self._rows is not None:
            return
        settings = self.settings
        teacher = find_teacher(self.teacher)
        longest = max_length(teacher.config)
        if settings.max_length > longest:
            raise UserError(
                f"max_length is {settings.max_length}: "
                f"the teacher {self.teacher!r} takes at most {longest} tokens."
            )
        tokenizer = teacher.tokenizer
        folder = self.folder / self._key(tokenizer)
        if not is_whole(folder):
            self._make(folder, tokenizer)
        assert tokenizer.pad_token_id is not None
        self._rows = TokenRows(
            folder, tokenizer.pad_token_id, settings.max_length, settings.pad_to_max_length
        )

    def read_corpus(self) -> Corpus:
        """The rows of text themselves."""
        settings = self.settings
        corpus = load_corpus(
            self.text,
            column=settings.column,
            held_out_fraction=settings.held_out_fraction,
            seed=settings.seed,
            folder=self.folder if self.folder.exists() else None,
        )
        return _share(corpus, settings) if settings.fraction < 1 else corpus

    def _key(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The hash of all that the rows depend on."""
        settings = asdict(self.settings) | {"batch_tokens": None, "num_workers": None}
        del settings["pad_to_max_length"]  # which changes no row
        parts = [
            FORMAT,
            [tokenizers.__version__, transformers.__version__],
            type(tokenizer),
            tokenizer.backend_tokenizer.to_str(),
            tokenizer.truncation_side,
            settings,
            text_sha256(self.text, self.settings.column),
        ]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def _make(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the folder of rows, one process at a time; where the text is bad, leave nothing."""
        made = [path for path in (self.folder, self.folder.parent) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self.folder / f"{folder.name}.lock"
        with FileLock(lock):
            if is_whole(folder):  # another process has made it meanwhile
                return
            for leftover in self.folder.glob(f".{folder.name}.*"):
                shutil.rmtree(leftover)
            try:
                with new_folder(folder) as new:
                    self._write(new, folder.name, tokenizer)
            except UserError:
                lock.unlink()
                for empty in made:
                    with suppress(OSError):
                        empty.rmdir()
                raise

    def _write(self, folder: Path, key: str, tokenizer: PreTrainedTokenizerBase) -> None:
        settings = self.settings
        corpus = self.read_corpus()
        masker = Masker(
            tokenizer.mask_token_id,
            len(tokenizer),
            tokenizer.all_special_ids,
            settings.mask_probability,
            settings.seed,
        )
        write_rows(
            folder,
            self._tokenised(corpus, tokenizer),
            masker,
            key=key,
            num_train=corpus.num_train,
            dropped=corpus.dropped,
            num_variants=settings.num_mask_variants,
            masked_share=settings.masked_share,
        )

    def _tokenised(
        self, corpus: Corpus, tokenizer: PreTrainedTokenizerBase
    ) -> Iterator[tuple[list[int], int]]:
        """The token ids of each row, and where its second sentence begins."""
        texts = corpus.texts
        make = self._pair_maker(corpus)
        # Of a row of a megabyte a tokenizer would make all tokens before it cuts them.
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

        starts = range(0, len(texts), ROWS_AT_A_TIME)
        progress = track(
            starts, "tokens", transient=True, disable=len(starts) < 2, show_speed=False
        )
        for start in progress:
            places = range(start, min(start + ROWS_AT_A_TIME, len(texts)))
            pairs = {i: pair for i in places if (pair := make(i))}
            singles = [i for i in places if i not in pairs]
            first = [pair[0] for pair in pairs.values()]
            second = [pair[1] for pair in pairs.values()]
            rows = encode(singles, [texts[i] for i in singles])
            rows |= encode(list(pairs), first, second)
            yield from (rows[i] for i in places)

    def _pair_maker(self, corpus: Corpus) -> Callable[[int], tuple[str, str] | None]:
        """Sample id -> sentence pair, or None.

        No text gets into another split: a row is paired with rows of its own part.
        """
        settings = self.settings
        texts = corpus.texts
        mini = self._ids("mini", corpus.num_train)
        rest = np.setdiff1d(np.arange(corpus.num_train), mini)
        parts = (mini, rest, np.arange(corpus.num_train, len(texts)))
        part_of, place_of = np.empty((2, len(texts)), dtype=np.int64)
        for number, part in enumerate(parts):
            part_of[part] = number
            place_of[part] = np.arange(len(part))

        def make(sample_id: int) -> tuple[str, str] | None:
            part = parts[part_of[sample_id]]
            generator = row_generator(Draw.PAIR, settings.seed, sample_id)
            if not (generator.random() < settings.pair_share and len(part) > 1):
                return None
            other = part[(place_of[sample_id] + generator.integers(1, len(part))) % len(part)]
            return make_pair(texts[sample_id], texts[other], generator)

        return make

    def select(self, split: Split) -> "KDDataModule":
        """The same rows and masks with another split of the training rows."""
        other = copy.copy(self)
        other.split = split
        return other

    def train_ids(self) -> IntArray:
        """Sample ids of this split; those of ``mini`` are a seeded draw from those of ``full``."""
        return self._ids(self.split, self.rows.num_train)

    def draw_order(self) -> IntArray:
        """Sample ids of all training rows in the order in which a share of them is drawn."""
        return self._order(self.rows.num_train)

    def _order(self, num_rows: int) -> IntArray:
        return np.random.default_rng(self.settings.seed).permutation(num_rows)

    def _ids(self, split: Split, num_rows: int) -> IntArray:
        share = 1.0 if split == "full" else self.settings.mini_fraction
        return np.sort(self._order(num_rows)[: max(1, round(share * num_rows))])

    def held_out_ids(self) -> IntArray:
        """Sample ids of the held-out rows, in no split: all, or a draw of a million tokens.

        A student is scored on them after each epoch, however few rows it learns from.
        """
        ids = np.arange(self.rows.num_train, len(self.rows))
        drawn = np.random.default_rng(self.settings.seed).permutation(ids)
        num_drawn = int((self.rows.lengths[drawn].cumsum() <= HELD_OUT_TOKENS).sum())
        return np.sort(drawn[: max(1, num_drawn)])

    def loader(self, sample_ids: IntArray, *, shuffle: bool) -> ResumableLoader:
        """Batches of these rows, this process's share of them."""
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
            generator=torch.Generator(),  # dropout's generator does not seed the workers
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
        """The held-out rows of text as they are, neither masked nor paired."""
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


def _share(corpus: Corpus, settings: DataSettings) -> Corpus:
    """A drawn part of the rows to learn from and of those held out, one of each at least."""
    generator, num_train = np.random.default_rng(settings.seed), corpus.num_train
    parts = np.arange(num_train), np.arange(num_train, len(corpus.texts))
    drawn = [
        np.sort(generator.permutation(part)[: max(1, round(settings.fraction * len(part)))])
        for part in parts
    ]
    return Corpus(corpus.texts.take(np.concatenate(drawn)), len(drawn[0]), corpus.dropped)
