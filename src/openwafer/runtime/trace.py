"""A layer of the Program as a function, and the traces of it.

Decides what is known of a layer's arguments before anything runs (dtypes under mixed precision,
strides, where gradients flow), and makes the joint forward-backward graph for exactly those.
Does not decide what is kept between the two passes: that is lower.py.

The joint graph comes from torch's own tracer (`make_fx` over `torch.autograd.grad`), functional
and below autograd and autocast, so it holds exactly the kernels that eager PyTorch would call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from openwafer.errors import PlanError
from openwafer.graph.program import Program, site_of
from openwafer.plan.layers import Layer
from openwafer.runtime.forms.replacements import Forms

__all__ = ["JointGraph", "LayerTracer", "TensorFact"]

_NO_DERIVATIVE = re.compile(r"derivative for '?(?:aten::)?(\w+)'? is not implemented")

_DETACHED_LIKE = (torch.ops.aten.randint_like.default, torch.ops.aten.randint_like.low_dtype)
"""torch.randint_like takes nothing of its argument but the shape; the operation below it, asked for
a gradient, has none to give."""


@dataclass(frozen=True, slots=True)
class TensorFact:
    """What a trace depends on in a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...]
    requires_grad: bool

    @classmethod
    def of(cls, tensor: torch.Tensor, *, requires_grad: bool) -> TensorFact:
        return cls(tuple(tensor.shape), tensor.dtype, tuple(tensor.stride()), requires_grad)

    @property
    def is_dense(self) -> bool:
        """Whether every element has a place of its own and none is left over."""
        return self.dense().strides == self.strides

    def dense(self) -> TensorFact:
        """The same with strides that are dense: its own where they are, else row by row."""
        like = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")
        strides = tuple(torch.empty_like(like).stride())
        return replace(self, strides=strides)


@dataclass(frozen=True, slots=True)
class JointGraph:
    """Placeholders: weights, inputs, gradients of the `heads`. Results: outputs, then gradients
    of weights and inputs (None where there is none)."""

    graph: fx.Graph
    num_arguments: int
    num_outputs: int
    tangents: tuple[TensorFact, ...]


