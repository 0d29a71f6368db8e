"""The search loop, driven by a two-line ``evaluate``: totals, twins, failures, interruptions, dead and busy workers."""

import errno
import gc
import math
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.storages._heartbeat import HeartbeatThread
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Engine, event
from sqlalchemy.exc import OperationalError
from torch.utils.data import DataLoader, Dataset

import kdnas.nas.search
import kdnas.nas.storage
from kdnas.models.arch import StudentArch
from kdnas.nas.record import failure_of, superseded, trained, tried
from kdnas.nas.sampler import make_sampler
from kdnas.nas.search import (
    MOST_FAILURES,
    _is_needed,
    end_trial,
    open_study,
    refuse_difference,
    search,
)
from kdnas.nas.space import SearchSpace
from kdnas.system import supervisor
from kdnas.system.errors import CandidateFailed, UserError
from kdnas.system.files import process_start, this_host
from kdnas.system.signals import Terminated

pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:Heartbeat of storage"),
]


def space_of(depths: list[int], widths: list[int]) -> SearchSpace:
    return SearchSpace(
        {
            "num_hidden_layers": depths,
            "num_attention_heads": [2],
            "hidden_size": widths,
            "intermediate_size": [64],
            "hidden_act": ["gelu", "relu"] if len(depths) > 3 else ["gelu"],
        }
    )


SPACE = space_of([1, 2, 3, 4, 5, 6], [32, 48, 64])  # 36 students
THREE = space_of([1, 2, 3], [32])
ONE, TWO, OTHER = list(THREE)  # by their number of layers


def value_of(trial: optuna.Trial, arch: StudentArch) -> float:
    """A reward by shape alone, so that every start of a search sees the same."""
    return arch.num_hidden_layers + arch.hidden_size / 100 - (arch.hidden_act == "relu") / 7


class Recorded:
    """An ``evaluate`` that keeps what it was asked for; ``special`` answers, or raises, instead for some."""

    def __init__(self, special: Callable[[optuna.Trial, StudentArch], Any] = value_of) -> None:
        self.special = special
        self.asked: list[StudentArch] = []

    def __call__(self, trial: optuna.Trial, arch: StudentArch) -> float:
        self.asked.append(arch)
        return self.special(trial, arch)


def hurry(connection: Any, record: Any) -> None:
    """SQLite waits for the disk at every step of a trial, ten times as long as the step takes."""
    connection.execute("PRAGMA synchronous = OFF")


@pytest.fixture(scope="module", autouse=True)
def do_not_wait_for_the_disk():
    """Every database of this module."""
    event.listen(Engine, "connect", hurry)
    yield
    event.remove(Engine, "connect", hurry)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for the studies of all tests: making its tables takes longer than most of them."""
    return f"sqlite:///{tmp_path_factory.mktemp('study')}/study.db"


@pytest.fixture
def reopen(url: str, request: pytest.FixtureRequest) -> Callable[[], Study]:
    """Opens this test's study, as each start of the program does."""
    return lambda: open_study(url, request.node.name, {"seed": 0})


@pytest.fixture
def study(reopen: Callable[[], Study]) -> Study:
    """This test's study, new."""
    return reopen()


@pytest.fixture
def worker(url: str, request: pytest.FixtureRequest, study: Study) -> Study:
    """The same study in another worker, with a connection of its own."""
    return optuna.load_study(
        storage=url, study_name=request.node.name, sampler=optuna.samplers.RandomSampler(seed=0)
    )


def arch_of(trial: FrozenTrial) -> StudentArch:
    return StudentArch.from_dict(trial.user_attrs["arch"])


def states(study: Study) -> list[str]:
    return [trial.state.name for trial in study.trials]


def story(study: Study) -> list[tuple[object, ...]]:
    return [
        (t.number, t.params, t.value, t.state, t.user_attrs.get("twin_of")) for t in study.trials
    ]


def running_trial(study: Study, arch: StudentArch, **attrs: object) -> optuna.Trial:
    """A trial that somebody is at."""
    study.enqueue_trial(arch.to_dict())
    trial = study.ask()
    here = {"host": this_host(), "pid": os.getppid(), "begun": None}
    for name, value in ({"arch": arch.to_dict()} | here | attrs).items():
        trial.set_user_attr(name, value)
    return trial


# Totals


def test_a_trial_is_not_needed_beside_a_later_one_that_began_to_train_before(study, caplog):
    first, later = running_trial(study, ONE), running_trial(study, TWO)
    end = time.monotonic() + 0.6
    caplog.set_level("INFO", "kdnas")
    assert _is_needed(study, SPACE, first.number, 2, end)
    assert not _is_needed(study, SPACE, first.number, 1, end) and not _is_needed(
        study, SPACE, later.number, 1, end
    )
    assert caplog.messages == ["Trial 0 waits for 1 that run and may be the last ones needed."]


def test_it_stops_when_so_many_distinct_candidates_are_trained(study):
    evaluate = Recorded()
    best = search(evaluate, SPACE, study, n_trials=9)
    assert len(evaluate.asked) == len(set(evaluate.asked)) == len(trained(study)) == 9
    assert best.value == max(value_of(None, arch) for arch in evaluate.asked)
    assert arch_of(best) in evaluate.asked
    assert all(trial.user_attrs["pid"] == os.getpid() for trial in study.trials)


def test_n_trials_is_a_total_over_all_starts(study, reopen):
    first, second, third = Recorded(), Recorded(), Recorded()
    search(first, SPACE, study, n_trials=2)
    best = search(second, SPACE, reopen(), n_trials=4)
    assert (len(first.asked), len(second.asked)) == (2, 2)
    assert len({*first.asked, *second.asked}) == 4
    for total in (4, 3):
        assert search(third, SPACE, reopen(), n_trials=total).number == best.number
    assert third.asked == []


def test_a_space_smaller_than_n_trials_is_exhausted_and_the_search_ends(study):
    evaluate = Recorded()
    best = search(evaluate, THREE, study, n_trials=10)
    assert sorted(arch.num_hidden_layers for arch in evaluate.asked) == [1, 2, 3]
    assert len(trained(study)) == 3
    assert arch_of(best) == OTHER
    search(evaluate, THREE, study, n_trials=20)
    assert len(evaluate.asked) == 3


