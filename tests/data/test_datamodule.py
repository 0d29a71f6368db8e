import copy
import errno
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import nullcontext
from multiprocessing import resource_tracker
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from kdnas.data import datamodule, readers, tokens
from kdnas.data.datamodule import Batch, DataSettings, KDDataModule
from kdnas.data.loader import LengthGroupedBatches, outlive_signals
from kdnas.data.masking import Masker
from kdnas.models.encoders import find_teacher
from kdnas.system.errors import UserError
from kdnas.system.files import file_sha256, is_alive
from tests.conftest import make_rows, make_tokenizer, save_teacher

PAD = 3
TOLD = [int(number) for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM)]


def write(path: Path, train: list[str], held_out: list[str]) -> Path:
    """Rows of text with their split."""
    rows = [{"text": row, "split": "train"} for row in train] + [
        {"text": row, "split": "held_out"} for row in held_out
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def open_data(teacher: Path, text: Path, split: str = "full", **settings) -> KDDataModule:
    settings = DataSettings(
        **(
            dict(
                max_length=32,
                batch_tokens=128,
                held_out_fraction=0.2,
                pair_share=0.0,
                masked_share=1.0,
            )
            | settings
        )
    )
    data = KDDataModule(str(teacher), str(text), settings, split)
    data.setup()
    return data


def at(loader: DataLoader, epoch: int) -> list[Batch]:
    """The batches of an epoch, told as Lightning tells it."""
    loader.sampler.set_epoch(epoch)
    return list(loader)


def ids(batches: Iterable[Batch]) -> list[int]:
    return [i for batch in batches for i in batch["sample_ids"].tolist()]


def of_rank(data: KDDataModule, rank: int, num_ranks: int) -> KDDataModule:
    data = copy.copy(data)
    data.trainer = SimpleNamespace(
        global_rank=rank, world_size=num_ranks, num_training_batches=math.inf
    )
    return data


@pytest.fixture(scope="module")
def data(tiny_teacher, text_file) -> KDDataModule:
    return open_data(tiny_teacher, text_file)


def test_the_mini_split_is_a_share_of_the_training_rows_and_held_out_rows_are_in_neither(data):
    full, mini, held_out = data.train_ids(), data.select("mini").train_ids(), data.held_out_ids()
    assert len(set(mini)) == len(mini) == round(0.3 * len(full))
    assert set(mini) < set(full)
    assert not set(held_out) & set(full)
    assert sorted([*full, *held_out]) == list(range(120))
    corpus = data.read_corpus()
    assert not set(corpus.train) & set(corpus.held_out)
    assert [corpus.texts[i] for i in full] == list(corpus.train)
    assert [corpus.texts[i] for i in held_out] == list(corpus.held_out)
    assert data.rows.lengths.tolist() == [len(row.split()) + 2 for row in corpus.texts]


@pytest.mark.parametrize(("fraction", "size"), [(0.3, 29), (0.5, 48), (0.001, 1), (0.999, 96)])
def test_the_mini_fraction_is_kept_and_gives_at_least_one_row(
    tiny_teacher, tmp_path, fraction, size
):
    rows = make_rows(100)
    text = write(tmp_path / "rows.jsonl", rows[:96], rows[96:])
    data = open_data(tiny_teacher, text, "mini", mini_fraction=fraction)
    assert len(data.train_ids()) == size


def test_of_a_fraction_of_the_text_nothing_else_is_kept_or_tokenised(tiny_teacher, tmp_path):
    rows = make_rows(1000)
    text = write(tmp_path / "rows.jsonl", rows[:800], rows[800:])
    data = open_data(tiny_teacher, text, fraction=0.25)
    assert len(data.rows) == len(data.read_corpus().texts) == pytest.approx(250, abs=45)
    train, held_out = list(data.read_corpus().train), list(data.read_corpus().held_out)
    assert set(train) < set(rows[:800]) and set(held_out) < set(rows[800:])
    assert train == [row for row in rows if row in train], "in the order of the source"
    more = open_data(tiny_teacher, text, fraction=0.5)
    assert set(train) < set(more.read_corpus().train), "what is held out stays so"
    few = open_data(tiny_teacher, text, fraction=1e-6)
    assert (len(few.train_ids()), len(few.held_out_ids())) == (2, 2)


def test_the_splits_depend_on_the_seed_alone(data, tiny_teacher, text_file, tmp_path):
    again, other = open_data(tiny_teacher, text_file), open_data(tiny_teacher, text_file, seed=1)
    for split in ("mini", "full"):
        assert (again.select(split).train_ids() == data.select(split).train_ids()).all()
    held_out = [list(some.read_corpus().held_out) for some in (data, again, other)]
    assert held_out[0] == held_out[1]
    assert set(held_out[2]) != set(held_out[0])
    rows = make_rows(100)
    text = write(tmp_path / "rows.jsonl", rows[:90], rows[90:])
    drawn = [
        open_data(tiny_teacher, text, "mini", seed=seed).train_ids().tolist() for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_every_training_row_comes_once_an_epoch_in_a_constant_number_of_batches(
    tiny_teacher, tmp_path
):
    rows = make_rows(400)
    data = open_data(
        tiny_teacher, write(tmp_path / "rows.jsonl", rows[:390], rows[390:]), batch_tokens=40
    )
    for split in ("mini", "full"):
        loader = data.select(split).train_dataloader()
        assert len(loader) > 60
        sizes = set()
        for epoch in range(12):
            loader.sampler.set_epoch(epoch)
            drawn = [batch.tolist() for _, batch in loader.sampler]
            assert sorted(sum(drawn, [])) == data.select(split).train_ids().tolist()
            assert len(drawn) == len(loader)
            sizes.add(tuple(sorted(map(len, drawn))))
        assert len(sizes) == 1  # Lightning counts the batches of the first epoch only


@pytest.mark.parametrize("batch_tokens", [32, 128, 5000])
def test_batches_keep_within_the_budget_and_fill_it(tiny_teacher, text_file, batch_tokens):
    data = open_data(tiny_teacher, text_file, batch_tokens=batch_tokens)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        shapes = [batch["input_ids"].shape for batch in loader]
        assert all(num_rows * length <= batch_tokens for num_rows, length in shapes)
        longest = int(data.rows.padded_lengths.max())
        assert (
            len(shapes)
            <= data.rows.padded_lengths[ids(loader)].sum() / (batch_tokens - longest + 1) + 1
        )


@pytest.mark.parametrize("max_length", [7, 20, 32])
def test_shapes_repeat(tiny_teacher, text_file, max_length):
    data = open_data(tiny_teacher, text_file, max_length=max_length, batch_tokens=96)
    loader = data.train_dataloader()
    shapes = {tuple(batch["input_ids"].shape) for epoch in range(6) for batch in at(loader, epoch)}
    lengths = {length for _, length in shapes}
    assert lengths == {min(length, max_length) for length in (8, 16, 24, 32)}
    assert len(shapes) <= 2 * len(lengths) + 1, (
        "full batches, and one beside them where the length changes"
    )


def test_rows_that_are_all_padded_to_the_longest_length_come_in_any_order(
    tiny_teacher, text_file, data
):
    padded = open_data(
        tiny_teacher, text_file, pad_to_max_length=True, batch_tokens=4 * 24, max_length=24
    )
    again = pickle.loads(pickle.dumps(padded.rows))  # as a loader's process has it
    lengths = []
    for _, batch in padded.train_dataloader().sampler:
        found = again[0, batch]
        assert found["input_ids"].shape == (len(batch), 24) and len(batch) <= 4
        assert (found["input_ids"][found["attention_mask"] == 0] == padded.rows.pad_token_id).all()
        assert found["attention_mask"].sum(1).tolist() == padded.rows.lengths[batch].tolist()
        lengths.append(padded.rows.lengths[batch])
    spread = np.mean([np.ptp(some) for some in lengths])
    assert spread > 0.5 * np.ptp(np.concatenate(lengths)), "rows of all lengths together"
    other = open_data(tiny_teacher, text_file, batch_tokens=4 * 24, max_length=24)
    assert padded.rows.folder == other.rows.folder, "the same tokens, kept once"


def test_a_sampler_that_knows_no_longest_length_keeps_within_the_budget(data):
    for _, batch in LengthGroupedBatches(
        data.rows.padded_lengths, data.train_ids(), 128, shuffle=False
    ):
        assert data.rows[0, batch]["input_ids"].numel() <= 128


def test_batches_hold_rows_of_similar_length(data):
    batches = list(data.train_dataloader())
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    padded = data.rows.padded_lengths[data.train_ids()].sum()
    assert padded / sum(batch["attention_mask"].numel() for batch in batches) > 0.9
    assert real == data.rows.lengths[data.train_ids()].sum()


def test_rows_are_tokenised_as_by_the_tokenizer_and_padded_with_its_padding_id(
    tiny_teacher, text_file
):
    data = open_data(tiny_teacher, text_file, mask_probability=0.0, max_length=12)
    encode, texts = make_tokenizer(), data.read_corpus().texts
    padded = 0
    for batch in [*data.train_dataloader(), *data.val_dataloader()]:
        for row, mask, i in zip(
            batch["input_ids"], batch["attention_mask"], batch["sample_ids"], strict=True
        ):
            expected = encode(texts[i], truncation=True, max_length=12)["input_ids"]
            assert row.tolist() == expected + [PAD] * (len(row) - len(expected))
            assert mask.tolist() == [1] * len(expected) + [0] * (len(row) - len(expected))
            padded += len(row) - len(expected)
        assert batch["input_ids"].shape[1] == (
            8 if batch["attention_mask"].sum(1).max() <= 8 else 12
        )
    assert padded > 0
    assert data.rows.lengths.max() == 12


def test_masks_are_the_masker_s_and_their_variant_cycles_with_the_epoch(tiny_teacher, text_file):
    data = open_data(tiny_teacher, text_file, num_mask_variants=3, mask_probability=0.5, seed=5)
    seed = datamodule.ROWS_SEED
    tokenizer, texts = make_tokenizer(), data.read_corpus().texts
    masker = Masker(tokenizer.mask_token_id, len(tokenizer), tokenizer.all_special_ids, 0.5, seed)
    for loader, variants in (
        (data.train_dataloader(), [0, 1, 2, 0, 1]),
        (data.val_dataloader(), [0, 0, 0]),
    ):
        for epoch, variant in enumerate(variants):
            for batch in at(loader, epoch):
                assert int(batch["variant"]) == variant
                i, row = int(batch["sample_ids"][0]), batch["input_ids"][0]
                expected = masker(np.array(tokenizer(texts[i])["input_ids"]), i, variant)
                assert row[: len(expected)].tolist() == expected.tolist()


def test_a_share_of_the_rows_is_masked_another_one_for_each_variant(tiny_teacher, text_file):
    plain, whole, some, none = (
        open_data(
            tiny_teacher,
            text_file,
            mask_probability=probability,
            masked_share=share,
            num_mask_variants=2,
        ).rows
        for probability, share in ((0, 1), (1, 1), (1, 0.4), (1, 0))
    )
    chosen = []
    for variant in range(2):
        rows, masked, found, unmasked = (
            [source.masked(variant, i) for i in range(len(source))]
            for source in (plain, whole, some, none)
        )
        assert all(map(np.array_equal, unmasked, rows))
        is_masked = [(found[i] == masked[i]).all() for i in range(len(rows))]
        assert all(
            (found[i] == (masked if is_masked[i] else rows)[i]).all() for i in range(len(rows))
        )
        for part in (slice(96), slice(96, None)):  # held-out rows too
            assert np.mean(is_masked[part]) == pytest.approx(0.4, abs=0.25)
        chosen.append(is_masked)
    assert 30 < np.sum(np.array(chosen[0]) != chosen[1]) < 90
    again = open_data(
        tiny_teacher,
        text_file,
        mask_probability=1,
        masked_share=0.4,
        num_mask_variants=2,
        batch_tokens=64,
    ).rows
    assert again.sha256 == some.sha256


def test_the_order_differs_by_epoch_and_seed_and_is_the_same_for_the_same(
    data, tiny_teacher, tmp_path
):
    orders = [ids(at(data.train_dataloader(), epoch)) for epoch in range(3)]
    assert orders == [ids(at(data.train_dataloader(), epoch)) for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    corpus = data.read_corpus()
    text = write(tmp_path / "rows.jsonl", list(corpus.train), list(corpus.held_out))
    by_seed = [
        ids(open_data(tiny_teacher, text, seed=seed).train_dataloader()) for seed in (0, 0, 1)
    ]
    assert by_seed[0] == by_seed[1] != by_seed[2]


def test_rows_meet_others_in_their_batches_in_another_epoch(data):
    loader = data.train_dataloader()
    first, second = (
        {frozenset(batch["sample_ids"].tolist()) for batch in at(loader, epoch)}
        for epoch in range(2)
    )
    assert len(first & second) < len(first) / 2


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("batch_tokens", [40, 128, 150, 2000])
def test_ranks_share_the_rows_of_each_batch_of_one_device(
    tiny_teacher, text_file, num_ranks, batch_tokens
):
    data = open_data(tiny_teacher, text_file, batch_tokens=batch_tokens)
    ranks = [of_rank(data, rank, num_ranks) for rank in range(num_ranks)]
    for loaders, alone, expected in (
        ([rank.train_dataloader() for rank in ranks], data.train_dataloader(), data.train_ids()),
        ([rank.val_dataloader() for rank in ranks], data.val_dataloader(), data.held_out_ids()),
    ):
        for epoch in range(3):
            shares = [at(loader, epoch) for loader in loaders]
            together = [sorted(ids(step)) for step in zip(*shares, strict=True)]
            assert sorted(sum(together, [])) == expected.tolist()
            assert {len(step) >= num_ranks for step in together} == {True}
            if batch_tokens >= 150:  # else a batch of one device has too few rows for all ranks
                whole = [sorted(ids([batch])) for batch in at(alone, epoch)]
                num_others = sum(step not in whole for step in together)
                assert num_others <= (2 if batch_tokens == 150 else 0)  # where the last has too few
            assert {len(loader) for loader in loaders} == {len(together)}
            most = max(batch_tokens, 2 * data.settings.max_length)
            assert all(batch["input_ids"].numel() <= most for share in shares for batch in share)


def test_more_ranks_than_rows_are_refused(tiny_teacher, tmp_path):
    rows = make_rows(12)
    data = of_rank(
        open_data(tiny_teacher, write(tmp_path / "rows.jsonl", rows[:2], rows[2:])), 0, 3
    )
    with pytest.raises(
        UserError, match="2 rows cannot be shared by 3 processes: use fewer processes"
    ):
        list(data.train_dataloader())


def test_of_many_held_out_rows_a_draw_is_scored(data, monkeypatch):
    whole = data.held_out_ids()
    monkeypatch.setattr(datamodule, "HELD_OUT_TOKENS", 60)
    drawn = data.held_out_ids()
    assert 1 <= len(drawn) < len(whole) and set(drawn) < set(whole)
    assert data.rows.lengths[drawn].sum() <= 60
    assert drawn.tolist() == data.select("mini").held_out_ids().tolist() == sorted(drawn)
    assert sorted(ids(data.val_dataloader())) == drawn.tolist()
    monkeypatch.setattr(datamodule, "HELD_OUT_TOKENS", 0)
    assert len(data.held_out_ids()) == 1


def test_the_middle_of_an_epoch_of_other_processes_is_refused(data):
    loader = of_rank(data, 0, 2).train_dataloader()
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    same, other = of_rank(data, 1, 2).train_dataloader(), of_rank(data, 0, 3).train_dataloader()
    same.load_state_dict(state)
    with pytest.raises(
        UserError, match="by 2 processes, but now there are 3: resume with the same"
    ):
        other.load_state_dict(state)
    other.load_state_dict(state | {"num_given": 0})


def test_a_thread_prepares_the_next_batch_while_one_is_used(data):
    begun, may_end = threading.Event(), threading.Event()
    threads, at_work = set(), copy.copy(data)

    def prepare(batch: Batch) -> Batch:
        if threads:  # the first is needed at once
            begun.set()
            assert may_end.wait(10)
        threads.add(threading.current_thread())
        return batch

    at_work.prepare = prepare
    loader = at_work.train_dataloader()
    batches = iter(loader)
    first = next(batches)
    assert begun.wait(10)  # we use the first, and the second is being prepared
    assert loader.state_dict()["num_given"] == 1
    may_end.set()
    assert ids([first, *batches]) == ids(at(data.train_dataloader(), 0))
    assert threading.current_thread() not in threads


def test_what_goes_wrong_in_the_thread_is_raised(data):
    broken = copy.copy(data)

    def prepare(batch: Batch) -> Batch:
        raise OSError(errno.ESTALE, "gone")

    broken.prepare = prepare
    with pytest.raises(OSError, match="gone"):
        list(broken.val_dataloader())


def test_held_out_rows_are_sorted_by_padded_length_and_keep_their_order(data):
    loader = data.val_dataloader()
    order = ids(at(loader, 0))
    lengths = data.rows.padded_lengths[order].tolist()
    assert lengths == sorted(lengths)
    assert order == ids(at(loader, 1))
    assert sorted(order) == data.held_out_ids().tolist()


@pytest.mark.parametrize(("family", "longest"), [("bert", 40), ("albert", 40), ("roberta", 36)])
def test_a_length_beyond_the_teacher_s_positions_is_refused_and_the_longest_runs(
    tmp_path, family, longest
):
    teacher = save_teacher(tmp_path / family, family)
    text = write(tmp_path / "rows.jsonl", [" ".join(make_rows(20))], make_rows(1))
    with pytest.raises(
        UserError, match=rf"max_length is {longest + 1}, but .* takes at most {longest} tokens"
    ):
        open_data(teacher, text, max_length=longest + 1)
    (batch,) = open_data(teacher, text, max_length=longest).train_dataloader()
    assert batch["input_ids"].shape == (1, longest)
    output = find_teacher(str(teacher)).model(
        batch["input_ids"], attention_mask=batch["attention_mask"]
    )
    assert output.last_hidden_state.isfinite().all()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("fraction", [0, 1.5, float("nan")]),
        ("mini_fraction", [0, 1, 1.5, -0.1, float("nan")]),
        ("held_out_fraction", [0, 1, 1.5, float("nan")]),
        ("mask_probability", [-0.1, 1.1, float("nan")]),
        ("pair_share", [-0.1, 1.1, float("nan")]),
        ("masked_share", [-0.1, 1.1, float("nan")]),
        ("max_length", [3]),
        ("num_mask_variants", [0]),
        ("seed", [-1, 2**32]),
        ("num_workers", [-1]),
        ("batch_tokens", [127]),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_value(name, values):
    for value in values:
        with pytest.raises(UserError, match=rf"^{name} is {re.escape(str(value))}: "):
            DataSettings(**{name: value})


def test_the_ends_of_the_ranges_are_accepted():
    DataSettings(
        mask_probability=0,
        pair_share=0,
        masked_share=0,
        max_length=4,
        batch_tokens=4,
        seed=2**32 - 1,
    )
    DataSettings(mask_probability=1, pair_share=1, masked_share=1, batch_tokens=128)


def test_workers_give_the_same_batches(tiny_teacher, text_file):
    loaders = [
        open_data(
            tiny_teacher, text_file, num_mask_variants=2, num_workers=num_workers
        ).train_dataloader()
        for num_workers in (0, 2)
    ]
    for epoch in range(2):
        here, there = (at(loader, epoch) for loader in loaders)
        assert len(here) == len(there) > 2
        for one, other in zip(here, there, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_signal_to_the_process_group_ends_no_worker_and_the_main_process_ends_them(
    tiny_teacher, text_file
):
    before = set(multiprocessing.active_children())
    loader = open_data(tiny_teacher, text_file, num_workers=2).train_dataloader()
    batches = iter(loader)
    next(batches)
    first, second = set(multiprocessing.active_children()) - before
    tell = f"import os; [os.kill(pid, number) for pid in {[first.pid, second.pid]} for number in {TOLD}]"
    subprocess.run([sys.executable, "-c", tell], check=True)
    assert len(list(batches)) > 2 and first.is_alive() and second.is_alive()
    first.terminate()
    first.join(timeout=10)
    assert first.exitcode == 0
    del loader
    second.join(timeout=10)
    assert second.exitcode == 0


def test_a_signal_to_the_process_group_ends_no_worker_that_has_just_begun(
    tiny_teacher, text_file, monkeypatch
):
    def signalled(index):
        for number in TOLD:  # by another process, so that it is not its parent's
            subprocess.run(["kill", f"-{number}", str(os.getpid())], check=True)
        outlive_signals(index)

    monkeypatch.setattr(datamodule, "outlive_signals", signalled)
    assert len(list(open_data(tiny_teacher, text_file, num_workers=2).train_dataloader())) > 2


def test_what_removes_shared_memory_outlives_a_signal_to_the_process_group(
    tiny_teacher, text_file, monkeypatch
):
    monkeypatch.setattr(
        resource_tracker, "_resource_tracker", tracker := resource_tracker.ResourceTracker()
    )
    monkeypatch.setattr(resource_tracker, "ensure_running", tracker.ensure_running)
    next(iter(open_data(tiny_teacher, text_file, num_workers=1).train_dataloader()))
    for number in TOLD:
        os.kill(tracker._pid, number)
    time.sleep(0.5)
    assert os.waitpid(tracker._pid, os.WNOHANG) == (0, 0)
    tracker._stop()  # it ends where nobody can tell it anything


def test_selecting_a_split_shares_rows_and_masks_and_reads_nothing_again(
    tiny_teacher, text_file, monkeypatch
):
    data = open_data(tiny_teacher, text_file)
    for name in ("find_teacher", "load_corpus", "text_sha256"):
        monkeypatch.setattr(datamodule, name, None)
    mini = data.select("mini")
    mini.setup("fit")
    data.setup("fit")
    assert mini.rows is data.rows
    assert (mini.split, data.split) == ("mini", "full")


def test_the_fingerprint_of_the_rows_is_that_of_their_masked_inputs(tiny_teacher, tmp_path):
    rows = make_rows(30)
    text = write(tmp_path / "rows.jsonl", rows[:20], rows[20:])
    turned = write(tmp_path / "turned.jsonl", rows[19::-1], rows[20:])
    sums = [
        open_data(tiny_teacher, source, **settings).rows.sha256
        for source, settings in (
            (text, {}),
            (text, {"num_mask_variants": 2}),
            (turned, {}),
            (text, {"mask_probability": 0.2}),
            (text, {"max_length": 16}),
            (text, {"pair_share": 0.5}),
            (text, {"masked_share": 0.5}),
        )
    ]
    assert len(set(sums)) == len(sums)
    assert open_data(tiny_teacher, text, "mini", batch_tokens=64).rows.sha256 == sums[0]


def test_tokens_are_made_once_for_every_seed_and_split(tiny_teacher, tmp_path, monkeypatch):
    text = tmp_path / "rows.txt"
    text.write_text("\n".join(make_rows(200)))
    first = open_data(tiny_teacher, text, pair_share=0.5)
    monkeypatch.setattr(
        datamodule, "load_corpus", lambda *args, **options: pytest.fail("it was read again")
    )
    for settings in (
        dict(seed=1),
        dict(mini_fraction=0.01),
        dict(held_out_fraction=0.4),
        dict(seed=7, mini_fraction=0.9, held_out_fraction=0.01, batch_tokens=64),
    ):
        other = open_data(tiny_teacher, text, pair_share=0.5, **settings)
        assert other.rows.folder == first.rows.folder
        assert set(other.held_out_ids()) != set(first.held_out_ids()) or "mini_fraction" in settings
        share = settings.get("held_out_fraction", 0.2)
        assert len(other.held_out_ids()) / 200 == pytest.approx(share, abs=0.1)


def test_the_mini_split_has_the_same_share_of_rows_with_a_split_and_of_rows_without(
    tiny_teacher, tmp_path
):
    rows = [
        {"text": row, "split": "train" if i < 100 else None} for i, row in enumerate(make_rows(300))
    ]
    text = tmp_path / "rows.jsonl"
    text.write_text("\n".join(map(json.dumps, rows)))
    mini = open_data(tiny_teacher, text, "mini", mini_fraction=0.25).train_ids()
    assert (mini < 100).sum() == 25
    assert len(mini) == pytest.approx(25 + 40, abs=10)


def test_the_order_of_a_draw_has_every_row_and_begins_with_those_that_a_search_asks_for(
    data, monkeypatch
):
    monkeypatch.setattr(datamodule, "HELD_OUT_TOKENS", 60)
    order, held_out = data.draw_order().tolist(), data.held_out_ids()
    mini = data.select("mini").train_ids()
    assert sorted(order) == list(range(120))
    assert set(order[: len(held_out)]) == set(held_out)
    assert set(order[len(held_out) : len(held_out) + len(mini)]) == set(mini)


def test_kept_teacher_states_stay_valid_for_tokens_are_what_they_were(tiny_teacher, text_file):
    """Other code that makes other rows needs another ``datamodule.FORMAT``, and these values anew."""
    rows = open_data(
        tiny_teacher,
        text_file,
        max_length=24,
        pair_share=0.5,
        masked_share=0.5,
        num_mask_variants=2,
        held_out_fraction=0.05,
    ).rows
    assert rows.sha256 == "741365c5953cbb60e775db9dd79257246ff354a6a6b319e43307dbac1c80bd3c"


@pytest.fixture
def kept(tmp_path) -> Path:
    return tmp_path / "tokens"


def open_kept(teacher: Path, text: Path, kept: Path) -> KDDataModule:
    data = KDDataModule(
        str(teacher),
        str(text),
        DataSettings(max_length=24, batch_tokens=200, num_mask_variants=2),
        folder=str(kept),
    )
    data.setup()
    return data


def tokens_of(data: KDDataModule) -> list[list[int]]:
    return [
        data.rows.masked(variant, i).tolist() for variant in range(2) for i in range(len(data.rows))
    ]


def test_a_text_is_tokenised_once(tiny_teacher, text_file, kept, monkeypatch):
    text = kept.parent / "rows.txt"
    text.write_text(text_file.read_text() + "\n" + text_file.read_text().splitlines()[0])
    first = open_kept(tiny_teacher, text, kept)
    monkeypatch.setattr(
        datamodule, "load_corpus", lambda *args, **options: pytest.fail("it was read again")
    )
    again = open_kept(tiny_teacher, text, kept)
    assert again.rows.sha256 == first.rows.sha256 and tokens_of(again) == tokens_of(first)
    assert again.rows.dropped == first.rows.dropped == {"empty": 1, "duplicate": 1}
    monkeypatch.undo()
    text.write_text("other" + text.read_text()[5:])
    assert open_kept(tiny_teacher, text, kept).rows.sha256 != first.rows.sha256
    assert len([path for path in kept.iterdir() if path.is_dir()]) == 2


def test_what_one_process_has_hashed_no_other_hashes(tiny_teacher, text_file, kept, monkeypatch):
    hashed, real = [], hashlib.file_digest
    monkeypatch.setattr(tokens, "hashlib", hashing := SimpleNamespace(**vars(hashlib)))
    hashing.file_digest = lambda *args: hashed.append(args[0].name) or real(*args)
    monkeypatch.setattr(
        readers, "file_sha256", lambda path: hashed.append(str(path)) or file_sha256(path)
    )
    folder = open_kept(tiny_teacher, text_file, kept).rows.folder
    files = [str(folder / name) for name in sorted(os.listdir(folder)) if name.endswith(".bin")]
    assert hashed[0] == str(text_file) and len(files) == len(hashed) - 1 == 6
    hashed.clear()
    open_kept(tiny_teacher, text_file, kept)
    assert hashed == []
    for path in map(Path, [*files, text_file]):
        os.utime(path)  # as in a copy
    open_kept(tiny_teacher, text_file, kept)
    assert hashed == [str(text_file), *files]
    hashed.clear()
    open_kept(tiny_teacher, text_file, kept)
    assert hashed == []


@pytest.mark.parametrize("num_processes", [1, 2])
def test_rows_do_not_depend_on_the_pieces_in_which_processes_make_them(
    tiny_teacher, text_file, kept, monkeypatch, num_processes
):
    whole = open_kept(tiny_teacher, text_file, kept / "whole")
    monkeypatch.setattr(datamodule, "ROWS_A_PIECE", 13)
    monkeypatch.setattr(datamodule, "num_threads", lambda slots: num_processes)
    makers = kept.parent / "makers"
    makers.mkdir()

    def noted(path: Path, *args) -> None:
        (makers / str(os.getpid())).touch()
        write_piece(path, *args)

    write_piece = datamodule.write_piece
    monkeypatch.setattr(datamodule, "write_piece", noted)
    assert open_kept(tiny_teacher, text_file, kept / "parts").rows.sha256 == whole.rows.sha256
    pids = {int(path.name) for path in makers.iterdir()}
    assert len(pids) == num_processes and (os.getpid() in pids) is (num_processes == 1)


def test_a_full_disk_in_one_of_several_processes_is_an_error_of_the_disk(
    tiny_teacher, text_file, kept, monkeypatch
):
    monkeypatch.setattr(datamodule, "ROWS_A_PIECE", 13)
    monkeypatch.setattr(datamodule, "num_threads", lambda slots: 2)

    def full(path: Path, *args) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(datamodule, "write_piece", full)
    with pytest.raises(OSError, match="No space left") as caught:
        open_kept(tiny_teacher, text_file, kept)
    assert caught.value.errno == errno.ENOSPC and ".pieces/" in caught.value.filename


@pytest.mark.parametrize("damage", [False, True])
def test_a_making_that_is_killed_goes_on_after_its_last_whole_piece(
    tiny_teacher, text_file, kept, monkeypatch, damage
):
    whole = open_kept(tiny_teacher, text_file, kept / "whole").rows
    monkeypatch.setattr(datamodule, "ROWS_A_PIECE", 13)
    write_piece, made = datamodule.write_piece, []

    def killed(path: Path, *args) -> None:
        if len(made) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        write_piece(path, *args)
        made.append(path)

    monkeypatch.setattr(datamodule, "write_piece", killed)
    process = multiprocessing.get_context("fork").Process(
        target=open_kept, args=(tiny_teacher, text_file, kept)
    )
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    pieces = sorted(kept.glob("*.pieces/*"))
    assert len(pieces) == 4 and not list(kept.glob(f"{whole.folder.name}/"))
    if damage:
        pieces[0].write_bytes(pieces[0].read_bytes()[:-1])
    monkeypatch.setattr(
        datamodule, "write_piece", lambda path, *args: made.append(path) or write_piece(path, *args)
    )
    assert open_kept(tiny_teacher, text_file, kept).rows.sha256 == whole.sha256
    assert [path.name for path in made] == [
        f"{start:012d}" for start in range(0, 120, 13) if damage and not start or start >= 4 * 13
    ]
    assert not list(kept.glob("*.pieces"))


@pytest.mark.parametrize("number", [1, 7, 119, 120, 121])
def test_rows_do_not_depend_on_how_many_are_tokenised_at_a_time(
    tiny_teacher, text_file, kept, monkeypatch, number
):
    whole = open_kept(tiny_teacher, text_file, kept / "whole")
    monkeypatch.setattr(datamodule, "ROWS_AT_A_TIME", number)
    assert open_kept(tiny_teacher, text_file, kept / "parts").rows.sha256 == whole.rows.sha256


@pytest.mark.parametrize(
    "name", ["lengths.bin", "second_starts.bin", "variant00.bin", "variant01.bin", "about.*"]
)
@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_damaged_tokens_are_made_anew(tiny_teacher, text_file, kept, name, damage):
    first = open_kept(tiny_teacher, text_file, kept)
    tokens, (path,) = tokens_of(first), first.rows.folder.glob(name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    match damage:
        case "bit":
            path.write_bytes(content)
        case "cut":
            path.write_bytes(content[:-1])
        case "gone":
            path.unlink()
    assert tokens_of(open_kept(tiny_teacher, text_file, kept)) == tokens


def test_of_what_is_told_about_tokens_what_its_own_name_says_is_read(tiny_teacher, text_file, kept):
    first = open_kept(tiny_teacher, text_file, kept)
    (path,) = first.rows.folder.glob("about.*")
    other = path.read_text().replace(first.rows.sha256, 64 * "0")
    for name in (
        "about.0.json",
        "about.z.json",
    ):  # one of them is found before the right one, mostly
        path.with_name(name).write_text(other)
    again = open_kept(tiny_teacher, text_file, kept)
    assert again.rows.sha256 == first.rows.sha256 and len(list(path.parent.glob("about.*"))) == 3


def test_tokens_of_another_key_are_not_used(tiny_teacher, text_file, kept, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[::-1])
    first, second = (open_kept(tiny_teacher, path, kept) for path in (text_file, other))
    tokens = tokens_of(second)
    assert tokens_of(first) != tokens
    shutil.rmtree(second.rows.folder)
    shutil.copytree(first.rows.folder, second.rows.folder)
    assert tokens_of(open_kept(tiny_teacher, other, kept)) == tokens


def open_in_a_process(teacher: Path, text: Path, kept: Path, barrier, answers) -> None:
    """In one of several processes; counts how often it read and hashed the text."""
    read, num_reads, num_hashes = datamodule.load_corpus, [], []
    datamodule.load_corpus = lambda *args, **options: num_reads.append(1) or read(*args, **options)
    readers.file_sha256 = lambda path: num_hashes.append(1) or time.sleep(1) or file_sha256(path)
    barrier.wait()
    sha256 = open_kept(teacher, text, kept).rows.sha256
    answers.put((sha256, len(num_hashes), len(num_reads)))


def test_processes_at_once_tokenise_a_text_once_and_remove_what_a_killed_one_left(
    tiny_teacher, text_file, kept
):
    key = open_kept(tiny_teacher, text_file, kept).rows.folder.name
    shutil.rmtree(kept / key)
    (kept / "texts.json").unlink()
    (kept / f".{key}.abc").mkdir()
    (kept / f".{key}.abc" / "lengths.bin").touch()
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(3), context.Queue()
    processes = [
        context.Process(
            target=open_in_a_process, args=(tiny_teacher, text_file, kept, barrier, answers)
        )
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    assert sorted(num_reads for *_, num_reads in found) == [0, 0, 1]
    assert sorted(num_hashes for _, num_hashes, _ in found) == [0, 0, 1]
    assert len({sha256 for sha256, *_ in found}) == 1
    expected = {key, f"{key}.lock", "texts.json", "texts.lock"}
    assert {path.name for path in kept.iterdir()} == expected


def test_rows_go_to_other_processes_without_their_open_files_and_outlive_their_names(
    tiny_teacher, text_file, kept
):
    rows = open_kept(tiny_teacher, text_file, kept).rows
    sent = copy.deepcopy(rows)
    shutil.rmtree(kept)
    for variant in range(2):
        batch = rows[variant, np.arange(20)]
        assert all(
            torch.equal(value, sent[variant, np.arange(20)][name]) for name, value in batch.items()
        )


def test_the_sampler_is_of_the_kind_that_lightning_leaves_alone(data):
    assert isinstance(data.train_dataloader().sampler, DistributedSampler)


PARENT = """
import multiprocessing, os, time
from kdnas.data.loader import outlive_signals

def work():
    outlive_signals(0)
    print(os.getpid(), flush=True)
    time.sleep(600)

multiprocessing.get_context("fork").Process(target=work).start()
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_loader_s_worker_ends_with_a_parent_that_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert is_alive(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate(timeout=30)  # to the end of what both write to


@pytest.mark.parametrize(
    ("method", "is_alive", "ends"),
    [
        ("fork", True, True),
        ("spawn", False, True),
        ("forkserver", True, False),
        ("forkserver", False, True),
    ],
)
def test_a_loader_s_worker_ends_whose_parent_was_killed_while_it_began(
    monkeypatch, method, is_alive, ends
):
    def leave(code: int) -> None:
        raise SystemExit(code)

    parent = SimpleNamespace(
        pid=os.getppid() + 1, is_alive=lambda: is_alive
    )  # a sibling makes a dead one look alive
    monkeypatch.setattr("multiprocessing.parent_process", lambda: parent)
    monkeypatch.setattr("multiprocessing.get_start_method", lambda allow_none: method)
    monkeypatch.setattr(signal, "pthread_sigmask", lambda *args: None)
    monkeypatch.setattr("kdnas.data.loader.die_with_parent", lambda: None)
    monkeypatch.setattr(threading.Thread, "start", lambda thread: None)
    monkeypatch.setattr(os, "_exit", leave)
    told: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: told.append(kind))
    with pytest.raises(SystemExit) if ends else nullcontext():
        outlive_signals(0)
        for kind in (ConnectionResetError, EOFError, ValueError):
            sys.excepthook(kind, kind(), None)
    assert told == [] if ends else told == [ValueError]
