"""Controllers: LSTMs that predict the reward of a point from the rewards of other points.

A point of the search space is a vector of F choice indices, one for each parameter. A candidate is
a point that is trained. Candidates are counted in episodes: an episode is a fixed number of
consecutive candidates.

Letters in the names of tensors: F parameters, C features, T trained points, K points whose
constraints were checked, P points of a pool (those that may be proposed), M members of an ensemble,
B sequences, S tokens (points of a sequence), H hidden units. Nothing here depends on Optuna.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

Arch = TypeVar("Arch")
# Candidates in an episode, where the sampler does not set it.
NUM_CANDIDATES = 5
State = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ModelRanking(Generic[Arch]):
    """The best candidates at some moment of an episode, each as a pair with its reward.

    An episode is a fixed number of consecutive candidates.

    Args:
        episode: number of the episode, from 0.
        global_best: best of all candidates so far; None before the first candidate.
        episode_best: best candidate of this episode so far; None before its first candidate.
        previous_best: best candidate of the episode before; None in the first episode.
    """

    episode: int
    global_best: tuple[Arch, float] | None
    episode_best: tuple[Arch, float] | None
    previous_best: tuple[Arch, float] | None

    @classmethod
    def of(
        cls, trained: Sequence[tuple[Arch, float]], num_candidates: int, episode: int | None = None
    ) -> "ModelRanking[Arch]":
        """Find the best candidates: of all, of an episode and of the episode before.

        Args:
            trained: distinct candidates with their rewards (higher is better), in order of
                training.
            num_candidates: number of candidates in an episode.
            episode: number of the episode at whose end to rank. None: rank now, in the episode of
                the next candidate.
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
    """Return the probability that the next pick explores instead of taking the best prediction.

    It is ``1 - episode / (num_episodes - 1)``, at least 0, for the next candidate's episode,
    counted from 0. So it falls from 1 in the first episode to 0 in the last. If there is only one
    episode, it is 0.

    Args:
        num_trained: number of distinct trained candidates so far.
        num_candidates: number of candidates in an episode.
        num_episodes: number of episodes.
    """
    left = num_episodes - 1 - num_trained // num_candidates
    return max(0, left) / (num_episodes - 1) if num_episodes > 1 else 0.0


