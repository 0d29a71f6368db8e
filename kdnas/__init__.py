"""kdnas: knowledge distillation guided by neural architecture search, for BERT-family encoders."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``from kdnas import distill, search``, with nothing imported before it is asked for."""
    if name == "search":
        from kdnas.api import search

        return search
    if name == "distill":  # a package that can be called
        from importlib import import_module

        return import_module("kdnas.distill")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
