"""A student started from its teacher: embeddings by PCA, layers copied, or narrowed by least squares."""

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

# Embedded together: all words of a large vocabulary take gigabytes in float64.
WORDS_AT_ONCE = 8192


@dataclass(frozen=True)
class Started:
    """What a start did to a student.

    Args:
        copied: names of the student's parameters that hold the teacher's values and learn at the rates of copies.
        heads: for each student layer, the teacher's heads that its own heads were made from; None: unrelated.
    """

    copied: frozenset[str] = frozenset()
    heads: tuple[tuple[int, ...], ...] | None = None


class Start(ABC):
    """A rule that gives a new student its first weights."""

    def check(self, student: PreTrainedConfig, teacher: PreTrainedConfig) -> None:  # noqa: B027
        """Refuse, before anything is computed, a student that it cannot start; by default none.

        Raises:
            UserError: what does not fit.
        """

    @abstractmethod
    def __call__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Batch]
    ) -> Started:
        """Change the student's weights in place; the teacher is not changed.

        Args:
            student: any weights.
            teacher: of the same family.
            rows: a sample of the training rows, to calibrate on.
        """


class RandomStart(Start):
    """Leave the random weights, as the original does."""

    def __call__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Batch]
    ) -> Started:
        return Started()


class FromEmbeddings(Start):
    """The embedding tables alone, projected on the first H_s principal components; layers stay random.

    The components are those of the teacher's embedding output over its vocabulary. Tables as wide are copied.
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

    The student's layers are made from the teacher's first ones and its last (``kept_layers``).

    Of the teacher's shape, the student is its teacher.

    Else (``narrow``): the hidden stream is projected on its principal components, the heads and neurons that move it
    most are kept, and every linear map is the least-squares answer to what the teacher's part gives on ``rows``,
    computed from the narrowed stream itself, so that each part repairs what the ones before it lost. As wide as its
    teacher, the student keeps the stream and copies of those heads and neurons, and least squares add what they lack;
    also to the layer of one that is only shallower that does the work of the layers left out behind it.

    Where the family's layers cannot be narrowed (``narrows`` in ``FAMILIES``), a narrower student gets the
    embeddings, and the log says so. One of the teacher's width is copied all the same, a worse start: of the neurons
    it has those with the largest weights (norm of the weights in times norm of the weights out), and fewer heads cut
    the maps anew.

    Raises:
        UserError: the student is larger than its teacher in one of its sizes.
    """

    def check(self, student: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
        _check_sizes(
            student,
            teacher,
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_hidden_layers",
        )

    @torch.no_grad()
    def __call__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Batch]
    ) -> Started:
        self.check(student.config, teacher.config)
        ours, theirs, narrows = (
            arch_of(student.config),
            arch_of(teacher.config),
            family_of(student.config).narrows,
        )
        if ours == theirs or (ours.hidden_size == theirs.hidden_size and not narrows):
            rest = ("num_attention_heads", "intermediate_size")
            if any(getattr(ours, size) != getattr(theirs, size) for size in rest):
                log.info(
                    "The layers of a %s are copied and cut, a worse start.",
                    student.config.model_type,
                )
            return self._copy(student, teacher)
        if not narrows:
            log.info(
                "A narrower %s starts from its teacher's embeddings alone.",
                student.config.model_type,
            )
            return FromEmbeddings()(student, teacher, rows)
        return Started(copied_tables(student), narrow(student, teacher, rows))

    def _copy(self, student: PreTrainedModel, teacher: PreTrainedModel) -> Started:
        family = family_of(teacher.config)
        student_layers, teacher_layers = family.layers(student), family.layers(teacher)
        inside_layers = {
            id(parameter) for layer in student_layers for parameter in layer.parameters()
        }
        heads = tuple(
            spread(student.config.num_attention_heads, teacher.config.num_attention_heads)
        )
        teacher_parameters = dict(teacher.named_parameters())
        for name, parameter in student.named_parameters():
            if id(parameter) not in inside_layers:
                source = teacher_parameters[name]
                # MPNet's table of distances has a column a head.
                parameter.copy_(source if source.shape == parameter.shape else source[:, heads])
        for layer, number in zip(
            student_layers, kept_layers(len(student_layers), len(teacher_layers)), strict=True
        ):
            _copy_layer(
                layer, teacher_layers[number], family.names.intermediate, family.names.output
            )
        return Started(
            frozenset(name for name, _ in student.named_parameters()),
            (heads,) * len(student_layers),
        )


def _check_sizes(student: PreTrainedConfig, teacher: PreTrainedConfig, *names: str) -> None:
    ours, theirs = arch_of(student), arch_of(teacher)
    for name in names:
        size, largest = getattr(ours, name), getattr(theirs, name)
        if size > largest:
            raise UserError(
                f"{name} is {size}: no student starts from its teacher above the teacher's {largest}."
            )


def embedding_basis(teacher: PreTrainedModel, width: int) -> Tensor:
    """The first principal components of the teacher's embedding output over its vocabulary.

    Args:
        teacher: any family.
        width: number of components, H_s.

    Returns:
        Orthonormal columns, shape (H_t, H_s), float32.
    """
    words = torch.arange(teacher.config.vocab_size, device=teacher.device)[:, None]
    sums = products = torch.zeros((), dtype=torch.float64, device=teacher.device)
    for word_ids in words.split(WORDS_AT_ONCE):
        states = embed(
            teacher, {"input_ids": word_ids, "token_type_ids": torch.zeros_like(word_ids)}
        )[:, 0].double()
        sums, products = sums + states.sum(0), products + states.T @ states
    mean = sums / len(words)
    _, vectors = torch.linalg.eigh(
        products / len(words) - mean.outer(mean)
    )  # eigenvalues in ascending order
    return vectors[:, -width:].flip(-1).float()


def _copy_layer(layer: nn.Module, source: nn.Module, intermediate: str, output: str) -> None:
    """Copy a layer; of a wider feed-forward part keep the neurons that matter most."""
    wide_in: Any = source.get_submodule(intermediate)
    wide_out: Any = source.get_submodule(output)
    narrow_in: Any = layer.get_submodule(intermediate)
    halves = (
        len(wide_in.weight) // wide_out.weight.shape[1]
    )  # 2: the neurons, and the gates of all of them
    importance = wide_in.weight.unflatten(0, (halves, -1)).norm(dim=(0, 2)) * wide_out.weight.norm(
        dim=0
    )
    kept = importance.topk(len(narrow_in.weight) // halves).indices.sort().values
    rows = torch.cat([kept + half * len(importance) for half in range(halves)])
    state = dict(source.state_dict())
    state[f"{intermediate}.weight"] = wide_in.weight[rows]
    if wide_in.bias is not None:
        state[f"{intermediate}.bias"] = wide_in.bias[rows]
    state[f"{output}.weight"] = wide_out.weight[:, kept]
    layer.load_state_dict(state)
