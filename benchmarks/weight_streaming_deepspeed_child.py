"""DeepSpeed's side of the comparison: ZeRO-3 with parameters and optimizer offloaded, on a CPU.

Decides where they are offloaded to, and clipping as given (its default has been 1.0 since 0.19.8).
Runs in an environment that has DeepSpeed; the model and the batch are those of the other side.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.timed_child import serve_steps
from benchmarks.weight_streaming_deepspeed_engine import make_engine
from benchmarks.weight_streaming_model import make_batch, make_model


def _offload(device: str, folder: str) -> dict[str, Any]:
    given: dict[str, Any] = {"device": device, "pin_memory": False}
    return given | ({"nvme_path": folder} if device == "nvme" else {})


def _zero(device: str, folder: str, largest: int) -> dict[str, Any]:
    """largest: values of the largest parameter."""
    parameters = _offload(device, folder)
    if device == "nvme":
        # Its staging buffers must hold the largest parameter, and all that are in flight.
        parameters |= {"buffer_size": largest + 1024, "buffer_count": 16}
    return {"offload_param": parameters, "offload_optimizer": _offload(device, folder)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "nvme"], required=True)
    parser.add_argument("--folder", default="")
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--clip", type=float, required=True)
    arguments = parser.parse_args()
    model = make_model()
    largest = max(weight.numel() for weight in model.parameters())
    settings = {
        "train_micro_batch_size_per_gpu": arguments.batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": arguments.clip,
        "zero_allow_untested_optimizer": True,
    }
    zero = _zero(arguments.device, arguments.folder, largest)
    engine = make_engine(model, "gloo", zero, settings)
    batch = make_batch(arguments.batch_size)

    def step(_: int) -> dict[str, float]:
        loss = engine(**batch)
        engine.backward(loss)
        engine.step()
        return {"loss": float(loss)}

    serve_steps(step)


if __name__ == "__main__":
    main()
