import dataclasses
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk

from kdnas.tasks.scores import make_metrics
from kdnas.tasks.tasks import TASKS, Task

CLASSIFICATIONS = sorted(set(TASKS) - {"stsb"})


def test_every_task_but_one_is_a_classification():
    assert len(CLASSIFICATIONS) == 8


def oracle(name: str, preds: np.ndarray, targets: np.ndarray) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "pearson":
            return float(np.nan_to_num(stats.pearsonr(preds, targets)[0]))
        if name == "spearman":
            return float(np.nan_to_num(stats.spearmanr(preds, targets)[0]))
        score = {
            "accuracy": sk.accuracy_score,
            "f1": sk.f1_score,
            "matthews": sk.matthews_corrcoef,
        }[name]
        return float(score(targets, preds))


def by_batches(task: Task, preds: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    collection = make_metrics(task)
    for part in torch.arange(len(preds)).split(32):
        collection.update(preds[part], targets[part])
    return {name: float(value) for name, value in collection.compute().items()}


def class_ids(num_labels: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    targets = torch.randint(num_labels, (301,)) * (torch.rand(301) > 0.5)
    preds = torch.where(torch.rand(301) > 0.3, targets, torch.randint(num_labels, (301,)))
    last = torch.full_like(targets, num_labels - 1)
    return {
        "usual": (preds, targets),
        "all right": (targets, targets),
        "constant 0": (last * 0, targets),
        "constant last": (last, targets),
        "one class, constant": (last, last),
        "one class of targets": (preds, last),
        "all wrong": ((targets + 1) % num_labels, targets),
    }


@pytest.mark.parametrize("case", class_ids(2))
@pytest.mark.parametrize("name", CLASSIFICATIONS)
def test_metrics_of_classes_equal_scikit_learn(name, case):
    preds, targets = class_ids(TASKS[name].num_labels)[case]
    values = by_batches(TASKS[name], preds, targets)
    assert values == {
        key: pytest.approx(oracle(key, preds.numpy(), targets.numpy()), abs=1e-6) for key in values
    }


def numbers() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    targets = (torch.rand(301) * 25).round() / 5
    preds = targets + torch.randn(301)
    return {
        "usual": (preds, targets),
        "ties": (preds.round(), targets),
        "bfloat16": (preds.bfloat16(), targets),
        "barely varying": (preds * 1e-4 + 300, targets),
        "constant predictions": (torch.full_like(preds, 0.1), targets),
        "constant targets": (preds, torch.full_like(preds, 2.5)),
        "one row": (preds[:1], targets[:1]),
        "reversed": (-targets, targets),
    }


@pytest.mark.parametrize("case", numbers())
def test_metrics_of_a_regression_equal_scipy_and_are_0_where_undefined(case):
    preds, targets = numbers()[case]
    values = by_batches(TASKS["stsb"], preds, targets)
    expected = {"pearson": 0.0, "spearman": 0.0}
    if case != "one row":  # scipy refuses one
        expected = {
            key: oracle(key, preds.double().numpy(), targets.double().numpy()) for key in values
        }
    assert values == {key: pytest.approx(value, abs=1e-6) for key, value in expected.items()}


def test_f1_is_of_the_positive_class_wherever_its_place_is():
    preds, targets = (
        torch.randint(2, (301,), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)
    )
    task = TASKS["mrpc"]
    expected = by_batches(task, preds, targets)
    places = torch.tensor(
        [2, 0]
    )  # of a classifier with three classes, whose first is the positive one
    turned = dataclasses.replace(task, num_labels=3, positive=0)
    assert by_batches(turned, places[preds], places[targets]) == pytest.approx(expected)
    assert by_batches(turned, torch.full_like(preds, 1), places[targets])["f1"] == 0
