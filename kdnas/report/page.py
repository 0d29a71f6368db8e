"""report.html: the story of one run, in one file that opens from disk."""

import base64
import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup
from rich.table import Table

from kdnas import __version__
from kdnas.deploy.latency import LatencySettings, is_unsteady, measured_by
from kdnas.models.arch import StudentArch
from kdnas.nas.budget import Budget
from kdnas.nas.trials import ARCH, FrozenTrial, Study, begun, best_trial, in_words, trials_frame
from kdnas.report.pictures import BLUE, GREY, INK, MOST_NAMED, ORANGE, as_svg, curves, pareto
from kdnas.report.tables import as_text, text_table
from kdnas.report.trust import checks
from kdnas.system.files import Run, read_json, write_text
from kdnas.system.yaml import read_yaml
from kdnas.tasks.finetune import FinetuneSettings
from kdnas.training.precision import gpu_name
from kdnas.training.trainer import TrainerSettings

SHAPE = [
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
]
MODELS = {"teacher": "teacher", "student": "best student", "random": "random start"}
PACKAGES = ("torch", "transformers", "optuna", "lightning")


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
            "parameters (M)": as_text(row["num_parameters"], ".2f", scale=1e-6),
            "MB": as_text(row["megabytes"], ".1f"),
            "latency (ms)": as_text(row["latency_ms"], ".2f"),
            "IQR (ms)": as_text(row["latency_iqr_ms"], ".2f"),
            "speed-up": as_text(row["speedup"], ".1f", "x"),
            results["task"]["metric"]: as_text(row["score"], ".3f"),
            "share kept (%)": as_text(row["share_kept"], ".1f", scale=100),
        }
        for label, row in ((label, results["models"][name]) for name, label in MODELS.items())
    ]


def result_table(results: Mapping[str, Any], how: Mapping[str, Any]) -> Table:
    """``result_rows`` for the terminal.

    Args:
        results: what ``glue/results.json`` holds.
        how: latency was measured; fields of ``LatencySettings``.
    """
    table = text_table(
        f"Fine-tuned on {results['task']['name']}", result_rows(results), words=["model"]
    )
    table.caption = f"Latency: {measured_by(how)}. {caution(results)}".rstrip()
    return table


def caution(results: Mapping[str, Any]) -> str:
    """What takes the final figures their meaning, if anything does.

    Args:
        results: what ``glue/results.json`` holds.
    """
    models = results["models"]
    said = []
    if models["random"]["score"] >= models["student"]["score"]:
        said.append(
            "A random start of its shape scores as high, so this task does not tell what was distilled."
        )
    if any(is_unsteady(row["latency_ms"], row["latency_iqr_ms"]) for row in models.values()):
        said.append(
            "Latencies spread by more than a tenth: the machine was busy; `kdnas latency` measures them again."
        )
    return " ".join(said)


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a page: one file that asks no network for anything, and runs no script but its own.

    Args:
        path: of the page.
        template: in ``kdnas/report/templates``.
        values: for the template; text in them stays text.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kdnas.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = environment.get_template("page.js.j2").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template(template).render(
        script=Markup(script), script_sha256=digest, **values
    )
    write_text(path, page)


def stage_results(run: Run) -> tuple[Any, Any, Any]:
    """What the stages after the search have written: of full KD, of fine-tuning, of the export; None where not yet.

    Raises:
        UserError: a file is damaged.
    """
    full_kd, results, manifest = (
        read_json(path) if path.is_file() else None
        for path in (
            run.full_kd / "result.json",
            run.glue / "results.json",
            run.student / "manifest.json",
        )
    )
    return full_kd, results, manifest and manifest.get("checks")


def write_report(
    run: Run, study: Study, *, title: str | None = None, output: Path | None = None
) -> Path:
    """Write ``report.html``: one file that opens from disk and asks no network for anything.

    On one machine the same run gives the same bytes: its date is that of the study's last trial. What was not run is
    left out.

    Args:
        run: its ``config.yaml``, and what there is of ``full_kd/result.json``, ``glue/results.json`` and
            ``student/manifest.json``, are read.
        study: its search; ``study.user_attrs["budget"]``, if any, maps ``speedup`` (at least) or ``latency_ms``
            (at most) to its limit.
        title: heading of the page; the run's name by default.
        output: the page; ``report.html`` of the run by default.

    Returns:
        The path of the report.

    Raises:
        UserError: a file of the run is damaged.
    """
    full_kd, results, exported = stage_results(run)
    trials = begun(study)
    best = best_trial(study)
    number = best.number if best else None
    frame = trials_frame(study)
    budget = study.user_attrs.get("budget") or {}
    config = read_yaml(run.config)
    histories = {
        trial.number: trial.user_attrs["history"]
        for trial in trials
        if trial.user_attrs.get("history") and "twin_of" not in trial.user_attrs
    }
    colours = {"teacher": INK, "student": BLUE, "random": GREY}
    draw_pareto = pareto(frame, number, budget)
    frame = frame.assign(state=[in_words(trial) for trial in trials])
    frame = frame.sort_values(["reward", "number"], ascending=[False, True])

    shown = sorted([trial for trial in frame["number"] if trial in histories][:MOST_NAMED])

    def by_epoch(name: str, label: str) -> str | None:
        lines = [
            (f"trial {trial}", histories[trial], ORANGE if trial == number else GREY)
            for trial in shown
        ] + ([("full KD", full_kd["history"], BLUE)] if full_kd else [])
        return as_svg(f"{label} by epoch", curves(label, name, lines)) if lines else None

    def scores() -> str | None:
        if not results:
            return None
        lines = [
            (MODELS[name], results["models"][name]["history"], colour)
            for name, colour in colours.items()
        ]
        return as_svg(
            "Fine-tuning score by epoch", curves(results["task"]["metric"], "score", lines)
        )

    output = output or run.report
    write_page(
        output,
        "report.html.j2",
        title=title or f"kdnas: {run.name}",
        headline=_headline(frame, best, full_kd, results),
        counts=", ".join(
            f"{count} {state}" for state, count in frame["state"].value_counts(sort=False).items()
        ),
        asked=_asked(run, config, budget),
        shape=best and StudentArch.from_dict(best.user_attrs["arch"]),
        results=results,
        result_rows=results and result_rows(results),
        measured_by=measured_by(config.get("latency", {})),
        pareto=draw_pareto and as_svg("Loss against latency of every candidate", draw_pareto),
        errors=by_epoch("loss", "held-out loss"),
        shares=by_epoch("contextual_share", "contextual share"),
        scores=scores(),
        best_shown=len(shown) < len(histories) and len(shown),
        candidates=_candidates(frame),
        best=best and str(best.number),
        checks=checks(frame, number, histories, full_kd, results, exported, Budget(**budget)),
        uses=_uses(run, config, results, is_exported=exported is not None),
        config=run.config.read_text(encoding="utf-8"),
        environment=_environment(trials),
    )
    return output


