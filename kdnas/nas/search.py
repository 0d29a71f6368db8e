"""The one search loop. It is handed ``evaluate``, and knows nothing of models."""

import errno
import logging
import math
import os
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from kdnas.models.arch import StudentArch
from kdnas.nas.record import (
    answer,
    best_of,
    failed,
    find_twin,
    is_complete,
    rivals,
    seen,
    tried,
    unseen,
)
from kdnas.nas.sampler import make_sampler, turn_of
from kdnas.nas.space import SearchSpace
from kdnas.nas.storage import (
    PATIENCE_SECONDS,
    PatientStorage,
    connect,
    is_alive_here,
    is_here,
)
from kdnas.nas.unsent import keep_result, take_up
from kdnas.system.errors import (
    CandidateFailed,
    StoreAway,
    StoreDamaged,
    UserError,
    as_raised,
    causes,
    first_line,
    reason_of,
)
from kdnas.system.signals import Terminated
from kdnas.system.supervisor import EARLIER, candidate

log = logging.getLogger(__name__)

Evaluate = Callable[[optuna.Trial, StudentArch], float]

# Of the disk, which is not the candidate's fault; others, such as ENOMEM, are.
DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.ESTALE,
    errno.EACCES,
    errno.EPERM,
}
# So many failures before the first success are no bad luck: the search stops and says why.
MOST_FAILURES = 5


def open_study(
    storage: str,
    name: str,
    identity: Mapping[str, Any],
    sampler: BaseSampler | None = None,
    pruner: BasePruner | None = None,
    folder: Path | None = None,
    was_there: bool = False,
) -> Study:
    """Create a study, or go on with it.

    Args:
        storage: SQLAlchemy URL of the database.
        name: of the study.
        identity: everything that a trial's value depends on, as plain JSON; kept in the study.
        sampler: proposes; TPE by default. One that is seeded must not repeat itself in a second worker or after a
            resume: see ``PerTrialSeed``.
        pruner: ends candidates early; none by default.
        folder: of the run, where results are kept that the database could not take.
        was_there: whether this command has reached the database before: then it is waited for.

    Raises:
        UserError: the database cannot be reached, or the study is there and its identity differs (each difference is
            shown), or it is not, though the folder holds candidates of it.
        StoreAway: it was there, and has stayed away.
    """
    connected = connect(storage, _successor, PATIENCE_SECONDS if was_there else 0.0)
    try:
        connected.get_study_id_from_name(name)
    except KeyError:
        if folder and any(folder.glob("trial_*")):
            raise UserError(
                f"{str(folder)!r} holds candidates of a search, but its database has no study {name!r} any more: "
                f"restore a copy of it, give the --storage that it was, or a new name, such as --name {name}-2."
            ) from None
    study = optuna.create_study(
        storage=connected,
        study_name=name,
        sampler=sampler or make_sampler("tpe", seed=0),
        pruner=pruner
        or optuna.pruners.NopPruner(),  # Optuna's own default prunes by the median, after one epoch
        direction="maximize",
        load_if_exists=True,
    )
    known = study.user_attrs.get("identity")
    if known is None:
        study.set_user_attr("identity", dict(identity))
    else:
        refuse_difference(name, known, identity)
    connected.folder = folder
    bury_dead(study, died_of=EARLIER.deaths.get)
    return study


def refuse_difference(
    name: str, known: Mapping[str, Any], asked: Mapping[str, Any], remedy: str = ""
) -> None:
    """Refuse to go on under a name that stands for something else; ``remedy``: one more, where there is one.

    Raises:
        UserError: with every key that differs, what is known and what is asked for, and a new name.
    """
    if shown := differences(known, asked):
        raise UserError(
            f"The run {name!r} was made with other settings ({shown}): "
            f"go back to them, {remedy}or give a new name, such as --name {name}-2 (--force-new does)."
        )


