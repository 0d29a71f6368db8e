"""Whether a run's figures can be trusted: what was measured twice, and how far it agrees."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from kdnas.deploy.latency import ArchLatency, Latency
from kdnas.deploy.quantize import MOST_LOST, lost
from kdnas.nas.budget import Budget
from kdnas.nas.trials import is_twin

MOST_APART = (
    0.1  # two measurements of one latency; the middle half of many, as a share of their median
)
LEAST_AGREEMENT = 0.5  # of two rankings


@dataclass(frozen=True)
class Check:
    """One thing to know before the student is used.

    Args:
        name: what was looked at.
        words: what was found.
        good: whether it is as it should be; None: that is for the reader to judge.
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
    """Everything that a run's own figures say of each other; what was not measured is left out.

    Args:
        frame: of ``trials_frame``.
        best: number of the best trial.
        histories: of each trained candidate, by its number, a row an epoch with ``loss``.
        full_kd: what ``full_kd/result.json`` holds.
        results: what ``glue/results.json`` holds.
        exported: the checks of the export, from ``student/manifest.json``.
        budget: of the search.
    """
    found = [
        _runner_up(frame, best),
        _settled(histories),
        _context(frame, best, full_kd),
        _latency(frame, best, results, budget),
    ]
    found += [*_scores(results), *_files(exported)]
    return [check for check in found if check]


def _runner_up(frame: pd.DataFrame, best: int | None) -> Check | None:
    others = frame[frame["reward"].notna() & ~is_twin(frame) & (frame["number"] != best)]
    if best is None or others.empty:
        return None
    reward = float(frame.loc[frame["number"] == best, "reward"].iloc[0])
    next_best = others.loc[others["reward"].idxmax()]
    gap = (reward - next_best["reward"]) / abs(reward) if reward else 0.0
    words = f"The best of {len(others) + 1} has reward {reward:.4f}, the next, trial {next_best['number']}, "
    return Check(
        "Is the best one the best?",
        words + f"{next_best['reward']:.4f}, {gap:.1%} less. One seed each.",
    )


def _settled(histories: Mapping[int, Sequence[Mapping[str, Any]]]) -> Check | None:
    """Whether the ranking still moved when the candidates' short training ended."""
    losses = pd.DataFrame(
        [(rows[0]["loss"], rows[-1]["loss"]) for rows in histories.values() if len(rows) > 1],
        dtype=float,
    ).dropna()
    if len(losses) < 3 or (losses.nunique() < 2).any():
        return None
    agreement = float(losses[0].rank().corr(losses[1].rank()))
    words = f"Ranked by the loss after their first epoch and after their last, {len(losses)} candidates agree to "
    words += (
        f"{agreement:.2f} (rank correlation; 1: the same order, 0: none): longer training would "
    )
    words += (
        "hardly reorder them."
        if (good := agreement >= LEAST_AGREEMENT)
        else "perhaps reorder them."
    )
    return Check("Was the ranking settled?", words, good)


def _context(
    frame: pd.DataFrame, best: int | None, full_kd: Mapping[str, Any] | None
) -> Check | None:
    if best is None:
        return None
    row = frame[frame["number"] == best].iloc[0]
    last = full_kd or row
    if pd.isna(share := last["contextual_share"]):
        return None
    words = f"Of what context adds in the teacher's last layer it knows {share:.1%}"
    if full_kd:
        words += f"; loss {row['loss']:.4f} in the search, {full_kd['loss']:.4f} after full KD"
    return Check("More than a table of words?", words + ".", bool(share > 0))


def _latency(
    frame: pd.DataFrame, best: int | None, results: Mapping[str, Any] | None, budget: Budget
) -> Check | None:
    if best is None:
        return None
    row = frame[frame["number"] == best].iloc[0]
    words = f"In the search {row['latency_ms']:.2f} ms (IQR {row['latency_iqr_ms']:.2f}), {row['speedup']:.1f}x"
    is_good = []
    if results:
        again = results["models"]["student"]
        apart = again["latency_ms"] / row["latency_ms"] - 1
        words += f"; fine-tuned and measured again {again['latency_ms']:.2f} ms (IQR {again['latency_iqr_ms']:.2f}), "
        words += f"{again['speedup']:.1f}x: {apart:+.0%}"
        is_good.append(bool(abs(apart) <= MOST_APART))
        student, teacher = (
            Latency(results["models"][name]["latency_ms"], 0.0, 0)
            for name in ("student", "teacher")
        )
        violation, reason = budget.violation(ArchLatency(student, teacher, row["num_parameters"]))
        if violation > 0:
            words += f", beyond the budget ({reason})"
            is_good.append(False)
    teacher_ms = (frame["latency_ms"] * frame["speedup"])[~is_twin(frame)].dropna()
    if len(teacher_ms) > 1:
        low, median, high = teacher_ms.quantile([0.25, 0.5, 0.75])
        is_good.append(bool((high - low) / median <= MOST_APART))
        words += f". The teacher, measured beside each of {len(teacher_ms)}, took {teacher_ms.min():.2f} to "
        words += f"{teacher_ms.max():.2f} ms" + (
            ": the machine was busy" if not is_good[-1] else ""
        )
    return Check("Is the latency real?", words + ".", all(is_good) if is_good else None)


def _scores(results: Mapping[str, Any] | None) -> list[Check]:
    if not results:
        return []
    models, task = results["models"], results["task"]
    student, random = models["student"]["score"], models["random"]["score"]
    rows, metric = task["num_validation"], task["metric"]
    gain = f"From a random start the same shape reaches {random:.3f}, distilled {student:.3f} ({student - random:+.3f})"
    if metric != "accuracy":
        return [
            Check(
                "Did distillation help?",
                f"{gain}. One seed each, {rows} held-out rows.",
                student > random,
            )
        ]
    error = 1.96 * math.sqrt(max(student * (1 - student), 0.0) / max(1, rows))
    spread = f"On {rows} held-out rows an accuracy of {student:.3f} is uncertain by {error:.3f} (95 %), and seeds differ "
    return [
        Check("Did distillation help?", f"{gain}.", student - random > error),
        Check(
            "How sure is the score?", spread + "too: one was tried; below is the command for more."
        ),
    ]


def _files(exported: Mapping[str, Any] | None) -> list[Check]:
    if not exported:
        return []
    int8 = exported["int8"]
    words = f"model.onnx equals torch to {exported['max_abs_difference']:.0e}; model.int8.onnx has cosine "
    words += f"{int8['cosine']:.4f} to it"
    if "score" in int8:
        words += f" and scores {int8['int8_score']:.3f} where float32 scores {int8['score']:.3f}"
    good = lost(int8) <= MOST_LOST
    words += f" ({int8['rows']})" + ("." if good else f": int8 loses more than {MOST_LOST:.0%}.")
    return [Check("Do the exported files agree?", words, good)]
