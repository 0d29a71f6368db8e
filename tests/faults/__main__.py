"""What kdnas survives: faults that are made on purpose, one a row, and a checker after each.

A row counts what was tried, and what went wrong: acknowledged trials that are ``lost`` (or altered), trials that are
``duplicated`` or beyond what was asked, work that is done again, payloads ``executed``, faults ``undetected`` (taken
without a word, told with a traceback, or half made), ``zombies`` (trials that run, processes, locks or temporary files
that are left), and searches that end ``unequal`` to an unbroken one: all should be 0. ``worst_wait_s`` is the longest
wait.

    python -m tests.faults --quick                  without servers and many kills, in under four minutes
    python -m tests.faults --only F01,F13           some of them, as often as in the whole run
    python -m tests.faults --soak 120               two workers, one killed every two minutes: what grows?
"""

import argparse
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import resource
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import chdir, contextmanager, suppress
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.common import OUTPUT, ROOT, machine  # isort: skip (before torch)

import numpy
import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load, save
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdnas.system.files import write_json
from tests.faults.checks import (
    TOLD,
    Bench,
    NotRun,
    Payload,
    Postgres,
    Row,
    has,
    is_one_line,
    kill_all,
    postgres,
    processes_of,
)

FAULTS: dict[str, tuple[str, bool, Callable[[Bench, Row], None]]] = {}


def fault(name: str, what: str, quick: bool = True) -> Callable[[Any], Any]:
    """Put a function into the table of faults."""

    def put(function: Callable[[Bench, Row], None]) -> Callable[[Bench, Row], None]:
        FAULTS[name] = what, quick, function
        return function

    return put


@fault(
    "F01", "kill -9 of a search and its process group, at a random instant; SQLite and PostgreSQL"
)
def kill(bench: Bench, row: Row) -> None:
    bench.reference  # noqa: B018 (made before the clock starts)
    start, extra = time.monotonic(), []
    bench.start(bench.search(bench.new_name())).communicate()
    whole = time.monotonic() - start

    def round_of(name: str) -> None:
        start, process = time.monotonic(), bench.start(bench.search(name))
        time.sleep(bench.random.uniform(0.0, 1.0) * whole)
        if process.poll() is not None:  # it was faster than the first: none was killed
            return row.fault("lost", process.communicate()[1], process.returncode != 0)
        error = kill_all(process)
        acknowledged = bench.acknowledged(name)
        error += bench.start(bench.search(name)).communicate()[1]
        extra.append(time.monotonic() - start - whole)
        row.tried += 1
        bench.check(row, name, acknowledged, error)

    while row.tried < (1 if bench.quick else 50):
        round_of(bench.new_name())
    row.notes.append(
        f"median extra time {statistics.median(extra):.1f} s, an unbroken search takes {whole:.1f} s"
    )
    row.worst_wait_s = max(extra)
    if not bench.quick:
        on_postgres(bench, row, 10, round_of)


def on_postgres(bench: Bench, row: Row, times: int, round_of: Callable[[str], None]) -> None:
    """The same fault with the study on a server."""
    with row.part(), postgres() as server:
        for _ in range(times):
            name = bench.new_name()
            bench.storages[name] = server.url
            round_of(name)


@fault(
    "F02",
    "kill -9 of one of two workers; the other waits at most 5 s, and a third takes its place",
    quick=False,
)
def kill_worker(bench: Bench, row: Row) -> None:
    thirds: list[bool] = []

    def round_of(name: str) -> None:
        process = bench.start(bench.search(name, "--workers=2"))
        known: dict[int, str] = {}
        delay = bench.random.uniform(0, 2)
        while process.poll() is None and len(known) < 2:  # until both are at work
            time.sleep(0.1)
            known = {
                t.user_attrs["pid"]: t.state.name
                for t in bench.trials(name)
                if "pid" in t.user_attrs
            }
        time.sleep(delay)
        known = {
            t.user_attrs["pid"]: t.state.name for t in bench.trials(name) if "pid" in t.user_attrs
        }
        killed = bench.random.choice(
            [pid for pid, state in known.items() if state == "RUNNING"] or [*known]
        )
        try:
            os.kill(killed, signal.SIGKILL)
        except ProcessLookupError:  # it had ended: none was killed
            return row.fault("lost", process.communicate()[1], process.returncode != 0)
        acknowledged, instant = bench.acknowledged(name), datetime.now()
        workers: set[int] = set()
        while process.poll() is None:
            workers |= {
                int(path.name)
                for path in processes_of({process.pid})
                if has(path / "cmdline", b"spawn_main")
            }
            time.sleep(0.1)
        _, error = process.communicate()
        row.tried += 1
        row.fault("lost", f"{name}: nobody took the place of {killed}", not workers - known.keys())
        thirds.append(
            bool({t.user_attrs.get("pid") for t in bench.trials(name)} - known.keys() - {None})
        )
        wait = longest_wait(bench.trials(name), known.keys() - {killed}, instant)
        row.notes += [f"{name}: nobody else was at work"] * math.isnan(wait)
        row.worst_wait_s = max(row.worst_wait_s, 0.0 if math.isnan(wait) else wait)
        row.fault("undetected", f"the other waited {wait:.1f} s", wait > 5)
        bench.check(row, name, acknowledged, error, one=False)

    while row.tried < (3 if bench.quick else 50):
        round_of(bench.new_name())
    if not bench.quick:
        on_postgres(bench, row, 10, round_of)
    row.notes.append(
        f"in {sum(thirds)} of {len(thirds)} the third was there in time for a trial of its own"
    )


def longest_wait(trials: Sequence[Any], pids: set[int], instant: datetime) -> float:
    """The most seconds after an instant that a worker took for one of its trials beside the training.

    NaN where none of them ended any.
    """
    longest = math.nan
    for pid in pids:
        before = instant
        for trial in trials:
            if (
                trial.user_attrs.get("pid") == pid
                and trial.datetime_complete
                and trial.datetime_complete > instant
            ):
                seconds = (trial.datetime_complete - before).total_seconds() - trial.user_attrs.get(
                    "seconds", 0.0
                )
                before = trial.datetime_complete
                if (
                    "not_needed" not in trial.user_attrs
                ):  # else it waits for the last ones, which others train
                    longest = max(seconds, 0.0 if math.isnan(longest) else longest)
    return longest


STAGES = {
    "states": "config.yaml",
    "search": "trial_0000",
    "full KD": "best_student.yaml",
    "fine-tuning": "full_kd/result.json",
    "export": "glue/results.json",
    "report": "student",
}


def outcome(bench: Bench, name: str) -> list[Any]:
    """What a whole run has found: the same, bit by bit, however often it was stopped."""
    run = bench.run(name)
    kd, glue = (
        json.loads((run / file).read_text())
        for file in ("full_kd/result.json", "glue/results.json")
    )
    scores = {role: line["score"] for role, line in glue["models"].items()}
    weights = hashlib.sha256((run / "student" / "model.safetensors").read_bytes()).hexdigest()
    return [kd["arch"], kd["history"], scores, weights, bench.story(name)]


def units_done(bench: Bench, run: Path) -> dict[Path, int]:
    """What each finished unit of a run's work has left, and when: shards, trials, fits, the student."""
    names = (
        "trial_*/weights.safetensors",
        "full_kd/result.json",
        "glue/*/result.json",
        "student/manifest.json",
    )
    paths = [path for name in names for path in run.glob(name)]
    paths += [*bench.states.rglob("*.bin"), *(bench.logs / "tokens").rglob("variant*.bin")]
    return {path: path.stat().st_mtime_ns for path in paths}


def fits_begun(run: Path) -> dict[Path, tuple[int, int]]:
    """Fits that are not finished: how many steps are in the checkpoint, and how many were made, as far as is known."""
    begun = {path.parent for name in ("full_kd", "glue/*") for path in run.glob(f"{name}/events*")}
    return {
        folder: (
            steps_of(last) if (last := folder / "last.ckpt").exists() else 0,
            steps_told(folder),
        )
        for folder in begun
        if not (folder / "result.json").exists()
    }


def repeated_units(
    done: dict[Path, int], begun: dict[Path, tuple[int, int]], num_epochs: int
) -> list[Path]:
    """What a second start has made again of the finished units, and fits of which it repeated more than an epoch."""
    again = [
        path
        for path, changed in done.items()
        if path.exists() and path.stat().st_mtime_ns != changed
    ]
    for folder, (kept, made) in begun.items():
        latest = max(folder.glob("events*"), key=lambda path: path.stat().st_mtime_ns)
        if min(steps_in(latest), default=kept) < kept or num_epochs * (made - kept) > steps_told(
            folder
        ):
            again.append(folder)
    return again


@fault(
    "F03",
    "kill -9 in each stage of a run: it ends with the same figures and weights, and at most one unit is made again",
    quick=False,
)
def kill_stages(bench: Bench, row: Row) -> None:
    def forget_states() -> None:
        for folder in (bench.states, bench.logs / "tokens"):
            shutil.rmtree(folder, ignore_errors=True)

    bench.reference  # noqa: B018 (stores them)
    whole = bench.logs / bench.new_name()
    forget_states()
    process = bench.start(bench.job(whole.name))
    begins, start = {}, time.monotonic()
    while process.poll() is None:
        begins |= {
            s: time.monotonic()
            for s, name in STAGES.items()
            if s not in begins and (whole / name).exists()
        }
        time.sleep(0.02)
    assert process.returncode == 0, process.communicate()[1]
    unbroken, expected = time.monotonic() - start, outcome(bench, whole.name)
    repeated = []
    ends = [*list(begins.values())[1:], time.monotonic()]
    for (stage, begin), end in zip(begins.items(), ends, strict=True):
        for _ in range(1 if bench.quick else 10):
            run = bench.logs / bench.new_name()
            if stage == "states":
                forget_states()
            process, start = bench.start(bench.job(run.name)), time.monotonic()
            while process.poll() is None and not (run / STAGES[stage]).exists():
                time.sleep(0.02)
            time.sleep(bench.random.uniform(0, end - begin))
            was_over = process.poll() is not None
            error, middle = kill_all(process), time.monotonic()
            if was_over:  # none was killed
                row.fault("lost", error, process.returncode != 0)
                continue
            acknowledged, done, begun = (
                bench.acknowledged(run.name),
                units_done(bench, run),
                fits_begun(run),
            )
            process = bench.start(bench.job(run.name))
            error += process.communicate()[1]
            row.tried += 1
            row.worst_wait_s = max(row.worst_wait_s, time.monotonic() - middle)
            repeated.append((time.monotonic() - start) / unbroken - 1)
            bench.check(row, run.name, acknowledged, error)
            row.fault("undetected", f"{stage}: {error}", process.returncode != 0)
            again = repeated_units(done, begun, num_epochs=2)
            row.fault(
                "duplicated", f"{stage}: made again {[str(path) for path in again]}", len(again) > 1
            )
            row.fault(
                "unequal", stage, process.returncode == 0 and outcome(bench, run.name) != expected
            )
    row.notes.append(
        f"an unbroken run takes {unbroken:.0f} s; with a kill {statistics.median(repeated):.0%} more, "
        f"{max(repeated):.0%} at most, the second start's imports among it"
    )


@fault(
    "F04",
    "SIGTERM, SIGINT, SIGUSR1, SIGINT twice, in a search, full KD and fine-tuning: code, time, what is left",
)
def signals(bench: Bench, row: Row) -> None:
    codes = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143}

    def end(process: subprocess.Popen[str], number: int, of: str, times: int = 1) -> None:
        what = f"{of}, {times} x {signal.Signals(number).name}"
        start = time.monotonic()
        for _ in range(times):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            time.sleep(0.05)
        try:
            _, error = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            error = kill_all(process)
        row.tried += 1
        wait = time.monotonic() - start
        row.worst_wait_s = max(row.worst_wait_s, wait)
        row.fault("undetected", f"{what}: it took {wait:.1f} s", wait > (10 if times == 1 else 5))
        row.fault(
            "undetected",
            f"{what}: {process.returncode} {error}",
            process.returncode != codes[number],
        )
        row.fault("undetected", f"{what}: {error}", "Traceback" in error)

    epochs = 8 if bench.quick else 40  # enough that it is not over before it is stopped
    options = [f"--full_kd.num_epochs={epochs}", f"--finetune.num_epochs={epochs}"]
    if not bench.quick:
        code, error = bench.call(bench.job(whole := bench.new_name(), *options))
        assert code == 0, error
        unbroken = outcome(bench, whole)
    for round_, number in enumerate((signal.SIGUSR1,) if bench.quick else [*codes] * 5):
        run = bench.run(name := bench.new_name())
        args = bench.job(name, *options, f"--data.num_workers={2 * (round_ % 2)}")
        for folder in (run / "full_kd", run / "glue"):  # one run is stopped in both
            process = bench.start(args)
            while process.poll() is None and not list(folder.rglob("last.ckpt")):
                time.sleep(0.02)
            time.sleep(bench.random.uniform(0, 0.3))
            end(process, number, f"{args[-1]}, in {folder.name}")
            # As far as the fit came: one of an epoch's end before it has fewer steps than the fit has told TensorBoard.
            kept = [(steps_of(path), steps_told(path.parent)) for path in folder.rglob("last.ckpt")]
            lost = not kept or any(steps < told for steps, told in kept)
            row.fault(
                "lost",
                f"in {folder.name} the checkpoint has, and the fit had made, so many steps: {kept}",
                lost,
            )
        code, error = bench.call(args)
        row.fault("undetected", f"after {name}: {code} {error}", code != 0)
        bench.check(row, name, {}, error)
        unequal = not bench.quick and code == 0 and outcome(bench, name) != unbroken
        row.fault("unequal", f"after signals {number}", unequal)
    cases = [
        (signal.SIGTERM, 1, 0),
        (signal.SIGINT, 1, 0),
        (signal.SIGINT, 2, 0),
        (signal.SIGTERM, 1, 2),
    ]
    if bench.quick:
        cases = cases[::3]
    else:
        cases += [
            (signal.SIGUSR1, 1, 0),
            (signal.SIGINT, 1, 2),
            (signal.SIGUSR1, 1, 2),
            (signal.SIGINT, 2, 2),
        ]
    for number, times, num_workers in cases * (1 if bench.quick else 10):
        name = bench.new_name()
        goes_on = (
            times == 2 and bench.random.random() < 0.5
        )  # to its end, which the others are too long for
        workers = 2 if bench.random.random() < 0.25 else 1
        args = bench.search(name, f"--search.num_epochs={1 if goes_on else 100_000}")
        args += [f"--data.num_workers={num_workers}", f"--workers={workers}"]
        process = bench.start(args)
        bench.wait_for_candidate(process, name)
        time.sleep(bench.random.uniform(0, 2))
        end(process, number, " ".join(args[-2:]), times)
        if goes_on:
            acknowledged = bench.acknowledged(name)
            code, error = bench.call_alone(args)
            row.fault("undetected", f"after two signals: {code} {error}", code != 0)
            bench.check(row, name, acknowledged, error, one=workers == 1)
        elif times == 1:
            bench.check_stopped(row, name, {})
        else:  # the second does not wait for the trial to be told
            bench.check_processes(row, name)


def steps_of(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, weights_only=True)["global_step"])


def steps_in(events: Path) -> list[int]:
    """The steps of a fit that TensorBoard was told of, numbered from 0, in a file or in all of a folder."""
    found = EventAccumulator(str(events)).Reload()
    return (
        [event.step for event in found.Scalars("train/loss")]
        if "train/loss" in found.Tags()["scalars"]
        else []
    )


def steps_told(folder: Path) -> int:
    """How many steps of a fit were told to TensorBoard."""
    return max(steps_in(folder), default=-1) + 1


@contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[Path]:
    """A small disk."""
    folder.mkdir(exist_ok=True)
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder],
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotRun(f"no disk can be mounted: {error}") from error
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
        folder.rmdir()


@fault(
    "F05",
    "a disk that is full before, or fills up while, the teacher's states are stored; then it is larger",
)
def full_disk(bench: Bench, row: Row) -> None:
    bench.reference  # noqa: B018 (its states lie elsewhere)
    if not bench.quick:
        full_of_states(bench, row)
    for kilobytes in (64,) if bench.quick else (32, 64, 128, 256):
        with tmpfs(bench.folder / "small", f"size={kilobytes}k") as disk:
            name = bench.new_name()
            args = bench.search(name, f"--states.folder={disk}")
            code, error = bench.call(args)
            row.tried += 1
            full = (
                code in (2, 3)
                and is_one_line(error)
                and " are free" in error
                and str(disk) in error
            )
            row.fault("undetected", f"{kilobytes} kB: exit {code}, {error}", not full)
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            code, error = bench.call(args)
            row.fault("undetected", error, code != 0)
            bench.check(row, name, {}, error)
    for kilobytes in (420,) if bench.quick else range(20, 460, 40):  # the run itself
        with tmpfs(bench.folder / "small", f"size={kilobytes}k") as disk:
            bench.roots[name := bench.new_name()] = disk
            args = bench.search(name)
            code, error = bench.call(args)
            row.tried += 1
            full = code == 3 and is_one_line(error) and "bytes are free" in error
            row.fault("undetected", f"{kilobytes} kB: exit {code}, {error}", not full)
            acknowledged = bench.acknowledged(name)
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            code, error = bench.call(args)
            row.fault("undetected", error, code != 0)
            bench.check(row, name, acknowledged, error)


def full_of_states(bench: Bench, row: Row) -> None:
    """20 MB in eight shards, on disks of 1 to 16 MB, and on one that somebody else fills after so many are there."""
    bench.write_rows(large := bench.folder / "large.txt", 800)
    options = ["--data.num_mask_variants=8", f"--text={large}", "--search.n_trials=2"]
    whole, folder = bench.new_name(), bench.folder / "large"
    code, error = bench.call(bench.search(whole, *options, f"--states.folder={folder}"))
    assert code == 0, error

    def shards(folder: Path) -> dict[str, os.stat_result]:
        return {path.name: path.stat() for path in folder.rglob("variant*")}

    sizes = {name: found.st_size for name, found in shards(folder).items()}
    row.notes.append(f"{len(sizes)} shards of {sum(sizes.values()) / 1e6:.1f} MB")
    for megabytes, fills_up in itertools.product((1, 2, 4, 6, 8, 10, 12, 16), (False, True)):
        with tmpfs(bench.folder / "small", f"size={64 if fills_up else megabytes}m") as disk:
            args = bench.search(name := bench.new_name(), *options, f"--states.folder={disk}")
            process = bench.start(args)
            while fills_up and process.poll() is None:
                time.sleep(0.001)
                if sum(found.st_size for found in shards(disk).values()) > megabytes << 20:
                    with suppress(OSError), (disk / "others").open("ab", buffering=0) as file:
                        while True:
                            file.write(b"x" * (1 << 16))
            error = process.communicate()[1]
            row.tried += 1
            full = (
                process.returncode in (2, 3)
                and is_one_line(error)
                and " are free" in error
                and str(disk) in error
            )
            row.fault("undetected", f"{megabytes} MB: exit {process.returncode}, {error}", not full)
            kept = shards(disk)
            parts = [shard for shard, found in kept.items() if found.st_size != sizes.get(shard)]
            row.fault("undetected", f"{megabytes} MB: parts of shards {parts}", len(parts))
            row.fault(
                "zombies", f"{megabytes} MB: parts of shards", len(list(disk.rglob("*.partial")))
            )
            (disk / "others").unlink(missing_ok=True)
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            code, error = bench.call(args)
            row.fault("undetected", error, code != 0)
            bench.check(row, name, {}, error, num_trials=2, like=whole)
            now = shards(disk)
            again = [
                shard
                for shard, found in kept.items()
                if now[shard].st_mtime_ns != found.st_mtime_ns
            ]
            row.fault("unequal", f"{megabytes} MB: made again {again}", len(again))


def limited(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@fault(
    "F06",
    "a limit on the size of files, and then none: in a search, and where a checkpoint is there",
    quick=False,
)
def file_limit(bench: Bench, row: Row) -> None:
    for half in range(20, 40, 6 if bench.quick else 1):  # 1 kB to 740 kB
        name, limit = bench.new_name(), int(2 ** (half / 2))
        process = bench.start(bench.search(name), preexec_fn=limited(limit))
        error = process.communicate()[1]
        if process.returncode == 0:  # no file was larger: nothing is tried
            bench.check(row, name, {}, error)
            continue
        row.tried += 1
        told = process.returncode == 3 and is_one_line(error)
        row.fault("undetected", f"{limit} bytes: {process.returncode} {error}", not told)
        acknowledged = bench.acknowledged(name)
        code, error = bench.call(bench.search(name))
        row.fault("undetected", error, code != 0)
        bench.check(row, name, acknowledged, error)
    run, args = stopped_run(bench)
    last = (run / "full_kd" / "last.ckpt").read_bytes()
    shutil.copytree(run, whole := bench.folder / f"whole_{run.name}")
    for share in (0.9,) if bench.quick else (0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        limit = int(share * len(last))
        process = bench.start(args, preexec_fn=limited(limit))
        error = process.communicate()[1]
        row.tried += 1
        told = process.returncode == 3 and is_one_line(error)
        row.fault(
            "undetected", f"checkpoint, {limit} bytes: {process.returncode} {error}", not told
        )
        row.fault("lost", "the checkpoint", (run / "full_kd" / "last.ckpt").read_bytes() != last)
        code, error = bench.call(args)
        row.fault("undetected", error, code != 0)
        bench.check(row, run.name, {}, error)
        shutil.rmtree(run)
        shutil.copytree(whole, run)


def stopped_run(bench: Bench, *more: str) -> tuple[Path, list[str]]:
    """A run that has a checkpoint of its full KD, and what it goes on with."""
    name = bench.new_name()
    args = bench.job(name, "--full_kd.num_epochs=15", *more)
    process, last = bench.start(args), bench.logs / name / "full_kd" / "last.ckpt"
    while process.poll() is None and not last.exists():
        time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    _, error = process.communicate()
    assert last.exists(), error
    return bench.logs / name, args


SYSTEM_CALLS = ("fsync,fdatasync", "pwrite64", "rename,renameat2", "ftruncate", "write")


@fault(
    "F07",
    "the N-th system call of a search, or of what follows it, fails, once: fsync, pwrite64, rename, ftruncate, write",
    quick=False,
)
def failing_calls(bench: Bench, row: Row) -> None:
    if not shutil.which("strace"):
        raise NotRun("needs strace")

    def fails(name: str, args: list[str], call: str, number: int) -> bool:
        """Whether so many were made, of which the last has failed."""
        trace = bench.folder / "trace"
        strace = ["strace", "-f", "--seccomp-bpf", "-o", str(trace), f"--trace={call}"]
        strace.append(f"--inject={call}:error=EIO:when={number}")  # counted in each thread
        process = bench.start(args, before=strace)
        _, error = process.communicate()
        if not has(trace, b"(INJECTED)"):
            return False
        row.tried += 1
        if process.returncode == 0:  # it did not matter
            bench.check(row, name, {}, error)
        # Calls are counted in each thread: the second that fails may be the telling of the first.
        lines = trace.read_text(errors="replace").splitlines()
        is_told = is_one_line(error) or any(
            'write(2, "kdnas: ' in line and "(INJECTED)" in line for line in lines
        )
        bad = process.returncode != 0 and not (process.returncode == 3 and is_told)
        row.fault(
            "undetected", f"{call} {number} of {args[0]}: exit {process.returncode}, {error}", bad
        )
        return True

    for call in SYSTEM_CALLS[: 2 if bench.quick else None]:
        for number in (3,) if bench.quick else (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233):
            name = bench.new_name()
            if not fails(name, bench.search(name), call, number):
                break
            acknowledged = bench.acknowledged(name)
            code, error = bench.call(bench.search(name))
            row.fault("undetected", f"after {call} {number}: {error}", code != 0)
            bench.check(row, name, acknowledged, error)
    if not row.tried:
        raise NotRun("strace may not look into processes here")
    if not bench.quick:
        failing_calls_of_a_run(bench, row, fails)


def failing_calls_of_a_run(
    bench: Bench, row: Row, fails: Callable[[str, list[str], str, int], bool]
) -> None:
    """In full KD, fine-tuning, export and report: the next start ends with the weights of an unharmed run."""
    run, args = stopped_run(bench)
    shutil.copytree(run, whole := bench.folder / f"whole_{run.name}")
    student, weights = run / "student" / "model.safetensors", b""
    for call, numbers in {"": (0,), **dict.fromkeys(SYSTEM_CALLS, (1, 3, 8, 21, 55, 144))}.items():
        made = 0
        for number in numbers:
            shutil.rmtree(run)
            shutil.copytree(whole, run)
            if call and not fails(run.name, args, call, number):
                break
            made += 1
            code, error = bench.call(args)
            row.fault("undetected", f"after {call} {number}: {error}", code != 0)
            if code == 0:
                bench.check(row, run.name, {}, error)
                weights = weights or student.read_bytes()
                row.fault(
                    "unequal", f"{call} {number}: other weights", student.read_bytes() != weights
                )
        row.notes.append(f"of a run, {call}: {made}")


def damages(shard: Path, other: Path) -> dict[str, Callable[[], Any]]:
    content = shard.read_bytes()

    def flip(place: int) -> None:
        changed = bytearray(content)
        changed[place] ^= 1
        shard.write_bytes(changed)

    def swap() -> None:
        shard.write_bytes(other.read_bytes())
        other.write_bytes(content)

    return {
        "first bit": lambda: flip(0),
        "middle bit": lambda: flip(len(content) // 2),
        "last bit": lambda: flip(-1),
        "one byte less": lambda: shard.write_bytes(content[:-1]),
        "100 bytes less": lambda: shard.write_bytes(content[:-100]),
        "empty": lambda: shard.write_bytes(b""),
        "one byte more": lambda: shard.write_bytes(content + b"\0"),
        "swapped": swap,
        "gone": lambda: shard.unlink(),
        "under the name of another content": lambda: shard.rename(
            shard.with_name(f"{shard.name.split('.')[0]}.{other.name.split('.')[1]}.bin")
        ),
        "half written": lambda: shard.rename(shard.with_name(f".{shard.name}.partial")),
    }


@fault(
    "F08",
    "a stored shard that is damaged, cut, swapped, gone, renamed or half written; each of two",
)
def shards(bench: Bench, row: Row) -> None:
    folder, whole = bench.folder / "two_shards", bench.new_name()
    options = (f"--states.folder={folder}", "--data.num_mask_variants=2", "--search.num_epochs=2")
    code, error = bench.call(bench.search(whole, *options))
    assert code == 0, error
    pair = sorted(folder.rglob("*.bin"))
    known = {path: path.read_bytes() for path in pair}
    for shard, other in (pair,) if bench.quick else (pair, pair[::-1]):
        for what, damage in list(damages(shard, other).items())[:: 8 if bench.quick else 1]:
            before = other.stat().st_mtime_ns
            damage()
            name = bench.new_name()
            code, error = bench.call(bench.search(name, *options))
            row.tried += 1
            stored = {path: path.read_bytes() for path in sorted(folder.rglob("*.bin"))}
            row.fault("undetected", f"{what}: exit {code} {error}", code != 0 or stored != known)
            bench.check(row, name, {}, error, like=whole)
            again = what != "swapped" and other.stat().st_mtime_ns != before
            row.fault("unequal", f"{what}: the other shard was stored again", again)


# A search that writes down each shard that its teacher computes.
COUNTED = """
import os, sys
from kdnas.cli.main import main
from kdnas.distillation.state_cache import StateCache

compute = StateCache._compute

def counted(self, *args):
    with open(sys.argv[1], "a") as file:
        file.write(f"{os.getsid(0)}\\n")
    return compute(self, *args)

StateCache._compute = counted
sys.exit(main(sys.argv[2:]))
"""


@fault(
    "F09",
    "two searches store one teacher's states at once; in half of the rounds one is killed",
    quick=False,
)
def two_builders(bench: Bench, row: Row) -> None:
    bench.reference  # noqa: B018
    (whole,) = bench.states.rglob("*.bin")
    for number in range(1 if bench.quick else 20):
        states, names = bench.folder / f"states{number}", [bench.new_name(), bench.new_name()]
        counts = bench.folder / f"count{number}"

        def start(name: str, states: Path = states, counts: Path = counts) -> subprocess.Popen[str]:
            args = bench.search(name, f"--states.folder={states}")
            return bench.start_told(["-c", COUNTED, str(counts)], args)

        one, other = map(start, names)
        kills = number % 2 == 0
        if kills:  # whoever runs the teacher
            while one.poll() is None and not (
                counts.exists() and counts.read_text().endswith("\n")
            ):
                time.sleep(0.002)
            if counts.read_text().split()[0] == str(other.pid):
                names, one, other = names[::-1], other, one
            time.sleep(bench.random.uniform(0, 0.05))
            kill_all(one)
            one = start(names[0])
        for name, process in zip(names, (one, other), strict=True):
            _, error = process.communicate()
            row.tried += 1
            bench.check(row, name, {}, error)
        stored = [(path.name, path.read_bytes()) for path in states.rglob("*.bin")]
        row.fault(
            "unequal", [name for name, _ in stored], stored != [(whole.name, whole.read_bytes())]
        )
        passes = len(
            counts.read_text().split()
        )  # one shard is all that there is; whoever was killed had begun it, perhaps
        row.fault(
            "duplicated",
            f"the teacher ran {passes} times",
            passes not in ((1, 2) if kills else (1,)),
        )
        shutil.rmtree(states)


@fault(
    "F10",
    "study.db cut, or one of its pages flipped or zeroed, between two starts: one line, or the same study",
    quick=False,
)
def damaged_study(bench: Bench, row: Row) -> None:
    code, error = bench.call(
        bench.search(name := bench.new_name(), f"--search.n_trials={bench.num_trials // 2}")
    )
    assert code == 0, error
    run, acknowledged, unnoticed = bench.run(name), bench.acknowledged(name), []
    shutil.copytree(run, whole := bench.folder / f"whole_{name}")
    content = (run / "study.db").read_bytes()
    size = int.from_bytes(content[16:18], "big")  # of a page
    damages = {
        f"cut to {end} bytes": content[:end] for end in (1, 99, *range(0, len(content), 4 * size))
    }
    for start in range(0, len(content), size):
        before, page, after = (
            content[:start],
            content[start : start + size],
            content[start + size :],
        )
        damages[f"page {start // size} flipped"] = (
            before + bytes(255 - byte for byte in page) + after
        )
        damages[f"page {start // size} zeroed"] = before + bytes(size) + after
    for what, damaged in list(damages.items())[:: 5 if bench.quick else 1]:
        (run / "study.db").write_bytes(damaged)
        code, error = bench.call(bench.search(name))
        row.tried += 1
        refused = code == 2 and is_one_line(error) and ("study.db" in error or "no study" in error)
        row.fault(
            "undetected",
            f"{what}: exit {code}, {error}",
            not refused and (code != 0 or "cut" in what),
        )
        if code == 0:
            unnoticed.append(what)
            values = bench.acknowledged(name)
            lost = [number for number, value in acknowledged.items() if values.get(number) != value]
            row.fault("lost", f"{what}: trials {lost}", len(lost))
            row.fault("unequal", what, bench.story(name) != bench.story(bench.reference))
        shutil.rmtree(run)
        shutil.copytree(whole, run)
    row.notes.append(f"gone on from: {', '.join(unnoticed) or 'none'}")


@fault(
    "F11",
    "candidates with a reward, loss or latency that is NaN, infinite or no latency: each of twelve, and whole",
)
def not_finite(bench: Bench, row: Row) -> None:
    from kdnas.nas.search import open_study, search
    from kdnas.nas.space import SearchSpace
    from kdnas.report.page import trials_frame

    choices = {"num_hidden_layers": [1, 2, 3], "num_attention_heads": [1], "hidden_size": [16, 32]}
    space = SearchSpace({**choices, "intermediate_size": [64], "hidden_act": ["gelu", "relu"]})
    for value in (float("nan"), float("inf"), float("-inf"), None, "text", 1e400):
        for place in (0, 3):

            def evaluate(trial: Any, arch: Any, value: Any = value, place: int = place) -> Any:
                return value if trial.number == place else 0.5

            name = bench.new_name()
            study = open_study(f"sqlite:///{bench.folder}/{name}.db", name, {})
            best = search(evaluate, space, study, 4)
            row.tried += 1
            states = trials_frame(study).set_index("number").state
            row.fault(
                "undetected", f"{value} at {place}", states[place] != "FAIL" or best.value != 0.5
            )
    losses = [
        (place, value)
        for place in ("first step", "last step", "held out")
        for value in (math.nan, math.inf)
    ]
    losses += [(place, -value) for place, value in losses if value == math.inf]
    latencies = [("latency", value) for value in (0.0, math.nan, -1.0)]
    for place, value in (losses + latencies)[:: 14 if bench.quick else 1]:
        not_finite_in_search(bench, row, place, value)
    row.notes.append("void: minimising; a search knows only rewards, which it maximises")


def not_finite_in_search(bench: Bench, row: Row, place: str, value: float) -> None:
    """What would be the best student has such a loss or latency: it fails, the others are what they are without it."""
    from kdnas.deploy import latency
    from kdnas.distillation.module import HiddenStateDistillModule as Module
    from kdnas.nas.record import failure_of
    from kdnas.nas.trials import trials_frame

    bad, _ = max(bench.story(bench.reference), key=lambda pair: pair[1])
    step, forward, measure = Module.training_step, Module.forward, latency.measure_latency

    def is_bad(values: Any) -> bool:
        return all(getattr(values, name) == known for name, known in bad.items())

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        at = self.global_step == 0 if place == "first step" else self.trainer.is_last_batch
        return step(self, batch, batch_idx) * (value if at and is_bad(self.arch) else 1)

    def held_out(self: Any, student: Any, teacher: Any) -> Any:
        sums, counts = forward(self, student, teacher)
        return sums * (1 if self.training or not is_bad(self.arch) else value), counts

    def measured(models: Sequence[Any], settings: Any) -> Any:
        student, *others = measure(models, settings)
        return [replace(student, median_ms=value) if is_bad(models[0].config) else student, *others]

    hook = {
        "held out": mock.patch.object(Module, "forward", held_out),
        "latency": mock.patch.object(latency, "measure_latency", measured),
    }.get(place, mock.patch.object(Module, "training_step", training_step))
    name = bench.new_name()
    with hook:
        code, error = bench.call(bench.search(name))
    row.tried += 1
    trials = bench.trials(name)
    reasons = [failure_of(t) for t in trials if t.params == bad]
    row.fault("undetected", f"{place} {value}: exit {code}, {error}", code != 0)
    row.fault("undetected", f"{place} {value}: {reasons}", not reasons or not all(reasons))
    frame = trials_frame(bench.study(name))
    row.fault(
        "undetected", "it is on the front", frame.loc[frame.state == "FAIL", "front"].notna().any()
    )
    bench.check(row, name, {}, error, one=False)  # another is proposed in its place


@contextmanager
def memory_group(megabytes: int) -> Iterator[Path]:
    """A cgroup (version 1 or 2) whose processes the kernel kills when they take more."""
    old, new = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    root = old if old.is_dir() else new
    group, limit = (
        root / f"kdnas-faults-{os.getpid()}",
        "memory.limit_in_bytes" if root == old else "memory.max",
    )
    try:
        group.mkdir()
        (group / limit).write_text(str(megabytes << 20))
    except OSError as error:
        raise NotRun(f"no cgroup of memory can be made: {error}") from error
    try:
        yield group
    finally:
        group.rmdir()


ACTS = "gelu,relu,silu,tanh,gelu_new,quick_gelu,relu6,sigmoid,gelu_fast,mish"


def deadly_search(
    bench: Bench,
    row: Row,
    way: str,
    signal_name: str,
    words: str = "out of memory",
    *more: str,
    **options: Any,
) -> None:
    """Half of the students kill the process, or fill its memory; the search, with its defaults, goes on with others.

    Ten of 20; in --quick one of two.
    """
    from kdnas.nas.record import failure_of

    acts = ACTS.split(",")[: 1 if bench.quick else 10]
    space = [
        "--space.num_attention_heads=[1]",
        "--space.hidden_size=[32]",
        "--space.num_hidden_layers=[2]",
    ]
    space += ["--space.intermediate_size=[16,32]", f"--space.hidden_act=[{','.join(acts)}]"]

    def searched(way: str, **options: Any) -> tuple[str, str, list[Any], list[int]]:
        name = bench.new_name()
        args = bench.search(
            name, "--recipe.start=hooks.Deadly", "--search.n_trials=20", *space, *more
        )
        environment = {"DEADLY": way, "STARTS": str(starts := bench.folder / f"starts_{name}")}
        process = bench.start(args, environment=environment, **options)
        _, error = process.communicate()
        row.fault("undetected", f"exit {process.returncode}: {error}", process.returncode != 0)
        trials = [t for t in bench.trials(name) if "twin_of" not in t.user_attrs]
        return (
            name,
            error,
            trials,
            [json.loads(line)[1] for line in starts.read_text().splitlines()],
        )

    name, error, trials, memory = searched(way, **options)
    for act in acts:
        deadly = [
            t
            for t in trials
            if (t.params["intermediate_size"], t.params["hidden_act"]) == (16, act)
        ]
        row.tried += bool(deadly)
        told = [(t.user_attrs.get("died") if signal_name else failure_of(t)) or "" for t in deadly]
        right = [(signal_name or words) in reason for reason in told] == [True] * (
            2 if signal_name else 1
        )
        row.fault(
            "undetected",
            f"{way} {act}: {told}",
            not right or any(t.state.name != "FAIL" for t in deadly),
        )
    grown = (max(memory) - min(memory)) >> 20
    row.fault(
        "zombies", f"a candidate begins with {grown} MB more", not signal_name and grown > 128
    )
    bench.check(row, name, {}, error, one=False, num_trials=len(acts))
    if not bench.quick:
        known = bench.story(searched("")[0])
        others = [pair for pair in bench.story(name) if pair not in known]
        row.fault("unequal", f"{way}: {others}", len(others))


@fault(
    "F36",
    "candidates that crash in native code, in a search with its defaults, or that hang",
    quick=False,
)
def crash(bench: Bench, row: Row) -> None:
    deadly_search(bench, row, "crash", "SIGSEGV")
    if not bench.quick:
        deadly_search(bench, row, "hang", "", "it took longer", "--candidate_timeout=0.25")


@fault(
    "F12",
    "ten candidates of 20 take more memory than RLIMIT_AS, theirs or the command's, or a cgroup leaves",
)
def memory(bench: Bench, row: Row) -> None:
    deadly_search(bench, row, "limit", "")
    if bench.quick:
        return row.leave_out("limits of the whole command, and a cgroup's (not in --quick)")

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))

    deadly_search(bench, row, "ulimit", "", preexec_fn=limited)
    row.notes.append(
        "the cgroup has 1,536 MB: 300 MB are less than what torch and transformers take to be imported"
    )
    with row.part(), memory_group(1536) as group:

        def enter() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

        deadly_search(bench, row, "kernel", "SIGKILL", preexec_fn=enter)


def told_search(
    bench: Bench, url: str, patience: float = 600.0
) -> tuple[str, Callable[[], Any], Path]:
    """A search of two workers in a server's study: name, what starts it, and where each training is written down."""
    name = bench.new_name()
    bench.storages[name], starts = url, bench.folder / f"starts_{name}"
    starts.touch()
    args = bench.search(name, "--workers=2", "--recipe.start=hooks.Told")
    environment = {"PATIENCE": str(patience), "STARTS": str(starts)}
    return name, lambda: bench.start(args, environment=environment), starts


def check_told(
    bench: Bench, row: Row, name: str, acknowledged: dict[int, Any], error: str, starts: Path
) -> None:
    """Every student was trained once by one of two workers, and is stored; no trial failed."""
    bench.check(row, name, acknowledged, error, one=False)
    trained = [json.dumps(json.loads(line)[0]) for line in starts.read_text().splitlines()]
    row.fault("lost", f"{name}: trained again", len(trained) - len(set(trained)))
    trials = bench.trials(name)
    workers = {t.user_attrs["pid"] for t in trials if "pid" in t.user_attrs}
    row.fault("lost", f"{name}: {len(workers)} workers", max(0, len(workers) - 2))
    failed = [
        t.number for t in trials if t.state.name == "FAIL" and "not_needed" not in t.user_attrs
    ]
    row.fault("lost", f"{name}: failed {failed}", len(failed))


def outage(bench: Bench, row: Row, server: Postgres, seconds: float) -> None:
    """A server that is away for so long, at a random instant of a search."""
    name, start, starts = told_search(bench, server.url, 600.0 if math.isfinite(seconds) else 5.0)
    process, run = start(), bench.logs / name
    bench.wait_for_candidate(process, name)
    time.sleep(bench.random.uniform(0, 2))
    acknowledged = bench.acknowledged(name)
    server.stop()
    began = time.monotonic()
    row.tried += 1
    if math.isfinite(seconds):
        time.sleep(seconds)
        server.start()
        _, error = process.communicate()
        row.fault(
            "lost", f"{seconds:g} s: exit {process.returncode} {error}", process.returncode != 0
        )
        return check_told(bench, row, name, acknowledged, error, starts)
    _, error = process.communicate()
    row.worst_wait_s = max(row.worst_wait_s, time.monotonic() - began)
    told = process.returncode == 3 and is_one_line(error)
    row.fault("undetected", f"for ever: exit {process.returncode} {error}", not told)
    finished = {
        int(path.parent.name.removeprefix("trial_"))
        for path in run.glob("trial_*/weights.safetensors")
    }
    kept = {int(path.stem.removeprefix("unsent_")) for path in run.glob("unsent_*.json")}
    server.start()
    process = start()
    _, error = process.communicate()
    row.fault("undetected", error, process.returncode != 0)
    bench.check(row, name, acknowledged, error, one=False)
    missing = finished - bench.acknowledged(name).keys()
    row.fault("lost", f"{name}: trained, and not stored: {missing}", len(missing))
    row.fault("zombies", f"{name}: kept, and not taken up", len(list(run.glob("unsent_*"))))
    row.notes += [f"{name}: {len(kept)} results kept for the next start"] * bool(kept)


@fault(
    "F13",
    "PostgreSQL stopped in a search of two workers: for 5 s, 60 s, and longer than it is waited for",
    quick=False,
)
def server_stopped(bench: Bench, row: Row) -> None:
    with postgres() as server:
        for seconds in (5.0, math.inf) if bench.quick else (5.0, 60.0, math.inf) * 10:
            outage(bench, row, server, seconds)
    row.fault(
        "undetected",
        "no result was ever kept",
        not any("results kept" in note for note in row.notes),
    )
    row.notes.append("for ever: 5 s of patience instead of 600")


@fault(
    "F14",
    "connections to PostgreSQL cut in a search of two workers, while they are in use and idle",
    quick=False,
)
def connections_cut(bench: Bench, row: Row) -> None:
    with postgres() as server:
        while row.tried < (3 if bench.quick else 50):
            name, start, starts = told_search(bench, server.url)
            process = start()
            bench.wait_for_candidate(process, name)
            acknowledged: dict[int, Any] = {}
            while process.poll() is None:
                acknowledged = bench.acknowledged(name) | acknowledged  # what each was first
                row.tried += server.cut() > 0
                time.sleep(bench.random.uniform(0.2, 2))
            _, error = process.communicate()
            row.fault("lost", f"exit {process.returncode} {error}", process.returncode != 0)
            check_told(bench, row, name, acknowledged, error, starts)


@contextmanager
def spoilt_teacher(bench: Bench) -> Iterator[Path]:
    folder = bench.folder / "spoilt"
    shutil.copytree(bench.teacher, folder)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@fault("F15", "a teacher that is missing, empty, cut, of another kind, or has no tokenizer")
def bad_teachers(bench: Bench, row: Row) -> None:
    def edit(path: Path, **values: object) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    weights, gpt2 = (
        "model.safetensors",
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
    )
    no_config, cut = "'{}' has no readable config.json", "'{}/model.safetensors' is truncated"
    spoil: dict[str, tuple[Callable[[Path], Any], str]] = {
        "no folder": (shutil.rmtree, "'{}' does not exist"),
        "empty folder": (lambda path: [file.unlink() for file in path.iterdir()], no_config),
        "no tokenizer": (
            lambda path: [file.unlink() for file in path.glob("tokenizer*")],
            "'{}' has no tokenizer",
        ),
        "config is no JSON": (lambda path: (path / "config.json").write_text("{no"), no_config),
        "weights cut": (
            lambda path: (path / weights).write_bytes((path / weights).read_bytes()[:-99]),
            cut,
        ),
        "weights empty": (lambda path: (path / weights).write_bytes(b""), cut),
        "a decoder": (
            lambda path: edit(path / "config.json", is_decoder=True),
            "'{}' is a decoder",
        ),
        "another family": (
            lambda path: edit(path / "config.json", **gpt2),
            "'gpt2' is not supported",
        ),
    }
    for what, (damage, words) in spoil.items():
        with spoilt_teacher(bench) as folder:
            damage(folder)
            args = bench.search(bench.new_name(), f"--teacher={folder}")
            bench.refuse(row, what, args, words.format(folder), bench.call_alone)
    with spoilt_teacher(bench) as folder:
        args = bench.search(bench.new_name(), f"--teacher={folder}", "--search.n_trials=1")
        bench.allow(row, "nothing spoilt", args)
    away = partial(bench.call_alone, environment={"HF_HUB_OFFLINE": "1"})
    args = bench.search(bench.new_name(), "--teacher=nobody/nothing")
    bench.refuse(row, "a hub's name", args, "'nobody/nothing' was not found", away)
    row.fault("undetected", f"one took {row.worst_wait_s:.1f} s", row.worst_wait_s > 5)


TAG = "could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:pathlib.Path.touch'"


@fault(
    "F16",
    "pickles that execute: weights, checkpoints, stored shards and tokens, configs, manifests",
)
def pickles(bench: Bench, row: Row) -> None:
    payload = {"state_dict": Payload(bench.canary)}
    with spoilt_teacher(bench) as folder:
        weights, states = folder / "pytorch_model.bin", f"--states.folder={folder / 'states'}"
        tensors = load((folder / "model.safetensors").read_bytes())
        (folder / "model.safetensors").unlink()
        torch.save(payload, weights)
        args = bench.search(bench.new_name(), f"--teacher={folder}", states, "--search.n_trials=1")
        bench.refuse(row, "weights", args, f"'{weights}' is truncated or holds more than tensors")
        torch.save(tensors, weights)
        bench.allow(row, "weights of tensors alone", args)
    torch.save(payload, checkpoint := bench.folder / "evil.ckpt")
    model = [
        f"--model.teacher={bench.teacher}",
        f"--data.text={bench.text}",
        f"--ckpt_path={checkpoint}",
    ]
    arch = '--model.arch={"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}'
    bench.refuse(
        row, "checkpoint of fit", ["fit", *model, arch], f"'{checkpoint}' is damaged or holds"
    )
    checkpoint.unlink()
    (shard,) = (bench.logs / bench.reference and bench.states).rglob("*.bin")
    stored = shard.read_bytes()
    torch.save(payload, shard)
    code, error = bench.call(bench.search(bench.new_name()))
    row.tried += 1
    right = code == 0 and f"{shard} is damaged" in error and shard.read_bytes() == stored
    row.fault("undetected", f"shard: exit {code}, {error}", not right)
    bench.look_at_canary(row, "shard")
    tag = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{bench.canary}']]"
    (bench.folder / "a.yaml").write_text(f"name: {tag}\n")
    bench.refuse(row, "config", ["search", f"--config={bench.folder / 'a.yaml'}"], TAG)
    run = bench.logs / bench.reference
    known = (run / "manifest.json").read_bytes()
    torch.save(payload, run / "manifest.json")
    bench.refuse(row, "manifest", ["verify", str(run)], f"'{run / 'manifest.json'}' is damaged")
    (run / "manifest.json").write_bytes(known)
    bench.allow(row, "manifest as it was", ["verify", str(run)])
    if not bench.quick:
        pickles_in_run(bench, row, tag)


def pickles_in_run(bench: Bench, row: Row, tag: str) -> None:
    """The same in each file that a run goes on from: it is refused in a line, or the file is made again."""
    run, args = stopped_run(bench)
    shutil.copytree(run, whole := bench.folder / f"whole_{run.name}")
    last = Path("full_kd/last.ckpt")
    state = torch.load(run / last, weights_only=True)
    evil = Payload(bench.canary)
    buffers = {key: io.BytesIO() for key in ("all", "optimizer", "random", "array", "tag")}
    torch.save(evil, buffers["all"])
    torch.save(state | {"optimizer_states": [evil]}, buffers["optimizer"])
    torch.save(state | {"callbacks": state["callbacks"] | {"random": evil}}, buffers["random"])
    buffers["tag"].write(f"name: {tag}\n".encode())
    numpy.save(buffers["array"], numpy.array([evil], dtype=object), allow_pickle=True)
    carriers = {
        "checkpoint": ([run / last], "all"),
        "optimizer's state": ([run / last], "optimizer"),
        "random state": ([run / last], "random"),
        "candidates' weights": ([*run.glob("trial_*/weights.safetensors")], "all"),
        "candidates' moments": ([*run.glob("trial_*/optimizer.safetensors")], "all"),
        "tokens": ((bench.logs / "tokens").glob("*/variant00.bin"), "array"),
        "shards, arrays of objects": (bench.states.rglob("*.bin"), "array"),
        "a result that was kept": ([run / "unsent_0000.json"], "all"),
        "config of the run": ([run / "config.yaml"], "tag"),
        "best student": ([run / "best_student.yaml"], "tag"),
        "database": ([run / "study.db"], "all"),
    }
    for what, (paths, content) in carriers.items():
        if what.startswith("candidates'"):
            (run / last).unlink()  # else they are not read
        assert (paths := list(paths)), f"{what}: there are none"
        known = {path: path.read_bytes() for path in paths if path.exists()}
        for path in paths:
            path.write_bytes(buffers[content].getvalue())
        code, error = bench.call(args)
        row.tried += 1
        if what in (
            "tokens",
            "shards, arrays of objects",
        ):  # of this run, and of other texts and teachers
            right = code == 0 and any(path.read_bytes() == stored for path, stored in known.items())
        else:
            right = code == 2 and is_one_line(error) and any(f"{path}'" in error for path in paths)
        row.fault("undetected", f"{what}: exit {code}, {error}", not right)
        bench.look_at_canary(row, what)
        for path, stored in known.items():
            path.write_bytes(stored)
        shutil.rmtree(run)
        shutil.copytree(whole, run)
    row.notes.append(
        "void: a sampler's file; its state is in the database, and CMA-ES, which pickles it, is refused"
    )


@fault("F17", "code in a checkpoint, with an answer on stdin and without")
def remote_code(bench: Bench, row: Row) -> None:
    for answer in (lambda *_: "y", mock.Mock(side_effect=EOFError)):
        with spoilt_teacher(bench) as folder, mock.patch("builtins.input", answer):
            (folder / "evil.py").write_text(
                f"import pathlib\npathlib.Path({str(bench.canary)!r}).touch()\n"
            )
            classes = {
                "AutoConfig": "evil.Config",
                "AutoModel": "evil.Model",
                "AutoTokenizer": ["evil.T", "evil.T"],
            }
            for name in ("config.json", "tokenizer_config.json"):
                config = json.loads((folder / name).read_text())
                (folder / name).write_text(json.dumps(config | {"auto_map": classes}))
            code, error = bench.call(bench.search(bench.new_name(), f"--teacher={folder}"))
            row.tried += 1
            row.fault(
                "undetected", f"a known model: exit {code}, {error}", code != 0
            )  # its code is left alone
            bench.look_at_canary(row, "a known model")
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
            args = bench.search(bench.new_name(), f"--teacher={folder}")
            bench.refuse(row, "an unknown one", args, "'evil' is not supported")


NAMES = (
    "../x",
    "/etc/x",
    "a/../../x",
    "..",
    ".",
    "",
    "a\0b",
    "a\nb",
    "x" * 300,
    "-rf",
    "%2e%2e/",
    "a b",
)


@fault("F18", "names of runs that lead elsewhere, and a run that is a link")
def names(bench: Bench, row: Row) -> None:
    for name in NAMES:
        bench.refuse(row, repr(name), bench.search(name), f"The run name {name!r} is not valid")
    bench.allow(
        row, "a name that leads nowhere else", bench.search("a-b_1..c", "--search.n_trials=1")
    )
    bench.logs.mkdir(exist_ok=True)
    (bench.logs / "link").symlink_to(bench.folder / "teacher")
    bench.refuse(row, "a link", bench.search("link"), f"{bench.logs / 'link'}' is a link to")
    (bench.logs / "link").unlink()


@fault(
    "F19",
    "YAML: tags, keys given twice or unknown, bombs, 50 MB, no mapping, NaN, more than the teacher has, exponents",
)
def yaml(bench: Bench, row: Row) -> None:
    path = bench.folder / "a.yaml"
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{name}: &{name} [{','.join(9 * ['*' + below])}]\n"
        for below, name in zip("abcdefg", "bcdefgh", strict=True)
    )
    texts = {
        "tag": ("name: !!python/object/apply:os.getcwd []", "constructor"),
        "twice": ("name: a\nname: b", "given twice"),
        "unknown": ("teachr: x", "Did you mean 'teacher'?"),
        "bomb": (bomb, "aliases"),
        "50 MB": ("#" * 50_000_000, "characters"),
        "no mapping": ("- 1\n- 2", "config"),
        "NaN": ("search: {alpha: .nan}", "alpha"),
        "NaN in a range": ("space: {hidden_size: [16, .nan]}", "hidden_size"),
        "beyond the teacher": ("space: {num_hidden_layers: [3]}", "num_hidden_layers"),
        "nothing": ("workers: null", "workers is null"),
        "itself": ("sampler: &a {class_path: x, init_args: *a}", "contains itself"),
        "exponent": ("recipe: {learning_rate: -1e-3}", "learning_rate is -0.001"),
    }
    path.touch()
    for what, (text, words) in texts.items():
        path.write_text(text)
        args = ["search", f"--config={path}", f"--teacher={bench.teacher}", f"--text={bench.text}"]
        bench.refuse(row, what, args, words)


def write_text(path: Path, values: Sequence[Any], column: str = "text") -> None:
    """Rows in the format that the suffix says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table({column: values}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({column: value}) + "\n" for value in values))
    else:
        head = f"{column},other\n" if path.suffix == ".csv" else ""
        tail = "," if path.suffix == ".csv" else ""
        path.write_text(head + "".join(f"{value or ''}{tail}\n" for value in values))


def refuse_texts(
    bench: Bench, row: Row, words: str, files: dict[str, bytes | Sequence[Any]], column: str
) -> None:
    for name, content in files.items():
        path = bench.folder / name
        path.write_bytes(content) if isinstance(content, bytes) else write_text(
            path, content, column
        )
        bench.refuse(row, name, bench.search(bench.new_name(), f"--text={path}"), words)
        path.unlink()


def refused(
    name: str, what: str, words: str, files: dict[str, bytes | Sequence[Any]], column: str = "text"
) -> None:
    """Put texts that are refused with these words into the table of faults."""
    fault(name, what)(lambda bench, row: refuse_texts(bench, row, words, files, column))


def cut_file(suffix: str) -> bytes:
    """A whole file of 200 rows but its last 100 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        write_text(path := Path(folder) / f"a{suffix}", [f"row {i}" for i in range(200)])
        return path.read_bytes()[:-100] if suffix == ".parquet" else path.read_bytes()[:-5]


HARDLY = ["one", "two"] + 9_998 * [None]
refused(
    "F20",
    "a text that is empty, as txt and jsonl",
    "no usable rows",
    {"a.txt": b"", "a.jsonl": b""},
)
refused(
    "F21",
    "empty and blank rows only",
    "no usable rows",
    {"a.txt": b" \n\t\n\n" * 99, "a.jsonl": b'{"text": " "}\n' * 99},
)
refused(
    "F22",
    "NUL bytes",
    "in row 2",
    {"a.txt": b"one\nt\0wo\n", "a.jsonl": b'{"text": "a"}\n{"text": "t\\u0000o"}\n'},
)
refused(
    "F24",
    "no UTF-8",
    "in row 2",
    {"a.txt": b"one\ncaf\xe9\n", "a.jsonl": b'{"text": "one"}\n{"text": "caf\xe9"}\n'},
)
refused(
    "F25",
    "a column of another name, in each format that has columns",
    "choose from its columns, 'body'",
    {f"a.{suffix}": ["one", "two", "three"] for suffix in ("jsonl", "csv", "parquet")},
    "body",
)
refused(
    "F28",
    "cut files: jsonl, parquet, and what only begins like parquet",
    "cannot be read",
    {
        "a.jsonl": cut_file(".jsonl"),
        "a.parquet": cut_file(".parquet"),
        "b.parquet": b"PAR1 and no more",
    },
)
refused(
    "F29",
    "one good row among 9,999 bad ones, and two among 9,998",
    "usable",
    {
        f"{rows[1] or 'one'}.{suffix}": rows
        for rows in (HARDLY, ["one", *9_999 * [None]])
        for suffix in ("txt", "jsonl", "csv", "parquet")
    },
)


def counted_rows(bench: Bench, row: Row, name: str, values: Sequence[Any], words: str) -> None:
    """Rows that are left out by rule: they are counted, told, and change nothing."""
    write_text(path := bench.folder / name, values)
    code, error = bench.call(bench.search(run := bench.new_name(), f"--text={path}"))
    path.unlink()
    row.tried += 1
    row.fault("undetected", f"{name}: exit {code}, {error}", code != 0 or words not in error)
    row.fault("unequal", name, bench.story(run) != bench.story(bench.reference))


@fault("F26", "duplicate rows, in each format: counted and told")
def duplicates(bench: Bench, row: Row) -> None:
    rows = bench.text.read_text().splitlines()
    for suffix in ("txt",) if bench.quick else ("txt", "jsonl", "csv", "parquet"):
        counted_rows(bench, row, f"a.{suffix}", 2 * rows, "200 duplicate rows are left out")


@fault("F27", "rows that are no text: numbers, lists, bytes; null is counted and told")
def types(bench: Bench, row: Row) -> None:
    files = {
        "a.jsonl": ["one", 7],
        "b.jsonl": ["one", ["two"]],
        "c.jsonl": ["one", {"two": 2}],
        "d.jsonl": ["one", True],
    }
    files |= {"a.parquet": [7, 8], "b.parquet": [["one"], ["two"]], "c.parquet": [b"one", b"two"]}
    refuse_texts(bench, row, "in column 'text', row ", files, "text")
    rows = bench.text.read_text().splitlines()
    for suffix in ("jsonl",) if bench.quick else ("jsonl", "csv", "parquet"):
        counted_rows(bench, row, f"a.{suffix}", [*rows, None], "1 empty rows are left out")


@fault(
    "F23", "a row of 1 MB, as txt and jsonl: cut to the longest that there is, in no more memory"
)
def huge_row(bench: Bench, row: Row) -> None:
    def peak(path: Path) -> float:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        code, error = bench.call(bench.search(bench.new_name(), f"--text={path}"))
        row.fault("undetected", f"{path.name}: {error}", code != 0)
        (line,) = (
            line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
        )
        return int(line.split()[1]) / 1024

    rows = bench.text.read_text().splitlines()
    for suffix in ("txt",) if bench.quick else ("txt", "jsonl"):
        usual, path = peak(bench.text), bench.folder / f"long.{suffix}"
        write_text(path, [*rows, "long " * 200_000])
        row.tried += 1
        more = peak(path) - usual
        row.notes.append(f"{suffix}: {more:.0f} MB more at the peak")
        row.fault("undetected", f"{suffix}: {more:.0f} MB more at the peak", more > 128)


@fault("F30", "several devices, DDP, or torchrun, asked of a search")
def ddp(bench: Bench, row: Row) -> None:
    for option in ("--trainer.devices=2", "--trainer.strategy=ddp"):
        bench.refuse(row, option, bench.search(bench.new_name(), option), "kdnas fit")
    with mock.patch.dict(os.environ, {"WORLD_SIZE": "2", "RANK": "1"}):
        bench.refuse(row, "torchrun", bench.search(bench.new_name()), "WORLD_SIZE is 2")


def libfaketime() -> Path:
    """Debian's package faketime, or the one of the same name from the package index."""
    found = [*Path("/usr/lib").glob("*/faketime/libfaketime.so.1")]
    if spec := importlib.util.find_spec("libfaketime"):
        found += Path(spec.origin or "").parent.rglob("libfaketime.so.1")
    if not found:
        raise NotRun("a clock that steps needs libfaketime")
    return found[0]


@fault(
    "F31",
    "files from next year, and a clock that is, or steps, an hour ahead or behind while candidates train",
    quick=False,
)
def clock(bench: Bench, row: Row) -> None:
    run, next_year = bench.logs / bench.reference, time.time() + 365 * 86400
    states = list(bench.states.rglob("*.bin"))

    def age(paths: Iterable[Path]) -> None:
        for path in paths:
            os.utime(path, (next_year, next_year))

    age([*run.rglob("*"), *bench.states.rglob("*")])
    for name in (bench.reference, bench.new_name()):
        acknowledged = bench.acknowledged(name)
        code, error = bench.call(bench.search(name))
        row.tried += 1
        row.fault("undetected", error, code != 0)
        bench.check(row, name, acknowledged, error)
    again = [path for path in states if abs(path.stat().st_mtime - next_year) > 1]
    row.fault("unequal", f"stored again: {again}", len(again))
    for pattern in (
        () if bench.quick else ("*.lock", "study.db*", "*")
    ):  # of a search that was broken off
        process = bench.start(bench.search(name := bench.new_name()))
        bench.wait_for_candidate(process, name, 1)
        error = kill_all(process)
        acknowledged = bench.acknowledged(name)
        age((bench.logs / name).rglob(pattern))
        error += bench.start(bench.search(name)).communicate()[1]
        row.tried += 1
        bench.check(row, name, acknowledged, error)
    kinds = [["-3600", "+3600"], ["+3600"], ["-3600"], ["+0", "+3600"], ["+0", "-3600"]]
    with row.part():
        library, workers = libfaketime(), (1,) if bench.quick else (1, 2)
        for steps, num_workers in itertools.product(kinds[: 1 if bench.quick else None], workers):
            wrong_clock(bench, row, library, steps, num_workers)


# libfaketime makes an error of a sleep whose end is over when it looks at it.
SLEEP = """
import time

def sleep(seconds, sleep=time.sleep):
    try:
        sleep(seconds)
    except OSError:
        pass

time.sleep = sleep
"""


def wrong_clock(
    bench: Bench, row: Row, library: Path, steps: Sequence[str], num_workers: int
) -> None:
    """A search by a clock that is wrong by so many seconds, then by so many; back and forth if it begins wrong."""
    name, clock_file, sleepless = (
        bench.new_name(),
        bench.folder / "clock",
        bench.folder / "sleepless",
    )
    sleepless.mkdir(exist_ok=True)
    (sleepless / "sitecustomize.py").write_text(SLEEP)
    clock_file.write_text(f"{steps[0]}\n")
    fake = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock_file),
        "FAKETIME_CACHE_DURATION": "1",
    }
    fake |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{sleepless}"}
    begun = time.monotonic()
    process = bench.start(bench.search(name, f"--workers={num_workers}"), environment=fake)
    bench.wait_for_candidate(process, name)
    for step in (
        itertools.cycle(steps)
        if steps[0] != "+0"
        else itertools.chain(steps, itertools.repeat(steps[-1]))
    ):
        clock_file.with_suffix(".new").write_text(f"{step}\n")
        clock_file.with_suffix(".new").replace(clock_file)  # libfaketime may read it at any instant
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.7)
            break
    row.tried += 1
    bench.check(row, name, {}, process.communicate()[1], one=num_workers == 1)
    offsets = [abs(t.user_attrs.get("since", 0) - time.time()) for t in bench.trials(name)]
    row.fault(
        "undetected",
        f"the clock was right: {offsets}",
        not any(3000 < offset < 10_000 for offset in offsets),
    )
    seconds = [t.user_attrs.get("seconds", 0) for t in bench.trials(name)]
    whole = time.monotonic() - begun
    row.fault(
        "undetected",
        f"seconds by a wrong clock: {seconds}",
        any(not 0 <= value < whole for value in seconds),
    )
    stolen = sum("retry_of" in t.user_attrs for t in bench.trials(name))
    row.fault("duplicated", f"trials of living workers were given up: {stolen}", stolen)


@fault("F32", "an output folder that cannot be written to: told at the start")
def read_only(bench: Bench, row: Row) -> None:
    for what, option in (("run", "--root=/proc/kdnas"), ("states", "--states.folder=/proc/kdnas")):
        bench.refuse(row, what, bench.search(bench.new_name(), option), "Cannot write to")
    with row.part(), tmpfs(bench.folder / "disk", "ro") as disk:
        bench.refuse(
            row, "disk", bench.search(bench.new_name(), f"--root={disk}"), "Read-only file system"
        )
    if bench.quick:
        return
    (folder := bench.folder / "closed").mkdir()
    args = bench.search(bench.new_name(), f"--root={folder}")
    bind = f"mount --bind {folder} {folder} && mount -o remount,ro,bind {folder}"
    cases = {
        "a mount that became read-only": (bind, f"umount {folder}", "Read-only file system"),
        "an immutable folder": (
            f"chattr +i {folder}",
            f"chattr -i {folder}",
            "Operation not permitted",
        ),
    }
    for what, (close, open_again, words) in cases.items():
        try:
            subprocess.run(close, shell=True, check=True, capture_output=True)
        except subprocess.CalledProcessError as error:
            row.leave_out(f"{what}: {error.stderr!r}")
            continue
        bench.refuse(row, what, args, words)
        subprocess.run(open_again, shell=True, check=True)
    folder.chmod(0o555)
    # Root ignores modes, but for this capability.
    drop = (
        ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"]
        if os.getuid() == 0
        else []
    )
    bench.refuse(
        row, "mode 0555", args, "Permission denied", partial(bench.call_alone, before=drop)
    )
    row.fault("undetected", "mode 0555: something is there", any(folder.iterdir()))


@fault(
    "F33",
    "the same name with another teacher, space, seed, metric or length; --force-new has them (not in --quick)",
)
def other_config(bench: Bench, row: Row) -> None:
    before = bench.story(bench.reference)
    for option in (
        "--seed=1",
        "--space.num_hidden_layers=[1]",
        "--search.alpha=-0.1",
        "--data.max_length=16",
    ):
        bench.refuse(row, option, bench.search(bench.reference, option), " there, ")
    known, stat = (weights := bench.teacher / "model.safetensors").read_bytes(), weights.stat()
    tensors = load(known)
    tensors["encoder.layer.0.output.dense.weight"][0, 0] += 1
    weights.write_bytes(save(tensors, {"format": "pt"}))  # another teacher at the same path
    bench.refuse(row, "a weight", bench.search(bench.reference), "(teacher: ")
    weights.write_bytes(known)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    if not bench.quick:
        code, error = bench.call(bench.search(bench.reference, "--seed=1", "--force-new"))
        row.fault(
            "undetected",
            f"--force-new: {error}",
            code != 0 or not bench.story(f"{bench.reference}-2"),
        )
    row.fault("lost", "the search", bench.story(bench.reference) != before)


@fault(
    "F34",
    "a finished search again; a search that was broken off, and (not in --quick) a run, started twice at once",
)
def again(bench: Bench, row: Row) -> None:
    def files(run: Path) -> dict[str, tuple[int, int]]:
        return {
            str(path): (path.stat().st_size, path.stat().st_mtime_ns)
            for path in run.rglob("*")
            if path.is_file()
        }

    before, known = bench.story(bench.reference), files(bench.logs / bench.reference)
    for _ in range(2 if bench.quick else 20):
        code, error = bench.call(bench.search(bench.reference))
        row.tried += 1
        row.fault("undetected", error, code != 0)
        changed = dict(files(bench.logs / bench.reference).items() ^ known.items())
        row.fault(
            "unequal",
            f"changed: {sorted(changed)}",
            bool(changed) or bench.story(bench.reference) != before,
        )
    bench.check(row, bench.reference, bench.acknowledged(bench.reference))
    for _ in range(1 if bench.quick else 20):
        name = bench.new_name()
        process = bench.start(bench.search(name))
        bench.wait_for_candidate(process, name, 1)
        error = kill_all(process)
        acknowledged = bench.acknowledged(name)
        both = [bench.start(bench.search(name)) for _ in range(2)]
        errors = [error, *(process.communicate()[1] for process in both)]
        row.tried += 1
        row.fault("undetected", errors, any(process.returncode for process in both))
        bench.check(row, name, acknowledged, "".join(errors), one=False)
    for _ in range(0 if bench.quick else 3):
        name = bench.new_name()
        both = [bench.start(bench.job(name)) for _ in range(2)]
        errors = [process.communicate()[1] for process in both]
        row.tried += 1
        codes = sorted(process.returncode for process in both)
        told = "is being made by process" in "".join(errors)
        row.fault("undetected", f"{codes} {errors}", codes != [0, 2] or not told)
        bench.check(row, name, {}, "".join(errors))
        known = files(bench.logs / name)
        code, error = bench.call(bench.job(name))
        row.fault("undetected", error, code != 0)
        row.fault("unequal", f"{name} changed", files(bench.logs / name) != known)


@fault(
    "F35",
    "kill -9 again and again, each time when a start and a candidate could be done: each makes progress",
    quick=False,
)
def kill_again_and_again(bench: Bench, row: Row) -> None:
    name, num_trials = bench.new_name(), 6 if bench.quick else 20
    args = bench.search(name, f"--search.n_trials={num_trials}")
    start = time.monotonic()
    bench.start(
        bench.search(whole := bench.new_name(), f"--search.n_trials={num_trials}")
    ).communicate()
    row.notes.append(
        f"unbroken: {60 * num_trials / (time.monotonic() - start):.1f} trials a minute"
    )
    start, known, seconds, acknowledged = time.monotonic(), 0, 0.0, {}
    while True:
        process, begun = bench.start(args), time.monotonic()
        if not seconds:  # the first shows how long that takes
            bench.wait_for_candidate(process, name, 2)
            seconds = 1.5 * (time.monotonic() - begun)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(0.0, begun + seconds - time.monotonic()))
        _, error = process.returncode, kill_all(process)
        row.tried += 1
        row.fault("undetected", error, "Traceback" in error)
        finished = sum(
            t.state.name == "COMPLETE" and "twin_of" not in t.user_attrs for t in bench.trials(name)
        )
        row.fault(
            "lost",
            f"no progress after {finished} trials",
            finished <= known and process.returncode != 0,
        )
        known = finished
        before, acknowledged = acknowledged, bench.acknowledged(name)
        row.fault(
            "lost",
            "a trial changed",
            sum(acknowledged.get(n) != value for n, value in before.items()),
        )
        if process.returncode == 0 or time.monotonic() > start + 600:
            break
    row.fault("undetected", "it never ended", process.returncode != 0)
    bench.check(row, name, acknowledged, num_trials=num_trials, like=whole)
    row.notes.append(
        f"killed every {seconds:.0f} s: {60 * known / (time.monotonic() - start):.1f} trials a minute"
    )


# A worker of a study whose candidates take a moment; it tells what it has finished, as a search does.
SHORT = """
import sys, time
import optuna
from kdnas.nas.search import open_study, search
from kdnas.nas.space import SearchSpace

optuna.logging.set_verbosity(optuna.logging.ERROR)  # it warns, with a traceback, of a trial that is not needed
folder, n_trials, seconds, name = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4].partition("=")[2]
space = SearchSpace({
    "num_hidden_layers": list(range(1, 13)), "num_attention_heads": [1, 2], "hidden_size": [32, 64],
    "intermediate_size": [64, 128, 256, 512, 1024], "hidden_act": ["gelu", "relu"],
})

def evaluate(trial, arch):
    time.sleep(seconds)
    return arch.num_hidden_layers + arch.intermediate_size / 7

def tell(study, trial):
    if trial.state.name == "COMPLETE":
        print(f"trial {trial.number} is short: reward {trial.value:.4f}, 0 s", flush=True)

search(evaluate, space, open_study(f"sqlite:///{folder}/study.db", name, {}), n_trials, [tell])
"""


def short(bench: Bench, name: str, n_trials: int, seconds: float) -> subprocess.Popen[str]:
    bench.run(name).mkdir(parents=True, exist_ok=True)
    return bench.start_told(
        ["-c", SHORT, str(bench.run(name)), str(n_trials), str(seconds)], [f"--name={name}"]
    )


@fault("F37", "four workers on one SQLite study, 200 trials: exact counts", quick=False)
def four_workers(bench: Bench, row: Row) -> None:
    from kdnas.nas.record import trained

    name, num_trials = bench.new_name(), 40 if bench.quick else 200
    workers = [short(bench, name, num_trials, 0.01) for _ in range(4)]
    for worker in workers:
        _, error = worker.communicate()
        row.fault("undetected", error, worker.returncode != 0 or "Traceback" in error)
    told = [int(number) for number, _ in TOLD.findall((bench.told / name).read_text())]
    row.tried = len(trained(bench.study(name)))
    row.fault("lost", "stored, not told", len(bench.acknowledged(name).keys() - set(told)))
    row.fault("duplicated", f"{row.tried} trained", abs(row.tried - num_trials))
    row.fault("duplicated", "told twice", len(told) - len(set(told)))
    pids = {t.user_attrs["pid"] for t in bench.trials(name) if t.state.name == "COMPLETE"}
    row.fault("undetected", "only some of them worked", len(pids) < 4)
    bench.check_stopped(row, name, {})


@fault(
    "F38",
    "a worker that is stopped for an hour, by the database's clock, is alive: its trial is its own",
    quick=False,
)
def slow_worker(bench: Bench, row: Row) -> None:
    slow = short(bench, name := bench.new_name(), 8, 3)
    while slow.poll() is None and not has(bench.run(name) / "study.db", b"hidden_act"):
        time.sleep(0.1)
    time.sleep(1)
    slow.send_signal(signal.SIGSTOP)
    (mine,) = (t.number for t in bench.trials(name) if t.state.name == "RUNNING")
    with sqlite3.connect(bench.run(name) / "study.db", timeout=60) as database:
        database.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour')")
    quick = short(bench, name, 8, 0.1)
    deadline = time.monotonic() + 300
    while quick.poll() is None and sum(t.state.is_finished() for t in bench.trials(name)) < 7:
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    time.sleep(2)  # it waits for the last one, and looks whether its worker is alive
    states = {t.number: t.state.name for t in bench.trials(name)}
    row.fault("undetected", f"trial {mine} was given up: {states}", states[mine] != "RUNNING")
    slow.send_signal(signal.SIGCONT)
    for process in (slow, quick):
        _, error = process.communicate()
        row.fault("undetected", error, process.returncode != 0 or "Traceback" in error)
    trials = bench.trials(name)
    row.tried += 1
    row.fault("lost", states, trials[mine].state.name != "COMPLETE")
    row.fault(
        "duplicated",
        states,
        abs(sum("twin_of" not in t.user_attrs for t in trials if t.value is not None) - 8),
    )
    bench.check_stopped(row, name, {})


def usage(bench: Bench, name: str, session: int) -> dict[str, float]:
    """What a search holds now: memory of its own and open files, and kilobytes on the disk by kind.

    The parents are what no kill of a worker ends.
    """
    held = dict.fromkeys(
        ("processes", "megabytes", "files", "parent_megabytes", "parent_files"), 0.0
    )
    for folder in processes_of({session}):
        with suppress(OSError):
            lines = (
                line.split() for line in (folder / "smaps_rollup").read_text().splitlines()[1:]
            )
            sizes = {key: int(number) for key, number, *_ in lines}
            found = {
                "megabytes": sizes["Anonymous:"] / 1e3,
                "files": len(list((folder / "fd").iterdir())),
            }
            is_parent = str(session) in (
                folder.name,
                (folder / "stat").read_text().rpartition(")")[2].split()[1],
            )
            found |= {f"parent_{key}": value for key, value in found.items() if is_parent}
            held |= {key: held[key] + value for key, value in (found | {"processes": 1}).items()}
    paths: dict[str, list[Path]] = {"database": [], "trials": [], "other": []}
    for path in bench.run(name).rglob("*"):
        place = path.relative_to(bench.run(name)).parts[0]
        kind = (
            "database"
            if place.startswith("study.db")
            else "trials"
            if place.startswith("trial")
            else "other"
        )
        paths[kind].append(path)
    places = {
        "states": bench.states,
        "tokens": bench.logs / "tokens",
        "temporary": bench.temporary,
        "home": bench.home,
    }
    paths |= {kind: list(place.rglob("*")) for kind, place in places.items()}
    return held | {f"{kind}_kb": kilobytes(found) for kind, found in paths.items()}


def kilobytes(paths: Iterable[Path]) -> float:
    total = 0.0
    for path in paths:
        with suppress(OSError):  # it is gone since
            total += path.stat().st_size / 1e3 if path.is_file() else 0
    return total


def growth(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """From the first quarter of the rounds to the last, by medians; of the parents the most within the life of one."""
    quarter = max(1, len(rounds) // 4)
    early, late = rounds[:quarter], rounds[-quarter:]
    lives = [list(life) for _, life in itertools.groupby(rounds, key=lambda found: found["life"])]
    return {
        key: max(life[-1][key] - life[0][key] for life in lives)
        if key.startswith("parent_")
        else statistics.median(found[key] for found in late)
        - statistics.median(found[key] for found in early)
        for key in rounds[0].keys() - {"life", "finished"}
    }


# What may grow, at first and with each trial. A trial in memory is some kilobytes, parameters, attributes, the history
# of its epochs, and three processes hold it; on the disk it has rows of the database, lines of logs, and curves.
ALLOWED = {
    "processes": (1, 0),
    "megabytes": (192, 0.15),
    "parent_megabytes": (64, 0.05),
    "files": (24, 0),
    "parent_files": (8, 0),
    "database_kb": (200, 8),
    "trials_kb": (1000, 10),
    "other_kb": (1000, 2),
    "states_kb": (0, 0),
    "tokens_kb": (0, 0),
    "temporary_kb": (100, 0),
    "home_kb": (100, 0),
}


def kill_one_that_trains(bench: Bench, name: str, session: int) -> bool:
    alive = {int(folder.name) for folder in processes_of({session})}
    running = [
        t.user_attrs["pid"]
        for t in bench.trials(name)
        if t.state.name == "RUNNING" and "arch" in t.user_attrs
    ]
    if running := [pid for pid in running if pid in alive]:
        with suppress(ProcessLookupError):
            os.kill(bench.random.choice(running), signal.SIGKILL)
            return True
    return False


def soak(bench: Bench, row: Row, minutes: float, seconds: float = 120.0) -> dict[str, Any]:
    """Two workers search; every two minutes one that trains is killed, each tenth time all: what grows?"""
    name, rounds, life = bench.new_name(), [], 0
    sizes = "[" + ",".join(map(str, range(2, 65))) + "]"
    acts = "[gelu,relu,silu,tanh,gelu_new,quick_gelu,relu6,sigmoid,gelu_fast,mish,leaky_relu,linear,relu2,gelu_10]"
    space = [
        f"--space.intermediate_size={sizes}",
        f"--space.hidden_act={acts}",
        "--space.hidden_size=[16,32]",
    ]
    args = bench.search(name, "--workers=2", "--search.n_trials=20000", "--sampler=random", *space)
    process, end, acknowledged = bench.start(args), time.monotonic() + 60 * minutes, {}
    while time.monotonic() < end:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)
            row.fault("undetected", f"the search ended by itself, exit {process.returncode}")
            break
        known, acknowledged = acknowledged, bench.acknowledged(name)
        row.fault(
            "lost",
            "a trial changed",
            sum(acknowledged.get(n) != value for n, value in known.items()),
        )
        finished = len(acknowledged) - len(known)
        rounds.append({"trials": len(acknowledged), "finished": finished, "life": life})
        rounds[-1] |= usage(bench, name, process.pid)
        row.fault("lost", f"no progress in round {len(rounds)}", finished <= 0)
        shown = {key: round(value) for key, value in rounds[-1].items()}
        print(shown, "no progress" * (finished <= 0), flush=True)
        if len(rounds) % 10:
            row.tried += kill_one_that_trains(bench, name, process.pid)
        else:
            error = kill_all(process)
            row.tried += 1
            row.fault("undetected", error, "Traceback" in error)
            process, life = bench.start(args), life + 1
    bench.wait_for_candidate(
        process, name, len(bench.trials(name))
    )  # it may have been started just now
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    _, error = process.communicate()
    row.fault("undetected", error, process.returncode not in (0, 143))
    bench.check_stopped(row, name, acknowledged, error)
    grown = growth(rounds) if rounds else {}
    num_trials = rounds[-1]["trials"] - rounds[0]["trials"] if rounds else 0
    row.notes.append(
        f"growth: {', '.join(f'{key} {more:.0f}' for key, more in sorted(grown.items()))}"
    )
    for key, (at_first, each) in ALLOWED.items():
        more = grown.get(key, 0)
        row.fault("undetected", f"{key} grew by {more:.0f}", more > at_first + each * num_trials)
    return {"rounds": rounds, "growth": grown}


def main(args: Sequence[str] | None = None) -> int:
    """Run the faults, print a table, and write JSON after each of them; the exit code is 1 where one is bad."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="those without servers and many kills, in under four minutes",
    )
    parser.add_argument("--only", default="", help="ids, separated by commas")
    parser.add_argument(
        "--soak", type=float, metavar="MINUTES", help="two workers; every 2 minutes one is killed"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the instants at which is killed")
    parser.add_argument(
        "--json", type=Path, default=OUTPUT / "faults.json", help="where the figures go"
    )
    options = parser.parse_args(args)
    wanted = [name for name in options.only.split(",") if name]
    if unknown := set(wanted) - FAULTS.keys():
        parser.error(
            f"no such fault: {', '.join(sorted(unknown))}; choose from {', '.join(FAULTS)}"
        )
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell starts background jobs, and theirs, deaf to it
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows: list[Row] = []
    more: dict[str, Any] = {}
    if options.soak:
        wanted, rows = (
            ["soak"],
            [Row("soak", f"two workers for {options.soak:g} minutes, one killed every two")],
        )
    started = time.monotonic()

    def write() -> None:
        seconds = time.monotonic() - started
        figures = {
            "seed": options.seed,
            "seconds": seconds,
            "quick": options.quick,
            "machine": machine(),
        }
        write_json(options.json, figures | more | {"rows": [asdict(row) for row in rows]})

    options.json = options.json.resolve()
    with tempfile.TemporaryDirectory(prefix="kdnas-faults-") as folder, chdir(folder):
        bench = Bench(Path(folder), options.quick, options.seed)
        os.chdir(bench.home)  # where a path that is relative by mistake is seen; back at the end
        if options.soak:
            more = soak(bench, rows[0], options.soak)
        for name, (what, quick, function) in FAULTS.items():
            if (wanted and name not in wanted) or (options.quick and not quick and not wanted):
                continue
            row, begun = Row(name, what), time.monotonic()
            try:
                function(bench, row)
            except NotRun as reason:
                row.not_run = str(reason)
                row.fault("undetected", f"not run to its end: {reason}", row.tried > 0)
            except Exception as error:  # of the benchmark itself, or let through by what it calls
                row.fault(
                    "undetected",
                    f"{type(error).__name__}: {error} {getattr(error, 'stderr', None) or ''}",
                )
            row.seconds = time.monotonic() - begun
            rows.append(row)
            write()
            print(
                f"{name}: {'BAD' if row.is_bad() else row.not_run or 'ok'}, {row.seconds:.0f} s",
                flush=True,
            )
    rows.sort(key=lambda row: row.id)
    seconds = time.monotonic() - started
    columns = (
        "id",
        "tried",
        "lost",
        "duplicated",
        "executed",
        "undetected",
        "zombies",
        "unequal",
        "worst_wait_s",
    )
    table = Table(*columns, "what", title=f"seed {options.seed}, {seconds:.0f} s")
    for row in rows:
        figures = [
            f"{value:.1f}" if isinstance(value, float) else str(value)
            for value in map(vars(row).get, columns)
        ]
        table.add_row(*figures, f"{row.what}{f' (not run: {row.not_run})' if row.not_run else ''}")
    console = Console(width=160)
    console.print(table)
    for row in rows:
        for note in row.notes:
            console.print(f"{row.id}: {note}", markup=False)
    write()
    return int(any(row.is_bad() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
