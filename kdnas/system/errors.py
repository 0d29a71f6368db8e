"""The exceptions of kdnas, and helpers for their messages."""

import difflib
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress

# The messages of torch's allocators and of oneDNN when memory runs out. oneDNN's message has more text if it cannot
# create a primitive for another reason, hence the $.
OUT_OF_MEMORY = "(?im)out of memory|can(no|.)t allocate memory|could not create a primitive$"


class UserError(ValueError):
    """A mistake that the user can correct; a command that raises it ends with exit code 2.

    Args:
        message: one line that says what is wrong, the wrong value, and what to do. Characters that
            cannot be printed, as in the name of a file, are shown as Python escapes.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class CandidateFailed(RuntimeError):
    """A candidate (student shape) of a search cannot be trained or scored.

    Its trial fails with the message as the reason, and the search goes on.
    """


class DeviceFailed(CandidateFailed):
    """The GPU of a candidate has failed.

    The process that trains the candidate ends, and the candidate is tried again in another process.
    """


def reason_of(error: Exception) -> str:
    """Return the text to record as the reason why a candidate failed with this error."""
    if isinstance(error, CandidateFailed):
        return str(error)
    if is_memory(error):
        return f"out of memory: {first_line(error)}"
    return f"{type(error).__name__}: {error}"


def is_memory(error: Exception) -> bool:
    """Whether an error, of any library, means that CPU or GPU memory ran out."""
    return isinstance(error, MemoryError) or bool(
        re.search(OUT_OF_MEMORY, f"{type(error).__name__}: {error}")
    )


def is_device_failure(error: Exception) -> bool:
    """Whether an error means that this process cannot use its GPU any more."""
    said = f"{type(error).__name__}: {error}"
    return not is_memory(error) and bool(
        re.search("AcceleratorError|CUDA error|HIP error|CUBLAS_STATUS|CUDNN_STATUS", said)
    )


class ParityError(RuntimeError):
    """An exported file gives different outputs from the model's.

    Nothing is exported then, and the command ends with exit code 1.
    """


def tell(message: str) -> None:
    """Print the final message of a command to stderr; do nothing if stderr cannot be written to."""
    with suppress(OSError):
        print(f"kdnas: {message}", file=sys.stderr)


def nearest(name: object, choices: Iterable[str], always_list: bool = False) -> str:
    """Return a hint to append to a message about an unknown name: a similar name, or all names.

    Args:
        name: the name as the user gave it; from YAML, it may be of any type.
        choices: the names that exist.
        always_list: list the choices even if one of them is close.

    Returns:
        ``" Did you mean 'x'?"`` if a choice is close, else ``" Choose from: a, b, c."``; with
        ``always_list`` both, if a choice is close.
    """
    names = sorted(choices)
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Choose from: {', '.join(names)}." if always_list or not close else hint


def counted(number: int, thing: str) -> str:
    """Return a number with its noun: ``1 layer``, ``2 layers``."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


class StoreAway(OSError):
    """The database of the Optuna study did not answer for too long, or its disk has failed."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, to quote it in a message of kdnas.

    If the first line ends with a colon, the second line is added. If the error has no text, its
    class name is returned.
    """
    first, *rest = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first.rstrip(".")


def as_raised(error: OSError) -> OSError:
    """Return a DataLoader worker's OSError as the worker raised it, with its ``errno``.

    torch raises such an error again in the main process, but without ``errno``, and with the
    worker's traceback as its text. Other errors are returned unchanged.

    Args:
        error: error that the main process has caught.
    """
    if error.errno is not None or not str(error).startswith("Caught "):
        return error
    last = str(error).strip().splitlines()[-1]
    found = re.search(r"\[Errno (\d+)\] (.*)", last)
    return OSError(int(found[1]), found[2]) if found else OSError(last)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, then the error behind it (``__context__`` or ``__cause__``), and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # a cause raised again is its own cause
        seen.add(id(error))
        yield error
        error = error.__context__ or error.__cause__
