"""The teacher's hidden states on disk: computed once, shared by every candidate, worker and rank.

A cache is a folder of shards. A shard holds the states of some rows of similar length: an array (L, T) of records
of H numbers, for L layers and T real tokens. Rows that a search needs lie apart from the others, whose states are
computed when they are asked for. The folder's name is the hash of everything that the states depend on, and a shard's
holds its place and the hash of folder, place and bytes. So a whole shard is known by itself: one that is missing, cut,
damaged, in another's place or of another cache is computed again, and there is no index that could disagree.
"""

import errno
import hashlib
import logging
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
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

log = logging.getLogger(__name__)

Precision = Literal["float16", "int8"]
FORMAT = 3
SHARD_BYTES = 64 << 20
# Open at once: each holds a file descriptor, of which a process mostly has 1,024.
MOST_MAPS = 256
# The rows, in the order in which they are asked for, are cut into so many parts, each sorted by length.
PARTS = 20


def cache_key(
    teacher_sha256: str,
    rows: TokenRows,
    layers: Sequence[int],
    precision: Precision = "float16",
    order: IntArray | None = None,
    computed_in: torch.dtype = torch.float32,
) -> str:
    """The hash of all that the states and their places depend on; arguments as of ``StateCache``, and two more.

    ``computed_in`` is the precision of the teacher's matmuls, in which machines differ: bfloat16 moves a state by
    more than float16 rounds it.
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
    ]
    parts += [
        hashlib.sha256(placed).hexdigest(),
        version("transformers"),
    ]  # another may compute them in another way
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def record_of(precision: Precision, hidden_size: int) -> np.dtype[np.void]:
    """How one token's state is stored.

    Rounding costs 5e-8 of the states' variance in float16 and 1e-4 to 3e-4 in int8, with one scale a token; bfloat16
    would cost 3e-6 at float16's size (LOG.md).
    """
    values = ("values", np.dtype(precision), hidden_size)
    return np.dtype([("scale", np.float32), values] if precision == "int8" else [values])


def pack(states_NH: Tensor, packed: np.ndarray) -> None:
    """Write states as records (N,)."""
    within_half(states_NH)  # as they are given back, whatever they are stored as
    if "scale" in packed.dtype.fields:  # type: ignore[operator]
        states_NH = states_NH.float()
        scale_N1 = states_NH.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        packed["scale"] = scale_N1[:, 0].cpu().numpy()
        packed["values"] = (states_NH / scale_N1).round().cpu().numpy()
    else:
        packed["values"] = states_NH.to("cpu", torch.float16).numpy()


def unpack(packed: np.ndarray) -> Tensor:
    """Records (N,) as states (N, H), float16."""
    values = torch.from_numpy(packed["values"])
    if "scale" in packed.dtype.fields:  # type: ignore[operator]
        return (values * torch.from_numpy(packed["scale"].copy())[:, None]).half()
    return values


def _tracked(places: list[tuple[int, int]], description: str) -> Iterable[tuple[int, int]]:
    is_quiet = logging.getLogger("kdnas").level > logging.INFO
    return track(
        places, description, transient=True, disable=len(places) < 2 or is_quiet, show_speed=False
    )


class StateCache:
    """States of every row and mask variant.

    Args:
        folder: ``<teacher_states>/<cache_key>``.
        rows: the rows whose states are stored.
        layers: the stored teacher layers, ascending.
        hidden_size: H, width of the teacher.
        precision: of the stored numbers.
        order: all row numbers, in the order in which shares of them are asked for; their own by default.
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
        # Sorted again, for a shard of a small text holds several parts.
        self._shard_rows: list[IntArray] = [
            piece[np.argsort(rows.lengths[piece], kind="stable")]
            for piece in np.split(placed, np.flatnonzero(np.diff(pieces)) + 1)
        ]
        self._shard_of: IntArray = np.empty(len(rows), dtype=np.int64)
        self._start: IntArray = np.empty(len(rows), dtype=np.int64)
        for shard, row_ids in enumerate(self._shard_rows):
            self._shard_of[row_ids] = shard
            self._start[row_ids] = np.cumsum(rows.lengths[row_ids]) - rows.lengths[row_ids]
        self._maps: dict[str, tuple[mmap.mmap, np.ndarray]] = {}
        self._names: dict[tuple[int, int], str] = {}

    def num_bytes(self, row_ids: IntArray | None = None) -> int:
        """Size on disk of the shards that hold these rows; of the whole cache by default."""
        return sum(self._num_bytes(shard) for _, shard in self._places(row_ids))

    def num_missing_bytes(self, row_ids: IntArray | None = None) -> int:
        """Of those, what is not there yet, by the names of the shards alone."""
        places = self._places(row_ids)
        missing = (
            place for place in places if not any(self.folder.glob(f"{self._prefix(*place)}.*.bin"))
        )
        return sum(self._num_bytes(shard) for _, shard in missing)

    def build(
        self,
        teacher: Callable[[Batch], Sequence[Tensor]],
        batch_tokens: int,
        row_ids: IntArray | None = None,
    ) -> None:
        """Compute the shards that are missing or damaged, and open the cache. One process builds, others wait for it.

        Args:
            teacher: gives the states (N, H) of each stored layer for a batch.
            batch_tokens: padded tokens of a batch.
            row_ids: rows that will be asked for; all by default.

        Raises:
            UserError: the disk has too little room, or fills up meanwhile; whole shards are kept for the next build. Or
                the states are beyond float16.
        """
        needed = self.num_bytes(row_ids)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # What is whole is checked by all ranks at once; one computes the rest.
            places = self._places(row_ids)
            names = {
                place: self._find(*place)
                for place in _tracked(places, "stored teacher states: check")
            }
            if None in names.values():
                with FileLock(self.folder / "lock"):
                    for leftover in self.folder.glob(".*.partial"):
                        leftover.unlink()
                    names |= {
                        place: self._find(*place, alone=True)
                        for place in places
                        if names[place] is None
                    }
                    missing = [place for place in places if names[place] is None]
                    needed = sum(self._num_bytes(shard) for _, shard in missing)
                    if needed > self._free():
                        raise self._no_room(needed)
                    for place, name in self._fill(missing, teacher, batch_tokens):
                        names[place] = name
                        needed -= self._num_bytes(place[1])
            self._names = {place: name for place, name in names.items() if name is not None}
        except OSError as error:  # others use the disk too
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise self._no_room(needed) from error

    def __call__(self, batch: Batch, layers: Sequence[int]) -> list[Tensor]:
        """The stored states of a batch's real tokens: for each of the layers a tensor (N, H), float16 on the CPU.

        Raises:
            OSError: a shard is gone, or cut, since ``build``.
        """
        indices = [self.layers.index(layer) for layer in layers]
        variant = int(batch["variant"])
        sample_ids = batch["sample_ids"].cpu().numpy()
        lengths = self.rows.lengths[sample_ids]
        ends = np.cumsum(lengths)
        states = np.empty((len(indices), int(ends[-1])), dtype=self._record)
        touched = {
            int(shard): self._open(variant, int(shard))
            for shard in np.unique(self._shard_of[sample_ids])
        }
        for sample_id, end, length in zip(sample_ids, ends, lengths, strict=True):
            _, shard = touched[int(self._shard_of[sample_id])]
            start = self._start[sample_id]
            for position, index in enumerate(indices):
                states[position, end - length : end] = shard[index, start : start + length]
        for mapped, _ in touched.values():
            # Pages around those that were read count as this process's memory, ten times as many; the file cache
            # keeps them.
            mapped.madvise(mmap.MADV_DONTNEED)
        return [unpack(layer_states) for layer_states in states]

    def _places(self, row_ids: IntArray | None) -> list[tuple[int, int]]:
        shards = (
            range(len(self._shard_rows))
            if row_ids is None
            else np.unique(self._shard_of[row_ids]).tolist()
        )
        return [(variant, shard) for variant in range(self.rows.num_variants) for shard in shards]

    def _num_tokens(self, shard: int) -> int:
        return int(self.rows.lengths[self._shard_rows[shard]].sum())

    def _num_bytes(self, shard: int) -> int:
        return self._num_tokens(shard) * self._bytes_a_token

    def _prefix(self, variant: int, shard: int) -> str:
        return f"variant{variant:02d}_{shard:05d}"

    def _digest(self, prefix: str) -> "hashlib._Hash":
        return hashlib.sha256(f"{self.folder.name}/{prefix}".encode())

    def _find(self, variant: int, shard: int, alone: bool = False) -> str | None:
        """The name of a finished, undamaged shard; who is ``alone`` removes a damaged one."""
        prefix = self._prefix(variant, shard)
        for path in self.folder.glob(f"{prefix}.*.bin"):
            try:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, lambda: self._digest(prefix))
            except FileNotFoundError:  # a damaged one that another process has just removed
                continue
            if digest.hexdigest() == path.name.split(".")[1]:
                return path.name
            if alone:
                log.warning("%s is damaged; its states are computed anew.", path)
                path.unlink()
        return None

    def _fill(
        self,
        missing: list[tuple[int, int]],
        teacher: Callable[[Batch], Sequence[Tensor]],
        batch_tokens: int,
    ) -> Iterator[tuple[tuple[int, int], str]]:
        """Compute and write shards; a shard is written while the next one is computed."""
        most = max((self._num_tokens(shard) for _, shard in missing), default=0)
        buffers = [
            np.empty((len(self.layers), most), dtype=self._record) for _ in range(2)
        ]  # fresh pages take time
        pending: list[
            Future[str]
        ] = []  # popped, not named: an error would keep a frame that keeps the error
        with ThreadPoolExecutor(1) as writer:
            for number, place in enumerate(_tracked(missing, "teacher states")):
                states = self._compute(*place, teacher, batch_tokens, buffers[number % 2])
                if pending:
                    yield missing[number - 1], pending.pop().result()
                pending.append(writer.submit(self._write, *place, states))
            if pending:
                yield missing[-1], pending.pop().result()

    def _compute(
        self,
        variant: int,
        shard: int,
        teacher: Callable[[Batch], Sequence[Tensor]],
        batch_tokens: int,
        buffer: np.ndarray,
    ) -> list[np.ndarray]:
        """For each layer the records of a shard, in a buffer (L, any number of tokens)."""
        row_ids = self._shard_rows[shard]
        states = [layer_states[: self._num_tokens(shard)] for layer_states in buffer]
        position = 0
        rows_a_batch = max(1, batch_tokens // int(self.rows.padded_lengths[row_ids].max()))
        for start in range(0, len(row_ids), rows_a_batch):
            per_layer = teacher(self.rows[variant, row_ids[start : start + rows_a_batch]])
            num_tokens = len(per_layer[0])
            for layer_states, packed in zip(per_layer, states, strict=True):
                pack(layer_states, packed[position : position + num_tokens])
            position += num_tokens
        return states

    def _write(self, variant: int, shard: int, states: list[np.ndarray]) -> str:
        prefix = self._prefix(variant, shard)
        digest = self._digest(prefix)
        for layer_states in states:
            digest.update(layer_states.view(np.uint8).data)
        name = f"{prefix}.{digest.hexdigest()}.bin"
        # Plain writes, not a writable map: a full disk is then an error that can be caught, not a SIGBUS.
        descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=".", suffix=".partial")
        try:
            with os.fdopen(descriptor, "wb") as file:
                for layer_states in states:
                    file.write(layer_states.view(np.uint8).data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / name)
        except OSError:
            os.unlink(temporary)  # else a full disk stays full
            raise
        return name

    def _free(self) -> int:
        """Free bytes of the disk; the folder itself may be what did not fit."""
        return shutil.disk_usage(
            next(path for path in (self.folder, *self.folder.parents) if path.exists())
        ).free

    def _no_room(self, needed: int) -> UserError:
        return UserError(
            f"The teacher's states need {needed:,} bytes in {str(self.folder.parent)!r}, {self._free():,} are free: "
            "make room, give another folder, or lower the disk budget so that the teacher runs live."
        )

    def _open(self, variant: int, shard: int) -> tuple[mmap.mmap, np.ndarray]:
        name = self._names[variant, shard]
        found = self._maps.pop(name, None)
        if found is None:
            shape, path = (len(self.layers), self._num_tokens(shard)), self.folder / name
            try:
                with path.open("rb") as file:
                    is_whole = os.fstat(file.fileno()).st_size == self._num_bytes(
                        shard
                    )  # beyond its end is a SIGBUS
                    mapped = (
                        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if is_whole else None
                    )
            except FileNotFoundError:
                mapped = None
            if mapped is None:
                raise OSError(
                    errno.ESTALE,
                    "Stored teacher states were removed or cut while in use",
                    str(path),
                )
            found = mapped, np.frombuffer(mapped, dtype=self._record).reshape(shape)
            if len(self._maps) >= MOST_MAPS:
                del self._maps[
                    next(iter(self._maps))
                ]  # the one that was not used for the longest time
        self._maps[name] = found
        return found
