"""A Program as a list of layers that can be run one at a time.

Decides how values travel between layers: what a layer reads, what it leaves for later layers, when
a value is no longer needed, and which random draws are its own. Does not decide the order in which
microbatches and layers are visited, nor where weights are: that is what the two executors are for.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from openwafer.errors import DataError
from openwafer.graph.program import Program, Site, site_of, tensor_specs
from openwafer.plan.layers import Layer
from openwafer.runtime.forms.inductor import LayerCompiler, chosen_compiler, compiled_functions
from openwafer.runtime.forms.replacements import Forms
from openwafer.runtime.forms.tuning import measured_block
from openwafer.runtime.lower import LayerFunctions, cut_joint_graph
from openwafer.runtime.randomness import DrawKey
from openwafer.runtime.trace import LayerTracer, TensorFact

__all__ = [
    "CompiledLayer",
    "CompiledModel",
    "Gradients",
    "StreamedWeight",
    "Values",
    "compile_layers",
]

_log = logging.getLogger("openwafer")

Values = dict[str, torch.Tensor]
"""Node name → tensor: what one microbatch has computed so far and still needs."""

Gradients = dict[str, torch.Tensor]
"""Node name → gradient of the loss by that node, for one microbatch."""


@dataclass(frozen=True, slots=True)
class StreamedWeight:
    """A weight as a layer takes it: its state_dict name, and the dtype of the copy.

    16 bits where all that the layer does with it is mixed precision's cast, else its own dtype. The
    gradient comes back in the same dtype, and is summed in that of the weight.
    """

    name: str
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledLayer:
    """A layer with its functions.

    streamed: the weights it takes, in the order of `layer.parameters`.
    first_draw: ordinal of its first random draw.
    spent: values that no later layer reads, so they go once this layer has run forward.
    buffer_updates: (output node, buffer node) pairs that it writes.
    site: where in the user's code it begins, for messages.
    """

    layer: Layer
    functions: LayerFunctions
    streamed: tuple[StreamedWeight, ...]
    first_draw: int
    spent: tuple[str, ...]
    buffer_updates: tuple[tuple[str, str], ...]
    site: Site

    def forward(
        self,
        key: DrawKey,
        weights: Sequence[torch.Tensor],
        buffers: dict[str, torch.Tensor],
        values: Values,
    ) -> Sequence[torch.Tensor]:
        """Run forward on one microbatch; gives what backward needs. Changes `values`, `buffers`."""
        inputs = [buffers[name] for name in self.layer.buffers]
        inputs += [values[name] for name in self.layer.inputs]
        outputs, saved = self.functions.forward(key.at(self.first_draw), weights, inputs)
        values.update(zip(self.layer.outputs, outputs, strict=True))
        for output, buffer in self.buffer_updates:
            buffers[buffer] = values[output]
        for name in self.spent:
            values.pop(name, None)
        return saved

    def backward(
        self,
        weights: Sequence[torch.Tensor],
        saved: Sequence[torch.Tensor],
        gradients: Gradients,
    ) -> Sequence[torch.Tensor | None]:
        """Run backward on one microbatch; gives the weights' gradients. Changes `gradients`."""
        grad_outputs = self.take_gradients(gradients)
        grad_weights, grad_inputs = self.functions.backward(weights, saved, grad_outputs)
        self.give_gradients(gradients, grad_inputs)
        return grad_weights

    def take_gradients(self, gradients: Gradients) -> list[torch.Tensor]:
        """Those of its outputs that its backward pass reads, out of `gradients`."""
        return [
            gradients.pop(name)
            for name, wanted in zip(self.layer.outputs, self.functions.grad_outputs, strict=True)
            if wanted
        ]

    def give_gradients(
        self, gradients: Gradients, grad_inputs: Sequence[torch.Tensor | None]
    ) -> None:
        """Add those of its inputs to `gradients`."""
        for name, grad in zip([*self.layer.buffers, *self.layer.inputs], grad_inputs, strict=True):
            if grad is not None:
                gradients[name] = gradients[name] + grad if name in gradients else grad


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledModel:
    """A Program ready to be run by an executor."""

    program: Program
    layers: tuple[CompiledLayer, ...]

    def feed(self, batch_leaves: Mapping[str, Any], device: torch.device) -> Values:
        """The batch's tensors by node name, on the device.

        Raises:
            DataError: the batch has other entries or shapes than the example it was compiled for.
        """
        values: Values = {}
        for entry in self.program.inputs:
            value = batch_leaves.get(entry.path)
            if not isinstance(value, torch.Tensor):
                raise DataError(
                    f"the batch has no tensor at {entry.path}",
                    allowed=f"the entries of the first batch: {', '.join(self._paths())}",
                    hint="let the data loader yield the same structure every time",
                )
            if tuple(value.shape) != entry.spec.shape:
                raise DataError(
                    f"batch entry {entry.path} has shape {tuple(value.shape)}",
                    allowed=f"{entry.spec.shape}, the shape that the model was compiled for",
                    hint="drop the incomplete last batch (drop_last=True) and pad to one length",
                )
            if value.dtype != entry.spec.torch_dtype:
                raise DataError(
                    f"batch entry {entry.path} is of type {_dtype_name(value)}",
                    allowed=f"{entry.spec.dtype}, as in the first batch",
                    hint="convert it where the batch is made: every batch needs the same types",
                )
            values[entry.node] = value.detach().to(device)
        return values

    @property
    def changing_buffers(self) -> list[str]:
        """Names of buffers that a step changes: batch statistics, which follow one microbatch after
        another, so that replicas cannot share them."""
        changed = {node for compiled in self.layers for _, node in compiled.buffer_updates}
        return [buffer.name for buffer in self.program.buffers if buffer.node in changed]

    @property
    def late_buffers(self) -> list[str]:
        """Names of buffers that one layer reads and a later layer gives the next value of."""
        read: dict[str, int] = {}
        late: set[str] = set()
        for index, compiled in enumerate(self.layers):
            for node in compiled.layer.buffers:
                read.setdefault(node, index)
            late |= {node for _, node in compiled.buffer_updates if read.get(node, index) != index}
        return [buffer.name for buffer in self.program.buffers if buffer.node in late]

    def _paths(self) -> list[str]:
        return [entry.path for entry in self.program.inputs]

    def seed_gradients(self, values: Mapping[str, torch.Tensor], scale: float) -> Gradients:
        """The gradient to begin backward with: `scale` for the loss."""
        loss = self.program.loss
        # Asked once per microbatch: the first trained weight answers, the whole set is not needed.
        trains = any(any(compiled.functions.grad_weights) for compiled in self.layers)
        return {loss: torch.full_like(values[loss], scale)} if trains else {}

    @property
    def trained(self) -> frozenset[str]:
        """Names of the weights that a gradient of the loss reaches."""
        return frozenset(
            name
            for compiled in self.layers
            for name, given in zip(
                compiled.layer.parameters, compiled.functions.grad_weights, strict=True
            )
            if given
        )

    def metric_values(
        self, values: Mapping[str, torch.Tensor]
    ) -> dict[str, list[tuple[torch.Tensor, ...]]]:
        """Per metric, the tensors for its host part, once for each time the model called it."""
        found: dict[str, list[tuple[torch.Tensor, ...]]] = {}
        for output in self.program.metrics:
            found.setdefault(output.metric, []).append(tuple(values[n] for n in output.nodes))
        return found


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def compile_layers(
    program: Program,
    layers: Sequence[Layer],
    *,
    device: torch.device | None = None,
    layer_compiler: LayerCompiler = "eager",
) -> CompiledModel:
    """Lower each distinct structure once and link the layers.

    Args:
        device: where the functions will run; the CPU if None.
        layer_compiler: how: as they are (`eager`), by TorchInductor, or `auto`.

    Raises:
        PlanError: `inductor` was asked for and there is nothing to compile with.
    """
    device = device or torch.device("cpu")
    compiler = chosen_compiler(
        layer_compiler, device=device, activation_bytes=_activation_bytes(program)
    )
    forms = None
    if compiler != "eager":
        _log.info("TorchInductor compiles each kind of layer when it first runs")
        # The forms were measured on CPUs alone; a GPU keeps torch's kernels.
        forms = Forms(program, measured_block) if device.type == "cpu" else None
    tracer = LayerTracer(program, device=device, forms=forms)
    functions = _lower_all(program, layers, tracer, compiler)
    return CompiledModel(program=program, layers=_linked(program, layers, functions))


