"""SearchSpace: the shapes of students that a search may propose."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from kdnas.models.arch import StudentArch
from kdnas.models.families import arch_of, check_heads, family_of
from kdnas.system.errors import UserError, nearest

MIN_HEAD_SIZE = 16  # dimensions of an attention head


@dataclass(frozen=True)
class SearchSpace:
    """The search space: possible values of each field of ``StudentArch``, in any combination.

    Args:
        choices: maps each field of ``StudentArch`` to its possible values.
    """

    choices: Mapping[str, list[Any]]

    @classmethod
    def from_teacher(cls, config: PreTrainedConfig) -> "SearchSpace":
        """Make the default space from the teacher's config: students no larger than the teacher.

        - Layers: 1 to 6, then 8, 10 and 12, then multiples of 4.
        - Attention heads: the divisors of the teacher's number of heads, down to a quarter of that
          number. Heads have at least 16 dimensions at the teacher's width.
        - Width (``hidden_size``): 2/8, 3/8, 4/8, 6/8 and 8/8 of the teacher's. A width is left out
          unless every number of heads divides it, with at least 16 dimensions for each head and,
          for rotary positions, an even number.
        - Intermediate size: a quarter, a half and all of the teacher's.
        - Activation: the teacher's, and ReLU.

        Raises:
            UserError: the teacher has fewer than 16 dimensions, too few for one head.
        """
        teacher = arch_of(config)
        width, heads = teacher.hidden_size, teacher.num_attention_heads
        if width < MIN_HEAD_SIZE:
            raise UserError(
                f"The teacher's hidden_size is {width}: a student, which is never wider than its "
                f"teacher, needs at least {MIN_HEAD_SIZE}. Choose a wider teacher."
            )
        divisors = [
            h for h in range(1, heads + 1) if heads % h == 0 and width // h >= MIN_HEAD_SIZE
        ]
        most_heads = divisors[-1]
        unit = most_heads * (2 if family_of(config).even_heads else 1)
        depths = [*range(1, 7), 8, 10, 12, *range(16, teacher.num_hidden_layers + 1, 4)]
        widths = [width * eighths // 8 for eighths in (2, 3, 4, 6, 8) if width * eighths % 8 == 0]
        inner = {max(1, teacher.intermediate_size // part) for part in (4, 2, 1)}
        return cls(
            {
                "num_hidden_layers": [d for d in depths if d <= teacher.num_hidden_layers],
                "num_attention_heads": [
                    h for h in divisors if most_heads % h == 0 and 4 * h >= most_heads
                ],
                "hidden_size": [
                    w for w in widths if w % unit == 0 and w // most_heads >= MIN_HEAD_SIZE
                ],
                "intermediate_size": sorted(inner),
                "hidden_act": list(dict.fromkeys([teacher.hidden_act, "relu"])),
            }
        )

    def replaced(
        self, choices: Mapping[str, Sequence[Any] | None], config: PreTrainedConfig
    ) -> "SearchSpace":
        """Return a copy of this space with other values for some fields.

        Args:
            choices: maps fields of ``StudentArch`` to their new values; None: keep the old values.
            config: config of the teacher.

        Raises:
            UserError: a field has no value, a size is below 1 or above the teacher's, a number of
                heads does not divide a width (or the teacher's model family does not allow the
                two together), or an activation is unknown.
        """
        teacher = arch_of(config)
        others = {name: list(dict.fromkeys(v)) for name, v in choices.items() if v is not None}
        chosen = {**self.choices, **others}
        for name, values in chosen.items():
            if not values:
                raise UserError(f"space.{name} is empty, so there is no student: give it a value.")
            if name == "hidden_act":
                continue
            for value in values:
                if not 1 <= value <= getattr(teacher, name):
                    most = getattr(teacher, name)
                    raise UserError(
                        f"space.{name} has {value}: give values from 1 to the teacher's {most}."
                    )
        for width, heads in itertools.product(chosen["hidden_size"], chosen["num_attention_heads"]):
            if width % heads:
                raise UserError(
                    f"space.num_attention_heads has {heads}, which does not divide the {width} in "
                    "space.hidden_size: give widths that every number of heads divides."
                )
            check_heads(config, width, heads)
        for activation in chosen["hidden_act"]:
            if activation not in ACT2FN:
                hint = nearest(activation, ACT2FN)
                raise UserError(
                    f"space.hidden_act has {activation!r}, which transformers does not know.{hint}"
                )
        return SearchSpace(chosen)

    def __len__(self) -> int:
        """The number of students in the space."""
        return math.prod(map(len, self.choices.values()))

    def __iter__(self) -> Iterator[StudentArch]:
        """Yield every student shape; the last field in ``choices`` changes the fastest."""
        for values in itertools.product(*self.choices.values()):
            yield StudentArch(**dict(zip(self.choices, values, strict=True)))

    def suggest(self, trial: optuna.Trial) -> StudentArch:
        """Suggest a student shape for a trial: a categorical parameter for each field."""
        suggest = trial.suggest_categorical
        return StudentArch(**{name: suggest(name, values) for name, values in self.choices.items()})

    def by_rule(self) -> Iterator[StudentArch]:
        """Yield student shapes that are good by a rule of thumb (see LOG.md), the deepest first.

        There is one shape for each depth in the space. It has half of the largest width and number
        of heads, and a quarter of the largest intermediate size. In a space of more than six layers
        it has the largest width and number of heads, and half of the intermediate size. Each is
        the value in the space that is nearest; the activation is the first.
        """
        depths = sorted(self.choices["num_hidden_layers"], reverse=True)
        halve = 1 if depths[0] > 6 else 2
        parts = {"num_attention_heads": halve, "hidden_size": halve, "intermediate_size": 2 * halve}
        sizes = {
            name: min(
                self.choices[name], key=lambda size: abs(size - max(self.choices[name]) / part)
            )
            for name, part in parts.items()
        }
        for depth in depths:
            yield StudentArch(
                **sizes, num_hidden_layers=depth, hidden_act=self.choices["hidden_act"][0]
            )

    def smallest(self) -> StudentArch:
        """Return the fastest student: the smallest value of every size, and ReLU if possible."""
        activations = self.choices["hidden_act"]
        return self._extreme(min, "relu" if "relu" in activations else activations[0])

    def largest(self) -> StudentArch:
        """Return the largest student: the largest value of every size, and the first activation."""
        return self._extreme(max, self.choices["hidden_act"][0])

    def _extreme(self, of: Callable[[list[int]], int], activation: str) -> StudentArch:
        sizes = {name: of(values) for name, values in self.choices.items() if name != "hidden_act"}
        return StudentArch(**sizes, hidden_act=activation)
