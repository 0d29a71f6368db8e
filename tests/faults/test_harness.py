import json
import os
import subprocess
import time
from datetime import datetime, timedelta
from types import SimpleNamespace

import pytest
from optuna.exceptions import StorageInternalError
from torch.utils.tensorboard import SummaryWriter

import tests.faults.__main__ as faults
from tests.faults import checks as faults_checks


@pytest.fixture
def bench(tmp_path):
    return faults.Bench(tmp_path, quick=True, seed=0)


def test_each_fault_of_the_plan_can_be_asked_for_by_its_own_id():
    plan = {f"F{number:02d}" for number in range(1, 36)}
    assert plan <= faults.FAULTS.keys()
    assert len(faults.FAULTS) == 38


def test_a_trial_that_was_told_and_is_not_stored_is_lost(bench, monkeypatch):
    monkeypatch.setattr(bench, "story", lambda name: [])
    monkeypatch.setattr(type(bench), "reference", "reference")
    folder = bench.logs / "mine"
    folder.mkdir(parents=True)
    (bench.told / "mine").write_text(
        "trial   3  2 layers x 32 wide: loss 0.497, 1.0x, reward 0.5030, 10 s\n"
    )
    (folder / ".weights.partial").touch()
    bench.check(row := faults.Row("F00", ""), "mine", {1: (0.5, {}, None)})
    assert (row.lost, row.zombies, row.undetected) == (2, 1, 1)  # the last is the manifest
    assert (row.duplicated, row.unequal) == (bench.num_trials, 0)
    assert not (folder / ".weights.partial").exists()


def test_what_is_written_outside_is_seen(bench, monkeypatch):
    monkeypatch.setattr(faults_checks, "kdnas", lambda args: (bench.home / "stray").touch() or 2)
    bench.refuse(row := faults.Row("F00", ""), "", ["search"], "")
    assert row.undetected == 2 and "stray" in row.notes[-1]


def test_a_study_that_cannot_be_read_is_not_one_without_trials(bench):
    bench.run("mine").mkdir(parents=True)
    assert bench.trials("mine") == []
    (database := bench.run("mine") / "study.db").touch()
    assert bench.trials("mine") == []  # it has no tables
    database.write_bytes(b"no database" * 99)
    with pytest.raises(StorageInternalError):
        bench.trials("mine")


def test_a_control_that_is_refused_is_seen(bench, monkeypatch):
    monkeypatch.setattr(faults_checks, "kdnas", lambda args: 2)
    bench.allow(row := faults.Row("F00", ""), "", ["search"])
    assert row.undetected == 1


def test_a_wait_is_what_a_trial_takes_beside_its_training():
    begin = datetime(2026, 1, 1)

    def trial(pid, end, **attrs):
        return SimpleNamespace(
            user_attrs={"pid": pid, **attrs}, datetime_complete=begin + timedelta(seconds=end)
        )

    trials = [
        trial(1, -5),
        trial(1, 3, seconds=2.5),
        trial(2, 90),
        trial(1, 10, seconds=1.0),
        trial(1, 40, not_needed=True),
    ]
    assert faults.longest_wait(trials, {1}, begin) == 6


def test_what_a_worker_tells_of_a_disk_that_failed_is_no_defect_and_all_else_is():
    frame = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    f()\n'
    cause = f"{frame}psycopg.OperationalError: connection failed\n  and more\n\nThe above exception was the cause:\n\n"
    log = f"trial 1\n{cause}{frame}kdnas.system.errors.StoreAway: the database is away\n"
    log += f"{frame}PermissionError: [Errno 13] denied\n{frame}ValueError: a defect\n"
    defect = "ValueError: a defect"
    assert faults_checks.raised(log, failing=True) == [defect]
    told = [
        "kdnas.system.errors.StoreAway: the database is away",
        "PermissionError: [Errno 13] denied",
    ]
    assert faults_checks.raised(log) == [*told, defect]  # where nothing was made to fail


def test_trials_of_which_nothing_was_told_are_seen(bench, monkeypatch):
    monkeypatch.setattr(bench, "acknowledged", lambda name: {0: (0.5, {}, None)})
    bench.tell(["search", "--name=mine"]).close()
    bench.check_stopped(row := faults.Row("F00", ""), "mine", {})
    assert row.undetected == 1 and "none was told" in row.notes[0]
    with bench.tell(["search", "--name=mine"]) as told:
        told.write("trial   0  2 layers x 32 wide: loss 0.497, 1.0x, reward 0.5000, 10 s\n")
    bench.check_stopped(row := faults.Row("F00", ""), "mine", {})
    assert not row.is_bad()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a\0b", "", "x" * 300])
def test_what_a_run_of_no_plain_name_tells_is_kept_in_its_place(bench, name):
    bench.tell(["search", f"--name={name}"]).close()
    assert [path.name for path in bench.told.iterdir()] == ["others"]


