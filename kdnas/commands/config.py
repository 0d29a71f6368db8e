"""Configs of the commands: each field is an option of the command line and a key in its YAML."""

import dataclasses
import itertools
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any, Literal

from kdnas.data.datamodule import DataSettings
from kdnas.deploy.latency import ON_ONNX, LatencySettings
from kdnas.distillation.module import Recipe
from kdnas.distillation.teacher_states import StatesSettings
from kdnas.nas.budget import Budget
from kdnas.nas.reward import reward
from kdnas.system.errors import UserError
from kdnas.system.pool import num_gpus, usual_slots
from kdnas.tasks.finetune import FinetuneSettings
from kdnas.tasks.task_distill import TaskDistillSettings
from kdnas.training.trainer import TrainerSettings, class_path


@dataclass(frozen=True)
class SpaceSettings:
    """Possible sizes of students; null: the choices are derived from the teacher.

    Args:
        num_hidden_layers: numbers of layers.
        num_attention_heads: numbers of attention heads in a layer; each must divide every width.
        hidden_size: widths.
        intermediate_size: widths between the two linear maps of the feed-forward part.
        hidden_act: activations, by their names in transformers (``gelu``, ...).
    """

    num_hidden_layers: list[int] | None = None
    num_attention_heads: list[int] | None = None
    hidden_size: list[int] | None = None
    intermediate_size: list[int] | None = None
    hidden_act: list[str] | None = None


