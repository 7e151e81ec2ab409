"""From a PyTorch model to a Program.

Decides how the user's code is called, what its batch entries, weights, buffers, loss and metrics
are in the graph, and where each operation comes from. Does not decide how the graph is traced
(export.py), nor what is supported: that is the kernels' business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from openwafer.errors import CaptureError
from openwafer.frontends.torch.blame import definition_of, user_line_of_node
from openwafer.frontends.torch.export import Step, export_step
from openwafer.frontends.torch.functional import FunctionalStep
from openwafer.frontends.torch.metrics import CBMetric, capture_metrics
from openwafer.graph.program import (
    Buffer,
    GraphInput,
    MetricOutput,
    Parameter,
    Program,
    Site,
    TensorSpec,
)

__all__ = ["Captured", "capture_module", "capture_step", "extract_loss", "flatten_batch"]

_log = logging.getLogger("openwafer")


def extract_loss(outputs: Any) -> torch.Tensor:
    """The loss in what a model returned: the tensor itself, `.loss`, `["loss"]`, or the first item.

    Raises:
        CaptureError: there is none, or it is not a floating-point scalar.
    """
    loss: Any = outputs
    if not isinstance(loss, torch.Tensor):
        if isinstance(outputs, Mapping) and "loss" in outputs:
            loss = outputs["loss"]
        elif getattr(outputs, "loss", None) is not None:
            loss = getattr(outputs, "loss", None)
        elif isinstance(outputs, (tuple, list)) and outputs:
            loss = outputs[0]
    if not isinstance(loss, torch.Tensor):
        raise CaptureError(
            f"the model returned {type(outputs).__name__}, in which there is no loss",
            allowed='a scalar tensor, or an output with `.loss`, ["loss"], or the loss first',
            hint="return the loss from the model's call, e.g. by giving it the labels too",
        )
    if not loss.is_floating_point():
        raise CaptureError(
            f"the loss is of type {str(loss.dtype).removeprefix('torch.')}",
            allowed="a floating-point scalar",
            hint="return the loss first, then logits or predictions",
        )
    if loss.numel() != 1:
        raise CaptureError(
            f"the loss has shape {tuple(loss.shape)}",
            allowed="a scalar",
            hint='reduce it with .mean(), or use reduction="mean" in the loss function',
        )
    return loss


def flatten_batch(batch: Any) -> dict[str, Any]:
    """A batch as `{path: leaf}`, paths as `[0]` or `['input_ids']`, in a fixed order."""
    leaves, _ = pytree.tree_flatten_with_path(batch)
    return {pytree.keystr(path): leaf for path, leaf in leaves}


class Captured:
    """A Program with the metrics whose outputs it carries."""

    def __init__(self, program: Program, metrics: Mapping[str, CBMetric]) -> None:
        self.program = program
        self.metrics = dict(metrics)


class _Step(Step):
    """One call of the user's code as the module to export: a batch in, loss and metrics out."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        call: Callable[[Any], Any],
        outputs: list[Any],
        defined_at: str,
    ) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        # In tuples, so that nn.Module registers neither the user's object nor its modules again.
        self._call = (call,)
        self._metric_calls = (outputs,)
        self._defined_at = defined_at

    def run(self, batch: Any) -> list[torch.Tensor]:
        with capture_metrics() as calls:
            outputs = self._call[0](batch)
        try:
            loss = extract_loss(outputs)
        except CaptureError as error:
            error.where = self._defined_at
            raise
        self._metric_calls[0][:] = [(metric, len(tensors)) for metric, tensors in calls]
        held = {id(tensor) for tensor in [*self.parameters(), *self.buffers()]}
        # A metric of a weight gets a copy, since only what is computed leaves the graph.
        wanted = [t.clone() if id(t) in held else t for _, tensors in calls for t in tensors]
        return [loss if loss.dim() == 0 else loss.reshape(()), *wanted]


def capture_module(
    model: nn.Module,
    batch: Any,
    *,
    training: bool = True,
    autocast_dtype: torch.dtype | None = None,
) -> Captured:
    """Capture any `nn.Module`: `model(**batch)` for a dict, `model(*batch)` for a tuple or list,
    `model(batch)` otherwise. The loss is found by `extract_loss`.

    Raises:
        CaptureError: the model cannot be captured; says the user's line, why, and a way out.
    """
    given: Any = model
    if not isinstance(given, nn.Module):
        name = getattr(given, "__qualname__", type(given).__qualname__)
        raise CaptureError(
            f"{name} is no nn.Module" + (", but a class" if isinstance(given, type) else ""),
            allowed="an instance of a class that derives from torch.nn.Module",
        )

    def call(data: Any) -> Any:
        if isinstance(data, Mapping):
            return model(**data)
        if isinstance(data, (tuple, list)):
            return model(*data)
        return model(data)

    return capture_step(
        {"model": model},
        call,
        batch,
        training=training,
        name=type(model).__name__,
        autocast_dtype=autocast_dtype,
        defined_at=definition_of(model),
    )


