"""What a search will cost, measured before it is begun on a few steps of a few students."""

import dataclasses
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kdnas.arch import StudentArch
from kdnas.config import SpaceConfig
from kdnas.data.datamodule import Batch
from kdnas.distill.module import HiddenStateDistillModule
from kdnas.distill.teacher import LiveTeacher, TeacherStates, measure_stats, state_cache
from kdnas.job import Found, look
from kdnas.models import find_teacher
from kdnas.training import fit, make_trainer

NUM_STUDENTS = 4  # drawn from the space, within the budget
MOST_LOOKS = 24  # at students that may be refused
NUM_STEPS, NUM_WARM_UP = 8, 2
NUM_VAL_BATCHES = 3


@dataclass(frozen=True)
class Plan:
    """What a search is expected to need.

    Args:
        states_seconds: to compute the teacher's states and store them; 0 where they are there, or it runs live.
        states_bytes: that they take on disk.
        candidate_seconds: of each measured student, latency and mini-KD.
        num_trials: candidates that will be trained: those asked for, or fewer where few are within the budget.
        refused_share: share of the students that the budget refuses.
        search_seconds: of all candidates, teacher's states not counted.
        memory_bytes: of all workers, at their peak.
    """

    states_seconds: float
    states_bytes: int
    candidate_seconds: dict[StudentArch, float]
    num_trials: int
    refused_share: float
    search_seconds: float
    memory_bytes: int

    def table(self) -> Table:
        """For the terminal: a row a stage."""
        table = Table("stage", "minutes", "disk", "memory", title="What the search will need, about")
        memory = f"{self.memory_bytes / 1e9:.1f} GB"
        table.add_row("teacher states", _minutes(self.states_seconds), f"{self.states_bytes / 1e9:.2f} GB", memory)
        table.add_row(f"{self.num_trials} candidates", _minutes(self.search_seconds), "", memory)
        table.add_row("in all", _minutes(self.states_seconds + self.search_seconds), "", "", style="bold")
        return table


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"


class _Timed:
    """A live teacher that counts its seconds, so that they can be told from the student's."""

    def __init__(self, teacher: LiveTeacher) -> None:
        self.teacher, self.seconds, self.num_tokens = teacher, 0.0, 0

    def __call__(self, batch: Batch, layers: Sequence[int]) -> list[Tensor]:
        begin = time.perf_counter()
        states = self.teacher(batch, layers)
        self.seconds += time.perf_counter() - begin
        self.num_tokens += len(states[0])
        return states


class _Clock(pl.Callback):
    """Seconds a token of training and of validation, and of what comes before, without the teacher's.

    Args:
        teacher: whose seconds do not count.
    """

    def __init__(self, teacher: _Timed) -> None:
        self.teacher = teacher
        self.start_seconds = 0.0
        self.train: list[tuple[float, int]] = []  # seconds, tokens
        self.val: list[tuple[float, int]] = []
        self.begin()

    def now(self) -> float:
        return time.perf_counter() - self.teacher.seconds

    def begin(self) -> None:
        self._last = self.now()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start_seconds = self.now() - self._last
        self.begin()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self._note(self.train, batch)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begin()

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, *indices: int) -> None:
        self._note(self.val, batch)

    def _note(self, steps: list[tuple[float, int]], batch: Batch) -> None:
        steps.append((self.now() - self._last, int(batch["attention_mask"].sum())))
        self.begin()


def _rate(steps: list[tuple[float, int]], num_warm_up: int) -> float:
    """Seconds a token."""
    counted = steps[num_warm_up:] or steps
    return sum(seconds for seconds, _ in counted) / max(1, sum(tokens for _, tokens in counted))


def _timed_states(found: Found) -> TeacherStates:
    """The teacher's states, live, from a teacher whose seconds are counted."""
    model, layers = found.teacher.model, found.target_layers
    stats = measure_stats(model, LiveTeacher(model), layers, found.data, "cpu")
    return TeacherStates(_Timed(LiveTeacher(model)), layers, found.teacher.config.hidden_size, stats)


def candidate_seconds(found: Found, arch: StudentArch, states: TeacherStates, folder: Path) -> float:
    """The seconds of one candidate's mini-KD on stored states, extended from a few of its steps.

    Args:
        found: what was asked for.
        arch: of the student.
        states: the teacher's, live and timed.
        folder: for the Trainer's logs.
    """
    assert isinstance(states.source, _Timed)
    data, num_epochs = found.data.select("mini"), found.config.search.num_epochs
    clock = _Clock(states.source)
    module = HiddenStateDistillModule(found.teacher, arch, found.config.recipe)
    module.states = states
    trainer = make_trainer(found.config.trainer, folder, 1, [clock])
    trainer.limit_train_batches, trainer.limit_val_batches = NUM_STEPS, NUM_VAL_BATCHES
    fit(trainer, module, data)
    assert data.rows is not None
    num_train, num_val = (int(data.rows.lengths[ids].sum()) for ids in (data.train_ids(), data.held_out_ids()))
    return clock.start_seconds + num_epochs * (
        num_train * _rate(clock.train, NUM_WARM_UP) + num_val * _rate(clock.val, 1)
    )


