import errno
import functools
import hashlib
import json
import math
import mmap
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import Tensor

from kdnas.data.datamodule import Batch, DataSettings, KDDataModule
from kdnas.data.masking import Masker
from kdnas.data.tokens import TokenRows
from kdnas.distillation import state_cache as cache_module
from kdnas.distillation.state_cache import StateCache, cache_key
from kdnas.models.encoders import find_teacher
from kdnas.system.errors import UserError
from kdnas.system.jobs import DISK_ERRORS
from tests.conftest import make_rows, save_teacher, write_rows

LAYERS, WIDTH, VARIANTS, BATCH_TOKENS, NUM_ROWS = [1, 3], 4, 2, 40, 40


@functools.cache
def token_rows() -> TokenRows:
    generator = np.random.default_rng(0)
    rows = [
        generator.integers(5, 70, size=generator.integers(3, 12)).tolist() for _ in range(NUM_ROWS)
    ]
    with tempfile.TemporaryDirectory() as name:  # it may be removed once it is open
        masker = Masker(4, 70, [3], probability=0.3)
        numbered = [(row, len(row)) for row in rows]
        write_rows(Path(name), numbered, masker, "rows", VARIANTS)
        return TokenRows(Path(name), pad_token_id=3, max_length=12)


def states_of(batch: Batch) -> list[Tensor]:
    """States that tell layer, variant, row, place and token apart, exact in float16."""
    real = batch["attention_mask"].bool()
    rows = batch["sample_ids"][:, None].expand_as(real)
    places = torch.arange(real.shape[1]).expand_as(real)
    told = torch.stack([batch["variant"].expand_as(real), rows, places, batch["input_ids"]], dim=-1)
    return [told[real].float() + 100 * layer for layer in LAYERS]


class FakeTeacher:
    """Gives ``states_of`` batches, keeps count of (variant, row), and is interrupted after ``num_batches``."""

    def __init__(self, num_batches: int = 1000) -> None:
        self.asked: Counter[tuple[int, int]] = Counter()
        self.num_passes = 0
        self.batches_left = num_batches

    def __call__(self, batch: Batch) -> list[Tensor]:
        self.batches_left -= 1
        if self.batches_left < 0:
            raise KeyboardInterrupt
        assert batch["input_ids"].numel() <= BATCH_TOKENS
        self.num_passes += 1
        self.asked.update((int(batch["variant"]), int(row)) for row in batch["sample_ids"])
        return states_of(batch)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Three shards a variant."""
    monkeypatch.setattr(cache_module, "SHARD_BYTES", 1 << 11)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "states" / "key"


def open_cache(folder: Path) -> StateCache:
    return StateCache(folder, token_rows(), LAYERS, WIDTH)


def build(folder: Path) -> tuple[StateCache, Counter]:
    """The cache, and what its teacher was asked for."""
    teacher, cache = FakeTeacher(), open_cache(folder)
    cache.build(teacher, BATCH_TOKENS)
    return cache, teacher.asked


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.bin"))}


def rows_in(shard: bytes) -> Counter:
    """The (variant, row) of a shard, as its bytes tell them."""
    states = np.frombuffer(shard, np.float16).reshape(len(LAYERS), -1, WIDTH)[0] - 100 * LAYERS[0]
    return Counter({(int(variant), int(row)) for variant, row, _, _ in states})


EVERYTHING = Counter((variant, row) for variant in range(VARIANTS) for row in range(NUM_ROWS))


def check(cache: StateCache) -> None:
    """Every row, with every mask, alone and among others, has its teacher's states."""
    order = np.random.default_rng(1).permutation(NUM_ROWS)
    for variant in range(VARIANTS):
        for sample_ids in [*np.split(order, 8), np.arange(NUM_ROWS), np.array([7])]:
            batch = cache.rows[variant, sample_ids]
            expected = dict(zip(LAYERS, states_of(batch), strict=True))
            for layers in ([1, 3], [3, 1], [3]):
                for layer, states in zip(layers, cache(batch, layers), strict=True):
                    assert states.dtype == torch.float16
                    assert torch.equal(states.float(), expected[layer])


def test_states_come_back_as_the_teacher_gave_them(folder):
    cache, asked = build(folder)
    assert asked == EVERYTHING
    assert len(shards(folder)) == 3 * VARIANTS
    assert sum(map(len, shards(folder).values())) == cache.num_bytes()
    check(cache)


