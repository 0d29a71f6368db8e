"""Bench: the objects and settings that all candidates of a search share."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from filelock import ReadWriteLock

from kdnas.data.datamodule import KDDataModule
from kdnas.deploy.latency import LatencyMeter
from kdnas.distillation.module import Recipe, calibration_rows
from kdnas.distillation.narrowing import CalibrationRows
from kdnas.distillation.teacher_states import TeacherStates
from kdnas.models.encoders import Teacher
from kdnas.nas.budget import Budget
from kdnas.training.trainer import TrainerSettings


@dataclass(frozen=True)
class Bench:
    """What all candidates of a search share: teacher, data, settings and budget.

    A candidate is a student of one shape. Its short training is called mini-KD.

    Args:
        teacher: the teacher of all candidates.
        states: the teacher's hidden states for the rows of ``data``.
        data: data module; candidates are trained on its ``mini`` split.
        recipe: settings of the distillation, such as the loss.
        meter: measures the latency of a student and of the teacher.
        measures_first: measure latency and check the budget before training. False: measure latency
            after training, and do not check the budget.
        budget: hard limits on latency and size; a candidate that breaks a limit is not trained.
        trainer: settings of each candidate's Trainer.
        num_epochs: epochs of a candidate's mini-KD.
        loss: the loss in the reward, after the last epoch: ``held_out`` (on held-out rows) or
            ``train`` (mean training loss).
        alpha: exponent of the latency factor in ``reward``.
        beta: latency, as a share of the teacher's, at which the latency factor is 1.
        seed: random seed with which each candidate is trained.
        is_pruned: report 1 - held-out loss to the study's pruner after each epoch but the last.
        stillness: read-write lock that stops training on this machine while latency is measured:
            training takes it for reading, measuring for writing.
    """

    teacher: Teacher
    states: TeacherStates
    data: KDDataModule
    recipe: Recipe
    meter: LatencyMeter
    measures_first: bool
    budget: Budget
    trainer: TrainerSettings
    num_epochs: int
    loss: Literal["held_out", "train"]
    alpha: float
    beta: float
    seed: int
    is_pruned: bool
    stillness: ReadWriteLock

    @cached_property
    def calibration(self) -> CalibrationRows:
        """Batches of ``mini`` training rows, from which all students' initial weights are computed.

        The batches are drawn at the first access.
        """
        return calibration_rows(self.data.select("mini"))
