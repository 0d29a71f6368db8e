"""The engine on Dask's workers, which are real processes, and of which one is killed."""

import os
import signal
from collections.abc import Iterator

import distributed
import pytest

from kdnas.commands.engine import open_engine
from kdnas.system.errors import CandidateFailed, UserError
from kdnas.system.jobs import Job
from tests.system.test_jobs import double, fail, num_begun, until, wait_for


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """Where two workers are."""
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True}
    with distributed.LocalCluster(dashboard_address=None, **options) as cluster:
        yield cluster.scheduler_address.replace("tcp://", "dask://")


def test_every_job_has_its_result_though_a_worker_is_killed(scheduler, tmp_path):
    go, first = tmp_path / "go", tmp_path / "0"
    todo = [Job(first, "killed", wait_for, (go, first))]
    todo += [Job(tmp_path / str(number), "double", double, (number,)) for number in range(1, 6)]
    ended = []

    def kill_once(running: list[Job]) -> None:
        if num_begun(first) == 1 and not go.exists():
            go.touch()
            os.kill(int((first / "begun").read_text()), signal.SIGKILL)

    with open_engine(1, scheduler) as engine:
        assert engine.num_slots == 2
        results = engine.run(todo, watch=kill_once, ended=ended.append)
    assert results == [{"begun": 2}, *({"number": 2 * number} for number in range(1, 6))]
    assert sorted(ended, key=todo.index) == todo, "each has ended once"


def test_what_a_job_raises_there_is_raised_here(scheduler, tmp_path):
    job = Job(tmp_path / "a", "a job", fail, ("unpicklable",))
    with (
        pytest.raises(CandidateFailed, match="^Unpicklable: one$"),
        open_engine(1, scheduler) as engine,
    ):
        engine.run([job])


def test_a_job_there_is_asked_to_stop(scheduler, tmp_path):
    job = Job(tmp_path / "a", "a job", wait_for, (tmp_path / "never", tmp_path / "a"))
    with open_engine(1, scheduler) as engine:
        engine.start(job)
        until(lambda: num_begun(job.folder))
        (future,) = engine._running
    assert type(future.exception()).__name__ == "Stopped" and not job.is_done


@pytest.mark.parametrize(
    ("executor", "message"),
    [
        ("dask://127.0.0.1:1", "^executor is 'dask://127.0.0.1:1': .*127.0.0.1:1"),
        ("slurm://127.0.0.1:1", "^executor is 'slurm://127.0.0.1:1': give dask://HOST:PORT"),
    ],
)
def test_a_scheduler_that_is_away_is_refused(executor, message, monkeypatch):
    def client(address: str, timeout: str) -> distributed.Client:
        return connect(address, timeout="0.5s")

    connect = distributed.Client
    monkeypatch.setattr(distributed, "Client", client)
    with pytest.raises(UserError, match=message):
        open_engine(1, executor)
