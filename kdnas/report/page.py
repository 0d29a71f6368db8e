"""Write ``report.html``: the results of one run, in one file that needs no network."""

import base64
import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup
from rich.table import Table

from kdnas import __version__
from kdnas.deploy.latency import BUSY, LatencySettings, measured_by
from kdnas.models.arch import StudentArch
from kdnas.nas.budget import Budget
from kdnas.nas.trials import (
    ARCH,
    FrozenTrial,
    Study,
    begun,
    best_trial,
    in_words,
    trained,
    trials_frame,
)
from kdnas.report.pictures import (
    BLUE,
    GREEN,
    GREY,
    INK,
    MOST_NAMED,
    ORANGE,
    Line,
    as_svg,
    curves,
    pareto,
    predictions,
)
from kdnas.report.tables import as_text, shape_text, text_table
from kdnas.report.trust import checks, is_busy, too_slow
from kdnas.system.errors import counted
from kdnas.system.files import MANIFEST, Run, read_json, write_text
from kdnas.system.yaml import read_yaml
from kdnas.tasks.finetune import FinetuneSettings
from kdnas.training.precision import gpu_name
from kdnas.training.trainer import TrainerSettings

# Names and colours of the models of ``glue/results.json``, for people.
MODELS = {
    "teacher": ("teacher", INK),
    "student": ("best student", BLUE),
    "random": ("random start", GREY),
    "static": ("static vectors", GREEN),
    "layer_cut": ("layer cut", ORANGE),
}
BASELINES = ("static", "layer_cut")
PACKAGES = ("torch", "transformers", "optuna", "lightning")


def result_rows(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the rows of the final table as ``{heading: text}``, one for each model.

    Args:
        results: content of ``glue/results.json``.
    """
    return [
        {
            "model": MODELS[name][0],
            "parameters (M)": as_text(row["num_parameters"], ".2f", scale=1e-6),
            "MB": as_text(row["megabytes"], ".1f"),
            "latency (ms)": as_text(row["latency_ms"], ".2f"),
            "IQR (ms)": as_text(row["latency_iqr_ms"], ".2f"),
            "speed-up": as_text(row["speedup"], ".1f", "x"),
            results["task"]["metric"]: as_text(row["score"], ".3f"),
            "share kept (%)": as_text(row["share_kept"], ".1f", scale=100),
        }
        for name, row in results["models"].items()
    ]


def result_table(
    results: Mapping[str, Any], how: Mapping[str, Any], budget: Budget = Budget()
) -> Table:
    """Return the final table of a run, for the terminal.

    Args:
        results: content of ``glue/results.json``.
        how: the run's ``LatencySettings`` as a dict, for the caption.
        budget: the budget of the search.
    """
    title = f"Fine-tuned on {results['task']['name']}"
    table = text_table(title, result_rows(results), words=["model"])
    table.caption = " ".join([f"Latency: {measured_by(how)}.", *cautions(results, budget)])
    return table


def agreement(full_kd: Mapping[str, Any]) -> str:
    """Describe how well a student's sentence vectors agree with its teacher's, in words.

    Args:
        full_kd: content of ``full_kd/result.json``.

    Returns:
        The description, a part of a sentence; ``""`` if the agreement was not measured.
    """
    if "vector_cosine" not in full_kd:
        return ""
    return (
        f"on held-out rows its sentence vectors have a mean cosine of "
        f"{full_kd['vector_cosine']:.3f} to its teacher's, and put pairs of rows in the teacher's "
        f"order of similarity (Spearman {full_kd['similarity_order']:.3f})"
    )


def cautions(results: Mapping[str, Any], budget: Budget = Budget()) -> list[str]:
    """Return warnings about the final figures, such as a noisy latency or a missed budget.

    Args:
        results: the final figures, which are the content of ``glue/results.json``.
        budget: the budget of the search.
    """
    models = results["models"]
    said = []
    if reason := too_slow(results, budget):
        said.append(f"The student kept the budget in the search, but was measured again: {reason}.")
    if models["random"]["score"] >= models["student"]["score"]:
        said.append(
            "A random start of the same shape scores as high, so this task does not show "
            "what distillation gains."
        )
    best = models["student"]["score"]
    better = [MODELS[name][0] for name in BASELINES if models[name]["score"] >= best]
    if better:
        said.append(
            f"The student does not beat the {' and the '.join(better)}, "
            "which took no search and no distillation."
        )
    if is_busy(results):
        said.append(f"{BUSY} The report has the command to measure again.")
    return said


def write_page(path: Path, template: str, **values: Any) -> None:
    """Render a template to an HTML file that needs no network and runs only its own script.

    Args:
        path: the file to write.
        template: name of a template in ``kdnas/report/templates``.
        values: variables of the template; text in them is escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kdnas.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "shell": lambda value: shlex.quote(str(value)),
        "repr": repr,
        "counted": counted,
        "an_option_a_line": lambda command: command.replace(" --", " \\\n  --"),
    }
    script = environment.get_template("page.js.j2").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values |= {"script": Markup(script), "script_sha256": digest}
    write_text(path, environment.get_template(template).render(values))


