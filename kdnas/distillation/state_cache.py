"""The teacher's hidden states on disk: computed once, shared by every candidate, worker and rank.

A cache is a folder of files called shards. A shard holds the states of rows of similar length: an
array (L, T) of records of H numbers, for L layers and T real tokens. Rows that are first needed at
about the same time, such as those of a search, are in the same shards; a shard is computed when one
of its rows is first needed.

The folder's name is the hash of everything that the states depend on. A shard's file name holds two
numbers, that of the mask variant (one random masking of all rows) and that of the shard, and a hash
of the folder's name, both numbers and the content. So each shard can be checked by itself, without
an index: a shard that is missing, truncated, damaged, misplaced or from another cache is computed
again. ``checked.json`` holds the size and the modification time of each shard that a process has
checked, so that other processes need not read these shards to check them.
"""

import errno
import hashlib
import logging
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Literal

import numpy as np
import torch
from filelock import FileLock
from rich.progress import track
from torch import Tensor

from kdnas.data.datamodule import Batch, TokenRows
from kdnas.data.masking import IntArray
from kdnas.distillation.losses import within_half
from kdnas.system.errors import UserError
from kdnas.system.files import read_stamps, stamp, write_json

log = logging.getLogger(__name__)

Precision = Literal["float16", "int8"]
FORMAT = 3
SHARD_BYTES = 64 << 20
CHECKED = "checked.json"
# Each open shard uses a file descriptor, and most processes may have 1,024.
MOST_MAPS = 256
# The rows, in the order in which they are needed, are cut into this many parts; each is sorted by
# length.
PARTS = 20

Place = tuple[int, int]  # mask variant, shard
BatchStates = Callable[[Batch], Sequence[Tensor]]


