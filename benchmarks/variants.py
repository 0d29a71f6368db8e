"""What one change to configs/fit.yaml is worth, judged by fine-tuning on rows that no other benchmark reports.

Each variant changes one thing of the recipe or of the data, and distils a student of ``--shape`` from ``--teacher`` on
30 % of a text. Then it is fine-tuned, at the usual rate of its size, on rows of STS-B, CoLA, MRPC and SST-2's training
split and scored on others of that split. ``--kd-seeds`` draw the rows, their masks and order anew: what they change is
noise. Seconds are the cores' own, without those of the teacher's states. A loss is shown where the held-out rows are
those of ``fit``. A run is kept in ``--folder`` and goes on where it was stopped; ``--only`` names parts of it, so that
processes can share the work. LOG.md names further variants that did not help; f1f1d4e was the last commit with them.

    python benchmarks/variants.py --text train.parquet --glue glue --kd-seeds 0 1 --only fit dropout
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from common import OUTPUT, TEACHER, cut_text, machine, options, quieten, read_config  # isort: skip (before torch)

import torch
from quality import SHAPES, shape_of, some_rows
from rich.console import Console
from rich.table import Table

from kdnas.data.datamodule import KDDataModule
from kdnas.distillation.attention import AttentionMaps, AttentionRelations
from kdnas.distillation.module import HiddenStateDistillModule, Recipe
from kdnas.distillation.objectives import (
    HiddenStates,
    Objective,
    WeightedSum,
)
from kdnas.distillation.sentences import PairComparison
from kdnas.distillation.start import (
    FromEmbeddings,
    RandomStart,
)
from kdnas.distillation.teacher_states import StatesSettings, open_states
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import find_teacher, load_classifier
from kdnas.models.layers import Even, LastAndSkip, LastLayer
from kdnas.system.files import new_folder, read_json, write_json
from kdnas.tasks.finetune import FinetuneSettings, evaluate_glue
from kdnas.tasks.tasks import LoadedTask, load_task
from kdnas.training.progress import EpochLines
from kdnas.training.trainer import TrainerSettings, fit, make_trainer

# Epochs of fine-tuning; small students take more than their teachers (LOG.md).
TASKS = {"stsb": 6, "cola": 4, "mrpc": 4, "sst2": 2}
MOST_ROWS, HELD_OUT = 7_000, 0.25


@dataclass(frozen=True)
class Variant:
    """One change to configs/fit.yaml.

    Args:
        recipe: of ``Recipe``.
        data: of ``DataSettings``.
        epochs: for ``--epochs``, as a factor.
    """

    recipe: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    epochs: float = 1.0


def _sum(*objectives: Objective, weights: Sequence[float]) -> dict[str, Any]:
    return {"objective": WeightedSum(list(objectives), list(weights))}


LAST = HiddenStates(LastLayer())
MAPS = _sum(LAST, AttentionMaps(), PairComparison(), weights=[1.0, 1.0, 0.5])


def _rates(factor: float) -> dict[str, float]:
    """All learning rates of the default recipe, times a factor."""
    return {
        field.name: factor * field.default
        for field in dataclasses.fields(Recipe)
        if field.name.endswith("learning_rate")
    }


# An epoch at such rates leaves the start as it is, and measures it.
UNMOVED = _rates(1e-9)

VARIANTS = {
    "fit": Variant(),
    "twice-as-long": Variant(epochs=2),
    "start-alone": Variant(recipe=UNMOVED, epochs=1 / 3),
    "last-layer": Variant(recipe={"objective": LAST}),
    "last-and-skip": Variant(recipe={"objective": HiddenStates(LastAndSkip())}),
    "even": Variant(recipe={"objective": HiddenStates(Even())}),
    "maps": Variant(recipe=MAPS),
    # As many seconds as without the maps, which cost a sixth of a step.
    "maps-shorter": Variant(recipe=MAPS, data={"mini_fraction": 0.25}),
    "no-comparison": Variant(recipe=_sum(LAST, AttentionMaps(), weights=[1.0, 1.0])),
    "relations": Variant(
        recipe=_sum(LAST, AttentionRelations(), PairComparison(), weights=[1.0, 1.0, 0.5])
    ),
    "start-random": Variant(recipe={"start": RandomStart()}),
    "start-embeddings": Variant(recipe={"start": FromEmbeddings()}),
    "masked-0": Variant(data={"masked_share": 0.0}),
    "masked-100": Variant(data={"masked_share": 1.0}),
    "mask-30": Variant(data={"mask_probability": 0.3}),
    "variants-3": Variant(data={"num_mask_variants": 3}),
    "pairs-0": Variant(data={"pair_share": 0.0}),
    "pairs-100": Variant(data={"pair_share": 1.0}),
    "tokens-2048": Variant(data={"batch_tokens": 2048}),
    "tokens-8192": Variant(data={"batch_tokens": 8192}),
    "dropout": Variant(recipe={"dropout": True}),
    "adamw": Variant(recipe={"matrix_learning_rate": None}),
    "adamw-5e-4": Variant(recipe={"matrix_learning_rate": None, "learning_rate": 5e-4}),
    "rates-0.3": Variant(recipe=_rates(0.3)),
    "rates-0.1": Variant(recipe=_rates(0.1)),
    "decay-0.1": Variant(recipe={"weight_decay": 0.1}),
}
SAME_ROWS = {
    "batch_tokens",
    "num_mask_variants",
}  # what of the data leaves the held-out rows as they are


def place_of(folder: Path, name: str, seed: int) -> Path:
    """Where a variant's run with one seed of distillation is kept."""
    return folder / (f"{name}-seed-{seed}" if seed else name)


