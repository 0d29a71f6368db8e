"""Optuna's own contract for samplers, that a resumed study goes on as the unbroken one, and what is proposed."""

import itertools
import math
import weakref
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
    SingleOnlySamplerTestCase,
)
from optuna.trial import TrialState, create_trial

from kdnas.nas.controller import Controller
from kdnas.nas.sampler import (
    POOL_SIZE,
    PRUNERS,
    SAMPLERS,
    LSTMSampler,
    OriginalLSTMSampler,
    PerTrialSeed,
    lstm_of,
    make_pruner,
    make_sampler,
)
from kdnas.system.errors import UserError

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
        return lambda: PerTrialSeed(
            lambda seed: TPESampler(seed=seed, multivariate=True, n_startup_trials=0)
        )


def objective(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", -1, 1)
    return -((x - 0.3) ** 2) + trial.suggest_categorical("y", list(range(8)))


def proposals(
    storage: str, num_trials: list[int], sampler: Callable[[], BaseSampler]
) -> list[dict[str, object]]:
    """The parameters of a study that is opened anew, with a new sampler, for each number of trials."""
    for number in num_trials:
        study = optuna.create_study(
            storage=storage, study_name="s", sampler=sampler(), load_if_exists=True
        )
        study.optimize(objective, n_trials=number)
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize("make", [random_sampler, tpe])
def test_a_resumed_study_proposes_what_the_unbroken_one_would_have(make, tmp_path: Path):
    unbroken = proposals(f"sqlite:///{tmp_path}/a.db", [6], lambda: PerTrialSeed(make, 7))
    resumed = proposals(f"sqlite:///{tmp_path}/b.db", [1, 3, 2], lambda: PerTrialSeed(make, 7))
    assert resumed == unbroken
    assert len({params["x"] for params in resumed}) == 6  # nothing is proposed again


@pytest.mark.parametrize("make", [random_sampler, tpe, lambda seed: LSTMSampler(seed=seed)])
def test_a_trial_killed_between_two_suggestions_proposes_what_the_unbroken_one_would(make):
    def shape(is_killed: bool) -> dict[str, object]:
        study = optuna.create_study(sampler=PerTrialSeed(make, 7), direction="maximize")
        study.optimize(shaped, n_trials=4)
        trial = study.ask()
        for name, values in CHOICES.items():
            trial.suggest_categorical(name, values)
            if is_killed:
                study.sampler = PerTrialSeed(make, 7)
                trial = optuna.Trial(study, trial._trial_id)
        return trial.params

    assert shape(True) == shape(False)


def test_a_bare_seeded_sampler_repeats_itself_after_a_resume():
    """Why PerTrialSeed is there."""
    storage = optuna.storages.InMemoryStorage()
    repeated = proposals(storage, [3, 3], lambda: RandomSampler(seed=7))
    assert repeated[:3] == repeated[3:]
    storage = optuna.storages.InMemoryStorage()
    distinct = proposals(storage, [3, 3], lambda: PerTrialSeed(random_sampler, 7))
    assert len({params["x"] for params in distinct}) == 6


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


def test_what_a_sampler_learns_of_one_trial_is_forgotten_after_it():
    study = optuna.create_study(sampler=PerTrialSeed(Asked))
    study.optimize(objective, n_trials=2)
    assert Asked.told == [
        [("before", number), ("x", number), ("COMPLETE", number)] for number in (0, 1)
    ]
    assert [trial.params["x"] for trial in study.trials] == [0.25, 0.25]
    assert Asked.made and not any(made() for made in Asked.made)


# LSTMSampler


def lstm(seed: int) -> BaseSampler:
    return LSTMSampler(seed=seed)


def original(seed: int) -> BaseSampler:
    return OriginalLSTMSampler(seed=seed)


class TestLSTM(BasicSamplerTestCase, SingleOnlySamplerTestCase):
    """By itself."""

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return LSTMSampler


class TestOriginalLSTM(BasicSamplerTestCase, SingleOnlySamplerTestCase):
    """With the original's controller."""

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: original(0)


CHOICES = {"depth": [1, 2, 3, 4], "width": [32, 48, 64], "act": ["gelu", "relu"]}
SPACE = {name: CategoricalDistribution(values) for name, values in CHOICES.items()}
POINTS = [
    dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())
]