def cache_key(
    teacher_sha256: str,
    rows: TokenRows,
    layers: Sequence[int],
    precision: Precision = "float16",
    order: IntArray | None = None,
    computed_in: torch.dtype = torch.float32,
) -> str:
    """Return the hash of everything that determines the stored states and their order on disk.

    Args:
        teacher_sha256: hash of the teacher.
        rows: the rows whose hidden states are stored.
        layers: the stored teacher layers, ascending.
        precision: precision of the stored numbers.
        order: all row numbers, in the order in which the rows will be needed; by default ascending.
        computed_in: dtype of the teacher's matrix products, which depends on the machine; bfloat16
            changes a hidden state by more than storing it in float16 does.
    """
    placed = b"" if order is None else order.astype(np.int64).tobytes()
    parts = [
        FORMAT,
        precision,
        teacher_sha256,
        rows.sha256,
        list(layers),
        rows.num_variants,
        computed_in,
        hashlib.sha256(placed).hexdigest(),
        version("transformers"),  # another version may compute them in another way
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def record_of(precision: Precision, hidden_size: int) -> np.dtype[np.void]:
    """Return the NumPy dtype of one token's stored hidden state, for ``float16`` or ``int8``.

    The rounding error is 5e-8 of the hidden states' variance in float16, and 1e-4 to 3e-4 in int8,
    which has one scale per token. bfloat16 is not offered: as large as float16, it would have an
    error of 3e-6 (LOG.md).
    """
    values = ("values", np.dtype(precision), hidden_size)
    return np.dtype([("scale", np.float32), values] if precision == "int8" else [values])


def pack(states_NH: Tensor, packed: np.ndarray) -> None:
    """Write hidden states (N, H) into ``packed``, N records of the dtype ``record_of`` gives."""
    within_half(states_NH)  # ``unpack`` returns float16, in whatever type they are stored
    if "scale" in packed.dtype.fields:  # type: ignore[operator]
        states_NH = states_NH.float()
        scale_N1 = states_NH.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        packed["scale"] = scale_N1[:, 0].cpu().numpy()
        packed["values"] = (states_NH / scale_N1).round().cpu().numpy()
    else:
        packed["values"] = states_NH.to("cpu", torch.float16).numpy()


def unpack(packed: np.ndarray) -> Tensor:
    """Return hidden states (N, H), in float16, from the N records that ``pack`` wrote."""
    values = torch.from_numpy(packed["values"])
    if "scale" in packed.dtype.fields:  # type: ignore[operator]
        return (values * torch.from_numpy(packed["scale"].copy())[:, None]).half()
    return values


def _tracked(places: Sequence[Place], description: str) -> Iterable[Place]:
    is_quiet = len(places) < 2 or logging.getLogger("kdnas").level > logging.INFO
    return track(places, description, transient=True, disable=is_quiet, show_speed=False)


class StateCache:
    """The teacher's hidden states on disk: a folder of shard files, for every row and mask variant.

    Args:
        folder: the cache's folder, named after the ``cache_key``.
        rows: the tokenized rows, each with one or more random maskings (mask variants).
        layers: the stored teacher layers, ascending.
        hidden_size: H, width of the teacher.
        precision: precision of the stored numbers.
        order: all row numbers, in the order in which the rows will be needed; by default ascending.
    """

    def __init__(
        self,
        folder: Path,
        rows: TokenRows,
        layers: Sequence[int],
        hidden_size: int,
        precision: Precision = "float16",
        order: IntArray | None = None,
    ) -> None:
        self.folder, self.rows, self.layers = folder, rows, list(layers)
        self._record = record_of(precision, hidden_size)
        self._bytes_a_token = len(self.layers) * self._record.itemsize

        part = np.arange(len(rows)) * PARTS // len(rows)
        if order is not None:
            part = part[np.argsort(order)]
        placed = np.lexsort((rows.lengths, part))
        pieces = (np.cumsum(rows.lengths[placed]) - 1) * self._bytes_a_token // SHARD_BYTES
        # Sorted again, because a shard of a small text holds several parts.
        self._shard_rows: list[IntArray] = [
            piece[np.argsort(rows.lengths[piece], kind="stable")]
            for piece in np.split(placed, np.flatnonzero(np.diff(pieces)) + 1)
        ]

        self._shard_of: IntArray = np.empty(len(rows), dtype=np.int64)
        self._start: IntArray = np.empty(len(rows), dtype=np.int64)
        for shard, row_ids in enumerate(self._shard_rows):
            self._shard_of[row_ids] = shard
            self._start[row_ids] = np.cumsum(rows.lengths[row_ids]) - rows.lengths[row_ids]

        self._names: dict[Place, str | None] = {}
        self._maps: dict[Place, tuple[mmap.mmap, np.ndarray]] = {}
        self._reading = Lock()  # the threads of two loaders may read at once

    def num_bytes(self, row_ids: IntArray | None = None) -> int:
        """Return the size on disk of the shards of these rows, including shards not yet built.

        By default, all rows are counted.
        """
        return self._size(self._places(row_ids))

    def num_missing_bytes(self, row_ids: IntArray | None = None) -> int:
        """Return the size on disk of those shards of these rows that are not yet built.

        By default, all rows are counted.
        """
        found = self._stamps()
        return self._size(
            place for place in self._places(row_ids) if self._prefix(place) not in found
        )

    def build(
        self, teacher: BatchStates, batch_tokens: int, row_ids: IntArray | None = None
    ) -> None:
        """Compute missing and damaged shards; afterwards, the cache can be read.

        If several processes call this, one computes and the others wait.

        Args:
            teacher: function from a batch to the hidden states (N, H) of each stored layer.
            batch_tokens: largest number of tokens in a batch, padding included.
            row_ids: numbers of the rows that are needed; all by default.

        Raises:
            UserError: the disk is too small (finished shards stay for the next call), or a hidden
                state is beyond the range of float16.
        """
        places = self._places(row_ids)
        self._names = dict.fromkeys(places)
        self._maps.clear()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._names = self._checked(places)  # without the lock
            if self._missing():
                with FileLock(self.folder / "lock"):
                    self._build_missing(teacher, batch_tokens)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise self._no_room() from error  # others use the disk too

    def build_share(
        self,
        teacher: BatchStates,
        batch_tokens: int,
        row_ids: IntArray,
        share: int,
        num_shares: int,
    ) -> None:
        """Compute a share of the missing shards, while other processes compute the other shares.

        A share is every ``num_shares``-th shard. The process that starts these processes must hold
        the folder's ``lock`` file, and call ``build`` after they end.

        Args:
            teacher: function from a batch to the hidden states (N, H) of each stored layer.
            batch_tokens: largest number of tokens in a batch, padding included.
            row_ids: numbers of the rows that are needed.
            share: number of this share, from 0.
            num_shares: number of shares.
        """
        there = {path.name.partition(".")[0] for path in self.folder.glob("variant*.bin")}
        for place in self._places(row_ids)[share::num_shares]:
            if self._prefix(place) not in there:
                buffer = np.empty((len(self.layers), self._num_tokens(place)), dtype=self._record)
                self._write(place, self._compute(place, teacher, batch_tokens, buffer))

    def __call__(self, batch: Batch, layers: Sequence[int]) -> list[Tensor]:
        """Read the hidden states of a batch's N real tokens: for each layer (N, H) in float16.

        Raises:
            OSError: a shard was removed or truncated since ``build``.
        """
        indices = [self.layers.index(layer) for layer in layers]
        variant = int(batch["variant"])
        sample_ids = batch["sample_ids"].cpu().numpy()
        lengths = self.rows.lengths[sample_ids]
        ends = np.cumsum(lengths)
        states = np.empty((len(indices), int(ends[-1])), dtype=self._record)
        with self._reading:
            touched = {
                shard: self._open((variant, shard))
                for shard in np.unique(self._shard_of[sample_ids]).tolist()
            }

        for sample_id, end, length in zip(sample_ids, ends, lengths, strict=True):
            _, shard = touched[int(self._shard_of[sample_id])]
            start = self._start[sample_id]
            for position, index in enumerate(indices):
                states[position, end - length : end] = shard[index, start : start + length]

        # Release the pages: the system reads ahead ten times as many, and all would count as this
        # process's memory.
        for mapped, _ in touched.values():
            mapped.madvise(mmap.MADV_DONTNEED)
        return [unpack(layer_states) for layer_states in states]

    def _places(self, row_ids: IntArray | None) -> list[Place]:
        shards = range(len(self._shard_rows))
        if row_ids is not None:
            shards = np.unique(self._shard_of[row_ids]).tolist()
        return [(variant, shard) for variant in range(self.rows.num_variants) for shard in shards]

    def _missing(self) -> list[Place]:
        return [place for place, name in self._names.items() if name is None]

    def _num_tokens(self, place: Place) -> int:
        return int(self.rows.lengths[self._shard_rows[place[1]]].sum())

    def _size(self, places: Iterable[Place]) -> int:
        return sum(self._num_tokens(place) for place in places) * self._bytes_a_token

    def _prefix(self, place: Place) -> str:
        return f"variant{place[0]:02d}_{place[1]:05d}"

    def _stamps(self) -> dict[str, dict[str, list[int]]]:
        """Return shard -> file name -> stamp (size and modification time) of all shard files."""
        found: dict[str, dict[str, list[int]]] = {}
        if not self.folder.exists():
            return found
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.startswith("variant") and entry.name.count(".") == 2:
                    with suppress(FileNotFoundError):  # another process has just removed it
                        prefix = entry.name.partition(".")[0]
                        found.setdefault(prefix, {})[entry.name] = stamp(entry)
        return found

    def _checked(self, places: Iterable[Place]) -> dict[Place, str | None]:
        """Return a dictionary from each shard to the name of its checked file, or to None.

        A file counts as checked if its checksum was once found to be right, and its size and
        modification time have not changed since. A ``Place`` is (mask variant, shard number).
        """
        checked, found = read_stamps(self.folder / CHECKED), self._stamps()

        def name_of(place: Place) -> str | None:
            names = found.get(self._prefix(place), {})
            return next((name for name in names if checked.get(name) == names[name]), None)

        return {place: name_of(place) for place in places}

    def _note_checked(self) -> None:
        """Record for other processes which shard files are undamaged; the caller holds the lock."""
        found = {name: at for names in self._stamps().values() for name, at in names.items()}
        known = read_stamps(self.folder / CHECKED)
        known |= {name: found[name] for name in self._names.values() if name in found}
        with suppress(OSError):  # on a full disk, others have to check the shards again
            write_json(self.folder / CHECKED, known)

    def _digest(self, prefix: str) -> "hashlib._Hash":
        return hashlib.sha256(f"{self.folder.name}/{prefix}".encode())

    def _find(self, place: Place, names: Iterable[str]) -> str | None:
        """Return the name of a shard's undamaged file in ``names``, or None; delete damaged files.

        Call it only with the folder's lock held.
        """
        prefix = self._prefix(place)
        for path in (self.folder / name for name in names):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, lambda: self._digest(prefix))
            if digest.hexdigest() == path.name.split(".")[1]:
                return path.name
            log.warning("%s is damaged; its states are computed again.", path)
            path.unlink()
        return None

    def _build_missing(self, teacher: BatchStates, batch_tokens: int) -> None:
        """Compute and write the missing shards; call it only with the folder's lock held.

        A thread writes each shard while the next one is computed.
        """
        for leftover in self.folder.glob(".*.partial"):
            leftover.unlink()
        self._names |= self._checked(self._missing())  # another process may have computed them
        found = self._stamps()
        others = [place for place in self._missing() if self._prefix(place) in found]
        for place in _tracked(others, "stored teacher states: check"):
            self._names[place] = self._find(place, found[self._prefix(place)])
        if others:
            self._note_checked()
        missing = self._missing()
        if self._size(missing) > self._free():
            raise self._no_room()

        # Two buffers in turn, because allocating new memory takes time.
        most = max(map(self._num_tokens, missing), default=0)
        buffers = [np.empty((len(self.layers), most), dtype=self._record) for _ in range(2)]
        # Popped, not named: a future in a frame of its own error would keep the buffers alive.
        writes: dict[Place, Future[str]] = {}

        def finish() -> None:
            for place in list(writes):
                self._names[place] = writes.pop(place).result()

        with ThreadPoolExecutor(1) as writer:
            for number, place in enumerate(_tracked(missing, "teacher states")):
                states = self._compute(place, teacher, batch_tokens, buffers[number % 2])
                finish()
                writes[place] = writer.submit(self._write, place, states)
            finish()
        self._note_checked()

    def _compute(
        self, place: Place, teacher: BatchStates, batch_tokens: int, buffer: np.ndarray
    ) -> list[np.ndarray]:
        """Compute a shard's hidden states into ``buffer``; return the used part for each layer."""
        variant, shard = place
        row_ids = self._shard_rows[shard]
        states = [layer_states[: self._num_tokens(place)] for layer_states in buffer]
        position = 0
        rows_a_batch = max(1, batch_tokens // int(self.rows.padded_lengths[row_ids].max()))
        for start in range(0, len(row_ids), rows_a_batch):
            per_layer = teacher(self.rows[variant, row_ids[start : start + rows_a_batch]])
            end = position + len(per_layer[0])
            for layer_states, packed in zip(per_layer, states, strict=True):
                pack(layer_states, packed[position:end])
            position = end
        return states

    def _write(self, place: Place, states: list[np.ndarray]) -> str:
        layers = [layer_states.view(np.uint8).data for layer_states in states]
        prefix = self._prefix(place)
        digest = self._digest(prefix)
        for layer in layers:
            digest.update(layer)
        name = f"{prefix}.{digest.hexdigest()}.bin"

        # Plain writes: on a full disk they raise an error, a memory map would get a SIGBUS.
        descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=".", suffix=".partial")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.writelines(layers)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / name)
        except OSError:
            os.unlink(temporary)  # otherwise a full disk would stay full
            raise
        return name

    def _free(self) -> int:
        """Return the free bytes on the disk of the cache's folder, which may not exist yet."""
        there = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        return shutil.disk_usage(there).free

    def _no_room(self) -> UserError:
        needed, place = self._size(self._missing()), str(self.folder.parent)
        return UserError(
            f"The teacher's states need {needed:,} bytes in {place!r}, {self._free():,} are free: "
            "make room, give another folder, or lower the disk budget so that the teacher runs "
            "live."
        )

    def _open(self, place: Place) -> tuple[mmap.mmap, np.ndarray]:
        """Return a shard as a memory map and an array; the last ``MOST_MAPS`` shards stay open."""
        opened = self._maps.pop(place, None) or self._map(place)
        if len(self._maps) >= MOST_MAPS:
            del self._maps[next(iter(self._maps))]
        self._maps[place] = opened
        return opened

    def _map(self, place: Place) -> tuple[mmap.mmap, np.ndarray]:
        path = self.folder / str(self._names[place])
        try:
            with path.open("rb") as file:
                # This also checks the size: reading a map beyond its file would be a SIGBUS.
                mapped = mmap.mmap(file.fileno(), self._size([place]), access=mmap.ACCESS_READ)
        except (FileNotFoundError, ValueError) as error:
            gone = "Stored teacher states were removed or cut while in use"
            raise OSError(errno.ESTALE, gone, str(path)) from error
        records = np.frombuffer(mapped, dtype=self._record)
        return mapped, records.reshape(len(self.layers), self._num_tokens(place))
