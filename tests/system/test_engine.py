"""The engine: results as files, failures as exceptions, and processes that die, hang and are told to stop."""

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kdnas.system import engine as engine_module
from kdnas.system.engine import Engine
from kdnas.system.errors import CandidateFailed, UserError
from kdnas.system.files import is_alive
from kdnas.system.jobs import Job, Reporter, Stopped, progress_of
from kdnas.system.pool import num_threads, share_devices, warm_up
from kdnas.system.signals import TERMINATIONS

ROOT = Path(__file__).parents[2]


# --- Jobs. They run in other processes too, so each is a function of a module.


def double(number: int) -> dict:
    return {"number": 2 * number}


def count(folder: Path) -> dict:
    """Say that it was begun."""
    with (folder / "begun").open("a") as file:
        file.write(f"{os.getpid()}\n")
    return {"begun": num_begun(folder)}


def die(folder: Path, times: int, number: int) -> dict:
    count(folder)
    if num_begun(folder) <= times:
        os.kill(os.getpid(), number)
    return {"begun": num_begun(folder)}


def leave(code: int) -> dict:
    os._exit(code)


def wait_for(path: Path, folder: Path) -> dict:
    """Say that it was begun; end once a file is there, or when asked to."""
    count(folder)
    reporter = Reporter(folder)
    while not path.exists():
        reporter.stop_if_asked()
        time.sleep(0.02)
    return {"begun": num_begun(folder)}


def hang(folder: Path) -> dict:
    """Never look whether it is asked to stop."""
    count(folder)
    time.sleep(600)
    return {}


def say(text: str) -> dict:
    print(f"{text} of Python", flush=True)
    os.write(2, f"{text} of native code\n".encode())
    subprocess.run(["echo", f"{text} of a child"], check=True)
    logging.getLogger("kdnas").info("%s of the log", text)
    return {}


class Unpicklable(Exception):
    def __init__(self, one: str, other: str) -> None:
        super().__init__(one)
        self.lock = threading.Lock()


def fail(kind: str) -> dict:
    errors = {
        "user": UserError("give another"),
        "candidate": CandidateFailed("the loss is nan"),
        "any": ZeroDivisionError("division by zero"),
        "memory": RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        "unpicklable": Unpicklable("one", "other"),
        "full disk": OSError(errno.ENOSPC, "No space left on device", "/there"),
        "no file": FileNotFoundError(errno.ENOENT, "No such file or directory", "/there"),
    }
    raise errors[kind]


def own_process() -> dict:
    return {"process": os.getpid()}


def sick(folder: Path, is_cured: bool) -> dict:
    """What CUDA raises from now on in this process."""
    count(folder)
    if is_cured and num_begun(folder) > 1:
        return {"process": os.getpid()}
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def greedy(folder: Path, other: Path, has_ever_room: bool) -> dict:
    """Needs memory that another job holds."""
    wait_for(other / "begun", folder)
    if has_ever_room and (other / "result.json").exists():
        return {}
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def hold(folder: Path, other: Path) -> dict:
    """Holds memory until the other has failed of it."""
    wait_for(other / "begun", folder)
    time.sleep(0.5)
    return {}


def not_a_number() -> dict:
    return {"loss": float("nan")}


def environment(folder: Path, other: Path) -> dict:
    """What a slot has, while another job runs beside this one."""
    wait_for(other / "begun", folder)
    return {
        "num_threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"],
        "CUDA_VISIBLE_DEVICES": os.environ["CUDA_VISIBLE_DEVICES"],
    }


# --- What looks at them.


def num_begun(folder: Path) -> int:
    path = folder / "begun"
    return len(path.read_text().splitlines()) if path.exists() else 0


