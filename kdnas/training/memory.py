"""Release memory that earlier fits still hold."""

import ctypes
import gc
import sys


def release_memory() -> None:
    """Release the memory of earlier fits.

    A Trainer and its module refer to each other, so only the garbage collector frees them. The
    memory that is freed is then returned to the operating system.
    """
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Return memory to the operating system that was freed but that glibc has kept."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # musl has none
        trim(0)
