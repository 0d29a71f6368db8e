"""``kdnas export`` and a run's export: find the student, rows for checks and the card's text."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from kdnas.commands.config import ExportConfig
from kdnas.data.corpus import Corpus, load_corpus
from kdnas.data.quickstart import text_and_task
from kdnas.deploy.card import check_lines
from kdnas.deploy.export import export_student, load_student, source_sha256
from kdnas.deploy.latency import measured_by
from kdnas.deploy.onnx import check_onnx
from kdnas.deploy.quantize import Rows, task_rows, text_rows
from kdnas.deploy.sentences import Sentences, check_sentences
from kdnas.models.encoders import QUICKSTART, Teacher, find_teacher, refuse_other_inputs
from kdnas.models.families import has_classifier
from kdnas.models.hub import refuse_away
from kdnas.report.tables import show
from kdnas.system.errors import UserError, first_line, nearest
from kdnas.system.files import MANIFEST, Run, read_json, sweep
from kdnas.system.manifest import renew
from kdnas.system.signals import honest_signals
from kdnas.system.yaml import read_yaml
from kdnas.tasks.tasks import LoadedTask, load_labelled, load_task

MOST_TOKENS = 128  # tokens at which the rows for checks are cut, unless fine-tuning says
FORMATS = ("transformers", "sentence-transformers")

MakeRows = Callable[[PreTrainedTokenizerBase], Rows]


@dataclass(frozen=True)
class _Choice:
    """What to export, the output folder, and the data for the model card and the checks."""

    source: Path
    folder: Path
    card: dict[str, Any]
    max_length: int  # tokens at which a task's rows are cut
    teacher: str | None
    task: str | None
    text: str | None
    split: dict[str, Any]  # arguments of load_corpus, to split the text as the run did


@honest_signals()
def export(config: ExportConfig, console: Console | None = None) -> Path:
    """Export the student of a run, or any student, to a folder, and print the checks' results.

    Args:
        config: options of ``kdnas export``.
        console: where to print; None: the terminal.

    Returns:
        The folder of the export.

    Raises:
        UserError: an option, the student, the teacher or the rows cannot be used; or the export
            cannot be pushed.
        ParityError: an exported file gives different outputs from the student's.
        HubAway: the Hugging Face hub does not answer.
    """
    if (config.run is None) == (config.student is None):
        raise UserError(
            f"run is {config.run!r} and student is {config.student!r}: give exactly one of the two."
        )
    if config.format not in FORMATS:
        raise UserError(
            f"There is no export format {config.format!r}.{nearest(config.format, FORMATS)}"
        )
    check_onnx()
    is_sentences = config.format == "sentence-transformers"
    choice = _of_run(config, is_sentences) if config.run is not None else _of_folder(config)
    folder = _output(config, choice)
    teacher = find_teacher(choice.teacher) if choice.teacher is not None else None
    if teacher is not None:
        _check_teacher(choice.source, teacher)
    elif is_sentences:
        raise UserError(
            "teacher is None, but the format sentence-transformers needs the teacher's pooling: "
            "give --teacher."
        )
    if config.hub_repo:
        check_hub(config.hub_repo)

    task, corpus = _task_and_corpus(config, choice)
    sentences = _sentences(teacher, corpus, task) if teacher and is_sentences else None
    report = export_student(
        choice.source,
        folder,
        card=choice.card | {"license": config.license},
        make_rows=_rows(choice, task, corpus, sentences),
        length=config.length,
        sentences=sentences,
    )
    renew(folder)
    console = console or Console(markup=False)
    say(report, console)
    show(console, f"Export: {folder}")
    if config.hub_repo:
        show(console, f"Pushed: {push(folder, config.hub_repo)}")
    return folder


def _of_run(config: ExportConfig, is_sentences: bool) -> _Choice:
    assert config.run is not None
    run = Run(config.root, config.run)
    run.refuse_links()
    source, known = _source_of(run, is_sentences), read_yaml(run.config)
    task, text = config.task, config.text
    if not (task or is_sentences):
        task = known.get("task")
    if is_sentences or not task:
        text = text or known["text"]
    text, task = text_and_task(text or "", task, run.text)
    split = {name: known["data"][name] for name in ("column", "held_out_fraction")}
    return _Choice(
        source,
        run.student,
        _run_card(run, is_sentences, config.teacher),
        max_length=known.get("finetune", {}).get("max_length", MOST_TOKENS),
        teacher=config.teacher or (known["teacher"] if is_sentences else None),
        task=task,
        text=text,
        split={} if config.text else {"seed": known["seed"], **split},
    )


def _of_folder(config: ExportConfig) -> _Choice:
    assert config.student is not None
    source = Path(config.student)
    named = source if source.name not in ("", "..") else source.resolve()
    card = {"name": source.resolve().name, "teacher": "not stated", "sections": {}}
    return _Choice(
        source,
        named.with_name(f"{named.name}-export"),
        card | (_teacher_words(config.teacher) if config.teacher else {}),
        max_length=config.length or MOST_TOKENS,
        teacher=config.teacher,
        task=config.task,
        text=config.text,
        split={},
    )


def _output(config: ExportConfig, choice: _Choice) -> Path:
    """Return the output folder, after a check that an export may be written into it.

    Raises:
        UserError: the folder is the student's own, it holds something else than an export, or
            ``force`` is needed.
    """
    folder = Path(config.output) if config.output else choice.folder
    if config.output and folder.is_symlink():  # the link stays, and its target is replaced
        folder = folder.resolve()
    sweep(folder.parent, f".{folder.name}.*")
    if folder.resolve() == choice.source.resolve():
        raise UserError(
            f"The output folder {str(folder)!r} is the student's own folder: give another --output."
        )
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return folder
    if "checks" not in _manifest(folder):
        raise UserError(
            f"{str(folder)!r} exists and is not an earlier export, so it is not replaced: give "
            "another --output."
        )
    if not config.force:
        raise UserError(
            f"The folder {str(folder)!r} exists: give another --output, or --force to replace it."
        )
    return folder


def _task_and_corpus(
    config: ExportConfig, choice: _Choice
) -> tuple[LoadedTask | None, Corpus | None]:
    columns = [] if config.data else config.text_column
    if len(columns) > (1 if choice.text else 0):
        raise UserError(
            f"text_column is {columns}, but without --data FILE only one column can be given, "
            "together with --text FILE."
        )
    task = load_task(choice.task) if choice.task and not config.data else None
    if config.data:
        task = load_labelled(config.data, config.text_column, config.label_column)
    if not choice.text:
        return task, None
    column = {"column": columns[0]} if columns else {}
    return task, load_corpus(choice.text, **choice.split | column)


def _rows(
    choice: _Choice, task: LoadedTask | None, corpus: Corpus | None, sentences: Sentences | None
) -> MakeRows | None:
    """Return a function that makes the rows for the checks, or None to check on random words."""
    if sentences:
        return rows_of_texts(sentences.train, sentences.held_out)
    if task:
        student, _ = load_student(choice.source)
        is_scored = has_classifier(student.config)
        if is_scored:
            task = task.for_classifier(student.config, str(choice.source))
        return rows_of_task(task, choice.max_length, is_scored)
    return rows_of_texts(corpus.train, corpus.held_out) if corpus else None


def _sentences(teacher: Teacher, corpus: Corpus | None, task: LoadedTask | None) -> Sentences:
    """Return the texts on which sentence vectors are compared: a corpus, or a task's sentences."""
    check_sentences(task)
    if corpus is not None:
        return Sentences(teacher, corpus.train, corpus.held_out, task)
    if task is None:
        raise UserError(
            "Sentence vectors are compared on texts, but text and task are None: give --text, or "
            "--task stsb, or both."
        )
    train, held_out = (
        [text for name in task.task.columns for text in rows[name]]
        for rows in (task.train, task.validation)
    )
    return Sentences(teacher, train, held_out, task)


