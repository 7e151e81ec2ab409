"""From what torch.export traced to functional operations.

Decides how operations that change memory, or may share it, become operations that do neither, and
that all others stay as the user wrote them. Does not decide how the trace is made (export.py).

The result is that of `ExportedProgram.run_decompositions({})`, which runs the whole model twice
more and takes longer than the trace itself. Nearly all of a graph needs no second look, so it is
walked once here instead: an operation that torch always takes apart (`reshape`, `to`, `dropout`,
...) is traced alone, once for each kind of arguments, and an in-place change becomes its functional
form where nothing else sees the changed memory. A graph with anything else goes to torch as a
whole.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch._C import DispatchKey

# Composite operations with a kernel in Python (dropout, batch norm) are taken apart by it only
# under this context; it has no public name (the same in torch 2.11 to 2.13).
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node, map_arg
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef

from openwafer.frontends.torch.memory import SharedMemory, may_share_memory, schema_of

__all__ = ["FunctionalStep", "functional_step"]

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class FunctionalStep:
    """A step as functional operations: the graph, and what its inputs and results are.

    `state_dict` has the weights and buffers, `constants` what the trace lifted out of the code,
    both under the names in `signature`.
    """

    graph: Graph
    signature: ExportGraphSignature
    state_dict: Mapping[str, torch.Tensor]
    constants: Mapping[str, Any]


class _NeedsRetraceError(Exception):
    """The graph holds something that only torch's own functionalization gets right."""


def functional_step(exported: ExportedProgram) -> FunctionalStep:
    """The exported step as functional operations; under autocast, with its casts."""
    try:
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            # Casts come in below the operations that torch.export sees.
            raise _NeedsRetraceError
        graph, signature = _Rewriting(exported).run()
    except _NeedsRetraceError:
        _leave_out_dropout_that_is_off(exported.graph)
        # An empty table keeps operations as the user wrote them.
        exported = exported.run_decompositions({})
        graph, signature = exported.graph, exported.graph_signature
    return FunctionalStep(graph, signature, exported.state_dict, exported.constants)


def _leave_out_dropout_that_is_off(graph: Graph) -> None:
    """It returns its argument itself; torch's functionalization takes it for a copy, and misses
    what a later in-place operation on one does to the other."""
    for node in graph.find_nodes(op="call_function", target=_aten.dropout.default):
        x, p, training = node.args
        if p == 0 or not training:
            node.replace_all_uses_with(x)
            graph.erase_node(node)