class LayerTracer:
    """Traces layers of one Program; shapes, dtypes and strides alone, nothing is computed.

    Args:
        forms: other forms of some operations, for layers that will be compiled.
    """

    def __init__(
        self, program: Program, *, device: torch.device, forms: Forms | None = None
    ) -> None:
        self._nodes = {node.name: node for node in program.graph.nodes}
        self._node_of = {parameter.name: parameter.node for parameter in program.parameters}
        self._device = device
        self._forms = forms
        self._fake_mode = FakeTensorMode()

    def arguments(self, layer: Layer) -> list[str]:
        """Nodes that the layer's function takes: weights, buffers, inputs."""
        weights = [self._node_of[name] for name in layer.parameters]
        return [*weights, *layer.buffers, *layer.inputs]

    def streamed_dtypes(self, layer: Layer) -> dict[str, torch.dtype]:
        """Weight nodes that the layer reads through one 16-bit cast alone, with its dtype.

        The layer's function takes such a weight cast already. Autocast casts a weight once, so
        that the gradients of several uses are summed in 16 bits: a weight with several casts keeps
        them.
        """
        return {
            node: users[0].kwargs["dtype"]  # pyright: ignore[reportReturnType]
            for node in self.arguments(layer)[: len(layer.parameters)]
            if len(users := self._users_in(layer, node)) == 1 and _is_cast_to_16_bits(users[0])
        }

    def structure(self, layer: Layer) -> tuple[Any, ...]:
        """What copies that share their functions agree on, besides facts of their arguments."""
        return (layer.structure, self._forms.fingerprint(layer) if self._forms else ())

    def _users_in(self, layer: Layer, node: str) -> list[fx.Node]:
        return [user for user in self._nodes[node].users if user.name in layer.nodes]

    def outputs(self, layer: Layer, arguments: Sequence[TensorFact]) -> list[TensorFact]:
        """What the layer's outputs are like for such arguments."""
        run = self._callable(layer)
        with self._fake_mode, torch.enable_grad():
            outputs = self._forward(run, [self._fake(fact) for fact in arguments], arguments)[1]
        return [TensorFact.of(value, requires_grad=value.requires_grad) for value in outputs]

    def joint(
        self,
        layer: Layer,
        arguments: Sequence[TensorFact],
        outputs: Sequence[TensorFact],
        heads: Sequence[bool],
    ) -> JointGraph:
        """The joint graph, with gradients coming in for the outputs marked in `heads`.

        Gradients come in dense: whoever calls the backward pass sees to that.
        """
        run = self._callable(layer)

        def joint(values: list[torch.Tensor], tangents: list[torch.Tensor]) -> list[Any]:
            with torch.enable_grad():
                leaves, results = self._forward(run, values, arguments)
                roots = [leaf for leaf in leaves if leaf.requires_grad]
                chosen = [result for result, head in zip(results, heads, strict=True) if head]
                grads = (
                    torch.autograd.grad(chosen, roots, tangents, allow_unused=True)
                    if chosen
                    else [None] * len(roots)
                )
            found = iter(grads)
            all_grads = [next(found) if leaf.requires_grad else None for leaf in leaves]
            return [*(result.detach() for result in results), *all_grads]

        incoming = [fact.dense() for fact, head in zip(outputs, heads, strict=True) if head]
        with self._fake_mode, torch.no_grad():
            values = [self._fake(fact) for fact in arguments]
            tangents = [self._fake(fact) for fact in incoming]
            try:
                module = make_fx(joint)(values, tangents)
            except RuntimeError as error:
                raise self._explained(layer, error) from error
            if any(_mutates(node) for node in module.graph.nodes):
                # Some composites (attention's dropout on CPU) work in place inside.
                module = make_fx(functionalize(module, remove="mutations"))(values, tangents)
        return JointGraph(module.graph, len(arguments), len(outputs), tuple(incoming))

    def _explained(self, layer: Layer, error: RuntimeError) -> Exception:
        """What a failure of the backward pass means for the user; the error itself if unknown."""
        found = _NO_DERIVATIVE.search(str(error))
        if found is None:
            return error
        op = found[1]
        nodes = [self._nodes[name] for name in layer.nodes]
        guilty = [node for node in nodes if str(node.target).startswith(f"aten.{op.rstrip('_')}")]
        return PlanError(
            f"`aten.{op}` has no derivative, and a gradient would pass through it",
            where=str(site_of(guilty[0] if guilty else nodes[0])),
            allowed="operations with a derivative between the weights and the loss",
            hint="stop the gradient before it: x.detach()",
        )

    def _fake(self, fact: TensorFact) -> torch.Tensor:
        return torch.empty_strided(fact.shape, fact.strides, dtype=fact.dtype, device=self._device)

    def _forward(
        self,
        run: Callable[..., list[torch.Tensor]],
        values: Sequence[torch.Tensor],
        facts: Sequence[TensorFact],
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The leaves that gradients are asked for, and the results."""
        leaves = [
            value.detach().requires_grad_(fact.requires_grad)
            for value, fact in zip(values, facts, strict=True)
        ]
        return leaves, list(run(*leaves))

    def _callable(self, layer: Layer) -> Callable[..., list[torch.Tensor]]:
        """The layer's operations as a function of its weights, buffers and inputs."""
        graph = fx.Graph()
        environment: dict[fx.Node, fx.Node] = {}
        for name in self.arguments(layer):
            environment[self._nodes[name]] = graph.placeholder(name)
        cast = {
            user: environment[self._nodes[name]]
            for name in self.streamed_dtypes(layer)
            for user in self._users_in(layer, name)
        }
        replaced = self._forms.of(layer) if self._forms else {}
        absorbed = {node for replacement in replaced.values() for node in replacement.absorbed}
        for name in layer.nodes:
            source = self._nodes[name]
            if source in absorbed:
                continue
            if source in cast:
                environment[source] = cast[source]
                continue
            if source in replaced:
                given = [None if a is None else environment[a] for a in replaced[source].arguments]
                environment[source] = graph.call_function(replaced[source].function, tuple(given))
                continue
            copied = graph.node_copy(source, lambda n: environment[n])
            if copied.target is torch.ops.aten.view.default:
                # Whether a view needs a copy first was decided for the capture's kernels. Here
                # gradients flow and attention, say, may give another memory layout.
                copied.target = torch.ops.aten.reshape.default
            if copied.target in _DETACHED_LIKE:
                with graph.inserting_before(copied):
                    still = graph.call_function(torch.ops.aten.detach.default, (copied.args[0],))
                copied.args = (still, *copied.args[1:])
            if isinstance(copied.kwargs.get("device"), torch.device):
                copied.kwargs = {**copied.kwargs, "device": self._device}
            environment[source] = copied
        graph.output([environment[self._nodes[name]] for name in layer.outputs])
        return fx.GraphModule({}, graph)


def _is_cast_to_16_bits(node: fx.Node) -> bool:
    return (
        node.target is torch.ops.aten._to_copy.default
        and list(node.kwargs) == ["dtype"]
        and node.kwargs["dtype"] in (torch.bfloat16, torch.float16)
    )


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
