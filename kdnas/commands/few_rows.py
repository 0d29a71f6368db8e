"""A config on a few rows of its text and task."""

from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from kdnas.commands.config import RunConfig, SearchConfig
from kdnas.data.quickstart import text_and_task
from kdnas.data.readers import some_rows
from kdnas.system.errors import UserError
from kdnas.system.files import Run
from kdnas.tasks.tasks import load_task

NUM_ROWS = 64

AnyConfig = TypeVar("AnyConfig", bound=SearchConfig)


@dataclass(frozen=True)
class Sizes:
    """How much the user gave."""

    num_rows: int  # usable rows of text; an estimate where only some were kept
    num_train: int = 0  # labelled rows
    num_validation: int = 0


def with_few_rows(
    config: AnyConfig,
    folder: Path,
    num_rows: int = NUM_ROWS,
    num_bytes: float = float("inf"),
    num_task_rows: int = NUM_ROWS,
) -> tuple[AnyConfig, Sizes]:
    """The same config on a few random rows of its text and task, and how many rows there are.

    ``folder`` takes the rows, and is the new config's root, so the real one is not touched. There
    are at most so many rows and bytes of text (a row counts as if it were cut), but two rows.
    """
    there = Run(config.root, config.name).text
    asked = config.task if isinstance(config, RunConfig) else None
    place = there if there.is_dir() else folder / "quickstart"
    text, task = text_and_task(config.text, asked, place)
    few, sizes = _few_rows(text, config, num_rows, num_bytes)
    pq.write_table(few, folder / "text.parquet")
    small = replace(
        config,
        text=str(folder / "text.parquet"),
        root=str(folder / "lightning_logs"),
        storage=None,
        data=replace(config.data, column="text", fraction=1.0),
        states=replace(config.states, folder=None),
    )
    if not task:
        return small, sizes

    assert isinstance(small, RunConfig)
    rows = load_task(task)
    small = replace(small, task=str(rows.save(folder / "task", num_task_rows)))
    num_validation = sum(len(columns["label"]) for columns in rows.validations.values())
    return small, Sizes(sizes.num_rows, len(rows.train["label"]), num_validation)


def _few_rows(
    text: str, config: SearchConfig, num_rows: int, num_bytes: float
) -> tuple[pa.Table, Sizes]:
    rows, num_all = some_rows(text, config.data.column, num_rows)
    usable = {row: split for row, split in rows if row and row.strip()}
    if len(usable) < 2:
        raise UserError(
            f"{text!r} has {len(usable)} usable rows among {len(rows):,}: "
            f"is {config.data.column!r} right?"
        )
    longest = 4 * config.data.max_length  # bytes, of which a token has about four
    sizes = accumulate(min(longest, len(row.encode())) for row in usable)
    num_chosen = max(2, sum(size <= num_bytes for size in sizes))
    texts, splits = list(usable)[:num_chosen], list(usable.values())[:num_chosen]
    if len(set(splits)) == 1:  # too few rows for both parts: draw the parts anew
        splits = [None] * num_chosen
    table = pa.table({"text": texts, "split": splits})
    return table, Sizes(round(num_all * len(usable) / len(rows)))
