"""Modules of the current folder: imported where a class path of the user's names them, else never."""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# The folder and the names, for the processes that this one starts.
_NAMED = "KDNAS_MODULES"
_DOTTED = re.compile(r"([A-Za-z_]\w*)(\.[A-Za-z_]\w*)+")


class _NamedModules(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        folder, *names = os.environ.get(_NAMED, "").split(os.pathsep)
        if path is None and fullname in names:
            return PathFinder.find_spec(fullname, [folder])
        return None


def name_modules(values: Iterable[Any]) -> None:
    """Let modules of the current folder be imported that class paths in these values name.

    Installed ones come first. Nothing else of the folder is found, here or in any Python that this
    process starts: a library that looks for a package which is not installed does not run a file
    of the folder that has its name.
    """
    names = {
        found[1]
        for value in strings_in(list(values))
        if (found := _DOTTED.fullmatch(value)) and not os.path.exists(value)
    }
    find_named_modules()
    os.environ[_NAMED] = os.pathsep.join([os.getcwd(), *sorted(names)])
    os.environ.setdefault("PYTHONSAFEPATH", "1")


def find_named_modules() -> None:
    """Look for what this process, or the one that started it, has named."""
    if not any(isinstance(finder, _NamedModules) for finder in sys.meta_path):
        sys.meta_path.append(_NamedModules())


def strings_in(value: Any) -> Iterator[str]:
    """Every text in nested settings, names of settings aside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings_in(part)
