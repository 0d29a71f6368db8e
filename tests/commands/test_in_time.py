"""A run that ends in time: what is lowered, in which order, and that it stays."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from kdnas.cli.main import main
from kdnas.commands import in_time
from kdnas.commands.config import FullKDSettings, RunConfig, SearchSettings
from kdnas.commands.in_time import LEVERS, Choice, cut_to, rough_minutes, value_of
from kdnas.models.arch import StudentArch
from kdnas.nas.budget import Budget
from kdnas.system.files import Run, read_json
from kdnas.tasks.finetune import FinetuneSettings
from tests.commands.test_plan import MEASURED
from tests.conftest import write_task

CONFIG = RunConfig(teacher="", text="", task="stsb")


def value_in(config: RunConfig, name: str) -> Any:
    """A setting as it works, with the usual number of epochs of fine-tuning for null."""
    if name == "finetune.num_epochs":
        return config.finetune.epochs_for(MEASURED.sizes.num_train)
    return value_of(config, name)


def test_more_minutes_never_buy_less_and_the_run_ends_in_time() -> None:
    before = None
    for minutes in (60, 80, 100, 120, 150, 200, 300, 500, 1000, 3000):
        chosen = cut_to(CONFIG, MEASURED, minutes)
        assert MEASURED.plan(chosen).minutes <= minutes
        values = {name: value_in(chosen, name) for name in LEVERS if name != "pruner"}
        assert all(values[name] <= value_in(CONFIG, name) for name in values)
        if before:
            epochs = "finetune.num_epochs"
            assert values[epochs] >= before[epochs]
            if values[epochs] == before[epochs]:
                assert all(values[name] >= before[name] for name in values)
        before = values
    assert chosen == CONFIG


def test_full_kds_epochs_go_first_and_fine_tuning_last() -> None:
    def lowered(minutes: float) -> set[str]:
        return Choice.of(CONFIG, MEASURED, minutes).values.keys()

    as_asked = MEASURED.plan(CONFIG).minutes
    assert lowered(as_asked) == set()
    assert lowered(as_asked - 1) == {"full_kd.num_epochs"}
    assert "finetune.num_epochs" not in lowered(200)
    assert lowered(1) == LEVERS.keys()


def test_candidates_go_before_rows_and_the_shape_by_rule_stays() -> None:
    chosen = [cut_to(CONFIG, MEASURED, minutes) for minutes in range(300, 0, -10)]
    assert {one.search.n_trials for one in chosen if one.data.fraction < 1} == {6}
    within = replace(CONFIG, search=SearchSettings(budget=Budget(speedup=4.0)))
    few, least = (cut_to(within, MEASURED, minutes) for minutes in (120, 1))
    assert (few.search.n_trials, least.search.n_trials) == (6, 1)


def test_of_a_large_text_no_more_is_read_than_students_learn_from() -> None:
    large = replace(
        MEASURED,
        tokens=(190e6, 10e6),
        teacher=MEASURED.teacher._replace(seconds=3.4e5, num_bytes=3e11),
    )
    small, big = (cut_to(CONFIG, measured, 300) for measured in (MEASURED, large))
    assert big.data.fraction == pytest.approx(small.data.fraction / 100, rel=0.3)
    assert big.finetune == small.finetune and big.search == small.search
    stored = [stage.name for stage in large.plan(big).stages]
    assert "teacher, live" not in " ".join(stored)


def test_what_is_not_at_its_default_stays_and_a_run_that_is_too_long_is_told() -> None:
    asked = replace(
        CONFIG,
        search=SearchSettings(n_trials=30),
        full_kd=FullKDSettings(num_epochs=6),
        finetune=FinetuneSettings(num_epochs=5),
    )
    choice = Choice.of(asked, MEASURED, 100)
    chosen = choice.of_config(asked)
    assert (chosen.search, chosen.full_kd, chosen.finetune) == (
        asked.search,
        asked.full_kd,
        asked.finetune,
    )
    assert chosen.data.fraction < 1 and not choice.fits
    assert "not in time" in list(choice.lines())[-1]


def test_a_run_goes_on_with_what_was_chosen_and_with_what_is_asked_for_since(
    tmp_path: Path,
) -> None:
    config = replace(CONFIG, root=str(tmp_path), name="mine")
    choice = Choice.of(config, MEASURED, 120)
    choice.keep(Run(tmp_path, "mine"))
    kept = Choice.kept(config)
    assert kept == choice and kept.of_config(config) == cut_to(config, MEASURED, 120)
    more = replace(config, full_kd=FullKDSettings(num_epochs=3))
    assert kept.of_config(more).full_kd == more.full_kd
    assert kept.of_config(more).data == kept.of_config(config).data


@pytest.fixture
def command(tiny_teacher: Path, text_file: Path, tmp_path: Path) -> list[str]:
    options = {
        "teacher": tiny_teacher,
        "text": text_file,
        "task": write_task(tmp_path / "task"),
        "root": tmp_path / "logs",
        "name": "mine",
        "workers": 0,
        "data.max_length": 24,
        "data.batch_tokens": 256,
        "search.n_trials": 1,
        "search.num_epochs": 1,
        "search.budget.speedup": 0.01,
        "finetune.max_length": 24,
        "latency.length": 16,
        "latency.min_seconds": 0.01,
    }
    return ["run", *(f"--{name}={value}" for name, value in options.items())]


def test_a_run_is_cut_to_an_absurd_budget_says_so_and_goes_on_with_it(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    run = Run(tmp_path / "logs", "mine")
    with monkeypatch.context() as patch:
        patch.setattr("kdnas.commands.run.full_kd_stage", interrupt)
        assert main([*command, "--time-budget=0.01"]) == 130
    shown = capsys.readouterr().out
    for told in (
        "full_kd.num_epochs 1 instead of 4",
        "finetune.num_epochs 1 instead of its default",
        "not in time",
    ):
        assert told in shown
    monkeypatch.setattr(in_time, "choose", interrupt)  # nothing is measured again
    assert main([*command, "--time-budget=0.02"]) == 0
    assert "Lowered when the run was started" in capsys.readouterr().out
    saved = yaml.safe_load(run.config.read_text())
    assert (saved["full_kd"]["num_epochs"], saved["finetune"]["num_epochs"]) == (1, 1)
    assert read_json(run.full_kd / "result.json")["num_epochs"] == 1
    monkeypatch.setattr("kdnas.commands.run.run_stages", interrupt)
    assert main([*command, "--trial=0"]) == 130, "the search's own settings are known"


def test_a_run_that_obviously_fits_is_not_measured(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(config: RunConfig) -> None:
        raise AssertionError

    def stages(config: RunConfig, *others: object) -> dict[str, float]:
        assert config.full_kd.num_epochs == 4 and config.time_budget == 120
        raise KeyboardInterrupt

    monkeypatch.setattr(in_time, "choose", measured)
    monkeypatch.setattr("kdnas.commands.run.run_stages", stages)
    assert main(command) == 130
    assert not (tmp_path / "logs" / "mine").exists()


def test_the_quickstart_obviously_fits_and_a_base_teacher_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(teacher="any", text="any", root=str(tmp_path))
    shape, num_rows = StudentArch(6, 12, 384, 1536), 5_632
    found = Run(tmp_path, "any"), SimpleNamespace(config=None), None, None
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    monkeypatch.setattr(in_time, "validate", lambda config: found)
    monkeypatch.setattr(in_time, "some_rows", lambda *args: ([("x" * 100, None)] * 9, num_rows))
    monkeypatch.setattr(in_time, "arch_of", lambda config: shape)
    quick = SearchSettings(n_trials=6, budget=Budget(speedup=4.0))
    assert rough_minutes(replace(config, search=quick)) < 60
    shape, num_rows = StudentArch(12, 12, 768, 3072), 27_591
    assert rough_minutes(replace(config, search=replace(quick, n_trials=20))) > 240
