"""Operations that TensorFlow writes as several, put together where a kernel takes them as one.

Decides these forms, each a function that looks at one node and what it is computed from. Nothing
depends on a form being found: its parts are operations of their own, with the same result.

    Dense                   BiasAdd(MatMul(x, w), b), perhaps with a reshape of the product between
    Biased…                 BiasAdd(Conv2D(x, w), b), and of a transposed convolution
    Dropout                 where(random ≥ rate, x · 1/(1 - rate), 0), or with a product for where
    MeanSparseCrossEntropy  the mean of SparseSoftmaxCrossEntropyWithLogits, in its two spellings
    LayerNorm               FusedBatchNorm of a tensor's rows as channels, · gamma + beta; or the
                            moments of the rows, and x · f + (beta - mean · f) with the factor
                            f = rsqrt(variance + epsilon) · gamma
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from openwafer.frontends.tf.nodes import Array, Node, TensorGraph

__all__ = ["fuse"]

_ADDS = ("Add", "AddV2", "BiasAdd")
_RANDOM = ("RandomUniform",)
_CONVOLUTION_ATTRIBUTES = (
    *("data_format", "dilations", "explicit_paddings", "padding", "strides"),
)
_PASSES_ON = ("Identity", "Cast", "Reshape")


def fuse(graph: TensorGraph) -> TensorGraph:
    """The graph with every form that is found, and without what only its parts needed."""
    graph = replace(graph, nodes=_needed(list(graph.nodes), graph))
    view = _View(graph)
    nodes = list(graph.nodes)
    for position, node in enumerate(nodes):
        for form in _FORMS:
            found = form(view, node)
            if found is not None:
                nodes[position] = found
                view.replace(found)
                break
    return replace(graph, nodes=_needed(nodes, graph))


def _needed(nodes: list[Node], graph: TensorGraph) -> tuple[Node, ...]:
    wanted = {*graph.results, *(update.value for update in graph.updates)}
    kept: list[Node] = []
    for node in reversed(nodes):
        if any(name in wanted for name in node.outputs):
            kept.append(node)
            wanted.update(node.inputs)
    return tuple(reversed(kept))


class _View:
    """Who makes a tensor, how often it is read, and what it is if it is a constant."""

    def __init__(self, graph: TensorGraph) -> None:
        self.constants: Mapping[str, Array] = graph.constants
        self.inputs = graph.inputs
        self._makers = {name: node for node in graph.nodes for name in node.outputs}
        self._reads = Counter(name for node in graph.nodes for name in node.inputs)
        self._reads.update(graph.results)
        self._reads.update(update.value for update in graph.updates)

    def replace(self, node: Node) -> None:
        self._makers |= dict.fromkeys(node.outputs, node)

    def maker(self, name: str, *kinds: str, alone: bool = True) -> Node | None:
        """The node that makes a tensor, if it is of one of these kinds and (with `alone`) nothing
        else reads the tensor."""
        node = self._makers.get(name)
        if node is None or node.kind not in kinds or (alone and self._reads[name] != 1):
            return None
        return node

    def number(self, name: str) -> float | None:
        """The constant that a tensor is in every element."""
        value = self.constants.get(name)
        if value is None or not value.size or value.dtype.kind not in "fiub":
            return None
        first = value.reshape(-1)[0]
        return float(first) if bool((value == first).all()) else None

    def is_over_rows(self, reduction: Node) -> bool:
        """Whether it reduces the last dimension alone, and keeps it."""
        axes = self.constants.get(reduction.inputs[1])
        shape = reduction.shapes[0]
        if axes is None or shape is None or not reduction.attribute("keep_dims"):
            return False
        return [int(axis) % len(shape) for axis in axes.reshape(-1)] == [len(shape) - 1]

    def split(self, node: Node) -> list[tuple[str, str]]:
        """Both orders of a node's two inputs."""
        first, second = node.inputs
        return [(first, second), (second, first)]

    def shape(self, name: str) -> tuple[int, ...] | None:
        node = self._makers.get(name)
        return node.shapes[node.outputs.index(name)] if node is not None else None


