"""What the files of a checkpoint must hold, checked before any weight is read.

A checkpoint's files are data: they name no other file, no code and no hub, and what they say is
held against what is there.
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

# Beyond what any encoder has: of layers, heads and groups, a million of which would be made for
# hours, and of sizes.
MOST_LAYERS, MOST_LABELS, MOST = 1_000, 1 << 16, 1 << 20
_MOST_BYTES = 1 << 24  # of a JSON file that is no vocabulary

# Keys of a config by which transformers would read other files, or weights of another form.
_ELSEWHERE = ("configuration_files", "transformers_weights", "quantization_config")
Shapes = dict[str, tuple[int, ...]]


def refuse_special_files(name: str, folder: Path) -> None:
    """Refuse a folder with a pipe or a device, which would never end, or with another's adapter."""
    for entry in sorted(os.listdir(folder)):
        try:
            kind = os.stat(folder / entry).st_mode
        except OSError:  # a link to nothing: not there
            continue
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            raise UserError(
                f"{str(folder / entry)!r} is a pipe or a device: take a folder of files."
            )
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{name!r} is an adapter, whose weights are another model's: merge it into that first."
        )


def read_config(path: Path) -> PreTrainedConfig:
    """The config of a checkpoint, from its ``config.json``.

    How attention is computed is ours to say, for the name of a way can be that of a repository of
    code.

    Raises:
        UserError: the family is unknown, or a value absurd, or it names files that lie elsewhere.
        Exception: any other, where it is broken.
    """
    values = _read_json(path)
    find_family(values.get("model_type"))
    model_type = str(values["model_type"])
    if elsewhere := [key for key in _ELSEWHERE if values.get(key) is not None]:
        raise ValueError(f"{elsewhere[0]} is set: take a plain checkpoint")
    config_class = CONFIG_MAPPING[model_type]
    known = {*config_class().to_dict(), *config_class.attribute_map, "num_labels"}
    for key in known & values.keys():
        is_number = key.startswith(("num_", "n_", "inner_"))
        value, most = values[key], MOST_LAYERS if is_number else MOST
        if key == "num_labels":  # each gets a name
            most = MOST_LABELS
        if isinstance(value, int | float) and not abs(value) <= most:
            raise ValueError(f"{key} is {value}: no encoder has more than {most:,}")
    values = {key: value for key, value in values.items() if "_implementation" not in key}
    return config_class.from_dict(values)


def check_files(name: str, folder: Path) -> Shapes:
    """The shape of each tensor of a folder, by its name in the file.

    Raises:
        UserError: there is no tokenizer, or no weights, or they are cut off, lie elsewhere or would
            run code.
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
    """The files that transformers reads: one, or the shards that an index names."""
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
                raise UserError(f"{str(index)!r} names no shards: take a whole checkpoint.")
            names = list(dict.fromkeys(map(str, shards.values())))
            _refuse_elsewhere(index, names)
            if missing := [one for one in names if not os.path.isfile(folder / one)]:
                raise UserError(f"{str(index)!r} names {missing[0]!r}, which is not there.")
            return [folder / one for one in names]
    return []


def _refuse_elsewhere(path: Path, names: list[Any]) -> None:
    """Refuse a file that names others by more than their names in its own folder."""
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise UserError(f"{str(path)!r} names {name!r:.200}, which is not in its folder.")


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
    except Exception as error:  # cut off at any byte, the unpickler raises anything
        raise UserError(
            f"{str(path)!r} is truncated or holds more than tensors: save it again as {SAFE}."
        ) from error


def check_sizes(name: str, config: PreTrainedConfig, shapes: Shapes) -> None:
    """Refuse a config with a size, or with many more parameters, than its weights have."""
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    names = find_family(config.model_type).fields
    for field in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"):
        size = getattr(config, names.get(field, field))
        if not 0 < size <= largest:
            raise UserError(
                f"The checkpoint {name!r} has the {field} {size} in config.json, and no tensor of this "
                "size: take a whole checkpoint."
            )
    held = sum(map(math.prod, shapes.values()))
    described = _num_parameters(config)
    if described > 2 * held:  # a missing tensor is told by its name, where the weights are read
        raise UserError(
            f"The checkpoint {name!r} has {described:,} parameters by its config.json, and its "
            f"weights hold {held:,}: take a whole checkpoint."
        )


def _num_parameters(config: PreTrainedConfig) -> int:
    """How many an encoder has, none of which is made; 0 where the config describes no encoder."""
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config, **find_family(config.model_type).build)
    except Exception:  # a broken config raises anything, and again where the weights are read
        return 0
    return sum(parameter.numel() for parameter in model.parameters())


def _read_checked(path: Path) -> dict[str, Any]:
    try:
        return _read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} cannot be read ({first_line(error)}).") from error


def _read_json(path: Path) -> dict[str, Any]:
    """An object with each key once, and no NaN."""
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise ValueError(f"it has {size:,} bytes")
    content = path.read_text(encoding="utf-8")
    values = json.loads(content, object_pairs_hook=unique_keys, parse_constant=_refuse_constant)
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}, and no object")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it has the value {name}")
