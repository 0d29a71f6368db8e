"""From teacher to student in a script."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import kdnas
from kdnas import api
from kdnas.commands.config import FullKDSettings
from kdnas.data.datamodule import DataSettings
from kdnas.deploy.latency import LatencySettings
from kdnas.distillation.module import Recipe
from kdnas.distillation.objectives import HiddenStates
from kdnas.distillation.teacher_states import StatesSettings
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import num_parameters
from kdnas.system.errors import UserError
from kdnas.system.files import Run, this_host
from kdnas.tasks.finetune import FinetuneSettings
from kdnas.training.checkpoints import KeepLast
from kdnas.training.trainer import TrainerSettings
from tests.conftest import make_rows, write_table

ROOT = Path(__file__).parents[1]


def test_five_lines_from_teacher_to_student(
    tiny_teacher: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bert-base-uncased").symlink_to(tiny_teacher)
    write_table(Path("my.parquet"), text=text_file.read_text().splitlines())
    lines = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    found = {
        "data": DataSettings(max_length=24, batch_tokens=256),
        "latency": LatencySettings(length=16, min_seconds=0.01),
    }
    lines = lines.replace(
        "speedup=6", "speedup=0.01, n_trials=1, num_epochs=1, data=data, latency=latency"
    )
    exec(lines.replace("arch)", "arch, num_epochs=1, data=data)"), found)
    best, student = found["arch"], found["student"]
    assert StudentArch.from_yaml(Path("lightning_logs/kdnas/best_student.yaml")) == best.arch
    (row,) = pd.read_csv(best.folder / "trials.csv").to_dict("records")
    for name in (
        "reward",
        "loss",
        "contextual_share",
        "latency_ms",
        "speedup",
        "num_parameters",
    ):
        assert getattr(best, name) == pytest.approx(row[name])
    assert AutoModel.from_pretrained("my_student").config.hidden_size == best.arch.hidden_size
    assert len(AutoTokenizer.from_pretrained("my_student")) == student.model.config.vocab_size
    assert student.arch == best.arch and student.loss > 0
    assert student.num_parameters == num_parameters(student.model)
    assert not Path("lightning_logs/distill/last.ckpt").exists()
    with pytest.raises(UserError, match="speedup is 0"):
        found["search"]("bert-base-uncased", "my.parquet", speedup=0)


class OfASet(HiddenStates):
    """What nobody can write as YAML."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = {7}


class OfNumbers(HiddenStates):
    """With keys that JSON makes text."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = [{7: 1.0}]


def test_a_stopped_distillation_goes_on(
    tiny_teacher: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch, data = StudentArch(1, 2, 64, 64), DataSettings(max_length=24, batch_tokens=256)
    states, recipe = StatesSettings(str(tmp_path / "states")), Recipe(objective=OfNumbers())
    options = dict(num_epochs=2, data=data, states=states, recipe=recipe, root=str(tmp_path))
    student = api.distill(str(tiny_teacher), str(text_file), arch, **options)
    # It learned with another implementation of attention.
    assert student.model.config._attn_implementation == "sdpa" and not student.model.training
    whole = student.model.state_dict()

    def distill(**changed: object) -> PreTrainedModel:
        asked = options | {"name": "stopped"} | changed
        return api.distill(str(tiny_teacher), str(text_file), arch, **asked).model

    keep = KeepLast.on_train_epoch_end

    def stop(self: KeepLast, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        while not self.reporter.is_asked_to_stop:
            time.sleep(0.01)
        keep(self, trainer, pl_module)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(KeepLast, "on_train_epoch_end", stop)
        distill()
    last = tmp_path / "stopped" / "last.ckpt"
    faster = replace(recipe, learning_rate=1e-2)
    of_a_set = "{7} (builtins.set) cannot be written as YAML: use numbers, text"
    for changed, told in (
        (
            {"recipe": faster, "num_epochs": 3},
            f"The distillation in {str(last)!r} was made with other settings (num_epochs: 2 there, "
            "3 now; recipe.learning_rate: 0.0015 there, 0.01 now): go back to them, or delete",
        ),
        (
            {"trainer": TrainerSettings(gradient_clip_val=0.5)},
            "gradient_clip_val: 1.0 there, 0.5 now",
        ),
        ({"states": replace(states, precision="int8")}, "states: 'float16' there, 'int8' now"),
        ({"recipe": Recipe(objective=OfASet())}, of_a_set),
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            distill(**changed)
    told = "'stopped' is in use by process [0-9]+ of .*: wait for it, or"
    with Run(tmp_path, "stopped").alone("wait"), pytest.raises(UserError, match=told):
        distill()

    half = last.with_name(f".last.ckpt.{this_host()}-{2**22 + 1}.abcdefgh")  # as a kill leaves it
    half.touch()
    found = distill().state_dict()
    assert not half.exists() and not last.exists()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_the_folder_of_a_run_takes_no_distillation(
    tiny_teacher: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("teacher: t\n")
    with pytest.raises(
        UserError, match="mine' was made by a search or a comparison: give another name"
    ):
        api.distill(
            str(tiny_teacher),
            str(text_file),
            StudentArch(1, 2, 64, 64),
            name="mine",
            root=str(tmp_path),
        )


@pytest.fixture
def tiny() -> dict[str, Any]:
    """Settings of a search and of a distillation that takes a second."""
    return {"data": DataSettings(max_length=24, batch_tokens=256), "num_epochs": 1}


@pytest.fixture
def pair(tiny_teacher: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that a script has, and its tokenizer."""
    model = AutoModel.from_pretrained(tiny_teacher)
    return model, AutoTokenizer.from_pretrained(tiny_teacher)


