"""What a deployed student brings: size, latency and score, by backend, beside its teacher on the same backends.

A 4 x 192 student of all-MiniLM-L6-v2 is distilled by configs/fit.yaml (or taken from ``--student``), it and its teacher are
fine-tuned on SST-2 (6,000 training rows) and STS-B and exported. Latency is that of batch 1 x 50 on one thread, all
variants in turn over several rounds. Scores are of the official validation rows; the int8 graph is chosen on training
rows. The JSON has ``int8_speedup`` (the student in int8 over the teacher in float32 torch, the lower of the tasks'),
``int8_points_lost`` (100 times the student's float32 score minus its int8 score, the larger of the tasks') and
``export_seconds`` (of the student, the longer of the tasks').

    python benchmarks/deploy.py --text train.parquet --glue glue
"""

import copy
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from common import OUTPUT, TEACHER, cut_text, machine, options, quieten  # isort: skip (before torch)

import matplotlib.pyplot as plt
import numpy as np
import torch
from quality import MOST_TRAIN_ROWS, SHAPES, distil, some_rows
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from kdnas.commands.export import rows_of_task
from kdnas.deploy.export import export_student, load_student
from kdnas.deploy.latency import LatencySettings, measure_latency
from kdnas.deploy.onnx import INT8, ONNX, Feed
from kdnas.deploy.quantize import outputs, score
from kdnas.models.encoders import find_teacher, load_classifier
from kdnas.system.files import write_json
from kdnas.tasks.finetune import FinetuneSettings, evaluate_glue
from kdnas.tasks.tasks import LoadedTask, load_task
from kdnas.training.progress import EpochLines
from kdnas.training.trainer import TrainerSettings

TASKS = ("sst2", "stsb")
SHAPE = "4x192"
LENGTH = 50
NUM_ROUNDS = 5
VARIANTS = ("torch fp32", "torch bf16", "ONNX fp32", "ONNX int8")


@torch.inference_mode()
def torch_outputs(model: PreTrainedModel, batches: Sequence[Feed]) -> list[np.ndarray]:
    """A classifier's logits in float32."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    return [
        model(**{n: torch.from_numpy(batch[n]) for n in names if n in batch}).logits.float().numpy()
        for batch in batches
    ]


def deployed(folder: Path) -> dict[str, tuple[Any, LatencySettings, Path]]:
    """What runs, how, and the file that is on the disk, of each variant of an export."""
    model, _ = load_student(folder)
    how = {
        name: LatencySettings(name, length=LENGTH)
        for name in ("torch", "torch-bf16", "onnxruntime")
    }
    weights = folder / "model.safetensors"
    return {
        "torch fp32": (model, how["torch"], weights),
        "torch bf16": (model, how["torch-bf16"], weights),
        "ONNX fp32": (folder / ONNX, how["onnxruntime"], folder / ONNX),
        "ONNX int8": (folder / INT8, how["onnxruntime"], folder / INT8),
    }


def finetuned(role: str, source: str, task: LoadedTask, folder: Path) -> Path:
    """A classifier of the task, in a folder; made unless it is there."""
    torch.manual_seed(0)
    name = f"{role} {task.task.name}"
    evaluate_glue(
        load_classifier(source, task.task.num_labels),
        find_teacher(TEACHER).tokenizer,
        task,
        FinetuneSettings(3, weight_decay=0.01),
        folder=folder,
        trainer_settings=TrainerSettings(),
        callbacks=[EpochLines(name, print)],
    )
    return folder / "model"


def cut_task(task: LoadedTask, most: int) -> LoadedTask:
    """The task with at most so many rows of each split."""
    cut = {
        split: {name: column[:most] for name, column in rows.items()}
        for split, rows in task.validations.items()
    }
    return dataclasses.replace(some_rows(task, most), validations=cut)


def measure(task: LoadedTask, exports: dict[str, Path], num_rounds: int) -> list[dict[str, Any]]:
    """A row for each model and variant: megabytes, latency and score."""
    runs = {role: deployed(folder) for role, folder in exports.items()}
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(num_rounds):
        for variant in VARIANTS:
            models = [runs[role][variant][0] for role in runs]
            for role, latency in zip(
                runs, measure_latency(models, runs["teacher"][variant][1]), strict=True
            ):
                times.setdefault((role, variant), []).append(latency.median_ms)
    rows = []
    for role, variants in runs.items():
        model, tokenizer = load_student(exports[role])
        batches = rows_of_task(task, 128)(tokenizer).report
        for variant, (what, _, file) in variants.items():
            if variant.startswith("torch"):
                dtype = torch.bfloat16 if variant.endswith("bf16") else torch.float32
                found = torch_outputs(copy.deepcopy(model).to(dtype), batches)
            else:
                found = outputs(what, batches)
            megabytes = file.stat().st_size / 1e6 / (2 if variant.endswith("bf16") else 1)
            row = {
                "task": task.task.name,
                "model": role,
                "variant": variant,
                "megabytes": megabytes,
            }
            row |= {
                "latency_ms": statistics.median(times[role, variant]),
                "score": score(task.task, found, batches),
            }
            rows.append(row)
    base = rows[0]["latency_ms"]  # the teacher in float32 torch
    return [row | {"speedup": base / row["latency_ms"]} for row in rows]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The two figures with a target, the worse of the tasks'."""
    student = {(row["task"], row["variant"]): row for row in rows if row["model"] == "student"}
    tasks = {task for task, _ in student}
    return {
        "int8_speedup": min(student[task, "ONNX int8"]["speedup"] for task in tasks),
        "int8_points_lost": max(
            100 * (student[task, "torch fp32"]["score"] - student[task, "ONNX int8"]["score"])
            for task in tasks
        ),
    }


