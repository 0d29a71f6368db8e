"""What faults are made with: rows of figures, a tiny teacher, commands on it, and their checker."""

import io
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.common import ROOT  # isort: skip (before torch)

import optuna
import yaml
from optuna.storages import RDBStorage

from kdnas.cli.main import main as kdnas
from kdnas.training.precision import bf16_is_faster
from tests.conftest import make_rows, save_teacher, write_task
from tests.faults import checks
from tests.faults.checks import is_one_line

# The faults of a disk, of which a job may leave a traceback in its log.
OF_DISKS = ("F05", "F06", "F07")
# A start of students that ends its process, or fills its memory, for some shapes.
HOOKS = """
import ctypes, os, resource, time
from pathlib import Path
from kdnas.distillation.start import FromTeacher

class Deadly(FromTeacher):
    def __call__(self, student, teacher, rows):
        way = os.environ["DEADLY"]
        if student.config.intermediate_size == 16:
            if way == "crash":
                ctypes.string_at(0)
            if way == "hang":
                time.sleep(10_000)
            fill_memory()
        return super().__call__(student, teacher, rows)

def fill_memory():
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), hard))
    filled = []
    try:
        while True:
            filled.append(b"x" * (1 << 24))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
"""


class NotRun(Exception):
    """A fault that cannot be made here, and why."""


@dataclass
class Row:
    """One fault: what was tried, and what went wrong."""

    id: str
    what: str
    tried: int = 0
    lost: int = 0
    duplicated: int = 0
    executed: int = 0
    undetected: int = 0
    zombies: int = 0
    unequal: int = 0
    worst_wait_s: float = 0.0
    seconds: float = 0.0
    not_run: str = ""
    notes: list[str] = field(default_factory=list)

    def is_bad(self) -> bool:
        kinds = ("lost", "duplicated", "executed", "undetected", "zombies", "unequal")
        return any(getattr(self, kind) for kind in kinds)

    def fault(self, kind: str, note: object, count: int = 1) -> None:
        """Count what went wrong; ``count`` may be a condition."""
        if count:
            setattr(self, kind, getattr(self, kind) + int(count))
            text = str(note)
            short = text if len(text) <= 400 else f"{text[:100]} ... {text[-300:]}"
            self.notes.append(f"{kind}: {short}")

    def expect(
        self, what: str, code: int, error: str, codes: Sequence[int] = (0,), words: str = ""
    ) -> None:
        """A command ends with one of these codes; unless it succeeds, with one line and its words."""
        is_told = code == 0 or (is_one_line(error) and words in error)
        is_right = code in codes and is_told
        self.fault("undetected", f"{what}: exit {code}, {error}", not is_right)

    def waited(self, seconds: float) -> None:
        self.worst_wait_s = max(self.worst_wait_s, seconds)

    @contextmanager
    def part(self) -> Iterator[None]:
        """A part that perhaps cannot be made here; the others count."""
        try:
            yield
        except NotRun as reason:
            self.notes.append(f"not run: {reason}")


@dataclass(frozen=True)
class Fault:
    """How a row is made."""

    what: str
    make: Callable[["Bench", Row], None]
    is_quick: bool


FAULTS: dict[str, Fault] = {}


def fault(name: str, what: str, quick: bool = True) -> Callable[[Any], Any]:
    """Put a function into the table of faults; ``quick``: made also without ``--whole``."""

    def put(make: Callable[[Bench, Row], None]) -> Callable[[Bench, Row], None]:
        FAULTS[name] = Fault(what, make, quick)
        return make

    return put


def name_of(args: Sequence[str]) -> str:
    """The name of the run that a command makes; ``others`` where that is no plain name."""
    name = next((arg for arg in args if arg.startswith("--name=")), "").removeprefix("--name=")
    return name if re.fullmatch(r"\w{1,99}", name) else "others"


