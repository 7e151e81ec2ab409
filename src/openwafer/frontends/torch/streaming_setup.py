"""From a workload to the executor that streams its weights.

Decides which store there is, what of the device's memory is taken before a step begins, and that
the memory of a step is planned before anything large is made. Does not decide how a plan is made to
fit (runtime/memory/step_memory.py).

On a CPU, device memory is a part of host memory. With a store on disk the budget is the whole
process's: its private writable memory, what RLIMIT_DATA limits. With a store in RAM the store is
not counted, only what a step takes besides.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from openwafer.plan.layers import Layer
from openwafer.runtime.memory.account import DeviceMemory, limit_gpu
from openwafer.runtime.memory.block_pool import install_block_pool
from openwafer.runtime.memory.host_memory import (
    KEPT_SHARE,
    give_back_freed_memory,
    keep_freed_memory,
    process_bytes,
    reusing_freed_memory,
)
from openwafer.runtime.memory.layer_memory import model_memory
from openwafer.runtime.memory.spill import DiskSpill, HostSpill, Spill
from openwafer.runtime.memory.step_memory import (
    MARGIN,
    ActivationChoice,
    StepPlan,
    plan_step,
)
from openwafer.runtime.process_group import ComputeGroup
from openwafer.runtime.replica import GroupReplica, Replica
from openwafer.runtime.stores.disk_store import DiskStore, staging_bytes
from openwafer.runtime.stores.shared_store import SharedStore, assign_owners
from openwafer.runtime.stores.store import (
    Copies,
    RamStore,
    Shard,
    WeightStore,
    copies_wanted,
    make_shards,
)
from openwafer.runtime.timing.timeline import NO_RECORDER, Recorder
from openwafer.runtime.weight_streaming import StreamingOptions, WeightStreaming
from openwafer.runtime.workload import Workload

__all__ = ["StreamingRules", "make_weight_streaming", "plan_memory"]

_log = logging.getLogger("openwafer")

COMPILER_BYTES = 300 << 20
"""Left for TorchInductor, which compiles in this process when a layer first runs: its modules took
78 MiB when they were measured; the rest is an allowance for one graph at a time."""

SMALL_BLOCKS_BYTES = 64 << 20
"""Freed memory that the heap may keep beside a pool of large blocks."""

DISK_RETURNS_WAITING = 6
"""Layers whose gradients may wait for a store on disk: one that stalls for seconds at a time holds
up the layers only once so many wait. In a step of GPT-2 XL on a virtual disk, with updates of 0.8
to 6.4 s beside layers of 1.8 s, the layers waited 27 s with one; played through again, the same
updates hold them up for 9 s with four and 5 s with six, the most that was of use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamingRules:
    """weight_store: `ram` or `disk:DIR`. device_memory_bytes: the budget, None for none.
    num_microbatches: of one update."""

    weight_store: str = "ram"
    device_memory_bytes: int | None = None
    activations: ActivationChoice = "auto"
    num_microbatches: int = 1

    @property
    def folder(self) -> Path | None:
        """Where the store is on disk."""
        kind, _, folder = self.weight_store.partition(":")
        return Path(folder) if kind == "disk" else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    shards: tuple[Shard, ...]
    copies: Copies


def make_weight_streaming(
    workload: Workload,
    layers: Sequence[Layer],
    rules: StreamingRules,
    *,
    prefetch_depth: int,
    recorder: Recorder = NO_RECORDER,
    group: ComputeGroup | None = None,
) -> WeightStreaming:
    """The executor, with its store filled.

    Args:
        group: the processes that share the store, and each batch among them.

    Raises:
        PlanError: the step does not fit the budget, or the store's folder cannot be used.
    """
    parts = _parts(workload, layers)
    promised_bytes = _promised_bytes(workload, rules)
    pool = None
    if promised_bytes is not None:
        pool = install_block_pool() if _compiles(workload) else None
        kept_bytes = int(KEPT_SHARE * promised_bytes)
        give_back_freed_memory(kept_bytes=SMALL_BLOCKS_BYTES if pool else kept_bytes)
    elif workload.device.type == "cpu":
        keep_freed_memory()
    plan = plan_memory(workload, layers, rules, prefetch_depth=prefetch_depth)
    memory = DeviceMemory(rules.device_memory_bytes)
    if workload.device.type == "cuda" and rules.device_memory_bytes is not None:
        limit_gpu(workload.device, rules.device_memory_bytes)
    if _counts_process(workload, rules):
        memory.take("process", process_bytes())
    spill = _spill(workload, plan, rules, memory)
    replica = Replica()
    if group is None:
        store = _store(workload, parts, rules)
    else:
        store = _shared_store(workload, parts, rules, group)
        replica = GroupReplica(group, store, workload.trained)
        # The others' weights are not held here, so that they can be let go of.
        workload = replace(workload, weights=store.weights())
    if pool is not None and promised_bytes is not None:
        pool.limit(int(promised_bytes * (1 - MARGIN)) - process_bytes() - COMPILER_BYTES)
    return WeightStreaming(
        workload,
        store,
        parts.shards,
        StreamingOptions(
            prefetch_depth=plan.prefetch_depth if plan else prefetch_depth,
            returns_waiting=plan.returns_waiting if plan else 1,
            policies=plan.policies if plan else (),
            spill=spill,
            memory=memory,
            recorder=recorder,
            replica=replica,
            temporaries=reusing_freed_memory if promised_bytes and not pool else nullcontext,
            pool=pool,
        ),
    )


