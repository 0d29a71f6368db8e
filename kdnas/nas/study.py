"""The study's database: open it, rebuild it from the results of its trials, or only read it."""

import datetime
import logging
import re
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import StorageInternalError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import RDBStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import URL, create_engine, make_url
from sqlalchemy.exc import DatabaseError, SQLAlchemyError

from kdnas.nas.space import SearchSpace
from kdnas.nas.trials import Outcome
from kdnas.system.errors import StoreAway, UserError, first_line

log = logging.getLogger(__name__)

# Errors that Optuna's calls raise if the database is locked, unreachable or damaged.
STORE_ERRORS = (SQLAlchemyError, StorageInternalError, sqlite3.OperationalError)
# A database server that restarts is back in seconds, one that is moved in minutes.
PATIENCE_SECONDS = 600.0
# SQLite's errors of a disk that is full, broken or read-only.
DISK = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY")
T = TypeVar("T")


def patiently(attempt: Callable[[], T], storage: str | Path) -> T:
    """Call ``attempt``, and repeat it while the database fails, for at most ``PATIENCE_SECONDS``.

    Args:
        attempt: function that works with the study. Each call must reopen the study and continue
            the running trials of earlier calls.
        storage: path or URL of the database, as for ``open_study``; named in messages.

    Returns:
        What ``attempt`` returns.

    Raises:
        StoreAway: the database has failed for ``PATIENCE_SECONDS``, or its disk has failed.
    """
    first = 0.0
    while True:
        begun = time.monotonic()
        try:
            return attempt()
        except (*STORE_ERRORS, UnboundLocalError) as error:
            # UnboundLocalError is a bug in Optuna that follows a cut connection.
            if isinstance(error, UnboundLocalError) and "updated_state" not in str(error):
                raise
            now, shown = time.monotonic(), without_password(str(storage))
            reason = first_line(_cause(error))
            if not first or now > begun + 60:  # it worked for a minute, so this is a new outage
                first = now
                log.warning("The study's database does not answer (%s); waiting for it.", reason)
            if _is_of_disk(error) or now > first + PATIENCE_SECONDS:
                raise StoreAway(
                    f"The study's database {shown!r} cannot be used ({reason}): check its server "
                    "or its disk"
                ) from error
        time.sleep(min(5.0, 0.5 + (now - first) / 4))


def open_study(
    storage: str | Path,
    name: str,
    space: SearchSpace,
    results: Mapping[int, Outcome],
    sampler: BaseSampler,
    pruner: BasePruner | None = None,
    num_begun: int = 0,
) -> Study:
    """Open or create an Optuna study, and make sure that it holds the given results.

    If the study in the database lacks one of the results, as after the database was damaged or
    deleted, the study is rebuilt from all results, with a warning. A replaced SQLite file is kept
    as ``study.db.replaced``.

    Args:
        storage: path of an SQLite file, or SQLAlchemy URL of a database.
        name: name of the study.
        space: student shapes that the study may propose.
        results: outcomes of the finished trials, by trial number.
        sampler: Optuna sampler that proposes student shapes.
        pruner: ends candidates early; None: no pruner.
        num_begun: number of trials that were started. In a rebuilt study, numbers of new trials
            start there, so that none repeats the number of a trial that may still run.

    Raises:
        UserError: ``storage`` is a URL, and the study of this name in that database minimises, or
            has finished trials that are not in ``results``.
        Exception: one of ``STORE_ERRORS``: the database cannot be used; ``patiently`` tries again.
    """
    options: dict[str, Any] = {
        "study_name": name,
        "sampler": sampler,
        "pruner": pruner or optuna.pruners.NopPruner(),
        "direction": "maximize",
        "load_if_exists": True,
    }
    why = "was missing"
    if not isinstance(storage, Path) or storage.exists():
        try:
            _check_whole(storage)
            study = optuna.create_study(storage=_connect(storage), **options)
            if _holds(study, results):
                return study
            _refuse_other(study, results, storage)
            why = "did not hold all results"
        except UserError:
            raise
        except (*STORE_ERRORS, sqlite3.Error, RuntimeError, ValueError, LookupError) as error:
            if not (isinstance(storage, Path) and _is_damage(error)):
                raise
            why = f"was damaged ({first_line(_cause(error))})"
    _set_aside(storage, name)
    study = optuna.create_study(storage=_connect(storage), **options)
    for number in range(max(num_begun, 1 + max(results, default=-1))):
        study.add_trial(_as_trial(results.get(number), space))
    if results:
        shown = without_password(str(storage))
        log.warning("%s %s: rebuilt from the results of %d trials.", shown, why, len(results))
    return study


