"""What students reach on GLUE beside their teacher, and how fast fine-tuning is beside transformers' Trainer.

    python benchmarks/glue.py --glue data/glue --model STUDENT [--model ANOTHER] [--seeds 3] [--quick] [--json PATH]

The table: five tasks (SST-2 cut to 6,000 training rows), official validation rows, the score after the last epoch. The
teacher is MiniLM-L6; every ``--model`` is a student's folder, and the first is trained a second time with the help of
the fine-tuned teacher. A student of the same shape starts at random, anew for each seed. All are
trained alike but for the rate, which was chosen on rows split off from training rows (LOG.md); ``--grid`` chooses it,
and the batch size, for each model and task. Runs are kept in ``--folder``, and go on where they were stopped; those
of another machine too, where ``--precision`` says what they were trained in.

The seconds: the teacher on 1,000 of STS-B's training rows, by us and by transformers.Trainer in turn, nothing measured
or saved in between: once with the defaults of run_glue.py (float32, every row padded to 128 tokens), once told to do
as we do (our precision, rows of similar length together). And the 4 x 192 student's four epochs on all rows, with the
measuring.
"""

import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from common import OUTPUT, TEACHER, machine, options, quieten, read_config  # isort: skip (before torch)

import torch
from quality import MOST_TRAIN_ROWS, TASKS, some_rows
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

from kdnas.commands.config import Grid
from kdnas.commands.glue import (
    Comparison,
    Contender,
    contender,
    score_table,
    short_names,
    with_help,
)
from kdnas.deploy.latency import LatencySettings
from kdnas.models.encoders import build_classifier, student_config
from kdnas.system.files import write_json
from kdnas.tasks.batches import GLUEDataModule
from kdnas.tasks.finetune import FinetuneSettings, GLUEModule, evaluate_glue
from kdnas.tasks.task_distill import TaskDistillSettings
from kdnas.tasks.tasks import LoadedTask, load_task
from kdnas.training.precision import trainer_precision
from kdnas.training.trainer import TrainerSettings, fit, make_trainer

SETTINGS = FinetuneSettings(num_epochs=3, learning_rate=5e-5, batch_size=32, max_length=128)
STUDENT_RATE = 2e-4
QUICK_ROWS = 64
TIMED_ROWS = 1_000


def random_starts(models: Sequence[Contender]) -> list[Contender]:
    """One student for each shape that models have, with random weights."""
    found = {}
    for model in models:
        config = model.config
        name = f"random, {config.num_hidden_layers} x {config.hidden_size}"
        key = f"random-{config.num_hidden_layers}-{config.hidden_size}-{config.intermediate_size}"
        found[key] = dataclasses.replace(
            model, name=name, key=key, make=partial(build_classifier, config)
        )
    return list(found.values())


def compare(chosen: Any, tasks: Sequence[LoadedTask], console: Console) -> dict[str, Any]:
    """The table: the teacher first, for it helps the others."""
    students = dataclasses.replace(SETTINGS, learning_rate=STUDENT_RATE)
    teacher = contender(TEACHER, "MiniLM-L6", SETTINGS)
    names = short_names(chosen.model)
    models = [
        contender(source, name, students) for source, name in zip(chosen.model, names, strict=True)
    ]
    arch = read_config("fit").arch
    shapes = models or [
        dataclasses.replace(teacher, config=student_config(teacher.config, arch), settings=students)
    ]
    contenders = [teacher, *models, *random_starts(shapes)]
    with Progress(console=console, transient=True) as progress:
        comparison = Comparison(
            folder=chosen.folder,
            contenders=[teacher],
            tasks=tasks,
            seeds=chosen.seeds,
            trainer=TrainerSettings(precision=chosen.precision),
            latency=LatencySettings(length=64),
            grid=Grid() if chosen.grid else None,
            progress=progress,
        )
        comparison.run()
        places = {
            task.task.name: str(chosen.folder / teacher.folder(task) / "seed_0" / "model")
            for task in tasks
        }
        helped = with_help(models[:1], places, tasks, TaskDistillSettings())
        return dataclasses.replace(comparison, contenders=[*contenders, *helped]).run()


def our_seconds(model: Contender, task: LoadedTask, folder: Path) -> float:
    """Seconds of training by ``GLUEModule``."""
    settings = model.settings
    data = GLUEDataModule(
        task,
        model.tokenizer,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        seed=settings.seed,
    )
    data.setup()  # both sides have their rows as tokens before the clock runs
    module = GLUEModule(model.make(task.task.num_labels), task.task, settings)
    trainer = make_trainer(TrainerSettings(), folder, settings.num_epochs)
    trainer.limit_val_batches = 0
    begin = perf_counter()
    fit(trainer, module, data)
    return perf_counter() - begin


