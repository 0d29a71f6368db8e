"""Several worker processes on one study: shared totals, a killed worker, and stillness while one measures."""

import ctypes
import errno
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import optuna
import pytest
from filelock import ReadWriteLock, Timeout
from optuna.storages._rdb import models
from optuna.trial import FixedTrial, TrialState

import kdnas.nas.storage
from kdnas.models.arch import StudentArch
from kdnas.nas.callbacks import HoldStill, wait_for
from kdnas.nas.record import ITS_OWN, failure_of, trained
from kdnas.nas.search import bury_dead, end_trial, open_study, search
from kdnas.nas.space import SearchSpace
from kdnas.nas.storage import _owner
from kdnas.nas.workers import DISK, MOST_DEATHS, _child, _environment, run_workers, worker_threads
from kdnas.system.errors import CandidateFailed, UserError
from kdnas.system.files import is_alive, this_host

SPACE = SearchSpace(
    {
        "num_hidden_layers": [1, 2, 3],
        "num_attention_heads": [1],
        "hidden_size": [16, 32],
        "intermediate_size": [64],
        "hidden_act": ["gelu", "relu"],
    }
)


def evaluate(folder: str, deadly: str, trial: optuna.Trial, arch: StudentArch) -> float:
    """Takes a moment; together, until another process is there. The deadly architecture kills its, once or always."""
    (Path(folder) / f"{trial.number}-{os.getpid()}-{os.environ['OMP_NUM_THREADS']}").touch()
    if deadly == "deadly" and (arch.num_hidden_layers, arch.hidden_act) == (2, "relu"):
        if arch.hidden_size == 32:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
            time.sleep(600)
        ctypes.string_at(0)  # native code that dies
    if deadly in ("once", "always") and arch.num_hidden_layers == 2:
        once = Path(folder) / "once"
        if deadly == "always" or not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    until = time.monotonic() + 60
    while deadly == "together" and time.monotonic() < until:
        if len({path.name.split("-")[1] for path in Path(folder).glob("*-*-*")}) > 1:
            break
        time.sleep(0.1)
    time.sleep(0.1)
    return float(arch.hidden_size + arch.num_hidden_layers)


def work(url: str, n_trials: int, folder: str, deadly: str, index: int, deadline: float) -> None:
    with suppress(UserError):  # no time: none was trained
        search(
            partial(evaluate, folder, deadly),
            SPACE,
            open_study(url, "s", {}),
            n_trials,
            seconds=deadline - time.monotonic(),
        )


def broken(index: int, deadline: float) -> None:
    os._exit(7)


def without_disk(index: int, deadline: float) -> None:
    os._exit(DISK)


def work_in_turn(url: str, lock: Path, index: int, deadline: float) -> None:
    """One candidate, which needs the lock."""

    def evaluate(trial: optuna.Trial, arch: StudentArch) -> float:
        lock.with_suffix(".asked").touch()
        with wait_for(ReadWriteLock(lock).acquire_read, trial):
            return 0.5

    search(evaluate, SPACE, open_study(url, "s", {}), 1)


def take_seconds(url: str, seconds: float, index: int, deadline: float) -> None:
    """The first candidate takes so many, others none."""
    search(
        lambda trial, arch: time.sleep(0 if trial.number else seconds) or 0.5,
        SPACE,
        open_study(url, "s", {}),
        1,
    )


def work_until_stopped(url: str, folder: Path, index: int, deadline: float) -> None:
    """One candidate, which ends when the database is away."""
    kdnas.nas.storage.PATIENCE_SECONDS = 4.0

    def train(trial: optuna.Trial, arch: StudentArch) -> float:
        (folder / f"training-{index}").touch()
        while not (folder / "stopped").exists():
            time.sleep(0.1)
        return 0.5

    try:
        search(train, SPACE, open_study(url, "s", {}), 2, folder=folder)
    except OSError:
        raise SystemExit(DISK) from None


def deaf(index: int, deadline: float) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    time.sleep(600)


