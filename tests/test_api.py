"""From teacher to student in a script."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from kdnas import api
from kdnas.data.datamodule import DataSettings
from kdnas.deploy.latency import LatencySettings
from kdnas.distillation.module import Recipe
from kdnas.distillation.objectives import HiddenStates
from kdnas.distillation.teacher_states import StatesSettings
from kdnas.models.arch import StudentArch
from kdnas.system.errors import UserError
from kdnas.system.files import Run, this_host
from kdnas.training import trainer as training
from kdnas.training.trainer import TrainerSettings
from tests.conftest import write_table

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
    assert isinstance(found["arch"], StudentArch)
    assert StudentArch.from_yaml(Path("lightning_logs/kdnas/best_student.yaml")) == found["arch"]
    assert AutoModel.from_pretrained("my_student").config.hidden_size == found["arch"].hidden_size
    assert len(AutoTokenizer.from_pretrained(tiny_teacher)) == found["student"].config.vocab_size
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
    assert (
        student.config._attn_implementation == "sdpa" and not student.training
    )  # it learned with another one
    whole = student.state_dict()

    keep = training.KeepLast.on_train_epoch_end

    def stop(self, trainer, pl_module):
        keep(self, trainer, pl_module)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.KeepLast, "on_train_epoch_end", stop)
        api.distill(str(tiny_teacher), str(text_file), arch, name="stopped", **options)
    last = tmp_path / "stopped" / "last.ckpt"
    other = options | {
        "name": "stopped",
        "recipe": replace(recipe, learning_rate=1e-2),
        "num_epochs": 3,
    }
    with pytest.raises(UserError) as refused:
        api.distill(str(tiny_teacher), str(text_file), arch, **other)
    for changed, told in (
        (
            {"trainer": TrainerSettings(gradient_clip_val=0.5)},
            "gradient_clip_val: 1.0 there, 0.5 now",
        ),
        ({"states": replace(states, precision="int8")}, "states: 'float16' there, 'int8' now"),
        (
            {"recipe": Recipe(objective=OfASet())},
            r"{7} (builtins.set) cannot be written as YAML: keep numbers, text",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            api.distill(
                str(tiny_teacher), str(text_file), arch, name="stopped", **options | changed
            )
    with (
        Run(tmp_path, "stopped").alone("wait"),
        pytest.raises(
            UserError, match="'stopped' is being made by process [0-9]+ of .*: wait for it, or"
        ),
    ):
        api.distill(str(tiny_teacher), str(text_file), arch, name="stopped", **options)
    told = "num_epochs: 2 there, 3 now; recipe.learning_rate: 0.0015 there, 0.01 now"
    assert f"{str(last)!r} is of a distillation with other settings ({told}): go back" in str(
        refused.value
    )
    made_with = json.loads(last.with_name("made_with.json").read_text())
    for name in ("gradient_clip_val", "states"):  # which an earlier version did not write down
        del made_with[name]
    last.with_name("made_with.json").write_text(json.dumps(made_with))
    half = last.with_name(f".last.ckpt.{this_host()}-{2**22 + 1}.abcdefgh")  # as a kill leaves it
    half.touch()
    found = api.distill(
        str(tiny_teacher), str(text_file), arch, name="stopped", **options
    ).state_dict()
    assert not half.exists()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_the_folder_of_a_run_takes_no_distillation(
    tiny_teacher: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("teacher: t\n")
    with pytest.raises(
        UserError, match="mine' is the folder of a search or a comparison: give another name"
    ):
        api.distill(
            str(tiny_teacher),
            str(text_file),
            StudentArch(1, 2, 64, 64),
            name="mine",
            root=str(tmp_path),
        )


def test_importing_kdnas_imports_nothing_heavy() -> None:
    code = "import sys, types, kdnas; assert 'torch' not in sys.modules; "
    code += "assert all(isinstance(f, types.FunctionType) for f in (kdnas.distill, kdnas.search))"
    subprocess.run([sys.executable, "-c", code], check=True)
