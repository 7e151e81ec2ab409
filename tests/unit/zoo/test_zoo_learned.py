"""What the tiny configurations learn, by the commands that their files state."""

from __future__ import annotations

import pytest

from openwafer.zoo.run_model import run_model

REACHED = {
    "fc_mnist/tiny": ("accuracy", 0.96),
    "t5/tiny": ("eval/accuracy_sequence", 0.98),
    "transformer/tiny": ("eval/accuracy_sequence", 0.98),
    "unet/tiny": ("eval/DSC", 0.97),
}
"""Metric and the least value: a little below what the files state, since other machines round
differently."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", REACHED)
def test_tiny_learns_its_task(name, tmp_path):
    result = run_model("train_and_eval", [name, "--model_dir", str(tmp_path)])
    metric, least = REACHED[name]
    assert result is not None
    assert result.evaluation is not None
    assert result.evaluation.metrics[metric] >= least
