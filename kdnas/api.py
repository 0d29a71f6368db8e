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
    """The best student of a search. ``distill`` accepts this object instead of a student's shape.

    Args:
        arch: the student's shape.
        trial: the number of the student's trial in ``trials.csv``.
        reward: the student's reward, which is the value that the search maximises.
        loss: distillation loss on held-out rows, after the short distillation in the search.
        contextual_share: how well the student predicts the teacher's last hidden states. 0: as well
            as a linear map of the teacher's embeddings, which know no context; 1: as well as the
            teacher itself; negative: worse than the embeddings.
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
    """A distilled student. All functions of this module accept this object as a model.

    Args:
        model: a transformers encoder, without a head, in eval mode on the CPU.
        tokenizer: the teacher's tokenizer.
        arch: the student's shape.
        loss: distillation loss on held-out rows.
        contextual_share: how well the student predicts the teacher's last hidden states. 0: as well
            as a linear map of the teacher's embeddings, which know no context; 1: as well as the
            teacher itself; negative: worse than the embeddings.
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
        """Write the model and its tokenizer into ``folder``, in the format of Hugging Face."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True, eq=False)
class GlueResult:
    """Scores of models that were fine-tuned on labelled tasks.

    Args:
        table: a row for each model. Columns: ``model``; for each task, a column with the mean score
            over seeds; ``average``, the mean over tasks; ``spread``, the standard deviation of
            ``average`` over seeds; ``share_kept``, ``average`` divided by the first model's;
            ``latency_ms`` and ``latency_iqr_ms`` (median and interquartile range); ``speedup`` over
            the first model; ``num_parameters``. With ``distill_from`` (a fine-tuned teacher), each
            model that learned from this teacher also has ``gap_closed``: its gain in ``average``
            over the same model without the teacher, divided by that model's gap to the first model.
        folder: folder of the comparison, with ``runs.jsonl`` (a line for each fine-tuning).
    """

    table: DataFrame
    folder: Path


@dataclass(frozen=True, eq=False)
class LatencyResult:
    """Latencies of models, which were measured alternately on one machine.

    Args:
        table: a row for each model with each combination of backend, device, threads, batch size
            and length. Columns: ``model``, ``backend``, ``device``, ``threads``, ``batch``,
            ``length``, ``megabytes``, ``median_ms``, ``iqr_ms`` (interquartile range), ``p95_ms``,
            ``tokens_per_second``, ``sequences_per_second``, ``speedup`` over the first model.
        json: a file with the same figures. A picture of them is in the same folder, under the same
            name with the suffix ``.png``.
    """

    table: DataFrame
    json: Path


@dataclass(frozen=True, eq=False)
class ExportResult:
    """A folder to deploy, and the results of its checks.

    Args:
        folder: weights, tokenizer, ``model.onnx``, ``model.int8.onnx``, ``predict.py`` and a model
            card.
        max_abs_difference: largest absolute difference between the outputs of ``model.onnx`` and
            those of the student in torch.
        int8: comparison of ``model.int8.onnx`` with ``model.onnx``: ``method`` of quantisation
            (``dynamic`` or ``static``), ``rows`` (description of the input rows), ``cosine``
            between the outputs and, with a task, the scores ``int8_score`` and ``score``.
        latency: a row for each ``batch`` and ``length``, with ``torch_ms``, ``onnx_ms`` and
            ``int8_ms``, in milliseconds on one CPU thread.
        sentences: for an export for sentence-transformers, ``cosine`` between the student's and the
            teacher's sentence vectors and, with a task, the Spearman correlations ``spearman`` of
            the student and ``teacher_spearman``; else None.
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
        loss: distillation loss on held-out rows after full KD, the final distillation on all
            training rows.
        contextual_share: how well the student predicts the teacher's last hidden states after full
            KD, between 0 (as well as embeddings without context) and 1 (as well as the teacher
            itself).
        table: a row for each fine-tuned model, with ``score``, ``share_kept`` (``score`` divided by
            the teacher's), ``latency_ms``, ``speedup`` over the teacher and ``num_parameters``. The
            models are ``teacher``, ``student`` and three baselines: ``random`` (the student's shape
            with random initial weights), ``static`` (the teacher's token vectors, without layers)
            and ``layer_cut`` (the teacher with fewer layers). Without a task, ``table`` is None.
        export: the exported student, to deploy.
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

    The same call again resumes a search that was stopped, and returns the result of a finished one.

    By default candidates (the students that are tried) are trained in this process, and a crash in
    native code ends it. With ``workers=N`` they are trained in N other processes, and the search
    goes on after such a crash. These processes import your script, so put its call of this function
    under ``if __name__ == "__main__":``.

    A model or text that is given as an object is written to ``inputs/`` in ``root``, the folder of
    all runs.

    Args:
        teacher: a folder, a name on the Hugging Face hub, ``quickstart`` (all-MiniLM-L6-v2), a pair
            ``(model, tokenizer)`` of transformers objects, or a ``Student``.
        text: a parquet, jsonl, csv or txt file, a folder of such files, a data set on the hub,
            ``quickstart`` (documentation of the installed packages), a ``datasets.Dataset``, or a
            list of texts.
        speedup: least speed-up of a student: the teacher's latency divided by the student's. None:
            no limit.
        latency_ms: a student's largest latency, in milliseconds. None: no limit.
        num_parameters: a student's largest number of parameters. None: no limit.
        n_trials: number of distinct candidates to train; a resumed search counts those that it has
            trained before.
        num_epochs: epochs of the short distillation (mini-KD) of each candidate.
        settings: other fields of ``SearchConfig``, such as ``name``, ``root`` and ``workers``. If
            the field ``search`` (a ``SearchSettings``) is given, it takes the place of ``speedup``,
            ``latency_ms``, ``num_parameters``, ``n_trials`` and ``num_epochs``.

    Returns:
        The best student.

    Raises:
        UserError: an argument or an input is wrong. All are checked before anything is trained; the
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

    The same call again resumes a run that was stopped, and returns the results of a finished one.

    Args:
        teacher: a model folder, a Hugging Face name, ``quickstart``, a pair ``(model, tokenizer)``,
            or a ``Student``.
        text: a text file, a folder of such files, a data set on the hub, ``quickstart``, a
            ``datasets.Dataset``, or a list of texts.
        task: a labelled task to fine-tune on: a folder in GLUE's layout (``train.parquet``,
            ``validation.parquet``), the name of a GLUE task, ``quickstart``, or a
            ``datasets.DatasetDict`` with ``train`` and ``validation``. None: the student is
            distilled and exported as an encoder, without fine-tuning.
        settings: the arguments ``speedup``, ``latency_ms``, ``num_parameters``, ``n_trials`` and
            ``num_epochs`` of ``search``, and other fields of ``RunConfig``, such as ``name``.

    Returns:
        The figures of the student and the baselines, the exported student, and the run's folder.

    Raises:
        UserError: an argument or an input is wrong. All are checked before anything is trained; the
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
    """Distil one student on all training rows, as the final distillation of ``kdnas run`` does.

    After Ctrl-C the same call resumes. While a distillation is unfinished, a call with the same
    name but different settings is refused: give another name, or delete ``last.ckpt`` in the folder
    ``<root>/<name>``.

    Args:
        teacher: a model folder, a Hugging Face name, ``quickstart``, a pair ``(model, tokenizer)``,
            or a ``Student``.
        text: a text file, a folder of such files, a data set on the hub, ``quickstart``, a
            ``datasets.Dataset``, or a list of texts.
        arch: the student's shape, or the result of a search.
        num_epochs: passes over the training rows.
        recipe: loss, initial weights and learning rates; None: ``Recipe()``.
        data: how text becomes batches; None: ``DataSettings()``.
        states: where the teacher's hidden states are stored; None: ``StatesSettings()``.
        trainer: device and precision; None: ``TrainerSettings()``.
        name: name of the folder in ``root`` that gets logs, checkpoint and encoder.
        root: the folder of all runs.
        seed: random seed of the weights that are not initialised from the teacher.

    Returns:
        The student; its ``save_pretrained`` writes it to a folder.

    Raises:
        UserError: an argument or an input is wrong. All are checked before anything is trained; the
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

    The same call again resumes a comparison that was stopped, and returns the results of a finished
    one.

    Args:
        models: models, each a folder, a Hugging Face name, ``quickstart``, a pair ``(model,
            tokenizer)`` or a ``Student``. All others are compared with the first.
        task: a GLUE name, a folder of labelled rows, a ``datasets.DatasetDict``, or a list of
            these. None: use your own labelled text, given by ``data`` (a file or folder) and
            ``text_column`` in ``settings``.
        settings: other fields of ``GlueConfig``, such as ``seeds``, ``root`` and ``workers``.

    Returns:
        The scores of each model, in the order of ``models``.

    Raises:
        UserError: an argument or an input is wrong. All are checked before anything is trained; the
            message says what to change.
        CandidateFailed: the loss of a fine-tuning is not finite.
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
    """Measure the latency of models in alternation, as ``kdnas latency`` does.

    Args:
        models: models, each a folder, a Hugging Face name, ``quickstart``, a pair ``(model,
            tokenizer)`` or a ``Student``. All others are compared with the first.
        settings: other fields of ``LatencyConfig``. Several are lists, such as
            ``backend=["torch"]``, ``batch=[1, 8]`` and ``length=[128]``; every combination of their
            values is measured.

    Returns:
        A table and its JSON file. For each combination of values the table has a row per model, in
        the order of ``models``.

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
            None: pass ``run=<name of a finished run>``, whose student is then exported.
        settings: other fields of ``ExportConfig``, such as ``output`` and ``force``. The fields
            ``teacher``, ``text`` and ``task`` accept the same values as the arguments of ``run``.

    Returns:
        The folder, and the results of its checks.

    Raises:
        UserError: an argument or the student is wrong; nothing is exported, and the message says
            what to change.
        ParityError: an exported file gives different outputs from the student's; nothing is
            exported.
    """
    from kdnas.commands.config import ExportConfig
    from kdnas.commands.export import export as export_student
    from kdnas.commands.objects import as_paths

    config = ExportConfig(**as_paths(student=student, **settings))
    return _exported(export_student(config))


def _config(kind: Any, **settings: Any) -> Any:
    """Build a config of class ``kind`` from the arguments of ``search`` or ``run``."""
    from kdnas.commands.config import SearchSettings
    from kdnas.commands.objects import as_paths
    from kdnas.nas.budget import Budget

    def taken(*names: str) -> dict[str, Any]:
        return {name: settings.pop(name) for name in names if name in settings}

    budget = Budget(**taken("speedup", "latency_ms", "num_parameters"))
    search = SearchSettings(**taken("n_trials", "num_epochs"), budget=budget)
    return kind(**{"workers": 0, "search": search} | as_paths(**settings))


def _of(kind: Any, values: dict[str, Any]) -> Any:
    """Build a result object of class ``kind``; ``values`` that are not its fields are ignored."""
    return kind(**{name: values[name] for name in signature(kind).parameters})


def _best(made: Run) -> SearchResult:
    """Return the best student of a run whose search is finished."""
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
    """Return the result of an export, read from the manifest in the exported folder."""
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
