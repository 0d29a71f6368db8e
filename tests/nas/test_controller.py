"""The controllers: bookkeeping by hand, the ensemble's cell against torch's LSTM, and that both learn."""

import itertools
import math

import pytest
import torch
from scipy.stats import spearmanr
from torch.nn import functional

from kdnas.models.arch import StudentArch
from kdnas.nas.controller import (
    Controller,
    EnsembleLSTM,
    History,
    ModelRanking,
    RewardLSTM,
    describe,
    exploration_ratio,
    featurise,
    likely_feasible,
)

CHOICES = [[1, 2, 3, 4, 5, 6], [3, 4, 6, 12], [192, 288, 384], [384, 768, 1536], ["gelu", "relu"]]
POINTS = torch.tensor(list(itertools.product(*(range(len(values)) for values in CHOICES))))
CONTROLLERS = [RewardLSTM, EnsembleLSTM]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reward_of(points: torch.Tensor) -> torch.Tensor:
    """Grows with depth and width, less and less; ReLU costs a little."""
    depth, _, width, inner, act = points.float().T
    return (
        0.8 - 0.4 * (-0.5 * depth).exp() - 0.2 * (-width).exp() - 0.05 * (-inner).exp() - 0.01 * act
    )


def history_of(num_points: int, seed: int = 0, num_candidates: int = 5) -> History:
    points = POINTS[torch.randperm(len(POINTS), generator=generator(seed))[:num_points]]
    return History(points, reward_of(points), num_candidates)


def pick(
    make: type[Controller], history: History, exploration: float, seed: int = 0, pool=POINTS
) -> int:
    draws = generator(seed)
    return make(CHOICES, draws).propose(history, pool, draws, exploration)[0]


# The episodes


def test_ranking_by_hand():
    trained = [("a", 0.3), ("b", 0.5), ("c", 0.1), ("d", 0.4), ("e", 0.2), ("f", 0.5), ("g", 0.6)]
    assert [ModelRanking.of(trained[:count], 3) for count in (0, 2, 3, 4, 6, 7)] == [
        ModelRanking(0, None, None, None),
        ModelRanking(0, ("b", 0.5), ("b", 0.5), None),
        ModelRanking(1, ("b", 0.5), None, ("b", 0.5)),
        ModelRanking(1, ("b", 0.5), ("d", 0.4), ("b", 0.5)),
        ModelRanking(2, ("b", 0.5), None, ("f", 0.5)),  # b was there first
        ModelRanking(2, ("g", 0.6), ("g", 0.6), ("f", 0.5)),
    ]
    # Of an episode that has ended.
    assert ModelRanking.of(trained, 3, 0) == ModelRanking(0, ("b", 0.5), ("b", 0.5), None)
    assert ModelRanking.of(trained, 3, 1) == ModelRanking(1, ("b", 0.5), ("f", 0.5), ("b", 0.5))


def test_ranking_in_words():
    small, large = StudentArch(1, 2, 32, 64), StudentArch(2, 2, 32, 64)
    assert str(ModelRanking.of([], 2)) == "episode 1: nothing trained yet"
    assert str(ModelRanking.of([(small, 0.25), (large, 0.5), (small, 0.125)], 2)) == (
        f"episode 2: best so far 0.5000 ({large}); best of this episode 0.1250 ({small}); "
        f"best of the one before 0.5000 ({large})"
    )


def test_exploration_falls_from_one_to_exactly_zero_in_the_last_episode():
    ratios = [exploration_ratio(num_trained, 2, 4) for num_trained in range(10)]
    assert ratios == [1, 1, 2 / 3, 2 / 3, 1 / 3, 1 / 3, 0, 0, 0, 0]
    assert exploration_ratio(0, 5, 1) == 0


def test_the_tokens_of_an_episode_by_hand():
    history = History(POINTS[:8], torch.tensor([0.3, 0.5, 0.1, 0.4, 0.2, 0.3, 0.6, 0.0]), 3)
    assert [history.tokens(episode) for episode in range(3)] == [
        [-1, -1, 0, 1, 2],
        [1, 1, 3, 4, 5],
        [1, 3, 6, 7],
    ]
    assert History(history.points_TF[:6], history.rewards_T[:6], 3).tokens(2) == [1, 3]


