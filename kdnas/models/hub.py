"""Errors of the Hugging Face hub: a hub that does not answer, or a mistake of the user."""

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import huggingface_hub

from kdnas.system.errors import UserError, causes, first_line

_NO_ANSWER = (ConnectionError, TimeoutError, socket.gaierror)
_NO_WAY = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}


class HubAway(OSError):
    """The hub cannot be reached; the same command may work later (exit code 3)."""


@contextmanager
def from_hub(lacking: str, repo: str, repo_type: str, instead: str, if_none: str) -> Iterator[None]:
    """Context manager for loading from the hub: turns errors into messages with a remedy.

    Args:
        lacking: start of the message: what does not exist on this machine.
        repo: name of the repository on the hub.
        repo_type: ``model`` or ``dataset``.
        instead: what the user can give instead if the hub does not answer.
        if_none: what the user can do if the hub has no such repository.

    Raises:
        HubAway: the hub does not answer.
        UserError: the hub has no such repository, or loading failed.
    """
    is_offline = huggingface_hub.is_offline_mode()
    place = "in the hub's cache (HF_HUB_OFFLINE is set)" if is_offline else "on the hub"
    try:
        if not is_offline:
            # Without a network this fails at once; the libraries try for 23 s.
            huggingface_hub.HfApi().repo_info(repo, repo_type=repo_type, timeout=5)
        yield
    except UserError:
        raise
    except Exception as error:  # includes the HTTP client's own errors
        remedy = f"give {instead}, or HF_HUB_OFFLINE=1 for one in the cache"
        refuse_away(error, lacking, remedy)
        raise UserError(
            f"{lacking}, and it was not found {place}: {first_line(error)}; {if_none}."
        ) from error


def refuse_away(error: BaseException, lacking: str, remedy: str) -> None:
    """Raise ``HubAway`` if an error means that the hub did not answer; otherwise return.

    Args:
        error: the error of a request to the hub.
        lacking: start of the message: what does not exist on this machine.
        remedy: what the user can do now.
    """
    # The HTTP client's own errors are not OSErrors, but are caused by one.
    if not huggingface_hub.is_offline_mode() and any(map(_is_no_answer, causes(error))):
        raise HubAway(
            f"{lacking}, and the Hugging Face hub cannot be reached ({first_line(error)}): "
            f"{remedy}, or try again later"
        ) from error


def _is_no_answer(error: BaseException) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    number = error.errno if isinstance(error, OSError) else None
    return isinstance(error, _NO_ANSWER) or number in _NO_WAY or status == 429 or status >= 500
