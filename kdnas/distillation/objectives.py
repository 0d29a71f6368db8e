"""What a student is asked to know of its teacher: terms of the loss, and weighted sums of them.

An objective is a frozen part of the recipe. It makes a criterion: the module that gives the errors
of a batch, and holds what is trained beside the student (projections). Shapes: B rows, T padded
tokens, N real tokens, H a width, A heads.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from kdnas.data.datamodule import Batch
from kdnas.data.tokens import real_tokens
from kdnas.distillation.losses import attention_map, masked_softmax, ridge_map, squared_error
from kdnas.distillation.narrowing import fit_linear
from kdnas.distillation.start import Started
from kdnas.models.encoders import matmul_dtype
from kdnas.models.families import Family, attention_part, family_of
from kdnas.models.layers import LastAndSkip, LayerMapping
from kdnas.system.errors import UserError


class View:
    """One model's states on a batch; layer -1 is the embedding.

    Args:
        model: the model that gave the states.
        batch: the batch that it saw.
        padded: layer -> states of all tokens, (B, T, H).
        real: layer -> states of the real tokens alone, (N, H).
        maps: attention maps of each layer, (B, A, T, T), where the model gave them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: Batch,
        padded: dict[int, Tensor] | None = None,
        real: dict[int, Tensor] | None = None,
        maps: Sequence[Tensor] | None = None,
    ) -> None:
        self.model, self.batch, self._maps = model, batch, maps
        self.mask_BT = batch["attention_mask"].bool()
        self._padded, self._real = padded or {}, real or {}
        self._inputs: dict[int, Tensor] = {}

    @property
    def family(self) -> Family:
        """What kdnas knows of the model's family."""
        return family_of(self.model.config)

    def real(self, layer: int) -> Tensor:
        """States of the real tokens, (N, H)."""
        if layer not in self._real:
            states_NH = self._padded[layer].flatten(0, 1)
            self._real[layer] = states_NH.index_select(0, real_tokens(self.batch))
        return self._real[layer]

    def padded(self, layer: int) -> Tensor:
        """States of all tokens, (B, T, H); padding is 0 or anything."""
        if layer not in self._padded:
            states_NH = self._real[layer]
            padded = states_NH.new_zeros(self.mask_BT.numel(), states_NH.shape[-1])
            # In place: without, autocast refuses stored states.
            padded.index_copy_(0, real_tokens(self.batch), states_NH)
            self._padded[layer] = padded.view(*self.mask_BT.shape, -1)
        return self._padded[layer]

    def _input(self, layer: int) -> Tensor:
        """What the queries, keys and values of a layer are computed from."""
        if layer not in self._inputs:
            states = self.padded(layer - 1)
            if self.family.norm_first:
                module = self.family.layers(self.model)[layer]
                norm = module.get_submodule(self.family.names.attention_norm)
                # Stored states are float16, which GPUs do not mix with float32.
                states = norm(states.to(self.model.dtype))
            self._inputs[layer] = states.to(matmul_dtype(self.model))
        return self._inputs[layer]

    def heads(self, layer: int, part: str, num_heads: int, chosen: Tensor | None = None) -> Tensor:
        """Queries, keys or values of the chosen heads of a layer, (B, A, T, H / num_heads)."""
        module = self.family.layers(self.model)[layer]
        weight, bias = attention_part(self.family, module, part)
        if chosen is not None:
            weight = weight.unflatten(0, (num_heads, -1))[chosen].flatten(0, 1)
            if bias is not None:
                bias = bias.unflatten(0, (num_heads, -1))[chosen].flatten()
            num_heads = len(chosen)
        flat_BTH = F.linear(self._input(layer), weight, bias)
        return flat_BTH.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    def attention(self, layer: int, chosen: Tensor | None = None) -> Tensor:
        """Attention maps of the chosen heads of a layer, or of all: (B, A, T, T)."""
        if self._maps is not None and chosen is None:
            return self._maps[layer]
        num_heads = self.model.config.num_attention_heads
        if self.family.scores is None:
            query, key = (self.heads(layer, part, num_heads, chosen) for part in ("query", "key"))
            return attention_map(query, key, self.mask_BT)
        query, key = (self.heads(layer, part, num_heads) for part in ("query", "key"))
        scores = self.family.scores(self.model, layer, query, key)
        return masked_softmax(scores if chosen is None else scores[:, chosen], self.mask_BT)

    def pooled(self, mask_BT: Tensor) -> Tensor:
        """The mean over the marked tokens of the last layer's states, in float32, (B, H)."""
        weights = mask_BT.float() / mask_BT.sum(1, keepdim=True).clamp_min(1)
        with torch.autocast(self.mask_BT.device.type, enabled=False):
            last = self.padded(self.model.config.num_hidden_layers - 1).float()
            return torch.bmm(weights[:, None], last)[:, 0]


