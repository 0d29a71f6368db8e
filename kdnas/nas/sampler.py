"""Samplers that never repeat themselves, and how samplers and pruners are asked for."""

import hashlib
import importlib
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, CmaEsSampler, RandomSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from kdnas.nas.controller import (
    Controller,
    EnsembleLSTM,
    History,
    RewardLSTM,
    exploration_ratio,
    likely_feasible,
)
from kdnas.system.errors import UserError, first_line, nearest

# A short name, a class path, or a mapping of class_path and init_args, as in YAML.
Spec = str | Mapping[str, Any]
SAMPLERS: Mapping[str, Spec] = {
    "tpe": {"class_path": "optuna.samplers.TPESampler", "init_args": {"n_startup_trials": 5}},
    "lstm": "kdnas.nas.sampler.LSTMSampler",
    "lstm-original": "kdnas.nas.sampler.OriginalLSTMSampler",
    "random": "optuna.samplers.RandomSampler",
    "gp": "optuna.samplers.GPSampler",
    "nsgaii": "optuna.samplers.NSGAIISampler",
}
PRUNERS: Mapping[str, Spec] = {
    "none": "optuna.pruners.NopPruner",
    "median": {"class_path": "optuna.pruners.MedianPruner", "init_args": {"n_startup_trials": 4}},
    "hyperband": "optuna.pruners.HyperbandPruner",
}


# Points that are scored for a proposal: a smaller space is scored whole.
POOL_SIZE = 4096

Point = tuple[int, ...]


