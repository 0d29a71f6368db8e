"""What distillation from a text larger than memory takes: peak memory, and seconds until the first step.

    python benchmarks/text.py [--quick] [--json PATH] [--text PATH] [--gb 2]

Writes a parquet file of so many GB of real rows, repeated in random order. Each ends with a number of its own, so that
none is a duplicate. Then ``kdnas fit`` with the live teacher reads it, in a process of its own: once when nothing is
there, and once when the text is tokenised. Memory is the peak of what was resident, mapped files counted (VmHWM).
Where other work runs beside it, the seconds of CPU are what to compare.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import lightning.pytorch as pl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from kdnas.data.corpus import load_corpus
from kdnas.data.quickstart import build_quickstart_text
from kdnas.system.files import write_json

NUM_STEPS = 5
RUNS = ("first", "tokenised")
ROWS_AT_A_TIME = 20_000


class Watch(pl.Callback):
    """Writes down when the first step was done, and the peak of the memory at the end.

    Args:
        path: of the JSON file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.found: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.found.setdefault("first_step", time.time())
        self.found.setdefault("first_step_cpu_seconds", time.process_time())

    def on_train_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        rows = trainer.datamodule.rows
        peak = next(
            line
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )
        self.found |= {
            "peak_bytes": 1024 * int(peak.split()[1]),
            "num_steps": trainer.global_step,
            "num_rows": len(rows),
            "num_tokens": int(rows.lengths.sum()),
            "dropped": rows.dropped,
        }
        write_json(self.path, self.found)


def write_text(path: Path, rows: Sequence[str], num_bytes: float) -> None:
    """Write so many bytes of rows, repeated in random order, each with a number at its end; uncompressed."""
    generator, number, size = np.random.default_rng(0), 0, 0
    with pq.ParquetWriter(
        path, pa.schema({"text": pa.string()}), compression="none", use_dictionary=False
    ) as writer:
        while size < num_bytes:
            chosen = generator.integers(len(rows), size=ROWS_AT_A_TIME)
            texts = [f"{rows[place]} {number + i}" for i, place in enumerate(chosen)]
            number, size = number + len(texts), size + sum(len(text.encode()) for text in texts)
            writer.write_table(pa.table({"text": texts}))


def measure(text: Path, folder: Path) -> dict[str, Any]:
    """A few steps of ``kdnas fit`` on a text, with the live teacher, in a process of its own.

    Args:
        text: to distil from.
        folder: for the tokens, the statistics and the logs.
    """
    values = {
        "model.teacher": common.TEACHER,
        "model.states.max_gb": 0,
        "model.states.folder": folder / "states",
        "data.text": text,
        "data.folder": folder / "tokens",
        "trainer.accelerator": "cpu",
        "trainer.max_steps": NUM_STEPS,
        "trainer.default_root_dir": folder,
        "trainer.enable_progress_bar": False,
        "trainer.callbacks": "text.Watch",
        "trainer.callbacks.path": (result := folder / "watch.json"),
    }
    command = [
        sys.executable,
        "-m",
        "kdnas",
        "fit",
        "--config",
        str(common.ROOT / "configs" / "fit.yaml"),
    ]
    command += [f"--{name}={value}" for name, value in values.items()]
    paths = os.pathsep.join([str(common.ROOT), str(Path(__file__).parent)])
    begin = time.time()
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": paths})
    found: dict[str, Any] = json.loads(result.read_text())
    return found | {"first_step_seconds": found.pop("first_step") - begin}


def main(args: Sequence[str] | None = None) -> None:
    """Measure, show and write."""
    parser = common.options("text", "Times and weighs distillation from a text larger than memory.")
    parser.add_argument("--gb", type=float, default=2.0, help="of text")
    chosen = parser.parse_args(args)
    if chosen.quick:
        chosen.gb = 0.02
    common.OUTPUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=common.OUTPUT) as name:
        folder = Path(name)
        rows = load_corpus(chosen.text or str(build_quickstart_text(common.OUTPUT / "text"))).train
        write_text(text := folder / "rows.parquet", list(rows), chosen.gb * 1e9)
        results = {"machine": common.machine(), "parquet_bytes": text.stat().st_size}
        results |= {run: measure(text, folder) for run in RUNS}
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(chosen.json, results)
    found = results[RUNS[0]]
    title = f"{results['parquet_bytes'] / 1e9:.2f} GB: {found['num_rows']:,} rows, {found['num_tokens']:,} tokens"
    table = Table("", "seconds until the first step", "of CPU", "peak memory, GB", title=title)
    for run in RUNS:
        seconds, cpu_seconds = (
            results[run][f"first_step_{name}"] for name in ("seconds", "cpu_seconds")
        )
        table.add_row(
            run, f"{seconds:.1f}", f"{cpu_seconds:.1f}", f"{results[run]['peak_bytes'] / 1e9:.2f}"
        )
    Console().print(table, f"Figures: {chosen.json}")


if __name__ == "__main__":
    main()
