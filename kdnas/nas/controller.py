"""The controllers: LSTMs that predict the rewards of points from those of others. No Optuna.

A point of the space is the index of one choice of each parameter. Shapes: F parameters, C features,
T trained points, P points of a pool, M members, B sequences, S tokens, H hidden units.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

Arch = TypeVar("Arch")
# An episode's, where the sampler does not say so.
NUM_CANDIDATES = 5
State = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ModelRanking(Generic[Arch]):
    """The leading candidates in an episode.

    Args:
        episode: its number, from 0.
        global_best: the best of all so far, with its reward; None before the first.
        episode_best: the best of this episode so far; None at its beginning.
        previous_best: the best of the episode before; None in the first.
    """

    episode: int
    global_best: tuple[Arch, float] | None
    episode_best: tuple[Arch, float] | None
    previous_best: tuple[Arch, float] | None

    @classmethod
    def of(
        cls, trained: Sequence[tuple[Arch, float]], num_candidates: int, episode: int | None = None
    ) -> "ModelRanking[Arch]":
        """The ranking after some candidates; of two with the same reward the earlier leads.

        Args:
            trained: distinct candidates with their rewards (higher is better), in their order.
            num_candidates: candidates an episode.
            episode: the ranking at its end; None: at this point of the next candidate's episode.
        """
        if episode is None:
            episode = len(trained) // num_candidates
        start = episode * num_candidates
        trained = trained[: start + num_candidates]
        parts = (trained, trained[start:], trained[max(0, start - num_candidates) : start])
        return cls(episode, *(max(part, key=lambda pair: pair[1], default=None) for part in parts))

    def __str__(self) -> str:
        leaders = (
            ("best so far", self.global_best),
            ("best of this episode", self.episode_best),
            ("best of the one before", self.previous_best),
        )
        shown = [f"{name} {best[1]:.4f} ({best[0]})" for name, best in leaders if best]
        return f"episode {self.episode + 1}: {'; '.join(shown) or 'nothing trained yet'}"


def exploration_ratio(num_trained: int, num_candidates: int, num_episodes: int) -> float:
    """Share of an episode's picks that explore: ``1 - episode / (num_episodes - 1)``, at least 0.

    It is 1 in the first episode and 0 in the last; a single episode is the last.

    Args:
        num_trained: number of distinct trained candidates.
        num_candidates: candidates an episode.
        num_episodes: number of episodes.
    """
    left = num_episodes - 1 - num_trained // num_candidates
    return max(0, left) / (num_episodes - 1) if num_episodes > 1 else 0.0


def describe(values: Sequence[Any]) -> Tensor:
    """Features of each choice of a parameter, (choices, features), float32.

    For numbers above 0 their logarithms, scaled to reach from -1 to 1; otherwise one-hot vectors.
    """
    are_sizes = all(
        isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        for value in values
    )
    if not are_sizes or min(values) == max(values):
        return torch.eye(len(values))
    logs = torch.tensor(values, dtype=torch.float64).log()
    return (2 * (logs - logs.min()) / (logs.max() - logs.min()) - 1).float()[:, None]


def featurise(tables: Sequence[Tensor], points: Tensor) -> Tensor:
    """The features (..., C) of points (..., F), by each parameter's table of ``describe``."""
    return torch.cat([table[points[..., place]] for place, table in enumerate(tables)], -1)


def likely_feasible(
    choices: Sequence[Sequence[Any]],
    known_KF: Tensor,
    feasible_K: Tensor,
    pool_PF: Tensor,
    least: float = 0.2,
) -> Tensor:
    """Which points of a pool may keep the constraints, (P,) bool; always at least one.

    Logistic regression on the features with a penalty of 0.05 times the squared weights, by
    Newton's method. A refusal costs no training, but a good point that is never tried is lost. So
    only unlikely points are left out.

    Args:
        choices: the values of each parameter.
        known_KF: choice indices of points that were judged.
        feasible_K: whether they kept the constraints.
        pool_PF: choice indices of the pool.
        least: the probability that a point needs, or that of the likeliest point if it is lower.
    """
    tables = [describe(values) for values in choices]
    known_KC, pool_PC = (
        functional.pad(featurise(tables, points).double(), (1, 0), value=1)
        for points in (known_KF, pool_PF)
    )
    weights_C = known_KC.new_zeros(known_KC.shape[1])
    for _ in range(20):
        predicted_K = (known_KC @ weights_C).sigmoid()
        slope_C = known_KC.T @ (predicted_K - feasible_K.double()) + 0.1 * weights_C
        spread_K1 = (predicted_K * (1 - predicted_K))[:, None]
        curve_CC = known_KC.T @ (known_KC * spread_K1) + 0.1 * torch.eye(len(slope_C))
        weights_C = weights_C - torch.linalg.solve(curve_CC, slope_C)
    likely_P = (pool_PC @ weights_C).sigmoid()
    return likely_P >= likely_P.max().clamp(max=least)


