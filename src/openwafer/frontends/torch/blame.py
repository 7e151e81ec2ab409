"""Which line of the user's code is to blame.

Decides which frame of a stack is the user's, and how torch.export's failures read to a user.
Does not decide what can be captured.
"""

from __future__ import annotations

import inspect
import linecache
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
from openwafer.frontends.torch.module_state import gradient_hook
from openwafer.frontends.torch.traced_python import Answer, check_passes

__all__ = [
    "UserLines",
    "calling_user_line",
    "definition_of",
    "explain_export_failure",
    "innermost_user_line",
    "is_user_file",
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
def is_user_file(path: str) -> bool:
    """Whether a frame is worth showing: not torch's, not ours, not the standard library's."""
    if path.startswith(_STDLIB + os.sep):
        return "site-packages" in path or "dist-packages" in path
    return not path.startswith(_FOREIGN)


def is_library_file(path: str) -> bool:
    """Whether a file belongs to an installed package, where the user would not change it."""
    return "site-packages" in path or "dist-packages" in path


def _package_of(path: str) -> str:
    return re.split(r"[\\/](?:site|dist)-packages[\\/]", path)[-1].split(os.sep)[0]


def innermost_user_line(stack_trace: str) -> tuple[str, int]:
    """File and line of the innermost frame of a printed stack that is neither torch's nor ours."""
    frames = [(file, int(line)) for file, line in _FRAME.findall(stack_trace)]
    return next(((f, n) for f, n in reversed(frames) if is_user_file(f)), ("", 0))


def user_line_of(trace: TracebackType | None) -> str:
    """`file:line` of the innermost user frame of an exception; empty if there is none."""
    frames = traceback.extract_tb(trace)
    for frame in reversed(frames):
        if is_user_file(frame.filename):
            return f"{frame.filename}:{frame.lineno}"
    return ""


_QUESTIONS = (
    torch.Tensor.__bool__,
    torch.Tensor.is_nonzero,
    torch.Tensor.item,
    torch.Tensor.equal,
    torch.Tensor.allclose,
    torch.equal,
    torch.allclose,
)


_GRADIENT_HOOKS = (
    torch.Tensor.register_hook,
    torch.Tensor.register_post_accumulate_grad_hook,
)


class UserLines(TorchFunctionMode):
    """While active, every captured operation carries the user's line that called it.

    torch.export's own stack traces keep `forward` frames alone; a loss or a metric is often called
    from somewhere else. `unchecked` are the lines whose checks of values were taken to pass.
    """

    def __init__(self, *, training: bool = True) -> None:
        super().__init__()
        self._training = training
        self.unchecked: dict[str, None] = {}

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
        if func in _QUESTIONS:
            passes = check_passes(file, line)
            if passes is not None:
                self.unchecked[f"{file}:{line}"] = None
                is_number = func is torch.Tensor.item and args[0].dtype is not torch.bool
                return Answer(passes) if is_number else passes
        if func in _GRADIENT_HOOKS and self._training:
            raise gradient_hook("a tensor", f"{file}:{line}")
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
        if is_user_file(frame.f_code.co_filename):
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
    if isinstance(call, torch.jit.ScriptModule):
        return ""
    if isinstance(call, nn.Module):
        function = type(call).forward
    elif not inspect.isroutine(call):
        function = type(call).__call__
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None or not is_user_file(code.co_filename):
        return ""
    return f"{code.co_filename}:{code.co_firstlineno}"


def value_dependent(where: str) -> CaptureError:
    """The error for Python code, or shapes, that depend on what is in a tensor.

    `where` is the user's `file:line`; empty if unknown.
    """
    file, _, number = where.rpartition(":")
    line = int(number) if number.isdigit() else 0
    code = linecache.getline(file, line).strip()
    before = "".join(linecache.getline(file, n) for n in range(max(1, line - 4), line + 1))
    if _RANDOM_CHOICE.search(before):
        what = "the model chooses by a random number what Python code runs (LayerDrop, say)"
        hint = (
            "set layerdrop: 0 in the model's configuration; or let every layer run and choose with "
            "a tensor: torch.where(torch.rand(()) < p, x, layer(x))"
        )
    else:
        what = "the model's Python code depends on the value of a tensor"
        hint = next((hint for call, hint in _INSTEAD.items() if call in code), _IN_GENERAL)
    if is_library_file(file):
        hint += (
            f"; this line is in {_package_of(file)}: look for a setting of the model that avoids "
            "it, or replace the module by one of your own"
        )
    return CaptureError(
        f"{what}: `{code}`" if code else what,
        where=where,
        allowed="a static graph: the same operations for every batch",
        hint=hint,
    )


_IN_GENERAL = (
    "replace `if tensor:` by torch.where, and drop .item(), .tolist(), .numpy() and boolean "
    "indexing from the forward pass"
)
_INSTEAD = {
    "ctc_loss": "a loss for each position (cross entropy of aligned labels); the lengths of CTC "
    "depend on the data",
    "bincount": "F.one_hot(x, size).sum(0), or torch.zeros(size).scatter_add_(0, x, ones)",
    "repeat_interleave": "give the number of repeats as a Python number",
    "unique": "count with F.one_hot, whose size is fixed",
    "sorted(": "torch.sort of a stacked tensor",
    "print(": "leave printing out of the forward pass; a metric shows a value",
    "format": "leave formatting out of the forward pass; a metric shows a value",
}
"""What to write instead of a call that the user's line has."""

_RANDOM_CHOICE = re.compile(r"torch\.rand|layer_?drop|drop_prob|dropout_probability", re.IGNORECASE)


_VALUE_DEPENDENT = re.compile(
    r"data-dependent expression|GuardOnDataDependent|DynamicOutputShape|DataDependentOutput|"
    r"\.item\(\)|\.numpy\(\)|_local_scalar_dense|nonzero|[Uu]nbacked|FakeTensor\.__format__"
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
    (
        r"Cannot access data pointer of Tensor that doesn't have storage",
        "a transform of torch.func (grad, jacrev, vjp, ...) inside the model cannot be captured",
        "torch.func.vmap and functional_call, and torch.autograd.grad",
        "torch.autograd.grad(y, x, create_graph=True)",
    ),
    (
        r"Cannot access data pointer|[Cc]an't pickle|cannot pickle|untyped_storage",
        "the code looks at a tensor's memory (data_ptr, deepcopy, pickle, ...)",
        "operations of torch",
        "x.clone() for a copy",
    ),
    (
        r"found a fake tensor in the exported program constant's list",
        "a tensor is changed or made where a trace does not see it: through .data, or in another "
        "thread",
        "operations of torch on tensors, in the thread that runs the model",
        "compute with a changed copy (weight.clamp(-1, 1)), or change weights between steps",
    ),
    (
        r"__obj_flatten__|torch\.classes|torch\.ScriptObject",
        "the model holds an object that is not a tensor (packed quantized weights, say)",
        "weights and buffers that are dense tensors",
        "the model without quantization; mixed_precision: True halves memory",
    ),
    (
        r"Creating a new Tensor subclass|'FakeTensor' object has no attribute",
        "a tensor of a class of its own, or with named dimensions, cannot be captured",
        "plain tensors",
        "torch.Tensor, and dimensions by number",
    ),
    (
        r"SyntaxError: invalid syntax",
        "an operation's name is a word of Python's own, so that torch cannot write it down",
        "operations by another name",
        "torch.randint_like(x, low, high) instead of x.random_(low, high)",
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
