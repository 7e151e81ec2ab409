"""GPT-J 6B, or some of its layers, trained on a GPU in a process of its own: streamed from host
memory within a limit of GPU memory, or resident.

    python -m benchmarks.weight_streaming_gpu_side streamed --setting full

Decides the model, the batch and how each side is set up; it is stepped from outside
(timed_child.py). The setting `small` runs the same code on a CPU, so that it is known to run.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from benchmarks.timed_child import Step, serve_steps
from benchmarks.weight_streaming_batches import make_batches
from benchmarks.weight_streaming_xl_side import make_ours, summarized_step
from openwafer.frontends.torch.streaming_setup import StreamingRules
from openwafer.runtime.timing.summary import RunSummary
from openwafer.runtime.timing.timeline import Timeline
from openwafer.zoo import build
from openwafer.zoo.model import ModelConfig, ZooModel

__all__ = ["SETTINGS", "Setting", "make_model", "microbatches"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """few, more: layers of the resident models. limit_bytes: of device memory, for the streamed
    model. product_size: of the square matrices whose product gives the device's peak."""

    device: str
    model: str
    vocabulary: int
    width: int
    filter_size: int
    layers: int
    sequence: int
    microbatches: int
    few: int
    more: int
    limit_bytes: int
    product_size: int

    @property
    def tokens(self) -> int:
        """Of one update."""
        return self.microbatches * self.sequence

    def step_flops(self, layers: int) -> float:
        """Of a step's matrix products, forward and backward: two operations for each weight and
        token, and attention's two products, of which a causal mask hides half; three times that,
        once forward and twice backward. What runs again is not counted twice."""
        block = 4 * self.width**2 + 2 * self.width * self.filter_size
        weights = layers * block + self.vocabulary * self.width
        attention = layers * self.sequence * self.width
        return 3.0 * 2.0 * (weights + attention) * self.tokens


SETTINGS: Mapping[str, Setting] = {
    "full": Setting(
        device="cuda",
        model="gptj/6b",
        vocabulary=50400,
        width=4096,
        filter_size=16384,
        layers=28,
        sequence=2048,
        # At 400 TFLOP/s a block takes 130 ms, forward, again and backward; its AdamW on the host
        # moves 6 GB, which it can in that time.
        microbatches=16,
        few=1,
        more=8,
        limit_bytes=24 << 30,
        product_size=8192,
    ),
    "small": Setting(
        device="cpu",
        model="gptj/tiny",
        vocabulary=512,
        width=128,
        filter_size=512,
        layers=4,
        sequence=32,
        microbatches=2,
        few=1,
        more=2,
        limit_bytes=256 << 20,
        product_size=256,
    ),
}


def make_model(setting: Setting, layers: int) -> ZooModel[ModelConfig]:
    """Fresh weights, without dropout, the same every time."""
    torch.manual_seed(1)
    sizes = {"vocab_size": setting.vocabulary, "max_position_embeddings": setting.sequence}
    return build(setting.model, layers=layers, **sizes)


def microbatches(setting: Setting) -> list[dict[str, torch.Tensor]]:
    """Of one update, one sequence each."""
    return make_batches(setting.microbatches, (1, setting.sequence), setting.vocabulary)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("side", choices=("streamed", "resident"))
    parser.add_argument("--setting", choices=list(SETTINGS), default="full")
    parser.add_argument("--layers", type=int)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    setting = SETTINGS[arguments.setting]
    layers = arguments.layers or setting.layers
    make = {"streamed": _streamed_step, "resident": _resident_step}[arguments.side]
    serve_steps(make(setting, layers))


def _resident_step(setting: Setting, layers: int) -> Step:
    batches = microbatches(setting)
    executor = make_ours(
        make_model(setting, layers),
        "layer_pipelined",
        StreamingRules(num_microbatches=setting.microbatches),
        batches,
        device=torch.device(setting.device),
    )

    def step(number: int) -> dict[str, object]:
        return {"loss": float(executor.train_step(batches, step=number).loss), **_finished(setting)}

    return step


def _streamed_step(setting: Setting, layers: int) -> Step:
    summary = RunSummary(on_disk=False)
    timeline = Timeline([summary])
    batches = microbatches(setting)
    executor = make_ours(
        make_model(setting, layers),
        "weight_streaming",
        StreamingRules(
            device_memory_bytes=setting.limit_bytes, num_microbatches=setting.microbatches
        ),
        batches,
        recorder=timeline,
        device=torch.device(setting.device),
    )

    step = summarized_step(executor, batches, summary, timeline)
    return lambda number: {**step(number), **_finished(setting)}


def _finished(setting: Setting) -> dict[str, object]:
    """Wait for the device; the most memory that torch has taken of it."""
    if setting.device != "cuda":
        return {}
    torch.cuda.synchronize()
    return {"reserved": torch.cuda.max_memory_reserved()}


if __name__ == "__main__":
    main()
