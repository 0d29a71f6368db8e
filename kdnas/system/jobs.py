"""Jobs: function calls whose results are files, so that they can run in other processes and resume.

A job is done when ``result.json`` is in its folder. The file ``job.log`` has what the job printed.
While a job runs, it and the engine (``kdnas.system.engine``) communicate by further files in the
folder:

- ``progress.json``: how far the job is.
- ``threads``: number of threads that the job may use.
- ``stop``: its existence asks the job to end.
- ``go_on_<step>`` or ``prune_<step>``: the pruner's answer to the job's report at a step.
"""

import errno
import json
import logging
import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pebble import ProcessExpired

from kdnas.system.errors import (
    CandidateFailed,
    DeviceFailed,
    UserError,
    as_raised,
    is_device_failure,
    is_memory,
    reason_of,
)
from kdnas.system.files import write_json

log = logging.getLogger("kdnas")

# Seconds between two checks of the running jobs.
LOOK_SECONDS = 0.1
# Errors of the disk or the network, for which no job is to blame.
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
    """Raised in a job that was asked to stop."""


@dataclass(frozen=True)
class Job:
    """A function call whose result is stored in a file, so that it is made only once.

    Args:
        folder: folder of ``result.json`` and of everything else that the job writes.
        title: name of the job, as shown to the user.
        call: function at the top level of a module; it returns JSON data for ``result.json``.
        args: arguments of ``call``; they must be picklable.
        timeout: seconds that the job may take in a process of this machine; None: no limit.
    """

    folder: Path
    title: str
    call: Callable[..., dict[str, Any]]
    args: tuple[Any, ...] = ()
    timeout: float | None = None

    @property
    def result_file(self) -> Path:
        """Path of the job's ``result.json``, which exists once the job is done."""
        return self.folder / "result.json"

    @property
    def is_done(self) -> bool:
        """Whether the job's ``result.json`` exists."""
        return self.result_file.is_file()


class Reporter:
    """Exchanges messages between a running job and the engine, by files in the job's folder.

    Args:
        folder: folder of the job.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._told = 0.0
        self._known: dict[str, Any] = {}

    def tell(self, at_once: bool = False, **known: Any) -> None:
        """Add values to ``progress.json``, which is written at most twice a second.

        Args:
            at_once: write the file immediately.
            **known: JSON values by name; values under other names stay.
        """
        self._known |= known
        if at_once or time.monotonic() > self._told + 0.5:
            self._told = time.monotonic()
            # Renamed, so that nobody reads a part of it; it need not survive a crash.
            temporary = self.folder / ".progress.json"
            temporary.write_text(json.dumps(self._known))
            os.replace(temporary, self.folder / "progress.json")

    @property
    def is_asked_to_stop(self) -> bool:
        return (self.folder / "stop").exists()

    def stop_if_asked(self) -> None:
        """End the job if it was asked to stop.

        Raises:
            Stopped: the job was asked to stop.
        """
        if self.is_asked_to_stop:
            raise Stopped

    def take_threads(self) -> None:
        """Set torch's number of threads to that in the job's file ``threads``, if it exists."""
        import torch

        with suppress(OSError, ValueError):
            told = int((self.folder / "threads").read_text())
            if told != torch.get_num_threads():
                torch.set_num_threads(told)

    def may_go_on(self, step: int) -> bool:
        """Wait until the pruner has answered this job's report; return whether the job may go on.

        Args:
            step: step of the report, which is the number of the epoch.

        Raises:
            Stopped: the job was asked to stop while it waited.
        """
        while not (self.folder / f"go_on_{step}").exists():
            if (self.folder / f"prune_{step}").exists():
                return False
            self.stop_if_asked()
            time.sleep(LOOK_SECONDS / 2)
        return True


def progress_of(folder: Path) -> dict[str, Any]:
    """Return the values that a job has reported so far, from ``progress.json`` in its folder."""
    try:
        return dict(json.loads((folder / "progress.json").read_text()))
    except (OSError, ValueError):
        return {}


def is_disk_failure(error: BaseException) -> bool:
    """Whether an error comes from the disk or the network, so that other jobs would fail too."""
    if not isinstance(error, OSError):
        return False
    return error.errno in DISK_ERRORS or (error.errno is None and str(error).startswith("Caught "))


def run_job(job: Job) -> None:
    """Run a job's function and write what it returns to the job's ``result.json``.

    Raises:
        UserError, CandidateFailed, Stopped, ProcessExpired, KeyboardInterrupt: the function raised
            it.
        OSError: the function or the writing of its result raised it. Only number, text and file
            of the error are kept, so that it can be pickled.
        DeviceFailed: the function raised another exception, which means that the GPU has failed.
        CandidateFailed: the function raised any other exception, whose text is the reason.
    """
    failure: Exception
    try:
        write_json(job.result_file, job.call(*job.args))
        return
    except (Stopped, UserError, CandidateFailed, ProcessExpired, KeyboardInterrupt):
        raise
    except OSError as error:
        plain = as_raised(error)
        failure = OSError(plain.errno, plain.strerror or str(plain), plain.filename)
    except Exception as error:
        log.debug("where it was found:", exc_info=error)
        kind = DeviceFailed if is_device_failure(error) else CandidateFailed
        failure = kind(reason_of(error))
        if is_memory(error):  # its frames hold tensors
            traceback.clear_frames(error.__traceback__)
    raise failure  # outside the handler, so that it has no context, which pickle may refuse


def tidy(job: Job) -> None:
    """Delete the files by which a job communicated with the engine; the result stays."""
    for pattern in ("stop", "threads", "progress.json", "go_on_*", "prune_*"):
        for old in job.folder.glob(pattern):
            old.unlink()
