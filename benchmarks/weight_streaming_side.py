"""One side of a comparison on GPT-2 small: ours in one of its modes, or plain PyTorch.

    python -m benchmarks.weight_streaming_side resident|ram|disk|eager|compile --batch_size N

Decides how each side is written; it is stepped from outside (timed_child.py).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.timed_child import Step, serve_steps
from benchmarks.weight_streaming_model import make_batch, make_model
from openwafer.config.hyperparameters import AdamWOptions
from openwafer.config.optimizer import OptimizerConfig
from openwafer.config.schedule import Constant
from openwafer.frontends.torch.capture import capture_module
from openwafer.frontends.torch.session import RunRules, make_executor
from openwafer.frontends.torch.streaming_setup import StreamingRules
from openwafer.machine.spec import load_machine
from openwafer.pipeline import compile_program
from openwafer.runtime.timing.timeline import NO_RECORDER, Recorder

__all__ = ["OURS", "PLAIN", "make_side"]

LEARNING_RATE = 1e-4
OURS = ("resident", "ram", "disk")
PLAIN = ("eager", "compile")


@contextmanager
def make_side(
    name: str, batch_size: int, *, recorder: Recorder = NO_RECORDER, **model_changes: object
) -> Generator[Step]:
    """A function that takes the training step of a number and gives its loss.

    Args:
        name: one of `OURS` or `PLAIN`.
        recorder: is told what ours does when, where weights are streamed.
        model_changes: of the zoo's configuration, `layers=4` say.
    """
    model, batch = make_model(**model_changes), make_batch(batch_size)
    with tempfile.TemporaryDirectory() as folder:
        if name in OURS:
            yield from _ours(name, model, batch, Path(folder), recorder)
        else:
            yield _plain(model, batch, compiled=name == "compile")


def _plain(model: torch.nn.Module, batch: dict[str, torch.Tensor], *, compiled: bool) -> Step:
    """What a PyTorch user writes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    called = torch.compile(model) if compiled else model

    def step(_: int) -> dict[str, object]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = called(**batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": float(loss)}

    return step


def _ours(
    name: str,
    model: torch.nn.Module,
    batch: dict[str, torch.Tensor],
    folder: Path,
    recorder: Recorder,
) -> Generator[Step]:
    optimizer = OptimizerConfig(
        optimizer_type="adamw",
        hyperparameters=AdamWOptions(correct_bias=True, eps=1e-8),
        learning_rate=Constant(learning_rate=LEARNING_RATE),
        weight_decay_rate=0.01,
    )
    captured = capture_module(model, batch, training=True, autocast_dtype=torch.bfloat16)
    compiled = compile_program(
        captured.program,
        machine=load_machine("wse2"),
        execution_mode="layer_pipelined" if name == "resident" else "weight_streaming",
        compile_dir=None,
        optimizer=optimizer,
        compute_dtype="bfloat16",
    )
    rules = RunRules(
        optimizer=optimizer,
        learning_rate_at=lambda step: LEARNING_RATE,
        device=torch.device("cpu"),
        seed=1,
        compute_dtype="bfloat16",
        streaming=StreamingRules(weight_store=f"disk:{folder}" if name == "disk" else "ram"),
        recorder=recorder,
    )
    executor = make_executor(compiled, None, {"model": model}, rules)

    def step(number: int) -> dict[str, object]:
        return {"loss": float(executor.train_step([batch], step=number).loss)}

    try:
        yield step
    finally:
        executor.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("side", choices=[*OURS, *PLAIN])
    parser.add_argument("--batch_size", type=int, required=True)
    arguments = parser.parse_args()
    with make_side(arguments.side, arguments.batch_size) as step:
        serve_steps(step)


if __name__ == "__main__":
    main()
