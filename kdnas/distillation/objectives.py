"""Objectives of distillation: terms of the loss, and weighted sums of objectives.

An objective is a setting, and is not changed by training. It makes a criterion: the module that
computes the errors of a batch, and holds the parameters that are trained along with the student
(projections). Shapes: B rows, T padded tokens, N real tokens, H a width, A heads.
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
    """The hidden states and attention of one model on a batch.

    Layers are numbered from 0; layer -1 is the embedding output.

    Args:
        model: the model that computed the hidden states.
        batch: the input batch.
        padded: layer -> hidden states of all tokens, (B, T, H).
        real: layer -> hidden states of the real tokens alone, (N, H).
        maps: attention maps of each layer, (B, A, T, T), if the model returned them.
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
        """The model's family (BERT, RoBERTa, ...), which has the names of the model's modules."""
        return family_of(self.model.config)

    def real(self, layer: int) -> Tensor:
        """Return a layer's hidden states of the real tokens, (N, H)."""
        if layer not in self._real:
            states_NH = self._padded[layer].flatten(0, 1)
            self._real[layer] = states_NH.index_select(0, real_tokens(self.batch))
        return self._real[layer]

    def padded(self, layer: int) -> Tensor:
        """Return a layer's hidden states of all tokens, (B, T, H).

        The values at padding mean nothing.
        """
        if layer not in self._padded:
            states_NH = self._real[layer]
            padded = states_NH.new_zeros(self.mask_BT.numel(), states_NH.shape[-1])
            # In place: otherwise autocast refuses the stored float16 states.
            padded.index_copy_(0, real_tokens(self.batch), states_NH)
            self._padded[layer] = padded.view(*self.mask_BT.shape, -1)
        return self._padded[layer]

    def _input(self, layer: int) -> Tensor:
        """Return the input of a layer's query, key and value maps, (B, T, H)."""
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
        """Return a layer's queries, keys or values, shape (B, A, T, D).

        Args:
            layer: number of the layer, from 0.
            part: ``query``, ``key`` or ``value``.
            num_heads: number of heads into which the layer's width H is split; D is ``H /
                num_heads``.
            chosen: numbers of the A heads to return; by default all.
        """
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
        """Return a layer's attention maps, (B, A, T, T).

        They are those of the ``chosen`` heads; by default, of all heads.
        """
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
        """Return each row's mean of the last layer's hidden states over the tokens in ``mask_BT``.

        The shape is (B, H), the dtype float32. ``mask_BT`` is True on the tokens to average.
        """
        weights = mask_BT.float() / mask_BT.sum(1, keepdim=True).clamp_min(1)
        with torch.autocast(self.mask_BT.device.type, enabled=False):
            last = self.padded(self.model.config.num_hidden_layers - 1).float()
            return torch.bmm(weights[:, None], last)[:, 0]


@dataclass(frozen=True)
class Term:
    """One term of the distillation loss.

    Args:
        name: name in the logs.
        weight: weight in the loss, relative to the other terms.
        layer: number of the teacher layer, if the term is a squared error of hidden states.
        scaled: whether the error is divided by the variance of ``layer``.
        compares: whether students of different shapes can be ranked by the term. False if the
            term's difficulty depends on the teacher layers from which a student is made. The terms
            of ``HiddenStates`` have True, as in the original KD-NAS, although with most layer
            mappings students of different depths learn from different teacher layers.
    """

    name: str
    weight: float
    layer: int | None = None
    scaled: bool = False
    compares: bool = True


class Criterion(nn.Module):
    """Base class of modules that compute the terms of a loss and are trained with the student."""

    terms: list[Term]

    @abstractmethod
    def forward(self, student: View, teacher: View) -> list[tuple[Tensor, int]]:
        """Return, for each loss term, the sum of a batch's errors and the number of errors.

        The list has one pair for each term. A term has one error per token, row or sentence
        pair. A ``View`` holds a model's hidden states and attention on the batch.
        """

    def fit(self, started: Started, students: Sequence[View], teachers: Sequence[View]) -> None:
        """Initialise the criterion's own parameters, such as projections; by default do nothing.

        Args:
            started: how the student was initialised.
            students: hidden states of the initialised student, for each batch of a sample of the
                training rows.
            teachers: hidden states of the teacher, for the same batches.
        """


