"""Building a frozen dataclass from a mapping, with every mistake named.

Decides how the type and the bounds of a field turn into checks, and how several mistakes of one
file become one error. Does not decide which keys exist (the dataclasses do) nor where a key stands
in a file (the `locate` function it is given does).

Field types understood: int, float, bool, str, Path, Literal of strings, `tuple[X, ...]`, and unions
of these with None. Rules that are not obvious:
    a whole number is fine where a float is wanted, and a float without fraction (`1e4`) where an
    int is wanted; a number written as text (`"3e-4"`) is fine as a float; true is never a number;
    a float must be finite.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from openwafer.errors import ConfigError, nearest

__all__ = ["KeyPath", "Locate", "Mistake", "Report", "build", "limits", "text_of"]

KeyPath = tuple[object, ...]
"""The keys that lead to a value: `("optimizer", "learning_rate", 0, "steps")`."""

Locate = Callable[[KeyPath], str]
"""Gives the place of a key path, as `params.yaml:12`."""

T = TypeVar("T")


def limits(
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    ignore_case: bool = False,
) -> dict[str, object]:
    """Field metadata: inclusive (`minimum`, `maximum`) and exclusive (`above`, `below`) bounds.

    `ignore_case` lets a Literal of strings be written in any case.
    """
    given = {"minimum": minimum, "maximum": maximum, "above": above, "below": below}
    bounds: dict[str, object] = {name: value for name, value in given.items() if value is not None}
    return {**bounds, "ignore_case": ignore_case}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """One thing that is wrong; the fields are those of `OpenWaferError`."""

    what: str
    where: str = ""
    allowed: str = ""
    hint: str = ""


class Report:
    """Collects mistakes, so that a user sees all of a file's at once."""

    def __init__(self) -> None:
        self.mistakes: list[Mistake] = []

    def add(self, what: str, *, where: str = "", allowed: str = "", hint: str = "") -> None:
        self.mistakes.append(Mistake(what=what, where=where, allowed=allowed, hint=hint))

    def add_error(self, error: ConfigError) -> None:
        self.add(error.what, where=error.where, allowed=error.allowed, hint=error.hint)

    def raise_if_any(self) -> None:
        """Raise one ConfigError for everything collected; the first mistake's place leads."""
        if not self.mistakes:
            return
        first = self.mistakes[0]
        if len(self.mistakes) == 1:
            raise ConfigError(first.what, where=first.where, allowed=first.allowed, hint=first.hint)
        lines = [f"{len(self.mistakes)} mistakes in the parameters"]
        for number, mistake in enumerate(self.mistakes, start=1):
            text = str(
                ConfigError(
                    mistake.what, where=mistake.where, allowed=mistake.allowed, hint=mistake.hint
                )
            )
            lines.append(f"  {number}. " + text.replace("\n", "\n   "))
        raise ConfigError("\n".join(lines), where=first.where)


