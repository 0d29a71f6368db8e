import copy
import errno
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from kdnas.data import datamodule
from kdnas.data.datamodule import DataSettings, KDDataModule
from kdnas.distillation import state_cache as cache
from kdnas.distillation import teacher_states as teacher_module
from kdnas.distillation.losses import contextual_share
from kdnas.distillation.state_cache import StateCache
from kdnas.distillation.teacher_states import (
    LiveTeacher,
    StatesSettings,
    TeacherStates,
    measure,
    open_states,
    state_cache,
)
from kdnas.models.encoders import Teacher, encode, find_teacher
from kdnas.system.errors import UserError
from kdnas.training.precision import autocast, autocast_dtype

LAYERS = [0, 2, 3]


def open_data(teacher: Path, text: Path, **settings) -> KDDataModule:
    settings = dict(max_length=32, batch_tokens=512, held_out_fraction=0.3) | settings
    data = KDDataModule(
        str(teacher),
        str(text),
        DataSettings(**({"pair_share": 0.0, "masked_share": 1.0} | settings)),
    )
    data.setup()
    return data


@pytest.fixture(scope="module")
def teacher(any_teacher) -> Teacher:
    return find_teacher(str(any_teacher))


@pytest.fixture(scope="module")
def data(teacher, text_file) -> KDDataModule:
    return open_data(teacher.source, text_file, num_mask_variants=3, mask_probability=0.4)


@pytest.fixture(scope="module")
def states(teacher, data, tmp_path_factory) -> TeacherStates:
    return open_states(
        teacher, data, LAYERS, StatesSettings(str(tmp_path_factory.mktemp("states")))
    )


def test_a_batch_is_prepared_with_its_places_and_stored_states_pinned_for_a_gpu(
    states, data, monkeypatch
):
    batch, pinned = data.rows[1, data.train_ids()[:5]], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    ready = states.prepare(batch, [3, 0], pin=False)
    assert (
        ready["real_tokens"].tolist() == batch["attention_mask"].flatten().nonzero()[:, 0].tolist()
    )
    assert ready["pairs"].tolist() == [i for i in range(5) if batch["token_type_ids"][i].any()]
    assert ready["states"].keys() == {3, 0} and not pinned
    for layer, found in states(ready).items():
        assert found.equal(states(batch)[layer])
    states.prepare(batch, [3, 0], pin=True)
    assert len(pinned) == len(batch) + 4
    live = TeacherStates(LiveTeacher(None), [3], 64, states.stats, states.ends)
    assert "states" not in live.prepare(batch, [3], pin=False)


def test_by_32_true_the_teacher_is_in_float32_on_a_gpu_too(teacher, data, monkeypatch):
    settings = StatesSettings()
    folders = [
        state_cache(teacher, data, [3], settings, device, precision).folder
        for device in ("cuda", "cpu")
        for precision in ("auto", "32-true")
    ]
    assert folders[0] != folders[1] and folders[2] == folders[3]
    used = []

    def watched(*asked) -> torch.autocast:
        used.append(autocast_dtype(*asked))
        return autocast("cpu")

    monkeypatch.setattr(teacher_module, "autocast", watched)
    monkeypatch.setattr(teacher_module, "encode", lambda *_: SimpleNamespace(hidden_states=[]))
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    batch = {"input_ids": on_gpu, "real_tokens": torch.zeros(0, dtype=torch.int64)}
    for precision in ("auto", "32-true"):
        LiveTeacher(SimpleNamespace(to=lambda device: None), precision)(batch, [])
    assert used == [torch.bfloat16, torch.float32]


def oracle(
    teacher: Teacher, data: KDDataModule, sample_ids: np.ndarray, variant: int = 0
) -> list[np.ndarray]:
    """Hidden states from the embedding output on, row by row without padding: real tokens one after the other."""
    rows = []
    for row in sample_ids:
        input_ids = data.rows[variant, np.array([row])]["input_ids"][:, : data.rows.lengths[row]]
        with torch.no_grad(), autocast("cpu"):
            rows.append(teacher.model(input_ids, output_hidden_states=True).hidden_states)
    return [np.concatenate([states[layer][0].float() for states in rows]) for layer in range(5)]


def close(found: torch.Tensor, expected: np.ndarray) -> bool:
    """Equal but for sums in another order, in bfloat16 where that is faster."""
    return (
        found.shape == expected.shape
        and np.abs(found.float().numpy() - expected).mean() < 1e-2 * expected.std()
    )


