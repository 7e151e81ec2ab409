"""Which line of the user's code is to blame.

Decides which frame of a stack is the user's, and how torch.export's failures read to a user.
Does not decide what can be captured.
"""

from __future__ import annotations

import inspect
import re
import sysconfig
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.fx.traceback import annotate
from torch.overrides import TorchFunctionMode

from openwafer.errors import CaptureError

__all__ = [
    "USER_LINE",
    "UserLines",
    "explain_export_failure",
    "innermost_user_line",
    "user_line_of",
]

USER_LINE = "openwafer_user_line"
"""Key under which torch.export keeps the user's (file, line) in a node's custom metadata."""

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_STDLIB = sysconfig.get_paths()["stdlib"]
_FOREIGN = (
    str(Path(torch.__file__).parent),
    str(Path(__file__).parents[2]),
    _STDLIB + "/contextlib",
    _STDLIB + "/runpy",
    _STDLIB + "/functools",
    "<",
)


def _is_user_file(path: str) -> bool:
    return not path.startswith(_FOREIGN)


def innermost_user_line(stack_trace: str) -> tuple[str, int]:
    """File and line of the innermost frame of a printed stack that is neither torch's nor ours."""
    frames = [(file, int(line)) for file, line in _FRAME.findall(stack_trace)]
    return next(((f, n) for f, n in reversed(frames) if _is_user_file(f)), ("", 0))


def user_line_of(trace: TracebackType | None) -> str:
    """`file:line` of the innermost user frame of an exception; empty if there is none."""
    frames = traceback.extract_tb(trace)
    for frame in reversed(frames):
        if _is_user_file(frame.filename):
            return f"{frame.filename}:{frame.lineno}"
    return ""


class UserLines(TorchFunctionMode):
    """While active, every captured operation carries the user's line that called it.

    torch.export's own stack traces keep `forward` frames alone; a loss or a metric is often called
    from somewhere else.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        place = _calling_user_line()
        if place is None:
            return func(*args, **(kwargs or {}))
        with annotate({USER_LINE: place}):
            return func(*args, **(kwargs or {}))


def _calling_user_line() -> tuple[str, int] | None:
    frame = inspect.currentframe()
    while frame is not None:
        if _is_user_file(frame.f_code.co_filename):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None


_EXPLANATIONS: tuple[tuple[str, str, str, str], ...] = (
    (
        r"(data-dependent expression|GuardOnDataDependent|\.item\(\)|_local_scalar_dense|"
        r"nonzero|unbacked)",
        "the model's Python code depends on the value of a tensor",
        "a static graph: the same operations for every batch",
        "replace `if tensor:` by torch.where, and drop .item(), .tolist() and boolean indexing "
        "from the forward pass",
    ),
    (
        r"(FakeTensor|fake tensor|Meta function|meta kernel|register_fake)",
        "an operation has no rule for shapes alone (a fake-tensor rule)",
        "operations of torch, or custom ones with torch.library.register_fake",
        "register a fake implementation, or write the operation with torch functions",
    ),
    (
        r"autograd\.Function",
        "a custom torch.autograd.Function cannot be captured",
        "torch operations, whose backward is known",
        "write the forward with torch operations, or wrap it as a torch.library custom op",
    ),
)


def explain_export_failure(error: Exception) -> CaptureError:
    """What torch.export's exception means for the user, with the line that caused it."""
    text = f"{type(error).__name__}: {error}"
    where = user_line_of(error.__traceback__)
    if not where:
        file, line = innermost_user_line(text)
        where = f"{file}:{line}" if file else ""
    for pattern, what, allowed, hint in _EXPLANATIONS:
        if re.search(pattern, text):
            return CaptureError(what, where=where, allowed=allowed, hint=hint)
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return CaptureError(
        f"the model's own code failed while it was traced: {type(error).__name__}: {first_line}",
        where=where,
        hint="run one batch through the model in plain PyTorch first",
    )
