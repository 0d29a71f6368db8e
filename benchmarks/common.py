"""What the benchmarks share: options, text, configs, machine. Import it before torch: it sets the environment."""

import os

from kdnas.cli.main import set_environment

set_environment()

import argparse
import logging
import platform
import shutil
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from jsonargparse import ArgumentParser
from transformers.utils import logging as transformers_logging

from kdnas import __version__
from kdnas.data.corpus import load_corpus
from kdnas.data.datamodule import DataSettings
from kdnas.data.quickstart import build_quickstart_text
from kdnas.distillation.module import Recipe
from kdnas.models.arch import StudentArch
from kdnas.system.files import new_file

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "lightning_logs" / "benchmarks"
TEACHER = "quickstart"


@dataclass(frozen=True)
class FitConfig:
    """What a file of configs/ for ``kdnas fit`` asks for; of the Trainer, its own arguments."""

    arch: StudentArch
    recipe: Recipe
    data: DataSettings
    trainer: dict[str, Any]


def read_config(name: str) -> FitConfig:
    """Read ``configs/<name>.yaml`` with the parser that ``kdnas fit`` reads it with."""
    values = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    parser = ArgumentParser()
    for key, kind in (("arch", StudentArch), ("recipe", Recipe), ("data", DataSettings)):
        parser.add_argument(f"--{key}", type=kind)
    model, data = values["model"], values["data"]
    parsed = parser.parse_object(
        {
            "arch": model["arch"],
            "recipe": model.get("recipe", {}),
            "data": {name: data[name] for name in data.keys() - {"text", "split"}},
        }
    )
    found = parser.instantiate(parsed)
    return FitConfig(found.arch, found.recipe, found.data, values["trainer"])


def options(name: str, description: str, text: bool = True) -> argparse.ArgumentParser:
    """The options that every benchmark has; ``--text`` where there is text to train on."""
    parser = argparse.ArgumentParser(
        prog=f"{name}.py",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="a small part of it, in about 50 s on two cores"
    )
    parser.add_argument(
        "--json", type=Path, default=OUTPUT / f"{name}.json", help="where the figures go"
    )
    if text:
        parser.add_argument(
            "--text", help="rows to train on, as for --text of kdnas (default: quickstart's)"
        )
    return parser


def cut_text(text: str | None, folder: Path, *, share: float = 1.0, most: int | None = None) -> str:
    """Write a part of a text, with its own held-out rows, and give its path.

    Args:
        text: as of ``options``; None: the quickstart's.
        folder: where to write.
        share: of the training rows, drawn at random; the same rows each time.
        most: at most so many training rows, and an eighth of that held out.
    """
    corpus = load_corpus(text or str(build_quickstart_text(OUTPUT / "text")))
    num_rows = min(max(1, round(share * len(corpus.train))), most or len(corpus.train))
    chosen = np.sort(np.random.default_rng(0).permutation(len(corpus.train))[:num_rows])
    train = [corpus.train[i] for i in chosen]
    held_out = corpus.held_out[: max(1, most // 8) if most else None]
    split = ["train"] * len(train) + ["held_out"] * len(held_out)
    path = folder / "rows.parquet"
    with new_file(path) as file:  # another part of the benchmark may be reading it
        pq.write_table(pa.table({"text": train + held_out, "split": split}), file)
    return str(path)


def machine() -> dict[str, Any]:
    """What a figure was measured on."""
    names = [line.split(":", 1)[1].strip() for line in _cpu_info() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "kdnas": __version__,
        "commit": _commit(),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
    }


def _commit() -> str | None:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    done = (
        subprocess.run(git, capture_output=True, text=True, check=False)
        if shutil.which("git")
        else None
    )
    return done.stdout.strip() or None if done else None


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def quieten() -> None:
    """Keep the libraries' chatter off the screen."""
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
