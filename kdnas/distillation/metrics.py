"""Metrics of a student on held-out rows, as sums that add up over batches and ranks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from torchmetrics import Metric
from torchmetrics.functional import spearman_corrcoef

from kdnas.distillation.losses import ridge_map

# Too little text for so many epochs: the loss ends higher than its best by more than this share.
TOO_LONG = 0.01
# Shrinkage of the tokens' probe. The student's errors and the teacher's are compared, so both use
# it.
TOKEN_STRENGTH = 1e-2


class TermErrors(Metric):
    """For each term of the loss the sum of its errors, and their number."""

    full_state_update = False

    def __init__(self, num_terms: int) -> None:
        super().__init__()
        self.sums: Tensor
        self.counts: Tensor
        # float64: a float32 sum stops growing at 16 million tokens.
        self.add_state("sums", torch.zeros(num_terms, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(num_terms, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, sums: Tensor, counts: Tensor) -> None:
        """Add a batch; both of shape (terms,)."""
        # Not in place: Trainer.validate leaves inference tensors, which a fit may not change.
        self.sums = self.sums + sums.detach()
        self.counts = self.counts + counts

    def compute(self) -> Tensor:
        """Each term's mean error (0 where there was nothing to compare) and count, (2, terms)."""
        return torch.stack([self.sums / self.counts.clamp_min(1), self.counts])


class RidgeProbe(Metric):
    """How well the best linear map from a student's states predicts the teacher's.

    It is fitted on one half of the batches and measured on the other; the first batch is cut in
    two, so one is enough. Only sums of products are kept, no states: with X of shape (n, D + 1),
    its last column 1, and Y of shape (n, H), ``W = argmin |X W - Y|^2 + strength * mean diagonal *
    |W|^2`` on the first half and ``MSE = (tr Y'Y - 2 tr W'X'Y + tr W'X'X W) / (n H)`` on the
    second.

    Args:
        num_inputs: D, the student's width.
        num_targets: H, the teacher's width.
        strength: weight of the shrinkage.
        sync_on_compute: whether the sums of all ranks are added, as in torchmetrics.
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
        """Add a batch."""
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
        """Forget all batches."""
        super().reset()
        self.num_batches = 0

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean squared error of the map, and variance of the targets, on the second half."""
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
    """How well a student's sentence vectors stand for its teacher's, without a task.

    Args:
        student_NS: of rows that it did not learn from, shape (N, S); two at least.
        teacher_NH: the teacher's of the same rows, shape (N, H).

    Returns:
        ``vector_cosine``, the mean cosine between the teacher's vectors and a linear map of the
        student's, which is fitted on one half of the rows and measured on the other; and
        ``similarity_order``, Spearman's correlation, over pairs of rows, of the cosine between the
        student's two vectors with that between the teacher's: 1 where both put all pairs in the
        same order, as STS tasks ask for.
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
    """A remark where the held-out loss was lower before the last epoch; else nothing."""
    best = min(history, key=lambda row: row["loss"])
    if best["loss"] > (1 - TOO_LONG) * history[-1]["loss"]:
        return ""
    was = f"{best['loss']:.3f} after epoch {best['epoch'] + 1}"
    return f" (the loss was {was}: give fewer epochs, or more text)"
