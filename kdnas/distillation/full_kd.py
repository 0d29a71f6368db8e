"""One student, distilled on all rows."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdnas.data.datamodule import KDDataModule
from kdnas.distillation.module import HiddenStateDistillModule, Recipe
from kdnas.distillation.teacher_states import TeacherStates
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import Teacher, num_parameters
from kdnas.system.files import new_folder
from kdnas.training.trainer import TrainerSettings, fit_resumable


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
    """Distil a student, and write it into ``folder/encoder``; stopped, the same call goes on.

    Args:
        teacher: whose student it is.
        arch: its shape.
        recipe: how it is distilled.
        data: set up; the rows of its split are learned from.
        states: the teacher's, of these rows.
        trainer: device and precision.
        num_epochs: passes over the rows.
        folder: takes TensorBoard's logs, ``last.ckpt`` while it lasts, and ``encoder/``.
        seed: of the weights that are not the teacher's.
        weights: of a candidate, to go on from; None: begin from the teacher.
        optimizer: what its optimizer knew.

    Returns:
        What ``result.json`` holds: ``arch``, ``num_parameters``, ``loss``, ``contextual_share``,
        ``sentence_r2``, ``seconds``, ``num_rows``, ``num_epochs``, and ``history``, a row an epoch.
    """
    started = time.monotonic()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = HiddenStateDistillModule(teacher, arch, recipe)
        module.states = states
        if weights is not None and not (folder / "last.ckpt").exists():
            module.begin(data)
            module.load_state_dict(weights)
            module.optimizer_tensors = optimizer or {}
        fit_resumable(trainer, folder, num_epochs, module, data)
    with new_folder(folder / "encoder") as encoder:
        module.save_student(encoder)
    last = {name: module.history[-1][name] for name in ("loss", "contextual_share", "sentence_r2")}
    return {
        "arch": arch.to_dict(),
        "num_parameters": num_parameters(module.student),
        **last,
        "seconds": time.monotonic() - started,
        "num_rows": len(data.train_ids()),
        "num_epochs": num_epochs,
        "history": module.history,
    }
