"""How many candidates each sampler needs: replays of a search over a table of trained students.

``--make`` trains every architecture of a small space once, by the search's own ``evaluate``, into ``--table``; it goes on
where it was stopped. Without it, the product's own search loop runs on the table, once for each sampler and seed: the
evaluations until the best reward so far is within 1 % of the table's best, regret by evaluations, and wall seconds a
proposal. Without a budget the best of the table is the teacher's own shape, a corner that is easily found; so the same
with budgets (``--speedup``), where refused students cost nothing, as in the product. Searches are paired by seed where
two samplers are compared. Before that, without any search: the rank of the shape by rule, the first candidate of a
search with a budget, among all students within each of several budgets. At last the same for pruners, on the held-out
losses after each epoch: the share of the training seconds that they save, and the best reward that they lose. A
candidate that a pruner ended is never the best, as in the product.

    python benchmarks/samplers.py --make --text train.parquet     the table, about an hour and a half on two cores
    python benchmarks/samplers.py                                 the replays
"""

import gzip
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import OUTPUT, ROOT, TEACHER, cut_text, machine, options, quieten, read_config  # isort: skip (before torch)

import matplotlib.pyplot as plt
import numpy as np
import optuna
import torch
from filelock import ReadWriteLock
from optuna.trial import TrialState
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kdnas.commands.config import SearchSettings
from kdnas.data.datamodule import KDDataModule
from kdnas.deploy.latency import LatencyMeter, LatencySettings
from kdnas.distillation.objectives import needed_layers
from kdnas.distillation.teacher_states import StatesSettings, open_states
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import find_teacher
from kdnas.nas.bench import Bench
from kdnas.nas.budget import Budget
from kdnas.nas.sampler import make_pruner, make_sampler
from kdnas.nas.search import evaluate, search
from kdnas.nas.space import SearchSpace
from kdnas.nas.trials import Outcome, tried
from kdnas.system.engine import Engine
from kdnas.system.files import read_json, write_json
from kdnas.system.jobs import Job
from kdnas.training.trainer import TrainerSettings

TABLE = ROOT / "benchmarks" / "data" / "samplers.json.gz"
SPACE = SearchSpace(
    {
        "num_hidden_layers": [1, 2, 3, 4, 6],
        "num_attention_heads": [6, 12],
        "hidden_size": [192, 288, 384],
        "intermediate_size": [384, 1536],
        "hidden_act": ["gelu", "relu"],
    }
)
SHARE, NUM_EPOCHS = 0.05, 3
SAMPLERS = ("random", "tpe", "gp", "nsgaii", "lstm-original", "lstm")
PRUNERS = ("median", "hyperband")
MOST_TRIALS = 60
PRUNED_TRIALS = 20  # the default search's
WITHIN = 0.01
RULE_BUDGETS = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)


def make(chosen: Any, console: Console) -> None:
    """Train what is missing of this part of the table, in the order of the space shuffled once."""
    folder = OUTPUT / "samplers"
    folder.mkdir(parents=True, exist_ok=True)
    text = cut_text(chosen.text, folder, share=SHARE)
    config, teacher = read_config("fit"), find_teacher(TEACHER)
    part, num_parts = chosen.part
    # All rows but one in a hundred: the text is cut already.
    data = KDDataModule(TEACHER, text, replace(config.data, mini_fraction=0.99))
    data.setup()
    depths = SPACE.choices["num_hidden_layers"]
    layers = needed_layers(config.recipe.objective, depths, teacher.config.num_hidden_layers)
    states = open_states(teacher, data, layers, StatesSettings(str(folder / "states")))
    defaults = SearchSettings()
    bench = Bench(
        teacher=teacher,
        states=states,
        data=data,
        recipe=config.recipe,
        meter=LatencyMeter(teacher.config, LatencySettings()),
        measures_first=True,
        budget=Budget(),
        trainer=TrainerSettings(accelerator="cpu"),
        num_epochs=NUM_EPOCHS,
        loss=defaults.loss,
        alpha=defaults.alpha,
        beta=defaults.beta,
        seed=0,
        is_pruned=False,
        stillness=ReadWriteLock(folder / "stillness.lock"),
    )
    archs = list(SPACE)
    order = np.random.default_rng(0).permutation(len(archs)).tolist()
    for number in track(order[part::num_parts], "students", console=console):
        path = folder / f"{number}.json"
        if not path.exists():
            place = folder / f"part_{part}" / f"student_{number:04d}"
            place.mkdir(parents=True, exist_ok=True)
            outcome = evaluate(bench, archs[number], place)
            attrs = outcome.attrs
            names = (
                "loss",
                "contextual_share",
                "sentence_r2",
                "latency_ms",
                "teacher_latency_ms",
                "num_parameters",
            )
            row = {name: attrs[name] for name in (*names, "seconds")}
            row["losses"] = [epoch["loss"] for epoch in attrs["history"]]
            write_json(path, {"arch": archs[number].to_dict(), "reward": outcome.value} | row)
    paths = [folder / f"{number}.json" for number in range(len(archs))]
    if not all(path.exists() for path in paths):
        console.print("The other parts are not done yet.")
        return
    rows = [read_json(path) for path in paths]
    about = {
        "machine": machine(),
        "share": SHARE,
        "num_epochs": NUM_EPOCHS,
        "num_rows": len(data.select("mini").train_ids()),
    }
    chosen.table.parent.mkdir(parents=True, exist_ok=True)
    with gzip.GzipFile(chosen.table, "wb", mtime=0) as file:
        file.write(json.dumps(about | {"rows": rows}).encode())
    console.print(
        f"{len(rows)} students in {chosen.table}, {chosen.table.stat().st_size / 1e3:.0f} kB"
    )


