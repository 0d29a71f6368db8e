"""Metrics of a student on held-out rows, kept as sums over batches and ranks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from torchmetrics import Metric
from torchmetrics.functional import spearman_corrcoef

from kdnas.distillation.losses import ridge_map

# If the last loss exceeds the best by more than this share, there were too many epochs.
TOO_LONG = 0.01
# Ridge strength of the token probe, the same for student and teacher, whose errors are compared.
TOKEN_STRENGTH = 1e-2


class TermErrors(Metric):
    """Metric: mean error and number of errors of each loss term, over all batches and ranks.

    A loss term has one error per token, row or sentence pair.
    """

    full_state_update = False

    def __init__(self, num_terms: int) -> None:
        super().__init__()
        self.sums: Tensor
        self.counts: Tensor
        # float64: a float32 sum stops growing at 16 million tokens.
        self.add_state("sums", torch.zeros(num_terms, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(num_terms, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, sums: Tensor, counts: Tensor) -> None:
        """Add a batch: the sum and number of each loss term's errors, both of shape (terms,)."""
        # Not in place: Trainer.validate leaves inference tensors, which a fit may not change.
        self.sums = self.sums + sums.detach()
        self.counts = self.counts + counts

    def compute(self) -> Tensor:
        """Return each loss term's mean error and the number of values averaged, shape (2, terms).

        The mean is 0 where there was no value to average.
        """
        return torch.stack([self.sums / self.counts.clamp_min(1), self.counts])


class RidgeProbe(Metric):
    """Metric: error of the best linear map from a student's hidden states to its teacher's.

    The map is fitted on every second batch, and its error is measured on the other batches. The
    first batch is used for both, one half for each. X, (n, D + 1), holds the student's states and a
    last column of ones; Y, (n, H), holds the teacher's states. The map is ``W = argmin |X W - Y|^2
    + strength * mean diagonal of X'X * |W|^2``. Its error is ``MSE = (tr Y'Y - 2 tr W'X'Y + tr
    W'X'X W) / (n H)``. So the metric only needs to store X'X, X'Y and tr Y'Y.

    Args:
        num_inputs: D, the student's width.
        num_targets: H, the teacher's width.
        strength: weight of the ridge penalty.
        sync_on_compute: whether ``compute`` adds the sums of all ranks, as in torchmetrics.
    """

    full_state_update = False

    def __init__(
        self,
        num_inputs: int,
        num_targets: int,
        strength: float = 1e-3,
        sync_on_compute: bool = True,
    ) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.strength = strength
        self.xx: Tensor
        self.xy: Tensor
        self.yy: Tensor
        num_columns = num_inputs + 1
        shapes = {
            "xx": (num_columns, num_columns),
            "xy": (num_columns, num_targets),
            "yy": (num_targets,),
        }
        for name, shape in shapes.items():
            zeros = torch.zeros(2, *shape, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")
        self.num_batches = 0

    def update(self, inputs_ND: Tensor, targets_NH: Tensor) -> None:
        """Add a batch: student states (N, D) and teacher states (N, H) of the same tokens."""
        middle = len(inputs_ND) // 2
        halves = [(self.num_batches % 2, slice(None))]
        if self.num_batches == 0:
            halves = [(0, slice(None, middle)), (1, slice(middle, None))]
        self.num_batches += 1
        # Copies: Trainer.validate leaves inference tensors, which a fit may not change.
        self.xx, self.xy, self.yy = self.xx.clone(), self.xy.clone(), self.yy.clone()
        # A fit may be in bfloat16; these sums are not.
        with torch.autocast(inputs_ND.device.type, enabled=False):
            for half, rows in halves:
                inputs, targets = inputs_ND[rows].float(), targets_NH[rows].float()
                inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], -1)
                self.xx[half] += inputs.T @ inputs
                self.xy[half] += inputs.T @ targets
                self.yy[half] += targets.square().sum(0)

    def reset(self) -> None:
        """Discard the batches added so far."""
        super().reset()
        self.num_batches = 0

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return the mean squared error of the fitted map and the variance of the targets.

        Both are measured on the batches that the map was not fitted on.
        """
        gram = self.xx[0].clone()
        count = self.xx[1, -1, -1].clamp_min(1)
        ridge = self.strength * gram.diagonal()[:-1].mean().clamp_min(1e-9)
        gram.diagonal()[:-1] += ridge
        gram[-1, -1] += 1e-9
        weight = torch.linalg.solve(gram, self.xy[0])
        explained = 2 * (weight * self.xy[1]).sum(0)
        error = self.yy[1] - explained + (weight * (self.xx[1] @ weight)).sum(0)
        variance = self.yy[1] / count - (self.xy[1, -1] / count).square()
        return error.mean() / count, variance.mean()


def sentence_agreement(student_NS: Tensor, teacher_NH: Tensor) -> dict[str, float]:
    """Measure how well a student's sentence vectors agree with its teacher's, without a task.

    Args:
        student_NS: the student's vectors, (N, S), of at least two rows that it was not trained on.
        teacher_NH: the teacher's vectors of the same rows, (N, H).

    Returns:
        A dictionary of two numbers. ``vector_cosine`` is the mean cosine between the teacher's
        vectors and linearly mapped student vectors. The map is fitted on one half of the rows, and
        the cosine is measured on the other half. ``similarity_order`` tells whether both models
        rank pairs of rows alike. It is the Spearman correlation, over all pairs, between the cosine
        of the student's two vectors and the cosine of the teacher's.
    """
    middle = len(student_NS) // 2
    weights = ridge_map(student_NS[:middle], teacher_NH[:middle], strength=1e-2).float()
    mapped = student_NS[middle:] @ weights[:-1] + weights[-1]
    pairs = torch.triu_indices(len(student_NS), len(student_NS), 1)
    similarities = [
        (unit @ unit.T)[pairs[0], pairs[1]] for unit in map(normalize, (student_NS, teacher_NH))
    ]
    return {
        "vector_cosine": float(cosine_similarity(mapped, teacher_NH[middle:]).mean()),
        "similarity_order": float(spearman_corrcoef(*similarities)),
    }


def too_long(history: Sequence[dict[str, Any]]) -> str:
    """Return a warning text if the last held-out loss is over 1 % above the lowest, else ``""``.

    Args:
        history: one dictionary per epoch, in order, with ``epoch`` (from 0) and the held-out
            ``loss``.
    """
    best = min(history, key=lambda row: row["loss"])
    if best["loss"] > (1 - TOO_LONG) * history[-1]["loss"]:
        return ""
    was = f"{best['loss']:.3f} after epoch {best['epoch'] + 1}"
    return f" (the loss was {was}: give fewer epochs, or more text)"
