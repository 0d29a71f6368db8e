"""ONNX graphs: write them in float32 and int8, make inputs for them, and run them."""

import errno
import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import disk_usage
from typing import Any

import torch
from torch.export import Dim
from transformers import PreTrainedConfig, PreTrainedModel

from kdnas.models.checkpoint_files import read_config
from kdnas.models.families import marks_pairs, max_length
from kdnas.system.errors import UserError, first_line

OPSET = 20
ONNX, INT8 = "model.onnx", "model.int8.onnx"  # names of the files in a deployed folder
INPUTS = ("input_ids", "attention_mask")
Feed = dict[str, Any]  # a batch: numpy arrays by the names of the graph's inputs


def check_onnx() -> None:
    """Raise ``UserError`` if a package for ONNX (``pip install '.[onnx]'``) is not installed."""
    for name in ("onnx", "onnxruntime", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"ONNX needs the package {name!r}, which is not installed: pip install '.[onnx]'."
            )


def output_name(model: PreTrainedModel) -> str:
    """Return a model's output name in ONNX: ``logits`` (classifier) or ``last_hidden_state``."""
    return "logits" if "ForSequenceClassification" in type(model).__name__ else "last_hidden_state"


def random_batch(
    config: PreTrainedConfig, lengths: Sequence[int], names: Sequence[str] = INPUTS, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Make a padded batch of random token ids, the same at each call.

    Args:
        config: config of the model.
        lengths: number of real tokens of each row.
        names: names of the inputs to make, any of ``input_ids``, ``attention_mask`` and
            ``token_type_ids``. Token types are 1 in the right half of the batch if the model uses
            them, and else 0 everywhere.
        seed: seed of the ids.

    Returns:
        The inputs by name, each of shape (rows, largest length).
    """
    pad_id = config.pad_token_id or 0
    shape = (len(lengths), max(lengths))
    ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    ids[ids == pad_id] = (pad_id + 1) % config.vocab_size
    places = torch.arange(shape[1])
    mask = (places < torch.tensor(lengths)[:, None]).long()
    values = {
        "input_ids": ids.where(mask.bool(), pad_id),
        "attention_mask": mask,
        "token_type_ids": mask * (places >= shape[1] // 2) * marks_pairs(config),
    }
    return {name: values[name] for name in names}


def write_onnx(model: PreTrainedModel, path: Path, input_names: Sequence[str] = INPUTS) -> None:
    """Write a model as an ONNX graph that takes any batch size and length.

    Attention is exported in its eager form: fused attention would add twelve nodes per layer and
    make onnxruntime 10 % slower. An Add before a layer norm becomes a Sum: otherwise onnxruntime
    would fuse both into SkipLayerNormalization, which takes three times as long.

    Args:
        model: a model in eval mode on the CPU; it is not changed.
        path: the file to write.
        input_names: names of the graph's inputs, such as ``input_ids``.
    """
    axes = {0: Dim("batch"), 1: Dim("length", min=2, max=max_length(model.config))}
    batch = random_batch(model.config, [8, 5], input_names)
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with _quiet("torch.onnx"), _quiet("onnxscript"):
            program = torch.onnx.export(
                model,
                kwargs=batch,
                input_names=list(batch),
                output_names=[output_name(model)],
                dynamic_shapes=dict.fromkeys(batch, axes),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        for node in program.model.graph:
            node.metadata_props.clear()  # paths on this machine; larger than a small student
            if node.op_type == "LayerNormalization" and node.inputs[0]:
                before = node.inputs[0].producer()
                if before is not None and before.op_type == "Add":
                    before.op_type = "Sum"
        program.save(path, external_data=False)
    finally:
        model.set_attn_implementation(attention)


def write_int8(source: Path, target: Path, calibration: Iterable[Feed] | None = None) -> None:
    """Write an int8 copy of an ONNX graph: int8 matrices and embeddings, with a scale per column.

    Args:
        source: the float32 graph.
        target: the file to write.
        calibration: batches from which fixed scales of activations are computed (static
            quantisation). None: the graph computes these scales for each batch (dynamic
            quantisation).
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    options: dict[str, Any] = {
        "op_types_to_quantize": ["MatMul", "Gather"],
        "per_channel": True,
        "weight_type": QuantType.QInt8,
        # 7 bits: the sums of 8-bit products overflow on CPUs that have AVX2 but not VNNI.
        "reduce_range": True,
    }
    # The quantiser logs to the root logger, and recommends preprocessing that changes nothing here.
    with _told_if_full(source, target), _quiet("root"):
        if calibration is None:
            quantize_dynamic(source, target, **options)
            return
        feeds = iter(calibration)

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def get_next(self) -> Feed | None:
                return next(feeds, None)

        quantize_static(
            source,
            target,
            Reader(),
            activation_type=QuantType.QUInt8,
            # Products of two activations, those of attention, stay in float32.
            extra_options={"MatMulConstBOnly": True},
            **options,
        )


def write_deployed(model: PreTrainedModel, folder: Path, int8: bool) -> Path:
    """Write a model's config and its ONNX graph, in float32 or int8; return the graph's path."""
    model.config.save_pretrained(folder)
    marks = ["token_type_ids"] if marks_pairs(model.config) else []
    write_onnx(model, folder / ONNX, [*INPUTS, *marks])
    if not int8:
        return folder / ONNX
    write_int8(folder / ONNX, folder / INT8)
    return folder / INT8


def open_session(path: Path, num_threads: int = 0) -> Any:
    """Open an ONNX graph in onnxruntime on the CPU; ``num_threads`` 0: one thread per core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def config_beside(path: Path) -> PreTrainedConfig:
    """Read the ``config.json`` in the folder of the ONNX graph ``path``."""
    return read_config(path.parent / "config.json")


@contextmanager
def _told_if_full(source: Path, target: Path) -> Iterator[None]:
    """Context manager that raises an OSError if any other error is due to a full disk."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        for place in (source.parent, target.parent, Path(tempfile.gettempdir())):
            if disk_usage(place).free < source.stat().st_size:
                words = f"{os.strerror(errno.ENOSPC)} ({first_line(error)})"
                raise OSError(errno.ENOSPC, words, str(place / target.name)) from error
        raise


@contextmanager
def _quiet(logger_name: str) -> Iterator[None]:
    """Context manager that silences all warnings, and a logger's records below the level ERROR."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