def stage_results(run: Run) -> tuple[Any, Any, Any]:
    """Return a tuple with the results of full KD, fine-tuning and the export's checks.

    None stands for the results of an unfinished stage.
    """
    files = run.full_kd / "result.json", run.glue / "results.json", run.student / MANIFEST
    full_kd, results, manifest = (read_json(file) if file.is_file() else None for file in files)
    return full_kd, results, manifest and manifest.get("checks")


def unfinished(run: Run, config: Mapping[str, Any]) -> list[str]:
    """Return the names of the stages that a run's config asks for but that are not finished."""
    full_kd, results, exported = stage_results(run)
    done = {"search": run.best_student.is_file()}
    if "full_kd" in config:  # a search has none
        tuned = results or not config.get("task")
        done |= {"full KD": full_kd, "fine-tuning": tuned, "export": exported}
    return [stage for stage, is_done in done.items() if not is_done]


def write_report(run: Run, study: Study, *, output: Path | None = None) -> Path:
    """Write the HTML page of a run; stages that have not run are left out.

    The same run on the same machine always gives the same bytes: the page's date is that of the
    run's last trial.

    Args:
        run: the run, which may be unfinished.
        study: the Optuna study of the run's search.
        output: the file to write; None: ``report.html`` in the folder of the run.

    Returns:
        The path of the page.
    """
    full_kd, results, exported = stage_results(run)
    config = read_yaml(run.config)
    budget = study.user_attrs.get("budget") or {}
    trials = begun(study)
    best = best_trial(study)
    number = best.number if best else None
    frame = trials_frame(study)
    histories = {
        trial.number: trial.user_attrs["history"]
        for trial in trials
        if trial.user_attrs.get("history") and "twin_of" not in trial.user_attrs
    }
    draw_pareto, draw_predictions = pareto(frame, number, budget), predictions(frame)
    leaders = _leaders(frame)

    frame = frame.assign(state=[in_words(trial) for trial in trials])
    frame = frame.sort_values(["reward", "number"], ascending=[False, True])
    shown = sorted([trial for trial in frame["number"] if trial in histories][:MOST_NAMED])
    lines = [
        (f"trial {trial}", histories[trial], ORANGE if trial == number else GREY) for trial in shown
    ]
    if full_kd and full_kd["num_epochs"]:
        lines.append(("full KD", full_kd["history"], BLUE))
    states = frame["state"].value_counts(sort=False)
    tuned = results["models"] if results else {}
    scores = [(MODELS[name][0], row["history"], MODELS[name][1]) for name, row in tuned.items()]
    # Later stages measure some figures of the student again: the last value counts.
    student = best and best.user_attrs | (full_kd or {}) | tuned.get("student", {})

    output = output or run.report
    write_page(
        output,
        "report.html.j2",
        title=f"kdnas: {run.name}",
        run=run,
        config=config,
        config_text=run.config.read_text(encoding="utf-8"),
        limits=_limits(budget),
        num_shapes=len(frame.dropna(subset=ARCH).drop_duplicates(ARCH)),
        num_trained=len(trained(study)),
        student=student,
        shape=best and StudentArch.from_dict(best.user_attrs["arch"]),
        results=results,
        result_rows=results and result_rows(results),
        unfinished=unfinished(run, config),
        cautions=cautions(results, Budget(**budget)) if results else [],
        agreement=agreement(full_kd) if full_kd and not results else None,
        measured_by=measured_by(config.get("latency", {})),
        pareto=draw_pareto and as_svg("Loss against latency of every candidate", draw_pareto),
        leaders=leaders,
        predictions=draw_predictions and as_svg("Predicted and true rewards", draw_predictions),
        errors=_by_epoch("held-out loss", "loss", lines),
        shares=_by_epoch("contextual share", "contextual_share", lines),
        scores=results and _by_epoch(results["task"]["metric"], "score", scores),
        best_shown=len(shown) < len(histories) and len(shown),
        counts=", ".join(f"{count} {state}" for state, count in states.items()),
        candidates=_candidates(frame),
        best=best and str(best.number),
        checks=checks(frame, number, histories, full_kd, results, exported, Budget(**budget)),
        is_exported=exported is not None,
        unusual=_unusual(config),
        environment=_teacher_of(run) | _environment(trials),
    )
    return output


