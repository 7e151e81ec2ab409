"""What the runtime is compared with, and how its parts are put together for a test."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from openwafer.config.hyperparameters import HYPERPARAMETERS, OptimizerType
from openwafer.config.optimizer import OptimizerConfig
from openwafer.config.schedule import Constant
from openwafer.frontends.torch.capture import capture_module, extract_loss, flatten_batch
from openwafer.frontends.torch.plain import PlainExecutor
from openwafer.graph.program import Program
from openwafer.plan.layers import cut_layers
from openwafer.runtime.compiled import CompiledModel, compile_layers
from openwafer.runtime.executor import Executor, ModelState, StepResult
from openwafer.runtime.layer_pipelined import LayerPipelined
from openwafer.runtime.memory.account import DeviceMemory
from openwafer.runtime.memory.activations import Policy
from openwafer.runtime.memory.spill import DiskSpill, HostSpill, Spill
from openwafer.runtime.randomness import DrawKey, KeyedDraws
from openwafer.runtime.stores.disk_store import CHUNK_ELEMENTS, DiskStore
from openwafer.runtime.stores.store import RamStore, WeightStore, copies_wanted, make_shards
from openwafer.runtime.weight_streaming import StreamingOptions, WeightStreaming
from openwafer.runtime.workload import Workload

__all__ = [
    "CPU",
    "KEY",
    "Outcome",
    "Setup",
    "assert_states_equal",
    "batches_like",
    "buffers_of",
    "call_of",
    "compiled_model",
    "compiled_outcome",
    "eager_outcome",
    "optimizer_config",
    "run_steps",
]

KEY = DrawKey(seed=3, step=5, microbatch=0, ordinal=0)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Outcome:
    """Loss, gradients by weight (None where there is none), buffers after the forward pass."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor]


def call_of(model: nn.Module) -> Callable[[Any], Any]:
    """`model(**batch)` or `model(*batch)`, as capture_module calls it."""

    def call(batch: Any) -> Any:
        return model(**batch) if isinstance(batch, Mapping) else model(*batch)

    return call


def _autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype) if dtype else nullcontext()


def eager_outcome(
    model: nn.Module, batch: Any, *, training: bool = True, dtype: torch.dtype | None = None
) -> Outcome:
    """Eager PyTorch with autograd; dropout drawn by KEY."""
    model = copy.deepcopy(model).train(training)
    with KeyedDraws(KEY), _autocast(dtype):
        loss = extract_loss(call_of(model)(batch)).reshape(())
    if training:
        loss.backward()
    return Outcome(
        loss.detach(),
        {name: weight.grad for name, weight in model.named_parameters()},
        {name: buffer.detach().clone() for name, buffer in model.named_buffers()},
    )


def buffers_of(model: nn.Module, *programs: Program) -> dict[str, torch.Tensor]:
    """First values of buffers and constants, by node."""
    held = dict(model.named_buffers(remove_duplicate=False))
    found: dict[str, torch.Tensor] = {}
    for program in programs:
        for buffer in program.buffers:
            value = held[buffer.name] if buffer.name else buffer.value
            assert value is not None
            found[buffer.node] = value.detach().clone()
    return found


def compiled_model(
    model: nn.Module, batch: Any, *, training: bool = True, dtype: torch.dtype | None = None
) -> CompiledModel:
    program = capture_module(model, batch, training=training, autocast_dtype=dtype).program
    return compile_layers(program, cut_layers(program))


def compiled_outcome(
    model: nn.Module,
    batch: Any,
    *,
    training: bool = True,
    dtype: torch.dtype | None = None,
    compiled: CompiledModel | None = None,
) -> Outcome:
    """Layer by layer. Between forward and backward every weight is overwritten with NaN, and the
    backward pass gets fresh copies: what it kept of the old memory would show. Weights' gradients
    must be memory of their own, since updates work on them in place."""
    model = copy.deepcopy(model)
    compiled = compiled or compiled_model(model, batch, training=training, dtype=dtype)
    program = compiled.program
    fresh = {name: weight.detach() for name, weight in model.named_parameters()}
    used = {name: weight.clone() for name, weight in fresh.items()}
    buffers = buffers_of(model, program)
    values = compiled.feed(flatten_batch(batch), CPU)
    saved = [
        layer.forward(KEY, [used[name] for name in layer.layer.parameters], buffers, values)
        for layer in compiled.layers
    ]
    loss = values[program.loss].clone()
    for weight in used.values():
        weight.fill_(float("nan"))
    gradients: dict[str, torch.Tensor | None] = dict.fromkeys(fresh)
    flowing = compiled.seed_gradients(values, 1.0) if training else {}
    for layer in reversed(compiled.layers) if training else ():
        names = layer.layer.parameters
        weights = [fresh[name].clone() for name in names]
        kept = saved.pop()
        found = layer.backward(weights, kept, flowing)
        _assert_own_memory(found, [*weights, *kept, *flowing.values()])
        for name, gradient in zip(names, found, strict=True):
            if gradient is not None:
                held, wide = gradients[name], gradient.to(fresh[name].dtype)
                gradients[name] = wide if held is None else held + wide
    assert not flowing, "a gradient that no layer takes"
    named = {b.name: buffers[b.node] for b in program.buffers if b.name}
    return Outcome(loss, gradients, named)


def _assert_own_memory(
    gradients: Sequence[torch.Tensor | None], others: Sequence[torch.Tensor]
) -> None:
    places = [g.untyped_storage().data_ptr() for g in gradients if g is not None and g.numel()]
    assert len(places) == len(set(places)), "two gradients share memory"
    taken = {tensor.untyped_storage().data_ptr() for tensor in others}
    assert taken.isdisjoint(places), "a gradient shares memory with another tensor"


