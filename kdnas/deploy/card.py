"""The model card of an export."""

import re
from collections.abc import Mapping
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdnas.deploy.onnx import output_name
from kdnas.models.encoders import num_parameters
from kdnas.models.families import arch_of

# How a student was made, and the hub's tags for it.
_TAGS = {
    "searched and distilled": ["knowledge-distillation", "neural-architecture-search"],
    "distilled": ["knowledge-distillation"],
    "exported": [],
}

_SENTENCES = """With sentence-transformers:

```python
from sentence_transformers import SentenceTransformer
print(SentenceTransformer(".").encode(["The text to read."]))
```

"""


def model_card(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: Mapping[str, Any],
    report: Mapping[str, Any],
) -> str:
    """The text of ``README.md``.

    Args:
        model: what is exported.
        tokenizer: its tokenizer.
        card: ``name``; ``teacher``; ``sections``, which maps a title (``Scores``) to a table's rows, ``{name: value}``;
            optionally ``base_model``, the teacher's name on the hub, ``text``, what it was distilled on, ``made``, how
            it was (else as far as its config tells), and ``license``, by the hub's identifier.
        report: what ``export_student`` returns.
    """
    output = output_name(model)
    kind, auto_class, pipeline_tag = (
        ("text classifier", "AutoModelForSequenceClassification", "text-classification")
        if output == "logits"
        else ("text encoder", "AutoModel", "feature-extraction")
    )
    library = "transformers"
    if "sentences" in report:
        library, pipeline_tag = "sentence-transformers", "sentence-similarity"
    made = card.get("made") or (
        "distilled" if hasattr(model.config, "teacher_sha256") else "exported"
    )
    tags = [*_TAGS[made], "kdnas", "onnx"]
    front: dict[str, Any] = {"library_name": library, "pipeline_tag": pipeline_tag, "tags": tags}
    if card.get("base_model"):
        front["base_model"] = str(card["base_model"])
    front["license"] = str(card.get("license") or "unknown")  # the hub's word for it
    shape = {name: str(value) for name, value in arch_of(model.config).to_dict().items()}
    sections = {"Shape": shape, **card["sections"], **_checks(report)}
    tables = "".join(
        f"## {_plain(title)}\n\n| | |\n| --- | --- |\n"
        + "".join(f"| {_plain(name)} | {_plain(value)} |\n" for name, value in rows.items())
        + "\n"
        for title, rows in sections.items()
    )
    inputs = ", ".join(f"`{name}`" for name in tokenizer.model_input_names)
    text = f" It was distilled on {_plain(card['text'])}." if card.get("text") else ""
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {_plain(card["name"])}

A {kind} that was {made} with kdnas. Its teacher: {_plain(card["teacher"])}.{text}
It has {num_parameters(model):,} parameters ({report["safetensors_megabytes"]:.1f} MB, \
{report["int8_megabytes"]:.1f} MB in int8) and reads up to {tokenizer.model_max_length} tokens.
Licence: {_plain(card.get("license") or "not stated")}; those of the teacher and of the text bind it too.

{tables}## Use

In this folder, without torch and transformers (onnxruntime, tokenizers, numpy): `python predict.py "The text to read."`

With transformers:

```python
from transformers import {auto_class}, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(".")
model = {auto_class}.from_pretrained(".")
batch = tokenizer(["The text to read."], padding=True, truncation=True, return_tensors="pt")
print(model(**batch).{output})
```

{_SENTENCES if "sentences" in report else ""}With onnxruntime:

```python
from onnxruntime import InferenceSession
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(".")
batch = tokenizer(["The text to read."], padding=True, truncation=True, return_tensors="np")
print(InferenceSession("model.onnx").run(["{output}"], dict(batch))[0])
```

`model.onnx` is one file, opset {report["opset"]}, from {inputs} to `{output}`; it was checked against torch: \
the largest difference is {report["max_abs_difference"]:.1e}. `model.int8.onnx` is the same graph with matrices and \
embeddings in 8 bits. `manifest.json` has the sha256 of every file.
"""


def _checks(report: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What was measured on the exported files themselves."""
    int8 = report["int8"]
    scores = {"model.int8.onnx, cosine to model.onnx": f"{int8['cosine']:.4f} ({int8['rows']})"}
    if "score" in int8:
        scores["model.onnx, score"] = f"{int8['score']:.3f} ({int8['rows']})"
        scores["model.int8.onnx, score"] = f"{int8['int8_score']:.3f}"
    latency = {
        f"batch {row['batch']} x {row['length']}": f"{row['torch_ms']:.2f} ms torch, {row['onnx_ms']:.2f} ms "
        f"model.onnx, {row['int8_ms']:.2f} ms model.int8.onnx"
        + (" (slower than model.onnx: take that)" if row["int8_ms"] > row["onnx_ms"] else "")
        for row in report["latency"]
    }
    sections = {"The exported files": scores, "Latency, one CPU thread": latency}
    if "sentences" in report:
        sections = {"Sentence vectors": sentence_lines(report["sentences"]), **sections}
    return sections


def sentence_lines(found: Mapping[str, Any]) -> dict[str, str]:
    """How a sentence encoder compares with its teacher."""
    lines = {
        "pooling": found["pooling"] + ", normalized" * found["normalized"],
        "cosine to the teacher's vectors": f"{found['cosine']:.4f} (held-out texts, through a linear map)",
    }
    if "spearman" in found:
        scores = f"{found['spearman']:.3f} (its teacher {found['teacher_spearman']:.3f})"
        lines[f"{found['task']}, Spearman of the cosine"] = scores
    return lines


def _plain(value: Any) -> str:
    """Text from outside, on one line, as Markdown shows it unchanged."""
    text = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    return re.sub(r"([\\`*\[\]<>|#&])", r"\\\1", text)
