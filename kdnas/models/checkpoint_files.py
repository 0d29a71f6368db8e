"""What a teacher's files say without torch, whose import takes seconds."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from safetensors import SafetensorError, safe_open

from kdnas.models.hub import looked_in
from kdnas.system.errors import UserError, first_line
from kdnas.system.files import MANIFEST
from kdnas.system.yaml import read_yaml

QUICKSTART = "quickstart"
# model_type of config.json -> what people call it; the rows of ``kdnas.models.families.FAMILIES``
TITLES = {
    "bert": "BERT",
    "roberta": "RoBERTa",
    "xlm-roberta": "XLM-RoBERTa",
    "camembert": "CamemBERT",
    "albert": "ALBERT",
    "electra": "ELECTRA",
    "distilbert": "DistilBERT",
    "mpnet": "MPNet",
    "deberta-v2": "DeBERTa-v2/v3",
    "modernbert": "ModernBERT",
}
TOKENIZERS = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)
PICKLED = "pytorch_model.bin"


def refuse_early(args: Sequence[str]) -> None:
    """Refuse the teacher that options or YAML name by its files, where the parser cannot read another.

    A finished run is left alone: its command answers without a teacher.

    Raises:
        UserError: as ``check_files``.
    """
    values = _named(args)
    teacher = values.get("teacher")
    finished = Path(
        str(values.get("root", "lightning_logs")), str(values.get("name", "kdnas")), MANIFEST
    )
    if (
        isinstance(teacher, str)
        and teacher.lower() not in (QUICKSTART, "null", "~", "")
        and not os.path.isfile(finished)
    ):
        check_files(teacher, teacher)


def _named(args: Sequence[str]) -> dict[str, Any]:
    """What options and YAML name, with teacher, root and name among it; empty where only the parser can tell."""
    found: dict[str, Any] = {}
    names = ("--config", "--teacher", "--root", "--name")
    words = iter(args)
    for word in words:
        option, equals, value = word.partition("=")
        if option in names:
            value = value if equals else next(words, "-")
            if value.startswith("-") or (option == "--config" and not os.path.isfile(value)):
                return {}  # nothing is given; or a config that is shipped, or a pipe, which can be read once
            try:
                found |= read_yaml(Path(value)) if option == "--config" else {option[2:]: value}
            except UserError:  # the parser has a line of its own for it
                return {}
        elif (
            option == "-h"
            or option.startswith("--print")
            or (len(option) > 2 and any(name.startswith(option) for name in (*names, "--help")))
        ):  # nothing is done then; or it may be short for one of them
            return {}
    return {} if "config" in found else found


def check_files(name: str, source: str) -> None:
    """Refuse what its files alone show to be no teacher.

    Args:
        name: as the user wrote it.
        source: the folder, or a name on the hub.

    Raises:
        UserError: there is no such folder, nor a name that is in the hub's cache where only that may be asked; or it is
            a decoder or of another family, has no config or tokenizer, or has no weights, or safetensors that are cut
            off.
    """
    if os.path.isdir(source):
        config = _read_config(name, Path(source))
        refuse_family(config.get("model_type"))
        refuse_decoder(name, config)
        _check_parts(name, Path(source))
    elif source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise UserError(
            f"The teacher {name!r} does not exist: give a folder, a hub name, or {QUICKSTART!r}."
        )
    elif huggingface_hub.is_offline_mode() and not _may_be_cached(source):
        remedy = f"give a folder, another name, or {QUICKSTART!r}"
        raise UserError(f"The teacher {name!r} was not found, here or {looked_in()}: {remedy}.")


def _read_config(name: str, folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"The teacher {name!r} has no readable config.json: {first_line(error)}."
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"The teacher {name!r} has a config.json that is no mapping.")
    return config


def refuse_family(model_type: Any) -> None:
    """Refuse a model of which there is no row in ``kdnas.models.families.FAMILIES``.

    Raises:
        UserError: there is none.
    """
    if str(model_type) not in TITLES:
        raise UserError(
            f"A teacher of the family {model_type!r} is not supported: take an encoder ({_titles()})."
        )


def refuse_decoder(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a model that cannot look ahead.

    Raises:
        UserError: its config says that it is one.
    """
    heads = config.get("architectures")
    heads = [str(head) for head in heads] if isinstance(heads, list) else []
    if config.get("is_decoder") is True or any(
        "CausalLM" in head or "LMHead" in head for head in heads
    ):
        raise UserError(
            f"The teacher {name!r} is a decoder ({config.get('model_type')}): take an encoder ({_titles()})."
        )


def _titles() -> str:
    return ", ".join(TITLES.values())


def _check_parts(name: str, folder: Path) -> None:
    if not any(os.path.isfile(folder / file) for file in TOKENIZERS):
        raise UserError(
            f"The teacher {name!r} has no tokenizer: put {TOKENIZERS[0]} into {str(folder)!r}."
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights and not os.path.isfile(folder / PICKLED):
        raise UserError(
            f"The teacher {name!r} has no weights: put model.safetensors into {str(folder)!r}."
        )
    for path in weights:
        try:
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{str(path)!r} is truncated or no safetensors file ({first_line(error)})."
            ) from error


def _may_be_cached(source: str) -> bool:
    try:
        return isinstance(huggingface_hub.try_to_load_from_cache(source, "config.json"), str)
    except (
        OSError,
        ValueError,
    ):  # a cache that is damaged, or no name: transformers says what it is
        return True
