"""Kills: of a search, and of each stage of a run."""

import hashlib
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from tests.faults.checks import kill_all, times
from tests.faults.harness import Bench, Row, fault
from tests.faults.servers import postgres


@fault("F01", "kill -9 of a search's process group at a random instant; SQLite and PostgreSQL")
def kill_search(bench: Bench, row: Row) -> None:
    begun = time.monotonic()
    bench.start(bench.search(bench.new_name())).communicate()
    whole = time.monotonic() - begun
    extra = []

    def kill_once(url: str | None = None) -> None:
        name = bench.new_name()
        bench.storages |= {name: url} if url else {}
        begun, process = time.monotonic(), bench.start(bench.search(name))
        time.sleep(bench.random.uniform(0, whole))
        error, known = kill_all(process), bench.results(name)
        code, more = bench.call_alone(bench.search(name))
        row.tried += process.returncode != 0  # else it was over before
        row.expect("after it", code, more)
        extra.append(time.monotonic() - begun - whole)
        bench.check(row, name, known, error + more)

    for _ in range(2 if bench.quick else 50):
        kill_once()
    row.waited(max(extra))
    row.notes.append(f"unbroken {whole:.1f} s, median extra time {statistics.median(extra):.1f} s")
    if not bench.quick:
        with row.part(), postgres() as server:
            for _ in range(10):
                kill_once(server.url)


# A file or folder by which each stage begins.
STAGES = {
    "states": "config.yaml",
    "search": "trial_0000",
    "full KD": "best_student.yaml",
    "fine-tuning": "full_kd/result.json",
    "export": "glue/results.json",
    "report": "student",
}
# What each unit of the work leaves when it is done.
UNITS = (
    "trial_*/result.json",
    "full_kd/result.json",
    "glue/*/result.json",
    "student/manifest.json",
)


def outcome(bench: Bench, name: str) -> list[Any]:
    """What a whole run has found: the same, bit by bit, however often it was stopped."""
    run = bench.run(name)
    kd = json.loads((run / "full_kd" / "result.json").read_text())
    glue = json.loads((run / "glue" / "results.json").read_text())
    scores = {role: line["score"] for role, line in glue["models"].items()}
    weights = hashlib.sha256((run / "student" / "model.safetensors").read_bytes()).hexdigest()
    return [kd["arch"], kd["history"], scores, weights, bench.story(name)]


@fault(
    "F03", "kill -9 in each stage of a run: the same figures, one unit again at most", quick=False
)
def kill_stages(bench: Bench, row: Row) -> None:
    stored = (bench.states, bench.logs / "tokens")

    def forget_states() -> None:
        for folder in stored:
            shutil.rmtree(folder, ignore_errors=True)

    def units(run: Path) -> dict[Path, tuple[int, int]]:
        shards = [path for folder in stored for path in folder.rglob("*.bin")]
        return times([*shards, *(path for unit in UNITS for path in run.glob(unit))])

    bench.reference  # noqa: B018 (made before the clock starts)
    forget_states()
    whole = bench.new_name()
    process, begins = bench.start(bench.job(whole)), {}
    while process.poll() is None:
        for stage, file in STAGES.items():
            if stage not in begins and (bench.run(whole) / file).exists():
                begins[stage] = time.monotonic()
        time.sleep(0.02)
    assert process.returncode == 0, process.communicate()[1]
    expected, ends = outcome(bench, whole), [*list(begins.values())[1:], time.monotonic()]

    for (stage, begin), end in zip(begins.items(), ends, strict=True):
        for _ in range(1 if bench.quick else 10):
            args = bench.job(name := bench.new_name())
            run = bench.run(name)
            if stage == "states":
                forget_states()
            process = bench.start(args)
            while process.poll() is None and not (run / STAGES[stage]).exists():
                time.sleep(0.02)
            time.sleep(bench.random.uniform(0, end - begin))
            error, known, done = kill_all(process), bench.results(name), units(run)
            row.tried += process.returncode != 0
            code, more = bench.call_alone(args)
            row.expect(stage, code, more)
            bench.check(row, name, known, error + more)
            again = [path for path, time_ in units(run).items() if done.get(path, time_) != time_]
            row.fault("duplicated", f"{stage}: made again {again}", len(again) > 1)
            row.fault("unequal", stage, code == 0 and outcome(bench, name) != expected)
