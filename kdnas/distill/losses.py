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
    inputs, targets = inputs_ND.double(), targets_NH.double()
    mean_input, mean_target = inputs.mean(0), targets.mean(0)
    centred = inputs - mean_input
    gram = centred.T @ centred
    gram.diagonal().add_(strength * gram.diagonal().mean().clamp_min(1e-12))
    weight = torch.linalg.solve(gram, centred.T @ (targets - mean_target))
    return torch.cat([weight, (mean_target - mean_input @ weight)[None]])
