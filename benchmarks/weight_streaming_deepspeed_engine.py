"""DeepSpeed's engine, for a process that is alone.

Decides what both of its sides set: ZeRO-3 with parameters and optimizer offloaded, bf16 weights
with an fp32 master copy, its own CPU AdamW. Does not decide where they are offloaded to, the
microbatches or clipping. Runs in an environment that has DeepSpeed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["make_engine"]


def make_engine(
    model: nn.Module, backend: str, zero: Mapping[str, Any], settings: Mapping[str, Any]
) -> Any:
    """Of `deepspeed.initialize`, in a process group of this process only.

    Args:
        backend: of the process group.
        zero, settings: DeepSpeed's, of ZeRO and all others, besides those decided here.
    """
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)

    import deepspeed

    config = {
        **settings,
        "bf16": {"enabled": True},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
        },
        "zero_optimization": {"stage": 3, **zero},
    }
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config
    )
    return engine
