"""Is a search worth its seconds? Its student beside a shape by rule and a random one, at equal seconds.

For each budget and seed, three students of one teacher:

- ``search``: the best of a search with the default settings, after full KD;
- ``rule``: the shape by rule (``SearchSpace.by_rule``, the first candidate of every search with a budget);
- ``random``: a random shape that keeps the budget.

``rule`` and ``random`` are distilled for as many epochs as fit into the seconds of the search and its full KD. All are
fine-tuned on the tasks beside their teacher, with the default settings, and scored on the validation rows. The
teacher's states are stored before, and not counted. What is done is kept in ``--folder`` and not done again.

    python benchmarks/worth.py --text train.parquet --glue glue --speedups 3 5 10 --seeds 0 1 2
"""

import random
import shutil
import statistics
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from common import OUTPUT, TEACHER, cut_text, machine, options, quieten  # isort: skip (before torch)

import pandas as pd
from quality import MOST_TRAIN_ROWS, some_rows
from rich.console import Console
from rich.table import Table
from samplers import interval

from kdnas import distill, glue, search
from kdnas.api import Student
from kdnas.deploy.latency import LatencyMeter, LatencySettings
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import find_teacher
from kdnas.nas.space import SearchSpace
from kdnas.system.files import read_json, write_json
from kdnas.tasks.tasks import load_task

ARMS = ("search", "rule", "random")


def shapes(teacher: str, speedup: float, seed: int) -> dict[str, StudentArch]:
    """The shape by rule and a random one, each measured to keep the budget."""
    config = find_teacher(teacher).config
    space, meter = SearchSpace.from_teacher(config), LatencyMeter(config, LatencySettings())
    shuffled = list(space)
    random.Random(seed).shuffle(shuffled)
    return {
        name: next(arch for arch in archs if meter.measure(arch).speedup >= speedup)
        for name, archs in (("rule", space.by_rule()), ("random", shuffled))
    }


def cut_task(source: str, folder: Path, most: int) -> str:
    """Write a task with at most so many training rows (and scored ones, if fewer), and give its folder."""
    task = some_rows(load_task(source), most)
    place = folder / "tasks" / task.task.name
    place.mkdir(parents=True, exist_ok=True)
    for split, rows in {"train": task.train, **task.validations}.items():
        pd.DataFrame(rows)[:most].to_parquet(place / f"{split}.parquet")
    return str(place)


def distil_three(
    teacher: str, text: str, speedup: float, seed: int, settings: dict[str, int], folder: Path
) -> tuple[dict[str, Student], dict[str, Any]]:
    """The three students of a budget and a seed, with what each took."""
    name = f"{speedup:g}x-seed-{seed}"
    for interrupted in folder.glob(f"{name}-*"):  # its seconds would be wrong
        shutil.rmtree(interrupted)

    def student(arm: str, arch: Any, num_epochs: int) -> tuple[Student, float]:
        begin = time.monotonic()
        run = f"{name}-{arm}"
        made = distill(teacher, text, arch, num_epochs=num_epochs, name=run, root=folder, seed=seed)
        return made, time.monotonic() - begin

    by_arm = shapes(teacher, speedup, seed)
    student("states", by_arm["rule"], 1)
    epoch_seconds = {arm: student(f"{arm}-epoch", arch, 1)[1] for arm, arch in by_arm.items()}
    begin = time.monotonic()
    best = search(
        teacher,
        text,
        speedup=speedup,
        n_trials=settings["n_trials"],
        name=f"{name}-search",
        root=folder,
        seed=seed,
        workers=None,
    )
    search_seconds = time.monotonic() - begin
    made = {"search": student("searched", best, settings["num_epochs"])}
    total = search_seconds + made["search"][1]
    num_epochs = {"search": settings["num_epochs"]}
    for arm, arch in by_arm.items():
        num_epochs[arm] = max(1, round(total / epoch_seconds[arm]))
        made[arm] = student(arm, arch, num_epochs[arm])
    arms = {
        arm: {
            "arch": one.arch.to_dict(),
            "loss": one.loss,
            "num_epochs": num_epochs[arm],
            "seconds": seconds + (search_seconds if arm == "search" else 0),
        }
        for arm, (one, seconds) in made.items()
    }
    cell = {"speedup": speedup, "seed": seed, "search_seconds": search_seconds, "arms": arms}
    return {arm: one for arm, (one, _) in made.items()}, cell