def trainer_seconds(model: Contender, task: LoadedTask, folder: Path, *, as_we_do: bool) -> float:
    """Seconds of training by transformers' Trainer on the same rows."""
    settings = model.settings
    texts = [task.train[name] for name in task.task.columns]
    padding = {} if as_we_do else {"padding": "max_length"}
    encoded = model.tokenizer(*texts, truncation=True, max_length=settings.max_length, **padding)
    rows = [
        {**dict(zip(encoded, values, strict=True)), "labels": label}
        for *values, label in zip(*encoded.values(), task.train["label"], strict=True)
    ]
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.num_epochs,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size,
        bf16=as_we_do and trainer_precision("auto") == "bf16-mixed",
        train_sampling_strategy="group_by_length" if as_we_do else "random",
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )
    collator = DataCollatorWithPadding(model.tokenizer)
    trainer = Trainer(
        model.make(task.task.num_labels), arguments, train_dataset=rows, data_collator=collator
    )
    trainer.remove_callback(PrinterCallback)
    begin = perf_counter()
    trainer.train()
    return perf_counter() - begin


SIDES: dict[str, Callable[[Contender, LoadedTask, Path], float]] = {
    "kdnas": our_seconds,
    "Trainer, our precision, by length": partial(trainer_seconds, as_we_do=True),
    "Trainer, run_glue.py's defaults": partial(trainer_seconds, as_we_do=False),
}


def clock(task: LoadedTask, rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds of the teacher's epoch on some rows on each side, in turn, and of the student's four on all."""
    teacher = contender(TEACHER, "MiniLM-L6", dataclasses.replace(SETTINGS, num_epochs=1))
    timed = some_rows(task, TIMED_ROWS)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(rounds):
        for name, measure in SIDES.items():
            seconds[name].append(measure(teacher, timed, folder / "side"))
    config = student_config(teacher.config, read_config("fit").arch)
    student = evaluate_glue(
        build_classifier(config, task.task.num_labels),
        teacher.tokenizer,
        task,
        dataclasses.replace(SETTINGS, num_epochs=4, learning_rate=STUDENT_RATE),
        folder=folder / "student",
    )
    return {
        "task": task.task.name,
        "num_rows": len(timed.train["label"]),
        "student_num_rows": len(task.train["label"]),
        "batch_size": SETTINGS.batch_size,
        "teacher_epoch_seconds": seconds,
        "student_4_epochs_seconds": student["seconds"],
    }


def glance(task: LoadedTask) -> LoadedTask:
    """The task with a few of its validation rows."""
    few = {
        split: {name: values[:QUICK_ROWS] for name, values in rows.items()}
        for split, rows in task.validations.items()
    }
    return dataclasses.replace(task, validations=few)


def show(results: dict[str, Any], console: Console) -> None:
    """Both tables."""
    console.print(score_table(results["table"]))
    for name, row in results["table"]["models"].items():
        if row.get("gap_closed") is not None:
            console.print(
                f"The teacher's help closes {row['gap_closed']:.0%} of the gap: {name}.",
                highlight=False,
            )
    times = results["seconds"]
    table = Table(
        "",
        "seconds",
        title=f"One epoch of the teacher on {times['num_rows']:,} rows of {times['task']}",
    )
    for name, seconds in times["teacher_epoch_seconds"].items():
        table.add_row(name, f"{statistics.median(seconds):.1f}")
    name = f"the 4 x 192 student's four epochs, {times['student_num_rows']:,} rows"
    table.add_row(name, f"{times['student_4_epochs_seconds']:.1f}")
    console.print(table)


def main(args: Sequence[str] | None = None) -> None:
    """Do what is missing, then show and write."""
    parser = options(
        "glue",
        "Scores on GLUE beside the teacher, and seconds beside transformers' Trainer.",
        text=False,
    )
    parser.add_argument(
        "--glue", type=Path, help="a folder of task folders in GLUE's layout (default: the hub's)"
    )
    parser.add_argument(
        "--model", action="append", default=[], help="a student's folder; once for each"
    )
    parser.add_argument("--seeds", type=int, default=3, help="of fine-tuning")
    parser.add_argument(
        "--precision",
        choices=("auto", "32-true", "bf16-mixed"),
        default="auto",
        help="of the table's runs",
    )
    parser.add_argument("--rounds", type=int, default=3, help="of the clock; medians are shown")
    parser.add_argument(
        "--grid", action="store_true", help="choose rate and batch size for each model and task"
    )
    parser.add_argument(
        "--folder", type=Path, default=OUTPUT / "glue", help="where the runs are kept"
    )
    chosen = parser.parse_args(args)
    if chosen.quick:
        chosen.seeds, chosen.rounds, chosen.folder = 1, 1, chosen.folder / "quick"
    quieten()
    console = Console(width=120)
    most = QUICK_ROWS if chosen.quick else MOST_TRAIN_ROWS
    names = ("rte", "stsb") if chosen.quick else TASKS
    tasks = {name: load_task(str(chosen.glue / name) if chosen.glue else name) for name in names}
    timed = tasks["stsb"]
    cut = [some_rows(tasks[name], most) for name in (("rte",) if chosen.quick else TASKS)]
    if chosen.quick:
        timed, *cut = (glance(some_rows(task, most)) for task in (timed, *cut))
    results: dict[str, Any] = {"quick": chosen.quick, "table": compare(chosen, cut, console)}
    with tempfile.TemporaryDirectory() as folder:
        results["seconds"] = clock(timed, chosen.rounds, Path(folder))
    results["machine"] = machine()
    show(results, console)
    write_json(chosen.json, results)
    console.print(f"Figures: {chosen.json}")


if __name__ == "__main__":
    main()