@pytest.mark.parametrize(
    ("error", "tried", "is_bad"),
    [
        (subprocess.CalledProcessError(1, ["umount"]), 1, True),
        (subprocess.CalledProcessError(1, ["umount"]), 0, True),
        (faults.NotRun("no root"), 1, True),
        (faults.NotRun("no root"), 0, False),
    ],
)
def test_a_row_that_breaks_off_is_bad_and_one_that_cannot_begin_is_told(
    error, tried, is_bad, tmp_path, monkeypatch
):
    def broken(bench: faults.Bench, row: faults.Row) -> None:
        row.tried = tried
        raise error

    monkeypatch.setattr(faults, "FAULTS", {"F99": ("broken", True, broken)})
    monkeypatch.setattr(faults.logging, "disable", lambda level: None)  # for the tests that follow
    assert faults.main(["--only=F99", f"--json={tmp_path / 'a.json'}"]) == is_bad
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row["undetected"] == is_bad and bool(row["not_run"]) == isinstance(error, faults.NotRun)


def test_growth_is_from_the_early_rounds_to_the_late_and_within_the_life_of_a_parent():
    memory, lives = [9, 10, 12, 5, 5, 14, 20, 30], [0, 0, 0, 0, 1, 1, 1, 2]
    rounds = [
        {"life": life, "finished": 3, "megabytes": megabytes, "parent_megabytes": megabytes}
        for life, megabytes in zip(lives, memory, strict=True)
    ]
    assert faults.growth(rounds) == {"megabytes": 25 - 9.5, "parent_megabytes": 15}
    assert faults.growth(rounds[:1]) == {"megabytes": 0, "parent_megabytes": 0}


def test_what_a_search_holds_is_that_of_all_its_processes_and_all_that_it_writes(bench):
    run = bench.run("mine")
    for name in ("trial_0000", "search"):
        (run / name).mkdir(parents=True)
    writes = {
        run / "study.db": 1,
        run / "trial_0000" / "a": 2,
        run / "search" / "b": 3,
        bench.temporary / "c": 4,
    }
    for path, kilobytes in writes.items():
        path.write_bytes(bytes(1000 * kilobytes))
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    process = bench.start_program(
        ["-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"],
        stdin=subprocess.PIPE,
    )
    end = time.monotonic() + 60
    while (held := faults.usage(bench, "mine", process.pid))[
        "processes"
    ] < 3 and time.monotonic() < end:
        time.sleep(0.1)
    process.communicate("\n")
    assert held["processes"] == 3 and held["files"] > held["parent_files"] > 0
    assert held["megabytes"] > held["parent_megabytes"] > 0
    kinds = ("database", "trials", "other", "temporary", "states", "tokens", "home")
    assert [held[f"{kind}_kb"] for kind in kinds] == [1, 2, 3, 4, 0, 0, 0]


def test_the_steps_of_a_fit_are_those_that_tensorboard_was_told(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(7):
            writer.add_scalar("train/loss", 0.5, step)
        writer.add_scalar("val/loss", 0.5, 9)
    assert faults.steps_told(tmp_path) == 7


def test_a_fit_that_begins_before_its_checkpoint_and_a_result_that_is_written_again_are_repeated(
    tmp_path,
):
    def told(first, last):
        with SummaryWriter(str(tmp_path), filename_suffix=f".{first}") as writer:
            for step in range(first, last):
                writer.add_scalar("train/loss", 0.5, step)

    told(0, 7)
    (result := tmp_path / "result.json").touch()
    done = {result: result.stat().st_mtime_ns}
    told(5, 10)
    begun = {tmp_path: (5, 7)}
    assert faults.repeated_units(done, begun, num_epochs=2) == []
    assert faults.repeated_units(done, {tmp_path: (6, 7)}, num_epochs=2) == [tmp_path]
    assert faults.repeated_units(done, {tmp_path: (1, 7)}, num_epochs=2) == [tmp_path]
    os.utime(result, (0, 0))
    assert faults.repeated_units(done, begun, num_epochs=2) == [result]


def test_faults_are_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(faults.logging, "disable", lambda level: None)  # for the tests that follow
    faults.main(["--quick", "--only=F18,F19", f"--json={tmp_path / 'a.json'}"])
    rows = {row["id"]: row for row in json.loads((tmp_path / "a.json").read_text())["rows"]}
    assert set(rows) == {"F18", "F19"}
    assert (rows["F18"]["tried"], rows["F19"]["tried"]) == (13, 12)
    figures = ("lost", "duplicated", "executed", "undetected", "zombies", "unequal")
    assert [rows[name][figure] for name in ("F18", "F19") for figure in figures] == 12 * [0]
    assert "%2e%2e" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        faults.main(["--only=F99"])
    assert "no such fault: F99" in capsys.readouterr().err


def test_a_fault_that_goes_unnoticed_is_counted(tmp_path, monkeypatch):
    bench, row = faults.Bench(tmp_path, quick=True, seed=0), faults.Row("F00", "")
    monkeypatch.setattr(faults_checks, "kdnas", lambda args: bench.canary.touch() or 0)
    bench.refuse(row, "nothing said", ["search"], "")
    assert (row.tried, row.executed) == (1, 1) and row.undetected == 2 and row.is_bad()


def test_at_least_ten_faults_are_quick():
    assert sum(quick for _, quick, _ in faults.FAULTS.values()) >= 10
    assert len(faults.FAULTS) == 38
