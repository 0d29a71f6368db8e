"""Loads and checks the inputs of a search or a run (teacher, text, task ...), and opens the run."""

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import ReadWriteLock
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kdnas.commands.config import RunConfig, SearchConfig, as_plain
from kdnas.data.datamodule import KDDataModule, Split
from kdnas.data.quickstart import text_and_task
from kdnas.deploy.latency import BUSY, LatencyMeter, is_unsteady
from kdnas.deploy.onnx import check_onnx
from kdnas.distillation.objectives import Objective, needed_layers
from kdnas.distillation.state_cache import StateCache
from kdnas.distillation.teacher_states import (
    StatesSettings,
    TeacherStates,
    open_states,
    state_cache,
)
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import (
    Teacher,
    build_encoder,
    build_student,
    find_teacher,
    max_length,
    num_parameters,
)
from kdnas.nas.bench import Bench
from kdnas.nas.controller import NUM_CANDIDATES
from kdnas.nas.sampler import lstm_of, make_pruner, make_sampler
from kdnas.nas.space import SearchSpace
from kdnas.nas.study import check_reachable, open_study, patiently, without_password
from kdnas.nas.trials import Study, best_of, is_complete, num_begun, results_in
from kdnas.report.tables import show
from kdnas.system.engine import Engine
from kdnas.system.errors import UserError, first_line
from kdnas.system.files import Run, check_writable, read_json, sweep, write_json, write_text
from kdnas.system.settings import keep_settings, refuse_difference
from kdnas.system.yaml import flat, read_yaml
from kdnas.tasks.tasks import LoadedTask, load_task, warn_of_head
from kdnas.training.precision import keep
from kdnas.training.progress import live_progress
from kdnas.training.trainer import TrainerSettings

# The rule of kdnas.distillation.start.FromTeacher, kept with a run's settings: a version of kdnas
# with another rule would make other students from the same settings.
BEGINS_AS = "the first layers and the last, copied and corrected, or narrowed"
# The settings that change no result, by the beginnings of their names.
NO_RESULT = (
    "root states.folder states.max_gb trainer.accelerator trainer.devices trainer.logger "
    "data.num_workers sampler workers executor storage candidate_timeout time_budget"
).split()


@dataclass(frozen=True)
class Inputs:
    """The inputs of a search or a run, loaded and checked; the run's folder is not written yet.

    Args:
        config: options of the search or run.
        run: paths of the run.
        teacher: the teacher.
        data: rows of text, after ``setup``.
        task: the labelled task; None for a search, or a run without one.
        space: which students may be proposed.
        meter: measures latency.
    """

    config: SearchConfig
    run: Run
    teacher: Teacher
    data: KDDataModule
    task: LoadedTask | None
    space: SearchSpace
    meter: LatencyMeter

    @property
    def target_layers(self) -> list[int]:
        """Numbers of the teacher layers whose hidden states some student may need for its loss."""
        depths = self.space.choices["num_hidden_layers"]
        num_layers = self.teacher.config.num_hidden_layers
        return needed_layers(self.config.recipe.objective, depths, num_layers)

    @property
    def states_settings(self) -> StatesSettings:
        """Settings of the teacher's stored hidden states, with the folder filled in."""
        return replace(self.config.states, folder=str(states_folder(self.config)))

    @property
    def device(self) -> str:
        """Device of the teacher while its hidden states are computed: ``cuda`` or ``cpu``."""
        on_gpu = self.config.trainer.accelerator in ("auto", "gpu", "cuda")
        return "cuda" if on_gpu and torch.cuda.is_available() else "cpu"

    def states(self, split: Split) -> TeacherStates:
        """Return the teacher's hidden states of a split's training rows and of the held-out rows.

        Those that are not stored yet are computed.
        """
        data, layers = self.data.select(split), self.target_layers
        settings, precision = self.states_settings, self.config.trainer.precision
        return open_states(self.teacher, data, layers, settings, self.device, precision)

    @property
    def cache(self) -> StateCache:
        """The cache of the teacher's hidden states, which may still be empty."""
        of, precision = (self.teacher, self.data), self.config.trainer.precision
        return state_cache(*of, self.target_layers, self.states_settings, self.device, precision)

    @cached_property
    def bench(self) -> Bench:
        """What all candidates share: teacher, data, settings and budget.

        Hidden states of the teacher that are not stored yet are computed first.
        """
        search = self.config.search
        return Bench(
            teacher=self.teacher,
            states=self.states("mini"),
            data=self.data,
            recipe=self.config.recipe,
            meter=self.meter,
            measures_first=self.config.measures_first,
            budget=search.budget,
            trainer=self.config.trainer,
            num_epochs=search.num_epochs,
            loss=search.loss,
            alpha=search.alpha,
            beta=search.beta,
            seed=self.config.seed,
            is_pruned=self.config.pruner != "none",
            stillness=ReadWriteLock(self.run.stillness),
        )


