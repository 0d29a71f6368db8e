"""The one engine: jobs, each a function of plain data that leaves its result as a file.

A job is done when ``result.json`` is in its folder. Beside it lie ``job.log``, what it printed;
``progress.json``, how far it is; and ``stop``, by which it is asked to end.
"""

import errno
import gc
import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, TimeoutError
from concurrent.futures import wait as wait_for_futures
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pebble import ProcessPool

from kdnas.system.errors import CandidateFailed, UserError, as_raised, is_memory, reason_of
from kdnas.system.files import read_json, write_json
from kdnas.system.signals import TERMINATIONS, die_with_parent, notice_signals

log = logging.getLogger("kdnas")

# Seconds between two looks at what runs.
LOOK_SECONDS = 0.1
# Seconds that a job has for its end, after which it is killed: of the ten that a signal gives.
STOP_SECONDS = 5.0
# Of the disk, which is no fault of the job's.
DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.ESTALE,
    errno.EACCES,
    errno.EPERM,
}


class Stopped(Exception):
    """A job has ended because it was asked to."""


# What executors raise where the process of a job has died: pebble's, the standard one's, Dask's.
DEATHS = ("ProcessExpired", "BrokenProcessPool", "KilledWorker")


class JobDied(RuntimeError):
    """The process of a job has died."""


@dataclass(frozen=True)
class Job:
    """A piece of work that is done once.

    Args:
        folder: takes ``result.json``, and all that the job writes.
        title: what it is called on the screen.
        call: a module's function, which returns plain data for ``result.json``.
        args: of the call; they go through ``pickle`` to a process of ours.
        timeout: seconds that it may take in a process of this machine; None: no limit.
    """

    folder: Path
    title: str
    call: Callable[..., dict[str, Any]]
    args: tuple[Any, ...] = ()
    timeout: float | None = None

    @property
    def result_file(self) -> Path:
        """Where its result is, once it is done."""
        return self.folder / "result.json"

    @property
    def is_done(self) -> bool:
        """Whether its result is there."""
        return self.result_file.is_file()