def seed_of(*parts: object) -> int:
    """A seed below 2 ** 32, the same for the same parts."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big")


class PerTrialSeed(BaseSampler):
    """Any Optuna sampler, made anew for each trial with a seed from (seed, number of the trial).

    A seeded sampler proposes the same again after a resume, since the state of its generator is not
    in the study. With a seed for each trial, a resumed study proposes what the unbroken one would
    have proposed.

    Args:
        make: makes a sampler of a seed; what it learns must come from the study (TPE, random, GP
            do).
        seed: of the study.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int = 0) -> None:
        self._make, self._seed = make, seed
        self._samplers: dict[int, BaseSampler] = {}
        self._num_drawn: dict[int, int] = {}

    def _of(self, study: Study, trial: FrozenTrial) -> BaseSampler:
        if trial.number not in self._samplers:
            self._samplers[trial.number] = self._make(seed_of(self._seed, trial.number))
        return self._samplers[trial.number]

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._of(study, trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._of(study, trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        sampler = self._of(study, trial)
        # Where a search was killed between two of a trial's, those before are drawn again.
        for name in list(trial.params)[self._num_drawn.get(trial.number, 0) :]:
            sampler.sample_independent(study, trial, name, trial.distributions[name])
        self._num_drawn[trial.number] = len(trial.params) + 1
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._of(study, trial).before_trial(study, trial)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._of(study, trial).after_trial(study, trial, state, values)
        self._samplers.pop(trial.number, None)
        self._num_drawn.pop(trial.number, None)


class LSTMSampler(BaseSampler):
    """Proposes what an LSTM controller, trained on the study's own trials, expects most of.

    Candidates come in episodes. The share of an episode's picks that explore falls from 1 to
    exactly 0 in the last one, and stays there. A point that the study knows, in whatever state, is
    not proposed while there is another. A trial that broke a constraint teaches what else would.

    All that it knows is in the study, and every draw is one of (seed, trial number): a resumed
    study proposes what the unbroken one would have proposed, and workers share what they learn. Of
    parameters that are not categorical, are not in every trial, or change their choices, each is
    drawn by itself, uniformly. ``predictions`` has the reward that was expected of a trial, by its
    number, where it was picked for that.

    Args:
        seed: of all draws.
        num_candidates: trained candidates an episode.
        num_episodes: after which nothing explores.
        controller: makes the predictor of the choices and a generator: ``EnsembleLSTM``, or
            ``RewardLSTM`` for the original's.

    Raises:
        UserError: a number is below 1.
    """

    def __init__(
        self,
        seed: int = 0,
        num_candidates: int = 5,
        num_episodes: int = 4,
        controller: Callable[[Sequence[Sequence[Any]], torch.Generator], Controller] = EnsembleLSTM,
    ) -> None:
        for name, value in (("num_candidates", num_candidates), ("num_episodes", num_episodes)):
            if value < 1:
                raise UserError(f"{name} is {value}: give at least 1.")
        self._seed, self._controller = seed, controller
        self.num_candidates, self._num_episodes = num_candidates, num_episodes
        self.predictions: dict[int, float] = {}

    def exploration(self, num_tried: int) -> float:
        """The share of picks that explore, after so many candidates, whether a pruner ended them or not."""
        return exploration_ratio(num_tried, self.num_candidates, self._num_episodes)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The categorical parameters that are in every trial with the same choices.

        As Optuna's intersection, but of pruned trials too: where the first ones were all refused
        for the budget, they must not be drawn again. Before any has ended, those that run or failed
        tell the space.
        """
        others = [other for other in _others(study, trial) if other.distributions]
        ended = [t for t in others if t.state in (TrialState.COMPLETE, TrialState.PRUNED)] or others
        return {
            name: distribution
            for name, distribution in (ended[0].distributions if ended else {}).items()
            if isinstance(distribution, CategoricalDistribution)
            and all(other.distributions.get(name) == distribution for other in ended)
        }

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self._raise_error_if_multi_objective(study)
        space = {
            name: dist
            for name, dist in search_space.items()
            if isinstance(dist, CategoricalDistribution)
        }
        if not space:
            return {}
        known, feasible, rewards, num_tried = self._recall(study, trial, space)
        choices = [distribution.choices for distribution in space.values()]
        generator = torch.Generator().manual_seed(seed_of(self._seed, trial.number))
        refused = {point for point, is_feasible in feasible.items() if not is_feasible}
        pool_PF = _pool([len(values) for values in choices], (known, refused), generator)
        if refused:
            judged_KF, feasible_K = (
                torch.tensor(list(feasible)),
                torch.tensor(list(feasible.values())),
            )
            pool_PF = pool_PF[likely_feasible(choices, judged_KF, feasible_K, pool_PF)]
        trained_TF = torch.tensor(list(rewards), dtype=torch.int64).view(-1, len(choices))
        history = History(trained_TF, torch.tensor(list(rewards.values())), self.num_candidates)
        controller = self._controller(choices, generator)
        picked, predicted = controller.propose(
            history, pool_PF, generator, self.exploration(num_tried)
        )
        if predicted is not None:
            self.predictions[trial.number] = predicted
        point = pool_PF[picked].tolist()
        return {
            name: values[index] for name, values, index in zip(space, choices, point, strict=True)
        }

    def _recall(
        self, study: Study, trial: FrozenTrial, space: dict[str, CategoricalDistribution]
    ) -> tuple[set[Point], dict[Point, bool], dict[Point, float], int]:
        """What the study knows: every point, which of those with constraints kept them, and what feasible ones earn.

        And how many were tried: those that a pruner ended count, though they have no reward to
        learn from.
        """
        sign = 1 if study.direction == StudyDirection.MAXIMIZE else -1
        known: set[Point] = set()
        feasible: dict[Point, bool] = {}
        rewards: dict[Point, float] = {}
        stopped: set[Point] = set()
        for other in _others(study, trial):
            point = _point(other, space)
            if point is None:
                continue
            known.add(point)
            if other.state in (TrialState.COMPLETE, TrialState.PRUNED) and other.constraints:
                feasible[point] = all(violation <= 0 for violation in other.constraints.values())
            if (
                other.state == TrialState.COMPLETE
                and math.isfinite(other.values[0])
                and feasible.get(point, True)
            ):
                rewards.setdefault(point, sign * other.values[0])
            if other.state == TrialState.PRUNED and other.intermediate_values:
                stopped.add(point)
        return known, feasible, rewards, len(stopped | rewards.keys())

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        self._raise_error_if_multi_objective(study)
        sampler = RandomSampler(seed=seed_of(self._seed, trial.number, param_name))
        return sampler.sample_independent(study, trial, param_name, param_distribution)


def _others(study: Study, trial: FrozenTrial) -> list[FrozenTrial]:
    return [other for other in study.get_trials(deepcopy=False) if other.number != trial.number]


def _point(trial: FrozenTrial, space: dict[str, CategoricalDistribution]) -> Point | None:
    """A trial as choice indices; None where it has no place in the space, or not yet. One that waits has its wishes."""
    params = trial.params | trial.system_attrs.get("fixed_params", {})
    try:
        return tuple(int(dist.to_internal_repr(params[name])) for name, dist in space.items())
    except (KeyError, ValueError):
        return None


def _pool(
    sizes: Sequence[int], barred: Iterable[Collection[Point]], generator: torch.Generator
) -> Tensor:
    """Choice indices of what may be proposed, (P, F): what is not in the first set that leaves any, else everything."""
    if math.prod(sizes) <= POOL_SIZE:
        pool_PF = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).view(-1, len(sizes))
    else:
        drawn = [torch.randint(size, (POOL_SIZE,), generator=generator) for size in sizes]
        pool_PF = torch.stack(drawn, 1).unique(dim=0)
    points = [tuple(point) for point in pool_PF.tolist()]
    for known in barred:
        free_P = torch.tensor([point not in known for point in points])
        if free_P.any():
            return pool_PF[free_P]
    return pool_PF


class OriginalLSTMSampler(LSTMSampler):
    """``LSTMSampler`` with the original's controller, one ``RewardLSTM`` through the search.

    Args:
        seed: of all draws.
        num_candidates: trained candidates an episode.
        num_episodes: after which nothing explores.
    """

    def __init__(self, seed: int = 0, num_candidates: int = 5, num_episodes: int = 4) -> None:
        kept: dict[str, RewardLSTM] = {}

        def controller(choices: Sequence[Sequence[Any]], _: torch.Generator) -> RewardLSTM:
            if repr(choices) not in kept:
                generator = torch.Generator().manual_seed(seed_of(seed))
                kept[repr(choices)] = RewardLSTM(choices, generator)
            return kept[repr(choices)]

        super().__init__(seed, num_candidates, num_episodes, controller)


def make_sampler(spec: Spec, seed: int = 0) -> BaseSampler:
    """A sampler of the study with this seed: a key of ``SAMPLERS``, a class path, or a class path with ``init_args``.

    Raises:
        UserError: there is no such sampler, or it does not take these arguments.
    """
    found, arguments = _find(spec, SAMPLERS, BaseSampler, "sampler")
    seed = arguments.pop("seed", seed)  # not of each trial: all would propose the same

    def make(trial_seed: int) -> BaseSampler:
        return _make(found, arguments, "sampler", trial_seed)

    sampler = make(seed)  # what is wrong shows now, not at the first trial
    # An LSTM draws by the trial's number already.
    return sampler if isinstance(sampler, LSTMSampler) else PerTrialSeed(make, seed)


def lstm_of(spec: Spec) -> LSTMSampler | None:
    """The sampler with an LSTM controller that a spec asks for; None where it asks for another."""
    found, arguments = _find(spec, SAMPLERS, BaseSampler, "sampler")
    return _make(found, arguments, "sampler") if issubclass(found, LSTMSampler) else None


def make_pruner(spec: Spec) -> BasePruner:
    """A pruner: a key of ``PRUNERS``, a class path, or a class path with ``init_args``.

    Raises:
        UserError: there is no such pruner, or it does not take these arguments.
    """
    found, arguments = _find(spec, PRUNERS, BasePruner, "pruner")
    return _make(found, arguments, "pruner")


def _find(
    spec: Spec, known: Mapping[str, Spec], base: type[Any], kind: str
) -> tuple[type[Any], dict[str, Any]]:
    spec = {"class_path": spec} if isinstance(spec, str) else spec
    if "class_path" not in spec:  # an option for one of its settings has taken its place
        raise UserError(
            f"{kind} is {dict(spec)}, which names no {kind}: give it with its settings, as in "
            f"--{kind} '{{class_path: {[*known][0]}, init_args: {{NAME: VALUE}}}}'."
        )
    path, arguments = spec["class_path"], spec.get("init_args") or {}
    short = known.get(path, path) if isinstance(path, str) else str(path)
    short = short if isinstance(short, Mapping) else {"class_path": short}
    module, _, name = str(short["class_path"]).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        hint = nearest(path, known, always_list=True)
        raise UserError(
            f"There is no {kind} {path!r}: give a class path, or a short name.{hint}"
        ) from error
    is_one = isinstance(found, type) and issubclass(found, base)
    if not is_one or set(spec) - {"class_path", "init_args"} or not isinstance(arguments, Mapping):
        raise UserError(
            f"{spec!r} is no {kind}: give the class path of an Optuna {kind}, and its init_args."
        )
    if issubclass(found, CmaEsSampler):  # its state is a pickle in the database, too
        raise UserError(
            f"The sampler {found.__name__} learns of numbers alone, and a student is a choice: take another."
        )
    return found, {**short.get("init_args", {}), **arguments}


def _make(found: type[Any], arguments: dict[str, Any], kind: str, seed: int | None = None) -> Any:
    if seed is not None and "seed" in inspect.signature(found).parameters:
        given = arguments.get(
            "seed"
        )  # of one in another; the same for each trial it would make all of them equal
        arguments = arguments | {"seed": seed if given is None else seed_of(seed, given)}
    known, base = (SAMPLERS, BaseSampler) if kind == "sampler" else (PRUNERS, BasePruner)
    for name, value in arguments.items():  # some are wrapped around another
        if isinstance(value, Mapping) and "class_path" in value:
            arguments = arguments | {name: _make(*_find(value, known, base, kind), kind, seed)}
    try:
        return found(**arguments)
    except Exception as error:  # each class refuses in its own way
        raise UserError(
            f"The {kind} {found.__name__} does not take {arguments}: {first_line(error)}."
        ) from error
