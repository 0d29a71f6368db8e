"""One candidate from gate to reward, on a tiny teacher and real rows."""

import dataclasses
import math
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from filelock import ReadWriteLock
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import kdnas.nas.search
from kdnas.data.datamodule import Batch, DataSettings, KDDataModule
from kdnas.deploy.latency import ArchLatency, Latency, LatencyMeter, LatencySettings
from kdnas.distillation.module import HiddenStateDistillModule, Recipe
from kdnas.distillation.narrowing import TeacherStream
from kdnas.distillation.start import RandomStart, Start, Started
from kdnas.distillation.teacher_states import StatesSettings, open_states
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import build_classifier, find_teacher, num_parameters, student_config
from kdnas.nas.bench import Bench
from kdnas.nas.budget import Budget
from kdnas.nas.callbacks import HoldStill
from kdnas.nas.reward import reward
from kdnas.nas.search import evaluate
from kdnas.nas.space import SearchSpace
from kdnas.nas.trials import Outcome
from kdnas.system.engine import Engine
from kdnas.system.errors import CandidateFailed
from kdnas.system.files import file_sha256, read_json
from kdnas.system.jobs import Job, Stopped, progress_of
from kdnas.training.trainer import TrainerSettings
from tests.nas.fakes import Fake

ARCH = StudentArch(num_hidden_layers=1, num_attention_heads=2, hidden_size=32, intermediate_size=32)
OTHER = StudentArch(
    num_hidden_layers=2, num_attention_heads=2, hidden_size=64, intermediate_size=64
)
MEASURED = {
    "arch": ARCH.to_dict(),
    "num_parameters": 1234,
    "latency_ms": 2.0,
    "latency_iqr_ms": 0.25,
    "teacher_latency_ms": 10.0,
    "teacher_latency_iqr_ms": 0.5,
    "speedup": 5.0,
}


def latency(student_ms: float) -> ArchLatency:
    return ArchLatency(Latency(student_ms, 0.25, 9), Latency(10.0, 0.5, 9), 1234)


class OneWeightIsNaN(Start):
    """A start that ruins the student."""

    @torch.no_grad()
    def __call__(self, student: nn.Module, teacher: nn.Module, rows: Sequence[Batch]) -> Started:
        list(student.parameters())[-1][0] = math.nan
        return Started()


@pytest.fixture(scope="module")
def parts(
    tiny_teacher: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, object]:
    """What all candidates share: teacher, its states and the rows."""
    teacher = find_teacher(str(tiny_teacher))
    settings = DataSettings(
        max_length=16, batch_tokens=256, held_out_fraction=0.1, pair_share=0.0, masked_share=1.0
    )
    data = KDDataModule(str(tiny_teacher), str(text_file), settings)
    data.setup()
    states_folder = str(tmp_path_factory.mktemp("states"))
    states = open_states(teacher, data, range(-1, 4), StatesSettings(states_folder))
    return {"teacher": teacher, "data": data, "states": states}


