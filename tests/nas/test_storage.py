"""A database that is away: a short while nobody notices, and for ever no finished result is lost."""

import math
import re
import sqlite3
import sys
from pathlib import Path

import optuna
import pytest
from sqlalchemy import event, make_url
from sqlalchemy.exc import InternalError, OperationalError, PendingRollbackError

import kdnas.nas.storage
from kdnas.nas.record import best_of, trained
from kdnas.nas.search import bury_dead, end_trial, open_study, search
from kdnas.nas.space import SearchSpace
from kdnas.nas.storage import connect, engine_options, read_study, sqlite_url, without_password
from kdnas.nas.trials import best_trial
from kdnas.nas.unsent import keep_result
from kdnas.system.errors import StoreAway, StoreDamaged, UserError
from kdnas.system.files import this_host

SPACE = SearchSpace(
    {
        "num_hidden_layers": [1, 2, 3],
        "num_attention_heads": [1],
        "hidden_size": [16],
        "intermediate_size": [64],
        "hidden_act": ["gelu"],
    }
)


class Outage:
    """Fails the next so many statements."""

    def __init__(
        self,
        study: optuna.Study,
        error: type[Exception] = sqlite3.OperationalError,
        kinds: tuple[str, ...] = ("",),
    ) -> None:
        self.error, self.kinds = error, kinds
        self.left = 0.0
        self.failed = 0
        event.listen(study._storage._backend.engine, "before_cursor_execute", self)

    def __call__(self, connection, cursor, statement, parameters, context, executemany):
        if self.left > 0 and statement.startswith(self.kinds):
            self.left -= 1
            self.failed += 1
            raise self.error("the server closed the connection unexpectedly")


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """Time passes without being waited for."""
    now, pauses = [0.0], []

    def sleep(seconds):
        now[0] += seconds
        pauses.append(seconds)

    monkeypatch.setattr(kdnas.nas.storage.time, "sleep", sleep)
    monkeypatch.setattr(kdnas.nas.storage.time, "monotonic", lambda: now[0])
    return pauses


@pytest.fixture
def start(tmp_path: Path):
    return lambda **options: open_study(
        f"sqlite:///{tmp_path}/study.db", "s", {}, folder=tmp_path, **options
    )


@pytest.mark.parametrize(
    ("when", "error"),
    [
        ("within", sqlite3.OperationalError),
        ("at its end", sqlite3.OperationalError),
        (
            "at its end",
            PendingRollbackError,
        ),  # a connection that PostgreSQL cut between two queries
    ],
)
def test_a_database_that_comes_back_is_waited_for_and_each_result_is_stored_once(
    when, error, start, tmp_path, pauses
):
    study = start()
    outage = Outage(study, error)

    def evaluate(trial, arch):
        outage.left = 7
        if when == "within":
            trial.set_user_attr("loss", 0.5)
            assert outage.left == 0
        return float(arch.num_hidden_layers)

    search(evaluate, SPACE, study, 3, folder=tmp_path)
    assert sorted(trial.value for trial in trained(study)) == [1, 2, 3]
    assert outage.failed == 21 and len(pauses) > 3
    assert {trial.state.name for trial in study.trials} == {"COMPLETE"}
    assert not list(tmp_path.glob("unsent*"))


@pytest.mark.parametrize("when", ["within", "at its end"])
def test_a_result_that_the_database_cannot_take_is_kept_and_taken_up_by_the_next_start(
    when, start, tmp_path
):
    study = start()
    outage = Outage(study)

    def evaluate(trial, arch):
        if trial.number == 1 and when == "within":
            outage.left = float("inf")
        trial.set_user_attr("loss", 0.25)
        if trial.number == 1:
            outage.left = float("inf")
        return 0.75

    with pytest.raises(
        StoreAway, match=r"database has not answered for 600 s \(\(sqlite3.OperationalError\) .+\)$"
    ):
        search(evaluate, SPACE, study, 3, folder=tmp_path)
    (kept,) = tmp_path.glob("unsent*")
    assert kept.name == "unsent_0001.json"
    study = start()
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]
    assert (study.trials[1].value, study.trials[1].user_attrs["loss"]) == (0.75, 0.25)
    assert "arch" in study.trials[1].user_attrs and not kept.exists()
    search(lambda trial, arch: 0.5, SPACE, study, 3, folder=tmp_path)
    assert len(trained(study)) == 3 and len(study.trials) == 3


