"""What the files of a teacher must hold, checked before any weight is read."""

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kdnas.models.families import find_family, titles
from kdnas.system.errors import UserError, first_line

QUICKSTART = "quickstart"
TOKENIZERS = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def check_files(name: str, source: str) -> None:
    """Refuse what is no teacher by its files.

    Args:
        name: as the user wrote it.
        source: the folder, or a name on the hub, of which nothing is checked here.

    Raises:
        UserError: there is no such folder; or it holds a decoder or a model of another family, has
            no config, tokenizer or weights, or has weights that are cut off or would run code.
    """
    if os.path.isdir(source):
        config = _read_config(name, Path(source))
        find_family(config.get("model_type"))
        refuse_decoder(name, config)
        _check_tokenizer_file(name, Path(source))
        _check_weights(name, Path(source))
    elif source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise UserError(
            f"The teacher {name!r} does not exist: give a folder, a hub name, or {QUICKSTART!r}."
        )


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


def refuse_decoder(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a model that cannot look ahead.

    Raises:
        UserError: its config says that it is one.
    """
    heads = config.get("architectures")
    heads = [str(head) for head in heads] if isinstance(heads, list) else []
    has_decoder_head = any("CausalLM" in head or "LMHead" in head for head in heads)
    if config.get("is_decoder") is True or has_decoder_head:
        raise UserError(
            f"The teacher {name!r} is a decoder ({config.get('model_type')}): "
            f"take an encoder ({titles()})."
        )


def _check_tokenizer_file(name: str, folder: Path) -> None:
    if not any(os.path.isfile(folder / file) for file in TOKENIZERS):
        raise UserError(
            f"The teacher {name!r} has no tokenizer: put {TOKENIZERS[0]} into {str(folder)!r}."
        )


def _check_weights(name: str, folder: Path) -> None:
    weights = sorted(folder.glob("*.safetensors"))
    for path in weights:
        try:
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{str(path)!r} is truncated or no safetensors file ({first_line(error)})."
            ) from error
    if weights:
        return  # transformers reads no other file then

    path = folder / "pytorch_model.bin"
    if not os.path.isfile(path):
        raise UserError(
            f"The teacher {name!r} has no weights: put model.safetensors into {str(folder)!r}."
        )
    try:
        torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # cut off at any byte, the unpickler raises anything
        raise UserError(
            f"{str(path)!r} is truncated or holds more than tensors: "
            "save it again as model.safetensors."
        ) from error
