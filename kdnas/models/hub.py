"""The Hugging Face hub where it does not answer: that is no mistake of the user's."""

import errno
import socket

import huggingface_hub

from kdnas.system.errors import causes, first_line

_NO_ANSWER = (ConnectionError, TimeoutError, socket.gaierror)
_NO_WAY = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}


class HubAway(OSError):
    """The hub cannot be reached, or is out of order: the same command may do later (exit code 3)."""


def looked_in() -> str:
    """Where what it has is looked for, in words."""
    return (
        "in the hub's cache (HF_HUB_OFFLINE is set)"
        if huggingface_hub.is_offline_mode()
        else "on the hub"
    )


def refuse_away(error: BaseException, purpose: str, remedy: str) -> None:
    """Tell a hub that is away from one that has not got what it was asked for.

    Args:
        error: what asking for it raised.
        purpose: what it was asked for, in words.
        remedy: what can be done now.

    Raises:
        HubAway: it gave no answer, or that it is out of order; not where ``HF_HUB_OFFLINE`` keeps it from being asked.
    """
    # The HTTP client's own errors are no OSErrors, but have one behind them.
    if not huggingface_hub.is_offline_mode() and any(map(_is_no_answer, causes(error))):
        raise HubAway(
            f"The Hugging Face hub cannot be reached for {purpose} ({first_line(error)}): {remedy}, or try again later"
        ) from error


def _is_no_answer(error: BaseException) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    number = error.errno if isinstance(error, OSError) else None
    return isinstance(error, _NO_ANSWER) or number in _NO_WAY or status == 429 or status >= 500