@pytest.fixture
def make(parts: dict[str, object], tmp_path: Path, monkeypatch) -> Callable[..., Bench]:
    """A Bench whose meter remembers both archs and must not measure others."""
    monkeypatch.setattr("kdnas.deploy.latency.measure_latency", None)

    def build(**changes: object) -> Bench:
        meter = LatencyMeter(parts["teacher"].config, LatencySettings(length=8))
        meter.remember(ARCH, latency(2.0))
        meter.remember(OTHER, latency(4.0))
        values = dict(
            **parts,
            recipe=Recipe(),
            meter=meter,
            measures_first=True,
            budget=Budget(),
            trainer=TrainerSettings(accelerator="cpu", precision="32-true"),
            num_epochs=1,
            loss="held_out",
            alpha=-0.06,
            beta=0.6,
            seed=0,
            is_pruned=False,
            stillness=ReadWriteLock(tmp_path / "stillness.lock"),
        )
        return Bench(**(values | changes))

    return build


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a trial."""
    path = tmp_path / "study" / "trial_0000"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def value(tmp_path: Path) -> Callable[..., float]:
    """The reward of a candidate, in a folder of its own."""
    folders = (tmp_path / f"trial_{number:04d}" for number in range(100))

    def of(bench: Bench, arch: StudentArch = ARCH) -> float:
        (folder := next(folders)).mkdir()
        return evaluate(bench, arch, folder).value

    return of


def test_a_candidate_is_trained_and_everything_about_it_is_told(make, folder):
    recipe = Recipe(learning_rate=1e-2, matrix_learning_rate=1e-2)
    found = evaluate(make(num_epochs=2, recipe=recipe), ARCH, folder)
    assert (found.params, found.state) == (ARCH.to_dict(), "COMPLETE")
    assert found.constraints == {"budget": 0.0} and found.reports == {}
    assert 1e9 < found.started < found.ended

    attrs = dict(found.attrs)
    history = attrs.pop("history")
    names = {"loss", "contextual_share", "sentence_r2"}
    assert [entry.keys() for entry in history] == [names | {"epoch"}] * 2
    assert [entry["epoch"] for entry in history] == [0, 1]
    assert history[1]["loss"] < history[0]["loss"]
    assert attrs.pop("seconds") > 0
    hashes = {name: attrs.pop(f"{name}_sha256") for name in ("weights", "optimizer")}
    assert 0 < attrs.pop("train_loss") < 2
    last = {name: history[-1][name] for name in names}
    assert attrs == MEASURED | last | {"reward": found.value}
    assert found.value == reward(last["loss"], 2.0, 10.0)

    for name, known in hashes.items():
        assert file_sha256(folder / f"{name}.safetensors") == known
        assert load_file(folder / f"{name}.safetensors")
    progress = progress_of(folder)
    assert progress["attrs"] == MEASURED
    (events,) = folder.glob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    assert {"train/loss", "val/loss", "hp/reward"} <= set(accumulator.Tags()["scalars"])
    assert accumulator.Scalars("hp/reward")[-1].value == pytest.approx(found.value)


def test_what_is_told_is_plain_json(make, folder):
    bench = make()
    job = Job(folder, "a candidate", lambda: evaluate(bench, ARCH, folder).to_dict())
    with Engine() as engine:
        engine.run([job])
    assert Outcome(**read_json(job.result_file)).params == ARCH.to_dict()


def test_the_gate_measures_and_the_fit_uses_the_same_number(make, parts, folder, monkeypatch):
    calls = []

    def measure(models, settings):
        calls.append(settings.min_seconds)
        return [Latency(3.0, 0.0, 1), Latency(12.0, 0.0, 1)]

    bench = make(meter=LatencyMeter(parts["teacher"].config, LatencySettings(length=8)))
    monkeypatch.setattr("kdnas.deploy.latency.measure_latency", measure)
    found = evaluate(bench, ARCH, folder)
    assert calls == [0.1, LatencySettings().min_seconds], "a glance, and once for both"
    deployed = build_classifier(student_config(bench.teacher.config, ARCH))
    assert found.attrs["num_parameters"] == num_parameters(deployed)
    assert found.value == reward(found.attrs["loss"], 3.0, 12.0)


def test_without_a_gate_latency_is_measured_after_the_fit(make, folder, monkeypatch):
    """Then a candidate that the pruner ends is not measured."""
    told = []
    monkeypatch.setattr(kdnas.nas.search, "fit", lambda *args: told.append(progress_of(folder)))
    bench = make(measures_first=False, loss="train")
    with pytest.raises(IndexError):  # nothing was trained
        evaluate(bench, ARCH, folder)
    assert told == [{"attrs": {"arch": ARCH.to_dict()}}]
    monkeypatch.undo()
    found = evaluate(bench, ARCH, folder)
    assert found.attrs.items() >= MEASURED.items() and found.constraints == {"budget": 0.0}
    assert found.value == reward(found.attrs["train_loss"], 2.0, 10.0)


def test_a_candidate_over_budget_is_refused_before_anything_is_built(make, folder, monkeypatch):
    monkeypatch.setattr(kdnas.nas.search, "HiddenStateDistillModule", None)
    monkeypatch.setattr(kdnas.nas.search, "make_trainer", None)
    found = evaluate(make(budget=Budget(speedup=10)), ARCH, folder)
    assert (found.state, found.value) == ("PRUNED", None)
    assert found.attrs.pop("seconds") >= 0
    assert found.attrs == MEASURED | {"refused": "5.00x as fast as the teacher, 10x is asked for"}
    assert found.constraints == {"budget": 1.0}


def test_a_candidate_within_the_budget_is_trained(make, value):
    assert math.isfinite(value(make(budget=Budget(speedup=5, latency_ms=2))))


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (Recipe(start=OneWeightIsNaN()), "the training loss is nan at step 1"),
        (
            Recipe(learning_rate=1e38, constant_rate=True),
            r"loss is (nan|inf)|error is (nan|inf)",
        ),
    ],
)
def test_a_candidate_whose_loss_is_no_number_fails_with_its_step(make, value, recipe, reason):
    with pytest.raises(CandidateFailed, match=reason):
        value(make(recipe=recipe))


def test_what_a_failed_candidate_held_is_given_back_before_the_next(make, tmp_path, monkeypatch):
    modules = []

    class Watched(HiddenStateDistillModule):
        def __init__(self, *args):
            super().__init__(*args)
            modules.append(weakref.ref(self))

        def on_train_start(self):
            alive.append(modules[0]() is not None)
            super().on_train_start()

    alive: list[bool] = []
    monkeypatch.setattr(kdnas.nas.search, "HiddenStateDistillModule", Watched)
    bench = make()
    ruined = dataclasses.replace(bench, recipe=Recipe(start=OneWeightIsNaN()))

    def end(arch, folder):
        return evaluate(ruined if arch == ARCH else bench, arch, folder)

    sizes = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size")
    choices = {name: sorted({getattr(ARCH, name), getattr(OTHER, name)}) for name in sizes}
    fake = Fake(tmp_path, end, space=SearchSpace(choices | {"hidden_act": ["gelu"]}))
    fake.queue(ARCH, OTHER)
    fake.search(1)
    assert alive == [True, False]


def test_the_pruner_answers_after_each_epoch_but_the_last(make, folder):
    (folder / "go_on_0").touch()
    (folder / "prune_1").touch()
    found = evaluate(make(num_epochs=3, is_pruned=True), ARCH, folder)
    assert (found.state, found.value) == ("PRUNED", None)
    assert list(found.reports) == ["0", "1"] and found.constraints == {"budget": 0.0}
    loss = 1 - found.reports["1"]
    assert found.attrs["stopped_early"] == f"held-out loss {loss:.4f} after epoch 2 of 3"
    (folder / "prune_1").rename(folder / "go_on_1")
    found = evaluate(make(num_epochs=3, is_pruned=True), ARCH, folder)
    assert found.state == "COMPLETE"
    losses = [entry["loss"] for entry in found.attrs["history"]]
    assert [1 - found.reports[f"{epoch}"] for epoch in range(3)] == pytest.approx(losses, rel=1e-6)


def test_the_same_arch_and_seed_score_the_same_whatever_was_trained_before(make, value):
    bench = make()
    torch.manual_seed(1)
    first = value(bench)
    other = value(bench, OTHER)
    torch.rand(7)
    assert value(bench) == first != other
    random = {"recipe": Recipe(start=RandomStart())}
    assert value(make(**random)) != value(make(seed=1, **random))


def test_a_candidate_does_not_change_what_is_drawn_next(make, value):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    value(make())
    assert torch.rand(3).equal(expected)


def test_the_teacher_reads_the_rows_that_students_start_on_once_for_all_candidates(
    make, value, monkeypatch
):
    passes, of = [], TeacherStream.of
    monkeypatch.setattr(TeacherStream, "of", lambda *args: passes.append(args) or of(*args))
    bench = make()
    for arch in (ARCH, OTHER):
        value(bench, arch)
    assert len(passes) == 1


def test_a_candidate_sees_the_mini_rows_and_is_scored_on_the_held_out_ones(
    make, value, parts, monkeypatch
):
    seen: dict[str, set[int]] = {"training_step": set(), "validation_step": set()}

    class Watched(HiddenStateDistillModule):
        def training_step(self, batch, batch_idx):
            seen["training_step"] |= set(batch["sample_ids"].tolist())
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            seen["validation_step"] |= set(batch["sample_ids"].tolist())
            return super().validation_step(batch, batch_idx)

    monkeypatch.setattr(kdnas.nas.search, "HiddenStateDistillModule", Watched)
    value(make())
    data = parts["data"]
    assert seen["training_step"] == set(data.select("mini").train_ids().tolist())
    assert seen["validation_step"] == set(data.held_out_ids().tolist())
    assert data.split == "full"


def test_a_candidate_that_is_asked_to_stop_ends_at_its_next_step(make, folder):
    bench = make(num_epochs=1000)
    (folder / "stop").touch()
    with pytest.raises(Stopped):
        evaluate(bench, ARCH, folder)
    with bench.stillness.write_lock(timeout=1):
        assert "val_loss" not in progress_of(folder)


def test_an_error_between_two_steps_leaves_the_lock_free(make, value, monkeypatch):
    def interrupted(callback: HoldStill, *_: object) -> None:
        callback.lock.release()
        raise RuntimeError("interrupted")

    monkeypatch.setattr(HoldStill, "_give_way", interrupted)
    bench = make()
    with pytest.raises(RuntimeError, match="interrupted"):
        value(bench)
    with bench.stillness.write_lock(timeout=1):
        pass
