"""Where a candidate's seconds go: its latency, its start from the teacher, training, and what is around all that.

    python benchmarks/overhead.py [--quick] [--json PATH] [--text PATH]

A search with configs/search.yaml's settings and random proposals, in this process; clocks around the product's own
functions. ``training`` is Lightning's fit loop, held-out loss included. ``Trainer and process`` is all the rest of a
candidate: making the module and the Trainer, loaders, loggers, weights on the disk. Target: below 10 % of
training.
"""

import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from common import OUTPUT, TEACHER, machine, options, quieten  # isort: skip (before torch)

import optuna
from lightning.pytorch.loops.fit_loop import _FitLoop
from rich.console import Console
from rich.table import Table

from kdnas import search
from kdnas.commands import jobs
from kdnas.deploy.latency import LatencyMeter
from kdnas.distillation.module import HiddenStateDistillModule
from kdnas.models.arch import StudentArch
from kdnas.nas.trials import Outcome
from kdnas.system.files import write_json

PARTS = {
    "latency": (LatencyMeter, "measure"),
    "start": (HiddenStateDistillModule, "begin"),
    "training": (_FitLoop, "run"),
}


class Clocks:
    """Seconds of each part of each trained candidate; those that are refused are not counted."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = defaultdict(float)

    def part(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed as a part of the candidate that runs."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - begin

        return timed

    def candidate(self, evaluate: Callable[..., Outcome]) -> Callable[..., Outcome]:
        """The evaluation of a candidate, timed; a row is written when it is trained."""

        def timed(bench: Any, arch: StudentArch, folder: Path) -> Outcome:
            self.seconds.clear()
            begin = time.perf_counter()
            outcome = evaluate(bench, arch, folder)
            whole = time.perf_counter() - begin
            if outcome.state == "COMPLETE":
                rest = {"Trainer and process": whole - sum(self.seconds.values())}
                self.rows.append({"arch": str(arch), "whole": whole} | self.seconds | rest)
            return outcome

        return timed


def main(args: Sequence[str] | None = None) -> None:
    """Search with clocks, and show them."""
    parser = options("overhead", __doc__ or "")
    parser.add_argument("--candidates", type=int, default=5, help="to train")
    chosen = parser.parse_args(args)
    if chosen.quick:
        chosen.candidates = 2
    quieten()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # each trial has a line of ours
    root, clocks = OUTPUT / "overhead", Clocks()
    shutil.rmtree(root / "search", ignore_errors=True)  # states and text are kept
    with ExitStack() as patches:
        for name, (owner, method) in PARTS.items():
            patches.enter_context(
                patch.object(owner, method, clocks.part(name, getattr(owner, method)))
            )
        patches.enter_context(patch.object(jobs, "evaluate", clocks.candidate(jobs.evaluate)))
        search(
            TEACHER, chosen.text or "quickstart", speedup=4.0, n_trials=chosen.candidates, sampler="random",
            name="search", root=str(root),
        )  # fmt: skip
    names = [*PARTS, "Trainer and process"]
    table = Table("student", "whole (s)", *names, "of training")
    rows = clocks.rows
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in ("whole", *names)}
    for row in [*rows, {"arch": "mean"} | mean]:
        row["overhead"] = row["Trainer and process"] / row["training"]
        table.add_row(
            row["arch"],
            *(f"{row[name]:.2f}" for name in ("whole", *names)),
            f"{row['overhead']:.1%}",
        )
    Console(width=140).print(table)
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(chosen.json, {"machine": machine(), "rows": rows, "mean": mean})


if __name__ == "__main__":
    main()
