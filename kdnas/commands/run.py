"""The stages of ``kdnas run``: search, full KD, fine-tuning, export and report.

When a run resumes, finished stages are not repeated. Full KD is the distillation of the search's
best student on all training rows.
"""

import logging
import math
import shutil
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Console
from rich.progress import Progress

from kdnas.commands.config import RunConfig, SearchConfig, SpaceSettings, as_plain
from kdnas.commands.engine import open_engine
from kdnas.commands.export import is_exported, say
from kdnas.commands.glue import Comparison, Contender, Help, TaskSource, about_task
from kdnas.commands.in_time import Choice, in_time
from kdnas.commands.inputs import (
    RunContext,
    forget_inputs,
    is_finished,
    load_inputs,
    open_run,
    refuse_other_config,
    task_path,
)
from kdnas.commands.jobs import candidate_job, export_job, full_kd_job, states_job
from kdnas.data.datamodule import Split
from kdnas.distillation.metrics import too_long
from kdnas.distillation.teacher_states import is_missing
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import build_classifier, load_classifier
from kdnas.models.families import arch_of as arch_of_config
from kdnas.models.families import student_config
from kdnas.nas.budget import Budget
from kdnas.nas.controller import ModelRanking
from kdnas.nas.sampler import lstm_of
from kdnas.nas.search import search as search_loop
from kdnas.nas.study import patiently, without_password
from kdnas.nas.trials import (
    FrozenTrial,
    Outcome,
    Study,
    arch_of,
    has_spread,
    in_words,
    is_complete,
    line,
    trained,
    trials_frame,
    tried,
)
from kdnas.nas.weights import KEPT, drop_weights
from kdnas.report.page import agreement, result_table, write_report
from kdnas.report.tables import front_table
from kdnas.report.tensorboard import SearchBoard
from kdnas.system.errors import UserError
from kdnas.system.files import Run, file_sha256, read_json, write_json, write_text
from kdnas.system.manifest import write_manifest
from kdnas.system.pool import num_gpus
from kdnas.system.signals import honest_signals, notice_signals
from kdnas.system.yaml import read_yaml
from kdnas.tasks.baselines import (
    StaticForSequenceClassification,
    cut_classifier,
    static_classifier,
)
from kdnas.tasks.tasks import LoadedTask, load_task
from kdnas.training.precision import gpu_name, own_precision
from kdnas.training.progress import JobBars

log = logging.getLogger("kdnas")

VECTORS = "vectors.safetensors"  # of the static baseline, kept until it is fine-tuned


@own_precision()
@honest_signals()
def search(config: SearchConfig, console: Console | None = None) -> Run:
    """Find the best student within the budget, and write the results to ``<root>/<name>/``.

    If stopped, the same call resumes.

    Args:
        config: options of ``kdnas search``.
        console: where to print; None: the terminal.

    Returns:
        The paths of the run; ``best_student`` is the YAML file with the best student's shape.

    Raises:
        UserError: something that the user gave cannot be used, or no candidate meets the budget.
        CandidateFailed: every candidate failed, or the last ten all did.
        OSError: the disk, the network, the hub or the study's database failed.
    """
    with _opened(config, console or Console(markup=False), {}) as context:
        run, console = context.run, context.console
        was_done = run.manifest.exists()  # opening deletes it if something is left to do
        best = search_stage(context)
        study = context.study()
        console.print(front_table(study))
        refused = sum(in_words(trial) == "refused" for trial in study.get_trials(deepcopy=False))
        if refused:
            console.print(
                f"Refused because of the budget, untrained: {refused}; the reasons are in "
                f"{run.trials_csv}.",
                soft_wrap=True,
            )
        if not was_done and is_finished(run, read_yaml(run.config)):
            write_manifest(run.folder, _about(run))
    console.print(f"Best student: {best}, in {run.best_student}")
    return run