def never_ends(url: str, index: int, deadline: float) -> None:
    """SIGTERM ends it at once, as SIGKILL would."""
    search(lambda trial, arch: time.sleep(600), SPACE, open_study(url, "s", {}), 1)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/study.db"


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def any_url(request: pytest.FixtureRequest) -> str:
    """A database without a study, in a file or on a server."""
    return str(request.getfixturevalue("url" if request.param == "sqlite" else "postgresql"))


@dataclass
class Server:
    """A database, and what starts and stops it."""

    url: str
    control: Callable[[str], None]


@pytest.fixture
def postgresql(server: Server) -> str:
    return server.url


@pytest.fixture
def server() -> Iterator[Server]:
    """A PostgreSQL server of the test's own, which no other process on the machine can see."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("needs Debian's package postgresql")
    # It will not run as root; and the path of a socket is short.
    account: dict[str, Any] = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    if account:
        shutil.chown(folder, **account)

    def call(*command: str) -> None:
        subprocess.run(
            [programs[-1] / command[0], *command[1:]],
            check=True,
            stdout=subprocess.DEVNULL,
            **account,
        )

    def control(action: str) -> None:
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        how = (
            ("--wait", f"--log={folder}/log", f"--options={options}")
            if action == "start"
            else ("--mode=immediate",)
        )
        call("pg_ctl", f"--pgdata={folder}/data", *how, action)

    try:
        call("initdb", "--no-sync", "--auth=trust", "--username=kdnas", f"--pgdata={folder}/data")
        control("start")
        yield Server(f"postgresql://kdnas@/postgres?host={folder}", control)
        control("stop")
    finally:
        shutil.rmtree(folder)


def start(
    url: str,
    folder: Path,
    n_trials: int,
    deadly: str = "",
    seconds: float = 600,
    timeout: float = math.inf,
) -> tuple[optuna.Study, list[int]]:
    """Two workers; the study afterwards, and the numbers of the trials that were shown."""
    folder.mkdir()
    study, shown = open_study(url, "s", {}), []
    run_workers(
        partial(work, url, n_trials, str(folder), deadly),
        2,
        study,
        lambda study, trial: shown.append(trial.number),
        seconds,
        lambda index: folder / f"{index}.log",
        timeout,
    )
    return study, shown


def test_workers_train_so_many_together_and_each_trial_is_shown_once(any_url, tmp_path):
    study, shown = start(any_url, tmp_path / "seen", 6, "together")
    assert len(trained(study)) == 6
    assert sorted(shown) == [trial.number for trial in study.trials if trial.state.is_finished()]
    numbers = [path.name.split("-") for path in (tmp_path / "seen").iterdir()]
    assert len({pid for _, pid, _ in numbers} - {str(os.getpid())}) == 2
    assert {threads for *_, threads in numbers} == {str(worker_threads(2))}


@pytest.mark.slow
def test_the_trial_of_a_killed_worker_is_tried_again_by_another(any_url, tmp_path):
    study, _ = start(any_url, tmp_path / "seen", len(SPACE), "once")
    lost = [
        trial
        for trial in study.trials
        if trial.state.name == "FAIL" and "not_needed" not in trial.user_attrs
    ]
    assert len(lost) == 1
    (again,) = [
        trial for trial in study.trials if trial.user_attrs.get("retry_of") == lost[0].number
    ]
    assert again.state.name == "COMPLETE" and again.user_attrs["arch"] == lost[0].user_attrs["arch"]
    assert len(trained(study)) == len(SPACE)


@pytest.mark.postgres
def test_a_trial_that_two_processes_end_at_once_is_queued_once(postgresql):
    """Both have read that it runs before either has ended it."""
    first, *others = (open_study(postgresql, "s", {}) for _ in range(3))
    first.ask()
    (trial,) = first.get_trials()
    successor = optuna.trial.create_trial(state=TrialState.WAITING)
    ends = [
        threading.Thread(target=end_trial, args=(study, trial, "died", "", successor), daemon=True)
        for study in others
    ]
    session = first._storage._backend.scoped_session()
    models.StudyModel.find_or_raise_by_id(
        first._study_id, session, for_update=True
    )  # which each of them asks for
    for end in ends:
        end.start()
    time.sleep(1)
    session.rollback()
    for end in ends:
        end.join(timeout=30)
    assert [trial.state.name for trial in first.get_trials()] == ["FAIL", "WAITING"]


@pytest.mark.slow
def test_a_candidate_that_crashes_and_one_that_hangs_fail_alone_with_their_reasons(url, tmp_path):
    (tmp_path / "seen").mkdir()
    study = open_study(url, "s", {})
    for width in (16, 32):
        study.enqueue_trial(StudentArch(2, 1, width, 64, "relu").to_dict())
    run_workers(
        partial(work, url, 1, str(tmp_path / "seen"), "deadly"),
        1,
        study,
        lambda *_: None,
        600,
        lambda index: tmp_path / f"{index}.log",
        timeout=2,
    )
    found = [(trial.state.name, failure_of(trial)) for trial in study.trials]
    assert found[:3] == [
        ("FAIL", None),  # tried again
        ("FAIL", "it took longer than 0.0333333 minutes"),
        ("FAIL", "its process died (SIGSEGV), as that of trial 0 did"),
    ]
    assert found[3:] == [("COMPLETE", None)]


@pytest.mark.slow
def test_a_candidate_that_waits_for_one_that_hangs_is_not_ended_with_it(url, tmp_path):
    study, path = open_study(url, "s", {}), tmp_path / "stillness.lock"
    held = threading.Event()

    def hang() -> None:
        with ReadWriteLock(path).write_lock():
            held.set()
            while not path.with_suffix(".asked").exists():
                time.sleep(0.1)
            time.sleep(5)

    hanging = threading.Thread(target=hang)
    hanging.start()
    held.wait()
    run_workers(
        partial(work_in_turn, url, path),
        1,
        study,
        lambda *_: None,
        600,
        lambda i: tmp_path / "log",
        timeout=3,
    )
    hanging.join()
    assert [(trial.state.name, trial.value) for trial in study.trials] == [("COMPLETE", 0.5)]


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "states"), [(7, ["COMPLETE"]), (600, ["FAIL", "COMPLETE"])])
def test_the_time_of_a_candidate_stands_still_while_the_database_is_away(
    seconds, states, url, tmp_path, monkeypatch
):
    monkeypatch.setattr("kdnas.nas.workers.LONGEST_PAUSE", 1.5)
    study = open_study(url, "s", {})
    get_trials, looks = study.get_trials, []

    def away(*args: Any, **options: Any) -> Any:
        found = get_trials(*args, **options)
        if options.get("states") == (TrialState.RUNNING,) and any(
            "arch" in trial.user_attrs for trial in found
        ):
            looks.append(time.monotonic())
            time.sleep(3 if len(looks) == 2 else 0)
        return found

    monkeypatch.setattr(study, "get_trials", away)
    worker = partial(take_seconds, url, seconds)
    run_workers(worker, 1, study, lambda *_: None, 600, lambda index: tmp_path / "log", timeout=4)
    assert len(looks) > 2 and [trial.state.name for trial in study.trials] == states


def die_together(url: str, folder: Path, later: float, index: int, deadline: float) -> None:
    """The first candidate of each kills its process, both at one time, or one later; others take none."""

    def train(trial: optuna.Trial, arch: StudentArch) -> float:
        if trial.number < 2:
            (folder / f"begun-{trial.number}").touch()
            while len(list(folder.glob("begun-*"))) < 2:
                time.sleep(0.01)
            time.sleep(1 + later * trial.number)
            os.kill(os.getpid(), signal.SIGKILL)
        return 0.5

    search(train, SPACE, open_study(url, "s", {}), 2)


@pytest.mark.slow
@pytest.mark.parametrize("later", [0, 1])
def test_of_workers_that_die_together_each_cause_is_told(url, tmp_path, monkeypatch, later):
    def bury_slowly(*args: Any, **options: Any) -> set[int]:
        time.sleep(2 * later)  # meanwhile the other dies, too
        return bury_dead(*args, **options)

    monkeypatch.setattr("kdnas.nas.workers.bury_dead", bury_slowly)
    study, work = open_study(url, "s", {}), partial(die_together, url, tmp_path, later)
    run_workers(work, 2, study, lambda *_: None, 600, lambda index: tmp_path / f"{index}")
    dead = [trial.user_attrs["died"] for trial in study.trials[:2]]
    assert dead == ["SIGKILL, perhaps out of memory"] * 2 and len(trained(study)) == 2


def outlive_its_first_thread(url: str, folder: Path, index: int, deadline: float) -> None:
    """The first candidate of each kills its process, the second's after its first thread has ended alone."""

    def kill() -> None:
        time.sleep(3)
        os.kill(os.getpid(), signal.SIGKILL)

    def train(trial: optuna.Trial, arch: StudentArch) -> float:
        if trial.number < 2:
            (folder / f"begun-{trial.number}").touch()
            while len(list(folder.glob("begun-*"))) < 2:
                time.sleep(0.01)
            if trial.number == 1:
                threading.Thread(target=kill).start()
                ctypes.CDLL(None).pthread_exit(None)
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        return 0.5

    search(train, SPACE, open_study(url, "s", {}), 2)


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells that a process's first thread has ended"
)
def test_the_cause_is_told_of_a_worker_whose_first_thread_ends_before_the_others(url, tmp_path):
    study, work = open_study(url, "s", {}), partial(outlive_its_first_thread, url, tmp_path)
    run_workers(work, 2, study, lambda *_: None, 600, lambda index: tmp_path / f"{index}")
    dead = [trial.user_attrs["died"] for trial in study.trials[:2]]
    assert dead == ["SIGKILL, perhaps out of memory"] * 2 and len(trained(study)) == 2


