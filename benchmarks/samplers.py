"""How many candidates each sampler needs: replays of a search over a table of trained students.

``--make`` trains every architecture of a small space once, by the search's own Evaluator, into ``--table``; it goes on
where it was stopped. Without it, the product's own search loop runs on the table, once for each sampler and seed: the
evaluations until the best reward so far is within 1 % of the table's best, regret by evaluations, and wall seconds a
proposal. Students are paired by seed where two samplers are compared.

    python benchmarks/samplers.py --make --text train.parquet     the table, about an hour on two cores
    python benchmarks/samplers.py                                 the replays
"""

import gzip
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import OUTPUT, ROOT, TEACHER, cut_text, machine, options, quieten, read_config  # isort: skip (before torch)

import matplotlib.pyplot as plt
import numpy as np
import optuna
from filelock import ReadWriteLock
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kdnas.arch import StudentArch
from kdnas.config import SearchSettings
from kdnas.data.datamodule import KDDataModule
from kdnas.distill.objectives import needed_layers
from kdnas.distill.teacher import StatesSettings, open_states
from kdnas.latency import LatencyMeter, LatencySettings
from kdnas.models import find_teacher
from kdnas.nas.candidate import Budget, Evaluator
from kdnas.nas.sampler import make_sampler
from kdnas.nas.search import search, trained
from kdnas.nas.space import SearchSpace
from kdnas.runs import read_json, write_json
from kdnas.training import TrainerSettings

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
SHARE, NUM_EPOCHS = 0.1, 1
SAMPLERS = ("random", "tpe", "gp", "nsgaii", "lstm-original", "lstm")
MOST_TRIALS = 60
WITHIN = 0.01


def make(chosen: Any, console: Console) -> None:
    """Train what is missing of the table, in the order of the space shuffled once."""
    folder = OUTPUT / "samplers"
    folder.mkdir(parents=True, exist_ok=True)
    text = cut_text(chosen.text, folder, share=SHARE)
    config, teacher = read_config("fit"), find_teacher(TEACHER)
    # All rows but one in a hundred: the text is cut already.
    data = KDDataModule(TEACHER, text, replace(config.data, mini_fraction=0.99))
    data.setup()
    depths = SPACE.choices["num_hidden_layers"]
    layers = needed_layers(config.recipe.objective, depths, teacher.config.num_hidden_layers)
    states = open_states(teacher, data, layers, StatesSettings(str(folder / "states")))
    defaults = SearchSettings()
    evaluator = Evaluator(
        teacher=teacher,
        states=states,
        data=data,
        recipe=config.recipe,
        meter=LatencyMeter(teacher.config, LatencySettings()),
        budget=Budget(),
        trainer=TrainerSettings(accelerator="cpu"),
        num_epochs=NUM_EPOCHS,
        alpha=defaults.alpha,
        beta=defaults.beta,
        seed=0,
        folder=lambda number: folder / f"trial_{number:04d}",
        stillness=ReadWriteLock(folder / "stillness.lock"),
    )
    archs = list(SPACE)
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.NopPruner())
    for number in track(np.random.default_rng(0).permutation(len(archs)).tolist(), "students", console=console):
        path = folder / f"{number}.json"
        if not path.exists():
            trial = study.ask()
            reward = evaluator(trial, archs[number])
            attrs = trial.user_attrs
            names = ("loss", "contextual_share", "sentence_r2", "latency_ms", "teacher_latency_ms", "num_parameters")
            row = {name: attrs[name] for name in (*names, "seconds")}
            write_json(path, {"arch": archs[number].to_dict(), "reward": reward} | row)
    rows = [read_json(folder / f"{number}.json") for number in range(len(archs))]
    about = {
        "machine": machine(),
        "share": SHARE,
        "num_epochs": NUM_EPOCHS,
        "num_rows": len(data.select("mini").train_ids()),
    }
    chosen.table.parent.mkdir(parents=True, exist_ok=True)
    with gzip.GzipFile(chosen.table, "wb", mtime=0) as file:
        file.write(json.dumps(about | {"rows": rows}).encode())
    console.print(f"{len(rows)} students in {chosen.table}, {chosen.table.stat().st_size / 1e3:.0f} kB")


