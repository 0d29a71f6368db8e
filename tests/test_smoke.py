"""A run on a few rows, and what it leaves: nothing."""

import re
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import write_task

from kdnas import smoke
from kdnas.cli import main
from kdnas.glue.tasks import load_task


@pytest.fixture
def command(tiny_teacher: Path, text_file: Path, tmp_path: Path) -> list[str]:
    options = {
        "teacher": tiny_teacher,
        "text": text_file,
        "task": write_task(tmp_path / "task", labels=(0, 1, 2), num_rows=90),
        "name": "mine",
        "root": tmp_path / "logs",
        "data.max_length": 24,
        "data.batch_tokens": 256,
        "search.n_trials": 20,
        "search.num_epochs": 9,
        "search.budget.speedup": 1.01,
        "finetune.max_length": 24,
        "latency.length": 16,
    }
    return ["run", *(f"--{name}={value}" for name, value in options.items())]


def test_a_smoke_run_goes_through_every_stage_and_leaves_nothing(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, int] = {}

    def watched(config, console):
        seconds = run_stages(config, console)
        run = Path(config.root, config.name)
        seen["trained"] = (pd.read_csv(run / "trials.csv").state == "COMPLETE").sum()
        seen["rows"] = len(pq.read_table(config.text))
        seen["train"] = len(load_task(config.task).train["label"])
        assert (run / "manifest.json").exists() and (run / "student" / "model.int8.onnx").exists()
        return seconds

    run_stages = smoke.run_stages
    monkeypatch.setattr(smoke, "run_stages", watched)
    before = sorted(tmp_path.rglob("*"))
    assert main([*command, "--smoke", "--storage=postgresql://me:secret@nowhere.invalid/db"]) == 0
    assert seen == {"trained": 2, "rows": 64, "train": 64}
    assert sorted(tmp_path.rglob("*")) == before
    shown = capsys.readouterr().out
    stages = re.findall(r"(?m)^ *(\S.*?\S) +\d+\.\d *$", shown)
    assert stages == ["reading", "search", "full KD", "fine-tuning", "export", "report", "in all"]
    last = shown.splitlines()[-1]
    assert last.startswith("Start the real one with:  kdnas run --teacher=") and "secret" not in last
    assert "--smoke" not in last
