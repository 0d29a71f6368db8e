"""``kdnas glue``: models fine-tuned on labelled tasks in turn, with every seed, and one table of what they reach."""

import dataclasses
import hashlib
import itertools
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kdnas.commands.config import GlueConfig, Grid, as_plain
from kdnas.deploy.latency import LatencySettings, check_length, is_unsteady, measure_latency
from kdnas.models.encoders import (
    build_classifier,
    find_teacher,
    load_classifier,
    max_length,
    num_parameters,
    state_sha256,
)
from kdnas.system.errors import CandidateFailed, UserError, is_memory, nearest, reason_of
from kdnas.system.files import Run, read_json, short_names, sweep, write_json, write_text
from kdnas.system.manifest import write_manifest
from kdnas.system.signals import honest_signals
from kdnas.tasks.finetune import FinetuneSettings, GLUEModule, evaluate_glue, finished, keep_failure
from kdnas.tasks.task_distill import TaskDistillModule, TaskDistillSettings, load_task_teacher
from kdnas.tasks.tasks import TASKS, LoadedTask, Task, load_labelled, load_task
from kdnas.training.precision import gpu_name
from kdnas.training.progress import FitProgress, live_progress
from kdnas.training.trainer import TrainerSettings

MakeModule = Callable[[PreTrainedModel, Task, FinetuneSettings], GLUEModule]


@dataclass(frozen=True)
class Helper:
    """A fine-tuned teacher's help on one task.

    Args:
        key: of the folder; another for another teacher or other settings.
        make_module: what trains the classifier in place of ``GLUEModule``.
    """

    key: str
    make_module: MakeModule


@dataclass(frozen=True)
class Contender:
    """A row of the table.

    Args:
        name: as shown.
        key: of its folder; another for other weights.
        config: of its encoder.
        tokenizer: its own.
        make: the classifier with so many outputs, before fine-tuning; what is random in it is drawn anew at each call.
        settings: how it is fine-tuned, seed and grid apart.
        helpers: for each task's name, who helps it there.
        plain: the contender that it is without help.
    """

    name: str
    key: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    make: Callable[[int], PreTrainedModel]
    settings: FinetuneSettings
    helpers: dict[str, Helper] = dataclasses.field(default_factory=dict)
    plain: "Contender | None" = None

    def folder(self, task: LoadedTask) -> str:
        """Of its runs on a task, below the comparison's."""
        helper = self.helpers.get(task.task.name)
        return f"{task.task.name}/{self.key}" + (f"-helped-{helper.key}" if helper else "")


def contender(source: str, name: str, settings: FinetuneSettings) -> Contender:
    """A pretrained encoder as a row of the table.

    Raises:
        UserError: there is no such encoder, or it takes fewer than ``settings.max_length`` tokens.
    """
    found = find_teacher(source)
    if settings.max_length > max_length(found.config):
        raise UserError(
            f"finetune.max_length is {settings.max_length}: the model {source!r} takes at most "
            f"{max_length(found.config)} tokens."
        )
    key = f"{_safe(Path(source).name)}-{found.sha256()[:8]}"
    make = partial(load_classifier, found.source)
    return Contender(name, key, found.config, found.tokenizer, make, settings)


def with_help(
    plain: Sequence[Contender],
    teachers: dict[str, str],
    tasks: Sequence[LoadedTask],
    distill: TaskDistillSettings,
) -> list[Contender]:
    """The same encoders, trained with the help of teachers that were fine-tuned on the tasks.

    Args:
        plain: the encoders by themselves; what their grids chose is taken.
        teachers: for each task's name, where its teacher is.
        tasks: what is to be learned.
        distill: what the help is.

    Raises:
        UserError: a teacher does not fit its task or an encoder.
    """
    helpers = {}
    for task in tasks:
        teacher = load_task_teacher(teachers[task.task.name], task.task, *plain)
        identity = f"{state_sha256(teacher.state_dict())}{distill}"
        key = hashlib.sha256(identity.encode()).hexdigest()[:8]
        helpers[task.task.name] = Helper(
            key, partial(TaskDistillModule, teacher=teacher, distill=distill)
        )
    return [
        dataclasses.replace(one, name=f"{one.name}, distilled", helpers=helpers, plain=one)
        for one in plain
    ]


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")[-60:] or "model"


