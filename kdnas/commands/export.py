"""``kdnas export``, and the last stage of a run: which student, which rows, which words on the card."""

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from kdnas.commands.config import ExportConfig
from kdnas.data.corpus import QUICKSTART, Corpus, load_corpus
from kdnas.deploy.card import sentence_lines
from kdnas.deploy.export import export_student, load_student, slower_shapes, source_sha256
from kdnas.deploy.latency import measured_by
from kdnas.deploy.quantize import Rows, task_rows, text_rows
from kdnas.deploy.sentences import Sentences, check_sentences
from kdnas.models.encoders import Teacher, find_teacher, refuse_other_inputs
from kdnas.models.families import has_classifier
from kdnas.models.hub import refuse_away
from kdnas.system.errors import UserError, first_line, nearest
from kdnas.system.files import MANIFEST, Run, read_json, sweep
from kdnas.system.manifest import renew
from kdnas.system.signals import honest_signals
from kdnas.system.yaml import read_yaml
from kdnas.tasks.tasks import LoadedTask, load_labelled, load_task

MOST_TOKENS = 128  # of rows that graphs are compared on, where no fine-tuning says
FORMATS = ("transformers", "sentence-transformers")

MakeRows = Callable[[PreTrainedTokenizerBase], Rows]


@honest_signals()
def export(config: ExportConfig, console: Console) -> Path:
    """Export the student of a run, or any student, into one folder; say what was checked.

    Returns:
        The folder.

    Raises:
        UserError: anything that the user can mend; nothing is written then, unless it was the push that failed.
        ParityError: a file does not compute what the student computes; nothing is written either.
    """
    if (config.run is None) == (config.student is None):
        raise UserError(
            f"run is {config.run!r} and student is {config.student!r}: give one of the two."
        )
    is_sentences = config.format == "sentence-transformers"
    if config.format not in FORMATS:
        raise UserError(
            f"There is no format {config.format!r} to export as.{nearest(config.format, FORMATS)}"
        )
    teacher_name = config.teacher
    if config.run is not None:
        run = Run(config.root, config.run)
        source, folder, known = _source_of(run, is_sentences), run.student, read_yaml(run.config)
        teacher_name = teacher_name or (known["teacher"] if is_sentences else None)
        card, cut = (
            _run_card(run, is_sentences),
            known.get("finetune", {}).get("max_length", MOST_TOKENS),
        )
        split = {
            "seed": known["seed"],
            **{name: known["data"][name] for name in ("column", "held_out_fraction")},
        }
        task_name, text = (
            config.task or (None if is_sentences else _task_of(run, known.get("task"))),
            config.text,
        )
        if not text and (is_sentences or not task_name):
            text = str(run.text) if known["text"] == QUICKSTART else known["text"]
    else:
        assert config.student is not None
        source = Path(config.student)
        named = source if source.name not in ("", "..") else source.resolve()
        folder = named.with_name(f"{named.name}-export")
        task_name, text, cut, split = config.task, config.text, config.length or MOST_TOKENS, {}
        card = {"name": source.resolve().name, "teacher": "not stated", "sections": {}}
    folder = Path(config.output) if config.output else folder
    folder = (
        folder.resolve() if config.output and folder.is_symlink() else folder
    )  # the link itself stays
    sweep(folder.parent, f".{folder.name}.*")
    if folder.exists():
        _check_output(folder, source, config.force)
    if teacher_name is not None:
        teacher = find_teacher(teacher_name)
        _check_teacher(source, teacher)
        card.pop("base_model", None)
        card |= _teacher_words(teacher_name)
    elif is_sentences:
        raise UserError(
            "teacher is None: for sentence-transformers a student pools as its teacher; give --teacher."
        )
    if config.license:
        card["license"] = config.license
    if config.hub_repo:
        check_hub(config.hub_repo)
    column: dict[str, str] = {}
    if config.data:
        task: LoadedTask | None = load_labelled(
            config.data, config.text_column, config.label_column
        )
    else:
        if len(config.text_column) > (1 if text else 0):
            raise UserError(
                f"text_column is {config.text_column}: give it with --data FILE, or one column with --text FILE."
            )
        column = {"column": config.text_column[0]} if config.text_column else {}
        task = load_task(task_name) if task_name else None
    corpus = load_corpus(text, **({} if config.text else split) | column) if text else None
    sentences = _sentences(teacher, corpus, task) if is_sentences else None
    make_rows = None
    if sentences:
        make_rows = rows_of_texts(sentences.train, sentences.held_out)
    elif task:
        student, _ = load_student(source)
        is_scored = has_classifier(student.config)
        task = task.for_classifier(student.config, str(source)) if is_scored else task
        make_rows = rows_of_task(task, cut, is_scored)
    elif corpus:
        make_rows = rows_of_texts(corpus.train, corpus.held_out)
    report = export_student(
        source, folder, card=card, make_rows=make_rows, length=config.length, sentences=sentences
    )
    renew(folder)
    say(report, console)
    console.print(f"Export: {folder}", soft_wrap=True, highlight=False)
    if config.hub_repo:
        console.print(f"Pushed: {push(folder, config.hub_repo)}", soft_wrap=True, highlight=False)
    return folder


