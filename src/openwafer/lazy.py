"""Packages whose names are loaded when they are first used.

Decides how: `__getattr__` and `__dir__` of a package from a table. So `import openwafer` costs
next to nothing, and torch is loaded by what needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["lazy_names"]


def lazy_names(
    package: str, homes: Mapping[str, str], submodules: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__, __dir__ = lazy_names(__name__, _HOMES)` at the end of an `__init__.py`.

    Args:
        package: its `__name__`.
        homes: each public name with the module that it is from, `.module` of the package itself or
            `some.other.module`.
        submodules: modules of the package that need no import of their own.
    """
    modules = frozenset(submodules)

    def get(name: str) -> Any:
        if name in modules:
            return import_module(f".{name}", package)
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name], package), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted(sys.modules[package].__all__)

    return get, names
