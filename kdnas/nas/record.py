"""What a study knows of architectures: which were trained, what became of each, and what it can answer."""

import hashlib
import math
from collections.abc import Iterable

import optuna
from optuna.study import Study as Study
from optuna.trial import FrozenTrial as FrozenTrial
from optuna.trial import TrialState, create_trial

from kdnas.models.arch import StudentArch
from kdnas.nas.space import SearchSpace
from kdnas.system.errors import CandidateFailed, StoreDamaged, UserError

# What is said of a trial itself, and not of its candidate.
ITS_OWN = {
    "host",
    "pid",
    "begun",
    "since",
    "starter",
    "starter_begun",
    "seconds",
    "retry_of",
    "died",
    "again",
    "unbegun",
    "queued_for",
    "waits",
}


def failure_of(trial: FrozenTrial) -> str | None:
    """Why a failed trial failed by its candidate's own fault; None: something else ended it, and it is tried again."""
    reason = trial.user_attrs.get("failed")
    if (
        trial.state != TrialState.FAIL
        or "not_needed" in trial.user_attrs
        or (reason or "").startswith("interrupted")
    ):
        return None
    if reason is None and {"arch", "retry_of"} <= trial.user_attrs.keys():
        of = f" ({died})" if (died := trial.user_attrs.get("died")) else ""
        return f"its process died{of}, as that of trial {trial.user_attrs['retry_of']} did"
    return reason


def trained(study: Study) -> list[FrozenTrial]:
    """The trials of distinct candidates that were trained to their end."""
    return [trial for trial in tried(study) if trial.state == TrialState.COMPLETE]


def tried(study: Study) -> list[FrozenTrial]:
    """The trials of distinct candidates that were trained, to their end or until the pruner had seen enough."""
    first: dict[
        StudentArch, FrozenTrial
    ] = {}  # two workers may have been at the same one at the same time
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
        was_trained = trial.state == TrialState.COMPLETE or trial.intermediate_values
        if was_trained and "twin_of" not in trial.user_attrs:
            first.setdefault(StudentArch.from_dict(trial.user_attrs["arch"]), trial)
    return list(first.values())


def is_complete(study: Study, space: SearchSpace, n_trials: int) -> bool:
    """Whether so many candidates were tried, or the space has no more."""
    return len(tried(study)) >= n_trials or len(seen(study)) >= len(space)


def seen(study: Study) -> set[StudentArch]:
    """The architectures that the study can answer."""
    return {StudentArch.from_dict(trial.user_attrs["arch"]) for trial in settled(study)}


def settled(study: Study) -> list[FrozenTrial]:
    """Trials that say something about their architecture: finished, refused, or failed by its own fault."""
    trials = study.get_trials(deepcopy=False)
    again = superseded(trials)
    finished = [
        t
        for t in trials
        if t.state.is_finished() and t.number not in again and "arch" in t.user_attrs
    ]
    return [t for t in finished if t.state != TrialState.FAIL or failure_of(t)]


def superseded(trials: Iterable[FrozenTrial]) -> set[int]:
    """The numbers of trials that were broken off, and in whose place others are queued."""
    return {trial.user_attrs["again"] for trial in trials if "again" in trial.user_attrs}


def failed(study: Study) -> list[FrozenTrial]:
    """The trials of distinct candidates that failed by their own fault."""
    return [
        t for t in settled(study) if t.state == TrialState.FAIL and "twin_of" not in t.user_attrs
    ]


def best_of(study: Study, space: SearchSpace, seconds: float = math.inf) -> FrozenTrial:
    """The best feasible trial of a search that is over.

    Args:
        study: of the search.
        space: of the search.
        seconds: that it had.

    Raises:
        UserError: no candidate meets the constraints, none was trained in the time, or the pruner ended all.
        CandidateFailed: nothing could be trained, and not for the constraints alone; with the last reason.
    """
    try:
        best = study.best_trial
    except StoreDamaged:
        raise
    except ValueError as error:  # no trial is complete and feasible
        if failed(study) and not tried(study):
            reason = failure_of(failed(study)[-1])
            raise CandidateFailed(
                f"Every candidate failed; the last one: {reason}. None is tried again: mend it, then --force-new."
            ) from error
        if tried(study) and not trained(study):
            raise UserError(
                "The pruner ended every candidate: give another, or --pruner none."
            ) from error
        if len(seen(study)) < len(space) and math.isfinite(seconds):
            minutes = f"{seconds / 60:g}"
            raise UserError(
                f"No student within the budget was trained in {minutes} minutes: give more."
            ) from error
        raise UserError(f"None of the {len(space)} students meets the budget: relax it.") from error
    return study.get_trials(deepcopy=False)[best.user_attrs.get("twin_of", best.number)]


def find_twin(study: Study, arch: StudentArch) -> FrozenTrial | None:
    """The trial from which this architecture is answered."""
    wanted = arch.to_dict()
    for trial in settled(study):
        if trial.user_attrs["arch"] == wanted and "twin_of" not in trial.user_attrs:
            return trial
    return None


def rivals(study: Study, arch: StudentArch, number: int) -> list[FrozenTrial]:
    """Trials before this one in which other workers train the same at this moment."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return [t for t in running if t.number < number and t.user_attrs.get("arch") == arch.to_dict()]


def answer(trial: optuna.Trial, twin: FrozenTrial) -> float:
    """End a trial as its twin ended."""
    trial.set_user_attr(
        "twin_of", twin.number
    )  # first: after a kill, what is copied below is not taken for its own
    for name, value in twin.user_attrs.items():
        if name not in ITS_OWN:
            trial.set_user_attr(name, value)
    for name, violation in twin.constraints.items():
        trial.set_constraint(name, violation)
    if twin.state == TrialState.PRUNED:
        raise optuna.TrialPruned(f"as trial {twin.number}")
    if twin.state == TrialState.FAIL:
        raise CandidateFailed(failure_of(twin))
    assert twin.value is not None
    return twin.value


def unseen(study: Study, space: SearchSpace, turn: int) -> FrozenTrial | None:
    """A trial to be queued, of an architecture that the study does not know, the same one for the same turn."""
    known = seen(study)
    found = [arch for arch in space if arch not in known]
    others = study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING))
    taken = [
        trial.user_attrs.get("arch", trial.system_attrs.get("fixed_params")) for trial in others
    ]
    found = [arch for arch in found if arch.to_dict() not in taken]
    if not found:
        return None
    draw = int.from_bytes(hashlib.sha256(str(turn).encode()).digest()[:8], "big")
    system_attrs = {"fixed_params": found[draw % len(found)].to_dict()}
    return create_trial(
        state=TrialState.WAITING, system_attrs=system_attrs, user_attrs={"queued_for": turn}
    )
