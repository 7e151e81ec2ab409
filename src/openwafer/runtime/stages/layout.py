"""Which process of a group runs which layers.

Decides the cut of both forms of a model: training by the plan's costs, evaluation so that every
layer finds its weights and its batch statistics in the same process. Decides too how many
microbatches a batch is split into where the user does not say. Does not run anything.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from openwafer.errors import PlanError
from openwafer.plan.plan import LayerPlan
from openwafer.runtime.compiled import CompiledLayer, CompiledModel
from openwafer.runtime.stages.cuts import StagedModel, balance, cut_into_stages, joined_layers
from openwafer.runtime.stages.schedule import ScheduleName, schedule_tables, stages_per_process

__all__ = ["PipelineLayout", "choose_split", "lay_out", "layer_cost"]

_log = logging.getLogger("openwafer")

MICROBATCHES_PER_STAGE = 4
"""Aimed at where the user does not say: the pipeline then stands idle for (stages - 1) of
(5 · stages - 1) parts of the time at most, less than a fifth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineLayout:
    """How the ranks of a group are shared out: replica r has the ranks from `r * num_stages` on.

    num_stages: processes of one pipeline.
    train, evaluation: the two forms of the model in stages; either may be absent.
    """

    num_stages: int
    num_replicas: int
    schedule: ScheduleName
    train: StagedModel | None
    evaluation: StagedModel | None

    @property
    def main(self) -> StagedModel:
        """The form that decides who holds a weight."""
        found = self.train or self.evaluation
        assert found is not None
        return found

    def holds_weight(self, process: int, name: str) -> bool:
        """Whether a process reads a weight. One that no layer reads is the first's."""
        return process in self.main.holders.get(name, (0,))

    def holds_buffer(self, process: int, node: str) -> bool:
        """Whether a process reads a buffer (by node), or answers for it."""
        forms = [form for form in (self.train, self.evaluation) if form is not None]
        read = any(node in s.buffers for form in forms for s in form.of_process(process))
        return read or self.owner(node) == process

    def owner(self, name: str) -> int:
        """The process that answers for a weight (by name) or a buffer (by node)."""
        for form in (self.train, self.evaluation):
            if form is not None and name in form.first_holder:
                return form.first_holder[name]
        return 0


def layer_cost(layer: LayerPlan) -> int:
    """What the plan's kernels say of a layer's work, in operations: forward and backward."""
    macs, ops = layer.forward_macs + layer.backward_macs, layer.forward_ops + layer.backward_ops
    return 2 * macs + ops


def lay_out(
    train: CompiledModel | None,
    evaluation: CompiledModel | None,
    costs: Sequence[int],
    *,
    num_stages: int,
    num_replicas: int,
    schedule: ScheduleName,
) -> PipelineLayout:
    """Cut a model for `num_stages` processes.

    Args:
        costs: of each layer of `train`, or of `evaluation` where nothing is trained.

    Raises:
        PlanError: it cannot be cut so, or replicas would change batch statistics.
    """
    main = train or evaluation
    assert main is not None
    # A schedule that interleaves is for training: forward only, it would but add messages.
    per_process = stages_per_process(schedule) if train is not None else 1
    parts = balance(costs, num_stages * per_process, joined_layers(main))
    staged = cut_into_stages(main, parts, num_stages)
    for stage, part in zip(staged.stages, parts, strict=True):
        _log.info(
            "Stage %d of %d: %s, %.0f %% of the work",
            *(stage.index, len(parts), _names(stage.layers)),
            100 * sum(costs[i] for i in part) / max(1, sum(costs)),
        )
    other = evaluation if train is not None else None
    layout = PipelineLayout(
        num_stages=num_stages,
        num_replicas=num_replicas,
        schedule=schedule,
        train=staged if train is not None else None,
        evaluation=_cut_alike(staged, other) if other else None if train is not None else staged,
    )
    _refuse_replicated_buffers(layout)
    return layout


def _names(layers: Sequence[CompiledLayer]) -> str:
    first, last = layers[0].layer.name, layers[-1].layer.name
    return first if len(layers) == 1 else f"{first} to {last}"


