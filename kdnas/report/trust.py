"""Check whether a run's figures can be trusted, for instance whether two measurements agree."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from kdnas.deploy.latency import ArchLatency, Latency, is_unsteady
from kdnas.deploy.quantize import MOST_LOST, lost
from kdnas.nas.budget import Budget
from kdnas.nas.trials import is_twin

# Largest relative difference of two measurements of a latency, and relative interquartile range of
# many, on a quiet machine.
MOST_APART = 0.1
LEAST_AGREEMENT = 0.5  # least rank correlation of two rankings that agree


@dataclass(frozen=True)
class Check:
    """A check of a run's figures: a question, its answer, and whether the answer is good.

    Args:
        name: the question.
        words: the answer.
        good: whether the answer is good; None: the reader must judge.
    """

    name: str
    words: str
    good: bool | None = None


def checks(
    frame: pd.DataFrame,
    best: int | None,
    histories: Mapping[int, Sequence[Mapping[str, Any]]],
    full_kd: Mapping[str, Any] | None,
    results: Mapping[str, Any] | None,
    exported: Mapping[str, Any] | None,
    budget: Budget = Budget(),
) -> list[Check]:
    """Return checks of whether a run's figures agree with each other.

    Figures that do not exist yet are not checked.

    Args:
        frame: the trials, as from ``trials_frame``.
        best: number of the best trial; None: there is none.
        histories: maps each trained candidate's trial number to a dictionary of metrics per epoch.
        full_kd: content of ``full_kd/result.json``; None: full KD has not finished.
        results: content of ``glue/results.json``; None: fine-tuning has not finished.
        exported: the results of the export's checks, from its manifest; None: there is no export.
        budget: the budget of the search.
    """
    found = [_settled(histories)]
    if best is not None:
        row = frame[frame["number"] == best].iloc[0]
        found = [
            _runner_up(frame, row),
            *found,
            _context(row, full_kd),
            _latency(frame, row, results, budget),
        ]
    if results:
        found += _scores(results)
    if exported:
        found.append(_files(exported))
    return [check for check in found if check]


def _runner_up(frame: pd.DataFrame, row: pd.Series) -> Check | None:
    others = frame[frame["reward"].notna() & ~is_twin(frame) & (frame["number"] != row["number"])]
    if others.empty:
        return None
    reward = float(row["reward"])
    runner_up = others.loc[others["reward"].idxmax()]
    gap = (reward - runner_up["reward"]) / abs(reward) if reward else 0.0
    words = (
        f"The best of {len(others) + 1} has reward {reward:.4f}, the next, trial "
        f"{runner_up['number']}, {runner_up['reward']:.4f}, {gap:.1%} less. One seed each."
    )
    return Check("Is the best one clearly ahead?", words)


def _settled(histories: Mapping[int, Sequence[Mapping[str, Any]]]) -> Check | None:
    """Check whether the candidates' ranking changed from their first epoch to their last."""
    pairs = [(rows[0]["loss"], rows[-1]["loss"]) for rows in histories.values() if len(rows) > 1]
    losses = pd.DataFrame(pairs, dtype=float).dropna()
    if len(losses) < 3 or (losses.nunique() < 2).any():
        return None
    agreement = float(losses[0].rank().corr(losses[1].rank()))
    good = agreement >= LEAST_AGREEMENT
    words = (
        f"Ranked by the loss after their first epoch and after their last, {len(losses)} "
        f"candidates have a rank correlation of {agreement:.2f} (1: the same order, 0: unrelated): "
        f"longer training would {'hardly' if good else 'perhaps'} reorder them."
    )
    return Check("Was the ranking settled?", words, good)


def _context(row: pd.Series, full_kd: Mapping[str, Any] | None) -> Check | None:
    share = (full_kd or row)["contextual_share"]
    if pd.isna(share):
        return None
    words = f"Of what context adds in the teacher's last layer, the student knows {share:.1%}"
    if full_kd and full_kd["num_epochs"]:
        words += f"; loss {row['loss']:.4f} in the search, {full_kd['loss']:.4f} after full KD"
    return Check("Does it know more than a table of words?", words + ".", bool(share > 0))


