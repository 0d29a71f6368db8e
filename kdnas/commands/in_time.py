"""The ``time_budget`` of a run: which settings are lowered so that it ends in time."""

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
from kdnas.nas.budget import Budget
from kdnas.report.tables import show
from kdnas.system.files import Run, read_json, write_json
from kdnas.tasks.tasks import load_task

# Beyond 2 million tokens, 18 MB of text, scores on tasks have not risen any more (LOG.md).
ENOUGH_TOKENS, FEWEST_TOKENS = 2_000_000, 200_000
# The settings that may be lowered, and why; LOG.md has the figures.
LEVERS = {
    "full_kd.num_epochs": "after one or two epochs, scores on tasks rise no more",
    "data.fraction": "each row costs a pass of the teacher, and one in each epoch of full KD",
    "data.mini_fraction": "a sixth of the rows is enough to rank candidates in the same order",
    "pruner": "only the better half of the candidates is trained beyond an epoch",
    "search.n_trials": "the first candidate, the shape by rule, is seldom far from the best",
    "finetune.num_epochs": "the last resort: it lowers the scores of teacher and students alike",
}
# For an upper bound: FLOP/s of a core (students' small matrices run at 50 to 80 GFLOP/s, LOG.md),
# and seconds before the first step of a candidate or a stage.
SLOWEST_CORE, SLOWEST_START = 20e9, 60.0


@dataclass(frozen=True)
class Choice:
    """The settings that were lowered so that a run fits its time budget; saved in the run's folder.

    Args:
        minutes: minutes of the time budget that were left after the measurement on a few rows.
        as_asked: estimated minutes of the run with the user's settings.
        needed: estimated minutes of the run with the lowered settings.
        after_search: the part of ``needed`` for the stages after the search.
        values: name of each lowered setting in YAML -> the user's value and the lowered one.
    """

    minutes: float
    as_asked: float
    needed: float
    after_search: float
    values: dict[str, tuple[Any, Any]]

    @classmethod
    def of(cls, config: RunConfig, measured: Measured, minutes: float) -> "Choice":
        """Choose the settings to lower so that a run needs at most ``minutes``.

        If that is not possible, all settings are lowered as far as they may be.

        Args:
            config: config of the run.
            measured: what was measured on a few rows.
            minutes: minutes for the whole run.
        """
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
        """Return the ``Choice`` that was saved when the run started, or None if there is none."""
        file = Run(config.root, config.name).choice
        if not file.exists():
            return None
        found = dict(read_json(file))
        values = {name: (ours, theirs) for name, (ours, theirs) in found.pop("values").items()}
        return cls(**found, values=values)

    def keep(self, run: Run) -> None:
        """Save the lowered settings in the run's folder."""
        write_json(run.choice, asdict(self))

    def of_config(self, config: RunConfig) -> RunConfig:
        """Return the config with the lowered values.

        If the user has meanwhile changed a setting in ``config``, the user's value is kept.
        """
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
        """Whether the run is expected to end in time."""
        return self.needed <= self.minutes

    def lines(self) -> Iterator[str]:
        """Yield lines for the terminal that say which settings were lowered and why."""
        if self.values:
            yield f"With these settings the run would need about {self.as_asked:.0f} minutes. Lowered:"
            for name, (asked, chosen) in self.values.items():
                usual = "its default" if asked is None else asked
                yield f"  {name} {chosen} instead of {usual}: {LEVERS[name]}"
        yield (
            f"The run needs about {self.needed:.0f} minutes; {self.minutes:.0f} are left of its "
            "--time-budget."
        )
        if not self.fits:
            yield (
                "That is not in time: give a larger --time-budget, or lower settings yourself (only "
                "those at their defaults are lowered automatically)."
            )


def in_time(config: RunConfig, console: Console) -> tuple[RunConfig, Choice | None]:
    """Lower settings of a run so that it ends within its ``time_budget``.

    The settings to lower are chosen once, when the run starts, and used again when it resumes.

    Args:
        config: config of the run.
        console: where to print what is lowered.

    Returns:
        The lowered config, and the ``Choice`` of lowered values. The choice is None, and the config
        unchanged, if the run has no time budget, is certainly short enough, uses an executor, or
        was started without lowering.
    """
    run, choice = Run(config.root, config.name), Choice.kept(config)
    if choice is None:
        if not _is_open(config) or rough_minutes(config) <= (config.time_budget or 0):
            return config, None
        show(
            console, f"Time budget: {config.time_budget:g} minutes. First a few rows are measured."
        )
        choice, _ = choose(config)
        for line in choice.lines():
            show(console, line)
    elif choice.values and not run.manifest.exists():
        values = ", ".join(f"{name} {chosen}" for name, (_, chosen) in choice.values.items())
        show(console, f"Lowered when the run was started, to end in time: {values}.")
    return choice.of_config(config), choice


def _is_open(config: RunConfig) -> bool:
    """Whether settings may be lowered: there is a time budget, and the run was not started yet.

    With an executor they may not: the speed of other machines is not measured.
    """
    is_begun = Run(config.root, config.name).config.exists()
    return not (is_begun or config.time_budget is None or config.executor)


def choose(config: RunConfig) -> tuple[Choice, Plan]:
    """Measure the speed on a few rows, and choose the settings to lower for the time budget.

    Returns:
        The ``Choice`` of lowered settings, and the ``Plan`` of the run with these settings.
    """
    assert config.time_budget is not None
    begin = time.monotonic()
    measured = measure(config)
    left = config.time_budget - (time.monotonic() - begin) / 60
    choice = Choice.of(config, measured, left)
    return choice, measured.plan(choice.of_config(config))