@pytest.mark.parametrize("n_trials", [0, -1])
def test_fewer_than_one_trial_is_refused(n_trials):
    study = optuna.create_study()
    with pytest.raises(UserError, match=f"n_trials is {n_trials}: give at least 1"):
        search(value_of, SPACE, study, n_trials)
    assert study.trials == []


def test_callbacks_see_every_trial_when_it_has_ended(study):
    seen = []

    def evaluate(trial, arch):
        if arch == ONE:
            raise CandidateFailed("too small")
        if arch == TWO:
            raise optuna.TrialPruned
        return 1.0

    for arch in (ONE, TWO, TWO, ONE):
        study.enqueue_trial(arch.to_dict())
    search(
        evaluate,
        SPACE,
        study,
        1,
        [lambda study, trial: seen.append((trial.number, trial.state.name))],
    )
    assert seen == [(0, "FAIL"), (1, "PRUNED"), (2, "PRUNED"), (3, "FAIL"), (4, "COMPLETE")]


def prune_narrow(trial: optuna.Trial, arch: StudentArch) -> float:
    trial.report(0.5, step=0)
    if arch.hidden_size < 64:
        raise optuna.TrialPruned
    return value_of(trial, arch)


def test_candidates_that_the_pruner_ended_count_as_trained(study):
    evaluate = Recorded(prune_narrow)
    best = search(evaluate, SPACE, study, n_trials=12)
    assert len(evaluate.asked) == len(tried(study)) == 12 > len(trained(study)) >= 1
    assert arch_of(best).hidden_size == 64


def test_a_pruner_that_ends_every_candidate_is_the_users_mistake(study):
    with pytest.raises(UserError, match="The pruner ended every candidate"):
        search(prune, SPACE, study, n_trials=3)
    assert states(study) == ["PRUNED"] * 3


def test_a_candidate_that_reports_a_low_score_is_not_pruned_unasked(study):
    def evaluate(trial, arch):
        trial.report(1.0 if trial.number < 6 else 0.0, step=0)
        if trial.should_prune():
            raise optuna.TrialPruned
        return value_of(trial, arch)

    search(evaluate, SPACE, study, n_trials=8)
    assert set(states(study)) == {"COMPLETE"}


# Twins


def end_well(trial: optuna.Trial, arch: StudentArch) -> float:
    trial.set_constraint("budget", -0.25)
    trial.set_user_attr("loss", 0.5)
    trial.set_user_attr("seconds", 12.0)
    return 2.5


def refuse(trial: optuna.Trial, arch: StudentArch) -> float:
    trial.set_constraint("budget", 0.25)
    trial.set_user_attr("refused", "too slow")
    raise optuna.TrialPruned


def prune(trial: optuna.Trial, arch: StudentArch) -> float:
    trial.report(0.5, step=0)
    raise optuna.TrialPruned


def fail(trial: optuna.Trial, arch: StudentArch) -> float:
    raise CandidateFailed("the loss is nan")


@pytest.mark.parametrize("end", [end_well, refuse, prune, fail])
def test_a_twin_is_answered_from_the_record_and_not_evaluated_again(study, end):
    evaluate = Recorded(
        lambda trial, arch: end(trial, arch) if arch == ONE else value_of(trial, arch)
    )
    study.enqueue_trial(ONE.to_dict())
    study.enqueue_trial(ONE.to_dict())
    study.enqueue_trial(ONE.to_dict())
    search(evaluate, SPACE, study, n_trials=2)
    first, *twins = study.trials[:3]
    assert evaluate.asked.count(ONE) == 1
    for twin in twins:
        known = {k: v for k, v in first.user_attrs.items() if k not in ("seconds", "since")}
        assert {k: v for k, v in twin.user_attrs.items() if k != "since"} == known | {"twin_of": 0}
        assert (twin.state, twin.constraints) == (first.state, first.constraints)
        assert twin.value == first.value or first.state == TrialState.PRUNED
    assert [trial.number for trial in trained(study) if arch_of(trial) == ONE] == (
        [0] if end is end_well else []
    )


@pytest.mark.parametrize("end", [end_well, fail])
@pytest.mark.parametrize("moment", ["before", "within", "after"])
def test_a_kill_while_a_twin_is_answered_changes_no_order(
    moment, end, study, url, request, monkeypatch
):
    name = f"{request.node.name} whole"
    whole = open_study(url, name, {"seed": 0})
    for one in (whole, study):
        for arch in (ONE, ONE):
            one.enqueue_trial(arch.to_dict())
    evaluate = Recorded(
        lambda trial, arch: end(trial, arch) if arch == ONE else value_of(trial, arch)
    )
    search(evaluate, SPACE, whole, n_trials=4)

    def die(trial, twin, answer=kdnas.nas.search.answer):
        if moment == "within":
            patch.setattr(optuna.Trial, "set_user_attr", say_and_die)
        if moment != "before":
            with suppress(CandidateFailed):
                answer(trial, twin)
        raise SystemExit  # nobody hears of it

    def say_and_die(trial, name, value, set_user_attr=optuna.Trial.set_user_attr):
        set_user_attr(trial, name, value)
        if name in ("failed", "loss"):
            raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(kdnas.nas.search, "answer", die)
        search(evaluate, SPACE, study, n_trials=4)
    assert states(study)[1:] == ["RUNNING"]
    study = open_study(url, request.node.name, {"seed": 0})
    search(evaluate, SPACE, study, n_trials=4)
    ends = [
        [
            (t.params, t.value, t.state)
            for t in one.trials
            if t.value is not None or t.number not in again
        ]
        for one, again in ((whole, set()), (study, superseded(study.trials)))
    ]
    assert ends[0] == ends[1] and len(ends[0]) > 4


