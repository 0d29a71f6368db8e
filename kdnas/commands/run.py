"""The whole job: search -> full KD -> fine-tuning -> export -> report. Each stage is done once and resumes."""

import dataclasses
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from filelock import ReadWriteLock
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from kdnas.commands.config import FullKDSettings, RunConfig, SearchConfig, as_plain
from kdnas.commands.export import export_run, is_exported, rows_of_task, rows_of_texts
from kdnas.commands.inputs import Job, begin, is_whole, look, refuse_other_config
from kdnas.deploy.latency import measure_latency
from kdnas.distillation.metrics import too_long
from kdnas.distillation.module import HiddenStateDistillModule
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import build_classifier, load_classifier, num_parameters, student_config
from kdnas.nas.candidate import KEPT, OPTIMIZER, WEIGHTS, Evaluator, drop_weights
from kdnas.nas.controller import ModelRanking
from kdnas.nas.record import FrozenTrial, Study, best_of, is_complete, trained, tried
from kdnas.nas.sampler import lstm_of
from kdnas.nas.search import is_over
from kdnas.nas.search import search as search_loop
from kdnas.nas.storage import without_password
from kdnas.nas.trials import has_spread, in_words, line, trials_frame
from kdnas.nas.workers import DISK, INTERRUPTED, REFUSED, run_workers
from kdnas.report.page import result_table, write_report
from kdnas.report.tables import front_table
from kdnas.report.tensorboard import SearchBoard
from kdnas.system.errors import CandidateFailed, UserError, last_words
from kdnas.system.files import (
    Run,
    file_sha256,
    new_folder,
    read_json,
    sweep,
    write_json,
    write_text,
)
from kdnas.system.manifest import write_manifest
from kdnas.system.signals import honest_signals, let_go, notice_signals
from kdnas.system.supervisor import EARLIER
from kdnas.system.yaml import read_yaml
from kdnas.tasks.finetune import FinetuneSettings, evaluate_glue
from kdnas.tasks.tasks import LoadedTask
from kdnas.training.precision import gpu_name, own_precision
from kdnas.training.progress import FitProgress
from kdnas.training.trainer import fit_resumable, one_error, settled_memory

log = logging.getLogger("kdnas")


@own_precision()
@honest_signals()
def search(config: SearchConfig, console: Console | None = None) -> StudentArch:
    """Find the best student within the budget, into ``<root>/<name>/``.

    Returns:
        The best student, as in ``best_student.yaml``.

    Raises:
        UserError: anything that the user can mend, before anything is trained.
    """
    job = begin(look(config, console or Console(markup=False)))
    was_done = (
        job.run.manifest.exists()
    )  # then begin() has left everything as it was, and so does the rest
    best = _search(job)
    job.console.print(front_table(job.study))
    refused = sum(in_words(trial) == "refused" for trial in job.study.get_trials(deepcopy=False))
    if refused:
        job.console.print(
            f"Refused for the budget, untrained: {refused}; the reasons are in {job.run.trials_csv}."
        )
    if not was_done and is_whole(
        job.run, read_yaml(job.run.config)
    ):  # of a run that is not finished, none
        write_manifest(job.run.folder, _about(job.run))
    job.console.print(f"Best student: {best}, in {job.run.best_student}")
    return best


def run(config: RunConfig, console: Console | None = None) -> None:
    """The whole job, into ``<root>/<name>/``: search, full KD, fine-tuning beside the teacher, export, report.

    The same call again goes on where it was stopped; a finished run answers with its table and changes nothing.

    Raises:
        UserError: anything that the user can mend, before anything is trained.
    """
    console = console or Console(markup=False)
    run = Run(config.root, config.name)
    if run.manifest.exists() and is_whole(run, as_plain(config)):
        refuse_other_config(run, config)
        console.print(f"The run {run.name!r} is finished; nothing is done again.")
    else:
        seconds = run_stages(config, console)
        shown = ", ".join(f"{stage} {taken / 60:.1f}" for stage, taken in seconds.items())
        console.print(f"Minutes: {shown}.", highlight=False, soft_wrap=True)
    if (run.glue / "results.json").exists():
        console.print(result_table(read_json(run.glue / "results.json"), vars(config.latency)))
    console.print(
        f"Report:   {run.report}",
        f"Student:  {run.student}",
        f"Run:      {run.folder}",
        sep="\n",
        soft_wrap=True,
    )
    console.print(f"Look at it with:  tensorboard --logdir {run.folder}", soft_wrap=True)


