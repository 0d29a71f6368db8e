"""The Python API: ``from kdnas import run, search, distill, glue, latency, export``.

Each function imports torch and other slow libraries when it is called, not before.
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
    """The best student of a search; ``distill`` takes it in place of a shape.

    Args:
        arch: the student's shape.
        trial: the number of its trial in ``trials.csv``.
        reward: the value that the search maximises.
        loss: the objective's loss on held-out rows, after the short training of candidates.
        contextual_share: how much of what context adds the student knows. 0: no more than a look-up
            table of words; 1: equal to the teacher; negative: less than the table.
        latency_ms: median latency of encoder and classification head, in milliseconds.
        speedup: the teacher's latency divided by the student's.
        num_parameters: parameters of encoder and classification head.
        folder: folder of the search, with ``trials.csv`` and ``best_student.yaml``.
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
    """A distilled student. All functions here accept it as a model.

    Args:
        model: a transformers encoder, without a head, in eval mode on the CPU.
        tokenizer: the teacher's tokenizer.
        arch: the student's shape.
        loss: the objective's loss on held-out rows.
        contextual_share: how much of what context adds the student knows. 0: no more than a look-up
            table of words; 1: equal to the teacher; negative: less than the table.
        num_parameters: parameters of the model.
        folder: folder of the distillation, with TensorBoard's curves.
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
    """Scores of models that were fine-tuned on labelled tasks.

    Args:
        table: a row for each model. Columns: ``model``; a column for each task, the mean score over
            seeds; ``average`` over tasks; its ``spread`` (standard deviation over seeds);
            ``share_kept`` of the first model's average; ``latency_ms`` and ``latency_iqr_ms``;
            ``speedup`` over the first model; ``num_parameters``; with ``distill_from``,
            ``gap_closed``, the share of a student's gap to the first model that its help closes.
        folder: folder of the comparison, with ``runs.jsonl``.
    """

    table: DataFrame
    folder: Path


@dataclass(frozen=True, eq=False)
class LatencyResult:
    """Latencies of models that were measured in turn.

    Args:
        table: a row for each model and combination of settings. Columns: ``model``, ``backend``,
            ``device``, ``threads``, ``batch``, ``length``, ``megabytes``, ``median_ms``, ``iqr_ms``
            (interquartile range), ``p95_ms``, ``tokens_per_second``, ``sequences_per_second``,
            ``speedup`` over the first model.
        json: a file with the same figures; a picture of them is beside it, as ``.png``.
    """

    table: DataFrame
    json: Path


@dataclass(frozen=True, eq=False)
class ExportResult:
    """A folder to deploy, and the results of its checks.

    Args:
        folder: weights, tokenizer, ``model.onnx``, ``model.int8.onnx``, ``predict.py`` and a model
            card.
        max_abs_difference: largest difference between outputs of ``model.onnx`` and of torch.
        int8: ``method`` (``dynamic`` or ``static``), ``rows`` (a description of the rows that were
            compared), ``cosine`` between the outputs of ``model.int8.onnx`` and ``model.onnx``
            and, with a task, their scores ``int8_score`` and ``score``.
        latency: a row for each ``batch`` and ``length``, with ``torch_ms``, ``onnx_ms`` and
            ``int8_ms``, in milliseconds on one CPU thread.
        sentences: for an export for sentence-transformers, ``cosine`` to the teacher's vectors and,
            with a task, ``spearman`` and ``teacher_spearman``; else None.
    """

    folder: Path
    max_abs_difference: float
    int8: Series
    latency: DataFrame
    sentences: Series | None


@dataclass(frozen=True, eq=False)
class RunResult:
    """Results of a whole run.

    Args:
        best: the best student of the search.
        loss: the student's loss on held-out rows after full KD.
        contextual_share: how much of what context adds the student knows after full KD (1: equal to
            the teacher).
        table: a row for each fine-tuned model, with ``score``, ``share_kept`` of the teacher's
            score, ``latency_ms``, ``speedup`` and ``num_parameters``. The models are ``teacher``,
            ``student`` and the baselines ``random`` (the student's shape from a random start),
            ``static`` (no layers) and ``layer_cut`` (the teacher with fewer layers). None without a
            task.
        export: the student to deploy.
        folder: folder of the run, with ``report.html``.
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
    """Find the best student within a budget, as ``kdnas search`` does.

    The same call again resumes the search, or returns the result of a finished one.

    Candidates are trained in this process, which a crash in native code would end. With
    ``workers=N`` they are trained in N other processes, and the search survives a crash; these
    import the calling script, whose calls must then be below ``if __name__ == "__main__":``. Models
    and texts that are given as objects are written to ``inputs/`` in ``root``, the folder of all
    runs.

    Args:
        teacher: a folder, a hub name, ``quickstart``, a pair ``(model, tokenizer)`` of transformers
            objects, or a ``Student``.
        text: a parquet, jsonl, csv or txt file, a folder of them, a hub data set, a
            ``datasets.Dataset``, or a list of texts.
        speedup: least speed-up over the teacher: teacher's latency divided by student's. None: no
            limit.
        latency_ms: largest latency, in milliseconds. None: no limit.
        num_parameters: largest number of parameters. None: no limit.
        n_trials: number of distinct candidates to train in all.
        num_epochs: epochs of the short distillation (mini-KD) of each candidate.
        settings: other fields of ``SearchConfig``, such as ``name``, ``root`` and ``workers``. A
            ``SearchSettings`` as ``search`` takes the place of the five arguments above.

    Returns:
        The best student.

    Raises:
        UserError: an argument or an input is wrong, which is found before anything is trained; the
            message says what to change.
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
    """Search, distil, fine-tune, export and report in one run, as ``kdnas run`` does.

    The same call again resumes the run, or returns the results of a finished one.

    Args:
        teacher: as for ``search``.
        text: as for ``search``.
        task: a labelled task to fine-tune on: a folder, a GLUE name, or a ``datasets.DatasetDict``
            with ``train`` and ``validation``. None: the encoder is distilled and exported without
            fine-tuning.
        settings: ``speedup``, ``latency_ms``, ``num_parameters``, ``n_trials`` and ``num_epochs``
            as for ``search``, and other fields of ``RunConfig``, such as ``name``.

    Returns:
        The student's figures, and its folder.

    Raises:
        UserError: an argument or an input is wrong, which is found before anything is trained; the
            message says what to change.
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
    """Distil one student on all training rows, as the full KD of ``kdnas run`` does.

    After Ctrl-C the same call resumes. While a distillation is unfinished, a call with its name and
    other settings is refused: give another name, or delete ``last.ckpt`` in its folder.

    Args:
        teacher: as for ``search``.
        text: as for ``search``.
        arch: the student's shape, or the result of a search.
        num_epochs: passes over the rows.
        recipe: objective, start and learning rates; None: ``Recipe()``.
        data: how text becomes batches; None: ``DataSettings()``.
        states: where the teacher's states are stored; None: ``StatesSettings()``.
        trainer: device and precision; None: ``TrainerSettings()``.
        name: name of the folder in ``root`` that gets logs, checkpoint and encoder.
        root: the folder of all runs.
        seed: seed of the weights that are not copied from the teacher.

    Returns:
        The student; write it to a folder with its ``save_pretrained``.

    Raises:
        UserError: an argument or an input is wrong, which is found before anything is trained; the
            message says what to change.
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
    """Fine-tune models on labelled tasks and score them, as ``kdnas glue`` does.

    The same call again resumes the comparison, or returns the results of a finished one.

    Args:
        models: models, each given like the teacher of ``search``. The others are compared with the
            first.
        task: a task as for ``run``, or a list of tasks. None: give ``data`` and ``text_column``
            instead, your own labelled text.
        settings: other fields of ``GlueConfig``, such as ``seeds``, ``root`` and ``workers``.

    Returns:
        The scores of each model, in the order of ``models``.

    Raises:
        UserError: an argument or an input is wrong, which is found before anything is trained; the
            message says what to change.
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
        models: models, each given like the teacher of ``search``. The others are compared with the
            first.
        settings: other fields of ``LatencyConfig``, such as ``backend=["torch"]``, ``batch=[1, 8]``
            and ``length=[128]``. Every combination of such lists is measured.

    Returns:
        For each combination a row per model, in the order of ``models``.

    Raises:
        UserError: an argument or a model is wrong; the message says what to change.
    """
    from pandas import DataFrame

    from kdnas.commands.config import LatencyConfig
    from kdnas.commands.latency import latency_table
    from kdnas.commands.objects import as_paths

    config = LatencyConfig(**as_paths(model=list(models), **settings))
    return LatencyResult(DataFrame(latency_table(config)), Path(config.json))


def export(student: Model | None = None, **settings: Any) -> ExportResult:
    """Export a student to one folder to deploy, as ``kdnas export`` does.

    Args:
        student: a folder, a pair ``(model, tokenizer)`` of transformers objects, or a ``Student``.
            None: give ``run``, the name of a finished run, whose student is exported.
        settings: other fields of ``ExportConfig``, such as ``output``, ``force`` and, as for
            ``run``, ``teacher``, ``text`` and ``task``.

    Returns:
        The folder, and the results of its checks.

    Raises:
        UserError: an argument or the student is wrong; nothing is exported, and the message says
            what to change.
        ParityError: an exported file computes something else than the student; nothing is exported.
    """
    from kdnas.commands.config import ExportConfig
    from kdnas.commands.export import export as export_student
    from kdnas.commands.objects import as_paths

    config = ExportConfig(**as_paths(student=student, **settings))
    return _exported(export_student(config))


def _config(kind: Any, **settings: Any) -> Any:
    """Build the config of a search or a run."""
    from kdnas.commands.config import SearchSettings
    from kdnas.commands.objects import as_paths
    from kdnas.nas.budget import Budget

    def taken(*names: str) -> dict[str, Any]:
        return {name: settings.pop(name) for name in names if name in settings}

    budget = Budget(**taken("speedup", "latency_ms", "num_parameters"))
    search = SearchSettings(**taken("n_trials", "num_epochs"), budget=budget)
    return kind(**{"workers": 0, "search": search} | as_paths(**settings))


def _of(kind: Any, values: dict[str, Any]) -> Any:
    """Build a result of class ``kind`` from the values of its fields, ignoring others."""
    return kind(**{name: values[name] for name in signature(kind).parameters})


def _best(made: Run) -> SearchResult:
    """Return the best student of a finished search."""
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
    """Read the result of an export from its manifest."""
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
