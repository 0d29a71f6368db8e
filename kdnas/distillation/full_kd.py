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
    """Distil a student and write it into ``folder/encoder``; repeat a stopped call to resume.

    Args:
        teacher: the teacher to learn from.
        arch: shape of the student.
        recipe: objective, initialisation and learning rates.
        data: data module after ``setup``; the student learns from the training rows of the
            module's split.
        states: the teacher's hidden states of the module's rows.
        trainer: device, precision, logger and callbacks.
        num_epochs: passes over the training rows; with 0, the student is saved untrained.
        folder: folder for TensorBoard logs, ``encoder/`` and, until the end, ``last.ckpt``.
        seed: seed of the initial weights that are not made from the teacher's.
        weights: state dict of a ``HiddenStateDistillModule`` to continue from, that of a search's
            candidate; None: initialise the student from the teacher.
        optimizer: state of the optimizer of that candidate, to continue from.

    Returns:
        A dictionary for ``result.json``: ``arch``, ``num_parameters``, ``seconds``, ``num_rows``
        and ``num_epochs``; ``history``, the held-out metrics after each epoch; the metrics after
        the last epoch, ``loss``, ``contextual_share`` and ``sentence_r2``; and, with at least
        ``FEWEST_ROWS`` held-out rows, the two figures of ``sentence_agreement``.
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