class Setup:
    """One model, captured and compiled once, from which executors of every kind are made.

    Each executor trains weights of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        *,
        dtype: torch.dtype | None = None,
        evaluates: bool = False,
    ) -> None:
        self.model, self.batch, self.dtype, self.evaluates = model, batch, dtype, evaluates
        self.train = compiled_model(model, batch, dtype=dtype)
        self.layers = [compiled.layer for compiled in self.train.layers]

    @cached_property
    def evaluation(self) -> CompiledModel:
        return compiled_model(self.model, self.batch, training=False, dtype=self.dtype)

    def workload(self, config: OptimizerConfig, **options: Any) -> Workload:
        programs = [self.train.program]
        if self.evaluates:
            programs.append(self.evaluation.program)
        parameters = self.train.program.parameters
        held = dict(self.model.named_parameters(remove_duplicate=False))
        given: dict[str, Any] = {
            "train": self.train,
            "evaluation": self.evaluation if self.evaluates else None,
            "weights": {p.name: held[p.name].detach().clone() for p in parameters},
            "buffers": buffers_of(self.model, *programs),
            "trained": tuple(p.name for p in parameters if p.trainable),
            "optimizer": config,
            "learning_rate_at": lambda step: 0.05 / (step + 1),
            "leaves": flatten_batch,
            "device": CPU,
            "seed": 7,
        }
        return Workload(**{**given, **options})

    def plain(self, config: OptimizerConfig, **options: Any) -> PlainExecutor:
        model = copy.deepcopy(self.model)
        return PlainExecutor(
            model,
            call_of(model),
            [model],
            optimizer=config,
            learning_rate_at=lambda step: 0.05 / (step + 1),
            device=CPU,
            seed=7,
            autocast_dtype=self.dtype,
            **options,
        )

    def pipelined(self, config: OptimizerConfig, **options: Any) -> LayerPipelined:
        return LayerPipelined(self.workload(config, **options))

    def streaming(
        self,
        config: OptimizerConfig,
        folder: Path | None = None,
        *,
        depth: int = 1,
        waiting: int = 1,
        memory: DeviceMemory | None = None,
        policy: Policy = "keep",
        chunk_elements: int = CHUNK_ELEMENTS,
        **options: Any,
    ) -> WeightStreaming:
        """With weights in RAM, or on disk below `folder`; all activations kept by one policy."""
        workload = self.workload(config, **options)
        memory = memory or DeviceMemory()
        shards = make_shards(self.layers, list(workload.weights), workload.trained)
        copies = copies_wanted([workload.train, workload.evaluation], workload.weights)
        if folder is None:
            store: WeightStore = RamStore(workload.weights, shards, config, copies=copies)
        else:
            store = DiskStore(
                workload.weights,
                shards,
                config,
                folder,
                copies=copies,
                chunk_elements=chunk_elements,
            )
        spill: Spill | None = None
        if policy == "spill":
            spill = DiskSpill(folder, 4096, 4, memory) if folder else HostSpill()
        return WeightStreaming(
            workload,
            store,
            shards,
            StreamingOptions(
                prefetch_depth=depth,
                returns_waiting=waiting,
                memory=memory,
                policies=(policy,) * len(self.layers),
                spill=spill,
            ),
        )


def optimizer_config(name: OptimizerType = "adamw", **changes: Any) -> OptimizerConfig:
    hyperparameters = {f.name for f in fields(HYPERPARAMETERS[name])} & changes.keys()
    own = {key: changes.pop(key) for key in hyperparameters}
    decay = 0.0 if name == "rprop" else 0.1
    return OptimizerConfig(
        optimizer_type=name,
        hyperparameters=replace(HYPERPARAMETERS[name](), **own),
        learning_rate=Constant(learning_rate=0.05),
        **{"weight_decay_rate": decay, **changes},
    )


def batches_like(batch: Any, count: int, seed: int = 0) -> list[Any]:
    """Batches of the same shapes: floats drawn anew, integers and booleans shuffled."""
    generator = torch.Generator().manual_seed(seed)

    def another(leaf: Any) -> Any:
        if leaf.is_floating_point():
            return torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
        order = torch.randperm(leaf.numel(), generator=generator)
        return leaf.reshape(-1)[order].reshape(leaf.shape)

    return [pytree.tree_map(another, batch) for _ in range(count)]


def run_steps(
    executor: Executor, batches: Sequence[Any], *, microbatches: int = 1, first: int = 0
) -> list[StepResult]:
    groups = [batches[i : i + microbatches] for i in range(0, len(batches), microbatches)]
    return [executor.train_step(group, step=first + i) for i, group in enumerate(groups)]


def assert_states_equal(found: ModelState, expected: ModelState, tolerance: float = 0.0) -> None:
    """Weights, buffers, optimizer state and loss scale; bit for bit where `tolerance` is 0."""
    assert found.model.keys() == expected.model.keys()
    assert found.optimizer.keys() == expected.optimizer.keys()
    assert found.loss_scale == expected.loss_scale
    pairs = [(n, found.model[n], t) for n, t in expected.model.items()]
    for name, entries in expected.optimizer.items():
        assert found.optimizer[name].keys() == entries.keys()
        pairs += [(f"{name}.{k}", found.optimizer[name][k], t) for k, t in entries.items()]
    for name, given, wanted in pairs:
        if tolerance == 0.0:
            assert torch.equal(given, wanted), f"{name}: {(given - wanted).abs().max()}"
        else:
            scale = float(wanted.abs().max()) if wanted.numel() and wanted.isfinite().all() else 0
            torch.testing.assert_close(
                given, wanted, atol=tolerance * (1 + scale), rtol=0.0, msg=lambda m, n=name: n + m
            )
