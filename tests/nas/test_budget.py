"""The budget."""

import math

import pytest

from kdnas.deploy.latency import ArchLatency, Latency
from kdnas.nas.budget import Budget
from kdnas.system.errors import UserError


def latency(student_ms: float) -> ArchLatency:
    return ArchLatency(Latency(student_ms, 0.25, 9), Latency(10.0, 0.5, 9), 1234)


@pytest.mark.parametrize(
    ("budget", "student_ms", "violation", "reason"),
    [
        (Budget(), 1e9, 0.0, ""),
        (Budget(speedup=4), 2.5, 0.0, ""),  # exactly 4x
        (Budget(speedup=4), 1.0, 0.0, ""),
        (Budget(speedup=4), 5.0, 1.0, "2.00x as fast as the teacher, 4x is asked for"),
        (Budget(latency_ms=5), 5.0, 0.0, ""),
        (Budget(latency_ms=5), 2.0, 0.0, ""),
        (Budget(latency_ms=2.5), 5.0, 1.0, "5.000 ms, 2.5 ms is asked for"),
        (Budget(speedup=4, latency_ms=5), 2.0, 0.0, ""),
        (
            Budget(speedup=4, latency_ms=4),
            5.0,
            1.0,
            "2.00x as fast as the teacher, 4x is asked for",
        ),
        (Budget(speedup=2.5, latency_ms=2), 5.0, 1.5, "5.000 ms, 2 ms is asked for"),
        (Budget(speedup=1, latency_ms=2), 5.0, 1.5, "5.000 ms, 2 ms is asked for"),
        (Budget(num_parameters=1234), 5.0, 0.0, ""),
        (Budget(num_parameters=617), 5.0, 1.0, "1,234 parameters, 617 are asked for"),
        (
            Budget(speedup=3, latency_ms=100),
            5.0,
            0.5,
            "2.00x as fast as the teacher, 3x is asked for",
        ),
    ],
)
def test_the_budget_is_broken_by_the_larger_of_its_excesses(budget, student_ms, violation, reason):
    found, words = budget.violation(latency(student_ms))
    assert found == pytest.approx(violation)
    assert found <= 0 or words == reason


@pytest.mark.parametrize("name", ["speedup", "latency_ms", "num_parameters"])
@pytest.mark.parametrize("value", [0, -1.5, math.nan])
def test_a_budget_that_is_not_above_zero_is_refused(name, value):
    with pytest.raises(UserError, match=f"The budget {name} is {value}: give a number above 0"):
        Budget(**{name: value})
