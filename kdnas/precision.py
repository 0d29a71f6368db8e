"""What a machine multiplies faster, bfloat16 or float32: measured, for the name of a processor does not tell."""

import time
from collections.abc import Callable
from functools import cache

import torch
from torch.nn import functional as F


@cache
def bf16_is_faster(device_type: str) -> bool:
    """Whether a linear layer takes less time in bfloat16 than in float32, measured once a process, in turn.

    On CPUs both happen: AMD's Zen 4 is faster in bfloat16, and so is a Xeon with AMX; one whose AMX is hidden from its
    virtual machine is half as fast (LOG.md). On other devices it is taken for granted.
    """
    return device_type != "cpu" or _seconds(torch.bfloat16) < _seconds(torch.float32)


def _seconds(dtype: torch.dtype, num_rounds: int = 7) -> float:
    """The least of several rounds: what other work on the machine adds is no property of it."""
    with torch.random.fork_rng():
        x, weight = (torch.randn(rows, 384).to(dtype) for rows in (512, 1536))
    return min(_time(lambda: F.linear(x, weight)) for _ in range(num_rounds))


def _time(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def autocast(device_type: str) -> torch.autocast:
    """Matmuls in bfloat16 where that is faster; elsewhere nothing is changed."""
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=bf16_is_faster(device_type))


def autocast_dtype(device_type: str) -> torch.dtype:
    """In what matmuls are computed under ``autocast``."""
    return torch.bfloat16 if bf16_is_faster(device_type) else torch.float32


def trainer_precision(accelerator: str) -> str:
    """Lightning's precision that is fastest where a Trainer with this accelerator will run."""
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    return "bf16-mixed" if bf16_is_faster("cpu" if on_cpu else "other") else "32-true"


def gpu_name() -> str | None:
    """Of the GPU that is used where none is chosen; None: there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
