"""What a run left in its model_dir, read by the tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def losses(model_dir: Path) -> dict[int, float]:
    """The training loss by global step."""
    lines = (model_dir / "train/metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}


def weights(model_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """The weights of the checkpoint of that step."""
    return torch.load(model_dir / f"checkpoint_{step}.mdl", weights_only=True)["model"]
