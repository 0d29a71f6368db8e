"""The processes in which jobs run on this machine: a pool, forked from a fork server.

A slot is one process of a pool. It runs one job at a time, with a share of the cores and, if there
are GPUs, one GPU.
"""

import gc
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION
from concurrent.futures import wait as wait_for_futures
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pebble import ProcessExpired, ProcessPool

from kdnas.system.errors import DeviceFailed
from kdnas.system.files import this_host
from kdnas.system.jobs import Job, run_job
from kdnas.system.modules import find_named_modules
from kdnas.system.signals import TERMINATIONS, die_with_parent, start_resource_tracker

log = logging.getLogger("kdnas")

MOST_SLOTS = 4  # by default, on a machine without a GPU
DEVICE_FAILED = 76  # exit code of a process whose GPU has failed

_at_work: list[Path] = []  # folder of the job that this process runs, if any


def warm_up(module: str | None = None) -> None:
    """Start the fork server, from which the processes of pools are forked.

    The fork server blocks the signals in ``TERMINATIONS``: terminals and schedulers send these to
    the whole process group, but only the main process decides what to do. What the fork server
    prints is discarded.

    Args:
        module: name of a module that the fork server imports first, so that forked processes need
            not import it; None: no module.
    """
    start_resource_tracker()  # the fork server would start it and thereby unblock SIGTERM
    known = signal.pthread_sigmask(signal.SIG_BLOCK, TERMINATIONS)
    try:
        if module is not None:
            forkserver.set_forkserver_preload([module])
        with _output_into(Path(os.devnull)):
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, known)


# Environment variables with the GPUs and the threads of all slots together, for a job that uses them all in processes
# of its own.
GPUS, THREADS = "KDNAS_GPUS", "KDNAS_THREADS"