def test_few_shards_are_open_at_once(folder, monkeypatch):
    monkeypatch.setattr(cache_module, "MOST_MAPS", 2)
    cache, _ = build(folder)
    check(cache)
    links = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert 0 < sum(link.is_relative_to(folder) for link in links) <= 2


def test_pages_that_were_read_are_given_back(folder, monkeypatch):
    given_back = []

    class Map(mmap.mmap):
        def madvise(self, option, *args):
            given_back.append(option)
            return super().madvise(option, *args)

    monkeypatch.setattr(cache_module.mmap, "mmap", Map)
    cache = build(folder)[0]
    cache(cache.rows[0, np.arange(NUM_ROWS)], LAYERS)
    assert given_back == [mmap.MADV_DONTNEED] * 3  # one a shard
    check(cache)


def test_shares_make_each_shard_once_and_together_the_cache(folder):
    folder.mkdir(parents=True)
    teachers = [FakeTeacher() for _ in range(2)]
    for share, teacher in enumerate(teachers):
        rows = np.arange(NUM_ROWS)
        open_cache(folder).build_share(teacher, BATCH_TOKENS, rows, share, len(teachers))
    assert teachers[0].asked and teachers[1].asked
    assert teachers[0].asked + teachers[1].asked == EVERYTHING
    cache, asked = build(folder)
    assert not asked
    check(cache)


def test_a_cache_that_is_there_asks_no_teacher(folder):
    build(folder)
    before = shards(folder)
    cache, asked = build(folder)
    assert not asked and shards(folder) == before
    check(cache)


def test_an_interrupted_build_goes_on_after_its_last_whole_shard(folder):
    teacher = FakeTeacher(num_batches=16)
    with pytest.raises(KeyboardInterrupt):
        open_cache(folder).build(teacher, BATCH_TOKENS)
    done = shards(folder)
    assert 0 < len(done) < 3 * VARIANTS
    kept = sum(map(rows_in, done.values()), Counter())
    assert kept < teacher.asked < EVERYTHING  # the last shard was begun
    cache, asked = build(folder)
    assert asked == EVERYTHING - kept
    assert shards(folder).items() > done.items()
    check(cache)


def flip(position: Callable[[int], int]) -> Callable[[Path, Path], None]:
    def damage(path: Path, other: Path) -> None:
        content = bytearray(path.read_bytes())
        content[position(len(content))] ^= 1
        path.write_bytes(content)

    return damage


def swap(path: Path, other: Path) -> None:
    """Two shards under each other's name."""
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def swap_places(path: Path, other: Path) -> None:
    """Two shards in each other's place, each with its own hash."""
    (place, digest, suffix), (other_place, other_digest, _) = (
        path.name.split("."),
        other.name.split("."),
    )
    path.rename(path.with_name(f"{other_place}.{digest}.{suffix}"))
    other.rename(path.with_name(f"{place}.{other_digest}.{suffix}"))


def of_another_cache(path: Path, other: Path) -> None:
    """A whole shard of the same place and size, from the folder of another key."""
    cache, _ = build(path.parent.with_name("another"))
    (found,) = cache.folder.glob(f"{path.name.split('.')[0]}.*")
    path.unlink()
    shutil.copy(found, path.with_name(found.name))