def distil(
    name: str,
    seed: int,
    text: str,
    num_epochs: int,
    folder: Path,
    source: str = TEACHER,
    arch: StudentArch = SHAPES["4x192"],
) -> None:
    """Distil a variant into its place, unless it is there."""
    variant, target = VARIANTS[name], place_of(folder, name, seed)
    if (target / "result.json").exists():
        return
    config, teacher = read_config("fit"), find_teacher(source)
    data_settings = dataclasses.replace(config.data, seed=seed, **variant.data)
    data = KDDataModule(source, text, data_settings, split="mini")
    data.setup()
    torch.manual_seed(seed)
    recipe = dataclasses.replace(config.recipe, **variant.recipe)
    module = HiddenStateDistillModule(teacher, arch, recipe)
    wanted = StatesSettings(str(OUTPUT / "teacher_states"), 100)
    module.states = open_states(teacher, data, module.target_layers, wanted)
    begin = time.process_time()
    settings = TrainerSettings(gradient_clip_val=config.trainer["gradient_clip_val"])
    num_epochs = max(1, round(num_epochs * variant.epochs))
    fit(make_trainer(settings, target, num_epochs, [EpochLines(name, print)]), module, data)
    seconds = time.process_time() - begin
    with new_folder(target / "encoder") as encoder:
        module.save_student(encoder)
    write_json(target / "result.json", {"cpu_seconds": seconds, "history": module.history})


def finetune(folder: Path, tasks: Sequence[LoadedTask], num_seeds: int, source: str) -> None:
    """Fine-tune the student in ``folder`` on each task, several times."""
    tokenizer = find_teacher(source).tokenizer
    for task in tasks:
        for seed in range(num_seeds):
            torch.manual_seed(seed)
            classifier = load_classifier(folder / "encoder", task.task.num_labels)
            evaluate_glue(
                classifier,
                tokenizer,
                task,
                FinetuneSettings(TASKS[task.task.name], weight_decay=0.01, seed=seed),
                folder=folder / f"{task.task.name}-{seed}",
                trainer_settings=TrainerSettings(),
                callbacks=[EpochLines(f"{folder.name} {task.task.name} {seed}", print)],
                keep_model=False,
            )


