"""Case `fsdp`: ours from RAM, against FSDP2 with CPU offload on one process.

    python -m benchmarks.weight_streaming_fsdp --batch_size N     (their side, stepped from outside)

Decides FSDP's settings: every block and the rest sharded (over one process), parameters, gradients
and optimizer state offloaded, bf16 parameters for compute, fp32 sums, fused AdamW.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.timed_child import TimedChild, serve_steps
from benchmarks.weight_streaming_case import CaseResult, step_seconds
from benchmarks.weight_streaming_model import SEQUENCE, make_batch, make_model

__all__ = ["run"]

BATCH_SIZE = 4


def run(case: str, *, repeat: int = 5) -> Iterator[CaseResult]:
    """Tokens per second."""
    size = ["--batch_size", str(BATCH_SIZE)]
    with (
        TimedChild("benchmarks.weight_streaming_side", ["ram", *size]) as ours,
        TimedChild("benchmarks.weight_streaming_fsdp", size) as theirs,
    ):
        found = step_seconds({"ours": ours, "theirs": theirs}, repeat=repeat)
    rates = {n: BATCH_SIZE * SEQUENCE / statistics.median(s) for n, s in found.items()}
    yield CaseResult(
        case=case,
        ours=rates["ours"],
        theirs=rates["theirs"],
        unit="tokens/s",
        details={"batch": [BATCH_SIZE, SEQUENCE], "repeat": repeat},
    )


def _sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    options = {
        "mesh": init_device_mesh("cpu", (1,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=False),
    }
    for block in model.transformer_decoder.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--batch_size", type=int, required=True)
    batch = make_batch(parser.parse_args().batch_size)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    model = _sharded(make_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)

    def step(_: int) -> dict[str, float]:
        loss = model(**batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": float(loss)}

    serve_steps(step)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
