"""Commands on a model of the zoo in TensorFlow, as a user gives them, in each way of running."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from openwafer.cli import main
from openwafer.frontends.tf.library import tf

MODES: Mapping[str, Sequence[str]] = {
    "plain": [],
    "layer_pipelined": ["--cs_ip", "local", "--execution_mode", "layer_pipelined"],
    "weight_streaming": ["--cs_ip", "local", "--execution_mode", "weight_streaming"],
}


def command(name: str, model: str, folder: Path, *flags: str) -> None:
    told = ["--frontend", "tf", "--model_dir", str(folder), *flags]
    assert main([name, model, *told]) == 0


def logged_losses(folder: Path) -> dict[int, float]:
    """By global step, of a compiled run. TensorFlow's own summaries may be of the step before."""
    rows = map(json.loads, (folder / "train" / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows}


def checkpoint(folder: Path, step: int) -> dict[str, np.ndarray]:
    """All variables."""
    reader = tf.train.load_checkpoint(str(folder / f"model.ckpt-{step}"))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
