"""Two workers for hours, one killed every two minutes, each tenth time all: what grows?"""

import os
import signal
import statistics
import time
from contextlib import suppress
from subprocess import TimeoutExpired
from typing import Any

from tests.faults.checks import at_work, kill_all, lost_of, processes_of, times
from tests.faults.harness import Bench, Row

# What may grow, at first and with each trial: a trial is kilobytes in memory and on the disk.
ALLOWED = {
    "processes": (1, 0),
    "megabytes": (192, 0.15),
    "files": (24, 0),
    "database_kb": (200, 8),
    "trials_kb": (1000, 20),
    "other_kb": (1000, 2),
    "states_kb": (0, 0),
    "tokens_kb": (0, 0),
    "temporary_kb": (100, 0),
    "home_kb": (100, 0),
}


def usage(bench: Bench, name: str, session: int) -> dict[str, float]:
    """What a search holds now: memory of its own, open files, and kilobytes on the disk."""
    held = dict.fromkeys(ALLOWED, 0.0)
    for folder in processes_of({session}):
        with suppress(OSError):
            lines = (folder / "smaps_rollup").read_text().splitlines()[1:]
            sizes = {line.split()[0]: int(line.split()[1]) for line in lines}
            held["files"] += len(list((folder / "fd").iterdir()))
            held["megabytes"] += sizes["Anonymous:"] / 1e3
            held["processes"] += 1

    run = bench.run(name)
    places = {
        "database": run.glob("study.db*"),
        "trials": run.glob("trial_*/**/*"),
        "other": [*run.glob("*.*"), *run.glob("search/*")],
        "states": bench.states.rglob("*"),
        "tokens": (bench.logs / "tokens").rglob("*"),
        "temporary": bench.temporary.rglob("*"),
        "home": bench.home.rglob("*"),
    }
    for kind, paths in places.items():
        held[f"{kind}_kb"] = sum(size for size, _ in times(paths).values()) / 1e3
    return held


def growth(rounds: list[dict[str, float]]) -> dict[str, float]:
    """From the first quarter of the rounds to the last, by medians."""
    quarter = max(1, len(rounds) // 4)

    def median(part: list[dict[str, float]], key: str) -> float:
        return statistics.median(found[key] for found in part)

    early, late = rounds[:quarter], rounds[-quarter:]
    return {key: median(late, key) - median(early, key) for key in ALLOWED if rounds}


def soak(bench: Bench, row: Row, minutes: float, seconds: float = 120.0) -> dict[str, Any]:
    name, rounds = bench.new_name(), []
    sizes = ",".join(map(str, range(2, 65)))
    acts = "gelu,relu,silu,tanh,gelu_new,quick_gelu,relu6,sigmoid,gelu_fast,mish,leaky_relu,linear"
    space = {"intermediate_size": sizes, "hidden_act": acts, "hidden_size": "16,32"}
    options = [f"--space.{key}=[{values}]" for key, values in space.items()]
    options += ["--workers=2", "--search.n_trials=20000", "--sampler=random"]
    args = bench.search(name, *options)
    process, end, known = bench.start(args), time.monotonic() + 60 * minutes, {}
    while time.monotonic() < end:
        with suppress(TimeoutExpired):
            process.wait(timeout=seconds)
            row.fault("undetected", f"the search ended by itself, exit {process.returncode}")
            break
        before, known = known, bench.results(name)
        lost = lost_of(before, known, ("params", "value", "ended"))
        row.fault("lost", f"results {lost}", len(lost))
        finished = len(known) - len(before)
        row.fault("lost", f"no progress in round {len(rounds)}", finished <= 0)
        rounds.append({"trials": len(known), **usage(bench, name, process.pid)})
        print({key: round(value) for key, value in rounds[-1].items()}, flush=True)
        row.tried += 1
        if len(rounds) % 10:
            with suppress(ProcessLookupError, IndexError):
                os.kill(bench.random.choice([*at_work(process)]), signal.SIGKILL)
        else:
            error = kill_all(process)
            row.fault("undetected", error, "Traceback" in error)
            process = bench.start(args)

    bench.wait_for_trial(process, name, len(known))  # it may have been started just now
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    _, error = process.communicate()
    row.fault("undetected", error, process.returncode not in (0, 143))
    bench.check_stopped(row, name, known, error)
    grown = growth(rounds)
    row.notes.append(f"growth: {', '.join(f'{key} {more:.0f}' for key, more in grown.items())}")
    num_trials = rounds[-1]["trials"] - rounds[0]["trials"] if rounds else 0
    for key, more in grown.items():
        at_first, each = ALLOWED[key]
        row.fault("undetected", f"{key} grew by {more:.0f}", more > at_first + each * num_trials)
    return {"rounds": rounds, "growth": grown}
