"""Ways to initialise a student: at random, or from its teacher's embeddings or layers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from kdnas.data.datamodule import Batch
from kdnas.distillation.narrowing import copied_tables, narrow, start_embeddings
from kdnas.models.arch import kept_layers
from kdnas.models.encoders import embed
from kdnas.models.families import arch_of, family_of
from kdnas.system.errors import UserError

# All words of a large vocabulary at once would take gigabytes in float64.
WORDS_AT_ONCE = 8192


@dataclass(frozen=True)
class Started:
    """Which parameters and heads of a student were initialised from its teacher.

    Args:
        copied: names of the student's parameters that were copied, or copied and corrected; they
            are trained at lower learning rates.
        heads: for each student layer, numbers of the teacher heads that its heads were made from;
            None: the heads were not made from the teacher's.
    """

    copied: frozenset[str] = frozenset()
    heads: tuple[tuple[int, ...], ...] | None = None


class Start(ABC):
    """Base class of the ways to initialise a student's weights."""

    def check(self, student: PreTrainedConfig, teacher: PreTrainedConfig) -> None:  # noqa: B027
        """Raise a UserError if a student of this shape cannot be initialised in this way.

        By default, every shape is accepted.
        """

    @abstractmethod
    def __call__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Batch]
    ) -> Started:
        """Initialise a student in place; return which parts were initialised from its teacher.

        Args:
            student: the student.
            teacher: the teacher, of the same family.
            rows: batches of training rows on which linear maps are fitted.
        """


class RandomStart(Start):
    """Keep the student's random weights, as the original KD-NAS does."""

    def __call__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Batch]
    ) -> Started:
        return Started()


class FromEmbeddings(Start):
    """Initialise only the student's embeddings, from the teacher's; layers stay random.

    If the student is narrower, the teacher's embeddings are projected on their first H_s principal
    components over the vocabulary (H_s: the student's width). If it is as wide, they are copied.
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
    """Initialise embeddings and layers from the teacher's (the default).

    The student's layers are made from the teacher's first layers and its last (``kept_layers``). A
    student with the teacher's shape is a copy.

    Other students are made by ``narrow``. It projects the teacher's hidden states on their
    principal components and keeps the heads and neurons that change the hidden states most. Each
    linear map is then fitted by least squares on training rows: its inputs are the student's own
    hidden states, its targets the teacher's outputs. So each map also corrects the errors of the
    maps before it. If the student is as wide as its teacher, nothing is projected: the kept heads
    and neurons are copied, and least squares correct the copied maps for what was dropped. All
    parameters of such a student train at the learning rates of copied ones.

    Raises:
        UserError: a size of the student is larger than its teacher's.
    """

    def check(self, student: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
        sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
        _check_sizes(student, teacher, *sizes)

    @torch.no_grad()
    def __call__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Batch]
    ) -> Started:
        self.check(student.config, teacher.config)
        if arch_of(student.config) == arch_of(teacher.config):
            return copy_layers(student, teacher)
        heads = narrow(student, teacher, rows)
        if student.config.hidden_size == teacher.config.hidden_size:
            return Started(frozenset(dict(student.named_parameters())), heads)
        return Started(copied_tables(student), heads)


def _check_sizes(student: PreTrainedConfig, teacher: PreTrainedConfig, *names: str) -> None:
    ours, theirs = arch_of(student), arch_of(teacher)
    for name in names:
        size, largest = getattr(ours, name), getattr(theirs, name)
        if size > largest:
            raise UserError(
                f"The student's {name} is {size}, but its teacher's only {largest}: give at most "
                "that, or initialise the student at random (RandomStart)."
            )


def embedding_basis(teacher: PreTrainedModel, width: int) -> Tensor:
    """Return the first ``width`` principal components of a teacher's embedding output.

    They are computed over the teacher's vocabulary. The result is a float32 matrix of shape
    (teacher's width, ``width``) with orthonormal columns.
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
    """Copy a teacher's embeddings and layers to a student that differs at most in depth.

    The student gets the teacher's first layers and its last (``kept_layers``).
    """
    family = family_of(teacher.config)
    layers, sources = family.layers(student), family.layers(teacher)
    ours, theirs = dict(student.named_parameters()), dict(teacher.named_parameters())

    in_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
    for name, parameter in ours.items():
        if id(parameter) not in in_layers:
            parameter.copy_(theirs[name])
    for layer, number in zip(layers, kept_layers(len(layers), len(sources)), strict=True):
        layer.load_state_dict(sources[number].state_dict())
    heads = tuple(range(teacher.config.num_attention_heads))
    return Started(frozenset(ours), (heads,) * len(layers))
