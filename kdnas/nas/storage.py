"""The study's database, which may be away: calls are tried again, and a finished result is kept beside it."""

import functools
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from shutil import disk_usage
from typing import Any, TypeVar

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import URL, create_engine, event, make_url
from sqlalchemy.exc import (
    DBAPIError,
    InterfaceError,
    OperationalError,
    PendingRollbackError,
    SQLAlchemyError,
)

from kdnas.nas.unsent import KEPT, take_up
from kdnas.system.errors import StoreAway, StoreDamaged, UserError, first_line
from kdnas.system.files import is_alive, process_start, this_host

log = logging.getLogger(__name__)
T = TypeVar("T")

# Minutes, not seconds: with a short grace a live but slow worker is declared dead.
HEARTBEAT_SECONDS = 60
# A server that restarts is back in seconds, one that is moved in minutes.
PATIENCE_SECONDS = 600.0
# After a signal, for what is left to say.
HURRY_SECONDS = 2.0
# No heart beats while the database is away.
GRACE_SECONDS = 900
# Of a worker: the process that started it, and will say what it died of; so long others leave that to it.
STARTER: dict[str, Any] = {}
WATCHER_SECONDS = 10.0


def _patient(call: Callable[..., Any]) -> Any:
    """The same call of RDBStorage, each of which is one transaction, tried until the database answers."""

    @functools.wraps(call)
    def patient(self: "PatientStorage", *args: Any, **options: Any) -> Any:
        begin, pause = time.monotonic(), 0.1
        if call.__name__ in KEPT:
            self.written.setdefault(args[0], []).append(
                [call.__name__, *args[1:], *options.values()]
            )
        while True:
            if self.gave_up:  # each call would take seconds of the few that are left
                if call.__name__ in KEPT:
                    self.skipped.add(args[0])
                    return None
                raise self.gave_up
            try:
                if args and isinstance(args[0], int) and args[0] in self.skipped:
                    with suppress(UpdateFinishedTrialError):  # the call itself will say so
                        for name, *rest in self.written.get(args[0], ()):
                            getattr(RDBStorage, name)(self, args[0], *rest)
                    self.skipped.discard(args[0])
                answer = call(self, *args, **options)
                self.away = None
                if call.__name__ == "set_trial_state_values":
                    self.written.pop(args[0], None)
                return answer
            except KeyboardInterrupt as stop:
                self.stopped = stop
                raise
            except (StorageInternalError, DBAPIError) as error:
                cause = _cause(error)
                _refuse_damaged(cause, self.engine.url.database)
                if not _is_away(cause):
                    raise
                disk = _disk_failure(cause, self.engine.url.database)
                patience = HURRY_SECONDS if self.stopped else PATIENCE_SECONDS
                if self.away or disk or time.monotonic() > begin + patience:
                    self.away = StoreAway(disk or _unanswered(patience, cause))
                    self.gave_up = self.away if self.stopped else None
                    if call.__name__ in KEPT:
                        self.skipped.add(args[0])
                        return None  # it is written down with the result, or before the trial's next call
                    raise self.away from error
                if pause == 0.1:
                    log.warning(
                        "The study's database does not answer (%s); waiting for it.",
                        first_line(cause),
                    )
                try:
                    time.sleep(pause)
                except KeyboardInterrupt as stop:
                    self.stopped, self.away = (
                        stop,
                        StoreAway("The study's database does not answer"),
                    )
                    raise
                self.engine.dispose()  # what is open may lead to a server that is none any more
                pause = min(2 * pause, 5)
            except UpdateFinishedTrialError:
                if pause == 0.1 or call.__name__ != "set_trial_state_values":
                    raise
                return True  # stored the first time, and only the answer was lost

    return patient


# The last is what Optuna's own second query says after the first was cut.
_AWAY = (OperationalError, InterfaceError, PendingRollbackError)
_AWAY_STATES = (
    "25006",
    "25P03",
)  # PostgreSQL's: read-only, as after a failover; too slow within a transaction


def _cause(error: BaseException) -> BaseException:
    """What SQLAlchemy said, where Optuna has wrapped it."""
    return error.__cause__ or error if isinstance(error, StorageInternalError) else error


def _unanswered(patience: float, error: BaseException) -> str:
    return f"The study's database has not answered for {patience:g} s ({first_line(error)})"


