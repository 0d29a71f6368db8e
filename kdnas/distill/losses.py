"""Pure functions. Shapes: N real tokens (padding is gone before), H the teacher's width."""

import torch
from torch import Tensor


def squared_error(predicted_NH: Tensor, target_NH: Tensor) -> Tensor:
    """Sum over tokens of the mean over dimensions of the squared error, in float32.

    Divided by N it is the mean squared error; kept as a sum it adds up over batches of different sizes.

    Args:
        predicted_NH: shape (N, H).
        target_NH: shape (N, H).

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ (they would broadcast silently).
    """
    if predicted_NH.shape != target_NH.shape:
        raise ValueError(f"The shapes {tuple(predicted_NH.shape)} and {tuple(target_NH.shape)} differ.")
    return (predicted_NH.float() - target_NH.float()).square().mean(-1).sum()


def attention_divergence(
    query_BATD: Tensor, key_BATD: Tensor, teacher_query_BATE: Tensor, teacher_key_BATE: Tensor, mask_BT: Tensor
) -> Tensor:
    """Sum over real tokens of the mean over heads of KL(teacher's attention || student's), in float32.

    A token's attention is ``softmax over real tokens m of q(n) k(m)^T / sqrt(D)``.

    Args:
        query_BATD: the student's, shape (B, A, T, D).
        key_BATD: the same.
        teacher_query_BATE: the teacher's, shape (B, A, T, E).
        teacher_key_BATE: the same.
        mask_BT: True on real tokens.

    Returns:
        A scalar, at least 0.

    Raises:
        ValueError: rows, heads or tokens differ (they would broadcast silently).
    """
    if query_BATD.shape[:3] != teacher_query_BATE.shape[:3]:
        raise ValueError(f"The shapes {tuple(query_BATD.shape)} and {tuple(teacher_query_BATE.shape)} differ.")

    def log_map(query: Tensor, key: Tensor) -> Tensor:
        scores = (query @ key.transpose(-1, -2)).float() / query.shape[-1] ** 0.5
        # Not -inf: its product with a probability of 0 is no number.
        return scores.masked_fill(~mask_BT[:, None, None, :], -1e4).log_softmax(-1)

    with torch.no_grad():
        target = log_map(teacher_query_BATE, teacher_key_BATE)
        weights = target.exp() * mask_BT[:, None, :, None] / query_BATD.shape[1]
        negative_entropy = (weights * target).sum()
    return negative_entropy - (weights * log_map(query_BATD, key_BATD)).sum()


def contextual_share(mse: float, mse_context_free: float) -> float:
    """How much of what context adds the student knows: ``1 - MSE / MSE_context_free``.

    0: no more than a look-up table of words. 1: equal to the teacher. Negative: less than the table.

    Args:
        mse: of the student, on one layer of the teacher.
        mse_context_free: of the best linear map from the teacher's own embedding output to that layer.
    """
    return 1.0 - mse / mse_context_free if mse_context_free > 0 else 0.0


def ridge_map(inputs_ND: Tensor, targets_NH: Tensor, strength: float = 1e-4) -> Tensor:
    """The linear map with a constant that predicts targets from inputs best.

    ``argmin_W |[X 1] W - Y|^2 + strength * N * tr(cov X) / D * |W|^2``; the constant is not shrunk.

    Args:
        inputs_ND: shape (N, D).
        targets_NH: shape (N, H).
        strength: weight of the shrinkage, relative to the mean variance of the inputs.

    Returns:
        W, shape (D + 1, H), in float64; the last row is the constant.
    """
    # Products of centred float32 numbers are exact enough for a shrunk solution, and ten times faster than float64's.
    inputs, targets = inputs_ND.float(), targets_NH.float()
    mean_input, mean_target = inputs.mean(0), targets.mean(0)
    centred = inputs - mean_input
    gram = (centred.T @ centred).double()
    gram.diagonal().add_(strength * gram.diagonal().mean().clamp_min(1e-12))
    weight = torch.linalg.solve(gram, (centred.T @ (targets - mean_target)).double())
    return torch.cat([weight, (mean_target.double() - mean_input.double() @ weight)[None]])