@pytest.mark.slow
def test_worker_after_worker_that_dies_ends_the_search(url, tmp_path):
    with pytest.raises(
        CandidateFailed,
        match=f"{2 * MOST_DEATHS + 1} worker processes died, the last with exit code 7",
    ):
        run_workers(
            broken,
            2,
            open_study(url, "s", {}),
            lambda *_: None,
            60,
            lambda index: tmp_path / f"{index}.log",
        )


def test_a_worker_whose_parent_was_killed_while_it_started_does_nothing(monkeypatch):
    begun: list[tuple[int, float]] = []
    method = multiprocessing.get_start_method()
    monkeypatch.setattr("kdnas.nas.workers.STARTER", {})
    monkeypatch.setattr(
        "kdnas.nas.workers.die_with_parent", lambda: None
    )  # this process is no worker
    with pytest.raises(SystemExit):
        _child(lambda *args: begun.append(args), 0, math.inf, os.getppid() + 1, method)
    assert not begun
    _child(lambda *args: begun.append(args), 0, math.inf, os.getppid(), method)
    assert begun == [(0, math.inf)]


def tell_start_method(path: Path, index: int, deadline: float) -> None:
    path.write_text(multiprocessing.get_start_method())


def test_a_worker_starts_processes_as_the_process_does_that_started_it(url, tmp_path):
    """Else each candidate's processes that make batches would import all libraries anew."""
    work, study = partial(tell_start_method, tmp_path / "method"), open_study(url, "s", {})
    run_workers(work, 1, study, lambda *_: None, math.inf, lambda index: tmp_path / "log")
    assert (tmp_path / "method").read_text() == multiprocessing.get_start_method()


