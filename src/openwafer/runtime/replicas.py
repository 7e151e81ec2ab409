"""Weight streaming by several processes, each with a part of every batch and of the store.

Decides how rank 0, which has the training loop and the data, drives the others: what it tells them,
and what comes back. A process other than 0 calls `serve_replica` and does as told until it is told
to stop. Does not decide what a process does in a step (weight_streaming.py, replica.py) or how a
state is put together and divided (replica_state.py).

Messages from rank 0, by `ComputeGroup.send_tree`, to every process:
    {"do": "train", "step", "batches"}    batches: of its microbatches, the entries by path
    {"do": "lend"}                        its weights for an evaluation by rank 0
    {"do": "state"}                       answered by what its part consists of
    {"do": "tensor", "number"}            answered by one tensor of that
    {"do": "look", "files"}               answered by whether it sees them, and its weights' names
    {"do": "load", "state", "files", "weights_only"}
    {"do": "stop"}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from openwafer.errors import PlanError
from openwafer.runtime.elsewhere import brought, brought_state
from openwafer.runtime.executor import Batch, Executor, ModelState, StepResult
from openwafer.runtime.inspect import first_nonfinite
from openwafer.runtime.process_group import ComputeGroup
from openwafer.runtime.replica_state import (
    LentState,
    ask_for_state,
    read_state,
    sees_files,
    send_state,
)
from openwafer.runtime.weight_streaming import WeightStreaming
from openwafer.runtime.workload import Workload, state_dict_of

__all__ = ["ReplicatedStreaming", "refuse_changing_buffers", "serve_replica"]


def refuse_changing_buffers(workload: Workload) -> None:
    """Batch statistics follow one microbatch after another, which replicas cannot.

    Raises:
        PlanError: the model has buffers that training changes.
    """
    model = workload.train
    if model is None:
        return
    names = model.changing_buffers
    if names:
        raise PlanError(
            f"replicas cannot share {', '.join(map(str, names[:4]))}: each microbatch changes it "
            "in turn",
            where="--num_csx",
            allowed="models whose buffers stay as they are (no batch normalization)",
            hint="--num_csx 1, or normalize by group or layer",
        )


class ReplicatedStreaming(Executor):
    """The executor of rank 0: drives the group and computes its own part.

    Args:
        executor: this process's, over its part of the store.
    """

    def __init__(self, workload: Workload, executor: WeightStreaming, group: ComputeGroup) -> None:
        self._workload, self._executor, self._group = workload, executor, group
        self._trained_last = True

    def train_step(self, microbatches: Sequence[Batch], *, step: int) -> StepResult:
        self._trained_last = True
        count, size = len(microbatches), self._group.size
        if count % size:
            raise PlanError(
                f"{count} microbatches do not divide among {size} replicas",
                where="--num_csx",
                allowed=f"a multiple of {size} for each step",
                hint=f"a batch_size or grad_accum_steps that {size} divides",
            )
        entries = [self._entries(batch) for batch in microbatches]
        per_replica = count // size
        for rank in range(1, size):
            own = entries[rank * per_replica : (rank + 1) * per_replica]
            self._group.send_tree({"do": "train", "step": step, "batches": own}, rank)
        result = self._executor.train_step(microbatches[:per_replica], step=step)
        return replace(result, metrics=self._metrics_of_all(result))

    def _entries(self, batch: Batch) -> dict[str, torch.Tensor]:
        """What the model reads of a batch, by path; checked here, before anybody else sees it."""
        model = self._workload.training_model()
        values = model.feed(self._workload.leaves(batch), torch.device("cpu"))
        return {entry.path: values[entry.node] for entry in model.program.inputs}

    def _metrics_of_all(self, result: StepResult) -> dict[str, list[tuple[torch.Tensor, ...]]]:
        """Of every microbatch of the step, in order."""
        metrics = {name: list(values) for name, values in result.metrics.items()}
        for rank in range(1, self._group.size) if metrics else ():
            for name, values in self._group.receive_tree(rank).items():
                metrics[name].extend(tuple(one) for one in values)
        return metrics

    def eval_step(self, batch: Batch, *, step: int) -> StepResult:
        """Here alone: one batch has one loss. The others lend their weights."""
        self._trained_last = False
        self._group.tell_all({"do": "lend"})
        return self._executor.eval_step(batch, step=step)

    # ------------------------------------------------------------------ state

    def state(self) -> ModelState:
        """The whole model here."""
        return brought_state(self.borrowed_state()).copied()

    def borrowed_state(self) -> ModelState:
        """This process's part as it is, and stand-ins for the others' large tensors."""
        own = self._executor.own_state()
        for rank in range(1, self._group.size):
            told = ask_for_state(self._group, rank)
            own["weights"].update(told["weights"])
            own["optimizer"].update(told["optimizer"])
        workload = self._workload
        return ModelState(
            model=state_dict_of(workload, own["weights"], own["buffers"], copied=False),
            optimizer={n: own["optimizer"][n] for n in workload.trained if n in own["optimizer"]},
            loss_scale=own["loss_scale"],
        )

    def load_state(self, state: ModelState, *, weights_only: bool = False) -> None:
        programs = self._workload.programs()
        buffers = {buffer.name for program in programs for buffer in program.buffers}
        send_state(self._group, state, buffers, weights_only=weights_only)
        self._executor.load_state(state, weights_only=weights_only)

    def explain_nonfinite(self, microbatches: Sequence[Batch], *, step: int) -> str:
        """With each layer's weights brought here: it happens once, and then the run ends."""
        weights = self.borrowed_state().model
        workload, buffers = self._workload, self._executor.own_state()["buffers"]
        model = workload.training_model() if self._trained_last else workload.evaluation_model()
        dtypes = {
            one.layer.parameters: [streamed.dtype for streamed in one.streamed]
            for one in model.layers
        }

        def weights_of(names: Sequence[str]) -> list[torch.Tensor]:
            pairs = zip(names, dtypes[tuple(names)], strict=True)
            return [brought(weights[name]).to(workload.device, dtype) for name, dtype in pairs]

        return first_nonfinite(workload, model, microbatches, step, weights_of, dict(buffers))

    def counters(self) -> Mapping[str, int]:
        return self._executor.counters()

    def close(self) -> None:
        self._group.dismiss()
        self._executor.close()
        self._group.close()


def serve_replica(executor: WeightStreaming, group: ComputeGroup) -> None:
    """Do what rank 0 says until it says stop.

    Args:
        executor: this process's; its batches are dicts of entries by path.

    Raises:
        LaunchError: rank 0 or another process is gone.
    """
    lent = LentState()
    try:
        while (message := group.receive_tree(0))["do"] != "stop":
            _obey(executor, group, lent, message)
    finally:
        executor.close()
        group.close()


def _obey(
    executor: WeightStreaming, group: ComputeGroup, lent: LentState, message: Mapping[str, Any]
) -> None:
    what = message["do"]
    if what == "train":
        lent.forget()
        result = executor.train_step(message["batches"], step=message["step"])
        if result.metrics:
            group.send_tree({n: [_on_host(one) for one in v] for n, v in result.metrics.items()}, 0)
    elif what == "lend":
        executor.lend_weights()
    elif what == "state":
        group.send_tree(lent.told(executor.own_state()), 0)
    elif what == "tensor":
        group.send_tree(lent.tensor(message["number"]), 0)
    elif what == "look":
        names = list(executor.own_state()["weights"])
        group.send_tree({"sees": sees_files(message["files"]), "names": names}, 0)
    elif what == "load":
        executor.load_state(read_state(message), weights_only=message["weights_only"])


def _on_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().cpu() for tensor in tensors]
