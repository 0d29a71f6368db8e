"""A run that ends in time: what is lowered for it, in which order, and what was chosen."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console

from kdnas.commands.config import RunConfig, SearchConfig
from kdnas.commands.inputs import validate
from kdnas.commands.plan import Measured, Plan, measure
from kdnas.data.quickstart import text_and_task
from kdnas.data.readers import some_rows
from kdnas.models.families import arch_of
from kdnas.report.tables import show
from kdnas.system.files import Run, read_json, write_json
from kdnas.tasks.tasks import load_task

# Of 18 MB of text, 2 million tokens, students learn all that tasks have shown (LOG.md).
ENOUGH_TOKENS, FEWEST_TOKENS = 2_000_000, 200_000
# What is lowered, and why just that; LOG.md has the figures.
LEVERS = {
    "full_kd.num_epochs": "after one or two epochs tasks gain nothing more",
    "data.fraction": "each row costs a pass of the teacher and one of full KD",
    "data.mini_fraction": "a sixth of the rows ranks candidates in the same order",
    "pruner": "the better half of the candidates goes on after an epoch",
    "search.n_trials": "the ranking is noisy, so the last candidates matter least",
    "finetune.num_epochs": "the last resort, for teacher and students alike, who all lose by it",
}
# A core trains at 50 to 80 GFLOP/s with the small matrices of students (LOG.md).
SLOWEST_CORE, SLOWEST_START = 20e9, 60.0


@dataclass(frozen=True)
class Choice:
    """What a run is lowered to; it is kept with the run, which goes on with it.

    Args:
        minutes: that were left for the run when this was measured.
        as_asked: minutes that it would need as it was asked for.
        needed: minutes that it needs as it is.
        after_search: those of full KD and what follows.
        values: by the name of a lever, what was asked for, and what is done.
    """

    minutes: float
    as_asked: float
    needed: float
    after_search: float
    values: dict[str, tuple[Any, Any]]

    @classmethod
    def of(cls, config: RunConfig, measured: Measured, minutes: float) -> "Choice":
        """The choice for so many minutes."""
        chosen = cut_to(config, measured, minutes)
        values = {name: (value_of(config, name), value_of(chosen, name)) for name in LEVERS}
        plan = measured.plan(chosen)
        return cls(
            minutes,
            measured.plan(config).minutes,
            plan.minutes,
            plan.minutes_after_search,
            {name: (ours, theirs) for name, (ours, theirs) in values.items() if ours != theirs},
        )

    @classmethod
    def kept(cls, config: RunConfig) -> "Choice | None":
        """The choice that the run was begun with."""
        file = Run(config.root, config.name).choice
        if not file.exists():
            return None
        found = dict(read_json(file))
        values = {name: (ours, theirs) for name, (ours, theirs) in found.pop("values").items()}
        return cls(**found, values=values)

    def keep(self, run: Run) -> None:
        """Write it down."""
        write_json(run.choice, asdict(self))

    def of_config(self, config: RunConfig) -> RunConfig:
        """The config as chosen; what is asked for otherwise by now stays as it is asked for."""
        return with_values(
            config,
            {
                name: chosen
                for name, (asked, chosen) in self.values.items()
                if value_of(config, name) == asked
            },
        )

    @property
    def fits(self) -> bool:
        """Whether the run ends in time."""
        return self.needed <= self.minutes

    def lines(self) -> Iterator[str]:
        """For the terminal."""
        if self.values:
            yield f"As it is asked for, the run needs about {self.as_asked:.0f} minutes. Lowered:"
            for name, (asked, chosen) in self.values.items():
                yield f"  {name} {chosen} for {asked}: {LEVERS[name]}"
        yield f"It needs about {self.needed:.0f} minutes, and has {self.minutes:.0f}."
        if not self.fits:
            yield (
                "That is not in time: give a larger --time-budget, or ask for less (what is not at "
                "its default is not lowered)."
            )


def in_time(config: RunConfig, console: Console) -> tuple[RunConfig, Choice | None]:
    """The config that ends in time: as it was chosen when the run was begun, or as it is now."""
    run, choice = Run(config.root, config.name), Choice.kept(config)
    if choice is None:
        if not _is_open(config) or rough_minutes(config) <= (config.time_budget or 0):
            return config, None
        show(console, f"Time budget: {config.time_budget:g} minutes. Measuring some rows first.")
        choice, _ = choose(config)
        for line in choice.lines():
            show(console, line)
    elif choice.values and not run.manifest.exists():
        values = ", ".join(f"{name} {chosen}" for name, (_, chosen) in choice.values.items())
        show(console, f"As chosen when it was begun, to end in time: {values}.")
    return choice.of_config(config), choice


def _is_open(config: RunConfig) -> bool:
    """Whether a run is to end in time, and is not begun. What other machines do is not measured."""
    is_begun = Run(config.root, config.name).config.exists()
    return not (is_begun or config.time_budget is None or config.executor)


def choose(config: RunConfig) -> tuple[Choice, Plan]:
    """Measure some rows, and choose; with the plan that follows."""
    assert config.time_budget is not None
    begin = time.monotonic()
    measured = measure(config)
    left = config.time_budget - (time.monotonic() - begin) / 60
    choice = Choice.of(config, measured, left)
    return choice, measured.plan(choice.of_config(config))


def plan_in_time(config: SearchConfig) -> tuple[Choice | None, Plan]:
    """What a search or a run will need; of a run with what is chosen for it."""
    choice = None
    if isinstance(config, RunConfig):
        choice = Choice.kept(config)
        if choice is None and _is_open(config):
            return choose(config)
        config = choice.of_config(config) if choice else config
    return choice, measure(config).plan(config)


def cut_to(config: RunConfig, measured: Measured, minutes: float) -> RunConfig:
    """Lower some values of a config until it needs no more than so many minutes.

    A value that is not at its default was asked for, and stays. Full KD's epochs are lowered first,
    then rows beyond what students learn from, then rows, candidates and at last the epochs of
    fine-tuning; the first config that fits is taken, or the lowest of all.

    Args:
        config: what is asked for.
        measured: on some rows.
        minutes: for the whole run.

    Returns:
        The config; the same where it fits.
    """
    lowered = config
    for values in _options(config, measured):
        lowered = with_values(config, values)
        if measured.plan(lowered).minutes <= minutes:
            break
    return lowered


def _options(config: RunConfig, measured: Measured) -> Iterator[dict[str, Any]]:
    """What may be lowered together, from nothing to all."""
    enough, fewest = _shares(config, measured)
    first = [
        {"full_kd.num_epochs": 2},
        *_fewer_rows(1.0, enough),
        {"full_kd.num_epochs": 1},
        {"data.mini_fraction": 0.2, "pruner": "median"},
        {"data.mini_fraction": 0.15},
        {"data.mini_fraction": 0.1},
        *_fewer_rows(enough, max(fewest, enough / 2)),
        {"search.n_trials": 16},
        *_fewer_rows(max(fewest, enough / 2), max(fewest, enough / 4)),
        {"search.n_trials": 12},
    ]
    last = [
        *_fewer_rows(max(fewest, enough / 4), fewest),
        {"search.n_trials": 8},
        {"data.mini_fraction": 0.05},
    ]
    epochs = config.finetune.num_epochs if measured.finetuning else 1
    for num_epochs in range(epochs, 0, -1):
        values: dict[str, Any] = {"finetune.num_epochs": num_epochs} if epochs > 1 else {}
        for step in [{}, *first, *(last if num_epochs == 1 else [])]:
            values = values | step
            yield {name: value for name, value in values.items() if _is_lower(config, name, value)}


def _shares(config: RunConfig, measured: Measured) -> tuple[float, float]:
    """Of the text: what is enough, with states that fit on the disk; and the fewest rows."""
    tokens, num_bytes = sum(measured.tokens), measured.teacher.num_bytes
    enough = min(1.0, ENOUGH_TOKENS / tokens)
    if config.states.max_gb:
        enough = min(enough, 1e9 * config.states.max_gb / num_bytes)
    return enough, min(enough, FEWEST_TOKENS / tokens)


def _fewer_rows(share: float, least: float) -> list[dict[str, Any]]:
    """Steps from one share of the text to another, each a fifth less."""
    shares = []
    while share > least:
        share = max(least, 0.8 * share)
        shares.append({"data.fraction": float(f"{share:.2g}")})
    return shares


def _is_lower(config: RunConfig, name: str, value: Any) -> bool:
    """Whether a value is at its default, and would be lowered."""
    asked = value_of(config, name)
    if asked != value_of(RunConfig(teacher="", text=""), name):
        return False
    return name == "pruner" or value < asked


def value_of(config: RunConfig, name: str) -> Any:
    """A value by its name in YAML: ``data.fraction``."""
    found: Any = config
    for part in name.split("."):
        found = getattr(found, part)
    return found


def with_values(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """The config with some values, by their names."""
    for name, value in values.items():
        part, _, last = name.rpartition(".")
        changed = replace(getattr(config, part), **{last: value}) if part else value
        config = replace(config, **{part or last: changed})
    return config


def rough_minutes(config: RunConfig) -> float:
    """An upper bound by counting FLOPs, for a slow machine; no step is made."""
    run, teacher, _, _ = validate(config)
    text, source = text_and_task(config.text, config.task, run.text)
    data, search, arch = config.data, config.search, arch_of(teacher.config)
    rows, num_rows = some_rows(text, data.column, 1_000)
    # A token has four or five bytes of English.
    few = sum(min(data.max_length, len((row or "").encode()) / 3) for row, _ in rows)
    tokens = data.fraction * num_rows * few / max(1, len(rows))

    width = arch.hidden_size
    size = arch.num_hidden_layers * (4 * width**2 + 2 * width * arch.intermediate_size)
    student = size / (search.budget.speedup or 1)
    seen = data.mini_fraction + data.held_out_fraction
    passes = search.n_trials * search.num_epochs * seen + config.full_kd.num_epochs
    flops = 2 * size * tokens * data.num_mask_variants + 6 * student * tokens * passes
    if source:
        task, grid = load_task(source), config.grid
        num_fits = 1 if grid is None else 1 + len(grid.batch_sizes) * len(grid.learning_rates)
        labelled = len(task.train["label"]) * config.finetune.num_epochs * num_fits
        flops += 6 * (size + 3 * student) * labelled * config.finetune.max_length / 2
    seconds = flops / (SLOWEST_CORE * torch.get_num_threads())
    return (seconds + SLOWEST_START * (2 + search.n_trials)) / 60