@dataclass(frozen=True)
class Known:
    """A student: its reward, held-out loss after each epoch, the seconds of all of them, and how many times as fast."""

    reward: float
    losses: list[float]
    seconds: float
    speedup: float = 1.0


class AtOnce(Engine):
    """Does a job when it is begun, and has room for one between two looks of a search."""

    is_free = True

    @property
    def has_room(self) -> bool:
        return self.is_free

    def start(self, job: Job) -> None:
        write_json(job.result_file, job.call(*job.args))
        self.is_free = False

    def wait(self) -> list[tuple[Job, BaseException | None]]:
        self.is_free = True
        return []


def replay(
    table: dict[StudentArch, Known],
    space: SearchSpace,
    sampler: str,
    seed: int,
    pruner: str = "none",
    by: str = "loss",
    most: int = MOST_TRIALS,
    speedup: float = 0.0,
    has_rule: bool = False,
) -> dict[str, Any]:
    """One search on the table: its regrets after each evaluation, as shares of the best reward, and its cost.

    Args:
        table: every student of the space.
        space: of the table.
        sampler: its short name.
        seed: of the sampler.
        pruner: its short name.
        by: what it sees after each epoch: 1 - ``loss``, or the ``reward`` so far.
        most: evaluations.
        speedup: the budget; slower students are refused, and neither count nor are the best.
        has_rule: whether the first candidate is the space's by rule, as in a search with a budget.
    """
    study = optuna.create_study(
        direction="maximize", sampler=make_sampler(sampler, seed), pruner=make_pruner(pruner)
    )
    trained = 0.0

    def look_up(number: int, arch: StudentArch) -> dict[str, Any]:
        nonlocal trained
        trial = optuna.Trial(study, study.get_trials(deepcopy=False)[number]._trial_id)
        known, params = table[arch], arch.to_dict()
        violation = speedup / known.speedup - 1
        limits = {"budget": violation}
        if violation > 0:
            attrs = {"refused": "too slow"}
            return Outcome(params, "PRUNED", attrs=attrs, constraints=limits).to_dict()
        factor = known.reward / (1 - known.losses[-1]) if by == "reward" else 1.0
        for epoch, loss in enumerate(known.losses):
            trained += known.seconds / len(known.losses)
            trial.report((1 - loss) * factor, epoch)
            # As the product: what is paid for is kept.
            if epoch + 1 < len(known.losses) and trial.should_prune():
                return Outcome(params, "PRUNED", constraints=limits).to_dict()
        return Outcome(params, "COMPLETE", known.reward, constraints=limits).to_dict()

    with TemporaryDirectory() as name:

        def make_job(number: int, arch: StudentArch) -> Job:
            return Job(Path(name) / str(number), str(arch), look_up, (number, arch))

        begin = time.perf_counter()
        first = space.by_rule() if has_rule else ()
        search(study, space, AtOnce(), make_job, min(most, len(space)), first=first)
        seconds = (time.perf_counter() - begin) / len(study.trials)
    best = max(known.reward for known in table.values() if known.speedup >= speedup)
    values = [
        trial.values[0] if trial.state == TrialState.COMPLETE else -math.inf
        for trial in tried(study)
    ][:most]
    regrets = [(best - value) / abs(best) for value in np.maximum.accumulate(values).tolist()]
    reached = next((number for number, regret in enumerate(regrets, 1) if regret <= WITHIN), None)
    return {"regrets": regrets, "reached": reached, "seconds": seconds, "trained_seconds": trained}


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    generator = np.random.default_rng(0)
    means = generator.choice(np.array(differences), (2_000, len(differences))).mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def main(args: Sequence[str] | None = None) -> None:
    """Make the table, or replay it and show what each sampler needs."""
    parser = options("samplers", __doc__ or "")
    parser.add_argument("--make", action="store_true", help="train the students of the table")
    parser.add_argument(
        "--part", type=int, nargs=2, default=[0, 1], help="of --make: this part (from 0) of so many"
    )
    parser.add_argument("--table", type=Path, default=TABLE, help="the table")
    parser.add_argument("--seeds", type=int, default=30, help="searches of each sampler")
    parser.add_argument("--only", nargs="*", default=list(SAMPLERS), help="samplers")
    parser.add_argument(
        "--rule", action="store_true", help="begin with the rule's shape, as a search with a budget"
    )
    parser.add_argument(
        "--speedup", type=float, nargs="*", default=[4.0, 8.0, 0.0], help="budgets; 0: none"
    )
    chosen = parser.parse_args(args)
    quieten()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    console = Console(width=120)
    if chosen.make:
        make(chosen, console)
        return
    torch.set_num_threads(
        1
    )  # the controllers' matmuls are so small that a second thread only waits
    if chosen.quick:
        chosen.seeds, chosen.speedup = min(chosen.seeds, 2), chosen.speedup[:1]
    if not chosen.table.exists():
        raise SystemExit(f"{chosen.table} is not there: make it by --make.")
    rows = json.loads(gzip.decompress(chosen.table.read_bytes()))["rows"]
    table = {
        StudentArch.from_dict(row["arch"]): Known(
            row["reward"],
            row["losses"],
            row["seconds"],
            row["teacher_latency_ms"] / row["latency_ms"],
        )
        for row in rows
    }
    space = SearchSpace(
        {name: list(dict.fromkeys(row["arch"][name] for row in rows)) for name in rows[0]["arch"]}
    )
    assert len(space) == len(table), "the table is a whole space"
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for speedup in chosen.speedup:
        num_within = sum(known.speedup >= speedup for known in table.values())
        name = f"{num_within} students" + (f" of at least {speedup:g}x" if speedup else "")
        jobs = [(sampler, seed) for sampler in chosen.only for seed in range(chosen.seeds)]
        for sampler, seed in track(jobs, f"searches, {name}", console=console, transient=True):
            run = replay(table, space, sampler, seed, speedup=speedup, has_rule=chosen.rule)
            found.setdefault(name, {}).setdefault(sampler, []).append(run)
    pruned: dict[str, list[dict[str, Any]]] = {}
    pruners = [("none", "loss"), *((pruner, by) for pruner in PRUNERS for by in ("loss", "reward"))]
    settings = [(pruner, by, seed) for pruner, by in pruners for seed in range(chosen.seeds)]
    for pruner, by, seed in track(settings, "pruned searches", console=console, transient=True):
        run = replay(table, space, "tpe", seed, pruner, by, PRUNED_TRIALS, chosen.speedup[0])
        pruned.setdefault(pruner if pruner == "none" else f"{pruner}, by {by}", []).append(run)
    show(show_rule(table, space, console), found, pruned, console, chosen.json)


