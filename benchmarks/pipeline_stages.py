"""How close a pipeline of two processes comes to its schedule's ideal.

    python -m benchmarks.pipeline_stages [--schedule 1f1b] [--steps 5] [--microbatches 16]

Two processes of one core each train a stack of equal transformer blocks cut in the middle. Ideal:
the slowest stage's forward and backward pass of one microbatch, as measured in the same steps in
each process, times (microbatches + stages - 1). The bar: a step takes at most 1.10 times that.

Prints one JSON line: the median step, the ideal, their ratio, and the same work in one process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openwafer.config.hyperparameters import HYPERPARAMETERS
from openwafer.config.optimizer import OptimizerConfig
from openwafer.config.schedule import Constant
from openwafer.frontends.torch.capture import capture_module, flatten_batch
from openwafer.plan.layers import cut_layers
from openwafer.runtime.compiled import CompiledLayer, compile_layers
from openwafer.runtime.executor import Executor
from openwafer.runtime.layer_pipelined import LayerPipelined
from openwafer.runtime.process_group import join_group
from openwafer.runtime.stages.executor import PipelineStages, serve
from openwafer.runtime.stages.layout import lay_out
from openwafer.runtime.stages.split_backward import SplitBackward
from openwafer.runtime.workload import Workload
from openwafer.streaming.tasks import TaskEnvironment

NUM_STAGES = 2
BLOCKS, WIDTH, SEQUENCE, SAMPLES = 8, 256, 128, 2
BAR = 1.10


class Stack(nn.Module):
    """BLOCKS equal blocks; x, target [batch, seq, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
            for _ in range(BLOCKS)
        )

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return (x - target).square().mean()


def workload() -> Workload:
    torch.manual_seed(0)
    model = Stack()
    batch = (torch.randn(SAMPLES, SEQUENCE, WIDTH), torch.randn(SAMPLES, SEQUENCE, WIDTH))
    program = capture_module(model, batch, training=True).program
    names = [p.name for p in program.parameters]
    held = dict(model.named_parameters())
    return Workload(
        train=compile_layers(program, cut_layers(program)),
        evaluation=None,
        weights={name: held[name].detach() for name in names},
        buffers={b.node: b.value for b in program.buffers if b.value is not None},
        trained=tuple(names),
        optimizer=OptimizerConfig(
            optimizer_type="adamw",
            hyperparameters=HYPERPARAMETERS["adamw"](),
            learning_rate=Constant(learning_rate=1e-4),
        ),
        learning_rate_at=lambda step: 1e-4,
        leaves=flatten_batch,
        device=torch.device("cpu"),
        seed=1,
    )


def timed_steps(executor: Executor, microbatches: int, steps: int) -> list[float]:
    """Seconds of each step but the first."""
    batches = [
        (torch.randn(SAMPLES, SEQUENCE, WIDTH), torch.randn(SAMPLES, SEQUENCE, WIDTH))
        for _ in range(microbatches)
    ]
    seconds: list[float] = []
    for step in range(steps + 1):
        began = time.perf_counter()
        executor.train_step(batches, step=step)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


class Watch:
    """Processor seconds of this process within layer functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*given: Any, **named: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*given, **named)
            finally:
                self.seconds += time.thread_time() - began

        return watched


def stage(answer: Connection, rank: int, folder: Path, options: argparse.Namespace) -> None:
    """One process of the pipeline, on a core of its own."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    watch = Watch()
    for kind, names in (
        (CompiledLayer, ("forward", "backward")),
        (SplitBackward, ("inputs", "weights")),
    ):
        for name in names:
            setattr(kind, name, watch.around(getattr(kind, name)))
    place = TaskEnvironment(
        rank=rank,
        num_tasks=NUM_STAGES,
        num_compute=NUM_STAGES,
        secret_file=folder / "secret",
        secret_is_given=True,
    )
    group = join_group(place, torch.device("cpu"))
    work = workload()
    assert work.train is not None
    layout = lay_out(
        work.train,
        None,
        [1] * len(work.train.layers),
        num_stages=NUM_STAGES,
        num_replicas=1,
        schedule=options.schedule,
    )
    seconds: list[float] = []
    if rank:
        serve(work, layout, group)
    else:
        executor = PipelineStages(work, layout, group)
        seconds = timed_steps(executor, options.microbatches, options.steps)
        executor.close()
    passes = (options.steps + 1) * options.microbatches
    answer.send((seconds, watch.seconds / passes))


def in_one_process(options: argparse.Namespace) -> float:
    """Seconds of a step with all layers in this process, on one core."""
    torch.set_num_threads(1)
    executor = LayerPipelined(workload())
    return statistics.median(timed_steps(executor, options.microbatches, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--microbatches", type=int, default=16)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    answers: list[tuple[list[float], float]] = []
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(NUM_STAGES)]
        processes = [
            context.Process(target=stage, args=(pipe[1], rank, Path(folder), options))
            for rank, pipe in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        answers = [pipe[0].recv() for pipe in pipes]
        for process in processes:
            process.join()
    step = statistics.median(answers[0][0])
    slowest = max(per_microbatch for _, per_microbatch in answers)
    ideal = slowest * (options.microbatches + NUM_STAGES - 1)
    alone = in_one_process(options)
    line = {
        "case": f"{options.schedule}, {NUM_STAGES} stages, {options.microbatches} microbatches",
        "step_seconds": round(step, 4),
        "ideal_seconds": round(ideal, 4),
        "ratio": round(step / ideal, 3),
        "bar": BAR,
        "one_process_seconds": round(alone, 4),
        "stage_seconds": [round(seconds, 5) for _, seconds in answers],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
