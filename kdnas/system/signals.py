"""Signals as exceptions that every library here lets through, and none that is swallowed."""

import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM, or SIGUSR1 (Slurm's warning before the end of a job): as Ctrl-C, exit code 143."""


class HungUp(Terminated):
    """SIGHUP, where it is not ignored (``nohup``): the terminal is gone; exit code 129."""


TERMINATIONS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_asked: list[type[KeyboardInterrupt]] = []  # since the outermost honest_signals began


def stop_of(number: int) -> type[KeyboardInterrupt]:
    """What a signal is raised as."""
    known = {signal.SIGINT: KeyboardInterrupt, signal.SIGHUP: HungUp}
    return known.get(signal.Signals(number), Terminated)


def exit_code(stop: type[BaseException]) -> int:
    """130 after Ctrl-C, else 143 or 129: 128 and the number of the signal, SIGUSR1 as SIGTERM."""
    if issubclass(stop, HungUp):
        return 129
    return 143 if issubclass(stop, Terminated) else 130


def notice_signals() -> None:
    """Raise again what Python has swallowed: it prints and ignores an exception in a finaliser.

    Raises:
        KeyboardInterrupt: a signal has asked for the end.
    """
    if _asked and threading.current_thread() is threading.main_thread():
        raise _asked[0]


def die_with_parent() -> None:
    """On Linux, have the kernel kill this process when the thread that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


def start_resource_tracker() -> None:
    """Have Python's process that tidies shared memory outlive a signal to all of a group.

    It is started by whatever needs it first, and by itself ignores SIGINT and SIGTERM alone.
    """
    known = signal.pthread_sigmask(signal.SIG_BLOCK, TERMINATIONS)  # which it inherits
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, known)


@contextmanager
def honest_signals() -> Iterator[None]:
    """Signals as KeyboardInterrupt in the main thread; Lightning makes each a SystemExit.

    Raises:
        KeyboardInterrupt: after Ctrl-C; ``Terminated`` after SIGTERM or SIGUSR1, ``HungUp`` after
            SIGHUP.
    """
    from lightning.pytorch.utilities.exceptions import SIGTERMException  # which takes seconds

    def end(number: int, frame: Any) -> None:
        if _asked and number == signal.SIGHUP:  # of which a shell and the system send one each
            return
        _asked.append(stop_of(number))
        raise _asked[-1]

    def say_others(unraisable: Any) -> None:
        if unraisable.exc_type not in (KeyboardInterrupt, Terminated, HungUp):  # noticed later
            say(unraisable)

    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, *TERMINATIONS) if is_main else ()
    before = {number: signal.getsignal(number) for number in numbers}
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    ours = {number: old for number, old in before.items() if old in defaults}
    for number in ours:
        signal.signal(number, end)
    say = sys.unraisablehook
    if ours:
        sys.unraisablehook = say_others
    try:
        yield
    except SIGTERMException as stop:
        raise Terminated from stop
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise type(stop.__context__) from stop
        raise
    finally:
        for number, old in ours.items():
            signal.signal(number, old)
        if ours:
            sys.unraisablehook = say
            _asked.clear()