# Features


def test_sizes_are_described_by_their_logarithm_and_names_one_hot():
    assert describe([1, 2, 4]).tolist() == [[-1], [0], [1]]
    assert describe(["gelu", "relu"]).tolist() == [[1, 0], [0, 1]]
    for values in ([True, False], [0, 1], [-1, 1], [1, "a"], [3, 3]):
        assert describe(values).tolist() == [[1, 0], [0, 1]]
    assert describe([7]).tolist() == [[1]]
    points = torch.tensor([[[2, 0], [0, 1]]])
    assert featurise([describe([1, 2, 4]), describe(["gelu", "relu"])], points).tolist() == [
        [[1, 1, 0], [-1, 0, 1]]
    ]


# Constraints


def test_what_is_like_the_refused_is_left_out_and_what_is_like_the_others_is_not():
    known = torch.tensor(
        [[5, 0, 2, 2, 0], [4, 1, 2, 1, 1], [0, 0, 0, 0, 0], [1, 1, 0, 1, 1], [2, 2, 0, 0, 0]]
    )
    feasible = torch.tensor([False, False, True, True, True])
    kept = likely_feasible(
        CHOICES, known, feasible, torch.tensor([[5, 2, 2, 2, 1], [0, 0, 0, 0, 1], [3, 1, 1, 1, 0]])
    )
    assert kept.tolist() == [False, True, True]  # the last is between them: it may be tried


def test_where_all_were_refused_the_least_unlikely_is_left():
    known = torch.tensor([[5, 3, 2, 2, 0], [4, 3, 2, 2, 1], [3, 3, 1, 2, 0], [3, 2, 1, 1, 1]])
    refused = torch.zeros(120, dtype=torch.bool)
    kept = likely_feasible(CHOICES, known.repeat(30, 1), refused, POINTS)
    assert kept[0] and 0 < kept.sum() < 30 and POINTS[kept, 0].max() < 3
    kept = likely_feasible(
        CHOICES, known.repeat(30, 1), refused, torch.tensor([[5, 3, 2, 2, 0], [4, 3, 2, 2, 0]])
    )
    assert kept.tolist() == [False, True]


def test_the_boundary_is_found_from_many():
    """As a latency budget has it: the logarithms of sizes add up."""
    score = featurise([describe(values) for values in CHOICES], POINTS)[
        :, [0, 2, 3]
    ] @ torch.tensor([1.0, 1.5, 0.5])
    feasible = score < 0.4
    known = torch.randperm(len(POINTS), generator=generator())[:60]
    kept = likely_feasible(CHOICES, POINTS[known], feasible[known], POINTS)
    assert kept[feasible].double().mean() > 0.95
    assert kept[~feasible].double().mean() < 0.3


# What both controllers do


@pytest.mark.parametrize("make", CONTROLLERS)
def test_it_ranks_points_that_it_has_not_seen(make):
    history = history_of(60)
    unseen = POINTS[torch.randperm(len(POINTS), generator=generator())[60:]]
    draws = generator()
    scores = make(CHOICES, draws).scores(history, unseen, draws, False)
    assert spearmanr(scores, reward_of(unseen)).statistic > 0.8


@pytest.mark.parametrize("make", CONTROLLERS)
def test_without_exploration_it_picks_one_of_the_best(make):
    picked = pick(make, history_of(40), 0)
    assert reward_of(POINTS[[picked]]) > reward_of(POINTS).quantile(0.9)


@pytest.mark.parametrize("make", CONTROLLERS)
@pytest.mark.parametrize("exploration", [0, 1])
def test_the_same_seed_picks_the_same_and_the_global_generator_is_left_alone(make, exploration):
    before = torch.get_rng_state()
    first = pick(make, history_of(12), exploration)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert pick(make, history_of(12), exploration) == first
    if exploration:
        assert len({pick(make, history_of(12), exploration, seed) for seed in range(5)}) > 1


