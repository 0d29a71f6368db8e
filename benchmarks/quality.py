"""How much of its teacher's GLUE a student keeps, after distillation on unlabelled text alone.

Five tasks (CoLA, SST-2, MRPC, STS-B, RTE) in a folder in GLUE's layout; every model is fine-tuned on each by
``evaluate_glue``, at the usual rate of its size. Of each shape: a random start without distillation, the original's
recipe (configs/original_fit.yaml, four epochs on 30 % of the text), and ours (configs/fit.yaml) for several lengths;
beside them what needs no distillation, the teacher's static vectors and as many of its layers as ``--cut`` says.
``--seeds`` are those of fine-tuning; ``--kd-seed`` draws the rows of our distillation, their pairs, masks and order
anew. A run is kept in ``--folder`` and goes on where it was stopped; ``--only`` names parts of it, so that processes
can share the work.

    python benchmarks/quality.py --text train.parquet --glue glue --json quality.json
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import OUTPUT, TEACHER, cut_text, machine, options, quieten, read_config  # isort: skip (before torch)

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig

from kdnas.data.datamodule import KDDataModule
from kdnas.deploy.latency import LatencyMeter, LatencySettings
from kdnas.distillation.module import HiddenStateDistillModule
from kdnas.distillation.teacher_states import StatesSettings, open_states
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import build_classifier, find_teacher, load_classifier, student_config
from kdnas.models.families import arch_of
from kdnas.system.files import new_folder, read_json, write_json
from kdnas.tasks.baselines import cut_classifier, static_classifier
from kdnas.tasks.finetune import FinetuneSettings, evaluate_glue
from kdnas.tasks.tasks import LoadedTask, load_task
from kdnas.training.progress import EpochLines
from kdnas.training.trainer import TrainerSettings, fit, make_trainer

TASKS = ("cola", "sst2", "mrpc", "stsb", "rte")
SHAPES = {
    "4x192": StudentArch(4, 6, 192, 768, "gelu"),
    "3x384": StudentArch(3, 12, 384, 1536, "gelu"),
}
# More rows of one sentence change little and take most of the time.
MOST_TRAIN_ROWS = 6_000


def shape_of(name: str, teacher: PreTrainedConfig) -> StudentArch:
    """``4x192`` as layers x width, with heads as large as the teacher's; ``4x192x384`` has the intermediate size, too."""
    depth, width, *intermediate = map(int, name.split("x"))
    whole = arch_of(teacher)
    num_heads = width * whole.num_attention_heads // whole.hidden_size
    return StudentArch(depth, num_heads, width, *(intermediate or [4 * width]), whole.hidden_act)


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Args:
        name: of its folder, too.
        make: gives its classifier, of so many outputs.
        source: where its tokenizer is.
        arch: what its latency is measured of; None: unknown.
        recipe: a file of configs/, by which it is distilled before.
        epochs: of that.
    """

    name: str
    make: Callable[[int], Any]
    source: str
    arch: StudentArch | None = None
    recipe: str = ""
    epochs: int = 0


def entries(
    source: str, shapes: Sequence[str], lengths: Sequence[int], cut: int, kd_seed: int, folder: Path
) -> list[Entry]:
    """All rows, the teacher first."""
    config = find_teacher(source).config
    whole, anew = arch_of(config), f"-seed-{kd_seed}" if kd_seed else ""
    layers = dataclasses.replace(whole, num_hidden_layers=cut)
    found = [
        Entry("teacher", partial(load_classifier, source), source, whole),
        Entry("static", partial(static_classifier, source, folder / "vectors"), source),
        Entry(f"cut-{cut}", partial(cut_classifier, source, layers), source, layers),
    ]
    for shape in shapes:
        arch = shape_of(shape, config)
        random = partial(build_classifier, student_config(config, arch))
        found.append(Entry(f"{shape}-random", random, source, arch))
        recipes = [("original", "original_fit", 4)]
        recipes += [(f"ours-{epochs}{anew}", "fit", epochs) for epochs in lengths]
        for name, recipe, epochs in recipes:
            make = partial(load_classifier, folder / f"{shape}-{name}" / "encoder")
            found.append(Entry(f"{shape}-{name}", make, source, arch, recipe, epochs))
    return found


def distil(
    arch: StudentArch,
    recipe_name: str,
    num_epochs: int,
    text: str,
    folder: Path,
    split: str,
    seed: int,
    source: str = TEACHER,
) -> None:
    """Distil a student into ``folder``, unless it is there."""
    if (folder / "result.json").exists():
        return
    config, teacher = read_config(recipe_name), find_teacher(source)
    torch.manual_seed(seed)
    module = HiddenStateDistillModule(teacher, arch, config.recipe)
    begin = time.process_time()
    settings = dataclasses.replace(config.data, seed=seed)
    data = KDDataModule(source, text, settings, split=split)  # type: ignore[arg-type]
    data.setup()
    # Of all students of a search, not of one: whichever run comes first stores them, and the others find them.
    is_original = recipe_name == "original_fit"
    states = StatesSettings(str(OUTPUT / "teacher_states"), 0 if is_original else 40)
    module.states = open_states(teacher, data, module.target_layers, states)
    states_seconds = time.process_time() - begin
    started, cpu_started = time.monotonic(), time.process_time()
    trainer_settings = TrainerSettings(
        precision=config.trainer["precision"] or "auto",
        gradient_clip_val=config.trainer.get("gradient_clip_val", 0.0),
    )
    trainer = make_trainer(trainer_settings, folder, num_epochs, [EpochLines(folder.name, print)])
    fit(trainer, module, data)
    with new_folder(folder / "encoder") as encoder:
        module.save_student(encoder)
    write_json(
        folder / "result.json",
        {
            "seconds": time.monotonic() - started,
            "states_cpu_seconds": states_seconds,  # tokens and the teacher's states, where they were not there
            "cpu_seconds": time.process_time() - cpu_started,  # tells the same on a shared machine
            "threads": torch.get_num_threads(),
            "history": module.history,
        },
    )


def some_rows(task: LoadedTask, most: int) -> LoadedTask:
    """The task with at most so many training rows, always the same."""
    num_rows = len(task.train["label"])
    if num_rows <= most:
        return task
    chosen = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))[:most].tolist()
    train = {name: [column[i] for i in chosen] for name, column in task.train.items()}
    return dataclasses.replace(task, train=train)


def main(args: Sequence[str] | None = None) -> None:
    """Do what is missing, then show the table."""
    parser = options("quality", __doc__ or "")
    parser.add_argument(
        "--glue", type=Path, help="a folder of task folders in GLUE's layout (default: the hub's)"
    )
    parser.add_argument(
        "--folder", type=Path, default=OUTPUT / "quality", help="where the runs are kept"
    )
    parser.add_argument("--teacher", default=TEACHER, help="as of kdnas")
    parser.add_argument(
        "--shapes",
        nargs="*",
        default=list(SHAPES),
        help="layers x width, or layers x width x intermediate size",
    )
    parser.add_argument("--cut", type=int, default=2, help="layers of the cut teacher")
    parser.add_argument(
        "--also", nargs="*", default=[], help="more encoders for the table: NAME=FOLDER"
    )
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    parser.add_argument(
        "--epochs", type=int, nargs="*", default=[2, 6, 18], help="lengths of our distillation"
    )
    parser.add_argument("--seeds", type=int, default=3, help="of fine-tuning")
    parser.add_argument(
        "--kd-seed", type=int, default=0, help="of our distillation; another than 0 is in the names"
    )
    parser.add_argument(
        "--only", nargs="*", default=[""], help="names that begin so, such as teacher or 4x192-ours"
    )
    arguments = parser.parse_args(args)
    if arguments.quick:
        arguments.epochs, arguments.seeds, arguments.folder = [1], 1, OUTPUT / "quality_quick"
        arguments.tasks, shape = ["sst2"], arguments.shapes[0]
        if arguments.only == [""]:
            arguments.only = ["teacher", f"{shape}-random", f"{shape}-ours-1"]
    quieten()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    text = cut_text(arguments.text, arguments.folder, most=200 if arguments.quick else None)
    tasks = [
        load_task(str(arguments.glue / name) if arguments.glue else name)
        for name in arguments.tasks
    ]
    tasks = [some_rows(task, 600 if arguments.quick else MOST_TRAIN_ROWS) for task in tasks]
    source, kd_seed, folder = arguments.teacher, arguments.kd_seed, arguments.folder
    rows = entries(source, arguments.shapes, arguments.epochs, arguments.cut, kd_seed, folder)
    for name, other in (pair.split("=", 1) for pair in arguments.also):
        arch = arch_of(find_teacher(other).config)
        rows.append(Entry(name, partial(load_classifier, other), other, arch))
    for entry in rows:
        if not entry.name.startswith(tuple(arguments.only)):
            continue
        place = folder / entry.name
        if entry.recipe:
            assert entry.arch is not None
            is_original = entry.recipe == "original_fit"
            split, seed = ("mini", 0) if is_original else ("full", kd_seed)
            distil(entry.arch, entry.recipe, entry.epochs, text, place, split, seed, source)
        for seed in range(arguments.seeds):
            for task in tasks:
                torch.manual_seed(seed)
                evaluate_glue(
                    entry.make(task.task.num_labels),
                    find_teacher(entry.source).tokenizer,
                    task,
                    FinetuneSettings(3, weight_decay=0.01, seed=seed),
                    folder=place / f"{task.task.name}-{seed}",
                    trainer_settings=TrainerSettings(),
                    callbacks=[EpochLines(f"{entry.name} {task.task.name} {seed}", print)],
                    keep_model=False,
                )
    show(folder, rows, arguments.tasks, arguments.json)


def show(folder: Path, entries: Sequence[Entry], tasks: Sequence[str], path: Path) -> None:
    """A table of all that is measured, its JSON and the curve of share kept against seconds."""
    meter = LatencyMeter(find_teacher(entries[0].source).config, LatencySettings(length=64))
    rows: list[dict[str, Any]] = []
    for entry in entries:
        name, arch = entry.name, entry.arch
        scores = {
            task: [
                read_json(file)["score"]
                for file in sorted(folder.glob(f"{name}/{task}-*/result.json"))
            ]
            for task in tasks
        }
        if not all(scores.values()):
            continue
        num_seeds = min(map(len, scores.values()))
        averages = [
            statistics.mean(scores[task][seed] for task in tasks) for seed in range(num_seeds)
        ]
        file = folder / name / "result.json"
        distillation = read_json(file) if file.exists() else {}
        rows.append(
            {
                "name": name,
                "speedup": meter.measure(arch).speedup if arch else None,
                "kd_seconds": distillation.get("seconds", 0.0),
                "kd_cpu_seconds": distillation.get("cpu_seconds", 0.0),
                "kd_threads": distillation.get("threads"),
                "scores": scores,
                "average": statistics.mean(averages),
                "spread": statistics.stdev(averages) if num_seeds > 1 else None,
                "num_seeds": num_seeds,
            }
        )
    means = {
        row["name"]: {task: statistics.mean(row["scores"][task]) for task in tasks} for row in rows
    }
    teacher = means.get("teacher")
    without_rte = [task for task in tasks if task != "rte"]  # which is chance for small models
    table = Table(
        "model", "speed-up", "KD, CPU seconds", *tasks, "average", "kept", "without RTE", "seeds"
    )
    for row in rows:
        mine = means[row["name"]]
        for key, those in (("kept", tasks), ("kept_without_rte", without_rte)):
            row[key] = (
                sum(mine[task] for task in those) / sum(teacher[task] for task in those)
                if teacher
                else None
            )
        kept = [f"{row[key]:.1%}" if teacher else "" for key in ("kept", "kept_without_rte")]
        spread = "" if row["spread"] is None else f" ± {row['spread']:.3f}"
        cells = [f"{mine[task]:.3f}" for task in tasks]
        cells = [f"{row['kd_cpu_seconds']:.0f}", *cells, f"{row['average']:.3f}{spread}", *kept]
        table.add_row(
            row["name"],
            f"{row['speedup']:.1f}x" if row["speedup"] else "",
            *cells,
            str(row["num_seeds"]),
        )
    console = Console(width=150)
    console.print(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"machine": machine(), "rows": rows})
    if not teacher:
        console.print(
            f"Shares are not known: there is no {folder / 'teacher'}, which --only teacher makes.",
            soft_wrap=True,
        )
        return
    figure, axes = plt.subplots(figsize=(6, 4))
    for shape in dict.fromkeys(e.name.split("-")[0] for e in entries if e.recipe):
        ours = [row for row in rows if row["name"].startswith(f"{shape}-ours")]
        curve = sorted((row["kd_cpu_seconds"], row["kept"]) for row in ours)
        if curve:
            axes.plot([s / 60 for s, _ in curve], [100 * k for _, k in curve], "o-", label=shape)
    axes.set(xlabel="CPU minutes of distillation", ylabel="share of the teacher's average kept, %")
    axes.legend()
    figure.savefig(path.with_suffix(".png"), dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
