import errno
import multiprocessing
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from kdnas.data.datamodule import Batch, TokenRows
from kdnas.data.masking import Masker
from kdnas.distill import cache as cache_module
from kdnas.distill.cache import StateCache, cache_key
from kdnas.errors import UserError

LAYERS, WIDTH, VARIANTS, BATCH_TOKENS = [1, 3], 4, 2, 40


def make_rows(seed: int = 0, probability: float = 0.3) -> TokenRows:
    generator = np.random.default_rng(0)
    rows = [generator.integers(5, 70, size=generator.integers(3, 12)).tolist() for _ in range(40)]
    return TokenRows(rows, Masker(4, 70, [3], probability, seed), pad_token_id=3)


class FakeTeacher:
    """States that tell layer, row, place, token and variant apart, exact in float16; remembers what it was asked."""

    def __init__(self, interrupt_after: int | None = None) -> None:
        self.asked: list[tuple[int, int]] = []
        self.interrupt_after = interrupt_after

    def __call__(self, batch: Batch) -> list[Tensor]:
        if self.interrupt_after is not None and len(self.asked) >= self.interrupt_after:
            raise KeyboardInterrupt
        assert batch["input_ids"].numel() <= BATCH_TOKENS
        variant = int(batch["variant"])
        self.asked += [(variant, int(i)) for i in batch["sample_ids"]]
        real = batch["attention_mask"].bool()
        rows = batch["sample_ids"][:, None].expand_as(real)
        places = torch.arange(real.shape[1]).expand_as(real)
        told = [batch["input_ids"], rows, places, torch.full_like(rows, variant)]
        states = torch.stack([values[real] for values in told], dim=-1).float()
        return [states + 100 * layer for layer in LAYERS]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Three shards a variant."""
    monkeypatch.setattr(cache_module, "SHARD_BYTES", 1 << 11)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "states" / "key"


def open_cache(folder: Path) -> StateCache:
    return StateCache(folder, make_rows(), LAYERS, WIDTH, VARIANTS)


def build(folder: Path, teacher: Callable[[Batch], list[Tensor]] | None = None) -> tuple[StateCache, list]:
    """The cache, and what its teacher was asked for."""
    teacher = teacher or FakeTeacher()
    cache = open_cache(folder)
    cache.build(teacher, BATCH_TOKENS)
    return cache, teacher.asked


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.bin"))}


def asked_for(folder: Path, names: set[str]) -> set[tuple[int, int]]:
    """The (variant, row) of shards, as their bytes tell them."""
    found = set()
    for name in names:
        states = np.frombuffer((folder / name).read_bytes(), np.float16).reshape(len(LAYERS), -1, WIDTH)[0] - 100
        found |= {(int(variant), int(row)) for _, row, _, variant in states}
    return found


def check(cache: StateCache) -> None:
    """Every row, with every mask, alone and among others, has its teacher's states."""
    generator = np.random.default_rng(1)
    order = generator.permutation(40)
    for variant in range(VARIANTS):
        for sample_ids in [*np.split(order, 8), np.arange(40), np.array([7])]:
            batch = cache.rows[variant, sample_ids]
            found, expected = cache(batch), FakeTeacher.__call__(SimpleNamespace(interrupt_after=None, asked=[]), batch)
            assert len(found) == len(LAYERS)
            for one, other in zip(found, expected, strict=True):
                assert one.dtype == torch.float16
                assert torch.equal(one.float(), other)


@pytest.fixture
def any_batch(monkeypatch):
    """The check may ask its oracle for batches of any size."""
    monkeypatch.setitem(globals(), "BATCH_TOKENS", 1000)


def test_states_come_back_as_the_teacher_gave_them(folder):
    cache, asked = build(folder)
    assert sorted(asked) == [(variant, row) for variant in range(VARIANTS) for row in range(40)]
    assert len(shards(folder)) == 3 * VARIANTS
    assert sum(map(len, shards(folder).values())) == cache.num_bytes()
    check(cache)
