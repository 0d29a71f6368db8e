"""The search loop with candidates that are functions: totals, twins, failures, kills, the pruner."""

import errno
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
from optuna.pruners import MedianPruner, ThresholdPruner
from optuna.storages import InMemoryStorage

from kdnas.models.arch import StudentArch
from kdnas.nas.record import MOST_FAILURES, MOST_IN_A_ROW
from kdnas.nas.trials import Outcome, failed, trained, tried
from kdnas.system.engine import Engine
from kdnas.system.errors import CandidateFailed, UserError
from kdnas.system.jobs import Job, Reporter
from tests.nas.fakes import (
    ONE,
    OTHER,
    SPACE,
    THREE,
    TWO,
    End,
    Fake,
    end_well,
    outcome,
    refuse,
    value_of,
)


def fail(arch: StudentArch, folder: Path) -> Outcome:
    raise CandidateFailed("the loss is nan")


def raising(error: BaseException) -> End:
    def end(arch: StudentArch, folder: Path) -> Outcome:
        raise error

    return end


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Fake]:
    """Makes a search in a folder of its own; the arguments are those of ``Fake``."""
    names = iter("abcdefgh")
    return lambda *args, **options: Fake(tmp_path / next(names), *args, **options)


# Totals


def test_it_stops_when_so_many_distinct_candidates_are_trained(make):
    fake = make()
    best = fake.search(9)
    assert len(fake.trained) == len(set(fake.trained)) == len(trained(fake.open())) == 9
    assert best.value == max(map(value_of, fake.trained))


def test_n_trials_is_a_total_over_all_starts_and_a_later_start_goes_on_as_the_unbroken_one(make):
    broken, unbroken = make(), make()
    broken.search(2)
    assert len(broken.trained) == 2
    best = broken.search(5)
    unbroken.search(5)
    assert broken.trained == unbroken.trained and broken.story == unbroken.story
    for total in (5, 3):
        assert broken.search(total).number == best.number
    assert len(broken.trained) == 5


def test_a_space_smaller_than_n_trials_is_exhausted_and_the_search_ends(make):
    fake = make(space=THREE)
    best = fake.search(10)
    assert sorted(arch.num_hidden_layers for arch in fake.trained) == [1, 2, 3]
    assert best.user_attrs["arch"] == OTHER.to_dict()
    fake.search(20)
    assert len(fake.trained) == 3


def test_every_trial_that_has_ended_is_shown_once_and_what_runs_is_watched(make):
    fake, seen, watched = make(special={ONE: fail, TWO: refuse}), [], []

    def watch(jobs: Sequence[Job]) -> None:
        watched.extend(job.title for job in jobs)

    def slowly(arch: StudentArch, folder: Path) -> Outcome:
        while len(watched) < 2:
            time.sleep(0.01)
        return end_well(arch, folder)

    fake.end = slowly
    fake.queue(ONE, TWO, TWO, ONE, OTHER)
    fake.search(1, show=lambda trial: seen.append((trial.number, trial.state.name)), watch=watch)
    ended = ["FAIL", "PRUNED", "PRUNED", "FAIL", "COMPLETE"]
    assert seen == list(enumerate(ended)) and watched[0] == f"trial 4: {OTHER}"


def test_without_time_one_candidate_is_trained_and_what_runs_is_finished(make):
    fake = make(special={TWO: refuse})
    fake.queue(TWO, ONE)
    assert fake.search(3, seconds=0).number == 1
    assert fake.states == ["PRUNED", "COMPLETE"]

    fake = make()

    def slowly(arch: StudentArch, folder: Path) -> Outcome:
        time.sleep(0.5)
        return end_well(arch, folder)

    fake.end = slowly
    assert fake.search(3, seconds=0.4).number == 0
    assert fake.states == ["COMPLETE"]


def test_two_slots_train_two_at_a_time_and_no_more_than_asked(make):
    fake, both = make(), threading.Barrier(2)

    def together(arch: StudentArch, folder: Path) -> Outcome:
        both.wait(timeout=30)
        return end_well(arch, folder)

    fake.end = together
    fake.search(6, Engine(2, ThreadPoolExecutor(2)))
    assert len(fake.trained) == len(set(fake.trained)) == 6
    assert [number for number, *_ in fake.story] == list(range(len(fake.trials)))


