"""The study's store: damaged, deleted, locked, away; and a result that is damaged."""

import math
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial

from tests.faults.harness import Bench, Row, fault
from tests.faults.servers import Postgres, postgres


@fault("F10", "a trial's result that is cut, empty, or no result: one line that names the file")
def damaged_result(bench: Bench, row: Row) -> None:
    name = bench.new_name()
    bench.succeed(row, "half", bench.search(name, f"--search.n_trials={bench.num_trials // 2}"))
    path = bench.run(name) / "trial_0001" / "result.json"
    content, known = path.read_bytes(), bench.results(name)
    for what, damaged in {"cut": content[:99], "empty": b"", "no result": b'{"a": 1}'}.items():
        path.write_bytes(damaged)
        code, error = bench.call(bench.search(name))
        row.tried += 1
        row.expect(what, code, error, (2,), str(path))
    path.write_bytes(content)
    bench.go_on(row, "its repair", bench.search(name), known)


@fault("F36", "study.db deleted, emptied, cut, its pages zeroed or flipped, NUL bytes appended")
def damaged_study(bench: Bench, row: Row) -> None:
    args = bench.search(name := bench.new_name())
    bench.succeed(row, "half", [*args, f"--search.n_trials={bench.num_trials // 2}"])
    run, known = bench.run(name), bench.results(name)
    whole = shutil.copytree(run, bench.folder / f"whole_{name}")
    content = (run / "study.db").read_bytes()
    size = int.from_bytes(content[16:18], "big")
    pages = [content[start : start + size] for start in range(0, len(content), size)]

    def with_page(number: int, page: bytes) -> bytes:
        return b"".join([*pages[:number], page, *pages[number + 1 :]])

    damages: dict[str, bytes | None] = {"deleted": None, "empty": b""}
    damages["100 NUL bytes more"] = content + bytes(100)
    ends = (1, 99, *range(size, len(content), 4 * size))
    numbers = range(len(pages))
    if bench.quick:
        ends, numbers = ends[-1:], range(0, len(pages), len(pages) // 2)
    damages |= {f"cut to {end}": content[:end] for end in ends}
    damages |= {f"page {n} zeroed": with_page(n, bytes(size)) for n in numbers}
    damages |= {
        f"page {n} flipped": with_page(n, bytes(255 - b for b in pages[n])) for n in numbers
    }

    for what, damaged in damages.items():
        if damaged is None:
            (run / "study.db").unlink()
        else:
            (run / "study.db").write_bytes(damaged)
        row.tried += 1
        error = bench.succeed(row, what, args)
        is_silent = what in ("deleted", "empty") and "rebuilt from the results" not in error
        row.fault("undetected", f"{what}: nothing is said", is_silent)
        bench.check(row, name, known, error)
        shutil.rmtree(run)
        shutil.copytree(whole, run)


@contextmanager
def locked(bench: Bench, name: str) -> Iterator[None]:
    """Another process has the SQLite study."""
    path = bench.run(name) / "study.db"
    with closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        yield
        database.execute("ROLLBACK")


@contextmanager
def stopped(server: Postgres) -> Iterator[None]:
    server.stop()
    yield
    server.start()


@contextmanager
def cut(server: Postgres) -> Iterator[None]:
    for _ in range(5):
        server.cut()
        time.sleep(0.5)
    yield


IMPATIENT = """
import sys
from kdnas.cli.main import main
from kdnas.nas import study

study.PATIENCE_SECONDS = 5
sys.exit(main())
"""


def outage(bench: Bench, row: Row, name: str, away: Callable, seconds: float) -> None:
    """A store that is away at a random instant; for ever: for longer than it is waited for.

    The search loses nothing, no candidate fails, and none is trained again.
    """
    is_for_ever = math.isinf(seconds)
    args = bench.search(name, "--workers=2")
    process = bench.start(args, ["-c", IMPATIENT] if is_for_ever else ["-m", "kdnas"])
    bench.wait_for_trial(process, name)
    time.sleep(bench.random.uniform(0, 2))
    known, begun = bench.results(name), time.monotonic()
    with away():
        if is_for_ever:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=120)
        else:
            time.sleep(seconds)
    _, error = process.communicate()
    row.tried += 1
    row.expect(f"away {seconds:g} s", process.returncode, error, (3,) if is_for_ever else (0,))
    if is_for_ever:
        row.waited(time.monotonic() - begun)
        bench.go_on(row, "the outage", args, bench.results(name), in_order=False)
        return
    bench.check(row, name, known, error, in_order=False)
    row.fault("duplicated", f"{name}: trained again", bench.num_repeated(name))
    failed = [n for n, result in bench.results(name).items() if result["state"] == "FAIL"]
    row.fault("lost", f"{name}: failed {failed}", len(failed))


@fault("F13", "the store away: SQLite locked, PostgreSQL stopped, seconds and for ever", False)
def store_away(bench: Bench, row: Row) -> None:
    for seconds in (12.0,) if bench.quick else (12.0, 40.0, math.inf) * 3:
        name = bench.new_name()
        outage(bench, row, name, partial(locked, bench, name), seconds)
    with row.part(), postgres() as server:
        for seconds in (5.0, math.inf) if bench.quick else (5.0, 60.0, math.inf) * 5:
            bench.storages[name := bench.new_name()] = server.url
            outage(bench, row, name, partial(stopped, server), seconds)
    row.notes.append("for ever: 5 s of patience instead of 600")


@fault("F14", "connections to PostgreSQL cut in a search, in use and idle", quick=False)
def connections_cut(bench: Bench, row: Row) -> None:
    with postgres() as server:
        for _ in range(2 if bench.quick else 10):
            bench.storages[name := bench.new_name()] = server.url
            outage(bench, row, name, partial(cut, server), 0.0)
