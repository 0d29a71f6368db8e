"""Servers of their own: PostgreSQL, and a Dask scheduler with workers."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.checks import kill_all
from tests.faults.harness import Bench, NotRun


@dataclass
class Postgres:
    """A PostgreSQL server that listens to nobody else."""

    programs: Path
    folder: Path
    account: dict[str, Any]  # the server refuses to be root's

    @property
    def url(self) -> str:
        return f"postgresql://kdnas@/postgres?host={self.folder}"

    def call(self, program: str, *options: str) -> str:
        command = [self.programs / program, *options]
        output = subprocess.DEVNULL if program == "pg_ctl" else subprocess.PIPE  # a server keeps it
        done = subprocess.run(
            command, check=True, stdout=output, stderr=subprocess.DEVNULL, text=True, **self.account
        )
        return done.stdout or ""

    def start(self) -> None:
        options = f"--options=-k {self.folder} -c listen_addresses='' -c fsync=off"
        files = f"--pgdata={self.folder}/data", f"--log={self.folder}/log"
        self.call("pg_ctl", "--wait", *files, options, "start")

    def stop(self) -> None:
        self.call("pg_ctl", "--mode=immediate", f"--pgdata={self.folder}/data", "stop")

    def cut(self) -> int:
        """Cut all connections, also idle ones; how many there were."""
        sql = "select pg_terminate_backend(pid) from pg_stat_activity"
        sql += " where pid <> pg_backend_pid() and backend_type = 'client backend'"
        who = f"--host={self.folder}", "--username=kdnas", "--dbname=postgres"
        return self.call("psql", *who, "-tA", f"--command={sql}").count("t")


@contextmanager
def postgres() -> Iterator[Postgres]:
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        raise NotRun("needs Debian's package postgresql")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    account = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
    server = Postgres(programs[-1], folder, account)
    if account:
        shutil.chown(folder, **account)
    server.call(
        "initdb", "--no-sync", "--auth=trust", "--username=kdnas", f"--pgdata={folder}/data"
    )
    server.start()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


@dataclass
class Dask:
    """A scheduler and two workers, each a process of its own."""

    url: str
    scheduler: subprocess.Popen[str]
    workers: list[subprocess.Popen[str]]


@contextmanager
def dask(bench: Bench) -> Iterator[Dask]:
    file = bench.folder / "scheduler.json"
    program, where = ("-m", "dask"), f"--scheduler-file={file}"
    local = "--host=127.0.0.1", "--no-dashboard"
    scheduler = bench.start(["scheduler", *local, "--port=0", where], program)
    end = time.monotonic() + 60
    while not file.exists():
        if scheduler.poll() is not None or time.monotonic() > end:
            raise NotRun(f"needs Dask: {kill_all(scheduler)[-300:]}")
        time.sleep(0.1)
    options = ["worker", where, "--host=127.0.0.1", "--nthreads=1", "--no-nanny", "--no-dashboard"]
    workers = [bench.start(options, program) for _ in range(2)]
    url = json.loads(file.read_text())["address"].replace("tcp", "dask")
    try:
        yield Dask(url, scheduler, workers)
    finally:
        for process in (*workers, scheduler):
            with suppress(ProcessLookupError):
                kill_all(process)
        file.unlink()
