"""The precision of matrix products: bfloat16 or float32, whichever this machine computes faster."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F

from kdnas.system.errors import UserError

log = logging.getLogger(__name__)

VARIABLE = "KDNAS_CPU_MATMULS"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def bf16_is_faster(device_type: str) -> bool:
    """Whether a linear layer takes less time in bfloat16 than in float32.

    On CPUs either can be faster. AMD's Zen 4 and Xeons with AMX are faster in bfloat16; a Xeon
    whose virtual machine hides AMX is half as fast in bfloat16 as in float32 (LOG.md). On other
    devices bfloat16 is taken to be faster, without measuring.

    For a CPU, the faster precision is measured once and stored in the environment variable
    ``KDNAS_CPU_MATMULS`` (``bfloat16`` or ``float32``). So all processes of a command use the same
    precision; otherwise they would compute different hidden states. A user can also set the
    variable.

    Args:
        device_type: type of the device, such as ``cpu`` or ``cuda``.

    Raises:
        UserError: ``KDNAS_CPU_MATMULS`` has another value.
    """
    if device_type != "cpu":
        return True
    if VARIABLE not in os.environ:
        seconds = _seconds()
        os.environ[VARIABLE] = min(DTYPES, key=lambda name: seconds[DTYPES[name]])
    if (given := os.environ[VARIABLE]) not in DTYPES:
        raise UserError(
            f"The environment variable {VARIABLE} is {given!r}: "
            "give bfloat16 or float32, or unset it."
        )
    return given == "bfloat16"


def keep(begun_in: str | None) -> str:
    """Set the precision of CPU matrix products to that in which interrupted work was begun.

    Args:
        begun_in: that precision, ``bfloat16`` or ``float32``, which is used even if slower here;
            None: the work begins now, in the precision that ``bf16_is_faster`` chooses.

    Returns:
        The precision of matrix products on a CPU from now on: ``bfloat16`` or ``float32``.
    """
    if begun_in is not None:
        given = os.environ.get(VARIABLE, begun_in)
        if given != begun_in:
            said = "This was begun with matmuls in %s, and continues with them, not in %s."
            log.warning(said, begun_in, given)
        os.environ[VARIABLE] = begun_in
    return "bfloat16" if bf16_is_faster("cpu") else "float32"


@contextmanager
def own_precision() -> Iterator[None]:
    """Context manager that restores, at its end, the CPU precision that ``keep`` may have set."""
    known = os.environ.get(VARIABLE)
    try:
        yield
    finally:
        if known is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = known


def _seconds(num_rounds: int = 7) -> dict[torch.dtype, float]:
    """Measure a linear layer on the CPU; return a dictionary from each dtype to its seconds.

    The least of ``num_rounds`` measurements is returned, so that other work on the machine hardly
    matters.
    """
    with torch.random.fork_rng(devices=[]):
        given = {
            dtype: [torch.randn(rows, 384).to(dtype) for rows in (512, 1536)]
            for dtype in DTYPES.values()
        }
    rounds = [{dtype: _time(*pair) for dtype, pair in given.items()} for _ in range(num_rounds)]
    return {dtype: min(seconds[dtype] for seconds in rounds) for dtype in given}


def _time(x: torch.Tensor, weight: torch.Tensor) -> float:
    begin = time.perf_counter()
    F.linear(x, weight)
    return time.perf_counter() - begin


def autocast(device_type: str, precision: str = "auto") -> torch.autocast:
    """Return a context for matrix products in bfloat16 if that is faster, or else without autocast.

    Args:
        device_type: type of the device, such as ``cpu`` or ``cuda``.
        precision: the Trainer's ``precision``. On a GPU, ``32-true`` and ``64-true`` mean without
            autocast; a CPU ignores it.
    """
    is_enabled = autocast_dtype(device_type, precision) == torch.bfloat16
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=is_enabled)


def autocast_dtype(device_type: str, precision: str = "auto") -> torch.dtype:
    """Return the dtype of matrix products under ``autocast``: bfloat16 if faster, or float32.

    ``bf16_is_faster`` says which is faster. On a GPU, the dtype is always float32 for the
    precisions ``32-true`` and ``64-true``.

    Args:
        device_type: type of the device, such as ``cpu`` or ``cuda``.
        precision: the Trainer's ``precision``; a CPU ignores it.
    """
    is_refused = device_type != "cpu" and precision in ("32-true", "64-true")
    return torch.bfloat16 if bf16_is_faster(device_type) and not is_refused else torch.float32


def trainer_precision(accelerator: str) -> str:
    """Return the faster ``precision`` for a Trainer: ``bf16-mixed`` or ``32-true``.

    ``accelerator`` is that of the Trainer, such as ``cpu`` or ``auto``.
    """
    if accelerator == "auto" and not torch.accelerator.is_available():
        accelerator = "cpu"
    return "bf16-mixed" if bf16_is_faster(accelerator) else "32-true"


def gpu_name() -> str | None:
    """Return the name of the current CUDA device, or None if there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
