import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from kdnas.distillation.objectives import View
from kdnas.distillation.sentences import PairComparison, SentenceSimilarity, SentenceState
from kdnas.distillation.start import Started
from kdnas.models.arch import StudentArch
from kdnas.models.encoders import build_student, find_teacher
from kdnas.system.errors import UserError
from tests.conftest import make_batch, masked, view_of

ARCH = StudentArch(num_hidden_layers=2, num_attention_heads=2, hidden_size=32, intermediate_size=64)


@pytest.fixture(scope="module")
def teacher(any_teacher) -> PreTrainedModel:
    return find_teacher(str(any_teacher)).load()


@pytest.fixture
def student(teacher) -> PreTrainedModel:
    torch.manual_seed(0)
    return build_student(teacher.config, ARCH).eval()


def single(batch: dict) -> dict:
    """The same rows without any pair."""
    return batch | {"token_type_ids": torch.zeros_like(batch["token_type_ids"])}


def last(view: View) -> np.ndarray:
    return view.padded(view.model.config.num_hidden_layers - 1).detach().numpy()


def vector(states: np.ndarray, length: int, pooling: str) -> np.ndarray:
    return states[0] if pooling == "cls" else sum(states[token] for token in range(length)) / length


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_error_of_a_sentence_is_that_of_plain_loops(teacher, student, pooling):
    criterion = SentenceState(pooling).criterion(student, teacher)
    criterion.variance.fill_(0.5)
    weight, bias = (parameter.detach().numpy() for parameter in criterion.projection.parameters())
    batch = masked(make_batch())
    ours, theirs = view_of(student, batch), view_of(teacher, batch)
    total = 0.0
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        predicted = weight @ vector(last(ours)[row], length, pooling) + bias
        total += ((predicted - vector(last(theirs)[row], length, pooling)) ** 2).mean() / 0.5
    ((error, count),) = criterion(ours, theirs)
    assert (error.item(), count) == (pytest.approx(total, rel=1e-4), 3)
    assert [(term.name, term.weight) for term in criterion.terms] == [(f"sentence_{pooling}", 1.0)]


def fake(hidden_size: int) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(num_hidden_layers=1, hidden_size=hidden_size))


def test_the_error_of_cls_is_as_by_hand():
    criterion = SentenceState("cls").criterion(fake(1), fake(2))
    with torch.no_grad():
        criterion.projection.weight.copy_(torch.tensor([[2.0], [-1.0]]))
        criterion.projection.bias.copy_(torch.tensor([0.0, 1.0]))
        criterion.variance.fill_(4.0)
    batch = {"attention_mask": torch.tensor([[1, 1], [1, 0]])}
    ours = torch.tensor([[[1.0], [50.0]], [[3.0], [50.0]]])
    theirs = torch.tensor([[[4.0, 0.0], [9.0, 9.0]], [[6.0, -4.0], [9.0, 9.0]]])
    ((error, count),) = criterion(
        View(fake(1), batch, {0: ours}), View(fake(2), batch, {0: theirs})
    )
    # predicted (2, 0) and (6, -2): (4 + 0) / 2 and (0 + 4) / 2, over the variance
    assert (error.item(), count) == ((2 + 2) / 4, 2)


def test_the_error_of_similarity_is_as_by_hand():
    criterion = SentenceSimilarity().criterion(fake(2), fake(2))
    criterion.variance.fill_(0.5)
    batch = {"attention_mask": torch.tensor([[1, 1], [1, 0], [1, 0]])}
    ours = torch.tensor(
        [[[3.0, 1.0], [1.0, -1.0]], [[0.0, 7.0], [9.0, 9.0]], [[5.0, 5.0], [-9.0, 9.0]]]
    )
    theirs = torch.tensor(
        [[[1.0, 1.0], [1.0, -1.0]], [[4.0, 0.0], [9.0, 9.0]], [[0.0, 2.0], [9.0, -9.0]]]
    )
    ((error, count),) = criterion(
        View(fake(2), batch, {0: ours}), View(fake(2), batch, {0: theirs})
    )
    # The student's means (2, 0), (0, 7), (5, 5) have cosines 0 (rows 1 and 2), r (1 and 3) and r (2 and 3), r^2 = 1/2;
    # the teacher's (1, 0), (4, 0), (0, 2) have 1, 0 and 0. Squares 1, 1/2, 1/2, so the means over the two other rows
    # are (1 + 1/2) / 2, (1 + 1/2) / 2 and (1/2 + 1/2) / 2, and their sum is over the variance.
    assert (error.item(), count) == (pytest.approx((0.75 + 0.75 + 0.5) / 0.5), 3)


