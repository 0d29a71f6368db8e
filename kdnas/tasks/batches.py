"""Batches of a labelled task, of rows of similar length, each padded to its longest row."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from kdnas.data.loader import ResumableDataModule, ResumableLoader
from kdnas.tasks.rows import Columns
from kdnas.tasks.tasks import LoadedTask


class LengthGroupedSampler(Sampler[int]):
    """Sampler that puts rows of similar length into a batch, in another order each epoch."""

    # Rows are sorted by length within pieces of this many batches: enough to save padding, few
    # enough to mix the rows.
    BATCHES_A_PIECE = 50

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = np.array(lengths), batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch, which decides the order of the rows.

        Lightning's Trainer calls this before each epoch.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        rows = generator.permutation(len(self))
        step = self.BATCHES_A_PIECE * self.batch_size
        pieces = [rows[start : start + step] for start in range(0, len(rows), step)]
        rows = np.concatenate(
            [piece[np.argsort(self.lengths[piece], kind="stable")] for piece in pieces]
        )
        # The last, incomplete batch stays last: elsewhere it would shift the batches after it.
        full = len(rows) - len(rows) % self.batch_size
        batches = generator.permutation(rows[:full].reshape(-1, self.batch_size))
        yield from [*batches.flatten().tolist(), *rows[full:].tolist()]


class GLUEDataModule(ResumableDataModule):
    """Batches of a task: ``input_ids``, ``attention_mask``, ``token_type_ids`` and ``labels``.

    The shapes are (B, T), and (B,) for the labels. Each batch is padded to its longest row.
    Training rows are grouped by length, in another order each epoch; validation rows are sorted by
    length.

    Args:
        task: the task with its rows.
        tokenizer: the classifier's tokenizer.
        batch_size: rows per batch.
        max_length: longest row in tokens, special tokens included; longer rows are cut.
        seed: seed of the order of the training rows.
    """

    def __init__(
        self,
        task: LoadedTask,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 32,
        max_length: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.task, self.tokenizer = task, tokenizer
        self.batch_size, self.max_length, self.seed = batch_size, max_length, seed
        self.rows: dict[str, list[dict[str, Any]]] = {}

    def setup(self, stage: str | None = None) -> None:
        if not self.rows:
            splits = {"train": self.task.train, **self.task.validations}
            self.rows = {split: self._tokenise(columns) for split, columns in splits.items()}

    def _tokenise(self, columns: Columns) -> list[dict[str, Any]]:
        texts = [columns[name] for name in self.task.task.columns]
        # Return token types even if the student does not use them: its teacher may.
        encoded = self.tokenizer(
            *texts, truncation=True, max_length=self.max_length, return_token_type_ids=True
        )
        encoded = {**encoded, "labels": columns["label"]}
        return [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)]

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        rows = self.rows["train"]
        lengths = [len(row["input_ids"]) for row in rows]
        sampler = LengthGroupedSampler(lengths, self.batch_size, self.seed)
        return self.resumable(self._loader(rows, sampler))

    def val_dataloader(self) -> list[DataLoader[dict[str, Any]]]:
        """Return a loader for each validation split; MNLI has two, every other task has one."""
        splits = [self.rows[split] for split in self.task.task.validations]
        by_length = [sorted(rows, key=lambda row: len(row["input_ids"])) for rows in splits]
        return [self._loader(rows) for rows in by_length]

    def _loader(self, rows: Any, sampler: Sampler[int] | None = None) -> ResumableLoader:
        return ResumableLoader(
            rows,
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=DataCollatorWithPadding(self.tokenizer),
            # A generator of its own: drawing the workers' seeds from the global one would change
            # the random numbers of dropout.
            generator=torch.Generator(),
        )
