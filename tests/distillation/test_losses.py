import math
import re

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch.nn.functional import kl_div

from kdnas.distillation.losses import (
    attention_divergence,
    attention_map,
    contextual_share,
    ridge_map,
    squared_error,
)


def test_the_squared_error_of_real_tokens_is_as_by_hand():
    # Two rows, the second with one token of padding, which is taken away before.
    attention_mask = torch.tensor([[1, 1], [1, 0]]).bool()
    predicted = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[3.0, -1.0], [9.0, 9.0]]])
    target = torch.tensor([[[1.0, 0.0], [2.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    # tokens: (0 + 4) / 2, (4 + 16) / 2, (9 + 1) / 2
    assert squared_error(predicted[attention_mask], target[attention_mask]).item() == 2 + 10 + 5


def test_the_squared_error_adds_up_over_batches():
    predicted, target = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0))
    parts = [squared_error(predicted[rows], target[rows]) for rows in (slice(0, 7), slice(7, 30))]
    assert sum(parts).item() == pytest.approx(squared_error(predicted, target).item(), rel=1e-6)
    assert squared_error(predicted, target).item() / 30 == pytest.approx(
        (predicted - target).square().mean().item()
    )


def test_the_squared_error_of_half_precision_is_taken_in_float32():
    predicted, target = (
        torch.full((1000, 4), 2.0, dtype=torch.bfloat16),
        torch.zeros(1000, 4, dtype=torch.float16),
    )
    error = squared_error(predicted, target)
    assert (
        error.dtype == torch.float32 and error.item() == 4000
    )  # bfloat16 would say 4,000 at best by luck
    assert (
        squared_error(torch.full((1, 1), 300.0).half(), torch.zeros(1, 1)).item() == 90000
    )  # float16: infinite


@pytest.mark.parametrize("shape", [(1, 8), (3, 1), (8,), (4, 8), (3, 2, 8)])
def test_shapes_that_would_broadcast_or_differ_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(3, 8\) and \({}".format(", ".join(map(str, shape)))):
        squared_error(torch.zeros(3, 8), torch.zeros(shape))


def test_the_divergence_of_attention_is_as_by_hand():
    # Two real tokens and padding. The teacher's map is uniform: (1/2, 1/2); the student's is (3/4, 1/4) for both tokens
    # in its first head, and the teacher's own in its second.
    query = torch.ones(1, 2, 3, 1)
    key = torch.tensor([[math.log(3), 0.0, 99.0], [0.0, 0.0, 99.0]]).view(1, 2, 3, 1)
    mask = torch.tensor([[True, True, False]])
    ours, theirs = (
        attention_map(query, key, mask),
        attention_map(torch.zeros(1, 2, 3, 5), torch.zeros(1, 2, 3, 5), mask),
    )
    torch.testing.assert_close(ours[0, :, 0], torch.tensor([[0.75, 0.25, 0.0], [0.5, 0.5, 0.0]]))
    # tokens: 1/2 ln (1/2 / 3/4) + 1/2 ln (1/2 / 1/4) = 1/2 ln 4/3, twice; mean over heads: half of it
    assert attention_divergence(ours, theirs, mask).item() == pytest.approx(
        math.log(4 / 3) / 2, rel=1e-5
    )
    assert attention_divergence(theirs, theirs, mask).item() == pytest.approx(0, abs=1e-6)


def random_maps(
    *shape: int, mask: torch.Tensor, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for _ in range(4)]
    return [*parts, attention_map(*parts[:2], mask), attention_map(*parts[2:], mask)]


def test_scores_are_divided_by_the_root_of_a_head_s_size():
    mask = torch.ones(2, 5, dtype=torch.bool)
    query, key, _, _, ours, _ = random_maps(2, 3, 5, 4, mask=mask)
    # Four times as many dimensions of half the length: the same scores after the division.
    wide = [part.repeat(1, 1, 1, 4) / math.sqrt(2) for part in (query, key)]
    torch.testing.assert_close(attention_map(*wide, mask), ours)


def test_the_divergence_and_its_gradient_are_torch_s_own_and_the_teacher_s_is_none():
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    *parts, ours, theirs = random_maps(2, 2, 4, 3, mask=mask)
    attention_divergence(ours, theirs, mask).backward()
    assert parts[2].grad is None and parts[3].grad is None
    found = [part.grad for part in parts[:2]]
    *parts, ours, theirs = random_maps(2, 2, 4, 3, mask=mask)
    real = mask[:, None, :, None] & mask[:, None, None, :]
    per_pair = kl_div(ours.clamp_min(1e-9).log(), theirs.detach(), reduction="none")
    expected = per_pair[real.expand_as(per_pair)].sum() / 2
    assert attention_divergence(ours, theirs, mask).item() == pytest.approx(
        expected.item(), rel=1e-5
    )
    expected.backward()
    for gradient, part in zip(found, parts[:2], strict=True):
        assert gradient.any() and not gradient[0, :, 3:].any()
        torch.testing.assert_close(gradient, part.grad)


def test_the_divergence_in_bfloat16_is_float32_s_to_half_a_percent():
    mask = torch.ones(2, 40, dtype=torch.bool)
    found = [
        attention_divergence(*random_maps(2, 6, 40, 8, mask=mask, dtype=d)[4:], mask).item()
        for d in (torch.float32, torch.bfloat16)
    ]
    assert found[1] == pytest.approx(found[0], rel=5e-3)


def test_a_student_that_looks_nowhere_where_its_teacher_looks_has_a_finite_gradient():
    ours = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]], requires_grad=True)
    divergence = attention_divergence(
        ours, ours.detach().flip(-1), torch.ones(1, 2, dtype=torch.bool)
    )
    divergence.backward()
    assert divergence.isfinite() and ours.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 2, 4, 4), (2, 1, 4, 4), (2, 2, 5, 4)])