def _check_whole(storage: str | Path) -> None:
    """Check all of an SQLite file now, since Optuna reads only parts and would fail later.

    Raises:
        sqlite3.DatabaseError: the file is damaged.
    """
    if isinstance(storage, Path):
        with closing(sqlite3.connect(storage)) as connection:
            found = connection.execute("PRAGMA quick_check").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(found)


def _set_aside(storage: str | Path, name: str) -> None:
    """Remove a damaged study, so that it can be rebuilt.

    An SQLite file is renamed to ``study.db.replaced``; in another database, the study is deleted.
    """
    if not isinstance(storage, Path):
        with suppress(KeyError):
            optuna.delete_study(study_name=name, storage=_connect(storage))
        return
    for path in storage.parent.glob(f"{storage.name}-*"):  # SQLite's journals
        path.unlink()
    if storage.exists():
        storage.replace(storage.with_name(f"{storage.name}.replaced"))


def _connect(storage: str | Path) -> RDBStorage:
    url = sqlite_url(storage) if isinstance(storage, Path) else storage
    return RDBStorage(_literal(url), engine_kwargs=_engine_options(url))


def _engine_options(url: str) -> dict[str, Any]:
    """Return SQLAlchemy engine options with which a lost connection is noticed within seconds."""
    parsed = make_url(url)
    options: dict[str, Any] = {"pool_pre_ping": True}
    if parsed.get_backend_name() == "postgresql" and parsed.get_driver_name().startswith("psycopg"):
        limits = {"connect_timeout": 3, "tcp_user_timeout": 4_000, "keepalives_idle": 30}
        options["connect_args"] = {k: v for k, v in limits.items() if k not in parsed.query}
    return options


def _cause(error: BaseException) -> BaseException:
    """Return the SQLAlchemy error that Optuna has wrapped in this error, or the error itself."""
    return error.__cause__ or error if isinstance(error, StorageInternalError) else error


def _is_damage(error: BaseException) -> bool:
    """Whether an error means that an SQLite file is damaged or is not an Optuna database."""
    cause = _cause(error)
    name = _sqlite_name(cause)
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_CANTOPEN", *DISK)):
        return False
    # Optuna raises the last three if somebody has deleted rows.
    damaged = (DatabaseError, sqlite3.DatabaseError, RuntimeError, ValueError, LookupError)
    return isinstance(cause, damaged)


def _sqlite_name(cause: BaseException) -> str:
    """Return SQLite's name of an error, such as ``SQLITE_FULL``; ``""`` for other errors."""
    return getattr(getattr(cause, "orig", cause), "sqlite_errorname", "")


def _is_of_disk(error: BaseException) -> bool:
    """Whether an error means that the database's disk is full, broken or read-only."""
    return _sqlite_name(_cause(error)).startswith(DISK)


def _holds(study: Study, results: Mapping[int, Outcome]) -> bool:
    """Whether a study belongs to the search with these results, and holds all of them."""
    return _is_of(study, results) and _lacks(study, results) is None


def _is_of(study: Study, results: Mapping[int, Outcome]) -> bool:
    """Whether the study maximises and all its finished trials are in ``results``."""
    return study.direction == StudyDirection.MAXIMIZE and not any(
        trial.state.is_finished() and trial.params and trial.number not in results
        for trial in study.get_trials(deepcopy=False)
    )


def _lacks(study: Study, results: Mapping[int, Outcome]) -> int | None:
    """Return the number of the first trial that differs from its result; None: all agree.

    A trial that is still running in the study agrees if its parameters are those of the result: the
    study is told of its end later.

    Raises:
        ValueError: the study minimises; those of kdnas maximise.
    """
    if study.direction != StudyDirection.MAXIMIZE:
        raise ValueError("the study minimises, but every study of kdnas maximises")
    trials = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
    for number, outcome in results.items():
        trial = trials.get(number)
        if trial is None or trial.params != outcome.params:
            return number
        reports = {int(step): value for step, value in outcome.reports.items()}
        is_alike = (
            outcome.is_of(trial)
            and _within(outcome.attrs, trial.user_attrs)
            and _within(outcome.constraints, trial.constraints)
            and _within(reports, trial.intermediate_values)
        )
        if trial.state != TrialState.RUNNING and not is_alike:
            return number
    return None


def _within(part: Mapping[Any, Any], whole: Mapping[Any, Any]) -> bool:
    return all(name in whole and whole[name] == value for name, value in part.items())