def test_a_result_is_not_given_to_another_trial_of_its_number(start, tmp_path, caplog):
    study = start()
    outage = Outage(study)

    def evaluate(trial, arch):
        outage.left = float("inf")
        return 7.5

    with pytest.raises(StoreAway):
        search(evaluate, SPACE, study, 3, folder=tmp_path)
    (tmp_path / "study.db").unlink()
    study = start()
    search(lambda trial, arch: 0.5, SPACE, study, 3, folder=tmp_path)
    assert [trial.value for trial in study.trials] == [0.5] * 3
    assert (tmp_path / "unsent_0000.json").exists() and caplog.text.count(
        "of a study that is gone"
    ) == 1


def test_after_a_signal_a_database_that_stays_away_is_asked_once(start, tmp_path, pauses):
    study = start()
    trial, outage, store = study.ask(), Outage(study), study._storage._backend
    store.stopped, outage.left = KeyboardInterrupt(), float("inf")
    with pytest.raises(StoreAway, match="has not answered for 2 s"):
        study.trials  # noqa: B018
    asked = outage.failed
    trial.set_user_attr("failed", "interrupted")
    with pytest.raises(StoreAway):
        study.trials  # noqa: B018
    assert outage.failed == asked > 0


@pytest.mark.parametrize("host", [this_host(), "elsewhere"])
def test_a_result_that_a_dead_worker_kept_is_taken_up_by_one_that_lives(host, start, tmp_path):
    study, other = start(), start()

    def evaluate(trial, arch):
        if (
            trial.number == 0
        ):  # meanwhile another worker is at one, of which the database does not take the end
            dead = other.ask()
            for name, value in {
                "arch": SPACE.suggest(dead).to_dict(),
                "host": host,
                "pid": 2**22 + 1,
            }.items():
                dead.set_user_attr(name, value)
            other._storage.record_heartbeat(dead._trial_id)
            with other._storage._backend.engine.begin() as connection:
                connection.exec_driver_sql(
                    "UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour')"
                )
            keep_result(tmp_path, "s", dead.number, [["set_trial_user_attr", "loss", 0.25]], 7.5)
        return 0.5

    search(evaluate, SPACE, study, 3, folder=tmp_path)
    assert (study.trials[1].value, study.trials[1].user_attrs["loss"]) == (7.5, 0.25)
    assert {trial.state.name for trial in study.trials} == {"COMPLETE"}
    assert not list(tmp_path.glob("unsent*"))


def test_what_a_database_missed_that_comes_back_at_the_last_moment_is_stored_with_the_result(
    start, tmp_path
):
    study = start()
    outage = Outage(study)

    def evaluate(trial, arch):
        outage.left = math.inf
        trial.set_user_attr("loss", 0.25)
        trial.set_user_attr("weights_sha256", "a")
        outage.left = 0
        return 0.75

    search(evaluate, SPACE, study, 1, folder=tmp_path)
    (trial,) = start().trials
    assert (trial.state.name, trial.value) == ("COMPLETE", 0.75)
    assert (trial.user_attrs["loss"], trial.user_attrs["weights_sha256"]) == (0.25, "a")
    assert not list(tmp_path.glob("unsent*"))


@pytest.mark.parametrize("queued", [False, True])
def test_a_trial_whose_beginning_was_stored_but_not_answered_is_tried_again(
    queued, start, tmp_path
):
    study, lost = start(), []
    if queued:
        study.enqueue_trial({name: values[0] for name, values in SPACE.choices.items()})

    def lose(connection):
        """The answer to the commit that begins the first trial."""
        with sqlite3.connect(tmp_path / "study.db") as database:
            begun = database.execute("SELECT * FROM trials WHERE state = 'RUNNING'").fetchall()
        if begun and not lost:
            lost.append(begun)
            raise sqlite3.OperationalError("the server closed the connection unexpectedly")

    engine = study._storage._backend.engine
    commit = engine.dialect.do_commit
    engine.dialect.do_commit = lambda connection: (commit(connection), lose(connection))
    search(lambda trial, arch: 0.5, SPACE, study, 3, folder=tmp_path)
    assert lost and len(trained(study)) == 3
    states = [trial.state.name for trial in study.trials]
    assert sorted(states) == ["COMPLETE"] * 3 + ["FAIL"]
    died = study.trials[states.index("FAIL")]
    assert died.user_attrs["failed"] == "interrupted (the database did not answer); tried again"
    assert [trial.user_attrs.get("again") for trial in study.trials].count(died.number) == 1


