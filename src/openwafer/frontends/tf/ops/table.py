"""How an operation's function is entered, and what it is given.

Decides the form of the functions in this folder: `function(node, *operands)`. An operand is a torch
tensor, or a NumPy array where TensorFlow's tensor is a constant; the result is a tensor, or a tuple
of them in the order of the operation's outputs. Does not decide what any of them computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from openwafer.frontends.tf.nodes import Array

__all__ = [
    "DTYPES",
    "CannotLowerError",
    "Lowering",
    "Operand",
    "Table",
    "constant",
    "integers",
    "scalar_or_tensor",
    "tensor",
    "torch_dtype",
]

Operand = torch.Tensor | Array
Lowering = Callable[..., Any]

DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


class CannotLowerError(Exception):
    """An operation in a form that is not taken: why not, and what to write instead."""

    def __init__(self, reason: str, suggestion: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.suggestion = suggestion


class Table(dict[str, Lowering]):
    """The operations of one family, by TensorFlow's op type."""

    def enter(self, *kinds: str) -> Callable[[Lowering], Lowering]:
        """Decorate the function of one op type, or of several."""

        def add(function: Lowering) -> Lowering:
            for kind in kinds:
                assert kind not in self, f"{kind} is there twice"
                self[kind] = function
            return function

        return add


def torch_dtype(dtype: Any) -> torch.dtype:
    """Of a TensorFlow dtype, or a name."""
    name = dtype if isinstance(dtype, str) else dtype.name
    if name not in DTYPES:
        raise CannotLowerError(f"its type is {name}", "cast to a number type in the input function")
    return DTYPES[name]


def tensor(value: Operand) -> torch.Tensor:
    """An operand as a tensor."""
    if isinstance(value, torch.Tensor):
        return value
    if value.dtype.name == "bfloat16":
        return torch.tensor(value.astype(np.float32), dtype=torch.bfloat16)
    return torch.tensor(value, dtype=torch_dtype(value.dtype.name))


def scalar_or_tensor(value: Operand) -> Any:
    """A constant of one number as that number, which the kernels take without a tensor."""
    if isinstance(value, torch.Tensor) or value.ndim:
        return tensor(value)
    return value.item() if value.dtype.name != "bfloat16" else float(value)


def constant(value: Operand, what: str) -> Array:
    """A constant.

    Raises:
        CannotLowerError: it is computed from the batch or the weights.
    """
    if isinstance(value, torch.Tensor):
        raise CannotLowerError(
            f"its {what} is computed from the batch, and so may differ from step to step",
            "use a number that is known when the model is built",
        )
    return value


def integers(value: Operand, what: str) -> list[int]:
    """A constant list of whole numbers (a single one gives a list of one)."""
    return [int(number) for number in np.atleast_1d(constant(value, what))]