@dataclass(frozen=True)
class SearchSettings:
    """How many candidates are trained, how long, and how they are ranked.

    Args:
        n_trials: number of distinct candidates to train, also counting those from before an
            interruption. Pruned candidates count; those over budget or failed do not.
        num_epochs: epochs of each candidate's short distillation (mini-KD).
        budget: hard limits; a student that breaks one is not trained.
        alpha: exponent of the latency factor in the reward, at most 0. 0 ranks by loss alone; with
            -0.06, half the latency raises the reward by 4 %.
        beta: latency, as a share of the teacher's, at which the latency factor is 1; it does not
            change the ranking.
        loss: the loss in the reward: ``held_out`` (on held-out rows, after the last epoch) or
            ``train`` (the mean training loss of the last epoch, as in the original KD-NAS).

    Raises:
        UserError: a value is out of its range.
    """

    n_trials: int = 20
    num_epochs: int = 2
    budget: Budget = field(default_factory=Budget)
    alpha: float = -0.06
    beta: float = 0.6
    loss: Literal["held_out", "train"] = "held_out"

    def __post_init__(self) -> None:
        for name in ("n_trials", "num_epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"search.{name} is {getattr(self, name)}: give at least 1.")
        reward(0.0, 1.0, 1.0, self.alpha, self.beta)


@dataclass(frozen=True)
class SearchLatencySettings(LatencySettings):
    """How the latency of candidates is measured, and when.

    Args:
        when: ``before_fit`` (before training) or ``after_fit`` (after training, in a callback).
            null: before training if there is a budget (students over budget are then not trained),
            otherwise after training.
    """

    when: Literal["before_fit", "after_fit"] | None = None


@dataclass(frozen=True)
class FullKDSettings:
    """Full KD: the distillation of the best student on all training rows.

    Args:
        num_epochs: passes over the rows. 0, or ``full_kd: null``: no full KD; the weights from the
            search are fine-tuned and exported.
        from_candidate: continue from the student's weights and optimizer state in the search; if
            false, start again from the teacher.
    """

    num_epochs: int = 4
    from_candidate: bool = True

    def __post_init__(self) -> None:
        if self.num_epochs < 0:
            raise UserError(
                f"full_kd.num_epochs is {self.num_epochs}: give at least 0 (0: no full KD)."
            )


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Options of ``kdnas search``.

    Args:
        teacher: the teacher: a folder, a name on the Hugging Face hub, or ``quickstart``
            (all-MiniLM-L6-v2 from the package index).
        text: the training text: a parquet, jsonl, csv or txt file, a folder of such files, a data
            set on the hub, or ``quickstart`` (prose from the installed packages).
        name: name of the run and of its folder; if the run was stopped, the same name resumes it.
        root: folder of all runs.
        sampler: what proposes candidates: tpe, lstm, lstm-original, random, gp, nsgaii, or the
            class path of any Optuna sampler, with its init_args.
        pruner: what stops candidates early, by their held-out loss after each epoch: none, median,
            hyperband, or the class path of any Optuna pruner, with its init_args.
        workers: number of processes that train candidates, and later fine-tune models, in parallel
            on this machine; each has its share of the cores and one GPU. null: one for each GPU or,
            without a GPU, one for each core, at most four. 0: no further process; one job at a
            time. While one process measures latency, the others pause.
        executor: use a Dask cluster instead of processes on this machine: ``dask://HOST:PORT`` of
            its scheduler. Its workers, on any machine, must have been started in this folder.
        storage: SQLAlchemy URL of the study's database, to watch the study from elsewhere. null: an
            SQLite file in the run's folder.
        candidate_timeout: minutes that a candidate may take; one that takes longer is killed and
            counts as failed. null: no limit.
        time_budget: minutes of wall-clock time for the search; after that no candidate is started
            (but one is always trained), and running ones are finished. null: no limit.
        seed: seed of the split, the masks, the search and the weights.
        space: which students may be proposed; ``kdnas space`` shows them.
        data: how text becomes batches; ``seed`` sets its seed.
        recipe: how students are distilled.
        search: how many candidates are trained, and how they are ranked.
        latency: how latency is measured.
        states: where the teacher's hidden states are stored.
        trainer: device, precision, logger and callbacks.

    Raises:
        UserError: a value is out of its range, two options contradict each other, or ``data``,
            ``finetune`` or another group has its own seed.
    """

    teacher: str
    text: str
    name: str = "kdnas"
    root: str = "lightning_logs"
    sampler: str | dict[str, Any] = "tpe"
    pruner: str | dict[str, Any] = "none"
    workers: int | None = None
    executor: str | None = None
    storage: str | None = None
    candidate_timeout: float | None = None
    time_budget: float | None = None
    seed: int = 0
    space: SpaceSettings = field(default_factory=SpaceSettings)
    data: DataSettings = field(default_factory=DataSettings)
    recipe: Recipe = field(default_factory=Recipe)
    search: SearchSettings = field(default_factory=SearchSettings)
    latency: SearchLatencySettings = field(default_factory=SearchLatencySettings)
    states: StatesSettings = field(default_factory=StatesSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)

    def __post_init__(self) -> None:
        if not isinstance(self.latency, SearchLatencySettings):  # plain settings, given from Python
            latency = SearchLatencySettings(**vars(self.latency))
            object.__setattr__(self, "latency", latency)
        if self.latency.when == "after_fit" and self.measures_first:
            raise UserError(
                "latency.when is after_fit, but with a budget latency is measured before the fit: "
                "leave out latency.when or the budget."
            )
        for name in ("data", "finetune"):  # only a run has finetune
            part = getattr(self, name, None)
            if part and part.seed not in (type(part).seed, self.seed):
                raise UserError(
                    f"{name}.seed is {part.seed}, but the option --seed sets this seed: give "
                    "--seed instead."
                )
        if self.workers is not None and self.workers < 0:
            raise UserError(f"workers is {self.workers}: give at least 0 (0: all in this process).")
        if self.candidate_timeout is not None and (self.workers == 0 or self.executor):
            raise UserError(
                "candidate_timeout needs worker processes on this machine, which can be killed: "
                "give --workers 1 or more, and no --executor."
            )
        for name in ("candidate_timeout", "time_budget"):
            if (minutes := getattr(self, name)) is not None and not minutes > 0:
                raise UserError(
                    f"{name} is {minutes}: give a number of minutes above 0, such as 30."
                )

    @property
    def num_workers(self) -> int:
        """Number of worker processes: ``workers``, or this machine's default if that is None."""
        return usual_slots(self.trainer.accelerator) if self.workers is None else self.workers

    @property
    def measures_first(self) -> bool:
        """Whether latency is measured before a candidate is trained (else after)."""
        return self.search.budget != Budget() or self.latency.when == "before_fit"


@dataclass(frozen=True, kw_only=True)
class SpaceConfig(SearchConfig):
    """Options of ``kdnas space``: those of a search, of which only the teacher is required.

    Args:
        text: not read; it may be given because the YAML of a search has it.
    """

    text: str = ""


@dataclass(frozen=True)
class Grid:
    """Batch sizes and learning rates for fine-tuning; each model gets its best combination.

    Combinations are compared with one seed, on a held-out share of the training rows.

    Args:
        batch_sizes: numbers of rows in a step.
        learning_rates: AdamW's peak learning rates.
        held_out: share of the training rows that is held out to compare combinations, above 0 and
            below 1. The validation rows, for the reported scores, are not used.

    Raises:
        UserError: a list is empty, or a value is out of its range.
    """

    batch_sizes: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128])
    learning_rates: list[float] = field(default_factory=lambda: [3e-4, 1e-4, 5e-5, 3e-5])
    held_out: float = 0.1

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "learning_rates"):
            if not getattr(self, name):
                raise UserError(f"grid.{name} is {getattr(self, name)}: give at least one value.")
        if not 0 < self.held_out < 1:
            raise UserError(
                f"grid.held_out is {self.held_out}: give a share above 0 and below 1, such as 0.1."
            )
        for size, rate in itertools.product(self.batch_sizes, self.learning_rates):
            FinetuneSettings(batch_size=size, learning_rate=rate)


