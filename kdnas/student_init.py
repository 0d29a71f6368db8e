"""How a student starts. What is copied trains at a gentler rate than what is new, so a start says which is which."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdnas.errors import UserError
from kdnas.models import family_of


@dataclass(frozen=True)
class Started:
    """What a start did to a student.

    Args:
        copied: names of the student's parameters that hold the teacher's values.
        basis: the student's hidden stream in the teacher's, h_t = basis @ h_s; shape (H_t, H_s); None: unrelated.
    """

    copied: frozenset[str] = frozenset()
    basis: Tensor | None = None


class Start(ABC):
    """A rule that gives a new student its first weights."""

    @abstractmethod
    def __call__(self, student: PreTrainedModel, teacher: PreTrainedModel) -> Started:
        """Change the student's weights in place; the teacher is not changed."""


class RandomStart(Start):
    """Leave the random weights, as the original does."""

    def __call__(self, student: PreTrainedModel, teacher: PreTrainedModel) -> Started:
        return Started()


class FromTeacher(Start):
    """The teacher's embeddings, and whole layers where the widths are equal.

    Equal width: embeddings are copied; student layer i is a copy of teacher layer ``round(i (L_t - 1) / (L_s - 1))``,
    so first and last are among them; of a wider feed-forward part the most important neurons are kept (norm of the
    weights in times norm of the weights out). At equal shape the student then equals the teacher; with fewer heads than
    the teacher the copied maps are cut into other heads, which is a worse start.
    Narrower: the embedding tables are projected on the first H_s principal components of the teacher's embedding
    output over its vocabulary; layers stay random.

    Raises:
        UserError: the student is wider than its teacher, or is as wide and has a wider feed-forward part.
    """

    @torch.no_grad()
    def __call__(self, student: PreTrainedModel, teacher: PreTrainedModel) -> Started:
        narrower = student.config.hidden_size < teacher.config.hidden_size
        for name in () if narrower else ("hidden_size", "intermediate_size"):
            size, largest = getattr(student.config, name), getattr(teacher.config, name)
            if size > largest:
                raise UserError(f"{name} is {size}: FromTeacher starts no student above its teacher's {largest}.")
        return self._project_embeddings(student, teacher) if narrower else self._copy(student, teacher)

    def _copy(self, student: PreTrainedModel, teacher: PreTrainedModel) -> Started:
        family = family_of(teacher.config)
        student_layers, teacher_layers = family.layers(student), family.layers(teacher)
        inside_layers = {id(parameter) for layer in student_layers for parameter in layer.parameters()}
        teacher_parameters = dict(teacher.named_parameters())
        for name, parameter in student.named_parameters():
            if id(parameter) not in inside_layers:
                parameter.copy_(teacher_parameters[name])
        for i, layer in enumerate(student_layers):
            steps = max(1, len(student_layers) - 1)
            source = teacher_layers[round(i * (len(teacher_layers) - 1) / steps)]
            _copy_layer(layer, source, family.ffn)
        return Started(frozenset(name for name, _ in student.named_parameters()), torch.eye(student.config.hidden_size))

    def _project_embeddings(self, student: PreTrainedModel, teacher: PreTrainedModel) -> Started:
        basis_TS = embedding_basis(teacher, student.config.hidden_size)
        ours: Any = student.embeddings
        theirs: Any = teacher.embeddings
        mapping = _mapping_in(student)
        if mapping is not None:  # ALBERT: tables keep their own width, the map behind them is projected
            ours.load_state_dict(theirs.state_dict())
            source = _mapping_in(teacher)
            mapping.weight.copy_(basis_TS.T @ source.weight)
            mapping.bias.copy_(basis_TS.T @ source.bias)
            return Started(frozenset(f"embeddings.{name}" for name, _ in ours.named_parameters()), basis_TS)
        # Layer norm is gamma * centred(x) / std(x) + beta. gamma and the centring are linear, so they go into the
        # tables; what is left of gamma is how much smaller the projected vector is than the centred one.
        fold_TS = theirs.LayerNorm.weight[:, None] * basis_TS
        fold_TS = fold_TS - fold_TS.mean(0)
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
            getattr(ours, name).weight.copy_(getattr(theirs, name).weight @ fold_TS)
        words = theirs.word_embeddings.weight
        scale = (words @ fold_TS).std(-1) / words.std(-1)
        ours.LayerNorm.weight.fill_(float(scale.nanmean()))
        ours.LayerNorm.bias.copy_(basis_TS.T @ theirs.LayerNorm.bias)
        return Started(frozenset(), basis_TS)


def embedding_basis(teacher: PreTrainedModel, width: int) -> Tensor:
    """The first principal components of the teacher's embedding output over its vocabulary.

    Args:
        teacher: any family.
        width: number of components, H_s.

    Returns:
        Orthonormal columns, shape (H_t, H_s), float32.
    """
    word_ids = torch.arange(teacher.config.vocab_size, device=teacher.device)[:, None]
    embeddings: Any = teacher.embeddings
    states = embeddings(input_ids=word_ids)[:, 0]
    mapping = _mapping_in(teacher)
    if mapping is not None:
        states = mapping(states)
    _, vectors = torch.linalg.eigh(torch.cov(states.double().T))  # eigenvalues in ascending order
    return vectors[:, -width:].flip(-1).float()


def _mapping_in(model: PreTrainedModel) -> Any:
    """ALBERT's map from its tables' own width to the hidden size; None for the others."""
    return getattr(model.encoder, "embedding_hidden_mapping_in", None)


def _copy_layer(layer: nn.Module, source: nn.Module, ffn: tuple[str, str]) -> None:
    """Copy a layer; of a wider feed-forward part keep the neurons that matter most."""
    wide_in: Any = source.get_submodule(ffn[0])
    wide_out: Any = source.get_submodule(ffn[1])
    narrow_in: Any = layer.get_submodule(ffn[0])
    importance = wide_in.weight.norm(dim=1) * wide_out.weight.norm(dim=0)
    kept = importance.topk(len(narrow_in.weight)).indices.sort().values
    state = dict(source.state_dict())
    state[f"{ffn[0]}.weight"] = wide_in.weight[kept]
    state[f"{ffn[0]}.bias"] = wide_in.bias[kept]
    state[f"{ffn[1]}.weight"] = wide_out.weight[:, kept]
    layer.load_state_dict(state)