def test_cached_and_live_states_are_the_teacher_s_for_every_mask(teacher, data, states):
    live = open_states(
        teacher, data, LAYERS, StatesSettings(str(Path(states.source.folder).parent), max_gb=0)
    )
    assert isinstance(states.source, StateCache) and isinstance(live.source, LiveTeacher)
    sample_ids = np.random.default_rng(0).permutation(len(data.rows))[:30]
    last = []
    for variant in range(3):
        batch = data.rows[variant, sample_ids]
        expected = oracle(teacher, data, sample_ids, variant)
        for source in (states, live):
            found = source(batch)
            assert list(found) == LAYERS
            assert all(close(found[layer], expected[layer + 1]) for layer in LAYERS)
            (only,) = source(batch, [2]).items()
            assert only[0] == 2 and torch.equal(only[1], found[2])
        last.append(expected[-1])
    assert all(np.abs(last[i] - last[i - 1]).mean() > 0.1 for i in range(3))


def test_stored_states_are_live_ones_in_float16(teacher, data, tmp_path):
    live, given = LiveTeacher(teacher.model), []

    def remember(batch):
        given.append((batch, live(batch, LAYERS)))
        return given[-1][1]

    stored = StateCache(tmp_path, data.rows, LAYERS, 64)
    stored.build(remember, batch_tokens=512)
    assert {int(batch["variant"]) for batch, _ in given} == {0, 1, 2}
    for batch, states in given:
        for one, other in zip(stored(batch, LAYERS), states, strict=True):
            assert torch.equal(one, other.half())


def test_states_require_no_gradient_and_can_enter_autograd(teacher, data, states):
    batch = data.rows[0, np.arange(4)]
    for source in (states.source, LiveTeacher(teacher.model)):
        weight = torch.ones(64, requires_grad=True)
        found = source(batch, [2])[0].float()
        assert not found.requires_grad
        torch.nn.functional.mse_loss(found * weight, found).backward()


def test_a_cache_above_the_budget_is_not_made_and_the_log_says_so(teacher, data, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="kdnas")
    needed = data.rows.lengths.sum() * 3 * 3 * 64 * 2 / 1e9
    assert isinstance(
        open_states(teacher, data, LAYERS, StatesSettings(str(tmp_path), needed)).source, StateCache
    )
    assert "runs live" not in caplog.text and re.search(
        rf"Teacher states: 0.00 GB in {tmp_path}\S+, 0.00 GB of them are computed now", caplog.text
    )
    caplog.clear()
    open_states(teacher, data, LAYERS, StatesSettings(str(tmp_path), needed))
    assert caplog.messages == [
        f"Teacher states: 0.00 GB in {next(tmp_path.glob('*'))}, all of them are there"
    ]
    shutil.rmtree(tmp_path)
    for budget in (0, needed * 0.999):
        caplog.clear()
        states = open_states(teacher, data, LAYERS, StatesSettings(str(tmp_path), budget))
        assert isinstance(states.source, LiveTeacher)
        assert (
            "The teacher runs live: its states would take 0.0 GB, the budget is 0.0 GB."
            in caplog.text
        )
        assert not list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: re.sub(r"(\.\d)", ".7", text, count=1),
        lambda text: text[:30],
        lambda text: '{"3": {"variance": 1}}',
    ],
)
def test_damaged_statistics_are_measured_anew(teacher, data, states, damage, tmp_path, caplog):
    folder = tmp_path / "states"
    shutil.copytree(Path(states.source.folder).parent, folder)
    (path,) = folder.rglob("measured_*.json")
    before = path.read_text()
    path.write_text(damage(before))
    assert path.read_text() != before
    assert open_states(teacher, data, LAYERS, StatesSettings(str(folder))).stats == states.stats
    assert caplog.text.count("is damaged; it is measured again") == 1 and path.read_text() == before


def test_statistics_of_another_key_are_not_used(teacher, data, states, tmp_path):
    settings = StatesSettings(str(tmp_path), precision="int8")
    first = open_states(teacher, data, LAYERS, settings)
    assert first.stats != states.stats
    (ours,), (theirs,) = (Path(one.source.folder).glob("measured_*") for one in (first, states))
    known = ours.read_text()
    ours.write_text(theirs.read_text())
    assert open_states(teacher, data, LAYERS, settings).stats == first.stats
    assert ours.read_text() == known