@dataclass(frozen=True, kw_only=True)
class RunConfig(SearchConfig):
    """Options of ``kdnas run``: those of ``kdnas search``, and those of the later stages.

    Args:
        task: a labelled task to fine-tune on: a folder with train.parquet and validation.parquet in
            GLUE's layout, the name of a GLUE task on the hub (``stsb``), or ``quickstart``. Without
            a task, the encoder is exported.
        trial: number of a trained candidate to use instead of the best one. Its full KD,
            fine-tuning, export and report become the run ``<name>-trial-<number>``.
        task_distill: while the student is fine-tuned, let it also learn from the teacher that this
            run has fine-tuned.
        full_kd: the distillation of the best student on all rows.
        grid: first choose the best batch size and learning rate for each model; ``--grid`` alone
            uses the default choices.
        finetune: how teacher, student and baselines are fine-tuned; ``seed`` sets its seed.
        distill: how the student learns from the fine-tuned teacher.
        time_budget: minutes of wall-clock time for the whole run. Unless it is surely short enough
            (by its FLOPs), the run first measures its speed for some minutes. If it would take too
            long, it lowers the epochs of full KD, the rows, the candidates and last the epochs of
            fine-tuning, but only values that are at their defaults. null: no limit.
    """

    time_budget: float | None = 120.0
    task: str | None = None
    trial: int | None = None
    task_distill: bool = False
    full_kd: FullKDSettings = field(default_factory=FullKDSettings)
    grid: Grid | None = None
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    distill: TaskDistillSettings = field(default_factory=TaskDistillSettings)

    @property
    def num_devices(self) -> int:
        """Number of devices that share full KD: ``trainer.devices``, or all GPUs of this machine.

        On a CPU the default is 1: threads of one process are faster than several processes, each
        with its own optimizer (LOG.md).
        """
        is_here = self.num_workers > 0 and not self.executor
        return self.trainer.devices or (num_gpus(self.trainer.accelerator) if is_here else 0) or 1


@dataclass(frozen=True, kw_only=True)
class LatencyConfig:
    """Options of ``kdnas latency``; it measures every combination of the values in lists.

    Args:
        model: models to measure (teachers or students): folders, names on the hub, or
            ``quickstart``. The others are compared with the first, normally the teacher. If a model
            is an exported folder, the ONNX backends measure its ONNX files. Otherwise only the
            model's shape is used, with random weights and a classification head.
        backend: what runs the models: torch, torch-bf16, onnxruntime, onnxruntime-int8, cuda.
        batch: numbers of rows in a batch.
        length: numbers of tokens in a row.
        lengths: a jsonl file of real row lengths to use instead of ``length``: a number or
            ``{"length": number}`` on each line.
        threads: numbers of CPU threads.
        device: where the torch backends run the models: ``cpu``, ``cuda``, ``cuda:1``, ...
        min_seconds: seconds to spend on each measurement, at least.
        json: file for the figures; the picture is written beside it, as ``.png``.
    """

    model: list[str]
    backend: list[str] = field(default_factory=lambda: ["torch"])
    batch: list[int] = field(default_factory=lambda: [1])
    length: list[int] = field(default_factory=lambda: [128])
    lengths: str | None = None
    threads: list[int] = field(default_factory=lambda: [1])
    device: str = "cpu"
    min_seconds: float = 0.5
    json: str = "lightning_logs/latency.json"

    def settings(self) -> list[LatencySettings]:
        """Return a ``LatencySettings`` for each combination of the values in lists."""
        lengths = self.length[:1] if self.lengths else self.length
        found = []
        for values in itertools.product(self.backend, self.threads, self.batch, lengths):
            backend, threads, batch, length = values
            device = "cpu" if backend in ON_ONNX else self.device
            how = (backend, device, batch, length, self.lengths, threads, self.min_seconds)
            found.append(LatencySettings(*how))
        return found


