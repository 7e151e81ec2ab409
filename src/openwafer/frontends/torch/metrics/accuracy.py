"""Share of right answers.

Decides what is summed. Also the masked-LM and next-sentence accuracies, with masks as weights.
"""

from __future__ import annotations

import torch

from openwafer.frontends.torch.metrics.metric import CBMetric, DeviceOutputs

__all__ = ["AccuracyMetric"]


class AccuracyMetric(CBMetric):
    """Share of predictions that equal their labels; `weights` (0 or 1) can leave entries out."""

    def init_state(self) -> None:
        self.total_correct = 0.0
        self.total = 0.0

    def update_on_device(
        self,
        labels: torch.Tensor,
        predictions: torch.Tensor,
        weights: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> DeviceOutputs:
        correct = (labels == predictions).to(torch.float32)
        if weights is None:
            return DeviceOutputs(args=[correct.sum(), torch.ones_like(correct).sum()])
        weights = weights.to(torch.float32)
        return DeviceOutputs(args=[(correct * weights).sum(), weights.sum()])

    def update_on_host(self, correct: torch.Tensor, count: torch.Tensor) -> None:
        self.total_correct += float(correct)
        self.total += float(count)

    def compute(self) -> float:
        return self.total_correct / self.total if self.total else 0.0
