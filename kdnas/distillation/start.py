"""The first weights of a student: its teacher's, projected, copied or narrowed."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from kdnas.data.datamodule import Batch
from kdnas.distillation.narrowing import copied_tables, narrow, start_embeddings
from kdnas.models.arch import kept_layers
from kdnas.models.encoders import embed
from kdnas.models.families import arch_of, family_of
from kdnas.models.layers import spread
from kdnas.system.errors import UserError

log = logging.getLogger(__name__)

# All words of a large vocabulary together would take gigabytes in float64.
WORDS_AT_ONCE = 8192


@dataclass(frozen=True)
class Started:
    """What a start did to a student.

    Args:
        copied: names of the student's parameters that hold the teacher's values, which have lower
            rates.
        heads: for each student layer, the teacher's heads from which its own were made; None:
            unrelated.
    """

    copied: frozenset[str] = frozenset()
    heads: tuple[tuple[int, ...], ...] | None = None


class Start(ABC):
    """A rule that gives a new student its first weights."""

    def check(self, student: PreTrainedConfig, teacher: PreTrainedConfig) -> None:  # noqa: B027
        """Raise a UserError for a student that it cannot start; by default never."""

    @abstractmethod
    def __call__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Batch]
    ) -> Started:
        """Set a student's weights from its teacher; ``rows`` are training rows to calibrate on."""


class RandomStart(Start):
    """Leave the random weights, as the original does."""

    def __call__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Batch]
    ) -> Started:
        return Started()


class FromEmbeddings(Start):
    """The embedding tables alone, projected on H_s principal components; layers stay random.

    The components are those of the teacher's embedding output over its vocabulary. Where the widths
    are equal, tables are copied.
    """

    def check(self, student: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
        _check_sizes(student, teacher, "hidden_size")

    @torch.no_grad()
    def __call__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Batch]
    ) -> Started:
        self.check(student.config, teacher.config)
        theirs, ours = teacher.config.hidden_size, student.config.hidden_size
        basis_TS = torch.eye(ours) if ours == theirs else embedding_basis(teacher, ours)
        start_embeddings(student, teacher, basis_TS)
        return Started(copied_tables(student))


class FromTeacher(Start):
    """Embeddings and layers of the teacher: copied and corrected, or narrowed.

    The student's layers are made from the teacher's first ones and its last (``kept_layers``). A
    student of the teacher's shape is a copy of it.

    Other students are made by ``narrow``: the hidden stream is projected on its principal
    components, the heads and neurons that move it most are kept, and every linear map is fitted by
    least squares to what the teacher's part gives on ``rows``, from the narrowed stream itself. So
    each part repairs what the ones before it lost. A student as wide as its teacher keeps the
    stream and copies of those heads and neurons, and least squares add what they lack, and what the
    left-out layers did.

    Where the family's layers cannot be narrowed (``narrows`` in ``FAMILIES``), a narrower student
    gets only the embeddings, and the log says so. One of the teacher's width is copied, a worse
    start: it has the neurons with the largest weights (norm of the weights in times norm of the
    weights out), and fewer heads cut the maps anew.

    Raises:
        UserError: the student is larger than its teacher in one of its sizes.
    """

    def check(self, student: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
        sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
        _check_sizes(student, teacher, *sizes)

    @torch.no_grad()
    def __call__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Batch]
    ) -> Started:
        self.check(student.config, teacher.config)
        ours, theirs = arch_of(student.config), arch_of(teacher.config)
        narrows, kind = family_of(student.config).narrows, student.config.model_type
        if ours == theirs or (ours.hidden_size == theirs.hidden_size and not narrows):
            rest = ("num_attention_heads", "intermediate_size")
            if any(getattr(ours, size) != getattr(theirs, size) for size in rest):
                log.info("The layers of a %s are copied and cut, a worse start.", kind)
            return copy_layers(student, teacher)
        if not narrows:
            log.info("A narrower %s starts from its teacher's embeddings alone.", kind)
            return FromEmbeddings()(student, teacher, rows)
        return Started(copied_tables(student), narrow(student, teacher, rows))


def _check_sizes(student: PreTrainedConfig, teacher: PreTrainedConfig, *names: str) -> None:
    ours, theirs = arch_of(student), arch_of(teacher)
    for name in names:
        size, largest = getattr(ours, name), getattr(theirs, name)
        if size > largest:
            raise UserError(
                f"{name} is {size}: no student starts from its teacher "
                f"above the teacher's {largest}."
            )


def embedding_basis(teacher: PreTrainedModel, width: int) -> Tensor:
    """The first principal components of the teacher's embedding output over its vocabulary.

    They are orthonormal columns, shape (H_t, width), float32.
    """
    words = torch.arange(teacher.config.vocab_size, device=teacher.device)[:, None]
    sums = products = torch.zeros((), dtype=torch.float64, device=teacher.device)
    for word_ids in words.split(WORDS_AT_ONCE):
        inputs = {"input_ids": word_ids, "token_type_ids": torch.zeros_like(word_ids)}
        states = embed(teacher, inputs)[:, 0].double()
        sums, products = sums + states.sum(0), products + states.T @ states
    mean = sums / len(words)
    covariance = products / len(words) - mean.outer(mean)
    _, vectors = torch.linalg.eigh(covariance)  # eigenvalues in ascending order
    return vectors[:, -width:].flip(-1).float()


def copy_layers(student: PreTrainedModel, teacher: PreTrainedModel) -> Started:
    """Copy all but the layers, and of these the first ones and the last (``kept_layers``)."""
    family = family_of(teacher.config)
    layers, sources = family.layers(student), family.layers(teacher)
    ours, theirs = dict(student.named_parameters()), dict(teacher.named_parameters())
    num_heads = (student.config.num_attention_heads, teacher.config.num_attention_heads)
    heads = tuple(spread(*num_heads))

    in_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
    for name, parameter in ours.items():
        if id(parameter) not in in_layers:
            source = theirs[name]
            # MPNet's table of distances has a column a head.
            parameter.copy_(source if source.shape == parameter.shape else source[:, heads])
    for layer, number in zip(layers, kept_layers(len(layers), len(sources)), strict=True):
        _copy_layer(layer, sources[number], family.names.intermediate, family.names.output)
    return Started(frozenset(ours), (heads,) * len(layers))


def _copy_layer(layer: nn.Module, source: nn.Module, intermediate: str, output: str) -> None:
    """Copy a layer; of a wider feed-forward part keep the most important neurons."""
    wide_in: Any = source.get_submodule(intermediate)
    wide_out: Any = source.get_submodule(output)
    narrow_in: Any = layer.get_submodule(intermediate)
    # Gated layers have two halves: the neurons, and their gates.
    halves = len(wide_in.weight) // wide_out.weight.shape[1]
    norm_in = wide_in.weight.unflatten(0, (halves, -1)).norm(dim=(0, 2))
    importance = norm_in * wide_out.weight.norm(dim=0)
    kept = importance.topk(len(narrow_in.weight) // halves).indices.sort().values
    rows = torch.cat([kept + half * len(importance) for half in range(halves)])

    state = dict(source.state_dict())
    state[f"{intermediate}.weight"] = wide_in.weight[rows]
    if wide_in.bias is not None:
        state[f"{intermediate}.bias"] = wide_in.bias[rows]
    state[f"{output}.weight"] = wide_out.weight[:, kept]
    layer.load_state_dict(state)
