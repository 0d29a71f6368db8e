"""Batches of rows of similar length, and data loaders that resume within an epoch."""

import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

import lightning.pytorch as pl
import numpy as np
from torch.utils.data import DataLoader, DistributedSampler

from kdnas.data.masking import IntArray
from kdnas.system.errors import UserError
from kdnas.system.signals import TERMINATIONS, die_with_parent, start_resource_tracker

T = TypeVar("T")

_STOPS = (signal.SIGINT, *TERMINATIONS)


class LengthGroupedBatches(DistributedSampler[Any]):
    """Batch sampler that groups rows of similar length and divides each batch among the ranks.

    The sampler yields, for each batch, the number of the mask to use and the numbers of this rank's
    rows. The rows of a step, over all ranks, do not depend on the number of ranks. The class is a
    DistributedSampler so that Lightning does not replace it, and tells it the epoch.

    Args:
        padded_lengths: padded length of every row of the dataset, in tokens.
        sample_ids: numbers of the rows to use; in an epoch, each row goes to one rank, once.
        batch_tokens: largest number of tokens in a batch of all ranks, padding included; exceeded
            only where the batch would have fewer rows than there are ranks.
        shuffle: use another order and another mask each epoch; otherwise sort the rows by padded
            length and use mask 0.
        num_variants: number of masks of each row.
        seed: seed of the order.
        rank: number of this process, from 0.
        num_ranks: number of processes.
    """

    def __init__(
        self,
        padded_lengths: IntArray,
        sample_ids: IntArray,
        batch_tokens: int,
        *,
        shuffle: bool,
        num_variants: int = 1,
        seed: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.padded_lengths = padded_lengths
        self.sample_ids = sample_ids
        self.batch_tokens = batch_tokens
        self.shuffle = shuffle
        self.num_variants = num_variants
        self.seed = seed
        self.rank = rank
        self.num_ranks = num_ranks
        self.epoch = 0

    def batches(self) -> list[IntArray]:
        """Return this epoch's batches of all ranks together, each an array of row numbers.

        A batch has at least one row for each rank.

        Raises:
            UserError: there are fewer rows than ranks.
        """
        if len(self.sample_ids) < self.num_ranks:
            raise UserError(
                f"{len(self.sample_ids)} rows cannot be shared by {self.num_ranks} processes: "
                "use fewer processes."
            )
        generator = np.random.default_rng([self.seed, self.epoch])
        rows = generator.permutation(self.sample_ids) if self.shuffle else self.sample_ids
        # Only rows of one padded length change places, so every epoch has the same number of
        # batches: Lightning counts them once, and would cut off a longer epoch.
        rows = rows[np.argsort(self.padded_lengths[rows], kind="stable")]
        starts = [0]
        for end, length in enumerate(self.padded_lengths[rows]):
            size = end - starts[-1]
            if (size + 1) * length > self.batch_tokens and size >= self.num_ranks:
                starts.append(end)
        starts[-1] = min(starts[-1], len(rows) - self.num_ranks)
        if len(starts) > 1 and starts[-1] - starts[-2] < self.num_ranks:
            del starts[-1]
        batches = np.split(rows, starts[1:])
        if self.shuffle:
            return [batches[i] for i in generator.permutation(len(batches))]
        return batches

    def __iter__(self) -> Iterator[tuple[int, IntArray]]:
        variant = self.epoch % self.num_variants if self.shuffle else 0
        for batch in self.batches():
            yield variant, batch[self.rank :: self.num_ranks]

    def __len__(self) -> int:
        return self._num_batches

    @cached_property
    def _num_batches(self) -> int:
        return len(self.batches())  # the same in every epoch


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that can resume within an epoch, after the batches that it has already yielded.

    The sampler's order must depend only on the number of the epoch, as in ``LengthGroupedBatches``.
    """

    trainer: pl.Trainer | None = None  # its limit_train_batches may end an epoch early
    prepare: Callable[[Any], Any] | None = None  # a thread calls it, one batch ahead
    _num_given = 0
    _num_to_skip = 0

    def state_dict(self) -> dict[str, int]:
        """Return the number of batches yielded in this epoch, and the number of ranks.

        Their keys are ``num_given``, which is 0 at the end of an epoch, and ``num_ranks``.
        """
        limit = math.inf if self.trainer is None else self.trainer.num_training_batches
        is_within = self._num_given < min(len(self), limit)
        num_ranks = getattr(self.sampler, "num_ranks", 1)
        return {"num_given": self._num_given if is_within else 0, "num_ranks": num_ranks}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Make the next epoch skip the batches that were used before the checkpoint was written.

        Raises:
            UserError: the state was saved within an epoch by another number of processes, whose
                batches differ.
        """
        num_ranks = getattr(self.sampler, "num_ranks", 1)
        if state["num_given"] and state.get("num_ranks", num_ranks) != num_ranks:
            raise UserError(
                f"The checkpoint was saved within an epoch by {state['num_ranks']} processes, but "
                f"now there are {num_ranks}: resume with the same number of processes."
            )
        self._num_to_skip = state["num_given"]

    def __iter__(self) -> Any:
        # Lightning may call iter() twice before an epoch; this runs only at the first next().
        self._num_given = self._num_to_skip
        self._num_to_skip = 0
        blocked: tuple[signal.Signals, ...] = ()
        if self.num_workers > 0 and self._iterator is None:  # workers are about to start
            start_resource_tracker()
            # A signal that kills a worker before `outlive_signals` would fail the whole fit.
            blocked = _STOPS
        known = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        try:
            batches = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, known)
        # Skipped batches are loaded too, which takes little time.
        left: Iterator[Any] = itertools.islice(batches, self._num_given, None)
        for batch in one_ahead(left, self.prepare) if self.prepare else left:
            self._num_given += 1
            yield batch


