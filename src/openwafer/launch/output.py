"""The output of tasks, told apart.

Decides how a worker's lines are marked with its rank and that they are never torn. Task 0 writes
to the terminal itself and is not seen here. Does not wait for tasks.
"""

from __future__ import annotations

import os
import re
import selectors
from dataclasses import dataclass
from typing import IO, BinaryIO, cast

__all__ = ["LinePrefixer", "Outputs"]

_MAX_LINE_BYTES = 64 * 1024
_LINE_END = re.compile(rb"\r\n|\n|\r")


class LinePrefixer:
    """Cuts bytes into lines and puts a prefix before each.

    A carriage return ends a line too: workers' progress bars become one line per update.
    """

    def __init__(self, prefix: bytes) -> None:
        self._prefix = prefix
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """The lines that `data` completes."""
        *lines, self._rest = _LINE_END.split(self._rest + data)
        if len(self._rest) > _MAX_LINE_BYTES:
            lines.append(self._rest)
            self._rest = b""
        return b"".join(self._prefix + line + b"\n" for line in lines if line)

    def finish(self) -> bytes:
        """The last line, where it was not ended."""
        return self.feed(b"\n") if self._rest else b""


@dataclass(frozen=True, slots=True)
class _Pipe:
    prefixer: LinePrefixer
    target: BinaryIO


class Outputs:
    """The pipes of all workers, read together."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def add(self, source: IO[bytes], prefix: str, target: BinaryIO) -> None:
        """Copy the lines of `source` to `target` from now on, with the prefix."""
        os.set_blocking(source.fileno(), False)
        pipe = _Pipe(LinePrefixer(prefix.encode()), target)
        self._selector.register(source, selectors.EVENT_READ, pipe)

    @property
    def open(self) -> bool:
        return bool(self._selector.get_map())

    def pump(self, timeout_seconds: float) -> None:
        """Copy what is there, waiting up to the time for something to come."""
        for key, _ in self._selector.select(timeout_seconds):
            pipe: _Pipe = key.data
            try:
                data = os.read(key.fd, 1 << 16)
            except BlockingIOError:
                continue
            _write(pipe.target, pipe.prefixer.feed(data) if data else pipe.prefixer.finish())
            if not data:
                self._selector.unregister(key.fileobj)
                cast("IO[bytes]", key.fileobj).close()

    def close(self) -> None:
        """Write the unfinished lines and stop reading."""
        for key in list(self._selector.get_map().values()):
            _write(key.data.target, key.data.prefixer.finish())
        self._selector.close()


def _write(target: BinaryIO, data: bytes) -> None:
    if data:
        target.write(data)
        target.flush()