def test_the_first_shapes_are_proposed_in_order_until_one_is_not_refused(make):
    fake = make(special={OTHER: refuse})
    first = [OTHER, TWO, ONE]
    fake.search(1, first=first)
    assert [trial.user_attrs["arch"] for trial in fake.trials] == [OTHER.to_dict(), TWO.to_dict()]
    fake.search(3, first=first)  # goes on with the sampler's
    assert fake.trained[:2] == [OTHER, TWO] and len(set(fake.trained)) == 4


# Twins


@pytest.mark.parametrize("end", [end_well, refuse, fail])
def test_a_known_shape_is_answered_from_its_record(make, end):
    fake = make(special={ONE: end})
    fake.queue(ONE, ONE, ONE)
    fake.search(2)
    first, *twins = fake.trials[:3]
    assert fake.trained.count(ONE) == 1
    for twin in twins:
        known = first.user_attrs | {"twin_of": 0}
        assert twin.user_attrs == known
        assert (twin.state, twin.value) == (first.state, first.value)
        assert twin.constraints == first.constraints
    assert len(tried(fake.open())) == 2


def test_after_a_twin_comes_one_that_the_study_does_not_know(make):
    fake = make()
    fake.queue(ONE, ONE, TWO, TWO)
    fake.search(4)
    *known, third, fourth = fake.trials
    assert [trial.user_attrs.get("twin_of") for trial in known] == [None, 0, None, 2]
    assert [trial.user_attrs["queued_for"] for trial in (third, fourth)] == [1, 3]
    assert len(set(fake.trained)) == 4
    assert fake.trained[2] != next(arch for arch in SPACE if arch not in (ONE, TWO)), "it is drawn"


def test_a_shape_that_is_in_training_is_not_trained_beside_itself(make):
    fake, busy = make(space=THREE), threading.Event()

    def slowly(arch: StudentArch, folder: Path) -> Outcome:
        assert busy.wait(30)
        return end_well(arch, folder)

    def others(arch: StudentArch, folder: Path) -> Outcome:
        busy.set()
        return end_well(arch, folder)

    fake.end, fake.special = others, {ONE: slowly}
    fake.queue(ONE, ONE, ONE)
    assert fake.search(3, Engine(2, ThreadPoolExecutor(2))).user_attrs["arch"] == OTHER.to_dict()
    assert sorted(map(str, fake.trained)) == sorted(map(str, THREE))
    assert fake.states == ["COMPLETE", "FAIL", "FAIL", "COMPLETE", "COMPLETE"], "nothing to say yet"


# Refused and failed


def test_refused_candidates_do_not_count(make):
    narrow = {arch: refuse for arch in SPACE if arch.hidden_size < 64}
    fake = make(special=narrow)
    best = fake.search(3)
    assert [trial.params["hidden_size"] for trial in trained(fake.open())] == [64, 64, 64]
    assert len(fake.trained) > 3 and best.constraints == {"budget": 0.0}


def test_a_space_without_a_feasible_candidate_is_a_mistake_of_the_user(make):
    fake = make(refuse, space=THREE)
    with pytest.raises(
        UserError, match="None of the 3 students meets the budget: loosen its limits"
    ):
        fake.search(2)
    assert len(fake.trained) == 3


