"""How a trial ended (``Outcome``), and functions that select and describe a study's trials."""

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
    """How a trial ended: the content of its ``result.json``, from which the study is updated.

    Args:
        params: shape of the candidate, from ``StudentArch.to_dict``.
        state: state of the trial in Optuna: ``COMPLETE``, ``PRUNED`` (by the budget or the pruner)
            or ``FAIL``.
        value: reward of a ``COMPLETE`` trial; else None.
        attrs: all measurements, by name. If the candidate was not trained to the end, ``refused``
            (budget exceeded), ``stopped_early`` (pruned) or ``failed`` has the reason. If the
            result was copied from an earlier trial of the same shape, ``twin_of`` has that trial's
            number.
        constraints: maps ``budget`` to the share by which the student exceeds a limit of the
            budget; 0: within all limits.
        reports: maps the number of each epoch to 1 - held-out loss; empty without a pruner.
        started: start of the trial, in seconds since 1970.
        ended: end of the trial, in seconds since 1970.
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
        """Whether a study's trial has this outcome's state and, if it is ``COMPLETE``, reward."""
        is_alike = self.state != "COMPLETE" or trial.value == self.value
        return is_alike and trial.state.name == self.state

    @classmethod
    def read(cls, path: Path) -> "Outcome":
        """Read a ``result.json``.

        Raises:
            UserError: the file is damaged, or not the result of a trial.
        """
        try:
            return cls(**read_json(path))
        except TypeError as error:
            raise UserError(
                f"{str(path)!r} is not a trial's result ({first_line(error)}): delete this file, "
                "and the candidate is trained again."
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data for JSON."""
        return asdict(self)


def results_in(folder: Path) -> dict[int, Outcome]:
    """Read the results in a run's folder; return each ended trial's outcome by its number."""
    paths = sorted(folder.glob("trial_*/result.json"))
    return {int(path.parent.name[6:]): Outcome.read(path) for path in paths}


def num_begun(folder: Path) -> int:
    """Return how many trials were started in a run's folder, finished or not."""
    return 1 + max((int(path.name[6:]) for path in folder.glob("trial_*")), default=-1)


def arch_of(trial: FrozenTrial) -> StudentArch:
    """Return the student shape of a trial."""
    return StudentArch.from_dict(trial.user_attrs.get("arch") or trial.params)


def tried(study: Study) -> list[FrozenTrial]:
    """Return the trials that were trained, to the end or until the pruner ended them.

    Trials that repeat the shape of an earlier trial are left out.
    """
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    attrs_of_none = {"twin_of", "refused"}
    return [trial for trial in ended if not attrs_of_none & trial.user_attrs.keys()]


def trained(study: Study) -> list[FrozenTrial]:
    """Return the trials that were trained to the end.

    Trials that repeat the shape of an earlier trial are left out.
    """
    return [trial for trial in tried(study) if trial.state == TrialState.COMPLETE]


def failed(study: Study) -> list[FrozenTrial]:
    """Return the trials that failed.

    Trials that repeat the shape of an earlier trial are left out.
    """
    ended = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    return [trial for trial in ended if "failed" in trial.user_attrs and not is_repeated(trial)]


def is_repeated(trial: FrozenTrial) -> bool:
    """Whether a trial only repeats the shape and result of an earlier trial."""
    return "twin_of" in trial.user_attrs


