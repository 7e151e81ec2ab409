"""DeepSpeed's side of case `gpu`: ZeRO-3 with parameters and optimizer offloaded to pinned memory.

Decides that there is no clipping, one sequence per microbatch, and nothing computed twice (its
activations fit a large card). The model and the batch are ours. Runs where DeepSpeed is installed.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.timed_child import serve_steps
from benchmarks.weight_streaming_deepspeed_engine import make_engine
from benchmarks.weight_streaming_gpu_side import SETTINGS, make_model, microbatches


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--setting", choices=list(SETTINGS), default="full")
    setting = SETTINGS[parser.parse_args().setting]
    offload = {"device": "cpu", "pin_memory": True}
    engine = make_engine(
        make_model(setting, setting.layers),
        "nccl",
        {"offload_param": offload, "offload_optimizer": offload, "overlap_comm": True},
        {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": setting.microbatches,
            "gradient_clipping": 0.0,
        },
    )
    batches = [
        {name: tensor.to(setting.device) for name, tensor in batch.items()}
        for batch in microbatches(setting)
    ]

    def step(_: int) -> dict[str, object]:
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