def watch_over_a_deaf_worker(url: str, folder: Path) -> None:
    run_workers(
        partial(deaf_at_a_trial, url, folder),
        1,
        open_study(url, "s", {}),
        lambda *_: None,
        600,
        folder.joinpath,
    )


def deaf_at_a_trial(url: str, folder: Path, index: int, deadline: float) -> None:
    def train(trial: optuna.Trial, arch: StudentArch) -> float:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # native code hears of none either
        time.sleep(600)
        return 0.5

    search(train, SPACE, open_study(url, "s", {}), 1)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_worker_that_hears_no_signal_ends_with_its_parent_and_its_trial_is_tried_again(
    url, tmp_path
):
    parent = multiprocessing.get_context("spawn").Process(
        target=watch_over_a_deaf_worker, args=(url, tmp_path)
    )
    parent.start()
    study = open_study(url, "s", {})
    while not (
        running := [
            t for t in study.get_trials(states=(TrialState.RUNNING,)) if "arch" in t.user_attrs
        ]
    ):
        time.sleep(0.1)
    assert running[0].user_attrs["starter"] == parent.pid != running[0].user_attrs["pid"]
    time.sleep(0.5)  # until it is deaf
    parent.kill()
    parent.join()
    while is_alive(running[0].user_attrs["pid"]):
        time.sleep(0.1)
    search(lambda trial, arch: 0.5, SPACE, open_study(url, "s", {}), 1)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]
    assert study.trials[1].user_attrs["retry_of"] == 0


