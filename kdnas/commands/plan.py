"""What a search or a run will need, measured before it is begun: a few steps, on a few rows from all over the text."""

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.optimize import nnls
from transformers import PreTrainedTokenizerBase

from kdnas.commands.config import RunConfig, SearchConfig, SpaceConfig
from kdnas.commands.inputs import Inputs, check_place, load_inputs, states_folder
from kdnas.commands.rates import (
    NUM_STEPS,
    Distillation,
    Rates,
    distillation_rates,
    finetuning_rates,
    peak_memory,
)
from kdnas.commands.smoke import Sizes, with_few_rows
from kdnas.data.datamodule import KDDataModule, TokenRows
from kdnas.deploy.latency import ArchLatency, Latency, LatencyMeter, threads
from kdnas.distillation.teacher_states import TeacherStates, measure, state_cache
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import (
    build_classifier,
    find_teacher,
    load_classifier,
    num_parameters,
    student_config,
)
from kdnas.system.files import nearest_folder, temporary_folder
from kdnas.system.jobs import num_threads

log = logging.getLogger(__name__)

ROW_BYTES = 150  # in memory, of a row whose text and tokens lie in files
MOST_ROWS, MOST_TOKENS = (
    4_000,
    25_000,
)  # of the text: a start from the teacher looks at 20,000 tokens
FEWEST_LOOKS, MOST_LOOKS, SECONDS_OF_LOOKS = 8, 24, 6.0  # at students that may be refused
MOST_EXTENDED = 2_000  # of a large space, others that these tell of
# Most of an export is the tracing of the graph, and grows with neither text nor task: 10 s for MiniLM's student of 4
# layers on two cores (LOG.md), more for wider ones.
EXPORT_SECONDS = 30.0


@dataclass(frozen=True)
class Stage:
    """What one stage is expected to need.

    Args:
        name: of the stage.
        seconds: of wall clock.
        disk_bytes: that it takes at most, in the folder of all runs.
        memory_bytes: at its peak.
    """

    name: str
    seconds: float
    disk_bytes: float = 0
    memory_bytes: float = 0


@dataclass(frozen=True)
class Plan:
    """What a search or a run is expected to need, begun anew.

    Args:
        stages: in order.
        free_bytes: of the disk that it writes to.
        measured_on: in words.
        gpu_bytes: what these steps took of the GPU at most; 0: none was used.
    """

    stages: list[Stage]
    free_bytes: int
    measured_on: str
    gpu_bytes: int = 0

    def table(self) -> Table:
        """For the terminal: a row a stage."""
        needed = sum(stage.disk_bytes for stage in self.stages)
        free = f"{self.free_bytes / 1e9:.2f} GB of the disk are free"
        caption = f"[red]Only {free}.[/red]" if needed > self.free_bytes else f"{free}."
        table = Table("stage", "minutes", "disk", "memory", title="What it will need, about")
        if self.gpu_bytes:
            caption += f" Of the GPU a worker takes {self.gpu_bytes / 1e9:.1f} GB at least."
        table.caption = f"Measured on {self.measured_on}. {caption}"
        for stage in [
            *self.stages,
            Stage("in all", sum(stage.seconds for stage in self.stages), needed),
        ]:
            table.add_row(
                stage.name,
                f"{stage.seconds / 60:.1f}",
                f"{stage.disk_bytes / 1e9:.2f} GB" if stage.disk_bytes else "",
                f"{stage.memory_bytes / 1e9:.1f} GB" if stage.memory_bytes else "",
                style="bold" if stage.name == "in all" else None,
            )
        return table


@dataclass(frozen=True)
class Sample:
    """A search or a run on a few rows.

    Args:
        config: of the whole.
        sizes: of the whole.
        found: the few rows, looked at.
        folder: for what is measured.
    """

    config: SearchConfig
    sizes: Sizes
    found: Inputs
    folder: Path

    @property
    def rows(self) -> TokenRows:
        """The few rows."""
        assert self.found.data.rows is not None
        return self.found.data.rows

    @property
    def scale(self) -> float:
        """How many times as many rows the whole has."""
        return self.sizes.num_rows / len(self.rows)

    @property
    def tokens(self) -> tuple[float, float]:
        """How many the whole has in training rows, and in held-out ones."""
        data = self.found.data
        train, held_out = (
            int(self.rows.lengths[ids].sum()) for ids in (data.train_ids(), data.held_out_ids())
        )
        return self.scale * train, self.scale * held_out

    def memory(self) -> float:
        """Bytes at the peak of the whole: of this process until now, and what all rows need; their text is in files."""
        return peak_memory() + (self.scale - 1) * ROW_BYTES * len(self.rows)

    def candidate_seconds(self, rates: Rates) -> float:
        """Of a candidate's mini-KD."""
        train, held_out = self.tokens
        return rates.seconds(
            self.config.search.num_epochs, self.config.data.mini_fraction * train, held_out
        )


