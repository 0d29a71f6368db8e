"""What kdnas survives: faults that are made on purpose, one a row, and a checker after each.

A row counts what was tried, and what went wrong: results that are ``lost`` or altered, candidates
that are ``duplicated`` or work that is done again, payloads ``executed``, faults ``undetected``
(taken without a word, told with a traceback, or half made), ``zombies`` (processes, locks, trials
or temporary files that are left), and searches that end ``unequal`` to an unbroken one. All should
be 0. ``worst_wait_s`` is the longest wait.

    python -m tests.faults                       the quick rows, without servers and many kills
    python -m tests.faults --whole               all rows, each as often as its promise asks
    python -m tests.faults --only F01,F13        some rows; with --whole as often as there
    python -m tests.faults --soak 120            two workers for two hours: what grows?
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import OUTPUT, machine  # isort: skip (before torch)

import optuna
from rich.console import Console
from rich.table import Table

from kdnas.system.files import write_json
from tests.faults import (  # noqa: F401 (each fills the table of faults)
    candidates,
    disks,
    hostile,
    inputs,
    kills,
    processes,
    signals,
    states,
    store,
)
from tests.faults.harness import FAULTS, Bench, NotRun, Row
from tests.faults.soak import soak

COUNTS = "tried lost duplicated executed undetected zombies unequal worst_wait_s".split()


def main(args: Sequence[str] | None = None) -> int:
    """Make faults, print a table, and write JSON after each; the exit code is 1 where one is bad."""
    options = parse(args)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell has background jobs ignore it
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows: list[Row] = []
    figures = {"seed": options.seed, "quick": not options.whole, "machine": machine()}
    begun = time.monotonic()

    def write() -> None:
        seconds = {"seconds": time.monotonic() - begun}
        write_json(options.json, figures | seconds | {"rows": [asdict(row) for row in rows]})

    with tempfile.TemporaryDirectory(prefix="kdnas-faults-") as folder, chdir(folder):
        bench = Bench(Path(folder), not options.whole, options.seed)
        os.chdir(bench.home)  # where a path that is relative by mistake is seen
        if options.soak:
            rows.append(Row("soak", f"two workers for {options.soak:g} minutes"))
            figures |= soak(bench, rows[0], options.soak)
        for name in options.only:
            rows.append(make(name, bench))
            write()
            state = "BAD" if rows[-1].is_bad() else rows[-1].not_run or "ok"
            print(f"{name}: {state}, {rows[-1].seconds:.0f} s", flush=True)
    show(rows, f"seed {options.seed}, {time.monotonic() - begun:.0f} s")
    write()
    return int(any(row.is_bad() for row in rows))


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tests.faults", description="Faults made on purpose."
    )
    parser.add_argument(
        "--whole", action="store_true", help="all rows, with the counts of the plan"
    )
    parser.add_argument("--only", default="", help="ids of rows, separated by commas")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="two workers, with kills")
    parser.add_argument("--seed", type=int, default=0, help="of the instants of faults")
    parser.add_argument("--json", type=Path, default=OUTPUT / "faults.json", help="the figures")
    options = parser.parse_args(args)
    options.json = options.json.resolve()
    wanted = [name for name in options.only.split(",") if name]
    if unknown := sorted(set(wanted) - FAULTS.keys()):
        there = ", ".join(sorted(FAULTS))
        parser.error(f"no such fault: {', '.join(unknown)}; choose from {there}")
    every = [name for name, known in sorted(FAULTS.items()) if options.whole or known.is_quick]
    options.only = wanted or ([] if options.soak else every)
    return options


def make(name: str, bench: Bench) -> Row:
    """Make one row's faults."""
    row, begun = Row(name, FAULTS[name].what), time.monotonic()
    try:
        FAULTS[name].make(bench, row)
    except NotRun as reason:
        row.not_run = str(reason)
        row.fault("undetected", f"not run to its end: {reason}", row.tried > 0)
    except Exception as error:  # of the harness itself, or let through by what it calls
        more = getattr(error, "stderr", None) or ""
        row.fault("undetected", f"{type(error).__name__}: {error} {more}")
    row.seconds = time.monotonic() - begun
    return row


def show(rows: Sequence[Row], title: str) -> None:
    table, console = Table("id", *COUNTS, "what", title=title), Console(width=160)
    for row in rows:
        figures: list[Any] = [getattr(row, key) for key in COUNTS]
        what = f"{row.what} (not run: {row.not_run})" if row.not_run else row.what
        shown = [f"{value:.1f}" if isinstance(value, float) else str(value) for value in figures]
        table.add_row(row.id, *shown, what)
    console.print(table)
    for row in rows:
        for note in row.notes:
            console.print(f"{row.id}: {note}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
