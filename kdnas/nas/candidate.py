"""One candidate: budget gate, module, Trainer, fit, latency, reward."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import optuna
import torch
from filelock import ReadWriteLock
from rich.progress import Progress
from safetensors.torch import save

from kdnas.data.datamodule import KDDataModule
from kdnas.deploy.latency import ArchLatency, LatencyMeter
from kdnas.distillation.module import HiddenStateDistillModule, Recipe, calibration_rows
from kdnas.distillation.narrowing import CalibrationRows
from kdnas.distillation.teacher_states import TeacherStates
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import Teacher
from kdnas.nas.callbacks import (
    FailOnNonFiniteLoss,
    HoldStill,
    LatencyAfterFit,
    PruneByHeldOutLoss,
    RewardAfterFit,
    wait_for,
)
from kdnas.nas.record import Study, trained
from kdnas.system.errors import UserError
from kdnas.system.files import file_sha256, new_file
from kdnas.training.progress import FitProgress
from kdnas.training.trainer import TrainerSettings, fit, make_trainer

# In a trial's folder: what was trained, and what the optimizer knew of it. Full KD goes on from them.
WEIGHTS, OPTIMIZER = KEPT = ("weights.safetensors", "optimizer.safetensors")


def drop_weights(study: Study, folder: Callable[[int], Path]) -> None:
    """Delete the weights of all but the best three candidates, and what their optimizers knew.

    Args:
        study: of the search.
        folder: of a trial, by its number.
    """
    for trial in sorted(trained(study), key=lambda trial: trial.value or 0.0)[:-3]:
        for name in KEPT:
            (folder(trial.number) / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class Budget:
    """A hard limit beside the reward; checked before a candidate is trained, for latency does not depend on weights.

    Args:
        speedup: at least so many times as fast as the teacher.
        latency_ms: at most so many milliseconds.
        num_parameters: at most so many, encoder and classification head.

    Raises:
        UserError: a limit is not above 0.
    """

    speedup: float | None = None
    latency_ms: float | None = None
    num_parameters: int | None = None

    def __post_init__(self) -> None:
        for name in ("speedup", "latency_ms", "num_parameters"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"The budget {name} is {value}: give a number above 0.")

    def violation(self, latency: ArchLatency) -> tuple[float, str]:
        """How far a student is beyond the limits, relative to them (0 or less: within), and the reason in words."""
        found = [(0.0, "")]
        if self.speedup is not None:
            excess = self.speedup / latency.speedup - 1
            found.append(
                (
                    excess,
                    f"{latency.speedup:.2f}x as fast as the teacher, {self.speedup:g}x is asked for",
                )
            )
        if self.latency_ms is not None:
            excess = latency.student.median_ms / self.latency_ms - 1
            found.append(
                (excess, f"{latency.student.median_ms:.3f} ms, {self.latency_ms:g} ms is asked for")
            )
        if self.num_parameters is not None:
            excess = latency.num_parameters / self.num_parameters - 1
            found.append(
                (
                    excess,
                    f"{latency.num_parameters:,} parameters, {self.num_parameters:,} are asked for",
                )
            )
        return max(found)


@dataclass(frozen=True)
class Evaluator:
    """``evaluate(trial, arch) -> reward``: what the search calls for each candidate.

    Args:
        teacher: found by ``find_teacher``.
        states: the teacher's states, shared by all candidates.
        data: the data module; a candidate sees its ``mini`` split.
        recipe: how to distil.
        meter: measures latency.
        budget: hard limits.
        trainer: the Trainer's settings.
        num_epochs: of the mini-KD.
        alpha: of the reward.
        beta: of the reward.
        seed: every candidate starts from the same, whatever was trained before it.
        folder: gives the folder of a trial number.
        stillness: shared by the workers of one machine, who hold still while one of them measures.
        progress: a live display, or None.
    """

    teacher: Teacher
    states: TeacherStates
    data: KDDataModule
    recipe: Recipe
    meter: LatencyMeter
    budget: Budget
    trainer: TrainerSettings
    num_epochs: int
    alpha: float
    beta: float
    seed: int
    folder: Callable[[int], Path]
    stillness: ReadWriteLock
    progress: Progress | None = None

    @cached_property
    def calibration(self) -> CalibrationRows:
        """What all candidates start on."""
        return calibration_rows(self.data.select("mini"))

    def __call__(self, trial: optuna.Trial, arch: StudentArch) -> float:
        started = time.monotonic()
        with wait_for(self.stillness.acquire_write, trial):
            measured = self.meter.measure(arch)  # it remembers, so nothing is measured in the fit
        self._gate(trial, measured)
        latency = LatencyAfterFit(self.meter)
        rewarded = RewardAfterFit(latency, self.alpha, self.beta)
        callbacks: list[pl.Callback] = [
            FailOnNonFiniteLoss(),
            PruneByHeldOutLoss(trial),
            HoldStill(self.stillness, trial),
            latency,
            rewarded,
        ]
        if self.progress:
            callbacks.append(FitProgress(self.progress, f"trial {trial.number}: {arch}"))
        wait_for(self.stillness.acquire_read, trial)
        try:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                module = HiddenStateDistillModule(self.teacher, arch, self.recipe)
                module.states, module.calibration = self.states, self.calibration
                trainer = make_trainer(
                    self.trainer, self.folder(trial.number), self.num_epochs, callbacks
                )
                fit(trainer, module, self.data.select("mini"))
        except optuna.TrialPruned:
            trial.set_user_attr("seconds", time.monotonic() - started)
            raise
        finally:
            self.stillness.release(
                force=True
            )  # whoever was interrupted between two steps holds it no more
        optimizer: Any = trainer.optimizers[0]
        for name, tensors in (
            (WEIGHTS, module.state_dict()),
            (OPTIMIZER, optimizer.tensors(module)),
        ):
            path = self.folder(trial.number) / name
            with new_file(path) as file:
                file.write(save(tensors))
            trial.set_user_attr(f"{path.stem}_sha256", file_sha256(path))
        for name in ("loss", "contextual_share", "sentence_r2"):
            trial.set_user_attr(name, module.history[-1][name])
        trial.set_user_attr("history", module.history)
        trial.set_user_attr("reward", rewarded.reward)
        trial.set_user_attr("seconds", time.monotonic() - started)
        return rewarded.reward

    def _gate(self, trial: optuna.Trial, latency: ArchLatency) -> None:
        """Write down the latency; refuse what breaks the budget, before anything is trained."""
        for name, value in (
            ("num_parameters", latency.num_parameters),
            ("latency_ms", latency.student.median_ms),
            ("latency_iqr_ms", latency.student.iqr_ms),
            ("teacher_latency_ms", latency.teacher.median_ms),
            ("teacher_latency_iqr_ms", latency.teacher.iqr_ms),
            ("speedup", latency.speedup),
        ):
            trial.set_user_attr(name, value)
        violation, reason = self.budget.violation(latency)
        trial.set_constraint("budget", violation)
        if violation > 0:
            trial.set_user_attr("refused", reason)
            raise optuna.TrialPruned(reason)
