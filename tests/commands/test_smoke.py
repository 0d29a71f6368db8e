"""A run on a few rows, and what it leaves: nothing."""

import re
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdnas.cli.main import main
from kdnas.commands import smoke
from kdnas.commands.config import RunConfig
from kdnas.commands.few_rows import Sizes, with_few_rows
from kdnas.data import quickstart
from kdnas.data.corpus import load_corpus
from kdnas.system.errors import UserError
from kdnas.system.files import this_host
from kdnas.tasks.tasks import load_task
from tests.conftest import make_rows, write_task


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
        "workers": 0,
        "search.n_trials": 20,
        "search.num_epochs": 9,
        "search.budget.speedup": 1.01,
        "finetune.max_length": 24,
        "latency.length": 16,
    }
    return ["run", *(f"--{name}={value}" for name, value in options.items())]


def test_a_smoke_run_goes_through_every_stage_and_leaves_nothing(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
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
    assert (
        last.startswith("Start the real run with:  kdnas run --teacher=") and "secret" not in last
    )
    assert "--smoke" not in last


def test_a_smoke_run_that_fails_keeps_what_it_made_and_one_that_is_stopped_does_not(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    killed = tmp_path / f"mine-smoke.{this_host()}-{2**22 + 1}.abcdefgh"
    (killed / "lightning_logs").mkdir(parents=True)
    before = set(tmp_path.iterdir()) - {killed}
    for error, code in ((OSError("the disk is gone"), 3), (KeyboardInterrupt(), 130)):

        def fail(config, console, error=error):
            assert Path(config.text).exists()
            raise error

        monkeypatch.setattr(smoke, "run_stages", fail)
        assert main([*command, "--smoke"]) == code
        shown = capsys.readouterr()
        assert "again to resume" not in shown.err, "it begins anew"
        kept = set(tmp_path.iterdir()) - before
        assert [path.name in shown.out.replace("\n", "") for path in kept] == [True] * (code == 3)
        before |= kept
    assert not killed.exists(), "it is swept; those of a process that lives, as this one, are not"


def few(config: RunConfig, folder: Path, **options: int) -> tuple[RunConfig, Sizes]:
    folder.mkdir()
    return with_few_rows(config, folder, **{"num_rows": 64, **options})


def test_the_few_rows_are_drawn_with_their_splits_and_classes(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    texts = [f"row number {number}" for number in range(1000)]
    split = ["held_out" if number % 10 == 0 else "train" for number in range(1000)]
    pq.write_table(pa.table({"body": [*texts, None, " "], "split": [*split, None, None]}), path)
    names = [f"class {number % 80}" for number in range(160)]
    task = tmp_path / "intents"
    for part in ("train", "validation"):
        task.mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": make_rows(160), "label": names}), task / f"{part}.parquet")
    config = RunConfig(
        teacher="t", text=str(path), task=str(task), storage="postgresql://x", root="real"
    )
    config = RunConfig(**{**vars(config), "data": type(config.data)(column="body")})
    small, sizes = few(config, tmp_path / "few", num_rows=70)
    assert sizes.num_rows == pytest.approx(1000, rel=0.05)
    assert (sizes.num_train, sizes.num_validation) == (160, 160)
    assert (
        small.storage is None
        and small.states.folder is None
        and Path(small.root).parent == tmp_path / "few"
    )
    corpus = load_corpus(small.text)
    numbers = [int(row.split()[-1]) for row in [*corpus.train, *corpus.held_out]]
    assert len(numbers) == 70 and {number // 100 for number in numbers} == set(range(10))
    assert [row for row in corpus.held_out if not row.endswith("0")] == []
    cut = load_task(small.task)
    assert (cut.task.name, cut.task.num_labels, len(cut.train["label"])) == ("intents", 80, 80)
    assert cut.task.label_names == load_task(str(task)).task.label_names


def test_text_of_so_many_bytes_is_taken_and_long_rows_count_as_if_cut(
    tmp_path: Path, text_file: Path
) -> None:
    config = RunConfig(teacher="t", text=str(text_file))
    whole = sum(len(row.encode()) for row in text_file.read_text().splitlines())
    small, _ = few(config, tmp_path / "few", num_rows=1000, num_bytes=whole // 3)
    taken = sum(len(row.encode()) for row in pq.read_table(small.text)["text"].to_pylist())
    assert 0.9 * (whole // 3) < taken <= whole // 3
    long = tmp_path / "long.txt"
    long.write_text("\n".join("word " * 10_000 + str(number) for number in range(20)))
    small, _ = few(
        RunConfig(teacher="t", text=str(long)),
        tmp_path / "long",
        num_rows=1000,
        num_bytes=10 * 4 * 128,
    )
    assert len(pq.read_table(small.text)) == 10


def test_the_quickstarts_text_is_not_made_in_the_real_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(folder: Path) -> Path:
        folder.mkdir(parents=True)
        write_task(folder / "which_package")
        pq.write_table(pa.table({"text": make_rows(99)}), folder / "text.parquet")
        return folder / "text.parquet"

    monkeypatch.setattr(quickstart, "build_quickstart_text", build)
    config = RunConfig(
        teacher="t", text="quickstart", task="quickstart", root=str(tmp_path / "logs")
    )
    small, sizes = few(config, tmp_path / "few")
    assert sizes == Sizes(99, 20, 20) and not (tmp_path / "logs").exists()
    assert load_task(small.task).task.name == "which_package"


def test_rows_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n{"text": " "}\n{"text": null}\n')
    with pytest.raises(
        UserError, match="Only 1 of 3 rows of .* are usable, but 2 are needed: check that 'text'"
    ):
        few(RunConfig(teacher="t", text=str(path)), tmp_path / "few")
