"""Draw a search: as SVG with tool tips for a page, and as images for TensorBoard.

A drawing (``Draw``) is a function that draws on given matplotlib axes. ``as_svg`` and ``as_figure``
turn it into a picture.
"""

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, cycle
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter

from kdnas.nas.trials import front, is_twin
from kdnas.report.tables import as_text, shape_text

Draw = Callable[[Axes], None]
Line = tuple[str, Sequence[Mapping[str, Any]], str]  # name, a row for each epoch, colour

# Mid-tones, readable on white and on black. INK is replaced by the colour of the page's text.
INK, GREY, BLUE, ORANGE = "#010203", "#8b9097", "#2f81d6", "#d9722b"
GREEN = "#2f9e6b"
COLOURS = (BLUE, ORANGE, GREEN, "#a566c9", "#c4515f", "#8f7f1f")  # of several runs, in turn
# With more candidates than this, only the best one and those on the front get a label and a tool
# tip: more could not be read, and each takes milliseconds to draw.
MOST_NAMED = 100
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.12,
    **dict.fromkeys(("text.color", "grid.color", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor"), INK),
}


def as_figure(draw: Draw) -> Figure:
    """Return a matplotlib figure with a white background.

    Args:
        draw: function that draws on the axes of the figure.
    """
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(4.4, 3.1), layout="constrained", dpi=120)
        draw(figure.add_subplot())
    return figure


def as_svg(label: str, draw: Draw) -> Markup:
    """Return the SVG of a drawing, with text and axes in the text colour of the HTML page.

    Args:
        label: description of the picture for screen readers.
        draw: function that draws on matplotlib axes; an artist whose gid is ``tip:TEXT`` gets the
            tool tip TEXT.
    """
    file = io.StringIO()
    with matplotlib.style.context(["default", STYLE | {"svg.hashsalt": label}]):
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        as_figure(draw).savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'<g id="tip:([^"]*)">', r'<g class="mark"><title>\1</title>', svg)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # figure_1, axes_1, ...: not unique in a page
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))


def pareto(frame: pd.DataFrame, best: int | None, budget: Mapping[str, float]) -> Draw | None:
    """Make a function that draws all candidates' loss against latency, and the Pareto front.

    Args:
        frame: the trials, as from ``trials_frame``.
        best: number of the best trial, which is drawn as a star; None: there is none.
        budget: maps fields of ``Budget``, such as ``latency_ms`` and ``speedup``, to their limits;
            these two are drawn as vertical lines.

    Returns:
        A function that draws on matplotlib axes; None if no latency was measured.
    """
    measured = frame[frame["latency_ms"].notna() & ~is_twin(frame)]
    trained = measured[np.isfinite(measured["loss"])]
    teacher_ms = (measured["latency_ms"] * measured["speedup"]).median()

    def draw(axes: Axes) -> None:
        _loss_by_latency(axes)
        _front(axes, frame, INK)
        kept = trained.index[trained["number"] == best].union(front(frame, "latency_ms"))
        named, cloud = _named(trained, kept)
        axes.plot(cloud["latency_ms"], cloud["loss"], "o", color=GREY)
        for row in named.to_dict("records"):
            place, tip = (row["latency_ms"], row["loss"]), f"tip:{_tip(row)}"
            look: dict[str, Any] = dict(marker="o", color=GREY)
            if row["number"] == best:
                look = dict(marker="*", markersize=13, color=ORANGE)
            axes.plot(*place, **look, gid=tip, zorder=3)
            axes.annotate(row["number"], place, (5, 5), textcoords="offset points", fontsize=8)

        at_foot = axes.get_xaxis_transform()
        foot: dict[str, Any] = dict(marker="x", linestyle="", color=GREY, transform=at_foot)
        named, cloud = _named(measured.drop(trained.index), measured.index[:0])
        axes.plot(cloud["latency_ms"], [0.03] * len(cloud), **foot)
        for row in named.to_dict("records"):
            axes.plot(row["latency_ms"], 0.03, **foot, gid=f"tip:{_tip(row)}")

        if budget.get("latency_ms"):
            axes.axvline(budget["latency_ms"], color=ORANGE, linestyle="--", linewidth=1)
        if budget.get("speedup"):
            axes.axvline(teacher_ms / budget["speedup"], color=ORANGE, linestyle="--", linewidth=1)

    return draw if len(measured) else None


def fronts(frames: Mapping[str, pd.DataFrame]) -> Draw:
    """Make a function that draws the candidates and Pareto fronts of several searches.

    Args:
        frames: maps the name of each run to its trials, as from ``trials_frame``.

    Returns:
        A function that draws loss against latency on matplotlib axes.
    """

    def draw(axes: Axes) -> None:
        _loss_by_latency(axes)
        for (name, frame), colour in zip(frames.items(), cycle(COLOURS), strict=False):
            _front(axes, frame, colour)
            trained = frame[np.isfinite(frame["loss"]) & ~is_twin(frame)]
            named, cloud = _named(trained, front(frame, "latency_ms"))
            axes.plot(cloud["latency_ms"], cloud["loss"], "o", color=colour, alpha=0.3)
            for row in named.to_dict("records"):
                tip = f"tip:{name}, {_tip(row)}"
                axes.plot(row["latency_ms"], row["loss"], "o", color=colour, gid=tip)

    return draw


