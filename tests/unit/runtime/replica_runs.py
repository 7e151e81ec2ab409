"""Replicas of weight streaming, for tests: processes that share the store of one model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from group_processes import Processes
from runtime_reference import Setup

from openwafer.config.optimizer import OptimizerConfig
from openwafer.frontends.torch.streaming_setup import StreamingRules, make_weight_streaming
from openwafer.runtime.executor import Executor
from openwafer.runtime.process_group import ComputeGroup
from openwafer.runtime.replicas import ReplicatedStreaming, serve_replica

__all__ = ["Run", "drive", "replicated"]

Run = Callable[[Executor, Setup], Any]


def drive(
    group: ComputeGroup, setup: Setup, config: OptimizerConfig, run: Run, folder: Path | None
) -> Any:
    """What `run` gives in rank 0; in the others, the names of the weights that they keep."""
    # Rank 0 sends the leaves of its batches.
    workload = setup.workload(config, **({"leaves": dict} if group.rank else {}))
    rules = StreamingRules(weight_store=f"disk:{folder}" if folder else "ram")
    executor = make_weight_streaming(workload, setup.layers, rules, prefetch_depth=1, group=group)
    if group.rank:
        kept = sorted(executor.own_state()["weights"])
        serve_replica(executor, group)
        return kept
    replicated = ReplicatedStreaming(workload, executor, group)
    try:
        return run(replicated, setup)
    finally:
        replicated.close()


def replicated(
    setup: Setup,
    config: OptimizerConfig,
    run: Run,
    where: Path,
    *,
    count: int = 2,
    disk: bool = False,
) -> list[Any]:
    return Processes(where, count, drive, setup, config, run, where if disk else None).results()