class Reporter:
    """What a job says of itself while it runs, and what it is asked.

    Args:
        folder: of the job.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._told = 0.0
        self._known: dict[str, Any] = {}

    def tell(self, at_once: bool = False, **known: Any) -> None:
        """Write down how far the job is, at most twice a second unless ``at_once``."""
        self._known |= known
        if at_once or time.monotonic() > self._told + 0.5:
            self._told = time.monotonic()
            temporary = self.folder / ".progress.json"  # no part is ever read; it need not survive
            temporary.write_text(json.dumps(self._known))
            os.replace(temporary, self.folder / "progress.json")

    @property
    def is_asked_to_stop(self) -> bool:
        return (self.folder / "stop").exists()

    def stop_if_asked(self) -> None:
        """End the job if it is asked to.

        Raises:
            Stopped: it is.
        """
        if self.is_asked_to_stop:
            raise Stopped

    def may_go_on(self, step: int) -> bool:
        """Wait for the answer to what was reported for a step; False: the job is to end there."""
        while not (self.folder / f"go_on_{step}").exists():
            if (self.folder / f"prune_{step}").exists():
                return False
            self.stop_if_asked()
            time.sleep(LOOK_SECONDS / 2)
        return True


def progress_of(folder: Path) -> dict[str, Any]:
    """What a job has last told; empty before that."""
    try:
        return dict(json.loads((folder / "progress.json").read_text()))
    except (OSError, ValueError):
        return {}


def is_disk_failure(error: BaseException) -> bool:
    """Whether an error is the disk's or the network's, which no other candidate would escape."""
    if not isinstance(error, OSError):
        return False
    return error.errno in DISK_ERRORS or (error.errno is None and str(error).startswith("Caught "))


class Engine:
    """Runs jobs in slots, and gives each back when its result is there.

    With ``num_slots`` 0 a job runs in a thread of this process, one at a time: for a debugger, a
    notebook, a test. Else each slot is a process with its share of the cores and one GPU. One that
    dies is replaced, and its job is tried once more. ``executor`` takes the place of these
    processes: anything with ``submit``, such as Dask's, on a folder that its workers share.

    Args:
        num_slots: jobs at a time.
        executor: where jobs run instead, ``num_slots`` at a time.
        close: called when the engine is done with it.
    """

    def __init__(
        self,
        num_slots: int = 0,
        executor: Executor | None = None,
        close: Callable[[], object] | None = None,
    ) -> None:
        self.num_slots, self.executor, self._close = max(1, num_slots), executor, close
        self._in_processes = num_slots > 0 and executor is None
        self._pool: Any = None
        self._running: dict[Future[Any], Job] = {}
        self._died: set[Path] = set()  # folders of jobs whose first process died

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.stop()

    @property
    def jobs(self) -> list[Job]:
        """What runs now."""
        return list(self._running.values())

    @property
    def has_room(self) -> bool:
        """Whether a slot is free."""
        return len(self._running) < self.num_slots

    def start(self, job: Job) -> None:
        """Begin a job; one that was stopped before goes on from what it has kept."""
        job.folder.mkdir(parents=True, exist_ok=True)
        _tidy(job)
        self._running[self._submit(job)] = job

    def _submit(self, job: Job) -> "Future[Any]":
        if self._in_processes:
            self._drop_broken_pool()
            self._pool = self._pool or _make_pool(self.num_slots)
            args = (job, log.getEffectiveLevel())
            return self._pool.schedule(_run_in_process, args=args, timeout=job.timeout)
        if self.executor is not None:
            return self.executor.submit(_run, job)
        self._pool = self._pool or ThreadPoolExecutor(1, "job")
        return self._pool.submit(_run, job)

    def wait(self) -> list[tuple[Job, BaseException | None]]:
        """Look for a moment, and give the jobs that have ended, each with what it died of.

        Raises:
            OSError: the disk or the network has failed.
            CandidateFailed: processes die before they begin a job.
        """
        notice_signals()
        done, _ = wait_for_futures(self._running, LOOK_SECONDS, FIRST_COMPLETED)
        ended = []
        for future in done:
            job, error = self._running.pop(future), future.exception()
            if type(error).__name__ in DEATHS:
                error = JobDied(_death(error))
            if isinstance(error, JobDied) and job.folder not in self._died:
                log.warning("%s: %s; it is tried again.", job.title, error)
                self._died.add(job.folder)
                self._running[self._submit(job)] = job
                continue
            if isinstance(error, JobDied):
                error = CandidateFailed(f"{error}, twice")
            elif isinstance(error, TimeoutError):
                error = CandidateFailed(f"it took longer than {(job.timeout or 0) / 60:g} minutes")
            if error is not None and is_disk_failure(error):
                raise error
            if error is None:
                _tidy(job)
            ended.append((job, error))
        return ended

    def run(
        self,
        jobs: Sequence[Job],
        watch: Callable[[Sequence[Job]], object] = lambda jobs: None,
        ended: Callable[[Job], object] = lambda job: None,
        failed: Callable[[Job, BaseException], object] | None = None,
    ) -> list[dict[str, Any]]:
        """Do what of some jobs is not done, as many at a time as there are slots.

        Args:
            jobs: in the order in which they are begun.
            watch: called with what runs, after each look.
            ended: called with each job whose result is there, also from an earlier start.
            failed: called with a job that failed, and what of: it writes a result. By default the
                first failure is raised.

        Returns:
            The result of each.

        Raises:
            Exception: what a job failed of.
        """
        waiting = []
        for job in jobs:
            if job.is_done:
                ended(job)
            else:
                waiting.append(job)
        while waiting or self._running:
            while waiting and self.has_room:
                self.start(waiting.pop(0))
            for job, error in self.wait():
                if error is not None and failed is None:
                    raise error
                if error is not None and failed is not None:
                    failed(job, error)
                ended(job)
            watch(self.jobs)
        return [dict(read_json(job.result_file)) for job in jobs]

    def stop(self) -> None:
        """End what runs: each job is asked to, and killed after ``STOP_SECONDS``."""
        try:
            for job in self._running.values():
                with suppress(OSError):
                    (job.folder / "stop").touch()
            wait_for_futures(self._running, STOP_SECONDS)
        finally:
            self._running.clear()
            if self._in_processes and self._pool is not None:
                self._pool.stop()
                self._pool.join()
            elif self._pool is not None:
                self._pool.shutdown()
            self._pool = None
            if self._close is not None:
                self._close()

    def _drop_broken_pool(self) -> None:
        """A process that dies between two jobs breaks its pool."""
        if self._pool is not None and not self._pool.active:
            self._pool.stop()
            self._pool = None


def _tidy(job: Job) -> None:
    """Remove what was said while a job ran, or in a start before this."""
    for pattern in ("stop", "progress.json", "go_on_*", "prune_*"):
        for old in job.folder.glob(pattern):
            old.unlink()


def _death(error: BaseException | None) -> str:
    code = getattr(error, "exitcode", None)
    if code is None or code >= 0:
        return f"its process died ({f'exit code {code}' if code is not None else error})"
    memory = ", perhaps out of memory" if -code == signal.SIGKILL else ""
    return f"its process died ({signal.Signals(-code).name}{memory})"


def _run(job: Job) -> None:
    """Do a job, and write its result down; what else it raises than we know becomes plain text."""
    try:
        write_json(job.result_file, job.call(*job.args))
    except (Stopped, UserError, CandidateFailed, KeyboardInterrupt):
        raise
    except OSError as error:
        plain = as_raised(error)
        raise OSError(plain.errno, plain.strerror or str(plain), plain.filename) from None
    except Exception as error:
        log.debug("where it was found:", exc_info=error)
        failure = CandidateFailed(reason_of(error))
        if is_memory(error):  # its frames hold what memory there is
            traceback.clear_frames(error.__traceback__)
        raise failure from None


# --- What follows runs in the processes of the pool, or starts them.

_at_work: list[Path] = []  # the folder of the job that this process is at


def warm_up(module: str | None = None) -> None:
    """Start the process that the pool's are forked from; with a module, it imports that first.

    It hears no signals, and neither do those that it forks: a terminal's or a scheduler's go to a
    whole group, and this process alone decides what they mean.
    """
    known = signal.pthread_sigmask(signal.SIG_BLOCK, TERMINATIONS)
    try:
        if module is not None:
            forkserver.set_forkserver_preload([module])
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, known)


def _make_pool(num_slots: int) -> Any:
    warm_up()
    slots = Path(tempfile.mkdtemp(prefix="kdnas-slots-"))
    initargs = (num_slots, slots, dict(os.environ), num_threads(num_slots))
    context = multiprocessing.get_context("forkserver")
    return ProcessPool(num_slots, initializer=_begin, initargs=initargs, context=context)


def num_threads(num_slots: int) -> int:
    """A slot's share of the cores that this process may use, and of the threads it is allowed."""
    import torch

    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, min(cores, torch.get_num_threads()) // num_slots)


