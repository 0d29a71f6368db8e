"""Text as masked token batches: a candidate's 30 % of the rows, all of them, and held-out rows that are in neither."""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdnas.data.corpus import Corpus, load_corpus
from kdnas.data.loader import LengthGroupedBatches, ResumableDataModule, ResumableLoader
from kdnas.data.masking import Draw, IntArray, Masker, row_generator
from kdnas.data.pairs import make_pair
from kdnas.errors import UserError
from kdnas.models import find_teacher, max_length

Split = Literal["mini", "full"]

# A batch's length is a multiple of this, so that shapes repeat: each new shape makes new kernels.
LENGTH_STEP = 8
MIN_PAIR_TOKENS = 8  # of two cut sentences, with up to four special tokens


def padded(lengths: IntArray, max_length: int) -> IntArray:
    """The lengths that rows of these lengths are padded to, at most ``max_length``."""
    return np.minimum(-(-lengths // LENGTH_STEP) * LENGTH_STEP, max_length)


class Batch(TypedDict):
    """B rows of similar length, padded to T tokens.

    ``input_ids`` (B, T), masked; ``attention_mask`` (B, T), 1 on real tokens; ``token_type_ids`` (B, T), 1 from a
    second sentence's first token to the row's end, as BERT has it; ``sample_ids`` (B,); ``variant`` (), the number of
    the rows' masks. N, the number of real tokens, is ``attention_mask.sum()``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    sample_ids: Tensor
    variant: Tensor


@dataclass(frozen=True)
class DataSettings:
    """How text becomes batches.

    Args:
        column: name of the text column (parquet, jsonl, csv, hub).
        held_out_fraction: share of the rows that no student ever trains on; candidates are scored on them.
        mini_fraction: share of the training rows that a candidate of the search sees.
        max_length: longer rows are cut, in tokens; with the special tokens.
        batch_tokens: rows times padded length of a batch is at most this.
        pair_share: share of the rows that become sentence pairs, 0 to 1; rows of fewer than 8 words never do.
        mask_probability: share of tokens that is masked, 0 to 1.
        masked_share: share of the rows that is masked at all, 0 to 1; for each of a row's masks anew.
        num_mask_variants: how many different masks a row has; epoch e takes number ``e % num_mask_variants``.
        seed: of the split, the masks and the order.
        num_workers: processes that make batches.

    Raises:
        UserError: a value is out of its range.
    """

    column: str = "text"
    held_out_fraction: float = 0.05
    mini_fraction: float = 0.3
    max_length: int = 128
    batch_tokens: int = 4096
    pair_share: float = 0.5
    mask_probability: float = 0.15
    masked_share: float = 0.5
    num_mask_variants: int = 1
    seed: int = 0
    num_workers: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.mini_fraction < 1:
            raise UserError(f"mini_fraction is {self.mini_fraction}: give a share above 0 and below 1, such as 0.3.")
        if not 0 < self.held_out_fraction < 1:
            raise UserError(f"held_out_fraction is {self.held_out_fraction}: give a share above 0 and below 1.")
        for name in ("pair_share", "mask_probability", "masked_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}: give a share between 0 and 1.")
        for name, least in (("max_length", 4), ("num_mask_variants", 1), ("seed", 0), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: give at least {least}.")
        if self.pair_share and self.max_length < MIN_PAIR_TOKENS:
            raise UserError(
                f"max_length is {self.max_length}: sentence pairs need at least {MIN_PAIR_TOKENS} tokens. "
                "Without pairs, set pair_share to 0."
            )
        if self.seed >= 2**32:
            raise UserError(f"seed is {self.seed}: give at most {2**32 - 1}.")
        if self.batch_tokens < self.max_length:
            raise UserError(f"batch_tokens is {self.batch_tokens}: one row of max_length {self.max_length} must fit.")


class TokenRows(Dataset[Batch]):
    """All rows as one array of token ids; a batch is asked for as (variant, sample ids).

    Args:
        rows: token ids of each row, special tokens included.
        masker: makes the masks.
        pad_token_id: id of the padding token.
        max_length: no batch is padded to more.
        second_starts: where in each row the second sentence begins, the row's length where there is none (in all rows,
            by default).
        masked_share: share of the rows that is masked at all.
    """

    def __init__(
        self,
        rows: list[list[int]],
        masker: Masker,
        pad_token_id: int,
        max_length: int,
        *,
        second_starts: Sequence[int] | None = None,
        masked_share: float = 1.0,
    ) -> None:
        self.lengths: IntArray = np.array([len(row) for row in rows], dtype=np.int64)
        self.padded_lengths = padded(self.lengths, max_length)
        self.second_starts: IntArray = self.lengths if second_starts is None else np.array(second_starts, np.int64)
        self.masked_share = masked_share
        self.offsets: IntArray = np.concatenate([[0], np.cumsum(self.lengths)])
        self.pad_token_id = pad_token_id
        self._tokens = np.concatenate([np.array(row, dtype=np.int64) for row in rows])
        self._masker = masker
        self._masked: dict[int, IntArray] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    def masked(self, variant: int) -> IntArray:
        """The masked token ids of all rows, one after the other; made once a variant."""
        if variant not in self._masked:
            rows = np.split(self._tokens, self.offsets[1:-1])
            draws = [
                row_generator(Draw.WHETHER_MASKED, self._masker.seed, i, variant).random() for i in range(len(rows))
            ]
            masked = [
                self._masker(row, i, variant) if draw < self.masked_share else row
                for i, (row, draw) in enumerate(zip(rows, draws, strict=True))
            ]
            self._masked[variant] = np.concatenate(masked).astype(np.int32)
        return self._masked[variant]

    def sha256(self, num_variants: int) -> str:
        """The hash of every input that a model will see: text, tokenizer, cut, pairs, masks and order are in it."""
        digest = hashlib.sha256(self.lengths.tobytes() + self.second_starts.tobytes())
        for variant in range(num_variants):
            digest.update(self.masked(variant).tobytes())
        return digest.hexdigest()

    def __getitem__(self, index: tuple[int, IntArray]) -> Batch:
        variant, sample_ids = index
        masked, lengths = self.masked(variant), self.lengths[sample_ids]
        places = np.arange(self.padded_lengths[sample_ids].max())
        input_ids = np.full((len(sample_ids), len(places)), self.pad_token_id, dtype=np.int64)
        attention_mask = places < lengths[:, None]
        second = attention_mask & (places >= self.second_starts[sample_ids][:, None])
        input_ids[attention_mask] = np.concatenate([masked[self.offsets[i] : self.offsets[i + 1]] for i in sample_ids])
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask.astype(np.int64)),
            "token_type_ids": torch.from_numpy(second.astype(np.int64)),
            "sample_ids": torch.from_numpy(np.asarray(sample_ids, dtype=np.int64)),
            "variant": torch.tensor(variant),
        }


class KDDataModule(ResumableDataModule):
    """Masked batches for distillation: 30 % of the training rows (``mini``) or all of them (``full``).

    Args:
        tokenizer: the teacher whose tokenizer to use: a folder, a hub name, or ``quickstart``.
        text: a parquet, jsonl, csv or txt file, a folder of them, or a hub data set.
        settings: how text becomes batches.
        split: which training rows; the held-out rows are the same for both.
    """

    def __init__(
        self, tokenizer: str, text: str, settings: DataSettings = DataSettings(), split: Split = "full"
    ) -> None:
        super().__init__()
        self.tokenizer, self.text, self.settings, self.split = tokenizer, text, settings, split
        self.corpus: Corpus | None = None
        self.rows: TokenRows | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read, split and tokenise, once.

        Raises:
            UserError: the text or the tokenizer cannot be used, or ``max_length`` is more than the teacher takes.
        """
        if self.rows is not None:
            return
        teacher = find_teacher(self.tokenizer)
        settings = self.settings
        if settings.max_length > max_length(teacher.config):
            raise UserError(
                f"max_length is {settings.max_length}: the teacher {self.tokenizer!r} takes at most "
                f"{max_length(teacher.config)} tokens."
            )
        self.corpus = load_corpus(
            self.text, column=settings.column, held_out_fraction=settings.held_out_fraction, seed=settings.seed
        )
        tokenizer = teacher.tokenizer
        assert tokenizer.mask_token_id is not None and tokenizer.pad_token_id is not None
        masker = Masker(
            tokenizer.mask_token_id,
            len(tokenizer),
            tokenizer.all_special_ids,
            settings.mask_probability,
            settings.seed,
        )
        texts = self.corpus.train + self.corpus.held_out
        pairs = self._make_pairs(texts)
        rows: dict[int, list[int]] = {}
        second_starts: dict[int, int] = {}
        for places in ([i for i in range(len(texts)) if i not in pairs], list(pairs)):
            if places:  # tokenizers cannot do nothing
                columns = zip(*(pairs.get(i, (texts[i],)) for i in places), strict=True)
                encoded = tokenizer(
                    *map(list, columns), truncation="longest_first", max_length=settings.max_length, verbose=False
                )
                for number, i in enumerate(places):
                    rows[i] = encoded["input_ids"][number]
                    sentences = encoded.sequence_ids(number) if i in pairs else []
                    second_starts[i] = sentences.index(1) if 1 in sentences else len(rows[i])
        self.rows = TokenRows(
            [rows[i] for i in range(len(texts))],
            masker,
            tokenizer.pad_token_id,
            settings.max_length,
            second_starts=[second_starts[i] for i in range(len(texts))],
            masked_share=settings.masked_share,
        )

    def _make_pairs(self, texts: list[str]) -> dict[int, tuple[str, str]]:
        """Sample id -> sentence pair. No text gets into another split: a row is paired with rows of its own part."""
        settings = self.settings
        if not settings.pair_share:
            return {}
        mini = self.select("mini").train_ids()
        pairs = {}
        for part in (mini, np.setdiff1d(self.select("full").train_ids(), mini), self.held_out_ids()):
            for place, sample_id in enumerate(part.tolist()):
                generator = row_generator(Draw.PAIR, settings.seed, sample_id)
                if generator.random() < settings.pair_share and len(part) > 1:
                    other = part[(place + generator.integers(1, len(part))) % len(part)]
                    if pair := make_pair(texts[sample_id], texts[other], generator):
                        pairs[sample_id] = pair
        return pairs

    def select(self, split: Split) -> "KDDataModule":
        """The same rows and masks with another split of the training rows; nothing is read or tokenised again."""
        other = copy.copy(self)
        other.split = split
        return other

    def train_ids(self) -> IntArray:
        """Sample ids of the training rows of this split. Those of ``mini`` are a seeded draw from those of ``full``."""
        order = self.draw_order()
        share = 1.0 if self.split == "full" else self.settings.mini_fraction
        return np.sort(order[: max(1, round(share * len(order)))])

    def draw_order(self) -> IntArray:
        """Sample ids of all training rows in the order in which a share of them is drawn."""
        assert self.corpus is not None
        return np.random.default_rng(self.settings.seed).permutation(len(self.corpus.train))

    def held_out_ids(self) -> IntArray:
        """Sample ids of the held-out rows, in no split."""
        assert self.corpus is not None
        return np.arange(len(self.corpus.train), len(self.corpus.train) + len(self.corpus.held_out))

    def loader(self, sample_ids: IntArray, *, shuffle: bool) -> ResumableLoader:
        """Batches of these rows, this process's share of them."""
        assert self.rows is not None, "call setup() first"
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
        # batch_size=None: the sampler gives whole batches, and the rows are gathered in one go.
        return ResumableLoader(
            self.rows,
            batch_size=None,
            sampler=sampler,
            generator=torch.Generator(),  # the workers' seeds are not drawn from what dropout draws from
            num_workers=settings.num_workers,
            persistent_workers=settings.num_workers > 0,
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        return self.resumable(self.loader(self.train_ids(), shuffle=True))

    def val_dataloader(self) -> DataLoader[Batch]:
        return self.loader(self.held_out_ids(), shuffle=False)