def capture_step(
    modules: Mapping[str, nn.Module],
    call: Callable[[Any], Any],
    batch: Any,
    *,
    training: bool,
    name: str,
    autocast_dtype: torch.dtype | None = None,
    defined_at: str = "",
) -> Captured:
    """Capture `call(batch)`, which may use `modules` (the first one is the model proper).

    Args:
        modules: every module that `call` runs; state_dict names of the first are kept as they are,
            those of the others get the key as a prefix.
        batch: an example batch; only shapes and dtypes count, but for entries that are not tensors.
            Its leading dimension is the number of samples that all shapes of the Program are for.
        training: capture with dropout and batch statistics on, or in evaluation mode.
        autocast_dtype: capture what runs under torch.autocast in this dtype, with its casts as
            operations. Code that asks for a tensor's dtype is only then captured as it runs.
        defined_at: `file:line` to blame for what is returned; found from `call` if empty.

    Raises:
        CaptureError: see `capture_module`.
    """
    metric_calls: list[tuple[CBMetric, int]] = []
    defined_at = defined_at or definition_of(call)
    step = _Step(modules, call, metric_calls, defined_at)
    was_training = [(module, module.training) for module in step.modules()]
    step.train(training)
    try:
        exported = export_step(step, batch, training=training, autocast_dtype=autocast_dtype)
    finally:
        for module, mode in was_training:
            module.training = mode
    if not _loss_is_computed(exported):
        raise CaptureError(
            "the loss is not computed: it is an input, a weight or a constant",
            where=defined_at,
            allowed="a loss that the model computes from the batch",
        )
    program = _to_program(exported, batch, metric_calls, next(iter(modules)), training, name)
    return Captured(program, {metric.name: metric for metric, _ in metric_calls})


def _loss_is_computed(exported: FunctionalStep) -> bool:
    loss = str(next(iter(exported.signature.user_outputs)))
    return any(n.name == loss and n.op == "call_function" for n in exported.graph.nodes)


def _to_program(
    exported: FunctionalStep,
    batch: Any,
    metric_calls: list[tuple[CBMetric, int]],
    model_key: str,
    training: bool,
    name: str,
) -> Program:
    graph = exported.graph
    nodes = {node.name: node for node in graph.nodes}
    for node in graph.nodes:
        node.meta["site"] = _site(node, model_key)
    _refuse_mutation(exported, nodes)
    outputs = [str(name) for name in exported.signature.user_outputs]
    metrics: list[MetricOutput] = []
    position = 1
    for metric, count in metric_calls:
        metrics.append(
            MetricOutput(metric=metric.name, nodes=tuple(outputs[position : position + count]))
        )
        position += count
    _forget_notes(graph)
    inputs = _inputs(exported, batch)
    parameters, foreign = _parameters(exported, nodes, model_key)
    return Program(
        graph=graph,
        parameters=parameters,
        buffers=(*_buffers(exported, nodes, model_key, training), *foreign),
        inputs=inputs,
        loss=outputs[0],
        metrics=tuple(metrics),
        training=training,
        num_samples=next((i.spec.shape[0] for i in inputs if i.spec.shape), 1),
        model_name=name,
    )


def _forget_notes(graph: fx.Graph) -> None:
    """What torch noted of each operation for itself (stack traces, copies of copies) takes more
    memory than the graph."""
    for node in graph.nodes:
        node.meta = {key: node.meta[key] for key in ("val", "site") if key in node.meta}


def _user_name(target: str, model_key: str) -> str:
    """The state_dict name the user knows: without the wrapper's prefix for the model proper."""
    return target.removeprefix(f"{model_key}.")