@pytest.mark.parametrize("when", ["within", "at its end"])
def test_a_signal_while_the_database_is_away_ends_the_search_at_once_and_keeps_the_result(
    when, start, tmp_path, pauses, monkeypatch
):
    study = start()
    outage = Outage(study)
    wait = kdnas.nas.storage.time.sleep

    def interrupted(seconds):
        wait(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(kdnas.nas.storage.time, "sleep", interrupted)

    def evaluate(trial, arch):
        outage.left = float("inf")
        if when == "within":
            trial.set_user_attr("loss", 0.25)
        return 0.75

    with pytest.raises(KeyboardInterrupt):
        search(evaluate, SPACE, study, 3, folder=tmp_path)
    assert sum(pauses) < 5
    (trial,) = start().get_trials(
        states=(optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL)
    )
    assert trial.value == (0.75 if when == "at its end" else None)
    assert not list(tmp_path.glob("unsent*")), "taken up"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:a/b@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:a:b@c@host:5432/db", "postgresql://me:***@host:5432/db"),
        (
            "postgresql://host/db?user=me&password=secret&x=1",
            "postgresql://host/db?user=me&password=***&x=1",
        ),
        ("sqlite:////tmp/a:b/study.db", "sqlite:////tmp/a:b/study.db"),
        ("nonsense", "nonsense"),
    ],
)
def test_no_password_is_shown(url, shown):
    assert without_password(url) == shown


class Full(sqlite3.OperationalError):
    sqlite_errorname = "SQLITE_FULL"


@pytest.mark.parametrize("can_be_read", [False, True])
def test_a_full_disk_is_not_waited_for_and_told_with_its_bytes(
    can_be_read, start, tmp_path, pauses
):
    study = start()
    outage = Outage(study, Full, ("INSERT", "UPDATE") if can_be_read else ("",))

    def evaluate(trial, arch):
        outage.left = float("inf")
        return 0.75

    with pytest.raises(
        StoreAway, match=rf"'{tmp_path}/study.db' cannot be written \(.*\), [\d,]+ bytes are free"
    ):
        search(evaluate, SPACE, study, 3, folder=tmp_path)
    assert pauses == []
    assert [trial.value for trial in start().trials] == [0.75]


def test_a_damaged_page_is_told_in_one_line_whatever_reads_it(start, tmp_path):
    path, size = tmp_path / "study.db", 4096
    search(lambda trial, arch: trial.report(0.5, 0) or 0.5, SPACE, start(), 2, folder=tmp_path)
    (tmp_path / "trial_0000").mkdir()
    whole, told = path.read_bytes(), []
    for page in range(0, len(whole), size):
        path.write_bytes(whole[:page] + bytes(size) + whole[page + size :])
        try:
            search(lambda trial, arch: 0.5, SPACE, start(), 3, folder=tmp_path)
        except UserError as error:
            told.append(str(error))
    line = r"'.*study.db' is damaged \(.*\): restore a copy of it, or take another --name or --storage\."
    assert len(told) > 15 and all(re.fullmatch(line, text) for text in told)


@pytest.mark.parametrize("left", [b"", b"S", None])
def test_a_study_that_is_gone_while_its_candidates_are_not_is_no_new_one(left, start, tmp_path):
    path = tmp_path / "study.db"
    search(
        lambda trial, arch: (tmp_path / f"trial_{trial.number:04d}").mkdir() or 0.5,
        SPACE,
        start(),
        2,
    )
    whole = path.read_bytes()
    path.unlink()
    if left is not None:
        path.write_bytes(left)
    for _ in range(2):  # nothing is made by the first that the second would take for the study
        with pytest.raises(
            UserError,
            match="holds candidates of a search, but its database has no study 's' any more",
        ):
            start()
    path.write_bytes(whole)
    assert [trial.value for trial in start().trials] == [0.5] * 2


class Malformed(sqlite3.DatabaseError):
    sqlite_errorname = "SQLITE_CORRUPT"