def replay(rewards: dict[StudentArch, float], space: SearchSpace, sampler: str, seed: int) -> dict[str, Any]:
    """One search on the table: its regrets after each evaluation, as shares of the best reward, and its seconds."""
    study = optuna.create_study(direction="maximize", sampler=make_sampler(sampler, seed))
    begin = time.perf_counter()
    search(lambda trial, arch: rewards[arch], space, study, min(MOST_TRIALS, len(space)))
    seconds = (time.perf_counter() - begin) / len(study.trials)
    best = max(rewards.values())
    values = [trial.value for trial in trained(study)][:MOST_TRIALS]
    regrets = [(best - value) / abs(best) for value in np.maximum.accumulate(values).tolist()]
    reached = next((number for number, regret in enumerate(regrets, 1) if regret <= WITHIN), None)
    return {"regrets": regrets, "reached": reached, "seconds": seconds}


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
    parser.add_argument("--table", type=Path, default=TABLE, help="the table")
    parser.add_argument("--seeds", type=int, default=30, help="searches of each sampler")
    parser.add_argument("--only", nargs="*", default=list(SAMPLERS), help="samplers")
    chosen = parser.parse_args(args)
    quieten()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    console = Console(width=120)
    if chosen.make:
        make(chosen, console)
        return
    if chosen.quick:
        chosen.seeds = min(chosen.seeds, 5)
    table = json.loads(gzip.decompress(chosen.table.read_bytes()))
    rewards = {StudentArch.from_dict(row["arch"]): row["reward"] for row in table["rows"]}
    fields = list(table["rows"][0]["arch"])
    space = SearchSpace({name: list(dict.fromkeys(row["arch"][name] for row in table["rows"])) for name in fields})
    assert len(space) == len(rewards), "the table is a whole space"
    jobs = [(sampler, seed) for sampler in chosen.only for seed in range(chosen.seeds)]
    found: dict[str, list[dict[str, Any]]] = {}
    for sampler, seed in track(jobs, "searches", console=console, transient=True):
        found.setdefault(sampler, []).append(replay(rewards, space, sampler, seed))
    show(found, console, chosen.json, len(rewards))


def show(found: dict[str, list[dict[str, Any]]], console: Console, path: Path, num_archs: int) -> None:
    """Table, JSON and regret curves."""
    # One that never came within 1 % counts as one more than it was given.
    needed = {name: [run["reached"] or MOST_TRIALS + 1 for run in runs] for name, runs in found.items()}
    rows = []
    for name, runs in found.items():
        low, median, high = np.quantile(needed[name], (0.25, 0.5, 0.75)).tolist()
        row = {"sampler": name, "median": median, "quartiles": [low, high], "mean": statistics.mean(needed[name])}
        row["seconds_a_proposal"] = statistics.median(run["seconds"] for run in runs)
        for other in ("random", "tpe"):
            if other in needed and other != name:
                row[f"less_{other}"] = interval([a - b for a, b in zip(needed[name], needed[other], strict=True)])
        rows.append(row)
    title = f"Evaluations to come within 1 % of the best of {num_archs}; {len(next(iter(needed.values())))} seeds"
    table = Table(title=title)
    for heading in ("sampler", "median", "quartiles", "mean", "mean less random's", "mean less TPE's", "ms a proposal"):
        table.add_column(heading, justify="left" if heading == "sampler" else "right")
    for row in rows:
        low, high = row["quartiles"]
        pairs = [row.get(f"less_{other}") for other in ("random", "tpe")]
        shown = ["" if pair is None else f"{pair[0]:+.1f} to {pair[1]:+.1f}" for pair in pairs]
        cells = [f"{row['median']:.0f}", f"{low:.0f} to {high:.0f}", f"{row['mean']:.1f}", *shown]
        table.add_row(row["sampler"], *cells, f"{1000 * row['seconds_a_proposal']:.0f}")
    console.print(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"machine": machine(), "rows": rows, "runs": found})
    figure, axes = plt.subplots(figsize=(6, 4))
    for name, runs in found.items():
        most = max(len(run["regrets"]) for run in runs)
        curves = np.array([run["regrets"] + run["regrets"][-1:] * (most - len(run["regrets"])) for run in runs])
        axes.plot(range(1, most + 1), 100 * curves.mean(0), label=name)
    axes.set(xlabel="evaluations", ylabel="mean regret, % of the best reward", yscale="log")
    axes.legend()
    figure.savefig(path.with_suffix(".png"), dpi=120, bbox_inches="tight")
    console.print(f"Figures: {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
