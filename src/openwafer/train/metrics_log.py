"""`metrics.jsonl`: one line of JSON per logged step, for scripts.

Decides how a line is written (whole or not at all) and how a resumed run makes room for the steps
that it does again, so that no step stands twice. Does not decide which steps are logged (loop.py).
docs/artifacts.md describes the fields.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import cast

from openwafer.files import write_text

__all__ = ["MetricsLog"]

_log = logging.getLogger("openwafer")


class MetricsLog:
    """Appends to `path`. A full disk stops no training: it is said once, and a line is never
    half there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._failed = False

    def drop(self, is_dropped: Callable[[int], bool]) -> int:
        """Remove the lines of the steps that `is_dropped` picks, and whatever is no whole line;
        how many went. The file is replaced atomically, and only if a line goes."""
        if not self._path.exists():
            return 0
        lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if _keeps(line, is_dropped)]
        if len(kept) < len(lines):
            write_text(self._path, "".join(kept))
        return len(lines) - len(kept)

    def append(self, step: int, values: Mapping[str, float | None]) -> None:
        """One line: `step`, then `values`. Numbers are written so that reading them gives the
        same double; one that is not finite becomes null, for which JSON has no other word."""
        fields = {name: _finite(value) for name, value in values.items()}
        line = json.dumps({"step": step, **fields}, allow_nan=False) + "\n"
        try:
            self._append(line.encode())
        except OSError as error:
            if not self._failed:
                self._failed = True
                _log.warning("%s cannot be written: %s", self._path, error.strerror or error)

    def _append(self, line: bytes) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            try:
                written = os.write(descriptor, line)
                if written < len(line):
                    os.write(descriptor, line[written:])  # raises, with the reason
            except OSError:
                with suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _keeps(line: str, is_dropped: Callable[[int], bool]) -> bool:
    if not line.endswith("\n"):
        return False
    try:
        fields: object = json.loads(line)
    except ValueError:
        return False
    if not isinstance(fields, dict):
        return False
    step: object = cast("dict[str, object]", fields).get("step")
    return isinstance(step, int) and not is_dropped(step)
