"""A run on a few rows, by the real code, so that whether a long one would end is seen before it begins."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kdnas.commands.config import RunConfig, SearchConfig
from kdnas.commands.inputs import validate
from kdnas.commands.run import run_stages
from kdnas.data.corpus import QUICKSTART, build_quickstart_text
from kdnas.data.readers import some_rows
from kdnas.nas.budget import Budget
from kdnas.system.errors import UserError
from kdnas.system.files import Run, nearest_folder, owned, sweep
from kdnas.tasks.tasks import load_task

NUM_ROWS = 64
NUM_CANDIDATES = 2

AnyConfig = TypeVar("AnyConfig", bound=SearchConfig)


@dataclass(frozen=True)
class Sizes:
    """How much the user gave.

    Args:
        num_rows: usable rows of text; about, where there are many.
        num_train: labelled rows that train; 0 without a task.
        num_validation: labelled rows that are scored.
    """

    num_rows: int
    num_train: int = 0
    num_validation: int = 0


def with_few_rows(
    config: AnyConfig,
    folder: Path,
    num_rows: int,
    num_bytes: float = float("inf"),
    num_task_rows: int = NUM_ROWS,
) -> tuple[AnyConfig, Sizes]:
    """The same config on a few rows from all over its text and task, and how many there are.

    Args:
        config: of a search or a run.
        folder: takes the rows, and is the config's root: nothing gets into the real one.
        num_rows: of text.
        num_bytes: of text, at least two rows; a row counts as if it were cut.
        num_task_rows: of each split of the task.

    Raises:
        UserError: text or task cannot be read, or there are fewer than two usable rows among those read.
    """
    text, task_source = config.text, config.task if isinstance(config, RunConfig) else None
    if QUICKSTART in (text, task_source):
        there = Run(config.root, config.name).text
        path = build_quickstart_text(there if there.is_dir() else folder / "quickstart")
        text = str(path) if text == QUICKSTART else text
        task_source = (
            str(path.parent / "which_package") if task_source == QUICKSTART else task_source
        )
    rows, num_found = some_rows(text, config.data.column)
    usable = {row: split for row, split in rows if row and row.strip()}
    if len(usable) < 2:
        raise UserError(
            f"{text!r} has {len(usable)} usable rows among {len(rows):,}: is {config.data.column!r} right?"
        )
    longest = 4 * config.data.max_length  # bytes, of which a token has about four
    mean = sum(min(longest, len(row.encode())) for row in usable) / len(usable)
    chosen = _evenly(list(usable), max(2, int(min(num_rows, num_bytes / mean))))
    splits = [usable[row] for row in chosen]
    table = {"text": chosen, "split": splits if len(set(splits)) > 1 else [None] * len(chosen)}
    pq.write_table(pa.table(table), folder / "text.parquet")
    small = replace(
        config,
        text=str(folder / "text.parquet"),
        root=str(folder / "lightning_logs"),
        storage=None,
        data=replace(config.data, column="text"),
        states=replace(config.states, folder=None),
    )
    sizes = Sizes(round(num_found * len(usable) / len(rows)))
    if task_source:
        task = load_task(task_source)
        assert isinstance(small, RunConfig)
        small = replace(small, task=str(task.save(folder / "task", num_task_rows)))
        num_validation = sum(len(columns["label"]) for columns in task.validations.values())
        sizes = replace(sizes, num_train=len(task.train["label"]), num_validation=num_validation)
    return small, sizes


def _evenly(rows: Sequence[str], most: int) -> list[str]:
    return (
        [rows[place * len(rows) // most] for place in range(most)]
        if len(rows) > most
        else list(rows)
    )


def smoke(config: RunConfig, console: Console) -> None:
    """Every stage of a run on a few rows of its text and task, in a folder that is removed again.

    The budget is looked at but not kept, so that the candidates are the first that the sampler proposes.

    Args:
        config: of the real run, whose folder is not touched.
        console: where to say how it went.

    Raises:
        UserError: anything that the user can mend.
    """
    validate(config)
    place, name = nearest_folder(Path(config.root)), f"{config.name}-smoke"
    sweep(place, f"{name}.*")
    folder = Path(tempfile.mkdtemp(dir=place, prefix=owned(name)))
    try:
        seconds = run_stages(_shrunk(config, folder), console)
    except Exception:
        console.print(
            f"What the smoke run has made until then, kept until the next one: {folder}",
            soft_wrap=True,
        )
        raise
    except BaseException:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
    table = Table("stage", "seconds", box=SIMPLE_HEAD, show_edge=False)
    for stage, taken in seconds.items():
        table.add_row(stage, f"{taken:.1f}")
    table.add_row("in all", f"{sum(seconds.values()):.1f}", style="bold")
    console.print(table)
    console.print(
        f"Every stage works, on {NUM_ROWS} rows: what they score says nothing, and nothing of it is kept.",
        soft_wrap=True,
    )


def _shrunk(config: RunConfig, folder: Path) -> RunConfig:
    small, _ = with_few_rows(config, folder, NUM_ROWS)
    return replace(
        small,
        workers=min(config.workers, NUM_CANDIDATES),
        data=replace(
            small.data, held_out_fraction=max(small.data.held_out_fraction, 0.25)
        ),  # of few rows, a few
        search=replace(
            config.search,
            n_trials=min(config.search.n_trials, NUM_CANDIDATES),
            num_epochs=1,
            budget=Budget(),
        ),
        full_kd=replace(config.full_kd, num_epochs=1),
        finetune=replace(config.finetune, num_epochs=1),
        latency=replace(config.latency, min_seconds=min(config.latency.min_seconds, 0.05)),
    )
