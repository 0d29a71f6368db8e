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
    """Everything that is needed to train and score a candidate, besides its shape.

    Args:
        teacher: the teacher of all candidates.
        states: the teacher's hidden states of the rows.
        data: data module; candidates are trained on its ``mini`` split.
        recipe: how to distil.
        meter: measures the latency of a student and its teacher.
        measures_first: measure latency and check the budget before the fit; False: measure after
            it, and do not check the budget.
        budget: hard limits; a candidate beyond them is not trained.
        trainer: settings of each candidate's Trainer.
        num_epochs: epochs of a candidate's mini-KD.
        loss: which loss the reward takes: ``held_out`` or ``train``.
        alpha: exponent of the reward's latency factor.
        beta: latency, as a share of the teacher's, at which that factor is 1.
        seed: seed of every candidate, whatever was trained before it.
        is_pruned: report to a pruner after each epoch.
        stillness: lock between training and measuring on this machine: held for reading while a
            candidate trains, for writing while latency is measured.
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
        """Rows of the ``mini`` split with which students are initialised."""
        return calibration_rows(self.data.select("mini"))
