"""Make modules of the current folder importable, but only those named in the user's settings."""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# Environment variable with the folder and the names of its modules that may be imported, for this process's children.
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
    """Allow imports of those modules in the current folder that the settings name.

    An installed module of the same name has precedence. No other module of the current folder can
    be imported by this process or its children: otherwise a library that tries to import an
    optional package could run a user's file of the same name.

    Args:
        values: settings, nested or not; a class path in them, such as ``my_module.MyClass``, names
            the module ``my_module``.
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
    """Make the modules importable that this process or its parent gave to ``name_modules``."""
    if not any(isinstance(finder, _NamedModules) for finder in sys.meta_path):
        sys.meta_path.append(_NamedModules())


def strings_in(value: Any) -> Iterator[str]:
    """Yield every string among the values of nested settings, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings_in(part)
