"""From teacher to student in a script."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from kdnas import api
from kdnas.data.datamodule import DataSettings
from kdnas.deploy.latency import LatencySettings
from kdnas.distillation.module import Recipe
from kdnas.distillation.objectives import HiddenStates
from kdnas.distillation.teacher_states import StatesSettings
from kdnas.models.arch import StudentArch
from kdnas.system.errors import UserError
from kdnas.system.files import Run, this_host
from kdnas.training.checkpoints import KeepLast
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
    # It learned with another implementation of attention.
    assert student.config._attn_implementation == "sdpa" and not student.training
    whole = student.state_dict()

    def distill(**changed: object) -> PreTrainedModel:
        asked = options | {"name": "stopped"} | changed
        return api.distill(str(tiny_teacher), str(text_file), arch, **asked)

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
    of_a_set = "{7} (builtins.set) cannot be written as YAML: keep numbers, text"
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
    told = "'stopped' is being made by process [0-9]+ of .*: wait for it, or"
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