@dataclass(frozen=True)
class RunContext:
    """A run in progress: its inputs, engine, console and Optuna study."""

    inputs: Inputs
    engine: Engine
    console: Console
    storage: str | Path

    @property
    def config(self) -> SearchConfig:
        return self.inputs.config

    @property
    def run(self) -> Run:
        return self.inputs.run

    def study(self) -> Study:
        """Open the Optuna study in its current state; wait while its database does not answer."""
        return patiently(self.open_study, self.storage)

    def open_study(self) -> Study:
        """Open the Optuna study; if its database does not answer, raise the error at once."""
        config = self.config
        sampler, pruner = make_sampler(config.sampler, config.seed), make_pruner(config.pruner)
        results = results_in(self.run.folder)
        study = open_study(
            self.storage,
            self.run.name,
            self.inputs.space,
            results,
            sampler,
            pruner,
            num_begun(self.run.folder),
        )
        lstm = lstm_of(config.sampler)
        for_report = {
            "budget": as_plain(config.search.budget),
            "num_candidates": lstm.num_candidates if lstm else NUM_CANDIDATES,
        }
        for name, value in for_report.items():
            if study.user_attrs.get(name) != value:
                study.set_user_attr(name, value)
        return study

    def progress(self) -> Progress:
        """Return a live display for the search and all running jobs."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        # Speed is that since the start: within the usual 30 seconds hardly a candidate ends.
        return live_progress(self.console, *columns, speed_estimate_period=math.inf)


def states_folder(config: SearchConfig) -> Path:
    """Return the folder of the teacher's hidden states: ``states.folder``, or its default."""
    return Path(config.states.folder or Run(config.root, config.name).states)


def refuse_other_config(run: Run, config: SearchConfig) -> None:
    """Raise an error if a config differs from the one with which the run was started.

    Settings may differ if they change no result, or belong to a stage that has not started.

    Raises:
        UserError: another setting differs; or the run's folder belongs to a comparison that ``kdnas
            glue`` made.
    """
    if not run.config.exists():
        return
    run.refuse_other_kind(is_comparison=False)
    known, asked = flat(read_yaml(run.config)), flat(_plain(config))
    free = [*NO_RESULT]
    if not isinstance(config, RunConfig):
        free.append("search.n_trials")
    if not run.full_kd.exists():
        free.append("full_kd")
    of_stage = ("finetune.", "task", "grid", "distill.")
    if not run.glue.exists() and not run.student.exists():  # an export is kept as it is
        free += of_stage
    # A config without a grid has none of its keys: compare them all the same.
    both = known.keys() & asked.keys() | {key for key in known | asked if key.startswith("grid")}
    held = sorted(key for key in both if not key.startswith(tuple(free)))
    ours, theirs = ({key: plain.get(key) for key in held} for plain in (known, asked))
    is_stage_s = all(key.startswith(of_stage) for key in held if ours[key] != theirs[key])
    remedy = f"give a new name, such as --name {run.name}-2 (--force-new chooses one)"
    if run.glue.exists() and not run.student.exists() and is_stage_s:
        remedy = f"delete {str(run.glue)!r} to fine-tune again with these, or {remedy}"
    refuse_difference(ours, theirs, f"The run {run.name!r}", remedy)


def is_finished(run: Run, config: Mapping[str, Any]) -> bool:
    """Whether a run has finished all stages that ``config``, given as plain values, asks for."""
    last = [run.best_student]
    if "full_kd" in config:
        last = [run.full_kd / "result.json", run.student, run.report]
    if config.get("task"):
        last.append(run.glue / "results.json")
    return all(path.exists() for path in last)


def _plain(config: SearchConfig) -> dict[str, Any]:
    """Return a config as plain values for YAML, without the password of the study's database."""
    plain: dict[str, Any] = as_plain(config)
    return plain | ({"storage": without_password(config.storage)} if config.storage else {})


def check_place(config: SearchConfig) -> Run:
    """Check that a run's folders are writable and were not used with another config.

    Nothing is written.

    Returns:
        The paths of the run.

    Raises:
        UserError: a folder is not writable, or the run was started with another config.
    """
    run = Run(config.root, config.name)
    refuse_other_config(run, config)
    run.check_writable()
    check_writable(states_folder(config), "--states.folder")
    return run


