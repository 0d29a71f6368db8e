"""Measure the latency of models as they are deployed, several in alternation on one machine."""

import copy
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from kdnas.deploy.onnx import (
    INPUTS,
    check_onnx,
    config_beside,
    open_session,
    random_batch,
    write_deployed,
)
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import build_classifier, max_length, num_parameters, student_config
from kdnas.system.errors import CandidateFailed, UserError, counted, first_line, nearest
from kdnas.system.files import file_sha256, temporary_folder
from kdnas.system.yaml import refuse_special

BACKENDS = ("torch", "torch-bf16", "onnxruntime", "onnxruntime-int8", "cuda")
ON_ONNX = ("onnxruntime", "onnxruntime-int8")
MOST_SPREAD = 0.1  # interquartile range over median; above it, the machine was busy
BUSY = "The machine is busy: latencies spread by more than a tenth. Let nothing else run."
_NUM_ROUNDS = 10  # rounds of min_seconds; fewer, if a pass takes longer than its share of a round
_FEWEST_ROUNDS = 3
_MOST_BATCHES = 32  # drawn from a file of lengths
GLANCE_SECONDS = 0.1  # longest ``LatencyMeter.glance``, per model


@dataclass(frozen=True)
class LatencySettings:
    """How latency is measured.

    Args:
        backend: what runs the model: ``torch`` (float32), ``torch-bf16`` (bfloat16 weights),
            ``onnxruntime``, ``onnxruntime-int8`` (the graphs that an export holds) or ``cuda``
            (torch on the first GPU in float32, with products in TF32).
        device: where torch runs the models: ``cpu``, ``cuda``, ``cuda:1``, ...; onnxruntime runs on
            the CPU.
        batch_size: rows per batch.
        length: tokens per row, including those that the tokenizer adds.
        lengths: a jsonl file of real row lengths, used instead of ``length``; each line is a number
            or ``{"length": number}``. Up to 32 batches of random rows are timed, each padded to its
            longest row.
        num_threads: CPU threads.
        min_seconds: least time to spend on each model, in seconds.

    Raises:
        UserError: a value is out of range, the backend is unknown or not installed, or torch sees
            no such device.
    """

    backend: str = "torch"
    device: str = "cpu"
    batch_size: int = 1
    length: int = 128
    lengths: str | None = None
    num_threads: int = 1
    min_seconds: float = 0.5

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UserError(
                f"latency.backend is {self.backend!r}, which is "
                f"unknown.{nearest(self.backend, BACKENDS)}"
            )
        if self.backend in ON_ONNX:
            check_onnx()
        if self.backend == "cuda" and self.device == "cpu":
            object.__setattr__(self, "device", "cuda")
        devices = _devices()
        if self.device not in devices:
            raise UserError(
                f"latency.device is {self.device!r}, but torch has no such device "
                f"here.{nearest(self.device, devices)}"
            )
        if self.backend in ON_ONNX and self.device != "cpu":
            raise UserError(
                f"latency.backend is {self.backend}, which runs on the CPU, not on {self.device!r}."
            )
        for name, least in (("batch_size", 1), ("length", 2), ("num_threads", 1)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value < 1 << 31:
                raise UserError(
                    f"latency.{name} is {value!r}: give a whole number of at least {least}."
                )
        if not 0 < self.min_seconds < math.inf:
            raise UserError(
                f"latency.min_seconds is {self.min_seconds!r}: give a time above 0, such as 0.5."
            )

    def batches(self) -> list[list[int]]:
        """Return, for each batch that is timed, the lengths of its rows in tokens."""
        if self.lengths is None:
            return [[self.length] * self.batch_size]
        rows = _read_lengths(self.lengths)
        random.Random(0).shuffle(rows)
        size = min(self.batch_size, len(rows))
        num_batches = min(len(rows) // size, _MOST_BATCHES)
        return [rows[size * place : size * (place + 1)] for place in range(num_batches)]

    def content(self) -> dict[str, str]:
        """Return the hash of the file ``lengths``, as ``{"latency.lengths_sha256": hash}``.

        Without such a file, return an empty dictionary.
        """
        if not self.lengths:
            return {}
        return {"latency.lengths_sha256": file_sha256(Path(self.lengths))}


@dataclass(frozen=True)
class Latency:
    """Measured time of one forward pass of a model on a batch.

    Args:
        median_ms: median time of a pass, in milliseconds.
        iqr_ms: interquartile range, in milliseconds; if batches differ in length, the mean of the
            batches' ranges.
        num_runs: number of timed forward passes.
        p95_ms: 95th percentile, in milliseconds.
        tokens_per_second: real tokens per second, without padding.
        sequences_per_second: rows per second.
    """

    median_ms: float
    iqr_ms: float
    num_runs: int
    # These three are unknown if the latency is from a record.
    p95_ms: float = math.nan
    tokens_per_second: float = math.nan
    sequences_per_second: float = math.nan


def measured_by(how: Mapping[str, Any]) -> str:
    """Describe in words how latency is measured: ``torch on cpu, batch 1 x 128, 1 thread``.

    Args:
        how: fields of ``LatencySettings`` as a dict; missing fields have their defaults.
    """
    how = {**asdict(LatencySettings()), **how}
    shape = f"batch {how['batch_size']} x {how['length']}"
    if how["lengths"]:
        shape = f"batch of at most {how['batch_size']} x workload"
    threads = counted(how["num_threads"], "thread")
    return f"{how['backend']} on {how['device']}, {shape}, {threads}"


def is_unsteady(median_ms: float, iqr_ms: float) -> bool:
    """Return whether a latency is unsteady: its interquartile range is over 10 % of its median."""
    return iqr_ms > MOST_SPREAD * median_ms


@dataclass(frozen=True)
class ArchLatency:
    """Latency of a student architecture and of its teacher, from one measurement.

    Args:
        student: latency of the student.
        teacher: latency of the teacher, measured in turn with the student.
        num_parameters: number of parameters of the student with its classification head.
    """

    student: Latency
    teacher: Latency
    num_parameters: int

    @property
    def speedup(self) -> float:
        """Median latency of the teacher divided by that of the student."""
        return self.teacher.median_ms / self.student.median_ms


def measure_latency(models: Sequence[nn.Module | Path], settings: LatencySettings) -> list[Latency]:
    """Time models' forward passes in alternation, so that changes of the machine's speed cancel.

    Models run in eval mode and inference mode, without autocast, with an attention mask. There are
    several rounds. In each round every model makes an untimed pass, and then runs for at least a
    tenth of ``min_seconds``. The first round is a warm-up and is dropped. On a GPU, the time of a
    pass is measured between two CUDA events.

    Args:
        models: torch models with a Hugging Face ``config``, or ONNX files with their
            ``config.json`` in the same folder. For an onnxruntime backend, torch models are first
            exported to ONNX. No model is changed.
        settings: backend, device, batch, threads and time.

    Returns:
        One latency for each model, in the order of ``models``.

    Raises:
        UserError: rows are longer than a model takes.
    """
    configs: list[Any] = [
        config_beside(model) if isinstance(model, Path) else model.config for model in models
    ]
    for config in configs:
        check_length(config, settings)
    lengths = settings.batches()
    device = torch.device(settings.device)
    share = settings.min_seconds / _NUM_ROUNDS
    times: list[list[float]] = [[] for _ in models]
    with threads(settings.num_threads), _running(models, settings) as runs, torch.inference_mode():
        turns = [
            [partial(run, **_batch(config, rows, settings)) for rows in lengths]
            for run, config in zip(runs, configs, strict=True)
        ]
        for turn in turns:
            _timed(turn, device, share)

        num_rounds = 0
        while num_rounds < _FEWEST_ROUNDS or min(map(sum, times)) < settings.min_seconds:
            for turn, its_times in zip(turns, times, strict=True):
                its_times += _timed(turn, device, share)
            num_rounds += 1
    return [_summary(its_times, lengths) for its_times in times]


class LatencyMeter:
    """Measures the latency of student architectures, each once and in alternation with the teacher.

    Encoder and classification head have random weights, on which latency does not depend.

    Args:
        teacher_config: config of the teacher, whose model family (such as BERT) students have.
        settings: how latency is measured.

    Raises:
        UserError: rows are longer than the teacher takes.
    """

    def __init__(self, teacher_config: PreTrainedConfig, settings: LatencySettings) -> None:
        check_length(teacher_config, settings)
        self.teacher_config = teacher_config
        self.settings = settings
        self._known: dict[StudentArch, ArchLatency] = {}

    def remember(self, arch: StudentArch, value: ArchLatency) -> None:
        """Store ``value`` as the latency of an architecture, so that it will not be measured."""
        self._known[arch] = value

    def measure(self, arch: StudentArch) -> ArchLatency:
        """Return the latency of an architecture; only the first call for it measures.

        Raises:
            CandidateFailed: the median latency of student or teacher is 0 or not finite.
        """
        if arch not in self._known:
            self.remember(arch, self._measured(arch, self.settings))
        return self._known[arch]

    def glance(self, arch: StudentArch) -> ArchLatency:
        """Return the stored latency of an architecture, or else measure it quickly.

        A quick measurement is not stored, so that ``measure`` does not use it.
        """
        seconds = min(GLANCE_SECONDS, self.settings.min_seconds)
        quick = replace(self.settings, min_seconds=seconds)
        return self._known.get(arch) or self._measured(arch, quick)

    def _measured(self, arch: StudentArch, settings: LatencySettings) -> ArchLatency:
        model = _build(student_config(self.teacher_config, arch))
        student, teacher = measure_latency([model, self._teacher], settings)
        for role, latency in (("student", student), ("teacher", teacher)):
            if not 0 < latency.median_ms < math.inf:
                raise CandidateFailed(
                    f"For the student {arch}, the {role}'s latency was measured as "
                    f"{latency.median_ms} ms, so this student cannot be scored."
                )
        return ArchLatency(student, teacher, num_parameters(model))

    @cached_property
    def _teacher(self) -> PreTrainedModel | Path:
        model = _build(self.teacher_config)
        if self.settings.backend not in ON_ONNX:
            return model
        self._folder = temporary_folder()  # lives as long as the meter
        return write_deployed(
            model.eval(), Path(self._folder.name), self.settings.backend == "onnxruntime-int8"
        )


def _devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    count = torch.accelerator.device_count()
    return ["cpu", accelerator.type, *(f"{accelerator.type}:{index}" for index in range(count))]


def _read_lengths(name: str) -> list[int]:
    refuse_special(Path(name))
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
        values = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"latency.lengths: cannot read {name!r}: {first_line(error)}.") from error
    rows: list[Any] = [
        value.get("length") if isinstance(value, dict) else value for value in values
    ]
    wrong = [row for row in rows if type(row) is not int or row < 1]
    if wrong or not rows:
        found = f"has {wrong[0]!r}" if wrong else "is empty"
        raise UserError(
            f"latency.lengths: {name!r} {found}: "
            'each line must be a whole number above 0, or {"length": 17}.'
        )
    return rows


def check_length(config: PreTrainedConfig, settings: LatencySettings) -> None:
    """Raise ``UserError`` if rows of ``settings`` are longer than a model of ``config`` takes."""
    longest = max_length(config)
    asked = max(map(max, settings.batches()))
    if asked > longest:
        where = f" in {settings.lengths!r}" if settings.lengths else ""
        raise UserError(
            f"latency.length is {asked}{where}, but this {config.model_type} model takes at most "
            f"{longest} tokens: give a smaller length."
        )


def _build(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):  # leave the caller's random numbers as they were
        return build_classifier(config)


def _batch(
    config: PreTrainedConfig, lengths: Sequence[int], settings: LatencySettings
) -> dict[str, Any]:
    if settings.backend in ON_ONNX:
        batch = random_batch(config, lengths, (*INPUTS, "token_type_ids"))
        return {name: value.numpy() for name, value in batch.items()}
    batch = random_batch(config, lengths)
    return {name: value.to(settings.device) for name, value in batch.items()}


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Context manager in which torch uses ``number`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _running(
    models: Sequence[nn.Module | Path], settings: LatencySettings
) -> Iterator[Sequence[Callable[..., Any]]]:
    """Context manager that gives, for each model, a function which runs it on a batch."""
    device = settings.device
    modules = [model for model in models if isinstance(model, nn.Module)]
    no_autocast = torch.autocast(torch.device(device).type, enabled=False)
    with _deployed(modules, device), no_autocast:
        if settings.backend in ON_ONNX:
            with temporary_folder() as folder:
                yield [
                    _session(model, Path(folder) / str(place), settings)
                    for place, model in enumerate(models)
                ]
            return
        if settings.backend == "torch-bf16":
            modules = [copy.deepcopy(model).to(torch.bfloat16) for model in modules]
        yield modules


def _session(model: Any, folder: Path, settings: LatencySettings) -> Callable[..., Any]:
    if not isinstance(model, Path):
        model = write_deployed(model, folder, settings.backend == "onnxruntime-int8")
    session = open_session(model, settings.num_threads)
    names = [node.name for node in session.get_inputs()]
    return lambda **batch: session.run(None, {name: batch[name] for name in names})


@contextmanager
def _deployed(models: Sequence[nn.Module], device: str) -> Iterator[None]:
    """Context manager that moves models to a device, in eval mode, and restores both at the end."""
    # Outside of inference_mode: parameters that are moved within it cannot be trained afterwards.
    homes = [next(model.parameters()).device for model in models]
    modes = [(part, part.training) for model in models for part in model.modules()]
    try:
        for model in models:
            model.to(device).eval()
        yield
    finally:
        for model, home in zip(models, homes, strict=True):
            model.to(home)
        for part, training in modes:
            part.training = training


def _timed(turn: Sequence[Callable[[], Any]], device: torch.device, share: float) -> list[float]:
    """Run a model for at least ``share`` seconds; return each forward pass's time in seconds.

    ``turn`` has a function for each batch, which runs the model on it. All batches run equally
    often, after one untimed pass.
    """
    turn[0]()
    times: list[float] = []
    while sum(times) < share:
        times += [_seconds(run, device) for run in turn]
    return times


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        with torch.cuda.device(device):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1000
    begin = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - begin


def _summary(times: list[float], lengths: Sequence[Sequence[int]]) -> Latency:
    """Summarise the times (in seconds) of all forward passes of a model.

    ``lengths`` has the row lengths of each batch, and ``times`` goes through the batches in turn.
    Median and 95th percentile are over all passes. The interquartile range is the mean of the
    batches' ranges, because different lengths would widen a common range. Tokens and rows per
    second are computed from each batch's median time.
    """
    seconds = np.array(times).reshape(-1, len(lengths))
    median, most = np.percentile(1000 * seconds, (50, 95)).tolist()
    low, high = np.percentile(1000 * seconds, (25, 75), axis=0).mean(1).tolist()
    cycle = float(np.median(seconds, 0).sum())
    return Latency(
        median_ms=median,
        iqr_ms=high - low,
        num_runs=len(times),
        p95_ms=most,
        tokens_per_second=sum(map(sum, lengths)) / cycle,
        sequences_per_second=sum(map(len, lengths)) / cycle,
    )
