"""Estimates the time, disk and memory of a search or a run, from a few steps on a few rows."""

import logging
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch.callbacks import Timer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from kdnas.commands.config import RunConfig, SearchConfig, SpaceConfig
from kdnas.commands.few_rows import Sizes, with_few_rows
from kdnas.commands.inputs import Inputs, check_place, load_inputs, space_of, states_folder
from kdnas.data.datamodule import HELD_OUT_TOKENS, ROWS_A_PIECE, KDDataModule, TokenRows
from kdnas.deploy.latency import ArchLatency, LatencyMeter, measured_by, threads
from kdnas.distillation.module import HiddenStateDistillModule, Recipe, calibration_rows
from kdnas.distillation.narrowing import CalibrationRows
from kdnas.distillation.start import RandomStart
from kdnas.distillation.teacher_states import (
    STATS_TOKENS,
    TeacherStates,
    open_states,
    state_cache,
)
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import (
    build_classifier,
    find_teacher,
    load_classifier,
    num_parameters,
    student_config,
)
from kdnas.report.tables import show, text_table
from kdnas.system.files import nearest_folder, temporary_folder
from kdnas.system.pool import num_threads
from kdnas.tasks.finetune import evaluate_glue
from kdnas.tasks.tasks import LoadedTask
from kdnas.training.trainer import fit, make_trainer, own_random_numbers

log = logging.getLogger(__name__)

# Limits of the sample of text: students are initialised from 20,000 tokens, and small batches would
# make many steps of these.
MOST_ROWS, MOST_TOKENS, MOST_STEPS = 2_000, 25_000, 16
NUM_LOOKS = 12  # students whose latency is measured
NUM_TASK_ROWS = 160  # labelled rows in each split
ROW_BYTES = 100  # memory for a row, whose text and tokens are in files
# Tracing the graph takes most of it, whatever the text and task: 10 s for 4 x 384 (LOG.md).
EXPORT_SECONDS = 30.0


@dataclass(frozen=True)
class Stage:
    """Estimated needs of one stage of a search or a run: seconds, disk space and memory."""

    name: str
    seconds: float
    disk_bytes: float = 0
    memory_bytes: float = 0


@dataclass(frozen=True)
class Plan:
    """What a search or a run is expected to need: seconds, disk space and memory of each stage.

    The free disk space is also given.
    """

    stages: list[Stage]
    free_bytes: int  # on the disk that the search or run writes to
    measured_on: str  # what was measured, in words
    gpu_bytes: int = 0  # peak of GPU memory in the measured steps; 0 without a GPU

    @property
    def minutes(self) -> float:
        """Return the estimated minutes of all stages together."""
        return sum(stage.seconds for stage in self.stages) / 60

    @property
    def minutes_after_search(self) -> float:
        """Return the estimated minutes of all stages after the search together."""
        return sum(stage.seconds for stage in self.stages[3:]) / 60

    def table(self) -> Table:
        """Return the plan as a table with a row for each stage."""
        needed = sum(stage.disk_bytes for stage in self.stages)
        free = f"{self.free_bytes / 1e9:.2f} GB of the disk are free"
        caption = f"[red]Only {free}.[/red]" if needed > self.free_bytes else f"{free}."
        if self.gpu_bytes:
            caption += f" A worker takes {self.gpu_bytes / 1e9:.1f} GB of GPU memory at least."
        in_all = Stage("in all", 60 * self.minutes, needed)
        rows = [
            {
                "stage": stage.name,
                "minutes": f"{stage.seconds / 60:.1f}",
                "disk": f"{stage.disk_bytes / 1e9:.2f} GB" if stage.disk_bytes else "",
                "memory": f"{stage.memory_bytes / 1e9:.1f} GB" if stage.memory_bytes else "",
            }
            for stage in [*self.stages, in_all]
        ]
        table = text_table("What it will need (estimate)", rows, words=["stage"])
        table.caption = f"Measured on {self.measured_on}. {caption}"
        return table


