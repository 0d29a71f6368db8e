"""Objectives on whole rows: [CLS] or mean states, similarities of rows, comparisons of pairs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from kdnas.data.tokens import pairs
from kdnas.distillation.losses import squared_error
from kdnas.distillation.narrowing import fit_linear
from kdnas.distillation.objectives import Criterion, Objective, Term, View
from kdnas.distillation.start import Started
from kdnas.system.errors import UserError


class SentenceState(Objective):
    """Squared error of one projected vector per row, divided by the teacher vectors' variance.

    A row's vector is its [CLS] hidden state in the last layer, or the mean of its real tokens'
    hidden states there. The student's vector is projected to the teacher's width.

    Args:
        pooling: ``cls`` (the first token) or ``mean``.

    Raises:
        UserError: ``pooling`` is neither ``cls`` nor ``mean``.
    """

    def __init__(self, pooling: str = "cls") -> None:
        if pooling not in ("cls", "mean"):
            raise UserError(f"SentenceState: pooling is {pooling!r}: give cls or mean.")
        self.pooling = pooling

    def teacher_layers(self, num_student_layers: int, num_teacher_layers: int) -> set[int]:
        return {num_teacher_layers - 1}

    def criterion(self, student: PreTrainedModel, teacher: PreTrainedModel) -> Criterion:
        return _SentenceState(self.pooling, student.config.hidden_size, teacher.config.hidden_size)


class _SentenceState(Criterion):
    variance: Tensor

    def __init__(self, pooling: str, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.pooling = pooling
        self.terms = [Term(f"sentence_{pooling}", 1.0)]
        self.projection = nn.Linear(student_width, teacher_width)
        self.register_buffer("variance", torch.ones(()))

    def _vector(self, view: View) -> Tensor:
        if self.pooling == "mean":
            return view.pooled(view.mask_BT)
        return view.padded(view.model.config.num_hidden_layers - 1)[:, 0].float()

    def forward(self, student: View, teacher: View) -> list[tuple[Tensor, int]]:
        predicted = self.projection(self._vector(student))
        return [(squared_error(predicted, self._vector(teacher)) / self.variance, len(predicted))]

    def fit(self, started: Started, students: Sequence[View], teachers: Sequence[View]) -> None:
        inputs = torch.cat([self._vector(view) for view in students])
        targets = torch.cat([self._vector(view) for view in teachers])
        self.variance.copy_(targets.var(0, correction=0).mean().clamp_min(1e-6))
        fit_linear(self.projection, inputs, targets, strength=1e-3)


class SentenceSimilarity(Objective):
    """Squared difference between the student's and the teacher's similarities of rows in a batch.

    Let s_i and t_i be the means of row i's last-layer hidden states in student and teacher. The
    error of row i is the mean over the other rows j of ``(cos(s_i, s_j) - cos(t_i, t_j))^2``,
    divided by the variance of the teacher's cosines. There is no projection, so the student's own
    vectors can be used for cosine search, like the teacher's. No other objective depends on which
    rows share a batch.

    Source: after Passalis and Tefas 2018, who match the cosines of a batch as probabilities.
    """

    def teacher_layers(self, num_student_layers: int, num_teacher_layers: int) -> set[int]:
        return {num_teacher_layers - 1}

    def criterion(self, student: PreTrainedModel, teacher: PreTrainedModel) -> Criterion:
        return _SentenceSimilarity()


class _SentenceSimilarity(Criterion):
    variance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.terms = [Term("sentence_similarity", 1.0)]
        self.register_buffer("variance", torch.ones(()))

    @staticmethod
    def cosines(view: View) -> Tensor:
        """Return the cosine similarity of each row with each other row of the batch, (B, B - 1)."""
        vectors_BH = F.normalize(view.pooled(view.mask_BT))
        others = ~torch.eye(len(vectors_BH), dtype=torch.bool, device=vectors_BH.device)
        with torch.autocast(vectors_BH.device.type, enabled=False):
            return (vectors_BH @ vectors_BH.T)[others].view(len(vectors_BH), len(vectors_BH) - 1)

    def forward(self, student: View, teacher: View) -> list[tuple[Tensor, int]]:
        ours, theirs = self.cosines(student), self.cosines(teacher)
        num_others = ours.shape[1]  # a row alone has nothing to be compared with
        error = (ours - theirs).square().sum() / max(num_others, 1) / self.variance
        return [(error, len(ours) if num_others else 0)]

    def fit(self, started: Started, students: Sequence[View], teachers: Sequence[View]) -> None:
        cosines = torch.cat([self.cosines(view).flatten() for view in teachers])
        if len(cosines) > 1:
            self.variance.copy_(cosines.var(correction=0).clamp_min(1e-6))


class PairComparison(Objective):
    """Error of predicting, from the student's [CLS], how the teacher's vectors of a pair differ.

    Let u and v be the means of the teacher's last-layer hidden states over the first and the second
    sentence of a pair. A small head on the student's last-layer [CLS] state predicts ``|u - v|``
    and ``cos(u, v)``, both standardised. The error is the mean of their two mean squared errors.
    The objective needs rows that are sentence pairs (``data.pair_share``), but no labels. It
    prepares [CLS] for fine-tuning on pairs. It works best with teachers whose mean hidden states
    carry meaning, such as sentence encoders.
    """

    def teacher_layers(self, num_student_layers: int, num_teacher_layers: int) -> set[int]:
        return {num_teacher_layers - 1}

    def criterion(self, student: PreTrainedModel, teacher: PreTrainedModel) -> Criterion:
        return _PairComparison(student.config.hidden_size, teacher.config.hidden_size)


class _PairComparison(Criterion):
    mean: Tensor
    std: Tensor

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.terms = [Term("pair_comparison", 1.0)]
        self.head = nn.Sequential(
            nn.Linear(student_width, student_width),
            nn.GELU(),
            nn.Linear(student_width, teacher_width + 1),
        )
        self.register_buffer("mean", torch.zeros(teacher_width + 1))
        self.register_buffer("std", torch.ones(teacher_width + 1))

    @staticmethod
    def comparison(teacher: View) -> tuple[Tensor, Tensor]:
        """Return the indices of the pairs in a batch, (P,), and the targets to predict, (P, H + 1).

        The targets are ``|u - v|`` and ``cos(u, v)``, where u and v are the mean teacher states of
        a pair's two sentences.
        """
        second = teacher.batch["token_type_ids"].bool()
        paired = pairs(teacher.batch)
        u = teacher.pooled(teacher.mask_BT & ~second)[paired]
        v = teacher.pooled(second)[paired]
        return paired, torch.cat([(u - v).abs(), F.cosine_similarity(u, v)[:, None]], -1)

    def forward(self, student: View, teacher: View) -> list[tuple[Tensor, int]]:
        paired, target = self.comparison(teacher)
        cls = student.padded(student.model.config.num_hidden_layers - 1)[:, 0][paired]
        error = (self.head(cls).float() - (target - self.mean) / self.std).square()
        return [((error[:, :-1].mean(-1) + error[:, -1]).sum() / 2, len(target))]

    def fit(self, started: Started, students: Sequence[View], teachers: Sequence[View]) -> None:
        target = torch.cat([self.comparison(view)[1] for view in teachers])
        if len(target) > 1:
            self.mean.copy_(target.mean(0))
            std = target.std(0)
            # Some of a teacher's dimensions never vary: do not divide them by nearly 0.
            std[:-1].clamp_min_(0.1 * float(std[:-1].mean()))
            self.std.copy_(std.clamp_min(1e-6))
