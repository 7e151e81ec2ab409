"""Attention that is written out, put together as the one operation that torch has for it.

Decides which spellings are softmax(query keyᵀ · scale + bias) value: two products (matmul, bmm, or
einsum with its axes in any order), numbers that scale, biases and masks that are added, -inf where
a mask is, casts, dropout. Kernels, plans and the fast forms of the runtime then see
scaled_dot_product_attention, whoever wrote it. Where anything else reads a part, or an operation
stands between that is none of these (a cap by tanh, a finite number in place of masked scores), the
spelling stays as it is; `kernels/attention.py` has a pattern for those.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.node import map_arg

__all__ = ["fuse_attention"]

_aten = torch.ops.aten

_CASTS = (_aten._to_copy.default, _aten.to.dtype)
_QUOTIENTS = (_aten.div.Tensor, _aten.div.Scalar)
_SCALES = (_aten.mul.Tensor, _aten.mul.Scalar, *_QUOTIENTS)
_SUMS = (_aten.add.Tensor, _aten.sub.Tensor)
_SOFTMAX = (_aten.softmax.int, _aten._softmax.default)


def fuse_attention(graph: fx.Graph) -> None:
    """Replace each attention in `graph` that is written out."""
    for node in list(graph.nodes):
        found = _attention_around(node) if node.target in _SOFTMAX else None
        if found is not None:
            _replace(graph, found)
            graph.eliminate_dead_code()  # permutations and scales that only it read


@dataclass(frozen=True, slots=True)
class _Product:
    """A product of two tensors, as einsum would have it: a letter for each axis."""

    node: fx.Node
    operands: tuple[fx.Node, fx.Node]
    axes: tuple[str, str]
    result: str


class _Link(NamedTuple):
    """An operation between scores and softmax. `inner` is that argument of it which is the scores,
    or made from them."""

    node: fx.Node
    inner: fx.Node

    @property
    def bias(self) -> fx.Node | None:
        """What a sum adds to the scores, or takes from them."""
        if self.node.target not in _SUMS:
            return None
        return next(each for each in self.node.all_input_nodes if each is not self.inner)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attention:
    """What stands around one softmax.

    links: in order, from the scores on. dropout: rate. query, value: which operand of the products
    they are. nodes: all that goes, in order.
    """

    scores: _Product
    links: tuple[_Link, ...]
    dropout: float
    weighted: _Product
    query: int
    value: int
    nodes: tuple[fx.Node, ...]


@dataclass(slots=True)
class _Logits:
    """scores · scale + bias, built along the links; `hidden` is where they are -inf."""

    scale: float = 1.0
    bias: fx.Node | None = None
    hidden: list[fx.Node] = field(default_factory=list[fx.Node])


# ------------------------------------------------------------------ finding


def _attention_around(softmax: fx.Node) -> _Attention | None:
    shape = _shape(softmax)
    if shape is None or softmax.args[1] not in (-1, len(shape) - 1):
        return None
    before = _to_scores(softmax.args[0], shape)
    after = _to_weighted(softmax)
    if before is None or after is None:
        return None
    (scores, links), (weighted, rate, passed) = before, after
    query = _query_operand(scores)
    value = _value_operand(weighted, passed[-1], scores.result)
    if query is None or value is None or not _is_fusible(scores, links, weighted):
        return None
    nodes = (scores.node, *(link.node for link in links), *passed, weighted.node)
    return _Attention(
        scores=scores,
        links=links,
        dropout=rate,
        weighted=weighted,
        query=query,
        value=value,
        nodes=nodes,
    )


def _to_scores(node: Any, shape: tuple[int, ...]) -> tuple[_Product, tuple[_Link, ...]] | None:
    """The product that a softmax is of, and what lies between."""
    if not isinstance(node, fx.Node) or len(node.users) != 1 or _shape(node) != shape:
        return None
    product = _product(node)
    if product is not None:
        return product, ()
    for inner in _continued(node):
        found = _to_scores(inner, shape)
        if found is not None:
            return found[0], (*found[1], _Link(node, inner))
    return None


def _continued(node: fx.Node) -> tuple[Any, ...]:
    """Which arguments of a link may be the scores."""
    target, given = node.target, _arguments(node)
    if target in _CASTS:
        return given[:1]
    if target in _SCALES:
        return given[:1] if len(given) == 2 and isinstance(given[1], (int, float)) else ()
    if target in _SUMS and not node.kwargs and len(node.all_input_nodes) == 2:
        return given if target is _aten.add.Tensor else given[:1]
    if target is _aten.masked_fill.Scalar and given[2] == -math.inf:
        return given[:1]
    if target is _aten.where.ScalarOther and given[2] == -math.inf:
        return given[1:2]
    return ()


def _to_weighted(softmax: fx.Node) -> tuple[_Product, float, tuple[fx.Node, ...]] | None:
    """The product that takes a softmax, the rate of dropout, and what lies between."""
    node, rate, passed = softmax, 0.0, [softmax]
    while len(node.users) == 1:
        (reader,) = node.users
        product = _product(reader)
        if product is not None:
            return product, rate, tuple(passed)
        if reader.target in (_aten.dropout.default, _aten.native_dropout.default):
            given: Any = reader.args
            if rate or given[2] is not True:
                return None
            rate = float(given[1])
        elif reader.target not in _CASTS and not _is_first_result(reader):
            return None
        passed.append(reader)
        node = reader
    return None


def _is_first_result(node: fx.Node) -> bool:
    if node.target is not operator.getitem:
        return False
    source, position = _arguments(node)
    return source.target is _aten.native_dropout.default and position == 0


def _product(node: fx.Node) -> _Product | None:
    if node.target in (_aten.matmul.default, _aten.bmm.default):
        first, second = node.args
        assert isinstance(first, fx.Node)
        assert isinstance(second, fx.Node)
        left, right = _shape(first), _shape(second)
        if not left or not right or len(left) not in (3, 4) or left[:-2] != right[:-2]:
            return None
        batch = "ab"[: len(left) - 2]
        return _Product(node, (first, second), (f"{batch}xy", f"{batch}yz"), f"{batch}xz")
    if node.target is _aten.einsum.default:
        equation, operands = node.args[:2]
        return _einsum(node, str(equation).replace(" ", ""), operands)
    return None


def _einsum(node: fx.Node, equation: str, operands: Any) -> _Product | None:
    sources, arrow, result = equation.partition("->")
    axes = tuple(sources.split(","))
    if not arrow or "." in equation or len(axes) != 2 or len(result) not in (3, 4):
        return None
    if any(len(set(letters)) != len(letters) for letters in (*axes, result)):
        return None
    return _Product(node, tuple(operands), axes, result)


def _query_operand(scores: _Product) -> int | None:
    """Which operand of scores [heads…, queries, keys] has the queries."""
    *heads, queries, keys = scores.result
    for index in (0, 1):
        query, key = scores.axes[index], scores.axes[1 - index]
        features = set(query) & set(key) - set(heads)
        if (
            len(features) == 1
            and set(query) == {*heads, queries, *features}
            and set(key) == {*heads, keys, *features}
        ):
            return index
    return None


def _value_operand(weighted: _Product, weights: fx.Node, scores: str) -> int | None:
    """Which operand of the second product has the values; the other one is the weights."""
    for index in (0, 1):
        letters, value = weighted.axes[1 - index], weighted.axes[index]
        if weighted.operands[1 - index] is not weights or len(letters) != len(scores):
            continue
        *heads, queries, keys = letters
        features = set(value) - {*heads, keys}
        if (
            len(features) == 1
            and set(value) == {*heads, keys, *features}
            and set(weighted.result) == {*heads, queries, *features}
        ):
            return index
    return None


def _is_fusible(scores: _Product, links: Sequence[_Link], weighted: _Product) -> bool:
    """Whether all is of one type, and every bias can be given in it.

    A bias of float32 for products of float16 cannot: -1e9 would become infinite.
    """
    dtype = _dtype(weighted.node)
    operands = (*scores.operands, *weighted.operands)
    if any(_dtype(node) != dtype for node in operands) or not dtype.is_floating_point:
        return False
    if any(reader.op == "output" for reader in weighted.node.users):
        return False  # what leaves the graph is known by its name
    biases = [_dtype(link.bias) for link in links if link.bias is not None]
    return all(
        bias == dtype or (bias.is_floating_point and dtype != torch.float16) for bias in biases
    )


# ------------------------------------------------------------------ replacing


def _replace(graph: fx.Graph, found: _Attention) -> None:
    last = found.weighted.node
    with graph.inserting_before(last):
        result = _fused(_Builder(graph, last), found)
    last.replace_all_uses_with(result)
    for node in reversed(found.nodes):
        graph.erase_node(node)


class _Builder:
    """Makes nodes that come from where `source` comes from, with their shapes."""

    def __init__(self, graph: fx.Graph, source: fx.Node) -> None:
        self._graph, self._source = graph, source

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self._graph.call_function(target, args, kwargs)
        given: Any = map_arg((args, kwargs), _val)
        with torch.no_grad(), _val(self._source).fake_mode:
            val = target(*given[0], **given[1])
        node.meta = {**self._source.meta, "val": val}
        return node

    def permuted(self, node: fx.Node, axes: str, wanted: str) -> fx.Node:
        """`node` with its axes in another order; what a permutation before did is undone."""
        order = [axes.index(letter) for letter in wanted]
        while order != sorted(order):
            before = _permutation(node)
            if before is None:
                return self.call(_aten.permute.default, node, order)
            source: Any = node.args[0]
            node, order = source, [before[axis] for axis in order]
        return node

    def with_heads(self, node: fx.Node) -> fx.Node:
        """[heads, length, features] as [heads, 1, length, features]."""
        few = len(_val(node).shape) == 3
        return self.call(_aten.unsqueeze.default, node, 1) if few else node


def _permutation(node: fx.Node) -> list[int] | None:
    arguments = _arguments(node)
    if node.target is _aten.permute.default:
        return [axis % len(arguments[1]) for axis in arguments[1]]
    if node.target is _aten.transpose.int:
        order = list(range(_val(node).dim()))
        order[arguments[1]], order[arguments[2]] = order[arguments[2]], order[arguments[1]]
        return order
    return None


def _fused(build: _Builder, found: _Attention) -> fx.Node:
    scores, weighted = found.scores, found.weighted
    logits = _logits(build, found.links)
    *heads, queries, keys = scores.result
    (features,) = set(scores.axes[0]) & set(scores.axes[1]) - set(heads)
    query, key = (scores.operands[i] for i in (found.query, 1 - found.query))
    query, logits.scale = _unscaled(query, logits.scale)
    batch = "".join(heads)
    q = build.permuted(query, scores.axes[found.query], batch + queries + features)
    k = build.permuted(key, scores.axes[1 - found.query], batch + keys + features)
    *heads, queries, keys = weighted.axes[1 - found.value]
    batch = "".join(heads)
    (features,) = set(weighted.axes[found.value]) - {*heads, keys}
    v = build.permuted(
        weighted.operands[found.value], weighted.axes[found.value], batch + keys + features
    )
    mask = _mask(build, logits, _val(q).dtype, len(scores.result))
    positional: list[Any] = [mask, found.dropout] if found.dropout else [mask] if mask else []
    result = build.call(
        _aten.scaled_dot_product_attention.default,
        *(build.with_heads(each) for each in (q, k, v)),
        *positional,
        scale=logits.scale,
    )
    if len(heads) == 1:
        result = build.call(_aten.squeeze.dim, result, 1)
    return build.permuted(result, batch + queries + features, weighted.result)


def _logits(build: _Builder, links: Sequence[_Link]) -> _Logits:
    logits = _Logits()
    for link in links:
        node, given = link.node, _arguments(link.node)
        bias = link.bias
        if bias is not None:
            if node.target is _aten.sub.Tensor:
                bias = build.call(_aten.neg.default, bias)
            if logits.bias is not None:
                bias = build.call(_aten.add.Tensor, logits.bias, bias)
            logits.bias = bias
        elif node.target in _SCALES:
            factor = _factor(node)
            logits.scale *= factor
            if logits.bias is not None:
                logits.bias = build.call(_aten.mul.Tensor, logits.bias, factor)
        elif node.target is _aten.masked_fill.Scalar:
            logits.hidden.append(given[1])
        elif node.target is _aten.where.ScalarOther:
            logits.hidden.append(build.call(_aten.logical_not.default, given[0]))
    return logits


def _unscaled(query: fx.Node, scale: float) -> tuple[fx.Node, float]:
    """A query that was scaled for this product alone, before it."""
    inner = _continued(query) if query.target in _SCALES and len(query.users) == 1 else ()
    return (inner[0], scale * _factor(query)) if inner else (query, scale)


def _factor(node: fx.Node) -> float:
    """The number that a product or quotient scales by."""
    number = next(each for each in _arguments(node)[:2] if isinstance(each, (int, float)))
    return 1 / number if node.target in _QUOTIENTS else number


def _mask(build: _Builder, logits: _Logits, dtype: torch.dtype, rank: int) -> fx.Node | None:
    """What scaled_dot_product_attention is given: numbers of its type to be added, or truth values
    of what is seen; two or four axes."""
    mask = logits.bias
    if mask is not None and _val(mask).dtype != dtype:
        mask = build.call(_aten._to_copy.default, mask, dtype=dtype)
    for hidden in logits.hidden:
        if mask is None:
            mask = build.call(_aten.logical_not.default, hidden)
        elif _val(mask).dtype == torch.bool:
            seen = build.call(_aten.logical_not.default, hidden)
            mask = build.call(_aten.logical_and.default, mask, seen)
        else:
            mask = build.call(_aten.where.ScalarSelf, hidden, -math.inf, mask)
    if mask is None:
        return None
    if _val(mask).dim() == 3:
        return build.call(_aten.unsqueeze.default, mask, 1 if rank == 3 else 0)
    while _val(mask).dim() < 2:
        mask = build.call(_aten.unsqueeze.default, mask, 0)
    return mask


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _dtype(node: fx.Node) -> torch.dtype:
    return _val(node).dtype


def _val(node: fx.Node) -> Any:
    return node.meta["val"]


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None