@dataclass
class Comparison:
    """Contenders on tasks; every run is done once, and goes on where it was stopped.

    Args:
        folder: takes ``<task>/<contender>/seed_0/`` (TensorBoard, ``result.json``, the first seed's ``model/``),
            ``runs.jsonl`` with a line a run, and ``results.json``.
        contenders: the first is what the others are compared with.
        tasks: with their rows.
        seeds: how many.
        trainer: device and precision.
        latency: how latency is measured.
        grid: choose batch size and learning rate first.
        progress: a live display.
    """

    folder: Path
    contenders: Sequence[Contender]
    tasks: Sequence[LoadedTask]
    seeds: int
    trainer: TrainerSettings
    latency: LatencySettings
    grid: Grid | None
    progress: Progress

    def run(self) -> dict[str, Any]:
        """Do what is missing, then measure latency, all in turn.

        Returns:
            What ``results.json`` holds: ``tasks`` and, for each contender, ``scores`` by task and seed, ``average``,
            ``spread`` (standard deviation over seeds; None for one), ``share_kept`` of the first's average,
            ``gap_closed`` (by the teacher's help, of the distance to the first), latency, speed-up and parameters.
        """
        asked = {
            "folders": [one.folder(task) for one in self.contenders for task in self.tasks],
            "names": [one.name for one in self.contenders],
            "rows": [task.sha256 for task in self.tasks],
            "seeds": self.seeds,
            **{name: as_plain(getattr(self, name)) for name in ("grid", "trainer", "latency")},
            "settings": [as_plain(one.settings) for one in self.contenders],
            **self.latency.content(),
        }
        if self.results.is_file() and (known := dict(read_json(self.results)))["asked"] == asked:
            return known
        runs: list[dict[str, Any]] = []
        scores: dict[str, dict[str, list[float]]] = {one.name: {} for one in self.contenders}
        for task in self.tasks:
            for one in self.contenders:
                scores[one.name][task.task.name] = []
                for line in self._runs(one, task):
                    runs.append(line)
                    write_text(
                        self.folder / "runs.jsonl", "".join(json.dumps(run) + "\n" for run in runs)
                    )
                    if line["kind"] == "run":
                        scores[one.name][task.task.name].append(line["score"])
        results = {
            "tasks": [_about(task) for task in self.tasks],
            "models": self._rows(scores),
            "asked": asked,
        }
        write_json(self.results, results)
        return results

    @property
    def results(self) -> Path:
        """Where the results go."""
        return self.folder / "results.json"

    def _runs(self, one: Contender, task: LoadedTask) -> Iterator[dict[str, Any]]:
        settings = one.settings
        if self.grid is not None:
            plain = one.plain or one  # with help or without: what is learned with is the same
            choices = list(self._choices(plain, task, self.grid))
            if plain is one:
                yield from choices
            settings = self._best(plain, task, choices)
        for seed in range(self.seeds):
            chosen = dataclasses.replace(settings, seed=seed)
            folder = self.folder / one.folder(task) / f"seed_{seed}"
            result = self._once(one, task, chosen, folder, keep_model=seed == 0)
            self.progress.console.print(
                f"{task.task.name}: {one.name}, seed {seed}: {result['score']:.3f}",
                highlight=False,
                soft_wrap=True,
            )
            yield {"kind": "run", "model": one.name, "folder": str(folder), **result}

    def _choices(self, one: Contender, task: LoadedTask, grid: Grid) -> Iterator[dict[str, Any]]:
        rows = task.for_choosing(grid.held_out)
        for size, rate in itertools.product(grid.batch_sizes, grid.learning_rates):
            settings = dataclasses.replace(
                one.settings, batch_size=size, learning_rate=rate, seed=0
            )
            folder = self.folder / one.folder(task) / f"grid_{size}_{rate:g}"
            try:
                result = self._once(one, rows, settings, folder, keep_model=False)
            except (MemoryError, RuntimeError) as error:
                if not (isinstance(error, CandidateFailed) or is_memory(error)):
                    raise
                result = keep_failure(folder, rows, settings, self.trainer, reason_of(error))
            if result["score"] is None:
                self.progress.console.print(
                    f"{folder}: failed, not tried again while it is there: {result['failed']}",
                    soft_wrap=True,
                )
            yield {"kind": "grid", "model": one.name, "folder": str(folder), **result}

    def _best(
        self, one: Contender, task: LoadedTask, choices: Sequence[dict[str, Any]]
    ) -> FinetuneSettings:
        done = [choice for choice in choices if choice["score"] is not None]
        if not done:
            raise CandidateFailed(
                f"Every point of the grid failed for {one.name!r} on {task.task.name!r}."
            )
        best = max(done, key=lambda choice: float(choice["score"]))
        settings = FinetuneSettings(**best["settings"])
        self.progress.console.print(
            f"{task.task.name}: {one.name}, chosen on held-out training rows ({best['score']:.3f}): "
            f"batch {settings.batch_size}, learning rate {settings.learning_rate:g}",
            highlight=False,
            soft_wrap=True,
        )
        return settings

    def _once(
        self,
        one: Contender,
        task: LoadedTask,
        settings: FinetuneSettings,
        folder: Path,
        keep_model: bool,
    ) -> dict[str, Any]:
        if (known := finished(folder, task, settings, self.trainer)) is not None:
            return known
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            classifier = one.make(task.task.num_labels)
        helper = one.helpers.get(task.task.name)
        return evaluate_glue(
            classifier,
            one.tokenizer,
            task,
            settings,
            folder=folder,
            trainer_settings=self.trainer,
            callbacks=[FitProgress(self.progress, f"{task.task.name}, {one.name}")],
            make_module=helper.make_module if helper else None,
            keep_model=keep_model,
        )

    def _rows(self, scores: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
        num_labels = self.tasks[0].task.num_labels
        distinct = [one for one in self.contenders if one.plain is None]
        with torch.random.fork_rng():
            models = [build_classifier(one.config, num_labels) for one in distinct]
        measured = {
            one.key: (latency, num_parameters(model))
            for one, model, latency in zip(
                distinct, models, measure_latency(models, self.latency), strict=True
            )
        }
        rows: dict[str, dict[str, Any]] = {}
        for one in self.contenders:
            by_task = scores[one.name]
            averages = [statistics.mean(values) for values in zip(*by_task.values(), strict=True)]
            latency, size = measured[(one.plain or one).key]
            row = rows[one.name] = {
                "scores": by_task,
                "average": statistics.mean(averages),
                "spread": _spread(averages),
                "latency_ms": latency.median_ms,
                "latency_iqr_ms": latency.iqr_ms,
                "num_parameters": size,
            }
            first = rows[self.contenders[0].name]
            row["share_kept"] = row["average"] / first["average"] if first["average"] > 0 else None
            row["speedup"] = first["latency_ms"] / row["latency_ms"]
            if one.plain is not None and one.plain.name in rows:
                before = rows[one.plain.name]["average"]
                gap = first["average"] - before
                row["gap_closed"] = (row["average"] - before) / gap if gap > 0 else None
        return rows


def _about(task: LoadedTask) -> dict[str, Any]:
    return {
        "name": task.task.name,
        "metric": " + ".join(task.task.metrics),
        "num_labels": task.task.num_labels,
        "num_train": len(task.train["label"]),
        "num_validation": {split: len(rows["label"]) for split, rows in task.validations.items()},
        "sha256": task.sha256,
    }


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def score_table(results: dict[str, Any]) -> Table:
    """What ``Comparison.run`` gives, for the terminal: a row a model, a column a task."""
    tasks = [task["name"] for task in results["tasks"]]
    title = ", ".join(f"{task['name']}: {task['metric']}" for task in results["tasks"])
    table = Table(
        title=Text(title), box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )
    average = ["average"] if len(tasks) > 1 else []
    table.add_column("model", overflow="fold")
    for heading in (
        *tasks,
        *average,
        "share\nkept",
        "latency\n(ms)",
        "speed-up",
        "parameters\n(M)",
    ):
        table.add_column(Text(heading), justify="right")
    for name, row in results["models"].items():
        cells = [
            _cell(statistics.mean(row["scores"][task]), _spread(row["scores"][task]))
            for task in tasks
        ]
        cells += [_cell(row["average"], row["spread"])] if average else []
        kept = "-" if row["share_kept"] is None else f"{100 * row['share_kept']:.1f} %"
        rest = [
            kept,
            f"{row['latency_ms']:.2f}",
            f"{row['speedup']:.1f}x",
            f"{row['num_parameters'] / 1e6:.2f}",
        ]
        table.add_row(*map(Text, (name, *cells, *rest)))
    return table


def _cell(mean: float, spread: float | None) -> str:
    return (
        f"{mean:.3f}" if spread is None else f"{mean:.3f}\n±{spread:.3f}"
    )  # two lines: five tasks fit 80 columns


@honest_signals()
def glue(config: GlueConfig, console: Console | None = None) -> dict[str, Any]:
    """Fine-tune models on tasks and show what each reaches, into ``<root>/<name>/``.

    The same call again goes on where it was stopped; runs that are finished are not done again.

    Returns:
        As ``Comparison.run``.

    Raises:
        UserError: anything that the user can mend, before anything is trained.
        CandidateFailed: a loss is not finite.
    """
    console = console or Console(markup=False)
    run = Run(config.root, config.name)
    run.refuse_other_kind(is_comparison=True)
    run.check_writable()
    config.trainer.check()
    tasks = list(_tasks(config))
    names = [task.task.name for task in tasks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"Two tasks are called {twice[0]!r}: rename the folder of one.")
    if config.grid is not None:
        for task in tasks:
            task.for_choosing(config.grid.held_out)
    plain = [
        contender(source, name, config.finetune)
        for source, name in zip(config.model, short_names(config.model), strict=True)
    ]
    for one in plain:
        check_length(one.config, config.latency)
    contenders = list(plain)
    if config.distill_from is not None:
        teachers = dict.fromkeys((task.task.name for task in tasks), config.distill_from)
        contenders += with_help(plain[1:] or plain, teachers, tasks, config.distill)
    with run.alone("wait for it"), live_progress(console) as progress:
        run.manifest.unlink(missing_ok=True)  # until the end again
        sweep(run.folder)
        write_text(run.config, yaml.safe_dump(as_plain(config), sort_keys=False))
        results = Comparison(
            run.folder,
            contenders,
            tasks,
            config.seeds,
            config.trainer,
            config.latency,
            config.grid,
            progress,
        ).run()
        write_manifest(run.folder, {"name": run.name, "command": sys.argv, "gpu": gpu_name()})
    console.print(score_table(results))
    for name, row in results["models"].items():
        if row.get("gap_closed") is not None:
            console.print(
                f"The teacher's help closes {row['gap_closed']:.0%} of the gap: {name}.",
                highlight=False,
            )
    busy = [
        name
        for name, row in results["models"].items()
        if is_unsteady(row["latency_ms"], row["latency_iqr_ms"])
    ]
    show = partial(console.print, soft_wrap=True, highlight=False)
    if busy:
        show(
            f"The latency of {', '.join(busy)} spread by more than a tenth: `kdnas latency` measures it again."
        )
    show(
        f"Every run: {run.folder / 'runs.jsonl'}\nThe models: {run.folder}/TASK/MODEL/seed_0/model"
    )
    return results


def _tasks(config: GlueConfig) -> Iterator[LoadedTask]:
    if not config.task:
        assert config.data is not None
        yield load_labelled(config.data, config.text_column, config.label_column)
    for name in config.task:
        if config.data is None:
            yield load_task(name)
        elif name not in TASKS:
            raise UserError(f"The task {name!r} is none of GLUE.{nearest(name, TASKS, True)}")
        elif not (folder := Path(config.data, name)).is_dir():
            raise UserError(
                f"The folder {str(folder)!r} does not exist: {config.data!r} must hold a folder a task."
            )
        else:
            yield load_task(str(folder))
