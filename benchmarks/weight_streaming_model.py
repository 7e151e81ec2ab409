"""The model and batch that both sides of a weight streaming comparison train.

Decides them: GPT-2 small of the zoo, sequence 512, without dropout, random tokens.
"""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.weight_streaming_batches import make_batches
from openwafer.zoo import build

__all__ = ["SEQUENCE", "make_batch", "make_model"]

SEQUENCE = 512


def make_model(**overrides: object) -> nn.Module:
    """GPT-2 small with fresh weights, the same every time."""
    torch.manual_seed(1)
    sizes = {"layers": 12, "dropout_rate": 0.0, "attention_dropout_rate": 0.0}
    return build("gpt2/small", **{**sizes, "max_position_embeddings": SEQUENCE, **overrides})


def make_batch(batch_size: int) -> dict[str, torch.Tensor]:
    """Random next-token prediction, [batch_size, SEQUENCE]."""
    return make_batches(1, (batch_size, SEQUENCE), 50257)[0]