@pytest.mark.parametrize("make", CONTROLLERS)
@pytest.mark.parametrize("num_points", [0, 1])
def test_from_nothing_it_draws_from_the_whole_pool(make, num_points):
    picks = {pick(make, history_of(num_points), 0, seed) for seed in range(40)}
    assert len(picks) > 30 and min(picks) < 60 and max(picks) > len(POINTS) - 60


@pytest.mark.parametrize("make", CONTROLLERS)
@pytest.mark.parametrize(("num_points", "num_candidates"), [(2, 1), (2, 5), (5, 5), (6, 5), (7, 3)])
def test_every_length_of_history_gives_finite_scores(make, num_points, num_candidates):
    history, draws = history_of(num_points, num_candidates=num_candidates), generator()
    scores = make(CHOICES, draws).scores(history, POINTS[:7], draws, False)
    assert scores.shape == (7,) and scores.isfinite().all()


@pytest.mark.parametrize("make", CONTROLLERS)
def test_equal_rewards_give_finite_scores(make):
    history, draws = History(POINTS[:6], torch.full((6,), 0.5), 3), generator()
    assert make(CHOICES, draws).scores(history, POINTS, draws, False).isfinite().all()


@pytest.mark.parametrize("make", CONTROLLERS)
def test_one_parameter_with_one_choice_is_enough(make):
    draws = generator()
    history = History(torch.zeros(2, 1, dtype=torch.int64), torch.tensor([0.1, 0.2]), 2)
    pool = torch.zeros(1, 1, dtype=torch.int64)
    picked, predicted = make([["gelu"]], draws).propose(history, pool, draws, 0)
    assert picked == 0 and 0 < predicted < 0.3


def test_a_controller_must_say_how_it_scores():
    with pytest.raises(NotImplementedError):
        Controller().propose(history_of(2), POINTS, generator(), 0)


# Each by itself


def test_the_original_explores_uniformly():
    pool = POINTS[:4]
    counts = torch.bincount(
        torch.tensor([pick(RewardLSTM, history_of(9), 1, s, pool) for s in range(200)])
    )
    assert counts.min() > 30 and len(counts) == 4


def test_what_the_original_reads_by_hand():
    """The best of all, the best of the previous episode, all candidates of it; then the candidate."""
    rewards = torch.tensor([0.3, 0.5, 0.1, 0.4, 0.2, 0.3, 0.6, 0.0])
    history = History(POINTS[:8], rewards, 3)
    assert [history.ranked(episode) for episode in range(3)] == [
        [-1, -1, -1, -1, -1],
        [1, 1, 0, 1, 2],
        [1, 3, 3, 4, 5],
    ]
    points, read = RewardLSTM.sequences(history, 2, POINTS[100:102])
    for place, candidate in enumerate(POINTS[100:102]):
        expected = torch.stack([*POINTS[[1, 3, 3, 4, 5]], candidate]) + 1
        assert torch.equal(points[place], expected)
        assert torch.equal(read[place], torch.tensor([0.5, 0.4, 0.4, 0.2, 0.3, 0.0]))
    none, nothing = RewardLSTM.sequences(history, 0, POINTS[:1])
    assert not none[0, :-1].any() and not nothing.any()


def test_the_original_learns_after_each_episode_and_is_kept():
    """Within an episode its predictions stand; what it learned is where the next episode begins."""
    whole = history_of(12)

    def state(num_points: int) -> list[torch.Tensor]:
        draws = generator()
        controller = RewardLSTM(CHOICES, draws)
        history = History(whole.points_TF[:num_points], whole.rewards_T[:num_points], 5)
        controller.scores(history, POINTS, draws, False)
        return [weights.clone() for weights in controller.parameters()]

    def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
        return all(map(torch.equal, one, other))

    untrained = [weights.clone() for weights in RewardLSTM(CHOICES, generator()).parameters()]
    assert same(state(4), untrained) and not same(state(5), untrained)
    assert same(state(5), state(9)) and not same(state(9), state(10))
    kept = RewardLSTM(CHOICES, generator())
    kept._learn(whole, 1)
    assert same(state(5), list(kept.parameters()))
    kept.scores(whole, POINTS, generator(), False)
    assert same(state(10), list(kept.parameters()))
    kept.scores(history_of(5, seed=1), POINTS, generator(), False)  # of another search
    kept.scores(whole, POINTS, generator(), False)
    assert same(state(10), list(kept.parameters()))