def differences(known: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Every key of two settings that differs, what is known and what is asked for; empty where none does."""
    there, now = (
        {key: repr(value) for key, value in settings.items()} for settings in (known, asked)
    )
    keys = [key for key in {**known, **asked} if known.get(key) != asked.get(key)]
    return "; ".join(
        f"{key}: {there.get(key, 'the default')} there, {now.get(key, 'the default')} now"
        for key in keys
    )


def bury_dead(
    study: Study, number: int | None = None, died_of: Callable[[int], str | None] | None = None
) -> set[int]:
    """End the trials of dead processes of this machine now; the heartbeat ends those of other machines later.

    A result that was kept of one is its end.

    Args:
        study: whose.
        number: of the one trial that this process runs; None: it has none yet.
        died_of: gives what a process died of, by its number, as far as that is known.

    Returns:
        The processes whose trials were ended.
    """
    buried: set[int] = set()
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    store = _store(study)
    dead = {
        t.number
        for t in running
        if is_here(t) and not is_alive_here(t) and not (store and store.is_watched(t))
    }
    if store:  # who is dead by now keeps nothing more
        take_up(store, study._study_id)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        pid: int = trial.user_attrs.get("pid", 0)
        if is_here(trial) and pid == os.getpid() and number is not None:
            if trial.number != number:  # it was begun here, and the answer that said so was lost
                why = "interrupted (the database did not answer); tried again"
                end_trial(study, trial, "failed", why, _again(trial))
        elif trial.number in dead or is_here(trial) and pid == os.getpid():
            buried.add(pid)
            end_trial(study, trial, "died", died_of and died_of(pid) or "", _successor(trial))
    return buried


def end_trial(
    study: Study,
    trial: FrozenTrial,
    attribute: str,
    reason: str,
    successor: FrozenTrial | None = None,
) -> None:
    """Fail a trial of a process that is no more, and write down why, unless another worker was first.

    Args:
        study: whose.
        trial: which.
        attribute: the name of the reason.
        reason: in words; may be empty.
        successor: queued in its place.
    """
    store = _store(study)
    try:
        if store and successor:
            store.successors[trial._trial_id] = successor
        if reason:
            optuna.Trial(study, trial._trial_id).set_user_attr(attribute, reason)
        study.tell(trial.number, state=TrialState.FAIL)
    except StoreDamaged:
        raise
    except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
        if store:
            store.successors.pop(trial._trial_id, None)


def end_interrupted(study: Study, pids: Collection[int | None], stop: BaseException) -> None:
    """Have the trials tried again that processes of this machine were at, and will not end, when they were stopped.

    Args:
        study: whose; where its database is away, the next start does it.
        pids: the processes.
        stop: what stopped them; from now on the database is not waited for.
    """
    if store := _store(study):
        store.stopped = stop
    with suppress(StoreAway):
        if store:
            take_up(store, study._study_id)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if is_here(trial) and trial.user_attrs["pid"] in pids:
                end_trial(study, trial, "failed", _interrupted(stop), _again(trial))


def _interrupted(stop: BaseException) -> str:
    return f"interrupted ({first_line(stop)}); tried again"


def _successor(trial: FrozenTrial) -> FrozenTrial | None:
    """What is queued in place of a trial whose process died: the same, once; again, where it was being stopped."""
    if (
        "twin_of" in trial.user_attrs
    ):  # answering it has no dangers, and what is to follow it is not queued yet
        return _again(trial)
    if reason := trial.user_attrs.get("failed"):
        return _again(trial) if reason.startswith("interrupted") else None
    had_begun = "arch" in trial.user_attrs
    if ("retry_of" if had_begun else "unbegun") in trial.user_attrs:
        return None
    log.info("Trial %d died with its process; it is tried again.", trial.number)
    return _again(trial, **({"retry_of": trial.number} if had_begun else {"unbegun": True}))


def _again(trial: FrozenTrial, **attrs: Any) -> FrozenTrial:
    """A trial that was broken off, to be queued; where it had no architecture, the sampler proposes the same again."""
    params = (
        trial.params if "arch" in trial.user_attrs else trial.system_attrs.get("fixed_params", {})
    )
    known = {name: trial.user_attrs[name] for name in ("retry_of",) if name in trial.user_attrs}
    system_attrs, user_attrs = {"fixed_params": params}, {"again": trial.number, **known, **attrs}
    return create_trial(state=TrialState.WAITING, system_attrs=system_attrs, user_attrs=user_attrs)


def search(
    evaluate: Evaluate,
    space: SearchSpace,
    study: Study,
    n_trials: int,
    callbacks: Sequence[Callable[[Study, FrozenTrial], None]] = (),
    seconds: float = math.inf,
    folder: Path | None = None,
) -> FrozenTrial:
    """Propose, evaluate, tell, until ``n_trials`` distinct candidates are trained in all, or the space has no more.

    An architecture that the study knows is answered from its record, and an unseen one is put next in the queue. A
    candidate that raises is a failed trial with its reason; the search goes on.

    Args:
        evaluate: the reward of an architecture. May raise ``optuna.TrialPruned``; ``trial.set_constraint`` for budgets.
        space: what may be proposed.
        study: from ``open_study``; direction maximize.
        n_trials: a total over all starts and workers; candidates that the pruner ended count.
        callbacks: called after each trial, as Optuna's.
        seconds: of wall clock; no candidate is begun later, and the one that runs is finished.
        folder: of the run, for a result that the database cannot take.

    Returns:
        The best feasible trial.

    Raises:
        UserError: ``n_trials`` is below 1, or no candidate meets the constraints.
        CandidateFailed: nothing could be trained, and not for the constraints alone; with the last reason.
        StoreAway: the database is away.
        StoreDamaged: its file is damaged.
    """
    if n_trials < 1:
        raise UserError(f"n_trials is {n_trials}: give at least 1.")
    end = time.monotonic() + seconds
    current: list[optuna.Trial] = []
    result: list[tuple[optuna.Trial, float]] = []  # the last

    def objective(trial: optuna.Trial) -> float:
        current[:] = [trial]
        with _tried_again(study, trial):
            bury_dead(study, trial.number)
            arch = space.suggest(trial)
            if not _is_needed(study, space, trial.number, n_trials, end):
                raise _not_needed(trial, "others train the last candidates, or the time is over")
            trial.set_user_attr("arch", arch.to_dict())
            twin, others = find_twin(study, arch), rivals(study, arch, trial.number)
            if twin is not None or others:
                turn = turn_of(study, trial._cached_frozen_trial)
                _queue_at_its_end(study, trial, unseen(study, space, turn))
            if twin is not None:
                return answer(trial, twin)
            if others:
                raise _not_needed(trial, f"trial {others[0].number} trains the same")
            try:
                with candidate():
                    value = evaluate(trial, arch)
                if not math.isfinite(value):
                    raise CandidateFailed(f"the reward is {value}")
                result[:] = [(trial, float(value))]
                return value
            except Exception as error:  # whatever a candidate dies of, the search goes on
                for cause in causes(
                    error
                ):  # an error keeps what its frames hold for as long as it lives
                    traceback.clear_frames(cause.__traceback__)
                if isinstance(error, (optuna.TrialPruned, StoreAway, StoreDamaged)):
                    raise
                if isinstance(error, OSError):
                    is_loader_s, error = str(error).startswith("Caught "), as_raised(error)
                    if error.errno in DISK_ERRORS or (error.errno is None and is_loader_s):
                        raise error
                if "killed by signal: Terminated" in str(
                    error
                ):  # a loader's worker, of which the signal came first
                    raise Terminated from error
                trial.set_user_attr("failed", reason := reason_of(error))
                raise CandidateFailed(reason) from error

    def is_at_end() -> bool:
        return is_over(study, space, n_trials) or time.monotonic() > end

    def stop_at_end(study: Study, trial: FrozenTrial) -> None:
        if is_at_end():
            study.stop()

    while not is_at_end():
        try:
            study.optimize(objective, catch=(CandidateFailed,), callbacks=[*callbacks, stop_at_end])
        except (Exception, KeyboardInterrupt) as error:
            store, earlier = _store(study), list(causes(error))
            # Optuna's own error follows where it cannot tell, or is stopped while it does.
            interruption, away = (
                next((cause for cause in earlier if isinstance(cause, kind)), None)
                for kind in (
                    KeyboardInterrupt,
                    (StoreAway, StoreDamaged),
                )  # a full disk can be read: it may be over
            )
            stop = interruption or ((store.stopped or store.away or away) if store else None)
            if store is None or stop is None:
                if not any(map(_was_given_up, earlier)):
                    raise
                log.warning(
                    "Trial %d was given up by another machine, which has it tried again.",
                    current[0].number,
                )
                continue
            kept = [
                keep_result(
                    folder,
                    study.study_name,
                    trial.number,
                    written,
                    value,
                    trial.user_attrs.get("since"),
                )
                for trial, value in result
                if folder and (written := store.written.get(trial._trial_id)) is not None
            ]
            for path in kept:
                log.warning("Kept: %s", path)
            if interruption and not kept:
                end_interrupted(study, {os.getpid()}, stop)
            raise stop from None
    return best_of(study, space, seconds)


def is_over(study: Study, space: SearchSpace, n_trials: int) -> bool:
    """Whether nothing more is to be tried: enough was, or everything fails."""
    only_fails = len(failed(study)) >= MOST_FAILURES and not tried(study)
    return is_complete(study, space, n_trials) or only_fails


def _was_given_up(error: BaseException) -> bool:
    """Whether Optuna says that a trial had ended before it was told so."""
    return isinstance(error, optuna.exceptions.UpdateFinishedTrialError) or str(error).startswith(
        "Cannot tell a "
    )


@contextmanager
def _tried_again(study: Study, trial: optuna.Trial) -> Iterator[None]:
    """Have a trial tried again that something else than its candidate ends."""
    try:
        yield
    except (KeyboardInterrupt, OSError, StoreDamaged) as stop:
        if (store := _store(study)) is not None:  # a study in memory is not gone on with
            store.stopped = stop if isinstance(stop, KeyboardInterrupt) else store.stopped
            store.successors[trial._trial_id] = _again(
                trial._cached_frozen_trial
            )  # first: nothing here can fail
            trial.set_user_attr("failed", _interrupted(stop))
        raise


def _queue_at_its_end(study: Study, trial: optuna.Trial, successor: FrozenTrial | None) -> None:
    """Queue a trial at the instant at which another ends: a kill leaves both to be done, in this order, or none."""
    if successor is not None and (store := _store(study)) is not None:
        store.successors[trial._trial_id] = successor
    elif successor is not None:
        study.add_trial(successor)


def _store(study: Study) -> PatientStorage | None:
    """The database itself, without Optuna's cache."""
    store = getattr(study._storage, "_backend", None)
    return store if isinstance(store, PatientStorage) else None


def _is_needed(study: Study, space: SearchSpace, number: int, n_trials: int, end: float) -> bool:
    """Whether a trial must run for ``n_trials`` to be trained; waits while those before it may make it superfluous."""
    said = False
    while time.monotonic() <= end:
        # Running ones first: one that ends meanwhile counts twice, not never.
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        before = [
            t
            for t in running
            if t.number < number or (t.number > number and "arch" in t.user_attrs)
        ]
        num_missing = min(n_trials - len(tried(study)), len(space) - len(seen(study)))
        if num_missing <= 0 or len(before) < num_missing:
            return num_missing > 0
        if not said:
            log.info(
                "Trial %d waits for %d that run and may be the last ones needed.",
                number,
                len(before),
            )
            said = True
        time.sleep(0.5)
        bury_dead(study, number)
        optuna.storages.fail_stale_trials(study)
    return False


def _not_needed(trial: optuna.Trial, why: str) -> CandidateFailed:
    trial.set_user_attr("not_needed", True)
    log.info("Trial %d is not needed: %s.", trial.number, why)
    return CandidateFailed(f"not needed: {why}")
