"""Rows of token ids in a folder: made once from a text, shared by every worker and rank.

The folder is created complete or not at all. Each ``.bin`` file holds values of all rows, one row
after the other:

- ``lengths.bin`` holds each row's number of tokens (int64).
- ``second_starts.bin`` holds the index of the token at which the second sentence begins (int64).
- ``hashes.bin`` holds the hash of each row's text (uint64).
- ``splits.bin`` holds each row's ``split`` in the source (uint8): 0 for no value, 1 for ``train``,
  2 for ``held_out``.
- ``variant00.bin``, ``variant01.bin``, ... hold the token ids under mask 0, mask 1, ... (int32).

``about.<hash of its content>.json`` has the hash of all ``.bin`` files, and the folder's name,
which is the hash of everything that the rows depend on: a folder that was renamed is not used.
``checked.json`` has the size and modification time of each ``.bin`` file when they were last
hashed.

Several processes write the rows in files of some thousand rows (pieces), which are then joined. A
piece is complete or does not exist, so work that was killed resumes.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdnas.data.corpus import HashArray, SplitArray
from kdnas.data.masking import Draw, IntArray, Masker, row_generator
from kdnas.system.files import KeptFile, new_file, read_stamps, stamp, write_json

# Padded lengths are multiples of this, so that shapes repeat: each new shape needs new kernels.
LENGTH_STEP = 8


def padded(lengths: IntArray, max_length: int) -> IntArray:
    """Return rows' lengths rounded up to multiples of ``LENGTH_STEP``, at most ``max_length``."""
    return np.minimum(-(-lengths // LENGTH_STEP) * LENGTH_STEP, max_length)


class Batch(TypedDict):
    """A batch of B rows of similar length, padded to T tokens.

    Args:
        input_ids: token ids, (B, T), masked.
        attention_mask: (B, T), 1 on real tokens; its sum N is the number of real tokens.
        token_type_ids: (B, T), 1 from a second sentence's first token to the row's end.
        sample_ids: numbers of the rows in the corpus, (B,).
        variant: which of each row's masks was used, a scalar.
        real_tokens: indices of the real tokens among all B * T, (N,); added by ``located``.
        pairs: indices of the rows with a second sentence, (P,); added by ``located``.
        states: maps the number of a teacher layer to the layer's hidden states of the real tokens,
            (N, H); only if they were read in advance.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    sample_ids: Tensor
    variant: Tensor
    real_tokens: NotRequired[Tensor]
    pairs: NotRequired[Tensor]
    states: NotRequired[dict[int, Tensor]]


def located(batch: Batch) -> Batch:
    """Return a copy of a batch, with the indices of its real tokens and of its pairs.

    The batch should be on the CPU: on a GPU, the call would wait for the GPU's earlier work.
    """
    return {**batch, "real_tokens": real_tokens(batch), "pairs": pairs(batch)}


def real_tokens(batch: Mapping[str, Any]) -> Tensor:
    """Return the indices of a batch's real tokens among all its B * T tokens, shape (N,)."""
    if "real_tokens" in batch:
        return cast(Tensor, batch["real_tokens"])
    return cast(Tensor, batch["attention_mask"]).flatten().nonzero()[:, 0]


def pairs(batch: Mapping[str, Any]) -> Tensor:
    """Return the indices of a batch's rows that have a second sentence, shape (P,)."""
    if "pairs" in batch:
        return cast(Tensor, batch["pairs"])
    return cast(Tensor, batch["token_type_ids"]).any(1).nonzero()[:, 0]


def write_piece(
    path: Path,
    rows: Iterable[tuple[list[int], int]],
    masker: Masker,
    first: int = 0,
    num_variants: int = 1,
    masked_share: float = 1.0,
) -> None:
    """Mask some rows and write them into one file, a piece.

    Args:
        path: the file to write.
        rows: for each row its token ids, special tokens included, and the index at which its second
            sentence begins (the row's length if there is none).
        masker: masks the rows.
        first: number of the first row in the corpus.
        num_variants: number of masks for each row.
        masked_share: share of the rows that have masked tokens, drawn anew for each of a row's
            masks.
    """
    lengths, second_starts = [], []
    variants: list[list[IntArray]] = [[] for _ in range(num_variants)]
    for sample_id, (ids, second_start) in enumerate(rows, first):
        row = np.array(ids, dtype=np.int64)
        lengths.append(len(row))
        second_starts.append(second_start)
        for variant, masked in enumerate(variants):
            draw = row_generator(Draw.WHETHER_MASKED, masker.seed, sample_id, variant).random()
            masked.append(masker(row, sample_id, variant) if draw < masked_share else row)
    numbers = [np.array([len(lengths), *lengths, *second_starts]), *(sum(variants, []))]
    content = np.concatenate(numbers).astype(np.int32).tobytes()
    with new_file(path) as file:
        file.write(hashlib.sha256(content).digest() + content)


def is_piece(path: Path) -> bool:
    """Return whether the file is a complete, undamaged piece."""
    if not path.exists():
        return False
    content = path.read_bytes()
    return hashlib.sha256(content[32:]).digest() == content[:32]


def join_pieces(
    folder: Path,
    pieces: Iterable[Path],
    hashes: HashArray,
    splits: SplitArray,
    *,
    key: str,
    dropped: dict[str, int],
    num_variants: int = 1,
) -> None:
    """Join pieces of rows, in the given order, and write all files of a folder of tokenised rows.

    Args:
        folder: an empty folder.
        pieces: files that ``write_piece`` wrote.
        hashes: hash of each row's text.
        splits: each row's column ``split`` in the source: 0 for no value, 1 for ``train``, 2 for
            ``held_out``.
        key: name that the folder will get.
        dropped: how many rows of the text were left out, by reason.
        num_variants: number of masks of each row.
    """
    names = ["lengths", "second_starts", *(f"variant{i:02d}" for i in range(num_variants))]
    with ExitStack() as stack:
        files = [stack.enter_context((folder / f"{name}.bin").open("wb")) for name in names]
        for path in pieces:
            size, *numbers = np.split(np.fromfile(path, np.int32, offset=32), [1])
            lengths, second_starts, tokens = np.split(numbers[0], [size[0], 2 * size[0]])
            for file, values in zip(files, (lengths, second_starts), strict=False):
                file.write(values.astype(np.int64).tobytes())
            for file, values in zip(files[2:], np.split(tokens, num_variants), strict=True):
                file.write(values.tobytes())
    (folder / "hashes.bin").write_bytes(hashes.tobytes())
    (folder / "splits.bin").write_bytes(splits.tobytes())
    about = {
        "key": key,
        "dropped": dropped,
        "num_variants": num_variants,
        "sha256": _sha256(folder),
    }
    content = json.dumps(about)
    (folder / _about(content)).write_text(content)
    write_json(folder / "checked.json", _stamps(folder))


def is_whole(folder: Path, has_lock: bool = False) -> bool:
    """Return whether a folder of tokenised rows is complete, undamaged and not renamed.

    If files changed since they were last hashed, they must be hashed again. This is done only if
    the caller holds the folder's lock (``has_lock``); otherwise the result is False.
    """
    about, checked = _read_about(folder), folder / "checked.json"
    if about is None or about["key"] != folder.name:
        return False
    if read_stamps(checked) == (stamps := _stamps(folder)):
        return True
    is_same = has_lock and about["sha256"] == _sha256(folder)
    if is_same:
        write_json(checked, stamps)
    return is_same


def _stamps(folder: Path) -> dict[str, list[int]]:
    return {path.name: stamp(path) for path in sorted(folder.glob("*.bin"))}


def _read_about(folder: Path) -> dict[str, Any] | None:
    """Return the content of ``about.<hash>.json``, or None if the file is missing or damaged."""
    for path in folder.glob("about.*"):
        if path.name == _about(content := path.read_bytes().decode(errors="replace")):
            about = dict(json.loads(content))
            return about if "key" in about else None
    return None


def _about(content: str) -> str:
    return f"about.{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"


def _variant(folder: Path, variant: int) -> Path:
    return folder / f"variant{variant:02d}.bin"


def _sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.bin")):
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


class TokenRows(Dataset[Batch]):
    """Dataset of tokenised rows on disk, in a folder that ``join_pieces`` wrote.

    An index is a pair (number of the mask, numbers of the rows), and an item is a whole batch.
    ``sha256`` is the hash of the ``.bin`` files, and so of everything that a model sees: text,
    tokenizer, truncation, pairs, masks and order of rows.

    Args:
        folder: folder of the rows.
        pad_token_id: id of the padding token.
        max_length: largest padded length of a row, in tokens.
        pad_to_max_length: pad every row to ``max_length``.
    """

    def __init__(
        self, folder: Path, pad_token_id: int, max_length: int, pad_to_max_length: bool = False
    ) -> None:
        self._made_with = (folder, pad_token_id, max_length, pad_to_max_length)
        self.folder = folder
        self.pad_token_id = pad_token_id
        about = _read_about(folder)
        assert about is not None, "check it with is_whole() first"
        self.dropped: dict[str, int] = about["dropped"]
        self.num_variants: int = about["num_variants"]
        self.sha256: str = about["sha256"]
        self.lengths: IntArray = np.fromfile(folder / "lengths.bin", dtype=np.int64)
        self.second_starts: IntArray = np.fromfile(folder / "second_starts.bin", dtype=np.int64)
        self.hashes: HashArray = np.fromfile(folder / "hashes.bin", dtype=np.uint64)
        self.splits: SplitArray = np.fromfile(folder / "splits.bin", dtype=np.uint8)
        self.padded_lengths = padded(self.lengths, max_length)
        if pad_to_max_length:
            self.padded_lengths[:] = max_length
        self._starts: IntArray = np.cumsum(self.lengths) - self.lengths
        self._files = [KeptFile(_variant(folder, variant)) for variant in range(self.num_variants)]

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenRows, self._made_with  # open files cannot go to another process

    def __len__(self) -> int:
        return len(self.lengths)

    def masked(self, variant: int, sample_id: int) -> IntArray:
        """Return the token ids of row ``sample_id``, masked by its mask number ``variant``."""
        size = np.dtype(np.int32).itemsize
        start = size * int(self._starts[sample_id])
        piece = self._files[variant].piece(start, size * int(self.lengths[sample_id]))
        return np.frombuffer(piece, dtype=np.int32)

    def __getitem__(self, index: tuple[int, IntArray]) -> Batch:
        variant, sample_ids = index
        lengths = self.lengths[sample_ids]
        places = np.arange(self.padded_lengths[sample_ids].max())
        input_ids = np.full((len(sample_ids), len(places)), self.pad_token_id, dtype=np.int64)
        attention_mask = places < lengths[:, None]
        second = attention_mask & (places >= self.second_starts[sample_ids][:, None])
        input_ids[attention_mask] = np.concatenate([self.masked(variant, i) for i in sample_ids])
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask.astype(np.int64)),
            "token_type_ids": torch.from_numpy(second.astype(np.int64)),
            "sample_ids": torch.from_numpy(np.asarray(sample_ids, dtype=np.int64)),
            "variant": torch.tensor(variant),
        }
