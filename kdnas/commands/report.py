"""``kdnas report``: write the report of one run again, or compare several runs on a page."""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from rich.console import Console

from kdnas.commands.config import ReportConfig
from kdnas.nas.study import read_study
from kdnas.nas.trials import Study, best_trial, results_in, trained, trials_frame
from kdnas.report.page import stage_results, write_page, write_report
from kdnas.report.pictures import COLOURS, as_svg, best_so_far, fronts
from kdnas.report.tables import as_text, shape_text, show, text_table
from kdnas.system.errors import UserError, nearest
from kdnas.system.files import Run, read_json
from kdnas.system.manifest import renew
from kdnas.system.yaml import flat, read_yaml

# The settings that a loss depends on, by the beginnings of their names: losses can be compared only
# if all of these are equal.
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
REWARD = (*SCALE, "search.alpha", "search.beta", "latency.")  # the same for rewards
# Settings that change no result, so their differences are not shown.
NO_QUESTION = ("name", "root", "storage", "states.folder", "workers", "data.num_workers")


def report(config: ReportConfig, console: Console) -> None:
    """Write the report of one run again, or a page that compares several.

    Args:
        config: options of ``kdnas report``.
        console: where to print.

    Raises:
        UserError: there is no such run, or its study cannot be read.
    """
    runs = [Run(config.root, name) for name in config.run]
    for run in runs:
        run.refuse_links()
    studies = [_study_of(run, config.storage, is_only=len(runs) == 1) for run in runs]
    output = Path(config.output) if config.output else None
    if len(runs) == 1:
        page = write_report(runs[0], studies[0], output=output)
    else:
        page = compare(runs, studies, output or Path(config.root) / "comparison.html", console)
    renew(page)
    show(console, f"Report: {page}")


def _study_of(run: Run, storage: str | None, is_only: bool) -> Study:
    if not run.config.is_file():
        # The folder of a `kdnas fit` has a config too, but no study.
        there = sorted(
            path.parent.name
            for path in run.root.glob("*/config.yaml")
            if path.with_name("made_with.json").is_file()
        )
        hint = nearest(run.name, there) if there else " It holds no run: give another --root."
        raise UserError(f"There is no run {run.name!r} in {str(run.root)!r}.{hint}")
    config = read_yaml(run.config)
    # Among several runs, --storage is only for those that have a database.
    known = config.get("storage")
    asked = storage if known or is_only else None
    where, name = asked or known or run.study_db, str(config.get("name", run.name))
    return read_study(where, name, results_in(run.folder))


def compare(runs: list[Run], studies: list[Study], output: Path, console: Console) -> Path:
    """Write a page that compares two or more runs, print its table, and return the page's path."""
    names = [run.name for run in runs]
    rows = [_row(run, study) for run, study in zip(runs, studies, strict=True)]
    configs = [flat(read_yaml(run.config)) for run in runs]
    asked = _differing(names, configs, lambda key: key not in NO_QUESTION)
    identities = [read_json(run.made_with) if run.made_with.is_file() else {} for run in runs]
    notes = _notes(_differing(names, identities, lambda key: key.startswith(REWARD)))
    rewarded = [row for row in rows if row["reward"] != "-"]
    best = max(rewarded, key=lambda row: float(row["reward"]), default=None)

    progress, loss_fronts = None, None
    rewards = [[trial.value or 0.0 for trial in trained(study)] for study in studies]
    if any(rewards):
        by_name = dict(zip(names, rewards, strict=True))
        progress = as_svg("Best reward by trained candidates", best_so_far(by_name))
    frames = dict(zip(names, map(trials_frame, studies), strict=True))
    if any(frame["loss"].notna().any() for frame in frames.values()):
        loss_fronts = as_svg("Loss against latency of all runs", fronts(frames))
    write_page(
        output,
        "comparison.html.j2",
        title=f"kdnas: {', '.join(names)}",
        asked=asked,
        notes=notes,
        best=None if notes else best,
        rows=rows,
        progress=progress,
        fronts=loss_fronts,
        colours=dict(zip(names, cycle(COLOURS), strict=False)),
    )

    lines = [
        {"": heading} | {row["run"]: row[heading] for row in rows}
        for heading in rows[0]
        if heading != "run"
    ]
    lines += [{"": row["setting"]} | {name: row[name] for name in names} for row in asked]
    console.print(text_table(f"{len(runs)} runs", lines, words=[""]))
    for note in notes:
        show(console, note)
    return output


def _notes(unlike: list[dict[str, str]]) -> list[str]:
    """Return sentences on why losses or rewards of the runs cannot be compared; [] if they can.

    Args:
        unlike: rows from ``_differing``, for the settings that change rewards.
    """
    keys = [row["setting"] for row in unlike]
    notes = ["The runs have different teachers."] if "teacher" in keys else []
    if keys:
        what = "Losses and rewards" if any(key.startswith(SCALE) for key in keys) else "Rewards"
        notes.append(
            f"{what} cannot be compared, because these settings differ: {', '.join(keys)}."
        )
    return notes


def _differing(
    names: Sequence[str],
    settings: Sequence[Mapping[str, Any]],
    is_meant: Callable[[str], bool],
) -> list[dict[str, str]]:
    """Return a row for each setting that differs between runs, with its value in each run.

    Args:
        names: names of the runs.
        settings: settings of each run, in the order of ``names``.
        is_meant: returns, given the name of a setting, whether to compare this setting.
    """
    rows = []
    for key in dict.fromkeys(key for one in settings for key in one if is_meant(key)):
        values = [str(one.get(key, "-")) for one in settings]
        if len(set(values)) > 1:
            rows.append({"setting": key, **dict(zip(names, values, strict=True))})
    return rows


def _row(run: Run, study: Study) -> dict[str, str]:
    """Return a run's row of the table: best candidate and results of finished later stages."""
    full_kd, results, exported = stage_results(run)
    best = best_trial(study)
    attrs = best.user_attrs if best else {}
    student = results["models"]["student"] if results else {}
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
        "student": shape_text(attrs["arch"]) if best else "-",
        "reward": as_text(attrs.get("reward"), ".4f"),
        "loss": as_text(attrs.get("loss"), ".4f"),
        "contextual share": as_text(attrs.get("contextual_share"), ".3f"),
        "speed-up": as_text(student.get("speedup", attrs.get("speedup")), ".1f", "x"),
        "score": as_text(student.get("score"), ".3f"),
        "share kept (%)": as_text(student.get("share_kept"), ".1f", scale=100),
    }
