"""The budget: hard limits beside the reward."""

from dataclasses import dataclass
from typing import Any

from kdnas.deploy.latency import ArchLatency
from kdnas.system.errors import UserError


@dataclass(frozen=True)
class Budget:
    """A hard limit beside the reward; checked before a candidate is trained, for latency does not depend on weights.

    Args:
        speedup: at least so many times as fast as the teacher.
        latency_ms: at most so many milliseconds.
        num_parameters: at most so many, encoder and classification head.

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
        """How far a student is beyond the limits, relative to them (0 or less: within), and the reason in words."""
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
    """What a trial keeps of a measurement."""
    return {
        "num_parameters": latency.num_parameters,
        "latency_ms": latency.student.median_ms,
        "latency_iqr_ms": latency.student.iqr_ms,
        "teacher_latency_ms": latency.teacher.median_ms,
        "teacher_latency_iqr_ms": latency.teacher.iqr_ms,
        "speedup": latency.speedup,
    }