def plan(config: SearchConfig) -> Plan:
    """Measure a few students on a few rows, and extend it to the search or run; nothing stays on the disk.

    Args:
        config: of the search or run.

    Raises:
        UserError: anything that the user can mend.
    """
    check_place(config)
    with temporary_folder() as name, torch.random.fork_rng():
        num_task_rows = (
            NUM_STEPS * config.finetune.batch_size if isinstance(config, RunConfig) else 0
        )
        small, sizes = with_few_rows(config, Path(name), MOST_ROWS, 4 * MOST_TOKENS, num_task_rows)
        quick = replace(config.latency, min_seconds=min(config.latency.min_seconds, 0.05))
        found = load_inputs(replace(small, latency=quick), Console(quiet=True))
        sample = Sample(config, sizes, found, Path(name))
        reading = _reading(sample)
        sample, states, storing, of_full_kd = _storing(sample)
        latencies, refused_share = _latencies(found)
        with threads(num_threads(max(1, config.workers))):
            distillation = Distillation(sample.found, latencies, states, sample.folder)
        stages = [reading, storing, _searching(sample, distillation, latencies, refused_share)]
        if isinstance(config, RunConfig):
            best = max(
                latencies, key=latencies.__getitem__
            )  # nearly as slow as the budget lets it be
            rates, _ = distillation_rates(sample.found, best, states, sample.folder / "full")
            stages += of_full_kd + _later(sample, config, best, rates, distillation.num_bytes)
        return Plan(
            stages,
            shutil.disk_usage(nearest_folder(states_folder(config))).free,
            f"{len(sample.rows):,} of {sizes.num_rows:,} rows and {len(distillation.measured)} students",
            torch.cuda.max_memory_allocated(),  # 0 where CUDA was not used
        )


def _reading(sample: Sample) -> Stage:
    """Reading, cutting into tokens, masks; what it takes to find the teacher does not grow with the rows."""
    data, laps = sample.found.data, [time.perf_counter()]
    find_teacher(data.tokenizer)
    laps.append(time.perf_counter())
    again = KDDataModule(
        data.tokenizer, data.text, data.settings, folder=str(sample.folder / "tokens")
    )
    again.setup()
    assert again.rows is not None
    laps.append(time.perf_counter())
    seconds = max(0.0, laps[2] - laps[1] - (laps[1] - laps[0]))
    num_bytes = sum(path.stat().st_size for path in again.rows.folder.iterdir())
    return Stage(
        "reading the text", sample.scale * seconds, sample.scale * num_bytes, sample.memory()
    )


def _storing(sample: Sample) -> tuple[Sample, TeacherStates, Stage, list[Stage]]:
    """The teacher's states: of the few rows, and what those of the whole will need.

    Returns:
        The sample, whose teacher runs live if it will in the search; its states; the stage before the search; and what
        full KD needs of the teacher.
    """
    config, found = sample.config, sample.found
    real = replace(config.states, folder=str(states_folder(config)))
    # The same, if the few rows are all.
    whole = state_cache(found.teacher, found.data, found.target_layers, real, found.device)
    train, held_out = sample.tokens
    of_search = (config.data.mini_fraction * train + held_out) / (train + held_out)
    num_bytes, missing = (
        sample.scale * whole.num_bytes(),
        whole.num_missing_bytes() / whole.num_bytes(),
    )
    most_bytes = 1e9 * config.states.max_gb
    if of_search * num_bytes > most_bytes:
        live = replace(found.config, states=replace(found.config.states, max_gb=0))
        sample = replace(sample, found=(found := replace(found, config=live)))
    laps = [time.perf_counter()]
    states = found.states("full")
    laps.append(time.perf_counter())
    measure(
        found.teacher.model,
        states.source,
        states.layers,
        found.data,
        str(found.teacher.model.device),
    )
    laps.append(time.perf_counter())
    measuring = laps[2] - laps[1]  # what errors are measured against: stored too
    one_pass = sample.scale * max(0.0, laps[1] - laps[0] - measuring)
    memory = sample.memory()
    if of_search * num_bytes > most_bytes:
        return sample, states, Stage("teacher, live", measuring, memory_bytes=memory), []
    first = Stage(
        "teacher states",
        missing * of_search * one_pass + (missing > 0) * measuring,
        of_search * num_bytes,
        memory,
    )
    if not isinstance(config, RunConfig):
        return sample, states, first, []
    if num_bytes > most_bytes:
        passes = config.full_kd.num_epochs * one_pass / config.data.num_mask_variants
        return (
            sample,
            states,
            first,
            [Stage("teacher, live in full KD", passes, memory_bytes=memory)],
        )
    rest = Stage(
        "teacher states, other rows",
        missing * (1 - of_search) * one_pass,
        (1 - of_search) * num_bytes,
        memory,
    )
    return sample, states, first, [rest]


