"""Several processes that search in one study, on one machine."""

import multiprocessing
import multiprocessing.connection
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from optuna.study import Study
from optuna.trial import FrozenTrial

from kdnas.errors import CandidateFailed
from kdnas.nas.search import bury_dead
from kdnas.training import honest_signals

# A worker that dies is replaced, and its trial tried again; so many deaths a worker are no bad luck.
MOST_DEATHS = 2
DISK = 3  # exit code, as the command line's


def run_workers(
    work: Callable[[int, float], None],
    num_workers: int,
    study: Study,
    show: Callable[[Study, FrozenTrial], None],
    seconds: float,
    log_path: Callable[[int], Path],
) -> None:
    """Search in processes until all have ended, and show each trial as it ends.

    Args:
        work: what a worker does, given its number from 0 and the time, as of ``time.time()``, after which it begins
            nothing; goes through ``pickle``. It ends with exit code 0, or ``DISK`` where that failed.
        num_workers: processes; each has its share of the cores, and one of the GPUs.
        study: that they search in.
        show: called after each trial, as Optuna's callbacks are.
        seconds: of wall clock.
        log_path: where worker number i tells what it does.

    Raises:
        CandidateFailed: worker after worker dies.
        OSError: a worker's disk or network failed.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the workers end too.
    """
    context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA, nor torch's threads
    deadline, num_deaths = time.time() + seconds, 0
    shown = {trial.number for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()}

    def start(index: int) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=work, args=(index, deadline), name=f"worker {index}")
        with _environment(index, num_workers):
            process.start()
        return process

    def show_new() -> None:
        for trial in study.get_trials(deepcopy=False):
            if trial.state.is_finished() and trial.number not in shown:
                shown.add(trial.number)
                show(study, trial)

    workers = {index: start(index) for index in range(num_workers)}
    try:
        with honest_signals():
            while workers:
                multiprocessing.connection.wait([worker.sentinel for worker in workers.values()], timeout=1)
                for index, code in [(index, worker.exitcode) for index, worker in workers.items()]:
                    if code == 0:
                        del workers[index]
                    elif code == DISK:
                        raise OSError(f"A worker's disk or network failed: see {str(log_path(index))!r}")
                    elif code is not None:
                        num_deaths += 1
                        if num_deaths > MOST_DEATHS * num_workers:
                            raise CandidateFailed(
                                f"{num_deaths} worker processes died, the last with exit code {code}: "
                                f"see {str(log_path(index))!r}"
                            )
                        bury_dead(study)
                        workers[index] = start(index)
                show_new()
    finally:
        for worker in workers.values():
            worker.join(timeout=20)  # Ctrl-C reaches them too
            if worker.is_alive():
                worker.terminate()
                worker.join()


@contextmanager
def _environment(index: int, num_workers: int) -> Iterator[None]:
    """What a process that is started within shall see: its share of the cores, and one GPU."""
    wanted = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_workers))}
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