def test_after_a_twin_comes_one_that_the_study_does_not_know(study):
    evaluate = Recorded()
    for arch in (ONE, ONE, TWO, TWO):
        study.enqueue_trial(arch.to_dict())
    search(evaluate, SPACE, study, n_trials=4)
    *_, third, fourth = study.trials
    assert [trial.user_attrs.get("twin_of") for trial in study.trials] == [
        None,
        0,
        None,
        2,
        None,
        None,
    ]
    assert third.system_attrs["fixed_params"] == arch_of(third).to_dict()
    assert len({ONE, TWO, arch_of(third), arch_of(fourth)}) == 4
    assert arch_of(third) != next(
        arch for arch in SPACE if arch not in (ONE, TWO)
    )  # drawn, not always the smallest


def test_after_a_twin_comes_one_that_no_other_worker_is_at_or_will_take_next(study, worker):
    busy = running_trial(worker, ONE)
    study.enqueue_trial(TWO.to_dict())
    study.enqueue_trial(TWO.to_dict())

    def while_the_other_ends(trial: optuna.Trial, arch: StudentArch) -> float:
        if arch == OTHER:
            worker.tell(busy, 0.5)
        return value_of(trial, arch)

    evaluate = Recorded(while_the_other_ends)
    search(evaluate, THREE, study, n_trials=3)
    assert evaluate.asked == [TWO, OTHER]
    assert len(trained(study)) == 3


def test_what_another_worker_is_training_is_not_trained_beside_it(study, worker):
    busy = running_trial(worker, ONE)
    study.enqueue_trial(ONE.to_dict(), user_attrs={"retry_of": 7})  # whose process had died

    def while_the_other_ends(trial: optuna.Trial, arch: StudentArch) -> float:
        if busy.number not in [t.number for t in trained(worker)]:
            worker.tell(busy, 0.5)
        return value_of(trial, arch)

    evaluate = Recorded(while_the_other_ends)
    search(evaluate, THREE, study, n_trials=3)
    assert sorted(map(str, evaluate.asked)) == sorted(map(str, (TWO, OTHER)))
    assert study.trials[1].state == TrialState.FAIL and study.trials[1].user_attrs["not_needed"]
    assert failure_of(study.trials[1]) is None, "this one did not die"
    assert study.trials[2].user_attrs["queued_for"] == 1


def test_a_worker_waits_for_the_last_candidates_of_others_and_trains_no_more_than_asked(
    study, worker, monkeypatch, caplog
):
    caplog.set_level("INFO", "kdnas")
    busy = running_trial(worker, ONE)
    for arch in (TWO, OTHER):
        study.enqueue_trial(arch.to_dict())
    monkeypatch.setattr("kdnas.nas.search.time.sleep", lambda seconds: worker.tell(busy, 0.5))
    evaluate = Recorded()
    search(evaluate, SPACE, study, n_trials=2)
    assert evaluate.asked == [TWO]
    assert len(trained(study)) == 2
    assert study.trials[2].user_attrs["not_needed"] and study.trials[2].state == TrialState.FAIL
    assert [
        r.getMessage()
        for r in caplog.records
        if r.name.startswith("kdnas") and "not needed" in r.getMessage()
    ] == ["Trial 2 is not needed: others train the last candidates, or the time is over."]


def test_a_worker_that_is_interrupted_while_it_waits_queues_its_candidate_again(
    study, worker, monkeypatch
):
    running_trial(worker, ONE)
    for arch in (TWO, OTHER):
        study.enqueue_trial(arch.to_dict())

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kdnas.nas.search.time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        search(value_of, SPACE, study, n_trials=2)
    (waiting,) = study.get_trials(states=(TrialState.WAITING,))
    assert waiting.system_attrs["fixed_params"] == OTHER.to_dict()


def test_without_time_no_candidate_is_trained_and_the_message_says_so(study):
    with pytest.raises(
        UserError, match="No student within the budget was trained in 0 minutes: give more"
    ):
        search(value_of, SPACE, study, n_trials=2, seconds=0)
    assert study.trials == []


def test_a_worker_that_waits_goes_on_when_the_other_s_candidate_is_lost(study, worker, monkeypatch):
    busy = running_trial(worker, ONE)
    for arch in (TWO, OTHER):
        study.enqueue_trial(arch.to_dict())
    monkeypatch.setattr(
        "kdnas.nas.search.time.sleep", lambda seconds: worker.tell(busy, state=TrialState.FAIL)
    )
    evaluate = Recorded()
    search(evaluate, THREE, study, n_trials=3)
    assert sorted(map(str, evaluate.asked)) == sorted(map(str, (ONE, TWO, OTHER)))


# Refused and failed candidates


def test_refused_candidates_do_not_count(study):
    evaluate = Recorded(
        lambda t, arch: refuse(t, arch) if arch.hidden_size < 64 else value_of(t, arch)
    )
    best = search(evaluate, SPACE, study, n_trials=3)
    assert [arch.hidden_size for arch in map(arch_of, trained(study))] == [64, 64, 64]
    assert len(evaluate.asked) == len(set(evaluate.asked)) > 3
    assert best.constraints == {}
    assert set(states(study)) == {"COMPLETE", "PRUNED"}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            CandidateFailed("the training loss is nan at step 3"),
            "the training loss is nan at step 3",
        ),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
        (UserError("a mistake"), "UserError: a mistake"),
        (MemoryError(), "out of memory: MemoryError"),
        (
            RuntimeError("could not create a primitive"),
            "out of memory: could not create a primitive",
        ),
        (
            RuntimeError("could not create a primitive descriptor for the matmul primitive"),
            "RuntimeError: could not create a primitive descriptor for the matmul primitive",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            "out of memory: DefaultCPUAllocator: can't",
        ),
    ],
)
def test_a_candidate_that_raises_is_a_failed_trial_with_its_reason_and_the_search_goes_on(
    study, error, reason
):
    def evaluate(trial, arch):
        if trial.number == 0:
            raise error
        return 1.0

    best = search(evaluate, SPACE, study, n_trials=2)
    assert (best.value, study.trials[0].state) == (1.0, TrialState.FAIL)
    assert study.trials[0].user_attrs["failed"].startswith(reason)
    assert len(trained(study)) == 2


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_reward_that_is_no_number_is_a_failure_and_never_the_best(study, value):
    best = search(lambda trial, arch: 0.5 if trial.number else value, SPACE, study, n_trials=1)
    assert best.value == 0.5
    assert states(study)[0] == "FAIL"
    assert study.trials[0].user_attrs["failed"] == f"the reward is {value}"


