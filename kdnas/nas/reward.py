"""The reward that ranks candidates."""

import math

from kdnas.system.errors import UserError


def reward(
    loss: float,
    latency_student: float,
    latency_teacher: float,
    alpha: float = -0.06,
    beta: float = 0.6,
) -> float:
    """Return ``(1 - loss) * (latency_student / (beta * latency_teacher)) ** alpha``.

    A lower loss or a lower latency never lowers the reward. If ``loss > 1``, the first factor is
    negative, and the formula would prefer the slower student. So the second factor is then
    inverted.

    ``beta`` multiplies the reward by a constant (``beta ** -alpha``, or its inverse if ``loss >
    1``) and cannot change a ranking. ``alpha`` weighs latency against loss: at -0.06, halving the
    latency raises the reward as much as raising ``1 - loss`` by 4.2 %.

    Args:
        loss: error of the student; 0 is perfect.
        latency_student: latency of the student, in any unit, above 0.
        latency_teacher: latency of the teacher, in the same unit, above 0.
        alpha: 0 or less; 0 ranks by loss alone.
        beta: latency, as a share of the teacher's, at which the second factor is 1; above 0.

    Returns:
        A finite number; higher is better.

    Raises:
        UserError: a value is out of its range or not finite.

    Source: Trivedi et al. 2023, "Neural Architecture Search for Effective Teacher-Student Knowledge
        Transfer in Language Models", whose code has beta = 0.6 ** 6. The form of the reward is
        MnasNet's (Tan et al. 2019, equation 2).
    """
    if not math.isfinite(loss):
        raise UserError(f"loss is {loss}: a reward needs a finite one.")
    positive = {
        "latency_student": latency_student,
        "latency_teacher": latency_teacher,
        "beta": beta,
    }
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise UserError(f"{name} is {value}: give a number above 0.")
    if not -math.inf < alpha <= 0:
        raise UserError(
            f"alpha is {alpha}: give 0 or less; a positive alpha would reward slower students."
        )
    factor = (latency_student / (beta * latency_teacher)) ** alpha
    return (1 - loss) * factor if loss <= 1 else (1 - loss) / factor
