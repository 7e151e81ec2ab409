"""What is made of a summed loss: perplexity, and bits per token or byte.

Decides that losses and tokens are summed over the whole evaluation and divided once. The loss that
is given is the sum over the counted tokens of a batch, in nats.
"""

from __future__ import annotations

import math

import torch

from openwafer.errors import ConfigError
from openwafer.frontends.torch.metrics.metric import CBMetric, DeviceOutputs

__all__ = ["BitsPerByteMetric", "BitsPerTokenMetric", "PerplexityMetric"]


class PerplexityMetric(CBMetric):
    """exp(total loss / number of tokens); call with `labels` and the summed `loss`.

    `weights` (0 or 1) can leave tokens out of the count.
    """

    def init_state(self) -> None:
        self.total_loss = 0.0
        self.num_tokens = 0.0

    def update_on_device(
        self,
        labels: torch.Tensor,
        loss: torch.Tensor,
        weights: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> DeviceOutputs:
        counted = torch.ones_like(labels, dtype=torch.float32) if weights is None else weights
        return DeviceOutputs(args=[loss.to(torch.float32), counted.to(torch.float32).sum()])

    def update_on_host(self, loss: torch.Tensor, num_tokens: torch.Tensor) -> None:
        self.total_loss += float(loss)
        self.num_tokens += float(num_tokens)

    def compute(self) -> float:
        if not self.num_tokens:
            return 0.0
        try:
            return math.exp(self.total_loss / self.num_tokens)
        except OverflowError:
            return math.inf


class BitsPerTokenMetric(PerplexityMetric):
    """Base-2 logarithm of the perplexity."""

    def compute(self) -> float:
        return self.total_loss / math.log(2) / self.num_tokens if self.num_tokens else 0.0


class BitsPerByteMetric(BitsPerTokenMetric):
    """Bits per byte of text: comparable across tokenizers, and with a compressor's output.

    Args:
        bytes_per_token: of the evaluated text, as in `DataInfo.bytes_per_token`.
    """

    def __init__(self, bytes_per_token: float, name: str | None = None) -> None:
        if not bytes_per_token > 0:
            raise ConfigError(
                f"bits per byte with {bytes_per_token} bytes per token",
                allowed="a positive number",
                hint="the data's info.bytes_per_token; 0 there means unknown",
            )
        self._bytes_per_token = bytes_per_token
        super().__init__(name)

    def compute(self) -> float:
        return super().compute() / self._bytes_per_token
