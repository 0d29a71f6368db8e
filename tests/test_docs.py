"""What the docs tell readers to write does what they say."""

import re
import sys
from pathlib import Path

import pytest
import yaml

from kdnas.cli import main

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", (ROOT / "docs" / page).read_text(encoding="utf-8"))


@pytest.fixture
def my_kd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's ``my_kd.py`` and ``my_kd.yaml``."""
    code, (config,) = blocks("extend.md", "python"), blocks("extend.md", "yaml")
    assert len(code) == 5
    (tmp_path / "my_kd.py").write_text("\n\n".join(code))
    (tmp_path / "my_kd.yaml").write_text(config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_kd", None)


def test_own_mapping_objective_start_and_callback_train(
    my_kd: Path, tiny_teacher: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--model.teacher={tiny_teacher}", f"--data.text={text_file}", "--trainer.max_epochs=2"]
    options += ["--model.arch.num_hidden_layers=2", "--model.arch.num_attention_heads=2", "--model.arch.hidden_size=32"]
    options += [
        "--model.arch.intermediate_size=64",
        "--data.settings.max_length=24",
        "--data.settings.batch_tokens=256",
    ]
    options += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main(["fit", "--config", str(ROOT / "configs" / "fit.yaml"), "--config", "my_kd.yaml", *options]) == 0
    shares = re.findall(r"contextual share (-?[\d.]+)", capsys.readouterr().out)
    assert len(shares) == 2
    saved = yaml.safe_load(next(my_kd.rglob("config.yaml")).read_text())
    objective = saved["model"]["recipe"]["objective"]["init_args"]["objectives"]
    assert [part["class_path"].rpartition(".")[2] for part in objective] == ["HiddenStates", "Direction"]


def test_own_sampler_and_start_are_searched_with(my_kd: Path, tiny_teacher: Path, text_file: Path) -> None:
    options = [f"--teacher={tiny_teacher}", f"--text={text_file}", "--data.max_length=24", "--data.batch_tokens=256"]
    options += ["--latency.length=16", "--latency.min_seconds=0.01", "--search.n_trials=2", "--search.num_epochs=1"]
    options += ["--recipe.start=my_kd.Quiet", "--sampler=my_kd.ShallowFirst"]
    assert main(["search", *options]) == 0
    rows = (my_kd / "lightning_logs/kdnas/trials.csv").read_text().splitlines()
    depth = rows[0].split(",").index("num_hidden_layers")
    assert [int(row.split(",")[depth]) for row in rows[1:3]][0] == 1
