"""The architecture of a student: one type for the search, YAML files and checkpoints."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from kdnas.system.errors import UserError, counted, nearest
from kdnas.system.files import write_text
from kdnas.system.yaml import read_yaml

_SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size")


@dataclass(frozen=True)
class StudentArch:
    """The shape of a student, with the field names of Hugging Face configs.

    Args:
        num_hidden_layers: number of transformer layers.
        num_attention_heads: attention heads of each layer; must divide ``hidden_size``.
        hidden_size: width of the hidden states.
        intermediate_size: width between the two linear maps of the feed-forward part.
        hidden_act: activation of the feed-forward part, by its name in transformers (``gelu``, ...).

    Raises:
        UserError: a size is below 1, ``num_attention_heads`` does not divide ``hidden_size``, or
            ``hidden_act`` is not a string.
    """

    num_hidden_layers: int
    num_attention_heads: int
    hidden_size: int
    intermediate_size: int
    hidden_act: str = "gelu"

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UserError(f"{name} is {value!r}: give a whole number of at least 1.")
        if not isinstance(self.hidden_act, str):
            raise UserError(
                f"hidden_act is {self.hidden_act!r}: give the name of an activation, such as gelu."
            )
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} cannot be split into {self.num_attention_heads} "
                "heads: num_attention_heads must divide it."
            )

    def __str__(self) -> str:
        return (
            f"{counted(self.num_hidden_layers, 'layer')} x {self.hidden_size} wide, "
            f"{counted(self.num_attention_heads, 'head')}, {self.intermediate_size} intermediate, "
            f"{self.hidden_act}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary of the fields.

        It has only plain values, so that torch.load reads it with ``weights_only=True``.
        """
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "StudentArch":
        """Make a StudentArch from a dictionary that ``to_dict`` returned.

        Raises:
            UserError: a field is unknown, a size is missing, or a value is wrong.
        """
        names = [*_SIZES, "hidden_act"]
        for name in values:
            if name not in names:
                raise UserError(
                    f"{name!r} is not a field of a student architecture.{nearest(name, names)}"
                )
        missing = [name for name in _SIZES if name not in values]
        if missing:
            raise UserError(
                f"The student architecture lacks {', '.join(missing)}: give all five fields."
            )
        return cls(**values)

    def to_yaml(self, path: Path) -> None:
        """Write the five fields of the architecture into a YAML file."""
        write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False))

    @classmethod
    def from_yaml(cls, path: Path) -> "StudentArch":
        """Read an architecture from a file that ``to_yaml`` wrote."""
        return cls.from_dict(read_yaml(path))


def kept_layers(num_student_layers: int, num_teacher_layers: int) -> list[int]:
    """Return the teacher layers from which a student's layers are made: the first and the last.

    For a student of L_s layers and a teacher of L_t these are ``0, ..., L_s - 2`` and ``L_t - 1``;
    a student of one layer is made from layer 0. Attention between two sentences needs consecutive
    layers: a student made from four evenly spread layers instead keeps a third less of its
    teacher's STS-B score. To end with the teacher's last layer is better than to go on with the
    next layer (LOG.md).

    Source: Sajjad et al. 2023, "On the effect of dropping layers of pre-trained transformer
    models". Their symmetric dropping keeps bottom and top layers; measurements decided how many of
    each are kept here.
    """
    if num_student_layers == 1:
        return [0]
    return [*range(min(num_student_layers, num_teacher_layers) - 1), num_teacher_layers - 1]