def _dense(view: _View, node: Node) -> Node | None:
    if node.kind != "BiasAdd" or node.attribute("data_format") == b"NCHW":
        return None
    product = view.maker(node.inputs[0], "MatMul", "Reshape")
    if product is not None and product.kind == "Reshape":
        # Keras multiplies rows where there are more dimensions; the lowering gives them back.
        product = view.maker(product.inputs[0], "MatMul")
    if product is None or not _same_width(product, node):
        return None
    own = {name: product.attribute(name) for name in ("transpose_a", "transpose_b")}
    return replace(node, kind="Dense", inputs=(*product.inputs, node.inputs[1]), own=own)


def _biased_convolution(view: _View, node: Node) -> Node | None:
    if node.kind != "BiasAdd":
        return None
    found = view.maker(node.inputs[0], "Conv2D", "Conv2DBackpropInput")
    if found is None or found.attribute("data_format") != node.attribute("data_format"):
        return None
    own = {name: found.attribute(name) for name in _CONVOLUTION_ATTRIBUTES}
    inputs = (*found.inputs, node.inputs[1])
    return replace(node, kind=f"Biased{found.kind}", inputs=inputs, own=own)


def _same_width(node: Node, other: Node) -> bool:
    widths = [each.shapes[0][-1] if each.shapes[0] else None for each in (node, other)]
    return widths[0] is not None and widths[0] == widths[1]


def _dropout(view: _View, node: Node) -> Node | None:
    """The whole shape of the value is drawn; with a noise_shape it is left in parts."""
    for scaled, condition in _masked(view, node):
        mask = view.maker(condition, "GreaterEqual")
        draw = view.maker(mask.inputs[0], *_RANDOM) if mask else None
        rate = view.number(mask.inputs[1]) if mask else None
        product = view.maker(scaled, "Mul", "RealDiv")
        if draw is None or rate is None or product is None or draw.shapes[0] != node.shapes[0]:
            continue
        for value, factor in view.split(product):
            scale = view.number(factor)
            if scale is None or (product.kind == "RealDiv" and value != product.inputs[0]):
                continue
            wanted = 1 - rate if product.kind == "RealDiv" else 1 / (1 - rate)
            if math.isclose(scale, wanted, rel_tol=1e-5):
                # What was written has fewer digits than its float32.
                own = {"rate": round(rate, 7)}
                return replace(node, kind="Dropout", inputs=(value,), own=own)
    return None


def _masked(view: _View, node: Node) -> list[tuple[str, str]]:
    """(value, truth values) that a node may be a masked product of."""
    if node.kind == "SelectV2":
        condition, scaled, zero = node.inputs
        return [(scaled, condition)] if view.number(zero) == 0 else []
    if node.kind != "Mul":
        return []
    casts = [(value, view.maker(factor, "Cast")) for value, factor in view.split(node)]
    return [(value, cast.inputs[0]) for value, cast in casts if cast is not None]


def _mean_cross_entropy(view: _View, node: Node) -> Node | None:
    """`reduce_mean(losses)`, or as tf.compat.v1.losses has it: losses · 1, their sum, over a count
    that is the number of samples."""
    if node.kind == "Mean":
        losses, weighted = node.inputs[0], 1.0
        while (shaped := view.maker(losses, "Reshape")) is not None:
            losses = shaped.inputs[0]
    elif node.kind in ("DivNoNan", "RealDiv"):
        count = view.number(node.inputs[1])
        losses, weighted = _summed(view, node.inputs[0])
        if count is None or not losses:
            return None
        weighted *= _num_elements(view.shape(losses)) / count if count else 0.0
    else:
        return None
    source = view.maker(losses, "SparseSoftmaxCrossEntropyWithLogits")
    if source is None or node.shapes[0] != () or not math.isclose(weighted, 1.0):
        return None
    return replace(node, kind="MeanSparseCrossEntropy", inputs=source.inputs)


def _summed(view: _View, name: str) -> tuple[str, float]:
    """What is summed to a scalar, and the factor that each element has."""
    factor = 1.0
    while (node := view.maker(name, "Sum", "Mul", *_PASSES_ON)) is not None:
        if node.kind == "Mul":
            for value, weight in view.split(node):
                number = view.number(weight)
                if number is not None:
                    name, factor = value, factor * number
                    break
            else:
                return "", 0.0
        elif node.kind == "Sum" and node.shapes[0] != ():
            return "", 0.0
        else:
            name = node.inputs[0]
    return name, factor


