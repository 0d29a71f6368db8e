"""The student as others use it: a plain Hugging Face folder with ONNX beside it, checked against each other."""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.export import Dim
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kdnas.errors import UserError, first_line
from kdnas.families import family_of, marks_pairs, max_length
from kdnas.models import num_parameters
from kdnas.runs import new_folder, write_text

OPSET = 20
_TAGS = ("knowledge-distillation", "neural-architecture-search", "kdnas", "onnx")


class ParityError(RuntimeError):
    """The ONNX graph does not compute what torch computes."""


def export_student(source: Path, folder: Path, *, card: Mapping[str, Any], tolerance: float = 1e-4) -> dict[str, float]:
    """Write ``config.json``, ``model.safetensors``, tokenizer, ``model.onnx`` and a model card, all or nothing.

    The ONNX graph takes the tokenizer's ``model_input_names``, of any batch size and length, and gives ``logits``
    (a classifier) or ``last_hidden_state`` (an encoder; its pooler, if any, is left out).

    Args:
        source: a Hugging Face folder with tokenizer: a sequence classifier if its config says so, else an encoder.
        folder: appears whole, when the graph was found to agree with torch. One that is there is replaced then.
        card: for the model card. ``name``; ``teacher``; optionally ``base_model``, the teacher's name on the hub; and
            ``sections``, which maps a title (``Scores``, ``Latency``) to a table's rows, ``{name: value}``.
        tolerance: largest difference of an output between torch and onnxruntime.

    Returns:
        ``max_abs_difference``, ``onnx_megabytes``, ``safetensors_megabytes`` and ``opset``.

    Raises:
        UserError: the source has no model or no tokenizer that loads whole.
        ParityError: an output differs by more than the tolerance.
    """
    model, tokenizer = _load(source)
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        onnx_file = temporary / "model.onnx"
        _write_onnx(model, tokenizer, onnx_file)
        report: dict[str, float] = {
            "max_abs_difference": _check_parity(model, tokenizer, onnx_file, tolerance),
            "onnx_megabytes": onnx_file.stat().st_size / 1e6,
            "safetensors_megabytes": (temporary / "model.safetensors").stat().st_size / 1e6,
            "opset": OPSET,
        }
        write_text(temporary / "README.md", _model_card(model, tokenizer, card, report))
    return report


def _load(source: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    here: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}  # a lost folder is no hub's name
    try:
        config = AutoConfig.from_pretrained(source, **here)
        is_classifier = any("ForSequenceClassification" in name for name in config.architectures or ())
        factory = AutoModelForSequenceClassification if is_classifier else AutoModel
        model, info = factory.from_pretrained(
            source,
            dtype=torch.float32,
            output_loading_info=True,
            **here,
            **({} if is_classifier else family_of(config).build),
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **here)
    except Exception as error:  # a broken folder raises anything, KeyError and EOFError included
        raise UserError(f"Cannot export {str(source)!r}: {first_line(error)}.") from error
    if info["missing_keys"]:
        raise UserError(
            f"Cannot export {str(source)!r}: its weights lack {sorted(info['missing_keys'])[0]!r} "
            f"(and {len(info['missing_keys']) - 1} more)."
        )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes up an empty one where there is none
        raise UserError(f"Cannot export {str(source)!r}: it has no tokenizer.")
    tokenizer.model_max_length = min(tokenizer.model_max_length, max_length(config))
    return model.eval(), tokenizer


def _output_name(model: PreTrainedModel) -> str:
    return "logits" if "ForSequenceClassification" in type(model).__name__ else "last_hidden_state"


def _write_onnx(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    axes = {0: Dim("batch"), 1: Dim("length", min=2, max=max_length(model.config))}
    batch = _batch(model, tokenizer, (2, 8))
    with _quiet():
        torch.onnx.export(
            model,
            kwargs=batch,
            f=path,
            input_names=list(batch),
            output_names=[_output_name(model)],
            dynamic_shapes=dict.fromkeys(batch, axes),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns and logs about its own internals, nothing that a user could act on."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shape: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """Random ids, two kinds of segments, and (in all rows but the first) padding from the middle or later on."""
    vocab_size, pad_id = model.config.vocab_size, tokenizer.pad_token_id
    generator = torch.Generator().manual_seed(0)
    num_rows, length = shape
    position = torch.arange(length)
    ends = torch.randint((length + 1) // 2, length + 1, (num_rows, 1), generator=generator)
    ends[0] = length
    mask = (position < ends).long()
    ids = torch.randint(vocab_size, shape, generator=generator)
    ids[ids == pad_id] = (pad_id + 1) % vocab_size
    values = {
        "input_ids": ids.where(mask.bool(), pad_id),
        "attention_mask": mask,
        "token_type_ids": mask * (position >= length // 2) * marks_pairs(model.config),
    }
    return {name: values[name] for name in tokenizer.model_input_names}


def _check_parity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, tolerance: float) -> float:
    """The largest difference between torch and onnxruntime over batches short, long and padded (real tokens only)."""
    import onnxruntime

    output = _output_name(model)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    longest = max_length(model.config)
    worst = 0.0
    for shape in ((1, 2), (1, 3), (1, longest), (3, 2), (2, longest), (8, min(16, longest))):
        batch = _batch(model, tokenizer, shape)
        with torch.inference_mode():
            expected = model(**batch)[output]
        (found,) = session.run([output], {name: value.numpy() for name, value in batch.items()})
        difference = (expected - torch.from_numpy(found)).abs()
        if output == "last_hidden_state":
            difference = difference[batch["attention_mask"].bool()]
        largest = difference.max().item()
        if not largest <= tolerance:  # NaN too
            raise ParityError(
                f"The ONNX graph's {output} differs from torch's by {largest:.3g} at batch x length {shape[0]} x "
                f"{shape[1]}; {tolerance:g} is allowed."
            )
        worst = max(worst, largest)
    return worst


def _model_card(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, card: Mapping[str, Any], report: Mapping[str, float]
) -> str:
    output = _output_name(model)
    kind, auto_class, pipeline_tag = (
        ("text classifier", "AutoModelForSequenceClassification", "text-classification")
        if output == "logits"
        else ("text encoder", "AutoModel", "feature-extraction")
    )
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": pipeline_tag, "tags": list(_TAGS)}
    if "base_model" in card:
        front["base_model"] = str(card["base_model"])
    tables = "".join(
        f"## {_plain(title)}\n\n| | |\n| --- | --- |\n"
        + "".join(f"| {_plain(name)} | {_plain(value)} |\n" for name, value in rows.items())
        + "\n"
        for title, rows in card["sections"].items()
    )
    inputs = ", ".join(f"`{name}`" for name in tokenizer.model_input_names)
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {_plain(card["name"])}

A {kind} that was searched and distilled with kdnas. Its teacher: {_plain(card["teacher"])}.
It has {num_parameters(model):,} parameters ({report["safetensors_megabytes"]:.1f} MB) and reads up to \
{tokenizer.model_max_length} tokens.

{tables}## Use

In this folder, with transformers:

```python
from transformers import {auto_class}, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(".")
model = {auto_class}.from_pretrained(".")
batch = tokenizer(["The text to read."], padding=True, truncation=True, return_tensors="pt")
print(model(**batch).{output})
```

With onnxruntime:

```python
from onnxruntime import InferenceSession
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(".")
batch = tokenizer(["The text to read."], padding=True, truncation=True, return_tensors="np")
print(InferenceSession("model.onnx").run(["{output}"], dict(batch))[0])
```

`model.onnx` is one file, opset {report["opset"]}, from {inputs} to `{output}`; it was checked against torch: \
the largest difference is {report["max_abs_difference"]:.1e}.
"""


def _plain(value: Any) -> str:
    """Text from outside, on one line, as Markdown shows it unchanged."""
    text = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    return re.sub(r"([\\`*\[\]<>|#&])", r"\\\1", text)