@dataclass(frozen=True)
class History:
    """The trained points, in their order.

    Args:
        points_TF: choice indices, int64.
        rewards_T: their rewards, float32; higher is better.
        num_candidates: candidates an episode.
    """

    points_TF: Tensor
    rewards_T: Tensor
    num_candidates: int

    def __len__(self) -> int:
        return len(self.rewards_T)

    def _leaders(self, episode: int) -> list[int]:
        start = episode * self.num_candidates
        earlier = list(enumerate(self.rewards_T[:start].tolist()))
        ranking = ModelRanking.of(earlier, self.num_candidates)
        leaders = (ranking.global_best, ranking.previous_best)
        return [best[0] if best else -1 for best in leaders]

    def candidates(self, episode: int) -> list[int]:
        """The candidates of an episode so far, as indices of trained points."""
        start = episode * self.num_candidates
        return list(range(start, min(start + self.num_candidates, len(self))))

    def tokens(self, episode: int) -> list[int]:
        """The leaders before an episode, and its candidates: what ``EnsembleLSTM`` reads.

        The leaders are the best before the episode and the best of the episode before. All are
        indices of trained points; -1 stands for none.
        """
        return [*self._leaders(episode), *self.candidates(episode)]

    def ranked(self, episode: int) -> list[int]:
        """The leaders before an episode, and the candidates of the one before, for ``RewardLSTM``.

        In the first episode there are as many, and each is -1: none.
        """
        previous = self.candidates(episode - 1) if episode else [-1] * self.num_candidates
        return [*self._leaders(episode), *previous]


class Controller(nn.Module):
    """Predicts rewards, and picks a point of a pool.

    torch's global generator is left as it is.
    """

    def propose(
        self, history: History, pool_PF: Tensor, generator: torch.Generator, exploration: float
    ) -> tuple[int, float | None]:
        """The pool's index of the point to train next, and its predicted reward.

        There is no prediction where it explores.

        Args:
            history: the trained points.
            pool_PF: choice indices of the points that may be picked.
            generator: source of all random draws.
            exploration: probability of a pick that explores.
        """
        explores = torch.rand((), generator=generator).item() < exploration
        if len(history) < 2:  # no difference to learn from
            return int(torch.randint(len(pool_PF), (), generator=generator)), None
        scores_P = self.scores(history, pool_PF, generator, explores)
        picked = int(scores_P.argmax())
        return picked, None if explores else float(scores_P[picked])

    def scores(
        self, history: History, pool_PF: Tensor, generator: torch.Generator, explores: bool
    ) -> Tensor:
        """Learn from at least two points, and score the pool, (P,).

        The scores are predicted rewards, unless it explores.
        """
        raise NotImplementedError