def run(config: RunConfig, console: Console | None = None) -> Run:
    """Run all stages in ``<root>/<name>/``: search, full KD, fine-tuning, export, report.

    If stopped, the same call resumes. For a finished run it shows the results and changes nothing.

    Args:
        config: options of ``kdnas run``.
        console: where to print; None: the terminal.

    Returns:
        The paths of the run.

    Raises:
        UserError: something that the user gave cannot be used, or no candidate meets the budget.
        CandidateFailed: every candidate failed, or a fine-tuning did.
        ParityError: an exported file gives different outputs from the student's.
        OSError: the disk, the network, the hub or the study's database failed.
    """
    console = console or Console(markup=False)
    if config.trial is not None:
        config = of_trial(config, config.trial)
    config, choice = in_time(config, console)
    run = Run(config.root, config.name)
    if run.manifest.exists() and is_finished(run, as_plain(config)):
        refuse_other_config(run, config)
        console.print(f"The run {run.name!r} is finished; nothing is done again.")
    else:
        seconds = run_stages(config, console, choice)
        shown = ", ".join(f"{stage} {taken / 60:.1f}" for stage, taken in seconds.items())
        console.print(f"Minutes by stage: {shown}.", highlight=False, soft_wrap=True)
    if (run.glue / "results.json").exists():
        results = read_json(run.glue / "results.json")
        console.print(result_table(results, vars(config.latency), config.search.budget))
    else:
        if quality := agreement(read_json(run.full_kd / "result.json")):
            console.print(
                f"The student was not fine-tuned; {quality}.", highlight=False, soft_wrap=True
            )
    where = f"Report:   {run.report}", f"Student:  {run.student}", f"Run:      {run.folder}"
    console.print(*where, sep="\n", soft_wrap=True)
    console.print(f"Look at it with:  tensorboard --logdir {run.folder}", soft_wrap=True)
    return run


def of_trial(config: RunConfig, number: int) -> RunConfig:
    """Make the run ``<name>-trial-<number>`` from one candidate of the search of ``config``.

    The candidate's result and weights are copied, so the new run has a finished search with this
    candidate alone.

    Args:
        config: options of the run that has trained the candidate.
        number: number of the candidate's trial.

    Returns:
        The config of the new run.

    Raises:
        UserError: no candidate with this number was fully trained, or the search was made with
            other settings.
    """
    if chosen := Choice.kept(config):
        config = chosen.of_config(config)
    asked = {field.name: getattr(config, field.name) for field in fields(SearchConfig)}
    refuse_other_config(Run(config.root, config.name), SearchConfig(**asked))
    source = Run(config.root, config.name).trial(number)
    file = source / "result.json"
    outcome = Outcome.read(file) if file.exists() else None
    if outcome is None or outcome.state != "COMPLETE" or "twin_of" in outcome.attrs:
        raise UserError(
            f"trial is {number}, but {config.name!r} has no fully trained candidate with this "
            "number: choose one that is COMPLETE in its trials.csv."
        )
    run = Run(config.root, f"{config.name}-trial-{number}")
    run.refuse_links()
    if not run.best_student.exists():
        run.trial(0).mkdir(parents=True, exist_ok=True)
        for name in (*KEPT, file.name):
            if (source / name).exists():
                shutil.copyfile(source / name, run.trial(0) / name)
        StudentArch.from_dict(outcome.params).to_yaml(run.best_student)
    return replace(
        config,
        name=run.name,
        trial=None,
        time_budget=None,
        space=SpaceSettings(**{name: [value] for name, value in outcome.params.items()}),
        search=replace(config.search, n_trials=1, budget=Budget()),
    )


@own_precision()
@honest_signals()
def run_stages(
    config: RunConfig, console: Console, choice: Choice | None = None
) -> dict[str, float]:
    """Run the stages of a run that are not finished.

    The search starts no more candidates when only the time for the later stages is left.

    Args:
        config: options of the run.
        console: where to print.
        choice: the settings that were lowered for the time budget, with the expected minutes; None:
            the search may take any time.

    Returns:
        The seconds of each stage, by name.
    """
    seconds: dict[str, float] = {}
    end = math.inf
    if choice and choice.fits:
        end = time.monotonic() + 60 * (choice.minutes - choice.after_search)
    with _opened(config, console, seconds, choice) as context:
        run = context.run
        # It is of the search alone, or from before a stage's files were deleted.
        run.manifest.unlink(missing_ok=True)
        with _timed(seconds, "search"):
            best = search_stage(context, end)
        with _timed(seconds, "full KD"):
            full_kd_stage(context, config, best)
        if context.inputs.task is not None:
            with _timed(seconds, "fine-tuning"):
                finetune_stage(context, config, best)
        with _timed(seconds, "export"):
            export_stage(context, config)
        with _timed(seconds, "report"):
            write_report(run, context.study())
            write_manifest(run.folder, _about(run))
    return seconds