def test_what_is_there_is_opened_without_a_lock(teacher, data, states, monkeypatch):
    def refuse(path):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(teacher_module, "FileLock", refuse)
    monkeypatch.setattr(cache, "FileLock", refuse)
    folder = Path(states.source.folder).parent
    assert open_states(teacher, data, LAYERS, StatesSettings(str(folder))).stats == states.stats


def test_a_cache_that_is_there_is_read_again_and_statistics_are_measured_once(
    teacher, data, states, monkeypatch, tmp_path
):
    folder = str(Path(states.source.folder).parent)
    for name in ("measure", "LiveTeacher.__call__"):
        monkeypatch.setattr(f"kdnas.distillation.teacher_states.{name}", None)
    again = open_states(teacher, data, reversed(LAYERS + LAYERS), StatesSettings(folder))
    assert again.stats == states.stats
    assert list(again.stats) == again.layers == LAYERS
    batch = data.rows[2, np.arange(5)]
    for one, other in zip(again(batch).values(), states(batch).values(), strict=True):
        assert torch.equal(one, other)


def test_states_are_those_of_the_machine_s_precision_and_no_other_s_are_taken(
    teacher, data, tmp_path, monkeypatch
):
    with torch.no_grad():
        batch = data.rows[0, np.arange(9)]
        whole = encode(teacher.model, batch).hidden_states[4][batch["attention_mask"].bool()]
    folders, errors = [], []
    for is_faster in (True, False, True):  # the third machine is as the first
        monkeypatch.setattr(
            "kdnas.training.precision.bf16_is_faster", lambda kind, is_faster=is_faster: is_faster
        )
        states = open_states(teacher, data, [3], StatesSettings(str(tmp_path)))
        folders.append(states.source.folder)
        errors.append(float((states(batch)[3].float() - whole).abs().max()))
    assert folders[0] == folders[2] != folders[1]
    assert errors[1] < 0.005 < errors[0] == errors[2]  # float16 keeps three digits, bfloat16 two


@pytest.mark.parametrize("changed", ["teacher", "text", "tokenizer"])
def test_states_of_another_teacher_text_or_tokenizer_are_not_used_and_that_is_said(
    changed, teacher, data, text_file, tmp_path, caplog
):
    caplog.set_level(logging.INFO, logger="kdnas")
    settings, said = (
        StatesSettings(str(tmp_path / "states")),
        "are for another teacher, text or setting, and are not used",
    )
    before = open_states(teacher, data, LAYERS, settings).source.folder
    assert said not in caplog.text
    folder = shutil.copytree(teacher.source, tmp_path / "teacher")
    if changed == "teacher":
        trained = find_teacher(str(folder)).load()
        trained.embeddings.LayerNorm.bias.data += 0.1
        trained.save_pretrained(folder)
    elif changed == "text":
        text_file = shutil.copy(text_file, tmp_path / "text.txt")
        text_file.write_text("river and a mountain\n" + text_file.read_text())
    else:
        path = folder / "tokenizer.json"
        path.write_text(path.read_text().replace('"river": ', '"rivers": '))
    other, rows = (
        find_teacher(str(folder)),
        open_data(folder, text_file, num_mask_variants=3, mask_probability=0.4),
    )
    states = open_states(other, rows, LAYERS, settings)
    assert states.source.folder != before and caplog.text.count(said) == 1
    sample_ids = np.arange(9)
    expected = oracle(other, rows, sample_ids)
    for layer, found in states(rows.rows[0, sample_ids]).items():
        assert close(found, expected[layer + 1])


