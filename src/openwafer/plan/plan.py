"""Plan: all that was decided about one model before it runs.

Decides what a plan holds and how its memory is counted. Does not decide sizes, places and rates
(fabric/), its text (text.py) or its files (artifacts.py). Executors read it and add nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openwafer.graph.program import Parameter, Program
from openwafer.kernels.kernel import ADAM, CostContext, ExecutionMode, KernelCost, OptimizerCost
from openwafer.kernels.match import KernelGraph
from openwafer.machine.spec import Machine
from openwafer.plan.codec import decode, encode
from openwafer.plan.fabric.pipelined import plan_pipelined
from openwafer.plan.fabric.streaming import plan_streaming
from openwafer.plan.fabric.values import FabricPlan, KernelRow, Prediction
from openwafer.plan.layers import Layer

__all__ = [
    "LayerPipelinedSchedule",
    "LayerPlan",
    "Plan",
    "Schedule",
    "WeightStreamingSchedule",
    "build_plan",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """One layer: what it holds and does for one batch of `Plan.num_samples`.

    parameters: state_dict names; a tied weight is in each layer that reads it.
    num_parameters, parameter_bytes: of those, as the model holds them.
    kernels: names of the kernels with work, as in `Plan.fabric.kernels`.
    forward_macs, backward_macs: multiply-accumulates.
    forward_ops, backward_ops: operations on single elements.
    saved_bytes: activations that wait for the backward pass.
    """

    name: str
    structure: str
    parameters: tuple[str, ...]
    num_parameters: int
    parameter_bytes: int
    kernels: tuple[str, ...]
    input_bytes: int
    output_bytes: int
    forward_macs: int
    backward_macs: int
    forward_ops: int
    backward_ops: int
    saved_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPipelinedSchedule:
    """All layers resident; a step's batches pass as `num_microbatches` through `num_stages`
    processes."""

    num_stages: int = 1
    num_microbatches: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightStreamingSchedule:
    """Layers in the order in which their weights are fetched; empty `backward` in evaluation.

    prefetch_depth: layers fetched ahead of the one in use.
    num_slots, slot_bytes: device buffers for weights: one more than fetched ahead (no more than
        there are layers), each for the largest layer.
    """

    forward: tuple[str, ...]
    backward: tuple[str, ...]
    prefetch_depth: int
    num_slots: int
    slot_bytes: int


Schedule = LayerPipelinedSchedule | WeightStreamingSchedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was decided (see the module header).

    hash: content hash of everything that the plan depends on (`artifacts.plan_key`).
    num_samples: samples of one batch; all costs are for one.
    memory: bytes by tier ("device", "store") and use ("weights", "gradients", "optimizer",
        "activations").
    fabric: the floor and the kernels' rectangles on it.
    predicted: how fast the machine would be.
    """

    hash: str
    model_name: str
    execution_mode: ExecutionMode
    machine: str
    training: bool
    num_samples: int
    num_parameters: int
    layers: tuple[LayerPlan, ...]
    schedule: Schedule
    memory: Mapping[str, Mapping[str, int]]
    fabric: FabricPlan
    predicted: Prediction

    @property
    def kernels(self) -> tuple[KernelRow, ...]:
        """The kernels with work, in execution order."""
        return self.fabric.kernels

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` gives an equal plan."""
        return encode(self)

    @classmethod
    def from_json(cls, value: Any) -> Plan:
        """Raises ValueError if `value` is not what `to_json` gives."""
        return decode(cls, value)


def build_plan(
    program: Program,
    layers: Sequence[Layer],
    kernel_graph: KernelGraph,
    machine: Machine,
    *,
    plan_hash: str,
    num_stages: int = 1,
    num_microbatches: int = 1,
    prefetch_depth: int = 1,
    optimizer: OptimizerCost = ADAM,
    num_replicas: int = 1,
    num_systems: int = 1,
) -> Plan:
    """Put a plan together for the mode that `kernel_graph` was matched for.

    Args:
        num_replicas: layer pipelined: copies of the model on the floor; -1 chooses.
        num_systems: weight streaming: systems that share the batch.

    Raises:
        PlanError: the model does not fit the machine in this mode.
    """
    mode = kernel_graph.execution_mode
    context = CostContext(
        num_samples=program.num_samples, training=program.training, optimizer=optimizer
    )
    costs = {match.name: match.cost(context) for match in kernel_graph.working}
    planned = _layer_plans(program, layers, kernel_graph, costs)
    parts = (layers, kernel_graph, program, machine)
    if mode == "layer_pipelined":
        schedule = LayerPipelinedSchedule(num_stages=num_stages, num_microbatches=num_microbatches)
        fabric, predicted = plan_pipelined(*parts, optimizer=optimizer, num_replicas=num_replicas)
    else:
        schedule = _streaming_schedule(planned, program.training, prefetch_depth)
        fabric, predicted = plan_streaming(*parts, optimizer=optimizer, num_systems=num_systems)
    return Plan(
        hash=plan_hash,
        model_name=program.model_name,
        execution_mode=mode,
        machine=machine.name,
        training=program.training,
        num_samples=program.num_samples,
        num_parameters=program.num_parameters,
        layers=planned,
        schedule=schedule,
        memory=_memory(program, planned, schedule, optimizer),
        fabric=fabric,
        predicted=predicted,
    )


def _layer_plans(
    program: Program,
    layers: Sequence[Layer],
    graph: KernelGraph,
    costs: Mapping[str, KernelCost],
) -> tuple[LayerPlan, ...]:
    by_name = _parameters_by_name(program)
    working = {match.anchor.name: match.name for match in graph.working}
    planned: list[LayerPlan] = []
    for layer in layers:
        kernels = tuple(working[node] for node in layer.nodes if node in working)
        parameters = dict.fromkeys(by_name[name] for name in layer.parameters)
        own = [costs[name] for name in kernels]
        planned.append(
            LayerPlan(
                name=layer.name,
                structure=layer.structure,
                parameters=tuple(layer.parameters),
                num_parameters=sum(p.spec.numel for p in parameters),
                parameter_bytes=sum(p.spec.num_bytes for p in parameters),
                kernels=kernels,
                input_bytes=layer.input_bytes,
                output_bytes=layer.output_bytes,
                forward_macs=sum(cost.forward.macs for cost in own),
                backward_macs=sum(cost.backward.macs for cost in own),
                forward_ops=sum(cost.forward.elementwise_ops for cost in own),
                backward_ops=sum(cost.backward.elementwise_ops for cost in own),
                saved_bytes=sum(cost.saved_bytes for cost in own),
            )
        )
    return tuple(planned)


def _parameters_by_name(program: Program) -> dict[str, Parameter]:
    return {name: p for p in program.parameters for name in (p.name, *p.aliases)}


def _streaming_schedule(
    layers: tuple[LayerPlan, ...], training: bool, prefetch_depth: int
) -> WeightStreamingSchedule:
    names = tuple(layer.name for layer in layers)
    return WeightStreamingSchedule(
        forward=names,
        backward=names[::-1] if training else (),
        prefetch_depth=prefetch_depth,
        num_slots=min(prefetch_depth + 1, max(1, len(layers))),
        slot_bytes=max((layer.parameter_bytes for layer in layers), default=0),
    )


def _memory(
    program: Program,
    layers: tuple[LayerPlan, ...],
    schedule: Schedule,
    optimizer: OptimizerCost,
) -> dict[str, dict[str, int]]:
    """Bytes by tier and use; a tied weight counts once where it is kept, in each slot it visits."""
    weights = sum(p.spec.num_bytes for p in program.parameters)
    trained = [p for p in program.parameters if p.trainable and program.training]
    gradients = sum(p.spec.num_bytes for p in trained)
    state = sum(p.spec.numel for p in trained) * optimizer.state_bytes_per_parameter
    kept = {"weights": weights, "gradients": gradients, "optimizer": state, "activations": 0}
    activations = sum(layer.saved_bytes for layer in layers)
    if isinstance(schedule, LayerPipelinedSchedule):
        return {"device": kept | {"activations": activations}, "store": dict.fromkeys(kept, 0)}
    device = {
        "weights": schedule.num_slots * schedule.slot_bytes,
        "gradients": schedule.slot_bytes if trained else 0,
        "optimizer": 0,
        "activations": activations,
    }
    return {"device": device, "store": kept}