@own_precision()
@honest_signals()
def run_stages(config: RunConfig, console: Console) -> dict[str, float]:
    """What of a run is not done yet; arguments and errors are those of ``run``.

    Returns:
        The seconds of each stage, in order.
    """
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        notice_signals()
        seconds[stage] = time.monotonic() - started

    run = Run(config.root, config.name)
    with timed("reading"):
        found = look(config, console)
    with run.alone("wait for it, or add a worker by `kdnas search`"):
        job = begin(found)
        run.manifest.unlink(
            missing_ok=True
        )  # that of a search, or of what has lost a stage: until the end
        with timed("search"):
            best = _search(job)
        with timed("full KD"):
            _full_kd(job, config.full_kd, best)
        if job.task is not None:
            with timed("fine-tuning"):
                _finetune(job, config.finetune, job.task, best)
        with timed("export"):
            _export(job, config.finetune.max_length)
        with timed("report"):
            write_report(run, job.study)
            write_manifest(run.folder, _about(run))
    return seconds


def _about(run: Run) -> dict[str, Any]:
    """What its manifest says of how it was made."""
    return {
        "name": run.name,
        "command": [without_password(argument) for argument in sys.argv],
        "gpu": gpu_name(),
    }


def _search(job: Job, is_worker: bool = False) -> StudentArch:
    settings, run, study = job.config.search, job.run, job.study
    num_done = len(tried(study))
    is_done = run.full_kd.exists() or is_complete(study, job.space, settings.n_trials)
    if is_done and run.best_student.exists():
        job.console.print(f"Search: {num_done} candidates are done.")
        return StudentArch.from_yaml(run.best_student)
    if num_done:
        job.console.print(f"Search: going on after {num_done} of {settings.n_trials} candidates.")
    states = job.states("mini")  # before the live display: building them shows its own bar
    lstm = lstm_of(job.config.sampler)
    episode, explores = (lstm.num_candidates, lstm.exploration) if lstm else (0, None)
    episodes = [len(trained(study)) // episode if episode else 0]  # whose leaders were shown
    told = False  # that the machine is busy
    with (
        settled_memory(),
        job.progress() as progress,
        one_error(run.folder),
        nullcontext() if is_worker else SearchBoard(run.folder / "search", explores) as board,
    ):
        bar = progress.add_task("search", total=settings.n_trials, completed=num_done)

        def write_down() -> None:
            if board is not None:  # a worker's parent does it
                write_text(run.trials_csv, trials_frame(study).to_csv(index=False))
                drop_weights(study, run.trial)
                board(study)

        def show(study: Study, trial: FrozenTrial) -> None:
            nonlocal told
            progress.update(bar, completed=len(tried(study)))
            if (
                job.console.quiet
                and trial.state.name == "FAIL"
                and "not_needed" not in trial.user_attrs
            ):
                log.warning(line(trial))
            elif "not_needed" not in trial.user_attrs:
                job.console.print(line(trial), highlight=False, soft_wrap=True)
            if not told and (told := has_spread(trial, "teacher_")):
                log.warning(
                    "The machine is busy: the teacher's latency beside trial %d spread by more than a tenth, and "
                    "the budget and the reward go by it. Let nothing else run, or give a new run more "
                    "--latency.min_seconds.",
                    trial.number,
                )
            rewards = [
                (StudentArch.from_dict(t.user_attrs["arch"]), t.value or 0.0)
                for t in trained(study)
            ]
            while (
                episode and len(rewards) // episode > episodes[-1]
            ):  # several, where workers were quicker than this
                ranking = ModelRanking.of(rewards, episode, episodes[-1])
                episodes.append(episodes[-1] + 1)
                job.console.print(str(ranking), highlight=False, soft_wrap=True)
            write_down()

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
            stillness=ReadWriteLock(run.stillness),
            progress=progress,
        )
        minutes = job.config.time_budget
        seconds = math.inf if minutes is None else max(0.0, 60 * minutes - EARLIER.seconds)
        timeout = job.config.candidate_timeout
        if job.config.workers > 1 or timeout is not None:
            work = partial(_work, job.config, log.getEffectiveLevel())
            timeout = 60 * timeout if timeout is not None else math.inf
            end = time.monotonic() + seconds
            refusal = run_workers(
                work, job.config.workers, study, show, seconds, run.worker_log, timeout
            )
            sweep(run.folder)  # what a worker that was killed has left half written
            if (
                refusal
                and time.monotonic() < end
                and not is_over(study, job.space, settings.n_trials)
            ):
                raise UserError(refusal)
            best = best_of(study, job.space, seconds)
        else:
            best = search_loop(
                evaluate, job.space, study, settings.n_trials, [show], seconds, run.folder
            )
        write_down()  # what ended while nobody looked
    if not (
        run.full_kd.exists() and run.best_student.exists()
    ):  # else another process distils what it found
        StudentArch.from_dict(best.user_attrs["arch"]).to_yaml(run.best_student)
    return StudentArch.from_yaml(run.best_student)


