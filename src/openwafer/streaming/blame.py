"""Which line of the user's code an exception comes from.

Decides what counts as the user's code: not this package, not installed packages, not Python's own
library. Does not format errors.
"""

from __future__ import annotations

import os
import re
import sysconfig
import traceback
from pathlib import Path

__all__ = ["user_place"]

_OURS = str(Path(__file__).resolve().parents[1])
_INSTALLED = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
_NOT_THE_USERS = tuple(folder + os.sep for folder in {_OURS, *_INSTALLED})
_FRAME_LINE = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+)', re.MULTILINE)


def user_place(error: BaseException) -> str:
    """`file:line` of the innermost frame in the user's code; empty if there is none.

    An exception from a DataLoader process carries its frames as text only; they are read too.
    """
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    places += [(found["file"], int(found["line"])) for found in _FRAME_LINE.finditer(str(error))]
    for file, line in reversed(places):
        if not file.startswith("<") and not file.startswith(_NOT_THE_USERS):
            return f"{file}:{line}"
    return ""