@dataclass(frozen=True, kw_only=True)
class GlueConfig:
    """Options of ``kdnas glue``, which fine-tunes models on labelled tasks with the same settings.

    Args:
        model: models to fine-tune (teachers or students): folders or hub names of encoders, or
            ``quickstart``; ``--model`` once for each. The others are compared with the first,
            normally the teacher.
        task: tasks, ``--task`` once for each: GLUE names (cola, mnli, mrpc, qnli, qqp, rte, sst2,
            stsb, wnli), loaded from the hub or from folders in ``data``; or folders in GLUE's
            layout.
        data: a folder that holds a folder for each task. Without a task, your own labelled text: a
            parquet, csv or tsv file (a tenth of its rows is held out and scored), or a folder with
            train and validation files.
        text_column: text column of your own labelled text; give two columns for pairs.
        label_column: label column of your own labelled text. Whole numbers and text are classes;
            fractional numbers make a regression.
        distill_from: a classifier fine-tuned on the task, as a teacher. Every model but the first
            (or the only one) is also fine-tuned with this teacher, as another row of the table.
        name: name of the comparison and of its folder; the same name resumes it, also with more
            models, tasks or seeds.
        root: folder of all runs.
        seeds: number of seeds (0, 1, ...), which set head, dropout and order of the rows; the table
            shows the mean and standard deviation of the scores.
        workers: number of processes that fine-tune in parallel, each with its share of the cores
            and one GPU. null: one for each GPU or, without a GPU, one for each core, at most four.
            0: this process does everything, one model at a time.
        grid: first choose the best batch size and learning rate for each model and task; ``--grid``
            alone uses the default choices.
        finetune: how models are fine-tuned; ``seeds`` sets its seed.
        distill: how models learn from ``distill_from``.
        latency: how latency is measured.
        trainer: device, precision, logger and callbacks.

    Raises:
        UserError: there is no model, task or seed; a model or task is given twice; both a task and
            a text column are given; or ``finetune.seed`` is given.
    """

    model: list[str]
    task: list[str] = field(default_factory=list)
    data: str | None = None
    text_column: list[str] = field(default_factory=list)
    label_column: str = "label"
    distill_from: str | None = None
    name: str = "glue"
    root: str = "lightning_logs"
    seeds: int = 1
    workers: int | None = None
    grid: Grid | None = None
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    distill: TaskDistillSettings = field(default_factory=TaskDistillSettings)
    latency: LatencySettings = field(default_factory=LatencySettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)

    def __post_init__(self) -> None:
        if not self.model or len(set(self.model)) < len(self.model):
            raise UserError(f"model is {self.model}: give at least one model, each once.")
        if len(set(self.task)) < len(self.task):
            raise UserError(f"task is {self.task}: give no duplicates.")
        if self.task and self.text_column:
            raise UserError(
                f"text_column is {self.text_column}, but the task {self.task[0]!r} has columns of "
                "its own: leave out --text-column or --task."
            )
        if not self.task and self.data is None:
            raise UserError(
                "There is no task to fine-tune on: give --task (such as stsb), or --data FILE "
                "--text-column NAME."
            )
        if self.finetune.seed != FinetuneSettings.seed:
            raise UserError(
                f"finetune.seed is {self.finetune.seed}, but the option --seeds sets this seed: "
                "give --seeds NUMBER instead."
            )
        if self.seeds < 1:
            raise UserError(f"seeds is {self.seeds}: give at least 1.")

    @property
    def num_workers(self) -> int:
        """Number of processes: ``workers``, or this machine's default if that is None."""
        return usual_slots(self.trainer.accelerator) if self.workers is None else self.workers


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Options of ``kdnas export``; give either ``--run NAME`` or ``--student FOLDER``.

    Args:
        run: name of a run, whose student is exported.
        student: instead of a run, a folder with any encoder or classifier and its tokenizer.
        root: folder of all runs.
        format: ``transformers``, or ``sentence-transformers``: a sentence encoder with its
            teacher's pooling, compared with the teacher on texts and, with ``--task stsb``, by
            Spearman correlation. ``--as`` is the same option.
        output: folder to write. By default ``student/`` in the run's folder, or the student's
            folder with ``-export`` added to its name.
        teacher: teacher of ``student``: a folder, a hub name or ``quickstart``. It is named on the
            model card, and the student must fit it. Not needed for a run.
        task: labelled rows on which the int8 graph is scored: a folder or a GLUE name. For a run,
            its own task by default.
        data: your own labelled text instead of a task, as for ``kdnas glue``: a parquet, csv or tsv
            file, or a folder.
        text_column: text column of ``data`` (two for pairs); without ``data``, that of ``text``.
        label_column: label column of ``data``.
        text: text without labels, to compare graphs if there is no task, and to compare sentence
            vectors. For a run, its own text by default.
        length: number of tokens at which texts are cut; by default, as many as the student takes.
        license: license on the model card, by the hub's identifier, such as apache-2.0.
        hub_repo: hub repository to which the folder is pushed afterwards; a new one is private.
        force: replace an earlier export in the output folder.

    Raises:
        UserError: both ``data`` and ``task`` are given, or ``data`` without ``text_column``.
    """

    run: str | None = None
    student: str | None = None
    root: str = "lightning_logs"
    format: str = "transformers"
    output: str | None = None
    teacher: str | None = None
    task: str | None = None
    data: str | None = None
    text_column: list[str] = field(default_factory=list)
    label_column: str = "label"
    text: str | None = None
    length: int | None = None
    license: str | None = None
    hub_repo: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.data and (self.task or not self.text_column):
            given = f"task is {self.task!r}" if self.task else "text_column is []"
            raise UserError(
                f"data is {self.data!r}, but {given}: give --data with --text-column, or --task "
                "alone."
            )


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Options of ``kdnas report``: one run to write its report again, or several to compare.

    Args:
        run: names of runs, finished or not; ``--run`` once for each.
        root: folder of all runs.
        output: page to write. By default ``report.html`` in the run's folder or, for several runs,
            ``comparison.html`` in ``root``.
        storage: SQLAlchemy URL of the studies' database; needed if it has a password, which a run's
            config hides.

    Raises:
        UserError: there is no run, or one is given twice.
    """

    run: list[str]
    root: str = "lightning_logs"
    output: str | None = None
    storage: str | None = None

    def __post_init__(self) -> None:
        if not self.run or len(set(self.run)) < len(self.run):
            raise UserError(f"run is {self.run}: give at least one run, each once.")


def as_plain(value: Any) -> Any:
    """Return a config as plain values that YAML can store and read back.

    An object becomes a dictionary of its ``class_path`` and ``init_args``. A class or a function
    becomes its path.

    Raises:
        UserError: a value cannot be written in this way.
    """
    if dataclasses.is_dataclass(value):
        return {f.name: as_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {name: as_plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    if isinstance(value, type | FunctionType):
        return class_path(value)
    if isinstance(value, partial):
        return {"class_path": class_path(value), "init_args": as_plain(value.keywords)}
    path = f"{type(value).__module__}.{type(value).__qualname__}"
    if not hasattr(value, "__dict__"):
        raise UserError(
            f"{value!r} ({path}) cannot be written as YAML: use numbers, text, lists, or objects "
            "that store their arguments as attributes."
        )
    arguments = {name: as_plain(argument) for name, argument in vars(value).items()}
    return {"class_path": path} | ({"init_args": arguments} if arguments else {})