@contextmanager
def _opened(
    config: SearchConfig,
    console: Console,
    seconds: dict[str, float],
    choice: Choice | None = None,
) -> Iterator[RunContext]:
    """Context manager that opens a run with its inputs and engine, and locks it."""
    try:
        with open_engine(config.num_workers, config.executor) as engine:
            with _timed(seconds, "reading"):
                inputs = load_inputs(config, console)
            with inputs.run.alone("wait for it, or give another name"):
                if choice:
                    choice.keep(inputs.run)
                yield open_run(inputs, engine, console)
    finally:
        forget_inputs()


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    notice_signals()
    seconds[stage] = time.monotonic() - started


def _about(run: Run) -> dict[str, Any]:
    """Return the manifest's entries on how the run was made."""
    command = [without_password(argument) for argument in sys.argv]
    teacher = read_json(run.made_with)["teacher"]
    return {"name": run.name, "command": command, "gpu": gpu_name(), "teacher_sha256": teacher}


def search_stage(context: RunContext, end: float | None = None) -> StudentArch:
    """Run the search, unless it is finished, and write the best shape to ``best_student.yaml``.

    Args:
        context: the run.
        end: time, by ``time.monotonic``, after which no candidate is started; None:
            ``time_budget`` minutes from now.

    Returns:
        The best student's shape.
    """
    config, settings, run = context.config, context.config.search, context.run
    study = context.study()
    num_done = len(tried(study))
    is_done = run.full_kd.exists() or is_complete(study, context.inputs.space, settings.n_trials)
    if is_done and run.best_student.exists():
        if not run.trials_csv.exists():
            write_text(run.trials_csv, trials_frame(study).to_csv(index=False))
        context.console.print(f"Search: {num_done} candidates are done.")
        return StudentArch.from_yaml(run.best_student)
    if num_done:
        context.console.print(
            f"Search: going on after {num_done} of {settings.n_trials} candidates."
        )
    open_states(context, "mini")  # before the live display: computing them shows a bar of its own
    if end is None:
        end = time.monotonic() + 60 * (config.time_budget or math.inf)
    # By rule the deepest shape comes first; without a budget nothing refuses one that is too slow.
    first = context.inputs.space.by_rule() if settings.budget != Budget() else ()
    lstm = lstm_of(config.sampler)
    exploration = lstm.exploration if lstm else None
    with context.progress() as progress, SearchBoard(run.folder / "search", exploration) as board:
        display = SearchDisplay(context, board, progress)

        def attempt() -> FrozenTrial:
            display.study = context.open_study()
            return search_loop(
                display.study,
                context.inputs.space,
                context.engine,
                partial(candidate_job, config),
                settings.n_trials,
                display.show,
                JobBars(progress),
                end - time.monotonic(),
                first,
            )

        best = patiently(attempt, context.storage)
        display.write_down()
    arch_of(best).to_yaml(run.best_student)
    return arch_of(best)


