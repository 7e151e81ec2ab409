"""The folder of a run (`model_dir`), where it cannot be written.

Decides what the user is told then. Does not decide what is written into it (run_lock.py, the
frontends), nor what becomes of a file that fails later (checkpoint_file.py, performance.py).
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from openwafer.errors import ConfigError

__all__ = ["in_run_folder"]


@contextmanager
def in_run_folder(path: Path) -> Generator[None]:
    """`with in_run_folder(path):` what makes the file `path` of the run, or its folder.

    Raises:
        ConfigError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"the run's folder cannot be written: {error.strerror or error}",
            where=str(path),
            hint="another --model_dir",
        ) from error
