"""Layer pipelined execution: all layers resident, samples flow through.

Decides the order of work when every weight, gradient and optimizer state stays on the device: each
microbatch through all layers and back, then one update. On one device there is one stage. Does not
decide what a layer computes or how gradients become an update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from openwafer.optim.build import build_optimizer, set_learning_rate
from openwafer.optim.state import load_optimizer_state, optimizer_state
from openwafer.runtime.compiled import CompiledModel
from openwafer.runtime.executor import Batch, Executor, ModelState, StepResult
from openwafer.runtime.gradients import add_gradients, sum_over_layers
from openwafer.runtime.inspect import first_nonfinite, nonfinite_loss
from openwafer.runtime.memory.host_memory import keep_freed_memory
from openwafer.runtime.update import UpdateRule
from openwafer.runtime.weight_copies import WeightCopies
from openwafer.runtime.workload import Workload, mean_of, state_dict_of

__all__ = ["LayerPipelined"]


class LayerPipelined(Executor):
    """All layers on one device (see the module header)."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        if workload.device.type == "cpu":
            keep_freed_memory()
        self._weights = {
            name: weight.detach().to(workload.device) for name, weight in workload.weights.items()
        }
        self._buffers = {
            node: buffer.detach().to(workload.device) for node, buffer in workload.buffers.items()
        }
        self._copies = WeightCopies(self._weights)
        self._last_model: CompiledModel | None = None
        self._rule: UpdateRule | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        if workload.train is not None:
            assert workload.optimizer is not None
            self._rule = UpdateRule(workload.optimizer)
            trained = {name: self._weights[name] for name in workload.trained}
            self._optimizer = build_optimizer(workload.optimizer, trained)

    def train_step(self, microbatches: Sequence[Batch], *, step: int) -> StepResult:
        model, rule = self._workload.training_model(), self._rule
        self._last_model = model
        assert rule is not None
        seed_scale = rule.loss_scale / len(microbatches)
        losses: list[torch.Tensor] = []
        metrics: dict[str, list[tuple[torch.Tensor, ...]]] = {}
        parts: list[dict[str, torch.Tensor]] = [{} for _ in model.layers]
        buffers = dict(self._buffers)
        for index, batch in enumerate(microbatches):
            values = model.feed(self._workload.leaves(batch), self._workload.device)
            saved = self._forward(model, values, step, index)
            losses.append(values[model.program.loss])
            for name, tensors in model.metric_values(values).items():
                metrics.setdefault(name, []).extend(tensors)
            if self._workload.guard_loss and nonfinite_loss(losses[-1]):
                self._buffers = buffers
                return StepResult(loss=losses[-1].detach().cpu(), applied=False)
            self._backward(model, model.seed_gradients(values, seed_scale), saved, parts)
        applied, norm, scale = self._update(parts, step)
        return StepResult(
            loss=mean_of(losses),
            applied=applied,
            grad_norm=norm,
            loss_scale=scale,
            metrics=metrics,
        )

    def _forward(
        self, model: CompiledModel, values: dict[str, torch.Tensor], step: int, microbatch: int
    ) -> list[Sequence[torch.Tensor]]:
        key = self._workload.key(step, microbatch)
        return [
            compiled.forward(key, self._copies.taken_by(compiled), self._buffers, values)
            for compiled in model.layers
        ]

    def _backward(
        self,
        model: CompiledModel,
        gradients: dict[str, torch.Tensor],
        saved: list[Sequence[torch.Tensor]],
        parts: list[dict[str, torch.Tensor]],
    ) -> None:
        """Add this microbatch's gradients to each layer's own sums."""
        for index in range(len(model.layers) - 1, -1, -1):
            compiled = model.layers[index]
            grads = compiled.backward(self._copies.taken_by(compiled), saved.pop(), gradients)
            add_gradients(parts[index], compiled.layer.parameters, grads)

    def _update(
        self, parts: list[dict[str, torch.Tensor]], step: int
    ) -> tuple[bool, float | None, float | None]:
        rule, optimizer = self._rule, self._optimizer
        assert rule is not None
        assert optimizer is not None
        gradients = sum_over_layers(parts)
        scale = rule.loss_scale if rule.scales_loss else None
        rule.unscale_(list(gradients.values()))
        decision = rule.decide(rule.norms(gradients), self._workload.trained)
        if decision.apply:
            rule.clip_(list(gradients.values()), decision)
            for name, gradient in gradients.items():
                self._weights[name].grad = gradient
            set_learning_rate(optimizer, self._workload.learning_rate_at(step))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self._copies.renew()
        return decision.apply, decision.grad_norm, scale

    def eval_step(self, batch: Batch, *, step: int) -> StepResult:
        model = self._last_model = self._workload.evaluation_model()
        values = model.feed(self._workload.leaves(batch), self._workload.device)
        self._forward(model, values, step, 0)
        return StepResult(
            loss=values[model.program.loss].detach().cpu(), metrics=model.metric_values(values)
        )

    def state(self) -> ModelState:
        optimizer: Mapping[str, Mapping[str, Any]] = {}
        if self._optimizer is not None:
            optimizer = optimizer_state(self._optimizer, self._workload.trained)
        return ModelState(
            model=state_dict_of(self._workload, self._weights, self._buffers),
            optimizer={
                name: {k: _host_copy(v) for k, v in entries.items()}
                for name, entries in optimizer.items()
            },
            loss_scale=self._rule.state() if self._rule else {},
        )

    def load_state(self, state: ModelState, *, weights_only: bool = False) -> None:
        self._workload.load_into(state.model, self._weights, self._buffers)
        self._copies.renew()
        if weights_only or self._optimizer is None or self._rule is None:
            return
        if state.optimizer:
            load_optimizer_state(self._optimizer, self._workload.trained, state.optimizer)
        self._rule.load_state(state.loss_scale)

    def explain_nonfinite(self, microbatches: Sequence[Batch], *, step: int) -> str:
        assert self._last_model is not None, "asked before any step"
        buffers = dict(self._buffers)

        def weights_of(names: Sequence[str]) -> list[torch.Tensor]:
            return [self._weights[name] for name in names]

        return first_nonfinite(
            self._workload, self._last_model, microbatches, step, weights_of, buffers
        )


def _host_copy(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
