"""Whether a machine multiplies faster in bfloat16 or float32: measured once."""

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

    On CPUs both happen: AMD's Zen 4 is faster in bfloat16, and so is a Xeon with AMX; a Xeon whose
    AMX is hidden from its virtual machine is half as fast (LOG.md). Other devices are always taken
    to be faster.

    The answer is measured once and kept in the environment, so that ranks and workers agree: states
    computed in another precision are other states. It can also be given there.

    Raises:
        UserError: the environment has another value.
    """
    if device_type != "cpu":
        return True
    if VARIABLE not in os.environ:
        seconds = _seconds()
        os.environ[VARIABLE] = min(DTYPES, key=lambda name: seconds[DTYPES[name]])
    if (given := os.environ[VARIABLE]) not in DTYPES:
        raise UserError(f"{VARIABLE} is {given!r}: give bfloat16 or float32, or leave it out.")
    return given == "bfloat16"


def keep(begun_in: str | None) -> str:
    """Continue in the precision in which the work was begun, even if the other is faster here.

    Args:
        begun_in: ``bfloat16`` or ``float32``; None: nothing is begun yet.

    Returns:
        The precision of matmuls on a CPU from now on.
    """
    if begun_in is not None:
        given = os.environ.get(VARIABLE, begun_in)
        if given != begun_in:
            said = "This was begun with matmuls in %s, not in %s, and goes on so."
            log.warning(said, begun_in, given)
        os.environ[VARIABLE] = begun_in
    return "bfloat16" if bf16_is_faster("cpu") else "float32"


@contextmanager
def own_precision() -> Iterator[None]:
    """Undo ``keep`` at the end, for what the same process does later."""
    known = os.environ.get(VARIABLE)
    try:
        yield
    finally:
        if known is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = known


def _seconds(num_rounds: int = 7) -> dict[torch.dtype, float]:
    """The least time of several rounds, so that other work on the machine does not count."""
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
    """Matmuls in bfloat16 where that is faster, and not refused by a Trainer's precision."""
    is_enabled = autocast_dtype(device_type, precision) == torch.bfloat16
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=is_enabled)


def autocast_dtype(device_type: str, precision: str = "auto") -> torch.dtype:
    """The precision of matmuls under ``autocast``.

    On a CPU it is what was measured, or given in the environment, whatever the Trainer's.
    """
    is_refused = device_type != "cpu" and precision in ("32-true", "64-true")
    return torch.bfloat16 if bf16_is_faster(device_type) and not is_refused else torch.float32


def trainer_precision(accelerator: str) -> str:
    """Lightning's precision that is fastest where a Trainer with this accelerator will run."""
    if accelerator == "auto" and not torch.accelerator.is_available():
        accelerator = "cpu"
    return "bf16-mixed" if bf16_is_faster(accelerator) else "32-true"


def gpu_name() -> str | None:
    """The name of the default GPU; None: there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
