"""What TensorBoard shows of a search follows from its study: once, whoever writes, however often it went on."""

from datetime import datetime, timedelta

import optuna
import pytest
from optuna.trial import TrialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdnas.report.tensorboard import SearchBoard
from tests.report.test_page import make_study, trained

NOON = datetime(2026, 1, 1, 12)


def add(study: optuna.Study, layers: int, latency_ms: float, loss: float, minutes: int) -> None:
    """A trained candidate, which ended so many minutes after noon."""
    attrs = trained(layers, latency_ms, loss, 1 - loss)
    trial = optuna.trial.create_trial(state=TrialState.COMPLETE, value=1 - loss, user_attrs=attrs)
    trial.datetime_complete = NOON + timedelta(minutes=minutes)
    study.add_trial(trial)


def scalars(folder, name: str) -> list[tuple[int, float]]:
    (file,) = folder.glob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(f"search/{name}")]


def test_a_search_that_goes_on_has_one_curve_in_the_order_of_its_results(tmp_path):
    study = make_study(num_candidates=2)
    add(study, 1, 2.0, 0.5, minutes=2)
    add(study, 2, 3.0, 0.25, minutes=1)  # begun later, ended earlier
    with SearchBoard(tmp_path, lambda num_trained: 1 / num_trained) as board:
        board(study)
    with SearchBoard(tmp_path, lambda num_trained: 1 / num_trained) as board:
        add(study, 3, 4.0, 0.75, minutes=3)
        board(study)
        add(study, 4, 1.0, 0.125, minutes=4)
        board(study)
        board(study)
    assert scalars(tmp_path, "reward") == [(1, 0.75), (2, 0.5), (3, 0.25), (4, 0.875)]
    assert scalars(tmp_path, "best_reward") == [(1, 0.75), (2, 0.75), (3, 0.75), (4, 0.875)]
    assert scalars(tmp_path, "loss") == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 0.125)]
    assert scalars(tmp_path, "latency_ms") == [(1, 3), (2, 2), (3, 4), (4, 1)]
    assert scalars(tmp_path, "episode_best") == [(1, 0.75), (2, 0.75), (3, 0.25), (4, 0.875)]
    assert scalars(tmp_path, "previous_best") == [(3, 0.75), (4, 0.75)]
    assert scalars(tmp_path, "exploration_ratio") == [(1, 1), (2, 1 / 2), (3, 1 / 3), (4, 1 / 4)]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Images("search/pareto")] == [3, 4]
    assert events.Scalars("search/reward")[0].wall_time == (NOON + timedelta(minutes=1)).timestamp()


def test_exploration_falls_by_what_a_pruner_ended_too(tmp_path):
    study = make_study()
    add(study, 1, 2.0, 0.5, minutes=1)
    attrs, state = trained(2, 1.0, 0.9, 0.1), TrialState.PRUNED
    pruned = optuna.trial.create_trial(state=state, intermediate_values={0: 0.1}, user_attrs=attrs)
    pruned.datetime_complete = NOON + timedelta(minutes=2)
    study.add_trial(pruned)
    add(study, 3, 3.0, 0.25, minutes=3)
    with SearchBoard(tmp_path, lambda num_tried: 1 / num_tried) as board:
        board(study)
    assert scalars(tmp_path, "exploration_ratio") == [(1, 1), (2, 1 / 3)]


def test_a_candidate_at_which_two_workers_were_is_one_point(tmp_path):
    study = make_study()
    attrs = trained(1, 2.0, 0.5, 0.5)
    running = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=attrs)
    study.add_trial(running)
    add(study, 1, 2.0, 0.5, minutes=1)  # begun later, ended earlier
    with SearchBoard(tmp_path) as board:
        board(study)
        study.tell(0, 0.5)
        board(study)
    assert scalars(tmp_path, "reward") == [(1, 0.5)]
