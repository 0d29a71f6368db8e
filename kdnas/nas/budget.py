"""Budget: hard limits on a student's latency and size."""

from dataclasses import dataclass
from typing import Any

from kdnas.deploy.latency import ArchLatency
from kdnas.system.errors import UserError


@dataclass(frozen=True)
class Budget:
    """Hard limits on a student's latency and size; None: no limit.

    Latency does not depend on the weights, so the limits are checked before a candidate is trained.

    Args:
        speedup: the student must be at least this many times as fast as the teacher.
        latency_ms: largest latency of the student, in milliseconds.
        num_parameters: largest number of parameters, encoder and classification head together.

    Raises:
        UserError: a limit is not above 0.
    """

    speedup: float | None = None
    latency_ms: float | None = None
    num_parameters: int | None = None

    def __post_init__(self) -> None:
        for name in ("speedup", "latency_ms", "num_parameters"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"The budget {name} is {value}: give a number above 0.")

    def violation(self, latency: ArchLatency) -> tuple[float, str]:
        """Return by how much a student exceeds the budget, as a share and as text.

        Args:
            latency: latency and size of the student, and latency of the teacher.

        Returns:
            The excess as a share of the limit (0.1: 10 % beyond), and a text with the student's
            value and the limit. If several limits are exceeded, both are of the limit with the
            largest excess. If none is, ``(0.0, "")``.
        """
        found = [(0.0, "")]
        if self.speedup is not None:
            excess = self.speedup / latency.speedup - 1
            found.append(
                (
                    excess,
                    f"{latency.speedup:.2f}x as fast as the teacher, {self.speedup:g}x is asked for",
                )
            )
        if self.latency_ms is not None:
            excess = latency.student.median_ms / self.latency_ms - 1
            found.append(
                (excess, f"{latency.student.median_ms:.3f} ms, {self.latency_ms:g} ms is asked for")
            )
        if self.num_parameters is not None:
            excess = latency.num_parameters / self.num_parameters - 1
            found.append(
                (
                    excess,
                    f"{latency.num_parameters:,} parameters, {self.num_parameters:,} are asked for",
                )
            )
        return max(found)


def latency_attrs(latency: ArchLatency) -> dict[str, Any]:
    """Return a dictionary of a latency measurement, to store as user attributes of a trial.

    It has the latencies of student and teacher with their interquartile ranges (in milliseconds),
    the speed-up and the student's number of parameters.
    """
    return {
        "num_parameters": latency.num_parameters,
        "latency_ms": latency.student.median_ms,
        "latency_iqr_ms": latency.student.iqr_ms,
        "teacher_latency_ms": latency.teacher.median_ms,
        "teacher_latency_iqr_ms": latency.teacher.iqr_ms,
        "speedup": latency.speedup,
    }