def test_a_reward_that_is_nothing_is_a_failure_with_a_reason(study):
    search(lambda trial, arch: 0.5 if trial.number else None, SPACE, study, n_trials=1)
    assert study.trials[0].user_attrs["failed"].startswith("TypeError: ")


def test_when_nothing_but_failures_comes_the_search_ends_and_says_why(study):
    evaluate = Recorded(fail)
    with pytest.raises(CandidateFailed, match="the last one: the loss is nan"):
        search(evaluate, SPACE, study, n_trials=20)
    assert len(evaluate.asked) == MOST_FAILURES
    with pytest.raises(CandidateFailed, match="the last one: the loss is nan"):
        search(evaluate, SPACE, study, n_trials=20)
    assert len(evaluate.asked) == MOST_FAILURES


def test_failures_after_a_success_end_nothing(study):
    evaluate = Recorded(
        lambda t, arch: value_of(t, arch) if t.number in (0, MOST_FAILURES + 3) else fail(t, arch)
    )
    assert search(evaluate, SPACE, study, n_trials=2).state == TrialState.COMPLETE
    assert states(study).count("FAIL") > MOST_FAILURES


def test_one_failure_that_is_proposed_again_and_again_is_one_failure(study):
    for _ in range(MOST_FAILURES + 1):
        study.enqueue_trial(ONE.to_dict())
    evaluate = Recorded(lambda t, arch: fail(t, arch) if arch == ONE else value_of(t, arch))
    assert search(evaluate, SPACE, study, n_trials=1).state == TrialState.COMPLETE
    assert evaluate.asked.count(ONE) == 1


def test_a_small_space_of_failures_is_not_blamed_on_the_budget(study):
    evaluate = Recorded(lambda t, arch: refuse(t, arch) if arch == OTHER else fail(t, arch))
    with pytest.raises(
        CandidateFailed, match="Every candidate failed; the last one: the loss is n"
    ):
        search(evaluate, THREE, study, n_trials=20)
    assert len(evaluate.asked) == 3


def test_the_last_failure_is_named_even_where_a_refusal_came_after_it(study, worker):
    others = running_trial(worker, list(SPACE)[-1])
    for number in range(MOST_FAILURES):
        study.enqueue_trial(list(SPACE)[number].to_dict())

    def evaluate(trial, arch):
        if trial.number == MOST_FAILURES:  # meanwhile, elsewhere
            late = worker.ask()
            late.set_user_attr("arch", OTHER.to_dict())
            worker.tell(late, state=TrialState.PRUNED)
        raise CandidateFailed(f"reason {trial.number}")

    with pytest.raises(CandidateFailed, match=f"the last one: reason {MOST_FAILURES}"):
        search(evaluate, SPACE, study, n_trials=20)
    worker.tell(others, state=TrialState.FAIL)


def test_a_space_without_a_feasible_candidate_is_a_mistake_of_the_user(study):
    evaluate = Recorded(refuse)
    with pytest.raises(UserError, match="None of the 3 students meets the budget"):
        search(evaluate, THREE, study, n_trials=2)
    assert len(evaluate.asked) == 3


def test_trained_candidates_that_break_a_constraint_are_never_the_best(study):
    def evaluate(trial, arch):
        trial.set_constraint("budget", 0.5 if arch.num_hidden_layers > 1 else 0.0)
        return value_of(trial, arch)

    assert arch_of(search(evaluate, THREE, study, n_trials=3)) == ONE


def test_where_all_trained_candidates_break_a_constraint_there_is_no_best(study):
    def evaluate(trial, arch):
        trial.set_constraint("budget", 0.5)
        return value_of(trial, arch)

    with pytest.raises(UserError, match="meets the budget"):
        search(evaluate, THREE, study, n_trials=2)


def test_the_best_is_the_trial_that_was_trained_and_not_its_twin(study, worker):
    slow = running_trial(
        worker, OTHER
    )  # proposed before, and answered after, the one that is trained
    slow.set_user_attr("arch", None)  # not written down yet
    study.enqueue_trial(OTHER.to_dict())

    def evaluate(trial, arch):
        if arch != OTHER and slow.number not in [
            t.number for t in study.trials if t.state == TrialState.COMPLETE
        ]:
            slow.set_user_attr("arch", OTHER.to_dict())
            slow.set_user_attr("twin_of", 1)
            worker.tell(slow, value_of(slow, OTHER))
        return value_of(trial, arch)

    assert search(evaluate, THREE, study, n_trials=3).number == 1


# Interruptions


def test_an_interrupted_candidate_is_tried_first_when_the_search_goes_on(study, reopen):
    def interrupt(trial, arch):
        if trial.number == 1:
            raise KeyboardInterrupt
        return value_of(trial, arch)

    evaluate = Recorded(interrupt)
    with pytest.raises(KeyboardInterrupt):
        search(evaluate, SPACE, study, n_trials=3)
    assert states(study) == ["COMPLETE", "FAIL", "WAITING"]
    assert study.trials[1].user_attrs["failed"] == "interrupted (KeyboardInterrupt); tried again"
    again = Recorded()
    search(again, SPACE, reopen(), n_trials=3)
    assert again.asked[0] == evaluate.asked[1]
    assert len(again.asked) == 2
    assert len(trained(study)) == 3


@pytest.mark.parametrize(
    "stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]
)
def test_interruptions_are_no_failures_and_tried_again_each_time(study, reopen, stop):
    def interrupt(trial, arch):
        raise stop

    evaluate = Recorded(interrupt)
    for _ in range(MOST_FAILURES + 1):
        with pytest.raises(type(stop)):
            search(evaluate, SPACE, reopen(), n_trials=1)
    assert len(set(evaluate.asked)) == 1
    assert search(value_of, SPACE, reopen(), n_trials=1).number == MOST_FAILURES + 1