def test_the_error_of_a_pair_is_as_by_hand():
    criterion = PairComparison().criterion(fake(1), fake(2))
    with torch.no_grad():
        criterion.head[0].weight.fill_(2.0)
        criterion.head[0].bias.fill_(0.0)
        criterion.head[2].weight.copy_(torch.tensor([[0.1], [0.0], [0.2]]))
        criterion.head[2].bias.copy_(torch.tensor([0.0, 0.0, 1.0]))
        criterion.mean.copy_(torch.tensor([0.0, 1.0, -1.0]))
        criterion.std.copy_(torch.tensor([1.0, 2.0, 0.5]))
    batch = {"attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])}
    batch["token_type_ids"] = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0]])
    ours = torch.tensor([[5.0, 70.0, 70.0, 70.0], [60.0, 70.0, 70.0, 70.0]])[..., None]
    theirs = torch.full((2, 4, 2), 80.0)
    theirs[0, :3] = torch.tensor([[2.0, 1.0], [0.0, -1.0], [0.0, 2.0]])
    ((error, count),) = criterion(
        View(fake(1), batch, {0: ours}), View(fake(2), batch, {0: theirs})
    )
    # The second row is no pair. In the first u = (1, 0) and v = (0, 2): |u - v| = (1, 2) and the cosine is 0, which
    # standardised are 1, 1/2 and 2. Twice [CLS] is 10, and so is GELU of that: 1, 0 and 3 are predicted.
    assert (error.item(), count) == (pytest.approx(((0 + 1 / 4) / 2 + 1) / 2), 1)


def test_the_mean_state_is_as_by_hand(teacher, student):
    criterion = SentenceState("mean").criterion(student, teacher)
    nn.init.zeros_(criterion.projection.weight)
    nn.init.ones_(criterion.projection.bias)
    batch = {"attention_mask": torch.tensor([[1, 1], [1, 0]])}
    theirs = torch.zeros(2, 2, 64)
    theirs[0, 0], theirs[0, 1], theirs[1, 0], theirs[1, 1] = 2.0, 4.0, -1.0, 99.0
    ours = View(student, batch, padded={1: torch.zeros(2, 2, 32)})
    ((error, count),) = criterion(ours, View(teacher, batch, padded={3: theirs}))
    assert (error.item(), count) == ((3 - 1) ** 2 + (-1 - 1) ** 2, 2)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_fitted_sentence_map_is_measured_against_the_teacher_s_variance(
    teacher, student, pooling
):
    criterion = SentenceState(pooling).criterion(student, teacher)
    rows = [make_batch(40, seed) for seed in range(4)]
    with torch.no_grad():
        ours, theirs = ([view_of(model, row) for row in rows] for model in (student, teacher))
        criterion.fit(Started(), ours, theirs)
        vectors = [
            vector(states, length, pooling)
            for row, view in zip(rows, theirs, strict=True)
            for states, length in zip(
                last(view), row["attention_mask"].sum(1).tolist(), strict=True
            )
        ]
        assert criterion.variance.item() == pytest.approx(np.var(vectors, axis=0).mean(), rel=1e-4)
        errors = [criterion(one, other)[0] for one, other in zip(ours, theirs, strict=True)]
    share = sum(float(error) for error, _ in errors) / sum(count for _, count in errors)
    assert 0 < share < 0.9  # 1: no more than the mean


@pytest.mark.parametrize("pooling", ["max", "", "CLS"])
def test_an_unknown_pooling_is_refused(pooling):
    with pytest.raises(UserError, match=f"pooling is {pooling!r}: give cls or mean"):
        SentenceState(pooling)


def cosines(view: View, batch: dict) -> np.ndarray:
    """Of each row's mean state with each other row's."""
    lengths = batch["attention_mask"].sum(1).tolist()
    vectors = [
        vector(states, length, "mean") for states, length in zip(last(view), lengths, strict=True)
    ]
    return np.array(
        [
            [u @ v / np.linalg.norm(u) / np.linalg.norm(v) for j, v in enumerate(vectors) if j != i]
            for i, u in enumerate(vectors)
        ]
    )


def test_the_error_of_similarity_is_that_of_plain_loops_over_the_teacher_s_variance(
    teacher, student
):
    criterion = SentenceSimilarity().criterion(student, teacher)
    batches = [masked(make_batch(6, seed)) for seed in range(3)]
    ours, theirs = ([view_of(model, batch) for batch in batches] for model in (student, teacher))
    with torch.no_grad():
        criterion.fit(Started(), ours, theirs)
    known = [cosines(view, batch) for view, batch in zip(theirs, batches, strict=True)]
    assert criterion.variance.item() == pytest.approx(np.var(known), rel=1e-3)
    for one, other, batch, wanted in zip(ours, theirs, batches, known, strict=True):
        ((error, count),) = criterion(one, other)
        squares = ((cosines(one, batch) - wanted) ** 2).mean(1)
        assert (error.item(), count) == (pytest.approx(squares.sum() / np.var(known), rel=1e-3), 6)
    assert [(term.name, term.weight) for term in criterion.terms] == [("sentence_similarity", 1.0)]


