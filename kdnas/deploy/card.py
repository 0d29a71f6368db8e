"""Write the model card of an export."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdnas.deploy.onnx import output_name
from kdnas.models.encoders import num_parameters
from kdnas.models.families import arch_of
from kdnas.tasks.tasks import TASKS

# The hub's tags, by how a student was made.
_TAGS = {
    "searched and distilled": ["knowledge-distillation", "neural-architecture-search"],
    "distilled": ["knowledge-distillation"],
    "exported": [],
}
# The hub's names of metrics, where they differ from ours.
_HUB_METRICS = {
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}


def model_card(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: Mapping[str, Any],
    report: Mapping[str, Any],
) -> str:
    """Return the text of an export's ``README.md``.

    Args:
        model: the exported model.
        tokenizer: the model's tokenizer.
        card: facts about the model: ``name``, ``teacher`` and ``sections``, which maps a title
            (``Scores``) to the rows of a table, ``{name: value}``. Optional: ``base_model``, the
            teacher's name on the hub; ``text``, the text on which the model was distilled;
            ``made``, one of ``searched and distilled``, ``distilled`` and ``exported`` (by default
            ``distilled`` if the model's config has a teacher's hash, or else ``exported``);
            ``license``, as the hub spells it; ``task`` and ``metrics``, the name of the labelled
            task and the metrics that ``evaluate_glue`` measured on it.
        report: the results of the checks, as ``export_student`` returns them.
    """
    output = output_name(model)
    kind, auto_class, pipeline_tag = "text encoder", "AutoModel", "feature-extraction"
    if output == "logits":
        kind = "text classifier"
        auto_class = "AutoModelForSequenceClassification"
        pipeline_tag = "text-classification"
    library = "transformers"
    if "sentences" in report:
        library, pipeline_tag = "sentence-transformers", "sentence-similarity"

    is_distilled = hasattr(model.config, "teacher_sha256")
    made = card.get("made") or ("distilled" if is_distilled else "exported")
    results = list(_results(card["task"], card["metrics"])) if "metrics" in card else None
    front = ModelCardData(
        model_name=card["name"] if results else None,
        eval_results=results,
        library_name=library,
        pipeline_tag=pipeline_tag,
        tags=[*_TAGS[made], "kdnas", "onnx"],
        base_model=card.get("base_model"),
        license=card.get("license") or "unknown",  # the hub's word for it
    )
    environment = Environment(
        loader=PackageLoader("kdnas.deploy"),
        undefined=StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = _plain
    return environment.get_template("card.md.j2").render(
        front=front.to_yaml(),
        name=card["name"],
        kind=kind,
        made=made,
        teacher=card["teacher"],
        teacher_sha256=getattr(model.config, "teacher_sha256", None),
        text=card.get("text"),
        license=card.get("license"),
        sections={
            "Shape": arch_of(model.config).to_dict(),
            **card["sections"],
            **check_lines(report),
        },
        num_parameters=num_parameters(model),
        longest=tokenizer.model_max_length,
        auto_class=auto_class,
        inputs=", ".join(f"`{name}`" for name in tokenizer.model_input_names),
        output=output,
        report=report,
    )


def _results(task: str, metrics: Mapping[str, float]) -> Iterator[EvalResult]:
    """Convert a task's metrics to the ``model-index`` format of the Hugging Face hub.

    A metric was measured on the split ``validation``, or on the part that the end of its name says:
    ``accuracy_matched`` of MNLI on ``validation_matched``, and likewise ``_mismatched``.
    """
    is_glue = task in TASKS
    for key, value in metrics.items():
        metric, *part = key.split("_")
        yield EvalResult(
            task_type="text-classification",
            dataset_type="nyu-mll/glue" if is_glue else task,
            dataset_name=f"GLUE {task}" if is_glue else task,
            dataset_config=task if is_glue else None,
            dataset_split="_".join(["validation", *part]),
            metric_type=_HUB_METRICS.get(metric, metric),
            metric_value=round(value, 4),
        )


def check_lines(report: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the results of an export's checks as tables of text.

    The result maps the title of each table to its rows, ``{name: text}``.

    Args:
        report: the results, as ``export_student`` returns them.
    """
    int8 = report["int8"]
    scores = {"model.int8.onnx, cosine to model.onnx": f"{int8['cosine']:.4f} ({int8['rows']})"}
    if "score" in int8:
        scores["model.onnx, score"] = f"{int8['score']:.3f} ({int8['rows']})"
        scores["model.int8.onnx, score"] = f"{int8['int8_score']:.3f}"

    latency = {}
    for row in report["latency"]:
        words = (
            f"{row['torch_ms']:.2f} ms torch, {row['onnx_ms']:.2f} ms model.onnx, "
            f"{row['int8_ms']:.2f} ms model.int8.onnx"
        )
        if row["int8_ms"] > row["onnx_ms"]:
            words += " (slower than model.onnx: take that)"
        latency[f"batch {row['batch']} x {row['length']}"] = words

    sections = {"The exported files": scores, "Latency, one CPU thread": latency}
    if found := report.get("sentences"):
        cosine = f"{found['cosine']:.4f} (held-out texts, through a linear map)"
        vectors = {
            "pooling": found["pooling"] + ", normalized" * found["normalized"],
            "cosine to the teacher's vectors": cosine,
        }
        if "spearman" in found:
            spearman = f"{found['spearman']:.3f} (its teacher {found['teacher_spearman']:.3f})"
            vectors[f"{found['task']}, Spearman of the cosine"] = spearman
        sections = {"Sentence vectors": vectors, **sections}
    return sections


def _plain(value: Any) -> str:
    """Convert a value to one line of text in which Markdown's special characters are escaped."""
    text = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    return re.sub(r"([\\`*\[\]<>|#&])", r"\\\1", text)
