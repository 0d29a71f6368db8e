"""The study's database: opened, made again from the results of its trials, or only read."""

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

# What a database that is locked, away or damaged makes of Optuna's calls.
STORE_ERRORS = (SQLAlchemyError, StorageInternalError, sqlite3.OperationalError)
# A server that restarts is back in seconds, one that is moved in minutes.
PATIENCE_SECONDS = 600.0
DISK = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY")
T = TypeVar("T")


def patiently(attempt: Callable[[], T], storage: str | Path) -> T:
    """Call ``attempt``, and again while the store raises, for ``PATIENCE_SECONDS`` at most.

    Args:
        attempt: opens the study anew; what it has begun and not told it must find again.
        storage: as ``open_study`` takes it.

    Raises:
        StoreAway: the store has not answered for so long, or its disk has failed.
    """
    first = 0.0
    while True:
        begun = time.monotonic()
        try:
            return attempt()
        except (*STORE_ERRORS, UnboundLocalError) as error:
            # The last is a defect of Optuna's, which follows a cut connection.
            if isinstance(error, UnboundLocalError) and "updated_state" not in str(error):
                raise
            now, shown = time.monotonic(), without_password(str(storage))
            reason = first_line(_cause(error))
            if not first or now > begun + 60:  # after a while of good work it is another outage
                first = now
                log.warning("The study's database does not answer (%s); waiting for it.", reason)
            if _is_of_disk(error) or now > first + PATIENCE_SECONDS:
                raise StoreAway(
                    f"The study's database {shown!r} cannot be used ({reason})"
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
    """Open a study, or make it, so that it holds every result that there is.

    Args:
        storage: path of an SQLite file, or SQLAlchemy URL of a database.
        name: of the study.
        space: of the search.
        results: of finished trials, by number: what the study is made again from where it does not
            hold them, as after its file was damaged or deleted.
        sampler: proposes.
        pruner: ends candidates early; none by default.
        num_begun: how many trials were begun: in a study that is made again, none gets the number
            of one that may still run.

    Raises:
        UserError: the database cannot be used.
        StoreAway: its disk failed.
    """
    options: dict[str, Any] = {
        "study_name": name,
        "sampler": sampler,
        "pruner": pruner or optuna.pruners.NopPruner(),
        "direction": "maximize",
        "load_if_exists": True,
    }
    why = "was not there"
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
        log.warning("%s %s: made again from the results of %d trials.", shown, why, len(results))
    return study


def _check_whole(storage: str | Path) -> None:
    """Read all of an SQLite file: Optuna would read a part, and find out later.

    Raises:
        DatabaseError: the file is damaged.
    """
    if isinstance(storage, Path):
        with closing(sqlite3.connect(storage)) as connection:
            found = connection.execute("PRAGMA quick_check").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(found)


def _set_aside(storage: str | Path, name: str) -> None:
    """Make room for a study; an SQLite file is kept as ``study.db.replaced``."""
    if not isinstance(storage, Path):
        with suppress(KeyError):
            optuna.delete_study(study_name=name, storage=_connect(storage))
        return
    for path in storage.parent.glob(f"{storage.name}-*"):  # SQLite's journal
        path.unlink()
    if storage.exists():
        storage.replace(storage.with_name(f"{storage.name}.replaced"))


def _connect(storage: str | Path) -> RDBStorage:
    url = sqlite_url(storage) if isinstance(storage, Path) else storage
    return RDBStorage(_literal(url), engine_kwargs=_engine_options(url))


def _engine_options(url: str) -> dict[str, Any]:
    """A connection whose end is noticed, also where the server's machine is gone."""
    parsed = make_url(url)
    options: dict[str, Any] = {"pool_pre_ping": True}
    if parsed.get_backend_name() == "postgresql" and parsed.get_driver_name().startswith("psycopg"):
        limits = {"connect_timeout": 3, "tcp_user_timeout": 4_000, "keepalives_idle": 30}
        options["connect_args"] = {k: v for k, v in limits.items() if k not in parsed.query}
    return options


def _cause(error: BaseException) -> BaseException:
    """What SQLAlchemy said, where Optuna has wrapped it."""
    return error.__cause__ or error if isinstance(error, StorageInternalError) else error


def _is_damage(error: BaseException) -> bool:
    """Whether waiting does not mend it: the file is no database of Optuna's, or not whole."""
    cause = _cause(error)
    name = _sqlite_name(cause)
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_CANTOPEN", *DISK)):
        return False
    # The last is what Optuna's calls raise where somebody has deleted rows.
    damaged = (DatabaseError, sqlite3.DatabaseError, RuntimeError, ValueError, LookupError)
    return isinstance(cause, damaged)


def _sqlite_name(cause: BaseException) -> str:
    """SQLite's name of an error; empty where it is not SQLite's."""
    return getattr(getattr(cause, "orig", cause), "sqlite_errorname", "")


def _is_of_disk(error: BaseException) -> bool:
    """Whether the disk below a database is full, broken or read-only: no waiting mends that."""
    return _sqlite_name(_cause(error)).startswith(DISK)


def _holds(study: Study, results: Mapping[int, Outcome]) -> bool:
    """Whether each result is the study's trial of that number, ended alike or still to be told."""
    return _lacks(study, results) is None and not any(
        trial.state.is_finished() and trial.params and trial.number not in results
        for trial in study.get_trials(deepcopy=False)
    )


def _lacks(study: Study, results: Mapping[int, Outcome]) -> int | None:
    """The first trial whose result is not what the study holds; None where there is none."""
    if study.direction != StudyDirection.MAXIMIZE:
        raise ValueError("it is of no search")
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
    """Never delete what others have put into a database under this name.

    Raises:
        UserError: its finished trials are not those of this run.
    """
    finished = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    ours = all(trial.number in results or not trial.params for trial in finished)
    if not isinstance(storage, Path) and not ours:
        raise UserError(
            f"The database {without_password(storage)!r} holds another study "
            f"{study.study_name!r}: give another --name or --storage."
        )


def _as_trial(outcome: Outcome | None, space: SearchSpace) -> FrozenTrial:
    """A finished trial; one that was never finished keeps its number, and says nothing."""
    if outcome is None:
        return create_trial(state=TrialState.FAIL)
    reports = {int(step): value for step, value in outcome.reports.items()}
    last = reports[max(reports)] if reports and outcome.state == "PRUNED" else None
    trial = create_trial(
        state=TrialState[outcome.state],
        value=outcome.value if outcome.state == "COMPLETE" else last,  # as Optuna's ``tell`` has it
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
    """A study to look at; nothing is written to its database.

    Args:
        storage: as ``open_study`` takes it.
        name: of the study.
        results: of its trials, as far as they are known, by number.

    Raises:
        UserError: there is no such database or no such study, it cannot be read, or rows of it were
            deleted.
    """
    shown = without_password(str(storage))
    try:
        url = make_url(sqlite_url(storage) if isinstance(storage, Path) else storage)
        if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
            raise UserError(
                f"There is no study in {shown!r}: no search was begun there, or give its --storage."
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
            f"The study's database {shown!r} cannot be read ({first_line(_cause(error))})."
        ) from error
    if lacking is not None:
        raise UserError(
            f"The study's database {shown!r} does not hold the result of trial {lacking}: "
            "the command that made the run makes it again."
        )
    return study


def check_reachable(url: str) -> None:
    """Look whether the server of a database answers; nothing is written.

    Raises:
        UserError: it does not, or its driver is not installed.
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
            "URL such as postgresql://user:password@host/database of a server that runs."
        ) from error


def sqlite_url(path: Path) -> str:
    """The URL of an SQLite file, whatever its path holds."""
    return URL.create("sqlite", database=str(path)).render_as_string()


def _literal(url: str) -> str:
    """A URL whose braces are no template of Optuna's."""
    return url.replace("{", "{{").replace("}", "}}")


def without_password(url: str) -> str:
    """A database's URL that may be shown; it may be no URL at all."""
    return re.sub(r"(password=)[^&\s]*", r"\1***", re.sub(r"(//[^:/@]*):.*@", r"\1:***@", url))