def _is_away(error: BaseException) -> bool:
    """Whether waiting may mend it: the connection is cut, or leads to a server that can only be read by now."""
    orig = getattr(error, "orig", None)
    state = getattr(orig, "sqlstate", None) or getattr(
        orig, "pgcode", None
    )  # psycopg's, psycopg2's
    return (
        isinstance(error, _AWAY)
        or getattr(error, "connection_invalidated", False)
        or state in _AWAY_STATES
    )


def _refuse_damaged(error: BaseException, database: str | None) -> None:
    name = getattr(getattr(error, "orig", None), "sqlite_errorname", "")
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        what = f"{database!r} is damaged ({first_line(error)})"
        raise StoreDamaged(
            f"{what}: restore a copy of it, or take another --name or --storage."
        ) from error


def _disk_failure(error: BaseException, database: str | None) -> str:
    """In a line, what of SQLite's errors no waiting mends: a full disk, one that fails, one that is read-only."""
    name = getattr(getattr(error, "orig", None), "sqlite_errorname", "")
    if not name.startswith(("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY")):
        return ""
    place = Path(database or "").parent
    return f"{str(database)!r} cannot be written ({first_line(error)}), {disk_usage(place).free:,} bytes are free there"


def _owner() -> dict[str, Any]:
    # Optuna's own time of the start is local, and machines may be in different zones.
    owner = {
        "host": this_host(),
        "pid": os.getpid(),
        "begun": process_start(os.getpid()),
        "since": time.time(),
    }
    return owner | STARTER


def is_here(trial: FrozenTrial) -> bool:
    """Whether it runs, or ran, on this machine."""
    return trial.user_attrs.get("host") == this_host()


def is_alive_here(trial: FrozenTrial) -> bool:
    """Whether its process lives on this machine."""
    return is_here(trial) and is_alive(trial.user_attrs["pid"], trial.user_attrs.get("begun"))


def engine_options(url: URL) -> dict[str, Any]:
    """SQLAlchemy's options for a connection whose end is noticed, also where the server's machine is gone."""
    libpq = {
        "connect_timeout": 3,
        "tcp_user_timeout": 4_000,  # ms; the kernel's own is a quarter of an hour. After a signal there are ten seconds
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
    }
    knows = url.get_backend_name() == "postgresql" and url.get_driver_name() in (
        "psycopg",
        "psycopg2",
    )
    arguments = (
        {name: value for name, value in libpq.items() if name not in url.query} if knows else {}
    )
    # What the pool tells, with a traceback, comes after what it raises: a signal, mostly, that tore a query.
    logging.getLogger("sqlalchemy.pool.impl.QueuePool.kdnas").setLevel(logging.CRITICAL)
    # By the first of them, a connection that the server has cut meanwhile is noticed before it is used.
    return {"pool_pre_ping": True, "pool_logging_name": "kdnas", "connect_args": arguments}


