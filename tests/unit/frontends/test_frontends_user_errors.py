"""A model that fails in the plain loop reads as an error with its line, not as a traceback."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from openwafer.errors import OpenWaferError
from openwafer.frontends.torch.plain import PlainExecutor


def test_a_failing_model_names_its_line() -> None:
    model = nn.Linear(3, 1)

    def call(batch: Any) -> torch.Tensor:
        return model(batch).mean()

    executor = PlainExecutor(
        model,
        call,
        [model],
        optimizer=None,
        learning_rate_at=lambda step: 0.1,
        device=torch.device("cpu"),
        seed=1,
    )
    assert executor.eval_step(torch.ones(2, 3), step=0).loss.ndim == 0
    with pytest.raises(OpenWaferError, match="the model failed on a batch: RuntimeError") as caught:
        executor.eval_step(torch.ones(2, 5), step=0)
    assert caught.value.where.startswith(f"{__file__}:")
