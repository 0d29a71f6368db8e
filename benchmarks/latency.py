"""Whether the latency that a search sees is that of the files which are deployed.

For students spread over the space: the ratio of student to teacher as a search measures it (``LatencyMeter``), against
the ratio that a separate process measures on the exported files, with torch, transformers, onnxruntime and a clock.
``median_ratio_error`` is the median of |searched / exported - 1| over students and backends; ``by_backend`` has
it for each. The picture has one ratio over the other.

    python benchmarks/latency.py
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import TEACHER, machine, options, quieten  # isort: skip (before torch)

import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from kdnas.deploy.export import export_student
from kdnas.deploy.latency import LatencyMeter, LatencySettings
from kdnas.models.encoders import build_classifier, find_teacher, student_config
from kdnas.nas.space import SearchSpace
from kdnas.system.files import write_json

BACKENDS = ("torch", "torch-bf16", "onnxruntime", "onnxruntime-int8")
NUM_STUDENTS = 10
LENGTH = 50
NUM_ROUNDS = 9


def export(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """The files of a shape, as ``kdnas export`` writes them; latency does not depend on weights: they are random."""
    torch.manual_seed(0)
    source = folder.with_name(f"{folder.name}-source")
    build_classifier(config).save_pretrained(source)
    tokenizer.save_pretrained(source)
    export_student(
        source,
        folder,
        card={"name": folder.name, "teacher": TEACHER, "sections": {}},
        min_seconds=0.01,
    )
    return folder


def run_of(folder: Path, backend: str) -> Callable[[], Any]:
    """One pass of an exported folder; no code of kdnas."""
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    ids = np.random.default_rng(1).integers(vocab_size, size=(1, LENGTH))
    batch = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }
    if backend.startswith("torch"):
        dtype = torch.bfloat16 if backend.endswith("bf16") else torch.float32
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
        tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
        return lambda: model(**tensors)
    import onnxruntime

    sessions = onnxruntime.SessionOptions()
    sessions.intra_op_num_threads = sessions.inter_op_num_threads = 1
    file = folder / ("model.int8.onnx" if backend.endswith("int8") else "model.onnx")
    session = onnxruntime.InferenceSession(file, sessions)
    names = {node.name for node in session.get_inputs()}
    return lambda: session.run(
        None, {name: value for name, value in batch.items() if name in names}
    )


@torch.inference_mode()
def ratio_of_files(student: Path, teacher: Path, backend: str, seconds: float) -> float:
    """Student's median over teacher's, the two in turn."""
    torch.set_num_threads(1)
    runs = run_of(student, backend), run_of(teacher, backend)
    times: tuple[list[float], list[float]] = ([], [])
    for place in range(NUM_ROUNDS + 1):
        for run, found in zip(runs, times, strict=True):
            run()
            end = time.perf_counter() + seconds / NUM_ROUNDS
            while time.perf_counter() < end or not found:
                begin = time.perf_counter()
                run()
                found.append(time.perf_counter() - begin)
            if place == 0:
                found.clear()  # a warm-up
    return statistics.median(times[0]) / statistics.median(times[1])


def median_error(rows: Sequence[dict[str, Any]]) -> float:
    """The median of |searched / exported - 1|."""
    return statistics.median(abs(row["searched"] / row["exported"] - 1) for row in rows)


def main(args: Sequence[str] | None = None) -> None:
    """Measure both, and compare."""
    parser = options("latency", __doc__ or "")
    parser.add_argument(
        "--files",
        nargs=3,
        help="measure exported files: student, teacher, backend; print the ratio",
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement, a model")
    arguments = parser.parse_args(args)
    if arguments.files:
        student, teacher_folder, backend = arguments.files
        print(
            json.dumps(
                ratio_of_files(Path(student), Path(teacher_folder), backend, arguments.seconds)
            )
        )
        return
    quieten()
    backends, num_students = BACKENDS, NUM_STUDENTS
    if arguments.quick:
        backends, num_students, arguments.seconds = ("torch", "onnxruntime-int8"), 1, 0.3
    teacher = find_teacher(TEACHER)
    space = sorted(
        SearchSpace.from_teacher(teacher.config), key=lambda arch: tuple(arch.to_dict().values())
    )
    archs = [space[i] for i in np.linspace(0, len(space) - 1, num_students).astype(int)]
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as name:
        exported = export(teacher.config, teacher.tokenizer, Path(name) / "teacher")
        folders = [
            export(
                student_config(teacher.config, arch),
                teacher.tokenizer,
                Path(name) / f"student-{place}",
            )
            for place, arch in enumerate(track(archs, "export"))
        ]
        for backend in backends:
            settings = LatencySettings(backend, length=LENGTH, min_seconds=arguments.seconds)
            meter = LatencyMeter(teacher.config, settings)
            for arch, folder in zip(track(archs, backend), folders, strict=True):
                searched = 1 / meter.measure(arch).speedup
                command = [
                    sys.executable,
                    __file__,
                    f"--seconds={arguments.seconds}",
                    "--files",
                    str(folder),
                ]
                done = subprocess.run(
                    [*command, str(exported), backend], capture_output=True, text=True, check=True
                ).stdout
                ratio = json.loads(done.splitlines()[-1])
                rows.append(
                    {
                        "backend": backend,
                        "arch": arch.to_dict(),
                        "searched": searched,
                        "exported": ratio,
                    }
                )
    by_backend = {
        name: median_error([row for row in rows if row["backend"] == name]) for name in backends
    }
    table = Table("backend", "students", "median of |searched / exported - 1|")
    for name, error in by_backend.items():
        table.add_row(name, str(len(archs)), f"{error:.3f}")
    table.add_row("all", "", f"{median_error(rows):.3f}")
    Console().print(table)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    result = {"median_ratio_error": median_error(rows), "by_backend": by_backend, "length": LENGTH}
    write_json(arguments.json, {"machine": machine(), **result, "rows": rows})
    figure, axes = plt.subplots(figsize=(5, 5))
    for name in backends:
        found = [(row["exported"], row["searched"]) for row in rows if row["backend"] == name]
        axes.plot(*zip(*found, strict=True), "o", label=name)
    axes.axline((0.1, 0.1), slope=1, color="grey", linewidth=1)
    axes.set(
        xlabel="student / teacher, exported files",
        ylabel="student / teacher, as the search sees it",
    )
    axes.legend()
    figure.savefig(arguments.json.with_suffix(".png"), dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
