"""kdnas: knowledge distillation guided by neural architecture search, for BERT-family encoders."""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``from kdnas import distill, search``, with nothing imported before it is asked for."""
    if name == "search":
        return importlib.import_module("kdnas.api").search
    if name == "distill":  # a package that can be called
        return importlib.import_module("kdnas.distill")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "distill", "search"})