class _Rewriting:
    """One walk over an exported graph that builds the functional one.

    Nodes get the names that torch's tracer gives, so that both ways have the same result.
    """

    def __init__(self, exported: ExportedProgram) -> None:
        self._exported = exported
        self._source = exported.graph
        self._signature = exported.graph_signature
        self._graph = Graph()
        self._memory = SharedMemory(self._source)
        # Of each node of the source so far: its node, or nodes, in the new graph.
        self._value: dict[Node, Any] = {}
        # What an in-place operation returns is the tensor that it changed.
        self._same: dict[Node, Node] = {}
        # Placeholders of buffers that the step changes, and their next values.
        self._changed: dict[Node, Node] = {}
        self._expansions: dict[Any, GraphModule] = {}

    def run(self) -> tuple[Graph, ExportGraphSignature]:
        for node in self._source.nodes:
            if node.op == "placeholder":
                self._memory.add(node)
                self._value[node] = self._graph.node_copy(node)
            elif node.op == "call_function":
                self._call(node)
            elif node.op != "output":
                raise _NeedsRetraceError
        signature = self._finish()
        self._graph.eliminate_dead_code()
        return self._graph, signature

    def _call(self, node: Node) -> None:
        target = node.target
        if target is operator.getitem:
            self._element(node)
        elif not isinstance(target, OpOverload):
            raise _NeedsRetraceError
        elif target is _aten.lift_fresh_copy.default:
            self._memory.add(node)
            self._value[node] = self._create(_aten.clone.default, *self._arguments(node), node)
        elif target is _aten.batch_norm.default:
            self._batch_norm(node)
        elif schema_of(target).is_mutable:
            self._in_place(node, target)
        else:
            self._memory.add(node, node.all_input_nodes if may_share_memory(target) else ())
            if _is_taken_apart(target):
                self._value[node] = self._expanded(node, target)
            else:
                self._value[node] = self._create(target, *self._arguments(node), node)

    def _now(self, node: Node) -> Any:
        return self._value[self._same.get(node, node)]

    def _arguments(self, node: Node) -> tuple[Any, Any]:
        """Arguments of `node` in the new graph."""
        return map_arg(node.args, self._now), map_arg(node.kwargs, self._now)

    def _create(self, target: Any, args: Any, kwargs: Any, source: Node, val: Any = None) -> Node:
        """A node in the new graph that comes from where `source` comes from."""
        name = target.overloadpacket.__name__ if isinstance(target, OpOverload) else None
        if name is not None and name.startswith("__"):
            name = name.strip("_")
        created = self._graph.create_node("call_function", target, args, kwargs, name)
        created.meta = dict(source.meta)
        if val is not None:
            created.meta["val"] = val
        return created

    def _element(self, node: Node) -> None:
        source, index = node.args
        assert isinstance(source, Node)
        assert isinstance(index, int)
        self._memory.add(node, (source,))
        value = self._now(source)
        if isinstance(value, Node):
            self._value[node] = self._create(operator.getitem, (value, index), {}, node)
        else:
            self._value[node] = value[index]

    def _expanded(self, node: Node, target: OpOverload) -> Any:
        """What a composite operation consists of: the node, or nodes, of its result."""
        region = self._expansion(node, target).graph
        places = region.find_nodes(op="placeholder")
        inputs = [self._now(argument) for argument in node.all_input_nodes]
        environment: dict[Node, Node] = dict(zip(places, inputs, strict=True))
        for inner in region.nodes:
            if inner.op == "call_function":
                args = map_arg(inner.args, environment.__getitem__)
                kwargs = map_arg(inner.kwargs, environment.__getitem__)
                val = inner.meta.get("val")
                environment[inner] = self._create(inner.target, args, kwargs, node, val)
        return map_arg(region.output_node().args[0], environment.__getitem__)

    def _expansion(self, node: Node, target: OpOverload) -> GraphModule:
        """The trace of a composite operation alone; one for all with the same arguments."""
        tensors = tuple(_layout(_tensor(argument)) for argument in node.all_input_nodes)
        places = {argument: f"<{i}>" for i, argument in enumerate(node.all_input_nodes)}
        spelled = map_arg((node.args, node.kwargs), places.__getitem__)
        key = (target, tensors, repr(spelled))
        if key not in self._expansions:
            self._expansions[key] = _trace_alone(node, target)
        return self._expansions[key]

    def _in_place(self, node: Node, target: OpOverload) -> None:
        """The functional form of a change that nothing sees by another name."""
        subject = node.args[0]
        if not isinstance(subject, Node):
            raise _NeedsRetraceError
        subject = self._same.get(subject, subject)
        if target is _aten.detach_.default and self._is_constant(subject):
            self._same[node] = subject
            self._memory.add(node, (subject,))
            return
        self._check_seen_by_none(subject, node)
        if target is _aten.copy_.default:
            self._copy(subject, node)
            return
        functional = _functional_form(target)
        val = _result(node, functional, node.args)
        if _kind(val) != _kind(_tensor(subject)):
            raise _NeedsRetraceError
        self._assign(subject, self._create(functional, *self._arguments(node), node, val))
        self._same[node] = subject
        self._memory.add(node, (subject,))

    def _is_constant(self, node: Node) -> bool:
        """Whether a tensor is one that the user's code made of numbers."""
        constants = self._signature.inputs_to_lifted_tensor_constants
        return node.target is _aten.lift_fresh_copy.default or node.name in constants

    def _copy(self, subject: Node, node: Node) -> None:
        """`self.buffer = value` in the user's code."""
        value = node.args[1]
        if not isinstance(value, Node) or _kind(_tensor(value)) != _kind(_tensor(subject)):
            raise _NeedsRetraceError
        if self._same.get(value, value) != subject:
            if subject.op != "placeholder" or self._now(value).op == "placeholder":
                raise _NeedsRetraceError
            self._assign(subject, self._now(value))
        self._same[node] = subject
        self._memory.add(node, (subject,))

    def _check_seen_by_none(self, subject: Node, change: Node) -> None:
        """That after `change` the memory of `subject` is read as `subject` alone."""
        others = [n for n in self._memory.shared_with(subject) if self._same.get(n, n) != subject]
        if any(node.op == "placeholder" for node in [subject, *others]) and (
            others or subject.name not in self._changeable_buffers
        ):
            raise _NeedsRetraceError
        if any(self._memory.is_read_after(node, change) for node in others):
            raise _NeedsRetraceError

    @cached_property
    def _changeable_buffers(self) -> set[str]:
        """Placeholders of the buffers whose memory the model knows by one name."""
        names = {**self._signature.inputs_to_parameters, **self._signature.inputs_to_buffers}
        held: Any = {**self._exported.state_dict, **self._exported.constants}
        memory = {n: StorageWeakRef(held[name].untyped_storage()) for n, name in names.items()}
        known = Counter(memory.values())
        return {n for n in self._signature.inputs_to_buffers if known[memory[n]] == 1}

    def _assign(self, subject: Node, value: Node) -> None:
        """From here on `subject` is `value`."""
        self._value[subject] = value
        if subject.op == "placeholder":
            self._changed[subject] = value

    def _batch_norm(self, node: Node) -> None:
        """Batch normalization, whose schema is silent on the buffers that training changes."""
        x, weight, bias, mean, var, training, momentum, eps, _ = node.args
        if not isinstance(mean, Node) or not isinstance(var, Node):
            raise _NeedsRetraceError
        args: tuple[Any, ...] = (x, weight, bias, mean, var, momentum, eps)
        target = _aten._native_batch_norm_legit_no_training.default
        if training:
            args = (*args[:5], True, *args[5:])
            target = _aten._native_batch_norm_legit_functional.default
            for buffer in (mean, var):
                self._check_seen_by_none(buffer, node)
        val = _result(node, target, args)
        whole = self._create(target, map_arg(args, self._now), {}, node, val)
        parts = [
            self._create(operator.getitem, (whole, i), {}, node, part) for i, part in enumerate(val)
        ]
        self._memory.add(node)
        self._value[node] = parts[0]
        if training:
            self._assign(mean, parts[3])
            self._assign(var, parts[4])

    def _finish(self) -> ExportGraphSignature:
        """Return next values of buffers, then what the step returns."""
        returned: Any = self._source.output_node().args[0]
        if not all(isinstance(value, Node) for value in returned):
            raise _NeedsRetraceError
        results = [self._now(value) for value in returned]
        buffers = self._signature.inputs_to_buffers
        changed = {buffers[node.name]: value for node, value in self._changed.items()}
        self._graph.output((*changed.values(), *results))
        outputs = [
            OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(value.name), target)
            for target, value in changed.items()
        ]
        outputs += [
            OutputSpec(spec.kind, TensorArgument(value.name), spec.target)
            for spec, value in zip(self._signature.output_specs, results, strict=True)
        ]
        return ExportGraphSignature(list(self._signature.input_specs), outputs)