def test_the_best_is_within_the_budget_and_not_its_twin(make):
    beyond = outcome(OTHER, constraints={"budget": 0.5})
    fake = make(space=THREE, special={OTHER: lambda arch, folder: beyond})
    fake.queue(TWO, TWO)
    assert fake.search(3).number == 0


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (CandidateFailed("the training loss is nan at step 3"), "the training loss is nan at"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
        (UserError("a mistake"), "UserError: a mistake"),
        (FileNotFoundError(errno.ENOENT, "No such file", "rows"), "FileNotFoundError: "),
        (MemoryError(), "out of memory: MemoryError"),
        (RuntimeError("could not create a primitive"), "out of memory: could not create"),
        (RuntimeError("could not create a primitive descriptor"), "RuntimeError: could not"),
        (RuntimeError("CPUAllocator: can't allocate memory: 9"), "out of memory: CPUAllocator:"),
    ],
)
def test_a_candidate_that_raises_is_a_failed_trial_and_the_search_goes_on(make, error, reason):
    fake = make(special={ONE: raising(error)})
    fake.queue(ONE)
    assert fake.search(2).state.name == "COMPLETE"
    failed = fake.trials[0]
    assert failed.state.name == "FAIL" and failed.user_attrs["failed"].startswith(reason)
    assert failed.params == failed.user_attrs["arch"] == ONE.to_dict()
    assert len(trained(fake.open())) == 2


def test_a_failed_candidate_keeps_what_it_had_measured(make):
    def measured(arch: StudentArch, folder: Path) -> Outcome:
        Reporter(folder).tell(at_once=True, attrs={"latency_ms": 2.5})
        raise CandidateFailed("the loss is nan")

    fake = make(special={ONE: measured})
    fake.queue(ONE)
    fake.search(1)
    assert fake.trials[0].user_attrs["latency_ms"] == 2.5


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_reward_that_is_no_number_is_a_failure_and_never_the_best(make, value):
    fake = make(special={ONE: lambda arch, folder: outcome(arch, value=value)})
    fake.queue(ONE)
    assert math.isfinite(fake.search(1).value)
    assert fake.states == ["FAIL", "COMPLETE"]


def test_when_nothing_but_failures_comes_the_search_ends_and_says_why(make):
    fake = make(fail)
    for _ in range(2):
        with pytest.raises(
            CandidateFailed, match="Every candidate failed, the last one with: the loss"
        ):
            fake.search(20)
        assert len(fake.trained) == MOST_FAILURES


def test_one_failure_that_is_proposed_again_and_again_is_one_failure(make):
    fake = make(special={ONE: fail})
    fake.queue(*[ONE] * (MOST_FAILURES + 1))
    assert fake.search(1).state.name == "COMPLETE"
    assert fake.trained.count(ONE) == 1


def test_some_failures_after_a_success_end_nothing_but_many_in_a_row_end_the_search(make):
    fake = make(fail, special={ONE: end_well})
    fake.queue(ONE)
    for start in (1, 2):  # the next start tries others, in case what failed is mended
        told = f"The last {MOST_IN_A_ROW} candidates failed, the last one with: the loss is nan"
        with pytest.raises(CandidateFailed, match=told):
            fake.search(2)
        assert len(failed(fake.open())) == start * MOST_IN_A_ROW
    fake.end = end_well
    assert fake.search(2).state.name == "COMPLETE" and len(trained(fake.open())) == 2


def test_a_disk_that_fails_is_no_fault_of_the_candidate(make):
    fake = make(special={ONE: raising(OSError(errno.ENOSPC, "No space left on device"))})
    fake.queue(ONE)
    with pytest.raises(OSError, match="No space left"):
        fake.search(2)
    assert fake.states == ["RUNNING"]
    fake.special = {}
    fake.search(2)
    assert fake.trained[:2] == [ONE, ONE] and fake.states == ["COMPLETE", "COMPLETE"]


# The pruner


def reporting(scores: dict[StudentArch, Sequence[float]]) -> End:
    """A candidate that asks after each epoch, as ``PruneByHeldOutLoss`` does."""

    def end(arch: StudentArch, folder: Path) -> Outcome:
        reporter, reports = Reporter(folder), {}
        for epoch, score in enumerate(scores.get(arch, (0.9, 0.9))):
            reports[str(epoch)] = score
            reporter.tell(at_once=True, reports=reports)
            if not reporter.may_go_on(epoch):
                why = f"after epoch {epoch + 1}"
                return outcome(arch, "PRUNED", attrs={"stopped_early": why}, reports=reports)
        return outcome(arch, reports=reports)

    return end


