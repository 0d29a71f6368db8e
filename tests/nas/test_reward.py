"""The reward: golden values, and that no candidate gains by being worse or slower."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdnas.nas.reward import reward
from kdnas.system.errors import UserError

losses = st.floats(0, 10) | st.floats(0.999, 1.001)  # at 1 the first factor changes its sign
latencies = st.floats(1e-3, 1e3)
alphas = st.floats(-2, 0)
betas = st.floats(0.01, 100)


def close_or_above(value: float, other: float) -> bool:
    return value >= other or math.isclose(value, other, rel_tol=1e-9, abs_tol=1e-12)


def test_the_originals_golden_value():
    assert reward(0.2, 0.03, 0.01, beta=0.6**6) == 0.6231565465489873


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "expected"),
    [
        (0.25, 0.6, 1.0, 0.75),  # the latency at which the second factor is 1
        (0.0, 5.0, 5.0, 0.6**0.06),
        (0.2, 3.0, 10.0, 0.8 * 2**0.06),
        (1.0, 3.0, 10.0, 0.0),
        (1.5, 3.0, 10.0, -0.5 / 2**0.06),
    ],
)
def test_hand_values_with_the_default_alpha_and_beta(loss, student, teacher, expected):
    assert reward(loss, student, teacher) == pytest.approx(expected, rel=1e-12)


def test_half_the_latency_is_worth_four_percent():
    assert reward(0.4, 1.0, 7.0) / reward(0.4, 2.0, 7.0) == pytest.approx(1.0425, abs=1e-4)


@given(losses, losses, latencies, latencies, alphas, betas)
def test_a_lower_loss_never_lowers_it(loss, other, student, teacher, alpha, beta):
    better, worse = sorted((loss, other))
    assert close_or_above(
        reward(better, student, teacher, alpha, beta), reward(worse, student, teacher, alpha, beta)
    )


@given(losses, latencies, latencies, latencies, alphas, betas)
def test_a_lower_latency_never_lowers_it(loss, student, other, teacher, alpha, beta):
    faster, slower = sorted((student, other))
    assert close_or_above(
        reward(loss, faster, teacher, alpha, beta), reward(loss, slower, teacher, alpha, beta)
    )


@pytest.mark.parametrize("loss", [0.3, 0.999999, 1.000001, 1.5, 30.0])
def test_the_faster_of_two_equal_students_wins_on_both_sides_of_loss_one(loss):
    assert reward(loss, 1.0, 10.0) > reward(loss, 2.0, 10.0)


@given(st.lists(st.tuples(losses, latencies), min_size=2, max_size=5), latencies, alphas, betas)
def test_beta_never_changes_a_ranking(candidates, teacher, alpha, beta):
    with_beta = [reward(loss, student, teacher, alpha, beta) for loss, student in candidates]
    without = [reward(loss, student, teacher, alpha, 1.0) for loss, student in candidates]
    for i in range(len(candidates)):
        for j in range(i):
            if not math.isclose(without[i], without[j], rel_tol=1e-9, abs_tol=1e-12):
                assert (with_beta[i] > with_beta[j]) == (without[i] > without[j])


@given(latencies, latencies, alphas, betas)
def test_it_is_continuous_where_the_loss_is_one(student, teacher, alpha, beta):
    assert reward(1.0, student, teacher, alpha, beta) == 0
    for side in (-1, 1):
        near, nearer = (
            reward(1 + side * distance, student, teacher, alpha, beta) for distance in (1e-9, 1e-12)
        )
        assert nearer == pytest.approx(near / 1000, rel=1e-3)


@given(losses, latencies, latencies)
def test_alpha_zero_ranks_by_loss_alone(loss, student, teacher):
    assert reward(loss, student, teacher, alpha=0.0) == 1 - loss


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_refused(loss):
    with pytest.raises(UserError, match=f"loss is {loss}: a reward needs a finite one"):
        reward(loss, 1.0, 1.0)


@pytest.mark.parametrize("name", ["latency_student", "latency_teacher", "beta"])
@pytest.mark.parametrize("value", [0.0, -1.5, math.inf, math.nan])
def test_what_must_be_above_zero_is_refused_with_its_name(name, value):
    with pytest.raises(UserError, match=f"{name} is {value}: give a number above 0"):
        reward(**{"loss": 0.5, "latency_student": 1.0, "latency_teacher": 1.0, name: value})


@pytest.mark.parametrize("alpha", [0.06, math.nan, math.inf, -math.inf])
def test_an_alpha_that_would_reward_slowness_is_refused(alpha):
    with pytest.raises(UserError, match=f"alpha is {alpha}: give 0 or less"):
        reward(0.5, 1.0, 1.0, alpha)
