"""The study's database: made again from the results of its trials, waited for, and only read."""

import datetime
import os
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.pruners import ThresholdPruner
from optuna.trial import FrozenTrial

from kdnas.models.arch import StudentArch
from kdnas.nas import study as store
from kdnas.nas.search import search
from kdnas.nas.study import check_reachable, open_study, patiently, read_study, without_password
from kdnas.nas.trials import Outcome, results_in, trained, trials_frame, tried
from kdnas.system.engine import Engine
from kdnas.system.errors import CandidateFailed, StoreAway, UserError
from kdnas.system.jobs import Reporter
from tests.nas.fakes import ONE, OTHER, SPACE, TWO, Fake, end_well, outcome, refuse

PRUNED = StudentArch(1, 2, 48, 64)


def fail(arch: StudentArch, folder: Path) -> Outcome:
    raise CandidateFailed("the loss is nan")


def report_low(arch: StudentArch, folder: Path) -> Outcome:
    Reporter(folder).tell(at_once=True, reports={"0": 0.1})
    assert not Reporter(folder).may_go_on(0)
    return outcome(arch, "PRUNED", attrs={"stopped_early": "after epoch 1"}, reports={"0": 0.1})


ENDS = {TWO: fail, OTHER: refuse, PRUNED: report_low}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search on disk with a trial of every kind: trained, twin, failed, refused, pruned."""
    folder = tmp_path_factory.mktemp("made")
    pruner = ThresholdPruner(lower=0.5)
    fake = Fake(folder, special=ENDS, pruner=pruner, in_memory=False)
    fake.queue(ONE, ONE, TWO, OTHER, PRUNED)
    fake.search(3)
    assert set(fake.states) == {"COMPLETE", "FAIL", "PRUNED"}
    return folder


@pytest.fixture
def fake(made: Path, tmp_path: Path) -> Fake:
    """A copy of it that goes on; what is trained is kept from now on."""
    shutil.copytree(made, tmp_path / "copy")
    return Fake(tmp_path / "copy", special=ENDS, in_memory=False)


def facts(trial: FrozenTrial) -> tuple[object, ...]:
    attrs = {name: value for name, value in trial.user_attrs.items() if name != "queued_for"}
    return (
        trial.number,
        trial.params,
        trial.state,
        trial.value,
        attrs,
        trial.constraints,
        trial.intermediate_values,
    )


def damage(how: str, path: Path) -> None:
    content = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "truncated to 0":
        os.truncate(path, 0)
    elif how == "truncated to half":
        os.truncate(path, len(content) // 2)
    elif how == "NUL bytes appended":
        path.write_bytes(content + bytes(100))
    elif how == "random bytes":
        path.write_bytes(random.Random(0).randbytes(len(content)))
    elif how == "of another Optuna":
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE alembic_version SET version_num = 'v9.9.0'")
    else:
        path.write_text("not a database\n")


@pytest.mark.parametrize(
    "how",
    [
        "deleted",
        "truncated to 0",
        "truncated to half",
        "NUL bytes appended",
        "random bytes",
        "of another Optuna",
        "text",
    ],
)
def test_a_damaged_database_is_made_again_and_nothing_is_trained_twice(fake, how, caplog):
    before, path = fake.trials, fake.run.study_db
    damage(how, path)
    damaged = path.read_bytes() if path.exists() else b""
    after = fake.trials
    assert [facts(trial) for trial in after] == [facts(trial) for trial in before]
    if how != "NUL bytes appended":  # which SQLite does not mind
        assert f"rebuilt from the results of {len(before)} trials." in caplog.text
        for number, known in results_in(fake.run.folder).items():
            began, ended = after[number].datetime_start, after[number].datetime_complete
            assert began == datetime.datetime.fromtimestamp(known.started)
            assert ended == datetime.datetime.fromtimestamp(known.ended)
        assert not damaged or path.with_name("study.db.replaced").read_bytes() == damaged


def test_a_search_goes_on_from_what_was_made_again(fake):
    known = [StudentArch.from_dict(trial.params) for trial in fake.trials]
    fake.run.study_db.unlink()
    fake.search(4)
    assert len(fake.trained) == 1 and fake.trained[0] not in known
    assert len(tried(fake.open())) == 4


def test_a_database_that_agrees_is_left_alone_and_trials_that_run_stay(fake):
    fake.open().ask()
    content = fake.run.study_db.read_bytes()
    assert fake.states[-1] == "RUNNING"
    assert fake.run.study_db.read_bytes() == content
    assert not fake.run.study_db.with_name("study.db.replaced").exists()


def test_a_trial_that_ran_when_its_result_came_is_told_it(fake):
    study = fake.open()
    trial = study.ask()
    arch = SPACE.suggest(trial)
    job = fake.job(trial.number, arch)
    with Engine() as engine:
        engine.run([job])
    fake.search(3)
    assert fake.states[-1] == "COMPLETE"


@pytest.mark.parametrize("what", ["result", "reward"])
def test_a_database_that_says_other_than_the_results_is_made_again(fake, what, caplog):
    number = trained(fake.open())[0].number
    path = fake.run.trial(number) / "result.json"
    if what == "result":
        path.unlink()
    else:
        path.write_text(path.read_text().replace('"value": ', '"value": 7'))
    after = fake.trials[number]
    assert "did not hold all results" in caplog.text
    if what == "result":
        assert after.state.name == "FAIL" and after.params == {}, "it says nothing"
        fake.search(3)
        assert len(fake.trained) == 1
    else:
        assert after.value > 70


def test_a_study_on_a_server_is_made_again_there_and_others_of_it_are_left_alone(fake, tmp_path):
    fake.storage = url = f"sqlite:///{tmp_path}/server.db"
    optuna.create_study(storage=url, study_name="another").add_trial(
        optuna.trial.create_trial(value=1.0)
    )
    expected = [facts(trial) for trial in fake.trials]
    assert len(expected) == len(results_in(fake.run.folder)) > 0
    optuna.delete_study(storage=url, study_name="run")
    assert [facts(trial) for trial in fake.trials] == expected
    assert len(optuna.load_study(storage=url, study_name="another").trials) == 1

    distributions = fake.trials[0].distributions
    of_others = optuna.trial.create_trial(
        params=ONE.to_dict(), distributions=distributions, value=1.0
    )
    optuna.load_study(storage=url, study_name="run").add_trial(of_others)
    with pytest.raises(UserError, match="server.db' holds a study 'run' of another search"):
        fake.open()

    optuna.delete_study(storage=url, study_name="run")
    optuna.create_study(storage=url, study_name="run", direction="minimize")
    with pytest.raises(UserError, match="server.db' holds a study 'run' of another search"):
        fake.open()


# Waiting


@pytest.fixture
def locked(tmp_path: Path) -> Callable[..., threading.Timer]:
    """Locks a database for some seconds, as another program may."""

    def lock(path: Path, seconds: float) -> threading.Timer:
        connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        connection.execute("BEGIN EXCLUSIVE")

        def unlock() -> None:
            connection.rollback()
            connection.close()

        timer = threading.Timer(seconds, unlock)
        timer.start()
        return timer

    return lock


def test_a_database_that_is_locked_within_a_search_is_waited_for(tmp_path, locked, caplog):
    fake = Fake(tmp_path, in_memory=False)
    path = fake.run.study_db
    fake.storage = f"sqlite:///{path}?timeout=0.1"

    def end(arch: StudentArch, folder: Path) -> Outcome:
        if len(fake.trained) == 2:
            locked(path, 1.5)
        return end_well(arch, folder)

    fake.end = end
    with Engine() as engine:

        def attempt() -> FrozenTrial:
            return search(fake.open(), fake.space, engine, fake.job, 4)

        assert patiently(attempt, fake.storage).state.name == "COMPLETE"
    assert caplog.text.count("does not answer (") == 1 and "is locked" in caplog.text
    assert len(fake.trained) == len(set(fake.trained)) == 4
    assert set(fake.states) == {"COMPLETE"}  # with what was only repeated


def test_patience_has_an_end_and_hides_the_password(tmp_path, locked, monkeypatch):
    monkeypatch.setattr(store, "PATIENCE_SECONDS", 0.3)
    fake = Fake(tmp_path, in_memory=False)
    fake.open()
    timer = locked(fake.run.study_db, 20)
    fake.storage = f"sqlite:///{fake.run.study_db}?timeout=0.1"
    with pytest.raises(StoreAway, match="cannot be used .*is locked") as caught:
        patiently(fake.open, f"{fake.storage}&password=secret")
    assert "secret" not in str(caught.value)
    timer.cancel()
    timer.function()


@pytest.mark.parametrize("error", [ValueError("no"), UnboundLocalError("of ours")])
def test_an_error_that_is_not_the_stores_is_raised_at_once(error):
    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        patiently(fail, "sqlite://")


# Reading


def test_a_study_is_read_and_nothing_is_written(fake):
    content = fake.run.study_db.read_bytes()
    study = read_study(fake.run.study_db, "run")
    assert [facts(trial) for trial in study.trials] == [facts(trial) for trial in fake.trials]
    assert fake.run.study_db.read_bytes() == content


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "There is no study in '.*': no search was started there. If the"),
        (lambda path: path.write_text("text" * 400), "cannot be read .*not a database"),
        (lambda path: path.touch(), "cannot be read"),
        (
            lambda path: optuna.create_study(storage=f"sqlite:///{path}", study_name="other"),
            "There is no study 'run' in '.*': give its database with --storage",
        ),
    ],
)
def test_a_study_that_cannot_be_read_is_named(tmp_path, make, message):
    path = tmp_path / "study.db"
    make(path)
    for storage in (path, f"sqlite:///{path}"):
        with pytest.raises(UserError, match=message):
            read_study(storage, "run")


@pytest.mark.parametrize("storage", ["no url", "nothing://here", "postgresql://u:secret@h:1/d"])
def test_a_database_that_is_none_or_does_not_answer_is_the_users_mistake(storage):
    for look in (check_reachable, lambda url: read_study(url, "run")):
        with pytest.raises(UserError) as caught:
            look(storage)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:///study.db", "sqlite:///study.db"),
        ("postgresql://user:se@cret@host/d", "postgresql://user:***@host/d"),
        ("mysql://host/d?user=me&password=secret&x=1", "mysql://host/d?user=me&password=***&x=1"),
        ("no url", "no url"),
    ],
)
def test_a_url_is_shown_without_its_password(url, shown):
    assert without_password(url) == shown


@pytest.mark.parametrize("name", ["a b.db", "50%.db", "{x}.db", "a?b#c.db"])
def test_a_database_lies_where_its_path_says(tmp_path, name):
    path = tmp_path / name
    open_study(path, "run", SPACE, {}, optuna.samplers.RandomSampler())
    assert [found.name for found in tmp_path.iterdir()] == [name]
    assert read_study(path, "run").trials == []


def test_a_study_that_is_made_again_gives_no_number_twice(tmp_path):
    path, sampler = tmp_path / "study.db", optuna.samplers.RandomSampler()
    study = open_study(path, "run", SPACE, {}, sampler, num_begun=3)
    assert [trial.state.name for trial in study.trials] == ["FAIL"] * 3
    assert study.ask().number == 3


TABLES = """studies version_info study_directions study_user_attributes study_system_attributes trials
trial_user_attributes trial_system_attributes trial_params trial_values trial_intermediate_values
alembic_version""".split()


@pytest.mark.parametrize("which", ["1", "rowid = (SELECT max(rowid) FROM {})"], ids=["all", "last"])
@pytest.mark.parametrize("table", TABLES)
def test_rows_that_somebody_deletes_are_told_or_do_not_matter(table, which, fake):
    before, path = fake.trials, fake.run.study_db
    results = results_in(fake.run.folder)
    with sqlite3.connect(path) as connection:
        connection.execute(f"DELETE FROM {table} WHERE {which.format(table)}")
    try:
        found = read_study(path, "run", results)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert [trial.params for trial in found.trials] == [trial.params for trial in before]
        assert trials_frame(found).equals(trials_frame(read_study(path, "run")))
    fake.search(4)
    assert len(fake.trained) == 1, "what was trained is not trained again"
    again = fake.trials[: len(before)]
    assert [facts(trial) for trial in again] == [facts(trial) for trial in before]


class Clock(datetime.datetime):
    """That of a machine whose time is wrong."""

    wrong_by = datetime.timedelta()

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
        return datetime.datetime.now(tz) + cls.wrong_by


def test_no_clock_and_no_time_zone_decides_anything(tmp_path, monkeypatch):
    """Machines in turn go on with one search, on a disk that has yet another time."""
    unbroken = Fake(tmp_path / "unbroken", special=ENDS, in_memory=False)
    unbroken.search(9)
    fake = Fake(tmp_path / "in turn", special=ENDS, in_memory=False)
    monkeypatch.setattr("optuna.storages._rdb.storage.datetime", Clock)
    real = time.time
    for n_trials in range(1, 10):
        zone, days = [("Asia/Tokyo", 400), ("UTC", 0), ("America/Los_Angeles", -400)][n_trials % 3]
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        Clock.wrong_by = datetime.timedelta(days=days)
        monkeypatch.setattr(time, "time", lambda days=days: real() + 86_400 * days)
        for path in fake.run.folder.rglob("*"):
            os.utime(path, (real() - 10_000 * days,) * 2)
        fake.search(n_trials)
    monkeypatch.undo()
    time.tzset()
    assert fake.story == unbroken.story
    assert len(fake.trained) == len(set(fake.trained)) == len(unbroken.trained)
    fake.run.study_db.unlink()
    assert fake.story == unbroken.story, "and made again from results"
