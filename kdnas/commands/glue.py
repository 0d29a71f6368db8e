"""``kdnas glue``: fine-tune models on labelled tasks, with several seeds, and compare scores."""

import dataclasses
import hashlib
import itertools
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kdnas.commands.config import GlueConfig, RunConfig, as_plain
from kdnas.commands.engine import open_engine
from kdnas.deploy.latency import check_length, is_unsteady, measure_latency
from kdnas.models.encoders import (
    build_classifier,
    find_teacher,
    load_classifier,
    max_length,
    num_parameters,
    state_sha256,
)
from kdnas.report.tables import as_text, text_table
from kdnas.system.engine import Engine
from kdnas.system.errors import CandidateFailed, UserError, nearest
from kdnas.system.files import Run, read_json, short_names, sweep, write_json, write_text
from kdnas.system.jobs import Job
from kdnas.system.manifest import write_manifest
from kdnas.system.signals import honest_signals
from kdnas.tasks.finetune import FinetuneSettings, evaluate_glue, keep_finetune_settings
from kdnas.tasks.task_distill import TaskDistillModule, TaskDistillSettings, load_task_teacher
from kdnas.tasks.tasks import TASKS, LoadedTask, load_labelled, load_task, warn_of_head
from kdnas.training.precision import gpu_name
from kdnas.training.progress import JobBars, live_progress
from kdnas.training.trainer import TrainerSettings, own_random_numbers


@dataclass(frozen=True)
class TaskSource:
    """Loads the labelled rows of a task, in the process that fine-tunes on them.

    Args:
        load: returns the task with its rows; must be picklable.
        held_out: share of the training rows to hold out and score instead of the validation rows,
            to choose hyperparameters. None: score the validation rows.
    """

    load: Callable[[], LoadedTask]
    held_out: float | None = None

    def __call__(self) -> LoadedTask:
        task = self.load()
        return task if self.held_out is None else task.for_choosing(self.held_out)


@dataclass(frozen=True)
class Help:
    """A fine-tuned teacher that helps a model while it is fine-tuned on the same task.

    Args:
        source: folder or hub name of the teacher.
        settings: how the model learns from the teacher.
        key: hash of the teacher's weights and of ``settings``, for the name of the model's folder.
    """

    source: str
    settings: TaskDistillSettings
    key: str = ""


def fine_tuning(
    make: Callable[[int], Any],
    tokenizer: str,
    source: TaskSource,
    settings: FinetuneSettings,
    trainer: TrainerSettings,
    folder: Path,
    help: Help | None = None,
    keep_model: bool = True,
) -> dict[str, Any]:
    """Fine-tune one classifier on a task and score it, in the process of a job.

    Args:
        make: returns the classifier, given its number of outputs.
        tokenizer: folder or hub name of the tokenizer.
        source: loads the task.
        settings: how the classifier is fine-tuned.
        trainer: device and precision.
        folder: folder for the results.
        help: fine-tuned teacher to learn from; None: learn from the labels alone.
        keep_model: whether to save the fine-tuned model.

    Returns:
        The result dictionary of ``evaluate_glue``.
    """
    task = source()
    with own_random_numbers():
        torch.manual_seed(settings.seed)
        classifier = make(task.task.num_labels)
    make_module = None
    if help is not None:
        teacher = load_task_teacher(help.source, task.task)
        make_module = partial(TaskDistillModule, teacher=teacher, distill=help.settings)
    return evaluate_glue(
        classifier,
        find_teacher(tokenizer).tokenizer,
        task,
        settings,
        folder=folder,
        trainer_settings=trainer,
        make_module=make_module,
        keep_model=keep_model,
    )


@dataclass(frozen=True)
class Contender:
    """A model in the comparison, with a row in the table.

    Args:
        name: name shown in the table.
        key: name of the model's folder, which differs if the weights differ.
        source: folder or hub name of the model's tokenizer.
        make: returns the model as a classifier, given the number of outputs; must be picklable.
        shape: returns the model with random weights, to measure latency.
        helpers: task name -> fine-tuned teacher from which the model also learns; empty: the model
            learns from the labels alone.
        plain: for a model with helpers, the contender of the same model without them; else None.
    """

    name: str
    key: str
    source: str
    make: Callable[[int], Any]
    shape: Callable[[int], Any]
    helpers: dict[str, Help] = dataclasses.field(default_factory=dict)
    plain: "Contender | None" = None

    def folder(self, task: LoadedTask) -> str:
        """Return the folder of this model on a task, relative to the comparison's folder."""
        help = self.helpers.get(task.task.name)
        return f"{task.task.name}/{self.key}" + (f"-helped-{help.key}" if help else "")


