"""How the process of a run ends where something goes wrong.

Decides that an error the user can act on is printed without a traceback, and the exit codes. Does
not decide what the errors say.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager

from openwafer.errors import OpenWaferError

__all__ = ["ending_with_exit_codes"]

_log = logging.getLogger("openwafer")

_INTERRUPTED = 130
"""128 + SIGINT, as shells count."""


@contextmanager
def ending_with_exit_codes() -> Generator[None]:
    """Runs its body; an OpenWaferError or Ctrl-C in it is printed.

    Raises:
        SystemExit: with the error's exit code; 130 after Ctrl-C.
    """
    try:
        yield
    except OpenWaferError as error:
        _log.error("%s", error)
        _log.debug("raised here", exc_info=error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _log.error("interrupted: the last checkpoint is the newest one in model_dir")
        sys.exit(_INTERRUPTED)
