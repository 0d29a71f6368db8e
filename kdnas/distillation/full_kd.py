"""Full KD: one student is distilled on all training rows and saved."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdnas.data.datamodule import KDDataModule
from kdnas.distillation.metrics import sentence_agreement
from kdnas.distillation.module import HiddenStateDistillModule, Recipe
from kdnas.distillation.start import Started
from kdnas.distillation.teacher_states import TeacherStates, sample_batches
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import Teacher, num_parameters
from kdnas.system.files import new_folder
from kdnas.training.precision import autocast
from kdnas.training.trainer import TrainerSettings, fit_resumable, own_random_numbers

# Tokens of held-out rows for the final figures: some hundred rows, which take a second.
QUALITY_TOKENS = 20_000
FEWEST_ROWS = 8  # to fit a linear map on one half and to measure it on the other


def distill_student(
    teacher: Teacher,
    arch: StudentArch,
    recipe: Recipe,
    data: KDDataModule,
    states: TeacherStates,
    trainer: TrainerSettings,
    *,
    num_epochs: int,
    folder: Path,
    seed: int = 0,
    weights: dict[str, Tensor] | None = None,
    optimizer: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Distil one student and save it in ``folder/encoder``; a repeated call resumes training.

    Args:
        teacher: the teacher to learn from.
        arch: shape of the student.
        recipe: the loss, how the student is initialised, and the learning rates.
        data: data module after ``setup``; the student is trained on its ``train_ids()``.
        states: the teacher's hidden states of the rows in ``data``.
        trainer: device, precision, logger and callbacks.
        num_epochs: passes over the training rows; with 0, the student is saved untrained.
        folder: folder for TensorBoard logs, ``encoder/`` and, until the end, ``last.ckpt``.
        seed: random seed of the weights that are not initialised from the teacher.
        weights: state dict of the ``HiddenStateDistillModule`` of a search candidate, to go on
            training it; None: initialise the student from the teacher.
        optimizer: optimizer state of that candidate.

    Returns:
        A dictionary for ``result.json`` with ``arch``, ``num_parameters``, ``seconds`` (of this
        call), ``num_rows`` (training rows), ``num_epochs``, and the held-out metrics: ``history``
        (after each epoch), and after the last epoch ``loss``, ``contextual_share`` and
        ``sentence_r2``. If there are at least ``FEWEST_ROWS`` held-out rows, it also has
        ``vector_cosine`` and ``similarity_order`` (``sentence_agreement``).
    """
    started = time.monotonic()
    with own_random_numbers():
        torch.manual_seed(seed)
        module = HiddenStateDistillModule(teacher, arch, recipe)
        module.states = states
        if (folder / "last.ckpt").exists():
            module.started = Started()  # the checkpoint's student is initialised already
        elif weights is not None:
            module.begin(data)
            module.load_state_dict(weights)
            module.optimizer_tensors = optimizer or {}
        if num_epochs:
            fit_resumable(trainer, folder, num_epochs, module, data)
    if not num_epochs or module.trainer.is_global_zero:
        with new_folder(folder / "encoder") as encoder:
            module.save_student(encoder)
    names = ("loss", "contextual_share", "sentence_r2")
    last = {name: module.history[-1][name] for name in names} if module.history else {}
    return {
        "arch": arch.to_dict(),
        "num_parameters": num_parameters(module.student),
        **last,
        **_quality(module, data),
        "seconds": time.monotonic() - started,
        "num_rows": len(data.train_ids()),
        "num_epochs": num_epochs,
        "history": module.history,
    }


@torch.no_grad()
def _quality(module: HiddenStateDistillModule, data: KDDataModule) -> dict[str, float]:
    module.student.eval()
    rows = sample_batches(data, data.held_out_ids(), QUALITY_TOKENS)
    if sum(len(batch["input_ids"]) for batch in rows) < FEWEST_ROWS:
        return {}
    with autocast("cpu"):
        students, teachers = zip(*map(module.views, rows), strict=True)
        vectors = (
            torch.cat([view.pooled(view.mask_BT) for view in views]).float()
            for views in (students, teachers)
        )
        return sentence_agreement(*vectors)