class Objective(ABC):
    """Base class of distillation objectives: what the student learns from its teacher.

    ``criterion`` makes the module that computes the loss.
    """

    @abstractmethod
    def teacher_layers(self, num_student_layers: int, num_teacher_layers: int) -> set[int]:
        """Return the numbers of the teacher layers whose hidden states the loss needs.

        The number -1 stands for the embedding output.
        """

    @abstractmethod
    def criterion(self, student: PreTrainedModel, teacher: PreTrainedModel) -> Criterion:
        """Make the module that computes the loss for this student and this teacher."""


def needed_layers(
    objective: Objective, depths: Iterable[int], num_teacher_layers: int
) -> list[int]:
    """Return the teacher layers whose hidden states are needed to train students of these depths.

    They are numbers in ascending order. The teacher's last layer is always included.

    Args:
        objective: the loss between student and teacher.
        depths: numbers of layers of the students.
        num_teacher_layers: number of layers of the teacher.

    Raises:
        UserError: the objective asks for a layer that the teacher does not have.
    """
    asked = (objective.teacher_layers(depth, num_teacher_layers) for depth in depths)
    needed: set[int] = set().union({num_teacher_layers - 1}, *asked)
    for layer in needed:
        if layer not in range(-1, num_teacher_layers):
            raise UserError(
                f"{type(objective).__name__} needs teacher layer {layer!r}, but the teacher has "
                f"only layers 0 to {num_teacher_layers - 1}, and -1 for the embedding output."
            )
    return sorted(needed)


class HiddenStates(Objective):
    """Mean squared error between the student's projected hidden states and the teacher's (KD-NAS).

    ``mean_ij mean_n |W_ij h_i(n) - t_j(n)|^2 / (H_t var_j)`` over pairs of a student layer i and a
    teacher layer j that it learns from, and over real tokens n. h_i and t_j are hidden states of
    student and teacher, H_t is the teacher's width, and var_j the variance of t_j. Each student
    layer has its own linear projection, which holds its W_ij.

    Args:
        mapping: which teacher layers each student layer learns from.
        shared_projection: use one projection for all student layers, as the original's code does,
            instead of one for each.
        normalize: divide by var_j, so that no layer dominates by its scale.
        fit_projections: initialise the projections by least squares on the initialised student, not
            at random.

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
                "shared_projection needs student layers that all learn from the same number of "
                f"teacher layers; in this mapping the numbers are {sorted(set(counts))}."
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
    """Squared error of every teacher layer, averaged over student layers with learned weights.

    ``mean_j sum_i p_ij mean_n |W_ij h_i(n) - t_j(n)|^2 / (H_t var_j)`` over teacher layers j,
    student layers i and real tokens n. h_i and t_j are hidden states of student and teacher, W_ij
    is a trained projection, H_t the teacher's width, and var_j the variance of t_j. ``p_j =
    softmax(a_j)`` is trained with the student. Every student learns from all teacher layers, so
    all students have the same task.

    Source: after ALP-KD (Passban et al. 2021), which instead mixes the teacher's layers.
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
        # One layer after the other: all layers of a wide teacher take gigabytes.
        for j in range(len(self.terms)):
            target = torch.cat([view.real(j) for view in teachers])
            rows = slice(j * target.shape[-1], (j + 1) * target.shape[-1])
            for projection, states in zip(self.projections, inputs, strict=True):
                weight = ridge_map(states, target, strength=1e-3).float()
                parameters: Any = projection
                parameters.weight.data[rows], parameters.bias.data[rows] = weight[:-1].T, weight[-1]


class WeightedSum(Objective):
    """Objective: weighted mean of the losses of several objectives.

    Args:
        objectives: the objectives.
        weights: a weight above 0 for each objective, relative to the others.

    Raises:
        UserError: ``objectives`` is empty, ``weights`` has another length, or a weight is not above
            0.
    """

    def __init__(self, objectives: list[Objective], weights: list[float]) -> None:
        if not objectives or len(objectives) != len(weights):
            raise UserError(
                f"WeightedSum has {len(objectives)} objectives and {len(weights)} weights: give at "
                "least one objective, and a weight for each."
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
        # Two objectives of the same kind have terms of the same name.
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