class PatientStorage(RDBStorage):
    """Optuna's RDBStorage, for a database that may be away: ``PATIENCE_SECONDS`` of trying, then ``StoreAway``.

    Args:
        url: SQLAlchemy's.
        successor: gives, for a trial whose process, somewhere, has stopped beating, what is queued in its place.
    """

    def __init__(self, url: str, successor: Callable[[FrozenTrial], FrozenTrial | None]) -> None:
        self.successor = successor
        self.folder: Path | None = (
            None  # of the run, where results are kept that the database could not take
        )
        self.foreign: set[tuple[Path, int]] = (
            set()
        )  # those that are not this study's, with their times
        self.successors: dict[
            int, FrozenTrial
        ] = {}  # what is queued at the instant at which a trial ends
        self.away: StoreAway | None = None
        self.stopped: BaseException | None = (
            None  # by a signal, mostly: what comes now must be quick
        )
        self.gave_up: StoreAway | None = None  # after that nothing is asked of it any more
        self.seen_dead: dict[
            int, float
        ] = {}  # since when, of trials that another process should end
        self.written: dict[int, list[list[Any]]] = {}  # what this process has written of its trials
        self.skipped: set[int] = set()  # the trials of which the database has not taken all of that
        engine = engine_options(make_url(url))
        super().__init__(
            url, engine, heartbeat_interval=HEARTBEAT_SECONDS, grace_period=GRACE_SECONDS
        )

    def is_watched(self, trial: FrozenTrial) -> bool:
        """Whether another process, which knows what that of the trial died of, can be expected to end it."""
        starter, begun = (trial.user_attrs.get(name) for name in ("starter", "starter_begun"))
        if starter in (None, os.getpid()) or not is_alive(starter, begun):
            return False
        return (
            time.monotonic()
            < self.seen_dead.setdefault(trial._trial_id, time.monotonic()) + WATCHER_SECONDS
        )

    create_new_study = _patient(RDBStorage.create_new_study)
    get_study_id_from_name = _patient(RDBStorage.get_study_id_from_name)
    get_study_name_from_id = _patient(RDBStorage.get_study_name_from_id)
    get_study_directions = _patient(RDBStorage.get_study_directions)
    get_study_user_attrs = _patient(RDBStorage.get_study_user_attrs)
    get_study_system_attrs = _patient(RDBStorage.get_study_system_attrs)
    set_study_user_attr = _patient(RDBStorage.set_study_user_attr)
    set_study_system_attr = _patient(RDBStorage.set_study_system_attr)
    _set_trial_param = _patient(RDBStorage._set_trial_param)
    set_trial_intermediate_value = _patient(RDBStorage.set_trial_intermediate_value)
    set_trial_user_attr = _patient(RDBStorage.set_trial_user_attr)
    set_trial_system_attr = _patient(RDBStorage.set_trial_system_attr)
    get_trial_user_attrs = _patient(RDBStorage.get_trial_user_attrs)
    get_trial_system_attrs = _patient(RDBStorage.get_trial_system_attrs)
    get_trial_id_from_study_id_trial_number = _patient(
        RDBStorage.get_trial_id_from_study_id_trial_number
    )
    get_trial = _patient(RDBStorage.get_trial)
    _get_trials = _patient(RDBStorage._get_trials)
    _get_best_trial_id = _patient(RDBStorage._get_best_trial_id)

    # A trial runs and has the number of its process at the same instant, so whoever finds it knows whether it is alive.
    # What is to follow one that ends is queued at the same instant, so it is never lost, nor tried by two.

    @_patient
    def _create_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None = None
    ) -> FrozenTrial:
        if template_trial is None:
            template_trial = optuna.trial.create_trial(
                state=TrialState.RUNNING, user_attrs=_owner()
            )
        return super()._create_new_trial(study_id, template_trial)

    @_patient
    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        if state == TrialState.RUNNING:
            session = self.scoped_session()  # this thread's, whose transaction the call below ends
            try:
                trial = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
                for name, value in _owner().items() if trial.state == TrialState.WAITING else ():
                    self._set_trial_attr_without_commit(
                        session, models.TrialUserAttributeModel, trial_id, name, value
                    )
            except BaseException:
                session.rollback()
                raise
        if state.is_finished() and trial_id in self.successors:
            session = self.scoped_session()
            try:
                # Locked before it is read, so of two that end it at once one finds it ended. To say so Optuna reads the
                # trial in this session, which commits what is in it: there must be nothing.
                ended: Any = models.TrialModel.find_or_raise_by_id(
                    trial_id, session, for_update=True
                )
                if not ended.state.is_finished():
                    models.StudyModel.find_or_raise_by_id(ended.study_id, session, for_update=True)
                    self._get_prepared_new_trial(ended.study_id, self.successors[trial_id], session)
            except BaseException:
                session.rollback()
                raise
        done = super().set_trial_state_values(trial_id, state, values)
        self.successors.pop(trial_id, None)
        return done

    @_patient
    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        take_up(self, study_id)
        stale = super()._get_stale_trial_ids(study_id)
        # One whose machine died before the first beat has none, and Optuna passes it over.
        with self.scoped_session() as session:
            rows: Any = session.query(models.TrialModel).filter_by(
                study_id=study_id, state=TrialState.RUNNING
            )
            silent = [row.trial_id for row in rows.filter(~models.TrialModel.heartbeats.any())]
        latest = time.time() - GRACE_SECONDS
        stale += [
            number
            for number in silent
            if self.get_trial(number).user_attrs.get("since", latest) < latest
        ]
        # Here we can look: a process that is stopped, or a clock that was set, must not cost a trial.
        trials = {trial_id: self.get_trial(trial_id) for trial_id in stale}
        dead = {trial_id: trial for trial_id, trial in trials.items() if not is_alive_here(trial)}
        for trial_id, trial in dead.items():
            if (successor := self.successor(trial)) is not None:
                self.successors[trial_id] = successor
        return list(dead)

    def record_heartbeat(self, trial_id: int) -> None:
        """Tell that a trial is alive; where the database is away, the next beat does."""
        try:
            super().record_heartbeat(trial_id)
        except (StorageInternalError, DBAPIError) as error:
            self.engine.dispose()  # the next one, by another connection
            log.debug("No heartbeat of trial %d: %s", trial_id, error)