def show_rule(
    table: dict[StudentArch, Known], space: SearchSpace, console: Console
) -> list[dict[str, Any]]:
    """Table of how good the shape by rule is within each budget, and its rows."""
    shown = Table("budget", "students", "shape by rule", "rank", "reward", "best", "regret")
    rows = []
    for budget in RULE_BUDGETS:
        rewards = [known.reward for known in table.values() if known.speedup >= budget]
        within = (arch for arch in space.by_rule() if table[arch].speedup >= budget)
        if (arch := next(within, None)) is None:
            continue
        reward, best = table[arch].reward, max(rewards)
        rank = 1 + sum(other > reward for other in rewards)
        row = {"budget": budget, "students": len(rewards), "arch": arch.to_dict(), "rank": rank}
        rows.append(row | {"reward": reward, "best": best, "regret": (best - reward) / best})
        figures = (f"{reward:.3f}", f"{best:.3f}", f"{rows[-1]['regret']:.1%}")
        shown.add_row(f"{budget:g}x", str(len(rewards)), str(arch), str(rank), *figures)
    console.print(shown)
    return rows


def show_pruners(pruned: dict[str, list[dict[str, Any]]], console: Console) -> list[dict[str, Any]]:
    """Table of what pruners save and lose, and its rows."""
    table = Table("pruner", "seconds trained", "regret at the end", "its mean less none's")
    table.title = f"{PRUNED_TRIALS} candidates by TPE, pruned; {len(pruned['none'])} seeds"
    rows = []
    for name, runs in pruned.items():
        lost = [
            run["regrets"][-1] - whole["regrets"][-1]
            for run, whole in zip(runs, pruned["none"], strict=True)
        ]
        seconds = sum(run["trained_seconds"] for run in runs) / sum(
            run["trained_seconds"] for run in pruned["none"]
        )
        regret = statistics.mean(run["regrets"][-1] for run in runs)
        rows.append({"pruner": name, "seconds": seconds, "regret": regret, "lost": interval(lost)})
        low, high = rows[-1]["lost"]
        table.add_row(name, f"{seconds:.0%}", f"{regret:.2%}", f"{low:+.2%} to {high:+.2%}")
    console.print(table)
    return rows