@pytest.mark.parametrize("make", CONTROLLERS)
def test_a_prediction_is_in_the_rewards_own_units_and_exploring_makes_none(make):
    history, draws = history_of(20), generator()
    picked, predicted = make(CHOICES, draws).propose(history, POINTS, draws, 0)
    assert abs(predicted - float(reward_of(POINTS[[picked]]))) < 0.1
    assert make(CHOICES, draws).propose(history, POINTS, draws, 1)[1] is None


def test_the_ensembles_cell_is_torchs_lstm_for_each_member():
    """Beside it stands the linear model; torch orders its gates i, f, g, o, and our forget gate has one added."""
    controller = EnsembleLSTM(CHOICES, generator(), num_members=3, hidden_size=4)
    for weights in controller.parameters():
        torch.nn.init.normal_(weights, generator=generator(len(weights.flatten())))
    points, before = (
        POINTS[:10].view(1, 2, 5, 5).expand(3, -1, -1, -1),
        torch.randn(3, 2, 5, generator=generator()),
    )
    start, state = controller(points[:, :, :3], before[:, :, :3])
    rest, _ = controller(points[:, :, 3:], before[:, :, 3:], state)
    predicted = torch.cat([start, rest], 2)
    features = featurise(controller.tables, points[0])
    pairs = [features[..., i] * features[..., j] for i in range(6) for j in range(i, 6)]
    one_hot = torch.cat(
        [functional.one_hot(points[0, ..., f], len(CHOICES[f])) for f in range(5)], -1
    )
    phi = torch.cat([torch.ones(2, 5, 1), one_hot, features, torch.stack(pairs, -1)], -1)
    order = [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15, 8, 9, 10, 11]
    for member in range(3):
        oracle = torch.nn.LSTM(7, 4, batch_first=True)
        with torch.no_grad():
            oracle.weight_ih_l0.copy_(controller.from_token[member].T[order])
            oracle.weight_hh_l0.copy_(controller.from_state[member].T[order])
            oracle.bias_ih_l0.copy_(controller.bias[member, 0][order])
            oracle.bias_hh_l0.copy_(torch.tensor([0.0] * 4 + [1.0] * 4 + [0.0] * 8))
        hidden, _ = oracle(torch.cat([features, before[member][..., None]], -1))
        expected = (phi @ controller.w[member] + hidden @ controller.v[member])[..., 0]
        torch.testing.assert_close(predicted[member], expected)


def test_the_ensemble_explores_by_one_member_and_decides_by_their_mean():
    history = history_of(6)

    def scores(explores: bool) -> torch.Tensor:
        draws = generator()
        return EnsembleLSTM(CHOICES, draws).scores(history, POINTS, draws, explores)

    def near(a: torch.Tensor, b: torch.Tensor) -> float:
        return math.sqrt(float((a - b).square().mean())) / float(history.rewards_T.std())

    mean, member = scores(False), scores(True)
    assert near(mean, member) > 0.05
    assert spearmanr(mean, member).statistic > 0.3
    alone = EnsembleLSTM(CHOICES, generator(), num_members=1)
    assert near(alone.scores(history, POINTS, draws := generator(1), True), mean) > 0.05
    assert draws.get_state().shape == generator().get_state().shape


def test_members_of_the_ensemble_differ_most_where_nothing_was_trained():
    draws = generator()
    controller = EnsembleLSTM(CHOICES, draws, num_members=32)
    points = POINTS[POINTS[:, 0] < 2][::9]  # shallow ones
    controller.scores(History(points, reward_of(points), 5), POINTS, draws, False)
    with torch.no_grad():
        predicted, _ = controller(
            POINTS[:, None].expand(32, -1, -1, -1), torch.zeros(32, len(POINTS), 1)
        )
    spread = predicted[..., 0].std(0)
    assert spread[POINTS[:, 0] == 5].mean() > 1.3 * spread[POINTS[:, 0] < 2].mean()
