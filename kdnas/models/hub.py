"""A Hugging Face hub that does not answer, which is no mistake of the user's."""

import errno
import socket

import huggingface_hub

from kdnas.system.errors import causes, first_line

_NO_ANSWER = (ConnectionError, TimeoutError, socket.gaierror)
_NO_WAY = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}


class HubAway(OSError):
    """The hub cannot be reached: the same command may work later (exit code 3)."""


def looked_in() -> str:
    """The place where a name is looked for, in words."""
    if huggingface_hub.is_offline_mode():
        return "in the hub's cache (HF_HUB_OFFLINE is set)"
    return "on the hub"


def refuse_away(error: BaseException, purpose: str, remedy: str) -> None:
    """Raise ``HubAway`` if a request's error means that the hub did not answer.

    ``purpose`` says in words what was asked for, ``remedy`` what can be done now.
    """
    # The HTTP client's own errors are no OSErrors, but are caused by one.
    if not huggingface_hub.is_offline_mode() and any(map(_is_no_answer, causes(error))):
        raise HubAway(
            f"The Hugging Face hub cannot be reached for {purpose} ({first_line(error)}): "
            f"{remedy}, or try again later"
        ) from error


def _is_no_answer(error: BaseException) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    number = error.errno if isinstance(error, OSError) else None
    return isinstance(error, _NO_ANSWER) or number in _NO_WAY or status == 429 or status >= 500