def main(args: Sequence[str] | None = None) -> None:
    """Do what is missing, then show the table."""
    parser = options("worth", __doc__ or "")
    parser.add_argument("--glue", type=Path, help="a folder of task folders (default: the hub's)")
    parser.add_argument("--folder", type=Path, default=OUTPUT / "worth", help="of the runs")
    parser.add_argument("--teacher", default=TEACHER, help="as of kdnas")
    parser.add_argument("--speedups", type=float, nargs="*", default=[3.0, 5.0, 10.0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="*", default=["stsb", "mrpc", "cola"])
    parser.add_argument("--share", type=float, default=1.0, help="of the text's rows")
    parser.add_argument("--n-trials", type=int, default=20, help="of each search")
    parser.add_argument("--epochs", type=int, default=2, help="of full KD after a search")
    arguments = parser.parse_args(args)
    most = None
    if arguments.quick:
        arguments.speedups, arguments.seeds, arguments.tasks = [5.0], [0], ["sst2"]
        arguments.n_trials, arguments.epochs, most = 2, 1, 200
        arguments.folder = OUTPUT / "worth_quick"
    quieten()
    folder, teacher = arguments.folder, arguments.teacher
    folder.mkdir(parents=True, exist_ok=True)
    text = cut_text(arguments.text, folder, share=arguments.share, most=most)
    tasks = [
        cut_task(
            str(arguments.glue / name) if arguments.glue else name, folder, most or MOST_TRAIN_ROWS
        )
        for name in arguments.tasks
    ]
    settings = {"n_trials": arguments.n_trials, "num_epochs": arguments.epochs}
    cells = []
    for speedup, seed in product(arguments.speedups, arguments.seeds):
        file = folder / f"{speedup:g}x-seed-{seed}.json"
        if not file.exists():
            students, cell = distil_three(teacher, text, speedup, seed, settings, folder)
            # One comparison for all cells, so that the teacher is fine-tuned once.
            models = [teacher, *(students[arm] for arm in ARMS)]
            table = glue(models, tasks, name="glue", root=folder, workers=None).table
            cell["teacher"], *averages = table.average.tolist()
            for arm, average in zip(ARMS, averages, strict=True):
                cell["arms"][arm]["average"] = average
            write_json(file, cell)
        cells.append(read_json(file))
    show(cells, arguments.json)


def show(cells: Sequence[dict[str, Any]], path: Path) -> None:
    """A row a budget and seed, the differences from the rule, and their JSON."""
    table = Table("budget", "seed", *(f"{arm}: shape, epochs, score" for arm in ARMS), "teacher")
    for cell in cells:
        shown = [
            f"{StudentArch(**arm['arch'])}, {arm['num_epochs']}, {arm['average']:.3f}"
            for arm in map(cell["arms"].__getitem__, ARMS)
        ]
        table.add_row(f"{cell['speedup']:g}x", str(cell["seed"]), *shown, f"{cell['teacher']:.3f}")
    console = Console(width=150)
    console.print(table)
    summary = {}
    for arm in ("search", "random"):
        points = [
            100 * (cell["arms"][arm]["average"] - cell["arms"]["rule"]["average"]) for cell in cells
        ]
        low, high = interval(points)
        mean = statistics.mean(points)
        summary[f"{arm}_minus_rule_points"] = {"mean": mean, "low": low, "high": high}
        console.print(f"{arm} minus rule: {mean:+.1f} points ({low:+.1f} to {high:+.1f})")
    write_json(path, {"machine": machine(), "cells": list(cells)} | summary)


if __name__ == "__main__":
    main()
