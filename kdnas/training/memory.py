"""Memory that earlier work has left, given back."""

import ctypes
import gc
import sys


def release_memory() -> None:
    """Give back what earlier work left: Trainer and module refer to each other, and glibc keeps what was freed."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Give what glibc keeps of freed memory back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # musl has none
        trim(0)
