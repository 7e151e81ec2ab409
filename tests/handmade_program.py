"""A Program made by hand from a module, so that tests below the frontends need none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from openwafer.graph.program import Buffer, GraphInput, Parameter, Program, Site, TensorSpec

__all__ = ["program_of"]


def program_of(module: nn.Module, *batch: torch.Tensor, training: bool = True) -> Program:
    """A Program from a module that returns the loss (and maybe more), independent of frontends."""
    module.train(training)
    exported = torch.export.export(module, batch, strict=False).run_decompositions({})
    signature = exported.graph_signature
    nodes = {node.name: node for node in exported.graph.nodes}
    for node in exported.graph.nodes:
        if node.op == "call_function":
            node.meta["site"] = _site(node)
    parameter_nodes = {name: node for node, name in signature.inputs_to_parameters.items()}
    tied: dict[nn.Parameter, list[str]] = {}
    for name, weight in module.named_parameters(remove_duplicate=False):
        tied.setdefault(weight, []).append(name)
    updates = {target: node for node, target in signature.buffers_to_mutate.items()}
    return Program(
        graph=exported.graph,
        parameters=tuple(
            Parameter(
                name=names[0],
                # Of the placeholders of a tied weight, export reads one and leaves the others idle.
                node=max(
                    (parameter_nodes[name] for name in names), key=lambda n: len(nodes[n].users)
                ),
                spec=TensorSpec.of(weight),
                aliases=tuple(names[1:]),
                trainable=weight.requires_grad,
            )
            for weight, names in tied.items()
        ),
        buffers=tuple(
            Buffer(name=name, node=node, spec=_spec(nodes[node]), update=updates.get(name))
            for node, name in signature.inputs_to_buffers.items()
        ),
        inputs=tuple(
            GraphInput(path=f"[{i}]", node=node, spec=_spec(nodes[node]))
            for i, node in enumerate(signature.user_inputs)
        ),
        loss=signature.user_outputs[0],
        metrics=(),
        training=training,
        num_samples=batch[0].shape[0],
        model_name="test",
    )


def _spec(node: fx.Node) -> TensorSpec:
    return TensorSpec.of(node.meta["val"])


def _site(node: fx.Node) -> Site:
    """Module from the export's stack; the line where this test suite called into torch."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    path, kind = list(stack.values())[-1] if stack else ("", "")
    frames = [
        line for line in node.meta.get("stack_trace", "").splitlines()
        if line.strip().startswith("File") and "/torch/" not in line
    ]  # fmt: skip
    if not frames:
        return Site(path, str(kind))
    file, line = frames[-1].strip().split(", ")[:2]
    name = file.removeprefix('File "').removesuffix('"')
    return Site(path, str(kind).rsplit(".", 1)[-1], Path(name).name, int(line.split()[1]))