def value_of(params: dict[str, object]) -> float:
    return (
        1
        - math.exp(-params["depth"])
        - math.exp(-params["width"] / 16)
        - 0.02 * (params["act"] == "relu")
    )


def shaped(trial: optuna.Trial) -> float:
    return value_of(
        {name: trial.suggest_categorical(name, values) for name, values in CHOICES.items()}
    )


def study_of(seed: int = 0, direction: str = "maximize", **options: object) -> Study:
    return optuna.create_study(sampler=LSTMSampler(seed=seed, **options), direction=direction)


def proposed(study: Study) -> dict[str, object]:
    return study.ask(SPACE).params


def add(
    study: Study, params: dict[str, object], state: TrialState = TrialState.COMPLETE, **more: object
) -> None:
    value = value_of(params) if state == TrialState.COMPLETE else None
    study.add_trial(
        create_trial(params=params, distributions=SPACE, state=state, value=value, **more)
    )


@pytest.mark.parametrize("make", [lstm, original])
def test_nothing_is_proposed_twice_until_the_space_is_exhausted_and_then_something_is(make):
    study = optuna.create_study(sampler=PerTrialSeed(make, 3), direction="maximize")
    study.optimize(shaped, n_trials=len(POINTS))
    assert len(POINTS) == len({tuple(trial.params.values()) for trial in study.trials}) == 24
    study.optimize(shaped, n_trials=2)
    assert all(trial.params in POINTS for trial in study.trials)


@pytest.mark.parametrize("state", TrialState)
def test_what_the_study_knows_in_whatever_state_is_not_proposed(state):
    study = study_of()
    add(study, POINTS[0])  # from which the space is known
    for params in POINTS[1:-1]:
        if state == TrialState.WAITING:
            study.enqueue_trial(params)
        else:
            add(study, params, state)
    trial = create_trial(state=TrialState.RUNNING)
    trial.number = 99
    params = LSTMSampler().sample_relative(study, trial, SPACE)
    assert len(TrialState) == 5 and params == POINTS[-1]


def test_before_any_has_ended_what_runs_or_failed_is_not_proposed():
    study = study_of()
    study.tell(study.ask(SPACE), state=TrialState.FAIL)
    asked = [proposed(study) for _ in range(len(POINTS) - 1)]
    assert (
        len({tuple(params.values()) for params in [study.trials[0].params, *asked]})
        == len(POINTS)
        == 24
    )


def test_a_failed_trial_that_ended_too_early_does_not_narrow_the_space():
    study = study_of()
    for params in POINTS[:3]:
        add(study, params)
    only_depth = {"depth": SPACE["depth"]}
    study.add_trial(
        create_trial(params={"depth": 1}, distributions=only_depth, state=TrialState.FAIL)
    )
    assert list(study.sampler.infer_relative_search_space(study, study.ask())) == list(SPACE)


def test_the_space_is_the_categorical_parameters_that_never_change():
    study = optuna.create_study()
    fixed, float_, other = SPACE["depth"], FloatDistribution(0, 1), CategoricalDistribution([1, 2])
    for distributions in (
        {"a": fixed, "b": fixed, "x": float_, "c": fixed},
        {"a": fixed, "b": other, "x": float_},
    ):
        study.add_trial(
            create_trial(
                params=dict.fromkeys(distributions, 1), distributions=distributions, value=0
            )
        )
    sampler = LSTMSampler()
    assert sampler.infer_relative_search_space(study, study.ask()) == {"a": fixed}
    assert sampler.sample_relative(study, study.ask(), {"x": float_}) == {}
    assert sampler.sample_relative(study, study.ask(), {"a": fixed, "x": float_}).keys() == {"a"}


@pytest.mark.parametrize("make", [lstm, original])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_resumed_search_proposes_what_the_unbroken_one_would_have(make, wrapped, tmp_path: Path):
    def parameters(name: str, num_trials: list[int]) -> list[dict[str, object]]:
        for number in num_trials:
            sampler = PerTrialSeed(make, 7) if wrapped else make(7)
            storage = f"sqlite:///{tmp_path}/{name}.db"
            study = optuna.create_study(
                storage=storage,
                study_name="s",
                sampler=sampler,
                direction="maximize",
                load_if_exists=True,
            )
            study.optimize(shaped, n_trials=number)
        return [trial.params for trial in study.trials]

    assert parameters("a", [9]) == parameters("b", [1, 5, 3])