def known(study: Study) -> dict[StudentArch, FrozenTrial]:
    """Map each proposed student shape to the first trial that has it."""
    first: dict[StudentArch, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        if len(trial.params) == len(ARCH) and not is_repeated(trial):
            first.setdefault(arch_of(trial), trial)
    return first


def unseen(study: Study, space: SearchSpace, number: int) -> StudentArch | None:
    """Return a random student shape that was neither proposed nor queued; None: there is none."""
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    queued = [trial.system_attrs.get("fixed_params") for trial in waiting]
    seen = known(study)
    left = [arch for arch in space if arch not in seen and arch.to_dict() not in queued]
    draw = int.from_bytes(hashlib.sha256(str(number).encode()).digest()[:8], "big")
    return left[draw % len(left)] if left else None


def is_complete(study: Study, space: SearchSpace, n_trials: int) -> bool:
    """Whether a search is over: enough candidates were trained, or no shape is left.

    Args:
        study: study of the search.
        space: search space of the study.
        n_trials: number of candidates to train; those that the pruner ended count.
    """
    ended = [trial for trial in known(study).values() if trial.state.is_finished()]
    return len(tried(study)) >= n_trials or len(ended) >= len(space)


def best_trial(study: Study) -> FrozenTrial | None:
    """Return the trial with the highest reward within the budget so far; None: there is none."""
    try:
        best = study.best_trial
    except ValueError:  # raised by Optuna if no trial is complete and feasible
        return None
    return study.get_trials(deepcopy=False)[best.user_attrs.get("twin_of", best.number)]


def best_of(study: Study, space: SearchSpace) -> FrozenTrial:
    """Return the trial with the highest reward within the budget, of a search that is over.

    Args:
        study: study of the search.
        space: search space of the study.

    Raises:
        UserError: no candidate meets the budget, or the pruner ended every candidate.
        CandidateFailed: every candidate failed; the message has the last reason.
    """
    if (best := best_trial(study)) is not None:
        return best
    if failed(study) and not tried(study):
        raise CandidateFailed(
            f"Every candidate failed, the last one with: {failed(study)[-1].user_attrs['failed']}. "
            "Failed candidates are not tried again: fix the cause, then run with --force-new."
        )
    if tried(study) and not trained(study):
        raise UserError("The pruner ended every candidate: give another pruner, or --pruner none.")
    raise UserError(f"None of the {len(space)} students meets the budget: loosen its limits.")


def begun(study: Study) -> list[FrozenTrial]:
    """Return the study's trials without those that are only queued."""
    trials = study.get_trials(deepcopy=False)
    return [t for t in trials if t.state != TrialState.WAITING and (t.params or t.user_attrs)]


def in_words(trial: FrozenTrial) -> str:
    """Return a trial's state in one or two words, for the user."""
    if is_repeated(trial):
        return "repeated"
    if trial.state == TrialState.PRUNED:
        return "refused" if "refused" in trial.user_attrs else "stopped early"
    words = {TrialState.COMPLETE: "finished", TrialState.FAIL: "failed"}
    return words.get(trial.state, "running")


def reason_in(attrs: Mapping[str, Any]) -> str | None:
    """Return why a trial was not trained to the end, given its user attributes ``attrs``.

    None: it was trained to the end, or it is still running.
    """
    if "twin_of" in attrs:
        return f"same shape as trial {attrs['twin_of']}"
    return attrs.get("refused") or attrs.get("stopped_early") or attrs.get("failed")


def line(trial: FrozenTrial) -> str:
    """Describe a finished trial in one line: student shape, and result or failure reason."""
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
    """Whether a trial's latency was unsteady: its interquartile range is over 10 % of its median.

    Args:
        trial: a trial whose latency was measured.
        whose: latencies to check: ``""`` for the student's, ``"teacher_"`` for the teacher's.
    """
    get = trial.user_attrs.get
    return any(
        is_unsteady(get(f"{who}latency_ms", math.inf), get(f"{who}latency_iqr_ms", 0.0))
        for who in whose
    )


def trials_frame(study: optuna.Study) -> pd.DataFrame:
    """Return a table with a row for each trial of a search, as in ``trials.csv``.

    Args:
        study: study of a search, finished or not. Trials that only wait in the queue are left out.

    Returns:
        The columns below. Unknown values, such as a running trial's loss, are missing.

        - ``number`` and ``state`` of the trial, and the five fields of ``StudentArch``.
        - ``loss`` on held-out rows; ``contextual_share``: how much of the teacher's context
            dependence is learned; ``sentence_r2``: R2 of the teacher's predicted mean states.
        - ``latency_ms`` and ``latency_iqr_ms``: median and interquartile range of the student's
            latency; ``speedup`` over the teacher; ``num_parameters`` of the student.
        - ``reward`` of the trial, and the ``seconds`` that it took.
        - ``predicted_reward``: the reward that an LSTM sampler predicted, if it proposed the
            student for that reward.
        - ``episode``: number, from 1, of the candidate's episode. Trained candidates are counted in
            the order in which they ended; an episode is ``num_candidates`` of them, which is an
            attribute of the study.
        - ``best_so_far``: best reward of all candidates up to this one.
        - ``episode_best``: best reward of this candidate's episode up to this candidate.
        - ``previous_best``: best reward of the whole episode before this candidate's.
        - ``front``: the Pareto fronts that the student is on, of loss and latency or of loss and
            size: ``latency``, ``parameters``, ``latency and parameters``, or missing.
        - ``reason``: why the candidate was not trained to the end.
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
    """Return the Pareto front: trained candidates that no other beats in both loss and cost.

    Args:
        frame: table from ``trials_frame``.
        size: column with the cost: ``latency_ms`` or ``num_parameters``.

    Returns:
        The index labels of the candidates' rows, the cheapest candidate first.
    """
    trained = frame[_is_trained(frame)].sort_values([size, "loss"])
    return trained.index[trained["loss"] < trained["loss"].cummin().shift(fill_value=math.inf)]


def _is_trained(frame: pd.DataFrame) -> pd.Series:
    is_complete = (frame["state"] == "COMPLETE") & ~is_twin(frame)
    return is_complete & np.isfinite(frame["loss"]) & frame["reward"].notna()


def is_twin(frame: pd.DataFrame) -> pd.Series:
    """Return a boolean for each row of a table: whether its trial only repeats an earlier one.

    Args:
        frame: table from ``trials_frame``.
    """
    return frame["reason"].fillna("").str.startswith("same shape")
