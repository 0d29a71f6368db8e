"""Which candidates keep their weights."""

import optuna
from optuna.trial import create_trial

from kdnas.nas.weights import KEPT, MOST_KEPT, drop_weights


def test_the_best_candidates_keep_their_weights_and_twins_have_none(tmp_path):
    study = optuna.create_study(direction="maximize")
    rewards = [0.1, 0.9, 0.3, 0.8, 0.2]
    for number, value in enumerate(rewards):
        study.add_trial(create_trial(value=value))
        folder = tmp_path / f"{number}"
        folder.mkdir()
        for name in KEPT:
            (folder / name).touch()
    study.add_trial(create_trial(value=0.9, user_attrs={"twin_of": 1}))
    for _ in range(2):
        drop_weights(study, lambda number: tmp_path / f"{number}")
        left = {path.parent.name for path in tmp_path.glob("*/*")}
        assert left == {"1", "2", "3"} and len(left) == MOST_KEPT