def test_a_dead_worker_s_trial_is_ended_by_who_started_it_if_that_lives(url, monkeypatch):
    study, dead = (
        open_study(url, "s", {}),
        {"host": this_host(), "pid": 2**22 + 1, "since": time.time()},
    )
    trial = study.ask()
    for name, value in (dead | {"starter": os.getppid()}).items():
        trial.set_user_attr(name, value)
    bury_dead(study)
    assert study.trials[0].state == TrialState.RUNNING, "another process will say what it died of"
    assert _owner().keys() | trial.user_attrs.keys() <= ITS_OWN
    trial.set_user_attr("starter", os.getpid())
    bury_dead(study, died_of={2**22 + 1: "SIGKILL"}.get)
    assert (study.trials[0].state, study.trials[0].user_attrs["died"]) == (
        TrialState.FAIL,
        "SIGKILL",
    )
    other = study.ask()
    for name, value in (dead | {"starter": 2**22 + 2}).items():
        other.set_user_attr(name, value)
    bury_dead(study)
    assert study.trials[other.number].state == TrialState.FAIL, "nobody is left who would"
    left = study.ask()
    for name, value in (dead | {"starter": os.getppid()}).items():
        left.set_user_attr(name, value)
    bury_dead(study)
    monkeypatch.setattr("kdnas.nas.storage.WATCHER_SECONDS", 0.0)
    assert study.trials[left.number].state == TrialState.RUNNING
    bury_dead(study)
    assert study.trials[left.number].state == TrialState.FAIL, "it lives, and watches no more"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_worker_whose_log_is_full_ends_with_its_code_all_the_same():
    code = "import os, sys; from kdnas.system.errors import last_words; full = os.open('/dev/full', os.O_WRONLY); "
    code += (
        "os.dup2(full, 1); os.dup2(full, 2); print('before'); last_words('the end'); sys.exit(3)"
    )
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    assert subprocess.run([sys.executable, "-c", code], env=buffered).returncode == 3


def test_a_worker_whose_disk_failed_is_not_started_again(url, tmp_path):
    with pytest.raises(
        OSError,
        match=r"A worker's disk or network failed: see .*[01]\.log' \([\d,]+ bytes are free",
    ):
        run_workers(
            without_disk,
            2,
            open_study(url, "s", {}),
            lambda *_: None,
            60,
            lambda i: tmp_path / f"{i}.log",
        )


