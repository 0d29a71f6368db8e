"""From Python: ``from kdnas import run, search, distill, glue, latency, export``.

What takes seconds to import is imported by the call.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike
    from typing import TypeAlias

    from datasets import Dataset, DatasetDict
    from pandas import DataFrame, Series
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kdnas.data.datamodule import DataSettings
    from kdnas.distillation.module import Recipe
    from kdnas.distillation.teacher_states import StatesSettings
    from kdnas.models.arch import StudentArch
    from kdnas.system.files import Run
    from kdnas.training.trainer import TrainerSettings

    Pair: TypeAlias = tuple[PreTrainedModel, PreTrainedTokenizerBase]
    Model: TypeAlias = "str | PathLike[str] | Pair | Student"
    Text: TypeAlias = str | PathLike[str] | Dataset | Sequence[str]
    Task: TypeAlias = str | PathLike[str] | DatasetDict


@dataclass(frozen=True)
class SearchResult:
    """The best student of a search, which ``distill`` takes.

    Args:
        arch: its shape.
        trial: its number in ``trials.csv``.
        reward: what students are ranked by.
        loss: of the objective, on held-out rows.
        contextual_share: how much of what context adds it knows, 0 to 1.
        latency_ms: median of encoder and classification head.
        speedup: times as fast as the teacher.
        num_parameters: with the head.
        folder: of the search, with ``trials.csv`` and ``best_student.yaml``.
    """

    arch: StudentArch
    trial: int
    reward: float
    loss: float
    contextual_share: float
    latency_ms: float
    speedup: float
    num_parameters: int
    folder: Path


@dataclass(frozen=True)
class Student:
    """A distilled student. Every function here takes it as a model.

    Args:
        model: a plain transformers model in eval mode on the CPU, without a head.
        tokenizer: its teacher's.
        arch: its shape.
        loss: of the objective, on held-out rows.
        contextual_share: how much of what context adds it knows, 0 to 1.
        num_parameters: of the model.
        folder: of the distillation, with TensorBoard's curves.
    """

    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    arch: StudentArch
    loss: float
    contextual_share: float
    num_parameters: int
    folder: Path

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the model and its tokenizer as a Hugging Face folder."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True, eq=False)
class GlueResult:
    """Models fine-tuned on labelled tasks.

    Args:
        table: a row a model: ``model``, of each task the mean score over seeds, ``average``, its
            ``spread`` over seeds, ``share_kept``, ``latency_ms``, ``speedup``, ``num_parameters``.
        folder: of the comparison, with ``runs.jsonl``.
    """

    table: DataFrame
    folder: Path


@dataclass(frozen=True, eq=False)
class LatencyResult:
    """Models measured in turn.

    Args:
        table: a row a model and combination: ``model``, ``backend``, ``device``, ``threads``,
            ``batch``, ``length``, ``megabytes``, ``median_ms``, ``iqr_ms``, ``p95_ms``,
            ``tokens_per_second``, ``sequences_per_second``, ``speedup``.
        json: the same as a file; the picture lies beside it, as ``.png``.
    """

    table: DataFrame
    json: Path


@dataclass(frozen=True, eq=False)
class ExportResult:
    """A folder to deploy, and what was checked.

    Args:
        folder: weights, tokenizer, ``model.onnx``, ``model.int8.onnx``, ``predict.py``, a card.
        max_abs_difference: of the ONNX graph's outputs from torch's.
        int8: ``method``, ``rows`` that were compared, ``cosine`` to the ONNX graph and, with a
            task, ``score`` and ``int8_score``.
        latency: a row a ``batch`` and ``length``: ``torch_ms``, ``onnx_ms``, ``int8_ms``.
        sentences: for sentence-transformers ``cosine`` to the teacher's vectors and, with a task,
            ``spearman`` and ``teacher_spearman``; else None.
    """

    folder: Path
    max_abs_difference: float
    int8: Series
    latency: DataFrame
    sentences: Series | None


@dataclass(frozen=True, eq=False)
class RunResult:
    """What the whole job made.

    Args:
        best: the best student of the search.
        loss: the student's, after full KD.
        contextual_share: after full KD, the share that it knows of what context adds (1: equal to
            its teacher).
        table: of each fine-tuned model its ``score``, ``share_kept``, ``latency_ms``, ``speedup`` and
            ``num_parameters``; the models are ``teacher``, ``student`` and the baselines ``random``
            (the same shape from a random start), ``static`` (no layers) and ``layer_cut`` (the
            teacher with fewer layers). None without a task.
        export: the student to deploy.
        folder: of the run, with ``report.html``.
    """

    best: SearchResult
    loss: float
    contextual_share: float
    table: DataFrame | None
    export: ExportResult
    folder: Path


def search(
    teacher: Model,
    text: Text,
    *,
    speedup: float | None = None,
    latency_ms: float | None = None,
    num_parameters: int | None = None,
    n_trials: int = 20,
    num_epochs: int = 2,
    **settings: Any,
) -> SearchResult:
    """Find the best student within a budget, as ``kdnas search`` does; the same call again goes on.

    It trains in this process, unless ``workers`` is given: a candidate that crashes in native code
    ends it then, which the command's search survives. A script that asks for workers is imported by
    them: put its calls below ``if __name__ == "__main__":``. Objects are written into ``inputs/``
    below ``root``, the folder of all runs.

    Args:
        teacher: a folder, a hub name, ``quickstart``, transformers' ``(model, tokenizer)``, or a
            ``Student``.
        text: a parquet, jsonl, csv or txt file, a folder of them, a hub data set, a
            ``datasets.Dataset``, or a list of texts.
        speedup: times as fast as the teacher, at least.
        latency_ms: milliseconds, at most.
        num_parameters: at most.
        n_trials: distinct candidates to train in all.
        num_epochs: of each candidate's mini-KD.
        settings: the other fields of ``SearchConfig``, such as ``name``, ``root``, ``workers``;
            ``search``, a ``SearchSettings``, stands for the five above.

    Returns:
        The best student.

    Raises:
        UserError: anything that the user can mend, before anything is trained.
    """
    from kdnas.commands.config import SearchConfig
    from kdnas.commands.run import search as search_students

    config = _config(
        SearchConfig,
        teacher=teacher,
        text=text,
        speedup=speedup,
        latency_ms=latency_ms,
        num_parameters=num_parameters,
        n_trials=n_trials,
        num_epochs=num_epochs,
        **settings,
    )
    return _best(search_students(config))


def run(teacher: Model, text: Text, task: Task | None = None, **settings: Any) -> RunResult:
    """Do the whole job, as ``kdnas run`` does: search, full KD, fine-tuning, export, report.

    The same call again goes on where it was stopped; of a finished run it gives the result.

    Args:
        teacher: as for ``search``.
        text: as for ``search``.
        task: a folder, a GLUE name, or a ``datasets.DatasetDict`` with ``train`` and
            ``validation``; None: distil and export the encoder alone.
        settings: ``speedup``, ``latency_ms``, ``num_parameters``, ``n_trials`` and ``num_epochs``
            as for ``search``, and the other fields of ``RunConfig``, such as ``name``.

    Returns:
        The student's figures, and where it is.

    Raises:
        UserError: anything that the user can mend, before anything is trained.
    """
    from pandas import DataFrame

    from kdnas.commands.config import RunConfig
    from kdnas.commands.run import run as run_stages
    from kdnas.system.files import read_json

    config = _config(RunConfig, teacher=teacher, text=text, task=task, **settings)
    made, table = run_stages(config), None
    if config.task:
        table = DataFrame(read_json(made.glue / "results.json")["models"]).T
        names = ["score", "share_kept", "latency_ms", "speedup", "num_parameters"]
        table = table[names].astype(float)
    more = {"table": table, "export": _exported(made.student), "folder": made.folder}
    return _of(RunResult, read_json(made.full_kd / "result.json") | more | {"best": _best(made)})


def distill(
    teacher: Model,
    text: Text,
    arch: StudentArch | SearchResult,
    *,
    num_epochs: int = 10,
    recipe: Recipe | None = None,
    data: DataSettings | None = None,
    states: StatesSettings | None = None,
    trainer: TrainerSettings | None = None,
    name: str = "distill",
    root: str | PathLike[str] = "lightning_logs",
    seed: int = 0,
) -> Student:
    """Distil one student on all rows, as the full KD of ``kdnas run`` does.

    After Ctrl-C the same call resumes. Until it has finished, a call of the same name with other
    settings is refused: give another name, or delete ``last.ckpt`` in its folder.

    Args:
        teacher: as for ``search``.
        text: as for ``search``.
        arch: the student's shape, or a search's result.
        num_epochs: passes over the rows.
        recipe: objective, start and rates.
        data: how text becomes batches.
        states: where the teacher's states are kept.
        trainer: device and precision.
        name: of the folder below ``root``, for logs, checkpoint and encoder.
        root: the folder of all runs.
        seed: of the weights that are not the teacher's.

    Returns:
        The student; ``save_pretrained`` keeps it.

    Raises:
        UserError: anything that the user can mend, before anything is trained.
    """
    from kdnas.commands.distill import distill as distill_one
    from kdnas.commands.objects import as_paths
    from kdnas.data.datamodule import DataSettings
    from kdnas.distillation.module import Recipe
    from kdnas.distillation.teacher_states import StatesSettings
    from kdnas.models.encoders import find_teacher
    from kdnas.training.trainer import TrainerSettings

    shape = arch.arch if isinstance(arch, SearchResult) else arch
    asked = as_paths(teacher=teacher, text=text, root=root)
    result = distill_one(
        asked["teacher"],
        asked["text"],
        shape,
        num_epochs,
        recipe or Recipe(),
        data or DataSettings(),
        states or StatesSettings(),
        trainer or TrainerSettings(),
        name,
        asked["root"],
        seed,
    )
    made = find_teacher(str(Path(root, name, "encoder")))
    model = made.load().requires_grad_(True)  # without pooler, as it was trained
    more = {"model": model, "tokenizer": made.tokenizer, "arch": shape, "folder": Path(root, name)}
    return _of(Student, result | more)


def glue(
    models: Sequence[Model], task: Task | Sequence[Task] | None = None, **settings: Any
) -> GlueResult:
    """Fine-tune models on labelled tasks, as ``kdnas glue`` does; the same call again goes on.

    Args:
        models: each as a teacher of ``search``; the first is what the others are compared with.
        task: as for ``run``, or a list; None: ``data`` and ``text_column`` are among ``settings``.
        settings: the other fields of ``GlueConfig``, such as ``seeds``, ``root``, ``workers``.

    Returns:
        What each model reaches, in the given order.

    Raises:
        UserError: anything that the user can mend, before anything is trained.
        CandidateFailed: a loss is not finite.
    """
    from pandas import DataFrame

    from kdnas.commands.config import GlueConfig
    from kdnas.commands.glue import glue as compare
    from kdnas.commands.objects import as_paths

    tasks = list(task) if isinstance(task, list | tuple) else [] if task is None else [task]
    asked = {"workers": 0} | settings | {"model": list(models), "task": tasks}
    config = GlueConfig(**as_paths(**asked))
    rows = [
        {"model": model} | {name: mean(scores) for name, scores in row["scores"].items()} | row
        for model, row in compare(config)["models"].items()
    ]
    table = DataFrame(rows).drop(columns="scores")
    return GlueResult(table, Path(config.root, config.name))


def latency(models: Sequence[Model], **settings: Any) -> LatencyResult:
    """Measure the latency of models in turn, as ``kdnas latency`` does.

    Args:
        models: each as a teacher of ``search``; the first is what the others are compared with.
        settings: the other fields of ``LatencyConfig``, such as ``backend=["torch"]``,
            ``batch=[1, 8]``, ``length=[128]``.

    Returns:
        A row a model, in the given order, of each combination.

    Raises:
        UserError: anything that the user can mend.
    """
    from pandas import DataFrame

    from kdnas.commands.config import LatencyConfig
    from kdnas.commands.latency import latency_table
    from kdnas.commands.objects import as_paths

    config = LatencyConfig(**as_paths(model=list(models), **settings))
    return LatencyResult(DataFrame(latency_table(config)), Path(config.json))


def export(student: Model | None = None, **settings: Any) -> ExportResult:
    """Export a student into one folder to deploy, as ``kdnas export`` does.

    Args:
        student: a folder, transformers' ``(model, tokenizer)``, or a ``Student``; None: the name of
            a ``run`` is among ``settings``.
        settings: the other fields of ``ExportConfig``, such as ``output``, ``force`` and, as for
            ``run``, ``teacher``, ``text`` and ``task``.

    Returns:
        The folder, and what was checked.

    Raises:
        UserError: anything that the user can mend; nothing is exported then.
        ParityError: a file does not compute what the student computes; nothing is exported either.
    """
    from kdnas.commands.config import ExportConfig
    from kdnas.commands.export import export as export_student
    from kdnas.commands.objects import as_paths

    config = ExportConfig(**as_paths(student=student, **settings))
    return _exported(export_student(config))


def _config(kind: Any, **settings: Any) -> Any:
    """The config of a search or a run."""
    from kdnas.commands.config import SearchSettings
    from kdnas.commands.objects import as_paths
    from kdnas.nas.budget import Budget

    def taken(*names: str) -> dict[str, Any]:
        return {name: settings.pop(name) for name in names if name in settings}

    budget = Budget(**taken("speedup", "latency_ms", "num_parameters"))
    search = SearchSettings(**taken("n_trials", "num_epochs"), budget=budget)
    return kind(**{"workers": 0, "search": search} | as_paths(**settings))


def _of(kind: Any, values: dict[str, Any]) -> Any:
    """A result, whose fields are among some values."""
    return kind(**{name: values[name] for name in signature(kind).parameters})


def _best(made: Run) -> SearchResult:
    """The best student of a search that is done."""
    from kdnas.models.arch import StudentArch
    from kdnas.nas.trials import results_in

    arch = StudentArch.from_yaml(made.best_student)
    number, best = next(
        (number, outcome)
        for number, outcome in results_in(made.folder).items()
        if outcome.state == "COMPLETE" and outcome.params == arch.to_dict()
    )
    found = {"arch": arch, "trial": number, "reward": best.value, "folder": made.folder}
    return _of(SearchResult, best.attrs | found)


def _exported(folder: Path) -> ExportResult:
    """What the manifest of an export says."""
    from pandas import DataFrame, Series

    from kdnas.system.files import MANIFEST, read_json

    checks = read_json(folder / MANIFEST)["checks"]
    return ExportResult(
        folder,
        checks["max_abs_difference"],
        Series(checks["int8"]),
        DataFrame(checks["latency"]),
        Series(checks["sentences"]) if "sentences" in checks else None,
    )