def _is_taken_apart(target: OpOverload) -> bool:
    """Whether torch takes a composite operation apart because it may return its argument."""
    if torch.Tag.maybe_aliasing_or_mutating in target.tags:
        return True
    return _is_composite(target) and any(
        argument.alias_info for argument in schema_of(target).arguments
    )


def _is_composite(target: OpOverload) -> bool:
    """Whether an operation is defined by others, whose derivatives make its own."""
    return target.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)


def _trace_alone(node: Node, target: OpOverload) -> GraphModule:
    def call(*tensors: torch.Tensor) -> Any:
        given = dict(zip(node.all_input_nodes, tensors, strict=True)).__getitem__
        return target(*map_arg(node.args, given), **map_arg(node.kwargs, given))

    values = [_tensor(argument) for argument in node.all_input_nodes]
    if not values:
        raise _NeedsRetraceError
    with values[0].fake_mode, torch.no_grad(), enable_python_dispatcher():
        traced = make_fx(call)(*values)
    for inner in traced.graph.nodes:
        schema = getattr(inner.target, "_schema", None)
        if inner.op == "get_attr" or (schema is not None and schema.is_mutable):
            raise _NeedsRetraceError
    return traced


def _result(node: Node, target: Callable[..., Any], args: Any) -> Any:
    """What `target` gives for such arguments, shapes alone."""
    tensors = {argument: _tensor(argument) for argument in node.all_input_nodes}
    mode = next(iter(tensors.values())).fake_mode
    with mode, torch.no_grad():
        return target(
            *map_arg(args, tensors.__getitem__), **map_arg(node.kwargs, tensors.__getitem__)
        )


def _functional_form(target: OpOverload) -> OpOverload:
    """`add.Tensor` for `add_.Tensor`."""
    name = target.overloadpacket.__name__
    packet = getattr(getattr(torch.ops, target.namespace), name.removesuffix("_"), None)
    form = getattr(packet, str(target).rpartition(".")[2], None)
    if (
        not name.endswith("_")
        or name in ("copy_", "set_", "resize_", "detach_")
        or not isinstance(form, OpOverload)
        or _is_composite(target)
        or {torch.Tag.nondeterministic_seeded, torch.Tag.inplace_view} & set(target.tags)
        or sum(a.alias_info is not None for a in schema_of(target).arguments) != 1
    ):
        raise _NeedsRetraceError
    return form


def _tensor(node: Node) -> FakeTensor:
    value = node.meta.get("val")
    if not isinstance(value, FakeTensor):
        raise _NeedsRetraceError
    return value


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    place = (tuple(tensor.stride()), tensor.storage_offset())
    return (*_kind(tensor), *place, tensor.layout)


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.device