def _check_output(folder: Path, source: Path, force: bool) -> None:
    """Refuse what is there already, but for an empty folder or an earlier export that may be replaced."""
    if folder.resolve() == source.resolve():
        raise UserError(f"The folder {str(folder)!r} is the student itself: give another --output.")
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if "checks" not in _manifest(folder):
        raise UserError(f"{str(folder)!r} is there, and no earlier export: give another --output.")
    if not force:
        raise UserError(
            f"The folder {str(folder)!r} exists: give another --output, or --force to replace it."
        )


def _sentences(teacher: Teacher, corpus: Corpus | None, task: LoadedTask | None) -> Sentences:
    """The texts that vectors are compared on: a corpus, or else the task's own sentences."""
    check_sentences(task)
    if corpus is not None:
        return Sentences(teacher, corpus.train, corpus.held_out, task)
    if task is None:
        raise UserError(
            "text and task are None: vectors are compared on texts; give --text, or --task stsb, or both."
        )
    train, held_out = (
        [text for name in task.task.columns for text in rows[name]]
        for rows in (task.train, task.validation)
    )
    return Sentences(teacher, train, held_out, task)


def check_hub(repo: str) -> None:
    """Refuse now, not after the export, where nobody is logged in.

    Raises:
        HubAway: the hub does not answer.
        UserError: it knows no token.
    """
    try:
        HfApi().whoami()
    except Exception as error:  # no token, an old one, no network
        refuse_away(error, f"a push to {repo!r}", "leave out --hub-repo")
        raise UserError(
            f"Cannot push to {repo!r}: {first_line(error)}. Log in by `hf auth login`."
        ) from error


def push(folder: Path, repo: str) -> str:
    """Push a folder to the hub, into a private repository if it is new, and give the address.

    Raises:
        HubAway: the hub does not answer; the folder stays.
        UserError: it refuses; the folder stays.
    """
    try:
        HfApi().create_repo(repo, private=True, exist_ok=True)
        return str(HfApi().upload_folder(repo_id=repo, folder_path=folder))
    except Exception as error:  # a bad name, no right, no network
        refuse_away(
            error,
            f"a push to {repo!r}",
            f"the export is in {str(folder)!r}: `hf upload` pushes it too",
        )
        raise UserError(
            f"Cannot push to {repo!r}: {first_line(error)}. The export is in {str(folder)!r}."
        ) from error


def export_run(run: Run, make_rows: MakeRows) -> dict[str, Any]:
    """Export a run's student into ``student/``, and give what was checked."""
    source, card = _source_of(run), _run_card(run)
    return export_student(source, run.student, card=card, make_rows=make_rows)


def is_exported(run: Run) -> bool:
    """Whether ``student/`` is of what the run has now: `kdnas export` may have been there before fine-tuning."""
    made_from = _manifest(run.student).get("source_sha256")
    return run.student.exists() and made_from in (None, source_sha256(_source_of(run)))


def _manifest(folder: Path) -> dict[str, Any]:
    return read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}


def rows_of_task(task: LoadedTask, length: int, is_scored: bool = True) -> MakeRows:
    """A task's rows, cut as in fine-tuning."""
    return lambda tokenizer: task_rows(
        task, tokenizer, min(length, tokenizer.model_max_length), is_scored
    )


def rows_of_texts(train: Sequence[str], held_out: Sequence[str]) -> MakeRows:
    """Rows without labels."""
    return lambda tokenizer: text_rows(
        train, held_out, tokenizer, min(MOST_TOKENS, tokenizer.model_max_length)
    )


