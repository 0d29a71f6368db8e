"""Change a config to use a few rows of its text and of its task, to try or to time a run."""

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
    """Numbers of rows in the user's whole text and task."""

    num_rows: int  # usable rows of text; an estimate from the sample, if the text has more
    num_train: int = 0  # labelled rows; 0 without a task
    num_validation: int = 0


def with_few_rows(
    config: AnyConfig,
    folder: Path,
    num_rows: int = NUM_ROWS,
    num_bytes: float = float("inf"),
    num_task_rows: int = NUM_ROWS,
) -> tuple[AnyConfig, Sizes]:
    """Return a config for a few random rows of the text and task, and the numbers of all rows.

    Args:
        config: config of a search or a run.
        folder: folder for the rows and for the ``root`` of the new config, so that the folder of
            the real run is not touched.
        num_rows: largest number of rows of text.
        num_bytes: largest number of bytes of text; a row counts as if it were cut at
            ``max_length`` tokens. At least two rows are drawn.
        num_task_rows: largest number of labelled rows in each split.

    Raises:
        UserError: the text or the task cannot be read, or the text has fewer than two usable rows.
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
            f"Only {len(usable)} of {len(rows):,} rows of {text!r} are usable, but 2 are needed: "
            f"check that {config.data.column!r} is the right column."
        )
    longest = 4 * config.data.max_length  # in bytes; a token has about four
    sizes = accumulate(min(longest, len(row.encode())) for row in usable)
    num_chosen = max(2, sum(size <= num_bytes for size in sizes))
    texts, splits = list(usable)[:num_chosen], list(usable.values())[:num_chosen]
    if len(set(splits)) == 1:  # all in one part, but both are needed: draw them anew
        splits = [None] * num_chosen
    table = pa.table({"text": texts, "split": splits})
    return table, Sizes(round(num_all * len(usable) / len(rows)))
