"""The end of a run, to look at: the final table, the table of every trial, and report.html."""

import importlib.metadata
import io
import math
import os
import platform
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.style
import numpy as np
import optuna
import pandas as pd
import yaml
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter
from optuna.trial import FrozenTrial, TrialState
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from kdnas import __version__
from kdnas.arch import StudentArch
from kdnas.nas.search import failure_of
from kdnas.runs import Run, read_json, write_text

ARCH = [field.name for field in fields(StudentArch)]
MEASURED = ["loss", "contextual_share", "sentence_r2", "latency_ms", "latency_iqr_ms", "speedup"]
COLUMNS = ["number", "state", *ARCH, *MEASURED, "num_parameters", "reward", "front", "seconds", "reason"]
SHAPE = ["num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "hidden_act"]
MODELS = {"teacher": "teacher", "student": "best student", "random": "random start"}
PACKAGES = ("torch", "transformers", "optuna", "lightning")

# Mid-tones that can be read on white and on black; INK becomes the colour of the page's text.
INK, GREY, BLUE, ORANGE = "#010203", "#8b9097", "#2f81d6", "#d9722b"
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


def result_rows(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """The final table: teacher, best student, and a student of the same shape that started at random.

    Args:
        results: what ``glue/results.json`` holds.

    Returns:
        One dict a model, from heading to text: the same headings in the same order.
    """
    return [
        {
            "model": label,
            "parameters (M)": _text(row["num_parameters"], ".2f", scale=1e-6),
            "MB": _text(row["megabytes"], ".1f"),
            "latency (ms)": _text(row["latency_ms"], ".2f"),
            "IQR (ms)": _text(row["latency_iqr_ms"], ".2f"),
            "speed-up": _text(row["speedup"], ".1f", "x"),
            results["task"]["metric"]: _text(row["score"], ".3f"),
            "share kept (%)": _text(row["share_kept"], ".1f", scale=100),
        }
        for label, row in ((label, results["models"][name]) for name, label in MODELS.items())
    ]


def result_table(results: Mapping[str, Any]) -> Table:
    """``result_rows`` for the terminal.

    Args:
        results: what ``glue/results.json`` holds.
    """
    rows = result_rows(results)
    title = Text(f"Fine-tuned on {results['task']['name']}")
    # Units below their headings, and no borders: it fits 80 columns.
    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in rows[0]:
        label = Text(heading.replace(" (", "\n("))
        table.add_column(label, justify="left" if heading == "model" else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row.values()))
    return table


def trials_frame(study: optuna.Study) -> pd.DataFrame:
    """Every trial of a study in one row, for ``trials.csv``.

    Args:
        study: its trials may have finished, been refused or failed, or still run: what is not known stays empty.
            Those that only wait in the queue are left out.

    Returns:
        Columns ``number, state``, the five fields of the shape, ``loss, contextual_share, sentence_r2,
        latency_ms, latency_iqr_ms, speedup, num_parameters, reward, front, seconds, reason``. ``front`` names what the
        student is on the Pareto front of, beside the loss: ``latency``, ``parameters``, both, or nothing.
    """
    rows = []
    for trial in _begun(study):
        attrs = trial.user_attrs
        reason = attrs.get("refused") or attrs.get("failed") or failure_of(trial)
        if "twin_of" in attrs:
            reason = f"same shape as trial {attrs['twin_of']}"
        found = {"number": trial.number, "state": trial.state.name, "reason": reason}
        rows.append(attrs | attrs.get("arch", {}) | found)
    whole = dict.fromkeys((*ARCH[:4], "num_parameters"), "Int64")
    real = dict.fromkeys((*MEASURED, "reward", "seconds"), "float64")
    frame = pd.DataFrame(rows, columns=COLUMNS).astype(whole | real)
    fronts = {"latency": _front(frame, "latency_ms"), "parameters": _front(frame, "num_parameters")}
    frame["front"] = [" and ".join(name for name, front in fronts.items() if i in front) or None for i in frame.index]
    return frame


def _front(frame: pd.DataFrame, size: str) -> pd.Index:
    """The trained candidates that no other beats in both loss and size, the smallest first."""
    trained = frame[np.isfinite(frame["loss"]) & frame["reward"].notna() & ~_is_twin(frame)].sort_values([size, "loss"])
    return trained.index[trained["loss"] < trained["loss"].cummin().shift(fill_value=math.inf)]


def _is_twin(frame: pd.DataFrame) -> pd.Series:
    return frame["reason"].fillna("").str.startswith("same shape")


def front_table(study: optuna.Study) -> Table:
    """The best student, and those on the Pareto fronts of loss and latency, and of loss and parameters."""
    frame = trials_frame(study)
    best = _best(study)
    shown = frame[frame["front"].notna() | (frame["number"] == (best.number if best else -1))]
    title = "The best student (*) and the Pareto fronts"
    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("", "trial", "loss", "latency\n(ms)", "speed-up", "parameters\n(M)", "reward", "front of"):
        table.add_column(Text(heading), justify="left" if heading == "front of" else "right")
    for row in shown.sort_values("latency_ms").to_dict("records"):
        cells = [
            "*" if best is not None and row["number"] == best.number else "",
            str(row["number"]),
            _text(row["loss"], ".4f"),
            _text(row["latency_ms"], ".2f"),
            _text(row["speedup"], ".1f", "x"),
            _text(row["num_parameters"], ".2f", scale=1e-6),
            _text(row["reward"], ".4f"),
            row["front"] or "",
        ]
        table.add_row(*map(Text, cells))
    return table


def write_report(run: Run, study: optuna.Study, *, title: str | None = None) -> Path:
    """Write ``report.html``: one file that opens from disk and asks no network for anything.

    The same run gives the same bytes: its date is that of the study's last trial. What was not run is left out.

    Args:
        run: its ``config.yaml``, and what there is of ``full_kd/result.json`` and ``glue/results.json``, are read.
        study: its search; ``study.user_attrs["budget"]``, if any, maps ``speedup`` (at least) or ``latency_ms``
            (at most) to its limit.
        title: heading of the page; the run's name by default.

    Returns:
        The path of the report.
    """
    full_kd, results = (
        read_json(path) if path.is_file() else None for path in (run.full_kd / "result.json", run.glue / "results.json")
    )
    trials = _begun(study)
    frame = trials_frame(study).assign(state=[_in_words(trial) for trial in trials])
    frame = frame.sort_values(["reward", "number"], ascending=[False, True])
    best = _best(study)
    budget = study.user_attrs.get("budget") or {}
    config = run.config.read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(files("kdnas").joinpath("report.html.j2").read_text(encoding="utf-8"))
    html = page.render(
        title=title or f"kdnas: {run.name}",
        headline=_headline(frame, best, full_kd, results),
        counts=", ".join(f"{count} {state}" for state, count in frame["state"].value_counts(sort=False).items()),
        asked=_asked(run, yaml.safe_load(config), budget),
        shape=best and StudentArch.from_dict(best.user_attrs["arch"]),
        results=results,
        result_rows=results and result_rows(results),
        pareto=_pareto(frame, best, budget),
        errors=_curves(trials, best, full_kd, "loss", "held-out loss"),
        shares=_curves(trials, best, full_kd, "contextual_share", "contextual share"),
        scores=results and _scores(results),
        candidates=_candidates(frame),
        best=best and str(best.number),
        config=config,
        environment=_environment(trials),
    )
    write_text(run.report, html)
    return run.report


def _text(value: Any, spec: str, unit: str = "", scale: float = 1) -> str:
    return "-" if pd.isna(value) else f"{value * scale:{spec}}{unit}"


def _begun(study: optuna.Study) -> list[FrozenTrial]:
    trials = study.get_trials(deepcopy=False)
    return [t for t in trials if t.state != TrialState.WAITING and "not_needed" not in t.user_attrs]


def _in_words(trial: FrozenTrial) -> str:
    """What became of a trial."""
    if "twin_of" in trial.user_attrs:
        return "repeated"
    if trial.state == TrialState.FAIL:
        return "failed" if failure_of(trial) else "interrupted"
    if trial.state == TrialState.PRUNED:
        return "refused" if "refused" in trial.user_attrs else "stopped early"
    return "finished" if trial.state == TrialState.COMPLETE else "running"


def _best(study: optuna.Study) -> FrozenTrial | None:
    try:
        best = study.best_trial
    except ValueError:  # no trial is complete
        return None
    return study.get_trials(deepcopy=False)[best.user_attrs.get("twin_of", best.number)]


def _candidates(frame: pd.DataFrame) -> list[dict[str, str]]:
    return [
        {
            "trial": str(row["number"]),
            "state": row["state"],
            "shape": "{} x {}, {} heads, {} {}".format(*map(row.get, SHAPE)) if pd.notna(row["hidden_act"]) else "-",
            "parameters (M)": _text(row["num_parameters"], ".2f", scale=1e-6),
            "latency (ms)": _text(row["latency_ms"], ".2f"),
            "speed-up": _text(row["speedup"], ".1f", "x"),
            "loss": _text(row["loss"], ".4f"),
            "sentence R2": _text(row["sentence_r2"], ".4f"),
            "contextual share": _text(row["contextual_share"], ".3f"),
            "reward": _text(row["reward"], ".4f"),
            "seconds": _text(row["seconds"], ".1f"),
            "reason": "" if pd.isna(row["reason"]) else row["reason"],
        }
        for row in frame.to_dict("records")
    ]


def _headline(frame: pd.DataFrame, best: FrozenTrial | None, full_kd: Any, results: Any) -> str:
    num_shapes = len(frame.dropna(subset=ARCH).drop_duplicates(ARCH))
    candidates = f"{num_shapes} candidate{'s' * (num_shapes != 1)}"
    if best is None:
        return f"None of {candidates} could be scored."
    student = best.user_attrs | (full_kd or {}) | (results["models"]["student"] if results else {})
    if student.get("share_kept") is not None:
        kept = f"keeps {100 * student['share_kept']:.0f} % of its teacher's {results['task']['metric']}"
    else:
        kept = f"explains {100 * student['sentence_r2']:.0f} % of the variance of its teacher's sentence vectors"
    return (
        f"The best of {candidates} has {student['num_parameters'] / 1e6:.1f} M parameters, "
        f"is {student['speedup']:.1f}x as fast and {kept}."
    )


def _asked(run: Run, config: Mapping[str, Any], budget: Mapping[str, float]) -> dict[str, str]:
    limits = {"speedup": "at least {:g}x as fast as the teacher", "latency_ms": "at most {:g} ms"}
    limits["num_parameters"] = "at most {:,} parameters"
    return {name: str(config[name]) for name in ("teacher", "text", "task") if config.get(name)} | {
        "budget": ", ".join(limits[name].format(limit) for name, limit in budget.items() if limit) or "none",
        "configuration": str(run.config),
        "look closer": f"tensorboard --logdir {shlex.quote(str(run.folder))}",
    }


def _environment(trials: Iterable[FrozenTrial]) -> dict[str, str]:
    dates = [date for trial in trials for date in (trial.datetime_start, trial.datetime_complete) if date]
    cpuinfo = Path("/proc/cpuinfo")
    processor = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return {
        "search ended": f"{max(dates):%Y-%m-%d %H:%M}" if dates else "-",
        "processor": f"{processor[1] if processor else platform.machine()}, {os.cpu_count()} cores",
        "system": platform.platform(),
        "Python": platform.python_version(),
        "kdnas": __version__,
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _picture(label: str, draw: Callable[[Axes], None]) -> Markup:
    """Inline SVG in the page's colours. A part whose gid is ``tip:...`` gets that text as its tool tip."""
    file = io.StringIO()
    with matplotlib.style.context(["default", STYLE | {"svg.hashsalt": label}]):
        figure = Figure(figsize=(4.4, 3.1), layout="constrained")
        draw(figure.add_subplot())
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'<g id="tip:([^"]*)">', r"<g><title>\1</title>", svg)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # figure_1, axes_1, ...: every picture has them
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))