def _work(config: SearchConfig, level: int, index: int, deadline: float) -> None:
    """One worker process of a search: the same search, told into a log file."""
    logging.basicConfig(format="%(message)s")
    log.setLevel(level)
    # Optuna says again, with a traceback, what a trial died of.
    logging.getLogger("optuna").setLevel(logging.INFO if level <= logging.DEBUG else logging.ERROR)
    run = Run(config.root, config.name)
    with run.worker_log(index).open("a", encoding="utf-8") as file:
        for stream in (1, 2):  # the libraries' chatter too
            os.dup2(file.fileno(), stream)
        try:
            with honest_signals(once=True):
                with ReadWriteLock(
                    run.stillness
                ).read_lock():  # whoever measures waits until this one is ready
                    alone = dataclasses.replace(config, workers=1, candidate_timeout=None)
                    job = begin(look(alone, Console(markup=False), is_worker=True), is_worker=True)
                if math.isfinite(deadline):
                    minutes = max(1e-3, deadline - time.monotonic()) / 60
                    job = dataclasses.replace(
                        job, config=dataclasses.replace(job.config, time_budget=minutes)
                    )
                _search(job, is_worker=True)
        except KeyboardInterrupt as stop:
            let_go(stop)
            raise SystemExit(INTERRUPTED) from None
        except (UserError, CandidateFailed) as error:
            last_words(str(error))
            raise SystemExit(REFUSED) from None
        except OSError:
            last_words(traceback.format_exc())
            raise SystemExit(DISK) from None


def _full_kd(job: Job, settings: FullKDSettings, arch: StudentArch) -> None:
    folder = job.run.full_kd
    if (folder / "result.json").exists():
        (folder / "last.ckpt").unlink(missing_ok=True)
        job.console.print("Full KD: done.")
        return
    started, last = time.monotonic(), folder / "last.ckpt"
    if last.exists():
        job.console.print("Full KD: going on where it was stopped.")
    folder.mkdir(
        parents=True, exist_ok=True
    )  # from now on no other process changes which student is best
    try:
        states = job.states("full")
    except Exception:
        with suppress(OSError):  # unless something is in it: nothing is fixed yet
            folder.rmdir()
        raise
    with job.progress() as progress, torch.random.fork_rng():
        torch.manual_seed(job.config.seed)
        module = HiddenStateDistillModule(job.teacher, arch, job.config.recipe)
        module.states = states
        kept = (
            _kept_of_candidate(job, arch) if settings.from_candidate and not last.exists() else {}
        )
        if WEIGHTS in kept:
            module.begin(job.data.select("full"))
            module.load_state_dict(kept[WEIGHTS])
            module.optimizer_tensors = kept.get(OPTIMIZER, {})
        data, bar = job.data.select("full"), FitProgress(progress, "full KD")
        fit_resumable(job.config.trainer, folder, settings.num_epochs, module, data, [bar])
    with new_folder(folder / "encoder") as encoder:
        module.save_student(encoder)
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
    remark = too_long(module.history)
    job.console.print(
        f"Full KD: loss {final['loss']:.3f}, contextual share {final['contextual_share']:.2f}{remark}."
    )


def _kept_of_candidate(job: Job, arch: StudentArch) -> dict[str, dict[str, Tensor]]:
    """What there is of the candidate's weights and of its optimizer's state, by the names of their files."""
    trial = next(
        trial for trial in trained(job.study) if trial.user_attrs["arch"] == arch.to_dict()
    )
    kept = {}
    for name in KEPT:
        path = job.run.trial(trial.number) / name
        if not path.exists():
            job.console.print(
                f"Full KD: beginning without {path}, which is not there.", soft_wrap=True
            )
        elif (known := trial.user_attrs.get(f"{path.stem}_sha256")) in (None, file_sha256(path)):
            kept[name] = load_file(path)
        else:
            raise UserError(
                f"{str(path)!r} is damaged (its sha256 was {known}): delete it to begin without it."
            )
    return kept


def _finetune(job: Job, settings: FinetuneSettings, task: LoadedTask, arch: StudentArch) -> None:
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
        row["share_kept"] = (
            row["score"] / rows["teacher"]["score"] if rows["teacher"]["score"] > 0 else None
        )
    about = {
        "name": task.task.name,
        "metric": " + ".join(task.task.metrics),
        "num_labels": num_labels,
        "num_train": len(task.train["label"]),
        "num_validation": len(task.validation["label"]),
    }
    write_json(folder / "results.json", {"task": about, "models": rows})


def _export(job: Job, max_length: int) -> None:
    if is_exported(job.run):
        job.console.print("Export: done.")
        return
    if job.task:
        rows = rows_of_task(job.task, max_length)
    else:
        corpus = job.data.read_corpus()
        rows = rows_of_texts(corpus.train, corpus.held_out)
    export_run(job.run, rows, job.console)
