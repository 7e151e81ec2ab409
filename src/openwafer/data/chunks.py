"""Pieces of the standard library's sources with a property to be found: the embedded
classification tasks.

Decides the pieces and their labels. Files are held out whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TypeVar

from openwafer.data.embedded import SourceFile, source_files
from openwafer.data.keyed_random import derive_seed

__all__ = ["ordered_chunks", "package_chunks"]

_PACKAGES = (
    "asyncio",
    "ctypes",
    "email",
    "http",
    "importlib",
    "multiprocessing",
    "unittest",
    "xml",
)
_Texts = TypeVar("_Texts", bound="tuple[str, ...]")

_CHUNK_CHARACTERS = 320
_MAX_CHUNKS = {"train": 6000, "eval": 1200}
_HELD_OUT_EVERY = 4


@cache
def package_chunks(split: str) -> tuple[tuple[str, str], ...]:
    """(piece, package) of eight packages; each package has files in both splits."""
    found: list[tuple[str, str]] = []
    for package in _PACKAGES:
        files = [file for file in _all_files() if file.name.startswith(f"{package}/")]
        held_out = [file for place, file in enumerate(files) if place % _HELD_OUT_EVERY == 0]
        chosen = [f for f in files if f not in held_out] if split == "train" else held_out
        found += [(piece, package) for file in chosen for piece in _pieces(file)]
    return tuple(_shuffled(found, split))


@cache
def ordered_chunks(split: str) -> tuple[tuple[str, str, str], ...]:
    """(first, second, label): `follows`, `precedes` or `elsewhere`."""
    files = [list(_pieces(file)) for file in source_files("train" if split == "train" else "eval")]
    pieces = [piece for file in files for piece in file]
    found: list[tuple[str, str, str]] = []
    for file in files:
        for first, second in zip(file[::2], file[1::2], strict=False):
            draw = derive_seed("order", first, second)
            if draw % 3 == 0:
                found.append((first, second, "follows"))
            elif draw % 3 == 1:
                found.append((second, first, "precedes"))
            else:
                found.append((first, pieces[(draw // 3) % len(pieces)], "elsewhere"))
    return tuple(_shuffled(found, split))


@cache
def _all_files() -> tuple[SourceFile, ...]:
    """Both splits' files, in the order of a hash of their names."""
    files = [*source_files("train"), *source_files("eval")]
    return tuple(sorted(files, key=lambda file: derive_seed("file", file.name)))


def _pieces(file: SourceFile) -> Iterator[str]:
    """Whole lines, up to a number of characters; imports are left out, they tell too much."""
    lines: list[str] = []
    size = 0
    for line in file.text.splitlines():
        if not line.strip() or line.lstrip().startswith(("import ", "from ")):
            continue
        lines.append(line)
        size += len(line)
        if size >= _CHUNK_CHARACTERS:
            yield "\n".join(lines)
            lines, size = [], 0


def _shuffled(found: list[_Texts], split: str) -> list[_Texts]:
    """In the order of a hash of the texts, no more than the split's number."""
    limit = _MAX_CHUNKS["train" if split == "train" else "eval"]
    return sorted(found, key=lambda texts: derive_seed("chunk", *texts))[:limit]