DAMAGES = {
    "of another cache": of_another_cache,
    "first byte": flip(lambda size: 0),
    "middle byte": flip(lambda size: size // 2),
    "last byte": flip(lambda size: size - 1),
    "truncated": lambda path, other: os.truncate(path, path.stat().st_size - 1),
    "100 bytes cut": lambda path, other: os.truncate(path, path.stat().st_size - 100),
    "halved": lambda path, other: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path, other: os.truncate(path, 0),
    "appended": lambda path, other: path.write_bytes(path.read_bytes() + b"\0"),
    "deleted": lambda path, other: path.unlink(),
    "under another name": lambda path, other: path.rename(
        path.with_name(path.name.split(".")[0] + ".abc.bin")
    ),
    "swapped": swap,
    "in each other's place": swap_places,
    "a copy of another": lambda path, other: shutil.copy(other, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("first", "second"), [(0, 1), (4, 1), (5, 4)])
def test_a_damaged_shard_is_found_and_computed_again_alone(folder, damage, first, second, caplog):
    build(folder)
    before = shards(folder)
    names = list(before)
    DAMAGES[damage](folder / names[first], folder / names[second])
    assert shards(folder) != before
    touched = names if damage in ("swapped", "in each other's place") else [names[first]]
    touched = [name for name in touched if name in (names[first], names[second])]
    cache, asked = build(folder)
    assert asked == sum((rows_in(before[name]) for name in touched), Counter())
    assert shards(folder) == before
    assert ("is damaged; its states are computed again" in caplog.text) is (damage != "deleted")
    check(cache)


@pytest.mark.parametrize("damage", ["deleted", "100 bytes cut", "empty"])
def test_a_shard_that_goes_while_the_cache_is_used_is_an_error_of_the_disk_that_names_it(
    folder, damage
):
    cache, _ = build(folder)
    paths = sorted(folder.glob("*.bin"))
    for path in paths:
        DAMAGES[damage](path, path)
    with pytest.raises(
        OSError, match="Stored teacher states were removed or cut while in use"
    ) as caught:
        check(cache)
    assert caught.value.filename in map(str, paths) and caught.value.errno in DISK_ERRORS
    check(build(folder)[0])


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "junk.bin",
        "variant00_00000.abc.bin",
        "variant99_00000.abc.bin",
        ".stray.partial",
    ],
)
def test_a_stray_file_does_no_harm(folder, name):
    build(folder)
    before = shards(folder)
    (folder / name).write_bytes(b"stray")
    cache, asked = build(folder)
    assert not asked
    assert shards(folder).items() >= before.items()
    check(cache)


def test_a_disk_too_small_is_refused_with_both_sizes_and_no_state_is_written(folder, monkeypatch):
    needed = open_cache(folder).num_bytes()
    free = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    message = (
        rf"need {needed:,} bytes in '{re.escape(str(folder.parent))}', {needed - 1:,} are free: "
    )
    with pytest.raises(UserError, match=message):
        build(folder)
    assert {path.name for path in folder.iterdir()} <= {"lock"}
    free.free = needed
    check(build(folder)[0])


def test_only_the_shards_that_are_missing_need_room(folder, monkeypatch):
    build(folder)
    path = next(folder.glob("*.bin"))
    free = SimpleNamespace(free=path.stat().st_size)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    path.unlink()
    build(folder)
    path.unlink()
    free.free -= 1
    with pytest.raises(UserError, match=f"need {free.free + 1:,} bytes"):
        build(folder)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_disk_that_is_full_after_all_leaves_no_shard_that_counts(
    tmp_path, folder, monkeypatch, name, number
):
    whole = list(shards(build(tmp_path / "whole")[0].folder).values())
    todo = sum(map(len, whole[2:]))
    real, calls = getattr(os, name), []

    def full(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(number, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, full)
        with pytest.raises(UserError, match=rf"need {todo:,} bytes in .*, [\d,]+ are free: "):
            build(folder)
    done = shards(folder)
    assert len(done) == 2 and sum(map(len, done.values())) + todo == open_cache(folder).num_bytes()
    assert not list(folder.glob(".*.partial"))
    cache, asked = build(folder)
    assert asked == EVERYTHING - sum(map(rows_in, done.values()), Counter())
    assert not list(folder.glob(".*.partial"))
    check(cache)


def test_another_error_of_the_disk_is_not_taken_for_a_full_one(folder, monkeypatch):
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        build(folder)
    assert {path.name for path in folder.iterdir()} <= {"lock"}


def test_a_folder_that_does_not_fit_is_named(folder, monkeypatch):
    def full(*args, **kwargs) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    needed = open_cache(folder).num_bytes()
    with pytest.raises(
        UserError,
        match=rf"need {needed:,} bytes in '{re.escape(str(folder.parent))}', [\d,]+ are free",
    ):
        open_cache(folder).build(FakeTeacher(), BATCH_TOKENS)


def test_a_disk_that_fills_up_while_the_cache_is_built(small_disk, monkeypatch):
    folder, filler = small_disk / "states" / "key", small_disk / "filler"
    teacher = FakeTeacher()

    def filling(batch: Batch) -> list[Tensor]:
        if teacher.num_passes == 14:
            with pytest.raises(OSError, match="No space left"):
                filler.write_bytes(bytes(3 << 20))
        return teacher(batch)

    with pytest.raises(
        UserError, match=rf"need [\d,]+ bytes in '{re.escape(str(folder.parent))}', 0 are free: "
    ):
        open_cache(folder).build(filling, BATCH_TOKENS)
    done = shards(folder)
    assert 0 < len(done) < 3 * VARIANTS
    assert not list(folder.glob(".*.partial"))
    with pytest.raises(UserError, match="0 are free"):  # at once
        open_cache(folder).build(FakeTeacher(0), BATCH_TOKENS)
    assert shards(folder) == done
    filler.unlink()
    cache, asked = build(folder)
    assert asked == EVERYTHING - sum(map(rows_in, done.values()), Counter())
    assert shards(folder).items() > done.items()
    check(cache)


def test_a_disk_that_is_full_from_the_start(small_disk):
    folder = small_disk / "states" / "key"
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "filler").write_bytes(bytes(3 << 20))
    with pytest.raises(
        UserError, match=rf"bytes in '{re.escape(str(folder.parent))}', 0 are free: "
    ):
        open_cache(folder).build(FakeTeacher(0), BATCH_TOKENS)
    (small_disk / "filler").unlink()
    check(build(folder)[0])


