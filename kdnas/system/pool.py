"""The processes that jobs run in on this machine: forked from one that has imported everything."""

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

MOST_SLOTS = 4  # on CPUs
DEVICE_FAILED = 76  # the exit code of a process whose GPU has failed

_at_work: list[Path] = []  # the folder of the job that this process is at


def warm_up(module: str | None = None) -> None:
    """Start the process that the pool's are forked from; with a module, it imports that first.

    It hears no signals, and neither do those that it forks: a terminal's or a scheduler's go to a
    whole group, and this process alone decides what they mean. What it prints is lost: a process
    that it forks for one that has just ended would tell a traceback.
    """
    start_resource_tracker()  # which the fork server would start, and so unblock SIGTERM
    known = signal.pthread_sigmask(signal.SIG_BLOCK, TERMINATIONS)
    try:
        if module is not None:
            forkserver.set_forkserver_preload([module])
        with _output_into(Path(os.devnull)):
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, known)


# What all slots have together, for a job that shares it among processes of its own.
GPUS, THREADS = "KDNAS_GPUS", "KDNAS_THREADS"


def make_pool(num_slots: int, own_gpu: bool = True) -> Any:
    """A pool whose processes have each a share of the cores, and one of the GPUs, or all."""
    warm_up()
    method = multiprocessing.get_start_method()
    environment, threads = dict(os.environ), num_threads(num_slots)
    if not own_gpu and GPUS in environment:  # this process is a slot, which has one
        environment["CUDA_VISIBLE_DEVICES"] = environment[GPUS]
        threads = max(1, int(environment[THREADS]) // num_slots)
    initargs = (num_slots if own_gpu else 0, environment, threads, method)
    context = multiprocessing.get_context("forkserver")
    return ProcessPool(num_slots, initializer=_begin, initargs=initargs, context=context)


def usual_slots(accelerator: str) -> int:
    """One for each GPU; without one, for each core, but at most ``MOST_SLOTS``.

    Jobs of one thread side by side do more than one job of two threads (LOG.md). More of them would
    leave a sampler less to learn from, and take more memory.

    Args:
        accelerator: Lightning's.
    """
    return num_gpus(accelerator) or min(MOST_SLOTS, _num_cores())


def num_gpus(accelerator: str) -> int:
    """GPUs that an accelerator of Lightning's name may use."""
    import torch

    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return 1
    return torch.cuda.device_count() if accelerator in ("auto", "gpu", "cuda") else 0


def num_threads(num_slots: int) -> int:
    """A slot's share of the cores that this process may use, and of the threads it is allowed."""
    return max(1, _num_cores() // num_slots)


def _num_cores() -> int:
    import torch

    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(cores, torch.get_num_threads())


def _begin(num_slots: int, environment: dict[str, str], threads: int, start_method: str) -> None:
    """Prepare a process of the pool: it ends with its parent, and has the GPU of a slot, if any."""
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
    # Its own, the fork server's, would import everything in each process that makes batches.
    multiprocessing.set_start_method(start_method, force=True)
    gc.freeze()  # imports made half a million objects that stay
    devices = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    devices = devices or [str(place) for place in range(torch.cuda.device_count())]
    if num_slots:
        os.environ.update({GPUS: ",".join(devices), THREADS: str(num_slots * threads)})
    if len(devices) > 1 and num_slots:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[_take_slot(num_slots) % len(devices)]
    logging.basicConfig(format="%(message)s", stream=sys.stderr)


def _end_with_parent() -> None:
    """The kernel looks only at the fork server, which lives as long as one of its processes does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _take_slot(num_slots: int) -> int:
    """The first slot that no living process of this pool has; it is ours until we end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    for slot in range(num_slots):
        name = f"kdnas.{this_host()}-{parent.pid}.slot{slot}"  # swept when the parent is no more
        lock = FileLock(Path(tempfile.gettempdir()) / name)
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


def run_in_process(job: Job, level: int) -> None:
    """``run_job``, with what it prints in a file."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # the job before may have had more
    log.setLevel(level)
    with _at_work_in(job.folder):
        try:
            run_job(job)
        except DeviceFailed as error:
            # Every later job of this process would fail of it.
            print(error, file=sys.stderr, flush=True)
            os._exit(DEVICE_FAILED)
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # for those who share the GPU


@contextmanager
def _at_work_in(folder: Path) -> Iterator[None]:
    """Outlive a group's SIGTERM, and have a file of the job's folder take what is printed."""
    _at_work[:] = [folder]
    try:
        with _output_into(folder / "job.log"):
            yield
    finally:
        _at_work.clear()


def share_devices(
    num_ranks: int, folder: Path, call: Callable[..., dict[str, Any]], args: tuple[Any, ...]
) -> dict[str, Any]:
    """What a job's call gives that processes do together, each with a device, by DDP.

    The first that raises or dies ends the others, which would wait for it.

    Args:
        num_ranks: processes.
        folder: of the job.
        call: a module's function, which each of them calls.
        args: of the call.

    Raises:
        ProcessExpired: one has died.
        Exception: what the call has raised.
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
        # That a peer is gone is noticed sooner than that it has died.
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
    """Have a file take what this process prints, also what native code does."""
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