class RewardLSTM(Controller):
    """The original's: one LSTM, kept through the search, over embedded choices.

    It reads the best of all, the best of the previous episode, and all candidates of the previous
    episode, each with its reward; then a candidate, whose reward it predicts. After each episode it
    learns, by squared error, from the candidates of all episodes. A pick that explores is a uniform
    draw.

    Nothing of it is stored: in a search that goes on it begins with the same weights again, and
    learns after each episode in turn.

    Args:
        choices: the values of each parameter.
        generator: source of its first weights.
        embedding_size: size of each choice's embedding.
        hidden_size: size of the LSTM.
        num_updates: steps of Adam after an episode.
        learning_rate: learning rate of Adam.

    Source: Trivedi et al. 2023, "Neural Architecture Search for Effective Teacher-Student Knowledge
        Transfer in Language Models"; the sizes, the number of steps and the rate are ours.
    """

    def __init__(
        self,
        choices: Sequence[Sequence[Any]],
        generator: torch.Generator,
        embedding_size: int = 16,
        hidden_size: int = 64,
        num_updates: int = 60,
        learning_rate: float = 1e-2,
    ) -> None:
        super().__init__()
        self.num_updates, self.learning_rate = num_updates, learning_rate
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            # Index 0 stands for "none yet" and stays at zero.
            self.embeddings = nn.ModuleList(
                nn.Embedding(len(values) + 1, embedding_size, padding_idx=0) for values in choices
            )
            self.lstm = nn.LSTM(len(choices) * embedding_size + 1, hidden_size, batch_first=True)
            self.head = nn.Linear(hidden_size, 1)
        self._first = copy.deepcopy(self.state_dict())
        self._begin()

    def _begin(self) -> None:
        self.load_state_dict(self._first)
        self._optimizer = torch.optim.Adam(self.parameters(), self.learning_rate, fused=True)
        self._learned: list[float] = []  # the rewards of the episodes that it has learned from

    def forward(self, points_BSF: Tensor, rewards_BS: Tensor) -> Tensor:
        """The reward of each sequence's last point, (B,).

        Choice indices count from 1; 0 stands for none. ``rewards_BS`` are the rewards of the
        points, 0 for the last.
        """
        embedded = [table(points_BSF[..., place]) for place, table in enumerate(self.embeddings)]
        hidden_BSH, _ = self.lstm(torch.cat([*embedded, rewards_BS[..., None]], -1))
        return self.head(hidden_BSH[:, -1])[:, 0]

    def scores(
        self, history: History, pool_PF: Tensor, generator: torch.Generator, explores: bool
    ) -> Tensor:
        if explores:
            return torch.rand(len(pool_PF), generator=generator)
        if history.rewards_T[: len(self._learned)].tolist() != self._learned:
            self._begin()  # of another search, or workers have ended in another order
        now = len(history) // history.num_candidates
        for episode in range(len(self._learned) // history.num_candidates, now):
            self._learn(history, episode + 1)
        with torch.no_grad():
            return self(*self.sequences(history, now, pool_PF))

    @staticmethod
    def sequences(history: History, episode: int, points_BF: Tensor) -> tuple[Tensor, Tensor]:
        """What is read before each point of an episode, and the point: ``forward``'s arguments."""
        # The last row, which -1 finds, stands for none.
        known_TF = functional.pad(history.points_TF + 1, (0, 0, 0, 1))
        rewards_T = functional.pad(history.rewards_T, (0, 1))
        before_S = torch.tensor(history.ranked(episode))
        before_BSF = known_TF[before_S].expand(len(points_BF), -1, -1)
        rewards_BS = rewards_T[before_S].expand(len(points_BF), -1)
        points_BSF = torch.cat([before_BSF, points_BF[:, None] + 1], 1)
        return points_BSF, functional.pad(rewards_BS, (0, 1))

    def _learn(self, history: History, num_episodes: int) -> None:
        """Learn from every candidate of the first episodes."""
        episodes = [
            self.sequences(history, episode, history.points_TF[history.candidates(episode)])
            for episode in range(num_episodes)
        ]
        points_BSF, rewards_BS = map(torch.cat, zip(*episodes, strict=True))
        for _ in range(self.num_updates):
            predicted_B = self(points_BSF, rewards_BS)
            loss = (predicted_B - history.rewards_T[: len(predicted_B)]).square().mean()
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
        self._learned = history.rewards_T[: len(predicted_B)].tolist()


class EnsembleLSTM(Controller):
    """Ours: linear models with small LSTMs, which disagree where little is known.

    A member predicts ``w . phi(point) + v . h``: phi is 1, each choice one-hot, the features and
    their products; h is the state of the member's LSTM after the same tokens as the original's and
    the point itself. Members differ in their first weights and in the weight of each trained point
    (exponential draws, the Bayesian bootstrap). They train on random sequences of all trained
    points, so that each point is learned in many places. The mean decides; a pick that explores
    trusts one member, drawn at random (Thompson sampling).

    Args:
        choices: the values of each parameter.
        generator: source of its first weights.
        num_members: number of LSTMs.
        hidden_size: size of each.
        num_updates: steps of Adam.
        learning_rate: learning rate of Adam.

    Source: Osband et al. 2016, "Deep Exploration via Bootstrapped DQN", for ensembles as posterior
        draws.
    """

    NUM_SEQUENCES = 8
    MAX_TOKENS = 8
    # Of the squares of w and v, beside the squared error of standardised rewards.
    WEIGHT_DECAY = 1e-3

    def __init__(
        self,
        choices: Sequence[Sequence[Any]],
        generator: torch.Generator,
        num_members: int = 8,
        hidden_size: int = 16,
        num_updates: int = 40,
        learning_rate: float = 0.02,
    ) -> None:
        super().__init__()
        self.num_updates, self.learning_rate = num_updates, learning_rate
        self.tables = [describe(values) for values in choices]
        self.one_hots = [torch.eye(len(values)) for values in choices]
        num_features = sum(table.shape[1] for table in self.tables)
        num_choices = sum(map(len, choices))
        self.pairs = torch.triu_indices(num_features, num_features)

        def drawn(fan_in: int) -> nn.Parameter:
            weights = torch.randn(num_members, fan_in, 4 * hidden_size, generator=generator)
            return nn.Parameter(weights / fan_in**0.5)

        self.from_token, self.from_state = drawn(num_features + 1), drawn(hidden_size)
        self.bias = nn.Parameter(torch.zeros(num_members, 1, 4 * hidden_size))
        self.v = nn.Parameter(torch.zeros(num_members, hidden_size, 1))
        size_of_phi = 1 + num_choices + num_features + self.pairs.shape[1]
        self.w = nn.Parameter(torch.zeros(num_members, size_of_phi, 1))

    def forward(
        self, points_MBSF: Tensor, before_MBS: Tensor, state: State | None = None
    ) -> tuple[Tensor, State]:
        """The standardised reward of each token's point, (M, B, S), and the state after the last.

        ``before_MBS`` is the standardised reward of the token before each.
        """
        size = before_MBS.shape
        # Flat in sequences and tokens: one matrix product a member.
        features_MNC = featurise(self.tables, points_MBSF).flatten(1, 2)
        before_MN1 = before_MBS.flatten(1)[..., None]
        products_MND = features_MNC[..., self.pairs[0]] * features_MNC[..., self.pairs[1]]
        one_hot_MND = featurise(self.one_hots, points_MBSF).flatten(1, 2)
        ones_MN1 = torch.ones_like(before_MN1)
        phi_MND = torch.cat([ones_MN1, one_hot_MND, features_MNC, products_MND], -1)

        tokens_MND = torch.cat([features_MNC, before_MN1], -1)
        gates_MNG = torch.baddbmm(self.bias, tokens_MND, self.from_token)
        hidden_MBH, cell_MBH = state or (torch.zeros(*size[:2], self.v.shape[1]),) * 2
        hidden = []
        for gates_MBG in gates_MNG.unflatten(1, size[1:]).unbind(2):
            gates_MBG = torch.baddbmm(gates_MBG, hidden_MBH, self.from_state)
            enter, keep, leave, new = gates_MBG.chunk(4, -1)
            cell_MBH = (keep + 1).sigmoid() * cell_MBH + enter.sigmoid() * new.tanh()
            hidden_MBH = leave.sigmoid() * cell_MBH.tanh()
            hidden.append(hidden_MBH)
        predicted_MN1 = phi_MND @ self.w + torch.stack(hidden, 2).flatten(1, 2) @ self.v
        return predicted_MN1.view(size), (hidden_MBH, cell_MBH)

    def scores(
        self, history: History, pool_PF: Tensor, generator: torch.Generator, explores: bool
    ) -> Tensor:
        std = history.rewards_T.std().clamp_min(1e-9)
        rewards_T = (history.rewards_T - history.rewards_T.mean()) / std
        self._learn(history.points_TF, rewards_T, generator)

        num_members, size = len(self.w), (len(self.w), len(pool_PF))
        now = len(history) // history.num_candidates
        tokens = [token for token in history.tokens(now) if token >= 0]
        before_S = functional.pad(rewards_T[tokens], (1, 0))
        with torch.no_grad():
            context_M1SF = history.points_TF[tokens].expand(num_members, 1, -1, -1)
            _, (hidden, cell) = self(context_M1SF, before_S[:-1].expand(num_members, 1, -1))
            state = (hidden.expand(*size, -1), cell.expand(*size, -1))
            pool_MP1F = pool_PF[:, None].expand(*size, 1, -1)
            predicted_MP1, _ = self(pool_MP1F, before_S[-1].expand(*size, 1), state)
        predicted_MP1 = predicted_MP1 * std + history.rewards_T.mean()
        if explores:
            return predicted_MP1[int(torch.randint(num_members, (), generator=generator)), :, 0]
        return predicted_MP1.mean(0)[:, 0]

    def _learn(self, points_TF: Tensor, rewards_T: Tensor, generator: torch.Generator) -> None:
        size = (len(self.w), self.NUM_SEQUENCES, len(rewards_T))
        counts_MT = torch.empty(size[0], size[2]).exponential_(generator=generator)
        optimizer = torch.optim.Adam(self.parameters(), self.learning_rate, fused=True)
        num_tokens = min(self.MAX_TOKENS, len(rewards_T))
        for _ in range(self.num_updates):
            draws = torch.rand(size, generator=generator)
            tokens_MBS = draws.topk(num_tokens, largest=False).indices
            rewards_MBS = rewards_T[tokens_MBS]
            before_MBS = functional.pad(rewards_MBS[..., :-1], (1, 0))
            predicted_MBS, _ = self(points_TF[tokens_MBS], before_MBS)
            weights_MBS = counts_MT[:, None].expand(size).gather(2, tokens_MBS)
            # Summed over members: each learns by itself.
            error = (weights_MBS * (predicted_MBS - rewards_MBS).square()).mean((1, 2)).sum()
            loss = error + self.WEIGHT_DECAY * (self.w.square().sum() + self.v.square().sum())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