def _candidates(frame: pd.DataFrame) -> list[dict[str, str]]:
    return [
        {
            "trial": str(row["number"]),
            "state": row["state"],
            "shape": "{} x {}, {} heads, {} {}".format(*map(row.get, SHAPE))
            if pd.notna(row["hidden_act"])
            else "-",
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
        f"is {student['speedup']:.1f}x as fast and {kept}. {caution(results) if results else ''}"
    ).rstrip()


def _asked(run: Run, config: Mapping[str, Any], budget: Mapping[str, float]) -> dict[str, str]:
    limits = {"speedup": "at least {:g}x as fast as the teacher", "latency_ms": "at most {:g} ms"}
    limits["num_parameters"] = "at most {:,} parameters"
    sampler, search = config.get("sampler", "tpe"), config.get("search", {})
    by = sampler if isinstance(sampler, str) else sampler.get("class_path")
    return {name: str(config[name]) for name in ("teacher", "text", "task") if config.get(name)} | {
        "search": f"{search.get('n_trials', '-')} candidates by {by}, epochs of each: {search.get('num_epochs', '-')}",
        "budget": ", ".join(limits[name].format(limit) for name, limit in budget.items() if limit)
        or "none",
        "configuration": str(run.config),
        "look closer": f"tensorboard --logdir {shlex.quote(str(run.folder))}",
    }


def _uses(run: Run, config: Mapping[str, Any], results: Any, is_exported: bool) -> dict[str, str]:
    """What to do next, as commands."""
    if not is_exported:
        return {
            "Distil it on all rows, export it": f"kdnas run --config {shlex.quote(str(run.config))}"
        }
    student, teacher, encoder = (
        shlex.quote(str(value))
        for value in (run.student, config["teacher"], run.full_kd / "encoder")
    )
    kind = "AutoModelForSequenceClassification" if results else "AutoModel"
    uses = {
        "Without torch": f'python {shlex.quote(str(run.student / "predict.py"))} --int8 "The text to read."',
        "With transformers": (
            f"from transformers import {kind}, AutoTokenizer\n"
            f"tokenizer = AutoTokenizer.from_pretrained({str(run.student)!r})\n"
            f"model = {kind}.from_pretrained({str(run.student)!r})"
        ),
        "Its latency where it will run": (
            f"kdnas latency --model {teacher} --model {student} --backend torch onnxruntime onnxruntime-int8"
        ),
    }
    if results:
        task = shlex.quote(
            str(run.text / "which_package" if config["task"] == "quickstart" else config["task"])
        )
        uses["Its score with several seeds"] = (
            f"kdnas glue --model {teacher} --model {encoder} --task {task} --seeds 3 --name {run.name}-seeds"
            + "".join(
                f" --{name} {shlex.quote(str(value))}" for name, value in _unusual(config).items()
            )
        )
    return uses | {
        "Whether the files are as they were made": f"kdnas verify {shlex.quote(str(run.folder))}"
    }


def _unusual(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run asked of fine-tuning and latency that is not the default, which `kdnas glue` would take."""
    usual: dict[str, Any] = {
        "finetune": FinetuneSettings(),
        "trainer": TrainerSettings(),
        "latency": LatencySettings(),
    }
    return {
        f"{part}.{name}": value
        for part, default in usual.items()
        for name, value in config.get(part, {}).items()
        if name != "seed" and value != getattr(default, name, value)
    }


def _environment(trials: Iterable[FrozenTrial]) -> dict[str, str]:
    """When the search ended, and which machine writes the page: workers, and what came later, may have had others."""
    dates = [
        date for trial in trials for date in (trial.datetime_start, trial.datetime_complete) if date
    ]
    cpuinfo = Path("/proc/cpuinfo")
    processor = (
        re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    )
    return {
        "search ended": f"{max(dates):%Y-%m-%d %H:%M}" if dates else "-",
        "processor": f"{processor[1] if processor else platform.machine()}, {os.cpu_count()} cores",
        **({"GPU": name} if (name := gpu_name()) else {}),
        "system": platform.platform(),
        "Python": platform.python_version(),
        "kdnas": __version__,
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }
