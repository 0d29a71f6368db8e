"""What a checker looks at: processes, locks, files, databases, and the words of a command."""

import os
import re
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from pathlib import Path

from filelock import FileLock, ReadWriteLock, Timeout
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdnas.system.manifest import verify

# What a search says of each trial that was trained: its number and its reward.
TOLD = re.compile(r"^trial +(\d+) .* reward (\S+), \d+ s$", re.MULTILINE)
# Names of files that are not finished.
TEMPORARY = re.compile(r"\..*|.*\.(tmp|incomplete|partial)")


def is_one_line(error: str) -> bool:
    """Whether a command has said one thing, in a line."""
    lines = [line for line in error.splitlines() if line.startswith("kdnas: ")]
    return len(lines) == 1 and "Traceback" not in error


def processes_of(sessions: set[int]) -> list[Path]:
    """The folders in /proc of all processes that these, each the first of a session, have begun."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if int(session) in sessions and state != "Z":
                found.append(path.parent)
    return found


def at_work(process: subprocess.Popen[str]) -> dict[int, Path]:
    """The processes of a command's pool that do a job now, by id, each with the job's folder."""
    found = {}
    for folder in processes_of({process.pid}):
        with suppress(OSError):
            output = Path(os.readlink(folder / "fd" / "1"))
            if output.name == "job.log":
                found[int(folder.name)] = output.parent
    return found


def kill_all(process: subprocess.Popen[str]) -> str:
    """Kill a command's whole process group; what it said."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[1]


def left_processes(ended: set[int], seconds: float = 10.0) -> list[Path]:
    """Processes of sessions whose first one has ended, and that still run after some seconds."""
    end = time.monotonic() + seconds
    while (left := processes_of(ended)) and time.monotonic() < end:
        time.sleep(0.2)
    return left


def held(locks: Iterable[Path]) -> list[Path]:
    """The locks that somebody holds."""
    found = []
    for path in locks:
        try:
            if path.name.endswith("stillness.lock"):
                with ReadWriteLock(path, is_singleton=False).write_lock(timeout=1):
                    pass
            else:
                FileLock(path).acquire(timeout=1).lock.release()
        except Timeout:
            found.append(path)
    return found


def damaged(run: Path) -> list[str]:
    """What a run's manifests and its database say of themselves and is not true."""
    faults = [fault for path in run.rglob("manifest.json") for fault in verify(path.parent)[1]]
    if (run / "study.db").exists():
        with closing(sqlite3.connect(run / "study.db")) as database:
            lines = [line for (line,) in database.execute("PRAGMA integrity_check")]
        faults += [line for line in lines if line != "ok"]
    return faults


def unfinished(places: Iterable[Path]) -> list[Path]:
    """Files and folders that somebody has begun to write and not finished."""
    return [path for place in places for path in place.rglob("*") if TEMPORARY.fullmatch(path.name)]


def times(paths: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    """Size and time of files: a file that was written again has others."""
    found = {}
    for path in paths:
        with suppress(FileNotFoundError):  # it has gone meanwhile
            if not path.is_dir():
                found[path] = (path.stat().st_size, path.stat().st_mtime_ns)
    return found


def steps_told(folder: Path) -> int:
    """How many steps of a fit TensorBoard was told of."""
    found = EventAccumulator(str(folder)).Reload()
    is_there = "train/loss" in found.Tags()["scalars"]
    steps = [event.step for event in found.Scalars("train/loss")] if is_there else []
    return max(steps, default=-1) + 1


def has(path: Path, content: bytes) -> bool:
    with suppress(OSError):
        return content in path.read_bytes()
    return False


def lost_of(known: dict[int, dict], now: dict[int, dict], keys: Sequence[str]) -> list[int]:
    """The trials whose result is gone, or differs in one of these keys."""
    return [
        number
        for number, result in known.items()
        if number not in now or any(now[number][key] != result[key] for key in keys)
    ]
