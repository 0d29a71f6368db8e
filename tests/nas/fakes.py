"""A search whose candidates are functions of their shape: nothing is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner, NopPruner
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.study import Study
from optuna.trial import FrozenTrial

from kdnas.models.arch import StudentArch
from kdnas.nas.sampler import make_sampler
from kdnas.nas.search import search
from kdnas.nas.space import SearchSpace
from kdnas.nas.study import open_study
from kdnas.nas.trials import Outcome, results_in
from kdnas.system.engine import Engine
from kdnas.system.files import Run
from kdnas.system.jobs import Job

# What a candidate ends as; it may report to the pruner in its folder first, or raise.
End = Callable[[StudentArch, Path], Outcome]


def space_of(
    depths: list[int], widths: list[int], acts: tuple[str, ...] = ("gelu",)
) -> SearchSpace:
    return SearchSpace(
        {
            "num_hidden_layers": depths,
            "num_attention_heads": [2],
            "hidden_size": widths,
            "intermediate_size": [64],
            "hidden_act": list(acts),
        }
    )


SPACE = space_of([1, 2, 3, 4, 5, 6], [32, 48, 64], ("gelu", "relu"))  # 36 students
THREE = space_of([1, 2, 3], [32])
ONE, TWO, OTHER = list(THREE)  # by their number of layers


def value_of(arch: StudentArch) -> float:
    """A reward by shape alone, so that every start of a search sees the same."""
    return arch.num_hidden_layers + arch.hidden_size / 100 - (arch.hidden_act == "relu") / 7


def outcome(arch: StudentArch, state: str = "COMPLETE", **more: Any) -> Outcome:
    """With the attributes that every candidate has."""
    attrs = {"arch": arch.to_dict(), "seconds": 0.5} | more.pop("attrs", {})
    value = value_of(arch) if state == "COMPLETE" else None
    budget = {"budget": 0.0}
    known = {"value": value, "constraints": budget, "started": 1e9, "ended": 1e9 + 0.5} | more
    return Outcome(arch.to_dict(), state, attrs=attrs, **known)


def end_well(arch: StudentArch, folder: Path) -> Outcome:
    return outcome(arch, attrs={"loss": 0.25})


def refuse(arch: StudentArch, folder: Path) -> Outcome:
    return outcome(arch, "PRUNED", attrs={"refused": "too slow"}, constraints={"budget": 0.25})


class Fake:
    """A run in a folder, whose candidates end as ``end`` says.

    Args:
        folder: of the run.
        end: of every candidate but the ``special`` ones.
        special: the ends of some shapes.
        space: of the search.
        pruner: of the search.
        in_memory: its study is kept in memory, for speed; else in a database, as always.
    """

    def __init__(
        self,
        folder: Path,
        end: End = end_well,
        special: dict[StudentArch, End] | None = None,
        space: SearchSpace = SPACE,
        pruner: BasePruner | None = None,
        in_memory: bool = True,
    ) -> None:
        self.run, self.end, self.special = Run(folder, "run"), end, special or {}
        self.space, self.pruner = space, pruner
        self.storage: BaseStorage | str | Path = (
            InMemoryStorage() if in_memory else self.run.study_db
        )
        self.trained: list[StudentArch] = []
        self.run.folder.mkdir(parents=True, exist_ok=True)

    def open(self) -> Study:
        """The study, as each start of the program opens it."""
        sampler = make_sampler("random", 0)
        if isinstance(self.storage, BaseStorage):
            return optuna.create_study(
                storage=self.storage,
                study_name="run",
                sampler=sampler,
                pruner=self.pruner or NopPruner(),
                direction="maximize",
                load_if_exists=True,
            )
        results = results_in(self.run.folder)
        return open_study(self.storage, "run", self.space, results, sampler, self.pruner)

    def queue(self, *archs: StudentArch) -> None:
        """What is proposed first."""
        study = self.open()
        for arch in archs:
            study.enqueue_trial(arch.to_dict())

    def job(self, number: int, arch: StudentArch) -> Job:
        return Job(self.run.trial(number), f"trial {number}: {arch}", self.train, (number, arch))

    def train(self, number: int, arch: StudentArch) -> dict[str, Any]:
        self.trained.append(arch)
        return self.special.get(arch, self.end)(arch, self.run.trial(number)).to_dict()

    def search(self, n_trials: int, engine: Engine | None = None, **more: Any) -> FrozenTrial:
        """Open the study and search; the arguments are those of ``kdnas.nas.search.search``."""
        with engine or Engine() as engine:
            return search(self.open(), self.space, engine, self.job, n_trials, **more)

    @property
    def trials(self) -> list[FrozenTrial]:
        return self.open().trials

    @property
    def states(self) -> list[str]:
        return [trial.state.name for trial in self.trials]

    @property
    def story(self) -> list[tuple[object, ...]]:
        """What two searches must have in common to be the same one."""
        return [
            (t.number, t.params, t.state.name, t.value, t.user_attrs.get("twin_of"))
            for t in self.trials
        ]
