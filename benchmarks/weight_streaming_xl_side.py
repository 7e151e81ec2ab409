"""GPT-2 XL, or some of its layers, trained in a process of its own: streamed within a hard memory
limit, resident, or by plain PyTorch.

    python -m benchmarks.weight_streaming_xl_side streamed --layers 48 --limit 4GiB --folder DIR

Decides how each side is set up; it is stepped from outside (timed_child.py). The limit is the
kernel's (RLIMIT_DATA: private writable memory), set before anything is built.
"""

from __future__ import annotations

import argparse
import logging
import resource
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.timed_child import Step, serve_steps
from benchmarks.weight_streaming_batches import make_batches
from openwafer.config.byte_size import parse_bytes
from openwafer.config.hyperparameters import AdamWOptions
from openwafer.config.optimizer import OptimizerConfig
from openwafer.config.schedule import Constant
from openwafer.frontends.torch.capture import capture_module
from openwafer.frontends.torch.session import RunRules, make_executor
from openwafer.frontends.torch.streaming_setup import StreamingRules
from openwafer.frontends.torch.weights_in_files import WeightsInFiles
from openwafer.kernels.kernel import ExecutionMode
from openwafer.machine.spec import load_machine
from openwafer.pipeline import compile_program
from openwafer.runtime.executor import Executor
from openwafer.runtime.forms.inductor import LayerCompiler
from openwafer.runtime.timing.summary import RunSummary
from openwafer.runtime.timing.timeline import NO_RECORDER, Recorder, Timeline
from openwafer.zoo import build
from openwafer.zoo.model import ModelConfig, ZooModel

Model = ZooModel[ModelConfig]

SEQUENCE = 1024
MICROBATCHES = 4
"""4,096 tokens per update."""

LEARNING_RATE = 1e-4
SIDES = ("streamed", "resident", "plain")


def make_model(layers: int) -> Model:
    """XL's sizes, without dropout, the same weights every time."""
    torch.manual_seed(1)
    return build("gpt2/xl", layers=layers, dropout_rate=0.0, attention_dropout_rate=0.0)


def microbatches() -> list[dict[str, torch.Tensor]]:
    """Of one update, one sequence each."""
    return make_batches(MICROBATCHES, (1, SEQUENCE), 50257)


def make_ours(
    model: Model,
    mode: ExecutionMode,
    streaming: StreamingRules,
    batches: Sequence[dict[str, torch.Tensor]],
    *,
    layer_compiler: LayerCompiler = "auto",
    recorder: Recorder = NO_RECORDER,
    device: torch.device = torch.device("cpu"),  # noqa: B008  a value, never changed
) -> Executor:
    """The executor for microbatches like these."""
    optimizer = OptimizerConfig(
        optimizer_type="adamw",
        hyperparameters=AdamWOptions(),
        learning_rate=Constant(learning_rate=LEARNING_RATE),
        weight_decay_rate=0.01,
    )
    captured = capture_module(model, batches[0], training=True, autocast_dtype=torch.bfloat16)
    compiled = compile_program(
        captured.program,
        machine=load_machine("wse2"),
        execution_mode=mode,
        compile_dir=None,
        optimizer=optimizer,
        compute_dtype="bfloat16",
        num_microbatches=len(batches),
    )
    rules = RunRules(
        optimizer=optimizer,
        learning_rate_at=lambda _: LEARNING_RATE,
        device=device,
        seed=1,
        compute_dtype="bfloat16",
        streaming=streaming,
        layer_compiler=layer_compiler,
        recorder=recorder,
    )
    return make_executor(compiled, None, {"model": model}, rules)


def plain_step(model: Model) -> Step:
    """What a PyTorch user writes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    batches = microbatches()

    def step(_: int) -> dict[str, object]:
        total = 0.0
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch) / MICROBATCHES
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": total}

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--limit", help="hard limit of the process's memory, as 4GiB")
    parser.add_argument("--folder", type=Path, default=Path("."), help="of the weight store")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    limit = None if arguments.limit is None else parse_bytes(arguments.limit)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    serve_steps(_make_step(arguments.side, arguments.layers, arguments.folder, limit))


def _make_step(side: str, layers: int, folder: Path, limit_bytes: int | None) -> Step:
    if side == "plain":
        return plain_step(make_model(layers))
    if side == "streamed":
        return _streamed_step(layers, folder, limit_bytes)
    batches = microbatches()
    rules = StreamingRules(num_microbatches=MICROBATCHES)
    executor = make_ours(make_model(layers), "layer_pipelined", rules, batches)
    return lambda number: {"loss": float(executor.train_step(batches, step=number).loss)}


def _streamed_step(layers: int, folder: Path, limit_bytes: int | None) -> Step:
    rules = StreamingRules(
        weight_store=f"disk:{folder}",
        device_memory_bytes=limit_bytes,
        num_microbatches=MICROBATCHES,
    )
    summary = RunSummary(on_disk=True)
    timeline = Timeline([summary])
    with WeightsInFiles(folder):
        model = make_model(layers)
    batches = microbatches()
    executor = make_ours(model, "weight_streaming", rules, batches, recorder=timeline)

    return summarized_step(executor, batches, summary, timeline)


def summarized_step(
    executor: Executor,
    batches: Sequence[dict[str, torch.Tensor]],
    summary: RunSummary,
    timeline: Timeline,
) -> Step:
    """A streamed step and its summary line. It ends when every weight is updated: else the last
    update would go on beside whatever is measured next."""

    def step(number: int) -> dict[str, object]:
        timeline.begin_step(number)
        loss = float(executor.train_step(batches, step=number).loss)
        executor.borrowed_state()  # waits for the updates
        timeline.end_step()
        told = summary.result(
            prefetch_depth=timeline.prefetch_depth, returns_waiting=timeline.returns_waiting
        )
        return {"loss": loss, "line": told.line if told else ""}

    return step


if __name__ == "__main__":
    main()