def until(is_true, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def process_of(folder: Path) -> int:
    """The process that has begun a job last."""
    until(lambda: num_begun(folder))
    return int((folder / "begun").read_text().splitlines()[-1])


def end_of(engine: Engine, job: Job) -> BaseException | None:
    """Do one job; what it failed of."""
    engine.start(job)
    while True:
        for _, error in engine.wait():
            return error


@pytest.fixture(scope="module", autouse=True)
def torch_is_imported_once() -> None:
    """Before the processes are forked."""
    warm_up("torch")


@pytest.fixture(scope="module")
def process() -> Iterator[Engine]:
    """One slot that is a process."""
    with Engine(1) as engine:
        yield engine


@pytest.fixture(params=["thread", "process"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """One slot of either kind."""
    if request.param == "process":
        yield request.getfixturevalue("process")
        return
    with Engine() as engine:
        yield engine


# --- Jobs in a thread or in a process.


def test_a_job_is_done_once_and_leaves_its_result_as_a_file(engine, tmp_path):
    folder, ended = tmp_path / "a" / "b", []
    job = Job(folder, "a job", count, (folder,))
    for _ in range(2):
        assert engine.run([job], ended=ended.append) == [{"begun": 1}]
    assert ended == [job, job] and job.is_done
    assert (folder / "result.json").read_text() == '{\n  "begun": 1\n}\n'
    assert {path.name for path in folder.iterdir()} == {"begun", "result.json"}


def test_more_jobs_than_slots_wait_and_give_their_results_in_order(engine, tmp_path):
    seen = []
    todo = [Job(tmp_path / str(number), "double", double, (number,)) for number in range(5)]
    results = engine.run(todo, watch=seen.extend)
    assert results == [{"number": 2 * number} for number in range(5)]
    assert [job for place, job in enumerate(seen) if job not in seen[:place]] == sorted(
        set(seen), key=todo.index
    )


@pytest.mark.parametrize(
    ("kind", "expected", "message"),
    [
        ("user", UserError, "give another"),
        ("candidate", CandidateFailed, "the loss is nan"),
        ("any", CandidateFailed, "ZeroDivisionError: division by zero"),
        ("memory", CandidateFailed, "out of memory: CUDA out of memory. Tried to allocate 2 GiB"),
        ("unpicklable", CandidateFailed, "Unpicklable: one"),
        ("no file", FileNotFoundError, "[Errno 2] No such file or directory: '/there'"),
    ],
)
def test_what_a_job_raises_is_an_exception_that_names_it(engine, tmp_path, kind, expected, message):
    error = end_of(engine, job := Job(tmp_path / "a", "a job", fail, (kind,)))
    assert (type(error), str(error)) == (expected, message)
    assert not job.is_done and engine.jobs == []


def test_a_gpu_that_fails_costs_a_process_and_its_job_is_tried_once_more(process, tmp_path):
    (before,) = process.run([Job(tmp_path / "before", "before", own_process)])
    for is_cured in (True, False):
        job = Job(tmp_path / str(is_cured), "sick", sick, (tmp_path / str(is_cured), is_cured))
        error = end_of(process, job)
        assert job.is_done == is_cured and num_begun(job.folder) == 2
        assert "AcceleratorError: CUDA error: an illegal" in (job.folder / "job.log").read_text()
    assert str(error) == "its GPU has failed, as its job.log says, twice"
    (after,) = process.run([Job(tmp_path / "after", "after", own_process)])
    assert before != after


@pytest.mark.parametrize("has_ever_room", [True, False])
def test_a_job_without_memory_is_tried_once_more_alone(tmp_path, has_ever_room):
    one, other, third = tmp_path / "one", tmp_path / "other", tmp_path / "third"
    failures = []

    def take(job: Job, error: BaseException) -> None:
        failures.append(str(error))
        job.result_file.write_text("{}")

    with Engine(2) as engine:
        jobs = [
            Job(one, "one", greedy, (one, other, has_ever_room)),
            Job(other, "other", hold, (other, one)),
            Job(third, "third", count, (third,)),
        ]
        engine.run(jobs, failed=take)
    assert num_begun(one) == 2
    ends, begins = (one / "result.json").stat().st_mtime_ns, (third / "begun").stat().st_mtime_ns
    assert ends < begins
    said = "out of memory: CUDA out of memory. Tried to allocate 2 GiB"
    assert failures == ([] if has_ever_room else [said])


def test_a_failure_ends_a_run_unless_somebody_takes_it(engine, tmp_path):
    bad = Job(tmp_path / "bad", "bad", fail, ("any",))
    good = Job(tmp_path / "good", "good", double, (2,))
    with pytest.raises(CandidateFailed, match="^ZeroDivisionError"):
        engine.run([bad, good])
    assert not good.is_done

    told = []

    def take(job: Job, error: BaseException) -> None:
        told.append((job, str(error)))
        job.result_file.write_text('{"failed": true}')

    assert engine.run([bad, good], failed=take) == [{"failed": True}, {"number": 4}]
    assert told == [(bad, "ZeroDivisionError: division by zero")]


def test_a_full_disk_is_no_failure_of_the_job_but_of_all(engine, tmp_path):
    job = Job(tmp_path / "a", "a job", fail, ("full disk",))
    with pytest.raises(OSError, match="No space left on device: '/there'"):
        engine.run([job], failed=lambda job, error: pytest.fail("another would not escape it"))


def test_a_result_that_json_has_not_is_refused(engine, tmp_path):
    error = end_of(engine, job := Job(tmp_path / "a", "a job", not_a_number))
    assert isinstance(error, CandidateFailed) and "ValueError" in str(error)
    assert not job.is_done


@pytest.mark.parametrize("num_slots", [0, 1])
def test_a_job_that_is_asked_to_stop_has_no_result_and_goes_on_in_the_next_start(
    num_slots, tmp_path
):
    job = Job(tmp_path / "a", "a job", wait_for, (tmp_path / "go", tmp_path / "a"))
    begun = time.monotonic()
    with Engine(num_slots) as engine:
        engine.start(job)
        until(lambda: num_begun(job.folder))
    assert time.monotonic() < begun + engine_module.STOP_SECONDS
    assert not job.is_done and (job.folder / "stop").exists()
    (tmp_path / "go").touch()
    with Engine() as engine:
        assert engine.run([job]) == [{"begun": 2}]
    assert not (job.folder / "stop").exists()


def test_ctrl_c_while_jobs_run_asks_them_to_stop(tmp_path):
    job = Job(tmp_path / "a", "a job", wait_for, (tmp_path / "never", tmp_path / "a"))

    def interrupt(running: list[Job]) -> None:
        if num_begun(job.folder):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Engine() as engine:
        engine.run([job], watch=interrupt)
    assert (job.folder / "stop").exists() and not job.is_done


# --- What a job says, and is told.


def test_a_reporter_tells_how_far_a_job_is(tmp_path):
    assert progress_of(tmp_path) == {}
    reporter = Reporter(tmp_path)
    reporter.tell(step=1)
    reporter.tell(step=2)
    assert progress_of(tmp_path) == {"step": 1}, "at most twice a second"
    reporter.tell(at_once=True, loss=0.5)
    assert progress_of(tmp_path) == {"step": 2, "loss": 0.5}
    (tmp_path / "progress.json").write_text('{"step": ')
    assert progress_of(tmp_path) == {}


def test_a_job_waits_after_an_epoch_for_the_answer_to_it(tmp_path):
    reporter = Reporter(tmp_path)
    (tmp_path / "prune_1").touch()
    threading.Timer(0.2, (tmp_path / "go_on_0").touch).start()
    assert reporter.may_go_on(0) and not reporter.may_go_on(1)
    (tmp_path / "stop").touch()
    with pytest.raises(Stopped):
        reporter.may_go_on(2)


# --- Processes.


def test_a_job_whose_process_dies_is_tried_once_more(process, tmp_path, caplog):
    job = Job(tmp_path / "a", "a job", die, (tmp_path / "a", 1, signal.SIGKILL))
    assert process.run([job]) == [{"begun": 2}]
    (record,) = caplog.records
    death = "its process died (SIGKILL, perhaps out of memory)"
    assert record.getMessage() == f"a job: {death}; it is tried again."


@pytest.mark.parametrize(
    ("call", "args", "reason"),
    [
        (die, (9, signal.SIGSEGV), "SIGSEGV"),
        (die, (9, signal.SIGKILL), "SIGKILL, perhaps out of memory"),
        (leave, (3,), "exit code 3"),
    ],
)
def test_a_job_whose_process_dies_twice_fails_and_the_next_one_runs(
    process, tmp_path, call, args, reason
):
    folder = tmp_path / "a"
    args = (folder, *args) if call is die else args
    error = end_of(process, Job(folder, "a job", call, args))
    assert isinstance(error, CandidateFailed)
    assert str(error) == f"its process died ({reason}), twice"
    assert call is not die or num_begun(folder) == 2
    assert process.run([Job(tmp_path / "b", "next", double, (1,))]) == [{"number": 2}]


def test_a_job_that_takes_too_long_fails_and_its_process_is_ended(process, tmp_path):
    job = Job(tmp_path / "a", "a job", hang, (tmp_path / "a",), timeout=1.2)
    error = end_of(process, job)
    assert isinstance(error, CandidateFailed)
    assert str(error) == "it took longer than 0.02 minutes"
    assert num_begun(job.folder) == 1
    until(lambda: not is_alive(process_of(job.folder)))


def test_a_process_that_dies_between_two_jobs_is_replaced(process, tmp_path):
    first, second = (Job(tmp_path / name, name, count, (tmp_path / name,)) for name in "ab")
    process.run([first])
    idle = process_of(first.folder)
    os.kill(idle, signal.SIGKILL)
    until(lambda: not is_alive(idle))
    assert process.run([second]) == [{"begun": 1}]
    assert process_of(second.folder) != idle


def test_what_a_job_prints_goes_to_its_log(process, tmp_path, capfd):
    job = Job(tmp_path / "a", "a job", say, ("words",))
    process.run([job])
    job.result_file.unlink()
    process.run([job])
    lines = (job.folder / "job.log").read_text().splitlines()
    expected = [f"words of {whom}" for whom in ("Python", "native code", "a child")]
    assert [line for line in lines if "the log" not in line] == 2 * expected, "and it is kept"
    assert capfd.readouterr() == ("", "")


def test_a_job_that_does_not_hear_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_module, "STOP_SECONDS", 0.3)
    job = Job(tmp_path / "a", "a job", hang, (tmp_path / "a",))
    with Engine(1) as engine:
        engine.start(job)
        busy = process_of(job.folder)
        begun = time.monotonic()
    assert not is_alive(busy) and time.monotonic() < begun + 10


def test_slots_share_the_cores_and_have_a_gpu_each(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-3")
    one, other = tmp_path / "one", tmp_path / "other"
    todo = [
        Job(folder, "a job", environment, (folder, beside))
        for folder, beside in ((one, other), (other, one))
    ]
    with Engine(2) as engine:
        assert engine.has_room
        results = engine.run(todo)
    share = num_threads(2)
    assert {result["num_threads"] for result in results} == {share}
    assert {result["OMP_NUM_THREADS"] for result in results} == {str(share)}
    assert {result["CUDA_VISIBLE_DEVICES"] for result in results} == {"5", "GPU-3"}


def shared(folder: Path) -> dict:
    """What the first of two processes has that share a job."""
    for name in ("0", "1"):
        (folder / name).mkdir()
    return share_devices(2, folder, rank_environment, (folder,))


def rank_environment(folder: Path) -> dict:
    ranks = [folder / rank for rank in ("0", "1")]
    if os.environ["LOCAL_RANK"] == "1":
        ranks.reverse()
    return environment(*ranks)


def test_processes_that_share_a_job_have_all_gpus_and_share_all_cores(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-3")
    with Engine(1) as engine:
        (result,) = engine.run([Job(tmp_path / "job", "a job", shared, (tmp_path,))])
    assert result["CUDA_VISIBLE_DEVICES"] == "5,GPU-3"
    assert result["num_threads"] == num_threads(2)


def parent(folder: Path) -> None:
    """A parent that hears all signals and goes on; run in a process group of its own."""
    for number in (signal.SIGINT, *TERMINATIONS):
        signal.signal(number, lambda number, frame: print(number, flush=True))
    todo = [
        Job(folder / "a", "a", wait_for, (folder / "go", folder / "a")),
        Job(folder / "b", "b", hang, (folder / "b",)),
    ]
    with Engine(1) as engine:
        engine.run(todo)


def test_a_signal_to_the_group_ends_no_job_and_the_death_of_the_parent_ends_all(tmp_path):
    code = f"from pathlib import Path; from tests.system import test_engine; test_engine.parent(Path({str(tmp_path)!r}))"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as group:
        try:
            first = process_of(tmp_path / "a")
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                os.killpg(group.pid, number)
                assert int(group.stdout.readline()) == number
            (tmp_path / "go").touch()
            second = process_of(tmp_path / "b")
            assert (tmp_path / "a" / "result.json").read_text() == '{\n  "begun": 1\n}\n'
            group.kill()
            until(lambda: not is_alive(first) and not is_alive(second))
        finally:
            os.killpg(group.pid, signal.SIGKILL)
