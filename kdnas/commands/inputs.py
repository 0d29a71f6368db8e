"""What all stages share once the user's input is known to be good."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kdnas.commands.config import RunConfig, SearchConfig, as_plain
from kdnas.data.datamodule import KDDataModule, Split
from kdnas.data.quickstart import QUICKSTART, build_quickstart_text
from kdnas.deploy.latency import LatencyMeter, is_unsteady
from kdnas.distillation.objectives import Objective, needed_layers
from kdnas.distillation.teacher_states import StatesSettings, TeacherStates, open_states
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import (
    Teacher,
    build_encoder,
    build_student,
    find_teacher,
    max_length,
    num_parameters,
)
from kdnas.nas.record import Study, best_of, is_complete
from kdnas.nas.sampler import make_pruner, make_sampler
from kdnas.nas.search import open_study, refuse_difference
from kdnas.nas.space import SearchSpace
from kdnas.nas.storage import check_reachable, sqlite_url, without_password
from kdnas.system.errors import UserError, first_line
from kdnas.system.files import Run, check_writable, sweep, write_text
from kdnas.system.supervisor import EARLIER
from kdnas.system.yaml import flat, read_yaml
from kdnas.tasks.tasks import LoadedTask, load_task
from kdnas.training.precision import keep
from kdnas.training.progress import live_progress
from kdnas.training.trainer import TrainerSettings

BEGINS_AS = "the first layers and the last, copied and corrected, or narrowed"  # kdnas.distillation.start.FromTeacher


@dataclass(frozen=True)
class Found:
    """What the user gave, looked at and known to be good; nothing is written yet."""

    config: SearchConfig
    run: Run
    console: Console
    teacher: Teacher
    data: KDDataModule
    task: LoadedTask | None
    space: SearchSpace
    meter: LatencyMeter

    @property
    def target_layers(self) -> list[int]:
        """Every teacher layer that a student of the space can ask for, so that all share one cache."""
        depths = self.space.choices["num_hidden_layers"]
        return sorted(
            needed_layers(
                self.config.recipe.objective, depths, self.teacher.config.num_hidden_layers
            )
        )

    @property
    def states_settings(self) -> StatesSettings:
        """With the folder that is used."""
        return replace(self.config.states, folder=str(states_folder(self.config)))

    @property
    def device(self) -> str:
        """Where the teacher runs while its states are computed."""
        accelerator = self.config.trainer.accelerator
        return (
            "cuda"
            if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
            else "cpu"
        )

    def states(self, split: Split) -> TeacherStates:
        """Of the target layers, for the rows of a split and the held-out ones, computed now if they are not there."""
        data = self.data.select(split)
        return open_states(
            self.teacher, data, self.target_layers, self.states_settings, self.device
        )

    def progress(self) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        # Of all that was done: within the usual 30 seconds hardly a candidate ends, and no time would be shown.
        return live_progress(self.console, *columns, speed_estimate_period=math.inf)


@dataclass(frozen=True)
class Job(Found):
    """What all stages of a run share."""

    study: Study


def states_folder(config: SearchConfig) -> Path:
    """Where the teacher's states are kept: beside all runs, unless the user says so."""
    return Path(config.states.folder or Run(config.root, config.name).states)


def refuse_other_config(run: Run, config: SearchConfig) -> None:
    """A name stands for one config, but for what changes no result and for stages that have not begun."""
    if not run.config.exists():
        return
    run.refuse_other_kind(is_comparison=False)
    known, asked = flat(read_yaml(run.config)), flat(_plain(config))
    free = ["root", "states.folder", "states.max_gb", "trainer.accelerator", "data.num_workers"]
    free += ["sampler", "workers", "candidate_timeout", "time_budget"]
    if not isinstance(config, RunConfig):
        free.append("search.n_trials")
    if not run.full_kd.exists():
        free.append("full_kd.")
    if not run.glue.exists() and not run.student.exists():  # what is exported stays
        free += ["finetune.", "task"]
    shared = {key for key in known.keys() & asked.keys() if not key.startswith(tuple(free))}
    is_stage_s = all(
        key.startswith(("finetune.", "task")) for key in shared if known[key] != asked[key]
    )
    begins_anew = run.glue.exists() and not run.student.exists() and is_stage_s
    remedy = (
        f"delete {str(run.glue)!r}, and fine-tuning begins anew with these, or "
        if begins_anew
        else ""
    )
    refuse_difference(
        run.name, {key: known[key] for key in shared}, {key: asked[key] for key in shared}, remedy
    )