def make_pool(num_slots: int, own_gpu: bool = True) -> Any:
    """Return a pool of processes, each with its share of the cores and, usually, one GPU.

    Args:
        num_slots: number of processes.
        own_gpu: each process sees only one GPU. False: each process sees all GPUs, even if this
            process sees only one.

    Returns:
        A ``pebble.ProcessPool``.
    """
    warm_up()
    method = multiprocessing.get_start_method()
    environment, threads = dict(os.environ), num_threads(num_slots)
    if not own_gpu and GPUS in environment:  # this process is a slot, and sees one GPU
        environment["CUDA_VISIBLE_DEVICES"] = environment[GPUS]
        threads = max(1, int(environment[THREADS]) // num_slots)
    initargs = (num_slots if own_gpu else 0, environment, threads, method)
    context = multiprocessing.get_context("forkserver")
    return ProcessPool(num_slots, initializer=_begin, initargs=initargs, context=context)


def usual_slots(accelerator: str) -> int:
    """Return the default number of parallel jobs: one per GPU or, without a GPU, one per core.

    Without a GPU it is at most ``MOST_SLOTS``. Parallel jobs of one thread get more done than one
    job of several threads (see LOG.md). But with more jobs a sampler would have fewer results when
    it proposes the next candidate, and memory might run out.

    Args:
        accelerator: accelerator of Lightning's Trainer, such as ``auto`` or ``cpu``.
    """
    return num_gpus(accelerator) or min(MOST_SLOTS, _num_cores())


def num_gpus(accelerator: str) -> int:
    """Return the number of GPUs that a Trainer with this accelerator can use; 1 for MPS."""
    import torch

    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return 1
    return torch.cuda.device_count() if accelerator in ("auto", "gpu", "cuda") else 0


def num_threads(num_slots: int) -> int:
    """Return how many threads each of ``num_slots`` processes may use, at least 1.

    The processes share the cores of this process, or its torch threads if these are fewer.
    """
    return max(1, _num_cores() // num_slots)


def _num_cores() -> int:
    import torch

    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(cores, torch.get_num_threads())


def _begin(num_slots: int, environment: dict[str, str], threads: int, start_method: str) -> None:
    """Initialise a process of a pool: set its GPU and threads, and end it with its parent.

    Args:
        num_slots: number of processes that share the GPUs; 0: the process sees all GPUs.
        environment: environment variables of the parent.
        threads: number of threads that the process may use.
        start_method: method of ``multiprocessing`` by which the process starts its own children.
    """
    import torch

    die_with_parent()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, _end_unless_at_work)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TERMINATIONS)
    for number in (signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.environ.update(environment, OMP_NUM_THREADS=str(threads))
    find_named_modules()
    torch.set_num_threads(threads)
    # The fork server's own method would import everything again in each worker of a DataLoader.
    multiprocessing.set_start_method(start_method, force=True)
    gc.freeze()  # half a million objects of imports, which need not be searched for garbage
    devices = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    devices = devices or [str(place) for place in range(torch.cuda.device_count())]
    if num_slots:
        os.environ.update({GPUS: ",".join(devices), THREADS: str(num_slots * threads)})
    if len(devices) > 1 and num_slots:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[_take_slot(num_slots) % len(devices)]
    logging.basicConfig(format="%(message)s", stream=sys.stderr)


def _end_with_parent() -> None:
    """Kill this process when the main process ends.

    ``die_with_parent`` is not enough: for the kernel, the parent is the fork server, which can
    outlive the main process.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _take_slot(num_slots: int) -> int:
    """Return the lowest slot number that no other living process of the pool has, and lock it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    for slot in range(num_slots):
        name = f"kdnas.{this_host()}-{parent.pid}.slot{slot}"  # ``sweep`` removes it later
        lock = FileLock(Path(tempfile.gettempdir()) / name)
        with suppress(Timeout):
            lock.acquire(blocking=False)
            _taken.append(lock)
            return slot
    return 0


_taken: list[FileLock] = []


def _end_unless_at_work(number: int, frame: Any) -> None:
    """Handle SIGTERM: end the process, unless it runs a job that was not asked to stop.

    In that case the signal was sent to the whole process group, and the main process will ask the
    job to stop.
    """
    if not _at_work or (_at_work[0] / "stop").exists():
        os._exit(0)


def run_in_process(job: Job, level: int) -> None:
    """Call ``run_job`` in a process of the pool, and write what it prints to ``job.log``.

    Args:
        job: job to run.
        level: level of the logger ``kdnas``.
    """
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # the last job may have changed it
    log.setLevel(level)
    with _at_work_in(job.folder):
        try:
            run_job(job)
        except DeviceFailed as error:
            # The GPU would fail every later job of this process, too.
            print(error, file=sys.stderr, flush=True)
            os._exit(DEVICE_FAILED)
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # others may share the GPU


@contextmanager
def _at_work_in(folder: Path) -> Iterator[None]:
    """Context manager that ignores SIGTERM and appends all output to ``job.log`` in a folder."""
    _at_work[:] = [folder]
    try:
        with _output_into(folder / "job.log"):
            yield
    finally:
        _at_work.clear()


def share_devices(
    num_ranks: int, folder: Path, call: Callable[..., dict[str, Any]], args: tuple[Any, ...]
) -> dict[str, Any]:
    """Call a job's function in several processes that train together by DDP, one per device.

    If a process raises an error or dies, the other processes are ended, since they would wait for
    it forever.

    Args:
        num_ranks: number of processes.
        folder: folder of the job.
        call: function at the top level of a module, which each process calls.
        args: arguments of the call; they must be picklable.

    Returns:
        What the call has returned in the process of rank 0.

    Raises:
        ProcessExpired: a process has died.
        Exception: the first exception that the call raised in any process.
    """
    from lightning.fabric.plugins.environments.lightning import find_free_network_port

    shared = {
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(find_free_network_port()),
    }
    level = log.getEffectiveLevel()
    warm_up(call.__module__)
    pool = make_pool(num_ranks, own_gpu=False)
    try:
        ranks = [
            pool.schedule(
                _run_rank, args=(shared | {"LOCAL_RANK": str(rank)}, folder, level, call, args)
            )
            for rank in range(num_ranks)
        ]
        first, _ = wait_for_futures(ranks, return_when=FIRST_EXCEPTION)
        # Other ranks notice a lost peer before we notice that it has died, so wait for its own error.
        done, _ = wait_for_futures(ranks, timeout=1)
        in_order = sorted(done, key=lambda rank: rank not in first)
        errors = [error for rank in in_order if (error := rank.exception()) is not None]
        if errors:
            raise next((one for one in errors if isinstance(one, ProcessExpired)), errors[0])
        return dict(ranks[0].result())
    finally:
        pool.stop()
        pool.join()


def _run_rank(
    environment: dict[str, str],
    folder: Path,
    level: int,
    call: Callable[..., dict[str, Any]],
    args: tuple[Any, ...],
) -> dict[str, Any]:
    log.setLevel(level)
    os.environ.update(environment)
    with _at_work_in(folder):
        return call(*args)


@contextmanager
def _output_into(path: Path) -> Iterator[None]:
    """Context manager that appends this process's output to a file, also that of native code."""
    for output in (sys.stdout, sys.stderr):
        output.flush()
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
        if path.is_file() and path.stat().st_size == 0:
            path.unlink()