def test_another_seed_searches_in_another_order():
    orders = []
    for seed in (1, 1, 2):
        study = study_of(seed)
        study.optimize(shaped, n_trials=8)
        orders.append([trial.params for trial in study.trials])
    assert orders[0] == orders[1] != orders[2]


def test_two_workers_share_what_they_know():
    storage = optuna.storages.InMemoryStorage()
    workers = [
        optuna.create_study(
            storage=storage,
            study_name="s",
            sampler=lstm(7),
            direction="maximize",
            load_if_exists=True,
        )
        for _ in range(2)
    ]
    for _ in range(12):
        trials = [worker.ask(SPACE) for worker in workers]  # both at once
        for worker, trial in zip(workers, trials, strict=True):
            worker.tell(trial, value_of(trial.params))
    assert len({tuple(trial.params.values()) for trial in workers[0].trials}) == 24


def test_minimising_is_maximising_the_negative():
    most, least = study_of(), study_of(direction="minimize")
    most.optimize(shaped, n_trials=12)
    least.optimize(lambda trial: -shaped(trial), n_trials=12)
    assert [trial.params for trial in most.trials] == [trial.params for trial in least.trials]
    assert least.best_value == -most.best_value


@pytest.mark.parametrize("make", [lstm, original])
def test_the_global_generator_is_left_alone(make):
    study = optuna.create_study(sampler=make(0), direction="maximize")
    before = torch.get_rng_state()
    study.optimize(shaped, n_trials=8)
    assert torch.equal(torch.get_rng_state(), before)


class Spy(Controller):
    """Keeps what it was asked, and takes the first."""

    asked: list[tuple[int, float, int]] = []

    def __init__(self, choices, generator):
        super().__init__()
        assert [list(values) for values in choices] == list(CHOICES.values())

    def propose(self, history, pool_PF, generator, exploration):
        self.asked.append((len(history), exploration, len(pool_PF)))
        self.history, self.pool = history, pool_PF
        Spy.last = self
        return 0, None


@pytest.fixture
def spy() -> type[Spy]:
    Spy.asked = []
    return Spy


def test_exploration_counts_distinct_trained_candidates_and_ends_at_zero(spy):
    study = study_of(num_candidates=2, num_episodes=3, controller=spy)
    for place, params in enumerate(POINTS[::-1][:7]):
        proposed(study)
        add(study, params)
        if place == 2:
            add(
                study, POINTS[3], TrialState.PRUNED, intermediate_values={0: 0.5}
            )  # tried, and ended by a pruner
            # None of these was trained.
            add(study, params)
            add(study, POINTS[0], TrialState.PRUNED)
            add(study, POINTS[1], TrialState.PRUNED, constraints={"budget": 0.5})
            add(study, POINTS[2], TrialState.FAIL)
    assert [(trained, exploration) for trained, exploration, _ in spy.asked] == [
        *[(1, 1.0), (2, 0.5), (3, 0.0), (4, 0.0), (5, 0.0), (6, 0.0)]
    ]


def test_the_history_is_what_was_trained_and_is_feasible_in_order(spy):
    study = study_of(num_candidates=4, controller=spy)
    add(study, POINTS[7])
    add(study, POINTS[23], constraints={"budget": 0.1})  # trained, but beyond it
    add(study, POINTS[8], TrialState.PRUNED)
    add(study, POINTS[2], constraints={"budget": 0.0, "other": -1.0})
    study.add_trial(create_trial(params=POINTS[5], distributions=SPACE, value=math.inf))
    add(study, POINTS[7])
    proposed(study)
    history = spy.last.history
    assert history.points_TF.tolist() == [
        [1, 0, 1],
        [0, 1, 0],
    ]  # depth 2, 32, relu; depth 1, 48, gelu
    assert history.rewards_T.tolist() == pytest.approx([value_of(POINTS[7]), value_of(POINTS[2])])
    assert history.num_candidates == 4


def test_what_breaks_the_budget_teaches_what_else_would(spy):
    study = study_of(controller=spy)
    for params in POINTS[-2:]:  # the two largest
        add(study, params, TrialState.PRUNED, constraints={"budget": 0.5})
    for params in POINTS[:4]:
        add(study, params, constraints={"budget": 0.0})
    proposed(study)
    pool = spy.last.pool.tolist()
    assert len(pool) < len(POINTS) - 6
    assert [3, 1, 0] not in pool and [1, 0, 0] in pool


