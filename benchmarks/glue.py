"""How fast fine-tuning is beside transformers' Trainer; scores beside a teacher are a matter of ``kdnas glue``.

    python benchmarks/glue.py --glue data/glue [--rounds 3] [--quick] [--json PATH]

The teacher on 1,000 of STS-B's training rows, by us and by transformers.Trainer in turn, nothing measured
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

from common import TEACHER, machine, options, quieten, read_config  # isort: skip (before torch)

import torch
from quality import MOST_TRAIN_ROWS, some_rows
from rich.console import Console
from rich.table import Table
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from kdnas.models.encoders import build_classifier, find_teacher, load_classifier, student_config
from kdnas.system.files import write_json
from kdnas.tasks.batches import GLUEDataModule
from kdnas.tasks.finetune import FinetuneSettings, GLUEModule, evaluate_glue
from kdnas.tasks.tasks import LoadedTask, load_task
from kdnas.training.precision import trainer_precision
from kdnas.training.trainer import TrainerSettings, fit, make_trainer

SETTINGS = FinetuneSettings(num_epochs=3, learning_rate=5e-5, batch_size=32, max_length=128)
STUDENT_RATE = 2e-4
QUICK_ROWS = 64
TIMED_ROWS = 1_000


Make = Callable[[int], PreTrainedModel]


def our_seconds(make: Make, task: LoadedTask, settings: FinetuneSettings, folder: Path) -> float:
    """Seconds of training by ``GLUEModule``."""
    data = GLUEDataModule(
        task,
        find_teacher(TEACHER).tokenizer,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        seed=settings.seed,
    )
    data.setup()  # both sides have their rows as tokens before the clock runs
    module = GLUEModule(make(task.task.num_labels), task.task, settings)
    trainer = make_trainer(TrainerSettings(), folder, settings.num_epochs)
    trainer.limit_val_batches = 0
    begin = perf_counter()
    fit(trainer, module, data)
    return perf_counter() - begin


def trainer_seconds(
    make: Make, task: LoadedTask, settings: FinetuneSettings, folder: Path, *, as_we_do: bool
) -> float:
    """Seconds of training by transformers' Trainer on the same rows."""
    tokenizer = find_teacher(TEACHER).tokenizer
    texts = [task.train[name] for name in task.task.columns]
    padding = {} if as_we_do else {"padding": "max_length"}
    encoded = tokenizer(*texts, truncation=True, max_length=settings.max_length, **padding)
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
    collator = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(
        make(task.task.num_labels), arguments, train_dataset=rows, data_collator=collator
    )
    trainer.remove_callback(PrinterCallback)
    begin = perf_counter()
    trainer.train()
    return perf_counter() - begin


SIDES: dict[str, Callable[[Make, LoadedTask, FinetuneSettings, Path], float]] = {
    "kdnas": our_seconds,
    "Trainer, our precision, by length": partial(trainer_seconds, as_we_do=True),
    "Trainer, run_glue.py's defaults": partial(trainer_seconds, as_we_do=False),
}


def clock(task: LoadedTask, rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds of the teacher's epoch on some rows on each side, in turn, and of the student's four on all."""
    teacher = find_teacher(TEACHER)
    make = partial(load_classifier, teacher.source)
    settings = dataclasses.replace(SETTINGS, num_epochs=1)
    timed = some_rows(task, TIMED_ROWS)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(rounds):
        for name, measure in SIDES.items():
            seconds[name].append(measure(make, timed, settings, folder / "side"))
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
    """The table."""
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
    parser = options("glue", "Seconds beside transformers' Trainer.", text=False)
    parser.add_argument(
        "--glue", type=Path, help="a folder of task folders in GLUE's layout (default: the hub's)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of the clock; medians are shown")
    chosen = parser.parse_args(args)
    quieten()
    console = Console(width=120)
    task = load_task(str(chosen.glue / "stsb") if chosen.glue else "stsb")
    task = some_rows(task, MOST_TRAIN_ROWS)
    if chosen.quick:
        chosen.rounds, task = 1, glance(some_rows(task, QUICK_ROWS))
    results: dict[str, Any] = {"quick": chosen.quick}
    with tempfile.TemporaryDirectory() as folder:
        results["seconds"] = clock(task, chosen.rounds, Path(folder))
    results["machine"] = machine()
    show(results, console)
    write_json(chosen.json, results)
    console.print(f"Figures: {chosen.json}")


if __name__ == "__main__":
    main()
