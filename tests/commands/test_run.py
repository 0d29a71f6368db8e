"""The whole job through the command line, on a tiny teacher."""

import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import optuna
import pandas as pd
import psutil
import pytest
import torch
import yaml
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModel, AutoModelForSequenceClassification

from kdnas.cli.main import main
from kdnas.cli.parser import read_config
from kdnas.commands import glue as comparison
from kdnas.commands import jobs
from kdnas.commands import run as pipeline
from kdnas.commands.config import RunConfig, SearchConfig, SearchSettings, as_plain
from kdnas.commands.export import is_exported
from kdnas.data.quickstart import build_quickstart_text
from kdnas.deploy.onnx import open_session
from kdnas.distillation.module import HiddenStateDistillModule, Recipe
from kdnas.distillation.objectives import HiddenStates
from kdnas.distillation.state_cache import StateCache
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import build_classifier, find_teacher, num_parameters
from kdnas.models.families import arch_of, student_config
from kdnas.models.layers import Even
from kdnas.nas.reward import reward
from kdnas.nas.trials import trained
from kdnas.system.errors import CandidateFailed, UserError
from kdnas.system.files import Run, is_alive
from kdnas.system.jobs import Job
from kdnas.system.yaml import flat
from kdnas.tasks.finetune import GLUEModule
from tests.conftest import WORDS, make_rows, save_teacher

ARTEFACTS = (
    "config.yaml study.db trials.csv best_student.yaml trial_0000 full_kd/result.json full_kd/encoder "
    "glue/results.json glue/teacher/result.json glue/student/result.json glue/random/result.json "
    "glue/static/result.json glue/layer_cut/result.json student/config.json "
    "student/model.safetensors student/tokenizer.json student/model.onnx report.html manifest.json"
).split()


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Which of three words begins the sentence: a labelled task that is learned in a few steps.

    Its classes are called by these words.
    """
    features = datasets.Features(
        sentence=datasets.Value("string"), label=datasets.ClassLabel(names=WORDS[:3])
    )
    folder = tmp_path_factory.mktemp("task") / "first_word"
    folder.mkdir()
    for split, seed, num_rows in (("train", 1, 96), ("validation", 2, 30)):
        rows = make_rows(num_rows, seed, longest=8)
        labels = [i % 3 for i in range(num_rows)]
        sentences = [f"{WORDS[label]} {row}" for label, row in zip(labels, rows, strict=True)]
        rows = datasets.Dataset.from_dict({"sentence": sentences, "label": labels}, features)
        rows.to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="session")
def command_in(
    tiny_teacher: Path, text_file: Path, task_folder: Path
) -> Callable[[Path], list[str]]:
    """``kdnas run`` on the quickstart's YAML, shrunk, in a folder, and all in this process."""
    options = {
        "config": "configs/quickstart.yaml",
        "teacher": tiny_teacher,
        "text": text_file,
        "task": task_folder,
        "name": "tiny",
        "workers": 0,
        "data.max_length": 24,
        "data.batch_tokens": 256,
        "search.n_trials": 2,
        "search.num_epochs": 1,
        "search.budget.speedup": 0.01,
        "full_kd.num_epochs": 2,
        "finetune.num_epochs": 2,
        "finetune.max_length": 24,
        "latency.length": 16,
        "latency.min_seconds": 0.01,
    }
    shrunk = ["run", *(f"--{name}={value}" for name, value in options.items())]
    return lambda folder: [
        *shrunk,
        f"--root={folder / 'logs'}",
        f"--states.folder={folder / 'states'}",
    ]


def interrupt(*args: object, **options: object) -> None:
    raise KeyboardInterrupt


def of_search(command: list[str], *options: str) -> list[str]:
    """The search of a run, without what only a run takes."""
    of_run = ("--config", "--task", "--full_kd", "--finetune")
    return ["search", *(one for one in command[1:] if not one.startswith(of_run)), *options]


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture
def command(command_in: Callable[[Path], list[str]], tmp_path: Path) -> list[str]:
    return command_in(tmp_path)