def _linked(
    program: Program, layers: Sequence[Layer], functions: Sequence[LayerFunctions]
) -> tuple[CompiledLayer, ...]:
    """Each layer with its functions, knowing what comes before and after it."""
    nodes = {node.name: node for node in program.graph.nodes}
    keep = {program.loss, *(n for metric in program.metrics for n in metric.nodes)}
    last_reader = {name: layer.name for layer in layers for name in layer.inputs}
    updates = {b.update: b.node for b in program.buffers if b.update}
    compiled: list[CompiledLayer] = []
    first_draw = 0
    for layer, lowered in zip(layers, functions, strict=True):
        candidates = (*layer.inputs, *layer.outputs)
        compiled.append(
            CompiledLayer(
                layer=layer,
                functions=lowered,
                streamed=tuple(
                    StreamedWeight(name, fact.dtype)
                    for name, fact in zip(layer.parameters, lowered.arguments, strict=False)
                ),
                first_draw=first_draw,
                spent=tuple(
                    name
                    for name in candidates
                    if name not in keep and last_reader.get(name, layer.name) == layer.name
                ),
                buffer_updates=tuple((n, updates[n]) for n in layer.outputs if n in updates),
                site=site_of(nodes[layer.nodes[0]]),
            )
        )
        first_draw += lowered.num_draws
    return tuple(compiled)


