"""Engine: runs jobs (function calls with results in files) in parallel, and reports their ends."""

import logging
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    CancelledError,
    Executor,
    Future,
    ThreadPoolExecutor,
    TimeoutError,
)
from concurrent.futures import wait as wait_for_futures
from contextlib import suppress
from pathlib import Path
from typing import Any

from kdnas.system.errors import CandidateFailed, is_memory
from kdnas.system.files import read_json
from kdnas.system.jobs import LOOK_SECONDS, Job, is_disk_failure, run_job, tidy
from kdnas.system.pool import DEVICE_FAILED, make_pool, num_threads, run_in_process
from kdnas.system.signals import notice_signals

log = logging.getLogger("kdnas")

# Seconds in which a job must end after it was asked to stop; then it is killed. Whoever sends this
# process a signal may kill it ten seconds later.
STOP_SECONDS = 5.0
# Errors by which executors say that a job's process has died: pebble, concurrent.futures, Dask.
DEATHS = ("ProcessExpired", "BrokenProcessPool", "KilledWorker")


class JobDied(RuntimeError):
    """The process of a job has died."""


class Engine:
    """Runs jobs in parallel, in processes of this machine or in an executor such as Dask.

    A job is a function call whose result is a file (``kdnas.system.jobs``). On this machine each
    slot is a process with its share of the cores and, if there are GPUs, one GPU. With
    ``num_slots`` 0, jobs run one at a time in a thread of this process, for debuggers, notebooks
    and tests.

    If the process of a job dies, the job is retried once in a new process. A job that ran out of
    memory beside other jobs is retried once alone.

    Args:
        num_slots: number of jobs that run at a time.
        executor: executor in which the jobs run, with the interface of ``concurrent.futures``, such
            as Dask's. Its workers must be able to write to the jobs' folders. None: jobs run in
            processes of this machine.
        close: called when the engine stops, to close the executor; None: nothing to close.
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
        self._crowded: set[Path] = set()  # folders of jobs that ran out of memory beside others
        self._alone: list[Job] = []  # jobs that ran out of memory, and wait until nothing else runs
        self._threads: dict[Path, str] = {}  # number of threads that each job was last told
        self._width = self.num_slots  # number of processes; fewer than slots if jobs are fewer

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.stop()

    @property
    def jobs(self) -> list[Job]:
        """Jobs that are running, or that wait to be retried alone."""
        return [*self._running.values(), *self._alone]

    @property
    def has_room(self) -> bool:
        """Whether another job can start: a slot is free, and no job waits to be retried alone."""
        is_alone = any(job.folder in self._crowded for job in self.jobs)
        return len(self._running) < self.num_slots and not is_alone

    def start(self, job: Job) -> None:
        """Start a job; if it was stopped before and has a checkpoint, it resumes from there."""
        job.folder.mkdir(parents=True, exist_ok=True)
        tidy(job)
        self._threads.pop(job.folder, None)
        self._running[self._submit(job)] = job

    def _submit(self, job: Job) -> "Future[Any]":
        if self._in_processes:
            self._drop_broken_pool()
            self._pool = self._pool or make_pool(self._width)
            args = (job, log.getEffectiveLevel())
            return self._pool.schedule(run_in_process, args=args, timeout=job.timeout)
        if self.executor is not None:
            return self.executor.submit(run_job, job)
        self._pool = self._pool or ThreadPoolExecutor(1, "job")
        return self._pool.submit(run_job, job)

    def wait(self) -> list[tuple[Job, BaseException | None]]:
        """Wait until a running job ends, but at most ``LOOK_SECONDS``.

        Returns:
            The jobs that have ended, each with its error, or None if it succeeded. Jobs that are
            retried have not ended.

        Raises:
            OSError: a job failed because of the disk or the network, so other jobs would fail too.
            KeyboardInterrupt: a signal has asked this process to end.
        """
        notice_signals()
        if self._alone and not self._running:
            self.start(self._alone.pop(0))
        self._share_threads()
        done, _ = wait_for_futures(self._running, LOOK_SECONDS, FIRST_COMPLETED)
        ended, has_others = [], len(self._running) > 1
        for future in done:
            job, error = self._running.pop(future), self._error_of(future)
            if isinstance(error, JobDied) and job.folder not in self._died:
                log.warning("%s: %s; it is tried again.", job.title, error)
                self._died.add(job.folder)
                self._running[self._submit(job)] = job
            elif has_others and _is_memory(error) and job.folder not in self._crowded:
                log.warning("%s: %s; it is tried again alone.", job.title, error)
                self._crowded.add(job.folder)
                self._alone.append(job)
            else:
                self._crowded.discard(job.folder)
                ended.append((job, _verdict(job, error)))
        return ended

    def _error_of(self, future: "Future[Any]") -> BaseException | None:
        try:
            error = future.exception()
        except CancelledError:  # we cancel nothing: Dask does when its scheduler is gone
            raise OSError(
                "the executor's scheduler has stopped, so its running jobs are lost: start the "
                "scheduler again"
            ) from None
        return JobDied(_death(error)) if type(error).__name__ in DEATHS else error

    def run(
        self,
        jobs: Sequence[Job],
        watch: Callable[[Sequence[Job]], object] = lambda jobs: None,
        ended: Callable[[Job], object] = lambda job: None,
        failed: Callable[[Job, BaseException], object] | None = None,
    ) -> list[dict[str, Any]]:
        """Run those of the jobs that have no result yet, and wait until all are done.

        Args:
            jobs: jobs, in the order in which to start them.
            watch: called with the running jobs, several times a second.
            ended: called with each job when it has a result, also if it had one before this call.
            failed: called with each job that failed, and with the job's error. It must write the
                job's result. None: the first error is raised.

        Returns:
            The result of each job, in the order of ``jobs``.

        Raises:
            Exception: the error of a job, if ``failed`` is None.
        """
        waiting = []
        for job in jobs:
            if job.is_done:
                ended(job)
            else:
                waiting.append(job)
        self._renew(min(self.num_slots, max(1, len(waiting))))
        while waiting or self.jobs:
            while waiting and self.has_room:
                self.start(waiting.pop(0))
            for job, error in self.wait():
                if error is not None and failed is None:
                    raise error
                if error is not None and failed is not None:
                    failed(job, error)
                ended(job)
            watch(self.jobs)
        self._width = self.num_slots
        return [dict(read_json(job.result_file)) for job in jobs]

    def stop(self) -> None:
        """Ask all running jobs to stop, and kill those that still run after ``STOP_SECONDS``."""
        try:
            for job in self._running.values():
                with suppress(OSError):
                    (job.folder / "stop").touch()
            wait_for_futures(self._running, STOP_SECONDS)
        finally:
            self._running.clear()
            self._alone.clear()
            if self._in_processes and self._pool is not None:
                self._pool.stop()
                self._pool.join()
            elif self._pool is not None:
                self._pool.shutdown()
            self._pool = None
            if self._close is not None:
                self._close()

    def _renew(self, width: int) -> None:
        """Replace the pool's processes by ``width`` new ones, which frees memory."""
        if self._in_processes and self._pool is not None:
            self._pool.close()
            self._pool.join()
            self._pool = None
        self._width = width

    def _share_threads(self) -> None:
        """Tell each running job how many threads it may use: more when fewer jobs run."""
        each = str(num_threads(max(1, min(len(self._running), self._width))))
        for job in self._running.values():
            if self._in_processes and self._threads.get(job.folder) != each:
                with suppress(OSError):
                    (job.folder / "threads").write_text(each)
                self._threads[job.folder] = each

    def _drop_broken_pool(self) -> None:
        """Discard the pool of processes if it is broken because a process died between jobs."""
        if self._pool is not None and not self._pool.active:
            self._pool.stop()
            self._pool = None


def _verdict(job: Job, error: BaseException | None) -> BaseException | None:
    """Return the error of a job as ``Engine.wait`` reports it; None: the job succeeded.

    Raises:
        OSError: the disk or the network failed, not the job itself.
    """
    if error is None:
        tidy(job)
    elif is_disk_failure(error):
        raise error
    elif isinstance(error, JobDied):
        return CandidateFailed(f"{error}, twice")
    elif isinstance(error, TimeoutError):
        return CandidateFailed(f"it took longer than {(job.timeout or 0) / 60:g} minutes")
    return error


def _is_memory(error: BaseException | None) -> bool:
    """Whether an error says that a job ran out of memory; a ``JobDied`` never counts."""
    return isinstance(error, Exception) and not isinstance(error, JobDied) and is_memory(error)


def _death(error: BaseException | None) -> str:
    code = getattr(error, "exitcode", None)
    if code == DEVICE_FAILED:
        return "its GPU has failed, as its job.log says"
    if code is None or code >= 0:
        return f"its process died ({f'exit code {code}' if code is not None else error})"
    memory = ", perhaps out of memory" if -code == signal.SIGKILL else ""
    return f"its process died ({signal.Signals(-code).name}{memory})"
