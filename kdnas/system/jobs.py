"""Jobs: each a function of plain data that leaves its result as a file.

A job is done when ``result.json`` is in its folder. Beside it lie ``job.log``, what it printed;
``progress.json``, how far it is; ``threads``, how many it may take; and ``stop``, by which it is
asked to end.
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

# Seconds between two looks at what runs.
LOOK_SECONDS = 0.1
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

    def take_threads(self) -> None:
        """Take as many threads as the engine says."""
        import torch

        with suppress(OSError, ValueError):
            told = int((self.folder / "threads").read_text())
            if told != torch.get_num_threads():
                torch.set_num_threads(told)

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


def run_job(job: Job) -> None:
    """Do a job, and write its result down; what else it raises than we know becomes plain text."""
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
        if is_memory(error):  # its frames hold what memory there is
            traceback.clear_frames(error.__traceback__)
    raise failure  # out here it has no context, which may not go through pickle


def tidy(job: Job) -> None:
    """Remove what was said while a job ran, or in a start before this."""
    for pattern in ("stop", "threads", "progress.json", "go_on_*", "prune_*"):
        for old in job.folder.glob(pattern):
            old.unlink()