def one_ahead(batches: Iterator[T], prepare: Callable[[T], T]) -> Iterator[T]:
    """Yield ``prepare(batch)`` for each batch.

    While the caller uses a batch, a thread prepares the next one.
    """

    def fetch() -> list[T]:
        return [prepare(batch) for batch in itertools.islice(batches, 1)]

    with ThreadPoolExecutor(1, "batches") as thread:
        coming = thread.submit(fetch)
        while batch := coming.result():
            coming = thread.submit(fetch)
            yield from batch


def outlive_signals(index: int) -> None:
    """Make a DataLoader worker ignore termination signals, and end when its main process ends.

    A signal to the process group reaches workers and main process. If a worker died first, torch
    would raise an error in the main process before it has written its checkpoint.

    Args:
        index: number of the worker, which torch passes; not used.
    """
    if sys.platform in ("darwin", "win32"):
        return  # these systems do not tell who sent a signal
    die_with_parent()  # torch itself checks only every five seconds
    parent = multiprocessing.parent_process()
    if parent is not None and not _is_child_of(parent):
        os._exit(1)  # the main process was killed while this one started; torch would not notice

    def end_with_parent() -> None:
        while True:
            sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
            if sender in (os.getppid(), parent and parent.pid):
                os._exit(0)  # as torch's own handler does

    # Print no traceback if the main process ends while this worker sends it a tensor.
    print_error = sys.excepthook

    def print_other_errors(kind: type[BaseException], *rest: Any) -> None:
        if not issubclass(kind, ConnectionError | EOFError):
            print_error(kind, *rest)

    sys.excepthook = print_other_errors
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    threading.Thread(target=end_with_parent, daemon=True).start()


def _is_child_of(parent: multiprocessing.process.BaseProcess) -> bool:
    is_served = multiprocessing.get_start_method(allow_none=True) == "forkserver"
    return parent.is_alive() and (is_served or os.getppid() == parent.pid)


class ResumableDataModule(pl.LightningDataModule):
    """A data module that saves its position within the epoch in checkpoints.

    Lightning alone would lose the position: if a learning-rate schedule asks for the number of
    steps, Lightning creates the loader early and does not restore its state.
    """

    _train_loader: ResumableLoader | None = None
    _loader_state: dict[str, int] | None = None

    def resumable(self, loader: ResumableLoader) -> ResumableLoader:
        """Return this training loader, set to resume at a loaded checkpoint's position, if any."""
        if self._loader_state is not None:
            loader.load_state_dict(self._loader_state)
            self._loader_state = None
        loader.trainer = self.trainer
        self._train_loader = loader
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the training loader, for a checkpoint."""
        if self._train_loader is None:
            return {}
        return {"train_loader": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loader_state = state_dict.get("train_loader")
