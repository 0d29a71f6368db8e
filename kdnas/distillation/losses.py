"""Losses and linear maps, as pure functions.

Shapes: B rows, T padded tokens, N real tokens, H the teacher's width, A heads, D dimensions of a
head.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kdnas.models.encoders import additive_mask
from kdnas.models.families import dot_scores
from kdnas.system.errors import UserError


def within_half(states: Tensor) -> Tensor:
    """Return hidden states unchanged, after a check that float16 can store them.

    Without the check, numbers beyond float16's range would silently become infinite.

    Raises:
        UserError: a number is NaN, or beyond the range of float16.
    """
    most, largest = torch.finfo(torch.float16).max, max(abs(float(x)) for x in states.aminmax())
    if math.isnan(largest):
        raise UserError("The teacher's hidden states contain NaN: use another teacher.")
    if largest > most:
        raise UserError(
            f"The teacher's hidden states reach {largest:,.0f}. They are stored in float16, whose "
            f"largest number is {most:,.0f}: use another teacher."
        )
    return states


def squared_error(predicted_NH: Tensor, target_NH: Tensor) -> Tensor:
    """Return the sum over N vectors of each vector's mean squared error, a float32 scalar.

    Divided by N, it is the mean squared error of all numbers. The sums of several batches can be
    added, even if the batches differ in size.

    Raises:
        ValueError: the shapes differ.
    """
    _refuse_other_shapes(predicted_NH, target_NH)
    return (predicted_NH.float() - target_NH.float()).square().mean(-1).sum()


def _refuse_other_shapes(one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape:  # different shapes would broadcast silently
        raise ValueError(
            f"Two tensors must have the same shape, but have {tuple(one.shape)} and "
            f"{tuple(other.shape)}."
        )


def attention_map(query_BATD: Tensor, key_BATD: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the attention map ``softmax_m(q(n) k(m)^T / sqrt(D))``, of shape (B, A, T, T).

    Entry (n, m) is token n's attention to token m; it is 0 if token m is padding.
    """
    return masked_softmax(dot_scores(query_BATD, key_BATD), mask_BT)


def masked_softmax(scores_BATT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the softmax of attention scores over the real tokens m, (B, A, T, T).

    Entry (n, m) is 0 if token m is padding.
    """
    return (scores_BATT + additive_mask(mask_BT, scores_BATT.dtype)).softmax(-1)


def attention_divergence(map_BATT: Tensor, teacher_map_BATT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the KL divergence of student from teacher attention maps, summed over tokens.

    ``sum_n mean_a sum_m P_a(n, m) log (P_a(n, m) / S_a(n, m))`` over real tokens n and m. P_a is
    the teacher's map of head a, S_a the student's.

    Args:
        map_BATT: attention maps of the student, shape (B, A, T, T), 0 where m is padding.
        teacher_map_BATT: attention maps of the teacher, the same shape.
        mask_BT: True on real tokens.

    Returns:
        A float32 scalar. With gradients, it is computed in the precision of the maps (in bfloat16
        the error is about 4e-4 per token); without gradients, in float32.

    Raises:
        ValueError: the shapes differ.
    """
    _refuse_other_shapes(map_BATT, teacher_map_BATT)
    if not map_BATT.requires_grad:
        map_BATT, teacher_map_BATT = map_BATT.float(), teacher_map_BATT.float()
    divergence: Any = _Divergence.apply
    return divergence(map_BATT, teacher_map_BATT.detach(), mask_BT) / map_BATT.shape[1]


class _Divergence(torch.autograd.Function):
    """KL divergence of attention maps, with a backward pass 4 times as fast as autograd's.

    It makes fewer passes over the large maps, in the maps' precision.
    """

    LEAST = 1e-30  # in place of 0, which has no logarithm

    @staticmethod
    def forward(ctx: Any, ours: Tensor, theirs: Tensor, mask_BT: Tensor) -> Tensor:
        ours = ours.clamp_min(_Divergence.LEAST)
        weights = theirs * mask_BT[:, None, :, None].to(theirs.dtype)
        ctx.save_for_backward(ours, weights)
        # Not the difference of two logarithms, which bfloat16 would round more coarsely.
        ratio = theirs.clamp_min(_Divergence.LEAST) / ours
        return ratio.log_().mul_(weights).sum(-1).float().sum()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
        ours, weights = ctx.saved_tensors
        return (weights / ours).mul_(-grad[0]), None, None


def contextual_share(mse: float, mse_context_free: float, mse_teacher: float = 0.0) -> float:
    """Return how much of a teacher layer's context dependence the student has learned, 0 to 1.

    ``1 - (mse - mse_teacher) / (mse_context_free - mse_teacher)``. 0: the student predicts the
    layer's hidden states only as well as token embeddings do, which know no context. 1: as well as
    the teacher itself. Below 0: worse than token embeddings.

    Args:
        mse: mean squared error of the best linear map from the student's hidden states to the
            layer's.
        mse_context_free: the same error for a map from the teacher's embedding output.
        mse_teacher: the same error for a map from the layer's hidden states to themselves; above 0
            if that map is regularised.
    """
    span = mse_context_free - mse_teacher
    return 1.0 - (mse - mse_teacher) / span if span > 0 else 0.0


def ridge_map(
    inputs_ND: Tensor,
    targets_NH: Tensor,
    strength: float = 1e-4,
    prior_DH: Tensor | None = None,
    has_constant: bool = True,
) -> Tensor:
    """Return the ridge regression, with a constant, of targets on inputs.

    ``argmin_W |[X 1] W - Y|^2 + strength * N * tr(cov X) / D * |W - P|^2`` for inputs X, targets Y
    and a prior P. The last row of W is the constant, which is not regularised.

    Args:
        inputs_ND: X, shape (N, D).
        targets_NH: Y, shape (N, H).
        strength: weight of the penalty, relative to the mean variance of the inputs.
        prior_DH: P, shape (D, H): the map that the penalty pulls W towards; None: 0.
        has_constant: whether to fit a constant. If not, the last row of W is 0, and the second
            moment of X replaces cov X.

    Returns:
        W, shape (D + 1, H), in float64.
    """
    # Products of centred float32 numbers are exact enough, and ten times faster than those of
    # float64.
    inputs, targets = inputs_ND.float(), targets_NH.float()
    mean_input, mean_target = (
        x.mean(0) if has_constant else x.new_zeros(x.shape[1]) for x in (inputs, targets)
    )
    centred = inputs - mean_input
    gram = (centred.T @ centred).double()
    products = (centred.T @ (targets - mean_target)).double()
    shrinkage = strength * gram.diagonal().mean().clamp_min(1e-12)
    gram.diagonal().add_(shrinkage)
    if prior_DH is not None:
        products += shrinkage * prior_DH
    weight = torch.linalg.solve(gram, products)
    return torch.cat([weight, (mean_target.double() - mean_input.double() @ weight)[None]])
