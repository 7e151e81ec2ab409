"""Layer pipelined execution over several processes.

Decides how rank 0, which has the training loop and the data, drives the others: what it tells them,
what comes back to it. A process other than 0 calls `serve` and does as told until it is told to
stop. Does not decide what a process does in a step (pipeline_process.py).

Messages from rank 0, by `ComputeGroup.send_tree`:
    {"do": "train", "step", "num_microbatches", "inputs"}    every process
    {"do": "evaluate", "step", "inputs"}                     replica 0
    {"do": "state"}                                          replica 0: answered by its part
    {"do": "load", "state", "weights_only"}                  every process
    {"do": "stop"}                                           every process
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from openwafer.errors import PlanError
from openwafer.runtime.compiled import CompiledModel
from openwafer.runtime.executor import Batch, Executor, ModelState, StepResult
from openwafer.runtime.inspect import first_nonfinite
from openwafer.runtime.process_group import ComputeGroup
from openwafer.runtime.stages.cuts import StagedModel
from openwafer.runtime.stages.layout import PipelineLayout
from openwafer.runtime.stages.process import PipelineProcess
from openwafer.runtime.workload import Workload, mean_of, state_dict_of

__all__ = ["PipelineStages", "own_part", "serve"]


class PipelineStages(Executor):
    """The executor of rank 0: drives the group and computes its own stages."""

    def __init__(self, workload: Workload, layout: PipelineLayout, group: ComputeGroup) -> None:
        self._process = PipelineProcess(workload, layout, group)
        self._workload, self._layout, self._group = workload, layout, group
        self._last_model: CompiledModel | None = None

    def train_step(self, microbatches: Sequence[Batch], *, step: int) -> StepResult:
        staged = self._layout.train
        assert staged is not None, "this plan is for evaluation"
        model = self._last_model = staged.model
        count, replicas = len(microbatches), self._layout.num_replicas
        if count % replicas:
            raise PlanError(
                f"{count} microbatches do not divide among {replicas} replicas",
                where="--num_microbatches",
                allowed=f"a multiple of {replicas} for each step",
            )
        fed = [self._feed(model, batch) for batch in microbatches]
        per_replica = count // replicas
        for rank in range(1, self._group.size):
            replica, process = divmod(rank, self._layout.num_stages)
            own = fed[replica * per_replica : (replica + 1) * per_replica]
            inputs = [_inputs_of(staged, process, values) for values in own]
            message = {"do": "train", "step": step, "num_microbatches": count, "inputs": inputs}
            self._group.send_tree(message, rank)
        inputs = [_inputs_of(staged, 0, values) for values in fed[:per_replica]]
        result = self._process.train(inputs, step=step, num_microbatches=count)
        return StepResult(
            loss=mean_of(list(result.losses.float())),
            applied=result.applied,
            grad_norm=result.grad_norm,
            loss_scale=result.loss_scale,
            metrics=self._metrics(staged, per_replica, train=True) if result.applied else {},
        )

    def eval_step(self, batch: Batch, *, step: int) -> StepResult:
        staged = self._layout.evaluation
        assert staged is not None, "this plan is for training"
        model = self._last_model = staged.model
        values = self._feed(model, batch)
        for process in range(1, self._layout.num_stages):
            inputs = _inputs_of(staged, process, values)
            self._group.send_tree({"do": "evaluate", "step": step, "inputs": inputs}, process)
        self._process.evaluate(_inputs_of(staged, 0, values), step=step)
        found = self._results(staged, range(self._layout.num_stages), 1)[0]
        return StepResult(loss=found[model.program.loss], metrics=model.metric_values(found))

    def _feed(self, model: CompiledModel, batch: Batch) -> Mapping[str, torch.Tensor]:
        return model.feed(self._workload.leaves(batch), torch.device("cpu"))

    def _metrics(
        self, staged: StagedModel, per_replica: int, *, train: bool
    ) -> dict[str, list[tuple[torch.Tensor, ...]]]:
        """Of all microbatches, in their order."""
        metrics: dict[str, list[tuple[torch.Tensor, ...]]] = {}
        if not staged.model.program.metrics:
            return metrics
        for values in self._results(staged, range(self._group.size), per_replica):
            for name, tensors in staged.model.metric_values(values).items():
                metrics.setdefault(name, []).extend(tensors)
        return metrics

    def _results(
        self, staged: StagedModel, ranks: Sequence[int], count: int
    ) -> list[dict[str, torch.Tensor]]:
        """Loss and metric values by node of each microbatch, from the processes that have them."""
        num_replicas = -(-len(ranks) // self._layout.num_stages)
        found: list[dict[str, torch.Tensor]] = [{} for _ in range(num_replicas * count)]
        for rank in ranks:
            replica, process = divmod(rank, self._layout.num_stages)
            if not _has_results(staged, process):
                continue
            told = self._group.receive_tree(rank) if rank else _on_host(self._process.results)
            for index, values in enumerate(told):
                found[replica * count + index].update(values)
        return found

    # ------------------------------------------------------------------ state

    def state(self) -> ModelState:
        whole, own = self._whole_state(), self._workload
        return ModelState(
            model=state_dict_of(own, whole["weights"], whole["buffers"]),
            optimizer={n: whole["optimizer"][n] for n in own.trained if n in whole["optimizer"]},
            loss_scale=whole["loss_scale"],
        )

    def _whole_state(self) -> dict[str, dict[str, Any]]:
        """`PipelineProcess.own_state` of all processes of a pipeline together."""
        whole = self._process.own_state()
        for process in range(1, self._layout.num_stages):
            self._group.send_tree({"do": "state"}, process)
            told = self._group.receive_tree(process)
            for part in ("weights", "buffers", "optimizer"):
                whole[part].update(told[part])
        return whole

    def load_state(self, state: ModelState, *, weights_only: bool = False) -> None:
        self._group.tell_to_load(
            lambda rank: self._part(state, rank % self._layout.num_stages),
            weights_only=weights_only,
        )
        self._process.load_state(state, weights_only=weights_only)

    def _part(self, state: ModelState, process: int) -> ModelState:
        """What a process holds of a state: it may have no room for the whole."""
        layout, programs = self._layout, self._workload.programs()
        held = {n for n in self._workload.weights if layout.holds_weight(process, n)}
        buffers = [b for program in programs for b in program.buffers]
        read = {b.name for b in buffers if layout.holds_buffer(process, b.node)}
        return ModelState(
            model={n: value for n, value in state.model.items() if n in held or n in read},
            optimizer={n: entries for n, entries in state.optimizer.items() if n in held},
            loss_scale=state.loss_scale,
        )

    def explain_nonfinite(self, microbatches: Sequence[Batch], *, step: int) -> str:
        """With all weights fetched here: it happens once, and then the run ends."""
        assert self._last_model is not None, "asked before any step"
        whole, device = self._whole_state(), self._workload.device
        weights = {name: tensor.to(device) for name, tensor in whole["weights"].items()}
        buffers = {node: tensor.to(device) for node, tensor in whole["buffers"].items()}
        return first_nonfinite(
            self._workload,
            self._last_model,
            microbatches,
            step,
            lambda names: [weights[name] for name in names],
            buffers,
        )

    def close(self) -> None:
        self._group.dismiss()
        self._group.close()


def own_part(workload: Workload, layout: PipelineLayout, rank: int) -> Workload:
    """A workload with copies of the weights and buffers of one rank's stages, and no others."""
    process = rank % layout.num_stages
    weights, buffers = workload.weights.items(), workload.buffers.items()
    return replace(
        workload,
        weights={n: value.clone() for n, value in weights if layout.holds_weight(process, n)},
        buffers={n: value.clone() for n, value in buffers if layout.holds_buffer(process, n)},
    )


