"""A small real model behind the Executor interface, and data that are a function of their place."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from openwafer.config.runconfig import RunConfig
from openwafer.runtime.executor import Batch, Executor, ModelState, StepResult
from openwafer.train.checkpoint import OptimizerCodec
from openwafer.train.hooks import MetricFunctions
from openwafer.train.job import Job

WIDTH = 8
SAMPLES = 4
BASE_RATE = 0.01


def learning_rate_at(step: int) -> float:
    return BASE_RATE / (1 + 0.1 * step)


def batch_at(epoch: int, index: int, *, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1_000_003 * seed + 1009 * epoch + index)
    x = torch.randn(SAMPLES, WIDTH, generator=generator)
    return x, x.sum(dim=1, keepdim=True).sin()


class FakeSource:
    """`length` batches an epoch; `sized` says whether it tells. `said` overrides what it tells."""

    def __init__(self, length: int, *, sized: bool = True, said: int | None = None) -> None:
        self.length, self.sized, self.said = length, sized, said
        self.asked: list[tuple[int, int]] = []
        self.taken: list[tuple[int, int]] = []
        self.closed = 0

    @property
    def num_batches(self) -> int | None:
        return (self.said or self.length) if self.sized else None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        self.asked.append((epoch, start))
        try:
            for index in range(start, self.length):
                self.taken.append((epoch, index))
                yield batch_at(epoch, index)
        finally:
            self.closed += 1


class FakeExecutor(Executor):
    """AdamW on a two-layer network with dropout drawn from (step, microbatch) and, as a user's own
    code may, from torch's global generator. `before_step` may do harm."""

    def __init__(
        self, *, before_step: Callable[[int], None] | None = None, width: int = WIDTH
    ) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.model = torch.nn.Sequential(
                torch.nn.Linear(width, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
            )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=BASE_RATE)
        self.before_step = before_step or (lambda step: None)
        self.nan_at: set[int] = set()
        self.skipped_at: set[int] = set()
        self.scale = 1024.0
        self.steps: list[int] = []
        self.group_sizes: list[int] = []

    def train_step(self, microbatches: Sequence[Batch], *, step: int) -> StepResult:
        self.before_step(step)
        self.steps.append(step)
        self.group_sizes.append(len(microbatches))
        self.optimizer.param_groups[0]["lr"] = learning_rate_at(step)
        self.optimizer.zero_grad()
        total = torch.zeros(())
        for index, (x, y) in enumerate(microbatches):
            generator = torch.Generator().manual_seed(31 * step + index)
            keep = (torch.rand(x.shape, generator=generator) > 0.1).float()
            noise = 0.01 * torch.randn(x.shape)
            loss = F.mse_loss(self.model(x * keep + noise), y) / len(microbatches)
            loss.backward()
            total += loss.detach()
        if step in self.nan_at:
            total = torch.tensor(float("nan"))
        if step not in self.skipped_at:
            self.optimizer.step()
            self.scale += 1.0
        return StepResult(
            loss=total,
            applied=step not in self.skipped_at,
            grad_norm=0.5,
            loss_scale=self.scale,
        )

    def eval_step(self, batch: Batch, *, step: int) -> StepResult:
        x, y = batch
        with torch.no_grad():
            loss = F.mse_loss(self.model(x), y)
        return StepResult(loss=loss, metrics={"eval/mean": [(y,)]})

    def state(self) -> ModelState:
        names = [name for name, _ in self.model.named_parameters()]
        state = self.optimizer.state_dict()["state"]
        optimizer = {name: dict(state.get(index, {})) for index, name in enumerate(names)}
        return ModelState(
            model={k: v.clone() for k, v in self.model.state_dict().items()},
            optimizer={name: entry for name, entry in optimizer.items() if entry},
            loss_scale={"scale": self.scale},
        )

    def load_state(self, state: ModelState, *, weights_only: bool = False) -> None:
        self.model.load_state_dict({k: v.clone() for k, v in state.model.items()}, strict=False)
        if weights_only:
            return
        names = [name for name, _ in self.model.named_parameters()]
        groups = self.optimizer.state_dict()["param_groups"]
        entries = {
            index: {k: v.clone() for k, v in state.optimizer[name].items()}
            for index, name in enumerate(names)
            if name in state.optimizer
        }
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})
        self.scale = state.loss_scale.get("scale", self.scale)

    def explain_nonfinite(self, microbatches: Sequence[Batch], *, step: int) -> str:
        return f"layer 2 of {len(microbatches)} microbatches"


NAMES = [name for name, _ in FakeExecutor().model.named_parameters()]

CODEC = OptimizerCodec(
    to_torch=lambda state: {
        "state": {NAMES.index(name): entry for name, entry in state.items()},
        "param_groups": [{"params": list(range(len(NAMES)))}],
    },
    from_torch=lambda entry: {NAMES[index]: dict(s) for index, s in entry["state"].items()},
)


class MeanMetric:
    """The mean of what `eval_step` hands over, as a metric."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def functions(self) -> MetricFunctions:
        return MetricFunctions(update=self.update, compute=self.compute, reset=self.values.clear)

    def update(self, metrics: Mapping[str, Sequence[tuple[torch.Tensor, ...]]]) -> None:
        for (tensor,) in metrics.get("eval/mean", []):
            self.values.append(float(tensor.mean()))

    def compute(self) -> dict[str, float]:
        return {"eval/mean": sum(self.values) / len(self.values)} if self.values else {}


def make_job(executor: FakeExecutor, run: RunConfig, **changes: Any) -> Job:
    parts: dict[str, Any] = {
        "executor": executor,
        "run": run,
        "codec": CODEC,
        "learning_rate_at": learning_rate_at,
        "train_source": FakeSource(10),
        "eval_source": FakeSource(3),
    }
    return Job(**{**parts, **changes})


def weights(executor: FakeExecutor) -> dict[str, torch.Tensor]:
    return executor.state().model


def same_weights(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def main(arguments: list[str]) -> int:
    """A training script for the tests that kill it: `model_dir max_steps kill_at|-1 seconds`."""
    from openwafer.train.job import run_job
    from openwafer.train.progress import configure_logging

    model_dir, max_steps = Path(arguments[0]), int(arguments[1])
    kill_at, seconds = int(arguments[2]), float(arguments[3])

    def before_step(step: int) -> None:
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        (model_dir / "in_a_step").touch()
        time.sleep(seconds)

    configure_logging()
    torch.manual_seed(1)
    executor = FakeExecutor(before_step=before_step)
    run = RunConfig(model_dir=model_dir, max_steps=max_steps, checkpoint_steps=3, log_steps=2)
    result = run_job(make_job(executor, run, grad_accum_steps=2))
    torch.save(weights(executor), model_dir / "final.pt")
    return result.exit_code


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