@dataclass(frozen=True)
class Term:
    """One number that a criterion gives.

    Args:
        name: its name in the logs.
        weight: its share in the loss, relative to the other terms.
        layer: the teacher layer whose states it compares, if it is a squared error of them.
        scaled: divide by that layer's variance.
        compares: whether students can be ranked by it. Not where it depends on which layers a
            student has, for some are easier than others. (Hidden states of mapped layers count, as
            in the original, though only LastLayer and LearnedMapping ask the same of every
            student.)
    """

    name: str
    weight: float
    layer: int | None = None
    scaled: bool = False
    compares: bool = True


class Criterion(nn.Module):
    """Errors of a batch, one for each of ``terms``; its parameters are trained with the student."""

    terms: list[Term]

    @abstractmethod
    def forward(self, student: View, teacher: View) -> list[tuple[Tensor, int]]:
        """For each term the sum of its errors, and their number (of tokens or rows)."""

    def fit(self, started: Started, students: Sequence[View], teachers: Sequence[View]) -> None:
        """Set the first values from the states of the started student; by default nothing."""


class Objective(ABC):
    """What a student is asked to know."""

    @abstractmethod
    def teacher_layers(self, num_student_layers: int, num_teacher_layers: int) -> set[int]:
        """The teacher layers whose states it needs; -1 is the embedding output."""

    @abstractmethod
    def criterion(self, student: PreTrainedModel, teacher: PreTrainedModel) -> Criterion:
        """The module that measures it."""


def needed_layers(
    objective: Objective, depths: Iterable[int], num_teacher_layers: int
) -> list[int]:
    """The teacher layers that students of these depths need, ascending; the last is always one.

    Raises:
        UserError: the objective asks for a layer that is not there.
    """
    asked = (objective.teacher_layers(depth, num_teacher_layers) for depth in depths)
    needed: set[int] = set().union({num_teacher_layers - 1}, *asked)
    for layer in needed:
        if layer not in range(-1, num_teacher_layers):
            raise UserError(
                f"{type(objective).__name__} asks for teacher layer {layer!r}: "
                f"there are 0 to {num_teacher_layers - 1}, and -1, the embedding output."
            )
    return sorted(needed)


class HiddenStates(Objective):
    """The original's: mean squared error between projected student states and teacher states.

    ``mean_ij mean_n |W_ij h_i(n) - t_j(n)|^2 / (H_t var_j)`` over all pairs of a student layer i
    and one of its teacher layers j, and real tokens n. Each student layer has its own linear
    projection H_s -> k * H_t, for its k teacher layers together.

    Args:
        mapping: which teacher layers each student layer learns from.
        shared_projection: one projection for all student layers (the original's code) instead of
            one each.
        normalize: divide each layer's error by its variance, so that no layer dominates by its
            scale.
        fit_projections: begin with the best linear map for the started student, not with a random
            one.

    Raises:
        UserError: a shared projection for layers that learn from different numbers of teacher
            layers.
    """

    def __init__(
        self,
        mapping: LayerMapping = LastAndSkip(),
        shared_projection: bool = False,
        normalize: bool = True,
        fit_projections: bool = True,
    ) -> None:
        self.mapping, self.shared_projection = mapping, shared_projection
        self.normalize, self.fit_projections = normalize, fit_projections

    def teacher_layers(self, num_student_layers: int, num_teacher_layers: int) -> set[int]:
        return set().union(*self.mapping(num_student_layers, num_teacher_layers))

    def criterion(self, student: PreTrainedModel, teacher: PreTrainedModel) -> Criterion:
        return _HiddenStates(self, student, teacher)


