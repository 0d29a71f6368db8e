"""What a run's figures say of each other, on numbers worked out by hand."""

import pytest
from optuna.trial import TrialState

from kdnas.nas.budget import Budget
from kdnas.nas.trials import trials_frame
from kdnas.report.trust import checks
from tests.report.test_page import add, make_results, make_study, measured, trained


def found(histories=None, full_kd=None, results=None, exported=None, best=1, budget=Budget()):
    """The checks of two trained candidates, one of which was repeated, and one that was refused, by their names."""
    study = make_study()
    add(study, TrialState.COMPLETE, 0.6, **trained(1, 2.0, 0.4, 0.6))
    add(study, TrialState.COMPLETE, 0.75, **trained(2, 4.0, 0.25, 0.75))
    add(study, TrialState.PRUNED, **measured(3, 5.0, refused="slow") | {"speedup": 4.2})
    add(study, TrialState.COMPLETE, 0.6, **trained(1, 2.0, 0.4, 0.6), twin_of=0)
    shown = checks(trials_frame(study), best, histories or {}, full_kd, results, exported, budget)
    return {check.name: check for check in shown}


def test_the_runner_up_and_the_teachers_drift_are_told():
    shown = found()
    assert "the next, trial 0, 0.6000, 20.0% less" in shown["Is the best one clearly ahead?"].words
    assert (
        "The teacher, measured beside each of 3 candidates, took 20.00 to 21.00 ms"
        in shown["Is the latency real?"].words
    )
    assert (
        shown["Is the latency real?"].good
        and shown["Does it know more than a table of words?"].good
    )
    assert set(shown) == {
        "Is the best one clearly ahead?",
        "Does it know more than a table of words?",
        "Is the latency real?",
    }
    assert found(best=None) == {}


@pytest.mark.parametrize(
    ("first", "agreement", "good"), [([1, 2, 3, 4], "1.00", True), ([4, 3, 1, 2], "-0.80", False)]
)
def test_rankings_after_the_first_and_the_last_epoch_are_compared(first, agreement, good):
    histories = {i: [{"loss": loss}, {"loss": 0.1 * i}] for i, loss in enumerate(first, 1)}
    check = found(histories)["Was the ranking settled?"]
    assert (
        f"4 candidates have a rank correlation of {agreement} (" in check.words
        and check.good is good
    )
    assert "Was the ranking settled?" not in found({1: histories[1], 2: histories[2]})
    assert "Was the ranking settled?" not in found(
        {i: [{"loss": None}, {"loss": 1}] for i in range(4)}
    )


def test_a_busy_machine_is_noticed():
    study = make_study()
    for speedup in (4.0, 5.0, 6.0):  # of 4 ms: the teacher's 16, 20 and 24
        add(study, TrialState.COMPLETE, 0.6, **trained(1, 4.0, 0.4, 0.6) | {"speedup": speedup})
    (check,) = [
        one for one in checks(trials_frame(study), 0, {}, None, None, None) if "latency" in one.name
    ]
    assert check.good is False and "took 16.00 to 24.00 ms: the machine was busy." in check.words


@pytest.mark.parametrize(("again", "good"), [(4.2, True), (5.0, False)])
def test_a_latency_that_is_another_at_the_end_is_marked(again, good):
    check = found(results=make_results(latency_ms=again))["Is the latency real?"]
    assert check.good is good and f"{again / 4 - 1:+.0%}" in check.words


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        (Budget(speedup=4.9, latency_ms=4.1, num_parameters=2_460_000), ""),
        (
            Budget(speedup=5.1),
            ", beyond the budget (5.00x as fast as the teacher, 5.1x is asked for)",
        ),
        (Budget(latency_ms=3.9), ", beyond the budget (4.000 ms, 3.9 ms is asked for)"),
    ],
)
def test_the_second_latency_is_held_against_the_budget_too(budget, reason):
    check = found(results=make_results(), budget=budget)["Is the latency real?"]
    assert check.good is not bool(reason)
    assert f"measured again 4.00 ms (IQR 0.25), 5.0x: +0%{reason}. The teacher" in check.words


def test_a_score_is_as_sure_as_its_rows_allow():
    shown = found(results=make_results())  # 0.776 on 60 rows, 0.6 from a random start
    assert "uncertain by 0.105 (95 %)" in shown["How sure is the score?"].words
    assert (
        shown["Did distillation help?"].good and "(+0.176)" in shown["Did distillation help?"].words
    )
    assert not found(results=make_results(score=0.69))["Did distillation help?"].good, (
        "0.09 is within 0.117"
    )
    results = make_results()
    results["task"]["metric"] = "pearson"
    assert "How sure is the score?" not in found(results=results)


@pytest.mark.parametrize(
    ("int8", "good"),
    [
        ({"cosine": 0.95, "score": 0.8, "int8_score": 0.793}, True),
        ({"cosine": 0.999, "score": 0.8, "int8_score": 0.79}, False),
        ({"cosine": 0.991}, True),
        ({"cosine": 0.95}, False),
    ],
)
def test_files_agree_where_int8_loses_no_more_than_an_export_tolerates(int8, good):
    check = found(exported={"max_abs_difference": 2e-6, "int8": int8 | {"rows": "60 rows"}})
    check = check["Do the exported files agree?"]
    assert check.good is good and check.words.endswith(
        "(60 rows)." if good else "(60 rows): int8 loses more than 1%."
    )


def test_the_context_after_full_kd_and_the_files_are_told():
    exported = {
        "max_abs_difference": 2e-6,
        "int8": {"cosine": 0.99, "score": 0.776, "int8_score": 0.77, "rows": "60 rows"},
    }
    shown = found(
        full_kd={"loss": 0.2, "contextual_share": -0.01, "num_epochs": 2}, exported=exported
    )
    check = shown["Does it know more than a table of words?"]
    assert (
        "knows -1.0%; loss 0.2500 in the search, 0.2000 after full KD" in check.words
        and check.good is False
    )
    assert "torch to 2e-06" in shown["Do the exported files agree?"].words
    assert (
        "scores 0.770 where float32 scores 0.776 (60 rows)"
        in shown["Do the exported files agree?"].words
    )
