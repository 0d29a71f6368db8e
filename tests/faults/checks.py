"""What the faults are made of: a tiny teacher, searches on it, the checker I1 to I8, and rows of figures."""

import io
import logging
import math
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.common import ROOT  # isort: skip (before torch)

import optuna
import torch
import yaml
from filelock import FileLock, ReadWriteLock, Timeout
from optuna.storages import RDBStorage
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from kdnas.cli.main import main as kdnas
from kdnas.system.manifest import verify
from kdnas.training.precision import bf16_is_faster

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "ls"]
# What a search tells of each trial that it has stored, and names of files that are not finished.
TOLD = re.compile(r"^trial +(\d+) .* reward (\S+), \d+ s$", re.MULTILINE)
TEMPORARY = re.compile(r"\..*|.*\.(tmp|incomplete|partial)")
# The faults in which a disk or a database fails, of which a worker may tell.
FAILING = ("F05", "F06", "F07", "F13", "F14")
# Starts of students that are written down, or that kill or fill their process for some shapes, as the environment says.
HOOKS = """
import ctypes, json, os, resource, time
from pathlib import Path
from kdnas.nas import storage
from kdnas.distillation.start import FromTeacher

storage.PATIENCE_SECONDS = float(os.environ.get("PATIENCE", storage.PATIENCE_SECONDS))

def memory(place):
    return int(Path("/proc/self/statm").read_text().split()[place]) * resource.getpagesize()

class Told(FromTeacher):
    def __call__(self, student, teacher, rows):
        values = student.config
        shape = [values.num_hidden_layers, values.num_attention_heads, values.hidden_size]
        with open(os.environ["STARTS"], "a") as file:
            file.write(json.dumps([[*shape, values.intermediate_size, values.hidden_act], memory(1)]) + "\\n")
        return super().__call__(student, teacher, rows)

class Deadly(Told):
    def __call__(self, student, teacher, rows):
        copied, way = super().__call__(student, teacher, rows), os.environ["DEADLY"]
        if way and (student.config.num_hidden_layers, student.config.intermediate_size) == (2, 16):
            if way == "crash":
                ctypes.string_at(0)
            if way == "hang":
                time.sleep(10_000)
            limits = resource.getrlimit(resource.RLIMIT_AS)
            if way == "limit":
                resource.setrlimit(resource.RLIMIT_AS, (memory(0) + (256 << 20), limits[1]))
            held = []
            try:
                while True:
                    held.append(b"x" * (1 << 24))
            finally:
                resource.setrlimit(resource.RLIMIT_AS, limits)
        return copied
"""


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

    def leave_out(self, reason: object) -> None:
        """A part of the fault that cannot be made here."""
        self.notes.append(f"not run: {reason}")

    @contextmanager
    def part(self) -> Iterator[None]:
        """A part that perhaps cannot be made here; the others stay."""
        try:
            yield
        except NotRun as reason:
            self.leave_out(reason)

    def is_bad(self) -> bool:
        return any(
            (self.lost, self.duplicated, self.executed, self.undetected, self.zombies, self.unequal)
        )

    def fault(self, kind: str, note: object, count: int = 1) -> None:
        if count:
            setattr(self, kind, getattr(self, kind) + int(count))
            text = str(note)
            self.notes.append(
                f"{kind}: {text if len(text) <= 400 else f'{text[:100]} ... {text[-300:]}'}"
            )


class NotRun(Exception):
    """A fault that cannot be made here, and why."""


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


