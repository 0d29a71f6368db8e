"""A command in a child process: what kills the child ends a candidate, not the search.

The child is forked before anything heavy is imported, so it costs milliseconds; where a candidate has killed it,
another one goes on.
"""

import logging
import mmap
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from kdnas.system.errors import tell
from kdnas.system.signals import die_with_parent, exit_code, stop_of

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# A signal to a whole process group has reached the child by then; one that has not was for the parent alone.
WAIT_SECONDS = 0.3
# So long a child may take for its end after a second signal: native code hears of none.
LAST_SECONDS = 2.0


@dataclass
class Earlier:
    """What a child knows of those before it.

    Args:
        deaths: what each died of, by its process number.
        seconds: that they took together.
    """

    deaths: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0


EARLIER = Earlier()
_at_candidate = mmap.mmap(-1, 1)  # parent and child see the same
_remembered = mmap.mmap(-1, 1024)


@contextmanager
def candidate() -> Iterator[None]:
    """Say that a candidate is to blame if the process dies now."""
    _at_candidate[0] = 1
    try:
        yield
    finally:
        _at_candidate[0] = 0


def remember(text: str) -> None:
    """Tell the next child, should a candidate kill this one, at most a kilobyte."""
    _remembered[:] = text.encode().ljust(len(_remembered), b"\0")


def remembered() -> str:
    """What the child before this one was the last to tell."""
    return _remembered[:].rstrip(b"\0").decode()


def cause(code: int) -> str:
    """What an exit code of a process, as Python gives it, says."""
    if code >= 0:
        return f"exit code {code}"
    return f"{signal.Signals(-code).name}{', perhaps out of memory' if -code == signal.SIGKILL else ''}"


def supervise(command: Callable[[], int], goes_on: Callable[[], str]) -> int:
    """Run a command in a child, and again in another one when a candidate has killed it.

    Without a child where there is no ``fork``, where a debugger looks on, and where torch is loaded already (in a
    notebook, in a test): its threads do not survive a fork.

    Args:
        command: gives an exit code.
        goes_on: says how what was interrupted is gone on with, in words that follow others.

    Returns:
        The exit code; 130, 143 or 129 after a signal; 1 where the child died of something else than a candidate.
    """
    if not hasattr(os, "fork") or "torch" in sys.modules or sys.gettrace():
        return command()
    while True:
        started = time.monotonic()
        pid, code, asked = _run(command)
        if code >= 0:
            return code
        if asked or not _at_candidate[0]:
            what = "interrupted" if asked else f"the process died ({cause(code)})"
            tell(f"{what}{goes_on()}")
            return exit_code(stop_of(asked[0])) if asked else 1
        log.warning(
            "The process died (%s) with its candidate; another one takes its place.", cause(code)
        )
        _at_candidate[0] = 0
        EARLIER.deaths[pid] = cause(code)
        EARLIER.seconds += time.monotonic() - started


def _run(command: Callable[[], int]) -> tuple[int, int, list[int]]:
    """One child: its process number, its exit code, and the signals that this process got meanwhile."""
    hears, says = os.pipe()
    os.set_blocking(says, False)
    asked: list[int] = []
    passed: list[int] = []  # of them, those that the child got from here
    parent = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until it is clear who handles them
    pid = os.fork()
    if pid == 0:
        os.close(hears)
        die_with_parent()
        if os.getppid() != parent:
            os._exit(1)
        # The parent sees which signals have come here, even while native code keeps Python from handling them.
        signal.set_wakeup_fd(says, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        code = command()
        import multiprocessing  # mostly loaded by now

        for left in multiprocessing.active_children():
            left.kill()  # Python would wait for it, and one that hangs since its fork hears of no SIGTERM
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(
                signal.SIGINT, signal.SIG_DFL
            )  # a second one, while the interpreter ends, is no traceback
        raise SystemExit(code)
    os.close(says)

    def kill(number: int, frame: Any) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def pass_on(number: int, frame: Any) -> None:
        if (
            asked and number == signal.SIGHUP
        ):  # a shell and the system send one each: it is no second request
            return
        asked.append(number)
        if len(asked) == 2:
            signal.setitimer(signal.ITIMER_REAL, LAST_SECONDS)
        end = time.monotonic() + WAIT_SECONDS
        while select.select([hears], [], [], max(0, end - time.monotonic()))[0]:
            if not (heard := os.read(hears, 1)):  # it has ended
                return
            if heard[0] in passed:
                passed.remove(heard[0])
            elif heard[0] == number:  # it knows
                return
        passed.append(number)
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in heard}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, kill)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        return pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), asked
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(hears)