def _cut_alike(staged: StagedModel, model: CompiledModel) -> StagedModel:
    """Another form of the same model: each layer in the first stage, not before its predecessor's,
    that holds what it needs."""
    changing = {b for s in staged.stages for b in s.updated_buffers}
    held = [{*s.parameters, *(b for b in s.buffers if b in changing)} for s in staged.stages]
    starts, stage = [0], 0
    for index, one in enumerate(model.layers):
        needed = {*one.layer.parameters, *(b for b in one.layer.buffers if b in changing)}
        found = next((s for s in range(stage, len(held)) if needed <= held[s]), None)
        if found is None:
            raise PlanError(
                "in evaluation the model reads its weights in another order than in training",
                where=str(one.site),
                allowed="one order of modules in both, for a pipeline of stages",
                hint="--num_stages 1, or evaluate with a run of its own (--mode eval)",
            )
        starts += [index] * (found - stage)
        stage = found
    starts += [len(model.layers)] * (len(held) - stage)
    parts = [range(a, b) for a, b in pairwise(starts)]
    return cut_into_stages(model, parts, staged.num_processes)


def _refuse_replicated_buffers(layout: PipelineLayout) -> None:
    if layout.train is None or layout.num_replicas == 1:
        return
    names = layout.train.model.changing_buffers
    if names:
        raise PlanError(
            f"replicas cannot share {', '.join(names[:4])}: each microbatch changes it in turn",
            where="--num_replicas",
            allowed="models whose buffers stay as they are (no batch normalization)",
            hint="--num_stages takes further processes; or normalize by group or layer",
        )


def choose_split(
    *,
    asked: int | None,
    batch_size: int,
    batches_per_step: int,
    num_stages: int,
    num_replicas: int,
    schedule: ScheduleName,
) -> int:
    """Into how many microbatches each batch is split.

    Args:
        asked: `num_microbatches`; None chooses: about `MICROBATCHES_PER_STAGE` in a step for each
            stage of each replica, of equal size.
        batches_per_step: `grad_accum_steps`.

    Raises:
        PlanError: no equal split, or none that the replicas and the schedule can share.
    """
    if asked is not None:
        if batch_size % asked:
            raise PlanError(
                f"a batch of {batch_size} samples has no {asked} equal parts",
                where="runconfig.num_microbatches",
                allowed=", ".join(map(str, _divisors(batch_size))),
            )
        _check_share(asked * batches_per_step, num_stages, num_replicas, schedule)
        return asked
    aim = MICROBATCHES_PER_STAGE * num_stages if num_stages > 1 else 1
    fitting = [
        m
        for m in _divisors(batch_size)
        if _fits(m, batches_per_step, num_stages, num_replicas, schedule)
    ]
    if not fitting:
        raise PlanError(
            f"{batches_per_step} batch(es) of {batch_size} samples cannot be shared by "
            f"{num_replicas} replica(s) of {num_stages} stage(s) in schedule {schedule}",
            where="batch_size",
            allowed=f"a batch size that {num_replicas * num_stages} divides, say",
            hint="another batch_size or grad_accum_steps, or --pipeline_schedule 1f1b",
        )
    share = {m: m * batches_per_step // num_replicas for m in fitting}
    below = [m for m in fitting if share[m] <= aim]
    return max(below) if below else min(fitting)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _fits(
    split: int, batches_per_step: int, num_stages: int, num_replicas: int, schedule: ScheduleName
) -> bool:
    try:
        _check_share(split * batches_per_step, num_stages, num_replicas, schedule)
    except PlanError:
        return False
    return True


def _check_share(count: int, num_stages: int, num_replicas: int, schedule: ScheduleName) -> None:
    if count % num_replicas:
        raise PlanError(
            f"{count} microbatches in a step do not divide among {num_replicas} replicas",
            where="runconfig.num_microbatches",
            allowed=f"a multiple of {num_replicas}",
        )
    schedule_tables(schedule, num_stages, count // num_replicas)