def _latencies(found: Inputs) -> tuple[dict[StudentArch, float], float]:
    """Milliseconds of students within the budget, at least of the smallest; and the share that it refuses.

    Some are measured, from all over the space; those of the others follow from their shapes.
    """
    archs, meter, looks, end = (
        list(found.space),
        found.meter,
        {},
        time.perf_counter() + SECONDS_OF_LOOKS,
    )
    order = [
        archs[place] for place in np.random.default_rng(found.config.seed).permutation(len(archs))
    ]
    for arch in order[:MOST_LOOKS]:
        looks[arch] = meter.measure(arch)
        if len(looks) >= FEWEST_LOOKS and time.perf_counter() > end:
            break
    teacher = Latency(float(np.median([look.teacher.median_ms for look in looks.values()])), 0.0, 0)
    others = [arch for arch in order[:MOST_EXTENDED] if arch not in looks]
    sizes = extend({arch: look.num_parameters for arch, look in looks.items()}, others)
    times = extend({arch: look.student.median_ms for arch, look in looks.items()}, others)
    for arch, size, milliseconds in zip(others, sizes, times, strict=True):
        looks[arch] = ArchLatency(Latency(milliseconds, 0.0, 0), teacher, round(size))
    budget = found.config.search.budget
    latencies = {
        arch: look.student.median_ms
        for arch, look in looks.items()
        if budget.violation(look)[0] <= 0
    }
    smallest = found.space.smallest()
    return latencies or {smallest: meter.measure(smallest).student.median_ms}, 1 - len(
        latencies
    ) / len(looks)


def extend(known: Mapping[StudentArch, float], archs: Sequence[StudentArch]) -> list[float]:
    """What is known of some students (a size, a time), of others: least squares of relative errors on their shapes.

    A sum, with weights of at least 0, of depth, width and their products that parameters and FLOPs are made of.

    Args:
        known: positive numbers.
        archs: the others.
    """

    def terms(arch: StudentArch) -> tuple[int, ...]:
        depth, width, inner = arch.num_hidden_layers, arch.hidden_size, arch.intermediate_size
        of_a_layer = (1, width, width**2, width * inner)
        return *of_a_layer, *(depth * term for term in of_a_layer)

    values = np.array(list(known.values()))
    rows = np.array([terms(arch) for arch in known], dtype=float)
    scale = rows.max(0)
    weights, _ = nnls(rows / scale / values[:, None], np.ones(len(values)))
    return [float(np.array(terms(arch)) / scale @ weights) for arch in archs]


def _searching(
    sample: Sample,
    distillation: Distillation,
    latencies: dict[StudentArch, float],
    refused_share: float,
) -> Stage:
    config, space = sample.config, sample.found.space
    begin = time.perf_counter()
    LatencyMeter(sample.found.teacher.config, config.latency).measure(distillation.measured[-1])
    a_look = time.perf_counter() - begin
    num_trials = min(config.search.n_trials, max(1, round((1 - refused_share) * len(space))))
    num_refused = min(
        num_trials * refused_share / max(1 - refused_share, 1 / len(space)), len(space)
    )
    candidate = float(
        np.mean([sample.candidate_seconds(distillation.rates(ms)) for ms in latencies.values()])
    )
    on_gpu = torch.cuda.is_available() and config.trainer.accelerator != "cpu"
    num_parallel = min(config.workers, torch.cuda.device_count()) if on_gpu else config.workers
    seconds = (
        num_trials * candidate / num_parallel + (num_trials + num_refused) * a_look
    )  # who measures is alone
    if config.time_budget is not None:
        seconds = min(seconds, 60 * config.time_budget + candidate)
    kept = (
        min(3, num_trials) * 3 * distillation.num_bytes
    )  # weights, and what the optimizer knows of each
    return Stage(f"{num_trials} candidates", seconds, kept, config.workers * sample.memory())


