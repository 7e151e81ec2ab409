"""One process of a pipeline: the weights, gradients and optimizer state of its stages.

Decides what a process holds, how gradients are summed between processes that hold the same weight
(stages with a tied weight, replicas), and that the update is the one a single process makes: one
global norm, one decision, in the model's order of weights. Does not decide the order of work
(pipeline_schedule.py) or where batches come from (pipeline_stages.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from openwafer.optim.build import build_optimizer, set_learning_rate
from openwafer.optim.state import load_optimizer_state, optimizer_state
from openwafer.runtime.executor import ModelState
from openwafer.runtime.gradients import sum_over_layers
from openwafer.runtime.process_group import ComputeGroup
from openwafer.runtime.stages.cuts import StagedModel
from openwafer.runtime.stages.layout import PipelineLayout
from openwafer.runtime.stages.messages import Mailbox
from openwafer.runtime.stages.run import SplitParts, StageRun
from openwafer.runtime.stages.schedule import Action, schedule_tables
from openwafer.runtime.update import UpdateRule
from openwafer.runtime.weight_copies import WeightCopies
from openwafer.runtime.workload import Workload

__all__ = ["Microbatches", "PassResult", "PipelineProcess"]

Microbatches = Sequence[Mapping[str, torch.Tensor]]
"""Per microbatch, batch entries by node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassResult:
    """What a training pass came to, alike in every process. losses: of all microbatches."""

    losses: torch.Tensor
    applied: bool
    grad_norm: float | None = None
    loss_scale: float | None = None