class SearchDisplay:
    """Shows each finished trial of a search: on the console, in ``trials.csv``, in TensorBoard."""

    def __init__(self, context: RunContext, board: SearchBoard, progress: Progress) -> None:
        self.context, self.board, self.progress = context, board, progress
        self.study: Study  # set whenever the study is opened
        self._bar = progress.add_task("search", total=context.config.search.n_trials)
        self._told_busy = False
        self._num_trained: int | None = None  # as the best ones were last shown

    def show(self, trial: FrozenTrial) -> None:
        """Show a finished trial: on the console, in ``trials.csv`` and in TensorBoard."""
        console = self.context.console
        if "failed" in trial.user_attrs and console.quiet:
            log.warning(line(trial))
        else:
            console.print(line(trial), highlight=False, soft_wrap=True)
        if not self._told_busy and has_spread(trial, "teacher_"):
            self._told_busy = True
            log.warning(
                "The machine is busy: the teacher's latency beside trial %d spread by more than a "
                "tenth, and the budget and the reward depend on it. Let nothing else run, or start "
                "a new run with more --latency.min_seconds.",
                trial.number,
            )
        self._show_leaders()
        self.write_down()

    def _show_leaders(self) -> None:
        """Show the best candidates at the end of each episode of ``num_candidates`` candidates."""
        size = self.study.user_attrs["num_candidates"]
        ended = sorted(trained(self.study), key=lambda one: (one.datetime_complete, one.number))
        rewards = [(arch_of(trial), trial.value or 0.0) for trial in ended]
        is_new, self._num_trained = len(rewards) != self._num_trained, len(rewards)
        if rewards and is_new and len(rewards) % size == 0:
            ranking = ModelRanking.of(rewards, size, len(rewards) // size - 1)
            self.context.console.print(str(ranking), highlight=False, soft_wrap=True)

    def write_down(self) -> None:
        """Update the progress bar, ``trials.csv`` and TensorBoard's files.

        The weights of all but the best trials are deleted.
        """
        run = self.context.run
        self.progress.update(self._bar, completed=len(tried(self.study)))
        write_text(run.trials_csv, trials_frame(self.study).to_csv(index=False))
        drop_weights(self.study, run.trial)
        self.board(self.study)


def open_states(context: RunContext, split: Split) -> None:
    """Compute the teacher's missing hidden states for a split, on all GPUs of this machine."""
    inputs, config = context.inputs, context.config
    num_shares = min(context.engine.num_slots, num_gpus(config.trainer.accelerator))
    cache, data = inputs.cache, inputs.data.select(split)
    is_shared = num_shares > 1 and config.executor is None
    if is_shared and is_missing(cache, data, inputs.states_settings):
        jobs = [states_job(config, split, share, num_shares) for share in range(num_shares)]
        cache.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(cache.folder / "lock"):
            context.engine.run(jobs)
        for job in jobs:
            shutil.rmtree(job.folder)
    inputs.states(split)


def full_kd_stage(context: RunContext, config: RunConfig, arch: StudentArch) -> None:
    """Distil the best student on all rows (full KD), unless this is finished."""
    run, console = context.run, context.console
    last = run.full_kd / "last.ckpt"
    if (run.full_kd / "result.json").exists():
        console.print("Full KD: done.")
    else:
        if last.exists():
            console.print("Full KD: going on where it was stopped.")
        open_states(context, "full" if config.full_kd.num_epochs else "mini")
        goes_on = config.full_kd.from_candidate or not config.full_kd.num_epochs
        kept = _kept_files(context, arch) if goes_on else {}
        job = full_kd_job(config, arch, kept)
        with context.progress() as progress:
            (result,) = context.engine.run([job], JobBars(progress))
        stage = "Full KD" if config.full_kd.num_epochs else "No full KD, the candidate as it is"
        console.print(
            f"{stage}: loss {result['loss']:.3f}, contextual share "
            f"{result['contextual_share']:.2f}{too_long(result['history'])}."
        )
    last.unlink(missing_ok=True)


def _kept_files(context: RunContext, arch: StudentArch) -> dict[str, Path]:
    """Return the existing files of a candidate's weights and optimizer state, by file name.

    Raises:
        UserError: a file is damaged.
    """
    best = next(trial for trial in trained(context.study()) if arch_of(trial) == arch)
    kept = {}
    for name in KEPT:
        path = context.run.trial(best.number) / name
        known = best.user_attrs.get(f"{path.stem}_sha256")
        if not path.exists():
            context.console.print(
                f"Full KD: starting without {path}, which does not exist.", soft_wrap=True
            )
        elif known in (None, file_sha256(path)):
            kept[name] = path
        else:
            raise UserError(
                f"{str(path)!r} is damaged (its sha256 is no longer {known}): delete the file to "
                "continue without it."
            )
    return kept


def finetune_stage(context: RunContext, config: RunConfig, arch: StudentArch) -> None:
    """Fine-tune teacher, student and baselines with the same settings, unless all are finished."""
    folder, task = context.run.glue, context.inputs.task
    source = task_path(context.run, config.task)
    assert task is not None and source is not None
    if (folder / "results.json").exists():
        context.console.print("Fine-tuning: done.")
        return
    sources, seeds = [TaskSource(partial(load_task, source))], {"": config.seed}
    with context.progress() as progress:
        comparison = Comparison(
            folder,
            _roles(context, config, arch, task.task.name),
            [task],
            sources,
            seeds,
            config,
            context.engine,
            progress,
        )
        fits = comparison.fine_tune()
    rows = {fit.contender.name: dict(read_json(fit.job.result_file)) for fit in fits}
    comparison.measure_rows(rows, "score")
    (folder / "static" / VECTORS).unlink(missing_ok=True)  # model/ holds them too
    scored = {"num_validation": len(task.validation["label"])}
    write_json(folder / "results.json", {"task": about_task(task) | scored, "models": rows})


class Role(Contender):
    """A model in a run's final table; its name, such as ``student``, is also its folder's name."""

    def folder(self, task: LoadedTask) -> str:
        return self.key


def _roles(context: RunContext, config: RunConfig, arch: StudentArch, task: str) -> list[Role]:
    """Return the models of the final table: the teacher, then the student and the baselines."""
    folder, teacher = context.run.glue, context.inputs.teacher
    kept = folder / "layer_cut" / "shape.yaml"
    if not kept.exists():
        _layer_cut(context, arch).to_yaml(kept)
    cut = StudentArch.from_yaml(kept)
    separator: Any = teacher.tokenizer.sep_token_id
    encoder, vectors = context.run.full_kd / "encoder", folder / "static" / VECTORS

    def role(name: str, make: Callable[[int], Any], shape: Callable[[int], Any]) -> Role:
        return Role(name, name, teacher.source, make, shape)

    build = partial(build_classifier, teacher.config)
    build_student = partial(build_classifier, student_config(teacher.config, arch))
    build_static = partial(StaticForSequenceClassification, teacher.config, separator)
    build_cut = partial(build_classifier, student_config(teacher.config, cut))
    roles = [
        role("teacher", partial(load_classifier, teacher.source), build),
        role("student", partial(load_classifier, str(encoder)), build_student),
        role("random", build_student, build_student),
        role("static", partial(static_classifier, teacher.source, vectors), build_static),
        role("layer_cut", partial(cut_classifier, teacher.source, cut), build_cut),
    ]
    if config.task_distill:
        help = Help(str(folder / "teacher" / "model"), config.distill)
        roles[1] = replace(roles[1], helpers={task: help}, plain=roles[1])
    return roles


def _layer_cut(context: RunContext, arch: StudentArch) -> StudentArch:
    """Return the shape of the layer-cut baseline: the teacher with fewer layers, within the budget.

    Without a budget, it has the most layers with which it is no slower than the student ``arch``,
    but at least one.
    """
    whole, meter = arch_of_config(context.inputs.teacher.config), context.inputs.meter
    budget = context.config.search.budget
    if budget == Budget():
        budget = Budget(latency_ms=meter.measure(arch).student.median_ms)

    def cut(depth: int) -> StudentArch:
        return replace(whole, num_hidden_layers=depth)

    def excess(depth: int) -> float:
        return budget.violation(meter.measure(cut(depth)))[0]

    return cut(max(1, bisect_right(range(1, whole.num_hidden_layers), 0.0, key=excess)))


def export_stage(context: RunContext, config: RunConfig) -> None:
    """Export the student, unless its latest weights are already exported."""
    run, console = context.run, context.console
    if is_exported(run):
        console.print("Export: done.")
        return
    if run.student.exists():
        console.print(
            f"Export: {run.student} holds another model than the run has now; it is exported again.",
            soft_wrap=True,
        )
    job = export_job(config)
    job.result_file.unlink(missing_ok=True)
    with context.progress() as progress:
        (report,) = context.engine.run([job], JobBars(progress))
    say(report, console)