@pytest.mark.parametrize("when", ["within", "at its end"])
def test_a_file_that_is_found_damaged_in_a_search_is_no_fault_of_the_candidate(
    when, start, tmp_path
):
    study = start()
    outage = Outage(study, Malformed)

    def evaluate(trial, arch):
        outage.left = 1 if when == "within" else float("inf")
        if when == "within":
            trial.set_user_attr("loss", 0.5)
        return 0.75

    with pytest.raises(UserError, match="study.db' is damaged"):
        search(evaluate, SPACE, study, 3, folder=tmp_path)
    states = [trial.state.name for trial in start().trials]  # a copy, as it were
    assert states == (["FAIL", "WAITING"] if when == "within" else ["COMPLETE"])


@pytest.mark.parametrize(
    "sign", [{"sqlstate": "25006"}, {"pgcode": "25P03"}, {"connection_invalidated": True}]
)
def test_a_server_that_another_has_taken_over_from_is_waited_for(sign, start, tmp_path, pauses):
    study = start()

    def fail(connection, cursor, statement, parameters, context, executemany):
        if statement.startswith("INSERT INTO trial_user_attributes") and len(pauses) < 3:
            orig = InternalError(
                "cannot execute INSERT in a read-only transaction", {}, Exception()
            )
            vars(orig.orig).update(sign)
            orig.connection_invalidated = "connection_invalidated" in sign
            raise orig

    event.listen(study._storage._backend.engine, "before_cursor_execute", fail)
    search(lambda trial, arch: 0.5, SPACE, study, 1, folder=tmp_path)
    assert len(pauses) == 3 and [trial.state.name for trial in study.trials] == ["COMPLETE"]