def is_whole(run: Run, config: Mapping[str, Any]) -> bool:
    """Whether the last file of each stage that a config asks for is there; report and manifest alone finish no run."""
    last = (
        [run.full_kd / "result.json", run.student, run.report]
        if "full_kd" in config
        else [run.best_student]
    )
    last += [run.glue / "results.json"] if config.get("task") else []
    return all(path.exists() for path in last)


def _plain(config: SearchConfig) -> dict[str, Any]:
    """As plain YAML, for everyone to read."""
    plain: dict[str, Any] = as_plain(config)
    return plain | ({"storage": without_password(config.storage)} if config.storage else {})


def check_place(config: SearchConfig) -> Run:
    """The run, whose folders can be written and are no other config's; nothing is written.

    Raises:
        UserError: the name stands for another config, or a folder takes no new file.
    """
    run = Run(config.root, config.name)
    refuse_other_config(run, config)
    run.check_writable()
    check_writable(states_folder(config), "--states.folder")
    return run


def check(
    config: SearchConfig, is_worker: bool = False
) -> tuple[Run, Teacher, SearchSpace, LatencyMeter]:
    """Look at everything but text and task, cheapest first; nothing is written.

    Args:
        config: of the search or the run.
        is_worker: whether another process has looked already.

    Raises:
        UserError: anything that the user can mend.
    """
    run = check_place(config)
    config.trainer.check()
    _refuse_hidden_device(config)
    make_sampler(config.sampler), make_pruner(config.pruner)
    teacher = find_teacher(config.teacher)
    space = SearchSpace.from_teacher(teacher.config).replaced(vars(config.space), teacher.config)
    _check_objective(config.recipe.objective, teacher, space)
    meter = LatencyMeter(teacher.config, config.latency)
    if not (is_worker or EARLIER.deaths or run.trials_csv.exists()):  # else the search is past it
        _refuse_impossible_budget(config, teacher, space)
    if (
        isinstance(config, RunConfig)
        and config.task
        and config.finetune.max_length > max_length(teacher.config)
    ):
        raise UserError(
            f"finetune.max_length is {config.finetune.max_length}: the teacher {config.teacher!r} takes at most "
            f"{max_length(teacher.config)} tokens."
        )
    return run, teacher, space, meter


def look(config: SearchConfig, console: Console, is_worker: bool = False) -> Found:
    """Look at everything that the user gave, before anything is trained.

    Nothing is written but the text's tokens, and the quickstart's text where that is asked for.

    Args:
        config: of the search or the run.
        console: where to say what was found.
        is_worker: whether another process has looked already.

    Raises:
        UserError: anything that the user can mend.
    """
    run, teacher, space, meter = check(config, is_worker)
    if config.storage and not (is_worker or EARLIER.deaths):
        check_reachable(config.storage)
    text, task_source = config.text, config.task if isinstance(config, RunConfig) else None
    if QUICKSTART in (text, task_source):
        path = build_quickstart_text(run.text)
        text = str(path) if text == QUICKSTART else text
        task_source = str(run.text / "which_package") if task_source == QUICKSTART else task_source
    task = load_task(task_source) if task_source else None
    data = KDDataModule(
        config.teacher, text, replace(config.data, seed=config.seed), folder=str(run.tokens)
    )
    data.setup()
    assert data.rows is not None
    dropped = "".join(
        f", {count:,} dropped ({why})" for why, count in data.rows.dropped.items() if count
    )
    console.print(
        f"Teacher: {config.teacher} ({num_parameters(teacher.model) / 1e6:.1f} M parameters).  "
        f"Text: {len(data.train_ids()):,} rows to learn from, {len(data.held_out_ids()):,} held out{dropped}.  "
        f"Space: {len(space)} students.",
        highlight=False,
        soft_wrap=True,
    )
    return Found(config, run, console, teacher, data, task, space, meter)