def _begin(num_slots: int, slots: Path, environment: dict[str, str], threads: int) -> None:
    """Prepare a process of the pool: it ends with its parent, and has one slot's devices."""
    import torch

    die_with_parent()
    signal.signal(signal.SIGTERM, _end_unless_at_work)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TERMINATIONS)
    for number in (signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.environ.update(environment, OMP_NUM_THREADS=str(threads))
    torch.set_num_threads(threads)
    gc.freeze()  # imports made half a million objects that stay
    devices = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    devices = devices or [str(place) for place in range(torch.cuda.device_count())]
    if len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[_take_slot(num_slots, slots) % len(devices)]
    logging.basicConfig(format="%(message)s", stream=sys.stderr)


def _take_slot(num_slots: int, slots: Path) -> int:
    """The first slot that no living process has; it is ours until we end."""
    for slot in range(num_slots):
        lock = FileLock(slots / f"{slot}.lock")
        with suppress(Timeout):
            lock.acquire(blocking=False)
            _taken.append(lock)
            return slot
    return 0


_taken: list[FileLock] = []


def _end_unless_at_work(number: int, frame: Any) -> None:
    """SIGTERM of a whole group is not for us; that of the pool comes when we are asked to stop."""
    if not _at_work or (_at_work[0] / "stop").exists():
        os._exit(0)


def _run_in_process(job: Job, level: int) -> None:
    log.setLevel(level)
    _at_work[:] = [job.folder]
    try:
        with _output_into(job.folder / "job.log"):
            _run(job)
    finally:
        _at_work.clear()


@contextmanager
def _output_into(path: Path) -> Iterator[None]:
    """Have a file take what this process prints, also what native code does."""
    kept = [os.dup(stream) for stream in (1, 2)]
    with path.open("a", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        try:
            yield
        finally:
            for output in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    output.flush()
            for stream, known in zip((1, 2), kept, strict=True):
                os.dup2(known, stream)
                os.close(known)
    with suppress(OSError):
        if path.stat().st_size == 0:
            path.unlink()
