"""What a study holds, for everyone to read: the table of every trial, its fronts, and the best of them."""

import math
from dataclasses import fields

import numpy as np
import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from kdnas.deploy.latency import is_unsteady
from kdnas.models.arch import StudentArch
from kdnas.nas.record import failure_of
from kdnas.system.errors import StoreDamaged

ARCH = [field.name for field in fields(StudentArch)]
MEASURED = ["loss", "contextual_share", "sentence_r2", "latency_ms", "latency_iqr_ms", "speedup"]
COLUMNS = [
    "number",
    "state",
    *ARCH,
    *MEASURED,
    "num_parameters",
    "reward",
    "front",
    "seconds",
    "reason",
]


def begun(study: optuna.Study) -> list[FrozenTrial]:
    """The trials but for those that wait in the queue, or were not needed."""
    trials = study.get_trials(deepcopy=False)
    return [t for t in trials if t.state != TrialState.WAITING and "not_needed" not in t.user_attrs]


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """The best feasible candidate so far; None where there is none."""
    try:
        best = study.best_trial
    except StoreDamaged:
        raise
    except ValueError:  # no trial is complete
        return None
    return study.get_trials(deepcopy=False)[best.user_attrs.get("twin_of", best.number)]


def in_words(trial: FrozenTrial) -> str:
    """What became of a trial."""
    if "twin_of" in trial.user_attrs:
        return "repeated"
    if trial.state == TrialState.FAIL:
        return "failed" if failure_of(trial) else "interrupted"
    if trial.state == TrialState.PRUNED:
        return "refused" if "refused" in trial.user_attrs else "stopped early"
    return "finished" if trial.state == TrialState.COMPLETE else "running"


def line(trial: FrozenTrial) -> str:
    """What a trial that ended was, and what became of it."""
    attrs = trial.user_attrs
    if "arch" not in attrs:
        return f"trial {trial.number:3d}  ended before it began"
    head = f"trial {trial.number:3d}  {StudentArch.from_dict(attrs['arch'])}: "
    if "twin_of" in attrs:
        return f"{head}known from trial {attrs['twin_of']}"
    if "refused" in attrs:
        return f"{head}refused, {attrs['refused']}"
    if trial.state.name == "FAIL":
        return f"{head}failed, {attrs.get('failed') or failure_of(trial) or 'its process died; it is tried again'}"
    if trial.state.name == "PRUNED":
        return f"{head}stopped early, {attrs.get('stopped_early', 'pruned')}"
    unsteady = has_spread(trial, "", "teacher_")
    return (
        f"{head}loss {attrs['loss']:.3f}, contextual share {attrs['contextual_share']:.2f}, "
        f"{attrs['speedup']:.1f}x{' (unsteady)' * unsteady}, reward {trial.value:.4f}, {attrs['seconds']:.0f} s"
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
        study: its trials may have finished, been refused or failed, or still run: what is not known stays empty.
            Those that only wait in the queue are left out.

    Returns:
        Columns ``number, state``, the five fields of the shape, ``loss, contextual_share, sentence_r2,
        latency_ms, latency_iqr_ms, speedup, num_parameters, reward, front, seconds, reason``. ``front`` names what the
        student is on the Pareto front of, beside the loss: ``latency``, ``parameters``, both, or nothing.
    """
    rows = []
    for trial in begun(study):
        attrs = trial.user_attrs
        reason = (
            attrs.get("refused")
            or attrs.get("stopped_early")
            or attrs.get("failed")
            or failure_of(trial)
        )
        if "twin_of" in attrs:
            reason = f"same shape as trial {attrs['twin_of']}"
        found = {"number": trial.number, "state": trial.state.name, "reason": reason}
        rows.append(attrs | attrs.get("arch", {}) | found)
    whole = dict.fromkeys((*ARCH[:4], "num_parameters"), "Int64")
    real = dict.fromkeys((*MEASURED, "reward", "seconds"), "float64")
    frame = pd.DataFrame(rows, columns=COLUMNS).astype(whole | real)
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
    is_trained = (
        (frame["state"] == "COMPLETE") & np.isfinite(frame["loss"]) & frame["reward"].notna()
    )
    trained = frame[is_trained & ~is_twin(frame)].sort_values([size, "loss"])
    return trained.index[trained["loss"] < trained["loss"].cummin().shift(fill_value=math.inf)]


def is_twin(frame: pd.DataFrame) -> pd.Series:
    """Which rows only repeat another."""
    return frame["reason"].fillna("").str.startswith("same shape")
