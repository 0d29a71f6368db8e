"""Which rows come together, in which order, and where an epoch goes on."""

import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import numpy as np
from torch.utils.data import DataLoader, DistributedSampler

from kdnas.data.masking import IntArray
from kdnas.system.errors import UserError
from kdnas.system.signals import TERMINATIONS, die_with_parent, start_resource_tracker


class LengthGroupedBatches(DistributedSampler[Any]):
    """Batches of rows of similar length within a budget of tokens, each rank its own; yields (variant, sample ids).

    A DistributedSampler, so that Lightning neither replaces it nor forgets to tell it the epoch.

    Args:
        padded_lengths: what every row of the dataset is padded to, in tokens.
        sample_ids: the rows to go through, each once an epoch over all ranks.
        batch_tokens: rows times padded length of a batch is at most this.
        shuffle: another order each epoch, and masks by epoch; else sorted by padded length with masks number 0.
        num_variants: number of masks a row has.
        seed: of the order.
        rank: this process.
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
        self.padded_lengths, self.sample_ids, self.batch_tokens = (
            padded_lengths,
            sample_ids,
            batch_tokens,
        )
        self.shuffle, self.num_variants, self.seed = shuffle, num_variants, seed
        self.rank, self.num_ranks = rank, num_ranks
        self.epoch = 0

    def batches(self) -> list[IntArray]:
        """The batches of this epoch, over all ranks; their number is a multiple of the number of ranks."""
        generator = np.random.default_rng([self.seed, self.epoch])
        rows = generator.permutation(self.sample_ids) if self.shuffle else self.sample_ids
        # Only rows of one padded length change places, so that every epoch has the same number of batches: Lightning
        # counts them once, and leaves out what a longer epoch has more, and the validation of a shorter one.
        rows = rows[np.argsort(self.padded_lengths[rows], kind="stable")]
        batches, start = [], 0
        for end, length in enumerate(self.padded_lengths[rows]):
            if (end - start + 1) * length > self.batch_tokens and end > start:
                batches.append(rows[start:end])
                start = end
        batches.append(rows[start:])
        # DDP waits for every rank at every step: halve the largest batches until all ranks have as many.
        while len(batches) % self.num_ranks:
            batches.sort(key=len)
            largest = batches.pop()
            if len(largest) < 2:
                raise UserError(
                    f"{len(self.sample_ids)} rows cannot be shared by {self.num_ranks} processes: use fewer processes."
                )
            batches += [largest[::2], largest[1::2]]
        return (
            [batches[i] for i in generator.permutation(len(batches))] if self.shuffle else batches
        )

    def __iter__(self) -> Iterator[tuple[int, IntArray]]:
        variant = self.epoch % self.num_variants if self.shuffle else 0
        for batch in self.batches()[self.rank :: self.num_ranks]:
            yield variant, batch

    def __len__(self) -> int:
        return self._num_batches

    @cached_property
    def _num_batches(self) -> int:
        return len(self.batches()) // self.num_ranks  # in every epoch


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that goes on within an epoch: its state is the number of batches given, and is kept in checkpoints.

    Its order of rows must be fixed by the epoch, as that of ``LengthGroupedBatches`` is.
    """

    trainer: pl.Trainer | None = None  # may end an epoch early (limit_train_batches)
    _num_given = 0
    _num_to_skip = 0

    def state_dict(self) -> dict[str, int]:
        """How many batches of this epoch were given; 0 at its end, for the next one begins at the beginning."""
        limit = math.inf if self.trainer is None else self.trainer.num_training_batches
        return {"num_given": self._num_given if self._num_given < min(len(self), limit) else 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Leave out so many batches of the next epoch that is gone through."""
        self._num_to_skip = state["num_given"]

    def __iter__(self) -> Any:
        # Lightning may call iter() twice before an epoch; what follows runs at the first next().
        self._num_given, self._num_to_skip = self._num_to_skip, 0
        begins = self.num_workers > 0 and self._iterator is None
        if begins:
            start_resource_tracker()
        # Workers are born deaf: one that a signal ends before `outlive_signals` would end the fit with an error.
        known = signal.pthread_sigmask(
            signal.SIG_BLOCK, (signal.SIGINT, *TERMINATIONS) if begins else ()
        )
        try:
            batches = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, known)
        for batch in itertools.islice(
            batches, self._num_given, None
        ):  # a batch is microseconds' work
            self._num_given += 1
            yield batch


def outlive_signals(index: int) -> None:
    """Have a loader's worker end with its main process, not before it: a process group hears a signal together.

    torch raises an error in the main process where a worker dies, and there would be no checkpoint.
    """
    if sys.platform in ("darwin", "win32"):
        return  # which do not say whose signal it is
    die_with_parent()  # torch itself looks every five seconds
    parent = multiprocessing.parent_process()
    is_served = (
        multiprocessing.get_start_method(allow_none=True) == "forkserver"
    )  # the server's child, not its own
    if parent is not None and (
        not parent.is_alive() or os.getppid() != parent.pid and not is_served
    ):
        os._exit(
            1
        )  # killed while this one began: torch, which looks from now on, would never notice

    def end_with_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid not in (
            os.getppid(),
            parent and parent.pid,
        ):
            pass
        os._exit(0)  # as torch's own handler does

    # The thread that hands tensors over would tell the main process's end in the middle of one, with a traceback.
    told = sys.excepthook
    sys.excepthook = lambda kind, *rest: (
        None if issubclass(kind, ConnectionError | EOFError) else told(kind, *rest)
    )
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, *TERMINATIONS))
    threading.Thread(target=end_with_parent, daemon=True).start()


class ResumableDataModule(pl.LightningDataModule):
    """A data module whose checkpoints say where in the epoch they were written.

    Lightning keeps loaders' states too, but does not give them back where the schedule asks for the number of steps,
    for the loader is made before the state is read then.
    """

    _train_loader: ResumableLoader | None = None
    _loader_state: dict[str, int] | None = None

    def resumable(self, loader: ResumableLoader) -> ResumableLoader:
        """The loader of the training rows, told where to go on."""
        if self._loader_state is not None:
            loader.load_state_dict(self._loader_state)
            self._loader_state = None
        loader.trainer = self.trainer
        self._train_loader = loader
        return loader

    def state_dict(self) -> dict[str, Any]:
        """The training loader's state."""
        return {"train_loader": self._train_loader.state_dict()} if self._train_loader else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loader_state = state_dict.get("train_loader")