@pytest.mark.slow
@pytest.mark.postgres
def test_results_of_two_workers_are_kept_where_the_database_stays_away_and_taken_up_by_the_next_start(
    server, tmp_path, monkeypatch
):
    monkeypatch.setattr("kdnas.nas.storage.PATIENCE_SECONDS", 3.0)  # the workers' is longer
    monkeypatch.setattr("kdnas.nas.workers.PATIENCE_SECONDS", 3.0)
    study = open_study(server.url, "s", {})

    def stop_when_both_train() -> None:
        while len(list(tmp_path.glob("training-*"))) < 2:
            time.sleep(0.1)
        server.control("stop")
        (tmp_path / "stopped").touch()

    stopper = threading.Thread(target=stop_when_both_train)
    stopper.start()
    work = partial(work_until_stopped, server.url, tmp_path)
    with pytest.raises(OSError, match="has not answered for 3 s"):
        run_workers(work, 2, study, lambda *trial: None, math.inf, lambda index: tmp_path / "log")
    stopper.join()
    assert sorted(path.name for path in tmp_path.glob("unsent_*")) == [
        "unsent_0000.json",
        "unsent_0001.json",
    ]
    server.control("start")
    study = open_study(server.url, "s", {}, folder=tmp_path)
    assert [(trial.state.name, trial.value) for trial in study.trials] == [("COMPLETE", 0.5)] * 2
    assert not list(tmp_path.glob("unsent_*"))


def test_the_trial_of_a_worker_that_is_killed_after_a_signal_is_no_failure(
    url, tmp_path, monkeypatch
):
    study = open_study(url, "s", {})

    def stop_when_one_trains() -> None:
        if any("arch" in trial.user_attrs for trial in study.trials):
            raise KeyboardInterrupt

    monkeypatch.setattr("kdnas.nas.workers.notice_signals", stop_when_one_trains)
    with pytest.raises(KeyboardInterrupt):
        run_workers(
            partial(never_ends, url),
            1,
            study,
            lambda *_: None,
            math.inf,
            lambda index: tmp_path / "log",
        )
    died, again = study.trials
    assert (died.state, again.state) == (TrialState.FAIL, TrialState.WAITING)
    assert died.user_attrs["failed"] == "interrupted (KeyboardInterrupt); tried again"
    assert (
        again.user_attrs == {"again": 0}
        and again.system_attrs["fixed_params"] == died.user_attrs["arch"]
    )


def test_a_second_signal_does_not_wait_for_the_workers(url, tmp_path, monkeypatch):
    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    before = set(multiprocessing.active_children())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("kdnas.nas.workers.notice_signals", stop)
        patch.setattr("multiprocessing.process.BaseProcess.join", stop)
        run_workers(
            deaf, 2, open_study(url, "s", {}), stop, math.inf, lambda index: tmp_path / "log"
        )
    for worker in set(multiprocessing.active_children()) - before:
        worker.join(timeout=10)
        assert worker.exitcode == -signal.SIGKILL


def test_ctrl_c_while_workers_import_is_told_in_no_traceback(url, tmp_path, monkeypatch, capfd):
    workers: list[Any] = []

    def stop() -> None:
        workers[:] = multiprocessing.active_children()
        for worker in workers:
            os.kill(worker.pid, signal.SIGINT)  # as a terminal sends it, to all
        raise KeyboardInterrupt

    tracker = resource_tracker.ResourceTracker()
    for name in ("ensure_running", "getfd"):  # not yet started, as in a new process
        monkeypatch.setattr(resource_tracker, name, getattr(tracker, name))
    monkeypatch.setattr("kdnas.nas.workers.notice_signals", stop)
    monkeypatch.setattr("multiprocessing.connection.wait", lambda *args, **options: None)
    monkeypatch.setattr("kdnas.nas.workers.BaseProcess.terminate", lambda worker: worker.join())
    with pytest.raises(KeyboardInterrupt):
        run_workers(
            partial(never_ends, url),
            2,
            open_study(url, "s", {}),
            stop,
            math.inf,
            lambda index: tmp_path,
        )
    assert [worker.exitcode for worker in workers] == [130, 130]
    assert "Traceback" not in capfd.readouterr().err
    tracker._stop()


def test_workers_end_where_another_cannot_be_started(url, tmp_path, monkeypatch):
    start, started = multiprocessing.process.BaseProcess.start, []

    def start_one(worker) -> None:
        if started:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        start(worker)
        started.append(worker)

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", start_one)
    with pytest.raises(BlockingIOError):
        run_workers(
            deaf, 2, open_study(url, "s", {}), lambda *_: None, math.inf, lambda index: tmp_path
        )
    assert [worker.is_alive() for worker in started] == [False]