@pytest.fixture
def task() -> DatasetDict:
    """Rows with named classes, and a split without labels."""
    features = Features(sentence=Value("string"), label=ClassLabel(names=["no", "yes"]))
    rows = [
        {"sentence": make_rows(20, seed), "label": [0, 1] * 10 if seed < 2 else [-1] * 20}
        for seed in range(3)
    ]
    splits = [Dataset.from_dict(split, features) for split in rows]
    return DatasetDict(zip(("train", "validation", "test"), splits, strict=True))


def test_the_whole_job_takes_objects_and_is_done_once(
    pair: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    tiny: dict[str, Any],
    task: DatasetDict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(**changed: Any) -> api.RunResult:
        asked = tiny | {
            "task": task,
            "speedup": 0.01,
            "n_trials": 1,
            "full_kd": FullKDSettings(num_epochs=1),
            "finetune": FinetuneSettings(num_epochs=1, max_length=24),
            "latency": LatencySettings(length=16, min_seconds=0.01),
            "root": tmp_path,
        }
        return kdnas.run(pair, make_rows(60), **asked | changed)

    made = run()
    assert "Student:" in capsys.readouterr().out
    assert made.folder == tmp_path / "kdnas" and (made.folder / "report.html").exists()
    assert list(made.table.index) == ["teacher", "student", "random", "static", "layer_cut"]
    assert made.table.share_kept["teacher"] == 1 and made.table.speedup["student"] > 0
    assert made.export.folder == made.folder / "student"
    assert made.export.max_abs_difference <= 1e-4 and 0 < made.export.int8.cosine <= 1.001
    assert list(made.export.latency.batch) == [1, 1, 8] and made.export.sentences is None
    student = AutoModelForSequenceClassification.from_pretrained(made.export.folder)
    assert student.config.id2label == {0: "no", 1: "yes"}
    assert student.config.num_hidden_layers == made.best.arch.num_hidden_layers

    exported = kdnas.export(run="kdnas", root=tmp_path, output=tmp_path / "deployed")
    assert exported.folder == tmp_path / "deployed"
    assert exported.int8.score == pytest.approx(made.table.score["student"])

    inputs = sorted((tmp_path / "inputs").iterdir())
    assert [path.name.rpartition("-")[0] for path in inputs] == ["bert-4x64", "task", "text"]
    pair[1](["a", "the model"], padding=True, truncation=True, max_length=8)
    monkeypatch.setattr("kdnas.commands.run.run_stages", None)  # which is not called again
    again = run()
    assert (again.best, again.loss) == (made.best, made.loss) and again.table.equals(made.table)
    assert sorted((tmp_path / "inputs").iterdir()) == inputs
    (inputs[0] / "config.json").write_text(
        "{}"
    )  # the name of a folder is not trusted, its files are
    assert again.table.equals(run().table) and (inputs[0] / "config.json").stat().st_size > 2
    told = "splits ['train', 'test']: give a DatasetDict with train and validation"
    with pytest.raises(UserError, match=re.escape(told)):
        run(task=DatasetDict(train=task["train"], test=task["test"]))
    with pytest.raises(UserError, match="task is a Dataset with the splits"):
        run(task=task["train"])


def test_students_are_compared_measured_and_exported(
    pair: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    tiny: dict[str, Any],
    task: DatasetDict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    text = Dataset.from_dict({"text": make_rows(60), "number": range(60)})
    student = kdnas.distill(pair, text, StudentArch(1, 2, 32, 64), **tiny)
    compared = kdnas.glue(
        [pair, student],
        task,
        finetune=FinetuneSettings(num_epochs=1, max_length=24),
        latency=LatencySettings(length=16, min_seconds=0.01),
        seeds=2,
    )
    assert [name.rpartition("-")[0] for name in compared.table.model] == ["bert-4x64", "bert-1x32"]
    runs = pd.read_json(compared.folder / "runs.jsonl", lines=True)
    assert list(compared.table.average) == pytest.approx(
        list(runs.groupby("model", sort=False).score.mean())
    )
    name = compared.table.columns[1]
    assert name.startswith("task-") and compared.table[name].equals(compared.table.average)

    measured = kdnas.latency([pair, student], batch=[1, 2], length=[16], min_seconds=0.01)
    assert list(measured.table.batch) == [1, 1, 2, 2] and measured.table.speedup[0] == 1
    assert len(json.loads(measured.json.read_text())["rows"]) == 4

    exported = kdnas.export(student, teacher=pair, text=text, output="deployed")
    assert exported.folder == Path("deployed") and (exported.folder / "predict.py").exists()
    assert exported.int8["rows"] == "4 held-out texts" and exported.max_abs_difference <= 1e-4
    with pytest.raises(
        UserError,
        match="A BertModel without a tokenizer cannot be used: give the pair .model, tokenizer.",
    ):
        kdnas.latency([student.model])
    with pytest.raises(UserError, match="has the int 7 in column 'text', row 2: only text"):
        kdnas.distill(pair, ["a", 7], student.arch, **tiny)


def test_importing_kdnas_imports_nothing_heavy() -> None:
    code = "import sys, types, kdnas; assert 'torch' not in sys.modules; "
    code += "assert all(isinstance(f, types.FunctionType) for f in "
    code += "(kdnas.run, kdnas.search, kdnas.distill, kdnas.glue, kdnas.latency, kdnas.export))"
    subprocess.run([sys.executable, "-c", code], check=True)
