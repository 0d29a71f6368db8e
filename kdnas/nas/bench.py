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
    """What is needed to train a candidate and to score it, besides its shape.

    A candidate is a student of one shape. It is trained briefly, which is called mini-KD.

    Args:
        teacher: the teacher of all candidates.
        states: the teacher's hidden states for the rows of ``data``.
        data: data module; candidates are trained on its ``mini`` split.
        recipe: settings of the distillation, such as the objective.
        meter: measures the latency of a student and of the teacher.
        measures_first: measure latency and check the budget before the fit. False: measure latency
            after the fit, and do not check the budget.
        budget: hard limits on latency and size; a candidate beyond any of them is not trained.
        trainer: settings of each candidate's Trainer.
        num_epochs: epochs of a candidate's mini-KD.
        loss: loss from which the reward is computed: ``held_out``, the loss on held-out rows, or
            ``train``, the mean training loss; both of the last epoch.
        alpha: exponent of the latency factor in ``reward``.
        beta: latency, as a share of the teacher's, at which the latency factor is 1.
        seed: seed of the training of each candidate, the same for all.
        is_pruned: report the held-out loss to the study's pruner after each epoch.
        stillness: lock by which no candidate trains on this machine while latency is measured.
            Training holds it for reading, measuring for writing.
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
        """Rows of the ``mini`` split from which the initial weights of students are computed."""
        return calibration_rows(self.data.select("mini"))
