"""What kdnas survives: faults that are made on purpose, one a row, and a checker after each.

A row counts what was tried, and what went wrong: acknowledged trials that are ``lost`` (or altered), trials that are
``duplicated`` or beyond what was asked, payloads ``executed``, faults ``undetected`` (taken without a word, told
with a traceback, or half made), ``zombies`` (trials that run, processes, locks or temporary files that are left), and
searches that end ``unequal`` to an unbroken one: all should be 0. ``worst_wait_s`` is the longest wait.

    python benchmarks/faults.py --quick                  without servers and many kills, in under four minutes
    python benchmarks/faults.py --only F01,F13           some of them, as often as in the whole run
"""

import argparse
import io
import json
import logging
import os
import random
import shutil
import signal
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
from filelock import FileLock
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

    def is_bad(self) -> bool:
        return any((self.lost, self.duplicated, self.executed, self.undetected, self.zombies, self.unequal))

    def fault(self, kind: str, note: object, count: int = 1) -> None:
        if count:
            setattr(self, kind, getattr(self, kind) + count)
            self.notes.append(f"{kind}: {str(note)[-300:]}")


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
        self.teacher, self.text = folder / "teacher", folder / "rows.txt"
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
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        program = [sys.executable, "-W", "ignore", "-m", "kdnas", *args]
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

    def check(self, row: Row, name: str, acknowledged: dict[int, float], error: str = "", one: bool = True) -> None:
        """I1 to I8 after a search of one worker, or of several, has ended, however often it was broken off."""
        trials = self.trials(name)
        values = {t.number: t.value for t in trials if t.state.name == "COMPLETE"}
        lost = [number for number, value in acknowledged.items() if values.get(number) != value]
        row.fault("lost", f"trials {lost}", len(lost))  # I1
        counted = [t for t in trials if t.state.name == "COMPLETE" and "twin_of" not in t.user_attrs]
        numbers = [t.number for t in trials]
        row.fault("duplicated", f"{numbers}", len(numbers) - len(set(numbers)))  # I2
        row.fault("duplicated", f"{len(counted)} trained", abs(len(counted) - N_TRIALS))
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
        mine = f"--name={name}\0".encode()
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                row.fault("zombies", f"process {path.parent.name}", mine in path.read_bytes() + b"\0")
        with FileLock(self.logs / name / "check.lock", timeout=1):
            (self.logs / name / "check.lock").unlink(missing_ok=True)


FAULTS: dict[str, tuple[str, bool, Callable[[Bench, Row], None]]] = {}


def fault(name: str, what: str, quick: bool = True) -> Callable[[Any], Any]:
    """Put a function into the table of faults."""

    def put(function: Callable[[Bench, Row], None]) -> Callable[[Bench, Row], None]:
        FAULTS[name] = what, quick, function
        return function

    return put


def broken_search(bench: Bench, row: Row, times: int, stop: Callable[[subprocess.Popen[str], float], None]) -> None:
    """Break a search off at a random instant so many times, and let it end; then check."""
    bench.reference  # noqa: B018 (made before the clock starts)
    start = time.monotonic()
    process = bench.start(bench.search(bench.new_name()))
    process.communicate()
    whole = time.monotonic() - start
    for _ in range(times):
        name, acknowledged = bench.new_name(), {}
        process = bench.start(bench.search(name))
        stop(process, bench.random.uniform(0.3, 1.0) * whole)
        acknowledged = {t.number: t.value for t in bench.trials(name) if t.state.name == "COMPLETE"}
        process = bench.start(bench.search(name))
        _, error = process.communicate()
        row.tried += 1
        bench.check(row, name, acknowledged, error)


@fault("F01", "kill -9 of a search and its process group, at a random instant")
def kill(bench: Bench, row: Row) -> None:
    def stop(process: subprocess.Popen[str], seconds: float) -> None:
        time.sleep(seconds)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    broken_search(bench, row, 2 if bench.quick else 50, stop)


@fault("F02", "kill -9 of one of two workers; the other goes on, and a third takes its place", quick=False)
def kill_worker(bench: Bench, row: Row) -> None:
    for _ in range(3 if bench.quick else 50):
        name = bench.new_name()
        process = bench.start(bench.search(name, "--workers=2"))
        while process.poll() is None and not any("arch" in t.user_attrs for t in bench.trials(name)):
            time.sleep(0.2)
        time.sleep(bench.random.uniform(0, 2))
        pids = [t.user_attrs["pid"] for t in bench.trials(name) if t.state.name == "RUNNING" and "pid" in t.user_attrs]
        with suppress(ProcessLookupError, IndexError):
            os.kill(bench.random.choice(pids), signal.SIGKILL)
        acknowledged = {t.number: t.value for t in bench.trials(name) if t.state.name == "COMPLETE"}
        _, error = process.communicate()
        row.tried += 1
        bench.check(row, name, acknowledged, error, one=False)