@pytest.mark.parametrize("moment", ["asks", "begins", "has trained", "tells", "stores"])
def test_a_signal_outside_of_a_training_leaves_no_trial_running(moment, study, reopen, monkeypatch):
    """Optuna's own code: between a trial's row and its training, and between that and the end that is stored."""
    place, name = {
        "asks": (study.sampler, "before_trial"),
        "begins": (HeartbeatThread, "start"),
        "has trained": (HeartbeatThread, "join"),
        "tells": (study.sampler, "after_trial"),
        "stores": (RDBStorage, "set_trial_state_values"),
    }[moment]
    call, stops = getattr(place, name), []

    def stop_once(*args: Any, **options: Any) -> Any:
        if stops or TrialState.RUNNING in args:  # the latter takes it from the queue
            return call(*args, **options)
        if moment == "has trained":
            call(*args, **options)
        stops.append(moment)
        raise Terminated

    study.enqueue_trial(ONE.to_dict())
    with monkeypatch.context() as patch, pytest.raises(Terminated):
        patch.setattr(place, name, stop_once)
        search(value_of, THREE, study, n_trials=1)
    assert stops and "RUNNING" not in states(study)
    evaluate = Recorded()
    search(evaluate, THREE, reopen(), n_trials=1)
    assert [arch_of(trial) for trial in trained(study)] == [ONE]
    assert len(evaluate.asked) == (moment != "tells"), "its end is stored even so"
    assert not any("retry_of" in trial.user_attrs for trial in study.trials), "it died of nothing"


def test_a_signal_that_a_loaders_worker_hears_first_is_no_failure(study):
    def end(trial, arch):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. ")

    with pytest.raises(Terminated):
        search(end, SPACE, study, n_trials=1)
    assert states(study) == ["FAIL", "WAITING"] and failure_of(study.trials[0]) is None


def test_memory_that_a_call_of_the_system_lacks_is_the_candidates_fault(study):
    def fail_first(trial, arch):
        if trial.number == 0:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return value_of(trial, arch)

    search(fail_first, SPACE, study, n_trials=2)
    assert states(study) == ["FAIL", "COMPLETE", "COMPLETE"]
    assert (
        study.trials[0].user_attrs["failed"] == "out of memory: [Errno 12] Cannot allocate memory"
    )


class FailingRows(Dataset):
    def __init__(self, *error: object) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, row: int) -> None:
        raise OSError(*self.error)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ((errno.EIO, "Input/output error", "rows.bin"), "[Errno 5] Input/output error: 'rows.bin'"),
        (("a stale handle",), "OSError: a stale handle"),
    ],
)
def test_a_disk_that_fails_in_a_loaders_worker_is_no_fault_of_the_candidate(study, error, told):
    def read(trial, arch):
        next(iter(DataLoader(FailingRows(*error), num_workers=1)))

    with pytest.raises(OSError) as caught:
        search(read, SPACE, study, n_trials=1)
    assert str(caught.value) == told
    assert states(study) == ["FAIL", "WAITING"]
    assert study.trials[0].user_attrs["failed"] == f"interrupted ({told}); tried again"


def test_a_file_that_a_loaders_worker_does_not_find_is_the_candidates_fault(study):
    def read_first(trial, arch):
        if trial.number == 0:
            next(
                iter(
                    DataLoader(
                        FailingRows(errno.ENOENT, "No such file or directory"), num_workers=1
                    )
                )
            )
        return value_of(trial, arch)

    search(read_first, SPACE, study, n_trials=1)
    assert (
        study.trials[0].user_attrs["failed"]
        == "FileNotFoundError: [Errno 2] No such file or directory"
    )


def test_an_error_of_the_candidates_own_code_without_a_number_is_its_fault(study):
    def no_source(trial, arch):
        if trial.number == 0:
            raise OSError("could not get source code")
        return value_of(trial, arch)

    search(no_source, SPACE, study, n_trials=1)
    assert study.trials[0].user_attrs["failed"] == "OSError: could not get source code"


def test_a_trial_ends_and_is_queued_again_at_one_instant(study, reopen, monkeypatch):
    def killed(*args):
        raise SystemExit

    with monkeypatch.context() as patch:

        def interrupt(trial, arch):
            patch.setattr(kdnas.nas.storage.PatientStorage, "_get_prepared_new_trial", killed)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            search(interrupt, SPACE, study, n_trials=1)
    assert states(study) == ["RUNNING"], "neither has happened"
    study = reopen()
    assert states(study) == ["FAIL", "WAITING"]
    assert study.trials[1].user_attrs["again"] == 0


def answer(trial: optuna.Trial, arch: StudentArch) -> float:
    """Every way to end."""
    if arch.hidden_act == "relu" and arch.hidden_size == 32:
        raise ZeroDivisionError("by zero")
    if arch.num_hidden_layers > 4:
        return refuse(trial, arch)
    return value_of(trial, arch)


def test_a_search_that_was_stopped_between_trials_goes_on_as_if_it_had_not_been(url):
    def stop(study: Study, trial: FrozenTrial) -> None:
        if trial.number in (0, 5, 9):
            raise KeyboardInterrupt

    unbroken = open_study(url, "unbroken", {}, make_sampler("tpe", 3))
    search(answer, SPACE, unbroken, n_trials=9)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            search(answer, SPACE, open_study(url, "broken", {}, make_sampler("tpe", 3)), 9, [stop])
    search(answer, SPACE, open_study(url, "broken", {}, make_sampler("tpe", 3)), n_trials=9)
    broken = optuna.load_study(storage=url, study_name="broken")
    assert story(broken) == story(unbroken)
    assert {"COMPLETE", "PRUNED", "FAIL"} <= set(states(broken)) and len(broken.trials) > 10
    other = open_study(url, "other", {}, make_sampler("tpe", 4))
    search(answer, SPACE, other, n_trials=2)
    assert story(other)[:2] != story(unbroken)[:2]