def test_a_search_stores_its_own_rows_and_full_distillation_adds_the_others(
    teacher, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(cache, "SHARD_BYTES", 1 << 12)
    settings = StatesSettings(str(tmp_path))
    mini = open_states(teacher, data.select("mini"), LAYERS, settings)
    first = {path.name: path.stat().st_mtime_ns for path in mini.source.folder.glob("*.bin")}
    num_bytes = sum(path.stat().st_size for path in mini.source.folder.glob("*.bin"))
    row_ids = np.concatenate([data.select("mini").train_ids(), data.held_out_ids()])
    assert num_bytes == mini.source.num_bytes(row_ids) < 0.7 * mini.source.num_bytes()
    full = open_states(teacher, data, LAYERS, settings)
    both = {path.name: path.stat().st_mtime_ns for path in full.source.folder.glob("*.bin")}
    assert first.items() < both.items() and full.stats == mini.stats
    batch = data.rows[0, row_ids[::7]]
    for one, other in zip(mini(batch).values(), full(batch).values(), strict=True):
        assert torch.equal(one, other)


def test_of_held_out_rows_that_are_not_scored_no_states_are_stored(
    teacher, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(cache, "SHARD_BYTES", 1 << 12)
    whole = open_states(teacher, data.select("mini"), LAYERS, StatesSettings(str(tmp_path / "all")))
    monkeypatch.setattr(datamodule, "HELD_OUT_TOKENS", 60)
    few = open_states(teacher, data.select("mini"), LAYERS, StatesSettings(str(tmp_path / "few")))
    sizes = [
        sum(path.stat().st_size for path in states.source.folder.glob("*.bin"))
        for states in (few, whole)
    ]
    assert 0 < sizes[0] < 0.7 * sizes[1]
    batch = data.rows[0, data.held_out_ids()]
    for one, other in zip(few(batch).values(), whole(batch).values(), strict=True):
        assert close(one, other.float().numpy())


def test_statistics_are_those_of_numpy_and_scikit_learn(teacher, data, states):
    mini = data.select("mini").train_ids()
    train, held_out = (oracle(teacher, data, ids) for ids in (mini, data.held_out_ids()))
    for layer in LAYERS:
        stats = states.stats[layer]
        assert stats.variance == pytest.approx(np.var(train[layer + 1], axis=0).mean(), rel=5e-3)
        assert stats.held_out_variance == pytest.approx(
            np.var(held_out[layer + 1], axis=0).mean(), rel=5e-3
        )
        alpha = 1e-4 * len(train[0]) * train[0].var(0).mean()
        predicted = Ridge(alpha=alpha).fit(train[0], train[layer + 1]).predict(held_out[0])
        mse = float(((predicted - held_out[layer + 1]) ** 2).mean())
        assert stats.held_out_mse_context_free == pytest.approx(mse, rel=0.02)
        assert contextual_share(mse, stats.held_out_mse_context_free) == pytest.approx(0, abs=0.02)


def test_a_layer_further_up_is_less_of_a_table_of_words(states):
    unknown = [
        states.stats[layer].held_out_mse_context_free / states.stats[layer].variance
        for layer in LAYERS
    ]
    assert unknown == sorted(unknown)


def test_statistics_are_the_same_for_every_split_and_rank(teacher, data, states):
    one_of_many = copy.copy(data.select("mini"))
    one_of_many.trainer = SimpleNamespace(global_rank=7, world_size=8)
    assert measure(teacher.model, states.source, LAYERS, one_of_many, "cpu") == (
        states.stats,
        states.ends,
    )


def test_statistics_are_measured_on_so_many_tokens(teacher, data, monkeypatch):
    seen = []

    class Counted(LiveTeacher):
        def __call__(self, batch, layers):
            seen.extend(batch["sample_ids"].tolist())
            return super().__call__(batch, layers)

    monkeypatch.setattr(teacher_module, "STATS_TOKENS", 200)
    monkeypatch.setattr(teacher_module, "_ends", lambda *args: None)  # of all held-out rows
    measure(teacher.model, Counted(teacher.model), LAYERS, data, "cpu")
    for ids in (data.train_ids(), data.held_out_ids()):
        chosen = [row for row in seen if row in ids]
        assert 200 <= data.rows.lengths[chosen].sum() < 200 + 26
        assert len(set(chosen)) == len(chosen)
        assert set(chosen) != set(ids[: len(chosen)])  # a sample, not the beginning


@pytest.mark.parametrize(
    ("factor", "message"),
    [(1e6, r"reach \d,\d{3},\d{3}. They .* float16"), (float("nan"), "contain NaN")],
)
def test_a_live_teacher_s_states_that_float16_does_not_hold_are_refused(
    teacher, data, factor, message
):
    def source(batch, layers):
        return [factor * states for states in LiveTeacher(teacher.model)(batch, layers)]

    with pytest.raises(UserError, match=f"The teacher's hidden states {message}"):
        measure(teacher.model, source, LAYERS, data, "cpu")


@pytest.mark.parametrize("max_gb", [-0.1, float("nan")])
def test_a_negative_budget_is_refused(max_gb):
    with pytest.raises(UserError, match=f"max_gb is {max_gb}: "):
        StatesSettings(max_gb=max_gb)
