"""Which line of the user's code is to blame.

Decides which frame of a stack is the user's, and how torch.export's failures read to a user.
Does not decide what can be captured.
"""

from __future__ import annotations

import inspect
import os
import re
import sysconfig
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import fx, nn
from torch.fx import traceback as fx_traceback
from torch.overrides import TorchFunctionMode

from openwafer.errors import CaptureError

__all__ = [
    "UserLines",
    "calling_user_line",
    "definition_of",
    "explain_export_failure",
    "innermost_user_line",
    "user_line_of",
    "user_line_of_node",
    "value_dependent",
]

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_STDLIB = sysconfig.get_paths()["stdlib"]
_FOREIGN = (
    str(Path(torch.__file__).parent) + os.sep,
    str(Path(__file__).parents[2]) + os.sep,
    "<",
)


@cache
def _is_user_file(path: str) -> bool:
    """Whether a frame is worth showing: not torch's, not ours, not the standard library's."""
    if path.startswith(_STDLIB + os.sep):
        return "site-packages" in path or "dist-packages" in path
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
        # Reading an attribute (`x.shape`) makes no operation; models do it by the thousand.
        place = None if func.__name__ == "__get__" else calling_user_line()
        if place is None:
            return func(*args, **(kwargs or {}))
        file, line = place
        outer = fx_traceback.current_meta.get("stack_trace", "")
        # With a stack at hand the tracer neither takes nor prints one of its own, which costs
        # more than the rest of the trace.
        fx_traceback.set_stack_trace([f'File "{file}", line {line}, in user code'])
        try:
            return func(*args, **(kwargs or {}))
        finally:
            fx_traceback.set_stack_trace([outer])


def calling_user_line() -> tuple[str, int] | None:
    """File and line of the innermost user frame that is being run."""
    frame = inspect.currentframe()
    while frame is not None:
        if _is_user_file(frame.f_code.co_filename):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None


def user_line_of_node(node: fx.Node) -> tuple[str, int]:
    """File and line of the user's code that a traced operation comes from; ("", 0) if unknown."""
    return innermost_user_line(node.meta.get("stack_trace") or "")


def definition_of(call: Any) -> str:
    """`file:line` where a model's forward, or what is called instead of it, is defined; empty if
    that is not the user's code."""
    function = call
    if isinstance(call, nn.Module):
        function = type(call).forward
    elif not inspect.isroutine(call):
        function = type(call).__call__
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None or not _is_user_file(code.co_filename):
        return ""
    return f"{code.co_filename}:{code.co_firstlineno}"


def value_dependent(where: str) -> CaptureError:
    """The error for Python code, or shapes, that depend on what is in a tensor."""
    return CaptureError(
        "the model's Python code depends on the value of a tensor",
        where=where,
        allowed="a static graph: the same operations for every batch",
        hint="replace `if tensor:` by torch.where, and drop .item(), .tolist(), .numpy() and "
        "boolean indexing from the forward pass",
    )


_VALUE_DEPENDENT = re.compile(
    r"data-dependent expression|GuardOnDataDependent|DynamicOutputShape|DataDependentOutput|"
    r"\.item\(\)|\.numpy\(\)|_local_scalar_dense|nonzero|[Uu]nbacked"
)

_EXPLANATIONS: tuple[tuple[str, str, str, str], ...] = (
    (
        r"UnsupportedOperatorException|UnsupportedFakeTensorException|register_fake|"
        r"fake impl|Meta (function|kernel)|aten::\S+ is not implemented for .*meta",
        "an operation has no rule for shapes alone (a fake-tensor rule)",
        "operations of torch, or custom ones with torch.library.register_fake",
        "register a fake implementation, or write the operation with torch functions",
    ),
    (
        r"found two different devices|two devices",
        "the forward pass mixes tensors of two devices",
        "one device for weights, buffers, inputs and what the code makes itself",
        "make new tensors with device=x.device",
    ),
    (
        r"Unsupported input type",
        "the batch holds an object that is neither a tensor nor a tuple, list or dict of tensors",
        "tensors, in tuples, lists, dicts or named tuples",
        "let the data loader yield such a structure, e.g. dict(batch), torch.as_tensor(array)",
    ),
    (
        r"uninitialized parameter",
        "the model has a lazy layer whose sizes are not known yet",
        "weights of fixed shapes",
        "call the model with one batch before, or give the layer its sizes",
    ),
    (
        r"higher order operator|HigherOrderOperator",
        "a control-flow operator (torch.cond, while_loop, ...) cannot be captured",
        "a static graph: the same operations for every batch",
        "compute both sides and choose with torch.where",
    ),
    (
        r"expected compiled_fn to be GraphModule",
        "a buffer that the forward pass changes is known under two names",
        "one name for each module and buffer that changes",
        "keep the module (a batch norm, say) in one attribute",
    ),
)


def explain_export_failure(error: Exception) -> CaptureError:
    """What torch.export's exception means for the user, with the line that caused it."""
    text = f"{type(error).__name__}: {error}"
    where = user_line_of(error.__traceback__)
    if not where:
        file, line = innermost_user_line(text)
        where = f"{file}:{line}" if file else ""
    if _VALUE_DEPENDENT.search(text):
        return value_dependent(where)
    for pattern, what, allowed, hint in _EXPLANATIONS:
        if re.search(pattern, text):
            return CaptureError(what, where=where, allowed=allowed, hint=hint)
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return CaptureError(
        f"the model's own code failed while it was traced: {type(error).__name__}: {first_line}",
        where=where,
        hint="run one batch through the model in plain PyTorch first",
    )