def plan(found: Found) -> Plan:
    """Measure a few students and extend it to the search; nothing stays on the disk.

    Args:
        found: what was asked for, looked at.
    """
    config, settings = found.config, found.config.search
    generator = np.random.default_rng(config.seed)
    assert found.data.rows is not None
    with tempfile.TemporaryDirectory() as name, torch.random.fork_rng():
        folder = Path(name)
        states = _timed_states(found)
        timed = states.source
        assert isinstance(timed, _Timed)
        archs = list(found.space)
        measured: dict[StudentArch, float] = {}
        num_refused = 0
        for place in generator.permutation(len(archs))[:MOST_LOOKS]:
            arch, begin = archs[place], time.perf_counter()
            violation, _ = settings.budget.violation(found.meter.measure(arch))
            latency_seconds = time.perf_counter() - begin
            if violation > 0:
                num_refused += 1
                continue
            measured[arch] = latency_seconds + candidate_seconds(found, arch, states, folder / str(len(measured)))
            if len(measured) == NUM_STUDENTS:
                break
        refused_share = num_refused / (num_refused + len(measured))
        if not measured:  # a tight budget: ``look`` has seen that the smallest student meets it
            arch = found.space.smallest()
            measured[arch] = latency_seconds + candidate_seconds(found, arch, states, folder / "smallest")
    cache = state_cache(found.teacher, found.data, found.target_layers, found.states_settings)
    mini = found.data.select("mini")
    row_ids = np.concatenate([mini.train_ids(), mini.held_out_ids()])
    size, num_tokens = cache.num_bytes(row_ids), int(found.data.rows.lengths[row_ids].sum())
    fits = size <= config.states.max_gb * 1e9
    missing = cache.num_missing_bytes(row_ids) / size
    mean_seconds = float(np.mean(list(measured.values())))
    num_trials = min(settings.n_trials, max(1, round((1 - refused_share) * len(found.space))))
    num_refusals = min(num_trials * refused_share / max(1 - refused_share, 1 / len(found.space)), len(found.space))
    per_token = timed.seconds / timed.num_tokens
    search = num_trials * mean_seconds + num_refusals * latency_seconds
    if not fits:  # the teacher runs in every step
        search += num_trials * settings.num_epochs * num_tokens * per_token
    return Plan(
        states_seconds=missing * num_tokens * config.data.num_mask_variants * per_token if fits else 0.0,
        states_bytes=size if fits else 0,
        candidate_seconds=measured,
        num_trials=num_trials,
        refused_share=refused_share,
        search_seconds=search / min(config.workers, max(1, torch.cuda.device_count())),  # cores are shared
        memory_bytes=peak_memory() * config.workers,
    )


def show_space(config: SpaceConfig, console: Console) -> None:
    """Print the space of a teacher: its choices, its size, and what its smallest and its largest student cost.

    Raises:
        UserError: anything that the user can mend.
    """
    with tempfile.TemporaryDirectory() as name, torch.random.fork_rng():
        if not config.text:
            text = Path(name) / "random.txt"
            text.write_text(
                "\n".join(_random_rows(find_teacher(config.teacher).tokenizer, config.data.max_length)),
                encoding="utf-8",
            )
        found = look(dataclasses.replace(config, text=config.text or str(text), root=name), Console(quiet=True))
        states = _timed_states(found)
        costs = Table("", "student", "parameters", "speed-up", "seconds a candidate", "memory")
        for label, arch in (("smallest", found.space.smallest()), ("largest", found.space.largest())):
            latency = found.meter.measure(arch)
            seconds = candidate_seconds(found, arch, states, Path(name) / label)
            costs.add_row(
                label,
                str(arch),
                f"{latency.num_parameters / 1e6:.1f} M",
                f"{latency.speedup:.1f}x",
                f"{seconds:.0f}",
                f"{peak_memory() / 1e9:.1f} GB",
            )
    console.print(f"{len(found.space)} students of {config.teacher}: every combination of", highlight=False)
    for field, values in found.space.choices.items():
        console.print(f"  {field}: {values}", highlight=False)
    console.print(costs)
    num_rows, epochs = len(found.data.select("mini").train_ids()), config.search.num_epochs
    words = f"{num_rows:,} rows" if config.text else f"{num_rows:,} random rows; give --text for yours"
    console.print(f"A candidate: {epochs} epochs on {words}, the teacher's states stored.", highlight=False)


def _random_rows(tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[str]:
    """Distinct rows of random tokens of all lengths, as text."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(4, max_length, size=2_000)
    drawn = [generator.integers(len(tokenizer), size=length) for length in lengths]
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in drawn]


def peak_memory() -> int:
    """Bytes that this process had in memory at its peak."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