def contender(source: str, name: str, config: GlueConfig, tasks: Sequence[LoadedTask]) -> Contender:
    """Make the ``Contender`` (a model in the comparison) for a pretrained encoder.

    Raises:
        UserError: there is no such encoder, or its longest input is too short for
            ``finetune.max_length`` or ``latency``.
    """
    found = find_teacher(source)
    if config.finetune.max_length > max_length(found.config):
        raise UserError(
            f"finetune.max_length is {config.finetune.max_length}, but the model {source!r} takes "
            f"at most {max_length(found.config)} tokens: give a smaller value."
        )
    check_length(found.config, config.latency)
    for task in tasks:
        warn_of_head(task.task, found.config, name)
    key = f"{_safe(Path(source).name)}-{found.sha256()[:8]}"
    make, shape = partial(load_classifier, found.source), partial(build_classifier, found.config)
    return Contender(name, key, found.source, make, shape)


def with_help(
    plain: Sequence[Contender],
    source: str,
    tasks: Sequence[LoadedTask],
    distill: TaskDistillSettings,
) -> list[Contender]:
    """Return contenders like those in ``plain`` that also learn from a fine-tuned teacher.

    Args:
        plain: the contenders that learn from the labels alone.
        source: folder or hub name of the teacher, a classifier fine-tuned on the tasks.
        tasks: the tasks, with their rows.
        distill: how the encoders learn from the teacher.

    Raises:
        UserError: there is no such teacher, it has no trained head for a task, or it has another
            tokenizer than an encoder.
    """
    helpers = {}
    for task in tasks:
        teacher = load_task_teacher(source, task.task, *(find_teacher(one.source) for one in plain))
        identity = f"{state_sha256(teacher.state_dict())}{distill}"
        key = hashlib.sha256(identity.encode()).hexdigest()[:8]
        helpers[task.task.name] = Help(source, distill, key)
    return [
        dataclasses.replace(one, name=f"{one.name}, distilled", helpers=helpers, plain=one)
        for one in plain
    ]


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")[-60:] or "model"


@dataclass(frozen=True)
class Fit:
    """One fine-tuning: a model on a task, with one seed or one combination of the grid."""

    contender: Contender
    task: LoadedTask
    settings: FinetuneSettings
    job: Job
    is_of_grid: bool

    def line(self) -> dict[str, Any]:
        """Return the dictionary that ``runs.jsonl`` has for this finished fine-tuning."""
        kind = "grid" if self.is_of_grid else "run"
        head = {"kind": kind, "model": self.contender.name, "folder": str(self.job.folder)}
        return head | dict(read_json(self.job.result_file))


