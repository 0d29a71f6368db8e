"""The kinds of failure that the product knows by name, and what their messages are made of."""

import difflib
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress

# What torch's own allocators say, and oneDNN, which says no more where it can allocate nothing (but for what else it
# cannot make, it says more).
OUT_OF_MEMORY = "(?im)out of memory|can(no|.)t allocate memory|could not create a primitive$"


class UserError(ValueError):
    """A mistake that the user can mend. Its one line says what is wrong, the value, and the remedy (exit code 2).

    Args:
        message: the line; what others have named (a column, a file) is shown in it as Python would
            write it where it is not to be printed.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class CandidateFailed(RuntimeError):
    """A candidate that cannot be scored: its trial fails with this reason, and the search goes on."""


class DeviceFailed(CandidateFailed):
    """A candidate whose GPU has failed; its process ends with it, and another tries it once more."""


def reason_of(error: Exception) -> str:
    """Why a candidate fails that has raised this."""
    if isinstance(error, CandidateFailed):
        return str(error)
    if is_memory(error):
        return f"out of memory: {first_line(error)}"
    return f"{type(error).__name__}: {error}"


def is_memory(error: Exception) -> bool:
    """Whether an error says that there was no memory left, in any library's words."""
    return isinstance(error, MemoryError) or bool(
        re.search(OUT_OF_MEMORY, f"{type(error).__name__}: {error}")
    )


def is_device_failure(error: Exception) -> bool:
    """Whether an error is a GPU's, after which its process cannot use it any more."""
    said = f"{type(error).__name__}: {error}"
    return not is_memory(error) and bool(
        re.search("AcceleratorError|CUDA error|HIP error|CUBLAS_STATUS|CUDNN_STATUS", said)
    )


class ParityError(RuntimeError):
    """A file of an export does not compute what the model computes: nothing is exported (exit code 1)."""


def tell(message: str) -> None:
    """The one line on stderr; where nothing can be written there either, the exit code must do."""
    with suppress(OSError):
        print(f"kdnas: {message}", file=sys.stderr)


def nearest(name: object, choices: Iterable[str], always_list: bool = False) -> str:
    """A hint for a name that does not exist.

    Args:
        name: what was written; not always text, where it comes from YAML.
        choices: the names that there are.
        always_list: them too.

    Returns:
        ``" Did you mean 'x'?"`` where one is close, else ``" Choose from: a, b, c."``, or both.
    """
    names = sorted(choices)
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Choose from: {', '.join(names)}." if always_list or not close else hint


def counted(number: int, thing: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


class StoreAway(OSError):
    """The study's database has been away for too long."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, to put into one of ours; its name where it says nothing."""
    first, *rest = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first.rstrip(".")


def as_raised(error: OSError) -> OSError:
    """An error as it was before torch handed it over from a loader's worker: in its text alone, below a traceback."""
    if error.errno is not None or not str(error).startswith("Caught "):
        return error
    last = str(error).strip().splitlines()[-1]
    found = re.search(r"\[Errno (\d+)\] (.*)", last)
    return OSError(int(found[1]), found[2]) if found else OSError(last)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it came from, or that were handled when it came."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # a cause that is raised again is its own
        seen.add(id(error))
        yield error
        error = error.__context__ or error.__cause__
