"""Weight streaming execution: one layer's weights at a time, for models of any size.

Decides the order of work when weights live in a store: all microbatches of a layer before the next
layer (design decision 7), so that weights cross twice per update and gradients once, whatever the
accumulation. Does not decide what a layer computes, how weights and gradients travel meanwhile
(weight_traffic.py), how activations are kept (activations.py), or how much fits (step_memory.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from openwafer.errors import PlanError
from openwafer.runtime.compiled import CompiledLayer, CompiledModel, Gradients, Values
from openwafer.runtime.executor import Batch, Executor, ModelState, StepResult
from openwafer.runtime.gradients import add_gradients
from openwafer.runtime.inspect import first_nonfinite, nonfinite_loss
from openwafer.runtime.memory.account import DeviceMemory
from openwafer.runtime.memory.activations import Activations, LiveTensors, Policy
from openwafer.runtime.memory.block_pool import BlockPool
from openwafer.runtime.memory.spill import Spill
from openwafer.runtime.replica import Replica
from openwafer.runtime.stores.device_link import link_to
from openwafer.runtime.stores.store import Shard, WeightStore
from openwafer.runtime.stores.weight_traffic import WeightTraffic
from openwafer.runtime.timing.timeline import NO_RECORDER, Recorder
from openwafer.runtime.update import Decision, UpdateRule
from openwafer.runtime.workload import Workload, mean_of, state_dict_of

__all__ = ["StreamingOptions", "WeightStreaming"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamingOptions:
    """How a step goes about its memory; the numbers are the same for all values.

    prefetch_depth: layers fetched ahead; 0 fetches when a layer is needed.
    returns_waiting: layers whose gradients may wait for the store while the next one computes; one
        while the last one does.
    policies: how each layer's activations are kept; empty keeps all as they are.
    spill: where spilled ones go; closed with the executor.
    memory: the account of device memory; raises where a step would need more than its budget.
    recorder: is told what happens when.
    replica: which part of a step this process has.
    temporaries: around a layer's functions where nothing that they make stays for long.
    pool: of large blocks; keeps none once the executor is closed.
    """

    prefetch_depth: int = 1
    returns_waiting: int = 1
    policies: tuple[Policy, ...] = ()
    spill: Spill | None = None
    memory: DeviceMemory = field(default_factory=DeviceMemory)
    recorder: Recorder = NO_RECORDER
    replica: Replica = field(default_factory=Replica)
    temporaries: Callable[[], AbstractContextManager[None]] = nullcontext
    pool: BlockPool | None = None


@dataclass(slots=True)
class _Microbatch:
    """One microbatch on its way through the layers."""

    values: Values
    gradients: Gradients = field(default_factory=dict[str, torch.Tensor])


class WeightStreaming(Executor):
    """Weights come from a store, layer by layer (see the module header)."""

    def __init__(
        self,
        workload: Workload,
        store: WeightStore,
        shards: Sequence[Shard],
        options: StreamingOptions | None = None,
    ) -> None:
        self._options = options or StreamingOptions()
        self._workload = workload
        self._store = store
        self._shards = tuple(shards)
        self._memory = self._options.memory
        if workload.device.type == "cpu":
            self._memory.take("store", store.staging_bytes)
        self._live = LiveTensors(self._memory)
        self._buffers = {
            node: buffer.detach().to(workload.device) for node, buffer in workload.buffers.items()
        }
        self._rule = UpdateRule(workload.optimizer) if workload.optimizer is not None else None
        self._last_model: CompiledModel | None = None
        self._recorder, self._replica = self._options.recorder, self._options.replica
        self._recorder.planned(
            prefetch_depth=self._options.prefetch_depth,
            returns_waiting=self._options.returns_waiting,
        )
        self._traffic = WeightTraffic(
            store,
            shards,
            rule=self._rule,
            link=link_to(workload.device),
            memory=self._memory,
            prefetch_depth=self._options.prefetch_depth,
            recorder=self._recorder,
        )

    # ------------------------------------------------------------------ steps

    def train_step(self, microbatches: Sequence[Batch], *, step: int) -> StepResult:
        model, rule = self._workload.training_model(), self._rule
        self._last_model = model
        assert rule is not None
        self._refuse_late_buffers(model, len(microbatches))
        policies = self._options.policies or ("keep",) * len(model.layers)
        activations = Activations(policies, self._live, self._options.spill)
        try:
            with self._memory.explaining_exhaustion(self._workload.device):
                runs = [self._fed(model, batch) for batch in microbatches]
                return self._train(model, rule, runs, activations, step)
        finally:
            # All given back already, unless the step was cut short.
            activations.clear()
            self._live.drop_all()

    def _fed(self, model: CompiledModel, batch: Batch) -> _Microbatch:
        values = model.feed(self._workload.leaves(batch), self._workload.device)
        self._live.hold(values.values())
        return _Microbatch(values=values)

    def _train(
        self,
        model: CompiledModel,
        rule: UpdateRule,
        runs: Sequence[_Microbatch],
        activations: Activations,
        step: int,
    ) -> StepResult:
        scale, buffers = rule.loss_scale, dict(self._buffers)
        self._forward(model, runs, step, activations)
        losses = self._replica.all_losses([run.values[model.program.loss] for run in runs])
        if self._workload.guard_loss and any(nonfinite_loss(loss) for loss in losses):
            self._buffers = buffers
            return StepResult(loss=mean_of(losses), applied=False)
        metrics: dict[str, list[tuple[torch.Tensor, ...]]] = {}
        for run in runs:
            for name, tensors in model.metric_values(run.values).items():
                metrics.setdefault(name, []).extend(tensors)
            run.gradients = model.seed_gradients(run.values, scale / self._replica.total(len(runs)))
            self._live.hold(run.gradients.values())
        decision = self._backward(model, runs, activations, step)
        return StepResult(
            loss=mean_of(losses),
            applied=decision.apply,
            grad_norm=decision.grad_norm,
            loss_scale=scale if rule.scales_loss else None,
            metrics=metrics,
        )

    def eval_step(self, batch: Batch, *, step: int) -> StepResult:
        model = self._last_model = self._workload.evaluation_model()
        try:
            with self._memory.explaining_exhaustion(self._workload.device):
                run = self._fed(model, batch)
                self._forward(model, [run], step, None)
        finally:
            self._live.drop_all()
        return StepResult(
            loss=run.values[model.program.loss].detach().cpu(),
            metrics=model.metric_values(run.values),
        )

    def _forward(
        self,
        model: CompiledModel,
        runs: Sequence[_Microbatch],
        step: int,
        activations: Activations | None,
    ) -> None:
        """All microbatches through each layer; without `activations` nothing is kept."""
        with closing(self._traffic.stream(model.layers)) as layers:
            for index, compiled, weights in layers:
                layer = compiled.layer
                for microbatch, run in enumerate(runs):
                    key = self._workload.key(step, self._replica.first(len(runs)) + microbatch)
                    inputs = [self._buffers[name] for name in layer.buffers]
                    inputs += [run.values[name] for name in layer.inputs]
                    spent = [run.values[n] for n in compiled.spent if n in run.values]
                    stays = activations is not None and activations.stays(index)
                    memory = nullcontext if stays else self._options.temporaries
                    with memory(), self._recorder.span("compute", layer.name, "forward"):
                        saved = compiled.forward(key, weights, self._buffers, run.values)
                    if activations is not None:
                        activations.keep((index, microbatch), inputs, saved)
                    self._live.hold(run.values[n] for n in layer.outputs if n in run.values)
                    self._live.drop(spent)

    def _backward(
        self,
        model: CompiledModel,
        runs: Sequence[_Microbatch],
        activations: Activations,
        step: int,
    ) -> Decision:
        """Gradients of every layer, last layer first; updates are started or put off."""
        rule = self._rule
        assert rule is not None
        rate = self._workload.learning_rate_at(step)
        sums: dict[str, torch.Tensor] = {}
        norms: dict[str, torch.Tensor] = {}
        activations.ask(len(model.layers) - 1, len(runs))
        with closing(self._traffic.stream(model.layers, backward=True)) as layers:
            for index, compiled, weights in layers:
                if index:
                    activations.ask(index - 1, len(runs))
                # Beside the last one waiting hides no time, and it is often an embedding, whose
                # gradient is the largest: the step would take the most memory there.
                self._traffic.wait_for_returns(
                    at_most=self._options.returns_waiting if index else 1
                )
                streamed = (index, compiled, weights)
                with self._options.temporaries():
                    layer_sums = self._layer_gradients(streamed, runs, activations, step)
                for name, gradient in layer_sums.items():
                    if name in sums:
                        sums[name].add_(gradient)
                        self._memory.give("gradients", _num_bytes(gradient))
                    else:
                        sums[name] = gradient
                done = {n: sums.pop(n) for n in self._complete(index) if n in sums}
                if not done:
                    continue
                rule.unscale_(list(done.values()))
                norms.update(self._replica.norms(rule, done))
                if rule.needs_all_gradients:
                    self._traffic.park(index, compiled.layer.name, done)
                else:
                    self._traffic.update(index, compiled.layer.name, done, rate)
        if rule.needs_all_gradients:
            returned = partial(self._traffic.wait_for_returns, at_most=0)
            norms = self._replica.all_norms(norms, returned)
        decision = rule.decide(norms, self._workload.trained)
        if rule.needs_all_gradients:
            self._traffic.decide(decision, rate)
        return decision

    def _complete(self, index: int) -> tuple[str, ...]:
        """Weights whose gradients are whole once layer `index` has run backward: those it owns."""
        return self._shards[index].trained if index < len(self._shards) else ()

    def _layer_gradients(
        self,
        streamed: tuple[int, CompiledLayer, list[torch.Tensor]],
        runs: Sequence[_Microbatch],
        activations: Activations,
        step: int,
    ) -> dict[str, torch.Tensor]:
        """A layer's backward pass on all microbatches: the sums of its weights' gradients."""
        index, compiled, weights = streamed
        layer = compiled.layer
        sums: dict[str, torch.Tensor] = {}
        for microbatch, run in enumerate(runs):
            unit = (index, microbatch)
            if activations.recomputes(index):
                with self._recorder.span("compute", layer.name, "recompute"):
                    key = self._workload.key(step, self._replica.first(len(runs)) + microbatch)
                    activations.recompute(unit, compiled, key, weights)
            held = list(run.gradients.values())
            with self._recorder.span("compute", layer.name, "backward"):
                grads = compiled.backward(weights, activations.get(unit), run.gradients)
                before = len(sums)
                add_gradients(sums, layer.parameters, grads)
            if len(sums) > before:
                new = list(sums.values())[before:]
                self._memory.take("gradients", sum(map(_num_bytes, new)))
            self._live.hold(run.gradients.values())
            self._live.drop(held)
            activations.done(unit)
        return sums

    @staticmethod
    def _refuse_late_buffers(model: CompiledModel, num_microbatches: int) -> None:
        """All microbatches of a layer run before the next layer, so a value that a later layer
        gives would reach the next microbatch too late."""
        late = model.late_buffers if num_microbatches > 1 else []
        if late:
            raise PlanError(
                f"weight streaming cannot accumulate gradients with {', '.join(late)}: it is read "
                "in one layer and updated in a later one",
                allowed="buffers that are read and updated in one layer",
                hint="grad_accum_steps: 1, --execution_mode layer_pipelined, or a module of its "
                "own (a batch norm, say) for each place",
            )

    # ------------------------------------------------------------------ state

    def state(self) -> ModelState:
        return self.borrowed_state().copied()

    def borrowed_state(self) -> ModelState:
        own = self.own_state()
        return ModelState(
            model=state_dict_of(self._workload, own["weights"], own["buffers"], copied=False),
            optimizer=own["optimizer"],
            loss_scale=own["loss_scale"],
        )

    def own_state(self) -> dict[str, dict[str, Any]]:
        """What this process's store has, borrowed: "weights" by name, "optimizer" by name and
        entry; "buffers" by node and "loss_scale", which all replicas have alike."""
        self._traffic.flush()
        return {
            "weights": self._store.weights(),
            "buffers": dict(self._buffers),
            "optimizer": self._store.optimizer_state(),
            "loss_scale": self._rule.state() if self._rule else {},
        }

    def lend_weights(self) -> None:
        """Take part in the fetches of another replica's `eval_step`."""
        with closing(self._traffic.stream(self._workload.evaluation_model().layers)) as layers:
            for _ in layers:
                pass

    def load_state(self, state: ModelState, *, weights_only: bool = False) -> None:
        self._traffic.flush()
        weights = {n: state.model[n] for n in self._workload.weights if n in state.model}
        self._store.load(weights, {} if weights_only else state.optimizer)
        self._workload.load_into(state.model, {}, self._buffers)
        if self._rule is not None and not weights_only:
            self._rule.load_state(state.loss_scale)

    def explain_nonfinite(self, microbatches: Sequence[Batch], *, step: int) -> str:
        self._traffic.flush()
        assert self._last_model is not None, "asked before any step"
        weights_of = self._weights_of(self._last_model)
        buffers = dict(self._buffers)
        return first_nonfinite(
            self._workload, self._last_model, microbatches, step, weights_of, buffers
        )

    def _weights_of(self, model: CompiledModel) -> Callable[[Sequence[str]], list[torch.Tensor]]:
        """A layer's weights by the names it has for them."""
        streamed = {compiled.layer.parameters: compiled.streamed for compiled in model.layers}

        def weights_of(names: Sequence[str]) -> list[torch.Tensor]:
            fetched = self._store.fetch(streamed[tuple(names)])
            return [weight.to(self._workload.device) for weight in fetched.tensors]

        return weights_of

    def counters(self) -> Mapping[str, int]:
        return {**self._traffic.counters, "peak device bytes": self._memory.peak_bytes}

    def close(self) -> None:
        self._traffic.close()
        self._store.close()
        self._memory.give_all("store")
        if self._options.spill is not None:
            self._options.spill.close()
        if self._options.pool is not None:
            self._options.pool.close()


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