def plan_in_time(config: SearchConfig) -> tuple[Choice | None, Plan]:
    """Return the expected time, disk and memory of a search or a run, for ``--dry-run``.

    Returns:
        The ``Choice`` of lowered settings, and the ``Plan`` with these settings. The choice is None
        for a search, without a time budget, with an executor, and for a run that was started
        without lowering.
    """
    choice = None
    if isinstance(config, RunConfig):
        choice = Choice.kept(config)
        if choice is None and _is_open(config):
            return choose(config)
        config = choice.of_config(config) if choice else config
    return choice, measure(config).plan(config)


def cut_to(config: RunConfig, measured: Measured, minutes: float) -> RunConfig:
    """Lower settings of a config until the run needs at most ``minutes``.

    Only settings at their defaults are lowered, in this order: epochs of full KD, rows beyond
    ``ENOUGH_TOKENS`` (where scores stop rising), the rows of each candidate and the number of
    candidates, then further rows. The epochs of fine-tuning come last: with one epoch less, all
    other settings are lowered again from the first.

    Args:
        config: config of the run.
        measured: what was measured on a few rows.
        minutes: minutes for the whole run.

    Returns:
        The first config that fits, which may be ``config`` itself. If none fits, the config with
        all settings lowered as far as they may be.
    """
    lowered = config
    for values in _options(config, measured):
        lowered = with_values(config, values)
        if measured.plan(lowered).minutes <= minutes:
            break
    return lowered


def _options(config: RunConfig, measured: Measured) -> Iterator[dict[str, Any]]:
    """Yield sets of settings to lower, for ``cut_to``: first none, then more and more, last all."""
    enough, fewest = _shares(config, measured)
    first = [
        {"full_kd.num_epochs": 2},
        *_fewer_rows(1.0, enough),
        {"full_kd.num_epochs": 1},
        {"data.mini_fraction": 0.2, "pruner": "median"},
        {"search.n_trials": 12},
        {"data.mini_fraction": 0.1},
        {"search.n_trials": 6},
        *_fewer_rows(enough, max(fewest, enough / 4)),
    ]
    last = [
        # Without a budget, no candidate is the shape by rule.
        {"search.n_trials": 6 if config.search.budget == Budget() else 1},
        *_fewer_rows(max(fewest, enough / 4), fewest),
        {"data.mini_fraction": 0.05},
    ]
    epochs = config.finetune.epochs_for(measured.sizes.num_train) if measured.finetuning else 1
    for num_epochs in range(epochs, 0, -1):
        values: dict[str, Any] = {"finetune.num_epochs": num_epochs} if num_epochs < epochs else {}
        for step in [{}, *first, *(last if num_epochs == 1 else [])]:
            values = values | step
            yield {name: value for name, value in values.items() if _is_lower(config, name, value)}


def _shares(config: RunConfig, measured: Measured) -> tuple[float, float]:
    """Return two shares of the text's rows: one that is enough, and the smallest allowed.

    The first has ``ENOUGH_TOKENS`` tokens, or fewer if the teacher's hidden states would otherwise
    exceed ``states.max_gb``. The second has ``FEWEST_TOKENS``, but is not above the first.
    """
    tokens, num_bytes = sum(measured.tokens), measured.teacher.num_bytes
    enough = min(1.0, ENOUGH_TOKENS / tokens)
    if config.states.max_gb:
        enough = min(enough, 1e9 * config.states.max_gb / num_bytes)
    return enough, min(enough, FEWEST_TOKENS / tokens)


def _fewer_rows(share: float, least: float) -> list[dict[str, Any]]:
    """Return values of ``data.fraction`` below ``share``, each a fifth lower, down to ``least``."""
    shares = []
    while share > least:
        share = max(least, 0.8 * share)
        shares.append({"data.fraction": float(f"{share:.2g}")})
    return shares


def _is_lower(config: RunConfig, name: str, value: Any) -> bool:
    """Whether a setting is at its default and ``value`` is lower."""
    asked = value_of(config, name)
    if asked != value_of(RunConfig(teacher="", text=""), name):
        return False
    return name == "pruner" or asked is None or value < asked


def value_of(config: RunConfig, name: str) -> Any:
    """Return a setting by its name in YAML, such as ``data.fraction``."""
    found: Any = config
    for part in name.split("."):
        found = getattr(found, part)
    return found


def with_values(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """Return the config with other ``values`` of some settings.

    ``values`` maps their names in YAML, such as ``data.fraction``, to the new values.
    """
    for name, value in values.items():
        part, _, last = name.rpartition(".")
        changed = replace(getattr(config, part), **{last: value}) if part else value
        config = replace(config, **{part or last: changed})
    return config


def rough_minutes(config: RunConfig) -> float:
    """Return an upper bound of a run's minutes, from its FLOPs on a slow machine, without training.

    Raises:
        UserError: an option, the teacher, the text or the task cannot be used.
    """
    run, teacher, _, _ = validate(config)
    text, source = text_and_task(config.text, config.task, run.text)
    data, search, arch = config.data, config.search, arch_of(teacher.config)
    rows, num_rows = some_rows(text, data.column, 1_000)
    # A token of English has four or five bytes; 3 is for an upper bound.
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
        num_train = len(task.train["label"])
        labelled = num_train * config.finetune.epochs_for(num_train) * num_fits
        flops += 6 * (size + 3 * student) * labelled * config.finetune.max_length / 2
    seconds = flops / (SLOWEST_CORE * torch.get_num_threads())
    return (seconds + SLOWEST_START * (2 + search.n_trials)) / 60
