"""What a module and a batch hold before and after a trace.

Decides which of it a static graph cannot stand for (sparse, quantized and nested tensors, compiled
scripts, hooks on gradients), and that a trace leaves nothing of its own behind: code that keeps a
tensor in an attribute would keep one without data. Does not decide how a module is traced.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from openwafer.errors import CaptureError

__all__ = ["gradient_hook", "nothing_left_behind", "refuse_unusual"]

_log = logging.getLogger("openwafer")


# ---------------------------------------------------------------- before


def refuse_unusual(step: nn.Module, batch: Any, *, training: bool) -> None:
    """Refuse what a trace would fail on without a reason, or silently leave out.

    Raises:
        CaptureError: a script, a tensor that is not dense, or a hook on gradients in training.
    """
    for name, module in step.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"{_called(name)} is a TorchScript module, of which there is no Python code",
                allowed="modules written in Python",
                hint="pass the module before torch.jit.script or torch.jit.trace",
            )
        state = vars(module)
        if training and (state["_backward_hooks"] or state["_backward_pre_hooks"]):
            raise gradient_hook(_called(name), "")
    for name, tensor in (*step.named_parameters(), *step.named_buffers()):
        _refuse_layout(_called(name), tensor)
        hooks: Any = tensor._backward_hooks
        after: Any = getattr(tensor, "_post_accumulate_grad_hooks", None)
        if training and (hooks or after):
            raise gradient_hook(_called(name), "")
    for path, leaf in pytree.tree_flatten_with_path(batch)[0]:
        if isinstance(leaf, torch.Tensor):
            _refuse_layout(f"batch entry {pytree.keystr(path) or '(the batch)'}", leaf)


def gradient_hook(what: str, where: str) -> CaptureError:
    """The error for a hook that runs in the backward pass."""
    return CaptureError(
        f"{what} has a hook on its gradient, which the compiled backward pass does not call",
        where=where,
        allowed="gradients as the operations' derivatives give them",
        hint="remove the hook (handle.remove()), or write what it does into the forward pass: "
        "x * c scales a gradient, x.detach() stops one",
    )


def _called(name: str) -> str:
    return name.partition(".")[2] or "the model"


def _refuse_layout(what: str, tensor: torch.Tensor) -> None:
    kind = ""
    if tensor.is_nested:
        kind = "a nested tensor"
    elif tensor.layout is not torch.strided:
        kind = f"a tensor in {str(tensor.layout).removeprefix('torch.')} layout"
    elif tensor.is_quantized:
        kind = "a quantized tensor"
    if kind:
        raise CaptureError(
            f"{what} is {kind}",
            allowed="dense tensors",
            hint="tensor.to_dense(), .dequantize(), or padding to one length with a mask",
        )


# ---------------------------------------------------------------- after

_REGISTERED = ("_parameters", "_buffers", "_modules")


@contextmanager
def nothing_left_behind(step: nn.Module) -> Generator[None]:
    """Put back every attribute into which the traced code put a tensor of the trace."""
    before = {module: _attributes(module) for module in step.modules()}
    try:
        yield
    except BaseException:
        for module, held in before.items():
            _restore(module, held)
        raise
    names = {module: name for name, module in step.named_modules() if module in before}
    for module, held in before.items():
        for attribute in _restore(module, held):
            where = f"{_called(names[module])}.{attribute}" if module in names else attribute
            _log.warning(
                "%s is set in the forward pass: the compiled modes do not keep it from batch to "
                "batch; a registered buffer is kept",
                where,
            )


def _attributes(module: nn.Module) -> dict[str, Any]:
    """A module's attributes; what is in lists and dictionaries is copied."""
    return {
        name: value.copy() if isinstance(value, (list, dict, set)) else value
        for name, value in vars(module).items()
    }


def _restore(module: nn.Module, before: Mapping[str, Any]) -> list[str]:
    """Put back what holds tensors of a trace now; gives the names of these attributes."""
    changed: list[str] = []
    for name in _REGISTERED:
        entries: dict[str, Any] = vars(module)[name]
        for key in [k for k, v in entries.items() if v is not before[name].get(k) and _traced(v)]:
            changed.append(key)
            if key in before[name]:
                entries[key] = before[name][key]
            else:
                del entries[key]
    for name, value in list(vars(module).items()):
        if name in _REGISTERED or not _traced(value):
            continue
        old = before.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            value.clear()  # the object may be known elsewhere too
            value.update(old)
        elif isinstance(value, list) and isinstance(old, list):
            value[:] = old
        elif name in before:
            vars(module)[name] = old
        else:
            del vars(module)[name]
        changed.append(name)
    return changed


def _traced(value: Any) -> bool:
    """Whether a value is or holds a tensor without data."""
    if isinstance(value, nn.Module):
        return any(isinstance(weight, FakeTensor) for weight in value.parameters())
    return any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(value))