def say(report: dict[str, Any], console: Console) -> None:
    """What was checked, in a few lines."""
    show = partial(console.print, soft_wrap=True, highlight=False)
    show(
        f"model.onnx equals torch to {report['max_abs_difference']:.1e}, {report['onnx_megabytes']:.1f} MB."
    )
    int8 = report["int8"]
    scores = (
        f", score {int8['int8_score']:.3f} (float32 {int8['score']:.3f})" if "score" in int8 else ""
    )
    show(
        f"model.int8.onnx ({int8['method']}): cosine {int8['cosine']:.4f} to model.onnx{scores} on {int8['rows']}, "
        f"{report['int8_megabytes']:.1f} MB."
    )
    for row in report["latency"]:
        show(
            f"Latency, batch {row['batch']} x {row['length']}, 1 thread: torch {row['torch_ms']:.2f} ms, "
            f"model.onnx {row['onnx_ms']:.2f} ms, model.int8.onnx {row['int8_ms']:.2f} ms."
        )
    for name, words in sentence_lines(report["sentences"]).items() if "sentences" in report else ():
        show(f"Sentence vectors, {name}: {words}.")
    slower = slower_shapes(report)
    if slower:
        show(
            f"On this machine int8 is slower than float32 at {', '.join(slower)}: both are kept, take model.onnx there."
        )


def _source_of(run: Run, is_encoder: bool = False) -> Path:
    for source in (run.glue / "student" / "model", run.full_kd / "encoder")[is_encoder:]:
        if source.is_dir():
            return source
    raise UserError(
        f"The run {run.name!r} in {str(run.root)!r} has no student yet: `kdnas run --name {run.name}` first."
    )


def _task_of(run: Run, name: str | None) -> str | None:
    return str(run.text / "which_package") if name == QUICKSTART else name


def _teacher_words(teacher: str) -> dict[str, str]:
    """On the card a folder, also one that is gone, goes by its name, and only the hub's names are links."""
    if os.path.isdir(teacher) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", teacher):
        return {"teacher": Path(teacher).resolve().name}
    return (
        {"teacher": "all-MiniLM-L6-v2"}
        if teacher == QUICKSTART
        else {"teacher": teacher, "base_model": teacher}
    )


def _run_card(run: Run, is_encoder: bool = False) -> dict[str, Any]:
    config = read_yaml(run.config)
    card: dict[str, Any] = {"name": run.name, **_teacher_words(config["teacher"]), "sections": {}}
    card["made"] = "searched and distilled"
    card["text"] = (
        "prose of installed packages" if config["text"] == QUICKSTART else Path(config["text"]).name
    )
    if (run.glue / "results.json").exists() and not is_encoder:  # they are the classifier's
        results = read_json(run.glue / "results.json")
        row = results["models"]["student"]
        card["sections"]["Scores"] = {
            f"{results['task']['name']}, {results['task']['metric']}": f"{row['score']:.3f}",
            "its teacher, fine-tuned alike": f"{results['models']['teacher']['score']:.3f}",
            "its shape from a random start": f"{results['models']['random']['score']:.3f}",
            "rows that were scored": f"cut at {config['finetune']['max_length']} tokens",
        }
        card["sections"]["Latency beside its teacher"] = {
            measured_by(
                config["latency"]
            ): f"{row['latency_ms']:.2f} ms, {row['speedup']:.1f}x faster than its teacher"
        }
    return card


def _check_teacher(source: Path, teacher: Teacher) -> None:
    """Refuse a student of another teacher, as its config says, or else families, what they read, and sizes."""
    model, _ = load_student(source)
    if model.config.model_type != teacher.config.model_type:
        raise UserError(
            f"The student {str(source)!r} ({model.config.model_type}) is not of the teacher {teacher.name!r} "
            f"({teacher.config.model_type}): give its own --teacher."
        )
    refuse_other_inputs(find_teacher(str(source)), teacher)
    for name in ("num_hidden_layers", "hidden_size"):
        ours, theirs = getattr(model.config, name), getattr(teacher.config, name)
        if ours > theirs:
            raise UserError(
                f"The student {str(source)!r} has {name} {ours}, its teacher {teacher.name!r} {theirs}: "
                "give its own --teacher."
            )
    known = getattr(model.config, "teacher_sha256", None)
    if known and known != (found := teacher.sha256()):
        raise UserError(
            f"The student {str(source)!r} learned from other weights (sha256 {known[:8]}) than those of "
            f"{teacher.name!r} ({found[:8]}): give its own --teacher."
        )
