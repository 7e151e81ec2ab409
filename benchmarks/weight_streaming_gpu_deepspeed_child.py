"""DeepSpeed's side of case `gpu`: ZeRO-3 with parameters and optimizer offloaded to pinned memory.

Decides DeepSpeed's settings: bf16 weights with an fp32 master copy, its own CPU AdamW, no clipping,
one sequence per microbatch, nothing computed twice (its activations fit a large card). The model
and the batch are ours. Runs where DeepSpeed is installed.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch

from benchmarks.timed_child import serve_steps
from benchmarks.weight_streaming_gpu_side import SETTINGS, make_batches, make_model


def _settings(microbatches: int) -> dict[str, Any]:
    offload = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": microbatches,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": True},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
        },
        "zero_optimization": {
            "stage": 3,
            "offload_param": offload,
            "offload_optimizer": offload,
            "overlap_comm": True,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--setting", choices=list(SETTINGS), default="full")
    setting = SETTINGS[parser.parse_args().setting]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)

    import deepspeed

    model = make_model(setting, setting.layers)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config=_settings(setting.microbatches),
    )
    batches = [
        {name: tensor.to(setting.device) for name, tensor in batch.items()}
        for batch in make_batches(setting)
    ]

    def step() -> dict[str, object]:
        losses: list[torch.Tensor] = []
        for batch in batches:
            loss = engine(**batch)
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        mean = float(torch.stack(losses).mean())
        torch.cuda.synchronize()
        return {"loss": mean, "reserved": torch.cuda.max_memory_reserved()}

    serve_steps(step)


if __name__ == "__main__":
    main()