@fault("F04", "SIGTERM, SIGINT and SIGUSR1: exit code, time, and the trial is not left running")
def signals(bench: Bench, row: Row) -> None:
    codes = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143}
    for number in list(codes) * (1 if bench.quick else 10):
        name = bench.new_name()
        process = bench.start(bench.search(name, "--search.num_epochs=100000"))
        while process.poll() is None and not any("arch" in t.user_attrs for t in bench.trials(name)):
            time.sleep(0.2)
        time.sleep(bench.random.uniform(0, 2))
        start = time.monotonic()
        os.killpg(process.pid, number)
        try:
            _, error = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            _, error = process.communicate()
        row.tried += 1
        row.worst_wait_s = max(row.worst_wait_s, time.monotonic() - start)
        row.fault("undetected", f"{process.returncode} {error}", process.returncode != codes[number])
        row.fault("undetected", error, "Traceback" in error)
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


@fault("F12", "candidates that take more memory than RLIMIT_AS leaves (a cgroup's killer: as F02, SIGKILL)")
def memory(bench: Bench, row: Row) -> None:
    import resource

    from kdnas.nas.search import failure_of, open_study, search
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


class NotRun(Exception):
    """A fault that cannot be made here, and why."""


def outage(bench: Bench, row: Row, pauses: Sequence[float], cut: bool) -> None:
    """Searches on a PostgreSQL server of their own that goes away, or cuts its connections."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        raise NotRun("needs Debian's package postgresql")
    import threading

    from kdnas.nas.search import open_study, search, trained
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
            time.sleep(seconds)
            call(*server, "start")

    try:
        for seconds in pauses:
            name = bench.new_name()
            evaluated.clear()
            study = open_study(f"postgresql://kdnas@/postgres?host={folder}", name, {}, folder=bench.folder)
            thread = threading.Thread(target=disturb, args=(seconds,))
            thread.start()
            search(evaluate, space, study, 15, folder=bench.folder)
            thread.join()
            row.tried += 1
            row.fault("lost", name, len(set(evaluated)) - len(trained(study)))
            row.fault("duplicated", name, len(evaluated) - len(set(evaluated)))
            row.fault("zombies", name, sum(t.state.name in ("RUNNING", "WAITING") for t in study.trials))
    finally:
        call("pg_ctl", "--mode=immediate", f"--pgdata={folder}/data", "stop")
        shutil.rmtree(folder)


@fault("F13", "PostgreSQL stopped in a search, for 5 s and for 60 s (for ever: tests/test_storage.py)", quick=False)
def server_stopped(bench: Bench, row: Row) -> None:
    outage(bench, row, [5.0] if bench.quick else [5.0] * 10 + [60.0] * 10, cut=False)


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


@fault("F31", "files from next year (a clock that steps back within a trial: not run, libfaketime is not here)")
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


@fault("F34", "a finished search again: nothing is done, and its files stay")
def again(bench: Bench, row: Row) -> None:
    before = bench.story(bench.reference)
    for _ in range(2 if bench.quick else 20):
        code, error = bench.call(bench.search(bench.reference))
        row.tried += 1
        row.fault("undetected", error, code != 0)
        row.fault("unequal", "", bench.story(bench.reference) != before)
    acknowledged = {t.number: t.value for t in bench.trials(bench.reference) if t.state.name == "COMPLETE"}
    bench.check(row, bench.reference, acknowledged)


NOT_HERE = {
    "F03": ("kill -9 in each stage of a run", "not written; tests/test_pipeline.py interrupts each stage"),
    "F07": (
        "the N-th system call fails",
        "not written; tests/test_cache.py and tests/test_runs.py let single writes fail",
    ),
    "F09": ("two builders of one cache, one killed", "made by tests/test_cache.py, with processes and kills"),
    "F10": ("a torn line of the journal", "void: studies live in SQLite or PostgreSQL"),
    "F35": ("a kill every 2 s for 2 minutes", "not written; a start of the command takes longer than 2 s"),
}


def main(args: Sequence[str] | None = None) -> None:
    """Run the faults, print a table, and write JSON."""
    parser = argparse.ArgumentParser(prog="faults.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--quick", action="store_true", help="those without servers and many kills, in under four minutes"
    )
    parser.add_argument("--only", default="", help="ids, separated by commas")
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
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kdnas-faults-") as folder:
        bench = Bench(Path(folder), options.quick, options.seed)
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
            rows.append(row)
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
    figures = {"seed": options.seed, "seconds": seconds, "quick": options.quick, "machine": machine()}
    write_json(options.json, figures | {"rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
