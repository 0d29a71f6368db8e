"""Writes objects that are given from Python (models, texts, tasks) to disk, for the commands."""

import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdnas.models.families import arch_of
from kdnas.system.errors import UserError
from kdnas.system.files import INPUTS, check_writable, file_sha256, new_folder, owned, sweep


def as_paths(**asked: Any) -> dict[str, Any]:
    """Write models, texts and tasks that are Python objects to folders in ``<root>/inputs``.

    Each object among the settings is replaced by the path of its folder. Models, texts and tasks
    that are given as paths or names stay as they are, and so do all other settings.

    Args:
        asked: settings of the command, by name, such as ``teacher`` and ``root``.

    Returns:
        The settings, with paths as text in place of the objects.

    Raises:
        UserError: a model has no tokenizer, a task lacks a split, or ``root`` cannot be written.
    """
    inputs = Path(asked.get("root", "lightning_logs"), INPUTS)
    writers = {"text": _write_text, "task": _write_task}
    writers |= dict.fromkeys(("teacher", "student", "model", "distill_from"), _write_model)
    for name in asked.keys() & writers.keys():
        value, write = asked[name], writers[name]
        if isinstance(value, list) and name != "text":
            asked[name] = [_path(one, inputs, write) for one in value]
        elif value is not None:
            asked[name] = _path(value, inputs, write)
    return asked | ({"root": str(asked["root"])} if "root" in asked else {})


def _path(value: Any, inputs: Path, write: Callable[[Any, Path], str]) -> str:
    """Return a path or name as text; write an object to a folder named by its content's hash."""
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    check_writable(inputs, "root")
    inputs.mkdir(parents=True, exist_ok=True)
    sweep(inputs, ".*")
    with tempfile.TemporaryDirectory(dir=inputs, prefix=f".{owned('object')}") as temporary:
        name = write(value, Path(temporary))
        content = _sha256(Path(temporary))
        place = inputs / f"{name}-{content[:12]}"
        if not place.exists() or _sha256(place) != content:  # new, or changed since
            with new_folder(place) as folder:
                for file in Path(temporary).iterdir():
                    file.rename(folder / file.name)
    return str(place)


def _sha256(folder: Path) -> str:
    content = repr([(file.name, file_sha256(file)) for file in sorted(folder.iterdir())])
    return hashlib.sha256(content.encode()).hexdigest()


def _write_model(model: Any, folder: Path) -> str:
    if hasattr(model, "tokenizer"):  # a Student
        model = (model.model, model.tokenizer)
    if not isinstance(model, tuple):
        raise UserError(
            f"A {type(model).__name__} without a tokenizer cannot be used: give the pair (model, "
            "tokenizer)."
        )
    encoder, tokenizer = model[0], copy.deepcopy(model[1])
    arch = arch_of(encoder.config)
    if tokenizer.is_fast:  # its last call's padding and truncation are still set
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"{encoder.config.model_type}-{arch.num_hidden_layers}x{arch.hidden_size}"


def _write_text(text: Any, folder: Path) -> str:
    if hasattr(text, "to_parquet"):
        text.to_parquet(folder / "rows.parquet")
    else:
        lines = [json.dumps({"text": row}) + "\n" for row in text]
        (folder / "rows.jsonl").write_text("".join(lines))
    return "text"


def _write_task(task: Any, folder: Path) -> str:
    splits = ("train", "validation")
    given = list(task) if isinstance(task, dict) else []
    if not set(splits) <= set(given):
        raise UserError(
            f"The task is a {type(task).__name__} with the splits {given}: give a DatasetDict with "
            "train and validation."
        )
    for split in splits:
        task[split].to_parquet(folder / f"{split}.parquet")
    return "task"