def text_of(path: KeyPath) -> str:
    """A key path as a user writes it: `optimizer.learning_rate[0].steps`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def build(
    cls: type[T],
    values: Mapping[str, object],
    *,
    path: KeyPath,
    locate: Locate,
    report: Report,
    passed_over: Sequence[str] = (),
    none_means_default: bool = False,
) -> T | None:
    """Build the dataclass `cls` from `values`, or return None and leave the mistakes in `report`.

    Args:
        path: where `values` stands, for messages.
        passed_over: keys that are allowed in `values` but not fields of `cls`.
        none_means_default: treat a null as a key that is not there.
    """
    hints = get_type_hints(cls)
    known: dict[str, Field[Any]] = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    before = len(report.mistakes)
    _report_unknown(values, [*known, *passed_over], path=path, locate=locate, report=report)
    arguments: dict[str, object] = {}
    for name, field in known.items():
        given = values.get(name)
        if name not in values or (given is None and none_means_default):
            if field.default is MISSING and field.default_factory is MISSING:
                report.add(
                    f"`{text_of((*path, name))}` is missing",
                    where=locate(path),
                    allowed=_describe(hints[name], field.metadata),
                )
            continue
        problem, value = _convert(given, hints[name], field.metadata)
        if problem:
            report.add(
                f"`{text_of((*path, name))}` is {_show(given)}",
                where=locate((*path, name)),
                allowed=problem,
                hint=_hint(given, hints[name]),
            )
        else:
            arguments[name] = value
    return cls(**arguments) if len(report.mistakes) == before else None


def _report_unknown(
    values: Mapping[str, object],
    known: Sequence[str],
    *,
    path: KeyPath,
    locate: Locate,
    report: Report,
) -> None:
    for key in values:
        if key not in known:
            report.add(
                f"unknown key `{text_of((*path, key))}`",
                where=locate((*path, key)),
                allowed=", ".join(sorted(known)),
                hint=nearest(str(key), known),
            )


def _convert(value: object, hint: Any, metadata: Mapping[str, Any]) -> tuple[str, object]:
    """(what is allowed, None) if `value` does not fit `hint`, else ("", the converted value)."""
    for member in _members(hint):
        fits, converted = _convert_member(value, member, metadata)
        if fits:
            return ("" if _in_bounds(converted, metadata) else _describe(hint, metadata)), converted
    return _describe(hint, metadata), None


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _convert_member(value: object, member: Any, metadata: Mapping[str, Any]) -> tuple[bool, object]:
    origin = get_origin(member)
    if member is type(None):
        return value is None, None
    if member is bool:
        return isinstance(value, bool), value
    if member is int:
        return _as_int(value)
    if member is float:
        return _as_float(value)
    if member is str:
        return isinstance(value, str), value
    if member is Path:
        fits = isinstance(value, (str, Path)) and str(value) != ""
        return fits, Path(str(value)).expanduser() if fits else None
    if origin is Literal:
        return _as_choice(value, get_args(member), ignore_case=bool(metadata.get("ignore_case")))
    if origin is tuple:
        return _as_tuple(value, get_args(member)[0], metadata)
    raise AssertionError(f"schema.build does not know the field type {member!r}")


def _as_int(value: object) -> tuple[bool, object]:
    if isinstance(value, float) and value.is_integer():
        return True, int(value)
    return isinstance(value, int) and not isinstance(value, bool), value


def _as_float(value: object) -> tuple[bool, object]:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False, None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return False, None
    return math.isfinite(number), number


def _as_choice(
    value: object, choices: tuple[object, ...], *, ignore_case: bool
) -> tuple[bool, object]:
    for choice in choices:
        same = type(value) is type(choice) and value == choice
        if ignore_case and isinstance(value, str):
            same = value.casefold() == str(choice).casefold()
        if same:
            return True, choice
    return False, None


def _as_tuple(value: object, item: Any, metadata: Mapping[str, Any]) -> tuple[bool, object]:
    if not isinstance(value, (list, tuple)):
        return False, None
    converted = [_convert_member(entry, item, metadata) for entry in value]
    return all(fits for fits, _ in converted), tuple(entry for _, entry in converted)


def _in_bounds(value: object, metadata: Mapping[str, Any]) -> bool:
    if isinstance(value, tuple):
        return all(_in_bounds(entry, metadata) for entry in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return True
    return (
        value >= metadata.get("minimum", -math.inf)
        and value <= metadata.get("maximum", math.inf)
        and value > metadata.get("above", -math.inf)
        and value < metadata.get("below", math.inf)
    )


_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
    type(None): "null",
}


def _describe(hint: Any, metadata: Mapping[str, Any] | None = None) -> str:
    words: list[str] = []
    for member in _members(hint):
        if get_origin(member) is Literal:
            choices = get_args(member)
            words.extend(str(c).lower() if isinstance(c, bool) else str(c) for c in choices)
        elif get_origin(member) is tuple:
            words.append(f"a list, each entry {_describe(get_args(member)[0])}")
        else:
            words.append(_NAMES[member])
    bounds = [
        f"{sign} {metadata[name]:g}"
        for name, sign in (("minimum", ">="), ("above", ">"), ("maximum", "<="), ("below", "<"))
        if metadata and name in metadata
    ]
    text = " or ".join(words)
    return f"{text} ({' and '.join(bounds)})" if bounds else text


def _show(value: object) -> str:
    if value is None:
        return "null"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    for kind, word in (
        (bool, "true or false"),
        (str, "text"),
        (dict, "a mapping"),
        (list, "a list"),
    ):
        if isinstance(value, kind):
            return f"{text} ({word})"
    return f"{text} ({type(value).__name__})"


def _hint(value: object, hint: Any) -> str:
    choices = [
        str(choice)
        for member in _members(hint)
        if get_origin(member) is Literal
        for choice in get_args(member)
    ]
    return nearest(str(value), choices)
