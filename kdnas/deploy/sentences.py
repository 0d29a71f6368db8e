"""Make an export that sentence-transformers loads, and compare its vectors with the teacher's."""

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdnas.distillation.losses import ridge_map
from kdnas.models.encoders import Teacher
from kdnas.system.errors import ParityError, UserError, first_line
from kdnas.system.files import write_json
from kdnas.tasks.scores import make_metrics
from kdnas.tasks.tasks import LoadedTask

MOST_TEXTS = 1_000


@dataclass(frozen=True)
class Sentences:
    """The teacher of a sentence encoder, and texts on which teacher and student are compared.

    Args:
        teacher: a sentence encoder, whose pooling the student gets.
        train: texts on which a linear regression of the teacher's sentence vectors on the student's
            is fitted.
        held_out: texts on which the regression's predictions are compared with the teacher's
            vectors.
        task: a task with similarities of sentence pairs, such as STS-B, on which student and
            teacher are scored; None: they are not scored.
    """

    teacher: Teacher
    train: Sequence[str]
    held_out: Sequence[str]
    task: LoadedTask | None = None


def check_sentences(task: LoadedTask | None) -> None:
    """Raise an error if a student's sentence vectors cannot be compared with its teacher's.

    Args:
        task: the task on which sentence vectors are to be scored; None: they are not scored.

    Raises:
        UserError: sentence-transformers is not installed, or the task does not have pairs of
            sentences with a number as label.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise UserError(
            "sentence-transformers is not installed: pip install '.[sentence-transformers]'."
        )
    if task is not None and (len(task.task.columns) != 2 or task.task.num_labels != 1):
        raise UserError(
            f"The task {task.task.name!r} has no sentence pairs with a number as label: give "
            "--task stsb, or no task."
        )


def add_sentence_files(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: Sentences
) -> dict[str, Any]:
    """Add to an exported encoder the files that ``SentenceTransformer(folder)`` needs.

    They are ``modules.json`` and the configs of the modules that it lists, with the teacher's
    pooling. Then compare the encoder's sentence vectors with the teacher's.

    Args:
        folder: the export, with model and tokenizer.
        model: the exported encoder.
        tokenizer: the encoder's tokenizer.
        sentences: the teacher, and texts to compare on.

    Returns:
        A dictionary with ``pooling`` (``mean`` or ``cls``), ``normalized`` (whether vectors have
        length 1), ``cosine`` (the mean, over held-out texts, of the cosine between the teacher's
        vector and its prediction from the student's by a linear regression on training texts) and,
        with a task, ``task`` (its name), ``spearman`` and ``teacher_spearman`` (Spearman's
        correlations of student and teacher on the task).

    Raises:
        UserError: the model is a classifier, or the teacher is not a sentence encoder with a
            pooling that can be exported.
        ParityError: sentence-transformers computes different vectors from the model's.
    """
    from sentence_transformers import SentenceTransformer

    if "ForSequenceClassification" in type(model).__name__:
        raise UserError(
            f"The student is a {type(model).__name__}, but sentence-transformers needs an encoder, "
            "such as the run's full_kd/encoder."
        )
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    source = sentences.teacher.source
    try:
        teacher = SentenceTransformer(source, device="cpu", trust_remote_code=False)
    except (ValueError, ImportError) as error:  # modules.json can name a class of another package
        raise UserError(
            f"The teacher {sentences.teacher.name!r} cannot be loaded as a sentence encoder "
            f"({first_line(error)})."
        ) from error
    kinds = {type(module).__name__: module for module in teacher}
    pooling: Any = getattr(kinds.get("Pooling"), "pooling_mode", None)
    if pooling not in ("mean", "cls"):
        raise UserError(
            f"The teacher {sentences.teacher.name!r} pools by {pooling!r}, but only mean and cls "
            "can be exported: use another teacher."
        )
    normalized = "Normalize" in kinds
    _write_modules(
        folder, int(model.config.hidden_size), tokenizer.model_max_length, pooling, normalized
    )
    student = SentenceTransformer(str(folder), device="cpu", trust_remote_code=False)
    _check_vectors(student, model, tokenizer, pooling, normalized, sentences.held_out[:8])

    train, held_out = list(sentences.train[:MOST_TEXTS]), list(sentences.held_out[:MOST_TEXTS])
    weights = ridge_map(_vectors(student, train), _vectors(teacher, train)).float()
    mapped = _vectors(student, held_out) @ weights[:-1] + weights[-1]
    cosine = F.cosine_similarity(mapped, _vectors(teacher, held_out)).mean()
    report = {"pooling": pooling, "normalized": normalized, "cosine": float(cosine)}
    if sentences.task is not None:
        report |= {
            "task": sentences.task.task.name,
            "spearman": spearman(student, sentences.task),
            "teacher_spearman": spearman(teacher, sentences.task),
        }
    return report


def spearman(encoder: Any, task: LoadedTask) -> float:
    """Return Spearman's correlation between a task's labels and an encoder's cosines.

    The cosines are those of the two sentence vectors of each validation pair.

    Args:
        encoder: a ``SentenceTransformer``, or an object with its method ``encode``.
        task: a task with pairs of sentences and their similarities.
    """
    first, second = (_vectors(encoder, task.validation[name]) for name in task.task.columns)
    metrics = make_metrics(task.task)
    metrics.update(F.cosine_similarity(first, second), torch.tensor(task.validation["label"]))
    return float(metrics.compute()["spearman"])


def _write_modules(folder: Path, width: int, length: int, pooling: str, normalized: bool) -> None:
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if normalized:
        kinds.append(("2_Normalize", "Normalize"))
    modules = [
        {
            "idx": place,
            "name": str(place),
            "path": path,
            "type": f"sentence_transformers.models.{kind}",
        }
        for place, (path, kind) in enumerate(kinds)
    ]
    write_json(folder / "modules.json", modules)
    transformer = {"max_seq_length": length, "do_lower_case": False}
    write_json(folder / "sentence_bert_config.json", transformer)
    pooling_config = {
        "word_embedding_dimension": width,
        "pooling_mode_cls_token": pooling == "cls",
        "pooling_mode_mean_tokens": pooling == "mean",
    }
    write_json(folder / "1_Pooling" / "config.json", pooling_config)


def _check_vectors(
    student: Any,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pooling: str,
    normalized: bool,
    texts: Sequence[str],
) -> None:
    batch = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    expected = states[:, 0] if pooling == "cls" else (states * mask).sum(1) / mask.sum(1)
    if normalized:
        expected = F.normalize(expected)
    largest = float((_vectors(student, texts) - expected).abs().max())
    if not largest <= 1e-4:
        raise ParityError(
            f"The vectors from sentence-transformers differ from the student's by {largest:.3g}, "
            "but only 0.0001 is allowed, so nothing is exported."
        )


def _vectors(encoder: Any, texts: Sequence[str]) -> torch.Tensor:
    vectors = encoder.encode(list(texts), show_progress_bar=False, convert_to_numpy=True)
    return torch.from_numpy(np.asarray(vectors))
