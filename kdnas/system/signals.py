"""Signals as exceptions that every library here lets through, and none that is swallowed."""

import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

from kdnas.system.errors import causes


class Terminated(KeyboardInterrupt):
    """SIGTERM, or SIGUSR1 (Slurm's warning before the end of a job): as Ctrl-C, but the exit code is 143."""


class HungUp(Terminated):
    """SIGHUP, where it is not ignored (``nohup``): the terminal is gone; the exit code is 129."""


TERMINATIONS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_asked: list[type[KeyboardInterrupt]] = []  # since the outermost honest_signals began


def stop_of(number: int) -> type[KeyboardInterrupt]:
    """What a signal is raised as."""
    return {signal.SIGINT: KeyboardInterrupt, signal.SIGHUP: HungUp}.get(
        signal.Signals(number), Terminated
    )


def exit_code(stop: type[BaseException]) -> int:
    """130 after Ctrl-C, else 143 or 129: 128 and the number of the signal, SIGUSR1 as SIGTERM."""
    return 129 if issubclass(stop, HungUp) else 143 if issubclass(stop, Terminated) else 130


def notice_signals() -> None:
    """Raise again what Python has swallowed: it prints and ignores an exception in a finaliser, and a signal's too.

    Raises:
        KeyboardInterrupt: a signal has asked for the end.
    """
    if _asked:
        raise _asked[0]


def die_with_parent() -> None:
    """On Linux, have the kernel kill this process when the thread that started it ends; native code hears no other."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


def let_go(stop: BaseException) -> None:
    """Free what a signal has torn out of its work, without a word of what its finalisers fail at.

    Args:
        stop: the signal, as an exception that nobody raises again; its tracebacks are removed.
    """
    say, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        for error in list(causes(stop)):
            error.__traceback__ = None
    finally:
        sys.unraisablehook = say


def start_resource_tracker() -> None:
    """Have Python's process that removes what others leave in shared memory outlive a signal to all of a group.

    It is started by whatever needs it first, and ignores SIGINT and SIGTERM alone; the one that took the place of a
    dead one would tell tracebacks of what it does not know.
    """
    known = signal.pthread_sigmask(signal.SIG_BLOCK, TERMINATIONS)  # which it inherits
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, known)


@contextmanager
def honest_signals(once: bool = False) -> Iterator[None]:
    """Signals as KeyboardInterrupt; Lightning makes each a SystemExit, which Optuna does not know.

    Args:
        once: later ones do not disturb what ends after the first: for a process that another one ends.

    Raises:
        KeyboardInterrupt: after Ctrl-C; ``Terminated`` after SIGTERM or SIGUSR1, ``HungUp`` after SIGHUP.
    """
    from lightning.pytorch.utilities.exceptions import (
        SIGTERMException,  # a second, which the search itself needs not
    )

    def end(signum: int, frame: Any) -> None:
        if _asked and (
            once or signum == signal.SIGHUP
        ):  # of which a shell and the system send one each
            return
        _asked.append(stop_of(signum))
        raise _asked[-1]

    def say_others(unraisable: Any) -> None:
        if unraisable.exc_type not in (
            KeyboardInterrupt,
            Terminated,
            HungUp,
        ):  # those are noticed later
            say(unraisable)

    # Lightning handles SIGTERM in its loops, and what there is to do comes before and after them too; it leaves a
    # handler of SIGUSR1 that is there (its own would queue the job again and go on).
    numbers = (
        (signal.SIGINT, *TERMINATIONS)
        if threading.current_thread() is threading.main_thread()
        else ()
    )
    before = {number: signal.getsignal(number) for number in numbers}
    ours = {
        number: old
        for number, old in before.items()
        if old in (signal.SIG_DFL, signal.default_int_handler)
    }
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