def test_a_lock_is_let_go_where_its_trial_was_given_up(tmp_path):
    lock, asked = ReadWriteLock(tmp_path / "lock"), []

    def acquire(blocking=True):
        asked.append(blocking)
        if not blocking:
            raise Timeout("lock")
        return lock.acquire_write()

    class GivenUp:
        def set_user_attr(self, name: str, value: bool) -> None:
            if not value:
                raise optuna.exceptions.UpdateFinishedTrialError

    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        wait_for(acquire, GivenUp())
    assert asked == [False, True]
    lock.acquire_read(timeout=1).lock.release()


def test_no_candidate_is_begun_when_the_time_is_over(url, tmp_path):
    study, _ = start(url, tmp_path / "seen", 6, seconds=0)
    assert len(trained(study)) <= 2  # each worker may have begun one


@pytest.mark.parametrize(
    ("visible", "num_devices", "seen"),
    [
        (None, 0, [None] * 3),
        (None, 1, [None] * 3),
        ("4", 1, ["4"] * 3),
        (None, 2, ["0", "1", "0"]),
        ("3,GPU-a1,7,9", 4, ["3", "GPU-a1", "7"]),
    ],
)
def test_each_worker_sees_one_gpu_and_its_share_of_the_cores(
    visible, num_devices, seen, monkeypatch
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_devices)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 64)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    before, found = dict(os.environ), []
    for index in range(3):
        with _environment(index, 3):
            found.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
            assert os.environ["OMP_NUM_THREADS"] == "2"
    assert found == seen and dict(os.environ) == before


def test_workers_share_the_cores_of_this_process_and_the_threads_that_the_user_allows(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr(
        "os.sched_getaffinity", lambda pid: range(8), raising=False
    )  # taskset, Slurm
    monkeypatch.setattr("torch.get_num_threads", lambda: 64)
    assert [worker_threads(number) for number in (1, 3, 9)] == [8, 2, 1]
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)  # OMP_NUM_THREADS=4
    assert [worker_threads(number) for number in (1, 3)] == [4, 1]
    monkeypatch.delattr("os.sched_getaffinity", raising=False)  # macOS
    monkeypatch.setattr("torch.get_num_threads", lambda: 100)
    assert worker_threads(2) == 32


def hold(path: str, seconds: float) -> None:
    """Works in steps, as a fit does."""
    lock = ReadWriteLock(path)
    callback, end = HoldStill(lock, FixedTrial({})), time.monotonic() + seconds
    with lock.read_lock():
        while time.monotonic() < end:
            time.sleep(0.02)
            callback.give_way()
            Path(f"{path}.steps").write_text(str(time.monotonic()))


def test_workers_hold_still_while_one_measures(tmp_path):
    path = str(tmp_path / "stillness.lock")
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(path, 4.0))
    process.start()
    while not Path(f"{path}.steps").exists():
        time.sleep(0.01)
    asked = time.monotonic()
    with ReadWriteLock(path).write_lock():
        waited = time.monotonic() - asked
        time.sleep(0.1)  # a file that is being written
        before = Path(f"{path}.steps").read_text()
        time.sleep(0.4)
        assert Path(f"{path}.steps").read_text() == before
    assert waited < 3  # a step, not the whole fit
    time.sleep(0.3)
    assert Path(f"{path}.steps").read_text() != before
    process.join()
    assert process.exitcode == 0


def test_two_may_work_at_the_same_time(tmp_path):
    path = str(tmp_path / "stillness.lock")
    first, second = (ReadWriteLock(path, is_singleton=False) for _ in range(2))
    with first.read_lock():
        thread = threading.Thread(target=lambda: (second.acquire_read(), second.release()))
        thread.start()
        thread.join(timeout=5)
        assert not thread.is_alive()
