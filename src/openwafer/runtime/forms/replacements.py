"""Faster forms of what a layer computes, with the same result within rounding.

Decides which operations of a compiled layer take another form than torch's own:
    attention   batched products over blocks of queries (attention.py); a mask that is known before
                the run and leaves each query the keys up to its own becomes a causal one, which
                halves the work
    loss head   cross entropy of a linear layer's outputs without their fp32 copy (loss_head.py)
Does not decide whether layers are compiled (inductor.py): layers that run operation by operation
keep torch's kernels. Which of attention's forms is faster on a machine is measured (tuning.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from openwafer.graph.program import Program
from openwafer.plan.layers import Layer
from openwafer.runtime.forms.attention import AttentionShape, attend_in_blocks
from openwafer.runtime.forms.loss_head import linear_cross_entropy

__all__ = ["AttentionUse", "ChooseBlock", "Forms", "Replacement"]

_aten = torch.ops.aten

_HIDDEN_LOGIT = -9000.0
"""A bias from here down hides a key: in fp32 its weight is 0 unless logits differ by thousands."""

_CONSTANT_ELEMENTS = 1 << 26
"""Masks up to this size are looked at before the run."""

_ROW_SHAPES = (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default)
_SAME_ROWS = (_aten._to_copy.default, _aten.clone.default, _aten.contiguous.default)


@dataclass(frozen=True, slots=True)
class AttentionUse:
    """What the choice of a form depends on, besides the machine.

    sizes: batch, heads, queries, keys, features.
    """

    sizes: tuple[int, int, int, int, int]
    dtype: torch.dtype
    causal: bool
    biased: bool
    dropout: float


ChooseBlock = Callable[[AttentionUse], int | None]
"""Queries at a time for an attention, or None where torch's own kernel is to be used."""


@dataclass(frozen=True, slots=True)
class Replacement:
    """A function of some nodes' values that stands for one node.

    absorbed: nodes whose work it does too; nothing else reads them.
    """

    function: Callable[..., torch.Tensor]
    arguments: tuple[fx.Node | None, ...]
    absorbed: tuple[fx.Node, ...] = ()


class Forms:
    """The forms that a Program's layers take. Choices are made once per structure."""

    def __init__(self, program: Program, choose_block: ChooseBlock) -> None:
        self._nodes = {node.name: node for node in program.graph.nodes}
        self._choose_block = choose_block
        self._constants = _Constants(program)
        self._read_outside = {program.loss} | {n for m in program.metrics for n in m.nodes}

    def of(self, layer: Layer) -> dict[fx.Node, Replacement]:
        """Replacements by the node they stand for."""
        found: dict[fx.Node, Replacement] = {}
        for name in layer.nodes:
            node = self._nodes[name]
            replacement = None
            if node.target is _aten.scaled_dot_product_attention.default:
                replacement = self._attention(node)
            elif node.target is _aten.cross_entropy_loss.default:
                replacement = self._loss_head(node, layer)
            if replacement is not None:
                found[node] = replacement
        return found

    def fingerprint(self, layer: Layer) -> tuple[Any, ...]:
        """What copies of a structure must agree on besides the structure."""
        return tuple(
            (layer.nodes.index(node.name), replacement.function)
            if isinstance(replacement.function, _Attention)
            else layer.nodes.index(node.name)
            for node, replacement in self.of(layer).items()
        )

    # ------------------------------------------------------------------ attention

    def _attention(self, node: fx.Node) -> Replacement | None:
        given = _named_arguments(node)
        query, key, value, bias = (given[n] for n in ("query", "key", "value", "attn_mask"))
        q, k, v = (argument.meta["val"] for argument in (query, key, value))
        if q.dim() != 4 or q.shape[:2] != k.shape[:2] or k.shape != v.shape:
            return None
        if q.shape[3] != k.shape[3] or not q.is_floating_point() or given["enable_gqa"]:
            return None
        causal = given["is_causal"] or (bias is not None and self._hides_the_future(bias))
        if causal and q.shape[2] != k.shape[2]:
            return None
        bias = None if causal else bias
        if bias is not None and _may_get_gradient(bias):
            return None
        dropout = float(given["dropout_p"])
        sizes = (q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.shape[3])
        use = AttentionUse(sizes, q.dtype, causal, bias is not None, dropout)
        block = self._choose_block(use)
        if block is None:
            return None
        scale = given["scale"] or q.shape[3] ** -0.5
        shape = AttentionShape(float(scale), block, bool(causal), 1.0 - dropout)
        boolean = bias is not None and bias.meta["val"].dtype == torch.bool
        return Replacement(_Attention(shape, boolean), (query, key, value, bias))

    def _hides_the_future(self, bias: fx.Node) -> bool:
        """Whether a mask is known to hide the keys after each query's own, and nothing else."""
        mask = self._constants.value(bias)
        if mask is None or mask.shape[-2] != mask.shape[-1] or mask.numel() != mask.shape[-1] ** 2:
            return False
        mask = mask.reshape(mask.shape[-2:])
        seen = torch.ones_like(mask, dtype=torch.bool).tril()
        if mask.dtype == torch.bool:
            return bool((mask == seen).all())
        return bool((mask[seen] == 0.0).all()) and bool((mask[~seen] <= _HIDDEN_LOGIT).all())

    # ------------------------------------------------------------------ loss head

    def _loss_head(self, node: fx.Node, layer: Layer) -> Replacement | None:
        given = _named_arguments(node)
        labels = given["target"]
        plain = given["weight"] is None and not given["label_smoothing"]
        if not plain or labels.meta["val"].dtype != torch.int64 or labels.meta["val"].dim() != 1:
            return None
        chain: list[fx.Node] = []
        step = given["self"]
        while step.target is not _aten.linear.default:
            if step.op != "call_function" or not self._is_hidden(step, layer):
                return None
            if not _keeps_rows(step):
                return None
            chain.append(step)
            step = step.args[0]
        if not self._is_hidden(step, layer):
            return None
        hidden, weight, bias = (*step.args, None)[:3]
        head = _LossHead(
            tuple(_on_hidden(part) for part in reversed(chain)),
            int(given["reduction"]),
            int(given["ignore_index"]),
        )
        return Replacement(head, (hidden, weight, bias, labels), (*chain, step))

    def _is_hidden(self, node: fx.Node, layer: Layer) -> bool:
        """Whether one node alone reads it, in the same layer."""
        here = node.name in layer.nodes and node.name not in self._read_outside
        return here and len(node.users) == 1 and node.name not in layer.outputs