def show_samplers(
    name: str, found: dict[str, list[dict[str, Any]]], console: Console
) -> list[dict[str, Any]]:
    """Table of what samplers need, and its rows."""
    # One that never came within 1 % counts as one more than it was given.
    needed = {
        sampler: [run["reached"] or len(run["regrets"]) + 1 for run in runs]
        for sampler, runs in found.items()
    }
    title = f"Evaluations to come within 1 % of the best of {name}; {len(next(iter(needed.values())))} seeds"
    table = Table(title=title)
    pairs = ("mean less random's", "mean less TPE's")
    for heading in (
        "sampler",
        "median",
        "quartiles",
        "mean",
        "of random's",
        *pairs,
        "ms a proposal",
    ):
        table.add_column(heading, justify="left" if heading == "sampler" else "right")
    rows = []
    for sampler, runs in found.items():
        low, median, high = np.quantile(needed[sampler], (0.25, 0.5, 0.75)).tolist()
        row = {
            "sampler": sampler,
            "median": median,
            "quartiles": [low, high],
            "mean": statistics.mean(needed[sampler]),
        }
        row["seconds_a_proposal"] = statistics.median(run["seconds"] for run in runs)
        for other in ("random", "tpe"):
            if other in needed and other != sampler:
                row[f"less_{other}"] = interval(
                    [a - b for a, b in zip(needed[sampler], needed[other], strict=True)]
                )
        if "random" in needed:
            row["of_random"] = row["mean"] / statistics.mean(needed["random"])
        rows.append(row)
        shown = [
            f"{row[key][0]:+.1f} to {row[key][1]:+.1f}" if key in row else ""
            for key in ("less_random", "less_tpe")
        ]
        of_random = f"{row['of_random']:.0%}" if "of_random" in row else ""
        cells = [
            f"{median:.0f}",
            f"{low:.0f} to {high:.0f}",
            f"{row['mean']:.1f}",
            of_random,
            *shown,
        ]
        table.add_row(sampler, *cells, f"{1000 * row['seconds_a_proposal']:.0f}")
    console.print(table)
    return rows


def show(
    rule: list[dict[str, Any]],
    found: dict[str, dict[str, list[dict[str, Any]]]],
    pruned: dict[str, list[dict[str, Any]]],
    console: Console,
    path: Path,
) -> None:
    """Tables, JSON and regret curves."""
    rows = {name: show_samplers(name, runs, console) for name, runs in found.items()}
    pruners = show_pruners(pruned, console)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "machine": machine(),
            "rule": rule,
            "rows": rows,
            "runs": found,
            "pruners": pruners,
            "pruned": pruned,
        },
    )
    figure, all_axes = plt.subplots(1, len(found), figsize=(5 * len(found), 4), squeeze=False)
    for axes, (name, by_sampler) in zip(all_axes[0], found.items(), strict=True):
        for sampler, runs in by_sampler.items():
            most = max(len(run["regrets"]) for run in runs)
            curves = np.array(
                [
                    run["regrets"] + run["regrets"][-1:] * (most - len(run["regrets"]))
                    for run in runs
                ]
            )
            axes.plot(range(1, most + 1), 100 * curves.mean(0), label=sampler)
        axes.set(
            title=name,
            xlabel="evaluations",
            ylabel="mean regret, % of the best reward",
            yscale="log",
        )
        axes.legend()
    figure.savefig(path.with_suffix(".png"), dpi=120, bbox_inches="tight")
    console.print(f"Figures: {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
