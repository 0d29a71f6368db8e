"""The budget, and one candidate from gate to reward on a tiny teacher and real rows."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
import pytest
import torch
from filelock import ReadWriteLock
from optuna.trial import TrialState
from rich.console import Console
from rich.progress import Progress
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import kdnas.nas.candidate
from kdnas.data.datamodule import Batch, DataSettings, KDDataModule
from kdnas.deploy.latency import ArchLatency, Latency, LatencyMeter, LatencySettings
from kdnas.distillation.module import HiddenStateDistillModule, Recipe
from kdnas.distillation.narrowing import TeacherStream
from kdnas.distillation.start import RandomStart, Start, Started
from kdnas.distillation.teacher_states import StatesSettings, open_states
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import build_classifier, find_teacher, num_parameters, student_config
from kdnas.nas.callbacks import HoldStill
from kdnas.nas.candidate import Budget, Evaluator
from kdnas.nas.reward import reward
from kdnas.nas.search import search
from kdnas.nas.space import SearchSpace
from kdnas.nas.trials import trials_frame
from kdnas.system.errors import CandidateFailed, UserError
from kdnas.system.files import Run
from kdnas.training.trainer import TrainerSettings

ARCH = StudentArch(num_hidden_layers=1, num_attention_heads=2, hidden_size=32, intermediate_size=32)
OTHER = StudentArch(
    num_hidden_layers=2, num_attention_heads=2, hidden_size=64, intermediate_size=64
)
SPACE = SearchSpace(
    {
        "num_hidden_layers": [1, 2],
        "num_attention_heads": [2],
        "hidden_size": [32],
        "intermediate_size": [32],
        "hidden_act": ["gelu"],
    }
)


def latency(student_ms: float, teacher_ms: float = 10.0) -> ArchLatency:
    return ArchLatency(Latency(student_ms, 0.25, 9), Latency(teacher_ms, 0.5, 9), 1234)


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
    states = open_states(
        teacher, data, range(-1, 4), StatesSettings(str(tmp_path_factory.mktemp("states")))
    )
    return {"teacher": teacher, "data": data, "states": states}


@pytest.fixture
def make(parts: dict[str, object], tmp_path: Path, monkeypatch) -> Callable[..., Evaluator]:
    """An Evaluator whose meter remembers both archs and must not measure others."""
    monkeypatch.setattr("kdnas.deploy.latency.measure_latency", None)

    def build(**changes: object) -> Evaluator:
        meter = LatencyMeter(parts["teacher"].config, LatencySettings(length=8))
        meter.remember(ARCH, latency(2.0))
        meter.remember(OTHER, latency(4.0))
        values = dict(
            **parts,
            recipe=Recipe(),
            meter=meter,
            budget=Budget(),
            trainer=TrainerSettings(accelerator="cpu", precision="32-true"),
            num_epochs=1,
            alpha=-0.06,
            beta=0.6,
            seed=0,
            folder=Run(tmp_path, "study").trial,
            stillness=ReadWriteLock(tmp_path / "stillness.lock"),
        )
        return Evaluator(**(values | changes))

    return build


def new_study() -> optuna.Study:
    return optuna.create_study(direction="maximize", pruner=optuna.pruners.NopPruner())


@pytest.mark.parametrize(
    ("budget", "student_ms", "violation", "reason"),
    [
        (Budget(), 1e9, 0.0, ""),
        (Budget(speedup=4), 2.5, 0.0, ""),  # exactly 4x
        (Budget(speedup=4), 1.0, 0.0, ""),
        (Budget(speedup=4), 5.0, 1.0, "2.00x as fast as the teacher, 4x is asked for"),
        (Budget(latency_ms=5), 5.0, 0.0, ""),
        (Budget(latency_ms=5), 2.0, 0.0, ""),
        (Budget(latency_ms=2.5), 5.0, 1.0, "5.000 ms, 2.5 ms is asked for"),
        (Budget(speedup=4, latency_ms=5), 2.0, 0.0, ""),
        (
            Budget(speedup=4, latency_ms=4),
            5.0,
            1.0,
            "2.00x as fast as the teacher, 4x is asked for",
        ),
        (Budget(speedup=2.5, latency_ms=2), 5.0, 1.5, "5.000 ms, 2 ms is asked for"),
        (Budget(speedup=1, latency_ms=2), 5.0, 1.5, "5.000 ms, 2 ms is asked for"),
        (Budget(num_parameters=1234), 5.0, 0.0, ""),
        (Budget(num_parameters=617), 5.0, 1.0, "1,234 parameters, 617 are asked for"),
        (
            Budget(speedup=3, latency_ms=100),
            5.0,
            0.5,
            "2.00x as fast as the teacher, 3x is asked for",
        ),
    ],
)
def test_the_budget_is_broken_by_the_larger_of_its_excesses(budget, student_ms, violation, reason):
    found, words = budget.violation(latency(student_ms))
    assert found == pytest.approx(violation)
    assert found <= 0 or words == reason


@pytest.mark.parametrize("name", ["speedup", "latency_ms", "num_parameters"])
@pytest.mark.parametrize("value", [0, -1.5, math.nan])
def test_a_budget_that_is_not_above_zero_is_refused(name, value):
    with pytest.raises(UserError, match=f"The budget {name} is {value}: give a number above 0"):
        Budget(**{name: value})


def test_the_teacher_reads_the_rows_that_students_start_on_once_for_all_candidates(
    make, monkeypatch
):
    passes, study, evaluators = [], new_study(), [make(), make()]
    of = TeacherStream.of
    monkeypatch.setattr(TeacherStream, "of", lambda *args: passes.append(args) or of(*args))
    weights = []
    for evaluator, arch in ((evaluators[0], ARCH), (evaluators[0], OTHER), (evaluators[1], OTHER)):
        trial = study.ask()
        study.tell(trial, evaluator(trial, arch))
        weights.append(study.trials[-1].user_attrs["weights_sha256"])
        assert len(passes) == (1 if evaluator is evaluators[0] else 2)
    assert weights[1] == weights[2] != weights[0]


def test_a_candidate_is_trained_and_everything_about_it_is_written_down(make, tmp_path):
    study = new_study()
    trial = study.ask()
    evaluator = make(num_epochs=2, recipe=Recipe(learning_rate=1e-2, matrix_learning_rate=1e-2))
    value = evaluator(trial, ARCH)
    study.tell(trial, value)
    frozen = study.trials[0]
    assert frozen.state == TrialState.COMPLETE
    attrs = frozen.user_attrs
    history = attrs.pop("history")
    assert [set(entry) for entry in history] == [
        {"epoch", "loss", "contextual_share", "sentence_r2"}
    ] * 2
    assert [entry["epoch"] for entry in history] == [0, 1]
    assert history[1]["loss"] < history[0]["loss"]
    assert attrs.pop("seconds") > 0
    assert len(attrs.pop("weights_sha256")) == len(attrs.pop("optimizer_sha256")) == 64
    assert attrs == {
        "num_parameters": 1234,
        "latency_ms": 2.0,
        "latency_iqr_ms": 0.25,
        "teacher_latency_ms": 10.0,
        "teacher_latency_iqr_ms": 0.5,
        "speedup": 5.0,
        "loss": history[-1]["loss"],
        "contextual_share": history[-1]["contextual_share"],
        "sentence_r2": history[-1]["sentence_r2"],
        "reward": value,
    }
    assert value == reward(attrs["loss"], 2.0, 10.0)
    assert all(
        entry[name] < 1 for entry in history for name in ("contextual_share", "sentence_r2")
    )  # of one batch
    assert frozen.constraints == {"budget": 0.0}
    scores = {epoch: 1 - entry["loss"] for epoch, entry in enumerate(history)}
    assert frozen.intermediate_values == pytest.approx(scores, rel=1e-6)
    (events,) = (tmp_path / "study" / "trial_0000").glob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    assert {"train/loss", "val/loss", "hp/reward"} <= set(accumulator.Tags()["scalars"])
    assert accumulator.Scalars("hp/reward")[-1].value == pytest.approx(value)


def test_each_trial_has_its_own_folder(make, tmp_path):
    study = new_study()
    for _ in range(2):
        make()(study.ask(), ARCH)
    folders = sorted((tmp_path / "study").iterdir())
    assert [folder.name for folder in folders] == ["trial_0000", "trial_0001"]
    assert all(len(list(folder.glob("events.out.tfevents.*"))) == 1 for folder in folders)


def test_the_gate_measures_and_the_fit_uses_the_same_number(make, parts, monkeypatch):
    calls = []

    def measure(models, settings):
        calls.append(models)
        return [Latency(3.0, 0.0, 1), Latency(12.0, 0.0, 1)]

    evaluator = make(meter=LatencyMeter(parts["teacher"].config, LatencySettings(length=8)))
    monkeypatch.setattr("kdnas.deploy.latency.measure_latency", measure)
    trial = new_study().ask()
    value = evaluator(trial, ARCH)
    assert len(calls) == 1
    deployed = build_classifier(student_config(evaluator.teacher.config, ARCH))
    assert trial.user_attrs["num_parameters"] == num_parameters(deployed)
    assert value == reward(trial.user_attrs["loss"], 3.0, 12.0)


def test_a_candidate_over_budget_is_refused_before_anything_is_built(make, tmp_path, monkeypatch):
    monkeypatch.setattr(kdnas.nas.candidate, "HiddenStateDistillModule", None)
    monkeypatch.setattr(kdnas.nas.candidate, "make_trainer", None)
    study = new_study()
    evaluator = make(budget=Budget(speedup=10))
    study.optimize(lambda trial: evaluator(trial, ARCH), n_trials=1)
    (refused,) = study.trials
    assert refused.state == TrialState.PRUNED and refused.value is None
    assert refused.user_attrs == {
        "num_parameters": 1234,
        "latency_ms": 2.0,
        "latency_iqr_ms": 0.25,
        "teacher_latency_ms": 10.0,
        "teacher_latency_iqr_ms": 0.5,
        "speedup": 5.0,
        "refused": "5.00x as fast as the teacher, 10x is asked for",
    }
    assert refused.constraints == {"budget": 1.0}
    assert not (tmp_path / "study").exists()


def test_a_candidate_within_the_budget_is_trained(make):
    assert math.isfinite(make(budget=Budget(speedup=5, latency_ms=2))(new_study().ask(), ARCH))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"recipe": Recipe(start=OneWeightIsNaN())}, "the training loss is nan at step 1"),
        (
            {"recipe": Recipe(learning_rate=1e38, constant_rate=True)},
            r"loss is (nan|inf)|error is (nan|inf)",
        ),
    ],
)
def test_a_candidate_whose_loss_is_no_number_fails_with_its_step(make, changes, reason):
    with pytest.raises(CandidateFailed, match=reason):
        make(**changes)(new_study().ask(), ARCH)


def test_in_a_search_such_a_candidate_is_a_failed_trial_and_the_next_is_trained(make, monkeypatch):
    evaluator = make()
    evaluator.meter.remember(StudentArch(2, 2, 32, 32), latency(3.0))
    ruined = dataclasses.replace(evaluator, recipe=Recipe(start=OneWeightIsNaN()))
    study = new_study()
    study.enqueue_trial(ARCH.to_dict())
    best = search(
        lambda trial, arch: (ruined if arch == ARCH else evaluator)(trial, arch),
        SPACE,
        study,
        n_trials=1,
    )
    failed = study.trials[0]
    assert failed.state == TrialState.FAIL
    assert failed.user_attrs["failed"] == "the training loss is nan at step 1"
    assert failed.user_attrs["latency_ms"] == 2.0
    assert best.user_attrs["arch"]["num_hidden_layers"] == 2


def test_a_pruner_ends_a_candidate_early(make):
    study = optuna.create_study(
        direction="maximize", pruner=optuna.pruners.ThresholdPruner(lower=1.0)
    )
    evaluator = make(num_epochs=3)
    study.optimize(lambda trial: evaluator(trial, ARCH), n_trials=1)
    (trial,) = study.trials
    assert trial.state == TrialState.PRUNED
    assert list(trial.intermediate_values) == [0]
    assert "refused" not in trial.user_attrs and trial.constraints == {"budget": 0.0}
    (row,) = trials_frame(study).to_dict("records")
    assert row["state"] == "PRUNED" and row["seconds"] > 0
    assert row["reason"].startswith("held-out loss ") and row["reason"].endswith(
        " after epoch 1 of 3"
    )


def test_the_same_arch_and_seed_score_the_same_whatever_was_trained_before(make):
    evaluator = make()
    torch.manual_seed(1)
    first = evaluator(new_study().ask(), ARCH)
    other = evaluator(new_study().ask(), OTHER)
    torch.rand(7)
    assert evaluator(new_study().ask(), ARCH) == first != other
    random = {"recipe": Recipe(start=RandomStart())}
    assert make(**random)(new_study().ask(), ARCH) != make(seed=1, **random)(
        new_study().ask(), ARCH
    )


def test_a_candidate_does_not_change_what_is_drawn_next(make):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make()(new_study().ask(), ARCH)
    assert torch.rand(3).equal(expected)


def test_a_candidate_sees_the_mini_rows_and_is_scored_on_the_held_out_ones(
    make, parts, monkeypatch
):
    seen: dict[str, set[int]] = {"training_step": set(), "validation_step": set()}

    class Watched(HiddenStateDistillModule):
        def training_step(self, batch, batch_idx):
            seen["training_step"] |= set(batch["sample_ids"].tolist())
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            seen["validation_step"] |= set(batch["sample_ids"].tolist())
            return super().validation_step(batch, batch_idx)

    monkeypatch.setattr(kdnas.nas.candidate, "HiddenStateDistillModule", Watched)
    make()(new_study().ask(), ARCH)
    data = parts["data"]
    assert seen["training_step"] == set(data.select("mini").train_ids().tolist())
    assert seen["validation_step"] == set(data.held_out_ids().tolist())
    assert data.split == "full"


def test_the_progress_bar_names_the_trial_and_is_gone_afterwards(make):
    with Progress(console=Console(quiet=True)) as progress:
        shown = []
        add_task = progress.add_task
        progress.add_task = lambda description, **options: (
            shown.append(description) or add_task(description, **options)
        )
        make(progress=progress)(new_study().ask(), ARCH)
        assert shown[0] == f"trial 0: {ARCH}" and shown[1].startswith("  epoch 1 of ")
        assert progress.tasks == []


def test_an_interruption_between_two_steps_is_one_and_leaves_the_lock_free(
    make, tmp_path, monkeypatch
):
    def interrupted(callback: HoldStill) -> None:
        callback.lock.release()
        raise KeyboardInterrupt

    monkeypatch.setattr(HoldStill, "give_way", interrupted)
    evaluator = make()
    with pytest.raises(KeyboardInterrupt):
        evaluator(new_study().ask(), ARCH)
    with evaluator.stillness.write_lock(timeout=1):
        pass
