"""Files that appear whole or not at all, whenever the process ends.

Decides how: written beside the place under a hidden name of its own, flushed to the disk, renamed.
Does not decide what a failure means to the user: it is the `OSError` as it came, for the caller
to explain.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["replacing", "write_bytes", "write_text"]


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """`with replacing(path) as temporary:` a file to write, which takes the place of `path` at the
    block's end. After an exception `path` is as it was, and the temporary file is gone.

    Folders on the way are made. Two writers at once: the last whole file stays.

    Raises:
        OSError: the folder cannot be made, or the file cannot be flushed or renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # nothing to remove after success
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """The whole file or none of it.

    Raises:
        OSError: see `replacing`.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """The whole file or none of it, in UTF-8, line ends as they are.

    Raises:
        OSError: see `replacing`.
    """
    write_bytes(path, text.encode())
