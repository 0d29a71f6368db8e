"""What the files of a teacher must hold, checked before any weight is read."""

import os
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from kdnas.system.errors import UserError, first_line

TOKENIZERS = "tokenizer.json vocab.txt vocab.json spiece.model sentencepiece.bpe.model".split()


def check_files(name: str, folder: Path) -> None:
    """Refuse a folder without tokenizer or weights, or weights that are cut off or would run code."""
    if not any(os.path.isfile(folder / file) for file in TOKENIZERS):
        raise UserError(
            f"The teacher {name!r} has no tokenizer: put {TOKENIZERS[0]} into {str(folder)!r}."
        )
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