@contextmanager
def _asking_the_hub(repo: str, if_away: str, if_refused: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # no token, no permission, a bad name, no network
        refuse_away(error, f"Nothing was pushed to {repo!r}", if_away)
        raise UserError(f"Cannot push to {repo!r}: {first_line(error)}. {if_refused}.") from error


def check_hub(repo: str) -> None:
    """Raise an error before the export if nobody is logged in to the hub.

    Raises:
        UserError: nobody is logged in.
        HubAway: the hub does not answer.
    """
    with _asking_the_hub(repo, "leave out --hub-repo", "Log in by `hf auth login`"):
        HfApi().whoami()


def push(folder: Path, repo: str) -> str:
    """Push a folder to a repository on the hub, and return its address; a new one is private.

    Raises:
        UserError: the hub refuses.
        HubAway: the hub does not answer.
    """
    there = f"export is in {str(folder)!r}"
    with _asking_the_hub(repo, f"the {there}; push it with `hf upload`", f"The {there}"):
        HfApi().create_repo(repo, private=True, exist_ok=True)
        address = str(HfApi().upload_folder(repo_id=repo, folder_path=folder))
    return address


def export_run(run: Run, make_rows: MakeRows) -> dict[str, Any]:
    """Export the student of a run into the run's folder ``student/``.

    Args:
        run: the run.
        make_rows: makes, from a tokenizer, the rows for the checks of the int8 graph.

    Returns:
        The results of the checks, as from ``export_student``.
    """
    source, card = _source_of(run), _run_card(run)
    return export_student(source, run.student, card=card, make_rows=make_rows)


def is_exported(run: Run) -> bool:
    """Whether ``student/`` holds the run's latest model, not an export from before fine-tuning."""
    made_from = _manifest(run.student).get("source_sha256")
    return run.student.exists() and made_from in (None, source_sha256(_source_of(run)))


def _manifest(folder: Path) -> dict[str, Any]:
    return read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}