def test_a_disk_that_is_full_from_the_start_is_told_with_its_bytes(start, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OperationalError("CREATE TABLE studies", {}, Full("database or disk is full"))

    monkeypatch.setattr(kdnas.nas.storage, "PatientStorage", full)
    with pytest.raises(
        StoreAway, match=rf"'{tmp_path}/study.db' cannot be written .*, [\d,]+ bytes are free there"
    ):
        start()


@pytest.mark.parametrize("num_failures", [7, math.inf])
def test_a_database_that_was_there_is_waited_for_at_the_next_start(
    num_failures, start, tmp_path, pauses, monkeypatch
):
    storage, failures = kdnas.nas.storage.PatientStorage, []

    def away(*args, **options):
        if len(failures) < num_failures:
            failures.append(
                OperationalError("SELECT", {}, sqlite3.OperationalError("connection refused"))
            )
            raise failures[-1]
        return storage(*args, **options)

    monkeypatch.setattr(kdnas.nas.storage, "PatientStorage", away)
    with pytest.raises(UserError, match="connection refused"):
        start()
    assert len(failures) == 2, "the first time in a command it is the user's mistake"
    if num_failures == 7:
        assert start(was_there=True).trials == []
    else:
        with pytest.raises(StoreAway, match="has not answered for 600 s"):
            start(was_there=True)
        assert 600 <= sum(pauses) < 610


def test_a_candidate_that_is_not_finished_when_the_database_is_gone_is_tried_again(start, tmp_path):
    study = start()
    outage = Outage(study)

    def evaluate(trial, arch):
        outage.left = float("inf")
        trial.set_constraint("budget", 0.0)  # which reads
        pytest.fail("it went on")

    with pytest.raises(StoreAway):
        search(evaluate, SPACE, study, 3, folder=tmp_path)
    assert not list(tmp_path.glob("unsent*"))


def test_a_missed_heartbeat_is_no_failure(start):
    study = start()
    trial = study.ask()
    outage = Outage(study)
    outage.left = 1
    study._storage.record_heartbeat(trial._trial_id)
    assert outage.failed == 1


def test_another_error_of_the_database_is_not_waited_for(start, pauses):
    study = start()
    with pytest.raises(KeyError):
        study._storage.get_trial(99)
    with pytest.raises(OperationalError), study._storage._backend.engine.connect() as connection:
        connection.exec_driver_sql("nonsense")
    assert pauses == []


def test_a_result_that_came_too_late_or_belongs_elsewhere_is_not_taken(start, tmp_path, caplog):
    study = start()
    trial = study.ask()
    keep_result(tmp_path, "s", trial.number, [["set_trial_user_attr", "loss", 1.0]], 0.5)
    keep_result(tmp_path, "other", 7, [], 0.5)
    study.tell(trial, state=optuna.trial.TrialState.FAIL)
    again = start()
    assert [trial.state.name for trial in again.trials] == ["FAIL"]
    assert [path.name for path in tmp_path.glob("unsent*")] == ["unsent_0007.json"]
    assert "Trial 0 was given up" in caplog.text


@pytest.mark.parametrize("content", ["{}", "[]", "7", '{"study": '])
def test_a_file_that_is_no_kept_result_is_told_and_stays_where_it_is(
    content, start, tmp_path, caplog
):
    path = tmp_path / "unsent_0000.json"
    path.write_text(content)
    start()
    assert (
        caplog.text.count(f"{path} is no result that was kept: move it away") == 1 and path.exists()
    )


def test_a_result_of_a_study_that_is_gone_stays_where_it_is(start, tmp_path, caplog):
    path = keep_result(tmp_path, "s", 7, [], 0.5)  # the database was made anew since
    study = start()
    assert study.trials == []
    assert path.exists() and "in this one there is no trial 7" in caplog.text
    trial = study.ask()
    bury_dead(study, trial.number)
    assert path.exists() and caplog.text.count("in this one there is no trial 7") == 1
    keep_result(tmp_path, "s", 7, [], 0.5)  # another one of the same name is looked at
    bury_dead(study, trial.number)
    assert caplog.text.count("in this one there is no trial 7") == 2


@pytest.mark.parametrize(
    "look",
    [
        best_trial,
        lambda study: best_of(study, SPACE, math.inf),
        lambda study: end_trial(study, study.trials[0], "died", ""),
    ],
)
def test_a_damaged_file_is_not_taken_for_a_study_without_a_best_trial(look, start, monkeypatch):
    study = start()
    study.ask()

    def damaged(*args: object, **options: object) -> None:
        raise StoreDamaged("it is damaged")

    monkeypatch.setattr(optuna.Study, "best_trial", property(damaged))
    monkeypatch.setattr(optuna.Study, "tell", damaged)
    with pytest.raises(StoreDamaged):
        look(study)


def test_a_driver_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(
        UserError, match=r"'postgresql://me:\*\*\*@host/db' needs .*psycopg.*'kdnas\[postgres\]'"
    ):
        connect("postgresql://me:secret@host/db", lambda study, trial: None)


def test_tables_of_another_optuna_are_refused_in_one_line(start, tmp_path):
    start()
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'v9.9.9'")
    with pytest.raises(
        UserError, match=r"study.db' cannot be used \(The runtime optuna .* pip install -U"
    ):
        start()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite:///a.db", None),
        ("mysql+pymysql://u@h/db", None),
        ("postgresql+pg8000://u@h/db", None),
        ("postgresql://u:{p}@h/db", 3),
        ("postgresql+psycopg://u@h/db", 3),
        ("postgresql+psycopg://u@h/db?connect_timeout=60", None),
    ],
)
def test_a_server_that_says_nothing_is_noticed_in_seconds_unless_its_url_says_otherwise(
    url, expected
):
    arguments = engine_options(make_url(url))["connect_args"]
    assert arguments.get("connect_timeout") == expected
    assert arguments.get("tcp_user_timeout") == (4_000 if "psycopg" in url or expected else None)


@pytest.mark.parametrize("name", ["what?x=1", "a%20b", "{project}", "a{}", "#1 & more"])
def test_a_study_lies_where_its_path_says(tmp_path, name):
    path = tmp_path / name / "study.db"
    path.parent.mkdir()
    study = open_study(sqlite_url(path), "s", {})
    study.ask()
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == [path]
    assert len(read_study(path, "s").trials) == len(read_study(sqlite_url(path), "s").trials) == 1


def test_a_query_that_a_signal_tears_is_told_in_no_traceback(tmp_path, caplog):
    with connect(
        sqlite_url(tmp_path / "study.db"), lambda trial: None
    ).engine.connect() as connection:
        cursor = connection.connection.cursor()
        cursor.connection.close()
        connection._safe_close_cursor(cursor)  # as at the end of a query that has raised
        connection.connection.dbapi_connection = sqlite3.connect(":memory:")
    assert not caplog.records
