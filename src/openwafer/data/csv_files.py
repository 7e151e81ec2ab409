"""Rows of CSV files at random places, in the documented layout: files, and `meta.dat` beside them
with the name and the number of examples of each.

Decides how rows are found and what is checked. What the columns mean is the tasks' business.
"""

from __future__ import annotations

import csv
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from openwafer.errors import DataError

__all__ = ["CsvRows", "holds_csv", "integers_of", "listed_files"]

_BLOCK_BYTES = 1 << 24
_QUOTE, _LINE_END = 34, 10


def holds_csv(paths: Sequence[Path]) -> bool:
    """Whether these are data of the documented CSV layouts."""
    return any(
        path.suffix == ".csv" or (path.is_dir() and any(path.glob("*.csv"))) for path in paths
    )


def listed_files(paths: Sequence[Path], endings: Sequence[str]) -> list[tuple[Path, int | None]]:
    """Files with their number of examples as `meta.dat` states it (None without one).

    Raises:
        DataError: no file, a line of `meta.dat` that is not `name number`, or a missing file.
    """
    found: list[tuple[Path, int | None]] = []
    for path in paths:
        meta = path / "meta.dat"
        if meta.is_file():
            found += _listed(meta)
        elif path.is_dir():
            found += [(p, None) for p in sorted(path.iterdir()) if p.suffix in endings]
        else:
            found.append((path, None))
    if not found:
        raise DataError(
            "there are no data files",
            where=", ".join(map(str, paths)),
            allowed=f"meta.dat, or files that end in {', '.join(endings)}",
        )
    return found


def _listed(meta: Path) -> list[tuple[Path, int | None]]:
    found: list[tuple[Path, int | None]] = []
    for line, text in enumerate(meta.read_text(encoding="utf-8").splitlines(), start=1):
        words = text.split()
        if not words:
            continue
        if len(words) != 2 or not words[1].isdigit():
            raise DataError(
                f"{text!r} is not a file and its number of examples",
                where=f"{meta}:{line}",
                allowed="lines such as `train-1.csv 2000`",
            )
        path = meta.parent / words[0]
        if not path.is_file():
            raise DataError(f"there is no {path}", where=f"{meta}:{line}")
        found.append((path, int(words[1])))
    return found


class CsvRows:
    """The rows of all files as one sequence.

    Args:
        paths: folders with `meta.dat` or CSV files, or CSV files.
        columns: that each file must have.

    Raises:
        DataError: see `listed_files`; or a header without one of the columns, or a number of rows
            other than stated.
    """

    def __init__(self, paths: Sequence[Path], columns: Sequence[str]) -> None:
        files = listed_files(paths, (".csv",))
        self._files = [path for path, _ in files]
        self._maps: dict[int, mmap.mmap] = {}
        self._offsets: list[npt.NDArray[np.int64]] = []
        self._headers: list[list[str]] = []
        for path, expected in files:
            starts = _row_starts(path)
            with open(path, "rb") as file:
                header = _parse(path, 1, file.read(int(starts[1]) if len(starts) > 1 else 0))
            missing = [column for column in columns if column not in header]
            if missing:
                raise DataError(
                    f"there is no column {', '.join(missing)}",
                    where=f"{path}:1",
                    allowed=", ".join(columns),
                )
            if expected is not None and expected != len(starts) - 2:
                raise DataError(
                    f"{len(starts) - 2} rows",
                    where=str(path),
                    allowed=f"{expected}, as its meta.dat says",
                    hint="the file is cut short, or meta.dat is of another version of it",
                )
            self._offsets.append(starts[1:])
            self._headers.append(header)
        self._ends = np.cumsum([len(offsets) - 1 for offsets in self._offsets])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def header(self) -> list[str]:
        """The columns of the first file."""
        return self._headers[0]

    def _place(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, index - (int(self._ends[file - 1]) if file else 0)

    def where(self, index: int) -> str:
        """`file:line` of a row."""
        file, row = self._place(index)
        before = self._open(file)[: int(self._offsets[file][row])]
        line = before.count(b"\n") + 1
        return f"{self._files[file]}:{line}"

    def __getitem__(self, index: int) -> dict[str, str]:
        file, row = self._place(index)
        begin, end = self._offsets[file][row : row + 2].tolist()
        values = _parse(self._files[file], 0, self._open(file)[begin:end])
        header = self._headers[file]
        if len(values) != len(header):
            raise DataError(
                f"the row has {len(values)} columns",
                where=self.where(index),
                allowed=f"{len(header)}: {', '.join(header)}",
            )
        return dict(zip(header, values, strict=True))

    def _open(self, file: int) -> mmap.mmap:
        if file not in self._maps:
            with open(self._files[file], "rb") as opened:
                self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}


def _parse(path: Path, line: int, data: bytes) -> list[str]:
    try:
        return next(csv.reader([data.decode("utf-8")]), [])
    except (UnicodeDecodeError, csv.Error) as error:
        where = f"{path}:{line}" if line else str(path)
        raise DataError(f"not a row of CSV: {error}", where=where) from error


def _row_starts(path: Path) -> npt.NDArray[np.int64]:
    """Where each row begins, the header first, and where the last one ends. Line ends between
    quotes are part of a value."""
    size = path.stat().st_size
    starts: list[npt.NDArray[np.int64]] = [np.zeros(1, np.int64)]
    offset = num_quotes = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            data = np.frombuffer(block, dtype=np.uint8)
            line_ends = np.flatnonzero(data == _LINE_END)
            quotes = np.flatnonzero(data == _QUOTE)
            before = np.searchsorted(quotes, line_ends) + num_quotes
            starts.append(line_ends[before % 2 == 0] + offset + 1)
            offset += len(block)
            num_quotes += len(quotes)
    found = np.concatenate(starts)
    return found if found[-1] == size else np.append(found, size)


def integers_of(text: str, where: str) -> npt.NDArray[np.int64]:
    """The numbers of `[1, 2, 3]` or `1 2 3`.

    Raises:
        DataError: something else.
    """
    words = text.strip().strip("[]").replace(",", " ").split()
    try:
        return np.array(words, dtype=np.int64) if words else np.zeros(0, np.int64)
    except ValueError as error:
        raise DataError(
            f"{text[:40]!r} is not a list of whole numbers", where=where, allowed="[1, 2, 3]"
        ) from error