def _later(
    sample: Sample, config: RunConfig, best: StudentArch, rates: Rates, checkpoint_bytes: int
) -> list[Stage]:
    """What follows a search."""
    found, sizes = sample.found, sample.sizes
    student_bytes = 4 * num_parameters(build_classifier(student_config(found.teacher.config, best)))
    full = rates.seconds(config.full_kd.num_epochs, *sample.tokens)
    # A checkpoint too, while it lasts: weights, and what the optimizer knows of each.
    stages = [Stage("full KD", full, student_bytes + 3 * checkpoint_bytes)]
    if found.task is not None:
        num_labels = found.task.task.num_labels
        teacher = load_classifier(found.teacher.source, num_labels)
        student = build_classifier(student_config(found.teacher.config, best), num_labels)
        for name, model, copies in (
            ("teacher", teacher, 1),
            ("student and random start", student, 2),
        ):
            rates = finetuning_rates(found, config.finetune, model, sample.folder / name)
            seconds = rates.seconds(
                config.finetune.num_epochs, sizes.num_train, sizes.num_validation
            )
            stages.append(
                Stage(f"fine-tuning, {name}", copies * seconds, copies * 4 * num_parameters(model))
            )
    stages.append(Stage("export", EXPORT_SECONDS, 2.25 * student_bytes))  # float32 twice, and int8
    return [replace(stage, memory_bytes=sample.memory()) for stage in stages]


def show_space(config: SpaceConfig, console: Console) -> None:
    """Print the space of a teacher: its choices, its size, and what its smallest and its largest student cost.

    Raises:
        UserError: anything that the user can mend.
    """
    with temporary_folder() as name, torch.random.fork_rng():
        folder = Path(name)
        if is_random := not config.text:
            text = folder / "random.txt"
            rows = _random_rows(find_teacher(config.teacher).tokenizer, config.data.max_length)
            text.write_text("\n".join(rows), encoding="utf-8")
        config = replace(config, text=config.text or str(text), root=name)
        small, sizes = with_few_rows(config, folder, MOST_ROWS, 4 * MOST_TOKENS)
        found = load_inputs(small, Console(quiet=True))
        console.print(
            f"{len(found.space)} students of {config.teacher}: every combination of",
            highlight=False,
        )
        for field, values in found.space.choices.items():
            console.print(f"  {field}: {values}", highlight=False)
        log.info("Measuring the smallest and the largest of them ...")
        sample, states = Sample(config, sizes, found, folder), found.states("full")
        costs = Table("", "student", "parameters", "speed-up", "seconds a candidate", "memory")
        for label, arch in (
            ("smallest", found.space.smallest()),
            ("largest", found.space.largest()),
        ):
            latency = found.meter.measure(arch)
            rates, _ = distillation_rates(found, arch, states, folder / label)
            costs.add_row(
                label,
                str(arch),
                f"{latency.num_parameters / 1e6:.1f} M",
                f"{latency.speedup:.1f}x",
                f"{sample.candidate_seconds(rates):.0f}",
                f"{peak_memory() / 1e9:.1f} GB",
            )
    console.print(costs)
    num_rows, epochs = round(config.data.mini_fraction * sizes.num_rows), config.search.num_epochs
    words = f"{num_rows:,} {'random rows; give --text for yours' if is_random else 'rows'}"
    console.print(
        f"A candidate: {epochs} epochs on {words}, the teacher's states stored.", highlight=False
    )


def _random_rows(tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[str]:
    """Distinct rows of random tokens of all lengths, as text."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(4, max_length + 1, size=2_000)
    drawn = [generator.integers(len(tokenizer), size=length) for length in lengths]
    texts = (str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in drawn)
    # Bytes are tokens of some: a NUL is in no text, and a line's end begins another row.
    return [" ".join(text.replace("\0", " ").split()) for text in texts]
