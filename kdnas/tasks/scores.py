"""The metrics of labelled tasks, from torchmetrics, but 0.0 where a metric is undefined."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import BinaryF1Score, BinaryMatthewsCorrCoef, MulticlassAccuracy
from torchmetrics.utilities import dim_zero_cat

from kdnas.tasks.tasks import Task


class _F1(BinaryF1Score):
    """F1 score of one class against all others."""

    def __init__(self, positive: int) -> None:
        super().__init__()
        self.positive = positive

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update((preds == self.positive).int(), (target == self.positive).int())


class _Matthews(BinaryMatthewsCorrCoef):
    """Matthews' correlation; if undefined, 0.0 as in scikit-learn, where torchmetrics differs."""

    def compute(self) -> Tensor:
        tn, fp, fn, tp = self.confmat.cpu().double().flatten()
        denominator = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)).sqrt()
        return (tp * tn - fp * fn) / denominator if denominator else torch.tensor(0.0)


class _Pearson(Metric):
    """Pearson's r in float64, as in scipy; 0.0 if it is undefined.

    torchmetrics computes in float32, and returns NaN for (nearly) constant predictions.
    """

    full_state_update = False
    preds: list[Tensor]
    targets: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("preds", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, preds: Tensor, targets: Tensor) -> None:
        self.preds.append(preds)
        self.targets.append(targets)

    def compute(self) -> Tensor:
        states = (self.preds, self.targets)
        pair = [self._values(dim_zero_cat(values).cpu().double()) for values in states]
        if any(values.min() == values.max() for values in pair):
            return torch.tensor(0.0)
        return torch.corrcoef(torch.stack(pair))[0, 1]

    def _values(self, values: Tensor) -> Tensor:
        return values


class _Spearman(_Pearson):
    """Spearman's rho: Pearson's r of the ranks, where equal values share their mean rank."""

    def _values(self, values: Tensor) -> Tensor:
        _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
        return (counts.cumsum(0) - (counts - 1) / 2).double()[inverse]


METRICS: Mapping[str, Callable[[Task], Metric]] = {
    # Micro: the share of correct predictions.
    "accuracy": lambda task: MulticlassAccuracy(task.num_labels, average="micro"),
    "f1": lambda task: _F1(task.positive),
    "matthews": lambda task: _Matthews(),
    "pearson": lambda task: _Pearson(),
    "spearman": lambda task: _Spearman(),
}


def make_metrics(task: Task) -> MetricCollection:
    """Return a dictionary from the names of a task's metrics to the metrics.

    They take predictions (N,) and targets (N,): class ids, or numbers for a regression. A metric
    that is undefined, such as the correlation of a constant, is 0.0.
    """
    return MetricCollection(
        {name: METRICS[name](task) for name in task.metrics}, compute_groups=False
    )