def _lower_all(
    program: Program, layers: Sequence[Layer], tracer: LayerTracer, compiler: LayerCompiler
) -> list[LayerFunctions]:
    """The layers' functions, by what is true of their arguments and gradients.

    What a layer's outputs are like is found from first to last; which of them the loss depends on,
    from last to first. Copies share their functions where both agree.
    """
    facts = _argument_facts(program)
    outputs_of: dict[Any, list[TensorFact]] = {}
    traces: list[tuple[tuple[TensorFact, ...], list[TensorFact]]] = []
    for layer in layers:
        dtypes = tracer.streamed_dtypes(layer)
        arguments = tuple(
            replace(facts[name], dtype=dtypes.get(name, facts[name].dtype))
            for name in tracer.arguments(layer)
        )
        key = (tracer.structure(layer), arguments)
        if key not in outputs_of:
            outputs_of[key] = tracer.outputs(layer, arguments)
        facts.update(zip(layer.outputs, outputs_of[key], strict=True))
        traces.append((arguments, outputs_of[key]))
    lowered: dict[Any, LayerFunctions] = {}
    functions: list[LayerFunctions] = []
    reached = {program.loss} if program.training else set[str]()
    for layer, (arguments, outputs) in zip(reversed(layers), reversed(traces), strict=True):
        heads = tuple(
            name in reached and fact.requires_grad
            for name, fact in zip(layer.outputs, outputs, strict=True)
        )
        key = (tracer.structure(layer), arguments, heads)
        if key not in lowered:
            joint = tracer.joint(layer, arguments, outputs, heads)
            cut = cut_joint_graph(joint, len(layer.parameters), arguments, heads)
            lowered[key] = cut
            if compiler != "eager":
                required = compiler == "inductor"
                lowered[key] = compiled_functions(cut, name=layer.name, required=required)
        functions.append(lowered[key])
        inputs = zip((*layer.buffers, *layer.inputs), lowered[key].grad_inputs, strict=True)
        reached.update(name for name, given in inputs if given)
    return functions[::-1]


def _activation_bytes(program: Program) -> int:
    """Size of all results of a program's operations, for one microbatch."""
    specs = (spec for node in program.operations for spec in tensor_specs(node.meta.get("val")))
    return sum(spec.num_bytes for spec in specs)


def _argument_facts(program: Program) -> dict[str, TensorFact]:
    """Facts of weights, buffers and batch entries, by node."""
    trainable = {p.node for p in program.parameters if p.trainable and program.training}
    return {
        node.name: TensorFact.of(node.meta["val"], requires_grad=node.name in trainable).dense()
        for node in program.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor)
    }