def main(args: Sequence[str] | None = None) -> None:
    """Make what is missing, measure and show."""
    parser = options("deploy", __doc__ or "")
    parser.add_argument(
        "--glue", type=Path, help="a folder of task folders in GLUE's layout (default: the hub's)"
    )
    parser.add_argument(
        "--folder", type=Path, default=OUTPUT / "deploy", help="where the models are kept"
    )
    parser.add_argument("--student", help="a distilled encoder, instead of distilling one")
    parser.add_argument("--epochs", type=int, default=6, help="of the distillation")
    arguments = parser.parse_args(args)
    names = TASKS
    if arguments.quick:
        names, arguments.epochs, arguments.folder = TASKS[1:], 1, OUTPUT / "deploy_quick"
    quieten()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    tasks = [load_task(str(arguments.glue / name) if arguments.glue else name) for name in names]
    tasks = [
        cut_task(task, 200) if arguments.quick else some_rows(task, MOST_TRAIN_ROWS)
        for task in tasks
    ]
    rows: list[dict[str, Any]] = []
    export_seconds: dict[str, float] = {}
    student = arguments.student
    if student is None:
        text = cut_text(arguments.text, arguments.folder, most=200 if arguments.quick else None)
        distil(
            SHAPES[SHAPE], "fit", arguments.epochs, text, arguments.folder / "student", "full", 0
        )
        student = str(arguments.folder / "student" / "encoder")
    sources = {"teacher": find_teacher(TEACHER).source, "student": student}
    for task in tasks:
        exports = {}
        for role, source in sources.items():
            place = arguments.folder / f"{role}-{task.task.name}"
            model = finetuned(role, source, task, place)
            exports[role] = place / "export"
            card = {"name": f"{role}-{task.task.name}", "teacher": TEACHER, "sections": {}}
            begin = perf_counter()
            export_student(model, exports[role], card=card, make_rows=rows_of_task(task, 128))
            export_seconds[role] = max(export_seconds.get(role, 0), perf_counter() - begin)
        rows += measure(task, exports, 1 if arguments.quick else NUM_ROUNDS)
    table = Table("task", "model", "variant", "MB", "ms", "speed-up", "score")
    for row in rows:
        cells = [
            f"{row['megabytes']:.1f}",
            f"{row['latency_ms']:.2f}",
            f"{row['speedup']:.1f}x",
            f"{row['score']:.3f}",
        ]
        table.add_row(row["task"], row["model"], row["variant"], *cells)
    Console().print(table)
    found = summary(rows) | {"export_seconds": export_seconds["student"]}
    Console().print(found)
    write_json(arguments.json, {"machine": machine(), **found, "length": LENGTH, "rows": rows})
    figure, axes = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 4), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for role, colour in (("teacher", "tab:blue"), ("student", "tab:orange")):
            line = [row for row in rows if row["task"] == task.task.name and row["model"] == role]
            points = [row["latency_ms"] for row in line], [row["score"] for row in line]
            axis.plot(*points, "o-", color=colour, label=role)
            for row in line:
                axis.annotate(row["variant"], (row["latency_ms"], row["score"]), fontsize=7)
        axis.set(
            title=task.task.name,
            xlabel=f"ms, batch 1 x {LENGTH}, 1 thread",
            ylabel="score",
            xscale="log",
        )
        axis.legend()
    figure.savefig(arguments.json.with_suffix(".png"), dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
