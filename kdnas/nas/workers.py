"""Several processes that search in one study, on one machine."""

import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from shutil import disk_usage

import torch
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from kdnas.nas.search import bury_dead, end_interrupted, end_trial
from kdnas.nas.storage import PATIENCE_SECONDS, STARTER, is_here
from kdnas.system.errors import CandidateFailed, StoreAway
from kdnas.system.files import nearest_folder, process_start
from kdnas.system.signals import (
    die_with_parent,
    honest_signals,
    notice_signals,
    start_resource_tracker,
)
from kdnas.system.supervisor import cause
from kdnas.training.precision import bf16_is_faster

# A worker that dies is replaced, and its trial tried again; so many deaths a worker in a row, without a trial that ends
# or a candidate that is to blame, are no bad luck.
MOST_DEATHS = 2
# A look at the study takes milliseconds; above so many seconds the database was away.
LONGEST_LOOK = 2.0
# So long a worker may take, which the database keeps waiting too, until it tries again.
LONGEST_PAUSE = 5.0
# A process that was killed ends in a moment, unless a driver holds one of its threads.
LONGEST_END = 5.0
# Exit codes, as the command line's.
REFUSED, DISK, INTERRUPTED = 2, 3, 130


def run_workers(
    work: Callable[[int, float], None],
    num_workers: int,
    study: Study,
    show: Callable[[Study, FrozenTrial], None],
    seconds: float,
    log_path: Callable[[int], Path],
    timeout: float = math.inf,
) -> str:
    """Search in processes until all have ended, and show each trial as it ends.

    A candidate that kills its process, or takes too long, ends with its reason, and another process goes on.

    Args:
        work: what a worker does, given its number from 0 and the time, as of ``time.monotonic()``, after which it
            begins nothing; goes through ``pickle``. It ends with exit code 0, with ``DISK`` where that failed, or with
            ``REFUSED`` where the user must mend something; why is the last line of its log.
        num_workers: processes; each has its share of the cores, and one of the GPUs.
        study: that they search in.
        show: called after each trial, as Optuna's callbacks are.
        seconds: of wall clock.
        log_path: where worker number i tells what it does.
        timeout: seconds that a candidate may take, without those in which it waits for others.

    Returns:
        What the last worker said, where none ended with exit code 0.

    Raises:
        CandidateFailed: worker after worker dies, and not of its candidates.
        OSError: a worker's disk or network failed.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the workers end too.
    """
    context = multiprocessing.get_context(
        "spawn"
    )  # a forked process could not use CUDA, nor torch's threads
    deadline, num_deaths = time.monotonic() + seconds, 0
    refusals: list[str] = []
    begun: dict[
        int, float
    ] = {}  # when each running trial was first seen, and later where it had to wait
    looked = time.monotonic()
    buried: set[int] = set()  # processes whose trials are ended
    shown = {
        trial.number for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()
    }
    bf16_is_faster(
        "cpu"
    )  # measured here, before they compete for the cores, and known to all of them

    workers: dict[int, BaseProcess] = {}
    start_resource_tracker()  # the first start would, and let signals through on the way

    def start(index: int) -> None:
        args = work, index, deadline, os.getpid(), multiprocessing.get_start_method()
        process = context.Process(target=_child, args=args, name=f"worker {index}")
        # Ctrl-C reaches it too, and while it imports nothing would catch that: it hears of it in `_child`.
        known = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with _environment(index, num_workers):
                process.start()
            workers[index] = process
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, known)

    def look(states: tuple[TrialState, ...] | None = None) -> list[FrozenTrial]:
        asked = time.monotonic()
        found = study.get_trials(deepcopy=False, states=states)
        if (
            waited := time.monotonic() - asked
        ) > LONGEST_LOOK:  # the candidates were kept waiting too
            begun.update(
                {number: begin + waited + LONGEST_PAUSE for number, begin in begun.items()}
            )
        return found

    def died_of(pid: int) -> str | None:  # asked when it is dead, perhaps since a moment ago
        worker = next((worker for worker in workers.values() if worker.pid == pid), None)
        if worker is None:
            return None
        worker.join(LONGEST_END)  # its first thread is a zombie before the others have ended
        return None if worker.exitcode is None else cause(worker.exitcode)

    def show_new() -> None:
        nonlocal num_deaths
        for trial in look():
            if trial.state.is_finished() and trial.number not in shown:
                shown.add(trial.number)
                num_deaths = 0
                show(study, trial)

    def end_slow() -> None:
        nonlocal looked
        before, looked = looked, time.monotonic()
        by_pid = {worker.pid: worker for worker in workers.values()}
        for trial in look((TrialState.RUNNING,)):
            worker = by_pid.get(trial.user_attrs.get("pid"))
            if worker is None or not is_here(trial) or "arch" not in trial.user_attrs:
                continue  # another machine's, or it waits for others
            begin = begun.setdefault(trial.number, looked)
            if trial.user_attrs.get("waits"):
                begun[trial.number] = begin + looked - before  # perhaps for the one that hangs
            elif looked > begin + timeout:
                worker.kill()  # native code hears of no signal that can be caught
                worker.join()
                buried.add(worker.pid or 0)
                end_trial(study, trial, "failed", f"it took longer than {timeout / 60:g} minutes")

    try:
        with honest_signals():
            for index in range(num_workers):
                start(index)
            while workers:
                multiprocessing.connection.wait(
                    [worker.sentinel for worker in workers.values()], timeout=1
                )
                notice_signals()
                end_slow()
                codes = {index: worker.exitcode for index, worker in workers.items()}
                if any(code not in (None, 0, REFUSED, DISK) for code in codes.values()):
                    buried |= bury_dead(study, died_of=died_of)
                for index, code in codes.items():
                    if code in (0, REFUSED):
                        del workers[index]
                        if code == REFUSED:
                            told_last = (
                                log_path(index)
                                .read_text(encoding="utf-8", errors="replace")
                                .splitlines()
                            )
                            refusals.append(
                                told_last[-1]
                                if told_last
                                else "A worker has ended, and not said why."
                            )
                    elif code == DISK:
                        path = log_path(index)
                        free = disk_usage(
                            nearest_folder(path)
                        ).free  # there may have been no room for its last line
                        raise OSError(
                            f"A worker's disk or network failed: see {str(path)!r} ({free:,} bytes are free there)"
                        )
                    elif code is not None:
                        if workers[index].pid not in buried:
                            num_deaths += 1  # no candidate was the cause
                        if num_deaths > MOST_DEATHS * num_workers:
                            raise CandidateFailed(
                                f"{num_deaths} worker processes died, the last with exit code {code}: "
                                f"see {str(log_path(index))!r}"
                            )
                        start(index)
                show_new()
    except StoreAway:
        until = time.monotonic() + 2 * PATIENCE_SECONDS
        for worker in workers.values():  # each finds that out by itself, and keeps its result
            worker.join(timeout=max(0, until - time.monotonic()))
        raise
    finally:
        # Ctrl-C reaches them too; SIGTERM may not. All together takes less than the ten seconds that one has.
        try:
            for end, seconds in ((None, 2), (BaseProcess.terminate, 5), (BaseProcess.kill, 1)):
                until = time.monotonic() + seconds
                for worker in workers.values():
                    if end and worker.is_alive():
                        end(worker)
                for worker in workers.values():
                    worker.join(timeout=max(0, until - time.monotonic()))
        except (
            BaseException
        ):  # a second signal; multiprocessing itself would wait for them at the exit
            for worker in workers.values():
                worker.kill()
            raise
        if workers and (stop := sys.exception()):
            told = (
                0,
                REFUSED,
                DISK,
                INTERRUPTED,
            )  # who ends so has told, or kept, what became of its trial
            end_interrupted(
                study, {w.pid for w in workers.values() if w.exitcode not in told}, stop
            )
    return refusals[-1] if len(refusals) == num_workers else ""


def _child(
    work: Callable[[int, float], None], index: int, deadline: float, parent: int, method: str
) -> None:
    """A worker, which ends with the process that started it, also where that is killed."""
    die_with_parent()
    if os.getppid() != parent:  # killed before that, while this one imported
        raise SystemExit(INTERRUPTED)
    # Its own, spawn, would import all libraries anew in each process that makes batches, and wait for that at the end.
    multiprocessing.set_start_method(method, force=True)
    STARTER.update(starter=parent, starter_begun=process_start(parent))
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        work(index, deadline)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


def worker_threads(num_workers: int) -> int:
    """A worker's share of the cores that this process may use, and of the threads that the user allows it."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(
        1, min(cores, torch.get_num_threads()) // num_workers
    )  # OMP_NUM_THREADS, where that is set


@contextmanager
def _environment(index: int, num_workers: int) -> Iterator[None]:
    """What a process that is started within shall see: its share of the cores, and one GPU."""
    wanted = {"OMP_NUM_THREADS": str(worker_threads(num_workers))}
    if (num_devices := torch.cuda.device_count()) > 1:
        devices = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_devices)))
        wanted["CUDA_VISIBLE_DEVICES"] = devices.split(",")[index % num_devices]
    known = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in known.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