def test_the_key_changes_with_all_that_the_states_depend_on_and_with_nothing_else(
    tmp_path, tiny_teacher, text_file, monkeypatch
):
    def rows(teacher: Path = tiny_teacher, text: Path = text_file, **settings) -> TokenRows:
        data = KDDataModule(
            str(teacher),
            str(text),
            DataSettings(**({"max_length": 32, "pair_share": 0.0, "masked_share": 1.0} | settings)),
        )
        data.setup()
        return data.rows

    (tmp_path / "other.txt").write_text("\n".join(make_rows(120, seed=1)))
    vocabulary = save_teacher(tmp_path / "vocabulary")
    tokenizer = vocabulary / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"river": ', '"rivers": '))
    trained = find_teacher(str(tiny_teacher)).load()
    weights = find_teacher(str(tiny_teacher)).sha256()
    trained.encoder.layer[3].output.dense.bias.data[5] += 1e-3
    trained.save_pretrained(tmp_path / "trained")
    shutil.copytree(
        tiny_teacher,
        tmp_path / "trained",
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("*.safet*"),
    )

    def configured(**values: object) -> str:
        """The same weights, with which another config computes something else."""
        folder = shutil.copytree(tiny_teacher, tmp_path / "configured", dirs_exist_ok=True)
        config = json.loads((tiny_teacher / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))
        return find_teacher(str(folder)).sha256()

    key = cache_key(weights, rows(), LAYERS)
    assert (
        configured(
            hidden_dropout_prob=0.3, num_labels=5, problem_type="regression", use_cache=False
        )
        == weights
    )
    others = [
        cache_key(configured(hidden_act="relu"), rows(), LAYERS),
        cache_key(configured(num_attention_heads=4), rows(), LAYERS),
        cache_key(configured(layer_norm_eps=1e-3), rows(), LAYERS),
        cache_key(find_teacher(str(tmp_path / "trained")).sha256(), rows(), LAYERS),
        cache_key(weights, rows(vocabulary), LAYERS),
        cache_key(weights, rows(text=tmp_path / "other.txt"), LAYERS),
        cache_key(weights, rows(mask_probability=0.16), LAYERS),
        cache_key(weights, rows(masked_share=0.5), LAYERS),
        cache_key(weights, rows(pair_share=0.5), LAYERS),
        cache_key(weights, rows(pair_share=1.0), LAYERS),
        cache_key(weights, rows(max_length=16), LAYERS),
        cache_key(weights, rows(), LAYERS, order=np.arange(120)),
        cache_key(weights, rows(), [1, 2]),
        cache_key(weights, rows(), [1]),
        cache_key(weights, rows(num_mask_variants=2), LAYERS),
    ]
    others.append(cache_key(weights, rows(), LAYERS, "int8"))
    others.append(cache_key(weights, rows(), LAYERS, computed_in=torch.bfloat16))
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "FORMAT", cache_module.FORMAT + 1)
        others.append(cache_key(weights, rows(), LAYERS))
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "version", lambda package: f"another {package}")
        others.append(cache_key(weights, rows(), LAYERS))
    assert len({key, *others}) == 1 + len(others) == 20
    moved = shutil.copytree(tiny_teacher, tmp_path / "moved")
    same = rows(moved, batch_tokens=64, mini_fraction=0.5, held_out_fraction=0.5, num_workers=1)
    assert cache_key(find_teacher(str(moved)).sha256(), same, LAYERS) == key


