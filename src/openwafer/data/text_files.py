"""Documents and sentences of plain text.

Decides which files a list of paths means, how a file is cut into documents, and a document into
sentences. Does not tokenize.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

from openwafer.errors import DataError

__all__ = ["Cut", "documents_of", "documents_of_range", "sentences_of", "text_files"]

Cut = Literal["files", "blank_lines", "lines"]

_ENDINGS = (".txt", ".text", ".md", ".rst", ".py", ".jsonl")


def text_files(inputs: Sequence[Path]) -> list[Path]:
    """The files of these paths, sorted: a folder means all text files below it.

    Raises:
        DataError: a path does not exist, or there is no text file at all.
    """
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found += (p for p in path.rglob("*") if p.suffix in _ENDINGS and p.is_file())
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"there is no {path}", allowed="files or folders of text")
    if not found:
        raise DataError(
            "there is no text file",
            where=", ".join(map(str, inputs)),
            allowed=f"files, or folders with files that end in {', '.join(_ENDINGS)}",
        )
    return sorted(set(found))


def documents_of(path: Path, cut: Cut = "files") -> Iterator[str]:
    """The documents of one file, empty ones left out.

    cut: the whole file is one; or an empty line ends one; or each line is one. In `.jsonl` each
    line is one in any case: its `text`.

    Raises:
        DataError: the file is not UTF-8, or a line of JSON has no text; with file and line.
    """
    text = _decoded(path, path.read_bytes(), first_line=1)
    pieces = _json_texts(path, text) if path.suffix == ".jsonl" else _pieces(text, cut)
    for piece in pieces:
        if piece and not piece.isspace():
            yield piece


def documents_of_range(path: Path, start: int, end: int, cut: Cut) -> Iterator[str]:
    """The documents that begin in the bytes `start` to `end` of a large file.

    Ranges that cover a file give each of its documents once. With cut="files" each range is a
    document, from line to line.
    """
    border = b"\n\n" if cut == "blank_lines" else b"\n"
    with open(path, "rb") as file:
        begin = _after_border(file, start, border)
        stop = _after_border(file, end, border)
        file.seek(begin)
        data = file.read(max(0, stop - begin))
        file.seek(0)
        first_line = file.read(begin).count(b"\n") + 1 if not _is_utf8(data) else 1
    for piece in _pieces(_decoded(path, data, first_line=first_line), cut):
        if piece and not piece.isspace():
            yield piece


def _after_border(file: BinaryIO, position: int, border: bytes) -> int:
    """The first byte at or after `position` that follows a border; the beginning stays."""
    if position == 0:
        return 0
    start = max(0, position - len(border))
    file.seek(start)
    seen = b""
    while block := file.read(1 << 16):
        seen += block
        found = seen.find(border)
        if found >= 0:
            return start + found + len(border)
    return start + len(seen)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _decoded(path: Path, data: bytes, *, first_line: int) -> str:
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + first_line
        raise DataError(
            f"the text is not UTF-8: {error.reason}",
            where=f"{path}:{line}",
            hint=f"iconv -f latin1 -t utf8 {path.name}, if it is Latin-1",
        ) from error


def _pieces(text: str, cut: Cut) -> Iterator[str]:
    if cut == "files":
        yield text
    elif cut == "lines":
        yield from text.splitlines()
    else:
        block: list[str] = []
        for line in text.splitlines(keepends=True):
            if line.strip():
                block.append(line)
            elif block:
                yield "".join(block)
                block = []
        yield "".join(block)


def _json_texts(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            yield str(content["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"no text in this line: {error}",
                where=f"{path}:{number}",
                allowed='one object a line, such as {"text": "..."}',
            ) from error


def sentences_of(document: str) -> list[str]:
    """The document's lines with their ends, empty lines joined to the one before; their
    concatenation is the document."""
    sentences: list[str] = []
    for line in document.splitlines(keepends=True):
        if sentences and (not line.strip() or not sentences[-1].strip()):
            sentences[-1] += line
        else:
            sentences.append(line)
    return sentences