def test_vectors_that_are_turned_and_stretched_are_as_alike_as_before(teacher, student):
    batch = {"attention_mask": torch.ones(3, 2, dtype=torch.long)}
    theirs = torch.randn(3, 2, 32)
    turned = 5 * theirs @ torch.linalg.qr(torch.randn(32, 32))[0]
    criterion = SentenceSimilarity().criterion(student, teacher)
    ((error, _),) = criterion(View(student, batch, {1: turned}), View(teacher, batch, {3: theirs}))
    assert error.item() == pytest.approx(0, abs=1e-10)
    alone = {"attention_mask": torch.ones(1, 2, dtype=torch.long)}
    ((error, count),) = criterion(
        View(student, alone, {1: turned[:1]}), View(teacher, alone, {3: theirs[:1]})
    )
    assert (error.item(), count) == (0, 0), "a row alone"


def comparison(states: np.ndarray, types: np.ndarray, length: int) -> np.ndarray:
    """``|u - v|`` and ``cos(u, v)`` of one row."""
    first = [states[token] for token in range(length) if types[token] == 0]
    second = [states[token] for token in range(length) if types[token] == 1]
    u, v = sum(first) / len(first), sum(second) / len(second)
    return np.append(np.abs(u - v), u @ v / np.linalg.norm(u) / np.linalg.norm(v))


def test_the_error_of_pairs_is_that_of_plain_loops_over_the_rows_that_are_pairs(teacher, student):
    criterion = PairComparison().criterion(student, teacher)
    rows = [masked(make_batch(9, seed)) for seed in range(3)]
    with torch.no_grad():
        ours, theirs = ([view_of(model, row) for row in rows] for model in (student, teacher))
        criterion.fit(Started(), ours, theirs)
        errors = [criterion(one, other)[0] for one, other in zip(ours, theirs, strict=True)]
    known = [
        [
            comparison(
                last(view)[i], row["token_type_ids"][i].numpy(), int(row["attention_mask"][i].sum())
            )
            for i in range(0, 9, 2)
        ]
        for row, view in zip(rows, theirs, strict=True)
    ]
    everything = np.concatenate(known)
    mean, std = everything.mean(0), everything.std(0, ddof=1)
    std[:-1] = np.maximum(std[:-1], 0.1 * std[:-1].mean())
    np.testing.assert_allclose(criterion.mean, mean, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(criterion.std, std, rtol=1e-3, atol=1e-5)
    w1, b1, w2, b2 = (
        parameter.detach().double().numpy() for parameter in criterion.head.parameters()
    )
    for (error, count), view, targets in zip(errors, ours, known, strict=True):
        total = 0.0
        for cls, target in zip(last(view)[::2, 0], targets, strict=True):
            inner = w1 @ cls + b1
            gelu = np.array([x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in inner])
            predicted = w2 @ gelu + b2
            squares = (predicted - (target - mean) / std) ** 2
            total += (squares[:-1].mean() + squares[-1]) / 2
        assert (error.item(), count) == (pytest.approx(total, rel=1e-3), 5)
    assert [(term.name, term.weight) for term in criterion.terms] == [("pair_comparison", 1.0)]


def test_a_batch_without_a_pair_costs_nothing_and_breaks_nothing(teacher, student):
    criterion = PairComparison().criterion(student, teacher)
    batch = single(make_batch())
    ((error, count),) = criterion(view_of(student, batch), view_of(teacher, batch))
    assert (error.item(), count) == (0.0, 0)
    error.backward()
    for parameter in criterion.parameters():
        assert parameter.grad is not None and not parameter.grad.any()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize("num_pairs", [0, 1])
def test_too_few_pairs_to_standardise_by_leave_the_targets_as_they_are(teacher, student, num_pairs):
    criterion = PairComparison().criterion(student, teacher)
    batch = make_batch(2) if num_pairs else single(make_batch(2))
    with torch.no_grad():
        criterion.fit(Started(), [view_of(student, batch)], [view_of(teacher, batch)])
    assert not criterion.mean.any() and (criterion.std == 1).all()


def test_dimensions_that_never_move_are_not_divided_by_nothing(teacher, student):
    criterion = PairComparison().criterion(student, teacher)
    batch = make_batch(20)
    view = view_of(teacher, batch)
    states = view.padded(3).clone()
    states[..., :60] = 1.0
    with torch.no_grad():
        criterion.fit(Started(), [], [View(teacher, batch, padded={3: states})])
    moving = criterion.std[60:64]
    assert (
        criterion.std[:60].numpy() == pytest.approx(float(criterion.std[:60].mean()))
        and criterion.std.min() > 0
    )
    assert criterion.std[0] == pytest.approx(0.1 * float(moving.sum()) / 64, rel=0.2)