def test_the_pruner_is_asked_after_each_epoch_and_what_it_ended_counts(make):
    fake = make(reporting({ONE: (0.9, 0.2, 0.9)}), pruner=ThresholdPruner(lower=0.5))
    fake.queue(ONE, TWO)
    fake.search(2)
    assert fake.states == ["PRUNED", "COMPLETE"], "both count as tried"
    first, second = fake.trials
    assert first.intermediate_values == {0: 0.9, 1: 0.2}
    assert second.intermediate_values == {0: 0.9, 1: 0.9}
    assert not [*fake.run.trial(0).glob("*_on_*"), *fake.run.trial(0).glob("prune_*")]


def test_the_median_pruner_compares_with_earlier_candidates_where_more_is_better(make):
    fake = make(
        reporting({ONE: (0.6, 0.7), TWO: (0.1, 0.9), OTHER: (0.8, 0.8)}),
        pruner=MedianPruner(n_startup_trials=1, n_warmup_steps=0),
    )
    fake.queue(ONE, TWO, OTHER)
    fake.search(3)
    assert fake.states == ["COMPLETE", "PRUNED", "COMPLETE"]


def test_a_pruner_that_ends_every_candidate_is_the_users_mistake(make):
    low = dict.fromkeys(SPACE, (0.1,))
    fake = make(reporting(low), pruner=ThresholdPruner(lower=0.5))
    with pytest.raises(UserError, match="The pruner ended every candidate"):
        fake.search(3)
    assert fake.states == ["PRUNED"] * 3


# Kills


class Killed(BaseException):
    """As SIGKILL: nothing of the search's own hears of it."""


class Mortal(InMemoryStorage):
    """Kills the search before its ``left``-th write from now on."""

    left = math.inf

    def write(self, name: str, *args: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise Killed
        return getattr(InMemoryStorage, name)(self, *args, **options)


for name in dir(InMemoryStorage):
    if name.startswith(("create_new_trial", "set_trial")):
        setattr(Mortal, name, partialmethod(Mortal.write, name))


def test_a_search_that_is_killed_before_any_write_goes_on_as_if_it_had_not_been(tmp_path):
    def begun(name: str) -> Fake:
        fake = Fake(tmp_path / name, special={TWO: fail, OTHER: refuse})
        fake.storage = Mortal()
        fake.queue(ONE, TWO, OTHER, TWO, ONE)
        return fake

    whole, number = begun("whole"), 0
    whole.search(6)
    while True:
        number += 1
        fake = begun(f"{number}")
        fake.storage.left = number
        with suppress(Killed):
            fake.search(6)
        if fake.storage.left > 0:
            break
        fake.search(6)
        assert fake.story == whole.story, f"killed before write {number}"
        assert sorted(map(str, fake.trained)) == sorted(map(str, whole.trained))
    assert number > 100
    kinds = {trial.system_attrs.get("fixed_params") is None for trial in whole.trials}
    assert kinds == {True, False}, "some were queued, some proposed by the sampler"


@pytest.mark.parametrize("num_slots", [1, 2])
def test_a_search_that_is_stopped_within_candidates_trains_them_again_under_their_numbers(
    make, num_slots
):
    fake, whole = make(), make()

    def stopped(arch: StudentArch, folder: Path) -> Outcome:
        while True:
            Reporter(folder).stop_if_asked()
            time.sleep(0.01)

    def kill(jobs: Sequence[Job]) -> None:
        if len(fake.trained) == 2 + num_slots:
            raise Killed

    def engine() -> Engine:
        return Engine(num_slots, ThreadPoolExecutor(num_slots))

    fake.search(2, engine())
    fake.end = stopped
    with pytest.raises(Killed):
        fake.search(5, engine(), watch=kill)
    assert fake.states[:2] == ["COMPLETE"] * 2 and fake.states.count("RUNNING") >= num_slots
    begun = fake.trained[2:]
    fake.end = end_well
    fake.search(5, engine())
    assert sorted(map(str, fake.trained[2 + num_slots :][:num_slots])) == sorted(map(str, begun))
    assert set(fake.states) == {"COMPLETE"} and len(fake.states) >= 5  # a shape may be repeated
    if num_slots == 1:
        whole.search(5)
        assert fake.story == whole.story
