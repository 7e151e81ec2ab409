"""Text that every machine has: the Python standard library's own sources, with their docstrings;
and generated texts about a subject, which a small network learns in a minute.

Decides which files are taken, in which order, and which are held out. Nothing is downloaded. The
same Python release gives the same sources; another release gives others, so compare figures within
one.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

from openwafer.data.cache import cached_folder
from openwafer.data.generated import summaries
from openwafer.data.params import Split
from openwafer.data.tokenized_text import tokenize_text
from openwafer.errors import DataError

__all__ = [
    "TEXTS",
    "SourceFile",
    "embedded_tokenizer",
    "embedded_tokens",
    "source_files",
    "stdlib_text",
    "subject_text",
]

TRAIN_BYTES = 4 << 20
EVAL_BYTES = 256 << 10
_TOKENIZER_BYTES = 1 << 20
_NUM_TEXTS = {"train": 4000, "eval": 400, "predict": 400}

# Tests and data in the form of code are left out: they are half of the library, and say little.
_FOLDERS_LEFT_OUT = """
    test tests site-packages dist-packages __pycache__ idle_test encodings lib2to3 pydoc_data
    turtledemo __phello__ ensurepip
"""
_LEFT_OUT = frozenset(_FOLDERS_LEFT_OUT.split())
_HELD_OUT_EVERY = 12


@dataclass(frozen=True, slots=True)
class SourceFile:
    """name: the path below the standard library's folder, with slashes."""

    name: str
    text: str


@cache
def source_files(split: Split) -> tuple[SourceFile, ...]:
    """The library's files of this split (`predict` is `eval`), in an order that depends on their
    names alone.

    Raises:
        DataError: this Python has no readable standard library.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    named: list[tuple[int, str, Path]] = []
    for inside, folders, names in os.walk(folder):
        folders[:] = (f for f in folders if f not in _LEFT_OUT and not f.startswith("config-"))
        for path in (Path(inside) / name for name in names if name.endswith(".py")):
            name = path.relative_to(folder).as_posix()
            named.append((int(hashlib.sha256(name.encode()).hexdigest()[:12], 16), name, path))
    held_out = split != "train"
    files: list[SourceFile] = []
    for number, name, path in sorted(named):
        if (number % _HELD_OUT_EVERY == 0) == held_out:
            files.append(SourceFile(name, path.read_text(encoding="utf-8", errors="replace")))
    if not files:
        raise DataError(
            "this Python has no standard library sources to take as text",
            where=str(folder),
            hint="give data_dir, or install Python's standard library as files",
        )
    return tuple(files)


def stdlib_text(split: Split, max_bytes: int | None = None) -> tuple[SourceFile, ...]:
    """Whole files of the split until `max_bytes` of text are reached."""
    limit = max_bytes or (TRAIN_BYTES if split == "train" else EVAL_BYTES)
    kept: list[SourceFile] = []
    size = 0
    for file in source_files(split):
        if size >= limit:
            break
        kept.append(file)
        size += len(file.text.encode("utf-8", "replace"))
    return tuple(kept)


def subject_text(split: Split, max_bytes: int | None = None) -> tuple[SourceFile, ...]:
    """Texts of a few sentences about one subject each, a file each, until `max_bytes`; no text of
    one split is in the other."""
    texts = ("\n".join(sentences) + "\n" for sentences, _ in summaries(split, _NUM_TEXTS[split]))
    files = [SourceFile(f"{number}.txt", text) for number, text in enumerate(texts)]
    ends = accumulate(len(file.text) for file in files)
    limit = max_bytes or TRAIN_BYTES
    return tuple(file for file, end in zip(files, ends, strict=True) if end <= limit)


def embedded_tokens(
    name: str,
    split: Split,
    *,
    tokenizer: str,
    vocab_size: int,
    do_lower: bool = False,
    max_bytes: int | None = None,
) -> Path:
    """The folder of the split's tokens, prepared and cached when first asked for.

    Args:
        name: one of `TEXTS`.
        tokenizer: `bpe` or `wordpiece` (see `embedded_tokenizer`), `byte`, or a path.
    """
    files = TEXTS[name](split, max_bytes)
    source = tokenizer
    if tokenizer in ("bpe", "wordpiece"):
        source = str(embedded_tokenizer(name, tokenizer, vocab_size=vocab_size, do_lower=do_lower))
    digest = _digest(files)

    def make(folder: Path) -> None:
        texts = folder / "text"
        texts.mkdir()
        for number, file in enumerate(files):
            (texts / f"{number:05d}.txt").write_text(file.text, encoding="utf-8", newline="")
        tokenize_text([texts], folder, tokenizer=source, vocab_size=vocab_size, do_lower=do_lower)

    key = (5, split, tokenizer, vocab_size, do_lower, digest, _stamp(tokenizer))
    return cached_folder(name, key, make)


def embedded_tokenizer(name: str, kind: str, *, vocab_size: int, do_lower: bool = False) -> Path:
    """The file of a `bpe` or `wordpiece` tokenizer, trained on a fixed part of the training text:
    sections that ask for more or less text all get the same."""
    files = TEXTS[name]("train", _TOKENIZER_BYTES)

    def make(folder: Path) -> None:
        from openwafer.data.subwords import train_bpe, train_wordpiece

        texts = [file.text for file in files]
        if kind == "bpe":
            train_bpe(texts, vocab_size).save(folder)
        else:
            train_wordpiece(texts, vocab_size, do_lower=do_lower).save(folder)

    key = (5, kind, vocab_size, do_lower, _digest(files))
    return cached_folder(f"{name}-tokenizer", key, make) / "tokenizer.json"


TEXTS: Mapping[str, Callable[[Split, int | None], tuple[SourceFile, ...]]] = {
    "stdlib": stdlib_text,
    "subjects": subject_text,
}
"""What `embedded` may name where text is read."""


def _digest(files: Sequence[SourceFile]) -> str:
    return hashlib.sha256("\0".join(file.name + file.text for file in files).encode()).hexdigest()


def _stamp(tokenizer: str) -> str:
    """What changes when a tokenizer's file does."""
    path = Path(tokenizer)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