class PipelineProcess:
    """What one rank of the group holds and does (see the module header). Every process of the group
    must be asked for the same training passes, in the same order."""

    def __init__(self, workload: Workload, layout: PipelineLayout, group: ComputeGroup) -> None:
        self.workload, self.layout, self.group = workload, layout, group
        self.process = group.rank % layout.num_stages
        self.replica = group.rank // layout.num_stages
        self._first_rank = self.replica * layout.num_stages
        self._down, self._up = (group.subgroup(tuple(range(group.size))) for _ in range(2))
        self.weights = {
            name: weight.detach().to(group.device)
            for name, weight in workload.weights.items()
            if layout.holds_weight(self.process, name)
        }
        self._copies = WeightCopies(self.weights)
        self.buffers = {
            node: buffer.detach().to(group.device)
            for node, buffer in workload.buffers.items()
            if layout.holds_buffer(self.process, node)
        }
        self._split: SplitParts = {}
        self._tables: dict[int, tuple[tuple[Action, ...], ...]] = {}
        self.results: list[dict[str, torch.Tensor]] = []
        """Loss and metric values by node of the last pass, where this process computes them."""
        self.trained = tuple(name for name in workload.trained if name in self.weights)
        self._shared = self._groups_of_shared_weights()
        self._rule: UpdateRule | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        if workload.train is not None:
            assert workload.optimizer is not None
            self._rule = UpdateRule(workload.optimizer)
            if self.trained:
                held = {name: self.weights[name] for name in self.trained}
                self._optimizer = build_optimizer(workload.optimizer, held)

    def owns(self, name: str) -> bool:
        """Whether this process answers for a weight (by name) or buffer (by node)."""
        return self.layout.owner(name) == self.process

    def _groups_of_shared_weights(self) -> dict[str, Any]:
        """By trained weight that several ranks hold, their group. Made alike in every process."""
        groups: dict[tuple[int, ...], Any] = {}
        found: dict[str, Any] = {}
        main, layout = self.layout.main, self.layout
        reached = main.model.trained
        for name in self.workload.trained:
            if name not in reached:
                continue
            ranks = tuple(
                replica * layout.num_stages + process
                for replica in range(layout.num_replicas)
                for process in main.holders.get(name, (0,))
            )
            if len(ranks) == 1:
                continue
            if ranks not in groups:
                groups[ranks] = self.group.subgroup(ranks)
            if self.group.rank in ranks:
                found[name] = groups[ranks]
        return found

    # ------------------------------------------------------------------ passes

    def train(self, microbatches: Microbatches, *, step: int, num_microbatches: int) -> PassResult:
        """One training step of the whole group.

        Args:
            microbatches: those of this replica, `num_microbatches / num_replicas`.
            num_microbatches: of all replicas.

        Raises:
            LaunchError: another process is gone.
        """
        staged, rule = self.layout.train, self._rule
        assert staged is not None
        assert rule is not None
        first = self.replica * len(microbatches)
        before = dict(self.buffers)
        run = StageRun(
            staged,
            self._mail(staged, self._training_tables(len(microbatches))),
            inputs=[self._on_device(inputs) for inputs in microbatches],
            weights_of=self._copies.taken_by,
            buffers=self.buffers,
            key_of=lambda index: self.workload.key(step, first + index),
            seed=rule.loss_scale / num_microbatches,
            split=self._split,
        )
        run.run(self._training_tables(len(microbatches))[self.process])
        self.results = run.results
        losses = self._all_losses(staged, run.results, first, num_microbatches)
        if self.workload.guard_loss and not bool(torch.isfinite(losses).all()):
            self.buffers = before
            return PassResult(losses=losses, applied=False)
        return self._update(run.parts, losses, step)

    def evaluate(self, inputs: Mapping[str, torch.Tensor], *, step: int) -> None:
        """Forward on one batch; `results` has what this process computed of it. Replica 0 only."""
        staged = self.layout.evaluation
        assert staged is not None
        tables = tuple(
            tuple(Action("F", stage.index, 0) for stage in staged.of_process(process))
            for process in range(self.layout.num_stages)
        )
        run = StageRun(
            staged,
            self._mail(staged, tables),
            inputs=[self._on_device(inputs)],
            weights_of=self._copies.taken_by,
            buffers=self.buffers,
            key_of=lambda index: self.workload.key(step, index),
            seed=None,
            split=self._split,
        )
        run.run(tables[self.process])
        self.results = run.results

    def _training_tables(self, count: int) -> tuple[tuple[Action, ...], ...]:
        if count not in self._tables:
            self._tables[count] = schedule_tables(
                self.layout.schedule, self.layout.num_stages, count
            )
        return self._tables[count]

    def _mail(self, staged: StagedModel, tables: Sequence[Sequence[Action]]) -> Mailbox:
        return Mailbox(
            self.group,
            staged,
            self.process,
            first_rank=self._first_rank,
            down=self._down,
            up=self._up,
            tables=tables,
        )

    def _on_device(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.group.device) for name, tensor in inputs.items()}

    def _all_losses(
        self,
        staged: StagedModel,
        results: Sequence[Mapping[str, torch.Tensor]],
        first: int,
        count: int,
    ) -> torch.Tensor:
        """The losses of all replicas' microbatches, on the host, in every process."""
        loss = staged.model.program.loss
        found = torch.zeros(count, dtype=torch.float64)
        for index, values in enumerate(results):
            if loss in values:
                found[first + index] = values[loss].detach().double().cpu()
        with self.group.watching():
            dist.all_reduce(found)
        return found

    # ------------------------------------------------------------------ update

    def _update(
        self, parts: Mapping[int, dict[str, torch.Tensor]], losses: torch.Tensor, step: int
    ) -> PassResult:
        rule, optimizer = self._rule, self._optimizer
        assert rule is not None
        gradients = sum_over_layers([parts[index] for index in sorted(parts)])
        self._sum_over_processes(gradients)
        scale = rule.loss_scale if rule.scales_loss else None
        rule.unscale_(list(gradients.values()))
        decision = rule.decide(self._all_norms(rule, gradients), self.workload.trained)
        if decision.apply and optimizer is not None:
            rule.clip_(list(gradients.values()), decision)
            for name, gradient in gradients.items():
                self.weights[name].grad = gradient
            set_learning_rate(optimizer, self.workload.learning_rate_at(step))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self._copies.renew()
        return PassResult(
            losses=losses, applied=decision.apply, grad_norm=decision.grad_norm, loss_scale=scale
        )

    def _sum_over_processes(self, gradients: dict[str, torch.Tensor]) -> None:
        """Add what the other holders of a weight found; every holder gets the same sum."""
        works: list[Any] = []
        with self.group.watching():
            for name, group in self._shared.items():
                if name not in gradients:
                    # Its gradient comes by another stage alone, which sends it here all the same.
                    gradients[name] = torch.zeros_like(self.weights[name])
                works.append(dist.all_reduce(gradients[name], group=group, async_op=True))
            for work in works:
                work.wait()

    def _all_norms(
        self, rule: UpdateRule, gradients: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The norm of every weight's gradient, each told by one process."""
        if not rule.needs_all_gradients:
            return {}
        own = {
            name: gradient
            for name, gradient in gradients.items()
            if self.replica == 0 and self.owns(name)
        }
        order = {name: i for i, name in enumerate(self.workload.trained)}
        told = torch.zeros(2, len(order))
        for name, norm in rule.norms(own).items():
            told[0, order[name]] = norm.cpu()
            told[1, order[name]] = 1
        with self.group.watching():
            dist.all_reduce(told)
        return {name: told[0, i] for name, i in order.items() if told[1, i]}

    # ------------------------------------------------------------------ state

    def own_state(self) -> dict[str, dict[str, Any]]:
        """Copies on the host of what this process answers for: "weights" by name, "buffers" by
        node, "optimizer" by name and entry; and "loss_scale", which all have alike."""
        optimizer: Mapping[str, Mapping[str, Any]] = {}
        if self._optimizer is not None:
            owned = [name for name in self.trained if self.owns(name)]
            optimizer = optimizer_state(self._optimizer, owned)
        return {
            "weights": {n: _on_host(t) for n, t in self.weights.items() if self.owns(n)},
            "buffers": {n: _on_host(t) for n, t in self.buffers.items() if self.owns(n)},
            "optimizer": {
                name: {key: _on_host(value) for key, value in entries.items()}
                for name, entries in optimizer.items()
            },
            "loss_scale": self._rule.state() if self._rule else {},
        }

    def load_state(self, state: ModelState, *, weights_only: bool) -> None:
        """Take over what concerns this process of a whole model's state."""
        self.workload.load_into(state.model, self.weights, self.buffers)
        self._copies.renew()
        if weights_only or self._rule is None:
            return
        if state.optimizer and self._optimizer is not None:
            load_optimizer_state(self._optimizer, self.trained, state.optimizer)
        self._rule.load_state(state.loss_scale)


def _on_host(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
