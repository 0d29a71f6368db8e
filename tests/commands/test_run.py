"""The whole job through the command line, on a tiny teacher."""

import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
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
from kdnas.commands import run as pipeline
from kdnas.commands.config import RunConfig, SearchSettings, as_plain
from kdnas.commands.inputs import Job
from kdnas.deploy.onnx import open_session
from kdnas.distillation.module import HiddenStateDistillModule, Recipe
from kdnas.distillation.objectives import HiddenStates
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import find_teacher
from kdnas.models.layers import Even
from kdnas.nas.record import trained
from kdnas.system.errors import CandidateFailed, UserError
from kdnas.system.files import Run, this_host
from kdnas.system.yaml import flat
from kdnas.training.trainer import fit
from tests.conftest import WORDS, make_rows, save_teacher

ARTEFACTS = (
    "config.yaml study.db trials.csv best_student.yaml trial_0000 full_kd/result.json full_kd/encoder "
    "glue/results.json glue/teacher/result.json glue/student/result.json glue/random/result.json student/config.json "
    "student/model.safetensors student/tokenizer.json student/model.onnx report.html manifest.json"
).split()


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Which of three words begins the sentence: a labelled task that is learned in a few steps."""
    folder = tmp_path_factory.mktemp("task") / "first_word"
    folder.mkdir()
    for split, seed, num_rows in (("train", 1, 96), ("validation", 2, 30)):
        rows = make_rows(num_rows, seed, longest=8)
        labels = [i % 3 for i in range(num_rows)]
        sentences = [f"{WORDS[label]} {row}" for label, row in zip(labels, rows, strict=True)]
        pq.write_table(
            pa.table({"sentence": sentences, "label": labels}), folder / f"{split}.parquet"
        )
    return folder


@pytest.fixture(scope="session")
def command_in(
    tiny_teacher: Path, text_file: Path, task_folder: Path
) -> Callable[[Path], list[str]]:
    """``kdnas run`` on the quickstart's YAML, shrunk, in a folder."""
    options = {
        "config": "configs/quickstart.yaml",
        "teacher": tiny_teacher,
        "text": text_file,
        "task": task_folder,
        "name": "tiny",
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
    assert set(results["models"]) == {"teacher", "student", "random"}
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
    assert classifier.config.num_labels == 3
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


def test_without_a_task_the_encoder_is_exported(command: list[str], tmp_path: Path) -> None:
    assert main([*command, "--task=null"]) == 0
    run = tmp_path / "logs" / "tiny"
    assert not run.joinpath("glue").exists()
    assert AutoModel.from_pretrained(
        run / "student", add_pooling_layer=False
    ).config.architectures == ["BertModel"]
    assert run.joinpath("report.html").exists()


def test_after_ctrl_c_in_each_stage_the_same_command_goes_on(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "logs" / "tiny"

    def trials() -> list[tuple[int, float | None, dict[str, object]]]:
        study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{run}/study.db")
        return [(t.number, t.value, t.params) for t in study.trials]

    known: list[tuple[int, float | None, dict[str, object]]] = []
    # What is called last in each stage, in the order of the stages; all that comes before it is done for good.
    for last_call in (
        "StudentArch.to_yaml",
        "write_json",
        "evaluate_glue",
        "measure_latency",
        "export_run",
        "write_report",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"kdnas.commands.run.{last_call}", interrupt)
            assert main(command) == 130
        assert "the same command goes on from here" in capsys.readouterr().err
        assert not (run / "report.html").exists()
        assert trials()[: len(known)] == known
        known = trials()
    assert main(command) == 0
    shown = capsys.readouterr().out
    for done in (
        "Search: 2 candidates are done",
        "Full KD: done",
        "Fine-tuning: done",
        "Export: done",
    ):
        assert done in shown
    assert trials() == known
    assert (run / "report.html").exists()
    assert not list(run.rglob(".*")), "nothing temporary is left"


def interrupt_second_epoch(patch: pytest.MonkeyPatch) -> None:
    """Of full KD: a candidate has one."""
    whole = HiddenStateDistillModule.training_step

    def step(self: HiddenStateDistillModule, batch: object, batch_idx: int) -> torch.Tensor:
        if self.trainer.max_epochs == 2 and self.current_epoch == 1:
            raise KeyboardInterrupt
        return whole(self, batch, batch_idx)  # type: ignore[arg-type]

    patch.setattr(HiddenStateDistillModule, "training_step", step)


def test_full_kd_goes_on_after_the_epoch_that_was_kept(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = HiddenStateDistillModule.training_step
    command.append("--task=null")
    interrupt_second_epoch(monkeypatch)
    assert main(command) == 130
    steps: list[int] = []

    def count(self: HiddenStateDistillModule, batch: object, batch_idx: int) -> torch.Tensor:
        steps.append(self.current_epoch)
        return whole(self, batch, batch_idx)  # type: ignore[arg-type]

    monkeypatch.setattr(HiddenStateDistillModule, "training_step", count)
    monkeypatch.setattr(pipeline, "export_run", interrupt)
    assert main(command) == 130
    assert "going on where it was stopped" in capsys.readouterr().out
    assert set(steps) == {1}, "epoch 0 is not done again"
    result = json.loads((tmp_path / "logs/tiny/full_kd/result.json").read_text())
    assert [row["epoch"] for row in result["history"]] == [0, 1]
    assert not (tmp_path / "logs/tiny/full_kd/last.ckpt").exists()


@pytest.mark.slow
def test_what_was_searched_or_stopped_and_then_reported_is_not_finished(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, root = tmp_path / "logs" / "tiny", f"--root={tmp_path / 'logs'}"
    others = ("--config", "--task", "--full", "--fine")
    search = ["search", *(option for option in command[1:] if not option.startswith(others))]
    command.append("--task=null")
    assert main(search) == 0
    assert main(["verify", str(run)]) == 0
    assert main(["report", root, "--run=tiny"]) == 0
    with monkeypatch.context() as patch:
        interrupt_second_epoch(patch)
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
    command += ["--trainer.accelerator=gpu", "--latency.backend=cuda"]
    with monkeypatch.context() as patch:
        interrupt_second_epoch(patch)
        assert main(command) == 130
    assert main(command) == 0
    assert "Full KD: going on where it was stopped" in capsys.readouterr().out
    run = tmp_path / "logs" / "tiny"
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
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_full_kd", lambda *args: [][0])
        with pytest.raises(IndexError):
            main([*command, "--task=null"])
    (run / "full_kd").mkdir()
    for save, message in (
        (lambda path: torch.save({"state_dict": Payload(mark)}, path), "holds more than tensors"),
        (
            lambda path: path.write_bytes(pickle.dumps({"state_dict": Payload(mark)}, 2)),
            "holds more than tensors",
        ),
        (lambda path: path.write_bytes(b"PK\3\4 cut"), "is damaged"),
        (lambda path: torch.save({"a": 1}, path), "is no checkpoint of a fit"),
        (lambda path: torch.save({"state_dict": {}}, path), "is no checkpoint of a fit"),
        (
            lambda path: torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, path),
            "was written by another version of kdnas",
        ),
    ):
        save(run / "full_kd/last.ckpt")
        assert main([*command, "--task=null"]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error and "full_kd/last.ckpt' " in error and not mark.exists()
    (run / "full_kd/last.ckpt").unlink()
    for weights in run.glob("trial_*/weights.safetensors"):
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    assert main([*command, "--task=null"]) == 2
    assert "weights.safetensors' is damaged (its sha256 was" in capsys.readouterr().err
    for name in ("weights", "optimizer"):  # the weights are whole again
        for path in run.glob(f"trial_*/{name}.safetensors"):
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
    assert main([*command, "--task=null"]) == 2
    assert "optimizer.safetensors' is damaged (its sha256 was" in capsys.readouterr().err
    for path in run.glob("trial_*/optimizer.safetensors"):
        path.unlink()
    monkeypatch.setattr(pipeline, "fit_resumable", interrupt)
    assert main([*command, "--task=null"]) == 130
    told = re.findall(
        "Full KD: beginning without (.*), which is not there", capsys.readouterr().out
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

    def watch(trainer, module, data, **options):
        if getattr(data, "split", None) == "full":
            for kept, tensors in (
                (begins_with, module.state_dict()),
                (moments, module.optimizer_tensors),
            ):
                kept.update({name: tensor.clone() for name, tensor in tensors.items()})
        fit(trainer, module, data, **options)

    monkeypatch.setattr("kdnas.training.trainer.fit", watch)
    monkeypatch.setattr(
        pipeline, "export_run", interrupt
    )  # it takes seconds, and is another's test
    assert main([*command, "--task=null", "--search.n_trials=4", "--full_kd.num_epochs=1"]) == 130
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
    assert "7 relation heads do not divide" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


def test_a_search_can_be_prolonged_and_says_once_that_the_machine_is_busy(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kdnas.deploy.latency.MOST_SPREAD", -1.0)
    search = [
        "search",
        *(
            option
            for option in command[1:]
            if not option.startswith(("--config", "--task", "--full", "--fine"))
        ),
    ]
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
    trials = pd.read_csv(tmp_path / "logs" / "tiny" / "trials.csv")
    assert (trials.state == "COMPLETE").sum() >= 3


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("--seed=1", "seed"),
        ("--search.alpha=-0.1", "search.alpha"),
        ("--data.max_length=20", "data.max_length"),
        ("--states.precision=int8", "states.precision"),
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
    search = [
        "search",
        *(o for o in command[1:] if not o.startswith(("--config", "--task", "--full", "--fine"))),
    ]
    monkeypatch.setenv("KDNAS_CPU_MATMULS", "bfloat16")
    assert main(search) == 0
    monkeypatch.setenv("KDNAS_CPU_MATMULS", "float32")
    assert main([*search, "--search.n_trials=3"]) == 0
    assert "begun with matmuls in bfloat16, not in float32, and goes on so" in caplog.text
    assert os.environ["KDNAS_CPU_MATMULS"] == "float32", "for what else this process does"


def test_other_lengths_in_the_same_file_are_another_study(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lengths = tmp_path / "lengths.jsonl"
    lengths.write_text("7\n12\n")
    monkeypatch.setattr(pipeline, "_search", interrupt)
    own = [*command, f"--latency.lengths={lengths}"]
    assert main(own) == main(own) == 130
    lengths.write_text("7\n16\n")
    capsys.readouterr()
    assert main(own) == 2
    assert "other settings (latency.lengths_sha256: " in capsys.readouterr().err


def test_a_search_that_helps_leaves_the_student_that_another_process_distils(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, run, theirs = (
        pipeline.search_loop,
        tmp_path / "logs" / "tiny",
        StudentArch(1, 1, 16, 16, "relu"),
    )

    def others_are_faster(*args: object) -> object:
        best = loop(*args)
        (run / "full_kd").mkdir()
        theirs.to_yaml(run / "best_student.yaml")
        return best

    monkeypatch.setattr(pipeline, "search_loop", others_are_faster)
    of_run = ("--config", "--task", "--full_kd", "--finetune")
    assert (
        main(["search", *(option for option in command[1:] if not option.startswith(of_run))]) == 0
    )
    assert StudentArch.from_yaml(run / "best_student.yaml") == theirs


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
        f"kdnas: [Errno 5] Input/output error: '{tmp_path / 'logs' / 'tiny'}'"
        in capsys.readouterr().err
    )


def test_a_student_is_fixed_while_the_teacher_s_states_are_stored_and_free_where_they_were_not(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, full_kd = Job.states, tmp_path / "logs" / "tiny" / "full_kd"
    found: list[bool] = []
    ends: list[BaseException] = [KeyboardInterrupt(), UserError("no room")]

    def stop_at_full(job: Job, split: str) -> object:
        if split == "mini":
            return states(job, split)
        found.append(full_kd.is_dir())  # by which a helping search knows
        raise ends.pop(0)

    monkeypatch.setattr(Job, "states", stop_at_full)
    assert main(command) == 130
    assert full_kd.exists(), "a search whose time is over is not begun again"
    assert main(command) == 2
    assert found == [True, True] and not full_kd.exists()
    monkeypatch.undo()
    assert main([*command, "--full_kd.num_epochs=2"]) == 0


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
    monkeypatch.setattr(pipeline, "_full_kd", interrupt)
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
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: object, trial: object, arch: object) -> float:
        raise CandidateFailed("no luck 17")

    monkeypatch.setattr(pipeline.Evaluator, "__call__", fail)
    assert main(command) == 1
    assert "no luck 17" in capsys.readouterr().err.splitlines()[-1]


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
        assert main(command) == 2
        assert snapshot(folder) == before
    assert (
        "'tiny' is being made by process 77 of here, since noon: wait for it"
        in capsys.readouterr().err
    )
    monkeypatch.setattr(pipeline, "_search", interrupt)
    assert main(command) == 130
    assert (folder / "run.lock").read_text().startswith(f"process {os.getpid()} of ")


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
        patch.setattr("kdnas.commands.run.measure_latency", lambda *args: [][0])
        with pytest.raises(IndexError):
            main(own)
    shutil.copy(task / "train.parquet", task / "validation.parquet")
    assert main(own) == 2
    assert "The rows of 'first_word' are not those" in capsys.readouterr().err


def test_what_changes_no_result_may_change_before_its_stage(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_full_kd", interrupt)
        assert main(command) == 130
    changed = [*command, "--states.max_gb=0", "--full_kd.num_epochs=1", "--task=null"]
    assert main(changed) == 0
    saved = yaml.safe_load((tmp_path / "logs/tiny/config.yaml").read_text())
    assert (saved["states"]["max_gb"], saved["full_kd"]["num_epochs"], saved["task"]) == (
        0,
        1,
        None,
    )
    capsys.readouterr()
    assert main([*changed, "--full_kd.num_epochs=2"]) == 2
    assert "full_kd.num_epochs: 1 there, 2 now" in capsys.readouterr().err
    assert main([*changed, "--space.hidden_size=[32]"]) == 2  # another space
    assert re.search(r"space\.hidden_size: .* there, \[32\] now", capsys.readouterr().err)
    (run := tmp_path / "logs/tiny").joinpath("student").rename(
        tmp_path / "student"
    )  # fine-tuning does not end
    (run / "glue").mkdir()
    assert main([*changed, "--finetune.learning_rate=1e-5"]) == 2
    assert (
        f"go back to them, delete '{run}/glue', and fine-tuning begins anew"
        in capsys.readouterr().err
    )
    (run / "glue").rmdir()
    assert main([*changed, "--finetune.learning_rate=1e-5"]) == 0
    search = [
        option
        for option in command
        if not option.startswith(("--config", "--task", "--full", "--fine"))
    ]
    longer = [
        "search",
        *search[1:],
        "--search.n_trials=3",
        "--data.pair_share=0.5",
        "--data.masked_share=0.5",
    ]
    assert main(longer) == 2
    assert "distils its best student already" in capsys.readouterr().err


def test_an_impossible_length_of_the_task_is_refused_at_the_start(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--finetune.max_length=99"]) == 2
    assert "finetune.max_length is 99" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


def test_what_every_worker_refuses_ends_the_search_without_a_best_student(
    command: list[str],
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lose_the_text(*args: object) -> str:
        text.unlink()
        return run_workers(*args)

    text = Path(shutil.copy(text_file, tmp_path))
    search = [
        "search",
        *(o for o in command[1:] if not o.startswith(("--config", "--task", "--full", "--fine"))),
    ]
    search.append(f"--text={text}")
    assert main([*search, "--search.n_trials=1"]) == 0
    run_workers = pipeline.run_workers
    monkeypatch.setattr(pipeline, "run_workers", lose_the_text)
    (tmp_path / "logs/tiny/best_student.yaml").unlink()
    assert main([*search, "--search.n_trials=2", "--candidate_timeout=60"]) == 2
    assert str(text) in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "logs/tiny/best_student.yaml").exists()


@pytest.mark.parametrize("option", ["--workers=2", "--candidate_timeout=5"])
def test_a_gpu_that_a_worker_will_not_see_is_refused_at_the_start(
    option: str,
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "kdnas.deploy.latency._devices", lambda: ["cpu", "cuda", "cuda:0", "cuda:1"]
    )
    assert main([*command, "--latency.device=cuda:1", option]) == 2
    assert (
        "latency.device is 'cuda:1', but a worker process sees one GPU only"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "logs").exists()


def test_sigterm_ends_a_candidate_and_the_same_command_goes_on(
    command: list[str], tmp_path: Path
) -> None:
    search = [
        "search",
        *(o for o in command[1:] if not o.startswith(("--config", "--task", "--full", "--fine"))),
    ]
    endless = [sys.executable, "-m", "kdnas", *search, "--search.num_epochs=100000"]
    worker = subprocess.Popen(endless, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("logs/tiny/trial_0000/events*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    worker.terminate()
    _, error = worker.communicate(timeout=60)
    assert worker.returncode == 143, error
    assert error.splitlines()[-1] == "kdnas: interrupted; the same command goes on from here."
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{tmp_path}/logs/tiny/study.db")
    assert [trial.state.name for trial in study.trials] == ["FAIL", "WAITING"]


@pytest.mark.slow
def test_a_search_measures_by_the_backend_that_is_asked_for(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def watch(path: Path, num_threads: int) -> object:
        opened.append(path.name)
        return open_session(path, num_threads)

    monkeypatch.setattr("kdnas.deploy.latency.open_session", watch)
    search = [
        "search",
        *(o for o in command[1:] if not o.startswith(("--config", "--task", "--full", "--fine"))),
    ]
    assert main([*search, "--latency.backend=onnxruntime-int8", "--search.n_trials=1"]) == 0
    assert opened == ["model.int8.onnx"] * len(opened) and len(opened) >= 2, "student and teacher"
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{tmp_path}/logs/tiny/study.db")
    assert all(trial.user_attrs["latency_ms"] > 0 for trial in trained(study))


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
    """What TensorBoard is shown of a search of two epochs by two workers: its own progress once, and every trial's."""

    def events(folder: Path) -> EventAccumulator:
        assert len(list(folder.glob("events.out.tfevents.*"))) == 1
        return EventAccumulator(str(folder)).Reload()

    progress = events(run / "search")
    best = [event.value for event in progress.Scalars("search/best_reward")]
    assert [event.step for event in progress.Scalars("search/reward")] == [1, 2, 3, 4]
    assert best == sorted(best) and best[-1] == pytest.approx(
        max(trial.value for trial in candidates)
    )
    assert [event.value for event in progress.Scalars("search/exploration_ratio")] == [1, 0, 0, 0]
    assert progress.Images("search/pareto")
    for trial in candidates:
        shown = events(run / f"trial_{trial.number:04d}")
        depth = trial.user_attrs["arch"]["num_hidden_layers"]
        assert (
            f"| num_hidden_layers | 4 | {depth} |"
            in shown.Tensors("student/text_summary")[0].tensor_proto.string_val[0].decode()
        )
        scalars = shown.Tags()["scalars"]
        wanted = "train/loss train/learning_rate train/grad_norm train/tokens_per_second val/loss val/contextual_share "
        wanted += "teacher_layer_3/r2 hp/reward hp/loss hp/latency_ms"
        assert set(wanted.split()) <= set(scalars)
        steps = [event.step for event in shown.Scalars("train/loss")]
        for name in ("learning_rate", "grad_norm", "tokens_per_second"):
            found = shown.Scalars(f"train/{name}")
            assert [event.step for event in found] == steps and all(
                event.value > 0 for event in found
            )


def test_of_episodes_that_end_between_two_looks_each_is_ranked(command, monkeypatch, capsys):
    whole = pipeline.search_loop

    def look_once(evaluate, space, study, n_trials, callbacks, *others):
        best = whole(evaluate, space, study, n_trials, [], *others)
        for trial in study.get_trials():
            for show in callbacks:
                show(study, trial)
        return best

    monkeypatch.setattr(pipeline, "search_loop", look_once)
    options = [
        option
        for option in command[1:]
        if not option.startswith(("--task", "--full_kd", "--finetune", "--config"))
    ]
    sampler = '{"class_path": "kdnas.nas.sampler.LSTMSampler", "init_args": {"num_candidates": 2, "num_episodes": 2}}'
    assert main(["search", *options, f"--sampler={sampler}", "--search.n_trials=4"]) == 0
    assert re.findall(r"episode (\d): best so far", capsys.readouterr().out) == ["1", "2"]


def test_two_workers_search_one_study_with_the_controller(command, tmp_path, capsys, monkeypatch):
    """Through the command line: totals, the episodes' leaders, logs; and run again, nothing is done."""
    options = [
        option
        for option in command[1:]
        if not option.startswith(("--task", "--full_kd", "--finetune", "--config"))
    ]
    sampler = '{"class_path": "kdnas.nas.sampler.LSTMSampler", "init_args": {"num_candidates": 2, "num_episodes": 2}}'
    search = ["search", *options, f"--sampler={sampler}", "--workers=2", "--search.n_trials=4"]
    half = (
        tmp_path
        / "logs"
        / "tiny"
        / "trial_0001"
        / f".student.safetensors.{this_host()}-{2**22 + 1}.abcdefgh"
    )

    def run_and_leave(*args: object) -> str | None:
        refusal = pipeline_run_workers(*args)
        half.touch()  # as a worker that is killed leaves it
        return refusal

    pipeline_run_workers = pipeline.run_workers
    monkeypatch.setattr(pipeline, "run_workers", run_and_leave)
    assert main(search) == 0
    assert not half.exists()
    shown = " ".join(capsys.readouterr().out.split())
    for episode in (1, 2):  # as each ends
        assert re.search(
            rf"episode {episode}: best so far [^;]*; best of this episode [^;]*", shown
        ), shown
    assert shown.count("best of the one before") == 1 and "Pareto fronts" in shown
    run = tmp_path / "logs" / "tiny"
    study = optuna.load_study(storage=f"sqlite:///{run}/study.db", study_name="tiny")
    assert len(trained(study)) == 4
    assert (
        len({trial.user_attrs["pid"] for trial in study.trials if trial.state.is_finished()}) == 2
    )
    assert len(pd.read_csv(run / "trials.csv")) >= 4
    assert all(path.exists() for path in map(Run(run.parent, run.name).worker_log, (0, 1)))
    _check_curves(run, trained(study))
    assert main(search) == 0
    assert "4 candidates are done" in capsys.readouterr().out
