"""A Hugging Face hub that does not answer, which is no mistake of the user's."""

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import huggingface_hub

from kdnas.system.errors import UserError, causes, first_line

_NO_ANSWER = (ConnectionError, TimeoutError, socket.gaierror)
_NO_WAY = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}


class HubAway(OSError):
    """The hub cannot be reached: the same command may work later (exit code 3)."""


@contextmanager
def from_hub(lacking: str, repo: str, repo_type: str, instead: str, if_none: str) -> Iterator[None]:
    """Load from the hub (a ``model`` or a ``dataset``), and tell why that fails.

    ``lacking`` says what is not here; ``instead`` can be given where the hub does not answer;
    ``if_none`` says what to do where it does, and has no such thing.
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
    except Exception as error:  # the HTTP client's own errors among them
        remedy = f"give {instead}, or HF_HUB_OFFLINE=1 for one in the cache"
        refuse_away(error, lacking, remedy)
        raise UserError(f"{lacking}, nor {place}: {first_line(error)}; {if_none}.") from error


def refuse_away(error: BaseException, lacking: str, remedy: str) -> None:
    """Raise ``HubAway`` if a request's error means that the hub did not answer.

    ``lacking`` says what there is not yet, ``remedy`` what can be done now.
    """
    # The HTTP client's own errors are no OSErrors, but are caused by one.
    if not huggingface_hub.is_offline_mode() and any(map(_is_no_answer, causes(error))):
        raise HubAway(
            f"{lacking}, and the Hugging Face hub cannot be reached ({first_line(error)}): "
            f"{remedy}, or try again later"
        ) from error


def _is_no_answer(error: BaseException) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    number = error.errno if isinstance(error, OSError) else None
    return isinstance(error, _NO_ANSWER) or number in _NO_WAY or status == 429 or status >= 500