@pytest.mark.parametrize(
    "stop", [SystemExit, KeyboardInterrupt]
)  # nobody hears of the first: the trial stays as it is
@pytest.mark.parametrize("where", ["training", "proposing"])
def test_a_search_that_was_stopped_within_trials_trains_what_the_unbroken_one_does(
    url, where, stop
):
    class Stopping(SearchSpace):
        def suggest(self, trial):
            trial.suggest_categorical("num_hidden_layers", self.choices["num_hidden_layers"])
            perhaps_stop("proposing")
            return super().suggest(trial)

    def perhaps_stop(at):
        calls.append(at)
        if at == where and calls.count(at) in (1, 4, 8):
            raise stop

    def finished(study):
        """Without numbers: those of the trials that were broken off are gone."""
        reasons = [t.user_attrs.get("failed", "") for t in study.trials]
        kept = [
            t
            for t, why in zip(study.trials, reasons, strict=True)
            if t.state.name != "FAIL" or "by zero" in why
        ]
        return [(t.params, t.value, t.state, "twin_of" in t.user_attrs) for t in kept]

    calls = []

    def stopped(trial, arch):
        perhaps_stop("training")
        return answer(trial, arch)

    def open_it(name):
        return open_study(url, name + where + stop.__name__, {}, make_sampler("tpe", 3))

    search(answer, SPACE, open_it("unbroken"), n_trials=9)
    for _ in range(3):
        with pytest.raises(stop):
            search(stopped, Stopping(SPACE.choices), open_it("broken"), n_trials=9)
    search(stopped, Stopping(SPACE.choices), open_it("broken"), n_trials=9)
    assert finished(open_it("broken")) == finished(open_it("unbroken"))


# Dead workers

WORKER = """
import os, sys, time
from pathlib import Path
from tests.nas.test_search import SPACE, Engine, event, hurry, open_study, search, value_of, wait_for
url, folder, role = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
event.listen(Engine, "connect", hurry)

def evaluate(trial, arch):
    if role == "dies" and trial.number == 2:
        (folder / "at it").touch()
        time.sleep(600)
    if role == "shares":  # neither is done before both have begun
        (folder / f"{os.getpid()}.begun").touch()
        wait_for(lambda: len(list(folder.glob("*.begun"))) == 2)
    return value_of(trial, arch)

search(evaluate, SPACE, open_study(url, "s", {}), n_trials=6)
"""


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def start_worker(folder: Path, role: str) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join([str(Path(__file__).parents[2])])
    arguments = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        WORKER,
        f"sqlite:///{folder}/study.db",
        str(folder),
        role,
    ]
    return subprocess.Popen(arguments, env=os.environ | {"PYTHONPATH": paths})


def test_the_trial_of_a_killed_worker_is_tried_again_once(tmp_path):
    process = start_worker(tmp_path, "dies")
    wait_for(lambda: (tmp_path / "at it").exists() or process.poll() is not None)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    study = open_study(f"sqlite:///{tmp_path}/study.db", "s", {})
    assert states(study) == ["COMPLETE", "COMPLETE", "FAIL", "WAITING"]
    evaluate = Recorded()
    search(evaluate, SPACE, study, n_trials=6)
    dead = study.trials[2]
    assert evaluate.asked[0] == arch_of(dead)
    assert evaluate.asked.count(arch_of(dead)) == 1
    assert study.trials[3].user_attrs["retry_of"] == 2
    assert len(trained(study)) == len({arch_of(trial) for trial in trained(study)}) == 6
    assert [trial.number for trial in study.trials] == list(range(len(study.trials)))
    assert not {"RUNNING", "WAITING"} & set(states(study))


def test_a_trial_that_died_twice_is_not_queued_again(study, reopen):
    def die(trial, arch):
        raise SystemExit  # nobody hears of it: the trial stays as it was

    evaluate = Recorded(die)
    for left in (["RUNNING"], ["FAIL", "RUNNING"]):
        with pytest.raises(SystemExit):
            search(evaluate, SPACE, reopen(), n_trials=1)
        assert states(study) == left
    assert evaluate.asked[0] == evaluate.asked[1]
    assert states(reopen()) == ["FAIL", "FAIL"]


def test_a_trial_that_died_before_it_had_an_architecture_is_no_obstacle(study, reopen):
    class Deadly(SearchSpace):
        def suggest(self, trial):
            raise SystemExit

    with pytest.raises(SystemExit):
        search(value_of, Deadly(SPACE.choices), study, n_trials=2)
    again = reopen()
    assert states(again)[0] == "FAIL" and "arch" not in again.trials[0].user_attrs
    search(value_of, SPACE, again, n_trials=2)
    assert len(trained(study)) == 2
    assert "RUNNING" not in states(study)


@pytest.mark.parametrize("again", [False, True])
def test_a_trial_that_died_before_it_had_an_architecture_is_tried_again_once(study, reopen, again):
    """What it takes the place of may have been interrupted, or have died itself, in its training."""
    if again:
        SPACE.suggest(running_trial(study, ONE, pid=2**22 + 1))
        study = reopen()
    for left in ("WAITING", "FAIL"):
        study.ask()
        number = study.trials[-1].number
        study._storage.set_trial_user_attr(study.trials[-1]._trial_id, "pid", 2**22 + 1)
        study = reopen()
        assert states(study)[-1] == left
        if left == "WAITING":
            attrs = {"again": number, "unbegun": True} | ({"retry_of": 0} if again else {})
            assert study.trials[-1].user_attrs == attrs
            assert study.trials[-1].system_attrs["fixed_params"] == (ONE.to_dict() if again else {})
    assert not any(failure_of(trial) for trial in study.trials), "it was no candidate's fault"


