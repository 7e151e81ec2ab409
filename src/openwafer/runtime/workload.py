"""What an executor is given: the compiled model, the weights to begin with, and the run's rules.

Decides the value that both executors are built from, and how weights and buffers become a
state_dict and come back. Does not decide anything about the order of work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from openwafer.config.optimizer import OptimizerConfig
from openwafer.errors import PlanError
from openwafer.graph.program import Program
from openwafer.runtime.compiled import CompiledModel
from openwafer.runtime.executor import Batch
from openwafer.runtime.randomness import DrawKey

__all__ = ["Workload", "mean_of", "nothing_to_train", "state_dict_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Everything about a run that does not depend on the execution mode.

    train, evaluation: the two forms of the model; either may be absent.
    weights: by state_dict name, fp32, on the host, tied weights once.
    buffers: by placeholder node, constants too.
    trained: names of the weights that get gradients, in the model's order.
    leaves: turns a batch into `{path: tensor}`.
    guard_loss: stop before the update when a loss is not finite.
    """

    train: CompiledModel | None
    evaluation: CompiledModel | None
    weights: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    trained: tuple[str, ...]
    optimizer: OptimizerConfig | None
    learning_rate_at: Callable[[int], float]
    leaves: Callable[[Batch], Mapping[str, Any]]
    device: torch.device
    seed: int
    guard_loss: bool = True

    def __post_init__(self) -> None:
        if self.train is not None and self.train.trained.isdisjoint(self.trained):
            raise nothing_to_train()

    def training_model(self) -> CompiledModel:
        if self.train is None:
            raise PlanError("this plan is for evaluation", hint="compile it with --mode train")
        return self.train

    def evaluation_model(self) -> CompiledModel:
        if self.evaluation is None:
            raise PlanError("this plan is for training", hint="compile it with --mode eval")
        return self.evaluation

    def programs(self) -> list[Program]:
        return [model.program for model in (self.train, self.evaluation) if model is not None]

    def key(self, step: int, microbatch: int) -> DrawKey:
        return DrawKey(self.seed, step, microbatch, 0)

    def load_into(
        self,
        state_dict: Mapping[str, torch.Tensor],
        weights: Mapping[str, torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
    ) -> None:
        """Copy a state_dict's tensors into weights and buffers of the same names, in place."""
        with torch.no_grad():
            for name, weight in weights.items():
                if name in state_dict:
                    weight.copy_(state_dict[name])
            for program in self.programs():
                for buffer in program.buffers:
                    if buffer.name in state_dict and buffer.node in buffers:
                        buffers[buffer.node].copy_(state_dict[buffer.name])


def nothing_to_train() -> PlanError:
    """The error for a model whose loss no gradient leaves."""
    return PlanError(
        "the loss depends on no trainable weight: there is nothing to train",
        allowed="a loss that some weight with requires_grad has an influence on",
        hint="look for .detach(), torch.no_grad() and requires_grad_(False); "
        "--mode eval needs no gradients",
    )


def state_dict_of(
    workload: Workload,
    weights: Mapping[str, torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
    *,
    copied: bool = True,
) -> dict[str, torch.Tensor]:
    """The user's state_dict on the host: weights under all their names, persistent buffers.

    Args:
        copied: False gives the weights themselves where they are on the host already.
    """
    program = workload.programs()[0]
    state: dict[str, torch.Tensor] = {}
    for parameter in program.parameters:
        value = weights[parameter.name].detach().cpu()
        value = value.clone() if copied else value
        for name in (parameter.name, *parameter.aliases):
            state[name] = value
    for buffer in program.buffers:
        if buffer.name and buffer.persistent:
            state[buffer.name] = buffers[buffer.node].detach().cpu().clone()
    return state


def mean_of(losses: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean of the microbatches' losses, on the host."""
    return torch.stack([loss.detach() for loss in losses]).mean().cpu()
