"""What a teacher's files say without torch, whose import takes seconds."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from kdnas.errors import UserError, first_line
from kdnas.hub import looked_in
from kdnas.safe_yaml import read_yaml

QUICKSTART = "quickstart"
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
PICKLED = "pytorch_model.bin"


def refuse_early(args: Sequence[str]) -> None:
    """Refuse the teacher that a command's options or YAML name by its files, where the parser cannot read another.

    Raises:
        UserError: as ``check_files``.
    """
    name = _named_teacher(args)
    if name not in (None, QUICKSTART):
        check_files(name, name)


def _named_teacher(args: Sequence[str]) -> str | None:
    found: Any = None
    words = iter(args)
    for word in words:
        option, equals, value = word.partition("=")
        if option == "--teacher":
            found = value if equals else next(words, None)
        elif option == "--config":
            path = Path(value if equals else next(words, ""))
            if not path.is_file():  # one that is shipped, or a pipe, which can be read once
                return None
            try:
                found = read_yaml(path).get("teacher", found)
            except UserError:  # the parser has a line of its own for it
                return None
        elif option in ("-h", "--help") or option.startswith(("--print", "--tea")):  # nothing is done, or short for it
            return None
    return found if isinstance(found, str) else None


def check_files(name: str, source: str) -> dict[str, Any] | None:
    """Refuse what its files alone show to be no teacher.

    Args:
        name: as the user wrote it.
        source: the folder, or a name on the hub.

    Returns:
        What is in the folder's config.json; None where it is no folder.

    Raises:
        UserError: there is no such folder, nor a name that is in the hub's cache where only that may be asked; or it is
            a decoder, has no config or tokenizer, or has no weights, or safetensors that are cut off.
    """
    if os.path.isdir(source):
        config = _check_folder(name, Path(source))
        refuse_decoder(name, config)
        return config
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise UserError(f"The teacher {name!r} does not exist: give a folder, a hub name, or {QUICKSTART!r}.")
    if huggingface_hub.is_offline_mode():
        try:
            known = isinstance(huggingface_hub.try_to_load_from_cache(source, "config.json"), str)
        except HFValidationError:
            known = False
        if not known:
            raise UserError(
                f"The teacher {name!r} was not found, here or {looked_in()}: "
                f"give a folder, another name, or {QUICKSTART!r}."
            )
    return None


def refuse_decoder(name: str, config: dict[str, Any]) -> None:
    """Refuse a model that cannot look ahead.

    Raises:
        UserError: its config says that it is one.
    """
    heads = config.get("architectures") or ()
    if config.get("is_decoder") or any("CausalLM" in head or "LMHead" in head for head in map(str, heads)):
        raise UserError(
            f"The teacher {name!r} is a decoder ({config.get('model_type')}): take an encoder, such as BERT or RoBERTa."
        )


def _check_folder(name: str, folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"The teacher {name!r} has no readable config.json: {first_line(error)}.") from error
    if not isinstance(config, dict):
        raise UserError(f"The teacher {name!r} has a config.json that is no mapping.")
    if not any((folder / file).is_file() for file in TOKENIZERS):
        raise UserError(f"The teacher {name!r} has no tokenizer: put {TOKENIZERS[0]} into {str(folder)!r}.")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights and not (folder / PICKLED).is_file():
        raise UserError(f"The teacher {name!r} has no weights: put model.safetensors into {str(folder)!r}.")
    for path in weights:
        try:
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{str(path)!r} is truncated or no safetensors file ({first_line(error)}).") from error
    return config
