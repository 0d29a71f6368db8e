"""The whole job: search -> full KD -> fine-tuning -> export -> report. Each stage is done once and resumes."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file
from transformers import AutoModel, PreTrainedModel

from kdnas.arch import StudentArch
from kdnas.config import FullKDSettings, RunConfig, SearchConfig, as_plain, flat
from kdnas.data.corpus import QUICKSTART, build_quickstart_text
from kdnas.data.datamodule import KDDataModule
from kdnas.distill.module import HiddenStateDistillModule
from kdnas.distill.objectives import Objective, needed_layers
from kdnas.distill.teacher import TeacherStates, open_states
from kdnas.errors import UserError
from kdnas.export import export_student
from kdnas.glue.finetune import FinetuneSettings, evaluate_glue
from kdnas.glue.tasks import LoadedTask, load_task
from kdnas.latency import LatencyMeter, measure_latency
from kdnas.models import (
    Teacher,
    build_classifier,
    build_student,
    find_teacher,
    load_classifier,
    max_length,
    num_parameters,
    student_config,
)
from kdnas.nas.candidate import WEIGHTS, Evaluator
from kdnas.nas.search import FrozenTrial, Study, open_study, refuse_difference, trained
from kdnas.nas.search import search as search_loop
from kdnas.nas.space import SearchSpace
from kdnas.report import result_table, trials_frame, write_report
from kdnas.runs import Run, new_folder, read_json, write_json, write_text
from kdnas.training import FitProgress, KeepLast, fit, make_trainer


@dataclass(frozen=True)
class _Job:
    """What all stages share once the user's input is known to be good."""

    config: SearchConfig
    run: Run
    console: Console
    teacher: Teacher
    data: KDDataModule
    task: LoadedTask | None
    space: SearchSpace
    meter: LatencyMeter
    study: Study

    def states(self) -> TeacherStates:
        """Of every layer that a student of the space can ask for, so that all share one cache."""
        num_layers = self.teacher.config.num_hidden_layers
        depths = self.space.choices["num_hidden_layers"]
        layers = needed_layers(self.config.recipe.objective, depths, num_layers)
        accelerator = self.config.trainer.accelerator
        device = "cuda" if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu"
        settings = self.config.states
        if settings.folder is None:
            settings = dataclasses.replace(settings, folder=str(self.run.root / "teacher_states"))
        return open_states(self.teacher, self.data, layers, settings, device)

    def progress(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        return Progress(*columns, console=self.console, transient=True)


def search(config: SearchConfig, console: Console | None = None) -> StudentArch:
    """Find the best student within the budget, into ``<root>/<name>/``.

    Returns:
        The best student, as in ``best_student.yaml``.

    Raises:
        UserError: anything that the user can mend, before anything is trained.
    """
    job = _prepare(config, console or Console())
    best = _search(job)
    job.console.print(f"Best student: {best}, in {job.run.best_student}")
    return best


def run(config: RunConfig, console: Console | None = None) -> None:
    """The whole job, into ``<root>/<name>/``: search, full KD, fine-tuning beside the teacher, export, report.

    The same call again goes on where it was stopped; a finished run answers with its table and changes nothing.

    Raises:
        UserError: anything that the user can mend, before anything is trained.
    """
    console = console or Console()
    run = Run(config.root, config.name)
    if run.report.exists():
        _refuse_other_config(run, config)
        console.print(f"The run {run.name!r} is finished; nothing is done again.")
    else:
        job = _prepare(config, console)
        with _alone(run):
            best = _search(job)
            _full_kd(job, config.full_kd, best)
            if job.task is not None:
                _finetune(job, config.finetune, job.task, best)
            _export(job, best)
            write_report(run, job.study)
    if (run.glue / "results.json").exists():
        console.print(result_table(read_json(run.glue / "results.json")))
    console.print(
        f"Report:   {run.report}", f"Student:  {run.student}", f"Run:      {run.folder}", sep="\n", soft_wrap=True
    )
    console.print(f"Look at it with:  tensorboard --logdir {run.folder}", soft_wrap=True)


@contextmanager
def _alone(run: Run) -> Iterator[None]:
    """Two processes must not do the same stages; a search may have more workers."""
    lock = FileLock(run.folder / "run.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(
            f"The run {run.name!r} is being made by another process: wait for it, or add a worker by `kdnas search`."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _refuse_other_config(run: Run, config: SearchConfig) -> None:
    """A name stands for one config, but for what changes no result and for stages that have not begun."""
    if not run.config.exists():
        return
    known, asked = flat(yaml.safe_load(run.config.read_text(encoding="utf-8"))), flat(as_plain(config))
    free = ["root", "states.folder", "states.max_gb", "trainer.accelerator", "data.num_workers"]
    if not isinstance(config, RunConfig):
        free.append("search.n_trials")
    if not run.full_kd.exists():
        free.append("full_kd.")
    if not run.glue.exists():
        free += ["finetune.", "task"]
    shared = {key for key in known.keys() & asked.keys() if not key.startswith(tuple(free))}
    refuse_difference(run.name, {key: known[key] for key in shared}, {key: asked[key] for key in shared})


def _prepare(config: SearchConfig, console: Console) -> _Job:
    """Look at everything that the user gave, cheapest first, before anything is written or trained."""
    run = Run(config.root, config.name)
    _refuse_other_config(run, config)
    run.check_writable()
    config.trainer.check()
    teacher = find_teacher(config.teacher)
    space = SearchSpace.from_teacher(teacher.config)
    _check_objective(config.recipe.objective, teacher, space)
    meter = LatencyMeter(teacher.config, config.latency)
    fastest = dataclasses.replace(space.smallest(), hidden_act=space.choices["hidden_act"][-1])  # ReLU is the cheapest
    glance = dataclasses.replace(config.latency, min_seconds=min(0.1, config.latency.min_seconds))
    violation, reason = config.search.budget.violation(LatencyMeter(teacher.config, glance).measure(fastest))
    if violation > 0:
        raise UserError(f"No student meets the budget: the fastest possible, {fastest}, is {reason}.")
    text, task_source = config.text, config.task if isinstance(config, RunConfig) else None
    if isinstance(config, RunConfig) and task_source and config.finetune.max_length > max_length(teacher.config):
        raise UserError(
            f"finetune.max_length is {config.finetune.max_length}: the teacher {config.teacher!r} takes at most "
            f"{max_length(teacher.config)} tokens."
        )
    if QUICKSTART in (text, task_source):
        path = build_quickstart_text(run.text)
        text = str(path) if text == QUICKSTART else text
        task_source = str(run.text / "which_package") if task_source == QUICKSTART else task_source
    task = load_task(task_source) if task_source else None
    data = KDDataModule(config.teacher, text, dataclasses.replace(config.data, seed=config.seed))
    data.setup()
    assert data.rows is not None and data.corpus is not None
    identity = flat(
        {
            "teacher": teacher.weights_sha256(),
            "text": data.rows.sha256(data.settings.num_mask_variants),
            "num_train_rows": len(data.corpus.train),
            "space": {name: list(values) for name, values in space.choices.items()},
            "states.precision": config.states.precision,
            **{key: as_plain(getattr(config, key)) for key in ("seed", "data", "recipe", "search", "latency")},
        }
    )
    del identity["search.n_trials"], identity["data.num_workers"]
    run.folder.mkdir(parents=True, exist_ok=True)
    study = open_study(f"sqlite:///{run.study_db}", run.name, identity, config.seed)
    study.set_user_attr("budget", as_plain(config.search.budget))
    if not isinstance(config, RunConfig) and run.full_kd.exists() and len(trained(study)) < config.search.n_trials:
        raise UserError(f"The run {run.name!r} has distilled its best student already: prolong it under a new name.")
    known = yaml.safe_load(run.config.read_text(encoding="utf-8")) if run.config.exists() else {}
    write_text(run.config, yaml.safe_dump(known | as_plain(config), sort_keys=False))
    dropped = "".join(f", {count:,} dropped ({why})" for why, count in data.corpus.dropped.items() if count)
    console.print(
        f"Teacher: {config.teacher} ({num_parameters(teacher.model) / 1e6:.1f} M parameters).  "
        f"Text: {len(data.corpus.train):,} rows, {len(data.corpus.held_out):,} held out{dropped}.  "
        f"Space: {len(space)} students.",
        highlight=False,
        soft_wrap=True,
    )
    return _Job(config, run, console, teacher, data, task, space, meter, study)


def _check_objective(objective: Objective, teacher: Teacher, space: SearchSpace) -> None:
    """Refuse an objective that a student of the space cannot be asked for; nothing is allocated."""
    needed_layers(objective, space.choices["num_hidden_layers"], teacher.config.num_hidden_layers)
    with torch.device("meta"):
        teacher_shape = AutoModel.from_config(teacher.config, add_pooling_layer=False)
        for width, heads in itertools.product(space.choices["hidden_size"], space.choices["num_attention_heads"]):
            arch = dataclasses.replace(space.smallest(), hidden_size=width, num_attention_heads=heads)
            objective.criterion(build_student(teacher.config, arch), teacher_shape)


def _search(job: _Job) -> StudentArch:
    settings, run, study = job.config.search, job.run, job.study
    num_done = len(trained(study))
    if run.best_student.exists() and num_done >= settings.n_trials:
        job.console.print(f"Search: {num_done} candidates are done.")
        return StudentArch.from_yaml(run.best_student)
    if num_done:
        job.console.print(f"Search: going on after {num_done} of {settings.n_trials} candidates.")
    states = job.states()  # before the live display: building them shows its own bar
    with job.progress() as progress:
        bar = progress.add_task("search", total=settings.n_trials, completed=num_done)

        def show(study: Study, trial: FrozenTrial) -> None:
            progress.update(bar, completed=len(trained(study)))
            job.console.print(_line(trial), highlight=False, soft_wrap=True)
            write_text(run.trials_csv, trials_frame(study).to_csv(index=False))
            _keep_best_weights(run, study)

        evaluate = Evaluator(
            teacher=job.teacher,
            states=states,
            data=job.data,
            recipe=job.config.recipe,
            meter=job.meter,
            budget=settings.budget,
            trainer=job.config.trainer,
            num_epochs=settings.num_epochs,
            alpha=settings.alpha,
            beta=settings.beta,
            seed=job.config.seed,
            folder=run.trial,
            progress=progress,
        )
        best = search_loop(evaluate, job.space, study, settings.n_trials, [show])
    write_text(run.trials_csv, trials_frame(study).to_csv(index=False))
    arch = StudentArch.from_dict(best.user_attrs["arch"])
    arch.to_yaml(run.best_student)
    return arch


def _keep_best_weights(run: Run, study: Study) -> None:
    """Delete the weights of all but the best three candidates."""
    for trial in sorted(trained(study), key=lambda trial: trial.value or 0.0)[:-3]:
        (run.trial(trial.number) / WEIGHTS).unlink(missing_ok=True)


def _line(trial: FrozenTrial) -> str:
    """One line for a trial that ended."""
    attrs = trial.user_attrs
    head = f"trial {trial.number:3d}  {StudentArch.from_dict(attrs['arch'])}: "
    if "twin_of" in attrs:
        return f"{head}known from trial {attrs['twin_of']}"
    if "refused" in attrs or "failed" in attrs:
        return head + ("refused, " + attrs["refused"] if "refused" in attrs else "failed, " + attrs["failed"])
    if trial.state.name == "PRUNED":
        return head + "pruned"
    return (
        f"{head}loss {attrs['loss']:.3f}, contextual share {attrs['contextual_share']:.2f}, "
        f"{attrs['speedup']:.1f}x, reward {trial.value:.4f}, {attrs['seconds']:.0f} s"
    )


def _full_kd(job: _Job, settings: FullKDSettings, arch: StudentArch) -> None:
    folder = job.run.full_kd
    if (folder / "result.json").exists():
        job.console.print("Full KD: done.")
        return
    started = time.monotonic()
    last = folder / "last.ckpt"
    if last.exists():
        job.console.print("Full KD: going on after the last whole epoch.")
    states = job.states()
    with job.progress() as progress, torch.random.fork_rng():
        torch.manual_seed(job.config.seed)
        module = HiddenStateDistillModule(job.teacher, arch, job.config.recipe)
        module.states = states
        trial = next(trial for trial in trained(job.study) if trial.user_attrs["arch"] == arch.to_dict())
        weights = job.run.trial(trial.number) / WEIGHTS
        if settings.from_candidate and weights.exists():
            module.begin(job.data.select("full"))
            module.load_state_dict(load_file(weights))
        callbacks = [FitProgress(progress, "full KD"), KeepLast(last)]
        trainer = make_trainer(job.config.trainer, folder, settings.num_epochs, callbacks, resume=last.exists())
        data = job.data.select("full")
        fit(trainer, module, data, ckpt_path=last if last.exists() else None)
    with new_folder(folder / "encoder") as encoder:
        module.student.save_pretrained(encoder)
        job.teacher.tokenizer.save_pretrained(encoder)
    final = {name: module.history[-1][name] for name in ("loss", "contextual_share", "sentence_r2")}
    write_json(
        folder / "result.json",
        {
            "arch": arch.to_dict(),
            "num_parameters": num_parameters(module.student),
            **final,
            "seconds": time.monotonic() - started,
            "num_rows": len(data.train_ids()),
            "num_epochs": settings.num_epochs,
            "history": module.history,
        },
    )
    last.unlink()
    job.console.print(f"Full KD: loss {final['loss']:.3f}, contextual share {final['contextual_share']:.2f}.")


def _finetune(job: _Job, settings: FinetuneSettings, task: LoadedTask, arch: StudentArch) -> None:
    """Fine-tune teacher, student and a randomly started student of the same shape, all with the same settings."""
    folder = job.run.glue
    if (folder / "results.json").exists():
        job.console.print("Fine-tuning: done.")
        return
    num_labels = task.task.num_labels
    config = student_config(job.teacher.config, arch)
    makers: dict[str, Callable[[], PreTrainedModel]] = {
        "teacher": lambda: load_classifier(job.teacher.source, num_labels),
        "student": lambda: load_classifier(job.run.full_kd / "encoder", num_labels),
        "random": lambda: build_classifier(config, num_labels),
    }
    rows = {}
    for role, make in makers.items():
        with torch.random.fork_rng():
            torch.manual_seed(job.config.seed)
            classifier = make()
        with job.progress() as progress:
            rows[role] = evaluate_glue(
                classifier,
                job.teacher.tokenizer,
                task,
                dataclasses.replace(settings, seed=job.config.seed),
                folder=folder / role,
                trainer_settings=job.config.trainer,
                callbacks=[FitProgress(progress, f"fine-tuning, {role}")],
            )
        job.console.print(f"Fine-tuning: {role} {rows[role]['score']:.3f} on {task.task.name}.")
    models = [load_classifier(folder / role / "model", num_labels) for role in rows]
    latencies = dict(zip(rows, measure_latency(models, job.config.latency), strict=True))
    for role, row in rows.items():
        row["latency_ms"], row["latency_iqr_ms"] = latencies[role].median_ms, latencies[role].iqr_ms
        row["speedup"] = latencies["teacher"].median_ms / latencies[role].median_ms
        row["share_kept"] = row["score"] / rows["teacher"]["score"] if rows["teacher"]["score"] > 0 else None
    about = {
        "name": task.task.name,
        "metric": " + ".join(task.task.metrics),
        "num_labels": num_labels,
        "num_train": len(task.train["label"]),
        "num_validation": len(task.validation["label"]),
    }
    write_json(folder / "results.json", {"task": about, "models": rows})


def _export(job: _Job, arch: StudentArch) -> None:
    if job.run.student.exists():
        job.console.print("Export: done.")
        return
    is_classifier = job.task is not None
    source = job.run.glue / "student" / "model" if is_classifier else job.run.full_kd / "encoder"
    card: dict[str, Any] = {"name": job.run.name, "teacher": job.teacher.name, "sections": {}}
    if is_classifier:
        results = read_json(job.run.glue / "results.json")
        row = results["models"]["student"]
        card["sections"]["Scores"] = {
            f"{results['task']['name']}, {results['task']['metric']}": f"{row['score']:.3f}",
            "its teacher, fine-tuned alike": f"{results['models']['teacher']['score']:.3f}",
        }
        latency = job.config.latency
        card["sections"]["Latency"] = {
            f"{latency.device}, batch {latency.batch_size} x {latency.length}": f"{row['latency_ms']:.2f} ms",
            "faster than its teacher": f"{row['speedup']:.1f}x",
        }
    card["sections"]["Shape"] = {name: str(value) for name, value in arch.to_dict().items()}
    parity = export_student(source, job.run.student, card=card)
    job.console.print(f"Export: ONNX equals torch to {parity['max_abs_difference']:.1e}.")