def sqlite_url(path: Path) -> str:
    """The URL of an SQLite file, whatever its path holds."""
    return URL.create("sqlite", database=str(path)).render_as_string()


def _literal(url: str) -> str:
    """A URL whose braces are no template of Optuna's."""
    return url.replace("{", "{{").replace("}", "}}")


def connect(
    url: str, successor: Callable[[FrozenTrial], FrozenTrial | None], patience: float = 0.0
) -> PatientStorage:
    """The database of a study, its tables made where they are not there.

    Args:
        url: SQLAlchemy's.
        successor: as ``PatientStorage`` takes it.
        patience: seconds to wait for a database that was there before.

    Raises:
        UserError: it cannot be reached, its file is damaged, or its driver is not installed.
        StoreAway: its disk is full, or fails; or it has stayed away.
    """
    storage = _reached(url, partial(PatientStorage, _literal(url), successor), patience)
    if storage.engine.name == "sqlite":
        # It locks at the first write of a transaction: two workers would take one trial out of the queue.
        event.listen(
            storage.engine,
            "begin",
            lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"),
        )
    return storage


def check_reachable(url: str) -> None:
    """Look whether the server of a database answers; nothing is written. Of an SQLite file nothing is known before.

    Raises:
        UserError: it does not, or its driver is not installed.
    """

    def answer() -> None:
        parsed = make_url(url)
        if parsed.get_backend_name() != "sqlite":
            engine = create_engine(parsed, **engine_options(parsed))
            engine.connect().close()
            engine.dispose()

    _reached(url, answer, 0.0)


def _reached(url: str, make: Callable[[], T], patience: float) -> T:
    """What ``make`` gives, which reaches a database; errors and arguments are those of ``connect``."""
    begin, tried = time.monotonic(), False
    while True:
        try:
            return make()
        except ImportError as error:
            reason = first_line(error.__cause__ or error)
            raise UserError(
                f"The database {without_password(url)!r} needs a driver that is not installed ({reason}): "
                "pip install 'kdnas[postgres]', or the driver of another database."
            ) from error
        except RuntimeError as error:  # Optuna's, of tables that another version of it made
            raise UserError(
                f"The database {without_password(url)!r} cannot be used ({first_line(error)})."
            ) from error
        except (SQLAlchemyError, StorageInternalError, ValueError) as error:
            cause = _cause(error)
            if isinstance(cause, DBAPIError):
                _refuse_damaged(cause, make_url(url).database)
                if disk := _disk_failure(cause, make_url(url).database):
                    raise StoreAway(disk) from error
            may_come = patience > 0 and _is_away(cause)
            if may_come and time.monotonic() > begin + patience:
                raise StoreAway(_unanswered(patience, cause)) from error
            # Tried twice in any case: another worker may make the same tables at this moment.
            if not may_come and (tried or not isinstance(cause, DBAPIError)):
                raise UserError(
                    f"The database {without_password(url)!r} cannot be used ({first_line(cause)}): give a URL such as "
                    "postgresql://user:password@host/database of a server that runs."
                ) from error
            tried = True
            time.sleep(1)


def read_study(storage: str | Path, name: str) -> optuna.Study:
    """A study to look at; nothing is written to its database.

    Args:
        storage: SQLAlchemy URL of the database, or the path of an SQLite file.
        name: of the study.

    Raises:
        UserError: there is no such database or no such study, or it cannot be read.
    """
    shown = without_password(str(storage))
    try:
        url = make_url(sqlite_url(storage) if isinstance(storage, Path) else storage)
        if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
            raise UserError(
                f"There is no study in {shown!r}: no search was begun there, or give its --storage."
            )
        there = _literal(url.render_as_string(hide_password=False))
        database = RDBStorage(there, skip_table_creation=True, engine_kwargs=engine_options(url))
        study = optuna.load_study(study_name=name, storage=database)
        study.get_trials(deepcopy=False)
    except KeyError as error:
        raise UserError(
            f"There is no study {name!r} in {shown!r}: give its database with --storage."
        ) from error
    except (SQLAlchemyError, StorageInternalError, RuntimeError, ImportError) as error:
        raise UserError(
            f"The study's database {shown!r} cannot be read ({first_line(error.__cause__ or error)})."
        ) from error
    return study


def without_password(url: str) -> str:
    """A database's URL that may be shown; it may be no URL at all."""
    return re.sub(r"(password=)[^&\s]*", r"\1***", re.sub(r"(//[^:/@]*):.*@", r"\1:***@", url))