def build_slowly(folder: Path, barrier, answers) -> None:
    """In one of several processes, so slowly that they overlap."""
    teacher = FakeTeacher()

    def slow(batch: Batch) -> list[Tensor]:
        time.sleep(0.005)
        return teacher(batch)

    cache = open_cache(folder)
    barrier.wait()
    cache.build(slow, BATCH_TOKENS)
    check(cache)
    answers.put((teacher.asked, teacher.num_passes))


def test_two_processes_at_once_make_one_cache_and_compute_each_shard_once(folder):
    context = multiprocessing.get_context("fork")  # spawned ones would import torch for seconds
    barrier, answers = context.Barrier(2), context.SimpleQueue()
    workers = [
        context.Process(target=build_slowly, args=(folder, barrier, answers)) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    (asked, passes), (other_asked, other_passes) = answers.get(), answers.get()
    assert asked + other_asked == EVERYTHING
    alone = FakeTeacher()
    open_cache(folder.with_name("alone")).build(alone, BATCH_TOKENS)
    assert passes + other_passes == alone.num_passes
    assert sorted(shards(folder).values()) == sorted(shards(folder.with_name("alone")).values())
    assert len(shards(folder)) == 3 * VARIANTS
    assert not list(folder.glob(".*.partial"))
    check(build(folder)[0])


def test_whole_states_are_checked_though_another_process_has_the_lock(folder):
    build(folder)
    with FileLock(folder / "lock"):
        checked: list[None] = []
        thread = threading.Thread(
            target=lambda: checked.append(check(build(folder)[0])), daemon=True
        )
        thread.start()
        thread.join(timeout=30)
    assert len(checked) == 1


@pytest.fixture
def counted(monkeypatch) -> Counter:
    """How often a folder was listed, and the bytes of a file hashed."""
    count: Counter[str] = Counter()

    def counting(module, name: str) -> None:
        real = getattr(module, name)

        def call(*args):
            count[name] += 1
            return real(*args)

        monkeypatch.setattr(module, name, call)

    counting(os, "scandir")
    counting(hashlib, "file_digest")
    return count


def test_many_shards_are_opened_by_a_listing_or_two_and_are_not_read_again(
    folder, monkeypatch, counted
):
    monkeypatch.setattr(cache_module, "SHARD_BYTES", 1)
    cache, _ = build(folder)
    assert len(shards(folder)) == NUM_ROWS * VARIANTS
    counted.clear()
    again = open_cache(folder)
    assert again.num_missing_bytes() == 0
    again.build(FakeTeacher(0), BATCH_TOKENS)
    assert counted == {"scandir": 2}
    check(again)


def test_of_several_processes_one_reads_the_shards_of_a_cache_that_was_copied(folder, counted):
    build(folder)
    whole = shards(folder)
    for path in folder.glob("*.bin"):
        os.utime(path, (0, 0))
    for num_hashed in (len(whole), 0):
        counted.clear()
        assert not build(folder)[1]
        assert counted["file_digest"] == num_hashed
    (folder / "checked.json").write_text("damaged")
    assert not build(folder)[1] and counted["file_digest"] == len(whole)
    assert shards(folder) == whole


def test_a_damaged_shard_that_another_process_removes_first_is_computed_again(folder, monkeypatch):
    build(folder)
    before = shards(folder)
    gone, stamp = folder / next(iter(before)), cache_module.stamp
    gone.write_bytes(b"damaged")

    def late(entry: os.DirEntry) -> list[int]:
        if entry.name == gone.name and gone.read_bytes() == b"damaged":
            gone.unlink()
        return stamp(entry)

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "stamp", late)
        cache, asked = build(folder)
    assert asked == rows_in(before[gone.name])
    assert shards(folder) == before
    check(cache)


