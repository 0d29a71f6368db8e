"""Choose the better of two int8 graphs on some rows, and measure its error on other rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from kdnas.deploy.onnx import Feed, open_session, random_batch, write_int8
from kdnas.system.errors import ParityError
from kdnas.tasks.batches import GLUEDataModule
from kdnas.tasks.scores import make_metrics
from kdnas.tasks.tasks import LoadedTask, Task

MOST_LOST = 0.01  # share of the score or cosine; above it, static calibration is tried too
LEAST_COSINE = 0.9  # of the outputs in int8 and float32; below it, nothing is exported
NUM_TO_CHOOSE_ON = 256
MOST_TO_REPORT = 2_000
BATCH_SIZE = 16


@dataclass(frozen=True)
class Rows:
    """Batches of rows to choose an int8 graph, and others to compare it with the float32 graph.

    Args:
        choose: batches of training rows on which the int8 graph is calibrated and chosen.
        report: batches of validation or held-out rows on which the chosen graph is compared with
            the float32 graph.
        name: description of ``report`` for people.
        task: the task with which outputs are scored; each batch then has ``labels``. None: the
            graphs' outputs are compared, but not scored.
    """

    choose: list[Feed] = field(repr=False)
    report: list[Feed] = field(repr=False)
    name: str
    task: Task | None = None


def task_rows(
    task: LoadedTask, tokenizer: PreTrainedTokenizerBase, length: int, is_scored: bool = True
) -> Rows:
    """Draw up to 256 training and 2,000 validation rows to choose and compare an int8 graph.

    Args:
        task: the task with its rows.
        tokenizer: the student's tokenizer.
        length: longest row in tokens; longer rows are cut.
        is_scored: whether the student is a classifier of the task; if not, its outputs are
            compared, but not scored.
    """
    data = GLUEDataModule(task, tokenizer, batch_size=BATCH_SIZE, max_length=length)
    data.setup()
    choose = _sample(data.rows["train"], NUM_TO_CHOOSE_ON)
    reported = _sample(data.rows[task.task.validations[0]], MOST_TO_REPORT)

    def batches(rows: list[dict[str, Any]]) -> list[Feed]:
        data.rows = dict.fromkeys(task.task.validations, rows)
        return [
            {name: value.numpy() for name, value in batch.items()}
            for batch in data.val_dataloader()[0]
        ]

    name = f"{len(reported):,} validation rows of {task.task.name}"
    return Rows(batches(choose), batches(reported), name, task.task if is_scored else None)


def text_rows(
    train: Sequence[str], held_out: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int
) -> Rows:
    """Draw up to 256 training and 256 held-out texts, to choose and compare an int8 graph.

    Args:
        train: training texts, to calibrate and choose the graph.
        held_out: held-out texts, to compare the graph with the float32 graph.
        tokenizer: the student's tokenizer.
        length: number of tokens at which texts are cut.
    """

    def batches(texts: Sequence[str]) -> list[Feed]:
        chosen = sorted(_sample(texts, NUM_TO_CHOOSE_ON), key=len)
        options: Any = dict(padding=True, truncation=True, max_length=length, return_tensors="np")
        return [
            dict(tokenizer(chosen[i : i + BATCH_SIZE], **options))
            for i in range(0, len(chosen), BATCH_SIZE)
        ]

    name = f"{min(len(held_out), NUM_TO_CHOOSE_ON):,} held-out texts"
    return Rows(batches(train), batches(held_out), name)


def random_rows(config: PreTrainedConfig, names: Sequence[str], length: int) -> Rows:
    """Make rows of random token ids, to choose and compare an int8 graph where there is no text.

    Args:
        config: config of the student.
        names: names of the graph's inputs.
        length: largest number of tokens in a row; the smallest is 2.
    """
    drawn = np.random.default_rng(0).integers(2, length + 1, size=(16, 8)).tolist()
    batches = [
        {name: value.numpy() for name, value in random_batch(config, lengths, names, seed).items()}
        for seed, lengths in enumerate(drawn)
    ]
    return Rows(batches[:8], batches[8:], "rows of random words")


def _sample(rows: Sequence[Any], most: int) -> list[Any]:
    places = np.random.default_rng(0).permutation(len(rows))[:most]
    return [rows[place] for place in places]


def outputs(path: Path, batches: Sequence[Feed]) -> list[np.ndarray]:
    """Return a graph's output for each batch.

    An output is the logits, shape (rows, labels), or the last hidden states of all tokens that are
    not padding, shape (tokens, width).

    Args:
        path: the ONNX graph.
        batches: inputs of the graph, as ``{name: array}``.
    """
    session = open_session(path)
    names = [node.name for node in session.get_inputs()]
    found = []
    for batch in batches:
        (output,) = session.run(None, {name: batch[name] for name in names})
        found.append(output if output.ndim == 2 else output[batch["attention_mask"] == 1])
    return found


def score(task: Task, found: Sequence[np.ndarray], batches: Sequence[Feed]) -> float:
    """Return a task's score, the mean of its metrics, for a graph's outputs.

    Args:
        task: the task.
        found: the graph's output for each batch, as from ``outputs``.
        batches: the batches, which have the true ``labels``.
    """
    metrics = make_metrics(task)
    for output, batch in zip(found, batches, strict=True):
        logits = torch.from_numpy(output)
        predicted = logits.squeeze(-1) if task.num_labels == 1 else logits.argmax(-1)
        metrics.update(predicted, torch.from_numpy(batch["labels"]))
    return mean(map(float, metrics.compute().values()))


def cosine(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> float:
    """Return the cosine similarity of two graphs' outputs, as from ``outputs``.

    It is the mean over the rows of the outputs (for an encoder, over tokens). If rows have fewer
    than 32 numbers, such as logits, each graph's rows are joined into one vector instead.
    """
    a, b = (torch.from_numpy(np.concatenate(list(parts))).double() for parts in (first, second))
    if a.shape[1] < 32:  # the angle between two vectors of few logits says little
        a, b = a.reshape(1, -1), b.reshape(1, -1)
    return float(F.cosine_similarity(a, b).mean())


def compare(
    exact: Path, int8: Path, batches: Sequence[Feed], task: Task | None
) -> dict[str, float]:
    """Return a comparison of an int8 graph with the float32 graph, as a dictionary.

    Its values are ``cosine``, the cosine similarity of both graphs' outputs, and, with a task,
    ``score`` and ``int8_score``, the task's scores of the float32 and the int8 graph.

    Args:
        exact: the float32 graph.
        int8: the int8 graph.
        batches: the batches on which both graphs run.
        task: the task; None: the outputs are not scored.
    """
    found = outputs(int8, batches)
    expected = outputs(exact, batches)
    result = {"cosine": cosine(found, expected)}
    if task is not None:
        result["score"] = score(task, expected, batches)
        result["int8_score"] = score(task, found, batches)
    return result


def lost(result: Mapping[str, Any]) -> float:
    """Return the share of the float32 score that int8 loses; without scores, ``1 - cosine``.

    Args:
        result: the dictionary that ``compare`` returned.
    """
    if "score" not in result:
        return 1 - result["cosine"]
    return (result["score"] - result["int8_score"]) / max(abs(result["score"]), 1e-9)


def write_best_int8(source: Path, target: Path, rows: Rows) -> dict[str, Any]:
    """Write an int8 graph with dynamic scales of activations, or static scales if they are better.

    Dynamic scales are computed for each batch, static scales once, on ``rows.choose``. The latter
    are tried only if dynamic scales lose more than 1 % of the score or cosine on ``rows.choose``.

    Args:
        source: the float32 graph.
        target: the file to write.
        rows: ``choose``, rows to choose the graph on, and ``report``, rows to compare it on.

    Returns:
        ``method`` (``dynamic`` or ``static``), ``rows`` (the name of ``rows.report``) and, measured
        on ``rows.report``, ``cosine`` to the float32 graph and, for a task, ``score`` of the
        float32 graph and ``int8_score``.

    Raises:
        ParityError: on ``rows.report``, the cosine to the float32 graph is below 0.9.
    """
    write_int8(source, target)
    method = "dynamic"
    loses = lost(compare(source, target, rows.choose, rows.task))
    if not loses <= MOST_LOST:
        static = target.with_name(f"static.{target.name}")
        names = [node.name for node in open_session(source).get_inputs()]
        write_int8(source, static, [{name: batch[name] for name in names} for batch in rows.choose])
        if lost(compare(source, static, rows.choose, rows.task)) < loses:
            static.replace(target)
            method = "static"
        static.unlink(missing_ok=True)
    result = compare(source, target, rows.report, rows.task)
    if not result["cosine"] >= LEAST_COSINE:  # NaN too
        output = open_session(source).get_outputs()[0].name
        raise ParityError(
            f"On {rows.name}, the {output} of {target.name} have a cosine of "
            f"{result['cosine']:.3f} to those of {source.name}, but {LEAST_COSINE} is needed."
        )
    return {"method": method, "rows": rows.name, **result}