def test_maps_that_would_broadcast_are_refused(shape):
    with pytest.raises(ValueError, match=re.escape(f"(2, 2, 4, 4) and {shape}")):
        attention_divergence(
            torch.zeros(2, 2, 4, 4), torch.zeros(shape), torch.ones(2, 4, dtype=torch.bool)
        )


@pytest.mark.parametrize(
    ("errors", "share"),  # of the student, of the table of words, of the teacher itself
    [
        ((0.5, 0.5), 0.0),
        ((0.0, 0.5), 1.0),
        ((1.0, 0.5), -1.0),
        ((0.1, 0.4), 0.75),
        ((0.3, 0.0), 0.0),
        ((0.5, 0.5, 0.1), 0.0),
        ((0.1, 0.5, 0.1), 1.0),
        ((0.2, 0.5, 0.1), 0.75),
        ((0.3, 0.1, 0.1), 0.0),
    ],
)
def test_the_contextual_share_is_0_for_a_table_1_for_the_teacher_and_negative_below(errors, share):
    assert contextual_share(*errors) == pytest.approx(share)


def test_a_ridge_map_equals_scikit_learn_s():
    generator = np.random.default_rng(0)
    inputs = generator.normal(3, [0.1, 1, 5, 2], size=(50, 4))
    targets = inputs @ generator.normal(size=(4, 3)) + 7 + generator.normal(size=(50, 3))
    for strength in (1e-4, 0.1, 2.0):
        alpha = strength * 50 * inputs.var(0).mean()
        oracle = Ridge(alpha=alpha).fit(inputs, targets)
        weight = ridge_map(torch.tensor(inputs), torch.tensor(targets), strength).numpy()
        assert weight.shape == (5, 3)
        np.testing.assert_allclose(weight[:-1], oracle.coef_.T, rtol=1e-4)
        np.testing.assert_allclose(weight[-1], oracle.intercept_, rtol=1e-4)


def test_a_linear_map_with_a_constant_is_recovered():
    generator = torch.Generator().manual_seed(0)
    inputs, weight, constant = (
        torch.randn(*shape, generator=generator) for shape in [(200, 5), (5, 3), (3,)]
    )
    found = ridge_map(inputs, inputs @ weight + constant, strength=1e-12)
    assert found.dtype == torch.float64
    torch.testing.assert_close(
        found, torch.cat([weight, constant[None]]).double(), atol=1e-5, rtol=0
    )


def test_a_ridge_map_of_constant_or_dependent_inputs_predicts_as_well_as_can_be():
    targets = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    weight = ridge_map(torch.ones(20, 3), targets)
    torch.testing.assert_close(
        torch.ones(3).double() @ weight[:-1] + weight[-1], targets.double().mean(0)
    )
    column = torch.arange(20.0)[:, None]
    weight = ridge_map(torch.cat([column, column], 1), 3 * column, strength=1e-9)
    torch.testing.assert_close(
        weight.squeeze(), torch.tensor([1.5, 1.5, 0.0]).double(), atol=1e-5, rtol=1e-5
    )