@pytest.mark.parametrize(("num_passes", "num_done"), [(3, 0), (21, 4)])
def test_a_killed_builder_frees_its_lock_and_the_one_that_waits_finishes(
    folder, num_passes, num_done
):
    context = multiprocessing.get_context("fork")
    reached, answers = context.Event(), context.SimpleQueue()

    def build_until_killed() -> None:
        teacher = FakeTeacher()

        def stuck(batch: Batch) -> list[Tensor]:
            if teacher.num_passes == num_passes:
                reached.set()
                time.sleep(60)
            return teacher(batch)

        open_cache(folder).build(stuck, BATCH_TOKENS)

    def wait_and_finish() -> None:
        cache, asked = build(folder)
        check(cache)
        answers.put(asked)

    killed, waiting = (
        context.Process(target=target) for target in (build_until_killed, wait_and_finish)
    )
    killed.start()
    assert reached.wait(timeout=30)
    for _ in range(1000):  # the last whole one may still be written
        if len(done := shards(folder)) == num_done:
            break
        time.sleep(0.01)
    (folder / ".half.partial").write_bytes(b"what a builder leaves that is killed while it writes")
    waiting.start()
    waiting.join(timeout=0.3)
    assert waiting.is_alive(), "the lock is held"
    os.kill(killed.pid, signal.SIGKILL)
    waiting.join(timeout=30)
    killed.join(timeout=30)
    assert (killed.exitcode, waiting.exitcode) == (-signal.SIGKILL, 0)
    assert len(done) == num_done
    assert answers.get() == EVERYTHING - sum(map(rows_in, done.values()), Counter())
    assert not list(folder.glob(".*.partial"))
    assert shards(folder).items() > done.items() and len(shards(folder)) == 3 * VARIANTS


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_states_beyond_float16_are_refused_and_those_at_its_end_are_stored(folder, precision):
    def teacher(largest: float, batch: Batch) -> list[Tensor]:
        first, last = states_of(batch)
        last[-1, 1] = largest
        return [first, last]

    cache = StateCache(folder, token_rows(), LAYERS, WIDTH, precision)
    with pytest.raises(
        UserError,
        match=r"states reach 65,536. They .* largest number is 65,504: use another",
    ):
        cache.build(functools.partial(teacher, -65536.0), BATCH_TOKENS)
    with pytest.raises(UserError, match="The teacher's hidden states contain NaN"):
        cache.build(functools.partial(teacher, math.nan), BATCH_TOKENS)
    assert not shards(folder)
    cache.build(functools.partial(teacher, -65504.0), BATCH_TOKENS)
    states = torch.cat(cache(cache.rows[0, np.arange(NUM_ROWS)], LAYERS))
    assert states.min() == -65504.0 and states.isfinite().all()


@pytest.mark.parametrize("width", [384, 66])
def test_int8_takes_half_the_disk_and_is_off_by_half_a_step_at_most(folder, width):
    whole = StateCache(folder / "float16", token_rows(), LAYERS, width)
    small = StateCache(folder / "int8", token_rows(), LAYERS, width, "int8")
    assert small.num_bytes() / whole.num_bytes() == pytest.approx((width + 4) / (2 * width))

    def teacher(batch: Batch) -> list[Tensor]:
        rows = []
        for sample_id, length in zip(
            batch["sample_ids"].tolist(), batch["attention_mask"].sum(1).tolist(), strict=True
        ):
            rows.append(
                torch.randn(2, length, width, generator=torch.Generator().manual_seed(sample_id))
            )
            rows[-1][:, 0] = 0.0  # nothing to scale by
        return list(torch.cat(rows, 1) * torch.tensor([1.0, 300.0])[:, None, None])

    for cache in (whole, small):
        cache.build(teacher, BATCH_TOKENS)
        assert sum(path.stat().st_size for path in cache.folder.glob("*.bin")) == cache.num_bytes()
    batch = token_rows()[1, np.arange(NUM_ROWS)]
    for exact, rounded in zip(whole(batch, LAYERS), small(batch, LAYERS), strict=True):
        assert exact.dtype == rounded.dtype == torch.float16
        exact, rounded = exact.float(), rounded.float()
        step = exact.abs().amax(-1, keepdim=True) / 127
        assert ((exact - rounded).abs() <= 0.52 * step + 1e-3 * exact.abs()).all()
        assert 0 < (exact - rounded).square().mean() < 3e-4 * exact.square().mean()
    reopened = StateCache(small.folder, token_rows(), LAYERS, width, "int8")
    reopened.build(lambda batch: pytest.fail("it is there"), BATCH_TOKENS)