@dataclass
class Comparison:
    """Fine-tunes models (contenders) on tasks and compares them; finished work is not repeated.

    Args:
        folder: folder for ``<task>/<contender>/seed_0/`` (TensorBoard logs, ``result.json`` and,
            for the first seed, ``model/``), for ``runs.jsonl`` (a line for each fine-tuning) and
            for ``results.json``.
        contenders: the models; all others are compared with the first.
        tasks: the tasks, with their rows.
        sources: for each task, its ``TaskSource``, which loads its rows in the process of a job.
        seeds: folder name (``seed_0``) -> seed.
        config: settings of fine-tuning, grid, latency and Trainer.
        engine: the engine that runs the fine-tunings.
        progress: a live display.
    """

    folder: Path
    contenders: Sequence[Contender]
    tasks: Sequence[LoadedTask]
    sources: Sequence[TaskSource]
    seeds: Mapping[str, int]
    config: GlueConfig | RunConfig
    engine: Engine
    progress: Progress

    def run(self) -> dict[str, Any]:
        """Run the fine-tunings that are missing, then measure the latency of all models in turn.

        Returns:
            The content of ``results.json``: ``tasks``; ``asked`` (the settings); and ``models``,
            which has for each contender ``scores`` by task and seed, their ``average``, ``spread``
            (standard deviation over seeds; None with one seed), ``share_kept`` (``average`` divided
            by the first contender's), latency, speed-up and parameters. A contender with a helping
            teacher also has ``gap_closed``: its gain in ``average`` over the same model without
            help, divided by that model's gap to the first contender (None without a gap).
        """
        asked, path = self._asked(), self.folder / "results.json"
        if path.is_file() and (known := dict(read_json(path)))["asked"] == asked:
            return known
        fits = self.fine_tune()
        scores: dict[str, dict[str, list[float]]] = {one.name: {} for one in self.contenders}
        for fit in fits:
            score = read_json(fit.job.result_file)["score"]
            scores[fit.contender.name].setdefault(fit.task.task.name, []).append(score)
        results = {
            "tasks": [about_task(task) | _scored(task) for task in self.tasks],
            "models": self._rows(scores),
            "asked": asked,
        }
        write_json(path, results)
        return results

    def fine_tune(self) -> list[Fit]:
        """Run the fine-tunings that are missing, those of the grid first.

        Returns:
            All fine-tunings except the grid's, ordered by task, then contender, then seed.

        Raises:
            CandidateFailed: a fine-tuning failed, or all combinations of the grid failed for a
                contender on a task.
        """
        grid = self._grid_fits()
        self._do(grid)
        fits = [
            self._fit(one, task, source, dataclasses.replace(settings, seed=seed), name)
            for task, source in zip(self.tasks, self.sources, strict=True)
            for one in self.contenders
            for settings in [self._settings(one, task, grid)]
            for name, seed in self.seeds.items()
        ]
        self._do(fits)
        self._write_lines([*grid, *fits])
        return fits

    def _asked(self) -> dict[str, Any]:
        # All that the results depend on.
        names = ("grid", "trainer", "latency", "finetune")
        return {
            "folders": [one.folder(task) for one in self.contenders for task in self.tasks],
            "names": [one.name for one in self.contenders],
            "rows": [task.sha256 for task in self.tasks],
            "seeds": len(self.seeds),
            **{name: as_plain(getattr(self.config, name)) for name in names},
            **self.config.latency.content(),
        }

    def _fit(
        self,
        one: Contender,
        task: LoadedTask,
        source: TaskSource,
        settings: FinetuneSettings,
        name: str,
    ) -> Fit:
        folder = self.folder / one.folder(task) / name
        trainer, is_kept = self.config.trainer, name == next(iter(self.seeds))
        keep_finetune_settings(folder, task, settings, trainer)
        help = one.helpers.get(task.task.name)
        args = one.make, one.source, source, settings, trainer, folder, help, is_kept
        title = ", ".join(filter(None, [task.task.name, one.name, name.replace("_", " ")]))
        is_of_grid = source.held_out is not None
        return Fit(one, task, settings, Job(folder, title, fine_tuning, args), is_of_grid)

    def _grid_fits(self) -> list[Fit]:
        grid = self.config.grid
        if grid is None:
            return []
        first = dataclasses.replace(self.config.finetune, seed=next(iter(self.seeds.values())))
        found = []
        for task, source in zip(self.tasks, self.sources, strict=True):
            rows = task.for_choosing(grid.held_out)
            source = dataclasses.replace(source, held_out=grid.held_out)
            for one in self._plain():
                for size, rate in itertools.product(grid.batch_sizes, grid.learning_rates):
                    settings = dataclasses.replace(first, batch_size=size, learning_rate=rate)
                    found.append(self._fit(one, rows, source, settings, f"grid_{size}_{rate:g}"))
        return found

    def _plain(self) -> list[Contender]:
        """Return the models without a helping teacher; only they are tried on the grid."""
        return list({(one.plain or one).key: one.plain or one for one in self.contenders}.values())

    def _settings(self, one: Contender, task: LoadedTask, grid: Sequence[Fit]) -> FinetuneSettings:
        """Return a contender's settings on a task: the config's, or the best of the grid."""
        if not grid:
            return self.config.finetune
        plain, name = one.plain or one, task.task.name
        ours = [fit for fit in grid if fit.contender is plain and fit.task.task.name == name]
        scores = [read_json(fit.job.result_file)["score"] for fit in ours]
        done = [(score, fit) for score, fit in zip(scores, ours, strict=True) if score is not None]
        if not done:
            raise CandidateFailed(
                f"All combinations of the grid failed for {plain.name!r} on {name!r}: see job.log "
                "in their folders."
            )
        score, best = max(done, key=lambda pair: float(pair[0]))
        if one is plain or plain not in self.contenders:
            self._say(
                f"{name}: {one.name}, chosen on held-out training rows ({score:.3f}): batch "
                f"{best.settings.batch_size}, learning rate {best.settings.learning_rate:g}"
            )
        return best.settings

    def _do(self, fits: Sequence[Fit]) -> None:
        """Run the fine-tunings that are not finished yet.

        If a fine-tuning of the hyperparameter grid (``--grid``) fails, its result has no score; any
        other failure is raised.
        """
        by_folder = {fit.job.folder: fit for fit in fits}

        def ended(job: Job) -> None:
            fit, result = by_folder[job.folder], read_json(job.result_file)
            (job.folder / "last.ckpt").unlink(missing_ok=True)
            if result["score"] is None:
                self._say(
                    f"{job.folder}: failed, and not tried again while this folder exists: {result['failed']}"
                )
            elif not fit.is_of_grid:
                self._say(f"{job.title}: {result['score']:.3f}")
            self._write_lines(fits)

        def failed(job: Job, error: BaseException) -> None:
            fit = by_folder[job.folder]
            if not (fit.is_of_grid and isinstance(error, CandidateFailed)):
                raise error
            settings = dataclasses.asdict(fit.settings)
            result = {"score": None, "failed": str(error), "settings": settings}
            write_json(job.result_file, result)

        for is_helped in (False, True):  # helped ones last: their teacher may be among the others
            jobs = [fit.job for fit in fits if bool(fit.contender.helpers) == is_helped]
            self.engine.run(jobs, JobBars(self.progress), ended, failed)

    def _write_lines(self, fits: Sequence[Fit]) -> None:
        lines = [json.dumps(fit.line()) + "\n" for fit in fits if fit.job.is_done]
        write_text(self.folder / "runs.jsonl", "".join(lines))

    def _say(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, soft_wrap=True)

    def _rows(self, scores: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = {}
        for name, by_task in scores.items():
            averages = [statistics.mean(values) for values in zip(*by_task.values(), strict=True)]
            average, spread = statistics.mean(averages), _spread(averages)
            rows[name] = {"scores": by_task, "average": average, "spread": spread}
        self.measure_rows(rows, "average")
        first = rows[self.contenders[0].name]["average"]
        for one in self.contenders:
            if one.plain is not None and one.plain.name in rows:
                before, after = (rows[each.name]["average"] for each in (one.plain, one))
                gap = first - before
                rows[one.name]["gap_closed"] = (after - before) / gap if gap > 0 else None
        return rows

    def measure_rows(self, rows: Mapping[str, dict[str, Any]], score: str) -> None:
        """Measure the latency of all contenders, and add it to their rows of the table.

        Also added are the speed-up, the number of parameters, and ``share_kept``, the row's score
        divided by that of the first contender.

        Args:
            rows: a row for each contender, by its name; changed in place.
            score: the key of a row's score.
        """
        num_labels, distinct = self.tasks[0].task.num_labels, self._plain()
        with own_random_numbers():
            models = [one.shape(num_labels) for one in distinct]
        latencies = measure_latency(models, self.config.latency)
        measured = {
            one.key: (latency, num_parameters(model))
            for one, model, latency in zip(distinct, models, latencies, strict=True)
        }
        first = rows[self.contenders[0].name]
        for one in self.contenders:
            row, (latency, size) = rows[one.name], measured[(one.plain or one).key]
            row |= {
                "latency_ms": latency.median_ms,
                "latency_iqr_ms": latency.iqr_ms,
                "speedup": latencies[0].median_ms / latency.median_ms,
                "share_kept": row[score] / first[score] if first[score] > 0 else None,
                "num_parameters": size,
            }


def about_task(task: LoadedTask) -> dict[str, Any]:
    """Return a task's name, metric, and numbers of labels and training rows, as a dictionary."""
    return {
        "name": task.task.name,
        "metric": " + ".join(task.task.metrics),
        "num_labels": task.task.num_labels,
        "num_train": len(task.train["label"]),
    }


def _scored(task: LoadedTask) -> dict[str, Any]:
    num_rows = {split: len(rows["label"]) for split, rows in task.validations.items()}
    return {"num_validation": num_rows, "sha256": task.sha256}


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def score_table(results: dict[str, Any]) -> Table:
    """Return the results of ``Comparison.run`` as a table: a row per model, a column per task."""
    tasks = [task["name"] for task in results["tasks"]]
    rows = []
    for name, row in results["models"].items():
        cells = {"model": name}
        for task in tasks:
            scores = row["scores"][task]
            cells[task] = _cell(statistics.mean(scores), _spread(scores))
        if len(tasks) > 1:
            cells["average"] = _cell(row["average"], row["spread"])
        cells["share kept"] = as_text(row["share_kept"], ".1f", " %", scale=100)
        cells["latency (ms)"] = f"{row['latency_ms']:.2f}"
        cells["speed-up"] = f"{row['speedup']:.1f}x"
        cells["parameters (M)"] = f"{row['num_parameters'] / 1e6:.2f}"
        rows.append(cells)
    title = ", ".join(f"{task['name']}: {task['metric']}" for task in results["tasks"])
    return text_table(title, rows, words=["model"])


def _cell(mean: float, spread: float | None) -> str:
    """Return mean and spread as text on two lines, so that five tasks fit in 80 columns."""
    return f"{mean:.3f}" if spread is None else f"{mean:.3f}\n±{spread:.3f}"


@honest_signals()
def glue(config: GlueConfig, console: Console | None = None) -> dict[str, Any]:
    """Fine-tune models on tasks, show their scores, and write all results into ``<root>/<name>/``.

    If stopped, the same call resumes; finished fine-tunings are not repeated.

    Args:
        config: options of ``kdnas glue``.
        console: where to print; None: the terminal.

    Returns:
        The results, as from ``Comparison.run``.

    Raises:
        UserError: an option, a model or the rows cannot be used; or another process is working on
            the comparison of this name.
        CandidateFailed: a fine-tuning failed, for instance because a loss is not finite.
        HubAway: the Hugging Face hub does not answer.
    """
    console = console or Console(markup=False)
    run = Run(config.root, config.name)
    run.refuse_other_kind(is_comparison=True)
    run.check_writable()
    config.trainer.check()
    sources = list(_sources(config))
    tasks = _load(sources, config)
    contenders = _contenders(config, tasks)
    with (
        run.alone("wait for it"),
        open_engine(config.num_workers) as engine,
        live_progress(console) as progress,
    ):
        run.manifest.unlink(missing_ok=True)  # written again at the end
        sweep(run.folder)
        write_text(run.config, yaml.safe_dump(as_plain(config), sort_keys=False))
        seeds = {f"seed_{seed}": seed for seed in range(config.seeds)}
        results = Comparison(
            run.folder, contenders, tasks, sources, seeds, config, engine, progress
        ).run()
        write_manifest(run.folder, {"name": run.name, "command": sys.argv, "gpu": gpu_name()})
    _show(results, run, console)
    return results


def _sources(config: GlueConfig) -> Iterator[TaskSource]:
    if not config.task:
        assert config.data is not None
        load = partial(load_labelled, config.data, config.text_column, config.label_column)
        yield TaskSource(load)
    for name in config.task:
        if config.data is None:
            yield TaskSource(partial(load_task, name))
        elif name not in TASKS:
            raise UserError(f"The task {name!r} is not a GLUE task.{nearest(name, TASKS, True)}")
        elif not (folder := Path(config.data, name)).is_dir():
            raise UserError(
                f"The folder {str(folder)!r} does not exist: {config.data!r} must hold a folder for "
                "each task."
            )
        else:
            yield TaskSource(partial(load_task, str(folder)))


def _load(sources: Sequence[TaskSource], config: GlueConfig) -> list[LoadedTask]:
    tasks = [source() for source in sources]
    names = [task.task.name for task in tasks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"Two tasks are called {twice[0]!r}: rename the folder of one.")
    if config.grid is not None:
        for task in tasks:
            task.for_choosing(config.grid.held_out)
    return tasks


def _contenders(config: GlueConfig, tasks: Sequence[LoadedTask]) -> list[Contender]:
    plain = [
        contender(source, name, config, tasks)
        for source, name in zip(config.model, short_names(config.model), strict=True)
    ]
    if config.distill_from is None:
        return plain
    return plain + with_help(plain[1:] or plain, config.distill_from, tasks, config.distill)


def _show(results: dict[str, Any], run: Run, console: Console) -> None:
    show = partial(console.print, soft_wrap=True, highlight=False)
    console.print(score_table(results))
    models = results["models"]
    for name, row in models.items():
        if row.get("gap_closed") is not None:
            show(
                f"The teacher's help closes {row['gap_closed']:.0%} of the gap to the first model: {name}."
            )
    busy = [
        name
        for name, row in models.items()
        if is_unsteady(row["latency_ms"], row["latency_iqr_ms"])
    ]
    if busy:
        show(
            f"The latency of {', '.join(busy)} spread by more than a tenth: measure it again with "
            "`kdnas latency`, while nothing else runs."
        )
    show(f"Every run: {run.folder / 'runs.jsonl'}")
    show(f"The models: {run.folder}/TASK/MODEL/seed_0/model")