class Rates(NamedTuple):
    """Measured speed of a fit: seconds before its first step, and seconds per token or row.

    Distillation is measured per token, fine-tuning per row.
    """

    start: float  # before the first step
    train: float  # per token or row that is trained on
    score: float  # per token or row that is scored

    def seconds(self, num_epochs: int, num_train: float, num_scored: float) -> float:
        """Estimate the seconds of a fit: ``start``, and for each epoch its training and scoring.

        ``num_train`` and ``num_scored`` are numbers of tokens or rows in an epoch.
        """
        return self.start + num_epochs * (num_train * self.train + num_scored * self.score)


@dataclass(frozen=True)
class Sample:
    """A few rows of a search's or a run's text and task, on which its speed is measured.

    Args:
        config: config of the whole search or run, without the user's logger and callbacks.
        sizes: numbers of rows of the whole text and task.
        found: the loaded inputs: the few rows, teacher, search space and meter of latency.
        folder: temporary folder for all output.
    """

    config: SearchConfig
    sizes: Sizes
    found: Inputs
    folder: Path

    @classmethod
    def take(cls, config: SearchConfig, folder: Path) -> "Sample":
        """Draw a few rows of the text and the labelled task that a config names.

        They are written into ``folder``, and loaded from there together with the teacher.
        """
        config = replace(config, trainer=replace(config.trainer, logger=None, callbacks=[]))
        num_bytes = 4 * min(MOST_TOKENS, MOST_STEPS * config.data.batch_tokens)
        small, sizes = with_few_rows(config, folder, MOST_ROWS, num_bytes, NUM_TASK_ROWS)
        return cls(config, sizes, load_inputs(small, Console(quiet=True)), folder)

    @property
    def num_slots(self) -> int:
        """Number of worker processes; 1 if all is done in this process."""
        return max(1, self.config.num_workers)

    @property
    def rows(self) -> TokenRows:
        """The sample's rows of text, tokenised."""
        return self.found.data.rows

    @property
    def scale(self) -> float:
        """Number of usable rows in the whole text, divided by the number of rows in the sample."""
        return self.sizes.num_rows / len(self.rows)

    @property
    def few_tokens(self) -> tuple[int, int]:
        """Numbers of tokens in the sample's training rows and in its held-out rows."""
        data, lengths = self.found.data, self.rows.lengths
        return int(lengths[data.train_ids()].sum()), int(lengths[data.held_out_ids()].sum())

    def cost(self, seconds: float, num_bytes: float = 0) -> "Cost":
        """Estimate what a step, such as tokenising, costs for the whole text.

        The memory is this process's peak so far, plus what the rest of the rows would take.

        Args:
            seconds: seconds that the step took for the sample's rows.
            num_bytes: bytes that the step wrote to the disk for these rows.
        """
        num_kept = self.config.data.fraction * self.sizes.num_rows
        others = ROW_BYTES * max(0.0, num_kept - len(self.rows))
        return Cost(self.scale * seconds, self.scale * num_bytes, peak_memory() + others)


class Cost(NamedTuple):
    """Estimated seconds, bytes on disk and bytes of memory of a step for the whole text."""

    seconds: float
    num_bytes: float  # on disk
    memory: float  # in bytes


class Looks(NamedTuple):
    """Measured latencies of random students of the search space."""

    within: dict[StudentArch, ArchLatency]  # those within the budget, fastest first; at least one
    share: float  # of measured students that are within the budget
    seconds: float  # for one measurement

    def ends(self) -> list[StudentArch]:
        """Return the fastest and the slowest student within the budget; one, if they are equal."""
        archs = list(self.within)
        return list(dict.fromkeys([archs[0], archs[-1]]))


class Finetuning(NamedTuple):
    """Measured cost of fine-tuning: speed for teacher and student, disk space and memory."""

    teacher: Rates
    student: Rates
    num_bytes: float  # on disk: the teacher, the student and baselines as large as the student
    memory: float  # of a process, in bytes


