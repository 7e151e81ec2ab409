"""The plain PyTorch loop's step: eager forward, autograd, a torch optimizer.

Decides how a step runs without the compiler. It is what a user gets without `--cs_ip`, and the
reference that both execution modes are tested against, so it shares with them only what defines the
numbers: random draws, clipping and scaling, and the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from openwafer.config.optimizer import OptimizerConfig
from openwafer.errors import OpenWaferError
from openwafer.frontends.torch.capture import extract_loss
from openwafer.frontends.torch.metrics import capture_metrics
from openwafer.frontends.torch.user_code import calling_user_code
from openwafer.optim.build import build_optimizer, set_learning_rate
from openwafer.optim.state import load_optimizer_state, optimizer_state
from openwafer.runtime.executor import Batch, Executor, ModelState, StepResult
from openwafer.runtime.randomness import DrawKey, KeyedDraws
from openwafer.runtime.update import UpdateRule
from openwafer.runtime.workload import mean_of, nothing_to_train

__all__ = ["PlainExecutor"]

Metrics = dict[str, list[tuple[torch.Tensor, ...]]]


class PlainExecutor(Executor):
    """Steps of ordinary PyTorch on one device.

    Args:
        model: the module that holds the weights.
        call: the user's `model(batch)`, giving the loss or an output with it.
        modules: every module `call` runs, put into training or evaluation mode together.
        optimizer: None for evaluation only.
        autocast_dtype: 16-bit compute; None computes in fp32.
        guard_loss: stop before the update when a loss is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Callable[[Batch], Any],
        modules: Sequence[nn.Module],
        *,
        optimizer: OptimizerConfig | None,
        learning_rate_at: Callable[[int], float],
        device: torch.device,
        seed: int,
        autocast_dtype: torch.dtype | None = None,
        guard_loss: bool = True,
    ) -> None:
        self._model, self._call, self._modules = model, call, tuple(modules)
        self._learning_rate_at, self._device, self._seed = learning_rate_at, device, seed
        self._autocast_dtype, self._guard_loss = autocast_dtype, guard_loss
        self._trained = {n: w for n, w in model.named_parameters() if w.requires_grad}
        self._rule = UpdateRule(optimizer) if optimizer else None
        self._optimizer = build_optimizer(optimizer, self._trained) if optimizer else None
        self._copied: dict[str, torch.Tensor] | None = None
        self._changing: list[str] | None = None

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self._device.type, self._autocast_dtype)

    def _to_device(self, batch: Batch) -> Batch:
        def move(leaf: Any) -> Any:
            return leaf.to(self._device) if isinstance(leaf, torch.Tensor) else leaf

        return pytree.tree_map(move, batch)

    def _draws(self, step: int, index: int) -> KeyedDraws:
        return KeyedDraws(DrawKey(self._seed, step, index, 0))

    def _forward(self, batch: Batch, draws: KeyedDraws, metrics: Metrics) -> torch.Tensor:
        user_code = calling_user_code("the model failed on a batch", OpenWaferError)
        with user_code, capture_metrics() as calls, draws, self._autocast():
            loss = extract_loss(self._call(self._to_device(batch)))
        for metric, tensors in calls:
            detached = tuple(tensor.detach() for tensor in tensors)
            metrics.setdefault(metric.name, []).append(detached)
        return loss.reshape(())

    def _set_training(self, training: bool) -> None:
        for module in self._modules:
            module.train(training)

    def train_step(self, microbatches: Sequence[Batch], *, step: int) -> StepResult:
        rule, optimizer = self._rule, self._optimizer
        assert rule is not None
        assert optimizer is not None
        self._set_training(True)
        optimizer.zero_grad(set_to_none=True)
        scale, metrics = rule.loss_scale, Metrics()
        losses: list[torch.Tensor] = []
        buffers = self._changing_buffers() if self._guard_loss else {}
        for index, batch in enumerate(microbatches):
            draws = self._draws(step, index)
            loss = self._forward(batch, draws, metrics)
            losses.append(loss)
            if self._guard_loss and not bool(torch.isfinite(loss)):
                self._restore(buffers)
                optimizer.zero_grad(set_to_none=True)
                return StepResult(loss=loss.detach().cpu(), applied=False)
            if not loss.requires_grad:
                raise nothing_to_train()
            with draws if draws.recomputes else nullcontext():
                loss.backward(torch.full_like(loss, scale / len(microbatches)))
        grads = {n: w.grad for n, w in self._trained.items() if w.grad is not None}
        rule.unscale_(list(grads.values()))
        decision = rule.decide(rule.norms(grads), list(self._trained))
        if decision.apply:
            rule.clip_(list(grads.values()), decision)
            set_learning_rate(optimizer, self._learning_rate_at(step))
            optimizer.step()
        return StepResult(
            loss=mean_of(losses),
            applied=decision.apply,
            grad_norm=decision.grad_norm,
            loss_scale=scale if rule.scales_loss else None,
            metrics=metrics,
        )

    def _changing_buffers(self) -> dict[str, torch.Tensor]:
        """Copies of the buffers that training steps change: of all before the first two steps,
        then of those that the first one changed (batch statistics, not masks)."""
        held = dict(self._buffers())
        if self._copied is not None and self._changing is None:
            copied = self._copied
            self._changing = [n for n, b in held.items() if not torch.equal(b, copied[n])]
        names = held if self._changing is None else self._changing
        self._copied = {name: held[name].clone() for name in names}
        return self._copied

    def _buffers(self) -> list[tuple[str, torch.Tensor]]:
        return [
            (f"{index}.{name}", buffer)
            for index, module in enumerate(self._modules)
            for name, buffer in module.named_buffers()
        ]

    def _restore(self, buffers: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, buffer in self._buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])

    def eval_step(self, batch: Batch, *, step: int) -> StepResult:
        self._set_training(False)
        metrics = Metrics()
        with torch.no_grad():
            loss = self._forward(batch, self._draws(step, 0), metrics)
        return StepResult(loss=loss.detach().cpu(), metrics=metrics)

    def state(self) -> ModelState:
        optimizer = optimizer_state(self._optimizer) if self._optimizer else {}
        return ModelState(
            model={n: t.detach().cpu().clone() for n, t in self._model.state_dict().items()},
            optimizer={
                name: {
                    key: value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
                    for key, value in entries.items()
                }
                for name, entries in optimizer.items()
            },
            loss_scale=self._rule.state() if self._rule else {},
        )

    def load_state(self, state: ModelState, *, weights_only: bool = False) -> None:
        self._model.load_state_dict(state.model, strict=False)
        if weights_only or self._optimizer is None or self._rule is None:
            return
        if state.optimizer:
            load_optimizer_state(self._optimizer, None, state.optimizer)
        self._rule.load_state(state.loss_scale)

    def explain_nonfinite(self, microbatches: Sequence[Batch], *, step: int) -> str:
        """Name the first module whose output is not finite, by forward hooks."""
        found: list[str] = []

        def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
                if any(t.is_floating_point() and not bool(t.isfinite().all()) for t in leaves):
                    found.append(f"module {name or '(top)'} ({type(module).__name__})")

            return hook

        before = {name: buffer.clone() for name, buffer in self._buffers()}
        handles = [m.register_forward_hook(look(n)) for n, m in self._model.named_modules()]
        try:
            with torch.no_grad():
                for index, batch in enumerate(microbatches):
                    self._forward(batch, self._draws(step, index), {})
        finally:
            self._restore(before)
            for handle in handles:
                handle.remove()
        return f"{found[0]}: its output is the first that is not finite" if found else "the loss"
