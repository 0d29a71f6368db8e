"""Distillation: teacher states, objectives, and the module that is trained.

The package can be called: ``from kdnas import distill; distill(teacher, text, arch)`` is ``kdnas.api.distill``.
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        from kdnas.api import distill

        return distill(*args, **options)


sys.modules[__name__].__class__ = _Callable