def rows_of_task(task: LoadedTask, length: int, is_scored: bool = True) -> MakeRows:
    """Return a function that makes, from a tokenizer, the rows for the checks of the int8 graph.

    Args:
        task: the task with its rows.
        length: number of tokens at which rows are cut, as in fine-tuning.
        is_scored: whether the student is a classifier of the task; if not, its hidden states are
            compared, not its scores.
    """
    return lambda tokenizer: task_rows(
        task, tokenizer, min(length, tokenizer.model_max_length), is_scored
    )


def rows_of_texts(train: Sequence[str], held_out: Sequence[str]) -> MakeRows:
    """Return a function that makes, from a tokenizer, the rows for an export's checks.

    The rows are tokens of the texts, without labels.

    Args:
        train: texts on which the int8 graph is chosen.
        held_out: texts on which the chosen int8 graph is compared with the float32 graph.
    """
    return lambda tokenizer: text_rows(
        train, held_out, tokenizer, min(MOST_TOKENS, tokenizer.model_max_length)
    )


def say(report: dict[str, Any], console: Console) -> None:
    """Print the results of an export's checks, in the words of the model card."""
    show(
        console,
        f"Outputs of model.onnx differ from torch's by at most {report['max_abs_difference']:.1e}. "
        f"It has {report['onnx_megabytes']:.1f} MB; model.int8.onnx ({report['int8']['method']}) "
        f"has {report['int8_megabytes']:.1f} MB.",
    )
    for title, lines in check_lines(report).items():
        for name, words in lines.items():
            show(console, f"{title}, {name}: {words}.")


def _source_of(run: Run, is_encoder: bool = False) -> Path:
    for source in (run.glue / "student" / "model", run.full_kd / "encoder")[is_encoder:]:
        if source.is_dir():
            return source
    raise UserError(
        f"The run {run.name!r} in {str(run.root)!r} has no student yet: "
        f"finish `kdnas run --name {run.name}` first."
    )


def _teacher_words(teacher: str) -> dict[str, str]:
    """Return the model card's fields for a teacher: its name and, if on the hub, ``base_model``."""
    if os.path.isdir(teacher) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", teacher):
        return {"teacher": Path(teacher).resolve().name}
    if teacher == QUICKSTART:
        return {"teacher": "all-MiniLM-L6-v2"}
    return {"teacher": teacher, "base_model": teacher}


def _run_card(run: Run, is_encoder: bool = False, teacher: str | None = None) -> dict[str, Any]:
    config, sections = read_yaml(run.config), {}
    text, scores = config["text"], {}
    if (run.glue / "results.json").exists() and not is_encoder:  # scores are the classifier's
        results = read_json(run.glue / "results.json")
        task, models = results["task"], results["models"]
        row = models["student"]
        scores = {"task": task["name"], "metrics": row["metrics"]}
        sections["Scores"] = {
            f"{task['name']}, {task['metric']}": f"{row['score']:.3f}",
            "its teacher, fine-tuned alike": f"{models['teacher']['score']:.3f}",
            "its shape from a random start": f"{models['random']['score']:.3f}",
            "its teacher's vectors of single tokens": f"{models['static']['score']:.3f}",
            "layers cut from its teacher": f"{models['layer_cut']['score']:.3f}",
            "rows that were scored": f"cut at {config['finetune']['max_length']} tokens",
        }
        latency = f"{row['latency_ms']:.2f} ms, {row['speedup']:.1f}x faster than its teacher"
        sections["Latency beside its teacher"] = {measured_by(config["latency"]): latency}
    return {
        "name": run.name,
        **_teacher_words(teacher or config["teacher"]),
        **scores,
        "made": "searched and distilled",
        "text": "prose of installed packages" if text == QUICKSTART else Path(text).name,
        "sections": sections,
    }


def _check_teacher(source: Path, teacher: Teacher) -> None:
    """Raise an error if a student's family, inputs, sizes or recorded hash do not fit a teacher."""
    student, parent, name = load_student(source)[0].config, teacher.config, repr(teacher.name)

    def refused(why: str) -> UserError:
        return UserError(f"The student {str(source)!r} {why}: give its own --teacher.")

    if student.model_type != parent.model_type:
        raise refused(
            f"is a {student.model_type} model, but the teacher {name} is a {parent.model_type} model"
        )
    refuse_other_inputs(find_teacher(str(source)), teacher)
    for field in ("num_hidden_layers", "hidden_size"):
        ours, theirs = getattr(student, field), getattr(parent, field)
        if ours > theirs:
            raise refused(f"has {field} {ours}, but its teacher {name} has only {theirs}")
    known = getattr(student, "teacher_sha256", None)
    if known and known != (found := teacher.sha256()):
        weights = f"(sha256 {known[:8]}) than those of {name} ({found[:8]})"
        raise refused(f"learned from other weights {weights}")