def show(folder: Path, seeds: Sequence[int], tasks: Sequence[str], path: Path) -> None:
    """A table of the variants that are done on every task, and its JSON."""
    rows: list[dict[str, Any]] = []
    for name, seed in product(VARIANTS, seeds):
        place = place_of(folder, name, seed)
        file = place / "result.json"
        scores = {
            task: [
                read_json(found)["score"] for found in sorted(place.glob(f"{task}-*/result.json"))
            ]
            for task in tasks
        }
        if file.exists() and all(scores.values()):
            result = read_json(file)
            last = result["history"][-1]
            rows.append(
                {
                    "name": name,
                    "kd_seed": seed,
                    **{key: last[key] for key in ("loss", "contextual_share", "sentence_r2")},
                    "cpu_seconds": result["cpu_seconds"],
                    "scores": scores,
                    "mean": statistics.mean(statistics.mean(found) for found in scores.values()),
                }
            )
    table = Table(
        "variant", "seed of KD", "loss", "context", "sentence R2", "CPU s", *tasks, "mean"
    )
    for row in rows:
        cells = [" / ".join(f"{score:.3f}" for score in row["scores"][task]) for task in tasks]
        comparable = VARIANTS[row["name"]].data.keys() <= SAME_ROWS
        figures = [
            f"{row[key]:.3f}" if comparable else ""
            for key in ("loss", "contextual_share", "sentence_r2")
        ]
        table.add_row(
            row["name"],
            str(row["kd_seed"]),
            *figures,
            f"{row['cpu_seconds']:.0f}",
            *cells,
            f"{row['mean']:.3f}",
        )
    Console(width=150).print(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"machine": machine(), "rows": rows})


def main(args: Sequence[str] | None = None) -> None:
    """Do what is missing, then show the table."""
    parser = options("variants", __doc__ or "")
    parser.add_argument(
        "--glue", type=Path, help="a folder of task folders in GLUE's layout (default: the hub's)"
    )
    parser.add_argument(
        "--folder", type=Path, default=OUTPUT / "variants", help="where the runs are kept"
    )
    parser.add_argument("--teacher", default=TEACHER, help="as of kdnas")
    parser.add_argument(
        "--shape", default="4x192", help="layers x width, or layers x width x intermediate size"
    )
    parser.add_argument("--epochs", type=int, default=3, help="of distillation")
    parser.add_argument("--seeds", type=int, default=2, help="of fine-tuning")
    parser.add_argument("--kd-seeds", type=int, nargs="*", default=[0], help="of distillation")
    parser.add_argument(
        "--only", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="these variants"
    )
    parser.add_argument(
        "--tasks", nargs="*", choices=TASKS, default=list(TASKS), help="these tasks"
    )
    arguments = parser.parse_args(args)
    names, task_names = arguments.only, arguments.tasks
    if arguments.quick:
        names, arguments.epochs, arguments.seeds, arguments.kd_seeds = ["fit", "dropout"], 1, 1, [0]
        arguments.folder = OUTPUT / "variants_quick"
    quieten()
    source = arguments.teacher
    arguments.folder /= f"{Path(source).name}-{arguments.shape}-{arguments.epochs}_epochs"
    arguments.folder.mkdir(parents=True, exist_ok=True)
    text = cut_text(arguments.text, arguments.folder, most=600 if arguments.quick else None)
    tasks = [
        some_rows(
            load_task(str(arguments.glue / name) if arguments.glue else name), MOST_ROWS
        ).for_choosing(HELD_OUT)
        for name in (["sst2"] if arguments.quick else task_names)
    ]
    if arguments.quick:
        tasks = [some_rows(task, 600) for task in tasks]
    config = find_teacher(source).config
    arch = shape_of(arguments.shape, config)
    for seed, name in product(arguments.kd_seeds, names):
        distil(name, seed, text, arguments.epochs, arguments.folder, source, arch)
        finetune(place_of(arguments.folder, name, seed), tasks, arguments.seeds, source)
    show(arguments.folder, arguments.kd_seeds, [task.task.name for task in tasks], arguments.json)


if __name__ == "__main__":
    main()
