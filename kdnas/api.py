"""From Python: ``from kdnas import distill, search``. What takes seconds to import is imported by the call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdnas.data.datamodule import DataSettings
    from kdnas.distillation.module import Recipe
    from kdnas.distillation.teacher_states import StatesSettings
    from kdnas.models.arch import StudentArch
    from kdnas.training.trainer import TrainerSettings


def search(
    teacher: str,
    text: str,
    *,
    speedup: float | None = None,
    latency_ms: float | None = None,
    num_parameters: int | None = None,
    n_trials: int = 20,
    num_epochs: int = 2,
    **settings: Any,
) -> StudentArch:
    """Find the best student within a budget, as ``kdnas search`` does; the same call again goes on.

    It trains in this process, unless ``workers`` is given: a candidate that crashes in native code
    ends it then, which the command's search survives.

    Args:
        teacher: a folder, a hub name, or ``quickstart``.
        text: a parquet, jsonl, csv or txt file, a folder of them, or a hub data set.
        speedup: times as fast as the teacher, at least.
        latency_ms: milliseconds, at most.
        num_parameters: at most.
        n_trials: distinct candidates to train in all.
        num_epochs: of each candidate's mini-KD.
        settings: the other fields of ``SearchConfig``, such as ``name``, ``sampler``, ``workers``.

    Returns:
        The best student's shape.

    Raises:
        UserError: anything that the user can mend, before anything is trained.
    """
    from kdnas.commands import run
    from kdnas.commands.config import SearchConfig, SearchSettings
    from kdnas.nas.budget import Budget

    settings.setdefault("workers", 0)
    asked = SearchSettings(n_trials, num_epochs, Budget(speedup, latency_ms, num_parameters))
    return run.search(SearchConfig(teacher=teacher, text=text, search=asked, **settings))


def distill(
    teacher: str,
    text: str,
    arch: StudentArch,
    *,
    num_epochs: int = 10,
    recipe: Recipe | None = None,
    data: DataSettings | None = None,
    states: StatesSettings | None = None,
    trainer: TrainerSettings | None = None,
    name: str = "distill",
    root: str = "lightning_logs",
    seed: int = 0,
) -> PreTrainedModel:
    """Distil one student on all rows, as the full KD of ``kdnas run`` does; after Ctrl-C the same call goes on.

    A call of the same name with other settings is refused then, until ``last.ckpt`` in its folder
    is deleted.

    Args:
        teacher: a folder, a hub name, or ``quickstart``.
        text: as for ``search``.
        arch: the student's shape.
        num_epochs: passes over the rows.
        recipe: objective, start and rates.
        data: how text becomes batches.
        states: where the teacher's states are kept.
        trainer: device and precision.
        name: of the folder for TensorBoard, below ``root``.
        root: the folder of all runs.
        seed: of the weights that are not the teacher's.

    Returns:
        The student, a plain transformers model in eval mode on the CPU; ``save_pretrained`` keeps
        it.

    Raises:
        UserError: anything that the user can mend, before anything is trained.
    """
    from kdnas.commands.distill import distill as distill_one
    from kdnas.data.datamodule import DataSettings
    from kdnas.distillation.module import Recipe
    from kdnas.distillation.teacher_states import StatesSettings
    from kdnas.training.trainer import TrainerSettings

    return distill_one(
        teacher,
        text,
        arch,
        num_epochs,
        recipe or Recipe(),
        data or DataSettings(),
        states or StatesSettings(),
        trainer or TrainerSettings(),
        name,
        root,
        seed,
    )
