"""What happens to gradients between `tf.gradients` and the optimizer.

Decides which changes of a gradient are understood: a constant factor (which undoes a loss scale),
clipping to a global norm, and clipping of every element. Does not decide what an optimizer does
with them.

A factor is not recognized by the operations that it is written with, of which there are many
spellings, but by its values: TensorFlow computes it for a few global norms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openwafer.errors import CaptureError
from openwafer.frontends.tf.importing import ancestors
from openwafer.frontends.tf.library import tf
from openwafer.frontends.tf.places import user_line

__all__ = ["GradientRule", "gradient_rule", "values_of"]

_TRIED_NORMS = (1e-3, 0.1, 1.0, 10.0, 1e3)
_LARGE_NORM = 1e6
_PASSES_ON = ("Identity", "CheckNumerics", "Snapshot", "EnsureShape")


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientRule:
    """scale: a constant factor. max_norm, max_value: 0 for none."""

    scale: float = 1.0
    max_norm: float = 0.0
    max_value: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chain:
    """What one gradient goes through, from the optimizer back: factors, and a bound of elements."""

    raw: str
    factors: tuple[tuple[Any, Any], ...]
    max_value: float


def values_of(gradient: Any) -> Any:
    """The tensor of a gradient; of IndexedSlices, their values."""
    return gradient.values if hasattr(gradient, "values") else gradient


def gradient_rule(graph: Any, given: Sequence[Any], raw: Sequence[Any]) -> GradientRule:
    """What makes `given` of `raw`, the same for all of them.

    Raises:
        CaptureError: it is nothing that is understood; with the user's line.
    """
    names = frozenset(values_of(gradient).name for gradient in raw if gradient is not None)
    chains = [_chain(values_of(gradient), names) for gradient in given]
    first, *others = chains
    for chain, gradient in zip(others, given[1:], strict=True):
        if not _alike(chain, first):
            raise _not_understood(values_of(gradient).op, "not all gradients are changed alike")
    return _rule(graph, first, chains)


def _chain(tensor: Any, raw: frozenset[str]) -> _Chain:
    factors: list[tuple[Any, Any]] = []
    bounds: dict[str, float] = {}
    while tensor.name not in raw:
        operation = tensor.op
        if operation.type in _PASSES_ON:
            tensor = operation.inputs[0]
        elif operation.type == "UnsortedSegmentSum" and operation.inputs[0].name in raw:
            tensor = operation.inputs[0]  # of an embedding: IndexedSlices made a tensor
        elif (side := _scalar_side(operation)) is not None:
            factors.append((operation.inputs[side], operation))
            tensor = operation.inputs[1 - side]
        elif operation.type in ("Minimum", "Maximum") and not factors:
            bounds[operation.type] = _number(operation)
            tensor = operation.inputs[0]
        else:
            raise _not_understood(operation, f"gradients go through {operation.type}")
    if bounds and -bounds.get("Maximum", math.nan) != bounds.get("Minimum", math.nan):
        raise _not_understood(tensor.op, "the bounds of clipped gradients are not the same number")
    return _Chain(raw=tensor.name, factors=tuple(factors), max_value=bounds.get("Minimum", 0.0))


def _scalar_side(operation: Any) -> int | None:
    """Which input is the factor: a scalar; of a division, only the divisor."""
    if operation.type not in ("Mul", "RealDiv"):
        return None
    first, second = (tensor.shape.rank for tensor in operation.inputs)
    if second == 0:
        return 1
    return 0 if first == 0 and operation.type == "Mul" else None


def _number(operation: Any) -> float:
    value = tf.get_static_value(operation.inputs[1])
    if value is None or getattr(value, "shape", ()) != ():
        raise _not_understood(operation, "gradients are bounded by what is computed")
    return float(value)


def _alike(chain: _Chain, other: _Chain) -> bool:
    """Whether two gradients go through the same: the same factors, or factors of the same numbers,
    and the same bound."""
    if len(chain.factors) != len(other.factors) or chain.max_value != other.max_value:
        return False
    for (mine, one), (theirs, another) in zip(chain.factors, other.factors, strict=True):
        if one.type != another.type:
            return False
        if mine.name != theirs.name:
            number = tf.get_static_value(mine)
            if number is None or number != tf.get_static_value(theirs):
                return False
    return True


def _rule(graph: Any, chain: _Chain, chains: Sequence[_Chain]) -> GradientRule:
    scale, max_norm = 1.0, 0.0
    for factor, operation in chain.factors:
        norm = _global_norm_in(factor, {c.raw for c in chains})
        if norm is None:
            value = tf.get_static_value(factor)
            if value is None:
                raise _not_understood(operation, "gradients are multiplied by what is computed")
            scale *= float(value) if operation.type == "Mul" else 1 / float(value)
        elif max_norm or operation.type != "Mul":
            raise _not_understood(operation, "gradients are scaled by their norm in a way unknown")
        else:
            max_norm = _clip_norm(graph, factor, norm, operation)
    return GradientRule(scale=scale, max_norm=max_norm, max_value=chain.max_value)


def _global_norm_in(factor: Any, raw: set[str]) -> Any:
    """The tensor in a factor's expression that is the norm of all gradients; None for none."""
    cone = ancestors([factor])
    norms = [
        operation
        for operation in cone
        if operation.type == "Sqrt" and operation.outputs[0].shape.rank == 0
    ]
    for operation in norms:
        squares = {o for o in ancestors([operation.outputs[0]]) if o.type == "L2Loss"}
        if squares and all(_covers(o.inputs[0], raw) for o in squares):
            if len(squares) == len(raw):
                return operation.outputs[0]
            raise _not_understood(operation, "the norm is not that of all gradients")
    return None


def _covers(tensor: Any, raw: set[str]) -> bool:
    """Whether a tensor is a gradient, perhaps with a constant factor."""
    try:
        return bool(_chain(tensor, frozenset(raw)).raw)
    except CaptureError:
        return False


def _clip_norm(graph: Any, factor: Any, norm: Any, operation: Any) -> float:
    """The largest norm that a factor lets pass, if it is min(1, largest / norm)."""
    on_cpu = tf.compat.v1.ConfigProto(device_count={"GPU": 0})
    with tf.compat.v1.Session(graph=graph, config=on_cpu) as session:

        def at(value: float) -> float:
            return float(session.run(factor, feed_dict={norm: value}))

        try:
            largest = at(_LARGE_NORM) * _LARGE_NORM
            understood = all(
                math.isclose(at(value), min(1.0, largest / value), rel_tol=1e-5)
                for value in (*_TRIED_NORMS, largest / 2, 2 * largest)
            )
        except tf.errors.OpError:
            understood, largest = False, 0.0
    if not understood:
        raise _not_understood(operation, "gradients are scaled by their norm in a way unknown")
    # TensorFlow computes in float32: what was written is the number with fewer digits.
    return float(f"{largest:.6g}")


def _not_understood(operation: Any, what: str) -> CaptureError:
    file, line = user_line(operation)
    return CaptureError(
        f"the train_op is not understood: {what} ({operation.name})",
        where=f"{file}:{line}" if file else "",
        allowed="tf.clip_by_global_norm over all gradients, tf.clip_by_value with -x and x, "
        "a constant loss scale that is divided out again",
        hint="without cs_ip, TensorFlow itself trains any train_op",
    )
