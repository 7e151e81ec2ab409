"""Operations on single elements.

Where two elements are equal, `Maximum` and `Minimum` pass the whole gradient to the first one, as
TensorFlow does; torch would give each a half.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openwafer.frontends.tf.nodes import Node
from openwafer.frontends.tf.ops.table import (
    CannotLowerError,
    Operand,
    Table,
    scalar_or_tensor,
    tensor,
    torch_dtype,
)

__all__ = ["OPS"]

OPS = Table()


def _same(x: Tensor) -> Tensor:
    return x


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Asin": torch.asin,
    "Atan": torch.atan,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Elu": F.elu,
    "Erf": torch.erf,
    "Erfc": torch.erfc,
    "Exp": torch.exp,
    "Expm1": torch.expm1,
    "Floor": torch.floor,
    "Inv": torch.reciprocal,
    "IsFinite": torch.isfinite,
    "IsInf": torch.isinf,
    "IsNan": torch.isnan,
    "Log": torch.log,
    "Log1p": torch.log1p,
    "LogicalNot": torch.logical_not,
    "Neg": torch.neg,
    "OnesLike": torch.ones_like,
    "Reciprocal": torch.reciprocal,
    "Relu": F.relu,
    "Relu6": F.relu6,
    "Rint": torch.round,
    "Round": torch.round,
    "Rsqrt": torch.rsqrt,
    "Selu": F.selu,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": F.softplus,
    "Sqrt": torch.sqrt,
    "Square": torch.square,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
    "ZerosLike": torch.zeros_like,
    # What only passes a value on: checks and summaries of it are not part of the model.
    "CheckNumerics": _same,
    "EnsureShape": _same,
    "Identity": _same,
    "PlaceholderWithDefault": _same,
    # A gradient stops here.
    "StopGradient": torch.detach,
    "PreventGradient": torch.detach,
}

_BINARY: dict[str, Callable[[Any, Any], Tensor]] = {
    "Add": operator.add,
    "AddV2": operator.add,
    "BitwiseAnd": operator.and_,
    "BitwiseOr": operator.or_,
    "Div": operator.truediv,
    "Equal": operator.eq,
    "FloorDiv": operator.floordiv,
    "FloorMod": operator.mod,
    "Greater": operator.gt,
    "GreaterEqual": operator.ge,
    "Less": operator.lt,
    "LessEqual": operator.le,
    "LogicalAnd": operator.and_,
    "LogicalOr": operator.or_,
    "Mul": operator.mul,
    "NotEqual": operator.ne,
    "Pow": operator.pow,
    "RealDiv": operator.truediv,
    "Sub": operator.sub,
}


def _enter_unary(kind: str, function: Callable[[Tensor], Tensor]) -> None:
    def lower(node: Node, x: Operand) -> Tensor:
        return function(tensor(x))

    OPS.enter(kind)(lower)


def _enter_binary(kind: str, function: Callable[[Any, Any], Tensor]) -> None:
    def lower(node: Node, x: Operand, y: Operand) -> Tensor:
        return function(*_pair(x, y))

    OPS.enter(kind)(lower)


for _kind, _function in _UNARY.items():
    _enter_unary(_kind, _function)
for _kind, _function in _BINARY.items():
    _enter_binary(_kind, _function)


def _pair(x: Operand, y: Operand) -> tuple[Any, Any]:
    """Two operands; a constant number beside a tensor stays a number."""
    if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
        return tensor(x), tensor(y)
    return scalar_or_tensor(x), scalar_or_tensor(y)


@OPS.enter("IdentityN")
def identity_n(node: Node, *values: Operand) -> tuple[Tensor, ...]:
    return tuple(tensor(value) for value in values)


@OPS.enter("LeakyRelu")
def leaky_relu(node: Node, x: Tensor) -> Tensor:
    return F.leaky_relu(x, node.attribute("alpha"))


@OPS.enter("Softsign")
def softsign(node: Node, x: Tensor) -> Tensor:
    return x / (1 + x.abs())


@OPS.enter("Cast")
def cast(node: Node, x: Operand) -> Tensor:
    return tensor(x).to(torch_dtype(node.attribute("DstT")))


@OPS.enter("AddN")
def add_n(node: Node, first: Operand, *others: Operand) -> Tensor:
    total = tensor(first)
    for other in others:
        total = total + scalar_or_tensor(other)
    return total


@OPS.enter("SquaredDifference")
def squared_difference(node: Node, x: Operand, y: Operand) -> Tensor:
    left, right = _pair(x, y)
    return torch.square(left - right)


@OPS.enter("Maximum")
def maximum(node: Node, x: Operand, y: Operand) -> Tensor:
    left, right = _pair(x, y)
    if not isinstance(left, Tensor):
        return torch.clamp(right, min=left)
    if not isinstance(right, Tensor):
        return torch.clamp(left, min=right)
    return torch.where(left >= right, left, right)


@OPS.enter("Minimum")
def minimum(node: Node, x: Operand, y: Operand) -> Tensor:
    left, right = _pair(x, y)
    if not isinstance(left, Tensor):
        return torch.clamp(right, max=left)
    if not isinstance(right, Tensor):
        return torch.clamp(left, max=right)
    return torch.where(left <= right, left, right)


@OPS.enter("DivNoNan")
def div_no_nan(node: Node, x: Operand, y: Operand) -> Tensor:
    """x / y, and 0 where y is 0."""
    if isinstance(y, np.ndarray) and y.all():
        return tensor(x) / scalar_or_tensor(y)
    left, right = tensor(x), tensor(y)
    zero = right == 0
    # The denominator is made whole first, so that no gradient is 0 * infinity.
    safe = torch.where(zero, torch.ones_like(right), right)
    return torch.where(zero, torch.zeros_like(right), left / safe)


@OPS.enter("MulNoNan")
def mul_no_nan(node: Node, x: Operand, y: Operand) -> Tensor:
    left, right = tensor(x), tensor(y)
    return torch.where(right == 0, torch.zeros_like(right), left * right)


@OPS.enter("Atan2")
def atan2(node: Node, y: Operand, x: Operand) -> Tensor:
    return torch.atan2(tensor(y), tensor(x))


@OPS.enter("Xlogy")
def xlogy(node: Node, x: Operand, y: Operand) -> Tensor:
    return torch.xlogy(tensor(x), tensor(y))


@OPS.enter("TruncateDiv")
def truncate_div(node: Node, x: Operand, y: Operand) -> Tensor:
    return torch.div(*_pair(x, y), rounding_mode="trunc")


@OPS.enter("ClipByValue")
def clip_by_value(node: Node, x: Tensor, low: Operand, high: Operand) -> Tensor:
    return torch.clamp(x, scalar_or_tensor(low), scalar_or_tensor(high))


@OPS.enter("SelectV2")
def select_v2(node: Node, condition: Operand, x: Operand, y: Operand) -> Tensor:
    return torch.where(tensor(condition), *_branches(node, x, y))


@OPS.enter("Select")
def select(node: Node, condition: Operand, x: Operand, y: Operand) -> Tensor:
    """Its condition may be one truth value for each row."""
    chosen = tensor(condition)
    rank = len(node.shape())
    if chosen.dim() == 1 and rank > 1:
        chosen = chosen.reshape(-1, *([1] * (rank - 1)))
    return torch.where(chosen, *_branches(node, x, y))


def _branches(node: Node, x: Operand, y: Operand) -> tuple[Any, Any]:
    """The two values; a number stays one beside a tensor of the same type."""
    left, right = _pair(x, y)
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return left, right
    raise CannotLowerError("both of its values are numbers")
