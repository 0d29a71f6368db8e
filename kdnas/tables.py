"""Tables of text: the same rows for the terminal and for a page."""

from collections.abc import Collection, Sequence
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text


def as_text(value: Any, spec: str, unit: str = "", scale: float = 1) -> str:
    """A number for a cell; ``-`` where it is not known."""
    return "-" if pd.isna(value) else f"{value * scale:{spec}}{unit}"


def text_table(title: str, rows: Sequence[dict[str, str]], words: Collection[str] = ()) -> Table:
    """Rows for the terminal: headings on several lines, and no borders, so it fits 80 columns.

    Args:
        title: above the table.
        rows: from heading to text, the same headings in the same order.
        words: headings of columns that are no numbers, and stand left.
    """
    table = Table(title=Text(title), box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in rows[0] if rows else ():
        label = Text(heading.replace(" ", "\n"))
        table.add_column(label, justify="left" if heading in words else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row.values()))
    return table