@dataclass(frozen=True)
class Measured:
    """What was measured on a few rows of a search's or a run's text and task.

    From this, ``plan`` estimates what any number of rows and epochs needs.

    Args:
        sizes: numbers of rows of the whole text and task.
        about: description of what was measured.
        tokens: numbers of training tokens and of held-out tokens in the whole text.
        reading: seconds to read the whole text, whatever share of it is used.
        tokenising: cost of tokenising the whole text.
        teacher: cost of one pass of the teacher over the whole text, with hidden states stored.
        missing: share of these hidden states that is not stored yet.
        looks: latencies of some students.
        num_archs: number of students in the search space.
        rates: for the fastest and the slowest student in ``looks``, rates of mini-KD (a candidate's
            short distillation) with a worker's threads.
        full: for the slowest student in ``looks``, rates of full KD (the best student's
            distillation on all rows) with all threads; None without full KD.
        finetuning: rates of fine-tuning; None without a task.
        num_slots: number of workers.
        num_parallel: number of candidates that train at the same time.
        memory: memory of a process that distils, in bytes.
        free_bytes: free bytes on the disk that the search or run writes to.
        gpu_bytes: peak of GPU memory in the measured steps, in bytes; 0 without a GPU.
    """

    sizes: Sizes
    about: str
    tokens: tuple[float, float]
    reading: float
    tokenising: Cost
    teacher: Cost
    missing: float
    looks: Looks
    num_archs: int
    rates: Mapping[StudentArch, Rates]
    full: Rates | None
    finetuning: Finetuning | None
    num_slots: int
    num_parallel: int
    memory: float
    free_bytes: int
    gpu_bytes: int

    def tokens_of(self, config: SearchConfig) -> tuple[float, float]:
        """Return how many training tokens a config uses, and how many held-out tokens it scores."""
        train, held_out = (config.data.fraction * tokens for tokens in self.tokens)
        return train, min(held_out, HELD_OUT_TOKENS)

    def plan(self, config: SearchConfig) -> Plan:
        """Return the plan for a config.

        The config may differ from the measured one only in numbers of rows, epochs and candidates.
        """
        before, of_full_kd = _teacher_stages(self, config)
        stages = [_reading_stage(self, config), before, _search(self, config)]
        if isinstance(config, RunConfig):
            stages += of_full_kd + _later(self, config)
        return Plan(stages, self.free_bytes, self.about, self.gpu_bytes)


def plan(config: SearchConfig) -> Plan:
    """Measure two students on a few rows, and estimate what the search or run will need.

    No file is kept.

    Raises:
        UserError: something that the user gave cannot be used.
    """
    return measure(config).plan(config)


