"""From a PyTorch model to a Program.

Decides how a model is traced (`torch.export`, non-strict, functional ATen), how the user's lines
and module paths are kept, and how a model that cannot be captured is explained. Does not decide
what is supported: that is the kernels' business.
"""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import fx, nn
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree

from openwafer.errors import CaptureError
from openwafer.frontends.torch.blame import (
    USER_LINE,
    UserLines,
    explain_export_failure,
    innermost_user_line,
)
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


def extract_loss(outputs: Any) -> torch.Tensor:
    """The loss in what a model returned: the tensor itself, `.loss`, `["loss"]`, or the first item.

    Raises:
        CaptureError: there is none, or it is not a scalar.
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


class _Step(nn.Module):
    """One call of the user's code as the module to export: a batch in, loss and metrics out."""

    def __init__(
        self, modules: Mapping[str, nn.Module], call: Callable[[Any], Any], outputs: list[Any]
    ) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        # In tuples, so that nn.Module registers neither the user's object nor its modules again.
        self._call = (call,)
        self._metric_calls = (outputs,)

    def forward(self, batch: Any) -> list[torch.Tensor]:
        with capture_metrics() as calls:
            loss = extract_loss(self._call[0](batch))
        self._metric_calls[0][:] = [(metric, len(tensors)) for metric, tensors in calls]
        return [loss.reshape(()), *(t for _, tensors in calls for t in tensors)]


def capture_module(model: nn.Module, batch: Any, *, training: bool = True) -> Captured:
    """Capture any `nn.Module`: `model(**batch)` for a dict, `model(*batch)` for a tuple or list,
    `model(batch)` otherwise. The loss is found by `extract_loss`.

    Raises:
        CaptureError: the model cannot be captured; says the user's line, why, and a way out.
    """

    def call(data: Any) -> Any:
        if isinstance(data, Mapping):
            return model(**data)
        if isinstance(data, (tuple, list)):
            return model(*data)
        return model(data)

    return capture_step({"model": model}, call, batch, training=training, name=type(model).__name__)


def capture_step(
    modules: Mapping[str, nn.Module],
    call: Callable[[Any], Any],
    batch: Any,
    *,
    training: bool,
    name: str,
) -> Captured:
    """Capture `call(batch)`, which may use `modules` (the first one is the model proper).

    Args:
        modules: every module that `call` runs; state_dict names of the first are kept as they are,
            those of the others get the key as a prefix.
        batch: an example batch; only shapes and dtypes count. Its leading dimension is the number
            of samples that all shapes of the Program are for.
        training: capture with dropout and batch statistics on, or in evaluation mode.

    Raises:
        CaptureError: see `capture_module`.
    """
    metric_calls: list[tuple[CBMetric, int]] = []
    step = _Step(modules, call, metric_calls)
    was_training = [module.training for module in step.modules()]
    step.train(training)
    try:
        exported = _export(step, batch)
    finally:
        for module, mode in zip(step.modules(), was_training, strict=True):
            module.training = mode
    program = _to_program(exported, batch, metric_calls, next(iter(modules)), training, name)
    return Captured(program, {metric.name: metric for metric, _ in metric_calls})


def _export(step: nn.Module, batch: Any) -> torch.export.ExportedProgram:
    try:
        with _quiet_export(), preserve_node_meta():
            with UserLines():
                exported = torch.export.export(step, (batch,), strict=False)
            _inline_grad_modes(exported.graph_module)
            # An empty table keeps operations as the user wrote them and makes them functional.
            return exported.run_decompositions({})
    except CaptureError:
        raise
    except Exception as error:
        raise explain_export_failure(error) from error


@contextmanager
def _quiet_export() -> Generator[None]:
    """Keep torch.export's own notices and graph dumps off the terminal: no user can act on them."""
    previous = logging.root.manager.disable
    printed = io.StringIO()
    with warnings.catch_warnings(), redirect_stderr(printed):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(previous)
    # On success, what the user's own code printed; on failure, torch's dump of the graph so far.
    sys.stderr.write(printed.getvalue())


def _to_program(
    exported: torch.export.ExportedProgram,
    batch: Any,
    metric_calls: list[tuple[CBMetric, int]],
    model_key: str,
    training: bool,
    name: str,
) -> Program:
    graph = exported.graph_module.graph
    _drop_assertions(graph)
    for node in graph.nodes:
        node.meta["site"] = _site(node, model_key)
    outputs = _output_nodes(exported)
    _refuse_input_mutation(exported)
    metrics: list[MetricOutput] = []
    position = 1
    for metric, count in metric_calls:
        nodes = tuple(outputs[position : position + count])
        metrics.append(MetricOutput(metric=metric.name, nodes=nodes))
        position += count
    inputs = _inputs(exported, batch)
    return Program(
        graph=graph,
        parameters=_parameters(exported, model_key),
        buffers=_buffers(exported, model_key, training),
        inputs=inputs,
        loss=outputs[0],
        metrics=tuple(metrics),
        training=training,
        num_samples=next((i.spec.shape[0] for i in inputs if i.spec.shape), 1),
        model_name=name,
    )


def _node_named(exported: torch.export.ExportedProgram, name: str) -> fx.Node:
    return next(node for node in exported.graph.nodes if node.name == name)