def describe(values: Sequence[Any]) -> Tensor:
    """Return the features of each choice of a parameter, shape (choices, features), float32.

    If all choices are numbers above 0, and not all equal, each has one feature: its logarithm,
    scaled to [-1, 1] over the choices. Else the features of a choice are a one-hot vector.

    Args:
        values: the choices.
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
    """Return the C features of each point (student shape), shape (..., C).

    Args:
        tables: for each of the F parameters, the result of ``describe`` for its choices.
        points: for each point, the index of its choice for each parameter, shape (..., F).
    """
    return torch.cat([table[points[..., place]] for place, table in enumerate(tables)], -1)


def likely_feasible(
    choices: Sequence[Sequence[Any]],
    known_KF: Tensor,
    feasible_K: Tensor,
    pool_PF: Tensor,
    least: float = 0.2,
) -> Tensor:
    """Predict which points of a pool may meet the constraints.

    The predictor is a logistic regression on the points' features, with a penalty of 0.05 times the
    squared weights, fitted by Newton's method. Only unlikely points are dropped: proposing an
    infeasible point costs no training, but a dropped good point is lost.

    Args:
        choices: values of each parameter.
        known_KF: choice indices of points whose constraints were checked.
        feasible_K: whether each point of ``known_KF`` met the constraints, bool.
        pool_PF: choice indices of the points of the pool.
        least: points with at least this predicted probability are kept; if there are none, the
            likeliest point is kept.

    Returns:
        For each point of the pool, whether to keep it, shape (P,), bool; True for at least one.
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
    """The trained points (student shapes as choice indices), in order of training.

    Args:
        points_TF: choice indices of the points, int64.
        rewards_T: rewards of the points, float32; higher is better.
        num_candidates: number of candidates in an episode.
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
        """Return the points that were trained in an episode so far.

        Each is given by its row in ``points_TF``, the array of all trained points.
        """
        start = episode * self.num_candidates
        return list(range(start, min(start + self.num_candidates, len(self))))

    def tokens(self, episode: int) -> list[int]:
        """Return the points that ``EnsembleLSTM`` reads before it predicts a reward in an episode.

        They are the best point of all earlier episodes, the best of the episode just before, and
        the points of this episode so far. Each is given by its row in ``points_TF``, the array of
        all trained points; -1: none.
        """
        return [*self._leaders(episode), *self.candidates(episode)]

    def ranked(self, episode: int) -> list[int]:
        """Return the points that ``RewardLSTM`` reads before it predicts a reward in an episode.

        They are the best point of all earlier episodes, the best of the episode just before, and
        all points of the episode just before. Each is given by its row in ``points_TF``, the array
        of all trained points. In the first episode all are -1, for none.
        """
        previous = self.candidates(episode - 1) if episode else [-1] * self.num_candidates
        return [*self._leaders(episode), *previous]


class Controller(nn.Module):
    """Predicts rewards, and picks the next point (student shape) to train from a pool of points.

    A pick either takes the highest prediction or explores; each subclass explores in its own way.
    torch's global random number generator is left unchanged.
    """

    def propose(
        self, history: History, pool_PF: Tensor, generator: torch.Generator, exploration: float
    ) -> tuple[int, float | None]:
        """Pick the point to train next.

        With fewer than two trained points, the pick is a uniform draw.

        Args:
            history: the trained points.
            pool_PF: choice indices of the points that may be picked.
            generator: source of all random draws.
            exploration: probability that this pick explores.

        Returns:
            The index of the picked point in the pool, and its predicted reward; None instead of the
            reward if the pick explores or is a uniform draw.
        """
        explores = torch.rand((), generator=generator).item() < exploration
        if len(history) < 2:  # a model needs two rewards to compare
            return int(torch.randint(len(pool_PF), (), generator=generator)), None
        scores_P = self.scores(history, pool_PF, generator, explores)
        picked = int(scores_P.argmax())
        return picked, None if explores else float(scores_P[picked])

    def scores(
        self, history: History, pool_PF: Tensor, generator: torch.Generator, explores: bool
    ) -> Tensor:
        """Train the controller and score the points of a pool; the highest score is picked.

        Args:
            history: at least two trained points, from which the controller learns.
            pool_PF: choice indices of the points to score.
            generator: source of all random draws.
            explores: whether the pick explores; if not, the scores must be predicted rewards.

        Returns:
            The score of each point, shape (P,).
        """
        raise NotImplementedError


class RewardLSTM(Controller):
    """Controller of Trivedi et al. 2023: one LSTM over embedded choices, for the whole search.

    The LSTM reads the best point of all earlier episodes, the best of the previous episode, and all
    points of the previous episode, each with its reward. Then it reads a new point, whose reward it
    predicts. After each episode it is trained, by squared error, on the points of all episodes so
    far. A pick that explores is a uniform draw.

    The LSTM's weights are not stored. A resumed search repeats the training of all past episodes
    from the same initial weights.

    Args:
        choices: values of each parameter.
        generator: source of the initial weights.
        embedding_size: size of the embedding of a choice.
        hidden_size: size of the LSTM's hidden state.
        num_updates: steps of Adam after each episode.
        learning_rate: learning rate of Adam.

    Source: Trivedi et al. 2023, "Neural Architecture Search for Effective Teacher-Student Knowledge
        Transfer in Language Models"; the sizes, the number of steps and the learning rate are
        kdnas's own.
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
        self._learned: list[float] = []  # rewards of the episodes that it was trained on

    def forward(self, points_BSF: Tensor, rewards_BS: Tensor) -> Tensor:
        """Predict the reward of each sequence's last point, shape (B,).

        Args:
            points_BSF: choice indices of the points, counted from 1; 0 stands for no point.
            rewards_BS: rewards of the points; 0 for the last, whose reward is predicted.
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
            self._begin()  # the history is of another search, or its order has changed
        now = len(history) // history.num_candidates
        for episode in range(len(self._learned) // history.num_candidates, now):
            self._learn(history, episode + 1)
        with torch.no_grad():
            return self(*self.sequences(history, now, pool_PF))

    @staticmethod
    def sequences(history: History, episode: int, points_BF: Tensor) -> tuple[Tensor, Tensor]:
        """Return the arguments of ``forward`` with which it predicts the rewards of these points.

        Args:
            history: the trained points.
            episode: number of the episode in which to predict, from 0.
            points_BF: choice indices of the points.

        Returns:
            Two tensors, with a row for each point: the trained points that the LSTM reads first
            (``History.ranked``), then the point; and the trained points' rewards, then 0.
        """
        # Index -1 finds the last row, which stands for none.
        known_TF = functional.pad(history.points_TF + 1, (0, 0, 0, 1))
        rewards_T = functional.pad(history.rewards_T, (0, 1))
        before_S = torch.tensor(history.ranked(episode))
        before_BSF = known_TF[before_S].expand(len(points_BF), -1, -1)
        rewards_BS = rewards_T[before_S].expand(len(points_BF), -1)
        points_BSF = torch.cat([before_BSF, points_BF[:, None] + 1], 1)
        return points_BSF, functional.pad(rewards_BS, (0, 1))

    def _learn(self, history: History, num_episodes: int) -> None:
        """Train the LSTM on all points of the first ``num_episodes`` episodes."""
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
    """Controller of kdnas: an ensemble of linear models with small LSTMs.

    A member of the ensemble predicts ``w . phi(point) + v . h``, with weights w and v. phi is the
    vector of 1, the one-hot choices, the features from ``describe``, and the products of every two
    features. h is the hidden state of the member's LSTM after it has read the best points of
    earlier episodes and the points of this episode (``History.tokens``), then the point itself.

    Members differ in their initial weights and in the random weight that each gives to a trained
    point (as in the Bayesian bootstrap), so they disagree where few points were trained. They learn
    from random sequences of trained points, so that each point is learned at many positions.

    The predicted reward is the mean of the members' predictions. A pick that explores uses one
    random member's predictions instead (Thompson sampling). ``LSTMSampler`` makes a new ensemble
    for each pick.

    Args:
        choices: values of each parameter.
        generator: source of the initial weights.
        num_members: number of members.
        hidden_size: size of each member's LSTM.
        num_updates: steps of Adam for each pick.
        learning_rate: learning rate of Adam.

    Source: Osband et al. 2016, "Deep Exploration via Bootstrapped DQN", for ensembles as posterior
        draws.
    """

    NUM_SEQUENCES = 8
    MAX_TOKENS = 8
    # Penalty on the squares of w and v, added to the squared error of standardised rewards.
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
        """Predict the standardised reward (mean 0, variance 1) of each point of some sequences.

        Args:
            points_MBSF: choice indices of the points.
            before_MBS: standardised reward of the point before each point; 0 for the first.
            state: hidden and cell state of the LSTMs before the first point, each (M, B, H); None:
                zeros.

        Returns:
            Predicted rewards (M, B, S), and the hidden and cell state after the last point.
        """
        size = before_MBS.shape
        # Flattened over sequences and tokens: one matrix product for each member.
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
            # A sum over members, so that each is trained as if alone.
            error = (weights_MBS * (predicted_MBS - rewards_MBS).square()).mean((1, 2)).sum()
            loss = error + self.WEIGHT_DECAY * (self.w.square().sum() + self.v.square().sum())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