def best_so_far(rewards: Mapping[str, Sequence[float]]) -> Draw:
    """Make a function that draws the best reward so far, with a line for each run.

    Args:
        rewards: maps a run's name to the rewards of its candidates, in the order of training.

    Returns:
        A function that draws on matplotlib axes; x is the number of trained candidates.
    """

    def draw(axes: Axes) -> None:
        axes.set(xlabel="trained candidates", ylabel="best reward")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        for (name, values), colour in zip(rewards.items(), cycle(COLOURS), strict=False):
            best, counts = list(accumulate(values, max)), range(1, len(values) + 1)
            highest = as_text(max(values, default=None), ".4f")
            tip = f"tip:{name}: {highest} after {len(values)} candidates"
            axes.step(counts, best, where="post", color=colour, linewidth=2, gid=tip)
            axes.plot(counts, best, "o", markersize=4, color=colour, gid=tip)

    return draw


def predictions(frame: pd.DataFrame) -> Draw | None:
    """Make a function that draws the trials' rewards against those that an LSTM predicted.

    Args:
        frame: the trials, as from ``trials_frame``.

    Returns:
        A function that draws on matplotlib axes; None if no reward was predicted.
    """
    known = frame[frame["predicted_reward"].notna() & frame["reward"].notna() & ~is_twin(frame)]
    ends = known[["predicted_reward", "reward"]].stack().agg(["min", "max"])

    def draw(axes: Axes) -> None:
        axes.set(xlabel="predicted reward", ylabel="reward")
        axes.plot(ends, ends, color=GREY, linewidth=1, linestyle="--")
        for row in known.to_dict("records"):
            place, predicted = (row["predicted_reward"], row["reward"]), row["predicted_reward"]
            tip = f"tip:{_tip(row)}, predicted {as_text(predicted, '.4f')}"
            axes.plot(*place, "o", color=BLUE, gid=tip)
            axes.annotate(row["number"], place, (5, 5), textcoords="offset points", fontsize=8)

    return draw if len(known) else None


def curves(ylabel: str, name: str, lines: Iterable[Line]) -> Draw:
    """Make a function that draws a value by epoch, with a line for each model.

    Args:
        ylabel: label of the value in the picture.
        name: key of the value in the rows of a line.
        lines: a tuple for each line: its name, its rows (a dictionary of values for each epoch) and
            its colour; grey lines are drawn thin.

    Returns:
        A function that draws on matplotlib axes.
    """

    def draw(axes: Axes) -> None:
        axes.set(xlabel="epoch", ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        for label, history, colour in lines:
            epochs = [row["epoch"] + 1 for row in history]
            values = np.array([row[name] for row in history], dtype=float)
            tip = f"tip:{label}: {', '.join(as_text(value, '.3f') for value in values)}"
            weight = 1 if colour == GREY else 2
            (line,) = axes.plot(epochs, values, "o-", markersize=4, color=colour, gid=tip)
            line.set(linewidth=weight, zorder=1 + weight)

    return draw


def _named(candidates: pd.DataFrame, kept: pd.Index) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split a table of candidates into those that get a tool tip and those that do not.

    All get one, unless there are more than ``MOST_NAMED``: then only those whose index label is in
    ``kept``.
    """
    named = candidates
    if len(candidates) > MOST_NAMED:
        named = candidates.loc[candidates.index.isin(kept)]
    return named, candidates.drop(named.index)


def _loss_by_latency(axes: Axes) -> None:
    axes.set(xlabel="latency (ms, logarithmic)", ylabel="held-out loss", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.minorticks_off()


def _front(axes: Axes, frame: pd.DataFrame, colour: str) -> None:
    shown = frame.loc[front(frame, "latency_ms")]
    axes.step(shown["latency_ms"], shown["loss"], where="post", color=colour, linewidth=1, zorder=2)


def _tip(row: Mapping[str, Any]) -> str:
    """Return the text of a candidate's tool tip."""
    found = [
        as_text(row["latency_ms"], ".2f", " ms"),
        as_text(row["speedup"], ".1f", "x"),
        f"loss {as_text(row['loss'], '.4f')}",
        f"contextual share {as_text(row['contextual_share'], '.3f')}",
        f"reward {as_text(row['reward'], '.4f')}",
    ]
    known = [part for part in found if not part.endswith("-")]
    return ", ".join([f"trial {row['number']}: {shape_text(row)}", *known])
