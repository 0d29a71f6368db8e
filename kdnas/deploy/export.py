"""Export a student as a Hugging Face folder with ONNX graphs in float32 and int8; check them."""

import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kdnas.deploy.card import model_card
from kdnas.deploy.latency import LatencySettings, measure_latency
from kdnas.deploy.onnx import (
    INPUTS,
    INT8,
    ONNX,
    OPSET,
    open_session,
    output_name,
    random_batch,
    write_onnx,
)
from kdnas.deploy.quantize import Rows, random_rows, write_best_int8
from kdnas.deploy.sentences import Sentences, add_sentence_files
from kdnas.models.checkpoint_files import (
    check_files,
    check_sizes,
    read_config,
    refuse_special_files,
)
from kdnas.models.encoders import refuse_no_values, refuse_unused
from kdnas.models.families import (
    arch_of,
    class_names,
    family_of,
    has_classifier,
    match_marks,
    max_length,
    name_classes,
    refuse_relative_positions,
)
from kdnas.system.errors import ParityError, UserError, first_line
from kdnas.system.files import file_sha256, new_folder, write_text
from kdnas.system.manifest import write_manifest

# Most attention scores in a batch of the parity check (1 GB in float32); longer rows are left out.
MOST_SCORES = 2**28
OTHER_HEADS = ("ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")


def export_student(
    source: Path,
    folder: Path,
    *,
    card: Mapping[str, Any],
    make_rows: Callable[[PreTrainedTokenizerBase], Rows] | None = None,
    length: int | None = None,
    sentences: Sentences | None = None,
    tolerance: float = 1e-4,
    min_seconds: float = 0.1,
) -> dict[str, Any]:
    """Write a Hugging Face folder with ONNX graphs, ``predict.py``, model card and manifest.

    The graphs, in float32 and int8, have the tokenizer's ``model_input_names`` as inputs, with any
    batch size and length. They return ``logits`` (classifier) or ``last_hidden_state`` (encoder,
    without its pooler).

    Args:
        source: a Hugging Face folder with a tokenizer and a model, which is loaded as a sequence
            classifier if the config names one, or else as an encoder.
        folder: folder of the export. It is written, or replaced, as a whole once all checks have
            passed.
        card: facts for the model card, such as the model's name; ``model_card`` lists them all.
        make_rows: makes two sets of rows with the tokenizer: one to choose the better of two int8
            graphs, and one to compare it with the float32 graph; None: rows of random words.
        length: number of tokens at which texts are cut; None: the longest input of the model.
        sentences: the teacher of a sentence encoder, and texts for comparison. If given,
            sentence-transformers can load the folder, with this teacher's pooling.
        tolerance: largest allowed difference of an output between torch and onnxruntime.
        min_seconds: least time of each latency measurement, in seconds.

    Returns:
        A dictionary with ``max_abs_difference`` (of outputs, between torch and onnxruntime),
        ``onnx_megabytes``, ``int8_megabytes`` and ``safetensors_megabytes`` (sizes of the files, in
        10^6 bytes), ``opset`` (of ONNX), ``int8`` (the result of ``write_best_int8``), ``latency``
        (a list of measurements on one CPU thread, each with ``batch``, ``length``, ``torch_ms``,
        ``onnx_ms`` and ``int8_ms``) and, with ``sentences``, ``sentences`` (the result of
        ``add_sentence_files``).

    Raises:
        UserError: model or tokenizer of the source cannot be loaded completely, or ``length`` is
            less than 2 or more than the model takes.
        ParityError: outputs of a graph, token ids of ``predict.py`` or sentence vectors differ too
            much from those of the source's model and tokenizer.
    """
    model, tokenizer = load_student(source)
    if length is not None:
        longest = max_length(model.config)
        if not 2 <= length <= longest:
            raise UserError(
                f"length is {length}, but the student {str(source)!r} takes from 2 to {longest} "
                "tokens: give a length in this range."
            )
        tokenizer.model_max_length = length
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        shutil.copyfile(Path(__file__).with_name("predict.py"), temporary / "predict.py")
        report: dict[str, Any] = {"opset": OPSET}
        if sentences:
            report["sentences"] = add_sentence_files(temporary, model, tokenizer, sentences)

        exact, int8 = temporary / ONNX, temporary / INT8
        names, longest = tokenizer.model_input_names, tokenizer.model_max_length
        write_onnx(model, exact, names)
        report["max_abs_difference"] = _check_parity(model, tokenizer, exact, tolerance)
        words = random_rows(model.config, names, min(longest, 128))
        rows = make_rows(tokenizer) if make_rows else words
        report["int8"] = write_best_int8(exact, int8, rows)
        _check_predict(tokenizer, temporary)

        weights = temporary / "model.safetensors"
        for name, path in (("onnx", exact), ("int8", int8), ("safetensors", weights)):
            report[f"{name}_megabytes"] = path.stat().st_size / 1e6
        report["latency"] = _latency(model, exact, int8, longest, min_seconds)
        write_text(temporary / "README.md", model_card(model, tokenizer, card, report))
        about = {"checks": report, "source_sha256": source_sha256(source)}
        write_manifest(temporary, about | teacher_in(model.config))
    return report


def teacher_in(config: PreTrainedConfig) -> dict[str, str]:
    """Return the teacher's hash in a config as ``{"teacher_sha256": hash}``; {} if it has none."""
    known = getattr(config, "teacher_sha256", None)
    return {"teacher_sha256": str(known)} if known else {}


def source_sha256(source: Path) -> str | None:
    """Return the SHA-256 of a folder's ``model.safetensors``, or None if it has no such file."""
    weights = source / "model.safetensors"
    return file_sha256(weights) if weights.is_file() else None


def load_student(source: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the classifier or encoder of a folder, in float32 and eval mode, and its tokenizer.

    Raises:
        UserError: model or tokenizer cannot be loaded completely, or the model has another head
            than a sequence classifier's.
    """
    here: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        if not os.path.isdir(source):
            raise FileNotFoundError("there is no such folder")
        refuse_special_files(str(source), source)
        config = read_config(source / "config.json")
        for name in config.architectures or ():
            if name.endswith(OTHER_HEADS):
                raise ValueError(
                    f"the head of {name} cannot be exported: give an encoder, or a sequence "
                    "classifier"
                )
        check_sizes(str(source), config, check_files(str(source), source))
        refuse_relative_positions(str(source), config)
        options: Any = dict(config=config, dtype=torch.float32, output_loading_info=True, **here)
        if has_classifier(config):
            if config.problem_type == "multi_label_classification":
                raise ValueError(
                    "the classifier predicts several labels at once: give one that predicts a "
                    "single label"
                )
            factory: Any = AutoModelForSequenceClassification
        else:
            factory = AutoModel
            options |= family_of(config).build
        model, info = factory.from_pretrained(source, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **here)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"the weights lack {missing[0]!r} (and {len(missing) - 1} more): give a folder "
                "with all of them"
            )
        refuse_unused(str(source), info["unexpected_keys"])
        refuse_no_values(str(source), model)
        # If a folder has no tokenizer, transformers returns an empty one.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise ValueError("it has no tokenizer")
        match_marks(tokenizer, config)
        if unknown := set(tokenizer.model_input_names) - {*INPUTS, "token_type_ids"}:
            raise ValueError(
                f"the tokenizer returns {min(unknown)!r}, an input that is not supported: give a "
                "model that takes only text"
            )
    except Exception as error:  # a broken folder raises anything, KeyError and EOFError included
        raise UserError(f"Cannot export {str(source)!r}: {first_line(error)}.") from error
    if has_classifier(config):
        # Class ids of some configs start at 1; who reads an export counts from 0.
        name_classes(model.config, class_names(config))
    tokenizer.model_max_length = min(tokenizer.model_max_length, max_length(config))
    return model.eval(), tokenizer


def _parity_lengths(longest: int) -> list[int]:
    """Return row lengths to check, in tokens: ``longest``, and Fibonacci numbers below it."""
    lengths, step = [1], 1
    while lengths[-1] + step < longest:
        lengths.append(lengths[-1] + step)
        step = lengths[-2]
    return [*lengths, longest]


def _check_parity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, tolerance: float
) -> float:
    """Return the largest difference between outputs of torch and onnxruntime, without padding.

    It is measured on random single rows and padded batches, from 1 token up to the longest rows
    whose attention scores number at most ``MOST_SCORES``. A difference above ``tolerance`` raises
    ``ParityError``.
    """
    output = output_name(model)
    session = open_session(path)
    worst = 0.0
    heads = arch_of(model.config).num_attention_heads
    longest = min(tokenizer.model_max_length, math.isqrt(MOST_SCORES // heads))
    for length in _parity_lengths(longest):
        for size in (1, 8) if 8 * heads * length**2 <= MOST_SCORES else (1,):
            lengths = [max(1, length - length * place // (2 * size)) for place in range(size)]
            batch = random_batch(model.config, lengths, tokenizer.model_input_names)
            with torch.inference_mode():
                expected = model(**batch)[output]
            (found,) = session.run([output], {name: value.numpy() for name, value in batch.items()})
            difference = (expected - torch.from_numpy(found)).abs()
            if output == "last_hidden_state":
                difference = difference[batch["attention_mask"].bool()]
            largest = difference.max().item()
            if not largest <= tolerance:  # NaN too
                raise ParityError(
                    f"The ONNX graph's {output} differs from torch's by {largest:.3g} at "
                    f"batch size {size} and length {length}, but only {tolerance:g} is allowed, so "
                    "nothing is exported."
                )
            worst = max(worst, largest)
    return worst


def _check_predict(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raise ``ParityError`` if ``predict.py`` tokenises texts differently from transformers."""
    from kdnas.deploy.predict import Predictor

    long = " ".join(["A long text."] * tokenizer.model_max_length)
    texts = ["A text.", long, "another, shorter text"]
    expected = tokenizer(texts, padding=True, truncation=True, return_tensors="np")
    for name, found in Predictor(folder).encode(texts).items():
        if found.shape != expected[name].shape or (found != expected[name]).any():
            raise ParityError(
                f"For some texts, predict.py gives other {name} than the transformers tokenizer, "
                "so nothing is exported."
            )


def _latency(
    model: PreTrainedModel, exact: Path, int8: Path, longest: int, min_seconds: float
) -> list[dict[str, float]]:
    short, long = min(16, longest), min(128, longest)
    rows = []
    for batch, length in dict.fromkeys([(1, short), (1, long), (8, long)]):
        in_torch = LatencySettings(batch_size=batch, length=length, min_seconds=min_seconds)
        in_onnx = replace(in_torch, backend="onnxruntime")
        of_exact, of_int8 = measure_latency([exact, int8], in_onnx)
        (of_model,) = measure_latency([model], in_torch)
        rows.append(
            {
                "batch": batch,
                "length": length,
                "torch_ms": of_model.median_ms,
                "onnx_ms": of_exact.median_ms,
                "int8_ms": of_int8.median_ms,
            }
        )
    return rows