class Bench:
    """A tiny teacher, 200 texts and a task, in a folder with a canary; commands, and a checker.

    ``quick``: a few faults of each kind instead of fifty.
    """

    def __init__(self, folder: Path, quick: bool, seed: int) -> None:
        self.folder, self.quick, self.random = folder, quick, random.Random(seed)
        self.canary, self.logs, self.states = folder / "CANARY", folder / "logs", folder / "states"
        self.teacher, self.text, self.task = (
            folder / "teacher",
            folder / "rows.txt",
            folder / "task",
        )
        self.home, self.told, self.temporary = folder / "home", folder / "told", folder / "tmp"
        self.num_trials = 4 if quick else 12
        self.storages: dict[str, str] = {}  # URLs of studies that are not in their run's folder
        self.roots: dict[str, Path] = {}  # of runs that are not among the others
        self.started: list[subprocess.Popen[str]] = []
        self._number = 0
        self._finished: dict[int, str] = {}
        # Once for all: a busy machine may find another answer, and searches would not be equal.
        bf16_is_faster("cpu")
        for place in (self.home, self.told, self.temporary):
            place.mkdir()
        save_teacher(self.teacher, num_hidden_layers=2, hidden_size=32, intermediate_size=64)
        write_task(self.task, num_rows=60)
        self.text.write_text("".join(f"{text}\n" for text in make_rows(200)))
        (folder / "hooks.py").write_text(HOOKS)
        self._outside = self.outside()

    def new_name(self) -> str:
        self._number += 1
        return f"run{self._number}"

    def run(self, name: str) -> Path:
        return self.roots.get(name, self.logs) / name

    # Commands.

    def search(self, name: str, *more: str, command: str = "search") -> list[str]:
        """A command whose rewards do not depend on the clock (alpha 0): equal searches are equal."""
        options = {
            "teacher": self.teacher,
            "text": self.text,
            "name": name,
            "root": self.roots.get(name, self.logs),
            "states.folder": self.states,
            "data.max_length": 24,
            "data.batch_tokens": 512,
            "latency.length": 16,
            "latency.min_seconds": 0.01,
            "search.n_trials": self.num_trials,
            "search.num_epochs": 1,
            "search.alpha": 0,
            "trainer.accelerator": "cpu",
        }
        if name in self.storages:
            options["storage"] = self.storages[name]
        return [command, *(f"--{key}={value}" for key, value in options.items()), *more]

    def job(self, name: str, *more: str) -> list[str]:
        """The same for the whole job, with a labelled task."""
        epochs = ("--full_kd.num_epochs=2", "--finetune.num_epochs=2", "--finetune.max_length=24")
        return self.search(name, f"--task={self.task}", *epochs, *more, command="run")

    def call(self, args: Sequence[str]) -> tuple[int, str]:
        """Exit code and errors of a command in this process; -1 where an exception comes through."""
        here = ["--workers=0"] if args[0] in ("search", "run") else []
        errors, level = io.StringIO(), logging.root.manager.disable
        logging.disable(logging.NOTSET)  # else it would say nothing
        try:
            with self.output(args) as output, redirect_stderr(errors), redirect_stdout(output):
                code = kdnas([*args, *here])
        except Exception as error:
            return -1, f"Traceback: {error!r}"
        finally:
            logging.disable(level)
        if code in (130, 143):  # meant for us
            raise KeyboardInterrupt
        return code, errors.getvalue()

    def start(
        self,
        args: Sequence[str],
        program: Sequence[str] = ("-m", "kdnas"),
        before: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[str]:
        """A command in a process group of its own; ``before`` it may come strace."""
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(self.folder)]),
            "HOME": str(self.home),
            "TMPDIR": str(self.temporary),
            **(environment or {}),
        }
        with self.output(args) as output:
            pipes = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.PIPE}
            process = subprocess.Popen(
                [*before, sys.executable, "-W", "ignore", *program, *args],
                text=True,
                start_new_session=True,
                **{"env": environment, "cwd": self.home, **pipes, **options},
            )
        self.started.append(process)
        return process

    def call_alone(self, args: Sequence[str], **options: Any) -> tuple[int, str]:
        """Exit code and errors of a command in a process of its own."""
        process = self.start(args, **options)
        _, error = process.communicate()
        return process.returncode, error

    def output(self, args: Sequence[str]) -> IO[str]:
        """The file that takes what a command prints, by the run that it names."""
        return (self.told / name_of(args)).open("a", encoding="utf-8")

    def wait_for_trial(self, process: subprocess.Popen[str], name: str, number: int = 0) -> None:
        """Wait until this trial has begun, or the process has ended."""
        while process.poll() is None and not (self.run(name) / f"trial_{number:04d}").exists():
            time.sleep(0.05)

    def stopped_run(self) -> tuple[list[str], Path]:
        """The arguments of a run that was stopped in full KD, and a copy of its folder."""
        name = self.new_name()
        args = self.job(name, "--full_kd.num_epochs=15")
        process, last = self.start(args), self.run(name) / "full_kd" / "last.ckpt"
        while process.poll() is None and not last.exists():
            time.sleep(0.02)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        _, error = process.communicate()
        assert last.exists(), error
        return args, Path(shutil.copytree(self.run(name), self.folder / f"whole_{name}"))

    # What they have made.

    def results(self, name: str) -> dict[int, dict[str, Any]]:
        """What each trial that has ended has left, by its number."""
        paths = sorted(self.run(name).glob("trial_*/result.json"))
        return {int(path.parent.name[6:]): json.loads(path.read_text()) for path in paths}

    def trained(self, name: str) -> list[dict[str, Any]]:
        """The results of distinct candidates that were trained to their end."""
        results = self.results(name).values()
        return [r for r in results if r["state"] == "COMPLETE" and "twin_of" not in r["attrs"]]

    def num_repeated(self, name: str) -> int:
        """How many trainings were begun in folders in which one was begun before."""
        folders = self.run(name).glob("trial_*")
        return sum(max(0, len(list(folder.glob("events.*"))) - 1) for folder in folders)

    def story(self, name: str) -> list[Any]:
        """What is equal in equal searches: shapes and rewards, in their order."""
        return [(result["params"], result["value"]) for result in self.trained(name)]

    def trials(self, name: str) -> list[optuna.trial.FrozenTrial]:
        """The trials that the study holds; nothing is written to it."""
        url = self.storages.get(name, f"sqlite:///{self.run(name)}/study.db")
        storage = RDBStorage(url, skip_table_creation=True)
        trials = optuna.load_study(study_name=name, storage=storage).trials
        return [trial for trial in trials if trial.state.name != "WAITING"]

    def finished(self, num_trials: int) -> str:
        """The name of a finished search of so many trials, which nothing has disturbed."""
        if num_trials not in self._finished:
            name = self._finished[num_trials] = self.new_name()
            code, error = self.call(self.search(name, f"--search.n_trials={num_trials}"))
            assert code == 0, error
        return self._finished[num_trials]

    @property
    def reference(self) -> str:
        """What a search is compared with."""
        return self.finished(self.num_trials)

    # Their checker.

    def refuse(
        self,
        row: Row,
        what: str,
        args: Sequence[str],
        words: str,
        call: Callable[[Sequence[str]], tuple[int, str]] | None = None,
    ) -> None:
        """A command that must end with one line, these words in it, and make nothing."""
        before, start = self.made(), time.monotonic()
        code, error = (call or self.call)(args)
        row.tried += 1
        row.waited(time.monotonic() - start)
        row.expect(what, code, error, (2,), words)
        changed = self.made() ^ before
        row.fault("undetected", f"{what}: made {sorted(changed)}", bool(changed))
        self.look_at_canary(row, what)

    def succeed(self, row: Row, what: str, args: Sequence[str]) -> str:
        """A command that must succeed; what it said."""
        code, error = self.call(args)
        row.expect(what, code, error)
        return error

    def go_on(
        self,
        row: Row,
        what: str,
        args: Sequence[str],
        known: dict[int, Any],
        error: str = "",
        **options: Any,
    ) -> None:
        """The same command again: it succeeds, and its checker finds nothing."""
        error += self.succeed(row, f"after {what}", args)
        self.check(row, name_of(args), known, error, **options)

    def check(
        self,
        row: Row,
        name: str,
        known: dict[int, Any],
        error: str = "",
        in_order: bool = True,
        num_trials: int | None = None,
        like: str = "",
    ) -> None:
        """What must hold after a search that was disturbed has come to its end.

        ``known`` are its results at the fault. ``in_order``: it equals the unbroken search ``like``,
        by default the reference; with several workers, only each reward does.
        """
        self.check_stopped(row, name, known, error)
        shapes = [json.dumps(result["params"]) for result in self.trained(name)]
        num_trials = num_trials or self.num_trials
        row.fault("duplicated", f"{len(shapes)} trained", abs(len(shapes) - num_trials))
        row.fault("duplicated", "a shape twice", len(shapes) - len(set(shapes)))
        trials = self.trials(name)
        running = [trial.number for trial in trials if trial.state.name == "RUNNING"]
        row.fault("zombies", f"trials {running} run", len(running))
        untold = self.results(name).keys() - {trial.number for trial in trials}
        row.fault("lost", f"results that the study does not hold: {untold}", len(untold))
        row.fault("undetected", "no manifest", not (self.run(name) / "manifest.json").exists())
        mine = self.story(name)
        if in_order:
            row.fault("unequal", mine, mine != self.story(like or self.reference))
        else:
            wrong = [params for params, value in mine if not self.is_worth(params, value)]
            row.fault("unequal", wrong, len(wrong))

    def is_worth(self, params: dict[str, Any], value: float) -> bool:
        """Whether a student alone is worth that; quickly, only those of the reference are known."""
        known = self.story(self.reference if self.quick else self.finished(1000))
        return all(value == other for same, other in known if same == params)

    def check_stopped(self, row: Row, name: str, known: dict[int, Any], error: str = "") -> None:
        """Of these what must hold also where a search has stopped before its end."""
        results = self.results(name)
        lost = checks.lost_of(known, results, ("params", "state", "value"))
        row.fault("lost", f"trials {lost}", len(lost))
        again = checks.lost_of(known, results, ("ended",))
        row.fault("duplicated", f"trials {again} trained again", len(set(again) - set(lost)))

        output = self.told / name
        told = checks.TOLD.findall(output.read_text() if output.exists() else "")
        values = {str(number): result["value"] or math.nan for number, result in results.items()}
        lost = [n for n, reward in told if f"{values.get(n, math.nan):.4f}" != reward]
        row.fault("lost", f"told, and without result: {lost}", len(lost))
        row.fault(
            "undetected", "trials trained, and none told", bool(self.trained(name)) and not told
        )

        if (self.run(name) / "study.db").exists() or name in self.storages:
            trials = {trial.number: trial for trial in self.trials(name)}
            row.fault("duplicated", list(trials), list(trials) != list(range(len(trials))))
            keys = ("state", "value")
            wrong = [
                number
                for number, trial in trials.items()
                if trial.state.is_finished() and trial.params
                if [trial.state.name, trial.value] != [results.get(number, {}).get(k) for k in keys]
            ]
            row.fault("lost", f"the study knows others than the results: {wrong}", len(wrong))
        self.check_traces(row, name, error)

    def check_traces(self, row: Row, name: str, error: str = "") -> None:
        """Nothing half written, no process, no held lock, no traceback, nothing outside the run."""
        run, states = self.run(name), self.states_of(name)
        faults = checks.damaged(run)
        row.fault("undetected", faults, len(faults))
        left = checks.unfinished([run, run.parent / "tokens", states])
        row.fault("zombies", left, len(left))
        for path in left:  # counted once
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

        ended = {process.pid for process in self.started if process.poll() is not None}
        left = checks.left_processes(ended)
        row.fault("zombies", f"processes {left}", len(left))
        locks = [*run.rglob("*.lock"), *run.parent.glob("tokens/*.lock"), *states.glob("*/lock")]
        held = checks.held([*locks, *self.temporary.glob("*.lock")])
        row.fault("zombies", f"held: {held}", len(held))

        row.fault("undetected", error, "Traceback" in error)
        logs = [path for path in run.rglob("job.log") if checks.has(path, b"Traceback")]
        row.fault("undetected", f"tracebacks in {logs}", len(logs) * (row.id not in OF_DISKS))
        self.look_at_canary(row, name)
        before, self._outside = self._outside, self.outside()
        changed = before ^ self._outside
        row.fault("undetected", f"outside: {sorted(changed)}", bool(changed))

    def look_at_canary(self, row: Row, what: str) -> None:
        if self.canary.exists():
            self.canary.unlink()
            row.fault("executed", what)

    def made(self) -> set[str]:
        """The names of all that runs and states consist of, what lies beside them, and outside."""
        inside = {str(path) for place in (self.logs, self.states) for path in place.rglob("*")}
        return inside | {str(path) for path in self.folder.iterdir()} | self.outside()

    def outside(self) -> set[str]:
        """Files that no run may touch, with size and time: its inputs, its home, the system's."""
        paths, found = [self.text], set()
        for place in (self.teacher, self.task, self.home, Path("/etc")):
            for folder, folders, names in os.walk(place):
                folders[:] = [name for name in folders if not name.startswith(".")]  # caches
                paths += [Path(folder, name) for name in names]
                found |= {str(Path(folder, name)) for name in folders}
        for path in paths:
            with suppress(OSError):
                found.add(f"{path} {path.lstat().st_size} {path.lstat().st_mtime_ns}")
        return found

    def states_of(self, name: str) -> Path:
        """Where a run keeps the teacher's states."""
        path = self.run(name) / "config.yaml"
        there = yaml.safe_load(path.read_text()) if path.exists() else None
        return Path(there["states"]["folder"]) if there else self.states
