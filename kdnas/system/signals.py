"""Exceptions for the signals that ask a process to end, and the exit codes for them."""

import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGUSR1 was received; handled like Ctrl-C, but with exit code 143.

    Slurm can be told to send SIGUSR1 some time before it ends a job.
    """


class HungUp(Terminated):
    """SIGHUP was received: the terminal is gone. The exit code is 129.

    Under ``nohup`` SIGHUP is ignored, and this is not raised.
    """


TERMINATIONS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_asked: list[type[KeyboardInterrupt]] = []  # signals since the outermost honest_signals began


def stop_of(number: int) -> type[KeyboardInterrupt]:
    """Return the exception class for a signal, given the signal's number."""
    known = {signal.SIGINT: KeyboardInterrupt, signal.SIGHUP: HungUp}
    return known.get(signal.Signals(number), Terminated)


def exit_code(stop: type[BaseException]) -> int:
    """Return the exit code for the exception of a signal.

    It is 129 for ``HungUp``, 143 for ``Terminated``, and 130 for a KeyboardInterrupt by Ctrl-C.
    """
    if issubclass(stop, HungUp):
        return 129
    return 143 if issubclass(stop, Terminated) else 130


def notice_signals() -> None:
    """Raise the exception of an earlier signal again, in case it was swallowed.

    Python ignores exceptions in finalisers (``__del__``), and a signal may arrive while one runs.

    Raises:
        KeyboardInterrupt: a signal has asked this process to end.
    """
    if _asked and threading.current_thread() is threading.main_thread():
        raise _asked[0]


def die_with_parent() -> None:
    """On Linux, let the kernel kill this process when its parent thread ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


def start_resource_tracker() -> None:
    """Start Python's resource tracker now, so that it ignores signals to the whole process group.

    Started later by Python itself, it would ignore only SIGINT and SIGTERM.
    """
    known = signal.pthread_sigmask(signal.SIG_BLOCK, TERMINATIONS)  # the tracker inherits this
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, known)


@contextmanager
def honest_signals() -> Iterator[None]:
    """Context manager that turns signals asking this process to end into exceptions.

    The signals are SIGINT (Ctrl-C), SIGTERM, SIGUSR1 and SIGHUP; the exceptions are raised in the
    main thread. Lightning alone would turn these signals into SystemExit. Signals that already have
    a handler, or are ignored, are left alone.

    Raises:
        KeyboardInterrupt: after Ctrl-C; its subclass ``Terminated`` after SIGTERM or SIGUSR1,
            ``HungUp`` after SIGHUP.
    """
    from lightning.pytorch.utilities.exceptions import SIGTERMException  # a slow import

    def end(number: int, frame: Any) -> None:
        if _asked and number == signal.SIGHUP:  # the shell and the system send one each
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
