import json
import subprocess
import time

import optuna
import pytest
from torch.utils.tensorboard import SummaryWriter

import tests.faults.__main__ as faults
from tests.faults import checks, harness, soak


@pytest.fixture
def bench(tmp_path):
    return faults.Bench(tmp_path, quick=True, seed=0)


@pytest.fixture
def row():
    return faults.Row("F00", "")


def write_result(bench, number, **values):
    folder = bench.run("mine") / f"trial_{number:04d}"
    folder.mkdir(parents=True)
    result = {
        "params": {"size": number},
        "state": "COMPLETE",
        "value": 0.5,
        "attrs": {},
        "ended": 1,
    }
    (folder / "result.json").write_text(json.dumps(result | values))
    with bench.output(["search", "--name=mine"]) as output:
        output.write(f"trial {number:3d}  2 x 32: loss 0.497, 1.0x, reward 0.5000, 10 s\n")


def write_study(bench, values):
    url = f"sqlite:///{bench.run('mine')}/study.db"
    study = optuna.create_study(storage=url, study_name="mine")
    size = optuna.distributions.IntDistribution(0, 9)
    for number, value in enumerate(values):
        trial = optuna.create_trial
        study.add_trial(trial(params={"size": number}, distributions={"size": size}, value=value))


def test_each_promise_has_a_row():
    # F10 was the journal's, of which there is none; F01 and the soak do what F35 did; F31 was of heartbeats.
    assert faults.FAULTS.keys() == {f"F{n:02d}" for n in range(1, 39)} - {"F31", "F35"}
    assert sum(known.is_quick for known in faults.FAULTS.values()) >= 10


def test_a_result_that_is_lost_altered_or_made_again_is_seen(bench, row):
    write_result(bench, 0)
    write_result(bench, 1, value=0.4)
    write_result(bench, 2, ended=9)
    known = {
        n: {"params": {"size": n}, "state": "COMPLETE", "value": 0.5, "ended": 1} for n in range(4)
    }
    bench.check_stopped(row, "mine", known)
    # Trials 1 and 3 are not as they were; of 1, another reward was told.
    assert (row.lost, row.duplicated, row.undetected) == (3, 1, 0)


def test_a_result_that_the_study_does_not_hold_is_seen(bench, row):
    write_result(bench, 0)
    write_result(bench, 1)
    write_study(bench, [0.5, 0.5])
    bench.check_stopped(row, "mine", {})
    assert not row.is_bad()
    write_result(bench, 2)
    (bench.run("mine") / "study.db").unlink()
    write_study(bench, [0.5, 0.4, 0.5, 0.5])
    bench.check_stopped(row, "mine", {})
    assert row.lost == 2 and "[1, 3]" in row.notes[0]


def test_a_search_that_is_not_at_its_end_is_seen(bench, row, monkeypatch):
    monkeypatch.setattr(type(bench), "reference", "mine")
    write_result(bench, 0)
    write_result(bench, 1, params={"size": 0})
    write_study(bench, [0.5, 0.4])
    (bench.run("mine") / ".weights.partial").touch()
    bench.check(row, "mine", {})
    assert (row.duplicated, row.lost) == (bench.num_trials - 2 + 1, 1)
    assert (row.undetected, row.zombies) == (1, 1)  # no manifest, and half a file
    assert not (bench.run("mine") / ".weights.partial").exists()


def test_trials_of_which_nothing_was_told_are_seen(bench, row):
    write_result(bench, 0)
    (bench.told / "mine").unlink()
    bench.check_stopped(row, "mine", {})
    assert row.undetected == 1 and "none told" in row.notes[0]


def test_what_is_written_outside_or_executed_is_seen(bench, row, monkeypatch):
    monkeypatch.setattr(harness, "kdnas", lambda args: (bench.home / "stray").touch() or 2)
    bench.refuse(row, "", ["search"], "")
    assert row.undetected == 2 and "stray" in row.notes[-1]
    monkeypatch.setattr(harness, "kdnas", lambda args: bench.canary.touch() or 0)
    bench.refuse(row, "nothing said", ["search"], "")
    assert (row.tried, row.executed) == (2, 1) and row.is_bad()


def test_a_control_that_is_refused_is_seen(bench, row, monkeypatch):
    monkeypatch.setattr(harness, "kdnas", lambda args: 2)
    bench.succeed(row, "", ["search"])
    assert row.undetected == 1


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a\0b", "", "x" * 300])
def test_what_a_run_of_no_plain_name_prints_is_kept_in_its_place(bench, name):
    bench.output(["search", f"--name={name}"]).close()
    assert [path.name for path in bench.told.iterdir()] == ["others"]


@pytest.mark.parametrize(
    ("error", "tried", "is_bad"),
    [
        (subprocess.CalledProcessError(1, ["umount"]), 0, True),
        (faults.NotRun("no root"), 1, True),
        (faults.NotRun("no root"), 0, False),
    ],
)
def test_a_row_that_breaks_off_is_bad_and_one_that_cannot_begin_is_told(
    error, tried, is_bad, tmp_path, monkeypatch
):
    def broken(bench, row):
        row.tried = tried
        raise error

    monkeypatch.setitem(faults.FAULTS, "F99", harness.Fault("broken", broken, True))
    monkeypatch.setattr(faults.logging, "disable", lambda level: None)  # for the tests that follow
    assert faults.main(["--only=F99", f"--json={tmp_path / 'a.json'}"]) == is_bad
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row["undetected"] == is_bad and bool(row["not_run"]) == isinstance(error, faults.NotRun)


def test_rows_are_written_down(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(faults.logging, "disable", lambda level: None)  # for the tests that follow
    assert faults.main(["--only=F18,F19", f"--json={tmp_path / 'a.json'}"]) == 0
    rows = {row["id"]: row for row in json.loads((tmp_path / "a.json").read_text())["rows"]}
    assert {name: row["tried"] for name, row in rows.items()} == {"F18": 13, "F19": 12}
    with pytest.raises(SystemExit):
        faults.main(["--only=F99"])
    assert "no such fault: F99" in capsys.readouterr().err


def test_the_process_at_work_is_the_one_that_writes_a_jobs_log(bench, tmp_path):
    with (tmp_path / "job.log").open("w") as log:
        child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'], stdout={log.fileno()})"
        process = bench.start([], ["-c", child], stdin=subprocess.PIPE, pass_fds=[log.fileno()])
    end = time.monotonic() + 60
    while not (found := checks.at_work(process)) and time.monotonic() < end:
        time.sleep(0.1)
    held = soak.usage(bench, "mine", process.pid)
    process.communicate("\n")
    assert list(found.values()) == [tmp_path] and process.pid not in found
    assert held["processes"] == 2 and held["megabytes"] > 0 and held["files"] > 0


def test_growth_is_from_the_early_rounds_to_the_late():
    rounds = [dict.fromkeys(soak.ALLOWED, size) for size in (9, 10, 12, 5, 5, 14, 20, 30)]
    assert set(soak.growth(rounds).values()) == {25 - 9.5}
    assert set(soak.growth(rounds[:1]).values()) == {0}


def test_the_steps_of_a_fit_are_those_that_tensorboard_was_told(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(7):
            writer.add_scalar("train/loss", 0.5, step)
        writer.add_scalar("val/loss", 0.5, 9)
    assert checks.steps_told(tmp_path) == 7
