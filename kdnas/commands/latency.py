"""``kdnas latency``: compare models by backend, batch size, length and number of threads."""

import logging
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import nn

from kdnas import __version__
from kdnas.commands.config import LatencyConfig
from kdnas.deploy.latency import (
    BUSY,
    ON_ONNX,
    LatencySettings,
    check_length,
    is_unsteady,
    measure_latency,
)
from kdnas.deploy.onnx import INT8, ONNX, write_deployed
from kdnas.models.encoders import Teacher, build_classifier, find_teacher, num_parameters
from kdnas.report.tables import show, text_table
from kdnas.system.errors import UserError
from kdnas.system.files import check_writable, new_file, short_names, temporary_folder, write_json
from kdnas.system.manifest import version
from kdnas.training.precision import gpu_name

log = logging.getLogger(__name__)


def latency_table(config: LatencyConfig, console: Console | None = None) -> list[dict[str, Any]]:
    """Measure models, show a table of their latencies, and write a JSON file and a picture.

    Every model is measured with every combination of backend, device, threads, batch size and
    length.

    Args:
        config: options of ``kdnas latency``.
        console: where to print; None: the terminal.

    Returns:
        The rows of the JSON file, one for each model and combination, with the columns of
        ``LatencyResult.table``. ``length`` is None if lengths come from a file.

    Raises:
        UserError: an option or a model cannot be used, or the files cannot be written.
        HubAway: the Hugging Face hub does not answer.
    """
    combinations, path = config.settings(), Path(config.json)
    picture = _picture(config.json)
    models = [find_teacher(name) for name in config.model]
    for settings in combinations:
        for model in models:
            check_length(model.config, settings)

    rows: list[dict[str, Any]] = []
    with temporary_folder() as name:
        deployed: dict[str, list[nn.Module | Path]] = {}
        for settings in combinations:
            backend = settings.backend
            if backend not in deployed:
                deployed[backend] = [
                    _deploy(model, Path(name) / backend / str(place), backend)
                    for place, model in enumerate(models)
                ]
            rows += _measured(models, deployed[backend], settings)

    console = console or Console(markup=False)
    console.width = max(console.width, 120)  # ten columns do not fold well
    console.print(_table(rows))
    write_json(path, {"machine": _machine(), "lengths": config.lengths, "rows": rows})
    with new_file(picture) as temporary:
        _draw(rows).savefig(temporary, format="png", dpi=120, bbox_inches="tight")
    if any(is_unsteady(row["median_ms"], row["iqr_ms"]) for row in rows):
        log.warning(BUSY)
    show(console, f"Figures: {path}, {picture}")
    return rows


def _picture(json: str) -> Path:
    """Return the path of the picture beside a JSON file; check that both can be written."""
    path = Path(json)
    picture = path.with_suffix(".png") if path.name else path
    if path == picture or path.is_dir() or picture.is_dir():
        raise UserError(
            f"json is {json!r}, which is a folder or a .png file: give a file that ends with .json."
        )
    check_writable(path.parent, "--json")
    return picture


def _measured(
    models: Sequence[Teacher], deployed: Sequence[nn.Module | Path], settings: LatencySettings
) -> list[dict[str, Any]]:
    """Measure every model with one combination of settings.

    Args:
        models: the models.
        deployed: what the backend runs for each model, from ``_deploy``, in the order of
            ``models``.
        settings: the combination of backend, device, threads, batch size and length.

    Returns:
        A row of the JSON file for each model.
    """
    latencies = measure_latency(deployed, settings)
    return [
        {
            "model": model.name,
            "backend": settings.backend,
            "device": settings.device,
            "threads": settings.num_threads,
            "batch": len(settings.batches()[0]),  # a file of lengths may have fewer rows
            "length": None if settings.lengths else settings.length,
            "megabytes": _megabytes(one, settings),
            **asdict(latency),
            "speedup": latencies[0].median_ms / latency.median_ms,
        }
        for model, one, latency in zip(models, deployed, latencies, strict=True)
    ]


def _deploy(model: Teacher, folder: Path, backend: str) -> nn.Module | Path:
    """Return what a backend measures for a model: a torch model or an ONNX file.

    If ``model`` is an exported folder, an ONNX backend measures the folder's ONNX file. Otherwise,
    a model of the same shape with random weights is built; for an ONNX backend it is written to
    ``folder``.
    """
    int8 = backend == "onnxruntime-int8"
    exported = Path(model.source) / (INT8 if int8 else ONNX)
    if backend in ON_ONNX and exported.is_file():
        return exported
    with torch.random.fork_rng(devices=[]):
        module = build_classifier(model.config).eval()
    return write_deployed(module, folder, int8) if backend in ON_ONNX else module


def _megabytes(deployed: nn.Module | Path, settings: LatencySettings) -> float:
    if isinstance(deployed, Path):
        return deployed.stat().st_size / 1e6
    return num_parameters(deployed) * (2 if settings.backend == "torch-bf16" else 4) / 1e6


def _machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "gpu": gpu_name(),
        "torch": torch.__version__,
        "onnxruntime": version("onnxruntime"),
        "kdnas": __version__,
    }


def _shape(row: dict[str, Any]) -> str:
    return f"{row['batch']} x {row['length'] or 'workload'}"


def _backend(row: dict[str, Any]) -> str:
    """Return the backend's name in a row; the device is added if the name does not tell it."""
    backend, device = row["backend"], row["device"]
    return backend if device in ("cpu", backend) else f"{backend}, {device}"


def _names(rows: list[dict[str, Any]]) -> dict[str, str]:
    models = list(dict.fromkeys(row["model"] for row in rows))
    return dict(zip(models, short_names(models), strict=True))


def _table(rows: list[dict[str, Any]]) -> Table:
    names = _names(rows)
    lines = [
        {
            "model": names[row["model"]],
            "backend": _backend(row),
            "threads": str(row["threads"]),
            "batch": _shape(row),
            "MB": f"{row['megabytes']:.1f}",
            "median (IQR), ms": f"{row['median_ms']:.2f} ({row['iqr_ms']:.2f})",
            "p95, ms": f"{row['p95_ms']:.2f}",
            "tokens/s": f"{row['tokens_per_second']:,.0f}",
            "rows/s": f"{row['sequences_per_second']:,.1f}",
            "speed-up": f"{row['speedup']:.2f}x",
        }
        for row in rows
    ]
    return text_table("", lines, words=["model", "backend"])


def _draw(rows: list[dict[str, Any]]) -> Figure:
    """Plot medians, with their IQR, over batch x length: a curve per model, backend and threads."""
    shapes, names = list(dict.fromkeys(map(_shape, rows))), _names(rows)
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
        label = f"{names[row['model']]}, {_backend(row)}, {threads}"
        lines.setdefault(label, []).append(row)

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for label, line in lines.items():
        places = [shapes.index(_shape(row)) for row in line]
        medians = [row["median_ms"] for row in line]
        spread = [row["iqr_ms"] / 2 for row in line]
        axes.errorbar(places, medians, spread, marker="o", capsize=3, label=label)
    axes.set(xlabel="batch x length", ylabel="median, ms", yscale="log")
    axes.set_xticks(range(len(shapes)), shapes)
    largest = max(row["median_ms"] for row in rows)
    axes.set_ylim(top=10 ** math.ceil(math.log10(largest)))
    axes.legend(fontsize=7)
    return figure