@dataclass(frozen=True, slots=True)
class _Attention:
    shape: AttentionShape
    boolean: bool
    __name__: str = "attention"  # fx names nodes after it

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        if bias is not None:
            while bias.dim() < 4:
                bias = bias.unsqueeze(0)
            if self.boolean:
                bias = torch.where(bias, 0.0, float("-inf"))
        kept = None
        if self.shape.keep < 1.0:
            weights = (*query.shape[:3], key.shape[2])
            like = torch.empty(weights, dtype=torch.bool, device=query.device)
            # The draw that torch's own form makes for its weights: one, of this shape.
            kept = torch.bernoulli(like, self.shape.keep)
        return attend_in_blocks(query, key, value, bias, kept, self.shape)


@dataclass(frozen=True, slots=True)
class _LossHead:
    """`row_shapes` are what happens to the rows of logits, done to those of the hidden values."""

    row_shapes: tuple[Callable[[torch.Tensor], torch.Tensor], ...]
    reduction: int
    ignore_index: int
    __name__: str = "loss_head"

    def __call__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        for reshape in self.row_shapes:
            hidden = reshape(hidden)
        return linear_cross_entropy(hidden, weight, bias, labels, self.reduction, self.ignore_index)


def _keeps_rows(node: fx.Node) -> bool:
    """Whether a node on the way from a linear layer to its loss leaves each row in one piece."""
    source: Any = node.args[0]
    before, after = source.meta["val"], node.meta["val"]
    if node.target in _SAME_ROWS:
        return after.is_floating_point() and after.dtype.itemsize >= before.dtype.itemsize
    if node.target in _ROW_SHAPES:
        return after.dim() > 0 and after.shape[-1] == before.shape[-1]
    if node.target is _aten.slice.Tensor:
        dimension = node.args[1] if len(node.args) > 1 else 0
        return dimension % before.dim() != before.dim() - 1
    return False


def _on_hidden(node: fx.Node) -> Callable[[torch.Tensor], torch.Tensor]:
    """What `_keeps_rows` allowed, for rows of another width."""
    if node.target in _ROW_SHAPES:
        leading = tuple(node.meta["val"].shape[:-1])
        return partial(_reshaped, leading)
    if node.target is _aten.slice.Tensor:
        return partial(_sliced, tuple(node.args[1:]))
    return _same


def _reshaped(leading: tuple[int, ...], rows: torch.Tensor) -> torch.Tensor:
    return rows.reshape(*leading, rows.shape[-1])


def _sliced(arguments: tuple[Any, ...], rows: torch.Tensor) -> torch.Tensor:
    return _aten.slice.Tensor(rows, *arguments)


def _same(rows: torch.Tensor) -> torch.Tensor:
    return rows


def _named_arguments(node: fx.Node) -> dict[str, Any]:
    target: Any = node.target
    names = target._schema.arguments
    given = {argument.name: argument.default_value for argument in names}
    given |= {argument.name: value for argument, value in zip(names, node.args, strict=False)}
    return given | dict(node.kwargs)


def _may_get_gradient(bias: fx.Node) -> bool:
    """Whether some weight has an influence on it (an integer or a constant has none)."""
    seen: set[fx.Node] = set()
    stack = [bias]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        if node.op == "placeholder":
            return True
        stack.extend(node.all_input_nodes)
    return False


class _Constants:
    """Values of nodes that depend on nothing that is given to a run."""

    def __init__(self, program: Program) -> None:
        self._values: dict[fx.Node, torch.Tensor | None] = {}
        self._fixed: Mapping[str, torch.Tensor] = {
            b.node: b.value for b in program.buffers if b.value is not None and not b.update
        }

    def value(self, node: fx.Node) -> torch.Tensor | None:
        if node not in self._values:
            self._values[node] = self._compute(node)
        return self._values[node]

    def _compute(self, node: fx.Node) -> torch.Tensor | None:
        shape = node.meta.get("val")
        if not isinstance(shape, torch.Tensor) or shape.numel() > _CONSTANT_ELEMENTS:
            return None
        if node.op == "placeholder":
            return self._fixed.get(node.name)
        target: Any = node.target
        if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
            return None
        sources = {source: self.value(source) for source in node.all_input_nodes}
        if node.op != "call_function" or any(value is None for value in sources.values()):
            return None
        given: Any = fx.map_arg((node.args, dict(node.kwargs)), lambda n: sources[n])
        args, kwargs = given
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        result = target(*args, **kwargs)
        return result if isinstance(result, torch.Tensor) else None