def _user_name(target: str, model_key: str) -> str:
    """The state_dict name the user knows: without the wrapper's prefix for the model proper."""
    return target.removeprefix(f"{model_key}.")


def _parameters(exported: torch.export.ExportedProgram, model_key: str) -> tuple[Parameter, ...]:
    """Distinct parameters in the model's order; tied ones once, with the other names as aliases."""
    placeholders = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    by_tensor: dict[int, list[tuple[str, fx.Node]]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for node_name, target in exported.graph_signature.inputs_to_parameters.items():
        tensor = exported.state_dict[target]
        tensors[id(tensor)] = tensor
        by_tensor.setdefault(id(tensor), []).append((target, placeholders[node_name]))
    parameters: list[Parameter] = []
    for key, entries in by_tensor.items():
        used = next((node for _, node in entries if node.users), entries[0][1])
        for _, node in entries:
            if node is not used:
                node.replace_all_uses_with(used)
        names = [_user_name(target, model_key) for target, _ in entries]
        tensor = tensors[key]
        parameters.append(
            Parameter(
                name=names[0],
                node=used.name,
                spec=TensorSpec.of(tensor),
                trainable=bool(tensor.requires_grad),
                aliases=tuple(names[1:]),
            )
        )
    return tuple(parameters)


def _buffers(
    exported: torch.export.ExportedProgram, model_key: str, training: bool
) -> tuple[Buffer, ...]:
    signature = exported.graph_signature
    updates = {target: node for node, target in signature.buffers_to_mutate.items()}
    buffers = [
        Buffer(
            name=_user_name(target, model_key),
            node=node,
            spec=TensorSpec.of(_node_named(exported, node).meta["val"]),
            persistent=target not in signature.non_persistent_buffers,
            update=updates.get(target),
        )
        for node, target in signature.inputs_to_buffers.items()
    ]
    constants = [
        _constant(_node_named(exported, node), exported.constants[target], training)
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


def _inputs(exported: torch.export.ExportedProgram, batch: Any) -> tuple[GraphInput, ...]:
    """Batch entries in pytree order; entries that are not tensors were burnt in as constants."""
    names = list(exported.graph_signature.user_inputs)
    leaves = flatten_batch(batch)
    return tuple(
        GraphInput(path=path, node=str(name), spec=TensorSpec.of(leaf))
        for (path, leaf), name in zip(leaves.items(), names, strict=True)
        if isinstance(leaf, torch.Tensor)
    )


def _output_nodes(exported: torch.export.ExportedProgram) -> list[str]:
    return [str(name) for name in exported.graph_signature.user_outputs]


def _refuse_input_mutation(exported: torch.export.ExportedProgram) -> None:
    mutated = exported.graph_signature.user_inputs_to_mutate
    if not mutated:
        return
    node = _node_named(exported, next(iter(mutated)))
    site: Site = node.meta["site"]
    raise CaptureError(
        f"the model changes its input {next(iter(mutated.values()))} in place",
        where=str(site),
        allowed="inputs that are only read",
        hint="work on a copy: x = x.clone(), or use the operation without the trailing underscore",
    )


def _inline_grad_modes(module: fx.GraphModule) -> None:
    """Replace `with torch.no_grad():` regions by their operations and a detach of each result.

    torch.export keeps such a region as a call of a submodule; kernels and layers want plain
    operations, and a detach stops the gradient just as well.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or getattr(node.target, "__name__", "") != (
            "wrap_with_set_grad_enabled"
        ):
            continue
        enabled, target, *arguments = node.args
        region = getattr(module, target.target)
        inner = [n for n in region.graph.nodes if n.op == "placeholder"]
        environment: dict[fx.Node, Any] = dict(zip(inner, arguments, strict=True))
        results: Any = ()
        with graph.inserting_before(node):
            for source in region.graph.nodes:
                if source.op == "output":
                    results = source.args[0]
                elif source.op != "placeholder":
                    environment[source] = graph.node_copy(source, environment.__getitem__)
            outputs = [environment[r] for r in results]
            if not enabled:
                outputs = [_detached(graph, value) for value in outputs]
        for user in list(node.users):
            user.replace_all_uses_with(outputs[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
        if not target.users:
            graph.erase_node(target)


def _drop_assertions(graph: fx.Graph) -> None:
    """Remove checks of static facts, which hold for every batch of the captured shape."""
    for node in reversed(list(graph.nodes)):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)


def _detached(graph: fx.Graph, value: fx.Node) -> fx.Node:
    result = graph.call_function(torch.ops.aten.detach.default, (value,))
    result.meta.update(value.meta)
    return result


def _site(node: fx.Node, model_key: str) -> Site:
    stack = node.meta.get("nn_module_stack") or {}
    module, module_type = "", ""
    for entry in stack.values():
        module, kind = entry
        module_type = kind if isinstance(kind, str) else kind.__qualname__
    file, line = (node.meta.get("custom") or {}).get(USER_LINE) or innermost_user_line(
        node.meta.get("stack_trace") or ""
    )
    module = _user_name(module, model_key) if module != model_key else ""
    return Site(module=module, module_type=module_type.rsplit(".", 1)[-1], file=file, line=line)