def validate(config: SearchConfig) -> tuple[Run, Teacher, SearchSpace, LatencyMeter]:
    """Check all options, the teacher and the folders of a run, but not the text and the task.

    The cheapest checks come first; nothing is written.

    Returns:
        The paths of the run, the teacher, the search space and the latency meter.

    Raises:
        UserError: an option, the teacher or a folder cannot be used, or no student can meet the
            budget.
        HubAway: the Hugging Face hub does not answer.
    """
    run = check_place(config)
    config.trainer.check(has_ddp=isinstance(config, RunConfig) and config.executor is None)
    if isinstance(config, RunConfig):  # a run ends with an export
        check_onnx()
    _refuse_hidden_device(config)
    make_sampler(config.sampler), make_pruner(config.pruner)
    teacher = find_teacher(config.teacher)
    _ = teacher.model  # refuse a damaged teacher before its sizes are used
    space = space_of(config, teacher)
    _check_objective(config.recipe.objective, teacher, space)
    meter = LatencyMeter(teacher.config, config.latency)
    if not run.trials_csv.exists():  # otherwise it was checked before
        _refuse_impossible_budget(config, teacher, space)
    most = max_length(teacher.config)
    if isinstance(config, RunConfig) and config.task and config.finetune.max_length > most:
        raise UserError(
            f"finetune.max_length is {config.finetune.max_length}, but the teacher "
            f"{config.teacher!r} takes at most {most} tokens: give a smaller value."
        )
    return run, teacher, space, meter


def space_of(config: SearchConfig, teacher: Teacher) -> SearchSpace:
    """Return the teacher's default search space, changed by the choices in ``config.space``."""
    return SearchSpace.from_teacher(teacher.config).replaced(vars(config.space), teacher.config)


def load_inputs(config: SearchConfig, console: Console) -> Inputs:
    """Load and check the teacher, the text, the task and all options, before any training.

    Only the tokenised text and, if asked for, the quickstart's files are written.

    Raises:
        UserError: something that the user gave cannot be used.
        HubAway: the Hugging Face hub does not answer.
    """
    run, teacher, space, meter = validate(config)
    if config.storage:
        check_reachable(config.storage)
    inputs = _load_rows(config, run, teacher, space, meter)
    data = inputs.data
    dropped = "".join(f", {n:,} dropped ({why})" for why, n in data.rows.dropped.items() if n)
    show(
        console,
        f"Teacher: {config.teacher} ({num_parameters(teacher.model) / 1e6:.1f} M parameters).  "
        f"Text: {len(data.train_ids()):,} rows to learn from, {len(data.held_out_ids()):,} held "
        f"out{dropped}.  Space: {len(space)} students.",
    )
    return inputs


def _load_rows(
    config: SearchConfig, run: Run, teacher: Teacher, space: SearchSpace, meter: LatencyMeter
) -> Inputs:
    asked = config.task if isinstance(config, RunConfig) else None
    text, source = text_and_task(config.text, asked, run.text)
    task = load_task(source) if source else None
    if task:
        warn_of_head(task.task, teacher.config, config.teacher)
    if task and isinstance(config, RunConfig) and config.grid:
        task.for_choosing(config.grid.held_out)
    settings = replace(config.data, seed=config.seed)
    data = KDDataModule(config.teacher, text, settings, folder=str(run.tokens))
    data.setup()
    inputs = Inputs(config, run, teacher, data, task, space, meter)
    _LOADED[:] = [(_key(config), inputs)]
    return inputs


def task_path(run: Run, task: str | None) -> str | None:
    """Return a task's folder or GLUE name (a folder for ``quickstart``); None without a task."""
    return text_and_task("", task, run.text)[1]


_LOADED: list[tuple[str, Inputs]] = []  # the inputs loaded last in this process, with their key


def _key(config: SearchConfig) -> str:
    return json.dumps(as_plain(config), sort_keys=True, default=str)


def inputs_of(config: SearchConfig) -> Inputs:
    """Return the inputs of a config, which a process loads once for all its jobs."""
    if not (_LOADED and _LOADED[0][0] == _key(config)):
        run, teacher = Run(config.root, config.name), find_teacher(config.teacher)
        meter = LatencyMeter(teacher.config, config.latency)
        _load_rows(config, run, teacher, space_of(config, teacher), meter)
    return _LOADED[0][1]


def forget_inputs() -> None:
    """Release the inputs that ``inputs_of`` has cached in this process."""
    _LOADED.clear()


