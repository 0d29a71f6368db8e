"""How far a candidate's score ranks students of equal latency, beside how far anything can.

Students are drawn at random from those whose speed-up is ``--speedup`` to a fifth more: between them the latency does
not decide. With each of ``--seeds`` seeds, every student is distilled as a candidate of a search (30 % of the rows, two
epochs) and as in full KD (all rows, ``--epochs``); the second is fine-tuned on the tasks. Scores that rank them:

- ``parameters``: the number of parameters, more is better;
- ``start``: the held-out loss of the initial weights, before any training;
- ``candidate``: the held-out loss after the short distillation;
- ``full KD``: the held-out loss after the long one.

Each is held against the mean score on the tasks by Kendall's tau, a score of one seed against the tasks of another. The
ceiling is the tau of the tasks' scores themselves, of one seed against another. Regret is how many points the student
that a score puts first is below the best. What is done is kept in ``--folder`` and not done again.

    python benchmarks/fidelity.py --text train.parquet --glue glue --rows 4000
"""

import json
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

from common import OUTPUT, TEACHER, cut_text, machine, options, quieten, read_config  # isort: skip (before torch)

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau
from worth import cut_task

from kdnas import glue
from kdnas.data.datamodule import KDDataModule
from kdnas.deploy.latency import LatencyMeter, LatencySettings
from kdnas.distillation.full_kd import distill_student
from kdnas.distillation.module import HiddenStateDistillModule
from kdnas.distillation.teacher_states import StatesSettings, TeacherStates, open_states
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import find_teacher, num_parameters
from kdnas.nas.space import SearchSpace
from kdnas.system.files import read_json, write_json
from kdnas.training.trainer import TrainerSettings, make_trainer

SCORES = ("parameters", "start", "candidate", "full KD", "tasks")
CANDIDATE_EPOCHS = 2  # of a search with its default settings


def draw_archs(speedup: float, number: int, path: Path) -> list[StudentArch]:
    """Students whose measured speed-up is from ``speedup`` to a fifth more; those of an earlier call, if any."""
    if not path.exists():
        config = find_teacher(TEACHER).config
        meter, space = (
            LatencyMeter(config, LatencySettings()),
            list(SearchSpace.from_teacher(config)),
        )
        random.Random(0).shuffle(space)
        drawn: list[StudentArch] = []
        while len(drawn) < number:
            arch = space.pop()
            if speedup <= meter.measure(arch).speedup <= 1.2 * speedup:
                drawn.append(arch)
        write_json(path, [arch.to_dict() for arch in drawn])
    return [StudentArch(**arch) for arch in read_json(path)]


def distil(
    arch: StudentArch,
    seed: int,
    data: dict[str, KDDataModule],
    states: TeacherStates,
    num_epochs: int,
    folder: Path,
) -> dict[str, float]:
    """A student's scores, lower is better, and the seconds that each took; ``folder`` keeps its encoder."""
    teacher, recipe, trainer = find_teacher(TEACHER), read_config("fit").recipe, TrainerSettings()
    torch.manual_seed(seed)
    module = HiddenStateDistillModule(teacher, arch, recipe)
    module.states = states
    begin = time.process_time()
    module.begin(data["full"])
    make_trainer(trainer, folder, 1).validate(module, data["full"], verbose=False)
    start_seconds = time.process_time() - begin
    train = partial(
        distill_student, teacher, arch, recipe, states=states, trainer=trainer, seed=seed
    )
    short = train(data["mini"], num_epochs=CANDIDATE_EPOCHS, folder=folder / "candidate")
    long = train(data["full"], num_epochs=num_epochs, folder=folder)
    return {
        "parameters": -float(num_parameters(module.student)),
        "start": module.history[-1]["loss"],
        "candidate": short["loss"],
        "full KD": long["loss"],
        "start_seconds": start_seconds,
        "candidate_seconds": short["seconds"],
        "full KD_seconds": long["seconds"],
    }


def tau(scores: np.ndarray, tasks: np.ndarray) -> float:
    """Mean Kendall's tau of a seed's scores (errors) and another seed's tasks; both (seeds, students)."""
    pairs = permutations(range(len(scores)), 2)
    return float(np.nanmean([kendalltau(-scores[i], tasks[j])[0] for i, j in pairs]))


def regret(scores: np.ndarray, tasks: np.ndarray) -> float:
    """Mean points by which the student with a seed's least error is below another seed's best."""
    pairs = permutations(range(len(scores)), 2)
    return float(np.mean([100 * (tasks[j].max() - tasks[j][scores[i].argmin()]) for i, j in pairs]))