@pytest.fixture(scope="module")
def finished(
    command_in: Callable[[Path], list[str]], tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """A command that was run to its end; its folder is ``finished_run``'s. Tests leave it as it is."""
    command = command_in(tmp_path_factory.mktemp("finished"))
    assert main(command) == 0
    return command


@pytest.fixture
def finished_run(finished: list[str]) -> Path:
    return Path(next(o for o in finished if o.startswith("--root=")).partition("=")[2]) / "tiny"


def snapshot(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_the_teacher_s_sha256_stands_in_report_card_and_manifests(
    finished_run: Path, tiny_teacher: Path
) -> None:
    sha256 = find_teacher(str(tiny_teacher)).sha256()
    for folder in (finished_run, finished_run / "student"):
        assert json.loads((folder / "manifest.json").read_text())["teacher_sha256"] == sha256
    for page in ("report.html", "student/README.md"):
        assert sha256 in (finished_run / page).read_text()


def test_whole_job_leaves_every_artefact_and_a_second_run_changes_nothing(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    first = capsys.readouterr().out
    run = tmp_path / "logs" / "tiny"
    assert [name for name in ARTEFACTS if not (run / name).exists()] == []
    assert not list(run.rglob(".*")), "nothing temporary is left"

    trials = pd.read_csv(run / "trials.csv")
    finished = trials[trials.state == "COMPLETE"]
    assert (
        len(finished.drop_duplicates(["num_hidden_layers", "hidden_size", "num_attention_heads"]))
        >= 2
    )
    best = StudentArch.from_yaml(run / "best_student.yaml")
    assert finished.loc[finished.reward.idxmax(), "hidden_size"] == best.hidden_size
    assert list((run / "trial_0000").glob("events.out.tfevents.*"))

    results = json.loads((run / "glue" / "results.json").read_text())
    assert list(results["models"]) == ["teacher", "student", "random", "static", "layer_cut"]
    for row in results["models"].values():
        assert row["latency_ms"] > 0 and row["megabytes"] > 0 and row["num_parameters"] > 0
    assert (
        results["models"]["student"]["num_parameters"]
        == results["models"]["random"]["num_parameters"]
    )
    report = (run / "report.html").read_text()
    for row in results["models"].values():
        assert f"{row['score']:.3f}" in report and f"{row['score']:.3f}" in first
    assert "tensorboard --logdir" in first

    before = snapshot(tmp_path / "logs")
    assert main(command) == 0
    second = capsys.readouterr().out
    assert "finished" in second
    assert second.splitlines()[1:] == first.splitlines()[-len(second.splitlines()) + 1 :], (
        "the same table, the same last lines"
    )
    assert snapshot(tmp_path / "logs") == before
    assert main(["verify", str(run)]) == 0
    (run / "manifest.json").unlink()  # killed before its last moment
    assert main(command) == 0
    assert main(["verify", str(run)]) == 0


def test_export_is_a_plain_folder_without_teacher_or_projections(
    finished_run: Path, tmp_path: Path
) -> None:
    run = finished_run
    best = StudentArch.from_yaml(run / "best_student.yaml")
    encoder = AutoModel.from_pretrained(run / "student")
    classifier = AutoModelForSequenceClassification.from_pretrained(run / "student")
    for name, value in best.to_dict().items():
        assert getattr(encoder.config, name) == value
    assert classifier.config.id2label == dict(enumerate(WORDS[:3]))
    done = subprocess.run(
        [sys.executable, run / "student" / "predict.py", "the river"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["label"] in WORDS[:3]
    teacher = yaml.safe_load((run / "config.yaml").read_text())["teacher"]
    assert classifier.config.teacher_sha256 == find_teacher(teacher).sha256()
    with safe_open(run / "student" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names == set(classifier.state_dict())
    code = (
        "import sys; sys.modules['kdnas'] = None\n"
        "from transformers import AutoModel\n"
        f"print(AutoModel.from_pretrained({str(run / 'student')!r}).config.hidden_size)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.split()[-1] == str(best.hidden_size)


def test_an_export_of_another_model_is_made_anew(
    finished: list[str], finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, "tiny")
    shutil.copytree(finished_run, run.folder)
    run.manifest.unlink()
    manifest = json.loads((run.student / "manifest.json").read_text())
    (run.student / "manifest.json").write_text(json.dumps(manifest | {"source_sha256": "another"}))
    assert main([*finished, f"--root={tmp_path}"]) == 0
    told = "holds another model than the run has now; it is exported again"
    assert told in " ".join(capsys.readouterr().out.split())
    assert is_exported(run) and main(["verify", str(run.folder)]) == 0


def test_without_a_task_the_encoder_is_exported(command: list[str], tmp_path: Path) -> None:
    assert main([*command, "--task=null"]) == 0
    run = tmp_path / "logs" / "tiny"
    assert not run.joinpath("glue").exists()
    assert AutoModel.from_pretrained(
        run / "student", add_pooling_layer=False
    ).config.architectures == ["BertModel"]
    assert run.joinpath("report.html").exists()


def test_what_a_stage_has_done_before_ctrl_c_is_not_done_again(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "logs" / "tiny"
    # What is called last in each stage, in the order of the stages.
    for last_call in (
        "StudentArch.to_yaml",
        "too_long",
        "Comparison.measure_rows",
        "say",
        "write_manifest",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"kdnas.commands.run.{last_call}", interrupt)
            assert main(command) == 130
        assert "run the same command again to resume" in capsys.readouterr().err
        assert not (run / "manifest.json").exists()
    results = {path: path.stat().st_mtime_ns for path in run.rglob("result.json")}
    assert len(results) >= 2 + 1 + 5 + 1

    assert main(command) == 0
    shown = capsys.readouterr().out
    for done in (
        "Search: 2 candidates are done",
        "Full KD: done",
        "Fine-tuning: done",
        "Export: done",
    ):
        assert done in shown
    assert {path: path.stat().st_mtime_ns for path in run.rglob("result.json")} == results
    assert not list(run.rglob(".*")), "nothing temporary is left"


def stop_in_second_epoch(
    patch: pytest.MonkeyPatch, module: type[pl.LightningModule], run: Path
) -> None:
    """Send Ctrl-C in the second epoch of a fit of two, which a candidate has not."""
    whole = module.training_step

    def step(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.trainer.max_epochs == 2 and self.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGINT)
            deadline = time.monotonic() + 30
            while not list(run.rglob("stop")) and time.monotonic() < deadline:
                time.sleep(0.01)
        return whole(self, batch, batch_idx)

    patch.setattr(module, "training_step", step)


def epochs_of(patch: pytest.MonkeyPatch, module: type[pl.LightningModule]) -> list[int]:
    """The epoch of each step from now on."""
    whole, epochs = module.training_step, []

    def step(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
        epochs.append(self.current_epoch)
        return whole(self, batch, batch_idx)

    patch.setattr(module, "training_step", step)
    return epochs


def test_full_kd_and_fine_tuning_go_on_in_the_epoch_in_which_they_were_stopped(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "logs" / "tiny"
    with monkeypatch.context() as patch:
        stop_in_second_epoch(patch, HiddenStateDistillModule, run)
        assert main(command) == 130
    assert (run / "full_kd/last.ckpt").exists() and not (run / "full_kd/result.json").exists()
    with monkeypatch.context() as patch:
        steps = epochs_of(patch, HiddenStateDistillModule)
        stop_in_second_epoch(patch, GLUEModule, run)
        assert main(command) == 130
    assert "Full KD: going on where it was stopped" in capsys.readouterr().out
    assert set(steps) == {1}, "epoch 0 is not done again"
    result = json.loads((run / "full_kd/result.json").read_text())
    assert [row["epoch"] for row in result["history"]] == [0, 1]
    assert not (run / "full_kd/last.ckpt").exists()
    assert (run / "glue/teacher/last.ckpt").exists()

    steps = epochs_of(monkeypatch, GLUEModule)
    monkeypatch.setattr(pipeline.Comparison, "measure_rows", interrupt)
    assert main(command) == 130
    assert [epoch for epoch, _ in groupby(steps)] == [1, *[0, 1] * 4], "of five models"
    assert not list(run.rglob("last.ckpt"))


@pytest.mark.slow
def test_what_was_searched_or_stopped_and_then_reported_is_not_finished(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, root = tmp_path / "logs" / "tiny", f"--root={tmp_path / 'logs'}"
    search = of_search(command)
    command.append("--task=null")
    assert main(search) == 0
    assert main(["verify", str(run)]) == 0
    assert main(["report", root, "--run=tiny"]) == 0
    with monkeypatch.context() as patch:
        stop_in_second_epoch(patch, HiddenStateDistillModule, run)
        assert main(command) == 130
    assert main(["report", root, "--run=tiny"]) == 0
    assert main(search) == 0
    assert not (run / "manifest.json").exists(), "the run is not finished"
    capsys.readouterr()
    assert main(command) == 0
    assert "Full KD: going on where it was stopped" in capsys.readouterr().out
    assert (run / "student" / "model.safetensors").exists()
    assert main(["verify", str(run)]) == 0
    assert main([*command, f"--task={tmp_path}"]) == 2, "what is exported was not fine-tuned"
    assert "task: None there" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_on_a_gpu_that_was_stopped_goes_on_to_its_end(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "logs" / "tiny"
    command += ["--trainer.accelerator=gpu", "--latency.backend=cuda"]
    with monkeypatch.context() as patch:
        stop_in_second_epoch(patch, HiddenStateDistillModule, run)
        assert main(command) == 130
    assert main(command) == 0
    assert "Full KD: going on where it was stopped" in capsys.readouterr().out
    assert [name for name in ARTEFACTS if not (run / name).exists()] == []
    assert json.loads((run / "manifest.json").read_text())["gpu"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_dry_run_on_a_gpu_measures_students_that_start_on_the_cpu(command: list[str]) -> None:
    assert main([*command, "--trainer.accelerator=gpu", "--dry-run"]) == 0


def test_what_full_kd_goes_on_from_is_looked_at_and_never_run(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mark, run = tmp_path / "ran", tmp_path / "logs/tiny"
    command.append("--task=null")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "full_kd_stage", interrupt)
        assert main(command) == 130
    (run / "full_kd").mkdir()
    payload = {"state_dict": Payload(mark)}
    of_another = {"state_dict": {}, "pytorch-lightning_version": "2.6.0"}
    for save, message in (
        (lambda path: torch.save(payload, path), "holds more than tensors"),
        (lambda path: path.write_bytes(pickle.dumps(payload, 2)), "holds more than tensors"),
        (lambda path: path.write_bytes(b"PK\3\4 cut"), "is damaged"),
        (lambda path: torch.save({"state_dict": {}}, path), "is not a checkpoint of a fit"),
        (lambda path: torch.save(of_another, path), "was written by another version of kdnas"),
    ):
        save(run / "full_kd/last.ckpt")
        assert main(command) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error and "full_kd/last.ckpt' " in error and not mark.exists()
    (run / "full_kd/last.ckpt").unlink()

    for name in ("weights", "optimizer"):
        kept = list(run.glob(f"trial_*/{name}.safetensors"))
        for path in kept:
            flip_last_byte(path)
        assert main(command) == 2
        assert f"{name}.safetensors' is damaged (its sha256 is no longer" in capsys.readouterr().err
        for path in kept:
            flip_last_byte(path)
    for path in run.glob("trial_*/optimizer.safetensors"):
        path.unlink()
    monkeypatch.setattr("kdnas.commands.jobs.distill_best", interrupt)
    assert main(command) == 130
    told = re.findall(
        "Full KD: starting without (.*), which does not exist", capsys.readouterr().out
    )
    assert [Path(path).name for path in told] == ["optimizer.safetensors"]


class Payload:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_full_kd_goes_on_from_the_best_candidates_weights(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begins_with: dict[str, torch.Tensor] = {}
    moments: dict[str, torch.Tensor] = {}

    def watch(trainer, folder, num_epochs, module, data):
        for kept, tensors in (
            (begins_with, module.state_dict()),
            (moments, module.optimizer_tensors),
        ):
            kept.update({name: tensor.clone() for name, tensor in tensors.items()})
        raise KeyboardInterrupt

    monkeypatch.setattr("kdnas.distillation.full_kd.fit_resumable", watch)
    assert main([*command, "--task=null", "--search.n_trials=4"]) == 130
    run = tmp_path / "logs" / "tiny"
    kept = sorted(path.parent.name for path in run.glob("trial_*/weights.safetensors"))
    assert len(kept) == 3
    assert sorted(path.parent.name for path in run.glob("trial_*/optimizer.safetensors")) == kept
    trials = pd.read_csv(run / "trials.csv")
    trained = trials[trials.state == "COMPLETE"].drop_duplicates("reward").sort_values("reward")
    assert f"trial_{trained.number.iloc[-1]:04d}" in kept
    best = run / f"trial_{trained.number.iloc[-1]:04d}"
    for found, name in ((begins_with, "weights.safetensors"), (moments, "optimizer.safetensors")):
        known = load_file(best / name)
        assert known and found.keys() == known.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in known.items())


def test_an_objective_that_a_student_cannot_be_asked_for_is_refused_at_the_start(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = {
        "class_path": "kdnas.distillation.attention.AttentionRelations",
        "init_args": {"num_heads": 7},
    }
    assert main([*command, f"--recipe.objective={json.dumps(objective)}"]) == 2
    assert "cannot be split into 7 relation heads" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


def test_a_search_can_be_prolonged_and_says_once_that_the_machine_is_busy(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kdnas.deploy.latency.MOST_SPREAD", -1.0)
    search, run = of_search(command), tmp_path / "logs" / "tiny"
    assert main(search) == 0
    busy = "The machine is busy: the teacher's latency beside trial 0 spread by more than a tenth"
    assert [busy in message for message in caplog.messages].count(True) == 1
    monkeypatch.setattr("kdnas.deploy.latency.MOST_SPREAD", float("inf"))
    caplog.clear()

    def too_slow(*args: object) -> None:
        raise UserError("No student meets the budget")

    monkeypatch.setattr("kdnas.commands.inputs._refuse_impossible_budget", too_slow)
    assert main([*search, "--name=other"]) == 2
    assert main([*search, "--search.n_trials=3"]) == 0, "what has begun is past a glance"
    assert "The machine is busy" not in caplog.text
    assert "going on after 2 of 3" in capsys.readouterr().out
    trials = pd.read_csv(run / "trials.csv")
    assert (trials.state == "COMPLETE").sum() >= 3


@pytest.mark.parametrize("damage", ["deleted", "cut", "overwritten"])
def test_a_search_whose_database_is_lost_goes_on_from_its_results(
    damage: str,
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    search, run = of_search(command, "--search.n_trials=1"), tmp_path / "logs" / "tiny"
    assert main(search) == 0
    database, before = run / "study.db", pd.read_csv(run / "trials.csv")
    if damage == "deleted":
        database.unlink()
    elif damage == "cut":
        os.truncate(database, database.stat().st_size // 2)
    else:
        database.write_text("no database")
    capsys.readouterr()
    assert main([*search, "--search.n_trials=2"]) == 0
    assert "rebuilt from the results of" in caplog.text
    assert (run / "study.db.replaced").exists() is (damage != "deleted")
    assert "going on after 1 of 2" in capsys.readouterr().out
    after = pd.read_csv(run / "trials.csv")
    assert after.reward[: len(before)].tolist() == before.reward.tolist()


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("--seed=1", "seed"),
        ("--search.alpha=-0.1", "search.alpha"),
        ("--data.max_length=20", "data.max_length"),
        ("--states.precision=int8", "states.precision"),
        ("--grid.batch_sizes=[8]", "grid.batch_sizes"),
        ("--distill.temperature=4.0", "distill.temperature"),
    ],
)
def test_another_config_under_the_same_name_is_refused(
    option: str,
    key: str,
    finished: list[str],
    finished_run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = snapshot(finished_run)
    capsys.readouterr()
    assert main([*finished, option]) == 2
    error = capsys.readouterr().err
    assert key in error and option.partition("=")[2] in error and "--name tiny-2" in error
    assert error.count("\n") == 1
    assert snapshot(finished_run) == before


def test_a_search_goes_on_in_the_precision_that_it_was_begun_in(
    command: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    search = of_search(command)
    monkeypatch.setenv("KDNAS_CPU_MATMULS", "bfloat16")
    assert main(search) == 0
    monkeypatch.setenv("KDNAS_CPU_MATMULS", "float32")
    assert main([*search, "--search.n_trials=3"]) == 0
    assert "begun with matmuls in bfloat16, and continues with them, not in float32" in caplog.text
    assert os.environ["KDNAS_CPU_MATMULS"] == "float32", "for what else this process does"


def test_other_lengths_in_the_same_file_are_another_study(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lengths = tmp_path / "lengths.jsonl"
    lengths.write_text("7\n12\n")
    monkeypatch.setattr(pipeline, "search_stage", interrupt)
    own = [*command, f"--latency.lengths={lengths}"]
    assert main(own) == main(own) == 130
    lengths.write_text("7\n16\n")
    capsys.readouterr()
    assert main(own) == 2
    assert "other settings (latency.lengths_sha256: " in capsys.readouterr().err


def test_a_disk_that_fails_where_the_board_begins_is_told_with_its_folder(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(folder: str, flush_secs: int) -> None:
        raise OSError(errno.EIO, "Input/output error")  # as TensorBoard's, which names no file

    monkeypatch.setattr("kdnas.report.tensorboard.SummaryWriter", fail)
    assert main(command) == 3
    assert (
        f"kdnas: [Errno 5] Input/output error: '{tmp_path / 'logs' / 'tiny' / 'search'}'"
        in capsys.readouterr().err
    )


def test_another_teacher_or_text_under_the_same_path_is_refused(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(make_rows(120, seed=5)))
    own = [*command, f"--teacher={teacher}", f"--text={text}", "--task=null"]
    monkeypatch.setattr(pipeline, "search_stage", interrupt)
    assert main(own) == 130

    model = AutoModel.from_pretrained(teacher)
    model.encoder.layer[0].output.dense.weight.data[0, 0] += 1
    model.save_pretrained(teacher)
    capsys.readouterr()
    assert main(own) == 2
    assert "(teacher: " in capsys.readouterr().err

    save_teacher(teacher)
    text.write_text("\n".join(make_rows(120, seed=6)))
    assert main(own) == 2
    assert "(text: " in capsys.readouterr().err


def test_a_config_is_plain_yaml_that_gives_it_back(tmp_path: Path) -> None:
    config = RunConfig(
        teacher="t",
        text="x",
        recipe=Recipe(objective=HiddenStates(Even())),
        search=SearchSettings(n_trials=3),
    )
    plain = as_plain(config)
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    objective = plain["recipe"]["objective"]
    assert objective["class_path"] == "kdnas.distillation.objectives.HiddenStates"
    assert objective["init_args"]["mapping"] == {"class_path": "kdnas.models.layers.Even"}
    assert flat(plain)["search.n_trials"] == 3
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(plain))
    assert as_plain(read_config(RunConfig, "run", ["--config", str(path)])[0]) == plain


def test_candidates_that_all_fail_end_with_one_line(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: object) -> None:
        raise CandidateFailed("no luck 17")

    monkeypatch.setattr("kdnas.commands.jobs.train_candidate", fail)
    assert main([*command, "--search.n_trials=20"]) == 1
    assert "no luck 17" in capsys.readouterr().err.splitlines()[-1]
    trials = pd.read_csv(tmp_path / "logs/tiny/trials.csv")
    assert len(trials) == 5, "more would fail alike"
    assert not (tmp_path / "logs/tiny/best_student.yaml").exists()


def test_a_run_that_another_process_makes_is_refused_and_a_lock_without_holder_is_none(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "logs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "run.lock").write_text("process 77 of here, since noon")  # its process may be dead
    with FileLock(folder / "run.lock"):
        before = snapshot(folder)
        for one in (command, of_search(command)):
            assert main(one) == 2
            assert (
                "'tiny' is in use by process 77 of here, since noon: wait for it"
                in capsys.readouterr().err
            )
        assert snapshot(folder) == before
    monkeypatch.setattr(pipeline, "search_stage", interrupt)
    assert main(command) == 130
    assert (folder / "run.lock").read_text().startswith(f"process {os.getpid()} of ")


def test_a_run_has_a_grid_and_the_help_of_the_teacher_that_it_has_fine_tuned(
    command: list[str], tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, glue = find_teacher(str(tiny_teacher)), tmp_path / "logs" / "tiny" / "glue"
    shape = replace(arch_of(teacher.config), num_hidden_layers=2)
    most = num_parameters(build_classifier(student_config(teacher.config, shape)))
    whole, helpers = comparison.load_task_teacher, []

    def load(source: str, *others: Any) -> Any:
        helpers.append(source)
        return whole(source, *others)

    monkeypatch.setattr(comparison, "load_task_teacher", load)
    rates = [1e-3, 1e-6]
    own = [*command, f"--search.budget.num_parameters={most}", "--task_distill=true"]
    own += ["--grid.batch_sizes=[16]", f"--grid.learning_rates={rates}", "--grid.held_out=0.25"]
    assert main(own) == 0
    assert helpers == [str(glue / "teacher" / "model")]
    for role in ("teacher", "student", "random", "static", "layer_cut"):
        scores = {
            rate: json.loads((glue / role / f"grid_16_{rate:g}" / "result.json").read_text())[
                "score"
            ]
            for rate in rates
        }
        settings = json.loads((glue / role / "result.json").read_text())["settings"]
        assert settings["batch_size"] == 16
        assert scores[settings["learning_rate"]] == max(scores.values())
    cut = json.loads((glue / "layer_cut" / "model" / "config.json").read_text())
    assert (cut["num_hidden_layers"], cut["hidden_size"]) == (2, 64), "the most within the budget"
    report = " ".join((glue.parent / "report.html").read_text().split())
    assert "The student learned from the fine-tuned teacher too." in report


def test_rows_of_a_task_that_changed_are_noticed(
    command: list[str],
    task_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task = tmp_path / "first_word"
    shutil.copytree(task_folder, task)
    own = [*command, f"--task={task}"]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Comparison, "measure_rows", interrupt)
        assert main(own) == 130
    shutil.copy(task / "train.parquet", task / "validation.parquet")
    assert main(own) == 2
    told = r"/glue/teacher' was made with other settings \(task_sha256: '\w+' there, '\w+' now\)"
    assert re.search(told, capsys.readouterr().err)


def test_what_changes_no_result_may_change_before_its_stage(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "logs" / "tiny"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "full_kd_stage", interrupt)
        assert main(command) == 130
    changed = [*command, "--states.max_gb=0", "--full_kd.num_epochs=1", "--task=null"]
    assert main(changed) == 0
    saved = yaml.safe_load((run / "config.yaml").read_text())
    now = (saved["states"]["max_gb"], saved["full_kd"]["num_epochs"], saved["task"])
    assert now == (0, 1, None)
    capsys.readouterr()
    assert main([*changed, "--full_kd.num_epochs=2"]) == 2
    assert "full_kd.num_epochs: 1 there, 2 now" in capsys.readouterr().err
    assert main([*changed, "--space.hidden_size=[32]"]) == 2  # another space
    assert re.search(r"space\.hidden_size: .* there, \[32\] now", capsys.readouterr().err)

    (run / "student").rename(tmp_path / "student")  # as if fine-tuning had not ended
    (run / "glue").mkdir()
    assert main([*changed, "--finetune.learning_rate=1e-5"]) == 2
    told = f"go back to them, or delete '{run}/glue' to fine-tune again"
    assert told in capsys.readouterr().err
    (run / "glue").rmdir()
    (tmp_path / "student").rename(run / "student")
    assert main(of_search(command, "--search.n_trials=3")) == 2
    assert "has already begun full KD, so its search cannot be continued" in capsys.readouterr().err


def test_an_impossible_length_of_the_task_is_refused_at_the_start(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--finetune.max_length=99"]) == 2
    assert "finetune.max_length is 99" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


def test_a_gpu_that_a_worker_will_not_see_is_refused_at_the_start(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "kdnas.deploy.latency._devices", lambda: ["cpu", "cuda", "cuda:0", "cuda:1"]
    )
    assert main([*command, "--latency.device=cuda:1", "--workers=1"]) == 2
    told = "latency.device is 'cuda:1', but each worker sees only one GPU: give 'cuda'"
    assert told in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


@pytest.mark.slow
def test_a_search_measures_by_the_backend_that_is_asked_for(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def watch(path: Path, num_threads: int) -> object:
        opened.append(path.name)
        return open_session(path, num_threads)

    monkeypatch.setattr("kdnas.deploy.latency.open_session", watch)
    options = ["--latency.backend=onnxruntime-int8", "--search.n_trials=1"]
    assert main(of_search(command, *options)) == 0
    assert opened == ["model.int8.onnx"] * len(opened) and len(opened) >= 2, "student and teacher"
    assert (pd.read_csv(tmp_path / "logs/tiny/trials.csv").latency_ms > 0).any()


@pytest.mark.slow
def test_quickstart_on_its_real_teacher_and_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {
        "config": "configs/quickstart.yaml",
        "root": tmp_path / "logs",
        "states.folder": tmp_path / "states",
        "data.max_length": 16,
        "finetune.max_length": 16,
        "latency.length": 16,
        "latency.min_seconds": 0.1,
        "search.n_trials": 1,
        "search.num_epochs": 1,
        "search.budget.speedup": 2,
        "full_kd.num_epochs": 1,
        "finetune.num_epochs": 1,
        "finetune.batch_size": 64,
        "finetune.learning_rate": 5e-4,
    }
    assert main(["run", *(f"--{name}={value}" for name, value in options.items())]) == 0
    run = tmp_path / "logs" / "quickstart"
    assert [name for name in ARTEFACTS if not (run / name).exists() and name != "trial_0000"] == []
    results = json.loads((run / "glue" / "results.json").read_text())
    assert results["task"]["num_labels"] == 8
    scores = {role: row["score"] for role, row in results["models"].items()}
    assert scores["teacher"] > 0.3 and scores["student"] > 0.2, f"chance is 0.125: {scores}"
    assert results["models"]["student"]["speedup"] > 1.5


def _check_curves(run: Path, candidates: list[optuna.trial.FrozenTrial]) -> None:
    """What TensorBoard is shown of a search of two epochs: its progress, and every trial's."""

    def events(folder: Path) -> EventAccumulator:
        assert len(list(folder.glob("events.out.tfevents.*"))) == 1
        return EventAccumulator(str(folder)).Reload()

    progress = events(run / "search")
    best = [event.value for event in progress.Scalars("search/best_reward")]
    assert [event.step for event in progress.Scalars("search/reward")] == [1, 2, 3, 4]
    assert best == sorted(best)
    assert best[-1] == pytest.approx(max(trial.value for trial in candidates))
    assert [event.value for event in progress.Scalars("search/exploration_ratio")] == [1, 0, 0, 0]
    assert progress.Images("search/pareto")
    for trial in candidates:
        shown = events(run / f"trial_{trial.number:04d}")
        depth = trial.user_attrs["arch"]["num_hidden_layers"]
        summary = shown.Tensors("student/text_summary")[0].tensor_proto.string_val[0].decode()
        assert f"| num_hidden_layers | 4 | {depth} |" in summary
        wanted = (
            "train/loss train/learning_rate train/grad_norm train/tokens_per_second val/loss "
            "val/contextual_share teacher_layer_3/r2 hp/reward hp/loss hp/latency_ms"
        )
        assert set(wanted.split()) <= set(shown.Tags()["scalars"])
        steps = [event.step for event in shown.Scalars("train/loss")]
        for name in ("learning_rate", "grad_norm", "tokens_per_second"):
            found = shown.Scalars(f"train/{name}")
            assert [event.step for event in found] == steps
            assert all(event.value > 0 for event in found)


def test_a_search_with_the_controller_shows_its_episodes_and_its_curves(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler = {
        "class_path": "kdnas.nas.sampler.LSTMSampler",
        "init_args": {"num_candidates": 2, "num_episodes": 2},
    }
    search = of_search(command, f"--sampler={json.dumps(sampler)}", "--search.n_trials=4")
    run = tmp_path / "logs" / "tiny"
    assert main(search) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for episode in (1, 2):
        told = rf"episode {episode}: best so far [^;]*; best of this episode [^;]*"
        assert re.search(told, shown), shown
    assert shown.count("best of the one before") == 1 and "Pareto fronts" in shown
    study = optuna.load_study(storage=f"sqlite:///{run}/study.db", study_name="tiny")
    assert len(trained(study)) == 4
    assert len(pd.read_csv(run / "trials.csv")) == len(study.trials)
    _check_curves(run, trained(study))
    assert main(search) == 0
    assert "4 candidates are done" in capsys.readouterr().out


def of_original(command: list[str]) -> list[str]:
    """configs/original.yaml, with the teacher, the rows and the small sizes of a command."""
    sampler = {
        "class_path": "kdnas.nas.sampler.OriginalLSTMSampler",
        "init_args": {"num_candidates": 2, "num_episodes": 2},
    }
    options = {
        "config": "configs/original.yaml",
        "sampler": json.dumps(sampler),
        "search.n_trials": 4,
        "search.num_epochs": 1,
        "full_kd.num_epochs": 1,
    }
    kept = [one for one in command if not one.startswith(("--config", "--search", "--full_kd"))]
    return [kept[0], *(f"--{name}={value}" for name, value in options.items()), *kept[1:]]


def test_the_original_whole(command: list[str], tmp_path: Path) -> None:
    assert main(of_original(command)) == 0
    run = tmp_path / "logs" / "tiny"
    for name in ("report.html", "student/model.onnx", "glue/results.json", "full_kd/encoder"):
        assert (run / name).exists(), name
    assert "Model ranking" in (run / "report.html").read_text()
    found = trained(optuna.load_study(storage=f"sqlite:///{run}/study.db", study_name="tiny"))
    for trial in found:
        attrs = trial.user_attrs
        latencies = attrs["latency_ms"], attrs["teacher_latency_ms"]
        expected = reward(attrs["train_loss"], *latencies, -0.06, 0.6**6)
        assert trial.value == pytest.approx(expected)
    assert ["predicted_reward" in trial.user_attrs for trial in found] == [False] * 2 + [True] * 2
    # The study may be made again from the results, so they hold it too.
    results = [run / f"trial_{trial.number:04d}" / "result.json" for trial in found[2:]]
    assert all("predicted_reward" in path.read_text() for path in results)
    frame = pd.read_csv(run / "trials.csv")
    assert frame["episode"].tolist() == [1, 1, 2, 2]
    assert frame["predicted_reward"].notna().tolist() == [False] * 2 + [True] * 2
    # Full KD began anew, with the random start that all have.
    result = json.loads((run / "full_kd" / "result.json").read_text())
    assert result["num_epochs"] == 1


@pytest.mark.slow
def test_the_original_on_the_quickstarts_teacher_and_text(tmp_path: Path) -> None:
    text = build_quickstart_text(tmp_path / "text", rows_per_package=40)
    sampler = {
        "class_path": "kdnas.nas.sampler.OriginalLSTMSampler",
        "init_args": {"num_candidates": 2, "num_episodes": 2},
    }
    options = {
        "config": "configs/original.yaml",
        "root": tmp_path / "logs",
        "text": text,
        "sampler": json.dumps(sampler),
        "search.n_trials": 4,
        "latency.min_seconds": 0.1,
    }
    search = [f"--{name}={value}" for name, value in options.items()]
    assert main(["search", *search]) == 0
    run = tmp_path / "logs" / "original"
    assert pd.read_csv(run / "trials.csv")["episode"].tolist() == [1, 1, 2, 2]
    assert not (run / "full_kd").exists()
    task = [f"--task={text.with_name('which_package')}", "--finetune.num_epochs=1"]
    assert main(["run", *search, *task]) == 0, "it goes on where the search has ended"
    assert [name for name in ARTEFACTS if not (run / name).exists()] == []
    fit = {
        "config": "configs/original_fit.yaml",
        "data.text": text,
        "trainer.max_epochs": 1,
        "trainer.default_root_dir": tmp_path,
    }
    assert main(["fit", *(f"--{name}={value}" for name, value in fit.items())]) == 0
    assert list(tmp_path.glob("lightning_logs/version_0/encoder/model.safetensors"))


def test_a_search_takes_the_yaml_of_a_run_and_stops_after_the_search(
    command: list[str], tmp_path: Path
) -> None:
    search = [one for one in of_original(command) if not one.startswith(("--task", "--finetune"))]
    search = [one for one in search if not one.startswith("--full_kd")]
    assert main(["search", *search[1:], "--name=searched"]) == 0
    run = tmp_path / "logs" / "searched"
    assert (run / "best_student.yaml").exists() and not (run / "full_kd").exists()
    assert yaml.safe_load((run / "config.yaml").read_text()).keys().isdisjoint({"task", "full_kd"})


@pytest.mark.slow
def test_the_teacher_s_states_are_computed_by_the_workers_of_all_gpus(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[int] = []

    def states_job(config: SearchConfig, split: str, share: int, num_shares: int) -> Job:
        shared.append(num_shares)
        return jobs.states_job(config, split, share, num_shares)

    monkeypatch.setattr(pipeline, "num_gpus", lambda accelerator: 3)
    monkeypatch.setattr(pipeline, "states_job", states_job)
    # In this process none is computed.
    monkeypatch.setattr(StateCache, "_compute", lambda *args: pytest.fail("computed here"))
    search = [one for one in of_search(command, "--search.n_trials=1") if "--workers" not in one]
    assert main([*search, "--workers=2"]) == 0
    assert shared == [2, 2] and not list((tmp_path / "logs" / "tiny").glob("states_*"))
    assert list((tmp_path / "states").glob("*/variant*.bin"))


def test_the_originals_recipe_for_one_student(
    tiny_teacher: Path, text_file: Path, tmp_path: Path
) -> None:
    options = {
        "config": "configs/original_fit.yaml",
        "model.teacher": tiny_teacher,
        "model.arch.num_hidden_layers": 2,
        "model.arch.num_attention_heads": 2,
        "model.arch.hidden_size": 32,
        "data.text": text_file,
        "data.max_length": 24,
        "trainer.max_epochs": 1,
        "trainer.default_root_dir": tmp_path,
    }
    assert main(["fit", *(f"--{name}={value}" for name, value in options.items())]) == 0
    assert list(tmp_path.glob("lightning_logs/version_0/encoder/model.safetensors"))


def test_without_full_kd_the_candidates_own_weights_are_fine_tuned_and_exported(
    command: list[str], tmp_path: Path
) -> None:
    (tmp_path / "none.yaml").write_text("full_kd: null\n")
    command = [one for one in command if not one.startswith("--full_kd")]
    assert main([*command, f"--config={tmp_path / 'none.yaml'}"]) == 0
    run = tmp_path / "logs" / "tiny"
    result = json.loads((run / "full_kd" / "result.json").read_text())
    study = optuna.load_study(storage=f"sqlite:///{run}/study.db", study_name="tiny")
    best = study.best_trial
    assert result["num_epochs"] == 0 and result["loss"] == best.user_attrs["loss"]
    kept = load_file(run / f"trial_{best.number:04d}" / "weights.safetensors")
    for name, tensor in load_file(run / "full_kd" / "encoder" / "model.safetensors").items():
        assert torch.equal(tensor, kept[f"student.{name}"])
    assert (run / "student" / "model.onnx").exists() and (run / "report.html").exists()


def test_another_candidate_of_a_finished_search_is_taken_to_the_end(
    finished: list[str], finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = pd.read_csv(finished_run / "trials.csv")
    other = frame[frame["state"] == "COMPLETE"].sort_values("reward").iloc[0]
    before = snapshot(finished_run)
    assert main([*finished, f"--trial={other['number']}"]) == 0
    run = finished_run.with_name(f"tiny-trial-{other['number']}")
    result = json.loads((run / "full_kd" / "result.json").read_text())
    assert result["arch"]["num_hidden_layers"] == other["num_hidden_layers"]
    assert result["arch"]["hidden_size"] == other["hidden_size"]
    assert (run / "student" / "model.onnx").exists() and (run / "report.html").exists()
    assert len(pd.read_csv(finished_run / "trials.csv")) == len(frame)
    assert snapshot(finished_run) == before
    capsys.readouterr()
    assert main([*finished, f"--trial={other['number']}"]) == 0
    assert "is finished; nothing is done again" in capsys.readouterr().out
    assert "--trial NUMBER" in (finished_run / "report.html").read_text()
    assert (run / "trials.csv").exists()
    assert main([*finished, "--trial=99"]) == 2
    assert "trial is 99" in capsys.readouterr().err
    assert main([*finished, "--trial=0", "--seed=1"]) == 2
    assert "seed" in capsys.readouterr().err
    assert main([*finished, "--trial=0", "--force-new"]) == 2
    assert "--trial uses a candidate of a finished search" in capsys.readouterr().err


# What ``$FAULT`` says: students begin as always; the process hangs; it dies, where one layer deep.
STARTS = """
import os
import signal
import time
from pathlib import Path

from kdnas.distillation.start import FromTeacher


class Faulty(FromTeacher):
    def __call__(self, student, teacher, rows):
        fault, is_shallow = os.environ["FAULT"], student.config.num_hidden_layers == 1
        if fault == "hangs" or (fault == "dies" and is_shallow):
            with Path(os.environ["FAULT_LOG"]).open("a") as file:
                print(os.getpid(), file=file)
            if fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return super().__call__(student, teacher, rows)
"""
# Of two students: of one layer, and of two.
TWO_STUDENTS = [
    "--space.num_hidden_layers=[1,2]",
    "--space.num_attention_heads=[2]",
    "--space.hidden_size=[32]",
    "--space.intermediate_size=[64]",
    "--space.hidden_act=[gelu]",
]


@pytest.fixture
def fault_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Takes the number of each process that a fault met; its class is ``faulty_starts.Faulty``."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "faulty_starts.py").write_text(STARTS)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("FAULT_LOG", str(tmp_path / "faults.txt"))
    return tmp_path / "faults.txt"


def test_two_processes_do_every_stage_and_a_candidate_that_kills_its_own_fails_alone(
    command: list[str],
    fault_log: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("FAULT", "dies")
    command += [*TWO_STUDENTS, "--workers=2", "--recipe.start=faulty_starts.Faulty"]
    assert main(command) == 0
    run = tmp_path / "logs" / "tiny"
    assert [name for name in ARTEFACTS if not (run / name).exists()] == []
    assert StudentArch.from_yaml(run / "best_student.yaml").num_hidden_layers == 2
    trials = pd.read_csv(run / "trials.csv").drop_duplicates("num_hidden_layers")
    trials = trials.set_index("num_hidden_layers")
    died = "its process died (SIGKILL, perhaps out of memory)"
    assert trials.reason[1] == f"{died}, twice" and trials.state[2] == "COMPLETE"
    assert len(set(fault_log.read_text().split())) == 2, "it was tried once more, in another"
    assert f"{died}; it is tried again." in caplog.text
    assert "Traceback" not in "".join(capfd.readouterr())
    assert main(["verify", str(run)]) == 0


def test_a_candidate_that_hangs_is_ended_after_its_time(
    command: list[str],
    fault_log: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FAULT", "hangs")
    options = ["--space.num_hidden_layers=[1]", "--recipe.start=faulty_starts.Faulty"]
    options += ["--workers=1", "--candidate_timeout=0.2"]
    assert main(of_search(command, *TWO_STUDENTS, *options)) == 1
    told = "Every candidate failed, the last one with: it took longer than 0.2 minutes."
    assert told in capsys.readouterr().err
    (hung,) = map(int, fault_log.read_text().split())
    assert not is_alive(hung)


@pytest.mark.slow
def test_a_killed_parent_leaves_no_process_and_loses_nothing(
    command: list[str],
    fault_log: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "logs" / "tiny"
    search = of_search(command, *TWO_STUDENTS, "--recipe.start=faulty_starts.Faulty")
    monkeypatch.setenv("FAULT", "none")
    assert main([*search, "--search.n_trials=1"]) == 0
    done = run / "trial_0000" / "result.json"
    known = done.read_bytes()

    paths = os.pathsep.join([str(tmp_path / "modules"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "FAULT": "hangs"}
    parent = subprocess.Popen(
        [sys.executable, "-m", "kdnas", *search, "--workers=2"], env=environment
    )
    deadline = time.monotonic() + 240
    while not fault_log.exists():
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    children = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    assert children and psutil.wait_procs(children, timeout=20)[1] == []

    assert main(search) == 0
    assert done.read_bytes() == known
    trials = pd.read_csv(run / "trials.csv")
    assert (trials.state == "COMPLETE").all() and set(trials.num_hidden_layers) == {1, 2}


COUNTS = """
import lightning.pytorch as pl


class Counts(pl.Callback):
    def __init__(self, path: str, unit: str) -> None:
        self.path, self.unit, self.number = path, unit, 0

    def on_train_epoch_end(self, trainer, pl_module):
        self.number += 1
        with open(self.path, "a") as file:
            print(self.number, self.unit, file=file)
"""


@pytest.mark.parametrize(("workers", "task"), [(0, []), (1, ["--task=null"])])
def test_a_logger_and_a_callback_of_one_s_own_are_made_for_each_fit(
    workers: int,
    task: list[str],
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "counts.py").write_text(COUNTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yaml_file = tmp_path / "mine.yaml"
    counts = {
        "class_path": "counts.Counts",
        "init_args": {"path": "{folder}/count", "unit": "epoch"},
    }
    yaml_file.write_text(yaml.safe_dump({"trainer": {"callbacks": [counts]}}))
    own = [f"--config={yaml_file}", "--trainer.callbacks+=LearningRateMonitor"]
    own += ["--trainer.callbacks+=ModelCheckpoint"]
    own += ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir={folder}"]
    assert main([*command, *own, *task, f"--workers={workers}"]) == 0
    run = tmp_path / "logs" / "tiny"
    fits = {"trial_0000": 1, "trial_0001": 1, "full_kd": 2}
    fits |= {} if task else {"glue/teacher": 2, "glue/random": 2}
    for name, num_epochs in fits.items():
        (metrics,) = (run / name / "lightning_logs").glob("version_0/metrics.csv")
        assert any(column.startswith("lr-") for column in pd.read_csv(metrics).columns)
        told = (run / name / "count").read_text().splitlines()
        assert told == [f"{number + 1} epoch" for number in range(num_epochs)]
        assert len(list((run / name).rglob(f"epoch={num_epochs - 1}-*.ckpt"))) == 1
        assert not list((run / name).glob("events.out.*"))
    trainer = yaml.safe_load((run / "config.yaml").read_text())["trainer"]
    assert trainer["callbacks"][0] == counts
    assert trainer["logger"]["init_args"]["save_dir"] == "{folder}"


KILLS = """
import multiprocessing
import os
import signal

import lightning.pytorch as pl


class Kills(pl.Callback):
    def __init__(self, folder: str, victim: str) -> None:
        self.folder, self.victim = folder, victim

    def on_train_epoch_start(self, trainer, pl_module):
        epochs = f"{self.folder}/epochs-{trainer.global_rank}"
        with open(epochs, "a") as file:
            print(trainer.current_epoch, os.getpid(), file=file)
        if trainer.current_epoch == 1 and trainer.global_rank == 1:
            if len(open(epochs).readlines()) == 2:
                parent = multiprocessing.parent_process()
                os.kill(parent.pid if self.victim == "parent" else os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "victim"), [(0, "rank"), (1, "parent")])
def test_full_kd_on_two_devices_is_that_of_one_though_a_process_is_killed(
    workers: int,
    victim: str,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "kills.py").write_text(KILLS)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = [*command, "--task=null", "--trainer.precision=32-true", "--trainer.accelerator=cpu"]
    # Muon computes in bfloat16, and would blow up what the ranks round otherwise.
    own += [f"--workers={workers}", "--search.n_trials=1", "--recipe.matrix_learning_rate=null"]
    assert main(own) == 0
    assert main([*own, "--trainer.devices=2"]) == 0, "devices may change; it is finished"
    kills = ["--trainer.callbacks+=kills.Kills", f"--trainer.callbacks.victim={victim}"]
    kills += ["--trainer.callbacks.folder={folder}", "--trainer.devices=2"]
    assert main([*own, "--name=two", *kills]) == 0
    assert "full KD: its process died (SIGKILL" in caplog.text

    folders = [tmp_path / "logs" / name / "full_kd" for name in ("tiny", "two")]
    for rank in range(2):
        lines = (folders[1] / f"epochs-{rank}").read_text().splitlines()
        epochs, pids = zip(*(map(int, line.split()) for line in lines), strict=True)
        assert epochs == (0, 1, 1), "it goes on in the epoch in which it was killed"
        assert len(set(pids)) == 2 and not any(map(is_alive, pids))
    one, two = (json.loads((folder / "result.json").read_text()) for folder in folders)
    for ours, theirs in zip(one["history"], two["history"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    weights = [load_file(folder / "encoder" / "model.safetensors") for folder in folders]
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().max() < 1e-3, name