def plan_memory(
    workload: Workload, layers: Sequence[Layer], rules: StreamingRules, *, prefetch_depth: int
) -> StepPlan | None:
    """How a training step goes about its memory; None where nothing is trained.

    Raises:
        PlanError: it does not fit the budget.
    """
    model = workload.train
    if model is None:
        return None
    fixed: dict[str, int] = {}
    if _counts_process(workload, rules):
        parts = _parts(workload, layers)
        fixed["process"] = process_bytes()
        if _compiles(workload):
            fixed["compiler"] = COMPILER_BYTES
        fixed["store"] = staging_bytes(
            workload.weights, parts.shards, workload.optimizer, copies=parts.copies
        )
    plan = plan_step(
        model_memory(model),
        choice=rules.activations,
        prefetch_depth=prefetch_depth,
        num_microbatches=rules.num_microbatches,
        returns_waiting=_returns_waiting(workload, rules),
        budget_bytes=rules.device_memory_bytes,
        fixed=fixed,
        kept_share=KEPT_SHARE if _counts_process(workload, rules) else 0.0,
        # Not a GPU's: by estimate a block of GPT-J saves 280 MB for 2,048 tokens, 11 ms each way
        # at the 25 GB/s of PCIe 4, and runs forward again in 3 to 5 ms at 200 to 300 TFLOP/s.
        spills_elsewhere=_counts_process(workload, rules),
    )
    if rules.device_memory_bytes is not None:
        _log.info("memory of a step: %s", plan)
    return plan


def _returns_waiting(workload: Workload, rules: StreamingRules) -> int:
    """How many layers' gradients may wait for the store, where there is memory for them. Not for
    layers whose temporaries are in the heap: gradients that stay between them keep holes there,
    which come to a layer's gradients each."""
    in_heap = _promised_bytes(workload, rules) is not None and not _compiles(workload)
    return 1 if rules.folder is None or in_heap else DISK_RETURNS_WAITING


def _compiles(workload: Workload) -> bool:
    """Whether layers are compiled when they first run."""
    layers = workload.train.layers if workload.train is not None else ()
    return any(c.functions.run_forward is not c.functions.forward_graph for c in layers)


def _counts_process(workload: Workload, rules: StreamingRules) -> bool:
    return workload.device.type == "cpu" and rules.folder is not None


def _promised_bytes(workload: Workload, rules: StreamingRules) -> int | None:
    """The most that the process may take; None where nothing is promised of it."""
    return rules.device_memory_bytes if _counts_process(workload, rules) else None


def _parts(workload: Workload, layers: Sequence[Layer]) -> _Parts:
    return _Parts(
        shards=make_shards(layers, list(workload.weights), workload.trained),
        copies=copies_wanted([workload.train, workload.evaluation], workload.weights),
    )


def _store(workload: Workload, parts: _Parts, rules: StreamingRules) -> WeightStore:
    given = (workload.weights, parts.shards, workload.optimizer)
    pin = workload.device.type == "cuda"
    if rules.folder is None:
        return RamStore(*given, copies=parts.copies, pin=pin)
    promised = _promised_bytes(workload, rules) is not None
    return DiskStore(*given, rules.folder, copies=parts.copies, pin=pin, memory_promised=promised)


def _shared_store(
    workload: Workload, parts: _Parts, rules: StreamingRules, group: ComputeGroup
) -> SharedStore:
    """This process's part of the store, and the others' by way of it."""
    sizes = {name: weight.numel() for name, weight in workload.weights.items()}
    owners = assign_owners(parts.shards, sizes, group.size)
    shards = tuple(shard for shard in parts.shards if owners[shard.index] == group.rank)
    names = {name for shard in shards for name in shard.names}
    own = _store(
        replace(workload, weights={n: w for n, w in workload.weights.items() if n in names}),
        _Parts(shards=shards, copies={n: d for n, d in parts.copies.items() if n in names}),
        rules,
    )
    return SharedStore(own, parts.shards, workload.weights, owners, group)


def _spill(
    workload: Workload, plan: StepPlan | None, rules: StreamingRules, memory: DeviceMemory
) -> Spill | None:
    if plan is None or "spill" not in plan.policies:
        return None
    if rules.folder is None or workload.device.type != "cpu":
        return HostSpill()
    units = plan.policies.count("spill") * rules.num_microbatches
    return DiskSpill(rules.folder, plan.spill_unit_bytes, units, memory)
