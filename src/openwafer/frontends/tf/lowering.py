"""A TensorFlow graph as a torch module, whose forward pass runs operation by operation.

Decides how names become weights and buffers of a module, and which operations are refused. What an
operation computes is in ops/. The module is what the compiler captures: each operation carries its
name scope and the user's line along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import traceback as fx_traceback

from openwafer.errors import UnsupportedOpError, nearest
from openwafer.frontends.tf.nodes import Array, Node, TensorGraph
from openwafer.frontends.tf.ops import LOWERINGS
from openwafer.frontends.tf.ops.table import (
    DTYPES,
    CannotLowerError,
    Operand,
    tensor,
    torch_dtype,
)
from openwafer.frontends.torch.capture import flatten_batch
from openwafer.kernels.refusal import Refusal, refusals_text

__all__ = ["SITE_KEY", "GraphModule", "refuse_unknown"]

_MOST_READ_AS_NUMBERS = 1024
"""Elements of a constant."""

SITE_KEY = "tensorflow_site"
"""Under which a captured node's metadata hold its `Site`."""


class GraphModule(nn.Module):
    """A forward graph; parameters and buffers have TensorFlow's names of the variables.

    Args:
        graph: what to run.
        values: of the variables, by name; one that is missing is on the meta device.
    """

    def __init__(self, graph: TensorGraph, values: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._graph = (graph,)
        for name, variable in graph.variables.items():
            value = values.get(name)
            if value is None:
                dtype = torch_dtype(variable.dtype)
                value = torch.empty(variable.shape, dtype=dtype, device="meta")
            if variable.trained:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def run(self, batch: Any) -> list[torch.Tensor]:
        """The results for a batch, and the next values of buffers put in their places."""
        graph = self._graph[0]
        values = self._sources(batch)
        for node in graph.nodes:
            with fx_traceback.annotate({SITE_KEY: node.site}):
                _run(node, values)
        for update in graph.updates:
            self._update(update.variable, update.how, values[update.value])
        return [_as_tensor(values[name]) for name in graph.results]

    def forward(self, batch: Any) -> list[torch.Tensor]:
        return self.run(batch)

    def _sources(self, batch: Any) -> dict[str, Operand]:
        graph = self._graph[0]
        held, leaves = _held(self), flatten_batch(batch)
        values = _constants(graph)
        values |= {tensor: held[name] for tensor, name in graph.reads.items() if name in held}
        values |= {tensor: leaves[path] for tensor, path in graph.inputs.items()}
        return values

    def _update(self, name: str, how: str, value: Operand) -> None:
        buffer, new = self.get_buffer(name), _as_tensor(value)
        if how != "assign":
            new = buffer + new if how == "add" else buffer - new
        buffer.copy_(new)


def _constants(graph: TensorGraph) -> dict[str, Operand]:
    """Numbers and small lists of integers as arrays, since lowerings read axes and sizes from them;
    of others, such as a mask that every block adds, the operations share one tensor."""
    return {
        name: tensor(array) if _is_shared(array) else array
        for name, array in graph.constants.items()
    }


def _is_shared(array: Array) -> bool:
    is_list_of_floats = array.size > 1 and array.dtype.kind == "f"
    return array.dtype.name in DTYPES and (is_list_of_floats or array.size > _MOST_READ_AS_NUMBERS)


def _as_tensor(value: Operand) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value)


def _run(node: Node, values: dict[str, Operand]) -> None:
    results = _lowering(node)(node, *(values[name] for name in node.inputs))
    outputs: Sequence[Any] = results if isinstance(results, (tuple, list)) else (results,)
    values.update(
        (name, result)
        for name, result in zip(node.outputs, outputs, strict=False)
        if result is not None
    )


def _lowering(node: Node) -> Callable[..., Any]:
    found = LOWERINGS.get(node.kind)
    if found is None:
        near = nearest(node.kind, LOWERINGS)
        raise CannotLowerError(f"there is no {node.kind} among the operations taken", near)
    return found


def refuse_unknown(graph: TensorGraph, batch: Any) -> None:
    """Run the graph on shapes alone, and refuse all operations that cannot be taken, together.

    Raises:
        UnsupportedOpError: with a refusal for each of them.
    """
    held, leaves = _held(GraphModule(graph, {})), flatten_batch(batch)
    constants = _constants(graph).items()
    values: dict[str, Operand] = {
        **{name: c.to("meta") if isinstance(c, torch.Tensor) else c for name, c in constants},
        **{tensor: held[name] for tensor, name in graph.reads.items() if name in held},
        **{t: leaves[path].to("meta") for t, path in graph.inputs.items()},
    }
    refusals: list[Refusal] = []
    with torch.device("meta"), torch.no_grad():
        for node in graph.nodes:
            try:
                _check(node, values)
            except CannotLowerError as error:
                refusals.append(_refusal(node, error))
                _pretend(node, values)
    if refusals:
        raise UnsupportedOpError(
            f"{len(refusals)} of {len(graph.nodes)} operations cannot be taken\n"
            + refusals_text(refusals),
            refusals=tuple(refusals),
        )


def _held(module: nn.Module) -> dict[str, torch.Tensor]:
    """Weights and buffers by name."""
    return dict([*module.named_parameters(), *module.named_buffers()])


def _check(node: Node, values: dict[str, Operand]) -> None:
    read = [name for name in node.outputs if name not in values]
    if any(shape is None for shape in node.shapes[:1]):
        raise CannotLowerError(
            "the shape of its result depends on the batch's values",
            "operations whose shapes are known when the model is built",
        )
    try:
        _run(node, values)
    except CannotLowerError:
        raise
    except Exception as error:
        raise CannotLowerError(
            f"it is not taken in this form ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error
    for name, shape in zip(read, node.shapes, strict=False):
        result = values.get(name)
        if result is not None and tuple(result.shape) != shape:
            raise CannotLowerError(
                f"its result has the shape {tuple(result.shape)}, TensorFlow's {shape}"
            )


def _pretend(node: Node, values: dict[str, Operand]) -> None:
    """Go on as if the operation had been taken, so that the next ones are checked too."""
    types = {tensor.name: tensor.dtype.name for tensor in node.operation.outputs}
    for name, shape in zip(node.outputs, node.shapes, strict=True):
        dtype = DTYPES.get(types[name], torch.float32)
        values[name] = torch.empty(shape or (), dtype=dtype, device="meta")


def _refusal(node: Node, error: CannotLowerError) -> Refusal:
    shapes = ", ".join(
        "unknown" if shape is None else "×".join(map(str, shape)) or "scalar"
        for shape in node.shapes
    )
    return Refusal(
        node=node.name,
        op=f"tf.{node.kind}",
        tensors=f"→ {shapes}" if shapes else "",
        site=node.site,
        reason=error.reason,
        nearest="",
        suggestion=error.suggestion,
    )
