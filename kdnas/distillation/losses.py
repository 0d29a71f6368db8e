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
    """Return the states unchanged if float16 can hold them.

    Stored in float16, larger numbers would silently become infinite.

    Raises:
        UserError: a number is NaN, or beyond the range of float16.
    """
    most, largest = torch.finfo(torch.float16).max, max(abs(float(x)) for x in states.aminmax())
    if math.isnan(largest):
        raise UserError("The teacher's hidden states are not numbers (NaN): take another teacher.")
    if largest > most:
        raise UserError(
            f"The teacher's hidden states reach {largest:,.0f}; float16, in which they are kept, "
            f"ends at {most:,.0f}: take another teacher."
        )
    return states


def squared_error(predicted_NH: Tensor, target_NH: Tensor) -> Tensor:
    """Return the squared error: mean over dimensions, sum over tokens; a float32 scalar.

    Divided by N, the sum is the mean squared error. Sums can be added over batches of different
    sizes.

    Raises:
        ValueError: the shapes differ.
    """
    _refuse_other_shapes(predicted_NH, target_NH)
    return (predicted_NH.float() - target_NH.float()).square().mean(-1).sum()


def _refuse_other_shapes(one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape:  # different shapes would broadcast silently
        raise ValueError(f"The shapes {tuple(one.shape)} and {tuple(other.shape)} differ.")


def attention_map(query_BATD: Tensor, key_BATD: Tensor, mask_BT: Tensor) -> Tensor:
    """Return each token n's attention to tokens m, (B, A, T, T); 0 where m is padding.

    It is ``softmax_m(q(n) k(m)^T / sqrt(D))``.
    """
    return masked_softmax(dot_scores(query_BATD, key_BATD), mask_BT)


def masked_softmax(scores_BATT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return ``softmax_m(scores(n, m))`` over real tokens m, (B, A, T, T); 0 where m is padding."""
    return (scores_BATT + additive_mask(mask_BT, scores_BATT.dtype)).softmax(-1)


def attention_divergence(map_BATT: Tensor, teacher_map_BATT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return KL(teacher's attention || student's), mean over heads, sum over real tokens.

    ``sum_n mean_a sum_m P_a(n, m) log (P_a(n, m) / S_a(n, m))`` for real tokens n and m, the
    teacher's map P_a and the student's map S_a of head a.

    Args:
        map_BATT: attention maps of the student, shape (B, A, T, T), 0 where m is padding.
        teacher_map_BATT: attention maps of the teacher, the same shape.
        mask_BT: True on real tokens.

    Returns:
        A float32 scalar. In training, the divergence is computed in the precision of the maps (the
        error in bfloat16 is about 4e-4 a token); without a gradient, as on held-out rows, in
        float32.

    Raises:
        ValueError: the shapes differ.
    """
    _refuse_other_shapes(map_BATT, teacher_map_BATT)
    if not map_BATT.requires_grad:
        map_BATT, teacher_map_BATT = map_BATT.float(), teacher_map_BATT.float()
    divergence: Any = _Divergence.apply
    return divergence(map_BATT, teacher_map_BATT.detach(), mask_BT) / map_BATT.shape[1]


class _Divergence(torch.autograd.Function):
    """KL divergence in few passes over large maps, in the maps' precision; 4 x autograd's speed."""

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
    """Return the share of a teacher layer's dependence on context that the student has learned.

    ``1 - (mse - mse_teacher) / (mse_context_free - mse_teacher)``. 0: the student predicts the
    states no better than a look-up table of words does. 1: as well as the teacher. Negative: worse
    than the table.

    Args:
        mse: mean squared error of predicting the layer's states from the student's, linearly.
        mse_context_free: error of the best linear map from the teacher's embedding output.
        mse_teacher: error of the map from the layer's states to themselves; above 0 if that map is
            regularised.
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
    """Return the linear map, with a constant, that best predicts targets from inputs.

    ``argmin_W |[X 1] W - Y|^2 + strength * N * tr(cov X) / D * |W - P|^2`` for inputs X and targets
    Y. The constant, the last row of W, is not shrunk.

    Args:
        inputs_ND: X, shape (N, D).
        targets_NH: Y, shape (N, H).
        strength: weight of the shrinkage, relative to the mean variance of the inputs.
        prior_DH: P, what the map is shrunk to, shape (D, H); None: 0.
        has_constant: whether the map has a constant; if not, the last row of W is 0, and the
            variance of X is taken around 0.

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
