"""Where prepared data are kept between runs.

Decides the folder (`$OPENWAFER_CACHE`, else `~/.cache/openwafer`) and that an entry appears whole:
it is made beside its place and renamed. Entries may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

__all__ = ["cache_dir", "cached_folder"]


def cache_dir() -> Path:
    """The folder of all entries."""
    given = os.environ.get("OPENWAFER_CACHE")
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "openwafer"


def cached_folder(name: str, key: object, make: Callable[[Path], None]) -> Path:
    """The entry's folder, filled by `make(folder)` if it is not there.

    Two processes may make the same entry at once: the first to finish wins, both go on with its.
    """
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:20]
    target = cache_dir() / f"{name}-{digest}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        make(made)
        os.rename(made, target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return target
