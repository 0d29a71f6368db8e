import sys
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import faults
import faults_checks


@pytest.fixture
def bench(tmp_path):
    return faults.Bench(tmp_path, quick=True, seed=0)


def test_each_fault_of_the_plan_can_be_asked_for_by_its_own_id():
    plan = {f"F{number:02d}" for number in range(1, 36)}
    assert plan <= faults.FAULTS.keys() | faults.NOT_HERE.keys()
    assert len(faults.FAULTS) + len(faults.NOT_HERE) == 38


def test_a_trial_that_was_told_and_is_not_stored_is_lost(bench, monkeypatch):
    monkeypatch.setattr(bench, "story", lambda name: [])
    monkeypatch.setattr(type(bench), "reference", "reference")
    folder = bench.logs / "mine"
    folder.mkdir(parents=True)
    (bench.told / "mine").write_text("trial   3  2 layers x 32 wide: loss 0.497, 1.0x, reward 0.5030, 10 s\n")
    (folder / ".weights.partial").touch()
    bench.check(row := faults.Row("F00", ""), "mine", {1: (0.5, {}, None)})
    assert (row.lost, row.zombies, row.undetected) == (2, 1, 1)  # the last is the manifest
    assert (row.duplicated, row.unequal) == (bench.num_trials, 0)
    assert not (folder / ".weights.partial").exists()


def test_what_is_written_outside_is_seen(bench, monkeypatch):
    monkeypatch.setattr(faults_checks, "kdnas", lambda args: (bench.home / "stray").touch() or 2)
    bench.refuse(row := faults.Row("F00", ""), "", ["search"])
    assert row.undetected == 2 and "stray" in row.notes[-1]


def test_a_wait_is_what_a_trial_takes_beside_its_training():
    begin = datetime(2026, 1, 1)

    def trial(pid, end, **attrs):
        return SimpleNamespace(user_attrs={"pid": pid, **attrs}, datetime_complete=begin + timedelta(seconds=end))

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
    log = f"trial 1\n{cause}{frame}kdnas.nas.storage.StoreAway: the database is away\n"
    log += f"{frame}PermissionError: [Errno 13] denied\n{frame}ValueError: a defect\n"
    assert faults_checks.raised(log) == ["ValueError: a defect"]
