"""Release memory that earlier fits still hold."""

import ctypes
import gc
import sys


def release_memory() -> None:
    """Free the memory of earlier fits and return it to the operating system.

    A Trainer and its module refer to each other, so only the garbage collector frees them.
    """
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Give freed memory, which glibc keeps for later use, back to the operating system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # musl has none
        trim(0)
