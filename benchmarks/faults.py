"""What kdnas survives: faults that are made on purpose, one a row, and a checker after each.

A row counts what was tried, and what went wrong: acknowledged trials that are ``lost`` (or altered), trials that are
``duplicated`` or beyond what was asked, payloads ``executed``, faults ``undetected`` (taken without a word, told
with a traceback, or half made), ``zombies`` (trials that run, processes, locks or temporary files that are left), and
searches that end ``unequal`` to an unbroken one: all should be 0. ``worst_wait_s`` is the longest wait.

    python benchmarks/faults.py --quick                  without servers and many kills, in under four minutes
    python benchmarks/faults.py --only F01,F13           some of them, as often as in the whole run
    python benchmarks/faults.py --soak 120               two workers, killed every two minutes: what grows?
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
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from common import OUTPUT, ROOT, machine  # isort: skip (before torch)

import optuna
import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table
from sqlalchemy.exc import SQLAlchemyError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from kdnas.cli import main as kdnas
from kdnas.manifest import verify
from kdnas.runs import write_json

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "ls"]
N_TRIALS = 4
# A start that kills its process for one shape, in the way that the environment says.
DEADLY = """
import ctypes, os
from kdnas.student_init import FromTeacher

class Deadly(FromTeacher):
    def __call__(self, student, teacher, rows):
        if (student.config.num_hidden_layers, student.config.intermediate_size) == (2, 16):
            if os.environ["DEADLY"] == "crash":
                ctypes.string_at(0)
            held = []
            while True:
                held.append(b"x" * (1 << 24))
        return super().__call__(student, teacher, rows)
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
    not_run: str = ""
    notes: list[str] = field(default_factory=list)

    def leave_out(self, reason: object) -> None:
        """A part of the fault that cannot be made here."""
        self.notes.append(f"not run: {reason}")

    def is_bad(self) -> bool:
        return any((self.lost, self.duplicated, self.executed, self.undetected, self.zombies, self.unequal))

    def fault(self, kind: str, note: object, count: int = 1) -> None:
        if count:
            setattr(self, kind, getattr(self, kind) + count)
            self.notes.append(f"{kind}: {str(note)[-300:]}")


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
        self.canary, self.logs = folder / "CANARY", folder / "logs"
        self.teacher, self.text, self.task = folder / "teacher", folder / "rows.txt", folder / "first_word"
        self._number, self._reference = 0, None
        self.started: list[subprocess.Popen[str]] = []
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        vocabulary = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *WORDS]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        special = [("[CLS]", 1), ("[SEP]", 2)]
        tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", special)
        names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "mask", "unk")}
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
        self.text.write_text("".join(" ".join(self.random.choices(WORDS, k=12)) + "\n" for _ in range(200)))
        self.task.mkdir()
        for split, num_rows in (("train", 96), ("validation", 30)):
            rows = [f"{WORDS[i % 3]} {' '.join(self.random.choices(WORDS, k=6))}\t{i % 3}\n" for i in range(num_rows)]
            (self.task / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(rows))
        (folder / "deadly.py").write_text(DEADLY)

    def new_name(self) -> str:
        self._number += 1
        return f"run{self._number}"

    def search(self, name: str, *more: str, command: str = "search") -> list[str]:
        """A command whose rewards do not depend on the clock (alpha 0), so that equal searches are equal."""
        options = {
            "teacher": self.teacher,
            "text": self.text,
            "name": name,
            "root": self.logs,
            "states.folder": self.folder / "states",
            "data.max_length": 24,
            "data.batch_tokens": 512,
            "latency.length": 16,
            "latency.min_seconds": 0.01,
            "search.n_trials": N_TRIALS,
            "search.num_epochs": 1,
            "search.alpha": 0,
            "trainer.accelerator": "cpu",
        }
        return [command, *(f"--{key}={value}" for key, value in options.items()), *more]

    def job(self, name: str) -> list[str]:
        """The same for the whole job, with a labelled task."""
        options = {"task": self.task, "full_kd.num_epochs": 2, "finetune.num_epochs": 2, "finetune.max_length": 24}
        return self.search(name, *(f"--{key}={value}" for key, value in options.items()), command="run")

    def call(self, args: Sequence[str]) -> tuple[int, str]:
        """Exit code and stderr of a command in this process; -1 with the exception where one comes through."""
        errors = io.StringIO()
        try:
            with redirect_stderr(errors), redirect_stdout(io.StringIO()):
                code = kdnas(args)
        except Exception as error:
            return -1, f"Traceback: {error!r}"
        if code in (130, 143):  # meant for us
            raise KeyboardInterrupt
        return code, errors.getvalue()

    def start(self, args: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """The same in a process group of its own, whose output is kept."""
        return self.start_program(["-m", "kdnas", *args], **options)

    def start_program(self, args: Sequence[str], before: Sequence[str] = (), **options: Any) -> subprocess.Popen[str]:
        """Python in a process group of its own; what comes ``before`` it may be strace."""
        paths = os.pathsep.join([str(ROOT), str(self.folder)])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | options.pop("environment", {})
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        program = [*before, sys.executable, "-W", "ignore", *args]
        process = subprocess.Popen(program, env=environment, text=True, start_new_session=True, **(pipes | options))
        self.started.append(process)
        return process

    def refuse(self, row: Row, name: str, args: Sequence[str], words: str = "", codes: Sequence[int] = (2,)) -> None:
        """A command that must end with one line, and make nothing."""
        before, start = self.made(), time.monotonic()
        code, error = self.call(args)
        row.tried += 1
        row.worst_wait_s = max(row.worst_wait_s, time.monotonic() - start)
        lines = [line for line in error.splitlines() if line.startswith("kdnas: ")]
        if code not in codes or len(lines) != 1 or words not in error or "Traceback" in error:
            row.fault("undetected", f"{name}: exit {code}, {error}")
        if self.made() != before:
            row.fault("undetected", f"{name}: made {sorted(self.made() - before)}")
        self.look_at_canary(row, name)

    def look_at_canary(self, row: Row, name: str) -> None:
        if self.canary.exists():
            self.canary.unlink()
            row.fault("executed", name)

    def made(self) -> set[str]:
        places = [self.logs, self.folder / "states"]
        return {str(path) for place in places for path in place.rglob("*")} | {str(p) for p in self.folder.iterdir()}

    def trials(self, name: str) -> list[optuna.trial.FrozenTrial]:
        path = self.logs / name / "study.db"
        if not path.exists():
            return []
        try:  # the tables are made by the search alone
            storage = optuna.storages.RDBStorage(f"sqlite:///{path}", skip_table_creation=True)
            return optuna.load_study(study_name=name, storage=storage).trials
        except (KeyError, SQLAlchemyError, optuna.exceptions.StorageInternalError):
            return []

    def story(self, name: str) -> list[Any]:
        return [(t.params, t.value) for t in self.trials(name) if t.state.name == "COMPLETE"]

    @property
    def reference(self) -> str:
        """A finished search that nothing has disturbed."""
        if self._reference is None:
            self._reference = self.new_name()
            code, error = self.call(self.search(self._reference))
            assert code == 0, error
        return self._reference

    def acknowledged(self, name: str) -> dict[int, float]:
        """The finished trials and their values."""
        return {t.number: t.value for t in self.trials(name) if t.state.name == "COMPLETE"}

    def wait_for_candidate(self, process: subprocess.Popen[str], name: str, number: int = 0) -> None:
        """Until a candidate of this number, or a later one, has begun, or the process has ended."""
        while process.poll() is None and not any("arch" in t.user_attrs for t in self.trials(name)[number:]):
            time.sleep(0.2)

    def check(
        self,
        row: Row,
        name: str,
        acknowledged: dict[int, float],
        error: str = "",
        one: bool = True,
        num_trials: int = N_TRIALS,
    ) -> None:
        """I1 to I8 after a search of one worker, or of several, has ended, however often it was broken off."""
        trials = self.trials(name)
        values = {t.number: t.value for t in trials if t.state.name == "COMPLETE"}
        lost = [number for number, value in acknowledged.items() if values.get(number) != value]
        row.fault("lost", f"trials {lost}", len(lost))  # I1
        counted = [t for t in trials if t.state.name == "COMPLETE" and "twin_of" not in t.user_attrs]
        numbers = [t.number for t in trials]
        row.fault("duplicated", f"{numbers}", len(numbers) - len(set(numbers)))  # I2
        row.fault("duplicated", f"{len(counted)} trained", abs(len(counted) - num_trials))
        row.fault("zombies", "running", sum(t.state.name in ("RUNNING", "WAITING") for t in trials))  # I3
        faults = verify(self.logs / name)[1]
        row.fault("undetected", faults, len(faults))  # I4
        left = [path for path in (self.logs / name).rglob(".*")]
        row.fault("zombies", left, len(left))
        self.check_processes(row, name)  # I5
        row.fault("undetected", error, "Traceback" in error)  # I6
        mine, reference = self.story(name), self.story(self.reference)  # I7
        if not one:  # several workers propose in an order of their own: what both have trained must be worth the same
            both = [params for params, _ in mine if params in [params for params, _ in reference]]
            mine, reference = (sorted((r for r in rows if r[0] in both), key=str) for rows in (mine, reference))
        row.fault("unequal", mine, mine != reference)
        self.look_at_canary(row, name)  # I8

    def check_processes(self, row: Row, name: str) -> None:
        """None goes on after ten seconds, and no lock is held."""
        ended, end = {process.pid for process in self.started if process.poll() is not None}, time.monotonic() + 10
        while left := processes_of(ended):
            if time.monotonic() > end:
                row.fault("zombies", f"processes {left}", len(left))
                break
            time.sleep(0.2)
        locks = [self.logs / name / "run.lock", self.logs / name / "search" / "search.lock"]
        for path in [lock for lock in locks if lock.exists()] + list((self.folder / "states").glob("*/lock")):
            try:
                FileLock(path).acquire(timeout=1).lock.release()
            except Timeout:
                row.fault("zombies", f"{path} is held")


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


FAULTS: dict[str, tuple[str, bool, Callable[[Bench, Row], None]]] = {}


def fault(name: str, what: str, quick: bool = True) -> Callable[[Any], Any]:
    """Put a function into the table of faults."""

    def put(function: Callable[[Bench, Row], None]) -> Callable[[Bench, Row], None]:
        FAULTS[name] = what, quick, function
        return function

    return put


def kill_all(process: subprocess.Popen[str]) -> str:
    """kill -9 of its process group; what it told."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[1]


@fault("F01", "kill -9 of a search and its process group, at a random instant")
def kill(bench: Bench, row: Row) -> None:
    bench.reference  # noqa: B018 (made before the clock starts)
    start = time.monotonic()
    bench.start(bench.search(bench.new_name())).communicate()
    whole = time.monotonic() - start
    for _ in range(2 if bench.quick else 50):
        name = bench.new_name()
        process = bench.start(bench.search(name))
        time.sleep(bench.random.uniform(0.3, 1.0) * whole)
        kill_all(process)
        acknowledged = bench.acknowledged(name)
        _, error = bench.start(bench.search(name)).communicate()
        row.tried += 1
        bench.check(row, name, acknowledged, error)


@fault("F02", "kill -9 of one of two workers; the other goes on, and a third takes its place", quick=False)
def kill_worker(bench: Bench, row: Row) -> None:
    for _ in range(3 if bench.quick else 50):
        name = bench.new_name()
        process = bench.start(bench.search(name, "--workers=2"))
        bench.wait_for_candidate(process, name)
        time.sleep(bench.random.uniform(0, 2))
        pids = [t.user_attrs["pid"] for t in bench.trials(name) if t.state.name == "RUNNING" and "pid" in t.user_attrs]
        with suppress(ProcessLookupError, IndexError):
            os.kill(bench.random.choice(pids), signal.SIGKILL)
        acknowledged = bench.acknowledged(name)
        _, error = process.communicate()
        row.tried += 1
        bench.check(row, name, acknowledged, error, one=False)


STAGES = {
    "states": "config.yaml",
    "search": "trial_0000",
    "full KD": "best_student.yaml",
    "fine-tuning": "full_kd/result.json",
    "export": "glue/results.json",
    "report": "student",
}


@fault("F03", "kill -9 in each stage of a run: the figures and the student's weights end the same", quick=False)
def kill_stages(bench: Bench, row: Row) -> None:
    def outcome(run: Path) -> list[Any]:
        kd, glue = (json.loads((run / name).read_text()) for name in ("full_kd/result.json", "glue/results.json"))
        scores = {role: line["score"] for role, line in glue["models"].items()}
        weights = hashlib.sha256((run / "student" / "model.safetensors").read_bytes()).hexdigest()
        return [kd["arch"], kd["history"], scores, weights, bench.story(run.name)]

    def forget_states() -> None:
        for folder in (bench.folder / "states", bench.logs / "tokens"):
            shutil.rmtree(folder, ignore_errors=True)

    bench.reference  # noqa: B018 (stores them)
    whole = bench.logs / bench.new_name()
    forget_states()
    process = bench.start(bench.job(whole.name))
    begins, start = {}, time.monotonic()
    while process.poll() is None:
        begins |= {s: time.monotonic() for s, name in STAGES.items() if s not in begins and (whole / name).exists()}
        time.sleep(0.02)
    assert process.returncode == 0, process.communicate()[1]
    unbroken, expected = time.monotonic() - start, outcome(whole)
    ends = [*list(begins.values())[1:], time.monotonic()]
    for (stage, begin), end in zip(begins.items(), ends, strict=True):
        for _ in range(1 if bench.quick else 10):
            run = bench.logs / bench.new_name()
            if stage == "states":
                forget_states()
            process = bench.start(bench.job(run.name))
            while process.poll() is None and not (run / STAGES[stage]).exists():
                time.sleep(0.02)
            time.sleep(bench.random.uniform(0, end - begin))
            kill_all(process)
            acknowledged, start = bench.acknowledged(run.name), time.monotonic()
            process = bench.start(bench.job(run.name))
            _, error = process.communicate()
            row.tried += 1
            row.worst_wait_s = max(row.worst_wait_s, time.monotonic() - start)
            bench.check(row, run.name, acknowledged, error)
            row.fault("undetected", f"{stage}: {error}", process.returncode != 0)
            row.fault("unequal", stage, process.returncode == 0 and outcome(run) != expected)
    row.notes.append(f"an unbroken run takes {unbroken:.0f} s")


@fault(
    "F04",
    "SIGTERM, SIGINT, SIGUSR1, SIGINT twice, in a search, full KD and fine-tuning: code, time, what is left",
)
def signals(bench: Bench, row: Row) -> None:
    codes = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143}

    def end(process: subprocess.Popen[str], number: int, times: int = 1) -> None:
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
        row.fault("undetected", f"it took {wait:.1f} s", wait > 10)
        row.fault("undetected", f"{process.returncode} {error}", process.returncode != codes[number])
        row.fault("undetected", error, "Traceback" in error)

    for folder in ("full_kd", "glue") if bench.quick else ("full_kd", "glue") * 5:
        for number in (signal.SIGTERM,) if bench.quick else codes:
            name = bench.new_name()
            args = bench.job(name) + ["--full_kd.num_epochs=40", "--finetune.num_epochs=40"]
            process = bench.start(args)
            while process.poll() is None and not list((bench.logs / name / folder).rglob("last.ckpt")):
                time.sleep(0.02)
            time.sleep(bench.random.uniform(0, 0.3))
            end(process, number)
            kept = list((bench.logs / name / folder).rglob("last.ckpt"))
            row.fault("lost", f"no checkpoint in {folder}", not kept)
            code, error = bench.call(args)
            row.fault("undetected", f"after {folder}: {code} {error}", code != 0)
            bench.check(row, name, {}, error)
    cases = [(number, 1, 0) for number in codes] + [(signal.SIGINT, 2, 0), (signal.SIGTERM, 1, 2)]
    for number, times, num_workers in cases * (1 if bench.quick else 12):
        name = bench.new_name()
        args = bench.search(name, "--search.num_epochs=100000", f"--data.num_workers={num_workers}")
        args += ["--workers=2"] * (bench.random.random() < 0.25)
        process = bench.start(args)
        bench.wait_for_candidate(process, name)
        time.sleep(bench.random.uniform(0, 2))
        end(process, number, times)
        if times == 1:  # the second does not wait for the trial to be told
            row.fault("zombies", "running", sum(t.state.name == "RUNNING" for t in bench.trials(name)))
        bench.check_processes(row, name)


@contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[Path]:
    """A small disk; raises CalledProcessError where nobody may mount one."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
        folder.rmdir()


@fault("F05", "a disk that is full while the teacher's states are stored; then it is larger")
def full_disk(bench: Bench, row: Row) -> None:
    for kilobytes in (64,) if bench.quick else (32, 64, 128, 256):
        with tmpfs(bench.folder / "small", f"size={kilobytes}k") as disk:
            name = bench.new_name()
            args = bench.search(name, f"--states.folder={disk}")
            code, error = bench.call(args)
            row.tried += 1
            if code not in (2, 3) or "Traceback" in error:
                row.fault("undetected", f"{kilobytes} kB: exit {code}, {error}")
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            code, error = bench.call(args)
            row.fault("undetected", error, code != 0)
            row.fault("unequal", kilobytes, bench.story(name) != bench.story(bench.reference))
    for kilobytes in (420,) if bench.quick else range(20, 460, 40):  # the run itself
        with tmpfs(bench.folder / "small", f"size={kilobytes}k") as disk:
            name, logs = bench.new_name(), bench.logs
            args = bench.search(name, f"--root={disk}")
            code, error = bench.call(args)
            row.tried += 1
            full = code == 3 and "bytes are free" in error and "Traceback" not in error
            row.fault("undetected", f"{kilobytes} kB: exit {code}, {error}", not full)
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            code, error = bench.call(args)
            row.fault("undetected", error, code != 0)
            story, bench.logs = bench.story(bench.reference), disk
            row.fault("unequal", kilobytes, bench.story(name) != story)
            bench.logs = logs


@fault("F06", "a limit on the size of files, and then none", quick=False)
def file_limit(bench: Bench, row: Row) -> None:
    import resource

    for power in range(10, 20, 3 if bench.quick else 1):
        name, limit = bench.new_name(), 2**power

        def limited(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        process = bench.start(bench.search(name), preexec_fn=limited)
        _, error = process.communicate()
        row.tried += 1
        bad = process.returncode not in (0, 1, 2, 3) or "Traceback" in error
        row.fault("undetected", f"{limit} bytes: {process.returncode} {error}", bad)
        code, error = bench.call(bench.search(name))
        row.fault("undetected", error, code != 0)
        row.fault("unequal", limit, bench.story(name) != bench.story(bench.reference))


SYSTEM_CALLS = ("fsync", "pwrite64", "rename", "ftruncate", "write")


@fault("F07", "the N-th system call of a search fails, once: fsync, pwrite64, rename, ftruncate, write", quick=False)
def failing_calls(bench: Bench, row: Row) -> None:
    if not shutil.which("strace"):
        raise NotRun("needs strace")
    for call in SYSTEM_CALLS[: 2 if bench.quick else None]:
        for number in (3,) if bench.quick else (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233):
            name = bench.new_name()
            strace = ["strace", "-f", "--seccomp-bpf", "-o", "/dev/null", f"--trace={call}"]
            strace.append(f"--inject={call}:error=EIO:when={number}")  # counted in each thread
            process = bench.start_program(["-m", "kdnas", *bench.search(name)], strace)
            _, error = process.communicate()
            row.tried += 1
            bad = process.returncode not in (0, 1, 2, 3) or "Traceback" in error
            row.fault("undetected", f"{call} {number}: exit {process.returncode}, {error}", bad)
            acknowledged = bench.acknowledged(name)
            code, error = bench.call(bench.search(name))
            row.fault("undetected", f"after {call} {number}: {error}", code != 0)
            bench.check(row, name, acknowledged)
            if process.returncode == 0 and number > 55:
                break  # so many are not made


def damages(shard: Path) -> dict[str, Callable[[], None]]:
    content = shard.read_bytes()

    def flip(place: int) -> None:
        changed = bytearray(content)
        changed[place] ^= 1
        shard.write_bytes(changed)

    return {
        "first bit": lambda: flip(0),
        "middle bit": lambda: flip(len(content) // 2),
        "last bit": lambda: flip(-1),
        "one byte less": lambda: shard.write_bytes(content[:-1]),
        "100 bytes less": lambda: shard.write_bytes(content[:-100]),
        "empty": lambda: shard.write_bytes(b""),
        "one byte more": lambda: shard.write_bytes(content + b"\0"),
        "gone": lambda: shard.unlink(),
        "half written": lambda: shard.rename(shard.with_name(f".{shard.name}.partial")),
    }


@fault("F08", "a stored shard that is damaged, cut, gone or half written")
def shards(bench: Bench, row: Row) -> None:
    bench.reference  # noqa: B018 (stores them)
    (shard,) = (bench.folder / "states").rglob("*.bin")
    whole = shard.read_bytes()
    for what, damage in list(damages(shard).items())[:: 4 if bench.quick else 1]:
        damage()
        name = bench.new_name()
        code, error = bench.call(bench.search(name))
        row.tried += 1
        row.fault("undetected", f"{what}: exit {code} {error}", code != 0 or shard.read_bytes() != whole)
        row.fault("unequal", what, bench.story(name) != bench.story(bench.reference))


@fault("F09", "two searches store one teacher's states at once; in half of the rounds one is killed", quick=False)
def two_builders(bench: Bench, row: Row) -> None:
    bench.reference  # noqa: B018
    (whole,) = (bench.folder / "states").rglob("*.bin")
    for number in range(1 if bench.quick else 20):
        states, names = bench.folder / f"states{number}", [bench.new_name(), bench.new_name()]
        one, other = (bench.start(bench.search(name, f"--states.folder={states}")) for name in names)
        if number % 2 == 0:
            while one.poll() is None and not list(states.glob("*/lock")):
                time.sleep(0.01)
            time.sleep(bench.random.uniform(0, 0.3))
            kill_all(one)
            one = bench.start(bench.search(names[0], f"--states.folder={states}"))
        for name, process in zip(names, (one, other), strict=True):
            _, error = process.communicate()
            row.tried += 1
            bench.check(row, name, {}, error)
        stored = [(path.name, path.read_bytes()) for path in states.rglob("*.bin")]
        row.fault("unequal", [name for name, _ in stored], stored != [(whole.name, whole.read_bytes())])
        shutil.rmtree(states)


@fault("F11", "candidates with a reward, loss or latency that is NaN or infinite")
def not_finite(bench: Bench, row: Row) -> None:
    from kdnas.nas.search import open_study, search
    from kdnas.nas.space import SearchSpace
    from kdnas.report import trials_frame

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
            row.fault("undetected", f"{value} at {place}", states[place] != "FAIL" or best.value != 0.5)


@contextmanager
def memory_group(megabytes: int) -> Iterator[Path]:
    """A cgroup (version 1 or 2) whose processes the kernel kills when they take more."""
    old, new = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    root = old if old.is_dir() else new
    group, limit = root / f"kdnas-faults-{os.getpid()}", "memory.limit_in_bytes" if root == old else "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text(str(megabytes << 20))
    except OSError as error:
        raise NotRun(f"no cgroup of memory can be made: {error}") from error
    try:
        yield group
    finally:
        group.rmdir()


def deadly_search(bench: Bench, row: Row, way: str, signal_name: str, **options: Any) -> None:
    """One of four students kills the process; the search, with its defaults, goes on with the others."""
    from kdnas.nas.record import failure_of

    name = bench.new_name()
    space = ["--space.num_attention_heads=[1]", "--space.intermediate_size=[16,32]", "--space.hidden_act=[gelu]"]
    args = bench.search(name, "--recipe.start=deadly.Deadly", "--search.n_trials=3", *space)
    process = bench.start(args, environment={"DEADLY": way}, **options)
    _, error = process.communicate()
    row.tried += 1
    row.fault("undetected", f"exit {process.returncode}: {error}", process.returncode != 0 or "Traceback" in error)
    trials = [t for t in bench.trials(name) if "twin_of" not in t.user_attrs]
    deadly = [t for t in trials if (t.params["num_hidden_layers"], t.params["intermediate_size"]) == (2, 16)]
    died = [t.state.name == "FAIL" and signal_name in t.user_attrs.get("died", "") for t in deadly]
    row.fault("undetected", f"{way}: {[failure_of(t) for t in deadly]}", died != [True, True])
    row.fault("lost", [t.state.name for t in trials], abs(sum(t.state.name == "COMPLETE" for t in trials) - 3))
    row.fault("zombies", "running", sum(t.state.name in ("RUNNING", "WAITING") for t in bench.trials(name)))
    bench.check_processes(row, name)


@fault("F36", "candidates that crash in native code, in a search with its defaults")
def crash(bench: Bench, row: Row) -> None:
    for _ in range(1 if bench.quick else 10):
        deadly_search(bench, row, "crash", "SIGSEGV")


@fault("F12", "candidates that take more memory than RLIMIT_AS, or a cgroup, leaves")
def memory(bench: Bench, row: Row) -> None:
    import resource

    from kdnas.nas.record import failure_of
    from kdnas.nas.search import open_study, search
    from kdnas.nas.space import SearchSpace
    from kdnas.training import release_memory

    def pages(place: int) -> int:
        return int(Path("/proc/self/statm").read_text().split()[place]) * resource.getpagesize()

    choices = {"num_hidden_layers": [1, 2, 3, 4, 5], "num_attention_heads": [1], "hidden_size": [16, 32]}
    space = SearchSpace({**choices, "intermediate_size": [64], "hidden_act": ["gelu", "relu"]})

    def evaluate(trial: Any, arch: Any) -> float:
        held = [torch.ones(1 << 22) for _ in range(64 if trial.number % 2 else 1)]  # 16 MB each
        return float(sum(len(block) for block in held) and arch.num_hidden_layers)

    name, before, limits = bench.new_name(), pages(1), resource.getrlimit(resource.RLIMIT_AS)
    study = open_study(f"sqlite:///{bench.folder}/{name}.db", name, {})
    resource.setrlimit(resource.RLIMIT_AS, (pages(0) + (256 << 20), limits[1]))
    try:
        search(evaluate, space, study, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    for trial in study.trials:
        if "twin_of" not in trial.user_attrs and trial.number % 2:
            row.tried += 1
            reason = failure_of(trial) or ""
            row.fault("undetected", f"{trial.number}: {reason}", not reason.startswith("out of memory"))
    row.fault("undetected", "others failed", sum(t.state.name == "FAIL" and not t.number % 2 for t in study.trials))
    release_memory()  # as each fit begins
    row.fault("zombies", f"{(pages(1) - before) >> 20} MB more", pages(1) - before > 128 << 20)
    if bench.quick:
        return row.leave_out("a cgroup's limit (not in --quick)")
    with memory_group(2048) as group:

        def enter() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

        deadly_search(bench, row, "memory", "SIGKILL", preexec_fn=enter)


def outage(bench: Bench, row: Row, pauses: Sequence[float], cut: bool) -> None:
    """Searches on a PostgreSQL server of their own that goes away, or cuts its connections."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        raise NotRun("needs Debian's package postgresql")
    import threading

    from kdnas.nas.record import trained
    from kdnas.nas.search import open_study, search
    from kdnas.nas.space import SearchSpace

    account: dict[str, Any] = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    if account:
        shutil.chown(folder, **account)

    def call(*command: str) -> None:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([programs[-1] / command[0], *command[1:]], check=True, **quiet, **account)

    options = f"-k {folder} -c listen_addresses='' -c fsync=off"
    server = ("pg_ctl", "--wait", f"--pgdata={folder}/data", f"--log={folder}/log", f"--options={options}")
    call("initdb", "--no-sync", "--auth=trust", "--username=kdnas", f"--pgdata={folder}/data")
    call(*server, "start")
    choices = {"num_hidden_layers": [1, 2, 3, 4, 5], "num_attention_heads": [1], "hidden_size": [16, 32]}
    space = SearchSpace({**choices, "intermediate_size": [64], "hidden_act": ["gelu", "relu"]})
    evaluated: list[int] = []

    def evaluate(trial: Any, arch: Any) -> float:
        time.sleep(0.2)
        evaluated.append(trial.number)
        trial.set_user_attr("loss", 0.5)
        return float(arch.num_hidden_layers)

    def disturb(seconds: float) -> None:
        time.sleep(bench.random.uniform(0.2, 2))
        if cut:
            sql = "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()"
            call("psql", f"--host={folder}", "--username=kdnas", "--dbname=postgres", f"--command={sql}")
        else:
            call("pg_ctl", "--mode=immediate", f"--pgdata={folder}/data", "stop")
            time.sleep(seconds if seconds <= 60 else 15)
            call(*server, "start")

    def open_it() -> Any:
        return open_study(f"postgresql://kdnas@/postgres?host={folder}", name, {}, folder=bench.folder)

    try:
        for seconds in pauses:
            name = bench.new_name()
            evaluated.clear()
            study = open_it()
            thread = threading.Thread(target=disturb, args=(seconds,))
            thread.start()
            if seconds > 60:  # longer than it is waited for
                with mock.patch("kdnas.nas.storage.PATIENCE_SECONDS", 5.0):
                    try:
                        search(evaluate, space, study, 15, folder=bench.folder)
                        row.fault("undetected", f"{name}: nobody noticed")
                    except OSError:
                        pass
                    thread.join()
                study = open_it()
                row.fault("zombies", "a kept result was not stored", len(list(bench.folder.glob("unsent_*"))))
            search(evaluate, space, study, 15, folder=bench.folder)
            thread.join()
            row.tried += 1
            row.fault("lost", name, abs(len(set(evaluated)) - len(trained(study))))
            row.fault("duplicated", name, len(evaluated) - len(set(evaluated)))
            row.fault("zombies", name, sum(t.state.name in ("RUNNING", "WAITING") for t in study.trials))
    finally:
        call("pg_ctl", "--mode=immediate", f"--pgdata={folder}/data", "stop")
        shutil.rmtree(folder)


@fault("F13", "PostgreSQL stopped in a search: for 5 s, for 60 s, and for longer than it is waited for", quick=False)
def server_stopped(bench: Bench, row: Row) -> None:
    outage(bench, row, [5.0, math.inf] if bench.quick else [5.0, 60.0, math.inf] * 10, cut=False)


@fault("F14", "connections to PostgreSQL cut in a search", quick=False)
def connections_cut(bench: Bench, row: Row) -> None:
    outage(bench, row, [0.0] * (3 if bench.quick else 50), cut=True)


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

    weights = "model.safetensors"
    spoil: dict[str, Callable[[Path], Any]] = {
        "no folder": shutil.rmtree,
        "empty folder": lambda path: [file.unlink() for file in path.iterdir()],
        "no tokenizer": lambda path: [file.unlink() for file in path.glob("tokenizer*")],
        "config is no JSON": lambda path: (path / "config.json").write_text("{no"),
        "weights cut": lambda path: (path / weights).write_bytes((path / weights).read_bytes()[:-99]),
        "weights empty": lambda path: (path / weights).write_bytes(b""),
        "a decoder": lambda path: edit(path / "config.json", is_decoder=True),
        "another family": lambda path: edit(path / "config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"]),
    }
    for what, damage in spoil.items():
        with spoilt_teacher(bench) as folder:
            damage(folder)
            bench.refuse(row, what, bench.search(bench.new_name(), f"--teacher={folder}"))
    with mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}):
        bench.refuse(row, "a hub's name", bench.search(bench.new_name(), "--teacher=nobody/nothing"))


@fault("F16", "pickles that execute: weights, a checkpoint, a stored shard, a config, a manifest")
def pickles(bench: Bench, row: Row) -> None:
    payload = {"state_dict": Payload(bench.canary)}
    with spoilt_teacher(bench) as folder:
        (folder / "model.safetensors").unlink()
        torch.save(payload, folder / "pytorch_model.bin")
        bench.refuse(row, "weights", bench.search(bench.new_name(), f"--teacher={folder}"))
    torch.save(payload, checkpoint := bench.folder / "evil.ckpt")
    model = [f"--model.teacher={bench.teacher}", f"--data.text={bench.text}", f"--ckpt_path={checkpoint}"]
    arch = '--model.arch={"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}'
    bench.refuse(row, "checkpoint of fit", ["fit", *model, arch])
    checkpoint.unlink()
    (shard,) = (bench.logs / bench.reference and bench.folder / "states").rglob("*.bin")
    torch.save(payload, shard)
    code, error = bench.call(bench.search(bench.new_name()))
    row.tried += 1
    row.fault("undetected", f"shard: {error}", code != 0)
    bench.look_at_canary(row, "shard")
    tag = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{bench.canary}']]"
    (bench.folder / "a.yaml").write_text(f"name: {tag}\n")
    bench.refuse(row, "config", ["search", f"--config={bench.folder / 'a.yaml'}"])
    run = bench.logs / bench.reference
    known = (run / "manifest.json").read_bytes()
    torch.save(payload, run / "manifest.json")
    bench.refuse(row, "manifest", ["verify", str(run)])
    (run / "manifest.json").write_bytes(known)


@fault("F17", "code in a checkpoint, with an answer on stdin and without")
def remote_code(bench: Bench, row: Row) -> None:
    for answer in (lambda *_: "y", mock.Mock(side_effect=EOFError)):
        with spoilt_teacher(bench) as folder, mock.patch("builtins.input", answer):
            (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(bench.canary)!r}).touch()\n")
            config = json.loads((folder / "config.json").read_text())
            evil = {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, "model_type": "evil"}
            (folder / "config.json").write_text(json.dumps(config | evil))
            bench.refuse(row, "code", bench.search(bench.new_name(), f"--teacher={folder}"))


NAMES = ("../x", "/etc/x", "a/../../x", "..", ".", "", "a\0b", "a\nb", "x" * 300, "-rf", "%2e%2e/", "a b")


@fault("F18", "names of runs that lead elsewhere, and a run that is a link")
def names(bench: Bench, row: Row) -> None:
    for name in NAMES:
        bench.refuse(row, repr(name), bench.search(name))
    bench.logs.mkdir(exist_ok=True)
    (bench.logs / "link").symlink_to(bench.folder / "teacher")
    bench.refuse(row, "a link", bench.search("link"), "is a link to")
    (bench.logs / "link").unlink()


@fault("F19", "YAML: tags, keys given twice or unknown, bombs, 50 MB, no mapping, NaN, numbers with an exponent")
def yaml(bench: Bench, row: Row) -> None:
    path = bench.folder / "a.yaml"
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{name}: &{name} [{','.join(9 * ['*' + below])}]\n" for below, name in zip("abcdefg", "bcdefgh", strict=True)
    )
    texts = {
        "tag": ("name: !!python/object/apply:os.getcwd []", "constructor"),
        "twice": ("name: a\nname: b", "given twice"),
        "unknown": ("teachr: x", "Did you mean 'teacher'?"),
        "bomb": (bomb, "aliases"),
        "50 MB": ("#" * 50_000_000, "characters"),
        "no mapping": ("- 1\n- 2", "config"),
        "NaN": ("search: {alpha: .nan}", "alpha"),
        "nothing": ("workers: null", "workers is null"),
        "itself": ("sampler: &a {class_path: x, init_args: *a}", "contains itself"),
        "exponent": ("recipe: {learning_rate: -1e-3}", "learning_rate is -0.001"),
    }
    path.touch()
    for what, (text, words) in texts.items():
        path.write_text(text)
        bench.refuse(row, what, ["search", f"--config={path}", "--teacher=x", "--text=y"], words)


@fault(
    "F20-F29", "texts: empty, blank, NUL, huge rows, no UTF-8, wrong columns and types, cut files, hardly a good row"
)
def texts(bench: Bench, row: Row) -> None:
    rows = bench.text.read_text().splitlines()
    lines = [json.dumps({"text": text}) for text in rows]
    files: dict[str, bytes] = {
        "empty.txt": b"",
        "empty.jsonl": b"",
        "blank.txt": b" \n\t\n\n" * 99,
        "blank.jsonl": b'{"text": " "}\n' * 99,
        "nul.txt": b"one\nt\0wo\n",
        "nul.jsonl": b'{"text": "one"}\n{"text": "t\\u0000wo"}\n',
        "latin.txt": b"one\ntwo\ncaf\xe9\n",
        "latin.jsonl": b'{"text": "one"}\n{"text": "caf\xe9"}\n',
        "column.jsonl": b'{"body": "one"}\n{"body": "two"}\n',
        "integer.jsonl": b'{"text": "one"}\n{"text": 7}\n',
        "list.jsonl": b'{"text": "one"}\n{"text": ["two"]}\n',
        "cut.jsonl": "\n".join(lines).encode()[:-5],
        "cut.parquet": b"PAR1 and no more",
        "hardly.txt": b"one\ntwo\n" + b"one\n" * 9_998,
        "hardly.jsonl": b'{"text": "one"}\n{"text": "two"}\n' + b'{"text": null}\n' * 9_998,
    }
    for name, content in files.items():
        path = bench.folder / name
        path.write_bytes(content)
        bench.refuse(row, name, bench.search(bench.new_name(), f"--text={path}"), name)
        path.unlink()
    path = bench.folder / "long.txt"
    path.write_text("\n".join([*rows, "long " * 200_000]))
    code, error = bench.call(bench.search(bench.new_name(), f"--text={path}", "--dry-run"))
    row.tried += 1
    row.fault("undetected", f"a row of 1 MB: {error}", code != 0)


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


@fault("F31", "files from next year, and a clock that steps back and forth by an hour while candidates train")
def clock(bench: Bench, row: Row) -> None:
    run, next_year = bench.logs / bench.reference, time.time() + 365 * 86400
    for path in [*run.rglob("*"), *(bench.folder / "states").rglob("*")]:
        os.utime(path, (next_year, next_year))
    (shard,) = (bench.folder / "states").rglob("*.bin")
    name = bench.new_name()
    for again in (bench.reference, name):
        code, error = bench.call(bench.search(again))
        row.tried += 1
        row.fault("undetected", error, code != 0)
    row.fault("unequal", "the states were stored again", abs(shard.stat().st_mtime - next_year) > 1)
    row.fault("unequal", name, bench.story(name) != bench.story(bench.reference))
    try:
        library = libfaketime()
    except NotRun as reason:
        return row.leave_out(reason)
    for _ in range(1 if bench.quick else 5):
        name, clock_file = bench.new_name(), bench.folder / "clock"
        clock_file.write_text("+0\n")
        fake = {"LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(clock_file), "FAKETIME_NO_CACHE": "1"}
        process = bench.start(bench.search(name), environment=fake | {"FAKETIME_DONT_FAKE_MONOTONIC": "1"})
        bench.wait_for_candidate(process, name)
        for step in itertools.cycle(("-3600\n", "+3600\n")):
            clock_file.write_text(step)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.7)
                break
        row.tried += 1
        bench.check(row, name, {}, process.communicate()[1])
        row.fault("undetected", "negative time", sum(t.user_attrs.get("seconds", 0) < 0 for t in bench.trials(name)))


@fault("F32", "an output folder that cannot be written to: told at the start")
def read_only(bench: Bench, row: Row) -> None:
    for what, option in (("run", "--root=/proc/kdnas"), ("states", "--states.folder=/proc/kdnas")):
        bench.refuse(row, what, bench.search(bench.new_name(), option), "Cannot write to")
    with tmpfs(bench.folder / "disk", "ro") as disk:
        bench.refuse(row, "disk", bench.search(bench.new_name(), f"--root={disk}"), "Read-only file system")


@fault("F33", "the same name with another teacher, space, seed, metric or length")
def other_config(bench: Bench, row: Row) -> None:
    with spoilt_teacher(bench) as teacher:
        options = ["--seed=1", "--space.num_hidden_layers=[1]", "--search.alpha=-0.1", "--data.max_length=16"]
        for option in [*options, f"--teacher={teacher}"]:
            bench.refuse(row, option, bench.search(bench.reference, option), " there, ")
    row.fault("lost", "the search", bench.story(bench.reference) == [])


@fault("F34", "a finished search again, two starts of a search at once, and (not in --quick) of a run")
def again(bench: Bench, row: Row) -> None:
    before = bench.story(bench.reference)
    for _ in range(2 if bench.quick else 20):
        code, error = bench.call(bench.search(bench.reference))
        row.tried += 1
        row.fault("undetected", error, code != 0)
        row.fault("unequal", "", bench.story(bench.reference) != before)
    bench.check(row, bench.reference, bench.acknowledged(bench.reference))
    for _ in range(1 if bench.quick else 20):
        name = bench.new_name()
        both = [bench.start(bench.search(name)) for _ in range(2)]
        errors = [process.communicate()[1] for process in both]
        row.tried += 1
        row.fault("undetected", errors, any(process.returncode for process in both))
        bench.check(row, name, {}, "".join(errors), one=False)
    for _ in range(0 if bench.quick else 3):
        name = bench.new_name()
        both = [bench.start(bench.job(name)) for _ in range(2)]
        errors = [process.communicate()[1] for process in both]
        row.tried += 1
        codes = sorted(process.returncode for process in both)
        told = "is being made by process" in "".join(errors)
        row.fault("undetected", f"{codes} {errors}", codes != [0, 2] or not told)
        bench.check(row, name, {}, "".join(errors))


@fault(
    "F35",
    "kill -9 again and again, each time when a start and a candidate could be done: each makes progress",
    quick=False,
)
def kill_again_and_again(bench: Bench, row: Row) -> None:
    name, num_trials = bench.new_name(), 6 if bench.quick else 20
    args = bench.search(name, f"--search.n_trials={num_trials}")
    start, known, seconds = time.monotonic(), 0, 0.0
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
        finished = len(bench.acknowledged(name))
        row.fault("lost", f"no progress after {finished} trials", finished <= known and process.returncode != 0)
        known = finished
        if process.returncode == 0 or time.monotonic() > start + 600:
            break
    row.fault("undetected", "it never ended", process.returncode != 0)
    row.fault("duplicated", f"{known} finished", abs(known - num_trials))
    row.fault("zombies", "running", sum(t.state.name in ("RUNNING", "WAITING") for t in bench.trials(name)))
    row.notes.append(f"killed every {seconds:.0f} s: {60 * known / (time.monotonic() - start):.1f} trials a minute")


# A worker of a study whose candidates take a moment; it writes down what it has finished.
SHORT = """
import sys, time
from kdnas.nas.search import open_study, search
from kdnas.nas.space import SearchSpace

url, path, n_trials, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
space = SearchSpace({
    "num_hidden_layers": list(range(1, 13)), "num_attention_heads": [1, 2], "hidden_size": [32, 64],
    "intermediate_size": [64, 128, 256, 512, 1024], "hidden_act": ["gelu", "relu"],
})

def evaluate(trial, arch):
    time.sleep(seconds)
    return arch.num_hidden_layers + arch.intermediate_size / 7

def note(study, trial):
    if trial.state.name == "COMPLETE":
        with open(path, "a") as file:
            file.write(f"{trial.number} {trial.value}\\n")

search(evaluate, space, open_study(url, "short", {}), n_trials, [note])
"""


def short_study(folder: Path) -> optuna.Study:
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder}/study.db", skip_table_creation=True)
    return optuna.load_study(study_name="short", storage=storage)


@fault("F37", "four workers on one SQLite study, 200 trials: exact counts", quick=False)
def four_workers(bench: Bench, row: Row) -> None:
    from kdnas.nas.record import trained

    folder, num_trials = bench.folder / "short", 40 if bench.quick else 200
    folder.mkdir()
    args = ["-c", SHORT, f"sqlite:///{folder}/study.db"]
    workers = [bench.start_program([*args, str(folder / str(i)), str(num_trials), "0.01"]) for i in range(4)]
    for worker in workers:
        _, error = worker.communicate()
        row.fault("undetected", error, worker.returncode != 0 or "Traceback" in error)
    study = short_study(folder)
    lines = [line.split() for path in folder.glob("[0-3]") for line in path.read_text().splitlines()]
    values = {t.number: t.value for t in study.trials if t.state.name == "COMPLETE"}
    row.tried = len(trained(study))
    row.fault("lost", "told, not stored", sum(values.get(int(n)) != float(value) for n, value in lines))
    row.fault("lost", "stored, not told", len(values.keys() - {int(n) for n, _ in lines}))
    row.fault("duplicated", f"{row.tried} trained", abs(row.tried - num_trials))
    row.fault("duplicated", "told twice", len(lines) - len({n for n, _ in lines}))
    numbers = [t.number for t in study.trials]
    row.fault("duplicated", "numbers", numbers != list(range(len(numbers))))
    row.fault("zombies", "running", sum(t.state.name == "RUNNING" for t in study.trials))
    row.fault("undetected", "only some of them worked", len(list(folder.glob("[0-3]"))) < 4)


@fault(
    "F38", "a worker that is stopped for an hour, by the database's clock, is alive: its trial is its own", quick=False
)
def slow_worker(bench: Bench, row: Row) -> None:
    folder = bench.folder / "slow"
    folder.mkdir()
    args = ["-c", SHORT, f"sqlite:///{folder}/study.db"]
    slow = bench.start_program([*args, str(folder / "slow.txt"), "8", "3"])
    while slow.poll() is None and not has(folder / "study.db", b"hidden_act"):
        time.sleep(0.1)
    time.sleep(1)
    slow.send_signal(signal.SIGSTOP)
    (mine,) = (t.number for t in short_study(folder).trials if t.state.name == "RUNNING")
    with sqlite3.connect(folder / "study.db", timeout=60) as database:
        database.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour')")
    quick = bench.start_program([*args, str(folder / "quick.txt"), "8", "0.1"])
    deadline = time.monotonic() + 300
    while quick.poll() is None and sum(t.state.is_finished() for t in short_study(folder).trials) < 7:
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    time.sleep(2)  # it waits for the last one, and looks whether its worker is alive
    states = {t.number: t.state.name for t in short_study(folder).trials}
    row.fault("undetected", f"trial {mine} was given up: {states}", states[mine] != "RUNNING")
    slow.send_signal(signal.SIGCONT)
    for process in (slow, quick):
        _, error = process.communicate()
        row.fault("undetected", error, process.returncode != 0 or "Traceback" in error)
    trials = short_study(folder).trials
    row.tried += 1
    row.fault("lost", states, trials[mine].state.name != "COMPLETE")
    row.fault("duplicated", states, abs(sum("twin_of" not in t.user_attrs for t in trials if t.value is not None) - 8))


NOT_HERE = {
    "F10": ("a torn line of the journal", "void: studies live in SQLite or PostgreSQL"),
}


def usage(bench: Bench, name: str, session: int) -> dict[str, float]:
    """What a search holds now: the largest process's memory, its open files, and bytes on the disk by kind."""
    megabytes, files = [0.0], [0]
    for folder in processes_of({session}):
        with suppress(OSError):
            megabytes.append(int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)
            files.append(len(list((folder / "fd").iterdir())))
    sizes = {"database": 0, "trials": 0, "other": 0}
    for path in (bench.logs / name).rglob("*"):
        with suppress(OSError):
            place = path.relative_to(bench.logs / name).parts[0]
            kind = "database" if place.startswith("study.db") else "trials" if place.startswith("trial") else "other"
            sizes[kind] += path.stat().st_size if path.is_file() else 0
    return {
        "megabytes": max(megabytes),
        "files": max(files),
        **{f"{kind}_kb": size / 1e3 for kind, size in sizes.items()},
    }


def soak(bench: Bench, row: Row, minutes: float, seconds: float = 120.0) -> list[dict[str, float]]:
    """Two workers search, and one of them, or all, are killed every two minutes: what grows, and is there progress?"""
    name, rounds = bench.new_name(), []
    sizes = "[" + ",".join(map(str, range(2, 65))) + "]"
    acts = "[gelu,relu,silu,tanh,gelu_new,quick_gelu,relu6,sigmoid,gelu_fast,mish,leaky_relu,linear,relu2,gelu_10]"
    space = [f"--space.intermediate_size={sizes}", f"--space.hidden_act={acts}", "--space.hidden_size=[16,32]"]
    args = bench.search(name, "--workers=2", "--search.n_trials=20000", "--sampler=random", *space)
    process, end, acknowledged = bench.start(args), time.monotonic() + 60 * minutes, {}
    while time.monotonic() < end:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)
            row.fault("undetected", f"the search ended by itself, exit {process.returncode}")
            break
        known, acknowledged = acknowledged, bench.acknowledged(name)
        row.fault("lost", "a trial changed", sum(acknowledged.get(n) != value for n, value in known.items()))
        row.fault("lost", f"no progress in round {len(rounds)}", len(acknowledged) == len(known))
        rounds.append({"trials": len(acknowledged), **usage(bench, name, process.pid)})
        print({key: round(value) for key, value in rounds[-1].items()}, flush=True)
        row.tried += 1
        if len(rounds) % 2:
            running = [t for t in bench.trials(name) if t.state.name == "RUNNING" and "pid" in t.user_attrs]
            with suppress(ProcessLookupError, IndexError):
                os.kill(bench.random.choice(running).user_attrs["pid"], signal.SIGKILL)
        else:
            error = kill_all(process)
            row.fault("undetected", error, "Traceback" in error)
            process = bench.start(args)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    _, error = process.communicate()
    row.fault("undetected", error, "Traceback" in error or process.returncode not in (0, 143))
    acknowledged, known = bench.acknowledged(name), acknowledged
    row.fault("lost", "a trial changed", sum(acknowledged.get(n) != value for n, value in known.items()))
    numbers = [t.number for t in bench.trials(name)]
    row.fault("duplicated", "numbers", numbers != list(range(len(numbers))))
    row.fault("zombies", "running", sum(t.state.name == "RUNNING" for t in bench.trials(name)))
    bench.check_processes(row, name)
    if len(rounds) > 1:
        first, last = rounds[0], rounds[-1]
        # A trial in memory is some kilobytes: parameters, attributes, the history of its epochs.
        # A line of the table, what a worker tells of it, and its points in TensorBoard are a kilobyte or two.
        num_trials = last["trials"] - first["trials"]
        allowed = {"megabytes": 64 + 0.05 * num_trials, "files": 8, "other_kb": 1000 + 2 * num_trials}
        for key, more in allowed.items():
            row.fault("undetected", f"{key}: {first[key]:.0f} to {last[key]:.0f}", last[key] > first[key] + more)
    return rounds


def main(args: Sequence[str] | None = None) -> int:
    """Run the faults, print a table, and write JSON after each of them; the exit code is 1 where one is bad."""
    parser = argparse.ArgumentParser(prog="faults.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--quick", action="store_true", help="those without servers and many kills, in under four minutes"
    )
    parser.add_argument("--only", default="", help="ids, separated by commas")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="two workers for so long, killed every 2 minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the instants at which is killed")
    parser.add_argument("--json", type=Path, default=OUTPUT / "faults.json", help="where the figures go")
    options = parser.parse_args(args)
    wanted = [name for name in options.only.split(",") if name]
    if unknown := set(wanted) - FAULTS.keys() - NOT_HERE.keys():
        parser.error(f"no such fault: {', '.join(sorted(unknown))}; choose from {', '.join([*FAULTS, *NOT_HERE])}")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = [Row(name, what, not_run=why) for name, (what, why) in NOT_HERE.items() if not wanted or name in wanted]
    more: dict[str, Any] = {}
    if options.soak:
        wanted, rows = ["soak"], [Row("soak", f"two workers for {options.soak:g} minutes, killed every two")]
    started = time.monotonic()

    def write() -> None:
        seconds = time.monotonic() - started
        figures = {"seed": options.seed, "seconds": seconds, "quick": options.quick, "machine": machine()}
        write_json(options.json, figures | more | {"rows": [asdict(row) for row in rows]})

    with tempfile.TemporaryDirectory(prefix="kdnas-faults-") as folder:
        bench = Bench(Path(folder), options.quick, options.seed)
        if options.soak:
            more["rounds"] = soak(bench, rows[0], options.soak)
        for name, (what, quick, function) in FAULTS.items():
            if (wanted and name not in wanted) or (options.quick and not quick and not wanted):
                continue
            row, begun = Row(name, what), time.monotonic()
            try:
                function(bench, row)
            except NotRun as reason:
                row.not_run = str(reason)
            except subprocess.CalledProcessError as error:
                row.not_run = f"{' '.join(map(str, error.cmd))}: {error.stderr!r}"
            except Exception as error:  # of the benchmark itself, or let through by what it calls
                row.fault("undetected", f"{type(error).__name__}: {error}")
            rows.append(row)
            write()
            print(
                f"{name}: {'BAD' if row.is_bad() else row.not_run or 'ok'}, {time.monotonic() - begun:.0f} s",
                flush=True,
            )
    rows.sort(key=lambda row: row.id)
    seconds = time.monotonic() - started
    columns = ("id", "tried", "lost", "duplicated", "executed", "undetected", "zombies", "unequal", "worst_wait_s")
    table = Table(*columns, "what", title=f"seed {options.seed}, {seconds:.0f} s")
    for row in rows:
        figures = [f"{value:.1f}" if isinstance(value, float) else str(value) for value in map(vars(row).get, columns)]
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
