"""Objectives on attention: attention maps, or relations among queries, keys or values."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdnas.distillation.losses import attention_divergence, attention_map
from kdnas.distillation.objectives import Criterion, Objective, Term, View
from kdnas.distillation.start import Started
from kdnas.models.arch import kept_layers
from kdnas.models.layers import spread
from kdnas.system.errors import UserError


class AttentionMaps(Objective):
    """Loss term: Kullback-Leibler divergence of the student's attention maps from the teacher's.

    ``mean_i mean_a mean_n sum_m P_ia(n, m) log (P_ia(n, m) / S_ia(n, m))`` over student layers i,
    their heads a, and real tokens n and m. S_ia is the attention map of head a in student layer i.
    P_ia is the map of the teacher's head from which that head was initialised; if the student's
    heads were not made from the teacher's, evenly spread heads of the teacher are used. The term
    preserves the attention between the two sentences of a pair, which pair tasks need; training on
    hidden states alone weakens that attention (LOG.md).

    Source: TinyBERT (Jiao et al. 2020, section 3.1), but with the KL divergence of MiniLM (Wang et
        al. 2020, section 3.1) instead of the squared error of attention logits.
    """

    def teacher_layers(self, num_student_layers: int, num_teacher_layers: int) -> set[int]:
        return {layer - 1 for layer in kept_layers(num_student_layers, num_teacher_layers)}

    def criterion(self, student: PreTrainedModel, teacher: PreTrainedModel) -> Criterion:
        return _AttentionMaps(student, teacher)


class _AttentionMaps(Criterion):
    heads: Tensor

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        super().__init__()
        ours, theirs = student.config, teacher.config
        if ours.num_attention_heads > theirs.num_attention_heads:
            raise UserError(
                f"AttentionMaps: the student has {ours.num_attention_heads} attention heads "
                f"(num_attention_heads), the teacher only {theirs.num_attention_heads}: give the "
                "student at most as many."
            )
        self.sources = kept_layers(ours.num_hidden_layers, theirs.num_hidden_layers)
        self.terms = [Term("attention_maps", 1.0, compares=False)]
        # (L_s, A_s): the teacher's head that each student head learns from.
        heads = [spread(ours.num_attention_heads, theirs.num_attention_heads)] * len(self.sources)
        self.register_buffer("heads", torch.tensor(heads))

    def forward(self, student: View, teacher: View) -> list[tuple[Tensor, int]]:
        total: Any = 0.0
        for i, (layer, heads) in enumerate(zip(self.sources, self.heads, strict=True)):
            with torch.no_grad():
                theirs = teacher.attention(layer, heads)
            total = total + attention_divergence(student.attention(i), theirs, student.mask_BT)
        return [(total / len(self.sources), int(student.mask_BT.sum()))]

    def fit(self, started: Started, students: Sequence[View], teachers: Sequence[View]) -> None:
        if started.heads is not None:
            self.heads.copy_(torch.tensor(started.heads))


class AttentionRelations(Objective):
    """MiniLMv2's loss on self-attention relations: query-query, key-key and value-value.

    The loss is ``KL(softmax(x_t x_t^T / sqrt(d_t)) || softmax(x_s x_s^T / sqrt(d_s)))``, averaged
    over x = queries, keys and values. x_t is from teacher layer ``layer``, x_s from the student's
    last layer. Each is split into ``num_heads`` relation heads, of size d_t and d_s. So student and
    teacher can differ in width and in number of attention heads.

    Args:
        layer: the teacher's layer, from 0; negative numbers count from the last layer.
        num_heads: number of relation heads; must divide the widths of student and teacher.

    Raises:
        UserError: the teacher has no such layer, or ``num_heads`` does not divide a width.

    Source: Wang et al. 2021, "MiniLMv2", section 3.1, which takes the upper middle layer of a large
        teacher.
    """

    def __init__(self, layer: int = -1, num_heads: int = 12) -> None:
        self.layer, self.num_heads = layer, num_heads

    def teacher_layers(self, num_student_layers: int, num_teacher_layers: int) -> set[int]:
        if not -num_teacher_layers <= self.layer < num_teacher_layers:
            raise UserError(
                f"AttentionRelations: layer is {self.layer}, but the teacher has "
                f"{num_teacher_layers} layers: give a number from {-num_teacher_layers} to "
                f"{num_teacher_layers - 1}."
            )
        return {self.layer % num_teacher_layers - 1}

    def criterion(self, student: PreTrainedModel, teacher: PreTrainedModel) -> Criterion:
        ours, theirs = student.config, teacher.config
        (below,) = self.teacher_layers(ours.num_hidden_layers, theirs.num_hidden_layers)
        for width in (ours.hidden_size, theirs.hidden_size):
            if self.num_heads < 1 or width % self.num_heads:
                raise UserError(
                    f"AttentionRelations: the width {width} cannot be split into {self.num_heads} "
                    "relation heads: give a num_heads that divides it."
                )
        return _AttentionRelations(below + 1, self.num_heads)


class _AttentionRelations(Criterion):
    def __init__(self, layer: int, num_heads: int) -> None:
        super().__init__()
        self.layer, self.num_heads = layer, num_heads
        self.terms = [Term("attention_relations", 1.0)]

    def forward(self, student: View, teacher: View) -> list[tuple[Tensor, int]]:
        last = student.model.config.num_hidden_layers - 1
        total: Any = 0.0
        for part in ("query", "key", "value"):
            with torch.no_grad():
                theirs = teacher.heads(self.layer, part, self.num_heads)
                their_map = attention_map(theirs, theirs, teacher.mask_BT)
            ours = student.heads(last, part, self.num_heads)
            our_map = attention_map(ours, ours, student.mask_BT)
            total = total + attention_divergence(our_map, their_map, student.mask_BT)
        return [(total / 3, int(student.mask_BT.sum()))]
