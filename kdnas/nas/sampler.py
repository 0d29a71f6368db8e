"""Samplers with which a study can be resumed, and functions that make samplers and pruners."""

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

# How a user names a sampler or pruner: a short name, a class path, or a mapping with class_path and init_args.
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


# Number of points that are scored for a proposal; in a smaller space all points are scored.
POOL_SIZE = 4096

Point = tuple[int, ...]


def seed_of(*parts: object) -> int:
    """Return a seed below 2 ** 32: a hash of ``parts``, such as a seed and a trial's number."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big")


class PerTrialSeed(BaseSampler):
    """Makes a new Optuna sampler for each trial, seeded by the study's seed and the trial's number.

    A study does not store the state of a sampler's random generator, so a seeded sampler would
    propose the same points again after a resume. With a seed for each trial, a resumed study
    proposes what an uninterrupted one would have proposed.

    Args:
        make: makes a sampler from a seed. The sampler must have no memory besides the study, like
            Optuna's TPE, random and GP samplers.
        seed: seed of the study.
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
        # If a search was killed between two parameters of a trial, draw the earlier ones again, so
        # that the generator is in the same state as before.
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
    """Optuna sampler: proposes the student shape with the highest reward predicted by an LSTM.

    The LSTM is trained on the trials of the study. It is part of a controller, which picks the
    point (student shape) of each new trial.

    A pick can also explore, in a way that depends on the controller. Trained candidates are counted
    in episodes of ``num_candidates``. The probability that a pick explores falls from 1 in the
    first episode to 0 in the last, and then stays 0. A point that is already in the study is
    proposed again only if no other is left. The sampler learns to avoid points that would break a
    constraint.

    The sampler keeps no state outside the study. The random draws for a trial are seeded by
    ``seed`` and the trial's number. So a resumed study proposes what an uninterrupted one would
    have proposed, and parallel workers learn from each other's trials. Parameters that are not
    categorical, not in every trial, or whose choices change, are drawn uniformly and independently.

    The attribute ``predictions`` maps a trial's number to its predicted reward. Trials whose point
    was not picked by a prediction are missing.

    Args:
        seed: seed of all random draws.
        num_candidates: number of trained candidates in an episode.
        num_episodes: number of episodes; from the last one on, no pick explores.
        controller: makes a controller from the choices of each parameter and a generator:
            ``EnsembleLSTM``, or ``RewardLSTM``, that of Trivedi et al. 2023.

    Raises:
        UserError: ``num_candidates`` or ``num_episodes`` is below 1.
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
        """Return the probability that the next pick explores instead of taking the best prediction.

        Args:
            num_tried: number of candidates that were trained to the end or ended by a pruner.
        """
        return exploration_ratio(num_tried, self.num_candidates, self._num_episodes)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the categorical parameters that every trial has, with the same choices.

        The result maps their names to their choices. Only complete and pruned trials count; if
        there are none, running and failed ones do. Optuna's ``IntersectionSearchSpace`` ignores
        pruned trials by default. Here they count because a student that exceeds the budget is
        pruned, and the next trial must avoid its point even if all trials so far were pruned.
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
        """Return the points and rewards of all trials in the study but the one to be sampled.

        Args:
            study: the study.
            trial: trial to be sampled.
            space: parameters whose choices make a point.

        Returns:
            Four values: the points of all other trials; for points whose constraints were checked,
            whether they met the constraints; the rewards of feasible points that were trained to
            the end, negated if the study minimises; and the number of points that were trained, to
            the end or until the pruner ended them.
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
    """Return a trial's choice indices in ``space``; None if it lacks a parameter of ``space``.

    The parameters of a queued trial are those that it was queued with.
    """
    params = trial.params | trial.system_attrs.get("fixed_params", {})
    try:
        return tuple(int(dist.to_internal_repr(params[name])) for name, dist in space.items())
    except (KeyError, ValueError):
        return None


