"""``kdnas report``: the report of a run made anew, or several runs beside each other, finished or not."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from kdnas.commands.config import ReportConfig
from kdnas.models.arch import StudentArch
from kdnas.nas.study import read_study
from kdnas.nas.trials import Study, best_trial, trained, trials_frame
from kdnas.report.page import stage_results, write_page, write_report
from kdnas.report.pictures import COLOURS, as_svg, best_so_far, fronts
from kdnas.report.tables import as_text, text_table
from kdnas.system.errors import UserError, nearest
from kdnas.system.files import Run, read_json
from kdnas.system.manifest import renew
from kdnas.system.yaml import flat, read_yaml

# What a loss depends on, beside what is asked by name: only where all of it is equal are two losses of one scale.
SCALE = (
    "begins as",
    "teacher",
    "text",
    "num_train_rows",
    "states.",
    "data.",
    "recipe.",
    "trainer.",
    "loss",
    "search.num_epochs",
)
REWARD = (*SCALE, "search.alpha", "search.beta", "latency.")
NO_QUESTION = (
    "name",
    "root",
    "storage",
    "states.folder",
    "workers",
    "data.num_workers",
)  # changes no result


def report(config: ReportConfig, console: Console) -> Path:
    """Write one run's report anew, or a page that compares several.

    Returns:
        The page.

    Raises:
        UserError: a run is not there, is broken, or is named twice.
    """
    runs = [Run(config.root, name) for name in config.run]
    studies = [_study_of(run, config.storage, is_only=len(runs) == 1) for run in runs]
    output = Path(config.output) if config.output else None
    if len(runs) == 1:
        page = write_report(runs[0], studies[0], output=output)
    else:
        page = compare(runs, studies, output or Path(config.root) / "comparison.html", console)
    renew(page)
    console.print(f"Report: {page}", soft_wrap=True, highlight=False)
    return page


def _study_of(run: Run, storage: str | None, is_only: bool) -> Study:
    if not run.config.is_file():
        there = sorted(path.parent.name for path in run.root.glob("*/config.yaml"))
        hint = nearest(run.name, there) if there else " There is none."
        raise UserError(f"There is no run {run.name!r} in {str(run.root)!r}.{hint}")
    config = read_yaml(run.config)
    known = config.get("storage")  # of several runs, one without has its own file
    asked = storage if known or is_only else None
    return read_study(asked or known or run.study_db, str(config.get("name", run.name)))


def compare(runs: list[Run], studies: list[Study], output: Path, console: Console) -> Path:
    """Write a page that holds runs beside each other, and show its table.

    Args:
        runs: two at least.
        studies: theirs, in the same order.
        output: the page.
        console: for the table, and for what makes them no fair comparison.

    Returns:
        The page.

    Raises:
        UserError: a file of a run is damaged.
    """
    names = [run.name for run in runs]
    configs = {run.name: flat(read_yaml(run.config)) for run in runs}
    asked = _differing(configs, lambda key: key not in NO_QUESTION)
    identities = {
        run.name: read_json(run.made_with) if run.made_with.is_file() else {}
        for run, study in zip(runs, studies, strict=True)
    }
    unlike = _differing(identities, lambda key: key.startswith(REWARD))
    rows = [_found(run, study) for run, study in zip(runs, studies, strict=True)]
    notes = []
    if any(row["setting"] == "teacher" for row in unlike):
        notes.append("They have different teachers.")
    if unlike:
        keys = ", ".join(row["setting"] for row in unlike)
        what = (
            "Losses and rewards"
            if any(row["setting"].startswith(SCALE) for row in unlike)
            else "Rewards"
        )
        notes.append(f"{what} are not of one scale, for these differ: {keys}.")
    best = max(
        (row for row in rows if row["reward"] != "-"),
        key=lambda row: float(row["reward"]),
        default=None,
    )
    frames = dict(zip(names, map(trials_frame, studies), strict=True))
    rewards = {
        name: [trial.value or 0.0 for trial in trained(study)]
        for name, study in zip(names, studies, strict=True)
    }
    measured = any(frame["loss"].notna().any() for frame in frames.values())
    write_page(
        output,
        "comparison.html.j2",
        title=f"kdnas: {', '.join(names)}",
        asked=asked,
        notes=notes,
        best=None if notes else best,
        rows=rows,
        progress=as_svg("Best reward by trained candidates", best_so_far(rewards))
        if any(rewards.values())
        else None,
        fronts=as_svg("Loss against latency of all runs", fronts(frames)) if measured else None,
        colours={name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)},
    )
    found = [
        {"": heading} | {row["run"]: row[heading] for row in rows} for heading in list(rows[0])[1:]
    ]
    lines = found + [dict(zip(found[0], row.values(), strict=True)) for row in asked]
    console.print(text_table(f"{len(runs)} runs", lines, words=[""]))
    for note in notes:
        console.print(note, soft_wrap=True, highlight=False)
    return output


def _differing(
    values: Mapping[str, Mapping[str, Any]], is_meant: Callable[[str], bool]
) -> list[dict[str, str]]:
    """The settings that are not the same in all runs, a row each."""
    keys = dict.fromkeys(key for settings in values.values() for key in settings if is_meant(key))
    return [
        {"setting": key, **{name: str(settings.get(key, "-")) for name, settings in values.items()}}
        for key in keys
        if len({str(settings.get(key, "-")) for settings in values.values()}) > 1
    ]


def _found(run: Run, study: Study) -> dict[str, str]:
    """A run in a row: the best candidate after its mini-KD and, where they are there, the last stages' figures."""
    full_kd, results, exported = stage_results(run)
    best = best_trial(study)
    attrs = best.user_attrs if best else {}
    student = results["models"]["student"] if results else {}
    arch = StudentArch.from_dict(attrs["arch"]) if best else None
    stages = {
        "exported": exported,
        "fine-tuned": results,
        "full KD": full_kd,
        "searched": run.best_student.is_file(),
    }
    return {
        "run": run.name,
        "stage": next((name for name, done in stages.items() if done), "searching"),
        "candidates trained": str(len(trained(study))),
        "student": f"{arch.num_hidden_layers} x {arch.hidden_size}, {arch.num_attention_heads} heads"
        if arch
        else "-",
        "reward": as_text(attrs.get("reward"), ".4f"),
        "loss": as_text(attrs.get("loss"), ".4f"),
        "contextual share": as_text(attrs.get("contextual_share"), ".3f"),
        "speed-up": as_text(student.get("speedup", attrs.get("speedup")), ".1f", "x"),
        "score": as_text(student.get("score"), ".3f"),
        "share kept (%)": as_text(student.get("share_kept"), ".1f", scale=100),
    }