def serve(workload: Workload, layout: PipelineLayout, group: ComputeGroup) -> None:
    """Do what rank 0 says until it says stop.

    Raises:
        LaunchError: rank 0 or another process is gone.
    """
    process = PipelineProcess(workload, layout, group)
    while (message := group.receive_tree(0))["do"] != "stop":
        _obey(process, message)
    group.close()


def _obey(process: PipelineProcess, message: Mapping[str, Any]) -> None:
    group, layout = process.group, process.layout
    what = message["do"]
    if what == "train":
        result = process.train(
            message["inputs"], step=message["step"], num_microbatches=message["num_microbatches"]
        )
        staged = layout.train
        assert staged is not None
        wanted = result.applied and bool(staged.model.program.metrics)
        if wanted and _has_results(staged, process.process):
            group.send_tree(_on_host(process.results), 0)
    elif what == "evaluate":
        process.evaluate(message["inputs"], step=message["step"])
        assert layout.evaluation is not None
        if _has_results(layout.evaluation, process.process):
            group.send_tree(_on_host(process.results), 0)
    elif what == "state":
        group.send_tree(process.own_state(), 0)
    elif what == "load":
        state = ModelState(**message["state"])
        process.load_state(state, weights_only=message["weights_only"])


def _inputs_of(
    staged: StagedModel, process: int, values: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The batch entries that a process reads."""
    return {name: values[name] for s in staged.of_process(process) for name in s.batch_inputs}


def _has_results(staged: StagedModel, process: int) -> bool:
    return any(stage.results for stage in staged.of_process(process))


def _on_host(results: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    return [{n: t.detach().cpu() for n, t in values.items()} for values in results]