class _HiddenStates(Criterion):
    def __init__(
        self, objective: HiddenStates, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> None:
        super().__init__()
        self.objective = objective
        ours, theirs = student.config, teacher.config
        mapped = objective.mapping(ours.num_hidden_layers, theirs.num_hidden_layers)
        self.layers = [(i, layers) for i, layers in enumerate(mapped) if layers]
        flat = [(i, layer) for i, layers in self.layers for layer in layers]
        self.terms = [
            Term(f"student_{i}_teacher_{layer}", 1 / len(flat), layer, objective.normalize)
            for i, layer in flat
        ]
        counts = [len(layers) for _, layers in self.layers]
        if objective.shared_projection and len(set(counts)) > 1:
            raise UserError(
                "shared_projection needs as many teacher layers for each student layer, "
                f"not {set(counts)}."
            )
        self.projections = nn.ModuleList(
            nn.Linear(ours.hidden_size, count * theirs.hidden_size)
            for count in (counts[:1] if objective.shared_projection else counts)
        )

    def forward(self, student: View, teacher: View) -> list[tuple[Tensor, int]]:
        errors = []
        for position, (i, layers) in enumerate(self.layers):
            projection = self.projections[0 if self.objective.shared_projection else position]
            predicted = projection(student.real(i))
            for part, layer in zip(predicted.chunk(len(layers), dim=-1), layers, strict=True):
                errors.append((squared_error(part, teacher.real(layer)), len(part)))
        return errors

    def fit(self, started: Started, students: Sequence[View], teachers: Sequence[View]) -> None:
        if not self.objective.fit_projections:
            return
        for position, projection in enumerate(self.projections):
            layers = self.layers if self.objective.shared_projection else [self.layers[position]]
            inputs = [view.real(i) for i, _ in layers for view in students]
            targets = [
                torch.cat([view.real(j) for j in js], -1) for _, js in layers for view in teachers
            ]
            fit_linear(projection, torch.cat(inputs), torch.cat(targets), strength=1e-3)


class LearnedMapping(Objective):
    """Squared errors on every teacher layer, each taught to a mixture of the student's layers.

    ``mean_j sum_i p_ij mean_n |W_ij h_i(n) - t_j(n)|^2 / (H_t var_j)`` for teacher layers j and
    student layers i. ``p_j = softmax(a_j)`` is trained with the student. It is over the student's
    layers, so no teacher layer can be left out for an easier one, and all students are asked the
    same.

    Source: after ALP-KD (Passban et al. 2021), whose mixture is over the teacher's layers.
    """

    def teacher_layers(self, num_student_layers: int, num_teacher_layers: int) -> set[int]:
        return set(range(num_teacher_layers))

    def criterion(self, student: PreTrainedModel, teacher: PreTrainedModel) -> Criterion:
        return _LearnedMapping(student.config, teacher.config)


class _LearnedMapping(Criterion):
    def __init__(self, ours: PreTrainedConfig, theirs: PreTrainedConfig) -> None:
        super().__init__()
        num_ours, num_theirs = ours.num_hidden_layers, theirs.num_hidden_layers
        self.terms = [
            Term(f"teacher_{j}", 1 / num_theirs, j, scaled=True) for j in range(num_theirs)
        ]
        self.projections = nn.ModuleList(
            nn.Linear(ours.hidden_size, num_theirs * theirs.hidden_size) for _ in range(num_ours)
        )
        self.logits = nn.Parameter(torch.zeros(num_ours, num_theirs))

    def forward(self, student: View, teacher: View) -> list[tuple[Tensor, int]]:
        targets = [teacher.real(j) for j in range(len(self.terms))]
        errors = []
        for i, projection in enumerate(self.projections):
            predicted = projection(student.real(i)).chunk(len(targets), -1)
            errors.append(torch.stack(list(map(squared_error, predicted, targets))))
        mixed = (self.logits.softmax(0) * torch.stack(errors)).sum(0)
        return [(error, len(targets[0])) for error in mixed]

    def fit(self, started: Started, students: Sequence[View], teachers: Sequence[View]) -> None:
        inputs = [
            torch.cat([view.real(i) for view in students]) for i in range(len(self.projections))
        ]
        # One after the other: all layers of a wide teacher are gigabytes.
        for j in range(len(self.terms)):
            target = torch.cat([view.real(j) for view in teachers])
            rows = slice(j * target.shape[-1], (j + 1) * target.shape[-1])
            for projection, states in zip(self.projections, inputs, strict=True):
                weight = ridge_map(states, target, strength=1e-3).float()
                parameters: Any = projection
                parameters.weight.data[rows], parameters.bias.data[rows] = weight[:-1].T, weight[-1]


class WeightedSum(Objective):
    """Several objectives; the loss is the mean of theirs, weighted.

    Args:
        objectives: the objectives.
        weights: one each, above 0, relative to each other.

    Raises:
        UserError: there is none, the numbers differ, or a weight is not above 0.
    """

    def __init__(self, objectives: list[Objective], weights: list[float]) -> None:
        if not objectives or len(objectives) != len(weights):
            raise UserError(
                f"WeightedSum: {len(objectives)} objectives and {len(weights)} weights: "
                "give one each."
            )
        for weight in weights:
            if not 0 < weight < math.inf:
                raise UserError(f"WeightedSum: a weight is {weight}: give a number above 0.")
        self.objectives, self.weights = objectives, weights

    def teacher_layers(self, num_student_layers: int, num_teacher_layers: int) -> set[int]:
        each = (o.teacher_layers(num_student_layers, num_teacher_layers) for o in self.objectives)
        return set().union(*each)

    def criterion(self, student: PreTrainedModel, teacher: PreTrainedModel) -> Criterion:
        return _WeightedSum([o.criterion(student, teacher) for o in self.objectives], self.weights)


class _WeightedSum(Criterion):
    def __init__(self, criteria: list[Criterion], weights: list[float]) -> None:
        super().__init__()
        self.criteria = nn.ModuleList(criteria)
        self.terms = [
            replace(term, weight=term.weight * weight / sum(weights))
            for criterion, weight in zip(criteria, weights, strict=True)
            for term in criterion.terms
        ]
        # Two objectives of one kind have terms of one name.
        names = [term.name for term in self.terms]
        self.terms = [
            replace(term, name=f"{term.name}_{i}") if names.count(term.name) > 1 else term
            for i, term in enumerate(self.terms)
        ]

    def forward(self, student: View, teacher: View) -> list[tuple[Tensor, int]]:
        return [error for criterion in self.criteria for error in criterion(student, teacher)]

    def fit(self, started: Started, students: Sequence[View], teachers: Sequence[View]) -> None:
        for criterion in self.criteria:
            criterion.fit(started, students, teachers)  # type: ignore[operator]
