"""Objects that are given from Python, written down for commands to read."""

import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdnas.models.families import arch_of
from kdnas.system.errors import UserError
from kdnas.system.files import INPUTS, check_writable, file_sha256, new_folder, owned, sweep

Write = Callable[[Path], object]


def as_paths(**asked: Any) -> dict[str, Any]:
    """The settings of a command, with the folder of each object below ``root`` in its place.

    Raises:
        UserError: a model without its tokenizer, or a task without the splits that are needed.
    """
    inputs = Path(asked.get("root", "lightning_logs"), INPUTS)
    kinds = {"text": _text, "task": _task}
    kinds |= dict.fromkeys(("teacher", "student", "model", "distill_from"), _model)

    def path(kind: Callable[[Any], tuple[str, Write]], value: Any) -> Any:
        if isinstance(value, str | os.PathLike):
            return os.fspath(value)
        return None if value is None else _written(inputs, *kind(value))

    for name in asked.keys() & kinds.keys():
        value, kind = asked[name], kinds[name]
        are_many = isinstance(value, list) and name != "text"
        asked[name] = [path(kind, one) for one in value] if are_many else path(kind, value)
    return asked | ({"root": str(asked["root"])} if "root" in asked else {})


def _model(model: Any) -> tuple[str, Write]:
    if hasattr(model, "tokenizer"):  # a Student
        model = (model.model, model.tokenizer)
    if not isinstance(model, tuple):
        raise UserError(f"A {type(model).__name__} has no tokenizer: give (model, tokenizer).")
    encoder, tokenizer = model[0], copy.deepcopy(model[1])
    if tokenizer.is_fast:  # what it was last called with is no part of it
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()

    def write(folder: Path) -> None:
        encoder.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    arch = arch_of(encoder.config)
    name = f"{encoder.config.model_type}-{arch.num_hidden_layers}x{arch.hidden_size}"
    return name, write


def _text(text: Any) -> tuple[str, Write]:
    def write(folder: Path) -> None:
        if hasattr(text, "to_parquet"):
            text.to_parquet(folder / "rows.parquet")
        else:
            lines = [json.dumps({"text": row}) + "\n" for row in text]
            (folder / "rows.jsonl").write_text("".join(lines))

    return "text", write


def _task(task: Any) -> tuple[str, Write]:
    splits = ("train", "validation")
    if not set(splits) <= set(task):
        raise UserError(f"The task has the splits {', '.join(task)}: give train and validation.")

    def write(folder: Path) -> None:
        for split in splits:
            table, label = task[split].with_format("arrow")[:], task[split].features.get("label")
            if names := getattr(label, "names", None):
                ids = table["label"].to_pylist()
                labels = pa.array(map(dict(enumerate(names)).get, ids), pa.string())
                table = table.drop_columns("label").append_column("label", labels)
            pq.write_table(table, folder / f"{split}.parquet")

    return "task", write


def _written(inputs: Path, name: str, write: Write) -> str:
    """The folder of what ``write`` writes, named by its hash; one that is there is kept."""
    check_writable(inputs, "root")
    inputs.mkdir(parents=True, exist_ok=True)
    sweep(inputs, ".*")
    with tempfile.TemporaryDirectory(dir=inputs, prefix=f".{owned(name)}") as temporary:
        write(Path(temporary))
        files = sorted(Path(temporary).iterdir())
        content = repr([(file.name, file_sha256(file)) for file in files])
        place = inputs / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
        if not place.exists():
            with new_folder(place) as folder:
                for file in files:
                    file.rename(folder / file.name)
    return str(place)