def _latency(
    frame: pd.DataFrame, row: pd.Series, results: Mapping[str, Any] | None, budget: Budget
) -> Check:
    words = f"In the search {_measured(row)}"
    are_good = []
    if results:
        student = results["models"]["student"]
        apart = student["latency_ms"] / row["latency_ms"] - 1
        words += f"; fine-tuned and measured again {_measured(student)}: {apart:+.0%}"
        are_good.append(bool(abs(apart) <= MOST_APART))
        if is_busy(results):
            words += ", on a machine that was busy"
            are_good.append(False)

        if reason := too_slow(results, budget):
            words += f", beyond the budget ({reason})"
            are_good.append(False)

    teacher_ms = (frame["latency_ms"] * frame["speedup"])[~is_twin(frame)].dropna()
    if len(teacher_ms) > 1:
        low, median, high = teacher_ms.quantile([0.25, 0.5, 0.75])
        is_steady = bool((high - low) / median <= MOST_APART)
        are_good.append(is_steady)
        words += f". The teacher, measured beside each of {len(teacher_ms)} candidates, took "
        words += f"{teacher_ms.min():.2f} to {teacher_ms.max():.2f} ms"
        if not is_steady:
            words += ": the machine was busy"
    return Check("Is the latency real?", words + ".", all(are_good) if are_good else None)


def too_slow(results: Mapping[str, Any], budget: Budget) -> str:
    """Describe by how much the fine-tuned student, measured again, exceeds the latency budget.

    Args:
        results: content of ``glue/results.json``.
        budget: the budget of the search.

    Returns:
        A text with the measured latency or speed-up and its limit; ``""`` if the student is within
        the budget.
    """
    student, teacher = results["models"]["student"], results["models"]["teacher"]
    again = ArchLatency(
        Latency(student["latency_ms"], 0.0, 0),
        Latency(teacher["latency_ms"], 0.0, 0),
        student["num_parameters"],
    )
    return replace(budget, num_parameters=None).violation(again)[1]


def is_busy(results: Mapping[str, Any]) -> bool:
    """Return whether a latency in ``glue/results.json`` is unsteady, as on a busy machine."""
    rows = results["models"].values()
    return any(is_unsteady(row["latency_ms"], row["latency_iqr_ms"]) for row in rows)


def _measured(row: Mapping[str, Any] | pd.Series) -> str:
    return f"{row['latency_ms']:.2f} ms (IQR {row['latency_iqr_ms']:.2f}), {row['speedup']:.1f}x"


def _scores(results: Mapping[str, Any]) -> list[Check]:
    models, task = results["models"], results["task"]
    student, random = models["student"]["score"], models["random"]["score"]
    num_rows = task["num_validation"]
    gain = (
        f"From a random start the same shape reaches {random:.3f}, distilled {student:.3f} "
        f"({student - random:+.3f})."
    )
    if task["metric"] != "accuracy":
        gain += f" One seed each, {num_rows} held-out rows."
        return [Check("Did distillation help?", gain, student > random)]

    error = 1.96 * math.sqrt(max(student * (1 - student), 0.0) / max(1, num_rows))
    spread = (
        f"On {num_rows} held-out rows an accuracy of {student:.3f} is uncertain by {error:.3f} "
        "(95 %). Seeds differ too, and only one was tried: the command for more is below."
    )
    return [
        Check("Did distillation help?", gain, student - random > error),
        Check("How sure is the score?", spread),
    ]


def _files(exported: Mapping[str, Any]) -> Check:
    int8 = exported["int8"]
    good = lost(int8) <= MOST_LOST
    words = (
        f"model.onnx equals torch to {exported['max_abs_difference']:.0e}; model.int8.onnx has "
        f"cosine {int8['cosine']:.4f} to it"
    )
    if "score" in int8:
        words += f" and scores {int8['int8_score']:.3f} where float32 scores {int8['score']:.3f}"
    words += f" ({int8['rows']})" + ("." if good else f": int8 loses more than {MOST_LOST:.0%}.")
    return Check("Do the exported files agree?", words, good)