def open_run(inputs: Inputs, engine: Engine, console: Console) -> RunContext:
    """Open a run, new or stopped, and write its config.

    Args:
        inputs: the run's inputs.
        engine: the engine that executes the run's jobs.
        console: where to print.

    Raises:
        UserError: the run was started with other settings; or its search was to be continued, but
            full KD has already begun.
    """
    config, run = inputs.config, inputs.run
    run.folder.mkdir(parents=True, exist_ok=True)
    sweep(run.folder)
    content = _content(inputs)
    remedy = f"give a new name, such as --name {run.name}-2 (--force-new chooses one)"
    keep_settings(run.made_with, content, f"The run {run.name!r}", remedy)
    _keep_matmuls(run)
    context = RunContext(inputs, engine, console, config.storage or run.study_db)
    study = context.study()
    is_done = is_complete(study, inputs.space, config.search.n_trials)
    if not isinstance(config, RunConfig) and run.full_kd.exists() and not is_done:
        raise UserError(
            f"The run {run.name!r} has already begun full KD, so its search cannot be continued: "
            "give another --name."
        )
    if is_done and run.best_student.exists() and not run.full_kd.exists():
        best = best_of(study, inputs.space).user_attrs["arch"]
        if StudentArch.from_yaml(run.best_student).to_dict() != best:
            run.best_student.unlink()  # written before the search was prolonged
    known = read_yaml(run.config) if run.config.exists() else {}
    asked = known | _plain(config)
    if asked != known or not run.best_student.exists() or not is_done:
        run.manifest.unlink(missing_ok=True)  # written again at the end
        write_text(run.config, yaml.safe_dump(asked, sort_keys=False))
    return context


def _content(inputs: Inputs) -> dict[str, Any]:
    """Return everything that a candidate's reward depends on, as one flat dict of JSON values."""
    config, rows = inputs.config, inputs.data.rows
    plain = {key: as_plain(getattr(config, key)) for key in ("seed", "data", "recipe", "search")}
    trainer, default = as_plain(config.trainer), as_plain(TrainerSettings())
    content = flat(
        {
            "begins as": BEGINS_AS,
            "teacher": inputs.teacher.sha256(),
            "text": rows.sha256,
            "num_train_rows": len(inputs.data.select("full").train_ids()),
            "space": {name: list(values) for name, values in inputs.space.choices.items()},
            "states.precision": config.states.precision,
            "latency": as_plain(config.latency),
            **({"pruner": config.pruner} if config.pruner != "none" else {}),
            **plain,
            **config.latency.content(),
            "trainer": {
                name: trainer[name]
                for name in ("precision", "gradient_clip_val")
                if trainer[name] != default[name]
            },
        }
    )
    del content["search.n_trials"], content["data.num_workers"]
    return content


def _keep_matmuls(run: Run) -> None:
    """Use the CPU matrix precision with which the run began, even if it is slower here."""
    path = run.folder / "cpu_matmuls.json"
    known = read_json(path) if path.exists() else None
    computed_in = keep(known)
    if known is None:
        write_json(path, keep(computed_in))


def _refuse_hidden_device(config: SearchConfig) -> None:
    """Raise an error for ``cuda:1`` or higher with workers: a worker sees one GPU, ``cuda:0``."""
    kind, _, number = config.latency.device.partition(":")
    if config.workers != 0 and number not in ("", "0"):
        raise UserError(
            f"latency.device is {config.latency.device!r}, but each worker sees only one GPU: give "
            f"{kind!r}, which means the worker's own GPU, or --workers 0."
        )


def _refuse_impossible_budget(config: SearchConfig, teacher: Teacher, space: SearchSpace) -> None:
    """Raise an error for a budget that even the smallest (fastest) student exceeds."""
    fastest = space.smallest()
    found = LatencyMeter(teacher.config, config.latency).glance(fastest)
    violation, reason = config.search.budget.violation(found)
    if violation > 0:
        words = f"No student meets the budget: the fastest possible, {fastest}, is {reason}."
        if any(is_unsteady(one.median_ms, one.iqr_ms) for one in (found.student, found.teacher)):
            words += f" {BUSY}"
        raise UserError(words)


def _check_objective(objective: Objective, teacher: Teacher, space: SearchSpace) -> None:
    """Raise an error if the loss does not work for some student of the search space.

    No weights are allocated.
    """
    depths = space.choices["num_hidden_layers"]
    needed_layers(objective, depths, teacher.config.num_hidden_layers)
    sizes = itertools.product(space.choices["hidden_size"], space.choices["num_attention_heads"])
    with torch.device("meta"):
        teacher_shape = build_encoder(teacher.config)
        for width, heads in sizes:
            arch = replace(space.smallest(), hidden_size=width, num_attention_heads=heads)
            student = build_student(teacher.config, arch)
            try:
                objective.criterion(student, teacher_shape)
            except UserError:
                raise
            except Exception as error:  # the user's own class may raise anything
                raise UserError(
                    f"The loss in recipe.objective, {type(objective).__name__}, does not work for "
                    f"the student {arch}: {type(error).__name__}: {first_line(error)}. Correct it, "
                    "or exclude such students by --space options."
                ) from error