def _parameters(
    exported: FunctionalStep, nodes: Mapping[str, fx.Node], model_key: str
) -> tuple[tuple[Parameter, ...], tuple[Buffer, ...]]:
    """Distinct parameters of the model in its order, tied ones once, with the other names as
    aliases; and those of other modules, which nothing trains, as buffers."""
    prefix = f"{model_key}."
    by_tensor: dict[int, list[tuple[str, fx.Node]]] = {}
    for node_name, target in exported.signature.inputs_to_parameters.items():
        tensor = exported.state_dict[target]
        by_tensor.setdefault(id(tensor), []).append((target, nodes[node_name]))
    parameters: list[Parameter] = []
    foreign: list[Buffer] = []
    for entries in by_tensor.values():
        used = next((node for _, node in entries if node.users), entries[0][1])
        for _, node in entries:
            if node is not used:
                node.replace_all_uses_with(used)
        tensor = exported.state_dict[entries[0][0]]
        spec = TensorSpec.of(tensor)
        names = [target.removeprefix(prefix) for target, _ in entries if target.startswith(prefix)]
        if not names:
            foreign.append(Buffer(name=entries[0][0], node=used.name, spec=spec, persistent=False))
            if tensor.requires_grad:
                _log.warning("weight %s is not in the model itself: not trained", entries[0][0])
            continue
        parameters.append(
            Parameter(
                name=names[0],
                node=used.name,
                spec=spec,
                trainable=bool(tensor.requires_grad),
                aliases=tuple(names[1:]),
            )
        )
    return tuple(parameters), tuple(foreign)


def _buffers(
    exported: FunctionalStep,
    nodes: Mapping[str, fx.Node],
    model_key: str,
    training: bool,
) -> tuple[Buffer, ...]:
    signature = exported.signature
    updates = {target: node for node, target in signature.buffers_to_mutate.items()}
    buffers = [
        Buffer(
            name=_user_name(target, model_key),
            node=node,
            spec=TensorSpec.of(nodes[node].meta["val"]),
            persistent=(
                target not in signature.non_persistent_buffers
                and target.startswith(f"{model_key}.")
            ),
            update=updates.get(target),
        )
        for node, target in signature.inputs_to_buffers.items()
    ]
    constants = [
        _constant(nodes[node], exported.constants[target], training)
        for node, target in signature.inputs_to_lifted_tensor_constants.items()
    ]
    return (*buffers, *constants)


def _constant(node: fx.Node, value: Any, training: bool) -> Buffer:
    """A tensor that the model's code made itself. The name of its node tells the two forms of a
    model apart, since each form has constants of its own."""
    node._rename(  # pyright: ignore[reportPrivateUsage]
        f"{'train' if training else 'eval'}_{node.name}"
    )
    return Buffer(
        name="", node=node.name, spec=TensorSpec.of(value), persistent=False, value=value.detach()
    )


def _inputs(exported: FunctionalStep, batch: Any) -> tuple[GraphInput, ...]:
    """Batch entries in pytree order; entries that are not tensors were burnt in as constants."""
    names = list(exported.signature.user_inputs)
    leaves = flatten_batch(batch)
    fixed = [path for path, leaf in leaves.items() if isinstance(leaf, (int, float, complex))]
    if fixed:
        _log.warning(
            "batch entries %s are numbers, not tensors: the first batch's are used in every step",
            ", ".join(fixed),
        )
    return tuple(
        GraphInput(path=path, node=str(name), spec=TensorSpec.of(leaf))
        for (path, leaf), name in zip(leaves.items(), names, strict=True)
        if isinstance(leaf, torch.Tensor)
    )


def _refuse_mutation(exported: FunctionalStep, nodes: Mapping[str, fx.Node]) -> None:
    signature = exported.signature
    for what, mutated, hint in (
        (
            "its input",
            signature.user_inputs_to_mutate,
            "work on a copy: x = x.clone(), or use the operation without the trailing underscore",
        ),
        (
            "its weight",
            signature.parameters_to_mutate,
            "compute with a changed copy, e.g. weight.clamp(-1, 1), or keep it in a buffer",
        ),
    ):
        for node_name, target in mutated.items():
            file, line = user_line_of_node(nodes[node_name])
            raise CaptureError(
                f"the model changes {what} {target} in place",
                where=f"{file}:{line}" if file else "",
                allowed="inputs and weights that the forward pass only reads",
                hint=hint,
            )


def _site(node: fx.Node, model_key: str) -> Site:
    stack = node.meta.get("nn_module_stack") or {}
    module, module_type = "", ""
    for entry in stack.values():
        module, kind = entry
        module_type = kind if isinstance(kind, str) else kind.__qualname__
    file, line = user_line_of_node(node)
    module = _user_name(module, model_key) if module != model_key else ""
    return Site(module=module, module_type=module_type.rsplit(".", 1)[-1], file=file, line=line)
