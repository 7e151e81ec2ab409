"""DeepSpeed's side of the comparison: ZeRO-3 with parameters and optimizer offloaded, on a CPU.

Decides DeepSpeed's settings: bf16 weights with an fp32 master copy, its own CPU AdamW, clipping as
given (its default has been 1.0 since 0.19.8). Runs in an environment that has DeepSpeed; the model
and the batch are those of the other side.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch


def _offload(device: str, folder: str) -> dict[str, Any]:
    given: dict[str, Any] = {"device": device, "pin_memory": False}
    return given | ({"nvme_path": folder} if device == "nvme" else {})


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": 3,
        "offload_param": _offload(arguments.device, arguments.folder),
        "offload_optimizer": _offload(arguments.device, arguments.folder),
    }
    if arguments.device == "nvme":
        # Its staging buffers must hold the largest parameter, and all that are in flight.
        zero["offload_param"] |= {"buffer_size": arguments.largest + 1024, "buffer_count": 16}
    return {
        "train_micro_batch_size_per_gpu": arguments.batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": arguments.clip,
        "bf16": {"enabled": True},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
        },
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "nvme"], required=True)
    parser.add_argument("--folder", default="")
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--clip", type=float, required=True)
    arguments = parser.parse_args()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

    import deepspeed

    from benchmarks.timed_child import serve_steps
    from benchmarks.weight_streaming_model import make_batch, make_model

    model = make_model()
    arguments.largest = max(weight.numel() for weight in model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=_settings(arguments)
    )
    batch = make_batch(arguments.batch_size)

    def step() -> dict[str, float]:
        loss = engine(**batch)
        engine.backward(loss)
        engine.step()
        return {"loss": float(loss)}

    serve_steps(step)


if __name__ == "__main__":
    torch.manual_seed(1)
    main()
