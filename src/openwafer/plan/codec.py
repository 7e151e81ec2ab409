"""Frozen values to plain JSON values and back, exactly.

Decides the JSON form of dataclasses: an object with the fields' names. Does not decide what is
written where (artifacts.py). Reading checks every type, so that a damaged or foreign file raises
`ValueError` instead of giving a half-right value.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, cast

__all__ = ["decode", "encode"]

T = TypeVar("T")


def encode(value: Any) -> Any:
    """Dataclasses, tuples, mappings and scalars as JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        table = cast(Mapping[str, Any], value)
        return {key: encode(item) for key, item in table.items()}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in cast(tuple[Any, ...], value)]
    assert value is None or isinstance(value, (bool, int, float, str)), type(value)
    return value


def decode(kind: type[T], value: Any) -> T:
    """The value of dataclass `kind` that `encode` made `value` from.

    Raises:
        ValueError: `value` does not have that form.
    """
    return _decode(kind, value, kind.__name__)


def _decode(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(cast(Any, kind), value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return _checked(value in arguments, value, where)
    if origin is types.UnionType or origin is typing.Union:
        return _decode_union(arguments, value, where)
    if origin is tuple:
        _checked(isinstance(value, list) and arguments[-1] is Ellipsis, value, where)
        items = cast(list[Any], value)
        return tuple(_decode(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(items))
    if origin is Mapping:
        _checked(isinstance(value, dict), value, where)
        table = cast(dict[str, Any], value)
        return {key: _decode(arguments[1], v, f"{where}.{key}") for key, v in table.items()}
    if kind is types.NoneType:
        return _checked(value is None, value, where)
    return _checked(type(value) is kind, value, where)


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    _checked(isinstance(value, dict) and set(cast(Any, value)) == set(names), value, where)
    return kind(**{name: _decode(hints[name], value[name], f"{where}.{name}") for name in names})


def _decode_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    for kind in kinds:
        try:
            return _decode(kind, value, where)
        except ValueError:
            continue
    return _checked(False, value, where)


def _checked(right: bool, value: Any, where: str) -> Any:
    if not right:
        raise ValueError(f"{where}: not of the expected form: {str(value)[:80]}")
    return value
