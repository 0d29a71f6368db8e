"""The outcome of a trial as a file, and a study's best, failed and repeated trials."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.study import Study as Study
from optuna.trial import FrozenTrial as FrozenTrial
from optuna.trial import TrialState

from kdnas.deploy.latency import is_unsteady
from kdnas.models.arch import StudentArch
from kdnas.nas.controller import NUM_CANDIDATES
from kdnas.nas.space import SearchSpace
from kdnas.system.errors import CandidateFailed, UserError, first_line
from kdnas.system.files import read_json

ARCH = [field.name for field in fields(StudentArch)]
MEASURED = ["loss", "contextual_share", "sentence_r2", "latency_ms", "latency_iqr_ms", "speedup"]
RANKED = ["predicted_reward", "episode", "best_so_far", "episode_best", "previous_best"]
COLUMNS = [
    "number",
    "state",
    *ARCH,
    *MEASURED,
    "num_parameters",
    "reward",
    *RANKED,
    "front",
    "seconds",
    "reason",
]


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: what its ``result.json`` holds, and what the study is told.

    Args:
        params: the shape, as ``StudentArch.to_dict`` gives it.
        state: the name of Optuna's: ``COMPLETE``; ``PRUNED``, by the budget or by the pruner; or
            ``FAIL``.
        value: the reward of a trial that is ``COMPLETE``.
        attrs: everything that was measured; why it was ``refused``, ``stopped_early`` or
            ``failed``, if it was; ``twin_of``, the trial that it repeats.
        constraints: how far it is beyond the budget; 0 or less: within.
        reports: what the pruner was told, by epoch.
        started: in seconds since 1970.
        ended: the same.
    """

    params: dict[str, Any]
    state: str
    value: float | None = None
    attrs: dict[str, Any] = field(default_factory=dict)
    constraints: dict[str, float] = field(default_factory=dict)
    reports: dict[str, float] = field(default_factory=dict)
    started: float = 0.0
    ended: float = 0.0

    def is_of(self, trial: FrozenTrial) -> bool:
        """Whether a study's trial ended so."""
        is_alike = self.state != "COMPLETE" or trial.value == self.value
        return is_alike and trial.state.name == self.state

    @classmethod
    def read(cls, path: Path) -> "Outcome":
        """What a ``result.json`` holds.

        Raises:
            UserError: it is damaged, or no trial's.
        """
        try:
            return cls(**read_json(path))
        except TypeError as error:
            raise UserError(
                f"{str(path)!r} is no result of a trial ({first_line(error)}): delete it, and the "
                "candidate is trained again."
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


def results_in(folder: Path) -> dict[int, Outcome]:
    """The outcome of every trial of a run that has ended, by its number."""
    paths = sorted(folder.glob("trial_*/result.json"))
    return {int(path.parent.name[6:]): Outcome.read(path) for path in paths}


def num_begun(folder: Path) -> int:
    """How many trials of a run were begun, whether they have ended or not."""
    return 1 + max((int(path.name[6:]) for path in folder.glob("trial_*")), default=-1)


def arch_of(trial: FrozenTrial) -> StudentArch:
    """The shape that a trial is about."""
    return StudentArch.from_dict(trial.user_attrs.get("arch") or trial.params)


def tried(study: Study) -> list[FrozenTrial]:
    """The trials of distinct candidates that were trained, to their end or until they were pruned."""
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    attrs_of_none = {"twin_of", "refused"}
    return [trial for trial in ended if not attrs_of_none & trial.user_attrs.keys()]


def trained(study: Study) -> list[FrozenTrial]:
    """The trials of distinct candidates that were trained to their end."""
    return [trial for trial in tried(study) if trial.state == TrialState.COMPLETE]


def failed(study: Study) -> list[FrozenTrial]:
    """The trials of distinct candidates that failed."""
    ended = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    return [trial for trial in ended if "failed" in trial.user_attrs and not is_repeated(trial)]


def is_repeated(trial: FrozenTrial) -> bool:
    """Whether a trial only repeats another."""
    return "twin_of" in trial.user_attrs


def known(study: Study) -> dict[StudentArch, FrozenTrial]:
    """The first trial of each shape that was proposed, ended or not."""
    first: dict[StudentArch, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        if len(trial.params) == len(ARCH) and not is_repeated(trial):
            first.setdefault(arch_of(trial), trial)
    return first


def unseen(study: Study, space: SearchSpace, number: int) -> StudentArch | None:
    """A shape that was not proposed yet, the same one for the same trial; None where there is none."""
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    queued = [trial.system_attrs.get("fixed_params") for trial in waiting]
    seen = known(study)
    left = [arch for arch in space if arch not in seen and arch.to_dict() not in queued]
    draw = int.from_bytes(hashlib.sha256(str(number).encode()).digest()[:8], "big")
    return left[draw % len(left)] if left else None


def is_complete(study: Study, space: SearchSpace, n_trials: int) -> bool:
    """Whether so many candidates were tried, or the space has no more."""
    ended = [trial for trial in known(study).values() if trial.state.is_finished()]
    return len(tried(study)) >= n_trials or len(ended) >= len(space)


def best_trial(study: Study) -> FrozenTrial | None:
    """The best candidate within the budget so far; None where there is none."""
    try:
        best = study.best_trial
    except ValueError:  # Optuna's: no trial is complete and feasible
        return None
    return study.get_trials(deepcopy=False)[best.user_attrs.get("twin_of", best.number)]


def best_of(study: Study, space: SearchSpace, seconds: float = math.inf) -> FrozenTrial:
    """The best candidate of a search that is over.

    Args:
        study: of the search.
        space: of the search.
        seconds: that it had.

    Raises:
        UserError: no candidate meets the budget, none was trained in time, or all were pruned.
        CandidateFailed: every candidate failed; with the last reason.
    """
    if (best := best_trial(study)) is not None:
        return best
    if failed(study) and not tried(study):
        raise CandidateFailed(
            f"Every candidate failed; the last one: {failed(study)[-1].user_attrs['failed']}. "
            "None is tried again: mend it, then --force-new."
        )
    if tried(study) and not trained(study):
        raise UserError("The pruner ended every candidate: give another, or --pruner none.")
    if len(known(study)) < len(space) and math.isfinite(seconds):
        minutes = f"{seconds / 60:g}"
        raise UserError(
            f"No student within the budget was trained in {minutes} minutes: give a longer "
            "time_budget."
        )
    raise UserError(f"None of the {len(space)} students meets the budget: relax it.")


def begun(study: Study) -> list[FrozenTrial]:
    """The trials that were proposed, without those that only wait in the queue."""
    trials = study.get_trials(deepcopy=False)
    return [t for t in trials if t.state != TrialState.WAITING and (t.params or t.user_attrs)]


def in_words(trial: FrozenTrial) -> str:
    """What became of a trial."""
    if is_repeated(trial):
        return "repeated"
    if trial.state == TrialState.PRUNED:
        return "refused" if "refused" in trial.user_attrs else "stopped early"
    words = {TrialState.COMPLETE: "finished", TrialState.FAIL: "failed"}
    return words.get(trial.state, "running")


def reason_in(attrs: Mapping[str, Any]) -> str | None:
    """Why a trial was not trained to its end, if it was not."""
    if "twin_of" in attrs:
        return f"same shape as trial {attrs['twin_of']}"
    return attrs.get("refused") or attrs.get("stopped_early") or attrs.get("failed")


def line(trial: FrozenTrial) -> str:
    """What a trial that ended was, and what became of it."""
    attrs = trial.user_attrs
    head = f"trial {trial.number:3d}  {arch_of(trial)}: "
    if "twin_of" in attrs:
        return f"{head}known from trial {attrs['twin_of']}"
    for word, key in (
        ("refused", "refused"),
        ("failed", "failed"),
        ("stopped early", "stopped_early"),
    ):
        if key in attrs:
            return f"{head}{word}, {attrs[key]}"
    unsteady = " (unsteady)" if has_spread(trial, "", "teacher_") else ""
    return (
        f"{head}loss {attrs['loss']:.3f}, contextual share {attrs['contextual_share']:.2f}, "
        f"{attrs['speedup']:.1f}x{unsteady}, reward {trial.value:.4f}, {attrs['seconds']:.0f} s"
    )


def has_spread(trial: FrozenTrial, *whose: str) -> bool:
    """Whether a latency of a trial spread by more than a tenth: the student's (""), or its teacher's ("teacher_")."""
    get = trial.user_attrs.get
    return any(
        is_unsteady(get(f"{who}latency_ms", math.inf), get(f"{who}latency_iqr_ms", 0.0))
        for who in whose
    )


def trials_frame(study: optuna.Study) -> pd.DataFrame:
    """Every trial of a study in one row, for ``trials.csv``.

    Args:
        study: its trials may have finished, been refused or failed, or still run: what is not known
            stays empty. Those that only wait in the queue are left out.

    Returns:
        Columns ``number, state``, the five fields of the shape, ``loss, contextual_share,
        sentence_r2, latency_ms, latency_iqr_ms, speedup, num_parameters, reward, predicted_reward,
        episode, best_so_far, episode_best, previous_best, front, seconds, reason``.
        ``predicted_reward`` is what an LSTM controller expected of a student that it picked. An
        episode is as many trained candidates as the study's attribute ``num_candidates`` says; of
        it there are, as candidates ended, the best rewards so far: of all, of this episode, and of
        the one before.
        ``front`` names what the student is on the Pareto front of, beside the loss: ``latency``,
        ``parameters``, both, or nothing.
    """
    rows = []
    for trial in begun(study):
        attrs = trial.user_attrs
        found = {"number": trial.number, "state": trial.state.name, "reason": reason_in(attrs)}
        rows.append(attrs | trial.params | attrs.get("arch", {}) | found)
    whole = dict.fromkeys((*ARCH[:4], "num_parameters", "episode"), "Int64")
    real = dict.fromkeys((*MEASURED, "reward", "seconds", RANKED[0], *RANKED[2:]), "float64")
    frame = pd.DataFrame(rows, columns=COLUMNS).astype(whole | real)
    ended = {trial.number: trial.datetime_complete for trial in begun(study)}
    done = frame[_is_trained(frame)]
    rewards = done.sort_values("number", key=lambda numbers: numbers.map(ended))["reward"]
    episode = np.arange(len(rewards)) // study.user_attrs.get("num_candidates", NUM_CANDIDATES)
    by_episode = rewards.groupby(episode)
    frame.loc[rewards.index, "episode"] = episode + 1
    frame.loc[rewards.index, "best_so_far"] = rewards.cummax()
    frame.loc[rewards.index, "episode_best"] = by_episode.cummax()
    frame.loc[rewards.index, "previous_best"] = by_episode.max().shift().reindex(episode).to_numpy()
    fronts = {"latency": front(frame, "latency_ms"), "parameters": front(frame, "num_parameters")}
    frame["front"] = [
        " and ".join(name for name, front in fronts.items() if i in front) or None
        for i in frame.index
    ]
    return frame


def front(frame: pd.DataFrame, size: str) -> pd.Index:
    """The trained candidates that no other beats in both loss and size, the smallest first.

    Args:
        frame: of ``trials_frame``.
        size: the column of the other measure.
    """
    trained = frame[_is_trained(frame)].sort_values([size, "loss"])
    return trained.index[trained["loss"] < trained["loss"].cummin().shift(fill_value=math.inf)]


def _is_trained(frame: pd.DataFrame) -> pd.Series:
    is_complete = (frame["state"] == "COMPLETE") & ~is_twin(frame)
    return is_complete & np.isfinite(frame["loss"]) & frame["reward"].notna()


def is_twin(frame: pd.DataFrame) -> pd.Series:
    """Which rows only repeat another."""
    return frame["reason"].fillna("").str.startswith("same shape")
