"""Dropout on a CPU by random bytes, eight of which are drawn at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

_torch_dropout = F.dropout


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.dropout``, whose p is rounded to a 256th on a CPU.

    torch draws each number alone there, with which fine-tuning spent a tenth of its time (LOG.md).

    Args:
        input: of any shape.
        p: the probability of 0; the other values are scaled so that the mean stays.
        training: else the input is given back.
        inplace: change the input.
    """
    num_dropped = round(256 * p)
    if not training or inplace or input.device.type != "cpu" or num_dropped in (0, 256):
        return _torch_dropout(input, p, training, inplace)
    drawn = torch.empty(-(-input.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    is_kept = drawn.view(torch.uint8)[: input.numel()].view(input.shape) >= num_dropped
    return (input * is_kept).mul_(256 / (256 - num_dropped))


@contextmanager
def fast_dropout() -> Iterator[None]:
    """Have all models take ``dropout``: some call torch's function, others its module."""
    with patch.object(F, "dropout", dropout):
        yield
