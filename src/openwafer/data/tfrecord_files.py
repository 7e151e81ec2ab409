"""TFRecord files without TensorFlow: records at random places, and a writer.

Decides how records lie in a file, what is checked, and which files of a folder are meant. What a
record holds is in tfrecord_messages.py.

A record is its length (8 bytes, little-endian), the masked CRC-32C of those (4), the data, and the
masked CRC-32C of them (4). Source: TensorFlow's record_writer.h and crc32c.h. The checksums are
google-crc32c's (extra `zoo`): in Python alone they would take longer than training.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from openwafer.errors import ConfigError, DataError
from openwafer.files import replacing

__all__ = ["RecordFiles", "RecordWriter", "record_files", "writing_records"]

_LENGTH = struct.Struct("<Q")
_CHECKSUM = struct.Struct("<I")
_HEAD_BYTES = _LENGTH.size + _CHECKSUM.size
_MASK_DELTA = 0xA282EAD8
_GZIP = b"\x1f\x8b"


def record_files(paths: Sequence[Path], split: str) -> list[Path]:
    """The files of these paths, sorted in each folder; [] where there is none.

    A folder means its files `*.tfrecord*`; without any, those of its folder `train`, or for the
    other splits `eval` or `test`.
    """
    inner = ("train",) if split == "train" else ("eval", "test")
    found: list[Path] = []
    for path in paths:
        if path.is_file():
            found += [path] if ".tfrecord" in path.name else []
            continue
        folders = (path, *(path / name for name in inner))
        found += next((files for files in map(_files_in, folders) if files), [])
    return found


def _files_in(folder: Path) -> list[Path]:
    # Names that begin with a dot are of files that are being written.
    return sorted(p for p in folder.glob("*.tfrecord*") if p.is_file() and p.name[0] != ".")


class RecordFiles:
    """The records of all files as one sequence. Where each one begins is read when it is made.

    Raises:
        ConfigError: google-crc32c is missing.
        DataError: a file is broken or cut short; with its name and the record.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.files = list(paths)
        self._maps: dict[int, Any] = {}
        self._starts = [_record_starts(path) for path in self.files]
        self._ends = np.cumsum([len(starts) - 1 for starts in self._starts])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> bytes:
        """The data of a record.

        Raises:
            DataError: they do not agree with their checksum.
        """
        file, number = self._place(index)
        begin, end = self._starts[file][number : number + 2].tolist()
        if file not in self._maps:
            self._maps[file] = _mapped(self.files[file])
        content = self._maps[file]
        data: bytes = content[begin + _HEAD_BYTES : end - _CHECKSUM.size]
        if _CHECKSUM.unpack(content[end - _CHECKSUM.size : end])[0] != _masked_crc(data):
            raise DataError(
                "the record's checksum is wrong: its bytes have changed since they were written",
                where=self.where(index),
                hint="copy or write the file again",
            )
        return data

    def where(self, index: int) -> str:
        """`file, record k` for messages."""
        file, number = self._place(index)
        return f"{self.files[file]}, record {number}"

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, index - (int(self._ends[file - 1]) if file else 0)

    # A file that is mapped here cannot be sent to another process.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}


def _mapped(path: Path) -> Any:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _record_starts(path: Path) -> npt.NDArray[np.int64]:
    """Where each record begins, and the file's size."""
    size = path.stat().st_size
    starts = [0]
    if not size:
        return np.array(starts, dtype=np.int64)
    with _mapped(path) as content:
        if content[:2] == _GZIP:
            raise DataError(
                "the file is compressed",
                where=str(path),
                allowed="records as they are, so that each can be found by its number",
                hint=f"gunzip -c {path.name} > {path.name.removesuffix('.gz')}.tfrecord",
            )
        while starts[-1] < size:
            starts.append(
                _record_end(content, starts[-1], size, f"{path}, record {len(starts) - 1}")
            )
    return np.array(starts, dtype=np.int64)


def _record_end(content: Any, begin: int, size: int, where: str) -> int:
    head: bytes = content[begin : begin + _HEAD_BYTES]
    if len(head) < _HEAD_BYTES:
        raise _cut_short(where, size)
    (checksum,) = _CHECKSUM.unpack_from(head, _LENGTH.size)
    if checksum != _masked_crc(head[: _LENGTH.size]):
        raise DataError(
            f"the record's length has a wrong checksum (byte {begin:,})",
            where=where,
            allowed="a TFRecord file",
            hint="the file is damaged or of another format",
        )
    (length,) = _LENGTH.unpack_from(head)
    end: int = begin + _HEAD_BYTES + length + _CHECKSUM.size
    if end > size:
        raise _cut_short(where, size)
    return end


def _cut_short(where: str, size: int) -> DataError:
    return DataError(
        f"the file ends in the middle of a record, after {size:,} bytes",
        where=where,
        hint="it was not written or copied to its end",
    )


class RecordWriter:
    """Appends records to an open file; see `writing_records`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, data: bytes) -> None:
        length = _LENGTH.pack(len(data))
        self._file.write(length)
        self._file.write(_CHECKSUM.pack(_masked_crc(length)))
        self._file.write(data)
        self._file.write(_CHECKSUM.pack(_masked_crc(data)))


@contextmanager
def writing_records(path: Path) -> Generator[RecordWriter]:
    """`with writing_records(path) as writer:` a file that appears whole, at the block's end.

    Raises:
        ConfigError: google-crc32c is missing.
        OSError: see `openwafer.files.replacing`.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        yield RecordWriter(file)


def _masked_crc(data: bytes) -> int:
    """TensorFlow's mask keeps a checksum of data that hold checksums from being a weak one."""
    crc = _crc32c(data)
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


def _crc32c(data: bytes) -> int:
    try:
        import google_crc32c
    except ImportError as error:
        raise ConfigError(
            "TFRecord files need google-crc32c",
            hint='pip install "openwafer[zoo]", or pip install google-crc32c',
        ) from error
    return google_crc32c.value(data)