def begin(found: Found, is_worker: bool = False) -> Job:
    """Open the study, and write the config down.

    Args:
        found: by ``look``.
        is_worker: whether another process has written already.

    Raises:
        UserError: the study was made with other settings, or full KD of its best student has begun.
    """
    config, run, data, space = found.config, found.run, found.data, found.space
    assert data.rows is not None
    identity = flat(
        {
            "begins as": BEGINS_AS,  # with the same settings, other students than those of another rule
            "teacher": found.teacher.sha256(),
            "text": data.rows.sha256,
            "num_train_rows": data.rows.num_train,
            "space": {name: list(values) for name, values in space.choices.items()},
            "states.precision": config.states.precision,
            **(
                {"loss": "of what rows tell"} if config.data.pair_share == 0 else {}
            ),  # once of all terms
            **({"pruner": config.pruner} if config.pruner != "none" else {}),
            **{
                key: as_plain(getattr(config, key))
                for key in ("seed", "data", "recipe", "search", "latency")
            },
            **config.latency.content(),
            "trainer": {
                name: value
                for name in ("precision", "gradient_clip_val")
                if (value := getattr(config.trainer, name)) != getattr(TrainerSettings(), name)
            },
        }
    )
    del identity["search.n_trials"], identity["data.num_workers"]
    if not config.data.pad_to_max_length:
        del identity["data.pad_to_max_length"]  # studies from before it was an option
    sampler, pruner = make_sampler(config.sampler, config.seed), make_pruner(config.pruner)
    run.folder.mkdir(parents=True, exist_ok=True)
    storage, was_there = (
        config.storage or sqlite_url(run.study_db),
        is_worker or bool(EARLIER.deaths),
    )
    study = open_study(storage, run.name, identity, sampler, pruner, run.folder, was_there)
    job = Job(**vars(found), study=study)
    if is_worker:
        return job
    sweep(run.folder)
    computed_in = keep(study.user_attrs.get("cpu_matmuls"))
    if not study.get_trials(deepcopy=False):
        study.set_user_attr("cpu_matmuls", computed_in)
    if study.user_attrs.get("budget") != (budget := as_plain(config.search.budget)):
        study.set_user_attr("budget", budget)
    is_done = is_complete(study, space, config.search.n_trials)
    if not isinstance(config, RunConfig) and run.full_kd.exists() and not is_done:
        raise UserError(
            f"The run {run.name!r} distils its best student already: prolong it under a new name."
        )
    if is_done and run.best_student.exists() and not run.full_kd.exists():
        best = best_of(study, space).user_attrs["arch"]
        if StudentArch.from_yaml(run.best_student).to_dict() != best:
            run.best_student.unlink()  # a search that was prolonged has not told yet who is the best now
    known = read_yaml(run.config) if run.config.exists() else {}
    asked = known | _plain(config)
    if asked != known or not run.best_student.exists() or not is_done:
        run.manifest.unlink(missing_ok=True)  # until the end again
        write_text(run.config, yaml.safe_dump(asked, sort_keys=False))
    return job


def _refuse_hidden_device(config: SearchConfig) -> None:
    """Of several GPUs a worker process sees one, which is its first."""
    kind, _, number = config.latency.device.partition(":")
    if (config.workers > 1 or config.candidate_timeout is not None) and number not in ("", "0"):
        raise UserError(
            f"latency.device is {config.latency.device!r}, but a worker process sees one GPU only: give {kind!r}, "
            "which is its own, or one worker without --candidate_timeout."
        )


def _refuse_impossible_budget(config: SearchConfig, teacher: Teacher, space: SearchSpace) -> None:
    """Look whether the fastest student of the space, which is the smallest too, is within the budget."""
    fastest = space.smallest()
    glance = replace(config.latency, min_seconds=min(0.1, config.latency.min_seconds))
    found = LatencyMeter(teacher.config, glance).measure(fastest)
    violation, reason = config.search.budget.violation(found)
    if violation > 0:
        is_busy = any(
            is_unsteady(one.median_ms, one.iqr_ms) for one in (found.student, found.teacher)
        )
        doubt = (
            " The machine is busy, so this may be wrong: let nothing else run." if is_busy else ""
        )
        raise UserError(
            f"No student meets the budget: the fastest possible, {fastest}, is {reason}.{doubt}"
        )


def _check_objective(objective: Objective, teacher: Teacher, space: SearchSpace) -> None:
    """Refuse an objective that a student of the space cannot be asked for; nothing is allocated."""
    needed_layers(objective, space.choices["num_hidden_layers"], teacher.config.num_hidden_layers)
    with torch.device("meta"):
        teacher_shape = build_encoder(teacher.config)
        for width, heads in itertools.product(
            space.choices["hidden_size"], space.choices["num_attention_heads"]
        ):
            arch = replace(space.smallest(), hidden_size=width, num_attention_heads=heads)
            student = build_student(teacher.config, arch)
            try:
                objective.criterion(student, teacher_shape)
            except UserError:
                raise
            except Exception as error:  # the user's own class may raise anything
                raise UserError(
                    f"recipe.objective, {type(objective).__name__}, cannot be asked of {arch}: "
                    f"{type(error).__name__}: {first_line(error)}; mend it, or leave such students out of the space."
                ) from error
