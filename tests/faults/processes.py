"""Processes: of the pool, killed and frozen; of Dask; and a run that is started twice."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from tests.faults.checks import at_work, kill_all, times
from tests.faults.harness import Bench, Row, fault
from tests.faults.servers import dask


def candidate_of(bench: Bench, process: subprocess.Popen[str], number: int) -> int | None:
    """A process that trains, at an instant when so many do; None: the search has ended."""
    while process.poll() is None and len(at_work(process)) < number:
        time.sleep(0.02)
    time.sleep(bench.random.uniform(0, 1))
    return bench.random.choice([*at_work(process)] or [None])


@fault("F02", "one of two processes of the pool killed, or frozen for some seconds")
def kill_worker(bench: Bench, row: Row) -> None:
    for number in range(2 if bench.quick else 50):
        name = bench.new_name()
        process = bench.start(bench.search(name, "--workers=2"))
        if (worker := candidate_of(bench, process, 2)) is None:
            row.notes.append(f"{name}: it was over before")
            continue
        job, known, begun = at_work(process).get(worker), bench.results(name), time.monotonic()
        is_killed = number % 2 == 0
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL if is_killed else signal.SIGSTOP)
        if is_killed and job:  # its candidate is begun again
            is_done = job / "result.json"
            while process.poll() is None and not is_done.exists():
                if job in at_work(process).values():
                    break
                time.sleep(0.02)
            row.waited(time.monotonic() - begun)
            row.fault("undetected", "nobody took its place", time.monotonic() > begun + 5)
        else:
            time.sleep(5)
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGCONT)
        _, error = process.communicate()
        row.tried += 1
        row.expect("", process.returncode, error)
        bench.check(row, name, known, error, in_order=False)
        row.fault("duplicated", "trained again", bench.num_repeated(name) > is_killed)


@fault("F34", "a finished search again; a search, and a run, started twice at once")
def again(bench: Bench, row: Row) -> None:
    reference = bench.reference

    def files() -> dict[Path, tuple[int, int]]:
        return times(path for path in bench.run(reference).rglob("*") if path.suffix != ".lock")

    before = files()
    for _ in range(1 if bench.quick else 20):
        bench.succeed(row, "a finished search", bench.search(reference))
        row.tried += 1
        changed = files().items() ^ before.items()
        row.fault("unequal", f"changed: {changed}", len(changed))
    make = [bench.search] if bench.quick else [bench.search] * 20 + [bench.job] * 3
    for args_of in make:
        name = bench.new_name()
        process = bench.start(bench.search(name))
        bench.wait_for_trial(process, name, 1)
        error, known = kill_all(process), bench.results(name)
        both = [bench.start(args_of(name)) for _ in range(2)]
        errors = [process.communicate()[1] for process in both]
        row.tried += 1
        codes = sorted(process.returncode for process in both)
        is_told = codes == [0, 2] and "is in use by process" in "".join(errors)
        row.fault("undetected", f"{codes} {errors}", not is_told)
        bench.check(row, name, known, error + "".join(errors))


@fault("F37", "a Dask worker killed in a search; then the scheduler", quick=False)
def dask_dies(bench: Bench, row: Row) -> None:
    for kills_scheduler in (False, True) * (1 if bench.quick else 5):
        with dask(bench) as servers:
            name = bench.new_name()
            args = bench.search(name, f"--executor={servers.url}")
            process = bench.start(args)
            bench.wait_for_trial(process, name, 1)
            time.sleep(bench.random.uniform(0, 1))
            known = bench.results(name)
            killed = servers.scheduler if kills_scheduler else bench.random.choice(servers.workers)
            killed.kill()
            row.tried += 1
            _, error = process.communicate()
        row.expect("", process.returncode, error, (0, 3) if kills_scheduler else (0,))
        bench.go_on(row, "the end of Dask", bench.search(name), known, error, in_order=False)
