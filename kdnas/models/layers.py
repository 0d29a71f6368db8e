"""Which layers of the teacher a layer of the student learns from.

Layers are numbered from 0; the embedding output is no layer. Student and teacher have L_s and L_t
layers.
"""

from abc import ABC, abstractmethod

from kdnas.system.errors import UserError


def spread(num_chosen: int, num_all: int) -> list[int]:
    """``num_chosen`` of the numbers 0 .. num_all - 1, evenly spread, with the first and the last.

    ``floor(i (n - 1) / (k - 1) + 1/2)``; the first where one is chosen.
    """
    if num_chosen == 1:
        return [0]
    steps = num_chosen - 1
    return [(2 * i * (num_all - 1) + steps) // (2 * steps) for i in range(num_chosen)]


class LayerMapping(ABC):
    """A rule that gives each student layer its teacher layers, or none."""

    @abstractmethod
    def layers(self, layer: int, num_student: int, num_teacher: int) -> tuple[int, ...]:
        """The teacher layers of one student layer, in the order of concatenation."""

    def __call__(self, num_student: int, num_teacher: int) -> list[tuple[int, ...]]:
        """The teacher layers of every student layer.

        Returns:
            L_s tuples of teacher layers.

        Raises:
            UserError: the student has more layers than the teacher, or the rule names a layer that
                does not exist.
        """
        if not 1 <= num_student <= num_teacher:
            raise UserError(
                f"A student of {num_student} layers cannot learn from a teacher of "
                f"{num_teacher}: give it 1 to {num_teacher}."
            )
        pairs = [self.layers(i, num_student, num_teacher) for i in range(num_student)]
        for layer in {layer for pair in pairs for layer in pair}:
            if not 0 <= layer < num_teacher:
                raise UserError(
                    f"The mapping names teacher layer {layer}: there are 0 to {num_teacher - 1}."
                )
        return pairs


class Last(LayerMapping):
    """The last L_s layers: ``L_t - L_s + i``."""

    def layers(self, layer: int, num_student: int, num_teacher: int) -> tuple[int, ...]:
        return (num_teacher - num_student + layer,)


class Skip(LayerMapping):
    """Every k-th layer: ``i * floor(L_t / L_s)``.

    The original's README has this rule; its code takes ``floor(i * L_t / L_s)``. They differ for
    12 -> 5 and 12 -> 7 to 10.
    """

    def layers(self, layer: int, num_student: int, num_teacher: int) -> tuple[int, ...]:
        return (layer * (num_teacher // num_student),)


class LastAndSkip(LayerMapping):
    """Two teacher layers a student layer, ``Last`` and then ``Skip``, as in the original."""

    def layers(self, layer: int, num_student: int, num_teacher: int) -> tuple[int, ...]:
        sizes = (layer, num_student, num_teacher)
        return Last().layers(*sizes) + Skip().layers(*sizes)


class Even(LayerMapping):
    """Evenly spread up to the teacher's last layer: ``round((i + 1) * L_t / L_s) - 1``."""

    def layers(self, layer: int, num_student: int, num_teacher: int) -> tuple[int, ...]:
        # Halves are rounded up: round() would round them to the even neighbour.
        twice = 2 * (layer + 1) * num_teacher
        return ((twice + num_student) // (2 * num_student) - 1,)


class LastLayer(LayerMapping):
    """The student's last layer learns the teacher's last; the others learn nothing directly."""

    def layers(self, layer: int, num_student: int, num_teacher: int) -> tuple[int, ...]:
        is_last = layer == num_student - 1
        return (num_teacher - 1,) if is_last else ()