def test_a_space_that_is_exhausted_but_for_refused_points_proposes_trained_ones(spy):
    study = study_of(controller=spy)
    for place, params in enumerate(POINTS):
        refused = place == 23
        state = TrialState.PRUNED if refused else TrialState.COMPLETE
        add(study, params, state, constraints={"budget": 0.5 if refused else 0.0})
    proposed(study)
    assert [3, 2, 1] not in spy.last.pool.tolist() and len(spy.last.pool) > 12


def test_a_large_space_is_sampled_the_same_way_for_the_same_trial(spy, monkeypatch):
    names = [f"p{place}" for place in range(8)]
    space = {name: CategoricalDistribution(list(range(10))) for name in names}
    monkeypatch.setattr(Spy, "__init__", lambda self, choices, generator: Controller.__init__(self))
    pools = []
    for seed in (0, 0, 1):
        study = optuna.create_study(sampler=LSTMSampler(seed=seed, controller=spy))
        study.add_trial(create_trial(params=dict.fromkeys(names, 0), distributions=space, value=0))
        study.ask(space)
        pools.append(spy.last.pool)
    assert torch.equal(pools[0], pools[1]) and not torch.equal(pools[0], pools[2])
    assert 0.9 * POOL_SIZE < len(pools[0].unique(dim=0)) == len(pools[0]) <= POOL_SIZE
    assert pools[0].min() == 0 and pools[0].max() == 9


@pytest.mark.parametrize("make", [LSTMSampler, OriginalLSTMSampler])
def test_it_finds_the_best_sooner_than_chance(make):
    """Chance needs 12.5 of 24 on average."""
    best, needed = max(map(value_of, POINTS)), []
    for seed in range(6):
        sampler = make(seed, num_candidates=3, num_episodes=3)
        study = optuna.create_study(sampler=sampler, direction="maximize")
        study.optimize(
            shaped,
            n_trials=24,
            callbacks=[lambda s, trial: s.stop() if trial.value == best else None],
        )
        needed.append(len(study.trials))
    assert sum(needed) / len(needed) < 9


@pytest.mark.parametrize("name", ["num_candidates", "num_episodes"])
def test_an_episode_has_a_candidate_and_a_search_an_episode(name):
    with pytest.raises(UserError, match=f"^{name} is 0: give at least 1.$"):
        LSTMSampler(**{name: 0})


@pytest.mark.parametrize(
    "name", [*SAMPLERS, "optuna.samplers.QMCSampler", "optuna.samplers.BruteForceSampler"]
)
def test_every_sampler_proposes_and_two_workers_with_one_seed_do_not_repeat_each_other(name):
    storage = optuna.storages.InMemoryStorage()
    optuna.create_study(storage=storage, study_name="s", direction="maximize")
    for _ in range(2):
        study = optuna.load_study(storage=storage, study_name="s", sampler=make_sampler(name, 7))
        study.optimize(
            lambda trial: trial.suggest_int("x", 0, 999) + trial.suggest_int("y", 0, 9), n_trials=3
        )
    assert len({(trial.params["x"], trial.params["y"]) for trial in study.trials}) == 6


def test_a_sampler_takes_its_arguments_from_the_spec():
    spec = {
        "class_path": "optuna.samplers.TPESampler",
        "init_args": {"n_startup_trials": 1, "multivariate": True},
    }
    study = optuna.create_study(direction="maximize", sampler=make_sampler(spec))
    study.optimize(objective, n_trials=3)
    assert len(study.trials) == 3


@pytest.mark.parametrize("name", [*PRUNERS, "optuna.pruners.SuccessiveHalvingPruner"])
def test_every_pruner_is_made(name):
    assert isinstance(make_pruner(name), optuna.pruners.BasePruner)


@pytest.mark.parametrize("given", [{}, {"seed": 5}])
def test_a_sampler_in_another_draws_by_the_seed_of_the_trial(given):
    inner = {"class_path": "optuna.samplers.RandomSampler", "init_args": given}
    fixed = {
        "class_path": "optuna.samplers.PartialFixedSampler",
        "init_args": {"fixed_params": {"x": 7}, "base_sampler": inner},
    }

    def draw(seed: int, spec: dict = fixed) -> list[float]:
        study = optuna.create_study(sampler=make_sampler(spec, seed))
        study.optimize(lambda trial: trial.suggest_float("y", 0, 1), n_trials=3)
        return [trial.params["y"] for trial in study.trials]

    assert draw(1) == draw(1) != draw(2)
    assert len(set(draw(1))) == 3, "each trial has a seed of its own"