def measure(config: SearchConfig) -> Measured:
    """Run the stages of a config on a few rows, and return what was measured; no file is kept.

    Raises:
        UserError: something that the user gave cannot be used.
    """
    check_place(config)
    with temporary_folder() as name, own_random_numbers():
        sample = Sample.take(config, Path(name))
        reading, tokenising = _reading(sample)
        states, teacher, missing = _teacher(sample)
        looks = _looks(sample.found)
        rates: dict[StudentArch, Rates] = {}
        full, finetuning = None, None
        recipe, calibration = config.recipe, calibration_rows(sample.found.data)
        with threads(max(1, torch.get_num_threads() // sample.num_slots)):
            fastest, *slowest = looks.ends()
            # The fastest twice: the first time also computes what all students share.
            for arch in (fastest, fastest, *slowest):
                rates[arch] = _distillation(sample, arch, states, calibration, recipe)
        best = looks.ends()[-1]  # nearly as slow as the budget allows
        if isinstance(config, RunConfig):
            if config.full_kd.num_epochs:
                # It has all threads. As it continues from a candidate's weights, it is not
                # initialised from the teacher, which takes time: a random start stands for that.
                recipe = replace(recipe, start=RandomStart())
                full = _distillation(sample, best, states, calibration, recipe)
            finetuning = _finetunings(sample, config, best)
        train, held_out = sample.few_tokens
        num_parallel = sample.num_slots
        if sample.found.device == "cuda":
            num_parallel = min(num_parallel, torch.cuda.device_count())
        return Measured(
            sizes=sample.sizes,
            about=f"{len(sample.rows):,} of {sample.sizes.num_rows:,} rows and {len(rates)} students",
            tokens=(sample.scale * train, sample.scale * held_out),
            reading=reading,
            tokenising=tokenising,
            teacher=teacher,
            missing=missing,
            looks=looks,
            num_archs=len(sample.found.space),
            rates=rates,
            full=full,
            finetuning=finetuning,
            num_slots=sample.num_slots,
            num_parallel=num_parallel,
            memory=sample.cost(0).memory,
            free_bytes=shutil.disk_usage(nearest_folder(states_folder(config))).free,
            gpu_bytes=torch.cuda.max_memory_allocated(),  # 0 where CUDA was not used
        )


def _reading(sample: Sample) -> tuple[float, Cost]:
    """Measure how long reading and tokenising the text take.

    Returns:
        The seconds to read the whole text, and the cost of making its tokens and masks. If there
        are many rows, the cores share the tokenising, which the cost takes into account. The time
        to find the teacher is left out, because it does not grow with the rows.
    """
    data, folder = sample.found.data, str(sample.folder / "tokens")
    times = [time.perf_counter()]
    for step in (
        lambda: find_teacher(data.teacher),
        data.read_corpus,
        KDDataModule(data.teacher, data.text, data.settings, folder=folder).setup,
    ):
        step()
        times.append(time.perf_counter())
    found, read, whole = np.diff(times)
    tokenised = max(0.0, whole - found - read)
    num_pieces = sample.config.data.fraction * sample.sizes.num_rows / ROWS_A_PIECE
    num_processes = max(1.0, min(num_threads(1), num_pieces))
    num_bytes = sum(path.stat().st_size for path in sample.rows.folder.iterdir())
    return sample.scale * read, sample.cost(tokenised / num_processes, num_bytes)


def _teacher(sample: Sample) -> tuple[TeacherStates, Cost, float]:
    """Measure the teacher's forward pass over the few rows.

    Returns:
        The teacher's hidden states of the few rows, the cost of a pass over the whole text, and the
        share of the hidden states that is not stored yet.
    """
    config, found = sample.config, sample.found
    # The real cache: if the few rows are the whole text, it may hold some of their states.
    real = replace(config.states, folder=str(states_folder(config)))
    of = found.teacher, found.data, found.target_layers
    rest = found.device, config.trainer.precision
    cache = state_cache(*of, real, *rest)
    missing = cache.num_missing_bytes() / cache.num_bytes()
    settings = replace(real, folder=str(sample.folder / "states"), max_gb=float("inf"))
    begin = time.perf_counter()
    states = open_states(*of, settings, *rest)
    cost = sample.cost(time.perf_counter() - begin, cache.num_bytes())
    return states, cost, missing


def _looks(found: Inputs) -> Looks:
    """Measure the latency of some random students of the search space."""
    archs, budget = list(found.space), found.config.search.budget
    order = np.random.default_rng(found.config.seed).permutation(len(archs))
    begin = time.perf_counter()
    looks = {archs[place]: found.meter.measure(archs[place]) for place in order[:NUM_LOOKS]}
    seconds = (time.perf_counter() - begin) / len(looks)

    within = {arch: latency for arch, latency in looks.items() if budget.violation(latency)[0] <= 0}
    share = len(within) / len(looks)
    if not within:
        smallest = found.space.smallest()
        within = {smallest: found.meter.measure(smallest)}
    by_latency = sorted(within.items(), key=lambda item: item[1].student.median_ms)
    return Looks(dict(by_latency), share, seconds)


def _finetunings(sample: Sample, config: RunConfig, best: StudentArch) -> Finetuning | None:
    task = sample.found.task
    if task is None:
        return None
    base, num_labels = sample.found.teacher, task.task.num_labels
    teacher = load_classifier(base.source, num_labels)
    student = build_classifier(student_config(base.config, best), num_labels)
    with threads(max(1, torch.get_num_threads() // sample.num_slots)):
        _finetuning(sample, config, task, "warm-up", student)  # the first fit is slower
        one = _finetuning(sample, config, task, "teacher", teacher)
        other = _finetuning(sample, config, task, "student", student)
    num_bytes = 4 * num_parameters(teacher) + 3 * 4 * num_parameters(student)
    return Finetuning(one, other, num_bytes, sample.cost(0).memory)


def _finetuning(
    sample: Sample,
    config: RunConfig,
    task: LoadedTask,
    name: str,
    model: PreTrainedModel,
) -> Rates:
    """Measure the seconds per row of fine-tuning a model."""

    def finetune(timer: Timer) -> None:
        evaluate_glue(
            model,
            sample.found.teacher.tokenizer,
            task,
            replace(config.finetune, num_epochs=1),
            folder=sample.folder / name,
            trainer_settings=sample.config.trainer,
            callbacks=[timer],
            keep_model=False,
        )

    num_scored = sum(len(rows["label"]) for rows in task.validations.values())
    return _rates(finetune, len(task.train["label"]), num_scored)


def _distillation(
    sample: Sample,
    arch: StudentArch,
    states: TeacherStates,
    calibration: CalibrationRows,
    recipe: Recipe,
) -> Rates:
    """Measure the seconds per token of distilling a student."""
    found = sample.found

    def distil(timer: Timer) -> None:
        module = HiddenStateDistillModule(found.teacher, arch, recipe)
        module.states, module.calibration = states, calibration
        trainer = make_trainer(found.config.trainer, sample.folder / "fit", 1, [timer])
        fit(trainer, module, found.data)

    return _rates(distil, *sample.few_tokens)


def _rates(one_epoch: Callable[[Timer], object], num_train: int, num_scored: int) -> Rates:
    """Time a fit of one epoch; ``num_train`` and ``num_scored`` are numbers of tokens or rows."""
    timer = Timer()
    begin = time.perf_counter()
    one_epoch(timer)
    seconds = time.perf_counter() - begin
    in_loop, scoring = timer.time_elapsed("train"), timer.time_elapsed("validate")
    return Rates(seconds - in_loop, (in_loop - scoring) / num_train, scoring / num_scored)


def _reading_stage(measured: Measured, config: SearchConfig) -> Stage:
    share, cost = config.data.fraction, measured.tokenising
    seconds = measured.reading + share * cost.seconds
    return Stage("reading the text", seconds, share * cost.num_bytes, cost.memory)


def _teacher_stages(measured: Measured, config: SearchConfig) -> tuple[Stage, list[Stage]]:
    """Return the stages in which the teacher runs: one for the search, and a list for full KD.

    If the teacher's hidden states would exceed ``max_gb``, they are not stored, and the teacher
    runs in each epoch. The list is empty if full KD needs no stage of its own.
    """
    cost, (train, held_out) = measured.teacher, measured.tokens_of(config)
    of_search, of_full = config.data.mini_fraction * train + held_out, train + held_out
    token_bytes, computing, live = (
        value / sum(measured.tokens)
        for value in (
            cost.num_bytes,
            measured.missing * cost.seconds,
            cost.seconds / config.data.num_mask_variants,  # an epoch needs one variant
        )
    )
    most_tokens = 1e9 * config.states.max_gb / token_bytes

    if of_search > most_tokens:
        # It runs in each epoch of each candidate, and once on a sample, to measure variances.
        num_passes = _num_trials(measured, config) * config.search.num_epochs
        tokens = num_passes * of_search + min(2 * STATS_TOKENS + held_out, of_full)
        before = Stage("teacher, live", live * tokens, 0, cost.memory)
    else:
        num_bytes = of_search * token_bytes
        before = Stage("teacher states", of_search * computing, num_bytes, cost.memory)
    if not isinstance(config, RunConfig) or not config.full_kd.num_epochs:
        return before, []
    if of_full > most_tokens:
        seconds = config.full_kd.num_epochs * of_full * live
        return before, [Stage("teacher, live in full KD", seconds, 0, cost.memory)]
    others, name = of_full - of_search, "teacher states, other rows"
    return before, [Stage(name, others * computing, others * token_bytes, cost.memory)]


def _num_trials(measured: Measured, config: SearchConfig) -> int:
    """Return the number of candidates to train: ``n_trials``, unless the budget allows fewer."""
    most = max(1, round(measured.looks.share * measured.num_archs))
    return min(config.search.n_trials, most)


def _search(measured: Measured, config: SearchConfig) -> Stage:
    looks, num_archs = measured.looks, measured.num_archs
    num_trials = _num_trials(measured, config)
    num_looks = min(num_archs, num_trials / max(looks.share, 1 / num_archs))

    # A student's step grows with its latency, so its time is interpolated from those measured.
    times = {arch: latency.student.median_ms for arch, latency in looks.within.items()}
    train, held_out = measured.tokens_of(config)
    num_epochs, mini = config.search.num_epochs, config.data.mini_fraction * train
    each = [rates.seconds(num_epochs, mini, held_out) for rates in measured.rates.values()]
    known = [times[arch] for arch in measured.rates]
    candidate = float(np.interp(list(times.values()), known, each).mean())

    # While one process measures latency, the others pause.
    seconds = num_trials * candidate / measured.num_parallel + num_looks * looks.seconds
    if config.time_budget is not None and not isinstance(config, RunConfig):
        seconds = min(seconds, 60 * config.time_budget + candidate)
    # The best three are kept: their weights, and the optimizer's state, which is twice as large.
    largest = max(4 * latency.num_parameters for latency in looks.within.values())
    kept = min(3, num_trials) * 3 * largest
    memory = measured.num_slots * measured.memory
    return Stage(f"{num_trials} candidates", seconds, kept, memory)


def _later(measured: Measured, config: RunConfig) -> list[Stage]:
    """Return the stages after the search, for a student near the budget's latency limit."""
    looks, fitting = measured.looks, measured.finetuning
    student_bytes = 4 * looks.within[looks.ends()[-1]].num_parameters
    stages = []
    if config.full_kd.num_epochs and measured.full:
        tokens = measured.tokens_of(config)
        seconds = measured.full.seconds(config.full_kd.num_epochs, *tokens)
        # Weights and, while it runs, a checkpoint of three times their size.
        stages.append(Stage("full KD", seconds, 4 * student_bytes, measured.memory))
    memory = measured.memory
    if fitting:
        sizes, grid = measured.sizes, config.grid
        num_fits = 1 if grid is None else 1 + len(grid.batch_sizes) * len(grid.learning_rates)
        one, other = (
            num_fits
            * rates.seconds(
                config.finetune.epochs_for(sizes.num_train), sizes.num_train, sizes.num_validation
            )
            for rates in (fitting.teacher, fitting.student)
        )
        # The layer cut is about as fast as the student; the static vectors take almost no time.
        seconds = max(one, (one + 3 * other) / measured.num_slots)
        memory = fitting.memory
        of_all = measured.num_slots * memory
        stages.append(Stage("fine-tuning", seconds, fitting.num_bytes, of_all))
    # Weights and graph in float32, and the int8 graph.
    return [*stages, Stage("export", EXPORT_SECONDS, 2.25 * student_bytes, memory)]


def peak_memory() -> int:
    """Return the peak memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def show_space(config: SpaceConfig, console: Console) -> None:
    """Print a search space: choices, number of students, the smallest and the largest student."""
    teacher = find_teacher(config.teacher)
    space = space_of(config, teacher)
    show(console, f"{len(space)} students of {config.teacher}: every combination of")
    for field, values in space.choices.items():
        show(console, f"  {field}: {values}")

    meter = LatencyMeter(teacher.config, config.latency)
    rows = []
    for label, arch in {"smallest": space.smallest(), "largest": space.largest()}.items():
        latency = meter.glance(arch)
        rows.append(
            {
                "": label,
                "student": str(arch),
                "parameters": f"{latency.num_parameters / 1e6:.1f} M",
                "latency (ms)": f"{latency.student.median_ms:.2f}",
                "speed-up": f"{latency.speedup:.1f}x",
            }
        )
    console.print(text_table("", rows, words=["", "student"]))
    show(console, f"Latency: {measured_by(vars(config.latency))}.")
    show(console, "`kdnas search --dry-run` estimates what a search of them will need.")