class Bench:
    """A tiny teacher, 200 texts, and searches on them, in a folder of their own with a canary beside it."""

    def __init__(self, folder: Path, quick: bool, seed: int) -> None:
        self.folder, self.quick, self.random = folder, quick, random.Random(seed)
        self.canary, self.logs, self.states = folder / "CANARY", folder / "logs", folder / "states"
        self.teacher, self.text, self.task = (
            folder / "teacher",
            folder / "rows.txt",
            folder / "first_word",
        )
        self.home, self.told, self.temporary = folder / "home", folder / "told", folder / "tmp"
        self.num_trials = 4 if quick else 12
        self.storages: dict[str, str] = {}  # of runs whose study is not in their folder
        self.roots: dict[str, Path] = {}  # of runs that are not among the others
        self._number, self._finished = 0, dict[int, str]()
        self.started: list[subprocess.Popen[str]] = []
        bf16_is_faster(
            "cpu"
        )  # once for all: a busy machine may find another, and searches would not be equal
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        vocabulary = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *WORDS]
        tokenizer = Tokenizer(
            models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]")
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        special = [("[CLS]", 1), ("[SEP]", 2)]
        tokenizer.post_processor = processors.TemplateProcessing(
            "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", special
        )
        names = {
            f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "mask", "unk")
        }
        config = BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=40,
        )
        BertModel(config).save_pretrained(self.teacher)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(self.teacher)
        self.write_rows(self.text, 200)
        for place in (self.task, self.home, self.told, self.temporary):
            place.mkdir()
        for split, num_rows in (("train", 96), ("validation", 30)):
            rows = [
                f"{WORDS[i % 3]} {' '.join(self.random.choices(WORDS, k=6))}\t{i % 3}\n"
                for i in range(num_rows)
            ]
            (self.task / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(rows))
        (folder / "hooks.py").write_text(HOOKS)
        self._outside = self.outside()

    def write_rows(self, path: Path, num_rows: int) -> None:
        path.write_text(
            "".join(" ".join(self.random.choices(WORDS, k=12)) + "\n" for _ in range(num_rows))
        )

    def new_name(self) -> str:
        self._number += 1
        return f"run{self._number}"

    def run(self, name: str) -> Path:
        return self.roots.get(name, self.logs) / name

    def search(self, name: str, *more: str, command: str = "search") -> list[str]:
        """A command whose rewards do not depend on the clock (alpha 0), so that equal searches are equal."""
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
            options |= {"storage": self.storages[name]}
        return [command, *(f"--{key}={value}" for key, value in options.items()), *more]

    def job(self, name: str, *more: str) -> list[str]:
        """The same for the whole job, with a labelled task."""
        options = {
            "task": self.task,
            "full_kd.num_epochs": 2,
            "finetune.num_epochs": 2,
            "finetune.max_length": 24,
        }
        return self.search(
            name, *(f"--{key}={value}" for key, value in options.items()), *more, command="run"
        )

    def call(self, args: Sequence[str]) -> tuple[int, str]:
        """Exit code and stderr of a command in this process; -1 with the exception where one comes through."""
        errors, level = io.StringIO(), logging.root.manager.disable
        logging.disable(logging.NOTSET)  # else it would tell nothing
        try:
            with self.tell(args) as told, redirect_stderr(errors), redirect_stdout(told):
                code = kdnas(args)
        except Exception as error:
            return -1, f"Traceback: {error!r}"
        finally:
            logging.disable(level)
        if code in (130, 143):  # meant for us
            raise KeyboardInterrupt
        return code, errors.getvalue()

    def start(self, args: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """The same in a process group of its own, whose errors are piped."""
        return self.start_told(["-m", "kdnas"], args, **options)

    def start_told(
        self, program: Sequence[str], args: Sequence[str], **options: Any
    ) -> subprocess.Popen[str]:
        """A program that takes the arguments of a command."""
        with self.tell(args) as told:
            return self.start_program([*program, *args], **({"stdout": told} | options))

    def tell(self, args: Sequence[str]) -> IO[str]:
        """Where all that a command tells is kept, for the run that it names."""
        name = next((arg for arg in args if arg.startswith("--name=")), "").removeprefix("--name=")
        return (self.told / (name if re.fullmatch(r"\w{1,99}", name) else "others")).open(
            "a", encoding="utf-8"
        )

    def call_alone(self, args: Sequence[str], **options: Any) -> tuple[int, str]:
        """Exit code and stderr of a command in a process of its own."""
        process = self.start(args, **options)
        _, error = process.communicate()
        return process.returncode, error

    def start_program(
        self, args: Sequence[str], before: Sequence[str] = (), **options: Any
    ) -> subprocess.Popen[str]:
        """Python in a process group of its own; what comes ``before`` it may be strace."""
        paths = os.pathsep.join([str(ROOT), str(self.folder)])
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HOME": str(self.home)}
        environment |= {"TMPDIR": str(self.temporary)} | options.pop("environment", {})
        pipes = {
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.PIPE,
            "stdin": subprocess.DEVNULL,
        }
        program = [*before, sys.executable, "-W", "ignore", *args]
        options = {"env": os.environ | environment, "cwd": self.home, **pipes, **options}
        process = subprocess.Popen(program, text=True, start_new_session=True, **options)
        self.started.append(process)
        return process

    def refuse(
        self,
        row: Row,
        name: str,
        args: Sequence[str],
        words: str,
        call: Callable[[Sequence[str]], tuple[int, str]] | None = None,
    ) -> None:
        """A command that must end with one line, these words in it, and make nothing."""
        before, start = self.made(), time.monotonic()
        code, error = (call or self.call)(args)
        row.tried += 1
        row.worst_wait_s = max(row.worst_wait_s, time.monotonic() - start)
        if code != 2 or not is_one_line(error) or words not in error:
            row.fault("undetected", f"{name}: exit {code}, {error}")
        if self.made() != before:
            row.fault("undetected", f"{name}: made {sorted(self.made() ^ before)}")
        self.look_at_canary(row, name)

    def allow(self, row: Row, name: str, args: Sequence[str]) -> None:
        """The control of those that are refused: it differs in what is wrong with them, and succeeds."""
        code, error = self.call(args)
        row.fault("undetected", f"{name}: exit {code}, {error}", code != 0)

    def look_at_canary(self, row: Row, name: str) -> None:
        if self.canary.exists():
            self.canary.unlink()
            row.fault("executed", name)

    def made(self) -> set[str]:
        """The names of all that runs and states consist of, what lies beside them, and every file outside."""
        inside = {str(path) for place in (self.logs, self.states) for path in place.rglob("*")}
        return inside | {str(path) for path in self.folder.iterdir()} | self.outside()

    def outside(self) -> set[str]:
        """Files that no run may touch, with size and time: what it reads, where it stands, the system's own."""
        paths, found = [self.text], set()
        for place in (self.teacher, self.task, self.home, Path("/etc")):
            for folder, folders, names in os.walk(place):
                folders[:] = [
                    name for name in folders if not name.startswith(".")
                ]  # libraries' caches in the home
                paths += [Path(folder, name) for name in names]
                found |= {str(Path(folder, name)) for name in folders}
        for path in paths:
            with suppress(OSError):
                found.add(f"{path} {path.lstat().st_size} {path.lstat().st_mtime_ns}")
        return found

    def study(self, name: str) -> optuna.Study:
        url = self.storages.get(
            name, f"sqlite:///{self.run(name)}/study.db"
        )  # the tables are made by the search alone
        return optuna.load_study(study_name=name, storage=RDBStorage(url, skip_table_creation=True))

    def trials(self, name: str) -> list[optuna.trial.FrozenTrial]:
        if name not in self.storages and not (self.run(name) / "study.db").exists():
            return []
        try:
            return self.study(name).trials
        except (KeyError, IntegrityError):  # it has not begun, or both make its tables
            return []
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            # A study that is begun is not written to by whoever reads it; on a full disk another one cannot be begun.
            begins = "no such table|already exists|relation .* does not exist|disk is full"
            if re.search(begins, f"{error} {error.__cause__}"):
                return []
            raise

    def story(self, name: str) -> list[Any]:
        return [(t.params, t.value) for t in self.trials(name) if t.state.name == "COMPLETE"]

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

    def is_worth(self, params: dict[str, Any], value: float) -> bool:
        """Whether a student alone is worth that; not in --quick, where only those of the reference are known."""
        known = self.story(
            self.reference if self.quick else self.finished(1000)
        )  # all that there are
        return all(value == other for same, other in known if same == params)

    def acknowledged(self, name: str) -> dict[int, Any]:
        """The finished trials, and what each was worth."""
        finished = [t for t in self.trials(name) if t.state.name == "COMPLETE"]
        return {t.number: (t.value, t.params, t.user_attrs.get("weights_sha256")) for t in finished}

    def wait_for_candidate(
        self, process: subprocess.Popen[str], name: str, number: int = 0
    ) -> None:
        """Until a candidate of this number, or a later one, has begun, or the process has ended."""
        while process.poll() is None and not any(
            "arch" in t.user_attrs for t in self.trials(name)[number:]
        ):
            time.sleep(0.2)

    def check(
        self,
        row: Row,
        name: str,
        acknowledged: dict[int, Any],
        error: str = "",
        one: bool = True,
        num_trials: int | None = None,
        like: str = "",
    ) -> None:
        """I1 to I8 after a search of one worker, or of several, has ended, however often it was broken off.

        ``like``: the unbroken search that it shall equal, where that is not the reference.
        """
        self.check_stopped(row, name, acknowledged, error)
        trials = self.trials(name)
        counted = [
            t for t in trials if t.state.name == "COMPLETE" and "twin_of" not in t.user_attrs
        ]
        row.fault(
            "duplicated",
            f"{len(counted)} trained",
            abs(len(counted) - (num_trials or self.num_trials)),
        )  # I2
        row.fault(
            "undetected", "no manifest", not (self.run(name) / "manifest.json").exists()
        )  # I4
        mine = self.story(name)  # I7; several workers propose in an order of their own
        wrong = (
            [] if one else [params for params, value in mine if not self.is_worth(params, value)]
        )
        row.fault(
            "unequal",
            wrong or mine,
            bool(wrong) or (one and mine != self.story(like or self.reference)),
        )

    def check_stopped(
        self, row: Row, name: str, acknowledged: dict[int, Any], error: str = ""
    ) -> None:
        """Of these what holds, too, where a search has stopped before its end."""
        trials, values = self.trials(name), self.acknowledged(name)
        lost = [number for number, value in acknowledged.items() if values.get(number) != value]
        row.fault("lost", f"trials {lost}", len(lost))  # I1: what the database had
        path = self.told / name
        told = TOLD.findall(path.read_text(encoding="utf-8") if path.exists() else "")
        lost = [n for n, reward in told if f"{values.get(int(n), [math.nan])[0]:.4f}" != reward]
        row.fault("lost", f"told, but not stored: {lost}", len(lost))  # and what the user was told
        row.fault(
            "undetected", "trials finished, and none was told", bool(values) and not told
        )  # else that is vacuous
        numbers = [t.number for t in trials]
        row.fault("duplicated", f"{numbers}", numbers != list(range(len(numbers))))  # I2
        row.fault("zombies", "running", sum(t.state.name == "RUNNING" for t in trials))  # I3
        self.check_files(row, name)  # I4
        self.check_processes(row, name)  # I5
        row.fault("undetected", error, "Traceback" in error)  # I6
        logs = [path.read_text(errors="replace") for path in self.run(name).glob("worker_*.log")]
        errors = [what for log in logs for what in raised(log, row.id in FAILING)]
        row.fault("undetected", f"a worker's log: {errors}", bool(errors))
        self.look_at_canary(row, name)  # I8
        before, self._outside = self._outside, self.outside()
        row.fault(
            "undetected", f"outside: {sorted(before ^ self._outside)}", before != self._outside
        )

    def states_of(self, name: str) -> Path:
        """Where a run keeps the teacher's states."""
        path = self.run(name) / "config.yaml"
        return (
            Path(yaml.safe_load(path.read_text())["states"]["folder"])
            if path.exists()
            else self.states
        )

    def check_files(self, row: Row, name: str) -> None:
        """What manifests and database say of themselves is true, and nothing is left half written."""
        run = self.run(name)
        faults = [fault for path in run.rglob("manifest.json") for fault in verify(path.parent)[1]]
        if (run / "study.db").exists():
            with closing(sqlite3.connect(run / "study.db")) as database:
                faults += [
                    line for (line,) in database.execute("PRAGMA integrity_check") if line != "ok"
                ]
        row.fault("undetected", faults, len(faults))
        places = (run, run.parent / "tokens", self.states_of(name))
        left = [
            path for place in places for path in place.rglob("*") if TEMPORARY.fullmatch(path.name)
        ]
        row.fault("zombies", left, len(left))
        for path in left:  # counted once
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def check_processes(self, row: Row, name: str) -> None:
        """None goes on after ten seconds, and no lock is held."""
        ended, end = (
            {process.pid for process in self.started if process.poll() is not None},
            time.monotonic() + 10,
        )
        while left := processes_of(ended):
            if time.monotonic() > end:
                row.fault("zombies", f"processes {left}", len(left))
                break
            time.sleep(0.2)
        for path in [
            *self.run(name).rglob("*.lock"),
            *self.run(name).parent.glob("tokens/*.lock"),
            *self.states_of(name).glob("*/lock"),
            *self.temporary.glob("*.lock"),
        ]:
            try:
                if path.name.endswith("stillness.lock"):
                    with ReadWriteLock(path, is_singleton=False).write_lock(timeout=1):
                        pass
                else:
                    FileLock(path).acquire(timeout=1).lock.release()
            except Timeout:
                row.fault("zombies", f"{path} is held")


def raised(log: str, failing: bool = False) -> list[str]:
    """What tracebacks end with, but for that of a disk or a database where it is ``failing``."""
    forgiven = re.compile(r"[\w.]*(OSError|PermissionError|StoreAway)\b")
    found = []
    for block in re.split(r"^(?=Traceback \(most)", log, flags=re.MULTILINE)[1:]:
        is_cause = re.search("^(The above exception|During handling)", block, re.MULTILINE)
        end = re.search(r"^(?!Traceback|[ \t])\S.*", block, re.MULTILINE)
        if end and not is_cause and not (failing and forgiven.match(end[0])):
            found.append(end[0])
    return found


def is_one_line(error: str) -> bool:
    """Whether a command has told one thing, in a line."""
    lines = [line for line in error.splitlines() if line.startswith("kdnas: ")]
    return len(lines) == 1 and "Traceback" not in error


def processes_of(sessions: set[int]) -> list[Path]:
    """The folders in /proc of all that these processes, each of which began a session, have started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if int(session) in sessions and state != "Z":
                found.append(path.parent)
    return found


def has(path: Path, content: bytes) -> bool:
    with suppress(OSError):
        return content in path.read_bytes() + b"\0"
    return False


def kill_all(process: subprocess.Popen[str]) -> str:
    """kill -9 of its process group; what it told."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[1]


@dataclass
class Postgres:
    """A PostgreSQL server of its own, that listens to nobody else."""

    programs: Path
    folder: Path
    account: dict[str, Any]  # the server refuses to be root's

    @property
    def url(self) -> str:
        return f"postgresql://kdnas@/postgres?host={self.folder}"

    def call(self, *command: str) -> None:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(
            [self.programs / command[0], *command[1:]], check=True, **quiet, **self.account
        )

    def start(self) -> None:
        options = f"--options=-k {self.folder} -c listen_addresses='' -c fsync=off"
        self.call(
            "pg_ctl",
            "--wait",
            f"--pgdata={self.folder}/data",
            f"--log={self.folder}/log",
            options,
            "start",
        )

    def stop(self) -> None:
        self.call("pg_ctl", "--mode=immediate", f"--pgdata={self.folder}/data", "stop")

    def cut(self) -> int:
        """Cut all connections, those that are idle in a training too; how many there were."""
        sql = "select pg_terminate_backend(pid) from pg_stat_activity"
        sql += " where pid <> pg_backend_pid() and backend_type = 'client backend'"
        command = [
            f"--host={self.folder}",
            "--username=kdnas",
            "--dbname=postgres",
            "-tA",
            f"--command={sql}",
        ]
        found = subprocess.run(
            [self.programs / "psql", *command],
            check=True,
            capture_output=True,
            text=True,
            **self.account,
        )
        return found.stdout.count("t")


@contextmanager
def postgres() -> Iterator[Postgres]:
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        raise NotRun("needs Debian's package postgresql")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    server = Postgres(
        programs[-1], folder, {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
    )
    if server.account:
        shutil.chown(folder, **server.account)
    server.call(
        "initdb", "--no-sync", "--auth=trust", "--username=kdnas", f"--pgdata={folder}/data"
    )
    server.start()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)
