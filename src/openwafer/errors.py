"""Every error that a user can cause or must act on, in one tree.

Decides how such an error reads: what is wrong, where (the user's own file:line or layer), what is
allowed, what to try. Does not decide when one is raised; that is the room that finds it.

    OpenWaferError
    ├── ConfigError        params.yaml, flags, arguments of the Python API
    ├── DataError          the dataset, the data functions, the batches they give
    ├── CaptureError       the model cannot be turned into a static graph
    ├── UnsupportedOpError an operation that no kernel takes
    ├── PlanError          the model is captured and matched, but cannot be laid out or run as asked
    ├── CheckpointError    a checkpoint cannot be written, read, or does not fit the model
    ├── NumericsError      a loss or a gradient that is not finite
    ├── StreamingError     coordinator and workers: lost, refused, late
    └── LaunchError        tasks that could not be started or that failed

`assert` is for our own bugs only; a breach of this tree (a bare traceback for a user's mistake)
is a defect.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "LaunchError",
    "NumericsError",
    "OpenWaferError",
    "PlanError",
    "StreamingError",
    "UnsupportedOpError",
    "nearest",
]


class OpenWaferError(Exception):
    """An error addressed to the user.

    Args:
        what: one sentence, what is wrong.
        where: the user's place: `file:line`, a YAML path, a layer name; empty if there is none.
        allowed: what would have been right.
        hint: what to try.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", allowed: str = "", hint: str = "") -> None:
        self.what = what
        self.where = where
        self.allowed = allowed
        self.hint = hint
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        for label, text in (("at", self.where), ("allowed", self.allowed), ("try", self.hint)):
            if text:
                lines.append(f"  {label:<8} {text}")
        return "\n".join(lines)


class ConfigError(OpenWaferError):
    """A parameter file, a flag or an argument is wrong."""


class DataError(OpenWaferError):
    """The dataset or what the data functions give cannot be used."""


class CaptureError(OpenWaferError):
    """The model cannot be captured as a static graph."""


class UnsupportedOpError(OpenWaferError):
    """At least one operation has no kernel. `refusals` holds all of them."""

    def __init__(
        self, what: str, *, refusals: tuple[object, ...] = (), where: str = "", hint: str = ""
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.refusals = refusals


class PlanError(OpenWaferError):
    """The model cannot be laid out or executed as asked."""


class CheckpointError(OpenWaferError):
    """A checkpoint cannot be written or read, or does not fit the model."""


class NumericsError(OpenWaferError):
    """A loss or gradient is not finite."""


class StreamingError(OpenWaferError):
    """A coordinator or worker was lost, refused or late."""


class LaunchError(OpenWaferError):
    """Tasks could not be started, or one of them failed."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """`did you mean ...?` for the valid name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else ""
