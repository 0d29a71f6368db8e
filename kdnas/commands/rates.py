"""How fast students are distilled and classifiers fine-tuned here, by a few steps of the real thing."""

import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from transformers import PreTrainedModel

from kdnas.commands.inputs import Inputs
from kdnas.distillation.module import HiddenStateDistillModule, calibration_rows
from kdnas.distillation.narrowing import CalibrationRows
from kdnas.distillation.teacher_states import TeacherStates
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import build_student
from kdnas.tasks.finetune import FinetuneSettings, evaluate_glue
from kdnas.training.trainer import fit, make_trainer

NUM_STEPS, NUM_WARM_UP, NUM_VAL_BATCHES = 6, 2, 3


@dataclass(frozen=True)
class Rates:
    """Seconds of a fit: of what comes before it, and of each thing that trains or is scored (a token, a row)."""

    start: float
    train: float
    score: float

    def seconds(self, num_epochs: int, num_train: float, num_scored: float) -> float:
        """Of a whole fit."""
        return self.start + num_epochs * (num_train * self.train + num_scored * self.score)


class _Clock(pl.Callback):
    """Times a fit, batch by batch.

    Args:
        count: how many things a batch holds.
    """

    def __init__(self, count: Callable[[Any], int]) -> None:
        self._count = count
        self._last = time.perf_counter()
        self._start = 0.0
        self._train: list[tuple[float, int]] = []  # seconds, things
        self._scored: list[tuple[float, int]] = []

    def rates(self) -> Rates:
        return Rates(self._start, _mean(self._train, NUM_WARM_UP), _mean(self._scored, 1))

    def _lap(self) -> float:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        last, self._last = self._last, time.perf_counter()
        return self._last - last

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = self._lap()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._train.append((self._lap(), self._count(batch)))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._lap()

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *indices: int
    ) -> None:
        self._scored.append((self._lap(), self._count(batch)))


def _mean(laps: list[tuple[float, int]], num_warm_up: int) -> float:
    counted = laps[num_warm_up:] or laps
    return sum(seconds for seconds, _ in counted) / max(1, sum(things for _, things in counted))


def distillation_rates(
    found: Inputs,
    arch: StudentArch,
    states: TeacherStates,
    folder: Path,
    calibration: CalibrationRows | None = None,
) -> tuple[Rates, int]:
    """How fast a student is distilled, and the bytes of what is kept of it.

    Args:
        found: on a few rows.
        arch: of the student.
        states: the teacher's.
        folder: for the Trainer's logs.
        calibration: what it starts on, where it is not the first that does.
    """
    clock = _Clock(lambda batch: int(batch["attention_mask"].sum()))
    module = HiddenStateDistillModule(found.teacher, arch, found.config.recipe)
    module.states, module.calibration = states, calibration
    trainer = make_trainer(found.config.trainer, folder, 1, [clock])
    trainer.limit_train_batches, trainer.limit_val_batches = NUM_STEPS, NUM_VAL_BATCHES
    fit(trainer, module, found.data)
    return clock.rates(), sum(
        tensor.numel() * tensor.element_size() for tensor in module.state_dict().values()
    )


class Distillation:
    """How fast students of any shape are distilled; the fastest, a middle and the slowest of some are measured.

    A step takes the longer, the longer the forward pass of the deployed graph does (LOG.md), so others lie between.

    Args:
        found: on a few rows.
        latencies: of some students, in milliseconds.
        states: the teacher's.
        folder: for the Trainer's logs.
    """

    def __init__(
        self,
        found: Inputs,
        latencies: Mapping[StudentArch, float],
        states: TeacherStates,
        folder: Path,
    ) -> None:
        ordered = sorted(latencies, key=latencies.__getitem__)
        self.measured = list(dict.fromkeys([ordered[0], ordered[len(ordered) // 2], ordered[-1]]))
        # To the CPU, where students are started: its states may have been computed elsewhere.
        calibration, teacher = calibration_rows(found.data), found.teacher.model.to("cpu")  # type: ignore[arg-type]
        with torch.no_grad():  # what all candidates share is the first one's alone
            found.config.recipe.start(
                build_student(teacher.config, ordered[0]).eval(), teacher, calibration
            )
        results = [
            distillation_rates(found, arch, states, folder / str(place), calibration)
            for place, arch in enumerate(self.measured)
        ]
        self._latencies = [latencies[arch] for arch in self.measured]
        self._rates = [rates for rates, _ in results]
        self.num_bytes = results[-1][1]

    def rates(self, latency: float) -> Rates:
        """Of a student of this latency in milliseconds."""
        start, train, score = (
            float(
                np.interp(latency, self._latencies, [getattr(rates, name) for rates in self._rates])
            )
            for name in ("start", "train", "score")
        )
        return Rates(start, train, score)


def finetuning_rates(
    found: Inputs, settings: FinetuneSettings, model: PreTrainedModel, folder: Path
) -> Rates:
    """How fast a classifier is fine-tuned, by the row.

    Args:
        found: on a few rows, with its task.
        settings: how.
        model: the classifier; it is trained.
        folder: for the Trainer's logs.
    """
    assert found.task is not None
    clock = _Clock(lambda batch: len(batch["labels"]))
    evaluate_glue(
        model,
        found.teacher.tokenizer,
        found.task,
        replace(settings, num_epochs=1),
        folder=folder,
        trainer_settings=found.config.trainer,
        callbacks=[clock],
        keep_model=False,
    )
    return clock.rates()


def peak_memory() -> int:
    """Bytes that this process had in memory at its peak."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