def _by_epoch(label: str, name: str, lines: Sequence[Line]) -> Markup | None:
    return as_svg(f"{label} by epoch", curves(label, name, lines)) if lines else None


def _leaders(frame: pd.DataFrame) -> list[dict[str, str]]:
    """Return a row per episode: the best trials so far, of this episode and of the one before."""
    trained = frame.dropna(subset=["episode"])

    def best(rows: pd.DataFrame) -> str:
        if rows.empty:
            return "-"
        row = rows.loc[rows["reward"].idxmax()]
        return f"trial {row['number']}: {row['reward']:.4f}"

    return [
        {
            "episode": str(episode),
            "best so far": best(trained[trained["episode"] <= episode]),
            "best of this episode": best(trained[trained["episode"] == episode]),
            "best of the one before": best(trained[trained["episode"] == episode - 1]),
        }
        for episode in trained["episode"].unique()
    ]


def _candidates(frame: pd.DataFrame) -> list[dict[str, str]]:
    return [
        {
            "trial": str(row["number"]),
            "state": row["state"],
            "shape": (
                f"{shape_text(row)}, {row['intermediate_size']} {row['hidden_act']}"
                if pd.notna(row["hidden_act"])
                else "-"
            ),
            "parameters (M)": as_text(row["num_parameters"], ".2f", scale=1e-6),
            "latency (ms)": as_text(row["latency_ms"], ".2f"),
            "speed-up": as_text(row["speedup"], ".1f", "x"),
            "loss": as_text(row["loss"], ".4f"),
            "sentence R2": as_text(row["sentence_r2"], ".4f"),
            "contextual share": as_text(row["contextual_share"], ".3f"),
            "reward": as_text(row["reward"], ".4f"),
            "seconds": as_text(row["seconds"], ".1f"),
            "reason": "" if pd.isna(row["reason"]) else row["reason"],
        }
        for row in frame.to_dict("records")
    ]


def _limits(budget: Mapping[str, float]) -> str:
    words = {
        "speedup": "at least {:g}x as fast as the teacher",
        "latency_ms": "at most {:g} ms",
        "num_parameters": "at most {:,} parameters",
    }
    return ", ".join(words[name].format(limit) for name, limit in budget.items() if limit) or "none"


def _unusual(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``kdnas glue`` options with which a run's fine-tuning can be repeated.

    Options that have their default in the run are left out.
    """
    usual: dict[str, Any] = {
        "finetune": FinetuneSettings(),
        "trainer": TrainerSettings(),
        "latency": LatencySettings(),
    }
    grid = {f"grid.{name}": value for name, value in (config.get("grid") or {}).items()}
    return grid | {
        f"{part}.{name}": value
        for part, default in usual.items()
        for name, value in config.get(part, {}).items()
        if name not in ("seed", "devices", "logger", "callbacks")
        and value != getattr(default, name, value)
    }


def _teacher_of(run: Run) -> dict[str, str]:
    made_with = read_json(run.made_with) if run.made_with.is_file() else {}
    return {"teacher's sha256": str(made_with["teacher"])} if "teacher" in made_with else {}


def _environment(trials: Iterable[FrozenTrial]) -> dict[str, str]:
    """Return ``{name: text}`` with the end of the search, this machine and its packages.

    The machine is the one that writes the page; workers may have run on others.
    """
    dates = [trial.datetime_complete or trial.datetime_start for trial in trials]
    ended = max((date for date in dates if date), default=None)
    cpuinfo = Path("/proc/cpuinfo")
    found = cpuinfo.is_file() and re.search(r"model name\s*: (.*)", cpuinfo.read_text())
    processor = found[1] if found else platform.machine()
    gpu = gpu_name()
    return {
        "search ended": f"{ended:%Y-%m-%d %H:%M}" if ended else "-",
        "processor": f"{processor}, {os.cpu_count()} cores",
        **({"GPU": gpu} if gpu else {}),
        "system": platform.platform(),
        "Python": platform.python_version(),
        "kdnas": __version__,
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }
