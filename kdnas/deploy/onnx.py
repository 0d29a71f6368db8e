"""The graph that users deploy: fed with a batch, written as ONNX, in int8, and run."""

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
Feed = dict[str, Any]  # numpy arrays by the graph's input names


def check_onnx() -> None:
    """Refuse where a package of the extra ``onnx`` is not installed."""
    for name in ("onnx", "onnxruntime", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"The package {name!r} is not installed, and ONNX needs it: pip install '.[onnx]'."
            )


def output_name(model: PreTrainedModel) -> str:
    """What the graph gives: ``logits`` of a classifier, ``last_hidden_state`` of an encoder."""
    return "logits" if "ForSequenceClassification" in type(model).__name__ else "last_hidden_state"


def random_batch(
    config: PreTrainedConfig, lengths: Sequence[int], names: Sequence[str] = INPUTS, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Rows of random ids, (rows, longest), padded and the same at each call.

    ``lengths`` are the real tokens of each row, ``names`` the inputs that are wanted. Where the
    family has token types, they mark the second half of a row.
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
    """Write the graph of a model in eval mode on the CPU, for every batch size and length.

    Attention is written in its plain form: the fused kernel has twelve more nodes a layer, which
    take onnxruntime 10 % longer. An addition before a norm is written as a Sum: onnxruntime fuses
    an Add and the norm into SkipLayerNormalization, which takes three times as long as both.
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
            node.metadata_props.clear()  # paths of this machine, larger than a small student
            if node.op_type == "LayerNormalization" and node.inputs[0]:
                before = node.inputs[0].producer()
                if before is not None and before.op_type == "Add":
                    before.op_type = "Sum"
        program.save(path, external_data=False)
    finally:
        model.set_attn_implementation(attention)


def write_int8(source: Path, target: Path, calibration: Iterable[Feed] | None = None) -> None:
    """Write a graph with matrices and embedding tables in 8 bits, one scale a matrix column.

    Batches of ``calibration`` give the scales of activations (static). Without any, each batch
    gives its own (dynamic).
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
    }
    # The quantiser logs to the root logger, and recommends a preparation that changes nothing.
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
            extra_options={"MatMulConstBOnly": True},  # attention's own products stay as they are
            **options,
        )


def write_deployed(model: PreTrainedModel, folder: Path, int8: bool) -> Path:
    """Write the graph beside its config, and return the file to measure."""
    model.config.save_pretrained(folder)
    marks = ["token_type_ids"] if marks_pairs(model.config) else []
    write_onnx(model, folder / ONNX, [*INPUTS, *marks])
    if not int8:
        return folder / ONNX
    write_int8(folder / ONNX, folder / INT8)
    return folder / INT8


def open_session(path: Path, num_threads: int = 0) -> Any:
    """An onnxruntime session of a file on the CPU; 0 threads: as many as cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def config_beside(path: Path) -> PreTrainedConfig:
    """The config in the folder of a graph."""
    return read_config(path.parent / "config.json")


@contextmanager
def _told_if_full(source: Path, target: Path) -> Iterator[None]:
    """Where native code fails on a graph that a full disk has cut, raise the disk's error."""
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
    """Silence what exporter and quantiser say about their own internals."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
