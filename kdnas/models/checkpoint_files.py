"""Checks of a checkpoint's files, made before any weight is read.

The files are not trusted: they may not refer to files in other folders, to code or to the hub,
and the sizes in the config are compared with the tensors in the weights.
"""

import json
import math
import os
import stat
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig

from kdnas.models.families import find_family
from kdnas.system.errors import UserError, first_line
from kdnas.system.files import unique_keys

TOKENIZERS = "tokenizer.json vocab.txt vocab.json spiece.model sentencepiece.bpe.model".split()
SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"

# Limits that no encoder reaches: of layers, heads and groups (to build a million would take hours),
# of labels, and of sizes.
MOST_LAYERS, MOST_LABELS, MOST = 1_000, 1 << 16, 1 << 20
_MOST_BYTES = 1 << 24  # of a JSON file other than a vocabulary

# Config keys that make transformers read other files, or weights in another format.
_ELSEWHERE = ("configuration_files", "transformers_weights", "quantization_config")
Shapes = dict[str, tuple[int, ...]]


def refuse_special_files(name: str, folder: Path) -> None:
    """Raise an error if the folder of checkpoint ``name`` has an adapter, a pipe or a device."""
    for entry in sorted(os.listdir(folder)):
        try:
            kind = os.stat(folder / entry).st_mode
        except OSError:  # a link to a missing file counts as no file
            continue
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            raise UserError(
                f"{str(folder / entry)!r} is a pipe or a device, not a file: use a folder of plain "
                "files."
            )
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{name!r} is an adapter, not a whole model: merge it into its base model first."
        )


def read_config(path: Path) -> PreTrainedConfig:
    """Read the config of a checkpoint from its ``config.json``.

    Keys that select an attention implementation are ignored, because they can name a code
    repository.

    Raises:
        UserError: the family is not supported.
        ValueError: a number is absurdly large, or the config refers to other files.
        Exception: any other error, if the file is broken.
    """
    values = _read_json(path)
    find_family(values.get("model_type"))
    model_type = str(values["model_type"])
    if elsewhere := [key for key in _ELSEWHERE if values.get(key) is not None]:
        raise ValueError(
            f"config.json sets {elsewhere[0]}, which kdnas does not read: use a checkpoint without it"
        )
    config_class = CONFIG_MAPPING[model_type]
    known = {*config_class().to_dict(), *config_class.attribute_map, "num_labels"}
    for key in known & values.keys():
        is_number = key.startswith(("num_", "n_", "inner_"))
        value, most = values[key], MOST_LAYERS if is_number else MOST
        if key == "num_labels":  # each label gets a name
            most = MOST_LABELS
        if isinstance(value, int | float) and not abs(value) <= most:
            raise ValueError(
                f"{key} is {value}, but at most {most:,} is plausible for an encoder: correct it"
            )
    values = {key: value for key, value in values.items() if "_implementation" not in key}
    return config_class.from_dict(values)


def check_files(name: str, folder: Path) -> Shapes:
    """Refuse an incomplete or unsafe checkpoint folder; return the shape of each tensor by name.

    Args:
        name: name of the checkpoint, for messages.
        folder: the folder.

    Raises:
        UserError: there is no tokenizer, there are no weights, or the weights are truncated, lie in
            another folder or could run code.
    """
    if not any(os.path.isfile(folder / file) for file in TOKENIZERS):
        raise UserError(f"{name!r} has no tokenizer: put {TOKENIZERS[0]} into {str(folder)!r}.")
    for path in folder.glob("tokenizer_config.json"):
        names = _read_checked(path).get("fast_tokenizer_files") or []
        _refuse_elsewhere(path, names if isinstance(names, list) else [names])
    files = _weight_files(folder)
    if not files:
        raise UserError(f"{name!r} has no weights: put {SAFE} into {str(folder)!r}.")
    shapes: Shapes = {}
    for path in files:
        shapes |= _shapes_of(path)
    return shapes


def _weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers would read: one file, or those in an index."""
    for whole in (SAFE, PICKLED):
        if os.path.isfile(folder / whole):
            return [folder / whole]
        index = folder / f"{whole}{INDEX}"
        if os.path.isfile(index):
            content = _read_checked(index)
            shards = content.get("weight_map")
            if not (
                isinstance(shards, dict) and shards and isinstance(content.get("metadata"), dict)
            ):
                raise UserError(f"{str(index)!r} lists no weight files: use a complete checkpoint.")
            names = list(dict.fromkeys(map(str, shards.values())))
            _refuse_elsewhere(index, names)
            if missing := [one for one in names if not os.path.isfile(folder / one)]:
                raise UserError(
                    f"{str(index)!r} lists {missing[0]!r}, but this file does not exist: use a "
                    "complete checkpoint."
                )
            return [folder / one for one in names]
    return []


def _refuse_elsewhere(path: Path, names: list[Any]) -> None:
    """Raise an error if the file ``path`` refers to files outside its own folder."""
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise UserError(
                f"{str(path)!r} refers to {name!r:.200}, which is not in the same folder: use a "
                "checkpoint whose files are in one folder."
            )


def _shapes_of(path: Path) -> Shapes:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="np") as file:
                return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{str(path)!r} is truncated or not a safetensors file "
                f"({first_line(error)}): copy it again."
            ) from error
    try:
        found = torch.load(
            path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
        return {str(key): tuple(tensor.shape) for key, tensor in found.items()}
    except Exception as error:  # on a truncated file, the unpickler raises any exception
        raise UserError(
            f"{str(path)!r} is truncated, or holds Python objects other than tensors: save the "
            f"model again as {SAFE}."
        ) from error


def check_sizes(name: str, config: PreTrainedConfig, shapes: Shapes) -> None:
    """Raise an error if config.json does not fit the weights.

    It does not fit if the config names a size that is larger than every size in the weights, or if
    it describes over twice as many parameters as the weights have.

    Args:
        name: name of the checkpoint, for messages.
        config: the content of config.json.
        shapes: the shape of each tensor in the weights.
    """
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    names = find_family(config.model_type).fields
    for field in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"):
        size = getattr(config, names.get(field, field))
        if not 0 < size <= largest:
            raise UserError(
                f"In config.json of {name!r}, {field} is {size}, but no tensor has this size: use "
                "a complete checkpoint."
            )
    held = sum(map(math.prod, shapes.values()))
    described = _num_parameters(config)
    if described > 2 * held:  # below, loading the weights names the missing tensors
        raise UserError(
            f"By its config.json, the checkpoint {name!r} has {described:,} parameters, but its "
            f"weights have {held:,}: use a complete checkpoint."
        )


def _num_parameters(config: PreTrainedConfig) -> int:
    """Return an encoder's number of parameters without allocating them; 0 if it cannot be built."""
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config, **find_family(config.model_type).build)
    except Exception:  # a broken config raises any exception, and does so again at loading
        return 0
    return sum(parameter.numel() for parameter in model.parameters())


def _read_checked(path: Path) -> dict[str, Any]:
    try:
        return _read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{str(path)!r} cannot be read ({first_line(error)}): copy it again."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; duplicate keys, NaN, infinity and very large files are an error."""
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise ValueError(f"it has {size:,} bytes")
    content = path.read_text(encoding="utf-8")
    values = json.loads(content, object_pairs_hook=unique_keys, parse_constant=_refuse_constant)
    if not isinstance(values, dict):
        raise ValueError(f"the file holds a {type(values).__name__}, not a JSON object")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it has the value {name}")