def test_a_short_name_takes_arguments_as_a_class_path_does():
    assert lstm_of({"class_path": "lstm", "init_args": {"num_candidates": 3}}).num_candidates == 3
    median = make_pruner({"class_path": "median", "init_args": {"n_warmup_steps": 2}})
    assert (median._n_startup_trials, median._n_warmup_steps) == (4, 2)


def test_a_pruner_and_a_sampler_may_be_wrapped_around_another():
    median = {"class_path": "optuna.pruners.MedianPruner", "init_args": {"n_startup_trials": 0}}
    patient = {
        "class_path": "optuna.pruners.PatientPruner",
        "init_args": {"wrapped_pruner": median, "patience": 0},
    }
    fixed = {
        "class_path": "optuna.samplers.PartialFixedSampler",
        "init_args": {
            "fixed_params": {"x": 7},
            "base_sampler": {"class_path": "optuna.samplers.RandomSampler"},
        },
    }
    study = optuna.create_study(
        direction="maximize", sampler=make_sampler(fixed), pruner=make_pruner(patient)
    )

    def falling(trial: optuna.Trial) -> float:
        for step in range(4):
            trial.report(-(step + 1) * 10**trial.number, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return trial.suggest_int("x", 0, 9) + trial.suggest_int("y", 0, 9)

    study.optimize(falling, n_trials=3)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "PRUNED"]
    assert study.trials[0].params["x"] == 7
    with pytest.raises(UserError, match="is not a pruner"):
        make_pruner(patient | {"init_args": {"wrapped_pruner": fixed, "patience": 0}})


@pytest.mark.parametrize(
    ("make", "spec", "message"),
    [
        (
            make_sampler,
            "tpee",
            "There is no sampler 'tpee': give a class path, or a short name. Did you mean 'tpe'",
        ),
        (make_sampler, "tpee", "Choose from: gp, lstm, lstm-original, nsgaii, random, tpe"),
        (make_sampler, "optuna.nothing.There", "There is no sampler 'optuna.nothing.There'"),
        (
            make_sampler,
            {"num_candidates": 2},
            "sampler has the settings {'num_candidates': 2} but no class_path, so the sampler is unknown",
        ),
        (
            make_pruner,
            {"init_args": {}},
            "so the pruner is unknown: give --pruner '{class_path: none, init",
        ),
        (make_sampler, {"class_path": {"foo": 1}}, "There is no sampler {'foo': 1}"),
        (make_sampler, "optuna.samplers.CmaEsSampler", "CmaEsSampler needs numerical parameters"),
        (make_sampler, "./mine.Sampler", "There is no sampler './mine.Sampler'"),
        (
            make_sampler,
            "optuna.pruners.NopPruner",
            "is not a sampler: give the class path of an Optuna sampler",
        ),
        (make_sampler, {"class_path": "optuna.samplers.TPESampler", "args": 1}, "is not a sampler"),
        (
            make_sampler,
            {"class_path": "optuna.samplers.TPESampler", "init_args": {"x": 1}},
            "TPESampler cannot be created with",
        ),
        (
            make_sampler,
            {"class_path": "optuna.samplers.TPESampler", "init_args": [1]},
            "is not a sampler",
        ),
        (make_sampler, {"class_path": "tpe", "init_args": [1]}, "is not a sampler"),
        (make_pruner, "medium", "There is no pruner 'medium'"),
        (
            make_pruner,
            {"class_path": "optuna.pruners.PercentilePruner"},
            "PercentilePruner cannot be created with",
        ),
    ],
)
def test_what_is_no_sampler_or_pruner_is_refused(make, spec, message):
    with pytest.raises(UserError, match=message):
        make(spec)


def test_a_seed_among_the_arguments_is_that_of_the_study():
    spec = {"class_path": "optuna.samplers.RandomSampler", "init_args": {"seed": 42}}
    study = optuna.create_study(sampler=make_sampler(spec))
    study.optimize(objective, n_trials=4)
    assert len({trial.params["x"] for trial in study.trials}) == 4