def _refuse_other(study: Study, results: Mapping[int, Outcome], storage: str | Path) -> None:
    """Raise an error if the database holds a study of this name that belongs to another search.

    Raises:
        UserError: the study minimises (a search maximises the reward), or has finished trials that
            are not among this search's ``results``.
    """
    if not isinstance(storage, Path) and not _is_of(study, results):
        raise UserError(
            f"The database {without_password(storage)!r} holds a study {study.study_name!r} of "
            "another search: give another --name or --storage."
        )


def _as_trial(outcome: Outcome | None, space: SearchSpace) -> FrozenTrial:
    """Return an Optuna trial with this outcome; for None, a failed trial without parameters."""
    if outcome is None:
        return create_trial(state=TrialState.FAIL)
    reports = {int(step): value for step, value in outcome.reports.items()}
    last = reports[max(reports)] if reports and outcome.state == "PRUNED" else None
    trial = create_trial(
        state=TrialState[outcome.state],
        value=outcome.value if outcome.state == "COMPLETE" else last,  # as Optuna's ``tell`` does
        params=outcome.params,
        distributions={
            name: CategoricalDistribution(tuple(space.choices[name])) for name in outcome.params
        },
        user_attrs=outcome.attrs,
        constraints=outcome.constraints,
        intermediate_values=reports,
    )
    trial.datetime_start = datetime.datetime.fromtimestamp(outcome.started)
    trial.datetime_complete = datetime.datetime.fromtimestamp(outcome.ended)
    return trial


def read_study(
    storage: str | Path, name: str, results: Mapping[int, Outcome] | None = None
) -> Study:
    """Open a study without writing to its database.

    Args:
        storage: path or URL of the database, as for ``open_study``.
        name: name of the study.
        results: outcomes of the finished trials, by trial number, with which the study must agree;
            None: do not compare.

    Raises:
        UserError: there is no such database or study, the database cannot be read, or the study
            lacks one of the results.
    """
    shown = without_password(str(storage))
    try:
        url = make_url(sqlite_url(storage) if isinstance(storage, Path) else storage)
        if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
            raise UserError(
                f"There is no study in {shown!r}: no search was started there. If the search uses "
                "another database, give its --storage."
            )
        there = url.render_as_string(hide_password=False)
        database = RDBStorage(
            _literal(there), skip_table_creation=True, engine_kwargs=_engine_options(there)
        )
        study = optuna.load_study(study_name=name, storage=database)
        lacking = _lacks(study, results or {})
    except KeyError as error:
        raise UserError(
            f"There is no study {name!r} in {shown!r}: give its database with --storage."
        ) from error
    except UserError:
        raise
    except (*STORE_ERRORS, RuntimeError, ImportError, LookupError, ValueError) as error:
        raise UserError(
            f"The study's database {shown!r} cannot be read ({first_line(_cause(error))}): correct "
            "--storage, or repeat the command that made the run, which rebuilds a damaged database."
        ) from error
    if lacking is not None:
        raise UserError(
            f"The study's database {shown!r} does not hold the result of trial {lacking}: "
            "repeat the command that made the run, which rebuilds the database."
        )
    return study


def check_reachable(url: str) -> None:
    """Check that a database can be reached, without writing to it.

    Args:
        url: SQLAlchemy URL of the database. Of an SQLite file only the folder must exist.

    Raises:
        UserError: the server does not answer, the folder does not exist, the URL is not valid, or
            the driver is not installed.
    """
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            folder = Path((parsed.database or "").removeprefix("file:")).parent
            if not folder.is_dir():
                raise ValueError(f"there is no folder {str(folder)!r}")
        else:
            engine = create_engine(parsed, **_engine_options(url))
            engine.connect().close()
            engine.dispose()
    except ImportError as error:
        raise UserError(
            f"The database {without_password(url)!r} needs a driver that is not installed "
            f"({first_line(error)}): pip install '.[postgres]', or another driver."
        ) from error
    except (SQLAlchemyError, ValueError) as error:
        raise UserError(
            f"The database {without_password(url)!r} cannot be used ({first_line(error)}): give a "
            "URL such as postgresql://user:password@host/database of a running server."
        ) from error


def sqlite_url(path: Path) -> str:
    """Return the SQLAlchemy URL of an SQLite file, with special characters of the path escaped."""
    return URL.create("sqlite", database=str(path)).render_as_string()


def _literal(url: str) -> str:
    """Return a URL with its braces doubled, since Optuna takes a URL for a format string."""
    return url.replace("{", "{{").replace("}", "}}")


def without_password(url: str) -> str:
    """Return a database's URL, or any other text, with the password replaced by ``***``."""
    return re.sub(r"(password=)[^&\s]*", r"\1***", re.sub(r"(//[^:/@]*):.*@", r"\1:***@", url))
