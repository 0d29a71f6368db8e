"""Make tables of text, with the same rows for the terminal and for a page."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import optuna
import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdnas.nas.trials import best_trial, trials_frame
from kdnas.system.errors import counted


def show(console: Console, text: str) -> None:
    """Print a line without wrapping or highlighting, so that paths and commands can be copied."""
    console.print(text, soft_wrap=True, highlight=False)


def as_text(value: Any, spec: str, unit: str = "", scale: float = 1) -> str:
    """Return ``value * scale`` formatted by ``spec``, with the unit; ``-`` for a missing value."""
    return "-" if pd.isna(value) else f"{value * scale:{spec}}{unit}"


def shape_text(row: Mapping[str, Any]) -> str:
    """Return a candidate's layers, width and heads as text: ``4 x 192, 12 heads``."""
    heads = counted(row["num_attention_heads"], "head")
    return f"{row['num_hidden_layers']} x {row['hidden_size']}, {heads}"


def text_table(title: str, rows: Sequence[dict[str, str]], words: Collection[str] = ()) -> Table:
    """Make a table for the terminal that fits 80 columns, with headings on several lines.

    Args:
        title: the line above the table.
        rows: ``{heading: text}`` for each row, with the same headings in the same order.
        words: headings of the columns that hold words; these are aligned left, numbers right.
    """
    narrow: dict[str, Any] = dict(show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table = Table(title=Text(title), box=SIMPLE_HEAD, **narrow)
    for heading in rows[0] if rows else ():
        label = Text(heading.replace(" ", "\n"))
        table.add_column(label, justify="left" if heading in words else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row.values()))
    return table


def front_table(study: optuna.Study) -> Table:
    """Return a table of the best student and Pareto fronts (loss and latency; loss and size)."""
    frame = trials_frame(study)
    best = best_trial(study)
    number = best.number if best else -1
    shown = frame[frame["front"].notna() | (frame["number"] == number)]
    rows = [
        {
            "": "*" if row["number"] == number else "",
            "trial": str(row["number"]),
            "loss": as_text(row["loss"], ".4f"),
            "latency (ms)": as_text(row["latency_ms"], ".2f"),
            "speed-up": as_text(row["speedup"], ".1f", "x"),
            "parameters (M)": as_text(row["num_parameters"], ".2f", scale=1e-6),
            "reward": as_text(row["reward"], ".4f"),
            # The best student may be on no front: its reward depends on the teacher's latency too,
            # which each worker measures anew.
            "front of": "" if pd.isna(row["front"]) else row["front"],
        }
        for row in shown.sort_values("latency_ms").to_dict("records")
    ]
    return text_table("The best student (*) and the Pareto fronts", rows, words=["front of"])
