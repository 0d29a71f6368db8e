"""What all candidates of a search share."""

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
    """What all candidates share.

    Args:
        teacher: whose students they are.
        states: the teacher's states.
        data: the rows; a candidate sees its ``mini`` split.
        recipe: how to distil.
        meter: measures latency.
        measures_first: whether latency is measured before the fit, or after.
        budget: hard limits.
        trainer: the Trainer's settings.
        num_epochs: of the mini-KD.
        loss: of the reward: ``held_out`` or ``train``.
        alpha: of the reward.
        beta: of the reward.
        seed: every candidate starts from the same, whatever was trained before it.
        is_pruned: whether a pruner is asked after each epoch.
        stillness: held for writing by whoever measures latency, for reading by all who train.
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
        """The rows that students start on."""
        return calibration_rows(self.data.select("mini"))