def _pareto(frame: pd.DataFrame, best: FrozenTrial | None, budget: Mapping[str, float]) -> Markup | None:
    measured = frame[frame["latency_ms"].notna() & (frame["state"] != "repeated")]
    trained = measured[np.isfinite(measured["loss"])]
    untrained = measured.drop(trained.index)
    front = frame.loc[_front(frame, "latency_ms")]
    teacher_ms = (measured["latency_ms"] * measured["speedup"]).median()

    def draw(axes: Axes) -> None:
        axes.set(xlabel="latency (ms, logarithmic)", ylabel="held-out loss", xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.minorticks_off()
        axes.step(front["latency_ms"], front["loss"], where="post", color=INK, linewidth=1, zorder=2)
        for row in trained.itertuples():
            is_best = best is not None and row.number == best.number
            look = dict(marker="*", markersize=13, color=ORANGE) if is_best else dict(marker="o", color=GREY)
            axes.plot(row.latency_ms, row.loss, **look, gid=f"tip:trial {row.number}", zorder=3)
            axes.annotate(row.number, (row.latency_ms, row.loss), (5, 5), textcoords="offset points", fontsize=8)
        for row in untrained.itertuples():
            place = axes.get_xaxis_transform()
            axes.plot(row.latency_ms, 0.03, "x", color=GREY, transform=place, gid=f"tip:trial {row.number}")
        if budget.get("latency_ms"):
            axes.axvline(budget["latency_ms"], color=ORANGE, linestyle="--", linewidth=1)
        if budget.get("speedup"):
            axes.axvline(teacher_ms / budget["speedup"], color=ORANGE, linestyle="--", linewidth=1)

    return _picture("Loss against latency of every candidate", draw) if len(measured) else None


def _curves(
    trials: Iterable[FrozenTrial], best: FrozenTrial | None, full_kd: Any, name: str, label: str
) -> Markup | None:
    histories = [
        (f"trial {trial.number}", trial.user_attrs["history"], ORANGE if best and trial.number == best.number else GREY)
        for trial in trials
        if trial.user_attrs.get("history") and "twin_of" not in trial.user_attrs
    ]
    if full_kd:
        histories.append(("full KD", full_kd["history"], BLUE))
    return _lines(f"{label} by epoch", label, name, histories) if histories else None


def _scores(results: Mapping[str, Any]) -> Markup:
    colours = {"teacher": INK, "student": BLUE, "random": GREY}
    histories = [(MODELS[name], results["models"][name]["history"], colour) for name, colour in colours.items()]
    return _lines("Fine-tuning score by epoch", results["task"]["metric"], "score", histories)


def _lines(label: str, ylabel: str, name: str, histories: Iterable[tuple[str, Any, str]]) -> Markup:
    def draw(axes: Axes) -> None:
        axes.set(xlabel="epoch", ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for tip, history, colour in histories:
            epochs = [row["epoch"] + 1 for row in history]
            values = np.array([row[name] for row in history], dtype=float)
            weight = 1 if colour == GREY else 2
            (line,) = axes.plot(epochs, values, "o-", markersize=4, color=colour, gid=f"tip:{tip}")
            line.set(linewidth=weight, zorder=1 + weight)

    return _picture(label, draw)
