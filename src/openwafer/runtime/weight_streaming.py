"""Weight streaming execution: one layer's weights at a time, for models of any size.

Decides the order of work when weights live in a store: all microbatches of a layer before the next
layer (design decision 7), the next layer fetched while this one computes, gradients returned layer
by layer, updates at the store. Does not decide what a layer computes, how the store keeps weights,
or how gradients become an update.

One thread talks to the store, in order: what is asked first is done first. An update that needs the
whole backward pass (clipping by norm, dynamic loss scaling) waits until its layer's next fetch,
where it overlaps the next forward pass; any other update runs as its gradient arrives.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from openwafer.errors import PlanError
from openwafer.runtime.compiled import CompiledLayer, CompiledModel, Gradients, Values
from openwafer.runtime.executor import Batch, Executor, ModelState, StepResult
from openwafer.runtime.gradients import add_gradients
from openwafer.runtime.inspect import first_nonfinite, nonfinite_loss
from openwafer.runtime.memory import DeviceMemory
from openwafer.runtime.store import Shard, WeightStore
from openwafer.runtime.update import Decision, UpdateRule
from openwafer.runtime.workload import Workload, mean_of, state_dict_of

__all__ = ["WeightStreaming"]

_log = logging.getLogger("openwafer")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class _PendingUpdate:
    """An update that is decided but not applied yet."""

    gradients: Mapping[str, torch.Tensor]
    decision: Decision
    learning_rate: float


@dataclass(slots=True)
class _Microbatch:
    """One microbatch on its way through the layers."""

    values: Values
    saved: list[Sequence[torch.Tensor]]
    gradients: Gradients


class WeightStreaming(Executor):
    """Weights come from a store, layer by layer (see the module header).

    Args:
        prefetch_depth: how many layers ahead are fetched; 0 fetches when a layer is needed.
        memory: the account of device memory; raises where a step would need more than its budget.
    """

    def __init__(
        self,
        workload: Workload,
        store: WeightStore,
        shards: Sequence[Shard],
        *,
        prefetch_depth: int = 1,
        memory: DeviceMemory | None = None,
    ) -> None:
        self._workload = workload
        self._store = store
        self._shards = tuple(shards)
        self._shard_of = {name: shard for shard in shards for name in shard.names}
        self._prefetch_depth = prefetch_depth
        self._memory = memory or DeviceMemory()
        self._buffers = {
            node: buffer.detach().to(workload.device) for node, buffer in workload.buffers.items()
        }
        self._rule = UpdateRule(workload.optimizer) if workload.optimizer is not None else None
        self._last_model: CompiledModel | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weight-store")
        # Both are touched by the store thread alone once an update has been handed over.
        self._pending: dict[int, _PendingUpdate] = {}
        self._failed: BaseException | None = None
        self._counters = {"layers fetched": 0, "bytes fetched": 0, "bytes returned": 0}
        self._told = False

    # ------------------------------------------------------------------ steps

    def train_step(self, microbatches: Sequence[Batch], *, step: int) -> StepResult:
        model, rule = self._workload.training_model(), self._rule
        self._last_model = model
        assert rule is not None
        self._refuse_late_buffers(model, len(microbatches))
        runs = [
            _Microbatch(
                values=model.feed(self._workload.leaves(batch), self._workload.device),
                saved=[],
                gradients={},
            )
            for batch in microbatches
        ]
        try:
            return self._train(model, rule, runs, step)
        finally:
            # All given back already, unless the step was cut short.
            self._memory.give_all("activations")

    def _train(
        self, model: CompiledModel, rule: UpdateRule, runs: Sequence[_Microbatch], step: int
    ) -> StepResult:
        scale, buffers = rule.loss_scale, dict(self._buffers)
        self._forward(model, runs, step, keep=True)
        losses = [run.values[model.program.loss] for run in runs]
        if self._workload.guard_loss and any(nonfinite_loss(loss) for loss in losses):
            self._buffers = buffers
            return StepResult(loss=mean_of(losses), applied=False)
        metrics: dict[str, list[tuple[torch.Tensor, ...]]] = {}
        for run in runs:
            for name, tensors in model.metric_values(run.values).items():
                metrics.setdefault(name, []).extend(tensors)
            run.gradients = model.seed_gradients(run.values, scale / len(runs))
        decision = self._backward(model, runs, step)
        return StepResult(
            loss=mean_of(losses),
            applied=decision.apply,
            grad_norm=decision.grad_norm,
            loss_scale=scale if rule.scales_loss else None,
            metrics=metrics,
        )

    def eval_step(self, batch: Batch, *, step: int) -> StepResult:
        model = self._last_model = self._workload.evaluation_model()
        values = model.feed(self._workload.leaves(batch), self._workload.device)
        run = _Microbatch(values=values, saved=[], gradients={})
        self._forward(model, [run], step, keep=False)
        return StepResult(
            loss=values[model.program.loss].detach().cpu(), metrics=model.metric_values(values)
        )

    def _forward(
        self, model: CompiledModel, runs: Sequence[_Microbatch], step: int, *, keep: bool
    ) -> None:
        with closing(self._stream(model.layers)) as layers:
            for _, compiled, weights in layers:
                for index, run in enumerate(runs):
                    key = self._workload.key(step, index)
                    saved = compiled.forward(key, weights, self._buffers, run.values)
                    if keep:
                        self._memory.take("activations", compiled.functions.saved_bytes)
                        run.saved.append(saved)

    def _backward(self, model: CompiledModel, runs: Sequence[_Microbatch], step: int) -> Decision:
        """Gradients of every layer, last layer first; updates are started or put off."""
        rule = self._rule
        assert rule is not None
        learning_rate = self._workload.learning_rate_at(step)
        sums: dict[str, torch.Tensor] = {}
        norms: dict[str, torch.Tensor] = {}
        waiting: dict[int, dict[str, torch.Tensor]] = {}
        at_once = Decision(apply=True)
        with closing(self._stream(model.layers, backward=True)) as layers:
            for index, compiled, weights in layers:
                layer_sums = self._layer_gradients(compiled, weights, runs)
                for name, gradient in layer_sums.items():
                    sums[name] = sums[name].add_(gradient) if name in sums else gradient
                done = {n: sums.pop(n) for n in self._complete(index) if n in sums}
                if not done:
                    continue
                rule.unscale_(list(done.values()))
                norms.update(rule.norms(done))
                if rule.needs_all_gradients:
                    waiting[index] = done
                else:
                    update = _PendingUpdate(
                        gradients=done, decision=at_once, learning_rate=learning_rate
                    )
                    self._hand_over(index, update)
                    self._on_store(self._apply_pending, self._shards[index])
        decision = rule.decide(norms, self._workload.trained)
        for index, gradients in waiting.items() if decision.apply else ():
            update = _PendingUpdate(
                gradients=gradients, decision=decision, learning_rate=learning_rate
            )
            self._hand_over(index, update)
        return decision

    def _complete(self, index: int) -> tuple[str, ...]:
        """Weights whose gradients are whole once layer `index` has run backward: those it owns."""
        return self._shards[index].trained if index < len(self._shards) else ()

    def _layer_gradients(
        self,
        compiled: CompiledLayer,
        weights: list[torch.Tensor],
        runs: Sequence[_Microbatch],
    ) -> dict[str, torch.Tensor]:
        sums: dict[str, torch.Tensor] = {}
        for run in runs:
            grads = compiled.backward(weights, run.saved.pop(), run.gradients)
            self._memory.give("activations", compiled.functions.saved_bytes)
            add_gradients(sums, compiled.layer.parameters, grads)
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

    # ------------------------------------------------------------------ streaming

    def _stream(
        self, layers: Sequence[CompiledLayer], *, backward: bool = False
    ) -> Generator[tuple[int, CompiledLayer, list[torch.Tensor]]]:
        """Each layer with its weights on the device, the following ones already on their way."""
        order = list(enumerate(layers))
        if backward:
            order.reverse()
        ahead: deque[Future[list[torch.Tensor]]] = deque()
        requested = 0
        try:
            for position, (index, compiled) in enumerate(order):
                while requested < min(position + 1 + self._prefetch_depth, len(order)):
                    ahead.append(self._on_store(self._fetch, order[requested][1]))
                    requested += 1
                weights = ahead.popleft().result()
                try:
                    yield index, compiled, weights
                finally:
                    self._memory.give("weights", _num_bytes(weights))
        finally:
            for future in ahead:
                if future.exception() is None:
                    self._memory.give("weights", _num_bytes(future.result()))

    def _fetch(self, compiled: CompiledLayer) -> list[torch.Tensor]:
        """On the store thread: apply what is pending for these weights, then bring them over."""
        names = compiled.layer.parameters
        for shard in {self._shard_of[name].index: self._shard_of[name] for name in names}.values():
            self._apply_pending(shard)
        weights = [weight.to(self._workload.device) for weight in self._store.fetch(names)]
        self._memory.take("weights", _num_bytes(weights))
        self._counters["layers fetched"] += 1
        self._counters["bytes fetched"] += _num_bytes(weights)
        return weights

    def _hand_over(self, index: int, update: _PendingUpdate) -> None:
        """Give a layer's gradients to the store; every earlier request has been answered by then,
        or asks for other layers."""
        self._on_store(self._pending.__setitem__, index, update)

    def _apply_pending(self, shard: Shard) -> None:
        """On the store thread: clip and apply the update that waits for this shard, if any."""
        update = self._pending.pop(shard.index, None)
        if update is None:
            return
        assert self._rule is not None
        gradients = {name: gradient.cpu() for name, gradient in update.gradients.items()}
        self._counters["bytes returned"] += _num_bytes(list(gradients.values()))
        self._rule.clip_(list(gradients.values()), update.decision)
        self._store.update(shard, gradients, update.learning_rate)

    def _on_store(self, function: Callable[..., _T], *arguments: Any) -> Future[_T]:
        """Queue work for the store thread; a failure of it surfaces at the next request."""
        if self._failed is not None:
            self._told = True
            raise self._failed
        future = self._thread.submit(function, *arguments)
        future.add_done_callback(self._note_failure)
        return future

    def _note_failure(self, future: Future[Any]) -> None:
        self._failed = self._failed or future.exception()

    def _flush(self) -> None:
        """Apply every pending update; after this the store is as of the last step."""
        for shard in self._shards:
            self._on_store(self._apply_pending, shard).result()

    # ------------------------------------------------------------------ state

    def state(self) -> ModelState:
        self._flush()
        return ModelState(
            model=state_dict_of(self._workload, self._store.weights(), self._buffers),
            optimizer=self._store.optimizer_state(),
            loss_scale=self._rule.state() if self._rule else {},
        )

    def load_state(self, state: ModelState, *, weights_only: bool = False) -> None:
        self._flush()
        weights = {n: state.model[n] for n in self._workload.weights if n in state.model}
        self._store.load(weights, {} if weights_only else state.optimizer)
        self._workload.load_into(state.model, {}, self._buffers)
        if self._rule is not None and not weights_only:
            self._rule.load_state(state.loss_scale)

    def explain_nonfinite(self, microbatches: Sequence[Batch], *, step: int) -> str:
        self._flush()

        def weights_of(names: Sequence[str]) -> list[torch.Tensor]:
            return [weight.to(self._workload.device) for weight in self._store.fetch(names)]

        assert self._last_model is not None, "asked before any step"
        buffers = dict(self._buffers)
        return first_nonfinite(
            self._workload, self._last_model, microbatches, step, weights_of, buffers
        )

    def counters(self) -> Mapping[str, int]:
        return {**self._counters, "peak device bytes": self._memory.peak_bytes}

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        if self._failed is not None and not self._told:
            _log.error("the weight store failed in the last step: %s", self._failed)
        self._store.close()


def _num_bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
