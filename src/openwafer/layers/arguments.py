"""How a layer refuses a wrong argument.

Decides that every refusal is a ConfigError that names the user's own line, and holds the checks
that several layers share. Does not decide what a layer takes.
"""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

from openwafer.errors import ConfigError

__all__ = ["argument_error", "check_batch_first", "check_positive", "check_probability"]

_NOT_THE_USER = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))


def argument_error(what: str, *, allowed: str, hint: str = "") -> ConfigError:
    """The error to raise, with the innermost line that is neither torch's nor this package's."""
    return ConfigError(what, where=_calling_line(), allowed=allowed, hint=hint)


def check_positive(**sizes: int) -> None:
    """Refuse a size that is not a whole number of at least 1."""
    for name, value in sizes.items():
        if isinstance(value, bool) or value != int(value) or value < 1:
            raise argument_error(f"{name} is {value}", allowed="a whole number of at least 1")


def check_probability(**rates: float | None) -> None:
    """Refuse a dropout rate outside [0, 1]; None stands for no dropout."""
    for name, value in rates.items():
        if value is not None and not 0.0 <= value <= 1.0:
            raise argument_error(f"{name} is {value}", allowed="a probability, 0 to 1")


def check_batch_first(batch_first: bool) -> None:
    """Refuse the layout [seq, batch, hidden]."""
    if not batch_first:
        raise argument_error(
            "batch_first=False is not supported",
            allowed="batch_first=True: tensors of shape [batch, seq, hidden]",
            hint="transpose the inputs: x.transpose(0, 1)",
        )


def _calling_line() -> str:
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(_NOT_THE_USER):
            return f"{frame.filename}:{frame.lineno}"
    return ""