def _num_elements(shape: tuple[int, ...] | None) -> int:
    return int(np.prod(shape)) if shape else 1


def _layer_norm(view: _View, node: Node) -> Node | None:
    """Keras: [rows, size] as an image of one sample with a channel for each row."""
    if node.kind not in _ADDS:
        return None
    for scaled, beta in view.split(node):
        product = view.maker(scaled, "Mul")
        for back, gamma in view.split(product) if product else ():
            reshaped = view.maker(back, "Reshape")
            norm = reshaped and view.maker(
                reshaped.inputs[0], "FusedBatchNormV3", "FusedBatchNormV2", "FusedBatchNorm"
            )
            rows = norm and view.maker(norm.inputs[0], "Reshape")
            if norm is None or rows is None or not _is_plain_norm(view, norm):
                continue
            shape = node.shape()
            if rows.shape() != (1, int(np.prod(shape[:-1])), shape[-1], 1):
                continue
            own = {"epsilon": norm.attribute("epsilon")}
            inputs = (rows.inputs[0], gamma, beta)
            return replace(node, kind="LayerNorm", inputs=inputs, own=own)
    return None


def _spelled_layer_norm(view: _View, node: Node) -> Node | None:
    """tf.nn.moments and tf.nn.batch_normalization: Keras, where epsilon is too small to fuse."""
    if node.kind not in _ADDS:
        return None
    for scaled, shift in view.split(node):
        product, difference = view.maker(scaled, "Mul"), view.maker(shift, "Sub")
        moved = view.maker(difference.inputs[1], "Mul") if difference else None
        if product is None or difference is None or moved is None:
            continue
        for x, factor in view.split(product):
            found = _row_factor(view, x, factor)
            if found is None or {*moved.inputs} != {found.mean, factor}:
                continue
            inputs = (x, found.gamma, difference.inputs[0])
            return replace(node, kind="LayerNorm", inputs=inputs, own={"epsilon": found.epsilon})
    return None


class _RowFactor(NamedTuple):
    """rsqrt(variance + epsilon) · gamma, of the last dimension."""

    mean: str
    gamma: str
    epsilon: float


def _row_factor(view: _View, x: str, name: str) -> _RowFactor | None:
    factor = view.maker(name, "Mul", alone=False)
    for root, gamma in view.split(factor) if factor else ():
        inverse = view.maker(root, "Rsqrt")
        shifted = view.maker(inverse.inputs[0], *_ADDS) if inverse else None
        for variance, epsilon in view.split(shifted) if shifted else ():
            number, mean = view.number(epsilon), _mean_in_variance(view, x, variance)
            if number is not None and mean:
                return _RowFactor(mean, gamma, number)
    return None


def _mean_in_variance(view: _View, x: str, name: str) -> str:
    """The mean of x's rows in the mean of their squared differences from it; "" if it is not."""
    variance = view.maker(name, "Mean")
    squares = view.maker(variance.inputs[0], "SquaredDifference") if variance else None
    if variance is None or squares is None or x not in squares.inputs:
        return ""
    other = next((each for each in squares.inputs if each != x), "")
    held = view.maker(other, "StopGradient")
    mean = view.maker(held.inputs[0] if held else other, "Mean", alone=False)
    if mean is None or mean.inputs[0] != x:
        return ""
    rows = all(view.is_over_rows(reduction) for reduction in (variance, mean))
    return mean.outputs[0] if rows else ""


def _is_plain_norm(view: _View, norm: Node) -> bool:
    return (
        bool(norm.attribute("is_training"))
        and norm.attribute("data_format") == b"NCHW"
        and view.number(norm.inputs[1]) == 1
        and view.number(norm.inputs[2]) == 0
    )


_FORMS: tuple[Callable[[_View, Node], Node | None], ...] = (
    _dense,
    _biased_convolution,
    _dropout,
    _mean_cross_entropy,
    _layer_norm,
    _spelled_layer_norm,
)
