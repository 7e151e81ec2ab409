"""How close a pipeline of two processes comes to its schedule's ideal.

    python -m benchmarks.pipeline_stages [--schedules 1f1b …] [--steps 8] [--microbatches 16]

Two processes of one core each train a stack of equal transformer blocks. Ideal of a step: what the
forward and backward passes of one microbatch take in the process that takes longer (processor time
as measured in that step, with adding the gradients to their sums), times
(microbatches + (processes - 1) / v), where a process has v stages: two if interleaved, so that
filling and draining the pipeline takes half as long, else one. The bar: 1.10 times that.

Prints one JSON line per schedule: the median step and its ratio to the ideal (the median of each
step's own, since a core's speed drifts), all ratios, where the median step's time went in each
process (in layers, waiting for messages, the rest: the update and what leads to it), and the same
work in one process.
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
from typing import Any, get_args

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
from openwafer.runtime.stages.messages import Mailbox
from openwafer.runtime.stages.process import PipelineProcess
from openwafer.runtime.stages.run import StageRun
from openwafer.runtime.stages.schedule import ScheduleName, stages_per_process
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
    """Where the seconds of each step of this process go."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        for kind, names in (
            (CompiledLayer, ("forward", "backward")),
            (SplitBackward, ("inputs", "weights")),
            (StageRun, ("_add",)),
        ):
            for name in names:
                self._watch(kind, name, "layers", time.thread_time)
        for name in ("take", "finish"):
            self._watch(Mailbox, name, "waiting", time.perf_counter)
        train = PipelineProcess.train

        def watched_step(*given: Any, **named: Any) -> Any:
            self.steps.append({"layers": 0.0, "waiting": 0.0})
            began = time.perf_counter()
            result = train(*given, **named)
            seconds = self.steps[-1]
            seconds["rest"] = time.perf_counter() - began - sum(seconds.values())
            return result

        PipelineProcess.train = watched_step

    def _watch(self, kind: type, name: str, part: str, clock: Callable[[], float]) -> None:
        function = getattr(kind, name)

        def watched(*given: Any, **named: Any) -> Any:
            began = clock()
            try:
                return function(*given, **named)
            finally:
                self.steps[-1][part] += clock() - began

        setattr(kind, name, watched)


def stage(
    answer: Connection, rank: int, folder: Path, schedule: ScheduleName, count: int, steps: int
) -> None:
    """One process of the pipeline, on a core of its own."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    watch = Watch()
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
        schedule=schedule,
    )
    seconds: list[float] = []
    if rank:
        serve(work, layout, group)
    else:
        executor = PipelineStages(work, layout, group)
        seconds = timed_steps(executor, count, steps)
        executor.close()
    answer.send((seconds, watch.steps[1:]))


def in_one_process(microbatches: int) -> float:
    """Seconds of a step with all layers in this process, on one core."""
    torch.set_num_threads(1)
    executor = LayerPipelined(workload())
    return statistics.median(timed_steps(executor, microbatches, 2))


def measure(schedule: ScheduleName, microbatches: int, num_steps: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(NUM_STAGES)]
        processes = [
            context.Process(
                target=stage,
                args=(pipe[1], rank, Path(folder), schedule, microbatches, num_steps),
            )
            for rank, pipe in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        answers: list[tuple[list[float], list[dict[str, float]]]] = [
            pipe[0].recv() for pipe in pipes
        ]
        for process in processes:
            process.join()
    steps = answers[0][0]
    spent = [parts for _, parts in answers]
    fill = (NUM_STAGES - 1) / stages_per_process(schedule)
    ratios: list[float] = []
    for index, step in enumerate(steps):
        slowest = max(parts[index]["layers"] for parts in spent) / microbatches
        ratios.append(step / (slowest * (microbatches + fill)))
    return {
        "case": f"{schedule}, {NUM_STAGES} processes, {microbatches} microbatches",
        "step_seconds": round(statistics.median(steps), 4),
        "ratio": round(statistics.median(ratios), 3),
        "bar": BAR,
        "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
        "processes": [
            {
                part: round(statistics.median(step[part] for step in parts), 4)
                for part in ("layers", "waiting", "rest")
            }
            for parts in spent
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--schedules", nargs="+", default=list(get_args(ScheduleName)))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--microbatches", type=int, default=16)
    options = parser.parse_args()
    machine = {
        "one_process_seconds": round(in_one_process(options.microbatches), 4),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for schedule in options.schedules:
        line = measure(schedule, options.microbatches, options.steps) | machine
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
