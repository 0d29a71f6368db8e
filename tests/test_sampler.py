"""PerTrialSeed: Optuna's own contract for samplers, and that a resumed study goes on as the unbroken one."""

import weakref
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
)

from kdnas.errors import UserError
from kdnas.nas.sampler import PRUNERS, SAMPLERS, PerTrialSeed, make_pruner, make_sampler

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def random_sampler(seed: int) -> BaseSampler:
    return RandomSampler(seed=seed)


def tpe(seed: int) -> BaseSampler:
    return TPESampler(seed=seed, n_startup_trials=3)


class TestAroundRandom(BasicSamplerTestCase, MultiObjectiveSamplerTestCase):
    """Around a sampler that looks at each parameter alone."""

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: PerTrialSeed(random_sampler)


class TestAroundTPE(BasicSamplerTestCase, MultiObjectiveSamplerTestCase):
    """Around the sampler of the search."""

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: PerTrialSeed(tpe)


class TestAroundMultivariateTPE(BasicSamplerTestCase, RelativeSamplerTestCase):
    """Around a sampler that looks at all parameters together."""

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: PerTrialSeed(lambda seed: TPESampler(seed=seed, multivariate=True, n_startup_trials=0))


def objective(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", -1, 1)
    return -((x - 0.3) ** 2) + trial.suggest_categorical("y", list(range(8)))


def proposals(storage: str, num_trials: list[int], sampler: Callable[[], BaseSampler]) -> list[dict[str, object]]:
    """The parameters of a study that is opened anew, with a new sampler, for each number of trials."""
    for number in num_trials:
        study = optuna.create_study(storage=storage, study_name="s", sampler=sampler(), load_if_exists=True)
        study.optimize(objective, n_trials=number)
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize("make", [random_sampler, tpe])
def test_a_resumed_study_proposes_what_the_unbroken_one_would_have(make, tmp_path: Path):
    unbroken = proposals(f"sqlite:///{tmp_path}/a.db", [6], lambda: PerTrialSeed(make, 7))
    resumed = proposals(f"sqlite:///{tmp_path}/b.db", [1, 3, 2], lambda: PerTrialSeed(make, 7))
    assert resumed == unbroken
    assert len({params["x"] for params in resumed}) == 6  # nothing is proposed again


def test_a_bare_seeded_sampler_repeats_itself_after_a_resume():
    """Why PerTrialSeed is there."""
    storage = optuna.storages.InMemoryStorage()
    repeated = proposals(storage, [3, 3], lambda: RandomSampler(seed=7))
    assert repeated[:3] == repeated[3:]
    storage = optuna.storages.InMemoryStorage()
    distinct = proposals(storage, [3, 3], lambda: PerTrialSeed(random_sampler, 7))
    assert len({params["x"] for params in distinct}) == 6


def test_two_workers_with_one_seed_propose_different_points():
    storage = optuna.storages.InMemoryStorage()
    optuna.create_study(storage=storage, study_name="s")
    drawn = []
    for _ in range(2):
        study = optuna.load_study(storage=storage, study_name="s", sampler=PerTrialSeed(random_sampler, 7))
        drawn.append([study.ask().suggest_float("x", 0, 1) for _ in range(3)])
    assert len({*drawn[0], *drawn[1]}) == 6


def test_another_seed_proposes_other_points():
    first, same, other = (
        proposals(optuna.storages.InMemoryStorage(), [6], lambda seed=seed: PerTrialSeed(tpe, seed))
        for seed in (1, 1, 2)
    )
    assert first == same
    assert all(a["x"] != b["x"] for a, b in zip(first, other, strict=True))


class Asked(RandomSampler):
    """Keeps what it was asked for, and wants to draw ``x`` itself, together with nothing else."""

    made: list["weakref.ref[Asked]"] = []
    told: list[list[tuple[str, int]]] = []

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed)
        self.calls: list[tuple[str, int]] = []
        self.made.append(weakref.ref(self))

    def before_trial(self, study, trial):
        self.calls.append(("before", trial.number))

    def infer_relative_search_space(self, study, trial):
        return {"x": FloatDistribution(-1, 1)}

    def sample_relative(self, study, trial, search_space):
        self.calls.append((" ".join(search_space), trial.number))
        return {"x": 0.25}

    def after_trial(self, study, trial, state, values):
        self.told.append([*self.calls, (state.name, trial.number)])


def test_one_sampler_goes_through_one_trial_and_is_forgotten_after_it():
    study = optuna.create_study(sampler=PerTrialSeed(Asked))
    study.optimize(objective, n_trials=2)
    assert Asked.told == [[("before", number), ("x", number), ("COMPLETE", number)] for number in (0, 1)]
    assert [trial.params["x"] for trial in study.trials] == [0.25, 0.25]
    assert [made() for made in Asked.made] == [None, None]


@pytest.mark.parametrize("name", [*SAMPLERS, "optuna.samplers.QMCSampler", "optuna.samplers.BruteForceSampler"])
def test_every_sampler_proposes_and_two_workers_with_one_seed_do_not_repeat_each_other(name):
    storage = optuna.storages.InMemoryStorage()
    optuna.create_study(storage=storage, study_name="s", direction="maximize")
    for _ in range(2):
        study = optuna.load_study(storage=storage, study_name="s", sampler=make_sampler(name, 7))
        study.optimize(lambda trial: trial.suggest_int("x", 0, 999) + trial.suggest_int("y", 0, 9), n_trials=3)
    assert len({(trial.params["x"], trial.params["y"]) for trial in study.trials}) == 6


def test_a_sampler_takes_its_arguments_from_the_spec():
    spec = {"class_path": "optuna.samplers.TPESampler", "init_args": {"n_startup_trials": 1, "multivariate": True}}
    study = optuna.create_study(direction="maximize", sampler=make_sampler(spec))
    study.optimize(objective, n_trials=3)
    assert len(study.trials) == 3


@pytest.mark.parametrize("name", [*PRUNERS, "optuna.pruners.SuccessiveHalvingPruner"])
def test_every_pruner_is_made(name):
    assert isinstance(make_pruner(name), optuna.pruners.BasePruner)


@pytest.mark.parametrize(
    ("make", "spec", "message"),
    [
        (make_sampler, "tpee", "There is no sampler 'tpee': give a class path, or a short name. Did you mean 'tpe'"),
        (make_sampler, "optuna.nothing.There", "There is no sampler 'optuna.nothing.There'"),
        (make_sampler, {"init_args": {}}, "There is no sampler None"),
        (make_sampler, "optuna.pruners.NopPruner", "is no sampler: give the class path of an Optuna sampler"),
        (make_sampler, {"class_path": "optuna.samplers.TPESampler", "args": 1}, "is no sampler"),
        (make_sampler, {"class_path": "optuna.samplers.TPESampler", "init_args": {"x": 1}}, "TPESampler does not take"),
        (make_pruner, "medium", "There is no pruner 'medium'"),
        (make_pruner, {"class_path": "optuna.pruners.PercentilePruner"}, "PercentilePruner does not take"),
    ],
)
def test_what_is_no_sampler_or_pruner_is_refused(make, spec, message):
    with pytest.raises(UserError, match=message):
        make(spec)
