"""Latency of the graph that users deploy: student and teacher, measured in turn on one machine."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Measurement, Timer
from transformers import PreTrainedConfig, PreTrainedModel

from kdnas.arch import StudentArch
from kdnas.errors import CandidateFailed, UserError, nearest
from kdnas.models import build_classifier, max_length, num_parameters, student_config

_NUM_ROUNDS = 10  # turns of each model, unless a single run is longer than its share
_FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class LatencySettings:
    """How latency is measured.

    Args:
        device: where the models run: ``cpu``, ``cuda``, ``cuda:1``, ...
        batch_size: rows a batch.
        length: tokens a row, with the two that the tokenizer adds.
        num_threads: CPU threads of torch.
        min_seconds: time to spend on each model, at least.

    Raises:
        UserError: a value is out of range, or torch sees no such device.
    """

    device: str = "cpu"
    batch_size: int = 1
    length: int = 128
    num_threads: int = 1
    min_seconds: float = 0.5

    def __post_init__(self) -> None:
        devices = _devices()
        if self.device not in devices:
            raise UserError(f"torch sees no device {self.device!r} for latency.{nearest(self.device, devices)}")
        for name, least in (("batch_size", 1), ("length", 2), ("num_threads", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 31:
                raise UserError(f"{name} of latency is {value!r}: give a whole number of at least {least}.")
        if not 0 < self.min_seconds < math.inf:
            raise UserError(f"min_seconds of latency is {self.min_seconds!r}: give a time above 0, such as 0.5.")


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass.

    Args:
        median_ms: median, in milliseconds.
        iqr_ms: interquartile range, in milliseconds.
        num_runs: forward passes that were timed (``torch.utils.benchmark`` times short ones in blocks).
    """

    median_ms: float
    iqr_ms: float
    num_runs: int


@dataclass(frozen=True)
class ArchLatency:
    """Latency of an architecture beside its teacher, both from one measurement.

    Args:
        student: latency of the student.
        teacher: latency of the teacher, measured in turn with it.
        num_parameters: of the student's deployed graph, encoder and classification head.
    """

    student: Latency
    teacher: Latency
    num_parameters: int

    @property
    def speedup(self) -> float:
        """How many times faster than its teacher the student is, by medians."""
        return self.teacher.median_ms / self.student.median_ms


def measure_latency(models: Sequence[nn.Module], settings: LatencySettings) -> list[Latency]:
    """Time the forward pass of each model, all in turn, so that a drifting machine cancels in their ratio.

    Eval mode, float32 (autocast off), inference mode, a batch without padding. Each round gives every model its share
    of ``min_seconds``, led by an untimed pass; the first round is a warm-up and is dropped.

    Args:
        models: models with a Hugging Face ``config``. They come back in the mode and on the device they came in.
        settings: device, batch, threads and time.

    Returns:
        One latency a model, in their order.

    Raises:
        UserError: a model takes no input of ``settings.length`` tokens.
    """
    configs: list[Any] = [model.config for model in models]
    for config in configs:
        _check_length(config, settings)
    with _deployed(models, settings.device), torch.autocast(torch.device(settings.device).type, enabled=False):
        timers = [
            Timer(
                "model(**batch)",
                globals={"model": model, "batch": _batch(config, settings)},
                num_threads=settings.num_threads,
            )
            for model, config in zip(models, configs, strict=True)
        ]
        share = settings.min_seconds / _NUM_ROUNDS
        rounds: list[list[Measurement]] = []
        with torch.inference_mode():
            for timer in timers:
                timer.blocked_autorange(min_run_time=share)
            while len(rounds) < _FEWEST_ROUNDS or min(map(_seconds, zip(*rounds, strict=True))) < settings.min_seconds:
                rounds.append([timer.blocked_autorange(min_run_time=share) for timer in timers])
    return [_merge(turns) for turns in zip(*rounds, strict=True)]


class LatencyMeter:
    """Latency of architectures beside one teacher; measured once each, and remembered.

    What is measured is encoder and classification head, with random weights: latency does not depend on them.

    Args:
        teacher_config: the teacher's config.
        settings: how to measure.

    Raises:
        UserError: the teacher takes no input of ``settings.length`` tokens.
    """

    def __init__(self, teacher_config: PreTrainedConfig, settings: LatencySettings) -> None:
        _check_length(teacher_config, settings)
        self.teacher_config = teacher_config
        self.settings = settings
        self._known: dict[StudentArch, ArchLatency] = {}

    def remember(self, arch: StudentArch, value: ArchLatency) -> None:
        """Answer with this value from now on: a number from a record, or from a latency table."""
        self._known[arch] = value

    def measure(self, arch: StudentArch) -> ArchLatency:
        """The latency of an architecture: the remembered one, or else measured now.

        Raises:
            CandidateFailed: a median that is no positive number.
        """
        if arch not in self._known:
            model = _build(student_config(self.teacher_config, arch))
            student, teacher = measure_latency([model, self._teacher], self.settings)
            for role, latency in (("student", student), ("teacher", teacher)):
                if not 0 < latency.median_ms < math.inf:
                    raise CandidateFailed(f"The {role}'s latency beside {arch} is {latency.median_ms} ms.")
            self.remember(arch, ArchLatency(student, teacher, num_parameters(model)))
        return self._known[arch]

    @cached_property
    def _teacher(self) -> PreTrainedModel:
        return _build(self.teacher_config)


def _devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    count = torch.accelerator.device_count()
    return ["cpu", accelerator.type, *(f"{accelerator.type}:{index}" for index in range(count))]


def _check_length(config: PreTrainedConfig, settings: LatencySettings) -> None:
    longest = max_length(config)
    if settings.length > longest:
        raise UserError(
            f"length of latency is {settings.length}, but this {config.model_type} takes {longest} tokens at most: "
            "give a smaller length."
        )


def _build(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):  # measuring must not change what the caller draws next
        return build_classifier(config)


def _batch(config: PreTrainedConfig, settings: LatencySettings) -> dict[str, torch.Tensor]:
    """Ids from the whole vocabulary except padding, and a mask of ones."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (settings.batch_size, settings.length), generator=generator)
    if config.pad_token_id is not None:
        ids[ids == config.pad_token_id] = (config.pad_token_id + 1) % config.vocab_size
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {name: value.to(settings.device) for name, value in batch.items()}


@contextmanager
def _deployed(models: Sequence[nn.Module], device: str) -> Iterator[None]:
    """Models in eval mode on the device; afterwards each in the modes and on the device that it came in."""
    # Not under inference_mode: parameters that are moved there could never be trained again.
    before = [
        (model, next(model.parameters()).device, [(module, module.training) for module in model.modules()])
        for model in models
    ]
    try:
        for model in models:
            model.to(device).eval()
        yield
    finally:
        for model, home, modes in before:
            model.to(home)
            for module, training in modes:
                module.training = training


def _seconds(turns: Iterable[Measurement]) -> float:
    return sum(sum(turn.raw_times) for turn in turns)


def _merge(turns: Sequence[Measurement]) -> Latency:
    (whole,) = Measurement.merge(turns)
    num_runs = sum(len(turn.raw_times) * turn.number_per_run for turn in turns)
    return Latency(whole.median * 1000, whole.iqr * 1000, num_runs)