@pytest.mark.parametrize("is_retry", [False, True])
@pytest.mark.parametrize("moment", ["it looks for the dead", "it says why"])
def test_a_signal_beside_a_training_has_the_trial_tried_again(
    moment, is_retry, study, reopen, monkeypatch
):
    def stop(*args, **options):
        raise KeyboardInterrupt

    def say(trial, name, value, set_user_attr=optuna.Trial.set_user_attr):
        if name == "failed":
            raise KeyboardInterrupt
        set_user_attr(trial, name, value)

    study.enqueue_trial(ONE.to_dict(), user_attrs={"retry_of": 7} if is_retry else None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if moment == "it says why":
            patch.setattr(optuna.Trial, "set_user_attr", say)
        else:
            patch.setattr(kdnas.nas.search, "bury_dead", stop)
        search(stop, THREE, study, n_trials=1)
    assert states(study) == ["FAIL", "WAITING"]
    assert study.trials[1].system_attrs["fixed_params"] == ONE.to_dict()
    evaluate = Recorded()
    search(evaluate, THREE, reopen(), n_trials=1)
    assert evaluate.asked == [ONE] and states(study) == ["FAIL", "COMPLETE"]


def test_a_kill_after_a_signal_has_a_candidate_tried_again_though_it_is_one_that_was(study, reopen):
    THREE.suggest(
        running_trial(
            study, ONE, pid=2**22 + 1, retry_of=7, failed="interrupted (SIGTERM); tried again"
        )
    )
    running_trial(study, TWO, pid=2**22 + 1, failed="the reward is nan")
    assert states(reopen()) == ["FAIL", "FAIL", "WAITING"], "the other one failed by its own fault"
    assert (
        study.trials[2].system_attrs["fixed_params"] == study.trials[0].system_attrs["fixed_params"]
    )
    assert [failure_of(trial) for trial in study.trials[:2]] == [None, "the reward is nan"]


@pytest.mark.parametrize(
    "attrs",
    [
        {"host": "elsewhere", "pid": 2**22 + 1},
        {
            "host": f"{platform.node()}-f0000abc",
            "pid": 2**22 + 1,
        },  # in a container that shares this machine's name
        {"host": platform.node(), "pid": 2**22 + 1},  # perhaps in one: studies did not always say
        {"begun": process_start(os.getppid())},
    ],
)
def test_trials_of_the_living_and_of_other_machines_are_left_alone(study, reopen, attrs):
    running_trial(study, ONE, **attrs)
    assert states(reopen()) == ["RUNNING"]


def test_a_number_that_another_process_has_now_is_no_life(study, reopen):
    running_trial(study, ONE, begun="before the machine was started again 77")
    assert states(reopen()) == ["FAIL", "WAITING"]


def test_who_is_slow_is_alive_and_other_machines_are_given_up_later(study, reopen):
    """A clock that was set, or a process that was stopped for an hour."""
    here = running_trial(study, ONE, begun=process_start(os.getppid()))
    there = running_trial(study, TWO, host="elsewhere")
    for trial in (here, there):
        study._storage.record_heartbeat(trial._trial_id)
    with study._storage._backend.engine.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour')"
        )
    optuna.storages.fail_stale_trials(study)
    assert states(study) == ["RUNNING", "FAIL", "WAITING"]
    assert (
        kdnas.nas.storage.GRACE_SECONDS
        > kdnas.nas.storage.PATIENCE_SECONDS + kdnas.nas.storage.HEARTBEAT_SECONDS
    )


def test_a_machine_that_died_before_the_first_beat_is_given_up_too(study):
    trial = running_trial(study, ONE, host="elsewhere")
    with study._storage._backend.engine.begin() as connection:  # in another time zone
        connection.exec_driver_sql(
            "UPDATE trials SET datetime_start = '2001-01-01 00:00:00' WHERE state = 'RUNNING'"
        )
    optuna.storages.fail_stale_trials(study)
    assert states(study) == ["RUNNING"]
    trial.set_user_attr("since", time.time() - 2 * kdnas.nas.storage.GRACE_SECONDS)
    optuna.storages.fail_stale_trials(study)
    assert states(study) == ["FAIL", "WAITING"]


@pytest.mark.parametrize("when", ["it writes", "it ends"])
def test_a_worker_whose_trial_was_given_up_goes_on_with_the_next(when, study, worker, caplog):
    def give_up(trial, arch):
        if trial.number == 0:
            end_trial(worker, worker.trials[0], "died", "its heart did not beat")
            if when == "it writes":
                trial.set_user_attr("loss", 0.5)
        return value_of(trial, arch)

    search(give_up, SPACE, study, n_trials=2)
    assert states(study) == ["FAIL", "COMPLETE", "COMPLETE"]
    assert "Trial 0 was given up" in caplog.text


def test_a_process_of_another_user_is_alive(study, reopen, monkeypatch):
    def forbid(pid, sign):
        raise PermissionError

    monkeypatch.setattr(os, "kill", forbid)
    running_trial(study, ONE, pid=os.getpid() + 1)
    assert states(reopen()) == ["RUNNING"]


@pytest.mark.parametrize("queued", [False, True])
def test_a_trial_has_its_process_from_its_first_instant(queued, study, worker, reopen, monkeypatch):
    """A kill between two writes would leave it running for ever: nobody could tell whose it is."""
    if queued:
        study.enqueue_trial(ONE.to_dict())
    monkeypatch.setattr(kdnas.nas.storage.os, "getpid", lambda: 2**22 + 1)
    study.ask()
    (trial,) = worker.get_trials(deepcopy=False)
    assert (trial.state, trial.user_attrs["pid"]) == (TrialState.RUNNING, 2**22 + 1)
    monkeypatch.undo()
    again = reopen()
    assert states(again) == ["FAIL", "WAITING"]
    assert again.trials[1].system_attrs["fixed_params"] == (ONE.to_dict() if queued else {})


def test_a_queued_trial_that_another_took_keeps_its_process(study, reopen):
    other = reopen()
    study.enqueue_trial(ONE.to_dict())
    other.ask()
    trial = other.trials[0]
    other._storage.set_trial_user_attr(trial._trial_id, "pid", os.getppid())
    assert not study._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
    assert other.trials[0].user_attrs["pid"] == os.getppid()


def test_who_kills_its_process_is_known_to_the_next_one(study, reopen, monkeypatch):
    seen = []
    search(
        lambda trial, arch: seen.append(supervisor._at_candidate[0]) or 1.0,
        SPACE,
        study,
        n_trials=1,
    )
    assert seen == [1] and not supervisor._at_candidate[0]
    monkeypatch.setitem(supervisor.EARLIER.deaths, 2**22 + 1, "SIGSEGV")
    running_trial(study, ONE, pid=2**22 + 1, retry_of=7)
    assert failure_of(reopen().trials[-1]) == "its process died (SIGSEGV), as that of trial 7 did"