def interval(measure: Callable[..., float], scores: np.ndarray, tasks: np.ndarray) -> list[float]:
    """95 % bootstrap interval over the students."""
    generator, num_students = np.random.default_rng(0), scores.shape[1]
    drawn = generator.integers(num_students, size=(500, num_students))
    found = [measure(scores[:, chosen], tasks[:, chosen]) for chosen in drawn]
    return np.nanquantile(found, (0.025, 0.975)).tolist()


def report(students: Sequence[dict[str, Any]], path: Path) -> None:
    """A row for each score, and its JSON; ``tasks`` is the ceiling."""
    tasks = np.array([student["tasks"] for student in students]).T
    rows: dict[str, dict[str, Any]] = {}
    for name in SCORES:
        errors = (
            -tasks
            if name == "tasks"
            else np.array([[seed[name] for seed in student["seeds"]] for student in students]).T
        )
        rows[name] = {
            "tau": tau(errors, tasks),
            "interval": interval(tau, errors, tasks),
            "regret_points": regret(errors, tasks),
        }
    ceiling = rows["tasks"]["tau"]
    table = Table("score", "tau to the tasks", "of the ceiling", "regret, points")
    for name, row in rows.items():
        row["of_ceiling"] = row["tau"] / ceiling if ceiling else float("nan")
        low, high = row["interval"]
        table.add_row(
            f"{name} (the ceiling)" if name == "tasks" else name,
            f"{row['tau']:.2f} ({low:.2f} to {high:.2f})",
            f"{row['of_ceiling']:.0%}",
            f"{row['regret_points']:.1f}",
        )
    Console(width=100).print(table)
    found = {"machine": machine(), "rows": rows, "students": list(students)}
    # A tau of students that are all equal is not a number, which JSON has not.
    write_json(path, json.loads(json.dumps(found), parse_constant=lambda _: None))


def main(args: Sequence[str] | None = None) -> None:
    """Do what is missing, then show the table."""
    parser = options("fidelity", __doc__ or "")
    parser.add_argument("--glue", type=Path, help="a folder of task folders (default: the hub's)")
    parser.add_argument("--folder", type=Path, default=OUTPUT / "fidelity", help="of the runs")
    parser.add_argument("--speedup", type=float, default=4.0, help="of the students, at least")
    parser.add_argument("--archs", type=int, default=12, help="how many students")
    parser.add_argument("--seeds", type=int, default=2, help="how often each is distilled")
    parser.add_argument("--tasks", nargs="*", default=["stsb", "mrpc", "cola"])
    parser.add_argument("--task-rows", type=int, default=4_000, help="most rows of a task")
    parser.add_argument("--rows", type=int, help="at most so many rows of the text are all of it")
    parser.add_argument("--epochs", type=int, default=4, help="of full KD")
    chosen = parser.parse_args(args)
    if chosen.quick:
        chosen.archs, chosen.rows, chosen.epochs, chosen.task_rows = 3, 150, 1, 150
        chosen.tasks, chosen.folder = chosen.tasks[:1], OUTPUT / "fidelity_quick"
    quieten()
    folder = chosen.folder
    folder.mkdir(parents=True, exist_ok=True)
    text = cut_text(chosen.text, folder, most=chosen.rows)
    data = {}
    for split in ("full", "mini"):
        data[split] = KDDataModule(TEACHER, text, read_config("fit").data, split=split)
        data[split].setup()
    teacher = find_teacher(TEACHER)
    states = open_states(
        teacher,
        data["full"],
        range(teacher.config.num_hidden_layers),
        StatesSettings(str(folder / "states"), 60),
    )
    students = []
    for number, arch in enumerate(draw_archs(chosen.speedup, chosen.archs, folder / "archs.json")):
        seeds = []
        for seed in range(chosen.seeds):
            run = folder / f"student_{number}_seed_{seed}"
            if not (run / "scores.json").exists():
                write_json(
                    run / "scores.json", distil(arch, seed, data, states, chosen.epochs, run)
                )
            seeds.append(read_json(run / "scores.json"))
        students.append({"arch": arch.to_dict(), "seeds": seeds})
    sources = [str(chosen.glue / name) if chosen.glue else name for name in chosen.tasks]
    tasks = [cut_task(source, folder, chosen.task_rows) for source in sources]
    encoders = [
        folder / f"student_{number}_seed_{seed}" / "encoder"
        for number in range(len(students))
        for seed in range(chosen.seeds)
    ]
    found = glue([TEACHER, *encoders], tasks, name="glue", root=folder, workers=None).table
    averages = np.array(found.average[1:]).reshape(len(students), chosen.seeds)
    for student, scores in zip(students, averages.tolist(), strict=True):
        student["tasks"] = scores
    report(students, chosen.json)


if __name__ == "__main__":
    main()
