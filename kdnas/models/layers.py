"""Mappings from each student layer to the teacher layers it learns from.

Layers are numbered from 0; the embedding output does not count as a layer. The student has L_s
layers, the teacher L_t.
"""

from abc import ABC, abstractmethod

from kdnas.system.errors import UserError


def spread(num_chosen: int, num_all: int) -> list[int]:
    """Return k = ``num_chosen`` evenly spread numbers from 0 to n - 1, including both ends.

    Number i is ``floor(i (n - 1) / (k - 1) + 1/2)`` with n = ``num_all``; for k = 1 it is 0.
    """
    if num_chosen == 1:
        return [0]
    steps = num_chosen - 1
    return [(2 * i * (num_all - 1) + steps) // (2 * steps) for i in range(num_chosen)]


class LayerMapping(ABC):
    """Base class of rules that say which teacher layers each student layer learns from."""

    @abstractmethod
    def layers(self, layer: int, num_student: int, num_teacher: int) -> tuple[int, ...]:
        """Return the numbers of the teacher layers that a student layer learns from.

        Their order is the order in which the student layer's projection predicts their hidden
        states.

        Args:
            layer: number of the student layer.
            num_student: number of layers of the student.
            num_teacher: number of layers of the teacher.
        """

    def __call__(self, num_student: int, num_teacher: int) -> list[tuple[int, ...]]:
        """Return the teacher layers that each student layer learns from.

        Returns:
            For each student layer, a tuple of numbers of teacher layers.

        Raises:
            UserError: the student has more layers than the teacher, or the rule returns a teacher
                layer that does not exist.
        """
        if not 1 <= num_student <= num_teacher:
            raise UserError(
                f"A student of {num_student} layers cannot learn from a teacher of {num_teacher} "
                f"layers: give it 1 to {num_teacher} layers."
            )
        pairs = [self.layers(i, num_student, num_teacher) for i in range(num_student)]
        for layer in {layer for pair in pairs for layer in pair}:
            if not 0 <= layer < num_teacher:
                raise UserError(
                    f"The mapping uses teacher layer {layer}, but the teacher has only layers 0 to "
                    f"{num_teacher - 1}: use another mapping."
                )
        return pairs


class Last(LayerMapping):
    """Map student layer i to ``L_t - L_s + i``: the teacher's last L_s layers.

    L_s and L_t are the numbers of layers of student and teacher.
    """

    def layers(self, layer: int, num_student: int, num_teacher: int) -> tuple[int, ...]:
        return (num_teacher - num_student + layer,)


class Skip(LayerMapping):
    """Map student layer i to teacher layer ``i * floor(L_t / L_s)``.

    L_s and L_t are the numbers of layers of student and teacher. The original implementation of
    KD-NAS has this rule in its README; its code uses ``floor(i * L_t / L_s)``. For a teacher of 12
    layers, the two differ for students of 5, or of 7 to 10 layers.
    """

    def layers(self, layer: int, num_student: int, num_teacher: int) -> tuple[int, ...]:
        return (layer * (num_teacher // num_student),)


class LastAndSkip(LayerMapping):
    """Map each student layer to two teacher layers, by ``Last`` and ``Skip``, as in KD-NAS."""

    def layers(self, layer: int, num_student: int, num_teacher: int) -> tuple[int, ...]:
        sizes = (layer, num_student, num_teacher)
        return Last().layers(*sizes) + Skip().layers(*sizes)


class Even(LayerMapping):
    """Map student layer i to teacher layer ``round((i + 1) * L_t / L_s) - 1``.

    L_s and L_t are the numbers of layers of student and teacher. The layers are evenly spread, and
    the teacher's last layer is always one of them.
    """

    def layers(self, layer: int, num_student: int, num_teacher: int) -> tuple[int, ...]:
        # Halves are rounded up: round() would round them to the even neighbour.
        twice = 2 * (layer + 1) * num_teacher
        return ((twice + num_student) // (2 * num_student) - 1,)


class LastLayer(LayerMapping):
    """Map the student's last layer to the teacher's last layer; other layers learn from none."""

    def layers(self, layer: int, num_student: int, num_teacher: int) -> tuple[int, ...]:
        is_last = layer == num_student - 1
        return (num_teacher - 1,) if is_last else ()
