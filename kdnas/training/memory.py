"""Release memory that earlier work has left."""

import ctypes
import gc
import sys


def release_memory() -> None:
    """Release the memory of earlier work.

    A Trainer and its module refer to each other, so only the garbage collector frees them; and
    glibc keeps freed memory.
    """
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Return the freed memory that glibc keeps to the operating system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # musl has none
        trim(0)