def test_two_workers_that_start_after_a_crash_queue_its_trial_once(
    study, reopen, worker, monkeypatch
):
    dead = running_trial(worker, ONE, pid=2**22 + 1)

    def other_was_first(pid, begun):
        worker.tell(dead, state=TrialState.FAIL)
        return False

    monkeypatch.setattr(kdnas.nas.storage, "is_alive", other_was_first)
    assert states(reopen()) == ["FAIL"]


# Several workers


def test_two_workers_share_one_study(tmp_path):
    """What holds: nothing is lost, each number is given once, and no candidate too many is trained."""
    workers = [start_worker(tmp_path, "shares") for _ in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    study = optuna.load_study(storage=f"sqlite:///{tmp_path}/study.db", study_name="s")
    assert [trial.number for trial in study.trials] == list(range(len(study.trials)))
    assert (
        len({trial.user_attrs["pid"] for trial in study.trials if "pid" in trial.user_attrs}) == 2
    )
    assert len(trained(study)) == 6
    assert {"COMPLETE"} <= set(states(study)) <= {"COMPLETE", "WAITING", "FAIL"}
    assert all(
        "not_needed" in trial.user_attrs for trial in study.get_trials(states=(TrialState.FAIL,))
    )
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    for i, trial in enumerate(complete):
        for other in complete[:i]:
            if arch_of(trial) == arch_of(other) and not {"twin_of"} & {
                *trial.user_attrs,
                *other.user_attrs,
            }:
                assert (
                    trial.datetime_start < other.datetime_complete
                )  # both were at it at the same time
                assert other.datetime_start < trial.datetime_complete


def test_an_architecture_that_two_workers_trained_at_the_same_time_counts_once(study, worker):
    other = running_trial(worker, ONE)
    other.set_user_attr("arch", None)  # not written down yet: both begin at one instant
    study.enqueue_trial(ONE.to_dict())

    def evaluate(trial, arch):
        if arch == ONE:
            other.set_user_attr("arch", ONE.to_dict())
            worker.tell(other, 1.0)
        return value_of(trial, arch)

    search(evaluate, SPACE, study, n_trials=2)
    assert [arch_of(trial) for trial in trained(study)] == [ONE, arch_of(study.trials[2])]


def test_a_queued_trial_is_taken_by_one_worker(url, reopen, monkeypatch):
    """SQLite alone would let both read that it waits before either writes that it runs."""
    studies = [reopen(), reopen()]
    studies[0].enqueue_trial(ONE.to_dict())
    both_have_read = threading.Barrier(2)
    check = optuna.storages.RDBStorage.check_trial_is_updatable

    def check_and_wait(storage, *args):
        check(storage, *args)
        with suppress(threading.BrokenBarrierError):
            both_have_read.wait(timeout=0.3)

    monkeypatch.setattr(optuna.storages.RDBStorage, "check_trial_is_updatable", check_and_wait)
    numbers: list[int] = []
    threads = [threading.Thread(target=lambda s=s: numbers.append(s.ask().number)) for s in studies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == [0, 1]


def test_two_workers_may_make_the_tables_at_the_same_moment(url, reopen, monkeypatch):
    storage, pauses = kdnas.nas.storage.PatientStorage, []

    def first_fails(*args, **options):
        if not pauses:
            raise OperationalError(
                "CREATE TABLE studies", {}, Exception("table studies already exists")
            )
        return storage(*args, **options)

    monkeypatch.setattr(kdnas.nas.storage, "PatientStorage", first_fails)
    monkeypatch.setattr(kdnas.nas.storage.time, "sleep", pauses.append)
    assert reopen().trials == []
    assert len(pauses) == 1


# Identity


def test_a_study_goes_on_with_the_identity_it_was_made_with(url):
    identity = {"teacher": "abc", "space": {"hidden_size": [32, 64]}, "rate": 0.1, "budget": None}
    open_study(url, "same", identity)
    study = open_study(url, "same", dict(identity))
    assert study.user_attrs["identity"] == identity
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    assert study.trials == []


def test_another_identity_is_refused_with_each_difference_and_a_new_name(url):
    open_study(url, "taken", {"teacher": "abc", "seed": 0, "rate": 0.1, "old": 1})
    with pytest.raises(UserError) as caught:
        open_study(url, "taken", {"teacher": "abc", "seed": 5, "rate": "x", "new": [2]})
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "'taken'",
        "seed: 0 there, 5 now",
        "rate: 0.1 there, 'x' now",
        "old: 1 there, the default now",
        "new: the default there, [2] now",
        "--name taken-2",
    ):
        assert part in message
    assert "teacher" not in message
    assert (
        open_study(url, "taken", {"teacher": "abc", "seed": 0, "rate": 0.1, "old": 1}).trials == []
    )


def test_equal_settings_are_not_refused():
    refuse_difference("s", {}, {})
    refuse_difference("s", {"a": [1, {"b": None}]}, {"a": [1, {"b": None}]})


def test_studies_of_one_database_do_not_mix(url):
    first, second = (open_study(url, name, {"name": name}) for name in ("first", "second"))
    search(value_of, SPACE, first, n_trials=1)
    assert (len(first.trials), len(second.trials)) == (1, 0)


@pytest.mark.parametrize("error", [ValueError("no"), optuna.TrialPruned("no")])
def test_what_a_failed_candidate_held_is_given_back_before_anything_follows(study, error):
    class Held:
        pass

    refs, alive = [], []

    def evaluate(trial, arch):
        held = Held()
        refs.append(weakref.ref(held))
        if len(refs) == 1:
            raise type(error)(*error.args)
        return 1.0

    gc.disable()
    try:
        search(
            evaluate, SPACE, study, 2, [lambda study, trial: alive.append(refs[0]() is not None)]
        )
    finally:
        gc.enable()
    assert len(alive) > 1 and not any(alive)
