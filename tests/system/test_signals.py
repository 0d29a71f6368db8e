"""Signals end a command as exceptions that tell them apart, once, and are not lost."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from kdnas.system.signals import (
    TERMINATIONS,
    HungUp,
    Terminated,
    exit_code,
    honest_signals,
    notice_signals,
)
from tests.training.test_trainer import Call, Data, Steep, fit, make_trainer, settings


@pytest.fixture(autouse=True)
def nobody_listens() -> Iterator[None]:
    """A fit of Lightning's that has failed leaves its handlers behind."""
    handlers = dict.fromkeys(TERMINATIONS, signal.SIG_DFL)
    handlers[signal.SIGINT] = signal.default_int_handler
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "end", "code"),
    [
        (signal.SIGINT, KeyboardInterrupt, 130),
        (signal.SIGTERM, Terminated, 143),
        (signal.SIGUSR1, Terminated, 143),
        (signal.SIGHUP, HungUp, 129),
    ],
)
def test_each_signal_is_an_exception_of_its_own_and_the_handlers_come_back(number, end, code):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as stopped, honest_signals():
        send(number)
    assert stopped.type is end and exit_code(stopped.type) == code
    assert signal.getsignal(number) is before
    notice_signals()  # it was for that one alone


@pytest.mark.parametrize(
    ("number", "end"),
    [
        (signal.SIGINT, KeyboardInterrupt),
        (signal.SIGTERM, Terminated),
        (signal.SIGUSR1, Terminated),
        (signal.SIGHUP, HungUp),
    ],
)
def test_within_a_fit_of_the_main_thread_too(number, end, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "1")  # where Lightning would queue the job again
    trainer = make_trainer(
        settings(), tmp_path / "fit", 1, [Call(lambda trainer, module: send(number))]
    )
    with pytest.raises(KeyboardInterrupt) as stopped, honest_signals():
        fit(trainer, Steep(), Data())
    assert stopped.type is end and trainer.global_step == 1


def test_lightnings_own_end_is_a_termination_and_other_exits_are_left_as_they_are():
    with pytest.raises(Terminated), honest_signals():
        raise SIGTERMException
    with pytest.raises(SystemExit) as left, honest_signals():
        raise SystemExit(3)
    assert left.value.code == 3


def test_a_hangup_that_is_ignored_stays_so_and_one_that_is_told_twice_is_one():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with honest_signals():
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    ended = []
    with pytest.raises(HungUp), honest_signals():
        try:
            send(signal.SIGHUP)
        finally:
            send(signal.SIGHUP)
            ended.append(1)
    assert ended


def test_a_second_signal_cuts_short_what_the_first_one_ends():
    with pytest.raises(Terminated), honest_signals():
        try:
            send(signal.SIGINT)
        finally:
            send(signal.SIGTERM)
            pytest.fail("it went on")


class Deaf:
    """Its finaliser is where the signal comes: Python prints the exception, and goes on."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        send(self.number)
        time.sleep(0.01)


# Nor is a traceback shown.
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("number", "end"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_that_python_swallows_is_noticed_later(number, end):
    went_on = []
    with pytest.raises(KeyboardInterrupt) as stopped, honest_signals():
        Deaf(number)
        went_on.append(1)
        notice_signals()
        pytest.fail("it was not noticed")
    assert stopped.type is end and went_on


def test_another_thread_hears_nothing():
    handlers = []

    def work() -> None:
        with honest_signals():
            handlers.append(signal.getsignal(signal.SIGTERM))
            notice_signals()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]