def _pool(
    sizes: Sequence[int], barred: Iterable[Collection[Point]], generator: torch.Generator
) -> Tensor:
    """Return the choice indices of P points that may be proposed, (P, F).

    Args:
        sizes: number of choices of each of the F parameters.
        barred: sets of points to leave out, in order of preference: the first set is used that
            leaves at least one point, or else none.
        generator: source of the draws from a space of more than ``POOL_SIZE`` points.
    """
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
    """The LSTM sampler of Trivedi et al. 2023, the original KD-NAS.

    It uses one ``RewardLSTM`` for the whole search, where ``LSTMSampler`` makes new LSTMs for each
    proposal.

    Args:
        seed: seed of all random draws.
        num_candidates: number of trained candidates in an episode.
        num_episodes: number of episodes; from the last one on, the sampler no longer explores.
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
    """Make the Optuna sampler that ``spec`` names.

    Args:
        spec: a key of ``SAMPLERS``, a class path, or a mapping with ``class_path`` and
            ``init_args``.
        seed: seed of the study; not used if ``init_args`` has a ``seed``.

    Raises:
        UserError: there is no such sampler, it needs numerical parameters (CMA-ES), or it does not
            take the ``init_args``.
    """
    found, arguments = _find(spec, SAMPLERS, BaseSampler, "sampler")
    seed = arguments.pop("seed", seed)  # the same seed for every trial would propose the same

    def make(trial_seed: int) -> BaseSampler:
        return _make(found, arguments, "sampler", trial_seed)

    sampler = make(seed)  # errors show now, not at the first trial
    # An LSTMSampler seeds each trial by itself.
    return sampler if isinstance(sampler, LSTMSampler) else PerTrialSeed(make, seed)


def lstm_of(spec: Spec) -> LSTMSampler | None:
    """Return the sampler that ``spec`` names if it is an ``LSTMSampler``, else None.

    Args:
        spec: names the sampler, as for ``make_sampler``.
    """
    found, arguments = _find(spec, SAMPLERS, BaseSampler, "sampler")
    return _make(found, arguments, "sampler") if issubclass(found, LSTMSampler) else None


def make_pruner(spec: Spec) -> BasePruner:
    """Make the Optuna pruner that ``spec`` names.

    Args:
        spec: a key of ``PRUNERS``, a class path, or a mapping with ``class_path`` and
            ``init_args``.

    Raises:
        UserError: there is no such pruner, or it does not take the ``init_args``.
    """
    found, arguments = _find(spec, PRUNERS, BasePruner, "pruner")
    return _make(found, arguments, "pruner")


def _find(
    spec: Spec, known: Mapping[str, Spec], base: type[Any], kind: str
) -> tuple[type[Any], dict[str, Any]]:
    spec = {"class_path": spec} if isinstance(spec, str) else spec
    if "class_path" not in spec:  # e.g. --sampler.num_candidates without --sampler
        raise UserError(
            f"{kind} has the settings {dict(spec)} but no class_path, so the {kind} is unknown: "
            f"give --{kind} '{{class_path: {[*known][0]}, init_args: {{NAME: VALUE}}}}'."
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
            f"{spec!r} is not a {kind}: give the class path of an Optuna {kind}, and its init_args."
        )
    if issubclass(found, CmaEsSampler):  # it would also store a pickle in the database
        raise UserError(
            f"The sampler {found.__name__} needs numerical parameters, but a student's parameters "
            "are categorical: choose another sampler."
        )
    return found, {**short.get("init_args", {}), **arguments}


def _make(found: type[Any], arguments: dict[str, Any], kind: str, seed: int | None = None) -> Any:
    if seed is not None and "seed" in inspect.signature(found).parameters:
        given = arguments.get(
            "seed"
        )  # of a nested sampler; used as it is, it would make all trials equal
        arguments = arguments | {"seed": seed if given is None else seed_of(seed, given)}
    known, base = (SAMPLERS, BaseSampler) if kind == "sampler" else (PRUNERS, BasePruner)
    for name, value in arguments.items():  # some wrap another sampler or pruner
        if isinstance(value, Mapping) and "class_path" in value:
            arguments = arguments | {name: _make(*_find(value, known, base, kind), kind, seed)}
    try:
        return found(**arguments)
    except Exception as error:  # each class raises its own errors
        raise UserError(
            f"The {kind} {found.__name__} cannot be created with {arguments} "
            f"({first_line(error)}): correct its init_args."
        ) from error
