"""``kdnas run --smoke``: every stage on a few rows, to see in a minute whether a run works."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from kdnas.commands.config import RunConfig
from kdnas.commands.few_rows import NUM_ROWS, with_few_rows
from kdnas.commands.inputs import validate
from kdnas.commands.run import run_stages
from kdnas.nas.budget import Budget
from kdnas.report.tables import show, text_table
from kdnas.system.files import nearest_folder, owned, sweep

NUM_CANDIDATES = 2


def smoke(config: RunConfig, console: Console) -> None:
    """Run every stage on a few rows, in a temporary folder, and show the seconds of each.

    If a stage fails, the folder is kept. The candidates are the first that the sampler proposes,
    and may exceed the budget.

    Args:
        config: options of the run.
        console: where to print.

    Raises:
        UserError: something that the user gave cannot be used.
        Exception: any other error of a stage.
    """
    validate(config)
    place, name = nearest_folder(Path(config.root)), f"{config.name}-smoke"
    sweep(place, f"{name}.*")
    folder = Path(tempfile.mkdtemp(dir=place, prefix=owned(name)))
    show(
        console,
        f"Every stage on {NUM_ROWS} rows, whose scores mean nothing; files are in {folder} until the end.",
    )
    try:
        seconds = run_stages(_shrunk(config, folder), console)
    except Exception:
        show(console, f"The smoke run failed; its files are kept until the next one: {folder}")
        raise
    except BaseException:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)

    seconds["in all"] = sum(seconds.values())
    rows = [{"stage": stage, "seconds": f"{taken:.1f}"} for stage, taken in seconds.items()]
    console.print(text_table("", rows, words=["stage"]))
    show(
        console,
        f"Every stage works. On {NUM_ROWS} rows the scores mean nothing. No file is kept.",
    )


def _shrunk(config: RunConfig, folder: Path) -> RunConfig:
    small, _ = with_few_rows(config, folder)
    few_candidates = replace(
        config.search,
        n_trials=min(config.search.n_trials, NUM_CANDIDATES),
        num_epochs=1,
        budget=Budget(),
    )
    return replace(
        small,
        workers=min(config.num_workers, NUM_CANDIDATES),
        data=replace(small.data, held_out_fraction=max(small.data.held_out_fraction, 0.25)),
        search=few_candidates,
        full_kd=replace(config.full_kd, num_epochs=min(config.full_kd.num_epochs, 1)),
        grid=None,
        finetune=replace(config.finetune, num_epochs=1),
        latency=replace(config.latency, min_seconds=min(config.latency.min_seconds, 0.05)),
    )
