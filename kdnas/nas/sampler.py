"""Samplers that never repeat themselves, and how samplers and pruners are asked for."""

import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from kdnas.errors import UserError, first_line, nearest

# A short name, a class path, or a mapping of class_path and init_args, as in YAML.
Spec = str | Mapping[str, Any]
SAMPLERS: Mapping[str, Spec] = {
    "tpe": {"class_path": "optuna.samplers.TPESampler", "init_args": {"n_startup_trials": 5}},
    "random": "optuna.samplers.RandomSampler",
    "gp": "optuna.samplers.GPSampler",
    "nsgaii": "optuna.samplers.NSGAIISampler",
}
PRUNERS: Mapping[str, Spec] = {
    "none": "optuna.pruners.NopPruner",
    "median": {"class_path": "optuna.pruners.MedianPruner", "init_args": {"n_startup_trials": 4}},
    "hyperband": "optuna.pruners.HyperbandPruner",
}


class PerTrialSeed(BaseSampler):
    """Any Optuna sampler, made anew for each trial with a seed from (seed, trial number).

    A seeded sampler proposes the same again after a resume and in a second worker, since the state of its generator is
    not in the study. Trial numbers are unique in a study, so these seeds are too, and a resumed study proposes what the
    unbroken one would have proposed.

    Args:
        make: makes a sampler of a seed; what it learns must come from the study (TPE, random, GP do).
        seed: of the study.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int = 0) -> None:
        self._make, self._seed = make, seed
        self._samplers: dict[int, BaseSampler] = {}

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        if trial.number not in self._samplers:
            digest = hashlib.sha256(f"{self._seed}/{trial.number}".encode()).digest()
            self._samplers[trial.number] = self._make(int.from_bytes(digest[:4], "big"))
        return self._samplers[trial.number]

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._of(trial).before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._of(trial).after_trial(study, trial, state, values)
        self._samplers.pop(trial.number, None)


def make_sampler(spec: Spec, seed: int = 0) -> BaseSampler:
    """A sampler of the study with this seed: a key of ``SAMPLERS``, a class path, or a class path with ``init_args``.

    Raises:
        UserError: there is no such sampler, or it does not take these arguments.
    """
    found, arguments = _find(spec, SAMPLERS, BaseSampler, "sampler")

    def make(trial_seed: int) -> BaseSampler:
        seeded = {"seed": trial_seed} if "seed" in inspect.signature(found).parameters else {}
        return _make(found, seeded | arguments, "sampler")

    make(seed)  # what is wrong shows now, not at the first trial
    return PerTrialSeed(make, seed)


def make_pruner(spec: Spec) -> BasePruner:
    """A pruner: a key of ``PRUNERS``, a class path, or a class path with ``init_args``.

    Raises:
        UserError: there is no such pruner, or it does not take these arguments.
    """
    found, arguments = _find(spec, PRUNERS, BasePruner, "pruner")
    return _make(found, arguments, "pruner")


def _find(spec: Spec, known: Mapping[str, Spec], base: type[Any], kind: str) -> tuple[type[Any], dict[str, Any]]:
    if isinstance(spec, str):
        spec = known.get(spec, spec)
    if isinstance(spec, str):
        spec = {"class_path": spec}
    path, arguments = spec.get("class_path"), dict(spec.get("init_args") or {})
    module, _, name = str(path).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        hint = nearest(path, known)
        raise UserError(f"There is no {kind} {path!r}: give a class path, or a short name.{hint}") from error
    if not (isinstance(found, type) and issubclass(found, base)) or set(spec) - {"class_path", "init_args"}:
        raise UserError(f"{spec!r} is no {kind}: give the class path of an Optuna {kind}, and its init_args.")
    return found, arguments


def _make(found: type[Any], arguments: dict[str, Any], kind: str) -> Any:
    try:
        return found(**arguments)
    except Exception as error:  # each class refuses in its own way
        raise UserError(f"The {kind} {found.__name__} does not take {arguments}: {first_line(error)}.") from error
